//! A point of a buffer's ACQUIRE timeline, for trying out and for scripts.
//!
//! It knows a lease, and nothing of the content. The lease ends with the command; its own RELEASE
//! timeline would end with it, so there is nothing to say about that.

use std::time::Duration;

use bufshare::host::client::Client;
use bufshare::protocol::{Line, Status, access};
use clap::Args;

use crate::{Failure, find, show};

#[derive(Debug, Args)]
pub struct Wish {
    /// As `list` shows it; a name must be the only one of its kind.
    #[arg(value_name = "UUID|NAME")]
    buffer: String,
    /// Which point: the number of the content.
    #[arg(value_name = "NUMBER")]
    number: u64,
    /// Say that it is ready, rather than wait until it is.
    #[arg(long)]
    signal: bool,
    /// How long to wait.
    #[arg(long, value_name = "MS", default_value_t = 5000)]
    timeout_ms: u64,
}

impl Wish {
    /// What the timeline reached, as text.
    pub fn run(&self, client: &mut Client, as_json: bool) -> Result<String, Failure> {
        let buffer = find(client, &self.buffer)?;
        let write = if self.signal { access::WRITE } else { 0 };
        let lease = client.acquire(buffer.uuid, access::READ | write, false)?;
        let reached = if self.signal {
            client.signal(lease.id, Line::Acquire, self.number, Status::Ok)
        } else {
            let timeout = Duration::from_millis(self.timeout_ms);
            client.wait(lease.id, Line::Acquire, self.number, timeout)
        };
        client.release(lease)?;
        Ok(show::reached(reached?, as_json))
    }
}
