//! The real daemon, driven through real sockets by two guests, their VMMs and two programs, beside the
//! registry alone with memory that is a vector of bytes: both get the same random script, and after every
//! step both must have given the same answers, told the same events, say the same of every buffer, and hold
//! the same bytes in both guests and in their windows. Guests and programs lend, attach, map, SYNC, signal
//! points and wait for them; the VMMs echo or do not, are slow, refuse, hold a request back or close the
//! channel; and anybody dies. What the registry itself has to do is its own model's business
//! (`src/registry/model`); here is everything between it and the wire. A failure is shrunk to a short
//! script. A million steps:
//!
//!     BUFSHARE_TWIN_STEPS=1000000 cargo test --test long twin -- --nocapture

mod host;
mod window;
mod world;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bufshare::host::client::{self, Client};
use bufshare::host::holders::Report;
use bufshare::ids::{
    Access, ClientId, Cookie, FileId, HandleId, LeaseId, MappingId, PeerId, SessionId,
};
use bufshare::ioctl::Mapping;
use bufshare::limits::Quota;
use bufshare::policy::{Policy, Rule, Side};
use bufshare::protocol::{
    Event, Line, Mode, NAME_LEN, Opcode, RespState, RespSync, Status, feature, flag,
};
use bufshare::registry::{
    AttachRequest, Begun, Copy, CopyTicket, Description, Ended, EventKind, Exported, GrantRequest,
    MapRequest, Origin, Part, Place, PointWait, Registry, Signal, SyncRequest, View, Wants,
};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestError, TestRunner};
use uuid::Uuid;

use crate::common::{
    Attach, Behaviour, Daemon, Export, FREE, Grant, Guest, Launch, Manner, Map, PAGE, Point,
    Refusal, SOON, Setup, Stop, Sync, handle_request, wait_for,
};
use crate::{assert_nothing_left, end, from_env};
use world::World;

/// Pages of each guest that take part: the lower half is exported, the upper half mapped onto.
const PAGES: u64 = 16;
const QUOTA: u32 = 6;
const PEERS: [PeerId; 2] = [PeerId(2), PeerId(3)];
const WANTS: Wants = Wants { peers: false, import: true };
/// No wait of a script lasts as long, and no script.
const LONG: Duration = Duration::from_secs(10);
/// Pages of a window where something may be mapped.
const WINDOW_PAGES: u64 = 8;

/// How long to wait for what has to come: not long once it is known that a script fails.
static PATIENCE_MS: AtomicU64 = AtomicU64::new(20_000);

fn patience() -> Duration {
    Duration::from_millis(PATIENCE_MS.load(Ordering::Relaxed))
}

/// How the VMMs of a script are: none has a back channel; they echo what they map; they do not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Vmms {
    None,
    Echo,
    Mute,
}

/// Who signals a point or waits for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Who {
    Exporter,
    Attachment,
    Lease,
}

/// One step. Numbers pick among what there was lately, dead things included.
#[derive(Debug, Clone)]
enum Op {
    Export {
        vm: usize,
        at: u64,
        pages: u64,
        access: Access,
        pool: Option<usize>,
    },
    Grant {
        export: usize,
        to: u32,
        access: Access,
        once: bool,
        force: bool,
    },
    Release {
        export: usize,
        force: bool,
    },
    Query {
        vm: usize,
        handle: u64,
    },
    Attach {
        vm: usize,
        export: usize,
        access: Access,
        zero_copy: bool,
    },
    Detach {
        attachment: usize,
    },
    Map {
        attachment: usize,
        offset: u64,
        at: u64,
        pages: u64,
        access: Access,
    },
    Unmap {
        mapping: usize,
    },
    /// MAP into the window.
    Show {
        attachment: usize,
        offset: u64,
        at: u64,
        pages: u64,
        access: Access,
    },
    WriteWindow {
        vm: usize,
        pick: usize,
        byte: u8,
    },
    /// The VMM does nothing until it is let go; what it was asked stays pending.
    Hold {
        vm: usize,
        holds: bool,
    },
    Behave {
        vm: usize,
        manner: Manner,
    },
    /// SIGNAL with this status, or WAIT; of a point near the highest one.
    Point {
        who: Who,
        pick: usize,
        line: Line,
        ahead: u64,
        signal: Option<Status>,
    },
    /// Of an export or attachment.
    Sync {
        export: bool,
        pick: usize,
        begin: bool,
        bits: Access,
        at: u64,
        len: u64,
        nonblock: bool,
    },
    Cancel {
        export: bool,
        pick: usize,
    },
    Write {
        vm: usize,
        page: u64,
        byte: u8,
    },
    Acquire {
        client: usize,
        export: usize,
        access: Access,
    },
    HostSync {
        lease: usize,
        begin: bool,
        bits: Access,
        nonblock: bool,
    },
    HostWrite {
        lease: usize,
        byte: u8,
    },
    HostRelease {
        lease: usize,
    },
    /// A program lends memory.
    Lend {
        client: usize,
        pages: u64,
        access: Access,
    },
    LentSync {
        export: usize,
        begin: bool,
        bits: Access,
        nonblock: bool,
    },
    LentWrite {
        export: usize,
        byte: u8,
    },
    HostCancel {
        pick: usize,
    },
    ClientGone {
        client: usize,
    },
    Reset {
        vm: usize,
        how: bool,
    },
    Reconnect {
        vm: usize,
    },
}

fn access() -> impl Strategy<Value = Access> {
    prop_oneof![5 => Just(Access::ALL), 2 => Just(Access::READ), 1 => Just(Access::WRITE)]
}

fn point() -> impl Strategy<Value = Op> {
    let who = prop::sample::select(vec![Who::Exporter, Who::Attachment, Who::Lease]);
    let line = prop::sample::select(vec![Line::Acquire, Line::Release]);
    let status = prop::sample::select(vec![Status::Ok, Status::Ok, Status::Io, Status::Access]);
    (who, 0..8usize, line, 0..5u64, prop::option::of(status))
        .prop_map(|(who, pick, line, ahead, signal)| Op::Point { who, pick, line, ahead, signal })
}

fn manner() -> impl Strategy<Value = Manner> {
    prop_oneof![
        6 => Just(Manner::Obliging),
        3 => Just(Manner::Refuses),
        2 => Just(Manner::Keeps),
        1 => Just(Manner::Closes),
    ]
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![10 => vm_op(), 5 => window_op(), 4 => point(), 3 => host_op()]
}

fn window_op() -> impl Strategy<Value = Op> {
    let (vm, pick, yes) = (|| 0..2usize, || 0..8usize, any::<bool>);
    prop_oneof![
        20 => (pick(), 0..3u64, 0..WINDOW_PAGES, 1..4u64, access()).prop_map(
            |(attachment, offset, at, pages, access)| Op::Show { attachment, offset, at, pages, access }
        ),
        6 => pick().prop_map(|mapping| Op::Unmap { mapping }),
        6 => (vm(), pick(), any::<u8>())
            .prop_map(|(vm, pick, byte)| Op::WriteWindow { vm, pick, byte }),
        6 => (vm(), yes()).prop_map(|(vm, holds)| Op::Hold { vm, holds }),
        2 => (vm(), manner()).prop_map(|(vm, manner)| Op::Behave { vm, manner }),
    ]
}

fn host_op() -> impl Strategy<Value = Op> {
    let (client, pick, yes) = (|| 0..2usize, || 0..8usize, any::<bool>);
    let none = || prop_oneof![6 => access(), 1 => Just(Access::NONE)];
    prop_oneof![
        6 => (client(), 1..4u64, access())
            .prop_map(|(client, pages, access)| Op::Lend { client, pages, access }),
        8 => (pick(), yes(), none(), prop::bool::weighted(0.15))
            .prop_map(|(export, begin, bits, nonblock)| Op::LentSync { export, begin, bits, nonblock }),
        4 => (pick(), any::<u8>()).prop_map(|(export, byte)| Op::LentWrite { export, byte }),
        2 => pick().prop_map(|pick| Op::HostCancel { pick }),
    ]
}

fn vm_op() -> impl Strategy<Value = Op> {
    let (vm, pick, yes) = (|| 0..2usize, || 0..8usize, any::<bool>);
    let rarely = || prop::bool::weighted(0.15);
    let none = || prop_oneof![6 => access(), 1 => Just(Access::NONE)];
    prop_oneof![
        10 => (vm(), 0..PAGES / 2, 1..4u64, access(), prop::option::weighted(0.4, pick()))
            .prop_map(|(vm, at, pages, access, pool)| Op::Export { vm, at, pages, access, pool }),
        14 => (pick(), prop::sample::select(vec![1, 1, 2, 3, 2, 3, u32::MAX, 9]), none(), rarely(), rarely())
            .prop_map(|(export, to, access, once, force)| Op::Grant { export, to, access, once, force }),
        6 => (pick(), rarely()).prop_map(|(export, force)| Op::Release { export, force }),
        2 => (vm(), 0..12u64).prop_map(|(vm, handle)| Op::Query { vm, handle }),
        14 => (vm(), pick(), access(), rarely())
            .prop_map(|(vm, export, access, zero_copy)| Op::Attach { vm, export, access, zero_copy }),
        4 => pick().prop_map(|attachment| Op::Detach { attachment }),
        10 => (pick(), 0..3u64, PAGES / 2..PAGES - 3, 1..4u64, access()).prop_map(
            |(attachment, offset, at, pages, access)| Op::Map { attachment, offset, at, pages, access }
        ),
        3 => pick().prop_map(|mapping| Op::Unmap { mapping }),
        40 => (yes(), pick(), yes(), none(), (0..3u64, 0..3u64), rarely()).prop_map(
            |(export, pick, begin, bits, (at, len), nonblock)| {
                Op::Sync { export, pick, begin, bits, at, len, nonblock }
            }
        ),
        2 => (yes(), pick()).prop_map(|(export, pick)| Op::Cancel { export, pick }),
        14 => (vm(), 0..PAGES, any::<u8>()).prop_map(|(vm, page, byte)| Op::Write { vm, page, byte }),
        12 => (0..2usize, pick(), access())
            .prop_map(|(client, export, access)| Op::Acquire { client, export, access }),
        16 => (pick(), yes(), none(), rarely())
            .prop_map(|(lease, begin, bits, nonblock)| Op::HostSync { lease, begin, bits, nonblock }),
        4 => (pick(), any::<u8>()).prop_map(|(lease, byte)| Op::HostWrite { lease, byte }),
        6 => pick().prop_map(|lease| Op::HostRelease { lease }),
        1 => (0..2usize).prop_map(|client| Op::ClientGone { client }),
        1 => (vm(), yes()).prop_map(|(vm, how)| Op::Reset { vm, how }),
        1 => vm().prop_map(|vm| Op::Reconnect { vm }),
    ]
}

/// What every script begins with: each guest lends a buffer, and a part of it, to the other one, which maps
/// it, on its own pages or in its window, and to a program; a program lends one to each guest.
fn beginning() -> Vec<Op> {
    let (access, once, force) = (Access::ALL, false, false);
    let of = |(vm, part): (usize, bool)| {
        let other = PEERS[1 - vm].0;
        let (at, pages) = if part { (1, 2) } else { (0, 3) };
        let grant = |to| Op::Grant { export: 0, to, access, once, force };
        [
            Op::Export { vm, at, pages, access, pool: part.then_some(0) },
            grant(PeerId::HOST.0),
            grant(other),
            Op::Attach { vm: 1 - vm, export: 0, access, zero_copy: false },
            Op::Map { attachment: 0, offset: 0, at: PAGES / 2 + 4 * at, pages, access },
            Op::Attach { vm: 1 - vm, export: 0, access, zero_copy: false },
            // A part where its pool is seen.
            Op::Show { attachment: 0, offset: 0, at, pages, access },
            Op::Acquire { client: vm, export: 0, access },
        ]
    };
    let lends = |vm: usize| {
        let to = PEERS[vm].0;
        [
            Op::Lend { client: vm, pages: 2, access },
            Op::Grant { export: 0, to, access, once, force },
            Op::Attach { vm, export: 0, access, zero_copy: false },
            Op::Show { attachment: 0, offset: 0, at: 4, pages: 1, access },
        ]
    };
    let first = [(0, false), (0, true), (1, false), (1, true)].into_iter().flat_map(of);
    first.chain([0, 1].into_iter().flat_map(lends)).collect()
}

#[test]
fn twin() {
    let launch = Launch {
        vms: ["a", "b"].map(|vm| format!("name={vm},max-exports={QUOTA}")).to_vec(),
        args: ["--allow", "*:*"].map(String::from).to_vec(),
        ..Default::default()
    };
    let daemon = launch.start();
    let wanted = from_env("BUFSHARE_TWIN_STEPS");
    let (end, started, mut steps) = (end(), Instant::now(), 0);
    let mut fds = None;
    while wanted.map_or(Instant::now() < end, |wanted| steps < wanted) {
        let taken = RefCell::new(0);
        let config = Config {
            cases: 10,
            failure_persistence: None,
            max_shrink_iters: 2000,
            max_shrink_time: 120_000,
            ..Config::default()
        };
        let vmms = prop::sample::select(vec![Vmms::None, Vmms::Echo, Vmms::Echo, Vmms::Mute]);
        let script = (vmms, prop::collection::vec(op(), 0..120));
        let result = TestRunner::new(config).run(&script, |(vmms, ops)| {
            let mut world = World::new(&daemon, vmms);
            let begun = Instant::now();
            for op in beginning().iter().chain(&ops) {
                if begun.elapsed() > LONG / 2 {
                    // On a machine that is busy with other things a wait could end by time alone.
                    break;
                }
                world.step(op);
                *taken.borrow_mut() += 1;
            }
            Ok(())
        });
        if let Err(TestError::Fail(why, (vmms, ops))) = result {
            let script: Vec<String> = ops.iter().map(|op| format!("    {op:?}")).collect();
            panic!("{why}\nthe shortest script, VMMs {vmms:?}:\n{}", script.join("\n"));
        }
        let before = steps;
        steps += *taken.borrow();
        if steps / 50_000 > before / 50_000 {
            eprintln!("{steps} steps so far");
        }
        assert_nothing_left(&daemon, fds.unwrap_or(usize::MAX));
        fds.get_or_insert_with(|| daemon.fds());
    }
    let mut client = Client::connect(&daemon.host_socket(), "twin").expect("host socket");
    let stats = client.stats().expect("STATS");
    let seen = stats.iter().filter(|(name, count)| name.contains("answers_") && *count > 0);
    let seen: Vec<_> = seen.map(|(name, count)| format!("{} {count}", &name[8..])).collect();
    eprintln!("{steps} steps in {:.1?}; answers: {}", started.elapsed(), seen.join(", "));
}
