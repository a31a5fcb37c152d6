//! POINT_SIGNAL and POINT_WAIT of a host client.

use std::time::Duration;

use zerocopy::IntoBytes;

use super::{Answer, Outgoing, Refusal, Session, header};
use crate::command::point::{line, status};
use crate::host::wire::{Point, RespPoint, Type};
use crate::hub::Hub;
use crate::ids::{Cookie, LeaseId};
use crate::limits::MAX_CLIENT_WAITS;
use crate::protocol::Status;
use crate::registry::{Begun, PointWait, Signal};

impl Session {
    /// Our number for the next request that may wait.
    pub(super) fn next_wait(&mut self) -> Cookie {
        self.last_wait = self.last_wait.checked_add(1).unwrap_or(1);
        Cookie(self.last_wait)
    }

    pub(super) fn signal(&mut self, request: &Point, hub: &Hub) -> Result<Answer, Refusal> {
        let (line, status) = (line(request.timeline.get())?, status(request.error.get())?);
        let signal = Signal { line, point: request.point.get(), status };
        let at = hub.host_signal(self.client, LeaseId(request.lease.get()), signal)?;
        Ok(Answer::Now(reached(Type::PointSignal, request.hdr.cookie.get(), at)))
    }

    pub(super) fn wait(&mut self, request: &Point, hub: &Hub) -> Result<Answer, Refusal> {
        let line = line(request.timeline.get())?;
        if request.error.get() != 0 {
            return Err(Status::Inval.into());
        }
        let (number, cookie) = (self.next_wait(), request.hdr.cookie.get());
        let timeout = Duration::from_nanos(request.timeout_ns.get());
        let wait = PointWait { line, point: request.point.get(), timeout, cookie: number };
        let full = self.waits.len() >= MAX_CLIENT_WAITS;
        match hub.host_wait(self.client, LeaseId(request.lease.get()), wait, full)? {
            Begun::Now(at) => Ok(Answer::Now(reached(Type::PointWait, cookie, at))),
            Begun::Waits => {
                self.waits.insert(number, (cookie, Type::PointWait));
                Ok(Answer::Later)
            }
        }
    }
}

/// The answer to a request of this type that is over.
pub fn reached(kind: Type, cookie: u64, reached: u64) -> Outgoing {
    let hdr = header(kind.to_wire(), Status::Ok, 0, cookie);
    RespPoint { hdr, reached: reached.into() }.as_bytes().to_vec().into()
}
