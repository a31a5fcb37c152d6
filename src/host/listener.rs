//! The socket file, and who may connect to it.
//!
//! It knows paths and users, not the protocol. A stale socket of a daemon that is gone is replaced;
//! one that somebody serves is not.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use log::warn;
use rustix::fs::{Mode, Uid};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, connect, listen,
    socket_with,
};
use thiserror::Error;

use crate::ioctl::{PeerCredentials, peer_credentials};

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 16;

/// Why there is no host socket.
#[derive(Debug, Error)]
#[allow(missing_docs)]
pub enum ListenError {
    #[error(
        "{path}: another daemon serves it; stop that one or choose another path",
        path = path.display()
    )]
    Served { path: PathBuf },
    #[error(
        "{path}: a file that is no socket is in the way; remove it or choose another \
         path",
        path = path.display()
    )]
    Occupied { path: PathBuf },
    #[error("{path}: cannot listen; {hint}", path = path.display())]
    Listen { path: PathBuf, source: io::Error, hint: &'static str },
}

/// A listening host socket.
#[derive(Debug)]
pub struct Listener {
    socket: OwnedFd,
    /// Users that are served besides root and our own.
    also: Option<u32>,
    own: u32,
}

impl Listener {
    /// Creates the socket: mode 0600; where `also` names a user who must get in, it is theirs if we
    /// may give it away, else mode 0666, and credentials alone decide.
    pub fn bind(path: &Path, also: Option<u32>) -> Result<Listener, ListenError> {
        let failed = |errno: Errno| ListenError::Listen {
            path: path.to_owned(),
            source: errno.into(),
            hint: match errno {
                Errno::NOENT => "create its directory first",
                Errno::ACCESS | Errno::PERM => "this user may not create files there",
                Errno::NAMETOOLONG => "a socket path has at most 107 bytes",
                _ => "choose another path",
            },
        };
        let address = SocketAddrUnix::new(path).map_err(failed)?;
        let socket = new_socket().map_err(failed)?;
        clear_stale(path, &address, failed)?;
        // The file gets the mode that the socket has before it is bound.
        rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR).map_err(failed)?;
        bind(&socket, &address).map_err(failed)?;
        let own = rustix::process::geteuid().as_raw();
        if let Some(uid) = also.filter(|uid| *uid != own) {
            let given = rustix::fs::chown(path, Some(Uid::from_raw(uid)), None);
            if let Err(error) = given {
                warn!("the host socket cannot be given to user {uid} ({error}): its mode is 0666");
                rustix::fs::chmod(path, Mode::from_raw_mode(0o666)).map_err(failed)?;
            }
        }
        listen(&socket, BACKLOG).map_err(failed)?;
        Ok(Listener { socket, also, own })
    }

    /// A socket that listens already: that of the daemon before this one.
    pub fn inherit(socket: OwnedFd, also: Option<u32>) -> Listener {
        Listener { socket, also, own: rustix::process::geteuid().as_raw() }
    }

    /// The next connection and who made it; EAGAIN where nobody waits.
    pub fn accept(&self) -> io::Result<(OwnedFd, PeerCredentials)> {
        let socket = accept_with(&self.socket, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)?;
        let peer = peer_credentials(socket.as_fd())?;
        Ok((socket, peer))
    }

    /// Whether this user is served.
    pub fn admits(&self, uid: u32) -> bool {
        self.is_operator(uid) || Some(uid) == self.also
    }

    /// Whether this user may see what the VMs do with each other.
    pub fn is_operator(&self, uid: u32) -> bool {
        uid == 0 || uid == self.own
    }
}

impl From<Listener> for OwnedFd {
    fn from(listener: Listener) -> OwnedFd {
        listener.socket
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn new_socket() -> rustix::io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
}

fn clear_stale(
    path: &Path,
    address: &SocketAddrUnix,
    failed: impl Fn(Errno) -> ListenError,
) -> Result<(), ListenError> {
    let Ok(found) = std::fs::symlink_metadata(path) else { return Ok(()) };
    if !std::os::unix::fs::FileTypeExt::is_socket(&found.file_type()) {
        return Err(ListenError::Occupied { path: path.to_owned() });
    }
    let probe = new_socket().map_err(&failed)?;
    match connect(&probe, address) {
        Err(Errno::CONNREFUSED) => rustix::fs::unlink(path).map_err(failed),
        _ => Err(ListenError::Served { path: path.to_owned() }),
    }
}
