//! The life of a VM's device and what it is told: sessions, events, peers, lingering exports
//! (spec "Events", "Device reset"). Pure.
//!
//! It does not know rings: the device takes an event, delivers it, and then says so.

use uuid::Uuid;

use super::{BufferKey, Holder, Phase, Registry};
use crate::ids::{HandleId, PeerId, SessionId};
use crate::limits::Quota;
use crate::protocol::Status;

/// What an event says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum EventKind {
    Released,
    Idle,
    Busy,
    Peer,
    Resync,
}

/// The next thing to tell a VM. Told it stays next until [`Registry::event_told`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Event {
    /// What.
    pub kind: EventKind,
    /// Of which export; `None` for PEER and RESYNC.
    pub export: Option<(HandleId, Uuid)>,
    /// Bytes of the export.
    pub size: u64,
    /// Its generation.
    pub generation: u64,
    /// PEER: who came, went or changed epoch.
    pub peer: Option<PeerId>,
    /// PEER: the peer's epoch; else the VM's own.
    pub epoch: u32,
    key: Option<BufferKey>,
    news: u64,
}

/// A peer as PEER_INFO tells it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct PeerView {
    pub nr_peers: u32,
    pub peer: PeerId,
    pub name: String,
    pub online: bool,
    pub epoch: u32,
}

impl<H: Clone> Registry<H> {
    /// Starts a session of a VM: a new connection, which is a new epoch, or a guest that reset its
    /// device. An earlier session ends. `None` for a VM that is not configured.
    pub fn open_session(&mut self, peer: PeerId, connected: bool) -> Option<SessionId> {
        if let Some(earlier) = self.vms.get(&peer)?.session {
            self.close_session(earlier);
        }
        let vm = self.vms.get_mut(&peer)?;
        self.last_session += 1;
        let session = SessionId { peer, number: self.last_session };
        vm.session = Some(session);
        vm.epoch = vm.epoch.wrapping_add(connected.into());
        vm.next_handle = 1;
        // A guest that reset its device read the configuration before the old session was closed.
        vm.resync = !connected;
        vm.peers_changed.clear();
        self.tell_peers(peer);
        Some(session)
    }

    /// Ends a session: its handles die, leases of its buffers are revoked, pages that somebody on the
    /// host still holds linger. Nothing happens where the session is over already.
    pub fn close_session(&mut self, session: SessionId) {
        let peer = session.peer;
        let Some(vm) = self.vms.get_mut(&peer).filter(|vm| vm.session == Some(session)) else {
            return;
        };
        vm.session = None;
        vm.handles.clear();
        vm.events.clear();
        let mut keys: Vec<BufferKey> = self
            .buffers
            .iter()
            .filter(|(_, buffer)| buffer.session == session)
            .map(|(key, _)| *key)
            .collect();
        keys.sort_unstable();
        for key in &keys {
            let before = self.host_access(*key);
            self.end_waits(*key, |waiter| match waiter.holder {
                Holder::Exporter => Some(Status::Canceled),
                Holder::Lease(_) => Some(Status::Revoked),
            });
            self.clear_bits(*key, |holder| holder == Holder::Exporter);
            self.revoke_leases(*key);
            let Some(buffer) = self.buffers.get_mut(key) else { continue };
            buffer.grants.clear();
            buffer.parts = 0;
            buffer.pool = None;
            buffer.queued = false;
            if matches!(buffer.phase, Phase::Live | Phase::Releasing) {
                buffer.phase = Phase::Lingering;
                if let Some(vm) = self.vms.get_mut(&peer) {
                    vm.lingering += 1;
                }
            } else {
                buffer.phase = Phase::Orphan;
            }
            self.tell_host_offer(*key, before);
            self.settle(*key);
        }
        self.tell_peers(peer);
    }

    /// How many exports of earlier sessions are still in use.
    pub fn lingering(&self, peer: PeerId) -> u32 {
        self.vms.get(&peer).map_or(0, |vm| vm.lingering)
    }

    /// The VM's quota; the default one for a VM that is not configured.
    pub fn quota(&self, peer: PeerId) -> Quota {
        self.vms.get(&peer).map(|vm| vm.quota).unwrap_or_default()
    }

    /// The VM's epoch.
    pub fn epoch(&self, peer: PeerId) -> u32 {
        self.vms.get(&peer).map_or(0, |vm| vm.epoch)
    }

    /// What to tell the VM next; of peers only if it negotiated that.
    pub fn next_event(&mut self, session: SessionId, peers: bool) -> Option<Event> {
        let peer = session.peer;
        let vm = self.vms.get_mut(&peer).filter(|vm| vm.session == Some(session))?;
        let blank = Event {
            kind: EventKind::Resync,
            export: None,
            size: 0,
            generation: 0,
            peer: None,
            epoch: vm.epoch,
            key: None,
            news: vm.news,
        };
        if vm.resync {
            return Some(blank);
        }
        if let Some(other) = vm.peers_changed.first().copied().filter(|_| peers) {
            let epoch = self.epoch(other);
            return Some(Event { kind: EventKind::Peer, peer: Some(other), epoch, ..blank });
        }
        loop {
            let vm = self.vms.get_mut(&peer)?;
            let key = *vm.events.front()?;
            let Some(buffer) = self.buffers.get_mut(&key).filter(|buffer| buffer.has_event())
            else {
                // It became quiet again before it was told.
                vm.events.pop_front();
                if let Some(buffer) = self.buffers.get_mut(&key) {
                    buffer.queued = false;
                }
                continue;
            };
            let kind = match buffer.phase {
                Phase::Told => EventKind::Released,
                _ if buffer.use_count() > 0 => EventKind::Busy,
                _ => EventKind::Idle,
            };
            return Some(Event {
                kind,
                export: Some((buffer.handle, buffer.uuid)),
                size: buffer.what.size,
                generation: buffer.generation,
                key: Some(key),
                ..blank
            });
        }
    }

    /// The event has been delivered.
    pub fn event_told(&mut self, session: SessionId, event: Event) {
        let Ok(vm) = self.vm_mut(session) else { return };
        match (event.kind, event.peer, event.key) {
            (EventKind::Resync, ..) if vm.news == event.news => vm.resync = false,
            (EventKind::Peer, Some(other), _) if vm.news == event.news => {
                vm.peers_changed.remove(&other);
            }
            (kind, _, Some(key)) => {
                // It is the first still, others queue behind it; or it is forgotten.
                let first = vm.events.front() == Some(&key);
                if first {
                    vm.events.pop_front();
                }
                let Some(buffer) = self.buffers.get_mut(&key) else { return };
                buffer.queued &= !first;
                if kind == EventKind::Released {
                    buffer.phase = Phase::Orphan;
                } else {
                    buffer.told_busy = kind == EventKind::Busy;
                }
                self.settle(key);
            }
            _ => {}
        }
    }

    /// The VM missed something: RESYNC comes next.
    pub fn resync(&mut self, peer: PeerId) {
        if let Some(vm) = self.vms.get_mut(&peer).filter(|vm| vm.session.is_some()) {
            vm.resync = true;
            vm.news += 1;
            self.outbox.wake.insert(peer);
        }
    }

    /// PEER_INFO: the peer of this number among those that the VM may know. NOENT past the end.
    pub fn peer_info(&self, peer: PeerId, index: u32) -> Result<PeerView, Status> {
        let known = std::iter::once(PeerId::HOST).chain(self.vms.keys().copied());
        let known: Vec<PeerId> =
            known.filter(|other| *other != peer && self.policy.acquainted(peer, *other)).collect();
        let other = usize::try_from(index).ok().and_then(|index| known.get(index)).copied();
        let other = other.ok_or(Status::NoEnt)?;
        let vm = self.vms.get(&other);
        Ok(PeerView {
            nr_peers: u32::try_from(known.len()).unwrap_or(u32::MAX),
            peer: other,
            name: vm.map_or_else(|| "host".to_owned(), |vm| vm.name.clone()),
            online: vm.is_none_or(|vm| vm.session.is_some()),
            epoch: vm.map_or(0, |vm| vm.epoch),
        })
    }

    fn tell_peers(&mut self, peer: PeerId) {
        for (other, vm) in &mut self.vms {
            if *other != peer && vm.session.is_some() && self.policy.acquainted(peer, *other) {
                vm.peers_changed.insert(peer);
                vm.news += 1;
                self.outbox.wake.insert(*other);
            }
        }
    }
}
