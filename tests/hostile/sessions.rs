//! A VMM that hangs up in the middle of a word, or takes memory away that is in use.

use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use super::*;
use vhost::VhostBackend;

/// Connections that end in the middle of a word, and words that nobody says.
#[test]
fn half_sessions() {
    attack(16, |daemon, guest| {
        guest.disconnect();
        let mut random = Random(0x5eed);
        for round in 0..60u32 {
            let mut socket = UnixStream::connect(daemon.socket("a")).expect("connect");
            // A vhost-user header: request, version 1 with need-reply, size of the body.
            let request = random.below(48) as u32;
            let size = random.pick(&[0, 8, 12, 40, 256, 5000, u32::MAX]);
            let mut message: Vec<u8> = [request, 0x9, size].map(u32::to_le_bytes).concat();
            let body = random.below(300) as usize;
            message.extend(random.bytes(body));
            let len = random.below(message.len() as u64 + 1) as usize;
            // It may hang up in the middle of it.
            let _ = socket.write_all(&message[..len]);
            if round % 2 == 0 {
                let _ = socket.shutdown(Shutdown::Write);
            }
        }
        guest.reconnect();
        guest.export_pages(1);
    });
}

/// A VMM that takes away the memory in which the rings are, and gives it back.
#[test]
fn memory_that_comes_and_goes() {
    let region = |i: u64| Region { start: BASE + (i << 30), len: 1 << 20, ..Default::default() };
    attack(64, |_, guest| {
        guest.memory.plug(&region(1));
        let both = guest.memory.table();
        let other: Vec<_> = both[1..].to_vec();
        for _ in 0..20 {
            let frontend = guest.frontend();
            frontend.set_mem_table(&other).expect("SET_MEM_TABLE");
            guest.control_ring().kick();
            guest.sync_ring().kick();
            frontend.set_mem_table(&both).expect("SET_MEM_TABLE");
            guest.query(1).refused(Status::NoEnt);
        }
        guest.memory.unplug(&region(1));
        guest.send_memory_table();
    });
}

/// Memory whose file a VMM cuts off while it is on loan: no page is there to be copied, which is an
/// error of this buffer and of nothing else.
#[test]
fn memory_that_is_cut_off() {
    let vms = vec!["name=a,unsealed-ram".into(), "name=b".into()];
    let daemon = Launch { vms, ..Default::default() }.start();
    let loose = Region { start: BASE + (1 << 30), len: 1 << 20, ..Region::unsealed() };
    let setup = Setup { regions: vec![Region::default(), loose], ..Default::default() };
    let mut guest = setup.connect(&daemon, "a");
    let segments = vec![(loose.start, 16 * PAGE)];
    let export = guest.export(Export { segments, ..Default::default() }).expect("EXPORT");
    let handle = export.handle.get();
    let write = Sync { handle, flags: flag::SYNC_WRITE, ..Default::default() };
    guest.begin(write).expect("BEGIN");
    guest.end(write).expect("END");
    guest.memory.truncate(&loose);
    let refusal = guest.end(write).expect_err("nothing is there to be copied");
    assert!([Status::Io, Status::Fault].contains(&refusal.status), "{refusal:?}");
    assert_eq!(guest.query(handle).expect("QUERY").generation.get(), 1);
    guest.release_force(handle).expect("RELEASE");
    guest.export_pages(1);
    Guest::connect(&daemon, "b").export_pages(1);
}

/// CPU time of the daemon so far, in ticks of 10 ms.
fn cpu_ticks(daemon: &Daemon) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", daemon.pid())).expect("it lives");
    let (_, fields) = stat.rsplit_once(") ").expect("a name in parentheses");
    fields.split(' ').skip(11).take(2).map(|ticks| ticks.parse::<u64>().expect("a number")).sum()
}

#[test]
fn without_descriptors_it_waits_and_does_not_spin() {
    use bufshare::host::client::Client;
    use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};
    let daemon = Daemon::start(&["a"]);
    // It has started when it answers.
    Client::connect(&daemon.host_socket(), "first").expect("a client");
    let pid = Pid::from_raw(i32::try_from(daemon.pid()).expect("a pid"));
    let none = Rlimit { current: Some(3), ..getrlimit(Resource::Nofile) };
    let before = prlimit(pid, Resource::Nofile, none).expect("prlimit");
    let path = daemon.host_socket();
    let waiting = thread::spawn(move || Client::connect(&path, "patient").is_ok());
    thread::sleep(Duration::from_millis(100));
    let ticks = cpu_ticks(&daemon);
    thread::sleep(Duration::from_secs(1));
    let used = cpu_ticks(&daemon) - ticks;
    let log = daemon.log().lines().count();
    prlimit(pid, Resource::Nofile, before).expect("prlimit");
    assert!(used < 10, "{used} of 100 ticks");
    assert!(log < 30, "{log} lines");
    assert!(waiting.join().expect("no panic"), "it is served when there are descriptors again");
    Guest::connect(&daemon, "a").export_pages(1);
}
