//! One connection to the host socket: what was asked, what is still to be sent.
//!
//! It never waits for its client: what the socket does not take stays in the queue, and requests are
//! read only while that is empty. The queue is bounded: one answer, one event and the pending BEGINs.
//! When the client is gone, the server ends its leases.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::lists::record;
use super::packet::{self, Wait};
use super::request::{self, Answer, Outgoing, People, Session};
use super::watch::{Buffers, News, Watch};
use super::wire;
use crate::hub::Hub;
use crate::ids::{ClientId, Cookie, LeaseId};
use crate::protocol::{NAME_LEN, Status};
use crate::registry::{BufferInfo, Notice};

/// Requests and events of one client before others get their turn.
pub const TURN: usize = 32;
/// Buffers of a snapshot that are looked at together.
const PAGE: usize = 64;

/// Why a connection is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gone {
    /// The client closed it.
    Closed,
    /// It broke the protocol.
    Broken(&'static str),
    /// The socket failed.
    Failed(Errno),
}

/// What to wait for on the socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Interest {
    /// Requests are welcome.
    pub read: bool,
    /// Something is to be sent.
    pub write: bool,
}

/// What a daemon's successor must know to go on with a connection.
#[derive(Debug, Serialize, Deserialize)]
pub struct LeftClient {
    /// Its number.
    pub client: ClientId,
    name: Option<[u8; NAME_LEN]>,
    watch: Option<(u64, Watch)>,
    /// Not sent yet: bytes, and the lease whose fd goes with them.
    queue: Vec<(Vec<u8>, Option<LeaseId>)>,
}

/// One client's connection.
#[derive(Debug)]
pub struct Conn {
    socket: OwnedFd,
    session: Session,
    queue: VecDeque<Outgoing>,
    /// A job of its last request runs: until it is done the connection rests.
    busy: bool,
    /// Something may have to be told of its exports.
    export_news: bool,
}

/// The hub, as a watch asks it.
struct Look<'a>(&'a Hub, ClientId);

impl Buffers for Look<'_> {
    fn look(&self, uuid: Uuid) -> Option<BufferInfo> {
        self.0.read(|registry| registry.host_view(uuid, self.1))
    }

    fn after(&self, uuid: Uuid) -> Vec<Uuid> {
        self.0.host_page(uuid, PAGE).iter().map(|info| info.uuid).collect()
    }
}

impl Conn {
    /// A fresh connection.
    pub fn new(socket: OwnedFd, client: ClientId) -> Conn {
        let (session, queue) = (Session::new(client), VecDeque::new());
        Conn { socket, session, queue, busy: false, export_news: false }
    }

    /// Goes on with a connection of the daemon before this one.
    pub fn inherit(left: LeftClient, socket: OwnedFd, hub: &Hub) -> Conn {
        let LeftClient { client, name, watch, queue } = left;
        let outgoing = |(bytes, lease): (Vec<u8>, Option<LeaseId>)| {
            let Some(lease) = lease else { return bytes.into() };
            let memory = hub.host_memory(client, lease);
            match memory.and_then(|memory| hub.dmabufs.for_consumer(&memory).ok()) {
                Some(fd) => Outgoing { memory: Some((fd, lease)), ..bytes.into() },
                None => no_memory(&bytes, client, lease, hub).unwrap_or_else(|| bytes.into()),
            }
        };
        let mut conn = Conn::new(socket, client);
        (conn.session.name, conn.session.watch) = (name, watch);
        conn.queue = queue.into_iter().map(outgoing).collect();
        conn
    }

    /// Whether it ends with this daemon: its exports do, and so does a job.
    pub fn stays(&self) -> bool {
        self.busy || self.session.exports()
    }

    /// What is needed to go on with it. Nothing may be pending any more.
    pub fn leave(self) -> (LeftClient, OwnedFd) {
        let Session { client, name, watch, .. } = self.session;
        let outgoing = |out: Outgoing| (out.bytes, out.memory.map(|(_, lease)| lease));
        let queue = self.queue.into_iter().map(outgoing).collect();
        (LeftClient { client, name, watch, queue }, self.socket)
    }

    /// Its number.
    pub fn client(&self) -> ClientId {
        self.session.client
    }

    /// What the client calls itself, once it said HELLO.
    pub fn name(&self) -> Option<[u8; NAME_LEN]> {
        self.session.name
    }

    /// Reads and carries out one request; `None` where there is none, or none may be read now.
    /// The answer is for [`push`](Self::push): what the request ended goes first. A job makes the
    /// connection [busy](Self::busy).
    pub fn next_answer(&mut self, hub: &Hub, people: &People) -> Result<Option<Answer>, Gone> {
        if self.busy || !self.queue.is_empty() {
            return Ok(None);
        }
        match packet::receive(&self.socket, Wait::Never) {
            Ok(Some(packet)) => {
                let answer = self.session.handle(packet, hub, people).map_err(Gone::Broken)?;
                self.busy = matches!(answer, Answer::Job(_));
                Ok(Some(answer))
            }
            Ok(None) | Err(Errno::CONNRESET) => Err(Gone::Closed),
            Err(Errno::AGAIN) => Ok(None),
            Err(error) => Err(Gone::Failed(error)),
        }
    }

    /// Whether a job of its last request runs. Until it is [`done`](Self::done) nothing is read, and
    /// nothing written.
    pub fn busy(&self) -> bool {
        self.busy
    }

    /// Takes in what a job made of the request.
    pub fn done(&mut self, made: Result<Outgoing, &'static str>, hub: &Hub) -> Result<(), Gone> {
        self.busy = false;
        self.push(made.map_err(Gone::Broken)?, hub)
    }

    /// Sends an answer, now or later.
    pub fn push(&mut self, answer: Outgoing, hub: &Hub) -> Result<(), Gone> {
        if let Some(export) = answer.export {
            self.session.exported(export);
        }
        self.queue.push_back(answer);
        self.flush(hub)
    }

    /// Takes in that there is news of its exports.
    pub fn note_export(&mut self) {
        self.export_news = true;
    }

    /// Takes in that a pending BEGIN ended.
    pub fn begun(&mut self, number: Cookie, status: Status, generation: u64) {
        self.queue.extend(self.session.begun(number, status, generation));
    }

    /// Takes in that something happened to a buffer.
    pub fn note(&mut self, notice: &Notice) {
        if let Some((_, watch)) = &mut self.session.watch {
            watch.note(notice);
        }
    }

    /// Sends what can be sent: answers first, then a turn of events.
    pub fn write(&mut self, hub: &Hub) -> Result<(), Gone> {
        self.flush(hub)?;
        for _ in 0..TURN {
            if !self.queue.is_empty() {
                break;
            }
            if self.export_news {
                let event = hub.take_export_event(self.session.client);
                self.export_news = event.is_some();
                self.queue.extend(event.and_then(|event| self.session.export_event(&event)));
                self.flush(hub)?;
                continue;
            }
            let Some((cookie, watch)) = &mut self.session.watch else { break };
            let Some(News { kind, uuid, info }) = watch.next(&Look(hub, self.session.client))
            else {
                break;
            };
            let (status, record) = match &info {
                Some(info) => (Status::Ok, record(info)),
                None => {
                    let uuid = uuid.into_bytes();
                    let status = match kind {
                        wire::Type::EvtRevoked => Status::Revoked,
                        _ => Status::Ok,
                    };
                    (status, wire::Buffer { uuid, ..Default::default() })
                }
            };
            self.queue.push_back(request::event(kind, status, *cookie, record));
            self.flush(hub)?;
        }
        Ok(())
    }

    /// What to wait for now.
    pub fn interest(&self) -> Interest {
        let events = self.session.watch.as_ref().is_some_and(|(_, watch)| watch.pending());
        let events = events || self.export_news;
        Interest { read: self.queue.is_empty(), write: !self.queue.is_empty() || events }
    }

    fn flush(&mut self, hub: &Hub) -> Result<(), Gone> {
        while let Some(front) = self.queue.front() {
            let fd = front.memory.as_ref().map(|(fd, _)| fd.as_fd());
            match packet::send(&self.socket, &front.bytes, fd, Wait::Never) {
                Ok(()) => {
                    self.queue.pop_front();
                }
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::PIPE | Errno::CONNRESET) => return Err(Gone::Closed),
                Err(error) => self.take_back(error, hub)?,
            }
        }
        Ok(())
    }

    /// A lease whose fd cannot be sent, because too many are on their way, is none.
    fn take_back(&mut self, error: Errno, hub: &Hub) -> Result<(), Gone> {
        let lost = matches!(error, Errno::TOOMANYREFS | Errno::NOMEM | Errno::NOBUFS);
        let Some(front) = self.queue.front_mut().filter(|_| lost) else {
            return Err(Gone::Failed(error));
        };
        let Some((fd, lease)) = front.memory.take() else { return Err(Gone::Failed(error)) };
        drop(fd);
        let refused = no_memory(&front.bytes, self.session.client, lease, hub);
        *front = refused.ok_or(Gone::Failed(error))?;
        Ok(())
    }
}

/// What is sent in place of an ACQUIRE's answer whose fd cannot be had: the lease ends.
fn no_memory(answer: &[u8], client: ClientId, lease: LeaseId, hub: &Hub) -> Option<Outgoing> {
    let (wire::Resp { kind, cookie, .. }, _) =
        zerocopy::FromBytes::read_from_prefix(answer).ok()?;
    // Nobody else can have ended it, unless it came from a daemon before this one.
    let _ = hub.host_release(client, lease, false);
    Some(request::refusal(kind.get(), Status::NoMem, 0, cookie.get()))
}

impl AsFd for Conn {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
    use zerocopy::{FromBytes, IntoBytes};

    use super::*;
    use crate::dmabuf::{DmaBufs, Source};
    use crate::policy::Policy;

    /// An answer that a predecessor could not send any more, of a lease whose memory is not here.
    #[test]
    fn an_answer_without_its_fd_is_a_refusal() {
        let dmabufs = DmaBufs::new(&Source::Off, false).unwrap();
        let hub = Hub::new(&[], Policy::new(Vec::new()), dmabufs).unwrap();
        let flags = SocketFlags::CLOEXEC;
        let (here, _there) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        let answer = wire::Resp {
            kind: wire::Type::Acquire.to_wire().into(),
            cookie: 9.into(),
            ..Default::default()
        };
        let queue = vec![(answer.as_bytes().to_vec(), Some(LeaseId(3)))];
        let left = LeftClient { client: ClientId(1), name: None, watch: None, queue };
        let conn = Conn::inherit(left, here, &hub);
        let sent = conn.queue.front().unwrap();
        let (resp, _) = wire::Resp::read_from_prefix(&sent.bytes).unwrap();
        assert_eq!(resp.status.get(), Status::NoMem.to_wire());
        assert_eq!((resp.kind.get(), resp.cookie.get()), (answer.kind.get(), 9));
    }
}
