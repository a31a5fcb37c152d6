//! One ring as the framework and the worker share it, and the descriptors by which it is announced.
//!
//! Those are the VMM's, and share their state with it: whatever it does with them, neither side of the
//! connection waits for ever. Kicks are taken without waiting, from an eventfd alone. A call is an eventfd, or
//! the Unix socket that virtio_uml has. No flag keeps the write to an eventfd from waiting while it is full,
//! since the VMM can take the flag back: so nothing is locked during that write, and when the connection is
//! over [`Vring::unblock`] empties what is in its way. It does not know chains.

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use log::debug;
use rustix::io::{Errno, ReadWriteFlags, preadv2};
use rustix::net::{AddressFamily, SendFlags, send, sockopt::socket_domain};
use vhost_user_backend::{VringRwLock, VringStateGuard, VringStateMutGuard, VringT};
use virtio_queue::Error as QueueError;

use crate::queue::Memory;

type State = VringRwLock<Memory>;
type Ref<'a> = <State as VringStateGuard<'a, Memory>>::G;
type RefMut<'a> = <State as VringStateMutGuard<'a, Memory>>::G;

/// One ring.
#[derive(Clone)]
pub struct Vring {
    state: State,
    fds: Arc<Mutex<Fds>>,
}

#[derive(Debug, Default)]
struct Fds {
    kick: Option<Arc<File>>,
    call: Option<Arc<Call>>,
    /// What the worker writes to at the moment: the VMM may have replaced it meanwhile.
    raised: Option<Arc<Call>>,
}

#[derive(Debug)]
enum Call {
    Event(File),
    Socket(File),
}

impl Call {
    /// Any other descriptor could make its writer wait for whoever made it.
    fn new(file: File) -> Option<Call> {
        if is_eventfd(&file) {
            return Some(Call::Event(file));
        }
        let unix = socket_domain(&file).is_ok_and(|domain| domain == AddressFamily::UNIX);
        unix.then_some(Call::Socket(file))
    }

    fn raise(&self) -> io::Result<()> {
        let one = 1u64.to_ne_bytes();
        let done = match self {
            Call::Event(file) => rustix::io::write(file, &one),
            Call::Socket(file) => send(file, &one, SendFlags::DONTWAIT | SendFlags::NOSIGNAL),
        };
        match done {
            // Full: the VMM has not looked at those before.
            Ok(_) | Err(Errno::AGAIN) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

fn is_eventfd(file: &File) -> bool {
    let name = format!("/proc/self/fd/{}", file.as_raw_fd());
    let target = rustix::fs::readlink(name, Vec::new());
    target.is_ok_and(|target| target.as_bytes() == b"anon_inode:[eventfd]")
}

/// Takes what was raised. Whether there is something or not, it does not wait.
fn consume(file: impl AsFd) {
    let mut count = [0; 8];
    let at_once = ReadWriteFlags::NOWAIT;
    if preadv2(&file, &mut [IoSliceMut::new(&mut count)], u64::MAX, at_once)
        == Err(Errno::OPNOTSUPP)
    {
        // Before Linux 5.8.
        let _ = rustix::io::read(&file, &mut count);
    }
}

impl Vring {
    fn fds(&self) -> MutexGuard<'_, Fds> {
        self.fds.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets go whoever waits to raise a call. Only after the end of the connection: calls are lost.
    pub fn unblock(&self) {
        let calls = {
            let fds = self.fds();
            [fds.call.clone(), fds.raised.clone()]
        };
        for call in calls.into_iter().flatten() {
            if let Call::Event(file) = &*call {
                consume(file);
            }
        }
    }
}

impl<'a> VringStateGuard<'a, Memory> for Vring {
    type G = Ref<'a>;
}

impl<'a> VringStateMutGuard<'a, Memory> for Vring {
    type G = RefMut<'a>;
}

impl VringT<Memory> for Vring {
    fn new(memory: Memory, max_queue_size: u16) -> Result<Self, QueueError> {
        Ok(Vring { state: State::new(memory, max_queue_size)?, fds: Arc::default() })
    }

    fn get_ref(&self) -> Ref<'_> {
        self.state.get_ref()
    }

    fn get_mut(&self) -> RefMut<'_> {
        self.state.get_mut()
    }

    fn add_used(&self, head: u16, len: u32) -> Result<(), QueueError> {
        self.state.add_used(head, len)
    }

    /// To be called with nothing locked.
    fn signal_used_queue(&self) -> io::Result<()> {
        let call = {
            let mut fds = self.fds();
            fds.raised = fds.call.clone();
            fds.call.clone()
        };
        let done = call.map_or(Ok(()), |call| call.raise());
        let raised = self.fds().raised.take();
        drop(raised);
        done
    }

    fn enable_notification(&self) -> Result<bool, QueueError> {
        self.state.enable_notification()
    }

    fn disable_notification(&self) -> Result<(), QueueError> {
        self.state.disable_notification()
    }

    fn needs_notification(&self) -> Result<bool, QueueError> {
        self.state.needs_notification()
    }

    fn set_enabled(&self, enabled: bool) {
        self.state.set_enabled(enabled);
    }

    fn set_queue_info(&self, desc: u64, avail: u64, used: u64) -> Result<(), QueueError> {
        self.state.set_queue_info(desc, avail, used)
    }

    fn queue_next_avail(&self) -> u16 {
        self.state.queue_next_avail()
    }

    fn set_queue_next_avail(&self, base: u16) {
        self.state.set_queue_next_avail(base);
    }

    fn set_queue_next_used(&self, index: u16) {
        self.state.set_queue_next_used(index);
    }

    fn queue_used_idx(&self) -> Result<u16, QueueError> {
        self.state.queue_used_idx()
    }

    fn set_queue_size(&self, size: u16) {
        self.state.set_queue_size(size);
    }

    fn set_queue_event_idx(&self, enabled: bool) {
        self.state.set_queue_event_idx(enabled);
    }

    fn set_queue_ready(&self, ready: bool) {
        self.state.set_queue_ready(ready);
    }

    /// The framework waits on a duplicate. Without a kick the ring does not start.
    fn set_kick(&self, file: Option<File>) {
        let kick = file.filter(is_eventfd).and_then(|file| Some((file.try_clone().ok()?, file)));
        let (waited_on, own) = kick.unzip();
        let before = std::mem::replace(&mut self.fds().kick, own.map(Arc::new));
        drop(before);
        self.state.set_kick(waited_on);
    }

    /// Never an error, which would end the worker.
    fn read_kick(&self) -> io::Result<bool> {
        let kick = self.fds().kick.clone();
        if let Some(kick) = kick {
            consume(&*kick);
        }
        Ok(self.state.get_ref().is_enabled())
    }

    fn set_call(&self, file: Option<File>) {
        let given = file.is_some();
        let call = file.and_then(Call::new);
        if given && call.is_none() {
            debug!(
                "a call that is neither an eventfd nor a Unix socket: the guest is not interrupted"
            );
        }
        let before = std::mem::replace(&mut self.fds().call, call.map(Arc::new));
        drop(before);
    }

    /// Nothing of the device is told by it.
    fn set_err(&self, _file: Option<File>) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{EventfdFlags, eventfd};
    use std::sync::mpsc::channel;
    use std::time::Duration;
    use vm_memory::GuestMemoryMmap;

    fn vring() -> Vring {
        let vring = Vring::new(Memory::new(GuestMemoryMmap::new()), 16).unwrap();
        vring.set_enabled(true);
        vring
    }

    fn event(count: u64, flags: EventfdFlags) -> (File, File) {
        let file = File::from(eventfd(0, flags).unwrap());
        if count > 0 {
            rustix::io::write(&file, &count.to_ne_bytes()).unwrap();
        }
        (file.try_clone().unwrap(), file)
    }

    /// Panics unless it comes back.
    fn soon<T: Send + 'static>(what: impl FnOnce() -> T + Send + 'static) -> T {
        let (done, result) = channel();
        std::thread::spawn(move || done.send(what()));
        result.recv_timeout(Duration::from_secs(10)).expect("it waits")
    }

    #[test]
    fn a_kick_that_somebody_else_took_is_a_spurious_one() {
        for flags in [EventfdFlags::empty(), EventfdFlags::NONBLOCK] {
            let vring = vring();
            let (kick, ours) = event(1, flags);
            vring.set_kick(Some(kick));
            for _ in 0..2 {
                let vring = vring.clone();
                assert!(soon(move || vring.read_kick()).unwrap());
            }
            consume(&ours);
            vring.set_enabled(false);
            assert!(!vring.read_kick().unwrap());
        }
    }

    #[test]
    fn who_waits_for_a_full_call_is_let_go_also_after_it_was_replaced() {
        for replaced in [false, true] {
            let vring = vring();
            vring.set_call(Some(event(u64::MAX - 1, EventfdFlags::empty()).0));
            let (done, result) = channel();
            let worker = vring.clone();
            std::thread::spawn(move || done.send(worker.signal_used_queue()));
            assert!(result.recv_timeout(Duration::from_millis(100)).is_err(), "a full one waits");
            if replaced {
                vring.set_call(None);
            }
            vring.unblock();
            result.recv_timeout(Duration::from_secs(10)).expect("it waits").unwrap();
        }
    }

    #[test]
    fn other_descriptors_start_no_ring_and_are_not_called() {
        let vring = vring();
        let file = tempfile::tempfile().unwrap();
        vring.set_kick(Some(file.try_clone().unwrap()));
        assert!(vring.get_ref().get_kick().is_none());
        vring.set_call(Some(file.try_clone().unwrap()));
        vring.signal_used_queue().unwrap();
        assert_eq!(file.metadata().unwrap().len(), 0);
        let (a, b) = rustix::net::socketpair(
            AddressFamily::UNIX,
            rustix::net::SocketType::STREAM,
            rustix::net::SocketFlags::empty(),
            None,
        )
        .unwrap();
        vring.set_call(Some(a.into()));
        for _ in 0..100_000 {
            vring.signal_used_queue().unwrap();
        }
        assert_eq!(rustix::io::read(&b, &mut [0; 8]).unwrap(), 8);
    }
}
