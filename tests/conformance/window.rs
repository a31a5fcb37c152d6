//! MAP into the window: shared memory region 1, which the VMM fills.

use super::*;
use std::time::Instant;

use bufshare::protocol::{Opcode, RespMap, RespState, State, access};

const READ: u16 = flag::SYNC_READ;
const WRITE: u16 = flag::SYNC_WRITE;
const MIB: u64 = 1 << 20;

/// A pair whose importer has a window.
fn windowed(behaviour: Behaviour) -> Pair {
    windowed_with(behaviour, &[])
}

fn windowed_with(behaviour: Behaviour, args: &[&str]) -> Pair {
    let mut pair = pair_with(args);
    drop(std::mem::replace(&mut pair.b, quiet().connect(&pair.daemon, "c")));
    let setup = Setup { vmm: Some(behaviour), ..quiet() };
    pair.b = setup.connect(&pair.daemon, "b");
    settle(&mut pair.b);
    pair
}

/// Takes the events that a start brings.
fn settle(guest: &mut Guest) {
    while guest.event(QUIET).is_some() {}
}

fn at(handle: u64, shm_offset: u64, len: u64) -> Map {
    Map { flags: 0, handle, shm_offset, len: Some(len), ..Default::default() }
}

/// An attachment of the whole buffer, and where it is mapped.
#[derive(Debug, Clone, Copy)]
struct Seen {
    held: Buffer,
    mapping: u64,
    at: u64,
}

impl Pair {
    /// "b" attaches with this access and maps the whole buffer there.
    #[track_caller]
    fn see(&mut self, buffer: &Buffer, access: u32, shm_offset: u64) -> Seen {
        let request = Attach { uuid: buffer.uuid, access, ..Default::default() };
        let (told, _) = self.b.attach(request).expect("ATTACH");
        let mode = Mode::from_wire(told.mode.get()).expect("a mode");
        let held = Buffer { handle: told.handle.get(), mode, ..*buffer };
        let map = Map { access, ..at(held.handle, shm_offset, buffer.size) };
        let mapping = self.b.map(&map).expect("MAP");
        Seen { held, mapping, at: shm_offset }
    }

    /// Bytes that the daemon copied so far.
    fn copied(&self) -> u64 {
        let mut client = Client::connect(&self.daemon.host_socket(), "test").expect("host socket");
        let stats = client.stats().expect("STATS");
        let count = stats.iter().find(|(name, _)| name == "bytes_copied");
        count.expect("bytes_copied").1
    }

    fn use_count(&mut self, buffer: &Buffer) -> u32 {
        self.a.query(buffer.handle).expect("QUERY").use_count.get()
    }
}

/// [dev-map-5] [dev-map-6] [dev-map-7] What is shown is there when MAP is answered, and not there after
/// UNMAP.
#[test]
fn a_buffer_is_seen_in_the_window() {
    for echo in [true, false] {
        let mut pair = windowed(Behaviour { echo, ..Default::default() });
        let buffer = pair.granted(4);
        pair.a.memory.fill(buffer.addr, buffer.size, 0x5a);
        pair.a.end(sync(&buffer, WRITE)).expect("END");
        let before = pair.copied();
        let Seen { held, mapping, at } = pair.see(&buffer, READ_WRITE, MIB);
        assert_eq!(held.mode, buffer.mode, "zero copies where the export allows them");
        assert_eq!(pair.b.window().shown(), [(at, buffer.size)]);
        assert_eq!(pair.use_count(&buffer), 1);
        pair.b.begin(sync(&held, READ)).expect("BEGIN");
        let seen = pair.b.window().read(at, buffer.size as usize).expect("shown");
        assert!(seen.iter().all(|byte| *byte == 0x5a));
        pair.b.window().write(at + 7, b"from b");
        pair.b.end(sync(&held, READ | WRITE)).expect("END");
        pair.a.begin(sync(&buffer, READ)).expect("BEGIN");
        assert_eq!(pair.a.memory.read(buffer.addr + 7, 6), b"from b");
        let copied = pair.copied() - before;
        assert_eq!(copied == 0, held.mode == Mode::ZeroCopy, "{copied} bytes");
        pair.b.detach(held.handle).refused(Status::Busy);
        pair.b.unmap(mapping).expect("UNMAP");
        assert_eq!(pair.b.window().read(at, 1), None);
        pair.b.unmap(mapping).refused(Status::NoEnt);
        pair.b.detach(held.handle).expect("DETACH");
        assert!(wait_for(SOON, || pair.use_count(&buffer) == 0));
        let told = pair.a.release(buffer.handle).expect("RELEASE");
        assert_eq!(State::from_wire(told.state.get()), Some(State::Released));
    }
}

/// [dev-map-8] [dev-attach-6] Who may only read sees a copy, and is told so.
#[test]
fn readers_see_a_copy_of_their_own() {
    let mut pair = windowed(Behaviour::default());
    let buffer = pair.granted(2);
    pair.a.memory.fill(buffer.addr, buffer.size, 1);
    pair.a.end(sync(&buffer, WRITE)).expect("END");
    let Seen { held, at, .. } = pair.see(&buffer, access::READ, 0);
    assert_eq!(held.mode, Mode::Copy);
    let asked = pair.b.window().asked();
    assert!(asked.iter().all(|asked| !asked.writable), "{asked:?}");
    assert_eq!(pair.b.window().read(at, 8).expect("shown"), [0; 8], "nothing was synced");
    let page = Sync { offset: PAGE, len: PAGE, ..sync(&held, READ) };
    pair.b.begin(page).expect("BEGIN");
    assert_eq!(pair.b.window().read(at, 8).expect("shown"), [0; 8], "outside of the range");
    assert_eq!(pair.b.window().read(at + PAGE, 8).expect("shown"), [1; 8]);
    pair.b.end(page).expect("END");
    // QEMU lets it write all the same.
    pair.b.window().write(at, &[9; 16]);
    pair.b.end(sync(&held, WRITE)).refused(Status::Access);
    assert_eq!(pair.a.memory.read(buffer.addr, 8), [1; 8]);
    let request = Attach { uuid: buffer.uuid, access: access::READ, ..Default::default() };
    pair.b.attach(Attach { flags: flag::ATTACH_ZERO_COPY, ..request }).refused(Status::Access);
}

/// A VMM that keeps what it unmapped keeps no memory of the daemon's.
#[test]
fn a_copy_that_was_unmapped_is_empty() {
    use std::os::unix::fs::MetadataExt;
    let mut pair = windowed(Behaviour::default());
    let buffer = pair.granted(4);
    pair.a.end(sync(&buffer, WRITE)).expect("END");
    let Seen { held, mapping, at } = pair.see(&buffer, access::READ, 0);
    pair.b.begin(sync(&held, READ)).expect("BEGIN");
    let kept = pair.b.window().file(at);
    let blocks = || kept.metadata().expect("fstat").blocks();
    assert_ne!(blocks(), 0);
    pair.b.unmap(mapping).expect("UNMAP");
    assert!(wait_for(SOON, || blocks() == 0), "{} blocks", blocks());
}

/// [dev-attach-3] [dev-map-7]
#[test]
fn who_wants_no_copy_gets_what_it_wants_where_it_can() {
    let mut pair = windowed(Behaviour::default());
    let buffer = pair.granted(1);
    let request = Attach { uuid: buffer.uuid, flags: flag::ATTACH_ZERO_COPY, ..Default::default() };
    match buffer.mode {
        Mode::ZeroCopy => {
            let (told, _) = pair.b.attach(request).expect("ATTACH");
            assert_eq!(Mode::from_wire(told.mode.get()), Some(Mode::ZeroCopy));
        }
        Mode::Copy => drop(pair.b.attach(request).refused(Status::Access)),
    }
}

/// [dev-map-1] [dev-map-2] [dev-map-3] [dev-chain-14] In the order of the list of statuses.
#[test]
fn places_are_aligned_inside_and_apart() {
    let mut pair = windowed(Behaviour::default());
    let buffer = pair.granted(4);
    let handle = pair.attach(&buffer);
    let size = 256 * MIB;
    let good = at(handle, 0, PAGE);
    for bad in [
        Map { shm_offset: 1, ..good.clone() },
        Map { offset: 1, ..good.clone() },
        Map { len: Some(1), ..good.clone() },
        Map { shm_offset: size, ..good.clone() },
        Map { shm_offset: size - PAGE, len: Some(2 * PAGE), ..good.clone() },
        Map { shm_offset: u64::MAX - PAGE + 1, ..good.clone() },
        Map { offset: 4 * PAGE, ..good.clone() },
        Map { offset: u64::MAX - PAGE + 1, ..good.clone() },
        Map { len: Some(5 * PAGE), ..good.clone() },
    ] {
        pair.b.map(&bad).refused(Status::Range);
    }
    for bad in [
        Map { len: Some(0), ..good.clone() },
        Map { access: 0, ..good.clone() },
        Map { access: 4, ..good.clone() },
        Map { nr_segments: Some(1), ..good.clone() },
        Map { flags: 2, ..good.clone() },
    ] {
        pair.b.map(&bad).refused(Status::Inval);
    }
    pair.b.map(&Map { handle: 999, ..good.clone() }).refused(Status::NoEnt);
    let request = Attach { uuid: buffer.uuid, access: access::READ, ..Default::default() };
    let reader = pair.b.attach(request).expect("ATTACH").0.handle.get();
    pair.b.map(&Map { handle: reader, ..good.clone() }).refused(Status::Access);
    assert_eq!(pair.b.window().asked(), [], "the VMM is not bothered with any of it");
    pair.b.map(&at(handle, 2 * PAGE, 2 * PAGE)).expect("MAP");
    for (start, len) in [(PAGE, 2 * PAGE), (2 * PAGE, PAGE), (3 * PAGE, 2 * PAGE), (0, 4 * PAGE)] {
        pair.b.map(&at(handle, start, len)).refused(Status::Range);
    }
    let max = pair.b.read_config().max_mappings.get();
    assert_eq!(max, 7, "eight regions, one of which is memory");
    pair.b.map(&at(handle, 0, 2 * PAGE)).expect("beside it");
    pair.b.map(&at(handle, size - PAGE, PAGE)).expect("at the end");
    for place in 3..u64::from(max) {
        pair.b.map(&at(handle, place * MIB, PAGE)).expect("MAP");
    }
    pair.b.map(&at(handle, 100 * MIB, PAGE)).refused(Status::Quota);
    pair.b.map(&at(handle, 0, PAGE)).refused(Status::Range);
    assert_eq!(pair.b.query(handle).expect("QUERY").nr_mappings.get(), max);
}

/// [dev-feature-3] [dev-config-6] Without a VMM that maps there is no window, whatever the driver accepts.
#[test]
fn no_window_no_mapping() {
    let mut pair = pair();
    let buffer = pair.granted(1);
    let handle = pair.attach(&buffer);
    pair.b.map(&at(handle, 0, PAGE)).refused(Status::Unsupp);
    let features = pair.b.offered;
    assert_ne!(features & 1 << feature::WINDOW, 0);
    pair.b.features = features;
    pair.b.reset(Stop::WithBase);
    settle(&mut pair.b);
    let handle = pair.attach(&buffer);
    pair.b.map(&at(handle, 0, PAGE)).refused(Status::Unsupp);
    let (told, _) = {
        let request = Attach { uuid: buffer.uuid, ..Default::default() };
        pair.b.attach(request).expect("ATTACH")
    };
    assert_eq!(Mode::from_wire(told.mode.get()), Some(Mode::Copy));
    let pair = pair_with(&["--window-size", "0"]);
    assert_eq!(pair.b.offered & 1 << feature::WINDOW, 0);
}

/// [dev-map-9] Nothing behind a MAP or UNMAP waits for the monitor.
#[test]
fn a_slow_vmm_holds_up_nothing_but_its_own_mappings() {
    let delay = Duration::from_secs(1);
    let mut pair = windowed(Behaviour { delay, ..Default::default() });
    let buffer = pair.granted(1);
    let handle = pair.attach(&buffer);
    let ring = pair.b.control_ring();
    let first = ring.submit(&[&at(handle, 0, PAGE).bytes()], &[24]).expect("room");
    let second = ring.submit(&[&at(handle, MIB, PAGE).bytes()], &[24]).expect("room");
    let start = Instant::now();
    let query = handle_request(Opcode::Query, 0, handle);
    let third = ring.submit(&[&query], &[56]).expect("room");
    assert_eq!(ring.wait(SOON).expect("QUERY").head, third);
    pair.b.begin(sync(&Buffer { handle, ..buffer }, READ)).expect("BEGIN");
    pair.a.query(buffer.handle).expect("QUERY of the other VM");
    pair.b.detach(handle).refused(Status::Busy);
    assert!(start.elapsed() < delay / 2, "{:?}", start.elapsed());
    let mut done = Vec::new();
    for _ in 0..2 {
        let answer = pair.b.control_ring().wait(SOON).expect("MAP");
        parse::<RespMap>(answer.written()).expect("MAP");
        done.push(answer.head);
    }
    done.sort_unstable();
    assert_eq!(done, [first.min(second), first.max(second)]);
    assert!(start.elapsed() >= 2 * delay, "one request after the other");
    let first = pair.b.query(handle).expect("QUERY").nr_mappings.get();
    assert_eq!(first, 2);
}

/// [dev-map-10] [dev-chain-14] A refusal leaves nothing behind.
#[test]
fn a_vmm_that_refuses() {
    let refuses = Behaviour { manner: Manner::Refuses, ..Default::default() };
    let mut pair = windowed(refuses);
    let buffer = pair.granted(1);
    let handle = pair.attach(&buffer);
    for _ in 0..20 {
        pair.b.map(&at(handle, 0, PAGE)).refused(Status::Io);
    }
    assert_eq!(pair.b.query(handle).expect("QUERY").nr_mappings.get(), 0);
    pair.b.window().behave(Behaviour::default());
    let mapping = pair.b.map(&at(handle, 0, PAGE)).expect("MAP");
    pair.b.window().behave(Behaviour { manner: Manner::Keeps, ..Default::default() });
    pair.b.unmap(mapping).refused(Status::Io);
    assert_eq!(pair.b.query(handle).expect("QUERY").nr_mappings.get(), 1);
    pair.b.unmap(mapping).refused(Status::Io);
    pair.b.map(&at(handle, 0, PAGE)).refused(Status::Io);
    pair.b.map(&at(handle, PAGE, PAGE)).expect("elsewhere");
}

/// [dev-map-10] Nobody waits for ever for a VMM that is broken.
#[test]
fn a_vmm_that_breaks_the_channel() {
    for manner in [Manner::Closes, Manner::Babbles] {
        let mut pair = windowed(Behaviour::default());
        let buffer = pair.granted(1);
        let handle = pair.attach(&buffer);
        let mapping = pair.b.map(&at(handle, 0, PAGE)).expect("MAP");
        settle(&mut pair.b);
        pair.b.window().behave(Behaviour { manner, ..Default::default() });
        pair.b.map(&at(handle, MIB, PAGE)).refused(Status::Io);
        pair.b.map(&at(handle, 2 * MIB, PAGE)).refused(Status::Quota);
        assert_eq!(pair.b.read_config().max_mappings.get(), 0);
        pair.b.unmap(mapping).refused(Status::Io);
        pair.b.expect_event(Opcode::EvtResync);
        pair.a.query(buffer.handle).expect("the other VM");
        pair.b.reconnect();
        settle(&mut pair.b);
        let handle = pair.attach(&buffer);
        pair.b.window().behave(Behaviour::default());
        pair.b.map(&at(handle, 0, PAGE)).expect("with a new connection all is well");
    }
}

/// [dev-event-7] What is published is what the VMM can hold at this time.
#[test]
fn max_mappings_follows_the_memory_of_the_guest() {
    let mut pair = windowed(Behaviour::default());
    let max = |pair: &Pair| pair.b.read_config().max_mappings.get();
    assert_eq!(max(&pair), 7);
    let spare = Region { start: 0x1_0000_0000, len: 1 << 20, ..Region::default() };
    pair.b.memory.plug(&spare);
    pair.b.send_memory_table();
    pair.b.expect_event(Opcode::EvtResync);
    settle(&mut pair.b);
    assert_eq!(max(&pair), 6);
    let buffer = pair.granted(1);
    let seen = pair.see(&buffer, READ_WRITE, 0);
    assert_eq!(max(&pair), 6, "an echo is no memory");
    pair.b.unmap(seen.mapping).expect("UNMAP");
    pair.b.memory.unplug(&spare);
    pair.b.send_memory_table();
    assert_eq!(max(&pair), 7);
}

/// [dev-map-11] [dev-export-13] What is seen in the window is not the guest's to lend.
#[test]
fn pages_of_the_window_are_not_lent_on() {
    for access in [READ_WRITE, access::READ] {
        let mut pair = windowed(Behaviour::default());
        let buffer = pair.granted(2);
        let seen = pair.see(&buffer, access, 0);
        let inside = WINDOW + seen.at;
        for segments in [vec![(inside, PAGE)], vec![(inside, 2 * PAGE)]] {
            let export = Export { segments: segments.clone(), ..Default::default() };
            assert_eq!(pair.b.export(export).refused(Status::Fault).detail, 0);
            let handle = seen.held.handle;
            let map = Map { handle, access, segments, ..Default::default() };
            pair.b.map(&map).refused(Status::Fault);
        }
        let own = pair.b.pages(1);
        let segments = vec![(own, PAGE), (inside, PAGE)];
        let export = Export { segments, ..Default::default() };
        assert_eq!(pair.b.export(export).refused(Status::Fault).detail, 1);
    }
}

/// [dev-chain-1] Rings and requests in the window are none.
#[test]
fn requests_in_the_window_are_malformed() {
    for access in [READ_WRITE, access::READ] {
        let mut pair = windowed(Behaviour::default());
        let buffer = pair.granted(2);
        let seen = pair.see(&buffer, access, 0);
        pair.b.window().write(seen.at, &handle_request(Opcode::Query, 0, seen.held.handle));
        let ring = pair.b.control_ring();
        let to = Desc { addr: WINDOW + seen.at, len: 16, flags: NEXT, next: 201 };
        let back = Desc { addr: WINDOW + seen.at + 64, len: 56, flags: common::WRITE, next: 0 };
        ring.write_desc(200, to);
        ring.write_desc(201, back);
        ring.offer(200);
        ring.notify();
        let used = ring.wait_used(SOON).expect("it comes back");
        assert_eq!((used.id, used.len), (200, 0));
        let nothing = pair.b.window().read(seen.at + 64, 56).expect("shown");
        assert!(nothing.iter().all(|byte| *byte == 0));
    }
}

/// What a RELEASE or QUERY says.
fn state(told: &RespState) -> State {
    State::from_wire(told.state.get()).expect("a known state")
}

/// [dev-release-3] [dev-release-7] [dev-map-12] [dev-map-13] Rights are void at once; pages are back when
/// nobody sees them any more.
#[test]
fn force_takes_it_out_of_the_window() {
    let delay = Duration::from_millis(300);
    let mut pair = windowed(Behaviour { delay, ..Default::default() });
    let buffer = pair.granted(2);
    let seen = pair.see(&buffer, READ_WRITE, MIB);
    settle(&mut pair.a);
    let start = Instant::now();
    let told = pair.a.release_force(buffer.handle).expect("RELEASE");
    assert!(start.elapsed() < delay / 2, "nobody waits for the VMM of another VM");
    pair.b.begin(sync(&seen.held, READ)).refused(Status::Revoked);
    pair.b.map(&at(seen.held.handle, 0, PAGE)).refused(Status::Revoked);
    if seen.held.mode == Mode::ZeroCopy {
        assert_eq!((state(&told), told.use_count.get()), (State::Releasing, 1));
        let event = pair.a.expect_event(Opcode::EvtReleased);
        assert_eq!(event.handle.get(), buffer.handle);
    } else {
        assert_eq!(state(&told), State::Released);
        assert!(wait_for(SOON, || pair.b.window().shown().is_empty()));
    }
    assert_eq!(pair.b.window().shown(), [], "the daemon unmapped it by itself");
    assert_eq!(pair.b.query(seen.held.handle).expect("QUERY").nr_mappings.get(), 1);
    pair.b.unmap(seen.mapping).expect("UNMAP of what is gone");
    pair.b.detach(seen.held.handle).expect("DETACH");
    pair.a.expect_no_event();
}

/// [dev-grant-9] [dev-map-12] [dev-detach-2] One importer of two loses it; MAPs on their way end.
#[test]
fn a_revoke_ends_a_map_on_its_way() {
    let mut pair = windowed(Behaviour::default());
    let buffer = pair.granted(1);
    let handle = pair.attach(&buffer);
    let delay = Duration::from_millis(300);
    pair.b.window().behave(Behaviour { delay, ..Default::default() });
    let ring = pair.b.control_ring();
    for place in [0, MIB] {
        ring.submit(&[&at(handle, place, PAGE).bytes()], &[24]).expect("room");
    }
    assert!(wait_for(SOON, || pair.b.window().asked().len() == 1));
    pair.revoke(&buffer);
    for _ in 0..2 {
        let answer = pair.b.control_ring().wait(SOON).expect("MAP");
        parse::<RespMap>(answer.written()).refused(Status::Revoked);
    }
    pair.b.detach(handle).expect("DETACH");
    assert!(wait_for(SOON, || pair.b.window().asked().len() == 2), "it is mapped, then unmapped");
    assert!(wait_for(SOON, || pair.b.window().shown().is_empty()));
    assert!(wait_for(SOON, || pair.use_count(&buffer) == 0));
}

/// [dev-reset-6] [dev-map-12] The exporter's pages linger until the importer's VMM lets go of them.
#[test]
fn an_exporter_that_goes_away_takes_it_along() {
    for reset in [true, false] {
        let mut pair = windowed(Behaviour::default());
        let buffer = pair.granted(2);
        let seen = pair.see(&buffer, READ_WRITE, 0);
        if reset {
            pair.a.reset(Stop::WithBase)
        } else {
            pair.a.reconnect()
        }
        assert!(wait_for(SOON, || pair.b.window().shown().is_empty()));
        assert!(wait_for(SOON, || pair.a.read_config().lingering.get() == 0));
        pair.b.map(&at(seen.held.handle, MIB, PAGE)).refused(Status::Revoked);
        pair.b.unmap(seen.mapping).expect("UNMAP");
        pair.b.detach(seen.held.handle).expect("DETACH");
    }
}

/// [dev-map-12] A monitor need not unmap when its guest resets: the device does, before a place is used again.
#[test]
fn a_reset_of_the_importer_frees_its_window() {
    let mut pair = windowed(Behaviour::default());
    let buffer = pair.granted(2);
    let seen = pair.see(&buffer, READ_WRITE, 0);
    let more = pair.see(&buffer, access::READ, MIB);
    assert_eq!(pair.b.window().shown().len(), 2);
    pair.b.pause(Stop::WithBase);
    std::thread::sleep(QUIET);
    assert_eq!(pair.b.window().shown().len(), 2, "while the device is stopped nothing is asked");
    pair.b.restart_from_zero();
    pair.b.unmap(seen.mapping).refused(Status::NoEnt);
    pair.b.query(more.held.handle).refused(Status::NoEnt);
    let again = pair.see(&buffer, READ_WRITE, 0);
    assert_eq!(pair.b.window().shown(), [(0, buffer.size)]);
    pair.a.memory.write(buffer.addr, b"again");
    pair.a.end(sync(&buffer, WRITE)).expect("END");
    pair.b.begin(sync(&again.held, READ)).expect("BEGIN");
    assert_eq!(pair.b.window().read(0, 5).expect("shown"), b"again");
    assert_eq!(pair.use_count(&buffer), 1);
}

/// [dev-map-12] [dev-release-3] A monitor that unmaps when its guest resets, as QEMU, refuses to do it again.
#[test]
fn a_reset_of_the_importer_may_have_unmapped() {
    let mut pair = windowed(Behaviour::default());
    let buffer = pair.granted(2);
    pair.see(&buffer, READ_WRITE, 0);
    settle(&mut pair.a);
    pair.b.pause(Stop::WithBase);
    pair.b.window().forget();
    pair.b.restart_from_zero();
    assert!(wait_for(SOON, || pair.use_count(&buffer) == 0), "it is in use by nobody");
    pair.see(&buffer, READ_WRITE, 0);
    assert_eq!(pair.b.window().shown(), [(0, buffer.size)]);
    assert_eq!(pair.use_count(&buffer), 1);
}

/// [dev-map-12] What goes away while the importer is paused is unmapped when it runs.
#[test]
fn a_paused_importer_sees_it_until_it_runs() {
    for how in [Stop::WithBase, Stop::DisableOnly] {
        let mut pair = windowed(Behaviour::default());
        let buffer = pair.granted(1);
        let seen = pair.see(&buffer, READ_WRITE, 0);
        settle(&mut pair.a);
        pair.b.pause(how);
        let told = pair.a.release_force(buffer.handle).expect("RELEASE");
        std::thread::sleep(3 * QUIET);
        assert_eq!(pair.b.window().shown().len(), 1);
        if seen.held.mode == Mode::ZeroCopy {
            assert_eq!(state(&told), State::Releasing);
            pair.a.query(buffer.handle).expect("it is not back");
        }
        pair.b.resume();
        assert!(wait_for(SOON, || pair.b.window().shown().is_empty()));
        if seen.held.mode == Mode::ZeroCopy {
            pair.a.expect_event(Opcode::EvtReleased);
        }
    }
}

/// [dev-release-3] Also where nothing wakes the importer's worker while its rings are stopped: a revoke of
/// what it was not told of last adds no event.
#[test]
fn a_revoke_while_the_rings_are_disabled_is_not_forgotten() {
    let mut pair = windowed(Behaviour::default());
    let buffer = pair.granted(1);
    pair.see(&buffer, READ_WRITE, 0);
    pair.a.end(sync(&buffer, WRITE)).expect("END");
    std::thread::sleep(QUIET);
    pair.b.pause(Stop::DisableOnly);
    pair.a.release_force(buffer.handle).expect("RELEASE");
    std::thread::sleep(3 * QUIET);
    assert_eq!(pair.b.window().shown().len(), 1);
    pair.b.resume();
    assert!(wait_for(SOON, || pair.b.window().shown().is_empty()));
}

/// [dev-release-3] A VMM that is gone shows nothing; one that only hung up still does.
#[test]
fn a_closed_connection_proves_nothing() {
    let mut pair = windowed(Behaviour::default());
    let buffer = pair.granted(1);
    let seen = pair.see(&buffer, READ_WRITE, 0);
    settle(&mut pair.a);
    let kept = pair.b.window().keep();
    pair.b.reconnect();
    let told = pair.a.release_force(buffer.handle).expect("RELEASE");
    if seen.held.mode == Mode::ZeroCopy {
        assert_eq!(state(&told), State::Releasing);
        pair.a.expect_no_event();
        drop(kept);
        pair.a.expect_event(Opcode::EvtReleased);
    } else {
        assert_eq!(state(&told), State::Released);
    }
}

/// [dev-release-2] RELEASE without force leaves what is attached as it is.
#[test]
fn what_is_attached_stays_until_it_is_detached() {
    let mut pair = windowed(Behaviour::default());
    let buffer = pair.granted(1);
    let seen = pair.see(&buffer, READ_WRITE, 0);
    settle(&mut pair.a);
    let told = pair.a.release(buffer.handle).expect("RELEASE");
    if seen.held.mode == Mode::Copy {
        return assert_eq!(state(&told), State::Released);
    }
    assert_eq!(state(&told), State::Releasing);
    pair.b.begin(sync(&seen.held, READ | WRITE)).expect("BEGIN");
    pair.b.end(sync(&seen.held, READ | WRITE)).expect("END");
    pair.b.unmap(seen.mapping).expect("UNMAP");
    let again = pair.b.map(&at(seen.held.handle, 0, PAGE)).expect("it still has the right");
    pair.b.unmap(again).expect("UNMAP");
    pair.b.detach(seen.held.handle).expect("DETACH");
    let mut last = None;
    while let Some(event) = pair.a.event(QUIET) {
        last = Opcode::from_wire(event.kind.get());
    }
    assert_eq!(last, Some(Opcode::EvtReleased));
}

/// [dev-map-14] [dev-chain-2] However many MAPs and UNMAPs a guest sends at once, each is answered.
#[test]
fn a_flood_is_answered() {
    let mut pair = windowed(Behaviour::default());
    let buffer = pair.granted(1);
    let handle = pair.attach(&buffer);
    let before = pair.daemon.fds();
    let mut mappings = Vec::new();
    for round in 0..30 {
        let mut sent = 0;
        for place in 0..20 {
            let request = at(handle, place % 10 * PAGE, PAGE).bytes();
            sent += usize::from(pair.b.control_ring().submit(&[&request], &[24]).is_some());
        }
        for mapping in mappings.drain(..) {
            for _ in 0..2 {
                let request = unmap_request(mapping);
                sent += usize::from(pair.b.control_ring().submit(&[&request], &[24]).is_some());
            }
        }
        for _ in 0..sent {
            let answer = pair.b.control_ring().wait(SOON).expect("every chain comes back");
            if answer.len == 24 {
                mappings.push(parse::<RespMap>(answer.written()).expect("MAP").mapping.get());
            }
        }
        assert!(pair.b.window().shown().len() <= 7, "round {round}");
    }
    mappings.into_iter().for_each(|mapping| pair.b.unmap(mapping).expect("UNMAP"));
    assert_eq!(pair.b.window().shown(), []);
    let settled = wait_for(SOON, || pair.daemon.fds() <= before);
    assert!(settled, "{:#?}", pair.daemon.fd_names());
}

/// [dev-map-14] [dev-map-15] [dev-map-16] Sixteen images of a pool cost the VMM one mapping.
#[test]
fn parts_ride_on_the_mapping_of_their_pool() {
    let mut pair = windowed(Behaviour::default());
    let pool = pair.granted(16);
    let seen = pair.see(&pool, READ_WRITE, MIB);
    let images: Vec<Buffer> = (0..16)
        .map(|page| {
            let export = Export {
                flags: flag::EXPORT_PART,
                size: Some(PAGE),
                object: pool.uuid,
                segments: vec![(page * PAGE, PAGE)],
                ..Default::default()
            };
            let told = pair.a.export(export).expect("EXPORT of a part");
            let image = buffer(&told, pool.addr + page * PAGE, 1);
            pair.grant(&image, READ_WRITE);
            image
        })
        .collect();
    if seen.held.mode == Mode::Copy {
        let handle = pair.attach(&images[0]);
        pair.b.map(&at(handle, seen.at, PAGE)).refused(Status::Range);
        return;
    }
    let held: Vec<Seen> = (0..16)
        .map(|page| pair.see(&images[page as usize], READ_WRITE, MIB + page * PAGE))
        .collect();
    assert_eq!(pair.b.window().asked().len(), 1, "nobody asks the VMM for what it shows");
    for (page, (image, seen)) in (0u8..).zip(images.iter().zip(&held)) {
        pair.a.memory.fill(image.addr, PAGE, page + 1);
        pair.a.end(sync(image, WRITE)).expect("END");
        let told = pair.b.begin(sync(&seen.held, READ)).expect("BEGIN");
        assert_eq!(told.generation.get(), 1, "each image has its own");
        assert_eq!(pair.b.window().read(seen.at, 1), Some(vec![page + 1]));
        pair.b.end(sync(&seen.held, READ)).expect("END");
    }
    let wrong = at(held[3].held.handle, MIB + 4 * PAGE, PAGE);
    pair.b.map(&wrong).refused(Status::Range);
    pair.b.unmap(seen.mapping).refused(Status::Busy);
    let one = held[0];
    pair.b.unmap(one.mapping).expect("UNMAP");
    pair.b.detach(one.held.handle).expect("DETACH");
    assert_eq!(pair.b.window().shown(), [(MIB, pool.size)], "the pool is there still");
    pair.a.release_force(images[1].handle).expect("RELEASE of one image");
    pair.b.begin(sync(&held[1].held, READ)).refused(Status::Revoked);
    pair.b.unmap(held[1].mapping).expect("UNMAP");
    pair.b.begin(sync(&held[2].held, READ)).expect("the others live");
    pair.revoke(&pool);
    assert!(wait_for(SOON, || pair.b.window().shown().is_empty()));
    for seen in &held[2..] {
        pair.b.begin(sync(&seen.held, READ)).refused(Status::Revoked);
        pair.b.unmap(seen.mapping).expect("UNMAP");
        pair.b.detach(seen.held.handle).expect("DETACH");
    }
    pair.b.unmap(seen.mapping).expect("UNMAP");
    for image in images.iter().filter(|image| image.handle != images[1].handle) {
        pair.a.release(image.handle).expect("RELEASE");
    }
    pair.a.release(pool.handle).expect("RELEASE");
    assert!(wait_for(SOON, || pair.a.query(pool.handle).is_err()), "all is back");
}

/// [dev-map-15] A hundred parts are no more than one mapping, and not more than a VM may have.
#[test]
fn riders_are_bounded() {
    let mut pair = windowed(Behaviour::default());
    let pool = pair.granted(1);
    let seen = pair.see(&pool, READ_WRITE, 0);
    if seen.held.mode == Mode::Copy {
        return;
    }
    let segments = vec![(0, PAGE)];
    let (flags, object) = (flag::EXPORT_PART, pool.uuid);
    let export = Export { flags, size: Some(PAGE), object, segments, ..Default::default() };
    let image = buffer(&pair.a.export(export).expect("EXPORT"), pool.addr, 1);
    pair.grant(&image, READ_WRITE);
    let handle = pair.attach(&image);
    for _ in 0..bufshare::limits::MAX_COPY_MAPPINGS {
        pair.b.map(&at(handle, 0, PAGE)).expect("MAP");
    }
    pair.b.map(&at(handle, 0, PAGE)).refused(Status::Quota);
    assert_eq!(pair.b.window().asked().len(), 1);
}

/// [dev-reset-7] A VMM that hangs up without closing its back channel leaves a thread behind each time, and
/// not more than a few.
#[test]
fn channels_that_are_never_closed_are_bounded() {
    let max = bufshare::limits::MAX_CHANNELS;
    let mut pair = windowed(Behaviour::default());
    let buffer = pair.granted(1);
    let mut kept = Vec::new();
    for _ in 0..max {
        let handle = pair.attach(&buffer);
        pair.b.window().behave(Behaviour { manner: Manner::Silent, ..Default::default() });
        pair.b.control_ring().submit(&[&at(handle, 0, PAGE).bytes()], &[24]).expect("room");
        assert!(wait_for(SOON, || !pair.b.window().asked().is_empty()));
        kept.push(pair.b.window().clone());
        pair.b.reconnect();
    }
    let handle = pair.attach(&buffer);
    pair.b.map(&at(handle, 0, PAGE)).refused(Status::Unsupp);
    pair.a.query(buffer.handle).expect("the other VM");
    kept.pop().expect("one of them").hang_up();
    std::thread::sleep(QUIET);
    pair.b.reconnect();
    settle(&mut pair.b);
    let handle = pair.attach(&buffer);
    pair.b.map(&at(handle, 0, PAGE)).expect("there is room for one again");
}

/// A pair whose importer's VMM did not accept REPLY_ACK.
fn without_acks(behaviour: Behaviour) -> Pair {
    let mut pair = windowed(behaviour);
    let decline_protocol = vhost::vhost_user::message::VhostUserProtocolFeatures::REPLY_ACK;
    drop(std::mem::replace(&mut pair.b, quiet().connect(&pair.daemon, "c")));
    pair.b = Setup { vmm: Some(behaviour), decline_protocol, ..quiet() }.connect(&pair.daemon, "b");
    settle(&mut pair.b);
    pair
}

/// [dev-map-5] A VMM that did not accept REPLY_ACK is not believed before it has answered.
#[test]
fn a_vmm_without_acks_is_waited_for() {
    for echo in [true, false] {
        let delay = Duration::from_millis(300);
        let mut pair = without_acks(Behaviour { echo, delay, ..Default::default() });
        let buffer = pair.granted(1);
        let Seen { mapping, at, .. } = pair.see(&buffer, READ_WRITE, 0);
        assert_eq!(pair.b.window().shown(), [(at, buffer.size)]);
        pair.b.unmap(mapping).expect("UNMAP");
        assert_eq!(pair.b.window().shown(), []);
    }
}

/// [dev-map-5] One that never answers is given up, and told.
#[test]
fn a_vmm_that_knows_no_acks_gets_no_window() {
    let mut pair =
        without_acks(Behaviour { manner: Manner::Mute, echo: false, ..Default::default() });
    let buffer = pair.granted(1);
    let handle = pair.attach(&buffer);
    settle(&mut pair.b);
    pair.b.map(&at(handle, 0, PAGE)).refused(Status::Io);
    assert!(pair.daemon.log().contains("REPLY_ACK"), "{}", pair.daemon.log());
    pair.b.expect_event(Opcode::EvtResync);
    assert_eq!(pair.b.read_config().max_mappings.get(), 0);
    pair.b.map(&at(handle, 0, PAGE)).refused(Status::Quota);
    pair.a.query(buffer.handle).expect("the other VM");
}
