//! Where things run: processors, and a process that answers on eventfds, having copied a frame or not.
//!
//! It knows processes and threads, nothing of the daemon.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};
use rustix::process::Pid;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use vm_memory::{FileOffset, MmapRegion, VolatileMemory};

/// The argument that makes this program the other end of a ping-pong.
pub const PONG: &str = "--pong";

/// The processors that this process may use.
pub fn processors() -> Vec<usize> {
    let set = sched_getaffinity(None).expect("affinity");
    (0..CpuSet::MAX_CPU).filter(|cpu| set.is_set(*cpu)).collect()
}

/// Pins every thread of a process.
pub fn pin(process: u32, cpu: usize) {
    let mut set = CpuSet::new();
    set.set(cpu);
    for entry in fs::read_dir(format!("/proc/{process}/task")).expect("threads").flatten() {
        let name = entry.file_name();
        let tid = name.to_str().and_then(|name| name.parse().ok()).and_then(Pid::from_raw);
        // A thread that has ended meanwhile needs no place.
        let _ = sched_setaffinity(tid, &set);
    }
}

/// How often the threads of a process went to sleep or had to make room.
pub fn context_switches(process: u32) -> u64 {
    let mut sum = 0;
    for entry in fs::read_dir(format!("/proc/{process}/task")).expect("threads").flatten() {
        let status = fs::read_to_string(entry.path().join("status")).unwrap_or_default();
        let switches = status.lines().filter_map(|line| line.split_once("ctxt_switches:"));
        sum += switches.filter_map(|(_, count)| count.trim().parse::<u64>().ok()).sum::<u64>();
    }
    sum
}

/// Another process that answers each eventfd write with one of its own. What its arguments name, it copies
/// before that: a relay between two VMs as anybody could write it.
pub struct Pong {
    child: Child,
    ping: File,
    pong: File,
}

impl Pong {
    pub fn start() -> Self {
        Self::of(&[])
    }

    /// One that maps both places and copies so many bytes from the first to the second.
    pub fn relay(from: &FileOffset, to: &FileOffset, len: u64) -> Self {
        let path = |place: &FileOffset| {
            format!("/proc/{}/fd/{}", std::process::id(), place.file().as_raw_fd())
        };
        let [at, into] = [from, to].map(|place| place.start().to_string());
        Self::of(&[path(from), at, path(to), into, len.to_string()])
    }

    fn of(copied: &[String]) -> Self {
        let pair = || -> (File, OwnedFd) {
            let ours = eventfd(0, EventfdFlags::CLOEXEC).expect("eventfd");
            let theirs = ours.as_fd().try_clone_to_owned().expect("dup");
            (ours.into(), theirs)
        };
        let ((ping, stdin), (pong, stdout)) = (pair(), pair());
        let child = Command::new(std::env::current_exe().expect("this program"))
            .arg(PONG)
            .args(copied)
            .stdin(Stdio::from(stdin))
            .stdout(Stdio::from(stdout))
            .spawn()
            .expect("a second process");
        Self { child, ping, pong }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// There and back.
    pub fn ask(&mut self) -> Duration {
        let start = Instant::now();
        self.ping.write_all(&1u64.to_ne_bytes()).expect("ping");
        self.pong.read_exact(&mut [0; 8]).expect("pong");
        start.elapsed()
    }
}

impl Drop for Pong {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The other process.
pub fn answer_pings() -> ExitCode {
    let (stdin, stdout) = (std::io::stdin(), std::io::stdout());
    let args: Vec<String> = std::env::args().skip(2).collect();
    let frame = match args.as_slice() {
        [from, at, to, into, len] => Some((map(from, at, len), map(to, into, len))),
        _ => None,
    };
    let mut count = [0; 8];
    while rustix::io::read(&stdin, &mut count).is_ok() {
        if let Some((from, to)) = &frame {
            from.as_volatile_slice().copy_to_volatile_slice(to.as_volatile_slice());
        }
        if rustix::io::write(&stdout, &1u64.to_ne_bytes()).is_err() {
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

fn map(path: &str, at: &str, len: &str) -> MmapRegion {
    let file = File::options().read(true).write(true).open(path).expect("memory of the other one");
    let place = FileOffset::new(file, at.parse().expect("a number"));
    MmapRegion::from_file(place, len.parse().expect("a number")).expect("mmap")
}
