//! COPY: a private sealed memfd that SYNC fills, by pread and pwrite and never through a mapping: a
//! file that its owner truncates is an error here, not a SIGBUS.
//!
//! It knows files, not who asked for the copy.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{MemfdFlags, SealFlags};

use crate::limits::COPY_STEP;
use crate::memory::FileSegment;

/// A memfd of `size` zeros that nobody can resize.
pub fn private(size: u64) -> io::Result<OwnedFd> {
    let fd =
        rustix::fs::memfd_create("bufshare-copy", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    rustix::fs::ftruncate(&fd, size)?;
    rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(fd)
}

/// Copies between `pages` and the private memfd from its byte `offset` on. Returns the bytes copied.
pub fn copy(
    pages: &[FileSegment],
    private: BorrowedFd<'_>,
    offset: u64,
    to_private: bool,
) -> io::Result<u64> {
    let longest = pages.iter().map(|segment| segment.len).max().unwrap_or(0);
    let step = usize::try_from(longest).unwrap_or(COPY_STEP).min(COPY_STEP);
    let mut buffer = vec![0u8; step];
    let mut at = offset;
    for segment in pages {
        let mut done = 0;
        while done < segment.len {
            let left = usize::try_from(segment.len - done).unwrap_or(COPY_STEP);
            let part = left.min(buffer.len());
            let chunk = buffer.get_mut(..part).unwrap_or_default();
            let there = segment.offset + done;
            let (from, from_at, to, to_at) = if to_private {
                (segment.file.as_fd(), there, private, at)
            } else {
                (private, at, segment.file.as_fd(), there)
            };
            read_exact_at(from, chunk, from_at)?;
            write_all_at(to, chunk, to_at)?;
            done += part as u64;
            at += part as u64;
        }
    }
    Ok(at - offset)
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

fn write_all_at(fd: BorrowedFd<'_>, buffer: &[u8], offset: u64) -> io::Result<()> {
    let end = offset + buffer.len() as u64;
    // A write past the end would grow a file that its owner truncated.
    if rustix::fs::fstat(fd)?.st_size.cast_unsigned() < end {
        let text = format!("memory was truncated: nothing left at byte {end}");
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, text));
    }
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
        let memfd = private(4096).unwrap();
        assert_eq!(copy(&pages, memfd.as_fd(), 100, true).unwrap(), 20);
        let copy_of = File::from(memfd.try_clone().unwrap());
        let mut back = [0; 122];
        copy_of.read_exact_at(&mut back, 0).unwrap();
        assert!(back[100..120].iter().all(|byte| *byte == 7));
        assert!(back[..100].iter().chain(&back[120..]).all(|byte| *byte == 0));
        copy_of.write_all_at(&[9; 20], 100).unwrap();
        assert_eq!(copy(&pages, memfd.as_fd(), 100, false).unwrap(), 20);
        let mut there = [0; 11];
        ram.read_exact_at(&mut there, 4096).unwrap();
        assert_eq!(there, [9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 7]);
    }

    #[test]
    fn truncated_memory_is_an_error_and_is_not_grown() {
        let ram = tempfile::tempfile().unwrap();
        ram.set_len(8192).unwrap();
        let pages =
            [FileSegment { file: Arc::new(ram.try_clone().unwrap()), offset: 0, len: 8192 }];
        let memfd = private(8192).unwrap();
        ram.set_len(4096).unwrap();
        for to_private in [true, false] {
            let error = copy(&pages, memfd.as_fd(), 0, to_private).unwrap_err();
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
