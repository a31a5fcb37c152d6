//! What an operator can get wrong: the daemon ends at once, says what and what to do, and breaks
//! nothing.

use std::fs;
use std::os::unix::net::UnixListener;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Runs the daemon with arguments that it has to refuse; what it says.
#[track_caller]
fn complaint(args: &[&str]) -> String {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log");
    let mut daemon = Command::new(env!("CARGO_BIN_EXE_vhost-device-bufshare"))
        .args(args)
        .stdin(Stdio::null())
        .stderr(fs::File::create(&log).unwrap())
        .spawn()
        .unwrap();
    let started = Instant::now();
    let status = loop {
        if let Some(status) = daemon.try_wait().unwrap() {
            break status;
        }
        if started.elapsed() > Duration::from_secs(5) {
            daemon.kill().unwrap();
            daemon.wait().unwrap();
            panic!("it went on: {}", fs::read_to_string(&log).unwrap());
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let text = fs::read_to_string(&log).unwrap();
    assert_eq!(status.code(), Some(1), "{text}");
    text
}

#[track_caller]
fn refused(args: &[&str], words: &[&str]) {
    let text = complaint(args);
    for word in words {
        assert!(text.contains(word), "{word:?} is not in {text}");
    }
}

#[test]
fn sockets_that_cannot_be() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| format!("name=a,socket={}", dir.path().join(name).display());
    refused(&["--vm", &at("none/a")], &["create its directory"]);
    refused(&["--vm", &at(&"x".repeat(120))], &["107 bytes"]);
    refused(&["--vm", "name=a,socket="], &["socket=PATH"]);
    let _served = UnixListener::bind(dir.path().join("served")).unwrap();
    refused(&["--vm", &at("served")], &["another daemon"]);
    refused(&["--vm", &at("a"), "--vm", &at("b")], &["two VMs are called \"a\""]);
}

#[test]
fn a_file_in_the_way_is_not_removed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("precious");
    fs::write(&path, "data").unwrap();
    let vm = format!("name=a,socket={}", path.display());
    refused(&["--vm", &vm], &["no socket is in the way"]);
    let good = format!("name=a,socket={}", dir.path().join("a").display());
    let host = path.to_str().unwrap();
    refused(&["--vm", &good, "--host-socket", host], &["no socket is in the way"]);
    assert_eq!(fs::read_to_string(&path).unwrap(), "data");
}

#[test]
fn descriptors_that_are_something_else() {
    let dir = tempfile::tempdir().unwrap();
    let good = format!("name=a,socket={}", dir.path().join("a").display());
    refused(&["--vm", "name=a,fd=77"], &["fd=77", "listening socket"]);
    // Standard input, which is /dev/null.
    refused(&["--vm", "name=a,fd=0"], &["fd=0", "listening socket"]);
    refused(&["--vm", &good, "--udmabuf", "fd:0"], &["fd:0", "udmabuf"]);
    refused(&["--vm", &good, "--udmabuf", "/dev/null"], &["/dev/null", "is it no udmabuf"]);
    refused(&["--vm", &good, "--udmabuf", "/dev/none"], &["modprobe udmabuf"]);
}
