//! The device requirements of `spec/virtio-bufshare.md`, tested through the real daemon.
//!
//! A test names the labels that it covers in its doc comment; `tests/spec_labels.rs` keeps account.
//! Most tests hold in both modes; where the modes differ the test asks which one it has.

#[path = "../common/mod.rs"]
mod common;

mod chain;
mod config;
mod control;
mod events;
mod export;
mod fences;
mod grant;
mod import;
mod map;
mod memory;
mod offers;
mod pair;
mod part;
mod points;
mod release;
mod reset;
mod sync;
mod window;

use std::io::{Seek, SeekFrom};
use std::time::Duration;

use bufshare::host::client::{Access as HostAccess, Client, Lease};
use bufshare::protocol::{Mode, RespExport, Status, feature, flag};
use common::*;
use pair::{Pair, pair, pair_with, quiet};
use uuid::Uuid;

/// One daemon with one guest: VM "a".
struct Bed {
    daemon: Daemon,
    guest: Guest,
}

/// A buffer that was exported and offered to the host.
#[derive(Debug, Clone, Copy)]
struct Buffer {
    handle: u64,
    uuid: [u8; 16],
    mode: Mode,
    addr: u64,
    size: u64,
}

fn bed() -> Bed {
    bed_with("name=a")
}

/// As [`bed`], with further keys of `--vm`.
fn bed_with(vm: &str) -> Bed {
    let daemon = Launch { vms: vec![vm.into()], ..Default::default() }.start();
    let guest = Guest::connect(&daemon, "a");
    Bed { daemon, guest }
}

impl Bed {
    /// A program on the host.
    fn client(&self) -> Client {
        Client::connect(&self.daemon.host_socket(), "test").expect("host socket")
    }

    /// Exports fresh pages and grants the host READ | WRITE.
    fn offered(&mut self, pages: u64) -> Buffer {
        let buffer = self.exported(pages);
        self.guest.grant(Grant { handle: buffer.handle, ..Default::default() }).expect("GRANT");
        buffer
    }

    /// Exports fresh pages.
    fn exported(&mut self, pages: u64) -> Buffer {
        let (export, addr) = self.guest.export_pages(pages);
        buffer(&export, addr, pages)
    }
}

fn buffer(export: &RespExport, addr: u64, pages: u64) -> Buffer {
    Buffer {
        handle: export.handle.get(),
        uuid: export.uuid,
        mode: Mode::from_wire(export.mode.get()).expect("a known mode"),
        addr,
        size: pages * PAGE,
    }
}

/// A lease of the buffer.
#[track_caller]
fn acquire(client: &mut Client, buffer: &Buffer) -> Lease {
    client.acquire(Uuid::from_bytes(buffer.uuid), READ_WRITE, false).expect("ACQUIRE")
}

/// Why the host was refused.
#[track_caller]
fn host_refused<T: std::fmt::Debug>(
    result: Result<T, bufshare::host::client::Error>,
    status: Status,
) {
    match result {
        Err(error) if error.status() == Some(status) => {}
        other => panic!("expected {}, got {other:?}", status.name()),
    }
}

/// A SYNC with these flags and all defaults.
fn sync(buffer: &Buffer, flags: u16) -> Sync {
    Sync { handle: buffer.handle, flags, ..Default::default() }
}

/// What the lease's file descriptor shows from `offset` on.
fn peek(lease: &Lease, offset: u64, len: usize) -> Vec<u8> {
    let map = bufshare::ioctl::Mapping::new(&lease.fd, whole(lease), false).expect("mmap");
    let mut bytes = vec![0; len];
    map.read_at(usize::try_from(offset).expect("small"), &mut bytes).expect("inside");
    bytes
}

/// Writes through the lease's file descriptor.
fn poke(lease: &Lease, offset: u64, bytes: &[u8]) {
    let map = bufshare::ioctl::Mapping::new(&lease.fd, whole(lease), true).expect("mmap");
    map.write_at(usize::try_from(offset).expect("small"), bytes).expect("inside");
}

fn whole(lease: &Lease) -> usize {
    usize::try_from(lease.buffer.size).expect("small")
}

/// Bytes of the object behind the lease's file descriptor.
fn object_size(lease: &Lease) -> u64 {
    let mut file = std::fs::File::from(lease.fd.try_clone().expect("dup"));
    file.seek(SeekFrom::End(0)).expect("dma-bufs and memfds tell their size")
}

/// A while in which something has to happen by itself.
const A_WHILE: Duration = Duration::from_millis(60);

/// These access bits, on the whole buffer, for a program on the host.
fn host_access(bits: u32) -> HostAccess {
    HostAccess { bits, offset: 0, len: 0 }
}
