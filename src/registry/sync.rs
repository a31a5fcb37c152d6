//! Who reads and who writes one buffer: advisory CPU access, first come, first served
//! (spec "Synchronisation"). Pure.
//!
//! It knows holders and their bits, not bytes, clocks or rings.

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
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Origin {
    /// A chain of a VM's sync queue, by the device's own number for it.
    Vm(PeerId, u64),
    /// A request of a host client.
    Client(ClientId, Cookie),
}

/// A BEGIN that waits: in the queue, or with its bits for the fences of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Waiter {
    /// Who waits.
    pub holder: Holder,
    /// For what.
    pub want: Access,
    /// Since the daemon's start.
    pub deadline: Duration,
    /// What it ends with rather than wait.
    pub unless: Option<Status>,
    /// Named by CANCEL.
    pub cookie: Cookie,
    /// Whom to tell.
    pub origin: Origin,
}

/// Waits that ended, and how.
pub type Ended = Vec<(Waiter, Status)>;

/// A BEGIN that has its bits, in front of the fences of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Fenced {
    waiter: Waiter,
    /// They were looked at, and are not over: its time runs.
    pending: bool,
}

/// The bits of one holder.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Held {
    /// Until END.
    set: Access,
    /// BEGINs in front of fences or of their copy that read, and write: each becomes set, or goes without
    /// a trace.
    reading: usize,
    writing: usize,
}

impl Held {
    fn bits(self) -> Access {
        self.set.union(Access { read: self.reading > 0, write: self.writing > 0 })
    }
}

/// Whether what is read has to be copied to the holder's own memory before a BEGIN is answered.
pub fn copies(holder: Holder, want: Access) -> bool {
    matches!(holder, Holder::Attachment(_)) && want.read
}

/// The synchronisation state of one buffer.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SyncState {
    held: HashMap<Holder, Held>,
    /// How many of them read, and write: thousands of holders must not cost a walk each.
    readers: usize,
    writers: usize,
    waiting: VecDeque<Waiter>,
    fenced: Vec<Fenced>,
}

impl SyncState {
    /// What `holder` holds.
    pub fn held_by(&self, holder: Holder) -> Access {
        self.held.get(&holder).copied().unwrap_or_default().bits()
    }

    fn change(&mut self, holder: Holder, change: impl FnOnce(&mut Held)) {
        let mut held = self.held.remove(&holder).unwrap_or_default();
        let before = held.bits();
        change(&mut held);
        let bits = held.bits();
        if !bits.is_none() {
            self.held.insert(holder, held);
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

    /// Those in front of fences of the host.
    pub fn fenced(&self) -> impl Iterator<Item = &Waiter> {
        self.fenced.iter().map(|one| &one.waiter)
    }

    /// Those in the queue, first come first.
    pub fn waiters(&self) -> impl Iterator<Item = &Waiter> {
        self.waiting.iter()
    }

    /// When time alone ends a wait next.
    pub fn next_due(&self) -> Option<Duration> {
        let pending = self.fenced.iter().filter(|one| one.pending).map(|one| &one.waiter);
        self.waiting.iter().chain(pending).map(|waiter| waiter.deadline).min()
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

    /// Gives a BEGIN its bits until [`decide`](Self::decide), which says whether it keeps them. The caller
    /// has asked [`may_begin`](Self::may_begin).
    pub fn reserve(&mut self, holder: Holder, want: Access) {
        self.change(holder, |held| {
            held.reading += usize::from(want.read);
            held.writing += usize::from(want.write);
        });
    }

    fn decide(&mut self, holder: Holder, want: Access, keep: bool) {
        // Who left while it copied has nothing to keep.
        if !self.held.contains_key(&holder) {
            return;
        }
        self.change(holder, |held| {
            held.reading -= usize::from(want.read);
            held.writing -= usize::from(want.write);
            if keep {
                held.set = held.set.union(want);
            }
        });
    }

    /// A BEGIN that was given its bits is granted: they are set, now or [after its copy](Self::copied).
    pub fn grant(&mut self, holder: Holder, want: Access) {
        if !copies(holder, want) {
            self.decide(holder, want, true);
        }
    }

    /// The copy of a BEGIN is over: it keeps its bits, or those are served who waited for them.
    pub fn copied(&mut self, holder: Holder, want: Access, keep: bool) -> Ended {
        self.decide(holder, want, keep);
        if keep { Vec::new() } else { self.promote() }
    }

    /// Leaves a BEGIN, which was given its bits, in front of fences that nobody has looked at.
    pub fn fence(&mut self, waiter: Waiter) {
        self.fenced.push(Fenced { waiter, pending: false });
    }

    /// Whether a BEGIN is in front of fences. They are not over, so its time runs from now on.
    pub fn fence_pending(&mut self, origin: Origin) -> bool {
        let found = self.fenced.iter_mut().find(|one| one.waiter.origin == origin);
        found.map(|one| one.pending = true).is_some()
    }

    /// Takes a BEGIN away from fences, which are over or will not be waited for: it keeps its bits, or
    /// those are served who waited for them. `None` where it is not there.
    pub fn fence_over(&mut self, origin: Origin, keep: bool) -> Option<(Waiter, Ended)> {
        let at = self.fenced.iter().position(|one| one.waiter.origin == origin)?;
        let Fenced { waiter, .. } = self.fenced.swap_remove(at);
        if keep {
            self.grant(waiter.holder, waiter.want);
            return Some((waiter, Vec::new()));
        }
        self.decide(waiter.holder, waiter.want, false);
        Some((waiter, self.promote()))
    }

    /// Queues a BEGIN that must wait.
    pub fn wait(&mut self, waiter: Waiter) {
        self.waiting.push_back(waiter);
    }

    /// Clears bits and returns the waiters that are served by it, in order.
    pub fn end(&mut self, holder: Holder, bits: Access) -> Ended {
        self.change(holder, |held| held.set = held.set.minus(bits));
        self.promote()
    }

    /// Clears all of who is gone and waits for nothing, as [`end`](Self::end) does.
    pub fn leave(&mut self, holders: impl Fn(Holder) -> bool) -> Ended {
        let gone: Vec<Holder> = self.held.keys().copied().filter(|who| holders(*who)).collect();
        for holder in gone {
            self.change(holder, |held| *held = Held::default());
        }
        self.promote()
    }

    /// Takes out the waiters that get a status, and returns them and those that are served by it.
    pub fn cancel(&mut self, status: impl Fn(&Waiter) -> Option<Status>) -> (Ended, Ended) {
        self.take_out(|waiter, _| status(waiter))
    }

    /// As [`cancel`](Self::cancel), of those whose time is over.
    pub fn expire(&mut self, now: Duration) -> (Ended, Ended) {
        self.take_out(|waiter, runs| (runs && waiter.deadline <= now).then_some(Status::TimedOut))
    }

    fn take_out(&mut self, status: impl Fn(&Waiter, bool) -> Option<Status>) -> (Ended, Ended) {
        let mut out = Vec::new();
        let mut stays = |waiter: &Waiter, runs| {
            let status = status(waiter, runs);
            out.extend(status.map(|status| (*waiter, status)));
            status.is_none()
        };
        self.waiting.retain(|waiter| stays(waiter, true));
        let (kept, gone): (Vec<Fenced>, Vec<Fenced>) =
            self.fenced.iter().partition(|one| stays(&one.waiter, one.pending));
        self.fenced = kept;
        for one in gone {
            self.decide(one.waiter.holder, one.waiter.want, false);
        }
        let served = if out.is_empty() { Vec::new() } else { self.promote() };
        (out, served)
    }

    /// Serves waiters in the order in which they came: each is given its bits, to be kept or to be
    /// fenced. A WRITE that cannot be served holds back those behind it that hold nothing.
    fn promote(&mut self) -> Ended {
        let mut served = Vec::new();
        let mut write_waits = false;
        for waiter in std::mem::take(&mut self.waiting) {
            let held_back = write_waits && self.held_by(waiter.holder).is_none();
            if held_back || self.conflicts(waiter.holder, waiter.want) {
                write_waits |= waiter.want.write;
                self.waiting.push_back(waiter);
            } else {
                self.reserve(waiter.holder, waiter.want);
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
            unless: None,
            cookie: Cookie(0),
            origin: Origin::Client(ClientId(0), Cookie(0)),
        }
    }

    fn give(sync: &mut SyncState, holder: Holder, want: Access) {
        sync.reserve(holder, want);
        sync.grant(holder, want);
    }

    fn who(ended: &[(Waiter, Status)]) -> Vec<Holder> {
        ended.iter().map(|(waiter, _)| waiter.holder).collect()
    }

    #[test]
    fn readers_share_and_a_writer_is_alone() {
        let mut sync = SyncState::default();
        give(&mut sync, A, Access::READ);
        assert!(sync.may_begin(B, Access::READ));
        assert!(!sync.may_begin(B, Access::WRITE));
        assert!(sync.may_begin(A, Access::WRITE), "a lone reader may upgrade");
        give(&mut sync, A, Access::WRITE);
        assert!(!sync.may_begin(B, Access::READ));
    }

    #[test]
    fn a_waiting_writer_holds_back_later_readers() {
        let mut sync = SyncState::default();
        give(&mut sync, A, Access::READ);
        sync.wait(waiter(B, Access::WRITE));
        assert!(!sync.may_begin(C, Access::READ));
        sync.wait(waiter(C, Access::READ));
        let served = sync.end(A, Access::READ);
        assert_eq!(who(&served), [B]);
        sync.grant(B, Access::WRITE);
        assert_eq!(who(&sync.end(B, Access::ALL)), [C]);
    }

    #[test]
    fn bits_already_held_are_never_waited_for() {
        let mut sync = SyncState::default();
        give(&mut sync, A, Access::WRITE);
        sync.wait(waiter(B, Access::WRITE));
        assert!(sync.may_begin(A, Access::WRITE));
    }

    #[test]
    fn cancelling_the_writer_serves_the_readers_behind_it() {
        let mut sync = SyncState::default();
        give(&mut sync, A, Access::READ);
        sync.wait(waiter(B, Access::WRITE));
        sync.wait(waiter(C, Access::READ));
        let (out, served) = sync.cancel(|waiter| (waiter.holder == B).then_some(Status::Canceled));
        assert_eq!((who(&out), who(&served)), (vec![B], vec![C]));
    }

    #[test]
    fn who_waits_for_fences_leaves_no_trace_if_that_fails() {
        let mut sync = SyncState::default();
        give(&mut sync, A, Access::READ);
        let origin = |n| Origin::Vm(crate::ids::PeerId(2), n);
        let fenced = |want, n| Waiter { origin: origin(n), ..waiter(A, want) };
        for one in [fenced(Access::ALL, 1), fenced(Access::WRITE, 2)] {
            sync.reserve(A, one.want);
            sync.fence(one);
        }
        sync.wait(waiter(B, Access::READ));
        assert_eq!(sync.held_by(A), Access::ALL);
        assert!(sync.end(A, Access::READ).is_empty(), "the others still have it");
        assert_eq!(sync.next_due(), Some(Duration::ZERO));
        let (_, served) = sync.fence_over(origin(1), false).unwrap();
        assert!(served.is_empty(), "who writes is still there");
        assert_eq!(sync.held_by(A), Access::WRITE);
        let (out, served) = sync.cancel(|one| (one.holder == A).then_some(Status::Canceled));
        assert_eq!((who(&out), who(&served)), (vec![A], vec![B]));
        assert_eq!(sync.fence_over(origin(2), true), None, "it is over");
        assert_eq!(sync.held_by(A), Access::NONE);
    }

    #[test]
    fn time_runs_once_fences_are_known_to_be_pending() {
        let mut sync = SyncState::default();
        let one = waiter(A, Access::READ);
        sync.reserve(A, one.want);
        sync.fence(one);
        assert_eq!((sync.next_due(), sync.expire(Duration::MAX).0), (None, vec![]));
        assert!(sync.fence_pending(one.origin));
        assert_eq!(sync.next_due(), Some(one.deadline));
        assert_eq!(sync.expire(Duration::MAX).0, [(one, Status::TimedOut)]);
        assert!(sync.is_idle() && !sync.fence_pending(one.origin));
    }

    #[test]
    fn end_without_begin_changes_nothing() {
        let mut sync = SyncState::default();
        assert!(sync.end(A, Access::ALL).is_empty());
        assert!(sync.is_idle());
    }
}
