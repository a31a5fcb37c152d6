//! SIGTERM and SIGINT as something to poll for, so that the buffer is handed back before the end.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::OnceLock;

use bufshare::ioctl::eventfd;
use vmm_sys_util::signal::register_signal_handler;

static WAKE: OnceLock<File> = OnceLock::new();

extern "C" fn on_signal(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // Async-signal-safe: an atomic load and write(2). A full counter says the same.
    if let Some(wake) = WAKE.get() {
        let _ = rustix::io::write(wake, &1u64.to_ne_bytes());
    }
}

/// From now on these signals make [`fd`] readable, and end nothing by themselves.
pub fn install() -> io::Result<()> {
    let wake = eventfd()?;
    WAKE.get_or_init(|| wake);
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
        register_signal_handler(signal, on_signal)
            .map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
    }
    Ok(())
}

/// What to poll for.
pub fn fd() -> Option<BorrowedFd<'static>> {
    WAKE.get().map(AsFd::as_fd)
}

/// Whether a signal came since the last call.
pub fn asked_to_end() -> bool {
    let mut count = [0; 8];
    WAKE.get().is_some_and(|wake| rustix::io::read(wake, &mut count).is_ok())
}
