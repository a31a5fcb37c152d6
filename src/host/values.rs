//! Typed forms of what the host socket tells: buffers, leases, events.
//!
//! They hold what the daemon said, not whether it is still so.

use std::os::fd::OwnedFd;
use std::time::Duration;

use uuid::Uuid;

use super::wire::{self, FdKind};
use crate::protocol::{self, Mode, Status};

/// What HELLO told.
#[derive(Debug, Clone)]
pub struct Daemon {
    /// Name and release of the daemon.
    pub name: String,
    /// The peer id of the host.
    pub peer_id: u32,
    /// Leases that this client can have.
    pub max_leases: u32,
    /// Buffers that this client can export.
    pub max_exports: u32,
    /// BEGINs of this client that can be pending.
    pub max_waits: u32,
    /// No wait lasts longer.
    pub max_wait: Duration,
}

/// A buffer that is, or was, offered to the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Buffer {
    /// What names it on this host.
    pub uuid: Uuid,
    /// For people.
    pub name: String,
    /// Peer id.
    pub exporter: u32,
    /// The operator's name for the exporting VM.
    pub exporter_name: String,
    /// Bytes.
    pub size: u64,
    /// How often its content was declared complete.
    pub generation: u64,
    /// The most that a lease can have (`protocol::access`); 0 when it is not offered any more.
    pub access: u32,
    /// How bytes travel; `None` is a mode that this library does not know.
    pub mode: Option<Mode>,
    /// Attachments + leases + 1 if others on the host hold it.
    pub use_count: u32,
    /// `protocol::metadata`, or private to the users.
    pub metadata_type: u32,
    /// Bytes.
    pub metadata_len: u32,
}

impl From<&wire::Buffer> for Buffer {
    fn from(raw: &wire::Buffer) -> Self {
        Buffer {
            uuid: Uuid::from_bytes(raw.uuid),
            name: wire::field_text(&raw.name),
            exporter: raw.exporter.get(),
            exporter_name: wire::field_text(&raw.exporter_name),
            size: raw.size.get(),
            generation: raw.generation.get(),
            access: raw.access.get(),
            mode: Mode::from_wire(raw.mode.get()),
            use_count: raw.use_count.get(),
            metadata_type: raw.metadata_type.get(),
            metadata_len: raw.metadata_len.get(),
        }
    }
}

/// A lease that some client has, as QUERY tells it.
#[derive(Debug, Clone)]
#[allow(missing_docs)]
pub struct LeaseInfo {
    pub lease: u64,
    pub pid: u32,
    pub access: u32,
    pub client: String,
}

/// Answer to QUERY.
#[derive(Debug, Clone)]
pub struct Details {
    /// The buffer.
    pub buffer: Buffer,
    /// What the exporter said of its content; judge it before use
    /// ([`Image::parse`](super::image::Image::parse)).
    pub metadata: Vec<u8>,
    /// As many leases as fit the answer.
    pub leases: Vec<LeaseInfo>,
    /// How many there are.
    pub nr_leases: u32,
}

/// A lease and its fd. Dropping it closes the fd but does not end the lease:
/// [`Client::release`](super::client::Client::release) does, or the end of the connection.
#[derive(Debug)]
pub struct Lease {
    /// Its number in SYNC and RELEASE.
    pub id: u64,
    /// The buffer's memory: the exporter's own, or the copy that SYNC fills.
    pub fd: OwnedFd,
    /// What the fd is.
    pub fd_kind: FdKind,
    /// The mode of this lease.
    pub mode: Mode,
    /// What this lease may do (`protocol::access`).
    pub access: u32,
    /// The kernel would let this process write although `access` says READ. It must not.
    pub writable: bool,
    /// The buffer when the lease began.
    pub buffer: Buffer,
    /// What the exporter said of its content.
    pub metadata: Vec<u8>,
}

/// A VM that may share with the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// Peer id.
    pub id: u32,
    /// The operator's name for it.
    pub name: String,
    /// Its device is in use.
    pub online: bool,
    /// The most that a host client can grant it (`protocol::access`); 0: nothing, by policy.
    pub access: u32,
}

impl From<&wire::Peer> for Peer {
    fn from(raw: &wire::Peer) -> Self {
        Peer {
            id: raw.peer_id.get(),
            name: wire::field_text(&raw.name),
            online: raw.flags.get() & wire::flag::PEER_ONLINE != 0,
            access: raw.access.get(),
        }
    }
}

/// A buffer that this client lends, until it takes it back or the connection ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Export {
    /// Stands for it in requests.
    pub handle: u64,
    /// What names it for importers.
    pub uuid: Uuid,
    /// DMA-BUF: VMs can map it, if their VMM has a window. MEMFD: they get copies.
    pub fd_kind: FdKind,
}

/// What WATCH told, or what happened to an export of this client.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Event {
    Offered(Buffer),
    /// Also of an own export, whose exporter is the host.
    Changed(Buffer),
    /// VMs use an own export.
    Busy(Buffer),
    /// No VM uses an own export any more.
    Idle(Buffer),
    /// The memory of an own export that was taken back is used by no VM any more.
    Released {
        uuid: Uuid,
    },
    Withdrawn {
        uuid: Uuid,
        reason: Option<Status>,
    },
    Revoked {
        uuid: Uuid,
        reason: Option<Status>,
    },
    /// The daemon lost track: send WATCH again.
    Resync,
}

/// The bits and the range of BEGIN and END.
#[derive(Debug, Clone, Copy)]
pub struct Access {
    /// `protocol::access`.
    pub bits: u32,
    /// Bytes from the start of the buffer.
    pub offset: u64,
    /// Bytes; 0: to the end.
    pub len: u64,
}

impl Access {
    /// READ of the whole buffer.
    pub const READ: Access = Access { bits: protocol::access::READ, offset: 0, len: 0 };
    /// WRITE of the whole buffer.
    pub const WRITE: Access = Access { bits: protocol::access::WRITE, offset: 0, len: 0 };

    pub(super) fn flags(self) -> u16 {
        let bit = |bit, flag| if self.bits & bit != 0 { flag } else { 0 };
        bit(protocol::access::READ, protocol::flag::SYNC_READ)
            | bit(protocol::access::WRITE, protocol::flag::SYNC_WRITE)
    }
}
