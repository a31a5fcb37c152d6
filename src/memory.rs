//! Guest ranges → segments of shared files.
//!
//! It returns file segments only and refuses memory that is not shareable; it is no general
//! translator. It does not know buffers, requests or rings. After a disconnect nothing is left of a
//! map but the files that live exports still hold.
#![deny(clippy::arithmetic_side_effects)]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;

use rustix::fs::SealFlags;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::limits::{GRANULE, MAX_GUEST_MEMORY, MAX_REGIONS};
use crate::protocol::{Segment, Status};

/// What this daemon's private copies are called, and nothing else.
pub const COPY_NAME: &str = "bufshare-copy";

/// What a region's file allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Share {
    /// A memfd that cannot shrink and can be written: udmabuf takes it.
    Sealed,
    /// One of huge pages: udmabuf takes it, but the host's pool may be empty at the first touch. It
    /// needs the operator's leave.
    Huge,
    /// A file that its owner could truncate under us: copies only, where the operator allows it.
    Unsealed,
    /// Neither: a device's memory, a dma-buf mapped into the guest, a pipe.
    Not,
}

impl Share {
    /// What `file` allows up to byte `end`. What is not there could end the process by SIGBUS.
    pub fn of(file: impl AsFd, end: u64) -> Share {
        let stat = rustix::fs::fstat(&file).ok();
        if stat.is_none_or(|stat| u64::try_from(stat.st_size).is_ok_and(|size| size < end)) {
            return Share::Not;
        }
        if is_ours(file.as_fd()) {
            return Share::Not;
        }
        let seals = rustix::fs::fcntl_get_seals(&file).unwrap_or(SealFlags::empty());
        if seals.contains(SealFlags::SHRINK)
            && !seals.intersects(SealFlags::WRITE | SealFlags::FUTURE_WRITE)
        {
            // Nothing else but hugetlbfs knows seals.
            return if is_tmpfs(&file) { Share::Sealed } else { Share::Huge };
        }
        let regular =
            stat.is_some_and(|stat| rustix::fs::FileType::from_raw_mode(stat.st_mode).is_file());
        if regular && !is_dma_buf(&file) { Share::Unsealed } else { Share::Not }
    }
}

/// Whether its pages are ordinary ones, which the kernel finds when they are touched.
pub fn is_tmpfs(file: impl AsFd) -> bool {
    const TMPFS_MAGIC: rustix::fs::FsWord = 0x0102_1994;
    rustix::fs::fstatfs(&file).is_ok_and(|fs| fs.f_type == TMPFS_MAGIC)
}

/// Whether this is a dma-buf.
pub fn is_dma_buf(file: impl AsFd) -> bool {
    const DMA_BUF_MAGIC: rustix::fs::FsWord = 0x444d_4142;
    rustix::fs::fstatfs(&file).is_ok_and(|fs| fs.f_type == DMA_BUF_MAGIC)
}

/// Whether it is a private copy of this daemon, which a VMM that shows it in the window echoes as memory
/// of its guest: sealed as memory of a guest is, but lent already. Its name tells, which nobody can change;
/// where that cannot be read the file is refused as well.
fn is_ours(file: BorrowedFd<'_>) -> bool {
    let name = format!("/proc/self/fd/{}", file.as_raw_fd());
    let ours = format!("/memfd:{COPY_NAME} ");
    rustix::fs::readlink(name, Vec::new())
        .map_or(true, |target| target.to_bytes().starts_with(ours.as_bytes()))
}

/// One region of guest memory.
#[derive(Debug, Clone)]
pub struct Region {
    /// Guest-physical address.
    pub start: u64,
    /// Bytes.
    pub len: u64,
    /// What holds it.
    pub file: Arc<File>,
    /// Bytes into the file.
    pub file_start: u64,
    /// What the file allows.
    pub share: Share,
}

/// Bytes of a shared file. It keeps the file open.
#[derive(Debug, Clone)]
pub struct FileSegment {
    /// The file.
    pub file: Arc<File>,
    /// Bytes into the file.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
}

/// Why a list of segments is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// A segment without bytes, or two that overlap.
    #[error("segment {0} is empty or overlaps another")]
    Malformed(u32),
    /// Their sum is not the size of the buffer.
    #[error("the segments hold {sum} bytes, the buffer {size}")]
    Sum {
        /// Bytes of all segments.
        sum: u64,
        /// Bytes of the buffer.
        size: u64,
    },
    /// Address or length is no multiple of the granule, or the end does not fit 64 bits.
    #[error("segment {0} is not aligned to {GRANULE} bytes, or wraps around")]
    Misaligned(u32),
    /// Not in shareable guest memory.
    #[error("segment {0} is not shareable memory of the guest")]
    NotMemory(u32),
    /// In memory that its owner could truncate, or of huge pages.
    #[error(
        "segment {0} lies in RAM without F_SEAL_SHRINK, or of huge pages: use memory-backend-memfd,share=on, or allow it with unsealed-ram"
    )]
    Unsealed(u32),
    /// Too many even when merged.
    #[error("{count} segments after merging, {max} are possible")]
    TooMany {
        /// After merging.
        count: usize,
        /// `max_segments` of the configuration space.
        max: u32,
    },
}

impl Refusal {
    /// Wire status and `detail` (spec "EXPORT", errors).
    pub fn status(self) -> (Status, u32) {
        match self {
            Refusal::Malformed(_) | Refusal::Sum { .. } => (Status::Inval, 0),
            Refusal::Misaligned(_) => (Status::Range, 0),
            Refusal::NotMemory(index) | Refusal::Unsealed(index) => (Status::Fault, index),
            Refusal::TooMany { .. } => (Status::TooMany, 0),
        }
    }
}

/// The memory of one guest, as its VMM shared it last.
#[derive(Debug, Clone, Default)]
pub struct MemoryMap {
    regions: Vec<Region>,
}

impl MemoryMap {
    /// The map of these regions, which do not overlap.
    pub fn new(mut regions: Vec<Region>) -> MemoryMap {
        regions.sort_by_key(|region| region.start);
        MemoryMap { regions }
    }

    /// The map of what the VMM shared. Anonymous memory is left out.
    ///
    /// An error where it is more than one VM may have.
    pub fn of_guest(memory: &GuestMemoryMmap) -> io::Result<MemoryMap> {
        let regions = memory.num_regions();
        let bytes = memory.iter().fold(0u64, |sum, region| sum.saturating_add(region.len()));
        if regions > MAX_REGIONS || bytes > MAX_GUEST_MEMORY {
            let text = format!("{bytes} bytes of memory in {regions} regions, too much for one VM");
            return Err(io::Error::other(text));
        }
        let region = |region: &<GuestMemoryMmap as GuestMemoryBackend>::R| {
            let place = region.file_offset()?;
            Some(Region {
                start: region.start_addr().raw_value(),
                len: region.len(),
                file: place.arc().clone(),
                file_start: place.start(),
                share: Share::of(place.file(), place.start().checked_add(region.len())?),
            })
        };
        Ok(MemoryMap::new(memory.iter().filter_map(region).collect()))
    }

    /// The part of `memory` that may be touched: what its owner could truncate, or huge pages that the
    /// host does not have, would end the process by SIGBUS.
    pub fn touchable(&self, memory: &GuestMemoryMmap, allow_unsealed: bool) -> GuestMemoryMmap {
        let good = |start: u64| match self.region_at(start).map(|region| region.share) {
            Some(Share::Sealed) => true,
            Some(Share::Unsealed | Share::Huge) => allow_unsealed,
            Some(Share::Not) | None => false,
        };
        let bad = memory.iter().filter(|region| !good(region.start_addr().raw_value()));
        bad.fold(memory.clone(), |rest, region| {
            let removed = rest.remove_region(region.start_addr(), region.len());
            removed.map_or_else(|_| GuestMemoryMmap::new(), |(rest, _)| rest)
        })
    }

    /// The worst that any region allows, for a warning when a VM starts.
    pub fn has_unsealed(&self) -> bool {
        self.regions.iter().any(|region| matches!(region.share, Share::Unsealed | Share::Huge))
    }

    fn region_at(&self, addr: u64) -> Option<&Region> {
        let after = self.regions.partition_point(|region| region.start <= addr);
        let region = self.regions.get(after.checked_sub(1)?)?;
        (addr.checked_sub(region.start)? < region.len).then_some(region)
    }

    /// Translates segments that [`check_shape`] accepted. They may cross regions; what is adjacent
    /// in the file becomes one. The flag says whether all of it is sealed.
    pub fn translate(
        &self,
        segments: &[Segment],
        max_segments: u32,
        allow_unsealed: bool,
    ) -> Result<(Vec<FileSegment>, bool), Refusal> {
        let mut out: Vec<FileSegment> = Vec::with_capacity(segments.len());
        let mut sealed = true;
        let mut region = None::<&Region>;
        for (index, segment) in (0u32..).zip(segments) {
            let (mut addr, mut left) = (segment.addr.get(), segment.len.get());
            while left > 0 {
                let inside = |region: &&Region| {
                    addr.checked_sub(region.start).is_some_and(|into| into < region.len)
                };
                let here = region.filter(inside).or_else(|| self.region_at(addr));
                let here = here.ok_or(Refusal::NotMemory(index))?;
                region = Some(here);
                match here.share {
                    Share::Sealed => {}
                    Share::Huge if allow_unsealed => {}
                    Share::Unsealed if allow_unsealed => sealed = false,
                    Share::Unsealed | Share::Huge => return Err(Refusal::Unsealed(index)),
                    Share::Not => return Err(Refusal::NotMemory(index)),
                }
                let into = addr.saturating_sub(here.start);
                let len = left.min(here.len.saturating_sub(into));
                let offset = here.file_start.checked_add(into).ok_or(Refusal::NotMemory(index))?;
                if (offset | len) & GRANULE.wrapping_sub(1) != 0 {
                    // No whole pages of the file, which is all that can be shared.
                    return Err(Refusal::NotMemory(index));
                }
                push(&mut out, &here.file, offset, len);
                addr = addr.checked_add(len).ok_or(Refusal::Misaligned(index))?;
                left = left.saturating_sub(len);
            }
        }
        if out.len() > usize::try_from(max_segments).unwrap_or(usize::MAX) {
            return Err(Refusal::TooMany { count: out.len(), max: max_segments });
        }
        Ok((out, sealed))
    }
}

/// Judges what needs no map: emptiness, overlap and sum, then alignment and wrapping.
pub fn check_shape(segments: &[Segment], size: u64) -> Result<(), Refusal> {
    let mut sum = Some(0u64);
    let mut last_end = 0u64;
    let mut ascending = true;
    let mut misaligned = None;
    for (index, segment) in (0u32..).zip(segments) {
        let (addr, len) = (segment.addr.get(), segment.len.get());
        if len == 0 {
            return Err(Refusal::Malformed(index));
        }
        let end = addr.checked_add(len);
        if end.is_none() || (addr | len) & GRANULE.wrapping_sub(1) != 0 {
            misaligned = misaligned.or(Some(index));
        }
        sum = sum.and_then(|sum| sum.checked_add(len));
        ascending &= addr >= last_end;
        last_end = end.unwrap_or(u64::MAX);
    }
    if sum != Some(size) {
        return Err(Refusal::Sum { sum: sum.unwrap_or(u64::MAX), size });
    }
    if !ascending {
        let mut order: Vec<(u64, u64)> =
            segments.iter().map(|segment| (segment.addr.get(), segment.len.get())).collect();
        order.sort_unstable_by_key(|(addr, _)| *addr);
        for (first, second) in order.iter().zip(order.iter().skip(1)) {
            if first.0.saturating_add(first.1) > second.0 {
                let same = |segment: &Segment| segment.addr.get() == second.0;
                let index = segments.iter().rposition(same).unwrap_or_default();
                return Err(Refusal::Malformed(u32::try_from(index).unwrap_or(u32::MAX)));
            }
        }
    }
    misaligned.map_or(Ok(()), |index| Err(Refusal::Misaligned(index)))
}

fn push(out: &mut Vec<FileSegment>, file: &Arc<File>, offset: u64, len: u64) {
    if let Some(last) = out.last_mut()
        && Arc::ptr_eq(&last.file, file)
        && last.offset.checked_add(last.len) == Some(offset)
    {
        last.len = last.len.saturating_add(len);
    } else {
        out.push(FileSegment { file: file.clone(), offset, len });
    }
}

/// The file segments of `len` bytes from byte `offset` of a list of segments.
///
/// An error where the range is outside of them.
pub fn slice(segments: &[FileSegment], offset: u64, len: u64) -> io::Result<Vec<FileSegment>> {
    let outside = || {
        io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("{len} bytes at {offset} are outside the buffer"),
        )
    };
    let (mut skip, mut left) = (offset, len);
    let mut out = Vec::new();
    for segment in segments {
        if left == 0 {
            break;
        }
        if skip >= segment.len {
            skip = skip.saturating_sub(segment.len);
            continue;
        }
        let take = left.min(segment.len.saturating_sub(skip));
        let start = segment.offset.checked_add(skip).ok_or_else(outside)?;
        push(&mut out, &segment.file, start, take);
        left = left.saturating_sub(take);
        skip = 0;
    }
    if left == 0 { Ok(out) } else { Err(outside()) }
}

#[cfg(test)]
#[path = "memory_tests.rs"]
mod tests;
