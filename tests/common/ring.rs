//! The driver's side of one split virtqueue, by hand, so that a test can also break its rules.
//!
//! It knows descriptors, not requests. A chain whose buffers come from [`Ring::submit`] gets them
//! back with its used entry; raw descriptors are the test's own business.

use std::collections::BTreeMap;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::memory::{BASE, Memory};

/// The descriptor continues.
pub const NEXT: u16 = 1;
/// The device writes this descriptor.
pub const WRITE: u16 = 2;
/// The descriptor is a table of descriptors.
pub const INDIRECT: u16 = 4;

/// VRING_USED_F_NO_NOTIFY.
const NO_NOTIFY: u16 = 1;
const RING_BYTES: u64 = 0x1_0000;
const AVAIL_AT: u64 = 0x5000;
const USED_AT: u64 = 0x8000;
const SCRATCH_BYTES: u64 = 0x80_0000;

/// One descriptor as it stands in the table.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Desc {
    /// Guest-physical address.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
    /// NEXT, WRITE, INDIRECT.
    pub flags: u16,
    /// Index of the next one.
    pub next: u16,
}

impl Desc {
    /// Its 16 bytes.
    pub fn bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// One used entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Used {
    /// Head of the chain.
    pub id: u32,
    /// Bytes that the device says it wrote.
    pub len: u32,
}

/// What came back for a chain of [`Ring::submit`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Head of the chain.
    pub head: u16,
    /// Used length.
    pub len: u32,
    /// The whole writable part; bytes that nobody wrote are 0xee.
    pub bytes: Vec<u8>,
}

impl Answer {
    /// The bytes that the device says it wrote.
    pub fn written(&self) -> &[u8] {
        &self.bytes[..self.len as usize]
    }
}

#[derive(Debug)]
struct Live {
    slots: Vec<u16>,
    buffers: Vec<u64>,
    writable: Vec<(u64, u32)>,
}

/// One queue.
#[derive(Debug)]
pub struct Ring {
    memory: Arc<Memory>,
    size: u16,
    base: u64,
    scratch: u64,
    /// Whether VIRTIO_RING_F_EVENT_IDX was negotiated.
    pub event_idx: bool,
    /// Next index of the available ring.
    pub next_avail: u16,
    /// What it was when the device was last considered for a kick.
    considered: u16,
    last_used: u16,
    free: Vec<u16>,
    live: BTreeMap<u16, Live>,
    buffers: BTreeMap<u64, u64>,
    /// Raised by the driver.
    pub kick: EventFd,
    /// Raised by the device.
    pub call: EventFd,
    epoll: Epoll,
}

impl Ring {
    /// A queue whose rings and buffers lie in the area reserved for `index`.
    pub fn new(memory: Arc<Memory>, index: usize, size: u16) -> Self {
        let event = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).expect("eventfd");
        let (kick, call, epoll) = (event(), event(), Epoll::new().expect("epoll"));
        let interest = EpollEvent::new(EventSet::IN, 0);
        epoll.ctl(ControlOperation::Add, call.as_raw_fd(), interest).expect("epoll");
        let mut ring = Self {
            memory,
            size,
            base: BASE + 0x1_0000 + index as u64 * RING_BYTES,
            scratch: BASE + 0x80_0000 + index as u64 * SCRATCH_BYTES,
            event_idx: false,
            next_avail: 0,
            considered: 0,
            last_used: 0,
            free: Vec::new(),
            live: BTreeMap::new(),
            buffers: BTreeMap::new(),
            kick,
            call,
            epoll,
        };
        ring.clear();
        ring
    }

    /// As a driver after reset: empty rings, nothing in flight.
    pub fn clear(&mut self) {
        self.memory.fill(self.base, RING_BYTES, 0);
        self.next_avail = 0;
        self.considered = 0;
        self.last_used = 0;
        self.free = (0..self.size).rev().collect();
        self.live.clear();
        self.buffers.clear();
    }

    /// Entries.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Where the descriptor table is.
    pub fn desc_at(&self) -> u64 {
        self.base
    }

    /// Where the available ring is.
    pub fn avail_at(&self) -> u64 {
        self.base + AVAIL_AT
    }

    /// Where the used ring is.
    pub fn used_at(&self) -> u64 {
        self.base + USED_AT
    }

    /// Descriptors that nobody uses.
    pub fn free_slots(&self) -> usize {
        self.free.len()
    }

    /// Chains of [`Ring::submit`] that have not come back.
    pub fn in_flight(&self) -> usize {
        self.live.len()
    }

    /// Sets one entry of the table to anything.
    pub fn write_desc(&self, index: u16, desc: Desc) {
        let at = self.base + u64::from(index) * 16;
        self.memory.write(at, &desc.bytes());
    }

    /// Makes a head available, without a kick. The head may be anything.
    pub fn offer(&mut self, head: u16) {
        let slot = u64::from(self.next_avail % self.size);
        let at = self.avail_at();
        self.memory.write(at + 4 + slot * 2, &head.to_le_bytes());
        self.next_avail = self.next_avail.wrapping_add(1);
        self.memory.store_u16(at + 2, self.next_avail);
    }

    /// Sets the available index to anything.
    pub fn force_avail_index(&mut self, index: u16) {
        self.next_avail = index;
        self.memory.store_u16(self.avail_at() + 2, index);
    }

    /// Notifies the device.
    pub fn kick(&self) {
        self.kick.write(1).expect("kick");
    }

    /// Notifies the device of what was offered since the last time, unless it said that it looks by
    /// itself. As a real driver does: a device that forgets to look leaves the chain where it is.
    pub fn notify(&mut self) {
        let (old, new) = (self.considered, self.next_avail);
        self.considered = new;
        std::sync::atomic::fence(Ordering::SeqCst);
        let wanted = if self.event_idx {
            let at = self.used_at() + 4 + u64::from(self.size) * 8;
            let event = self.memory.load_u16(at);
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            self.memory.load_u16(self.used_at()) & NO_NOTIFY == 0
        };
        if wanted {
            self.kick();
        }
    }

    /// Memory for the buffer of a chain.
    pub fn buffer(&mut self, len: u64) -> u64 {
        let len = len.max(1).next_multiple_of(16);
        let mut at = self.scratch;
        for (&start, &size) in &self.buffers {
            if start - at >= len {
                break;
            }
            at = start + size;
        }
        assert!(at + len <= self.scratch + SCRATCH_BYTES, "too much in flight");
        self.buffers.insert(at, len);
        at
    }

    /// Makes a chain of these readable parts, then writable ones, and notifies. `None`: no descriptor
    /// is free. An empty part is a descriptor of length 0.
    pub fn submit(&mut self, readable: &[&[u8]], writable: &[u32]) -> Option<u16> {
        let head = self.prepare(readable, writable)?;
        self.offer(head);
        self.notify();
        Some(head)
    }

    /// As [`Ring::submit`], but the chain is not available yet.
    pub fn prepare(&mut self, readable: &[&[u8]], writable: &[u32]) -> Option<u16> {
        let count = readable.len() + writable.len();
        if count == 0 || self.free.len() < count {
            return None;
        }
        let slots = self.free.split_off(self.free.len() - count);
        let mut live = Live { slots: slots.clone(), buffers: Vec::new(), writable: Vec::new() };
        let mut parts = Vec::new();
        for bytes in readable {
            let at = self.buffer(bytes.len() as u64);
            self.memory.write(at, bytes);
            live.buffers.push(at);
            parts.push((at, u32::try_from(bytes.len()).expect("short"), 0));
        }
        for &len in writable {
            let at = self.buffer(u64::from(len));
            self.memory.fill(at, u64::from(len), 0xee);
            live.buffers.push(at);
            live.writable.push((at, len));
            parts.push((at, len, WRITE));
        }
        for (i, (&slot, (addr, len, flags))) in slots.iter().zip(parts).enumerate() {
            let next = slots.get(i + 1);
            let desc = Desc {
                addr,
                len,
                flags: flags | if next.is_some() { NEXT } else { 0 },
                next: next.copied().unwrap_or(0),
            };
            self.write_desc(slot, desc);
        }
        self.live.insert(slots[0], live);
        Some(slots[0])
    }

    /// The next used entry, if there is one. Gives nothing back.
    pub fn pop_used(&mut self) -> Option<Used> {
        let at = self.used_at();
        if self.memory.load_u16(at + 2) == self.last_used {
            return None;
        }
        let slot = u64::from(self.last_used % self.size);
        let entry = self.memory.read(at + 4 + slot * 8, 8);
        let word =
            |i: usize| u32::from_le_bytes([entry[i], entry[i + 1], entry[i + 2], entry[i + 3]]);
        self.last_used = self.last_used.wrapping_add(1);
        // used_event, for a device with EVENT_IDX: tell me about the very next one.
        let used_event = self.avail_at() + 4 + u64::from(self.size) * 2;
        self.memory.store_u16(used_event, self.last_used);
        Some(Used { id: word(0), len: word(4) })
    }

    /// Waits for a used entry.
    pub fn wait_used(&mut self, limit: Duration) -> Option<Used> {
        let end = Instant::now() + limit;
        loop {
            // Only what was raised before the ring was looked at is cleared.
            let _ = self.call.read();
            if let Some(used) = self.pop_used() {
                return Some(used);
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            let millis = i32::try_from(left.as_millis()).expect("short") + 1;
            // Interrupted or not, the ring says what there is.
            let _ = self.epoll.wait(millis, &mut [EpollEvent::default()]);
        }
    }

    /// Waits for a chain of [`Ring::submit`] to come back, whichever is first.
    pub fn wait(&mut self, limit: Duration) -> Option<Answer> {
        let used = self.wait_used(limit)?;
        Some(self.settle(used))
    }

    /// Takes back what belonged to a used chain.
    pub fn settle(&mut self, used: Used) -> Answer {
        let head = u16::try_from(used.id).expect("a head");
        let live = self.live.remove(&head).unwrap_or_else(|| panic!("{used:?} was not in flight"));
        let mut bytes = Vec::new();
        for (at, len) in live.writable {
            bytes.extend(self.memory.read(at, len as usize));
        }
        for at in live.buffers {
            self.buffers.remove(&at);
        }
        self.free.extend(live.slots);
        assert!(
            used.len as usize <= bytes.len(),
            "used length {} of {} writable bytes",
            used.len,
            bytes.len()
        );
        Answer { head, len: used.len, bytes }
    }
}
