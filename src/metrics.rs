//! Counters that `bufsharectl stats` shows. They only rise.
//!
//! They know nothing of what they count; levels (live buffers, bytes, leases) are the registry's.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::host::wire::Type;
use crate::protocol::{Opcode, Status};

/// One counter.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Counts `n` more.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// The count.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// All counters of a daemon.
#[derive(Debug, Default)]
pub struct Metrics {
    /// Requests answered, refusals included.
    pub requests: Counter,
    /// Chains returned with used length 0 because they held no request.
    pub malformed_chains: Counter,
    /// Events delivered.
    pub events: Counter,
    /// Bytes copied between guests' pages and private copies. 0 as long as all is ZERO_COPY.
    pub bytes_copied: Counter,
    /// Looks at a dma-buf's references.
    pub observations: Counter,
    /// BEGINs that waited for fences of the host.
    pub fence_waits: Counter,
    /// Sessions of VMs.
    pub sessions: Counter,
    /// SHMEM_MAP and SHMEM_UNMAP that VMMs were asked, those that failed, and the time until their
    /// answers, in microseconds.
    pub vmm_requests: Counter,
    /// See there.
    pub vmm_failures: Counter,
    /// See there.
    pub vmm_us: Counter,
    /// Responses by status.
    by_status: [Counter; Status::ALL.len()],
    /// By who asked (a VM or the host), for what, and why not.
    refusals: Mutex<BTreeMap<(&'static str, &'static str, &'static str), u64>>,
}

impl Metrics {
    /// Counts a response to a VM.
    pub fn answered(&self, opcode: Option<Opcode>, status: Status) {
        self.refused("refused", opcode.map(Opcode::name), status);
        self.requests.add(1);
        if let Some(counter) = self.by_status.get(usize::from(status.to_wire())) {
            counter.add(1);
        }
    }

    /// Counts a response to a client on the host.
    pub fn answered_host(&self, kind: Option<Type>, status: Status) {
        self.refused("host_refused", kind.map(Type::name), status);
    }

    fn refused(&self, who: &'static str, what: Option<&'static str>, status: Status) {
        if status != Status::Ok {
            let mut refusals = self.refusals.lock().unwrap_or_else(PoisonError::into_inner);
            *refusals.entry((who, what.unwrap_or("other"), status.name())).or_default() += 1;
        }
    }

    /// Every counter with its name.
    pub fn list(&self) -> Vec<(String, u64)> {
        let fixed = [
            ("requests", &self.requests),
            ("malformed_chains", &self.malformed_chains),
            ("events", &self.events),
            ("bytes_copied", &self.bytes_copied),
            ("observations", &self.observations),
            ("fence_waits", &self.fence_waits),
            ("sessions", &self.sessions),
            ("vmm_requests", &self.vmm_requests),
            ("vmm_failures", &self.vmm_failures),
            ("vmm_us", &self.vmm_us),
        ];
        let fixed = fixed.into_iter().map(|(name, counter)| (name.to_owned(), counter.get()));
        let answers = Status::ALL.iter().zip(&self.by_status);
        let answers = answers.map(|(status, counter)| {
            (format!("answers_{}", status.name().to_lowercase()), counter.get())
        });
        let refusals = self.refusals.lock().unwrap_or_else(PoisonError::into_inner);
        let refusals = refusals.iter().map(|((who, what, why), count)| {
            (format!("{who}_{what}_{why}").to_lowercase(), *count)
        });
        fixed.chain(answers).chain(refusals).collect()
    }
}
