//! Packets to and from the daemon: which answer belongs to which request, and which are events.
//!
//! It knows headers and cookies, not what requests mean. An fd that comes with no awaited answer is
//! closed.

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::error::Error;
use super::packet::{self, Packet, Wait};
use super::values::{Buffer, Event};
use super::wire::{self, Type};
use crate::protocol::Status;

pub(super) type Result<T> = std::result::Result<T, Error>;

/// A connection, its unanswered requests and the events that nobody has taken yet.
#[derive(Debug)]
pub(super) struct Channel {
    socket: OwnedFd,
    last_cookie: u64,
    replies: HashMap<u64, (Type, Option<Packet>)>,
    pub(super) events: VecDeque<Event>,
}

impl Channel {
    pub(super) fn new(socket: OwnedFd) -> Channel {
        Channel { socket, last_cookie: 0, replies: HashMap::new(), events: VecDeque::new() }
    }

    pub(super) fn has_news(&self) -> bool {
        !self.events.is_empty() || self.replies.values().any(|(_, packet)| packet.is_some())
    }

    /// Waits until something arrives or `deadline` is over.
    pub(super) fn wait_readable(&self, deadline: Option<Instant>) -> Result<()> {
        let left = deadline.map(|end| end.saturating_duration_since(Instant::now()));
        let left = left.map(|left: Duration| Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        });
        match poll(&mut [PollFd::new(&self.socket, PollFlags::IN)], left.as_ref()) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Takes in what has arrived, without waiting.
    pub(super) fn dispatch(&mut self) -> Result<()> {
        loop {
            match packet::receive(&self.socket, Wait::Never) {
                Ok(Some(packet)) => self.sort(packet)?,
                Ok(None) => return Err(Error::Closed),
                Err(Errno::AGAIN) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
    }

    pub(super) fn header(&mut self, kind: Type, flags: u16) -> wire::Req {
        self.last_cookie += 1;
        let (kind, flags) = (kind.to_wire().into(), flags.into());
        wire::Req { kind, flags, reserved: 0.into(), cookie: self.last_cookie.into() }
    }

    pub(super) fn submit(
        &mut self,
        hdr: &wire::Req,
        request: &(impl IntoBytes + Immutable + ?Sized),
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<u64> {
        let kind = Type::from_wire(hdr.kind.get()).unwrap_or(Type::Hello);
        self.replies.insert(hdr.cookie.get(), (kind, None));
        match packet::send(&self.socket, request.as_bytes(), fd, Wait::Forever) {
            // The daemon may have said why before it closed; that answer is still to be read.
            Ok(()) | Err(Errno::PIPE | Errno::CONNRESET) => Ok(hdr.cookie.get()),
            Err(error) => Err(error.into()),
        }
    }

    pub(super) fn call(
        &mut self,
        hdr: &wire::Req,
        request: &(impl IntoBytes + Immutable),
    ) -> Result<Packet> {
        let cookie = self.submit(hdr, request, None)?;
        self.wait_reply(cookie)
    }

    pub(super) fn wait_reply(&mut self, cookie: u64) -> Result<Packet> {
        loop {
            if let Some(packet) = self.take_reply(cookie)? {
                return Ok(packet);
            }
            match packet::receive(&self.socket, Wait::Forever)? {
                Some(packet) => self.sort(packet)?,
                None => return Err(Error::Closed),
            }
        }
    }

    pub(super) fn take_reply(&mut self, cookie: u64) -> Result<Option<Packet>> {
        let Some((request, packet)) = self.replies.remove(&cookie) else {
            return Err(Error::Protocol {
                request: Type::Sync,
                what: "no request has this cookie",
            });
        };
        let Some(packet) = packet else {
            self.replies.insert(cookie, (request, None));
            return Ok(None);
        };
        let (hdr, _) = parse::<wire::Resp>(&packet, request)?;
        match Status::from_wire(hdr.status.get()) {
            Some(Status::Ok) => Ok(Some(packet)),
            Some(status) => Err(Error::Refused { request, status, detail: hdr.detail.get() }),
            None => {
                Err(Error::Protocol { request, what: "a status that this program does not know" })
            }
        }
    }

    /// Puts a packet where it belongs; an fd that belongs nowhere is closed with it.
    fn sort(&mut self, packet: Packet) -> Result<()> {
        let (hdr, _) = parse::<wire::Resp>(&packet, Type::Hello)?;
        let kind = hdr.kind.get();
        if kind >= 0x1000 {
            self.events.extend(event(&packet)?);
            return Ok(());
        }
        let cookie = if hdr.cookie.get() == 0 { self.last_cookie } else { hdr.cookie.get() };
        match self.replies.get_mut(&cookie) {
            Some((request, slot)) if request.to_wire() == kind => *slot = Some(packet),
            _ => {
                return Err(Error::Protocol {
                    request: Type::Hello,
                    what: "an answer to no request",
                });
            }
        }
        Ok(())
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// The event in a packet; `None` where this library does not know it.
fn event(packet: &Packet) -> Result<Option<Event>> {
    let (hdr, _) = parse::<wire::Resp>(packet, Type::Watch)?;
    let kind = Type::from_wire(hdr.kind.get());
    let reason = Status::from_wire(hdr.status.get());
    let buffer = || -> Result<Buffer> {
        let (event, _) = parse::<wire::Event>(packet, Type::Watch)?;
        Ok(Buffer::from(&event.buffer))
    };
    Ok(match kind {
        Some(Type::EvtOffered) => Some(Event::Offered(buffer()?)),
        Some(Type::EvtChanged) => Some(Event::Changed(buffer()?)),
        Some(Type::EvtBusy) => Some(Event::Busy(buffer()?)),
        Some(Type::EvtIdle) => Some(Event::Idle(buffer()?)),
        Some(Type::EvtReleased) => Some(Event::Released { uuid: buffer()?.uuid }),
        Some(Type::EvtWithdrawn) => Some(Event::Withdrawn { uuid: buffer()?.uuid, reason }),
        Some(Type::EvtRevoked) => Some(Event::Revoked { uuid: buffer()?.uuid, reason }),
        Some(Type::EvtResync) => Some(Event::Resync),
        _ => None,
    })
}

/// The structure at the start of a packet, and what follows it.
pub(super) fn parse<T>(packet: &Packet, request: Type) -> Result<(T, &[u8])>
where
    T: FromBytes + KnownLayout + Immutable,
{
    match T::read_from_prefix(&packet.bytes) {
        Ok(parsed) if !packet.truncated => Ok(parsed),
        _ => Err(Error::Protocol { request, what: "a packet of the wrong length" }),
    }
}

/// `count` structures at the start of `bytes`.
pub(super) fn records<T>(bytes: &[u8], count: u32, request: Type) -> Result<&[T]>
where
    T: FromBytes + KnownLayout + Immutable,
{
    match <[T]>::ref_from_prefix_with_elems(bytes, count as usize) {
        Ok((records, _)) => Ok(records),
        Err(_) => Err(Error::Protocol { request, what: "fewer records than it says" }),
    }
}

/// A buffer's metadata at the start of `bytes`, and what follows it.
pub(super) fn metadata<'a>(
    bytes: &'a [u8],
    buffer: &Buffer,
    request: Type,
) -> Result<(Vec<u8>, &'a [u8])> {
    match bytes.split_at_checked(buffer.metadata_len as usize) {
        Some((metadata, rest)) => Ok((metadata.to_vec(), rest)),
        None => Err(Error::Protocol { request, what: "less metadata than it says" }),
    }
}
