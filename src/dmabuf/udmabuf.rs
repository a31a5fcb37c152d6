//! ZERO_COPY: /dev/udmabuf turns pages of sealed memfds into dma-bufs.
//!
//! It knows the device and its limits, not what the pages are for.

use std::fmt;
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use crate::ioctl::{UdmabufItem, udmabuf_create};
use crate::limits::GRANULE;
use crate::memory::FileSegment;

/// Where udmabuf comes from: `--udmabuf`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// /dev/udmabuf if it can be opened.
    Auto,
    /// None: COPY mode.
    Off,
    /// This node.
    Path(PathBuf),
    /// An inherited descriptor.
    Fd(i32),
}

/// `list_limit` of the driver where sysfs does not tell.
pub const DEFAULT_LIST_LIMIT: u32 = 1024;
/// `size_limit_mb` of the driver up to Linux 7.2, where sysfs tells `list_limit` alone it is gone.
const DEFAULT_SIZE_LIMIT_MB: u64 = 64;
const PARAMETERS: &str = "/sys/module/udmabuf/parameters";
const NODE: &str = "/dev/udmabuf";

/// What the running kernel lets one dma-buf be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Entries of a list.
    pub segments: u32,
    /// Bytes.
    pub bytes: u64,
}

impl fmt::Display for Limits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "at most {} segments and ", self.segments)?;
        match self.bytes {
            u64::MAX => write!(f, "any size"),
            bytes => write!(f, "{} MiB a buffer (udmabuf.size_limit_mb)", bytes >> 20),
        }
    }
}

/// An open /dev/udmabuf.
#[derive(Debug)]
pub struct Device {
    node: OwnedFd,
    limits: Limits,
}

impl Device {
    /// Opens it and tries it out. `None` where the operator wants none.
    pub fn open(source: &Source) -> io::Result<Option<Device>> {
        let node = match source {
            Source::Off => return Ok(None),
            Source::Auto => open_node(Path::new(NODE))?,
            Source::Path(path) => open_node(path)?,
            Source::Fd(number) => crate::ioctl::adopt_fd(*number).map_err(|error| {
                let hint = "the service manager must pass an open /dev/udmabuf under this number";
                io::Error::new(error.kind(), format!("--udmabuf fd:{number}: {error}; {hint}"))
            })?,
        };
        let device = Device { node, limits: read_limits(Path::new(PARAMETERS)) };
        let page = super::copy::private(GRANULE)?;
        device.wrap(page.as_fd(), GRANULE).map_err(|error| {
            let what = match source {
                Source::Path(path) => path.display().to_string(),
                Source::Fd(number) => format!("fd:{number}"),
                Source::Auto | Source::Off => NODE.to_owned(),
            };
            let hint = "is it no udmabuf? Pass another node with --udmabuf, or accept copies with --udmabuf off";
            io::Error::new(error.kind(), format!("{what} makes no dma-buf: {error}; {hint}"))
        })?;
        Ok(Some(device))
    }

    /// Its limits.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// A dma-buf of exactly these pages.
    pub fn create(&self, pages: &[FileSegment]) -> io::Result<OwnedFd> {
        let items = pages.iter().map(|segment| UdmabufItem {
            memfd: segment.file.as_fd(),
            offset: segment.offset,
            size: segment.len,
        });
        udmabuf_create(self.node.as_fd(), items)
    }

    /// A dma-buf of a whole memfd.
    pub fn wrap(&self, memfd: BorrowedFd<'_>, size: u64) -> io::Result<OwnedFd> {
        udmabuf_create(self.node.as_fd(), [UdmabufItem { memfd, offset: 0, size }].into_iter())
    }
}

fn open_node(path: &Path) -> io::Result<OwnedFd> {
    let file = fs::File::options().read(true).write(true).open(path).map_err(|error| {
        let hint = match error.kind() {
            io::ErrorKind::NotFound => {
                "load it with `modprobe udmabuf` (CONFIG_UDMABUF, Linux 4.20 or later), or accept copies with --udmabuf off"
            }
            io::ErrorKind::PermissionDenied => {
                "it belongs to root:kvm mode 0660: add this user to the group kvm, or pass it with --udmabuf fd:N"
            }
            _ => "pass another node with --udmabuf PATH, or accept copies with --udmabuf off",
        };
        io::Error::new(error.kind(), format!("cannot open {}: {error}; {hint}", path.display()))
    })?;
    Ok(file.into())
}

fn read_limits(parameters: &Path) -> Limits {
    let read = |name: &str| {
        let text = fs::read_to_string(parameters.join(name)).ok()?;
        text.trim().parse::<u64>().ok()
    };
    let segments = read("list_limit").and_then(|limit| u32::try_from(limit).ok());
    let megabytes = match (segments, read("size_limit_mb")) {
        (_, Some(limit)) => Some(limit),
        // From Linux 7.3 the size is unlimited and the parameter gone.
        (Some(_), None) => None,
        (None, None) => Some(DEFAULT_SIZE_LIMIT_MB),
    };
    Limits {
        segments: segments.unwrap_or(DEFAULT_LIST_LIMIT),
        bytes: megabytes.and_then(|limit| limit.checked_mul(1 << 20)).unwrap_or(u64::MAX),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(files: &[(&str, &str)]) -> Limits {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            fs::write(dir.path().join(name), text).unwrap();
        }
        read_limits(dir.path())
    }

    #[test]
    fn limits_follow_the_running_kernel() {
        let raised = limits(&[("list_limit", "16384\n"), ("size_limit_mb", "1024\n")]);
        assert_eq!(raised, Limits { segments: 16384, bytes: 1 << 30 });
        let newer = limits(&[("list_limit", "1024\n")]);
        assert_eq!(newer, Limits { segments: 1024, bytes: u64::MAX });
        assert_eq!(limits(&[]), Limits { segments: 1024, bytes: 64 << 20 });
    }

    #[test]
    fn a_missing_node_says_what_to_do() {
        let error = Device::open(&Source::Path("/nonexistent/udmabuf".into())).unwrap_err();
        assert!(error.to_string().contains("modprobe udmabuf"), "{error}");
        let error = Device::open(&Source::Fd(1_000_000)).unwrap_err();
        assert!(error.to_string().contains("fd:1000000"), "{error}");
    }
}
