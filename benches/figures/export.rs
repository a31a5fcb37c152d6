//! EXPORT of 32 MiB beside the system calls that make its memory: UDMABUF_CREATE_LIST of the same
//! ranges, or a private memfd where the host has no udmabuf.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use bufshare::ioctl::{UdmabufItem, udmabuf_create};
use bufshare::protocol::{Mode, Opcode, RespExport, RespState};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use vm_memory::FileOffset;

use crate::common::{Daemon, Export, FREE, Guest, PAGE, handle_request};
use crate::driver::Driver;
use crate::place::{pin, processors};
use crate::table::{self, Budget, side_by_side};

const SIZE: u64 = 32 << 20;
const LARGE: u64 = 2 << 20;
const ROUNDS: u32 = 150;
const ASKED: usize = 3;
const PER_SEGMENT: Budget = Budget::AtMost(25.0);

pub fn figures() {
    let udmabuf = File::options().read(true).write(true).open("/dev/udmabuf");
    if let Err(error) = &udmabuf {
        let name = "EXPORT against UDMABUF_CREATE_LIST";
        table::skipped(name, &format!("/dev/udmabuf: {error}; benches/run has a host with it"));
    }
    let udmabuf = udmabuf.ok();
    let daemon = Daemon::start(&["a"]);
    let mut guest = Guest::connect(&daemon, "a");
    for process in [daemon.pid(), std::process::id()] {
        pin(process, processors()[0]);
    }
    let pages = (SIZE / PAGE).min(guest.config.max_segments.get().into());
    let apart: Vec<(u64, u64)> = (0..pages).map(|i| (FREE + i * 2 * PAGE, PAGE)).collect();
    // A stride that visits all of them, and no two neighbours in a row.
    let mixed = (0..pages).map(|i| apart[(i * 7919 % pages) as usize]).collect();
    let merged = (0..SIZE / PAGE).map(|i| (FREE + i * PAGE, PAGE)).collect();
    let large = (0..SIZE / LARGE).map(|i| (FREE + i * 2 * LARGE, LARGE)).collect();
    let one = vec![(FREE, SIZE)];
    let mut figure = |name: &str, segments: Vec<(u64, u64)>, whole: Budget, each: Budget| {
        let count = segments.len() as f64;
        let name = format!("EXPORT, {name}");
        let bare = Bare::new(&guest, udmabuf.as_ref(), &segments);
        let mut driver = Exporter::new(&mut guest, segments, udmabuf.is_some());
        let ours = || (0..ASKED).map(|_| driver.export()).collect();
        let (ours, bare) = side_by_side(ROUNDS, ours, || (0..ASKED).map(|_| bare.make()).collect());
        table::times(&name, ours.p50, bare.p50, whole);
        if !matches!(each, Budget::None) {
            table::value("  on top, each segment", (ours.p50 - bare.p50) / count, "ns", each);
        }
    };
    // A memfd costs nothing until it is filled.
    let whole = if udmabuf.is_some() { Budget::AtMost(1.3) } else { Budget::None };
    figure("32 MiB in one segment", one, whole, Budget::None);
    figure("32 MiB in segments of 2 MiB", large, Budget::None, Budget::None);
    figure("32 MiB in 8192 adjacent pages", merged, Budget::None, PER_SEGMENT);
    figure(&format!("{pages} pages apart"), apart, Budget::None, PER_SEGMENT);
    figure(&format!("{pages} pages apart, in any order"), mixed, Budget::None, PER_SEGMENT);
}

/// EXPORT and RELEASE of the same ranges, again and again.
struct Exporter<'a> {
    driver: Driver<'a>,
    export: crate::driver::Request,
    release: crate::driver::Request,
    mode: Mode,
}

impl<'a> Exporter<'a> {
    fn new(guest: &'a mut Guest, segments: Vec<(u64, u64)>, shares: bool) -> Self {
        let request = Export { segments, ..Default::default() };
        let mut driver = Driver::control(guest);
        let export = driver.request::<RespExport>(&request.bytes());
        let release = driver.request::<RespState>(&handle_request(Opcode::Release, 0, 0));
        let mode = if shares { Mode::ZeroCopy } else { Mode::Copy };
        Self { driver, export, release, mode }
    }

    fn export(&mut self) -> Duration {
        let time = self.driver.ask(self.export);
        let made: RespExport = self.driver.answer(self.export);
        assert_eq!(Mode::from_wire(made.mode.get()), Some(self.mode));
        self.driver.set_handle(self.release, made.handle.get());
        self.driver.ask(self.release);
        self.driver.answer::<RespState>(self.release);
        time
    }
}

/// What the host's kernel takes for the memory alone.
struct Bare<'a> {
    udmabuf: Option<&'a File>,
    ranges: Vec<(FileOffset, u64)>,
}

impl<'a> Bare<'a> {
    fn new(guest: &Guest, udmabuf: Option<&'a File>, segments: &[(u64, u64)]) -> Self {
        let mut ranges: Vec<(FileOffset, u64)> = Vec::new();
        let mut last_end = 0;
        for &(at, len) in segments {
            match ranges.last_mut().filter(|_| at == last_end) {
                Some((_, sum)) => *sum += len,
                None => ranges.push((guest.memory.file(at), len)),
            }
            last_end = at + len;
        }
        Self { udmabuf, ranges }
    }

    fn make(&self) -> Duration {
        let items = self.ranges.iter().map(|(at, size)| UdmabufItem {
            memfd: at.file().as_fd(),
            offset: at.start(),
            size: *size,
        });
        let size = self.ranges.iter().map(|(_, len)| len).sum();
        let start = Instant::now();
        let made = match self.udmabuf {
            Some(device) => udmabuf_create(device.as_fd(), items),
            None => private(size),
        };
        let time = start.elapsed();
        made.expect("memory");
        time
    }
}

fn private(size: u64) -> io::Result<OwnedFd> {
    let fd = memfd_create("bench", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    ftruncate(&fd, size)?;
    fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(fd)
}
