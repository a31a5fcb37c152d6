//! What the daemon's threads meet at: locks, wake-ups, the clock. `hub`, `device` and `vmm` take them from
//! here alone: `tests/schedules` puts its own in their place and chooses which thread runs when.
//!
//! It does not know what is locked, or why somebody is woken.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::thread;

use log::error;

pub use std::sync::atomic::{AtomicBool, AtomicU64};
pub use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
pub use std::sync::{Condvar, Mutex, MutexGuard, RwLock};
pub use std::time::Instant;

/// A thread that nobody waits for.
pub fn spawn(name: String, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    thread::Builder::new().name(name).spawn(work).map(drop)
}

/// Wakes one thread; raised often before that thread looks, it wakes it once.
#[derive(Debug)]
pub struct Wake(File);

impl Wake {
    /// Not raised.
    pub fn new() -> io::Result<Wake> {
        Ok(Wake(crate::ioctl::eventfd()?))
    }

    /// Makes it readable.
    pub fn raise(&self) {
        // EAGAIN: the counter is full, so the reader is awake already.
        if let Err(error) = rustix::io::write(&self.0, &1u64.to_ne_bytes())
            && error != rustix::io::Errno::AGAIN
        {
            error!("a wake-up was lost: {error}");
        }
    }

    /// Makes it unreadable. What was done before a raise that this took away is seen after it.
    pub fn consume(&self) {
        let mut count = [0; 8];
        // EAGAIN: a spurious wake-up.
        let _ = rustix::io::read(&self.0, &mut count);
    }
}

impl AsFd for Wake {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
