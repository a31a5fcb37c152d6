//! `bufshare-present`: shows a buffer that a VM offers in a window of the host's compositor.
//!
//! It follows the buffer's generations at the compositor's pace and hands the buffer back when it is
//! done: picture off the screen, compositor's import gone, fd closed, lease released. Prints one line
//! a frame (`shown generation N`) and one at the end (`ended: REASON`). Exit status: 0 done, 1
//! another failure, 2 wrong usage, 3 no daemon, 4 no such buffer, 5 the daemon refused, 6 this
//! picture cannot be shown, 7 no compositor that could.

mod display;
mod failure;
mod pace;
mod signals;

use std::io::Write;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use bufshare::host::client::{self, Access, Buffer, Client, Event, Lease};
use bufshare::host::image::Image;
use bufshare::host::wire::flag;
use bufshare::protocol::{Status, access, metadata};
use clap::Parser;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use wayland_client::{Connection, EventQueue};

use display::{Display, Told, Window};
use failure::Failure;
use pace::{Pace, Step};

/// BEGIN waits this long before it is repeated.
const BEGIN_TIMEOUT: Duration = Duration::from_millis(100);
/// A window that gets no frame callback for this long is not seen by anybody.
const UNSEEN: Duration = Duration::from_secs(1);
/// How long the compositor may take to let go of the buffer.
const LETTING_GO: Duration = Duration::from_millis(500);

/// Shows a buffer that a virtual machine offers, in a window of this host's Wayland compositor.
#[derive(Debug, Parser)]
#[command(version, name = "bufshare-present")]
struct Args {
    /// The buffer to show; with --wait alone: the first picture that is offered.
    #[arg(value_name = "UUID|NAME", required_unless_present = "wait")]
    buffer: Option<String>,
    /// Wait until it is offered.
    #[arg(long)]
    wait: bool,
    /// End after this many frames were shown.
    #[arg(long, value_name = "N")]
    frames: Option<u64>,
    /// Show one picture and hold it still until the end.
    #[arg(long)]
    once: bool,
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
    let Some(buffer) = find(args, &mut client)? else {
        return Ok("signal");
    };
    client.watch(Some(buffer.uuid))?;
    let lease = client.acquire_with(buffer.uuid, access::READ, flag::ACQUIRE_NOTICE)?;
    let image = Image::parse(buffer.metadata_type, &lease.metadata, lease.buffer.size)
        .map_err(Failure::Image)?;
    let window = display.window(&mut events, &lease, &image, args.fullscreen)?;
    say(format_args!(
        "presenting {:?} {} {}x{} {}",
        buffer.name,
        buffer.uuid,
        image.width,
        image.height,
        lease.mode.name()
    ));
    let mut show = Show {
        pace: Pace::new(lease.buffer.generation, args.once),
        display,
        client,
        lease,
        window,
        configured: false,
        begin: None,
        frames_left: args.frames,
        waiting_since: Instant::now(),
    };
    let reason = show.follow(&connection, &mut events)?;
    show.hand_back(&mut events)?;
    Ok(reason)
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
fn find(args: &Args, client: &mut Client) -> Result<Option<Buffer>, Failure> {
    if let Some(wanted) = &args.buffer {
        match client.find(wanted)? {
            Some(buffer) => return Ok(Some(buffer)),
            None if !args.wait => return Err(Failure::NoBuffer(wanted.clone())),
            None => {}
        }
    }
    client.watch(None)?;
    loop {
        client.dispatch()?;
        while let Some(event) = client.take_event() {
            let (Event::Offered(buffer) | Event::Changed(buffer)) = event else { continue };
            let matches = match &args.buffer {
                Some(wanted) => buffer.name == *wanted || buffer.uuid.to_string() == *wanted,
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

/// One window, one lease.
struct Show {
    pace: Pace,
    display: Display,
    client: Client,
    lease: Lease,
    window: Window,
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
            events.dispatch_pending(&mut self.display)?;
            self.client.dispatch()?;
            if let Some(reason) = self.daemon_told()? {
                return Ok(reason);
            }
            while let Some(told) = self.display.told.pop_front() {
                match told {
                    Told::Configured => self.configured = true,
                    Told::FrameDone(commit) => self.pace.frame_done(commit),
                    Told::Released => self.pace.released(),
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
            if !self.client.has_news() && self.wait_for_either(connection, events)? {
                return Ok("signal");
            }
        }
    }

    /// Takes in what the daemon told; why the show is over, if it is.
    fn daemon_told(&mut self) -> Result<Option<Reason>, Failure> {
        if let Some(cookie) = self.begin {
            match self.client.take_generation(cookie) {
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
        while let Some(event) = self.client.take_event() {
            match event {
                Event::Changed(buffer) | Event::Offered(buffer) => {
                    self.pace.changed(buffer.generation);
                }
                Event::Withdrawn { .. } => return Ok(Some("withdrawn")),
                Event::Revoked { .. } => return Ok(Some("revoked")),
                // It exports nothing.
                Event::Busy(_) | Event::Idle(_) | Event::Released { .. } => {}
                Event::Resync => self.client.watch(Some(self.lease.buffer.uuid))?,
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
                    let begin =
                        self.client.submit_begin(self.lease.id, Access::READ, BEGIN_TIMEOUT);
                    self.begin = Some(begin?);
                }
                Step::Show | Step::Settle => {
                    self.waiting_since = Instant::now();
                    self.display.commit(&self.window, step == Step::Show, self.pace.commit());
                }
                Step::End => match self.client.end(self.lease.id, Access::READ) {
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

    /// Waits for compositor, daemon, signal or the time after which the window counts as unseen.
    fn wait_for_either(
        &self,
        connection: &Connection,
        events: &EventQueue<Display>,
    ) -> Result<bool, Failure> {
        // A full socket is no failure: the rest goes out later.
        if let Err(error) = connection.flush() {
            log::debug!("flush: {error}");
        }
        let Some(guard) = events.prepare_read() else { return Ok(false) };
        let timeout =
            self.pace.awaits_frame().then(|| UNSEEN.saturating_sub(self.waiting_since.elapsed()));
        let wayland = guard.connection_fd();
        let mut fds = [
            PollFd::from_borrowed_fd(wayland, PollFlags::IN),
            PollFd::from_borrowed_fd(self.client.as_fd(), PollFlags::IN),
        ];
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

    /// Picture off the screen, the compositor's import gone, fd closed, lease ended.
    fn hand_back(mut self, events: &mut EventQueue<Display>) -> Result<(), Failure> {
        if self.configured {
            let blank = u64::MAX;
            self.display.commit_blank(&self.window, blank)?;
            let over = |display: &Display| display.told.contains(&Told::FrameDone(blank));
            dispatch_until(&mut self.display, events, over)?;
        }
        let buffer = self.window.close();
        dispatch_until(&mut self.display, events, |display| !display.busy)?;
        buffer.destroy();
        events.roundtrip(&mut self.display)?;
        drop(self.display);
        match self.client.end(self.lease.id, Access::READ) {
            Ok(_) => {}
            Err(error) if error.status().is_some() => log::debug!("END: {error}"),
            Err(error) => return Err(error.into()),
        }
        Ok(self.client.release(self.lease)?)
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
