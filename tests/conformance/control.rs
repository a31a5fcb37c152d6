//! QUERY, SET_NAME, QUERY_LINGER, PEER_INFO, CANCEL, and handles in general.

use super::*;
use bufshare::protocol::{Opcode, RespSync, State, flag, peer};

/// [dev-handle-3]
#[test]
fn handles_are_an_endpoints_own() {
    let daemon = Daemon::start(&["a", "b"]);
    let mut other = Guest::connect(&daemon, "b");
    for _ in 0..3 {
        other.export_pages(1);
    }
    let (foreign, _) = other.export_pages(1);
    let mut guest = Guest::connect(&daemon, "a");
    let (gone, _) = guest.export_pages(1);
    guest.release(gone.handle.get()).expect("RELEASE");
    for handle in [0, gone.handle.get(), foreign.handle.get(), 4711, u64::MAX] {
        guest.query(handle).refused(Status::NoEnt);
        guest.release(handle).refused(Status::NoEnt);
        guest.release_force(handle).refused(Status::NoEnt);
        guest.set_name(handle, name("x")).refused(Status::NoEnt);
        guest.grant(Grant { handle, ..Default::default() }).refused(Status::NoEnt);
        guest.cancel(handle, 0).refused(Status::NoEnt);
        let request = Sync { handle, flags: flag::SYNC_READ, ..Default::default() };
        guest.begin(request).refused(Status::NoEnt);
        guest.end(request).refused(Status::NoEnt);
    }
    other.query(foreign.handle.get()).expect("it is b's");
}

/// [dev-query-1] [dev-query-2] [dev-query-4]
#[test]
fn query_tells_state_and_users() {
    let mut bed = bed();
    let buffer = bed.offered(3);
    let mut query = || bed.guest.query(buffer.handle).expect("QUERY");
    let fresh = query();
    assert_eq!(fresh.state.get(), State::Exported.to_wire());
    assert_eq!((fresh.use_count.get(), fresh.nr_mappings.get()), (0, 0));
    assert_eq!((fresh.size.get(), fresh.generation.get()), (3 * PAGE, 0));
    assert_eq!((fresh.access.get(), fresh.uuid), (READ_WRITE, buffer.uuid));
    assert_eq!(query(), fresh);
    let mut client = bed.client();
    let mut leases = Vec::new();
    for count in 1..4 {
        leases.push(acquire(&mut client, &buffer));
        let answer = bed.guest.query(buffer.handle).expect("QUERY");
        assert_eq!(answer.state.get(), State::InUse.to_wire());
        assert_eq!(answer.use_count.get(), count);
    }
    for lease in leases {
        client.release(lease).expect("RELEASE");
    }
    let idle = || bed.guest.query(buffer.handle).is_ok_and(|answer| answer == fresh);
    assert!(wait_for(SOON, idle), "nobody uses it");
}

/// [dev-query-3]
#[test]
fn query_counts_what_the_host_still_holds() {
    let mut bed = bed();
    let buffer = bed.offered(1);
    if buffer.mode != Mode::ZeroCopy {
        skip("no udmabuf on this host");
        return;
    }
    let mut client = bed.client();
    let leases = [acquire(&mut client, &buffer), acquire(&mut client, &buffer)];
    let kept = leases[0].fd.try_clone().expect("dup");
    for lease in leases {
        client.release(lease).expect("RELEASE");
    }
    let mut count = || bed.guest.query(buffer.handle).expect("QUERY").use_count.get();
    assert_eq!(count(), 1, "one, however many there are");
    drop(kept);
    assert!(wait_for(SOON, || count() == 0), "nobody uses it");
}

/// [dev-name-1] [dev-name-2]
#[test]
fn exports_can_be_renamed() {
    let mut bed = bed();
    let buffer = bed.offered(1);
    let mut behind_nul = name("a");
    behind_nul[9] = 1;
    for name in [[0xfe; 32], behind_nul] {
        bed.guest.set_name(buffer.handle, name).refused(Status::Inval);
    }
    for text in ["first", "", "exactly thirty-two bytes of text"] {
        bed.guest.set_name(buffer.handle, name(text)).expect("SET_NAME");
        assert_eq!(bed.client().list().expect("LIST")[0].name, text);
    }
}

/// [dev-linger-1] [dev-linger-2] [dev-reset-6] [dev-event-7]
#[test]
fn what_outlives_its_session_lingers() {
    let mut bed = bed();
    bed.guest.query_linger(0).refused(Status::NoEnt);
    let buffer = bed.offered(2);
    let idle = bed.offered(1);
    let mut client = bed.client();
    let lease = acquire(&mut client, &buffer);
    bed.guest.reset(Stop::WithBase);
    bed.guest.query(idle.handle).refused(Status::NoEnt);
    bed.guest.expect_event(Opcode::EvtResync);
    let lingering = bed.guest.read_config().lingering.get();
    if buffer.mode == Mode::Copy {
        assert_eq!(lingering, 0, "a copy is not the exporter's memory");
        bed.guest.query_linger(0).refused(Status::NoEnt);
        return;
    }
    assert_eq!(lingering, 1);
    let answer = bed.guest.query_linger(0).expect("QUERY_LINGER");
    assert_eq!((answer.uuid, answer.size.get()), (buffer.uuid, buffer.size));
    assert_eq!(answer.state.get(), State::Releasing.to_wire());
    bed.guest.query_linger(1).refused(Status::NoEnt);
    client.release(lease).expect("RELEASE");
    bed.guest.expect_event(Opcode::EvtResync);
    assert_eq!(bed.guest.read_config().lingering.get(), 0);
    bed.guest.query_linger(0).refused(Status::NoEnt);
}

/// [dev-peer-1] [dev-peer-2] [dev-peer-3] [dev-peer-4]
#[test]
fn peers_are_those_with_whom_policy_lets_share() {
    let launch = Launch {
        vms: ["a", "b", "c", "d"].map(|vm| format!("name={vm}")).to_vec(),
        args: ["--allow", "a:b", "--allow", "c:a"].map(String::from).to_vec(),
        ..Default::default()
    };
    let daemon = launch.start();
    let mut a = Guest::connect(&daemon, "a");
    let b = Guest::connect(&daemon, "b");
    let mut d = Guest::connect(&daemon, "d");
    let mut peers = std::collections::BTreeMap::new();
    for index in 0.. {
        let Ok(info) = a.peer_info(index) else { break };
        assert_eq!(info.nr_peers.get(), 3);
        let name = String::from_utf8(info.name.to_vec()).expect("UTF-8");
        peers.insert(name.trim_end_matches('\0').to_owned(), info);
    }
    assert_eq!(peers.keys().collect::<Vec<_>>(), ["b", "c", "host"]);
    assert_eq!(peers["host"].peer_id.get(), peer::HOST);
    assert_eq!(peers["b"].peer_id, b.config.peer_id);
    assert_eq!(peers["b"].epoch, b.config.epoch);
    let online = |name: &str| peers[name].flags.get() & peer::F_ONLINE != 0;
    assert!(online("host") && online("b") && !online("c"));
    a.peer_info(3).refused(Status::NoEnt);
    a.peer_info(u32::MAX).refused(Status::NoEnt);
    let only = d.peer_info(0).expect("PEER_INFO");
    assert_eq!((only.nr_peers.get(), only.peer_id.get()), (1, peer::HOST));
    d.peer_info(1).refused(Status::NoEnt);
}

/// A pending BEGIN of the guest with this cookie.
fn start(bed: &mut Bed, buffer: &Buffer, cookie: u32) -> u16 {
    let request = Sync { cookie, timeout_ns: u64::MAX, ..sync(buffer, flag::SYNC_READ) };
    bed.guest.sync_start::<RespSync>(&request.bytes())
}

#[track_caller]
fn next(bed: &mut Bed) -> (u16, Reply<RespSync>) {
    bed.guest.sync_next(SOON).expect("a request ends")
}

/// [dev-cancel-1] [dev-cancel-2] [dev-cancel-3]
#[test]
fn cancel_ends_what_it_names() {
    let mut bed = bed();
    let (one, two) = (bed.offered(1), bed.offered(1));
    let mut client = bed.client();
    let leases = [acquire(&mut client, &one), acquire(&mut client, &two)];
    for lease in &leases {
        client.begin(lease.id, host_access(READ_WRITE), SOON).expect("BEGIN");
    }
    bed.guest.cancel(one.handle, 0).refused(Status::NoEnt);
    bed.guest.cancel(one.handle, 5).refused(Status::NoEnt);
    let heads = [5, 6, 5, 7].map(|cookie| start(&mut bed, &one, cookie));
    let other = start(&mut bed, &two, 5);
    assert!(bed.guest.sync_next::<RespSync>(A_WHILE).is_none(), "all wait");
    bed.guest.cancel(one.handle, 8).refused(Status::NoEnt);
    bed.guest.cancel(one.handle, 5).expect("CANCEL");
    let mut ended = [next(&mut bed), next(&mut bed)].map(|(head, reply)| {
        reply.refused(Status::Canceled);
        head
    });
    ended.sort_unstable();
    let mut named = [heads[0], heads[2]];
    named.sort_unstable();
    assert_eq!(ended, named);
    bed.guest.cancel(one.handle, 5).refused(Status::NoEnt);
    bed.guest.cancel(one.handle, 0).expect("the rest");
    for _ in 0..2 {
        next(&mut bed).1.refused(Status::Canceled);
    }
    assert!(bed.guest.sync_next::<RespSync>(A_WHILE).is_none(), "the other buffer waits");
    client.end(leases[1].id, host_access(READ_WRITE)).expect("END");
    let (head, reply) = next(&mut bed);
    assert_eq!(head, other);
    reply.expect("it was not canceled");
    // What was canceled holds nothing: the client can write again at once.
    client.try_begin(leases[0].id, host_access(READ_WRITE)).expect("no bits of the guest");
}
