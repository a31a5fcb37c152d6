//! vhost-device-bufshare: the start-up order, written once.
//!
//! Arguments, then what needs privileges (udmabuf, sockets), then the sandbox, then threads. It knows the order, not
//! what the parts do.

use std::error::Error;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use bufshare::args::{Args, Settings, Socket, Vm};
use bufshare::device::Options;
use bufshare::dmabuf::DmaBufs;
use bufshare::estate::Estate;
use bufshare::handover::{self, Manager};
use bufshare::host::heirs::{self, Heirs};
use bufshare::host::listener::{ListenError, Listener};
use bufshare::host::server::Server;
use bufshare::hub::{Hub, VmSpec};
use bufshare::ids::PeerId;
use bufshare::policy::{Allowed, Policy};
use bufshare::{ioctl, limits, protocol, sandbox, serve};
use clap::Parser;
use rustix::net::sockopt::socket_acceptconn;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use signal_hook::consts::SIGTERM;

fn main() -> ExitCode {
    env_logger::Builder::from_env(
        env_logger::Env::default().default_filter_or("info,virtio_queue=off"),
    )
    .format_timestamp_millis()
    .init();
    let args = Args::parse();
    if args.print_capabilities {
        let capabilities = serde_json::json!({
            "type": "bufshare",
            "virtio-id": protocol::DEVICE_ID,
            "queues": protocol::vq::COUNT,
            "config-size": size_of::<protocol::Config>(),
        });
        println!("{capabilities:#}");
        return ExitCode::SUCCESS;
    }
    let result = args.settings().map_err(Box::from).and_then(run);
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain(&*error);
            ExitCode::FAILURE
        }
    }
}

fn complain(error: &dyn Error) {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    log::error!("{text}");
}

fn run(settings: Settings) -> Result<(), Box<dyn Error>> {
    ioctl::keep_freed_memory(limits::KEEP_FREED);
    let dmabufs = DmaBufs::new(&settings.udmabuf, settings.require_zero_copy)?;
    raise_fd_limit(&settings, &dmabufs);
    let mut manager = Manager::from_env()?;
    // From here on a predecessor is gone.
    let mut estate = inherit(&settings, manager.as_ref())?;
    let mut heirs = Heirs::default();
    let mut listeners = Vec::new();
    let keep = settings.hand_over.is_some() || manager.is_some();
    for vm in &settings.vms {
        let name = format!("vm-{}", vm.name);
        let listener = match &vm.socket {
            Socket::Path(path) => match estate.listener(&name, path) {
                Some(socket) => UnixListener::from(socket),
                None => listen(vm)?,
            },
            Socket::Fd(_) => listen(vm)?,
        };
        if keep && matches!(vm.socket, Socket::Path(_)) {
            heirs.listeners.push((name, listener.try_clone()?.into()));
        }
        listeners.push(listener);
    }
    let mut bind = |name, path: Option<&Path>, also| -> Result<Option<Listener>, ListenError> {
        let Some(path) = path else { return Ok(None) };
        Ok(Some(match estate.listener(name, path) {
            Some(socket) => Listener::inherit(socket, also),
            None => Listener::bind(path, also)?,
        }))
    };
    let host = bind(heirs::HOST, settings.host_socket.as_deref(), settings.host_uid)?;
    heirs.socket = bind(heirs::HAND_OVER, settings.hand_over.as_deref(), None)?;
    // What is not understood, or of no use any more, would stay open for ever.
    estate.listeners.clear();
    if let Some(manager) = manager.take() {
        let (read, write) = UnixStream::pair()?;
        signal_hook::low_level::pipe::register(SIGTERM, write)?;
        heirs.manager = Some((manager, read));
    }
    let spec = |vm: &Vm| VmSpec { name: vm.name.clone(), quota: vm.quota };
    let specs: Vec<VmSpec> = settings.vms.iter().map(spec).collect();
    let mut hub = Hub::new(&specs, Policy::new(settings.rules), dmabufs)?;
    if estate.clock > Duration::ZERO {
        hub.inherit(estate.buffers, estate.last_lease, estate.clock);
    }
    let hub = Arc::new(hub);
    if settings.sandbox {
        sandbox::enter()?;
    }
    for ((peer, vm), listener) in
        (PeerId::FIRST_VM.0..).map(PeerId).zip(&settings.vms).zip(listeners)
    {
        let options = Options {
            name: vm.name.clone(),
            unsealed_ram: vm.unsealed_ram,
            revoke_on_stop: vm.revoke_on_stop,
            window: settings.window_size,
        };
        serve::spawn(hub.clone(), peer, options, listener)?;
    }
    if let Some((manager, _)) = &heirs.manager {
        manager.ready();
    }
    let mut server = Server::new(hub, host)?;
    server.inherit(estate.clients, estate.last_client, heirs);
    server.run()
}

/// What the daemon before this one left, if there was one.
fn inherit(settings: &Settings, manager: Option<&Manager>) -> io::Result<Estate> {
    if let Some(parcel) = manager.map(Manager::parcel).transpose()?.filter(|p| !p.is_empty()) {
        return Ok(Estate::of(parcel));
    }
    let parcel = match &settings.hand_over {
        Some(path) => handover::take_over(path)?,
        None => None,
    };
    Ok(parcel.map(Estate::of).unwrap_or_default())
}

/// Each export is a descriptor or two. Says at once if all that the VMs may export will not fit.
fn raise_fd_limit(settings: &Settings, dmabufs: &DmaBufs) {
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }) {
        log::warn!("the limit of open files stays at {:?}: {error}", limit.current);
    }
    let of = |vm: &Vm| u64::from(vm.quota.max_exports) * dmabufs.fds_per_export(vm.unsealed_ram);
    let exports: u64 = settings.vms.iter().map(of).sum();
    let policy = Policy::new(settings.rules.clone());
    let mut peers = (PeerId::FIRST_VM.0..).map(PeerId).take(settings.vms.len());
    let lends = peers.any(|vm| policy.allows(PeerId::HOST, vm) != Allowed::No);
    let lent = if lends { 2 * u64::from(limits::MAX_HOST_EXPORTS) } else { 0 };
    let needed =
        exports + lent + settings.vms.len() as u64 * limits::FDS_PER_VM + limits::FDS_OF_DAEMON;
    if let Some(most) = getrlimit(Resource::Nofile).current.filter(|most| *most < needed) {
        log::warn!(
            "at most {most} files can be open, and these VMs may need {needed}: beyond it EXPORT answers NOMEM; \
             set LimitNOFILE={needed} (or `ulimit -Hn`), or a smaller max-exports= of each --vm"
        );
    }
}

fn listen(vm: &Vm) -> io::Result<UnixListener> {
    match &vm.socket {
        Socket::Path(path) => bind(path).map_err(|error| {
            let hint = match error.kind() {
                io::ErrorKind::NotFound => "create its directory first",
                io::ErrorKind::PermissionDenied => "choose a directory that this user may write",
                io::ErrorKind::AddrInUse => {
                    "another daemon serves it: stop that one, or choose another path"
                }
                io::ErrorKind::AlreadyExists => {
                    "a file that is no socket is in the way: remove it, or choose another path"
                }
                io::ErrorKind::InvalidInput => "a socket path has at most 107 bytes",
                _ => "choose another path",
            };
            let text =
                format!("cannot listen on {} for {}: {error}; {hint}", path.display(), vm.name);
            io::Error::new(error.kind(), text)
        }),
        Socket::Fd(number) => {
            let listening = |fd: OwnedFd| match socket_acceptconn(&fd) {
                Ok(true) => Ok(fd),
                Ok(false) => Err(io::Error::other("it does not listen")),
                Err(error) => Err(error.into()),
            };
            let fd = ioctl::adopt_fd(*number).and_then(listening).map_err(|error| {
                let hint = "the service manager must pass a listening socket under this number";
                io::Error::new(
                    error.kind(),
                    format!("fd={number} for {}: {error}; {hint}", vm.name),
                )
            })?;
            Ok(UnixListener::from(fd))
        }
    }
}

/// Binds a socket; a stale file that nobody listens on makes way.
fn bind(path: &Path) -> io::Result<UnixListener> {
    match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            // A plain file refuses connections too.
            if !std::fs::symlink_metadata(path)?.file_type().is_socket() {
                return Err(io::ErrorKind::AlreadyExists.into());
            }
            let stale = UnixStream::connect(path)
                .is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused);
            if !stale {
                return Err(error);
            }
            std::fs::remove_file(path)?;
            UnixListener::bind(path)
        }
        bound => bound,
    }
}
