//! Outcomes → bytes of a response or event (spec "Device operation", "Events").
//!
//! It knows layouts, not where the bytes go.

use zerocopy::IntoBytes;

use crate::ids::PeerId;
use crate::protocol::{self as wire, Mode, Opcode, PEER_NAME_LEN, Status, cache, peer};
use crate::registry::{Attached, Event, EventKind, HandleState, PeerView};
use crate::{ids::HandleId, ids::MappingId, metrics::Metrics};
use uuid::Uuid;

/// A request that did what it says.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Reply {
    Done,
    Exported { handle: HandleId, uuid: Uuid, mode: Mode },
    State(HandleState),
    Attached { attached: Attached, max_metadata: u32 },
    Mapped(MappingId),
    Peer(PeerView),
    Synced { generation: u64 },
    Point { reached: u64 },
}

/// A request that was refused and changed nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refused {
    /// Why.
    pub status: Status,
    /// FAULT: index of the segment.
    pub detail: u32,
}

impl From<Status> for Refused {
    fn from(status: Status) -> Refused {
        Refused { status, detail: 0 }
    }
}

/// The bytes of a response to a request of this type; counted.
pub fn response(
    outcome: &Result<Reply, Refused>,
    opcode: Option<Opcode>,
    metrics: &Metrics,
) -> Vec<u8> {
    let hdr = wire::Resp::default();
    let refused = match outcome {
        Ok(_) => Refused { status: Status::Ok, detail: 0 },
        Err(refused) => *refused,
    };
    metrics.answered(opcode, refused.status);
    match outcome {
        Err(Refused { status, detail }) => {
            wire::Resp { status: status.to_wire().into(), detail: (*detail).into(), ..hdr }
                .as_bytes()
                .to_vec()
        }
        Ok(Reply::Done) => hdr.as_bytes().to_vec(),
        Ok(Reply::Exported { handle, uuid, mode }) => wire::RespExport {
            hdr,
            handle: handle.0.into(),
            uuid: *uuid.as_bytes(),
            mode: mode.to_wire().into(),
            reserved: 0.into(),
        }
        .as_bytes()
        .to_vec(),
        Ok(Reply::State(state)) => wire::RespState {
            hdr,
            state: state.state.to_wire().into(),
            use_count: state.use_count.into(),
            nr_mappings: state.nr_mappings.into(),
            access: state.access.bits().into(),
            size: state.size.into(),
            generation: state.generation.into(),
            uuid: *state.uuid.as_bytes(),
        }
        .as_bytes()
        .to_vec(),
        Ok(Reply::Attached { attached, max_metadata }) => attach(hdr, attached, *max_metadata),
        Ok(Reply::Mapped(mapping)) => wire::RespMap {
            hdr,
            mapping: mapping.0.into(),
            cache: cache::CACHED.into(),
            reserved: 0.into(),
        }
        .as_bytes()
        .to_vec(),
        Ok(Reply::Peer(view)) => peer_info(hdr, view).as_bytes().to_vec(),
        Ok(Reply::Point { reached }) => {
            wire::RespPoint { hdr, reached: (*reached).into() }.as_bytes().to_vec()
        }
        Ok(Reply::Synced { generation }) => {
            wire::RespSync { hdr, generation: (*generation).into() }.as_bytes().to_vec()
        }
    }
}

fn attach(hdr: wire::Resp, attached: &Attached, max_metadata: u32) -> Vec<u8> {
    let fixed = wire::RespAttach {
        hdr,
        handle: attached.handle.0.into(),
        size: attached.size.into(),
        generation: attached.generation.into(),
        access: attached.access.bits().into(),
        exporter: attached.exporter.0.into(),
        mode: attached.mode.to_wire().into(),
        metadata_type: attached.metadata_type.into(),
        metadata_len: u32::try_from(attached.metadata.len()).unwrap_or(u32::MAX).into(),
        reserved: 0.into(),
        name: attached.name,
    };
    let mut bytes = fixed.as_bytes().to_vec();
    let room = usize::try_from(max_metadata).unwrap_or(usize::MAX);
    bytes.extend(attached.metadata.iter().take(room));
    bytes
}

fn peer_info(hdr: wire::Resp, view: &PeerView) -> wire::RespPeerInfo {
    let mut name = [0; PEER_NAME_LEN];
    for (to, from) in name.iter_mut().zip(view.name.as_bytes()) {
        *to = *from;
    }
    wire::RespPeerInfo {
        hdr,
        nr_peers: view.nr_peers.into(),
        peer_id: view.peer.0.into(),
        flags: (u32::from(view.online) * peer::F_ONLINE + u32::from(view.window) * peer::F_WINDOW)
            .into(),
        epoch: view.epoch.into(),
        name,
    }
}

/// The bytes of an event.
pub fn event(event: &Event) -> wire::Event {
    let kind = match event.kind {
        EventKind::Released => Opcode::EvtReleased,
        EventKind::Idle => Opcode::EvtIdle,
        EventKind::Busy => Opcode::EvtBusy,
        EventKind::Offered => Opcode::EvtOffered,
        EventKind::Withdrawn => Opcode::EvtWithdrawn,
        EventKind::Revoked => Opcode::EvtRevoked,
        EventKind::Changed => Opcode::EvtChanged,
        EventKind::Peer => Opcode::EvtPeer,
        EventKind::Resync => Opcode::EvtResync,
    };
    let reason = if event.kind == EventKind::Revoked { Status::Revoked } else { Status::Ok };
    wire::Event {
        kind: kind.to_wire().into(),
        status: u32::from(reason.to_wire()).into(),
        handle: event.handle.map_or(0, |handle| handle.0).into(),
        uuid: event.uuid.map_or([0; 16], Uuid::into_bytes),
        peer_id: event.peer.unwrap_or(PeerId(peer::NONE)).0.into(),
        access: event.access.bits().into(),
        size: event.size.into(),
        generation: event.generation.into(),
        metadata_type: event.metadata_type.into(),
        epoch: event.epoch.into(),
        ..Default::default()
    }
}
