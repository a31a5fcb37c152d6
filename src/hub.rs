//! Where VMs and the host meet: the registry behind its lock, and everybody's wake-up.
//!
//! This is the file to audit for isolation. It knows who must be told, not what is said: bytes are
//! made by `reply` and `host`. The lock is never held across IO; descriptors close, and references
//! are counted, with the lock released. When a VM or client disconnects, what it leaves is settled by
//! the registry and told to the others from here.

mod copies;
mod fences;
mod heritage;
mod host;
mod windows;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use uuid::Uuid;

use crate::dmabuf::{Backing, DmaBufs};
use crate::ids::{BufferKey, ClientId, Cookie, PeerId, SessionId};
use crate::limits::Quota;
use crate::metrics::Metrics;
use crate::policy::Policy;
use crate::protocol::Status;
use crate::registry::{Audit, Done, Notice, Origin, Outbox, Registry};
use crate::sync::{Instant, Mutex, MutexGuard, Wake};
use crate::throttle::Throttle;
use crate::throttled;

/// Memory behind a buffer, shared between the registry and whoever uses it right now.
pub type Memory = Arc<Backing>;

/// A VM that the operator configured.
#[derive(Debug, Clone)]
pub struct VmSpec {
    /// The operator's name for it.
    pub name: String,
    /// Its quotas.
    pub quota: Quota,
}

/// News for the host socket, since it asked last.
#[derive(Debug, Default)]
pub struct HostNews {
    /// BEGINs that ended.
    pub done: Vec<(ClientId, Cookie, Status, u64)>,
    /// What happened to buffers.
    pub notices: Vec<Notice>,
    /// Clients with news of their exports.
    pub exporters: BTreeSet<ClientId>,
    /// Where the one notice is that a VM caused of this buffer.
    at: HashMap<Uuid, usize>,
}

impl HostNews {
    /// Takes in a notice. VMs cause them faster than the host socket's thread can take them: since
    /// they say what to look at, the last one of a buffer is enough.
    fn add(&mut self, notice: Notice) {
        let uuid = match notice {
            Notice::Offered(uuid) | Notice::Withdrawn(uuid) => uuid,
            Notice::Changed { uuid, writer: None, .. } => uuid,
            Notice::Changed { .. } | Notice::Revoked { .. } => return self.notices.push(notice),
        };
        match self.at.get(&uuid).and_then(|at| self.notices.get_mut(*at)) {
            // Who is told of an offer looks at the generation as well.
            Some(Notice::Offered(_) | Notice::Withdrawn(_))
                if matches!(notice, Notice::Changed { .. }) => {}
            Some(before) => *before = notice,
            None => {
                self.at.insert(uuid, self.notices.len());
                self.notices.push(notice);
            }
        }
    }
}

/// What one VM's worker waits for.
#[derive(Debug)]
struct Port {
    name: String,
    wake: Wake,
    audit: Throttle,
    done: Mutex<Vec<Done>>,
    channel: windows::Channel,
}

/// The daemon's shared state.
#[derive(Debug)]
pub struct Hub {
    registry: Mutex<Registry<Memory>>,
    ports: BTreeMap<PeerId, Port>,
    news: Mutex<HostNews>,
    host_wake: Wake,
    fences: fences::Watched,
    start: Instant,
    /// The registry's clock at that time: a predecessor's goes on.
    clock: Duration,
    /// Makes memory for exports.
    pub dmabufs: DmaBufs,
    /// Who may share with whom.
    pub policy: Policy,
    /// Counters.
    pub metrics: Metrics,
    throttle: Throttle,
}

/// Locks a mutex.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing panics while it holds a lock; if it did, the state is still the last consistent one.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Hub {
    /// A hub for these VMs, numbered from 2 in their order.
    pub fn new(vms: &[VmSpec], policy: Policy, dmabufs: DmaBufs) -> io::Result<Hub> {
        // An epoch that differs from that of the daemon before us, most likely.
        let [a, b, c, d, ..] = *Uuid::new_v4().as_bytes();
        let epoch = u32::from_le_bytes([a, b, c, d]);
        let peers = (PeerId::FIRST_VM.0..).map(PeerId);
        let entries =
            peers.clone().zip(vms).map(|(peer, vm)| (peer, vm.name.clone(), vm.quota, epoch));
        let registry = Registry::new(policy.clone(), entries);
        let mut ports = BTreeMap::new();
        for (peer, vm) in peers.zip(vms) {
            let (name, wake) = (vm.name.clone(), Wake::new()?);
            let (audit, done, channel) = Default::default();
            let port = Port { name, wake, audit, done, channel };
            ports.insert(peer, port);
        }
        Ok(Hub {
            registry: Mutex::new(registry),
            ports,
            news: Mutex::default(),
            host_wake: Wake::new()?,
            fences: fences::Watched::new()?,
            start: Instant::now(),
            clock: Duration::ZERO,
            dmabufs,
            policy,
            metrics: Metrics::default(),
            throttle: Throttle::new(),
        })
    }

    /// Time since the start of the daemon, or of its first predecessor: the registry's clock.
    pub fn now(&self) -> Duration {
        self.clock + self.start.elapsed()
    }

    /// Runs one operation on the registry, then everything that follows from it.
    pub fn with<T>(&self, operation: impl FnOnce(&mut Registry<Memory>, Duration) -> T) -> T {
        let (result, outbox) = {
            let mut registry = lock(&self.registry);
            let result = operation(&mut registry, self.now());
            (result, registry.take_outbox())
        };
        self.dispatch(outbox);
        result
    }

    /// Reads the registry.
    pub fn read<T>(&self, operation: impl FnOnce(&Registry<Memory>) -> T) -> T {
        operation(&lock(&self.registry))
    }

    fn dispatch(&self, mut outbox: Outbox<Memory>) {
        let mut wake_host = false;
        loop {
            wake_host |= self.deliver(&mut outbox);
            drop(std::mem::take(&mut outbox.drop));
            if outbox.observe.is_empty() && outbox.fences.is_empty() {
                break;
            }
            let over = self.look_at_fences(std::mem::take(&mut outbox.fences));
            let mut found = Vec::new();
            for key in std::mem::take(&mut outbox.observe) {
                let Some((look, memory)) = self.read(|registry| registry.look(key)) else {
                    continue;
                };
                found.push((look, self.held_elsewhere(&memory)));
            }
            let mut registry = lock(&self.registry);
            for (look, held) in found {
                registry.observed(look, held, self.now());
            }
            over.into_iter().for_each(|(wait, status)| registry.fence_over(wait, status));
            outbox = registry.take_outbox();
        }
        if wake_host {
            self.host_wake.raise();
        }
    }

    fn held_elsewhere(&self, memory: &Backing) -> bool {
        self.metrics.observations.add(1);
        let (echoes, _kept) = self.echoes_of(memory);
        self.dmabufs.held_elsewhere(memory, echoes).unwrap_or_else(|error| {
            let what = "references to a dma-buf cannot be counted, so it counts as held";
            throttled!(self.throttle, Warn, "{what}: {error}");
            true
        })
    }

    /// Counts the foreign references of a buffer now.
    pub fn observe(&self, key: BufferKey) {
        let Some((look, memory)) = self.read(|registry| registry.look(key)) else { return };
        let held = self.held_elsewhere(&memory);
        drop(memory);
        self.with(|registry, now| registry.observed(look, held, now));
    }

    /// Bytes of one export at most: what the host's kernel and the VM's quota allow.
    pub fn max_buffer_size(&self, session: SessionId) -> u64 {
        let quota = self.read(|registry| registry.quota(session.peer));
        self.dmabufs.max_size().min(quota.max_total_size)
    }

    /// Tells VMs and clients. Returns whether the host socket's thread has something to do.
    fn deliver(&self, outbox: &mut Outbox<Memory>) -> bool {
        let mut wake_host = std::mem::take(&mut outbox.clock);
        for audit in std::mem::take(&mut outbox.audit) {
            self.log(audit);
        }
        for settled in std::mem::take(&mut outbox.settled) {
            if let Some(port) = self.ports.get(&settled.peer) {
                lock(&port.channel.settled).push(settled);
            }
        }
        for peer in std::mem::take(&mut outbox.vmm) {
            self.ring(peer);
        }
        for done in std::mem::take(&mut outbox.done) {
            match done.origin {
                Origin::Vm(peer, _) => {
                    self.fences.forget(done.origin);
                    if let Some(port) = self.ports.get(&peer) {
                        lock(&port.done).push(done);
                        outbox.wake.insert(peer);
                    }
                }
                Origin::Client(client, cookie) => {
                    lock(&self.news).done.push((client, cookie, done.status, done.value));
                    wake_host = true;
                }
            }
        }
        if !outbox.notices.is_empty() || !outbox.exporters.is_empty() {
            let mut news = lock(&self.news);
            news.exporters.append(&mut outbox.exporters);
            std::mem::take(&mut outbox.notices).into_iter().for_each(|notice| news.add(notice));
            wake_host = true;
        }
        for peer in std::mem::take(&mut outbox.wake) {
            if let Some(port) = self.ports.get(&peer) {
                port.wake.raise();
            }
        }
        wake_host
    }

    /// One line for each decision about rights; a VM that causes many does not hide those of others.
    fn log(&self, audit: Audit) {
        let name = |peer| self.ports.get(&peer).map_or("?", |port| port.name.as_str());
        let (actor, text) = crate::audit::line(audit, name);
        let throttle = self.ports.get(&actor).map_or(&self.throttle, |port| &port.audit);
        throttled!(throttle, Info, "audit: {text}");
    }

    /// Readable when the VM's worker has an event to deliver or a wait that ended.
    pub fn vm_wake(&self, peer: PeerId) -> Option<&Wake> {
        self.ports.get(&peer).map(|port| &port.wake)
    }

    /// Wakes the VM's worker.
    pub fn wake_vm(&self, peer: PeerId) {
        if let Some(port) = self.ports.get(&peer) {
            port.wake.raise();
        }
    }

    /// The VM's waits that ended since the last call.
    pub fn take_done(&self, peer: PeerId) -> Vec<Done> {
        self.ports.get(&peer).map(|port| std::mem::take(&mut *lock(&port.done))).unwrap_or_default()
    }

    /// Starts a session of a VM.
    pub fn open_session(&self, peer: PeerId, connected: bool) -> Option<SessionId> {
        self.metrics.sessions.add(1);
        self.with(|registry, _| registry.open_session(peer, connected))
    }

    /// Ends a session.
    pub fn close_session(&self, session: SessionId) {
        self.with(|registry, _| registry.close_session(session));
    }

    /// Every counter and level with its name.
    pub fn stats(&self) -> Vec<(String, u64)> {
        let mut list = self.metrics.list();
        self.read(|registry| {
            list.push(("buffers".to_owned(), registry.buffer_count() as u64));
            list.push(("bytes_exported".to_owned(), registry.bytes_charged()));
            list.push(("leases".to_owned(), registry.lease_count() as u64));
            let (attachments, mappings) = registry.import_count();
            list.push(("attachments".to_owned(), attachments as u64));
            list.push(("mappings".to_owned(), mappings as u64));
        });
        list
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn news_of_a_buffer_does_not_pile_up() {
        let (uuid, client) = (Uuid::from_u128(1), ClientId(1));
        let changed = |generation, writer| Notice::Changed { uuid, generation, writer };
        let mut news = HostNews::default();
        for generation in 1..1000 {
            news.add(changed(generation, None));
        }
        assert_eq!(news.notices, [changed(999, None)]);
        for generation in 1000..2000 {
            news.add(Notice::Withdrawn(uuid));
            news.add(Notice::Offered(uuid));
            news.add(changed(generation, None));
        }
        news.add(changed(2000, Some(client)));
        assert_eq!(news.notices, [Notice::Offered(uuid), changed(2000, Some(client))]);
    }
}
