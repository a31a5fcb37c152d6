//! What a VM has to be told of, oldest first; each topic waits once. Pure.
//!
//! It knows the order, not what there is to tell. A topic that lost its reason leaves from the middle:
//! a VM that takes no events may have one for each buffer of all others.

use std::collections::{BTreeMap, HashMap};

use super::Topic;

/// A queue without repetitions.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Topics {
    order: BTreeMap<u64, Topic>,
    place: HashMap<Topic, u64>,
    last: u64,
}

impl Topics {
    /// Queues a topic behind the others. `false`: it waits already.
    pub(super) fn push(&mut self, topic: Topic) -> bool {
        if self.place.contains_key(&topic) {
            return false;
        }
        self.last += 1;
        self.place.insert(topic, self.last);
        self.order.insert(self.last, topic);
        true
    }

    /// The oldest one.
    pub(super) fn first(&self) -> Option<Topic> {
        self.order.values().next().copied()
    }

    /// Takes a topic off the queue, wherever it stands.
    pub(super) fn remove(&mut self, topic: Topic) {
        if let Some(place) = self.place.remove(&topic) {
            self.order.remove(&place);
        }
    }

    pub(super) fn clear(&mut self) {
        self.order.clear();
        self.place.clear();
    }
}

#[cfg(test)]
impl Topics {
    pub(super) fn len(&self) -> usize {
        assert_eq!(self.order.len(), self.place.len(), "two places among the events");
        self.order.len()
    }

    pub(super) fn contains(&self, topic: Topic) -> bool {
        self.place.contains_key(&topic)
    }
}
