//! One place of a window, the requests that it leads to, and what follows from their answers. Pure.
//!
//! It knows no other place.

use std::time::Duration;

use crate::ids::{FileId, PlaceId, WindowRange};

/// How far a place is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Waits for its turn.
    Asked,
    /// SHMEM_MAP is under way.
    Sent,
    /// The VMM said yes. In effect as soon as it is echoed; after this time another request tells.
    Acked(Duration),
    /// The other request is under way.
    Barred,
    /// The guest sees it.
    Mapped,
    /// SHMEM_UNMAP is under way.
    Leaving,
    /// The VMM did not unmap it.
    Stuck,
}

/// Whether the VMM echoes a place as memory of its guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Echo {
    /// Not yet.
    None,
    Now,
    /// It did: it unmapped the place by itself, or hides the window from its guest.
    Gone,
}

/// A range of the window and what it shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place<T> {
    /// Where.
    pub range: WindowRange,
    /// Of which file, for its echo.
    pub file: FileId,
    /// From which byte of it on.
    pub file_start: u64,
    /// The guest may write.
    pub writable: bool,
    /// What it shows.
    pub what: T,
    pub(super) step: Step,
    pub(super) wanted: bool,
    pub(super) echo: Echo,
    /// Whose MAP, and whose UNMAP, is answered when the VMM has answered.
    pub(super) map: Option<u64>,
    pub(super) unmap: Option<u64>,
}

/// What the VMM is to be asked.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Todo<T> {
    /// SHMEM_MAP.
    Map { place: PlaceId, range: WindowRange, file_start: u64, writable: bool, what: T },
    /// SHMEM_UNMAP.
    Unmap { place: PlaceId, range: WindowRange },
    /// A page at this free place, there and back: when the VMM has answered that, all before it is in
    /// effect.
    Barrier { place: PlaceId, range: WindowRange },
}

impl<T> Todo<T> {
    /// The place that it is for.
    pub fn place(&self) -> PlaceId {
        match self {
            Todo::Map { place, .. } | Todo::Unmap { place, .. } | Todo::Barrier { place, .. } => {
                *place
            }
        }
    }
}

/// What follows from an answer of the VMM.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Outcome<T> {
    /// Nothing that a guest waits for.
    Nothing,
    /// The guest sees it; whose MAP is to be answered.
    Shown { map: Option<u64>, what: T },
    /// Nobody sees it; whose MAP failed, and whose UNMAP is done.
    Gone { map: Option<u64>, unmap: Option<u64>, what: T },
    /// It stays, nobody knows for how long: whose requests failed.
    Stays { failed: Vec<u64> },
}

impl<T> Place<T> {
    /// A place that the VMM is to be asked for, by the MAP of this token.
    pub fn new(
        range: WindowRange,
        (file, file_start): (FileId, u64),
        writable: bool,
        map: u64,
        what: T,
    ) -> Place<T> {
        Place {
            range,
            file,
            file_start,
            writable,
            what,
            step: Step::Asked,
            wanted: true,
            echo: Echo::None,
            map: Some(map),
            unmap: None,
        }
    }

    /// A MAP waits for it.
    pub fn waits(&self) -> bool {
        self.map.is_some()
    }

    /// The guest sees it, and wants it.
    pub(super) fn is_shown(&self) -> bool {
        self.step == Step::Mapped && self.wanted
    }

    /// The VMM may show it.
    pub(super) fn is_out(&self) -> bool {
        self.step != Step::Asked
    }
}
