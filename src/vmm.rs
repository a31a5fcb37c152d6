//! The back channel to one VM's VMM: asks it to show memory in the VM's window, and to show it no longer.
//!
//! A request blocks until the VMM has answered, however long that takes: so each connection has a thread
//! for it, which holds no lock meanwhile and for which nobody waits. It asks only while the rings run,
//! since a request to a stopped device ends QEMU; what is due meanwhile is asked when they run again. It
//! knows neither buffers nor guests: the registry says what to ask. When the connection ends the thread
//! does, as soon as the VMM closes its side; how many of a VM may hang behind is bounded.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vhost::vhost_user::message::{VhostUserMMap, VhostUserMMapFlags, VhostUserShMemConfig};
use vhost::vhost_user::{Error, VhostUserFrontendReqHandler};

use crate::hub::{Hub, Memory, lock};
use crate::ids::{PeerId, WindowId, WindowRange};
use crate::limits::{FIRST_ANSWER, GRANULE};
use crate::protocol::SHM_WINDOW;
use crate::queue::{Rings, Vring};
use crate::registry::{Answer, Registry, Shown};
use crate::sync::{AtomicBool, Instant, Mutex, RecvTimeoutError, Sender, channel, spawn};
use crate::throttle::Throttle;
use crate::throttled;
use crate::window::Todo;

/// Who answers on the back channel.
pub type FrontEnd = Arc<dyn VhostUserFrontendReqHandler + Send + Sync>;

/// The back channel of one connection.
pub struct Vmm {
    hub: Arc<Hub>,
    peer: PeerId,
    name: String,
    throttle: Arc<Throttle>,
    /// Bytes of the window; 0: none.
    size: u64,
    vrings: Arc<Mutex<Vec<Vring>>>,
    /// The worker has settled whether the guest reset its device, and the rings run.
    ready: AtomicBool,
    /// Its thread saw, or is about to see, that it may not ask: it waits for the bell.
    rests: AtomicBool,
    closed: AtomicBool,
    channel: Mutex<Channel>,
}

#[derive(Default)]
struct Channel {
    front_end: Option<FrontEnd>,
    /// The VMM asked how large the window is, so it has one.
    has_window: bool,
    started: bool,
}

impl Vmm {
    /// The back channel of a new connection, which the VMM may open or not.
    pub fn new(
        hub: Arc<Hub>,
        peer: PeerId,
        (name, size): (String, u64),
        throttle: Arc<Throttle>,
        vrings: Arc<Mutex<Vec<Vring>>>,
    ) -> Arc<Vmm> {
        let (ready, rests, closed, channel) = Default::default();
        Arc::new(Vmm { hub, peer, name, throttle, size, vrings, ready, rests, closed, channel })
    }

    /// GET_SHMEM_CONFIG: what regions the device has.
    pub fn config(self: &Arc<Vmm>) -> VhostUserShMemConfig {
        lock(&self.channel).has_window = self.size > 0;
        self.start();
        let mut sizes = [0; SHM_WINDOW as usize + 1];
        if let Some(size) = sizes.get_mut(usize::from(SHM_WINDOW)) {
            *size = self.size;
        }
        VhostUserShMemConfig::new(u32::from(self.size > 0), &sizes)
    }

    /// SET_BACKEND_REQ_FD.
    pub fn set_front_end(self: &Arc<Vmm>, front_end: FrontEnd) {
        lock(&self.channel).front_end = Some(front_end);
        self.start();
    }

    /// Opens the window as soon as all that it needs is there.
    fn start(self: &Arc<Vmm>) {
        let mut channel = lock(&self.channel);
        if channel.started || !channel.has_window || channel.front_end.is_none() {
            return;
        }
        channel.started = true;
        if !self.hub.channel_begins(self.peer) {
            let name = &self.name;
            let text = "too many earlier connections never closed their back channel: no window";
            return throttled!(self.throttle, Warn, "{name}: {text}");
        }
        let window = self.hub.with(|r, _| r.open_window(self.peer, self.size));
        let this = self.clone();
        let thread = move || {
            this.run(window);
            this.hub.channel_ends(this.peer);
        };
        if let Err(error) = spawn(format!("vmm-{}", self.name), thread) {
            throttled!(self.throttle, Warn, "{}: no window: {error}", self.name);
            self.hub.channel_ends(self.peer);
            self.hub.with(|r, _| r.close_window(self.peer));
        }
    }

    /// The worker says whether the VMM may be asked. Rings can stop and run again without its notice, but
    /// not without a call of this.
    pub fn set_ready(&self, ready: bool) {
        let was_ready = self.ready.swap(ready, Ordering::AcqRel);
        if ready && (!was_ready || self.rests.load(Ordering::Acquire)) {
            self.rests.store(false, Ordering::Release);
            self.hub.ring(self.peer);
        }
    }

    /// The connection is over.
    pub fn close(&self) {
        self.closed.store(true, Ordering::Release);
        lock(&self.channel).front_end = None;
        self.hub.with(|r, _| r.close_window(self.peer));
        self.hub.ring(self.peer);
    }

    fn may_ask(&self) -> bool {
        self.ready.load(Ordering::Acquire) && Rings::running(&lock(&self.vrings))
    }

    fn run(self: &Arc<Vmm>, window: WindowId) {
        let mut seen = 0;
        let mut first = true;
        while !self.closed.load(Ordering::Acquire) {
            // First, so that whoever lets the rings run after this look finds it.
            self.rests.store(true, Ordering::Release);
            let due = self.may_ask();
            let next = if due {
                self.rests.store(false, Ordering::Release);
                self.hub.with(|r, now| r.next_for_vmm(self.peer, window, now))
            } else {
                None
            };
            let Some(todo) = next else {
                let until = self.hub.read(|r| r.vmm_deadline(self.peer, window));
                seen = self.hub.wait_for_bell(self.peer, seen, until.filter(|_| due));
                continue;
            };
            let answered = std::mem::take(&mut first).then(|| self.doubt(window));
            let answer = self.ask(&todo);
            drop((todo, answered));
            self.hub.with(|r, now| r.vmm_answered(self.peer, window, answer, now));
            if answer == Answer::Broken {
                return;
            }
        }
    }

    /// Gives the window up unless the VMM answers its first request in time, which drops the sender: who
    /// knows no answers never will, and a guest waits for them.
    fn doubt(self: &Arc<Vmm>, window: WindowId) -> Sender<()> {
        let (answered, never) = channel();
        let this = self.clone();
        let watch = move || {
            let late = never.recv_timeout(FIRST_ANSWER) == Err(RecvTimeoutError::Timeout);
            if late && !this.closed.load(Ordering::Acquire) {
                let text =
                    "no window: the VMM does not answer on its back channel; is REPLY_ACK on?";
                throttled!(this.throttle, Warn, "{}: {text}", this.name);
                let broken = |r: &mut Registry<Memory>, now| {
                    r.vmm_answered(this.peer, window, Answer::Broken, now)
                };
                this.hub.with(broken);
            }
        };
        if let Err(error) = spawn(format!("vmm1-{}", self.name), watch) {
            throttled!(self.throttle, Warn, "{}: a VMM that is silent: {error}", self.name);
        }
        answered
    }

    fn ask(&self, todo: &Todo<Shown<Memory>>) -> Answer {
        let Some(front_end) = lock(&self.channel).front_end.clone() else { return Answer::Broken };
        // Between this look and the request lies no lock and no wait.
        match todo {
            _ if !self.may_ask() => Answer::NotAsked { place: todo.place() },
            Todo::Map { place, range, file_start, writable, what } => {
                let done = self.map(&front_end, *range, *file_start, *writable, &what.memory);
                done.map_or(Answer::Broken, |done| Answer::Mapped { place: *place, done })
            }
            Todo::Unmap { place, range } => {
                let done = self.unmap(&front_end, *range);
                done.map_or(Answer::Broken, |done| Answer::Unmapped { place: *place, done })
            }
            Todo::Barrier { place, range } => {
                let done = self.barrier(&front_end, *range);
                done.map_or(Answer::Broken, |()| Answer::Settled { place: *place })
            }
        }
    }

    /// False where the VMM refused; `None` where the channel is of no use any more.
    fn map(
        &self,
        front_end: &FrontEnd,
        range: WindowRange,
        fd_offset: u64,
        writable: bool,
        memory: &Memory,
    ) -> Option<bool> {
        let Some(fd) = memory.heirloom() else { return Some(false) };
        let flags = if writable { VhostUserMMapFlags::WRITABLE } else { Default::default() };
        let request = VhostUserMMap { fd_offset, flags: flags.bits(), ..request(range) };
        self.timed("SHMEM_MAP", || front_end.shmem_map(&request, &fd))
    }

    fn unmap(&self, front_end: &FrontEnd, range: WindowRange) -> Option<bool> {
        self.timed("SHMEM_UNMAP", || front_end.shmem_unmap(&request(range)))
    }

    /// A page there and back. Never a request that could be refused: crosvm ends the VM at the first.
    fn barrier(&self, front_end: &FrontEnd, range: WindowRange) -> Option<()> {
        let page = (range.len == GRANULE).then(|| self.hub.dmabufs.make_private(GRANULE));
        let Some(Ok(page)) = page else { return Some(()) };
        if self.map(front_end, range, 0, false, &Arc::new(page))? {
            self.unmap(front_end, range)?;
        }
        Some(())
    }

    fn timed(&self, what: &str, ask: impl FnOnce() -> io::Result<u64>) -> Option<bool> {
        let start = Instant::now();
        let answer = ask();
        let metrics = &self.hub.metrics;
        metrics.vmm_requests.add(1);
        metrics.vmm_us.add(u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX));
        let Err(error) = answer else { return Some(true) };
        metrics.vmm_failures.add(1);
        let cause = error.get_ref().and_then(|cause| cause.downcast_ref::<Error>());
        let refused = cause.is_some_and(is_refusal);
        if refused {
            throttled!(self.throttle, Warn, "{}: the VMM refused {what}", self.name);
        } else if !self.closed.load(Ordering::Acquire) {
            let text = "the VMM's back channel is of no use any more";
            throttled!(self.throttle, Warn, "{}: {text}: {what}: {error}", self.name);
        }
        refused.then_some(false)
    }
}

/// Whether the channel is as good as before: the VMM said no, or the request was not sent because too many
/// descriptors of this user, who may be somebody else, are on their way.
fn is_refusal(error: &Error) -> bool {
    match error {
        Error::FrontendInternalError => true,
        Error::SocketError(cause) => cause.raw_os_error() == Some(libc::ETOOMANYREFS),
        _ => false,
    }
}

fn request(range: WindowRange) -> VhostUserMMap {
    let WindowRange { start: shm_offset, len } = range;
    VhostUserMMap { shmid: SHM_WINDOW, shm_offset, len, ..Default::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_of_others_on_their_way_do_not_break_the_channel() {
        let socket = |errno| Error::SocketError(io::Error::from_raw_os_error(errno));
        assert!(is_refusal(&socket(libc::ETOOMANYREFS)));
        assert!(!is_refusal(&socket(libc::EPIPE)));
    }
}
