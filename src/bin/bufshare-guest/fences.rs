//! `bufshare-guest fences`: whether the driver finishes what this guest's own devices do to a buffer
//! before it tells others that an access is over. sw_sync of the guest's kernel plays those devices.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bufshare::ioctl::{ioctl_flat, ioctl_new_fd, iow, iowr};
use clap::Args;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::device::{Device, Offer, Source, heap_alloc};
use crate::{Failure, line, uapi};

const SW_SYNC: &str = "/sys/kernel/debug/sync/sw_sync";
const A_WHILE: Duration = Duration::from_millis(50);

const READ: u32 = uapi::SYNC_F_READ;
const WRITE: u32 = uapi::SYNC_F_WRITE;
const END: u32 = uapi::SYNC_F_END;

#[derive(Debug, Args)]
pub struct Fences {
    /// Use a buffer of this dma-heap instead of the device's: a foreign dma-buf.
    #[arg(long, value_name = "PATH")]
    heap: Option<PathBuf>,
    /// Only end an access that a device of this guest never ends, and wait to be killed.
    #[arg(long)]
    stuck: bool,
}

/// A device of this guest that works on a buffer.
struct Work {
    timeline: File,
}

fn wrong(what: &'static str) -> impl FnOnce(std::io::Error) -> Failure {
    move |source| Failure::Io { what: what.to_owned(), source }
}

impl Work {
    fn start(dmabuf: &OwnedFd, bits: u32) -> Result<Work, Failure> {
        let timeline = File::options().read(true).write(true).open(SW_SYNC);
        let timeline = timeline.map_err(wrong("opening sw_sync"))?;
        // SW_SYNC_IOC_CREATE_FENCE: value, name, fd.
        let mut arg = [0u32; 10];
        arg[0] = 1;
        let fence = ioctl_new_fd(timeline.as_fd(), iowr(b'W', 0, 40), &mut arg, 36);
        let fence = fence.map_err(wrong("making a fence"))?;
        // DMA_BUF_IOCTL_IMPORT_SYNC_FILE, whose bits are ours one place on.
        let mut arg = [(bits >> 1) as i32, fence.as_raw_fd()];
        ioctl_flat(dmabuf.as_fd(), iow(b'b', 3, 8), &mut arg).map_err(wrong("adding a fence"))?;
        Ok(Work { timeline })
    }

    /// SW_SYNC_IOC_INC.
    fn end(self) -> Result<(), Failure> {
        let done = ioctl_flat(self.timeline.as_fd(), iow(b'W', 1, 4), &mut 1u32);
        done.map(drop).map_err(wrong("ending a fence"))
    }
}

/// IN: no device of this guest writes to it; OUT: none uses it.
fn polled(dmabuf: &OwnedFd) -> Result<PollFlags, Failure> {
    let mut fds = [PollFd::new(dmabuf, PollFlags::IN | PollFlags::OUT)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    rustix::io::retry_on_intr(|| poll(&mut fds, Some(&now)))
        .map_err(|errno| wrong("poll")(errno.into()))?;
    Ok(fds[0].revents())
}

/// What was seen, against what must be.
pub fn expect<T: PartialEq + std::fmt::Debug>(
    what: &str,
    seen: T,
    right: T,
) -> Result<(), Failure> {
    if seen == right {
        return Ok(());
    }
    Err(Failure::Wrong(format!("{what}: {seen:?}, expected {right:?}")))
}

impl Fences {
    pub fn run(&self, device: &Device) -> Result<(), Failure> {
        let size = u64::from(device.info()?.granule);
        let dmabuf = match &self.heap {
            Some(heap) => heap_alloc(heap, size)?,
            None => device.alloc(size)?,
        };
        let access = uapi::ACCESS_READ | uapi::ACCESS_WRITE;
        let offer = Offer { access, name: "fences", ..Offer::default() };
        let handle = device.export(Source::DmaBuf(&dmabuf), &offer)?.handle;
        if self.stuck {
            let _work = Work::start(&dmabuf, WRITE)?;
            line("waiting")?;
            device.sync(handle, END | WRITE)?;
            return Err(Failure::Wrong("the end was declared over a running device".to_owned()));
        }

        let end = |flags, wait: Duration| match device.sync_for(handle, END | flags, wait) {
            Ok(_) => Ok(0),
            Err(error) if error.errno() != 0 => Ok(error.errno()),
            Err(error) => Err(error),
        };
        let generation = || device.query(handle).map(|state| state.generation);
        for (work, access, waits) in [
            (READ, READ, true),
            (READ, WRITE, false),
            (READ, READ | WRITE, true),
            (WRITE, READ, true),
            (WRITE, WRITE, true),
        ] {
            let what = format!("work {work}, access {access}");
            device.sync(handle, access)?;
            let before = generation()?;
            let running = Work::start(&dmabuf, work)?;
            let quiet = if work == READ { PollFlags::IN } else { PollFlags::empty() };
            expect(&format!("poll, {what}"), polled(&dmabuf)?, quiet)?;
            if waits {
                let nonblock = end(access | uapi::SYNC_F_NONBLOCK, Duration::MAX)?;
                expect(&format!("NONBLOCK, {what}"), nonblock, libc::EAGAIN)?;
                expect(&format!("timeout, {what}"), end(access, A_WHILE)?, libc::ETIMEDOUT)?;
                expect(&format!("generation, {what}"), generation()?, before)?;
                let over = AtomicBool::new(false);
                std::thread::scope(|scope| {
                    let worker = scope.spawn(|| {
                        std::thread::sleep(A_WHILE);
                        over.store(true, Ordering::SeqCst);
                        running.end()
                    });
                    expect(&format!("END, {what}"), end(access, Duration::MAX)?, 0)?;
                    expect(&format!("over, {what}"), over.load(Ordering::SeqCst), true)?;
                    worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
                })?;
            } else {
                expect(&format!("END, {what}"), end(access, Duration::MAX)?, 0)?;
                running.end()?;
            }
            expect(
                &format!("poll after {what}"),
                polled(&dmabuf)?,
                PollFlags::IN | PollFlags::OUT,
            )?;
            let declared = before + u64::from(access & WRITE != 0);
            expect(&format!("generation after {what}"), generation()?, declared)?;
        }
        line("fences right")
    }
}
