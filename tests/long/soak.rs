//! Eight VMs in a ring and eight programs on the host: each VM lends one buffer after the other to the next
//! VM and to a program, and gets every one back. A hundred thousand cycles:
//!
//!     BUFSHARE_SOAK_CYCLES=100000 cargo test --release --test long soak -- --nocapture

use std::marker;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use bufshare::host::client::{Access, Client, Error};
use bufshare::ioctl::Mapping;
use bufshare::protocol::{Event, Opcode, State, Status, access, flag, peer};
use uuid::Uuid;

use crate::common::{
    Attach, Daemon, Export, Grant, Guest, Launch, Map, PAGE, Refusal, Region, SOON, Setup, Sync,
};
use crate::{assert_nothing_left, end, from_env};

const VMS: usize = 8;

/// A buffer on its way to whoever uses it, and its way back.
#[derive(Clone)]
struct Lent {
    uuid: Uuid,
    /// What stands at its start.
    number: u64,
    /// It is taken away without a word.
    forced: bool,
    back: SyncSender<()>,
}

#[test]
fn soak() {
    let launch = Launch {
        vms: (0..VMS).map(|i| format!("name=vm{i}")).collect(),
        args: ["--allow", "*:*"].map(String::from).to_vec(),
        ..Default::default()
    };
    let daemon = launch.start();
    let cycles = AtomicU64::new(0);
    let wanted = from_env("BUFSHARE_SOAK_CYCLES");
    // First the allocators and caches of both sides get what they keep.
    turn(&daemon, &cycles, &|| cycles.load(Ordering::Relaxed) < 400);
    assert_nothing_left(&daemon, daemon.fds());
    let (fds, rss) = (daemon.fds(), daemon.rss_kib());
    let end = end();
    let goes_on = || match wanted {
        Some(wanted) => cycles.load(Ordering::Relaxed) < wanted,
        None => Instant::now() < end,
    };
    let started = Instant::now();
    turn(&daemon, &cycles, &goes_on);
    assert_nothing_left(&daemon, fds);
    let (count, after) = (cycles.load(Ordering::Relaxed), daemon.rss_kib());
    eprintln!("{count} cycles in {:.1?}; {rss} KiB, then {after} KiB", started.elapsed());
    assert!(after <= rss + 4096, "RSS: {rss} KiB, then {after} KiB");
}

/// Everybody at once, until `goes_on` says no. Whoever stops lets go of its ends of the channels, which is
/// how the others notice.
fn turn(daemon: &Daemon, cycles: &AtomicU64, goes_on: &(dyn Fn() -> bool + marker::Sync)) {
    let stop = AtomicBool::new(false);
    let (to_vm, from_vm): (Vec<_>, Vec<_>) = (0..VMS).map(|_| sync_channel::<Lent>(1)).unzip();
    std::thread::scope(|scope| {
        for (i, lent) in from_vm.into_iter().enumerate() {
            let (to_client, from_client) = sync_channel(1);
            let next = to_vm[(i + 1) % VMS].clone();
            let stop = &stop;
            scope.spawn(move || program(daemon, &from_client));
            scope.spawn(move || {
                let mut vm = Vm::new(daemon, i);
                while !stop.load(Ordering::Relaxed) && !std::thread::panicking() {
                    vm.cycle([&next, &to_client], &lent);
                    cycles.fetch_add(1, Ordering::Relaxed);
                    if !goes_on() {
                        stop.store(true, Ordering::Relaxed);
                    }
                }
            });
        }
        drop(to_vm);
    });
}

struct Vm {
    guest: Guest,
    next_peer: u32,
    pages: u64,
    view: u64,
    number: u64,
}

impl Vm {
    fn new(daemon: &Daemon, i: usize) -> Vm {
        let region = Region { len: 64 << 20, ..Region::default() };
        let setup = Setup { regions: vec![region], event_buffers: 64, ..Default::default() };
        let mut guest = setup.connect(daemon, &format!("vm{i}"));
        let (pages, view) = (guest.pages(2), guest.pages(2));
        // Peers are numbered in the order of the command line.
        let next_peer = 2 + u32::try_from((i + 1) % VMS).expect("small");
        Vm { guest, next_peer, pages, view, number: (i as u64) << 48 }
    }

    fn cycle(&mut self, to: [&SyncSender<Lent>; 2], lent: &Receiver<Lent>) {
        self.number += 1;
        let number = self.number;
        let forced = number.is_multiple_of(7);
        let request = Export { segments: vec![(self.pages, 2 * PAGE)], ..Default::default() };
        let export = self.guest.export(request).expect("EXPORT");
        let (handle, uuid) = (export.handle.get(), Uuid::from_bytes(export.uuid));
        for peer_id in [peer::HOST, self.next_peer] {
            self.guest.grant(Grant { handle, peer_id, ..Default::default() }).expect("GRANT");
        }
        let write = Sync { handle, flags: flag::SYNC_WRITE, ..Default::default() };
        self.guest.begin(write).expect("BEGIN");
        self.guest.memory.write(self.pages, &number.to_le_bytes());
        self.guest.end(write).expect("END");
        let (back, acknowledged) = sync_channel(2);
        for to in to {
            // Who is gone takes nothing.
            let _ = to.send(Lent { uuid, number, forced, back: back.clone() });
        }
        drop(back);
        if let Ok(lent) = lent.recv() {
            self.import(&lent);
        }
        let wait = || while acknowledged.recv_timeout(SOON).is_ok() {};
        if !forced {
            wait();
        }
        let released = match forced {
            true => self.guest.release_force(handle).expect("RELEASE"),
            false => self.guest.release(handle).expect("RELEASE"),
        };
        if State::from_wire(released.state.get()) != Some(State::Released) {
            let told = |event: &Event| {
                event.handle.get() == handle && event.kind.get() == Opcode::EvtReleased.to_wire()
            };
            while !told(&self.guest.event(SOON).expect("RELEASED")) {}
        }
        self.guest.memory.write(self.pages, &[0xff; 8]);
        wait();
        while self.guest.event(Duration::ZERO).is_some() {}
    }

    fn import(&mut self, lent: &Lent) {
        let guest = &mut self.guest;
        let attach = Attach { uuid: lent.uuid.into_bytes(), ..Default::default() };
        let Some((held, _)) = lent.allow(guest.attach(attach), Status::NoEnt) else { return };
        let handle = held.handle.get();
        let map = Map { handle, segments: vec![(self.view, 2 * PAGE)], ..Default::default() };
        let mapped = lent.allow(guest.map(&map), Status::Revoked);
        if let Some(mapping) = mapped {
            let flags =
                flag::SYNC_READ | if lent.number.is_multiple_of(3) { flag::SYNC_WRITE } else { 0 };
            let timeout_ns = SOON.as_nanos() as u64;
            let sync = Sync { handle, flags, timeout_ns, ..Default::default() };
            if lent.allow(guest.begin(sync), Status::Revoked).is_some() {
                assert_eq!(guest.memory.read(self.view, 8), lent.number.to_le_bytes());
                lent.allow(guest.end(sync), Status::Revoked);
            }
            guest.unmap(mapping).expect("UNMAP");
        }
        guest.detach(handle).expect("DETACH");
        let _ = lent.back.send(());
    }
}

impl Lent {
    /// What was done; `None` where it was taken away before, which is then the reason.
    fn allow<T>(&self, reply: Result<T, Refusal>, status: Status) -> Option<T> {
        match reply {
            Ok(done) => Some(done),
            Err(refusal) => {
                assert!(self.forced && refusal.status == status, "{refusal:?}");
                None
            }
        }
    }
}

/// A program on the host.
fn program(daemon: &Daemon, lent: &Receiver<Lent>) {
    let mut client = Client::connect(&daemon.host_socket(), "soak").expect("host socket");
    while let Ok(lent) = lent.recv() {
        let allowed = |error: Error, status| {
            assert!(lent.forced && error.status() == Some(status), "{error}");
        };
        match client.acquire(lent.uuid, access::READ | access::WRITE, false) {
            Ok(lease) => {
                match client.begin(lease.id, Access::READ, SOON) {
                    Ok(_) => {
                        let mapping = Mapping::new(&lease.fd, PAGE as usize, false).expect("mmap");
                        let mut number = [0; 8];
                        mapping.read_at(0, &mut number).expect("inside");
                        assert!(lent.forced || number == lent.number.to_le_bytes());
                        let ended = client.end(lease.id, Access::READ);
                        ended.map_or_else(|error| allowed(error, Status::Revoked), drop);
                    }
                    Err(error) => allowed(error, Status::Revoked),
                }
                client.release(lease).expect("RELEASE");
            }
            Err(error) => allowed(error, Status::NoEnt),
        }
        let _ = lent.back.send(());
    }
}
