//! Many schedules of the daemon's threads: its own hub, devices and commands, compiled once more with
//! locks, wake-ups and a clock that an explorer rules.
//!
//! Two workers, the host socket's thread, two guests and their VMMs, clients and devices of the host do
//! random things. Of every schedule is asserted that no thread waits for ever, that every chain and
//! every BEGIN comes back exactly once, that RELEASED is told exactly once, that the registry's lock is
//! held neither while memory is dropped nor while it is looked at or copied, that whenever all threads
//! sleep none of them has something to do, and that nothing is left when everybody has let go.
//!
//! Small schedules (`cases`) are made for one mistake each, which they were seen to find:
//!
//! | schedule | finds that |
//! |---|---|
//! | `what_was_served_while_the_vm_was_paused_comes_back` | the worker does not flush when the rings run again |
//! | `who_uses_a_buffer_hears_that_its_exporter_is_gone` | RESET_DEVICE does not wake the worker, or a disconnect leaves the session open |
//! | `fences_are_watched_no_longer_than_somebody_waits` | a snapshot is kept whose BEGIN ended while it was made |
//! | `a_window_shows_nothing_that_nobody_wants` | nobody rings for the VMM's thread, it asks while the rings do not run, or an UNMAP of a revoked place is forgotten |
//! | `a_point_that_is_reached_wakes_all_who_wait_for_it` | SIGNAL serves nobody |
//!
//! `BUFSHARE_SCHEDULE_SECONDS` says for how long all of them together (26). A failure prints its schedule, which
//! `BUFSHARE_SCHEDULE` (a file with it) runs again.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use shuttle::rand::{Rng, thread_rng};
use shuttle::scheduler::{PctScheduler, RandomScheduler, ReplayScheduler, Scheduler};
use shuttle::{Config, FailurePersistence, MaxSteps, Runner, thread};

// What the daemon's own files below find under `crate::`.
use bufshare::{
    audit, command, ids, ioctl, limits, memory, metrics, policy, protocol, registry, reply,
    throttle, throttled, window,
};

#[path = "../common/mod.rs"]
mod common;
#[path = "../../src"]
mod daemon {
    #![allow(dead_code, reason = "the daemon uses all of it")]
    pub mod config_space;
    pub mod device;
    pub mod execute;
    pub mod hub;
    pub mod vmm;
}
use daemon::{config_space, device, execute, hub, vmm};

mod cases;
mod dmabuf;
mod guest;
mod host;
mod queue;
mod screen;
mod scripts;
mod sync;
mod world;

use guest::Guest;
use host::Host;
use ids::{ClientId, PeerId};
use policy::{Policy, Rule, Side};
use scripts::Shared;

/// How the schedules differ.
#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    /// Everybody lets go.
    Everybody,
    /// And was polite before: but for BEGIN and END there is nothing that would wake anybody.
    Politely,
    /// The daemon is replaced in the midst of it.
    Leaves,
    /// One of `cases`.
    Paused,
    ExporterLeaves,
    Fences,
    Points,
    Window,
}

fn schedule(end: End) {
    world::begin();
    let vms = ["a", "b"]
        .map(|name| hub::VmSpec { name: name.to_owned(), quota: limits::Quota::default() });
    let rule = Rule { from: Side::Any, to: Side::Any, read_only: false };
    let dmabufs = dmabuf::DmaBufs { zero_copy: thread_rng().gen_bool(0.5) };
    let hub = Arc::new(hub::Hub::new(&vms, Policy::new(vec![rule]), dmabufs).expect("a hub"));
    world::watch(&hub);
    let host = Host::new(&hub);
    let over = Arc::new(AtomicBool::new(false));
    let shared = Arc::new(Shared { quiet: end == End::Politely, ..Default::default() });
    let case = Arc::new(cases::Case::default());
    let busy = Arc::new(AtomicUsize::new(0));
    let mut pokes = Vec::new();
    let mut late_pokes = Vec::new();
    let mut threads = Vec::new();

    let [a, b] = [2, 3].map(|peer| Guest::new(&hub, &host, PeerId(peer)));
    for (mut guest, exports) in [(a, true), (b, false)] {
        if end == End::Window && !exports {
            guest.with_window();
        }
        pokes.push(guest.poke());
        late_pokes.push(guest.poke());
        let (shared, over, busy) = (shared.clone(), over.clone(), busy.clone());
        let case = case.clone();
        busy.fetch_add(1, Ordering::SeqCst);
        threads.push(thread::spawn(move || {
            if guest.connect() {
                let guest = &mut guest;
                match (end, exports) {
                    (End::Paused, _) => cases::paused(guest),
                    (End::ExporterLeaves, true) => cases::leaves(guest),
                    (End::ExporterLeaves, false) => cases::is_left(guest),
                    (End::Fences, true) => cases::holds(guest),
                    (End::Fences, false) => cases::gives_up(guest, &case),
                    (End::Points, true) => cases::draws(guest),
                    (End::Points, false) => cases::shows(guest),
                    (End::Window, true) => cases::lends(guest, &case),
                    (End::Window, false) => cases::looks(guest, &case),
                    (_, true) => scripts::export(guest, &shared),
                    (_, false) => scripts::import(guest, &shared),
                }
            }
            busy.fetch_sub(1, Ordering::SeqCst);
            guest.idle(&over);
            guest.disconnect();
        }));
    }
    let clients = match end {
        End::Paused | End::ExporterLeaves | End::Window => 0,
        End::Fences | End::Points => 1,
        _ => thread_rng().gen_range(1..=2),
    };
    for number in 1..=clients {
        let client = host.client(ClientId(number));
        let (shared, case, busy) = (shared.clone(), case.clone(), busy.clone());
        busy.fetch_add(1, Ordering::SeqCst);
        threads.push(thread::spawn(move || {
            match end {
                End::Fences => cases::works(&client, &case),
                End::Points => cases::views(&client),
                _ => scripts::consume(&client, &shared),
            }
            client.bell.retire();
            busy.fetch_sub(1, Ordering::SeqCst);
        }));
    }
    let left = Arc::new(Mutex::new(Vec::new()));
    if end == End::Leaves {
        let client = host.client(ClientId(9));
        let (left, shared) = (left.clone(), shared.clone());
        let pokes = std::mem::take(&mut late_pokes);
        threads.push(thread::spawn(move || {
            (0..thread_rng().gen_range(0..3000)).for_each(|_| world::point());
            *left.lock().expect("no panic") = client.ask(|hub| hub.leave().0);
            shared.left.store(true, Ordering::SeqCst);
            pokes.iter().for_each(|poke| poke());
            client.bell.retire();
        }));
    }
    let serve = host.clone();
    let serve = thread::spawn(move || serve.run());

    loop {
        world::come_to_rest();
        world::nothing_was_forgotten(host.armed());
        if !world::pass_time() {
            break;
        }
    }
    assert_eq!(busy.load(Ordering::SeqCst), 0, "somebody waits for ever");
    left.lock().expect("no panic").clear();
    if end != End::Leaves {
        hub.read(|registry| {
            assert_eq!(registry.buffer_count(), 0, "a buffer is left");
            assert_eq!(registry.bytes_charged(), 0, "bytes are charged");
            assert_eq!((registry.lease_count(), registry.import_count()), (0, (0, 0)));
        });
        assert_eq!(world::memory(), 0, "memory is left");
    }
    over.store(true, Ordering::SeqCst);
    pokes.iter().for_each(|poke| poke());
    threads.into_iter().for_each(|thread| thread.join().expect("no panic"));
    host.stop();
    serve.join().expect("no panic");
    hub.read(|registry| assert_eq!(registry.buffer_count(), 0, "a buffer outlives its session"));
    assert_eq!(world::memory(), 0, "memory outlives its buffer");
    for (name, count) in hub.metrics.list() {
        *SEEN.lock().expect("no panic").entry(name).or_default() += count;
    }
}

/// What happened in all of them, by the daemon's own counters.
static SEEN: Mutex<BTreeMap<String, u64>> = Mutex::new(BTreeMap::new());

fn explore(scheduler: impl Scheduler + 'static, end: End, share: f64) {
    let seconds = std::env::var("BUFSHARE_SCHEDULE_SECONDS").ok();
    let seconds = seconds.map_or(26.0, |text| text.parse().expect("seconds"));
    let mut config = Config::new();
    config.stack_size = 1 << 20;
    config.max_steps = MaxSteps::FailAfter(200_000);
    config.max_time = Some(Duration::from_secs_f64(seconds * share));
    config.failure_persistence = FailurePersistence::File(Some(env!("CARGO_TARGET_TMPDIR").into()));
    config.silence_warnings = true;
    config.ungraceful_shutdown_config.immediately_return_on_panic = true;
    let again = std::env::var_os("BUFSHARE_SCHEDULE");
    let count = match again {
        Some(file) => {
            let scheduler = ReplayScheduler::new_from_file(file).expect("a schedule");
            Runner::new(scheduler, config).run(move || schedule(end))
        }
        None => Runner::new(scheduler, config).run(move || schedule(end)),
    };
    println!("{count} schedules");
    let seen = SEEN.lock().expect("no panic");
    println!("{:?}", seen.iter().filter(|(_, count)| **count > 0).collect::<Vec<_>>());
}

#[test]
fn whoever_comes_first_nobody_waits_for_ever() {
    explore(RandomScheduler::new(usize::MAX), End::Everybody, 0.15);
}

#[test]
fn a_thread_may_be_very_slow() {
    explore(PctScheduler::new(4, usize::MAX), End::Everybody, 0.15);
}

#[test]
fn nothing_else_wakes_who_waits_for_another() {
    explore(RandomScheduler::new(usize::MAX), End::Politely, 0.15);
}

#[test]
fn a_daemon_may_leave_in_the_midst_of_it() {
    explore(RandomScheduler::new(usize::MAX), End::Leaves, 0.15);
}

#[test]
fn what_was_served_while_the_vm_was_paused_comes_back() {
    explore(RandomScheduler::new(usize::MAX), End::Paused, 0.08);
}

#[test]
fn who_uses_a_buffer_hears_that_its_exporter_is_gone() {
    explore(RandomScheduler::new(usize::MAX), End::ExporterLeaves, 0.08);
}

#[test]
fn fences_are_watched_no_longer_than_somebody_waits() {
    explore(RandomScheduler::new(usize::MAX), End::Fences, 0.08);
}

#[test]
fn a_point_that_is_reached_wakes_all_who_wait_for_it() {
    explore(RandomScheduler::new(usize::MAX), End::Points, 0.08);
}

#[test]
fn a_window_shows_nothing_that_nobody_wants() {
    explore(RandomScheduler::new(usize::MAX), End::Window, 0.08);
}
