//! COPY: a private sealed memfd that SYNC fills, by pread and pwrite and never through a mapping: a
//! file that its owner truncates is an error here, not a SIGBUS.
//!
//! It knows files, not who asked for the copy.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};

use crate::limits::COPY_STEP;
use crate::memory::{COPY_NAME, FileSegment};

/// A memfd of `size` zeros that nobody can resize.
pub fn private(size: u64) -> io::Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let fd = rustix::fs::memfd_create(COPY_NAME, flags)?;
    rustix::fs::ftruncate(&fd, size)?;
    rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(fd)
}

/// Gives back the pages of a private memfd. Who writes to it after that does so on its own account.
pub fn empty(file: BorrowedFd<'_>, size: u64) -> io::Result<()> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    Ok(rustix::fs::fallocate(file, flags, 0, size)?)
}

/// Copies the bytes of one list of segments to another of the same length. Returns the bytes copied.
///
/// An error names the byte behind which a file is shorter than it was.
pub fn copy(from: &[FileSegment], to: &[FileSegment]) -> io::Result<u64> {
    let longest = from.iter().map(|segment| segment.len).max().unwrap_or(0);
    let step = usize::try_from(longest).unwrap_or(COPY_STEP).min(COPY_STEP);
    let mut buffer = vec![0u8; step];
    let mut copied = 0;
    let (mut sources, mut targets) = (from.iter(), to.iter());
    let (mut source, mut target) = (sources.next(), targets.next());
    // Bytes of the two that are done.
    let (mut read, mut written) = (0, 0);
    while let (Some(one), Some(other)) = (source, target) {
        let left = (one.len - read).min(other.len - written);
        let part = usize::try_from(left).unwrap_or(COPY_STEP).min(buffer.len());
        let chunk = buffer.get_mut(..part).unwrap_or_default();
        read_exact_at(one.file.as_fd(), chunk, one.offset + read)?;
        write_all_at(other.file.as_fd(), chunk, other.offset + written)?;
        read += part as u64;
        written += part as u64;
        copied += part as u64;
        if read == one.len {
            (source, read) = (sources.next(), 0);
        }
        if written == other.len {
            (target, written) = (targets.next(), 0);
        }
    }
    Ok(copied)
}

fn read_exact_at(fd: BorrowedFd<'_>, buffer: &mut [u8], offset: u64) -> io::Result<()> {
    let mut done = 0;
    while let Some(rest) = buffer.get_mut(done..).filter(|rest| !rest.is_empty()) {
        match rustix::io::pread(fd, rest, offset + done as u64) {
            Ok(0) => {
                let at = offset + done as u64;
                let text = format!("memory was truncated: nothing left at byte {at}");
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, text));
            }
            Ok(n) => done += n,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// A write past the end would grow a file that its owner truncated.
pub(super) fn room(fd: BorrowedFd<'_>, end: u64) -> io::Result<()> {
    if rustix::fs::fstat(fd)?.st_size.cast_unsigned() < end {
        let text = format!("memory was truncated: nothing left at byte {end}");
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, text));
    }
    Ok(())
}

fn write_all_at(fd: BorrowedFd<'_>, buffer: &[u8], offset: u64) -> io::Result<()> {
    room(fd, offset + buffer.len() as u64)?;
    let mut done = 0;
    while let Some(rest) = buffer.get(done..).filter(|rest| !rest.is_empty()) {
        match rustix::io::pwrite(fd, rest, offset + done as u64) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => done += n,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::unix::fs::FileExt;
    use std::sync::Arc;

    #[test]
    fn only_the_range_travels_and_in_one_direction() {
        let ram = tempfile::tempfile().unwrap();
        ram.write_all_at(&[7; 8192], 0).unwrap();
        let pages = [
            FileSegment { file: Arc::new(ram.try_clone().unwrap()), offset: 4096, len: 10 },
            FileSegment { file: Arc::new(ram.try_clone().unwrap()), offset: 0, len: 10 },
        ];
        let copy_of = Arc::new(File::from(private(4096).unwrap()));
        // Their borders lie elsewhere than those of the pages.
        let parts = [(100, 3), (103, 17)];
        let there = parts.map(|(offset, len)| FileSegment { file: copy_of.clone(), offset, len });
        assert_eq!(copy(&pages, &there).unwrap(), 20);
        let mut back = [0; 122];
        copy_of.read_exact_at(&mut back, 0).unwrap();
        assert!(back[100..120].iter().all(|byte| *byte == 7));
        assert!(back[..100].iter().chain(&back[120..]).all(|byte| *byte == 0));
        copy_of.write_all_at(&[9; 20], 100).unwrap();
        assert_eq!(copy(&there, &pages).unwrap(), 20);
        let mut back = [0; 11];
        ram.read_exact_at(&mut back, 4096).unwrap();
        assert_eq!(back, [9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 7]);
    }

    #[test]
    fn truncated_memory_is_an_error_and_is_not_grown() {
        let ram = tempfile::tempfile().unwrap();
        ram.set_len(8192).unwrap();
        let pages =
            [FileSegment { file: Arc::new(ram.try_clone().unwrap()), offset: 0, len: 8192 }];
        let memfd = Arc::new(File::from(private(8192).unwrap()));
        let copied = [FileSegment { file: memfd, offset: 0, len: 8192 }];
        ram.set_len(4096).unwrap();
        for (from, to) in [(&pages, &copied), (&copied, &pages)] {
            let error = copy(from, to).unwrap_err();
            assert!(error.to_string().contains("truncated"), "{error}");
        }
        assert_eq!(ram.metadata().unwrap().len(), 4096);
    }

    #[test]
    fn the_private_copy_cannot_be_resized() {
        let memfd = private(4096).unwrap();
        assert!(rustix::fs::ftruncate(&memfd, 0).is_err());
        assert!(rustix::fs::ftruncate(&memfd, 8192).is_err());
    }
}
