//! The requests of an importer, with named arguments.
//!
//! It knows the layout of messages, not how they travel.

use bufshare::protocol::{self as wire, Opcode, RespAttach, RespMap, flag, vq};
use zerocopy::IntoBytes;

use super::guest::Guest;
use super::requests::{READ_WRITE, Reply, handle_request, header, parse};

/// ATTACH.
#[derive(Debug, Clone, Copy)]
pub struct Attach {
    /// ATTACH_F_*.
    pub flags: u16,
    /// What.
    pub uuid: [u8; 16],
    /// What for.
    pub access: u32,
    /// Bytes of metadata that fit into the response.
    pub max_metadata: u32,
}

impl Default for Attach {
    fn default() -> Self {
        Self { flags: 0, uuid: [0; 16], access: READ_WRITE, max_metadata: 0 }
    }
}

impl Attach {
    /// The whole request.
    pub fn bytes(&self) -> Vec<u8> {
        let request = wire::Attach {
            hdr: header(Opcode::Attach, self.flags),
            uuid: self.uuid,
            access: self.access.into(),
            max_metadata: self.max_metadata.into(),
        };
        request.as_bytes().to_vec()
    }
}

/// MAP with F_COPY.
#[derive(Debug, Clone)]
pub struct Map {
    /// MAP_F_*.
    pub flags: u16,
    /// The attachment.
    pub handle: u64,
    /// First byte of the buffer.
    pub offset: u64,
    /// Bytes where it shall not be the sum of the segments.
    pub len: Option<u64>,
    /// Place in the window.
    pub shm_offset: u64,
    /// READ, WRITE.
    pub access: u32,
    /// Number of segments where it shall not be what it is.
    pub nr_segments: Option<u32>,
    /// The guest's own pages.
    pub segments: Vec<(u64, u64)>,
}

impl Default for Map {
    fn default() -> Self {
        Self {
            flags: flag::MAP_COPY,
            handle: 0,
            offset: 0,
            len: None,
            shm_offset: 0,
            access: READ_WRITE,
            nr_segments: None,
            segments: Vec::new(),
        }
    }
}

impl Map {
    /// The whole request.
    pub fn bytes(&self) -> Vec<u8> {
        let sum = || self.segments.iter().fold(0u64, |sum, s| sum.wrapping_add(s.1));
        let count = u32::try_from(self.segments.len()).expect("short");
        let fixed = wire::Map {
            hdr: header(Opcode::Map, self.flags),
            handle: self.handle.into(),
            offset: self.offset.into(),
            len: self.len.unwrap_or_else(sum).into(),
            shm_offset: self.shm_offset.into(),
            access: self.access.into(),
            nr_segments: self.nr_segments.unwrap_or(count).into(),
        };
        let mut bytes = fixed.as_bytes().to_vec();
        for &(addr, len) in &self.segments {
            let (addr, len) = (addr.into(), len.into());
            bytes.extend(wire::Segment { addr, len }.as_bytes());
        }
        bytes
    }
}

impl Guest {
    /// ATTACH; also the metadata that fits.
    #[track_caller]
    pub fn attach(&mut self, request: Attach) -> Reply<(RespAttach, Vec<u8>)> {
        let fixed = size_of::<RespAttach>();
        let room = u32::try_from(fixed).expect("small") + request.max_metadata;
        let answer = self.raw(vq::CONTROL, &[&request.bytes()], &[room]);
        let (head, metadata) = answer.written().split_at(answer.written().len().min(fixed));
        parse(head).map(|response| (response, metadata.to_vec()))
    }

    /// DETACH.
    pub fn detach(&mut self, handle: u64) -> Reply<()> {
        self.control::<wire::Resp>(&handle_request(Opcode::Detach, 0, handle)).map(|_| ())
    }

    /// MAP; returns the mapping.
    #[track_caller]
    pub fn map(&mut self, request: &Map) -> Reply<u64> {
        let response: Reply<RespMap> = self.control(&request.bytes());
        response.map(|response| {
            assert_eq!(response.cache.get(), wire::cache::CACHED);
            response.mapping.get()
        })
    }

    /// UNMAP.
    pub fn unmap(&mut self, mapping: u64) -> Reply<()> {
        self.control::<wire::Resp>(&unmap_request(mapping)).map(|_| ())
    }
}

/// UNMAP.
pub fn unmap_request(mapping: u64) -> Vec<u8> {
    let request = wire::Unmap { hdr: header(Opcode::Unmap, 0), mapping: mapping.into() };
    request.as_bytes().to_vec()
}
