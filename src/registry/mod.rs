//! Who holds what: the truth about every buffer, as a pure state machine.
//!
//! It contains no IO, no lock, no log and no clock: time comes in as the duration since the daemon's
//! start, consequences go out through the [`Outbox`]. It knows neither guest addresses nor file
//! descriptors; `H` stands for the memory behind a buffer, and tests count leaks with it.
//!
//! Invariants:
//! - A refused operation changes nothing.
//! - RELEASED is told once a handle, in the response or by the event, and is its last word.
//! - Quota is charged from `begin_export` until the memory is given up and RELEASED is delivered.
//! - A [`Ticket`] is used exactly once; a session that dies meanwhile makes `finish_export` undo.
//! - An `H` that the registry gives up is in the outbox, to be dropped outside of any lock.

mod access;
mod buffer;
mod client;
mod exporter;
mod fence;
mod handover;
mod host;
mod importer;
#[cfg(test)]
mod model;
mod offer;
mod outbox;
mod report;
mod revoke;
mod rides;
mod session;
mod sync;
#[cfg(test)]
mod tests;
mod timeline;
mod topics;
mod transfer;
mod vm;
mod windows;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use uuid::Uuid;

pub use access::{Begun, Ended, SyncRequest};
pub use buffer::{Buffer, Description, Foreign, Grant, Lease, Phase};
pub use client::{ClientTicket, ExportEvent};
pub use exporter::{Exported, GrantRequest, HandleState, Part, Ticket};
pub use handover::Left;
pub use host::{Acquired, BufferInfo, LeaseInfo};
pub use importer::{AttachRequest, Attached, Attachment, MapRequest, MapTicket, Mapping};
pub use outbox::{Audit, Done, FenceWait, Fences, Notice, Outbox, Settled};
pub use report::{HolderInfo, Holders, Report, Who};
pub use session::{Event, EventKind, PeerView, Wants};
pub use sync::{Holder, Origin, Waiter};
pub use timeline::{PointWait, Signal};
pub use transfer::{Copy, CopyTicket, Move, Place, View};
use vm::Vm;
pub use windows::{Answer, Shown, WindowRequest, WindowTicket};

use crate::ids::{BufferKey, ClientId, HandleId, LeaseId, PeerId, PlaceId, SessionId};
use crate::limits::Quota;
use crate::policy::Policy;
use crate::protocol::Status;

/// A look at who holds the memory of a buffer, from [`Registry::look`] to [`Registry::observed`].
#[must_use = "nothing is known before Registry::observed"]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Look {
    key: BufferKey,
    last_lease: Option<LeaseId>,
    last_place: Option<PlaceId>,
}

/// What an event is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Topic {
    /// The VM's own export.
    Export(BufferKey),
    /// What the VM may attach.
    Offer(BufferKey),
    /// The VM's attachment.
    Attachment(HandleId),
}

/// The registry of one daemon.
#[derive(Debug, Clone)]
pub struct Registry<H> {
    policy: Policy,
    vms: BTreeMap<PeerId, Vm<H>>,
    buffers: HashMap<BufferKey, Buffer<H>>,
    by_uuid: BTreeMap<Uuid, BufferKey>,
    /// Of which a VM was granted something at some time.
    granted: BTreeSet<BufferKey>,
    clients: HashMap<ClientId, BTreeMap<LeaseId, BufferKey>>,
    /// Host clients that export, and what all of them are charged, those included that are gone.
    exporters: HashMap<ClientId, client::Exporter>,
    host_charge: client::Charge,
    /// What is due next of each buffer: a wait, a grant or a look at foreign references.
    deadlines: BTreeSet<(Duration, BufferKey)>,
    last_key: u64,
    last_lease: u64,
    last_session: u64,
    last_attachment: u64,
    /// The daemon has left: no session begins any more.
    left: bool,
    last_place: u64,
    outbox: Outbox<H>,
}

impl<H: Clone> Registry<H> {
    /// An empty registry for these VMs.
    pub fn new(
        policy: Policy,
        vms: impl IntoIterator<Item = (PeerId, String, Quota, u32)>,
    ) -> Self {
        let vms = vms
            .into_iter()
            .map(|(peer, name, quota, epoch)| (peer, Vm::new(name, quota, epoch)))
            .collect();
        Registry {
            policy,
            vms,
            buffers: HashMap::new(),
            by_uuid: BTreeMap::new(),
            granted: BTreeSet::new(),
            clients: HashMap::new(),
            exporters: HashMap::new(),
            host_charge: client::Charge::default(),
            deadlines: BTreeSet::new(),
            last_key: 0,
            last_lease: 0,
            last_session: 0,
            last_attachment: 0,
            left: false,
            last_place: 0,
            outbox: Outbox::default(),
        }
    }

    /// What is to be done for all operations since the last call.
    pub fn take_outbox(&mut self) -> Outbox<H> {
        std::mem::take(&mut self.outbox)
    }

    /// Buffers that exist, those of ended sessions included.
    pub fn buffer_count(&self) -> usize {
        self.buffers.len()
    }

    /// Bytes charged to all VMs and to the host.
    pub fn bytes_charged(&self) -> u64 {
        self.vms.values().map(|vm| vm.bytes).sum::<u64>() + self.host_charge.bytes
    }

    /// Leases that exist.
    pub fn lease_count(&self) -> usize {
        self.clients.values().map(BTreeMap::len).sum()
    }

    /// When [`tick`](Self::tick) is due next; `None` while nothing waits for time to pass.
    pub fn next_deadline(&self) -> Option<Duration> {
        self.deadlines.first().map(|(when, _)| *when)
    }

    /// Ends what is due: waits, grants, pauses between two looks at foreign references.
    pub fn tick(&mut self, now: Duration) {
        while let Some((when, key)) = self.deadlines.first().copied() {
            if when > now {
                break;
            }
            self.deadlines.pop_first();
            if let Some(buffer) = self.buffers.get_mut(&key) {
                buffer.due = None;
            }
            self.expire_waits(key, now);
            self.expire_grants(key, now);
            self.expire_notices(key, now);
            if let Some(buffer) = self.buffers.get_mut(&key)
                && let Foreign::Held { pause, next } = &mut buffer.foreign
                && *next <= now
            {
                // Should that look never come, there is another one.
                *next = now + *pause;
                self.outbox.observe.insert(key);
            }
            self.settle(key);
        }
    }

    /// Begins a look at a buffer that the outbox asked for; `None` where there is no need any more.
    /// Count its references with the lock released, then say [`observed`](Self::observed).
    pub fn look(&self, key: BufferKey) -> Option<(Look, H)> {
        let buffer = self.buffers.get(&key).filter(|buffer| buffer.may_be_looked_at())?;
        let (last_lease, last_place) = (buffer.last_lease, buffer.last_place);
        Some((Look { key, last_lease, last_place }, buffer.backing.clone()?))
    }

    /// Tells what a look found.
    ///
    /// It counts only where neither a lease nor a mapping lived since the look began: through these new
    /// references can arise at any time. Their end asks for another look.
    pub fn observed(&mut self, look: Look, held: bool, now: Duration) {
        let Look { key, last_lease, last_place } = look;
        let Some(buffer) = self.buffers.get_mut(&key) else { return };
        let same = (buffer.last_lease, buffer.last_place) == (last_lease, last_place);
        if !buffer.may_be_looked_at() || !same {
            return;
        }
        buffer.foreign = match (held, buffer.foreign) {
            (false, _) => Foreign::None,
            (true, Foreign::Held { pause, .. }) => {
                let pause = (pause * 2).min(crate::limits::OBSERVE_MAX);
                Foreign::Held { pause, next: now + pause }
            }
            (true, _) => {
                let pause = crate::limits::OBSERVE_MIN;
                Foreign::Held { pause, next: now + pause }
            }
        };
        self.settle(key);
    }

    fn vm(&self, session: SessionId) -> Result<&Vm<H>, Status> {
        self.vms.get(&session.peer).filter(|vm| vm.session == Some(session)).ok_or(Status::Revoked)
    }

    fn vm_mut(&mut self, session: SessionId) -> Result<&mut Vm<H>, Status> {
        self.vms
            .get_mut(&session.peer)
            .filter(|vm| vm.session == Some(session))
            .ok_or(Status::Revoked)
    }

    /// The live or releasing export that a handle names.
    fn key(&self, session: SessionId, handle: HandleId) -> Result<BufferKey, Status> {
        let key = match session.client() {
            Some(client) => self.exporters.get(&client).and_then(|own| own.handles.get(&handle)),
            None => self.vm(session)?.handles.get(&handle),
        };
        key.copied().ok_or(Status::NoEnt)
    }

    /// Carries a buffer on to where its users leave it, and queues the event that follows from it;
    /// then the pool that it leaves, and so on. Called after every change to a buffer.
    fn settle(&mut self, key: BufferKey) {
        let mut next = Some(key);
        while let Some(key) = next {
            self.serve_points(key);
            next = self.settle_one(key);
        }
    }

    /// Returns the pool that has a part less by it.
    fn settle_one(&mut self, key: BufferKey) -> Option<BufferKey> {
        let buffer = self.buffers.get_mut(&key)?;
        let mut pool = None;
        if buffer.phase == Phase::Releasing && !buffer.pages_in_use() {
            buffer.phase = Phase::Told;
            pool = self.close_handle(key);
        }
        let buffer = self.buffers.get_mut(&key)?;
        if buffer.phase == Phase::Lingering && !buffer.pages_in_use() {
            buffer.phase = Phase::Orphan;
            let owner = buffer.owner;
            pool = self.leave_pool(key);
            if let Some(vm) = self.vms.get_mut(&owner) {
                vm.lingering = vm.lingering.saturating_sub(1);
            }
            self.resync(owner);
        }
        let buffer = self.buffers.get_mut(&key)?;
        let keep = matches!(buffer.phase, Phase::Live | Phase::Releasing) || buffer.memory_in_use();
        if !keep && let Some(backing) = buffer.backing.take() {
            self.outbox.drop.push(backing);
            // There is nothing left to copy from.
            self.revoke_attachments(key, |_| true);
        }
        let buffer = self.buffers.get_mut(&key)?;
        if buffer.phase == Phase::Orphan && buffer.backing.is_none() {
            self.remove(key);
            return pool;
        }
        self.queue_export(key);
        self.reschedule(key);
        pool
    }

    /// The exporter has its pages back: the handle dies, it holds nothing any more, and its pool,
    /// which is returned and to be settled, has one user less.
    fn close_handle(&mut self, key: BufferKey) -> Option<BufferKey> {
        self.clear_bits(key, |holder| holder == Holder::Exporter);
        let buffer = self.buffers.get_mut(&key)?;
        let (session, handle) = (buffer.session, buffer.handle);
        if let Some(own) = session.client().and_then(|client| self.exporters.get_mut(&client)) {
            own.handles.remove(&handle);
        } else if let Some(vm) = self.vms.get_mut(&session.peer) {
            vm.handles.remove(&handle);
        }
        self.leave_pool(key)
    }

    /// A part no longer uses its pool, which is returned.
    fn leave_pool(&mut self, key: BufferKey) -> Option<BufferKey> {
        let (pool, _) = self.buffers.get_mut(&key)?.pool.take()?;
        let parent = self.buffers.get_mut(&pool)?;
        parent.parts = parent.parts.saturating_sub(1);
        Some(pool)
    }

    /// Enters what is due next of a buffer, one entry a buffer.
    fn reschedule(&mut self, key: BufferKey) {
        let Some(buffer) = self.buffers.get_mut(&key) else { return };
        let due = buffer.next_due();
        if due != buffer.due {
            if let Some(old) = buffer.due {
                self.deadlines.remove(&(old, key));
            }
            if let Some(new) = due {
                self.deadlines.insert((new, key));
                self.outbox.clock = true;
            }
            buffer.due = due;
        }
    }

    /// Forgets a buffer and gives its quota back.
    fn remove(&mut self, key: BufferKey) {
        self.revoke_attachments(key, |_| true);
        let Some(buffer) = self.buffers.remove(&key) else { return };
        self.by_uuid.remove(&buffer.uuid);
        if let Some(due) = buffer.due {
            self.deadlines.remove(&(due, key));
        }
        self.uncharge(buffer.session, buffer.what.size);
        self.forget_export(buffer.session, key);
        self.outbox.drop.extend(buffer.backing);
        if self.granted.remove(&key) {
            self.refresh_offers(key);
        }
    }
}
