//! Timelines of a buffer: numbers that only grow, and who waits for them (spec "POINT_SIGNAL and
//! POINT_WAIT"). Pure.
//!
//! It does not know what a point means, nor what SYNC does meanwhile.

use std::collections::HashMap;
use std::time::Duration;

use super::{Begun, Buffer, Holder, Origin, Phase, Registry, Waiter};
use crate::ids::{Access, BufferKey, ClientId, Cookie, HandleId, LeaseId, SessionId};
use crate::limits::MAX_WAIT;
use crate::protocol::{Line, Status};

/// POINT_SIGNAL.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Signal {
    pub line: Line,
    pub point: u64,
    /// OK, or what those get who wait for this point.
    pub status: Status,
}

/// POINT_WAIT.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct PointWait {
    pub line: Line,
    pub point: u64,
    /// At most [`MAX_WAIT`] counts.
    pub timeout: Duration,
    /// For CANCEL.
    pub cookie: Cookie,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Timeline {
    reached: u64,
    /// How that point was signalled.
    status: Status,
}

impl Timeline {
    const START: Timeline = Timeline { reached: 0, status: Status::Ok };

    /// What who waits for a point gets; `None` where it has to wait.
    fn answer(self, point: u64) -> Option<Status> {
        let status = if self.reached == point { self.status } else { Status::Ok };
        (self.reached >= point).then_some(status)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Pending {
    waiter: Waiter,
    line: Line,
    point: u64,
    /// What a holder signalled this point with.
    status: Status,
}

/// The timelines of one buffer that are not at their start, and who waits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Points {
    acquire: Timeline,
    release: HashMap<Holder, Timeline>,
    waits: Vec<Pending>,
}

impl Default for Points {
    fn default() -> Points {
        Points { acquire: Timeline::START, release: HashMap::new(), waits: Vec::new() }
    }
}

impl Points {
    fn of(&self, line: Line, holder: Holder) -> Timeline {
        match line {
            Line::Acquire => self.acquire,
            Line::Release => self.release.get(&holder).copied().unwrap_or(Timeline::START),
        }
    }

    /// What a timeline reached.
    pub fn reached(&self, line: Line, holder: Holder) -> u64 {
        self.of(line, holder).reached
    }

    /// Who waits for which point.
    pub fn waits(&self) -> impl Iterator<Item = (&Waiter, Line, u64)> {
        self.waits.iter().map(|wait| (&wait.waiter, wait.line, wait.point))
    }

    /// How many wait.
    pub fn pending(&self) -> usize {
        self.waits.len()
    }

    /// When time alone ends a wait next.
    pub fn next_due(&self) -> Option<Duration> {
        self.waits.iter().map(|wait| wait.waiter.deadline).min()
    }

    /// Takes out the waits that get a status.
    pub fn take_out(
        &mut self,
        status: impl Fn(&Waiter) -> Option<Status>,
    ) -> Vec<(Waiter, Status)> {
        let ends = |wait: &mut Pending| status(&wait.waiter).is_some();
        let ended = self.waits.extract_if(.., ends).map(|wait| wait.waiter);
        ended.filter_map(|waiter| Some((waiter, status(&waiter)?))).collect()
    }

    /// Forgets the timelines of holders that are gone.
    pub fn leave(&mut self, gone: impl Fn(Holder) -> bool) {
        self.release.retain(|holder, _| !gone(*holder));
    }
}

impl<H> Buffer<H> {
    /// What the timeline reached that a holder means.
    fn reached(&self, line: Line, holder: Holder) -> Timeline {
        let start = Points::default();
        let points = self.points.as_deref().unwrap_or(&start);
        if (line, holder) != (Line::Release, Holder::Exporter) {
            return points.of(line, holder);
        }
        let attached = self.attachments.iter().map(|held| Holder::Attachment(held.id));
        let leases = self.leases.iter().filter(|lease| !lease.revoked);
        let holders = attached.chain(leases.map(|lease| Holder::Lease(lease.id)));
        let lines = holders.map(|holder| points.of(Line::Release, holder));
        // Of those that are last, one that signalled an error.
        let last = lines.min_by_key(|line| (line.reached, line.status == Status::Ok));
        last.unwrap_or(Timeline { reached: u64::MAX, status: Status::Ok })
    }
}

impl<H: Clone> Registry<H> {
    /// POINT_SIGNAL of an export or attachment. Returns the point.
    pub fn signal_handle(
        &mut self,
        session: SessionId,
        handle: HandleId,
        signal: Signal,
    ) -> Result<u64, Status> {
        let (key, holder, allowed) = self.holder(session, handle)?;
        self.signal(key, holder, allowed, signal)
    }

    /// POINT_SIGNAL of a lease or a client's export.
    pub fn signal_lease(
        &mut self,
        client: ClientId,
        lease: LeaseId,
        signal: Signal,
    ) -> Result<u64, Status> {
        let (key, holder, allowed) = self.holder_of(client, lease)?;
        self.signal(key, holder, allowed, signal)
    }

    fn signal(
        &mut self,
        key: BufferKey,
        holder: Holder,
        allowed: Access,
        signal: Signal,
    ) -> Result<u64, Status> {
        let Signal { line, point, status } = signal;
        let buffer = self.buffers.get_mut(&key).ok_or(Status::NoEnt)?;
        match line {
            Line::Acquire if !allowed.write => return Err(Status::Access),
            Line::Release if holder == Holder::Exporter => return Err(Status::Inval),
            Line::Acquire | Line::Release => {}
        }
        if point <= buffer.reached(line, holder).reached {
            return Err(Status::Inval);
        }
        let points = buffer.points.get_or_insert_default();
        let now = Timeline { reached: point, status };
        match line {
            Line::Acquire => points.acquire = now,
            Line::Release => drop(points.release.insert(holder, now)),
        }
        let hears = |wait: &&mut Pending| {
            let owner = [holder, Holder::Exporter].contains(&wait.waiter.holder);
            (wait.line, wait.point) == (line, point) && (line == Line::Acquire || owner)
        };
        for wait in points.waits.iter_mut().filter(hears) {
            if wait.status == Status::Ok {
                wait.status = status;
            }
        }
        self.serve_points(key);
        Ok(point)
    }

    /// POINT_WAIT of an export or attachment, under the same bounds as BEGIN. What is reached.
    pub fn wait_handle(
        &mut self,
        session: SessionId,
        handle: HandleId,
        wait: PointWait,
        (token, ring_room): (u64, u32),
        now: Duration,
    ) -> Result<Begun, Status> {
        let (key, holder, _) = self.holder(session, handle)?;
        let vm = self.vm(session)?;
        let full = vm.waits >= vm.quota.max_waits.min(ring_room);
        self.wait_point(key, holder, wait, full, Origin::Vm(session.peer, token), now)
    }

    /// POINT_WAIT of a lease or a client's export.
    pub fn wait_lease(
        &mut self,
        client: ClientId,
        lease: LeaseId,
        wait: PointWait,
        full: bool,
        now: Duration,
    ) -> Result<Begun, Status> {
        let (key, holder, _) = self.holder_of(client, lease)?;
        let origin = Origin::Client(client, wait.cookie);
        self.wait_point(key, holder, wait, full, origin, now)
    }

    fn wait_point(
        &mut self,
        key: BufferKey,
        holder: Holder,
        wait: PointWait,
        full: bool,
        origin: Origin,
        now: Duration,
    ) -> Result<Begun, Status> {
        let PointWait { line, point, timeout, cookie } = wait;
        let buffer = self.buffers.get_mut(&key).ok_or(Status::NoEnt)?;
        if holder == Holder::Exporter && buffer.phase != Phase::Live {
            return Err(Status::Canceled);
        }
        let timeline = buffer.reached(line, holder);
        match timeline.answer(point) {
            Some(Status::Ok) => return Ok(Begun::Now(timeline.reached)),
            Some(status) => return Err(status),
            None if full => return Err(Status::Busy),
            None => {}
        }
        let (want, unless) = (Access::NONE, None);
        let deadline = now + timeout.min(MAX_WAIT);
        let waiter = Waiter { holder, want, deadline, unless, cookie, origin };
        let pending = Pending { waiter, line, point, status: Status::Ok };
        buffer.points.get_or_insert_default().waits.push(pending);
        self.count_wait(origin);
        self.reschedule(key);
        Ok(Begun::Waits)
    }

    /// Ends the waits whose points are reached.
    pub(super) fn serve_points(&mut self, key: BufferKey) {
        let Some(buffer) = self.buffers.get_mut(&key) else { return };
        let waits = buffer.points.as_mut().map(|points| std::mem::take(&mut points.waits));
        let Some(waits) = waits.filter(|waits| !waits.is_empty()) else { return };
        let (mut kept, mut ended) = (Vec::new(), Vec::new());
        for wait in waits {
            let timeline = buffer.reached(wait.line, wait.waiter.holder);
            match timeline.answer(wait.point) {
                Some(Status::Ok) => ended.push((wait.waiter, wait.status, timeline.reached)),
                Some(status) => ended.push((wait.waiter, status, timeline.reached)),
                None => kept.push(wait),
            }
        }
        if let Some(points) = &mut buffer.points {
            points.waits = kept;
        }
        for (waiter, status, reached) in ended {
            self.tell_end(waiter, status, reached);
        }
        self.reschedule(key);
    }
}
