//! A fake front end for tests and benches: a daemon process, guests that drive it, and requests
//! that read like the spec.
//!
//!     let daemon = Daemon::start(&["a"]);
//!     let mut guest = Guest::connect(&daemon, "a");
//!     let (export, addr) = guest.export_pages(4);
//!     guest.grant(Grant { handle: 999, ..Default::default() }).refused(Status::NoEnt);
//!
//! It needs no KVM, no GPU and no privileges. Which mode (ZERO_COPY or COPY) a buffer has is the
//! host's affair: tests ask, they do not assume.

// Each test binary uses its own part of this.
#![allow(dead_code, unused_imports)]

mod daemon;
mod guest;
mod importer;
mod memory;
mod points;
mod requests;
mod ring;
mod vmm;

pub use daemon::{Daemon, Launch, skip, wait_for};
pub use guest::{
    F_EVENT_IDX, F_INDIRECT, F_PROTOCOL, F_VERSION_1, Guest, QUIET, SOON, Setup, Stop,
};
pub use importer::{Attach, Map, unmap_request};
pub use memory::{BASE, FREE, Memory, PAGE, Region};
pub use points::Point;
pub use requests::{
    Export, Grant, READ_WRITE, Refusal, Refused, Reply, Sync, handle_request, header, name, parse,
};
pub use ring::{Answer, Desc, INDIRECT, NEXT, Ring, Used, WRITE};
pub use vmm::{Asked, Behaviour, Manner, Vmm, WINDOW};
