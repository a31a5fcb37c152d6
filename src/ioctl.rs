//! The one place with `unsafe`: ioctls of /dev/udmabuf and dma-bufs, inherited fds, the allocator's settings;
//! memory mappings in `mapping`.
//!
//! It knows kernel ABIs, not buffers or VMs. Every wrapper is safe to call with any argument: the
//! worst outcome is an `Err` with the kernel's errno.
#![allow(unsafe_code)]

mod mapping;

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

pub use mapping::Mapping;
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
    use std::os::fd::AsFd;

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
