//! ATTACH and DETACH.

use super::*;
use bufshare::protocol::{RespAttach, State, access, metadata, peer, vq};

fn request(buffer: &Buffer) -> Attach {
    Attach { uuid: buffer.uuid, ..Default::default() }
}

fn state(guest: &mut Guest, handle: u64) -> Option<State> {
    State::from_wire(guest.query(handle).expect("QUERY").state.get())
}

/// [dev-attach-1] [dev-handle-4] [dev-grant-6]
#[test]
fn unknown_ungranted_and_forbidden_look_alike() {
    let mut pair = pair();
    let ungranted = pair.exported(1);
    let granted = pair.granted(1);
    let mut c = quiet().connect(&pair.daemon, "c");
    let grant = Grant { handle: granted.handle, peer_id: peer::ANY, ..Default::default() };
    pair.a.grant(grant).expect("GRANT to whom policy allows");
    let refused = [
        pair.b.attach(Attach { uuid: [7; 16], ..Default::default() }),
        pair.b.attach(request(&ungranted)),
        pair.a.attach(request(&granted)),
        c.attach(request(&granted)),
        c.attach(Attach { uuid: [7; 16], ..Default::default() }),
    ];
    for reply in refused {
        assert_eq!(reply.refused(Status::NoEnt).detail, 0);
    }
    pair.b.attach(request(&granted)).expect("granted and allowed");
    let forbidden = Grant { peer_id: c.config.peer_id.get(), ..grant };
    pair.a.grant(forbidden).refused(Status::NoEnt);
    c.expect_no_event();
}

#[test]
fn attach_tells_the_buffer() {
    let mut pair = pair();
    let addr = pair.a.pages(2);
    let export = Export {
        segments: vec![(addr, 2 * PAGE)],
        name: name("frame"),
        metadata_type: metadata::PRIVATE,
        metadata: b"twelve bytes".to_vec(),
        ..Default::default()
    };
    let export = buffer(&pair.a.export(export).expect("EXPORT"), addr, 2);
    pair.grant(&export, READ_WRITE);
    pair.a.end(sync(&export, flag::SYNC_WRITE)).expect("END");
    for max_metadata in [0, 5, 12, 100] {
        let (told, bytes) =
            pair.b.attach(Attach { max_metadata, ..request(&export) }).expect("ATTACH");
        assert_ne!(told.handle.get(), 0);
        assert_eq!((told.size.get(), told.generation.get()), (2 * PAGE, 1));
        assert_eq!(told.access.get(), READ_WRITE);
        assert_eq!(told.exporter.get(), pair.a.config.peer_id.get());
        assert_eq!(told.mode.get(), Mode::Copy.to_wire());
        assert_eq!((told.metadata_type.get(), told.metadata_len.get()), (metadata::PRIVATE, 12));
        assert_eq!((told.name, told.reserved.get()), (name("frame"), 0));
        assert_eq!(bytes, b"twelve bytes"[..12.min(max_metadata as usize)]);
    }
    let uses = pair.a.query(export.handle).expect("QUERY");
    assert_eq!(uses.use_count.get(), 4, "each attachment counts");
}

/// [dev-chain-6] The driver says how much metadata the response has room for.
#[test]
fn the_response_has_the_room_that_the_driver_says() {
    let mut pair = pair();
    let buffer = pair.granted(1);
    let bytes = Attach { max_metadata: 8, ..request(&buffer) }.bytes();
    for room in [8, 87, 88, 95] {
        let answer = pair.b.raw(vq::CONTROL, &[&bytes], &[room]);
        common::parse::<RespAttach>(answer.written()).refused(Status::Inval);
    }
    let answer = pair.b.raw(vq::CONTROL, &[&bytes], &[96]);
    assert_eq!(answer.len, 88, "there is no metadata");
}

/// [dev-attach-2]
#[test]
fn nobody_attaches_for_more_than_was_granted() {
    let mut pair = pair();
    let buffer = pair.exported(1);
    pair.grant(&buffer, access::READ);
    for access in [access::WRITE, READ_WRITE] {
        pair.b.attach(Attach { access, ..request(&buffer) }).refused(Status::Access);
    }
    for access in [0, 4, u32::MAX] {
        pair.b.attach(Attach { access, ..request(&buffer) }).refused(Status::Inval);
    }
    let (told, _) =
        pair.b.attach(Attach { access: access::READ, ..request(&buffer) }).expect("READ");
    assert_eq!(told.access.get(), access::READ);
}

/// [dev-attach-3]
#[test]
fn who_wants_no_copy_gets_none() {
    let mut pair = pair();
    let buffer = pair.granted(1);
    let flags = flag::ATTACH_ZERO_COPY;
    pair.b.attach(Attach { flags, ..request(&buffer) }).refused(Status::Access);
    assert_eq!(pair.a.query(buffer.handle).expect("QUERY").use_count.get(), 0);
}

/// [dev-attach-4]
#[test]
fn attachments_are_bounded() {
    let mut pair = pair();
    let buffer = pair.granted(1);
    let max = pair.b.config.max_attachments.get();
    let first = pair.attach(&buffer);
    for _ in 1..max {
        pair.attach(&buffer);
    }
    pair.b.attach(request(&buffer)).refused(Status::Quota);
    pair.b.detach(first).expect("DETACH");
    let last = pair.attach(&buffer);
    assert_ne!(last, first, "a handle is not used again");
    pair.revoke(&buffer);
    pair.grant(&buffer, READ_WRITE);
    pair.b.attach(request(&buffer)).refused(Status::Quota);
    pair.b.detach(last).expect("a dead one counts until then");
    pair.attach(&buffer);
}

/// [dev-attach-5]
#[test]
fn guessing_is_slow() {
    let mut pair = pair();
    let buffer = pair.granted(1);
    let unknown = Attach { uuid: [9; 16], ..Default::default() };
    let mut guesses = 0;
    loop {
        let refusal = pair.b.attach(unknown).expect_err("it is refused");
        if refusal.status == Status::Busy {
            break;
        }
        assert_eq!(refusal.status, Status::NoEnt);
        guesses += 1;
        assert!(guesses < 1000, "nobody slows it down");
    }
    assert!(guesses >= 16, "an honest mistake is no attack");
    pair.b.attach(request(&buffer)).refused(Status::Busy);
    pair.a.attach(unknown).refused(Status::NoEnt);
    std::thread::sleep(Duration::from_millis(1100));
    pair.b.attach(request(&buffer)).expect("later");
    assert!(pair.daemon.log().contains("event=denied to=b"), "nobody was told");
}

/// [dev-attach-6] An attachment for reading reads from a copy; what the importer does to that is its own
/// affair.
#[test]
fn a_reader_cannot_write() {
    let mut pair = pair_with(&["--allow", "a:b:ro"]);
    let buffer = pair.exported(1);
    let peer_id = pair.b.config.peer_id.get();
    let grant = Grant { handle: buffer.handle, peer_id, ..Default::default() };
    pair.a.grant(grant).refused(Status::Access);
    pair.a.memory.fill(buffer.addr, PAGE, 1);
    pair.grant(&buffer, access::READ);
    pair.a.end(sync(&buffer, flag::SYNC_WRITE)).expect("END");
    pair.b.attach(request(&buffer)).refused(Status::Access);
    let (told, _) =
        pair.b.attach(Attach { access: access::READ, ..request(&buffer) }).expect("READ");
    let (handle, addr) = (told.handle.get(), pair.b.pages(1));
    let map = |access| Map { handle, access, segments: vec![(addr, PAGE)], ..Default::default() };
    pair.b.map(&map(READ_WRITE)).refused(Status::Access);
    pair.b.map(&map(access::READ)).expect("MAP");
    let held = Buffer { handle, ..buffer };
    pair.b.begin(sync(&held, flag::SYNC_READ)).expect("BEGIN");
    assert_eq!(pair.b.memory.read(addr, 4), [1; 4]);
    pair.b.memory.fill(addr, PAGE, 2);
    pair.b.begin(sync(&held, flag::SYNC_WRITE)).refused(Status::Access);
    pair.b.end(sync(&held, flag::SYNC_WRITE)).refused(Status::Access);
    pair.b.end(sync(&held, flag::SYNC_READ)).expect("END");
    pair.b.detach(handle).refused(Status::Busy);
    assert_eq!(pair.a.memory.read(buffer.addr, 4), [1; 4]);
}

/// [dev-detach-1] [dev-query-2]
#[test]
fn what_is_mapped_is_not_detached() {
    let mut pair = pair();
    let buffer = pair.granted(2);
    let view = pair.view(&buffer);
    let told = pair.b.query(view.handle).expect("QUERY");
    assert_eq!(State::from_wire(told.state.get()), Some(State::Mapped));
    assert_eq!((told.nr_mappings.get(), told.use_count.get()), (1, 0));
    assert_eq!((told.size.get(), told.uuid), (buffer.size, buffer.uuid));
    assert_eq!(told.access.get(), READ_WRITE);
    let uses = pair.a.query(buffer.handle).expect("QUERY");
    assert_eq!((uses.use_count.get(), uses.nr_mappings.get()), (1, 1));
    pair.b.detach(view.handle).refused(Status::Busy);
    pair.b.unmap(view.mapping).expect("UNMAP");
    assert_eq!(state(&mut pair.b, view.handle), Some(State::Attached));
    pair.b.detach(view.handle).expect("DETACH");
    pair.b.query(view.handle).refused(Status::NoEnt);
    pair.b.detach(view.handle).refused(Status::NoEnt);
    assert_eq!(pair.a.query(buffer.handle).expect("QUERY").use_count.get(), 0);
}

/// [dev-detach-2] [dev-grant-9] [dev-map-4] Only QUERY, UNMAP and DETACH are left.
#[test]
fn a_revoked_attachment_is_dead() {
    let mut pair = pair();
    let buffer = pair.granted(1);
    let (one, two) = (pair.view(&buffer), pair.view(&buffer));
    pair.revoke(&buffer);
    for view in [one, two] {
        let held = pair::held(&view, &buffer);
        assert_eq!(state(&mut pair.b, view.handle), Some(State::Revoked));
        pair.b.begin(sync(&held, flag::SYNC_READ)).refused(Status::Revoked);
        pair.b.end(sync(&held, flag::SYNC_READ)).refused(Status::Revoked);
        pair.b.cancel(view.handle, 0).refused(Status::Revoked);
        let segments = vec![(view.addr, PAGE)];
        let map = Map { handle: view.handle, segments, ..Default::default() };
        pair.b.map(&map).refused(Status::Revoked);
    }
    pair.b.unmap(one.mapping).expect("UNMAP");
    pair.b.detach(one.handle).expect("DETACH");
    pair.b.detach(two.handle).expect("DETACH takes the mapping along");
    pair.b.unmap(two.mapping).refused(Status::NoEnt);
    pair.b.attach(request(&buffer)).refused(Status::NoEnt);
    assert!(pair.daemon.log().contains("event=revoke from=a to=b"), "nobody was told");
}

/// [dev-handle-3] Exports are no attachments, and the other way round.
#[test]
fn a_handle_is_one_or_the_other() {
    let mut pair = pair();
    let buffer = pair.granted(1);
    let handle = pair.attach(&buffer);
    let (own, _) = pair.b.export_pages(1);
    assert_ne!(own.handle.get(), handle);
    pair.b.detach(own.handle.get()).refused(Status::NoEnt);
    let segments = vec![(pair.b.pages(1), PAGE)];
    let map = Map { handle: own.handle.get(), segments, ..Default::default() };
    pair.b.map(&map).refused(Status::NoEnt);
    pair.b.grant(Grant { handle, ..Default::default() }).refused(Status::NoEnt);
    pair.b.release(handle).refused(Status::NoEnt);
    pair.b.set_name(handle, name("mine")).refused(Status::NoEnt);
    pair.a.detach(handle + 100).refused(Status::NoEnt);
    pair.b.unmap(1).refused(Status::NoEnt);
}

/// [dev-release-1] [dev-release-3] [dev-release-7] A copy does not hold the exporter's pages.
#[test]
fn release_does_not_wait_for_copies() {
    for force in [false, true] {
        let mut pair = pair();
        let buffer = pair.granted(1);
        let view = pair.view(&buffer);
        let held = pair::held(&view, &buffer);
        pair.b.begin(sync(&held, flag::SYNC_READ)).expect("BEGIN");
        let release = match force {
            true => pair.a.release_force(buffer.handle),
            false => pair.a.release(buffer.handle),
        };
        let told = release.expect("RELEASE").state.get();
        assert_eq!(State::from_wire(told), Some(State::Released));
        pair.b.end(sync(&held, flag::SYNC_WRITE)).refused(Status::Revoked);
        // A private copy outlives its exporter; where there is none nothing is left to copy.
        let lives = buffer.mode == Mode::Copy && !force;
        let expected = if lives { State::Mapped } else { State::Revoked };
        assert_eq!(state(&mut pair.b, view.handle), Some(expected));
        if lives {
            pair.b.begin(sync(&held, flag::SYNC_READ)).expect("BEGIN");
            pair.b.unmap(view.mapping).expect("UNMAP");
        }
        pair.b.detach(view.handle).expect("DETACH");
        pair.a.query(buffer.handle).refused(Status::NoEnt);
    }
}

/// [dev-config-5] [dev-config-6] [dev-feature-3] [dev-feature-4]
#[test]
fn without_the_features_there_is_nothing() {
    let mut pair = pair();
    let none = quiet().decline | 1 << feature::IMPORT | 1 << feature::COPY;
    let mut c = Setup { decline: none, ..Default::default() }.connect(&pair.daemon, "c");
    c.query(1).refused(Status::NoEnt);
    let config = c.read_config();
    assert_eq!((config.max_attachments.get(), config.max_mappings.get()), (0, 0));
    c.attach(Attach::default()).refused(Status::Unsupp);
    assert_ne!(pair.b.config.max_attachments.get(), 0);
    let buffer = pair.granted(1);
    let window = Map { flags: 0, handle: pair.attach(&buffer), ..Default::default() };
    if pair.b.offered & (1 << feature::WINDOW) == 0 {
        pair.b.map(&window).refused(Status::Unsupp);
    }
    // An importer that cannot copy.
    let decline = quiet().decline | 1 << feature::COPY;
    pair.b.disconnect();
    let mut b = Setup { decline, ..Default::default() }.connect(&pair.daemon, "b");
    let (told, _) = b.attach(request(&buffer)).expect("ATTACH");
    let segments = vec![(b.pages(1), PAGE)];
    let map = Map { handle: told.handle.get(), segments, ..Default::default() };
    b.map(&map).refused(Status::Unsupp);
    b.unmap(1).refused(Status::Unsupp);
    assert_eq!(b.read_config().max_mappings.get(), 0);
}
