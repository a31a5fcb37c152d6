//! Who reads and who writes one buffer: advisory CPU access, first come, first served
//! (spec "Synchronisation"). Pure.
//!
//! It knows holders and their bits, not what they are, nor bytes, clocks or rings.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use crate::ids::{Access, AttachmentId, ClientId, Cookie, LeaseId, PeerId};
use crate::protocol::Status;

/// Who takes part in the synchronisation of a buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Holder {
    /// The VM that exported it.
    Exporter,
    /// A host client.
    Lease(LeaseId),
    /// A VM that attached it.
    Attachment(AttachmentId),
}

/// Whom to tell when a wait ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// A chain of a VM's sync queue, by the device's own number for it.
    Vm(PeerId, u64),
    /// A request of a host client.
    Client(ClientId, Cookie),
}

/// A BEGIN that waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Waiter {
    /// Who waits.
    pub holder: Holder,
    /// For what.
    pub want: Access,
    /// Since the daemon's start.
    pub deadline: Duration,
    /// Named by CANCEL.
    pub cookie: Cookie,
    /// Whom to tell.
    pub origin: Origin,
}

/// Waits that ended, and how.
pub type Ended = Vec<(Waiter, Status)>;

/// The synchronisation state of one buffer.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SyncState {
    held: HashMap<Holder, Access>,
    /// How many of them read, and write: thousands of holders must not cost a walk each.
    readers: usize,
    writers: usize,
    waiting: VecDeque<Waiter>,
}

impl SyncState {
    /// What `holder` holds.
    pub fn held_by(&self, holder: Holder) -> Access {
        self.held.get(&holder).copied().unwrap_or_default()
    }

    fn set(&mut self, holder: Holder, bits: Access) {
        let before = self.held_by(holder);
        if bits.is_none() {
            self.held.remove(&holder);
        } else {
            self.held.insert(holder, bits);
        }
        self.readers = self.readers + usize::from(bits.read) - usize::from(before.read);
        self.writers = self.writers + usize::from(bits.write) - usize::from(before.write);
    }

    /// How many hold something.
    #[cfg(test)]
    pub fn holders(&self) -> usize {
        self.held.len()
    }

    /// Whether nobody holds or waits.
    pub fn is_idle(&self) -> bool {
        self.held.is_empty() && self.waiting.is_empty()
    }

    /// The waiters, first come first.
    pub fn waiters(&self) -> impl Iterator<Item = &Waiter> {
        self.waiting.iter()
    }

    fn conflicts(&self, holder: Holder, want: Access) -> bool {
        let own = self.held_by(holder);
        let readers = self.readers > usize::from(own.read);
        let writers = self.writers > usize::from(own.write);
        (want.read && writers) || (want.write && (readers || writers))
    }

    /// Whether BEGIN would be granted at once. A waiting WRITE holds back whoever holds nothing yet.
    pub fn may_begin(&self, holder: Holder, want: Access) -> bool {
        let held = self.held_by(holder);
        let queue_jump = held.is_none() && self.waiting.iter().any(|waiter| waiter.want.write);
        held.contains(want) || (!queue_jump && !self.conflicts(holder, want))
    }

    /// Sets bits; the caller has asked [`may_begin`](Self::may_begin).
    pub fn begin(&mut self, holder: Holder, want: Access) {
        self.set(holder, self.held_by(holder).union(want));
    }

    /// Queues a BEGIN that must wait.
    pub fn wait(&mut self, waiter: Waiter) {
        self.waiting.push_back(waiter);
    }

    /// Clears bits and returns the waiters that are served by it, in order.
    pub fn end(&mut self, holders: impl Fn(Holder) -> bool, bits: Access) -> Ended {
        let gone: Vec<Holder> = self.held.keys().copied().filter(|who| holders(*who)).collect();
        for holder in gone {
            self.set(holder, self.held_by(holder).minus(bits));
        }
        self.promote()
    }

    /// Takes out the waiters that get a status, and returns them and those that are served by it.
    pub fn cancel(&mut self, status: impl Fn(&Waiter) -> Option<Status>) -> (Ended, Ended) {
        let mut out = Vec::new();
        self.waiting.retain(|waiter| match status(waiter) {
            Some(status) => {
                out.push((*waiter, status));
                false
            }
            None => true,
        });
        let served = if out.is_empty() { Vec::new() } else { self.promote() };
        (out, served)
    }

    /// Serves waiters in the order in which they came. A WRITE that cannot be served holds back
    /// those behind it that hold nothing.
    fn promote(&mut self) -> Ended {
        let mut served = Vec::new();
        let mut write_waits = false;
        for waiter in std::mem::take(&mut self.waiting) {
            let held_back = write_waits && self.held_by(waiter.holder).is_none();
            if held_back || self.conflicts(waiter.holder, waiter.want) {
                write_waits |= waiter.want.write;
                self.waiting.push_back(waiter);
            } else {
                self.begin(waiter.holder, waiter.want);
                served.push((waiter, Status::Ok));
            }
        }
        served
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Holder = Holder::Exporter;
    const B: Holder = Holder::Lease(LeaseId(1));
    const C: Holder = Holder::Lease(LeaseId(2));

    fn waiter(holder: Holder, want: Access) -> Waiter {
        Waiter {
            holder,
            want,
            deadline: Duration::ZERO,
            cookie: Cookie(0),
            origin: Origin::Client(ClientId(0), Cookie(0)),
        }
    }

    fn who(ended: &[(Waiter, Status)]) -> Vec<Holder> {
        ended.iter().map(|(waiter, _)| waiter.holder).collect()
    }

    #[test]
    fn readers_share_and_a_writer_is_alone() {
        let mut sync = SyncState::default();
        sync.begin(A, Access::READ);
        assert!(sync.may_begin(B, Access::READ));
        assert!(!sync.may_begin(B, Access::WRITE));
        assert!(sync.may_begin(A, Access::WRITE), "a lone reader may upgrade");
        sync.begin(A, Access::WRITE);
        assert!(!sync.may_begin(B, Access::READ));
    }

    #[test]
    fn a_waiting_writer_holds_back_later_readers() {
        let mut sync = SyncState::default();
        sync.begin(A, Access::READ);
        sync.wait(waiter(B, Access::WRITE));
        assert!(!sync.may_begin(C, Access::READ));
        sync.wait(waiter(C, Access::READ));
        assert_eq!(who(&sync.end(|who| who == A, Access::READ)), [B]);
        assert_eq!(who(&sync.end(|who| who == B, Access::ALL)), [C]);
    }

    #[test]
    fn bits_already_held_are_never_waited_for() {
        let mut sync = SyncState::default();
        sync.begin(A, Access::WRITE);
        sync.wait(waiter(B, Access::WRITE));
        assert!(sync.may_begin(A, Access::WRITE));
    }

    #[test]
    fn cancelling_the_writer_serves_the_readers_behind_it() {
        let mut sync = SyncState::default();
        sync.begin(A, Access::READ);
        sync.wait(waiter(B, Access::WRITE));
        sync.wait(waiter(C, Access::READ));
        let (out, served) = sync.cancel(|waiter| (waiter.holder == B).then_some(Status::Canceled));
        assert_eq!((who(&out), who(&served)), (vec![B], vec![C]));
    }

    #[test]
    fn end_without_begin_changes_nothing() {
        let mut sync = SyncState::default();
        assert!(sync.end(|who| who == A, Access::ALL).is_empty());
        assert!(sync.is_idle());
    }
}
