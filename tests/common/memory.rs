//! Guest memory: memfds that this process maps as a VMM does.
//!
//! It knows regions and bytes, nothing of queues or requests.

use std::fs::File;
use std::sync::atomic::Ordering;
use std::sync::{Arc, RwLock, RwLockReadGuard};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use vhost::VhostUserMemoryRegionInfo;
use vm_memory::{
    Address, Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap,
    GuestMemoryRegion, GuestRegionMmap,
};

/// Bytes of a page, and the granule that the tests assume.
pub const PAGE: u64 = 4096;
/// Where the first region starts: not 0, so that an address is never its own offset.
pub const BASE: u64 = 0x4000_0000;
/// The first byte behind rings and request buffers: tests export from here on.
pub const FREE: u64 = BASE + 0x200_0000;

/// One region of guest memory.
#[derive(Debug, Clone, Copy)]
pub struct Region {
    /// Guest-physical address.
    pub start: u64,
    /// Bytes.
    pub len: u64,
    /// Seals of its memfd.
    pub seals: SealFlags,
    /// Bytes of the memfd in front of the region.
    pub file_offset: u64,
}

impl Default for Region {
    fn default() -> Self {
        Self {
            start: BASE,
            len: 128 << 20,
            seals: SealFlags::SHRINK | SealFlags::GROW,
            file_offset: 0x20_0000,
        }
    }
}

impl Region {
    /// What a VMM that seals nothing gives: only good for COPY, and only where the operator said so.
    pub fn unsealed() -> Self {
        Self { seals: SealFlags::empty(), ..Self::default() }
    }
}

/// All of a guest's memory.
#[derive(Debug)]
pub struct Memory {
    map: RwLock<GuestMemoryMmap>,
}

impl Memory {
    /// Creates one memfd for each region and maps them.
    pub fn new(regions: &[Region]) -> Self {
        let regions = regions.iter().map(map_region).collect();
        let map = GuestMemoryMmap::from_arc_regions(regions).expect("guest memory");
        Self { map: RwLock::new(map) }
    }

    /// Adds a region; the memory table has to be sent again.
    pub fn plug(&self, region: &Region) {
        let map = self.map().insert_region(map_region(region));
        self.replace(map.expect("room for the region"));
    }

    /// Takes a region away; the memory table has to be sent again.
    pub fn unplug(&self, region: &Region) {
        let map = self.map().remove_region(GuestAddress(region.start), region.len);
        self.replace(map.expect("a whole region").0);
    }

    /// Cuts the file behind an unsealed region off at its start, as a VMM must not.
    pub fn truncate(&self, region: &Region) {
        let map = self.map();
        let region = map.find_region(GuestAddress(region.start)).expect("a region");
        let file = region.file_offset().expect("a region with a file");
        file.file().set_len(file.start()).expect("unsealed");
    }

    /// The memfd behind an address, and where in it.
    pub fn file(&self, address: u64) -> FileOffset {
        let map = self.map();
        let (region, at) = map.to_region_addr(GuestAddress(address)).expect("inside guest memory");
        let file = region.file_offset().expect("region with a file");
        FileOffset::from_arc(file.arc().clone(), file.start() + at.raw_value())
    }

    fn map(&self) -> RwLockReadGuard<'_, GuestMemoryMmap> {
        self.map.read().expect("no writer panicked")
    }

    fn replace(&self, map: GuestMemoryMmap) {
        *self.map.write().expect("no writer panicked") = map;
    }

    /// The memory table as SET_MEM_TABLE wants it. The file descriptors stay this object's.
    pub fn table(&self) -> Vec<VhostUserMemoryRegionInfo> {
        let region = |region: &GuestRegionMmap| {
            VhostUserMemoryRegionInfo::from_guest_region(region).expect("region with a file")
        };
        self.map().iter().map(region).collect()
    }

    /// The address at which this process sees a guest address: what vhost-user calls user address.
    pub fn user_address(&self, address: u64) -> u64 {
        let pointer =
            self.map().get_host_address(GuestAddress(address)).expect("inside guest memory");
        pointer as u64
    }

    /// Writes bytes.
    pub fn write(&self, address: u64, bytes: &[u8]) {
        self.map().write_slice(bytes, GuestAddress(address)).expect("inside guest memory");
    }

    /// Reads bytes.
    pub fn read(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.map().read_slice(&mut bytes, GuestAddress(address)).expect("inside guest memory");
        bytes
    }

    /// Writes the same byte `len` times.
    pub fn fill(&self, address: u64, len: u64, byte: u8) {
        let chunk = vec![byte; 1 << 16];
        let mut done = 0;
        while done < len {
            let step = (len - done).min(chunk.len() as u64);
            let bytes = &chunk[..usize::try_from(step).expect("small")];
            self.write(address + done, bytes);
            done += step;
        }
    }

    /// Reads a shared 16-bit index that the device may have written just now.
    pub fn load_u16(&self, address: u64) -> u16 {
        u16::from_le(
            self.map().load(GuestAddress(address), Ordering::SeqCst).expect("inside guest memory"),
        )
    }

    /// Publishes a 16-bit index: all that was written before is visible to who sees it.
    pub fn store_u16(&self, address: u64, value: u16) {
        self.map()
            .store(value.to_le(), GuestAddress(address), Ordering::SeqCst)
            .expect("inside guest memory");
    }
}

fn map_region(region: &Region) -> Arc<GuestRegionMmap> {
    let fd = memfd_create("guest", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).expect("memfd");
    ftruncate(&fd, region.file_offset + region.len).expect("ftruncate");
    if !region.seals.is_empty() {
        fcntl_add_seals(&fd, region.seals).expect("seals");
    }
    let file = FileOffset::new(File::from(fd), region.file_offset);
    let len = usize::try_from(region.len).expect("region fits");
    let mapped = GuestRegionMmap::from_range(GuestAddress(region.start), len, Some(file));
    Arc::new(mapped.expect("guest memory"))
}
