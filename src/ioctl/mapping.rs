//! A shared mapping of a descriptor: bytes that others may write at any time, or take away.
//!
//! It knows ranges, not what they hold. Safe to call with any argument, as all of `ioctl`.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use vm_memory::VolatileSlice;

/// A shared mapping of a descriptor that others may write at any time.
#[derive(Debug)]
pub struct Mapping {
    start: *mut u8,
    len: usize,
}

// SAFETY: the mapping belongs to the value, is unmapped once by drop, and is reached by volatile
// copies only.
unsafe impl Send for Mapping {}
// SAFETY: as above; concurrent copies are what shared memory is for.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes of `fd` from its start, MAP_SHARED.
    pub fn new(fd: impl AsFd, len: usize, writable: bool) -> io::Result<Self> {
        use rustix::mm::{MapFlags, ProtFlags, mmap};
        let mut prot = ProtFlags::READ;
        if writable {
            prot |= ProtFlags::WRITE;
        }
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no memory of ours.
        let start = unsafe { mmap(std::ptr::null_mut(), len, prot, MapFlags::SHARED, fd, 0) }?;
        Ok(Mapping { start: start.cast(), len })
    }

    /// Bytes mapped.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it holds no byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    fn slice(&self) -> VolatileSlice<'_> {
        // SAFETY: `start..start + len` stays mapped as long as `self` lives.
        unsafe { VolatileSlice::new(self.start, self.len) }
    }

    /// Copies out from byte `offset`; ERANGE where the range is outside the mapping.
    pub fn read_at(&self, offset: usize, buf: &mut [u8]) -> io::Result<()> {
        let part = self.slice().subslice(offset, buf.len()).map_err(out_of_range)?;
        part.copy_to(buf);
        Ok(())
    }

    /// Copies in at byte `offset`; ERANGE where the range is outside the mapping.
    ///
    /// The mapping must have been made writable, else the process gets SIGSEGV, as with any
    /// read-only mapping; no memory is harmed.
    pub fn write_at(&self, offset: usize, buf: &[u8]) -> io::Result<()> {
        let part = self.slice().subslice(offset, buf.len()).map_err(out_of_range)?;
        part.copy_from(buf);
        Ok(())
    }

    /// pwrite of `len` bytes from byte `at` of the mapping to byte `place` of a file; the bytes
    /// written. The kernel copies, so that memory that is gone is EFAULT and no signal. EINVAL where
    /// the range is outside the mapping.
    pub fn write_to(
        &self,
        at: u64,
        len: usize,
        file: BorrowedFd<'_>,
        place: u64,
    ) -> io::Result<usize> {
        let from = self.range(at, len)?;
        retry(|| {
            // SAFETY: the range lies in the mapping, which lives as long as `self`; a page of it that
            // cannot be read makes the call fail.
            unsafe { libc::pwrite(file.as_raw_fd(), from.cast(), len, place as libc::off_t) }
        })
    }

    /// pread of `len` bytes from byte `place` of a file to byte `at` of the mapping; the bytes read, 0
    /// at the file's end. As [`write_to`](Self::write_to); EFAULT also where the mapping is read-only.
    pub fn read_from(
        &self,
        at: u64,
        len: usize,
        file: BorrowedFd<'_>,
        place: u64,
    ) -> io::Result<usize> {
        let to = self.range(at, len)?;
        retry(|| {
            // SAFETY: as above; the mapping is shared memory that no reference of ours points to.
            unsafe { libc::pread(file.as_raw_fd(), to.cast(), len, place as libc::off_t) }
        })
    }

    fn range(&self, at: u64, len: usize) -> io::Result<*mut u8> {
        let invalid = || io::Error::from_raw_os_error(libc::EINVAL);
        let at = usize::try_from(at).map_err(io::Error::other)?;
        at.checked_add(len).filter(|end| *end <= self.len).ok_or_else(invalid)?;
        Ok(self.start.wrapping_add(at))
    }
}

/// A call that a signal may interrupt.
fn retry(mut call: impl FnMut() -> libc::ssize_t) -> io::Result<usize> {
    loop {
        if let Ok(done) = usize::try_from(call()) {
            return Ok(done);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

fn out_of_range(error: vm_memory::VolatileMemoryError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, error)
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this length; no slice outlives `self`.
        if let Err(error) = unsafe { rustix::mm::munmap(self.start.cast(), self.len) } {
            log::error!("munmap of {} bytes failed: {error}", self.len);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mapping_is_bounded() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        let map = Mapping::new(&file, 4096, true).unwrap();
        map.write_at(4092, &[1, 2, 3, 4]).unwrap();
        let mut back = [0; 4];
        map.read_at(4092, &mut back).unwrap();
        assert_eq!(back, [1, 2, 3, 4]);
        assert!(map.write_at(4093, &back).is_err());
        assert!(map.read_at(usize::MAX, &mut back).is_err());
    }

    #[test]
    fn what_a_mapping_lost_is_an_error_of_the_call() {
        let (file, other) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        file.set_len(8192).unwrap();
        let map = Mapping::new(&file, 8192, true).unwrap();
        map.write_at(4094, b"abcd").unwrap();
        assert_eq!(map.write_to(4094, 4, other.as_fd(), 2).unwrap(), 4);
        assert_eq!(map.read_from(0, 4, other.as_fd(), 3).unwrap(), 3, "to the file's end");
        let mut back = [0; 4];
        map.read_at(0, &mut back).unwrap();
        assert_eq!(&back, b"bcd\0");
        file.set_len(4096).unwrap();
        let fault = Some(libc::EFAULT);
        let gone = map.write_to(4096, 4, other.as_fd(), 0).unwrap_err();
        assert_eq!(gone.raw_os_error(), fault);
        assert_eq!(map.read_from(4096, 4, other.as_fd(), 0).unwrap_err().raw_os_error(), fault);
        let read_only = Mapping::new(&file, 4096, false).unwrap();
        let refused = read_only.read_from(0, 4, other.as_fd(), 0).unwrap_err();
        assert_eq!(refused.raw_os_error(), fault);
        for (at, len) in [(8192, 1), (8190, 3), (u64::MAX, 2)] {
            assert!(map.write_to(at, len, other.as_fd(), 0).is_err());
        }
    }
}
