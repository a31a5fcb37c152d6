//! What the host socket needs of the hub: news, the clock, and each client's requests.
//!
//! It knows clients by number, not their sockets.

use std::time::Duration;

use uuid::Uuid;

use super::{HostNews, Hub, Memory, lock};
use crate::dmabuf::{Backing, FdKind, Unfit};
use crate::ids::{Access, ClientId, Cookie, HandleId, LeaseId};
use crate::protocol::{Mode, State, Status};
use crate::registry::{
    Acquired, Begun, BufferInfo, ClientTicket, Ended, ExportEvent, Exported, PointWait, Registry,
    Report, Signal, SyncRequest,
};
use crate::sync::Wake;

impl Hub {
    /// Readable when [`take_host_news`](Self::take_host_news) has something, or a deadline may have
    /// come nearer.
    pub fn host_wake(&self) -> &Wake {
        &self.host_wake
    }

    /// News since the last call.
    pub fn take_host_news(&self) -> HostNews {
        std::mem::take(&mut *lock(&self.news))
    }

    /// Does what is due, and says how long until something is due again. The host socket's thread is
    /// the daemon's only clock.
    pub fn tick(&self) -> Option<Duration> {
        self.with(Registry::tick);
        let next = self.read(Registry::next_deadline)?;
        Some(next.saturating_sub(self.now()))
    }

    /// At most `max` of the buffers that the host may see: those whose UUIDs follow `after`, in that
    /// order; fewer are the last ones.
    pub fn host_page(&self, after: Uuid, max: usize) -> Vec<BufferInfo> {
        self.page(after, max, |registry, after, max| registry.host_page(after, max))
    }

    /// The same as reports; of `all` buffers, or of those that the host may see.
    pub fn report_page(&self, after: Uuid, max: usize, all: bool) -> Vec<Report> {
        let now = self.now();
        self.page(after, max, |registry, after, max| registry.report_page(after, max, all, now))
    }

    /// Others get the registry between two looks.
    fn page<T>(
        &self,
        mut after: Uuid,
        max: usize,
        look: impl Fn(&Registry<Memory>, Uuid, usize) -> (Vec<T>, Option<Uuid>),
    ) -> Vec<T> {
        let mut page = Vec::new();
        loop {
            let (more, next) = self.read(|registry| look(registry, after, max - page.len()));
            page.extend(more);
            match next {
                Some(next) if page.len() < max => after = next,
                _ => return page,
            }
        }
    }

    /// One of them.
    pub fn host_info(&self, uuid: Uuid) -> Option<BufferInfo> {
        self.read(|registry| registry.host_info(uuid))
    }

    /// ACQUIRE; `notice`: RELEASE by force leaves the lease a little time.
    pub fn host_acquire(
        &self,
        client: ClientId,
        uuid: Uuid,
        access: Access,
        zero_copy: bool,
        notice: bool,
    ) -> Result<Acquired<Memory>, Status> {
        self.with(|registry, now| {
            let got = registry.acquire(client, uuid, access, zero_copy, now)?;
            if notice {
                registry.want_notice(client, got.lease);
            }
            Ok(got)
        })
    }

    /// RELEASE of a lease or an export: its state, and what still uses it.
    pub fn host_release(
        &self,
        client: ClientId,
        number: LeaseId,
        force: bool,
    ) -> Result<(State, u32), Status> {
        self.with(|registry, _| registry.release_of(client, number, force))
    }

    /// Enters the memory of an EXPORT that the registry judged, or gives up what it charged.
    pub fn finish_host_export(
        &self,
        ticket: ClientTicket,
        lent: Result<Backing, Unfit>,
    ) -> Result<(HandleId, Uuid), Status> {
        let uuid = Uuid::new_v4();
        let made = lent.or(Err(Status::Fault)).map(|backing| Exported {
            shows: backing.heirloom().is_some(),
            // Who refers to a dma-buf of the client's own tells nothing: the client does.
            observable: backing.kind() == FdKind::DmaBuf && !backing.is_mapped(),
            backing: backing.into(),
            mode: Mode::ZeroCopy,
            since: self.now(),
            uuid,
        });
        self.with(|registry, _| registry.finish_client_export(ticket, made))
    }

    /// What to tell a client of its exports next.
    pub fn take_export_event(&self, client: ClientId) -> Option<ExportEvent> {
        self.with(|registry, _| registry.take_export_event(client))
    }

    /// Wakes the host socket's thread.
    pub fn wake_host(&self) {
        self.host_wake.raise();
    }

    /// BEGIN of a lease or an export. Where it waits, [`HostNews::done`] tells the end under the request's cookie.
    pub fn host_begin(
        &self,
        client: ClientId,
        lease: LeaseId,
        sync: SyncRequest,
        full: bool,
    ) -> Result<Begun, Status> {
        self.with(|registry, now| registry.begin_lease(client, lease, sync, full, now))
    }

    /// END of a lease or an export.
    pub fn host_end(
        &self,
        client: ClientId,
        lease: LeaseId,
        sync: SyncRequest,
    ) -> Result<Ended<Memory>, Status> {
        self.with(|registry, _| registry.end_access(client, lease, sync))
    }

    /// POINT_SIGNAL of a lease. Returns the point.
    pub fn host_signal(
        &self,
        client: ClientId,
        lease: LeaseId,
        signal: Signal,
    ) -> Result<u64, Status> {
        self.with(|registry, _| registry.signal_lease(client, lease, signal))
    }

    /// POINT_WAIT of a lease; it may wait as BEGIN does.
    pub fn host_wait(
        &self,
        client: ClientId,
        lease: LeaseId,
        wait: PointWait,
        full: bool,
    ) -> Result<Begun, Status> {
        self.with(|registry, now| registry.wait_lease(client, lease, wait, full, now))
    }

    /// CANCEL of a client's BEGIN or WAIT.
    pub fn host_cancel(&self, client: ClientId, cookie: Cookie) -> Result<(), Status> {
        self.with(|registry, _| registry.cancel_client(client, cookie))
    }

    /// A client is gone.
    pub fn client_gone(&self, client: ClientId) {
        self.with(|registry, _| registry.client_gone(client));
    }
}
