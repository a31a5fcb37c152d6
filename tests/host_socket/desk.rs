//! The host socket's server in this process, with one VM whose exporter does what a test says.
//!
//! No VMM and no queue: the exporter speaks to the hub as a device would.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bufshare::dmabuf::{DmaBufs, FdKind, Source, Wish};
use bufshare::host::client::Client;
use bufshare::host::listener::Listener;
use bufshare::host::packet::{self, Wait};
use bufshare::host::server::Server;
use bufshare::host::wire::{self, Type};
use bufshare::hub::{Hub, VmSpec};
use bufshare::ids::{Access, Cookie, HandleId, PeerId, SessionId};
use bufshare::limits::Quota;
use bufshare::memory::FileSegment;
use bufshare::policy::{Policy, Rule, Side};
use bufshare::protocol::{self, Image, Status, metadata};
use bufshare::registry::{Description, Exported, GrantRequest, SyncRequest};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tempfile::TempDir;
use uuid::Uuid;
use zerocopy::{FromBytes, Immutable, IntoBytes};

pub const WIDTH: u32 = 16;
pub const HEIGHT: u32 = 8;
pub const SIZE: u64 = 4096;

pub struct Desk {
    pub hub: Arc<Hub>,
    pub session: SessionId,
    /// The VM's memory.
    pub ram: Arc<File>,
    exports: std::cell::Cell<u64>,
    dir: TempDir,
}

pub fn grant(handle: HandleId, access: Access) -> GrantRequest {
    let (once, force, lifetime) = (false, false, Duration::ZERO);
    GrantRequest { handle, to: PeerId::HOST, access, once, force, lifetime }
}

pub fn whole(bits: Access) -> SyncRequest {
    let timeout = Duration::from_secs(5);
    SyncRequest { bits, offset: 0, len: 0, nonblock: false, timeout, cookie: Cookie(1) }
}

impl Desk {
    pub fn start() -> Desk {
        Desk::with_policy(Policy::default())
    }

    pub fn read_only() -> Desk {
        let (from, to) = (Side::Any, Side::One(PeerId::HOST));
        Desk::with_policy(Policy::new(vec![Rule { from, to, read_only: true }]))
    }

    fn with_policy(policy: Policy) -> Desk {
        // Each export is a descriptor or two, of this process.
        let limit = getrlimit(Resource::Nofile);
        let all = Rlimit { current: limit.maximum, ..limit };
        setrlimit(Resource::Nofile, all).unwrap();
        let quota = Quota { max_exports: 20_000, ..Quota::default() };
        let vms = [VmSpec { name: "app".to_owned(), quota }];
        let dmabufs = DmaBufs::new(&Source::Off, false).unwrap();
        let hub = Arc::new(Hub::new(&vms, policy, dmabufs).unwrap());
        let session = hub.open_session(PeerId::FIRST_VM, true).unwrap();
        let ram = memfd_create("ram", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&ram, 1 << 20).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let listener = Listener::bind(&dir.path().join("host.sock"), None).unwrap();
        let server = Server::new(hub.clone(), Some(listener)).unwrap();
        std::thread::spawn(move || server.run().unwrap());
        Desk { hub, session, ram: Arc::new(ram.into()), exports: 0.into(), dir }
    }

    pub fn path(&self) -> PathBuf {
        self.dir.path().join("host.sock")
    }

    pub fn client(&self) -> Client {
        Client::connect(&self.path(), "test").unwrap()
    }

    /// Exports one page that holds an XR24 image.
    pub fn export(&self, name: &str) -> (HandleId, Uuid) {
        let offset = self.exports.replace(self.exports.get() + 1) % 256 * SIZE;
        self.export_pages(name, FileSegment { file: self.ram.clone(), offset, len: SIZE })
    }

    /// Exports these pages; their first one holds an XR24 image.
    pub fn export_pages(&self, name: &str, pages: FileSegment) -> (HandleId, Uuid) {
        let size = pages.len;
        let mut image = Image {
            fourcc: u32::from_le_bytes(*b"XR24").into(),
            nr_planes: 1.into(),
            width: WIDTH.into(),
            height: HEIGHT.into(),
            ..Default::default()
        };
        image.planes[0].stride = (WIDTH * 4).into();
        let what = Description {
            size,
            access: Access::ALL,
            name: wire::pad_text(name),
            metadata_type: metadata::IMAGE,
            metadata: image.as_bytes().into(),
        };
        let wish = Wish { may_share: false, must_share: false };
        let (backing, mode) = self.hub.dmabufs.make(vec![pages], size, wish, name).unwrap();
        assert_eq!(backing.kind(), FdKind::Memfd);
        let uuid = Uuid::new_v4();
        let since = self.hub.now();
        let backing = Arc::new(backing);
        let made = Exported { backing, mode, uuid, observable: false, shows: false, since };
        let (handle, uuid, _) = self
            .hub
            .with(|registry, _| {
                let (ticket, _) = registry.begin_export(self.session, what, None, false)?;
                registry.finish_export(ticket, Ok(made))
            })
            .unwrap();
        (handle, uuid)
    }

    pub fn grant(&self, request: GrantRequest) {
        self.hub.with(|registry, now| registry.grant(self.session, request, now)).unwrap();
    }

    /// Exports and grants READ and WRITE.
    pub fn offer(&self, name: &str) -> (HandleId, Uuid) {
        let (handle, uuid) = self.export(name);
        self.grant(grant(handle, Access::ALL));
        (handle, uuid)
    }

    pub fn release(&self, handle: HandleId, force: bool) {
        self.hub.with(|registry, _| registry.release(self.session, handle, force)).unwrap();
    }

    /// BEGIN|WRITE of the exporter, which must not have to wait.
    pub fn begin_write(&self, handle: HandleId) {
        let sync = SyncRequest { nonblock: true, ..whole(Access::WRITE) };
        self.hub
            .with(|registry, now| registry.begin_handle(self.session, handle, sync, (0, 9), now))
            .unwrap();
    }

    /// END|WRITE of the exporter; the generation.
    pub fn end_write(&self, handle: HandleId) -> u64 {
        let sync = whole(Access::WRITE);
        let ended = self.hub.with(|registry, _| registry.end_handle(self.session, handle, sync));
        self.hub.finish_end(ended.unwrap()).unwrap()
    }
}

/// A connection that sends what a test says.
pub struct Raw(pub OwnedFd);

impl Raw {
    pub fn connect(path: &Path) -> Raw {
        let kind = SocketType::SEQPACKET;
        let (family, flags) = (AddressFamily::UNIX, SocketFlags::CLOEXEC);
        let socket = rustix::net::socket_with(family, kind, flags, None).unwrap();
        rustix::net::connect(&socket, &SocketAddrUnix::new(path).unwrap()).unwrap();
        Raw(socket)
    }

    pub fn greeted(path: &Path) -> Raw {
        let raw = Raw::connect(path);
        let hdr = request(Type::Hello, 0, 1);
        let hello = wire::Hello { hdr, version: 1.into(), ..Default::default() };
        assert_eq!(raw.call(&hello), (Status::Ok, 1));
        raw
    }

    pub fn send(&self, bytes: &[u8]) {
        packet::send(&self.0, bytes, None, Wait::Forever).unwrap();
    }

    /// Status and cookie of the next packet; `None` where the daemon closed the connection.
    pub fn answer(&self) -> Option<(Status, u64)> {
        let packet = packet::receive(&self.0, Wait::Forever).unwrap_or(None)?;
        let (resp, _) = wire::Resp::read_from_prefix(&packet.bytes).unwrap();
        Some((Status::from_wire(resp.status.get()).unwrap(), resp.cookie.get()))
    }

    pub fn call(&self, request: &(impl IntoBytes + Immutable)) -> (Status, u64) {
        self.send(request.as_bytes());
        self.answer().unwrap()
    }
}

pub fn request(kind: Type, flags: u16, cookie: u64) -> wire::Req {
    let (kind, flags) = (kind.to_wire().into(), flags.into());
    wire::Req { kind, flags, reserved: 0.into(), cookie: cookie.into() }
}

pub const READ: u32 = protocol::access::READ;
pub const WRITE: u32 = protocol::access::WRITE;
