//! `bufshare-guest stress`: threads that do everything at random and check every answer. Where the
//! answer depends on limits or on others, all that the interface allows is right.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use clap::Args;
use uuid::Uuid;

use crate::device::{Device, Error, Offer, Source, map};
use crate::{Failure, line, uapi};
use bufshare::protocol::peer;

#[derive(Debug, Args)]
pub struct Stress {
    /// How long.
    #[arg(long, value_name = "N", default_value_t = 10)]
    seconds: u64,
    /// Threads, each with an open file of its own.
    #[arg(long, value_name = "N", default_value_t = 4)]
    threads: u64,
    /// Buffers that a thread has at once.
    #[arg(long, value_name = "N", default_value_t = 8)]
    buffers: usize,
    /// The largest buffer, in KiB.
    #[arg(long, value_name = "KIB", default_value_t = 4096)]
    largest: u64,
    /// Start of the random numbers, to see the same again.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
}

/// xorshift64*: the same sequence everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end.max(1)
    }
}

/// One export of a worker.
struct Buffer {
    handle: u64,
    size: u64,
    uuid: Uuid,
    generation: u64,
    /// `None`: a part of another.
    dmabuf: Option<OwnedFd>,
    releasing: bool,
}

struct Worker {
    device: Device,
    random: Random,
    granule: u64,
    largest: u64,
    buffers: Vec<Buffer>,
    counts: BTreeMap<&'static str, u64>,
}

/// Whether a result is right: done, or one of these errors. Answers what was done.
fn allow<T>(result: Result<T, Error>, errors: &[i32]) -> Result<Option<T>, Failure> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if errors.contains(&error.errno()) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// A request that must be refused with this error.
fn refused<T>(what: &str, result: Result<T, Error>, errno: i32) -> Result<(), Failure> {
    match result {
        Err(error) if error.errno() == errno => Ok(()),
        Err(error) => {
            let source = &error.source;
            Err(Failure::Wrong(format!("{what}: {source}, expected errno {errno}")))
        }
        Ok(_) => Err(Failure::Wrong(format!("{what} was not refused"))),
    }
}

impl Worker {
    fn count(&mut self, what: &'static str) {
        *self.counts.entry(what).or_default() += 1;
    }

    fn export(&mut self) -> Result<(), Failure> {
        let size = (1 + self.random.below(self.largest / self.granule)) * self.granule;
        let Some(dmabuf) = allow(self.device.alloc(size), &[libc::ENOMEM])? else {
            return Ok(());
        };
        let mapping = map(&dmabuf, size)?;
        let place = self.random.below(size / 8) as usize * 8;
        let mut word = [1; 8];
        let wrong = |source| Failure::Io { what: "the mapping".to_owned(), source };
        mapping.read_at(place, &mut word).map_err(wrong)?;
        if word != [0; 8] {
            return Err(Failure::Wrong(format!("new memory is not zero at {place}")));
        }
        mapping.write_at(place, &self.random.next().to_le_bytes()).map_err(wrong)?;
        let source = Source::DmaBuf(&dmabuf);
        let zero_copy = self.random.below(4) == 0;
        let offer = Offer {
            zero_copy,
            access: uapi::ACCESS_READ | uapi::ACCESS_WRITE,
            name: "stress",
            ..Offer::default()
        };
        // ENOSPC: a limit. EFAULT: zero copy was asked for and is not to be had. E2BIG: memory is in pieces.
        let errors = [libc::ENOSPC, libc::EFAULT, libc::ENOMEM, libc::EBUSY, libc::E2BIG];
        let Some(exported) = allow(self.device.export(source, &offer), &errors)? else {
            self.count("export-refused");
            return Ok(());
        };
        if exported.size != size || exported.handle == 0 {
            return Err(Failure::Wrong(format!("export of {size} bytes: {exported:?}")));
        }
        if zero_copy && exported.mode != uapi::MODE_ZERO_COPY {
            return Err(Failure::Wrong("a copy in spite of ZERO_COPY".to_owned()));
        }
        self.count("export");
        let (handle, uuid, dmabuf) = (exported.handle, exported.uuid, Some(dmabuf));
        self.buffers.push(Buffer { handle, size, uuid, generation: 0, dmabuf, releasing: false });
        Ok(())
    }

    fn part(&mut self, index: usize) -> Result<(), Failure> {
        let pool = &self.buffers[index];
        if pool.dmabuf.is_none() || pool.releasing {
            return Ok(());
        }
        let (pool, granules) = (pool.handle, pool.size / self.granule);
        let offset = self.random.below(granules);
        let size = (1 + self.random.below(granules - offset)) * self.granule;
        let source = Source::Part { pool, offset: offset * self.granule, size };
        let offer = Offer { access: uapi::ACCESS_READ, name: "part", ..Offer::default() };
        let errors = [libc::ENOSPC, libc::ENOMEM, libc::EBUSY, libc::EOPNOTSUPP];
        if let Some(part) = allow(self.device.export(source, &offer), &errors)? {
            self.count("part");
            let handle = part.handle;
            self.buffers.push(Buffer {
                handle,
                size,
                uuid: part.uuid,
                generation: 0,
                dmabuf: None,
                releasing: false,
            });
        }
        Ok(())
    }

    fn sync(&mut self, index: usize) -> Result<(), Failure> {
        let handle = self.buffers[index].handle;
        let write = self.random.below(2) == 0;
        let access = if write { uapi::SYNC_F_WRITE } else { uapi::SYNC_F_READ };
        // Others may hold it: the host, or whoever waits for it.
        let errors = [libc::ETIMEDOUT, libc::EBUSY, libc::EAGAIN];
        let Some(before) = allow(self.device.sync(handle, access), &errors)? else {
            self.count("begin-refused");
            return Ok(());
        };
        let after = self.device.sync(handle, access | uapi::SYNC_F_END)?;
        let buffer = &mut self.buffers[index];
        if before < buffer.generation || after < before + u64::from(write) {
            let seen = buffer.generation;
            return Err(Failure::Wrong(format!("generation {seen}, then {before}, then {after}")));
        }
        buffer.generation = after;
        self.count("sync");
        Ok(())
    }

    /// An own export that is attached is the buffer that was exported.
    fn own(&mut self, index: usize) -> Result<(), Failure> {
        let uuid = self.buffers[index].uuid;
        let pool = self.buffers[index].dmabuf.as_ref();
        let own = self.device.attach(uuid, uapi::ACCESS_READ, false)?;
        let inode = |fd| rustix::fs::fstat(fd).map(|stat| stat.st_ino);
        let what = "fstat".to_owned();
        let same = match pool {
            Some(fd) => inode(fd).and_then(|own_inode| Ok(own_inode == inode(&own.fd)?)),
            None => Ok(true),
        };
        let same = same.map_err(|error| Failure::Io { what, source: error.into() })?;
        if !same || own.handle != 0 || own.size != self.buffers[index].size {
            return Err(Failure::Wrong(format!("own export {uuid} comes back as {own:?}")));
        }
        self.count("own");
        Ok(())
    }

    fn query(&mut self, index: usize) -> Result<(), Failure> {
        let Buffer { handle, size, generation, .. } = self.buffers[index];
        let state = self.device.query(handle)?;
        if state.size != size || state.generation < generation {
            return Err(Failure::Wrong(format!("query of {size} bytes: {state:?}")));
        }
        self.count("query");
        Ok(())
    }

    fn release(&mut self, index: usize) -> Result<(), Failure> {
        let force = self.random.below(3) == 0;
        let handle = self.buffers[index].handle;
        if self.device.release(handle, force)? {
            self.buffers.swap_remove(index);
            refused("query of a released handle", self.device.query(handle), libc::ENOENT)?;
        } else {
            self.buffers[index].releasing = true;
            self.count("releasing");
        }
        self.count("release");
        Ok(())
    }

    fn nonsense(&mut self, index: usize) -> Result<(), Failure> {
        let handle = self.buffers[index].handle;
        refused("unknown handle", self.device.query(u64::MAX), libc::ENOENT)?;
        refused("handle 0", self.device.sync(0, uapi::SYNC_F_READ), libc::ENOENT)?;
        refused("sync of nothing", self.device.sync(handle, 0), libc::EINVAL)?;
        refused("unknown flag", self.device.sync(handle, 1 << 9), libc::EINVAL)?;
        refused("unknown right", self.device.grant(handle, peer::HOST, 1 << 9), libc::EINVAL)?;
        refused("size 0", self.device.alloc(0), libc::EINVAL)?;
        self.count("nonsense");
        Ok(())
    }

    /// Takes the events that are there. A handle whose RELEASED came is gone.
    fn events(&mut self, timeout: Duration) -> Result<bool, Failure> {
        let mut any = false;
        let mut timeout = timeout;
        while let Some(event) = self.device.event(Some(timeout))? {
            any = true;
            timeout = Duration::ZERO;
            if event.kind != uapi::EVENT_RELEASED {
                continue;
            }
            let at = self.buffers.iter().position(|b| b.handle == event.handle && b.releasing);
            let handle = event.handle;
            let at = at.ok_or_else(|| Failure::Wrong(format!("RELEASED of {handle}: not ours")))?;
            self.buffers.swap_remove(at);
            self.count("released-event");
        }
        Ok(any)
    }

    fn step(&mut self, limit: usize) -> Result<(), Failure> {
        self.events(Duration::ZERO)?;
        if self.buffers.len() < limit && self.random.below(3) == 0 || self.buffers.is_empty() {
            return self.export();
        }
        let index = self.random.below(self.buffers.len() as u64) as usize;
        if self.buffers[index].releasing {
            // It may go at any time.
            return allow(self.device.query(self.buffers[index].handle), &[libc::ENOENT]).map(drop);
        }
        let handle = self.buffers[index].handle;
        match self.random.below(10) {
            0..=2 => self.sync(index),
            3 if handle.is_multiple_of(2) => self.own(index),
            3 => self.query(index),
            4 => {
                let access = self.random.below(4) as u32;
                // Parts are exported for reading only.
                if allow(self.device.grant(handle, peer::HOST, access), &[libc::EACCES])?.is_some()
                {
                    self.count("grant");
                }
                Ok(())
            }
            5 => {
                self.device.set_name(handle, "stress \u{e9}")?;
                self.count("name");
                Ok(())
            }
            6 if self.buffers.len() < limit => self.part(index),
            7 => self.nonsense(index),
            _ => self.release(index),
        }
    }

    fn run(mut self, end: Instant, limit: usize) -> Result<BTreeMap<&'static str, u64>, Failure> {
        while Instant::now() < end {
            self.step(limit)?;
        }
        let mut index = 0;
        while index < self.buffers.len() {
            let before = self.buffers.len();
            if !self.buffers[index].releasing {
                self.release(index)?;
            }
            index += usize::from(self.buffers.len() == before);
        }
        let last = Instant::now() + Duration::from_secs(10);
        while !self.buffers.is_empty() {
            if !self.events(Duration::from_secs(1))? && Instant::now() > last {
                let left = self.buffers.len();
                return Err(Failure::Wrong(format!("{left} buffers are not back after 10 s")));
            }
        }
        Ok(self.counts)
    }
}

impl Stress {
    pub fn run(&self, path: &Path) -> Result<(), Failure> {
        let end = Instant::now() + Duration::from_secs(self.seconds);
        let mut workers = Vec::new();
        for number in 0..self.threads {
            let device = Device::open(path)?;
            let info = device.info()?;
            let granule = u64::from(info.granule);
            let largest = (self.largest << 10).clamp(granule, info.max_buffer_size.max(granule));
            let mut random = Random((self.seed + number).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
            random.next();
            let (buffers, counts) = (Vec::new(), BTreeMap::new());
            workers.push(Worker { device, random, granule, largest, buffers, counts });
        }
        let buffers = self.buffers;
        let threads = workers
            .into_iter()
            .map(|worker| std::thread::spawn(move || worker.run(end, buffers)))
            .collect::<Vec<_>>();
        let mut total = BTreeMap::<_, u64>::new();
        for thread in threads {
            let counts = thread.join();
            let counts = counts.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            for (what, count) in counts {
                *total.entry(what).or_default() += count;
            }
        }
        let text: Vec<_> = total.iter().map(|(what, count)| format!("{what}={count}")).collect();
        line(&format!("stress seconds={} {}", self.seconds, text.join(" ")))
    }
}
