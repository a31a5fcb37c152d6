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
    pub const LEASE_WRITABLE: u32 = 1 << 0;
    pub const HOLDER_REVOKED: u32 = 1 << 0;
    pub const HOLDER_FENCE: u32 = 1 << 1;
    pub const REPORT_OWNER_GONE: u32 = 1 << 0;
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
        Acquire = 0x0100, "ACQUIRE";
        Release = 0x0101, "RELEASE";
        Sync = 0x0102, "SYNC";
        Cancel = 0x0103, "CANCEL";
        PointSignal = 0x0104, "POINT_SIGNAL";
        PointWait = 0x0105, "POINT_WAIT";
        Export = 0x0200, "EXPORT";
        Grant = 0x0201, "GRANT";
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
        reserved: U32,
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
    /// RELEASE.
    Release [24] { hdr: Req, lease: U64, }
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
    /// CANCEL.
    Cancel [24] { hdr: Req, target: U64, }
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
    Holder [120] {
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
    }
}
wire_struct! {
    /// Answer to HOLDERS; `count` holders follow.
    RespHolders [240] {
        hdr: Resp,
        report: Report,
        device: U64,
        inode: U64,
        references: U32,
        fd_kind: U32,
        count: U32,
        nr_holders: U32,
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
mod tests {
    use super::*;

    #[test]
    fn every_type_is_known_or_none() {
        let known = (0..=u16::MAX).filter_map(Type::from_wire).count();
        assert_eq!(known, Type::ALL.len());
        assert!(Type::ALL.iter().all(|kind| Type::from_wire(kind.to_wire()) == Some(*kind)));
    }

    #[test]
    fn names_fit_their_fields() {
        assert_eq!(field_text(&pad_text::<8>("frame")), "frame");
        assert_eq!(field_text(&pad_text::<8>("12345678")), "12345678");
        assert_eq!(field_text(&pad_text::<4>("abcé")), "abc");
        assert_eq!(field_text(b"a\x1b[2Jb"), "a\u{fffd}[2Jb");
    }

    #[test]
    fn numbers_and_sizes_equal_those_of_the_c_header_and_of_the_document() {
        let header = include_str!("../../include/bufshare-host.h");
        for kind in Type::ALL {
            let prefix = if kind.to_wire() >= 0x1000 { "EVT_" } else { "" };
            let line = format!("BUFSHARE_HOST_{prefix}{}", kind.name());
            let value = format!("= {:#06x},", kind.to_wire());
            assert!(
                header.lines().any(|l| l.trim_start().starts_with(&line) && l.contains(&value)),
                "{line} {value}"
            );
        }
        for status in crate::protocol::Status::ALL {
            let line = format!("BUFSHARE_S_{}", status.name());
            let value = format!("= {},", status.to_wire());
            assert!(
                header.lines().any(|l| l.trim_start().starts_with(&line) && l.contains(&value)),
                "{line} {value}"
            );
        }
        let document = include_str!("../../spec/host-socket.md");
        let listings: String =
            document.split("```c\n").skip(1).filter_map(|rest| rest.split("```").next()).collect();
        let mut listed = 0;
        for line in listings.lines().filter(|line| !line.is_empty()) {
            assert!(header.lines().any(|l| l == line), "not in the header: {line}");
            listed += 1;
        }
        assert!(listed > 100, "{listed} lines listed");
        for line in header.lines().filter(|l| l.starts_with("struct ") && l.contains('{')) {
            assert!(listings.contains(line), "not in the document: {line}");
        }
        let sizes = [
            ("host_req", size_of::<Req>()),
            ("host_resp", size_of::<Resp>()),
            ("host_buffer", size_of::<Buffer>()),
            ("plane", size_of::<crate::protocol::Plane>()),
            ("image", size_of::<crate::protocol::Image>()),
            ("host_hello", size_of::<Hello>()),
            ("host_resp_hello", size_of::<RespHello>()),
            ("host_list", size_of::<List>()),
            ("host_resp_list", size_of::<RespList>()),
            ("host_watch", size_of::<Watch>()),
            ("host_event", size_of::<Event>()),
            ("host_query", size_of::<Query>()),
            ("host_lease", size_of::<Lease>()),
            ("host_resp_query", size_of::<RespQuery>()),
            ("host_stats", size_of::<Stats>()),
            ("host_stat", size_of::<Stat>()),
            ("host_resp_stats", size_of::<RespStats>()),
            ("host_acquire", size_of::<Acquire>()),
            ("host_resp_acquire", size_of::<RespAcquire>()),
            ("host_release", size_of::<Release>()),
            ("host_sync", size_of::<Sync>()),
            ("host_resp_sync", size_of::<RespSync>()),
            ("host_cancel", size_of::<Cancel>()),
            ("host_inspect", size_of::<Inspect>()),
            ("host_report", size_of::<Report>()),
            ("host_resp_inspect", size_of::<RespInspect>()),
            ("host_holders", size_of::<Holders>()),
            ("host_holder", size_of::<Holder>()),
            ("host_resp_holders", size_of::<RespHolders>()),
        ];
        assert_eq!(sizes.len(), header.matches("BUFSHARE_SIZE(bufshare_").count());
        for (name, size) in sizes {
            let line = format!("BUFSHARE_SIZE(bufshare_{name}, {size});");
            assert!(header.contains(&line), "{line}");
        }
    }
}
