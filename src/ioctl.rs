//! The one file with `unsafe`: ioctls of /dev/udmabuf and dma-bufs, memory mappings, inherited fds, the
//! allocator's settings.
//!
//! It knows kernel ABIs, not buffers or VMs. Every wrapper is safe to call with any argument: the
//! worst outcome is an `Err` with the kernel's errno.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use vm_memory::VolatileSlice;
use zerocopy::{FromBytes, Immutable, IntoBytes};

const fn ioc(dir: u32, kind: u8, nr: u32, size: usize) -> u32 {
    dir << 30 | (size as u32) << 16 | (kind as u32) << 8 | nr
}

/// `_IOW(kind, nr, size)` of `include/uapi/asm-generic/ioctl.h`.
pub const fn iow(kind: u8, nr: u32, size: usize) -> u32 {
    ioc(1, kind, nr, size)
}

/// `_IOR(kind, nr, size)`.
pub const fn ior(kind: u8, nr: u32, size: usize) -> u32 {
    ioc(2, kind, nr, size)
}

/// `_IOWR(kind, nr, size)`.
pub const fn iowr(kind: u8, nr: u32, size: usize) -> u32 {
    ioc(3, kind, nr, size)
}

fn call(fd: BorrowedFd<'_>, request: u32, arg: *mut libc::c_void) -> io::Result<libc::c_int> {
    loop {
        // SAFETY: `fd` is open; every caller passes an argument that lives through the call and is
        // at least as large as the size that `request` encodes or the ABI states.
        let ret = unsafe { libc::ioctl(fd.as_raw_fd(), request as libc::Ioctl, arg) };
        if ret >= 0 {
            return Ok(ret);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// Calls an ioctl whose argument is a flat structure that the kernel reads and may write.
///
/// `T` must hold no pointers that the kernel follows. EINVAL where the size that `request` encodes
/// is not that of `T`.
pub fn ioctl_flat<T>(fd: BorrowedFd<'_>, request: u32, arg: &mut T) -> io::Result<libc::c_int>
where
    T: FromBytes + IntoBytes + Immutable,
{
    if (request >> 16) & 0x3fff != size_of::<T>() as u32 {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    call(fd, request, std::ptr::from_mut(arg).cast())
}

/// As [`ioctl_flat`], with bytes that the kernel reads: it finds their address in the u64 at byte
/// `place` of the argument and their number in the u32 after that.
///
/// EINVAL where the argument has no such fields, or the bytes do not fit a u32.
pub fn ioctl_with_bytes<T>(
    fd: BorrowedFd<'_>,
    request: u32,
    arg: &mut T,
    place: usize,
    bytes: &[u8],
) -> io::Result<libc::c_int>
where
    T: FromBytes + IntoBytes + Immutable,
{
    point_at(arg, place, bytes.as_ptr() as u64, bytes.len())?;
    ioctl_flat(fd, request, arg)
}

/// As [`ioctl_flat`], for a request that makes a new descriptor and leaves its number in the i32 at
/// byte `place` of the argument.
///
/// Only for requests whose ABI says so: the descriptor belongs to the caller from then on.
pub fn ioctl_new_fd<T>(
    fd: BorrowedFd<'_>,
    request: u32,
    arg: &mut T,
    place: usize,
) -> io::Result<OwnedFd>
where
    T: FromBytes + IntoBytes + Immutable,
{
    let range = place..place.saturating_add(4);
    let invalid = || io::Error::from_raw_os_error(libc::EINVAL);
    arg.as_bytes().get(range.clone()).ok_or_else(invalid)?;
    ioctl_flat(fd, request, arg)?;
    let bytes = arg.as_bytes().get(range).ok_or_else(invalid)?;
    let number = i32::from_ne_bytes(bytes.try_into().map_err(io::Error::other)?);
    if number < 0 {
        return Err(io::Error::from_raw_os_error(libc::EBADF));
    }
    // SAFETY: the request made this descriptor a moment ago, for its caller.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// As [`ioctl_new_fd`], with room for bytes that the kernel writes: it finds the room's address in the u64
/// at byte `room_place` of the argument and its size in the u32 after that.
///
/// EINVAL where the argument has no such fields, or the size does not fit a u32.
pub fn ioctl_new_fd_with_room<T>(
    fd: BorrowedFd<'_>,
    request: u32,
    arg: &mut T,
    place: usize,
    room_place: usize,
    room: &mut [u8],
) -> io::Result<OwnedFd>
where
    T: FromBytes + IntoBytes + Immutable,
{
    point_at(arg, room_place, room.as_mut_ptr() as u64, room.len())?;
    ioctl_new_fd(fd, request, arg, place)
}

/// Enters an address and a number of bytes into an argument.
fn point_at<T>(arg: &mut T, place: usize, address: u64, len: usize) -> io::Result<()>
where
    T: FromBytes + IntoBytes,
{
    let invalid = || io::Error::from_raw_os_error(libc::EINVAL);
    let fields = arg.as_mut_bytes().get_mut(place..).and_then(|rest| rest.get_mut(..12));
    let (to, count) = fields.ok_or_else(invalid)?.split_at_mut(8);
    to.copy_from_slice(&address.to_ne_bytes());
    count.copy_from_slice(&u32::try_from(len).map_err(io::Error::other)?.to_ne_bytes());
    Ok(())
}

/// One entry of `struct udmabuf_create_list` (`include/uapi/linux/udmabuf.h`).
#[derive(Debug, Clone, Copy)]
pub struct UdmabufItem<'a> {
    /// A memfd with F_SEAL_SHRINK.
    pub memfd: BorrowedFd<'a>,
    /// Bytes into the memfd, page-aligned.
    pub offset: u64,
    /// Bytes, page-aligned.
    pub size: u64,
}

/// UDMABUF_CREATE_LIST: a dma-buf (close-on-exec) of exactly the listed pages.
pub fn udmabuf_create<'a>(
    device: BorrowedFd<'_>,
    items: impl ExactSizeIterator<Item = UdmabufItem<'a>>,
) -> io::Result<OwnedFd> {
    const FLAGS_CLOEXEC: u32 = 1;
    let mut list: Vec<u64> = Vec::with_capacity(1 + items.len() * 3);
    list.push(0);
    for item in items {
        list.extend([pair(item.memfd.as_raw_fd() as u32, 0), item.offset, item.size]);
    }
    let count = u32::try_from(list.len() / 3).map_err(io::Error::other)?;
    if let Some(head) = list.first_mut() {
        *head = pair(FLAGS_CLOEXEC, count);
    }
    let fd = call(device, iow(b'u', 0x43, 8), list.as_mut_ptr().cast())?;
    // SAFETY: the ioctl returned a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Two u32 fields that follow each other.
fn pair(first: u32, second: u32) -> u64 {
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&first.to_ne_bytes());
    bytes[4..].copy_from_slice(&second.to_ne_bytes());
    u64::from_ne_bytes(bytes)
}

/// Direction of DMA_BUF_IOCTL_SYNC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct DmaBufSync {
    pub end: bool,
    pub read: bool,
    pub write: bool,
}

/// DMA_BUF_IOCTL_SYNC: brackets CPU access to a mapped dma-buf.
pub fn dma_buf_sync(fd: BorrowedFd<'_>, sync: DmaBufSync) -> io::Result<()> {
    let mut flags = u64::from(sync.read) | u64::from(sync.write) << 1 | u64::from(sync.end) << 2;
    call(fd, iow(b'b', 0, 8), std::ptr::from_mut(&mut flags).cast()).map(drop)
}

/// DMA_BUF_SET_NAME_B: the name that debugfs and fdinfo show; at most 31 bytes.
pub fn dma_buf_set_name(fd: BorrowedFd<'_>, name: &std::ffi::CStr) -> io::Result<()> {
    call(fd, iow(b'b', 1, 8), name.as_ptr().cast_mut().cast()).map(drop)
}

/// DMA_BUF_IOCTL_EXPORT_SYNC_FILE: a descriptor that is readable once the fences are over that the
/// dma-buf has now, those of writers or with `write` all. ENOTTY where the kernel cannot.
pub fn dma_buf_export_sync_file(fd: BorrowedFd<'_>, write: bool) -> io::Result<OwnedFd> {
    // struct dma_buf_export_sync_file: flags (READ 1, WRITE 2), fd.
    let mut arg = [if write { 2 } else { 1 }, u32::MAX];
    ioctl_new_fd(fd, iowr(b'b', 2, 8), &mut arg, 4)
}

/// Takes over a descriptor that nobody else owns: one that this process inherited at start-up
/// (`fd=N`), or one that was given up with `into_raw_fd`.
///
/// Call it once per number. EBADF where it is not open.
pub fn adopt_fd(number: i32) -> io::Result<OwnedFd> {
    // SAFETY: F_GETFD takes no pointer; a number that is not open answers EBADF.
    if unsafe { libc::fcntl(number, libc::F_GETFD) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is open, and nobody else owns it, as the caller knows.
    let fd = unsafe { OwnedFd::from_raw_fd(number) };
    rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC)?;
    Ok(fd)
}

/// Lets each heap keep so many bytes of freed memory for the next one who needs it.
///
/// Only glibc's allocator is told; others do as they like.
pub fn keep_freed_memory(bytes: i32) {
    #[cfg(target_env = "gnu")]
    for parameter in [libc::M_TRIM_THRESHOLD, libc::M_MMAP_THRESHOLD] {
        // SAFETY: mallopt takes two integers and may be called at any time.
        if unsafe { libc::mallopt(parameter, bytes) } == 0 {
            log::debug!("mallopt refuses to keep {bytes} bytes");
        }
    }
    #[cfg(not(target_env = "gnu"))]
    let _ = bytes;
}

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
}

impl Mapping {
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

/// Who is at the other end of a Unix socket, as the kernel knows (SO_PEERCRED).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerCredentials {
    /// Process when it connected; 0 where it is in a namespace that this process cannot see.
    pub pid: u32,
    /// Effective user when it connected.
    pub uid: u32,
}

/// Asks for the credentials of a connected Unix socket's peer.
///
/// rustix's own function holds the pid in a type that must not be 0.
pub fn peer_credentials(socket: BorrowedFd<'_>) -> io::Result<PeerCredentials> {
    let mut cred = libc::ucred { pid: 0, uid: u32::MAX, gid: u32::MAX };
    let mut len = size_of::<libc::ucred>() as libc::socklen_t;
    let at = std::ptr::from_mut(&mut cred).cast();
    // SAFETY: the kernel writes at most `len` bytes, the size of `cred`, which is plain integers.
    let ret = unsafe {
        libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_PEERCRED, at, &mut len)
    };
    if ret < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(PeerCredentials { pid: u32::try_from(cred.pid).unwrap_or(0), uid: cred.uid })
}

/// A kick-able eventfd as a `File`, for wake-ups between threads.
pub fn eventfd() -> io::Result<File> {
    use rustix::event::{EventfdFlags, eventfd};
    Ok(File::from(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
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

    #[test]
    fn wrong_argument_size_is_refused() {
        let file = tempfile::tempfile().unwrap();
        let error = ioctl_flat(file.as_fd(), iowr(b'u', 1, 4), &mut 0u64).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
    }

    #[test]
    fn adopting_a_closed_fd_is_an_error() {
        assert_eq!(adopt_fd(1_000_000).unwrap_err().raw_os_error(), Some(libc::EBADF));
    }
}
