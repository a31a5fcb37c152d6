//! Rings: takes chains off them and gives them back. The only place that writes a used ring.
//!
//! It knows descriptors, not requests. A chain that is taken is returned once, by [`Rings::give`];
//! while a ring is stopped nothing of the guest's memory is touched, and what is to be returned waits.

use std::collections::VecDeque;
use std::sync::RwLockWriteGuard;

use log::debug;
use vhost_user_backend::{VringState, VringT};
use virtio_queue::{DescriptorChain, QueueT};
use vm_memory::{
    Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryMmap,
};

use crate::command::MAX_REQUEST;
use crate::protocol::vq;

/// Bytes of an answer at most, with room to spare.
const MAX_ANSWER: u64 = 256;

/// Guest memory, replaced when the VMM shares another table.
pub type Memory = GuestMemoryAtomic<GuestMemoryMmap>;
pub use crate::vring::Vring;
type Snapshot = <Memory as GuestAddressSpace>::T;

/// Where the answer to a chain goes.
#[derive(Debug)]
pub struct Slot {
    head: u16,
    writable: Vec<(GuestAddress, u32)>,
    /// Bytes of the device-writable part.
    pub room: u64,
}

/// A chain as it was taken.
#[derive(Debug)]
pub struct Chain {
    /// Where its answer goes.
    pub slot: Slot,
    /// The device-readable part, copied once, up to [`MAX_REQUEST`] bytes.
    pub bytes: Vec<u8>,
    /// Bytes of the device-readable part.
    pub readable: u64,
    /// False where it breaks the rules of the ring: it goes back with used length 0.
    pub sound: bool,
}

/// The rings of one VM, as its worker sees them.
#[derive(Debug)]
pub struct Rings {
    memory: Memory,
    /// Answers that could not be given because the ring was stopped.
    held: [VecDeque<(Slot, Vec<u8>)>; vq::COUNT],
    /// `next_avail` as this worker left it: what a reset is told by.
    left_at: [u16; vq::COUNT],
    served: bool,
}

impl Rings {
    /// Rings in this memory, which is not always all that the framework maps.
    pub fn new(memory: Memory) -> Rings {
        Rings { memory, held: Default::default(), left_at: [0; vq::COUNT], served: false }
    }

    /// Forgets every chain of before a reset.
    pub fn reset(&mut self) {
        *self = Rings::new(self.memory.clone());
    }

    /// Whether every ring is started and enabled: the device serves none before.
    pub fn running(vrings: &[Vring]) -> bool {
        vrings.len() == vq::COUNT
            && vrings.iter().all(|vring| {
                let state = vring.get_ref();
                state.is_enabled() && state.get_queue().ready()
            })
    }

    /// Whether the guest reset the device: all rings begin again, though chains were served.
    pub fn were_reset(&self, vrings: &[Vring]) -> bool {
        self.have_begun_again(vrings.iter().map(|vring| vring.queue_next_avail()))
    }

    fn have_begun_again(&self, mut next_avail: impl Iterator<Item = u16>) -> bool {
        self.served && self.left_at.iter().any(|at| *at != 0) && next_avail.all(|next| next == 0)
    }

    /// Takes the next chain of a ring; `None` where there is none, or the ring is stopped or broken.
    pub fn take(&mut self, vrings: &[Vring], queue: u16) -> Option<Chain> {
        let mut vring = self.same(vrings, queue)?;
        let chain = vring.get_queue_mut().pop_descriptor_chain(self.memory.memory())?;
        if let Some(at) = self.left_at.get_mut(usize::from(queue)) {
            *at = vring.get_queue().next_avail();
        }
        self.served = true;
        Some(read(chain))
    }

    /// Tells the driver that it need not notify of chains: the worker looks by itself.
    pub fn mute(&mut self, vrings: &[Vring], queue: u16) {
        let Some(mut vring) = self.same(vrings, queue) else { return };
        if let Err(error) = vring.get_queue_mut().disable_notification(&*self.memory.memory()) {
            debug!("queue {queue} cannot be muted: {error}");
        }
    }

    /// Asks the driver to notify of the next chain. True where one came before that.
    pub fn listen(&mut self, vrings: &[Vring], queue: u16) -> bool {
        let Some(mut vring) = self.same(vrings, queue) else { return false };
        let more = vring.get_queue_mut().enable_notification(&*self.memory.memory());
        more.unwrap_or_else(|error| {
            debug!("queue {queue} cannot be listened to: {error}");
            false
        })
    }

    /// A ring that may be touched, locked so that it stays so.
    fn started(vrings: &[Vring], queue: u16) -> Option<RwLockWriteGuard<'_, VringState<Memory>>> {
        let vring = vrings.get(usize::from(queue))?.get_mut();
        (vring.is_enabled() && vring.get_queue().ready()).then_some(vring)
    }

    /// As [`started`](Self::started), of a ring that did not begin again while the worker was busy:
    /// what it has in hand is of before that, and a VMM starts no ring before it has set up all.
    fn same<'a>(
        &self,
        vrings: &'a [Vring],
        queue: u16,
    ) -> Option<RwLockWriteGuard<'a, VringState<Memory>>> {
        let vring = Self::started(vrings, queue)?;
        let own = vring.get_queue().next_avail();
        let others = vrings.iter().enumerate().filter(|(at, _)| *at != usize::from(queue));
        let others = others.map(|(_, vring)| vring.queue_next_avail());
        (own != 0 || !self.have_begun_again(others)).then_some(vring)
    }

    /// Gives a chain back with its answer, or holds both until the ring runs again.
    pub fn give(&mut self, vrings: &[Vring], queue: u16, slot: Slot, answer: Vec<u8>) {
        let index = usize::from(queue);
        if let Some(held) = self.held.get_mut(index) {
            held.push_back((slot, answer));
        }
        self.flush(vrings, queue);
    }

    /// Gives back what is held for a ring that runs again.
    pub fn flush(&mut self, vrings: &[Vring], queue: u16) {
        let index = usize::from(queue);
        if self.held.get(index).is_none_or(VecDeque::is_empty) {
            return;
        }
        let Some(mut vring) = self.same(vrings, queue) else { return };
        let Some(held) = self.held.get_mut(index) else { return };
        let memory = self.memory.memory();
        for (slot, answer) in held.drain(..) {
            let written = write(&memory, &slot.writable, &answer);
            if let Err(error) = vring.get_queue_mut().add_used(&*memory, slot.head, written) {
                debug!("chain {} of queue {queue} cannot be returned: {error}", slot.head);
            }
        }
        let needed = vring.get_queue_mut().needs_notification(&*memory);
        // To raise it may take as long as the VMM likes.
        drop(vring);
        if !matches!(needed, Ok(false))
            && let Some(Err(error)) = vrings.get(index).map(VringT::signal_used_queue)
        {
            debug!("queue {queue} cannot be signalled: {error}");
        }
    }
}

fn read(chain: DescriptorChain<Snapshot>) -> Chain {
    let head = chain.head_index();
    let memory = chain.memory().clone();
    let mut out = Chain {
        slot: Slot { head, writable: Vec::new(), room: 0 },
        bytes: Vec::new(),
        readable: 0,
        sound: true,
    };
    let mut more = true;
    let mut answers = false;
    for descriptor in chain {
        more = descriptor.has_next();
        let (addr, len) = (descriptor.addr(), descriptor.len());
        let size = usize::try_from(len).unwrap_or(usize::MAX);
        if !memory.check_range(addr, size) {
            out.sound = false;
        } else if descriptor.is_write_only() {
            answers = true;
            // A chain may have 65535 parts and wait for seconds: what no answer reaches is not kept.
            if len > 0 && out.slot.room < MAX_ANSWER {
                out.slot.writable.push((addr, len));
            }
            out.slot.room += u64::from(len);
        } else if answers {
            out.sound = false;
        } else {
            out.readable += u64::from(len);
            let from = out.bytes.len();
            let take = size.min(MAX_REQUEST - from);
            out.bytes.resize(from + take, 0);
            if let Some(part) = out.bytes.get_mut(from..)
                && memory.read_slice(part, addr).is_err()
            {
                out.sound = false;
            }
        }
    }
    // The iterator stops silently at an index outside the table, a loop or a nested table.
    out.sound &= !more;
    out
}

fn write(memory: &GuestMemoryMmap, parts: &[(GuestAddress, u32)], answer: &[u8]) -> u32 {
    let mut rest = answer;
    let mut written = 0;
    for (addr, len) in parts {
        let take = rest.len().min(usize::try_from(*len).unwrap_or(usize::MAX));
        let (now, later) = rest.split_at(take);
        if memory.write_slice(now, *addr).is_err() {
            return 0;
        }
        written += u32::try_from(take).unwrap_or(0);
        rest = later;
    }
    written
}
