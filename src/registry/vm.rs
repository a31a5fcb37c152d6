//! A configured VM as the registry knows it: its session, what it exports, attaches and maps. Pure.
//!
//! It keeps them, and knows nothing of when they change.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use super::{Attachment, Shown, offer, topics};
use crate::ids::{BufferKey, HandleId, MappingId, PeerId, SessionId, WindowId};
use crate::limits::Quota;
use crate::window::Window;

/// A configured VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Vm<H> {
    pub(super) name: String,
    pub(super) quota: Quota,
    pub(super) epoch: u32,
    pub(super) session: Option<SessionId>,
    pub(super) next_handle: u64,
    /// Its exports.
    pub(super) handles: HashMap<HandleId, BufferKey>,
    /// Its buffers, those of ended sessions included.
    pub(super) buffers: BTreeSet<BufferKey>,
    pub(super) attachments: HashMap<HandleId, Attachment<H>>,
    pub(super) next_mapping: u64,
    pub(super) mappings: HashMap<MappingId, HandleId>,
    /// Mappings onto its own pages, those that are being made included.
    pub(super) mapped: u32,
    /// Regions of its memory, and where its VMM can map.
    pub(super) regions: usize,
    pub(super) window: Option<(WindowId, Window<Shown<H>>)>,
    /// ATTACHes that named nothing the VM has a right to, and since when they are counted.
    pub(super) misses: u32,
    pub(super) misses_since: Duration,
    /// Its driver wants to hear what importers hear.
    pub(super) import: bool,
    /// What it may attach, or was told that it may.
    pub(super) offers: BTreeMap<BufferKey, offer::Offer>,
    /// Behind which buffer to look on for what the VM may attach; `None`: all were looked at.
    pub(super) looked: Option<BufferKey>,
    /// Charged to the quota.
    pub(super) exports: u32,
    pub(super) bytes: u64,
    pub(super) lingering: u32,
    pub(super) waits: u32,
    /// What has an event.
    pub(super) events: topics::Topics,
    pub(super) resync: bool,
    pub(super) peers_changed: BTreeSet<PeerId>,
    /// How often one of these two was set: what is set while it is being told is told again.
    pub(super) news: u64,
}

impl<H> Vm<H> {
    /// One that is not connected.
    pub(super) fn new(name: String, quota: Quota, epoch: u32) -> Vm<H> {
        Vm {
            name,
            quota,
            epoch,
            session: None,
            next_handle: 1,
            handles: HashMap::new(),
            buffers: BTreeSet::new(),
            attachments: HashMap::new(),
            next_mapping: 1,
            mappings: HashMap::new(),
            mapped: 0,
            regions: 0,
            window: None,
            misses: 0,
            misses_since: Duration::ZERO,
            import: false,
            offers: BTreeMap::new(),
            looked: None,
            exports: 0,
            bytes: 0,
            lingering: 0,
            waits: 0,
            events: topics::Topics::default(),
            resync: false,
            peers_changed: BTreeSet::new(),
            news: 0,
        }
    }

    pub(super) fn new_handle(&mut self) -> HandleId {
        let handle = HandleId(self.next_handle);
        self.next_handle += 1;
        handle
    }

    /// Whether other mappings ride on this one.
    pub(super) fn carries(&self, mapping: MappingId) -> bool {
        let mut all = self.attachments.values().flat_map(|held| &held.mappings);
        all.any(|other| other.rides == Some(mapping))
    }

    /// Bytes that SYNC copies to: its own pages that it mapped, and copies in the window.
    pub(super) fn bytes_mapped(&self) -> u64 {
        let held = self.attachments.values().flat_map(|held| &held.mappings);
        let own = held.filter(|one| one.place.is_none() && one.rides.is_none());
        let own = own.map(|mapping| mapping.len);
        let places = self.window.iter().flat_map(|(_, window)| window.places());
        let copies = places.filter(|(_, place)| place.what.is_copy());
        own.chain(copies.map(|(_, place)| place.range.len)).fold(0, u64::saturating_add)
    }
}
