//! Buffer sharing across virtual machines: the daemon's library.
pub mod ids;
pub mod ioctl;
pub mod limits;
pub mod policy;
pub mod protocol;
pub mod registry;
