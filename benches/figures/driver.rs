//! A driver that spends little time of its own: requests that are made once and asked many times.
//!
//! It knows rings and bytes, not what they are for. A guest kicks by writing to its device and learns
//! of an answer by an interrupt; here each is one system call on an eventfd, as in the ping-pong that
//! this is compared with.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bufshare::protocol::{Resp, Status, vq};
use vhost::VhostBackend;
use vmm_sys_util::eventfd::EventFd;
use zerocopy::FromBytes;

use crate::common::{Desc, Guest, Memory, NEXT, Ring, WRITE};

/// A request with room for its answer, somewhere in guest memory.
#[derive(Debug, Clone, Copy)]
pub struct Request {
    head: u16,
    at: u64,
    answer_at: u64,
    answer_len: usize,
}

/// One queue of a guest.
pub struct Driver<'a> {
    ring: &'a mut Ring,
    memory: Arc<Memory>,
    call: EventFd,
    next_slot: u16,
}

impl<'a> Driver<'a> {
    /// Takes a queue over; nothing else may use it from then on.
    pub fn new(guest: &'a mut Guest, queue: u16) -> Self {
        let call = EventFd::new(0).expect("eventfd");
        let index = usize::from(queue);
        guest.frontend().set_vring_call(index, &call).expect("SET_VRING_CALL");
        let memory = guest.memory.clone();
        let ring = &mut guest.rings[index];
        let next_slot = ring.size() / 2;
        Self { ring, memory, call, next_slot }
    }

    /// The control queue.
    pub fn control(guest: &'a mut Guest) -> Self {
        Self::new(guest, vq::CONTROL)
    }

    /// Puts a request into guest memory, with room for an answer of this type.
    pub fn request<T>(&mut self, bytes: &[u8]) -> Request {
        let answer_len = size_of::<T>();
        let head = self.next_slot;
        self.next_slot += 2;
        let at = self.ring.buffer(bytes.len() as u64);
        let answer_at = self.ring.buffer(answer_len as u64);
        self.memory.write(at, bytes);
        let len = |len: usize| u32::try_from(len).expect("short");
        let parts = [
            Desc { addr: at, len: len(bytes.len()), flags: NEXT, next: head + 1 },
            Desc { addr: answer_at, len: len(answer_len), flags: WRITE, next: 0 },
        ];
        for (slot, desc) in (head..).zip(parts) {
            self.ring.write_desc(slot, desc);
        }
        Request { head, at, answer_at, answer_len }
    }

    /// Changes the handle in a request that has one behind its header.
    pub fn set_handle(&self, request: Request, handle: u64) {
        self.memory.write(request.at + 8, &handle.to_le_bytes());
    }

    /// Makes the request available, and tells the device where it wants to be told.
    pub fn submit(&mut self, request: Request) {
        let before = self.ring.next_avail;
        self.ring.offer(request.head);
        let wanted_at = self.ring.used_at() + 4 + u64::from(self.ring.size()) * 8;
        let wanted = self.memory.load_u16(wanted_at);
        let after = self.ring.next_avail;
        if after.wrapping_sub(wanted).wrapping_sub(1) < after.wrapping_sub(before) {
            self.ring.kick();
        }
    }

    /// Waits until the device has answered.
    pub fn wait(&mut self) {
        while self.ring.pop_used().is_none() {
            self.call.read().expect("call");
        }
    }

    /// From making the request available until its answer is seen.
    pub fn ask(&mut self, request: Request) -> Duration {
        let start = Instant::now();
        self.submit(request);
        self.wait();
        start.elapsed()
    }

    /// The answer; panics unless it is OK.
    pub fn answer<T: FromBytes>(&self, request: Request) -> T {
        let bytes = self.memory.read(request.answer_at, request.answer_len);
        let (header, _) = Resp::read_from_prefix(&bytes).expect("a header");
        assert_eq!(Status::from_wire(header.status.get()), Some(Status::Ok), "refused");
        T::read_from_bytes(&bytes).expect("a whole answer")
    }
}
