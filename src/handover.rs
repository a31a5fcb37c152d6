//! How a daemon's successor gets what it leaves: named descriptors, one a message, through the service
//! manager's store of descriptors (sd_notify(3), FDSTORE) or straight through a hand-over socket.
//!
//! It knows names and sockets, not what the descriptors are, nor what the one called [`STATE`] says. A
//! successor that dies meanwhile takes the rest with it.

use std::env;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use log::{info, warn};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

use crate::host::packet::{self, Wait};
use crate::ioctl;

/// The descriptor that says what the others are.
pub const STATE: &str = "state";
/// Names in the service manager's store begin with it.
const PREFIX: &str = "bufshare-";
/// The last message through a hand-over socket.
const END: &str = "end";
/// The service manager passes descriptors from this one on.
const FIRST_PASSED: i32 = 3;
/// How long the other side may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// Descriptors with their names.
pub type Parcel = Vec<(String, OwnedFd)>;

/// A service manager that keeps descriptors from one daemon to the next.
#[derive(Debug)]
pub struct Manager {
    socket: OwnedFd,
}

impl Manager {
    /// The one that NOTIFY_SOCKET names, if any.
    pub fn from_env() -> io::Result<Option<Manager>> {
        let Some(name) = env::var_os("NOTIFY_SOCKET") else { return Ok(None) };
        let bytes = name.as_encoded_bytes();
        let address = match bytes.strip_prefix(b"@") {
            Some(name) => SocketAddrUnix::new_abstract_name(name)?,
            None => SocketAddrUnix::new(bytes)?,
        };
        let socket =
            socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
        connect(&socket, &address)?;
        Ok(Some(Manager { socket }))
    }

    /// The daemon serves.
    pub fn ready(&self) {
        self.say("READY=1", None);
    }

    /// Takes what it kept, and lets it forget that: what it holds would count as in use for ever.
    pub fn parcel(&self) -> io::Result<Parcel> {
        let count = passed()?;
        let names = env::var("LISTEN_FDNAMES").unwrap_or_default();
        let mut parcel = Parcel::new();
        for (number, name) in (FIRST_PASSED..).zip(names.split(':')).take(count) {
            if let Some(short) = name.strip_prefix(PREFIX) {
                parcel.push((short.to_owned(), ioctl::adopt_fd(number)?));
                self.say(&format!("FDSTOREREMOVE=1\nFDNAME={name}"), None);
            }
        }
        Ok(parcel)
    }

    /// Gives it a descriptor to keep.
    pub fn store(&self, name: &str, fd: BorrowedFd<'_>) -> io::Result<()> {
        let what = format!("FDSTORE=1\nFDNAME={PREFIX}{name}");
        send(&self.socket, what.as_bytes(), Some(fd))
    }

    /// Waits until it has taken in everything so far.
    pub fn barrier(&self) -> io::Result<()> {
        let (done, barrier) = UnixStream::pair()?;
        send(&self.socket, b"BARRIER=1", Some(barrier.as_fd()))?;
        drop(barrier);
        wait(&done, PollFlags::HUP)
    }

    fn say(&self, what: &str, fd: Option<BorrowedFd<'_>>) {
        if let Err(error) = send(&self.socket, what.as_bytes(), fd) {
            warn!("the service manager does not listen ({what:?}): {error}");
        }
    }
}

/// Descriptors that were passed to this process.
fn passed() -> io::Result<usize> {
    let number = |name| env::var(name).ok().and_then(|text| text.parse::<u32>().ok());
    if number("LISTEN_PID") != Some(std::process::id()) {
        return Ok(0);
    }
    Ok(number("LISTEN_FDS").unwrap_or(0).try_into().unwrap_or(0))
}

/// Takes over from the daemon that serves this hand-over socket; `None` where there is none.
pub fn take_over(path: &Path) -> io::Result<Option<Parcel>> {
    let socket =
        socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    match connect(&socket, &SocketAddrUnix::new(path)?) {
        Err(Errno::NOENT | Errno::CONNREFUSED) => return Ok(None),
        other => other?,
    }
    info!("taking over from the daemon at {}", path.display());
    let mut parcel = Parcel::new();
    loop {
        wait(&socket, PollFlags::IN)?;
        let Some(packet) = packet::receive(&socket, Wait::Never)? else {
            return Err(io::Error::other("the predecessor died before it had handed over all"));
        };
        let name = String::from_utf8_lossy(&packet.bytes).into_owned();
        match packet.fd {
            Some(fd) => parcel.push((name, fd)),
            None if name == END => return Ok(Some(parcel)),
            None => return Err(io::Error::other(format!("{name:?} came without its descriptor"))),
        }
    }
}

/// Hands one descriptor to who connected to the hand-over socket.
pub fn hand_over(successor: &OwnedFd, name: &str, fd: BorrowedFd<'_>) -> io::Result<()> {
    send(successor, name.as_bytes(), Some(fd))
}

/// Tells the successor that this is all.
pub fn end(successor: &OwnedFd) -> io::Result<()> {
    send(successor, END.as_bytes(), None)
}

/// A descriptor for what the others are, as bytes.
pub fn state(bytes: &[u8]) -> io::Result<OwnedFd> {
    let mut file = File::from(memfd_create("bufshare-state", MemfdFlags::CLOEXEC)?);
    file.write_all(bytes)?;
    Ok(file.into())
}

/// Whether a passed socket is bound to this path.
pub fn bound_to(socket: &OwnedFd, path: &Path) -> bool {
    let Ok(wanted) = SocketAddrUnix::new(path) else { return false };
    let bound = rustix::net::getsockname(socket).ok();
    bound.and_then(|address| SocketAddrUnix::try_from(address).ok()) == Some(wanted)
}

/// Sends one message, as soon as the other side has room for it.
fn send(socket: &OwnedFd, bytes: &[u8], fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let end = Instant::now() + PATIENCE;
    loop {
        match packet::send(socket, bytes, fd, Wait::Never) {
            Err(Errno::AGAIN) => wait(socket, PollFlags::OUT)?,
            // As many descriptors as may be are on their way.
            Err(Errno::TOOMANYREFS | Errno::NOBUFS) if Instant::now() < end => {
                std::thread::sleep(Duration::from_millis(1));
            }
            other => return Ok(other?),
        }
    }
}

fn wait(fd: impl AsFd, flags: PollFlags) -> io::Result<()> {
    let patience = Timespec { tv_sec: PATIENCE.as_secs().cast_signed(), tv_nsec: 0 };
    let mut fds = [PollFd::new(&fd, flags)];
    match poll(&mut fds, Some(&patience))? {
        0 => Err(io::Error::new(io::ErrorKind::TimedOut, "the other side does not go on")),
        _ => Ok(()),
    }
}
