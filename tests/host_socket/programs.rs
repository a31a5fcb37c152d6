//! The real daemon, a guest, and programs as processes of their own: who may connect, what the tools
//! print, and what is left of a program that was killed.

use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use bufshare::host::client::Client;
use bufshare::host::wire::FdKind;
use bufshare::ioctl::Mapping;
use bufshare::protocol::{Image, Mode, Opcode, metadata};
use serde_json::Value;
use uuid::Uuid;
use zerocopy::{FromBytes, IntoBytes};

use crate::common::{
    Attach, Daemon, Export, Grant, Guest, Launch, Map, PAGE, Sync, name, skip, wait_for,
};
use crate::desk::READ;

pub const NOBODY: u32 = 65534;
const WIDTH: u32 = 64;
const HEIGHT: u32 = 32;
pub const SOON: Duration = Duration::from_secs(10);

/// Exports an XR24 image of two pages, drawn and complete, and grants READ to the host.
fn draw(guest: &mut Guest) -> (u64, Uuid, Mode, u64) {
    let addr = guest.pages(2);
    let mut image = Image {
        fourcc: u32::from_le_bytes(*b"XR24").into(),
        nr_planes: 1.into(),
        width: WIDTH.into(),
        height: HEIGHT.into(),
        ..Default::default()
    };
    image.planes[0].stride = (WIDTH * 4).into();
    let request = Export {
        segments: vec![(addr, 2 * PAGE)],
        metadata_type: metadata::IMAGE,
        metadata: image.as_bytes().to_vec(),
        name: name("frame"),
        ..Default::default()
    };
    let export = guest.export(request).expect("EXPORT");
    let handle = export.handle.get();
    for pixel in 0..WIDTH * HEIGHT {
        guest
            .memory
            .write(addr + u64::from(pixel) * 4, &(0x0001_0203 * (pixel % 85)).to_le_bytes());
    }
    let write = bufshare::protocol::flag::SYNC_WRITE;
    guest.end(Sync { handle, flags: write, ..Default::default() }).expect("END");
    guest.grant(Grant { handle, access: READ, ..Default::default() }).expect("GRANT");
    let mode = Mode::from_wire(export.mode.get()).expect("a known mode");
    (handle, Uuid::from_bytes(export.uuid), mode, addr)
}

pub fn ctl(daemon: &Daemon, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bufsharectl"));
    command.arg("--host-socket").arg(daemon.host_socket()).args(args).output().unwrap()
}

pub fn json(output: &Output) -> Value {
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn the_tool_shows_what_a_guest_offers() {
    let daemon = Daemon::start(&["a"]);
    let mut guest = Guest::connect(&daemon, "a");
    let empty = ctl(&daemon, &["list"]);
    assert_eq!(String::from_utf8_lossy(&empty.stdout), "no buffer is offered to the host\n");
    let (_, uuid, mode, _) = draw(&mut guest);

    let listed = json(&ctl(&daemon, &["list", "--json"]));
    assert_eq!(listed.as_array().unwrap().len(), 1);
    let record = &listed[0];
    assert_eq!(record["uuid"], uuid.to_string());
    assert_eq!((&record["name"], &record["exporter_name"]), (&"frame".into(), &"a".into()));
    assert_eq!((&record["mode"], &record["access"]), (&mode.name().into(), &"read".into()));
    assert_eq!((&record["image"]["format"], &record["generation"]), (&"XR24".into(), &1.into()));
    let table = ctl(&daemon, &["list"]);
    let table = String::from_utf8(table.stdout).unwrap();
    assert!(table.lines().next().unwrap().starts_with("NAME"), "{table}");
    assert!(table.contains("64x32 XR24"), "{table}");

    let info = json(&ctl(&daemon, &["info", "frame", "--json"]));
    assert_eq!((&info["nr_leases"], &info["size"]), (&0.into(), &(2 * PAGE).into()));
    let stats = json(&ctl(&daemon, &["stats", "--json"]));
    assert_eq!(stats["buffers"], 1);
    let copied = if mode == Mode::ZeroCopy { 0 } else { 2 * PAGE };
    assert_eq!(stats["bytes_copied"], copied);

    assert_eq!(ctl(&daemon, &["info", "other"]).status.code(), Some(4));
    assert_eq!(ctl(&daemon, &["nonsense"]).status.code(), Some(2));
    let mut lost = Command::new(env!("CARGO_BIN_EXE_bufsharectl"));
    let lost = lost.args(["--host-socket", "/nonexistent/host.sock", "list"]).output().unwrap();
    assert_eq!(lost.status.code(), Some(3));
    let text = String::from_utf8(lost.stderr).unwrap();
    assert!(text.contains("is the daemon running"), "{text}");
}

#[test]
fn the_tool_dumps_exactly_what_was_drawn() {
    let daemon = Daemon::start(&["a"]);
    let mut guest = Guest::connect(&daemon, "a");
    let (handle, uuid, ..) = draw(&mut guest);
    let file = daemon.dir().join("frame.png");
    let dumped = ctl(&daemon, &["dump", &uuid.to_string(), "--json", "-o", file.to_str().unwrap()]);
    assert_eq!(json(&dumped)["generation"], 1);
    let reader = std::io::BufReader::new(std::fs::File::open(&file).unwrap());
    let mut reader = png::Decoder::new(reader).read_info().unwrap();
    let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
    let info = reader.next_frame(&mut pixels).unwrap();
    assert_eq!((info.width, info.height), (WIDTH, HEIGHT));
    for (at, pixel) in pixels.chunks(3).enumerate() {
        let value = 0x0001_0203u32 * (at as u32 % 85);
        assert_eq!(pixel, &value.to_be_bytes()[1..], "pixel {at}");
    }
    // The lease ended with it.
    let gone = || guest.query(handle).expect("QUERY").use_count.get() == 0;
    let mut gone = gone;
    assert!(wait_for(SOON, &mut gone));
}

#[test]
fn the_tool_follows_events_line_by_line() {
    let daemon = Daemon::start(&["a"]);
    let mut guest = Guest::connect(&daemon, "a");
    let mut watch = Command::new(env!("CARGO_BIN_EXE_bufsharectl"));
    watch.arg("--host-socket").arg(daemon.host_socket()).args(["watch", "--json"]);
    let mut watch = watch.stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(watch.stdout.take().unwrap()).lines();
    let mut next = || -> Value { serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap() };
    let (handle, uuid, ..) = draw(&mut guest);
    let offered = next();
    assert_eq!(
        (&offered["event"], &offered["uuid"]),
        (&"offered".into(), &uuid.to_string().into())
    );
    let write = bufshare::protocol::flag::SYNC_WRITE;
    guest.end(Sync { handle, flags: write, ..Default::default() }).expect("END");
    let changed = next();
    assert_eq!((&changed["event"], &changed["generation"]), (&"changed".into(), &2.into()));
    guest.release(handle).expect("RELEASE");
    assert_eq!(next()["event"], "withdrawn");
    watch.kill().unwrap();
    watch.wait().unwrap();
}

#[test]
fn zero_copy_means_that_the_guest_writes_into_the_very_pages() {
    let daemon = Daemon::start(&["a"]);
    let mut guest = Guest::connect(&daemon, "a");
    let (_, uuid, mode, addr) = draw(&mut guest);
    if mode != Mode::ZeroCopy {
        skip("no udmabuf on this host");
        return;
    }
    let mut client = Client::connect(&daemon.host_socket(), "test").unwrap();
    let lease = client.acquire(uuid, READ, true).unwrap();
    assert_eq!((lease.fd_kind, lease.writable), (FdKind::DmaBuf, true));
    let map = Mapping::new(&lease.fd, 2 * PAGE as usize, false).unwrap();
    guest.memory.write(addr + 5000, b"after EXPORT");
    let mut seen = [0; 12];
    map.read_at(5000, &mut seen).unwrap();
    assert_eq!(&seen, b"after EXPORT");
    let copied = client.stats().unwrap().into_iter().find(|(name, _)| name == "bytes_copied");
    assert_eq!(copied, Some(("bytes_copied".to_owned(), 0)));
}

#[test]
fn the_tool_lends_a_picture() {
    let launch =
        Launch { args: ["--allow", "host:a"].map(String::from).to_vec(), ..Default::default() };
    let daemon = launch.start();
    let mut guest = Guest::connect(&daemon, "a");
    guest.stock_events(8);
    let file = daemon.dir().join("dot.png");
    let mut encoder = png::Encoder::new(std::fs::File::create(&file).unwrap(), 2, 1);
    encoder.set_color(png::ColorType::Rgb);
    encoder.write_header().unwrap().write_image_data(&[1, 2, 3, 4, 5, 6]).unwrap();
    let raw = daemon.dir().join("raw");
    std::fs::write(&raw, [7; 5000]).unwrap();
    let lend = |file: &Path, further: &[&str]| {
        let mut lend = Command::new(env!("CARGO_BIN_EXE_bufsharectl"));
        lend.arg("--host-socket").arg(daemon.host_socket()).args(["export", "--json"]);
        lend.arg(file).args(further).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let mut attach = |lender: &mut std::process::Child| {
        let mut lines = BufReader::new(lender.stdout.take().unwrap()).lines();
        let told: Value = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
        let uuid = Uuid::parse_str(told["uuid"].as_str().unwrap()).unwrap().into_bytes();
        let attach = Attach { uuid, access: READ, max_metadata: 88, ..Default::default() };
        let (attached, metadata) = guest.attach(attach).expect("ATTACH");
        let (handle, size, view) = (attached.handle.get(), attached.size.get(), guest.pages(2));
        let map = Map { handle, segments: vec![(view, size)], access: READ, ..Default::default() };
        guest.map(&map).expect("MAP");
        let read = bufshare::protocol::flag::SYNC_READ;
        guest.begin(Sync { handle, flags: read, ..Default::default() }).expect("BEGIN");
        let busy: Value = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
        assert_eq!(busy["event"], "busy");
        (told, guest.memory.read(view, size as usize), metadata)
    };
    let mut lender = lend(&file, &["--to", "a"]);
    let (told, bytes, metadata) = attach(&mut lender);
    assert_eq!((&told["name"], &told["size"]), (&"dot.png".into(), &PAGE.into()));
    assert_eq!((&bytes[..3], &bytes[4..7]), (&[3, 2, 1][..], &[6, 5, 4][..]));
    let image = bufshare::protocol::Image::read_from_bytes(&metadata).unwrap();
    assert_eq!((image.width.get(), image.height.get()), (2, 1));
    assert_eq!(json(&ctl(&daemon, &["list", "--json"]))[0]["exporter_name"], "host");
    // What it lent ends with it.
    lender.kill().unwrap();
    lender.wait().unwrap();
    assert!(wait_for(SOON, || ctl(&daemon, &["list"]).stdout.starts_with(b"no buffer")));

    let more = ["--to", "*", "--access", "rw", "--name", "x", "--image", "50x25:XR24"];
    let mut lender = lend(&raw, &more);
    let (told, bytes, metadata) = attach(&mut lender);
    assert_eq!((&told["name"], metadata.len()), (&"x".into(), 88));
    assert!(bytes[..5000] == [7; 5000] && bytes[5000..].iter().all(|byte| *byte == 0));
    lender.kill().unwrap();
    lender.wait().unwrap();
    let refused = lend(&raw, &["--to", "nobody"]).wait_with_output().unwrap();
    assert_eq!(refused.status.code(), Some(4), "{refused:?}");
    assert_eq!(lend(&raw, &[]).wait_with_output().unwrap().status.code(), Some(2));
}

/// Not a test of its own: the program that `a_killed_program_leaves_nothing` starts.
#[test]
fn holder() {
    let Some(socket) = std::env::var_os("HOLD") else { return };
    let mut client = Client::connect(Path::new(&socket), "holder").unwrap();
    let uuid = client.find("frame").unwrap().unwrap().uuid;
    let _lease = client.acquire(uuid, READ, false).unwrap();
    std::thread::sleep(Duration::from_secs(60));
}

#[test]
fn a_killed_program_leaves_nothing() {
    let daemon = Daemon::start(&["a"]);
    let mut guest = Guest::connect(&daemon, "a");
    let (handle, uuid, ..) = draw(&mut guest);
    let mut client = Client::connect(&daemon.host_socket(), "test").unwrap();
    guest.stock_events(8);
    for round in 0..3 {
        let mut holder = Command::new(std::env::current_exe().unwrap());
        let holder = holder.args(["--exact", "programs::holder"]).env("HOLD", daemon.host_socket());
        let mut holder = holder.stdout(Stdio::null()).spawn().unwrap();
        assert!(wait_for(SOON, || client.query(uuid).unwrap().nr_leases == 1));
        let details = client.query(uuid).unwrap();
        assert_eq!((details.leases[0].pid, &*details.leases[0].client), (holder.id(), "holder"));
        guest.expect_event(Opcode::EvtBusy);
        let fds = daemon.fds();
        holder.kill().unwrap();
        holder.wait().unwrap();
        guest.expect_event(Opcode::EvtIdle);
        assert_eq!(client.query(uuid).unwrap().nr_leases, 0);
        assert!(
            wait_for(SOON, || daemon.fds() == fds - 1),
            "round {round}: {:?}",
            daemon.fd_names()
        );
    }
    let released = guest.release(handle).expect("RELEASE");
    assert_eq!(released.use_count.get(), 0);
}

#[test]
fn only_root_the_daemons_user_and_the_named_one_are_served() {
    if !rustix::process::geteuid().is_root() {
        skip("only root can become somebody else");
        return;
    }
    let as_nobody = |daemon: &Daemon| {
        // Neither the build directory nor the daemon's own has to be open to others.
        let dir = daemon.dir();
        std::fs::set_permissions(dir, PermissionsExt::from_mode(0o755)).unwrap();
        let program = dir.join("bufsharectl");
        // By another process: one that this process had open for writing is busy while any other
        // thread forks.
        let mut copy = Command::new("cp");
        let copied = copy.arg(env!("CARGO_BIN_EXE_bufsharectl")).arg(&program).status();
        assert!(copied.unwrap().success());
        let mut command = Command::new(program);
        command.arg("--host-socket").arg(daemon.host_socket()).arg("list");
        let output = command.uid(NOBODY).gid(NOBODY).output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let daemon = Daemon::start(&["a"]);
    let (code, text) = as_nobody(&daemon);
    assert!(code == Some(3) && text.contains("--host-uid 65534"), "{code:?} {text}");
    // The mode is a help; the credentials decide.
    std::fs::set_permissions(daemon.host_socket(), PermissionsExt::from_mode(0o666)).unwrap();
    let (code, text) = as_nobody(&daemon);
    assert!(code == Some(3) && text.contains("does not serve this user"), "{code:?} {text}");
    assert!(wait_for(SOON, || daemon.log().contains("user 65534")));

    let args = vec!["--host-uid".to_owned(), NOBODY.to_string()];
    let daemon = Launch { args, ..Default::default() }.start();
    assert_eq!(as_nobody(&daemon), (Some(0), String::new()));
    assert!(Client::connect(&daemon.host_socket(), "root").is_ok());
}

/// How often the daemon's threads went to sleep: each wake-up ends with that.
fn sleeps(daemon: &Daemon) -> u64 {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", daemon.pid())).unwrap();
    let count = |status: String| -> u64 {
        let line = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
        line.unwrap().trim().parse().unwrap()
    };
    let status = |task: std::fs::DirEntry| std::fs::read_to_string(task.path().join("status"));
    tasks.map(|task| count(status(task.unwrap()).unwrap())).sum()
}

#[test]
fn an_idle_daemon_does_not_wake_up() {
    let daemon = Daemon::start(&["a"]);
    let mut guest = Guest::connect(&daemon, "a");
    let (_, uuid, ..) = draw(&mut guest);
    let mut client = Client::connect(&daemon.host_socket(), "test").unwrap();
    client.watch(None).unwrap();
    let _lease = client.acquire(uuid, READ, false).unwrap();
    assert!(client.next_event(Some(SOON)).unwrap().is_some());
    // A buffer, a watch and a lease: none of them costs anything while nothing happens.
    let quiet = wait_for(SOON, || {
        let before = sleeps(&daemon);
        std::thread::sleep(Duration::from_millis(300));
        sleeps(&daemon) == before
    });
    assert!(quiet);
    let before = sleeps(&daemon);
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(sleeps(&daemon), before);
}

#[test]
fn the_c_header_stands_alone() {
    for (language, standard) in [("c", "-std=c11"), ("c++", "-std=c++17")] {
        let mut compiler = Command::new("cc");
        compiler.args(["-x", language, standard, "-Wall", "-Wextra", "-Wpadded", "-Werror"]);
        compiler.args(["-fsyntax-only", "include/bufshare-host.h"]);
        match compiler.current_dir(env!("CARGO_MANIFEST_DIR")).output() {
            Ok(output) if String::from_utf8_lossy(&output.stderr).contains("cc1plus") => {
                println!("the C part passed; no C++ compiler");
            }
            Ok(output) => assert!(output.status.success(), "{output:?}"),
            Err(error) => return skip(&format!("no C compiler: {error}")),
        }
    }
}
