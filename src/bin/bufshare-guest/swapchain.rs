//! `bufshare-guest produce` and `consume`: a swapchain. Images that lie in one pool are drawn, seen and
//! drawn again, and points of their timelines say whose turn it is: the n-th frame is ready at ACQUIRE
//! n, and done with at RELEASE n. SYNC brackets the accesses, as copies need it, but nobody waits in it.
//!
//! It does not know how frames travel. When the other side goes away, it ends.

use std::time::{Duration, Instant};

use bufshare::protocol::{self, Status};
use bufshare::testcard::{Pattern, Picture};
use clap::Args;
use zerocopy::IntoBytes;

use crate::device::{Device, Exported, Offer, Point, Source, map};
use crate::draw::image;
use crate::follow::{Followed, Terms, Wanted};
use crate::points::Bell;
use crate::{Extent, Failure, Grantee, line, mode_name, uapi};

#[derive(Debug, Args)]
pub struct Produce {
    /// Of the pool; its images are NAME-0, NAME-1 and so on.
    #[arg(value_name = "NAME")]
    name: String,
    /// How many frames; 0: until killed.
    #[arg(long, value_name = "N", default_value_t = 0)]
    frames: u64,
    /// How many images.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=64))]
    images: u64,
    /// Pixels.
    #[arg(long, value_name = "WxH", default_value = "640x480")]
    size: Extent,
    /// Who may use it: host, a peer's name or number, `:rw` to let it write; repeatable.
    #[arg(long, value_name = "PEER[:rw]", default_value = "host")]
    grant: Vec<Grantee>,
    /// Fail rather than let the device copy.
    #[arg(long)]
    zero_copy: bool,
    /// Tell that this frame was not drawn: an error, for them to hear of.
    #[arg(long, value_name = "NUMBER")]
    spoil: Option<u64>,
}

#[derive(Debug, Args)]
pub struct Consume {
    /// Of the pool.
    #[arg(value_name = "NAME")]
    name: String,
    /// How many frames to see; 0: until the exporter goes.
    #[arg(long, value_name = "N", default_value_t = 0)]
    frames: u64,
    /// How many images the pool has.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=64))]
    images: u64,
    /// Ask for the right to write, too, without which most VMMs cannot show the exporter's own memory.
    #[arg(long)]
    write: bool,
    /// Fail rather than let the device copy.
    #[arg(long)]
    zero_copy: bool,
}

/// Waits for a point, however long the other side takes.
fn wait(device: &Device, point: Point) -> Result<(), Failure> {
    loop {
        match device.wait(point, Some(Duration::MAX)) {
            Err(error) if error.errno() == libc::ETIMEDOUT => {}
            other => return Ok(other.map(drop)?),
        }
    }
}

/// Which image the n-th frame is in, from 1 on.
fn place<T>(images: &[T], frame: u64) -> Result<(usize, &T), Failure> {
    let at = (frame.saturating_sub(1) % (images.len() as u64).max(1)) as usize;
    let image = images.get(at).ok_or_else(|| Failure::Wrong("no images".to_owned()))?;
    Ok((at, image))
}

impl Produce {
    pub fn run(&self, device: &Device) -> Result<(), Failure> {
        let stride = self.size.width * 4;
        let granule = u64::from(device.info()?.granule);
        let size = (u64::from(stride) * u64::from(self.size.height)).next_multiple_of(granule);
        let dmabuf = device.alloc(size * self.images)?;
        let mapping = map(&dmabuf, size * self.images)?;
        let access = self.grant.iter().fold(uapi::ACCESS_READ, |all, to| all | to.access);
        let offer =
            Offer { zero_copy: self.zero_copy, access, name: &self.name, ..Offer::default() };
        let pool = device.export(Source::DmaBuf(&dmabuf), &offer)?;
        let metadata = image(self.size, stride);
        let mut images: Vec<Exported> = Vec::new();
        for number in 0..self.images {
            let name = format!("{}-{number}", self.name);
            let source = Source::Part { pool: pool.handle, offset: number * size, size };
            let (metadata_type, metadata) = (protocol::metadata::IMAGE, metadata.as_bytes());
            let offer = Offer { name: &name, metadata_type, metadata, ..offer };
            let part = device.export(source, &offer)?;
            for to in &self.grant {
                device.grant(part.handle, to.who.find(device)?, to.access)?;
            }
            images.push(part);
        }
        line(&format!("exported images={} mode={}", self.images, mode_name(pool.mode)))?;
        // Else frames would be drawn for nobody.
        for image in &images {
            while device.query(image.handle)?.use_count == 0 {
                device.event(None)?;
            }
        }
        line("used")?;

        let start = Instant::now();
        let mut frame = 0;
        while frame != self.frames || frame == 0 {
            frame += 1;
            let (at, image) = place(&images, frame)?;
            wait(device, Point::done(image.handle, frame.saturating_sub(self.images)))?;
            let picture = Picture {
                pattern: Pattern::Stamp,
                frame: frame as u32,
                width: self.size.width,
                height: self.size.height,
            };
            device.sync(image.handle, uapi::SYNC_F_WRITE)?;
            let drawn = mapping.write_at(at * size as usize, &picture.bytes());
            drawn.map_err(|source| Failure::Io { what: "drawing".into(), source })?;
            device.sync(image.handle, uapi::SYNC_F_END | uapi::SYNC_F_WRITE)?;
            let spoilt = self.spoil == Some(frame);
            let error = if spoilt { Status::Io.to_wire().into() } else { 0 };
            device.signal(Point::ready(image.handle, frame), error)?;
        }
        for last in frame.saturating_sub(self.images - 1).max(1)..=frame {
            wait(device, Point::done(place(&images, last)?.1.handle, last))?;
        }
        line(&format!("produced frames={frame} seconds={:.1}", start.elapsed().as_secs_f64()))
    }
}

/// What became of a frame.
enum Arrived {
    Ready,
    Spoilt,
    Revoked,
}

impl Consume {
    /// Waits for a frame by an eventfd, as a program does that has other things to wait for, too.
    fn arrived(&self, device: &Device, bell: &Bell, point: Point) -> Result<Arrived, Failure> {
        match device.watch(point, bell.file()) {
            Ok(()) => drop(bell.rung(None)?),
            Err(error) if error.errno() == libc::EOWNERDEAD => return Ok(Arrived::Revoked),
            Err(error) => return Err(error.into()),
        }
        match device.wait(point, None) {
            Ok(_) => Ok(Arrived::Ready),
            Err(error) if error.errno() == libc::EIO => Ok(Arrived::Spoilt),
            Err(error) if error.errno() == libc::EOWNERDEAD => Ok(Arrived::Revoked),
            Err(error) => Err(error.into()),
        }
    }

    pub fn run(&self, device: &Device) -> Result<(), Failure> {
        let write = if self.write { uapi::ACCESS_WRITE } else { 0 };
        let access = uapi::ACCESS_READ | write;
        let terms = Terms { access, zero_copy: self.zero_copy, from: None };
        let mut images = Vec::new();
        for number in 0..self.images {
            let wanted = Wanted::Name(format!("{}-{number}", self.name));
            images.push(Followed::find(device, &wanted, terms)?);
        }
        let shape = place(&images, 1)?.1.image()?;
        let mut bytes = vec![0; shape.width as usize * shape.height as usize * 4];
        let bell = Bell::new()?;
        let start = Instant::now();
        let (mut frame, mut wrong, mut spoilt) = (0, 0, 0);
        let mut ended = "";
        while frame != self.frames || frame == 0 {
            let (_, image) = place(&images, frame + 1)?;
            let handle = image.buffer.handle;
            match self.arrived(device, &bell, Point::ready(handle, frame + 1))? {
                Arrived::Revoked => {
                    ended = " ended=revoked";
                    break;
                }
                Arrived::Spoilt => spoilt += 1,
                Arrived::Ready => {
                    if image.read(&mut bytes)?.is_none() {
                        ended = " ended=revoked";
                        break;
                    }
                    let right = Picture::stamped(&bytes).is_ok_and(|n| u64::from(n) == frame + 1);
                    wrong += u64::from(!right);
                }
            }
            frame += 1;
            if frame == 1 {
                line("frame number=1")?;
            }
            match device.signal(Point::done(handle, frame), 0) {
                Err(error) if error.errno() == libc::EOWNERDEAD => {}
                other => other?,
            }
        }
        line(&format!(
            "consumed frames={frame} wrong={wrong} spoilt={spoilt} mode={} seconds={:.1}{ended}",
            mode_name(place(&images, 1)?.1.buffer.mode),
            start.elapsed().as_secs_f64()
        ))?;
        if wrong > 0 {
            return Err(Failure::Wrong(format!(
                "{wrong} of {frame} frames are not what was drawn"
            )));
        }
        Ok(())
    }
}
