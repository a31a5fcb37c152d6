//! The daemon's figures beside the bare system calls, measured by turns in one run: as ratios they
//! hold on any machine. `cargo bench --bench figures [query] [export] [frame] [peers]
//! [window] [vms]`; `benches/run` adds a host that has udmabuf.
//!
//! It judges nothing but budgets: a figure over its budget is printed as such and fails nothing.

#[path = "../../tests/common/mod.rs"]
mod common;
mod driver;
mod export;
mod frame;
mod peers;
mod place;
mod table;
mod vms;
mod window;

use std::process::{self, ExitCode};
use std::thread;
use std::time::Duration;

use bufshare::protocol::{Opcode, RespState, metadata};
use rustix::process::{Resource, getrlimit};

use common::{Daemon, Export, Grant, Guest, Launch, PAGE, handle_request};
use driver::Driver;
use place::{Pong, pin, processors};
use table::{Budget, Spread, side_by_side};

const FEW: usize = 10;
const ROUNDS: u32 = 20;
const ASKED: usize = 2000;

/// As many as the budget is for, where the limit of open files allows two descriptors each.
fn many() -> usize {
    let limit = getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX) / 2;
    usize::try_from(limit).unwrap_or(usize::MAX).saturating_sub(100).min(10_000)
}

fn main() -> ExitCode {
    if std::env::args().any(|arg| arg == place::PONG) {
        return place::answer_pings();
    }
    // As the daemon does: otherwise the bare calls pay for page faults that it does not have.
    bufshare::ioctl::keep_freed_memory(bufshare::limits::KEEP_FREED);
    // `cargo bench` adds options of its own.
    let wanted: Vec<String> =
        std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
    table::heading();
    for (name, figures) in [
        ("query", query as fn()),
        ("export", export::figures),
        ("frame", frame::figures),
        ("peers", peers::figures),
        ("window", window::figures),
        ("vms", vms::figures),
    ] {
        if wanted.is_empty() || wanted.iter().any(|wanted| wanted == name) {
            figures();
        }
    }
    ExitCode::SUCCESS
}

fn query() {
    let mut few = Crowd::gather(FEW).expect("a few exports");
    round_trips(&mut few);
    idle(&few);
    match Crowd::gather(many()) {
        Ok(mut many) => crowded(&mut few, &mut many),
        Err(why) => table::skipped(&format!("{} live buffers", many()), &why),
    }
}

/// A daemon, and a guest with so many buffers that the host may acquire.
struct Crowd {
    daemon: Daemon,
    guest: Guest,
    handles: Vec<u64>,
    rss_before: u64,
}

impl Crowd {
    fn gather(count: usize) -> Result<Crowd, String> {
        let vms = vec![format!("name=a,max-exports={count}")];
        let daemon = Launch { vms, ..Launch::default() }.start();
        let mut guest = Guest::connect(&daemon, "a");
        // The first ones pay for what all share.
        let mut handles = Vec::with_capacity(count);
        let mut rss_before = 0;
        for i in 0..count {
            if i == FEW {
                rss_before = daemon.rss_kib();
            }
            let request = Export {
                segments: vec![(guest.pages(1), PAGE)],
                metadata_type: metadata::PRIVATE,
                metadata: vec![7; 88],
                name: common::name("a buffer of a crowd"),
                ..Default::default()
            };
            let export = guest.export(request).map_err(|refusal| {
                format!("{} after {i} exports; see `ulimit -Hn`", refusal.status.name())
            })?;
            let handle = export.handle.get();
            guest.grant(Grant { handle, ..Default::default() }).expect("GRANT");
            handles.push(handle);
        }
        Ok(Crowd { daemon, guest, handles, rss_before })
    }

    /// QUERY of one buffer after the other.
    fn queries(&mut self) -> impl FnMut() -> Vec<Duration> {
        let mut driver = Driver::control(&mut self.guest);
        let query = driver.request::<RespState>(&handle_request(Opcode::Query, 0, 0));
        // A stride that visits all of them, and no two neighbours in a row.
        let handles = &self.handles;
        let mut next = 0;
        move || {
            let mut ask = || {
                next = (next + 7919) % handles.len();
                driver.set_handle(query, handles[next]);
                driver.ask(query)
            };
            (0..ASKED).map(|_| ask()).collect()
        }
    }
}

fn round_trips(crowd: &mut Crowd) {
    let (daemon, me) = (crowd.daemon.pid(), process::id());
    let cpus = processors();
    let mut queries = crowd.queries();
    let mut pong = Pong::start();
    for (name, place) in [("one processor", cpus.first()), ("two processors", cpus.get(1))] {
        let name = format!("QUERY, {name}, against an eventfd ping-pong");
        let Some(&theirs) = place else {
            table::skipped(&name, "this machine has one processor");
            continue;
        };
        pin(me, cpus[0]);
        pin(daemon, theirs);
        pin(pong.pid(), theirs);
        let pongs = || (0..ASKED).map(|_| pong.ask()).collect();
        let (ours, bare): (Spread, Spread) = side_by_side(ROUNDS, &mut queries, pongs);
        table::times(&format!("{name}, p50"), ours.p50, bare.p50, Budget::AtMost(2.0));
        table::times(&format!("{name}, p99"), ours.p99, bare.p99, Budget::None);
    }
}

/// Everything is there that a daemon at work has, and nothing happens.
fn idle(crowd: &Crowd) {
    let daemon = &crowd.daemon;
    let mut client = bufshare::host::client::Client::connect(&daemon.host_socket(), "bench")
        .expect("the host socket");
    client.watch(None).expect("WATCH");
    thread::sleep(Duration::from_millis(500));
    let before = place::context_switches(daemon.pid());
    let seconds = 5;
    thread::sleep(Duration::from_secs(seconds));
    let switches = place::context_switches(daemon.pid()) - before;
    let rate = switches as f64 / seconds as f64;
    table::value("idle, a VM, a client, 10 buffers: wake-ups", rate, "/s", Budget::AtMost(0.0));
    let rss = daemon.rss_kib() as f64 / 1024.0;
    table::value("idle, a VM, a client, 10 buffers: RSS", rss, "MiB", Budget::AtMost(8.0));
}

fn crowded(few: &mut Crowd, many: &mut Crowd) {
    let grown = (many.daemon.rss_kib() - many.rss_before) * 1024;
    let count = many.handles.len();
    let each = grown as f64 / (count - FEW) as f64;
    let name = format!("{count} live buffers: RSS of each");
    table::value(&name, each, "bytes", Budget::AtMost(1024.0));
    for daemon in [&few.daemon, &many.daemon] {
        pin(daemon.pid(), processors()[0]);
    }
    let (ours, bare) = side_by_side(ROUNDS, many.queries(), few.queries());
    let name = format!("QUERY with {count} live buffers against {FEW}, p50");
    table::times(&name, ours.p50, bare.p50, Budget::AtMost(1.2));
}
