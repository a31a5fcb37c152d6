//! Every byte string gets a command or a status.

use super::*;
use proptest::prelude::*;
use zerocopy::IntoBytes;

const ALL: u64 = u64::MAX;

fn parse(bytes: &[u8], queue: u16) -> Result<Command<'_>, Status> {
    let readable = bytes.len() as u64;
    Raw { bytes, readable, room: 4096, queue, features: ALL }.parse()
}

fn export() -> wire::Export {
    wire::Export {
        hdr: wire::Req { kind: Opcode::Export.to_wire().into(), ..Default::default() },
        size: 4096.into(),
        access: 1.into(),
        nr_segments: 1.into(),
        ..Default::default()
    }
}

fn bytes_of(export: &wire::Export, segments: usize, metadata: &[u8]) -> Vec<u8> {
    let segment = Segment { addr: 0.into(), len: 4096.into() };
    let mut bytes = export.as_bytes().to_vec();
    for _ in 0..segments {
        bytes.extend_from_slice(segment.as_bytes());
    }
    bytes.extend_from_slice(metadata);
    bytes
}

#[test]
fn all_opcodes_get_an_answer_on_every_queue() {
    for kind in 0..=u16::MAX {
        let mut bytes = [0u8; 256];
        bytes[..2].copy_from_slice(&kind.to_le_bytes());
        // Without it MAP needs a feature that is not offered.
        bytes[2] = u8::from(kind == Opcode::Map.to_wire());
        for queue in [vq::CONTROL, vq::SYNC] {
            let known = Opcode::from_wire(kind).and_then(response_len).is_some();
            let mine = (kind & 0xff00 == 0x0400) == (queue == vq::SYNC);
            let unsupported = parse(&bytes, queue) == Err(Status::Unsupp);
            assert_eq!(unsupported, !(known && mine), "{kind:#06x} on queue {queue}");
        }
    }
}

#[test]
fn an_export_needs_all_its_bytes() {
    let good = bytes_of(&export(), 1, &[]);
    assert!(matches!(parse(&good, vq::CONTROL), Ok(Command::Export(_))));
    for len in 8..good.len() {
        assert_eq!(parse(&good[..len], vq::CONTROL), Err(Status::Inval), "{len} bytes");
    }
    let req = wire::Export { metadata_type: u32::MAX.into(), metadata_len: 12.into(), ..export() };
    assert_eq!(parse(&bytes_of(&req, 1, &[0; 12]), vq::CONTROL), Err(Status::Inval), "no padding");
    assert!(parse(&bytes_of(&req, 1, &[0; 16]), vq::CONTROL).is_ok());
    let short =
        Raw { bytes: &good, readable: good.len() as u64, room: 39, queue: 0, features: ALL };
    assert_eq!(short.parse(), Err(Status::Inval), "no room for the response");
}

#[test]
fn segments_at_the_copying_limit_and_one_past_it() {
    let count = MAX_RAW_SEGMENTS;
    let at = wire::Export { nr_segments: count.into(), ..export() };
    assert!(matches!(
        parse(&bytes_of(&at, count as usize, &[]), vq::CONTROL),
        Ok(Command::Export(found)) if found.segments.len() == count as usize
    ));
    let past = wire::Export { nr_segments: (count + 1).into(), ..export() };
    let bytes = bytes_of(&past, count as usize + 1, &[]);
    assert_eq!(parse(&bytes, vq::CONTROL), Err(Status::TooMany));
}

#[test]
fn names_are_utf8_and_padded() {
    let named = |name: &[u8]| {
        let mut req = export();
        req.name[..name.len()].copy_from_slice(name);
        parse(&bytes_of(&req, 1, &[]), vq::CONTROL).map(drop)
    };
    assert!(named("frame ✓".as_bytes()).is_ok());
    assert!(named(&[b'x'; 32]).is_ok());
    assert_eq!(named(b"a\0b"), Err(Status::Inval));
    assert_eq!(named(&[0xff]), Err(Status::Inval));
}

#[test]
fn images_have_planes_inside_the_buffer() {
    let image = |nr_planes: u32, offset: u64| {
        let mut image = wire::Image { nr_planes: nr_planes.into(), ..Default::default() };
        image.planes[0].offset = offset.into();
        let req = wire::Export { metadata_type: 1.into(), metadata_len: 88.into(), ..export() };
        parse(&bytes_of(&req, 1, image.as_bytes()), vq::CONTROL).map(drop)
    };
    assert!(image(1, 4095).is_ok());
    for (planes, offset) in [(0, 0), (5, 0), (u32::MAX, 0), (1, 4096)] {
        assert_eq!(image(planes, offset), Err(Status::Inval), "{planes} planes at {offset}");
    }
}

#[test]
fn unknown_flags_and_reserved_fields_are_refused() {
    let mut query = wire::Handle::default();
    query.hdr.kind = Opcode::Query.to_wire().into();
    query.hdr.flags = 1.into();
    assert_eq!(parse(query.as_bytes(), vq::CONTROL), Err(Status::Inval));
    query.hdr.flags = 0.into();
    query.hdr.cookie = 1.into();
    assert_eq!(parse(query.as_bytes(), vq::CONTROL), Err(Status::Inval));
    let mut later = export();
    later.hdr.flags = flag::EXPORT_OBJECT.into();
    assert_eq!(parse(&bytes_of(&later, 1, &[]), vq::CONTROL), Err(Status::Unsupp));
}

#[test]
fn peers_need_their_feature() {
    let mut req = wire::PeerInfo::default();
    req.hdr.kind = Opcode::PeerInfo.to_wire().into();
    let raw = Raw { bytes: req.as_bytes(), readable: 16, room: 88, queue: 0, features: 0 };
    assert_eq!(raw.parse(), Err(Status::Unsupp));
    let features = 1 << feature::PEERS;
    assert_eq!(Raw { features, ..raw }.parse(), Ok(Command::PeerInfo { index: 0 }));
}

proptest! {
    #[test]
    fn no_bytes_are_too_strange(
        kind in prop::sample::select(Opcode::ALL),
        tail in prop::collection::vec(any::<u8>(), 0..300),
        readable in 0u64..1 << 40,
        room in 0u64..200,
        queue in 0u16..3,
        features: u64,
    ) {
        let mut bytes = kind.to_wire().to_le_bytes().to_vec();
        bytes.extend(tail);
        let readable = readable.max(bytes.len() as u64);
        let _ = Raw { bytes: &bytes, readable, room, queue, features }.parse();
    }
}
