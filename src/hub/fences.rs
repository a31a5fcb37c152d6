//! Waits for what devices of the host do with a buffer: snapshots of its fences, until they are over.
//!
//! It knows descriptors that become readable, not who may have the buffer. A snapshot is closed when
//! its BEGIN ends, however that is: when its VM is gone, too.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{Timespec, epoll};

use super::{Hub, Memory, lock};
use crate::protocol::Status;
use crate::registry::{FenceWait, Fences, Origin};
use crate::sync::Mutex;
use crate::throttled;

/// Snapshots that are taken from the kernel at once.
const TURN: usize = 64;

/// Snapshots that are not over.
#[derive(Debug)]
pub struct Watched {
    /// Readable when one of them is over.
    epoll: OwnedFd,
    snapshots: Mutex<Snapshots>,
}

#[derive(Debug, Default)]
struct Snapshots {
    last: u64,
    open: HashMap<u64, (FenceWait, OwnedFd)>,
    of: HashMap<Origin, u64>,
}

impl Watched {
    /// None yet.
    pub fn new() -> io::Result<Watched> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        Ok(Watched { epoll, snapshots: Mutex::default() })
    }

    fn watch(&self, wait: FenceWait, fd: OwnedFd) -> io::Result<()> {
        let mut snapshots = lock(&self.snapshots);
        snapshots.last += 1;
        let number = snapshots.last;
        let data = epoll::EventData::new_u64(number);
        epoll::add(&self.epoll, &fd, data, epoll::EventFlags::IN)?;
        snapshots.open.insert(number, (wait, fd));
        snapshots.of.insert(wait.origin, number);
        Ok(())
    }

    /// The wait is over: its snapshot, if it has one, is closed.
    pub fn forget(&self, origin: Origin) {
        let mut snapshots = lock(&self.snapshots);
        let number = snapshots.of.remove(&origin);
        let closed = number.and_then(|number| snapshots.open.remove(&number));
        drop(snapshots);
        drop(closed);
    }

    /// Those that are over.
    fn take_over(&self) -> io::Result<Vec<FenceWait>> {
        let mut events = Vec::with_capacity(TURN);
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), Some(&at_once))?;
        let mut snapshots = lock(&self.snapshots);
        let numbers = events.iter().map(|event| event.data.u64());
        let closed: Vec<_> = numbers.filter_map(|number| snapshots.open.remove(&number)).collect();
        for (wait, _) in &closed {
            snapshots.of.remove(&wait.origin);
        }
        drop(snapshots);
        Ok(closed.into_iter().map(|(wait, _)| wait).collect())
    }
}

impl Hub {
    /// Looks at fences with the lock released. Returns the BEGINs that do not wait for them, with how
    /// they end; the others are watched.
    pub(super) fn look_at_fences(&self, looks: Vec<Fences<Memory>>) -> Vec<(FenceWait, Status)> {
        let ends = |look: &Fences<Memory>| {
            let Some(fd) = look.memory.fences(look.write)? else { return Ok(Some(Status::Ok)) };
            if look.unless.is_some() {
                return Ok(look.unless);
            }
            self.metrics.fence_waits.add(1);
            self.fences.watch(look.wait, fd)?;
            // Who ended the wait before this has found no snapshot to close.
            if !self.with(|registry, _| registry.fence_pending(look.wait)) {
                self.fences.forget(look.wait.origin);
            }
            Ok(None)
        };
        let failed = |error: io::Error| {
            throttled!(self.throttle, Warn, "fences of the host cannot be waited for: {error}");
            Some(Status::NoMem)
        };
        let end = |look: &Fences<Memory>| Some((look.wait, ends(look).unwrap_or_else(failed)?));
        looks.iter().filter_map(end).collect()
    }

    /// Readable when [`fences_over`](Self::fences_over) has something to do.
    pub fn fence_wake(&self) -> BorrowedFd<'_> {
        self.fences.epoll.as_fd()
    }

    /// Ends the BEGINs whose fences are over.
    pub fn fences_over(&self) {
        match self.fences.take_over() {
            Ok(over) => self.with(|registry, _| {
                over.into_iter().for_each(|wait| registry.fence_over(wait, Status::Ok));
            }),
            Err(error) => throttled!(self.throttle, Warn, "fences cannot be polled: {error}"),
        }
    }
}
