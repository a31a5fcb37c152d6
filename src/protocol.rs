//! The bytes of the buffer sharing device as they travel between driver and device
//! (`spec/virtio-bufshare.md`, "Device operation"). Little-endian, no implicit padding.
//!
//! It knows layouts and numbers, and not what any of them means: an unknown value is a value,
//! which [`crate::command`] judges.

use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Virtio device ID. Linux and QEMU call it "dmabuf"; OASIS has not assigned it.
pub const DEVICE_ID: u32 = 37;
/// Bytes of a buffer's name, NUL padded.
pub const NAME_LEN: usize = 32;
/// Bytes of a peer's name, NUL padded.
pub const PEER_NAME_LEN: usize = 64;

/// Feature bits (spec "Feature bits"), as bit numbers.
pub mod feature {
    #![allow(missing_docs)]
    pub const IMPORT: u32 = 0;
    pub const WINDOW: u32 = 1;
    pub const COPY: u32 = 2;
    pub const TIMELINE: u32 = 3;
    pub const PEERS: u32 = 4;
    pub const READ_ONLY: u32 = 5;
}

/// Shared memory region that is the window (spec "Virtqueues").
pub const SHM_WINDOW: u8 = 1;

/// Virtqueue numbers (spec "Virtqueues").
pub mod vq {
    #![allow(missing_docs)]
    pub const CONTROL: u16 = 0;
    pub const EVENT: u16 = 1;
    pub const SYNC: u16 = 2;
    pub const COUNT: usize = 3;
}

/// Well-known peer numbers (spec "Peers").
pub mod peer {
    #![allow(missing_docs)]
    pub const NONE: u32 = 0;
    pub const HOST: u32 = 1;
    pub const ANY: u32 = u32::MAX;
    pub const F_ONLINE: u32 = 1 << 0;
    pub const F_WINDOW: u32 = 1 << 1;
}

/// Request flags (`hdr.flags`), one group a request.
pub mod flag {
    #![allow(missing_docs)]
    pub const EXPORT_DEVICE_MEMORY: u16 = 1 << 0;
    pub const EXPORT_OBJECT: u16 = 1 << 1;
    pub const EXPORT_ZERO_COPY: u16 = 1 << 2;
    pub const EXPORT_PART: u16 = 1 << 3;
    pub const GRANT_ONCE: u16 = 1 << 0;
    pub const GRANT_FORCE: u16 = 1 << 1;
    pub const RELEASE_FORCE: u16 = 1 << 0;
    pub const ATTACH_ZERO_COPY: u16 = 1 << 0;
    pub const MAP_COPY: u16 = 1 << 0;
    pub const SYNC_END: u16 = 1 << 0;
    pub const SYNC_READ: u16 = 1 << 1;
    pub const SYNC_WRITE: u16 = 1 << 2;
    pub const SYNC_NONBLOCK: u16 = 1 << 3;
}

/// Access bits of exports, grants, attachments and leases.
pub mod access {
    #![allow(missing_docs)]
    pub const READ: u32 = 1 << 0;
    pub const WRITE: u32 = 1 << 1;
}

/// How a driver maps the window.
pub mod cache {
    #![allow(missing_docs)]
    pub const CACHED: u32 = 1;
    pub const UNCACHED: u32 = 2;
    pub const WC: u32 = 3;
}

/// Metadata types.
pub mod metadata {
    #![allow(missing_docs)]
    pub const NONE: u32 = 0;
    pub const IMAGE: u32 = 1;
    pub const PRIVATE: u32 = 0x8000_0000;
}

/// Declares a wire enumeration once: the Rust enum, parsing and reporting.
macro_rules! wire_enum {
    ($(#[$doc:meta])* $name:ident : $repr:ty { $($variant:ident = $value:expr, $text:expr;)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr($repr)]
        #[allow(missing_docs)]
        pub enum $name { $($variant = $value,)* }

        impl $name {
            /// Every known value, in numeric order.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// The known value, or `None` where the number names none.
            pub fn from_wire(value: $repr) -> Option<Self> {
                Self::ALL.iter().copied().find(|known| *known as $repr == value)
            }

            /// The number on the wire.
            pub fn to_wire(self) -> $repr { self as $repr }

            /// Its name in the spec.
            pub fn name(self) -> &'static str { match self { $(Self::$variant => $text,)* } }
        }
    };
}

wire_enum! {
    /// Requests and events: one table for parsing and for reporting.
    Opcode: u16 {
        Export = 0x0100, "EXPORT";
        Grant = 0x0101, "GRANT";
        Release = 0x0102, "RELEASE";
        Query = 0x0103, "QUERY";
        SetName = 0x0104, "SET_NAME";
        QueryLinger = 0x0105, "QUERY_LINGER";
        Attach = 0x0200, "ATTACH";
        Detach = 0x0201, "DETACH";
        Map = 0x0202, "MAP";
        Unmap = 0x0203, "UNMAP";
        PeerInfo = 0x0300, "PEER_INFO";
        Cancel = 0x0301, "CANCEL";
        Sync = 0x0400, "SYNC";
        PointSignal = 0x0401, "POINT_SIGNAL";
        PointWait = 0x0402, "POINT_WAIT";
        EvtReleased = 0x1000, "RELEASED";
        EvtIdle = 0x1001, "IDLE";
        EvtBusy = 0x1002, "BUSY";
        EvtOffered = 0x1100, "OFFERED";
        EvtRevoked = 0x1101, "REVOKED";
        EvtWithdrawn = 0x1102, "WITHDRAWN";
        EvtChanged = 0x1103, "CHANGED";
        EvtPeer = 0x1200, "PEER";
        EvtResync = 0x12ff, "RESYNC";
    }
}

wire_enum! {
    /// Status of a response (spec "Status codes").
    Status: u16 {
        Ok = 0, "OK";
        Unsupp = 1, "UNSUPP";
        Inval = 2, "INVAL";
        NoEnt = 3, "NOENT";
        Access = 4, "ACCESS";
        Busy = 5, "BUSY";
        NoMem = 6, "NOMEM";
        Quota = 7, "QUOTA";
        Range = 8, "RANGE";
        Fault = 9, "FAULT";
        TooMany = 10, "TOOMANY";
        TimedOut = 11, "TIMEDOUT";
        Revoked = 12, "REVOKED";
        Canceled = 13, "CANCELED";
        Again = 14, "AGAIN";
        Io = 15, "IO";
    }
}

wire_enum! {
    /// How bytes travel between exporter and consumer.
    Mode: u32 {
        ZeroCopy = 1, "zero-copy";
        Copy = 2, "copy";
    }
}

wire_enum! {
    /// State of a handle, as RELEASE and QUERY answer it.
    State: u32 {
        Exported = 1, "exported";
        InUse = 2, "in-use";
        Releasing = 3, "releasing";
        Released = 4, "released";
        Attached = 5, "attached";
        Mapped = 6, "mapped";
        Revoked = 7, "revoked";
    }
}

/// Declares a wire structure: public fields, byte views, default zero, size checked here.
macro_rules! wire_struct {
    ($(#[$doc:meta])* $name:ident [$size:expr] { $($field:ident : $ty:ty,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
        #[repr(C)]
        #[allow(missing_docs)]
        pub struct $name { $(pub $field: $ty,)* }
        const _: () = assert!(size_of::<$name>() == $size && $size % 8 == 0);
        impl Default for $name {
            fn default() -> Self { zerocopy::FromZeros::new_zeroed() }
        }
    };
}
#[allow(unused_imports, reason = "shared with the host socket's wire file")]
pub(crate) use {wire_enum, wire_struct};

wire_struct! {
    /// Configuration space, read-only for the driver.
    Config [64] {
        peer_id: U32,
        epoch: U32,
        granule: U32,
        max_segments: U32,
        max_buffer_size: U64,
        max_total_size: U64,
        max_exports: U32,
        max_attachments: U32,
        max_mappings: U32,
        max_metadata: U32,
        event_size: U32,
        max_wait_ms: U32,
        lingering: U32,
        max_waits: U32,
    }
}
wire_struct! {
    /// Header of every request.
    Req [8] { kind: U16, flags: U16, cookie: U32, }
}
wire_struct! {
    /// Header of every response.
    Resp [8] { status: U16, reserved: U16, detail: U32, }
}
wire_struct! {
    /// One range of guest memory, or (EXPORT_F_PART) of a pool.
    Segment [16] { addr: U64, len: U64, }
}
wire_struct! {
    /// EXPORT; `nr_segments` segments and `metadata_len` bytes, padded to 8, follow.
    Export [80] {
        hdr: Req,
        size: U64,
        access: U32,
        nr_segments: U32,
        metadata_type: U32,
        metadata_len: U32,
        name: [u8; NAME_LEN],
        object: [u8; 16],
    }
}
wire_struct! {
    /// Answer to EXPORT.
    RespExport [40] { hdr: Resp, handle: U64, uuid: [u8; 16], mode: U32, reserved: U32, }
}
wire_struct! {
    /// One plane of an image.
    Plane [16] { offset: U64, stride: U32, reserved: U32, }
}
wire_struct! {
    /// Metadata of type IMAGE.
    Image [88] {
        fourcc: U32,
        nr_planes: U32,
        modifier: U64,
        width: U32,
        height: U32,
        planes: [Plane; 4],
    }
}
wire_struct! {
    /// GRANT.
    Grant [32] { hdr: Req, handle: U64, peer_id: U32, access: U32, lifetime_ms: U64, }
}
wire_struct! {
    /// RELEASE, QUERY, DETACH, QUERY_LINGER.
    Handle [16] { hdr: Req, handle: U64, }
}
wire_struct! {
    /// SET_NAME.
    SetName [48] { hdr: Req, handle: U64, name: [u8; NAME_LEN], }
}
wire_struct! {
    /// Answer to RELEASE, QUERY, QUERY_LINGER.
    RespState [56] {
        hdr: Resp,
        state: U32,
        use_count: U32,
        nr_mappings: U32,
        access: U32,
        size: U64,
        generation: U64,
        uuid: [u8; 16],
    }
}
wire_struct! {
    /// ATTACH.
    Attach [32] { hdr: Req, uuid: [u8; 16], access: U32, max_metadata: U32, }
}
wire_struct! {
    /// Answer to ATTACH; metadata follows.
    RespAttach [88] {
        hdr: Resp,
        handle: U64,
        size: U64,
        generation: U64,
        access: U32,
        exporter: U32,
        mode: U32,
        metadata_type: U32,
        metadata_len: U32,
        reserved: U32,
        name: [u8; NAME_LEN],
    }
}
wire_struct! {
    /// MAP; segments follow where MAP_F_COPY is set.
    Map [48] {
        hdr: Req,
        handle: U64,
        offset: U64,
        len: U64,
        shm_offset: U64,
        access: U32,
        nr_segments: U32,
    }
}
wire_struct! {
    /// Answer to MAP.
    RespMap [24] { hdr: Resp, mapping: U64, cache: U32, reserved: U32, }
}
wire_struct! {
    /// UNMAP.
    Unmap [16] { hdr: Req, mapping: U64, }
}
wire_struct! {
    /// SYNC, BEGIN or END.
    Sync [40] { hdr: Req, handle: U64, offset: U64, len: U64, timeout_ns: U64, }
}
wire_struct! {
    /// Answer to SYNC.
    RespSync [16] { hdr: Resp, generation: U64, }
}
mod point;
pub use point::{Line, Point, RespPoint};

wire_struct! {
    /// CANCEL.
    Cancel [24] { hdr: Req, handle: U64, cookie: U32, reserved: U32, }
}
wire_struct! {
    /// PEER_INFO.
    PeerInfo [16] { hdr: Req, index: U32, reserved: U32, }
}
wire_struct! {
    /// Answer to PEER_INFO.
    RespPeerInfo [88] {
        hdr: Resp,
        nr_peers: U32,
        peer_id: U32,
        flags: U32,
        epoch: U32,
        name: [u8; PEER_NAME_LEN],
    }
}
wire_struct! {
    /// Every event.
    Event [64] {
        kind: U16,
        flags: U16,
        status: U32,
        handle: U64,
        uuid: [u8; 16],
        peer_id: U32,
        access: U32,
        size: U64,
        generation: U64,
        metadata_type: U32,
        epoch: U32,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_opcode_is_known_or_none() {
        let known = (0..=u16::MAX).filter_map(Opcode::from_wire).count();
        assert_eq!(known, Opcode::ALL.len());
        assert!(Opcode::ALL.iter().all(|op| Opcode::from_wire(op.to_wire()) == Some(*op)));
    }
}
