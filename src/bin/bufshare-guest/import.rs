//! `bufshare-guest import`: a program that uses a buffer of another peer. One line per step on
//! standard output, `key=value` after the first word, so that tests can read it.

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::Instant;

use bufshare::ioctl::{DmaBufSync, Mapping, dma_buf_sync};
use bufshare::testcard::Picture;
use clap::Args;

use crate::device::{Device, Exported, Offer, Source, map};
use crate::follow::{Followed, News, Terms, Wanted};
use crate::{Failure, PeerName, line, mode_name, picture, uapi};

/// Name of the buffer in which a peer says which frame it has seen.
const ANSWER: &str = "answer";

#[derive(Debug, Args)]
pub struct Import {
    /// Which buffer: its UUID, or its name.
    #[arg(value_name = "NAME|UUID")]
    wanted: Wanted,
    /// How many frames to see; 0: until the exporter wants it back or goes.
    #[arg(long, value_name = "N", default_value_t = 1)]
    frames: u32,
    /// Each frame must be a whole one of `draw --pattern stamp`, and newer than the last.
    #[arg(long)]
    verify: bool,
    /// Tell the exporter, by this name or number, which frame was seen (`draw --pace`).
    #[arg(long, value_name = "PEER")]
    answer: Option<PeerName>,
    /// Write the last frame to this PNG file.
    #[arg(long, value_name = "FILE.png")]
    dump: Option<PathBuf>,
    /// Ask for the right to write, too, without which most VMMs cannot show the exporter's own memory.
    #[arg(long)]
    write: bool,
    /// Fail rather than let the device copy.
    #[arg(long)]
    zero_copy: bool,
    /// Try to export it again as a buffer of this guest, which is refused for what is in the window.
    #[arg(long)]
    share: bool,
    /// Keep it until it is taken away, and then use the mapping once more: to be killed by SIGBUS.
    #[arg(long)]
    touch: bool,
}

/// What was seen.
#[derive(Debug, Default)]
struct Seen {
    frames: u32,
    torn: u32,
    /// Older than, or another at the same generation as, the one before.
    stale: u32,
    /// Between two that were seen.
    missed: u32,
    generation: u64,
    last: Option<u32>,
}

impl Seen {
    fn frame(&mut self, bytes: &[u8], generation: u64) -> Result<u32, Failure> {
        self.frames += 1;
        let Ok(frame) = Picture::stamped(bytes) else {
            self.torn += 1;
            self.generation = generation;
            return Ok(0);
        };
        if let Some(last) = self.last {
            let newer = frame > last;
            let expected = generation > self.generation;
            self.stale += u32::from(newer != expected);
            self.missed += frame.saturating_sub(last + 1);
        }
        (self.last, self.generation) = (Some(frame), generation);
        Ok(frame)
    }
}

/// The buffer in which this peer answers.
pub fn find_answer(device: &Device, peer: u32) -> Result<Followed<'_>, Failure> {
    let access = uapi::ACCESS_READ | uapi::ACCESS_WRITE;
    let terms = Terms { access, zero_copy: false, from: Some(peer) };
    Followed::find(device, &Wanted::Name(ANSWER.to_owned()), terms)
}

/// A buffer of our own for answers.
struct Answer<'a> {
    device: &'a Device,
    buffer: Exported,
    mapping: Mapping,
}

impl<'a> Answer<'a> {
    fn new(device: &'a Device, peer: u32) -> Result<Self, Failure> {
        let size = u64::from(device.info()?.granule);
        let dmabuf = device.alloc(size)?;
        let mapping = map(&dmabuf, size)?;
        // With WRITE, so that nothing has to be copied.
        let access = uapi::ACCESS_READ | uapi::ACCESS_WRITE;
        let offer = Offer { access, name: ANSWER, ..Offer::default() };
        let buffer = device.export(Source::DmaBuf(&dmabuf), &offer)?;
        device.grant(buffer.handle, peer, access)?;
        Ok(Answer { device, buffer, mapping })
    }

    fn tell(&self, frame: u32) -> Result<(), Failure> {
        let handle = self.buffer.handle;
        self.device.sync(handle, uapi::SYNC_F_WRITE)?;
        let told = self.mapping.write_at(0, &frame.wrapping_add(1).to_le_bytes());
        told.map_err(|source| Failure::Io { what: "answering".into(), source })?;
        self.device.sync(handle, uapi::SYNC_F_END | uapi::SYNC_F_WRITE)?;
        Ok(())
    }
}

impl Import {
    pub fn run(&self, device: &Device) -> Result<(), Failure> {
        let write = if self.write { uapi::ACCESS_WRITE } else { 0 };
        let access = uapi::ACCESS_READ | write;
        let terms = Terms { access, zero_copy: self.zero_copy, from: None };
        let followed = Followed::find(device, &self.wanted, terms)?;
        let answer = match &self.answer {
            Some(peer) => Some(Answer::new(device, peer.find(device)?)?),
            None => None,
        };
        let image = if self.verify || self.dump.is_some() { Some(followed.image()?) } else { None };
        let len = match &image {
            Some(image) if self.verify => image.width as usize * image.height as usize * 4,
            _ => followed.buffer.size as usize,
        };
        let start = Instant::now();
        let mut bytes = vec![0; len];
        let mut seen = Seen::default();
        let mut end = None;
        while self.frames == 0 || seen.frames < self.frames {
            let Some(generation) = followed.read(&mut bytes)? else {
                end = Some(News::Revoked);
                break;
            };
            let mut frame = 0;
            if self.verify {
                frame = seen.frame(&bytes, generation)?;
            } else {
                (seen.frames, seen.generation) = (seen.frames + 1, generation);
                line(&format!("frame generation={generation}"))?;
            }
            if let Some(answer) = &answer {
                answer.tell(frame)?;
            }
            if seen.frames == self.frames {
                break;
            }
            let mut news = followed.next()?;
            while self.touch && news == News::Withdrawn {
                news = followed.next()?;
            }
            if news != News::Changed {
                end = Some(news);
                break;
            }
        }
        let Seen { frames, torn, stale, missed, generation, .. } = seen;
        line(&format!(
            "imported frames={frames} torn={torn} stale={stale} missed={missed} \
             generation={generation} mode={} seconds={:.1}",
            mode_name(followed.buffer.mode),
            start.elapsed().as_secs_f64()
        ))?;
        if let (Some(file), Some(image)) = (&self.dump, &image) {
            let unreadable = |source| Failure::Image { name: followed.buffer.name.clone(), source };
            let format = image.readable().map_err(unreadable)?;
            let mut pixels = Vec::new();
            let row = format.line_bytes(image.width) as usize;
            for y in 0..image.height as usize {
                let at = image.planes[0].offset as usize + y * image.planes[0].stride as usize;
                format.unpack(bytes.get(at..at + row).unwrap_or_default(), &mut pixels);
            }
            picture::write(image.width, image.height, &pixels, file)?;
        }
        if self.share {
            let offer = Offer { access: uapi::ACCESS_READ, name: "again", ..Offer::default() };
            match device.export(Source::DmaBuf(&followed.buffer.fd), &offer) {
                Ok(buffer) => line(&format!("shared mode={}", mode_name(buffer.mode)))?,
                Err(error) => line(&format!("not shared errno={}", error.errno()))?,
            }
        }
        match end {
            Some(News::Revoked) => self.revoked(&followed)?,
            Some(_) => line("ended withdrawn")?,
            None => {}
        }
        if torn + stale > 0 {
            return Err(Failure::Wrong(format!("of {frames} frames {torn} torn, {stale} stale")));
        }
        Ok(())
    }

    /// Nothing works on a dead attachment.
    fn revoked(&self, followed: &Followed<'_>) -> Result<(), Failure> {
        let sync = DmaBufSync { end: false, read: true, write: false };
        let begin = dma_buf_sync(followed.buffer.fd.as_fd(), sync);
        let mapped = Mapping::new(&followed.buffer.fd, followed.buffer.size as usize, false);
        let (Err(begin), Err(mapped)) = (begin, mapped) else {
            return Err(Failure::Wrong("a revoked buffer can still be used".into()));
        };
        let errno = |error: &std::io::Error| error.raw_os_error().unwrap_or(0);
        line(&format!("ended revoked begin={} map={}", errno(&begin), errno(&mapped)))?;
        if self.touch {
            let what = "the mapping".to_owned();
            let touched = followed.mapping.read_at(0, &mut [0]);
            touched.map_err(|source| Failure::Io { what, source })?;
            return Err(Failure::Wrong("a revoked buffer can still be read".into()));
        }
        Ok(())
    }
}
