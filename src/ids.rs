//! Newtypes for the numbers of different kinds that meet in this crate.
//!
//! They know nothing of what they name. There is no conversion between them: crossing from one kind
//! to another is a decision that the code spells out.

use std::fmt;

use serde::{Deserialize, Serialize};

macro_rules! id {
    ($(#[$doc:meta])* $name:ident($repr:ty)) => {
        $(#[$doc])*
        #[derive(
            Debug, Default, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize,
        )]
        pub struct $name(pub $repr);
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

id! {
    /// An endpoint: the host (1) or a VM (from 2, in the order of `--vm`).
    PeerId(u32)
}
id! {
    /// An endpoint's own number for an export, as on the wire. Never reused within a session.
    HandleId(u64)
}
id! {
    /// The registry's own number for a buffer. Never leaves the daemon.
    BufferKey(u64)
}
id! {
    /// A host client's use of a buffer. Never reused.
    LeaseId(u64)
}
id! {
    /// A VM's use of another VM's buffer. Never reused, never leaves the daemon.
    AttachmentId(u64)
}
id! {
    /// An endpoint's own number for a mapping, as on the wire. Never reused within a session.
    MappingId(u64)
}
id! {
    /// A range of a VM's window that its VMM is asked to map. Never reused, never leaves the daemon.
    PlaceId(u64)
}
id! {
    /// The window of one connection to a VM's VMM. Never reused.
    WindowId(u64)
}
id! {
    /// A connection to the host socket. Never reused.
    ClientId(u64)
}
id! {
    /// The number by which a driver or client names its own pending request.
    Cookie(u32)
}

/// One life of a VM's device, from connection or reset to reset or disconnect. Never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SessionId {
    /// Whose.
    pub peer: PeerId,
    /// Which of all.
    pub number: u64,
}

/// A file that others can hold, too, as `fstat` tells it from all others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileId {
    /// Device.
    pub dev: u64,
    /// Inode.
    pub ino: u64,
}

/// Bytes of a window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WindowRange {
    /// From its start.
    pub start: u64,
    /// How many.
    pub len: u64,
}

impl WindowRange {
    /// The first byte behind it.
    pub fn end(self) -> u64 {
        self.start.saturating_add(self.len)
    }

    /// Whether a byte is in both.
    pub fn overlaps(self, other: WindowRange) -> bool {
        self.start < other.end() && other.start < self.end()
    }
}

impl PeerId {
    /// The host.
    pub const HOST: PeerId = PeerId(crate::protocol::peer::HOST);
    /// In a grant: every peer that policy allows.
    pub const ANY: PeerId = PeerId(crate::protocol::peer::ANY);
    /// The first VM.
    pub const FIRST_VM: PeerId = PeerId(2);
}

/// Who may do what with a buffer: a set of READ and WRITE.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Access {
    /// READ.
    pub read: bool,
    /// WRITE.
    pub write: bool,
}

impl Access {
    /// READ alone.
    pub const READ: Access = Access { read: true, write: false };
    /// WRITE alone.
    pub const WRITE: Access = Access { read: false, write: true };
    /// READ and WRITE.
    pub const ALL: Access = Access { read: true, write: true };
    /// Neither.
    pub const NONE: Access = Access { read: false, write: false };

    /// The set that the wire bits name; `None` where an unknown bit is set.
    pub fn from_bits(bits: u32) -> Option<Access> {
        use crate::protocol::access::{READ, WRITE};
        (bits & !(READ | WRITE) == 0)
            .then_some(Access { read: bits & READ != 0, write: bits & WRITE != 0 })
    }

    /// The wire bits.
    pub fn bits(self) -> u32 {
        u32::from(self.read) * crate::protocol::access::READ
            + u32::from(self.write) * crate::protocol::access::WRITE
    }

    /// Whether every access of `other` is in this set.
    pub fn contains(self, other: Access) -> bool {
        (self.read || !other.read) && (self.write || !other.write)
    }

    /// The accesses that are in both sets.
    pub fn intersect(self, other: Access) -> Access {
        Access { read: self.read && other.read, write: self.write && other.write }
    }

    /// The accesses that are in either set.
    pub fn union(self, other: Access) -> Access {
        Access { read: self.read || other.read, write: self.write || other.write }
    }

    /// The accesses of this set that are not in `other`.
    pub fn minus(self, other: Access) -> Access {
        Access { read: self.read && !other.read, write: self.write && !other.write }
    }

    /// Whether the set is empty.
    pub fn is_none(self) -> bool {
        self == Access::NONE
    }
}
