//! One buffer in a window: generation after generation, by SYNC, at the compositor's pace.
//!
//! It knows when to ask for what (`pace`), not how the compositor is spoken to.

use std::time::{Duration, Instant};

use bufshare::host::client::{Access, Event};
use bufshare::protocol::Status;
use wayland_client::{Connection, EventQueue};

use crate::display::{Display, Told};
use crate::failure::Failure;
use crate::pace::{Pace, Step};
use crate::{Args, Parts, Picture, Reason, say};

/// BEGIN waits this long before it is repeated.
const BEGIN_TIMEOUT: Duration = Duration::from_millis(100);
/// A window that gets no frame callback for this long is not seen by anybody.
const UNSEEN: Duration = Duration::from_secs(1);

/// Shows it until something ends that, and hands it back.
pub fn run(
    args: &Args,
    parts: Parts,
    picture: Picture,
    connection: &Connection,
    events: &mut EventQueue<Display>,
) -> Result<Reason, Failure> {
    let mut show = Show {
        pace: Pace::new(picture.lease.buffer.generation, args.once),
        parts,
        picture,
        configured: false,
        begin: None,
        frames_left: args.frames,
        waiting_since: Instant::now(),
    };
    let reason = show.follow(connection, events)?;
    show.parts.hand_back(vec![show.picture], show.configured, events)?;
    Ok(reason)
}

/// One window, one lease.
struct Show {
    pace: Pace,
    parts: Parts,
    picture: Picture,
    configured: bool,
    /// The pending BEGIN.
    begin: Option<u64>,
    frames_left: Option<u64>,
    /// Since when a frame callback is awaited.
    waiting_since: Instant,
}

impl Show {
    /// Shows generation after generation until something ends it.
    fn follow(
        &mut self,
        connection: &Connection,
        events: &mut EventQueue<Display>,
    ) -> Result<Reason, Failure> {
        loop {
            events.dispatch_pending(&mut self.parts.display)?;
            self.parts.client.dispatch()?;
            if let Some(reason) = self.daemon_told()? {
                return Ok(reason);
            }
            while let Some(told) = self.parts.display.told.pop_front() {
                match told {
                    Told::Configured => self.configured = true,
                    Told::FrameDone(commit) => self.pace.frame_done(commit),
                    Told::Released(_) => self.pace.released(),
                    Told::Closed => return Ok("closed"),
                }
            }
            if self.pace.awaits_frame() && self.waiting_since.elapsed() >= UNSEEN {
                self.pace.unseen();
                self.waiting_since = Instant::now();
            }
            if let Some(reason) = self.take_steps()? {
                return Ok(reason);
            }
            let since = self.waiting_since;
            let timeout = self.pace.awaits_frame().then(|| UNSEEN.saturating_sub(since.elapsed()));
            if !self.parts.client.has_news() && self.parts.wait(connection, events, &[], timeout)? {
                return Ok("signal");
            }
        }
    }

    /// Takes in what the daemon told; why the show is over, if it is.
    fn daemon_told(&mut self) -> Result<Option<Reason>, Failure> {
        if let Some(cookie) = self.begin {
            match self.parts.client.take_generation(cookie) {
                Ok(None) => {}
                Ok(Some(generation)) => {
                    self.begin = None;
                    self.pace.begun(generation);
                }
                Err(error) => match error.status() {
                    Some(Status::TimedOut | Status::Again | Status::Busy) => {
                        self.begin = None;
                        self.pace.begin_failed();
                    }
                    Some(Status::Revoked | Status::NoEnt) => return Ok(Some("revoked")),
                    _ => return Err(error.into()),
                },
            }
        }
        while let Some(event) = self.parts.client.take_event() {
            match event {
                Event::Changed(buffer) | Event::Offered(buffer) => {
                    self.pace.changed(buffer.generation);
                }
                Event::Withdrawn { .. } => return Ok(Some("withdrawn")),
                Event::Revoked { .. } => return Ok(Some("revoked")),
                // It exports nothing.
                Event::Busy(_) | Event::Idle(_) | Event::Released { .. } => {}
                Event::Resync => self.parts.client.watch(Some(self.picture.lease.buffer.uuid))?,
            }
        }
        Ok(None)
    }

    fn take_steps(&mut self) -> Result<Option<Reason>, Failure> {
        // Nothing may be attached before the first configure event.
        while self.configured {
            let Some(step) = self.pace.next_step() else { break };
            match step {
                Step::Begin => {
                    let begin = self.parts.client.submit_begin(
                        self.picture.lease.id,
                        Access::READ,
                        BEGIN_TIMEOUT,
                    );
                    self.begin = Some(begin?);
                }
                Step::Show | Step::Settle => {
                    self.waiting_since = Instant::now();
                    let content = (step == Step::Show).then_some(&self.picture.buffer);
                    self.parts.display.commit(&self.parts.window, content, self.pace.commit());
                }
                Step::End => match self.parts.client.end(self.picture.lease.id, Access::READ) {
                    Ok(_) => {}
                    Err(error) if error.status() == Some(Status::Revoked) => {
                        return Ok(Some("revoked"));
                    }
                    Err(error) => return Err(error.into()),
                },
                Step::Shown(generation) => {
                    say(format_args!("shown generation {generation}"));
                    if let Some(left) = &mut self.frames_left {
                        *left = left.saturating_sub(1);
                        if *left == 0 {
                            return Ok(Some("frames shown"));
                        }
                    }
                }
            }
        }
        Ok(None)
    }
}
