//! A VM: its driver and VMM on one thread, the worker of its connection, which is the daemon's, on another.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs::File;
use std::os::fd::IntoRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bufshare::protocol::{Event, Opcode, vq};
use shuttle::rand::{Rng, thread_rng};
use shuttle::thread::{self, JoinHandle};
use vhost_user_backend::{VhostUserBackend, VringT};
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap};
use vmm_sys_util::epoll::EventSet;
use zerocopy::FromBytes;

use crate::common::{BASE, FREE, Memory, Region, Reply, Ring, parse};
use crate::config_space;
use crate::device::{Device, Options, WAKE};
use crate::host::Host;
use crate::hub::Hub;
use crate::ids::PeerId;
use crate::queue::{self, Vring};
use crate::screen::{self, Screen};
use crate::throttle::Throttle;
use crate::world::{self, Bell, Connection, point};

const QUEUE_SIZE: u16 = 16;

/// What the worker of a VM sleeps on.
#[derive(Debug)]
struct Lane {
    kicks: [AtomicBool; vq::COUNT],
    stop: AtomicBool,
    bell: Arc<Bell>,
}

impl Lane {
    fn kick(&self, queue: usize) {
        self.kicks[queue].store(true, Ordering::SeqCst);
        self.bell.ring();
    }
}

/// As the framework's loop: what is readable is handled, one event after the other.
fn work(hub: &Hub, host: &Host, lane: &Lane, connection: &Connection, peer: PeerId) {
    let wake = hub.vm_wake(peer).expect("configured");
    let stop = || lane.stop.load(Ordering::SeqCst);
    let handle = |event: usize| {
        let event = u16::try_from(event).expect("small");
        let Connection { device, vrings, .. } = connection;
        device.handle_event(event, EventSet::IN, vrings, 0).expect("never an error");
        host.look_at_fences();
    };
    while !stop() {
        let kicked = || lane.kicks.iter().any(|kick| kick.load(Ordering::SeqCst));
        lane.bell.sleep_until(|| stop() || kicked() || wake.is_raised());
        for queue in 0..vq::COUNT {
            if lane.kicks[queue].swap(false, Ordering::SeqCst)
                && connection.vrings[queue].get_ref().is_enabled()
            {
                handle(queue);
            }
        }
        if wake.is_raised() {
            handle(usize::try_from(WAKE).expect("small"));
        }
    }
    lane.bell.retire();
}

/// A VM.
pub struct Guest {
    /// Which.
    pub peer: PeerId,
    hub: Arc<Hub>,
    host: Arc<Host>,
    lane: Arc<Lane>,
    bell: Arc<Bell>,
    interrupted: Arc<AtomicBool>,
    memory: Arc<Memory>,
    rings: Vec<Ring>,
    answers: BTreeMap<(u16, u16), Vec<u8>>,
    /// What came, until somebody is interested.
    pub events: VecDeque<Event>,
    released: BTreeSet<u64>,
    running: Option<(Connection, JoinHandle<()>)>,
    event_idx: bool,
    /// What its VMM shows, if it has a window.
    pub screen: Option<Arc<Screen>>,
    has_window: bool,
}

impl Guest {
    /// A VM that is not connected.
    pub fn new(hub: &Arc<Hub>, host: &Arc<Host>, peer: PeerId) -> Guest {
        let lane =
            Lane { kicks: Default::default(), stop: AtomicBool::new(false), bell: Bell::new() };
        // There is no worker yet.
        lane.bell.retire();
        hub.vm_wake(peer).expect("configured").watch(lane.bell.clone());
        // Rings and their buffers end at FREE; a few pages to export are behind it.
        let region = Region { len: FREE - BASE + (1 << 20), ..Default::default() };
        let memory = Arc::new(Memory::new(&[region]));
        let rings =
            (0..vq::COUNT).map(|index| Ring::new(memory.clone(), index, QUEUE_SIZE)).collect();
        let guest = Guest {
            peer,
            hub: hub.clone(),
            host: host.clone(),
            lane: Arc::new(lane),
            bell: Bell::new(),
            interrupted: Arc::default(),
            memory,
            rings,
            answers: BTreeMap::new(),
            events: VecDeque::new(),
            released: BTreeSet::new(),
            running: None,
            event_idx: thread_rng().gen_bool(0.5),
            screen: None,
            has_window: false,
        };
        for ring in &guest.rings {
            let call = ring.call.try_clone().expect("eventfd");
            world::driver(call, guest.interrupted.clone(), guest.bell.clone());
        }
        guest
    }

    /// Its VMM has a window from the next connection on.
    pub fn with_window(&mut self) {
        self.has_window = true;
    }

    /// Connects. False where the daemon has left.
    pub fn connect(&mut self) -> bool {
        let window = if self.has_window { screen::SIZE } else { 0 };
        let options =
            Options { name: "vm".into(), unsealed_ram: false, revoke_on_stop: false, window };
        let throttle = Arc::new(Throttle::new());
        let Ok(device) = Device::new(self.hub.clone(), self.peer, options, throttle) else {
            return false;
        };
        let region = GuestRegionMmap::from_range(
            GuestAddress(BASE),
            usize::try_from(FREE - BASE + (1 << 20)).expect("small"),
            Some(self.memory.file(BASE)),
        );
        let region = Arc::new(region.expect("memory"));
        let map = GuestMemoryMmap::from_arc_regions(vec![region.clone()]);
        let memory = queue::Memory::new(map.expect("memory"));
        let vring = || Vring::new(memory.clone(), QUEUE_SIZE).expect("a ring");
        let vrings: Vec<Vring> = (0..vq::COUNT).map(|_| vring()).collect();
        let device = Arc::new(device);
        device.acked_features(config_space::features(self.has_window));
        if self.has_window {
            let screen = Screen::new(region);
            screen.start(&device);
            device.get_shmem_config().expect("a window");
            device.set_front_end(screen.clone());
            self.screen = Some(screen);
        }
        device.update_memory(memory).expect("memory");
        let used = self.rings.iter().map(Ring::used_at).collect();
        let connection = Connection { device, vrings, used, memory: self.memory.clone() };
        world::connected(connection.clone());
        self.lane.stop.store(false, Ordering::SeqCst);
        self.lane.bell.reuse();
        let (hub, host, lane) = (self.hub.clone(), self.host.clone(), self.lane.clone());
        let (peer, worker) = (self.peer, connection.clone());
        let worker = thread::spawn(move || work(&hub, &host, &lane, &worker, peer));
        self.running = Some((connection, worker));
        self.forget();
        self.start();
        true
    }

    /// The VMM goes.
    pub fn disconnect(&mut self) {
        let Some((connection, worker)) = self.running.take() else { return };
        self.lane.stop.store(true, Ordering::SeqCst);
        self.lane.bell.ring();
        worker.join().expect("no panic");
        world::disconnected(&connection.device);
        if let Some(screen) = self.screen.take() {
            screen.quit();
        }
        connection.device.close();
    }

    /// The guest resets its device.
    pub fn reset(&mut self) {
        self.stop();
        self.forget();
        self.start();
    }

    /// The VMM says RESET_DEVICE; whether the rings ever run again is another matter.
    pub fn reset_device(&mut self) {
        self.stop();
        if let Some((connection, _)) = &self.running {
            connection.device.reset_device();
        }
    }

    /// The VMM stops the rings and lets them run on.
    pub fn pause(&mut self) {
        self.stop();
        self.start();
    }

    fn vrings(&self) -> &[Vring] {
        self.running.as_ref().map_or(&[], |(connection, _)| &connection.vrings)
    }

    fn forget(&mut self) {
        self.rings.iter_mut().for_each(Ring::clear);
        self.answers.clear();
        self.events.clear();
        self.released.clear();
    }

    fn stop(&mut self) {
        for vring in self.vrings() {
            vring.set_enabled(false);
            point();
        }
        for vring in self.vrings() {
            vring.set_queue_ready(false);
            vring.set_call(None);
            point();
        }
    }

    fn start(&mut self) {
        let fresh = self.rings.iter().all(|ring| ring.next_avail == 0);
        for (ring, vring) in self.rings.iter().zip(self.vrings()) {
            let used = self.memory.load_u16(ring.used_at() + 2);
            assert!(!fresh || used == 0, "a stopped ring was written");
            vring.set_queue_size(QUEUE_SIZE);
            vring.set_queue_info(ring.desc_at(), ring.avail_at(), ring.used_at()).expect("a ring");
            vring.set_queue_event_idx(self.event_idx);
            if fresh {
                vring.set_queue_next_avail(0);
            }
            vring.set_queue_next_used(used);
            let call = ring.call.try_clone().expect("eventfd").into_raw_fd();
            vring.set_call(Some(File::from(bufshare::ioctl::adopt_fd(call).expect("open"))));
            vring.set_queue_ready(true);
            point();
        }
        for (queue, vring) in self.vrings().iter().enumerate() {
            vring.set_enabled(true);
            self.lane.kick(queue);
            point();
        }
        if fresh {
            self.rings.iter_mut().for_each(|ring| ring.event_idx = self.event_idx);
            self.submit(vq::EVENT, &[], size_of::<Event>());
        }
    }

    /// Gives a chain to the device.
    pub fn submit(&mut self, queue: u16, request: &[u8], room: usize) -> u16 {
        let readable: &[&[u8]] = if request.is_empty() { &[] } else { &[request] };
        let room = u32::try_from(room).expect("small");
        let ring = &mut self.rings[usize::from(queue)];
        let head = ring.prepare(readable, &[room]).expect("a free descriptor");
        point();
        ring.offer(head);
        point();
        ring.notify();
        if ring.kick.read().is_ok() {
            self.lane.kick(usize::from(queue));
        }
        head
    }

    /// Waits for the answer to a chain.
    pub fn wait<T: FromBytes>(&mut self, queue: u16, head: u16) -> Reply<T> {
        loop {
            self.look();
            if let Some(answer) = self.answers.remove(&(queue, head)) {
                return parse(&answer);
            }
            self.sleep();
        }
    }

    /// A request of the control queue.
    pub fn control<T: FromBytes>(&mut self, request: &[u8]) -> Reply<T> {
        let head = self.submit(vq::CONTROL, request, size_of::<T>());
        self.wait(vq::CONTROL, head)
    }

    /// Whether RELEASED was told.
    pub fn was_released(&self, handle: u64) -> bool {
        self.released.contains(&handle)
    }

    /// Serves events until this is true.
    pub fn until(&mut self, over: impl Fn(&Guest) -> bool) {
        loop {
            self.look();
            if over(self) {
                return;
            }
            self.sleep();
        }
    }

    /// Serves events until the schedule is over.
    pub fn idle(&mut self, over: &AtomicBool) {
        self.until(|_| over.load(Ordering::SeqCst));
        self.bell.retire();
    }

    /// Has the driver look whether what it waits for is true.
    pub fn poke(&self) -> impl Fn() + Send + 'static {
        let (interrupted, bell) = (self.interrupted.clone(), self.bell.clone());
        move || {
            interrupted.store(true, Ordering::SeqCst);
            bell.ring();
        }
    }

    /// What it sleeps on.
    pub fn bell(&self) -> Arc<Bell> {
        self.bell.clone()
    }

    /// RELEASED was told: in no other way than once.
    pub fn note_released(&mut self, handle: u64) {
        assert!(self.released.insert(handle), "RELEASED of {handle} was told twice");
    }

    fn sleep(&self) {
        self.bell.sleep_until(|| self.interrupted.load(Ordering::SeqCst));
    }

    fn look(&mut self) {
        self.interrupted.store(false, Ordering::SeqCst);
        for queue in [vq::CONTROL, vq::EVENT, vq::SYNC] {
            point();
            while let Some(used) = self.rings[usize::from(queue)].pop_used() {
                let answer = self.rings[usize::from(queue)].settle(used);
                if queue != vq::EVENT {
                    self.answers.insert((queue, answer.head), answer.written().to_vec());
                    continue;
                }
                let event = Event::read_from_bytes(answer.written()).expect("an event");
                if event.kind.get() == Opcode::EvtReleased.to_wire() {
                    self.note_released(event.handle.get());
                }
                self.events.push_back(event);
                self.submit(vq::EVENT, &[], size_of::<Event>());
            }
        }
    }
}
