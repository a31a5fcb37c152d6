//! MAP into the window: shared memory region 1, which the VMM fills.

use super::*;
use bufshare::protocol::{State, access};

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
