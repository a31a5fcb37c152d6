//! The host socket: programs on the host list, watch and use the buffers that VMs offer to it.
//!
//! `wire` holds the bytes, `client` the library for programs.

pub mod wire;
