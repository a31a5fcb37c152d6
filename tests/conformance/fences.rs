//! BEGIN of a guest and the fences of the host, with fences that a test makes: sw_sync, and vgem.
//! That takes a host with udmabuf and debugfs.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use super::pair::held;
use super::sync::{Shared, shared};
use super::*;
use bufshare::host::wire::FdKind;
use bufshare::ioctl::{ioctl_flat, ioctl_new_fd, iow, iowr};
use bufshare::protocol::{RespSync, access, flag};
use std::time::Instant;

const READ: u16 = flag::SYNC_READ;
const WRITE: u16 = flag::SYNC_WRITE;
const NONBLOCK: u16 = flag::SYNC_NONBLOCK;
const FIVE_SECONDS: u64 = 5_000_000_000;

/// A timeline whose fences are over when the test says so, or with an error when it is dropped.
struct Timeline {
    file: File,
    made: u32,
}

impl Timeline {
    fn open() -> Option<Timeline> {
        let path = "/sys/kernel/debug/sync/sw_sync";
        let file = File::options().read(true).write(true).open(path).ok()?;
        Some(Timeline { file, made: 0 })
    }

    /// SW_SYNC_IOC_CREATE_FENCE: value, name, fd.
    fn fence(&mut self) -> OwnedFd {
        self.made += 1;
        let mut arg = [0u32; 10];
        arg[0] = self.made;
        ioctl_new_fd(self.file.as_fd(), iowr(b'W', 0, 40), &mut arg, 36).expect("a fence")
    }

    /// SW_SYNC_IOC_INC.
    fn finish(&mut self) {
        let mut by = std::mem::take(&mut self.made);
        ioctl_flat(self.file.as_fd(), iow(b'W', 1, 4), &mut by).expect("INC");
        // Another timeline: the numbers of this one only grow.
        *self = Timeline::open().expect("sw_sync");
    }

    /// DMA_BUF_IOCTL_IMPORT_SYNC_FILE: a device of the host works on the buffer from now on.
    fn work(&mut self, lease: &Lease, bits: u32) {
        let fence = self.fence();
        let mut arg = [bits, u32::try_from(fence.as_raw_fd()).expect("open")];
        ioctl_flat(lease.fd.as_fd(), iow(b'b', 3, 8), &mut arg).expect("IMPORT_SYNC_FILE");
    }
}

/// A guest's buffer, a lease of it, and somebody to make fences. `None`, and the test is skipped,
/// where there are none.
fn fenced() -> Option<(Shared, Timeline)> {
    let Some(timeline) = Timeline::open() else {
        skip("no sw_sync in debugfs (CONFIG_SW_SYNC, root)");
        return None;
    };
    let s = shared(1);
    if s.lease.fd_kind != FdKind::DmaBuf {
        skip("this host makes no dma-bufs");
        return None;
    }
    Some((s, timeline))
}

#[track_caller]
fn waits(s: &mut Shared) {
    assert!(s.bed.guest.sync_next::<RespSync>(A_WHILE).is_none(), "it waits");
}

#[track_caller]
fn ends(s: &mut Shared, head: u16) -> Reply<RespSync> {
    let (done, reply) = s.bed.guest.sync_next(SOON).expect("an end");
    assert_eq!(done, head);
    reply
}

/// [dev-sync-7] [dev-sync-8] [dev-sync-19] [dev-queue-1] [dev-queue-3]
#[test]
fn readers_wait_for_writers_and_writers_for_all() {
    let Some((mut s, mut timeline)) = fenced() else { return };
    for (work, begin, conflict) in [
        (access::READ, READ, false),
        (access::READ, WRITE, true),
        (access::READ, READ | WRITE, true),
        (access::WRITE, READ, true),
        (access::WRITE, WRITE, true),
    ] {
        timeline.work(&s.lease, work);
        if conflict {
            s.begin(begin | NONBLOCK).refused(Status::Again);
            let head = s.start(begin, FIVE_SECONDS);
            waits(&mut s);
            s.bed.guest.query(s.buffer.handle).expect("QUERY is served meanwhile");
            timeline.finish();
            ends(&mut s, head).expect("the fence is over");
        } else {
            s.begin(begin | NONBLOCK).expect("readers do not disturb each other");
            timeline.finish();
        }
        s.end(begin);
    }
}

/// [dev-sync-19] What comes after the look is not waited for; what was there then is, all of it.
#[test]
fn the_look_is_a_snapshot() {
    let Some((mut s, mut timeline)) = fenced() else { return };
    let mut second = Timeline::open().expect("sw_sync");
    timeline.work(&s.lease, access::WRITE);
    second.work(&s.lease, access::READ);
    let head = s.start(WRITE, FIVE_SECONDS);
    waits(&mut s);
    let mut third = Timeline::open().expect("sw_sync");
    third.work(&s.lease, access::WRITE);
    timeline.finish();
    waits(&mut s);
    second.finish();
    ends(&mut s, head).expect("the third came later");
    s.begin(WRITE | NONBLOCK).refused(Status::Again);
    third.finish();
    s.begin(WRITE | NONBLOCK).expect("all are over");
}

/// [dev-sync-9] [dev-sync-20] [dev-cancel-3]
#[test]
fn a_wait_that_fails_leaves_no_trace() {
    let Some((mut s, mut timeline)) = fenced() else { return };
    timeline.work(&s.lease, access::WRITE);
    s.begin(READ).refused(Status::TimedOut);
    let started = Instant::now();
    let head = s.start(WRITE, 80_000_000);
    waits(&mut s);
    let read = host_access(access::READ);
    host_refused(s.client.try_begin(s.lease.id, read), Status::Again);
    ends(&mut s, head).refused(Status::TimedOut);
    assert!(started.elapsed() >= Duration::from_millis(80));
    s.client.try_begin(s.lease.id, host_access(READ_WRITE)).expect("nobody holds a bit");
    s.host_end(READ_WRITE);
    let head = s.start(WRITE, FIVE_SECONDS);
    waits(&mut s);
    s.bed.guest.cancel(s.buffer.handle, 0).expect("CANCEL");
    ends(&mut s, head).refused(Status::Canceled);
    s.client.try_begin(s.lease.id, host_access(READ_WRITE)).expect("nobody holds a bit");
    s.host_end(READ_WRITE);
    // A bit that was set before stays.
    timeline.finish();
    s.begin(READ).expect("BEGIN");
    timeline.work(&s.lease, access::READ);
    s.begin(WRITE | NONBLOCK).refused(Status::Again);
    s.client.try_begin(s.lease.id, read).expect("nobody writes");
    let write = host_access(access::WRITE);
    host_refused(s.client.try_begin(s.lease.id, write), Status::Again);
}

/// [dev-sync-10] Bits are given before the look, in the order in which the requests came.
#[test]
fn who_waits_for_a_fence_is_before_who_came_later() {
    let Some((mut s, mut timeline)) = fenced() else { return };
    s.host_begin(access::WRITE);
    let head = s.start(READ, FIVE_SECONDS);
    waits(&mut s);
    timeline.work(&s.lease, access::WRITE);
    s.host_end(access::WRITE);
    waits(&mut s);
    host_refused(s.client.try_begin(s.lease.id, host_access(access::WRITE)), Status::Again);
    timeline.finish();
    assert_eq!(ends(&mut s, head).expect("BEGIN").generation.get(), 1);
}

/// [dev-sync-21]
#[test]
fn an_error_is_an_end() {
    let Some((mut s, mut timeline)) = fenced() else { return };
    timeline.work(&s.lease, access::WRITE);
    let head = s.start(READ, FIVE_SECONDS);
    waits(&mut s);
    drop(timeline);
    ends(&mut s, head).expect("who wrote is gone");
}

/// [dev-sync-22]
#[test]
fn a_fence_delays_nobody_else() {
    let Some((mut s, mut timeline)) = fenced() else { return };
    timeline.work(&s.lease, access::WRITE);
    let head = s.start(READ, FIVE_SECONDS);
    waits(&mut s);
    assert_eq!(s.end(READ), 0, "END without BEGIN");
    let other = s.bed.offered(1);
    let lease = acquire(&mut s.client, &other);
    s.bed.guest.begin(sync(&other, READ | WRITE)).expect("another buffer");
    drop(lease);
    // A program on the host has the dma-buf and looks by itself.
    s.client.try_begin(s.lease.id, host_access(access::READ)).expect("BEGIN of the host");
    timeline.finish();
    ends(&mut s, head).expect("BEGIN");
}

/// Snapshots of fences that the daemon keeps.
fn snapshots(s: &Shared) -> usize {
    s.bed.daemon.fd_names().iter().filter(|name| name.contains("sync_file")).count()
}

/// [dev-sync-14] [dev-sync-15] [dev-queue-2] What waits is bounded, and nothing is left of it.
#[test]
fn waits_for_fences_are_bounded_and_end_with_the_session() {
    let Some((mut s, mut timeline)) = fenced() else { return };
    timeline.work(&s.lease, access::WRITE);
    s.begin(READ | NONBLOCK).refused(Status::Again);
    assert_eq!(snapshots(&s), 0);
    let limit = s.bed.guest.config.max_waits.get();
    for _ in 0..limit {
        s.start(READ, u64::MAX);
    }
    let over = s.start(READ, u64::MAX);
    ends(&mut s, over).refused(Status::Busy);
    assert_eq!(snapshots(&s), limit as usize);
    s.bed.guest.release(s.buffer.handle).expect("RELEASE");
    for _ in 0..limit {
        let (_, reply) = s.bed.guest.sync_next::<RespSync>(SOON).expect("all of them");
        reply.refused(Status::Canceled);
    }
    assert!(wait_for(SOON, || snapshots(&s) == 0), "{:?}", s.bed.daemon.fd_names());
    let other = s.bed.offered(1);
    let lease = acquire(&mut s.client, &other);
    timeline.work(&lease, access::WRITE);
    let request = Sync { timeout_ns: u64::MAX, ..sync(&other, READ) };
    s.bed.guest.sync_start::<RespSync>(&request.bytes());
    waits(&mut s);
    assert_eq!(snapshots(&s), 1);
    s.bed.guest.reset(Stop::WithBase);
    assert!(wait_for(SOON, || snapshots(&s) == 0), "{:?}", s.bed.daemon.fd_names());
    timeline.finish();
    waits(&mut s);
}

/// [dev-sync-19] [dev-sync-21] A program dies in the middle of its work: its fences stay, and end
/// as the kernel ends them.
#[test]
fn fences_outlive_their_program() {
    let Some((s, mut timeline)) = fenced() else { return };
    let Shared { mut bed, buffer, client, lease } = s;
    timeline.work(&lease, access::WRITE);
    drop((client, lease));
    bed.guest.begin(sync(&buffer, READ | NONBLOCK)).refused(Status::Again);
    let request = Sync { timeout_ns: FIVE_SECONDS, ..sync(&buffer, READ) };
    let head = bed.guest.sync_start::<RespSync>(&request.bytes());
    assert!(bed.guest.sync_next::<RespSync>(A_WHILE).is_none(), "it waits");
    drop(timeline);
    let (done, reply) = bed.guest.sync_next::<RespSync>(SOON).expect("an end");
    assert_eq!(done, head);
    reply.expect("BEGIN");
}

/// [dev-sync-19] An importer's BEGIN copies what is there when the fence is over.
#[test]
fn importers_wait_as_well() {
    let Some(mut timeline) = Timeline::open() else {
        return skip("no sw_sync in debugfs (CONFIG_SW_SYNC, root)");
    };
    let mut p = pair();
    let buffer = p.granted(1);
    p.a.grant(Grant { handle: buffer.handle, ..Default::default() }).expect("GRANT");
    let mut client = Client::connect(&p.daemon.host_socket(), "test").expect("host socket");
    let lease = acquire(&mut client, &buffer);
    if lease.fd_kind != FdKind::DmaBuf {
        return skip("this host makes no dma-bufs");
    }
    let view = p.view(&buffer);
    timeline.work(&lease, access::WRITE);
    let request = Sync { timeout_ns: FIVE_SECONDS, ..sync(&held(&view, &buffer), READ) };
    p.b.sync_start::<RespSync>(&request.bytes());
    assert!(p.b.sync_next::<RespSync>(A_WHILE).is_none(), "it waits");
    poke(&lease, 0, b"late");
    timeline.finish();
    p.b.sync_next::<RespSync>(SOON).expect("an end").1.expect("BEGIN");
    assert_eq!(p.b.memory.read(view.addr, 4), b"late");
    timeline.work(&lease, access::WRITE);
    p.b.sync_start::<RespSync>(&request.bytes());
    assert!(p.b.sync_next::<RespSync>(A_WHILE).is_none(), "it waits");
    p.revoke(&buffer);
    p.b.sync_next::<RespSync>(SOON).expect("an end").1.refused(Status::Revoked);
}

/// [dev-sync-19] Fences of a real driver: vgem.
#[test]
fn a_driver_makes_fences_too() {
    let mut s = shared(1);
    let cards = (0..8).filter_map(|n| {
        File::options().read(true).write(true).open(format!("/dev/dri/card{n}")).ok()
    });
    let fd = s.lease.fd.as_raw_fd();
    let attached = cards.into_iter().find_map(|card| {
        // DRM_IOCTL_PRIME_FD_TO_HANDLE: handle, flags, fd.
        let mut prime = [0, 0, u32::try_from(fd).ok()?];
        ioctl_flat(card.as_fd(), iowr(b'd', 0x2e, 12), &mut prime).ok()?;
        // DRM_IOCTL_VGEM_FENCE_ATTACH: handle, WRITE, fence, pad. vkms has no such request.
        let mut attach = [prime[0], 1, 0, 0];
        ioctl_flat(card.as_fd(), iowr(b'd', 0x41, 16), &mut attach).ok()?;
        Some((card, attach[2]))
    });
    let Some((card, fence)) = attached else {
        return skip("no vgem that takes dma-bufs of udmabuf (CONFIG_DRM_VGEM)");
    };
    let head = s.start(READ, FIVE_SECONDS);
    waits(&mut s);
    ioctl_flat(card.as_fd(), iow(b'd', 0x42, 8), &mut [fence, 0]).expect("VGEM_FENCE_SIGNAL");
    ends(&mut s, head).expect("BEGIN");
}
