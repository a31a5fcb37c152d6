//! Buffer sharing across virtual machines: the daemon's library.
pub mod dmabuf;
pub mod host;
pub mod ids;
pub mod ioctl;
pub mod limits;
pub mod memory;
pub mod metrics;
pub mod policy;
pub mod protocol;
pub mod registry;
