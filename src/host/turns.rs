//! Taking turns with an exporter by the timelines of a lease: it says "content N is ready" on ACQUIRE and may draw the
//! next when this client says "I am done with N" on RELEASE.
//!
//! It knows points, not how the content is used in between, nor what SYNC does.

use std::collections::VecDeque;

use super::channel::Result;
use super::client::Client;
use crate::protocol::{Line, Status};

/// One lease's turns.
#[derive(Debug)]
pub struct Turns {
    lease: u64,
    /// The last content that was ready.
    seen: u64,
    /// A WAIT that is pending, and for what.
    wait: Option<(u64, u64)>,
    /// What was expected, and what was there then: contents that this client has.
    uses: VecDeque<(u64, u64)>,
}

impl Turns {
    /// The first content is the one that is there already.
    pub fn new(lease: u64) -> Turns {
        Turns { lease, seen: 0, wait: None, uses: VecDeque::new() }
    }

    /// The last content that was ready; 0: none.
    pub fn seen(&self) -> u64 {
        self.seen
    }

    /// What is expected, if [`Turns::ready`] has not told it yet.
    pub fn expected(&self) -> Option<u64> {
        self.wait.map(|(_, point)| point)
    }

    /// Expects the content that follows, once; the lowest point that it can have.
    pub fn expect(&mut self, client: &mut Client) -> Result<u64> {
        let point = self.expected().unwrap_or(self.seen.saturating_add(1));
        if self.wait.is_none() {
            self.ask(client, point)?;
        }
        Ok(point)
    }

    fn ask(&mut self, client: &mut Client, point: u64) -> Result<()> {
        let timeout = client.daemon().max_wait;
        self.wait = Some((client.submit_wait(self.lease, Line::Acquire, point, timeout)?, point));
        Ok(())
    }

    /// The expected content, if it is ready: call it when the client was dispatched. `Err` of kind Refused also
    /// where the exporter signalled the point with an error: then nothing is expected any more.
    pub fn ready(&mut self, client: &mut Client) -> Result<Option<u64>> {
        let Some((cookie, point)) = self.wait else { return Ok(None) };
        match client.take_reached(cookie) {
            Ok(None) => Ok(None),
            Ok(Some(reached)) => {
                self.wait = None;
                self.seen = reached;
                self.uses.push_back((point, reached));
                Ok(Some(reached))
            }
            // The daemon lets nobody wait for ever.
            Err(error) if error.status() == Some(Status::TimedOut) => {
                self.ask(client, point).map(|()| None)
            }
            Err(error) => {
                self.wait = None;
                Err(error)
            }
        }
    }

    /// Hands back what was expected as `point` or before.
    pub fn hand_back(&mut self, client: &mut Client, point: u64) -> Result<()> {
        let mut done = None;
        while let Some((_, content)) = self.uses.front().filter(|(expected, _)| *expected <= point)
        {
            done = Some(*content);
            self.uses.pop_front();
        }
        match done {
            Some(content) => {
                client.signal(self.lease, Line::Release, content, Status::Ok).map(drop)
            }
            None => Ok(()),
        }
    }
}
