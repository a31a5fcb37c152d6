//! The host socket: programs on the host list, watch and use the buffers that VMs offer to it, and lend
//! buffers to VMs (`spec/host-socket.md`).
//!
//! Both sides: `wire` holds the bytes, `packet` moves them, `image` reads what exporters say of their
//! pictures. Programs: `client` (`channel`, `lend`, `values`, `holders` and `error` are its parts), `turns` and
//! `syncobj` for those that use timelines.
//! Daemon: `listener` admits, `server` is the thread (`jobs` beside it), `conn` one connection, `request`
//! one request (`export`, `inspect` and `lists` are its parts), `watch` what is still to be told.

mod channel;
pub mod client;
pub mod conn;
pub mod error;
mod export;
pub mod heirs;
pub mod holders;
pub mod image;
mod inspect;
mod jobs;
mod lend;
pub mod listener;
mod lists;
pub mod packet;
mod request;
pub mod server;
pub mod syncobj;
pub mod turns;
pub mod values;
mod watch;
pub mod wire;
