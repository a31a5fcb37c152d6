//! The real daemon as a child process in a directory of its own.
//!
//! It knows the command line and /proc, nothing of vhost-user. A daemon that is dropped is killed;
//! where the test failed, its log goes to the test's output first.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

/// How a test wants its daemon.
#[derive(Debug, Clone)]
pub struct Launch {
    /// `--vm` arguments; `socket=` is added to each one.
    pub vms: Vec<String>,
    /// Further arguments; `@DIR@` stands for the daemon's directory.
    pub args: Vec<String>,
    /// Whether a host socket is wanted.
    pub host_socket: bool,
    /// Added to its environment.
    pub env: Vec<(String, OsString)>,
}

impl Default for Launch {
    fn default() -> Self {
        Self { vms: vec!["name=a".into()], args: Vec::new(), host_socket: true, env: Vec::new() }
    }
}

impl Launch {
    /// Starts the daemon and waits until all of its sockets exist.
    pub fn start(self) -> Daemon {
        let dir =
            tempfile::Builder::new().prefix("bufshare-").tempdir().expect("temporary directory");
        let (command, sockets) = self.command(dir.path());
        let mut daemon = Daemon { child: spawn(command, dir.path()), dir };
        let ready = wait_for(Duration::from_secs(20), || {
            daemon.exited().is_some() || sockets.iter().all(|socket| listens(socket))
        });
        if let Some(status) = daemon.exited() {
            panic!("the daemon ended at once: {status}");
        }
        assert!(ready, "the daemon made no sockets");
        daemon
    }

    /// The command that starts it in a directory, and the sockets that it will make.
    pub fn command(self, dir: &Path) -> (Command, Vec<PathBuf>) {
        let mut command = Command::new(binary());
        command.envs(self.env);
        let mut sockets = Vec::new();
        for vm in &self.vms {
            let socket = dir.join(format!("{}.sock", vm_name(vm)));
            command.arg("--vm").arg(format!("{vm},socket={}", socket.display()));
            sockets.push(socket);
        }
        if self.host_socket {
            let socket = dir.join("host.sock");
            command.arg("--host-socket").arg(&socket);
            sockets.push(socket);
        }
        let here = dir.display().to_string();
        command.args(self.args.iter().map(|arg| arg.replace("@DIR@", &here)));
        (command, sockets)
    }
}

/// Whether somebody listens on a socket: it exists a moment before.
fn listens(socket: &Path) -> bool {
    let listening = |line: &str| {
        let mut fields = line.split_whitespace();
        fields.nth(3) == Some("00010000") && line.ends_with(&*socket.to_string_lossy())
    };
    fs::read_to_string("/proc/net/unix").expect("/proc/net/unix").lines().any(listening)
}

/// Starts it; its log goes behind what is there.
fn spawn(mut command: Command, dir: &Path) -> Child {
    let log = File::options().create(true).append(true).open(dir.join("log")).expect("log file");
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .unwrap_or_else(|e| panic!("cannot start {command:?}: {e}"))
}

/// A running daemon.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    dir: TempDir,
}

impl Daemon {
    /// One daemon that serves VMs of these names.
    pub fn start(vms: &[&str]) -> Self {
        Launch { vms: vms.iter().map(|name| format!("name={name}")).collect(), ..Launch::default() }
            .start()
    }

    /// The vhost-user socket of a VM.
    pub fn socket(&self, vm: &str) -> PathBuf {
        self.dir.path().join(format!("{vm}.sock"))
    }

    /// The host socket.
    pub fn host_socket(&self) -> PathBuf {
        self.dir.path().join("host.sock")
    }

    /// The daemon's own directory, removed with it.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Everything that it logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    /// How many file descriptors it has open.
    pub fn fds(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.pid()))
            .map(Iterator::count)
            .expect("the daemon lives")
    }

    /// What its file descriptors are, for messages.
    pub fn fd_names(&self) -> Vec<String> {
        fs::read_dir(format!("/proc/{}/fd", self.pid()))
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| fs::read_link(entry.path()).ok())
            .map(|target| target.display().to_string())
            .collect()
    }

    /// Resident set in KiB.
    pub fn rss_kib(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid()));
        status
            .expect("the daemon lives")
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:"))
            .and_then(|value| value.trim().strip_suffix(" kB")?.trim().parse().ok())
            .expect("VmRSS")
    }

    /// Its exit status once it ended.
    pub fn exited(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("waitpid")
    }

    /// SIGTERM, and the exit status; panics when it does not end.
    pub fn terminate(&mut self) -> ExitStatus {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, Signal::TERM).expect("SIGTERM");
        assert!(
            wait_for(Duration::from_secs(10), || self.exited().is_some()),
            "SIGTERM did not end the daemon"
        );
        self.exited().expect("just seen")
    }

    /// Another one in its place and directory; how the one before ended, which it does by itself.
    pub fn replace(&mut self, command: Command) -> ExitStatus {
        let mut before = std::mem::replace(&mut self.child, spawn(command, self.dir.path()));
        before.wait().expect("waitpid")
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        // It may have ended by itself: then there is nothing left to do.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.kill();
        if thread::panicking() {
            eprintln!("--- log of the daemon ---\n{}---", self.log());
        }
    }
}

/// Asks again until it is so, or the time is over.
pub fn wait_for(limit: Duration, mut so: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + limit;
    loop {
        if so() {
            return true;
        }
        if Instant::now() >= end {
            return false;
        }
        thread::sleep(Duration::from_millis(2));
    }
}

/// Says that the test that runs in this thread cannot be run here, and why. The harness has no such
/// outcome: `./test` counts these lines, which go past its capture.
pub fn skip(reason: &str) {
    let thread = thread::current();
    let name = thread.name().unwrap_or("a test");
    // A line of its own, also where the harness has begun one. Nobody to read it is no failure.
    let _ = writeln!(std::io::stderr(), "\nskipped {name}: {reason}");
}

/// The daemon under test; a test bed that moves binaries names it in the environment.
fn binary() -> PathBuf {
    std::env::var_os("BUFSHARE_DAEMON")
        .map_or_else(|| PathBuf::from(env!("CARGO_BIN_EXE_vhost-device-bufshare")), PathBuf::from)
}

fn vm_name(vm: &str) -> &str {
    vm.split(',').find_map(|part| part.strip_prefix("name=")).expect("a VM has a name")
}
