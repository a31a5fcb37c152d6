//! Buffer sharing across virtual machines: the daemon's library.
pub mod command;
pub mod dmabuf;
pub mod execute;
pub mod host;
pub mod hub;
pub mod ids;
pub mod ioctl;
pub mod limits;
pub mod memory;
pub mod metrics;
pub mod policy;
pub mod protocol;
pub mod queue;
pub mod registry;
pub mod reply;
