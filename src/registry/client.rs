//! What a host client asks of the registry as an exporter, and what it is told of its exports
//! (`spec/host-socket.md`). Pure.
//!
//! Its buffers belong to the host, on behalf of that client, which stands where a VM's session stands:
//! GRANT, RELEASE and SYNC are those of any exporter. It does not know descriptors or sockets.

use std::collections::{BTreeMap, BTreeSet};

use uuid::Uuid;

use super::topics::Topics;
use super::{
    BufferInfo, Description, EventKind, Exported, HandleState, Holder, Phase, Registry, Topic,
};
use crate::ids::{Access, BufferKey, ClientId, HandleId, LeaseId, PeerId, SessionId};
use crate::limits::{MAX_CLIENT_BYTES, MAX_CLIENT_EXPORTS, MAX_HOST_BYTES, MAX_HOST_EXPORTS};
use crate::policy::Allowed;
use crate::protocol::{State, Status};

/// What is charged: exports and their bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Charge {
    pub(super) exports: u32,
    pub(super) bytes: u64,
}

impl Charge {
    /// With one export of so many bytes more; QUOTA above these limits.
    fn with(self, bytes: u64, max_exports: u32, max_bytes: u64) -> Result<Charge, Status> {
        let bytes = self.bytes.checked_add(bytes).filter(|bytes| *bytes <= max_bytes);
        match bytes {
            Some(bytes) if self.exports < max_exports => {
                Ok(Charge { exports: self.exports + 1, bytes })
            }
            _ => Err(Status::Quota),
        }
    }

    fn without(self, bytes: u64) -> Charge {
        let exports = self.exports.saturating_sub(1);
        Charge { exports, bytes: self.bytes.saturating_sub(bytes) }
    }
}

/// A host client that exported something.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Exporter {
    pub(super) handles: BTreeMap<HandleId, BufferKey>,
    /// Its exports, those that were released but not told included.
    pub(super) buffers: BTreeSet<BufferKey>,
    pub(super) charge: Charge,
    pub(super) events: Topics,
}

/// Leave to take in the memory of one export of a client; it is charged. Give it to
/// [`Registry::finish_client_export`], whatever came of it.
#[must_use = "quota stays charged until finish_client_export"]
#[derive(Debug)]
pub struct ClientTicket {
    client: ClientId,
    what: Description,
}

/// What a client is told of one of its exports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportEvent {
    /// RELEASED, BUSY, IDLE or CHANGED.
    pub kind: EventKind,
    /// Of which.
    pub handle: HandleId,
    /// How it is now.
    pub info: BufferInfo,
}

impl SessionId {
    /// A host client as an exporter.
    pub fn of_client(client: ClientId) -> SessionId {
        SessionId { peer: PeerId::HOST, number: client.0 }
    }

    /// The host client that this is.
    pub fn client(self) -> Option<ClientId> {
        (self.peer == PeerId::HOST).then_some(ClientId(self.number))
    }
}

impl<H: Clone> Registry<H> {
    /// Judges an EXPORT of a client that is there, and charges it. QUOTA above the client's or the
    /// host's limits, or where `too_big` says that it exceeds another one.
    pub fn begin_client_export(
        &mut self,
        client: ClientId,
        what: Description,
        too_big: bool,
    ) -> Result<ClientTicket, Status> {
        let own = self.exporters.get(&client).map_or(Charge::default(), |own| own.charge);
        let own = own.with(what.size, MAX_CLIENT_EXPORTS, MAX_CLIENT_BYTES)?;
        let all = self.host_charge.with(what.size, MAX_HOST_EXPORTS, MAX_HOST_BYTES)?;
        if too_big {
            return Err(Status::Quota);
        }
        self.exporters.entry(client).or_default().charge = own;
        self.host_charge = all;
        Ok(ClientTicket { client, what })
    }

    /// Enters the memory, or undoes the charge where there is none, or the client is gone.
    pub fn finish_client_export(
        &mut self,
        ticket: ClientTicket,
        made: Result<Exported<H>, Status>,
    ) -> Result<(HandleId, Uuid), Status> {
        let ClientTicket { client, what } = ticket;
        let session = SessionId::of_client(client);
        let made = match made {
            Ok(made) if !self.exporters.contains_key(&client) => Err((Status::Io, Some(made))),
            Ok(made) if self.by_uuid.contains_key(&made.uuid) => Err((Status::Io, Some(made))),
            Ok(made) => Ok(made),
            Err(status) => Err((status, None)),
        };
        match made {
            Ok(made) => {
                // One sequence with the leases: a number names one or the other.
                self.last_lease += 1;
                let (handle, uuid) = (HandleId(self.last_lease), made.uuid);
                let key = self.enter(session, handle, what, made, None);
                if let Some(own) = self.exporters.get_mut(&client) {
                    own.handles.insert(handle, key);
                    own.buffers.insert(key);
                }
                Ok((handle, uuid))
            }
            Err((status, made)) => {
                self.outbox.drop.extend(made.map(|made| made.backing));
                self.uncharge(session, what.size);
                Err(status)
            }
        }
    }

    /// An export is gone: whoever is charged for it is charged less.
    pub(super) fn uncharge(&mut self, session: SessionId, bytes: u64) {
        if let Some(client) = session.client() {
            self.host_charge = self.host_charge.without(bytes);
            if let Some(own) = self.exporters.get_mut(&client) {
                own.charge = own.charge.without(bytes);
            }
        } else if let Some(vm) = self.vms.get_mut(&session.peer) {
            vm.exports = vm.exports.saturating_sub(1);
            vm.bytes = vm.bytes.saturating_sub(bytes);
        }
    }

    /// RELEASE of a lease or an export.
    pub fn release_of(
        &mut self,
        client: ClientId,
        number: LeaseId,
        force: bool,
    ) -> Result<(State, u32), Status> {
        let session = SessionId::of_client(client);
        match self.release(session, HandleId(number.0), force) {
            Ok(HandleState { state, use_count, .. }) => Ok((state, use_count)),
            Err(_) => self.end_lease(client, number).map(|()| (State::Released, 0)),
        }
    }

    /// What a client's number stands for: an export of it, or a lease that lives.
    pub(super) fn holder_of(
        &self,
        client: ClientId,
        number: LeaseId,
    ) -> Result<(BufferKey, Holder, Access), Status> {
        match self.key(SessionId::of_client(client), HandleId(number.0)) {
            Ok(key) => Ok((key, Holder::Exporter, Access::ALL)),
            Err(_) => {
                let (key, held) = self.lease_of(client, number)?;
                Ok((key, Holder::Lease(number), held.access))
            }
        }
    }

    /// The exports of a client that is gone end by force; memory that a VM still uses stays until it
    /// does not.
    pub(super) fn exporter_gone(&mut self, client: ClientId) {
        let Some(gone) = self.exporters.remove(&client) else { return };
        for key in gone.buffers {
            self.abandon(key);
        }
    }

    /// What to tell a client of its exports next; it counts as told.
    pub fn take_export_event(&mut self, client: ClientId) -> Option<ExportEvent> {
        loop {
            let events = &mut self.exporters.get_mut(&client)?.events;
            let topic = events.first()?;
            events.remove(topic);
            let Topic::Export(key) = topic else { continue };
            let Some(buffer) = self.buffers.get(&key) else { continue };
            let (handle, uuid) = (buffer.handle, buffer.uuid);
            // It may have become quiet again.
            let Some(kind) = buffer.event_kind(true) else { continue };
            let info = self.host_info(uuid);
            let generation = info.as_ref().map_or(0, |info| info.generation);
            self.know_export(key, kind, generation);
            if let Some(info) = info {
                return Some(ExportEvent { kind, handle, info });
            }
        }
    }

    /// Queues what is to be told to the exporter, in its own queue.
    pub(super) fn queue_export(&mut self, key: BufferKey) {
        let Some(buffer) = self.buffers.get(&key) else { return };
        let topic = Topic::Export(key);
        if let Some(client) = buffer.session.client() {
            let own = self.exporters.get_mut(&client).filter(|_| buffer.has_event(true));
            if own.is_some_and(|own| own.events.push(topic)) {
                self.outbox.exporters.insert(client);
            }
        } else if let Some(vm) = self.vms.get_mut(&buffer.owner)
            && buffer.has_event(vm.import)
            && vm.events.push(topic)
        {
            self.outbox.wake.insert(buffer.owner);
        }
    }

    /// A buffer is gone, and with it what was to be told of it.
    pub(super) fn forget_export(&mut self, session: SessionId, key: BufferKey) {
        let topic = Topic::Export(key);
        if let Some(own) = session.client().and_then(|client| self.exporters.get_mut(&client)) {
            own.buffers.remove(&key);
            own.events.remove(topic);
        } else if let Some(vm) = self.vms.get_mut(&session.peer) {
            vm.buffers.remove(&key);
            vm.events.remove(topic);
        }
    }

    /// Enters what an exporter knows now, and queues what it does not.
    pub(super) fn know_export(&mut self, key: BufferKey, kind: EventKind, generation: u64) {
        let Some(buffer) = self.buffers.get_mut(&key) else { return };
        match kind {
            EventKind::Released => buffer.phase = Phase::Orphan,
            EventKind::Changed => buffer.told_generation = generation,
            _ => buffer.told_busy = kind == EventKind::Busy,
        }
        self.settle(key);
    }

    /// The VMs that may share with the host from this number on, at most `max`, each with what a host
    /// client can grant it; and how many there are.
    pub fn host_peers(&self, first: u32, max: usize) -> (Vec<(super::PeerView, Access)>, u32) {
        let view = |index| self.peer_info(PeerId::HOST, index).ok();
        let total = view(0).map_or(0, |view| view.nr_peers);
        let entry = |view: super::PeerView| {
            let access = match self.policy.allows(PeerId::HOST, view.peer) {
                Allowed::No => Access::NONE,
                Allowed::ReadOnly => Access::READ,
                Allowed::Yes => Access::ALL,
            };
            (view, access)
        };
        ((first..total).map_while(view).map(entry).take(max).collect(), total)
    }

    /// Exports that host clients are charged for, and their bytes.
    pub fn host_charged(&self) -> (u32, u64) {
        (self.host_charge.exports, self.host_charge.bytes)
    }
}
