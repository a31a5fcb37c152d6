//! Which processes have a memory open or mapped, as /proc shows it to this user.
//!
//! It knows /proc, not the daemon. What comes and goes meanwhile may be missed; what this user may
//! not look into is counted.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::fs::{major, minor};

/// A process that has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    pub pid: u32,
    /// Its command.
    pub name: String,
    pub fds: u32,
    pub mappings: u32,
}

/// What was found, and how many processes could not be looked into.
#[derive(Debug, Default)]
pub struct Found {
    pub processes: Vec<Process>,
    pub hidden: u32,
}

/// Looks at every process but `daemon`.
pub fn with(device: u64, inode: u64, daemon: u32) -> Found {
    let mut found = Found::default();
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    for pid in pids.filter(|pid| *pid != daemon) {
        let of = Path::new("/proc").join(pid.to_string());
        let (Ok(fds), Ok(maps)) = (fs::read_dir(of.join("fd")), fs::read(of.join("maps"))) else {
            // One that has ended hides nothing.
            found.hidden += u32::from(of.exists());
            continue;
        };
        let fds = fds.flatten().filter(|entry| is(&entry.path(), device, inode)).count();
        let maps = String::from_utf8_lossy(&maps);
        let mappings = maps.lines().filter(|line| maps_to(line, device, inode)).count();
        if fds + mappings > 0 {
            let name = fs::read_to_string(of.join("comm")).unwrap_or_default();
            let name = name.trim_end().chars().map(|c| if c.is_control() { '?' } else { c });
            let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
            let (fds, mappings) = (count(fds), count(mappings));
            found.processes.push(Process { pid, name: name.collect(), fds, mappings });
        }
    }
    found.processes.sort_by_key(|process| process.pid);
    found
}

/// Only what looks like shared memory is opened up: to ask others may take for ever.
fn is(fd: &Path, device: u64, inode: u64) -> bool {
    let link = fs::read_link(fd).unwrap_or_default();
    let shared = ["/dmabuf:", "/memfd:"]
        .iter()
        .any(|start| link.as_os_str().as_encoded_bytes().starts_with(start.as_bytes()));
    shared && fs::metadata(fd).is_ok_and(|stat| stat.dev() == device && stat.ino() == inode)
}

/// A line of /proc/PID/maps: range, rights, offset, device, inode, name.
fn maps_to(line: &str, device: u64, inode: u64) -> bool {
    let mut words = line.split_ascii_whitespace().skip(3);
    let (at, number) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    number.parse() == Ok(inode) && at == format!("{:02x}:{:02x}", major(device), minor(device))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::makedev;

    #[test]
    fn a_line_of_maps_names_device_and_inode() {
        let line = "7f0c6e200000-7f0c6e201000 rw-s 00000000 00:0d 4711    /dmabuf:";
        assert!(maps_to(line, makedev(0, 13), 4711));
        assert!(!maps_to(line, makedev(0, 14), 4711) && !maps_to(line, makedev(0, 13), 471));
        assert!(!maps_to("", 0, 0) && !maps_to("a b c", 0, 0));
        let anonymous = "7ffd000-7ffe000 rw-p 00000000 00:00 0 [stack]";
        assert!(!maps_to(anonymous, makedev(0, 13), 4711));
    }
}
