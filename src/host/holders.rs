//! INSPECT and HOLDERS, a program's side: which buffers there are, who has a right to each, and who
//! waits for whom.
//!
//! Who merely has a descriptor the daemon cannot tell; [`Memory`] says what to look for in /proc.

use std::time::Duration;

use uuid::Uuid;

use super::channel::{Result, parse, records};
use super::client::Client;
use super::error::Error;
use super::values::Buffer;
use super::wire::{self, FdKind, HolderKind, Type};
use crate::protocol::{State, access};

/// A buffer and how it is used.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Report {
    pub buffer: Buffer,
    /// Since EXPORT.
    pub age: Duration,
    /// As its exporter sees it; `None` is a state that this library does not know.
    pub state: Option<State>,
    pub leases: u32,
    /// Of other VMs.
    pub attachments: u32,
    /// Of these attachments.
    pub mappings: u32,
    /// Pending BEGINs and WAITs of anybody.
    pub waits: u32,
    /// The exporter's session is over.
    pub owner_gone: bool,
}

impl From<&wire::Report> for Report {
    fn from(raw: &wire::Report) -> Self {
        Report {
            buffer: Buffer::from(&raw.buffer),
            age: Duration::from_millis(raw.age_ms.get()),
            state: State::from_wire(raw.state.get()),
            leases: raw.nr_leases.get(),
            attachments: raw.nr_attachments.get(),
            mappings: raw.nr_mappings.get(),
            waits: raw.nr_waits.get(),
            owner_gone: raw.flags.get() & wire::flag::REPORT_OWNER_GONE != 0,
        }
    }
}

/// Somebody with a right to a buffer.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Holder {
    /// `None` is a kind that this library does not know.
    pub kind: Option<HolderKind>,
    /// The operator's name for the VM; what the client calls itself.
    pub name: String,
    /// Peer id.
    pub peer: u32,
    /// Of a lease's client when it connected; 0: unknown.
    pub pid: u32,
    /// Of the lease; handle of the export or attachment.
    pub number: u64,
    /// Since EXPORT, ACQUIRE or ATTACH.
    pub age: Duration,
    /// What it may do (`protocol::access`).
    pub access: u32,
    /// BEGIN without END.
    pub holds: u32,
    /// BEGIN that is pending.
    pub waits: u32,
    /// Of the first of them in the queue, from 1; 0: there is none.
    pub place: u32,
    /// Until that one times out.
    pub left: Duration,
    pub mappings: u32,
    /// Dead, but not handed back.
    pub revoked: bool,
    /// It waits for a fence of the host.
    pub fenced: bool,
    /// The next point of ACQUIRE that it waits for; 0: none.
    pub acquire_point: u64,
    /// The same of RELEASE.
    pub release_point: u64,
    /// What its own RELEASE reached.
    pub released: u64,
    /// Until the first of these waits times out.
    pub points_left: Duration,
}

impl From<&wire::Holder> for Holder {
    fn from(raw: &wire::Holder) -> Self {
        Holder {
            kind: HolderKind::from_wire(raw.kind.get()),
            name: wire::field_text(&raw.name),
            peer: raw.peer.get(),
            pid: raw.pid.get(),
            number: raw.number.get(),
            age: Duration::from_millis(raw.age_ms.get()),
            access: raw.access.get(),
            holds: raw.holds.get(),
            waits: raw.waits.get(),
            place: raw.place.get(),
            left: Duration::from_millis(raw.left_ms.get().into()),
            mappings: raw.nr_mappings.get(),
            revoked: raw.flags.get() & wire::flag::HOLDER_REVOKED != 0,
            fenced: raw.flags.get() & wire::flag::HOLDER_FENCE != 0,
            acquire_point: raw.acquire_point.get(),
            release_point: raw.release_point.get(),
            released: raw.released.get(),
            points_left: Duration::from_millis(raw.points_left_ms.get().into()),
        }
    }
}

impl Holder {
    fn is(&self, other: &Holder) -> bool {
        (self.kind, self.number, self.peer) == (other.kind, other.number, other.peer)
    }

    /// Whether this one waits for a point that `other` can signal. Who waits for the RELEASE of its own
    /// waits for itself.
    pub fn awaits_point_of(&self, other: &Holder) -> bool {
        let exporter = |holder: &Holder| holder.kind == Some(HolderKind::Exporter);
        if other.revoked || self.is(other) {
            return false;
        }
        let says = exporter(other) || other.access & access::WRITE != 0;
        let keeps = exporter(self) && other.released < self.release_point;
        (self.acquire_point != 0 && says) || keeps
    }

    /// Whether a pending BEGIN of this one waits for `other`.
    pub fn waits_for(&self, other: &Holder) -> bool {
        use access::WRITE;
        if self.waits == 0 || self.is(other) {
            return false;
        }
        let conflict = other.holds & WRITE != 0 || (self.waits & WRITE != 0 && other.holds != 0);
        let queue = other.waits & WRITE != 0 && (1..self.place).contains(&other.place);
        conflict || queue
    }
}

/// The memory behind a buffer, as /proc shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// `st_dev` of its descriptors.
    pub device: u64,
    /// `st_ino` of its descriptors.
    pub inode: u64,
    /// What it is; `None` is a kind that this library does not know.
    pub kind: Option<FdKind>,
    /// Descriptors, mappings and attached devices on this host besides the daemon's own; `None`: that
    /// cannot be counted.
    pub references: Option<u32>,
}

/// Answer to HOLDERS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holders {
    /// The buffer.
    pub report: Report,
    /// What ACQUIRE reached.
    pub acquired: u64,
    /// `None` once it is given up.
    pub memory: Option<Memory>,
    /// The exporter first.
    pub holders: Vec<Holder>,
}

impl Client {
    /// Every buffer that this client may know of, in the order of the UUIDs: for root and the
    /// daemon's user all of them.
    pub fn inspect(&mut self) -> Result<Vec<Report>> {
        let mut all: Vec<Report> = Vec::new();
        loop {
            let hdr = self.channel.header(Type::Inspect, 0);
            let after = all.last().map_or([0; 16], |last| last.buffer.uuid.into_bytes());
            let packet = self.channel.call(&hdr, &wire::Inspect { hdr, after })?;
            let (reply, rest) = parse::<wire::RespInspect>(&packet, Type::Inspect)?;
            let page = records::<wire::Report>(rest, reply.count.get(), Type::Inspect)?;
            if page.is_empty() {
                return Ok(all);
            }
            if page[0].buffer.uuid <= after && after != [0; 16] {
                return Err(Error::Protocol { request: Type::Inspect, what: "a page repeats" });
            }
            all.extend(page.iter().map(Report::from));
        }
    }

    /// Who has a right to a buffer, and who waits for whom. Page by page: who comes or goes meanwhile
    /// may be missed or told twice.
    pub fn holders(&mut self, uuid: Uuid) -> Result<Holders> {
        let mut holders = Vec::new();
        loop {
            let hdr = self.channel.header(Type::Holders, 0);
            let first = (holders.len() as u32).into();
            let uuid = uuid.into_bytes();
            let request = wire::Holders { hdr, uuid, first, ..Default::default() };
            let packet = self.channel.call(&hdr, &request)?;
            let (reply, rest) = parse::<wire::RespHolders>(&packet, Type::Holders)?;
            let page = records::<wire::Holder>(rest, reply.count.get(), Type::Holders)?;
            holders.extend(page.iter().map(Holder::from));
            if !page.is_empty() && holders.len() < reply.nr_holders.get() as usize {
                continue;
            }
            let references = reply.references.get();
            let memory = Memory {
                device: reply.device.get(),
                inode: reply.inode.get(),
                kind: FdKind::from_wire(reply.fd_kind.get()),
                references: (references != u32::MAX).then_some(references),
            };
            let memory = Some(memory).filter(|memory| memory.inode != 0);
            let (report, acquired) = (Report::from(&reply.report), reply.acquired.get());
            return Ok(Holders { report, acquired, memory, holders });
        }
    }
}
