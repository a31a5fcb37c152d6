//! The registry's promises to host clients that export, and about them.

use super::*;
use crate::limits::{MAX_CLIENT_BYTES, MAX_CLIENT_EXPORTS, MAX_HOST_BYTES, MAX_HOST_EXPORTS};

const IMPORT: Wants = Wants { peers: false, import: true };

/// The host may share with "ui".
fn lenders() -> World {
    let rule = Rule { from: Side::One(PeerId::HOST), to: Side::One(UI), read_only: false };
    let mut w = World::with(vec![rule]);
    assert_eq!(w.registry.next_event(w.ui, IMPORT), None);
    w
}

impl World {
    fn try_lend(&mut self, client: ClientId, size: u64) -> Result<Export, Status> {
        let what = Description { size, ..page() };
        let ticket = self.registry.begin_client_export(client, what, false)?;
        let made = Exported { observable: false, ..self.made(Mode::ZeroCopy) };
        let (handle, uuid) = self.registry.finish_client_export(ticket, Ok(made))?;
        Ok(Export { handle, uuid })
    }

    /// A page of a client that "ui" attached and mapped.
    fn lent(&mut self, client: ClientId) -> (Export, HandleId) {
        let export = self.try_lend(client, PAGE).unwrap();
        self.grant_lent(client, export, ALL).unwrap();
        let request =
            AttachRequest { uuid: export.uuid, access: ALL, zero_copy: false, window: false };
        let handle = self.registry.attach(self.ui, request, self.now).unwrap().handle;
        let request = MapRequest { handle, offset: 0, len: PAGE, access: ALL };
        let ticket = self.registry.begin_map(self.ui, request, false).unwrap();
        self.registry.finish_map(ticket, Ok(self.memory.clone())).unwrap();
        (export, handle)
    }

    fn grant_lent(&mut self, client: ClientId, of: Export, access: Access) -> Result<(), Status> {
        let (once, force, lifetime) = (false, false, Duration::ZERO);
        let request = GrantRequest { handle: of.handle, to: UI, access, once, force, lifetime };
        self.registry.grant(SessionId::of_client(client), request, self.now)
    }

    fn take_back(&mut self, client: ClientId, of: Export) -> Result<(State, u32), Status> {
        self.registry.release_of(client, LeaseId(of.handle.0), false)
    }

    fn lender_told(&mut self, client: ClientId) -> Vec<(EventKind, HandleId)> {
        let next = || self.registry.take_export_event(client);
        std::iter::from_fn(next).map(|event| (event.kind, event.handle)).collect()
    }

    fn fill_ui(&mut self, handle: HandleId) -> (CopyTicket, Copy<Rc<()>>) {
        let begun = self.registry.begin_handle(self.ui, handle, at_once(READ), (1, 9), self.now);
        if begun == Ok(Begun::Waits) {
            // Its memory is the client's, so that the host's fences come first.
            for look in self.registry.take_outbox().fences {
                self.registry.fence_over(look.wait, Status::Ok);
            }
        }
        self.registry.fill(self.ui, handle, &begin(READ)).unwrap().expect("something to copy")
    }
}

#[test]
fn a_loan_ends_with_the_last_copy_and_is_told_once() {
    let mut w = lenders();
    let (export, handle) = w.lent(ANNE);
    assert_eq!(w.lender_told(ANNE), [(EventKind::Busy, export.handle)]);
    let (ticket, copy) = w.fill_ui(handle);
    assert_eq!(w.take_back(ANNE, export), Ok((State::Releasing, 1)));
    assert_eq!(w.take_back(ANNE, export), Ok((State::Releasing, 1)), "as it is");
    assert_eq!(w.grant_lent(ANNE, export, READ), Err(Status::Revoked));
    assert_eq!(w.lender_told(ANNE), []);
    drop(copy);
    w.registry.finish_copy(ticket, true);
    assert!(w.registry.take_outbox().exporters.contains(&ANNE));
    assert_eq!(w.lender_told(ANNE), [(EventKind::Released, export.handle)]);
    assert_eq!(w.lender_told(ANNE), []);
    assert_eq!(w.take_back(ANNE, export), Err(Status::NoEnt));
    assert_eq!(w.registry.host_charged(), (0, 0));
    assert_eq!(w.registry.query(w.ui, handle).unwrap().state, State::Revoked);
}

#[test]
fn who_is_gone_is_told_nothing_and_its_memory_goes_with_the_last_copy() {
    let mut w = lenders();
    let (export, handle) = w.lent(ANNE);
    let (ticket, copy) = w.fill_ui(handle);
    w.registry.client_gone(ANNE);
    assert_eq!(w.registry.query(w.ui, handle).unwrap().state, State::Revoked);
    assert_eq!(w.registry.host_charged(), (1, PAGE), "the copy needs it");
    assert_eq!(w.registry.lingering(PeerId::HOST), 0);
    drop(copy);
    w.registry.finish_copy(ticket, true);
    assert_eq!(w.registry.host_charged(), (0, 0));
    assert_eq!((w.lender_told(ANNE), w.registry.buffer_count()), (vec![], 0));
    assert!(w.registry.host_info(export.uuid).is_none());
    w.registry.detach(w.ui, handle).unwrap();
    w.registry.take_outbox();
    assert_eq!(w.held(), 0);
}

#[test]
fn memory_that_comes_after_its_client_is_gone_is_given_up() {
    let mut w = lenders();
    let ticket = w.registry.begin_client_export(ANNE, page(), false).unwrap();
    w.registry.client_gone(ANNE);
    let made = w.made(Mode::ZeroCopy);
    assert_eq!(w.registry.finish_client_export(ticket, Ok(made)), Err(Status::Io));
    let ticket = w.registry.begin_client_export(BERT, page(), false).unwrap();
    assert_eq!(w.registry.finish_client_export(ticket, Err(Status::Fault)), Err(Status::Fault));
    w.registry.take_outbox();
    assert_eq!((w.held(), w.registry.host_charged()), (0, (0, 0)));
    w.registry.client_gone(BERT);
}

#[test]
fn limits_of_one_and_of_all() {
    let mut w = lenders();
    assert_eq!(w.try_lend(ANNE, MAX_CLIENT_BYTES + PAGE).unwrap_err(), Status::Quota);
    w.try_lend(ANNE, MAX_CLIENT_BYTES).unwrap();
    assert_eq!(w.try_lend(ANNE, PAGE).unwrap_err(), Status::Quota);
    let others = MAX_HOST_BYTES / MAX_CLIENT_BYTES;
    for client in 2..=others {
        w.try_lend(ClientId(client), MAX_CLIENT_BYTES).unwrap();
    }
    assert_eq!(w.try_lend(ClientId(99), PAGE).unwrap_err(), Status::Quota);
    w.registry.client_gone(ANNE);
    for client in 2..=others {
        w.registry.client_gone(ClientId(client));
    }
    assert_eq!(w.registry.host_charged(), (0, 0));
    for client in 1..=u64::from(MAX_HOST_EXPORTS / MAX_CLIENT_EXPORTS) {
        for _ in 0..MAX_CLIENT_EXPORTS {
            w.try_lend(ClientId(client), PAGE).unwrap();
        }
        assert_eq!(w.try_lend(ClientId(client), PAGE).unwrap_err(), Status::Quota);
    }
    assert_eq!(w.try_lend(ClientId(99), PAGE).unwrap_err(), Status::Quota);
    let too_big = w.registry.begin_client_export(ClientId(99), page(), true);
    assert_eq!(too_big.unwrap_err(), Status::Quota);
}

#[test]
fn numbers_of_leases_and_exports_are_never_the_same() {
    let mut w = lenders();
    let of_vm = w.export();
    w.grant(of_vm);
    let lent = w.try_lend(ANNE, PAGE).unwrap();
    let lease = w.try_acquire(ANNE, of_vm, ALL).unwrap();
    assert_ne!(lent.handle.0, lease.0);
    // Another client's number is none.
    assert_eq!(w.take_back(BERT, lent), Err(Status::NoEnt));
    assert_eq!(w.registry.release_of(BERT, lease, true), Err(Status::NoEnt));
    assert_eq!(w.registry.release_of(ANNE, lease, true), Ok((State::Released, 0)));
    assert_eq!(w.take_back(ANNE, lent), Ok((State::Released, 0)));
}

#[test]
fn what_came_and_went_untold_is_not_told() {
    let mut w = lenders();
    let (export, handle) = w.lent(ANNE);
    w.registry.client_gone(BERT);
    w.registry.close_session(w.ui);
    assert_eq!(w.lender_told(ANNE), [], "it is idle, as it was told last");
    assert_eq!(w.registry.detach(w.ui, handle), Err(Status::Revoked));
    let session = w.registry.open_session(UI, true).unwrap();
    w.ui = session;
    // What is gone with its response has nothing left to tell.
    let request =
        AttachRequest { uuid: export.uuid, access: READ, zero_copy: false, window: false };
    w.registry.attach(w.ui, request, w.now).unwrap();
    assert_eq!(w.take_back(ANNE, export), Ok((State::Released, 0)));
    assert_eq!(w.lender_told(ANNE), []);
}
