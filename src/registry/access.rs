//! BEGIN, END and CANCEL of any holder of a buffer (spec "Synchronisation"). Pure.
//!
//! It does not know what is copied (`transfer`).

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::sync::{Ended as Ends, SyncState};
use super::{
    Buffer, Copy, CopyTicket, Done, Holder, Move, Notice, Origin, Phase, Place, Registry, View,
    Waiter,
};
use crate::ids::{Access, BufferKey, ClientId, Cookie, HandleId, LeaseId, SessionId};
use crate::limits::MAX_WAIT;
use crate::protocol::{Mode, Status};

/// BEGIN or END of part of a buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SyncRequest {
    /// READ, WRITE or both.
    pub bits: Access,
    /// Bytes from the start of the buffer.
    pub offset: u64,
    /// Bytes; 0: to the end.
    pub len: u64,
    /// AGAIN rather than wait.
    pub nonblock: bool,
    /// At most [`MAX_WAIT`] counts.
    pub timeout: Duration,
    /// For CANCEL.
    pub cookie: Cookie,
}

/// Outcome of BEGIN.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Begun {
    /// Granted; the content's generation.
    Now(u64),
    /// [`Outbox::done`](super::Outbox::done) will tell.
    Waits,
}

/// Outcome of END.
#[derive(Debug)]
pub enum Ended<H> {
    /// The content's generation.
    Now(u64),
    /// These bytes must be copied first.
    Copy(CopyTicket, Copy<H>),
}

impl<H: Clone> Registry<H> {
    /// Who a handle is among the holders of a buffer, and what it may do. REVOKED for a dead one.
    pub(super) fn holder(
        &self,
        session: SessionId,
        handle: HandleId,
    ) -> Result<(BufferKey, Holder, Access), Status> {
        let vm = self.vm(session)?;
        if let Some(key) = vm.handles.get(&handle) {
            // An exporter reads and writes its own pages at will; `access` bounds its peers.
            return Ok((*key, Holder::Exporter, Access::ALL));
        }
        let held = vm.attachments.get(&handle).ok_or(Status::NoEnt)?;
        if held.revoked {
            return Err(Status::Revoked);
        }
        Ok((held.key, Holder::Attachment(held.id), held.access))
    }

    /// BEGIN of an export or attachment; `token` is the device's number for the chain. A VM's waits
    /// are bounded by its quota and by `ring_room`: BUSY above. What is granted is not complete
    /// before [`fill`](Self::fill).
    pub fn begin_handle(
        &mut self,
        session: SessionId,
        handle: HandleId,
        request: SyncRequest,
        (token, ring_room): (u64, u32),
        now: Duration,
    ) -> Result<Begun, Status> {
        let (key, holder, allowed) = self.holder(session, handle)?;
        let vm = self.vm(session)?;
        let full = vm.waits >= vm.quota.max_waits.min(ring_room);
        let origin = Origin::Vm(session.peer, token);
        let buffer = self.buffers.get(&key).ok_or(Status::NoEnt)?;
        let reads = holder != Holder::Exporter && request.bits.read;
        if reads && !buffer.has_content_for(holder) {
            return Err(Status::Revoked);
        }
        self.begin(key, holder, allowed, request, full, origin, now)
    }

    /// BEGIN of a lease or a client's export. `full` says that the client has enough waits: BUSY if this one must wait.
    pub fn begin_lease(
        &mut self,
        client: ClientId,
        lease: LeaseId,
        request: SyncRequest,
        full: bool,
        now: Duration,
    ) -> Result<Begun, Status> {
        let (key, holder, allowed) = self.holder_of(client, lease)?;
        let origin = Origin::Client(client, request.cookie);
        self.begin(key, holder, allowed, request, full, origin, now)
    }

    #[expect(clippy::too_many_arguments, reason = "one private step of the two above")]
    fn begin(
        &mut self,
        key: BufferKey,
        holder: Holder,
        allowed: Access,
        request: SyncRequest,
        full: bool,
        origin: Origin,
        now: Duration,
    ) -> Result<Begun, Status> {
        let buffer = self.buffers.get_mut(&key).ok_or(Status::NoEnt)?;
        if holder == Holder::Exporter && buffer.phase != Phase::Live {
            return Err(Status::Canceled);
        }
        check(buffer, allowed, &request)?;
        let generation = buffer.generation;
        let at_once = buffer.sync.as_ref().is_none_or(|sync| sync.may_begin(holder, request.bits));
        let unless = match (request.nonblock, full) {
            (true, _) => Some(Status::Again),
            (false, true) => Some(Status::Busy),
            (false, false) => None,
        };
        let waiter = Waiter {
            holder,
            want: request.bits,
            deadline: now + request.timeout.min(MAX_WAIT),
            unless,
            cookie: request.cookie,
            origin,
        };
        let fences = self.meets_fences(key, origin);
        let sync = self.buffers.get_mut(&key).ok_or(Status::NoEnt)?.sync();
        match (at_once, unless) {
            (true, _) if fences => {
                sync.reserve(holder, request.bits);
                self.await_fences(key, waiter);
            }
            (true, _) => {
                sync.reserve(holder, request.bits);
                sync.grant(holder, request.bits);
                return Ok(Begun::Now(generation));
            }
            (false, Some(status)) => return Err(status),
            (false, None) => sync.wait(waiter),
        }
        if unless.is_none() {
            self.count_wait(origin);
        }
        self.reschedule(key);
        Ok(Begun::Waits)
    }

    pub(super) fn count_wait(&mut self, origin: Origin) {
        if let Origin::Vm(peer, _) = origin
            && let Some(vm) = self.vms.get_mut(&peer)
        {
            vm.waits += 1;
        }
    }

    /// END of a lease or a client's export.
    pub fn end_access(
        &mut self,
        client: ClientId,
        lease: LeaseId,
        request: SyncRequest,
    ) -> Result<Ended<H>, Status> {
        let (key, holder, allowed) = self.holder_of(client, lease)?;
        self.end(key, holder, allowed, request, Some(client))
    }

    pub(super) fn end(
        &mut self,
        key: BufferKey,
        holder: Holder,
        allowed: Access,
        request: SyncRequest,
        writer: Option<ClientId>,
    ) -> Result<Ended<H>, Status> {
        let buffer = self.buffers.get_mut(&key).ok_or(Status::NoEnt)?;
        let len = check(buffer, allowed, &request)?;
        let from_exporter = holder == Holder::Exporter;
        if request.bits.write && buffer.mode == Mode::Copy {
            // The loan ends with the last copy in progress, so no further one may begin.
            if !from_exporter && buffer.phase != Phase::Live {
                return Err(Status::Revoked);
            }
            let memory = buffer.backing.clone().ok_or(Status::Revoked)?;
            let place = |view| Place { memory: memory.clone(), view, offset: request.offset };
            let (mut from, mut to) = (place(View::Pages), place(View::Content));
            if !from_exporter {
                std::mem::swap(&mut from, &mut to);
            }
            let copy = Copy { moves: vec![Move { from, to, len }] };
            return Ok(self.start_copy(key, holder, writer, request.bits, copy));
        }
        Ok(Ended::Now(self.complete(key, holder, writer, request.bits)))
    }

    pub(super) fn complete(
        &mut self,
        key: BufferKey,
        holder: Holder,
        writer: Option<ClientId>,
        bits: Access,
    ) -> u64 {
        if bits.write {
            self.advance(key, holder);
        }
        let Some(buffer) = self.buffers.get(&key) else { return 0 };
        let (uuid, generation) = (buffer.uuid, buffer.generation);
        if bits.write && self.host_sees(key) {
            self.outbox.notices.push(Notice::Changed { uuid, generation, writer });
        }
        self.clear(key, holder, bits);
        generation
    }

    /// New content: every holder is told but the writer, who knows it from its answer.
    fn advance(&mut self, key: BufferKey, writer: Holder) {
        let Some(buffer) = self.buffers.get_mut(&key) else { return };
        let before = buffer.generation;
        buffer.generation += 1;
        if writer == Holder::Exporter && buffer.told_generation == before {
            buffer.told_generation = buffer.generation;
        }
        for held in buffer.attachments.clone() {
            let vm = self.vms.get_mut(&held.importer);
            if writer == Holder::Attachment(held.id)
                && let Some(own) = vm.and_then(|vm| vm.attachments.get_mut(&held.handle))
                && own.told_generation == before
            {
                own.told_generation = before + 1;
            }
            self.queue_attachment(held.importer, held.handle);
        }
        self.queue_export(key);
    }

    /// CANCEL of an export or attachment: its waits on this handle, or the one that `cookie` names.
    /// NOENT where nothing waits.
    pub fn cancel_handle(
        &mut self,
        session: SessionId,
        handle: HandleId,
        cookie: Cookie,
    ) -> Result<(), Status> {
        let (key, holder, _) = self.holder(session, handle)?;
        let named = |waiter: &Waiter| {
            let mine = waiter.holder == holder;
            (mine && (cookie == Cookie(0) || waiter.cookie == cookie)).then_some(Status::Canceled)
        };
        if self.end_waits(key, named) { Ok(()) } else { Err(Status::NoEnt) }
    }

    /// CANCEL of a client, by the cookie of the request that waits. NOENT where none does.
    pub fn cancel_client(&mut self, client: ClientId, cookie: Cookie) -> Result<(), Status> {
        let leased = self.clients.get(&client).into_iter().flat_map(BTreeMap::values);
        let own = self.exporters.get(&client).into_iter().flat_map(|own| own.handles.values());
        let keys: BTreeSet<BufferKey> = leased.chain(own).copied().collect();
        let origin = Origin::Client(client, cookie);
        for key in keys {
            if self.end_waits(key, |wait| (wait.origin == origin).then_some(Status::Canceled)) {
                return Ok(());
            }
        }
        Err(Status::NoEnt)
    }

    /// Ends the waits that get a status, serves those who waited behind them, and returns whether
    /// there were any.
    pub(super) fn end_waits(
        &mut self,
        key: BufferKey,
        status: impl Fn(&Waiter) -> Option<Status>,
    ) -> bool {
        let Some(buffer) = self.buffers.get_mut(&key) else { return false };
        let points = buffer.points.as_mut().map(|points| points.take_out(&status));
        let (out, served) =
            buffer.sync.as_mut().map(|sync| sync.cancel(status)).unwrap_or_default();
        self.end_all(key, points.unwrap_or_default(), out, served)
    }

    fn end_all(&mut self, key: BufferKey, points: Ends, out: Ends, served: Ends) -> bool {
        let any = !out.is_empty() || !points.is_empty();
        for (waiter, status) in points {
            self.tell_end(waiter, status, 0);
        }
        self.done(key, out.into_iter().chain(served));
        any
    }

    pub(super) fn expire_waits(&mut self, key: BufferKey, now: Duration) {
        let Some(buffer) = self.buffers.get_mut(&key) else { return };
        let late = |waiter: &Waiter| (waiter.deadline <= now).then_some(Status::TimedOut);
        let points = buffer.points.as_mut().map(|points| points.take_out(late));
        let (out, served) = buffer.sync.as_mut().map(|sync| sync.expire(now)).unwrap_or_default();
        self.end_all(key, points.unwrap_or_default(), out, served);
    }

    /// Holders are gone: their bits clear, the generation stays. So do their timelines.
    pub(super) fn clear_bits(&mut self, key: BufferKey, gone: impl Fn(Holder) -> bool) {
        if let Some(points) = self.buffers.get_mut(&key).and_then(|b| b.points.as_mut()) {
            points.leave(&gone);
        }
        self.change_bits(key, |sync| sync.leave(gone));
    }

    pub(super) fn clear(&mut self, key: BufferKey, holder: Holder, bits: Access) {
        self.change_bits(key, |sync| sync.end(holder, bits));
    }

    pub(super) fn change_bits(
        &mut self,
        key: BufferKey,
        change: impl FnOnce(&mut SyncState) -> Ends,
    ) {
        let Some(buffer) = self.buffers.get_mut(&key) else { return };
        let Some(sync) = &mut buffer.sync else { return };
        let served = change(sync);
        self.done(key, served);
    }

    /// Reports waits that ended; of those that were given their bits, unless they meet fences.
    pub(super) fn done(
        &mut self,
        key: BufferKey,
        waiters: impl IntoIterator<Item = (Waiter, Status)>,
    ) {
        for (waiter, status) in waiters {
            if status == Status::Ok && self.meets_fences(key, waiter.origin) {
                self.await_fences(key, waiter);
                continue;
            }
            if status == Status::Ok
                && let Some(buffer) = self.buffers.get_mut(&key)
            {
                buffer.sync().grant(waiter.holder, waiter.want);
            }
            let generation = self.buffers.get(&key).map_or(0, |buffer| buffer.generation);
            self.tell_end(waiter, status, generation);
        }
        if let Some(buffer) = self.buffers.get_mut(&key) {
            buffer.sync.take_if(|sync| sync.is_idle());
        }
        self.reschedule(key);
    }

    pub(super) fn tell_end(&mut self, waiter: Waiter, status: Status, value: u64) {
        if let Origin::Vm(peer, _) = waiter.origin
            && let Some(vm) = self.vms.get_mut(&peer)
        {
            vm.waits = vm.waits.saturating_sub(u32::from(waiter.unless.is_none()));
        }
        self.outbox.done.push(Done { origin: waiter.origin, status, value });
    }
}

/// Judges a BEGIN or END; returns the bytes that it covers.
pub(super) fn check<H>(
    buffer: &Buffer<H>,
    allowed: Access,
    request: &SyncRequest,
) -> Result<u64, Status> {
    if request.bits.is_none() {
        return Err(Status::Inval);
    }
    if !allowed.contains(request.bits) {
        return Err(Status::Access);
    }
    let room = buffer.what.size.checked_sub(request.offset).ok_or(Status::Range)?;
    match request.len {
        0 => Ok(room),
        len if len <= room => Ok(len),
        _ => Err(Status::Range),
    }
}
