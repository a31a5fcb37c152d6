//! Carries out what BEGIN and END copy, between two visits to the registry.
//!
//! It knows where bytes are, not who wants them.

use std::io;

use super::{Hub, Memory};
use crate::protocol::Status;
use crate::registry::{Copy, CopyTicket, Ended, Move, Place, View};
use crate::throttled;

fn carry(one: &Move<Memory>) -> io::Result<u64> {
    let segments = |place: &Place<Memory>| match place.view {
        View::Pages => place.memory.part(place.offset, one.len),
        View::Content => place.memory.content(place.offset, one.len),
    };
    // Of a client's dma-buf both views are the same, and nothing is copied from one to another.
    if one.from.memory.is_mapped() {
        return one.from.memory.copy_out(one.from.offset, &segments(&one.to)?);
    }
    if one.to.memory.is_mapped() {
        return one.to.memory.copy_in(one.to.offset, &segments(&one.from)?);
    }
    crate::dmabuf::copy(&segments(&one.from)?, &segments(&one.to)?)
}

impl Hub {
    /// Carries out the copy that an END asks for. IO where it failed.
    pub fn finish_end(&self, ended: Ended<Memory>) -> Result<u64, Status> {
        match ended {
            Ended::Now(generation) => Ok(generation),
            Ended::Copy(ticket, copy) => self.carry_out(ticket, copy),
        }
    }

    /// Carries out a copy and finishes what it belongs to. Returns the generation; IO where it failed.
    pub fn carry_out(&self, ticket: CopyTicket, copy: Copy<Memory>) -> Result<u64, Status> {
        let copied: io::Result<u64> = copy.moves.iter().map(carry).sum();
        drop(copy);
        match &copied {
            Ok(bytes) => self.metrics.bytes_copied.add(*bytes),
            Err(error) => throttled!(self.throttle, Warn, "a copy failed: {error}"),
        }
        let generation = self.with(|registry, _| registry.finish_copy(ticket, copied.is_ok()));
        copied.map(|_| generation).ok().ok_or(Status::Io)
    }
}
