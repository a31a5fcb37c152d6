//! The registry against a model of it: random lives of three VMs and two host clients, in which
//! memory is made late, copies finish late, looks are overtaken, and anybody dies at any time.
//! Buffers go from the first and the last VM to the second one, and from all to the host.
//!
//! The model keeps what the world knows (handles, leases, descriptors that somebody holds) and
//! derives all counts from it each time; it knows no phases, queues of events, deadlines or deltas.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::time::Duration;

use proptest::prelude::*;
use uuid::Uuid;

use super::*;
use crate::ids::{Access, AttachmentId, Cookie, MappingId};
use crate::limits::MAX_MISSES_PER_SECOND;
use crate::policy::{Allowed, Rule, Side};
use crate::protocol::{Line, Mode, NAME_LEN, State};

const VMS: [PeerId; 3] = [PeerId(2), PeerId(3), PeerId(4)];
/// The host and the importer only read what this one exports; it does not know that there are importers.
const SHY: PeerId = VMS[2];
const IMPORTER: PeerId = VMS[1];
const CLIENTS: [ClientId; 2] = [ClientId(1), ClientId(2)];
const PAGE: u64 = 4096;
const QUOTA: Quota = Quota { max_exports: 4, max_total_size: 8 * PAGE, max_waits: 2 };

/// One thing that happens. Indices pick among what there is.
#[derive(Debug, Clone)]
enum Op {
    Open {
        vm: PeerId,
        connected: bool,
    },
    Close {
        vm: PeerId,
    },
    Export {
        vm: PeerId,
        pages: u64,
        access: Access,
        copy: bool,
        pool: Option<usize>,
        at: u64,
    },
    Made {
        ticket: usize,
        ok: bool,
    },
    Grant {
        export: usize,
        to: PeerId,
        access: Access,
        once: bool,
        force: bool,
        ms: u64,
    },
    Release {
        export: usize,
        force: bool,
    },
    SetName {
        export: usize,
    },
    Acquire {
        client: ClientId,
        export: usize,
        access: Access,
        zero_copy: bool,
    },
    EndLease {
        client: ClientId,
        lease: usize,
    },
    ClientGone {
        client: ClientId,
    },
    /// A client that has a lease gets the descriptor, or somebody closes the last one.
    Descriptor {
        export: usize,
        sent: bool,
    },
    Begin {
        export: usize,
        lease: Option<usize>,
        sync: SyncRequest,
        full: bool,
    },
    End {
        export: usize,
        lease: Option<usize>,
        sync: SyncRequest,
    },
    Copied {
        copy: usize,
        ok: bool,
    },
    CancelVm {
        export: usize,
        all: bool,
    },
    CancelClient {
        export: usize,
        wait: usize,
    },
    Attach {
        vm: PeerId,
        export: usize,
        access: Access,
        zero_copy: bool,
    },
    Detach {
        pick: usize,
    },
    Map {
        pick: usize,
        offset: u64,
        pages: u64,
        access: Access,
    },
    Mapped {
        map: usize,
        ok: bool,
    },
    Unmap {
        pick: usize,
    },
    BeginAttached {
        pick: usize,
        sync: SyncRequest,
    },
    /// A BEGIN of an attachment that was granted copies what it has to.
    Fill {
        pick: usize,
    },
    EndAttached {
        pick: usize,
        sync: SyncRequest,
    },
    CancelAttached {
        pick: usize,
    },
    /// SIGNAL or WAIT of the exporter, a lease, or an attachment.
    Point {
        export: usize,
        lease: Option<usize>,
        attached: Option<usize>,
        line: Line,
        point: u64,
        /// SIGNAL with this status.
        signal: Option<Status>,
        ms: u64,
    },
    /// What somebody finds who looks at fences, or later that they are over.
    Fence {
        pick: usize,
        found: Found,
    },
    Look {
        pick: usize,
    },
    Seen {
        look: usize,
    },
    TakeEvent {
        vm: PeerId,
    },
    Told {
        vm: PeerId,
    },
    Resync {
        vm: PeerId,
    },
    Time {
        ms: u64,
    },
}

/// What a look at the fences of a buffer finds.
#[derive(Debug, Clone, Copy)]
enum Found {
    Over,
    Pending,
    Failed,
}

fn access() -> impl Strategy<Value = Access> {
    prop_oneof![
        4 => Just(Access::ALL),
        2 => Just(Access::READ),
        1 => Just(Access::WRITE),
        2 => Just(Access::NONE),
    ]
}

fn sync() -> impl Strategy<Value = SyncRequest> {
    (access(), 0..3u64, 0..3u64, prop::bool::weighted(0.1), 0..60u64).prop_map(
        |(bits, offset, len, nonblock, ms)| SyncRequest {
            bits,
            offset: offset * PAGE / 2,
            len: len * PAGE / 2,
            nonblock,
            timeout: Duration::from_millis(ms),
            cookie: Cookie(0),
        },
    )
}

fn point() -> impl Strategy<Value = Op> {
    let lease = prop::option::weighted(0.4, 0..64usize);
    let attached = prop::option::weighted(0.3, 0..64usize);
    let line = prop::sample::select(&[Line::Acquire, Line::Release][..]);
    let status = prop::sample::select(&[Status::Ok, Status::Ok, Status::Io, Status::Access][..]);
    let signal = prop::option::of(status);
    (0..64usize, lease, attached, line, 0..6u64, signal, 0..60u64).prop_map(
        |(export, lease, attached, line, point, signal, ms)| Op::Point {
            export,
            lease,
            attached,
            line,
            point,
            signal,
            ms,
        },
    )
}

fn op() -> impl Strategy<Value = Op> {
    let vm = prop::sample::select(&VMS[..]);
    let client = prop::sample::select(&CLIENTS[..]);
    let some = 0..64usize;
    let lease = || prop::option::weighted(0.6, 0..64usize);
    let yes = any::<bool>;
    let rarely = || prop::bool::weighted(0.2);
    let to = prop::sample::select(vec![
        PeerId::HOST,
        PeerId::HOST,
        PeerId::HOST,
        PeerId::ANY,
        VMS[0],
        IMPORTER,
        IMPORTER,
        PeerId(9),
    ]);
    let importer = prop::sample::select(vec![IMPORTER, IMPORTER, IMPORTER, VMS[0]]);
    prop_oneof![
        2 => (vm.clone(), yes()).prop_map(|(vm, connected)| Op::Open { vm, connected }),
        1 => vm.clone().prop_map(|vm| Op::Close { vm }),
        12 => (vm.clone(), 1..4u64, access(), yes(), prop::option::weighted(0.3, some.clone()), 0..2u64)
            .prop_map(|(vm, pages, access, copy, pool, at)| {
                Op::Export { vm, pages, access, copy, pool, at: at * PAGE }
            }),
        12 => (some.clone(), prop::bool::weighted(0.8))
            .prop_map(|(ticket, ok)| Op::Made { ticket, ok }),
        12 => (some.clone(), to, access(), rarely(), rarely(), 0..40u64).prop_map(
            |(export, to, access, once, force, ms)| {
                Op::Grant { export, to, access, once, force, ms: ms.saturating_sub(30) }
            }
        ),
        8 => (some.clone(), rarely()).prop_map(|(export, force)| Op::Release { export, force }),
        1 => some.clone().prop_map(|export| Op::SetName { export }),
        20 => (client.clone(), some.clone(), access(), rarely()).prop_map(
            |(client, export, access, zero_copy)| Op::Acquire { client, export, access, zero_copy }
        ),
        12 => (client.clone(), some.clone())
            .prop_map(|(client, lease)| Op::EndLease { client, lease }),
        1 => client.prop_map(|client| Op::ClientGone { client }),
        12 => (some.clone(), yes()).prop_map(|(export, sent)| Op::Descriptor { export, sent }),
        20 => (some.clone(), lease(), sync(), rarely())
            .prop_map(|(export, lease, sync, full)| Op::Begin { export, lease, sync, full }),
        12 => (some.clone(), lease(), sync())
            .prop_map(|(export, lease, sync)| Op::End { export, lease, sync }),
        8 => (some.clone(), yes()).prop_map(|(copy, ok)| Op::Copied { copy, ok }),
        2 => (some.clone(), yes()).prop_map(|(export, all)| Op::CancelVm { export, all }),
        2 => (some.clone(), some.clone())
            .prop_map(|(export, wait)| Op::CancelClient { export, wait }),
        14 => (importer, some.clone(), access(), rarely()).prop_map(
            |(vm, export, access, zero_copy)| Op::Attach { vm, export, access, zero_copy }
        ),
        5 => some.clone().prop_map(|pick| Op::Detach { pick }),
        8 => (some.clone(), 0..3u64, 1..4u64, access()).prop_map(
            |(pick, offset, pages, access)| Op::Map { pick, offset: offset * PAGE, pages, access }
        ),
        8 => (some.clone(), prop::bool::weighted(0.9))
            .prop_map(|(map, ok)| Op::Mapped { map, ok }),
        3 => some.clone().prop_map(|pick| Op::Unmap { pick }),
        14 => (some.clone(), sync()).prop_map(|(pick, sync)| Op::BeginAttached { pick, sync }),
        14 => some.clone().prop_map(|pick| Op::Fill { pick }),
        10 => (some.clone(), sync()).prop_map(|(pick, sync)| Op::EndAttached { pick, sync }),
        1 => some.clone().prop_map(|pick| Op::CancelAttached { pick }),
        30 => point(),
        30 => (some.clone(), prop::sample::select(vec![Found::Over, Found::Over, Found::Pending, Found::Failed]))
            .prop_map(|(pick, found)| Op::Fence { pick, found }),
        12 => some.clone().prop_map(|pick| Op::Look { pick }),
        12 => some.prop_map(|look| Op::Seen { look }),
        8 => vm.clone().prop_map(|vm| Op::TakeEvent { vm }),
        8 => vm.clone().prop_map(|vm| Op::Told { vm }),
        1 => vm.prop_map(|vm| Op::Resync { vm }),
        8 => (0..40u64).prop_map(|ms| Op::Time { ms }),
    ]
}

/// A buffer as the world knows it. Its key is its place in the list, plus 1.
#[derive(Debug)]
struct Export {
    session: SessionId,
    handle: HandleId,
    uuid: Uuid,
    size: u64,
    access: Access,
    copy: bool,
    observable: bool,
    pool: Option<usize>,
    grants: BTreeMap<PeerId, Grant>,
    leases: BTreeMap<LeaseId, (ClientId, Access)>,
    revoked: BTreeSet<LeaseId>,
    /// RELEASE was answered RELEASING.
    asked: bool,
    /// RELEASED holds; `owed` until the event told it.
    released: bool,
    owed: bool,
    /// Its session ended.
    over: bool,
    /// Somebody holds a descriptor: the truth.
    descriptor: bool,
    /// Somebody may hold one: what the daemon has to believe.
    suspect: bool,
    generation: u64,
    told_generation: u64,
    told_busy: bool,
    offered: bool,
    bits: Vec<(Holder, Access)>,
    queue: Vec<Waiter>,
    /// Granted with these bits, and not answered before they copied.
    copying: Vec<(Holder, Access)>,
    /// With their bits in front of fences, and whether those were looked at.
    fenced: Vec<(Waiter, bool)>,
    /// The host had the dma-buf.
    fences: bool,
    acquire: (u64, Status),
    release: Vec<(Holder, (u64, Status))>,
    /// Who waits for which point, and what it was signalled with by one of several.
    points: Vec<(Waiter, Line, u64, Status)>,
}

/// A VM's use of a buffer, as the VM knows it.
#[derive(Debug)]
struct Attached {
    session: SessionId,
    handle: HandleId,
    id: AttachmentId,
    /// The buffer.
    of: usize,
    access: Access,
    revoked: bool,
    told_revoked: bool,
    told_generation: u64,
    mappings: BTreeMap<MappingId, (u64, u64, Access)>,
}

impl Attached {
    fn holder(&self) -> Holder {
        Holder::Attachment(self.id)
    }

    /// Mappings that SYNC of this range copies to or from.
    fn touched(&self, sync: &SyncRequest, size: u64, way: Access) -> usize {
        let end = if sync.len == 0 { size } else { sync.offset + sync.len };
        let touches = |(at, len, access): &&(u64, u64, Access)| {
            access.contains(way) && sync.offset.max(*at) < end.min(at + len)
        };
        self.mappings.values().filter(touches).count()
    }
}

/// What the operator lets one VM do with buffers of another.
fn allowed(from: PeerId, to: PeerId) -> Allowed {
    match (from, to) {
        (_, PeerId::HOST) if from == SHY => Allowed::ReadOnly,
        (_, PeerId::HOST) => Allowed::Yes,
        (_, IMPORTER) if from == SHY => Allowed::ReadOnly,
        (_, IMPORTER) if from == VMS[0] => Allowed::Yes,
        _ => Allowed::No,
    }
}

impl Export {
    fn open(&self) -> bool {
        !self.released && !self.over
    }

    fn live(&self) -> bool {
        self.open() && !self.asked
    }

    fn host_access(&self) -> Access {
        self.access_of(PeerId::HOST)
    }

    fn access_of(&self, peer: PeerId) -> Access {
        let allowed = allowed(self.session.peer, peer);
        if !self.live() || allowed == Allowed::No {
            return Access::NONE;
        }
        let grant = self.grants.get(&peer).or(self.grants.get(&PeerId::ANY));
        let granted = grant.map_or(Access::NONE, |grant| grant.access);
        if allowed == Allowed::ReadOnly { granted.intersect(Access::READ) } else { granted }
    }

    fn use_up(&mut self, peer: PeerId) {
        let used = if self.grants.contains_key(&peer) { peer } else { PeerId::ANY };
        if self.grants.get(&used).is_some_and(|grant| grant.once) {
            self.grants.remove(&used);
        }
    }

    fn set(&self, holder: Holder) -> Access {
        self.bits.iter().find(|(who, _)| *who == holder).map_or(Access::NONE, |(_, bits)| *bits)
    }

    fn held(&self, holder: Holder) -> Access {
        let fenced = self.fenced.iter().map(|(waiter, _)| (waiter.holder, waiter.want));
        let all = self.bits.iter().chain(&self.copying).copied().chain(fenced);
        let own = all.filter(|(who, _)| *who == holder);
        own.fold(Access::NONE, |bits, (_, more)| bits.union(more))
    }

    fn released_by(&self, holder: Holder) -> (u64, Status) {
        let own = self.release.iter().find(|(who, _)| *who == holder);
        own.map_or((0, Status::Ok), |(_, line)| *line)
    }

    fn holders(&self) -> Vec<Holder> {
        let set = self.bits.iter().chain(&self.copying).map(|(who, _)| *who);
        let mut all: Vec<_> = set.chain(self.fenced.iter().map(|(w, _)| w.holder)).collect();
        all.sort_by_key(|who| format!("{who:?}"));
        all.dedup();
        all
    }

    fn free(&self, holder: Holder, want: Access) -> bool {
        let others = self.holders().into_iter().filter(|who| *who != holder);
        let mut bits = others.map(|who| self.held(who));
        bits.all(|bits| !bits.write && (!want.write || !bits.read))
    }

    fn change(&mut self, holder: Holder, change: impl Fn(Access) -> Access) {
        let bits = change(self.set(holder));
        self.bits.retain(|(who, _)| *who != holder);
        if !bits.is_none() {
            self.bits.push((holder, bits));
        }
    }

    /// A BEGIN is given its bits. Returns whether it keeps them: no fence is in its way.
    fn give(&mut self, waiter: Waiter) -> bool {
        let fences = self.fences && matches!(waiter.origin, Origin::Vm(..));
        if fences {
            self.fenced.push((waiter, false));
        } else {
            self.grant(waiter);
        }
        !fences
    }

    /// A BEGIN of an importer that reads has its bits for good only when it has copied.
    fn grant(&mut self, Waiter { holder, want, .. }: Waiter) {
        if want.read && matches!(holder, Holder::Attachment(_)) {
            self.copying.push((holder, want));
        } else {
            self.change(holder, |bits| bits.union(want));
        }
    }

    /// A BEGIN has copied, or failed to. Whoever left meanwhile has no bits that it could keep.
    fn copied(&mut self, holder: Holder, want: Access, ok: bool) -> Vec<Done> {
        let place = self.copying.iter().position(|one| *one == (holder, want));
        if place.map(|place| self.copying.remove(place)).is_some() && ok {
            self.change(holder, |bits| bits.union(want));
        }
        if ok { Vec::new() } else { self.serve() }
    }

    /// Serves the queue from its head. A WRITE that has to wait holds back who holds nothing.
    fn serve(&mut self) -> Vec<(Origin, Status)> {
        let mut served = Vec::new();
        let mut writer = false;
        for waiter in std::mem::take(&mut self.queue) {
            let held = self.held(waiter.holder);
            if self.free(waiter.holder, waiter.want) && !(writer && held.is_none()) {
                if self.give(waiter) {
                    served.push((waiter.origin, Status::Ok));
                }
            } else {
                writer |= waiter.want.write;
                self.queue.push(waiter);
            }
        }
        served
    }

    /// Ends waits, clears the bits of who leaves, serves the others.
    fn leave(
        &mut self,
        wait: impl Fn(&Waiter) -> Option<Status>,
        leaves: impl Fn(Holder) -> bool,
    ) -> Vec<(Origin, Status)> {
        self.leave_after(|waiter, _| wait(waiter), leaves)
    }

    /// As [`leave`](Self::leave), knowing whose time runs.
    fn leave_after(
        &mut self,
        wait: impl Fn(&Waiter, bool) -> Option<Status>,
        leaves: impl Fn(Holder) -> bool,
    ) -> Vec<(Origin, Status)> {
        let mut done = Vec::new();
        let mut stays = |waiter: &Waiter, runs| {
            done.extend(wait(waiter, runs).map(|status| (waiter.origin, status)));
            wait(waiter, runs).is_none()
        };
        self.queue.retain(|waiter| stays(waiter, true));
        self.fenced.retain(|(waiter, pending)| stays(waiter, *pending));
        self.points.retain(|(waiter, ..)| stays(waiter, true));
        self.release.retain(|(holder, _)| !leaves(*holder));
        self.bits.retain(|(holder, _)| !leaves(*holder));
        self.copying.retain(|(holder, _)| !leaves(*holder));
        done.extend(self.serve());
        done
    }

    /// What comes of a BEGIN that was judged.
    fn begin(&mut self, at_once: bool, waiter: Waiter) -> Result<Begun> {
        match (at_once, waiter.unless) {
            (true, _) if self.give(waiter) => return Ok(Begun::Now(self.generation)),
            (true, _) => {}
            (false, Some(status)) => return Err(status),
            (false, None) => self.queue.push(waiter),
        }
        Ok(Begun::Waits)
    }

    fn revoke(&mut self) {
        self.revoked.extend(self.leases.keys());
    }
}

/// What a BEGIN ends with rather than wait.
fn unless(sync: &SyncRequest, full: bool) -> Option<Status> {
    let busy = full.then_some(Status::Busy);
    if sync.nonblock { Some(Status::Again) } else { busy }
}

fn leased(holder: Holder) -> bool {
    matches!(holder, Holder::Lease(_))
}

fn wants(vm: PeerId) -> Wants {
    Wants { peers: true, import: vm != SHY }
}

type Done = (Origin, Status);
type Result<T> = std::result::Result<T, Status>;

struct World {
    registry: Registry<Rc<()>>,
    memory: Rc<()>,
    /// The memory of all mappings.
    pages: Rc<()>,
    now: Duration,
    sessions: BTreeMap<PeerId, Option<SessionId>>,
    exports: Vec<Export>,
    tickets: Vec<(Ticket, SessionId, Option<usize>, Description, bool)>,
    copies: Vec<(CopyTicket, usize, Holder, Access, bool)>,
    attachments: Vec<Attached>,
    maps: Vec<(MapTicket, SessionId, MapRequest)>,
    /// BEGINs of attachments that wait, by token, and those that were granted.
    waiting: BTreeMap<u64, (SessionId, HandleId, SyncRequest)>,
    granted: Vec<(SessionId, HandleId, SyncRequest)>,
    misses: (u32, Duration),
    /// VMs that hear what importers hear, and what each was told of a buffer.
    imports: BTreeSet<PeerId>,
    offers: BTreeMap<(PeerId, usize), Access>,
    wanted: BTreeSet<BufferKey>,
    looks: Vec<(Look, usize, bool, usize)>,
    /// Fences that somebody looks at, or was told to wait for, also in vain.
    fences: Vec<(FenceWait, usize, Option<Status>, bool)>,
    events: BTreeMap<PeerId, (SessionId, Event)>,
    /// VMs that must be told RESYNC.
    missed: BTreeSet<PeerId>,
    /// Leases so far of all buffers, and the number of the last request that could wait.
    acquired: BTreeMap<usize, usize>,
    token: u32,
}

impl World {
    fn new() -> World {
        let rules = vec![
            Rule { from: Side::One(SHY), to: Side::One(PeerId::HOST), read_only: true },
            Rule { from: Side::One(VMS[0]), to: Side::One(IMPORTER), read_only: false },
            Rule { from: Side::One(SHY), to: Side::One(IMPORTER), read_only: true },
        ];
        let vms = VMS.map(|peer| (peer, peer.to_string(), QUOTA, 0));
        World {
            registry: Registry::new(Policy::new(rules), vms),
            memory: Rc::new(()),
            pages: Rc::new(()),
            now: Duration::from_secs(1),
            sessions: VMS.map(|peer| (peer, None)).into(),
            exports: Vec::new(),
            tickets: Vec::new(),
            copies: Vec::new(),
            attachments: Vec::new(),
            maps: Vec::new(),
            waiting: BTreeMap::new(),
            granted: Vec::new(),
            misses: (0, Duration::ZERO),
            imports: BTreeSet::new(),
            offers: BTreeMap::new(),
            wanted: BTreeSet::new(),
            looks: Vec::new(),
            fences: Vec::new(),
            events: BTreeMap::new(),
            missed: BTreeSet::new(),
            acquired: BTreeMap::new(),
            token: 0,
        }
    }

    /// All sessions are open, and the host and the importer use some buffers of the first VM.
    fn busy() -> World {
        let mut world = World::new();
        for vm in VMS {
            world.step(Op::Open { vm, connected: true });
        }
        for vm in VMS {
            world.step(Op::TakeEvent { vm });
        }
        for copy in [false, true, false] {
            let (vm, access) = (VMS[0], Access::ALL);
            world.step(Op::Export { vm, pages: 1, access, copy, pool: None, at: 0 });
            world.step(Op::Made { ticket: 0, ok: true });
            let (to, once, force) = (PeerId::HOST, false, false);
            world.step(Op::Grant { export: 0, to, access, once, force, ms: 0 });
            for client in CLIENTS.into_iter().cycle().take(4) {
                world.step(Op::Acquire { client, export: 0, access, zero_copy: false });
            }
            let (vm, to) = (IMPORTER, IMPORTER);
            world.step(Op::Grant { export: 0, to, access, once, force, ms: 0 });
            world.step(Op::Attach { vm, export: 0, access, zero_copy: false });
            if copy {
                world.step(Op::Map { pick: 1, offset: 0, pages: 1, access });
                world.step(Op::Mapped { map: 0, ok: true });
            }
            for _ in 0..2 {
                world.step(Op::TakeEvent { vm });
                world.step(Op::Told { vm });
            }
        }
        world
    }

    // What follows from what the world knows.

    fn parts(&self, of: usize) -> bool {
        let part = |pool: Option<usize>| pool == Some(of);
        let lives = |index: &usize| {
            let export = &self.exports[*index];
            part(export.pool) && !export.released && (!export.over || self.on_loan(*index))
        };
        (0..self.exports.len()).any(|index| lives(&index))
            || self.tickets.iter().any(|(_, _, pool, ..)| part(*pool))
    }

    fn copying(&self, export: usize) -> bool {
        self.copies.iter().any(|(_, of, ..)| *of == export)
    }

    fn use_count(&self, index: usize) -> u32 {
        let export = &self.exports[index];
        let unknown = export.suspect && export.leases.is_empty();
        let known = export.leases.len() + self.attached(index).count();
        u32::try_from(known).unwrap() + u32::from(unknown || self.parts(index))
    }

    /// The exporter's pages are in use.
    fn on_loan(&self, index: usize) -> bool {
        let export = &self.exports[index];
        let shared = !export.copy && (export.suspect || !export.leases.is_empty());
        shared || self.copying(index) || self.parts(index)
    }

    /// Living attachments of a buffer.
    fn attached(&self, index: usize) -> impl Iterator<Item = &Attached> {
        self.attachments.iter().filter(move |held| held.of == index && !held.revoked)
    }

    fn has_content(&self, index: usize) -> bool {
        let export = &self.exports[index];
        export.live() || (export.copy && self.has_memory(index))
    }

    /// What a VM has to be told of a buffer that it may attach, or could.
    fn offer_news(&self, vm: PeerId, index: usize) -> Option<(EventKind, Access)> {
        let (export, told) = (&self.exports[index], self.offers.get(&(vm, index)));
        let now = export.access_of(vm);
        let kept = export.live() && self.attached(index).any(|held| held.session.peer == vm);
        match (now.is_none(), told) {
            (false, told) if told != Some(&now) => Some((EventKind::Offered, now)),
            (true, Some(_)) if !kept => Some((EventKind::Withdrawn, now)),
            _ => None,
        }
    }

    fn attachment_news(&self, held: &Attached) -> Option<EventKind> {
        let changed = held.told_generation != self.exports[held.of].generation;
        match held.revoked {
            true => (!held.told_revoked).then_some(EventKind::Revoked),
            false => changed.then_some(EventKind::Changed),
        }
    }

    fn revoke_attachments(
        &mut self,
        index: usize,
        of: impl Fn(PeerId) -> bool,
        done: &mut Vec<Done>,
    ) {
        let generation = self.exports[index].generation;
        let mut dead = Vec::new();
        let alive = |held: &&mut Attached| held.of == index && !held.revoked;
        for held in self.attachments.iter_mut().filter(alive).filter(|h| of(h.session.peer)) {
            (held.revoked, held.told_generation) = (true, generation);
            dead.push(held.holder());
        }
        let ends = |w: &Waiter| dead.contains(&w.holder).then_some(Status::Revoked);
        done.extend(self.exports[index].leave(ends, |holder| dead.contains(&holder)));
    }

    fn drop_attachment(&mut self, at: usize, done: &mut Vec<Done>) {
        let gone = self.attachments.remove(at);
        let ends = |w: &Waiter| (w.holder == gone.holder()).then_some(Status::Canceled);
        done.extend(self.exports[gone.of].leave(ends, |holder| holder == gone.holder()));
    }

    fn has_memory(&self, index: usize) -> bool {
        let export = &self.exports[index];
        let attached = export.copy && self.attached(index).next().is_some();
        let held = attached || !export.leases.is_empty();
        export.open() || held || export.suspect || self.copying(index)
    }

    fn exists(&self, index: usize) -> bool {
        self.has_memory(index) || self.exports[index].owed
    }

    fn has_event(&self, index: usize) -> bool {
        let export = &self.exports[index];
        let heard = self.imports.contains(&export.session.peer) && export.open();
        let changed = heard && export.told_generation != export.generation;
        export.owed || changed || self.busy_changed(index)
    }

    fn busy_changed(&self, index: usize) -> bool {
        let export = &self.exports[index];
        export.live() && export.told_busy != (self.use_count(index) > 0)
    }

    /// Tells RELEASED of all that were asked for and are not on loan any more.
    fn settle(&mut self, done: &mut Vec<Done>) {
        while let Some(index) = (0..self.exports.len()).find(|index| {
            let export = &self.exports[*index];
            export.open() && export.asked && !self.on_loan(*index)
        }) {
            let export = &mut self.exports[index];
            assert!(export.copy || !export.descriptor, "RELEASED while somebody holds the pages");
            (export.released, export.owed) = (true, true);
            done.extend(export.leave(|_| None, |holder| holder == Holder::Exporter));
        }
        for index in 0..self.exports.len() {
            if !self.has_memory(index) {
                self.revoke_attachments(index, |_| true, done);
            }
            for (waiter, line, point, status) in std::mem::take(&mut self.exports[index].points) {
                match self.answer(index, waiter.holder, line, point) {
                    None => self.exports[index].points.push((waiter, line, point, status)),
                    Some(Status::Ok) => done.push((waiter.origin, status)),
                    Some(status) => done.push((waiter.origin, status)),
                }
            }
        }
    }

    /// Where the timelines stand that somebody waits for: one, or those of all holders.
    fn lines(&self, index: usize, holder: Holder, line: Line) -> Vec<(u64, Status)> {
        let export = &self.exports[index];
        match (line, holder) {
            (Line::Acquire, _) => vec![export.acquire],
            (Line::Release, Holder::Exporter) => {
                let leases = export.leases.keys().filter(|lease| !export.revoked.contains(lease));
                let leases = leases.map(|lease| Holder::Lease(*lease));
                let all = self.attached(index).map(Attached::holder).chain(leases);
                all.map(|holder| export.released_by(holder)).collect()
            }
            (Line::Release, _) => vec![export.released_by(holder)],
        }
    }

    fn answer(&self, index: usize, holder: Holder, line: Line, point: u64) -> Option<Status> {
        let lines = self.lines(index, holder, line);
        if lines.iter().any(|(reached, _)| *reached < point) {
            return None;
        }
        // An error is remembered as long as it is of the highest point. Of several, the first is told.
        let bad = lines.iter().find(|(at, status)| *at == point && *status != Status::Ok);
        Some(bad.map_or(Status::Ok, |(_, status)| *status))
    }

    fn point(
        &mut self,
        index: usize,
        (lease, attached): (Option<usize>, Option<usize>),
        (line, point): (Line, u64),
        signal: Option<Status>,
        ms: u64,
    ) -> Result<()> {
        let lease = lease.and_then(|pick| self.lease(index, pick));
        let attached = attached.and_then(|pick| {
            let all = self.attachments.iter().filter(|held| held.of == index);
            let all: Vec<_> = all.collect();
            Some((all[pick.checked_rem(all.len())?]).handle)
                .zip(Some(all[pick % all.len()].session))
        });
        self.token += 1;
        let (token, cookie) = (u64::from(self.token), Cookie(self.token));
        let export = &self.exports[index];
        let find = |handle, session| {
            let is_it = |held: &&Attached| (held.handle, held.session) == (handle, session);
            self.attachments.iter().find(is_it).unwrap()
        };
        let (holder, access, alive, vm) = match (lease, attached) {
            (Some((lease, _)), _) => {
                let dead = export.revoked.contains(&lease).then_some(Status::Revoked);
                (Holder::Lease(lease), export.leases[&lease].1, dead.map_or(Ok(()), Err), None)
            }
            (_, Some((handle, session))) => {
                let held = find(handle, session);
                let dead = held.revoked.then_some(Status::Revoked);
                let vm = Some((session, handle));
                (held.holder(), held.access, dead.map_or(Ok(()), Err), vm)
            }
            _ => {
                let vm = Some((export.session, export.handle));
                (Holder::Exporter, Access::ALL, self.handle(index).map(|_| ()), vm)
            }
        };
        if let Some(status) = signal {
            let own = match line {
                Line::Acquire => export.acquire.0,
                Line::Release => export.released_by(holder).0,
            };
            let expected = match (line, holder) {
                _ if alive.is_err() => alive,
                (Line::Acquire, _) if !access.write => Err(Status::Access),
                (Line::Release, Holder::Exporter) => Err(Status::Inval),
                _ if point <= own => Err(Status::Inval),
                _ => Ok(()),
            };
            let signal = Signal { line, point, status };
            let result = match (lease, vm) {
                (Some((lease, client)), _) => self.registry.signal_lease(client, lease, signal),
                (_, vm) => {
                    let (session, handle) = vm.unwrap();
                    self.registry.signal_handle(session, handle, signal)
                }
            };
            assert_eq!(result, expected.map(|()| point));
            result?;
            let export = &mut self.exports[index];
            match line {
                Line::Acquire => export.acquire = (point, status),
                Line::Release => {
                    export.release.retain(|(who, _)| *who != holder);
                    export.release.push((holder, (point, status)));
                    let all = |who| who == Holder::Exporter || who == holder;
                    let hears = |one: &&mut (Waiter, Line, u64, Status)| {
                        (one.1, one.2, one.3) == (line, point, Status::Ok) && all(one.0.holder)
                    };
                    export.points.iter_mut().filter(hears).for_each(|one| one.3 = status);
                }
            }
            return Ok(());
        }
        let waits = self.waits(vm.map_or(PeerId(0), |(session, _)| session.peer));
        let full = vm.is_some() && waits >= QUOTA.max_waits;
        let released = holder == Holder::Exporter && self.exports[index].asked;
        let lines = self.lines(index, holder, line);
        let lowest = lines.iter().map(|(reached, _)| *reached).min().unwrap_or(u64::MAX);
        let expected = match self.answer(index, holder, line, point) {
            _ if alive.is_err() => alive.map(|()| Begun::Waits),
            _ if released => Err(Status::Canceled),
            Some(Status::Ok) => Ok(Begun::Now(lowest)),
            Some(status) => Err(status),
            None if full => Err(Status::Busy),
            None => Ok(Begun::Waits),
        };
        let timeout = Duration::from_millis(ms);
        let wait = PointWait { line, point, timeout, cookie };
        let (result, origin) = match (lease, vm) {
            (Some((lease, client)), _) => {
                let result = self.registry.wait_lease(client, lease, wait, false, self.now);
                (result, Origin::Client(client, cookie))
            }
            (_, vm) => {
                let (session, handle) = vm.unwrap();
                let call = (token, 100);
                let result = self.registry.wait_handle(session, handle, wait, call, self.now);
                (result, Origin::Vm(session.peer, token))
            }
        };
        assert_eq!(result, expected);
        if result? == Begun::Waits {
            let (deadline, want, unless) = (self.now + timeout, Access::NONE, None);
            let waiter = Waiter { holder, want, deadline, unless, cookie, origin };
            self.exports[index].points.push((waiter, line, point, Status::Ok));
        }
        Ok(())
    }

    /// What a request of its exporter on its handle meets first.
    fn handle(&self, index: usize) -> Result<&Export> {
        let export = &self.exports[index];
        match (export.over, export.released) {
            (true, _) => Err(Status::Revoked),
            (_, true) => Err(Status::NoEnt),
            _ => Ok(export),
        }
    }

    fn lease(&self, index: usize, pick: usize) -> Option<(LeaseId, ClientId)> {
        let leases = &self.exports[index].leases;
        let at = pick.checked_rem(leases.len())?;
        leases.iter().nth(at).map(|(lease, (client, _))| (*lease, *client))
    }

    fn pick(&self, pick: usize) -> Option<usize> {
        // The newest are the most interesting.
        let back = pick.checked_rem(self.exports.len().min(4))?;
        Some(self.exports.len() - 1 - back)
    }

    /// Lets one thing happen to both, and compares all that can be seen of it.
    fn step(&mut self, op: Op) {
        let before = self.registry.clone();
        let mut done = Vec::new();
        let opens = matches!(op, Op::Open { .. } | Op::Told { .. });
        let refused = self.apply(op, &mut done).is_some_and(|result| result.is_err());
        self.settle(&mut done);
        if refused {
            assert!(same(&before, &self.registry), "a refused operation changed something");
        }
        self.compare(before, done, opens);
    }

    fn apply(&mut self, op: Op, done: &mut Vec<Done>) -> Option<Result<()>> {
        match op {
            Op::Open { vm, connected } => {
                if self.sessions[&vm].is_none() {
                    let session = self.registry.open_session(vm, connected);
                    self.sessions.insert(vm, session);
                }
                None
            }
            Op::Close { vm } => {
                self.close(vm, done);
                None
            }
            Op::Export { vm, pages, access, copy, pool, at } => {
                let session = self.sessions[&vm]?;
                let pool = pool.and_then(|pick| self.pick(pick));
                let what = Description {
                    size: pages * PAGE,
                    access,
                    name: [0; NAME_LEN],
                    metadata_type: 0,
                    metadata: Box::default(),
                };
                let expected = self.judge_export(session, &what, pool, at);
                let part = pool.map(|pool| Part { pool: self.exports[pool].uuid, offset: at });
                let result = self.registry.begin_export(session, what.clone(), part, false);
                let result = result.map(|(ticket, memory)| {
                    assert_eq!(memory.is_some(), pool.is_some());
                    self.tickets.push((ticket, session, pool, what, copy));
                });
                assert_eq!(result, expected);
                Some(result)
            }
            Op::Made { ticket, ok } => {
                let at = ticket.checked_rem(self.tickets.len())?;
                self.made(at, ok);
                None
            }
            Op::Grant { export, to, access, once, force, ms } => {
                let index = self.pick(export)?;
                let lifetime = Duration::from_millis(ms);
                let handle = self.exports[index].handle;
                let request = GrantRequest { handle, to, access, once, force, lifetime };
                let expected = self.judge_grant(index, request);
                let session = self.exports[index].session;
                let result = self.registry.grant(session, request, self.now);
                assert_eq!(result, expected);
                if result.is_ok() {
                    self.granted(index, request, done);
                }
                Some(result)
            }
            Op::Release { export, force } => {
                let index = self.pick(export)?;
                Some(self.release(index, force, done))
            }
            Op::SetName { export } => {
                let index = self.pick(export)?;
                let Export { session, handle, .. } = self.exports[index];
                let result = self.registry.set_name(session, handle, [b'n'; NAME_LEN]);
                assert_eq!(result, self.handle(index).map(|_| ()));
                Some(result)
            }
            Op::Acquire { client, export, access, zero_copy } => {
                let index = self.pick(export)?;
                Some(self.acquire(client, index, access, zero_copy))
            }
            Op::EndLease { client, lease } => {
                let all = || self.exports.iter().enumerate();
                let leases: Vec<_> = all()
                    .flat_map(|(index, export)| export.leases.keys().map(move |id| (index, *id)))
                    .collect();
                let (index, lease) = *leases.get(lease.checked_rem(leases.len())?)?;
                let result = self.registry.end_lease(client, lease);
                let mine = self.exports[index].leases[&lease].0 == client;
                assert_eq!(result, if mine { Ok(()) } else { Err(Status::NoEnt) });
                if mine {
                    self.drop_leases(index, |id, _| id == lease, done);
                }
                Some(result)
            }
            Op::ClientGone { client } => {
                self.registry.client_gone(client);
                for index in 0..self.exports.len() {
                    self.drop_leases(index, |_, of| of == client, done);
                }
                None
            }
            Op::Descriptor { export, sent } => {
                let index = self.pick(export)?;
                let export = &mut self.exports[index];
                if sent && export.observable && !export.leases.is_empty() {
                    export.descriptor = true;
                } else if !sent {
                    export.descriptor = false;
                }
                None
            }
            Op::Begin { export, lease, sync, full } => {
                let index = self.pick(export)?;
                self.begin(index, lease, sync, full)
            }
            Op::End { export, lease, sync } => {
                let index = self.pick(export)?;
                self.end(index, lease, sync, done)
            }
            Op::Copied { copy, ok } => {
                let at = copy.checked_rem(self.copies.len())?;
                self.copied(at, ok, done);
                None
            }
            Op::CancelVm { export, all } => {
                let index = self.pick(export)?;
                let export = &self.exports[index];
                let mine = |waiter: &&Waiter| waiter.holder == Holder::Exporter;
                let fenced = export.fenced.iter().map(|(waiter, _)| waiter);
                let points = export.points.iter().map(|(waiter, ..)| waiter);
                let mut pending = export.queue.iter().chain(fenced).chain(points);
                let cookie = pending.find(mine).map(|one| one.cookie);
                let named = if all { Cookie(0) } else { cookie.unwrap_or(Cookie(u32::MAX)) };
                let result = self.registry.cancel_handle(export.session, export.handle, named);
                let expected = self.handle(index).and(cookie.ok_or(Status::NoEnt)).map(|_| ());
                assert_eq!(result, expected);
                let hit = |w: &Waiter| {
                    let named = all || Some(w.cookie) == cookie;
                    let mine = w.holder == Holder::Exporter;
                    (result.is_ok() && named && mine).then_some(Status::Canceled)
                };
                done.extend(self.exports[index].leave(hit, |_| false));
                Some(result)
            }
            Op::CancelClient { export, wait } => {
                let index = self.pick(export)?;
                let queue = &self.exports[index].queue;
                let at = wait.checked_rem(queue.len())?;
                let waiter = queue[at];
                let Origin::Client(client, cookie) = waiter.origin else { return None };
                let other = CLIENTS.into_iter().find(|other| *other != client).unwrap();
                assert_eq!(self.registry.cancel_client(other, cookie), Err(Status::NoEnt));
                let result = self.registry.cancel_client(client, cookie);
                assert_eq!(result, Ok(()));
                let hit = |w: &Waiter| (*w == waiter).then_some(Status::Canceled);
                done.extend(self.exports[index].leave(hit, |_| false));
                Some(result)
            }
            Op::Attach { vm, export, access, zero_copy } => {
                let index = self.pick(export)?;
                self.attach(vm, index, access, zero_copy)
            }
            Op::Detach { pick } => {
                let at = pick.checked_rem(self.attachments.len())?;
                let held = &self.attachments[at];
                let busy = !held.revoked && !held.mappings.is_empty();
                let result = self.registry.detach(held.session, held.handle);
                assert_eq!(result, if busy { Err(Status::Busy) } else { Ok(()) });
                if !busy {
                    self.drop_attachment(at, done);
                }
                Some(result)
            }
            Op::Map { pick, offset, pages, access } => {
                let at = pick.checked_rem(self.attachments.len())?;
                let held = &self.attachments[at];
                let request = MapRequest { handle: held.handle, offset, len: pages * PAGE, access };
                let size = self.exports[held.of].size;
                let expected = match () {
                    () if held.revoked => Err(Status::Revoked),
                    () if !held.access.contains(access) => Err(Status::Access),
                    () if offset + request.len > size => Err(Status::Range),
                    () => Ok(()),
                };
                let session = held.session;
                let result = self.registry.begin_map(session, request, false);
                let result = result.map(|ticket| self.maps.push((ticket, session, request)));
                assert_eq!(result, expected);
                Some(result)
            }
            Op::Mapped { map, ok } => {
                let at = map.checked_rem(self.maps.len())?;
                self.mapped(at, ok);
                None
            }
            Op::Unmap { pick } => {
                let all = self.attachments.iter().enumerate();
                let all: Vec<_> = all
                    .flat_map(|(at, held)| held.mappings.keys().map(move |id| (at, *id)))
                    .collect();
                let (at, id) = all[pick.checked_rem(all.len())?];
                let held = &mut self.attachments[at];
                held.mappings.remove(&id);
                assert_eq!(self.registry.unmap(held.session, id, 0), Ok(true));
                assert_eq!(self.registry.unmap(held.session, id, 0), Err(Status::NoEnt));
                None
            }
            Op::BeginAttached { pick, sync } => {
                let at = pick.checked_rem(self.attachments.len())?;
                Some(self.begin_attached(at, sync))
            }
            Op::Fill { pick } => {
                let at = pick.checked_rem(self.granted.len())?;
                self.fill(at, done);
                None
            }
            Op::EndAttached { pick, sync } => {
                let at = pick.checked_rem(self.attachments.len())?;
                Some(self.end_attached(at, sync, done))
            }
            Op::CancelAttached { pick } => {
                let at = pick.checked_rem(self.attachments.len())?;
                let held = &self.attachments[at];
                let result = self.registry.cancel_handle(held.session, held.handle, Cookie(0));
                let export = &self.exports[held.of];
                let fenced = export.fenced.iter().map(|(waiter, _)| waiter);
                let points = export.points.iter().map(|(waiter, ..)| waiter);
                let mut all = export.queue.iter().chain(fenced).chain(points);
                let waits = all.any(|w| w.holder == held.holder());
                let expected = match (held.revoked, waits) {
                    (true, _) => Err(Status::Revoked),
                    (_, false) => Err(Status::NoEnt),
                    _ => Ok(()),
                };
                assert_eq!(result, expected);
                let hit = |w: &Waiter| (w.holder == held.holder()).then_some(Status::Canceled);
                done.extend(self.exports[held.of].leave(hit, |_| false));
                Some(result)
            }
            Op::Point { export, lease, attached, line, point, signal, ms } => {
                let index = self.pick(export)?;
                Some(self.point(index, (lease, attached), (line, point), signal, ms))
            }
            Op::Fence { pick, found } => {
                let at = pick.checked_rem(self.fences.len())?;
                self.fence(at, found, done);
                None
            }
            Op::Look { pick } => {
                let at = pick.checked_rem(self.wanted.len())?;
                let key = *self.wanted.iter().nth(at).unwrap();
                self.wanted.remove(&key);
                let index = usize::try_from(key.0).unwrap() - 1;
                let found = self.registry.look(key);
                let export = &self.exports[index];
                assert_eq!(found.is_some(), export.suspect && export.leases.is_empty());
                let (look, _) = found?;
                let acquired = self.acquired.get(&index).copied().unwrap_or(0);
                self.looks.push((look, index, self.exports[index].descriptor, acquired));
                None
            }
            Op::Seen { look } => {
                let at = look.checked_rem(self.looks.len())?;
                let (look, index, held, acquired) = self.looks.remove(at);
                self.registry.observed(look, held, self.now);
                let export = &mut self.exports[index];
                if self.acquired.get(&index).is_none_or(|now| *now == acquired) {
                    export.suspect &= held;
                }
                None
            }
            Op::TakeEvent { vm } => {
                self.take_event(vm);
                None
            }
            Op::Told { vm } => {
                self.told(vm);
                None
            }
            Op::Resync { vm } => {
                self.registry.resync(vm);
                self.missed.extend(self.sessions[&vm].map(|_| vm));
                None
            }
            Op::Time { ms } => {
                self.now += Duration::from_millis(ms);
                let now = self.now;
                self.registry.tick(now);
                for export in &mut self.exports {
                    let due =
                        |w: &Waiter, runs| (runs && w.deadline <= now).then_some(Status::TimedOut);
                    done.extend(export.leave_after(due, |_| false));
                    export.grants.retain(|_, grant| grant.expires.is_none_or(|end| end > now));
                }
                None
            }
        }
    }

    fn close(&mut self, vm: PeerId, done: &mut Vec<Done>) {
        let Some(session) = self.sessions.insert(vm, None).flatten() else { return };
        self.registry.close_session(session);
        self.missed.remove(&vm);
        self.imports.remove(&vm);
        self.offers.retain(|(peer, _), _| *peer != vm);
        while let Some(at) = self.attachments.iter().position(|held| held.session == session) {
            self.drop_attachment(at, done);
        }
        for export in self.exports.iter_mut().filter(|export| export.session == session) {
            (export.over, export.owed) = (true, false);
            let ends = |w: &Waiter| match w.holder {
                Holder::Exporter => Some(Status::Canceled),
                _ => Some(Status::Revoked),
            };
            done.extend(export.leave(ends, |_| true));
            export.revoke();
        }
        let over = |index: &usize| self.exports[*index].session == session;
        for index in (0..self.exports.len()).filter(over).collect::<Vec<_>>() {
            self.revoke_attachments(index, |_| true, done);
        }
    }

    fn judge_export(
        &self,
        session: SessionId,
        what: &Description,
        pool: Option<usize>,
        at: u64,
    ) -> Result<()> {
        if let Some(pool) = pool {
            let parent =
                self.handle(pool).ok().filter(|pool| pool.session == session && !pool.asked);
            let parent = parent.ok_or(Status::NoEnt)?;
            if !parent.access.contains(what.access) {
                return Err(Status::Access);
            }
            if at + what.size > parent.size {
                return Err(Status::Range);
            }
        }
        let (exports, bytes) = self.charged(session.peer);
        let fits = exports < QUOTA.max_exports && bytes + what.size <= QUOTA.max_total_size;
        if fits { Ok(()) } else { Err(Status::Quota) }
    }

    fn charged(&self, vm: PeerId) -> (u32, u64) {
        let exports = (0..self.exports.len())
            .filter(|index| self.exports[*index].session.peer == vm && self.exists(*index))
            .map(|index| self.exports[index].size);
        let tickets = self.tickets.iter().filter(|(_, session, ..)| session.peer == vm);
        let sizes = exports.chain(tickets.map(|(_, _, _, what, _)| what.size));
        sizes.fold((0, 0), |(count, bytes), size| (count + 1, bytes + size))
    }

    fn made(&mut self, at: usize, ok: bool) {
        let (ticket, session, pool, what, copy) = self.tickets.remove(at);
        let uuid = Uuid::from_u128(self.exports.len() as u128 + 1);
        let observable = !copy || uuid.as_u128().is_multiple_of(2);
        let mode = if copy { Mode::Copy } else { Mode::ZeroCopy };
        let since = self.now;
        let shows = true;
        let made = Exported { backing: self.memory.clone(), mode, uuid, observable, shows, since };
        let (size, access) = (what.size, what.access);
        let result =
            self.registry.finish_export(ticket, if ok { Ok(made) } else { Err(Status::NoMem) });
        let alive = self.sessions[&session.peer] == Some(session);
        let Ok((handle, ..)) = result else {
            let status = if ok { Status::Revoked } else { Status::NoMem };
            assert_eq!((result, ok && alive), (Err(status), false));
            return;
        };
        assert!(ok && alive);
        let twin = |other: &Export| other.session == session && other.handle == handle;
        assert!(!self.exports.iter().any(twin), "a handle was reused");
        self.exports.push(Export {
            session,
            handle,
            uuid,
            size,
            access,
            copy,
            observable,
            pool,
            grants: BTreeMap::new(),
            leases: BTreeMap::new(),
            revoked: BTreeSet::new(),
            asked: false,
            released: false,
            owed: false,
            over: false,
            descriptor: false,
            suspect: false,
            generation: 0,
            told_generation: 0,
            told_busy: false,
            offered: false,
            bits: Vec::new(),
            queue: Vec::new(),
            copying: Vec::new(),
            fenced: Vec::new(),
            fences: false,
            acquire: (0, Status::Ok),
            release: Vec::new(),
            points: Vec::new(),
        });
    }

    fn judge_grant(&self, index: usize, request: GrantRequest) -> Result<()> {
        let export = self.handle(index)?;
        let vm = export.session.peer;
        let allowed =
            if request.to == PeerId::ANY { Allowed::Yes } else { allowed(vm, request.to) };
        if allowed == Allowed::No {
            return Err(Status::NoEnt);
        }
        if export.asked {
            return Err(Status::Revoked);
        }
        let too_much = allowed == Allowed::ReadOnly && request.access.write;
        if too_much || !export.access.contains(request.access) {
            return Err(Status::Access);
        }
        Ok(())
    }

    fn granted(&mut self, index: usize, request: GrantRequest, done: &mut Vec<Done>) {
        let GrantRequest { to, access, once, force, lifetime, .. } = request;
        let export = &mut self.exports[index];
        export.grants.remove(&to);
        let expires = (!lifetime.is_zero()).then(|| self.now + lifetime);
        if !access.is_none() {
            export.grants.insert(to, Grant { access, once, expires });
        } else if force {
            let own: Vec<PeerId> = export.grants.keys().copied().collect();
            let meant = |peer| to == peer || (to == PeerId::ANY && !own.contains(&peer));
            if meant(PeerId::HOST) {
                export.revoke();
                let ends = |w: &Waiter| leased(w.holder).then_some(Status::Revoked);
                done.extend(export.leave(ends, leased));
            }
            self.revoke_attachments(index, meant, done);
        }
    }

    fn release(&mut self, index: usize, force: bool, done: &mut Vec<Done>) -> Result<()> {
        let Export { session, handle, .. } = self.exports[index];
        let result = self.registry.release(session, handle, force);
        assert_eq!(result.err(), self.handle(index).err());
        let answer = result?;
        let busy = self.on_loan(index);
        let export = &mut self.exports[index];
        export.grants.clear();
        let ends = |w: &Waiter| match w.holder {
            Holder::Exporter => Some(Status::Canceled),
            _ => force.then_some(Status::Revoked),
        };
        let gone = |who| if who == Holder::Exporter { !busy } else { force };
        done.extend(export.leave(ends, gone));
        if force {
            export.revoke();
            self.revoke_attachments(index, |_| true, done);
        }
        let export = &mut self.exports[index];
        (export.asked, export.released) = (true, !busy);
        assert_eq!(answer.state, if busy { State::Releasing } else { State::Released });
        assert!(busy || export.copy || !export.descriptor, "RELEASED while the pages are held");
        Ok(())
    }

    fn acquire(
        &mut self,
        client: ClientId,
        index: usize,
        access: Access,
        zero_copy: bool,
    ) -> Result<()> {
        let export = &mut self.exports[index];
        let offer = export.host_access();
        let expected = if access.is_none() {
            Err(Status::Inval)
        } else if offer.is_none() {
            Err(Status::NoEnt)
        } else if !offer.contains(access) || (zero_copy && export.copy) {
            Err(Status::Access)
        } else {
            Ok(())
        };
        let result = self.registry.acquire(client, export.uuid, access, zero_copy, self.now);
        let result = result.map(|acquired| {
            export.leases.insert(acquired.lease, (client, access));
            export.suspect = export.observable;
            export.fences |= export.observable;
            *self.acquired.entry(index).or_default() += 1;
            export.use_up(PeerId::HOST);
        });
        assert_eq!(result, expected);
        result
    }

    fn drop_leases(
        &mut self,
        index: usize,
        gone: impl Fn(LeaseId, ClientId) -> bool,
        done: &mut Vec<Done>,
    ) {
        let export = &mut self.exports[index];
        let leases = export.leases.clone();
        let gone = |lease: &LeaseId| leases.get(lease).is_some_and(|(of, _)| gone(*lease, *of));
        let leaves = |who| matches!(who, Holder::Lease(lease) if gone(&lease));
        let ends = |w: &Waiter| leaves(w.holder).then_some(Status::Canceled);
        done.extend(export.leave(ends, leaves));
        export.leases.retain(|lease, _| !gone(lease));
        if export.leases.len() < leases.len() && export.leases.is_empty() && export.suspect {
            let asked = &self.registry.outbox.observe;
            assert!(asked.contains(&BufferKey(index as u64 + 1)), "nobody will look");
        }
    }

    /// What a request of a holder meets first.
    fn judge_sync(
        &self,
        index: usize,
        lease: Option<LeaseId>,
        sync: &SyncRequest,
        begin: bool,
    ) -> Result<()> {
        let export = &self.exports[index];
        let allowed = match lease {
            None => {
                self.handle(index)?;
                if begin && export.asked {
                    return Err(Status::Canceled);
                }
                Access::ALL
            }
            Some(lease) if export.revoked.contains(&lease) => return Err(Status::Revoked),
            Some(lease) => export.leases[&lease].1,
        };
        if sync.bits.is_none() {
            return Err(Status::Inval);
        }
        if !allowed.contains(sync.bits) {
            return Err(Status::Access);
        }
        let inside = sync.offset + sync.len <= export.size;
        if inside { Ok(()) } else { Err(Status::Range) }
    }

    fn begin(
        &mut self,
        index: usize,
        lease: Option<usize>,
        mut sync: SyncRequest,
        full: bool,
    ) -> Option<Result<()>> {
        let lease = lease.and_then(|pick| self.lease(index, pick));
        self.token += 1;
        sync.cookie = Cookie(self.token);
        let judged = self.judge_sync(index, lease.map(|(id, _)| id), &sync, true);
        let waits = self.waits(self.exports[index].session.peer);
        let export = &mut self.exports[index];
        let (holder, origin, full, result) = match lease {
            Some((lease, client)) => {
                let origin = Origin::Client(client, sync.cookie);
                let result = self.registry.begin_lease(client, lease, sync, full, self.now);
                (Holder::Lease(lease), origin, full, result)
            }
            None => {
                let token = u64::from(self.token);
                let Export { session, handle, .. } = *export;
                let call = (token, 100);
                let result = self.registry.begin_handle(session, handle, sync, call, self.now);
                let origin = Origin::Vm(session.peer, token);
                (Holder::Exporter, origin, waits >= QUOTA.max_waits, result)
            }
        };
        let held = export.held(holder);
        let writer = export.queue.iter().any(|waiter| waiter.want.write);
        let at_once = held.contains(sync.bits)
            || (export.free(holder, sync.bits) && !(writer && held.is_none()));
        let expected = judged.and_then(|()| {
            let (now, want, cookie) = (self.now + sync.timeout, sync.bits, sync.cookie);
            let unless = unless(&sync, full);
            export.begin(at_once, Waiter { holder, want, deadline: now, unless, cookie, origin })
        });
        assert_eq!(result, expected);
        Some(result.map(|_| ()))
    }

    fn waits(&self, vm: PeerId) -> u32 {
        let fenced = |export: &Export| export.fenced.iter().map(|(waiter, _)| *waiter).collect();
        let waiters = self.exports.iter().flat_map(|export| {
            let mut all: Vec<Waiter> = fenced(export);
            all.extend(&export.queue);
            all.extend(export.points.iter().map(|(waiter, ..)| waiter));
            all
        });
        let of_vm = |waiter: &Waiter| matches!(waiter.origin, Origin::Vm(peer, _) if peer == vm);
        let counted = |waiter: &Waiter| of_vm(waiter) && waiter.unless.is_none();
        u32::try_from(waiters.filter(counted).count()).unwrap()
    }

    fn end(
        &mut self,
        index: usize,
        lease: Option<usize>,
        sync: SyncRequest,
        done: &mut Vec<Done>,
    ) -> Option<Result<()>> {
        let lease = lease.and_then(|pick| self.lease(index, pick));
        let mut expected = self.judge_sync(index, lease.map(|(id, _)| id), &sync, false);
        let export = &self.exports[index];
        let copies = export.copy && sync.bits.write;
        if lease.is_some() && copies && (export.asked || !export.open()) {
            expected = expected.and(Err(Status::Revoked));
        }
        let (holder, result) = match lease {
            Some((lease, client)) => {
                (Holder::Lease(lease), self.registry.end_access(client, lease, sync))
            }
            None => {
                let Export { session, handle, .. } = *export;
                (Holder::Exporter, self.registry.end_handle(session, handle, sync))
            }
        };
        assert_eq!(result.as_ref().map(|_| ()).map_err(|status| *status), expected);
        match result {
            Ok(Ended::Now(generation)) => {
                assert!(!copies);
                self.complete(index, holder, sync.bits, done);
                assert_eq!(generation, self.exports[index].generation);
            }
            Ok(Ended::Copy(ticket, copy)) => {
                let [Move { from, to, len }] = &copy.moves[..] else { panic!("{copy:?}") };
                assert!(copies && from.offset == to.offset && from.offset + len <= export.size);
                assert_eq!((from.view == View::Pages), holder == Holder::Exporter);
                assert_ne!(from.view, to.view);
                self.copies.push((ticket, index, holder, sync.bits, false));
            }
            Err(_) => {}
        }
        Some(expected)
    }

    fn complete(&mut self, index: usize, holder: Holder, bits: Access, done: &mut Vec<Done>) {
        let export = &mut self.exports[index];
        let before = export.generation;
        export.generation += u64::from(bits.write);
        // A writer that knew what was before it knows what is now.
        let told = match holder {
            Holder::Exporter => Some(&mut export.told_generation),
            Holder::Lease(_) => None,
            Holder::Attachment(_) => {
                let own = |held: &&mut Attached| held.holder() == holder && !held.revoked;
                self.attachments.iter_mut().find(own).map(|held| &mut held.told_generation)
            }
        };
        if let Some(told) = told.filter(|told| **told == before) {
            *told = export.generation;
        }
        export.change(holder, |set| set.minus(bits));
        done.extend(export.serve());
    }

    fn copied(&mut self, at: usize, ok: bool, done: &mut Vec<Done>) {
        let (ticket, index, holder, bits, begins) = self.copies.remove(at);
        let generation = self.registry.finish_copy(ticket, ok);
        if begins {
            done.extend(self.exports[index].copied(holder, bits, ok));
        } else if ok {
            self.complete(index, holder, bits, done);
        } else {
            let export = &mut self.exports[index];
            export.change(holder, |set| set.minus(bits));
            done.extend(export.serve());
        }
        // A buffer that is gone by it has none.
        assert!([0, self.exports[index].generation].contains(&generation));
    }

    fn attach(
        &mut self,
        vm: PeerId,
        index: usize,
        access: Access,
        zero_copy: bool,
    ) -> Option<Result<()>> {
        let session = self.sessions[&vm]?;
        let export = &mut self.exports[index];
        let offer = export.access_of(vm);
        if vm == IMPORTER && self.now - self.misses.1 >= Duration::from_secs(1) {
            self.misses = (0, self.now);
        }
        let miss = offer.is_none();
        let expected = if self.misses.0 >= MAX_MISSES_PER_SECOND && vm == IMPORTER {
            Err(Status::Busy)
        } else if miss {
            Err(Status::NoEnt)
        } else if !offer.contains(access) || zero_copy {
            Err(Status::Access)
        } else {
            Ok(())
        };
        self.misses.0 += u32::from(vm == IMPORTER && expected == Err(Status::NoEnt));
        let request = AttachRequest { uuid: export.uuid, access, zero_copy, window: false };
        let result = self.registry.attach(session, request, self.now).map(|attached| {
            assert_eq!((attached.size, attached.generation), (export.size, export.generation));
            assert_eq!((attached.access, attached.exporter), (access, export.session.peer));
            export.use_up(vm);
            let handle = attached.handle;
            assert!(self.attachments.iter().all(|h| (h.session, h.handle) != (session, handle)));
            self.attachments.push(Attached {
                session,
                handle,
                id: self.registry.vms[&vm].attachments[&handle].id,
                of: index,
                access,
                revoked: false,
                told_revoked: false,
                told_generation: export.generation,
                mappings: BTreeMap::new(),
            });
        });
        assert_eq!(result, expected);
        Some(result)
    }

    fn mapped(&mut self, at: usize, ok: bool) {
        let (ticket, session, request) = self.maps.remove(at);
        let found = if ok { Ok(self.pages.clone()) } else { Err(Status::Fault) };
        let result = self.registry.finish_map(ticket, found);
        let open = self.sessions[&session.peer] == Some(session);
        let is_it = |held: &&mut Attached| (held.session, held.handle) == (session, request.handle);
        let held = self.attachments.iter_mut().find(is_it);
        let expected = match (&held, ok) {
            (_, false) => Err(Status::Fault),
            _ if !open => Err(Status::Revoked),
            (None, _) => Err(Status::NoEnt),
            (Some(held), _) if held.revoked => Err(Status::Revoked),
            _ => Ok(()),
        };
        assert_eq!(result.map(|_| ()), expected);
        if let (Ok(id), Some(held)) = (result, held) {
            let MapRequest { offset, len, access, .. } = request;
            assert_eq!(held.mappings.insert(id, (offset, len, access)), None);
        }
    }

    fn begin_attached(&mut self, at: usize, mut sync: SyncRequest) -> Result<()> {
        self.token += 1;
        sync.cookie = Cookie(self.token);
        let held = &self.attachments[at];
        let (index, holder, session, handle) = (held.of, held.holder(), held.session, held.handle);
        let full = self.waits(session.peer) >= QUOTA.max_waits;
        let export = &self.exports[index];
        let token = u64::from(self.token);
        let bits = export.held(holder);
        let writer = export.queue.iter().any(|waiter| waiter.want.write);
        let at_once = bits.contains(sync.bits)
            || (export.free(holder, sync.bits) && !(writer && bits.is_none()));
        let expected = if held.revoked || (sync.bits.read && !self.has_content(index)) {
            Err(Status::Revoked)
        } else if sync.bits.is_none() {
            Err(Status::Inval)
        } else if !held.access.contains(sync.bits) {
            Err(Status::Access)
        } else if sync.offset + sync.len > export.size {
            Err(Status::Range)
        } else {
            let (deadline, want, cookie) = (self.now + sync.timeout, sync.bits, sync.cookie);
            let (origin, unless) = (Origin::Vm(session.peer, token), unless(&sync, full));
            let waiter = Waiter { holder, want, deadline, unless, cookie, origin };
            self.exports[index].begin(at_once, waiter)
        };
        let result = self.registry.begin_handle(session, handle, sync, (token, 100), self.now);
        assert_eq!(result, expected);
        match result? {
            Begun::Now(_) => self.granted.push((session, handle, sync)),
            Begun::Waits => drop(self.waiting.insert(token, (session, handle, sync))),
        }
        Ok(())
    }

    fn fence(&mut self, at: usize, found: Found, done: &mut Vec<Done>) {
        let (wait, index, unless, looked) = self.fences[at];
        let is_it = |one: &&mut (Waiter, bool)| one.0.origin == wait.origin;
        let status = match found {
            Found::Pending if looked => return,
            Found::Pending if unless.is_none() => {
                let waits = self.registry.fence_pending(wait);
                let it = self.exports[index].fenced.iter_mut().find(is_it);
                assert_eq!(waits, it.is_some());
                it.into_iter().for_each(|one| one.1 = true);
                self.fences[at].3 = true;
                return;
            }
            Found::Pending => unless.unwrap(),
            Found::Failed if !looked => Status::NoMem,
            Found::Over | Found::Failed => Status::Ok,
        };
        self.fences.remove(at);
        self.registry.fence_over(wait, status);
        let export = &mut self.exports[index];
        let place = export.fenced.iter().position(|(one, _)| one.origin == wait.origin);
        let Some((waiter, _)) = place.map(|place| export.fenced.remove(place)) else { return };
        done.push((waiter.origin, status));
        if status == Status::Ok {
            export.grant(waiter);
        } else {
            done.extend(export.serve());
        }
    }

    fn fill(&mut self, at: usize, done: &mut Vec<Done>) {
        let (session, handle, sync) = self.granted.remove(at);
        let filled = self.registry.fill(session, handle, &sync);
        let is_it = |held: &&Attached| (held.session, held.handle) == (session, handle);
        let Some(held) = self.attachments.iter().find(is_it) else {
            let open = self.sessions[&session.peer] == Some(session);
            let status = if open { Status::NoEnt } else { Status::Revoked };
            return assert_eq!(filled.err(), Some(status));
        };
        let (index, holder) = (held.of, held.holder());
        let touched = held.touched(&sync, self.exports[index].size, Access::READ);
        match filled {
            Err(status) => {
                assert_eq!(status, Status::Revoked);
                assert!(held.revoked || !self.has_content(index));
                done.extend(self.exports[index].copied(holder, sync.bits, false));
            }
            Ok(None) => {
                assert!(!sync.bits.read || touched == 0);
                self.exports[index].copied(holder, sync.bits, true);
            }
            Ok(Some((ticket, copy))) => {
                assert!(self.has_content(index), "who read what nobody has");
                assert_eq!(copy.moves.len(), touched);
                for one in &copy.moves {
                    assert_eq!((one.from.view, one.to.view), (View::Content, View::Pages));
                    assert!(Rc::ptr_eq(&one.from.memory, &self.memory));
                    assert!(Rc::ptr_eq(&one.to.memory, &self.pages));
                    assert!(one.from.offset + one.len <= self.exports[index].size);
                }
                self.copies.push((ticket, index, holder, sync.bits, true));
            }
        }
    }

    fn end_attached(&mut self, at: usize, sync: SyncRequest, done: &mut Vec<Done>) -> Result<()> {
        let held = &self.attachments[at];
        let (index, holder) = (held.of, held.holder());
        let export = &self.exports[index];
        let expected = if held.revoked || (sync.bits.write && !export.live()) {
            Err(Status::Revoked)
        } else if sync.bits.is_none() {
            Err(Status::Inval)
        } else if !held.access.contains(sync.bits) {
            Err(Status::Access)
        } else if sync.offset + sync.len > export.size {
            Err(Status::Range)
        } else {
            Ok(())
        };
        let touched = if sync.bits.write {
            held.touched(&sync, export.size, Access::WRITE) * (1 + usize::from(export.copy))
        } else {
            0
        };
        let result = self.registry.end_handle(held.session, held.handle, sync);
        assert_eq!(result.as_ref().map(|_| ()).map_err(|status| *status), expected);
        match result? {
            Ended::Now(generation) => {
                assert_eq!(touched, 0);
                self.complete(index, holder, sync.bits, done);
                assert_eq!(generation, self.exports[index].generation);
            }
            Ended::Copy(ticket, copy) => {
                assert_eq!(copy.moves.len(), touched);
                assert!(Rc::ptr_eq(&copy.moves[0].from.memory, &self.pages));
                self.copies.push((ticket, index, holder, sync.bits, false));
            }
        }
        Ok(())
    }

    fn take_event(&mut self, vm: PeerId) {
        let Some(session) = self.sessions[&vm] else { return };
        if wants(vm).import {
            self.imports.insert(vm);
        }
        let Some(event) = self.registry.next_event(session, wants(vm)) else {
            // A part that is being made is told when it is made.
            let making = |index| self.tickets.iter().any(|(_, _, pool, ..)| *pool == Some(index));
            let quiet = |index: usize| {
                self.exports[index].session != session || !self.has_event(index) || making(index)
            };
            assert!((0..self.exports.len()).all(quiet), "an event was lost");
            assert!(!self.missed.contains(&vm), "RESYNC was lost");
            if self.imports.contains(&vm) {
                let told = |index: usize| self.offer_news(vm, index).is_none();
                assert!((0..self.exports.len()).all(told), "an offer or its end was lost");
                let mut own = self.attachments.iter().filter(|held| held.session == session);
                assert!(own.all(|held| self.attachment_news(held).is_none()), "news were lost");
            }
            return;
        };
        let missed = self.missed.remove(&vm);
        assert!(!missed || event.kind == EventKind::Resync, "what was missed must be told first");
        if let (None, Some(uuid)) = (event.handle, event.uuid) {
            let index = self.exports.iter().position(|export| export.uuid == uuid).unwrap();
            assert_eq!(self.offer_news(vm, index), Some((event.kind, event.access)));
            assert_eq!(event.peer, Some(self.exports[index].session.peer));
        } else if let Some(handle) = event.handle
            && let Some(held) =
                self.attachments.iter().find(|h| (h.session, h.handle) == (session, handle))
        {
            assert_eq!(self.attachment_news(held), Some(event.kind));
            assert_eq!(event.uuid, Some(self.exports[held.of].uuid));
        } else if let Some(handle) = event.handle {
            let of = |export: &Export| export.session == session && export.handle == handle;
            let index = self.exports.iter().position(of).expect("an event of somebody else");
            let export = &self.exports[index];
            assert_eq!(event.uuid, Some(export.uuid));
            let kind = match self.use_count(index) {
                _ if export.owed => EventKind::Released,
                _ if !self.busy_changed(index) => EventKind::Changed,
                0 => EventKind::Idle,
                _ => EventKind::Busy,
            };
            assert!(self.has_event(index), "nothing happened");
            assert_eq!((event.kind, event.generation), (kind, export.generation));
        }
        self.events.insert(vm, (session, event));
    }

    fn told(&mut self, vm: PeerId) {
        let Some((session, event)) = self.events.remove(&vm) else { return };
        self.registry.event_told(session, event);
        if self.sessions[&vm] != Some(session) {
            return;
        }
        if event.kind == EventKind::Resync && !self.registry.vms[&vm].resync {
            self.told_again(vm);
        }
        let Some(handle) = event.handle else {
            let Some(uuid) = event.uuid else { return };
            let index = self.exports.iter().position(|export| export.uuid == uuid).unwrap();
            match event.kind {
                EventKind::Offered => self.offers.insert((vm, index), event.access),
                _ => self.offers.remove(&(vm, index)),
            };
            return;
        };
        let is_it = |held: &&mut Attached| (held.session, held.handle) == (session, handle);
        if let Some(held) = self.attachments.iter_mut().find(is_it) {
            match event.kind {
                EventKind::Revoked => held.told_revoked = true,
                _ if !held.revoked => held.told_generation = event.generation,
                _ => {}
            }
            return;
        }
        let of = |export: &&mut Export| {
            export.session == session && export.handle == handle && !export.over
        };
        let Some(export) = self.exports.iter_mut().find(of) else { return };
        match event.kind {
            EventKind::Released => {
                assert!(export.owed, "RELEASED was told twice");
                export.owed = false;
            }
            EventKind::Changed => export.told_generation = event.generation,
            kind => export.told_busy = kind == EventKind::Busy,
        }
    }

    /// After RESYNC live offers and dead attachments are told again.
    fn told_again(&mut self, vm: PeerId) {
        if !self.imports.contains(&vm) {
            return;
        }
        let exports = &self.exports;
        self.offers
            .retain(|(peer, index), _| *peer != vm || exports[*index].access_of(vm).is_none());
        for held in self.attachments.iter_mut().filter(|held| held.session.peer == vm) {
            held.told_revoked = false;
        }
    }

    /// Everything that can be seen of the registry is what follows from what the world knows.
    fn compare(&mut self, before: Registry<Rc<()>>, mut done: Vec<Done>, opens: bool) {
        let out = self.registry.take_outbox();
        let all = 0..self.exports.len();
        // What ended, once, and how.
        let mut ended: Vec<_> = out.done.iter().map(|end| (end.origin, end.status)).collect();
        let order = |(origin, _): &Done| format!("{origin:?}");
        for (origin, status) in &ended {
            if let Origin::Vm(_, token) = origin
                && let Some(begin) = self.waiting.remove(token)
                && *status == Status::Ok
            {
                self.granted.push(begin);
            }
        }
        ended.sort_by_key(order);
        done.sort_by_key(order);
        assert_eq!(ended, done);
        for notice in &out.notices {
            self.heard(*notice);
        }
        self.wanted.extend(&out.observe);
        for look in &out.fences {
            let index = usize::try_from(look.wait.key.0).unwrap() - 1;
            let mut fenced = self.exports[index].fenced.iter();
            // Or it ended at once.
            if let Some((waiter, _)) = fenced.find(|(one, _)| one.origin == look.wait.origin) {
                assert_eq!((look.write, look.unless), (waiter.want.write, waiter.unless));
            }
            self.fences.push((look.wait, index, look.unless, false));
        }
        drop(out.fences);
        drop(out.drop);
        // Who must be woken.
        if self.registry.next_deadline().unwrap_or(Duration::MAX)
            < before.next_deadline().unwrap_or(Duration::MAX)
        {
            assert!(out.clock, "the clock was not told of an earlier deadline");
        }
        for (peer, vm) in &self.registry.vms {
            if !opens && idle(&before.vms[peer]) && !idle(vm) {
                assert!(out.wake.contains(peer), "nobody was woken");
            }
        }
        drop(before);
        // What exists.
        let count = |filter: &dyn Fn(usize) -> bool| all.clone().filter(|i| filter(*i)).count();
        assert_eq!(self.registry.buffer_count(), count(&|i| self.exists(i)));
        assert_eq!(self.registry.by_uuid.len(), self.registry.buffers.len());
        assert_eq!(Rc::strong_count(&self.memory) - 1, count(&|i| self.has_memory(i)));
        let mappings = |session| {
            let own = self.attachments.iter().filter(move |held| Some(held.session) == session);
            own.map(|held| held.mappings.len()).sum::<usize>()
        };
        let mapped: usize = self.attachments.iter().map(|held| held.mappings.len()).sum();
        assert_eq!(Rc::strong_count(&self.pages) - 1, mapped);
        for held in &self.attachments {
            self.compare_attachment(held);
        }
        let leases: usize = self.exports.iter().map(|export| export.leases.len()).sum();
        assert_eq!(self.registry.lease_count(), leases);
        for (peer, vm) in &self.registry.vms {
            assert_eq!((vm.exports, vm.bytes), self.charged(*peer));
            assert_eq!(vm.waits, self.waits(*peer));
            let lingers = |i: usize| {
                let export = &self.exports[i];
                export.session.peer == *peer && export.over && !export.released && self.on_loan(i)
            };
            assert_eq!(vm.lingering as usize, count(&lingers));
            let listed = |session| {
                let next = |index| self.registry.query_linger(session, index).ok();
                (0..).map_while(next).map(|state| state.uuid).collect::<Vec<_>>()
            };
            if let Some(session) = vm.session {
                let lingering = all.clone().filter(|i| lingers(*i)).map(|i| self.exports[i].uuid);
                assert_eq!(listed(session), lingering.collect::<Vec<_>>());
            }
            assert_eq!(vm.mappings.len(), mappings(vm.session));
            let making = self.maps.iter().filter(|(_, session, _)| Some(*session) == vm.session);
            assert_eq!(vm.mapped as usize, vm.mappings.len() + making.count());
            let own = |held: &&Attached| Some(held.session) == vm.session;
            assert_eq!(vm.attachments.len(), self.attachments.iter().filter(own).count());
            for index in all.clone() {
                let told = vm.offers.get(&BufferKey(index as u64 + 1)).and_then(|o| o.told);
                assert_eq!(told, self.offers.get(&(*peer, index)).copied());
            }
        }
        for (index, export) in self.exports.iter().enumerate() {
            self.compare_export(index, export);
        }
        for vm in &self.imports {
            self.nothing_is_forgotten(*vm);
        }
        let due: BTreeSet<_> = self
            .registry
            .buffers
            .iter()
            .filter_map(|(key, buffer)| Some((buffer.next_due()?, *key)))
            .collect();
        assert_eq!(self.registry.deadlines, due);
    }

    /// What a VM has to be told waits to be told.
    fn nothing_is_forgotten(&self, vm: PeerId) {
        let events = &self.registry.vms[&vm].events;
        let waits = |topic| assert!(events.contains(topic), "{topic:?} was forgotten");
        for (index, export) in self.exports.iter().enumerate() {
            let key = BufferKey(index as u64 + 1);
            if self.offer_news(vm, index).is_some() {
                waits(Topic::Offer(key));
            }
            // A part that is being made is told when it is made.
            let making = self.tickets.iter().any(|(_, _, pool, ..)| *pool == Some(index));
            if export.session.peer == vm && !export.over && self.has_event(index) && !making {
                waits(Topic::Export(key));
            }
        }
        let own = self.attachments.iter().filter(|held| held.session.peer == vm);
        for held in own.filter(|held| self.attachment_news(held).is_some()) {
            waits(Topic::Attachment(held.handle));
        }
    }

    fn compare_attachment(&self, held: &Attached) {
        let export = &self.exports[held.of];
        let state = match held.revoked {
            true => State::Revoked,
            false if held.mappings.is_empty() => State::Attached,
            false => State::Mapped,
        };
        let found = self.registry.query(held.session, held.handle).unwrap();
        assert_eq!((found.state, found.use_count, found.access), (state, 0, held.access));
        assert_eq!((found.uuid, found.size), (export.uuid, export.size));
        assert_eq!(found.nr_mappings as usize, held.mappings.len());
        if !held.revoked {
            assert_eq!(found.generation, export.generation);
        }
    }

    fn compare_export(&self, index: usize, export: &Export) {
        let found = self.registry.query(export.session, export.handle);
        let use_count = self.use_count(index);
        let state = match use_count {
            _ if export.asked => State::Releasing,
            0 => State::Exported,
            _ => State::InUse,
        };
        let expected = self.handle(index).map(|export| HandleState {
            state,
            use_count,
            nr_mappings: self.attached(index).map(|held| held.mappings.len() as u32).sum(),
            access: export.access,
            size: export.size,
            generation: export.generation,
            uuid: export.uuid,
        });
        assert_eq!(found, expected);
        let offer = export.host_access();
        assert_eq!(export.offered, !offer.is_none(), "the host was not told of an offer");
        let seen = self.registry.host_info(export.uuid);
        assert_eq!(seen.is_some(), export.offered || !export.leases.is_empty());
        if let Some(seen) = seen {
            let live: Vec<_> = seen.leases.iter().filter(|lease| !lease.revoked).collect();
            assert_eq!(live.len(), export.leases.len() - export.revoked_live());
            assert_eq!((seen.access, seen.generation), (offer, export.generation));
        }
        let key = BufferKey(index as u64 + 1);
        if let Some(sync) = self.registry.buffers.get(&key).and_then(|b| b.sync.as_ref()) {
            assert!(sync.waiters().eq(&export.queue) && !sync.is_idle());
            let holders = export.holders();
            assert!(holders.iter().all(|who| sync.held_by(*who) == export.held(*who)));
            assert_eq!(sync.holders(), holders.len());
        } else {
            assert!(export.holders().is_empty() && export.queue.is_empty());
        }
        // Nobody is in front of fences that nobody looks at.
        let looked_at = |one: &Waiter| self.fences.iter().any(|(w, ..)| w.origin == one.origin);
        assert!(export.fenced.iter().all(|(waiter, _)| looked_at(waiter)));
        // Nobody waits for nothing.
        if let Some(first) = export.queue.first() {
            assert!(!export.free(first.holder, first.want));
        }
    }

    fn heard(&mut self, notice: Notice) {
        let (Notice::Offered(uuid)
        | Notice::Withdrawn(uuid)
        | Notice::Changed { uuid, .. }
        | Notice::Revoked { uuid, .. }) = notice;
        let export = self.exports.iter_mut().find(|export| export.uuid == uuid).unwrap();
        match notice {
            Notice::Offered(_) => export.offered = true,
            Notice::Withdrawn(_) => export.offered = false,
            Notice::Changed { generation, .. } => {
                assert_eq!(generation, export.generation);
                assert!(export.offered || !export.leases.is_empty());
            }
            Notice::Revoked { client, lease, .. } => {
                assert!(export.revoked.contains(&lease));
                assert_eq!(export.leases[&lease].0, client);
            }
        }
    }

    /// Everybody lets go. Then whoever waited for that has been told, and nothing is left.
    fn finish(mut self) {
        while !self.tickets.is_empty() {
            self.step(Op::Made { ticket: 0, ok: true });
        }
        while !self.fences.is_empty() {
            self.step(Op::Fence { pick: 0, found: Found::Over });
        }
        while !self.granted.is_empty() {
            self.step(Op::Fill { pick: 0 });
        }
        while !self.maps.is_empty() {
            self.step(Op::Mapped { map: 0, ok: true });
        }
        while !self.copies.is_empty() {
            self.step(Op::Copied { copy: 0, ok: true });
        }
        for client in CLIENTS {
            self.step(Op::ClientGone { client });
        }
        for export in &mut self.exports {
            export.descriptor = false;
        }
        loop {
            while !self.wanted.is_empty() || !self.looks.is_empty() {
                self.step(Op::Look { pick: 0 });
                self.step(Op::Seen { look: 0 });
            }
            let Some(next) = self.registry.next_deadline() else { break };
            let ms = next.saturating_sub(self.now).as_millis() as u64 + 1;
            self.step(Op::Time { ms });
        }
        for vm in VMS {
            self.step(Op::Told { vm });
            while self.sessions[&vm]
                .is_some_and(|of| self.registry.clone().next_event(of, wants(vm)).is_some())
            {
                self.step(Op::TakeEvent { vm });
                self.step(Op::Told { vm });
            }
        }
        for vm in VMS {
            self.step(Op::TakeEvent { vm });
        }
        for (index, export) in self.exports.iter().enumerate() {
            assert!(!export.owed && export.queue.is_empty() && export.points.is_empty());
            assert!(!export.open() || !export.asked || self.on_loan(index), "RELEASED was lost");
        }
        for vm in VMS {
            self.step(Op::Close { vm });
        }
        let registry = &self.registry;
        assert_eq!((registry.buffers.len(), registry.deadlines.len()), (0, 0));
        assert_eq!((registry.clients.len(), Rc::strong_count(&self.memory)), (0, 1));
        assert_eq!(Rc::strong_count(&self.pages), 1);
        for vm in registry.vms.values() {
            assert_eq!((vm.exports, vm.bytes, vm.waits, vm.lingering), (0, 0, 0, 0));
            assert_eq!((vm.handles.len(), vm.events.len()), (0, 0));
            assert_eq!((vm.attachments.len(), vm.mappings.len(), vm.mapped), (0, 0, 0));
            assert_eq!(vm.offers.len(), 0);
        }
    }
}

impl Export {
    fn revoked_live(&self) -> usize {
        self.leases.keys().filter(|lease| self.revoked.contains(lease)).count()
    }
}

/// Has nothing to tell, not even what became quiet again.
fn idle<H>(vm: &Vm<H>) -> bool {
    vm.events.first().is_none() && !vm.resync && vm.peers_changed.is_empty()
}

/// Equal in all but the policy, which never changes, and what says that something was refused.
fn same(one: &Registry<Rc<()>>, other: &Registry<Rc<()>>) -> bool {
    let Registry {
        policy: _,
        vms,
        buffers,
        by_uuid,
        granted,
        clients,
        exporters,
        host_charge,
        deadlines,
        last_key,
        last_lease,
        last_session,
        last_attachment,
        left: _,
        last_place,
        outbox,
    } = one;
    let quiet = |vms: &BTreeMap<PeerId, Vm<Rc<()>>>| {
        let mut vms = vms.clone();
        vms.values_mut().for_each(|vm| (vm.misses, vm.misses_since) = (0, Duration::ZERO));
        vms
    };
    let outcome = |outbox: &Outbox<Rc<()>>| Outbox { audit: Vec::new(), ..outbox.clone() };
    quiet(vms) == quiet(&other.vms)
        && last_attachment == &other.last_attachment
        && last_place == &other.last_place
        && buffers == &other.buffers
        && by_uuid == &other.by_uuid
        && granted == &other.granted
        && clients == &other.clients
        && (exporters, host_charge) == (&other.exporters, &other.host_charge)
        && deadlines == &other.deadlines
        && last_key == &other.last_key
        && last_lease == &other.last_lease
        && last_session == &other.last_session
        && outcome(outbox) == outcome(&other.outbox)
}

proptest! {
    // A failure prints what is needed to repeat it.
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn the_registry_does_what_its_model_does(ops in prop::collection::vec(op(), 0..150)) {
        let mut world = World::busy();
        for op in ops {
            world.step(op);
        }
        world.finish();
    }
}
