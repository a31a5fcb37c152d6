//! To whom the daemon leaves what it has: a successor that connects to the hand-over socket, or the
//! service manager, which passes it to the next daemon.
//!
//! It knows who may ask for it and how it is sent, not what it is.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use log::{info, warn};

use super::listener::Listener;
use crate::estate::Estate;
use crate::handover::{self, Manager, Parcel};

/// The possible ones.
#[derive(Debug, Default)]
pub struct Heirs {
    /// Whoever connects here.
    pub socket: Option<Listener>,
    /// The service manager, and what becomes readable when it ends the daemon.
    pub manager: Option<(Manager, UnixStream)>,
    /// Listening sockets of the VMs, by name.
    pub listeners: Parcel,
}

/// Who asked.
#[derive(Debug)]
pub enum Heir {
    /// The service manager ends the daemon.
    Manager,
    /// A successor connected.
    Successor(OwnedFd),
}

impl Heirs {
    /// What to wait for: the hand-over socket, and the end that the service manager wants.
    pub fn sources(&self) -> (Option<BorrowedFd<'_>>, Option<BorrowedFd<'_>>) {
        let socket = self.socket.as_ref().map(AsFd::as_fd);
        (socket, self.manager.as_ref().map(|(_, end)| end.as_fd()))
    }

    /// Who connected to the hand-over socket, if it is one of us.
    pub fn successor(&self) -> Option<Heir> {
        let (socket, peer) = self.socket.as_ref()?.accept().ok()?;
        let admitted = self.socket.as_ref().is_some_and(|listener| listener.admits(peer.uid));
        if !admitted {
            warn!("user {} (pid {}) may not take over", peer.uid, peer.pid);
            return None;
        }
        info!("pid {} takes over", peer.pid);
        Some(Heir::Successor(socket))
    }

    /// Leaves everything to one of them.
    pub fn leave(self, heir: Heir, mut estate: Estate) -> io::Result<()> {
        estate.listeners.extend(self.listeners);
        match (heir, self.manager) {
            (Heir::Successor(successor), _) => {
                let also = self.socket.map(|listener| (HAND_OVER.to_owned(), listener.into()));
                estate.listeners.extend(also);
                estate.give(|name, fd| handover::hand_over(&successor, name, fd))?;
                handover::end(&successor)
            }
            (Heir::Manager, Some((manager, _))) => {
                estate.give(|name, fd| manager.store(name, fd))?;
                manager.barrier()
            }
            (Heir::Manager, None) => Ok(()),
        }
    }
}

/// The hand-over socket's own name.
pub const HAND_OVER: &str = "hand-over";
/// The host socket's.
pub const HOST: &str = "host";
