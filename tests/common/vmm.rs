//! A VMM's half of the back channel: shows memory in a window of this process, as the daemon asks, and
//! echoes it as memory of the guest, or not; slowly, never, or with a refusal, as a test wants.
//!
//! It knows messages and ranges, nothing of buffers. It remembers what no VMM would forgive:
//! [`Vmm::sins`], which a test that ends well must not have caused.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use bufshare::protocol::SHM_WINDOW;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use vhost::vhost_user::Frontend;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

use super::memory::Memory;

/// What comes, and the descriptor with it, which no daemon inherits that another test starts meanwhile.
fn receive(channel: &UnixStream, bytes: &mut [u8]) -> io::Result<(usize, Option<File>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [IoSliceMut::new(bytes)];
    let got = recvmsg(channel, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let file = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut files) => files.next().map(File::from),
        _ => None,
    });
    Ok((got.bytes, file))
}

/// Where the guest sees the window.
pub const WINDOW: u64 = 0x80_0000_0000;

const SHMEM_MAP: u32 = 9;
const SHMEM_UNMAP: u32 = 10;
/// A request that is on its way when the device stops hits any back end; one that comes so much later
/// was sent to a stopped device.
const ON_ITS_WAY: Duration = Duration::from_millis(100);

/// How it answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Manner {
    /// Does it and says so.
    Obliging,
    /// Refuses SHMEM_MAP.
    Refuses,
    /// Refuses SHMEM_UNMAP.
    Keeps,
    /// Does nothing and says nothing.
    Silent,
    /// Does it and says nothing.
    Mute,
    /// Closes the channel.
    Closes,
    /// Answers something else.
    Babbles,
}

/// How it is.
#[derive(Debug, Clone, Copy)]
pub struct Behaviour {
    /// How it answers.
    pub manner: Manner,
    /// How long it takes before that.
    pub delay: Duration,
    /// Whether it echoes mappings, as QEMU does, after the answer.
    pub echo: bool,
}

impl Default for Behaviour {
    fn default() -> Self {
        Self { manner: Manner::Obliging, delay: Duration::ZERO, echo: true }
    }
}

/// One request as it came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Asked {
    /// SHMEM_MAP, else SHMEM_UNMAP.
    pub map: bool,
    /// Bytes into the window.
    pub at: u64,
    /// Bytes.
    pub len: u64,
    /// The guest may write.
    pub writable: bool,
}

struct Shown {
    region: MmapRegion,
    file: File,
    offset: u64,
    len: u64,
}

struct State {
    channel: UnixStream,
    behaviour: Behaviour,
    shown: BTreeMap<u64, Shown>,
    asked: Vec<Asked>,
    sins: Vec<String>,
    /// It unmapped what it showed, unasked.
    forgot: bool,
    stopped: Option<Instant>,
    frontend: Option<Frontend>,
    /// Nothing is done before somebody lets it; what it was asked meanwhile.
    holds: bool,
    held: Option<Asked>,
}

/// A VMM that can map.
#[derive(Clone)]
pub struct Vmm {
    state: Arc<Mutex<State>>,
    gate: Arc<Condvar>,
    memory: Arc<Memory>,
    size: u64,
}

impl Vmm {
    /// Serves its end of the channel until that is closed.
    pub fn start(
        behaviour: Behaviour,
        memory: Arc<Memory>,
        (channel, size): (UnixStream, u64),
        frontend: Frontend,
    ) -> Vmm {
        let state = State {
            channel: channel.try_clone().expect("dup"),
            behaviour,
            shown: BTreeMap::new(),
            asked: Vec::new(),
            sins: Vec::new(),
            forgot: false,
            stopped: Some(Instant::now()),
            frontend: Some(frontend),
            holds: false,
            held: None,
        };
        let (state, gate) = (Arc::new(Mutex::new(state)), Arc::default());
        let vmm = Vmm { state, gate, memory, size };
        let this = vmm.clone();
        thread::spawn(move || {
            while this.serve(&channel).is_some() {}
            this.hang_up();
        });
        vmm
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no other one panicked")
    }

    /// Changes how it is.
    pub fn behave(&self, behaviour: Behaviour) {
        self.state().behaviour = behaviour;
    }

    /// It does nothing from now on, until it is let go.
    pub fn hold(&self, holds: bool) {
        self.state().holds = holds;
        self.gate.notify_all();
    }

    /// What it was asked while it did nothing.
    pub fn held(&self) -> Option<Asked> {
        self.state().held
    }

    /// Everything it was asked so far.
    pub fn asked(&self) -> Vec<Asked> {
        self.state().asked.clone()
    }

    /// What no VMM would forgive.
    pub fn sins(&self) -> Vec<String> {
        self.state().sins.clone()
    }

    /// Mappings that it shows: where, and how many bytes.
    pub fn shown(&self) -> Vec<(u64, u64)> {
        self.state().shown.iter().map(|(at, shown)| (*at, shown.len)).collect()
    }

    /// What it was given for the mapping there; it may keep it.
    #[track_caller]
    pub fn file(&self, at: u64) -> File {
        let state = self.state();
        state.shown.get(&at).expect("a mapping").file.try_clone().expect("dup")
    }

    /// The guest reads its window; `None` where nothing is shown.
    pub fn read(&self, at: u64, len: usize) -> Option<Vec<u8>> {
        let state = self.state();
        let (start, shown) = state.shown.range(..=at).next_back()?;
        let slice = shown.region.get_slice(usize::try_from(at - start).ok()?, len).ok()?;
        let mut bytes = vec![0; len];
        slice.read_slice(&mut bytes, 0).expect("inside");
        Some(bytes)
    }

    /// The guest writes to its window.
    #[track_caller]
    pub fn write(&self, at: u64, bytes: &[u8]) {
        let state = self.state();
        let (start, shown) = state.shown.range(..=at).next_back().expect("a mapping");
        let into = usize::try_from(at - start).expect("small");
        let slice = shown.region.get_slice(into, bytes.len()).expect("inside the mapping");
        slice.write_slice(bytes, 0).expect("inside");
    }

    /// Closes its end of the channel.
    pub fn hang_up(&self) {
        // The other end may be closed.
        let _ = self.state().channel.shutdown(std::net::Shutdown::Both);
    }

    /// Unmaps everything by itself, as QEMU does at a reset of its guest, and refuses what it is asked of that.
    pub fn forget(&self) {
        let mut state = self.state();
        state.shown.clear();
        state.forgot = true;
    }

    /// Descriptors of what it shows, as a process keeps them that only hung up.
    pub fn keep(&self) -> Vec<File> {
        let state = self.state();
        state.shown.values().map(|shown| shown.file.try_clone().expect("dup")).collect()
    }

    /// The memory table with the echoes.
    pub fn table(&self) -> Vec<VhostUserMemoryRegionInfo> {
        let state = self.state();
        let mut table = self.memory.table();
        if state.behaviour.echo {
            table.extend(state.shown.iter().map(|(at, shown)| VhostUserMemoryRegionInfo {
                guest_phys_addr: WINDOW + at,
                memory_size: shown.len,
                userspace_addr: shown.region.as_ptr() as u64,
                mmap_offset: shown.offset,
                mmap_handle: shown.file.as_raw_fd(),
            }));
        }
        table
    }

    /// The rings run, or not.
    pub fn running(&self, running: bool) {
        self.state().stopped = (!running).then(Instant::now);
    }

    /// It goes away, and all that it shows.
    pub fn quit(&self) {
        let mut state = self.state();
        state.frontend = None;
        state.shown.clear();
        state.holds = false;
        drop(state);
        self.gate.notify_all();
    }

    fn serve(&self, mut channel: &UnixStream) -> Option<()> {
        let mut header = [0; 12];
        let (got, file) = receive(channel, &mut header).ok()?;
        let word = |bytes: &[u8], at: usize| {
            u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
        };
        let (request, size) = (word(&header, 0), word(&header, 8));
        if got < header.len() || size != 40 {
            return None;
        }
        let mut body = [0; 40];
        std::io::Read::read_exact(&mut channel, &mut body).ok()?;
        let field =
            |at: usize| u64::from_le_bytes(body[at..at + 8].try_into().expect("eight bytes"));
        let (id, offset, at, len, flags) = (body[0], field(8), field(16), field(24), field(32));
        let asked = Asked { map: request == SHMEM_MAP, at, len, writable: flags & 1 != 0 };
        let behaviour = {
            let mut state = self.state();
            state.asked.push(asked);
            if state.stopped.is_some_and(|since| since.elapsed() > ON_ITS_WAY) {
                state.sins.push(format!("{asked:?} while the device is stopped"));
            }
            if id != SHM_WINDOW {
                state.sins.push(format!("{asked:?} of region {id}"));
            }
            if state.holds {
                state.held = Some(asked);
                let held = self.gate.wait_while(state, |state| state.holds);
                state = held.unwrap_or_else(PoisonError::into_inner);
                state.held = None;
                // It went away meanwhile.
                state.frontend.as_ref()?;
            }
            state.behaviour
        };
        thread::sleep(behaviour.delay);
        let done = match (behaviour.manner, request) {
            (Manner::Silent, _) => return Some(()),
            (Manner::Closes, _) => return None,
            (Manner::Refuses, SHMEM_MAP) | (Manner::Keeps, SHMEM_UNMAP) => false,
            (_, SHMEM_MAP) => self.map(file, (offset, at, len)),
            _ => self.unmap(at, len),
        };
        if behaviour.manner == Manner::Mute {
            return Some(());
        }
        let mut reply = header;
        let code = if behaviour.manner == Manner::Babbles { request + 1 } else { request };
        reply[..4].copy_from_slice(&code.to_le_bytes());
        reply[4..8].copy_from_slice(&0x5u32.to_le_bytes());
        reply[8..].copy_from_slice(&8u32.to_le_bytes());
        channel.write_all(&reply).ok()?;
        channel.write_all(&u64::from(!done).to_le_bytes()).ok()?;
        if behaviour.echo && done {
            self.send_table();
        }
        Some(())
    }

    /// Shares the table again, unless the device is stopped: then it comes with the next start.
    fn send_table(&self) {
        let table = self.table();
        let frontend = {
            let state = self.state();
            state.frontend.clone().filter(|_| state.stopped.is_none())
        };
        if let Some(frontend) = frontend {
            // The device may just be gone.
            let _ = frontend.set_mem_table(&table);
        }
    }

    fn map(&self, file: Option<File>, (offset, at, len): (u64, u64, u64)) -> bool {
        let mut state = self.state();
        if state.frontend.is_none() {
            return false;
        }
        let overlaps = |(start, shown): (&u64, &Shown)| *start < at + len && at < start + shown.len;
        if at + len > self.size || state.shown.iter().any(overlaps) {
            state
                .sins
                .push(format!("SHMEM_MAP of {len:#x} bytes at {at:#x} overlaps, or is outside"));
            return false;
        }
        let Some(file) = file else {
            state.sins.push("SHMEM_MAP without a descriptor".into());
            return false;
        };
        let place = FileOffset::new(file.try_clone().expect("dup"), offset);
        let bytes = usize::try_from(len).expect("fits");
        match MmapRegion::from_file(place, bytes) {
            Ok(region) => state.shown.insert(at, Shown { region, file, offset, len }),
            Err(error) => {
                state.sins.push(format!("what it was given cannot be mapped: {error}"));
                return false;
            }
        };
        true
    }

    fn unmap(&self, at: u64, len: u64) -> bool {
        let mut state = self.state();
        if state.frontend.is_none() {
            // It went away, with all that it showed.
            return true;
        }
        if state.shown.get(&at).is_none_or(|shown| shown.len != len) {
            if state.forgot {
                return false;
            }
            state
                .sins
                .push(format!("SHMEM_UNMAP of {len:#x} bytes at {at:#x}, where no mapping is"));
            return false;
        }
        state.shown.remove(&at);
        true
    }
}
