//! One buffer: who owns it, who may use it, who does. Pure.
//!
//! It knows its own counts, not quotas, rings or clocks' meaning.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::sync::{Holder, SyncState};
use super::timeline::Points;
use super::{EventKind, Exported};
use crate::ids::{
    Access, AttachmentId, BufferKey, ClientId, HandleId, LeaseId, PeerId, PlaceId, SessionId,
};
use crate::protocol::{Mode, NAME_LEN};

/// What a buffer is for, as its exporter said.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Description {
    /// Bytes.
    pub size: u64,
    /// The most that anybody can be granted.
    pub access: Access,
    /// UTF-8, NUL padded.
    pub name: [u8; NAME_LEN],
    /// Wire value.
    pub metadata_type: u32,
    /// Bytes as the exporter sent them.
    pub metadata: Box<[u8]>,
}

/// An exporter's leave for one peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grant {
    /// For what.
    pub access: Access,
    /// Consumed by the first use.
    pub once: bool,
    /// End of its life, since the daemon's start.
    pub expires: Option<Duration>,
}

/// A host client's use of a buffer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// Its number.
    pub id: LeaseId,
    /// Whose it is.
    pub client: ClientId,
    /// What it may do.
    pub access: Access,
    /// Dead, but not yet handed back: only RELEASE works.
    pub revoked: bool,
    /// Since the daemon's start.
    pub since: Duration,
    /// Its client asked for time when the exporter takes the buffer back by force.
    pub notice: bool,
    /// When that time is over; zero until the clock has set it.
    pub ends: Option<Duration>,
}

/// A living attachment, as its buffer knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Use {
    pub(super) id: AttachmentId,
    pub(super) importer: PeerId,
    pub(super) handle: HandleId,
    /// It can map the exporter's own pages.
    pub(super) shares: bool,
}

/// Where in its life a buffer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Exported.
    Live,
    /// RELEASE was sent; RELEASED comes when nobody uses it.
    Releasing,
    /// Pages are back; the RELEASED event is not delivered yet.
    Told,
    /// The exporter has its pages back (COPY); others still hold the private copy.
    Orphan,
    /// The session ended; somebody on the host still holds the exporter's pages.
    Lingering,
}

/// What is known of descriptors that are neither ours nor explained by a lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Foreign {
    /// None: they can only arise through a lease.
    None,
    /// A lease gave the descriptor out: not looked at while a lease lives.
    Possible,
    /// Somebody holds one: looked at again after a pause that doubles.
    Held {
        /// The next pause.
        pause: Duration,
        /// When to look again.
        next: Duration,
    },
}

/// A buffer and everything that the registry knows of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Buffer<H> {
    pub(super) owner: PeerId,
    pub(super) session: SessionId,
    pub(super) handle: HandleId,
    pub(super) uuid: Uuid,
    pub(super) what: Description,
    pub(super) mode: Mode,
    /// When it was exported, since the daemon's start.
    pub(super) since: Duration,
    /// `None` once the memory is given up.
    pub(super) backing: Option<H>,
    /// The pool that it is a part of, and from which byte of it on.
    pub(super) pool: Option<(BufferKey, u64)>,
    pub(super) parts: u32,
    pub(super) grants: Vec<(PeerId, Grant)>,
    pub(super) attachments: Vec<Use>,
    pub(super) leases: Vec<Lease>,
    /// The last of all its leases so far.
    pub(super) last_lease: Option<LeaseId>,
    /// Places of windows that show its own pages, or may, and the last of all so far.
    pub(super) shown: u32,
    pub(super) last_place: Option<PlaceId>,
    pub(super) phase: Phase,
    pub(super) generation: u64,
    pub(super) foreign: Foreign,
    /// References to the memory can be counted (it is a dma-buf).
    pub(super) observable: bool,
    /// A VMM can show it: there is a descriptor of it alone.
    pub(super) shows: bool,
    /// Copies from and to the content that run right now.
    pub(super) copies: u32,
    /// What the exporter knows of the content.
    pub(super) told_generation: u64,
    /// The exporter was last told BUSY.
    pub(super) told_busy: bool,
    pub(super) sync: Option<Box<SyncState>>,
    pub(super) points: Option<Box<Points>>,
    /// Its entry among the deadlines.
    pub(super) due: Option<Duration>,
}

impl<H> Buffer<H> {
    /// One that was exported just now.
    pub(super) fn new(
        session: SessionId,
        handle: HandleId,
        what: Description,
        made: Exported<H>,
        pool: Option<(BufferKey, u64)>,
    ) -> Buffer<H> {
        Buffer {
            owner: session.peer,
            session,
            handle,
            uuid: made.uuid,
            what,
            mode: made.mode,
            since: made.since,
            backing: Some(made.backing),
            pool,
            parts: 0,
            grants: Vec::new(),
            attachments: Vec::new(),
            leases: Vec::new(),
            last_lease: None,
            shown: 0,
            last_place: None,
            phase: Phase::Live,
            generation: 0,
            foreign: Foreign::None,
            observable: made.observable,
            shows: made.shows,
            copies: 0,
            told_generation: 0,
            told_busy: false,
            sync: None,
            points: None,
            due: None,
        }
    }

    /// Attachments, leases, and 1 if somebody unknown on the host holds it, a window still shows it to
    /// who attached it no longer, or parts of it live.
    pub(super) fn use_count(&self) -> u32 {
        let foreign = match self.foreign {
            Foreign::None => false,
            // While a lease or a window explains them, nobody looks.
            Foreign::Possible => self.leases.is_empty() && self.shown == 0,
            Foreign::Held { .. } => true,
        };
        let stale = self.shown > 0 && !self.attachments.iter().any(|held| held.shares);
        let unexplained = foreign || stale || self.parts > 0;
        let known = self.leases.len() + self.attachments.len();
        u32::try_from(known).unwrap_or(u32::MAX).saturating_add(unexplained.into())
    }

    /// Whether the exporter's own pages are in use: who has only a copy of them does not count.
    pub(super) fn pages_in_use(&self) -> bool {
        let shared = !self.leases.is_empty() || self.may_be_foreign();
        let seen = self.shown > 0 || self.attachments.iter().any(|held| held.shares);
        self.copies > 0 || self.parts > 0 || seen || (self.mode == Mode::ZeroCopy && shared)
    }

    /// Whether the memory behind it must stay.
    pub(super) fn memory_in_use(&self) -> bool {
        let attached = self.mode == Mode::Copy && !self.attachments.is_empty();
        let seen = self.shown > 0 || self.attachments.iter().any(|held| held.shares);
        attached || seen || !self.leases.is_empty() || self.copies > 0 || self.may_be_foreign()
    }

    /// Whether a foreign descriptor may exist, looked at or not.
    pub(super) fn may_be_foreign(&self) -> bool {
        self.foreign != Foreign::None
    }

    /// Whether a look tells something: while a lease or mapping lives new descriptors can arise at any
    /// time.
    pub(super) fn may_be_looked_at(&self) -> bool {
        self.leases.is_empty() && self.shown == 0 && self.may_be_foreign()
    }

    /// What `peer` was granted; a grant for the peer itself goes before one for all.
    pub(super) fn grant(&self, peer: PeerId) -> Option<&Grant> {
        let find = |who| self.grants.iter().find(|(to, _)| *to == who).map(|(_, grant)| grant);
        find(peer).or_else(|| find(PeerId::ANY))
    }

    /// Consumes the grant that `peer` just used, if it was for one use.
    pub(super) fn use_up_grant(&mut self, peer: PeerId) {
        let own = self.grants.iter().any(|(to, _)| *to == peer);
        let used = if own { peer } else { PeerId::ANY };
        self.grants.retain(|(to, grant)| *to != used || !grant.once);
    }

    /// Whether there is something for an attachment to copy from, or to see.
    pub(super) fn has_content_for(&self, holder: Holder) -> bool {
        let stays = self.mode == Mode::Copy || self.shares(holder);
        self.phase == Phase::Live || (stays && self.backing.is_some())
    }

    /// Whether it can see the exporter's own pages in a window.
    pub(super) fn shares(&self, holder: Holder) -> bool {
        let is = |held: &Use| holder == Holder::Attachment(held.id);
        self.attachments.iter().any(|held| held.shares && is(held))
    }

    /// Whether a VM has a living attachment.
    pub(super) fn attached(&self, peer: PeerId) -> bool {
        self.attachments.iter().any(|held| held.importer == peer)
    }

    pub(super) fn lease(&self, id: LeaseId) -> Option<&Lease> {
        self.leases.iter().find(|lease| lease.id == id)
    }

    pub(super) fn sync(&mut self) -> &mut SyncState {
        self.sync.get_or_insert_default()
    }

    /// Whether who has a lease should finish.
    pub(super) fn wanted_back(&self) -> bool {
        self.phase != Phase::Live || self.leases.iter().any(|lease| lease.ends.is_some())
    }

    /// When time alone changes something: a wait, a grant, a notice, a look at foreign references.
    pub(super) fn next_due(&self) -> Option<Duration> {
        let waits = self.sync.iter().filter_map(|sync| sync.next_due());
        let points = self.points.iter().filter_map(|points| points.next_due());
        let grants = self.grants.iter().filter_map(|(_, grant)| grant.expires);
        let look = match self.foreign {
            Foreign::Held { next, .. } if self.may_be_looked_at() => Some(next),
            _ => None,
        };
        let notices = self.leases.iter().filter_map(|lease| lease.ends);
        waits.chain(points).chain(grants).chain(notices).chain(look).min()
    }

    /// Whether a host client exports it, who has the memory.
    fn of_client(&self) -> bool {
        self.owner == PeerId::HOST
    }

    /// Whether devices of the host may have fences in the memory: who has had the dma-buf can leave
    /// some behind.
    pub(super) fn may_have_fences(&self) -> bool {
        let elsewhere = (self.observable && self.last_lease.is_some()) || self.of_client();
        elsewhere && self.backing.is_some()
    }

    /// Whether an event waits to be told to the exporter; `import`: it wants to hear of new content.
    pub(super) fn has_event(&self, import: bool) -> bool {
        match self.phase {
            Phase::Live => self.busy_changed() || (import && self.changed()),
            Phase::Releasing => import && self.changed(),
            Phase::Told => true,
            Phase::Orphan | Phase::Lingering => false,
        }
    }

    /// What is to be told to the exporter.
    pub(super) fn event_kind(&self, import: bool) -> Option<EventKind> {
        self.has_event(import).then_some(match self.phase {
            Phase::Told => EventKind::Released,
            Phase::Live if self.busy_changed() && self.use_count() > 0 => EventKind::Busy,
            Phase::Live if self.busy_changed() => EventKind::Idle,
            _ => EventKind::Changed,
        })
    }

    pub(super) fn busy_changed(&self) -> bool {
        self.told_busy != (self.use_count() > 0)
    }

    fn changed(&self) -> bool {
        self.told_generation != self.generation
    }
}
