//! Memory that a host client lends: its dma-buf, or its sealed memfd.
//!
//! It knows what may be taken in, not who may use it. Nothing here trusts the client: a size is the
//! kernel's word, and memory that turns bad is an error of one copy, never a signal.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::sync_channel;
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, SealFlags};

use super::{Backing, DmaBufs, label};
use crate::ids::Access;
use crate::ioctl::{DmaBufSync, Mapping, dma_buf_sync};
use crate::limits::{COPY_STEP, LENT_WAIT};
use crate::memory::{FileSegment, is_dma_buf, is_tmpfs};

/// A client's dma-buf as it is mapped here.
#[derive(Debug)]
pub(super) struct Lent {
    map: Mapping,
    /// Threads that wait in the kernel for its fences, and that nobody waits for.
    stuck: Arc<AtomicUsize>,
}

/// Why the descriptor of a client is not taken in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)]
pub enum Unfit {
    #[error("neither a dma-buf nor a memfd of ordinary pages")]
    Kind,
    #[error("a memfd without F_SEAL_SHRINK")]
    Unsealed,
    #[error("sealed against, or not open for, this access")]
    Access,
    #[error("another size than was said")]
    Size,
    #[error("a dma-buf that cannot be mapped")]
    Map,
    #[error("this host has no descriptor or memory left")]
    NoRoom,
}

impl Unfit {
    /// This, unless the kernel says that it has no room.
    fn unless_full(self, error: &io::Error) -> Unfit {
        match error.raw_os_error() {
            Some(libc::ENOMEM | libc::EMFILE | libc::ENFILE) => Unfit::NoRoom,
            _ => self,
        }
    }
}

impl Backing {
    /// Whether copies must go through [`copy_out`](Self::copy_out) and [`copy_in`](Self::copy_in):
    /// it is a client's dma-buf, most of which cannot be read by pread.
    pub fn is_mapped(&self) -> bool {
        self.mapped.is_some()
    }

    /// Copies from byte `offset` on to all of these segments. Returns the bytes copied.
    pub fn copy_out(&self, offset: u64, to: &[FileSegment]) -> io::Result<u64> {
        let map = self.mapped.as_ref().ok_or(io::ErrorKind::InvalidInput)?;
        self.bracket(Access::READ, || {
            each_step(offset, to, |at, file, place, len| {
                map.map.write_to(at, len, file.as_fd(), place)
            })
        })
    }

    /// Copies from all of these segments to byte `offset` on. Returns the bytes copied.
    pub fn copy_in(&self, offset: u64, from: &[FileSegment]) -> io::Result<u64> {
        let map = self.mapped.as_ref().ok_or(io::ErrorKind::InvalidInput)?;
        self.bracket(Access::WRITE, || {
            each_step(offset, from, |at, file, place, len| {
                map.map.read_from(at, len, file.as_fd(), place)
            })
        })
    }

    fn bracket(
        &self,
        Access { read, write }: Access,
        copy: impl FnOnce() -> io::Result<u64>,
    ) -> io::Result<u64> {
        let fd = self.fd.as_ref().ok_or(io::ErrorKind::InvalidInput)?;
        let lent = self.mapped.as_ref().ok_or(io::ErrorKind::InvalidInput)?;
        // DMA_BUF_IOCTL_SYNC would wait for these for ever.
        let wanted = if write { PollFlags::OUT } else { PollFlags::IN };
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        if poll(&mut [PollFd::new(&fd, wanted)], Some(&now))? == 0 {
            return Err(io::Error::new(io::ErrorKind::WouldBlock, "a dma-buf has pending fences"));
        }
        let (one, other) = (fd.try_clone()?, fd.try_clone()?);
        let begin = move || dma_buf_sync(one.as_fd(), DmaBufSync { end: false, read, write });
        let end = DmaBufSync { end: true, read, write };
        let end_late = move || drop(dma_buf_sync(other.as_fd(), end));
        within(LENT_WAIT, &lent.stuck, begin, end_late)?;
        let copied = copy();
        dma_buf_sync(fd.as_fd(), end)?;
        copied
    }
}

/// Begins on a thread of its own, and waits so long for it. A fence that came after the look at them is
/// waited for in the kernel without bound: then the thread is left behind, and `stuck` until it has ended
/// what it began. There is one a buffer, or a few where several VMs were about to copy.
fn within(
    limit: Duration,
    stuck: &Arc<AtomicUsize>,
    begin: impl FnOnce() -> io::Result<()> + Send + 'static,
    end: impl FnOnce() + Send + 'static,
) -> io::Result<()> {
    let pending = || io::Error::new(io::ErrorKind::WouldBlock, "a dma-buf has pending fences");
    if stuck.load(Ordering::Acquire) > 0 {
        return Err(pending());
    }
    // Without room in it: what is sent is received, or nobody waits any more.
    let (began, wait) = sync_channel(0);
    let late = stuck.clone();
    let run = move || {
        let result = begin();
        let begun = result.is_ok();
        if began.send(result).is_err() {
            if begun {
                end();
            }
            late.fetch_sub(1, Ordering::AcqRel);
        }
    };
    thread::Builder::new().name("lent-sync".to_owned()).spawn(run)?;
    let Ok(result) = wait.recv_timeout(limit) else {
        stuck.fetch_add(1, Ordering::AcqRel);
        return Err(pending());
    };
    result
}

fn each_step(
    mut at: u64,
    segments: &[FileSegment],
    step: impl Fn(u64, &File, u64, usize) -> io::Result<usize>,
) -> io::Result<u64> {
    let start = at;
    for segment in segments {
        let mut done = 0;
        while done < segment.len {
            let len = usize::try_from(segment.len - done).unwrap_or(COPY_STEP).min(COPY_STEP);
            let place = segment.offset + done;
            super::copy::room(segment.file.as_fd(), place + len as u64)?;
            let moved = step(at, &segment.file, place, len)? as u64;
            if moved == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            (done, at) = (done + moved, at + moved);
        }
    }
    Ok(at - start)
}

impl DmaBufs {
    /// Takes in the memory of a client's descriptor: `size` bytes, all of it, for this access at most.
    ///
    /// It asks the file system of the descriptor, which may take its time.
    pub fn lend(
        &self,
        fd: OwnedFd,
        size: u64,
        access: Access,
        name: &str,
    ) -> Result<Backing, Unfit> {
        match rustix::fs::fcntl_get_seals(&fd) {
            Ok(seals) => self.lend_memfd(&fd, seals, size, access, name),
            Err(_) => lend_dma_buf(fd, size, access),
        }
    }

    fn lend_memfd(
        &self,
        fd: &OwnedFd,
        seals: SealFlags,
        size: u64,
        access: Access,
        name: &str,
    ) -> Result<Backing, Unfit> {
        if !seals.contains(SealFlags::SHRINK) {
            return Err(Unfit::Unsealed);
        }
        let stat = rustix::fs::fstat(fd).or(Err(Unfit::Kind))?;
        // Huge pages cannot be written by pwrite.
        if !is_tmpfs(fd) {
            return Err(Unfit::Kind);
        }
        let sealed = seals.intersects(SealFlags::WRITE | SealFlags::FUTURE_WRITE);
        let open = rustix::fs::fcntl_getfl(fd).or(Err(Unfit::Kind))? & OFlags::RWMODE;
        let readable = open == OFlags::RDWR || (open == OFlags::RDONLY && !access.write);
        if !readable || (access.write && sealed) {
            return Err(Unfit::Access);
        }
        if u64::try_from(stat.st_size) != Ok(size) {
            return Err(Unfit::Size);
        }
        let file =
            self.reopen(fd, access.write).map_err(|error| Unfit::Access.unless_full(&error))?;
        // Who may only read gets a copy of its own in any case.
        let device = self.device.as_ref().filter(|_| access.write);
        let wrapped = device.and_then(|device| device.wrap(file.as_fd(), size).ok());
        if let Some(fd) = &wrapped {
            label(fd.as_fd(), name);
        }
        let pages = [FileSegment { file: Arc::new(File::from(file)), offset: 0, len: size }];
        Ok(Backing { fd: wrapped, pages: pages.into(), private: None, mapped: None })
    }
}

fn lend_dma_buf(fd: OwnedFd, size: u64, access: Access) -> Result<Backing, Unfit> {
    if !is_dma_buf(&fd) {
        return Err(Unfit::Kind);
    }
    let end = rustix::fs::seek(&fd, rustix::fs::SeekFrom::End(0)).or(Err(Unfit::Size))?;
    let len = usize::try_from(size).or(Err(Unfit::Size))?;
    if end != size {
        return Err(Unfit::Size);
    }
    let open = rustix::fs::fcntl_getfl(&fd).or(Err(Unfit::Kind))? & OFlags::RWMODE;
    if open == OFlags::WRONLY || (access.write && open != OFlags::RDWR) {
        return Err(Unfit::Access);
    }
    let map =
        Mapping::new(&fd, len, access.write).map_err(|error| Unfit::Map.unless_full(&error))?;
    let mapped = Some(Lent { map, stuck: Arc::default() });
    Ok(Backing { fd: Some(fd), pages: Box::default(), private: None, mapped })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    #[test]
    fn a_fence_that_comes_at_the_last_moment_is_not_waited_for() {
        let limit = Duration::from_millis(20);
        let stuck = Arc::default();
        let (release, fence) = channel::<()>();
        let (ended, end) = channel();
        let begin = move || fence.recv().map_err(io::Error::other);
        let blocked = within(limit, &stuck, begin, move || ended.send(()).expect("heard"));
        assert_eq!(blocked.unwrap_err().kind(), io::ErrorKind::WouldBlock);
        let never = || panic!("one thread of a buffer is enough");
        let next = within(limit, &stuck, never, || ());
        assert_eq!(next.unwrap_err().kind(), io::ErrorKind::WouldBlock);
        release.send(()).unwrap();
        end.recv_timeout(10 * limit).expect("what began is ended");
        while stuck.load(Ordering::Acquire) > 0 {
            thread::yield_now();
        }
        within(50 * limit, &stuck, || Ok(()), || panic!("its caller ends it")).unwrap();
    }
}
