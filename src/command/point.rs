//! POINT_SIGNAL and POINT_WAIT as typed commands.

use std::time::Duration;

use super::{Command, Raw, id};
use crate::ids::Cookie;
use crate::protocol::{Line, Opcode, Point, Status};
use crate::registry::{PointWait, Signal};

/// The timeline that a request names.
pub fn line(number: u32) -> Result<Line, Status> {
    Line::from_wire(number).ok_or(Status::Inval)
}

/// What a SIGNAL tells those who wait. Not that they should try again, or they would, without end.
pub fn status(error: u32) -> Result<Status, Status> {
    let status = u16::try_from(error).ok().and_then(Status::from_wire);
    let again = [Status::Busy, Status::TimedOut, Status::Again];
    status.filter(|status| !again.contains(status)).ok_or(Status::Inval)
}

impl<'a> Raw<'a> {
    pub(super) fn signal(&self, flags: u16) -> Result<Command<'a>, Status> {
        let req: Point = self.fixed(Opcode::PointSignal, flags, 0)?;
        let (line, status) = (line(req.timeline.get())?, status(req.error.get())?);
        let signal = Signal { line, point: req.point.get(), status };
        Ok(Command::Signal { handle: id(req.handle), signal })
    }

    pub(super) fn wait(&self, flags: u16) -> Result<Command<'a>, Status> {
        let req: Point = self.fixed(Opcode::PointWait, flags, 0)?;
        let line = line(req.timeline.get())?;
        if req.error.get() != 0 {
            return Err(Status::Inval);
        }
        let wait = PointWait {
            line,
            point: req.point.get(),
            timeout: Duration::from_nanos(req.timeout_ns.get()),
            cookie: Cookie(req.hdr.cookie.get()),
        };
        Ok(Command::Wait { handle: id(req.handle), wait })
    }
}
