//! From one VM to another through the window: a frame beside a relay that copies the same bytes, and how long it
//! takes until a buffer is seen, the daemon's part and the VMM's apart.

use std::time::{Duration, Instant};

use bufshare::host::client::Client;
use bufshare::protocol::{Mode, RespSync, flag, vq};

use crate::common::{Attach, Behaviour, Daemon, Grant, Guest, Launch, Map, PAGE, Setup, Sync};
use crate::driver::{Driver, Request};
use crate::place::{Pong, pin, processors};
use crate::table::{self, Budget, side_by_side};

const ROUNDS: u32 = 40;
const DRAWN: usize = 3;
const MAPPED: usize = 100;

pub fn figures() {
    let smallest = frames("64 KiB", 64 << 10);
    frames("4 MiB", 4 << 20);
    if let (Some(small), Some(large)) = (smallest, frames("33 MiB", 33 << 20)) {
        table::times("the same, 33 MiB against 64 KiB", large, small, Budget::AtMost(1.2));
    }
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_unstable_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Microseconds that the VMM took for its answers so far.
fn of_vmm(daemon: &Daemon) -> f64 {
    let mut client = Client::connect(&daemon.host_socket(), "figures").expect("host socket");
    let stats = client.stats().expect("STATS");
    stats.iter().find(|(name, _)| name == "vmm_us").map_or(0.0, |(_, count)| *count as f64)
}

fn frames(name: &str, size: u64) -> Option<f64> {
    let launch = Launch {
        vms: vec!["name=a".into(), "name=b".into()],
        args: vec!["--allow".into(), "a:b".into()],
        ..Default::default()
    };
    let daemon = launch.start();
    let mut a = Setup::default().connect(&daemon, "a");
    let setup = Setup { vmm: Some(Behaviour::default()), ..Default::default() };
    let mut b = setup.connect(&daemon, "b");
    let cpus = processors();
    pin(std::process::id(), cpus[0]);
    pin(daemon.pid(), cpus[cpus.len() - 1]);
    let (export, addr) = a.export_pages(size / PAGE);
    if Mode::from_wire(export.mode.get()) != Some(Mode::ZeroCopy) {
        table::skipped(&format!("frame of {name} through the window"), "this host has no udmabuf");
        return None;
    }
    let (handle, uuid) = (export.handle.get(), export.uuid);
    let peer_id = b.config.peer_id.get();
    a.grant(Grant { handle, peer_id, ..Default::default() }).expect("GRANT");
    let attach = |b: &mut Guest| {
        let told = b.attach(Attach { uuid, ..Default::default() }).expect("ATTACH");
        let held = told.0.handle.get();
        let map = Map { flags: 0, handle: held, len: Some(size), ..Default::default() };
        (held, b.map(&map).expect("MAP"))
    };
    let (mut there, mut back) = (Vec::new(), Vec::new());
    for _ in 0..MAPPED {
        let before = of_vmm(&daemon);
        let start = Instant::now();
        let (held, mapping) = attach(&mut b);
        let all = start.elapsed();
        let between = of_vmm(&daemon);
        there.push((all, between - before));
        let start = Instant::now();
        b.unmap(mapping).expect("UNMAP");
        b.detach(held).expect("DETACH");
        back.push((start.elapsed(), of_vmm(&daemon) - between));
    }
    for (what, times) in [("ATTACH + MAP", there), ("UNMAP + DETACH", back)] {
        let rest = |(all, vmm): &(Duration, f64)| all.as_secs_f64() * 1e6 - vmm;
        let part = |whose: &str| format!("{what} of {name} in the window, {whose}");
        let ours = median(times.iter().map(rest));
        table::value(&part("daemon and guest"), ours, "µs", Budget::None);
        let theirs = median(times.iter().map(|(_, vmm)| *vmm));
        table::value(&part("VMM"), theirs, "µs", Budget::None);
    }
    let (held, _) = attach(&mut b);
    a.memory.fill(addr, size, 7);
    let copied = b.pages(size / PAGE);
    let mut relay = Pong::relay(&a.memory.file(addr), &b.memory.file(copied), size);
    pin(relay.pid(), cpus[cpus.len() - 1]);
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
    let (ours, bare) = side_by_side(
        ROUNDS,
        || (0..DRAWN).map(|_| frame()).collect(),
        || (0..DRAWN).map(|_| relay.ask()).collect(),
    );
    let name = format!("frame of {name} through the window, against a relay");
    table::times(&name, ours.p50, bare.p50, Budget::None);
    Some(ours.p50)
}
