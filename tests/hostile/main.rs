//! A guest that wants to break the daemon: whatever it sends, every chain comes back once, nothing of
//! the daemon grows, and another VM of the same daemon is served as if nothing were.
//!
//! The random part lasts BUFSHARE_HOSTILE_SECONDS (5 if unset) and prints its seed;
//! BUFSHARE_HOSTILE_SEED repeats a run.

#[path = "../common/mod.rs"]
mod common;

mod chains;
mod fds;
mod random;
mod rings;
mod sessions;
mod vmm;

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use bufshare::protocol::{Opcode, RespPeerInfo, RespState, Status, access, flag, vq};
use common::*;

/// xorshift64*: enough to be different every time, and to be repeated.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[usize::try_from(self.below(from.len() as u64)).expect("small")]
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.next() as u8).collect()
    }
}

fn from_env(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|e| panic!("{name}={text}: {e}")))
}

/// What must be the same before and after.
#[derive(Debug)]
struct Footprint {
    fds: usize,
    rss_kib: u64,
}

fn footprint(daemon: &Daemon) -> Footprint {
    Footprint { fds: daemon.fds(), rss_kib: daemon.rss_kib() }
}

/// Panics unless the daemon has no more descriptors, and not much more memory, than before.
#[track_caller]
fn assert_flat(daemon: &Daemon, before: &Footprint) {
    wait_for(SOON, || daemon.fds() <= before.fds);
    let after = footprint(daemon);
    let names = || {
        let mut names = daemon.fd_names();
        names.sort();
        names
    };
    assert!(after.fds <= before.fds, "{before:?}, then {after:?}: {:#?}", names());
    // Allocators keep some of what they once had; a leak of a minute is far beyond this.
    assert!(after.rss_kib <= before.rss_kib + 4096, "{before:?}, then {after:?}");
}

/// Another VM that does ordinary things until it is told to stop; each has to be quick.
fn bystander(daemon: &Daemon, stop: &AtomicBool) {
    let mut guest = Guest::connect(daemon, "b");
    let addr = guest.pages(16);
    // The attack may be over before this one has begun.
    loop {
        let started = Instant::now();
        let request = Export { segments: vec![(addr, 16 * PAGE)], ..Default::default() };
        let handle = guest.export(request).expect("EXPORT").handle.get();
        guest.grant(Grant { handle, ..Default::default() }).expect("GRANT");
        let request = Sync { handle, flags: flag::SYNC_WRITE, ..Default::default() };
        guest.begin(request).expect("BEGIN");
        guest.end(request).expect("END");
        guest.query(handle).expect("QUERY");
        guest.release(handle).expect("RELEASE");
        let took = started.elapsed();
        assert!(took < Duration::from_secs(10), "a round of the other VM took {took:?}");
        if stop.load(Ordering::Relaxed) {
            break;
        }
    }
}

/// Runs an attack on VM "a" beside an ordinary VM "b", twice, and compares the daemon between the two:
/// the first run warms allocators and caches up.
fn attack(queue_size: u16, mut hostile: impl FnMut(&Daemon, &mut Guest)) {
    let vms = vec!["name=a,max-exports=64".into(), "name=b".into()];
    let daemon = Launch { vms, ..Default::default() }.start();
    let mut before = None;
    for _ in 0..2 {
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            let other = scope.spawn(|| bystander(&daemon, &stop));
            let setup = Setup { queue_size, ..Default::default() };
            let mut guest = setup.connect(&daemon, "a");
            // Even a panic here has to end the other thread.
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                hostile(&daemon, &mut guest);
            }));
            stop.store(true, Ordering::Relaxed);
            drop(guest);
            other.join().expect("the other VM");
            if let Err(panic) = result {
                std::panic::resume_unwind(panic);
            }
        });
        // Sessions that ended close their descriptors in their own time.
        thread::sleep(Duration::from_millis(200));
        match &before {
            None => before = Some(footprint(&daemon)),
            Some(before) => assert_flat(&daemon, before),
        }
    }
}

/// Collects one used entry for each head that was offered.
#[track_caller]
fn collect(ring: &mut Ring, mut heads: Vec<u16>) -> Vec<Used> {
    let mut all = Vec::new();
    while !heads.is_empty() {
        let used = ring.wait_used(SOON);
        let used = used.unwrap_or_else(|| panic!("{} chains did not come back", heads.len()));
        let at = heads.iter().position(|head| u32::from(*head) == used.id);
        heads.swap_remove(at.unwrap_or_else(|| panic!("{used:?} was not offered")));
        all.push(used);
    }
    assert_eq!(ring.pop_used(), None, "more used entries than chains");
    all
}
