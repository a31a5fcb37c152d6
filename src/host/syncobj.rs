//! A lease's timelines as drm_syncobj timelines, which compositors and the drivers of GPUs understand.
//!
//! [`Bridge`] passes points on, one way each: ACQUIRE from the daemon to the kernel, RELEASE from the kernel to the
//! daemon. It knows no compositor, and the daemon knows no DRM. What is not passed on when the process ends never is:
//! whoever waits for an ACQUIRE point in the kernel then gets its own end of the lease.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use drm::control::{Device as _, syncobj};
use drm::{Device, DriverCapability};
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;
use thiserror::Error;

use super::client::{self, Client};
use super::turns::Turns;

/// Why points are not passed on.
#[derive(Debug, Error)]
#[allow(missing_docs)]
pub enum Error {
    #[error(transparent)]
    Client(#[from] client::Error),
    #[error("a timeline of the kernel (drm_syncobj) failed")]
    Kernel(#[from] io::Error),
}

/// A DRM device that has timelines. They are good for every device of this host.
#[derive(Debug)]
pub struct Node(File);

impl AsFd for Node {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
impl Device for Node {}
impl drm::control::Device for Node {}

impl Node {
    /// The first render node that has timelines, if there is one.
    pub fn find() -> Option<Arc<Node>> {
        let entries = std::fs::read_dir("/dev/dri").ok()?;
        let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
        paths.retain(|path| path.to_string_lossy().contains("/renderD"));
        paths.sort();
        paths.iter().find_map(|path| Node::open(path).ok())
    }

    /// Unsupported where the device's driver has no timelines, or the kernel no eventfd for them (Linux 6.6).
    pub fn open(path: &Path) -> io::Result<Arc<Node>> {
        let node = Arc::new(Node(File::options().read(true).write(true).open(path)?));
        let unsupported = io::ErrorKind::Unsupported;
        if node.get_driver_capability(DriverCapability::TimelineSyncObj)? == 0 {
            return Err(unsupported.into());
        }
        Timeline::new(&node)?
            .tell(1, &new_eventfd()?)
            .map_err(|error| io::Error::new(unsupported, error))?;
        Ok(node)
    }
}

fn new_eventfd() -> io::Result<OwnedFd> {
    Ok(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)
}

/// A timeline of the kernel.
#[derive(Debug)]
pub struct Timeline {
    node: Arc<Node>,
    handle: syncobj::Handle,
}

impl Timeline {
    /// A new one, at 0.
    pub fn new(node: &Arc<Node>) -> io::Result<Timeline> {
        Ok(Timeline { node: node.clone(), handle: node.create_syncobj(false)? })
    }

    /// The one that somebody else shares.
    pub fn of(node: &Arc<Node>, fd: BorrowedFd<'_>) -> io::Result<Timeline> {
        Ok(Timeline { node: node.clone(), handle: node.fd_to_syncobj(fd, false)? })
    }

    /// For others to import.
    pub fn share(&self) -> io::Result<OwnedFd> {
        self.node.syncobj_to_fd(self.handle, false)
    }

    /// Says that a point is reached, which has to be higher than those before.
    pub fn signal(&self, point: u64) -> io::Result<()> {
        self.node.syncobj_timeline_signal(&[self.handle], &[point])
    }

    /// The highest point that is reached.
    pub fn reached(&self) -> io::Result<u64> {
        let mut point = [0];
        self.node.syncobj_timeline_query(&[self.handle], &mut point, false)?;
        Ok(point[0])
    }

    /// Makes an eventfd readable when a point is reached.
    pub fn tell(&self, point: u64, eventfd: &OwnedFd) -> io::Result<()> {
        self.node.syncobj_eventfd(self.handle, point, eventfd.as_fd(), false)
    }
}

impl Drop for Timeline {
    fn drop(&mut self) {
        if let Err(error) = self.node.destroy_syncobj(self.handle) {
            log::debug!("destroying a timeline: {error}");
        }
    }
}

/// The timelines of a lease and two of the kernel. For poll loops: call [`Bridge::pass_on`] when this or the
/// client is readable.
#[derive(Debug)]
pub struct Bridge {
    turns: Turns,
    acquire: Timeline,
    release: Timeline,
    /// Readable when something is handed back.
    handed_back: OwnedFd,
}

impl AsFd for Bridge {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.handed_back.as_fd()
    }
}

impl Bridge {
    /// Both of the kernel's timelines start at 0.
    pub fn new(node: &Arc<Node>, lease: u64) -> io::Result<Bridge> {
        let (acquire, release) = (Timeline::new(node)?, Timeline::new(node)?);
        let handed_back = new_eventfd()?;
        Ok(Bridge { turns: Turns::new(lease), acquire, release, handed_back })
    }

    /// Reaches a point when the exporter's content is ready.
    pub fn acquire(&self) -> &Timeline {
        &self.acquire
    }

    /// For the consumer to signal when it is done.
    pub fn release(&self) -> &Timeline {
        &self.release
    }

    /// The last content that was ready, in the exporter's count; 0: none.
    pub fn seen(&self) -> u64 {
        self.turns.seen()
    }

    /// Expects the content that follows: the point of both timelines that a consumer waits for and signals.
    pub fn expect(&mut self, client: &mut Client) -> Result<u64, Error> {
        let point = self.turns.expect(client)?;
        self.release.tell(point, &self.handed_back)?;
        Ok(point)
    }

    /// Passes on what was reached. The exporter's point, once, when the expected content is ready.
    pub fn pass_on(&mut self, client: &mut Client) -> Result<Option<u64>, Error> {
        let ready = match self.turns.ready(client) {
            Ok(ready) => ready,
            Err(error) => {
                self.give_up()?;
                return Err(error.into());
            }
        };
        if let Some(reached) = ready {
            self.acquire.signal(reached)?;
        }
        match rustix::io::read(&self.handed_back, &mut [0; 8]) {
            // A consumer may be done before it was ready: it did not need it.
            Err(Errno::AGAIN) if ready.is_none() => {}
            Ok(_) | Err(Errno::AGAIN) => self.turns.hand_back(client, self.release.reached()?)?,
            Err(error) => return Err(io::Error::from(error).into()),
        }
        Ok(ready)
    }

    /// Lets go whoever waits in the kernel for content that will not come.
    pub fn give_up(&mut self) -> io::Result<()> {
        let next = self.turns.seen().saturating_add(1);
        if self.acquire.reached()? < next { self.acquire.signal(next) } else { Ok(()) }
    }
}
