//! The bytes of the host socket (`spec/host-socket.md`; in C: `include/bufshare-host.h`).
//! Little-endian, no implicit padding.
//!
//! It knows layouts and numbers, and not what any of them means. Statuses, modes, access bits, SYNC
//! flags and metadata are those of the virtio device, in [`crate::protocol`].

use crate::protocol::{NAME_LEN, PEER_NAME_LEN, wire_enum, wire_struct};
use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Version of the protocol that this library speaks.
pub const VERSION: u32 = 1;
/// Bytes of the longest packet in either direction.
pub const MAX_PACKET: usize = 8192;
/// Bytes of the daemon's name in HELLO, NUL padded.
pub const DAEMON_NAME_LEN: usize = 64;
/// Bytes of a statistic's name, NUL padded.
pub const STAT_NAME_LEN: usize = 32;

/// Flags of requests and leases.
pub mod flag {
    #![allow(missing_docs)]
    pub const ACQUIRE_ZERO_COPY: u16 = 1 << 0;
    /// ACQUIRE: time to finish when the exporter takes the buffer back by force.
    pub const ACQUIRE_NOTICE: u16 = 1 << 1;
    pub const LEASE_WRITABLE: u32 = 1 << 0;
    pub const HOLDER_REVOKED: u32 = 1 << 0;
    pub const HOLDER_FENCE: u32 = 1 << 1;
    pub const REPORT_OWNER_GONE: u32 = 1 << 0;
    pub const PEER_ONLINE: u32 = 1 << 0;
}

wire_enum! {
    /// Requests and events: one table for parsing and for reporting.
    Type: u16 {
        Hello = 0x0001, "HELLO";
        List = 0x0002, "LIST";
        Watch = 0x0003, "WATCH";
        Query = 0x0004, "QUERY";
        Stats = 0x0005, "STATS";
        Inspect = 0x0006, "INSPECT";
        Holders = 0x0007, "HOLDERS";
        Peers = 0x0008, "PEERS";
        Acquire = 0x0100, "ACQUIRE";
        Release = 0x0101, "RELEASE";
        Sync = 0x0102, "SYNC";
        Cancel = 0x0103, "CANCEL";
        PointSignal = 0x0104, "POINT_SIGNAL";
        PointWait = 0x0105, "POINT_WAIT";
        Export = 0x0200, "EXPORT";
        Grant = 0x0201, "GRANT";
        EvtReleased = 0x1000, "RELEASED";
        EvtIdle = 0x1001, "IDLE";
        EvtBusy = 0x1002, "BUSY";
        EvtOffered = 0x1100, "OFFERED";
        EvtRevoked = 0x1101, "REVOKED";
        EvtWithdrawn = 0x1102, "WITHDRAWN";
        EvtChanged = 0x1103, "CHANGED";
        EvtResync = 0x12ff, "RESYNC";
    }
}

wire_enum! {
    /// What the fd of a lease is.
    FdKind: u32 {
        DmaBuf = 1, "dma-buf";
        MemFd = 2, "memfd";
    }
}

wire_enum! {
    /// What a holder has.
    HolderKind: u32 {
        Exporter = 1, "exporter";
        Lease = 2, "lease";
        Attachment = 3, "attachment";
    }
}

wire_enum! {
    /// Why an fd cannot be exported: `detail` of FAULT.
    Fault: u32 {
        Kind = 1, "KIND";
        Unsealed = 2, "UNSEALED";
        Access = 3, "ACCESS";
        Size = 4, "SIZE";
        Map = 5, "MAP";
    }
}

wire_struct! {
    /// Header of every request.
    Req [16] { kind: U16, flags: U16, reserved: U32, cookie: U64, }
}
wire_struct! {
    /// Header of every response and event.
    Resp [16] { kind: U16, status: U16, detail: U32, cookie: U64, }
}
wire_struct! {
    /// A buffer that is offered to the host.
    Buffer [160] {
        uuid: [u8; 16],
        name: [u8; NAME_LEN],
        exporter_name: [u8; PEER_NAME_LEN],
        size: U64,
        generation: U64,
        exporter: U32,
        access: U32,
        mode: U32,
        use_count: U32,
        metadata_type: U32,
        metadata_len: U32,
        reserved: [U32; 2],
    }
}
wire_struct! {
    /// HELLO, the first request of a connection.
    Hello [56] { hdr: Req, version: U32, reserved: U32, name: [u8; NAME_LEN], }
}
wire_struct! {
    /// Answer to HELLO.
    RespHello [104] {
        hdr: Resp,
        version: U32,
        peer_id: U32,
        max_leases: U32,
        max_waits: U32,
        max_wait_ms: U32,
        max_exports: U32,
        daemon: [u8; DAEMON_NAME_LEN],
    }
}
wire_struct! {
    /// LIST: the offers whose UUIDs follow `after`.
    List [32] { hdr: Req, after: [u8; 16], }
}
wire_struct! {
    /// Answer to LIST; `count` buffers follow.
    RespList [24] { hdr: Resp, count: U32, reserved: U32, }
}
wire_struct! {
    /// WATCH.
    Watch [32] { hdr: Req, uuid: [u8; 16], }
}
wire_struct! {
    /// Every event.
    Event [176] { hdr: Resp, buffer: Buffer, }
}
wire_struct! {
    /// QUERY.
    Query [32] { hdr: Req, uuid: [u8; 16], }
}
wire_struct! {
    /// One lease of a buffer.
    Lease [48] { lease: U64, pid: U32, access: U32, client: [u8; NAME_LEN], }
}
wire_struct! {
    /// Answer to QUERY; metadata, padded to 8, and `count` leases follow.
    RespQuery [184] { hdr: Resp, buffer: Buffer, count: U32, nr_leases: U32, }
}
wire_struct! {
    /// STATS: values from `first` on.
    Stats [24] { hdr: Req, first: U32, reserved: U32, }
}
wire_struct! {
    /// One statistic.
    Stat [40] { name: [u8; STAT_NAME_LEN], value: U64, }
}
wire_struct! {
    /// Answer to STATS; `count` statistics follow.
    RespStats [24] { hdr: Resp, count: U32, nr_stats: U32, }
}
wire_struct! {
    /// PEERS: those from `first` on.
    Peers [24] { hdr: Req, first: U32, reserved: U32, }
}
wire_struct! {
    /// A VM that may share with the host.
    Peer [80] { peer_id: U32, flags: U32, access: U32, reserved: U32, name: [u8; PEER_NAME_LEN], }
}
wire_struct! {
    /// Answer to PEERS; `count` peers follow.
    RespPeers [24] { hdr: Resp, count: U32, nr_peers: U32, }
}
wire_struct! {
    /// ACQUIRE.
    Acquire [40] { hdr: Req, uuid: [u8; 16], access: U32, reserved: U32, }
}
wire_struct! {
    /// Answer to ACQUIRE; metadata follows, and one fd travels with it.
    RespAcquire [200] {
        hdr: Resp,
        lease: U64,
        access: U32,
        mode: U32,
        fd_kind: U32,
        flags: U32,
        buffer: Buffer,
    }
}
wire_struct! {
    /// RELEASE of a lease or an export.
    Release [24] { hdr: Req, lease: U64, }
}
wire_struct! {
    /// Answer to RELEASE.
    RespRelease [24] { hdr: Resp, state: U32, use_count: U32, }
}
wire_struct! {
    /// SYNC, BEGIN or END.
    Sync [48] { hdr: Req, lease: U64, offset: U64, len: U64, timeout_ns: U64, }
}
wire_struct! {
    /// Answer to SYNC.
    RespSync [24] { hdr: Resp, generation: U64, }
}
wire_struct! {
    /// POINT_SIGNAL, POINT_WAIT.
    Point [48] { hdr: Req, lease: U64, timeline: U32, error: U32, point: U64, timeout_ns: U64, }
}
wire_struct! {
    /// Answer to them.
    RespPoint [24] { hdr: Resp, reached: U64, }
}
wire_struct! {
    /// CANCEL.
    Cancel [24] { hdr: Req, target: U64, }
}
wire_struct! {
    /// EXPORT; metadata follows, and one fd travels with it.
    Export [72] {
        hdr: Req,
        size: U64,
        access: U32,
        metadata_type: U32,
        metadata_len: U32,
        reserved: U32,
        name: [u8; NAME_LEN],
    }
}
wire_struct! {
    /// Answer to EXPORT.
    RespExport [48] { hdr: Resp, handle: U64, uuid: [u8; 16], fd_kind: U32, reserved: U32, }
}
wire_struct! {
    /// GRANT.
    Grant [40] { hdr: Req, handle: U64, peer_id: U32, access: U32, lifetime_ms: U64, }
}

wire_struct! {
    /// INSPECT: reports of the buffers whose UUIDs follow `after`.
    Inspect [32] { hdr: Req, after: [u8; 16], }
}
wire_struct! {
    /// A buffer and how it is used.
    Report [192] {
        buffer: Buffer,
        age_ms: U64,
        state: U32,
        nr_leases: U32,
        nr_attachments: U32,
        nr_mappings: U32,
        nr_waits: U32,
        flags: U32,
    }
}
wire_struct! {
    /// Answer to INSPECT; `count` reports follow.
    RespInspect [24] { hdr: Resp, count: U32, reserved: U32, }
}
wire_struct! {
    /// HOLDERS of one buffer, from `first` on.
    Holders [40] { hdr: Req, uuid: [u8; 16], first: U32, reserved: U32, }
}
wire_struct! {
    /// Somebody with a right to a buffer.
    Holder [152] {
        name: [u8; PEER_NAME_LEN],
        number: U64,
        age_ms: U64,
        kind: U32,
        peer: U32,
        pid: U32,
        access: U32,
        holds: U32,
        waits: U32,
        place: U32,
        left_ms: U32,
        nr_mappings: U32,
        flags: U32,
        acquire_point: U64,
        release_point: U64,
        released: U64,
        points_left_ms: U32,
        reserved: U32,
    }
}
wire_struct! {
    /// Answer to HOLDERS; `count` holders follow.
    RespHolders [248] {
        hdr: Resp,
        report: Report,
        device: U64,
        inode: U64,
        references: U32,
        fd_kind: U32,
        count: U32,
        nr_holders: U32,
        acquired: U64,
    }
}

/// UTF-8 text in a NUL-padded field, cut at a character's boundary where it is too long.
pub fn pad_text<const N: usize>(text: &str) -> [u8; N] {
    let mut field = [0; N];
    let mut end = text.len().min(N);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    field[..end].copy_from_slice(&text.as_bytes()[..end]);
    field
}

/// The text of a NUL-padded field; bytes that are no UTF-8 are replaced, control characters too.
pub fn field_text(field: &[u8]) -> String {
    let end = field.iter().position(|byte| *byte == 0).unwrap_or(field.len());
    String::from_utf8_lossy(&field[..end])
        .chars()
        .map(|c| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c })
        .collect()
}

#[cfg(test)]
#[path = "wire_tests.rs"]
mod tests;
