//! `bufshare-guest relay`: takes a picture out of another peer's buffer, changes it so that people can
//! tell, and shows it to the host in a buffer of this guest.

use std::time::Duration;

use clap::Args;

use crate::device::{Device, Offer, Source, map};
use crate::follow::{Followed, News, Terms, Wanted};
use crate::{Failure, line, mode_name, uapi};
use bufshare::protocol::peer;

#[derive(Debug, Args)]
pub struct Relay {
    /// Which buffer: its UUID, or its name.
    #[arg(value_name = "NAME|UUID")]
    wanted: Wanted,
    /// Name of this guest's buffer.
    #[arg(long, value_name = "NAME", default_value = "relay")]
    name: String,
    /// How many frames; 0: until the exporter wants its buffer back or goes.
    #[arg(long, value_name = "N", default_value_t = 0)]
    frames: u32,
    /// Ask for the right to write, too, without which most VMMs cannot show the exporter's own memory.
    #[arg(long)]
    write: bool,
    /// Keep the last frame for so long before the release.
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    hold: u64,
}

impl Relay {
    pub fn run(&self, device: &Device) -> Result<(), Failure> {
        let write = if self.write { uapi::ACCESS_WRITE } else { 0 };
        let terms = Terms { access: uapi::ACCESS_READ | write, zero_copy: false, from: None };
        let source = Followed::find(device, &self.wanted, terms)?;
        source.image()?;
        let size = source.buffer.size;
        let dmabuf = device.alloc(size)?;
        let mapping = map(&dmabuf, size)?;
        let offer = Offer {
            access: uapi::ACCESS_READ,
            name: &self.name,
            metadata_type: source.buffer.metadata_type,
            metadata: &source.buffer.metadata,
            ..Offer::default()
        };
        let own = device.export(Source::DmaBuf(&dmabuf), &offer)?;
        line(&format!("exported handle={} mode={}", own.handle, mode_name(own.mode)))?;

        let mut bytes = vec![0; size as usize];
        let mut frames = 0;
        while source.read(&mut bytes)?.is_some() {
            for byte in &mut bytes {
                *byte ^= 0xff;
            }
            device.sync(own.handle, uapi::SYNC_F_WRITE)?;
            let drawn = mapping.write_at(0, &bytes);
            drawn.map_err(|source| Failure::Io { what: "drawing".into(), source })?;
            let generation = device.sync(own.handle, uapi::SYNC_F_END | uapi::SYNC_F_WRITE)?;
            line(&format!("relayed number={frames} generation={generation}"))?;
            if frames == 0 {
                device.grant(own.handle, peer::HOST, uapi::ACCESS_READ)?;
            }
            frames += 1;
            if frames == self.frames || source.next()? != News::Changed {
                break;
            }
        }
        drop(source);
        std::thread::sleep(Duration::from_secs(self.hold));
        line("done")
    }
}
