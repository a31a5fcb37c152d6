//! Memory behind an export: a dma-buf of exactly its pages, or a private copy of them. Behind a
//! mapping of an importer: its pages alone.
//!
//! It knows files and kernel interfaces, not who may use a buffer. It never hands out a guest's RAM.
//! After a disconnect a backing lives on as long as the registry keeps it.

mod copy;
mod fence;
mod lent;
mod udmabuf;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use log::{info, warn};

use crate::ids::FileId;
use crate::ioctl;
use crate::memory::{self, FileSegment};
use crate::protocol::{Mode, Status};
use crate::throttle::Throttle;
use crate::throttled;
pub use copy::copy;
pub use lent::Unfit;
pub use udmabuf::{Device, Source};

/// What the descriptor of a backing is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FdKind {
    /// A dma-buf.
    DmaBuf,
    /// A memfd, where the host has no udmabuf.
    Memfd,
}

/// The memory of one export, or of one mapping.
#[derive(Debug)]
pub struct Backing {
    /// The dma-buf that consumers get; a mapping and a copy without udmabuf have none.
    fd: Option<OwnedFd>,
    /// The VM's pages.
    pages: Box<[FileSegment]>,
    /// The private copy, in COPY mode.
    private: Option<Arc<File>>,
    /// A host client's dma-buf, for copies. It has no pages.
    mapped: Option<lent::Lent>,
}

impl Backing {
    /// Pages that nobody else gets.
    pub fn of_pages(pages: Vec<FileSegment>) -> Backing {
        Backing { fd: None, pages: pages.into(), private: None, mapped: None }
    }

    /// What a predecessor of this daemon left: who holds it can be seen, no page behind it.
    pub fn inherited(fd: OwnedFd, kind: FdKind) -> Backing {
        let (fd, private) = match kind {
            FdKind::DmaBuf => (Some(fd), None),
            FdKind::Memfd => (None, Some(Arc::new(File::from(fd)))),
        };
        Backing { fd, pages: Box::default(), private, mapped: None }
    }

    /// Which file [`heirloom`](Self::heirloom) is.
    pub fn file_id(&self) -> Option<FileId> {
        file_id(self.heirloom()?).ok()
    }

    /// What a successor needs, and a VMM that shows it; an importer's own pages have none.
    pub fn heirloom(&self) -> Option<BorrowedFd<'_>> {
        let private = self.private.as_ref().map(|file| file.as_fd());
        self.fd.as_ref().map(AsFd::as_fd).or(private)
    }

    /// What devices of the host still do with it, as `fence` tells; a memfd has none.
    pub fn fences(&self, write: bool) -> io::Result<Option<OwnedFd>> {
        self.fd.as_ref().map_or(Ok(None), |fd| fence::snapshot(fd.as_fd(), write))
    }

    /// What consumers get.
    pub fn kind(&self) -> FdKind {
        if self.fd.is_some() { FdKind::DmaBuf } else { FdKind::Memfd }
    }

    /// How bytes travel between the exporter and consumers.
    pub fn mode(&self) -> Mode {
        if self.private.is_some() { Mode::Copy } else { Mode::ZeroCopy }
    }

    /// The VM's pages: `len` bytes from byte `offset`.
    pub fn part(&self, offset: u64, len: u64) -> io::Result<Vec<FileSegment>> {
        memory::slice(&self.pages, offset, len)
    }

    /// What consumers see: `len` bytes from byte `offset`. An error outside of the buffer.
    pub fn content(&self, offset: u64, len: u64) -> io::Result<Vec<FileSegment>> {
        let pages = self.part(offset, len)?;
        let private = self.private.clone();
        Ok(private.map_or(pages, |file| vec![FileSegment { file, offset, len }]))
    }
}

impl Drop for Backing {
    /// A VMM may keep a window's copy after UNMAP: its pages must not stay on our account.
    fn drop(&mut self) {
        if let ([all], Some(file)) = (&*self.pages, &self.private)
            && Arc::ptr_eq(&all.file, file)
            && let Err(error) = copy::empty(file.as_fd(), all.len)
        {
            log::debug!("a window's copy could not be emptied: {error}");
        }
    }
}

/// Which of all files it is.
pub fn file_id(fd: impl AsFd) -> io::Result<FileId> {
    let stat = rustix::fs::fstat(fd)?;
    Ok(FileId { dev: stat.st_dev, ino: stat.st_ino })
}

/// Makes backings.
#[derive(Debug)]
pub struct DmaBufs {
    device: Option<Device>,
    /// `count:` of our own descriptors is read here; opened before the sandbox.
    fdinfo: OwnedFd,
    /// Our own descriptors.
    fds: OwnedFd,
    require_zero_copy: bool,
}

/// How an export may be made.
#[derive(Debug, Clone, Copy)]
pub struct Wish {
    /// The pages are sealed RAM and the operator lets consumers see them.
    pub may_share: bool,
    /// The exporter refuses copies.
    pub must_share: bool,
}

impl DmaBufs {
    /// Opens udmabuf as the operator chose, and logs once which mode that means.
    ///
    /// An error says what is missing and what to do.
    pub fn new(source: &Source, require_zero_copy: bool) -> io::Result<DmaBufs> {
        let device = match Device::open(source) {
            Ok(device) => device,
            Err(error) if matches!(source, Source::Auto) && !require_zero_copy => {
                warn!("{error}");
                None
            }
            Err(error) => return Err(error),
        };
        match &device {
            Some(device) => info!("zero-copy mode: udmabuf, {}", device.limits()),
            None if require_zero_copy => {
                return Err(io::Error::other(
                    "--require-zero-copy needs udmabuf: drop --udmabuf off",
                ));
            }
            None => warn!("copy mode: consumers get private copies that guests fill on SYNC"),
        }
        let directory = |path| {
            let flags = rustix::fs::OFlags::DIRECTORY | rustix::fs::OFlags::CLOEXEC;
            rustix::fs::open(path, flags, rustix::fs::Mode::empty())
        };
        let (fdinfo, fds) = (directory("/proc/self/fdinfo")?, directory("/proc/self/fd")?);
        Ok(DmaBufs { device, fdinfo, fds, require_zero_copy })
    }

    /// A descriptor for one consumer: the dma-buf of exactly these pages or of the private copy. A
    /// memfd is opened anew.
    pub fn for_consumer(&self, backing: &Backing) -> io::Result<OwnedFd> {
        if let Some(fd) = &backing.fd {
            return fd.try_clone();
        }
        let none = || io::Error::other("a mapping is for nobody else");
        self.reopen(backing.private.as_ref().ok_or_else(none)?, true)
    }

    /// The same memfd, opened anew: status flags that a client sets on its own, such as O_APPEND, must
    /// not change what we write.
    fn reopen(&self, memfd: impl AsFd, write: bool) -> io::Result<OwnedFd> {
        use rustix::fs::OFlags;
        let flags = OFlags::CLOEXEC | if write { OFlags::RDWR } else { OFlags::RDONLY };
        let name = memfd.as_fd().as_raw_fd().to_string();
        Ok(rustix::fs::openat(&self.fds, name, flags, rustix::fs::Mode::empty())?)
    }

    /// Segments of one dma-buf at most.
    pub fn max_segments(&self) -> u32 {
        self.device.as_ref().map_or(udmabuf::DEFAULT_LIST_LIMIT, |device| device.limits().segments)
    }

    /// Bytes of one dma-buf at most.
    pub fn max_size(&self) -> u64 {
        self.device.as_ref().map_or(u64::MAX, |device| device.limits().bytes)
    }

    /// Descriptors that one export takes; `copied`: it is always a copy.
    pub fn fds_per_export(&self, copied: bool) -> u64 {
        if copied && self.device.is_some() { 2 } else { 1 }
    }

    /// Makes the memory of an export: `size` bytes in these pages.
    ///
    /// FAULT where zero copies are demanded and impossible; NOMEM and IO where the host fails.
    pub fn make(
        &self,
        pages: Vec<FileSegment>,
        size: u64,
        wish: Wish,
        name: &str,
    ) -> Result<(Backing, Mode), Status> {
        let pages = pages.into_boxed_slice();
        if wish.may_share
            && let Some(device) = &self.device
        {
            let fd = device.create(&pages).map_err(|error| refused(&error))?;
            label(fd.as_fd(), name);
            return Ok((
                Backing { fd: Some(fd), pages, private: None, mapped: None },
                Mode::ZeroCopy,
            ));
        }
        if wish.must_share || self.require_zero_copy {
            return Err(Status::Fault);
        }
        let (private, fd) = self.private(size, name)?;
        Ok((Backing { fd, pages, private: Some(private), mapped: None }, Mode::Copy))
    }

    /// Memory of its own for one mapping in a window: what consumers see is all that there is. It is
    /// no dma-buf, whose pages stay until the VMM closes it: when it is dropped it is emptied.
    ///
    /// NOMEM and IO where the host fails.
    pub fn make_private(&self, size: u64) -> Result<Backing, Status> {
        let file = copy::private(size).map_err(|error| refused(&error))?;
        let file = Arc::new(File::from(file));
        let pages = Box::new([FileSegment { file: file.clone(), offset: 0, len: size }]);
        Ok(Backing { fd: None, pages, private: Some(file), mapped: None })
    }

    /// A private copy, and a dma-buf of it where there can be one.
    fn private(&self, size: u64, name: &str) -> Result<(Arc<File>, Option<OwnedFd>), Status> {
        let private = copy::private(size).map_err(|error| refused(&error))?;
        let fd = self.device.as_ref().and_then(|device| device.wrap(private.as_fd(), size).ok());
        if let Some(fd) = &fd {
            label(fd.as_fd(), name);
        }
        Ok((Arc::new(File::from(private)), fd))
    }

    /// Whether anybody but us holds the dma-buf; `ours` are such references that we have besides the
    /// backing. False for a memfd, where that cannot be seen.
    pub fn held_elsewhere(&self, backing: &Backing, ours: u64) -> io::Result<bool> {
        Ok(self.references(backing)?.is_some_and(|references| references > ours))
    }

    /// References to the dma-buf that are not ours: descriptors elsewhere or in flight, mappings,
    /// attachments. `None` for a memfd, where they cannot be counted.
    pub fn references(&self, backing: &Backing) -> io::Result<Option<u64>> {
        let Some(fd) = &backing.fd else { return Ok(None) };
        let name = fd.as_raw_fd().to_string();
        let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::CLOEXEC;
        let file = rustix::fs::openat(&self.fdinfo, name, flags, rustix::fs::Mode::empty())?;
        let text = io::read_to_string(std::fs::File::from(file))?;
        let count =
            text.lines().find_map(|line| line.strip_prefix("count:")?.trim().parse::<u64>().ok());
        let missing = || io::Error::other("/proc/self/fdinfo tells no count of a dma-buf");
        Ok(Some(count.ok_or_else(missing)?.saturating_sub(1)))
    }
}

/// Names a dma-buf for debugfs and fdinfo; that is for people, and must not fail an export.
fn label(fd: BorrowedFd<'_>, name: &str) {
    let printable = |c: &char| !c.is_control();
    let mut text: String = name.chars().filter(printable).collect();
    while text.len() > 31 {
        text.pop();
    }
    if let Ok(text) = std::ffi::CString::new(text)
        && let Err(error) = ioctl::dma_buf_set_name(fd, &text)
    {
        log::debug!("a dma-buf could not be named: {error}");
    }
}

fn refused(error: &io::Error) -> Status {
    static THROTTLE: Throttle = Throttle::new();
    throttled!(THROTTLE, Warn, "no memory for an export: {error}");
    match error.raw_os_error() {
        Some(libc::ENOMEM | libc::EMFILE | libc::ENFILE) => Status::NoMem,
        _ => Status::Io,
    }
}
