//! The daemon and its twin in one world: every step is done to both, and what can be seen of both is
//! compared. Here is what a VM does; what its VMM does is in `window`, what programs do is in `host`.

use super::window::Windowed;
use super::*;

pub type Ram = Rc<RefCell<Vec<u8>>>;

/// Memory as the twin has it: pages of a guest, and a private copy of them in COPY mode.
#[derive(Debug)]
pub struct Memory {
    pub ram: Ram,
    pub at: usize,
    pub private: Option<Ram>,
    /// What a VMM is told that it is.
    pub file: FileId,
}

impl Memory {
    pub fn place(&self, view: View, offset: u64) -> (&Ram, usize) {
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

/// Whose an export is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owner {
    Vm(usize),
    Client(usize),
}

pub struct Lent {
    pub owner: Owner,
    /// The two differ where a client is the owner.
    pub handle: u64,
    pub twin: HandleId,
    pub uuid: Uuid,
    pub size: u64,
    /// Where a guest's pages are.
    at: u64,
    /// What a program lends.
    pub memory: Option<(Mapping, Rc<Memory>)>,
}

impl Lent {
    pub fn of_client(
        client: usize,
        (handle, twin): (u64, HandleId),
        uuid: Uuid,
        memory: (u64, Mapping, Rc<Memory>),
    ) -> Lent {
        let (size, real, memory) = memory;
        let owner = Owner::Client(client);
        Lent { owner, handle, twin, uuid, size, at: 0, memory: Some((real, memory)) }
    }
}

pub struct Lease {
    pub client: usize,
    pub real: Option<client::Lease>,
    pub twin: LeaseId,
    size: u64,
    memory: Rc<Memory>,
}

/// What a request on the sync queue waits for.
enum Parked {
    Begin(u64, SyncRequest),
    Point,
}

pub struct World<'a> {
    daemon: &'a Daemon,
    pub guests: [Guest; 2],
    pub clients: Vec<Client>,
    /// The host's numbers for the two clients, in the twin.
    pub numbers: Vec<ClientId>,
    pub twin: Registry<Rc<Memory>>,
    pub sessions: [SessionId; 2],
    ram: [Ram; 2],
    pub now: Duration,
    pub exports: Vec<Lent>,
    pub attachments: Vec<(usize, u64)>,
    pub mappings: Vec<(usize, u64)>,
    pub leases: Vec<Lease>,
    last_token: u64,
    last_file: u64,
    /// Requests on sync queues that wait, by token.
    parked: BTreeMap<u64, (usize, u16, Parked)>,
    /// BEGINs and WAITs of clients, by the twin's cookie.
    pub begun: BTreeMap<(ClientId, Cookie), (usize, u64, bool)>,
    /// What has to come of each guest's sync queue, by head.
    due: [HashMap<u16, Synced>; 2],
    pub windows: [Windowed; 2],
    /// The highest point that was signalled.
    highest: u64,
    /// What each guest was told, by the daemon and by the twin.
    knows: [[Knows; 2]; 2],
    pub told: host::Told,
    /// How many so far, and the last one.
    steps: (usize, String),
}

/// An event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Told {
    kind: Opcode,
    handle: u64,
    uuid: Uuid,
    generation: u64,
    access: u32,
}

impl Told {
    fn of(event: &Event) -> Told {
        Told {
            kind: Opcode::from_wire(event.kind.get()).expect("a known event"),
            handle: event.handle.get(),
            uuid: Uuid::from_bytes(event.uuid),
            generation: event.generation.get(),
            access: event.access.get(),
        }
    }
}

/// What a guest knows from all that it was told.
#[derive(Debug, Default, PartialEq, Eq)]
struct Knows {
    released: Vec<u64>,
    busy: BTreeMap<u64, bool>,
    generations: BTreeMap<u64, u64>,
    revoked: BTreeSet<u64>,
    offers: BTreeMap<Uuid, u32>,
}

impl Knows {
    fn hear(&mut self, Told { kind, handle, uuid, generation, access }: Told) {
        match kind {
            Opcode::EvtReleased => {
                assert!(!self.released.contains(&handle), "RELEASED of {handle} was told twice");
                self.released.push(handle);
                self.released.sort_unstable();
            }
            Opcode::EvtBusy | Opcode::EvtIdle => {
                self.busy.insert(handle, kind == Opcode::EvtBusy);
            }
            Opcode::EvtChanged => drop(self.generations.insert(handle, generation)),
            Opcode::EvtRevoked => drop(self.revoked.insert(handle)),
            Opcode::EvtOffered => drop(self.offers.insert(uuid, access)),
            Opcode::EvtWithdrawn => drop(self.offers.remove(&uuid)),
            // Live offers and dead attachments are told again.
            Opcode::EvtResync => (self.offers.clear(), self.revoked.clear()).0,
            other => panic!("{other:?} is no event of a script"),
        }
    }
}

fn setup(vmms: Vmms) -> Setup {
    let decline = 1 << feature::PEERS | u64::from(vmms == Vmms::None) << feature::WINDOW;
    let echo = vmms == Vmms::Echo;
    let vmm = (vmms != Vmms::None).then(|| Behaviour { echo, ..Default::default() });
    Setup { decline, event_buffers: 64, vmm, ..Default::default() }
}

pub fn pick<T>(from: &[T], pick: usize) -> Option<&T> {
    // The last ones are the interesting ones.
    from.get(from.len().checked_sub(1 + pick % from.len().clamp(1, 8))?)
}

/// Puts what is dead where it is picked less often.
pub fn bury<T>(list: &mut [T], dead: impl Fn(&T) -> bool) {
    list.sort_by_key(|one| !dead(one));
}

pub fn status<T>(reply: Result<T, Refusal>) -> Result<T, Status> {
    reply.map_err(|refusal| refusal.status)
}

pub fn refusal<T>(reply: client::Error) -> Result<T, Status> {
    Err(reply.status().unwrap_or_else(|| panic!("no refusal: {reply}")))
}

impl Drop for World<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            PATIENCE_MS.store(500, Ordering::Relaxed);
            eprintln!("step {}: {}", self.steps.0, self.steps.1);
        }
    }
}

impl<'a> World<'a> {
    pub fn new(daemon: &'a Daemon, vmms: Vmms) -> World<'a> {
        let policy = Policy::new(vec![Rule { from: Side::Any, to: Side::Any, read_only: false }]);
        let quota = Quota { max_exports: QUOTA, ..Quota::default() };
        let vms = PEERS.map(|peer| (peer, ["a", "b"][peer.0 as usize - 2].to_owned(), quota, 0));
        let mut twin = Registry::new(policy, vms);
        let sessions = PEERS.map(|peer| twin.open_session(peer, true).expect("configured"));
        // What an earlier script left goes in its own time.
        assert!(wait_for(SOON, || crate::books(daemon) == [0; 5]));
        let guests = ["a", "b"].map(|vm| {
            let mut guest = setup(vmms).connect(daemon, vm);
            if vmms != Vmms::None {
                // What it is told while the other one connects it would be told again.
                guest.expect_event(Opcode::EvtResync);
                status(guest.query(u64::MAX)).expect_err("nothing is there");
            }
            guest
        });
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
            last_file: 0,
            parked: BTreeMap::new(),
            begun: BTreeMap::new(),
            due: [HashMap::new(), HashMap::new()],
            windows: [Windowed::new(vmms), Windowed::new(vmms)],
            highest: 0,
            knows: Default::default(),
            told: host::Told::default(),
            steps: (0, String::new()),
        };
        for client in 0..2 {
            world.clients.push(world.connect());
            world.numbers.push(ClientId(client + 1));
        }
        for vm in 0..2 {
            world.open_window(vm);
            if let Some(event) = world.twin.next_event(world.sessions[vm], WANTS) {
                assert_eq!(event.kind, EventKind::Resync);
                world.twin.event_told(world.sessions[vm], event);
            }
            world.settled(vm);
        }
        world.compare();
        world
    }

    pub fn connect(&self) -> Client {
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

    fn memory(&mut self, vm: usize, page: u64, private: Option<u64>) -> Rc<Memory> {
        let zeros = |size: u64| Rc::new(RefCell::new(vec![0; size as usize]));
        let (ram, at) = (self.ram[vm].clone(), (page * PAGE) as usize);
        let file = self.file();
        Rc::new(Memory { ram, at, private: private.map(zeros), file })
    }

    /// Memory of its own.
    pub fn fresh(&mut self, size: u64) -> Rc<Memory> {
        let ram = Rc::new(RefCell::new(vec![0; size as usize]));
        let file = self.file();
        Rc::new(Memory { ram, at: 0, private: None, file })
    }

    fn file(&mut self) -> FileId {
        self.last_file += 1;
        FileId { dev: 1, ino: self.last_file }
    }

    pub fn token(&mut self) -> u64 {
        self.last_token += 1;
        self.last_token
    }

    pub fn step(&mut self, op: &Op) {
        // Misses of ATTACH are bounded in a second, which the daemon's clock counts.
        self.now += Duration::from_secs(1);
        self.steps = (self.steps.0 + 1, format!("{op:?}"));
        self.apply(op);
        self.follow();
        self.compare();
    }

    fn apply(&mut self, op: &Op) {
        match op {
            Op::Export { vm, at, pages, access, pool } => {
                let own = self.exports.iter().filter(|lent| lent.owner == Owner::Vm(*vm));
                let own: Vec<&Lent> = own.collect();
                let pool = pool.and_then(|pool| pick(&own, pool));
                let pool = pool.map(|pool| (pool.uuid, pool.at));
                self.export(*vm, *at, *pages, *access, pool);
            }
            Op::Grant { export, to, access, once, force } => {
                self.grant(*export, *to, *access, *once, *force && access.is_none());
            }
            Op::Release { export, force } => self.release(*export, *force),
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
            Op::Unmap { mapping } => self.unmap(*mapping),
            Op::Show { attachment, offset, at, pages, access } => {
                self.show(*attachment, *offset, (*at, *pages), *access);
            }
            Op::WriteWindow { vm, pick, byte } => self.write_window(*vm, *pick, *byte),
            Op::Hold { vm, holds } => self.hold(*vm, *holds),
            Op::Behave { vm, manner } => self.behave(*vm, *manner),
            Op::Point { who, pick, line, ahead, signal } => {
                let point = (self.highest + ahead).saturating_sub(2);
                self.point(*who, *pick, (*line, point), *signal);
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
                let Some(lease) = pick(&self.leases, *lease) else { return };
                let Some(real) = &lease.real else { return };
                let of = (lease.client, real.id, lease.twin);
                self.host_sync(of, *begin, *bits, *nonblock);
            }
            Op::Lend { client, pages, access } => self.lend(*client, *pages * PAGE, *access),
            Op::LentSync { export, begin, bits, nonblock } => {
                let Some(lent) = pick(&self.exports, *export) else { return };
                let Owner::Client(client) = lent.owner else { return };
                let of = (client, lent.handle, LeaseId(lent.twin.0));
                self.host_sync(of, *begin, *bits, *nonblock);
            }
            Op::LentWrite { export, byte } => {
                let Some(lent) = pick(&self.exports, *export) else { return };
                let Some((real, memory)) = &lent.memory else { return };
                let size = lent.size as usize;
                real.write_at(0, &vec![*byte; size]).expect("inside");
                memory.ram.borrow_mut()[..size].fill(*byte);
            }
            Op::HostCancel { pick } => self.host_cancel(*pick),
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
                let lent = self.exports.iter().filter(|lent| lent.owner == Owner::Client(*client));
                self.told.forget(lent.map(|lent| lent.uuid));
                bury(&mut self.exports, |lent| lent.owner == Owner::Client(*client));
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
                self.close_window(*vm);
                self.twin.close_session(self.sessions[*vm]);
                self.twin.memory_changed(PEERS[*vm], &[]);
                self.reopen(*vm, true);
            }
        }
    }

    fn holder(&self, export: bool, at: usize) -> Option<(usize, u64)> {
        match export {
            true => match pick(&self.exports, at)? {
                Lent { owner: Owner::Vm(vm), handle, .. } => Some((*vm, *handle)),
                Lent { owner: Owner::Client(_), .. } => None,
            },
            false => pick(&self.attachments, at).copied(),
        }
    }

    /// Chains of a guest that starts anew do not come back.
    fn forget(&mut self, vm: usize) {
        self.parked.retain(|_, (of, ..)| *of != vm);
        self.forget_shown(vm);
        self.knows[vm] = Default::default();
        bury(&mut self.exports, |lent| lent.owner == Owner::Vm(vm));
        bury(&mut self.attachments, |(of, _)| *of == vm);
        bury(&mut self.mappings, |(of, _)| *of == vm);
    }

    fn reopen(&mut self, vm: usize, connected: bool) {
        self.sessions[vm] = self.twin.open_session(PEERS[vm], connected).expect("configured");
        if connected {
            self.open_window(vm);
        }
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
        let owner = Owner::Vm(vm);
        let lent =
            Lent { owner, handle: handle.0, twin: handle, uuid, size, at: page, memory: None };
        self.exports.push(lent);
    }

    fn grant(&mut self, export: usize, to: u32, access: Access, once: bool, force: bool) {
        let Some(lent) = pick(&self.exports, export) else { return };
        let (owner, handle, twin) = (lent.owner, lent.handle, lent.twin);
        let flags = u16::from(once) * flag::GRANT_ONCE + u16::from(force) * flag::GRANT_FORCE;
        let bits = access.bits();
        let (real, session) = match owner {
            Owner::Vm(vm) => {
                let request = Grant { flags, handle, peer_id: to, access: bits, lifetime_ms: 0 };
                (status(self.guests[vm].grant(request)), self.sessions[vm])
            }
            Owner::Client(client) => {
                let real = self.clients[client].grant(handle, to, bits, flags, Duration::ZERO);
                (real.or_else(refusal), SessionId::of_client(self.numbers[client]))
            }
        };
        let (handle, to, lifetime) = (twin, PeerId(to), Duration::ZERO);
        let request = GrantRequest { handle, to, access, once, force, lifetime };
        assert_eq!(real, self.twin.grant(session, request, self.now));
    }

    fn release(&mut self, export: usize, force: bool) {
        let Some(lent) = pick(&self.exports, export) else { return };
        let (owner, handle, twin) = (lent.owner, lent.handle, lent.twin);
        let Owner::Vm(vm) = owner else {
            self.take_back(owner, (handle, twin), force);
            return bury(&mut self.exports, |lent| (lent.owner, lent.handle) == (owner, handle));
        };
        let guest = &mut self.guests[vm];
        let real = if force { guest.release_force(handle) } else { guest.release(handle) };
        let session = self.sessions[vm];
        if let Some(key) = self.twin.look_before_release(session, twin)
            && let Some((look, _)) = self.twin.look(key)
        {
            self.twin.observed(look, false, self.now);
        }
        let twin = self.twin.release(session, twin, force);
        let state = |state: RespState| (state.state.get(), state.use_count.get());
        let twin = twin.map(|twin| (twin.state.to_wire(), twin.use_count));
        assert_eq!(status(real).map(state), twin);
        bury(&mut self.exports, |lent| (lent.owner, lent.handle) == (owner, handle));
    }

    /// SIGNAL, or WAIT.
    fn point(&mut self, who: Who, at: usize, (line, point): (Line, u64), signal: Option<Status>) {
        let holder = match who {
            Who::Exporter => self.holder(true, at),
            Who::Attachment => self.holder(false, at),
            Who::Lease => None,
        };
        let Some((vm, handle)) = holder else {
            let Some(of) = self.program(who, at) else { return };
            let reached = self.host_point(of, (line, point), signal);
            return self.highest = self.highest.max(reached);
        };
        let (session, named) = (self.sessions[vm], HandleId(handle));
        let request =
            Point { timeout_ns: LONG.as_nanos() as u64, ..Point::new(handle, line, point) };
        if let Some(status) = signal {
            let request = Point { error: u32::from(status.to_wire()), timeout_ns: 0, ..request };
            let head = self.guests[vm].start_signal(request);
            let reached = self.twin.signal_handle(session, named, Signal { line, point, status });
            self.highest = self.highest.max(reached.unwrap_or(0));
            self.due[vm].insert(head, reached);
            return;
        }
        let head = self.guests[vm].start_wait(request);
        // What is behind it on the queue is answered when it waits: else nothing would tell.
        let gone = self.guests[vm].start_wait(Point::new(u64::MAX, line, point));
        self.due[vm].insert(gone, Err(Status::NoEnt));
        let token = self.token();
        let wait = PointWait { line, point, timeout: LONG, cookie: Cookie(0) };
        match self.twin.wait_handle(session, named, wait, (token, 254), self.now) {
            Ok(Begun::Waits) => drop(self.parked.insert(token, (vm, head, Parked::Point))),
            Ok(Begun::Now(reached)) => drop(self.due[vm].insert(head, Ok(reached))),
            Err(status) => drop(self.due[vm].insert(head, Err(status))),
        }
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
        let window = self.windows[vm].vmms != Vmms::None;
        let request = AttachRequest { uuid, access, zero_copy, window };
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
                    self.parked.insert(self.last_token, (vm, head, Parked::Begin(handle, sync)));
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

    pub fn finish(&mut self, ended: Ended<Rc<Memory>>) -> u64 {
        match ended {
            Ended::Now(generation) => generation,
            Ended::Copy(ticket, copy) => self.copy(ticket, &copy),
        }
    }

    fn copy(&mut self, ticket: CopyTicket, copy: &Copy<Rc<Memory>>) -> u64 {
        carry(copy);
        self.twin.finish_copy(ticket, true)
    }

    /// What follows of a step: ends of waits, looks at references and fences, what VMMs are asked, as the
    /// hub does it.
    fn follow(&mut self) {
        loop {
            for vm in 0..2 {
                self.ask(vm);
            }
            let outbox = self.twin.take_outbox();
            for fences in &outbox.fences {
                self.twin.fence_over(fences.wait, Status::Ok);
            }
            for key in &outbox.observe {
                if let Some((look, _)) = self.twin.look(*key) {
                    self.twin.observed(look, false, self.now);
                }
            }
            for settled in &outbox.settled {
                self.settle(settled);
            }
            for done in &outbox.done {
                let answer = match done.status {
                    Status::Ok => Ok(done.value),
                    status => Err(status),
                };
                match done.origin {
                    Origin::Vm(_, token) => {
                        let Some((vm, head, wait)) = self.parked.remove(&token) else { continue };
                        let answer = match wait {
                            Parked::Begin(handle, sync) => {
                                answer.and_then(|now| self.fill(vm, handle, &sync, now))
                            }
                            Parked::Point => answer,
                        };
                        self.due[vm].insert(head, answer);
                    }
                    Origin::Client(number, cookie) => self.host_ended(number, cookie, answer),
                }
            }
            let quiet = outbox.fences.is_empty() && outbox.observe.is_empty();
            if quiet && outbox.done.is_empty() && outbox.vmm.is_empty() {
                break;
            }
        }
        for vm in 0..2 {
            self.answers_of_vmm(vm);
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

    /// Guests are told the same. Where one of them missed something, in the middle of what else is to be
    /// told, it is told again, and what it knows in the end is the same.
    fn compare_events(&mut self, vm: usize) {
        let mut expected = Vec::new();
        while let Some(event) = self.twin.next_event(self.sessions[vm], WANTS) {
            self.twin.event_told(self.sessions[vm], event);
            expected.push(Told {
                kind: opcode(event.kind),
                handle: event.handle.map_or(0, |handle| handle.0),
                uuid: event.uuid.unwrap_or_default(),
                generation: event.generation,
                access: event.access.bits(),
            });
        }
        let missed = |told: &[Told]| told.iter().any(|told| told.kind == Opcode::EvtResync);
        let mut real = Vec::new();
        while real.len() < expected.len() || (missed(&expected) && !missed(&real)) {
            match self.guests[vm].event(patience()) {
                Some(event) => real.push(Told::of(&event)),
                None => break,
            }
        }
        if missed(&expected) {
            self.settled(vm);
        }
        while let Some(event) = self.guests[vm].event(Duration::ZERO) {
            real.push(Told::of(&event));
        }
        let [known, known_to_twin] = &mut self.knows[vm];
        real.iter().for_each(|told| known.hear(*told));
        expected.iter().for_each(|told| known_to_twin.hear(*told));
        // A VMM whose echo is late is asked for a page there and back, whose echo may make a RESYNC, too.
        if !missed(&real) {
            return assert_eq!(real, expected, "events of VM {vm}");
        }
        let guest = &mut self.guests[vm];
        wait_for(patience(), || {
            while let Some(event) = guest.event(Duration::ZERO) {
                known.hear(Told::of(&event));
            }
            known == known_to_twin
        });
        assert_eq!(known, known_to_twin, "what VM {vm} knows in the end");
    }

    /// Both say the same of everything.
    fn compare(&mut self) {
        self.compare_windows();
        self.compare_told();
        for vm in 0..2 {
            self.compare_events(vm);
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
