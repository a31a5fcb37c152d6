//! Real dma-bufs of host programs in guests: of udmabuf, a dma-heap and a DRM driver. That takes a host
//! that has them.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Duration;

use bufshare::host::client::{Access, Client, Event};
use bufshare::host::wire::{Fault, FdKind};
use bufshare::ioctl::{
    DmaBufSync, Mapping, UdmabufItem, dma_buf_sync, ioctl_flat, ioctl_new_fd, iow, iowr,
    udmabuf_create,
};
use bufshare::protocol::{Mode, RespSync, Status, access};
use rustix::fs::{OFlags, SealFlags};

use super::lend::{self, SYNC_READ, SYNC_WRITE, bed, bed_with_window, loan, map, sync};
use crate::common::{PAGE, Refused, skip};
use crate::desk::{READ, WRITE};

const PAGES: u64 = 16;
const SIZE: usize = (PAGES * PAGE) as usize;
const SOON: Duration = Duration::from_secs(10);

fn open(path: &str) -> Option<File> {
    let file = File::options().read(true).write(true).open(path).ok();
    if file.is_none() {
        skip(&format!("no {path} on this host"));
    }
    file
}

fn of_udmabuf() -> Option<OwnedFd> {
    let device = open("/dev/udmabuf")?;
    let memory = lend::memfd(PAGES * PAGE, SealFlags::SHRINK);
    // The second half first: not a file's order.
    let half = PAGES * PAGE / 2;
    let item = |offset| UdmabufItem { memfd: memory.as_fd(), offset, size: half };
    Some(udmabuf_create(device.as_fd(), [item(half), item(0)].into_iter()).unwrap())
}

fn of_heap() -> Option<OwnedFd> {
    let heap = open("/dev/dma_heap/system")?;
    // DMA_HEAP_IOCTL_ALLOC: length; fd and its flags; flags of the heap.
    let flags = u64::from((OFlags::RDWR | OFlags::CLOEXEC).bits());
    let mut arg = [PAGES * PAGE, flags << 32, 0];
    Some(ioctl_new_fd(heap.as_fd(), iowr(b'H', 0, 24), &mut arg, 8).unwrap())
}

fn of_drm() -> Option<OwnedFd> {
    let card = open("/dev/dri/card0")?;
    // DRM_IOCTL_MODE_CREATE_DUMB: height, width, bits, flags; handle, pitch, size.
    let mut dumb = [PAGES as u32, 1024, 32, 0, 0, 0, 0, 0];
    ioctl_flat(card.as_fd(), iowr(b'd', 0xb2, 32), &mut dumb).unwrap();
    // DRM_IOCTL_PRIME_HANDLE_TO_FD: handle, flags, fd.
    let mut prime = [dumb[4], (OFlags::RDWR | OFlags::CLOEXEC).bits(), 0];
    Some(ioctl_new_fd(card.as_fd(), iowr(b'd', 0x2d, 12), &mut prime, 8).unwrap())
}

/// What a program does around its own accesses.
fn bracketed(fd: &OwnedFd, access: impl FnOnce()) {
    let sync = |end| dma_buf_sync(fd.as_fd(), DmaBufSync { end, read: true, write: true }).unwrap();
    sync(false);
    access();
    sync(true);
}

/// Filled on the host, read by the guest, written back, over and over.
fn there_and_back(dma_buf: Option<OwnedFd>) {
    let Some(fd) = dma_buf else { return };
    let (daemon, mut guest) = bed();
    let mut client = lend::client(&daemon);
    let export = client.export(&fd, &loan(PAGES * PAGE, READ | WRITE)).unwrap();
    assert_eq!(export.fd_kind, FdKind::DmaBuf);
    lend::grant_a(&mut client, &export, READ | WRITE);
    let (handle, _, view) = map(&mut guest, &export, PAGES, READ | WRITE);
    let memory = Mapping::new(&fd, SIZE, true).unwrap();
    for frame in 1..=100u64 {
        client.begin(export.handle, Access::WRITE, SOON).unwrap();
        let drawn: Vec<u8> = (0..SIZE).map(|at| (at as u64 / PAGE + frame) as u8).collect();
        bracketed(&fd, || memory.write_at(0, &drawn).unwrap());
        client.end(export.handle, Access::WRITE).unwrap();
        guest.begin(sync(handle, SYNC_READ | SYNC_WRITE)).expect("BEGIN");
        assert!(guest.memory.read(view, SIZE) == drawn, "frame {frame}");
        guest.memory.write(view + 3 * PAGE + 5, &frame.to_le_bytes());
        guest.end(sync(handle, SYNC_READ | SYNC_WRITE)).expect("END");
        client.begin(export.handle, Access::READ, SOON).unwrap();
        let mut seen = vec![0; SIZE];
        bracketed(&fd, || memory.read_at(0, &mut seen).unwrap());
        let at = 3 * PAGE as usize + 5;
        assert_eq!(seen[at..at + 8], frame.to_le_bytes());
        assert!(seen[..at] == drawn[..at] && seen[at + 8..] == drawn[at + 8..]);
        client.end(export.handle, Access::READ).unwrap();
    }
    assert!(client.take_back(export.handle, true).unwrap());
    in_the_window(&fd, &memory);
    let before = daemon.fds();
    // The rest of the rules is that of memfds.
    let mut refused = |size, access| lend::fault(client.export(&fd, &loan(size, access)));
    assert_eq!(refused(PAGES * PAGE / 2, READ), Some(Fault::Size));
    assert_eq!(refused(PAGES * PAGE * 2, READ), Some(Fault::Size));
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    assert!(File::open(path).is_err(), "a dma-buf cannot be opened anew");
    drop(client);
    let gone = || daemon.fds() < before;
    assert!(crate::common::wait_for(SOON, gone), "{:#?}", daemon.fd_names());
}

/// Zero copies: the guest sees the very pages.
fn in_the_window(fd: &OwnedFd, memory: &Mapping) {
    let (daemon, mut guest) = bed_with_window();
    let mut client = lend::client(&daemon);
    let export = client.export(fd, &loan(PAGES * PAGE, READ | WRITE)).unwrap();
    lend::grant_a(&mut client, &export, READ | WRITE);
    let (handle, mapping, mode) = lend::show(&mut guest, &export, PAGES, READ | WRITE);
    assert_eq!(mode, Mode::ZeroCopy);
    for frame in 1..=100u64 {
        client.begin(export.handle, Access::WRITE, SOON).unwrap();
        bracketed(fd, || memory.write_at(5 * PAGE as usize, &frame.to_le_bytes()).unwrap());
        client.end(export.handle, Access::WRITE).unwrap();
        guest.begin(sync(handle, SYNC_READ | SYNC_WRITE)).expect("BEGIN");
        assert_eq!(guest.window().read(5 * PAGE, 8).unwrap(), frame.to_le_bytes());
        guest.window().write(6 * PAGE, &frame.to_be_bytes());
        guest.end(sync(handle, SYNC_READ | SYNC_WRITE)).expect("END");
        client.begin(export.handle, Access::READ, SOON).unwrap();
        let mut seen = [0; 8];
        bracketed(fd, || memory.read_at(6 * PAGE as usize, &mut seen).unwrap());
        assert_eq!(seen, frame.to_be_bytes());
        client.end(export.handle, Access::READ).unwrap();
    }
    assert_eq!(lend::stat(&mut client, "bytes_copied"), 0);
    assert!(!client.take_back(export.handle, true).unwrap(), "the VMM has it until it says so");
    guest.unmap(mapping).expect("UNMAP");
    let released = |event| matches!(event, Some(Event::Released { .. }));
    while !released(client.next_event(Some(SOON)).unwrap()) {}
}

#[test]
fn of_udmabuf_there_and_back() {
    there_and_back(of_udmabuf());
}

#[test]
fn of_a_dma_heap_there_and_back() {
    there_and_back(of_heap());
}

#[test]
fn of_a_drm_driver_there_and_back() {
    there_and_back(of_drm());
}

/// A device of the host that still works on a buffer holds up the guests that BEGIN, and nobody else.
#[test]
fn fences_are_waited_for_and_hold_up_nobody_else() {
    let Some(fd) = of_heap() else { return };
    let path = "/sys/kernel/debug/sync/sw_sync";
    let Some(timeline) = open(path) else { return };
    let (daemon, mut guest) = bed();
    let mut client = lend::client(&daemon);
    let export = client.export(&fd, &loan(PAGES * PAGE, READ | WRITE)).unwrap();
    lend::grant_a(&mut client, &export, READ | WRITE);
    let (handle, ..) = map(&mut guest, &export, PAGES, READ | WRITE);
    guest.begin(sync(handle, SYNC_READ)).expect("no fence yet");
    guest.end(sync(handle, SYNC_READ)).expect("END");
    // SW_SYNC_IOC_CREATE_FENCE, and DMA_BUF_IOCTL_IMPORT_SYNC_FILE of it as a writer's.
    let mut arg = [0u32; 10];
    arg[0] = 1;
    let fence = ioctl_new_fd(timeline.as_fd(), iowr(b'W', 0, 40), &mut arg, 36).unwrap();
    let mut work = [access::WRITE, u32::try_from(fence.as_raw_fd()).unwrap()];
    ioctl_flat(fd.as_fd(), iow(b'b', 3, 8), &mut work).unwrap();
    guest.sync_start::<RespSync>(&sync(handle, SYNC_READ).bytes());
    assert!(guest.sync_next::<RespSync>(Duration::from_millis(100)).is_none(), "it waits");
    // Whoever did not BEGIN gets an error rather than a wait in the kernel.
    guest.end(sync(handle, SYNC_WRITE)).refused(Status::Io);
    guest.query(handle).expect("the guest's worker goes on");
    Client::connect(&daemon.host_socket(), "other").unwrap().list().unwrap();
    ioctl_flat(timeline.as_fd(), iow(b'W', 1, 4), &mut 1u32).unwrap();
    guest.sync_next::<RespSync>(SOON).expect("an end").1.expect("BEGIN");
}
