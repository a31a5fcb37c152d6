//! The client's side of lending a buffer to VMs.
//!
//! It knows the protocol, not where the memory comes from.

use std::os::fd::AsFd;
use std::time::Duration;

use uuid::Uuid;
use zerocopy::IntoBytes;

use super::channel::{Result, parse, records};
use super::client::{Client, Error};
use super::values::{Export, Peer};
use super::wire::{self, FdKind, Type};
use crate::protocol::{State, flag};

/// What a client lends.
#[derive(Debug, Clone, Copy)]
pub struct Loan<'a> {
    /// Bytes of the whole fd.
    pub size: u64,
    /// The most that anybody can be granted (`protocol::access`).
    pub access: u32,
    /// For people.
    pub name: &'a str,
    /// `protocol::metadata`, or private to the users.
    pub metadata_type: u32,
    /// Handed to importers as it is.
    pub metadata: &'a [u8],
}

impl Client {
    /// The VMs that may share with the host.
    pub fn peers(&mut self) -> Result<Vec<Peer>> {
        let mut all = Vec::new();
        loop {
            let hdr = self.channel.header(Type::Peers, 0);
            let first = (all.len() as u32).into();
            let request = wire::Peers { hdr, first, ..Default::default() };
            let packet = self.channel.call(&hdr, &request)?;
            let (reply, rest) = parse::<wire::RespPeers>(&packet, Type::Peers)?;
            let page = records::<wire::Peer>(rest, reply.count.get(), Type::Peers)?;
            all.extend(page.iter().map(Peer::from));
            if page.is_empty() || all.len() >= reply.nr_peers.get() as usize {
                return Ok(all);
            }
        }
    }

    /// Lends the memory of `fd`, a dma-buf or a memfd with F_SEAL_SHRINK. Nobody can use it before
    /// [`Client::grant`]. The handle stands for it where a lease's number does: in
    /// [`Client::begin`], [`Client::end`]. Events of it come without [`Client::watch`].
    pub fn export(&mut self, fd: impl AsFd, loan: &Loan<'_>) -> Result<Export> {
        let hdr = self.channel.header(Type::Export, 0);
        let request = wire::Export {
            hdr,
            size: loan.size.into(),
            access: loan.access.into(),
            metadata_type: loan.metadata_type.into(),
            metadata_len: (loan.metadata.len() as u32).into(),
            name: wire::pad_text(loan.name),
            ..Default::default()
        };
        let mut bytes = request.as_bytes().to_vec();
        bytes.extend_from_slice(loan.metadata);
        let cookie = self.channel.submit(&hdr, &bytes[..], Some(fd.as_fd()))?;
        let packet = self.channel.wait_reply(cookie)?;
        let (reply, _) = parse::<wire::RespExport>(&packet, Type::Export)?;
        let what = "unknown kind of fd";
        let fd_kind = FdKind::from_wire(reply.fd_kind.get())
            .ok_or(Error::Protocol { request: Type::Export, what })?;
        Ok(Export { handle: reply.handle.get(), uuid: Uuid::from_bytes(reply.uuid), fd_kind })
    }

    /// Lets a peer ATTACH an export with these access bits, in place of what it was granted before;
    /// none withdraws. `flags` are those of GRANT (`protocol::flag`); a lifetime of zero is until
    /// withdrawn.
    pub fn grant(
        &mut self,
        handle: u64,
        peer: u32,
        access: u32,
        flags: u16,
        lifetime: Duration,
    ) -> Result<()> {
        let hdr = self.channel.header(Type::Grant, flags);
        let lifetime_ms = u64::try_from(lifetime.as_millis()).unwrap_or(u64::MAX).into();
        let (handle, peer_id, access) = (handle.into(), peer.into(), access.into());
        let request = wire::Grant { hdr, handle, peer_id, access, lifetime_ms };
        self.channel.call(&hdr, &request).map(drop)
    }

    /// Takes an export back. `true`: no VM uses its memory any more. `false`: the event
    /// [`Event::Released`](super::client::Event::Released) will say so. With `force` all rights are
    /// void at once.
    pub fn take_back(&mut self, handle: u64, force: bool) -> Result<bool> {
        let flags = if force { flag::RELEASE_FORCE } else { 0 };
        let hdr = self.channel.header(Type::Release, flags);
        let packet = self.channel.call(&hdr, &wire::Release { hdr, lease: handle.into() })?;
        let (reply, _) = parse::<wire::RespRelease>(&packet, Type::Release)?;
        Ok(State::from_wire(reply.state.get()) == Some(State::Released))
    }
}
