//! The registry's promises to importers and about them.

use super::*;
use crate::ids::{FileId, MappingId, WindowId, WindowRange};
use crate::limits::{
    ECHO_WAIT, LOOKED_AT, MAX_ATTACHMENTS, MAX_COPY_MAPPINGS, MAX_MAPPED, MAX_MISSES_PER_SECOND,
};
use crate::window::Todo;

const IMPORT: Wants = Wants { peers: false, import: true };

/// "app" may share with "ui".
fn friends() -> World {
    let mut w =
        World::with(vec![Rule { from: Side::One(APP), to: Side::One(UI), read_only: false }]);
    for session in [w.app, w.ui] {
        assert_eq!(w.registry.next_event(session, IMPORT), None);
    }
    w
}

impl World {
    fn grant_ui(&mut self, export: Export) {
        self.grant_request(export, |request| request.to = UI).unwrap();
    }

    fn try_attach(&mut self, uuid: Uuid, access: Access) -> Result<HandleId, Status> {
        let request = AttachRequest { uuid, access, zero_copy: false, window: false };
        Ok(self.registry.attach(self.ui, request, self.now)?.handle)
    }

    fn attach(&mut self, export: Export) -> HandleId {
        self.try_attach(export.uuid, ALL).unwrap()
    }

    fn map_request(&self, handle: HandleId) -> MapRequest {
        MapRequest { handle, offset: 0, len: PAGE, access: ALL }
    }

    fn map(&mut self, handle: HandleId) -> MappingId {
        let ticket = self.registry.begin_map(self.ui, self.map_request(handle), false).unwrap();
        self.registry.finish_map(ticket, Ok(self.memory.clone())).unwrap()
    }

    /// An export that "ui" attached and mapped.
    fn shared(&mut self, mode: Mode) -> (Export, HandleId) {
        let export = self.try_export(page(), None, mode).unwrap();
        self.grant_ui(export);
        let handle = self.attach(export);
        self.map(handle);
        (export, handle)
    }

    fn begin_ui(&mut self, handle: HandleId, bits: Access) -> Result<Begun, Status> {
        self.registry.begin_handle(self.ui, handle, at_once(bits), (1, 100), self.now)
    }

    fn fill(&mut self, handle: HandleId) -> (CopyTicket, Copy<Rc<()>>) {
        self.registry.fill(self.ui, handle, &begin(READ)).unwrap().expect("something to copy")
    }

    fn state_of(&mut self, handle: HandleId) -> State {
        self.registry.query(self.ui, handle).unwrap().state
    }

    fn heard(&mut self, session: SessionId) -> Vec<(EventKind, Option<HandleId>)> {
        let mut heard = Vec::new();
        while let Some(event) = self.registry.next_event(session, IMPORT) {
            self.registry.event_told(session, event);
            heard.push((event.kind, event.handle));
        }
        heard
    }
}

#[test]
fn an_attachment_is_a_use() {
    let mut w = friends();
    let (export, handle) = w.shared(Mode::ZeroCopy);
    assert_eq!((w.state(export), w.use_count(export)), (Ok(State::InUse), 1));
    assert_eq!(w.heard(w.app), [(EventKind::Busy, Some(export.handle))]);
    assert_eq!(w.registry.detach(w.ui, handle), Err(Status::Busy));
    let mapping = MappingId(1);
    assert_eq!(w.state_of(handle), State::Mapped);
    assert_eq!(w.registry.unmap(w.app, mapping, 0), Err(Status::NoEnt), "not the other VM's");
    w.registry.unmap(w.ui, mapping, 0).unwrap();
    assert_eq!(w.state_of(handle), State::Attached);
    w.registry.detach(w.ui, handle).unwrap();
    assert_eq!(w.heard(w.app), [(EventKind::Idle, Some(export.handle))]);
    assert_eq!(w.held(), 1, "the export's own");
}

#[test]
fn a_copy_of_shared_pages_ends_with_the_loan() {
    let mut w = friends();
    let (export, handle) = w.shared(Mode::ZeroCopy);
    assert_eq!(w.release(export, false).state, State::Released);
    assert_eq!(w.state_of(handle), State::Revoked);
    assert_eq!(w.registry.bytes_charged(), 0);
    assert!(w.heard(w.ui).contains(&(EventKind::Revoked, Some(handle))));
    w.registry.detach(w.ui, handle).unwrap();
    assert_eq!((w.held(), w.registry.buffer_count()), (0, 0));
}

#[test]
fn a_private_copy_outlives_the_loan_but_takes_nothing_back() {
    let mut w = friends();
    let (export, handle) = w.shared(Mode::Copy);
    assert_eq!(w.release(export, false).state, State::Released);
    assert_eq!(w.state_of(handle), State::Mapped);
    assert_eq!(w.registry.bytes_charged(), PAGE, "the exporter made it");
    assert_eq!(w.begin_ui(handle, READ), Ok(Begun::Now(0)));
    let (ticket, _) = w.fill(handle);
    w.registry.finish_copy(ticket, true);
    let end = w.registry.end_handle(w.ui, handle, begin(WRITE));
    assert_eq!(end.unwrap_err(), Status::Revoked);
    w.registry.unmap(w.ui, MappingId(1), 0).unwrap();
    w.registry.detach(w.ui, handle).unwrap();
    assert_eq!((w.held(), w.registry.bytes_charged()), (0, 0));
}

#[test]
fn pages_are_on_loan_until_the_copy_of_them_is_done() {
    let mut w = friends();
    let (export, handle) = w.shared(Mode::ZeroCopy);
    w.begin_ui(handle, READ).unwrap();
    let (ticket, copy) = w.fill(handle);
    drop(copy);
    assert_eq!(w.release(export, true).state, State::Releasing);
    assert_eq!(w.heard(w.app), []);
    w.registry.finish_copy(ticket, true);
    assert_eq!(w.heard(w.app), [(EventKind::Released, Some(export.handle))]);
}

#[test]
fn a_copy_in_progress_outlives_both_sessions() {
    let mut w = friends();
    let (_, handle) = w.shared(Mode::ZeroCopy);
    w.begin_ui(handle, READ).unwrap();
    let (ticket, copy) = w.fill(handle);
    w.registry.close_session(w.ui);
    w.registry.close_session(w.app);
    assert_eq!(w.registry.lingering(APP), 1);
    drop(copy);
    w.registry.finish_copy(ticket, true);
    assert_eq!((w.held(), w.registry.lingering(APP), w.registry.buffer_count()), (0, 0, 0));
}

#[test]
fn a_copy_that_failed_leaves_no_bit_behind() {
    let mut w = friends();
    let (export, handle) = w.shared(Mode::ZeroCopy);
    w.begin_ui(handle, READ).unwrap();
    let (ticket, _) = w.fill(handle);
    assert_eq!(w.begin_exporter(export, at_once(WRITE)), Err(Status::Again));
    w.registry.finish_copy(ticket, false);
    assert_eq!(w.begin_exporter(export, at_once(WRITE)), Ok(Begun::Now(0)));
}

/// [dev-sync-20] [dev-chain-14]
#[test]
fn a_copy_that_failed_takes_back_only_what_its_begin_was_given() {
    for (before, failing, kept) in [(READ, READ, READ), (READ, ALL, READ), (WRITE, ALL, WRITE)] {
        let mut w = friends();
        let (export, handle) = w.shared(Mode::ZeroCopy);
        w.begin_ui(handle, before).unwrap();
        if before.read {
            let (ticket, _) = w.fill(handle);
            w.registry.finish_copy(ticket, true);
        }
        w.begin_ui(handle, failing).unwrap();
        let filled = w.registry.fill(w.ui, handle, &begin(failing)).unwrap();
        w.registry.finish_copy(filled.unwrap().0, false);
        let reads = if kept.write { Err(Status::Again) } else { Ok(Begun::Now(0)) };
        assert_eq!(w.begin_exporter(export, at_once(READ)), reads, "{before:?} {failing:?}");
        assert_eq!(w.begin_exporter(export, at_once(WRITE)), Err(Status::Again));
        w.registry.end_handle(w.ui, handle, begin(READ)).unwrap();
        let writes = if kept.write { Err(Status::Again) } else { Ok(Begun::Now(0)) };
        assert_eq!(w.begin_exporter(export, at_once(WRITE)), writes);
    }
}

#[test]
fn of_two_begins_that_copy_at_once_each_keeps_its_bits_or_loses_them() {
    for first_fails in [true, false] {
        let mut w = friends();
        let (export, handle) = w.shared(Mode::ZeroCopy);
        w.begin_ui(handle, READ).unwrap();
        w.begin_ui(handle, READ).unwrap();
        let (one, other) = (w.fill(handle).0, w.fill(handle).0);
        w.registry.finish_copy(one, !first_fails);
        assert_eq!(w.begin_exporter(export, at_once(WRITE)), Err(Status::Again));
        w.registry.finish_copy(other, first_fails);
        assert_eq!(w.begin_exporter(export, at_once(WRITE)), Err(Status::Again));
        w.registry.end_handle(w.ui, handle, begin(READ)).unwrap();
        assert_eq!(w.begin_exporter(export, at_once(WRITE)), Ok(Begun::Now(0)));
    }
}

#[test]
fn who_leaves_while_its_begin_copies_holds_nothing() {
    let mut w = friends();
    let (export, handle) = w.shared(Mode::ZeroCopy);
    w.begin_ui(handle, READ).unwrap();
    let (ticket, _) = w.fill(handle);
    w.registry.unmap(w.ui, MappingId(1), 0).unwrap();
    w.registry.detach(w.ui, handle).unwrap();
    assert_eq!(w.begin_exporter(export, at_once(WRITE)), Ok(Begun::Now(0)));
    w.registry.finish_copy(ticket, true);
    assert_eq!(w.begin_exporter(export, at_once(WRITE)), Ok(Begun::Now(0)));
}

#[test]
fn only_what_is_both_mapped_and_asked_for_moves() {
    let mut w = friends();
    let what = Description { size: 4 * PAGE, ..page() };
    let export = w.try_export(what, None, Mode::Copy).unwrap();
    w.grant_ui(export);
    let handle = w.attach(export);
    for (offset, len, access) in [(0, 2, ALL), (PAGE, 3, READ), (3 * PAGE, 1, WRITE), (0, 1, WRITE)]
    {
        let request = MapRequest { handle, offset, len: len * PAGE, access };
        let ticket = w.registry.begin_map(w.ui, request, false).unwrap();
        w.registry.finish_map(ticket, Ok(w.memory.clone())).unwrap();
    }
    let range = |bits| SyncRequest { offset: PAGE - 6, len: 16, ..at_once(bits) };
    w.registry.begin_handle(w.ui, handle, range(ALL), (1, 100), w.now).unwrap();
    let places = |copy: &Copy<Rc<()>>| -> Vec<_> {
        let place = |one: &Move<Rc<()>>| (one.from.offset, one.to.offset, one.len);
        copy.moves.iter().map(place).collect()
    };
    let (ticket, copy) = w.registry.fill(w.ui, handle, &range(ALL)).unwrap().unwrap();
    assert_eq!(places(&copy), [(PAGE - 6, PAGE - 6, 16), (PAGE, 0, 10)]);
    w.registry.finish_copy(ticket, true);
    let ended = w.registry.end_handle(w.ui, handle, range(WRITE)).unwrap();
    let Ended::Copy(ticket, copy) = ended else { panic!("{ended:?}") };
    // To the private copy, then on to the exporter's pages.
    let back = [(PAGE - 6, PAGE - 6, 16), (PAGE - 6, PAGE - 6, 6)];
    assert_eq!(places(&copy), [back, back].concat());
    let ways: Vec<_> = copy.moves.iter().map(|one| (one.from.view, one.to.view)).collect();
    let (pages, content) = (View::Pages, View::Content);
    assert_eq!(ways[..2], [(pages, content); 2]);
    assert_eq!(ways[2..], [(content, pages); 2]);
    assert_eq!(w.registry.finish_copy(ticket, true), 1);
}

#[test]
fn force_takes_what_the_withdrawn_grant_stood_for() {
    let mut w = friends();
    let (export, handle) = w.shared(Mode::ZeroCopy);
    let withdraw = |w: &mut World, to, force| {
        let change = |request: &mut GrantRequest| {
            (request.to, request.access, request.force) = (to, NONE, force);
        };
        w.grant_request(export, change).unwrap();
    };
    withdraw(&mut w, PeerId::ANY, true);
    assert_eq!(w.state_of(handle), State::Mapped, "it has a grant of its own");
    withdraw(&mut w, PeerId::HOST, true);
    withdraw(&mut w, UI, false);
    assert_eq!(w.state_of(handle), State::Mapped);
    withdraw(&mut w, PeerId::ANY, true);
    assert_eq!((w.state_of(handle), w.use_count(export)), (State::Revoked, 0));
    assert_eq!(w.begin_ui(handle, READ), Err(Status::Revoked));
}

#[test]
fn guesses_are_bounded_and_so_is_the_time_of_the_bound() {
    let mut w = friends();
    let (export, _) = w.shared(Mode::ZeroCopy);
    for _ in 0..MAX_MISSES_PER_SECOND {
        assert_eq!(w.try_attach(Uuid::nil(), ALL), Err(Status::NoEnt));
    }
    assert_eq!(w.try_attach(Uuid::nil(), ALL), Err(Status::Busy));
    assert_eq!(w.try_attach(export.uuid, ALL), Err(Status::Busy), "a hit looks like a miss");
    w.registry.close_session(w.ui);
    w.ui = w.registry.open_session(UI, true).unwrap();
    assert_eq!(w.try_attach(export.uuid, ALL), Err(Status::Busy), "a new session is no way out");
    w.now += ms(1000);
    w.attach(export);
}

#[test]
fn what_one_begin_copies_is_bounded() {
    let mut w = friends();
    w.registry.vms.get_mut(&APP).unwrap().quota.max_total_size = MAX_MAPPED;
    let half = MAX_MAPPED / 2;
    let what = Description { size: half, ..page() };
    let export = w.try_export(what, None, Mode::ZeroCopy).unwrap();
    w.grant_ui(export);
    let handle = w.attach(export);
    let whole = MapRequest { len: half, ..w.map_request(handle) };
    for _ in 0..2 {
        let ticket = w.registry.begin_map(w.ui, whole, false).unwrap();
        let memory = w.memory.clone();
        w.registry.finish_map(ticket, Ok(memory)).unwrap();
    }
    let past = w.map_request(handle);
    assert_eq!(w.registry.begin_map(w.ui, past, false).unwrap_err(), Status::Quota);
}

#[test]
fn attachments_and_mappings_are_bounded() {
    let mut w = friends();
    let (export, handle) = w.shared(Mode::ZeroCopy);
    for _ in 1..MAX_ATTACHMENTS {
        w.attach(export);
    }
    assert_eq!(w.try_attach(export.uuid, ALL), Err(Status::Quota));
    for _ in 2..MAX_COPY_MAPPINGS {
        w.map(handle);
    }
    let request = w.map_request(handle);
    let last = w.registry.begin_map(w.ui, request, false).unwrap();
    let past = w.registry.begin_map(w.ui, request, false);
    assert_eq!(past.unwrap_err(), Status::Quota, "one that is being made counts");
    assert_eq!(w.registry.finish_map(last, Err(Status::Fault)), Err(Status::Fault));
    w.map(handle);
    assert_eq!(w.registry.begin_map(w.ui, request, false).unwrap_err(), Status::Quota);
}

#[test]
fn pages_found_for_an_attachment_that_died_are_given_up() {
    for ends in [false, true] {
        let mut w = friends();
        let (export, handle) = w.shared(Mode::ZeroCopy);
        let request = w.map_request(handle);
        let ticket = w.registry.begin_map(w.ui, request, false).unwrap();
        if ends {
            w.registry.close_session(w.ui);
        } else {
            w.release(export, true);
        }
        let found = Ok(w.memory.clone());
        assert_eq!(w.registry.finish_map(ticket, found), Err(Status::Revoked));
        w.registry.close_session(w.app);
        w.registry.close_session(w.ui);
        assert_eq!((w.held(), w.registry.vms[&UI].mapped), (0, 0));
    }
}

#[test]
fn an_offer_that_goes_while_it_is_told_is_withdrawn_next() {
    let mut w = friends();
    let export = w.export();
    w.grant_ui(export);
    let offered = w.registry.next_event(w.ui, IMPORT).unwrap();
    assert_eq!((offered.kind, offered.uuid), (EventKind::Offered, Some(export.uuid)));
    w.release(export, false);
    w.registry.event_told(w.ui, offered);
    let gone = w.registry.next_event(w.ui, IMPORT).unwrap();
    assert_eq!((gone.kind, gone.uuid), (EventKind::Withdrawn, Some(export.uuid)));
    w.registry.event_told(w.ui, gone);
    assert_eq!((w.heard(w.ui), w.registry.vms[&UI].offers.len()), (vec![], 0));
}

/// Others get the registry in between, and what was not told yet takes no room.
#[test]
fn a_driver_that_comes_late_is_told_all_offers_a_few_at_a_time() {
    let mut w =
        World::with(vec![Rule { from: Side::One(APP), to: Side::One(UI), read_only: false }]);
    let all = LOOKED_AT * 3;
    let quota = &mut w.registry.vms.get_mut(&APP).unwrap().quota;
    (quota.max_exports, quota.max_total_size) = (1000, u64::MAX);
    let mut offered = Vec::new();
    for i in 0..all {
        let export = w.export();
        w.grant_ui(export);
        if (LOOKED_AT..2 * LOOKED_AT).contains(&i) {
            w.release(export, false);
        } else {
            offered.push(Some(export.uuid));
        }
    }
    let hear = |w: &mut World| {
        let mut heard = Vec::new();
        loop {
            w.registry.take_outbox();
            match w.registry.next_event(w.ui, IMPORT) {
                Some(event) => {
                    assert!(w.registry.vms[&UI].events.len() <= LOOKED_AT);
                    heard.push(event.uuid);
                    w.registry.event_told(w.ui, event);
                }
                None if w.registry.take_outbox().wake.contains(&UI) => {}
                None => return heard,
            }
        }
    };
    assert_eq!(hear(&mut w), offered);
    w.registry.resync(UI);
    offered.insert(0, None);
    assert_eq!(hear(&mut w), offered);
}

#[test]
fn who_does_not_import_hears_nothing_and_costs_nothing() {
    let mut w = World::with(vec![Rule { from: Side::Any, to: Side::Any, read_only: false }]);
    w.told_to(w.ui);
    let export = w.export();
    w.grant_ui(export);
    assert!(!w.registry.take_outbox().wake.contains(&UI));
    assert_eq!((w.told_to(w.ui), w.registry.vms[&UI].offers.len()), (vec![], 0));
    assert_eq!(w.heard(w.ui), [(EventKind::Offered, None)], "a driver that comes later does");
}

#[test]
fn attach_and_detach_without_event_buffers_cost_nothing() {
    let mut w = friends();
    let export = w.export();
    w.grant_ui(export);
    for _ in 0..100 {
        let handle = w.attach(export);
        w.registry.end_handle(w.app, export.handle, begin(WRITE)).unwrap();
        w.registry.detach(w.ui, handle).unwrap();
    }
    assert!(w.registry.vms[&UI].events.len() <= 1);
    assert!(w.registry.vms[&APP].events.len() <= 1);
}

#[test]
fn every_decision_is_on_record() {
    let mut w = friends();
    w.registry.take_outbox();
    let (export, handle) = w.shared(Mode::ZeroCopy);
    let uuid = export.uuid;
    let _ = w.try_attach(Uuid::nil(), ALL);
    w.release(export, true);
    w.registry.detach(w.ui, handle).unwrap();
    let (importer, exporter, access) = (UI, APP, ALL);
    let expected = [
        Audit::Granted { exporter, to: UI, uuid, access },
        Audit::Attached { importer, exporter, uuid, access },
        Audit::Denied { importer, uuid: Uuid::nil(), status: Status::NoEnt },
        Audit::Revoked { importer, exporter, uuid },
    ];
    assert_eq!(w.registry.take_outbox().audit, expected);
}

// What a window shows.

const FILE: FileId = FileId { dev: 1, ino: 1 };

impl World {
    /// An attachment of "ui" that can map into its window.
    fn attach_window(&mut self, uuid: Uuid, access: Access) -> Attached {
        let request = AttachRequest { uuid, access, zero_copy: false, window: true };
        self.registry.attach(self.ui, request, self.now).unwrap()
    }

    fn map_window(&mut self, handle: HandleId, start: u64, token: u64) -> Result<(), Status> {
        let range = WindowRange { start, len: PAGE };
        let request = WindowRequest { handle, offset: 0, range, access: READ };
        let (ticket, shared) = self.registry.begin_window(self.ui, request)?;
        let memory = shared.unwrap_or_else(|| self.memory.clone());
        self.registry.finish_window(ticket, Ok((memory, FILE)), token)
    }

    /// The VMM does everything that it is asked, and what follows is told.
    fn obey(&mut self, window: WindowId) -> Vec<(u64, Status)> {
        while let Some(todo) = self.registry.next_for_vmm(UI, window, self.now) {
            let place = todo.place();
            let answer = match todo {
                Todo::Map { .. } => Answer::Mapped { place, done: true },
                Todo::Unmap { .. } => Answer::Unmapped { place, done: true },
                Todo::Barrier { .. } => Answer::Settled { place },
            };
            self.registry.vmm_answered(UI, window, answer, self.now);
            self.now += ECHO_WAIT;
        }
        let settled = std::mem::take(&mut self.registry.outbox.settled);
        settled.into_iter().map(|one| (one.token, one.status)).collect()
    }
}

/// "app" exported a page in this mode, and "ui" sees it in its window.
fn seen(mode: Mode) -> (World, Export, HandleId, WindowId) {
    let mut w = friends();
    let window = w.registry.open_window(UI, 16 * PAGE);
    let export = w.try_export(page(), None, mode).unwrap();
    w.grant_ui(export);
    let handle = w.attach_window(export.uuid, ALL).handle;
    w.map_window(handle, 0, 1).unwrap();
    assert_eq!(w.registry.detach(w.ui, handle), Err(Status::Busy), "it is being mapped");
    assert_eq!(w.obey(window), [(1, Status::Ok)]);
    assert_eq!(w.state_of(handle), State::Mapped);
    (w, export, handle, window)
}

#[test]
fn pages_in_a_window_are_in_use_until_the_vmm_and_all_others_let_go() {
    let (mut w, export, handle, window) = seen(Mode::ZeroCopy);
    let told = w.release(export, true);
    assert_eq!((told.state, told.use_count), (State::Releasing, 1));
    assert_eq!(w.state_of(handle), State::Revoked);
    assert!(w.registry.outbox.observe.is_empty(), "it is still mapped: a look tells nothing");
    assert_eq!(w.obey(window), []);
    let observe = std::mem::take(&mut w.registry.outbox.observe);
    let key = *observe.first().expect("now it does");
    for held in [true, false] {
        assert!(w.state(export).is_ok(), "not told yet");
        let (look, memory) = w.registry.look(key).expect("somebody may hold it");
        drop(memory);
        w.registry.observed(look, held, w.now);
    }
    assert!(w.heard(w.app).contains(&(EventKind::Released, Some(export.handle))));
    assert_eq!(w.registry.unmap(w.ui, MappingId(1), 2), Ok(true), "nothing is there any more");
    w.registry.detach(w.ui, handle).unwrap();
    w.registry.take_outbox();
    assert_eq!((w.held(), w.registry.buffer_count()), (0, 0));
}

#[test]
fn a_copy_in_a_window_is_charged_to_who_sees_it() {
    let (mut w, export, _, window) = seen(Mode::Copy);
    assert_eq!(w.release(export, true).state, State::Released);
    let bytes = |w: &World| w.registry.vms.get(&UI).map(Vm::bytes_mapped);
    assert_eq!(bytes(&w), Some(PAGE), "until the VMM has unmapped it");
    w.obey(window);
    assert_eq!(bytes(&w), Some(0));
}

#[test]
fn a_look_that_began_before_a_mapping_counts_for_nothing() {
    let (mut w, export, handle, window) = seen(Mode::ZeroCopy);
    w.registry.unmap(w.ui, MappingId(1), 2).unwrap();
    assert_eq!(w.obey(window), [(2, Status::Ok)]);
    let key = *w.registry.outbox.observe.first().expect("a look");
    let (look, _) = w.registry.look(key).expect("a look");
    w.map_window(handle, PAGE, 3).unwrap();
    w.obey(window);
    w.registry.unmap(w.ui, MappingId(2), 4).unwrap();
    w.obey(window);
    w.registry.observed(look, false, w.now);
    w.registry.detach(w.ui, handle).unwrap();
    assert_eq!(w.use_count(export), 1, "another look has to tell");
}

#[test]
fn another_connection_is_asked_nothing_of_before() {
    let (mut w, export, handle, window) = seen(Mode::ZeroCopy);
    w.map_window(handle, PAGE, 5).unwrap();
    w.registry.close_window(UI);
    let other = w.registry.open_window(UI, 16 * PAGE);
    assert_eq!(w.obey(window), [], "the old one's thread");
    assert_eq!(w.obey(other), []);
    assert_eq!(w.use_count(export), 2, "an attachment, and who knows who still sees it");
    w.map_window(handle, PAGE, 6).unwrap();
    assert_eq!(w.obey(other), [(6, Status::Ok)]);
}

#[test]
fn a_mapping_that_lives_explains_what_one_that_ended_left() {
    let (mut w, export, handle, window) = seen(Mode::ZeroCopy);
    w.map_window(handle, PAGE, 2).unwrap();
    w.obey(window);
    w.registry.unmap(w.ui, MappingId(1), 3).unwrap();
    assert_eq!(w.obey(window), [(3, Status::Ok)]);
    assert_eq!(w.use_count(export), 1, "the attachment, nobody else");
}
