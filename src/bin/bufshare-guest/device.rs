//! /dev/bufshareN: one method per request. It knows the ABI and nothing of pictures. When the
//! device goes away every method answers ENODEV, when it stops to answer EIO.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use bufshare::ioctl::{
    Mapping, ioctl_flat, ioctl_new_fd, ioctl_new_fd_with_room, ioctl_with_bytes, iowr,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use thiserror::Error;
use uuid::Uuid;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes};

use crate::uapi;

/// What a request was about, and the kernel's answer.
#[derive(Debug, Error)]
#[error("{what} failed")]
pub struct Error {
    pub what: &'static str,
    pub source: io::Error,
}

impl Error {
    pub fn errno(&self) -> i32 {
        self.source.raw_os_error().unwrap_or(0)
    }
}

pub type Result<T> = std::result::Result<T, Error>;

fn told(what: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error { what, source }
}

/// An open file of the device; its exports end with it.
#[derive(Debug)]
pub struct Device {
    file: File,
}

/// What an export is to be like.
#[derive(Debug, Default)]
pub struct Offer<'a> {
    pub zero_copy: bool,
    pub access: u32,
    pub name: &'a str,
    pub metadata_type: u32,
    pub metadata: &'a [u8],
}

/// An export as the device sees it.
#[derive(Debug, Clone, Copy)]
pub struct Exported {
    pub handle: u64,
    pub uuid: Uuid,
    pub size: u64,
    pub mode: u32,
}

/// Another peer's buffer that this guest uses.
#[derive(Debug)]
pub struct Attached {
    pub fd: OwnedFd,
    /// 0: it is an export of this guest.
    pub handle: u64,
    pub uuid: Uuid,
    pub name: String,
    pub size: u64,
    pub mode: u32,
    pub exporter: u32,
    pub generation: u64,
    pub metadata_type: u32,
    pub metadata: Vec<u8>,
}

/// What is exported.
#[derive(Debug, Clone, Copy)]
pub enum Source<'a> {
    /// All of a dma-buf.
    DmaBuf(&'a OwnedFd),
    /// A part of an export: its handle, and bytes.
    Part { pool: u64, offset: u64, size: u64 },
}

/// A point of a timeline of an export or attachment.
#[derive(Debug, Clone, Copy)]
pub struct Point {
    pub handle: u64,
    /// `uapi::TIMELINE_*`.
    pub timeline: u32,
    pub number: u64,
}

impl Point {
    /// "Content `number` is ready."
    pub fn ready(handle: u64, number: u64) -> Point {
        Point { handle, timeline: uapi::TIMELINE_ACQUIRE, number }
    }

    /// "I am done with content `number`."
    pub fn done(handle: u64, number: u64) -> Point {
        Point { handle, timeline: uapi::TIMELINE_RELEASE, number }
    }
}

/// A name as the ABI wants it: cut at 32 bytes, at the end of a character.
fn name_bytes(name: &str) -> [u8; 32] {
    let mut end = name.len().min(32);
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    let mut bytes = [0; 32];
    bytes[..end].copy_from_slice(&name.as_bytes()[..end]);
    bytes
}

impl Device {
    pub fn open(path: &Path) -> std::result::Result<Self, OpenError> {
        let file = OpenOptions::new().read(true).write(true).open(path);
        file.map(|file| Device { file }).map_err(|source| {
            let hint = match source.kind() {
                io::ErrorKind::NotFound => "; is the module virtio_bufshare loaded?",
                io::ErrorKind::PermissionDenied => "; run as root, or change its permissions",
                _ => "",
            };
            OpenError { path: path.to_owned(), hint, source }
        })
    }

    fn call<T>(&self, what: &'static str, request: u32, arg: &mut T) -> Result<()>
    where
        T: FromBytes + IntoBytes + Immutable,
    {
        ioctl_flat(self.file.as_fd(), request, arg).map(drop).map_err(told(what))
    }

    pub fn info(&self) -> Result<uapi::Info> {
        let mut arg = uapi::Info::default();
        self.call("info", uapi::IOC_INFO, &mut arg)?;
        Ok(arg)
    }

    pub fn alloc(&self, size: u64) -> Result<OwnedFd> {
        let mut arg = uapi::Alloc { size, ..Default::default() };
        let place = std::mem::offset_of!(uapi::Alloc, fd);
        ioctl_new_fd(self.file.as_fd(), uapi::IOC_ALLOC, &mut arg, place).map_err(told("alloc"))
    }

    pub fn export(&self, source: Source<'_>, offer: &Offer<'_>) -> Result<Exported> {
        use std::os::fd::AsRawFd;
        let mut arg = uapi::Export {
            access: offer.access,
            metadata_type: offer.metadata_type,
            name: name_bytes(offer.name),
            ..Default::default()
        };
        match source {
            Source::DmaBuf(fd) => arg.fd = fd.as_raw_fd(),
            Source::Part { pool, offset, size } => {
                arg.flags = uapi::EXPORT_F_PART;
                (arg.fd, arg.pool, arg.offset, arg.size) = (-1, pool, offset, size);
            }
        }
        if offer.zero_copy {
            arg.flags |= uapi::EXPORT_F_ZERO_COPY;
        }
        let place = std::mem::offset_of!(uapi::Export, metadata);
        let fd = self.file.as_fd();
        ioctl_with_bytes(fd, uapi::IOC_EXPORT, &mut arg, place, offer.metadata)
            .map_err(told("export"))?;
        Ok(Exported {
            handle: arg.handle,
            uuid: Uuid::from_bytes(arg.uuid),
            size: arg.size,
            mode: arg.mode,
        })
    }

    pub fn grant(&self, handle: u64, peer_id: u32, access: u32) -> Result<()> {
        let mut arg = uapi::Grant { handle, peer_id, access, ..Default::default() };
        self.call("grant", uapi::IOC_GRANT, &mut arg)
    }

    /// `flags`: `uapi::SYNC_F_*`. The generation afterwards.
    pub fn sync(&self, handle: u64, flags: u32) -> Result<u64> {
        self.sync_for(handle, flags, Duration::MAX)
    }

    /// As [`Device::sync`], but waits no longer than that.
    pub fn sync_for(&self, handle: u64, flags: u32, timeout: Duration) -> Result<u64> {
        let what = if flags & uapi::SYNC_F_END == 0 { "begin" } else { "end" };
        let timeout_ns = u64::try_from(timeout.as_nanos()).unwrap_or(u64::MAX);
        let mut arg = uapi::Sync { handle, flags, timeout_ns, ..Default::default() };
        self.call(what, uapi::IOC_SYNC, &mut arg)?;
        Ok(arg.generation)
    }

    pub fn set_name(&self, handle: u64, name: &str) -> Result<()> {
        let mut arg = uapi::Name { handle, name: name_bytes(name) };
        self.call("set name", uapi::IOC_SET_NAME, &mut arg)
    }

    pub fn query(&self, handle: u64) -> Result<uapi::Query> {
        let mut arg = uapi::Query { handle, ..Default::default() };
        self.call("query", uapi::IOC_QUERY, &mut arg)?;
        Ok(arg)
    }

    /// Whether the memory is back at once; else EVENT_RELEASED will tell.
    pub fn release(&self, handle: u64, force: bool) -> Result<bool> {
        let flags = if force { uapi::RELEASE_F_FORCE } else { 0 };
        let mut arg = uapi::Release { handle, flags, ..Default::default() };
        self.call("release", uapi::IOC_RELEASE, &mut arg)?;
        Ok(arg.state == uapi::STATE_RELEASED)
    }

    /// `None` past the last peer.
    pub fn peer(&self, index: u32) -> Result<Option<uapi::Peer>> {
        let mut arg = uapi::Peer { index, ..Default::default() };
        match self.call("peer", uapi::IOC_PEER, &mut arg) {
            Ok(()) => Ok(Some(arg)),
            Err(error) if error.errno() == libc::ENOENT => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The offer after number `id`; `None` past the last.
    pub fn offer(&self, id: u32) -> Result<Option<uapi::Offer>> {
        let mut arg = uapi::Offer { id, ..Default::default() };
        match self.call("offer", uapi::IOC_OFFER, &mut arg) {
            Ok(()) => Ok(Some(arg)),
            Err(error) if error.errno() == libc::ENOENT => Ok(None),
            Err(error) => Err(error),
        }
    }

    pub fn attach(&self, uuid: Uuid, access: u32, zero_copy: bool) -> Result<Attached> {
        use std::mem::offset_of;
        let flags = if zero_copy { uapi::ATTACH_F_ZERO_COPY } else { 0 };
        let mut arg = uapi::Attach { uuid: uuid.into_bytes(), flags, access, ..Default::default() };
        let mut metadata = vec![0; 4096];
        let places = (offset_of!(uapi::Attach, fd), offset_of!(uapi::Attach, metadata));
        let fd = self.file.as_fd();
        let (request, room) = (uapi::IOC_ATTACH, metadata.as_mut_slice());
        let fd = ioctl_new_fd_with_room(fd, request, &mut arg, places.0, places.1, room)
            .map_err(told("attach"))?;
        metadata.truncate(arg.metadata_len as usize);
        Ok(Attached {
            fd,
            handle: arg.handle,
            uuid,
            name: crate::text(&arg.name),
            size: arg.size,
            mode: arg.mode,
            exporter: arg.exporter,
            generation: arg.generation,
            metadata_type: arg.metadata_type,
            metadata,
        })
    }

    /// Says that a timeline reached a point, or with another `error` than 0 that it will not be what
    /// was promised.
    pub fn signal(&self, point: Point, error: u32) -> Result<()> {
        let Point { handle, timeline, number } = point;
        let mut arg = uapi::PointSignal { handle, point: number, timeline, error };
        self.call("signal", uapi::IOC_POINT_SIGNAL, &mut arg)
    }

    /// What the timeline reached, when it has reached the point. No timeout: answered at once.
    pub fn wait(&self, point: Point, timeout: Option<Duration>) -> Result<u64> {
        let Point { handle, timeline, number } = point;
        let flags = if timeout.is_none() { uapi::POINT_F_NONBLOCK } else { 0 };
        let timeout_ns = u64::try_from(timeout.unwrap_or_default().as_nanos()).unwrap_or(u64::MAX);
        let mut arg =
            uapi::PointWait { handle, point: number, timeline, flags, timeout_ns, reached: 0 };
        self.call("wait", uapi::IOC_POINT_WAIT, &mut arg)?;
        Ok(arg.reached)
    }

    /// Lets the eventfd be told when the point is reached, or never will be.
    pub fn watch(&self, point: Point, eventfd: &File) -> Result<()> {
        use std::os::fd::AsRawFd;
        let Point { handle, timeline, number } = point;
        let fd = eventfd.as_raw_fd();
        let mut arg =
            uapi::PointEventfd { handle, point: number, timeline, fd, ..Default::default() };
        self.call("watch", uapi::IOC_POINT_EVENTFD, &mut arg)
    }

    /// The next event; `None` where none comes in `timeout`, or ever without one.
    pub fn event(&self, timeout: Option<Duration>) -> Result<Option<uapi::Event>> {
        let timeout = timeout.map(|time| Timespec {
            tv_sec: time.as_secs() as i64,
            tv_nsec: i64::from(time.subsec_nanos()),
        });
        let mut fds = [PollFd::new(&self.file, PollFlags::IN)];
        let ready = rustix::io::retry_on_intr(|| poll(&mut fds, timeout.as_ref()));
        if ready.map_err(|errno| Error { what: "poll", source: errno.into() })? == 0 {
            return Ok(None);
        }
        let mut event = uapi::Event::new_zeroed();
        (&self.file).read_exact(event.as_mut_bytes()).map_err(told("read"))?;
        Ok(Some(event))
    }
}

/// The device file cannot be opened.
#[derive(Debug, Error)]
#[error("cannot open {}{hint}", path.display())]
pub struct OpenError {
    path: PathBuf,
    hint: &'static str,
    source: io::Error,
}

/// A dma-buf from a dma-heap: of another exporter than our driver.
pub fn heap_alloc(heap: &Path, size: u64) -> Result<OwnedFd> {
    #[derive(FromBytes, IntoBytes, Immutable)]
    #[repr(C)]
    struct Allocation {
        len: u64,
        fd: u32,
        fd_flags: u32,
        heap_flags: u64,
    }
    let file = OpenOptions::new().read(true).write(true).open(heap);
    let file = file.map_err(told("opening the dma-heap"))?;
    let flags = (libc::O_RDWR | libc::O_CLOEXEC) as u32;
    let mut arg = Allocation { len: size, fd: 0, fd_flags: flags, heap_flags: 0 };
    let request = iowr(b'H', 0, size_of::<Allocation>());
    ioctl_new_fd(file.as_fd(), request, &mut arg, std::mem::offset_of!(Allocation, fd))
        .map_err(told("allocating from the dma-heap"))
}

/// All of a dma-buf, writable.
pub fn map(dmabuf: &OwnedFd, size: u64) -> Result<Mapping> {
    map_for(dmabuf, size, true)
}

/// All of a dma-buf.
pub fn map_for(dmabuf: &OwnedFd, size: u64, writable: bool) -> Result<Mapping> {
    let len = usize::try_from(size).map_err(io::Error::other).map_err(told("map"))?;
    Mapping::new(dmabuf, len, writable).map_err(told("map"))
}
