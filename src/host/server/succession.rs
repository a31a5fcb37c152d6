//! What the host socket takes over from the daemon before this one, and leaves to the next.
//!
//! It knows connections and heirs, not how things travel. A connection that exports, or whose job runs,
//! ends with this daemon.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::PoisonError;

use log::{debug, info};

use super::{FIRST_CLIENT, Server};
use crate::estate::Estate;
use crate::handover::Parcel;
use crate::host::conn::{Conn, LeftClient};
use crate::host::heirs::{self, Heir, Heirs};
use crate::ids::ClientId;
use crate::ioctl::peer_credentials;

impl Server {
    /// Goes on with the clients of the daemon before this one, and leaves all to these heirs one day.
    pub fn inherit(
        &mut self,
        clients: Vec<(LeftClient, Option<OwnedFd>)>,
        last_client: ClientId,
        heirs: Heirs,
    ) {
        (self.last_client, self.heirs) = (last_client.0, heirs);
        for (token, (left, socket)) in (FIRST_CLIENT..).zip(clients) {
            let client = left.client;
            let peer = socket.as_ref().map(|socket| peer_credentials(socket.as_fd()));
            let (Some(socket), Some(Ok(peer))) = (socket, peer) else {
                self.hub.client_gone(client);
                continue;
            };
            let conn = Conn::inherit(left, socket, &self.hub);
            let name = conn.name().unwrap_or_default();
            self.people.insert(client, self.person(&peer, name));
            let interest = conn.interest();
            self.conns.insert(token, (conn, Some(interest)));
        }
    }

    /// Ends the VMs' sessions, tells the clients as much as they take, and leaves everything.
    pub(super) fn leave(&mut self, heir: Heir) {
        let stays = |(token, (conn, _)): (&u32, &(Conn, _))| conn.stays().then_some(*token);
        for token in self.conns.iter().filter_map(stays).collect::<Vec<_>>() {
            let Some((conn, _)) = self.conns.remove(&token) else { continue };
            let client = conn.client();
            debug!("client {client} is left to nobody: it exports, or waits for a copy");
            drop(conn);
            self.hub.client_gone(client);
        }
        let (buffers, last_lease) = self.hub.leave();
        self.spread_news();
        let mut clients = Vec::new();
        for (mut conn, _) in std::mem::take(&mut self.conns).into_values() {
            let client = conn.client();
            match conn.write(&self.hub) {
                Ok(()) => {
                    let (left, socket) = conn.leave();
                    clients.push((left, Some(socket)));
                }
                Err(why) => debug!("client {client} is not left to anybody: {why:?}"),
            }
        }
        let mut estate = Estate {
            clock: self.hub.now(),
            last_lease,
            last_client: ClientId(self.last_client),
            buffers,
            clients,
            listeners: Parcel::new(),
        };
        let host = self.listener.take().map(|listener| (heirs::HOST.to_owned(), listener.into()));
        estate.listeners.extend(host);
        let (count, clients) = (estate.buffers.len(), estate.clients.len());
        let result = std::mem::take(&mut self.heirs).leave(heir, estate);
        info!("{count} buffers and {clients} clients are left to the successor");
        *self.over.lock().unwrap_or_else(PoisonError::into_inner) = Some(result);
    }
}
