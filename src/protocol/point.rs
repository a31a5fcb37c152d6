//! The bytes of POINT_SIGNAL and POINT_WAIT.

use super::*;

wire_enum! {
    /// Timelines.
    Line: u32 {
        Acquire = 0, "ACQUIRE";
        Release = 1, "RELEASE";
    }
}
wire_struct! {
    /// POINT_SIGNAL, POINT_WAIT.
    Point [40] { hdr: Req, handle: U64, timeline: U32, error: U32, point: U64, timeout_ns: U64, }
}
wire_struct! {
    /// Answer to POINT_*.
    RespPoint [16] { hdr: Resp, reached: U64, }
}
