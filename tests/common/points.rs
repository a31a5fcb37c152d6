//! POINT_SIGNAL and POINT_WAIT, with named arguments.
//!
//! It knows the layout of messages, not how they travel.

use bufshare::protocol::{self as wire, Line, Opcode, RespPoint};
use zerocopy::IntoBytes;

use super::guest::Guest;
use super::requests::{Reply, header};

/// POINT_SIGNAL or POINT_WAIT.
#[derive(Debug, Clone, Copy)]
pub struct Point {
    /// For CANCEL.
    pub cookie: u32,
    /// Export or attachment.
    pub handle: u64,
    /// Which timeline.
    pub timeline: u32,
    /// A status.
    pub error: u32,
    /// Which point.
    pub point: u64,
    /// How long to wait.
    pub timeout_ns: u64,
}

impl Point {
    /// A point of a handle's timeline.
    pub fn new(handle: u64, line: Line, point: u64) -> Point {
        Point { cookie: 0, handle, timeline: line.to_wire(), error: 0, point, timeout_ns: 0 }
    }

    fn bytes(&self, opcode: Opcode) -> Vec<u8> {
        let mut request = wire::Point {
            hdr: header(opcode, 0),
            handle: self.handle.into(),
            timeline: self.timeline.into(),
            error: self.error.into(),
            point: self.point.into(),
            timeout_ns: self.timeout_ns.into(),
        };
        request.hdr.cookie = self.cookie.into();
        request.as_bytes().to_vec()
    }
}

impl Guest {
    /// POINT_SIGNAL; what is reached.
    #[track_caller]
    pub fn signal(&mut self, request: Point) -> Reply<u64> {
        self.sync::<RespPoint>(&request.bytes(Opcode::PointSignal)).map(|r| r.reached.get())
    }

    /// POINT_WAIT, waited for; what is reached.
    #[track_caller]
    pub fn wait_point(&mut self, request: Point) -> Reply<u64> {
        self.sync::<RespPoint>(&request.bytes(Opcode::PointWait)).map(|r| r.reached.get())
    }

    /// POINT_WAIT that may stay pending; its head names it.
    #[track_caller]
    pub fn start_wait(&mut self, request: Point) -> u16 {
        self.sync_start::<RespPoint>(&request.bytes(Opcode::PointWait))
    }

    /// POINT_SIGNAL while others are pending; its head names it.
    #[track_caller]
    pub fn start_signal(&mut self, request: Point) -> u16 {
        self.sync_start::<RespPoint>(&request.bytes(Opcode::PointSignal))
    }
}
