//! One VM's device: vhost-user back end, rings, sessions.
//!
//! | queue | what the worker does with a chain |
//! |---|---|
//! | 0 control | answers it before it takes the next; MAP and UNMAP in the window when the VMM answered |
//! | 1 event | keeps it in the ring until there is an event |
//! | 2 sync | answers it, or parks it until its wait ends |
//!
//! Not offered: ACCESS_PLATFORM (the framework has no IOTLB), packed ring, IN_ORDER (sync requests
//! complete in any order), and of vhost-user SHARED_OBJECT, INFLIGHT_SHMFD, STATUS and
//! INBAND_NOTIFICATIONS; no migration while a buffer is live.
//!
//! A VM's rings are touched only by that VM's worker; others raise its eventfd. It does not know
//! other VMs. A disconnect, or a guest that resets its device, ends the session: handles die, and
//! pages that the host still holds linger. A ring that stops ends nothing.

mod backend;

use std::collections::HashMap;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError, TryLockError};
use std::time::Duration;

use log::{error, warn};
use vhost_user_backend::{VhostUserBackend, VringT};
use virtio_queue::QueueT;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};
use zerocopy::IntoBytes;

use crate::command::{Command, Raw};
use crate::config_space;
use crate::execute::{Context, begun, execute};
use crate::hub::{Hub, lock};
use crate::ids::{HandleId, PeerId, SessionId};
use crate::limits;
use crate::memory::MemoryMap;
use crate::protocol::{self as wire, Opcode, Status, feature, vq};
use crate::queue::{Chain, Memory, Rings, Slot, Vring};
use crate::registry::{SyncRequest, Wants};
use crate::reply::{self, Refused, Reply};
use crate::sync::{AtomicBool, AtomicU64, Mutex, RwLock};
use crate::throttle::Throttle;
use crate::throttled;
use crate::vmm::Vmm;

/// Number of the wake-up among the worker's events; the framework owns those up to the queue count.
pub const WAKE: u64 = vq::COUNT as u64 + 1;

/// What the operator says of a VM's device.
#[derive(Debug, Clone)]
pub struct Options {
    /// For messages.
    pub name: String,
    /// Copies of RAM that its owner could truncate are allowed.
    pub unsealed_ram: bool,
    /// A stop of the rings revokes everything, as a reset does.
    pub revoke_on_stop: bool,
    /// Bytes of the window; 0: none.
    pub window: u64,
}

/// What only the worker touches.
#[derive(Debug)]
struct Worker {
    session: SessionId,
    rings: Rings,
    parked: HashMap<u64, Parked>,
    next_token: u64,
}

/// A request that waits.
#[derive(Debug)]
struct Parked {
    slot: Slot,
    wait: Wait,
}

/// What a request waits for.
#[derive(Debug, Clone, Copy)]
enum Wait {
    /// BEGIN: for others; then there may be something to copy.
    Begin(HandleId, SyncRequest),
    /// POINT_WAIT: for others.
    Point,
    /// MAP or UNMAP: for the VM's own VMM.
    Vmm(Opcode),
}

/// The device of one connection.
pub struct Device {
    hub: Arc<Hub>,
    peer: PeerId,
    options: Options,
    features: AtomicU64,
    reset: AtomicBool,
    /// The connection is over: nobody is left to be answered.
    over: AtomicBool,
    map: RwLock<Arc<MemoryMap>>,
    /// The guest's memory as far as the worker may touch it.
    memory: Memory,
    worker: Mutex<Worker>,
    /// For the main channel, which must know whether the guest could be between two sessions.
    vrings: Arc<Mutex<Vec<Vring>>>,
    vmm: Arc<Vmm>,
    /// What ends the worker, and its descriptor, which the framework leaves open for ever.
    exit: Mutex<Option<(EventConsumer, EventNotifier)>>,
    exit_fd: i32,
    throttle: Arc<Throttle>,
}

impl Device {
    /// A device for a new connection of a VM; `throttle` outlives it.
    pub fn new(
        hub: Arc<Hub>,
        peer: PeerId,
        options: Options,
        throttle: Arc<Throttle>,
    ) -> io::Result<Device> {
        let memory = Memory::new(GuestMemoryMmap::new());
        // Without it the framework could never end the worker.
        let exit = new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC)?;
        let session = hub.open_session(peer, true);
        let session = session.ok_or_else(|| io::Error::other("the VM is not configured"))?;
        let vrings = Arc::<Mutex<Vec<Vring>>>::default();
        let window = (options.name.clone(), options.window);
        let vmm = Vmm::new(hub.clone(), peer, window, throttle.clone(), vrings.clone());
        Ok(Device {
            hub,
            peer,
            options,
            features: AtomicU64::new(0),
            reset: AtomicBool::new(false),
            over: AtomicBool::new(false),
            map: RwLock::default(),
            memory: memory.clone(),
            worker: Mutex::new(Worker {
                session,
                rings: Rings::new(memory),
                parked: HashMap::new(),
                // Differs from that of every earlier connection: an end of a wait may come late.
                next_token: session.number << 32,
            }),
            vrings,
            vmm,
            exit_fd: exit.0.as_raw_fd(),
            exit: Mutex::new(Some(exit)),
            throttle,
        })
    }

    /// The connection is over, its worker not yet: it may wait for a call that nobody reads any more.
    pub fn hang_up(&self) {
        self.over.store(true, Ordering::SeqCst);
        while let Err(TryLockError::WouldBlock) = self.worker.try_lock() {
            let vrings = lock(&self.vrings).clone();
            vrings.iter().for_each(Vring::unblock);
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn is_over(&self) -> bool {
        self.over.load(Ordering::SeqCst)
    }

    /// The connection is over and its threads have ended.
    pub fn close(&self) {
        self.vmm.close();
        self.hub.close_session(lock(&self.worker).session);
        self.hub.set_memory(self.peer, &GuestMemoryMmap::new());
        if lock(&self.exit).take().is_none()
            && let Err(error) = crate::ioctl::adopt_fd(self.exit_fd)
        {
            warn!("{}: the exit event was closed already: {error}", self.options.name);
        }
    }

    /// Everything that the worker has to do at the moment.
    fn run(&self, vrings: &[Vring]) {
        let mut worker = lock(&self.worker);
        let running = Rings::running(vrings);
        let reset = self.reset.swap(false, Ordering::AcqRel);
        if reset || (running && worker.rings.were_reset(vrings)) {
            self.reset_session(&mut worker);
        }
        self.vmm.set_ready(running);
        if !running || self.is_over() {
            return;
        }
        for queue in [vq::CONTROL, vq::EVENT, vq::SYNC] {
            worker.rings.flush(vrings, queue);
        }
        self.answer_done(&mut worker, vrings);
        for queue in [vq::CONTROL, vq::SYNC] {
            self.drain(&mut worker, vrings, queue);
        }
        self.answer_done(&mut worker, vrings);
        self.deliver_events(&mut worker, vrings);
    }

    fn reset_session(&self, worker: &mut Worker) {
        throttled!(self.throttle, Info, "{}: the guest reset its device", self.options.name);
        worker.rings.reset();
        worker.parked.clear();
        self.hub.close_session(worker.session);
        match self.hub.open_session(self.peer, false) {
            Some(session) => worker.session = session,
            None => error!("{}: no session for a VM that had one", self.options.name),
        }
    }

    /// Answers every chain of a queue. Notifications stay off meanwhile, and the ring is looked at once
    /// more after they are on again. A ring that says twice that it has more, and gives nothing, is
    /// broken: once may be a chain that came while notifications were off.
    fn drain(&self, worker: &mut Worker, vrings: &[Vring], queue: u16) {
        let mut promised = false;
        loop {
            worker.rings.mute(vrings, queue);
            while let Some(chain) = worker.rings.take(vrings, queue) {
                if self.is_over() {
                    return;
                }
                self.answer(worker, vrings, queue, chain);
                promised = false;
            }
            if !worker.rings.listen(vrings, queue) {
                return;
            }
            if promised {
                let name = &self.options.name;
                return throttled!(self.throttle, Warn, "{name}: the guest broke queue {queue}");
            }
            promised = true;
        }
    }

    fn answer(&self, worker: &mut Worker, vrings: &[Vring], queue: u16, chain: Chain) {
        let Chain { slot, bytes, readable, sound } = chain;
        if !sound || slot.room < size_of::<wire::Resp>() as u64 {
            self.hub.metrics.malformed_chains.add(1);
            return worker.rings.give(vrings, queue, slot, Vec::new());
        }
        let features = self.features.load(Ordering::Relaxed);
        let raw = Raw { bytes: &bytes, readable, room: slot.room, queue, features };
        let token = worker.next_token;
        worker.next_token += 1;
        let queue_size =
            vrings.get(usize::from(vq::SYNC)).map_or(0, |v| v.get_ref().get_queue().size());
        let map = self.map.read().unwrap_or_else(PoisonError::into_inner).clone();
        let context = Context {
            session: worker.session,
            map: &map,
            unsealed_ram: self.options.unsealed_ram,
            token,
            ring_room: u32::from(queue_size.saturating_sub(2)),
        };
        let command = raw.parse();
        // Of other requests, POINT_WAIT alone waits.
        let wait = match &command {
            Ok(Command::Begin { handle, sync }) => Wait::Begin(*handle, *sync),
            Ok(Command::MapWindow(_)) => Wait::Vmm(Opcode::Map),
            Ok(Command::Unmap { .. }) => Wait::Vmm(Opcode::Unmap),
            _ => Wait::Point,
        };
        let outcome = match command {
            Ok(command) => execute(&self.hub, context, command),
            Err(status) => Some(Err(Refused::from(status))),
        };
        let Some(outcome) = outcome else {
            worker.parked.insert(token, Parked { slot, wait });
            return;
        };
        let bytes = reply::response(&outcome, raw.opcode(), &self.hub.metrics);
        worker.rings.give(vrings, queue, slot, bytes);
    }

    /// Answers the parked requests whose wait ended.
    fn answer_done(&self, worker: &mut Worker, vrings: &[Vring]) {
        for done in self.hub.take_done(self.peer) {
            let crate::registry::Origin::Vm(_, token) = done.origin else { continue };
            // A token of before a reset is parked no more.
            let Some(Parked { slot, wait }) = worker.parked.remove(&token) else { continue };
            let opcode = if matches!(wait, Wait::Point) { Opcode::PointWait } else { Opcode::Sync };
            let outcome = match (done.status, wait) {
                (Status::Ok, Wait::Begin(handle, sync)) => {
                    begun(&self.hub, worker.session, handle, &sync, done.value)
                }
                (Status::Ok, _) => Ok(Reply::Point { reached: done.value }),
                (status, _) => Err(Refused::from(status)),
            };
            let bytes = reply::response(&outcome, Some(opcode), &self.hub.metrics);
            worker.rings.give(vrings, vq::SYNC, slot, bytes);
        }
        for settled in self.hub.take_settled(self.peer) {
            let Some(Parked { slot, wait }) = worker.parked.remove(&settled.token) else {
                continue;
            };
            let opcode = if let Wait::Vmm(opcode) = wait { Some(opcode) } else { None };
            let outcome = match settled.status {
                Status::Ok => Ok(settled.mapping.map_or(Reply::Done, Reply::Mapped)),
                status => Err(Refused::from(status)),
            };
            let bytes = reply::response(&outcome, opcode, &self.hub.metrics);
            worker.rings.give(vrings, vq::CONTROL, slot, bytes);
        }
    }

    /// Delivers events as long as there are both events and buffers for them.
    fn deliver_events(&self, worker: &mut Worker, vrings: &[Vring]) {
        let features = self.features.load(Ordering::Relaxed);
        let has = |bit: u32| features >> bit & 1 != 0;
        let wants = Wants { peers: has(feature::PEERS), import: has(feature::IMPORT) };
        let session = worker.session;
        while let Some(event) = self.hub.with(|r, _| r.next_event(session, wants)) {
            if self.is_over() {
                return;
            }
            let Some(chain) = Self::event_buffer(worker, vrings) else { return };
            let fits = chain.sound && chain.slot.room >= u64::from(limits::EVENT_SIZE);
            let bytes = if fits { reply::event(&event).as_bytes().to_vec() } else { Vec::new() };
            if fits {
                self.hub.metrics.events.add(1);
                self.hub.with(|r, _| r.event_told(session, event));
            } else {
                self.hub.with(|r, _| r.resync(self.peer));
            }
            worker.rings.give(vrings, vq::EVENT, chain.slot, bytes);
        }
    }

    /// The next event buffer. Where there is none, the driver is asked to notify of the next one.
    fn event_buffer(worker: &mut Worker, vrings: &[Vring]) -> Option<Chain> {
        let rings = &mut worker.rings;
        rings.take(vrings, vq::EVENT).or_else(|| {
            rings.listen(vrings, vq::EVENT).then(|| rings.take(vrings, vq::EVENT)).flatten()
        })
    }

    fn config(&self) -> wire::Config {
        // A guest that reset its device reads this before its rings run again; what the session that is
        // still open leaves behind is not known yet. Nor is what a driver accepts, before its rings run.
        let (unknown, running) = {
            let vrings = lock(&self.vrings);
            let running = Rings::running(&vrings);
            (!vrings.is_empty() && !running, running)
        };
        let features =
            if running { self.features.load(Ordering::Relaxed) } else { self.features() };
        config_space::of(&self.hub, self.peer, features, unknown)
    }
}
