//! The client's side of the host socket, for programs on the host (`spec/host-socket.md`).
//!
//! Calls block until the daemon answers; what may stay pending has a form that does not:
//! [`Client::submit_begin`], [`Client::take_generation`]. For poll loops, wait until the socket
//! ([`AsFd`]) is readable, then [`Client::dispatch`]. An `Err` of kind [`Error::Refused`] is a normal
//! answer and leaves the connection usable; after any other the connection is over, and with it, on
//! the daemon's side, every lease.
//!
//! It knows the protocol, not what a program does with a buffer.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use uuid::Uuid;

use super::channel::{Channel, Result, metadata, parse, records};
use super::wire::{self, FdKind, Type};
use crate::protocol::{self, Line, Mode, Status};

pub use super::error::Error;
pub use super::lend::Loan;
pub use super::values::{Access, Buffer, Daemon, Details, Event, Export, Lease, LeaseInfo, Peer};

/// Where the socket is unless somebody says otherwise.
pub const DEFAULT_SOCKET: &str = "/run/bufshare/host.sock";

/// A connection to the daemon.
#[derive(Debug)]
pub struct Client {
    pub(super) channel: Channel,
    daemon: Daemon,
}

impl Client {
    /// Connects to the daemon's host socket and says HELLO. `name` is shown to whom asks who holds
    /// a buffer.
    pub fn connect(path: &Path, name: &str) -> Result<Client> {
        let at = |source: Errno| Error::connect(path, source);
        let socket =
            socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .map_err(at)?;
        connect(&socket, &SocketAddrUnix::new(path).map_err(at)?).map_err(at)?;
        Client::hello(socket, name)
    }

    /// Says HELLO on a connected socket, inherited or from a test.
    pub fn hello(socket: OwnedFd, name: &str) -> Result<Client> {
        let daemon = Daemon {
            name: String::new(),
            peer_id: 0,
            max_leases: 0,
            max_exports: 0,
            max_waits: 0,
            max_wait: Duration::ZERO,
        };
        let mut client = Client { channel: Channel::new(socket), daemon };
        let hdr = client.channel.header(Type::Hello, 0);
        let version = wire::VERSION.into();
        let request =
            wire::Hello { hdr, version, name: wire::pad_text(name), ..Default::default() };
        let packet = match client.channel.call(&hdr, &request) {
            Err(Error::Refused { status: Status::Access, .. }) => return Err(Error::NotAdmitted),
            Err(Error::Refused { status: Status::Quota, .. }) => return Err(Error::TooManyClients),
            Err(Error::Refused { status: Status::Unsupp, detail, .. }) => {
                return Err(Error::Version { daemon: detail });
            }
            other => other?,
        };
        let (reply, _) = parse::<wire::RespHello>(&packet, Type::Hello)?;
        client.daemon = Daemon {
            name: wire::field_text(&reply.daemon),
            peer_id: reply.peer_id.get(),
            max_leases: reply.max_leases.get(),
            max_exports: reply.max_exports.get(),
            max_waits: reply.max_waits.get(),
            max_wait: Duration::from_millis(reply.max_wait_ms.get().into()),
        };
        Ok(client)
    }

    /// What the daemon said of itself.
    pub fn daemon(&self) -> &Daemon {
        &self.daemon
    }

    /// Every buffer that is offered to the host, in the order of the UUIDs.
    pub fn list(&mut self) -> Result<Vec<Buffer>> {
        let mut all: Vec<Buffer> = Vec::new();
        loop {
            let hdr = self.channel.header(Type::List, 0);
            let after = all.last().map_or([0; 16], |last| last.uuid.into_bytes());
            let packet = self.channel.call(&hdr, &wire::List { hdr, after })?;
            let (reply, rest) = parse::<wire::RespList>(&packet, Type::List)?;
            let page = records::<wire::Buffer>(rest, reply.count.get(), Type::List)?;
            if page.is_empty() {
                return Ok(all);
            }
            if page[0].uuid <= after && after != [0; 16] {
                return Err(Error::Protocol { request: Type::List, what: "a page repeats" });
            }
            all.extend(page.iter().map(Buffer::from));
        }
    }

    /// The buffer that a person means: a UUID, or the name of exactly one offered buffer.
    pub fn find(&mut self, wanted: &str) -> Result<Option<Buffer>> {
        let uuid = Uuid::parse_str(wanted).ok();
        let mut found = self
            .list()?
            .into_iter()
            .filter(|buffer| uuid.map_or(buffer.name == wanted, |uuid| buffer.uuid == uuid));
        let first = found.next();
        match found.count() {
            0 => Ok(first),
            more => Err(Error::Ambiguous { name: wanted.to_owned(), count: more + 1 }),
        }
    }

    /// Starts events about one buffer, or about all; replaces an earlier watch, whose events are
    /// dropped.
    pub fn watch(&mut self, only: Option<Uuid>) -> Result<()> {
        let hdr = self.channel.header(Type::Watch, 0);
        let uuid = only.unwrap_or(Uuid::nil()).into_bytes();
        self.channel.call(&hdr, &wire::Watch { hdr, uuid })?;
        self.channel.events.clear();
        Ok(())
    }

    /// Record, metadata and leases of a buffer.
    pub fn query(&mut self, uuid: Uuid) -> Result<Details> {
        let hdr = self.channel.header(Type::Query, 0);
        let packet = self.channel.call(&hdr, &wire::Query { hdr, uuid: uuid.into_bytes() })?;
        let (reply, rest) = parse::<wire::RespQuery>(&packet, Type::Query)?;
        let buffer = Buffer::from(&reply.buffer);
        let (metadata, rest) = metadata(rest, &buffer, Type::Query)?;
        let padding = metadata.len().next_multiple_of(8) - metadata.len();
        let leases = rest.get(padding..).unwrap_or_default();
        let leases = records::<wire::Lease>(leases, reply.count.get(), Type::Query)?;
        let leases = leases.iter().map(|raw| LeaseInfo {
            lease: raw.lease.get(),
            pid: raw.pid.get(),
            access: raw.access.get(),
            client: wire::field_text(&raw.client),
        });
        let leases = leases.collect();
        Ok(Details { buffer, metadata, leases, nr_leases: reply.nr_leases.get() })
    }

    /// Every counter and gauge of the daemon.
    pub fn stats(&mut self) -> Result<Vec<(String, u64)>> {
        let mut all = Vec::new();
        loop {
            let hdr = self.channel.header(Type::Stats, 0);
            let first = (all.len() as u32).into();
            let request = wire::Stats { hdr, first, ..Default::default() };
            let packet = self.channel.call(&hdr, &request)?;
            let (reply, rest) = parse::<wire::RespStats>(&packet, Type::Stats)?;
            let page = records::<wire::Stat>(rest, reply.count.get(), Type::Stats)?;
            all.extend(page.iter().map(|stat| (wire::field_text(&stat.name), stat.value.get())));
            if page.is_empty() || all.len() >= reply.nr_stats.get() as usize {
                return Ok(all);
            }
        }
    }

    /// A lease with these access bits (`protocol::access`). With `zero_copy` a copy is refused
    /// with ACCESS.
    pub fn acquire(&mut self, uuid: Uuid, access: u32, zero_copy: bool) -> Result<Lease> {
        self.acquire_with(uuid, access, if zero_copy { wire::flag::ACQUIRE_ZERO_COPY } else { 0 })
    }

    /// As [`Client::acquire`], with these flags (`wire::flag::ACQUIRE_*`).
    pub fn acquire_with(&mut self, uuid: Uuid, access: u32, flags: u16) -> Result<Lease> {
        let hdr = self.channel.header(Type::Acquire, flags);
        let uuid = uuid.into_bytes();
        let request = wire::Acquire { hdr, uuid, access: access.into(), ..Default::default() };
        let mut packet = self.channel.call(&hdr, &request)?;
        let broken = |what| Error::Protocol { request: Type::Acquire, what };
        let fd = packet.fd.take().ok_or_else(|| broken("no fd came with the lease"))?;
        let (reply, rest) = parse::<wire::RespAcquire>(&packet, Type::Acquire)?;
        let buffer = Buffer::from(&reply.buffer);
        let (metadata, _) = metadata(rest, &buffer, Type::Acquire)?;
        Ok(Lease {
            id: reply.lease.get(),
            fd,
            fd_kind: FdKind::from_wire(reply.fd_kind.get())
                .ok_or_else(|| broken("unknown kind of fd"))?,
            mode: Mode::from_wire(reply.mode.get()).ok_or_else(|| broken("unknown mode"))?,
            access: reply.access.get(),
            writable: reply.flags.get() & wire::flag::LEASE_WRITABLE != 0,
            buffer,
            metadata,
        })
    }

    /// Asks for a stable view and waits for it, at most `timeout`; the generation that it has.
    pub fn begin(&mut self, lease: u64, access: Access, timeout: Duration) -> Result<u64> {
        let cookie = self.submit_begin(lease, access, timeout)?;
        let packet = self.channel.wait_reply(cookie)?;
        Ok(parse::<wire::RespSync>(&packet, Type::Sync)?.0.generation.get())
    }

    /// As [`Client::begin`], but instead of waiting at all it is refused with AGAIN.
    pub fn try_begin(&mut self, lease: u64, access: Access) -> Result<u64> {
        let flags = access.flags() | protocol::flag::SYNC_NONBLOCK;
        let cookie = self.submit_sync(lease, access, flags, Duration::ZERO)?;
        let packet = self.channel.wait_reply(cookie)?;
        Ok(parse::<wire::RespSync>(&packet, Type::Sync)?.0.generation.get())
    }

    /// Sends BEGIN; the cookie is for [`Client::take_generation`] and [`Client::cancel`].
    pub fn submit_begin(&mut self, lease: u64, access: Access, timeout: Duration) -> Result<u64> {
        self.submit_sync(lease, access, access.flags(), timeout)
    }

    /// The answer to a submitted BEGIN, if it arrived ([`Client::dispatch`] takes it in).
    pub fn take_generation(&mut self, cookie: u64) -> Result<Option<u64>> {
        match self.channel.take_reply(cookie)? {
            Some(packet) => {
                let (reply, _) = parse::<wire::RespSync>(&packet, Type::Sync)?;
                Ok(Some(reply.generation.get()))
            }
            None => Ok(None),
        }
    }

    /// Ends a view; with WRITE the content of the range is complete. The generation afterwards.
    pub fn end(&mut self, lease: u64, access: Access) -> Result<u64> {
        let flags = access.flags() | protocol::flag::SYNC_END;
        let cookie = self.submit_sync(lease, access, flags, Duration::ZERO)?;
        let packet = self.channel.wait_reply(cookie)?;
        Ok(parse::<wire::RespSync>(&packet, Type::Sync)?.0.generation.get())
    }

    /// Says that a timeline of the lease reached a point; with an error that is what those get who wait
    /// for this very point.
    pub fn signal(&mut self, lease: u64, line: Line, point: u64, error: Status) -> Result<u64> {
        let cookie =
            self.submit_point(Type::PointSignal, lease, line, point, error, Duration::ZERO)?;
        let packet = self.channel.wait_reply(cookie)?;
        Ok(parse::<wire::RespPoint>(&packet, Type::PointSignal)?.0.reached.get())
    }

    /// Waits until a timeline reached a point, at most `timeout`; what it reached then.
    pub fn wait(&mut self, lease: u64, line: Line, point: u64, timeout: Duration) -> Result<u64> {
        let cookie = self.submit_wait(lease, line, point, timeout)?;
        let packet = self.channel.wait_reply(cookie)?;
        Ok(parse::<wire::RespPoint>(&packet, Type::PointWait)?.0.reached.get())
    }

    /// Sends WAIT; the cookie is for [`Client::take_reached`] and [`Client::cancel`].
    pub fn submit_wait(
        &mut self,
        lease: u64,
        line: Line,
        point: u64,
        timeout: Duration,
    ) -> Result<u64> {
        self.submit_point(Type::PointWait, lease, line, point, Status::Ok, timeout)
    }

    /// The answer to a submitted WAIT, if it arrived ([`Client::dispatch`] takes it in).
    pub fn take_reached(&mut self, cookie: u64) -> Result<Option<u64>> {
        let Some(packet) = self.channel.take_reply(cookie)? else { return Ok(None) };
        Ok(Some(parse::<wire::RespPoint>(&packet, Type::PointWait)?.0.reached.get()))
    }

    /// Ends a pending BEGIN or WAIT: its answer is CANCELED.
    pub fn cancel(&mut self, cookie: u64) -> Result<()> {
        let hdr = self.channel.header(Type::Cancel, 0);
        self.channel.call(&hdr, &wire::Cancel { hdr, target: cookie.into() }).map(drop)
    }

    /// Ends a lease. The exporter gets its memory back when the fd is closed too.
    pub fn release(&mut self, lease: Lease) -> Result<()> {
        let Lease { id, fd, .. } = lease;
        drop(fd);
        let hdr = self.channel.header(Type::Release, 0);
        self.channel.call(&hdr, &wire::Release { hdr, lease: id.into() }).map(drop)
    }

    /// The next event that was taken in, without waiting.
    pub fn take_event(&mut self) -> Option<Event> {
        self.channel.events.pop_front()
    }

    /// The next event, waiting at most `timeout` (`None`: for ever).
    pub fn next_event(&mut self, timeout: Option<Duration>) -> Result<Option<Event>> {
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        loop {
            self.dispatch()?;
            if let Some(event) = self.take_event() {
                return Ok(Some(event));
            }
            if deadline.is_some_and(|end| end <= Instant::now()) {
                return Ok(None);
            }
            self.channel.wait_readable(deadline)?;
        }
    }

    /// Whether an event or the answer to a submitted BEGIN is there to be taken.
    pub fn has_news(&self) -> bool {
        self.channel.has_news()
    }

    /// Takes in what has arrived, without waiting.
    pub fn dispatch(&mut self) -> Result<()> {
        self.channel.dispatch()
    }

    fn submit_point(
        &mut self,
        kind: Type,
        lease: u64,
        line: Line,
        point: u64,
        error: Status,
        timeout: Duration,
    ) -> Result<u64> {
        let hdr = self.channel.header(kind, 0);
        let request = wire::Point {
            hdr,
            lease: lease.into(),
            timeline: line.to_wire().into(),
            error: u32::from(error.to_wire()).into(),
            point: point.into(),
            timeout_ns: u64::try_from(timeout.as_nanos()).unwrap_or(u64::MAX).into(),
        };
        self.channel.submit(&hdr, &request, None)
    }

    fn submit_sync(
        &mut self,
        lease: u64,
        access: Access,
        flags: u16,
        timeout: Duration,
    ) -> Result<u64> {
        let hdr = self.channel.header(Type::Sync, flags);
        let timeout_ns = u64::try_from(timeout.as_nanos()).unwrap_or(u64::MAX).into();
        let (offset, len) = (access.offset.into(), access.len.into());
        self.channel.submit(
            &hdr,
            &wire::Sync { hdr, lease: lease.into(), offset, len, timeout_ns },
            None,
        )
    }
}

impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }
}
