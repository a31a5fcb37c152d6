//! Image metadata: what an exporter claims about the pixels in its buffer, checked against the
//! buffer, and the formats that this crate can turn into RGBA.
//!
//! It knows bytes and formats, not sockets or fds. The claim comes from a guest: nothing of it is
//! used before [`Image::parse`] accepted it.

use thiserror::Error;
use zerocopy::FromBytes;

use crate::protocol;

/// `DRM_FORMAT_MOD_LINEAR`.
pub const MOD_LINEAR: u64 = 0;
/// `DRM_FORMAT_MOD_INVALID`: the exporter named no layout.
pub const MOD_INVALID: u64 = 0x00ff_ffff_ffff_ffff;

/// One plane of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plane {
    /// Bytes from the start of the buffer.
    pub offset: u32,
    /// Bytes from one line to the next.
    pub stride: u32,
}

/// An image whose planes start inside its buffer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// `DRM_FORMAT_*`.
    pub fourcc: u32,
    /// `DRM_FORMAT_MOD_*`.
    pub modifier: u64,
    /// Pixels.
    pub width: u32,
    /// Pixels.
    pub height: u32,
    /// One to four.
    pub planes: Vec<Plane>,
}

/// Why metadata describe no usable image.
#[derive(Debug, Error, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum ImageError {
    #[error("the buffer has no image metadata (metadata type {0})")]
    NoImage(u32),
    #[error("image metadata are {0} bytes long, not 88")]
    Length(usize),
    #[error("an image of {0} planes; 1 to 4 are possible")]
    Planes(u32),
    #[error("an image of {width}x{height} pixels")]
    Extent { width: u32, height: u32 },
    #[error(
        "plane {plane} (offset {offset}, stride {stride}) does not fit the buffer of {size} bytes"
    )]
    Outside { plane: usize, offset: u64, stride: u32, size: u64 },
    #[error("pixel format {} cannot be read here; one of {} can", fourcc_text(*.0), known_formats())]
    Format(u32),
    #[error(
        "the pixels are tiled or compressed (modifier {0:#x}); only linear ones can be read here"
    )]
    Modifier(u64),
}

impl Image {
    /// The image that `bytes` of metadata describe, in a buffer of `size` bytes.
    ///
    /// Of known formats every line is inside the buffer, of others the start of each plane.
    pub fn parse(metadata_type: u32, bytes: &[u8], size: u64) -> Result<Image, ImageError> {
        if metadata_type != protocol::metadata::IMAGE {
            return Err(ImageError::NoImage(metadata_type));
        }
        let Ok((raw, _)) = protocol::Image::read_from_prefix(bytes) else {
            return Err(ImageError::Length(bytes.len()));
        };
        let (width, height) = (raw.width.get(), raw.height.get());
        if width == 0 || height == 0 || width > i32::MAX as u32 || height > i32::MAX as u32 {
            return Err(ImageError::Extent { width, height });
        }
        let count = raw.nr_planes.get();
        if !(1..=4).contains(&count) {
            return Err(ImageError::Planes(count));
        }
        let format = Format::find(raw.fourcc.get());
        let linear = matches!(raw.modifier.get(), MOD_LINEAR | MOD_INVALID);
        let mut planes = Vec::new();
        for (plane, raw) in raw.planes.iter().take(count as usize).enumerate() {
            let (offset, stride) = (raw.offset.get(), raw.stride.get());
            let (line, lines) = match format {
                Some(format) if linear => (format.line_bytes(width), u64::from(height)),
                _ => (1, 1),
            };
            let end = (lines - 1)
                .checked_mul(u64::from(stride))
                .and_then(|end| end.checked_add(line))
                .and_then(|end| end.checked_add(offset));
            let fits = end.is_some_and(|end| end <= size) && (line == 1 || line <= stride.into());
            match u32::try_from(offset) {
                Ok(offset) if fits => planes.push(Plane { offset, stride }),
                _ => return Err(ImageError::Outside { plane, offset, stride, size }),
            }
        }
        let (fourcc, modifier) = (raw.fourcc.get(), raw.modifier.get());
        Ok(Image { fourcc, modifier, width, height, planes })
    }

    /// The format, where its pixels can be read by the CPU.
    pub fn readable(&self) -> Result<&'static Format, ImageError> {
        let format = Format::find(self.fourcc).ok_or(ImageError::Format(self.fourcc))?;
        match self.modifier {
            MOD_LINEAR | MOD_INVALID => Ok(format),
            modifier => Err(ImageError::Modifier(modifier)),
        }
    }
}

/// A format of one plane with 8 bits a channel.
#[derive(Debug, PartialEq, Eq)]
pub struct Format {
    /// `DRM_FORMAT_*` as text.
    pub code: [u8; 4],
    /// Bytes a pixel.
    pub bytes: u8,
    /// Where red, green and blue lie in a pixel.
    rgb: [u8; 3],
    /// Where alpha lies, or none.
    alpha: Option<u8>,
}

const fn format(code: [u8; 4], bytes: u8, rgb: [u8; 3], alpha: Option<u8>) -> Format {
    Format { code, bytes, rgb, alpha }
}

/// DRM formats name channels from the highest bit of a little-endian word.
const FORMATS: &[Format] = &[
    format(*b"XR24", 4, [2, 1, 0], None),
    format(*b"AR24", 4, [2, 1, 0], Some(3)),
    format(*b"XB24", 4, [0, 1, 2], None),
    format(*b"AB24", 4, [0, 1, 2], Some(3)),
    format(*b"RX24", 4, [3, 2, 1], None),
    format(*b"RA24", 4, [3, 2, 1], Some(0)),
    format(*b"BX24", 4, [1, 2, 3], None),
    format(*b"BA24", 4, [1, 2, 3], Some(0)),
    format(*b"RG24", 3, [2, 1, 0], None),
    format(*b"BG24", 3, [0, 1, 2], None),
    format(*b"R8  ", 1, [0, 0, 0], None),
];

impl Format {
    /// The format of that number, if it is one of the readable ones.
    pub fn find(fourcc: u32) -> Option<&'static Format> {
        FORMATS.iter().find(|format| u32::from_le_bytes(format.code) == fourcc)
    }

    /// Whether pixels carry alpha.
    pub fn has_alpha(&self) -> bool {
        self.alpha.is_some()
    }

    /// Bytes of the pixels of one line.
    pub fn line_bytes(&self, width: u32) -> u64 {
        u64::from(width) * u64::from(self.bytes)
    }

    /// Appends the pixels of one line as R, G, B (and A where the format has it).
    pub fn unpack(&self, line: &[u8], out: &mut Vec<u8>) {
        for pixel in line.chunks_exact(usize::from(self.bytes)) {
            out.extend(self.rgb.map(|at| pixel[usize::from(at)]));
            out.extend(self.alpha.map(|at| pixel[usize::from(at)]));
        }
    }
}

fn known_formats() -> String {
    FORMATS.iter().map(|f| fourcc_text(u32::from_le_bytes(f.code))).collect::<Vec<_>>().join(", ")
}

/// A `DRM_FORMAT_*` number as people write it.
pub fn fourcc_text(fourcc: u32) -> String {
    let code = fourcc.to_le_bytes();
    if code.iter().all(|byte| byte.is_ascii_graphic() || *byte == b' ') {
        String::from_utf8_lossy(&code).trim_end().to_owned()
    } else {
        format!("{fourcc:#010x}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::IntoBytes;

    fn raw(width: u32, height: u32, stride: u32, offset: u64) -> protocol::Image {
        let mut raw = protocol::Image {
            fourcc: u32::from_le_bytes(*b"XR24").into(),
            nr_planes: 1.into(),
            width: width.into(),
            height: height.into(),
            ..Default::default()
        };
        raw.planes[0].offset = offset.into();
        raw.planes[0].stride = stride.into();
        raw
    }

    #[test]
    fn an_image_that_exactly_fits_is_taken_and_one_byte_more_is_not() {
        let parse = |raw: protocol::Image, size| Image::parse(1, raw.as_bytes(), size);
        assert!(parse(raw(16, 4, 64, 0), 256).is_ok());
        assert!(parse(raw(16, 4, 64, 0), 255).is_err());
        assert!(parse(raw(16, 4, 64, 1), 256).is_err());
        assert!(parse(raw(16, 4, 63, 0), 256).is_err());
        assert!(parse(raw(u32::MAX, u32::MAX, u32::MAX, u64::MAX), u64::MAX).is_err());
        assert!(parse(raw(0, 4, 64, 0), 256).is_err());
        assert_eq!(Image::parse(0, &[], 4096), Err(ImageError::NoImage(0)));
        assert_eq!(Image::parse(1, &[0; 87], 4096), Err(ImageError::Length(87)));
    }

    #[test]
    fn channels_come_out_in_order() {
        let unpack = |code: &[u8; 4], pixel: &[u8]| {
            let mut out = Vec::new();
            Format::find(u32::from_le_bytes(*code)).unwrap().unpack(pixel, &mut out);
            out
        };
        assert_eq!(unpack(b"XR24", &0x00aa_bbccu32.to_le_bytes()), [0xaa, 0xbb, 0xcc]);
        assert_eq!(unpack(b"AR24", &0xddaa_bbccu32.to_le_bytes()), [0xaa, 0xbb, 0xcc, 0xdd]);
        assert_eq!(unpack(b"AB24", &0xddcc_bbaau32.to_le_bytes()), [0xaa, 0xbb, 0xcc, 0xdd]);
        assert_eq!(unpack(b"BA24", &0xccbb_aaddu32.to_le_bytes()), [0xaa, 0xbb, 0xcc, 0xdd]);
        assert_eq!(unpack(b"RG24", &[0xcc, 0xbb, 0xaa]), [0xaa, 0xbb, 0xcc]);
    }
}
