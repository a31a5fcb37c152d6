//! A watch against a model of the host: whatever happens between two reads, the client that has read
//! everything believes what is so.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use uuid::Uuid;

use super::{Buffers, News, Watch};
use crate::host::wire::Type;
use crate::ids::{Access, ClientId, LeaseId, PeerId};
use crate::protocol::Mode;
use crate::registry::{BufferInfo, Description, LeaseInfo, Notice};

const ME: ClientId = ClientId(1);

/// The host as it is: buffers, and the UUIDs that were used.
#[derive(Default)]
struct World(BTreeMap<Uuid, BufferInfo>, BTreeSet<Uuid>);

impl Buffers for World {
    fn look(&self, uuid: Uuid) -> Option<BufferInfo> {
        let visible = |info: &&BufferInfo| !info.access.is_none() || !info.leases.is_empty();
        self.0.get(&uuid).filter(visible).cloned()
    }

    fn after(&self, uuid: Uuid) -> Vec<Uuid> {
        self.0
            .keys()
            .copied()
            .filter(|key| *key > uuid && self.look(*key).is_some())
            .take(2)
            .collect()
    }
}

#[derive(Debug, Clone)]
enum Deed {
    Offer(u8, bool),
    Withdraw(u8),
    Change(u8, bool),
    Lease(u8),
    Release(u8),
    Revoke(u8),
    Vanish(u8),
    Read(u8),
}

fn deed() -> impl Strategy<Value = Deed> {
    let which = 1u8..6;
    prop_oneof![
        (which.clone(), any::<bool>()).prop_map(|(n, write)| Deed::Offer(n, write)),
        which.clone().prop_map(Deed::Withdraw),
        (which.clone(), any::<bool>()).prop_map(|(n, mine)| Deed::Change(n, mine)),
        which.clone().prop_map(Deed::Lease),
        which.clone().prop_map(Deed::Release),
        which.clone().prop_map(Deed::Revoke),
        which.prop_map(Deed::Vanish),
        (0u8..4).prop_map(Deed::Read),
    ]
}

/// What the client believes of a buffer that it was told about.
type View = BTreeMap<Uuid, (u64, Access)>;

fn take_in(view: &mut View, news: News) {
    match (news.kind, news.info) {
        (Type::EvtOffered | Type::EvtChanged, Some(info)) => {
            view.insert(news.uuid, (info.generation, info.access));
        }
        (Type::EvtWithdrawn | Type::EvtRevoked, None) => drop(view.remove(&news.uuid)),
        other => panic!("{other:?}"),
    }
}

fn uuid(n: u8) -> Uuid {
    Uuid::from_bytes([n; 16])
}

fn fresh(n: u8) -> BufferInfo {
    let (size, access, name) = (4096, Access::ALL, [0; 32]);
    BufferInfo {
        uuid: uuid(n),
        what: Description { size, access, name, metadata_type: 0, metadata: Box::default() },
        exporter: PeerId(2),
        exporter_name: "vm".to_owned(),
        mode: Mode::Copy,
        access: Access::NONE,
        generation: 0,
        use_count: 0,
        wanted_back: false,
        leases: Vec::new(),
    }
}

impl World {
    /// Does it, and says what the registry would say.
    fn apply(&mut self, deed: &Deed) -> Vec<Notice> {
        let mut notices = Vec::new();
        match *deed {
            Deed::Offer(n, write) => {
                if self.1.insert(uuid(n)) {
                    self.0.insert(uuid(n), fresh(n));
                }
                let Some(info) = self.0.get_mut(&uuid(n)) else { return notices };
                let access = if write { Access::ALL } else { Access::READ };
                if info.access != access && !info.wanted_back {
                    info.access = access;
                    notices.push(Notice::Offered(uuid(n)));
                }
            }
            Deed::Withdraw(n) => {
                if let Some(info) = self.0.get_mut(&uuid(n)).filter(|info| !info.access.is_none()) {
                    info.access = Access::NONE;
                    notices.push(Notice::Withdrawn(uuid(n)));
                }
            }
            Deed::Change(n, mine) => {
                if let Some(info) = self.0.get_mut(&uuid(n)) {
                    info.generation += 1;
                    let (generation, writer) = (info.generation, mine.then_some(ME));
                    notices.push(Notice::Changed { uuid: uuid(n), generation, writer });
                }
            }
            Deed::Lease(n) => {
                if let Some(info) = self.0.get_mut(&uuid(n)).filter(|info| !info.access.is_none()) {
                    let (lease, access) = (LeaseId(1), Access::READ);
                    let since = std::time::Duration::ZERO;
                    info.leases =
                        vec![LeaseInfo { lease, client: ME, access, revoked: false, since }];
                }
            }
            Deed::Release(n) => {
                if let Some(info) = self.0.get_mut(&uuid(n)) {
                    info.leases.clear();
                }
            }
            Deed::Revoke(n) => {
                if let Some(info) = self.0.get_mut(&uuid(n))
                    && let Some(lease) = info.leases.first_mut().filter(|lease| !lease.revoked)
                {
                    lease.revoked = true;
                    let (client, lease, uuid) = (ME, lease.lease, uuid(n));
                    notices.push(Notice::Revoked { client, lease, uuid });
                }
            }
            Deed::Vanish(n) => {
                let idle = self.0.get(&uuid(n)).is_some_and(|info| info.leases.is_empty());
                if idle && self.0.remove(&uuid(n)).is_some_and(|info| !info.access.is_none()) {
                    notices.push(Notice::Withdrawn(uuid(n)));
                }
            }
            Deed::Read(_) => {}
        }
        notices
    }
}

proptest! {
    #[test]
    fn who_has_read_everything_believes_what_is_so(
        before in proptest::collection::vec(deed(), 0..10),
        deeds in proptest::collection::vec(deed(), 0..60),
    ) {
        let mut world = World::default();
        for deed in &before {
            world.apply(deed);
        }
        let mut watch = Watch::new(ME, None);
        let mut view = View::new();
        for deed in &deeds {
            for notice in world.apply(deed) {
                watch.note(&notice);
            }
            if let Deed::Release(_) = deed {
                watch.lease_ended();
            }
            if let Deed::Read(count) = deed {
                for _ in 0..*count {
                    watch.next(&world).into_iter().for_each(|news| take_in(&mut view, news));
                }
            }
            // At most what was told, and what is offered now.
            prop_assert!(watch.dirty.len() <= 5 && watch.told.len() <= 5);
        }
        while let Some(news) = watch.next(&world) {
            take_in(&mut view, news);
        }
        prop_assert!(!watch.pending());
        for n in 1..6 {
            let is = world.look(uuid(n)).filter(|info| !info.access.is_none());
            let believed = view.get(&uuid(n));
            if let Some(info) = is {
                let (generation, access) = *believed.expect("an offer that nobody told");
                prop_assert_eq!(access, info.access);
                // Its own END|WRITE it knows from the response.
                prop_assert!(generation <= info.generation);
                let own = watch.told.get(&uuid(n)).map(|told| told.generation);
                prop_assert_eq!(own, Some(info.generation));
            } else if world.look(uuid(n)).is_none_or(|info| info.leases.is_empty()) {
                prop_assert!(believed.is_none_or(|(_, access)| access.is_none()), "{:?}", believed);
            }
        }
    }
}
