//! In the place of the daemon's `sync`: locks, wake-ups and a clock that the explorer rules.

use std::io;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicBool as Flag, Ordering};
use std::sync::{Arc, LockResult, OnceLock, PoisonError, TryLockError, TryLockResult};
use std::time::Duration;

pub use shuttle::sync::RwLock;
pub use shuttle::sync::atomic::{AtomicBool, AtomicU64};
pub use std::sync::mpsc::RecvTimeoutError;

use crate::world::{self, Bell, dawdle};

shuttle::thread_local! {
    /// What a thread of the daemon's own sleeps on.
    static OWN: std::cell::RefCell<Option<Arc<Bell>>> = std::cell::RefCell::new(None);
}

/// What this thread sleeps on.
pub fn own_bell() -> Arc<Bell> {
    OWN.with(|own| own.borrow().clone()).expect("a thread of the daemon's own")
}

/// A thread of the daemon's own.
#[allow(clippy::unnecessary_wraps, reason = "as the daemon's")]
pub fn spawn(_name: String, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let bell = Bell::new();
    shuttle::thread::spawn(move || {
        OWN.with(|own| *own.borrow_mut() = Some(bell.clone()));
        work();
        bell.retire();
    });
    Ok(())
}

/// A lock.
#[derive(Debug, Default)]
pub struct Mutex<T>(shuttle::sync::Mutex<T>);

/// It is locked.
#[derive(Debug)]
pub struct MutexGuard<'a, T> {
    inner: shuttle::sync::MutexGuard<'a, T>,
    of: &'a Mutex<T>,
}

impl<T> Mutex<T> {
    /// Not locked.
    pub fn new(value: T) -> Mutex<T> {
        Mutex(shuttle::sync::Mutex::new(value))
    }

    /// Locks it.
    pub fn lock(&self) -> LockResult<MutexGuard<'_, T>> {
        let guard = |inner| MutexGuard { inner, of: self };
        self.0.lock().map(guard).map_err(|error| PoisonError::new(guard(error.into_inner())))
    }

    /// Locks it if nobody else has.
    pub fn try_lock(&self) -> TryLockResult<MutexGuard<'_, T>> {
        let guard = |inner| MutexGuard { inner, of: self };
        self.0.try_lock().map(guard).map_err(|error| match error {
            TryLockError::WouldBlock => TryLockError::WouldBlock,
            TryLockError::Poisoned(error) => {
                TryLockError::Poisoned(PoisonError::new(guard(error.into_inner())))
            }
        })
    }
}

impl<T> Deref for MutexGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.inner
    }
}

impl<T> DerefMut for MutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.inner
    }
}

type Waiter = (Arc<Bell>, Arc<Flag>);

/// Waits of threads of the daemon's own.
#[derive(Debug, Default)]
pub struct Condvar(std::sync::Mutex<Vec<Waiter>>);

impl Condvar {
    /// Waits while it is so.
    pub fn wait_while<'a, T>(
        &self,
        guard: MutexGuard<'a, T>,
        so: impl FnMut(&mut T) -> bool,
    ) -> LockResult<MutexGuard<'a, T>> {
        self.wait_until(guard, None, so)
    }

    /// Waits while it is so, for a time at most.
    pub fn wait_timeout_while<'a, T>(
        &self,
        guard: MutexGuard<'a, T>,
        time: Duration,
        so: impl FnMut(&mut T) -> bool,
    ) -> LockResult<(MutexGuard<'a, T>, ())> {
        let until = Some(world::now() + time);
        self.wait_until(guard, until, so)
            .map(|guard| (guard, ()))
            .map_err(|error| PoisonError::new((error.into_inner(), ())))
    }

    fn wait_until<'a, T>(
        &self,
        mut guard: MutexGuard<'a, T>,
        until: Option<Duration>,
        mut so: impl FnMut(&mut T) -> bool,
    ) -> LockResult<MutexGuard<'a, T>> {
        while so(&mut guard) && until.is_none_or(|until| world::now() < until) {
            let (bell, rung) = (own_bell(), Arc::new(Flag::new(false)));
            self.0.lock().expect("no panic").push((bell.clone(), rung.clone()));
            let mutex = guard.of;
            drop(guard);
            bell.sleep(until, || rung.load(Ordering::SeqCst));
            guard = mutex.lock()?;
        }
        Ok(guard)
    }

    /// Wakes all who wait.
    pub fn notify_all(&self) {
        for (bell, rung) in self.0.lock().expect("no panic").drain(..) {
            rung.store(true, Ordering::SeqCst);
            bell.ring();
        }
    }
}

/// Tells by its end alone.
#[derive(Debug)]
pub struct Sender<T>(Arc<(Flag, OnceLock<Arc<Bell>>)>, PhantomData<T>);

/// Hears of that.
#[derive(Debug)]
pub struct Receiver<T>(Arc<(Flag, OnceLock<Arc<Bell>>)>, PhantomData<T>);

/// Both ends.
pub fn channel<T>() -> (Sender<T>, Receiver<T>) {
    let both = Arc::default();
    (Sender(Arc::clone(&both), PhantomData), Receiver(both, PhantomData))
}

impl<T> Drop for Sender<T> {
    fn drop(&mut self) {
        self.0.0.store(true, Ordering::SeqCst);
        if let Some(bell) = self.0.1.get() {
            bell.ring();
        }
    }
}

impl<T> Receiver<T> {
    /// Waits for the end of the other one.
    pub fn recv_timeout(&self, time: Duration) -> Result<T, RecvTimeoutError> {
        let bell = self.0.1.get_or_init(own_bell).clone();
        let over = || self.0.0.load(Ordering::SeqCst);
        bell.sleep(Some(world::now() + time), over);
        Err(if over() { RecvTimeoutError::Disconnected } else { RecvTimeoutError::Timeout })
    }
}

/// A time of the world.
#[derive(Debug)]
pub struct Instant(Duration);

impl Instant {
    /// The time of the world.
    pub fn now() -> Instant {
        Instant(world::now())
    }

    /// Since then.
    pub fn elapsed(&self) -> Duration {
        world::now() - self.0
    }
}

/// As an eventfd that one thread waits for.
#[derive(Debug, Default)]
pub struct Wake {
    raised: Flag,
    sleeper: OnceLock<Arc<Bell>>,
}

impl Wake {
    /// Not raised.
    #[allow(clippy::unnecessary_wraps, reason = "as the daemon's")]
    pub fn new() -> io::Result<Wake> {
        Ok(Wake::default())
    }

    /// Who sleeps on it from now on.
    pub fn watch(&self, bell: Arc<Bell>) {
        self.sleeper.set(bell).expect("one thread");
    }

    /// Makes it readable.
    pub fn raise(&self) {
        dawdle();
        self.raised.store(true, Ordering::SeqCst);
        if let Some(bell) = self.sleeper.get() {
            bell.ring();
        }
        dawdle();
    }

    /// Makes it unreadable.
    pub fn consume(&self) {
        dawdle();
        self.raised.store(false, Ordering::SeqCst);
        dawdle();
    }

    /// Whether it is readable.
    pub fn is_raised(&self) -> bool {
        self.raised.load(Ordering::SeqCst)
    }
}
