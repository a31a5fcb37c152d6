//! Stop, reset, and the end of a session.

use super::*;
use bufshare::protocol::{Opcode, RespState, RespSync, access, flag, vq};

const BOTH: [Stop; 2] = [Stop::WithBase, Stop::DisableOnly];
const STATE: u32 = size_of::<RespState>() as u32;

/// [dev-reset-1]
#[test]
fn a_pause_keeps_everything() {
    for how in BOTH {
        let mut bed = bed();
        let buffer = bed.offered(2);
        let mut client = bed.client();
        let lease = acquire(&mut client, &buffer);
        bed.guest.expect_event(Opcode::EvtBusy);
        bed.guest.begin(sync(&buffer, flag::SYNC_WRITE)).expect("BEGIN");
        let before = bed.guest.query(buffer.handle).expect("QUERY");
        for _ in 0..3 {
            bed.guest.pause(how);
            let write = host_access(access::WRITE);
            host_refused(client.try_begin(lease.id, write), Status::Again);
            bed.guest.resume();
            assert_eq!(bed.guest.query(buffer.handle), Ok(before));
        }
        bed.guest.end(sync(&buffer, flag::SYNC_WRITE)).expect("END");
        assert_eq!(bed.client().list().expect("LIST").len(), 1, "the grant is kept");
        bed.guest.expect_no_event();
    }
}

/// [dev-reset-1] [dev-reset-9] A wait that ends during the pause is told after it.
#[test]
fn a_pause_keeps_pending_requests() {
    for how in BOTH {
        let mut bed = bed();
        let buffer = bed.offered(1);
        let mut client = bed.client();
        let lease = acquire(&mut client, &buffer);
        client.begin(lease.id, host_access(READ_WRITE), SOON).expect("BEGIN");
        let waits = Sync { timeout_ns: u64::MAX, ..sync(&buffer, flag::SYNC_READ) };
        let head = bed.guest.sync_start::<RespSync>(&waits.bytes());
        assert!(bed.guest.sync_next::<RespSync>(A_WHILE).is_none(), "it waits");
        bed.guest.pause(how);
        client.end(lease.id, host_access(access::WRITE)).expect("END");
        client.release(lease).expect("RELEASE");
        let used = bed.guest.sync_ring().used_at();
        let before = bed.guest.memory.read(used, 4);
        std::thread::sleep(A_WHILE);
        assert_eq!(bed.guest.memory.read(used, 4), before, "nothing while it is stopped");
        bed.guest.resume();
        let (done, reply) = bed.guest.sync_next::<RespSync>(SOON).expect("told after the pause");
        assert_eq!(done, head);
        assert_eq!(reply.expect("BEGIN").generation.get(), 1);
    }
}

/// [dev-reset-2] [dev-reset-9] Neither chains nor events are touched while the queues are stopped.
#[test]
fn a_stopped_guest_is_left_alone() {
    for how in BOTH {
        let mut bed = bed();
        let buffer = bed.offered(1);
        let mut client = bed.client();
        bed.guest.pause(how);
        let request = handle_request(Opcode::Query, 0, buffer.handle);
        bed.guest.control_ring().submit(&[&request], &[STATE]).expect("free");
        let lease = acquire(&mut client, &buffer);
        // Rings, requests and the buffer: all that the device was ever told.
        let size = usize::try_from(FREE - BASE + PAGE).expect("64 bits");
        let before = bed.guest.memory.read(BASE, size);
        std::thread::sleep(A_WHILE);
        let after = bed.guest.memory.read(BASE, size);
        assert!(before == after, "memory of a stopped guest changed");
        bed.guest.resume();
        bed.guest.control_ring().kick();
        let answer = bed.guest.control_ring().wait(SOON).expect("answered after the pause");
        parse::<RespState>(answer.written()).expect("QUERY");
        bed.guest.expect_event(Opcode::EvtBusy);
        drop(lease);
    }
}

/// [dev-reset-3] [dev-reset-4]
#[test]
fn a_reset_ends_all_rights() {
    for how in [Some(Stop::WithBase), Some(Stop::DisableOnly), None] {
        let mut bed = bed();
        let buffer = bed.offered(2);
        let unused = bed.offered(1);
        let mut client = bed.client();
        let lease = acquire(&mut client, &buffer);
        client.begin(lease.id, host_access(access::READ), SOON).expect("BEGIN");
        match how {
            Some(how) => bed.guest.reset(how),
            None => bed.guest.reset_device(),
        }
        for handle in [buffer.handle, unused.handle] {
            bed.guest.query(handle).refused(Status::NoEnt);
            bed.guest.release(handle).refused(Status::NoEnt);
        }
        let read = host_access(access::READ);
        host_refused(client.begin(lease.id, read, SOON), Status::Revoked);
        let uuid = Uuid::from_bytes(unused.uuid);
        host_refused(client.acquire(uuid, access::READ, false), Status::NoEnt);
        client.release(lease).expect("what is left to do");
        bed.exported(1);
    }
}

/// [dev-reset-10] What a driver reads between the reset and the start of its queues may be of before.
#[test]
fn a_reset_is_told() {
    for how in BOTH {
        let mut bed = bed();
        bed.exported(1);
        bed.guest.pause(how);
        let early = bed.guest.read_config().lingering.get();
        bed.guest.restart_from_zero();
        bed.guest.expect_event(Opcode::EvtResync);
        let lingering = bed.guest.read_config().lingering.get();
        assert_eq!(lingering, 0);
        assert!([lingering, u32::MAX].contains(&early), "{early} is known to be wrong");
        bed.guest.expect_no_event();
    }
}

/// An operator may prefer that a VM which does not run lends nothing.
#[test]
fn a_stop_may_revoke() {
    let mut bed = bed_with("name=a,on-stop=revoke");
    let buffer = bed.offered(2);
    let mut client = bed.client();
    let lease = acquire(&mut client, &buffer);
    bed.guest.pause(Stop::WithBase);
    let read = host_access(access::READ);
    let revoked = || client.begin(lease.id, read, SOON).is_err();
    assert!(wait_for(SOON, revoked), "the VM is stopped");
    host_refused(client.begin(lease.id, read, SOON), Status::Revoked);
    bed.guest.resume();
    bed.guest.query(buffer.handle).refused(Status::NoEnt);
    bed.exported(1);
}

/// [dev-reset-5] A request that was pending when the guest reset is not answered to the next driver.
#[test]
fn a_reset_forgets_pending_requests() {
    for how in BOTH {
        let mut bed = bed();
        let buffer = bed.offered(1);
        let mut client = bed.client();
        let lease = acquire(&mut client, &buffer);
        client.begin(lease.id, host_access(READ_WRITE), SOON).expect("BEGIN");
        let waits = Sync { timeout_ns: u64::MAX, ..sync(&buffer, flag::SYNC_READ) };
        bed.guest.sync_start::<RespSync>(&waits.bytes());
        assert!(bed.guest.sync_next::<RespSync>(A_WHILE).is_none(), "it waits");
        bed.guest.reset(how);
        bed.exported(1);
        client.release(lease).expect("RELEASE");
        assert_eq!(bed.guest.sync_ring().wait_used(QUIET), None, "a ghost was answered");
        let fresh = bed.exported(1);
        bed.guest.begin(sync(&fresh, flag::SYNC_READ)).expect("the queue works");
    }
}

/// [dev-reset-3] [dev-reset-4] [dev-reset-5] The device is in the middle of a request meanwhile: a
/// copy, which takes longer than a monitor that is quick takes to start the next guest.
#[test]
fn a_reset_in_the_midst_of_a_request_is_noticed() {
    let args = ["--udmabuf", "off"].map(String::from).to_vec();
    let daemon = Launch { args, ..Default::default() }.start();
    let mut bed = Bed { guest: Guest::connect(&daemon, "a"), daemon };
    let addr = bed.guest.pages(16 << 10);
    for how in BOTH {
        for pause in [0, 1, 2, 3] {
            let request =
                Export { segments: vec![(addr, (16 << 10) * PAGE)], ..Default::default() };
            let export = bed.guest.export(request).expect("EXPORT");
            let buffer = buffer(&export, addr, 16 << 10);
            bed.guest.memory.fill(buffer.addr, buffer.size, 1);
            let end = sync(&buffer, flag::SYNC_WRITE | flag::SYNC_END);
            bed.guest.sync_start::<RespSync>(&end.bytes());
            std::thread::sleep(Duration::from_millis(pause));
            bed.guest.reset(how);
            bed.guest.query(buffer.handle).refused(Status::NoEnt);
            assert_eq!(bed.guest.sync_ring().wait_used(QUIET), None, "a ghost was answered");
            bed.guest.expect_event(Opcode::EvtResync);
            bed.guest.reconnect();
        }
    }
}

/// [dev-reset-6] Exports of a session that ended without a reset linger, too.
#[test]
fn a_lost_connection_is_a_reset_for_the_others() {
    let mut bed = bed();
    let buffer = bed.offered(2);
    let mut client = bed.client();
    let lease = acquire(&mut client, &buffer);
    bed.guest.reconnect();
    bed.guest.query(buffer.handle).refused(Status::NoEnt);
    let expected = u32::from(buffer.mode == Mode::ZeroCopy);
    assert_eq!(bed.guest.read_config().lingering.get(), expected);
    host_refused(client.begin(lease.id, host_access(access::READ), SOON), Status::Revoked);
    client.release(lease).expect("RELEASE");
    let done = || bed.guest.read_config().lingering.get() == 0;
    assert!(wait_for(SOON, done), "nothing lingers");
}

/// [dev-reset-7]
#[test]
fn others_do_not_notice() {
    let daemon = Daemon::start(&["a", "b"]);
    let mut a = Guest::connect(&daemon, "a");
    let (kept, _) = a.export_pages(1);
    for _ in 0..5 {
        let mut b = Guest::connect(&daemon, "b");
        b.export_pages(3);
        b.disconnect();
        a.export_pages(1);
    }
    a.query(kept.handle.get()).expect("QUERY");
}

/// [dev-reset-8] Reconnects cost no descriptor.
#[test]
fn an_endpoint_may_come_again() {
    let mut bed = bed();
    let round = |bed: &mut Bed| {
        bed.guest.reconnect();
        bed.exported(2);
    };
    for _ in 0..3 {
        round(&mut bed);
    }
    let settled = |bed: &Bed| {
        std::thread::sleep(A_WHILE);
        bed.daemon.fds()
    };
    let before = settled(&bed);
    for _ in 0..20 {
        round(&mut bed);
    }
    let flat = || bed.daemon.fds() <= before;
    assert!(wait_for(SOON, flat), "{} fds, then {}", before, bed.daemon.fds());
}

/// Requests that were made available before the guest's rings were enabled are served, as a driver
/// does that fills its queues early.
#[test]
fn chains_of_before_the_start_are_served() {
    let mut bed = bed();
    bed.guest.pause(Stop::WithBase);
    let request = handle_request(Opcode::Query, 0, 1);
    bed.guest.rings[usize::from(vq::CONTROL)].submit(&[&request], &[STATE]).expect("free");
    bed.guest.resume();
    let answer = bed.guest.control_ring().wait(SOON).expect("served without another kick");
    parse::<RespState>(answer.written()).refused(Status::NoEnt);
}
