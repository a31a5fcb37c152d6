//! BEGINs of VMs in front of the fences of the host (spec "SYNC"). Pure.
//!
//! It does not know what a fence is: somebody else looks, with the lock released, and says whether it
//! is over. Host clients are not here: they have the dma-buf and wait for its fences themselves.

use super::outbox::Fences;
use super::{FenceWait, Origin, Registry, Waiter};
use crate::ids::BufferKey;
use crate::protocol::Status;

impl<H: Clone> Registry<H> {
    /// Whether a BEGIN has to look at fences before it is granted.
    pub(super) fn meets_fences(&self, key: BufferKey, origin: Origin) -> bool {
        let of_vm = matches!(origin, Origin::Vm(..));
        of_vm && self.buffers.get(&key).is_some_and(|buffer| buffer.may_have_fences())
    }

    /// Leaves a BEGIN that was given its bits in front of the fences.
    pub(super) fn await_fences(&mut self, key: BufferKey, waiter: Waiter) {
        let Some(buffer) = self.buffers.get_mut(&key) else { return };
        let Some(memory) = buffer.backing.clone() else { return };
        buffer.sync().fence(waiter);
        let (origin, write, unless) = (waiter.origin, waiter.want.write, waiter.unless);
        let wait = FenceWait { key, origin };
        self.outbox.fences.push(Fences { wait, memory, write, unless });
    }

    /// Says that fences are not over. Returns whether the BEGIN still waits for them: its time runs.
    pub fn fence_pending(&mut self, wait: FenceWait) -> bool {
        let sync = self.buffers.get_mut(&wait.key).and_then(|buffer| buffer.sync.as_mut());
        let waits = sync.is_some_and(|sync| sync.fence_pending(wait.origin));
        self.reschedule(wait.key);
        waits
    }

    /// Ends a BEGIN that still is in front of fences: OK where they are over.
    pub fn fence_over(&mut self, wait: FenceWait, status: Status) {
        let sync = self.buffers.get_mut(&wait.key).and_then(|buffer| buffer.sync.as_mut());
        let over = sync.and_then(|sync| sync.fence_over(wait.origin, status == Status::Ok));
        let Some((waiter, served)) = over else { return };
        let generation = self.buffers.get(&wait.key).map_or(0, |buffer| buffer.generation);
        self.tell_end(waiter, status, generation);
        self.done(wait.key, served);
    }
}
