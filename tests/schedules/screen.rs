//! A VMM that shows memory in its guest's window: slowly, with an echo or without, and now and then not.
//!
//! It knows ranges, nothing of buffers.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::time::Duration;

use shuttle::rand::{Rng, thread_rng};
use vhost::vhost_user::message::VhostUserMMap;
use vhost::vhost_user::{Error, HandlerResult, VhostUserFrontendReqHandler};
use vhost_user_backend::VhostUserBackend;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use crate::device::Device;
use crate::queue;
use crate::sync::own_bell;
use crate::world::{self, Bell, point};

/// Bytes of the window.
pub const SIZE: u64 = 1 << 20;
/// Where the guest sees it.
const WINDOW: u64 = 0x80_0000_0000;

/// One VMM.
pub struct Screen {
    device: OnceLock<Weak<Device>>,
    ram: Arc<GuestRegionMmap>,
    shown: Mutex<BTreeMap<u64, (VhostUserMMap, File)>>,
    echoes: bool,
    /// The table changed.
    news: AtomicBool,
    gone: AtomicBool,
    bell: Arc<Bell>,
}

impl Screen {
    /// A VMM whose guest has this memory.
    pub fn new(ram: Arc<GuestRegionMmap>) -> Arc<Screen> {
        let screen = Screen {
            device: OnceLock::new(),
            ram,
            shown: Mutex::default(),
            echoes: thread_rng().gen_bool(0.7),
            news: AtomicBool::new(false),
            gone: AtomicBool::new(false),
            bell: Bell::new(),
        };
        Arc::new(screen)
    }

    /// Shares its guest's memory with the device from now on.
    pub fn start(self: &Arc<Screen>, device: &Arc<Device>) {
        assert!(self.device.set(Arc::downgrade(device)).is_ok(), "one device");
        let this = self.clone();
        shuttle::thread::spawn(move || {
            let gone = || this.gone.load(Ordering::SeqCst);
            while !gone() {
                this.bell.sleep_until(|| gone() || this.news.load(Ordering::SeqCst));
                if this.news.swap(false, Ordering::SeqCst) && !gone() {
                    this.share();
                }
            }
            this.bell.retire();
        });
    }

    fn share(&self) {
        let mut regions = vec![self.ram.clone()];
        for (asked, file) in self.shown.lock().expect("no panic").values() {
            let file = FileOffset::new(file.try_clone().expect("dup"), asked.fd_offset);
            let at = GuestAddress(WINDOW + asked.shm_offset);
            let len = usize::try_from(asked.len).expect("small");
            let region = GuestRegionMmap::from_range(at, len, Some(file)).expect("memory");
            regions.push(Arc::new(region));
        }
        let table = GuestMemoryMmap::from_arc_regions(regions).expect("memory");
        if let Some(device) = self.device.get().and_then(Weak::upgrade) {
            device.update_memory(queue::Memory::new(table)).expect("memory");
        }
    }

    /// What it shows.
    pub fn shows(&self) -> usize {
        self.shown.lock().expect("no panic").len()
    }

    /// It goes away.
    pub fn quit(&self) {
        self.gone.store(true, Ordering::SeqCst);
        self.shown.lock().expect("no panic").clear();
        self.bell.ring();
    }

    /// Takes its time. False where it goes away meanwhile.
    fn dawdle(&self) -> bool {
        world::no_lock_is_held();
        (0..thread_rng().gen_range(0..40)).for_each(|_| point());
        if thread_rng().gen_bool(0.3) {
            own_bell().pause(Duration::from_millis(thread_rng().gen_range(0..4)));
        }
        !self.gone.load(Ordering::SeqCst)
    }

    fn changed(&self) -> HandlerResult<u64> {
        if self.echoes {
            self.news.store(true, Ordering::SeqCst);
            self.bell.ring();
            (0..thread_rng().gen_range(0..20)).for_each(|_| point());
        }
        Ok(0)
    }
}

impl VhostUserFrontendReqHandler for Screen {
    fn shmem_map(&self, asked: &VhostUserMMap, fd: &dyn AsRawFd) -> HandlerResult<u64> {
        // It has a descriptor of its own from the moment on at which it is asked.
        let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
        let file = File::options().read(true).write(true).open(path)?;
        if !self.dawdle() {
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        if thread_rng().gen_bool(0.1) {
            return Err(io::Error::other(Error::FrontendInternalError));
        }
        {
            let mut shown = self.shown.lock().expect("no panic");
            let (at, end) = (asked.shm_offset, asked.shm_offset + asked.len);
            let over = |one: &&VhostUserMMap| one.shm_offset < end && at < one.shm_offset + one.len;
            let other = shown.values().map(|(one, _)| one).find(over).copied();
            assert!(end <= SIZE && other.is_none(), "{at:#x} is over {other:?}");
            shown.insert(at, (*asked, file));
        }
        self.changed()
    }

    fn shmem_unmap(&self, asked: &VhostUserMMap) -> HandlerResult<u64> {
        if !self.dawdle() {
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        let (at, len) = (asked.shm_offset, asked.len);
        let gone = self.shown.lock().expect("no panic").remove(&at);
        let gone = gone.map(|(one, _)| one.len);
        assert_eq!(gone, Some(len), "nothing like that is shown at {at:#x}");
        self.changed()
    }
}
