//! Descriptors of a VMM that make whoever reads, writes or closes them wait. Its own VM may suffer, until
//! the VMM is gone; nobody else.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, IntoRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::thread;

use crate::common::*;
use bufshare::ioctl::adopt_fd;
use bufshare::protocol::{Opcode, RespState, vq};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vmm_sys_util::eventfd::EventFd;

const CONTROL: usize = vq::CONTROL as usize;

/// Whether a front end that connects now is answered.
fn answers(daemon: &Daemon, vm: &str) -> bool {
    let mut socket = UnixStream::connect(daemon.socket(vm)).expect("connect");
    socket.set_read_timeout(Some(SOON)).expect("a socket");
    // GET_FEATURES, version 1, no payload.
    let request = [1u32, 1, 0].map(u32::to_le_bytes).concat();
    socket.write_all(&request).expect("a request");
    socket.read_exact(&mut [0; 20]).is_ok()
}

/// Panics unless the daemon lives and serves both VMs.
#[track_caller]
fn assert_served(daemon: &mut Daemon) {
    assert!(answers(daemon, "b"), "another VM is not served");
    assert!(answers(daemon, "a"), "its connection never ends");
    super::vmm::assert_served(daemon);
}

/// Any descriptor as what the front end passes.
fn as_event(fd: &OwnedFd) -> EventFd {
    let event = EventFd::new(0).expect("eventfd");
    let mut number = adopt_fd(event.as_raw_fd()).expect("just opened");
    rustix::io::dup2(fd, &mut number).expect("dup2");
    let _ = number.into_raw_fd();
    event
}

/// One that nobody can write to, without waiting for a reader.
fn full() -> EventFd {
    let full = EventFd::new(0).expect("eventfd");
    full.write(u64::MAX - 1).expect("to the brim");
    full
}

/// A guest whose device interrupts it for each answer.
fn guest(daemon: &Daemon) -> Guest {
    Setup { decline: F_EVENT_IDX, ..Default::default() }.connect(daemon, "a")
}

fn ask(guest: &mut Guest) {
    let query = handle_request(Opcode::Query, 0, 1);
    let size = u32::try_from(size_of::<RespState>()).expect("small");
    guest.control_ring().submit(&[&query], &[size]).expect("a free descriptor");
}

#[test]
fn a_call_eventfd_that_is_full_keeps_no_connection_alive() {
    let mut daemon = Daemon::start(&["a", "b"]);
    for replaced in [false, true] {
        let mut guest = guest(&daemon);
        let frontend = guest.frontend();
        // The VMM's own reference goes away with it: nobody is left who would read.
        frontend.set_vring_call(CONTROL, &full()).expect("SET_VRING_CALL");
        ask(&mut guest);
        thread::sleep(QUIET);
        if replaced {
            frontend.set_vring_call(CONTROL, &full()).expect("SET_VRING_CALL");
            frontend.clone().set_vring_enable(CONTROL, false).expect("SET_VRING_ENABLE");
        }
        drop((guest, frontend));
        assert_served(&mut daemon);
    }
}

#[test]
fn what_is_no_event_is_not_written_to() {
    let mut daemon = Daemon::start(&["a", "b"]);
    let (reader, writer) = std::io::pipe().expect("pipe");
    let (ours, theirs) = UnixStream::pair().expect("socketpair");
    let fill = |fd: &OwnedFd| {
        let before = fcntl_getfl(fd).expect("flags");
        fcntl_setfl(fd, before | OFlags::NONBLOCK).expect("flags");
        while rustix::io::write(fd, &[0; 512]).is_ok() {}
        fcntl_setfl(fd, before).expect("flags");
    };
    let (pipe, socket) = (OwnedFd::from(writer), OwnedFd::from(theirs));
    fill(&pipe);
    fill(&socket);
    let fds = [
        pipe,
        // What virtio_uml has for a call.
        socket,
        tempfile::tempfile().expect("a file").into(),
        File::open("/").expect("a directory").into(),
        File::options().write(true).open("/dev/null").expect("/dev/null").into(),
        reader.try_clone().expect("dup").into(),
    ];
    for fd in &fds {
        let mut guest = guest(&daemon);
        let frontend = guest.frontend();
        let file = as_event(fd);
        frontend.set_vring_call(CONTROL, &file).expect("SET_VRING_CALL");
        frontend.set_vring_err(CONTROL, &file).expect("SET_VRING_ERR");
        ask(&mut guest);
        let ring = guest.control_ring();
        assert!(wait_for(SOON, || ring.pop_used().is_some()), "{fd:?} holds the worker up");
        // It may be refused.
        let _ = frontend.set_vring_kick(CONTROL, &file);
        drop((guest, frontend));
        assert_served(&mut daemon);
    }
    assert_eq!(rustix::fs::fstat(&fds[2]).expect("fstat").st_size, 0, "written into a file");
    drop((reader, ours));
}
