//! `bufshare-guest query`: how long a control request takes, from the program to the device and
//! back.

use std::time::{Duration, Instant};

use clap::Args;

use crate::device::{Device, Offer, Source};
use crate::{Failure, line, uapi};

#[derive(Debug, Args)]
pub struct Latency {
    /// How many requests.
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..))]
    count: u32,
}

impl Latency {
    pub fn run(&self, device: &Device) -> Result<(), Failure> {
        let dmabuf = device.alloc(u64::from(device.info()?.granule))?;
        let offer = Offer { access: uapi::ACCESS_READ, name: "query", ..Offer::default() };
        let buffer = device.export(Source::DmaBuf(&dmabuf), &offer)?;
        let mut times = Vec::with_capacity(self.count as usize);
        for _ in 0..self.count {
            let start = Instant::now();
            device.query(buffer.handle)?;
            times.push(start.elapsed());
        }
        times.sort_unstable();
        let at = |percent: usize| -> Duration {
            times.get(times.len() * percent / 100).copied().unwrap_or_default()
        };
        line(&format!(
            "query count={} p50_us={:.1} p99_us={:.1}",
            self.count,
            at(50).as_secs_f64() * 1e6,
            at(99).as_secs_f64() * 1e6
        ))
    }
}
