//! A stuck buffer is explained by one command: who has a right to it, who has merely got hold of it, and
//! who waits for whom.

use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use bufshare::host::client::{Access, Client};
use bufshare::host::holders::{Holder, Report};
use bufshare::host::wire::HolderKind;
use bufshare::ioctl::Mapping;
use bufshare::protocol::{Line, Mode, RespSync, State, Status, flag, vq};
use serde_json::Value;
use uuid::Uuid;

use crate::common::{
    Attach, Daemon, Export, Grant, Guest, Launch, Map, PAGE, Point, Refused, Setup, Sync, name,
    wait_for,
};
use crate::desk::{READ, WRITE};
use crate::programs::{NOBODY, SOON, ctl, json};

const MAPS: &str = "BUFSHARE_TEST_MAPS_STDIN";

/// In a process of its own: maps the memory that is its standard input, closes it, and stays.
#[test]
fn a_process_that_maps_what_it_was_given() {
    if std::env::var_os(MAPS).is_none() {
        return;
    }
    let memory = bufshare::ioctl::adopt_fd(0).unwrap();
    let mapping = Mapping::new(&memory, PAGE as usize, false).unwrap();
    drop(memory);
    println!("\nmapped {} bytes", mapping.len());
    std::thread::sleep(Duration::from_secs(600));
}

struct Bed {
    daemon: Daemon,
    a: Guest,
    b: Guest,
    /// a's handle and b's, mapped twice, of one buffer that is offered to the host, too.
    export: u64,
    attachment: u64,
    uuid: Uuid,
}

fn bed() -> Bed {
    let launch = Launch {
        vms: ["name=a", "name=b"].map(String::from).to_vec(),
        args: ["--allow", "a:b", "--host-uid", "65534"].map(String::from).to_vec(),
        ..Default::default()
    };
    let daemon = launch.start();
    let [mut a, mut b] = ["a", "b"].map(|vm| Setup::default().connect(&daemon, vm));
    let (export, uuid) = share(&mut a, &mut b, "frame");
    a.grant(Grant { handle: export, ..Default::default() }).expect("GRANT");
    let attached = b.attach(Attach { uuid: uuid.into_bytes(), ..Default::default() });
    let attachment = attached.expect("ATTACH").0.handle.get();
    for _ in 0..2 {
        let segments = vec![(b.pages(1), PAGE)];
        b.map(&Map { handle: attachment, segments, ..Default::default() }).expect("MAP");
    }
    Bed { daemon, a, b, export, attachment, uuid }
}

/// A buffer that is granted to the other VM and not to the host.
fn share(a: &mut Guest, b: &mut Guest, called: &str) -> (u64, Uuid) {
    let segments = vec![(a.pages(1), PAGE)];
    let request = Export { segments, name: name(called), ..Default::default() };
    let export = a.export(request).expect("EXPORT");
    let (handle, peer_id) = (export.handle.get(), b.config.peer_id.get());
    a.grant(Grant { handle, peer_id, ..Default::default() }).expect("GRANT");
    (handle, Uuid::from_bytes(export.uuid))
}

fn told(client: &mut Client, uuid: Uuid, kind: HolderKind) -> Holder {
    let mut holders = client.holders(uuid).expect("HOLDERS").holders;
    holders.retain(|holder| holder.kind == Some(kind));
    assert_eq!(holders.len(), 1, "{holders:?}");
    holders.remove(0)
}

fn only(client: &mut Client) -> Report {
    let mut all = client.inspect().expect("INSPECT");
    assert_eq!(all.len(), 1);
    all.remove(0)
}

fn text(bed: &Bed) -> String {
    let output = ctl(&bed.daemon, &["info", "frame"]);
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[track_caller]
fn says(text: &str, line: &str) {
    assert!(text.lines().any(|l| l.contains(line)), "{line:?} is not in\n{text}");
}

fn end(mut child: Child) {
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn whoever_holds_a_buffer_is_named() {
    let mut bed = bed();
    let mut client = Client::connect(&bed.daemon.host_socket(), "show").unwrap();
    let before = only(&mut client);
    assert_eq!((before.state, before.leases), (Some(State::InUse), 0));
    assert_eq!((before.attachments, before.mappings, before.waits), (1, 2, 0));
    let lease = client.acquire(bed.uuid, READ, false).unwrap();
    let holder = told(&mut client, bed.uuid, HolderKind::Lease);
    assert_eq!((holder.number, holder.pid), (lease.id, std::process::id()));
    assert_eq!((holder.name.as_str(), holder.access, holder.mappings), ("show", READ, 0));
    let holder = told(&mut client, bed.uuid, HolderKind::Attachment);
    assert_eq!((holder.name.as_str(), holder.number), ("b", bed.attachment));
    assert_eq!((holder.peer, holder.mappings), (bed.b.config.peer_id.get(), 2));
    let holder = told(&mut client, bed.uuid, HolderKind::Exporter);
    assert_eq!((holder.name.as_str(), holder.number), ("a", bed.export));

    // One process that got the descriptor, and one that has it mapped and nothing else.
    let stdin = || Stdio::from(lease.fd.try_clone().unwrap());
    let keeps = Command::new("sleep").arg("600").stdin(stdin()).spawn().unwrap();
    let mut maps = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "holders::a_process_that_maps_what_it_was_given", "--nocapture"])
        .env(MAPS, "1")
        .stdin(stdin())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(maps.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().starts_with("mapped")));
    let (me, keeper, mapper) = (std::process::id(), keeps.id(), maps.id());
    let shown = text(&bed);
    says(&shown, &format!("pid {me} show, lease {}, read, since", lease.id));
    says(&shown, "VM b, 2 mappings, read+write, since");
    says(&shown, &format!("pid {keeper} sleep without a lease: 1 fd"));
    says(&shown, &format!("pid {mapper} "));
    says(&shown, "without a lease: 1 mapping");
    assert!(!shown.contains("more reference"), "{shown}");
    let document = json(&ctl(&bed.daemon, &["info", "frame", "--json"]));
    let processes: Vec<&Value> = document["processes"].as_array().unwrap().iter().collect();
    let of = |pid: u32| processes.iter().find(|process| process["pid"] == pid).unwrap();
    assert_eq!((&of(keeper)["fds"], &of(keeper)["mappings"]), (&1.into(), &0.into()));
    assert_eq!((&of(mapper)["fds"], &of(mapper)["mappings"]), (&0.into(), &1.into()));
    if !document["references"].is_null() {
        assert_eq!(document["references"], 3, "a dma-buf counts them");
    }
    end(keeps);
    end(maps);
    // What is wanted back and does not come.
    bed.a.release(bed.export).expect("RELEASE");
    says(&text(&bed), if lease.mode == Mode::Copy { "released" } else { "wants it back" });
    client.release(lease).unwrap();
}

/// A program that lends memory to a VM is named as its exporter.
#[test]
fn a_program_that_lends_is_named() {
    let launch = Launch { args: vec!["--allow".into(), "host:a".into()], ..Default::default() };
    let daemon = launch.start();
    let mut client = Client::connect(&daemon.host_socket(), "lender").unwrap();
    let (export, _memory) = crate::lend::lend(&mut client, 1, READ);
    let mut guest = Setup::default().connect(&daemon, "a");
    let attach = Attach { uuid: export.uuid.into_bytes(), access: READ, ..Default::default() };
    guest.attach(attach).expect("ATTACH");
    let holder = told(&mut client, export.uuid, HolderKind::Exporter);
    assert_eq!((holder.name.as_str(), holder.pid), ("lender", std::process::id()));
    let shown = ctl(&daemon, &["info", "picture"]);
    let shown = String::from_utf8(shown.stdout).unwrap();
    let me = std::process::id();
    says(&shown, &format!("its exporter pid {me} lender, read, since"));
    says(&shown, "VM a, 0 mappings, read, since");
    assert!(!shown.contains("without a lease"), "{shown}");
}

#[test]
fn who_waits_for_whom_is_told() {
    let mut bed = bed();
    let mut client = Client::connect(&bed.daemon.host_socket(), "show").unwrap();
    let lease = client.acquire(bed.uuid, READ, false).unwrap();
    client.begin(lease.id, Access::READ, SOON).unwrap();
    let begin = |handle, flags| {
        Sync { handle, flags, timeout_ns: 10_000_000_000, ..Default::default() }.bytes()
    };
    bed.b.sync_start::<RespSync>(&begin(bed.attachment, flag::SYNC_WRITE));
    assert!(wait_for(SOON, || only(&mut client).waits == 1));
    bed.a.sync_start::<RespSync>(&begin(bed.export, flag::SYNC_READ));
    assert!(wait_for(SOON, || only(&mut client).waits == 2));
    let [a, b, lease] = [HolderKind::Exporter, HolderKind::Attachment, HolderKind::Lease]
        .map(|kind| told(&mut client, bed.uuid, kind));
    assert_eq!((lease.holds, lease.waits, lease.place), (READ, 0, 0));
    assert_eq!((b.holds, b.waits, b.place), (0, WRITE, 1));
    assert_eq!((a.holds, a.waits, a.place), (0, READ, 2));
    assert!(b.waits_for(&lease) && !b.waits_for(&a) && !b.waits_for(&b));
    assert!(a.waits_for(&b) && !a.waits_for(&lease) && !lease.waits_for(&b));
    let shown = text(&bed);
    says(&shown, "VM b to write, for ");
    says(&shown, &format!("for pid {} show, which holds read", std::process::id()));
    says(&shown, "its exporter a to read, for ");
    says(&shown, "for VM b, which waits before it");
    let top = ctl(&bed.daemon, &["top", "-n", "2", "-d", "0.1"]);
    let shown = String::from_utf8(top.stdout).unwrap();
    assert_eq!(shown.matches("1 buffers, 4 KiB").count(), 2, "{shown}");
    assert_eq!(shown.matches("VM b to write").count(), 2, "{shown}");
    let top = json(&ctl(&bed.daemon, &["top", "-n", "1", "--json"]));
    assert_eq!((&top[0]["waits"], &top[0]["mappings"]), (&2.into(), &2.into()));
}

#[test]
fn who_waits_for_a_point_is_told() {
    let mut bed = bed();
    let mut client = Client::connect(&bed.daemon.host_socket(), "show").unwrap();
    let lease = client.acquire(bed.uuid, READ, false).unwrap();
    bed.a.signal(Point::new(bed.export, Line::Acquire, 5)).expect("POINT_SIGNAL");
    bed.b.signal(Point::new(bed.attachment, Line::Release, 4)).expect("POINT_SIGNAL");
    client.signal(lease.id, Line::Release, 2, Status::Ok).unwrap();
    let patient = |handle, line, point| Point {
        timeout_ns: 10_000_000_000,
        ..Point::new(handle, line, point)
    };
    bed.a.start_wait(patient(bed.export, Line::Release, 4));
    bed.b.start_wait(patient(bed.attachment, Line::Acquire, 8));
    bed.b.start_wait(patient(bed.attachment, Line::Acquire, 7));
    let own = client.submit_wait(lease.id, Line::Release, 9, SOON).unwrap();
    assert!(wait_for(SOON, || only(&mut client).waits == 4));
    assert_eq!(client.holders(bed.uuid).unwrap().acquired, 5);
    let kinds = [HolderKind::Exporter, HolderKind::Attachment, HolderKind::Lease];
    let [a, b, held] = kinds.map(|kind| told(&mut client, bed.uuid, kind));
    assert_eq!((a.acquire_point, a.release_point, a.released), (0, 4, 0));
    assert_eq!((b.acquire_point, b.release_point, b.released), (7, 0, 4), "the next one");
    assert_eq!((held.acquire_point, held.release_point, held.released), (0, 9, 2));
    assert!([&a, &b].iter().all(|one| (1..=10).contains(&one.points_left.as_secs())));
    assert!(held.points_left <= SOON, "{:?}", held.points_left);
    assert!(a.awaits_point_of(&held) && !a.awaits_point_of(&b) && !a.awaits_point_of(&a));
    assert!(b.awaits_point_of(&a) && !b.awaits_point_of(&held) && !b.awaits_point_of(&b));
    assert!(kinds.map(|kind| told(&mut client, bed.uuid, kind).waits) == [0; 3], "no BEGIN");
    let (shown, me) = (text(&bed), std::process::id());
    says(&shown, "its exporter a for point 4 of RELEASE, for ");
    says(&shown, &format!("for pid {me} show, which is at 2"));
    says(&shown, "VM b for point 7 of ACQUIRE, which is at 5, for ");
    says(&shown, "for its exporter a");
    says(&shown, &format!("pid {me} show for point 9 of RELEASE, for "));
    says(&shown, "for itself");
    let document = json(&ctl(&bed.daemon, &["info", "frame", "--json"]));
    let holders = document["holders"].as_array().unwrap();
    let exporter = holders.iter().find(|one| one["kind"] == "exporter").unwrap();
    assert_eq!(exporter["waits_for_points_of"][0]["number"], lease.id);
    assert_eq!((&document["acquired"], &exporter["release_point"]), (&5.into(), &4.into()));
    // Nobody waits any more, and nothing is left of it.
    client.signal(lease.id, Line::Release, 9, Status::Ok).unwrap();
    bed.a.start_signal(Point::new(bed.export, Line::Acquire, 8));
    assert!(wait_for(SOON, || only(&mut client).waits == 0));
    assert_eq!(client.take_reached(own).unwrap(), Some(9));
    assert!(!text(&bed).contains("for point"));
}

#[test]
fn refusals_are_counted_by_what_was_asked_and_why() {
    let mut bed = bed();
    let mut client = Client::connect(&bed.daemon.host_socket(), "show").unwrap();
    for _ in 0..3 {
        bed.a.query(99).refused(Status::NoEnt);
    }
    bed.b.attach(Attach { access: 0, ..Default::default() }).refused(Status::Inval);
    bed.a.raw(vq::CONTROL, &[&[0xff; 16]], &[8]);
    client.acquire(Uuid::nil(), READ, false).unwrap_err();
    let lease = client.acquire(bed.uuid, READ, false).unwrap();
    bed.a
        .begin(Sync { handle: bed.export, flags: flag::SYNC_WRITE, ..Default::default() })
        .unwrap();
    client.begin(lease.id, Access::READ, Duration::from_millis(1)).unwrap_err();
    let stats = client.stats().unwrap();
    let mut refusals: Vec<_> =
        stats.iter().filter(|(name, _)| name.contains("refused")).cloned().collect();
    refusals.sort();
    let expected = [
        ("host_refused_acquire_noent", 1),
        ("host_refused_sync_timedout", 1),
        ("refused_attach_inval", 1),
        ("refused_other_unsupp", 1),
        ("refused_query_noent", 3),
    ];
    assert_eq!(refusals, expected.map(|(name, count)| (name.to_owned(), count)));
}

/// Only root and the daemon's user see what VMs share with each other.
#[test]
fn another_user_sees_what_the_host_may_use() {
    let mut bed = bed();
    share(&mut bed.a, &mut bed.b, "secret");
    if !rustix::process::geteuid().is_root() {
        crate::common::skip("to become another user one has to be root");
        return;
    }
    let at =
        tempfile::Builder::new().permissions(PermissionsExt::from_mode(0o755)).tempdir().unwrap();
    let program = at.path().join("bufsharectl");
    let mut copy = Command::new("cp");
    assert!(copy.arg(env!("CARGO_BIN_EXE_bufsharectl")).arg(&program).status().unwrap().success());
    std::fs::set_permissions(bed.daemon.dir(), PermissionsExt::from_mode(0o755)).unwrap();
    let names = |uid: u32| -> Vec<String> {
        let mut command = Command::new(&program);
        command.arg("--host-socket").arg(bed.daemon.host_socket());
        let output = command.args(["top", "-n", "1", "--json"]).uid(uid).gid(uid).output().unwrap();
        let all = json(&output);
        let mut names: Vec<String> = all
            .as_array()
            .unwrap()
            .iter()
            .map(|one| one["name"].as_str().unwrap().into())
            .collect();
        names.sort();
        names
    };
    assert_eq!(names(0), ["frame", "secret"]);
    assert_eq!(names(NOBODY), ["frame"]);
}
