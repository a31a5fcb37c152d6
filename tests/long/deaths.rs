//! Kill -9 of each party between any two commands, and in the middle of one: an exporter's VMM, an
//! importer's, a program on the host, each a process of its own, and the daemon. Ten minutes:
//!
//!     BUFSHARE_LONG_SECONDS=600 cargo test --release --test long deaths -- --nocapture

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use bufshare::host::client::{Access, Client, Event, Lease};
use bufshare::protocol::{Mode, Opcode, State, Status, access, flag, peer};
use uuid::Uuid;

use crate::common::{
    Attach, Daemon, Export, Grant, Guest, Launch, Map, PAGE, Refused, SOON, Setup, Sync, wait_for,
};
use crate::{assert_nothing_left, end};

/// Who a process is: exporter, importer or client; and the daemon's directory.
const ROLE: &str = "BUFSHARE_TEST_ROLE";
const DIR: &str = "BUFSHARE_TEST_DIR";
const IMPORTER: u32 = 3;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Exporter,
    Importer,
    Client,
}

const ROLES: [(Role, &str); 3] =
    [(Role::Exporter, "exporter"), (Role::Importer, "importer"), (Role::Client, "client")];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Act {
    Export,
    GrantHost,
    GrantVm,
    Attach,
    Map,
    Acquire,
    BeginWrite,
    EndWrite,
    BeginRead,
    EndRead,
    Release,
    Unmap,
    Detach,
}

/// A life of a buffer. Whoever dies, dies before one of these.
const SCRIPT: [(Role, Act); 18] = [
    (Role::Exporter, Act::Export),
    (Role::Exporter, Act::GrantVm),
    (Role::Importer, Act::Attach),
    (Role::Importer, Act::Map),
    (Role::Exporter, Act::GrantHost),
    (Role::Client, Act::Acquire),
    (Role::Exporter, Act::BeginWrite),
    (Role::Exporter, Act::EndWrite),
    (Role::Importer, Act::BeginRead),
    (Role::Client, Act::BeginRead),
    (Role::Client, Act::EndRead),
    (Role::Importer, Act::EndRead),
    (Role::Importer, Act::BeginWrite),
    (Role::Importer, Act::EndWrite),
    (Role::Exporter, Act::Release),
    (Role::Client, Act::Release),
    (Role::Importer, Act::Unmap),
    (Role::Importer, Act::Detach),
];

/// A party, in this process.
enum Party {
    Vm { guest: Box<Guest>, handle: u64, mapping: u64 },
    Program { client: Box<Client>, lease: Option<Box<Lease>> },
}

impl Party {
    fn new(role: Role, dir: &Path) -> Party {
        let vm = |name: &str| {
            let setup = Setup { event_buffers: 64, ..Default::default() };
            let guest = setup.connect_to(&dir.join(format!("{name}.sock"))).into();
            Party::Vm { guest, handle: 0, mapping: 0 }
        };
        match role {
            Role::Exporter => vm("a"),
            Role::Importer => vm("b"),
            _ => {
                let mut client = Client::connect(&dir.join("host.sock"), "party").expect("connect");
                client.watch(None).expect("WATCH");
                Party::Program { client: client.into(), lease: None }
            }
        }
    }

    /// Carries out one act, which nothing prevents.
    fn act(&mut self, act: Act, uuid: &mut Uuid) {
        match self {
            Party::Vm { guest, handle, mapping } => {
                let sync = |flags| Sync { handle: *handle, flags, ..Default::default() };
                match act {
                    Act::Export => {
                        let segments = vec![(guest.pages(2), 2 * PAGE)];
                        let export = guest.export(Export { segments, ..Default::default() });
                        let export = export.expect("EXPORT");
                        (*handle, *uuid) = (export.handle.get(), Uuid::from_bytes(export.uuid));
                    }
                    Act::GrantHost | Act::GrantVm => {
                        let peer_id = if act == Act::GrantVm { IMPORTER } else { peer::HOST };
                        let grant = Grant { handle: *handle, peer_id, ..Default::default() };
                        guest.grant(grant).expect("GRANT");
                    }
                    Act::Attach => {
                        let attach = Attach { uuid: uuid.into_bytes(), ..Default::default() };
                        *handle = guest.attach(attach).expect("ATTACH").0.handle.get();
                    }
                    Act::Map => {
                        let segments = vec![(guest.pages(2), 2 * PAGE)];
                        let map = Map { handle: *handle, segments, ..Default::default() };
                        *mapping = guest.map(&map).expect("MAP");
                    }
                    Act::BeginWrite => drop(guest.begin(sync(flag::SYNC_WRITE)).expect("BEGIN")),
                    Act::EndWrite => drop(guest.end(sync(flag::SYNC_WRITE)).expect("END")),
                    Act::BeginRead => drop(guest.begin(sync(flag::SYNC_READ)).expect("BEGIN")),
                    Act::EndRead => drop(guest.end(sync(flag::SYNC_READ)).expect("END")),
                    Act::Release => drop(guest.release(*handle).expect("RELEASE")),
                    Act::Unmap => guest.unmap(*mapping).expect("UNMAP"),
                    Act::Detach => guest.detach(*handle).expect("DETACH"),
                    Act::Acquire => unreachable!("a VM does not"),
                }
            }
            Party::Program { client, lease } => match (act, &lease) {
                (Act::Acquire, _) => {
                    let all = access::READ | access::WRITE;
                    let held = client.acquire(*uuid, all, false).expect("ACQUIRE");
                    *lease = Some(held.into());
                }
                (Act::BeginRead, Some(lease)) => {
                    client.begin(lease.id, Access::READ, SOON).expect("BEGIN");
                }
                (Act::EndRead, Some(lease)) => drop(client.end(lease.id, Access::READ)),
                (Act::Release, _) => {
                    client.release(*lease.take().expect("held")).expect("RELEASE");
                }
                _ => unreachable!("{act:?} of a program"),
            },
        }
    }
}

/// A process of its own: carries out the acts that it reads the numbers of, one after the other.
#[test]
fn a_party() {
    let (Ok(role), Some(dir)) = (std::env::var(ROLE), std::env::var_os(DIR)) else { return };
    let role = ROLES.iter().find(|(_, name)| *name == role).expect("a role").0;
    let mut party = Party::new(role, &PathBuf::from(dir));
    println!("\nparty: ready");
    for line in std::io::stdin().lines() {
        let line = line.expect("stdin");
        let (step, uuid) = line.split_once(' ').expect("number and UUID");
        let mut uuid = uuid.parse().expect("a UUID");
        party.act(SCRIPT[step.parse::<usize>().expect("a number")].1, &mut uuid);
        println!("party: {uuid}");
    }
    std::process::exit(0);
}

/// The one that dies.
struct Victim {
    child: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
}

impl Victim {
    fn start(role: &str, dir: &Path) -> Victim {
        let mut child = Command::new(std::env::current_exe().expect("this program"))
            .args(["--exact", "deaths::a_party", "--nocapture"])
            .env(ROLE, role)
            .env(DIR, dir)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("a party");
        let to = child.stdin.take().expect("piped");
        let from = BufReader::new(child.stdout.take().expect("piped"));
        let mut victim = Victim { child, to, from };
        assert_eq!(victim.said(), "ready");
        victim
    }

    fn said(&mut self) -> String {
        let mut line = String::new();
        loop {
            line.clear();
            assert_ne!(self.from.read_line(&mut line).expect("a pipe"), 0, "the party is gone");
            if let Some(said) = line.strip_prefix("party: ") {
                return said.trim_end().to_owned();
            }
        }
    }

    fn begin(&mut self, step: usize, uuid: Uuid) {
        writeln!(self.to, "{step} {uuid}").expect("a pipe");
    }

    fn act(&mut self, step: usize, uuid: &mut Uuid) {
        self.begin(step, *uuid);
        *uuid = self.said().parse().expect("a UUID");
    }

    fn kill(mut self) {
        self.child.kill().expect("SIGKILL");
        self.child.wait().expect("waitpid");
    }
}

fn launch() -> Launch {
    Launch {
        vms: ["name=a", "name=b"].map(String::from).to_vec(),
        args: ["--allow", "a:b"].map(String::from).to_vec(),
        ..Default::default()
    }
}

/// How far a buffer's life went.
struct Past(usize);

impl Past {
    fn did(&self, role: Role, act: Act) -> bool {
        SCRIPT[..self.0].contains(&(role, act))
    }

    /// Between the first and the last of the two.
    fn amid(&self, role: Role, first: Act, last: Act) -> bool {
        self.did(role, first) && !self.did(role, last)
    }
}

#[test]
fn deaths_between_any_two_commands() {
    let end = end();
    let mut daemon = launch().start();
    // The first ones leave what stays.
    one_dies(&daemon, ROLES[0], 4, None);
    let fds = quiet(&daemon);
    let mut deaths = 0;
    for round in 0.. {
        for (before, (next, _)) in SCRIPT.iter().enumerate() {
            for (role, name) in ROLES {
                // In odd rounds in the middle of a command, if the next one is its own.
                let midst = (round % 2 == 1 && *next == role)
                    .then(|| Duration::from_micros(before as u64 * 37 % 400));
                one_dies(&daemon, (role, name), before, midst);
                assert_nothing_left(&daemon, fds);
                deaths += 1;
            }
            if round % 4 == before % 4 {
                the_daemon_dies(&mut daemon, before);
                assert_nothing_left(&daemon, fds);
                deaths += 1;
            }
            if Instant::now() >= end && round > 0 {
                eprintln!("{deaths} deaths");
                return;
            }
        }
    }
}

/// Descriptors of a daemon that serves nobody.
fn quiet(daemon: &Daemon) -> usize {
    std::thread::sleep(Duration::from_millis(500));
    daemon.fds()
}

/// One party dies; the others find everything as it has to be, and go home.
fn one_dies(daemon: &Daemon, (role, name): (Role, &str), before: usize, midst: Option<Duration>) {
    let mut victim = Victim::start(name, daemon.dir());
    let mut others: Vec<(Role, Party)> = ROLES
        .iter()
        .filter(|(other, _)| *other != role)
        .map(|(other, _)| (*other, Party::new(*other, daemon.dir())))
        .collect();
    let mut uuid = Uuid::nil();
    for (step, (who, act)) in SCRIPT.iter().enumerate().take(before) {
        match others.iter_mut().find(|(other, _)| other == who) {
            Some((_, party)) => party.act(*act, &mut uuid),
            None => victim.act(step, &mut uuid),
        }
    }
    if let Some(pause) = midst {
        victim.begin(before, uuid);
        std::thread::sleep(pause);
    }
    victim.kill();
    let past = Past(before);
    if uuid.is_nil() {
        return;
    }
    let certain = midst.is_none();
    for (other, party) in &mut others {
        match (role, other, party) {
            (Role::Exporter, Role::Importer, Party::Vm { guest, handle, mapping }) => {
                importer_is_left_alone(guest, (*handle, *mapping), &past, uuid, certain);
            }
            (Role::Exporter, _, Party::Program { client, lease }) => {
                client_is_left_alone(
                    client,
                    lease.take().map(|lease| *lease),
                    &past,
                    uuid,
                    certain,
                );
            }
            (_, Role::Exporter, Party::Vm { guest, handle, .. }) => {
                exporter_goes_on(guest, *handle, role, &past);
            }
            _ => {}
        }
    }
}

/// The attachment is dead and says so; the mapping can be undone; nothing can be attached.
fn importer_is_left_alone(
    guest: &mut Guest,
    (handle, mapping): (u64, u64),
    past: &Past,
    uuid: Uuid,
    certain: bool,
) {
    if past.amid(Role::Importer, Act::Attach, Act::Detach) {
        let state =
            |guest: &mut Guest| State::from_wire(guest.query(handle).expect("QUERY").state.get());
        assert!(wait_for(SOON, || state(guest) == Some(State::Revoked)));
        let told = |event: Option<bufshare::protocol::Event>| {
            let event = event.expect("REVOKED");
            event.kind.get() == Opcode::EvtRevoked.to_wire() && event.handle.get() == handle
        };
        while !told(guest.event(SOON)) {}
        let sync = Sync { handle, flags: flag::SYNC_READ, ..Default::default() };
        guest.begin(sync).refused(Status::Revoked);
        guest.end(Sync { flags: flag::SYNC_WRITE, ..sync }).refused(Status::Revoked);
        if past.amid(Role::Importer, Act::Map, Act::Unmap) {
            guest.unmap(mapping).expect("UNMAP");
        }
        guest.detach(handle).expect("DETACH");
        guest.query(handle).refused(Status::NoEnt);
    } else if certain {
        let gone = || {
            let again = guest.attach(Attach { uuid: uuid.into_bytes(), ..Default::default() });
            match again {
                Ok((held, _)) => {
                    guest.detach(held.handle.get()).expect("DETACH");
                    false
                }
                Err(refusal) => refusal.status == Status::NoEnt,
            }
        };
        let mut gone = gone;
        assert!(wait_for(SOON, &mut gone));
    }
}

/// The lease is dead, and its client is told; what is left is to hand it back.
fn client_is_left_alone(
    client: &mut Client,
    lease: Option<Lease>,
    past: &Past,
    uuid: Uuid,
    certain: bool,
) {
    let Some(lease) = lease else {
        if certain {
            let refused = |client: &mut Client| client.acquire(uuid, access::READ, false);
            let gone = |client: &mut Client| match refused(client) {
                Ok(lease) => client.release(lease).is_err(),
                Err(error) => error.status() == Some(Status::NoEnt),
            };
            assert!(wait_for(SOON, || gone(client)));
        }
        return;
    };
    assert!(past.did(Role::Client, Act::Acquire));
    let told = |event: Option<Event>| matches!(event.expect("REVOKED"), Event::Revoked { uuid: of, .. } if of == uuid);
    while !told(client.next_event(Some(SOON)).expect("events")) {}
    let error = client.begin(lease.id, Access::READ, SOON).expect_err("dead");
    assert_eq!(error.status(), Some(Status::Revoked));
    let error = client.end(lease.id, Access::WRITE).expect_err("dead");
    assert_eq!(error.status(), Some(Status::Revoked));
    client.release(lease).expect("RELEASE");
}

/// What the dead one held is not counted any more, and nothing that it had begun holds the exporter up.
fn exporter_goes_on(guest: &mut Guest, handle: u64, dead: Role, past: &Past) {
    if past.did(Role::Exporter, Act::Release) {
        // Of the handle only the end of the others' use is heard, if it was not over at once.
        return;
    }
    let holds = |role, first, last| u32::from(role != dead && past.amid(role, first, last));
    let attached = holds(Role::Importer, Act::Attach, Act::Detach);
    let leased = holds(Role::Client, Act::Acquire, Act::Release);
    let mapped = holds(Role::Importer, Act::Map, Act::Unmap);
    let found = |guest: &mut Guest| {
        let state = guest.query(handle).expect("QUERY");
        (state.use_count.get(), state.nr_mappings.get())
    };
    let as_expected = wait_for(SOON, || found(guest) == (attached + leased, mapped));
    assert!(as_expected, "{:?} after {} steps without {dead:?}", found(guest), past.0);
    let write =
        Sync { handle, flags: flag::SYNC_WRITE | flag::SYNC_NONBLOCK, ..Default::default() };
    let read = holds(Role::Importer, Act::BeginRead, Act::EndRead)
        + holds(Role::Client, Act::BeginRead, Act::EndRead)
        + holds(Role::Importer, Act::BeginWrite, Act::EndWrite);
    match read {
        0 => drop(guest.begin(write).expect("nobody is in the way")),
        _ => drop(guest.begin(write).refused(Status::Again)),
    }
    let released = guest.release_force(handle).expect("RELEASE");
    let state = State::from_wire(released.state.get());
    if leased == 0 {
        assert_eq!(state, Some(State::Released));
    }
}

/// The daemon dies: everybody sees the end of the connection, and another daemon starts from nothing.
fn the_daemon_dies(daemon: &mut Daemon, before: usize) {
    let mut all: Vec<(Role, Party)> =
        ROLES.iter().map(|(role, _)| (*role, Party::new(*role, daemon.dir()))).collect();
    let mut uuid = Uuid::nil();
    for (who, act) in SCRIPT.iter().take(before) {
        let party = all.iter_mut().find(|(role, _)| role == who);
        party.expect("everybody is here").1.act(*act, &mut uuid);
    }
    daemon.kill();
    daemon.replace(launch().command(daemon.dir()).0);
    // The host socket is the last one that it makes.
    assert!(wait_for(SOON, || Client::connect(&daemon.host_socket(), "first").is_ok()));
    for (_, party) in &mut all {
        match party {
            Party::Vm { guest, .. } => {
                // A stock VMM does not come back; this one does, and finds nothing.
                guest.reconnect();
                guest.query(1).refused(Status::NoEnt);
            }
            Party::Program { client, lease } => {
                // What it holds stays readable, whoever made it.
                if let Some(lease) = lease {
                    let mapping = bufshare::ioctl::Mapping::new(&lease.fd, PAGE as usize, false);
                    assert_eq!(mapping.expect("mmap").len(), PAGE as usize);
                    assert!(matches!(lease.mode, Mode::Copy | Mode::ZeroCopy));
                }
                client.list().expect_err("that daemon is gone");
            }
        }
    }
}
