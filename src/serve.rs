//! One thread a VM: accepts a connection of its VMM, serves it until it ends, accepts the next.
//!
//! It knows sockets and the framework's threads, not what is said on them.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use log::debug;
use vhost::vhost_user::Listener;
use vhost_user_backend::VhostUserDaemon;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use crate::device::{Device, Options, WAKE};
use crate::hub::Hub;
use crate::ids::PeerId;
use crate::throttle::Throttle;
use crate::throttled;

/// Serves one VM for ever, on a thread of its own.
pub fn spawn(
    hub: Arc<Hub>,
    peer: PeerId,
    options: Options,
    socket: UnixListener,
) -> io::Result<thread::JoinHandle<()>> {
    let throttle = Arc::new(Throttle::new());
    thread::Builder::new().name(format!("vm-{}", options.name)).spawn(move || {
        loop {
            if let Err(error) = connection(&hub, peer, &options, &socket, &throttle) {
                throttled!(throttle, Error, "{}: {error}", options.name);
                // Out of descriptors, say: not a reason to spin.
                thread::sleep(Duration::from_millis(100));
            }
        }
    })
}

fn connection(
    hub: &Arc<Hub>,
    peer: PeerId,
    options: &Options,
    socket: &UnixListener,
    throttle: &Arc<Throttle>,
) -> io::Result<()> {
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let wake = hub.vm_wake(peer).ok_or_else(|| io::Error::other("the VM is not configured"))?;
    wait_readable(socket)?;
    let mut listener = Listener::from(socket.try_clone()?);
    let device = Device::new(hub.clone(), peer, options.clone(), throttle.clone());
    let device = Arc::new(device?);
    let result = serve(options, &mut listener, &device, memory, wake.as_fd().as_raw_fd(), throttle);
    device.close();
    result
}

fn serve(
    options: &Options,
    listener: &mut Listener,
    device: &Arc<Device>,
    memory: GuestMemoryAtomic<GuestMemoryMmap>,
    wake: i32,
    throttle: &Throttle,
) -> io::Result<()> {
    let name = format!("vu-{}", options.name);
    let mut daemon = VhostUserDaemon::new(name, device.clone(), memory).map_err(framework)?;
    for handler in daemon.get_epoll_handlers() {
        handler.register_listener(wake, EventSet::IN, WAKE)?;
    }
    daemon.start(listener).map_err(framework)?;
    throttled!(throttle, Info, "{}: connected", options.name);
    match daemon.wait() {
        Ok(()) => throttled!(throttle, Info, "{}: disconnected", options.name),
        Err(vhost_user_backend::Error::HandleRequest(
            vhost::vhost_user::Error::Disconnected | vhost::vhost_user::Error::PartialMessage,
        )) => throttled!(throttle, Info, "{}: disconnected", options.name),
        Err(error) => throttled!(
            throttle,
            Warn,
            "{}: the connection ended: {error}; is the front end a vhost-user one for device 37?",
            options.name
        ),
    }
    device.hang_up();
    debug!("{}: threads end", options.name);
    Ok(())
}

/// The framework's errors are no `std::error::Error`.
fn framework(error: vhost_user_backend::Error) -> io::Error {
    io::Error::other(error.to_string())
}

/// Waits for a connection: before one comes there is no session.
fn wait_readable(listener: &UnixListener) -> io::Result<()> {
    use rustix::event::{PollFd, PollFlags, poll};
    loop {
        let mut fds = [PollFd::new(listener, PollFlags::IN)];
        match poll(&mut fds, None) {
            Ok(_) => return Ok(()),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
