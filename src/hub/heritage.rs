//! What the hub takes over from the daemon before this one, and leaves to the next.
//!
//! It knows buffers and who holds them, not how they travel.

use std::time::Duration;

use log::{info, warn};

use super::{Hub, Memory};
use crate::ids::{ClientId, LeaseId};
use crate::registry::Left;

impl Hub {
    /// Ends all sessions for good, and tells what is left, and the last lease's number.
    pub fn leave(&self) -> (Vec<(Left, Memory)>, LeaseId) {
        self.with(|registry, _| (registry.leave(), registry.last_lease()))
    }

    /// Takes over the buffers that a predecessor left, before anybody is served.
    pub fn inherit(&mut self, buffers: Vec<(Left, Memory)>, last_lease: LeaseId, clock: Duration) {
        self.clock = clock;
        let count = buffers.len();
        let unknown = self.with(|registry, now| registry.inherit(buffers, last_lease, now));
        info!("{count} buffers of the predecessor are still in use");
        for (left, _) in unknown {
            let (uuid, vm) = (left.uuid, left.vm);
            warn!("buffer {uuid} is given up: its VM {vm:?} is not configured any more");
        }
    }

    /// The memory of a client's lease, dead or alive.
    pub fn host_memory(&self, client: ClientId, lease: LeaseId) -> Option<Memory> {
        self.read(|registry| registry.memory_of(client, lease))
    }
}
