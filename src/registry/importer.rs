//! What an importer asks of the registry: ATTACH, DETACH, MAP onto its own pages
//! (spec "ATTACH and DETACH", "MAP and UNMAP"). Pure.
//!
//! It does not know how pages are found: between `begin_map` and `finish_map` somebody else does.

use std::time::Duration;

use uuid::Uuid;

use super::buffer::Use;
use super::{Audit, HandleState, Holder, Phase, Registry, Topic};
use crate::ids::{
    Access, AttachmentId, BufferKey, HandleId, MappingId, PeerId, PlaceId, SessionId,
};
use crate::limits::{
    GRANULE, MAX_ATTACHMENTS, MAX_COPY_MAPPINGS, MAX_MAPPED, MAX_MISSES_PER_SECOND,
};
use crate::policy::Allowed;
use crate::protocol::{Mode, NAME_LEN, State, Status};

/// A VM's use of another VM's buffer, as its importer knows it. A dead one has left its buffer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attachment<H> {
    pub(super) id: AttachmentId,
    pub(super) key: BufferKey,
    pub(super) uuid: Uuid,
    pub(super) exporter: PeerId,
    pub(super) size: u64,
    pub(super) access: Access,
    /// Since the daemon's start.
    pub(super) since: Duration,
    /// ZERO_COPY: in the window it sees the exporter's own pages.
    pub(super) mode: Mode,
    /// Dead: only QUERY, UNMAP and DETACH work.
    pub(super) revoked: bool,
    pub(super) told_revoked: bool,
    /// What the importer knows of the content; of a dead one, what it was at last.
    pub(super) told_generation: u64,
    pub(super) mappings: Vec<Mapping<H>>,
}

/// A range of a buffer on the importer's own pages, or in its window.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mapping<H> {
    pub(super) id: MappingId,
    /// Bytes into the buffer.
    pub(super) offset: u64,
    /// Bytes.
    pub(super) len: u64,
    pub(super) access: Access,
    /// What SYNC copies to: the importer's pages, or a copy in the window.
    pub(super) target: Option<H>,
    /// Where in the window.
    pub(super) place: Option<PlaceId>,
    /// The mapping of its pool that shows it.
    pub(super) rides: Option<MappingId>,
}

/// ATTACH.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttachRequest {
    /// What the importer names.
    pub uuid: Uuid,
    /// What it wants to do, not nothing.
    pub access: Access,
    /// ACCESS rather than a copy.
    pub zero_copy: bool,
    /// The driver can map into the window.
    pub window: bool,
}

/// Answer to ATTACH.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Attached {
    pub handle: HandleId,
    pub size: u64,
    pub generation: u64,
    pub access: Access,
    pub exporter: PeerId,
    pub mode: Mode,
    pub name: [u8; NAME_LEN],
    pub metadata_type: u32,
    pub metadata: Box<[u8]>,
}

/// MAP with F_COPY.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MapRequest {
    /// The attachment.
    pub handle: HandleId,
    /// Bytes into the buffer.
    pub offset: u64,
    /// Bytes, not 0.
    pub len: u64,
    /// What SYNC copies: READ in, WRITE back.
    pub access: Access,
}

/// Leave to find the pages of one mapping; its place is charged. Give it to
/// [`Registry::finish_map`], whatever came of it.
#[must_use = "the mapping stays charged until finish_map"]
#[derive(Debug)]
pub struct MapTicket {
    session: SessionId,
    request: MapRequest,
}

impl<H: Clone> Registry<H> {
    /// What a VM may attach the buffer for: the exporter's grant AND the operator's policy.
    pub(super) fn peer_access(&self, key: BufferKey, peer: PeerId) -> Access {
        let Some(buffer) = self.buffers.get(&key).filter(|buffer| buffer.phase == Phase::Live)
        else {
            return Access::NONE;
        };
        let granted = buffer.grant(peer).map_or(Access::NONE, |grant| grant.access);
        match self.policy.allows(buffer.owner, peer) {
            Allowed::No => Access::NONE,
            Allowed::ReadOnly => granted.intersect(Access::READ),
            Allowed::Yes => granted,
        }
    }

    /// ATTACH.
    ///
    /// NOENT where there is no such buffer or no right to it, whichever; BUSY after too many of
    /// these; ACCESS where there is a right, but not for this; QUOTA above the VM's attachments.
    pub fn attach(
        &mut self,
        session: SessionId,
        request: AttachRequest,
        now: Duration,
    ) -> Result<Attached, Status> {
        let judged = self.judge_attach(session, request, now);
        let (key, uuid, importer) = match judged {
            Ok(key) => (key, request.uuid, session.peer),
            Err(status) => {
                let (importer, uuid) = (session.peer, request.uuid);
                self.outbox.audit.push(Audit::Denied { importer, uuid, status });
                return Err(status);
            }
        };
        let before = self.host_access(key);
        let mode = self.attach_mode(key, session, &request);
        self.last_attachment += 1;
        let id = AttachmentId(self.last_attachment);
        let vm = self.vms.get_mut(&importer).ok_or(Status::Revoked)?;
        let buffer = self.buffers.get_mut(&key).ok_or(Status::NoEnt)?;
        let handle = vm.new_handle();
        let attachment = Attachment {
            id,
            key,
            uuid,
            exporter: buffer.owner,
            size: buffer.what.size,
            access: request.access,
            since: now,
            mode,
            revoked: false,
            told_revoked: false,
            told_generation: buffer.generation,
            mappings: Vec::new(),
        };
        vm.attachments.insert(handle, attachment);
        let shares = mode == Mode::ZeroCopy;
        buffer.attachments.push(Use { id, importer, handle, shares });
        buffer.use_up_grant(importer);
        let exporter = buffer.owner;
        let answer = Attached {
            handle,
            size: buffer.what.size,
            generation: buffer.generation,
            access: request.access,
            exporter,
            mode,
            name: buffer.what.name,
            metadata_type: buffer.what.metadata_type,
            metadata: buffer.what.metadata.clone(),
        };
        let access = request.access;
        self.outbox.audit.push(Audit::Attached { importer, exporter, uuid, access });
        self.tell_host_offer(key, before);
        self.refresh_offers(key);
        self.settle(key);
        Ok(answer)
    }

    fn judge_attach(
        &mut self,
        session: SessionId,
        request: AttachRequest,
        now: Duration,
    ) -> Result<BufferKey, Status> {
        let vm = self.vm_mut(session)?;
        if now.saturating_sub(vm.misses_since) >= Duration::from_secs(1) {
            (vm.misses, vm.misses_since) = (0, now);
        }
        if vm.misses >= MAX_MISSES_PER_SECOND {
            return Err(Status::Busy);
        }
        let found = self.by_uuid.get(&request.uuid).copied();
        let granted = found.map(|key| (key, self.peer_access(key, session.peer)));
        let Some((key, granted)) = granted.filter(|(_, access)| !access.is_none()) else {
            self.vm_mut(session)?.misses += 1;
            return Err(Status::NoEnt);
        };
        let copies = self.attach_mode(key, session, &request) == Mode::Copy;
        if !granted.contains(request.access) || (request.zero_copy && copies) {
            return Err(Status::Access);
        }
        if self.vm(session)?.attachments.len() >= MAX_ATTACHMENTS as usize {
            return Err(Status::Quota);
        }
        Ok(key)
    }

    /// Who may write sees the exporter's own pages, if its VMM can show them. A VMM does not make sure
    /// that its guest only reads what it maps, so who may only read gets a copy.
    fn attach_mode(&self, key: BufferKey, session: SessionId, request: &AttachRequest) -> Mode {
        let window = self.vm(session).is_ok_and(|vm| vm.window.is_some()) && request.window;
        let shared = self.buffers.get(&key);
        let shared = shared.is_some_and(|buffer| buffer.mode == Mode::ZeroCopy && buffer.shows);
        if window && shared && request.access == Access::ALL { Mode::ZeroCopy } else { Mode::Copy }
    }

    /// DETACH. BUSY while a living attachment has mappings; a dead one loses them by it.
    pub fn detach(&mut self, session: SessionId, handle: HandleId) -> Result<(), Status> {
        let attachment = self.vm(session)?.attachments.get(&handle).ok_or(Status::NoEnt)?;
        let mapped =
            !attachment.mappings.is_empty() || self.is_being_mapped(session.peer, attachment.id);
        if !attachment.revoked && mapped {
            return Err(Status::Busy);
        }
        self.drop_attachment(session.peer, handle);
        Ok(())
    }

    /// Forgets an attachment, with its mappings, and leaves its buffer.
    pub(super) fn drop_attachment(&mut self, importer: PeerId, handle: HandleId) {
        let Some(vm) = self.vms.get_mut(&importer) else { return };
        let Some(gone) = vm.attachments.remove(&handle) else { return };
        vm.events.remove(Topic::Attachment(handle));
        for mapping in gone.mappings {
            vm.mappings.remove(&mapping.id);
            vm.mapped = vm.mapped.saturating_sub(mapping.place.is_none().into());
            self.outbox.drop.extend(mapping.target);
        }
        self.hide(importer, gone.id);
        if gone.revoked {
            return;
        }
        let leaves = |holder| holder == Holder::Attachment(gone.id);
        self.end_waits(gone.key, |waiter| leaves(waiter.holder).then_some(Status::Canceled));
        self.clear_bits(gone.key, leaves);
        if let Some(buffer) = self.buffers.get_mut(&gone.key) {
            buffer.attachments.retain(|held| held.id != gone.id);
        }
        self.refresh_offer(importer, gone.key);
        self.settle(gone.key);
    }

    /// Queues what is to be told of an attachment.
    pub(super) fn queue_attachment(&mut self, importer: PeerId, handle: HandleId) {
        if self.attachment_news(importer, handle).is_none() {
            return;
        }
        let Some(vm) = self.vms.get_mut(&importer).filter(|vm| vm.import) else { return };
        if vm.events.push(Topic::Attachment(handle)) {
            self.outbox.wake.insert(importer);
        }
    }

    /// What a VM does not know of its attachment: that it is dead, or another generation.
    pub(super) fn attachment_news(&self, importer: PeerId, handle: HandleId) -> Option<u64> {
        let held = self.vms.get(&importer)?.attachments.get(&handle)?;
        if held.revoked {
            return (!held.told_revoked).then_some(held.told_generation);
        }
        let generation = self.buffers.get(&held.key)?.generation;
        (generation != held.told_generation).then_some(generation)
    }

    /// QUERY of an attachment.
    pub(super) fn query_attachment(
        &self,
        session: SessionId,
        handle: HandleId,
    ) -> Result<HandleState, Status> {
        let held = self.vm(session)?.attachments.get(&handle).ok_or(Status::NoEnt)?;
        let buffer = self.buffers.get(&held.key).filter(|_| !held.revoked);
        Ok(HandleState {
            state: match () {
                () if held.revoked => State::Revoked,
                () if held.mappings.is_empty() => State::Attached,
                () => State::Mapped,
            },
            use_count: 0,
            nr_mappings: u32::try_from(held.mappings.len()).unwrap_or(u32::MAX),
            access: held.access,
            size: held.size,
            generation: buffer.map_or(held.told_generation, |buffer| buffer.generation),
            uuid: held.uuid,
        })
    }

    /// Judges a MAP with F_COPY and charges it; `misaligned` says that the pages' addresses are.
    pub fn begin_map(
        &mut self,
        session: SessionId,
        request: MapRequest,
        misaligned: bool,
    ) -> Result<MapTicket, Status> {
        let held = self.vm(session)?.attachments.get(&request.handle).ok_or(Status::NoEnt)?;
        if held.revoked {
            return Err(Status::Revoked);
        }
        if !held.access.contains(request.access) {
            return Err(Status::Access);
        }
        let end = request.offset.checked_add(request.len).ok_or(Status::Range)?;
        let aligned = (request.offset | request.len).is_multiple_of(GRANULE) && !misaligned;
        if !aligned || end > held.size {
            return Err(Status::Range);
        }
        let vm = self.vm_mut(session)?;
        let bytes = vm.bytes_mapped().saturating_add(request.len);
        if vm.mapped >= MAX_COPY_MAPPINGS || bytes > vm.quota.max_total_size.max(MAX_MAPPED) {
            return Err(Status::Quota);
        }
        vm.mapped += 1;
        Ok(MapTicket { session, request })
    }

    /// Enters the pages that were found, or undoes the charge where none were, or the attachment died.
    pub fn finish_map(
        &mut self,
        ticket: MapTicket,
        found: Result<H, Status>,
    ) -> Result<MappingId, Status> {
        let MapTicket { session, request } = ticket;
        let alive = self.vm(session).and_then(|vm| {
            let held = vm.attachments.get(&request.handle).ok_or(Status::NoEnt)?;
            if held.revoked { Err(Status::Revoked) } else { Ok(()) }
        });
        let target = match (alive, found) {
            (Ok(()), Ok(target)) => target,
            (alive, found) => {
                let status = found.as_ref().err().copied().or(alive.err());
                self.outbox.drop.extend(found.ok());
                // Another session counts anew.
                if let Ok(vm) = self.vm_mut(session) {
                    vm.mapped = vm.mapped.saturating_sub(1);
                }
                return Err(status.unwrap_or(Status::Io));
            }
        };
        let vm = self.vm_mut(session)?;
        let id = MappingId(vm.next_mapping);
        vm.next_mapping += 1;
        vm.mappings.insert(id, request.handle);
        if let Some(held) = vm.attachments.get_mut(&request.handle) {
            let MapRequest { offset, len, access, .. } = request;
            let target = Some(target);
            held.mappings.push(Mapping {
                id,
                offset,
                len,
                access,
                target,
                place: None,
                rides: None,
            });
        }
        Ok(id)
    }
}
