//! What a daemon leaves to its successor: the buffers that somebody on the host still uses. Pure.
//!
//! Sessions of VMs end with the daemon, so what is left of a buffer is its description, its leases, all
//! dead, and its memory. It does not know how that travels.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{Buffer, Description, Foreign, Lease, Phase, Registry};
use crate::ids::{BufferKey, ClientId, HandleId, LeaseId, PeerId, SessionId};
use crate::limits::OBSERVE_MIN;
use crate::protocol::Mode;

/// A buffer whose exporter's session is over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Left {
    /// Which.
    pub uuid: Uuid,
    /// The operator's name for the VM: a successor may number its VMs otherwise.
    pub vm: String,
    /// Its memory is a dma-buf, whose references can be counted.
    pub observable: bool,
    what: Description,
    copied: bool,
    generation: u64,
    /// All dead; their clients have not handed them back.
    leases: Vec<Lease>,
}

impl<H: Clone> Registry<H> {
    /// Ends all sessions, for good, and tells what is left of their buffers, with its memory.
    pub fn leave(&mut self) -> Vec<(Left, H)> {
        self.left = true;
        let sessions: Vec<SessionId> = self.vms.values().filter_map(|vm| vm.session).collect();
        for session in sessions {
            self.close_session(session);
        }
        let mut left: Vec<(BufferKey, Left, H)> = Vec::new();
        for (key, buffer) in &self.buffers {
            let (Some(memory), Some(vm)) = (&buffer.backing, self.vms.get(&buffer.owner)) else {
                continue;
            };
            left.push((*key, Left::of(buffer, &vm.name), memory.clone()));
        }
        left.sort_unstable_by_key(|(key, ..)| *key);
        left.into_iter().map(|(_, left, memory)| (left, memory)).collect()
    }

    /// The number of the last lease that was given out.
    pub fn last_lease(&self) -> LeaseId {
        LeaseId(self.last_lease)
    }

    /// Takes over what a predecessor left, before any session; its lease numbers are not used again.
    /// Returns the buffers of VMs that are not configured any more: nobody is there to be told.
    pub fn inherit(
        &mut self,
        left: Vec<(Left, H)>,
        last_lease: LeaseId,
        now: Duration,
    ) -> Vec<(Left, H)> {
        self.last_lease = self.last_lease.max(last_lease.0);
        let mut unknown = Vec::new();
        for (left, memory) in left {
            let owner = self.vms.iter().find(|(_, vm)| vm.name == left.vm).map(|(peer, _)| *peer);
            match owner {
                Some(owner) if !self.by_uuid.contains_key(&left.uuid) => {
                    self.take_over(owner, left, memory, now);
                }
                _ => unknown.push((left, memory)),
            }
        }
        unknown
    }

    /// The clients that have leases.
    pub fn clients(&self) -> Vec<ClientId> {
        self.clients.keys().copied().collect()
    }

    /// The memory of a client's lease, dead or alive.
    pub fn memory_of(&self, client: ClientId, lease: LeaseId) -> Option<H> {
        let key = self.clients.get(&client)?.get(&lease)?;
        self.buffers.get(key)?.backing.clone()
    }

    fn take_over(&mut self, owner: PeerId, left: Left, memory: H, now: Duration) {
        self.last_key += 1;
        let (key, size, uuid) = (BufferKey(self.last_key), left.what.size, left.uuid);
        let buffer = left.into_buffer(owner, memory, now);
        for lease in &buffer.leases {
            self.clients.entry(lease.client).or_default().insert(lease.id, key);
        }
        if let Some(vm) = self.vms.get_mut(&owner) {
            vm.buffers.insert(key);
            vm.exports += 1;
            vm.bytes += size;
            vm.lingering += u32::from(buffer.phase == Phase::Lingering);
        }
        self.by_uuid.insert(uuid, key);
        self.buffers.insert(key, buffer);
        self.settle(key);
    }
}

impl Left {
    fn of<H>(buffer: &Buffer<H>, vm: &str) -> Left {
        Left {
            uuid: buffer.uuid,
            vm: vm.to_owned(),
            observable: buffer.observable,
            what: buffer.what.clone(),
            copied: buffer.mode == Mode::Copy,
            generation: buffer.generation,
            leases: buffer.leases.clone(),
        }
    }

    fn into_buffer<H>(self, owner: PeerId, memory: H, now: Duration) -> Buffer<H> {
        // In COPY mode nobody on the host has the exporter's own pages.
        let (mode, phase) = match self.copied {
            true => (Mode::Copy, Phase::Orphan),
            false => (Mode::ZeroCopy, Phase::Lingering),
        };
        let foreign = match (self.observable, self.leases.is_empty()) {
            (false, _) => Foreign::None,
            (true, false) => Foreign::Possible,
            (true, true) => Foreign::Held { pause: OBSERVE_MIN, next: now },
        };
        Buffer {
            owner,
            // None that is or will be: they count from 1, as handles do.
            session: SessionId { peer: owner, number: 0 },
            handle: HandleId(0),
            uuid: self.uuid,
            what: self.what,
            mode,
            since: now,
            backing: Some(memory),
            pool: None,
            parts: 0,
            grants: Vec::new(),
            attachments: Vec::new(),
            last_lease: self.leases.iter().map(|lease| lease.id).max(),
            shown: 0,
            last_place: None,
            leases: self.leases,
            phase,
            generation: self.generation,
            foreign,
            observable: self.observable,
            shows: false,
            copies: 0,
            told_generation: self.generation,
            told_busy: false,
            sync: None,
            points: None,
            due: None,
        }
    }
}
