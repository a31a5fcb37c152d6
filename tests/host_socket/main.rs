//! The host socket as `spec/host-socket.md` has it: requests, events, limits, and clients that do
//! everything wrong.

#[path = "../common/mod.rs"]
mod common;
mod desk;
mod dma_bufs;
mod drm;
mod events;
mod holders;
mod lend;
mod programs;
mod timelines;

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bufshare::host::client::{Access, Client, Error};
use bufshare::host::listener::{ListenError, Listener};
use bufshare::host::packet::{self, Wait};
use bufshare::host::wire::{self, FdKind, Type};
use bufshare::ids::Access as Bits;
use bufshare::limits::{MAX_CLIENT_WAITS, MAX_CLIENTS, MAX_LEASES};
use bufshare::memory::FileSegment;
use bufshare::protocol::{Mode, Status, flag};
use desk::{Desk, READ, Raw, SIZE, WRITE, grant, request};
use uuid::Uuid;
use zerocopy::IntoBytes;

const WAIT: Duration = Duration::from_secs(5);

fn refused<T>(result: Result<T, Error>) -> Status {
    match result {
        Err(error) => error.status().unwrap_or_else(|| panic!("not a refusal: {error}")),
        Ok(_) => Status::Ok,
    }
}

#[test]
fn the_socket_is_private_and_stale_ones_are_replaced() {
    let desk = Desk::start();
    let mode = std::fs::metadata(desk.path()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    assert!(matches!(Listener::bind(&desk.path(), None), Err(ListenError::Served { .. })));
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    drop(Listener::bind(&path, None).unwrap());
    drop(Listener::bind(&path, None).unwrap());
    let file = dir.path().join("f");
    File::create(&file).unwrap();
    assert!(matches!(Listener::bind(&file, None), Err(ListenError::Occupied { .. })));
    let error = Listener::bind(&dir.path().join("no/s"), None).unwrap_err().to_string();
    assert!(error.contains("create its directory"), "{error}");
}

#[test]
fn connecting_says_what_is_wrong() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    assert!(matches!(Client::connect(&path, "t"), Err(Error::NoSocket { .. })));
    drop(Listener::bind(&path, None).unwrap());
    assert!(matches!(Client::connect(&path, "t"), Err(Error::NobodyListens { .. })));
    let stream = dir.path().join("stream");
    let _listener = std::os::unix::net::UnixListener::bind(&stream).unwrap();
    assert!(matches!(Client::connect(&stream, "t"), Err(Error::NotHostSocket { .. })));
}

#[test]
fn hello_tells_version_and_limits() {
    let desk = Desk::start();
    let client = desk.client();
    assert_eq!(client.daemon().peer_id, 1);
    assert_eq!(client.daemon().max_leases as usize, MAX_LEASES);
    assert_eq!(client.daemon().max_waits as usize, MAX_CLIENT_WAITS);
    assert!(client.daemon().name.contains("bufshare"));
    let raw = Raw::connect(&desk.path());
    let hdr = request(Type::Hello, 0, 7);
    let hello = wire::Hello { hdr, version: 2.into(), ..Default::default() };
    assert_eq!(raw.call(&hello), (Status::Unsupp, 7));
    assert_eq!(raw.call(&request(Type::List, 0, 8)), (Status::Inval, 8));
}

#[test]
fn every_offer_is_listed_once_and_found_by_name() {
    let desk = Desk::start();
    let mut uuids: Vec<Uuid> = (0..200).map(|i| desk.offer(&format!("frame {i}")).1).collect();
    desk.export("not granted");
    uuids.sort();
    let mut client = desk.client();
    let listed: Vec<Uuid> = client.list().unwrap().iter().map(|buffer| buffer.uuid).collect();
    assert_eq!(listed, uuids);
    let found = client.find("frame 77").unwrap().unwrap();
    assert_eq!((found.exporter_name.as_str(), found.access), ("app", READ | WRITE));
    assert_eq!(client.find(&found.uuid.to_string()).unwrap().unwrap(), found);
    assert_eq!(client.find("not granted").unwrap(), None);
    desk.offer("frame 77");
    assert!(matches!(client.find("frame 77"), Err(Error::Ambiguous { count: 2, .. })));
}

#[test]
fn a_lease_shows_what_the_exporter_completed_and_gives_it_back() {
    let desk = Desk::start();
    let (handle, uuid) = desk.offer("frame");
    let mut client = desk.client();
    let lease = client.acquire(uuid, READ | WRITE, false).unwrap();
    assert_eq!((lease.mode, lease.fd_kind, lease.writable), (Mode::Copy, FdKind::MemFd, false));
    assert_eq!(lease.metadata.len(), 88);
    let fd = File::from(lease.fd.try_clone().unwrap());

    desk.ram.write_all_at(b"drawn", 0).unwrap();
    assert_eq!(desk.end_write(handle), 1);
    assert_eq!(client.begin(lease.id, Access::READ, WAIT).unwrap(), 1);
    let mut seen = [0; 5];
    fd.read_exact_at(&mut seen, 0).unwrap();
    assert_eq!(&seen, b"drawn");
    client.end(lease.id, Access::READ).unwrap();

    client.begin(lease.id, Access::WRITE, WAIT).unwrap();
    fd.write_all_at(b"reply", 100).unwrap();
    let part = Access { bits: WRITE, offset: 100, len: 5 };
    assert_eq!(client.end(lease.id, part).unwrap(), 2);
    desk.ram.read_exact_at(&mut seen, 100).unwrap();
    assert_eq!(&seen, b"reply");

    let details = client.query(uuid).unwrap();
    assert_eq!((details.nr_leases, details.buffer.use_count), (1, 1));
    assert_eq!(details.leases[0].client, "test");
    assert_eq!(details.leases[0].pid, std::process::id());
    client.release(lease).unwrap();
    assert_eq!(client.query(uuid).unwrap().nr_leases, 0);
}

#[test]
fn refusals_name_their_reason() {
    let desk = Desk::start();
    let (handle, uuid) = desk.export("frame");
    let mut client = desk.client();
    assert_eq!(refused(client.acquire(uuid, READ, false)), Status::NoEnt);
    assert_eq!(refused(client.query(uuid)), Status::NoEnt);
    desk.grant(grant(handle, Bits::READ));
    assert_eq!(refused(client.acquire(uuid, WRITE, false)), Status::Access);
    assert_eq!(refused(client.acquire(uuid, READ, true)), Status::Access);
    assert_eq!(refused(client.acquire(uuid, 0, false)), Status::Inval);
    assert_eq!(refused(client.acquire(uuid, 4, false)), Status::Inval);
    let lease = client.acquire(uuid, READ, false).unwrap();
    assert_eq!(refused(client.end(lease.id, Access::WRITE)), Status::Access);
    assert_eq!(refused(client.end(lease.id + 1, Access::READ)), Status::NoEnt);
    let nothing = Access { bits: 0, offset: 0, len: 0 };
    assert_eq!(refused(client.end(lease.id, nothing)), Status::Inval);
    for (offset, len, status) in [
        (0, SIZE, Status::Ok),
        (SIZE, 0, Status::Ok),
        (1, SIZE, Status::Range),
        (SIZE + 1, 0, Status::Range),
        (u64::MAX, u64::MAX, Status::Range),
    ] {
        assert_eq!(refused(client.end(lease.id, Access { bits: READ, offset, len })), status);
    }
    assert_eq!(refused(client.cancel(99)), Status::NoEnt);
    // Somebody else's lease is none.
    let mut other = desk.client();
    assert_eq!(refused(other.end(lease.id, Access::READ)), Status::NoEnt);
}

#[test]
fn a_failed_copy_is_an_error_and_no_generation() {
    let desk = Desk::start();
    let (_, uuid) = desk.offer("frame");
    let mut client = desk.client();
    let lease = client.acquire(uuid, WRITE, false).unwrap();
    desk.ram.set_len(0).unwrap();
    assert_eq!(refused(client.end(lease.id, Access::WRITE)), Status::Io);
    assert_eq!(client.query(uuid).unwrap().buffer.generation, 0);
}

/// What one client has copied holds up neither another one nor the clock.
#[test]
fn a_long_copy_holds_up_nobody_else() {
    let desk = Desk::start();
    let len = 512 << 20;
    let ram: File =
        rustix::fs::memfd_create("ram", rustix::fs::MemfdFlags::CLOEXEC).unwrap().into();
    ram.set_len(len).unwrap();
    let ram = Arc::new(ram);
    let pages = FileSegment { file: ram.clone(), offset: 0, len };
    let (handle, uuid) = desk.export_pages("large", pages);
    desk.grant(grant(handle, Bits::ALL));
    let (_, small) = desk.offer("small");
    let (mut writer, mut other) = (desk.client(), desk.client());
    let lease = writer.acquire(uuid, WRITE, false).unwrap();
    let held = other.acquire(small, READ, false).unwrap();
    let content = File::from(lease.fd.try_clone().unwrap());
    let copied = |client: &mut Client| {
        let stats = client.stats().unwrap();
        stats.into_iter().find(|(name, _)| name == "bytes_copied").unwrap().1
    };
    let mut meanwhile = false;
    // A machine that has no time for the other client in half a second may have it the next time.
    for round in 1..=5u8 {
        let before = copied(&mut other);
        content.write_all_at(&[round], 0).unwrap();
        let hdr = request(Type::Sync, flag::SYNC_END | flag::SYNC_WRITE, 77);
        let end = wire::Sync { hdr, lease: lease.id.into(), ..Default::default() };
        packet::send(&writer, end.as_bytes(), None, Wait::Forever).unwrap();
        let mut first = [0];
        while first != [round] {
            ram.read_exact_at(&mut first, 0).unwrap();
        }
        // The copy is under way: others are served, and what is due is done.
        let late = other.begin(held.id, Access::READ, WAIT).and(other.end(held.id, Access::READ));
        late.unwrap();
        meanwhile |= copied(&mut other) == before;
        let answer = packet::receive(&writer, Wait::Forever).unwrap().unwrap();
        assert_eq!(answer.bytes[8], 77, "{answer:?}");
        assert_eq!(copied(&mut other), before + len);
        if meanwhile {
            break;
        }
    }
    assert!(meanwhile, "the other client waited for the copy");
    // Whoever leaves in the middle of it leaves nothing behind.
    let hdr = request(Type::Sync, flag::SYNC_END | flag::SYNC_WRITE, 78);
    let end = wire::Sync { hdr, lease: lease.id.into(), ..Default::default() };
    packet::send(&writer, end.as_bytes(), None, Wait::Forever).unwrap();
    drop((writer, lease, content));
    let since = Instant::now();
    while desk.hub.read(|registry| registry.lease_count()) > 1 {
        assert!(since.elapsed() < WAIT);
    }
    desk.release(handle, false);
    while other.query(uuid).is_ok() {
        assert!(since.elapsed() < WAIT);
    }
}

#[test]
fn flags_of_a_clients_descriptor_are_its_own() {
    let desk = Desk::start();
    let (handle, uuid) = desk.offer("frame");
    let mut client = desk.client();
    let lease = client.acquire(uuid, READ, false).unwrap();
    // A descriptor that shares them would make every write of the daemon go to the end of the file.
    rustix::fs::fcntl_setfl(&lease.fd, rustix::fs::OFlags::APPEND).unwrap();
    desk.ram.write_all_at(b"drawn", 0).unwrap();
    assert_eq!(desk.end_write(handle), 1);
    let mut seen = [0; 5];
    File::from(lease.fd).read_exact_at(&mut seen, 0).unwrap();
    assert_eq!(&seen, b"drawn");
}

#[test]
fn read_only_by_policy_is_never_more() {
    let desk = Desk::read_only();
    let (handle, uuid) = desk.export("frame");
    desk.grant(grant(handle, Bits::READ));
    let mut client = desk.client();
    assert_eq!(client.list().unwrap()[0].access, READ);
    assert_eq!(refused(client.acquire(uuid, WRITE, false)), Status::Access);
    assert_eq!(client.acquire(uuid, READ, false).unwrap().mode, Mode::Copy);
}

#[test]
fn begin_waits_for_the_writer_and_other_requests_go_on() {
    let desk = Desk::start();
    let (handle, uuid) = desk.offer("frame");
    let mut client = desk.client();
    let lease = client.acquire(uuid, READ, false).unwrap();
    desk.begin_write(handle);
    assert_eq!(refused(client.try_begin(lease.id, Access::READ)), Status::Again);
    let short = Duration::from_millis(30);
    let before = Instant::now();
    assert_eq!(refused(client.begin(lease.id, Access::READ, short)), Status::TimedOut);
    assert!(before.elapsed() >= short);

    let cookie = client.submit_begin(lease.id, Access::READ, WAIT).unwrap();
    assert_eq!(client.list().unwrap().len(), 1);
    assert_eq!(client.take_generation(cookie).unwrap(), None);
    client.cancel(cookie).unwrap();
    assert_eq!(refused(client.take_generation(cookie)), Status::Canceled);

    let cookie = client.submit_begin(lease.id, Access::READ, WAIT).unwrap();
    client.list().unwrap();
    desk.end_write(handle);
    let generation = loop {
        client.dispatch().unwrap();
        if let Some(generation) = client.take_generation(cookie).unwrap() {
            break generation;
        }
    };
    assert_eq!(generation, 1);
}

#[test]
fn waits_leases_and_clients_are_bounded() {
    let desk = Desk::start();
    let (handle, uuid) = desk.offer("frame");
    let mut client = desk.client();
    let lease = client.acquire(uuid, READ, false).unwrap();
    desk.begin_write(handle);
    for _ in 0..MAX_CLIENT_WAITS {
        client.submit_begin(lease.id, Access::READ, WAIT).unwrap();
    }
    assert_eq!(refused(client.begin(lease.id, Access::READ, WAIT)), Status::Busy);
    client.release(lease).unwrap();
    for _ in 0..MAX_LEASES {
        client.acquire(uuid, READ, false).unwrap();
    }
    assert_eq!(refused(client.acquire(uuid, READ, false)), Status::Quota);
    let others: Vec<Client> = (1..MAX_CLIENTS).map(|_| desk.client()).collect();
    let error = Client::connect(&desk.path(), "one too many").unwrap_err();
    assert!(matches!(error, Error::TooManyClients), "{error}");
    drop(others);
    drop(client);
    let since = Instant::now();
    while Client::connect(&desk.path(), "again").is_err() {
        assert!(since.elapsed() < WAIT);
    }
}

#[test]
fn a_dead_client_leaves_nothing() {
    let desk = Desk::start();
    let (handle, uuid) = desk.offer("frame");
    let mut dead = desk.client();
    let lease = dead.acquire(uuid, WRITE, false).unwrap();
    dead.begin(lease.id, Access::WRITE, WAIT).unwrap();
    let mut client = desk.client();
    let waiting = client.acquire(uuid, READ, false).unwrap();
    assert_eq!(refused(client.try_begin(waiting.id, Access::READ)), Status::Again);
    drop(dead);
    // Its WRITE is gone with it; the generation stays.
    assert_eq!(client.begin(waiting.id, Access::READ, WAIT).unwrap(), 0);
    assert_eq!(client.query(uuid).unwrap().nr_leases, 1);
    drop((client, lease, waiting));
    let since = Instant::now();
    while desk.hub.read(|registry| registry.lease_count()) > 0 {
        assert!(since.elapsed() < WAIT);
    }
    desk.release(handle, false);
    assert_eq!(desk.hub.read(|registry| registry.buffer_count()), 0);
}

#[test]
fn garbage_is_answered_or_ends_the_connection_and_harms_nobody() {
    let desk = Desk::start();
    desk.offer("frame");
    let raw = Raw::greeted(&desk.path());
    for kind in 0..=u16::MAX {
        let known = Type::from_wire(kind).filter(|kind| kind.to_wire() < 0x1000);
        let mut hdr = request(Type::Hello, 0, u64::from(kind) + 1);
        hdr.kind = kind.into();
        let (status, cookie) = raw.call(&hdr);
        assert_eq!(cookie, u64::from(kind) + 1);
        // Those that exist are too short here.
        assert_eq!(status, if known.is_some() { Status::Inval } else { Status::Unsupp }, "{kind}");
    }
    let hdr = request(Type::List, 0, 5);
    let odd = wire::Req { reserved: 1.into(), ..hdr };
    assert_eq!(raw.call(&wire::List { hdr: odd, after: [0; 16] }), (Status::Inval, 5));
    let odd = request(Type::Sync, flag::SYNC_NONBLOCK << 1, 6);
    assert_eq!(raw.call(&wire::Sync { hdr: odd, ..Default::default() }), (Status::Inval, 6));
    let mut long = wire::List { hdr, after: [0; 16] }.as_bytes().to_vec();
    long.resize(wire::MAX_PACKET, 0xff);
    raw.send(&long);
    assert_eq!(raw.answer(), Some((Status::Ok, 5)));
    long.resize(wire::MAX_PACKET + 1, 0xff);
    raw.send(&long);
    assert_eq!(raw.answer(), Some((Status::Inval, 5)));
    let file = tempfile::tempfile().unwrap();
    packet::send(&raw.0, &long[..32], Some(file.as_fd()), Wait::Forever).unwrap();
    assert_eq!(raw.answer(), Some((Status::Inval, 5)));
    raw.send(&[1, 0, 0]);
    assert_eq!(raw.answer(), None);
    assert_eq!(desk.client().list().unwrap().len(), 1);
}

/// A stream of numbers that is the same in every run.
fn noise() -> impl FnMut() -> u64 {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    }
}

#[test]
fn random_requests_get_their_answers() {
    let desk = Desk::start();
    let (handle, uuid) = desk.offer("frame");
    desk.begin_write(handle);
    let mut noise = noise();
    let mut raw = Raw::greeted(&desk.path());
    // Requests that wait are answered later: they are counted, not followed.
    let (mut asked, mut answered) = (0u64, 0u64);
    for _ in 0..20_000 {
        let mut bytes: Vec<u8> = (0..12).flat_map(|_| noise().to_le_bytes()).collect();
        let kinds = Type::ALL.len() as u64;
        let kind = Type::ALL[(noise() % kinds) as usize].to_wire();
        bytes[..2].copy_from_slice(&kind.to_le_bytes());
        bytes[2..4].copy_from_slice(&((noise() % 16) as u16).to_le_bytes());
        bytes[4..8].fill(0);
        if noise().is_multiple_of(2) {
            // Something that exists: the buffer, or one of the first leases.
            bytes[16..32].copy_from_slice(uuid.as_bytes());
            bytes[32..40].copy_from_slice(&(noise() % 4).to_le_bytes());
        } else {
            bytes[16..24].copy_from_slice(&(noise() % 64).to_le_bytes());
            bytes[24..48].fill((noise() % 2) as u8);
        }
        bytes.truncate(16 + (noise() % 80) as usize);
        raw.send(&bytes);
        asked += 1;
        while let Ok(Some(packet)) = packet::receive(&raw.0, Wait::Never) {
            answered += u64::from(packet.bytes[1] < 0x10);
        }
        if noise().is_multiple_of(4096) {
            assert!(answered <= asked);
            raw = Raw::greeted(&desk.path());
            (asked, answered) = (0, 0);
        }
    }
    drop(raw);
    let since = Instant::now();
    while desk.hub.read(|registry| registry.lease_count()) > 0 {
        assert!(since.elapsed() < WAIT);
    }
    desk.end_write(handle);
    assert_eq!(desk.client().list().unwrap().len(), 1);
}

#[test]
fn statistics_count() {
    let desk = Desk::start();
    let (handle, _) = desk.offer("frame");
    desk.end_write(handle);
    let stats = desk.client().stats().unwrap();
    let value = |wanted: &str| stats.iter().find(|(name, _)| name == wanted).unwrap().1;
    assert_eq!((value("buffers"), value("bytes_copied")), (1, SIZE));
}
