//! In the place of the daemon's `queue`: its own rings, but others may run before each step on them,
//! and what the device raises reaches the driver.

pub use bufshare::queue::{Chain, Memory, Slot, Vring};

use crate::world::{self, point};

/// The rings of one VM.
#[derive(Debug)]
pub struct Rings(bufshare::queue::Rings);

impl Rings {
    /// Rings in this memory.
    pub fn new(memory: Memory) -> Rings {
        Rings(bufshare::queue::Rings::new(memory))
    }

    /// Forgets every chain.
    pub fn reset(&mut self) {
        self.0.reset();
    }

    /// Whether all run.
    pub fn running(vrings: &[Vring]) -> bool {
        point();
        bufshare::queue::Rings::running(vrings)
    }

    /// Whether the guest reset the device.
    pub fn were_reset(&self, vrings: &[Vring]) -> bool {
        point();
        self.0.were_reset(vrings)
    }

    /// Takes the next chain.
    pub fn take(&mut self, vrings: &[Vring], queue: u16) -> Option<Chain> {
        point();
        self.0.take(vrings, queue)
    }

    /// The driver need not notify.
    pub fn mute(&mut self, vrings: &[Vring], queue: u16) {
        point();
        self.0.mute(vrings, queue);
    }

    /// The driver has to notify.
    pub fn listen(&mut self, vrings: &[Vring], queue: u16) -> bool {
        point();
        self.0.listen(vrings, queue)
    }

    /// Gives a chain back.
    pub fn give(&mut self, vrings: &[Vring], queue: u16, slot: Slot, answer: Vec<u8>) {
        point();
        self.0.give(vrings, queue, slot, answer);
        world::interrupt();
    }

    /// Gives back what is held.
    pub fn flush(&mut self, vrings: &[Vring], queue: u16) {
        point();
        self.0.flush(vrings, queue);
        world::interrupt();
    }
}
