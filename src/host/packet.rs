//! One packet of the host socket, with at most one fd: sending, receiving, and nothing of its
//! meaning.
//!
//! Fds move as [`OwnedFd`] and [`BorrowedFd`]; one that nobody expects is closed here.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::{Errno, Result, retry_on_intr};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

use super::wire::MAX_PACKET;

/// Whether a call may wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wait {
    /// Until it is done.
    Forever,
    /// Not at all: EAGAIN instead.
    Never,
}

/// A packet as it arrived.
#[derive(Debug)]
pub struct Packet {
    /// Its bytes, at most [`MAX_PACKET`].
    pub bytes: Vec<u8>,
    /// The first fd that came with it.
    pub fd: Option<OwnedFd>,
    /// One more, which nobody expects: the packet counts as truncated.
    pub more: Option<OwnedFd>,
    /// Bytes or fds were lost: it is longer than a packet may be.
    pub truncated: bool,
    /// An fd came, and this process has no room for it.
    pub no_room: bool,
}

/// Sends one packet. The fd, if any, is duplicated by the kernel.
pub fn send(socket: impl AsFd, bytes: &[u8], fd: Option<BorrowedFd<'_>>, wait: Wait) -> Result<()> {
    let mut flags = SendFlags::NOSIGNAL;
    if wait == Wait::Never {
        flags |= SendFlags::DONTWAIT;
    }
    retry_on_intr(|| {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds: Vec<_> = fd.into_iter().collect();
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&fds)) {
            return Err(Errno::NOBUFS);
        }
        sendmsg(&socket, &[IoSlice::new(bytes)], &mut control, flags).map(drop)
    })
}

/// Receives one packet; `None` when the other side closed the connection.
///
/// To close an fd that came with it can take as long as whoever made it likes (a file of a FUSE file
/// system asks its server).
pub fn receive(socket: impl AsFd, wait: Wait) -> Result<Option<Packet>> {
    // The space for one has, by its alignment, room for two.
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut flags = RecvFlags::CMSG_CLOEXEC;
    if wait == Wait::Never {
        flags |= RecvFlags::DONTWAIT;
    }
    retry_on_intr(|| {
        let mut bytes = vec![0; MAX_PACKET];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut take = || recvmsg(&socket, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags);
        let got = match take() {
            // The other side closed without reading everything; its own last words come after
            // this error.
            Err(Errno::CONNRESET) => take()?,
            other => other?,
        };
        let (mut fd, mut more) = (None, None);
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(mut fds) = message {
                (fd, more) = (fds.next(), fds.next());
            }
        }
        let lost = got.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC);
        let truncated = lost || more.is_some();
        let no_room = got.flags.contains(ReturnFlags::CTRUNC) && fd.is_none();
        if got.bytes == 0 && fd.is_none() && !truncated {
            return Ok(None);
        }
        bytes.truncate(got.bytes);
        Ok(Some(Packet { bytes, fd, more, truncated, no_room }))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap()
    }

    #[test]
    fn packets_keep_their_borders_and_their_fds() {
        let (a, b) = pair();
        let file = tempfile::tempfile().unwrap();
        send(&a, b"one", None, Wait::Never).unwrap();
        send(&a, b"two", Some(file.as_fd()), Wait::Never).unwrap();
        let one = receive(&b, Wait::Never).unwrap().unwrap();
        assert!(one.bytes == b"one" && one.fd.is_none() && !one.truncated);
        let two = receive(&b, Wait::Never).unwrap().unwrap();
        let fd = two.fd.unwrap();
        assert_eq!(
            rustix::fs::fstat(&fd).unwrap().st_ino,
            rustix::fs::fstat(&file).unwrap().st_ino
        );
        assert!(rustix::io::fcntl_getfd(&fd).unwrap().contains(rustix::io::FdFlags::CLOEXEC));
        assert_eq!(receive(&b, Wait::Never).unwrap_err(), Errno::AGAIN);
        drop(a);
        assert!(receive(&b, Wait::Forever).unwrap().is_none());
    }

    #[test]
    fn fds_beyond_the_first_are_told_and_lost() {
        let (a, b) = pair();
        let pipes: Vec<_> = (0..4).map(|_| std::io::pipe().unwrap()).collect();
        let (ours, theirs): (Vec<_>, Vec<_>) = pipes.into_iter().unzip();
        let fds: Vec<_> = theirs.iter().map(AsFd::as_fd).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
        sendmsg(&a, &[IoSlice::new(b"one")], &mut control, SendFlags::empty()).unwrap();
        drop(theirs);
        let packet = receive(&b, Wait::Never).unwrap().unwrap();
        assert!(packet.truncated && packet.fd.is_some() && packet.more.is_some());
        drop(packet);
        for end in ours {
            assert_eq!(std::io::read_to_string(end).unwrap(), "", "it is closed");
        }
    }

    #[test]
    fn too_long_a_packet_is_told() {
        let (a, b) = pair();
        send(&a, &[7; MAX_PACKET + 1], None, Wait::Never).unwrap();
        let packet = receive(&b, Wait::Never).unwrap().unwrap();
        assert!(packet.truncated && packet.bytes.len() == MAX_PACKET);
    }
}
