//! What BEGIN and END copy: between an exporter's pages, a private copy and the pages of importers
//! (spec "SYNC", "MAP and UNMAP"). Pure.
//!
//! It does not know how bytes are copied: until `finish_copy` somebody else copies them.

use super::access::check;
use super::sync::copies;
use super::{Buffer, Ended, Holder, Mapping, Phase, Registry, SyncRequest};
use crate::ids::{Access, BufferKey, ClientId, HandleId, SessionId};
use crate::protocol::{Mode, Status};

/// Bytes to copy, one move after the other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Copy<H> {
    /// From where to where.
    pub moves: Vec<Move<H>>,
}

impl<H> Copy<H> {
    /// Bytes of all moves.
    pub fn bytes(&self) -> u64 {
        self.moves.iter().fold(0, |sum, one| sum.saturating_add(one.len))
    }
}

/// Bytes to copy from one place to another.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Move<H> {
    pub from: Place<H>,
    pub to: Place<H>,
    /// Bytes.
    pub len: u64,
}

/// Where bytes are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place<H> {
    /// In which memory.
    pub memory: H,
    /// In which view of it.
    pub view: View,
    /// Bytes from its start.
    pub offset: u64,
}

/// The two sides of a buffer's memory, which are one in ZERO_COPY mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum View {
    /// The pages of the VM that lends them.
    Pages,
    /// What consumers see.
    Content,
}

/// Leave to copy. Give it to [`Registry::finish_copy`], whatever came of it.
#[must_use = "the pages count as in use until finish_copy"]
#[derive(Debug)]
pub struct CopyTicket {
    key: BufferKey,
    holder: Holder,
    writer: Option<ClientId>,
    bits: Access,
    /// It belongs to a BEGIN, which completes nothing.
    begins: bool,
}

impl<H: Clone> Registry<H> {
    /// What a BEGIN that was granted has to copy to the holder's own pages before it is answered.
    /// REVOKED where that is no longer possible.
    pub fn fill(
        &mut self,
        session: SessionId,
        handle: HandleId,
        request: &SyncRequest,
    ) -> Result<Option<(CopyTicket, Copy<H>)>, Status> {
        let (key, holder, allowed) = self.holder(session, handle)?;
        if !copies(holder, request.bits) {
            return Ok(None);
        }
        let judge = |buffer: &Buffer<H>| {
            let len = check(buffer, allowed, request)?;
            let content = buffer.backing.clone().filter(|_| buffer.has_content_for(holder));
            Ok((len, content.ok_or(Status::Revoked)?))
        };
        let judged = self.buffers.get(&key).ok_or(Status::Revoked).and_then(judge);
        let (len, content) = match judged {
            Ok(judged) => judged,
            Err(status) => {
                self.change_bits(key, |sync| sync.copied(holder, request.bits, false));
                return Err(status);
            }
        };
        let moves = self.moves(session, handle, (request.offset, len), |mapping| {
            mapping.access.read.then(|| (content.clone(), View::Content))
        });
        if moves.is_empty() {
            self.change_bits(key, |sync| sync.copied(holder, request.bits, true));
            return Ok(None);
        }
        if let Some(buffer) = self.buffers.get_mut(&key) {
            buffer.copies += 1;
        }
        let ticket = CopyTicket { key, holder, writer: None, bits: request.bits, begins: true };
        Ok(Some((ticket, Copy { moves })))
    }

    /// The moves into an attachment's mappings, of a range of the buffer, from where `source` says.
    fn moves(
        &self,
        session: SessionId,
        handle: HandleId,
        (offset, len): (u64, u64),
        source: impl Fn(&Mapping<H>) -> Option<(H, View)>,
    ) -> Vec<Move<H>> {
        let held = self.vm(session).ok().and_then(|vm| vm.attachments.get(&handle));
        let mappings = held.map_or(&[][..], |held| &held.mappings);
        let into = |mapping: &Mapping<H>| {
            let (memory, view) = source(mapping)?;
            let from = offset.max(mapping.offset);
            let end = (offset + len).min(mapping.offset + mapping.len);
            let len = end.checked_sub(from).filter(|len| *len > 0)?;
            let target = mapping.target.clone()?;
            let to = Place { memory: target, view: View::Pages, offset: from - mapping.offset };
            Some(Move { from: Place { memory, view, offset: from }, to, len })
        };
        mappings.iter().filter_map(into).collect()
    }

    /// END of an export or attachment.
    pub fn end_handle(
        &mut self,
        session: SessionId,
        handle: HandleId,
        request: SyncRequest,
    ) -> Result<Ended<H>, Status> {
        let (key, holder, allowed) = self.holder(session, handle)?;
        if holder == Holder::Exporter || !request.bits.write {
            return self.end(key, holder, allowed, request, None);
        }
        let buffer = self.buffers.get(&key).ok_or(Status::NoEnt)?;
        // The loan ends with the last copy in progress, so no further one may begin, but for who
        // sees the pages anyway.
        let live = buffer.phase == Phase::Live || buffer.shares(holder);
        let backing = buffer.backing.clone().filter(|_| live).ok_or(Status::Revoked)?;
        let len = check(buffer, allowed, &request)?;
        let mode = buffer.mode;
        let mut moves = self.moves(session, handle, (request.offset, len), |mapping| {
            mapping.access.write.then(|| (backing.clone(), View::Content))
        });
        for one in &mut moves {
            std::mem::swap(&mut one.from, &mut one.to);
        }
        if mode == Mode::Copy {
            let on = |one: &Move<H>| {
                let to = Place { view: View::Pages, ..one.to.clone() };
                Move { from: one.to.clone(), to, len: one.len }
            };
            let further: Vec<_> = moves.iter().map(on).collect();
            moves.extend(further);
        }
        if moves.is_empty() {
            return Ok(Ended::Now(self.complete(key, holder, None, request.bits)));
        }
        Ok(self.start_copy(key, holder, None, request.bits, Copy { moves }))
    }

    pub(super) fn start_copy(
        &mut self,
        key: BufferKey,
        holder: Holder,
        writer: Option<ClientId>,
        bits: Access,
        copy: Copy<H>,
    ) -> Ended<H> {
        if let Some(buffer) = self.buffers.get_mut(&key) {
            buffer.copies += 1;
        }
        Ended::Copy(CopyTicket { key, holder, writer, bits, begins: false }, copy)
    }

    /// Completes a BEGIN or END after its copy. Where the copy failed the generation stays, and a BEGIN
    /// leaves the bits as they were before it; END clears them. Returns the generation.
    pub fn finish_copy(&mut self, ticket: CopyTicket, copied: bool) -> u64 {
        let CopyTicket { key, holder, writer, bits, begins } = ticket;
        let now = |buffer: Option<&Buffer<H>>| buffer.map_or(0, |buffer| buffer.generation);
        let generation = if begins {
            self.change_bits(key, |sync| sync.copied(holder, bits, copied));
            now(self.buffers.get(&key))
        } else if !copied {
            self.clear(key, holder, bits);
            now(self.buffers.get(&key))
        } else {
            self.complete(key, holder, writer, bits)
        };
        if let Some(buffer) = self.buffers.get_mut(&key) {
            buffer.copies = buffer.copies.saturating_sub(1);
        }
        self.settle(key);
        generation
    }
}
