//! What devices of the host still do with a dma-buf, as a descriptor to poll.
//!
//! It knows the kernel's interface, not who waits.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Once;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::ioctl;

/// A snapshot of the fences of a dma-buf that are not over: those of writers, with `write` those of
/// readers as well. It is readable once they are, well or not. `None` where there are none.
pub fn snapshot(dma_buf: BorrowedFd<'_>, write: bool) -> io::Result<Option<OwnedFd>> {
    static OLD_KERNEL: Once = Once::new();
    let fd = match ioctl::dma_buf_export_sync_file(dma_buf, write) {
        Err(error) if error.raw_os_error() == Some(libc::ENOTTY) => {
            OLD_KERNEL.call_once(|| {
                log::warn!(
                    "this kernel tells no fences of dma-bufs (Linux 6.0, CONFIG_SYNC_FILE): guests \
                     do not wait for devices of the host"
                );
            });
            return Ok(None);
        }
        made => made?,
    };
    let mut fds = [PollFd::new(&fd, PollFlags::IN)];
    let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
    let over = poll(&mut fds, Some(&at_once))? > 0;
    Ok((!over).then_some(fd))
}
