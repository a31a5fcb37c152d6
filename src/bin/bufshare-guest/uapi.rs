//! `include/uapi/linux/bufshare.h` of the guest driver: structures and request numbers of
//! /dev/bufshareN. ABI facts only; `tests/uapi.rs` compares them with the header.

use bufshare::ioctl::{ior, iow, iowr};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Declares a structure whose size is checked here.
macro_rules! uapi {
    ($name:ident [$size:expr] { $($field:ident : $ty:ty,)* }) => {
        #[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable)]
        #[repr(C)]
        pub struct $name { $(pub $field: $ty,)* }
        const _: () = assert!(size_of::<$name>() == $size);
        impl Default for $name {
            fn default() -> Self {
                zerocopy::FromZeros::new_zeroed()
            }
        }
    };
}

uapi! {
    Info [88] {
        flags: u32,
        peer_id: u32,
        epoch: u32,
        lingering: u32,
        granule: u32,
        max_segments: u32,
        max_buffer_size: u64,
        max_total_size: u64,
        max_exports: u32,
        max_metadata: u32,
        max_wait_ms: u32,
        max_waits: u32,
        features: u64,
        quarantined: u32,
        max_attachments: u32,
        window: u64,
        max_mappings: u32,
        reserved: u32,
    }
}
uapi! {
    Alloc [32] { size: u64, flags: u32, fd: i32, reserved: [u64; 2], }
}
uapi! {
    Export [128] {
        fd: i32,
        flags: u32,
        access: u32,
        mode: u32,
        pool: u64,
        offset: u64,
        size: u64,
        metadata: u64,
        metadata_len: u32,
        metadata_type: u32,
        name: [u8; 32],
        handle: u64,
        uuid: [u8; 16],
        reserved: [u64; 2],
    }
}
uapi! {
    Grant [32] {
        handle: u64,
        peer_id: u32,
        access: u32,
        lifetime_ms: u64,
        flags: u32,
        reserved: u32,
    }
}
uapi! {
    Sync [48] {
        handle: u64,
        offset: u64,
        len: u64,
        timeout_ns: u64,
        flags: u32,
        reserved: u32,
        generation: u64,
    }
}
uapi! {
    Name [40] { handle: u64, name: [u8; 32], }
}
uapi! {
    Query [64] {
        handle: u64,
        state: u32,
        use_count: u32,
        nr_mappings: u32,
        access: u32,
        size: u64,
        generation: u64,
        uuid: [u8; 16],
        mode: u32,
        reserved: u32,
    }
}
uapi! {
    Release [16] { handle: u64, flags: u32, state: u32, }
}
uapi! {
    Peer [88] {
        index: u32,
        nr_peers: u32,
        peer_id: u32,
        flags: u32,
        epoch: u32,
        reserved: u32,
        name: [u8; 64],
    }
}
uapi! {
    Attach [128] {
        uuid: [u8; 16],
        flags: u32,
        access: u32,
        metadata: u64,
        metadata_len: u32,
        metadata_type: u32,
        fd: i32,
        mode: u32,
        handle: u64,
        offset: u64,
        size: u64,
        generation: u64,
        exporter: u32,
        reserved: u32,
        name: [u8; 32],
        reserved2: u64,
    }
}
uapi! {
    Offer [56] {
        id: u32,
        peer_id: u32,
        uuid: [u8; 16],
        size: u64,
        generation: u64,
        access: u32,
        metadata_type: u32,
        reserved: u64,
    }
}
uapi! {
    PointSignal [24] { handle: u64, point: u64, timeline: u32, error: u32, }
}
uapi! {
    PointWait [40] {
        handle: u64,
        point: u64,
        timeline: u32,
        flags: u32,
        timeout_ns: u64,
        reached: u64,
    }
}
uapi! {
    PointEventfd [32] {
        handle: u64,
        point: u64,
        timeline: u32,
        fd: i32,
        flags: u32,
        reserved: u32,
    }
}
uapi! {
    Event [64] {
        kind: u16,
        flags: u16,
        status: u32,
        handle: u64,
        uuid: [u8; 16],
        peer_id: u32,
        access: u32,
        size: u64,
        generation: u64,
        metadata_type: u32,
        epoch: u32,
    }
}

pub const IOC_INFO: u32 = ior(0xbd, 0x00, size_of::<Info>());
pub const IOC_ALLOC: u32 = iowr(0xbd, 0x01, size_of::<Alloc>());
pub const IOC_EXPORT: u32 = iowr(0xbd, 0x02, size_of::<Export>());
pub const IOC_GRANT: u32 = iow(0xbd, 0x03, size_of::<Grant>());
pub const IOC_SYNC: u32 = iowr(0xbd, 0x04, size_of::<Sync>());
pub const IOC_SET_NAME: u32 = iow(0xbd, 0x05, size_of::<Name>());
pub const IOC_QUERY: u32 = iowr(0xbd, 0x06, size_of::<Query>());
pub const IOC_RELEASE: u32 = iowr(0xbd, 0x07, size_of::<Release>());
pub const IOC_PEER: u32 = iowr(0xbd, 0x08, size_of::<Peer>());
pub const IOC_ATTACH: u32 = iowr(0xbd, 0x09, size_of::<Attach>());
pub const IOC_OFFER: u32 = iowr(0xbd, 0x0a, size_of::<Offer>());
pub const IOC_POINT_SIGNAL: u32 = iow(0xbd, 0x0b, size_of::<PointSignal>());
pub const IOC_POINT_WAIT: u32 = iowr(0xbd, 0x0c, size_of::<PointWait>());
pub const IOC_POINT_EVENTFD: u32 = iow(0xbd, 0x0d, size_of::<PointEventfd>());

pub const INFO_F_ALIVE: u32 = 1 << 0;
pub const ACCESS_READ: u32 = 1 << 0;
pub const ACCESS_WRITE: u32 = 1 << 1;
pub const MODE_ZERO_COPY: u32 = 1;
pub const MODE_COPY: u32 = 2;
pub const EXPORT_F_ZERO_COPY: u32 = 1 << 0;
pub const EXPORT_F_PART: u32 = 1 << 1;
pub const ATTACH_F_ZERO_COPY: u32 = 1 << 0;
pub const SYNC_F_END: u32 = 1 << 0;
pub const SYNC_F_READ: u32 = 1 << 1;
pub const SYNC_F_WRITE: u32 = 1 << 2;
pub const SYNC_F_NONBLOCK: u32 = 1 << 3;
pub const TIMELINE_ACQUIRE: u32 = 0;
pub const TIMELINE_RELEASE: u32 = 1;
pub const POINT_F_NONBLOCK: u32 = 1 << 0;
pub const RELEASE_F_FORCE: u32 = 1 << 0;
pub const STATE_RELEASED: u32 = 4;
pub const PEER_F_ONLINE: u32 = 1 << 0;
pub const PEER_F_WINDOW: u32 = 1 << 1;
pub const EVENT_RELEASED: u16 = 0x1000;
pub const EVENT_IDLE: u16 = 0x1001;
pub const EVENT_BUSY: u16 = 0x1002;
pub const EVENT_OFFERED: u16 = 0x1100;
pub const EVENT_REVOKED: u16 = 0x1101;
pub const EVENT_WITHDRAWN: u16 = 0x1102;
pub const EVENT_CHANGED: u16 = 0x1103;
pub const EVENT_PEER: u16 = 0x1200;
pub const EVENT_RESYNC: u16 = 0x12ff;
