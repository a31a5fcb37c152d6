//! One request of a host client: judged, carried out on the hub, answered in bytes.
//!
//! It knows the protocol and the hub, not sockets or queues. A refusal changes nothing.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::time::Duration;

use uuid::Uuid;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::inspect;
use super::packet::Packet;
use super::watch::Watch;
use super::wire::{self, MAX_PACKET, Type};
use crate::hub::Hub;
use crate::ids::{Access, ClientId, Cookie, LeaseId, PeerId};
use crate::limits::{MAX_CLIENT_WAITS, MAX_LEASES, MAX_WAIT};
use crate::protocol::{NAME_LEN, Status, flag};
use crate::registry::{Begun, BufferInfo, SyncRequest};

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
    /// Its pending BEGINs: our number, and the cookie of the request.
    waits: HashMap<Cookie, u64>,
    last_wait: u32,
}

/// A refusal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refusal {
    status: Status,
    detail: u32,
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
}

/// What comes of a request.
enum Answer {
    Now(Outgoing),
    Later,
}

impl From<Vec<u8>> for Outgoing {
    fn from(bytes: Vec<u8>) -> Self {
        Outgoing { bytes, memory: None }
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

fn ok(req: &wire::Req) -> wire::Resp {
    header(req.kind.get(), Status::Ok, 0, req.cookie.get())
}

impl Session {
    /// A client that has said nothing yet.
    pub fn new(client: ClientId) -> Session {
        Session { client, name: None, watch: None, waits: HashMap::new(), last_wait: 0 }
    }

    /// Carries out a request. `Err` is a packet that cannot be answered: the connection is over.
    /// `None` is one whose answer comes later.
    pub fn handle(
        &mut self,
        packet: &Packet,
        hub: &Hub,
        people: &People,
    ) -> Result<Option<Outgoing>, &'static str> {
        let Ok((req, _)) = wire::Req::read_from_prefix(&packet.bytes) else {
            return Err("a packet shorter than a header");
        };
        match self.carry_out(&req, packet, hub, people) {
            Ok(Answer::Now(outgoing)) => Ok(Some(outgoing)),
            Ok(Answer::Later) => Ok(None),
            Err(Refusal { status, detail }) => {
                hub.metrics.answered_host(Type::from_wire(req.kind.get()), status);
                Ok(Some(refusal(req.kind.get(), status, detail, req.cookie.get())))
            }
        }
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
            Type::Acquire => wire::flag::ACQUIRE_ZERO_COPY,
            Type::Sync => flag::SYNC_END | flag::SYNC_READ | flag::SYNC_WRITE | flag::SYNC_NONBLOCK,
            _ => 0,
        };
        let malformed = packet.truncated || packet.fd.is_some() || req.reserved.get() != 0;
        if malformed || req.flags.get() & !known_flags != 0 {
            return Err(Status::Inval.into());
        }
        if (kind == Type::Hello) != self.name.is_none() {
            return Err(Status::Inval.into());
        }
        let bytes = &packet.bytes;
        match kind {
            Type::Hello => self.hello(&parse(bytes)?),
            Type::List => list(&parse(bytes)?, hub),
            Type::Watch => self.watch(&parse(bytes)?),
            Type::Query => query(&parse(bytes)?, hub, people),
            Type::Stats => stats(&parse(bytes)?, hub),
            Type::Inspect => {
                Ok(inspect::inspect(ok(req), &parse(bytes)?, hub, self.sees_all(people)).into())
            }
            Type::Holders => {
                let (request, world) = (parse(bytes)?, (hub, people));
                Ok(inspect::holders(ok(req), &request, world, self.sees_all(people))?.into())
            }
            Type::Acquire => self.acquire(&parse(bytes)?, hub),
            Type::Release => {
                let request: wire::Release = parse(bytes)?;
                hub.host_release(self.client, LeaseId(request.lease.get()))?;
                if let Some((_, watch)) = &mut self.watch {
                    watch.lease_ended();
                }
                Ok(ok(req).as_bytes().to_vec().into())
            }
            Type::Sync => self.sync(&parse(bytes)?, hub),
            Type::Cancel => self.cancel(&parse(bytes)?, hub),
            Type::PointSignal | Type::PointWait | Type::Export | Type::Grant => {
                Err(Status::Unsupp.into())
            }
            Type::EvtOffered | Type::EvtRevoked | Type::EvtWithdrawn => Err(Status::Unsupp.into()),
            Type::EvtChanged | Type::EvtResync => Err(Status::Unsupp.into()),
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
            daemon: wire::pad_text(daemon),
            ..Default::default()
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
        let zero_copy = request.hdr.flags.get() & wire::flag::ACQUIRE_ZERO_COPY != 0;
        let uuid = Uuid::from_bytes(request.uuid);
        let got = hub.host_acquire(self.client, uuid, access, zero_copy)?;
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
            Ok(fd) => Ok(Answer::Now(Outgoing { bytes, memory: Some((fd, got.lease)) })),
            Err(error) => {
                log::debug!("no descriptor for a lease: {error}");
                hub.host_release(self.client, got.lease)?;
                Err(Status::NoMem.into())
            }
        }
    }

    fn sync(&mut self, request: &wire::Sync, hub: &Hub) -> Result<Answer, Refusal> {
        let flags = request.hdr.flags.get();
        let lease = LeaseId(request.lease.get());
        self.last_wait = self.last_wait.checked_add(1).unwrap_or(1);
        let sync = SyncRequest {
            bits: Access {
                read: flags & flag::SYNC_READ != 0,
                write: flags & flag::SYNC_WRITE != 0,
            },
            offset: request.offset.get(),
            len: request.len.get(),
            nonblock: flags & flag::SYNC_NONBLOCK != 0,
            timeout: Duration::from_nanos(request.timeout_ns.get()),
            cookie: Cookie(self.last_wait),
        };
        let generation = if flags & flag::SYNC_END != 0 {
            hub.host_end(self.client, lease, sync)?
        } else {
            let full = self.waits.len() >= MAX_CLIENT_WAITS;
            match hub.host_begin(self.client, lease, sync, full)? {
                Begun::Now(generation) => generation,
                Begun::Waits => {
                    self.waits.insert(sync.cookie, request.hdr.cookie.get());
                    return Ok(Answer::Later);
                }
            }
        };
        Ok(synced(request.hdr.cookie.get(), generation).bytes.into())
    }

    fn cancel(&mut self, request: &wire::Cancel, hub: &Hub) -> Result<Answer, Refusal> {
        let target = request.target.get();
        let named = self.waits.iter().find(|(_, cookie)| **cookie == target);
        let number = *named.ok_or(Status::NoEnt)?.0;
        hub.host_cancel(self.client, number)?;
        Ok(ok(&request.hdr).as_bytes().to_vec().into())
    }

    /// The answer to a pending BEGIN that ended.
    pub fn begun(&mut self, number: Cookie, status: Status, generation: u64) -> Option<Outgoing> {
        let cookie = self.waits.remove(&number)?;
        Some(match status {
            Status::Ok => synced(cookie, generation),
            status => refusal(Type::Sync.to_wire(), status, 0, cookie),
        })
    }
}

fn synced(cookie: u64, generation: u64) -> Outgoing {
    let hdr = header(Type::Sync.to_wire(), Status::Ok, 0, cookie);
    wire::RespSync { hdr, generation: generation.into() }.as_bytes().to_vec().into()
}

fn list(request: &wire::List, hub: &Hub) -> Result<Answer, Refusal> {
    let room = (MAX_PACKET - size_of::<wire::RespList>()) / size_of::<wire::Buffer>();
    let page = hub.host_page(Uuid::from_bytes(request.after), room);
    let count = (page.len() as u32).into();
    let mut bytes =
        wire::RespList { hdr: ok(&request.hdr), count, ..Default::default() }.as_bytes().to_vec();
    for info in &page {
        bytes.extend_from_slice(record(info).as_bytes());
    }
    Ok(bytes.into())
}

fn query(request: &wire::Query, hub: &Hub, people: &People) -> Result<Answer, Refusal> {
    let info = hub.host_info(Uuid::from_bytes(request.uuid)).ok_or(Status::NoEnt)?;
    let padded = info.what.metadata.len().next_multiple_of(8);
    let fixed = size_of::<wire::RespQuery>() + padded;
    let room = MAX_PACKET.saturating_sub(fixed) / size_of::<wire::Lease>();
    let leases = &info.leases[..info.leases.len().min(room)];
    let answer = wire::RespQuery {
        hdr: ok(&request.hdr),
        buffer: record(&info),
        count: (leases.len() as u32).into(),
        nr_leases: (info.leases.len() as u32).into(),
    };
    let mut bytes = answer.as_bytes().to_vec();
    bytes.extend_from_slice(&info.what.metadata);
    bytes.resize(fixed, 0);
    for lease in leases {
        let holder = people.get(&lease.client);
        let lease = wire::Lease {
            lease: lease.lease.0.into(),
            pid: holder.map_or(0, |holder| holder.pid).into(),
            access: lease.access.bits().into(),
            client: holder.map_or([0; NAME_LEN], |holder| holder.name),
        };
        bytes.extend_from_slice(lease.as_bytes());
    }
    Ok(bytes.into())
}

fn stats(request: &wire::Stats, hub: &Hub) -> Result<Answer, Refusal> {
    if request.reserved.get() != 0 {
        return Err(Status::Inval.into());
    }
    let all = hub.stats();
    let room = (MAX_PACKET - size_of::<wire::RespStats>()) / size_of::<wire::Stat>();
    let page: Vec<_> = all.iter().skip(request.first.get() as usize).take(room).collect();
    let (count, nr_stats) = ((page.len() as u32).into(), (all.len() as u32).into());
    let mut bytes = wire::RespStats { hdr: ok(&request.hdr), count, nr_stats }.as_bytes().to_vec();
    for (name, value) in page {
        let stat = wire::Stat { name: wire::pad_text(name), value: (*value).into() };
        bytes.extend_from_slice(stat.as_bytes());
    }
    Ok(bytes.into())
}

/// A buffer's record.
pub fn record(info: &BufferInfo) -> wire::Buffer {
    wire::Buffer {
        uuid: info.uuid.into_bytes(),
        name: info.what.name,
        exporter_name: wire::pad_text(&info.exporter_name),
        size: info.what.size.into(),
        generation: info.generation.into(),
        exporter: info.exporter.0.into(),
        access: info.access.bits().into(),
        mode: info.mode.to_wire().into(),
        use_count: info.use_count.into(),
        metadata_type: info.what.metadata_type.into(),
        metadata_len: (info.what.metadata.len() as u32).into(),
        ..Default::default()
    }
}

fn parse<T: FromBytes + KnownLayout + Immutable>(bytes: &[u8]) -> Result<T, Refusal> {
    T::read_from_prefix(bytes).map(|(request, _)| request).or(Err(Status::Inval.into()))
}
