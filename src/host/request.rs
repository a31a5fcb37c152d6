//! One request of a host client: judged, carried out on the hub, answered in bytes. What a client asks
//! as an exporter is in `export`.
//!
//! It knows the protocol and the hub, not sockets or queues. A refusal changes nothing.

mod point;

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::time::Duration;

use uuid::Uuid;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::export;
use super::inspect;
use super::lists::{self, record};
use super::packet::Packet;
use super::watch::Watch;
use super::wire::{self, Type};
use crate::hub::Hub;
use crate::ids::{Access, ClientId, Cookie, HandleId, LeaseId, PeerId};
use crate::limits::{MAX_CLIENT_EXPORTS, MAX_CLIENT_WAITS, MAX_COPY_AT_ONCE, MAX_LEASES, MAX_WAIT};
use crate::protocol::{NAME_LEN, State, Status, flag};
use crate::registry::{Begun, Ended, ExportEvent, SyncRequest};

/// A client as others see it.
#[derive(Debug, Clone, Copy)]
pub struct Person {
    /// Process when it connected; 0 where this process cannot see it.
    pub pid: u32,
    /// What it calls itself.
    pub name: [u8; NAME_LEN],
    /// It may see the buffers of all VMs.
    pub operator: bool,
}

/// All clients that are connected.
pub type People = HashMap<ClientId, Person>;

/// What a connection remembers from request to request.
#[derive(Debug)]
pub struct Session {
    /// Who it is.
    pub client: ClientId,
    /// What it calls itself, once it said HELLO.
    pub name: Option<[u8; NAME_LEN]>,
    /// Its WATCH, under the cookie of the request.
    pub watch: Option<(u64, Watch)>,
    /// What is pending: our number, the cookie of the request, and its type.
    waits: HashMap<Cookie, (u64, Type)>,
    last_wait: u32,
    /// Its exports: the cookie of the request.
    exports: HashMap<HandleId, u64>,
}

/// A refusal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Refusal {
    pub status: Status,
    pub detail: u32,
}

impl From<Status> for Refusal {
    fn from(status: Status) -> Self {
        Refusal { status, detail: 0 }
    }
}

/// A packet to send.
#[derive(Debug)]
pub struct Outgoing {
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// The fd that goes with it, and the lease that ends if it cannot be sent.
    pub memory: Option<(OwnedFd, LeaseId)>,
    /// What it exported, and the cookie of the request.
    pub export: Option<(HandleId, u64)>,
}

/// What is not done on the host socket's thread, because it may take its time. `Err` as in
/// [`Session::handle`].
pub type Job = Box<dyn FnOnce(&Hub) -> Result<Outgoing, &'static str> + Send>;

/// What comes of a request.
pub enum Answer {
    /// An answer.
    Now(Outgoing),
    /// A wait, whose end is its answer.
    Later,
    /// An answer that somebody else makes. Until then no further request is carried out.
    Job(Job),
}

impl From<Vec<u8>> for Outgoing {
    fn from(bytes: Vec<u8>) -> Self {
        Outgoing { bytes, memory: None, export: None }
    }
}

impl From<Vec<u8>> for Answer {
    fn from(bytes: Vec<u8>) -> Self {
        Answer::Now(bytes.into())
    }
}

fn header(kind: u16, status: Status, detail: u32, cookie: u64) -> wire::Resp {
    let status = status.to_wire().into();
    wire::Resp { kind: kind.into(), status, detail: detail.into(), cookie: cookie.into() }
}

/// A response that is a header alone.
pub fn refusal(kind: u16, status: Status, detail: u32, cookie: u64) -> Outgoing {
    header(kind, status, detail, cookie).as_bytes().to_vec().into()
}

/// An event.
pub fn event(kind: Type, status: Status, cookie: u64, buffer: wire::Buffer) -> Outgoing {
    let hdr = header(kind.to_wire(), status, 0, cookie);
    wire::Event { hdr, buffer }.as_bytes().to_vec().into()
}

/// The header of an answer that is no refusal.
pub fn ok(req: &wire::Req) -> wire::Resp {
    header(req.kind.get(), Status::Ok, 0, req.cookie.get())
}

impl Session {
    /// A client that has said nothing yet.
    pub fn new(client: ClientId) -> Session {
        let (waits, exports) = (HashMap::new(), HashMap::new());
        Session { client, name: None, watch: None, waits, last_wait: 0, exports }
    }

    /// Carries out a request. `Err` is a packet that cannot be answered: the connection is over.
    pub fn handle(
        &mut self,
        mut packet: Packet,
        hub: &Hub,
        people: &People,
    ) -> Result<Answer, &'static str> {
        let mut fds: Vec<_> = packet.fd.take().into_iter().chain(packet.more.take()).collect();
        let Ok((req, _)) = wire::Req::read_from_prefix(&packet.bytes) else {
            let broken = "a packet shorter than a header";
            if fds.is_empty() {
                return Err(broken);
            }
            return Ok(Answer::Job(export::stray(fds, Err(broken))));
        };
        let refused = |Refusal { status, detail }| {
            hub.metrics.answered_host(Type::from_wire(req.kind.get()), status);
            refusal(req.kind.get(), status, detail, req.cookie.get())
        };
        if packet.no_room {
            return Ok(Answer::Now(refused(Status::NoMem.into())));
        }
        if fds.is_empty() {
            let answer = self.carry_out(&req, &packet, hub, people);
            return Ok(answer.unwrap_or_else(|why| Answer::Now(refused(why))));
        }
        let well = !packet.truncated && (req.reserved.get(), req.flags.get()) == (0, 0);
        let export = well && Type::from_wire(req.kind.get()) == Some(Type::Export);
        Ok(Answer::Job(match fds.pop() {
            Some(fd) if export && self.name.is_some() => {
                export::export(self.client, &packet.bytes, req.cookie.get(), fd, hub)
            }
            fd => {
                fds.extend(fd);
                export::stray(fds, Ok(refused(Status::Inval.into())))
            }
        }))
    }

    fn carry_out(
        &mut self,
        req: &wire::Req,
        packet: &Packet,
        hub: &Hub,
        people: &People,
    ) -> Result<Answer, Refusal> {
        let kind = Type::from_wire(req.kind.get()).ok_or(Status::Unsupp)?;
        let known_flags = match kind {
            Type::Acquire => wire::flag::ACQUIRE_ZERO_COPY | wire::flag::ACQUIRE_NOTICE,
            Type::Grant => flag::GRANT_ONCE | flag::GRANT_FORCE,
            Type::Release => flag::RELEASE_FORCE,
            Type::Sync => flag::SYNC_END | flag::SYNC_READ | flag::SYNC_WRITE | flag::SYNC_NONBLOCK,
            _ => 0,
        };
        let malformed = packet.truncated || req.reserved.get() != 0;
        if malformed || req.flags.get() & !known_flags != 0 {
            return Err(Status::Inval.into());
        }
        if (kind == Type::Hello) != self.name.is_none() {
            return Err(Status::Inval.into());
        }
        let bytes = &packet.bytes;
        match kind {
            Type::Hello => self.hello(&parse(bytes)?),
            Type::List => lists::list(&parse(bytes)?, hub),
            Type::Watch => self.watch(&parse(bytes)?),
            Type::Query => lists::query(&parse(bytes)?, hub, people),
            Type::Stats => lists::stats(&parse(bytes)?, hub),
            Type::Inspect => {
                Ok(inspect::inspect(ok(req), &parse(bytes)?, hub, self.sees_all(people)).into())
            }
            Type::Holders => {
                let (request, world) = (parse(bytes)?, (hub, people));
                Ok(inspect::holders(ok(req), &request, world, self.sees_all(people))?.into())
            }
            Type::Acquire => self.acquire(&parse(bytes)?, hub),
            Type::Peers => lists::peers(&parse(bytes)?, hub),
            Type::Release => self.release(&parse(bytes)?, hub),
            Type::Sync => self.sync(&parse(bytes)?, hub),
            Type::Cancel => self.cancel(&parse(bytes)?, hub),
            Type::Grant => export::grant(self.client, &parse(bytes)?, hub),
            // It came without an fd.
            Type::Export => Err(Status::Inval.into()),
            Type::PointSignal => self.signal(&parse(bytes)?, hub),
            Type::PointWait => self.wait(&parse(bytes)?, hub),
            Type::EvtOffered | Type::EvtRevoked | Type::EvtWithdrawn => Err(Status::Unsupp.into()),
            Type::EvtChanged | Type::EvtResync => Err(Status::Unsupp.into()),
            Type::EvtReleased | Type::EvtIdle | Type::EvtBusy => Err(Status::Unsupp.into()),
        }
    }

    fn sees_all(&self, people: &People) -> bool {
        people.get(&self.client).is_some_and(|person| person.operator)
    }

    fn hello(&mut self, request: &wire::Hello) -> Result<Answer, Refusal> {
        if request.version.get() != wire::VERSION {
            return Err(Refusal { status: Status::Unsupp, detail: wire::VERSION });
        }
        if request.reserved.get() != 0 {
            return Err(Status::Inval.into());
        }
        self.name = Some(request.name);
        let daemon = concat!(env!("CARGO_PKG_NAME"), " ", env!("CARGO_PKG_VERSION"));
        let answer = wire::RespHello {
            hdr: ok(&request.hdr),
            version: wire::VERSION.into(),
            peer_id: PeerId::HOST.0.into(),
            max_leases: (MAX_LEASES as u32).into(),
            max_waits: (MAX_CLIENT_WAITS as u32).into(),
            max_wait_ms: u32::try_from(MAX_WAIT.as_millis()).unwrap_or(u32::MAX).into(),
            max_exports: MAX_CLIENT_EXPORTS.into(),
            daemon: wire::pad_text(daemon),
        };
        Ok(answer.as_bytes().to_vec().into())
    }

    fn watch(&mut self, request: &wire::Watch) -> Result<Answer, Refusal> {
        let uuid = Uuid::from_bytes(request.uuid);
        let only = (!uuid.is_nil()).then_some(uuid);
        self.watch = Some((request.hdr.cookie.get(), Watch::new(self.client, only)));
        Ok(ok(&request.hdr).as_bytes().to_vec().into())
    }

    fn acquire(&mut self, request: &wire::Acquire, hub: &Hub) -> Result<Answer, Refusal> {
        let access = Access::from_bits(request.access.get()).ok_or(Status::Inval)?;
        if request.reserved.get() != 0 || access.is_none() {
            return Err(Status::Inval.into());
        }
        let has = |flag| request.hdr.flags.get() & flag != 0;
        let (zero_copy, notice) =
            (has(wire::flag::ACQUIRE_ZERO_COPY), has(wire::flag::ACQUIRE_NOTICE));
        let uuid = Uuid::from_bytes(request.uuid);
        let got = hub.host_acquire(self.client, uuid, access, zero_copy, notice)?;
        let answer = wire::RespAcquire {
            hdr: ok(&request.hdr),
            lease: got.lease.0.into(),
            access: access.bits().into(),
            mode: got.info.mode.to_wire().into(),
            fd_kind: inspect::fd_kind(got.backing.kind()).to_wire().into(),
            // Neither udmabuf nor a sealed memfd can be had read-only.
            flags: (if access.write { 0 } else { wire::flag::LEASE_WRITABLE }).into(),
            buffer: record(&got.info),
        };
        let mut bytes = answer.as_bytes().to_vec();
        bytes.extend_from_slice(&got.info.what.metadata);
        match hub.dmabufs.for_consumer(&got.backing) {
            Ok(fd) => {
                let memory = Some((fd, got.lease));
                Ok(Answer::Now(Outgoing { memory, ..bytes.into() }))
            }
            Err(error) => {
                log::debug!("no descriptor for a lease: {error}");
                hub.host_release(self.client, got.lease, false)?;
                Err(Status::NoMem.into())
            }
        }
    }

    fn release(&mut self, request: &wire::Release, hub: &Hub) -> Result<Answer, Refusal> {
        let number = request.lease.get();
        let force = request.hdr.flags.get() & flag::RELEASE_FORCE != 0;
        let (state, use_count) = hub.host_release(self.client, LeaseId(number), force)?;
        if state == State::Released {
            self.exports.remove(&HandleId(number));
        }
        if let Some((_, watch)) = &mut self.watch {
            watch.lease_ended();
        }
        let (state, use_count) = (state.to_wire().into(), use_count.into());
        let answer = wire::RespRelease { hdr: ok(&request.hdr), state, use_count };
        Ok(answer.as_bytes().to_vec().into())
    }

    fn sync(&mut self, request: &wire::Sync, hub: &Hub) -> Result<Answer, Refusal> {
        let flags = request.hdr.flags.get();
        let lease = LeaseId(request.lease.get());
        let number = self.next_wait();
        let sync = SyncRequest {
            bits: Access {
                read: flags & flag::SYNC_READ != 0,
                write: flags & flag::SYNC_WRITE != 0,
            },
            offset: request.offset.get(),
            len: request.len.get(),
            nonblock: flags & flag::SYNC_NONBLOCK != 0,
            timeout: Duration::from_nanos(request.timeout_ns.get()),
            cookie: number,
        };
        let cookie = request.hdr.cookie.get();
        let generation = if flags & flag::SYNC_END != 0 {
            match hub.host_end(self.client, lease, sync)? {
                Ended::Now(generation) => generation,
                Ended::Copy(ticket, copy) if copy.bytes() > MAX_COPY_AT_ONCE => {
                    let answer = move |hub: &Hub| match hub.carry_out(ticket, copy) {
                        Ok(generation) => Ok(synced(cookie, generation)),
                        Err(status) => {
                            hub.metrics.answered_host(Some(Type::Sync), status);
                            Ok(refusal(Type::Sync.to_wire(), status, 0, cookie))
                        }
                    };
                    return Ok(Answer::Job(Box::new(answer)));
                }
                Ended::Copy(ticket, copy) => hub.carry_out(ticket, copy)?,
            }
        } else {
            let full = self.waits.len() >= MAX_CLIENT_WAITS;
            match hub.host_begin(self.client, lease, sync, full)? {
                Begun::Now(generation) => generation,
                Begun::Waits => {
                    self.waits.insert(sync.cookie, (cookie, Type::Sync));
                    return Ok(Answer::Later);
                }
            }
        };
        Ok(Answer::Now(synced(cookie, generation)))
    }

    fn cancel(&mut self, request: &wire::Cancel, hub: &Hub) -> Result<Answer, Refusal> {
        let target = request.target.get();
        let named = self.waits.iter().find(|(_, (cookie, _))| *cookie == target);
        let number = *named.ok_or(Status::NoEnt)?.0;
        hub.host_cancel(self.client, number)?;
        Ok(ok(&request.hdr).as_bytes().to_vec().into())
    }

    /// Takes in that an export was answered.
    pub fn exported(&mut self, (handle, cookie): (HandleId, u64)) {
        self.exports.insert(handle, cookie);
    }

    /// Whether it exports something.
    pub fn exports(&self) -> bool {
        !self.exports.is_empty()
    }

    /// An event of an export.
    pub fn export_event(&mut self, event: &ExportEvent) -> Option<Outgoing> {
        let cookie = self.exports.get(&event.handle).copied()?;
        if event.kind == crate::registry::EventKind::Released {
            self.exports.remove(&event.handle);
        }
        Some(export::event(event, cookie))
    }

    /// The answer to a pending request that ended.
    pub fn begun(&mut self, number: Cookie, status: Status, value: u64) -> Option<Outgoing> {
        let (cookie, kind) = self.waits.remove(&number)?;
        Some(match (status, kind) {
            (Status::Ok, Type::Sync) => synced(cookie, value),
            (Status::Ok, kind) => point::reached(kind, cookie, value),
            (status, kind) => refusal(kind.to_wire(), status, 0, cookie),
        })
    }
}

fn synced(cookie: u64, generation: u64) -> Outgoing {
    let hdr = header(Type::Sync.to_wire(), Status::Ok, 0, cookie);
    wire::RespSync { hdr, generation: generation.into() }.as_bytes().to_vec().into()
}

/// A request's structure.
pub fn parse<T: FromBytes + KnownLayout + Immutable>(bytes: &[u8]) -> Result<T, Refusal> {
    T::read_from_prefix(bytes).map(|(request, _)| request).or(Err(Status::Inval.into()))
}
