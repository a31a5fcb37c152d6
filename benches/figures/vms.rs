//! Sixty-four VMs that may all share with each other, with up to a thousand buffers each, beside as many VMs
//! with ten each, and beside one with ten: what one VM asks for must not cost more because others have much.

use std::time::{Duration, Instant};

use bufshare::protocol::{Opcode, RespState, peer};
use rustix::process::{Resource, getrlimit};

use crate::common::{
    Attach, Daemon, Export, Grant, Guest, Launch, PAGE, Setup, Stop, handle_request,
};
use crate::driver::Driver;
use crate::place::{pin, processors};
use crate::table::{self, Budget, side_by_side};

const VMS: usize = 64;
const ROUNDS: u32 = 20;

/// Buffers of each VM: a thousand, where the limit of open files allows as many.
fn each() -> u64 {
    let limit = getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX);
    (limit.saturating_sub(6000) / VMS as u64).min(1000)
}

pub fn figures() {
    let each = each();
    let mut lone = Village::settle(1, 10);
    let mut few = Village::settle(VMS, 10);
    let mut many = Village::settle(VMS, each);
    for village in [&lone, &few, &many] {
        pin(village.daemon.pid(), processors()[0]);
    }
    let of = format!("{VMS} VMs x {each} buffers");
    let mut figure = |what: &str, time: fn(&mut Village) -> Duration, budget| {
        let times = |village: &mut Village| (0..100).map(|_| time(village)).collect();
        let (ours, bare) = side_by_side(ROUNDS, || times(&mut many), || times(&mut few));
        table::times(&format!("{what}, {of} : {VMS} x 10"), ours.p50, bare.p50, budget);
    };
    figure("ATTACH and DETACH", Village::attach, Budget::None);
    figure("EXPORT, GRANT to one and RELEASE", Village::export, Budget::None);
    figure("reset of a VM with one buffer", Village::reset, Budget::None);
    figure("GRANT to all, and back", Village::grant_all, Budget::None);
    let (ours, bare) = side_by_side(ROUNDS, many.queries(), lone.queries());
    table::times(&format!("QUERY, {of} : 1 x 10"), ours.p50, bare.p50, Budget::AtMost(1.2));
}

/// A daemon and its VMs: each has lent all of its buffers to the next one, and to the one after that a
/// single one; nobody takes the events of the others.
struct Village {
    daemon: Daemon,
    guests: Vec<Guest>,
    uuid: [u8; 16],
    handles: Vec<u64>,
    page: u64,
    shared: u64,
}

impl Village {
    fn settle(vms: usize, each: u64) -> Village {
        let launch = Launch {
            vms: (0..vms).map(|i| format!("name=vm{i}")).collect(),
            args: ["--allow", "*:*"].map(String::from).to_vec(),
            ..Default::default()
        };
        let daemon = launch.start();
        let guest = |i| {
            let setup = Setup { event_buffers: 0, ..Default::default() };
            setup.connect(&daemon, &format!("vm{i}"))
        };
        let mut guests: Vec<Guest> = (0..vms).map(guest).collect();
        let mut uuid = [0; 16];
        let mut handles = Vec::new();
        let (mut page, mut shared) = (0, 0);
        for from in 0..vms {
            let peer_id = guests[(from + 1) % vms].config.peer_id.get();
            let second = guests[1 % vms].config.peer_id.get();
            page = guests[from].pages(1);
            for i in 0..each {
                let request = Export { segments: vec![(page, PAGE)], ..Default::default() };
                let export = guests[from].export(request).expect("EXPORT; see `ulimit -Hn`");
                let handle = export.handle.get();
                if vms > 1 {
                    let grant = Grant { handle, peer_id, ..Default::default() };
                    guests[from].grant(grant).expect("GRANT");
                }
                if from == 0 {
                    handles.push(handle);
                    if i == 0 && vms > 1 {
                        (uuid, shared) = (export.uuid, handle);
                        let grant = Grant { handle, peer_id: second, ..Default::default() };
                        guests[0].grant(grant).expect("GRANT");
                    }
                }
            }
        }
        Village { daemon, guests, uuid, handles, page, shared }
    }

    fn attach(&mut self) -> Duration {
        let start = Instant::now();
        let uuid = self.uuid;
        let (held, _) =
            self.guests[1].attach(Attach { uuid, ..Default::default() }).expect("ATTACH");
        self.guests[1].detach(held.handle.get()).expect("DETACH");
        start.elapsed()
    }

    fn export(&mut self) -> Duration {
        let peer_id = self.guests[1].config.peer_id.get();
        let request = Export { segments: vec![(self.page, PAGE)], ..Default::default() };
        let start = Instant::now();
        let handle = self.guests[0].export(request).expect("EXPORT").handle.get();
        self.guests[0].grant(Grant { handle, peer_id, ..Default::default() }).expect("GRANT");
        self.guests[0].release(handle).expect("RELEASE");
        start.elapsed()
    }

    /// The last VM gives its buffers up at the first time.
    fn reset(&mut self) -> Duration {
        let last = self.guests.last_mut().expect("a VM");
        let start = Instant::now();
        last.reset(Stop::WithBase);
        last.export_pages(1);
        start.elapsed()
    }

    fn grant_all(&mut self) -> Duration {
        let to = Grant { handle: self.shared, peer_id: peer::ANY, ..Default::default() };
        let back = Grant { access: 0, ..to };
        let start = Instant::now();
        self.guests[0].grant(to).expect("GRANT");
        self.guests[0].grant(back).expect("GRANT");
        start.elapsed()
    }

    fn queries(&mut self) -> impl FnMut() -> Vec<Duration> {
        let handles = &self.handles;
        let mut driver = Driver::control(&mut self.guests[0]);
        let query = driver.request::<RespState>(&handle_request(Opcode::Query, 0, 0));
        let mut next = 0;
        move || {
            let mut ask = || {
                next = (next + 7919) % handles.len();
                driver.set_handle(query, handles[next]);
                driver.ask(query)
            };
            (0..2000).map(|_| ask()).collect()
        }
    }
}
