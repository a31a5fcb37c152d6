//! Sixty-four VMs of one daemon that may all share with each other: all that they hold is on the books, and
//! all of it comes back. BUFSHARE_CROWD is how many buffers each has (100 if unset), as far as the limit of
//! open files allows. A thousand each, with udmabuf:
//!
//!     cargo test --test crowd --no-run
//!     tests/vm/uml --timeout 300 --share target env BUFSHARE_CROWD=1000 target/debug/deps/crowd-HASH --nocapture

mod common;

use std::collections::{BTreeMap, BTreeSet};

use bufshare::host::client::Client;
use bufshare::limits::{FDS_OF_DAEMON, FDS_PER_VM};
use bufshare::protocol::{Opcode, State, Status, peer};
use common::*;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

const VMS: usize = 64;
/// Of each VM's buffers, those that are granted to all.
const FOR_ALL: usize = 3;

/// Buffers of each VM. The daemon inherits the limit that it is given here.
fn each() -> usize {
    let fixed = VMS as u64 * FDS_PER_VM + FDS_OF_DAEMON;
    let asked = std::env::var("BUFSHARE_CROWD").map_or(100, |text| text.parse().expect("a number"));
    let wanted = VMS as u64 * asked + fixed;
    let limit = getrlimit(Resource::Nofile);
    let more = Rlimit { current: Some(wanted), maximum: Some(wanted) };
    if limit.maximum.is_some_and(|most| most < wanted) && setrlimit(Resource::Nofile, more).is_err()
    {
        let lower = Rlimit { current: limit.maximum, ..limit };
        setrlimit(Resource::Nofile, lower).expect("up to the hard limit");
    }
    let most = getrlimit(Resource::Nofile).current.unwrap_or(wanted).saturating_sub(fixed);
    usize::try_from((most / VMS as u64).min(asked)).expect("fits")
}

struct Crowd {
    daemon: Daemon,
    guests: Vec<Guest>,
    /// Of each VM, handle and UUID.
    exports: Vec<Vec<(u64, [u8; 16])>>,
}

impl Crowd {
    fn gather() -> Crowd {
        let launch = Launch {
            vms: (0..VMS).map(|i| format!("name=vm{i},max-exports=1000")).collect(),
            args: ["--allow", "*:*"].map(String::from).to_vec(),
            ..Default::default()
        };
        let daemon = launch.start();
        let setup = || Setup {
            event_buffers: 64,
            regions: vec![Region { len: 64 << 20, ..Region::default() }],
            decline: 1 << bufshare::protocol::feature::PEERS,
            ..Default::default()
        };
        let guests = (0..VMS).map(|i| setup().connect(&daemon, &format!("vm{i}"))).collect();
        Crowd { daemon, guests, exports: vec![Vec::new(); VMS] }
    }

    fn stat(&self, name: &str) -> u64 {
        let mut client = Client::connect(&self.daemon.host_socket(), "crowd").expect("host socket");
        let stats = client.stats().expect("STATS");
        stats.into_iter().find(|(known, _)| known == name).expect("a counter").1
    }

    /// Every VM lends `each` buffers of a page to the next one, and some of them to all.
    fn lend(&mut self, each: usize) {
        for vm in 0..VMS {
            let next = self.guests[(vm + 1) % VMS].config.peer_id.get();
            let guest = &mut self.guests[vm];
            let page = guest.pages(1);
            for i in 0..each {
                let request = Export { segments: vec![(page, PAGE)], ..Default::default() };
                let export = guest.export(request).expect("EXPORT");
                let (handle, uuid) = (export.handle.get(), export.uuid);
                let peer_id = if i < FOR_ALL { peer::ANY } else { next };
                guest.grant(Grant { handle, peer_id, ..Default::default() }).expect("GRANT");
                self.exports[vm].push((handle, uuid));
            }
        }
    }

    /// What each VM hears until it has heard so many different things of a kind.
    fn hear(&mut self, vm: usize, kind: Opcode, count: usize) -> BTreeSet<[u8; 16]> {
        let mut heard = BTreeSet::new();
        while heard.len() < count {
            let event = self.guests[vm].event(SOON);
            let event = event.unwrap_or_else(|| panic!("VM {vm} heard {} of {count}", heard.len()));
            if Opcode::from_wire(event.kind.get()) == Some(kind) {
                assert!(heard.insert(event.uuid), "VM {vm} is told twice");
            }
        }
        heard
    }
}

#[test]
fn what_64_vms_hold_is_accounted() {
    let each = each();
    let mut crowd = Crowd::gather();
    let (fds, rss) = (crowd.daemon.fds(), crowd.daemon.rss_kib());
    let all = VMS * each;
    crowd.lend(each);
    let made = crowd.daemon.fds() - fds;
    assert_eq!(made, all, "one descriptor for each buffer");
    let books = |crowd: &Crowd| {
        ["buffers", "bytes_exported", "attachments", "mappings", "leases"]
            .map(|name| crowd.stat(name))
    };
    assert_eq!(books(&crowd), [all as u64, all as u64 * PAGE, 0, 0, 0]);

    // Everybody hears of what was granted to it, once, and of nothing else.
    for vm in 0..VMS {
        let before = (vm + VMS - 1) % VMS;
        let heard = crowd.hear(vm, Opcode::EvtOffered, each - FOR_ALL + FOR_ALL * (VMS - 1));
        let expected = (0..VMS).filter(|other| *other != vm).flat_map(|other| {
            let count = if other == before { each } else { FOR_ALL };
            crowd.exports[other].iter().take(count).map(|(_, uuid)| *uuid)
        });
        assert_eq!(heard, expected.collect());
    }

    // Everybody attaches what its neighbour lends.
    let mut attached = BTreeMap::new();
    for vm in 0..VMS {
        for (i, (_, uuid)) in crowd.exports[(vm + VMS - 1) % VMS].clone().into_iter().enumerate() {
            let guest = &mut crowd.guests[vm];
            let held = guest.attach(Attach { uuid, ..Default::default() }).expect("ATTACH");
            let handle = held.0.handle.get();
            attached.insert((vm, i), handle);
            if i == 0 {
                let at = guest.pages(1);
                let map = Map { handle, segments: vec![(at, PAGE)], ..Default::default() };
                guest.map(&map).expect("MAP");
            }
        }
    }
    let count = all as u64;
    assert_eq!(books(&crowd), [count, count * PAGE, count, VMS as u64, 0]);
    assert!(crowd.daemon.fds() - fds <= all + VMS, "an attachment holds no descriptor");
    // The guests' rings, which the daemon maps, count as well.
    let rss = (crowd.daemon.rss_kib() - rss) * 1024 / count;
    eprintln!("{rss} bytes of the daemon for each of {count} buffers");
    assert!(rss < 4096);

    // One half hands its attachments back; the other half loses them.
    for vm in 0..VMS {
        let owner = (vm + VMS - 1) % VMS;
        for (i, (export, _)) in crowd.exports[owner].clone().into_iter().enumerate() {
            let handle = attached[&(vm, i)];
            let used = crowd.guests[owner].query(export).expect("QUERY");
            assert_eq!((used.use_count.get(), used.nr_mappings.get()), (1, u32::from(i == 0)));
            if vm % 2 == 0 && i > 0 {
                crowd.guests[vm].detach(handle).expect("DETACH");
            }
            let released = crowd.guests[owner].release_force(export).expect("RELEASE");
            assert_eq!(State::from_wire(released.state.get()), Some(State::Released));
        }
    }
    for vm in (1..VMS).step_by(2) {
        crowd.hear(vm, Opcode::EvtRevoked, each);
    }
    let dead = (VMS / 2 * each + VMS / 2) as u64;
    assert_eq!(books(&crowd), [0, 0, dead, VMS as u64, 0]);
    for vm in 0..VMS {
        let first = attached[&(vm, 0)];
        crowd.guests[vm].detach(first).expect("DETACH");
        crowd.guests[vm].query(first).refused(Status::NoEnt);
        crowd.guests[vm].reconnect();
    }
    assert!(wait_for(SOON, || books(&crowd) == [0; 5]), "{:?}", books(&crowd));
    let settled = wait_for(SOON, || crowd.daemon.fds() <= fds);
    assert!(settled, "{} descriptors, {fds} before", crowd.daemon.fds());
}

#[test]
fn a_limit_of_open_files_that_is_too_low_is_told_at_the_start() {
    let vms = vec!["name=a,max-exports=4294967295".into(), "name=b,max-exports=10".into()];
    let daemon = Launch { vms, ..Default::default() }.start();
    let needed = 4_294_967_295 + 10 + 2 * FDS_PER_VM + FDS_OF_DAEMON;
    let log = daemon.log();
    assert!(log.contains(&format!("may need {needed}")) && log.contains("max-exports"), "{log}");
    let vms = vec!["name=a,max-exports=10".into()];
    let daemon = Launch { vms, ..Default::default() }.start();
    assert!(!daemon.log().contains("LimitNOFILE"), "{}", daemon.log());
}
