//! Command line and configuration file → what to run.
//!
//! It knows words, not sockets: nothing is opened here. Every error names the word that is wrong and
//! what would be right.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use clap::Parser;
use serde::Deserialize;

use crate::dmabuf::Source;
use crate::ids::PeerId;
use crate::limits::{DEFAULT_WINDOW, GRANULE, MAX_VMS, MAX_WAITS, MAX_WINDOW, Quota};
use crate::policy::{Rule, Side};

/// Share guests' buffers with the host as dma-bufs: a vhost-user device (virtio ID 37) for many VMs.
#[derive(Debug, Clone, Parser)]
#[command(version, name = "vhost-device-bufshare")]
pub struct Args {
    /// A VM: name=NAME,socket=PATH (or fd=N for an inherited listening socket), then optionally
    /// max-exports=N, max-bytes=N, unsealed-ram, on-stop=revoke. Repeat it for more VMs
    #[arg(long = "vm", value_name = "KEYS")]
    pub vms: Vec<String>,
    /// Let FROM share with TO: names of VMs, `host` or `*`; `:ro` gives TO copies only. Where no rule
    /// applies, a VM may share with the host and with nobody else
    #[arg(long = "allow", value_name = "FROM:TO[:ro]")]
    pub allow: Vec<String>,
    /// Read the same settings from a TOML file; the command line adds to it
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Where host programs connect
    #[arg(long, value_name = "PATH")]
    pub host_socket: Option<PathBuf>,
    /// A user besides root and the daemon's own who may use the host socket
    #[arg(long, value_name = "UID")]
    pub host_uid: Option<u32>,
    /// Take over from the daemon that serves this socket, if there is one, and serve it for the next
    #[arg(long, value_name = "PATH")]
    pub hand_over: Option<PathBuf>,
    /// Where zero copies come from: auto (/dev/udmabuf if it can be opened), off, a path, or fd:N
    #[arg(long, value_name = "SOURCE")]
    pub udmabuf: Option<String>,
    /// Refuse exports that could only be copied
    #[arg(long)]
    pub require_zero_copy: bool,
    /// Bytes of the window in which each VM sees others' buffers, a power of two [default: 256 MiB]; 0:
    /// none, importers map by copy
    #[arg(long, value_name = "BYTES")]
    pub window_size: Option<u64>,
    /// Give up files and system calls that the daemon does not need
    #[arg(long, value_name = "on|off", default_value = "on", value_parser = ["on", "off"])]
    pub sandbox: String,
    /// Print what this back end is, as JSON, and exit
    #[arg(long)]
    pub print_capabilities: bool,
}

/// The same in a file.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
struct FileConfig {
    vm: Vec<BTreeMap<String, toml::Value>>,
    allow: Vec<String>,
    host_socket: Option<PathBuf>,
    host_uid: Option<u32>,
    hand_over: Option<PathBuf>,
    udmabuf: Option<String>,
    require_zero_copy: bool,
    window_size: Option<u64>,
    sandbox: Option<bool>,
}

/// Where a VMM connects.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Socket {
    /// Bound by the daemon.
    Path(PathBuf),
    /// A listening socket that was inherited.
    Fd(i32),
}

/// A VM to serve.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vm {
    /// The operator's name for it.
    pub name: String,
    /// Where its VMM connects.
    pub socket: Socket,
    /// Its quotas.
    pub quota: Quota,
    /// Copies of RAM that could be truncated are allowed.
    pub unsealed_ram: bool,
    /// A stop of its rings revokes everything.
    pub revoke_on_stop: bool,
}

/// What to run.
#[derive(Debug, Clone)]
pub struct Settings {
    /// In the order of their peer ids, from 2.
    pub vms: Vec<Vm>,
    /// The operator's rules.
    pub rules: Vec<Rule>,
    /// Where host programs connect.
    pub host_socket: Option<PathBuf>,
    /// Who else may.
    pub host_uid: Option<u32>,
    /// Where a predecessor is, and where a successor will be.
    pub hand_over: Option<PathBuf>,
    /// Where udmabuf comes from.
    pub udmabuf: Source,
    /// Refuse exports that could only be copied.
    pub require_zero_copy: bool,
    /// Bytes of each VM's window; 0: none.
    pub window_size: u64,
    /// Enter the sandbox.
    pub sandbox: bool,
}

/// Settings that make no sense.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum Error {
    #[error("--vm {text:?}: {what}")]
    Vm { text: String, what: String },
    #[error("no VM: say --vm name=NAME,socket=PATH, once for each VM")]
    NoVm,
    #[error("{0} VMs: one daemon serves at most {MAX_VMS}")]
    TooMany(usize),
    #[error("two VMs are called {0:?}: give each --vm a name of its own")]
    SameName(String),
    #[error("two VMs have the socket {0:?}: give each --vm a socket of its own")]
    SameSocket(String),
    #[error("--allow {text:?}: {what}")]
    Allow { text: String, what: String },
    #[error("--udmabuf {0:?}: say auto, off, an absolute path, or fd:N")]
    Udmabuf(String),
    #[error("--window-size {0}: say a power of two from {min} to {max}, or 0 for none", min = GRANULE, max = MAX_WINDOW)]
    Window(u64),
    #[error("cannot read the configuration {path:?}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("the configuration {path:?} is not right")]
    Toml { path: PathBuf, source: Box<toml::de::Error> },
}

impl Args {
    /// Command line and configuration file together.
    pub fn settings(&self) -> Result<Settings, Error> {
        let file = self.config.as_deref().map(read_file).transpose()?.unwrap_or_default();
        let from_file = file.vm.iter().map(|keys| {
            let word = |(key, value): (&String, &toml::Value)| match value {
                toml::Value::String(text) => Some(format!("{key}={text}")),
                toml::Value::Boolean(true) => Some(key.clone()),
                toml::Value::Boolean(false) => None,
                other => Some(format!("{key}={other}")),
            };
            keys.iter().filter_map(word).collect::<Vec<_>>().join(",")
        });
        let words = from_file.chain(self.vms.iter().cloned());
        let vms = words.map(|text| parse_vm(&text)).collect::<Result<Vec<Vm>, Error>>()?;
        check_vms(&vms)?;
        let rules = file.allow.iter().chain(&self.allow);
        let rules = rules.map(|text| parse_rule(text, &vms)).collect::<Result<_, _>>()?;
        let window_size = self.window_size.or(file.window_size).unwrap_or(DEFAULT_WINDOW);
        let possible =
            window_size.is_power_of_two() && (GRANULE..=MAX_WINDOW).contains(&window_size);
        if window_size != 0 && !possible {
            return Err(Error::Window(window_size));
        }
        let udmabuf = self.udmabuf.as_ref().or(file.udmabuf.as_ref());
        Ok(Settings {
            rules,
            host_socket: self.host_socket.clone().or(file.host_socket),
            host_uid: self.host_uid.or(file.host_uid),
            hand_over: self.hand_over.clone().or(file.hand_over),
            udmabuf: udmabuf.map_or(Ok(Source::Auto), |text| parse_udmabuf(text))?,
            require_zero_copy: self.require_zero_copy || file.require_zero_copy,
            window_size,
            sandbox: self.sandbox == "on" && file.sandbox != Some(false),
            vms,
        })
    }
}

fn read_file(path: &Path) -> Result<FileConfig, Error> {
    let text =
        fs::read_to_string(path).map_err(|source| Error::Read { path: path.to_owned(), source })?;
    toml::from_str(&text)
        .map_err(|source| Error::Toml { path: path.to_owned(), source: Box::new(source) })
}

fn parse_vm(text: &str) -> Result<Vm, Error> {
    let wrong = |what: String| Error::Vm { text: text.to_owned(), what };
    let mut name = None;
    let mut socket = None;
    let mut quota = Quota::default();
    let mut unsealed_ram = false;
    let mut revoke_on_stop = false;
    for word in text.split(',').filter(|word| !word.is_empty()) {
        let (key, value) = word.split_once('=').unwrap_or((word, ""));
        match key {
            "name" => name = Some(value.to_owned()),
            "socket" if !value.is_empty() => socket = Some(Socket::Path(value.into())),
            "socket" => return Err(wrong("it needs socket=PATH or fd=N".to_owned())),
            "fd" => {
                socket =
                    Some(Socket::Fd(number(value).map_err(|what| wrong(format!("fd: {what}")))?))
            }
            "max-exports" => {
                quota.max_exports =
                    number(value).map_err(|what| wrong(format!("{key}: {what}")))?;
            }
            "max-bytes" => {
                quota.max_total_size =
                    number(value).map_err(|what| wrong(format!("{key}: {what}")))?;
            }
            "unsealed-ram" if value.is_empty() => unsealed_ram = true,
            "on-stop" if value == "revoke" => revoke_on_stop = true,
            "on-stop" => return Err(wrong("on-stop knows only revoke".to_owned())),
            _ => {
                let known = "name, socket, fd, max-exports, max-bytes, unsealed-ram, on-stop";
                return Err(wrong(format!("{word:?} is unknown; the keys are {known}")));
            }
        }
    }
    quota.max_waits = MAX_WAITS;
    let name = name.ok_or_else(|| wrong("it needs name=NAME".to_owned()))?;
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    if name.is_empty() || name.len() > 63 || !name.chars().all(plain) || name == "host" {
        let what = "a name has 1 to 63 letters, digits, '-', '_' or '.', and is not \"host\"";
        return Err(wrong(what.to_owned()));
    }
    let socket = socket.ok_or_else(|| wrong("it needs socket=PATH or fd=N".to_owned()))?;
    Ok(Vm { name, socket, quota, unsealed_ram, revoke_on_stop })
}

fn number<T: FromStr>(text: &str) -> Result<T, String>
where
    T::Err: std::fmt::Display,
{
    text.parse().map_err(|error| format!("{text:?} is no number that fits: {error}"))
}

fn check_vms(vms: &[Vm]) -> Result<(), Error> {
    if vms.is_empty() {
        return Err(Error::NoVm);
    }
    if vms.len() > MAX_VMS {
        return Err(Error::TooMany(vms.len()));
    }
    for (index, vm) in vms.iter().enumerate() {
        let before = vms.iter().take(index);
        for other in before {
            if other.name == vm.name {
                return Err(Error::SameName(vm.name.clone()));
            }
            if other.socket == vm.socket {
                return Err(Error::SameSocket(match &vm.socket {
                    Socket::Path(path) => path.display().to_string(),
                    Socket::Fd(number) => format!("fd={number}"),
                }));
            }
        }
    }
    Ok(())
}

fn parse_rule(text: &str, vms: &[Vm]) -> Result<Rule, Error> {
    let wrong = |what: String| Error::Allow { text: text.to_owned(), what };
    let side = |name: &str| match name {
        "*" => Ok(Side::Any),
        "host" => Ok(Side::One(PeerId::HOST)),
        _ => (PeerId::FIRST_VM.0..)
            .map(PeerId)
            .zip(vms)
            .find(|(_, vm)| vm.name == name)
            .map(|(peer, _)| Side::One(peer))
            .ok_or_else(|| {
                wrong(format!("no VM is called {name:?}; names are those of --vm, host and *"))
            }),
    };
    match text.split(':').collect::<Vec<_>>().as_slice() {
        [from, to] => Ok(Rule { from: side(from)?, to: side(to)?, read_only: false }),
        [from, to, "ro"] => Ok(Rule { from: side(from)?, to: side(to)?, read_only: true }),
        _ => Err(wrong("say FROM:TO or FROM:TO:ro".to_owned())),
    }
}

fn parse_udmabuf(text: &str) -> Result<Source, Error> {
    match text {
        "auto" => Ok(Source::Auto),
        "off" => Ok(Source::Off),
        path if path.starts_with('/') => Ok(Source::Path(path.into())),
        _ => text
            .strip_prefix("fd:")
            .and_then(|number| number.parse().ok())
            .map(Source::Fd)
            .ok_or_else(|| Error::Udmabuf(text.to_owned())),
    }
}

#[cfg(test)]
#[path = "args_tests.rs"]
mod tests;
