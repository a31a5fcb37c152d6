//! The real daemon, driven through real sockets by two guests and two programs, beside the registry alone
//! with memory that is a vector of bytes: both get the same random script, and after every step both must
//! have given the same answers, told the same events, say the same of every buffer, and hold the same
//! bytes in both guests. What the registry itself has to do is its own model's business
//! (`src/registry/model.rs`); here is everything between it and the wire. A failure is shrunk to a short
//! script. A million steps:
//!
//!     BUFSHARE_TWIN_STEPS=1000000 cargo test --release --test long twin -- --nocapture

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bufshare::host::client::{self, Client};
use bufshare::host::holders::Report;
use bufshare::ids::{Access, ClientId, Cookie, HandleId, LeaseId, MappingId, PeerId, SessionId};
use bufshare::ioctl::Mapping;
use bufshare::limits::Quota;
use bufshare::policy::{Policy, Rule, Side};
use bufshare::protocol::{
    Event, Mode, NAME_LEN, Opcode, RespState, RespSync, Status, feature, flag,
};
use bufshare::registry::{
    AttachRequest, Begun, Copy, CopyTicket, Description, Ended, EventKind, Exported, GrantRequest,
    MapRequest, Origin, Part, Place, Registry, SyncRequest, View, Wants,
};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestError, TestRunner};
use uuid::Uuid;

use crate::common::{
    Attach, Daemon, Export, FREE, Grant, Guest, Launch, Map, PAGE, Refusal, SOON, Setup, Stop,
    Sync, handle_request, wait_for,
};
use crate::{assert_nothing_left, end, from_env};

/// Pages of each guest that take part: the lower half is exported, the upper half mapped onto.
const PAGES: u64 = 16;
const QUOTA: u32 = 6;
const PEERS: [PeerId; 2] = [PeerId(2), PeerId(3)];
const WANTS: Wants = Wants { peers: false, import: true };
/// No wait of a script lasts as long.
const LONG: Duration = Duration::from_secs(10);

/// How long to wait for what has to come: not long once it is known that a script fails.
static PATIENCE_MS: AtomicU64 = AtomicU64::new(5000);

fn patience() -> Duration {
    Duration::from_millis(PATIENCE_MS.load(Ordering::Relaxed))
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

fn op() -> impl Strategy<Value = Op> {
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
/// it, and to a program.
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
            Op::Acquire { client: vm, export: 0, access },
        ]
    };
    [(0, false), (0, true), (1, false), (1, true)].into_iter().flat_map(of).collect()
}

type Ram = Rc<RefCell<Vec<u8>>>;

/// Memory as the twin has it: pages of a guest, and a private copy of them in COPY mode.
#[derive(Debug)]
struct Memory {
    ram: Ram,
    at: usize,
    private: Option<Ram>,
}

impl Memory {
    fn place(&self, view: View, offset: u64) -> (&Ram, usize) {
        let offset = usize::try_from(offset).expect("small");
        match (&self.private, view) {
            (Some(private), View::Content) => (private, offset),
            _ => (&self.ram, self.at + offset),
        }
    }
}

fn carry(copy: &Copy<Rc<Memory>>) {
    for one in &copy.moves {
        let len = usize::try_from(one.len).expect("small");
        let place = |place: &Place<Rc<Memory>>| {
            let (ram, at) = place.memory.place(place.view, place.offset);
            (ram.clone(), at)
        };
        let ((from, at), (to, target)) = (place(&one.from), place(&one.to));
        let bytes = from.borrow()[at..at + len].to_vec();
        to.borrow_mut()[target..target + len].copy_from_slice(&bytes);
    }
}

/// An answer to a SYNC request, wherever it comes from.
type Synced = Result<u64, Status>;

struct Lent {
    vm: usize,
    handle: u64,
    uuid: Uuid,
    size: u64,
    /// Where its pages are.
    at: u64,
}

struct Lease {
    client: usize,
    real: Option<client::Lease>,
    twin: LeaseId,
    size: u64,
    memory: Rc<Memory>,
}

struct World<'a> {
    daemon: &'a Daemon,
    guests: [Guest; 2],
    clients: Vec<Client>,
    /// The host's numbers for the two clients, in the twin.
    numbers: Vec<ClientId>,
    twin: Registry<Rc<Memory>>,
    sessions: [SessionId; 2],
    ram: [Ram; 2],
    now: Duration,
    exports: Vec<Lent>,
    attachments: Vec<(usize, u64)>,
    mappings: Vec<(usize, u64)>,
    leases: Vec<Lease>,
    last_token: u64,
    /// BEGINs that wait: of a VM, by token, and of a client, by the twin's cookie.
    parked: BTreeMap<u64, (usize, u16, u64, SyncRequest)>,
    begun: HashMap<(ClientId, Cookie), (usize, u64)>,
    /// What has to come of each guest's sync queue, by head.
    due: [HashMap<u16, Synced>; 2],
}

fn setup() -> Setup {
    let decline = 1 << feature::PEERS | 1 << feature::WINDOW;
    Setup { decline, event_buffers: 64, ..Default::default() }
}

fn pick<T>(from: &[T], pick: usize) -> Option<&T> {
    // The last ones are the interesting ones.
    from.get(from.len().checked_sub(1 + pick % from.len().clamp(1, 8))?)
}

/// Puts what is dead where it is picked less often.
fn bury<T>(list: &mut [T], dead: impl Fn(&T) -> bool) {
    list.sort_by_key(|one| !dead(one));
}

fn status<T>(reply: Result<T, Refusal>) -> Result<T, Status> {
    reply.map_err(|refusal| refusal.status)
}

fn refusal<T>(reply: client::Error) -> Result<T, Status> {
    Err(reply.status().unwrap_or_else(|| panic!("no refusal: {reply}")))
}

impl Drop for World<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            PATIENCE_MS.store(500, Ordering::Relaxed);
        }
    }
}

impl<'a> World<'a> {
    fn new(daemon: &'a Daemon) -> World<'a> {
        let policy = Policy::new(vec![Rule { from: Side::Any, to: Side::Any, read_only: false }]);
        let quota = Quota { max_exports: QUOTA, ..Quota::default() };
        let vms = PEERS.map(|peer| (peer, ["a", "b"][peer.0 as usize - 2].to_owned(), quota, 0));
        let mut twin = Registry::new(policy, vms);
        let sessions = PEERS.map(|peer| twin.open_session(peer, true).expect("configured"));
        // What an earlier script left goes in its own time.
        assert!(wait_for(SOON, || crate::books(daemon) == [0; 5]));
        let guests = ["a", "b"].map(|vm| setup().connect(daemon, vm));
        let ram = || Rc::new(RefCell::new(vec![0; (PAGES * PAGE) as usize]));
        let mut world = World {
            daemon,
            guests,
            clients: Vec::new(),
            numbers: Vec::new(),
            twin,
            sessions,
            ram: [ram(), ram()],
            now: Duration::ZERO,
            exports: Vec::new(),
            attachments: Vec::new(),
            mappings: Vec::new(),
            leases: Vec::new(),
            last_token: 0,
            parked: BTreeMap::new(),
            begun: HashMap::new(),
            due: [HashMap::new(), HashMap::new()],
        };
        for client in 0..2 {
            world.clients.push(world.connect());
            world.numbers.push(ClientId(client + 1));
        }
        for vm in 0..2 {
            world.settled(vm);
        }
        world.compare();
        world
    }

    fn connect(&self) -> Client {
        Client::connect(&self.daemon.host_socket(), "twin").expect("host socket")
    }

    /// The guest's worker has served its rings, and told what there was to tell.
    fn settled(&mut self, vm: usize) {
        for _ in 0..2 {
            let query = handle_request(Opcode::Query, 0, u64::MAX);
            let gone = self.guests[vm].control::<RespState>(&query);
            assert_eq!(status(gone).map(drop), Err(Status::NoEnt));
        }
    }

    fn memory(&self, vm: usize, page: u64, private: Option<u64>) -> Rc<Memory> {
        let zeros = |size: u64| Rc::new(RefCell::new(vec![0; size as usize]));
        let (ram, at) = (self.ram[vm].clone(), (page * PAGE) as usize);
        Rc::new(Memory { ram, at, private: private.map(zeros) })
    }

    fn step(&mut self, op: &Op) {
        // Misses of ATTACH are bounded in a second, which the daemon's clock counts.
        self.now += Duration::from_secs(1);
        self.apply(op);
        self.follow();
        self.compare();
    }

    fn apply(&mut self, op: &Op) {
        match op {
            Op::Export { vm, at, pages, access, pool } => {
                let own: Vec<&Lent> = self.exports.iter().filter(|lent| lent.vm == *vm).collect();
                let pool = pool.and_then(|pool| pick(&own, pool));
                let pool = pool.map(|pool| (pool.uuid, pool.at));
                self.export(*vm, *at, *pages, *access, pool);
            }
            Op::Grant { export, to, access, once, force } => {
                let Some(lent) = pick(&self.exports, *export) else { return };
                let (vm, handle) = (lent.vm, lent.handle);
                let flags = u16::from(*once) * flag::GRANT_ONCE
                    + u16::from(*force && access.is_none()) * flag::GRANT_FORCE;
                let access_bits = access.bits();
                let request =
                    Grant { flags, handle, peer_id: *to, access: access_bits, lifetime_ms: 0 };
                let real = status(self.guests[vm].grant(request));
                let request = GrantRequest {
                    handle: HandleId(handle),
                    to: PeerId(*to),
                    access: *access,
                    once: *once,
                    force: *force && access.is_none(),
                    lifetime: Duration::ZERO,
                };
                assert_eq!(real, self.twin.grant(self.sessions[vm], request, self.now));
            }
            Op::Release { export, force } => {
                let Some(lent) = pick(&self.exports, *export) else { return };
                let (vm, handle) = (lent.vm, lent.handle);
                let guest = &mut self.guests[vm];
                let real = if *force { guest.release_force(handle) } else { guest.release(handle) };
                let session = self.sessions[vm];
                if let Some(key) = self.twin.look_before_release(session, HandleId(handle))
                    && let Some((look, _)) = self.twin.look(key)
                {
                    self.twin.observed(look, false, self.now);
                }
                let twin = self.twin.release(session, HandleId(handle), *force);
                let state = |state: RespState| (state.state.get(), state.use_count.get());
                let twin = twin.map(|twin| (twin.state.to_wire(), twin.use_count));
                assert_eq!(status(real).map(state), twin);
                bury(&mut self.exports, |lent| (lent.vm, lent.handle) == (vm, handle));
            }
            Op::Query { vm, handle } => {
                let real = status(self.guests[*vm].query(*handle)).map(|real| {
                    (
                        real.state.get(),
                        real.use_count.get(),
                        real.nr_mappings.get(),
                        real.generation.get(),
                    )
                });
                let twin = self.twin.query(self.sessions[*vm], HandleId(*handle)).map(|twin| {
                    (twin.state.to_wire(), twin.use_count, twin.nr_mappings, twin.generation)
                });
                assert_eq!(real, twin);
            }
            Op::Attach { vm, export, access, zero_copy } => {
                let Some(uuid) = pick(&self.exports, *export).map(|lent| lent.uuid) else { return };
                self.attach(*vm, uuid, *access, *zero_copy);
            }
            Op::Detach { attachment } => {
                let Some((vm, handle)) = pick(&self.attachments, *attachment).copied() else {
                    return;
                };
                let real = status(self.guests[vm].detach(handle));
                assert_eq!(real, self.twin.detach(self.sessions[vm], HandleId(handle)));
                if real.is_ok() {
                    bury(&mut self.attachments, |held| *held == (vm, handle));
                }
            }
            Op::Map { attachment, offset, at, pages, access } => {
                let Some((vm, handle)) = pick(&self.attachments, *attachment).copied() else {
                    return;
                };
                let (offset, len) = (offset * PAGE, pages * PAGE);
                let segments = vec![(FREE + at * PAGE, len)];
                let bits = access.bits();
                let map = Map { handle, offset, access: bits, segments, ..Default::default() };
                let real = status(self.guests[vm].map(&map));
                let handle = HandleId(handle);
                let request = MapRequest { handle, offset, len, access: *access };
                let memory = self.memory(vm, *at, None);
                let twin = self.twin.begin_map(self.sessions[vm], request, false);
                let twin = twin.and_then(|ticket| self.twin.finish_map(ticket, Ok(memory)));
                assert_eq!(real, twin.map(|id| id.0));
                self.mappings.extend(real.ok().map(|id| (vm, id)));
            }
            Op::Unmap { mapping } => {
                let Some((vm, mapping)) = pick(&self.mappings, *mapping).copied() else { return };
                let real = status(self.guests[vm].unmap(mapping));
                let twin = self.twin.unmap(self.sessions[vm], MappingId(mapping), 0);
                assert_eq!(real, twin.map(|done| assert!(done, "there is no window")));
                bury(&mut self.mappings, |one| *one == (vm, mapping));
            }
            Op::Sync { export, pick: at, begin, bits, at: offset, len, nonblock } => {
                let Some((vm, handle)) = self.holder(*export, *at) else { return };
                if bits.is_none() {
                    return;
                }
                let sync = SyncRequest {
                    bits: *bits,
                    offset: offset * PAGE / 2,
                    len: len * PAGE / 2,
                    nonblock: *nonblock && *begin,
                    timeout: LONG,
                    cookie: Cookie(0),
                };
                self.sync(vm, handle, sync, *begin);
            }
            Op::Cancel { export, pick: at } => {
                let Some((vm, handle)) = self.holder(*export, *at) else { return };
                let real = status(self.guests[vm].cancel(handle, 0));
                let twin = self.twin.cancel_handle(self.sessions[vm], HandleId(handle), Cookie(0));
                assert_eq!(real, twin);
            }
            Op::Write { vm, page, byte } => {
                self.guests[*vm].memory.fill(FREE + page * PAGE, PAGE, *byte);
                let at = (page * PAGE) as usize;
                self.ram[*vm].borrow_mut()[at..at + PAGE as usize].fill(*byte);
            }
            Op::Acquire { client, export, access } => {
                let Some(lent) = pick(&self.exports, *export) else { return };
                let (uuid, size, bits) = (lent.uuid, lent.size, access.bits());
                let real = self.clients[*client].acquire(uuid, bits, false);
                let number = self.numbers[*client];
                let twin = self.twin.acquire(number, uuid, *access, false, self.now);
                match (real, twin) {
                    (Ok(real), Ok(twin)) => {
                        assert_eq!(real.mode, twin.info.mode);
                        let (real, memory) = (Some(real), twin.backing);
                        let lease = Lease { client: *client, real, twin: twin.lease, size, memory };
                        self.leases.push(lease);
                    }
                    (Err(real), Err(twin)) => assert_eq!(refusal::<()>(real), Err(twin)),
                    (real, twin) => panic!("{real:?}, but {twin:?}"),
                }
            }
            Op::HostSync { lease, begin, bits, nonblock } => {
                if !bits.is_none() {
                    self.host_sync(*lease, *begin, *bits, *nonblock);
                }
            }
            Op::HostWrite { lease, byte } => {
                let Some(lease) = pick(&self.leases, *lease) else { return };
                let Some(real) = &lease.real else { return };
                let size = lease.size as usize;
                let mapping = Mapping::new(&real.fd, size, true).expect("mmap");
                mapping.write_at(0, &vec![*byte; size]).expect("inside");
                let (ram, at) = lease.memory.place(View::Content, 0);
                ram.borrow_mut()[at..at + size].fill(*byte);
            }
            Op::HostRelease { lease } => {
                let count = self.leases.len();
                let at = count.checked_sub(1 + lease % count.clamp(1, 8));
                let Some(lease) = at.and_then(|at| self.leases.get_mut(at)) else { return };
                let Some(real) = lease.real.take() else { return };
                let number = self.numbers[lease.client];
                self.clients[lease.client].release(real).expect("RELEASE");
                self.twin.end_lease(number, lease.twin).expect("the twin has it, too");
                bury(&mut self.leases, |lease| lease.real.is_none());
            }
            Op::ClientGone { client } => {
                for lease in self.leases.iter_mut().filter(|lease| lease.client == *client) {
                    lease.real = None;
                }
                let fresh = self.connect();
                drop(std::mem::replace(&mut self.clients[*client], fresh));
                self.twin.client_gone(self.numbers[*client]);
                self.numbers[*client].0 += 2;
                // Its end is noticed in its own time.
                let leases = self.twin.lease_count() as u64;
                wait_for(SOON, || crate::books(self.daemon)[4] == leases);
            }
            Op::Reset { vm, how } => {
                self.forget(*vm);
                self.guests[*vm].reset(if *how { Stop::WithBase } else { Stop::DisableOnly });
                self.twin.close_session(self.sessions[*vm]);
                self.reopen(*vm, false);
            }
            Op::Reconnect { vm } => {
                self.forget(*vm);
                self.guests[*vm].reconnect();
                self.twin.close_session(self.sessions[*vm]);
                self.reopen(*vm, true);
            }
        }
    }

    fn holder(&self, export: bool, at: usize) -> Option<(usize, u64)> {
        match export {
            true => pick(&self.exports, at).map(|lent| (lent.vm, lent.handle)),
            false => pick(&self.attachments, at).copied(),
        }
    }

    /// Chains of a guest that starts anew do not come back.
    fn forget(&mut self, vm: usize) {
        self.parked.retain(|_, (of, ..)| *of != vm);
        bury(&mut self.exports, |lent| lent.vm == vm);
        bury(&mut self.attachments, |(of, _)| *of == vm);
        bury(&mut self.mappings, |(of, _)| *of == vm);
    }

    fn reopen(&mut self, vm: usize, connected: bool) {
        self.sessions[vm] = self.twin.open_session(PEERS[vm], connected).expect("configured");
        self.settled(vm);
    }

    fn export(
        &mut self,
        vm: usize,
        at: u64,
        pages: u64,
        access: Access,
        pool: Option<(Uuid, u64)>,
    ) {
        let at = at.min(PAGES / 2 - pages);
        let size = pages * PAGE;
        let mut request = Export { access: access.bits(), ..Default::default() };
        request.segments = vec![(FREE + at * PAGE, size)];
        if let Some((uuid, _)) = pool {
            (request.flags, request.object) = (flag::EXPORT_PART, uuid.into_bytes());
            request.segments = vec![(at % 2 * PAGE, size)];
        }
        let real = status(self.guests[vm].export(request));
        let name = [0; NAME_LEN];
        let what = Description { size, access, name, metadata_type: 0, metadata: Box::default() };
        let part = pool.map(|(pool, _)| Part { pool, offset: at % 2 * PAGE });
        let ticket = self.twin.begin_export(self.sessions[vm], what, part, false);
        let (real, ticket) = match (real, ticket) {
            (Ok(real), Ok((ticket, _))) => (real, ticket),
            (Err(real), Err(twin)) => return assert_eq!(real, twin),
            (real, twin) => panic!("{real:?}, but {:?}", twin.map(drop)),
        };
        let mode = Mode::from_wire(real.mode.get()).expect("a known mode");
        let page = pool.map_or(at, |(_, of)| of + at % 2);
        let private = (mode == Mode::Copy).then_some(size);
        let backing = self.memory(vm, page, private);
        let uuid = Uuid::from_bytes(real.uuid);
        let observable = Path::new("/dev/udmabuf").exists();
        let made = Exported { backing, mode, uuid, observable, shows: true, since: self.now };
        let (handle, ..) = self.twin.finish_export(ticket, Ok(made)).expect("it was made");
        assert_eq!(real.handle.get(), handle.0);
        self.exports.push(Lent { vm, handle: handle.0, uuid, size, at: page });
    }

    fn attach(&mut self, vm: usize, uuid: Uuid, access: Access, zero_copy: bool) {
        let flags = u16::from(zero_copy) * flag::ATTACH_ZERO_COPY;
        let request =
            Attach { flags, uuid: uuid.into_bytes(), access: access.bits(), ..Default::default() };
        let mut real = status(self.guests[vm].attach(request));
        if matches!(real, Err(Status::Busy)) {
            // The twin's clock ran ahead.
            std::thread::sleep(Duration::from_millis(1100));
            real = status(self.guests[vm].attach(request));
        }
        let request = AttachRequest { uuid, access, zero_copy, window: false };
        let twin = self.twin.attach(self.sessions[vm], request, self.now);
        let real = real.map(|(real, _)| {
            (
                real.handle.get(),
                real.size.get(),
                real.generation.get(),
                real.access.get(),
                real.mode.get(),
            )
        });
        let twin = twin.map(|twin| {
            let (access, mode) = (twin.access.bits(), twin.mode.to_wire());
            (twin.handle.0, twin.size, twin.generation, access, mode)
        });
        assert_eq!(real, twin);
        self.attachments.extend(real.ok().map(|(handle, ..)| (vm, handle)));
    }

    fn sync(&mut self, vm: usize, handle: u64, sync: SyncRequest, begin: bool) {
        let flags = u16::from(sync.bits.read) * flag::SYNC_READ
            + u16::from(sync.bits.write) * flag::SYNC_WRITE
            + u16::from(sync.nonblock) * flag::SYNC_NONBLOCK
            + u16::from(!begin) * flag::SYNC_END;
        let timeout_ns = LONG.as_nanos() as u64;
        let (offset, len) = (sync.offset, sync.len);
        let request = Sync { flags, handle, offset, len, timeout_ns, ..Default::default() };
        let head = self.guests[vm].sync_start::<RespSync>(&request.bytes());
        let (session, named) = (self.sessions[vm], HandleId(handle));
        let answer = if begin {
            self.last_token += 1;
            let token = (self.last_token, 254);
            match self.twin.begin_handle(session, named, sync, token, self.now) {
                Ok(Begun::Waits) => {
                    self.parked.insert(self.last_token, (vm, head, handle, sync));
                    return;
                }
                Ok(Begun::Now(generation)) => self.fill(vm, handle, &sync, generation),
                Err(status) => Err(status),
            }
        } else {
            self.twin.end_handle(session, named, sync).map(|ended| self.finish(ended))
        };
        self.due[vm].insert(head, answer);
    }

    fn fill(&mut self, vm: usize, handle: u64, sync: &SyncRequest, generation: u64) -> Synced {
        if let Some((ticket, copy)) = self.twin.fill(self.sessions[vm], HandleId(handle), sync)? {
            self.copy(ticket, &copy);
        }
        Ok(generation)
    }

    fn finish(&mut self, ended: Ended<Rc<Memory>>) -> u64 {
        match ended {
            Ended::Now(generation) => generation,
            Ended::Copy(ticket, copy) => self.copy(ticket, &copy),
        }
    }

    fn copy(&mut self, ticket: CopyTicket, copy: &Copy<Rc<Memory>>) -> u64 {
        carry(copy);
        self.twin.finish_copy(ticket, true)
    }

    fn host_sync(&mut self, at: usize, begin: bool, bits: Access, nonblock: bool) {
        let Some(lease) = pick(&self.leases, at).filter(|lease| lease.real.is_some()) else {
            return;
        };
        let (client, twin) = (lease.client, lease.twin);
        let real = lease.real.as_ref().map_or(0, |real| real.id);
        let number = self.numbers[client];
        let range = client::Access { bits: bits.bits(), offset: 0, len: 0 };
        let (offset, len, timeout) = (0, 0, LONG);
        self.last_token += 1;
        let cookie = Cookie(u32::try_from(self.last_token).expect("a short script"));
        let nonblock = nonblock && begin;
        let sync = SyncRequest { bits, offset, len, nonblock, timeout, cookie };
        let client_of = &mut self.clients[client];
        if !begin {
            let real = client_of.end(real, range).or_else(refusal);
            let twin = self.twin.end_access(number, twin, sync);
            let twin = twin.map(|ended| self.finish(ended));
            return assert_eq!(real, twin);
        }
        let begun = self.twin.begin_lease(number, twin, sync, false, self.now);
        match begun {
            Ok(Begun::Waits) => {
                let real = client_of.submit_begin(real, range, LONG).expect("sent");
                self.begun.insert((number, cookie), (client, real));
            }
            Ok(Begun::Now(_)) | Err(_) => {
                let real = match nonblock {
                    true => client_of.try_begin(real, range),
                    false => client_of.begin(real, range, LONG),
                };
                let begun = begun.map(|begun| match begun {
                    Begun::Now(generation) => generation,
                    Begun::Waits => unreachable!("that was the other case"),
                });
                assert_eq!(real.or_else(refusal), begun);
            }
        }
    }

    /// What follows of a step: ends of waits, looks at references and fences, as the hub does it.
    fn follow(&mut self) {
        loop {
            let outbox = self.twin.take_outbox();
            for fences in &outbox.fences {
                self.twin.fence_over(fences.wait, Status::Ok);
            }
            for key in &outbox.observe {
                if let Some((look, _)) = self.twin.look(*key) {
                    self.twin.observed(look, false, self.now);
                }
            }
            for done in &outbox.done {
                let answer = match done.status {
                    Status::Ok => Ok(done.value),
                    status => Err(status),
                };
                match done.origin {
                    Origin::Vm(_, token) => {
                        let Some((vm, head, handle, sync)) = self.parked.remove(&token) else {
                            continue;
                        };
                        let answer = answer.and_then(|now| self.fill(vm, handle, &sync, now));
                        self.due[vm].insert(head, answer);
                    }
                    Origin::Client(number, cookie) => {
                        let Some((client, real)) = self.begun.remove(&(number, cookie)) else {
                            continue;
                        };
                        if self.numbers[client] == number {
                            let real = wait_generation(&mut self.clients[client], real);
                            assert_eq!(real.or_else(refusal), answer);
                        }
                    }
                }
            }
            if outbox.fences.is_empty() && outbox.observe.is_empty() && outbox.done.is_empty() {
                break;
            }
        }
        for vm in 0..2 {
            for _ in 0..self.due[vm].len() {
                let (head, reply) = self.guests[vm]
                    .sync_next::<RespSync>(patience())
                    .expect("an answer on the sync queue");
                let twin = self.due[vm].remove(&head).expect("a request that was to be answered");
                assert_eq!(status(reply).map(|reply| reply.generation.get()), twin, "SYNC");
            }
        }
    }

    /// Both say the same of everything.
    fn compare(&mut self) {
        for vm in 0..2 {
            let mut expected = Vec::new();
            while let Some(event) = self.twin.next_event(self.sessions[vm], WANTS) {
                self.twin.event_told(self.sessions[vm], event);
                let (handle, uuid) = (event.handle.map_or(0, |handle| handle.0), event.uuid);
                let uuid = uuid.unwrap_or_default();
                expected.push((
                    opcode(event.kind),
                    handle,
                    uuid,
                    event.generation,
                    event.access.bits(),
                ));
            }
            let told = |event: Event| {
                let opcode = Opcode::from_wire(event.kind.get()).expect("a known event");
                let uuid = Uuid::from_bytes(event.uuid);
                (opcode, event.handle.get(), uuid, event.generation.get(), event.access.get())
            };
            let mut real = Vec::new();
            while real.len() < expected.len() {
                match self.guests[vm].event(patience()) {
                    Some(event) => real.push(told(event)),
                    None => break,
                }
            }
            real.extend(self.guests[vm].event(Duration::ZERO).map(told));
            assert_eq!(real, expected, "events of VM {vm}");
        }
        self.follow();
        let mut all = Vec::new();
        let mut after = Uuid::nil();
        loop {
            let (page, next) = self.twin.report_page(after, usize::MAX, true, self.now);
            all.extend(page.iter().map(|twin| {
                let (info, counts) = (&twin.info, (twin.leases as u32, twin.attachments as u32));
                let known = (info.uuid, info.generation, info.use_count, info.access.bits());
                (known, counts, twin.mappings, twin.waits as u32, twin.state, twin.owner_gone)
            }));
            match next {
                Some(next) => after = next,
                None => break,
            }
        }
        let inspect = |client: &mut Client| -> Vec<_> {
            let reports = client.inspect().expect("INSPECT");
            let report = |real: &Report| {
                let (buffer, counts) = (&real.buffer, (real.leases, real.attachments));
                let known = (buffer.uuid, buffer.generation, buffer.use_count, buffer.access);
                let state = real.state.expect("a known state");
                (known, counts, real.mappings, real.waits, state, real.owner_gone)
            };
            reports.iter().map(report).collect()
        };
        // A BEGIN that waits gives no sign of its arrival but this.
        let mut real = Vec::new();
        wait_for(patience(), || {
            real = inspect(&mut self.clients[0]);
            real == all
        });
        assert_eq!(real, all, "INSPECT");
        for vm in 0..2 {
            let real = self.guests[vm].memory.read(FREE, (PAGES * PAGE) as usize);
            let twin = self.ram[vm].borrow();
            if real != *twin {
                let at = (0..real.len()).find(|at| real[*at] != twin[*at]).expect("unequal");
                let (real, twin, page) = (real[at], twin[at], at / PAGE as usize);
                panic!("VM {vm}: byte {at} in page {page} is {real:#x}, not {twin:#x}");
            }
        }
    }
}

/// The answer to a BEGIN that waited.
fn wait_generation(client: &mut Client, cookie: u64) -> Result<u64, client::Error> {
    let mut answer = None;
    wait_for(patience(), || {
        client.dispatch().expect("the daemon lives");
        answer = client.take_generation(cookie).transpose();
        answer.is_some()
    });
    answer.expect("an answer to BEGIN")
}

fn opcode(kind: EventKind) -> Opcode {
    match kind {
        EventKind::Released => Opcode::EvtReleased,
        EventKind::Idle => Opcode::EvtIdle,
        EventKind::Busy => Opcode::EvtBusy,
        EventKind::Offered => Opcode::EvtOffered,
        EventKind::Withdrawn => Opcode::EvtWithdrawn,
        EventKind::Revoked => Opcode::EvtRevoked,
        EventKind::Changed => Opcode::EvtChanged,
        EventKind::Peer => Opcode::EvtPeer,
        EventKind::Resync => Opcode::EvtResync,
    }
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
        let script = prop::collection::vec(op(), 0..120);
        let result = TestRunner::new(config).run(&script, |ops| {
            let mut world = World::new(&daemon);
            for op in beginning().iter().chain(&ops) {
                world.step(op);
                *taken.borrow_mut() += 1;
            }
            Ok(())
        });
        if let Err(TestError::Fail(why, ops)) = result {
            let script: Vec<String> = ops.iter().map(|op| format!("    {op:?}")).collect();
            panic!("{why}\nthe shortest script:\n{}", script.join("\n"));
        }
        steps += *taken.borrow();
        assert_nothing_left(&daemon, fds.unwrap_or(usize::MAX));
        fds.get_or_insert_with(|| daemon.fds());
    }
    let mut client = Client::connect(&daemon.host_socket(), "twin").expect("host socket");
    let stats = client.stats().expect("STATS");
    let seen = stats.iter().filter(|(name, count)| name.contains("answers_") && *count > 0);
    let seen: Vec<_> = seen.map(|(name, count)| format!("{} {count}", &name[8..])).collect();
    eprintln!("{steps} steps in {:.1?}; answers: {}", started.elapsed(), seen.join(", "));
}
