//! Draws into buffers of this guest, shares them and uses those of others through /dev/bufshare0: for
//! tests, and as an example of the interface.
//!
//! It knows the driver's ABI, and nothing of the host. Exit status: 0 done, 1 failed, 2 wrong usage.

mod device;
mod draw;
mod fences;
mod follow;
mod import;
mod latency;
mod picture;
mod points;
mod relay;
mod rules;
mod snatch;
mod stress;
mod swapchain;
mod uapi;

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::str::FromStr;

use bufshare::host::image::ImageError;
use bufshare::protocol::peer;
use clap::{Parser, Subcommand};
use thiserror::Error;

use device::Device;

/// Draws into buffers of this guest, shares them and uses those of others.
#[derive(Debug, Parser)]
#[command(version, name = "bufshare-guest")]
struct Args {
    /// The device.
    #[arg(long, global = true, value_name = "PATH", default_value = "/dev/bufshare0")]
    device: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Draw frames into a shared buffer.
    Draw(draw::Draw),
    /// Use another peer's buffer: follow its frames, check or save them.
    Import(import::Import),
    /// Show the negative of another peer's picture to the host, in a buffer of this guest.
    Relay(relay::Relay),
    /// Do everything at random for a while, and check the answers.
    Stress(stress::Stress),
    /// Check that an access ends only when this guest's own devices are done. Needs sw_sync.
    Fences(fences::Fences),
    /// Check that points of timelines are told as the interface says.
    Points(points::Points),
    /// Draw frames into a pool of images, paced by points of timelines.
    Produce(swapchain::Produce),
    /// See the frames of another peer's `produce`, each of them.
    Consume(swapchain::Consume),
    /// Check what the driver allows those who share a buffer in this guest.
    Rules(rules::Rules),
    /// Take buffers back while another guest attaches them, or be that guest.
    Snatch(snatch::Snatch),
    /// Show the device and its limits.
    Info,
    /// List who can be granted a buffer.
    Peers,
    /// List what other peers offer.
    Offers,
    /// Show events of the device, until interrupted.
    Events,
    /// Export a page and measure how long QUERY takes.
    Query(latency::Latency),
    /// Write the picture that `draw` draws to a PNG file, or compare it with one. Needs no device.
    Picture(picture::Expected),
}

/// Why the command failed.
#[derive(Debug, Error)]
enum Failure {
    #[error(transparent)]
    Open(#[from] device::OpenError),
    #[error(transparent)]
    Device(#[from] device::Error),
    #[error("{what} failed")]
    Io { what: String, source: io::Error },
    #[error("{file} cannot be written")]
    PngOut { file: String, source: png::EncodingError },
    #[error("{file} cannot be read")]
    PngIn { file: String, source: png::DecodingError },
    #[error("no picture to be read in buffer {name}")]
    Image { name: String, source: ImageError },
    #[error("{0}")]
    Wrong(String),
}

/// Width and height in pixels.
#[derive(Debug, Clone, Copy)]
struct Extent {
    width: u32,
    height: u32,
}

/// A size that cannot be drawn.
#[derive(Debug, Error)]
#[error("{0:?} is not of the form 640x480, from 1x1 to 16384x16384")]
struct BadExtent(String);

impl FromStr for Extent {
    type Err = BadExtent;

    fn from_str(text: &str) -> Result<Self, BadExtent> {
        let side = |text: &str| text.parse().ok().filter(|side| (1..=16384).contains(side));
        text.split_once('x')
            .and_then(|(width, height)| Some(Extent { width: side(width)?, height: side(height)? }))
            .ok_or_else(|| BadExtent(text.to_owned()))
    }
}

/// A peer, as `peers` lists it: host, its number or its name.
#[derive(Debug, Clone)]
struct PeerName(String);

impl FromStr for PeerName {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(PeerName(text.to_owned()))
    }
}

impl PeerName {
    /// Its number.
    fn find(&self, device: &Device) -> Result<u32, Failure> {
        let PeerName(wanted) = self;
        if wanted == "host" {
            return Ok(peer::HOST);
        }
        if let Ok(number) = wanted.parse() {
            return Ok(number);
        }
        let mut index = 0;
        while let Some(peer) = device.peer(index)? {
            if text(&peer.name) == *wanted {
                return Ok(peer.peer_id);
            }
            index += 1;
        }
        Err(Failure::Wrong(format!("there is no peer {wanted:?}; `peers` lists them")))
    }
}

/// Who is granted what.
#[derive(Debug, Clone)]
struct Grantee {
    who: PeerName,
    access: u32,
}

impl FromStr for Grantee {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (who, access) = match text.strip_suffix(":rw") {
            Some(who) => (who, uapi::ACCESS_READ | uapi::ACCESS_WRITE),
            None => (text, uapi::ACCESS_READ),
        };
        Ok(Grantee { who: PeerName(who.to_owned()), access })
    }
}

/// Text that is padded with zeros.
fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).trim_end_matches('\0').to_owned()
}

/// Prints a line at once: a test waits for it.
fn line(text: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    writeln!(out, "{text}")
        .and_then(|()| out.flush())
        .map_err(|source| Failure::Io { what: "writing to standard output".to_owned(), source })
}

fn mode_name(mode: u32) -> &'static str {
    match mode {
        uapi::MODE_ZERO_COPY => "zero-copy",
        uapi::MODE_COPY => "copy",
        _ => "unknown",
    }
}

fn info(device: &Device) -> Result<(), Failure> {
    let info = device.info()?;
    line(&format!("alive {}", info.flags & uapi::INFO_F_ALIVE != 0))?;
    line(&format!("peer_id {}", info.peer_id))?;
    line(&format!("epoch {}", info.epoch))?;
    match info.lingering {
        u32::MAX => line("lingering unknown")?,
        count => line(&format!("lingering {count}"))?,
    }
    line(&format!("quarantined {}", info.quarantined))?;
    line(&format!("granule {}", info.granule))?;
    line(&format!("max_segments {}", info.max_segments))?;
    line(&format!("max_buffer_size {}", info.max_buffer_size))?;
    line(&format!("max_total_size {}", info.max_total_size))?;
    line(&format!("max_exports {}", info.max_exports))?;
    line(&format!("max_metadata {}", info.max_metadata))?;
    line(&format!("max_wait_ms {}", info.max_wait_ms))?;
    line(&format!("max_waits {}", info.max_waits))?;
    line(&format!("max_attachments {}", info.max_attachments))?;
    line(&format!("max_mappings {}", info.max_mappings))?;
    line(&format!("window {}", info.window))?;
    line(&format!("features {:#x}", info.features))
}

fn peers(device: &Device) -> Result<(), Failure> {
    let mut index = 0;
    while let Some(peer) = device.peer(index)? {
        line(&format!(
            "peer id={} name={:?} online={} window={} epoch={}",
            peer.peer_id,
            text(&peer.name),
            peer.flags & uapi::PEER_F_ONLINE != 0,
            peer.flags & uapi::PEER_F_WINDOW != 0,
            peer.epoch
        ))?;
        index += 1;
    }
    Ok(())
}

fn offers(device: &Device) -> Result<(), Failure> {
    let mut id = 0;
    while let Some(offer) = device.offer(id)? {
        let uuid = uuid::Uuid::from_bytes(offer.uuid);
        line(&format!(
            "offer uuid={uuid} peer={} access={} size={} generation={}",
            offer.peer_id, offer.access, offer.size, offer.generation
        ))?;
        id = offer.id;
    }
    Ok(())
}

fn events(device: &Device) -> Result<(), Failure> {
    while let Some(event) = device.event(None)? {
        let kind = match event.kind {
            uapi::EVENT_RELEASED => "released",
            uapi::EVENT_IDLE => "idle",
            uapi::EVENT_BUSY => "busy",
            uapi::EVENT_OFFERED => "offered",
            uapi::EVENT_REVOKED => "revoked",
            uapi::EVENT_WITHDRAWN => "withdrawn",
            uapi::EVENT_CHANGED => "changed",
            uapi::EVENT_PEER => "peer",
            uapi::EVENT_RESYNC => "resync",
            _ => "unknown",
        };
        line(&format!(
            "event {kind} handle={} uuid={} peer={} status={} generation={} epoch={}",
            event.handle,
            uuid::Uuid::from_bytes(event.uuid),
            event.peer_id,
            event.status,
            event.generation,
            event.epoch
        ))?;
    }
    Ok(())
}

fn run(args: &Args) -> Result<(), Failure> {
    let open = || Device::open(&args.device);
    match &args.command {
        Command::Draw(draw) => draw.run(&open()?),
        Command::Stress(stress) => stress.run(&args.device),
        Command::Import(import) => import.run(&open()?),
        Command::Relay(relay) => relay.run(&open()?),
        Command::Fences(fences) => fences.run(&open()?),
        Command::Points(points) => points.run(&open()?, &args.device),
        Command::Produce(produce) => produce.run(&open()?),
        Command::Consume(consume) => consume.run(&open()?),
        Command::Rules(rules) => rules.run(&args.device),
        Command::Snatch(snatch) => snatch.run(&open()?),
        Command::Info => info(&open()?),
        Command::Peers => peers(&open()?),
        Command::Offers => offers(&open()?),
        Command::Events => events(&open()?),
        Command::Query(latency) => latency.run(&open()?),
        Command::Picture(picture) => picture.run(),
    }
}

fn main() -> ExitCode {
    let failure = match run(&Args::parse()) {
        Ok(()) => return ExitCode::SUCCESS,
        Err(failure) => failure,
    };
    eprint!("bufshare-guest: {failure}");
    let mut source = std::error::Error::source(&failure);
    while let Some(error) = source {
        eprint!(": {error}");
        source = error.source();
    }
    eprintln!();
    ExitCode::FAILURE
}
