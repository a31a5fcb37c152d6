//! Several buffers in a window, the images of a swapchain: each is shown in its turn, once its exporter says on its
//! ACQUIRE timeline that its content is ready, and handed back on its RELEASE timeline when the compositor is done.
//!
//! Where the compositor and this host have the kernel's timelines, an image is committed before it is ready, and the
//! compositor waits for it; else this program does. It knows nothing of SYNC.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bufshare::host::client::{Client, Event};
use bufshare::host::syncobj::{self, Bridge, Node};
use bufshare::host::turns::Turns;
use bufshare::host::wire::FdKind;
use bufshare::protocol::Status;
use uuid::Uuid;
use wayland_client::{Connection, EventQueue, Proxy};

use crate::display::{Display, Told};
use crate::explicit::{Explicit, Lines};
use crate::failure::Failure;
use crate::{Args, Parts, Picture, Reason, say};

/// A window that gets no frame callback for this long is not seen by anybody: the exporter is not to wait for that.
const UNSEEN: Duration = Duration::from_secs(1);

/// Shows them until something ends that, and hands them back.
pub fn run(
    args: &Args,
    parts: Parts,
    pictures: Vec<Picture>,
    connection: &Connection,
    events: &mut EventQueue<Display>,
) -> Result<Reason, Failure> {
    let dma_bufs = pictures.iter().all(|picture| picture.lease.fd_kind == FdKind::DmaBuf);
    let explicit = dma_bufs && parts.display.explicit.is_some() && !args.no_explicit_sync;
    let node = if explicit { Node::find() } else { None };
    say(format_args!("sync {}", if node.is_some() { "explicit" } else { "implicit" }));
    let mut images = Vec::new();
    for picture in pictures {
        let ready = Ready::of(&picture, node.as_ref(), &parts.display)?;
        images.push(Image { picture, ready });
    }
    let explicit = node.and_then(|_| Explicit::of(&parts.display, &parts.window));
    let mut swap = Swap {
        parts,
        images,
        explicit,
        next: 0,
        turn: Turn::Begins,
        commits: 0,
        configured: false,
        frames_left: args.frames,
    };
    let reason = swap.follow(connection, events)?;
    swap.hand_back(events)?;
    Ok(reason)
}

/// Who waits until an image is ready.
enum Ready {
    /// The compositor.
    There(Bridge, Lines),
    /// This program.
    Here(Turns),
}

impl Ready {
    fn of(
        picture: &Picture,
        node: Option<&Arc<Node>>,
        display: &Display,
    ) -> Result<Ready, Failure> {
        let lease = picture.lease.id;
        let Some(node) = node else { return Ok(Ready::Here(Turns::new(lease))) };
        let bridge = Bridge::new(node, lease).map_err(Failure::Kernel)?;
        let lines = Lines::import(display, bridge.acquire(), bridge.release());
        match lines.map_err(Failure::Kernel)? {
            Some(lines) => Ok(Ready::There(bridge, lines)),
            None => Ok(Ready::Here(Turns::new(lease))),
        }
    }

    /// What became ready, in the exporter's count.
    fn look(&mut self, client: &mut Client) -> Result<Option<u64>, syncobj::Error> {
        match self {
            Ready::There(bridge, _) => bridge.pass_on(client),
            Ready::Here(turns) => Ok(turns.ready(client)?),
        }
    }

    fn seen(&self) -> u64 {
        match self {
            Ready::There(bridge, _) => bridge.seen(),
            Ready::Here(turns) => turns.seen(),
        }
    }
}

struct Image {
    picture: Picture,
    ready: Ready,
}

/// Of the image whose turn it is.
#[derive(Clone, Copy)]
enum Turn {
    Begins,
    /// It is not ready, but committed where the compositor waits for it.
    Expected,
    /// It is ready, and committed.
    Ready(Instant),
}

struct Swap {
    parts: Parts,
    images: Vec<Image>,
    explicit: Option<Explicit>,
    /// Whose turn it is.
    next: usize,
    turn: Turn,
    commits: u64,
    configured: bool,
    frames_left: Option<u64>,
}

impl Swap {
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
            if let Some(reason) = self.compositor_told()? {
                return Ok(reason);
            }
            let unseen = match self.turn {
                Turn::Ready(since) => Some(UNSEEN.saturating_sub(since.elapsed())),
                Turn::Begins | Turn::Expected => None,
            };
            if unseen == Some(Duration::ZERO) {
                self.turn_over("unseen");
            }
            if self.configured && matches!(self.turn, Turn::Begins) {
                self.begin_turn()?;
                continue;
            }
            let fds: Vec<BorrowedFd<'_>> = self.images.iter().filter_map(Image::fd).collect();
            if !self.parts.client.has_news() && self.parts.wait(connection, events, &fds, unseen)? {
                return Ok("signal");
            }
        }
    }

    fn daemon_told(&mut self) -> Result<Option<Reason>, Failure> {
        for index in 0..self.images.len() {
            match self.images[index].ready.look(&mut self.parts.client) {
                Ok(None) => {}
                Ok(Some(_)) => {
                    self.turn = Turn::Ready(Instant::now());
                    if self.explicit.is_none() {
                        self.commit(index, None);
                    }
                }
                Err(syncobj::Error::Client(error))
                    if matches!(error.status(), Some(Status::Revoked | Status::NoEnt)) =>
                {
                    return Ok(Some("revoked"));
                }
                Err(error) => return Err(error.into()),
            }
        }
        let ours = |uuid: Uuid| self.images.iter().any(|image| image.uuid() == uuid);
        while let Some(event) = self.parts.client.take_event() {
            match event {
                Event::Withdrawn { uuid, .. } if ours(uuid) => return Ok(Some("withdrawn")),
                Event::Revoked { uuid, .. } if ours(uuid) => return Ok(Some("revoked")),
                Event::Resync => self.parts.client.watch(None)?,
                _ => {}
            }
        }
        Ok(None)
    }

    fn compositor_told(&mut self) -> Result<Option<Reason>, Failure> {
        while let Some(told) = self.parts.display.told.pop_front() {
            match told {
                Told::Configured => self.configured = true,
                Told::FrameDone(commit) => {
                    if commit == self.commits && matches!(self.turn, Turn::Ready(_)) {
                        self.turn_over("shown");
                        if let Some(left) = &mut self.frames_left {
                            *left = left.saturating_sub(1);
                            if *left == 0 {
                                return Ok(Some("frames shown"));
                            }
                        }
                    }
                }
                Told::Released(id) => {
                    let found =
                        self.images.iter_mut().find(|image| image.picture.buffer.id() == id);
                    if let Some(Image { ready: Ready::Here(turns), .. }) = found {
                        turns.hand_back(&mut self.parts.client, u64::MAX)?;
                    }
                }
                Told::Closed => return Ok(Some("closed")),
            }
        }
        Ok(None)
    }

    fn begin_turn(&mut self) -> Result<(), Failure> {
        self.turn = Turn::Expected;
        let client = &mut self.parts.client;
        let point = match &mut self.images[self.next].ready {
            Ready::There(bridge, _) => Some(bridge.expect(client)?),
            Ready::Here(turns) => turns.expect(client).map(|_| None)?,
        };
        if point.is_some() {
            self.commit(self.next, point);
        }
        Ok(())
    }

    fn commit(&mut self, index: usize, point: Option<u64>) {
        let image = &self.images[index];
        if let (Some(explicit), Ready::There(_, lines), Some(point)) =
            (&self.explicit, &image.ready, point)
        {
            explicit.set(lines, point);
        }
        self.commits += 1;
        let Parts { display, window, .. } = &mut self.parts;
        display.commit(window, Some(&image.picture.buffer), self.commits);
    }

    fn turn_over(&mut self, how: &str) {
        let image = &self.images[self.next];
        let name = &image.picture.lease.buffer.name;
        say(format_args!("{how} {name:?} point {}", image.ready.seen()));
        self.next = (self.next + 1) % self.images.len();
        self.turn = Turn::Begins;
    }

    fn hand_back(mut self, events: &mut EventQueue<Display>) -> Result<(), Failure> {
        // The compositor would wait for what does not come, and not show anything later.
        for image in &mut self.images {
            if let Ready::There(bridge, _) = &mut image.ready {
                bridge.give_up().map_err(Failure::Kernel)?;
            }
        }
        if let Some(explicit) = self.explicit.take() {
            explicit.end();
            // It need not tell of releases then.
            self.parts.display.busy.clear();
        }
        let pictures = self.images.into_iter().map(|image| image.picture).collect();
        self.parts.hand_back(pictures, self.configured, events)
    }
}

impl Image {
    fn uuid(&self) -> Uuid {
        self.picture.lease.buffer.uuid
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        match &self.ready {
            Ready::There(bridge, _) => Some(bridge.as_fd()),
            Ready::Here(_) => None,
        }
    }
}
