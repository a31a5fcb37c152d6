//! The life of a VM's device and what it is told: sessions, events, peers, lingering exports
//! (spec "Events", "Device reset"). Pure.
//!
//! It does not know rings: the device takes an event, delivers it, and then says so.

use uuid::Uuid;

use super::offer::Offer;
use super::{BufferKey, Holder, Phase, Registry, Topic};
use crate::ids::{Access, HandleId, PeerId, SessionId};
use crate::limits::Quota;
use crate::protocol::Status;

/// What an event says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum EventKind {
    Released,
    Idle,
    Busy,
    Offered,
    Withdrawn,
    Revoked,
    Changed,
    Peer,
    Resync,
}

/// What a driver wants to be told of, as it negotiated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wants {
    /// Peers that come and go.
    pub peers: bool,
    /// What importers hear, and content that others changed.
    pub import: bool,
}

/// The next thing to tell a VM. Told it stays next until [`Registry::event_told`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Event {
    /// What.
    pub kind: EventKind,
    /// Of which export or attachment.
    pub handle: Option<HandleId>,
    /// Of which buffer.
    pub uuid: Option<Uuid>,
    /// Bytes of the buffer.
    pub size: u64,
    /// Its generation.
    pub generation: u64,
    /// PEER: who came, went or changed epoch; else whose the buffer is.
    pub peer: Option<PeerId>,
    /// OFFERED: for what.
    pub access: Access,
    /// OFFERED: wire value.
    pub metadata_type: u32,
    /// PEER: the peer's epoch; else the VM's own.
    pub epoch: u32,
    topic: Option<Topic>,
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
    pub window: bool,
    pub epoch: u32,
}

impl<H: Clone> Registry<H> {
    /// Starts a session of a VM: a new connection, which is a new epoch, or a guest that reset its
    /// device. An earlier session ends. `None` for a VM that is not configured, and after
    /// [`leave`](Self::leave).
    pub fn open_session(&mut self, peer: PeerId, connected: bool) -> Option<SessionId> {
        if self.left {
            return None;
        }
        if let Some(earlier) = self.vms.get(&peer)?.session {
            self.close_session(earlier);
        }
        if connected {
            self.close_window(peer);
        }
        let vm = self.vms.get_mut(&peer)?;
        self.last_session += 1;
        let session = SessionId { peer, number: self.last_session };
        vm.session = Some(session);
        vm.epoch = vm.epoch.wrapping_add(connected.into());
        vm.next_handle = 1;
        vm.next_mapping = 1;
        vm.import = false;
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
        vm.import = false;
        vm.handles.clear();
        vm.events.clear();
        vm.offers.clear();
        vm.looked = None;
        let mut attached: Vec<HandleId> = vm.attachments.keys().copied().collect();
        attached.sort_unstable();
        for handle in attached {
            self.drop_attachment(peer, handle);
        }
        if let Some(vm) = self.vms.get_mut(&peer) {
            // What is being mapped is given up when it is found.
            vm.mapped = 0;
        }
        let own = self.vms.get(&peer).map(|vm| vm.buffers.clone()).unwrap_or_default();
        let ends =
            |key: &BufferKey| self.buffers.get(key).is_some_and(|buffer| buffer.session == session);
        let keys: Vec<BufferKey> = own.into_iter().filter(ends).collect();
        for key in keys {
            self.abandon(key);
        }
        self.tell_peers(peer);
    }

    /// An exporter is gone: nobody has a right to its buffer any more, and its memory lingers as long as
    /// it is used.
    pub(super) fn abandon(&mut self, key: BufferKey) {
        let before = self.host_access(key);
        self.end_waits(key, |waiter| match waiter.holder {
            Holder::Exporter => Some(Status::Canceled),
            Holder::Lease(_) | Holder::Attachment(_) => Some(Status::Revoked),
        });
        self.clear_bits(key, |holder| holder == Holder::Exporter);
        self.revoke_leases(key);
        self.revoke_attachments(key, |_| true);
        let Some(buffer) = self.buffers.get_mut(&key) else { return };
        buffer.grants.clear();
        if matches!(buffer.phase, Phase::Live | Phase::Releasing) {
            buffer.phase = Phase::Lingering;
            if let Some(vm) = self.vms.get_mut(&buffer.owner) {
                vm.lingering += 1;
            }
        } else {
            buffer.phase = Phase::Orphan;
        }
        self.tell_host_offer(key, before);
        self.refresh_offers(key);
        self.settle(key);
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

    /// What to tell the VM next, of what it wants to know.
    pub fn next_event(&mut self, session: SessionId, wants: Wants) -> Option<Event> {
        let peer = session.peer;
        let vm = self.vms.get_mut(&peer).filter(|vm| vm.session == Some(session))?;
        if wants.import && !vm.import {
            vm.import = true;
            self.tell_all(peer);
        }
        let vm = self.vms.get(&peer)?;
        let blank = Event {
            kind: EventKind::Resync,
            handle: None,
            uuid: None,
            size: 0,
            generation: 0,
            peer: None,
            access: Access::NONE,
            metadata_type: 0,
            epoch: vm.epoch,
            topic: None,
            news: vm.news,
        };
        if vm.resync {
            return Some(blank);
        }
        if let Some(other) = vm.peers_changed.first().copied().filter(|_| wants.peers) {
            let epoch = self.epoch(other);
            return Some(Event { kind: EventKind::Peer, peer: Some(other), epoch, ..blank });
        }
        let mut looked = false;
        loop {
            let vm = self.vms.get(&peer)?;
            let Some(topic) = vm.events.first() else {
                if vm.looked.is_some() && !looked {
                    self.look_for_offers(peer);
                    looked = true;
                    continue;
                }
                if vm.looked.is_some() {
                    // Others get the registry in between.
                    self.outbox.wake.insert(peer);
                }
                return None;
            };
            if let Some(event) = self.event_of(peer, topic, blank) {
                return Some(event);
            }
            // It became quiet again before it was told.
            self.vms.get_mut(&peer)?.events.remove(topic);
        }
    }

    /// What is to be told of a topic, if anything.
    fn event_of(&self, peer: PeerId, topic: Topic, blank: Event) -> Option<Event> {
        let vm = self.vms.get(&peer)?;
        let blank = Event { topic: Some(topic), ..blank };
        match topic {
            Topic::Export(key) => {
                let buffer = self.buffers.get(&key)?;
                let kind = buffer.event_kind(vm.import)?;
                let size = if kind == EventKind::Changed { 0 } else { buffer.what.size };
                let (handle, uuid) = (Some(buffer.handle), Some(buffer.uuid));
                Some(Event { kind, handle, uuid, size, generation: buffer.generation, ..blank })
            }
            Topic::Offer(key) => {
                let (kind, access) = self.offer_news(peer, key)?;
                let offer = vm.offers.get(&key)?;
                let (uuid, peer) = (Some(offer.uuid), Some(offer.exporter));
                let event = Event { kind, uuid, peer, access, ..blank };
                let buffer = self.buffers.get(&key).filter(|_| kind == EventKind::Offered);
                Some(buffer.map_or(event, |buffer| Event {
                    size: buffer.what.size,
                    generation: buffer.generation,
                    metadata_type: buffer.what.metadata_type,
                    ..event
                }))
            }
            Topic::Attachment(handle) => {
                let generation = self.attachment_news(peer, handle)?;
                let held = vm.attachments.get(&handle)?;
                let blank = Event { handle: Some(handle), uuid: Some(held.uuid), ..blank };
                Some(match held.revoked {
                    true => Event { kind: EventKind::Revoked, peer: Some(held.exporter), ..blank },
                    false => Event { kind: EventKind::Changed, generation, ..blank },
                })
            }
        }
    }

    /// The event has been delivered.
    pub fn event_told(&mut self, session: SessionId, event: Event) {
        let Ok(vm) = self.vm_mut(session) else { return };
        match (event.kind, event.peer, event.topic) {
            (EventKind::Resync, ..) if vm.news == event.news => {
                vm.resync = false;
                self.retell(session.peer);
            }
            (EventKind::Peer, Some(other), _) if vm.news == event.news => {
                vm.peers_changed.remove(&other);
            }
            (kind, _, Some(topic)) => {
                vm.events.remove(topic);
                self.know(session.peer, topic, kind, event);
            }
            _ => {}
        }
    }

    /// Enters what the VM knows now, and queues what it does not.
    fn know(&mut self, peer: PeerId, topic: Topic, kind: EventKind, event: Event) {
        match topic {
            Topic::Export(key) => self.know_export(key, kind, event.generation),
            Topic::Offer(key) => {
                let told = Some(event.access).filter(|_| kind == EventKind::Offered);
                let (Some(vm), Some(uuid), Some(exporter)) =
                    (self.vms.get_mut(&peer), event.uuid, event.peer)
                else {
                    return;
                };
                // It may have gone away while it was told.
                let blank = Offer { uuid, exporter, told: None };
                vm.offers.entry(key).or_insert(blank).told = told;
                self.refresh_offer(peer, key);
            }
            Topic::Attachment(handle) => {
                let vm = self.vms.get_mut(&peer);
                if let Some(held) = vm.and_then(|vm| vm.attachments.get_mut(&handle)) {
                    match kind {
                        EventKind::Revoked => held.told_revoked = true,
                        _ if !held.revoked => held.told_generation = event.generation,
                        _ => {}
                    }
                }
                self.queue_attachment(peer, handle);
            }
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
            window: vm.is_some_and(|vm| vm.window.is_some()),
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
