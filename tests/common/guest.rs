//! A guest and its VMM in one: a vhost-user front end with three queues and a driver that does
//! what a test says.
//!
//! It knows the life of a session (connect, start, pause, resume, reset, disconnect) and which
//! queue a request belongs to; layouts of requests are [`super::requests`]' business.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bufshare::protocol::{Config, Event, Opcode, SHM_WINDOW, feature, vq};
use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VringConfigData};
use zerocopy::FromBytes;

use super::daemon::Daemon;
use super::memory::{FREE, Memory, PAGE, Region};
use super::requests::{Reply, parse};
use super::ring::{Answer, Ring};
use super::vmm::{Behaviour, Vmm};

/// VIRTIO_RING_F_INDIRECT_DESC.
pub const F_INDIRECT: u64 = 1 << 28;
/// VIRTIO_RING_F_EVENT_IDX.
pub const F_EVENT_IDX: u64 = 1 << 29;
/// VHOST_USER_F_PROTOCOL_FEATURES.
pub const F_PROTOCOL: u64 = 1 << 30;
/// VIRTIO_F_VERSION_1.
pub const F_VERSION_1: u64 = 1 << 32;

/// How long a test waits for what has to come.
pub const SOON: Duration = Duration::from_secs(30);
/// How long a test waits to see that nothing comes.
pub const QUIET: Duration = Duration::from_millis(150);

/// How a VMM stops the rings of a paused guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// SET_VRING_ENABLE 0, then GET_VRING_BASE: QEMU, crosvm.
    WithBase,
    /// SET_VRING_ENABLE 0 and nothing else: virtio_uml.
    DisableOnly,
}

/// What a guest is like before it connects.
#[derive(Debug, Clone)]
pub struct Setup {
    /// Its memory.
    pub regions: Vec<Region>,
    /// Feature bits that it does not accept although they are offered.
    pub decline: u64,
    /// Protocol features that its VMM does not accept.
    pub decline_protocol: VhostUserProtocolFeatures,
    /// Entries of each queue.
    pub queue_size: u16,
    /// Event buffers in the queue from the start.
    pub event_buffers: u16,
    /// How its VMM answers on the back channel; `None`: it has none, and no window.
    pub vmm: Option<Behaviour>,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            regions: vec![Region::default()],
            decline: 0,
            decline_protocol: VhostUserProtocolFeatures::empty(),
            queue_size: 256,
            event_buffers: 16,
            vmm: None,
        }
    }
}

impl Setup {
    /// Connects and starts the rings.
    pub fn connect(self, daemon: &Daemon, vm: &str) -> Guest {
        self.connect_to(&daemon.socket(vm))
    }

    /// As [`Setup::connect`], to any socket.
    pub fn connect_to(self, socket: &Path) -> Guest {
        let memory = Arc::new(Memory::new(&self.regions));
        let rings = std::array::from_fn(|i| Ring::new(memory.clone(), i, self.queue_size));
        let (frontend, channel, offered) = handshake(socket, &self);
        let vmm = start_vmm(&self, &memory, channel, &frontend);
        let mut guest = Guest {
            config: read_config(&frontend),
            socket: socket.to_owned(),
            features: offered & !self.declined(),
            offered,
            frontend: Some(frontend),
            vmm,
            memory,
            rings,
            bases: [0; vq::COUNT],
            stopped: None,
            next_page: FREE,
            events: VecDeque::new(),
            started: BTreeSet::new(),
            late: HashMap::new(),
            setup: self,
        };
        guest.start();
        guest.stock_events(guest.setup.event_buffers);
        guest
    }
}

impl Setup {
    /// Without a window the driver must not accept what needs one.
    fn declined(&self) -> u64 {
        self.decline | u64::from(self.vmm.is_none()) << feature::WINDOW
    }
}

/// A running guest.
pub struct Guest {
    /// The configuration space when it connected.
    pub config: Config,
    /// Feature bits that the device offered.
    pub offered: u64,
    /// Feature bits that the driver accepted.
    pub features: u64,
    /// Its memory.
    pub memory: Arc<Memory>,
    /// Control, event and sync queue.
    pub rings: [Ring; vq::COUNT],
    /// Its window.
    pub vmm: Option<Vmm>,
    /// The vhost-user connection.
    pub frontend: Option<Frontend>,
    bases: [u16; vq::COUNT],
    stopped: Option<Stop>,
    socket: PathBuf,
    next_page: u64,
    events: VecDeque<Event>,
    /// Requests on the control queue that may stay pending, and the answers that came meanwhile.
    started: BTreeSet<u16>,
    late: HashMap<u16, Answer>,
    setup: Setup,
}

impl Guest {
    /// An ordinary guest: one sealed region, every feature, QEMU's queue size.
    pub fn connect(daemon: &Daemon, vm: &str) -> Self {
        Setup::default().connect(daemon, vm)
    }

    /// The vhost-user connection; panics after [`Guest::disconnect`].
    pub fn frontend(&self) -> Frontend {
        self.frontend.clone().expect("connected")
    }

    /// Reads the configuration space again.
    pub fn read_config(&self) -> Config {
        read_config(&self.frontend())
    }

    /// Fresh pages, one after the other.
    pub fn pages(&mut self, count: u64) -> u64 {
        let at = self.next_page;
        self.next_page += count * PAGE;
        at
    }

    /// The control queue.
    pub fn control_ring(&mut self) -> &mut Ring {
        &mut self.rings[usize::from(vq::CONTROL)]
    }

    /// The event queue.
    pub fn event_ring(&mut self) -> &mut Ring {
        &mut self.rings[usize::from(vq::EVENT)]
    }

    /// The sync queue.
    pub fn sync_ring(&mut self) -> &mut Ring {
        &mut self.rings[usize::from(vq::SYNC)]
    }

    /// One request on the control queue, with room for exactly its response.
    #[track_caller]
    pub fn control<T: FromBytes>(&mut self, request: &[u8]) -> Reply<T> {
        parse(self.raw(vq::CONTROL, &[request], &[size_of_u32::<T>()]).written())
    }

    /// One request on the sync queue, waited for.
    #[track_caller]
    pub fn sync<T: FromBytes>(&mut self, request: &[u8]) -> Reply<T> {
        parse(self.raw(vq::SYNC, &[request], &[size_of_u32::<T>()]).written())
    }

    /// One chain of these parts; it has to come back soon. Only for a queue with nothing pending but
    /// what [`Guest::control_start`] began.
    #[track_caller]
    pub fn raw(&mut self, queue: u16, readable: &[&[u8]], writable: &[u32]) -> Answer {
        let ring = &mut self.rings[usize::from(queue)];
        let head = ring.submit(readable, writable).expect("a free descriptor");
        loop {
            let answer = self.rings[usize::from(queue)].wait(SOON).expect("every chain comes back");
            if answer.head == head {
                return answer;
            }
            let late = queue == vq::CONTROL && self.started.remove(&answer.head);
            assert!(late, "some other chain came back");
            self.late.insert(answer.head, answer);
        }
    }

    /// Starts a request on the control queue that may stay pending: MAP or UNMAP. Its head names it.
    #[track_caller]
    pub fn control_start<T>(&mut self, request: &[u8]) -> u16 {
        let room = size_of_u32::<T>();
        let head = self.control_ring().submit(&[request], &[room]).expect("a free descriptor");
        self.started.insert(head);
        head
    }

    /// The answer to a request that was started, if it comes in time.
    #[track_caller]
    pub fn control_late<T: FromBytes>(&mut self, head: u16, limit: Duration) -> Option<Reply<T>> {
        while !self.late.contains_key(&head) {
            let answer = self.control_ring().wait(limit)?;
            assert!(self.started.remove(&answer.head), "some other chain came back");
            self.late.insert(answer.head, answer);
        }
        Some(parse(self.late.remove(&head)?.written()))
    }

    /// Answers that came and were not asked for.
    pub fn unclaimed(&mut self) -> usize {
        while let Some(answer) = self.control_ring().wait(Duration::ZERO) {
            assert!(self.started.remove(&answer.head), "some other chain came back");
            self.late.insert(answer.head, answer);
        }
        self.late.len()
    }

    /// Starts a request on the sync queue that may stay pending; its head names it.
    #[track_caller]
    pub fn sync_start<T>(&mut self, request: &[u8]) -> u16 {
        self.sync_ring().submit(&[request], &[size_of_u32::<T>()]).expect("a free descriptor")
    }

    /// Waits for whichever request on the sync queue ends first.
    #[track_caller]
    pub fn sync_next<T: FromBytes>(&mut self, limit: Duration) -> Option<(u16, Reply<T>)> {
        let answer = self.sync_ring().wait(limit)?;
        Some((answer.head, parse(answer.written())))
    }

    /// Makes so many event buffers available.
    pub fn stock_events(&mut self, count: u16) {
        let len = self.config.event_size.get();
        for _ in 0..count {
            self.event_ring().submit(&[], &[len]).expect("a free descriptor");
        }
    }

    /// The next event, if one comes in time. Its buffer goes back to the device.
    pub fn event(&mut self, limit: Duration) -> Option<Event> {
        if let Some(event) = self.events.pop_front() {
            return Some(event);
        }
        let answer = self.event_ring().wait(limit)?;
        self.stock_events(1);
        let (event, _) = Event::read_from_prefix(answer.written()).expect("a whole event");
        Some(event)
    }

    /// The next event; it has to be of this kind.
    #[track_caller]
    pub fn expect_event(&mut self, kind: Opcode) -> Event {
        let event = self.event(SOON);
        let event = event.unwrap_or_else(|| panic!("no {} event", kind.name()));
        assert_eq!(Opcode::from_wire(event.kind.get()), Some(kind), "{event:?}");
        event
    }

    /// Panics when an event comes.
    #[track_caller]
    pub fn expect_no_event(&mut self) {
        if let Some(event) = self.event(QUIET) {
            panic!("unexpected {event:?}");
        }
    }

    /// Sends the memory table again, as a VMM does after hot-plug.
    pub fn send_memory_table(&self) {
        let table = self.vmm.as_ref().map_or_else(|| self.memory.table(), Vmm::table);
        self.frontend().set_mem_table(&table).expect("SET_MEM_TABLE");
    }

    /// Sends features, memory table and rings from where they stand, and enables them.
    pub fn start(&mut self) {
        let mut frontend = self.frontend();
        frontend.set_features(self.features).expect("SET_FEATURES");
        self.send_memory_table();
        for (i, ring) in self.rings.iter_mut().enumerate() {
            ring.event_idx = self.features & F_EVENT_IDX != 0;
            let user = |address| self.memory.user_address(address);
            let rings = VringConfigData {
                queue_max_size: ring.size(),
                queue_size: ring.size(),
                desc_table_addr: user(ring.desc_at()),
                used_ring_addr: user(ring.used_at()),
                avail_ring_addr: user(ring.avail_at()),
                ..Default::default()
            };
            let base = self.bases[i];
            frontend.set_vring_num(i, ring.size()).expect("SET_VRING_NUM");
            frontend.set_vring_base(i, base).expect("SET_VRING_BASE");
            frontend.set_vring_addr(i, &rings).expect("SET_VRING_ADDR");
            frontend.set_vring_call(i, &ring.call).expect("SET_VRING_CALL");
            frontend.set_vring_kick(i, &ring.kick).expect("SET_VRING_KICK");
        }
        self.tell_vmm(true);
        for i in 0..vq::COUNT {
            frontend.set_vring_enable(i, true).expect("SET_VRING_ENABLE");
        }
    }

    fn tell_vmm(&self, running: bool) {
        if let Some(vmm) = &self.vmm {
            vmm.running(running);
        }
    }

    /// What its VMM shows.
    #[track_caller]
    pub fn window(&self) -> &Vmm {
        self.vmm.as_ref().expect("a guest with a window")
    }

    /// The VM is paused: rings stop, memory and guest stay as they are.
    pub fn pause(&mut self, how: Stop) {
        let mut frontend = self.frontend();
        for i in 0..vq::COUNT {
            frontend.set_vring_enable(i, false).expect("SET_VRING_ENABLE");
        }
        for i in 0..vq::COUNT {
            if how == Stop::WithBase {
                let base = frontend.get_vring_base(i).expect("GET_VRING_BASE");
                self.bases[i] = u16::try_from(base).expect("16 bits");
            }
        }
        self.tell_vmm(false);
        self.stopped = Some(how);
    }

    /// The paused VM runs again.
    pub fn resume(&mut self) {
        match self.stopped.take().expect("paused") {
            Stop::WithBase => self.start(),
            Stop::DisableOnly => {
                self.tell_vmm(true);
                let mut frontend = self.frontend();
                for i in 0..vq::COUNT {
                    frontend.set_vring_enable(i, true).expect("SET_VRING_ENABLE");
                }
            }
        }
    }

    /// The guest resets the device (a reboot, or the driver's own reset) and starts it again:
    /// all rings restart empty with base 0.
    pub fn reset(&mut self, how: Stop) {
        self.pause(how);
        self.restart_from_zero();
    }

    /// As [`Guest::reset`], by a VMM that says RESET_DEVICE.
    pub fn reset_device(&mut self) {
        self.pause(Stop::WithBase);
        self.frontend().reset_device().expect("RESET_DEVICE");
        self.restart_from_zero();
    }

    /// Starts a stopped guest with empty rings and base 0.
    pub fn restart_from_zero(&mut self) {
        self.stopped = None;
        self.bases = [0; vq::COUNT];
        self.events.clear();
        self.started.clear();
        self.late.clear();
        for ring in &mut self.rings {
            ring.clear();
        }
        self.start();
        self.config = self.read_config();
        self.stock_events(self.setup.event_buffers);
    }

    /// The VMM goes away; the guest's memory stays with this object.
    pub fn disconnect(&mut self) {
        self.frontend = None;
        if let Some(vmm) = &self.vmm {
            vmm.quit();
        }
    }

    /// A new VMM process on the same socket: a new session with empty rings.
    pub fn reconnect(&mut self) {
        self.disconnect();
        let (frontend, channel, offered) = handshake(&self.socket, &self.setup);
        self.vmm = start_vmm(&self.setup, &self.memory, channel, &frontend);
        self.offered = offered;
        self.features = offered & !self.setup.declined();
        self.frontend = Some(frontend);
        self.restart_from_zero();
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.disconnect();
        let sins = self.vmm.as_ref().map(Vmm::sins).unwrap_or_default();
        assert!(sins.is_empty() || std::thread::panicking(), "no VMM forgives {sins:?}");
    }
}

fn start_vmm(
    setup: &Setup,
    memory: &Arc<Memory>,
    channel: Option<(UnixStream, u64)>,
    frontend: &Frontend,
) -> Option<Vmm> {
    Some(Vmm::start(setup.vmm?, memory.clone(), channel?, frontend.clone()))
}

fn handshake(socket: &Path, setup: &Setup) -> (Frontend, Option<(UnixStream, u64)>, u64) {
    use VhostUserProtocolFeatures as Protocol;
    let window = Protocol::BACKEND_REQ | Protocol::BACKEND_SEND_FD | Protocol::SHMEM;
    let without = if setup.vmm.is_none() { window } else { Protocol::empty() };
    let decline = setup.decline_protocol | without;
    let mut frontend = Frontend::connect(socket, vq::COUNT as u64)
        .unwrap_or_else(|e| panic!("connect {}: {e}", socket.display()));
    frontend.set_owner().expect("SET_OWNER");
    let offered = frontend.get_features().expect("GET_FEATURES");
    assert_ne!(offered & F_PROTOCOL, 0, "protocol features");
    // The front end looks at the acknowledged bits before it enables rings; QEMU sends them
    // only when the guest's driver is ready, which Guest::start does again.
    let protocol = frontend.get_protocol_features().expect("GET_PROTOCOL_FEATURES");
    let protocol = protocol.difference(decline);
    frontend.set_protocol_features(protocol).expect("SET_PROTOCOL_FEATURES");
    if protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    }
    if protocol.contains(VhostUserProtocolFeatures::MQ) {
        let queues = frontend.get_queue_num().expect("GET_QUEUE_NUM");
        assert_eq!(queues, vq::COUNT as u64, "number of queues");
    }
    let mut channel = None;
    if protocol.contains(window) {
        let (ours, theirs) = UnixStream::pair().expect("socket pair");
        frontend.set_backend_request_fd(&theirs).expect("SET_BACKEND_REQ_FD");
        let regions = frontend.get_shmem_config().expect("GET_SHMEM_CONFIG");
        assert_eq!(regions.nregions, 1, "the window alone");
        channel = Some((ours, regions.memory_sizes[usize::from(SHM_WINDOW)]));
    }
    (frontend, channel, offered)
}

fn read_config(frontend: &Frontend) -> Config {
    use vhost::vhost_user::message::VhostUserConfigFlags;
    let size = size_of::<Config>();
    let (_, payload) = frontend
        .clone()
        .get_config(0, size as u32, VhostUserConfigFlags::empty(), &vec![0; size])
        .expect("GET_CONFIG");
    Config::read_from_bytes(&payload).expect("64 bytes")
}

fn size_of_u32<T>() -> u32 {
    u32::try_from(size_of::<T>()).expect("small")
}
