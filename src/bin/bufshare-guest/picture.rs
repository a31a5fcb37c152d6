//! `bufshare-guest picture`: what the other end is expected to show.

use std::fs::File;
use std::io::{BufReader, BufWriter};
use std::path::{Path, PathBuf};

use bufshare::testcard::{Pattern, Picture};
use clap::Args;

use crate::{Extent, Failure, line};

#[derive(Debug, Args)]
#[group(required = true, multiple = true, args = ["output", "compare"])]
pub struct Expected {
    /// card, bar, counter or stamp.
    #[arg(long, default_value = "card")]
    pattern: Pattern,
    /// Pixels.
    #[arg(long, value_name = "WxH", default_value = "640x480")]
    size: Extent,
    /// Number of the frame, from 0.
    #[arg(long, value_name = "N", default_value_t = 0)]
    frame: u32,
    /// As `relay` changes it.
    #[arg(long)]
    negative: bool,
    /// Write it there.
    #[arg(short, long, value_name = "FILE.png")]
    output: Option<PathBuf>,
    /// Compare it with that, pixel by pixel; fails at the first difference.
    #[arg(long, value_name = "FILE.png")]
    compare: Option<PathBuf>,
}

impl Expected {
    /// R, G, B, row after row.
    fn pixels(&self, picture: &Picture) -> Vec<u8> {
        let rows = 0..picture.height;
        let pixels = rows.flat_map(|y| (0..picture.width).flat_map(move |x| picture.pixel(x, y)));
        let change = if self.negative { 0xff } else { 0 };
        pixels.map(|sample| sample ^ change).collect()
    }

    pub fn run(&self) -> Result<(), Failure> {
        let Extent { width, height } = self.size;
        let picture = Picture { pattern: self.pattern, frame: self.frame, width, height };
        if let Some(file) = &self.output {
            write(picture.width, picture.height, &self.pixels(&picture), file)?;
        }
        if let Some(file) = &self.compare {
            compare(&picture, &self.pixels(&picture), file)?;
            line(&format!("same {}", file.display()))?;
        }
        Ok(())
    }
}

/// Writes R, G, B, row after row, to a PNG file.
pub fn write(width: u32, height: u32, pixels: &[u8], file: &Path) -> Result<(), Failure> {
    let name = file.display().to_string();
    let out = File::create(file);
    let out = out.map_err(|source| Failure::Io { what: format!("creating {name}"), source })?;
    let mut encoder = png::Encoder::new(BufWriter::new(out), width, height);
    encoder.set_color(png::ColorType::Rgb);
    encoder
        .write_header()
        .and_then(|mut writer| writer.write_image_data(pixels))
        .map_err(|source| Failure::PngOut { file: name, source })
}

fn compare(picture: &Picture, expected: &[u8], file: &Path) -> Result<(), Failure> {
    let name = file.display().to_string();
    let unreadable = |source| Failure::PngIn { file: name.clone(), source };
    let input = File::open(file);
    let input = input.map_err(|source| Failure::Io { what: format!("opening {name}"), source })?;
    let mut decoder = png::Decoder::new(BufReader::new(input));
    decoder.set_transformations(png::Transformations::normalize_to_color8());
    let mut reader = decoder.read_info().map_err(unreadable)?;
    let size = reader.output_buffer_size();
    let size = size.ok_or_else(|| Failure::Wrong(format!("{name} is too large")))?;
    let mut pixels = vec![0; size];
    let info = reader.next_frame(&mut pixels).map_err(unreadable)?;
    let (width, height) = (picture.width, picture.height);
    if (info.width, info.height) != (width, height) {
        let text = format!("{name} is {}x{}, not {width}x{height}", info.width, info.height);
        return Err(Failure::Wrong(text));
    }
    let samples = info.color_type.samples();
    if samples < 3 {
        return Err(Failure::Wrong(format!("{name} has no colours")));
    }
    let mut expected = expected.chunks(3);
    for (y, row) in (0..height).zip(pixels.chunks(info.line_size)) {
        for (x, pixel) in (0..width).zip(row.chunks(samples)) {
            let expected = expected.next().unwrap_or_default();
            if pixel[..3] != *expected {
                let seen = &pixel[..3];
                let text = format!("{name} at {x},{y}: {seen:?} instead of {expected:?}");
                return Err(Failure::Wrong(text));
            }
        }
    }
    Ok(())
}
