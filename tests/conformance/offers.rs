//! What importers and other holders are told: OFFERED, WITHDRAWN, REVOKED, CHANGED.

use super::*;
use bufshare::protocol::{Opcode, access, peer};

/// [dev-event-9]
#[test]
fn an_offer_comes_changes_and_goes() {
    let mut pair = pair();
    let buffer = pair.exported(2);
    pair.a.end(sync(&buffer, flag::SYNC_WRITE)).expect("END");
    pair.grant(&buffer, access::READ);
    let exporter = pair.a.config.peer_id.get();
    let offered = pair.b.expect_event(Opcode::EvtOffered);
    assert_eq!((offered.uuid, offered.handle.get()), (buffer.uuid, 0));
    assert_eq!((offered.peer_id.get(), offered.access.get()), (exporter, access::READ));
    assert_eq!((offered.size.get(), offered.generation.get()), (buffer.size, 1));
    assert_eq!((offered.status.get(), offered.flags.get()), (0, 0));
    assert_eq!(offered.epoch, pair.b.config.epoch);
    pair.grant(&buffer, access::READ);
    pair.b.expect_no_event();
    pair.grant(&buffer, READ_WRITE);
    let offered = pair.b.expect_event(Opcode::EvtOffered);
    assert_eq!(offered.access.get(), READ_WRITE);
    pair.grant(&buffer, 0);
    let gone = pair.b.expect_event(Opcode::EvtWithdrawn);
    assert_eq!((gone.uuid, gone.handle.get(), gone.peer_id.get()), (buffer.uuid, 0, exporter));
    assert_eq!((gone.access.get(), gone.size.get(), gone.generation.get()), (0, 0, 0));
    pair.grant(&buffer, 0);
    pair.b.expect_no_event();
    pair.a.expect_no_event();
}

/// [dev-grant-7] [dev-grant-8]
#[test]
fn offers_end_with_their_time_and_their_use() {
    let mut pair = pair();
    let buffer = pair.exported(1);
    let peer_id = pair.b.config.peer_id.get();
    let grant = Grant { handle: buffer.handle, peer_id, lifetime_ms: 40, ..Default::default() };
    pair.a.grant(grant).expect("GRANT");
    pair.b.expect_event(Opcode::EvtOffered);
    pair.b.expect_event(Opcode::EvtWithdrawn);
    let request = Attach { uuid: buffer.uuid, ..Default::default() };
    pair.b.attach(request).refused(Status::NoEnt);
    for peer_id in [peer_id, peer::ANY] {
        let once = Grant { peer_id, flags: flag::GRANT_ONCE, lifetime_ms: 0, ..grant };
        pair.a.grant(once).expect("GRANT");
        pair.b.expect_event(Opcode::EvtOffered);
        pair.b.attach(Attach { access: 4, ..request }).refused(Status::Inval);
        let handle = pair.attach(&buffer);
        pair.b.attach(request).refused(Status::NoEnt);
        pair.b.expect_no_event();
        pair.b.detach(handle).expect("DETACH");
        pair.b.expect_event(Opcode::EvtWithdrawn);
    }
}

/// [dev-release-5] RELEASE closes the door, and says so to those inside.
#[test]
fn release_withdraws() {
    let mut pair = pair();
    let (one, two) = (pair.granted(1), pair.granted(1));
    pair.b.expect_event(Opcode::EvtOffered);
    pair.b.expect_event(Opcode::EvtOffered);
    pair.a.release(one.handle).expect("RELEASE");
    assert_eq!(pair.b.expect_event(Opcode::EvtWithdrawn).uuid, one.uuid);
    pair.b.attach(Attach { uuid: one.uuid, ..Default::default() }).refused(Status::NoEnt);
    let handle = pair.attach(&two);
    pair.a.release_force(two.handle).expect("RELEASE");
    let mut told = [pair.b.event(SOON), pair.b.event(SOON)].map(|event| {
        let event = event.expect("an event");
        (event.kind.get(), event.status.get(), event.handle.get(), event.uuid)
    });
    told.sort_unstable();
    let revoked = (Opcode::EvtRevoked.to_wire(), 12, handle, two.uuid);
    assert_eq!(told, [revoked, (Opcode::EvtWithdrawn.to_wire(), 0, 0, two.uuid)]);
    pair.b.expect_no_event();
}

/// [dev-sync-12] CHANGED goes to every holder but the writer.
#[test]
fn everybody_hears_of_new_content_but_the_writer() {
    let mut pair = pair();
    let buffer = pair.granted(1);
    pair.b.expect_event(Opcode::EvtOffered);
    let (one, two) = (pair.view(&buffer), pair.view(&buffer));
    pair.a.expect_event(Opcode::EvtBusy);
    pair.a.end(sync(&buffer, flag::SYNC_WRITE)).expect("END");
    let mut told = Vec::new();
    for _ in 0..2 {
        let changed = pair.b.expect_event(Opcode::EvtChanged);
        assert_eq!((changed.uuid, changed.generation.get()), (buffer.uuid, 1));
        assert_eq!((changed.size.get(), changed.peer_id.get(), changed.access.get()), (0, 0, 0));
        told.push(changed.handle.get());
    }
    told.sort_unstable();
    assert_eq!(told, [one.handle, two.handle]);
    let held = pair::held(&one, &buffer);
    pair.b.end(sync(&held, flag::SYNC_WRITE)).expect("END");
    let changed = pair.b.expect_event(Opcode::EvtChanged);
    assert_eq!((changed.handle.get(), changed.generation.get()), (two.handle, 2));
    let changed = pair.a.expect_event(Opcode::EvtChanged);
    assert_eq!((changed.handle.get(), changed.generation.get()), (buffer.handle, 2));
    pair.a.expect_no_event();
    pair.b.expect_no_event();
}

/// [dev-reset-4] [dev-reset-7] The exporter goes, by its VMM's death or by a reset.
#[test]
fn attachments_die_with_their_exporter() {
    for reset in [false, true] {
        let mut pair = pair();
        let buffer = pair.granted(1);
        pair.b.expect_event(Opcode::EvtOffered);
        let view = pair.view(&buffer);
        if reset {
            pair.a.reset(Stop::WithBase);
        } else {
            pair.a.disconnect();
        }
        let mut kinds = [pair.b.event(SOON), pair.b.event(SOON)]
            .map(|event| Opcode::from_wire(event.expect("an event").kind.get()));
        kinds.sort_unstable();
        assert_eq!(kinds, [Some(Opcode::EvtRevoked), Some(Opcode::EvtWithdrawn)]);
        let held = pair::held(&view, &buffer);
        pair.b.begin(sync(&held, flag::SYNC_READ)).refused(Status::Revoked);
        pair.b.attach(Attach { uuid: buffer.uuid, ..Default::default() }).refused(Status::NoEnt);
        pair.b.detach(view.handle).expect("DETACH");
        pair.b.expect_no_event();
    }
}

/// [dev-reset-3] [dev-reset-7] The importer goes, by its VMM's death or by a reset; then it comes again.
#[test]
fn attachments_end_with_their_importer() {
    for reset in [false, true] {
        let mut pair = pair();
        let buffer = pair.granted(1);
        pair.b.expect_event(Opcode::EvtOffered);
        let view = pair.view(&buffer);
        pair.a.expect_event(Opcode::EvtBusy);
        let held = pair::held(&view, &buffer);
        pair.b.begin(sync(&held, flag::SYNC_READ)).expect("BEGIN");
        if reset {
            pair.b.reset(Stop::DisableOnly);
        } else {
            pair.b.reconnect();
        }
        pair.a.expect_event(Opcode::EvtIdle);
        pair.a.begin(sync(&buffer, flag::SYNC_WRITE)).expect("its bits are gone");
        if reset {
            pair.b.expect_event(Opcode::EvtResync);
        }
        assert_eq!(pair.b.expect_event(Opcode::EvtOffered).uuid, buffer.uuid);
        pair.b.query(view.handle).refused(Status::NoEnt);
        pair.b.unmap(view.mapping).refused(Status::NoEnt);
        pair.attach(&buffer);
    }
}

/// [dev-event-2] After RESYNC live offers and dead attachments are told again.
#[test]
fn what_was_missed_is_told_again() {
    let mut pair = pair();
    pair.b.disconnect();
    pair.b = Setup { event_buffers: 0, ..quiet() }.connect(&pair.daemon, "b");
    let (live, dead) = (pair.granted(1), pair.granted(1));
    let handle = pair.attach(&dead);
    pair.revoke(&dead);
    pair.b.stock_events(8);
    let told = |pair: &mut Pair| {
        let mut told = Vec::new();
        while let Some(event) = pair.b.event(QUIET) {
            told.push((event.kind.get(), event.handle.get(), event.uuid));
        }
        told
    };
    let (offered, revoked) = (Opcode::EvtOffered.to_wire(), Opcode::EvtRevoked.to_wire());
    let mut first = told(&mut pair);
    first.sort_unstable();
    let now = vec![(offered, 0, live.uuid), (revoked, handle, dead.uuid)];
    assert_eq!(first, now);
    // An event that finds too little room is lost, and tells both again.
    pair.b.disconnect();
    pair.b = Setup { event_buffers: 0, ..quiet() }.connect(&pair.daemon, "b");
    let handle = pair.attach(&live);
    pair.b.event_ring().submit(&[], &[8]).expect("free");
    let lost = pair.b.event_ring().wait(SOON).expect("it comes back");
    assert_eq!(lost.len, 0);
    pair.revoke(&live);
    pair.b.stock_events(8);
    let again = told(&mut pair);
    assert_eq!(again[0].0, Opcode::EvtResync.to_wire());
    assert_eq!(again[1..], [(revoked, handle, live.uuid)], "the offer is gone, and was never told");
}
