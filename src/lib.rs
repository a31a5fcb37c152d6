//! Buffer sharing across virtual machines: the daemon's library.
pub mod host;
pub mod ioctl;
pub mod protocol;
