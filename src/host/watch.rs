//! What one client still has to be told about buffers: level state, never a log. Pure.
//!
//! It knows what was told and what may have changed since; how a buffer is it asks when the client
//! takes the next event. So a slow client costs two entries a live buffer, and is told fewer events,
//! never wrong ones.

use std::collections::{BTreeSet, HashMap};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::wire::Type;
use crate::ids::{Access, ClientId};
use crate::protocol::NAME_LEN;
use crate::registry::{BufferInfo, Notice};

/// What the client was last told about a buffer.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
struct Told {
    generation: u64,
    access: Access,
    name: [u8; NAME_LEN],
    /// It was told that the exporter wants its memory back.
    wanted_back: bool,
}

/// One event to send.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct News {
    /// OFFERED, CHANGED, WITHDRAWN or REVOKED.
    pub kind: Type,
    /// Which buffer.
    pub uuid: Uuid,
    /// How it is now; `None` with WITHDRAWN and REVOKED.
    pub info: Option<BufferInfo>,
}

/// Where the state of buffers comes from.
pub trait Buffers {
    /// One that is offered to the host, or leased.
    fn look(&self, uuid: Uuid) -> Option<BufferInfo>;
    /// The first few UUIDs after this one.
    fn after(&self, uuid: Uuid) -> Vec<Uuid>;
}

/// A client's watch. A daemon's successor goes on with it.
#[derive(Debug, Serialize, Deserialize)]
pub struct Watch {
    me: ClientId,
    only: Option<Uuid>,
    told: HashMap<Uuid, Told>,
    /// Of which something may have to be told.
    dirty: BTreeSet<Uuid>,
    /// Of which a lease of this client died.
    revoked: BTreeSet<Uuid>,
    /// No longer offered, which this client need not be told as long as it has a lease.
    kept: BTreeSet<Uuid>,
    /// How far the snapshot at the start is.
    snapshot: Option<Uuid>,
}

impl Watch {
    /// A watch of one buffer, or of all; what there is comes first.
    pub fn new(me: ClientId, only: Option<Uuid>) -> Watch {
        let dirty = only.into_iter().collect();
        let snapshot = if only.is_some() { None } else { Some(Uuid::nil()) };
        let (told, revoked, kept) = (HashMap::new(), BTreeSet::new(), BTreeSet::new());
        Watch { me, only, told, dirty, revoked, kept, snapshot }
    }

    /// Takes in that something happened.
    pub fn note(&mut self, notice: &Notice) {
        let uuid = match notice {
            Notice::Offered(uuid) | Notice::Withdrawn(uuid) => *uuid,
            Notice::Changed { uuid, .. } | Notice::Revoked { uuid, .. } => *uuid,
        };
        if self.only.is_some_and(|only| only != uuid) {
            return;
        }
        match notice {
            Notice::Offered(_) => {
                self.dirty.insert(uuid);
            }
            Notice::Withdrawn(_) => {
                if self.told.contains_key(&uuid) || self.revoked.contains(&uuid) {
                    self.dirty.insert(uuid);
                } else {
                    // It came and went without being told.
                    self.dirty.remove(&uuid);
                }
            }
            Notice::Changed { generation, writer, .. } => {
                let Some(told) = self.told.get_mut(&uuid) else { return };
                if *writer == Some(self.me) {
                    told.generation = told.generation.max(*generation);
                } else {
                    self.dirty.insert(uuid);
                }
            }
            Notice::Revoked { client, .. } if *client == self.me => {
                self.revoked.insert(uuid);
                self.dirty.insert(uuid);
            }
            Notice::Revoked { .. } => {}
        }
    }

    /// Takes in that the client ended one of its leases.
    pub fn lease_ended(&mut self) {
        self.dirty.append(&mut self.kept);
    }

    /// Whether [`next`](Self::next) may have something.
    pub fn pending(&self) -> bool {
        !self.dirty.is_empty() || self.snapshot.is_some()
    }

    /// The next event, as things are now.
    pub fn next(&mut self, buffers: &impl Buffers) -> Option<News> {
        loop {
            if let Some(uuid) = self.dirty.pop_first() {
                if let Some(news) = self.judge(uuid, buffers.look(uuid)) {
                    return Some(news);
                }
                continue;
            }
            let page = buffers.after(self.snapshot?);
            self.snapshot = page.last().copied();
            self.dirty.extend(page);
        }
    }

    fn judge(&mut self, uuid: Uuid, info: Option<BufferInfo>) -> Option<News> {
        let gone = |kind| Some(News { kind, uuid, info: None });
        let offered = info.as_ref().is_some_and(|info| !info.access.is_none());
        if self.revoked.remove(&uuid) {
            self.told.remove(&uuid);
            if offered {
                self.dirty.insert(uuid);
            }
            return gone(Type::EvtRevoked);
        }
        let Some(info) = info else {
            return self.told.remove(&uuid).and_then(|_| gone(Type::EvtWithdrawn));
        };
        let mine = info.leases.iter().any(|lease| lease.client == self.me && !lease.revoked);
        if !offered && !mine {
            return self.told.remove(&uuid).and_then(|_| gone(Type::EvtWithdrawn));
        }
        if !offered {
            self.kept.insert(uuid);
        }
        let now = Told {
            generation: info.generation,
            access: info.access,
            name: info.what.name,
            wanted_back: info.wanted_back,
        };
        let kind = match self.told.get(&uuid) {
            // A lease that outlived its offer.
            None if !offered => Some(Type::EvtChanged),
            None => Some(Type::EvtOffered),
            Some(told) if now.wanted_back && !told.wanted_back => Some(Type::EvtWithdrawn),
            Some(told) if offered && (told.access, told.name) != (now.access, now.name) => {
                Some(Type::EvtOffered)
            }
            Some(told) if now.generation > told.generation => Some(Type::EvtChanged),
            Some(_) => None,
        };
        let before = self.told.insert(uuid, now);
        if kind == Some(Type::EvtWithdrawn) {
            // It tells no generation: one that advanced meanwhile is still to be told.
            if let (Some(told), Some(before)) = (self.told.get_mut(&uuid), before)
                && before.generation < told.generation
            {
                told.generation = before.generation;
                self.dirty.insert(uuid);
            }
            return gone(Type::EvtWithdrawn);
        }
        kind.map(|kind| News { kind, uuid, info: Some(info) })
    }
}

#[cfg(test)]
#[path = "watch_tests.rs"]
mod tests;
