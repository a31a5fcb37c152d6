//! `bufshare-guest rules`: whether the driver keeps apart those who use one buffer in this guest: what is
//! whose, who waits for whom, and what is left when only a path leads to a buffer.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::thread::{ScopedJoinHandle, scope, sleep};
use std::time::{Duration, Instant};

use bufshare::ioctl::{DmaBufSync, dma_buf_sync};
use clap::Args;

use crate::device::{Attached, Device, Error, Offer, Source};
use crate::follow::{Followed, Terms, Wanted};
use crate::{Failure, line, uapi};

const READ: u32 = uapi::SYNC_F_READ;
const WRITE: u32 = uapi::SYNC_F_WRITE;
const END: u32 = uapi::SYNC_F_END;
const BOTH: u32 = READ | WRITE;
/// How long others wait, and what is no wait on a slow machine.
const LONG: Duration = Duration::from_secs(6);
const SOON: Duration = Duration::from_secs(3);

#[derive(Debug, Args)]
pub struct Rules {
    /// A buffer of another peer that may be written, and that nobody else uses.
    #[arg(value_name = "NAME|UUID")]
    wanted: Wanted,
    /// Only keep a path to it, and nothing else, until it is taken away.
    #[arg(long)]
    path: bool,
}

fn expect<T: PartialEq + std::fmt::Debug>(what: &str, seen: T, right: T) -> Result<(), Failure> {
    if seen == right {
        return Ok(());
    }
    Err(Failure::Wrong(format!("{what}: {seen:?}, expected {right:?}")))
}

/// 0, or why it failed.
fn errno<T>(result: &Result<T, Error>) -> i32 {
    result.as_ref().err().map_or(0, Error::errno)
}

/// Must be answered at once, whatever others wait for.
fn at_once(
    what: &str,
    right: i32,
    run: impl FnOnce() -> Result<u64, Error>,
) -> Result<(), Failure> {
    let start = Instant::now();
    expect(what, errno(&run()), right)?;
    expect(&format!("{what} within {SOON:?}"), start.elapsed() < SOON, true)
}

fn join<T>(thread: ScopedJoinHandle<'_, T>) -> T {
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

impl Rules {
    pub fn run(&self, path: &Path) -> Result<(), Failure> {
        let device = Device::open(path)?;
        if self.path {
            return self.keep_path(&device);
        }
        own_exports(&device, &Device::open(path)?)?;
        let terms = Terms { access: BOTH >> 1, zero_copy: false, from: None };
        let followed = Followed::find(&device, &self.wanted, terms)?;
        let (one, file) = (&followed.buffer, Device::open(path)?);
        let other = file.attach(one.uuid, BOTH >> 1, false)?;
        who_waits(&device, one, &file, &other)?;
        who_leaves(&device, one, &file, &other)?;
        who_closes(path, one, &file, &other)?;
        line("rules right")
    }

    /// The dma-buf lives on with the path, but its file does not.
    fn keep_path(&self, device: &Device) -> Result<(), Failure> {
        let terms = Terms { access: uapi::ACCESS_READ, zero_copy: false, from: None };
        let Followed { buffer, mapping, .. } = Followed::find(device, &self.wanted, terms)?;
        let name = format!("/proc/self/fd/{}", buffer.fd.as_raw_fd());
        let path = File::options().read(true).custom_flags(libc::O_PATH).open(&name);
        let path =
            path.map_err(|source| Failure::Io { what: format!("opening {name}"), source })?;
        let handle = buffer.handle;
        drop((mapping, buffer));
        // Until the kernel has given its memory to others.
        sleep(Duration::from_secs(1));
        device.sync(handle, READ)?;
        device.sync(handle, END | READ)?;
        line("path kept")?;
        let end = loop {
            match device.event(None) {
                Ok(Some(event)) if event.kind == uapi::EVENT_REVOKED && event.handle == handle => {
                    break "revoked";
                }
                Ok(_) => {}
                Err(error) if error.errno() == libc::ENODEV => break "gone",
                Err(error) => return Err(error.into()),
            }
        };
        let refused = errno(&device.sync(handle, READ));
        expect(
            &format!("begin, {end}"),
            [libc::EOWNERDEAD, libc::ENODEV].contains(&refused),
            true,
        )?;
        drop(path);
        line(&format!("path ended {end}"))
    }
}

/// The UUID of an export is no right to it: who is to have it is given its descriptor.
fn own_exports(device: &Device, other: &Device) -> Result<(), Failure> {
    let size = u64::from(device.info()?.granule);
    let dmabuf = device.alloc(2 * size)?;
    let offer = Offer { access: uapi::ACCESS_READ, name: "own", ..Offer::default() };
    let pool = device.export(Source::DmaBuf(&dmabuf), &offer)?;
    let part = Source::Part { pool: pool.handle, offset: size, size };
    let part = device.export(part, &offer)?;
    for (what, export) in [("pool", pool), ("part", part)] {
        let own = device.attach(export.uuid, uapi::ACCESS_READ, false)?;
        expect(&format!("handle of the own {what}"), own.handle, 0)?;
        let refused = other.attach(export.uuid, uapi::ACCESS_READ, false);
        expect(&format!("{what} of another file"), errno(&refused), libc::ENOENT)?;
    }
    Ok(())
}

/// Nobody waits for a BEGIN of this guest that waits for another holder, and it goes on when that one leaves.
fn who_waits(
    device: &Device,
    one: &Attached,
    file: &Device,
    other: &Attached,
) -> Result<(), Failure> {
    let (one, other) = (one.handle, other.handle);
    file.sync(other, READ)?;
    device.sync(one, READ)?;
    scope(|scope| {
        let writer = scope.spawn(|| device.sync_for(one, WRITE, LONG));
        sleep(SOON / 6);
        at_once("NONBLOCK while another waits", libc::EAGAIN, || {
            device.sync(one, READ | uapi::SYNC_F_NONBLOCK)
        })?;
        at_once("END while another waits", 0, || device.sync(one, END | READ))?;
        at_once("END of the other holder", 0, || file.sync(other, END | READ))?;
        expect("BEGIN that waited", errno(&join(writer)), 0)
    })?;
    device.sync(one, END | WRITE)?;
    unheld(file, other)
}

/// Of two, one leaves and the other does not get in: nobody is left.
fn who_leaves(
    device: &Device,
    one: &Attached,
    file: &Device,
    other: &Attached,
) -> Result<(), Failure> {
    let (one, other) = (one.handle, other.handle);
    file.sync(other, READ)?;
    device.sync(one, READ)?;
    scope(|scope| {
        let writer = scope.spawn(|| device.sync_for(one, BOTH, SOON / 2));
        sleep(SOON / 6);
        at_once("END while another wants both", 0, || device.sync(one, END | READ))?;
        expect("BEGIN that is in vain", errno(&join(writer)), libc::ETIMEDOUT)
    })?;
    file.sync(other, END | READ)?;
    unheld(file, other)
}

/// Closing the file does not wait for who uses the dma-buf.
fn who_closes(path: &Path, one: &Attached, file: &Device, other: &Attached) -> Result<(), Failure> {
    let device = Device::open(path)?;
    let mine = device.attach(one.uuid, BOTH >> 1, false)?;
    file.sync(other.handle, READ)?;
    device.sync(mine.handle, READ)?;
    let access = DmaBufSync { end: false, read: false, write: true };
    scope(|scope| {
        let writer = scope.spawn(|| dma_buf_sync(mine.fd.as_fd(), access));
        sleep(SOON / 6);
        at_once("closing the file", 0, || {
            drop(device);
            Ok(0)
        })?;
        file.sync(other.handle, END | READ)?;
        let waited = join(writer);
        waited.map_err(|source| Failure::Io { what: "waiting by the dma-buf".into(), source })
    })?;
    let refused = file.sync(other.handle, READ | uapi::SYNC_F_NONBLOCK);
    expect("READ beside a writer", errno(&refused), libc::EAGAIN)?;
    drop(mine);
    Ok(())
}

/// No bit of anybody else is left behind.
fn unheld(file: &Device, other: u64) -> Result<(), Failure> {
    expect(
        "BEGIN of the other holder",
        errno(&file.sync(other, WRITE | uapi::SYNC_F_NONBLOCK)),
        0,
    )?;
    file.sync(other, END | WRITE)?;
    Ok(())
}
