//! `bufshare-guest snatch`: one guest offers buffers and takes each back by force as soon as somebody has
//! attached it, another attaches whatever is offered: what is given back twice then comes to light.

use std::time::{Duration, Instant};

use clap::Args;
use uuid::Uuid;

use crate::device::{Device, Offer, Source};
use crate::{Failure, Grantee, line, uapi};

#[derive(Debug, Args)]
pub struct Snatch {
    /// Who is offered buffers; without it, what others offer is attached.
    #[arg(long, value_name = "PEER[:rw]")]
    grant: Option<Grantee>,
    /// How long.
    #[arg(long, value_name = "N", default_value_t = 10)]
    seconds: u64,
}

impl Snatch {
    pub fn run(&self, device: &Device) -> Result<(), Failure> {
        let end = Instant::now() + Duration::from_secs(self.seconds);
        match &self.grant {
            Some(to) => offer(device, to, end),
            None => attach(device, end),
        }
    }
}

/// The next event of this kind; `None` where time is up.
fn wait(device: &Device, kind: u16, end: Instant) -> Result<Option<uapi::Event>, Failure> {
    loop {
        let left = end.saturating_duration_since(Instant::now());
        match device.event(Some(left))? {
            Some(event) if event.kind == kind => return Ok(Some(event)),
            Some(_) => {}
            None => return Ok(None),
        }
    }
}

fn offer(device: &Device, to: &Grantee, end: Instant) -> Result<(), Failure> {
    let dmabuf = device.alloc(u64::from(device.info()?.granule))?;
    let peer = to.who.find(device)?;
    let mut snatched = 0;
    loop {
        let offer = Offer { access: to.access, name: "snatched", ..Offer::default() };
        let handle = device.export(Source::DmaBuf(&dmabuf), &offer)?.handle;
        device.grant(handle, peer, to.access)?;
        let Some(_) = wait(device, uapi::EVENT_BUSY, end)? else {
            return line(&format!("snatched={snatched}"));
        };
        if !device.release(handle, true)? {
            wait(device, uapi::EVENT_RELEASED, end)?;
        }
        snatched += 1;
    }
}

fn attach(device: &Device, end: Instant) -> Result<(), Failure> {
    let (mut attached, mut revoked) = (0, 0);
    // One may be there already, and is not offered again before it was attached.
    let mut next = device.offer(0)?.map(|offer| (offer.uuid, offer.access));
    loop {
        if next.is_none() {
            let offered = wait(device, uapi::EVENT_OFFERED, end)?;
            next = offered.map(|event| (event.uuid, event.access));
        }
        let Some((uuid, access)) = next.take() else {
            return line(&format!("attached={attached} revoked={revoked}"));
        };
        match device.attach(Uuid::from_bytes(uuid), access, false) {
            Ok(_) => attached += 1,
            // While it was being mapped.
            Err(error) if error.errno() == libc::EOWNERDEAD => revoked += 1,
            Err(error) if error.errno() == libc::ENOENT => {}
            Err(error) => return Err(error.into()),
        }
    }
}
