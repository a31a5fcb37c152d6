//! A VMM that wants to break the daemon: messages out of order, memory that is not there, descriptors
//! that are something else. Its own VM may suffer; the daemon lives and serves another VM.

use std::fs::File;
use std::os::fd::AsRawFd;

use crate::common::*;
use bufshare::protocol::vq;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserProtocolFeatures as Protocol};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const USER: u64 = 0x7000_0000;

/// A connection that has negotiated everything that is offered.
fn front(daemon: &Daemon, vm: &str) -> Frontend {
    let mut front = Frontend::connect(daemon.socket(vm), vq::COUNT as u64).expect("connect");
    front.set_owner().expect("SET_OWNER");
    let features = front.get_features().expect("GET_FEATURES");
    let protocol = front.get_protocol_features().expect("GET_PROTOCOL_FEATURES");
    front.set_protocol_features(protocol).expect("SET_PROTOCOL_FEATURES");
    front.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    front.set_features(features).expect("SET_FEATURES");
    front
}

fn memfd(len: u64, seals: SealFlags) -> File {
    let fd = memfd_create("ram", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).expect("memfd");
    ftruncate(&fd, len).expect("ftruncate");
    if !seals.is_empty() {
        fcntl_add_seals(&fd, seals).expect("seals");
    }
    fd.into()
}

fn region(file: &File, start: u64, len: u64) -> VhostUserMemoryRegionInfo {
    VhostUserMemoryRegionInfo {
        guest_phys_addr: start,
        memory_size: len,
        userspace_addr: USER + start,
        mmap_offset: 0,
        mmap_handle: file.as_raw_fd(),
    }
}

/// Starts all rings at these guest addresses. The daemon may refuse at any step.
fn start_rings(front: &mut Frontend, at: u64) -> Option<[EventFd; 3]> {
    let event = || EventFd::new(EFD_NONBLOCK).expect("eventfd");
    let kicks = [event(), event(), event()];
    for (i, kick) in kicks.iter().enumerate() {
        let at = USER + at + i as u64 * 0x4000;
        let rings = VringConfigData {
            queue_max_size: 16,
            queue_size: 16,
            desc_table_addr: at,
            avail_ring_addr: at + 0x1000,
            used_ring_addr: at + 0x2000,
            ..Default::default()
        };
        front.set_vring_num(i, 16).ok()?;
        front.set_vring_base(i, 0).ok()?;
        front.set_vring_addr(i, &rings).ok()?;
        front.set_vring_call(i, &event()).ok()?;
        front.set_vring_kick(i, kick).ok()?;
    }
    (0..3).try_for_each(|i| front.set_vring_enable(i, true)).ok()?;
    for kick in &kicks {
        kick.write(1).expect("kick");
    }
    Some(kicks)
}

/// Panics unless the daemon lives and serves VM "b", and "a" again.
#[track_caller]
pub fn assert_served(daemon: &mut Daemon) {
    std::thread::sleep(QUIET);
    assert_eq!(daemon.exited(), None, "the daemon is dead");
    for vm in ["b", "a"] {
        let mut guest = Guest::connect(daemon, vm);
        let (export, _) = guest.export_pages(1);
        guest.release(export.handle.get()).expect("RELEASE");
    }
}

fn two_vms() -> Daemon {
    Daemon::start(&["a", "b"])
}

#[test]
fn memory_behind_the_end_of_its_file_is_never_touched() {
    let mut daemon = two_vms();
    let file = memfd(0x1000, SealFlags::SHRINK | SealFlags::GROW);
    let mut front = front(&daemon, "a");
    // It may be refused; what matters is that nobody looks at it.
    if front.set_mem_table(&[region(&file, 0, 0x10_0000)]).is_ok() {
        start_rings(&mut front, 0x8_0000);
    }
    drop(front);
    assert_served(&mut daemon);
}

#[test]
fn unsealed_memory_is_never_touched_without_leave() {
    let mut daemon = two_vms();
    let file = memfd(0x10_0000, SealFlags::empty());
    let mut front = front(&daemon, "a");
    if front.set_mem_table(&[region(&file, 0, 0x10_0000)]).is_ok() {
        let kicks = start_rings(&mut front, 0x8_0000);
        file.set_len(0).expect("truncate");
        for kick in kicks.iter().flatten() {
            kick.write(1).expect("kick");
        }
    }
    assert!(daemon.log().contains("memory-backend-memfd"), "{}", daemon.log());
    drop(front);
    assert_served(&mut daemon);
}

/// Huge pages come from a pool that may be empty, whatever the seals: the first touch would be SIGBUS.
#[test]
fn huge_pages_are_never_touched_without_leave() {
    let mut daemon = two_vms();
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | MemfdFlags::HUGETLB;
    let Ok(file) = memfd_create("ram", flags).map(File::from) else {
        skip("no huge pages in this kernel");
        return;
    };
    file.set_len(2 << 20).expect("ftruncate");
    fcntl_add_seals(&file, SealFlags::SHRINK).expect("seals");
    let mut front = front(&daemon, "a");
    if front.set_mem_table(&[region(&file, 0, 2 << 20)]).is_ok() {
        start_rings(&mut front, 0x8_0000);
    }
    drop(front);
    assert_served(&mut daemon);
    assert!(daemon.log().contains("huge pages"), "{}", daemon.log());
}

#[test]
fn more_memory_than_a_vm_has_is_refused() {
    let mut daemon = two_vms();
    // Each region would cost the daemon a descriptor and a mapping.
    let file = memfd(0x1000, SealFlags::SHRINK);
    let mut many = front(&daemon, "a");
    many.set_protocol_features(Protocol::all()).expect("SET_PROTOCOL_FEATURES");
    many.set_mem_table(&[region(&file, 0, 0x1000)]).expect("SET_MEM_TABLE");
    let fds = daemon.fds();
    let added =
        (1..2000).take_while(|i| many.add_mem_region(&region(&file, i * 0x1000, 0x1000)).is_ok());
    assert!(added.count() < 100, "as many regions as it likes");
    assert!(daemon.fds() < fds + 200);
    drop(many);
    // Address space is one for all VMs of the daemon.
    let file = memfd(100 << 40, SealFlags::SHRINK);
    let huge = front(&daemon, "a");
    huge.set_mem_table(&[region(&file, 0, 100 << 40)]).expect_err("100 TiB of memory");
    drop(huge);
    assert_served(&mut daemon);
}

/// Messages in an order, or with numbers, that no VMM would send. Each may end the connection.
#[test]
fn messages_that_make_no_sense() {
    let mut daemon = two_vms();
    let file = memfd(0x10_0000, SealFlags::SHRINK);
    let event = || EventFd::new(EFD_NONBLOCK).expect("eventfd");
    let half = VhostUserMemoryRegionInfo { mmap_offset: 0x8_0000, ..region(&file, 0, 0x8_0000) };
    let odd = VhostUserMemoryRegionInfo { mmap_offset: 0x800, ..region(&file, 0, 0x1000) };
    let table = [region(&file, 0, 0x10_0000)];
    type Attack<'a> = &'a dyn Fn(&mut Frontend) -> vhost::Result<()>;
    let attacks: [Attack<'_>; 8] = [
        // Rings that run without memory.
        &|front| {
            (0..3).try_for_each(|i| {
                front.set_vring_call(i, &event())?;
                front.set_vring_kick(i, &event())?;
                front.set_vring_enable(i, true)
            })
        },
        &|front| (0..3).try_for_each(|i| front.get_vring_base(i).map(drop)),
        &|front| front.set_vring_num(0, 0),
        &|front| front.set_vring_num(0, 1025),
        &|front| {
            front.set_mem_table(&table)?;
            front.set_vring_num(0, 17)?;
            start_rings(front, 0);
            (0..200).try_for_each(|i| front.set_vring_base(i % 3, (i * 331) as u16))
        },
        // Two regions in one place, and one that starts in the middle of a page.
        &|front| front.set_mem_table(&[half, region(&file, 0x1000, 0x1000)]).map(drop),
        &|front| front.set_mem_table(&[odd]).map(drop),
        // Other memory under running rings, without them and with them.
        &|front| {
            front.set_mem_table(&table)?;
            start_rings(front, 0x8_0000);
            for _ in 0..50 {
                front.set_mem_table(&[region(&file, 0, 0x1000)])?;
                front.set_mem_table(&[half])?;
                front.set_mem_table(&table)?;
            }
            front.reset_owner()
        },
    ];
    for attack in attacks {
        let mut front = front(&daemon, "a");
        // Whether it is refused is the daemon's business.
        let _ = attack(&mut front);
    }
    assert_served(&mut daemon);
}

#[test]
fn a_thousand_vmms_leave_nothing() {
    let mut daemon = two_vms();
    let file = memfd(0x10_0000, SealFlags::SHRINK);
    let round = || {
        let mut front = front(&daemon, "a");
        front.set_mem_table(&[region(&file, 0, 0x10_0000)]).expect("SET_MEM_TABLE");
        start_rings(&mut front, 0).expect("rings");
    };
    (0..20).for_each(|_| round());
    let (fds, rss) = (daemon.fds(), daemon.rss_kib());
    (0..1000).for_each(|_| round());
    assert!(wait_for(SOON, || daemon.fds() <= fds), "{:?}", daemon.fd_names());
    assert!(daemon.rss_kib() < rss + 4096, "{rss} KiB, then {}", daemon.rss_kib());
    assert!(daemon.log().lines().count() < 500, "the log grows with them");
    assert_served(&mut daemon);
}
