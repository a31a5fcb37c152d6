//! What only time brings to light: cycles without end, and deaths between any two commands. Nothing of the
//! daemon may grow, nothing may be lost or counted twice, and whatever is asked is answered as the registry
//! alone would answer it.
//!
//! Each part lasts BUFSHARE_LONG_SECONDS (5 if unset; 30 in `./test`); each file says how it
//! is run at full length.

#[path = "../common/mod.rs"]
mod common;

mod deaths;
mod soak;
mod twin;

use std::time::{Duration, Instant};

use bufshare::host::client::Client;
use common::{Daemon, SOON, wait_for};

fn from_env(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|e| panic!("{name}={text}: {e}")))
}

/// When this part is over.
fn end() -> Instant {
    Instant::now() + Duration::from_secs(from_env("BUFSHARE_LONG_SECONDS").unwrap_or(5))
}

/// What the daemon has on its books.
fn books(daemon: &Daemon) -> [u64; 5] {
    let mut client = Client::connect(&daemon.host_socket(), "books").expect("host socket");
    let stats = client.stats().expect("STATS");
    ["buffers", "bytes_exported", "attachments", "mappings", "leases"].map(|name| {
        stats.iter().find(|(known, _)| known == name).unwrap_or_else(|| panic!("{name}")).1
    })
}

/// Panics unless nothing is on the daemon's books any more, and it has no more descriptors than before.
#[track_caller]
fn assert_nothing_left(daemon: &Daemon, fds: usize) {
    wait_for(SOON, || books(daemon) == [0; 5]);
    assert_eq!(books(daemon), [0; 5], "buffers, bytes, attachments, mappings, leases");
    // Who asked for the books is gone, too, when its connection is closed.
    wait_for(SOON, || daemon.fds() <= fds);
    assert!(
        daemon.fds() <= fds,
        "{} descriptors, {fds} before: {:#?}",
        daemon.fds(),
        daemon.fd_names()
    );
}
