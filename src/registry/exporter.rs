//! What an exporter asks of the registry: EXPORT, GRANT, RELEASE, QUERY, SET_NAME
//! (spec "Control queue, exporter"). Pure.
//!
//! It does not know how memory is made: between `begin_export` and `finish_export` somebody else
//! makes it.

use std::time::Duration;

use uuid::Uuid;

use super::{Audit, Buffer, Description, Grant, Holder, Notice, Phase, Registry};
use crate::ids::{Access, BufferKey, HandleId, PeerId, SessionId};
use crate::limits::GRANULE;
use crate::policy::Allowed;
use crate::protocol::{Mode, NAME_LEN, State, Status};

/// Leave to make the memory of one export; quota is charged. Give it to
/// [`Registry::finish_export`], whatever came of it.
#[must_use = "quota stays charged until finish_export"]
#[derive(Debug)]
pub struct Ticket {
    session: SessionId,
    what: Description,
    pool: Option<(BufferKey, u64)>,
}

/// The part of a pool that an EXPORT with F_PART names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// The pool.
    pub pool: Uuid,
    /// Bytes into the pool.
    pub offset: u64,
}

/// Memory that was made for an export.
#[derive(Debug)]
pub struct Exported<H> {
    /// The memory.
    pub backing: H,
    /// How bytes travel.
    pub mode: Mode,
    /// Made by the device, version 4.
    pub uuid: Uuid,
    /// References to the memory can be counted.
    pub observable: bool,
    /// A VMM can show it.
    pub shows: bool,
    /// When, since the daemon's start.
    pub since: Duration,
}

/// GRANT.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GrantRequest {
    /// Of what.
    pub handle: HandleId,
    /// To whom.
    pub to: PeerId,
    /// For what; none withdraws.
    pub access: Access,
    /// Consumed by the first use.
    pub once: bool,
    /// With no access: what is in use is revoked too.
    pub force: bool,
    /// Zero: until withdrawn.
    pub lifetime: Duration,
}

/// Answer to RELEASE and QUERY.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct HandleState {
    pub state: State,
    pub use_count: u32,
    pub nr_mappings: u32,
    pub access: Access,
    pub size: u64,
    pub generation: u64,
    pub uuid: Uuid,
}

impl<H: Clone> Registry<H> {
    /// Judges an EXPORT and charges it. Returns the pool's memory where it is a part.
    ///
    /// QUOTA above a quota or, as `too_big` says, a bound of the configuration space; NOENT where the pool
    /// is no live export of this VM; RANGE where the part is outside of it or misaligned; ACCESS above the pool's.
    pub fn begin_export(
        &mut self,
        session: SessionId,
        what: Description,
        part: Option<Part>,
        too_big: bool,
    ) -> Result<(Ticket, Option<H>), Status> {
        let vm = self.vm(session)?;
        let mut pool = None;
        if let Some(part) = part {
            let found =
                self.by_uuid.get(&part.pool).and_then(|key| Some((*key, self.buffers.get(key)?)));
            let (key, parent) = found
                .filter(|(_, parent)| parent.session == session && parent.phase == Phase::Live)
                .ok_or(Status::NoEnt)?;
            if !parent.what.access.contains(what.access) {
                return Err(Status::Access);
            }
            let end = part.offset.checked_add(what.size).ok_or(Status::Range)?;
            if end > parent.what.size || !(part.offset | what.size).is_multiple_of(GRANULE) {
                return Err(Status::Range);
            }
            pool = Some(((key, part.offset), parent.backing.clone().ok_or(Status::NoEnt)?));
        }
        let bytes = vm.bytes.checked_add(what.size).ok_or(Status::Quota)?;
        if too_big || vm.exports >= vm.quota.max_exports || bytes > vm.quota.max_total_size {
            return Err(Status::Quota);
        }
        let vm = self.vm_mut(session)?;
        vm.exports += 1;
        vm.bytes = bytes;
        let (pool, backing) = pool.unzip();
        if let Some(parent) = pool.and_then(|(key, _)| self.buffers.get_mut(&key)) {
            parent.parts += 1;
        }
        Ok((Ticket { session, what, pool }, backing))
    }

    /// Enters the memory that was made, or undoes the charge where none was, or the session is over.
    pub fn finish_export(
        &mut self,
        ticket: Ticket,
        made: Result<Exported<H>, Status>,
    ) -> Result<(HandleId, Uuid, Mode), Status> {
        let Ticket { session, what, pool } = ticket;
        let made = match (self.vm(session), made) {
            (Ok(_), Ok(made)) if !self.by_uuid.contains_key(&made.uuid) => Ok(made),
            (Ok(_), Ok(made)) => Err((Status::Io, Some(made.backing))),
            (Err(status), Ok(made)) => Err((status, Some(made.backing))),
            (_, Err(status)) => Err((status, None)),
        };
        let made = match made {
            Ok(made) => made,
            Err((status, backing)) => {
                self.outbox.drop.extend(backing);
                self.uncharge(session, what.size);
                if let Some((key, _)) = pool
                    && let Some(parent) = self.buffers.get_mut(&key)
                {
                    parent.parts = parent.parts.saturating_sub(1);
                    self.settle(key);
                }
                return Err(status);
            }
        };
        let handle = self.vm_mut(session)?.new_handle();
        let (uuid, mode) = (made.uuid, made.mode);
        let key = self.enter(session, handle, what, made, pool);
        let vm = self.vm_mut(session)?;
        vm.handles.insert(handle, key);
        vm.buffers.insert(key);
        pool.into_iter().for_each(|(pool, _)| self.settle(pool));
        Ok((handle, uuid, mode))
    }

    /// A buffer comes to life.
    pub(super) fn enter(
        &mut self,
        session: SessionId,
        handle: HandleId,
        what: Description,
        made: Exported<H>,
        pool: Option<(BufferKey, u64)>,
    ) -> BufferKey {
        self.last_key += 1;
        let key = BufferKey(self.last_key);
        self.by_uuid.insert(made.uuid, key);
        self.buffers.insert(key, Buffer::new(session, handle, what, made, pool));
        key
    }

    /// GRANT: replaces what `to` was granted.
    ///
    /// NOENT where policy knows no such peer; ACCESS where it is more than the export or the policy
    /// allows; REVOKED on an export that is being released.
    pub fn grant(
        &mut self,
        session: SessionId,
        request: GrantRequest,
        now: Duration,
    ) -> Result<(), Status> {
        let key = self.key(session, request.handle)?;
        let any = request.to == PeerId::ANY;
        let exists = request.to == PeerId::HOST || self.vms.contains_key(&request.to);
        let allowed = match self.policy.allows(session.peer, request.to) {
            // Each peer's own policy is judged when it comes.
            _ if any => Allowed::Yes,
            allowed if exists => allowed,
            _ => Allowed::No,
        };
        if allowed == Allowed::No {
            return Err(Status::NoEnt);
        }
        let read_only = allowed == Allowed::ReadOnly;
        let buffer = self.buffers.get_mut(&key).ok_or(Status::NoEnt)?;
        if buffer.phase != Phase::Live {
            return Err(Status::Revoked);
        }
        if !buffer.what.access.contains(request.access) || (read_only && request.access.write) {
            return Err(Status::Access);
        }
        let before = self.host_access(key);
        let buffer = self.buffers.get_mut(&key).ok_or(Status::NoEnt)?;
        buffer.grants.retain(|(to, _)| *to != request.to);
        if !request.access.is_none() {
            let expires =
                (!request.lifetime.is_zero()).then(|| now.saturating_add(request.lifetime));
            let grant = Grant { access: request.access, once: request.once, expires };
            buffer.grants.push((request.to, grant));
            if request.to != PeerId::HOST {
                self.granted.insert(key);
            }
        }
        // ANY stands for those that have no grant of their own.
        let own: Vec<PeerId> = buffer.grants.iter().map(|(to, _)| *to).collect();
        let meant = |peer| request.to == peer || (any && !own.contains(&peer));
        let (exporter, to, access) = (session.peer, request.to, request.access);
        self.outbox.audit.push(Audit::Granted { exporter, to, uuid: buffer.uuid, access });
        self.tell_host_offer(key, before);
        if request.force && request.access.is_none() {
            if meant(PeerId::HOST) {
                self.force_leases(key);
            }
            self.revoke_attachments(key, meant);
        }
        self.refresh_offers(key);
        self.settle(key);
        Ok(())
    }

    /// The handle's buffer, if its foreign references should be counted before RELEASE is judged.
    pub fn look_before_release(&self, session: SessionId, handle: HandleId) -> Option<BufferKey> {
        let key = self.key(session, handle).ok()?;
        let buffer = self.buffers.get(&key)?;
        buffer.may_be_looked_at().then_some(key)
    }

    /// RELEASE: closes the door, and says RELEASED at once where nobody uses the pages; else the
    /// event says it later. Again on a handle that is being released: the state as it is.
    pub fn release(
        &mut self,
        session: SessionId,
        handle: HandleId,
        force: bool,
    ) -> Result<HandleState, Status> {
        let key = self.key(session, handle)?;
        let told = !self.host_access(key).is_none();
        self.withdraw_all(key);
        self.end_waits(key, |waiter| match waiter.holder {
            Holder::Exporter => Some(Status::Canceled),
            Holder::Lease(_) | Holder::Attachment(_) => force.then_some(Status::Revoked),
        });
        if force {
            self.force_leases(key);
            self.revoke_attachments(key, |_| true);
        }
        let mut answer = self.state_of(key).ok_or(Status::NoEnt)?;
        let buffer = self.buffers.get_mut(&key).ok_or(Status::NoEnt)?;
        let mut pool = None;
        if !told && !buffer.leases.is_empty() {
            // Its grant was used up before; those who hold it should finish all the same.
            self.outbox.notices.push(Notice::Withdrawn(buffer.uuid));
        }
        if buffer.pages_in_use() {
            buffer.phase = Phase::Releasing;
            answer.state = State::Releasing;
        } else {
            buffer.phase = Phase::Orphan;
            answer.state = State::Released;
            answer.use_count = 0;
            pool = self.close_handle(key);
        }
        self.refresh_offers(key);
        self.settle(key);
        pool.into_iter().for_each(|pool| self.settle(pool));
        Ok(answer)
    }

    /// QUERY of an export or attachment.
    pub fn query(&self, session: SessionId, handle: HandleId) -> Result<HandleState, Status> {
        match self.key(session, handle) {
            Ok(key) => self.state_of(key).ok_or(Status::NoEnt),
            Err(_) => self.query_attachment(session, handle),
        }
    }

    /// QUERY_LINGER: an export of an earlier session that is still in use. NOENT past the last one.
    pub fn query_linger(&self, session: SessionId, index: u64) -> Result<HandleState, Status> {
        if index >= u64::from(self.vm(session)?.lingering) {
            return Err(Status::NoEnt);
        }
        let lingers = |key: &&BufferKey| {
            self.buffers.get(key).is_some_and(|buffer| buffer.phase == Phase::Lingering)
        };
        let own = self.vm(session)?.buffers.iter();
        let at = usize::try_from(index).ok().and_then(|index| own.filter(lingers).nth(index));
        at.and_then(|key| self.state_of(*key)).ok_or(Status::NoEnt)
    }

    /// SET_NAME.
    pub fn set_name(
        &mut self,
        session: SessionId,
        handle: HandleId,
        name: [u8; NAME_LEN],
    ) -> Result<(), Status> {
        let key = self.key(session, handle)?;
        let buffer = self.buffers.get_mut(&key).ok_or(Status::NoEnt)?;
        buffer.what.name = name;
        let uuid = buffer.uuid;
        if !self.host_access(key).is_none() {
            self.outbox.notices.push(Notice::Offered(uuid));
        }
        Ok(())
    }

    pub(super) fn state_of(&self, key: BufferKey) -> Option<HandleState> {
        let buffer = self.buffers.get(&key)?;
        let use_count = buffer.use_count();
        let mappings = buffer.attachments.iter().filter_map(|held| {
            Some(self.vms.get(&held.importer)?.attachments.get(&held.handle)?.mappings.len())
        });
        let state = match buffer.phase {
            Phase::Live if use_count == 0 => State::Exported,
            Phase::Live => State::InUse,
            Phase::Releasing | Phase::Lingering => State::Releasing,
            Phase::Told | Phase::Orphan => State::Released,
        };
        Some(HandleState {
            state,
            use_count,
            nr_mappings: u32::try_from(mappings.sum::<usize>()).unwrap_or(u32::MAX),
            access: buffer.what.access,
            size: buffer.what.size,
            generation: buffer.generation,
            uuid: buffer.uuid,
        })
    }

    /// Voids every grant.
    fn withdraw_all(&mut self, key: BufferKey) {
        let before = self.host_access(key);
        if let Some(buffer) = self.buffers.get_mut(&key) {
            buffer.grants.clear();
        }
        self.tell_host_offer(key, before);
    }

    /// Ends the grants that are due.
    pub(super) fn expire_grants(&mut self, key: BufferKey, now: Duration) {
        let before = self.host_access(key);
        if let Some(buffer) = self.buffers.get_mut(&key) {
            buffer.grants.retain(|(_, grant)| grant.expires.is_none_or(|when| when > now));
        }
        self.tell_host_offer(key, before);
        self.refresh_offers(key);
    }

    /// What the host may acquire the buffer for: the exporter's grant AND the operator's policy.
    pub(super) fn host_access(&self, key: BufferKey) -> Access {
        self.peer_access(key, PeerId::HOST)
    }

    /// Tells host clients that an offer came, changed or went.
    pub(super) fn tell_host_offer(&mut self, key: BufferKey, before: Access) {
        let after = self.host_access(key);
        let Some(buffer) = self.buffers.get(&key).filter(|_| before != after) else { return };
        self.outbox.notices.push(if after.is_none() {
            Notice::Withdrawn(buffer.uuid)
        } else {
            Notice::Offered(buffer.uuid)
        });
    }
}
