//! EXPORT with F_PART: images of a pool.

use super::*;
use bufshare::protocol::{Opcode, State, access, flag};

/// A part of `pool`.
fn part(pool: &Buffer, page: u64, pages: u64) -> Export {
    Export {
        flags: flag::EXPORT_PART,
        segments: vec![(page * PAGE, pages * PAGE)],
        object: pool.uuid,
        ..Default::default()
    }
}

fn state(bed: &mut Bed, handle: u64) -> State {
    let answer = bed.guest.query(handle).expect("QUERY");
    State::from_wire(answer.state.get()).expect("a known state")
}

/// [dev-export-21] [dev-handle-4]
#[test]
fn a_pool_is_an_own_export() {
    let daemon = Daemon::start(&["a", "b"]);
    let mut other = Guest::connect(&daemon, "b");
    let (foreign, _) = other.export_pages(4);
    let mut bed = Bed { guest: Guest::connect(&daemon, "a"), daemon };
    let pool = bed.exported(4);
    for object in [[0; 16], [9; 16], foreign.uuid] {
        let request = Export { object, ..part(&pool, 0, 1) };
        bed.guest.export(request).refused(Status::NoEnt);
    }
}

/// [dev-export-22]
#[test]
fn a_pool_that_is_being_released_gets_no_parts() {
    let mut bed = bed();
    let pool = bed.exported(4);
    bed.guest.export(part(&pool, 0, 1)).expect("a part");
    bed.guest.release(pool.handle).expect("RELEASE");
    bed.guest.export(part(&pool, 1, 1)).refused(Status::NoEnt);
}

/// [dev-export-23]
#[test]
fn a_part_is_one_segment() {
    let mut bed = bed();
    let pool = bed.exported(4);
    let two = Export { segments: vec![(0, PAGE), (PAGE, PAGE)], ..part(&pool, 0, 1) };
    bed.guest.export(two).refused(Status::Inval);
    let none = Export { segments: vec![], size: Some(PAGE), ..part(&pool, 0, 1) };
    bed.guest.export(none).refused(Status::Inval);
}

/// [dev-export-24]
#[test]
fn a_part_lies_inside_its_pool() {
    let mut bed = bed();
    let pool = bed.exported(4);
    for (page, pages) in [(4, 1), (0, 5), (3, 2), (1 << 40, 1)] {
        bed.guest.export(part(&pool, page, pages)).refused(Status::Range);
    }
    let wraps = Export { segments: vec![(u64::MAX - PAGE + 1, PAGE)], ..part(&pool, 0, 1) };
    bed.guest.export(wraps).refused(Status::Range);
    let misaligned = Export { segments: vec![(8, PAGE)], ..part(&pool, 0, 1) };
    bed.guest.export(misaligned).refused(Status::Range);
    bed.guest.export(part(&pool, 0, 4)).expect("all of it");
    bed.guest.export(part(&pool, 3, 1)).expect("its last page");
}

/// [dev-export-25]
#[test]
fn a_part_has_no_more_access_than_its_pool() {
    let mut bed = bed();
    let addr = bed.guest.pages(4);
    let request =
        Export { segments: vec![(addr, 4 * PAGE)], access: access::READ, ..Default::default() };
    let pool = buffer(&bed.guest.export(request).expect("EXPORT"), addr, 4);
    bed.guest.export(part(&pool, 0, 1)).refused(Status::Access);
    let request = Export { access: access::READ, ..part(&pool, 0, 1) };
    bed.guest.export(request).expect("as the pool");
}

/// [dev-export-26] [dev-release-2] [dev-release-10]
#[test]
fn parts_keep_their_pool_in_use() {
    for force in [false, true] {
        let mut bed = bed();
        let pool = bed.exported(4);
        let parts =
            [0, 1].map(|page| bed.guest.export(part(&pool, page, 1)).expect("a part").handle.get());
        assert_eq!(state(&mut bed, pool.handle), State::InUse);
        assert_eq!(bed.guest.query(pool.handle).expect("QUERY").use_count.get(), 1);
        bed.guest.expect_event(Opcode::EvtBusy);
        let reply = if force {
            bed.guest.release_force(pool.handle)
        } else {
            bed.guest.release(pool.handle)
        };
        assert_eq!(reply.expect("RELEASE").state.get(), State::Releasing.to_wire());
        for handle in parts {
            assert_eq!(state(&mut bed, handle), State::Exported, "parts live on");
            bed.guest.grant(Grant { handle, ..Default::default() }).expect("GRANT");
        }
        bed.guest.release(parts[0]).expect("RELEASE");
        bed.guest.expect_no_event();
        bed.guest.release(parts[1]).expect("RELEASE");
        let event = bed.guest.expect_event(Opcode::EvtReleased);
        assert_eq!(event.handle.get(), pool.handle);
        bed.guest.expect_no_event();
    }
}

/// [dev-export-27]
#[test]
fn parts_count_as_any_export() {
    let mut bed = bed_with("name=a,max-exports=3,max-bytes=32768");
    let pool = bed.exported(4);
    let first = bed.guest.export(part(&pool, 0, 2)).expect("a part").handle.get();
    bed.guest.export(part(&pool, 0, 3)).refused(Status::Quota);
    bed.guest.export(part(&pool, 0, 1)).expect("the third export");
    bed.guest.export(part(&pool, 0, 1)).refused(Status::Quota);
    bed.guest.release(first).expect("RELEASE");
    bed.guest.export(part(&pool, 2, 1)).expect("room again");
}

/// [dev-export-18] A part shows its own pages only, and shows what the pool shows.
#[test]
fn a_part_is_its_pages_alone() {
    let mut bed = bed();
    let pool = bed.exported(4);
    for page in 0..4u8 {
        bed.guest.memory.fill(pool.addr + u64::from(page) * PAGE, PAGE, 0x10 + page);
    }
    let export = bed.guest.export(part(&pool, 1, 2)).expect("a part");
    let view = buffer(&export, pool.addr + PAGE, 2);
    bed.guest.grant(Grant { handle: view.handle, ..Default::default() }).expect("GRANT");
    assert_eq!(view.mode, pool.mode);
    let mut client = bed.client();
    client.acquire(Uuid::from_bytes(pool.uuid), access::READ, false).expect_err("not granted");
    bed.guest.end(sync(&view, flag::SYNC_WRITE)).expect("END");
    let lease = acquire(&mut client, &view);
    client.begin(lease.id, host_access(READ_WRITE), SOON).expect("BEGIN");
    assert_eq!(object_size(&lease), 2 * PAGE);
    let seen = peek(&lease, 0, 2 * PAGE as usize);
    assert!(seen[..PAGE as usize].iter().all(|byte| *byte == 0x11));
    assert!(seen[PAGE as usize..].iter().all(|byte| *byte == 0x12));
}
