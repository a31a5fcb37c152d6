//! `bufshare-guest points`: whether points of timelines are told to those who wait for them, as
//! `<linux/bufshare.h>` says. Most of it needs no second user of the buffer.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::time::{Duration, Instant};

use bufshare::protocol::{Status, peer};
use clap::Args;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::device::{Device, Exported, Offer, Point, Result as Asked, Source};
use crate::fences::expect;
use crate::{Failure, line, uapi};

const A_WHILE: Duration = Duration::from_millis(50);
/// For a thread to be waiting: under KASAN a system call takes long.
const UNDER_WAY: Duration = Duration::from_millis(500);
const SOON: Duration = Duration::from_secs(5);
/// A point that nobody signals.
const NEVER: u64 = u64::MAX;

#[derive(Debug, Args)]
pub struct Points {
    /// Only wait for a point that nobody signals, in a call and by an eventfd, and tell how that ends.
    #[arg(long)]
    stuck: bool,
    /// Only signal a point and wait for the next one, which the host signals, so many times.
    #[arg(long, value_name = "N")]
    turns: Option<u64>,
}

fn io(what: &'static str) -> impl FnOnce(std::io::Error) -> Failure {
    move |source| Failure::Io { what: what.to_owned(), source }
}

/// An eventfd.
pub struct Bell {
    file: File,
}

impl Bell {
    pub fn new() -> Result<Bell, Failure> {
        Ok(Bell { file: bufshare::ioctl::eventfd().map_err(io("making an eventfd"))? })
    }

    pub fn file(&self) -> &File {
        &self.file
    }

    /// How often it was rung; 0 where it was not in that time.
    pub fn rung(&self, timeout: Option<Duration>) -> Result<u64, Failure> {
        let timeout = timeout.map(|time| Timespec {
            tv_sec: time.as_secs() as i64,
            tv_nsec: i64::from(time.subsec_nanos()),
        });
        let mut fds = [PollFd::new(&self.file, PollFlags::IN)];
        let ready = rustix::io::retry_on_intr(|| poll(&mut fds, timeout.as_ref()));
        if ready.map_err(|errno| io("poll")(errno.into()))? == 0 {
            return Ok(0);
        }
        let mut count = [0; 8];
        (&self.file).read_exact(&mut count).map_err(io("reading an eventfd"))?;
        Ok(u64::from_ne_bytes(count))
    }
}

fn errno<T>(result: Asked<T>) -> i32 {
    result.map_or_else(|error| error.errno(), |_| 0)
}

fn wire(status: Status) -> u32 {
    status.to_wire().into()
}

/// A page that is exported, and may be written by whoever gets it.
fn export(device: &Device) -> Result<Exported, Failure> {
    let dmabuf = device.alloc(u64::from(device.info()?.granule))?;
    let access = uapi::ACCESS_READ | uapi::ACCESS_WRITE;
    let offer = Offer { access, name: "points", ..Offer::default() };
    Ok(device.export(Source::DmaBuf(&dmabuf), &offer)?)
}

/// While somebody waits for the point, `act`; what the wait ended with.
fn meanwhile(
    device: &Device,
    point: Point,
    act: impl FnOnce() -> Asked<()>,
) -> Result<i32, Failure> {
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| errno(device.wait(point, Some(SOON))));
        std::thread::sleep(UNDER_WAY);
        act()?;
        Ok(waits.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })
}

fn waits(device: &Device) -> Result<(), Failure> {
    let handle = export(device)?.handle;
    let (ready, done) = (|n| Point::ready(handle, n), |n| Point::done(handle, n));
    expect("the start", device.wait(ready(0), None)?, 0)?;
    expect("nobody uses it", device.wait(done(7), None)?, u64::MAX)?;
    device.signal(ready(1), 0)?;
    expect("signal before wait", device.wait(ready(1), Some(SOON))?, 1)?;
    expect("NONBLOCK", errno(device.wait(ready(2), None)), libc::EAGAIN)?;
    let start = Instant::now();
    let timeout = errno(device.wait(ready(2), Some(A_WHILE)));
    expect("timeout", (timeout, start.elapsed() >= A_WHILE), (libc::ETIMEDOUT, true))?;
    let ended = meanwhile(device, ready(2), || device.signal(ready(2), 0))?;
    expect("wait before signal", ended, 0)?;
    let ended = meanwhile(device, ready(3), || device.signal(ready(4), 0))?;
    expect("a point that is passed", ended, 0)?;

    let error = wire(Status::Io);
    let ended = meanwhile(device, ready(6), || device.signal(ready(6), error))?;
    expect("an error", ended, libc::EIO)?;
    expect("an error, later", errno(device.wait(ready(6), None)), libc::EIO)?;
    expect("the point before it", device.wait(ready(5), None)?, 6)?;
    device.signal(ready(7), 0)?;
    expect("an error that is passed", device.wait(ready(6), None)?, 7)?;

    for (what, point, error) in [
        ("not advancing", ready(7), 0),
        ("an unknown timeline", Point { timeline: 2, ..ready(9) }, 0),
        ("RELEASE of an export", done(9), 0),
        ("an unknown error", ready(9), 16),
        ("try again", ready(9), wire(Status::Again)),
        ("timed out", ready(9), wire(Status::TimedOut)),
        ("busy", ready(9), wire(Status::Busy)),
    ] {
        expect(what, errno(device.signal(point, error)), libc::EINVAL)?;
    }
    let nowhere = Point::ready(NEVER, 1);
    expect("no handle", errno(device.signal(nowhere, 0)), libc::ENOENT)?;
    expect("no handle", errno(device.wait(nowhere, None)), libc::ENOENT)?;
    let odd = Point { timeline: 2, ..ready(1) };
    expect("an unknown timeline", errno(device.wait(odd, None)), libc::EINVAL)?;
    let ended = meanwhile(device, ready(NEVER), || device.release(handle, false).map(drop))?;
    expect("RELEASE", ended, libc::ECANCELED)?;
    expect("after RELEASE", errno(device.wait(ready(1), None)), libc::ENOENT)
}

fn eventfds(device: &Device) -> Result<(), Failure> {
    let handle = export(device)?.handle;
    let ready = |n| Point::ready(handle, n);
    let bell = Bell::new()?;
    device.watch(ready(0), bell.file())?;
    expect("reached before", bell.rung(Some(SOON))?, 1)?;
    device.watch(ready(1), bell.file())?;
    expect("not reached", bell.rung(Some(A_WHILE))?, 0)?;
    device.signal(ready(1), 0)?;
    expect("reached", bell.rung(Some(SOON))?, 1)?;
    device.signal(ready(2), 0)?;
    expect("once", bell.rung(Some(A_WHILE))?, 0)?;
    device.watch(ready(3), bell.file())?;
    device.signal(ready(3), wire(Status::Io))?;
    expect("an error", bell.rung(Some(SOON))?, 1)?;
    expect("which", errno(device.wait(ready(3), None)), libc::EIO)?;
    let null = File::open("/dev/null").map_err(io("opening /dev/null"))?;
    expect("no eventfd", errno(device.watch(ready(9), &null)), libc::EINVAL)?;
    let nowhere = Point::ready(NEVER, 1);
    expect("no handle", errno(device.watch(nowhere, bell.file())), libc::ENOENT)?;
    device.watch(ready(NEVER), bell.file())?;
    device.release(handle, false)?;
    expect("RELEASE", bell.rung(Some(SOON))?, 1)?;
    expect("after RELEASE", errno(device.watch(ready(9), bell.file())), libc::ENOENT)
}

/// As many eventfds as may wait, and one more; then their file is closed.
fn bound(device: &Device, path: &Path) -> Result<(), Failure> {
    let limit = u64::from(device.info()?.max_waits) / 2;
    let other = Device::open(path)?;
    let handle = export(&other)?.handle;
    let bell = Bell::new()?;
    for _ in 0..limit {
        other.watch(Point::ready(handle, 1), bell.file())?;
    }
    expect("one more", errno(other.watch(Point::ready(handle, 1), bell.file())), libc::EBUSY)?;
    let mine = export(device)?.handle;
    let ended =
        meanwhile(device, Point::ready(mine, 1), || device.signal(Point::ready(mine, 1), 0));
    expect("room for others", ended?, 0)?;
    drop(other);
    let mut rung = 0;
    while rung < limit {
        match bell.rung(Some(SOON))? {
            0 => break,
            count => rung += count,
        }
    }
    expect("close", rung, limit)?;
    // What was closed goes in its own time.
    let start = Instant::now();
    while errno(device.watch(Point::ready(mine, 1), bell.file())) == libc::EBUSY {
        expect("room after close", start.elapsed() < SOON, true)?;
        std::thread::sleep(A_WHILE);
    }
    expect("after close", bell.rung(Some(SOON))?, 1)
}

/// An eventfd waits longer than a call may.
fn patience(device: &Device) -> Result<(), Failure> {
    let longest = Duration::from_millis(device.info()?.max_wait_ms.into());
    let handle = export(device)?.handle;
    let bell = Bell::new()?;
    device.watch(Point::ready(handle, 1), bell.file())?;
    expect("patience", bell.rung(Some(longest + SOON / 2))?, 0)?;
    device.signal(Point::ready(handle, 1), 0)?;
    expect("after that", bell.rung(Some(SOON))?, 1)
}

fn stuck(device: &Device) -> Result<(), Failure> {
    let handle = export(device)?.handle;
    let bell = Bell::new()?;
    device.watch(Point::ready(handle, NEVER), bell.file())?;
    line("waiting")?;
    let ended = loop {
        match errno(device.wait(Point::ready(handle, NEVER), Some(Duration::MAX))) {
            libc::ETIMEDOUT => {}
            errno => break errno,
        }
    };
    line(&format!("ended wait={ended} eventfd={}", bell.rung(Some(SOON))?))
}

fn turns(device: &Device, count: u64) -> Result<(), Failure> {
    let handle = export(device)?.handle;
    device.grant(handle, peer::HOST, uapi::ACCESS_READ | uapi::ACCESS_WRITE)?;
    line("exported")?;
    for turn in 0..count {
        device.signal(Point::ready(handle, 2 * turn + 1), 0)?;
        let reached = loop {
            match device.wait(Point::ready(handle, 2 * turn + 2), Some(Duration::MAX)) {
                Err(error) if error.errno() == libc::ETIMEDOUT => {}
                other => break other?,
            }
        };
        expect("the host's turn", reached, 2 * turn + 2)?;
    }
    line(&format!("turns={count}"))
}

impl Points {
    pub fn run(&self, device: &Device, path: &Path) -> Result<(), Failure> {
        if self.stuck {
            return stuck(device);
        }
        if let Some(count) = self.turns {
            return turns(device, count);
        }
        waits(device)?;
        eventfds(device)?;
        bound(device, path)?;
        patience(device)?;
        line("points right")
    }
}
