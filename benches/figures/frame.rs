//! One frame: from a guest's SYNC(END|WRITE) to the CHANGED event of a client on the host, zero-copy
//! beside a smaller frame, and in COPY mode beside a memcpy of the same bytes.

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use bufshare::host::client::{Client, Event};
use bufshare::ioctl::Mapping;
use bufshare::limits::COPY_STEP;
use bufshare::protocol::{Mode, RespSync, access, flag, vq};
use uuid::Uuid;

use crate::common::{Daemon, Grant, Guest, Launch, PAGE, SOON, Sync};
use crate::driver::{Driver, Request};
use crate::place::{pin, processors};
use crate::table::{self, Budget, side_by_side};

const SMALL: u64 = 64 << 10;
const LARGE: u64 = 33 << 20;
const ROUNDS: u32 = 60;
const DRAWN: usize = 3;

pub fn figures() {
    if Path::new("/dev/udmabuf").exists() {
        zero_copy();
    } else {
        let why = "no /dev/udmabuf; benches/run has a host with it";
        table::skipped("frame of 33 MiB against 64 KiB, zero copies", why);
    }
    copies();
}

/// The processors of the guest and of the daemon.
fn spread(daemon: &Daemon) {
    let cpus = processors();
    pin(std::process::id(), cpus[0]);
    pin(daemon.pid(), cpus[cpus.len() - 1]);
}

fn zero_copy() {
    let daemon =
        Launch { vms: vec!["name=a".into(), "name=b".into()], ..Default::default() }.start();
    let (mut a, mut b) = (Guest::connect(&daemon, "a"), Guest::connect(&daemon, "b"));
    let mut large = Frames::new(&daemon, &mut a, LARGE, Mode::ZeroCopy);
    let mut small = Frames::new(&daemon, &mut b, SMALL, Mode::ZeroCopy);
    spread(&daemon);
    let (ours, bare) = side_by_side(ROUNDS, || large.draw(20), || small.draw(20));
    let name = "frame of 33 MiB against 64 KiB, zero copies";
    table::times(name, ours.p50, bare.p50, Budget::AtMost(1.2));
}

fn copies() {
    let args = vec!["--udmabuf".into(), "off".into()];
    let daemon = Launch { args, ..Default::default() }.start();
    for (name, size, budget) in
        [("33 MiB", LARGE, Budget::AtLeast(0.8)), ("64 KiB", SMALL, Budget::None)]
    {
        let mut guest = Guest::connect(&daemon, "a");
        let at = guest.pages(0);
        let file = guest.memory.file(at);
        guest.memory.fill(at, size, 7);
        let mapped = usize::try_from(file.start() + size).expect("fits");
        let mapping = Mapping::new(file.file(), mapped, false).expect("mmap");
        let to_len = usize::try_from(size).expect("fits");
        let mut to = vec![1; to_len];
        let offset = usize::try_from(file.start()).expect("fits");
        let mut memcpy = || {
            let start = Instant::now();
            mapping.read_at(offset, &mut to).expect("inside the mapping");
            start.elapsed()
        };
        let other = tempfile::tempfile_in("/dev/shm").expect("shared memory");
        let mut step = vec![0; to_len.min(COPY_STEP)];
        let mut calls = || {
            let start = Instant::now();
            for done in (0..size).step_by(step.len()) {
                let part = step.len().min(to_len - done as usize);
                file.file().read_exact_at(&mut step[..part], file.start() + done).expect("pread");
                other.write_all_at(&step[..part], done).expect("pwrite");
            }
            start.elapsed()
        };
        let mut frames = Frames::new(&daemon, &mut guest, size, Mode::Copy);
        spread(&daemon);
        let name = format!("frame of {name}, copied");
        let (ours, bare) =
            side_by_side(ROUNDS, || frames.draw(DRAWN), || (0..DRAWN).map(|_| memcpy()).collect());
        table::speeds(&format!("{name}, against memcpy"), ours.p50, bare.p50, budget);
        let (ours, bare) =
            side_by_side(ROUNDS, || frames.draw(DRAWN), || (0..DRAWN).map(|_| calls()).collect());
        let name = format!("{name}, against pread and pwrite");
        table::speeds(&name, ours.p50, bare.p50, Budget::None);
    }
}

/// A buffer that a guest draws into and a client on the host has a lease of.
struct Frames<'a> {
    driver: Driver<'a>,
    end: Request,
    client: Client,
    uuid: Uuid,
}

impl<'a> Frames<'a> {
    fn new(daemon: &Daemon, guest: &'a mut Guest, size: u64, mode: Mode) -> Self {
        let (export, _) = guest.export_pages(size / PAGE);
        assert_eq!(Mode::from_wire(export.mode.get()), Some(mode));
        let (handle, uuid) = (export.handle.get(), Uuid::from_bytes(export.uuid));
        guest.grant(Grant { handle, ..Default::default() }).expect("GRANT");
        let mut client = Client::connect(&daemon.host_socket(), "bench").expect("host socket");
        client.watch(Some(uuid)).expect("WATCH");
        client.acquire(uuid, access::READ, false).expect("ACQUIRE");
        let flags = flag::SYNC_END | flag::SYNC_WRITE;
        let mut driver = Driver::new(guest, vq::SYNC);
        let end = Sync { flags, handle, ..Default::default() };
        let end = driver.request::<RespSync>(&end.bytes());
        let mut frames = Self { driver, end, client, uuid };
        // What the watch tells first.
        while frames.client.next_event(Some(Duration::from_millis(100))).expect("event").is_some() {
        }
        frames
    }

    fn draw(&mut self, count: usize) -> Vec<Duration> {
        (0..count).map(|_| self.frame()).collect()
    }

    fn frame(&mut self) -> Duration {
        let start = Instant::now();
        self.driver.submit(self.end);
        let event = self.client.next_event(Some(SOON)).expect("event");
        let time = start.elapsed();
        assert!(matches!(event, Some(Event::Changed(buffer)) if buffer.uuid == self.uuid));
        self.driver.wait();
        self.driver.answer::<RespSync>(self.end);
        time
    }
}
