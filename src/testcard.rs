//! Pictures to test with: what `bufshare-guest` draws, and what whoever looks at the other end
//! recomputes to compare. Pure: the same arguments give the same bytes everywhere.
//!
//! It knows pixels, not buffers. Pixels are XRGB8888, little-endian: blue, green, red, 255.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

/// What is drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pattern {
    /// Colour bars, a grey ramp, one-pixel stripes and a white frame: shows wrong strides, swapped
    /// channels and lost rows or columns.
    Card,
    /// A bar that moves by its own width each frame: shows torn and stale frames.
    Bar,
    /// The number of the frame in large digits.
    Counter,
    /// The number of the frame in each pixel, mixed with its place: shows the smallest tear.
    Stamp,
}

/// A name that is no [`Pattern`].
#[derive(Debug, Error)]
#[error("{0:?} is no pattern; card, bar, counter and stamp are")]
pub struct UnknownPattern(String);

impl FromStr for Pattern {
    type Err = UnknownPattern;

    fn from_str(name: &str) -> Result<Self, UnknownPattern> {
        match name {
            "card" => Ok(Pattern::Card),
            "bar" => Ok(Pattern::Bar),
            "counter" => Ok(Pattern::Counter),
            "stamp" => Ok(Pattern::Stamp),
            _ => Err(UnknownPattern(name.to_owned())),
        }
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Pattern::Card => "card",
            Pattern::Bar => "bar",
            Pattern::Counter => "counter",
            Pattern::Stamp => "stamp",
        })
    }
}

/// One picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Picture {
    /// What is drawn.
    pub pattern: Pattern,
    /// Number of the frame, from 0.
    pub frame: u32,
    /// Pixels, not 0.
    pub width: u32,
    /// Pixels, not 0.
    pub height: u32,
}

/// Red, green, blue.
pub type Rgb = [u8; 3];

const WHITE: Rgb = [255, 255, 255];
const BARS: [Rgb; 8] = [
    [191, 191, 191],
    [191, 191, 0],
    [0, 191, 191],
    [0, 191, 0],
    [191, 0, 191],
    [191, 0, 0],
    [0, 0, 191],
    [16, 16, 16],
];
/// Rows of five 3-pixel-wide cells per digit, the left cell being the highest bit.
const DIGITS: [[u8; 5]; 10] = [
    [7, 5, 5, 5, 7],
    [2, 6, 2, 2, 7],
    [7, 1, 7, 4, 7],
    [7, 1, 7, 1, 7],
    [5, 5, 7, 1, 1],
    [7, 4, 7, 1, 7],
    [7, 4, 7, 5, 7],
    [7, 1, 1, 1, 1],
    [7, 5, 7, 5, 7],
    [7, 5, 7, 1, 7],
];

/// `value * scale / of` without overflow; 0 where `of` is 0.
fn ratio(value: u32, scale: u32, of: u32) -> u32 {
    (u64::from(value) * u64::from(scale)).checked_div(u64::from(of)).unwrap_or(0) as u32
}

impl Picture {
    /// The colour at column `x`, row `y`.
    pub fn pixel(&self, x: u32, y: u32) -> Rgb {
        match self.pattern {
            Pattern::Card => self.card(x, y),
            Pattern::Bar => self.bar(x, y),
            Pattern::Counter => self.counter(x, y),
            Pattern::Stamp => self.stamp(x, y),
        }
    }

    fn card(&self, x: u32, y: u32) -> Rgb {
        if x == 0 || y == 0 || x == self.width - 1 || y == self.height - 1 {
            return WHITE;
        }
        match ratio(y, 8, self.height) {
            0..=4 => BARS[ratio(x, 8, self.width).min(7) as usize],
            5..=6 => [ratio(x, 256, self.width).min(255) as u8; 3],
            _ => [if (x ^ y) & 1 == 0 { 224 } else { 32 }; 3],
        }
    }

    fn bar(&self, x: u32, y: u32) -> Rgb {
        let step = (self.width / 16).max(1);
        let left = (u64::from(self.frame) * u64::from(step) % u64::from(self.width)) as u32;
        if x >= left && x < left + step {
            return [255, 224, 0];
        }
        [16, 32, ratio(y, 160, self.height) as u8 + 48]
    }

    fn counter(&self, x: u32, y: u32) -> Rgb {
        const COLUMNS: u32 = 6 * 4 + 1;
        const ROWS: u32 = 7;
        let (column, row) = (ratio(x, COLUMNS, self.width), ratio(y, ROWS, self.height));
        let shade = (self.frame.wrapping_mul(37) & 0x3f) as u8;
        let ground = [shade, 24, 63 - shade];
        if !(1..ROWS - 1).contains(&row) || column % 4 == 0 {
            return ground;
        }
        let place = 5 - column / 4;
        let digit = self.frame / 10u32.pow(place) % 10;
        let cells = DIGITS[digit as usize][row as usize - 1];
        if cells >> (3 - column % 4) & 1 == 1 { WHITE } else { ground }
    }

    fn stamp(&self, x: u32, y: u32) -> Rgb {
        let place = y.wrapping_mul(self.width).wrapping_add(x).wrapping_mul(0x9e_3779);
        let [_, red, green, blue] = (self.frame ^ place).to_be_bytes();
        [red, green, blue]
    }

    /// The number of the frame, modulo 2^24, that these rows of pixels next to each other are of, where
    /// they are a whole [`Pattern::Stamp`]; else the first byte that is of another frame than the first
    /// pixel.
    pub fn stamped(bytes: &[u8]) -> Result<u32, usize> {
        let pixel = |bytes: &[u8]| match bytes {
            [blue, green, red, _] => u32::from_be_bytes([0, *red, *green, *blue]),
            _ => 0,
        };
        let frame = bytes.get(..4).map_or(0, pixel);
        let mut place = 0u32;
        for (index, bytes) in bytes.chunks_exact(4).enumerate() {
            if pixel(bytes) != (frame ^ place) & 0xff_ffff {
                return Err(index * 4);
            }
            place = place.wrapping_add(0x9e_3779);
        }
        Ok(frame)
    }

    /// Draws into `out`, whose rows begin every `stride` bytes. Bytes after the end of a row stay.
    ///
    /// Rows that do not fit into `out`, and all where `stride` is less than four bytes a pixel, are
    /// left out; [`Picture::bytes`] says what fits.
    pub fn draw(&self, stride: usize, out: &mut [u8]) {
        if stride < self.width as usize * 4 {
            return;
        }
        for (y, row) in (0..self.height).zip(out.chunks_mut(stride)) {
            for (x, pixel) in (0..self.width).zip(row.chunks_exact_mut(4)) {
                let [red, green, blue] = self.pixel(x, y);
                pixel.copy_from_slice(&[blue, green, red, 255]);
            }
        }
    }

    /// The picture with rows next to each other.
    pub fn bytes(&self) -> Vec<u8> {
        let stride = self.width as usize * 4;
        let mut bytes = vec![0; stride * self.height as usize];
        self.draw(stride, &mut bytes);
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picture(pattern: Pattern, frame: u32) -> Picture {
        Picture { pattern, frame, width: 100, height: 60 }
    }

    #[test]
    fn strides_only_move_rows() {
        let card = picture(Pattern::Card, 0);
        let mut wide = vec![7; 512 * 60];
        card.draw(512, &mut wide);
        for (row, tight) in wide.chunks(512).zip(card.bytes().chunks(400)) {
            assert_eq!(&row[..400], tight);
            assert!(row[400..].iter().all(|byte| *byte == 7));
        }
    }

    #[test]
    fn what_does_not_fit_is_left_out() {
        let mut small = vec![0; 401];
        picture(Pattern::Bar, 3).draw(400, &mut small);
        picture(Pattern::Bar, 3).draw(399, &mut small);
        assert_eq!(small[400], 0);
    }

    #[test]
    fn frames_differ_and_repeat_themselves() {
        for pattern in [Pattern::Bar, Pattern::Counter, Pattern::Stamp] {
            assert_ne!(picture(pattern, 1).bytes(), picture(pattern, 2).bytes(), "{pattern}");
            assert_eq!(picture(pattern, 9).bytes(), picture(pattern, 9).bytes(), "{pattern}");
        }
    }

    #[test]
    fn every_extent_can_be_drawn() {
        for pattern in [Pattern::Card, Pattern::Bar, Pattern::Counter] {
            for (width, height) in [(1, 1), (2, 1), (1, 9), (17, 3)] {
                let bytes = Picture { pattern, frame: u32::MAX, width, height }.bytes();
                assert!(bytes.chunks(4).all(|pixel| pixel[3] == 255));
            }
        }
    }

    #[test]
    fn a_stamp_tells_its_frame_and_each_tear() {
        for frame in [0, 1, 77, 0xff_ffff] {
            let stamp = picture(Pattern::Stamp, frame).bytes();
            assert_eq!(Picture::stamped(&stamp), Ok(frame));
            for torn in [4, 400, stamp.len() - 4] {
                let mut bytes = stamp.clone();
                let next = picture(Pattern::Stamp, frame + 1).bytes();
                bytes[torn..].copy_from_slice(&next[torn..]);
                assert_eq!(Picture::stamped(&bytes), Err(torn));
            }
        }
    }

    #[test]
    fn names_are_read_back() {
        for pattern in [Pattern::Card, Pattern::Bar, Pattern::Counter, Pattern::Stamp] {
            assert_eq!(pattern.to_string().parse::<Pattern>().unwrap(), pattern);
        }
        assert!("cards".parse::<Pattern>().is_err());
    }
}
