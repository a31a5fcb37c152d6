//! `bufshare-present`: shows a buffer that a VM offers in a window of the host's compositor.
//!
//! It follows the buffer's generations at the compositor's pace and hands the buffer back when it is
//! done: picture off the screen, compositor's import gone, fd closed, lease released. Prints one line
//! a frame (`shown generation N`) and one at the end (`ended: REASON`). Exit status: 0 done, 1
//! another failure, 2 wrong usage, 3 no daemon, 4 no such buffer, 5 the daemon refused, 6 this
//! picture cannot be shown, 7 no compositor that could.

mod display;
mod explicit;
mod failure;
mod pace;
mod show;
mod signals;
mod swap;

use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use bufshare::host::client::{self, Access, Buffer, Client, Event, Lease};
use bufshare::host::image::Image;
use bufshare::host::wire::flag;
use bufshare::protocol::{access, metadata};
use clap::Parser;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use uuid::Uuid;
use wayland_client::protocol::wl_buffer;
use wayland_client::{Connection, EventQueue};

use display::{Display, Told, Window};
use failure::Failure;

/// How long the compositor may take to let go of a buffer.
const LETTING_GO: Duration = Duration::from_millis(500);

/// Shows a buffer that a virtual machine offers, in a window of this host's Wayland compositor.
#[derive(Debug, Parser)]
#[command(version, name = "bufshare-present")]
struct Args {
    /// The buffer to show; with --wait alone: the first picture that is offered. Several are shown in turn, round
    /// and round, each when its exporter signals its timeline.
    #[arg(value_name = "UUID|NAME", required_unless_present = "wait")]
    buffers: Vec<String>,
    /// Wait until it is offered.
    #[arg(long)]
    wait: bool,
    /// End after this many frames were shown.
    #[arg(long, value_name = "N")]
    frames: Option<u64>,
    /// Show one picture and hold it still until the end.
    #[arg(long)]
    once: bool,
    /// Leave the compositor's timelines alone (linux-drm-syncobj-v1).
    #[arg(long)]
    no_explicit_sync: bool,
    /// Cover the whole output, still unscaled.
    #[arg(long)]
    fullscreen: bool,
    /// The daemon's host socket.
    #[arg(long, value_name = "PATH", env = "BUFSHARE_HOST_SOCKET",
          default_value = client::DEFAULT_SOCKET)]
    host_socket: PathBuf,
}

/// Why the show is over.
type Reason = &'static str;

fn main() -> ExitCode {
    env_logger::init();
    let args = Args::parse();
    match run(&args) {
        Ok(reason) => {
            say(format_args!("ended: {reason}"));
            ExitCode::SUCCESS
        }
        Err(failure) => {
            eprint!("bufshare-present: {failure}");
            let mut cause = std::error::Error::source(&failure);
            while let Some(error) = cause {
                eprint!(": {error}");
                cause = error.source();
            }
            eprintln!();
            ExitCode::from(failure.exit_status())
        }
    }
}

/// One line for whoever reads; nobody has to.
fn say(line: std::fmt::Arguments<'_>) {
    let mut out = std::io::stdout().lock();
    if writeln!(out, "{line}").and_then(|()| out.flush()).is_err() {
        log::debug!("nobody reads standard output");
    }
}

fn run(args: &Args) -> Result<Reason, Failure> {
    signals::install().map_err(Failure::Kernel)?;
    let connection = connect()?;
    let (mut display, mut events) = Display::open(&connection)?;
    let mut client = Client::connect(&args.host_socket, "bufshare-present")?;
    let wanted: Vec<Option<&str>> = match args.buffers.as_slice() {
        [] => vec![None],
        names => names.iter().map(|name| Some(name.as_str())).collect(),
    };
    let mut found = Vec::new();
    for wanted in wanted {
        let Some(buffer) = find(wanted, args.wait, &mut client)? else { return Ok("signal") };
        found.push(buffer.uuid);
    }
    client.watch(<[Uuid; 1]>::try_from(found.as_slice()).ok().map(|[uuid]| uuid))?;
    let mut images = Vec::new();
    for uuid in found {
        images.push(Picture::acquire(&mut client, &mut display, &mut events, uuid)?);
    }
    let Some(first) = images.first() else { return Ok("signal") };
    let window = display.window(&first.lease.buffer.name, &first.image, args.fullscreen);
    let parts = Parts { display, client, window };
    match <[Picture; 1]>::try_from(images) {
        Ok([image]) => show::run(args, parts, image, &connection, &mut events),
        Err(images) => swap::run(args, parts, images, &connection, &mut events),
    }
}

/// What is shown, and the compositor's name for it.
struct Picture {
    lease: Lease,
    image: Image,
    buffer: wl_buffer::WlBuffer,
}

impl Picture {
    fn acquire(
        client: &mut Client,
        display: &mut Display,
        events: &mut EventQueue<Display>,
        uuid: Uuid,
    ) -> Result<Picture, Failure> {
        let lease = client.acquire_with(uuid, access::READ, flag::ACQUIRE_NOTICE)?;
        let image = Image::parse(lease.buffer.metadata_type, &lease.metadata, lease.buffer.size)
            .map_err(Failure::Image)?;
        let buffer = display.buffer(events, &lease, &image)?;
        say(format_args!(
            "presenting {:?} {} {}x{} {}",
            lease.buffer.name,
            lease.buffer.uuid,
            image.width,
            image.height,
            lease.mode.name()
        ));
        Ok(Picture { lease, image, buffer })
    }
}

/// Compositor, daemon and window.
struct Parts {
    display: Display,
    client: Client,
    window: Window,
}

fn connect() -> Result<Connection, Failure> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    if set("WAYLAND_SOCKET").is_none() {
        let display = set("WAYLAND_DISPLAY").ok_or(Failure::NoDisplay)?;
        if !std::path::Path::new(&display).is_absolute() && set("XDG_RUNTIME_DIR").is_none() {
            return Err(Failure::NoRuntimeDir);
        }
    }
    Connection::connect_to_env().map_err(|source| {
        let display = set("WAYLAND_DISPLAY").unwrap_or_default();
        Failure::NoCompositor { display: display.to_string_lossy().into_owned(), source }
    })
}

/// The buffer to show; `None` where a signal ended the wait.
fn find(
    wanted: Option<&str>,
    patient: bool,
    client: &mut Client,
) -> Result<Option<Buffer>, Failure> {
    if let Some(wanted) = wanted {
        match client.find(wanted)? {
            Some(buffer) => return Ok(Some(buffer)),
            None if !patient => return Err(Failure::NoBuffer(wanted.to_owned())),
            None => {}
        }
    }
    client.watch(None)?;
    loop {
        client.dispatch()?;
        while let Some(event) = client.take_event() {
            let (Event::Offered(buffer) | Event::Changed(buffer)) = event else { continue };
            let matches = match wanted {
                Some(wanted) => buffer.name == wanted || buffer.uuid.to_string() == wanted,
                None => buffer.metadata_type == metadata::IMAGE,
            };
            if matches {
                return Ok(Some(buffer));
            }
        }
        if wait(&mut [PollFd::new(client, PollFlags::IN)], None)? {
            return Ok(None);
        }
    }
}

/// Waits for one of `fds`, a signal, or `timeout`; whether a signal asked to end.
fn wait(fds: &mut [PollFd<'_>], timeout: Option<Duration>) -> Result<bool, Failure> {
    let signal = signals::fd();
    let mut all = fds.to_vec();
    all.extend(signal.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
    let timeout = timeout.map(|left| Timespec {
        tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: left.subsec_nanos().into(),
    });
    match poll(&mut all, timeout.as_ref()) {
        Ok(_) | Err(Errno::INTR) => Ok(signals::asked_to_end()),
        Err(error) => Err(Failure::Kernel(error.into())),
    }
}

impl Parts {
    /// Waits for compositor, daemon, one of `more`, a signal or `timeout`; whether a signal asked to end.
    fn wait(
        &self,
        connection: &Connection,
        events: &EventQueue<Display>,
        more: &[BorrowedFd<'_>],
        timeout: Option<Duration>,
    ) -> Result<bool, Failure> {
        // A full socket is no failure: the rest goes out later.
        if let Err(error) = connection.flush() {
            log::debug!("flush: {error}");
        }
        let Some(guard) = events.prepare_read() else { return Ok(false) };
        let known = [guard.connection_fd(), self.client.as_fd()];
        let all = known.iter().chain(more);
        let mut fds: Vec<_> = all.map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN)).collect();
        let ended = wait(&mut fds, timeout)?;
        match guard.read() {
            Ok(_) => Ok(ended),
            Err(wayland_client::backend::WaylandError::Io(error))
                if error.kind() == std::io::ErrorKind::WouldBlock =>
            {
                Ok(ended)
            }
            Err(error) => Err(Failure::Lost(Box::new(error))),
        }
    }

    /// Picture off the screen, the compositor's imports gone, fds closed, leases ended.
    fn hand_back(
        mut self,
        pictures: Vec<Picture>,
        configured: bool,
        events: &mut EventQueue<Display>,
    ) -> Result<(), Failure> {
        if configured {
            let blank = u64::MAX;
            self.display.commit_blank(&self.window, blank)?;
            let over = |display: &Display| display.told.contains(&Told::FrameDone(blank));
            dispatch_until(&mut self.display, events, over)?;
        }
        self.window.close();
        dispatch_until(&mut self.display, events, |display| display.busy.is_empty())?;
        pictures.iter().for_each(|picture| picture.buffer.destroy());
        events.roundtrip(&mut self.display)?;
        drop(self.display);
        for Picture { lease, .. } in pictures {
            match self.client.end(lease.id, Access::READ) {
                Ok(_) => {}
                Err(error) if error.status().is_some() => log::debug!("END: {error}"),
                Err(error) => return Err(error.into()),
            }
            self.client.release(lease)?;
        }
        Ok(())
    }
}

/// Lets the compositor speak until what is awaited came, or it had its time.
fn dispatch_until(
    display: &mut Display,
    events: &mut EventQueue<Display>,
    came: impl Fn(&Display) -> bool,
) -> Result<(), Failure> {
    let deadline = Instant::now() + LETTING_GO;
    while !came(display) && Instant::now() < deadline {
        events.roundtrip(display)?;
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}
