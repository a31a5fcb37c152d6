//! `bufsharectl`: looks at the buffers that VMs offer to this host, and lends files of it to VMs.
//!
//! It talks to the daemon's host socket and knows nothing else of the daemon; who holds a buffer without
//! telling the daemon it looks up in /proc, with its caller's rights. Exit status: 0 done,
//! 1 another failure, 2 wrong usage, 3 no connection to the daemon, 4 no such buffer, 5 the daemon
//! refused, 6 the content is no picture that can be read here.

mod dump;
mod export;
mod point;
mod processes;
mod show;
mod top;
mod who;

use std::io::{self, Write};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use bufshare::host::client::{self, Buffer, Client};
use bufshare::host::holders::{Holders, Memory};
use bufshare::host::image::ImageError;
use bufshare::protocol::Status;
use clap::{Parser, Subcommand};
use thiserror::Error;
use uuid::Uuid;

/// Looks at the buffers that virtual machines offer to this host, and lends them some of its own.
#[derive(Debug, Parser)]
#[command(version, name = "bufsharectl")]
struct Args {
    /// The daemon's host socket.
    #[arg(long, global = true, value_name = "PATH", env = "BUFSHARE_HOST_SOCKET",
          default_value = client::DEFAULT_SOCKET)]
    host_socket: PathBuf,
    /// JSON on standard output: one document; `watch`: one a line.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// List the offered buffers.
    List,
    /// Tell what comes, changes and goes, until interrupted.
    Watch {
        /// Only this buffer.
        #[arg(value_name = "UUID|NAME")]
        buffer: Option<String>,
    },
    /// Show everything about one buffer: who holds it, and who waits for whom.
    Info {
        /// As `top` shows it; a name must be the only one of its kind.
        #[arg(value_name = "UUID|NAME")]
        buffer: String,
    },
    /// Write the picture in a buffer to a PNG file, its channels as they are.
    Dump {
        /// As `list` shows it; a name must be the only one of its kind.
        #[arg(value_name = "UUID|NAME")]
        buffer: String,
        /// `-` is standard output.
        #[arg(short, long, value_name = "FILE.png")]
        output: PathBuf,
        /// How long to wait for whoever writes to it.
        #[arg(long, value_name = "MS", default_value_t = 5000)]
        timeout_ms: u64,
    },
    /// Lend the content of a file to VMs, until interrupted.
    Export(export::Wish),
    /// Wait until a content of a buffer is ready (its ACQUIRE timeline reached a point), or say so.
    Point(point::Wish),
    /// Show the daemon's counters.
    Stats,
    /// Show all buffers of all VMs and how they are used, again and again.
    Top {
        /// Seconds between two tables.
        #[arg(short = 'd', long, value_name = "SECONDS", default_value_t = 2.0)]
        delay: f64,
        /// So many tables, then end.
        #[arg(short = 'n', long, value_name = "COUNT")]
        count: Option<u32>,
    },
}

/// Why the command failed.
#[derive(Debug, Error)]
enum Failure {
    #[error(transparent)]
    Client(#[from] client::Error),
    #[error("no buffer {0:?} is offered to the host; `bufsharectl list` shows those that are")]
    NoBuffer(String),
    #[error("no VM {0:?} may share with the host; the daemon's command line names those that may")]
    NoVm(String),
    #[error("cannot read the picture in {name:?}")]
    Image { name: String, source: ImageError },
    #[error("cannot {what}")]
    Io { what: String, source: io::Error },
    #[error("cannot write {file}")]
    Png { file: String, source: png::EncodingError },
}

impl Failure {
    fn exit_status(&self) -> u8 {
        match self {
            Failure::Client(client::Error::Refused { status: Status::NoEnt, .. }) => 4,
            Failure::Client(client::Error::Refused { .. }) => 5,
            Failure::Client(client::Error::Ambiguous { .. }) => 4,
            Failure::NoBuffer(_) | Failure::NoVm(_) => 4,
            Failure::Client(_) => 3,
            Failure::Image { .. } => 6,
            Failure::Io { .. } | Failure::Png { .. } => 1,
        }
    }
}

/// The buffer that the user means.
fn find(client: &mut Client, wanted: &str) -> Result<Buffer, Failure> {
    client.find(wanted)?.ok_or_else(|| Failure::NoBuffer(wanted.to_owned()))
}

/// The same among all buffers that this user may know of, and who holds it.
fn inspect(client: &mut Client, wanted: &str) -> Result<Holders, Failure> {
    let uuid = Uuid::parse_str(wanted).ok();
    let mut all = client.inspect()?;
    all.retain(|report| {
        uuid.map_or(report.buffer.name == wanted, |uuid| report.buffer.uuid == uuid)
    });
    match all.as_slice() {
        [one] => Ok(client.holders(one.buffer.uuid)?),
        [] => Err(Failure::NoBuffer(wanted.to_owned())),
        many => Err(client::Error::Ambiguous { name: wanted.to_owned(), count: many.len() }.into()),
    }
}

/// Writes to standard output; `false` where nobody reads it any more.
fn print(text: &str) -> Result<bool, Failure> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        Err(source) => Err(Failure::Io { what: "write to standard output".to_owned(), source }),
    }
}

fn run(args: &Args) -> Result<(), Failure> {
    let mut client = Client::connect(&args.host_socket, "bufsharectl")?;
    match &args.command {
        Command::Export(wish) => export::run(&mut client, wish, args.json),
        Command::Point(wish) => print(&wish.run(&mut client, args.json)?).map(drop),
        Command::List => print(&show::list(&mut client, args.json)?).map(drop),
        Command::Info { buffer } => {
            let told = inspect(&mut client, buffer)?;
            // What is offered to others alone has no metadata for the host.
            let details = client.query(told.report.buffer.uuid).ok();
            let daemon =
                bufshare::ioctl::peer_credentials(client.as_fd()).map_or(0, |peer| peer.pid);
            let look = |memory: Memory| processes::with(memory.device, memory.inode, daemon);
            let seen = told.memory.map(look).unwrap_or_default();
            print(&show::info(&told, details.as_ref(), &seen, args.json)).map(drop)
        }
        Command::Top { delay, count } => {
            let delay = Duration::try_from_secs_f64(*delay).unwrap_or(Duration::MAX);
            top::run(&mut client, delay, *count, args.json)
        }
        Command::Stats => print(&show::stats(&client.stats()?, args.json)).map(drop),
        Command::Watch { buffer } => {
            let only = match buffer {
                Some(wanted) => Some(find(&mut client, wanted)?.uuid),
                None => None,
            };
            client.watch(only)?;
            while let Some(event) = client.next_event(None)? {
                if !print(&show::event(&event, args.json))? {
                    break;
                }
            }
            Ok(())
        }
        Command::Dump { buffer, output, timeout_ms } => {
            let buffer = find(&mut client, buffer)?;
            let timeout = Duration::from_millis(*timeout_ms);
            let picture = dump::read(&mut client, &buffer, timeout)?;
            dump::write(&picture, output)?;
            if output.as_os_str() == "-" {
                return Ok(());
            }
            print(&show::dumped(&picture, output, args.json)).map(drop)
        }
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprint!("bufsharectl: {failure}");
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
