//! Names and metadata of buffers, as far as bytes alone can be judged.

use zerocopy::FromBytes;

use crate::protocol::{self as wire, NAME_LEN, Status, metadata};

/// UTF-8, then NULs up to the end.
/// UTF-8, NUL padded.
pub fn check_name(name: &[u8; NAME_LEN]) -> Result<(), Status> {
    let end = name.iter().position(|byte| *byte == 0).unwrap_or(NAME_LEN);
    let (text, padding) = name.split_at(end);
    let good = std::str::from_utf8(text).is_ok() && padding.iter().all(|byte| *byte == 0);
    if good { Ok(()) } else { Err(Status::Inval) }
}

/// What a device makes sure of before it hands metadata on.
pub fn check_metadata(kind: u32, bytes: &[u8], size: u64) -> Result<(), Status> {
    match kind {
        metadata::NONE if bytes.is_empty() => Ok(()),
        metadata::IMAGE => check_image(bytes, size),
        metadata::PRIVATE.. => Ok(()),
        _ => Err(Status::Inval),
    }
}

fn check_image(bytes: &[u8], size: u64) -> Result<(), Status> {
    let image = wire::Image::read_from_bytes(bytes).ok().ok_or(Status::Inval)?;
    let planes = usize::try_from(image.nr_planes.get()).ok().ok_or(Status::Inval)?;
    let used = image.planes.get(..planes).filter(|used| !used.is_empty()).ok_or(Status::Inval)?;
    let inside = used.iter().all(|plane| plane.offset.get() < size);
    let clean = image.planes.iter().all(|plane| plane.reserved.get() == 0);
    if inside && clean { Ok(()) } else { Err(Status::Inval) }
}
