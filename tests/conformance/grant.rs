//! GRANT.

use super::*;
use bufshare::protocol::{access, flag, peer};

fn uuid(buffer: &Buffer) -> Uuid {
    Uuid::from_bytes(buffer.uuid)
}

/// [dev-grant-1] [dev-grant-2]
#[test]
fn malformed_grants() {
    let mut bed = bed();
    let handle = bed.exported(1).handle;
    for access in [4, 8, u32::MAX] {
        bed.guest.grant(Grant { handle, access, ..Default::default() }).refused(Status::Inval);
    }
    let flags = flag::GRANT_FORCE;
    bed.guest.grant(Grant { handle, flags, ..Default::default() }).refused(Status::Inval);
}

/// [dev-grant-3] [dev-handle-4]
#[test]
fn unknown_forbidden_and_own_peers_look_alike() {
    let daemon = Daemon::start(&["a", "b"]);
    let forbidden = Guest::connect(&daemon, "b").config.peer_id.get();
    let mut bed = Bed { guest: Guest::connect(&daemon, "a"), daemon };
    let handle = bed.exported(1).handle;
    let own = bed.guest.config.peer_id.get();
    for peer_id in [peer::NONE, own, forbidden, 4711, peer::ANY - 1] {
        let request = Grant { handle, peer_id, ..Default::default() };
        let refusal = bed.guest.grant(request).refused(Status::NoEnt);
        assert_eq!(refusal.detail, 0);
    }
}

/// [dev-grant-3] An operator may forbid the host, too.
#[test]
fn policy_goes_before_the_grant() {
    let launch = Launch {
        vms: vec!["name=a".into()],
        args: vec!["--allow".into(), "a:host:ro".into()],
        ..Default::default()
    };
    let daemon = launch.start();
    let mut bed = Bed { guest: Guest::connect(&daemon, "a"), daemon };
    let handle = bed.exported(1).handle;
    bed.guest.grant(Grant { handle, ..Default::default() }).refused(Status::Access);
    let access = access::READ;
    bed.guest.grant(Grant { handle, access, ..Default::default() }).expect("READ");
    assert_eq!(bed.client().list().expect("LIST")[0].access, access::READ);
}

/// [dev-grant-4]
#[test]
fn nobody_grants_more_than_was_exported() {
    let mut bed = bed();
    let addr = bed.guest.pages(1);
    let access = access::READ;
    let request = Export { segments: vec![(addr, PAGE)], access, ..Default::default() };
    let handle = bed.guest.export(request).expect("EXPORT").handle.get();
    for access in [access::WRITE, READ_WRITE] {
        bed.guest.grant(Grant { handle, access, ..Default::default() }).refused(Status::Access);
    }
    bed.guest.grant(Grant { handle, access, ..Default::default() }).expect("READ");
}

/// [dev-grant-5]
#[test]
fn grants_of_a_releasing_export_are_void() {
    let mut bed = bed();
    let pool = bed.exported(2);
    let part = Export {
        flags: flag::EXPORT_PART,
        segments: vec![(0, PAGE)],
        object: pool.uuid,
        ..Default::default()
    };
    bed.guest.export(part).expect("a user of the pool");
    let handle = pool.handle;
    bed.guest.release(handle).expect("RELEASE");
    bed.guest.grant(Grant { handle, ..Default::default() }).refused(Status::Revoked);
}

/// [dev-grant-6] The grant that holds now decides, and replaces the one before.
#[test]
fn a_grant_replaces_the_one_before() {
    let mut bed = bed();
    let buffer = bed.exported(1);
    let mut client = bed.client();
    host_refused(client.acquire(uuid(&buffer), access::READ, false), Status::NoEnt);
    host_refused(client.acquire(Uuid::new_v4(), access::READ, false), Status::NoEnt);
    let grant = |access| Grant { handle: buffer.handle, access, ..Default::default() };
    bed.guest.grant(grant(READ_WRITE)).expect("GRANT");
    bed.guest.grant(grant(access::READ)).expect("GRANT");
    host_refused(client.acquire(uuid(&buffer), access::WRITE, false), Status::Access);
    host_refused(client.acquire(uuid(&buffer), READ_WRITE, false), Status::Access);
    let lease = client.acquire(uuid(&buffer), access::READ, false).expect("READ");
    assert_eq!(lease.access, access::READ);
    bed.guest.grant(grant(0)).expect("withdraw");
    bed.guest.grant(grant(0)).expect("withdraw what is not there");
    host_refused(client.acquire(uuid(&buffer), access::READ, false), Status::NoEnt);
    client.begin(lease.id, host_access(access::READ), SOON).expect("the lease lives on");
    bed.guest.grant(Grant { peer_id: peer::ANY, ..grant(READ_WRITE) }).expect("any peer");
    client.acquire(uuid(&buffer), access::WRITE, false).expect("the host is a peer");
}

/// [dev-grant-7]
#[test]
fn a_grant_may_end_by_itself() {
    let mut bed = bed();
    let buffer = bed.exported(1);
    let mut client = bed.client();
    let grant = Grant { handle: buffer.handle, lifetime_ms: 50, ..Default::default() };
    bed.guest.grant(grant).expect("GRANT");
    client.acquire(uuid(&buffer), access::READ, false).expect("in time");
    let gone = || client.acquire(uuid(&buffer), access::READ, false).is_err();
    assert!(wait_for(SOON, gone), "the grant outlived its time");
    bed.guest.grant(Grant { lifetime_ms: u64::MAX, ..grant }).expect("for ever and a day");
    std::thread::sleep(A_WHILE);
    client.acquire(uuid(&buffer), access::READ, false).expect("for ever and a day");
}

/// [dev-grant-8]
#[test]
fn once_is_once() {
    let mut bed = bed();
    let buffer = bed.exported(1);
    let mut client = bed.client();
    for peer_id in [peer::HOST, peer::ANY] {
        let flags = flag::GRANT_ONCE;
        let grant = Grant { handle: buffer.handle, peer_id, flags, ..Default::default() };
        bed.guest.grant(grant).expect("GRANT");
        host_refused(client.acquire(uuid(&buffer), 4, false), Status::Inval);
        let lease = client.acquire(uuid(&buffer), READ_WRITE, false).expect("the first");
        host_refused(client.acquire(uuid(&buffer), access::READ, false), Status::NoEnt);
        client.release(lease).expect("RELEASE");
        host_refused(client.acquire(uuid(&buffer), access::READ, false), Status::NoEnt);
    }
}

/// [dev-grant-9]
#[test]
fn force_voids_what_is_in_use() {
    let mut bed = bed();
    let buffer = bed.offered(1);
    let mut client = bed.client();
    let lease = acquire(&mut client, &buffer);
    client.begin(lease.id, host_access(READ_WRITE), SOON).expect("BEGIN");
    let flags = flag::GRANT_FORCE;
    let request = Grant { handle: buffer.handle, flags, access: 0, ..Default::default() };
    bed.guest.grant(request).expect("GRANT");
    host_refused(client.begin(lease.id, host_access(access::READ), SOON), Status::Revoked);
    host_refused(client.end(lease.id, host_access(READ_WRITE)), Status::Revoked);
    let write = Sync { timeout_ns: 0, ..sync(&buffer, flag::SYNC_WRITE) };
    bed.guest.begin(write).expect("its bits are gone with its rights");
    client.release(lease).expect("what is left to do");
}
