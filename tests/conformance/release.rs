//! RELEASE, and the exporter's view of who uses what.

use super::*;
use bufshare::protocol::{Opcode, RespState, RespSync, State, access, flag};

fn state(answer: &RespState) -> State {
    State::from_wire(answer.state.get()).expect("a known state")
}

/// Waits until the export is back, whether the answer said so or the event does. Returns whether
/// there was an event. BUSY may have been told before RELEASE was sent.
#[track_caller]
fn released(guest: &mut Guest, handle: u64, answer: &RespState) -> bool {
    let event = state(answer) != State::Released;
    if event {
        assert_eq!(state(answer), State::Releasing);
        let mut event = guest.event(SOON).expect("an event");
        if event.kind.get() == Opcode::EvtBusy.to_wire() {
            event = guest.event(SOON).expect("another event");
        }
        assert_eq!(event.kind.get(), Opcode::EvtReleased.to_wire());
        assert_eq!((event.handle.get(), event.uuid), (handle, answer.uuid));
    }
    guest.query(handle).refused(Status::NoEnt);
    event
}

/// [dev-release-1]
#[test]
fn what_nobody_uses_is_back_at_once() {
    let mut bed = bed();
    for force in [false, true] {
        let buffer = bed.offered(2);
        let answer = if force {
            bed.guest.release_force(buffer.handle)
        } else {
            bed.guest.release(buffer.handle)
        };
        let answer = answer.expect("RELEASE");
        assert_eq!(state(&answer), State::Released);
        assert_eq!(answer.use_count.get(), 0);
        assert_eq!((answer.uuid, answer.size.get()), (buffer.uuid, buffer.size));
        bed.guest.query(buffer.handle).refused(Status::NoEnt);
        bed.guest.release(buffer.handle).refused(Status::NoEnt);
    }
    bed.guest.expect_no_event();
}

/// [dev-release-1] A host program that used it and let go leaves no trace.
#[test]
fn what_was_let_go_is_back_at_once() {
    let mut bed = bed();
    let buffer = bed.offered(2);
    let mut client = bed.client();
    let lease = acquire(&mut client, &buffer);
    bed.guest.expect_event(Opcode::EvtBusy);
    client.release(lease).expect("RELEASE");
    bed.guest.expect_event(Opcode::EvtIdle);
    let answer = bed.guest.release(buffer.handle).expect("RELEASE");
    assert_eq!(state(&answer), State::Released);
    bed.guest.expect_no_event();
}

/// [dev-release-2] [dev-release-3] [dev-release-4]
#[test]
fn a_lease_keeps_the_memory_out() {
    let mut bed = bed();
    let buffer = bed.offered(2);
    let mut client = bed.client();
    let lease = acquire(&mut client, &buffer);
    bed.guest.expect_event(Opcode::EvtBusy);
    let answer = bed.guest.release(buffer.handle).expect("RELEASE");
    if buffer.mode == Mode::ZeroCopy {
        assert_eq!(state(&answer), State::Releasing);
        bed.guest.expect_no_event();
        assert_eq!(state(&bed.guest.query(buffer.handle).expect("QUERY")), State::Releasing);
        let extra = lease.fd.try_clone().expect("dup");
        client.release(lease).expect("RELEASE");
        bed.guest.expect_no_event();
        drop(extra);
    } else {
        drop(lease);
    }
    released(&mut bed.guest, buffer.handle, &answer);
    bed.guest.expect_no_event();
}

/// [dev-release-3] A mapping of a host program, and its death, count as well.
#[test]
fn a_mapping_keeps_the_memory_out() {
    let mut bed = bed();
    let buffer = bed.offered(2);
    if buffer.mode != Mode::ZeroCopy {
        skip("no udmabuf on this host");
        return;
    }
    let mut client = bed.client();
    let lease = acquire(&mut client, &buffer);
    let size = usize::try_from(buffer.size).expect("small");
    let map = bufshare::ioctl::Mapping::new(&lease.fd, size, false).expect("mmap");
    bed.guest.expect_event(Opcode::EvtBusy);
    drop((lease, client));
    bed.guest.expect_no_event();
    assert_eq!(bed.guest.query(buffer.handle).expect("QUERY").use_count.get(), 1);
    let answer = bed.guest.release_force(buffer.handle).expect("RELEASE");
    assert_eq!(state(&answer), State::Releasing, "force cannot take a mapping");
    bed.guest.expect_no_event();
    drop(map);
    assert!(released(&mut bed.guest, buffer.handle, &answer));
    bed.guest.expect_no_event();
}

/// [dev-release-5]
#[test]
fn release_closes_the_door() {
    let mut bed = bed();
    let buffer = bed.offered(2);
    let (mut one, mut two) = (bed.client(), bed.client());
    let lease = acquire(&mut one, &buffer);
    bed.guest.release(buffer.handle).expect("RELEASE");
    let uuid = Uuid::from_bytes(buffer.uuid);
    for client in [&mut one, &mut two] {
        host_refused(client.acquire(uuid, access::READ, false), Status::NoEnt);
    }
    drop(lease);
}

/// [dev-release-6]
#[test]
fn after_release_only_released_is_told() {
    let mut bed = bed();
    let buffer = bed.offered(2);
    let mut client = bed.client();
    let lease = acquire(&mut client, &buffer);
    let answer = bed.guest.release(buffer.handle).expect("RELEASE");
    client.release(lease).expect("RELEASE");
    let mut told = Vec::new();
    while let Some(event) = bed.guest.event(QUIET) {
        told.push(Opcode::from_wire(event.kind.get()).expect("a known event"));
    }
    let expected: &[Opcode] =
        if state(&answer) == State::Released { &[] } else { &[Opcode::EvtReleased] };
    // BUSY of the lease may have been told before RELEASE was sent.
    told.retain(|kind| *kind != Opcode::EvtBusy);
    assert_eq!(told, expected);
}

/// [dev-release-7]
#[test]
fn force_voids_all_rights_before_the_answer() {
    let mut bed = bed();
    let buffer = bed.offered(2);
    let mut client = bed.client();
    let lease = acquire(&mut client, &buffer);
    let answer = bed.guest.release_force(buffer.handle).expect("RELEASE");
    host_refused(client.begin(lease.id, host_access(access::READ), SOON), Status::Revoked);
    host_refused(client.end(lease.id, host_access(access::WRITE)), Status::Revoked);
    client.release(lease).expect("what is left to do");
    released(&mut bed.guest, buffer.handle, &answer);
}

/// [dev-release-8] [dev-sync-15] [dev-sync-16]
#[test]
fn release_ends_what_the_exporter_waits_for() {
    let mut bed = bed();
    let buffer = bed.offered(1);
    let mut client = bed.client();
    let lease = acquire(&mut client, &buffer);
    client.begin(lease.id, host_access(READ_WRITE), SOON).expect("BEGIN");
    let wait = Sync { timeout_ns: 5_000_000_000, ..sync(&buffer, flag::SYNC_READ) };
    let head = bed.guest.sync_start::<RespSync>(&wait.bytes());
    assert!(bed.guest.sync_next::<RespSync>(A_WHILE).is_none(), "it waits");
    let answer = bed.guest.release(buffer.handle).expect("RELEASE");
    let (done, reply) = bed.guest.sync_next::<RespSync>(SOON).expect("canceled");
    assert_eq!(done, head);
    reply.refused(Status::Canceled);
    if state(&answer) == State::Releasing {
        bed.guest.begin(sync(&buffer, flag::SYNC_READ)).refused(Status::Canceled);
        bed.guest.end(sync(&buffer, flag::SYNC_READ)).expect("END");
    } else {
        bed.guest.end(sync(&buffer, flag::SYNC_READ)).refused(Status::NoEnt);
    }
    client.release(lease).expect("RELEASE");
    released(&mut bed.guest, buffer.handle, &answer);
}

/// [dev-release-9]
#[test]
fn release_may_be_repeated() {
    let mut bed = bed();
    let pool = bed.exported(2);
    let part = Export {
        flags: flag::EXPORT_PART,
        segments: vec![(0, PAGE)],
        object: pool.uuid,
        ..Default::default()
    };
    let part = bed.guest.export(part).expect("a user").handle.get();
    for _ in 0..3 {
        let answer = bed.guest.release(pool.handle).expect("RELEASE");
        assert_eq!(state(&answer), State::Releasing);
        let answer = bed.guest.release_force(pool.handle).expect("RELEASE");
        assert_eq!(state(&answer), State::Releasing);
    }
    bed.guest.release(part).expect("RELEASE");
    bed.guest.set_name(pool.handle, name("x")).refused(Status::NoEnt);
}

/// [dev-release-11] A copy that a consumer keeps is no way back into the exporter's memory.
#[test]
fn a_copy_outlives_the_loan_and_writes_nothing() {
    let mut bed = bed();
    let buffer = bed.offered(1);
    if buffer.mode != Mode::Copy {
        skip("this host shares without copies");
        return;
    }
    let mut client = bed.client();
    let lease = acquire(&mut client, &buffer);
    client.begin(lease.id, host_access(READ_WRITE), SOON).expect("BEGIN");
    poke(&lease, 0, b"too late");
    let answer = bed.guest.release(buffer.handle).expect("RELEASE");
    released(&mut bed.guest, buffer.handle, &answer);
    bed.guest.memory.write(buffer.addr, b"reused!!");
    host_refused(client.end(lease.id, host_access(access::WRITE)), Status::Revoked);
    assert_eq!(bed.guest.memory.read(buffer.addr, 8), b"reused!!");
    client.release(lease).expect("RELEASE");
}
