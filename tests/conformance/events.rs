//! The event queue: state that is told once, however few buffers there are.

use super::*;
use bufshare::protocol::{Event, Opcode, flag, peer};
use std::collections::BTreeSet;
use zerocopy::FromBytes;

/// A guest without event buffers.
fn deaf_bed() -> Bed {
    let daemon = Daemon::start(&["a"]);
    let guest = Setup { event_buffers: 0, ..Default::default() }.connect(&daemon, "a");
    Bed { daemon, guest }
}

/// A pool and a part of it: a use that needs no host program.
fn used_pool(bed: &mut Bed) -> (Buffer, u64) {
    let pool = bed.exported(1);
    let part = Export {
        flags: flag::EXPORT_PART,
        segments: vec![(0, PAGE)],
        object: pool.uuid,
        ..Default::default()
    };
    let part = bed.guest.export(part).expect("a part").handle.get();
    (pool, part)
}

/// [dev-event-1] [dev-event-9] [dev-event-4] [dev-event-5]
#[test]
fn busy_and_idle_tell_the_use_count() {
    let mut bed = bed();
    let buffer = bed.offered(2);
    let mut client = bed.client();
    for round in 0..3 {
        let one = acquire(&mut client, &buffer);
        let busy = bed.guest.expect_event(Opcode::EvtBusy);
        assert_eq!((busy.handle.get(), busy.uuid), (buffer.handle, buffer.uuid));
        assert_eq!((busy.size.get(), busy.generation.get()), (buffer.size, round));
        assert_eq!((busy.access.get(), busy.metadata_type.get(), busy.flags.get()), (0, 0, 0));
        let two = acquire(&mut client, &buffer);
        client.release(one).expect("RELEASE");
        bed.guest.expect_no_event();
        bed.guest.end(sync(&buffer, flag::SYNC_WRITE)).expect("END");
        client.release(two).expect("RELEASE");
        let idle = bed.guest.expect_event(Opcode::EvtIdle);
        assert_eq!((idle.handle.get(), idle.generation.get()), (buffer.handle, round + 1));
        bed.guest.expect_no_event();
    }
}

/// [dev-event-2]
#[test]
fn a_small_event_buffer_costs_a_resync() {
    let mut bed = deaf_bed();
    let (pool, _part) = used_pool(&mut bed);
    for room in [1, 8, 63] {
        bed.guest.event_ring().submit(&[], &[room]).expect("free");
        let answer = bed.guest.event_ring().wait(SOON).expect("it comes back");
        assert_eq!(answer.len, 0);
        assert!(answer.bytes.iter().all(|byte| *byte == 0xee), "untouched");
        bed.guest.stock_events(1);
        let event = bed.guest.event_ring().wait(SOON).expect("an event");
        let event = Event::read_from_bytes(event.written()).expect("64 bytes");
        assert_eq!(event.kind.get(), Opcode::EvtResync.to_wire());
        assert_eq!((event.handle.get(), event.uuid), (0, [0; 16]));
    }
    bed.guest.stock_events(1);
    let event = bed.guest.event_ring().wait(SOON).expect("an event");
    let event = Event::read_from_bytes(event.written()).expect("64 bytes");
    assert_eq!(event.kind.get(), Opcode::EvtBusy.to_wire(), "what the small buffer was for");
    assert_eq!(event.handle.get(), pool.handle);
}

/// [dev-event-1] A larger buffer is filled with one event.
#[test]
fn one_event_a_buffer() {
    let mut bed = deaf_bed();
    used_pool(&mut bed);
    used_pool(&mut bed);
    bed.guest.event_ring().submit(&[], &[40, 1000]).expect("free");
    let answer = bed.guest.event_ring().wait(SOON).expect("an event");
    assert_eq!(answer.len, 64);
    assert!(answer.bytes[64..].iter().all(|byte| *byte == 0xee), "untouched");
}

/// [dev-event-3] Hundreds of releases and one event buffer.
#[test]
fn no_release_is_lost() {
    let mut bed = deaf_bed();
    let mut waiting = BTreeSet::new();
    for _ in 0..300 {
        let (pool, part) = used_pool(&mut bed);
        bed.guest.release(pool.handle).expect("RELEASE");
        bed.guest.release(part).expect("RELEASE");
        waiting.insert(pool.handle);
    }
    bed.guest.stock_events(1);
    while !waiting.is_empty() {
        let event = bed.guest.expect_event(Opcode::EvtReleased);
        assert!(waiting.remove(&event.handle.get()), "told twice: {event:?}");
    }
    bed.guest.expect_no_event();
}

/// [dev-export-20] [dev-event-3] A release that was not told keeps its place among the exports.
#[test]
fn a_release_that_was_not_told_keeps_its_place() {
    let daemon = Launch { vms: vec!["name=a,max-exports=2".into()], ..Default::default() }.start();
    let guest = Setup { event_buffers: 0, ..Default::default() }.connect(&daemon, "a");
    let mut bed = Bed { daemon, guest };
    let (pool, part) = used_pool(&mut bed);
    bed.guest.release(pool.handle).expect("RELEASE");
    bed.guest.release(part).expect("RELEASE");
    bed.guest.query(pool.handle).refused(Status::NoEnt);
    bed.exported(1);
    let addr = bed.guest.pages(1);
    let request = Export { segments: vec![(addr, PAGE)], ..Default::default() };
    bed.guest.export(request.clone()).refused(Status::Quota);
    bed.guest.stock_events(1);
    bed.guest.expect_event(Opcode::EvtReleased);
    let mut room = || bed.guest.export(request.clone()).is_ok();
    assert!(wait_for(SOON, &mut room), "the place is free");
}

/// [dev-event-4] [dev-event-5] What undoes itself before it is told is not told.
#[test]
fn only_the_difference_is_told() {
    let mut bed = deaf_bed();
    let buffer = bed.offered(1);
    let mut client = bed.client();
    for _ in 0..20 {
        let lease = acquire(&mut client, &buffer);
        client.release(lease).expect("RELEASE");
    }
    let idle = || bed.guest.query(buffer.handle).is_ok_and(|answer| answer.use_count.get() == 0);
    assert!(wait_for(SOON, idle), "nobody uses it");
    let lease = acquire(&mut client, &buffer);
    bed.guest.stock_events(4);
    let event = bed.guest.expect_event(Opcode::EvtBusy);
    assert_eq!(event.handle.get(), buffer.handle);
    bed.guest.expect_no_event();
    client.release(lease).expect("RELEASE");
    bed.guest.expect_event(Opcode::EvtIdle);
    bed.guest.expect_no_event();
}

/// [dev-event-8]
#[test]
fn peers_come_and_go() {
    let launch = Launch {
        vms: ["a", "b", "c"].map(|vm| format!("name={vm}")).to_vec(),
        args: ["--allow", "a:b"].map(String::from).to_vec(),
        ..Default::default()
    };
    let daemon = launch.start();
    let mut a = Guest::connect(&daemon, "a");
    Guest::connect(&daemon, "c").export_pages(1);
    a.expect_no_event();
    for _ in 0..3 {
        let mut b = Guest::connect(&daemon, "b");
        let id = b.config.peer_id;
        let online = |a: &mut Guest, wanted: bool| {
            let event = a.expect_event(Opcode::EvtPeer);
            assert_eq!(event.peer_id, id);
            assert_eq!((event.handle.get(), event.uuid), (0, [0; 16]));
            let info = (0..2).map(|i| a.peer_info(i).expect("PEER_INFO"));
            let info = info.into_iter().find(|info| info.peer_id == id).expect("listed");
            assert_eq!(info.flags.get() & peer::F_ONLINE != 0, wanted);
            assert_eq!(info.epoch, event.epoch);
        };
        online(&mut a, true);
        b.disconnect();
        online(&mut a, false);
        a.expect_no_event();
    }
}

/// [dev-event-6]
#[test]
fn a_refused_request_is_no_event() {
    let mut bed = bed();
    let buffer = bed.exported(1);
    let outside = Export {
        flags: flag::EXPORT_PART,
        segments: vec![(PAGE, PAGE)],
        object: buffer.uuid,
        ..Default::default()
    };
    bed.guest.export(outside).refused(Status::Range);
    let addr = 1 << 50;
    let nowhere = Export { segments: vec![(addr, PAGE)], ..Default::default() };
    bed.guest.export(nowhere).refused(Status::Fault);
    let client = bed.client().acquire(Uuid::from_bytes(buffer.uuid), READ_WRITE, false);
    host_refused(client, Status::NoEnt);
    bed.guest.release(4711).refused(Status::NoEnt);
    bed.guest.expect_no_event();
}
