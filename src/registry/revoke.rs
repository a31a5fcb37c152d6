//! Attachments that die because a right ended: of the exporter's will, or with its memory. Pure.
//!
//! It does not know why. The importer is told; what is left to it are QUERY, UNMAP and DETACH.

use std::collections::BTreeSet;

use super::buffer::Use;
use super::{Attachment, Audit, Holder, Registry};
use crate::ids::{AttachmentId, BufferKey, HandleId, MappingId, PeerId};
use crate::protocol::Status;

impl<H: Clone> Registry<H> {
    /// Kills the attachments of some importers: they are told, and only UNMAP, DETACH and QUERY are
    /// left to them. The caller settles the buffer.
    pub(super) fn revoke_attachments(&mut self, key: BufferKey, of: impl Fn(PeerId) -> bool) {
        self.revoke_uses(key, |held| of(held.importer));
    }

    pub(super) fn revoke_uses(&mut self, key: BufferKey, of: impl Fn(&Use) -> bool) {
        let Some(buffer) = self.buffers.get_mut(&key) else { return };
        let (gone, kept): (Vec<Use>, Vec<Use>) =
            buffer.attachments.iter().partition(|held| of(held));
        if gone.is_empty() {
            return;
        }
        buffer.attachments = kept;
        let (exporter, uuid, generation) = (buffer.owner, buffer.uuid, buffer.generation);
        let dead: BTreeSet<AttachmentId> = gone.iter().map(|held| held.id).collect();
        let leaves = |holder| matches!(holder, Holder::Attachment(id) if dead.contains(&id));
        self.end_waits(key, |waiter| leaves(waiter.holder).then_some(Status::Revoked));
        self.clear_bits(key, leaves);
        for Use { id, importer, handle, .. } in gone {
            self.hide(importer, id);
            self.outbox.audit.push(Audit::Revoked { importer, exporter, uuid });
            let vm = self.vms.get_mut(&importer);
            if let Some(held) = vm.and_then(|vm| vm.attachments.get_mut(&handle)) {
                (held.revoked, held.told_generation) = (true, generation);
            }
            self.queue_attachment(importer, handle);
            self.refresh_offer(importer, key);
            self.revoke_riders(importer, handle);
        }
    }

    /// An attachment died. What rides on its mappings is seen no longer: those attachments die as well.
    pub(super) fn revoke_riders(&mut self, importer: PeerId, handle: HandleId) {
        let Some(vm) = self.vms.get(&importer) else { return };
        let Some(dead) = vm.attachments.get(&handle) else { return };
        let gone: BTreeSet<MappingId> = dead.mappings.iter().map(|mapping| mapping.id).collect();
        let rides = |held: &&Attachment<H>| {
            held.mappings.iter().any(|one| one.rides.is_some_and(|on| gone.contains(&on)))
        };
        let riders: Vec<(BufferKey, AttachmentId)> =
            vm.attachments.values().filter(rides).map(|held| (held.key, held.id)).collect();
        for (key, id) in riders {
            self.revoke_uses(key, |held: &Use| held.id == id);
            self.settle(key);
        }
    }
}
