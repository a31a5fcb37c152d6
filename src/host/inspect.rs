//! INSPECT and HOLDERS, the daemon's side: who has what, in bytes (`spec/host-socket.md`).
//!
//! It knows the registry's answers and the clients' processes, not who merely has a descriptor.

use std::time::Duration;

use uuid::Uuid;
use zerocopy::IntoBytes;

use super::lists::record;
use super::request::People;
use super::wire::{self, HolderKind, MAX_PACKET};
use crate::dmabuf::FdKind;
use crate::hub::Hub;
use crate::ids::PeerId;
use crate::protocol::{PEER_NAME_LEN, Status};
use crate::registry::{HolderInfo, Report, Who};

fn count(n: usize) -> zerocopy::little_endian::U32 {
    u32::try_from(n).unwrap_or(u32::MAX).into()
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn report(report: &Report) -> wire::Report {
    wire::Report {
        buffer: record(&report.info),
        age_ms: millis(report.age).into(),
        state: report.state.to_wire().into(),
        nr_leases: count(report.leases),
        nr_attachments: count(report.attachments),
        nr_mappings: report.mappings.into(),
        nr_waits: count(report.waits),
        flags: (u32::from(report.owner_gone) * wire::flag::REPORT_OWNER_GONE).into(),
    }
}

/// A page of reports; of `all` buffers, or of those that every client may see.
pub fn inspect(hdr: wire::Resp, request: &wire::Inspect, hub: &Hub, all: bool) -> Vec<u8> {
    let room = (MAX_PACKET - size_of::<wire::RespInspect>()) / size_of::<wire::Report>();
    let page = hub.report_page(Uuid::from_bytes(request.after), room, all);
    let fixed = wire::RespInspect { hdr, count: count(page.len()), ..Default::default() };
    let mut bytes = fixed.as_bytes().to_vec();
    for one in &page {
        bytes.extend_from_slice(report(one).as_bytes());
    }
    bytes
}

/// Who holds a buffer.
pub fn holders(
    hdr: wire::Resp,
    request: &wire::Holders,
    (hub, people): (&Hub, &People),
    all: bool,
) -> Result<Vec<u8>, Status> {
    if request.reserved.get() != 0 {
        return Err(Status::Inval);
    }
    let uuid = Uuid::from_bytes(request.uuid);
    let room = (MAX_PACKET - size_of::<wire::RespHolders>()) / size_of::<wire::Holder>();
    let page = (request.first.get() as usize, room);
    let now = hub.now();
    let found = hub.read(|registry| registry.holders(uuid, page, all, now)).ok_or(Status::NoEnt)?;
    let memory = found.backing.as_deref();
    let place = memory.and_then(|memory| memory.file_id()).map(|file| (file.dev, file.ino));
    let references = memory.and_then(|memory| hub.references(memory));
    let (device, inode) = place.unwrap_or_default();
    let fixed = wire::RespHolders {
        hdr,
        report: report(&found.report),
        device: device.into(),
        inode: inode.into(),
        references: references.map_or(u32::MAX, |n| u32::try_from(n).unwrap_or(u32::MAX)).into(),
        fd_kind: memory.map_or(0, |memory| fd_kind(memory.kind()).to_wire()).into(),
        count: count(found.some.len()),
        nr_holders: count(found.all),
        acquired: found.acquired.into(),
    };
    drop(found.backing);
    let mut bytes = fixed.as_bytes().to_vec();
    for one in &found.some {
        bytes.extend_from_slice(holder(one, people).as_bytes());
    }
    Ok(bytes)
}

/// What consumers get, as the wire says it.
pub fn fd_kind(kind: FdKind) -> wire::FdKind {
    match kind {
        FdKind::DmaBuf => wire::FdKind::DmaBuf,
        FdKind::Memfd => wire::FdKind::MemFd,
    }
}

fn holder(info: &HolderInfo, people: &People) -> wire::Holder {
    let (kind, peer, number) = match info.who {
        Who::Exporter(peer, handle) => (HolderKind::Exporter, peer, handle.0),
        Who::Lender(_, handle) => (HolderKind::Exporter, PeerId::HOST, handle.0),
        Who::Lease(_, lease) => (HolderKind::Lease, PeerId::HOST, lease.0),
        Who::Attachment(peer, handle) => (HolderKind::Attachment, peer, handle.0),
    };
    let mut name = wire::pad_text(&info.name);
    let mut pid = 0;
    if let Who::Lease(client, _) | Who::Lender(client, _) = info.who
        && let Some(person) = people.get(&client)
    {
        name = [0; PEER_NAME_LEN];
        name.iter_mut().zip(person.name).for_each(|(to, from)| *to = from);
        pid = person.pid;
    }
    let revoked = u32::from(info.revoked) * wire::flag::HOLDER_REVOKED;
    let flags = revoked + u32::from(info.fenced) * wire::flag::HOLDER_FENCE;
    wire::Holder {
        name,
        number: number.into(),
        age_ms: millis(info.age).into(),
        kind: kind.to_wire().into(),
        peer: peer.0.into(),
        pid: pid.into(),
        access: info.access.bits().into(),
        holds: info.holds.bits().into(),
        waits: info.waits.bits().into(),
        place: info.place.into(),
        left_ms: u32::try_from(info.left.as_millis()).unwrap_or(u32::MAX).into(),
        nr_mappings: count(info.mappings),
        flags: flags.into(),
        acquire_point: info.points[0].into(),
        release_point: info.points[1].into(),
        released: info.released.into(),
        points_left_ms: u32::try_from(info.points_left.as_millis()).unwrap_or(u32::MAX).into(),
        reserved: 0.into(),
    }
}
