//! From one VM to another: a frame by copy, beside one pread and pwrite of the same bytes and beside a
//! relay that has both VMs' memory mapped and copies; and how long it takes to attach, map, unmap and detach.

use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use bufshare::limits::COPY_STEP;
use bufshare::protocol::{RespSync, flag, vq};

use crate::common::{Attach, Grant, Guest, Launch, Map, PAGE, Setup, Sync};
use crate::driver::{Driver, Request};
use crate::place::{Pong, pin, processors};
use crate::table::{self, Budget, side_by_side};

const ROUNDS: u32 = 40;
const DRAWN: usize = 3;

pub fn figures() {
    for (name, size) in [("64 KiB", 64 << 10), ("4 MiB", 4 << 20), ("33 MiB", 33 << 20)] {
        frames(name, size);
    }
}

fn frames(name: &str, size: u64) {
    let launch = Launch {
        vms: vec!["name=a".into(), "name=b".into()],
        args: vec!["--allow".into(), "a:b".into()],
        ..Default::default()
    };
    let daemon = launch.start();
    let [mut a, mut b] = ["a", "b"].map(|vm| Setup::default().connect(&daemon, vm));
    let cpus = processors();
    pin(std::process::id(), cpus[0]);
    pin(daemon.pid(), cpus[cpus.len() - 1]);
    let (export, addr) = a.export_pages(size / PAGE);
    let (handle, uuid) = (export.handle.get(), export.uuid);
    a.memory.fill(addr, size, 7);
    let peer_id = b.config.peer_id.get();
    a.grant(Grant { handle, peer_id, ..Default::default() }).expect("GRANT");
    let to = b.pages(size / PAGE);
    let segments = vec![(to, size)];
    let attach = |b: &mut Guest| {
        let start = Instant::now();
        let told = b.attach(Attach { uuid, ..Default::default() }).expect("ATTACH");
        let held = told.0.handle.get();
        let map = Map { handle: held, segments: segments.clone(), ..Default::default() };
        let mapping = b.map(&map).expect("MAP");
        (held, mapping, start.elapsed())
    };
    let times: Vec<_> = (0..200)
        .map(|_| {
            let (held, mapping, there) = attach(&mut b);
            let start = Instant::now();
            b.unmap(mapping).expect("UNMAP");
            b.detach(held).expect("DETACH");
            (there, start.elapsed())
        })
        .collect();
    let best = |times: &mut dyn Iterator<Item = Duration>| {
        times.min().unwrap_or_default().as_secs_f64() * 1e6
    };
    let (there, back) =
        (best(&mut times.iter().map(|(t, _)| *t)), best(&mut times.iter().map(|(_, t)| *t)));
    table::value(&format!("ATTACH + MAP of {name}, by copy"), there, "µs", Budget::None);
    table::value(&format!("UNMAP + DETACH of {name}"), back, "µs", Budget::None);
    let (held, _, _) = attach(&mut b);
    let (from, other) = (a.memory.file(addr), tempfile::tempfile_in("/dev/shm").expect("memory"));
    let mut step = vec![0; COPY_STEP.min(usize::try_from(size).expect("fits"))];
    let mut relay = || {
        let start = Instant::now();
        for done in (0..size).step_by(step.len()) {
            let part = step.len().min(usize::try_from(size - done).expect("fits"));
            from.file().read_exact_at(&mut step[..part], from.start() + done).expect("pread");
            other.write_all_at(&step[..part], done).expect("pwrite");
        }
        start.elapsed()
    };
    let mut mapped = Pong::relay(&from, &b.memory.file(to), size);
    pin(mapped.pid(), cpus[cpus.len() - 1]);
    let sync = |driver: &mut Driver<'_>, handle, flags| {
        driver.request::<RespSync>(&Sync { flags, handle, ..Default::default() }.bytes())
    };
    let (mut a, mut b) = (Driver::new(&mut a, vq::SYNC), Driver::new(&mut b, vq::SYNC));
    let drawn = sync(&mut a, handle, flag::SYNC_END | flag::SYNC_WRITE);
    let begin = sync(&mut b, held, flag::SYNC_READ);
    let end = sync(&mut b, held, flag::SYNC_READ | flag::SYNC_END);
    let mut frame = || {
        let ask = |driver: &mut Driver<'_>, request: Request| {
            driver.submit(request);
            driver.wait();
            driver.answer::<RespSync>(request);
        };
        let start = Instant::now();
        ask(&mut a, drawn);
        ask(&mut b, begin);
        let time = start.elapsed();
        ask(&mut b, end);
        time
    };
    let mut against = |what: &str, bare: &mut dyn FnMut() -> Duration| {
        let (ours, bare) = side_by_side(
            ROUNDS,
            || (0..DRAWN).map(|_| frame()).collect(),
            || (0..DRAWN).map(|_| bare()).collect(),
        );
        let name = format!("frame of {name}, VM to VM, against {what}");
        table::times(&name, ours.p50, bare.p50, Budget::None);
    };
    against("one pread and pwrite", &mut relay);
    against("a relay", &mut || mapped.ask());
}
