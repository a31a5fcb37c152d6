//! What a host client asks of the registry: list, acquire, release (`spec/host-socket.md`). Pure.
//!
//! It does not know sockets, processes or descriptors; a client is a number.

use std::collections::BTreeSet;
use std::time::Duration;

use uuid::Uuid;

use super::{Buffer, Description, Foreign, Holder, Lease, Notice, Registry};
use crate::ids::{Access, BufferKey, ClientId, LeaseId, PeerId};
use crate::limits::{MAX_LEASES, NOTICE};
use crate::protocol::{Mode, Status};

/// A buffer as the host sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BufferInfo {
    /// Its UUID.
    pub uuid: Uuid,
    /// What it is for.
    pub what: Description,
    /// Who exported it.
    pub exporter: PeerId,
    /// The operator's name for the exporter.
    pub exporter_name: String,
    /// How bytes travel to the host.
    pub mode: Mode,
    /// What the host may acquire it for; none where a lease is all that is left.
    pub access: Access,
    /// How often its content was declared complete.
    pub generation: u64,
    /// Attachments, leases, and 1 if others on the host hold it.
    pub use_count: u32,
    /// The exporter sent RELEASE, or is gone: whoever holds a lease should finish.
    pub wanted_back: bool,
    /// Its leases, as far as they were asked for.
    pub leases: Vec<LeaseInfo>,
}

/// A lease as the host sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct LeaseInfo {
    pub lease: LeaseId,
    pub client: ClientId,
    pub access: Access,
    pub revoked: bool,
    pub since: Duration,
}

/// Answer to ACQUIRE.
#[derive(Debug, Clone)]
pub struct Acquired<H> {
    /// The client's lease.
    pub lease: LeaseId,
    /// Its memory.
    pub backing: H,
    /// What it is.
    pub info: BufferInfo,
}

impl<H: Clone> Registry<H> {
    /// At most `max` of the buffers that the host may acquire or holds a lease of: those whose UUIDs
    /// follow `after`, in that order. Also where to go on, as long as there may be more.
    pub fn host_page(&self, after: Uuid, max: usize) -> (Vec<BufferInfo>, Option<Uuid>) {
        self.page(after, max, |key| {
            let buffer = self.buffers.get(&key).filter(|_| self.host_sees(key))?;
            Some(self.info_of(key, buffer, |_| false))
        })
    }

    /// The buffer, if the host may acquire it or holds a lease of it.
    pub fn host_info(&self, uuid: Uuid) -> Option<BufferInfo> {
        self.info(uuid, |_| true)
    }

    /// The same as one client has to know it: with its own live leases alone. Others may have
    /// thousands, and this is asked at every change.
    pub fn host_view(&self, uuid: Uuid, client: ClientId) -> Option<BufferInfo> {
        self.info(uuid, |lease| lease.client == client && !lease.revoked)
    }

    fn info(&self, uuid: Uuid, wanted: impl Fn(&Lease) -> bool) -> Option<BufferInfo> {
        let key = *self.by_uuid.get(&uuid)?;
        let buffer = self.buffers.get(&key)?;
        self.host_sees(key).then(|| self.info_of(key, buffer, wanted))
    }

    /// Whether the host may know of a buffer.
    pub(super) fn host_sees(&self, key: BufferKey) -> bool {
        let leased = self.buffers.get(&key).is_some_and(|buffer| !buffer.leases.is_empty());
        let own = self.buffers.get(&key).is_some_and(|buffer| buffer.owner == PeerId::HOST);
        leased || own || !self.host_access(key).is_none()
    }

    pub(super) fn info_of(
        &self,
        key: BufferKey,
        buffer: &Buffer<H>,
        wanted: impl Fn(&Lease) -> bool,
    ) -> BufferInfo {
        let name = self.vms.get(&buffer.owner).map_or("host", |vm| &vm.name).to_owned();
        let lease = |lease: &Lease| LeaseInfo {
            lease: lease.id,
            client: lease.client,
            access: lease.access,
            revoked: lease.revoked,
            since: lease.since,
        };
        BufferInfo {
            uuid: buffer.uuid,
            what: buffer.what.clone(),
            exporter: buffer.owner,
            exporter_name: name,
            mode: buffer.mode,
            access: self.host_access(key),
            generation: buffer.generation,
            use_count: buffer.use_count(),
            wanted_back: buffer.wanted_back(),
            leases: buffer.leases.iter().filter(|held| wanted(held)).map(lease).collect(),
        }
    }

    /// ACQUIRE.
    ///
    /// NOENT where there is no such buffer or no right to it; ACCESS where there is a right, but not
    /// for this, or zero copies are demanded and impossible; QUOTA above [`MAX_LEASES`].
    pub fn acquire(
        &mut self,
        client: ClientId,
        uuid: Uuid,
        access: Access,
        zero_copy: bool,
        now: Duration,
    ) -> Result<Acquired<H>, Status> {
        if access.is_none() {
            return Err(Status::Inval);
        }
        let key = *self.by_uuid.get(&uuid).ok_or(Status::NoEnt)?;
        let before = self.host_access(key);
        if before.is_none() {
            return Err(Status::NoEnt);
        }
        let buffer = self.buffers.get_mut(&key).ok_or(Status::NoEnt)?;
        if !before.contains(access) || (zero_copy && buffer.mode == Mode::Copy) {
            return Err(Status::Access);
        }
        if self.clients.get(&client).is_some_and(|leases| leases.len() >= MAX_LEASES) {
            return Err(Status::Quota);
        }
        let backing = buffer.backing.clone().ok_or(Status::NoEnt)?;
        self.last_lease += 1;
        let lease = LeaseId(self.last_lease);
        buffer.last_lease = Some(lease);
        let (revoked, notice, ends) = (false, false, None);
        buffer.leases.push(Lease { id: lease, client, access, revoked, since: now, notice, ends });
        if buffer.observable {
            buffer.foreign = Foreign::Possible;
        }
        buffer.use_up_grant(PeerId::HOST);
        self.clients.entry(client).or_default().insert(lease, key);
        let info = self.buffers.get(&key).map(|buffer| self.info_of(key, buffer, |_| false));
        self.tell_host_offer(key, before);
        self.refresh_offers(key);
        self.settle(key);
        Ok(Acquired { lease, backing, info: info.ok_or(Status::NoEnt)? })
    }

    /// The client of a fresh lease wants [`NOTICE`] when the exporter takes the buffer back by force.
    pub fn want_notice(&mut self, client: ClientId, lease: LeaseId) {
        let key = self.clients.get(&client).and_then(|leases| leases.get(&lease)).copied();
        let buffer = key.and_then(|key| self.buffers.get_mut(&key));
        let held = buffer.and_then(|buffer| buffer.leases.iter_mut().find(|held| held.id == lease));
        if let Some(held) = held {
            held.notice = true;
        }
    }

    /// The live lease of a client: NOENT where it has none of this number, REVOKED where it is dead.
    pub(super) fn lease_of(
        &self,
        client: ClientId,
        lease: LeaseId,
    ) -> Result<(BufferKey, &Lease), Status> {
        let leases = self.clients.get(&client).ok_or(Status::NoEnt)?;
        let key = *leases.get(&lease).ok_or(Status::NoEnt)?;
        let found = self.buffers.get(&key).and_then(|buffer| buffer.lease(lease));
        let found = found.ok_or(Status::NoEnt)?;
        if found.revoked { Err(Status::Revoked) } else { Ok((key, found)) }
    }

    /// RELEASE of a lease, dead or alive.
    pub fn end_lease(&mut self, client: ClientId, lease: LeaseId) -> Result<(), Status> {
        let leases = self.clients.get_mut(&client).ok_or(Status::NoEnt)?;
        let key = leases.remove(&lease).ok_or(Status::NoEnt)?;
        if leases.is_empty() {
            self.clients.remove(&client);
        }
        self.drop_leases(key, |held| held == lease);
        Ok(())
    }

    /// A client is gone: its leases and exports end.
    pub fn client_gone(&mut self, client: ClientId) {
        self.exporter_gone(client);
        let leases = self.clients.remove(&client).unwrap_or_default();
        for key in leases.values().copied().collect::<BTreeSet<_>>() {
            self.drop_leases(key, |held| leases.contains_key(&held));
        }
    }

    /// Ends leases of one buffer, in one go: there may be thousands.
    fn drop_leases(&mut self, key: BufferKey, gone: impl Fn(LeaseId) -> bool) {
        let leaves = |holder| matches!(holder, Holder::Lease(lease) if gone(lease));
        self.end_waits(key, |waiter| leaves(waiter.holder).then_some(Status::Canceled));
        self.clear_bits(key, leaves);
        let Some(buffer) = self.buffers.get_mut(&key) else { return };
        buffer.leases.retain(|held| !gone(held.id));
        if buffer.may_be_looked_at() {
            self.outbox.observe.insert(key);
        }
        self.settle(key);
    }

    /// Kills every lease: its client is told, and only handing it back is left.
    pub(super) fn revoke_leases(&mut self, key: BufferKey) {
        self.revoke_some(key, |_| true);
    }

    /// The exporter takes the buffer back by force: leases die, those whose clients asked for notice a
    /// little later.
    pub(super) fn force_leases(&mut self, key: BufferKey) {
        self.revoke_some(key, |lease| !lease.notice);
        let Some(buffer) = self.buffers.get_mut(&key) else { return };
        let mut noticed = false;
        for lease in buffer.leases.iter_mut().filter(|lease| !lease.revoked) {
            lease.ends.get_or_insert(Duration::ZERO);
            noticed = true;
        }
        if noticed {
            self.outbox.notices.push(Notice::Withdrawn(buffer.uuid));
        }
    }

    /// Starts the time of notices, and ends those that are over.
    pub(super) fn expire_notices(&mut self, key: BufferKey, now: Duration) {
        let Some(buffer) = self.buffers.get_mut(&key) else { return };
        for ends in buffer.leases.iter_mut().filter_map(|lease| lease.ends.as_mut()) {
            if ends.is_zero() {
                *ends = now.saturating_add(NOTICE);
            }
        }
        self.revoke_some(key, |lease| lease.ends.is_some_and(|ends| ends <= now));
    }

    fn revoke_some(&mut self, key: BufferKey, which: impl Fn(&Lease) -> bool) {
        let Some(buffer) = self.buffers.get_mut(&key) else { return };
        let (uuid, mut dead) = (buffer.uuid, BTreeSet::new());
        for lease in buffer.leases.iter_mut().filter(|lease| !lease.revoked && which(lease)) {
            (lease.revoked, lease.ends) = (true, None);
            dead.insert(lease.id);
            let (client, lease) = (lease.client, lease.id);
            self.outbox.notices.push(Notice::Revoked { client, lease, uuid });
        }
        if dead.is_empty() {
            return;
        }
        let leaves = |holder| matches!(holder, Holder::Lease(lease) if dead.contains(&lease));
        self.end_waits(key, |waiter| leaves(waiter.holder).then_some(Status::Revoked));
        self.clear_bits(key, leaves);
    }
}
