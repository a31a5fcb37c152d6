//! What this process may do once it has started: no files but its own fdinfo, and the system calls of
//! its job.
//!
//! It knows the kernel's two filters, not what the daemon does; each allowed call is listed with its
//! reason. It must be entered before any thread is started, since threads inherit it.

use std::collections::BTreeMap;
use std::path::Path;

use landlock::{
    ABI, Access, AccessFs, PathBeneath, PathFd, Ruleset, RulesetAttr, RulesetCreatedAttr,
    RulesetStatus,
};
use log::{info, warn};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};

/// Why the sandbox could not be entered.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum Error {
    #[error("landlock refused the rules; --sandbox off runs without")]
    Rules(#[from] landlock::RulesetError),
    #[error("landlock cannot open /proc/self/fdinfo; mount /proc, or run with --sandbox off")]
    Path(#[from] landlock::PathFdError),
    #[error("seccomp has no such filter here; --sandbox off runs without")]
    Filter(#[from] seccompiler::BackendError),
    #[error("seccomp refused the filter; --sandbox off runs without")]
    Install(#[from] seccompiler::Error),
}

/// System calls of the daemon at work. Others answer EPERM.
const CALLS: &[libc::c_long] = &[
    // Rings, eventfds, sockets, private copies.
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_preadv2,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_close,
    libc::SYS_fcntl,
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_lseek,
    libc::SYS_ftruncate,
    libc::SYS_fallocate,
    libc::SYS_memfd_create,
    libc::SYS_eventfd2,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
    // udmabuf, names of dma-bufs.
    libc::SYS_ioctl,
    // /proc/self/fdinfo; landlock allows nothing else to be opened. The names of private copies.
    libc::SYS_openat,
    libc::SYS_readlink,
    libc::SYS_readlinkat,
    // Connections of VMMs and clients.
    libc::SYS_accept4,
    libc::SYS_accept,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_recvfrom,
    libc::SYS_sendto,
    libc::SYS_shutdown,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_getsockname,
    libc::SYS_socketpair,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_poll,
    libc::SYS_ppoll,
    // Memory: guests' regions and our own.
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_mprotect,
    libc::SYS_madvise,
    libc::SYS_brk,
    // Threads, one set a connection.
    libc::SYS_clone,
    libc::SYS_clone3,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_futex,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_sigaltstack,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_prctl,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_tgkill,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_restart_syscall,
    // Time and random numbers.
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_getrandom,
    // Who connects.
    libc::SYS_getuid,
    libc::SYS_geteuid,
];

/// Enters the sandbox. A kernel without landlock is told in the log.
pub fn enter() -> Result<(), Error> {
    let abi = ABI::V4;
    let fdinfo = PathBeneath::new(
        PathFd::new(Path::new("/proc/self/fdinfo"))?,
        AccessFs::ReadFile | AccessFs::ReadDir,
    );
    let status = Ruleset::default()
        .handle_access(AccessFs::from_all(abi))?
        .create()?
        .add_rule(fdinfo)?
        .restrict_self()?;
    match status.ruleset {
        RulesetStatus::NotEnforced => warn!("sandbox: this kernel has no landlock (Linux 5.13)"),
        _ => info!("sandbox: landlock and seccomp are on"),
    }
    let rules: BTreeMap<i64, Vec<seccompiler::SeccompRule>> =
        CALLS.iter().map(|call| (*call, Vec::new())).collect();
    let denied = SeccompAction::Errno(libc::EPERM.unsigned_abs());
    let filter = SeccompFilter::new(
        rules,
        denied,
        SeccompAction::Allow,
        std::env::consts::ARCH.try_into()?,
    )?;
    let program: BpfProgram = filter.try_into()?;
    seccompiler::apply_filter(&program)?;
    Ok(())
}
