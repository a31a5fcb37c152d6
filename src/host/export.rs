//! What a client asks as an exporter, and what it is told of its exports: EXPORT, GRANT.
//!
//! It knows the protocol and the hub, not sockets. To look at an fd, and to close it, can take as long
//! as whoever made it likes, so whatever has to do with one is a [`Job`].

use std::os::fd::OwnedFd;
use std::time::Duration;

use zerocopy::IntoBytes;

use super::inspect::fd_kind;
use super::lists::record;
use super::request::{Answer, Job, Outgoing, Refusal, ok, parse, refusal};
use super::wire::{self, Type};
use crate::command::{check_metadata, check_name};
use crate::dmabuf::{Backing, FdKind, Unfit};
use crate::hub::Hub;
use crate::ids::{Access, ClientId, HandleId, PeerId, SessionId};
use crate::limits::{GRANULE, MAX_METADATA};
use crate::protocol::{Status, flag};
use crate::registry::{Description, EventKind, ExportEvent, GrantRequest};

/// GRANT.
pub fn grant(client: ClientId, request: &wire::Grant, hub: &Hub) -> Result<Answer, Refusal> {
    let flags = request.hdr.flags.get();
    let access = Access::from_bits(request.access.get()).ok_or(Status::Inval)?;
    if flags & flag::GRANT_FORCE != 0 && !access.is_none() {
        return Err(Status::Inval.into());
    }
    let grant = GrantRequest {
        handle: HandleId(request.handle.get()),
        to: PeerId(request.peer_id.get()),
        access,
        once: flags & flag::GRANT_ONCE != 0,
        force: flags & flag::GRANT_FORCE != 0,
        lifetime: Duration::from_millis(request.lifetime_ms.get()),
    };
    hub.with(|registry, now| registry.grant(SessionId::of_client(client), grant, now))?;
    Ok(ok(&request.hdr).as_bytes().to_vec().into())
}

/// A packet with fds that nobody asked for.
pub fn stray(fds: Vec<OwnedFd>, answer: Result<Outgoing, &'static str>) -> Job {
    Box::new(move |_| {
        drop(fds);
        answer
    })
}

/// EXPORT.
pub fn export(client: ClientId, bytes: &[u8], cookie: u64, fd: OwnedFd, hub: &Hub) -> Job {
    let (request, what) = match judge(bytes) {
        Ok(judged) => judged,
        Err(Refusal { status, detail }) => {
            return stray(vec![fd], Ok(refused(hub, status, detail, cookie)));
        }
    };
    let (size, access) = (what.size, what.access);
    let too_big = what.metadata.len() > MAX_METADATA as usize;
    let name = wire::field_text(&what.name);
    let ticket = hub.with(|registry, _| registry.begin_client_export(client, what, too_big));
    let ticket = match ticket {
        Ok(ticket) => ticket,
        Err(status) => {
            return stray(vec![fd], Ok(refused(hub, status, 0, cookie)));
        }
    };
    Box::new(move |hub| {
        let lent = hub.dmabufs.lend(fd, size, access, &name);
        let kind = lent.as_ref().map_or(FdKind::Memfd, Backing::kind);
        let unfit = lent.as_ref().err().copied();
        Ok(match (hub.finish_host_export(ticket, lent), unfit) {
            (_, Some(unfit)) => {
                log::debug!("client {client}: not taken in: {unfit}");
                match fault(unfit) {
                    Some(why) => refused(hub, Status::Fault, why.to_wire(), cookie),
                    None => refused(hub, Status::NoMem, 0, cookie),
                }
            }
            (Err(status), None) => refused(hub, status, 0, cookie),
            (Ok((handle, uuid)), None) => {
                let answer = wire::RespExport {
                    hdr: ok(&request.hdr),
                    handle: handle.0.into(),
                    uuid: uuid.into_bytes(),
                    fd_kind: fd_kind(kind).to_wire().into(),
                    ..Default::default()
                };
                let bytes = answer.as_bytes().to_vec();
                Outgoing { export: Some((handle, cookie)), ..bytes.into() }
            }
        })
    })
}

fn refused(hub: &Hub, status: Status, detail: u32, cookie: u64) -> Outgoing {
    hub.metrics.answered_host(Some(Type::Export), status);
    refusal(Type::Export.to_wire(), status, detail, cookie)
}

fn fault(unfit: Unfit) -> Option<wire::Fault> {
    Some(match unfit {
        Unfit::Kind => wire::Fault::Kind,
        Unfit::Unsealed => wire::Fault::Unsealed,
        Unfit::Access => wire::Fault::Access,
        Unfit::Size => wire::Fault::Size,
        Unfit::Map => wire::Fault::Map,
        Unfit::NoRoom => return None,
    })
}

fn judge(bytes: &[u8]) -> Result<(wire::Export, Description), Refusal> {
    let request: wire::Export = parse(bytes)?;
    let access = Access::from_bits(request.access.get()).ok_or(Status::Inval)?;
    let metadata = bytes.get(size_of::<wire::Export>()..).unwrap_or_default();
    let metadata = metadata.get(..request.metadata_len.get() as usize).ok_or(Status::Inval)?;
    let size = request.size.get();
    if request.reserved.get() != 0 || size == 0 || access.is_none() {
        return Err(Status::Inval.into());
    }
    check_name(&request.name)?;
    check_metadata(request.metadata_type.get(), metadata, size)?;
    if !size.is_multiple_of(GRANULE) {
        return Err(Status::Range.into());
    }
    let what = Description {
        size,
        access,
        name: request.name,
        metadata_type: request.metadata_type.get(),
        metadata: metadata.into(),
    };
    Ok((request, what))
}

/// An event of an export, under the cookie of its EXPORT.
pub fn event(event: &ExportEvent, cookie: u64) -> Outgoing {
    let kind = match event.kind {
        EventKind::Released => Type::EvtReleased,
        EventKind::Busy => Type::EvtBusy,
        EventKind::Idle => Type::EvtIdle,
        _ => Type::EvtChanged,
    };
    let uuid = event.info.uuid.into_bytes();
    let buffer = match kind {
        Type::EvtReleased => wire::Buffer { uuid, ..Default::default() },
        _ => record(&event.info),
    };
    super::request::event(kind, Status::Ok, cookie, buffer)
}
