//! A daemon that is replaced by another one: what the host still uses is not forgotten, clients go on.

mod common;

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bufshare::handover;
use bufshare::host::client::{Client, Error, Event, Loan};
use bufshare::host::packet::{self, Wait};
use bufshare::protocol::{Line, Mode, State, Status, access, flag};
use common::{Daemon, Export, Grant, Guest, Launch, PAGE, Point, SOON, Sync, name, wait_for};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::io::FdFlags;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept, bind, listen, socket_with,
};
use uuid::Uuid;

/// One of these tests at a time: descriptors that one passes must not reach another one's daemon.
static ALONE: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn launch() -> Launch {
    Launch { args: vec!["--hand-over".into(), "@DIR@/hand-over".into()], ..Default::default() }
}

/// An export of two pages for the host.
fn offer(guest: &mut Guest) -> (u64, Uuid) {
    let segments = vec![(guest.pages(2), 2 * PAGE)];
    let export = guest.export(Export { segments, name: name("frame"), ..Default::default() });
    let export = export.expect("EXPORT");
    let handle = export.handle.get();
    guest.grant(Grant { handle, ..Default::default() }).expect("GRANT");
    guest.end(Sync { handle, flags: flag::SYNC_WRITE, ..Default::default() }).expect("END");
    (handle, Uuid::from_bytes(export.uuid))
}

fn stat(client: &mut Client, name: &str) -> u64 {
    let stats = client.stats().expect("STATS");
    stats.into_iter().find(|(stat, _)| stat == name).map(|(_, value)| value).expect("known")
}

fn sealed_page() -> OwnedFd {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let memory = memfd_create("lent", flags).expect("memfd");
    ftruncate(&memory, PAGE).expect("ftruncate");
    fcntl_add_seals(&memory, SealFlags::SHRINK).expect("seal");
    memory
}

/// The whole story; `replace` puts another daemon in the place of the one that runs.
fn survives(launch: impl Fn() -> Launch, replace: impl FnOnce(&mut Daemon)) {
    let mut daemon = launch().start();
    let mut guest = Guest::connect(&daemon, "a");
    let ((handle, held), (_, passed_on)) = (offer(&mut guest), offer(&mut guest));
    let (_, unused) = offer(&mut guest);
    let mut client = Client::connect(&daemon.host_socket(), "test").unwrap();
    let lease = client.acquire(held, access::READ, false).unwrap();
    // A client that is gone, whose descriptor somebody else has.
    let mut other = Client::connect(&daemon.host_socket(), "other").unwrap();
    let gone = other.acquire(passed_on, access::READ, false).unwrap();
    let foreign = gone.fd.try_clone().unwrap();
    other.release(gone).unwrap();
    client.watch(Some(held)).unwrap();
    assert!(matches!(client.next_event(Some(SOON)).unwrap(), Some(Event::Offered(_))));
    // A client that exports: what it lends is of no use without the VMs.
    let mut lender = Client::connect(&daemon.host_socket(), "lender").unwrap();
    let memory = sealed_page();
    let (name, metadata_type, metadata) = ("lent", 0, &[][..]);
    let loan = Loan { size: PAGE, access: access::READ, name, metadata_type, metadata };
    let lent = lender.export(&memory, &loan).unwrap();
    let (before, shared) = (guest.config, lease.mode == Mode::ZeroCopy);
    // The guest writes for ever.
    guest.begin(Sync { handle, flags: flag::SYNC_WRITE, ..Default::default() }).expect("BEGIN");
    let waits = client.submit_begin(lease.id, bufshare::host::client::Access::READ, SOON).unwrap();
    // Points: reached ones, and some that nobody will reach any more.
    guest.signal(Point::new(handle, Line::Acquire, 4)).expect("POINT_SIGNAL");
    client.signal(lease.id, Line::Release, 4, Status::Ok).unwrap();
    let points = [Line::Acquire, Line::Release]
        .map(|line| client.submit_wait(lease.id, line, 5, SOON).unwrap());
    let own = lender.submit_wait(lent.handle, Line::Acquire, 1, SOON).unwrap();
    let mapping = (shared, bufshare::ioctl::Mapping::new(&lease.fd, PAGE as usize, false).unwrap());

    replace(&mut daemon);

    // The client was told on the connection that it had, which the new daemon serves.
    let told = client.next_event(Some(SOON)).unwrap();
    assert!(matches!(told, Some(Event::Revoked { uuid, .. }) if uuid == held), "{told:?}");
    let ended = client.take_generation(waits).unwrap_err();
    assert!(ended.to_string().contains("REVOKED"), "{ended}");
    for wait in points {
        let ended = client.take_reached(wait).unwrap_err();
        assert_eq!(ended.status(), Some(Status::Revoked), "{ended}");
    }
    let refused = client.signal(lease.id, Line::Release, 9, Status::Ok).unwrap_err();
    assert_eq!(refused.status(), Some(Status::Revoked), "{refused}");
    let refused = client.wait(lease.id, Line::Acquire, 4, SOON).unwrap_err();
    assert_eq!(refused.status(), Some(Status::Revoked), "{refused}");
    assert_eq!(client.query(held).unwrap().leases[0].lease, lease.id);
    assert_eq!(client.query(held).unwrap().leases[0].client, "test");
    assert!(client.query(unused).is_err(), "nobody used it");
    let refused = client.begin(lease.id, bufshare::host::client::Access::READ, SOON).unwrap_err();
    assert!(refused.to_string().contains("REVOKED"), "{refused}");
    assert!(matches!(lender.next_event(Some(SOON)), Err(Error::Closed)), "it connects again");
    assert!(matches!(lender.take_reached(own), Err(_) | Ok(None)), "it was not reached");
    assert!(client.query(lent.uuid).is_err());
    // Numbers of before are not used for anybody else.
    guest.reconnect();
    assert_ne!(guest.config.epoch, before.epoch);
    let (_, fresh) = offer(&mut guest);
    let second = client.acquire(fresh, access::READ, false).unwrap();
    assert!(second.id > lease.id.max(lent.handle));

    // In COPY mode the exporter's own pages were never lent.
    let lingering = |guest: &mut Guest| guest.read_config().lingering.get();
    assert_eq!(lingering(&mut guest), if shared { 2 } else { 0 });
    if shared {
        let state = guest.query_linger(0).expect("QUERY_LINGER");
        assert_eq!(
            (state.uuid, state.state.get()),
            (held.into_bytes(), State::Releasing.to_wire())
        );
    }
    drop(foreign);
    let gauge = |client: &mut Client| stat(client, "buffers");
    assert!(wait_for(SOON, || gauge(&mut client) == 2), "what nobody holds is forgotten");
    client.release(lease).unwrap();
    if mapping.0 {
        assert_eq!(lingering(&mut guest), 1, "it is still mapped");
    }
    drop(mapping);
    assert!(wait_for(SOON, || gauge(&mut client) == 1), "what is handed back is forgotten");
    assert_eq!(lingering(&mut guest), 0);
    assert_eq!(stat(&mut client, "bytes_exported"), 2 * PAGE);
    client.release(second).unwrap();
}

#[test]
fn a_successor_takes_over_through_the_hand_over_socket() {
    let _alone = alone();
    survives(launch, |daemon| {
        let (command, _) = launch().command(daemon.dir());
        let status = daemon.replace(command);
        assert!(status.success(), "{status}");
    });
}

/// A service manager as sd_notify(3) and sd_listen_fds(3) tell.
#[derive(Default)]
struct Manager {
    ready: usize,
    /// What it keeps.
    store: Vec<(String, OwnedFd)>,
}

/// Listens at this path.
fn manager(path: &Path) -> Arc<Mutex<Manager>> {
    let socket = UnixDatagram::bind(path).expect("bind");
    let manager = Arc::new(Mutex::new(Manager::default()));
    let heard = manager.clone();
    std::thread::spawn(move || {
        while let Ok(Some(packet)) = packet::receive(&socket, Wait::Forever) {
            heard.lock().unwrap().hear(&String::from_utf8(packet.bytes).expect("text"), packet.fd);
        }
    });
    manager
}

impl Manager {
    fn hear(&mut self, text: &str, fd: Option<OwnedFd>) {
        let name = || text.lines().find_map(|line| line.strip_prefix("FDNAME=")).expect("a name");
        match text.lines().next() {
            Some("READY=1") => self.ready += 1,
            Some("FDSTORE=1") => self.store.push((name().to_owned(), fd.expect("what to keep"))),
            Some("FDSTOREREMOVE=1") => self.store.retain(|(kept, _)| kept != name()),
            Some("BARRIER=1") => drop(fd),
            other => panic!("{other:?}"),
        }
    }

    /// The same command with what is kept passed from descriptor 3 on, and what must live until then.
    fn pass(&self, daemon: &Command) -> (Command, Vec<OwnedFd>) {
        let (mut script, mut lent) = (String::new(), Vec::new());
        for (at, (_, fd)) in self.store.iter().enumerate() {
            // Out of the way of the numbers that they get.
            let high = rustix::io::fcntl_dupfd_cloexec(fd, 100).expect("dup");
            rustix::io::fcntl_setfd(&high, FdFlags::empty()).expect("F_SETFD");
            script += &format!("exec {}<&{1} {1}<&-; ", at + 3, high.as_raw_fd());
            lent.push(high);
        }
        let names: Vec<&str> = self.store.iter().map(|(name, _)| name.as_str()).collect();
        let mut command = Command::new("bash");
        command.arg("-c").arg(script + "export LISTEN_PID=$$; exec \"$0\" \"$@\"");
        command.arg(daemon.get_program()).args(daemon.get_args());
        command.env("LISTEN_FDS", self.store.len().to_string());
        command.env("LISTEN_FDNAMES", names.join(":"));
        (command, lent)
    }
}

#[test]
fn a_successor_takes_over_from_the_service_manager() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("notify");
    let manager = manager(&path);
    let plain = || Launch {
        env: vec![("NOTIFY_SOCKET".into(), path.clone().into())],
        ..Default::default()
    };
    survives(plain, |daemon| {
        assert_eq!(manager.lock().unwrap().ready, 1);
        let status = daemon.terminate();
        assert!(status.success(), "{status}");
        let (command, _) = plain().command(daemon.dir());
        let (mut command, lent) = manager.lock().unwrap().pass(&command);
        command.env("NOTIFY_SOCKET", &path);
        daemon.replace(command);
        drop(lent);
        let forgets = || manager.lock().unwrap().store.is_empty();
        assert!(wait_for(SOON, forgets), "what it keeps would count as in use for ever");
    });
}

/// What a daemon of another version leaves is not understood, and not kept.
#[test]
fn descriptors_that_nobody_knows_are_closed() {
    let _alone = alone();
    let mut daemon = launch().start();
    daemon.kill();
    let path = daemon.dir().join("hand-over");
    std::fs::remove_file(&path).unwrap();
    let listener =
        socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None);
    let listener = listener.unwrap();
    bind(&listener, &SocketAddrUnix::new(&path).unwrap()).unwrap();
    listen(&listener, 1).unwrap();
    let (command, _) = launch().command(daemon.dir());
    let giver = std::thread::spawn(move || {
        let successor = accept(&listener).unwrap();
        std::fs::remove_file(&path).unwrap();
        drop(listener);
        for number in 0..20 {
            handover::hand_over(&successor, &format!("buffer-{number}"), sealed_page().as_fd())
                .unwrap();
        }
        let state = handover::state(br#"{"version":99}"#).unwrap();
        handover::hand_over(&successor, handover::STATE, state.as_fd()).unwrap();
        handover::end(&successor).unwrap();
    });
    daemon.replace(command);
    giver.join().unwrap();
    assert!(wait_for(SOON, || Client::connect(&daemon.host_socket(), "test").is_ok()));
    assert!(daemon.log().contains("not understood"), "{}", daemon.log());
    let kept = daemon.fd_names().into_iter().filter(|name| name.contains("memfd:")).count();
    assert_eq!(kept, 0, "{:?}", daemon.fd_names());
}

#[test]
fn a_vm_that_is_gone_from_the_configuration_leaves_nothing() {
    let _alone = alone();
    let mut daemon = launch().start();
    let mut guest = Guest::connect(&daemon, "a");
    let (_, uuid) = offer(&mut guest);
    let mut client = Client::connect(&daemon.host_socket(), "test").unwrap();
    let _lease = client.acquire(uuid, access::READ, false).unwrap();
    let (command, _) = Launch { vms: vec!["name=b".into()], ..launch() }.command(daemon.dir());
    assert!(daemon.replace(command).success());
    assert_eq!(stat(&mut client, "buffers"), 0);
    assert!(daemon.log().contains("VM \"a\" is not configured any more"));
}
