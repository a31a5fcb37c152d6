//! The hub's half of windows: what a VM's VMM thread waits for, and which references to a dma-buf are this
//! daemon's own because a VMM echoes what it maps as memory of its guest.
//!
//! It knows no sockets: `vmm` asks.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap};

use super::{Hub, lock};
use crate::dmabuf::{Backing, file_id};
use crate::ids::{FileId, PeerId};
use crate::limits::MAX_CHANNELS;
use crate::registry::Settled;
use crate::sync::{Condvar, Mutex};

/// What belongs to the connection of one VM's VMM.
#[derive(Debug, Default)]
pub(super) struct Channel {
    pub(super) settled: Mutex<Vec<Settled>>,
    /// How often there was something to ask.
    news: Mutex<u64>,
    bell: Condvar,
    threads: Mutex<usize>,
    /// The regions of the guest's memory as it was shared last, and the files behind them.
    echoes: Mutex<Vec<(FileId, Arc<GuestRegionMmap>)>>,
}

impl Hub {
    fn channel(&self, peer: PeerId) -> Option<&Channel> {
        self.ports.get(&peer).map(|port| &port.channel)
    }

    /// The VM's MAPs and UNMAPs that ended since the last call.
    pub fn take_settled(&self, peer: PeerId) -> Vec<Settled> {
        let settled =
            self.channel(peer).map(|channel| std::mem::take(&mut *lock(&channel.settled)));
        settled.unwrap_or_default()
    }

    /// Wakes who asks the VM's VMM.
    pub fn ring(&self, peer: PeerId) {
        if let Some(channel) = self.channel(peer) {
            *lock(&channel.news) += 1;
            channel.bell.notify_all();
        }
    }

    /// Waits until the bell was rung since `seen`, or the daemon's time is `until`. Returns what to see
    /// next.
    pub fn wait_for_bell(&self, peer: PeerId, seen: u64, until: Option<Duration>) -> u64 {
        let Some(channel) = self.channel(peer) else { return seen };
        let news = lock(&channel.news);
        let quiet = |news: &mut u64| *news == seen;
        let news = match until {
            None => channel.bell.wait_while(news, quiet).unwrap_or_else(PoisonError::into_inner),
            Some(until) => {
                let left = until.saturating_sub(self.now());
                let woken = channel.bell.wait_timeout_while(news, left, quiet);
                woken.unwrap_or_else(PoisonError::into_inner).0
            }
        };
        *news
    }

    /// One more thread asks the VM's VMM; false where too many are stuck.
    pub fn channel_begins(&self, peer: PeerId) -> bool {
        let Some(channel) = self.channel(peer) else { return false };
        let mut threads = lock(&channel.threads);
        let room = *threads < MAX_CHANNELS;
        *threads += usize::from(room);
        room
    }

    /// It ended.
    pub fn channel_ends(&self, peer: PeerId) {
        if let Some(channel) = self.channel(peer) {
            *lock(&channel.threads) -= 1;
        }
    }

    /// The VM's VMM shared another table; an empty one when it is gone.
    pub fn set_memory(&self, peer: PeerId, memory: &GuestMemoryMmap) {
        let Some(channel) = self.channel(peer) else { return };
        let file = |region: &<GuestMemoryMmap as GuestMemoryBackend>::R| {
            let place = region.file_offset()?;
            Some((file_id(place.file()).ok()?, place.start(), region.len()))
        };
        let unknown = (FileId { dev: 0, ino: 0 }, 0, 0);
        let regions: Vec<_> = memory.iter().map(|region| file(region).unwrap_or(unknown)).collect();
        let whole = |region: &<GuestMemoryMmap as GuestMemoryBackend>::R| {
            memory.remove_region(region.start_addr(), region.len()).ok()
        };
        let kept = memory.iter().zip(&regions);
        let kept =
            kept.filter_map(|(region, (file, ..))| Some((*file, whole(region)?.1))).collect();
        let before = std::mem::replace(&mut *lock(&channel.echoes), kept);
        drop(before);
        self.with(|registry, _| registry.memory_changed(peer, &regions));
    }

    /// References of others to the memory, as far as they can be counted.
    pub fn references(&self, memory: &Backing) -> Option<u64> {
        let (echoes, _kept) = self.echoes_of(memory);
        Some(self.dmabufs.references(memory).ok()??.saturating_sub(echoes))
    }

    /// The daemon's own references to a backing through what VMMs echoed, which are kept as long as the
    /// second value lives: for each region a descriptor and a mapping. No other region is kept: who drops
    /// the last of it closes a descriptor of the VMM's choice, which may take as long as that likes.
    pub(super) fn echoes_of(&self, memory: &Backing) -> (u64, Vec<Arc<GuestRegionMmap>>) {
        let mut kept = Vec::new();
        let Some(file) = memory.file_id() else { return (0, kept) };
        for port in self.ports.values() {
            let echoes = lock(&port.channel.echoes);
            let here = echoes.iter().filter(|(other, _)| *other == file);
            kept.extend(here.map(|(_, region)| region.clone()));
        }
        (2 * kept.len() as u64, kept)
    }
}
