//! MAP onto the importer's own pages, UNMAP, and what SYNC copies.

use super::pair::held;
use super::*;
use bufshare::protocol::{RespSync, access};

const READ: u16 = flag::SYNC_READ;
const WRITE: u16 = flag::SYNC_WRITE;

/// [dev-map-5] [dev-sync-13] Each side sees what the other wrote.
#[test]
fn bytes_travel_both_ways() {
    let mut pair = pair();
    let buffer = pair.granted(4);
    let view = pair.view(&buffer);
    let held = held(&view, &buffer);
    for round in 1..20u8 {
        pair.a.begin(sync(&buffer, WRITE)).expect("BEGIN");
        pair.a.memory.fill(buffer.addr, buffer.size, round);
        pair.a.end(sync(&buffer, WRITE)).expect("END");
        pair.b.begin(sync(&held, READ | WRITE)).expect("BEGIN");
        let seen = pair.b.memory.read(view.addr, buffer.size as usize);
        assert!(seen.iter().all(|byte| *byte == round), "round {round}");
        pair.b.memory.fill(view.addr, buffer.size, round + 100);
        let told = pair.b.end(sync(&held, READ | WRITE)).expect("END");
        assert_eq!(told.generation.get(), 2 * u64::from(round));
        pair.a.begin(sync(&buffer, READ)).expect("BEGIN");
        let seen = pair.a.memory.read(buffer.addr, buffer.size as usize);
        assert!(seen.iter().all(|byte| *byte == round + 100), "round {round}");
        pair.a.end(sync(&buffer, READ)).expect("END");
    }
}

/// [dev-sync-18] Only the range that is synced, in the one direction.
#[test]
fn only_the_range_is_copied() {
    let mut pair = pair();
    let buffer = pair.granted(4);
    let view = pair.view(&buffer);
    let held = held(&view, &buffer);
    pair.a.memory.fill(buffer.addr, buffer.size, 1);
    pair.a.end(sync(&buffer, WRITE)).expect("END");
    pair.b.memory.fill(view.addr, buffer.size, 2);
    let range = Sync { offset: 100, len: 50, ..sync(&held, READ) };
    pair.b.begin(range).expect("BEGIN");
    assert_eq!(pair.b.memory.read(view.addr + 100, 50), [1; 50]);
    assert_eq!(pair.b.memory.read(view.addr, 100), [2; 100]);
    assert_eq!(pair.b.memory.read(view.addr + 150, 100), [2; 100]);
    pair.b.end(range).expect("END");
    let write = Sync { offset: PAGE, len: 7, ..sync(&held, WRITE) };
    pair.b.begin(write).expect("BEGIN");
    pair.b.end(write).expect("END");
    assert_eq!(pair.a.memory.read(buffer.addr, PAGE as usize), vec![1; PAGE as usize]);
    assert_eq!(pair.a.memory.read(buffer.addr + PAGE, 9), [2, 2, 2, 2, 2, 2, 2, 1, 1]);
}

/// [dev-map-5] A mapping may be a part of the buffer, on scattered pages, more than once.
#[test]
fn mappings_are_ranges_on_any_pages() {
    let mut pair = pair();
    let buffer = pair.granted(4);
    let handle = pair.attach(&buffer);
    let pages = pair.b.pages(8);
    let at = |page: u64| pages + page * PAGE;
    let segments = vec![(at(5), PAGE), (at(2), PAGE)];
    let one = Map { handle, offset: PAGE, segments, ..Default::default() };
    pair.b.map(&one).expect("MAP");
    let segments = vec![(at(0), PAGE)];
    let two = Map { handle, offset: 2 * PAGE, access: access::READ, segments, ..one };
    pair.b.map(&two).expect("MAP");
    for page in 0..4u8 {
        pair.a.memory.fill(buffer.addr + u64::from(page) * PAGE, PAGE, page + 1);
    }
    pair.a.end(sync(&buffer, WRITE)).expect("END");
    let held = Buffer { handle, ..buffer };
    pair.b.begin(sync(&held, READ)).expect("BEGIN");
    let seen = |pair: &Pair| [5, 2, 0, 1, 3].map(|page| pair.b.memory.read(at(page), 1)[0]);
    assert_eq!(seen(&pair), [2, 3, 3, 0, 0]);
    for page in [5u8, 2, 0] {
        pair.b.memory.fill(at(page.into()), PAGE, 9 + page);
    }
    pair.b.end(sync(&held, READ | WRITE)).expect("END");
    let there = |page| pair.a.memory.read(buffer.addr + page * PAGE, 1)[0];
    assert_eq!([0, 1, 2, 3].map(there), [1, 14, 11, 4]);
}

/// [dev-map-1]
#[test]
fn ranges_are_aligned_and_inside() {
    let mut pair = pair();
    let buffer = pair.granted(2);
    let handle = pair.attach(&buffer);
    let addr = pair.b.pages(4);
    let map = |offset, segments| Map { handle, offset, segments, ..Default::default() };
    let bad = [
        map(1, vec![(addr, PAGE)]),
        map(0, vec![(addr + 1, PAGE)]),
        map(0, vec![(addr, PAGE + 1)]),
        map(PAGE, vec![(addr, 2 * PAGE)]),
        map(2 * PAGE, vec![(addr, PAGE)]),
        map(u64::MAX - PAGE + 1, vec![(addr, PAGE)]),
        map(0, vec![(u64::MAX - PAGE + 1, PAGE)]),
    ];
    for request in &bad {
        pair.b.map(request).refused(Status::Range);
    }
    let one = map(0, vec![(addr, PAGE)]);
    let inval = [
        map(0, vec![]),
        Map { len: Some(2 * PAGE), ..one.clone() },
        Map { shm_offset: PAGE, ..one.clone() },
        Map { access: 0, ..one.clone() },
        Map { access: 4, ..one.clone() },
        Map { nr_segments: Some(2), ..one.clone() },
        map(0, vec![(addr, PAGE), (addr, PAGE)]),
        map(0, vec![(addr, PAGE), (addr, 0)]),
    ];
    for request in &inval {
        pair.b.map(request).refused(Status::Inval);
    }
    let beyond = map(0, vec![(addr, PAGE), (0x7fff_0000_0000, PAGE)]);
    assert_eq!(pair.b.map(&beyond).refused(Status::Fault).detail, 1);
    assert_eq!(pair.b.query(handle).expect("QUERY").nr_mappings.get(), 0);
    pair.b.map(&map(PAGE, vec![(addr, PAGE)])).expect("inside");
}

/// [dev-map-2]
#[test]
fn a_mapping_has_no_more_access_than_its_attachment() {
    let mut pair = pair();
    let buffer = pair.granted(1);
    for (mine, more) in [(access::READ, access::WRITE), (access::WRITE, READ_WRITE)] {
        let request = Attach { uuid: buffer.uuid, access: mine, ..Default::default() };
        let handle = pair.b.attach(request).expect("ATTACH").0.handle.get();
        let segments = vec![(pair.b.pages(1), PAGE)];
        let map = Map { handle, access: more, segments, ..Default::default() };
        pair.b.map(&map).refused(Status::Access);
        pair.b.map(&Map { access: mine, ..map }).expect("MAP");
    }
}

/// [dev-map-3]
#[test]
fn mappings_are_bounded() {
    let mut pair = pair();
    let buffer = pair.granted(1);
    let (one, two) = (pair.attach(&buffer), pair.attach(&buffer));
    let segments = vec![(pair.b.pages(1), PAGE)];
    let map = |handle| Map { handle, segments: segments.clone(), ..Default::default() };
    let first = pair.b.map(&map(one)).expect("MAP");
    for _ in 1..pair.b.config.max_mappings.get() {
        pair.b.map(&map(two)).expect("MAP");
    }
    pair.b.map(&map(one)).refused(Status::Quota);
    pair.b.unmap(first).expect("UNMAP");
    pair.b.unmap(first).refused(Status::NoEnt);
    let next = pair.b.map(&map(one)).expect("MAP");
    assert_ne!(next, first, "a mapping is not used again");
}

/// [dev-map-6]
#[test]
fn after_unmap_nothing_arrives() {
    let mut pair = pair();
    let buffer = pair.granted(1);
    let view = pair.view(&buffer);
    let held = held(&view, &buffer);
    pair.b.begin(sync(&held, READ)).expect("BEGIN");
    pair.b.end(sync(&held, READ)).expect("END");
    pair.b.unmap(view.mapping).expect("UNMAP");
    pair.a.memory.fill(buffer.addr, PAGE, 0x55);
    pair.a.end(sync(&buffer, WRITE)).expect("END");
    pair.b.memory.fill(view.addr, PAGE, 0xaa);
    pair.b.begin(sync(&held, READ)).expect("BEGIN");
    assert_eq!(pair.b.memory.read(view.addr, 8), [0xaa; 8]);
    pair.b.end(sync(&held, READ | WRITE)).expect("END");
    assert_eq!(pair.a.memory.read(buffer.addr, 8), [0x55; 8]);
}

/// [dev-sync-5] [dev-sync-7] A BEGIN that waited copies what the writer left.
#[test]
fn a_wait_ends_with_the_writers_content() {
    let mut pair = pair();
    let buffer = pair.granted(2);
    let view = pair.view(&buffer);
    let held = held(&view, &buffer);
    for round in 1..10u8 {
        pair.a.begin(sync(&buffer, WRITE)).expect("BEGIN");
        let request = Sync { timeout_ns: u64::MAX, ..sync(&held, READ) };
        let head = pair.b.sync_start::<RespSync>(&request.bytes());
        pair.a.memory.fill(buffer.addr, buffer.size, round);
        pair.a.end(sync(&buffer, WRITE)).expect("END");
        let (done, reply) = pair.b.sync_next::<RespSync>(SOON).expect("it ends");
        assert_eq!((done, reply.expect("BEGIN").generation.get()), (head, u64::from(round)));
        let seen = pair.b.memory.read(view.addr, buffer.size as usize);
        assert!(seen.iter().all(|byte| *byte == round), "round {round}");
        pair.b.end(sync(&held, READ)).expect("END");
    }
}

/// [dev-sync-17] [dev-cancel-1]
#[test]
fn waits_of_an_attachment_end_with_it() {
    let mut pair = pair();
    let buffer = pair.granted(1);
    let held = Buffer { handle: pair.attach(&buffer), ..buffer };
    pair.a.begin(sync(&buffer, WRITE)).expect("BEGIN");
    let waits = Sync { timeout_ns: u64::MAX, cookie: 5, ..sync(&held, READ) };
    let wait = |pair: &mut Pair| pair.b.sync_start::<RespSync>(&waits.bytes());
    let end = |pair: &mut Pair, head, status| {
        let (done, reply) = pair.b.sync_next::<RespSync>(SOON).expect("it ends");
        assert_eq!(done, head);
        reply.refused(status);
    };
    let head = wait(&mut pair);
    assert!(pair.b.sync_next::<RespSync>(A_WHILE).is_none(), "it waits");
    pair.b.cancel(held.handle, 5).expect("CANCEL");
    end(&mut pair, head, Status::Canceled);
    let head = wait(&mut pair);
    assert!(pair.b.sync_next::<RespSync>(A_WHILE).is_none(), "it waits");
    pair.revoke(&buffer);
    end(&mut pair, head, Status::Revoked);
    pair.b.detach(held.handle).expect("DETACH");
    pair.a.end(sync(&buffer, WRITE)).expect("END");
    pair.grant(&buffer, READ_WRITE);
    let other = Buffer { handle: pair.attach(&buffer), ..buffer };
    pair.b.begin(sync(&other, WRITE)).expect("BEGIN");
    let request = Sync { timeout_ns: u64::MAX, ..sync(&buffer, READ) };
    let head = pair.a.sync_start::<RespSync>(&request.bytes());
    assert!(pair.a.sync_next::<RespSync>(A_WHILE).is_none(), "it waits");
    pair.b.detach(other.handle).expect("DETACH");
    let (done, reply) = pair.a.sync_next::<RespSync>(SOON).expect("its bits are gone with it");
    assert_eq!((done, reply.expect("BEGIN").generation.get()), (head, 1));
}
