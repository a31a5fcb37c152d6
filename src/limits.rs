//! How much: every bound of the daemon, with its unit and reason. What the driver must know of them
//! stands in the configuration space.
//!
//! It knows numbers, not who they are for (that is `policy`) nor what they are spent on.

use std::time::Duration;

/// Alignment of segments and mappings, bytes: the page size of every host that this runs on.
pub const GRANULE: u64 = 4096;
/// Descriptors in a ring at most. 1024 is QEMU's own bound for virtio-pci.
pub const MAX_QUEUE_SIZE: u16 = 1024;
/// Segments in one request before merging: bounds the copy of a request to about 1 MiB.
pub const MAX_RAW_SEGMENTS: u32 = 65_536;
/// Bytes of metadata with a buffer: an IMAGE is 88; the wire allows 4096 at most.
pub const MAX_METADATA: u32 = 4096;
/// Bytes of an event buffer: one fixed record.
pub const EVENT_SIZE: u32 = 64;
/// Longest wait on the sync queue: beyond this a peer is as good as dead.
pub const MAX_WAIT: Duration = Duration::from_secs(10);
/// Pending sync requests of one VM. Leaves room in a ring of 128 for END.
pub const MAX_WAITS: u32 = 64;
/// Bytes of one step of a bulk copy: bounds the daemon's buffer, and stays in a processor's cache.
pub const COPY_STEP: usize = 256 << 10;
/// Bytes of freed memory that a heap keeps: what an EXPORT of 8192 segments takes. The rest goes back
/// to the kernel, and costs a page fault for each page when it is needed again.
pub const KEEP_FREED: i32 = 1 << 20;
/// Exports of one VM at once, unless `max-exports=` says otherwise.
pub const DEFAULT_MAX_EXPORTS: u32 = 4096;
/// Bytes exported by one VM at once, unless `max-bytes=` says otherwise. Pinned pages are charged
/// to nobody by the kernel.
pub const DEFAULT_MAX_TOTAL: u64 = 1 << 30;
/// First and longest pause between two looks at a dma-buf that somebody unknown still holds.
pub const OBSERVE_MIN: Duration = Duration::from_millis(1);
/// See [`OBSERVE_MIN`].
pub const OBSERVE_MAX: Duration = Duration::from_millis(250);
/// Attachments of one VM at once, dead ones that it did not DETACH included.
pub const MAX_ATTACHMENTS: u32 = 1024;
/// Mappings of one VM onto its own pages at once.
pub const MAX_COPY_MAPPINGS: u32 = 256;
/// Regions that a VMM can share with a back end: memory of the guest, and each mapping in the window,
/// which QEMU echoes as one. What is mapped beyond that leaves the device dead after the next pause.
pub const VMM_REGIONS: usize = 8;
/// How long a VMM may take to echo a mapping that it said yes to, before it is asked once more: a VMM that
/// echoes does so within a millisecond.
pub const ECHO_WAIT: Duration = Duration::from_millis(200);
/// How long a VMM may take to answer the first request on its back channel: what knows no answers never
/// will. Less than the 30 s for which a driver waits.
pub const FIRST_ANSWER: Duration = Duration::from_secs(10);
/// Threads of one VM that may be stuck because its VMM went away without closing its back channel.
pub const MAX_CHANNELS: usize = 4;
/// Bytes of the window, unless `--window-size` says otherwise.
pub const DEFAULT_WINDOW: u64 = 256 << 20;
/// Bytes of the window at most: it takes address space of the guest.
pub const MAX_WINDOW: u64 = 1 << 40;
/// Bytes of one importer's mappings, where `max-bytes=` does not give it more: one BEGIN copies no more
/// than these, and the exporter's RELEASED waits for it.
pub const MAX_MAPPED: u64 = DEFAULT_MAX_TOTAL;
/// ATTACHes of one VM in a second that may name nothing it has a right to: guessing is slow.
pub const MAX_MISSES_PER_SECOND: u32 = 64;
/// Buffers that are looked at in one go for offers to a VM: others have to wait for it.
pub const LOOKED_AT: usize = 256;
/// Descriptors that one VM needs besides its exports: sockets, rings, wake-ups, and its memory.
pub const FDS_PER_VM: u64 = 64;
/// Descriptors of the daemon itself, with as many clients as it takes and what is on its way to them.
pub const FDS_OF_DAEMON: u64 = 32 + 2 * MAX_CLIENTS as u64;
/// VMs of one daemon.
pub const MAX_VMS: usize = 256;
/// Connections to the host socket at once.
pub const MAX_CLIENTS: usize = 64;
/// Leases of one host client at once.
pub const MAX_LEASES: usize = 16_384;
/// Bytes that END of a host client copies on the host socket's thread, which is the clock: about a tenth
/// of a millisecond. More is copied by a thread of its own.
pub const MAX_COPY_AT_ONCE: u64 = 1 << 20;
/// Pending BEGINs of one host client. Bounds its queue too: their answers, one more and one event.
pub const MAX_CLIENT_WAITS: usize = 64;
/// Exports of one host client at once, and of all of them: each is up to three descriptors.
pub const MAX_CLIENT_EXPORTS: u32 = 1024;
/// See [`MAX_CLIENT_EXPORTS`].
pub const MAX_HOST_EXPORTS: u32 = 4096;
/// Bytes exported by one host client at once, and by all of them: each is a byte of our address space,
/// and of pinned memory where a memfd becomes a dma-buf.
pub const MAX_CLIENT_BYTES: u64 = 1 << 30;
/// See [`MAX_CLIENT_BYTES`].
pub const MAX_HOST_BYTES: u64 = 4 << 30;
/// How long a copy of a client's dma-buf may wait for a fence that came at the last moment: those that
/// were there before it are not waited for at all.
pub const LENT_WAIT: Duration = Duration::from_millis(250);
/// How long a lease lives on after the exporter took the buffer back by force, where its client asked
/// for notice: a few frames.
pub const NOTICE: Duration = Duration::from_secs(1);
/// Log lines that one VM can cause in a second.
pub const LOG_LINES_PER_SECOND: u32 = 5;

/// Regions of a VM's memory: each costs a descriptor and a mapping. QEMU shares 8 at most.
pub const MAX_REGIONS: usize = 64;
/// Bytes of a VM's memory: what one VM maps must leave address space to the others.
pub const MAX_GUEST_MEMORY: u64 = 4 << 40;

/// Quotas of one VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Quota {
    /// Exports at once, those of earlier sessions that are still in use included.
    pub max_exports: u32,
    /// Bytes exported at once.
    pub max_total_size: u64,
    /// Pending sync requests.
    pub max_waits: u32,
}

impl Default for Quota {
    fn default() -> Self {
        Quota {
            max_exports: DEFAULT_MAX_EXPORTS,
            max_total_size: DEFAULT_MAX_TOTAL,
            max_waits: MAX_WAITS,
        }
    }
}
