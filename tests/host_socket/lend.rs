//! Buffers of host programs in guests, through the real daemon: what may be lent, to whom, frames in
//! lock-step, and deaths on both sides.

use std::fs::File;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::time::Duration;

use bufshare::host::client::{Access, Client, Error, Event, Export, Loan};
use bufshare::host::packet::{self, Wait};
use bufshare::host::wire::{self, Fault, FdKind, Type};
use bufshare::limits::{
    DEFAULT_MAX_TOTAL, MAX_CLIENT_BYTES, MAX_CLIENT_EXPORTS, MAX_HOST_BYTES, MAX_HOST_EXPORTS,
    MAX_METADATA,
};
use bufshare::protocol::{Image, Mode, Opcode, Status, feature, flag, metadata, peer};
use rustix::fs::{MemfdFlags, OFlags, SealFlags, fcntl_add_seals, memfd_create};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};
use zerocopy::IntoBytes;

use crate::common::{
    Attach, Behaviour, Daemon, Guest, Launch, Map, PAGE, Refused, Setup, Sync, skip, wait_for,
};
use crate::desk::{READ, Raw, WRITE, request};
use crate::refused;

const SOON: Duration = Duration::from_secs(10);
const NONE: Duration = Duration::ZERO;
pub const SYNC_READ: u16 = flag::SYNC_READ;
pub const SYNC_WRITE: u16 = flag::SYNC_WRITE;

/// VM `a` may have buffers of the host, VM `b` may not.
pub fn bed() -> (Daemon, Guest) {
    let launch = Launch {
        vms: ["name=a", "name=b"].map(String::from).to_vec(),
        args: ["--allow", "host:a"].map(String::from).to_vec(),
        ..Default::default()
    };
    let daemon = launch.start();
    let guest = guest(&daemon, "a");
    (daemon, guest)
}

/// As [`bed`], where VM `a` has a window.
pub fn bed_with_window() -> (Daemon, Guest) {
    let (daemon, guest) = bed();
    drop(guest);
    let vmm = Some(Behaviour::default());
    let setup = Setup { decline: 1 << feature::PEERS, vmm, ..Default::default() };
    let guest = setup.connect(&daemon, "a");
    (daemon, guest)
}

/// What a number among the daemon's statistics is.
pub fn stat(client: &mut Client, wanted: &str) -> u64 {
    let stats = client.stats().unwrap();
    stats.iter().find(|(name, _)| name == wanted).expect("a statistic").1
}

/// ATTACHed with this access and shown in the window of the guest from its start; the mode of the
/// attachment.
pub fn show(guest: &mut Guest, export: &Export, pages: u64, access: u32) -> (u64, u64, Mode) {
    let uuid = export.uuid.into_bytes();
    let (told, _) = guest.attach(Attach { uuid, access, ..Default::default() }).expect("ATTACH");
    let (handle, mode) = (told.handle.get(), Mode::from_wire(told.mode.get()).unwrap());
    let map = Map { flags: 0, handle, len: Some(pages * PAGE), access, ..Default::default() };
    let mapping = guest.map(&map).expect("MAP");
    (handle, mapping, mode)
}

fn guest(daemon: &Daemon, name: &str) -> Guest {
    Setup { decline: 1 << feature::PEERS, ..Default::default() }.connect(daemon, name)
}

pub fn client(daemon: &Daemon) -> Client {
    Client::connect(&daemon.host_socket(), "lender").unwrap()
}

pub fn memfd(size: u64, seals: SealFlags) -> File {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let fd = File::from(memfd_create("lent", flags).unwrap());
    fd.set_len(size).unwrap();
    if !seals.is_empty() {
        fcntl_add_seals(&fd, seals).unwrap();
    }
    fd
}

pub fn loan(size: u64, access: u32) -> Loan<'static> {
    Loan { size, access, name: "picture", metadata_type: metadata::NONE, metadata: &[] }
}

/// A sealed memfd of so many pages, lent to VM `a`.
pub fn lend(client: &mut Client, pages: u64, access: u32) -> (Export, File) {
    let memory = memfd(pages * PAGE, SealFlags::SHRINK);
    let export = client.export(&memory, &loan(pages * PAGE, access)).unwrap();
    grant_a(client, &export, access);
    (export, memory)
}

pub fn grant_a(client: &mut Client, export: &Export, access: u32) {
    let a = client.peers().unwrap().into_iter().find(|peer| peer.name == "a").unwrap();
    client.grant(export.handle, a.id, access, 0, NONE).unwrap();
}

/// ATTACHed and mapped to fresh pages of the guest.
pub fn map(guest: &mut Guest, export: &Export, pages: u64, access: u32) -> (u64, u64, u64) {
    let uuid = export.uuid.into_bytes();
    let (attached, _) =
        guest.attach(Attach { uuid, access, ..Default::default() }).expect("ATTACH");
    let (handle, view) = (attached.handle.get(), guest.pages(pages));
    assert_eq!((attached.exporter.get(), attached.size.get()), (peer::HOST, pages * PAGE));
    let segments = vec![(view, pages * PAGE)];
    let mapping = guest.map(&Map { handle, segments, access, ..Default::default() }).expect("MAP");
    (handle, mapping, view)
}

pub fn sync(handle: u64, flags: u16) -> Sync {
    Sync { handle, flags, timeout_ns: u64::MAX, ..Default::default() }
}

fn event(client: &mut Client) -> Event {
    client.next_event(Some(SOON)).unwrap().expect("an event")
}

pub fn fault<T>(result: Result<T, Error>) -> Option<Fault> {
    match result {
        Err(Error::Refused { status: Status::Fault, detail, .. }) => Fault::from_wire(detail),
        Err(error) => panic!("{error}"),
        Ok(_) => None,
    }
}

/// The host draws, the guest sees each frame whole and answers in the same buffer.
#[test]
fn frames_go_in_and_answers_come_back() {
    let (daemon, mut guest) = bed();
    let mut client = client(&daemon);
    let (export, memory) = lend(&mut client, 16, READ | WRITE);
    let (handle, _, view) = map(&mut guest, &export, 16, READ | WRITE);
    assert!(matches!(event(&mut client), Event::Busy(buffer) if buffer.use_count == 1));
    let mut page = [0; PAGE as usize];
    for frame in 1..=300u64 {
        let byte = frame as u8;
        client.begin(export.handle, Access::WRITE, SOON).unwrap();
        for at in 0..16 {
            memory.write_all_at(&[byte ^ at as u8; PAGE as usize], at * PAGE).unwrap();
        }
        assert_eq!(client.end(export.handle, Access::WRITE).unwrap(), 2 * frame - 1);
        let seen = guest.begin(sync(handle, SYNC_READ | SYNC_WRITE)).expect("BEGIN");
        assert_eq!(seen.generation.get(), 2 * frame - 1);
        for at in 0..16 {
            let bytes = guest.memory.read(view + at * PAGE, PAGE as usize);
            assert!(bytes.iter().all(|b| *b == byte ^ at as u8), "page {at} of frame {frame}");
        }
        guest.memory.write(view + 5 * PAGE + 7, &frame.to_le_bytes());
        let part = Sync { offset: 5 * PAGE, len: PAGE, ..sync(handle, SYNC_READ | SYNC_WRITE) };
        assert_eq!(guest.end(part).expect("END").generation.get(), 2 * frame);
        match event(&mut client) {
            Event::Changed(buffer) => assert_eq!(buffer.generation, 2 * frame),
            other => panic!("{other:?}"),
        }
        client.begin(export.handle, Access::READ, SOON).unwrap();
        memory.read_exact_at(&mut page, 5 * PAGE).unwrap();
        assert_eq!(page[7..15], frame.to_le_bytes());
        assert_eq!(page[15], byte ^ 5);
        client.end(export.handle, Access::READ).unwrap();
    }
    // Whoever waits for the other one gets its turn when that one ENDs, and not before.
    client.begin(export.handle, Access::WRITE, SOON).unwrap();
    guest
        .begin(Sync { timeout_ns: 1_000_000, ..sync(handle, SYNC_READ) })
        .refused(Status::TimedOut);
    client.end(export.handle, Access::READ).unwrap();
    client.end(export.handle, Access { bits: WRITE, offset: 0, len: PAGE }).unwrap();
    guest.begin(sync(handle, SYNC_READ)).expect("BEGIN");
    let cookie = client.submit_begin(export.handle, Access::WRITE, SOON).unwrap();
    client.peers().unwrap();
    assert_eq!(client.take_generation(cookie).unwrap(), None);
    client.cancel(cookie).unwrap();
    assert_eq!(refused(client.take_generation(cookie)), Status::Canceled);
}

#[test]
fn metadata_and_name_arrive_and_the_list_shows_the_loan() {
    let (daemon, mut guest) = bed();
    let mut client = client(&daemon);
    let mut image = Image {
        fourcc: u32::from_le_bytes(*b"XR24").into(),
        nr_planes: 1.into(),
        width: 16.into(),
        height: 8.into(),
        ..Default::default()
    };
    image.planes[0].stride = 64.into();
    let memory = memfd(PAGE, SealFlags::SHRINK);
    let mut what = loan(PAGE, READ);
    (what.metadata_type, what.metadata) = (metadata::IMAGE, image.as_bytes());
    let export = client.export(&memory, &what).unwrap();
    client.grant(export.handle, peer::ANY, READ, flag::GRANT_ONCE, NONE).unwrap();
    let uuid = export.uuid.into_bytes();
    let ask = Attach { uuid, access: READ, max_metadata: 88, ..Default::default() };
    let (attached, bytes) = guest.attach(ask).expect("ATTACH");
    assert_eq!((&attached.name[..8], &bytes[..]), (&b"picture\0"[..], image.as_bytes()));
    // It was for one use.
    guest.attach(ask).refused(Status::NoEnt);

    let mut other = Client::connect(&daemon.host_socket(), "other").unwrap();
    let listed = other.list().unwrap();
    assert_eq!(listed.len(), 1);
    assert_eq!((listed[0].uuid, &*listed[0].exporter_name), (export.uuid, "host"));
    assert_eq!((listed[0].exporter, listed[0].access, listed[0].use_count), (peer::HOST, 0, 1));
    assert_eq!(other.query(export.uuid).unwrap().metadata, image.as_bytes());
    // Others may look, and no more.
    assert_eq!(refused(other.acquire(export.uuid, READ, false)), Status::NoEnt);
    assert_eq!(refused(client.acquire(export.uuid, READ, false)), Status::NoEnt);
    assert_eq!(refused(other.begin(export.handle, Access::READ, NONE)), Status::NoEnt);
    assert_eq!(refused(other.end(export.handle, Access::WRITE)), Status::NoEnt);
    assert_eq!(refused(other.take_back(export.handle, true)), Status::NoEnt);
    assert_eq!(refused(other.grant(export.handle, 2, READ, 0, NONE)), Status::NoEnt);
}

#[test]
fn what_could_vanish_or_cannot_be_written_is_refused_by_name() {
    let (daemon, _guest) = bed();
    let mut client = client(&daemon);
    let sealed = || memfd(PAGE, SealFlags::SHRINK);
    let fds = daemon.fds();
    let mut lend = |fd: BorrowedFd<'_>, size, access| fault(client.export(fd, &loan(size, access)));
    let unsealed = memfd(PAGE, SealFlags::empty());
    assert_eq!(lend(unsealed.as_fd(), PAGE, READ), Some(Fault::Unsealed));
    let grows = memfd(PAGE, SealFlags::GROW);
    assert_eq!(lend(grows.as_fd(), PAGE, READ), Some(Fault::Unsealed));
    let plain = tempfile::tempfile().unwrap();
    plain.set_len(PAGE).unwrap();
    assert!(lend(plain.as_fd(), PAGE, READ).is_some());
    let (pipe, _end) = std::io::pipe().unwrap();
    assert_eq!(lend(pipe.as_fd(), PAGE, READ), Some(Fault::Kind));
    for size in [2 * PAGE, 1 << 20] {
        assert_eq!(lend(sealed().as_fd(), size, READ), Some(Fault::Size));
    }
    for seal in [SealFlags::WRITE, SealFlags::FUTURE_WRITE] {
        let constant = memfd(PAGE, SealFlags::SHRINK | seal);
        assert_eq!(lend(constant.as_fd(), PAGE, READ | WRITE), Some(Fault::Access));
        assert_eq!(lend(constant.as_fd(), PAGE, READ), None);
    }
    let reopen = |flags| {
        let (file, mode) = (sealed(), rustix::fs::Mode::empty());
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
        rustix::fs::open(path, flags | OFlags::CLOEXEC, mode).unwrap()
    };
    let only_read = reopen(OFlags::RDONLY);
    assert_eq!(lend(only_read.as_fd(), PAGE, WRITE), Some(Fault::Access));
    assert_eq!(lend(only_read.as_fd(), PAGE, READ), None);
    let only_write = reopen(OFlags::WRONLY);
    assert_eq!(lend(only_write.as_fd(), PAGE, READ), Some(Fault::Access));
    assert!(lend(reopen(OFlags::PATH).as_fd(), PAGE, READ).is_some());

    for (size, access, status) in [
        (0, READ, Status::Inval),
        (PAGE, 0, Status::Inval),
        (PAGE, 4, Status::Inval),
        (PAGE - 1, READ, Status::Range),
        (u64::MAX, READ, Status::Range),
        (0u64.wrapping_sub(PAGE), READ, Status::Quota),
    ] {
        assert_eq!(refused(client.export(sealed(), &loan(size, access))), status);
    }
    let text = client.export(&unsealed, &loan(PAGE, READ)).unwrap_err().to_string();
    assert!(text.contains("F_SEAL_SHRINK"), "{text}");
    let name = Loan { name: "a\u{1}", ..loan(PAGE, READ) };
    client.export(sealed(), &name).expect("names are for people");
    let long = vec![0; MAX_METADATA as usize + 1];
    let mut much = loan(PAGE, READ);
    (much.metadata_type, much.metadata) = (metadata::PRIVATE, &long);
    assert_eq!(refused(client.export(sealed(), &much)), Status::Quota);
    much.metadata = &long[1..];
    client.export(sealed(), &much).expect("as much as there may be");
    much.metadata_type = metadata::IMAGE;
    assert_eq!(refused(client.export(sealed(), &much)), Status::Inval);
    drop(client);
    // The connection itself was there before.
    assert!(wait_for(SOON, || daemon.fds() < fds), "{:#?}", daemon.fd_names());
}

#[test]
fn only_whom_operator_and_exporter_let_in() {
    let (daemon, mut a) = bed();
    let mut b = guest(&daemon, "b");
    let mut client = client(&daemon);
    let peers = client.peers().unwrap();
    let seen: Vec<_> = peers.iter().map(|peer| (&*peer.name, peer.access, peer.online)).collect();
    assert_eq!(seen, [("a", READ | WRITE, true), ("b", 0, true)]);
    let [id_a, id_b] = [peers[0].id, peers[1].id];
    let export = client.export(memfd(PAGE, SealFlags::SHRINK), &loan(PAGE, READ)).unwrap();
    let handle = export.handle;
    for to in [id_b, peer::HOST, 0, 99] {
        assert_eq!(refused(client.grant(handle, to, READ, 0, NONE)), Status::NoEnt);
    }
    assert_eq!(refused(client.grant(handle, id_a, READ | WRITE, 0, NONE)), Status::Access);
    assert_eq!(refused(client.grant(handle, id_a, 4, 0, NONE)), Status::Inval);
    let force = flag::GRANT_FORCE;
    assert_eq!(refused(client.grant(handle, id_a, READ, force, NONE)), Status::Inval);
    assert_eq!(refused(client.grant(handle + 1, id_a, READ, 0, NONE)), Status::NoEnt);

    // A grant for all is one for those whom policy lets in.
    client.grant(handle, peer::ANY, READ, 0, NONE).unwrap();
    let named = |uuid| Attach { uuid, access: READ, ..Default::default() };
    let real = named(export.uuid.into_bytes());
    let unlike = b.attach(real).refused(Status::NoEnt);
    assert_eq!(b.attach(named([3; 16])).refused(Status::NoEnt), unlike);
    b.expect_no_event();
    a.stock_events(8);
    let offered = a.expect_event(Opcode::EvtOffered);
    assert_eq!((offered.uuid, offered.peer_id.get()), (export.uuid.into_bytes(), peer::HOST));
    a.attach(Attach { access: READ | WRITE, ..real }).refused(Status::Access);
    a.attach(real).expect("ATTACH");
    assert!(matches!(event(&mut client), Event::Busy(_)));
    client.grant(handle, peer::ANY, 0, force, NONE).unwrap();
    a.expect_event(Opcode::EvtRevoked);
    a.expect_event(Opcode::EvtWithdrawn);
    a.attach(real).refused(Status::NoEnt);
    assert!(matches!(event(&mut client), Event::Idle(_)));
    let short = Duration::from_millis(50);
    client.grant(handle, id_a, READ, 0, short).unwrap();
    a.expect_event(Opcode::EvtOffered);
    a.expect_event(Opcode::EvtWithdrawn);
    a.attach(real).refused(Status::NoEnt);
    assert!(wait_for(SOON, || daemon.log().contains("event=grant from=host to=a")));
    assert!(daemon.log().contains("event=attach from=host to=a"));
    assert!(daemon.log().contains("event=denied to=b"));
}

#[test]
fn taken_back_is_taken_back() {
    let (daemon, mut guest) = bed();
    let mut client = client(&daemon);
    let before = daemon.fds();
    for force in [false, true] {
        let (export, memory) = lend(&mut client, 1, READ | WRITE);
        memory.write_all_at(&[1; 4096], 0).unwrap();
        let (handle, mapping, view) = map(&mut guest, &export, 1, READ | WRITE);
        guest.begin(sync(handle, SYNC_READ)).expect("BEGIN");
        assert!(client.take_back(export.handle, force).unwrap(), "copies hold nothing");
        memory.write_all_at(&[2; 4096], 0).unwrap();
        guest.memory.fill(view, PAGE, 3);
        guest.begin(sync(handle, SYNC_READ)).refused(Status::Revoked);
        guest.end(sync(handle, SYNC_WRITE)).refused(Status::Revoked);
        assert_eq!(guest.memory.read(view, 1), [3]);
        let mut byte = [0];
        memory.read_exact_at(&mut byte, 0).unwrap();
        assert_eq!(byte, [2]);
        guest.unmap(mapping).expect("UNMAP");
        guest.detach(handle).expect("DETACH");
        // The handle is dead.
        assert_eq!(refused(client.take_back(export.handle, force)), Status::NoEnt);
        assert_eq!(refused(client.end(export.handle, Access::WRITE)), Status::NoEnt);
        assert_eq!(refused(client.query(export.uuid)), Status::NoEnt);
    }
    assert!(wait_for(SOON, || daemon.fds() == before), "{:#?}", daemon.fd_names());
}

#[test]
fn deaths_on_both_sides_leave_nothing() {
    let (daemon, mut guest) = bed();
    let mut other = client(&daemon);
    let before = daemon.fds();
    guest.stock_events(8);
    for round in 0..6 {
        let mut client = client(&daemon);
        let (export, _memory) = lend(&mut client, 64, READ | WRITE);
        guest.expect_event(Opcode::EvtOffered);
        let (handle, mapping, _) = map(&mut guest, &export, 64, READ | WRITE);
        assert!(matches!(event(&mut client), Event::Busy(_)));
        if round % 2 == 0 {
            // The VM dies: the exporter is told, and may go on.
            guest.reconnect();
            guest.stock_events(8);
            assert!(matches!(event(&mut client), Event::Idle(_)));
            guest.expect_event(Opcode::EvtOffered);
            let (again, ..) = map(&mut guest, &export, 64, READ);
            guest.begin(sync(again, SYNC_READ)).expect("BEGIN");
            guest.end(sync(again, SYNC_READ)).expect("END");
            drop(client);
            guest.expect_event(Opcode::EvtRevoked);
            guest.expect_event(Opcode::EvtWithdrawn);
            guest.detach(again).expect("DETACH");
        } else {
            // The client dies while the VM waits for it.
            client.begin(export.handle, Access::WRITE, SOON).unwrap();
            guest.sync_start::<bufshare::protocol::RespSync>(&sync(handle, SYNC_READ).bytes());
            drop(client);
            let (_, answer) = guest.sync_next::<bufshare::protocol::RespSync>(SOON).unwrap();
            answer.refused(Status::Revoked);
            guest.expect_event(Opcode::EvtRevoked);
            guest.expect_event(Opcode::EvtWithdrawn);
            guest.unmap(mapping).expect("UNMAP");
            guest.detach(handle).expect("DETACH");
        }
        let settled = wait_for(SOON, || daemon.fds() <= before);
        assert!(settled, "{} descriptors, {before} before: {:#?}", daemon.fds(), daemon.fd_names());
    }
    assert_eq!(other.list().unwrap(), []);
    let stats = other.stats().unwrap();
    let bytes = stats.iter().find(|(name, _)| name == "bytes_exported");
    assert_eq!(bytes, Some(&("bytes_exported".to_owned(), 0)));
}

#[test]
fn exports_are_bounded_for_one_and_for_all() {
    let most = getrlimit(Resource::Nofile).maximum;
    if most.is_some_and(|most| most < 2 * u64::from(MAX_HOST_EXPORTS)) {
        return skip("fewer files can be open than host programs may export");
    }
    let (daemon, _guest) = bed();
    let one = memfd(PAGE, SealFlags::SHRINK);
    let fill = |client: &mut Client| {
        let lend = |client: &mut Client| client.export(&one, &loan(PAGE, READ));
        (0..MAX_CLIENT_EXPORTS).take_while(|_| lend(client).is_ok()).count()
    };
    let mut clients: Vec<Client> = Vec::new();
    for _ in 0..MAX_HOST_EXPORTS / MAX_CLIENT_EXPORTS {
        let mut client = client(&daemon);
        assert_eq!(client.daemon().max_exports, MAX_CLIENT_EXPORTS);
        assert_eq!(fill(&mut client), MAX_CLIENT_EXPORTS as usize);
        assert_eq!(refused(client.export(&one, &loan(PAGE, READ))), Status::Quota);
        clients.push(client);
    }
    let mut late = client(&daemon);
    assert_eq!(refused(late.export(&one, &loan(PAGE, READ))), Status::Quota);
    drop(clients);
    assert!(wait_for(SOON, || late.export(&one, &loan(PAGE, READ)).is_ok()));
    drop(late);

    // Nothing of it is there: only what is touched is.
    let all = memfd(MAX_CLIENT_BYTES, SealFlags::SHRINK);
    let mut clients: Vec<Client> = Vec::new();
    for _ in 0..MAX_HOST_BYTES / MAX_CLIENT_BYTES {
        let mut client = client(&daemon);
        let whole = || loan(MAX_CLIENT_BYTES, READ);
        assert!(wait_for(SOON, || client.export(&all, &whole()).is_ok()));
        assert_eq!(refused(client.export(&one, &loan(PAGE, READ))), Status::Quota);
        clients.push(client);
    }
    let mut late = client(&daemon);
    assert_eq!(refused(late.export(&one, &loan(PAGE, READ))), Status::Quota);
    const { assert!(MAX_CLIENT_BYTES <= DEFAULT_MAX_TOTAL) };
}

/// A daemon that has no descriptor left says so, and goes on when it has one again.
#[test]
fn without_a_descriptor_left_nothing_is_taken_in() {
    let (daemon, _guest) = bed();
    let mut client = client(&daemon);
    let one = memfd(PAGE, SealFlags::SHRINK);
    let most = daemon.fds() as u64 + 20;
    let pid = Pid::from_raw(i32::try_from(daemon.pid()).unwrap());
    let limit = Rlimit { current: Some(most), maximum: getrlimit(Resource::Nofile).maximum };
    prlimit(pid, Resource::Nofile, limit).unwrap();
    let mut exports = Vec::new();
    let refusal = loop {
        match client.export(&one, &loan(PAGE, READ)) {
            Ok(export) => exports.push(export),
            refused => break crate::refused(refused),
        }
        assert!(exports.len() < 100);
    };
    assert_eq!(refusal, Status::NoMem);
    assert!(client.take_back(exports[0].handle, false).unwrap());
    client.export(&one, &loan(PAGE, READ)).expect("there is one again");
}

/// Sends a packet with these fds.
fn send_with(raw: &Raw, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
    sendmsg(&raw.0, &[IoSlice::new(bytes)], &mut control, SendFlags::empty()).unwrap();
}

#[test]
fn stray_descriptors_are_closed_and_do_nothing() {
    let (daemon, _guest) = bed();
    let raw = Raw::greeted(&daemon.host_socket());
    let before = daemon.fds();
    let (ends, fds): (Vec<_>, Vec<OwnedFd>) = (0..3)
        .map(|_| std::io::pipe().map(|(ours, theirs)| (ours, OwnedFd::from(theirs))).unwrap())
        .unzip();
    let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    let memory = memfd(PAGE, SealFlags::SHRINK);
    let export = |flags, reserved: u32| wire::Export {
        hdr: wire::Req { reserved: reserved.into(), ..request(Type::Export, flags, 5) },
        size: PAGE.into(),
        access: READ.into(),
        ..Default::default()
    };
    let list = wire::List { hdr: request(Type::List, 0, 5), after: [0; 16] };
    for (bytes, fds) in [
        (list.as_bytes(), &borrowed[..1]),
        (list.as_bytes(), &borrowed[..3]),
        (export(0, 0).as_bytes(), &[memory.as_fd(), memory.as_fd()]),
        (export(0, 0).as_bytes(), &[memory.as_fd(), memory.as_fd(), memory.as_fd()]),
        (export(1, 0).as_bytes(), &[memory.as_fd()]),
        (export(0, 1).as_bytes(), &[memory.as_fd()]),
        (&export(0, 0).as_bytes()[..70], &[memory.as_fd()]),
        (request(Type::Export, 0, 5).as_bytes(), &[memory.as_fd()]),
    ] {
        send_with(&raw, bytes, fds);
        assert_eq!(raw.answer(), Some((Status::Inval, 5)));
    }
    // And without one.
    assert_eq!(raw.call(&export(0, 0)), (Status::Inval, 5));
    assert!(wait_for(SOON, || daemon.fds() == before), "{:#?}", daemon.fd_names());
    // Not before HELLO, and not without a header.
    let early = Raw::connect(&daemon.host_socket());
    send_with(&early, export(0, 0).as_bytes(), &[memory.as_fd()]);
    assert_eq!(early.answer(), Some((Status::Inval, 5)));
    send_with(&early, &[1; 8], &borrowed[..2]);
    assert_eq!(early.answer(), None);
    drop(early);
    // Whoever leaves with an EXPORT under way leaves nothing.
    for _ in 0..20 {
        let raw = Raw::greeted(&daemon.host_socket());
        send_with(&raw, export(0, 0).as_bytes(), &[memory.as_fd()]);
    }
    assert!(wait_for(SOON, || daemon.fds() == before), "{:#?}", daemon.fd_names());
    drop(fds);
    for end in ends {
        assert_eq!(std::io::read_to_string(end).unwrap(), "");
    }
    let mut client = client(&daemon);
    assert_eq!(client.list().unwrap(), []);
    let value =
        |stats: Vec<(String, u64)>, name: &str| stats.iter().find(|(n, _)| n == name).unwrap().1;
    assert_eq!(value(client.stats().unwrap(), "bytes_exported"), 0);
}

/// Requests are read in their order, also those behind an EXPORT that a client does not wait for.
#[test]
fn what_follows_an_export_waits_for_it() {
    let (daemon, _guest) = bed();
    let raw = Raw::greeted(&daemon.host_socket());
    let memory = memfd(PAGE, SealFlags::SHRINK);
    for round in 0..50u64 {
        let hdr = request(Type::Export, 0, 2 * round);
        let (size, access) = (PAGE.into(), READ.into());
        let export = wire::Export { hdr, size, access, ..Default::default() };
        send_with(&raw, export.as_bytes(), &[memory.as_fd()]);
        let list = wire::List { hdr: request(Type::List, 0, 2 * round + 1), after: [0; 16] };
        raw.send(list.as_bytes());
        assert_eq!(raw.answer(), Some((Status::Ok, 2 * round)));
        let packet = packet::receive(&raw.0, Wait::Forever).unwrap().unwrap();
        assert_eq!(u64::from(packet.bytes[16]), (round + 1).min(50), "LIST sees it");
    }
}

/// In a window: zero copies of what may be written where the host has udmabuf, else and for readers a copy.
#[test]
fn a_window_shows_what_is_lent() {
    let (daemon, mut guest) = bed_with_window();
    let mut client = client(&daemon);
    for access in [READ | WRITE, READ] {
        let (export, memory) = lend(&mut client, 4, access);
        let (handle, mapping, mode) = show(&mut guest, &export, 4, access);
        let shared = export.fd_kind == FdKind::DmaBuf && access == READ | WRITE;
        assert_eq!(mode == Mode::ZeroCopy, shared);
        let before = stat(&mut client, "bytes_copied");
        memory.write_all_at(b"from the host", PAGE).unwrap();
        client.end(export.handle, Access::WRITE).unwrap();
        guest.begin(sync(handle, SYNC_READ)).expect("BEGIN");
        assert_eq!(guest.window().read(PAGE, 13).unwrap(), b"from the host");
        guest.end(sync(handle, SYNC_READ)).expect("END");
        guest.window().write(2 * PAGE, b"from the guest");
        let mut seen = [0; 14];
        if access == READ {
            guest.end(sync(handle, SYNC_WRITE)).refused(Status::Access);
            memory.read_exact_at(&mut seen, 2 * PAGE).unwrap();
            assert_eq!(seen, [0; 14], "its copy is its own");
        } else {
            guest.end(sync(handle, SYNC_WRITE)).expect("END");
            memory.read_exact_at(&mut seen, 2 * PAGE).unwrap();
            assert_eq!(&seen, b"from the guest");
        }
        assert_eq!(stat(&mut client, "bytes_copied") == before, shared);
        // Only the VMM's word ends what it shows of the client's own pages.
        assert_eq!(client.take_back(export.handle, false).unwrap(), !shared);
        if shared {
            guest.unmap(mapping).expect("UNMAP");
            guest.detach(handle).expect("DETACH");
            let released = |event| matches!(event, Event::Released { uuid } if uuid == export.uuid);
            while !released(event(&mut client)) {}
        }
        assert!(wait_for(SOON, || guest.window().shown().is_empty()));
        assert_eq!(refused(client.query(export.uuid)), Status::NoEnt);
    }
}

/// A client that dies takes what a VM's window shows of it with it.
#[test]
fn a_window_shows_nothing_of_who_is_gone() {
    let (daemon, mut guest) = bed_with_window();
    let mut other = client(&daemon);
    let before = daemon.fds();
    for access in [READ | WRITE, READ] {
        let mut client = client(&daemon);
        let (export, _) = lend(&mut client, 4, access);
        let (handle, ..) = show(&mut guest, &export, 4, access);
        drop(client);
        assert!(wait_for(SOON, || guest.window().shown().is_empty()), "the VMM is asked to unmap");
        guest.begin(sync(handle, SYNC_READ)).refused(Status::Revoked);
        guest.detach(handle).expect("DETACH");
        assert!(wait_for(SOON, || stat(&mut other, "bytes_exported") == 0));
        let settled = wait_for(SOON, || daemon.fds() <= before);
        assert!(settled, "{} descriptors, {before} before: {:#?}", daemon.fds(), daemon.fd_names());
    }
}

/// Where the host has udmabuf a memfd becomes a dma-buf, which VMs could map.
#[test]
fn the_answer_says_what_a_vm_could_map() {
    let (daemon, _guest) = bed();
    let mut client = client(&daemon);
    let has_udmabuf = daemon.log().contains("zero-copy mode:");
    let kind = |access| {
        let memory = memfd(PAGE, SealFlags::SHRINK);
        client.export(&memory, &loan(PAGE, access)).unwrap().fd_kind
    };
    let [read, write] = [READ, READ | WRITE].map(kind);
    assert_eq!((read, write == FdKind::DmaBuf), (FdKind::MemFd, has_udmabuf));
}
