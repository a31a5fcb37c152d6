//! The registry's promises, one test each. The model test (`model.rs`) looks for what nobody
//! thought of; these say what was promised.

use std::rc::Rc;
use std::time::Duration;

use uuid::Uuid;

use super::*;
use crate::ids::{Access, Cookie};
use crate::limits::{MAX_LEASES, MAX_WAIT, NOTICE, OBSERVE_MAX, OBSERVE_MIN};
use crate::policy::{Rule, Side};
use crate::protocol::{Line, Mode, NAME_LEN, State};

const APP: PeerId = PeerId(2);
const UI: PeerId = PeerId(3);
const ANNE: ClientId = ClientId(1);
const BERT: ClientId = ClientId(2);
const PAGE: u64 = 4096;
const QUOTA: Quota = Quota { max_exports: 4, max_total_size: 16 * PAGE, max_waits: 2 };
const WANTS: Wants = Wants { peers: true, import: false };
const READ: Access = Access::READ;
const WRITE: Access = Access::WRITE;
const ALL: Access = Access::ALL;
const NONE: Access = Access::NONE;

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn page() -> Description {
    let name = [0; NAME_LEN];
    Description { size: PAGE, access: ALL, name, metadata_type: 0, metadata: Box::default() }
}

fn begin(bits: Access) -> SyncRequest {
    SyncRequest { bits, offset: 0, len: 0, nonblock: false, timeout: ms(100), cookie: Cookie(7) }
}

fn at_once(bits: Access) -> SyncRequest {
    SyncRequest { nonblock: true, ..begin(bits) }
}

/// Two VMs, each with a session, and what their drivers and the host know.
struct World {
    registry: Registry<Rc<()>>,
    app: SessionId,
    ui: SessionId,
    /// Stands for all memory of the host: its count says how much of it is in use.
    memory: Rc<()>,
    exports: u128,
    now: Duration,
}

/// An export as its exporter knows it.
#[derive(Debug, Clone, Copy)]
struct Export {
    handle: HandleId,
    uuid: Uuid,
}

impl World {
    fn new() -> World {
        World::with(Vec::new())
    }

    fn with(rules: Vec<Rule>) -> World {
        let vms = [(APP, "app"), (UI, "ui")];
        let vms = vms.map(|(peer, name)| (peer, name.to_owned(), QUOTA, 0));
        let mut registry = Registry::new(Policy::new(rules), vms);
        let app = registry.open_session(APP, true).unwrap();
        let ui = registry.open_session(UI, true).unwrap();
        registry.take_outbox();
        World { registry, app, ui, memory: Rc::new(()), exports: 0, now: ms(1000) }
    }

    fn made(&mut self, mode: Mode) -> Exported<Rc<()>> {
        self.exports += 1;
        let uuid = Uuid::from_u128(self.exports);
        let (observable, shows) = (true, true);
        Exported { backing: self.memory.clone(), mode, uuid, observable, shows, since: self.now }
    }

    fn try_export(
        &mut self,
        what: Description,
        part: Option<Part>,
        mode: Mode,
    ) -> Result<Export, Status> {
        let (ticket, _) = self.registry.begin_export(self.app, what, part, false)?;
        let made = self.made(mode);
        let (handle, uuid, _) = self.registry.finish_export(ticket, Ok(made))?;
        Ok(Export { handle, uuid })
    }

    fn export(&mut self) -> Export {
        self.try_export(page(), None, Mode::ZeroCopy).unwrap()
    }

    fn export_copy(&mut self) -> Export {
        self.try_export(page(), None, Mode::Copy).unwrap()
    }

    fn part(&mut self, pool: Export) -> Export {
        let part = Part { pool: pool.uuid, offset: 0 };
        self.try_export(page(), Some(part), Mode::ZeroCopy).unwrap()
    }

    fn grant_request(
        &mut self,
        export: Export,
        change: impl FnOnce(&mut GrantRequest),
    ) -> Result<(), Status> {
        let mut request = GrantRequest {
            handle: export.handle,
            to: PeerId::HOST,
            access: ALL,
            once: false,
            force: false,
            lifetime: Duration::ZERO,
        };
        change(&mut request);
        self.registry.grant(self.app, request, self.now)
    }

    fn grant(&mut self, export: Export) {
        self.grant_request(export, |_| {}).unwrap();
    }

    fn try_acquire(
        &mut self,
        client: ClientId,
        export: Export,
        access: Access,
    ) -> Result<LeaseId, Status> {
        let acquired = self.registry.acquire(client, export.uuid, access, false, self.now)?;
        Ok(acquired.lease)
    }

    fn acquire(&mut self, client: ClientId, export: Export) -> LeaseId {
        self.try_acquire(client, export, ALL).unwrap()
    }

    fn end(&mut self, client: ClientId, lease: LeaseId) {
        self.registry.end_lease(client, lease).unwrap();
    }

    /// Looks at every buffer that the registry wants looked at; `held` is what is found.
    fn look(&mut self, held: bool) -> usize {
        let keys = self.registry.take_outbox().observe;
        for key in &keys {
            if let Some((look, _)) = self.registry.look(*key) {
                self.registry.observed(look, held, self.now);
            }
        }
        keys.len()
    }

    /// A lease comes and goes, and nothing of it is left.
    fn use_once(&mut self, export: Export) {
        let lease = self.acquire(ANNE, export);
        self.end(ANNE, lease);
        self.look(false);
    }

    fn release(&mut self, export: Export, force: bool) -> HandleState {
        self.registry.release(self.app, export.handle, force).unwrap()
    }

    fn state(&mut self, export: Export) -> Result<State, Status> {
        self.registry.query(self.app, export.handle).map(|state| state.state)
    }

    fn use_count(&mut self, export: Export) -> u32 {
        self.registry.query(self.app, export.handle).unwrap().use_count
    }

    /// Delivers all events to a VM.
    fn told_to(&mut self, session: SessionId) -> Vec<(EventKind, Option<HandleId>)> {
        let mut told = Vec::new();
        while let Some(event) = self.registry.next_event(session, WANTS) {
            self.registry.event_told(session, event);
            told.push((event.kind, event.handle));
        }
        told
    }

    /// Delivers all events to the exporter: kinds only.
    fn told(&mut self) -> Vec<EventKind> {
        self.told_to(self.app).into_iter().map(|(kind, _)| kind).collect()
    }

    fn tick(&mut self, after: Duration) {
        self.now += after;
        self.registry.tick(self.now);
    }

    /// Where it meets fences, these are over.
    fn begin_exporter(&mut self, export: Export, request: SyncRequest) -> Result<Begun, Status> {
        let begun = self.begin_fenced(export, request)?;
        let out = &mut self.registry.outbox;
        let Some(look) = out.fences.pop() else { return Ok(begun) };
        self.registry.fence_over(look.wait, Status::Ok);
        Ok(Begun::Now(self.registry.outbox.done.pop().unwrap().value))
    }

    fn begin_fenced(&mut self, export: Export, request: SyncRequest) -> Result<Begun, Status> {
        let token = u64::from(request.cookie.0);
        self.registry.begin_handle(self.app, export.handle, request, (token, 100), self.now)
    }

    fn begin_lease(
        &mut self,
        client: ClientId,
        lease: LeaseId,
        request: SyncRequest,
    ) -> Result<Begun, Status> {
        self.registry.begin_lease(client, lease, request, false, self.now)
    }

    /// Waits that ended since the last call.
    /// What ended; fences that nobody looked at are over.
    fn done(&mut self) -> Vec<(Origin, Status)> {
        for look in std::mem::take(&mut self.registry.outbox.fences) {
            self.registry.fence_over(look.wait, Status::Ok);
        }
        self.registry.take_outbox().done.iter().map(|done| (done.origin, done.status)).collect()
    }

    fn notices(&mut self) -> Vec<Notice> {
        self.registry.take_outbox().notices
    }

    /// Memory that the registry still holds.
    fn held(&mut self) -> usize {
        self.registry.outbox.drop.clear();
        Rc::strong_count(&self.memory) - 1
    }
}

const APP_WAIT: Origin = Origin::Vm(APP, 7);
const ANNES_WAIT: Origin = Origin::Client(ANNE, Cookie(7));
const BERTS_WAIT: Origin = Origin::Client(BERT, Cookie(7));

mod export {
    use super::*;

    #[test]
    fn a_buffer_is_known_by_its_handle_until_it_is_released() {
        let mut w = World::new();
        let export = w.export();
        assert_eq!(w.state(export), Ok(State::Exported));
        assert_eq!(w.release(export, false).state, State::Released);
        assert_eq!(w.state(export), Err(Status::NoEnt));
        assert_eq!(w.held(), 0);
    }

    #[test]
    fn another_vm_and_another_session_do_not_know_the_handle() {
        let mut w = World::new();
        let export = w.export();
        assert_eq!(w.registry.query(w.ui, export.handle), Err(Status::NoEnt));
        let before = w.app;
        w.registry.close_session(before);
        w.app = w.registry.open_session(APP, false).unwrap();
        assert_eq!(w.state(export), Err(Status::NoEnt));
        assert_eq!(w.registry.query(before, export.handle), Err(Status::Revoked));
    }

    #[test]
    fn exports_are_bounded() {
        let mut w = World::new();
        let exports: Vec<_> = (0..QUOTA.max_exports).map(|_| w.export()).collect();
        assert_eq!(w.try_export(page(), None, Mode::ZeroCopy).unwrap_err(), Status::Quota);
        w.release(exports[0], false);
        w.export();
    }

    #[test]
    fn bytes_are_bounded() {
        let mut w = World::new();
        let big = |size| Description { size, ..page() };
        let most = QUOTA.max_total_size;
        for size in [most + 1, u64::MAX] {
            assert_eq!(w.try_export(big(size), None, Mode::ZeroCopy).unwrap_err(), Status::Quota);
        }
        w.try_export(big(most), None, Mode::ZeroCopy).unwrap();
        assert_eq!(w.try_export(big(1), None, Mode::ZeroCopy).unwrap_err(), Status::Quota);
        assert_eq!(w.registry.bytes_charged(), most);
        let mut w = World::new();
        let too_big = w.registry.begin_export(w.app, page(), None, true);
        assert_eq!(too_big.unwrap_err(), Status::Quota);
    }

    #[test]
    fn an_export_counts_from_its_beginning() {
        let mut w = World::new();
        let tickets: Vec<_> = (0..QUOTA.max_exports)
            .map(|_| w.registry.begin_export(w.app, page(), None, false).unwrap().0)
            .collect();
        assert!(w.registry.begin_export(w.app, page(), None, false).is_err());
        for ticket in tickets {
            let failed = w.registry.finish_export(ticket, Err(Status::NoMem));
            assert_eq!(failed.unwrap_err(), Status::NoMem);
        }
        assert_eq!(w.registry.bytes_charged(), 0);
        w.export();
    }

    #[test]
    fn memory_made_for_a_session_that_ended_is_given_up() {
        let mut w = World::new();
        let (ticket, _) = w.registry.begin_export(w.app, page(), None, false).unwrap();
        w.registry.close_session(w.app);
        w.app = w.registry.open_session(APP, true).unwrap();
        let made = w.made(Mode::ZeroCopy);
        assert_eq!(w.registry.finish_export(ticket, Ok(made)).unwrap_err(), Status::Revoked);
        assert_eq!((w.held(), w.registry.bytes_charged()), (0, 0));
    }

    #[test]
    fn a_uuid_that_exists_is_refused() {
        let mut w = World::new();
        w.export();
        w.exports = 0;
        assert_eq!(w.try_export(page(), None, Mode::ZeroCopy).unwrap_err(), Status::Io);
        assert_eq!(w.held(), 1);
    }

    #[test]
    fn a_new_name_is_shown_to_the_host() {
        let mut w = World::new();
        let export = w.export();
        w.registry.set_name(w.app, export.handle, [b'x'; NAME_LEN]).unwrap();
        assert_eq!(w.notices(), [], "nothing is offered yet");
        w.grant(export);
        w.notices();
        w.registry.set_name(w.app, export.handle, [b'y'; NAME_LEN]).unwrap();
        assert_eq!(w.notices(), [Notice::Offered(export.uuid)]);
        assert_eq!(w.registry.host_info(export.uuid).unwrap().what.name, [b'y'; NAME_LEN]);
        assert_eq!(w.registry.set_name(w.app, HandleId(99), [0; NAME_LEN]), Err(Status::NoEnt));
    }
}

mod pools {
    use super::*;

    #[test]
    fn a_part_is_inside_its_pool() {
        let mut w = World::new();
        let pool = w.export();
        for (offset, size) in [(PAGE, PAGE), (0, PAGE + 1), (u64::MAX, PAGE), (1, u64::MAX)] {
            let part = Part { pool: pool.uuid, offset };
            let what = Description { size, ..page() };
            let refused = w.try_export(what, Some(part), Mode::ZeroCopy);
            assert_eq!(refused.unwrap_err(), Status::Range);
        }
        assert_eq!(w.use_count(pool), 0);
    }

    #[test]
    fn a_part_has_no_more_access_than_its_pool() {
        let mut w = World::new();
        let what = Description { access: READ, ..page() };
        let pool = w.try_export(what, None, Mode::ZeroCopy).unwrap();
        let part = Part { pool: pool.uuid, offset: 0 };
        let refused = w.try_export(page(), Some(part), Mode::ZeroCopy);
        assert_eq!(refused.unwrap_err(), Status::Access);
    }

    #[test]
    fn a_pool_is_an_export_of_the_same_vm_that_is_not_being_released() {
        let mut w = World::new();
        let pool = w.export();
        let part = Part { pool: pool.uuid, offset: 0 };
        let nothing = Part { pool: Uuid::nil(), offset: 0 };
        let other = w.registry.begin_export(w.ui, page(), Some(part), false);
        assert_eq!(other.unwrap_err(), Status::NoEnt);
        let unknown = w.registry.begin_export(w.app, page(), Some(nothing), false);
        assert_eq!(unknown.unwrap_err(), Status::NoEnt);
        w.part(pool);
        w.release(pool, false);
        let late = w.registry.begin_export(w.app, page(), Some(part), false);
        assert_eq!(late.unwrap_err(), Status::NoEnt);
    }

    #[test]
    fn a_part_is_a_use_of_its_pool() {
        let mut w = World::new();
        let pool = w.export();
        let part = w.part(pool);
        assert_eq!((w.state(pool), w.use_count(pool)), (Ok(State::InUse), 1));
        assert_eq!(w.told(), [EventKind::Busy]);
        w.release(part, false);
        assert_eq!(w.told(), [EventKind::Idle]);
        assert_eq!(w.release(pool, false).state, State::Released);
    }

    #[test]
    fn a_pool_is_released_with_its_last_part() {
        let mut w = World::new();
        let pool = w.export();
        let parts = [w.part(pool), w.part(pool)];
        assert_eq!(w.release(pool, true).state, State::Releasing);
        assert_eq!(w.state(parts[0]), Ok(State::Exported), "FORCE leaves parts alone");
        w.release(parts[0], false);
        assert_eq!(w.told(), []);
        w.release(parts[1], false);
        assert_eq!(w.told_to(w.app), [(EventKind::Released, Some(pool.handle))]);
        assert_eq!(w.held(), 0);
    }

    #[test]
    fn a_part_that_could_not_be_made_is_no_use() {
        let mut w = World::new();
        let pool = w.export();
        let part = Some(Part { pool: pool.uuid, offset: 0 });
        let (ticket, memory) = w.registry.begin_export(w.app, page(), part, false).unwrap();
        assert!(memory.is_some());
        assert_eq!(w.release(pool, false).state, State::Releasing);
        assert_eq!(w.registry.finish_export(ticket, Err(Status::Fault)), Err(Status::Fault));
        assert_eq!(w.told(), [EventKind::Released]);
    }

    #[test]
    fn parts_of_parts_of_parts_are_released_without_recursion() {
        let quota = Quota { max_exports: u32::MAX, max_total_size: u64::MAX, max_waits: 0 };
        let mut w = World::new();
        w.registry.vms.get_mut(&APP).unwrap().quota = quota;
        let mut chain = vec![w.export()];
        for _ in 0..20_000 {
            let last = *chain.last().unwrap();
            chain.push(w.part(last));
        }
        let last = chain.pop().unwrap();
        for export in &chain {
            assert_eq!(w.release(*export, false).state, State::Releasing);
        }
        assert_eq!(w.release(last, false).state, State::Released);
        assert_eq!(w.told().len(), chain.len());
        assert_eq!(w.registry.buffer_count(), 0);
    }
}

mod grants {
    use super::*;

    #[test]
    fn without_a_grant_a_buffer_does_not_exist() {
        let mut w = World::new();
        let export = w.export();
        assert_eq!(w.try_acquire(ANNE, export, READ), Err(Status::NoEnt));
        assert_eq!(w.registry.host_page(Uuid::nil(), usize::MAX).0, []);
        assert_eq!(w.registry.host_info(export.uuid), None);
        w.grant(export);
        assert_eq!(w.notices(), [Notice::Offered(export.uuid)]);
        assert_eq!(w.registry.host_page(Uuid::nil(), usize::MAX).0.len(), 1);
        w.acquire(ANNE, export);
    }

    #[test]
    fn pages_of_a_list_hold_each_offer_once_in_order() {
        let mut w = World::new();
        let exports = [w.export(), w.export(), w.export(), w.export()];
        for export in [exports[3], exports[0], exports[2]] {
            w.grant(export);
        }
        let page = |after, max| -> Vec<_> {
            w.registry.host_page(after, max).0.into_iter().map(|info| info.uuid).collect()
        };
        assert_eq!(page(Uuid::nil(), 2), [exports[0].uuid, exports[2].uuid]);
        assert_eq!(page(exports[2].uuid, 2), [exports[3].uuid]);
        assert_eq!(page(exports[1].uuid, usize::MAX), [exports[2].uuid, exports[3].uuid]);
        assert!(page(Uuid::max(), 2).is_empty() && page(Uuid::nil(), 0).is_empty());
    }

    #[test]
    fn policy_is_the_other_half_of_the_right() {
        let rule = |to, read_only| Rule { from: Side::One(APP), to: Side::One(to), read_only };
        let mut w = World::with(vec![rule(PeerId::HOST, true)]);
        let export = w.export();
        assert_eq!(w.grant_request(export, |_| {}), Err(Status::Access));
        w.grant_request(export, |r| r.to = PeerId::ANY).unwrap();
        assert_eq!(w.try_acquire(ANNE, export, WRITE), Err(Status::Access));
        w.try_acquire(ANNE, export, READ).unwrap();
        for to in [UI, APP, PeerId(0), PeerId(99)] {
            assert_eq!(w.grant_request(export, |r| r.to = to), Err(Status::NoEnt));
        }
        let mut w = World::with(vec![rule(UI, false)]);
        let export = w.export();
        w.grant_request(export, |r| r.to = UI).unwrap();
    }

    #[test]
    fn a_grant_is_bounded_by_the_export() {
        let mut w = World::new();
        let what = Description { access: READ, ..page() };
        let export = w.try_export(what, None, Mode::ZeroCopy).unwrap();
        assert_eq!(w.grant_request(export, |_| {}), Err(Status::Access));
        w.grant_request(export, |r| r.access = READ).unwrap();
        assert_eq!(w.try_acquire(ANNE, export, ALL), Err(Status::Access));
        assert_eq!(w.try_acquire(ANNE, export, NONE), Err(Status::Inval));
    }

    #[test]
    fn once_is_once() {
        for to in [PeerId::HOST, PeerId::ANY] {
            let mut w = World::new();
            let export = w.export();
            let once = |r: &mut GrantRequest| (r.to, r.once) = (to, true);
            w.grant_request(export, once).unwrap();
            assert_eq!(w.try_acquire(ANNE, export, READ).map(|_| ()), Ok(()));
            assert_eq!(w.try_acquire(ANNE, export, READ), Err(Status::NoEnt));
            let offer = [Notice::Offered(export.uuid), Notice::Withdrawn(export.uuid)];
            assert_eq!(w.notices(), offer);
        }
    }

    #[test]
    fn a_refused_acquire_does_not_consume_the_grant() {
        let mut w = World::new();
        let export = w.export();
        w.grant_request(export, |r| (r.access, r.once) = (READ, true)).unwrap();
        assert_eq!(w.try_acquire(ANNE, export, WRITE), Err(Status::Access));
        w.try_acquire(ANNE, export, READ).unwrap();
    }

    #[test]
    fn a_grant_ends_with_its_lifetime() {
        let mut w = World::new();
        let export = w.export();
        w.grant_request(export, |r| r.lifetime = ms(10)).unwrap();
        w.notices();
        w.tick(ms(9));
        assert_eq!(w.notices(), []);
        w.tick(ms(1));
        assert_eq!(w.notices(), [Notice::Withdrawn(export.uuid)]);
        assert_eq!(w.try_acquire(ANNE, export, READ), Err(Status::NoEnt));
        assert_eq!(w.registry.next_deadline(), None);
    }

    #[test]
    fn the_longest_lifetime_does_not_overflow() {
        let mut w = World::new();
        let export = w.export();
        w.grant_request(export, |r| r.lifetime = Duration::MAX).unwrap();
        w.tick(ms(1000));
        w.acquire(ANNE, export);
    }

    #[test]
    fn a_grant_replaces_the_former_one() {
        let mut w = World::new();
        let export = w.export();
        w.grant_request(export, |r| r.lifetime = ms(10)).unwrap();
        w.grant_request(export, |r| r.access = READ).unwrap();
        w.tick(ms(10));
        assert_eq!(w.try_acquire(ANNE, export, ALL), Err(Status::Access));
        w.try_acquire(ANNE, export, READ).unwrap();
        assert_eq!(w.registry.next_deadline(), None);
    }

    #[test]
    fn a_grant_of_its_own_goes_before_one_for_all() {
        let mut w = World::new();
        let export = w.export();
        w.grant_request(export, |r| r.to = PeerId::ANY).unwrap();
        w.grant_request(export, |r| r.access = READ).unwrap();
        assert_eq!(w.try_acquire(ANNE, export, ALL), Err(Status::Access));
        w.grant_request(export, |r| r.access = NONE).unwrap();
        w.acquire(ANNE, export);
    }

    #[test]
    fn withdrawing_leaves_leases_alone() {
        let mut w = World::new();
        let export = w.export();
        w.grant(export);
        let lease = w.acquire(ANNE, export);
        w.grant_request(export, |r| r.access = NONE).unwrap();
        assert_eq!(w.try_acquire(ANNE, export, READ), Err(Status::NoEnt));
        assert_eq!(w.begin_lease(ANNE, lease, begin(READ)), Ok(Begun::Now(0)));
        assert_eq!(w.registry.host_info(export.uuid).unwrap().access, NONE);
        w.grant_request(export, |r| r.access = NONE).unwrap();
    }

    #[test]
    fn withdrawing_with_force_revokes_leases() {
        for to in [PeerId::HOST, PeerId::ANY] {
            let mut w = World::new();
            let export = w.export();
            w.grant_request(export, |r| r.to = to).unwrap();
            let lease = w.acquire(ANNE, export);
            w.notices();
            w.grant_request(export, |r| (r.to, r.access, r.force) = (to, NONE, true)).unwrap();
            let uuid = export.uuid;
            let revoked = Notice::Revoked { client: ANNE, lease, uuid };
            assert_eq!(w.notices(), [Notice::Withdrawn(uuid), revoked]);
            assert_eq!(w.begin_lease(ANNE, lease, begin(READ)), Err(Status::Revoked));
            assert_eq!(w.state(export), Ok(State::InUse), "until it is handed back");
        }
    }

    #[test]
    fn all_are_those_without_a_grant_of_their_own() {
        let mut w = World::new();
        let export = w.export();
        w.grant(export);
        let lease = w.acquire(ANNE, export);
        w.grant_request(export, |r| (r.to, r.access, r.force) = (PeerId::ANY, NONE, true)).unwrap();
        assert_eq!(w.begin_lease(ANNE, lease, begin(READ)), Ok(Begun::Now(0)));
    }

    #[test]
    fn an_export_that_is_released_grants_nothing() {
        let mut w = World::new();
        let export = w.export();
        w.grant(export);
        w.acquire(ANNE, export);
        w.notices();
        w.release(export, false);
        assert_eq!(w.notices(), [Notice::Withdrawn(export.uuid)]);
        assert_eq!(w.grant_request(export, |_| {}), Err(Status::Revoked));
        assert_eq!(w.try_acquire(BERT, export, READ), Err(Status::NoEnt));
    }
}

mod leases {
    use super::*;

    #[test]
    fn a_lease_belongs_to_its_client() {
        let mut w = World::new();
        let export = w.export();
        w.grant(export);
        let lease = w.acquire(ANNE, export);
        assert_eq!(w.begin_lease(BERT, lease, begin(READ)), Err(Status::NoEnt));
        assert_eq!(w.registry.end_lease(BERT, lease), Err(Status::NoEnt));
        w.end(ANNE, lease);
        assert_eq!(w.registry.end_lease(ANNE, lease), Err(Status::NoEnt));
        assert_eq!(w.registry.lease_count(), 0);
    }

    #[test]
    fn leases_of_a_client_are_bounded() {
        let mut w = World::new();
        let exports = [w.export(), w.export(), w.export(), w.export()];
        exports.iter().for_each(|export| w.grant(*export));
        let many = exports.iter().cycle().take(MAX_LEASES);
        let leases: Vec<_> = many.map(|export| w.acquire(ANNE, *export)).collect();
        let export = exports[0];
        assert_eq!(w.try_acquire(ANNE, export, READ), Err(Status::Quota));
        w.acquire(BERT, export);
        w.end(ANNE, leases[0]);
        w.acquire(ANNE, export);
    }

    /// [dev-point-8] Nobody else is there whom the exporter could wait for.
    #[test]
    fn the_end_of_a_notice_ends_the_wait_for_its_release() {
        let mut w = World::new();
        let export = w.export();
        w.grant(export);
        let lease = w.acquire(ANNE, export);
        w.registry.want_notice(ANNE, lease);
        let (line, timeout, cookie) = (Line::Release, ms(5000), Cookie(7));
        let wait = PointWait { line, point: 1, timeout, cookie };
        let waits = w.registry.wait_handle(w.app, export.handle, wait, (1, 100), w.now);
        assert_eq!(waits, Ok(Begun::Waits));
        w.grant_request(export, |r| (r.access, r.force) = (NONE, true)).unwrap();
        w.tick(Duration::ZERO);
        assert_eq!(w.done(), []);
        w.tick(NOTICE);
        assert_eq!(w.done(), [(Origin::Vm(APP, 1), Status::Ok)]);
    }

    /// What VMs share with each other is for the operator alone.
    #[test]
    fn holders_shows_attachments_to_the_operator_alone() {
        let rule = Rule { from: Side::One(APP), to: Side::One(UI), read_only: false };
        let mut w = World::with(vec![rule]);
        let export = w.export();
        w.grant(export);
        w.grant_request(export, |request| request.to = UI).unwrap();
        w.acquire(ANNE, export);
        let (uuid, window) = (export.uuid, false);
        let request = AttachRequest { uuid, access: READ, zero_copy: false, window };
        w.registry.attach(w.ui, request, w.now).unwrap();
        for (all, count) in [(true, 3), (false, 2)] {
            let found = w.registry.holders(uuid, (0, 10), all, w.now).unwrap();
            assert_eq!((found.some.len(), found.all), (count, count), "{found:?}");
        }
    }

    #[test]
    fn thousands_of_leases_end_in_one_go() {
        let mut w = World::new();
        let export = w.export();
        w.grant(export);
        for _ in 0..2000 {
            let lease = w.try_acquire(ANNE, export, READ).unwrap();
            let sync = w.registry.buffers.values_mut().next().unwrap().sync();
            sync.reserve(Holder::Lease(lease), READ);
            sync.grant(Holder::Lease(lease), READ);
        }
        w.release(export, true);
        w.registry.client_gone(ANNE);
        assert_eq!(w.use_count(export), 1, "until somebody looked");
        assert!(w.registry.buffers.values().all(|buffer| buffer.sync.is_none()));
    }

    #[test]
    fn who_wants_no_copy_gets_none() {
        let mut w = World::new();
        let export = w.export_copy();
        w.grant(export);
        let refused = w.registry.acquire(ANNE, export.uuid, READ, true, w.now);
        assert_eq!(refused.unwrap_err(), Status::Access);
        assert_eq!(w.registry.host_info(export.uuid).unwrap().mode, Mode::Copy);
    }

    #[test]
    fn the_leases_of_a_client_that_is_gone_end() {
        let mut w = World::new();
        let (one, two) = (w.export(), w.export());
        w.grant(one);
        w.grant(two);
        w.acquire(ANNE, one);
        w.acquire(ANNE, two);
        let bert = w.acquire(BERT, two);
        let seen = |w: &World, client| w.registry.host_view(two.uuid, client).unwrap().leases;
        assert!(matches!(&seen(&w, BERT)[..], [one] if one.lease == bert));
        w.registry.client_gone(ANNE);
        w.registry.client_gone(ANNE);
        assert_eq!(seen(&w, ANNE), []);
        assert_eq!(w.look(false), 1);
        assert_eq!((w.use_count(one), w.use_count(two)), (0, 1));
        assert_eq!(w.registry.lease_count(), 1);
    }

    #[test]
    fn a_revoked_lease_is_used_until_it_is_handed_back() {
        let mut w = World::new();
        let export = w.export();
        w.grant(export);
        let lease = w.acquire(ANNE, export);
        assert_eq!(w.release(export, true).state, State::Releasing);
        assert_eq!(w.registry.end_access(ANNE, lease, begin(READ)).err(), Some(Status::Revoked));
        assert!(w.registry.host_info(export.uuid).unwrap().leases[0].revoked);
        assert_eq!(w.told(), []);
        w.end(ANNE, lease);
        w.look(false);
        assert_eq!(w.told(), [EventKind::Released]);
    }
}

mod release {
    use super::*;

    #[test]
    fn released_is_told_by_the_response_or_by_the_event() {
        let mut w = World::new();
        let (idle, used) = (w.export(), w.export());
        w.grant(used);
        let lease = w.acquire(ANNE, used);
        assert_eq!(w.told(), [EventKind::Busy]);
        assert_eq!(w.release(idle, false).state, State::Released);
        let answer = w.release(used, false);
        assert_eq!((answer.state, answer.use_count), (State::Releasing, 1));
        assert_eq!(w.state(used), Ok(State::Releasing));
        assert_eq!(w.told(), []);
        w.end(ANNE, lease);
        assert_eq!(w.told(), [], "somebody may still hold the descriptor");
        w.look(false);
        assert_eq!(w.state(used), Err(Status::NoEnt));
        assert_eq!(w.told_to(w.app), [(EventKind::Released, Some(used.handle))]);
        assert_eq!(w.told(), []);
        assert_eq!((w.held(), w.registry.buffer_count()), (0, 0));
    }

    #[test]
    fn a_second_release_answers_the_state_and_may_add_force() {
        let mut w = World::new();
        let export = w.export();
        w.grant(export);
        let lease = w.acquire(ANNE, export);
        w.release(export, false);
        assert_eq!(w.begin_lease(ANNE, lease, begin(READ)), Ok(Begun::Now(0)));
        assert_eq!(w.release(export, true).state, State::Releasing);
        assert_eq!(w.begin_lease(ANNE, lease, begin(READ)), Err(Status::Revoked));
        w.end(ANNE, lease);
        w.look(false);
        assert_eq!(w.told(), [EventKind::Released]);
        assert_eq!(w.registry.release(w.app, export.handle, true), Err(Status::NoEnt));
    }

    #[test]
    fn quota_is_charged_until_released_is_delivered() {
        let mut w = World::new();
        let export = w.export();
        w.grant(export);
        let lease = w.acquire(ANNE, export);
        w.release(export, false);
        w.end(ANNE, lease);
        w.look(false);
        assert_eq!(w.held(), 0, "the memory is not needed for it");
        let event = w.registry.next_event(w.app, WANTS).unwrap();
        assert_eq!(
            w.registry.next_event(w.app, WANTS),
            Some(event),
            "it stays next until it is told"
        );
        assert_eq!(w.registry.bytes_charged(), PAGE);
        w.registry.event_told(w.app, event);
        assert_eq!((w.registry.bytes_charged(), w.registry.buffer_count()), (0, 0));
    }

    #[test]
    fn a_copy_is_released_while_clients_hold_it() {
        let mut w = World::new();
        let export = w.export_copy();
        w.grant(export);
        let lease = w.acquire(ANNE, export);
        let answer = w.release(export, false);
        assert_eq!((answer.state, answer.use_count), (State::Released, 0));
        assert_eq!(w.registry.bytes_charged(), PAGE, "their memory is the exporter's debt");
        assert_eq!(w.begin_lease(ANNE, lease, begin(ALL)), Ok(Begun::Now(0)));
        assert!(w.registry.end_access(ANNE, lease, begin(READ)).is_ok());
        assert_eq!(w.registry.end_access(ANNE, lease, begin(WRITE)).err(), Some(Status::Revoked));
        w.end(ANNE, lease);
        w.look(true);
        assert_eq!(w.registry.bytes_charged(), PAGE);
        w.tick(OBSERVE_MIN);
        w.look(false);
        assert_eq!((w.held(), w.registry.bytes_charged()), (0, 0));
        assert_eq!(w.told(), []);
    }

    #[test]
    fn a_copy_is_released_with_the_last_copy_in_progress() {
        let mut w = World::new();
        let export = w.export_copy();
        w.grant(export);
        let lease = w.acquire(ANNE, export);
        let Ok(Ended::Copy(ticket, copy)) = w.registry.end_access(ANNE, lease, begin(WRITE)) else {
            panic!("END|WRITE of a copy copies");
        };
        let [Move { from, to, len }] = &copy.moves[..] else { panic!("{copy:?}") };
        assert_eq!(
            (from.view, to.view, from.offset, to.offset),
            (View::Content, View::Pages, 0, 0)
        );
        assert_eq!(*len, PAGE);
        w.told();
        assert_eq!(w.release(export, false).state, State::Releasing);
        let late = w.registry.end_access(ANNE, lease, begin(WRITE));
        assert_eq!(late.err(), Some(Status::Revoked), "or the loan could be drawn out for ever");
        assert_eq!(w.registry.finish_copy(ticket, true), 1);
        assert_eq!(w.told(), [EventKind::Released]);
    }

    #[test]
    fn a_copy_that_failed_clears_the_bits_and_keeps_the_generation() {
        let mut w = World::new();
        let export = w.export_copy();
        w.grant(export);
        let lease = w.acquire(ANNE, export);
        assert_eq!(w.begin_exporter(export, begin(WRITE)), Ok(Begun::Now(0)));
        assert_eq!(w.begin_lease(ANNE, lease, begin(READ)), Ok(Begun::Waits));
        let Ok(Ended::Copy(ticket, copy)) =
            w.registry.end_handle(w.app, export.handle, begin(WRITE))
        else {
            panic!("END|WRITE of a copy copies");
        };
        assert_eq!(copy.moves[0].from.view, View::Pages);
        assert_eq!(w.done(), [], "the bits stay until the bytes are there");
        assert_eq!(w.registry.finish_copy(ticket, false), 0);
        assert_eq!(w.done(), [(ANNES_WAIT, Status::Ok)]);
    }

    #[test]
    fn a_released_exporter_holds_nobody_up() {
        let mut w = World::new();
        let export = w.export_copy();
        w.grant(export);
        let lease = w.acquire(ANNE, export);
        w.begin_exporter(export, begin(WRITE)).unwrap();
        w.begin_lease(ANNE, lease, begin(READ)).unwrap();
        assert_eq!(w.release(export, false).state, State::Released);
        assert_eq!(w.done(), [(ANNES_WAIT, Status::Ok)]);
    }

    #[test]
    fn a_forced_release_lets_nobody_in_on_the_way_out() {
        let mut w = World::new();
        let export = w.export();
        w.grant(export);
        let (anne, bert) = (w.acquire(ANNE, export), w.acquire(BERT, export));
        w.begin_lease(ANNE, anne, begin(READ)).unwrap();
        w.begin_exporter(export, begin(WRITE)).unwrap();
        w.begin_lease(BERT, bert, begin(READ)).unwrap();
        w.release(export, true);
        assert_eq!(w.done(), [(APP_WAIT, Status::Canceled), (BERTS_WAIT, Status::Revoked)]);
    }
}

mod foreign {
    use super::*;

    /// An export whose only user holds a descriptor that no lease explains.
    fn held() -> (World, Export) {
        let mut w = World::new();
        let export = w.export();
        w.grant(export);
        let lease = w.acquire(ANNE, export);
        w.end(ANNE, lease);
        assert_eq!(w.look(true), 1);
        (w, export)
    }

    #[test]
    fn unexplained_references_count_as_one_use() {
        let (mut w, export) = held();
        assert_eq!(w.use_count(export), 1);
        assert_eq!(w.release(export, true).state, State::Releasing);
        w.tick(OBSERVE_MIN);
        w.look(false);
        assert_eq!(w.told(), [EventKind::Released]);
        assert_eq!(w.registry.next_deadline(), None);
    }

    #[test]
    fn the_pause_between_looks_doubles_up_to_a_bound() {
        let (mut w, _) = held();
        let mut pause = OBSERVE_MIN;
        for _ in 0..12 {
            assert_eq!(w.registry.next_deadline(), Some(w.now + pause));
            w.tick(pause - Duration::from_nanos(1));
            assert_eq!(w.look(true), 0);
            w.tick(Duration::from_nanos(1));
            assert_eq!(w.look(true), 1);
            pause = (pause * 2).min(OBSERVE_MAX);
        }
        assert_eq!(pause, OBSERVE_MAX);
    }

    #[test]
    fn nothing_is_looked_at_while_a_lease_lives() {
        let (mut w, export) = held();
        let lease = w.acquire(ANNE, export);
        assert_eq!(w.registry.next_deadline(), None);
        assert_eq!(w.registry.look_before_release(w.app, export.handle), None);
        w.end(ANNE, lease);
        assert!(w.registry.look_before_release(w.app, export.handle).is_some());
        assert_eq!(w.look(true), 1);
        assert_eq!(w.registry.next_deadline(), Some(w.now + OBSERVE_MIN));
    }

    #[test]
    fn a_look_that_a_lease_overtook_proves_nothing() {
        let (mut w, export) = held();
        let key = w.registry.look_before_release(w.app, export.handle).unwrap();
        let (look, _) = w.registry.look(key).unwrap();
        let lease = w.acquire(ANNE, export);
        w.end(ANNE, lease);
        w.registry.observed(look, false, w.now);
        assert_eq!(w.use_count(export), 1);
        assert_eq!(w.look(false), 1, "the end of the lease asked for another one");
        assert_eq!(w.use_count(export), 0);
    }

    #[test]
    fn a_look_at_a_leased_buffer_proves_nothing() {
        let (mut w, export) = held();
        let key = w.registry.look_before_release(w.app, export.handle).unwrap();
        let lease = w.acquire(ANNE, export);
        // It could see no descriptor because the client has not got its own yet.
        assert_eq!(w.registry.look(key), None);
        w.end(ANNE, lease);
        assert!(w.registry.look(key).is_some());
    }

    #[test]
    fn a_look_that_never_came_is_asked_for_again() {
        let (mut w, _) = held();
        for _ in 0..3 {
            w.tick(OBSERVE_MIN);
            assert_eq!(w.registry.take_outbox().observe.len(), 1);
        }
    }

    #[test]
    fn a_look_that_is_due_does_not_stop_the_clock() {
        let (mut w, export) = held();
        // The exporter's bits keep a synchronisation state beside the look.
        w.begin_exporter(export, begin(ALL)).unwrap();
        w.grant_request(export, |r| r.lifetime = OBSERVE_MIN).unwrap();
        w.tick(OBSERVE_MIN);
        assert_eq!(w.look(false), 1);
        assert_eq!(w.registry.next_deadline(), None);
    }

    #[test]
    fn memory_that_cannot_be_looked_at_ends_with_its_leases() {
        let mut w = World::new();
        let (ticket, _) = w.registry.begin_export(w.app, page(), None, false).unwrap();
        let made = Exported { observable: false, ..w.made(Mode::Copy) };
        let (handle, uuid, _) = w.registry.finish_export(ticket, Ok(made)).unwrap();
        let export = Export { handle, uuid };
        w.grant(export);
        let lease = w.acquire(ANNE, export);
        w.end(ANNE, lease);
        assert_eq!((w.look(true), w.use_count(export)), (0, 0));
    }
}

mod events {
    use super::*;

    #[test]
    fn busy_and_idle_are_level_state() {
        let mut w = World::new();
        let export = w.export();
        w.grant(export);
        w.use_once(export);
        assert_eq!(w.told(), [], "they undid each other");
        let lease = w.acquire(ANNE, export);
        assert_eq!(w.told(), [EventKind::Busy]);
        w.end(ANNE, lease);
        assert_eq!(w.told(), [], "not before somebody looked");
        w.look(false);
        assert_eq!(w.told_to(w.app), [(EventKind::Idle, Some(export.handle))]);
    }

    #[test]
    fn what_changes_while_it_is_told_is_told_next() {
        let mut w = World::new();
        let export = w.export();
        w.grant(export);
        let lease = w.acquire(ANNE, export);
        let busy = w.registry.next_event(w.app, WANTS).unwrap();
        w.end(ANNE, lease);
        w.look(false);
        w.registry.event_told(w.app, busy);
        assert_eq!(w.told(), [EventKind::Idle]);
    }

    #[test]
    fn released_is_the_last_word() {
        let mut w = World::new();
        let export = w.export();
        w.grant(export);
        w.use_once(export);
        let lease = w.acquire(ANNE, export);
        w.release(export, false);
        w.end(ANNE, lease);
        w.look(false);
        assert_eq!(w.told(), [EventKind::Released]);
    }

    #[test]
    fn a_guest_that_takes_no_events_costs_nothing() {
        let mut w = World::new();
        for _ in 0..10 {
            let pool = w.export();
            let part = w.part(pool);
            w.release(part, false);
            w.release(pool, false);
        }
        assert_eq!(w.registry.vms[&APP].events.len(), 0);
    }

    #[test]
    fn an_event_of_an_ended_session_is_not_told() {
        let mut w = World::new();
        let export = w.export();
        w.grant(export);
        w.acquire(ANNE, export);
        let busy = w.registry.next_event(w.app, WANTS).unwrap();
        w.registry.close_session(w.app);
        assert_eq!(w.registry.next_event(w.app, WANTS), None);
        let app = w.registry.open_session(APP, true).unwrap();
        w.registry.event_told(w.app, busy);
        assert_eq!(w.told_to(app), []);
    }

    #[test]
    fn resync_comes_first_and_once() {
        let mut w = World::new();
        let export = w.export();
        w.grant(export);
        w.acquire(ANNE, export);
        w.registry.resync(APP);
        w.registry.resync(APP);
        assert!(w.registry.take_outbox().wake.contains(&APP));
        assert_eq!(w.told(), [EventKind::Resync, EventKind::Busy]);
    }

    #[test]
    fn what_is_missed_while_resync_is_told_is_not_lost() {
        let mut w = World::new();
        w.registry.resync(APP);
        let resync = w.registry.next_event(w.app, WANTS).unwrap();
        w.registry.resync(APP);
        w.registry.event_told(w.app, resync);
        assert_eq!(w.told(), [EventKind::Resync]);
    }

    #[test]
    fn a_vm_is_woken_for_its_own_events_only() {
        let mut w = World::new();
        let export = w.export();
        w.grant(export);
        w.registry.take_outbox();
        w.acquire(ANNE, export);
        assert_eq!(w.registry.take_outbox().wake.into_iter().collect::<Vec<_>>(), [APP]);
        assert_eq!(w.told_to(w.ui), []);
    }
}

mod sessions {
    use super::*;

    #[test]
    fn unused_buffers_die_with_the_session() {
        let mut w = World::new();
        w.export();
        let pool = w.export();
        w.part(pool);
        w.export_copy();
        w.registry.close_session(w.app);
        assert_eq!((w.held(), w.registry.buffer_count(), w.registry.bytes_charged()), (0, 0, 0));
        assert_eq!(w.registry.lingering(APP), 0);
    }

    #[test]
    fn what_the_host_holds_lingers_and_stays_charged() {
        let mut w = World::new();
        let export = w.export();
        w.grant(export);
        let lease = w.acquire(ANNE, export);
        w.notices();
        w.registry.close_session(w.app);
        let uuid = export.uuid;
        let revoked = Notice::Revoked { client: ANNE, lease, uuid };
        assert_eq!(w.notices(), [revoked, Notice::Withdrawn(uuid)]);
        assert_eq!((w.registry.lingering(APP), w.registry.bytes_charged()), (1, PAGE));
        assert_eq!(w.begin_lease(ANNE, lease, begin(READ)), Err(Status::Revoked));
        w.app = w.registry.open_session(APP, true).unwrap();
        for _ in 1..QUOTA.max_exports {
            w.export();
        }
        assert_eq!(w.try_export(page(), None, Mode::ZeroCopy).unwrap_err(), Status::Quota);
        w.told();
        w.end(ANNE, lease);
        w.look(true);
        assert_eq!((w.registry.lingering(APP), w.told()), (1, vec![]));
        w.tick(OBSERVE_MIN);
        w.look(false);
        assert_eq!((w.registry.lingering(APP), w.told()), (0, vec![EventKind::Resync]));
        w.export();
    }

    #[test]
    fn what_lingers_can_be_listed() {
        let mut w = World::new();
        let exports = [w.export(), w.export(), w.export()];
        for export in exports {
            w.grant(export);
            w.acquire(ANNE, export);
        }
        w.release(exports[2], false);
        w.registry.client_gone(BERT);
        w.registry.close_session(w.app);
        w.app = w.registry.open_session(APP, true).unwrap();
        w.export();
        for (index, export) in (0..).zip(exports) {
            let state = w.registry.query_linger(w.app, index).unwrap();
            assert_eq!((state.state, state.uuid), (State::Releasing, export.uuid));
        }
        for index in [3, u64::MAX] {
            assert_eq!(w.registry.query_linger(w.app, index), Err(Status::NoEnt));
        }
        assert_eq!(w.registry.query_linger(w.ui, 0), Err(Status::NoEnt));
    }

    #[test]
    fn a_private_copy_does_not_linger_but_stays_charged() {
        let mut w = World::new();
        let export = w.export_copy();
        w.grant(export);
        let lease = w.acquire(ANNE, export);
        w.registry.close_session(w.app);
        assert_eq!((w.registry.lingering(APP), w.registry.bytes_charged()), (0, PAGE));
        w.end(ANNE, lease);
        w.look(false);
        assert_eq!(w.registry.bytes_charged(), 0);
    }

    /// [dev-linger-2] [dev-reset-6] Its pages are those of its part.
    #[test]
    fn a_pool_lingers_with_its_last_part() {
        let mut w = World::new();
        let pool = w.export();
        let parts = [w.part(pool), w.part(pool)];
        w.grant(parts[1]);
        let lease = w.acquire(ANNE, parts[1]);
        w.app = w.registry.open_session(APP, true).unwrap();
        assert_eq!(w.registry.lingering(APP), 2, "the pool and the part that is held");
        assert_eq!(w.registry.query_linger(w.app, 0).unwrap().use_count, 1);
        w.end(ANNE, lease);
        w.look(false);
        assert_eq!((w.registry.lingering(APP), w.registry.bytes_charged()), (0, 0));
        assert_eq!((w.held(), w.registry.buffer_count()), (0, 0));
    }

    #[test]
    fn a_copy_in_progress_lingers() {
        let mut w = World::new();
        let export = w.export_copy();
        let Ok(Ended::Copy(ticket, _)) = w.registry.end_handle(w.app, export.handle, begin(WRITE))
        else {
            panic!("END|WRITE of a copy copies");
        };
        w.registry.close_session(w.app);
        assert_eq!(w.registry.lingering(APP), 1);
        w.registry.finish_copy(ticket, true);
        assert_eq!((w.registry.lingering(APP), w.held()), (0, 0));
    }

    #[test]
    fn waits_end_with_the_session() {
        let mut w = World::new();
        let export = w.export();
        w.grant(export);
        let (anne, bert) = (w.acquire(ANNE, export), w.acquire(BERT, export));
        w.begin_lease(ANNE, anne, begin(READ)).unwrap();
        w.begin_exporter(export, begin(WRITE)).unwrap();
        w.begin_lease(BERT, bert, begin(READ)).unwrap();
        w.registry.close_session(w.app);
        assert_eq!(w.done(), [(APP_WAIT, Status::Canceled), (BERTS_WAIT, Status::Revoked)]);
        assert_eq!(w.registry.next_deadline(), None);
    }

    #[test]
    fn a_session_ends_when_the_next_one_begins() {
        let mut w = World::new();
        let export = w.export();
        let before = w.app;
        w.app = w.registry.open_session(APP, true).unwrap();
        assert_eq!(w.state(export), Err(Status::NoEnt));
        assert_eq!(w.registry.buffer_count(), 0);
        w.export();
        w.registry.close_session(before);
        assert_eq!(w.registry.buffer_count(), 1);
    }

    #[test]
    fn an_undelivered_released_dies_with_the_session() {
        let mut w = World::new();
        let export = w.export();
        w.grant(export);
        let lease = w.acquire(ANNE, export);
        w.release(export, false);
        w.end(ANNE, lease);
        w.look(false);
        w.registry.close_session(w.app);
        w.registry.close_session(w.app);
        assert_eq!((w.registry.buffer_count(), w.registry.bytes_charged()), (0, 0));
        let app = w.registry.open_session(APP, true).unwrap();
        assert_eq!(w.told_to(app), []);
    }

    #[test]
    fn a_guest_that_reset_its_device_reads_the_configuration_again() {
        let mut w = World::new();
        let epoch = w.registry.epoch(APP);
        w.registry.close_session(w.app);
        w.app = w.registry.open_session(APP, false).unwrap();
        assert_eq!(w.told(), [EventKind::Resync]);
        w.registry.close_session(w.app);
        w.app = w.registry.open_session(APP, true).unwrap();
        assert_eq!(w.told(), []);
        assert!(w.registry.epoch(APP) > epoch, "a new connection is a new epoch");
        assert_eq!(w.registry.open_session(PeerId(99), true), None);
    }
}

/// BEGINs of a VM in front of fences of the host.
mod fences {
    use super::*;

    const WAIT: Origin = Origin::Vm(APP, 7);

    /// An export that a client had, and a lease of another.
    fn shared() -> (World, Export, LeaseId) {
        let mut w = World::new();
        let export = w.export();
        w.grant(export);
        w.use_once(export);
        let lease = w.acquire(BERT, export);
        w.registry.take_outbox();
        (w, export, lease)
    }

    fn look(w: &mut World) -> Fences<Rc<()>> {
        let mut looks = w.registry.take_outbox().fences;
        assert_eq!(looks.len(), 1);
        looks.remove(0)
    }

    #[test]
    fn nobody_looks_before_the_host_had_the_dma_buf() {
        let mut w = World::new();
        let export = w.export();
        w.grant(export);
        assert_eq!(w.begin_fenced(export, begin(ALL)), Ok(Begun::Now(0)));
        w.use_once(export);
        assert_eq!(w.begin_fenced(export, begin(ALL)), Ok(Begun::Waits));
        let host = w.try_acquire(ANNE, export, ALL).unwrap();
        w.registry.end_access(ANNE, host, begin(WRITE)).unwrap();
        let wait = look(&mut w);
        w.registry.fence_over(wait.wait, Status::Ok);
        let out = w.registry.take_outbox();
        assert_eq!(out.done, [Done { origin: WAIT, status: Status::Ok, value: 1 }]);
    }

    #[test]
    fn readers_wait_for_writers_and_writers_for_all() {
        let (mut w, export, _) = shared();
        for (bits, write) in [(READ, false), (WRITE, true), (ALL, true)] {
            w.begin_fenced(export, begin(bits)).unwrap();
            assert_eq!(look(&mut w).write, write);
            w.registry.cancel_handle(w.app, export.handle, Cookie(0)).unwrap();
        }
    }

    #[test]
    fn bits_are_given_first_and_taken_back_if_the_wait_fails() {
        let (mut w, export, bert) = shared();
        w.begin_fenced(export, begin(WRITE)).unwrap();
        let first = look(&mut w);
        assert!(w.registry.fence_pending(first.wait));
        let later = SyncRequest { timeout: ms(200), ..begin(READ) };
        assert_eq!(w.begin_lease(BERT, bert, later), Ok(Begun::Waits));
        w.tick(ms(99));
        assert_eq!(w.done(), []);
        w.tick(ms(1));
        assert_eq!(w.done(), [(WAIT, Status::TimedOut), (BERTS_WAIT, Status::Ok)]);
        w.registry.fence_over(first.wait, Status::Ok);
        assert_eq!(w.done(), [], "nobody waits any more");
        assert_eq!(w.begin_fenced(export, at_once(WRITE)), Err(Status::Again));
    }

    #[test]
    fn time_does_not_run_while_somebody_looks() {
        let (mut w, export, _) = shared();
        let now = SyncRequest { timeout: Duration::ZERO, ..begin(READ) };
        w.begin_fenced(export, now).unwrap();
        w.tick(ms(1));
        assert_eq!(w.registry.next_deadline(), None);
        let first = look(&mut w);
        assert!(w.registry.fence_pending(first.wait));
        assert!(w.registry.outbox.clock);
        w.tick(ms(0));
        assert_eq!(w.done(), [(WAIT, Status::TimedOut)]);
        assert!(!w.registry.fence_pending(first.wait));
    }

    #[test]
    fn who_does_not_want_to_wait_says_so_beforehand() {
        let (mut w, export, _) = shared();
        w.begin_fenced(export, at_once(READ)).unwrap();
        let first = look(&mut w);
        assert_eq!(first.unless, Some(Status::Again));
        w.registry.fence_over(first.wait, Status::Again);
        assert_eq!(w.done(), [(WAIT, Status::Again)]);
        for cookie in 1..=QUOTA.max_waits {
            let one = SyncRequest { cookie: Cookie(cookie), ..begin(READ) };
            w.begin_fenced(export, one).unwrap();
            assert_eq!(look(&mut w).unless, None);
        }
        w.begin_fenced(export, begin(READ)).unwrap();
        assert_eq!(look(&mut w).unless, Some(Status::Busy));
    }

    #[test]
    fn an_end_leaves_a_begin_in_front_of_fences_alone() {
        let (mut w, export, bert) = shared();
        w.begin_fenced(export, begin(READ)).unwrap();
        let first = look(&mut w);
        w.registry.end_handle(w.app, export.handle, begin(READ)).unwrap();
        assert_eq!(w.begin_lease(BERT, bert, at_once(WRITE)), Err(Status::Again));
        w.registry.fence_over(first.wait, Status::Ok);
        assert_eq!(w.begin_lease(BERT, bert, at_once(WRITE)), Err(Status::Again));
        w.registry.end_handle(w.app, export.handle, begin(READ)).unwrap();
        assert_eq!(w.begin_lease(BERT, bert, at_once(WRITE)), Ok(Begun::Now(0)));
    }

    #[test]
    fn whoever_waited_in_the_queue_looks_too() {
        let (mut w, export, bert) = shared();
        w.begin_lease(BERT, bert, begin(WRITE)).unwrap();
        w.begin_fenced(export, begin(READ)).unwrap();
        w.registry.end_access(BERT, bert, begin(WRITE)).unwrap();
        let out = w.registry.take_outbox();
        assert_eq!((out.done.len(), out.fences.len()), (0, 1));
        let first = out.fences[0].wait;
        assert!(w.registry.fence_pending(first));
        w.registry.fence_over(first, Status::Ok);
        assert_eq!(w.done(), [(WAIT, Status::Ok)]);
    }

    #[test]
    fn a_release_and_the_end_of_a_session_end_it() {
        let (mut w, export, _) = shared();
        w.begin_fenced(export, begin(READ)).unwrap();
        w.release(export, false);
        assert_eq!(w.done(), [(WAIT, Status::Canceled)]);
        let (mut w, export, _) = shared();
        w.begin_fenced(export, begin(READ)).unwrap();
        w.registry.close_session(w.app);
        assert_eq!(w.done(), [(WAIT, Status::Canceled)]);
    }
}

mod sync {
    use super::*;

    /// An export and a lease of each client.
    fn shared() -> (World, Export, LeaseId, LeaseId) {
        let mut w = World::new();
        let export = w.export();
        w.grant(export);
        let (anne, bert) = (w.acquire(ANNE, export), w.acquire(BERT, export));
        w.registry.take_outbox();
        (w, export, anne, bert)
    }

    fn end_exporter(w: &mut World, export: Export, bits: Access) -> u64 {
        match w.registry.end_handle(w.app, export.handle, begin(bits)) {
            Ok(Ended::Now(generation)) => generation,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_reader_waits_for_the_writer_and_sees_its_generation() {
        let (mut w, export, anne, _) = shared();
        assert_eq!(w.begin_exporter(export, begin(WRITE)), Ok(Begun::Now(0)));
        assert_eq!(w.begin_lease(ANNE, anne, at_once(READ)), Err(Status::Again));
        assert_eq!(w.begin_lease(ANNE, anne, begin(READ)), Ok(Begun::Waits));
        assert_eq!(end_exporter(&mut w, export, WRITE), 1);
        let out = w.registry.take_outbox();
        assert_eq!(out.done, [Done { origin: ANNES_WAIT, status: Status::Ok, value: 1 }]);
        let changed = Notice::Changed { uuid: export.uuid, generation: 1, writer: None };
        assert_eq!(out.notices, [changed]);
        assert_eq!(w.registry.next_deadline(), None);
    }

    #[test]
    fn first_come_first_served() {
        let (mut w, export, anne, bert) = shared();
        w.begin_exporter(export, begin(READ)).unwrap();
        assert_eq!(w.begin_lease(ANNE, anne, begin(WRITE)), Ok(Begun::Waits));
        assert_eq!(w.begin_lease(BERT, bert, begin(READ)), Ok(Begun::Waits));
        end_exporter(&mut w, export, READ);
        assert_eq!(w.done(), [(ANNES_WAIT, Status::Ok)]);
        w.registry.end_access(ANNE, anne, begin(WRITE)).unwrap();
        assert_eq!(w.done(), [(BERTS_WAIT, Status::Ok)]);
    }

    #[test]
    fn a_wait_ends_after_its_timeout() {
        let (mut w, export, anne, bert) = shared();
        w.begin_exporter(export, begin(WRITE)).unwrap();
        let long = SyncRequest { timeout: Duration::MAX, ..begin(READ) };
        w.begin_lease(ANNE, anne, begin(READ)).unwrap();
        w.begin_lease(BERT, bert, long).unwrap();
        w.tick(ms(99));
        assert_eq!(w.done(), []);
        w.tick(ms(1));
        assert_eq!(w.done(), [(ANNES_WAIT, Status::TimedOut)]);
        w.tick(MAX_WAIT - ms(101));
        assert_eq!(w.done(), []);
        w.tick(ms(1));
        assert_eq!(w.done(), [(BERTS_WAIT, Status::TimedOut)]);
    }

    #[test]
    fn a_wait_without_time_ends_at_once() {
        let (mut w, export, anne, _) = shared();
        w.begin_exporter(export, begin(WRITE)).unwrap();
        let now = SyncRequest { timeout: Duration::ZERO, ..begin(READ) };
        assert_eq!(w.begin_lease(ANNE, anne, now), Ok(Begun::Waits));
        assert!(w.registry.outbox.clock);
        w.tick(Duration::ZERO);
        assert_eq!(w.done(), [(ANNES_WAIT, Status::TimedOut)]);
    }

    #[test]
    fn those_behind_a_writer_that_gave_up_are_served() {
        let (mut w, export, anne, bert) = shared();
        w.begin_exporter(export, begin(READ)).unwrap();
        w.begin_lease(ANNE, anne, begin(WRITE)).unwrap();
        w.begin_lease(BERT, bert, SyncRequest { timeout: ms(500), ..begin(READ) }).unwrap();
        w.tick(ms(100));
        assert_eq!(w.done(), [(ANNES_WAIT, Status::TimedOut), (BERTS_WAIT, Status::Ok)]);
    }

    #[test]
    fn a_client_cancels_its_own_wait_by_cookie() {
        let (mut w, export, anne, _) = shared();
        w.begin_exporter(export, begin(WRITE)).unwrap();
        w.begin_lease(ANNE, anne, begin(READ)).unwrap();
        assert_eq!(w.registry.cancel_client(BERT, Cookie(7)), Err(Status::NoEnt));
        assert_eq!(w.registry.cancel_client(ANNE, Cookie(8)), Err(Status::NoEnt));
        assert_eq!(w.registry.cancel_client(ANNE, Cookie(7)), Ok(()));
        assert_eq!(w.done(), [(ANNES_WAIT, Status::Canceled)]);
    }

    #[test]
    fn an_exporter_cancels_its_own_waits_one_or_all() {
        let (mut w, export, anne, bert) = shared();
        w.begin_lease(ANNE, anne, begin(READ)).unwrap();
        for cookie in [Cookie(1), Cookie(2)] {
            let request = SyncRequest { cookie, ..begin(WRITE) };
            assert_eq!(w.begin_exporter(export, request), Ok(Begun::Waits));
        }
        w.begin_lease(BERT, bert, begin(READ)).unwrap();
        let cancel =
            |w: &mut World, cookie| w.registry.cancel_handle(w.app, export.handle, Cookie(cookie));
        assert_eq!(cancel(&mut w, 7), Err(Status::NoEnt), "that is Bert's");
        assert_eq!(cancel(&mut w, 1), Ok(()));
        assert_eq!(w.done(), [(Origin::Vm(APP, 1), Status::Canceled)]);
        assert_eq!(cancel(&mut w, 0), Ok(()));
        assert_eq!(w.done(), [(Origin::Vm(APP, 2), Status::Canceled), (BERTS_WAIT, Status::Ok)]);
        assert_eq!(cancel(&mut w, 0), Err(Status::NoEnt));
    }

    #[test]
    fn waits_are_bounded_and_end_finds_room() {
        let (mut w, export, anne, _) = shared();
        w.begin_lease(ANNE, anne, begin(ALL)).unwrap();
        for _ in 0..QUOTA.max_waits {
            assert_eq!(w.begin_exporter(export, begin(READ)), Ok(Begun::Waits));
        }
        assert_eq!(w.begin_exporter(export, begin(READ)), Err(Status::Busy));
        let full = w.registry.begin_lease(ANNE, anne, begin(READ), true, w.now);
        assert_eq!(full, Ok(Begun::Now(0)), "only who must wait needs room");
        end_exporter(&mut w, export, READ);
        w.registry.end_access(ANNE, anne, begin(ALL)).unwrap();
        assert_eq!(w.done().len(), 2);
        let full = w.registry.begin_lease(ANNE, anne, begin(WRITE), true, w.now);
        assert_eq!(full, Err(Status::Busy));
    }

    #[test]
    fn a_crowd_holds_nobody_up() {
        let mut w = World::new();
        let (crowded, quiet) = (w.export(), w.export());
        w.grant(crowded);
        w.grant(quiet);
        for _ in 0..2000 {
            let lease = w.acquire(ANNE, crowded);
            w.begin_lease(ANNE, lease, begin(READ)).unwrap();
        }
        let berts: Vec<LeaseId> = (0..2000).map(|_| w.acquire(BERT, crowded)).collect();
        for lease in berts {
            assert_eq!(w.begin_lease(BERT, lease, begin(WRITE)), Ok(Begun::Waits));
        }
        w.begin_exporter(quiet, begin(WRITE)).unwrap();
        let anne = w.acquire(ANNE, quiet);
        let cookie = Cookie(99);
        let wait = SyncRequest { cookie, ..begin(READ) };
        assert_eq!(w.begin_lease(ANNE, anne, wait), Ok(Begun::Waits));
        // All of this happens under the one lock of all VMs.
        let started = std::time::Instant::now();
        w.registry.cancel_client(ANNE, cookie).unwrap();
        w.registry.cancel_client(ANNE, cookie).unwrap_err();
        assert!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());
    }

    #[test]
    fn a_ring_bounds_waits_too() {
        let (mut w, export, anne, _) = shared();
        w.begin_lease(ANNE, anne, begin(ALL)).unwrap();
        let full = w.registry.begin_handle(w.app, export.handle, begin(READ), (7, 0), w.now);
        assert_eq!(full, Err(Status::Busy));
    }

    #[test]
    fn the_request_is_judged_before_anything_waits() {
        let (mut w, export, anne, _) = shared();
        w.begin_exporter(export, begin(WRITE)).unwrap();
        let range = |offset, len| SyncRequest { offset, len, ..begin(READ) };
        assert_eq!(w.begin_lease(ANNE, anne, begin(NONE)), Err(Status::Inval));
        for (offset, len) in [(PAGE + 1, 0), (0, PAGE + 1), (1, PAGE), (1, u64::MAX)] {
            assert_eq!(w.begin_lease(ANNE, anne, range(offset, len)), Err(Status::Range));
        }
        for (offset, len) in [(PAGE, 0), (0, PAGE), (1, PAGE - 1)] {
            assert_eq!(w.begin_lease(ANNE, anne, range(offset, len)), Ok(Begun::Waits));
        }
    }

    #[test]
    fn access_bounds_a_lease_but_not_the_exporter() {
        let mut w = World::new();
        let what = Description { access: READ, ..page() };
        let export = w.try_export(what, None, Mode::ZeroCopy).unwrap();
        w.grant_request(export, |r| r.access = READ).unwrap();
        let lease = w.try_acquire(ANNE, export, READ).unwrap();
        assert_eq!(w.begin_lease(ANNE, lease, begin(WRITE)), Err(Status::Access));
        assert_eq!(w.registry.end_access(ANNE, lease, begin(WRITE)).err(), Some(Status::Access));
        assert_eq!(w.begin_exporter(export, begin(WRITE)), Ok(Begun::Now(0)));
        assert_eq!(end_exporter(&mut w, export, WRITE), 1);
    }

    #[test]
    fn end_without_begin_is_fine_and_a_write_counts() {
        let (mut w, export, _, bert) = shared();
        assert_eq!(end_exporter(&mut w, export, READ), 0);
        assert!(matches!(w.registry.end_access(BERT, bert, begin(ALL)), Ok(Ended::Now(1))));
        let changed = Notice::Changed { uuid: export.uuid, generation: 1, writer: Some(BERT) };
        assert_eq!(w.notices(), [changed]);
    }

    #[test]
    fn the_host_is_not_told_of_content_that_it_cannot_have() {
        let mut w = World::new();
        let export = w.export();
        end_exporter(&mut w, export, WRITE);
        assert_eq!(w.notices(), []);
        w.grant(export);
        assert_eq!(w.registry.host_info(export.uuid).unwrap().generation, 1);
    }

    #[test]
    fn the_bits_of_a_lease_go_with_it() {
        let (mut w, export, anne, bert) = shared();
        w.begin_lease(ANNE, anne, begin(WRITE)).unwrap();
        w.begin_exporter(export, begin(READ)).unwrap();
        w.begin_lease(BERT, bert, begin(WRITE)).unwrap();
        w.end(ANNE, anne);
        assert_eq!(w.done(), [(APP_WAIT, Status::Ok)]);
        w.end(BERT, bert);
        assert_eq!(w.done(), [(BERTS_WAIT, Status::Canceled)]);
    }

    #[test]
    fn a_released_export_takes_end_but_no_begin() {
        let (mut w, export, anne, _) = shared();
        w.begin_exporter(export, begin(WRITE)).unwrap();
        w.begin_lease(ANNE, anne, begin(READ)).unwrap();
        w.release(export, false);
        assert_eq!(w.begin_exporter(export, begin(READ)), Err(Status::Canceled));
        assert_eq!(end_exporter(&mut w, export, WRITE), 1);
        assert_eq!(w.done(), [(ANNES_WAIT, Status::Ok)]);
    }
}

mod peers {
    use super::*;

    fn friends() -> World {
        let rule = Rule { from: Side::One(APP), to: Side::One(UI), read_only: false };
        World::with(vec![rule])
    }

    #[test]
    fn those_that_policy_allows_in_one_direction_know_each_other() {
        let w = friends();
        for (me, other, name) in [(APP, UI, "ui"), (UI, APP, "app")] {
            let host = w.registry.peer_info(me, 0).unwrap();
            assert_eq!((host.peer, host.nr_peers, host.online), (PeerId::HOST, 2, true));
            let view = w.registry.peer_info(me, 1).unwrap();
            assert_eq!((view.peer, view.name.as_str(), view.online), (other, name, true));
            assert_eq!(w.registry.peer_info(me, 2), Err(Status::NoEnt));
        }
    }

    #[test]
    fn others_do_not_exist() {
        let mut w = World::new();
        assert_eq!(w.registry.peer_info(APP, 0).unwrap().nr_peers, 1);
        assert_eq!(w.registry.peer_info(APP, 1), Err(Status::NoEnt));
        assert_eq!(w.registry.peer_info(APP, u32::MAX), Err(Status::NoEnt));
        w.registry.close_session(w.ui);
        assert_eq!(w.told(), []);
    }

    #[test]
    fn a_peer_that_went_and_came_is_told_once() {
        let mut w = friends();
        w.told();
        w.registry.close_session(w.ui);
        let gone = w.registry.next_event(w.app, WANTS).unwrap();
        assert_eq!((gone.kind, gone.peer), (EventKind::Peer, Some(UI)));
        assert!(!w.registry.peer_info(APP, 1).unwrap().online);
        w.ui = w.registry.open_session(UI, true).unwrap();
        assert_eq!(w.told(), [EventKind::Peer]);
    }

    #[test]
    fn peers_are_told_to_those_who_want_to_know() {
        let mut w = friends();
        w.registry.resync(APP);
        w.registry.close_session(w.ui);
        let resync = w.registry.next_event(w.app, Wants { peers: false, import: false }).unwrap();
        w.registry.event_told(w.app, resync);
        assert_eq!(w.registry.next_event(w.app, Wants { peers: false, import: false }), None);
    }

    #[test]
    fn a_peer_that_came_while_its_going_was_told_is_not_lost() {
        let mut w = friends();
        w.told();
        w.registry.close_session(w.ui);
        let gone = w.registry.next_event(w.app, WANTS).unwrap();
        w.ui = w.registry.open_session(UI, true).unwrap();
        w.registry.event_told(w.app, gone);
        let back = w.registry.next_event(w.app, WANTS).unwrap();
        assert_eq!((back.peer, back.epoch), (Some(UI), w.registry.epoch(UI)));
    }
}

mod deadlines {
    use super::*;

    #[test]
    fn a_buffer_has_one_entry_for_what_is_due_first() {
        let mut w = World::new();
        let export = w.export();
        w.grant_request(export, |r| r.lifetime = ms(50)).unwrap();
        let lease = w.acquire(ANNE, export);
        w.begin_exporter(export, begin(WRITE)).unwrap();
        for timeout in [ms(80), ms(30), ms(60)] {
            w.begin_lease(ANNE, lease, SyncRequest { timeout, ..begin(READ) }).unwrap();
            assert_eq!(w.registry.deadlines.len(), 1);
        }
        let mut due = Vec::new();
        while let Some(next) = w.registry.next_deadline() {
            due.push(next - ms(1000));
            w.tick(next - w.now);
            assert!(w.registry.deadlines.len() <= 1);
        }
        assert_eq!(due, [ms(30), ms(50), ms(60), ms(80)]);
    }

    #[test]
    fn the_clock_is_told_of_what_is_due_sooner() {
        let mut w = World::new();
        let export = w.export();
        assert!(!w.registry.take_outbox().clock);
        w.grant_request(export, |r| r.lifetime = ms(50)).unwrap();
        assert!(w.registry.take_outbox().clock);
    }

    #[test]
    fn a_removed_buffer_is_not_due() {
        let mut w = World::new();
        let export = w.export();
        w.grant_request(export, |r| r.lifetime = ms(50)).unwrap();
        w.release(export, false);
        assert_eq!(w.registry.next_deadline(), None);
    }
}

#[path = "importer_tests.rs"]
mod importers;

#[path = "client_tests.rs"]
mod client;
