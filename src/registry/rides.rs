//! Mappings of a pool's parts that need none of their own: they ride on a mapping of the pool, which shows
//! them already (spec "MAP and UNMAP"). Pure.
//!
//! It does not know how a VMM is asked: for these nobody is.

use super::{Attachment, Mapping, Registry, Shown, Vm, WindowRequest};
use crate::ids::{BufferKey, MappingId, SessionId};
use crate::limits::{GRANULE, MAX_COPY_MAPPINGS};
use crate::protocol::{Mode, Status};
use crate::window::Window;

/// Who asks, where, and for what.
type Judged<'a, H> = (&'a Vm<H>, &'a Window<Shown<H>>, &'a Attachment<H>);

impl<H: Clone> Registry<H> {
    /// Judges what holds for every MAP into the window. UNSUPP where the VM has none.
    pub(super) fn judge_window(
        &self,
        session: SessionId,
        request: &WindowRequest,
    ) -> Result<Judged<'_, H>, Status> {
        let vm = self.vm(session)?;
        let (_, window) = vm.window.as_ref().ok_or(Status::Unsupp)?;
        let held = vm.attachments.get(&request.handle).ok_or(Status::NoEnt)?;
        if held.revoked {
            return Err(Status::Revoked);
        }
        if !held.access.contains(request.access) {
            return Err(Status::Access);
        }
        let len = request.range.len;
        let end = request.offset.checked_add(len).ok_or(Status::Range)?;
        if !(request.offset | len).is_multiple_of(GRANULE) || end > held.size {
            return Err(Status::Range);
        }
        Ok((vm, window, held))
    }

    /// MAP of a part exactly where a mapping of its pool shows it. `None`: it is no such thing.
    pub fn ride(
        &mut self,
        session: SessionId,
        request: WindowRequest,
    ) -> Result<Option<MappingId>, Status> {
        let (vm, window, held) = self.judge_window(session, &request)?;
        let (id, pool) = (held.id, self.buffers.get(&held.key).and_then(|buffer| buffer.pool));
        let Some((pool, from)) = pool.filter(|_| held.mode == Mode::ZeroCopy) else {
            return Ok(None);
        };
        let Some(carrier) =
            carrier(vm, window, pool, from.saturating_add(request.offset), &request)
        else {
            return Ok(None);
        };
        if vm.mapped >= MAX_COPY_MAPPINGS {
            return Err(Status::Quota);
        }
        let vm = self.vm_mut(session)?;
        let mapping = MappingId(vm.next_mapping);
        vm.next_mapping += 1;
        vm.mapped += 1;
        vm.mappings.insert(mapping, request.handle);
        if let Some(held) = vm.attachments.get_mut(&request.handle).filter(|held| held.id == id) {
            let WindowRequest { offset, range, access, .. } = request;
            let (target, place, rides) = (None, None, Some(carrier));
            let len = range.len;
            held.mappings.push(Mapping { id: mapping, offset, len, access, target, place, rides });
        }
        Ok(Some(mapping))
    }
}

/// The mapping of the pool that shows `request`, which begins at byte `at` of the pool, where it says.
fn carrier<H>(
    vm: &Vm<H>,
    window: &Window<Shown<H>>,
    pool: BufferKey,
    at: u64,
    request: &WindowRequest,
) -> Option<MappingId> {
    let of_pool =
        |held: &&Attachment<H>| held.key == pool && !held.revoked && held.mode == Mode::ZeroCopy;
    let shows = |mapping: &&Mapping<H>| {
        let range = mapping.place.and_then(|place| window.shows(place));
        let into = at.checked_sub(mapping.offset);
        range.zip(into).is_some_and(|(range, into)| {
            let inside = into.saturating_add(request.range.len) <= range.len;
            inside && range.start.saturating_add(into) == request.range.start
        })
    };
    let mut all = vm.attachments.values().filter(of_pool).flat_map(|held| &held.mappings);
    all.find(shows).map(|mapping| mapping.id)
}
