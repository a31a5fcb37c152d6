//! Requests with named arguments, as the spec writes them, and what a test expects of the answer.
//!
//! It knows the layout of the control and sync queues' messages, not how they travel.

use bufshare::protocol::{
    self as wire, NAME_LEN, Opcode, RespExport, RespPeerInfo, RespState, RespSync, Status, access,
    flag,
};
use zerocopy::{FromBytes, IntoBytes};

use super::guest::Guest;
use super::memory::PAGE;

/// A refusing response.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refusal {
    /// Why.
    pub status: Status,
    /// FAULT: which segment.
    pub detail: u32,
}

/// An answered request.
pub type Reply<T> = Result<T, Refusal>;

/// What a test expects when a request has to fail.
pub trait Refused {
    /// Panics unless the request was refused with exactly this status.
    fn refused(self, status: Status) -> Refusal;
}

impl<T: std::fmt::Debug> Refused for Reply<T> {
    #[track_caller]
    fn refused(self, status: Status) -> Refusal {
        match self {
            Err(refusal) if refusal.status == status => refusal,
            other => panic!("expected {}, got {other:?}", status.name()),
        }
    }
}

/// READ | WRITE.
pub const READ_WRITE: u32 = access::READ | access::WRITE;

/// The header of a request.
pub fn header(opcode: Opcode, flags: u16) -> wire::Req {
    wire::Req { kind: opcode.to_wire().into(), flags: flags.into(), ..Default::default() }
}

/// A name as it stands in a request.
pub fn name(text: &str) -> [u8; NAME_LEN] {
    let mut bytes = [0; NAME_LEN];
    bytes[..text.len()].copy_from_slice(text.as_bytes());
    bytes
}

/// EXPORT. What is not set is taken from `segments`.
#[derive(Debug, Clone)]
pub struct Export {
    /// EXPORT_F_*.
    pub flags: u16,
    /// Address and length of each range.
    pub segments: Vec<(u64, u64)>,
    /// Size where it shall not be the sum of the segments.
    pub size: Option<u64>,
    /// Number of segments where it shall not be what it is.
    pub nr_segments: Option<u32>,
    /// The most that can be granted.
    pub access: u32,
    /// Type of the metadata.
    pub metadata_type: u32,
    /// Metadata.
    pub metadata: Vec<u8>,
    /// Length of the metadata where it shall not be what it is.
    pub metadata_len: Option<u32>,
    /// Name.
    pub name: [u8; NAME_LEN],
    /// UUID of the pool.
    pub object: [u8; 16],
}

impl Default for Export {
    fn default() -> Self {
        Self {
            flags: 0,
            segments: Vec::new(),
            size: None,
            nr_segments: None,
            access: READ_WRITE,
            metadata_type: wire::metadata::NONE,
            metadata: Vec::new(),
            metadata_len: None,
            name: [0; NAME_LEN],
            object: [0; 16],
        }
    }
}

impl Export {
    /// The whole request.
    pub fn bytes(&self) -> Vec<u8> {
        let sum = || self.segments.iter().fold(0u64, |sum, s| sum.wrapping_add(s.1));
        let count = |len: usize| u32::try_from(len).expect("short");
        let fixed = wire::Export {
            hdr: header(Opcode::Export, self.flags),
            size: self.size.unwrap_or_else(sum).into(),
            access: self.access.into(),
            nr_segments: self.nr_segments.unwrap_or(count(self.segments.len())).into(),
            metadata_type: self.metadata_type.into(),
            metadata_len: self.metadata_len.unwrap_or(count(self.metadata.len())).into(),
            name: self.name,
            object: self.object,
        };
        let mut bytes = fixed.as_bytes().to_vec();
        for &(addr, len) in &self.segments {
            let (addr, len) = (addr.into(), len.into());
            bytes.extend(wire::Segment { addr, len }.as_bytes());
        }
        bytes.extend(&self.metadata);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        bytes
    }
}

/// GRANT.
#[derive(Debug, Clone, Copy)]
pub struct Grant {
    /// GRANT_F_*.
    pub flags: u16,
    /// The export.
    pub handle: u64,
    /// To whom.
    pub peer_id: u32,
    /// What; 0 withdraws.
    pub access: u32,
    /// For how long; 0: until withdrawn.
    pub lifetime_ms: u64,
}

impl Default for Grant {
    fn default() -> Self {
        Self { flags: 0, handle: 0, peer_id: wire::peer::HOST, access: READ_WRITE, lifetime_ms: 0 }
    }
}

impl Grant {
    /// The whole request.
    pub fn bytes(&self) -> Vec<u8> {
        let request = wire::Grant {
            hdr: header(Opcode::Grant, self.flags),
            handle: self.handle.into(),
            peer_id: self.peer_id.into(),
            access: self.access.into(),
            lifetime_ms: self.lifetime_ms.into(),
        };
        request.as_bytes().to_vec()
    }
}

/// SYNC.
#[derive(Debug, Clone, Copy, Default)]
pub struct Sync {
    /// SYNC_F_*: READ, WRITE, NONBLOCK; [`Guest::begin`] and [`Guest::end`] set END.
    pub flags: u16,
    /// For CANCEL.
    pub cookie: u32,
    /// Export or attachment.
    pub handle: u64,
    /// First byte.
    pub offset: u64,
    /// Bytes; 0: to the end.
    pub len: u64,
    /// How long to wait.
    pub timeout_ns: u64,
}

impl Sync {
    /// The whole request.
    pub fn bytes(&self) -> Vec<u8> {
        let mut request = wire::Sync {
            hdr: header(Opcode::Sync, self.flags),
            handle: self.handle.into(),
            offset: self.offset.into(),
            len: self.len.into(),
            timeout_ns: self.timeout_ns.into(),
        };
        request.hdr.cookie = self.cookie.into();
        request.as_bytes().to_vec()
    }
}

/// RELEASE, QUERY, QUERY_LINGER and DETACH share one layout.
pub fn handle_request(opcode: Opcode, flags: u16, handle: u64) -> Vec<u8> {
    let request = wire::Handle { hdr: header(opcode, flags), handle: handle.into() };
    request.as_bytes().to_vec()
}

impl Guest {
    /// EXPORT.
    pub fn export(&mut self, request: Export) -> Reply<RespExport> {
        self.control(&request.bytes())
    }

    /// EXPORT of so many fresh pages in one segment; panics when it is refused.
    #[track_caller]
    pub fn export_pages(&mut self, pages: u64) -> (RespExport, u64) {
        let addr = self.pages(pages);
        let request = Export { segments: vec![(addr, pages * PAGE)], ..Default::default() };
        (self.export(request).expect("EXPORT"), addr)
    }

    /// GRANT.
    pub fn grant(&mut self, request: Grant) -> Reply<()> {
        self.control::<wire::Resp>(&request.bytes()).map(|_| ())
    }

    /// RELEASE.
    pub fn release(&mut self, handle: u64) -> Reply<RespState> {
        self.control(&handle_request(Opcode::Release, 0, handle))
    }

    /// RELEASE with FORCE.
    pub fn release_force(&mut self, handle: u64) -> Reply<RespState> {
        let flags = flag::RELEASE_FORCE;
        self.control(&handle_request(Opcode::Release, flags, handle))
    }

    /// QUERY.
    pub fn query(&mut self, handle: u64) -> Reply<RespState> {
        self.control(&handle_request(Opcode::Query, 0, handle))
    }

    /// QUERY_LINGER.
    pub fn query_linger(&mut self, index: u64) -> Reply<RespState> {
        self.control(&handle_request(Opcode::QueryLinger, 0, index))
    }

    /// SET_NAME.
    pub fn set_name(&mut self, handle: u64, name: [u8; NAME_LEN]) -> Reply<()> {
        let request =
            wire::SetName { hdr: header(Opcode::SetName, 0), handle: handle.into(), name };
        self.control::<wire::Resp>(request.as_bytes()).map(|_| ())
    }

    /// PEER_INFO.
    pub fn peer_info(&mut self, index: u32) -> Reply<RespPeerInfo> {
        let request = wire::PeerInfo {
            hdr: header(Opcode::PeerInfo, 0),
            index: index.into(),
            ..Default::default()
        };
        self.control(request.as_bytes())
    }

    /// CANCEL.
    pub fn cancel(&mut self, handle: u64, cookie: u32) -> Reply<()> {
        let request = wire::Cancel {
            hdr: header(Opcode::Cancel, 0),
            handle: handle.into(),
            cookie: cookie.into(),
            ..Default::default()
        };
        self.control::<wire::Resp>(request.as_bytes()).map(|_| ())
    }

    /// SYNC BEGIN, waited for.
    pub fn begin(&mut self, request: Sync) -> Reply<RespSync> {
        self.sync(&request.bytes())
    }

    /// SYNC END, waited for.
    pub fn end(&mut self, mut request: Sync) -> Reply<RespSync> {
        request.flags |= flag::SYNC_END;
        self.sync(&request.bytes())
    }
}

/// Reads a response; panics where it is not one: wrong length, unknown status, reserved bits.
#[track_caller]
pub fn parse<T: FromBytes>(written: &[u8]) -> Reply<T> {
    let (header, _) =
        wire::Resp::read_from_prefix(written).unwrap_or_else(|_| panic!("no header: {written:?}"));
    let status = Status::from_wire(header.status.get())
        .unwrap_or_else(|| panic!("unknown status in {written:?}"));
    assert_eq!(header.reserved.get(), 0, "reserved field of the response");
    let detail = header.detail.get();
    if status != Status::Fault {
        assert_eq!(detail, 0, "detail of {}", status.name());
    }
    if status == Status::Ok {
        let response = T::read_from_bytes(written);
        Ok(response.unwrap_or_else(|_| panic!("OK with {} bytes", written.len())))
    } else {
        assert_eq!(written.len(), 8, "a refusal is the header alone");
        Err(Refusal { status, detail })
    }
}
