//! What a daemon leaves to its successor: buffers that the host still uses, clients with their
//! connections, listening sockets.
//!
//! It knows what each named descriptor is, not how it travels (that is `handover`). VMs are no part of
//! it: their sessions end with the daemon.

use std::fs::File;
use std::io::{self, Seek};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use log::warn;
use serde::{Deserialize, Serialize};

use crate::dmabuf::{Backing, FdKind};
use crate::handover::{self, Parcel, STATE};
use crate::host::conn::LeftClient;
use crate::hub::Memory;
use crate::ids::{ClientId, LeaseId};
use crate::registry::Left;

/// Of the listing. A daemon that finds another one starts with nothing.
const VERSION: u32 = 1;

/// What the descriptors are.
#[derive(Debug, Serialize, Deserialize)]
struct Listing {
    version: u32,
    clock: Duration,
    last_lease: LeaseId,
    last_client: ClientId,
    buffers: Vec<Left>,
    clients: Vec<LeftClient>,
}

/// Everything that is left.
#[derive(Debug, Default)]
pub struct Estate {
    /// The predecessor's clock: leases say since when they are.
    pub clock: Duration,
    /// The last number that was given to a lease.
    pub last_lease: LeaseId,
    /// The last number that was given to a client.
    pub last_client: ClientId,
    /// With their memory.
    pub buffers: Vec<(Left, Memory)>,
    /// With their connections, if they are there still.
    pub clients: Vec<(LeftClient, Option<OwnedFd>)>,
    /// By name.
    pub listeners: Parcel,
}

impl Estate {
    /// Calls `give` with each descriptor and its name, the listing last.
    pub fn give(
        self,
        mut give: impl FnMut(&str, BorrowedFd<'_>) -> io::Result<()>,
    ) -> io::Result<()> {
        for (name, socket) in &self.listeners {
            give(name, socket.as_fd())?;
        }
        let (mut buffers, mut clients) = (Vec::new(), Vec::new());
        for (left, memory) in self.buffers {
            if let Some(fd) = memory.heirloom() {
                give(&format!("buffer-{}", buffers.len()), fd)?;
                buffers.push(left);
            }
        }
        for (left, socket) in self.clients {
            if let Some(socket) = socket {
                give(&format!("client-{}", clients.len()), socket.as_fd())?;
                clients.push(left);
            }
        }
        let listing = Listing {
            version: VERSION,
            clock: self.clock,
            last_lease: self.last_lease,
            last_client: self.last_client,
            buffers,
            clients,
        };
        let bytes = serde_json::to_vec(&listing)?;
        give(STATE, handover::state(&bytes)?.as_fd())
    }

    /// Makes sense of what a predecessor gave. What has no sense is given up, and said.
    pub fn of(mut parcel: Parcel) -> Estate {
        let mut take = |name: &str| {
            let at = parcel.iter().position(|(other, _)| other == name)?;
            Some(parcel.swap_remove(at).1)
        };
        let listing = match take(STATE).map(read).transpose() {
            Ok(listing) => listing,
            Err(error) => {
                warn!("what the predecessor left is not understood, so it is lost: {error}");
                None
            }
        };
        let mut estate = Estate::default();
        if let Some(listing) = listing {
            (estate.clock, estate.last_lease, estate.last_client) =
                (listing.clock, listing.last_lease, listing.last_client);
            for (number, left) in listing.buffers.into_iter().enumerate() {
                let kind = if left.observable { FdKind::DmaBuf } else { FdKind::Memfd };
                if let Some(fd) = take(&format!("buffer-{number}")) {
                    estate.buffers.push((left, Arc::new(Backing::inherited(fd, kind))));
                }
            }
            for (number, left) in listing.clients.into_iter().enumerate() {
                // A service manager does not keep those that hung up.
                let socket = take(&format!("client-{number}"));
                estate.clients.push((left, socket));
            }
        }
        estate.listeners = parcel;
        estate
    }

    /// The listening socket of this name, if it is bound to this path.
    pub fn listener(&mut self, name: &str, path: &Path) -> Option<OwnedFd> {
        let listeners = &mut self.listeners;
        let at = listeners.iter().position(|(other, _)| other == name)?;
        Some(listeners.swap_remove(at).1).filter(|socket| handover::bound_to(socket, path))
    }
}

fn read(state: OwnedFd) -> io::Result<Listing> {
    let mut file = File::from(state);
    file.rewind()?;
    let listing: Listing = serde_json::from_reader(io::BufReader::new(file))?;
    if listing.version != VERSION {
        let text = format!("its listing has version {}, not {VERSION}", listing.version);
        return Err(io::Error::other(text));
    }
    Ok(listing)
}
