//! What can go wrong for a client of the host socket, in words that say what to do.
//!
//! It knows the socket and the protocol's statuses, not why a program made a request.

use std::io;
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use thiserror::Error;

use super::wire::{Fault, Type};
use crate::protocol::Status;

/// Why a call failed. [`Error::Refused`] is a normal answer; after the others the connection is of
/// no use any more.
#[derive(Debug, Error)]
#[allow(missing_docs)]
pub enum Error {
    #[error(
        "no such socket: {path}; is the daemon running with --host-socket {path}? \
         (another path: --host-socket here, or $BUFSHARE_HOST_SOCKET)",
        path = path.display()
    )]
    NoSocket { path: PathBuf, source: io::Error },
    #[error(
        "nobody listens on {path}; is the daemon running with --host-socket {path}?",
        path = path.display()
    )]
    NobodyListens { path: PathBuf, source: io::Error },
    #[error(
        "no permission to connect to {path}: it belongs to the daemon's user; run this program as \
         that user or as root, or start the daemon with --host-uid {uid}",
        path = path.display()
    )]
    Permission { path: PathBuf, uid: u32, source: io::Error },
    #[error("{path} is not the daemon's host socket (it must be SOCK_SEQPACKET)", path = path.display())]
    NotHostSocket { path: PathBuf, source: io::Error },
    #[error("cannot connect to {path}", path = path.display())]
    Connect { path: PathBuf, source: io::Error },
    #[error(
        "the daemon does not serve this user; run this program as the daemon's user or as root, or \
         start the daemon with --host-uid"
    )]
    NotAdmitted,
    #[error("the daemon serves as many clients as it can; close one of them")]
    TooManyClients,
    #[error("the daemon speaks version {daemon} of the host protocol, this program version 1")]
    Version { daemon: u32 },
    #[error("the daemon refused {}: {} ({})", request.name(), status.name(), meaning(*request, *status, *detail))]
    Refused { request: Type, status: Status, detail: u32 },
    #[error("the daemon closed the connection; its log says why")]
    Closed,
    #[error("{count} buffers are named {name:?}; say the UUID")]
    Ambiguous { name: String, count: usize },
    #[error("the daemon broke the host protocol in answer to {}: {what}", request.name())]
    Protocol { request: Type, what: &'static str },
    #[error("the connection to the daemon failed")]
    Io(#[source] io::Error),
}

impl Error {
    /// The refusing status, if this is a normal answer.
    pub fn status(&self) -> Option<Status> {
        match self {
            Error::Refused { status, .. } => Some(*status),
            _ => None,
        }
    }

    pub(super) fn connect(path: &Path, errno: Errno) -> Error {
        let (path, source) = (path.to_owned(), io::Error::from(errno));
        match errno {
            Errno::NOENT => Error::NoSocket { path, source },
            Errno::CONNREFUSED => Error::NobodyListens { path, source },
            Errno::PROTOTYPE => Error::NotHostSocket { path, source },
            Errno::ACCESS | Errno::PERM => {
                let uid = rustix::process::geteuid().as_raw();
                Error::Permission { path, uid, source }
            }
            _ => Error::Connect { path, source },
        }
    }
}

impl From<Errno> for Error {
    fn from(errno: Errno) -> Self {
        match errno {
            Errno::CONNRESET | Errno::PIPE => Error::Closed,
            _ => Error::Io(errno.into()),
        }
    }
}

fn meaning(request: Type, status: Status, detail: u32) -> &'static str {
    match status {
        Status::Ok => "no error",
        Status::Unsupp => "this daemon does not know it",
        Status::Inval => "malformed request",
        Status::NoEnt if request == Type::Grant => {
            "no such export, or the operator lets the host grant that VM nothing: start the daemon \
             with --allow host:VM"
        }
        Status::NoEnt if request == Type::Cancel => "it is not pending any more",
        Status::NoEnt => "no such buffer or lease, or it is not offered to the host",
        Status::Access if request == Type::Acquire => {
            "more access than the exporter granted, or only a copy is possible"
        }
        Status::Access if request == Type::Grant => {
            "more access than the export has, or than the operator allows"
        }
        Status::Access => "the lease has no right to this access",
        Status::Busy => "too many pending waits or misses; try again later",
        Status::NoMem => "the host is out of memory or descriptors",
        Status::Quota if request == Type::Export => {
            "too many or too large exports, of this client or of all"
        }
        Status::Quota => "too many leases",
        Status::Range if request == Type::Export => "the size must be a multiple of 4096 bytes",
        Status::Range => "outside the buffer",
        Status::Fault => match Fault::from_wire(detail) {
            Some(Fault::Unsealed) => {
                "this memfd could shrink: make it with MFD_ALLOW_SEALING and add F_SEAL_SHRINK"
            }
            Some(Fault::Access) => {
                "the fd is not open for this access, or sealed against writing: lend it READ only"
            }
            Some(Fault::Size) => "the size must be that of the whole fd",
            Some(Fault::Map) => "this dma-buf cannot be mapped",
            Some(Fault::Kind) | None => "the fd is neither a dma-buf nor a memfd of ordinary pages",
        },
        Status::TooMany => "too many segments",
        Status::TimedOut => "another holder did not finish in time",
        Status::Revoked => "the exporter revoked the buffer, or is gone",
        Status::Canceled => "canceled",
        Status::Again => "another holder is not finished",
        Status::Io => "a failure inside the daemon; its log says more",
    }
}
