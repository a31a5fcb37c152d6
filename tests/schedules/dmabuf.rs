//! In the place of the daemon's `dmabuf`: memory whose holders and fences the test decides on, and that
//! notices who looks at it, copies it or drops it while he has the registry's lock.

use std::fs::File;
use std::io::{self, PipeWriter, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

pub use bufshare::dmabuf::{FdKind, Unfit, Wish, file_id};
use bufshare::ids::FileId;
use bufshare::memory::{self, FileSegment};
use bufshare::protocol::{Mode, Status};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

use crate::world::{self, point};

/// What the host does with a dma-buf.
#[derive(Debug, Default)]
pub struct Outside {
    /// References that are not ours.
    pub foreign: AtomicUsize,
    pub busy: AtomicBool,
    snapshots: Mutex<Vec<PipeWriter>>,
}

impl Outside {
    /// Device work begins.
    pub fn begin_work(&self) {
        self.busy.store(true, Ordering::SeqCst);
    }

    /// Snapshots that somebody still has.
    pub fn watched(&self) -> usize {
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        let has_reader = |snapshot: &&PipeWriter| {
            let mut fds = [PollFd::new(*snapshot, PollFlags::OUT)];
            poll(&mut fds, Some(&at_once)).expect("poll");
            !fds[0].revents().contains(PollFlags::ERR)
        };
        self.snapshots.lock().expect("no panic").iter().filter(has_reader).count()
    }

    /// It is over: so are the snapshots of its fence.
    pub fn end_work(&self) {
        self.busy.store(false, Ordering::SeqCst);
        for mut snapshot in self.snapshots.lock().expect("no panic").drain(..) {
            // The reader may have gone.
            let _ = snapshot.write(&[1]);
        }
    }
}

/// Memory of an export or of a mapping.
#[derive(Debug)]
pub struct Backing {
    pages: Box<[FileSegment]>,
    private: Option<Arc<File>>,
    /// The dma-buf of pages that are shown as they are.
    whole: Option<Arc<File>>,
    /// What the host does with it.
    pub outside: Arc<Outside>,
}

impl Backing {
    fn new(pages: Vec<FileSegment>, private: Option<Arc<File>>) -> Backing {
        world::memory_is_made();
        Backing { pages: pages.into(), private, whole: None, outside: Arc::default() }
    }

    /// Pages of an importer.
    pub fn of_pages(pages: Vec<FileSegment>) -> Backing {
        Backing::new(pages, None)
    }

    /// A snapshot of what devices do with it.
    pub fn fences(&self, _write: bool) -> io::Result<Option<OwnedFd>> {
        world::no_lock_is_held();
        if !self.outside.busy.load(Ordering::SeqCst) {
            return Ok(None);
        }
        let (snapshot, over) = io::pipe()?;
        self.outside.snapshots.lock().expect("no panic").push(over);
        Ok(Some(snapshot.into()))
    }

    /// How an echo of it is told. Its references are counted by the test.
    pub fn file_id(&self) -> Option<FileId> {
        file_id(self.heirloom()?).ok()
    }

    /// What a VMM gets.
    pub fn heirloom(&self) -> Option<BorrowedFd<'_>> {
        world::no_lock_is_held();
        self.private.as_ref().or(self.whole.as_ref()).map(|file| file.as_fd())
    }

    /// Of no client.
    pub fn is_mapped(&self) -> bool {
        false
    }

    /// Of no client.
    pub fn copy_out(&self, _from: u64, _to: &[FileSegment]) -> io::Result<u64> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Of no client.
    pub fn copy_in(&self, _to: u64, _from: &[FileSegment]) -> io::Result<u64> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// A dma-buf.
    pub fn kind(&self) -> FdKind {
        FdKind::DmaBuf
    }

    /// How bytes travel.
    pub fn mode(&self) -> Mode {
        if self.private.is_some() { Mode::Copy } else { Mode::ZeroCopy }
    }

    /// The VM's pages.
    pub fn part(&self, offset: u64, len: u64) -> io::Result<Vec<FileSegment>> {
        memory::slice(&self.pages, offset, len)
    }

    /// What consumers see.
    pub fn content(&self, offset: u64, len: u64) -> io::Result<Vec<FileSegment>> {
        let pages = self.part(offset, len)?;
        Ok(self.private.clone().map_or(pages, |file| vec![FileSegment { file, offset, len }]))
    }
}

impl Drop for Backing {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            world::no_lock_is_held();
            world::memory_is_gone();
        }
    }
}

/// Copies bytes.
pub fn copy(from: &[FileSegment], to: &[FileSegment]) -> io::Result<u64> {
    world::no_lock_is_held();
    point();
    let copied = bufshare::dmabuf::copy(from, to);
    point();
    copied
}

/// Makes memory.
#[derive(Debug)]
pub struct DmaBufs {
    /// Without a copy.
    pub zero_copy: bool,
}

impl DmaBufs {
    /// Enough.
    pub fn max_segments(&self) -> u32 {
        1024
    }

    /// Enough.
    pub fn max_size(&self) -> u64 {
        u64::MAX
    }

    /// Memory of an export.
    pub fn make(
        &self,
        pages: Vec<FileSegment>,
        size: u64,
        wish: Wish,
        _name: &str,
    ) -> Result<(Backing, Mode), Status> {
        world::no_lock_is_held();
        if self.zero_copy && wish.may_share {
            let mut backing = Backing::new(pages, None);
            backing.whole = Some(private(size));
            return Ok((backing, Mode::ZeroCopy));
        }
        Ok((Backing::new(pages, Some(private(size))), Mode::Copy))
    }

    /// Memory of an attachment.
    #[allow(clippy::unnecessary_wraps, reason = "as the daemon's")]
    pub fn make_private(&self, size: u64) -> Result<Backing, Status> {
        world::no_lock_is_held();
        let file = private(size);
        let pages = vec![FileSegment { file: file.clone(), offset: 0, len: size }];
        Ok(Backing::new(pages, Some(file)))
    }

    /// Whether anybody but us holds it.
    pub fn held_elsewhere(&self, backing: &Backing, ours: u64) -> io::Result<bool> {
        Ok(self.references(backing)?.is_some_and(|references| references > ours))
    }

    /// References that are not ours.
    #[allow(clippy::unnecessary_wraps, reason = "as the daemon's")]
    pub fn references(&self, backing: &Backing) -> io::Result<Option<u64>> {
        world::no_lock_is_held();
        point();
        Ok(Some(backing.outside.foreign.load(Ordering::SeqCst) as u64))
    }
}

fn private(size: u64) -> Arc<File> {
    let file = memfd_create("private", MemfdFlags::CLOEXEC).expect("memfd");
    ftruncate(&file, size).expect("memfd");
    Arc::new(File::from(file))
}
