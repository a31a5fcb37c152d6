//! What importers are told of grants: OFFERED and WITHDRAWN as level state (spec "Events"). Pure.
//!
//! It knows what a VM was told and what holds now, not how it is told.

use std::ops::Bound;

use uuid::Uuid;

use super::{EventKind, Registry, Topic};
use crate::ids::{Access, BufferKey, HandleId, PeerId};
use crate::limits::LOOKED_AT;

/// A buffer that a VM may attach, or was told that it may.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Offer {
    pub(super) uuid: Uuid,
    pub(super) exporter: PeerId,
    /// What the VM was told last; `None`: nothing, or that it went away.
    pub(super) told: Option<Access>,
}

impl<H: Clone> Registry<H> {
    /// What is to be told of an offer, and the access that holds now.
    pub(super) fn offer_news(&self, peer: PeerId, key: BufferKey) -> Option<(EventKind, Access)> {
        let told = self.vms.get(&peer)?.offers.get(&key)?.told;
        let now = self.peer_access(key, peer);
        if !now.is_none() {
            return (told != Some(now)).then_some((EventKind::Offered, now));
        }
        // Who attached meanwhile has what was offered, as long as the exporter leaves it on offer.
        let open = |key| self.buffers.get(&key).filter(|b| b.phase == super::Phase::Live);
        let kept = open(key).is_some_and(|buffer| buffer.attached(peer));
        (told.is_some() && !kept).then_some((EventKind::Withdrawn, now))
    }

    /// Compares what one VM was told of one buffer with what holds now.
    pub(super) fn refresh_offer(&mut self, peer: PeerId, key: BufferKey) {
        let now = self.peer_access(key, peer);
        let buffer = self.buffers.get(&key);
        let Some(vm) = self.vms.get_mut(&peer).filter(|vm| vm.import) else { return };
        match vm.offers.get(&key) {
            None if now.is_none() => return,
            None => {
                let Some(buffer) = buffer else { return };
                let (uuid, exporter) = (buffer.uuid, buffer.owner);
                vm.offers.insert(key, Offer { uuid, exporter, told: None });
            }
            Some(offer) if now.is_none() && offer.told.is_none() => {
                vm.offers.remove(&key);
                vm.events.remove(Topic::Offer(key));
                return;
            }
            Some(_) => {}
        }
        if self.offer_news(peer, key).is_none() {
            return;
        }
        if self.vms.get_mut(&peer).is_some_and(|vm| vm.events.push(Topic::Offer(key))) {
            self.outbox.wake.insert(peer);
        }
    }

    /// As [`refresh_offer`](Self::refresh_offer), for every VM.
    pub(super) fn refresh_offers(&mut self, key: BufferKey) {
        if self.buffers.contains_key(&key) && !self.granted.contains(&key) {
            return;
        }
        let peers: Vec<PeerId> =
            self.vms.iter().filter(|(_, vm)| vm.import).map(|(peer, _)| *peer).collect();
        for peer in peers {
            self.refresh_offer(peer, key);
        }
    }

    /// A driver has come that wants to hear what importers hear: everything is new to it.
    pub(super) fn tell_all(&mut self, peer: PeerId) {
        let Some(vm) = self.vms.get(&peer) else { return };
        let mut own: Vec<BufferKey> = vm.handles.values().copied().collect();
        own.sort_unstable();
        for key in own {
            self.queue_export(key);
        }
        self.retell(peer);
    }

    /// A VM missed something: every live offer and every dead attachment is told to it again.
    pub(super) fn retell(&mut self, peer: PeerId) {
        let Some(vm) = self.vms.get_mut(&peer).filter(|vm| vm.import) else { return };
        for held in vm.attachments.values_mut() {
            held.told_revoked = false;
        }
        let mut attached: Vec<HandleId> = vm.attachments.keys().copied().collect();
        attached.sort_unstable();
        vm.looked = Some(BufferKey(0));
        for handle in attached {
            self.queue_attachment(peer, handle);
        }
        self.look_for_offers(peer);
    }

    /// Looks at some more of what was ever granted to VMs, for offers that are to be told again. All
    /// VMs together may have offered more than one of them can be told while the others wait.
    pub(super) fn look_for_offers(&mut self, peer: PeerId) {
        let Some(from) = self.vms.get(&peer).and_then(|vm| vm.looked) else { return };
        let later = self.granted.range((Bound::Excluded(from), Bound::Unbounded));
        let some: Vec<BufferKey> = later.copied().take(LOOKED_AT).collect();
        for key in &some {
            let live = !self.peer_access(*key, peer).is_none();
            let offer = self.vms.get_mut(&peer).and_then(|vm| vm.offers.get_mut(key));
            if let Some(offer) = offer.filter(|_| live) {
                offer.told = None;
            }
            self.refresh_offer(peer, *key);
        }
        if let Some(vm) = self.vms.get_mut(&peer) {
            vm.looked = some.last().copied().filter(|_| some.len() == LOOKED_AT);
        }
    }
}
