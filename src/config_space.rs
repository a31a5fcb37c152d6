//! The configuration space of one VM's device (spec "Device configuration layout").
//!
//! It knows what a driver is told, not when it reads it.

use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};

use crate::hub::Hub;
use crate::ids::PeerId;
use crate::limits;
use crate::protocol::{Config, feature};

const VHOST_USER_F_PROTOCOL_FEATURES: u32 = 30;

/// Every feature bit that the device offers. Whether there is a window is known only after the driver's
/// VMM read them.
pub fn features(window: bool) -> u64 {
    let always = [
        VIRTIO_F_VERSION_1,
        VIRTIO_RING_F_EVENT_IDX,
        VIRTIO_RING_F_INDIRECT_DESC,
        VHOST_USER_F_PROTOCOL_FEATURES,
        feature::IMPORT,
        feature::COPY,
        feature::TIMELINE,
        feature::PEERS,
        feature::READ_ONLY,
    ];
    let window = window.then_some(feature::WINDOW);
    always.into_iter().chain(window).fold(0, |bits, bit| bits | 1 << bit)
}

/// The configuration as a driver that accepts `features` reads it. `unknown` says that what an earlier
/// session left behind is not known yet.
pub fn of(hub: &Hub, peer: PeerId, features: u64, unknown: bool) -> Config {
    let quota = hub.read(|registry| registry.quota(peer));
    let (epoch, lingering) = hub.read(|registry| (registry.epoch(peer), registry.lingering(peer)));
    let import = features >> feature::IMPORT & 1 != 0;
    let has = |bit: u32| import && features >> bit & 1 != 0;
    let copies = if has(feature::COPY) { limits::MAX_COPY_MAPPINGS } else { 0 };
    let window = hub.read(|registry| registry.max_window(peer));
    let mappings = window.filter(|_| has(feature::WINDOW)).unwrap_or(copies);
    Config {
        peer_id: peer.0.into(),
        epoch: epoch.into(),
        granule: (limits::GRANULE as u32).into(),
        max_segments: hub.dmabufs.max_segments().into(),
        max_buffer_size: hub.dmabufs.max_size().min(quota.max_total_size).into(),
        max_total_size: quota.max_total_size.into(),
        max_exports: quota.max_exports.into(),
        max_attachments: if import { limits::MAX_ATTACHMENTS } else { 0 }.into(),
        max_mappings: mappings.into(),
        max_metadata: limits::MAX_METADATA.into(),
        event_size: limits::EVENT_SIZE.into(),
        max_wait_ms: u32::try_from(limits::MAX_WAIT.as_millis()).unwrap_or(u32::MAX).into(),
        lingering: if unknown { u32::MAX } else { lingering }.into(),
        max_waits: quota.max_waits.into(),
    }
}
