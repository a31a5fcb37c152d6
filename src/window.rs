//! The window of one VM: which ranges of it are taken, and what its VMM is to be asked next. Pure.
//!
//! It knows ranges and the steps of a mapping, not buffers, descriptors or sockets; `T` is what a place
//! shows. With the connection to the VMM a window is gone.
//!
//! | step | SHMEM_MAP | the place belongs to |
//! |---|---|---|
//! | Asked | not sent | the guest alone |
//! | Sent | sent, not answered | the VMM, too |
//! | Acked | answered; the mapping may not have taken effect | " |
//! | Barred | answered; another request tells when it has | " |
//! | Mapped | in effect | " |
//! | Leaving | SHMEM_UNMAP sent, not answered | " |
//! | Stuck | SHMEM_UNMAP failed: nobody knows | the VMM until it goes away |
//!
//! A place that is not `wanted` any more (UNMAP, a revoke, a reset) is unmapped as soon as the VMM may be
//! asked. Another one may be asked for there before that, and waits for it.
#![deny(clippy::arithmetic_side_effects)]

mod place;

use std::collections::BTreeMap;
use std::time::Duration;

use crate::ids::{FileId, PlaceId, WindowRange};
use crate::limits::{ECHO_WAIT, GRANULE, VMM_REGIONS};
use crate::protocol::Status;
use place::Echo;
pub use place::{Outcome, Place, Step, Todo};

/// How mappings become known to be in effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Echoes {
    /// Nothing is known of this VMM.
    Unknown,
    /// It echoes mappings as memory of the guest.
    Yes,
    /// A mapping was not echoed in time, and none ever was.
    No,
}

/// The window of one connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Window<T> {
    size: u64,
    /// Regions of the guest's memory that are no echoes of this window.
    regions: usize,
    echoes: Echoes,
    broken: bool,
    places: BTreeMap<PlaceId, Place<T>>,
}

impl<T> Window<T> {
    /// All places, in the order in which they were asked for.
    pub fn places(&self) -> impl Iterator<Item = (PlaceId, &Place<T>)> {
        self.places.iter().map(|(id, place)| (*id, place))
    }

    /// Where a place is that the guest sees and wants.
    pub fn shows(&self, id: PlaceId) -> Option<WindowRange> {
        let place = self.places.get(&id).filter(|place| place.is_shown());
        place.map(|place| place.range)
    }
}

impl<T: Clone> Window<T> {
    /// A window of so many bytes in which nothing is mapped, of a guest with so many regions of memory.
    pub fn new(size: u64, regions: usize) -> Window<T> {
        let (echoes, broken) = (Echoes::Unknown, false);
        Window { size, regions, echoes, broken, places: BTreeMap::new() }
    }

    /// Mappings that the VMM can hold besides the guest's memory.
    pub fn max(&self) -> u32 {
        let free = VMM_REGIONS.saturating_sub(self.regions);
        if self.broken { 0 } else { u32::try_from(free).unwrap_or(0) }
    }

    /// Judges a new place. RANGE outside of the window or over another one; QUOTA above
    /// [`max`](Self::max); IO where the VMM did not unmap what is there.
    pub fn check(&self, range: WindowRange) -> Result<(), Status> {
        let aligned = (range.start | range.len).is_multiple_of(GRANULE);
        let end = range.start.checked_add(range.len);
        let inside = end.is_some_and(|end| end <= self.size) && range.len > 0;
        let mut living = self.places.values().filter(|place| place.wanted);
        if !aligned || !inside || living.any(|place| place.range.overlaps(range)) {
            return Err(Status::Range);
        }
        let stuck = |place: &Place<T>| place.step == Step::Stuck && place.range.overlaps(range);
        if self.living() >= self.max() {
            return Err(Status::Quota);
        }
        if self.places.values().any(stuck) { Err(Status::Io) } else { Ok(()) }
    }

    fn living(&self) -> u32 {
        let living = self.places.values().filter(|place| place.wanted).count();
        u32::try_from(living).unwrap_or(u32::MAX)
    }

    /// Asks for a place that [`check`](Self::check) accepted.
    pub fn ask(&mut self, id: PlaceId, place: Place<T>) {
        self.places.insert(id, place);
    }

    /// UNMAP of the guest. `Ok(false)`: nothing is there any more. BUSY while another UNMAP of the place
    /// waits; IO where the VMM did not unmap it.
    pub fn unmap(&mut self, id: PlaceId, token: u64) -> Result<bool, Status> {
        let broken = self.broken;
        let Some(place) = self.places.get_mut(&id) else { return Ok(false) };
        match place.step {
            _ if place.unmap.is_some() => Err(Status::Busy),
            Step::Stuck => Err(Status::Io),
            _ if broken => Err(Status::Io),
            _ => {
                place.wanted = false;
                place.unmap = Some(token);
                Ok(true)
            }
        }
    }

    /// The place is to go away, whoever wants it. Whose MAP is thereby over; what it showed, where the
    /// VMM never heard of it.
    pub fn kill(&mut self, id: PlaceId) -> (Option<u64>, Option<T>) {
        let Some(place) = self.places.get_mut(&id) else { return (None, None) };
        place.wanted = false;
        let map = place.map.take();
        match place.step {
            Step::Asked => (map, self.places.remove(&id).map(|place| place.what)),
            Step::Acked(_) => {
                place.step = Step::Mapped;
                (map, None)
            }
            _ => (map, None),
        }
    }

    /// What the VMM is to be asked next, which counts as sent; `None` where nothing is to be done now.
    /// What is to go away goes first.
    pub fn next(&mut self, now: Duration) -> Option<Todo<T>> {
        if self.broken {
            return None;
        }
        let leaves = |place: &Place<T>| place.step == Step::Mapped && !place.wanted;
        if let Some((id, place)) = self.places.iter_mut().find(|(_, place)| leaves(place)) {
            place.step = Step::Leaving;
            return Some(Todo::Unmap { place: *id, range: place.range });
        }
        let late = |place: &Place<T>| matches!(place.step, Step::Acked(until) if until <= now);
        if let Some(id) = self.places.iter().find(|(_, place)| late(place)).map(|(id, _)| *id) {
            let range = self.scratch();
            let place = self.places.get_mut(&id)?;
            // One barrier is enough, and where there is no room for it the answer itself is.
            place.step = Step::Barred;
            return Some(Todo::Barrier { place: id, range });
        }
        let out = self.places.values().filter(|place| place.is_out()).count();
        if out >= usize::try_from(self.max()).unwrap_or(usize::MAX) {
            return None;
        }
        let free = |place: &Place<T>| {
            let mut others = self.places.values().filter(|other| other.is_out());
            !others.any(|other| other.range.overlaps(place.range))
        };
        let ready = |place: &Place<T>| place.step == Step::Asked && free(place);
        let id = self.places.iter().find(|(_, place)| ready(place)).map(|(id, _)| *id)?;
        let place = self.places.get_mut(&id)?;
        place.step = Step::Sent;
        Some(Todo::Map {
            place: id,
            range: place.range,
            file_start: place.file_start,
            writable: place.writable,
            what: place.what.clone(),
        })
    }

    /// A page of the window that nobody asked for; an empty range where there is none, or where the VMM
    /// echoes and holds as much as it can.
    fn scratch(&self) -> WindowRange {
        let none = WindowRange { start: 0, len: 0 };
        let out = self.places.values().filter(|place| place.is_out()).count();
        if self.echoes == Echoes::Yes && out >= usize::try_from(self.max()).unwrap_or(usize::MAX) {
            return none;
        }
        let mut at = self.size;
        while let Some(start) = at.checked_sub(GRANULE) {
            let page = WindowRange { start, len: GRANULE };
            let taken = self.places.values().find(|place| place.range.overlaps(page));
            match taken {
                None => return page,
                Some(place) => at = place.range.start,
            }
        }
        none
    }

    /// When [`next`](Self::next) has something to do by time alone.
    pub fn deadline(&self) -> Option<Duration> {
        let until = |place: &Place<T>| match place.step {
            Step::Acked(until) => Some(until),
            _ => None,
        };
        self.places.values().filter_map(until).min()
    }

    /// The VMM was not asked after all.
    pub fn not_asked(&mut self, id: PlaceId) -> Outcome<T> {
        let Some(place) = self.places.get_mut(&id) else { return Outcome::Nothing };
        place.step = match place.step {
            Step::Leaving => Step::Mapped,
            Step::Barred => Step::Acked(Duration::ZERO),
            Step::Sent if place.wanted => Step::Asked,
            Step::Sent => return self.gone(id),
            step => step,
        };
        Outcome::Nothing
    }

    /// The VMM answered SHMEM_MAP.
    pub fn mapped(&mut self, id: PlaceId, done: bool, now: Duration) -> Outcome<T> {
        let Some(place) = self.places.get_mut(&id) else { return Outcome::Nothing };
        if !done {
            return self.gone(id);
        }
        if place.echo == Echo::Now || !place.wanted {
            return self.shown(id);
        }
        let wait = if self.echoes == Echoes::No { Duration::ZERO } else { ECHO_WAIT };
        place.step = Step::Acked(now.saturating_add(wait));
        Outcome::Nothing
    }

    /// The barrier was answered: the mapping is in effect, though it was not echoed.
    pub fn settled(&mut self, id: PlaceId) -> Outcome<T> {
        if self.echoes == Echoes::Unknown {
            self.echoes = Echoes::No;
        }
        self.shown(id)
    }

    fn shown(&mut self, id: PlaceId) -> Outcome<T> {
        let Some(place) = self.places.get_mut(&id) else { return Outcome::Nothing };
        place.step = Step::Mapped;
        Outcome::Shown { map: place.map.take(), what: place.what.clone() }
    }

    fn gone(&mut self, id: PlaceId) -> Outcome<T> {
        let Some(Place { map, unmap, what, .. }) = self.places.remove(&id) else {
            return Outcome::Nothing;
        };
        Outcome::Gone { map, unmap, what }
    }

    /// The VMM answered SHMEM_UNMAP. QEMU refuses what it unmapped by itself when its guest was reset.
    pub fn unmapped(&mut self, id: PlaceId, done: bool) -> Vec<Outcome<T>> {
        let left = self.places.get(&id).is_some_and(|place| place.echo == Echo::Gone);
        if done || left { vec![self.gone(id)] } else { self.stays(id) }
    }

    /// Those who waited for the place are turned away.
    fn stays(&mut self, id: PlaceId) -> Vec<Outcome<T>> {
        let Some(place) = self.places.get_mut(&id) else { return Vec::new() };
        (place.step, place.wanted) = (Step::Stuck, false);
        let failed = place.map.take().into_iter().chain(place.unmap.take()).collect();
        let range = place.range;
        let waits = |place: &Place<T>| !place.is_out() && place.range.overlaps(range);
        let behind: Vec<PlaceId> =
            self.places.iter().filter(|(_, place)| waits(place)).map(|(id, _)| *id).collect();
        let gone = behind.into_iter().map(|id| self.gone(id)).collect::<Vec<_>>();
        std::iter::once(Outcome::Stays { failed }).chain(gone).collect()
    }

    /// Whether it [failed](Self::fail).
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    /// The VMM does not answer any more: nothing can be asked, and what it shows stays.
    pub fn fail(&mut self) -> Vec<Outcome<T>> {
        self.broken = true;
        let unsettled = |place: &Place<T>| place.step != Step::Mapped || !place.wanted;
        let ids: Vec<PlaceId> =
            self.places.iter().filter(|(_, place)| unsettled(place)).map(|(id, _)| *id).collect();
        let end = |id| match self.places.get(&id) {
            Some(place) if place.is_out() => self.stays(id),
            _ => vec![self.gone(id)],
        };
        ids.into_iter().flat_map(end).collect()
    }

    /// The VMM shared another table of so many regions: which files they show, from which byte on, and
    /// how many bytes. Returns what is thereby known to be in effect, and whether [`max`](Self::max)
    /// changed.
    pub fn memory(&mut self, regions: &[(FileId, u64, u64)]) -> (Vec<Outcome<T>>, bool) {
        let before = self.max();
        let mut left = regions.to_vec();
        let mut take = |place: &Place<T>| {
            let echo = (place.file, place.file_start, place.range.len);
            left.iter().position(|region| *region == echo).map(|at| left.swap_remove(at)).is_some()
        };
        // Two places may show the same pages: those that were echoed before keep their echo.
        let mut ids: Vec<(bool, PlaceId)> = self
            .places
            .iter()
            .filter(|(_, place)| place.is_out())
            .map(|(id, place)| (place.echo != Echo::Now, *id))
            .collect();
        ids.sort_unstable();
        let mut out = Vec::new();
        for (_, id) in ids {
            let Some(place) = self.places.get_mut(&id) else { continue };
            place.echo = match (take(place), place.echo) {
                (true, _) => Echo::Now,
                (false, Echo::None) => Echo::None,
                (false, _) => Echo::Gone,
            };
            if place.echo == Echo::Now {
                self.echoes = Echoes::Yes;
                if matches!(place.step, Step::Acked(_)) {
                    out.push(self.shown(id));
                }
            }
        }
        self.regions = left.len();
        (out, self.max() != before)
    }
}

#[cfg(test)]
mod tests;
