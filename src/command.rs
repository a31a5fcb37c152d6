//! Bytes of a request → a typed command, judged as far as bytes alone can tell
//! (spec "Device operation", the order of checks).
//!
//! It knows neither rings nor buffers; it works on a private copy of the request. What it refuses
//! has changed nothing.

mod describe;
pub mod point;

use std::time::Duration;

use uuid::Uuid;
use zerocopy::{FromBytes, Immutable, KnownLayout};

use crate::ids::{Access, Cookie, HandleId, MappingId, PeerId, WindowRange};
use crate::limits::MAX_RAW_SEGMENTS;
use crate::protocol::{self as wire, NAME_LEN, Opcode, Segment, Status, feature, flag, vq};
use crate::registry::{
    AttachRequest, Description, GrantRequest, MapRequest, PointWait, Signal, SyncRequest,
    WindowRequest,
};

pub use describe::{check_metadata, check_name};

/// Bytes of a request that are copied at most: the largest EXPORT, with more metadata than any
/// device accepts, so that too much of it is told from too few bytes.
pub const MAX_REQUEST: usize =
    size_of::<wire::Export>() + MAX_RAW_SEGMENTS as usize * size_of::<Segment>() + 8192;

/// A request that says what it wants.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Command<'a> {
    Export(Export<'a>),
    Grant(GrantRequest),
    Release { handle: HandleId, force: bool },
    Query { handle: HandleId },
    QueryLinger { index: u64 },
    SetName { handle: HandleId, name: [u8; NAME_LEN] },
    Attach { request: AttachRequest, max_metadata: u32 },
    Detach { handle: HandleId },
    Map { request: MapRequest, segments: &'a [Segment] },
    MapWindow(WindowRequest),
    Unmap { mapping: MappingId },
    PeerInfo { index: u32 },
    Cancel { handle: HandleId, cookie: Cookie },
    Begin { handle: HandleId, sync: SyncRequest },
    End { handle: HandleId, sync: SyncRequest },
    Signal { handle: HandleId, signal: Signal },
    Wait { handle: HandleId, wait: PointWait },
}

/// EXPORT.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Export<'a> {
    /// What it is for.
    pub what: Description,
    /// Guest memory, or with `pool` one range of the pool.
    pub segments: &'a [Segment],
    /// F_PART: the pool.
    pub pool: Option<Uuid>,
    /// F_ZERO_COPY.
    pub zero_copy: bool,
}

/// A request as it came off a queue.
#[derive(Debug, Clone, Copy)]
pub struct Raw<'a> {
    /// The device-readable part, up to [`MAX_REQUEST`].
    pub bytes: &'a [u8],
    /// Bytes of the device-readable part.
    pub readable: u64,
    /// Bytes of the device-writable part.
    pub room: u64,
    /// Which virtqueue.
    pub queue: u16,
    /// Negotiated feature bits.
    pub features: u64,
}

impl<'a> Raw<'a> {
    /// What is asked for, if that is known.
    pub fn opcode(&self) -> Option<Opcode> {
        let (header, _) = wire::Req::read_from_prefix(self.bytes).ok()?;
        Opcode::from_wire(header.kind.get())
    }

    fn has(&self, bit: u32) -> bool {
        self.features >> bit & 1 != 0
    }

    /// Judges the request. The error is the status of the response.
    pub fn parse(&self) -> Result<Command<'a>, Status> {
        let (hdr, _) = wire::Req::ref_from_prefix(self.bytes).ok().ok_or(Status::Inval)?;
        let opcode = Opcode::from_wire(hdr.kind.get()).ok_or(Status::Unsupp)?;
        let sync = matches!(opcode, Opcode::Sync | Opcode::PointSignal | Opcode::PointWait);
        if (self.queue == vq::SYNC) != sync {
            return Err(Status::Unsupp);
        }
        let flags = hdr.flags.get();
        if !sync && hdr.cookie.get() != 0 && self.serves(opcode) {
            self.sizes(opcode)?;
            return Err(Status::Inval);
        }
        match opcode {
            Opcode::Export => self.export(flags),
            Opcode::Grant => self.grant(flags),
            Opcode::Release => {
                let req: wire::Handle = self.fixed(opcode, flags, flag::RELEASE_FORCE)?;
                Ok(Command::Release { handle: id(req.handle), force: flags != 0 })
            }
            Opcode::Query => {
                let req: wire::Handle = self.fixed(opcode, flags, 0)?;
                Ok(Command::Query { handle: id(req.handle) })
            }
            Opcode::QueryLinger => {
                let req: wire::Handle = self.fixed(opcode, flags, 0)?;
                Ok(Command::QueryLinger { index: req.handle.get() })
            }
            Opcode::SetName => {
                let req: wire::SetName = self.fixed(opcode, flags, 0)?;
                check_name(&req.name)?;
                Ok(Command::SetName { handle: id(req.handle), name: req.name })
            }
            Opcode::Attach if self.serves(opcode) => self.attach(flags),
            Opcode::Detach if self.serves(opcode) => {
                let req: wire::Handle = self.fixed(opcode, flags, 0)?;
                Ok(Command::Detach { handle: id(req.handle) })
            }
            Opcode::Map if self.serves(opcode) => self.map(flags),
            Opcode::Unmap if self.serves(opcode) => {
                let req: wire::Unmap = self.fixed(opcode, flags, 0)?;
                Ok(Command::Unmap { mapping: MappingId(req.mapping.get()) })
            }
            Opcode::PeerInfo if self.serves(opcode) => {
                let req: wire::PeerInfo = self.fixed(opcode, flags, 0)?;
                reserved(req.reserved.get())?;
                Ok(Command::PeerInfo { index: req.index.get() })
            }
            Opcode::Cancel => {
                let req: wire::Cancel = self.fixed(opcode, flags, 0)?;
                reserved(req.reserved.get())?;
                Ok(Command::Cancel { handle: id(req.handle), cookie: Cookie(req.cookie.get()) })
            }
            Opcode::Sync => self.sync(flags),
            Opcode::PointSignal if self.serves(opcode) => self.signal(flags),
            Opcode::PointWait if self.serves(opcode) => self.wait(flags),
            _ => Err(Status::Unsupp),
        }
    }

    /// Whether a request is served to a driver that negotiated these features.
    fn serves(&self, opcode: Opcode) -> bool {
        response_len(opcode).is_some()
            && match opcode {
                Opcode::PeerInfo => self.has(feature::PEERS),
                Opcode::Attach | Opcode::Detach => self.has(feature::IMPORT),
                Opcode::PointSignal | Opcode::PointWait => self.has(feature::TIMELINE),
                Opcode::Map | Opcode::Unmap => {
                    let maps = self.has(feature::COPY) || self.has(feature::WINDOW);
                    self.has(feature::IMPORT) && maps
                }
                _ => true,
            }
    }

    /// Judges the lengths of both parts, without the arrays behind the fixed one.
    fn sizes(&self, opcode: Opcode) -> Result<(), Status> {
        let need = request_len(opcode).ok_or(Status::Unsupp)?;
        let answer = response_len(opcode).ok_or(Status::Unsupp)?;
        if self.readable < need as u64 || self.room < answer as u64 {
            return Err(Status::Inval);
        }
        Ok(())
    }

    /// The fixed part of a request whose lengths and flags are right.
    fn fixed<T>(&self, opcode: Opcode, flags: u16, known: u16) -> Result<T, Status>
    where
        T: FromBytes + KnownLayout + Immutable,
    {
        self.sizes(opcode)?;
        if flags & !known != 0 {
            return Err(Status::Inval);
        }
        T::read_from_prefix(self.bytes).map(|(value, _)| value).ok().ok_or(Status::Inval)
    }

    fn export(&self, flags: u16) -> Result<Command<'a>, Status> {
        if flags & (flag::EXPORT_DEVICE_MEMORY | flag::EXPORT_OBJECT) != 0 {
            return Err(Status::Unsupp);
        }
        let known = flag::EXPORT_ZERO_COPY | flag::EXPORT_PART;
        let req: wire::Export = self.fixed(Opcode::Export, flags, known)?;
        let segments_len = u64::from(req.nr_segments.get()) * size_of::<Segment>() as u64;
        let metadata_at = size_of::<wire::Export>() as u64 + segments_len;
        let metadata_len = req.metadata_len.get();
        if metadata_at + u64::from(metadata_len).next_multiple_of(8) > self.readable {
            return Err(Status::Inval);
        }
        let part = flags & flag::EXPORT_PART != 0;
        let segments_ok = req.nr_segments.get() != 0 && (!part || req.nr_segments.get() == 1);
        let object_ok = part || req.object == [0; 16];
        let access = Access::from_bits(req.access.get()).filter(|access| !access.is_none());
        let access = access.ok_or(Status::Inval)?;
        if !segments_ok || !object_ok || req.size.get() == 0 {
            return Err(Status::Inval);
        }
        check_name(&req.name)?;
        if req.nr_segments.get() > MAX_RAW_SEGMENTS {
            return Err(Status::TooMany);
        }
        let rest = self.bytes.get(size_of::<wire::Export>()..).ok_or(Status::Inval)?;
        let count = usize::try_from(req.nr_segments.get()).ok().ok_or(Status::TooMany)?;
        let (segments, rest) =
            <[Segment]>::ref_from_prefix_with_elems(rest, count).ok().ok_or(Status::Inval)?;
        let metadata_len = usize::try_from(metadata_len).ok().ok_or(Status::Quota)?;
        // Present, or it was refused above; what is not copied is more than any device accepts.
        let bytes = rest.get(..metadata_len).ok_or(Status::Quota)?;
        check_metadata(req.metadata_type.get(), bytes, req.size.get())?;
        Ok(Command::Export(Export {
            what: Description {
                size: req.size.get(),
                access,
                name: req.name,
                metadata_type: req.metadata_type.get(),
                metadata: bytes.into(),
            },
            segments,
            pool: part.then(|| Uuid::from_bytes(req.object)),
            zero_copy: flags & flag::EXPORT_ZERO_COPY != 0,
        }))
    }

    fn grant(&self, flags: u16) -> Result<Command<'a>, Status> {
        let known = flag::GRANT_ONCE | flag::GRANT_FORCE;
        let req: wire::Grant = self.fixed(Opcode::Grant, flags, known)?;
        let access = Access::from_bits(req.access.get()).ok_or(Status::Inval)?;
        let force = flags & flag::GRANT_FORCE != 0;
        if force && !access.is_none() {
            return Err(Status::Inval);
        }
        Ok(Command::Grant(GrantRequest {
            handle: id(req.handle),
            to: PeerId(req.peer_id.get()),
            access,
            once: flags & flag::GRANT_ONCE != 0,
            force,
            lifetime: Duration::from_millis(req.lifetime_ms.get()),
        }))
    }

    fn attach(&self, flags: u16) -> Result<Command<'a>, Status> {
        let req: wire::Attach = self.fixed(Opcode::Attach, flags, flag::ATTACH_ZERO_COPY)?;
        let max_metadata = req.max_metadata.get();
        let access = Access::from_bits(req.access.get()).filter(|access| !access.is_none());
        let access = access.ok_or(Status::Inval)?;
        if self.room < size_of::<wire::RespAttach>() as u64 + u64::from(max_metadata) {
            return Err(Status::Inval);
        }
        let zero_copy = flags & flag::ATTACH_ZERO_COPY != 0;
        let window = self.has(feature::WINDOW);
        let request = AttachRequest { uuid: Uuid::from_bytes(req.uuid), access, zero_copy, window };
        Ok(Command::Attach { request, max_metadata })
    }

    fn map(&self, flags: u16) -> Result<Command<'a>, Status> {
        let copies = flags & flag::MAP_COPY != 0;
        if !self.has(if copies { feature::COPY } else { feature::WINDOW }) {
            return Err(Status::Unsupp);
        }
        let req: wire::Map = self.fixed(Opcode::Map, flags, flag::MAP_COPY)?;
        if !copies {
            return self.map_window(&req);
        }
        let count = req.nr_segments.get();
        let segments_len = u64::from(count) * size_of::<Segment>() as u64;
        if size_of::<wire::Map>() as u64 + segments_len > self.readable {
            return Err(Status::Inval);
        }
        let access = Access::from_bits(req.access.get()).filter(|access| !access.is_none());
        let access = access.ok_or(Status::Inval)?;
        if count == 0 || req.len.get() == 0 || req.shm_offset.get() != 0 {
            return Err(Status::Inval);
        }
        if count > MAX_RAW_SEGMENTS {
            return Err(Status::TooMany);
        }
        let rest = self.bytes.get(size_of::<wire::Map>()..).ok_or(Status::Inval)?;
        let count = usize::try_from(count).ok().ok_or(Status::TooMany)?;
        let (segments, _) =
            <[Segment]>::ref_from_prefix_with_elems(rest, count).ok().ok_or(Status::Inval)?;
        let request = MapRequest {
            handle: id(req.handle),
            offset: req.offset.get(),
            len: req.len.get(),
            access,
        };
        Ok(Command::Map { request, segments })
    }

    fn map_window(&self, req: &wire::Map) -> Result<Command<'a>, Status> {
        let access = Access::from_bits(req.access.get()).filter(|access| !access.is_none());
        let access = access.ok_or(Status::Inval)?;
        if req.nr_segments.get() != 0 || req.len.get() == 0 {
            return Err(Status::Inval);
        }
        let range = WindowRange { start: req.shm_offset.get(), len: req.len.get() };
        let (handle, offset) = (id(req.handle), req.offset.get());
        Ok(Command::MapWindow(WindowRequest { handle, offset, range, access }))
    }

    fn sync(&self, flags: u16) -> Result<Command<'a>, Status> {
        let known = flag::SYNC_END | flag::SYNC_READ | flag::SYNC_WRITE | flag::SYNC_NONBLOCK;
        let req: wire::Sync = self.fixed(Opcode::Sync, flags, known)?;
        let bits =
            Access { read: flags & flag::SYNC_READ != 0, write: flags & flag::SYNC_WRITE != 0 };
        if bits.is_none() {
            return Err(Status::Inval);
        }
        let sync = SyncRequest {
            bits,
            offset: req.offset.get(),
            len: req.len.get(),
            nonblock: flags & flag::SYNC_NONBLOCK != 0,
            timeout: Duration::from_nanos(req.timeout_ns.get()),
            cookie: Cookie(req.hdr.cookie.get()),
        };
        let handle = id(req.handle);
        Ok(if flags & flag::SYNC_END != 0 {
            Command::End { handle, sync }
        } else {
            Command::Begin { handle, sync }
        })
    }
}

/// Bytes of a request without its arrays; `None` for what is not served.
fn request_len(opcode: Opcode) -> Option<usize> {
    Some(match opcode {
        Opcode::Export => size_of::<wire::Export>(),
        Opcode::Grant => size_of::<wire::Grant>(),
        Opcode::Release | Opcode::Query | Opcode::QueryLinger => size_of::<wire::Handle>(),
        Opcode::SetName => size_of::<wire::SetName>(),
        Opcode::Attach => size_of::<wire::Attach>(),
        Opcode::Detach => size_of::<wire::Handle>(),
        Opcode::Map => size_of::<wire::Map>(),
        Opcode::Unmap => size_of::<wire::Unmap>(),
        Opcode::PeerInfo => size_of::<wire::PeerInfo>(),
        Opcode::Cancel => size_of::<wire::Cancel>(),
        Opcode::Sync => size_of::<wire::Sync>(),
        Opcode::PointSignal | Opcode::PointWait => size_of::<wire::Point>(),
        _ => return None,
    })
}

/// Bytes of the response to a request that succeeds; `None` for what is not served.
fn response_len(opcode: Opcode) -> Option<usize> {
    Some(match opcode {
        Opcode::Export => size_of::<wire::RespExport>(),
        Opcode::Grant | Opcode::SetName | Opcode::Cancel => size_of::<wire::Resp>(),
        Opcode::Detach | Opcode::Unmap => size_of::<wire::Resp>(),
        Opcode::Attach => size_of::<wire::RespAttach>(),
        Opcode::Map => size_of::<wire::RespMap>(),
        Opcode::Release | Opcode::Query | Opcode::QueryLinger => size_of::<wire::RespState>(),
        Opcode::PeerInfo => size_of::<wire::RespPeerInfo>(),
        Opcode::Sync => size_of::<wire::RespSync>(),
        Opcode::PointSignal | Opcode::PointWait => size_of::<wire::RespPoint>(),
        _ => return None,
    })
}

fn id(handle: zerocopy::byteorder::little_endian::U64) -> HandleId {
    HandleId(handle.get())
}

fn reserved(value: u32) -> Result<(), Status> {
    if value == 0 { Ok(()) } else { Err(Status::Inval) }
}

#[cfg(test)]
#[path = "command_tests.rs"]
mod tests;
