//! What follows from operations on the registry, for the rest of the daemon. Pure.
//!
//! It knows what is to be done, not how or by whom.

use std::collections::BTreeSet;

use uuid::Uuid;

use super::Origin;
use crate::ids::{Access, BufferKey, ClientId, LeaseId, MappingId, PeerId};
use crate::protocol::Status;

/// What the rest of the daemon has to do after an operation, with the lock released.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outbox<H> {
    /// VMs with an event to deliver.
    pub wake: BTreeSet<PeerId>,
    /// Waits that ended.
    pub done: Vec<Done>,
    /// News for host clients.
    pub notices: Vec<Notice>,
    /// Host clients with an event of their exports.
    pub exporters: BTreeSet<ClientId>,
    /// Memory that is no longer needed.
    pub drop: Vec<H>,
    /// Buffers whose foreign references must be counted now.
    pub observe: BTreeSet<BufferKey>,
    /// BEGINs that were given their bits, if the fences of the host are over.
    pub fences: Vec<Fences<H>>,
    /// A deadline may have come nearer.
    pub clock: bool,
    /// Decisions about rights.
    pub audit: Vec<Audit>,
    /// MAPs and UNMAPs that ended.
    pub settled: Vec<Settled>,
    /// VMs whose VMM may have something to be asked.
    pub vmm: BTreeSet<PeerId>,
}

impl<H> Default for Outbox<H> {
    fn default() -> Self {
        Outbox {
            wake: BTreeSet::new(),
            done: Vec::new(),
            notices: Vec::new(),
            exporters: BTreeSet::new(),
            drop: Vec::new(),
            observe: BTreeSet::new(),
            fences: Vec::new(),
            clock: false,
            audit: Vec::new(),
            settled: Vec::new(),
            vmm: BTreeSet::new(),
        }
    }
}

/// Fences that must be looked at now, then given to [`Registry::fence_over`](super::Registry) or
/// `fence_pending`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fences<H> {
    /// Who looks.
    pub wait: FenceWait,
    /// In what.
    pub memory: H,
    /// Those of readers count, too.
    pub write: bool,
    /// What the BEGIN ends with rather than wait for them.
    pub unless: Option<Status>,
}

/// A BEGIN in front of fences.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FenceWait {
    pub(super) key: BufferKey,
    /// Whose it is; nobody has two of them under the same number.
    pub origin: Origin,
}

/// A MAP or UNMAP that waited for the VMM, and ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settled {
    /// Whose.
    pub peer: PeerId,
    /// The device's number for the chain.
    pub token: u64,
    /// How it ended.
    pub status: Status,
    /// Of a MAP that is done.
    pub mapping: Option<MappingId>,
}

/// A wait that ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Done {
    /// Whom to tell.
    pub origin: Origin,
    /// How it ended.
    pub status: Status,
    /// Generation of the content, or what the timeline reached.
    pub value: u64,
}

/// News about a buffer that the host may use, or could.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Notice {
    /// The host may acquire it.
    Offered(Uuid),
    /// The host may no longer acquire it.
    Withdrawn(Uuid),
    /// Its content was declared complete again, by this client or by the exporter.
    Changed {
        /// Which.
        uuid: Uuid,
        /// How often so far.
        generation: u64,
        /// Who need not be told.
        writer: Option<ClientId>,
    },
    /// A lease is dead; what is left is to hand it back.
    Revoked {
        /// Whose.
        client: ClientId,
        /// Which.
        lease: LeaseId,
        /// Of what.
        uuid: Uuid,
    },
}

/// A decision about rights, for the operator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Audit {
    /// GRANT; no access is a withdrawal.
    Granted { exporter: PeerId, to: PeerId, uuid: Uuid, access: Access },
    /// ATTACH.
    Attached { importer: PeerId, exporter: PeerId, uuid: Uuid, access: Access },
    /// ATTACH that was refused: the UUID is what the importer said, right or wrong.
    Denied { importer: PeerId, uuid: Uuid, status: Status },
    /// An attachment lost its rights.
    Revoked { importer: PeerId, exporter: PeerId, uuid: Uuid },
}
