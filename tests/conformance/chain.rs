//! What becomes of a chain: the rules of the ring, lengths, unknown values, and the order of statuses.

use super::*;
use bufshare::protocol::{self as wire, Opcode, RespState, flag, vq};
use zerocopy::IntoBytes;

const STATE: u32 = size_of::<RespState>() as u32;

fn query(handle: u64) -> Vec<u8> {
    handle_request(Opcode::Query, 0, handle)
}

/// Offers raw descriptors and waits for the used entry.
fn raw(guest: &mut Guest, descs: &[Desc], head: u16) -> Used {
    let ring = guest.control_ring();
    for (i, desc) in descs.iter().enumerate() {
        ring.write_desc(i as u16, *desc);
    }
    ring.offer(head);
    ring.kick();
    ring.wait_used(SOON).expect("every chain comes back")
}

/// [dev-chain-1]
#[test]
fn chains_that_break_the_ring_come_back_empty() {
    let mut bed = bed();
    let buffer = bed.exported(1);
    let guest = &mut bed.guest;
    let request = guest.control_ring().buffer(64);
    guest.memory.write(request, &query(buffer.handle));
    let answer = guest.control_ring().buffer(64);
    let table = guest.control_ring().buffer(64);
    let read = Desc { addr: request, len: 16, flags: NEXT, next: 1 };
    let write = Desc { addr: answer, len: STATE, flags: WRITE, next: 0 };
    let nested = Desc { addr: table, len: 16, flags: INDIRECT, next: 0 };
    guest.memory.write(table, &nested.bytes());
    let cases: [(&str, &[Desc]); 7] = [
        ("a loop", &[read, Desc { flags: NEXT | WRITE, next: 1, ..write }]),
        ("next outside the table", &[Desc { next: 9999, ..read }]),
        ("readable behind writable", &[Desc { flags: NEXT | WRITE, next: 1, ..write }, read]),
        ("an indirect table in an indirect table", &[nested]),
        ("an indirect table of odd length", &[Desc { len: 17, ..nested }]),
        ("an indirect table outside memory", &[Desc { addr: 1 << 50, ..nested }]),
        ("a request outside memory", &[Desc { addr: 1 << 50, ..read }, write]),
    ];
    for (what, descs) in cases {
        let used = raw(guest, descs, 0);
        assert_eq!(used, Used { id: 0, len: 0 }, "{what}");
    }
    let used = raw(guest, &[read, Desc { addr: 1 << 50, ..write }], 0);
    assert_eq!(used, Used { id: 0, len: 0 }, "a response outside memory");
    let used = raw(guest, &[read, write], 0);
    assert_eq!(used, Used { id: 0, len: STATE }, "the ring lives");
}

/// [dev-chain-2] [dev-chain-6] [dev-chain-10] [dev-chain-11] [dev-chain-12]
#[test]
fn the_room_for_the_answer_decides() {
    let mut bed = bed();
    let buffer = bed.exported(1);
    let guest = &mut bed.guest;
    for room in 0..8 {
        let parts: &[u32] = if room == 0 { &[] } else { &[room] };
        let answer = guest.raw(vq::CONTROL, &[&query(buffer.handle)], parts);
        assert_eq!(answer.len, 0, "{room} bytes");
        assert!(answer.bytes.iter().all(|byte| *byte == 0xee), "untouched");
    }
    for room in 8..STATE {
        let answer = guest.raw(vq::CONTROL, &[&query(buffer.handle)], &[room]);
        parse::<RespState>(answer.written()).refused(Status::Inval);
        assert!(answer.bytes[8..].iter().all(|byte| *byte == 0xee), "untouched");
    }
    let answer = guest.raw(vq::CONTROL, &[&query(buffer.handle)], &[STATE + 100]);
    assert_eq!(answer.len, STATE);
    assert!(answer.bytes[STATE as usize..].iter().all(|byte| *byte == 0xee), "untouched");
}

/// [dev-chain-6] A request whose answer would not fit has no effect.
#[test]
fn nothing_is_exported_without_room_for_the_answer() {
    let mut bed = bed_with("name=a,max-exports=1");
    let addr = bed.guest.pages(1);
    let request = Export { segments: vec![(addr, PAGE)], ..Default::default() };
    for room in [0, 7, 8, 39] {
        bed.guest.raw(vq::CONTROL, &[&request.bytes()], &[room]);
    }
    bed.guest.export(request).expect("the only place is free");
}

/// [dev-chain-3] [dev-chain-5]
#[test]
fn short_requests_are_malformed() {
    let mut bed = bed();
    let buffer = bed.exported(1);
    let guest = &mut bed.guest;
    for len in 0..16 {
        let parts: &[&[u8]] = if len == 0 { &[] } else { &[&query(buffer.handle)[..len]] };
        let answer = guest.raw(vq::CONTROL, parts, &[STATE]);
        parse::<RespState>(answer.written()).refused(Status::Inval);
    }
    let addr = guest.pages(2);
    let (segments, metadata) = (vec![(addr, PAGE), (addr + PAGE, PAGE)], vec![1; 12]);
    let metadata_type = wire::metadata::PRIVATE;
    let whole = Export { segments, metadata, metadata_type, ..Default::default() }.bytes();
    assert_eq!(whole.len(), 80 + 32 + 16);
    for len in [8, 79, 80, 80 + 31, 80 + 32, whole.len() - 1] {
        let answer = guest.raw(vq::CONTROL, &[&whole[..len]], &[40]);
        parse::<wire::RespExport>(answer.written()).refused(Status::Inval);
    }
    let answer = guest.raw(vq::CONTROL, &[&whole], &[40]);
    parse::<wire::RespExport>(answer.written()).expect("the whole request");
}

/// [dev-chain-4]
#[test]
fn unknown_types_and_wrong_queues_are_unsupported() {
    let Bed { daemon: _daemon, mut guest } = bed();
    let known = [Opcode::Export, Opcode::Grant, Opcode::Release, Opcode::Query, Opcode::SetName];
    for kind in [0, 1, 0xff, 0x0106, 0x01ff, 0x0302, 0x0403, 0x1000, 0x12ff, 0x2000, 0xffff] {
        assert!(known.iter().all(|op| op.to_wire() != kind));
        let request = wire::Req { kind: kind.into(), ..Default::default() };
        for queue in [vq::CONTROL, vq::SYNC] {
            let answer = guest.raw(queue, &[request.as_bytes()], &[64]);
            parse::<[u8; 64]>(answer.written()).refused(Status::Unsupp);
        }
    }
    for op in known {
        let mut request = header(op, 0).as_bytes().to_vec();
        request.resize(128, 0);
        let answer = guest.raw(vq::SYNC, &[&request], &[64]);
        parse::<[u8; 64]>(answer.written()).refused(Status::Unsupp);
    }
    let answer = guest.raw(vq::CONTROL, &[&Sync::default().bytes()], &[64]);
    parse::<[u8; 64]>(answer.written()).refused(Status::Unsupp);
}

/// [dev-chain-7]
#[test]
fn unknown_flags_and_reserved_fields_are_malformed() {
    let mut bed = bed();
    let buffer = bed.exported(1);
    let h = buffer.handle;
    let export = Export { segments: vec![(buffer.addr, PAGE)], ..Default::default() };
    let set_name = wire::SetName { hdr: header(Opcode::SetName, 0), ..Default::default() };
    let cancel = wire::Cancel { hdr: header(Opcode::Cancel, 0), ..Default::default() };
    let peer_info = wire::PeerInfo { hdr: header(Opcode::PeerInfo, 0), ..Default::default() };
    let grant = Grant { handle: h, ..Default::default() };
    // Queue, request, flags that are defined, offset of a reserved field.
    let cases: [(u16, Vec<u8>, u16, Option<usize>); 9] = [
        (vq::CONTROL, export.bytes(), 0b1111, None),
        (vq::CONTROL, grant.bytes(), 0b11, None),
        (vq::CONTROL, handle_request(Opcode::Release, 0, h), 0b1, None),
        (vq::CONTROL, query(h), 0, None),
        (vq::CONTROL, handle_request(Opcode::QueryLinger, 0, 0), 0, None),
        (vq::CONTROL, set_name.as_bytes().to_vec(), 0, None),
        (vq::CONTROL, cancel.as_bytes().to_vec(), 0, Some(20)),
        (vq::CONTROL, peer_info.as_bytes().to_vec(), 0, Some(12)),
        (vq::SYNC, sync(&buffer, flag::SYNC_READ).bytes(), 0b1111, None),
    ];
    for (queue, request, defined, reserved) in cases {
        let mut check = |bytes: Vec<u8>| {
            let answer = bed.guest.raw(queue, &[&bytes], &[128]);
            parse::<[u8; 128]>(answer.written()).refused(Status::Inval);
        };
        for bit in (0..16).filter(|bit| defined & (1 << bit) == 0) {
            let mut bytes = request.clone();
            bytes[2 + bit / 8] |= 1 << (bit % 8);
            check(bytes);
        }
        if queue == vq::CONTROL {
            let mut bytes = request.clone();
            bytes[4] = 1; // the cookie is reserved here
            check(bytes);
        }
        if let Some(at) = reserved {
            let mut bytes = request.clone();
            bytes[at] = 1;
            check(bytes);
        }
    }
}

/// [dev-chain-8] A guest that rewrites its request while the device reads it gets one consistent
/// answer: each export has either the old name and size or the new ones.
#[test]
fn a_request_is_judged_as_it_was_copied() {
    let mut bed = bed();
    let first = bed.guest.pages(1);
    let one = Export { segments: vec![(first, PAGE)], ..Default::default() };
    let torn = Export { nr_segments: Some(u32::MAX), ..one.clone() };
    let memory = bed.guest.memory.clone();
    let (one, torn) = (one.bytes(), torn.bytes());
    let ring = bed.guest.control_ring();
    for _ in 0..300 {
        let head = ring.prepare(&[&one], &[40]).expect("free");
        // The request is the first buffer that the ring handed out: find it by its descriptor.
        let at = memory.read(ring.desc_at() + u64::from(head) * 16, 8);
        let at = u64::from_le_bytes(at.try_into().expect("8 bytes"));
        ring.offer(head);
        ring.kick();
        let mut answer = None;
        while answer.is_none() {
            memory.write(at, &torn);
            memory.write(at, &one);
            answer = ring.pop_used();
        }
        let answer = ring.settle(answer.expect("just seen"));
        match parse::<wire::RespExport>(answer.written()) {
            Ok(export) => {
                let release = handle_request(Opcode::Release, 0, export.handle.get());
                ring.submit(&[&release], &[STATE]).expect("free");
                let answer = ring.wait(SOON).expect("an answer");
                let state = parse::<RespState>(answer.written()).expect("RELEASE");
                assert_eq!(state.size.get(), PAGE);
            }
            Err(refusal) => assert_eq!(refusal.status, Status::Inval),
        }
    }
}

/// [dev-chain-9] [dev-chain-16]
#[test]
fn the_division_into_descriptors_does_not_matter() {
    let mut bed = bed();
    let buffer = bed.exported(1);
    let guest = &mut bed.guest;
    let request = query(buffer.handle);
    let expected = guest.raw(vq::CONTROL, &[&request], &[STATE]);
    let ones: Vec<&[u8]> = request.chunks(1).collect();
    let odd: Vec<&[u8]> = request.chunks(3).collect();
    let mut extra = request.clone();
    extra.resize(5000, 0xff);
    let rooms: [&[u32]; 4] = [&[STATE], &[1; STATE as usize], &[7; 8], &[8, 0, 48]];
    for parts in [ones, odd, vec![&request, &[]], vec![&[], &request], vec![&extra]] {
        for room in rooms {
            let answer = guest.raw(vq::CONTROL, &parts, room);
            assert_eq!(answer.written(), expected.written(), "{} parts, {room:?}", parts.len());
        }
    }
    if guest.features & F_INDIRECT == 0 {
        return;
    }
    let from = guest.control_ring().buffer(64);
    let to = guest.control_ring().buffer(64);
    let table = guest.control_ring().buffer(32);
    guest.memory.write(from, &request);
    let descs = [
        Desc { addr: from, len: 16, flags: NEXT, next: 1 },
        Desc { addr: to, len: STATE, flags: WRITE, next: 0 },
    ];
    guest.memory.write(table, &descs.map(Desc::bytes).concat());
    let used = raw(guest, &[Desc { addr: table, len: 32, flags: INDIRECT, next: 0 }], 0);
    assert_eq!(used.len, STATE);
    assert_eq!(guest.memory.read(to, STATE as usize), expected.written());
}

/// [dev-chain-13] Checked by `parse` for every answer of every test; here once by hand.
#[test]
fn detail_belongs_to_fault() {
    let Bed { daemon: _daemon, mut guest } = bed();
    let answer = guest.raw(vq::CONTROL, &[&query(77)], &[STATE]);
    assert_eq!(answer.written(), [3, 0, 0, 0, 0, 0, 0, 0]);
}

/// [dev-chain-14]
#[test]
fn a_refused_request_changes_nothing() {
    let mut bed = bed();
    let buffer = bed.exported(2);
    let before = bed.guest.query(buffer.handle).expect("QUERY");
    let handle = buffer.handle;
    let guest = &mut bed.guest;
    guest.grant(Grant { handle, access: 0xff, ..Default::default() }).refused(Status::Inval);
    guest.grant(Grant { handle, peer_id: 4711, ..Default::default() }).refused(Status::NoEnt);
    guest.set_name(handle, [0xff; 32]).refused(Status::Inval);
    let write = flag::SYNC_END | flag::SYNC_WRITE;
    guest.end(Sync { len: 3 * PAGE, ..sync(&buffer, write) }).refused(Status::Range);
    guest.end(sync(&buffer, 0)).refused(Status::Inval);
    let mut release = handle_request(Opcode::Release, 0, handle);
    release[4] = 1;
    let answer = guest.raw(vq::CONTROL, &[&release], &[STATE]);
    parse::<RespState>(answer.written()).refused(Status::Inval);
    assert_eq!(guest.query(handle), Ok(before));
    assert_eq!(bed.client().list().expect("LIST"), [], "nothing was offered");
}

/// [dev-chain-15]
#[test]
fn a_broken_chain_harms_no_other() {
    let daemon = Daemon::start(&["a", "b"]);
    let mut a = Guest::connect(&daemon, "a");
    let mut b = Guest::connect(&daemon, "b");
    for _ in 0..50 {
        let looping = Desc { addr: BASE, len: 8, flags: NEXT, next: 0 };
        assert_eq!(raw(&mut a, &[looping], 0).len, 0);
        b.export_pages(1);
    }
    a.export_pages(1);
}

/// [dev-ladder-1] Neighbours in the list of statuses.
#[test]
fn the_first_status_of_the_list_wins() {
    let mut bed = bed_with("name=a,max-exports=2,max-bytes=65536");
    let export = |bed: &mut Bed, request: Export| bed.guest.export(request);
    let addr = bed.guest.pages(64);
    let read = wire::access::READ;
    let request = Export { segments: vec![(addr, PAGE)], access: read, ..Default::default() };
    let pool = export(&mut bed, request).expect("EXPORT");
    let part = |offset, access| Export {
        flags: flag::EXPORT_PART,
        segments: vec![(offset, PAGE)],
        object: pool.uuid,
        access,
        ..Default::default()
    };
    // UNSUPP before INVAL.
    let mut bytes = vec![0xff; 16];
    bytes[..2].copy_from_slice(&0x7777u16.to_le_bytes());
    let answer = bed.guest.raw(vq::CONTROL, &[&bytes], &[STATE]);
    parse::<RespState>(answer.written()).refused(Status::Unsupp);
    // INVAL before NOENT.
    bed.guest
        .grant(Grant { handle: 77, access: 0xff, ..Default::default() })
        .refused(Status::Inval);
    bed.guest.begin(Sync { handle: 77, ..Default::default() }).refused(Status::Inval);
    // NOENT before ACCESS and RANGE.
    let wide = part(0x10_0000, READ_WRITE);
    export(&mut bed, Export { object: [7; 16], ..wide.clone() }).refused(Status::NoEnt);
    let far = Sync { handle: 77, offset: u64::MAX, flags: flag::SYNC_READ, ..Default::default() };
    bed.guest.begin(far).refused(Status::NoEnt);
    // ACCESS before RANGE.
    export(&mut bed, wide).refused(Status::Access);
    // RANGE before QUOTA.
    let big = Export { segments: vec![(addr + 1, 1 << 20)], ..Default::default() };
    export(&mut bed, big).refused(Status::Range);
    // QUOTA before FAULT.
    let nowhere = Export { segments: vec![(1 << 50, 1 << 20)], ..Default::default() };
    export(&mut bed, nowhere).refused(Status::Quota);
}
