//! `bufshare-guest draw`: a program that renders into a shared buffer. One line per step on standard
//! output, `key=value` after the first word, so that tests can read it.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use bufshare::protocol::{self, Image, Plane};
use bufshare::testcard::{Pattern, Picture};
use clap::Args;
use zerocopy::IntoBytes;

use crate::device::{Device, Exported, Offer, Source, heap_alloc, map};
use crate::follow::{Followed, News};
use crate::import::find_answer;
use crate::{Extent, Failure, Grantee, PeerName, line, mode_name, uapi};

const FOURCC_XR24: u32 = u32::from_le_bytes(*b"XR24");

#[derive(Debug, Args)]
pub struct Draw {
    /// What to draw: card, bar, counter or stamp.
    #[arg(long, default_value = "card")]
    pattern: Pattern,
    /// Pixels.
    #[arg(long, value_name = "WxH", default_value = "640x480")]
    size: Extent,
    /// Pixel format; XR24 (XRGB8888) is the only one that is drawn.
    #[arg(long, value_name = "FOURCC", default_value = "XR24", value_parser = ["XR24"])]
    format: String,
    /// How many frames; 0: until killed.
    #[arg(long, value_name = "N", default_value_t = 1)]
    frames: u32,
    /// At most this many a second; 0: as many as the consumers let through.
    #[arg(long, value_name = "N", default_value_t = 0)]
    fps: u32,
    /// For people.
    #[arg(long, value_name = "NAME", default_value = "bufshare-guest")]
    name: String,
    /// Who may use it: host, a peer's name or number, `:rw` to let it write; repeatable.
    #[arg(long, value_name = "PEER[:rw]", default_value = "host")]
    grant: Vec<Grantee>,
    /// Draw a frame when this peer has seen the last one and said so (`import --answer`).
    #[arg(long, value_name = "PEER")]
    pace: Option<PeerName>,
    /// Draw while others read: a mistake, for them to find.
    #[arg(long)]
    skip_begin: bool,
    /// Fail rather than let the device copy.
    #[arg(long)]
    zero_copy: bool,
    /// Allocate from this dma-heap (as /dev/dma_heap/system) instead of the device: a foreign dma-buf.
    #[arg(long, value_name = "PATH")]
    heap: Option<PathBuf>,
    /// Keep the last frame for so long before the release.
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    hold: u64,
    /// Release at once, whoever uses it.
    #[arg(long)]
    force: bool,
    /// Leave the bytes of the last frame in this file.
    #[arg(long, value_name = "FILE")]
    dump: Option<PathBuf>,
}

/// Metadata of an image of one linear plane.
pub fn image(size: Extent, stride: u32) -> Image {
    let mut planes = <[Plane; 4]>::default();
    planes[0].stride = stride.into();
    Image {
        fourcc: FOURCC_XR24.into(),
        nr_planes: 1.into(),
        modifier: 0.into(), // DRM_FORMAT_MOD_LINEAR
        width: size.width.into(),
        height: size.height.into(),
        planes,
    }
}

/// Waits until the peer has seen this frame.
fn answered(answers: &Followed<'_>, frame: u32) -> Result<(), Failure> {
    loop {
        let mut seen = [0; 4];
        let gone = answers.read(&mut seen)?.is_none();
        // One more than the last frame: 0 is no answer.
        if u32::from_le_bytes(seen) == frame.wrapping_add(1) {
            return Ok(());
        }
        if gone || answers.next()? != News::Changed {
            return Err(Failure::Wrong(format!("the peer went before it saw frame {frame}")));
        }
    }
}

impl Draw {
    fn buffer(&self, device: &Device, size: u64) -> Result<OwnedFd, Failure> {
        Ok(match &self.heap {
            Some(heap) => heap_alloc(heap, size)?,
            None => device.alloc(size)?,
        })
    }

    fn frame(
        &self,
        device: &Device,
        buffer: &Exported,
        frame: u32,
        write: impl Fn(usize, &[u8]) -> std::io::Result<()>,
    ) -> Result<(), Failure> {
        let Extent { width, height } = self.size;
        let picture = Picture { pattern: self.pattern, frame, width, height };
        if !self.skip_begin {
            device.sync(buffer.handle, uapi::SYNC_F_WRITE)?;
        }
        let bytes = picture.bytes();
        // Who makes that mistake takes his time, so that it is seen.
        let steps = if self.skip_begin { 64 } else { 1 };
        let step = bytes.len().div_ceil(steps);
        for (number, part) in bytes.chunks(step).enumerate() {
            let drawn = write(number * step, part);
            drawn.map_err(|source| Failure::Io { what: "drawing".into(), source })?;
            if self.skip_begin {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        let generation = device.sync(buffer.handle, uapi::SYNC_F_END | uapi::SYNC_F_WRITE)?;
        if self.pace.is_some() || self.skip_begin {
            return Ok(()); // too many to tell
        }
        line(&format!("frame number={frame} generation={generation}"))
    }

    pub fn run(&self, device: &Device) -> Result<(), Failure> {
        let granule = u64::from(device.info()?.granule);
        let stride = self.size.width * 4;
        let bytes = u64::from(stride) * u64::from(self.size.height);
        let size = bytes.next_multiple_of(granule);
        let dmabuf = self.buffer(device, size)?;
        let mapping = map(&dmabuf, size)?;
        let image = image(self.size, stride);
        let access = self.grant.iter().fold(uapi::ACCESS_READ, |all, to| all | to.access);
        let buffer = device.export(
            Source::DmaBuf(&dmabuf),
            &Offer {
                zero_copy: self.zero_copy,
                access,
                name: &self.name,
                metadata_type: protocol::metadata::IMAGE,
                metadata: image.as_bytes(),
            },
        )?;
        line(&format!(
            "exported handle={} uuid={} mode={} size={}",
            buffer.handle,
            buffer.uuid,
            mode_name(buffer.mode),
            buffer.size
        ))?;

        let start = Instant::now();
        let mut answers = None;
        let mut frame = 0;
        loop {
            self.frame(device, &buffer, frame, |at, bytes| mapping.write_at(at, bytes))?;
            if frame == 0 {
                // Not earlier: nobody is to see a buffer without a picture.
                for to in &self.grant {
                    let peer = to.who.find(device)?;
                    device.grant(buffer.handle, peer, to.access)?;
                    line(&format!("granted peer={peer} access={}", to.access))?;
                }
                if let Some(peer) = &self.pace {
                    answers = Some(find_answer(device, peer.find(device)?)?);
                }
            }
            if let Some(answers) = &answers {
                answered(answers, frame)?;
            }
            frame = frame.wrapping_add(1);
            if frame == self.frames {
                break;
            }
            if let Some(period) = Duration::from_secs(1).checked_div(self.fps) {
                std::thread::sleep((period * frame).saturating_sub(start.elapsed()));
            }
        }
        if let Some(file) = &self.dump {
            let mut content = vec![0; bytes as usize];
            let done =
                mapping.read_at(0, &mut content).and_then(|()| std::fs::write(file, content));
            let what = format!("writing {}", file.display());
            done.map_err(|source| Failure::Io { what, source })?;
        }
        self.finish(device, &buffer)
    }

    fn finish(&self, device: &Device, buffer: &Exported) -> Result<(), Failure> {
        if self.hold > 0 {
            line(&format!("holding seconds={}", self.hold))?;
            std::thread::sleep(Duration::from_secs(self.hold));
        }
        let state = device.query(buffer.handle)?;
        line(&format!("query use_count={} generation={}", state.use_count, state.generation))?;
        if !device.release(buffer.handle, self.force)? {
            line("releasing")?;
            while let Some(event) = device.event(None)? {
                if event.kind == uapi::EVENT_RELEASED && event.handle == buffer.handle {
                    break;
                }
            }
        }
        line("released")
    }
}
