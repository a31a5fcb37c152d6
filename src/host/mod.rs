//! The host socket: programs on the host list, watch and use the buffers that VMs offer to it
//! (`spec/host-socket.md`).
//!
//! Both sides: `wire` holds the bytes, `packet` moves them, `image` reads what exporters say of their
//! pictures. Programs: `client` (`channel`, `values`, `holders` and `error` are its parts). Daemon:
//! `listener` admits, `server` is the thread, `conn` one connection, `request` one request (`inspect` two
//! of them), `watch` what is still to be told.

mod channel;
pub mod client;
pub mod conn;
pub mod error;
pub mod heirs;
pub mod holders;
pub mod image;
mod inspect;
pub mod listener;
pub mod packet;
mod request;
pub mod server;
pub mod values;
mod watch;
pub mod wire;
