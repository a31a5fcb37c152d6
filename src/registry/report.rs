//! Who has what, for people: all buffers, who may use each, and who waits for whom
//! (`spec/host-socket.md`, INSPECT and HOLDERS). Pure.
//!
//! It knows rights, not who merely has a descriptor: that is seen elsewhere.

use std::collections::HashMap;
use std::ops::Bound;
use std::time::Duration;

use uuid::Uuid;

use super::timeline::Points;
use super::{BufferInfo, Holder, Registry, Vm};
use crate::ids::{Access, BufferKey, ClientId, HandleId, LeaseId, PeerId};
use crate::limits::LOOKED_AT;
use crate::protocol::{Line, State};

/// A buffer and how it is used.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Report {
    pub info: BufferInfo,
    /// As its exporter sees it.
    pub state: State,
    /// Since EXPORT.
    pub age: Duration,
    pub leases: usize,
    pub attachments: usize,
    /// Of the attachments.
    pub mappings: u32,
    /// Pending BEGINs and WAITs.
    pub waits: usize,
    /// Its exporter's session is over.
    pub owner_gone: bool,
}

/// Who has a right.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Who {
    Exporter(PeerId, HandleId),
    /// A host client as exporter.
    Lender(ClientId, HandleId),
    Lease(ClientId, LeaseId),
    Attachment(PeerId, HandleId),
}

/// A right to a buffer, and what its holder does with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HolderInfo {
    /// Whose.
    pub who: Who,
    /// The operator's name for the VM; empty with a lease.
    pub name: String,
    /// Since EXPORT, ACQUIRE or ATTACH.
    pub age: Duration,
    /// What it may do.
    pub access: Access,
    /// BEGIN without END.
    pub holds: Access,
    /// Pending BEGINs.
    pub waits: Access,
    /// Place of the first of them in the queue, from 1; 0: there is none.
    pub place: u32,
    /// Until that one times out.
    pub left: Duration,
    /// It waits for a fence of the host.
    pub fenced: bool,
    /// The next points of ACQUIRE and RELEASE that it waits for; 0: none.
    pub points: [u64; 2],
    /// Until the first of these waits times out.
    pub points_left: Duration,
    /// What its own RELEASE reached.
    pub released: u64,
    /// Of an attachment.
    pub mappings: usize,
    /// Dead, but not handed back.
    pub revoked: bool,
}

/// Answer to HOLDERS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holders<H> {
    /// The buffer.
    pub report: Report,
    /// What ACQUIRE reached.
    pub acquired: u64,
    /// Its memory, until it is given up.
    pub backing: Option<H>,
    /// As many as were asked for.
    pub some: Vec<HolderInfo>,
    /// How many there are.
    pub all: usize,
}

impl<H: Clone> Registry<H> {
    /// Attachments and mappings that importers have, dead ones that they keep included.
    pub fn import_count(&self) -> (usize, usize) {
        let of = |vm: &Vm<H>| (vm.attachments.len(), vm.mappings.len());
        self.vms.values().map(of).fold((0, 0), |sum, of| (sum.0 + of.0, sum.1 + of.1))
    }

    /// At most `max` reports of the buffers whose UUIDs follow `after`, in that order: of `all`, or of
    /// what the host may see. Also where to go on, as long as there may be more.
    pub fn report_page(
        &self,
        after: Uuid,
        max: usize,
        all: bool,
        now: Duration,
    ) -> (Vec<Report>, Option<Uuid>) {
        self.page(
            after,
            max,
            |key| {
                if all || self.host_sees(key) { self.report(key, now) } else { None }
            },
        )
    }

    /// At most `max` of what `look` makes of the buffers whose UUIDs follow `after`. Others wait for
    /// the registry meanwhile: not more than a few buffers are looked at.
    pub(super) fn page<T>(
        &self,
        after: Uuid,
        max: usize,
        look: impl Fn(BufferKey) -> Option<T>,
    ) -> (Vec<T>, Option<Uuid>) {
        let (mut found, mut last) = (Vec::new(), after);
        let later = self.by_uuid.range((Bound::Excluded(after), Bound::Unbounded));
        for (looked_at, (uuid, key)) in later.enumerate() {
            if found.len() >= max || looked_at >= LOOKED_AT {
                return (found, Some(last));
            }
            found.extend(look(*key));
            last = *uuid;
        }
        (found, None)
    }

    fn report(&self, key: BufferKey, now: Duration) -> Option<Report> {
        let buffer = self.buffers.get(&key)?;
        let state = self.state_of(key)?;
        let begins = buffer.sync.iter().flat_map(|sync| sync.waiters().chain(sync.fenced()));
        Some(Report {
            info: self.info_of(key, buffer, |_| false),
            state: state.state,
            age: now.saturating_sub(buffer.since),
            leases: buffer.leases.len(),
            attachments: buffer.attachments.len(),
            mappings: state.nr_mappings,
            waits: begins.count() + buffer.points.as_ref().map_or(0, |points| points.pending()),
            owner_gone: match buffer.session.client() {
                Some(client) => !self.exporters.contains_key(&client),
                None => self.vm(buffer.session).is_err(),
            },
        })
    }

    /// The exporter, leases and attachments of a buffer from index `first` on; who does not see `all`
    /// buffers sees no attachments of what a VM exported.
    pub fn holders(
        &self,
        uuid: Uuid,
        (first, max): (usize, usize),
        all: bool,
        now: Duration,
    ) -> Option<Holders<H>> {
        let key = *self.by_uuid.get(&uuid)?;
        let buffer = self.buffers.get(&key).filter(|_| all || self.host_sees(key))?;
        let report = self.report(key, now)?;
        let blank = HolderInfo {
            who: match buffer.session.client() {
                Some(client) => Who::Lender(client, buffer.handle),
                None => Who::Exporter(buffer.owner, buffer.handle),
            },
            name: report.info.exporter_name.clone(),
            age: report.age,
            access: buffer.what.access,
            holds: Access::NONE,
            waits: Access::NONE,
            place: 0,
            left: Duration::ZERO,
            fenced: false,
            points: [0; 2],
            points_left: Duration::ZERO,
            released: 0,
            mappings: 0,
            revoked: report.owner_gone,
        };
        let leases = buffer.leases.iter().map(|lease| {
            let info = HolderInfo {
                who: Who::Lease(lease.client, lease.id),
                name: String::new(),
                age: now.saturating_sub(lease.since),
                access: lease.access,
                revoked: lease.revoked,
                ..blank.clone()
            };
            (Holder::Lease(lease.id), info)
        });
        // What VMs share with each other is not for everybody; what the host lends is.
        let all = all || buffer.owner == PeerId::HOST;
        let attachments = buffer.attachments.iter().filter(|_| all).filter_map(|held| {
            let vm = self.vms.get(&held.importer)?;
            let attachment = vm.attachments.get(&held.handle)?;
            let info = HolderInfo {
                who: Who::Attachment(held.importer, held.handle),
                name: vm.name.clone(),
                age: now.saturating_sub(attachment.since),
                access: attachment.access,
                mappings: attachment.mappings.len(),
                revoked: false,
                ..blank.clone()
            };
            Some((Holder::Attachment(held.id), info))
        });
        let everybody = std::iter::once((Holder::Exporter, blank.clone()));
        let mut some: Vec<(Holder, HolderInfo)> =
            everybody.chain(leases).chain(attachments).skip(first).take(max).collect();
        if let Some(sync) = &buffer.sync {
            let mut waits: HashMap<Holder, (u32, Access, Duration)> = HashMap::new();
            for (place, waiter) in (1..).zip(sync.waiters()) {
                let left = waiter.deadline.saturating_sub(now);
                let wait = waits.entry(waiter.holder).or_insert((place, Access::NONE, left));
                wait.1 = wait.1.union(waiter.want);
            }
            for (holder, info) in &mut some {
                info.holds = sync.held_by(*holder);
                if let Some((place, want, left)) = waits.get(holder) {
                    (info.place, info.waits, info.left) = (*place, *want, *left);
                }
                for waiter in sync.fenced().filter(|waiter| waiter.holder == *holder) {
                    info.waits = info.waits.union(waiter.want);
                    info.left = info.left.max(waiter.deadline.saturating_sub(now));
                    info.fenced = true;
                }
            }
        }
        if let Some(points) = &buffer.points {
            let mut waits: HashMap<Holder, ([u64; 2], Duration)> = HashMap::new();
            for (waiter, line, point) in points.waits() {
                let left = waiter.deadline.saturating_sub(now);
                let wait = waits.entry(waiter.holder).or_insert(([0; 2], left));
                let next = match line {
                    Line::Acquire => &mut wait.0[0],
                    Line::Release => &mut wait.0[1],
                };
                *next = if *next == 0 { point } else { point.min(*next) };
                wait.1 = left.min(wait.1);
            }
            for (holder, info) in &mut some {
                info.released = points.reached(Line::Release, *holder);
                if let Some(wait) = waits.get(holder) {
                    (info.points, info.points_left) = *wait;
                }
            }
        }
        let acquired = |points: &Points| points.reached(Line::Acquire, Holder::Exporter);
        Some(Holders {
            acquired: buffer.points.as_deref().map_or(0, acquired),
            all: 1 + report.leases + if all { report.attachments } else { 0 },
            report,
            backing: buffer.backing.clone(),
            some: some.into_iter().map(|(_, info)| info).collect(),
        })
    }
}
