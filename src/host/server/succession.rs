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
        // Who died after its leases were listed and before it was is nobody's client.
        let here =
            |client: &ClientId| self.conns.values().any(|(conn, _)| conn.client() == *client);
        for client in self.hub.read(|registry| registry.clients()) {
            if !here(&client) {
                self.hub.client_gone(client);
            }
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

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::time::Duration;

    use super::*;
    use crate::dmabuf::{Backing, DmaBufs, FdKind, Source};
    use crate::hub::{Hub, VmSpec};
    use crate::ids::LeaseId;
    use crate::limits::Quota;
    use crate::policy::Policy;
    use crate::registry::Left;

    /// A client died between the listing of its leases and that of the clients.
    #[test]
    fn leases_of_nobody_end() {
        let dmabufs = DmaBufs::new(&Source::Off, false).unwrap();
        let vms = [VmSpec { name: "a".to_owned(), quota: Quota::default() }];
        let mut hub = Hub::new(&vms, Policy::new(Vec::new()), dmabufs).unwrap();
        let lease = serde_json::json!({
            "id": 5, "client": 7, "access": { "read": true, "write": false }, "revoked": true,
            "since": Duration::ZERO, "notice": false, "ends": null,
        });
        let name = [0u8; crate::protocol::NAME_LEN];
        let left: Left = serde_json::from_value(serde_json::json!({
            "uuid": uuid::Uuid::from_u128(1), "vm": "a", "observable": false, "copied": true,
            "what": {
                "size": 4096, "access": { "read": true, "write": false }, "name": name,
                "metadata_type": 0, "metadata": [],
            },
            "generation": 0, "leases": [lease],
        }))
        .unwrap();
        let memory = Backing::inherited(File::open("/dev/null").unwrap().into(), FdKind::Memfd);
        hub.inherit(vec![(left, memory.into())], LeaseId(5), Duration::from_secs(1));
        assert_eq!(hub.read(|registry| registry.lease_count()), 1);
        let mut server = Server::new(hub.into(), None).unwrap();
        server.inherit(Vec::new(), ClientId(7), Heirs::default());
        assert_eq!(server.hub.read(|registry| registry.lease_count()), 0);
        assert_eq!(server.hub.read(|registry| registry.buffer_count()), 0);
    }
}
