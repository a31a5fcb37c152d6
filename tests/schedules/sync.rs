//! In the place of the daemon's `sync`: locks, wake-ups and a clock that the explorer rules.

use std::io;
use std::sync::atomic::{AtomicBool as Flag, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

pub use shuttle::sync::atomic::{AtomicBool, AtomicU64};
pub use shuttle::sync::{Condvar, Mutex, MutexGuard, RwLock};

use crate::world::{self, Bell, dawdle};

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
