//! One command of a VM, from judging it to its reply: registry, effects with the lock released,
//! registry.
//!
//! It knows the order of steps, not bytes on rings, and keeps no state of its own.

use std::sync::Arc;

use uuid::Uuid;

use crate::command::{Command, Export};
use crate::dmabuf::{Backing, Wish};
use crate::hub::Hub;
use crate::ids::{HandleId, MappingId, PeerId, SessionId};
use crate::limits::MAX_METADATA;
use crate::memory::{self, FileSegment, MemoryMap, Refusal};
use crate::policy::Allowed;
use crate::protocol::{Mode, Segment, Status};
use crate::registry::{Begun, Exported, MapRequest, Part, SyncRequest, WindowRequest};
use crate::reply::{Refused, Reply};

/// What the executing VM brings along.
#[derive(Debug, Clone, Copy)]
pub struct Context<'a> {
    /// Whose command it is.
    pub session: SessionId,
    /// Its memory.
    pub map: &'a MemoryMap,
    /// Copies of RAM that could be truncated are allowed.
    pub unsealed_ram: bool,
    /// The device's number for this chain, should it have to wait.
    pub token: u64,
    /// Sync requests that the ring has room for.
    pub ring_room: u32,
}

/// Executes a command. `None`: it waits, and [`Hub::take_done`] or [`Hub::take_settled`] will tell.
pub fn execute(hub: &Hub, vm: Context<'_>, command: Command<'_>) -> Option<Result<Reply, Refused>> {
    let session = vm.session;
    let done = |result: Result<(), Status>| result.map(|()| Reply::Done).map_err(Refused::from);
    Some(match command {
        Command::Export(request) => export(hub, vm, request),
        Command::Grant(request) => done(hub.with(|r, now| r.grant(session, request, now))),
        Command::Release { handle, force } => {
            let look = hub.read(|r| r.look_before_release(session, handle));
            if let Some(key) = look {
                hub.observe(key);
            }
            let state = hub.with(|r, _| r.release(session, handle, force));
            state.map(Reply::State).map_err(Refused::from)
        }
        Command::Query { handle } => {
            hub.read(|r| r.query(session, handle)).map(Reply::State).map_err(Refused::from)
        }
        Command::QueryLinger { index } => {
            let state = hub.read(|r| r.query_linger(session, index));
            state.map(Reply::State).map_err(Refused::from)
        }
        Command::SetName { handle, name } => {
            done(hub.with(|r, _| r.set_name(session, handle, name)))
        }
        Command::Attach { request, max_metadata } => {
            let attached = hub.with(|r, now| r.attach(session, request, now));
            let reply = |attached| Reply::Attached { attached, max_metadata };
            attached.map(reply).map_err(Refused::from)
        }
        Command::Detach { handle } => done(hub.with(|r, _| r.detach(session, handle))),
        Command::Map { request, segments } => map(hub, vm, request, segments),
        Command::MapWindow(request) => match map_window(hub, vm, request) {
            Ok(Some(mapping)) => Ok(Reply::Mapped(mapping)),
            Ok(None) => return None,
            Err(status) => Err(status.into()),
        },
        Command::Unmap { mapping } => match hub.with(|r, _| r.unmap(session, mapping, vm.token)) {
            Ok(true) => Ok(Reply::Done),
            Ok(false) => return None,
            Err(status) => Err(status.into()),
        },
        Command::PeerInfo { index } => {
            hub.read(|r| r.peer_info(session.peer, index)).map(Reply::Peer).map_err(Refused::from)
        }
        Command::Cancel { handle, cookie } => {
            done(hub.with(|r, _| r.cancel_handle(session, handle, cookie)))
        }
        Command::Begin { handle, sync } => {
            let (token, room) = (vm.token, vm.ring_room);
            match hub.with(|r, now| r.begin_handle(session, handle, sync, (token, room), now)) {
                Ok(Begun::Now(generation)) => begun(hub, session, handle, &sync, generation),
                Ok(Begun::Waits) => return None,
                Err(status) => Err(status.into()),
            }
        }
        Command::Signal { handle, signal } => {
            let reached = hub.with(|r, _| r.signal_handle(session, handle, signal));
            reached.map(|reached| Reply::Point { reached }).map_err(Refused::from)
        }
        Command::Wait { handle, wait } => {
            let (token, room) = (vm.token, vm.ring_room);
            match hub.with(|r, now| r.wait_handle(session, handle, wait, (token, room), now)) {
                Ok(Begun::Now(reached)) => Ok(Reply::Point { reached }),
                Ok(Begun::Waits) => return None,
                Err(status) => Err(status.into()),
            }
        }
        Command::End { handle, sync } => hub
            .with(|r, _| r.end_handle(session, handle, sync))
            .and_then(|ended| hub.finish_end(ended))
            .map(|generation| Reply::Synced { generation })
            .map_err(Refused::from),
    })
}

/// The reply to a BEGIN that was granted, after what it copies.
pub fn begun(
    hub: &Hub,
    session: SessionId,
    handle: HandleId,
    sync: &SyncRequest,
    generation: u64,
) -> Result<Reply, Refused> {
    if let Some((ticket, copy)) = hub.with(|r, _| r.fill(session, handle, sync))? {
        hub.carry_out(ticket, copy)?;
    }
    Ok(Reply::Synced { generation })
}

fn map(
    hub: &Hub,
    vm: Context<'_>,
    request: MapRequest,
    segments: &[Segment],
) -> Result<Reply, Refused> {
    let misaligned = match memory::check_shape(segments, request.len) {
        Ok(()) => false,
        Err(Refusal::Misaligned(_)) => true,
        Err(refusal) => return Err(refused(refusal)),
    };
    let ticket = hub.with(|r, _| r.begin_map(vm.session, request, misaligned))?;
    let found = vm.map.translate(segments, hub.dmabufs.max_segments(), vm.unsealed_ram);
    let (found, refusal) = match found {
        Ok((pages, _)) => (Ok(Backing::of_pages(pages).into()), None),
        Err(refusal) => (Err(refusal.status().0), Some(refused(refusal))),
    };
    let entered = hub.with(|r, _| r.finish_map(ticket, found));
    entered.map(Reply::Mapped).map_err(|status| refusal.unwrap_or(status.into()))
}

/// Asks for a place in the window; the VMM's answer ends it. Nobody is asked for what is seen already.
fn map_window(
    hub: &Hub,
    vm: Context<'_>,
    request: WindowRequest,
) -> Result<Option<MappingId>, Status> {
    if let Some(mapping) = hub.with(|r, _| r.ride(vm.session, request))? {
        return Ok(Some(mapping));
    }
    let (ticket, shared) = hub.read(|r| r.begin_window(vm.session, request))?;
    let memory = match shared {
        Some(memory) => Ok(memory),
        None => hub.dmabufs.make_private(request.range.len).map(Arc::new),
    };
    let found = memory.and_then(|memory| {
        let file = memory.file_id().ok_or(Status::Io)?;
        Ok((memory, file))
    });
    hub.with(|r, _| r.finish_window(ticket, found, vm.token)).map(|()| None)
}

fn export(hub: &Hub, vm: Context<'_>, request: Export<'_>) -> Result<Reply, Refused> {
    let Export { what, segments, pool, zero_copy } = request;
    let size = what.size;
    let name = String::from_utf8_lossy(&what.name).trim_end_matches('\0').to_owned();
    let too_big =
        what.metadata.len() > MAX_METADATA as usize || size > hub.max_buffer_size(vm.session);
    let part = match pool {
        Some(pool) => Some(Part { pool, offset: part_offset(segments, size)? }),
        None => {
            memory::check_shape(segments, size).map_err(refused)?;
            None
        }
    };
    let (ticket, parent) = hub.with(|r, _| r.begin_export(vm.session, what, part, too_big))?;
    let made = pages(hub, vm, segments, part, parent.as_deref(), size)
        .and_then(|(pages, sealed)| {
            let allowed = hub.policy.allows(vm.session.peer, PeerId::HOST) != Allowed::ReadOnly;
            let wish = Wish { may_share: sealed && allowed, must_share: zero_copy };
            hub.dmabufs.make(pages, size, wish, &name).map_err(Refused::from)
        })
        .map(|(backing, mode)| {
            let observable = backing.kind() == crate::dmabuf::FdKind::DmaBuf;
            let (uuid, since) = (Uuid::new_v4(), hub.now());
            Exported { backing: backing.into(), mode, uuid, observable, shows: true, since }
        });
    drop(parent);
    let (made, refusal) = match made {
        Ok(made) => (Ok(made), None),
        Err(refusal) => (Err(refusal.status), Some(refusal)),
    };
    let entered = hub.with(|r, _| r.finish_export(ticket, made));
    match (entered, refusal) {
        (_, Some(refusal)) => Err(refusal),
        (Err(status), None) => Err(status.into()),
        (Ok((handle, uuid, mode)), None) => Ok(Reply::Exported { handle, uuid, mode }),
    }
}

/// The one segment of an EXPORT with F_PART: an offset in the pool.
fn part_offset(segments: &[Segment], size: u64) -> Result<u64, Refused> {
    match segments {
        [one] if one.len.get() == size => Ok(one.addr.get()),
        _ => Err(Status::Inval.into()),
    }
}

/// The file segments of an export, and whether they are sealed.
fn pages(
    hub: &Hub,
    vm: Context<'_>,
    segments: &[Segment],
    part: Option<Part>,
    parent: Option<&crate::dmabuf::Backing>,
    size: u64,
) -> Result<(Vec<FileSegment>, bool), Refused> {
    let (Some(part), Some(parent)) = (part, parent) else {
        let max = hub.dmabufs.max_segments();
        return vm.map.translate(segments, max, vm.unsealed_ram).map_err(refused);
    };
    let pages = parent.part(part.offset, size).map_err(|error| {
        log::debug!("part of a pool: {error}");
        Refused::from(Status::Range)
    })?;
    Ok((pages, parent.mode() == Mode::ZeroCopy))
}

fn refused(refusal: Refusal) -> Refused {
    log::debug!("memory refused: {refusal}");
    let (status, detail) = refusal.status();
    Refused { status, detail }
}
