//! What a client asks to know: LIST, QUERY, STATS, PEERS, and the record of a buffer.
//!
//! It changes nothing.

use uuid::Uuid;
use zerocopy::IntoBytes;

use super::request::{Answer, People, Refusal, ok};
use super::wire::{self, MAX_PACKET};
use crate::hub::Hub;
use crate::protocol::{NAME_LEN, Status};
use crate::registry::BufferInfo;

/// LIST.
pub fn list(request: &wire::List, hub: &Hub) -> Result<Answer, Refusal> {
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

/// QUERY.
pub fn query(request: &wire::Query, hub: &Hub, people: &People) -> Result<Answer, Refusal> {
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

/// STATS.
pub fn stats(request: &wire::Stats, hub: &Hub) -> Result<Answer, Refusal> {
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

/// PEERS.
pub fn peers(request: &wire::Peers, hub: &Hub) -> Result<Answer, Refusal> {
    if request.reserved.get() != 0 {
        return Err(Status::Inval.into());
    }
    let room = (MAX_PACKET - size_of::<wire::RespPeers>()) / size_of::<wire::Peer>();
    let (page, all) = hub.read(|registry| registry.host_peers(request.first.get(), room));
    let (count, nr_peers) = ((page.len() as u32).into(), all.into());
    let mut bytes = wire::RespPeers { hdr: ok(&request.hdr), count, nr_peers }.as_bytes().to_vec();
    for (peer, access) in page {
        let flags = if peer.online { wire::flag::PEER_ONLINE } else { 0 };
        let peer = wire::Peer {
            peer_id: peer.peer.0.into(),
            flags: flags.into(),
            access: access.bits().into(),
            name: wire::pad_text(&peer.name),
            ..Default::default()
        };
        bytes.extend_from_slice(peer.as_bytes());
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
