//! Two guests through one daemon, from EXPORT in one to the last byte in the other: frames in lock-step,
//! isolation, and deaths in the middle of a copy.

mod common;

use bufshare::protocol::{Mode, Opcode, RespSync, State, Status, feature, flag, peer};
use common::*;

const READ: u16 = flag::SYNC_READ;
const WRITE: u16 = flag::SYNC_WRITE;

/// Guests that may share with each other, and a third one that may share with nobody.
struct Bed {
    daemon: Daemon,
    a: Guest,
    b: Guest,
}

fn bed() -> Bed {
    let launch = Launch {
        vms: ["name=a", "name=b", "name=c"].map(String::from).to_vec(),
        args: ["--allow", "a:b", "--allow", "b:a"].map(String::from).to_vec(),
        ..Default::default()
    };
    let daemon = launch.start();
    let [a, b] = ["a", "b"].map(|name| guest(&daemon, name));
    Bed { daemon, a, b }
}

fn guest(daemon: &Daemon, name: &str) -> Guest {
    Setup { decline: 1 << feature::PEERS, ..Default::default() }.connect(daemon, name)
}

/// One buffer as both sides know it.
#[derive(Debug, Clone, Copy)]
struct Shared {
    /// The exporter's handle and pages.
    handle: u64,
    addr: u64,
    /// The importer's.
    attachment: u64,
    mapping: u64,
    view: u64,
    size: u64,
    uuid: [u8; 16],
    mode: Option<Mode>,
}

/// `from` lends fresh pages to `to`, which maps them to pages of its own.
fn share(from: &mut Guest, to: &mut Guest, pages: u64) -> Shared {
    let (export, addr) = from.export_pages(pages);
    let (handle, uuid, size) = (export.handle.get(), export.uuid, pages * PAGE);
    let peer_id = to.config.peer_id.get();
    from.grant(Grant { handle, peer_id, ..Default::default() }).expect("GRANT");
    let attached = to.attach(Attach { uuid, ..Default::default() }).expect("ATTACH");
    let attachment = attached.0.handle.get();
    // Scattered: every second page, the last one first.
    let own = to.pages(2 * pages);
    let scattered = (0..pages).map(|page| (own + 2 * (pages - 1 - page) * PAGE, PAGE)).collect();
    let map = Map { handle: attachment, segments: scattered, ..Default::default() };
    let mapping = to.map(&map).expect("MAP");
    let mode = Mode::from_wire(export.mode.get());
    Shared { handle, addr, attachment, mapping, view: own, size, uuid, mode }
}

impl Shared {
    fn pages(&self) -> u64 {
        self.size / PAGE
    }

    /// Where the importer sees a page.
    fn view_of(&self, page: u64) -> u64 {
        self.view + 2 * (self.pages() - 1 - page) * PAGE
    }

    fn export(&self, flags: u16) -> Sync {
        Sync { handle: self.handle, flags, timeout_ns: u64::MAX, ..Default::default() }
    }

    fn import(&self, flags: u16) -> Sync {
        Sync { handle: self.attachment, ..self.export(flags) }
    }
}

/// A page of a frame: its number and the page's, over and over.
fn picture(frame: u64, page: u64) -> Vec<u8> {
    let word = (frame << 16 | page).to_le_bytes();
    word.iter().copied().cycle().take(PAGE as usize).collect()
}

/// A draws; B sees every frame whole and answers on a buffer of its own; A draws the next one.
#[test]
fn a_thousand_frames_in_lock_step() {
    let Bed { mut a, mut b, daemon: _daemon } = bed();
    let frames = share(&mut a, &mut b, 16);
    let answers = share(&mut b, &mut a, 1);
    for frame in 1..=1000 {
        a.begin(frames.export(WRITE)).expect("BEGIN");
        for page in 0..frames.pages() {
            a.memory.write(frames.addr + page * PAGE, &picture(frame, page));
        }
        a.end(frames.export(WRITE)).expect("END");
        let seen = b.begin(frames.import(READ)).expect("BEGIN").generation.get();
        assert_eq!(seen, frame);
        for page in 0..frames.pages() {
            let bytes = b.memory.read(frames.view_of(page), PAGE as usize);
            assert_eq!(bytes, picture(frame, page), "page {page} of frame {frame}");
        }
        b.end(frames.import(READ)).expect("END");
        b.memory.write(answers.addr, &frame.to_le_bytes());
        b.end(answers.export(WRITE)).expect("END");
        assert_eq!(a.begin(answers.import(READ)).expect("BEGIN").generation.get(), frame);
        assert_eq!(a.memory.read(answers.view, 8), frame.to_le_bytes());
        a.end(answers.import(READ)).expect("END");
    }
    let holes = (0..frames.pages()).map(|page| frames.view_of(page) + PAGE);
    assert!(holes.into_iter().all(|at| b.memory.read(at, 8) == [0; 8]), "beside the mapping");
}

/// Whoever reads while another one writes waits, or sees a frame whole; who skips BEGIN is seen tearing
/// by the same look.
#[test]
fn a_writer_without_begin_is_seen() {
    let Bed { mut a, mut b, daemon: _daemon } = bed();
    let frames = share(&mut a, &mut b, 64);
    let torn = |b: &Guest| {
        let frame = |page| b.memory.read(frames.view_of(page), 8)[2];
        (1..frames.pages()).any(|page| frame(page) != frame(0))
    };
    let half = |a: &Guest, frame, from: u64| {
        for page in from..from + 32 {
            a.memory.write(frames.addr + page * PAGE, &picture(frame, page));
        }
    };
    for honest in [true, false] {
        if honest {
            a.begin(frames.export(WRITE)).expect("BEGIN");
        }
        half(&a, 5, 0);
        let head = b.sync_start::<RespSync>(&frames.import(READ).bytes());
        if honest {
            assert!(b.sync_next::<RespSync>(QUIET).is_none(), "it waits");
            half(&a, 5, 32);
            a.end(frames.export(WRITE)).expect("END");
        }
        let (done, reply) = b.sync_next::<RespSync>(SOON).expect("BEGIN");
        assert_eq!((done, reply.is_ok()), (head, true));
        // A private copy changes at END alone, so it is whole in any case.
        assert_eq!(torn(&b), !honest && frames.mode == Some(Mode::ZeroCopy));
        b.end(frames.import(READ)).expect("END");
        half(&a, 4, 0);
        half(&a, 4, 32);
        a.end(frames.export(WRITE)).expect("END");
    }
}

/// Nothing but the buffer, and that only as long as there is a right to it.
#[test]
fn b_sees_nothing_else_of_a() {
    let Bed { mut a, mut b, daemon: _daemon } = bed();
    a.memory.fill(FREE, 64 * PAGE, 0xc5);
    a.pages(8);
    b.pages(1);
    let shared = share(&mut a, &mut b, 4);
    a.memory.fill(shared.addr, shared.size, 0x11);
    b.memory.fill(shared.view - PAGE, 10 * PAGE, 0x77);
    a.end(shared.export(WRITE)).expect("END");
    for (offset, len) in [(0, shared.size + 1), (shared.size, 1), (u64::MAX, 2), (1, u64::MAX)] {
        let beyond = Sync { offset, len, ..shared.import(READ | WRITE) };
        b.begin(beyond).refused(Status::Range);
        b.end(beyond).refused(Status::Range);
    }
    b.begin(shared.import(READ)).expect("BEGIN");
    b.end(shared.import(READ | WRITE)).expect("END");
    let all = b.memory.read(BASE, 64 << 20);
    assert!(all.chunks(64).all(|at| at[..8] != [0xc5; 8]), "a canary of A in the memory of B");
    let seen = |page| b.memory.read(shared.view_of(page), PAGE as usize);
    assert!((0..4).all(|page| seen(page) == [0x11; PAGE as usize]));
    assert_eq!(b.memory.read(shared.view - PAGE, 1), [0x77], "in front of the mapping");
    assert_eq!(b.memory.read(shared.view + 8 * PAGE, 1), [0x77], "behind it");
    for at in [shared.addr - 1, shared.addr + shared.size] {
        assert_eq!(a.memory.read(at, 1), [0xc5], "a canary of A was overwritten");
    }
    // A's next content is for A alone, however B lost its right.
    let mut secret = 0x20;
    let mut lose =
        |a: &mut Guest, b: &mut Guest, lost: &mut dyn FnMut(&mut Guest, &mut Guest, Shared)| {
            let shared = share(a, b, 1);
            b.begin(shared.import(READ)).expect("BEGIN");
            lost(a, b, shared);
            secret += 1;
            a.memory.fill(shared.addr, PAGE, secret);
            let _ = a.end(shared.export(WRITE));
            let _ = b.begin(shared.import(READ));
            let _ = b.end(shared.import(READ | WRITE));
            assert_ne!(b.memory.read(shared.view, 1), [secret]);
            assert_eq!(a.memory.read(shared.addr, 1), [secret], "and B changes nothing");
        };
    lose(&mut a, &mut b, &mut |_, b, shared| b.unmap(shared.mapping).expect("UNMAP"));
    lose(&mut a, &mut b, &mut |_, b, shared| {
        b.unmap(shared.mapping).expect("UNMAP");
        b.detach(shared.attachment).expect("DETACH");
    });
    lose(&mut a, &mut b, &mut |a, b, shared| {
        let (peer_id, flags) = (b.config.peer_id.get(), flag::GRANT_FORCE);
        let revoke = Grant { flags, handle: shared.handle, peer_id, access: 0, lifetime_ms: 0 };
        a.grant(revoke).expect("GRANT");
    });
    lose(&mut a, &mut b, &mut |a, _, shared| {
        let told = a.release_force(shared.handle).expect("RELEASE");
        assert_eq!(State::from_wire(told.state.get()), Some(State::Released));
    });
    lose(&mut a, &mut b, &mut |a, _, _| a.reset(Stop::WithBase));
    lose(&mut a, &mut b, &mut |a, _, _| a.reconnect());
}

/// Neither what is granted to others nor to all says anything to who is allowed nothing.
#[test]
fn a_third_vm_learns_nothing() {
    let Bed { mut a, mut b, daemon } = bed();
    let mut c = guest(&daemon, "c");
    let shared = share(&mut a, &mut b, 1);
    let peer_id = peer::ANY;
    a.grant(Grant { handle: shared.handle, peer_id, ..Default::default() }).expect("GRANT");
    a.end(shared.export(WRITE)).expect("END");
    c.expect_no_event();
    let real = Attach { uuid: shared.uuid, ..Default::default() };
    let refused = c.attach(real).refused(Status::NoEnt);
    let unknown = Attach { uuid: [3; 16], ..Default::default() };
    assert_eq!(c.attach(unknown).refused(Status::NoEnt), refused);
    for handle in 0..20 {
        c.query(handle).refused(Status::NoEnt);
        c.detach(handle).refused(Status::NoEnt);
        c.unmap(handle).refused(Status::NoEnt);
    }
    a.release_force(shared.handle).expect("RELEASE");
    c.expect_no_event();
}

/// Whoever dies in the middle of a copy takes nobody along, and nothing is left of it.
#[test]
fn deaths_in_the_middle_leave_nothing() {
    let Bed { mut a, mut b, daemon } = bed();
    let before = daemon.fds();
    for round in 0..12 {
        let shared = share(&mut a, &mut b, 512);
        let bytes = shared.import(if round % 2 == 0 { READ } else { READ | WRITE }).bytes();
        b.sync_start::<RespSync>(&bytes);
        std::thread::sleep(std::time::Duration::from_micros(100 * (round % 5)));
        match round % 4 {
            0 => b.reconnect(),
            1 => a.reconnect(),
            2 => b.reset(Stop::WithBase),
            _ => a.reset(Stop::DisableOnly),
        }
        let (one, _) = a.export_pages(1);
        a.release(one.handle.get()).expect("A lives");
        let (one, _) = b.export_pages(1);
        b.release(one.handle.get()).expect("B lives");
        a.reconnect();
        b.reconnect();
    }
    let settled = wait_for(SOON, || daemon.fds() <= before);
    assert!(settled, "{} descriptors, {before} before: {:#?}", daemon.fds(), daemon.fd_names());
}

/// A copy to or from memory that its VMM truncated fails, and nobody else notices.
#[test]
fn memory_that_shrinks_fails_the_copy() {
    let launch = Launch {
        vms: vec!["name=a".into(), "name=b,unsealed-ram".into()],
        args: ["--allow", "a:b"].map(String::from).to_vec(),
        ..Default::default()
    };
    let daemon = launch.start();
    let mut a = guest(&daemon, "a");
    let setup = Setup { regions: vec![Region::default(), spare()], ..Default::default() };
    let mut b = setup.connect(&daemon, "b");
    let (export, _) = a.export_pages(1);
    let (handle, uuid) = (export.handle.get(), export.uuid);
    let peer_id = b.config.peer_id.get();
    a.grant(Grant { handle, peer_id, ..Default::default() }).expect("GRANT");
    let attached = b.attach(Attach { uuid, ..Default::default() }).expect("ATTACH");
    let attachment = attached.0.handle.get();
    let segments = vec![(spare().start, PAGE)];
    b.map(&Map { handle: attachment, segments, ..Default::default() }).expect("MAP");
    let read = Sync { handle: attachment, flags: READ, ..Default::default() };
    b.begin(read).expect("BEGIN");
    b.end(read).expect("END");
    b.memory.truncate(&spare());
    b.begin(read).refused(Status::Io);
    b.end(Sync { flags: WRITE, ..read }).refused(Status::Io);
    assert_eq!(a.query(handle).expect("QUERY").generation.get(), 0);
    a.begin(Sync { handle, flags: WRITE, ..Default::default() }).expect("no bit is left behind");
    b.query(attachment).expect("B lives, too");
    assert!(a.event(SOON).is_some_and(|event| event.kind.get() == Opcode::EvtBusy.to_wire()));
}

/// A region that its owner can truncate.
fn spare() -> Region {
    Region { start: 0x1_0000_0000, len: 1 << 20, ..Region::unsealed() }
}

/// "a" and "b" as before, and "b" sees in its window what "a" lends it.
fn windowed() -> Bed {
    let mut bed = bed();
    drop(std::mem::replace(&mut bed.b, guest(&bed.daemon, "c")));
    let setup = Setup {
        decline: 1 << feature::PEERS,
        vmm: Some(Behaviour::default()),
        ..Default::default()
    };
    bed.b = setup.connect(&bed.daemon, "b");
    bed
}

/// `from` lends fresh pages to `to`, which sees them in its window at `at`.
fn show(from: &mut Guest, to: &mut Guest, pages: u64, at: u64) -> Shared {
    let (export, addr) = from.export_pages(pages);
    let (handle, uuid, size) = (export.handle.get(), export.uuid, pages * PAGE);
    let peer_id = to.config.peer_id.get();
    from.grant(Grant { handle, peer_id, ..Default::default() }).expect("GRANT");
    let (told, _) = to.attach(Attach { uuid, ..Default::default() }).expect("ATTACH");
    let attachment = told.handle.get();
    let map =
        Map { flags: 0, handle: attachment, shm_offset: at, len: Some(size), ..Default::default() };
    let mapping = to.map(&map).expect("MAP");
    let mode = Mode::from_wire(told.mode.get());
    Shared { handle, addr, attachment, mapping, view: at, size, uuid, mode }
}

/// As by copy: every frame arrives whole and in its turn, here without a copy where that can be.
#[test]
fn a_thousand_frames_through_the_window() {
    let Bed { mut a, mut b, daemon } = windowed();
    let frames = show(&mut a, &mut b, 16, 0);
    let mut client =
        bufshare::host::client::Client::connect(&daemon.host_socket(), "test").expect("socket");
    for frame in 1..=1000 {
        a.begin(frames.export(WRITE)).expect("BEGIN");
        for page in 0..frames.pages() {
            a.memory.write(frames.addr + page * PAGE, &picture(frame, page));
        }
        a.end(frames.export(WRITE)).expect("END");
        let seen = b.begin(frames.import(READ)).expect("BEGIN").generation.get();
        assert_eq!(seen, 2 * frame - 1);
        for page in 0..frames.pages() {
            let bytes = b.window().read(page * PAGE, PAGE as usize).expect("shown");
            assert_eq!(bytes, picture(frame, page), "page {page} of frame {frame}");
        }
        b.window().write(0, &frame.to_le_bytes());
        b.end(frames.import(READ | WRITE)).expect("END");
        a.begin(frames.export(READ)).expect("BEGIN");
        assert_eq!(a.memory.read(frames.addr, 8), frame.to_le_bytes());
        a.end(frames.export(READ)).expect("END");
    }
    let stats = client.stats().expect("STATS");
    let copied = stats.iter().find(|(name, _)| name == "bytes_copied").expect("bytes_copied").1;
    assert_eq!(copied == 0, frames.mode == Some(Mode::ZeroCopy), "{copied} bytes");
}

/// The whole window shows nothing of "a" but the buffer, and that only as long as there is a right to it.
#[test]
fn the_window_shows_nothing_else_of_a() {
    const AT: u64 = 1 << 20;
    let Bed { mut a, mut b, daemon: _daemon } = windowed();
    a.memory.fill(FREE, 64 * PAGE, 0xc5);
    a.pages(8);
    let scan = |b: &Guest| {
        let all = b.window().shown().into_iter();
        all.flat_map(|(at, len)| b.window().read(at, len as usize).expect("shown")).collect()
    };
    let mut secret = 0x20u8;
    type Lose<'a> = &'a mut dyn FnMut(&mut Guest, &mut Guest, Shared);
    let mut lose = |a: &mut Guest, b: &mut Guest, lost: Lose<'_>| {
        let shared = show(a, b, 4, AT);
        a.memory.fill(shared.addr, shared.size, 0x11);
        let _ = a.end(shared.export(WRITE));
        b.begin(shared.import(READ)).expect("BEGIN");
        assert!(b.window().read(AT - 1, 1).is_none(), "in front of it");
        assert!(b.window().read(AT + shared.size, 1).is_none(), "behind it");
        let seen: Vec<u8> = scan(b);
        assert_eq!(seen, vec![0x11; shared.size as usize], "the buffer, and no canary");
        b.window().write(AT, &[0x12; 16]);
        lost(a, b, shared);
        assert!(wait_for(SOON, || b.window().shown().is_empty()), "it is shown no longer");
        secret += 1;
        a.memory.fill(shared.addr, shared.size, secret);
        let _ = a.end(shared.export(WRITE));
        let _ = b.begin(shared.import(READ));
        let _ = b.end(shared.import(READ | WRITE));
        assert_eq!(a.memory.read(shared.addr, 1), [secret], "B changes nothing");
        let again = a.pages(4);
        assert_eq!(a.memory.read(again, 1), [0xc5], "a canary behind the buffer was overwritten");
    };
    lose(&mut a, &mut b, &mut |_, b, shared| b.unmap(shared.mapping).expect("UNMAP"));
    lose(&mut a, &mut b, &mut |_, b, shared| {
        b.unmap(shared.mapping).expect("UNMAP");
        b.detach(shared.attachment).expect("DETACH");
    });
    lose(&mut a, &mut b, &mut |a, b, shared| {
        let (peer_id, flags) = (b.config.peer_id.get(), flag::GRANT_FORCE);
        let revoke = Grant { flags, handle: shared.handle, peer_id, access: 0, lifetime_ms: 0 };
        a.grant(revoke).expect("GRANT");
    });
    lose(&mut a, &mut b, &mut |a, _, shared| {
        a.release_force(shared.handle).expect("RELEASE");
    });
    lose(&mut a, &mut b, &mut |_, b, _| b.reset(Stop::WithBase));
    lose(&mut a, &mut b, &mut |a, _, _| a.reset(Stop::WithBase));
    lose(&mut a, &mut b, &mut |a, _, _| a.reconnect());
}

/// A VMM that takes a second for each answer delays its own guest's mappings, and nobody's frames.
#[test]
fn a_slow_vmm_delays_no_other_vm() {
    let Bed { mut a, mut b, daemon } = windowed();
    let frames = show(&mut a, &mut b, 4, 0);
    let delay = std::time::Duration::from_secs(1);
    b.window().behave(Behaviour { delay, ..Default::default() });
    let map = Map {
        flags: 0,
        handle: frames.attachment,
        shm_offset: 1 << 20,
        len: Some(PAGE),
        ..Default::default()
    };
    b.control_ring().submit(&[&map.bytes()], &[24]).expect("room");
    let mut c = guest(&daemon, "c");
    let start = std::time::Instant::now();
    let mut longest = start.elapsed();
    while start.elapsed() < delay / 2 {
        let round = std::time::Instant::now();
        a.end(frames.export(WRITE)).expect("END");
        b.begin(frames.import(READ)).expect("BEGIN");
        b.end(frames.import(READ)).expect("END");
        let (export, _) = c.export_pages(1);
        c.release(export.handle.get()).expect("RELEASE");
        longest = longest.max(round.elapsed());
    }
    assert!(longest < delay / 4, "{longest:?}");
    b.control_ring().wait(SOON).expect("MAP");
}

/// Whoever dies with something in a window takes nobody along, and nothing is left of it.
#[test]
fn deaths_with_a_window_leave_nothing() {
    let Bed { mut a, mut b, daemon } = windowed();
    let before = daemon.fds();
    for round in 0..12 {
        let shared = show(&mut a, &mut b, 8, 0);
        let more = Map {
            flags: 0,
            handle: shared.attachment,
            shm_offset: 1 << 20,
            len: Some(PAGE),
            ..Default::default()
        };
        b.control_ring().submit(&[&more.bytes()], &[24]).expect("room");
        std::thread::sleep(std::time::Duration::from_micros(100 * (round % 5)));
        match round % 4 {
            0 => b.reconnect(),
            1 => a.reconnect(),
            2 => b.reset(Stop::WithBase),
            _ => a.reset(Stop::DisableOnly),
        }
        let (one, _) = a.export_pages(1);
        a.release(one.handle.get()).expect("A lives");
        b.reconnect();
        a.reconnect();
    }
    let settled = wait_for(SOON, || daemon.fds() <= before);
    assert!(settled, "{} descriptors, {before} before: {:#?}", daemon.fds(), daemon.fd_names());
}
