//! What surrounds the daemon's threads in one schedule: who sleeps, the time, interrupts, all memory.
//!
//! All threads of a schedule take turns on one thread of the process, so its locals are theirs, too.

use std::cell::RefCell;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use shuttle::rand::{Rng, thread_rng};
use shuttle::thread::{self, Thread};
use vhost_user_backend::VhostUserBackend;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use crate::common::Memory;
use crate::device::{Device, WAKE};
use crate::hub::Hub;
use crate::queue::Vring;

/// Others may run here.
pub fn point() {
    thread::sleep(Duration::ZERO);
}

/// Others may run here, and now and then so long that they do all that they can. That is where wake-ups
/// are lost, and chance alone would hardly ever pass a thread over so often.
pub fn dawdle() {
    let steps = if thread_rng().gen_bool(0.05) { thread_rng().gen_range(1..300) } else { 1 };
    (0..steps).for_each(|_| point());
}

/// What one thread sleeps on, whatever may wake it.
#[derive(Debug, Default)]
pub struct Bell {
    asleep: AtomicBool,
    retired: AtomicBool,
    until: Mutex<Option<Duration>>,
    sleeper: Mutex<Option<Thread>>,
}

impl Bell {
    /// Of a thread without which nothing is at rest.
    pub fn new() -> Arc<Bell> {
        let bell = Arc::new(Bell::default());
        WORLD.with_borrow_mut(|world| world.bells.push(bell.clone()));
        bell
    }

    /// Wakes the thread.
    pub fn ring(&self) {
        if self.retired.load(Ordering::SeqCst) {
            return;
        }
        self.asleep.store(false, Ordering::SeqCst);
        let sleeper = self.sleeper.lock().expect("no panic").clone();
        if let Some(sleeper) = sleeper {
            sleeper.unpark();
        }
    }

    /// Sleeps until it is time, or for ever. `ready` is level state, as that of descriptors in an epoll set.
    pub fn sleep(&self, until: Option<Duration>, ready: impl Fn() -> bool) {
        *self.sleeper.lock().expect("no panic") = Some(thread::current());
        while !ready() && until.is_none_or(|until| now() < until) {
            *self.until.lock().expect("no panic") = until;
            self.rest();
            thread::park();
        }
        *self.until.lock().expect("no panic") = None;
        self.asleep.store(false, Ordering::SeqCst);
    }

    /// Sleeps, for ever if need be.
    pub fn sleep_until(&self, ready: impl Fn() -> bool) {
        self.sleep(None, ready);
    }

    /// Does nothing for a while.
    pub fn pause(&self, time: Duration) {
        self.sleep(Some(now() + time), || false);
    }

    /// The thread ends.
    pub fn retire(&self) {
        self.retired.store(true, Ordering::SeqCst);
        self.rest();
    }

    /// Another thread takes its place.
    pub fn reuse(&self) {
        self.asleep.store(false, Ordering::SeqCst);
        self.retired.store(false, Ordering::SeqCst);
    }

    fn rest(&self) {
        self.asleep.store(true, Ordering::SeqCst);
        let referee = WORLD.with_borrow(|world| world.referee.clone());
        if is_at_rest() {
            referee.ring();
        }
    }
}

/// A connection that runs.
#[derive(Clone)]
pub struct Connection {
    /// Its device.
    pub device: Arc<Device>,
    /// Its rings, as the framework has them,
    pub vrings: Vec<Vring>,
    /// and where the driver sees how many entries were used.
    pub used: Vec<u64>,
    /// In which memory.
    pub memory: Arc<Memory>,
}

impl Connection {
    /// Entries that the driver sees.
    fn used(&self) -> Vec<u16> {
        self.used.iter().map(|at| self.memory.load_u16(at + 2)).collect()
    }
}

struct Driver {
    call: EventFd,
    interrupted: Arc<AtomicBool>,
    bell: Arc<Bell>,
}

#[derive(Default)]
struct World {
    now: Duration,
    bells: Vec<Arc<Bell>>,
    /// Rung when all of them sleep.
    referee: Arc<Bell>,
    drivers: Vec<Driver>,
    connections: Vec<Connection>,
    hub: Weak<Hub>,
    memory: usize,
}

thread_local! {
    static WORLD: RefCell<World> = RefCell::default();
}

/// A new one.
pub fn begin() {
    WORLD.set(World::default());
}

/// Whose lock must not be held where it takes long.
pub fn watch(hub: &Arc<Hub>) {
    WORLD.with_borrow_mut(|world| world.hub = Arc::downgrade(hub));
}

/// The time.
pub fn now() -> Duration {
    WORLD.with_borrow(|world| world.now)
}

/// Time passes, until somebody wants to do something. False where nobody ever does.
pub fn pass_time() -> bool {
    let bells = WORLD.with_borrow(|world| world.bells.clone());
    let until = |bell: &Arc<Bell>| *bell.until.lock().expect("no panic");
    let Some(next) = bells.iter().filter_map(until).min() else { return false };
    WORLD.with_borrow_mut(|world| world.now = world.now.max(next));
    bells
        .iter()
        .filter(|bell| until(bell).is_some_and(|until| until <= next))
        .for_each(|bell| bell.ring());
    true
}

/// Takes the registry's lock: who has it already is found out here.
pub fn no_lock_is_held() {
    let hub = WORLD.with_borrow(|world| world.hub.upgrade());
    if let Some(hub) = hub {
        hub.read(|_| ());
    }
}

/// One memory more.
pub fn memory_is_made() {
    WORLD.with_borrow_mut(|world| world.memory += 1);
}

/// One memory less.
pub fn memory_is_gone() {
    WORLD.with_borrow_mut(|world| world.memory -= 1);
}

/// How many there are.
pub fn memory() -> usize {
    WORLD.with_borrow(|world| world.memory)
}

/// A driver that is interrupted when this call is raised.
pub fn driver(call: EventFd, interrupted: Arc<AtomicBool>, bell: Arc<Bell>) {
    WORLD.with_borrow_mut(|world| world.drivers.push(Driver { call, interrupted, bell }));
}

/// Interrupts drivers whose call was raised.
pub fn interrupt() {
    let raised: Vec<Arc<Bell>> = WORLD.with_borrow(|world| {
        let raised = world.drivers.iter().filter(|driver| driver.call.read().is_ok());
        raised
            .map(|driver| (driver.interrupted.store(true, Ordering::SeqCst), driver.bell.clone()).1)
            .collect()
    });
    raised.iter().for_each(|bell| bell.ring());
}

/// A connection came.
pub fn connected(connection: Connection) {
    WORLD.with_borrow_mut(|world| world.connections.push(connection));
}

/// A connection is gone.
pub fn disconnected(device: &Arc<Device>) {
    WORLD
        .with_borrow_mut(|world| world.connections.retain(|one| !Arc::ptr_eq(&one.device, device)));
}

/// Waits until nobody can do anything.
pub fn come_to_rest() {
    let referee = WORLD.with_borrow(|world| world.referee.clone());
    referee.sleep_until(is_at_rest);
}

fn is_at_rest() -> bool {
    WORLD.with_borrow(|world| world.bells.iter().all(|bell| bell.asleep.load(Ordering::SeqCst)))
}

/// No wake-up was lost: a worker that is woken for nothing finds nothing to do, and the host's thread,
/// which wakes at `armed`, has nothing to fetch and nothing to do before.
pub fn nothing_was_forgotten(armed: Option<Duration>) {
    let (hub, connections) =
        WORLD.with_borrow(|world| (world.hub.upgrade(), world.connections.clone()));
    let Some(hub) = hub else { return };
    let due = hub.read(|registry| registry.next_deadline());
    assert!(
        due.is_none_or(|due| armed.is_some_and(|armed| armed <= due)),
        "something is due at {due:?}, but the host's thread sleeps until {armed:?}"
    );
    let news = hub.take_host_news();
    assert!(
        news.done.is_empty() && news.notices.is_empty(),
        "the host's thread sleeps, but there is {news:?}"
    );
    for connection in connections {
        let before = connection.used();
        let wake = u16::try_from(WAKE).expect("small");
        let Connection { device, vrings, .. } = &connection;
        device.handle_event(wake, EventSet::IN, vrings, 0).expect("never an error");
        assert_eq!(before, connection.used(), "a worker sleeps that has something to do");
    }
}
