//! WATCH and its events: level state, for clients that read and for those that do not.

use std::collections::HashMap;
use std::time::Duration;

use bufshare::host::client::{Access, Client, Event};
use bufshare::host::packet::{self, Wait};
use bufshare::host::wire::{self, Type};
use bufshare::ids::Access as Bits;
use bufshare::protocol::Status;
use bufshare::registry::GrantRequest;
use uuid::Uuid;
use zerocopy::IntoBytes;

use crate::desk::{Desk, READ, Raw, WRITE, grant, request};
use crate::{WAIT, refused};

const SOON: Option<Duration> = Some(Duration::from_secs(5));
const NEVER: Option<Duration> = Some(Duration::from_millis(50));

fn offered(client: &mut Client) -> Uuid {
    match client.next_event(SOON).unwrap() {
        Some(Event::Offered(buffer)) => buffer.uuid,
        other => panic!("{other:?}"),
    }
}

fn changed(client: &mut Client) -> u64 {
    match client.next_event(SOON).unwrap() {
        Some(Event::Changed(buffer)) => buffer.generation,
        other => panic!("{other:?}"),
    }
}

#[test]
fn watch_tells_what_is_then_what_happens() {
    let desk = Desk::start();
    let (first, uuid) = desk.offer("first");
    let mut client = desk.client();
    client.watch(None).unwrap();
    assert_eq!(offered(&mut client), uuid);
    let (second, other) = desk.offer("second");
    assert_eq!(offered(&mut client), other);
    desk.end_write(first);
    assert_eq!(changed(&mut client), 1);
    desk.release(second, false);
    let event = client.next_event(SOON).unwrap();
    assert_eq!(event, Some(Event::Withdrawn { uuid: other, reason: Some(Status::Ok) }));

    // Its own END|WRITE is not told.
    let lease = client.acquire(uuid, WRITE, false).unwrap();
    assert_eq!(client.end(lease.id, Access::WRITE).unwrap(), 2);
    assert_eq!(client.next_event(NEVER).unwrap(), None);
    desk.end_write(first);
    assert_eq!(changed(&mut client), 3);

    // A holder is told that the exporter wants its memory back, and when its lease is dead.
    desk.release(first, false);
    let event = client.next_event(SOON).unwrap();
    assert!(
        matches!(event, Some(Event::Withdrawn { uuid: gone, .. }) if gone == uuid),
        "{event:?}"
    );
    desk.hub.close_session(desk.session);
    let event = client.next_event(SOON).unwrap();
    assert!(matches!(event, Some(Event::Revoked { uuid: gone, .. }) if gone == uuid), "{event:?}");
    assert_eq!(refused(client.begin(lease.id, Access::WRITE, WAIT)), Status::Revoked);
    client.release(lease).unwrap();
}

#[test]
fn a_watch_of_one_buffer_tells_nothing_of_others() {
    let desk = Desk::start();
    let (handle, uuid) = desk.export("mine");
    let mut client = desk.client();
    client.watch(Some(uuid)).unwrap();
    desk.offer("other");
    assert_eq!(client.next_event(NEVER).unwrap(), None);
    let once = GrantRequest { once: true, ..grant(handle, Bits::READ) };
    desk.grant(once);
    assert_eq!(offered(&mut client), uuid);
    // Using up the grant is no withdrawal for who used it.
    let lease = client.acquire(uuid, READ, false).unwrap();
    assert_eq!(client.next_event(NEVER).unwrap(), None);
    assert_eq!(refused(client.acquire(uuid, READ, false)), Status::NoEnt);
    desk.end_write(handle);
    assert_eq!(changed(&mut client), 1);
    desk.release(handle, true);
    let event = client.next_event(SOON).unwrap();
    assert!(matches!(event, Some(Event::Revoked { .. })), "{event:?}");
    client.release(lease).unwrap();
}

/// Taken back by force, a lease whose client asked for notice lives on for a second, no longer.
#[test]
fn who_asked_for_notice_may_finish() {
    let desk = Desk::start();
    let mut client = desk.client();
    client.watch(None).unwrap();
    let both = |client: &mut Client, uuid| {
        let notice = client.acquire_with(uuid, READ, wire::flag::ACQUIRE_NOTICE).unwrap();
        (notice, client.acquire(uuid, READ, false).unwrap())
    };
    let is = |told: Option<Event>, uuid| match told {
        Some(Event::Revoked { uuid: gone, .. }) if gone == uuid => "revoked",
        Some(Event::Withdrawn { uuid: gone, .. }) if gone == uuid => "withdrawn",
        other => panic!("{other:?}"),
    };
    let (handle, uuid) = desk.offer("released");
    assert_eq!(offered(&mut client), uuid);
    let (notice, plain) = both(&mut client, uuid);
    desk.release(handle, true);
    assert_eq!(is(client.next_event(SOON).unwrap(), uuid), "revoked", "the lease without notice");
    assert_eq!(refused(client.begin(plain.id, Access::READ, WAIT)), Status::Revoked);
    client.begin(notice.id, Access::READ, WAIT).unwrap();
    let mut second = desk.client();
    assert_eq!(refused(second.acquire(uuid, READ, false)), Status::NoEnt, "the door is closed");
    loop {
        let Some(told) = client.next_event(SOON).unwrap() else { panic!("not revoked") };
        if is(Some(told), uuid) == "revoked" {
            break;
        }
    }
    assert_eq!(refused(client.begin(notice.id, Access::READ, WAIT)), Status::Revoked);
    client.release(notice).unwrap();
    client.release(plain).unwrap();

    let (handle, uuid) = desk.offer("withdrawn");
    assert_eq!(offered(&mut client), uuid);
    let notice = client.acquire_with(uuid, READ, wire::flag::ACQUIRE_NOTICE).unwrap();
    desk.grant(GrantRequest { force: true, ..grant(handle, Bits::NONE) });
    assert_eq!(is(client.next_event(SOON).unwrap(), uuid), "withdrawn");
    client.begin(notice.id, Access::READ, WAIT).unwrap();
    assert_eq!(is(client.next_event(SOON).unwrap(), uuid), "revoked");
    client.release(notice).unwrap();
    let (_, uuid) = desk.offer("gone");
    assert_eq!(offered(&mut client), uuid);
    let _notice = client.acquire_with(uuid, READ, wire::flag::ACQUIRE_NOTICE).unwrap();
    desk.hub.close_session(desk.session);
    assert_eq!(is(client.next_event(SOON).unwrap(), uuid), "revoked", "its exporter is gone");
}

#[test]
fn a_client_that_does_not_read_stalls_nobody_and_is_told_the_latest() {
    let desk = Desk::start();
    let exports: Vec<_> = (0..400).map(|i| desk.offer(&format!("frame {i}"))).collect();
    let mut slow = desk.client();
    slow.watch(None).unwrap();
    // Requests whose answers it does not take either.
    let deaf = Raw::greeted(&desk.path());
    let list = wire::List { hdr: request(Type::List, 0, 2), after: [0; 16] };
    while packet::send(&deaf.0, list.as_bytes(), None, Wait::Never).is_ok() {}
    let mut brisk = desk.client();
    for round in 1..=20 {
        for (handle, _) in &exports {
            assert_eq!(desk.end_write(*handle), round);
        }
        brisk.list().unwrap();
    }
    let (last, _) = exports[7];
    desk.release(last, false);
    let mut latest = HashMap::new();
    let mut events = 0;
    while let Some(event) = slow.next_event(Some(Duration::from_millis(300))).unwrap() {
        events += 1;
        match event {
            Event::Offered(buffer) | Event::Changed(buffer) => {
                latest.insert(buffer.uuid, buffer.generation);
            }
            Event::Withdrawn { uuid, .. } => drop(latest.remove(&uuid)),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(latest.len(), exports.len() - 1);
    assert!(latest.values().all(|generation| *generation == 20), "{latest:?}");
    assert!(events < exports.len() * 20, "{events} events: it was told everything");
}
