//! The host socket: programs on the host list, watch and use the buffers that VMs offer to it
//! (`spec/host-socket.md`).
//!
//! `wire` holds the bytes, `packet` moves them, `client` is the library for programs (`channel` and
//! `values` are its parts), `image` reads what exporters say of their pictures.

mod channel;
pub mod client;
pub mod error;
pub mod image;
pub mod packet;
pub mod values;
pub mod wire;
