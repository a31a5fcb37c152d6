//! MAP into the window: what is shown where, for whom, and until when (spec "MAP and UNMAP"). Pure.
//!
//! It does not know how a VMM is asked. Between `next_for_vmm` and `vmm_answered` somebody else asks it; what
//! a VMM was asked to show counts as in use until it says that it no longer does, or its connection is
//! over, and after that until nobody refers to it.

use std::time::Duration;

use super::{Foreign, Mapping, Registry, Settled};
use crate::ids::{
    Access, AttachmentId, BufferKey, FileId, HandleId, MappingId, PeerId, PlaceId, SessionId,
    WindowId, WindowRange,
};
use crate::limits::MAX_MAPPED;
use crate::protocol::{Mode, Status};
use crate::window::{Outcome, Place, Todo, Window};

/// MAP without F_COPY.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WindowRequest {
    /// The attachment.
    pub handle: HandleId,
    /// Bytes into the buffer.
    pub offset: u64,
    /// Where to.
    pub range: WindowRange,
    /// In COPY mode, what SYNC copies: READ in, WRITE back.
    pub access: Access,
}

/// Leave to find what a mapping shows. Give it to [`Registry::finish_window`].
#[must_use = "nothing is mapped before finish_window"]
#[derive(Debug)]
pub struct WindowTicket {
    session: SessionId,
    attachment: AttachmentId,
    request: WindowRequest,
    /// The exporter's own pages are shown.
    key: Option<BufferKey>,
}

/// What a place of a window shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shown<H> {
    /// The memory.
    pub memory: H,
    /// The buffer whose own pages they are; `None`: a copy for this mapping alone.
    pub(super) key: Option<BufferKey>,
    attachment: AttachmentId,
    session: SessionId,
    mapping: MappingId,
    request: WindowRequest,
}

impl<H> Shown<H> {
    /// It is a copy for one mapping alone.
    pub fn is_copy(&self) -> bool {
        self.key.is_none()
    }
}

/// What a VMM said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Answer {
    Mapped {
        place: PlaceId,
        done: bool,
    },
    Unmapped {
        place: PlaceId,
        done: bool,
    },
    NotAsked {
        place: PlaceId,
    },
    /// To the barrier.
    Settled {
        place: PlaceId,
    },
    /// Nothing, and it never will.
    Broken,
}

impl<H: Clone> Registry<H> {
    /// The VM's VMM can map: its window is so large.
    pub fn open_window(&mut self, peer: PeerId, size: u64) -> WindowId {
        self.close_window(peer);
        self.last_place += 1;
        let id = WindowId(self.last_place);
        if let Some(vm) = self.vms.get_mut(&peer) {
            vm.window = Some((id, Window::new(size, vm.regions)));
        }
        id
    }

    /// The connection to the VM's VMM is over. That proves nothing of what it showed.
    pub fn close_window(&mut self, peer: PeerId) {
        let Some(vm) = self.vms.get_mut(&peer) else { return };
        let Some((_, window)) = vm.window.take() else { return };
        let shown: Vec<Shown<H>> = window.places().map(|(_, place)| place.what.clone()).collect();
        for what in shown {
            self.hidden(what, true);
        }
    }

    /// Mappings in the window that the VM's VMM can hold; `None` where it can map nothing.
    pub fn max_window(&self, peer: PeerId) -> Option<u32> {
        self.vms.get(&peer)?.window.as_ref().map(|(_, window)| window.max())
    }

    /// The VM has a table of these regions: which files they show, from which byte on, how many bytes.
    pub fn memory_changed(&mut self, peer: PeerId, regions: &[(FileId, u64, u64)]) {
        let Some(vm) = self.vms.get_mut(&peer) else { return };
        vm.regions = regions.len();
        let Some((_, window)) = &mut vm.window else { return };
        let (outcomes, changed) = window.memory(regions);
        for outcome in outcomes {
            self.conclude(peer, outcome);
        }
        if changed {
            self.resync(peer);
        }
        self.outbox.vmm.insert(peer);
    }

    /// Judges a MAP into the window. Returns the memory to show where it is the exporter's own; else
    /// what is shown is to be made.
    ///
    /// UNSUPP where the VM has no window.
    pub fn begin_window(
        &self,
        session: SessionId,
        request: WindowRequest,
    ) -> Result<(WindowTicket, Option<H>), Status> {
        let (vm, window, held) = self.judge_window(session, &request)?;
        let len = request.range.len;
        window.check(request.range)?;
        let attachment = held.id;
        let ticket = |key| WindowTicket { session, attachment, request, key };
        if held.mode == Mode::ZeroCopy {
            let memory = self.buffers.get(&held.key).and_then(|buffer| buffer.backing.clone());
            return Ok((ticket(Some(held.key)), Some(memory.ok_or(Status::Revoked)?)));
        }
        if vm.bytes_mapped().saturating_add(len) > vm.quota.max_total_size.max(MAX_MAPPED) {
            return Err(Status::Quota);
        }
        Ok((ticket(None), None))
    }

    /// Enters what was found. `token` is the device's number for the chain:
    /// [`Outbox::settled`](super::Outbox::settled) will tell.
    pub fn finish_window(
        &mut self,
        ticket: WindowTicket,
        found: Result<(H, FileId), Status>,
        token: u64,
    ) -> Result<(), Status> {
        let WindowTicket { session, attachment, request, key } = ticket;
        let alive = self.vm(session).and_then(|vm| {
            let held = vm.attachments.get(&request.handle).ok_or(Status::NoEnt)?;
            if held.revoked { Err(Status::Revoked) } else { Ok(()) }
        });
        let (memory, file) = match (alive, found) {
            (Ok(()), Ok(found)) => found,
            (alive, found) => {
                let status = found.as_ref().err().copied().or(alive.err());
                self.outbox.drop.extend(found.ok().map(|(memory, _)| memory));
                return Err(status.unwrap_or(Status::Io));
            }
        };
        self.last_place += 1;
        let place = PlaceId(self.last_place);
        let vm = self.vm_mut(session)?;
        let mapping = MappingId(vm.next_mapping);
        vm.next_mapping += 1;
        let what = Shown { memory, key, attachment, session, mapping, request };
        // A copy is a file of its own.
        let start = if key.is_some() { request.offset } else { 0 };
        let writable = key.is_some() || request.access.write;
        let Some((_, window)) = &mut vm.window else {
            self.outbox.drop.push(what.memory);
            return Err(Status::Unsupp);
        };
        window.ask(place, Place::new(request.range, (file, start), writable, token, what));
        if let Some(buffer) = key.and_then(|key| self.buffers.get_mut(&key)) {
            buffer.shown += 1;
            buffer.last_place = Some(place);
        }
        self.outbox.vmm.insert(session.peer);
        Ok(())
    }

    /// UNMAP. True where it is done; else [`Outbox::settled`](super::Outbox::settled) will tell under
    /// this token.
    pub fn unmap(
        &mut self,
        session: SessionId,
        mapping: MappingId,
        token: u64,
    ) -> Result<bool, Status> {
        let vm = self.vm_mut(session)?;
        let handle = *vm.mappings.get(&mapping).ok_or(Status::NoEnt)?;
        let held = vm.attachments.get(&handle).ok_or(Status::NoEnt)?;
        let place = held.mappings.iter().find(|one| one.id == mapping).and_then(|one| one.place);
        if !held.revoked && vm.carries(mapping) {
            return Err(Status::Busy);
        }
        if let (Some(place), Some((_, window))) = (place, &mut vm.window)
            && window.unmap(place, token)?
        {
            self.outbox.vmm.insert(session.peer);
            return Ok(false);
        }
        self.forget_mapping(session, mapping);
        Ok(true)
    }

    /// Takes a mapping from its attachment.
    fn forget_mapping(&mut self, session: SessionId, mapping: MappingId) {
        let Ok(vm) = self.vm_mut(session) else { return };
        let Some(handle) = vm.mappings.remove(&mapping) else { return };
        let Some(held) = vm.attachments.get_mut(&handle) else { return };
        let Some(at) = held.mappings.iter().position(|other| other.id == mapping) else { return };
        let gone = held.mappings.swap_remove(at);
        vm.mapped = vm.mapped.saturating_sub(gone.place.is_none().into());
        self.outbox.drop.extend(gone.target);
    }

    fn places_of(&self, peer: PeerId, attachment: AttachmentId) -> Vec<(PlaceId, bool)> {
        let window = self.vms.get(&peer).and_then(|vm| vm.window.as_ref());
        let places = window.into_iter().flat_map(|(_, window)| window.places());
        let places = places.filter(|(_, place)| place.what.attachment == attachment);
        places.map(|(id, place)| (id, place.waits())).collect()
    }

    /// Whether a MAP of the attachment waits for the VMM.
    pub(super) fn is_being_mapped(&self, peer: PeerId, attachment: AttachmentId) -> bool {
        self.places_of(peer, attachment).iter().any(|(_, waits)| *waits)
    }

    /// The importer may not see the attachment any more: its VMM is asked to unmap it as soon as it may
    /// be asked.
    pub(super) fn hide(&mut self, peer: PeerId, attachment: AttachmentId) {
        for (id, _) in self.places_of(peer, attachment) {
            let window = self.vms.get_mut(&peer).and_then(|vm| vm.window.as_mut());
            let Some((_, window)) = window else { return };
            let (map, never_shown) = window.kill(id);
            self.settled(peer, map, Status::Revoked, None);
            if let Some(what) = never_shown {
                self.hidden(what, false);
            }
            self.outbox.vmm.insert(peer);
        }
    }

    /// What the VMM is to be asked next, if anything; it counts as asked.
    pub fn next_for_vmm(
        &mut self,
        peer: PeerId,
        id: WindowId,
        now: Duration,
    ) -> Option<Todo<Shown<H>>> {
        self.window(peer, id)?.next(now)
    }

    /// When there is something to ask by time alone.
    pub fn vmm_deadline(&self, peer: PeerId, id: WindowId) -> Option<Duration> {
        let (now, window) = self.vms.get(&peer)?.window.as_ref()?;
        window.deadline().filter(|_| *now == id)
    }

    /// The VMM answered. What comes after it was given up changes nothing: it may show it, or not.
    pub fn vmm_answered(&mut self, peer: PeerId, id: WindowId, answer: Answer, now: Duration) {
        let Some(window) = self.window(peer, id).filter(|window| !window.is_broken()) else {
            return;
        };
        let max = window.max();
        let outcomes = match answer {
            Answer::Mapped { place, done } => vec![window.mapped(place, done, now)],
            Answer::Unmapped { place, done } => window.unmapped(place, done),
            Answer::NotAsked { place } => vec![window.not_asked(place)],
            Answer::Settled { place } => vec![window.settled(place)],
            Answer::Broken => window.fail(),
        };
        let changed = window.max() != max;
        for outcome in outcomes {
            self.conclude(peer, outcome);
        }
        if changed {
            self.resync(peer);
        }
    }

    /// The window of this connection, if it is not over.
    fn window(&mut self, peer: PeerId, id: WindowId) -> Option<&mut Window<Shown<H>>> {
        let (now, window) = self.vms.get_mut(&peer)?.window.as_mut()?;
        (*now == id).then_some(window)
    }

    fn settled(
        &mut self,
        peer: PeerId,
        token: Option<u64>,
        status: Status,
        mapping: Option<MappingId>,
    ) {
        if let Some(token) = token {
            self.outbox.settled.push(Settled { peer, token, status, mapping });
            self.outbox.wake.insert(peer);
        }
    }

    fn conclude(&mut self, peer: PeerId, outcome: Outcome<Shown<H>>) {
        match outcome {
            Outcome::Nothing | Outcome::Shown { map: None, .. } => {}
            Outcome::Shown { map, what } => {
                let Shown { memory, key, session, mapping, request, .. } = what;
                let place = self.place_of(peer, mapping, session);
                let target = key.is_none().then_some(memory);
                let WindowRequest { handle, offset, range, access } = request;
                let Ok(vm) = self.vm_mut(session) else { return };
                let Some(held) = vm.attachments.get_mut(&handle) else { return };
                let (len, rides) = (range.len, None);
                held.mappings.push(Mapping {
                    id: mapping,
                    offset,
                    len,
                    access,
                    target,
                    place,
                    rides,
                });
                vm.mappings.insert(mapping, handle);
                self.settled(peer, map, Status::Ok, Some(mapping));
            }
            Outcome::Gone { map, unmap, what } => {
                self.settled(peer, map, Status::Io, None);
                if unmap.is_some() {
                    self.forget_mapping(what.session, what.mapping);
                    self.settled(peer, unmap, Status::Ok, None);
                }
                self.hidden(what, true);
            }
            Outcome::Stays { failed } => {
                for token in failed {
                    self.settled(peer, Some(token), Status::Io, None);
                }
            }
        }
    }

    fn place_of(&self, peer: PeerId, mapping: MappingId, session: SessionId) -> Option<PlaceId> {
        let (_, window) = self.vms.get(&peer)?.window.as_ref()?;
        let is = |what: &Shown<H>| what.mapping == mapping && what.session == session;
        window.places().find(|(_, place)| is(&place.what)).map(|(id, _)| id)
    }

    /// A place is no more. Where a VMM had it, others may hold the memory now.
    fn hidden(&mut self, what: Shown<H>, was_out: bool) {
        self.outbox.drop.push(what.memory);
        let Some(key) = what.key else { return };
        let Some(buffer) = self.buffers.get_mut(&key) else { return };
        buffer.shown = buffer.shown.saturating_sub(1);
        if was_out && buffer.observable {
            buffer.foreign = Foreign::Possible;
        }
        if buffer.may_be_looked_at() {
            self.outbox.observe.insert(key);
        }
        self.settle(key);
    }
}
