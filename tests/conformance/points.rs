//! POINT_SIGNAL and POINT_WAIT: who waits for whose numbers.

use super::pair::View;
use super::sync::{Shared, shared};
use super::*;
use bufshare::protocol::{Line, RespPoint, access};
use std::time::Instant;

const ACQUIRE: Line = Line::Acquire;
const RELEASE: Line = Line::Release;
const FIVE_SECONDS: u64 = 5_000_000_000;

fn ready(buffer: &Buffer, point: u64) -> Point {
    Point::new(buffer.handle, ACQUIRE, point)
}

fn done(buffer: &Buffer, point: u64) -> Point {
    Point::new(buffer.handle, RELEASE, point)
}

fn patient(point: Point) -> Point {
    Point { timeout_ns: FIVE_SECONDS, ..point }
}

#[track_caller]
fn waits(guest: &mut Guest) {
    assert!(guest.sync_next::<RespPoint>(A_WHILE).is_none(), "it waits");
}

#[track_caller]
fn ends(guest: &mut Guest, head: u16) -> Reply<u64> {
    let (done, reply) = guest.sync_next::<RespPoint>(SOON).expect("an end");
    assert_eq!(done, head);
    reply.map(|reply| reply.reached.get())
}

/// "a" exports, "b" attaches, for these accesses.
fn attached(access: u32) -> (Pair, Buffer, Buffer) {
    let mut p = pair();
    let buffer = p.exported(1);
    p.grant(&buffer, access);
    let request = Attach { uuid: buffer.uuid, access, ..Default::default() };
    let handle = p.b.attach(request).expect("ATTACH").0.handle.get();
    (p, buffer, Buffer { handle, ..buffer })
}

/// [dev-point-1] [dev-point-6]
#[test]
fn points_advance_on_known_timelines() {
    let (mut p, a, b) = attached(READ_WRITE);
    p.a.signal(ready(&a, 0)).refused(Status::Inval);
    assert_eq!(p.a.signal(ready(&a, 3)), Ok(3));
    for point in [1, 2, 3] {
        p.a.signal(ready(&a, point)).refused(Status::Inval);
        p.b.signal(ready(&b, point)).refused(Status::Inval);
    }
    assert_eq!(p.b.signal(ready(&b, 4)), Ok(4), "there is one ACQUIRE a buffer");
    assert_eq!(p.b.signal(done(&b, 2)), Ok(2), "and RELEASE is another");
    p.b.signal(done(&b, 2)).refused(Status::Inval);
    assert_eq!(p.b.signal(done(&b, u64::MAX)), Ok(u64::MAX));
    p.a.signal(done(&a, 1)).refused(Status::Inval);
    for bad in [2, u32::MAX] {
        p.a.signal(Point { timeline: bad, ..ready(&a, 9) }).refused(Status::Inval);
        p.a.wait_point(Point { timeline: bad, ..ready(&a, 1) }).refused(Status::Inval);
    }
    let again = [Status::Busy, Status::TimedOut, Status::Again].map(|s| s.to_wire().into());
    for error in [16, 0x1_0000].into_iter().chain(again) {
        p.a.signal(Point { error, ..ready(&a, 9) }).refused(Status::Inval);
    }
    let error = Status::Io.to_wire().into();
    p.a.wait_point(Point { error, ..ready(&a, 1) }).refused(Status::Inval);
    p.a.signal(Point { handle: 999, ..ready(&a, 9) }).refused(Status::NoEnt);
    p.a.wait_point(Point { handle: 999, ..ready(&a, 1) }).refused(Status::NoEnt);
    assert_eq!(p.a.wait_point(ready(&a, 4)), Ok(4), "what was refused changed nothing");
}

/// [dev-point-2]
#[test]
fn readers_do_not_say_that_content_is_ready() {
    let (mut p, a, b) = attached(access::READ);
    p.b.signal(ready(&b, 1)).refused(Status::Access);
    assert_eq!(p.b.signal(done(&b, 1)), Ok(1));
    p.a.wait_point(ready(&a, 1)).refused(Status::TimedOut);
    let (mut p, _, b) = attached(access::WRITE);
    assert_eq!(p.b.signal(ready(&b, 1)), Ok(1));
}

/// [dev-point-3] Before the wait, during it, and past the point.
#[test]
fn who_waits_for_a_point_is_told() {
    let (mut p, a, b) = attached(access::READ);
    assert_eq!(p.b.wait_point(ready(&b, 0)), Ok(0));
    let head = p.b.start_wait(patient(ready(&b, 2)));
    waits(&mut p.b);
    p.a.signal(ready(&a, 1)).expect("SIGNAL");
    waits(&mut p.b);
    p.a.signal(ready(&a, 5)).expect("SIGNAL");
    assert_eq!(ends(&mut p.b, head), Ok(5));
    assert_eq!(p.b.wait_point(ready(&b, 3)), Ok(5));
    assert_eq!(p.a.wait_point(ready(&a, 5)), Ok(5));
    p.b.wait_point(ready(&b, 6)).refused(Status::TimedOut);
    // Many of them, and each at its own point.
    let heads: Vec<u16> = (6..26).map(|n| p.b.start_wait(patient(ready(&b, n)))).collect();
    for (n, head) in (6..).zip(heads) {
        p.a.signal(ready(&a, n)).expect("SIGNAL");
        assert_eq!(ends(&mut p.b, head), Ok(n));
    }
}

/// [dev-point-4]
#[test]
fn an_error_is_for_its_point_alone() {
    let (mut p, a, b) = attached(READ_WRITE);
    let heads: Vec<u16> = (1..=3).map(|n| p.b.start_wait(patient(ready(&b, n)))).collect();
    waits(&mut p.b);
    let error = Status::Io.to_wire().into();
    assert_eq!(p.a.signal(Point { error, ..ready(&a, 2) }), Ok(2));
    let ended = [(); 2].map(|()| p.b.sync_next::<RespPoint>(SOON).expect("both end"));
    for (head, reply) in ended {
        match heads.iter().position(|other| *other == head) {
            Some(0) => assert_eq!(reply.expect("1 was passed").reached.get(), 2),
            Some(1) => drop(reply.refused(Status::Io)),
            other => panic!("{other:?} ended"),
        }
    }
    waits(&mut p.b);
    p.a.wait_point(ready(&a, 2)).refused(Status::Io);
    assert_eq!(p.a.wait_point(ready(&a, 1)), Ok(2));
    p.a.signal(ready(&a, 3)).expect("SIGNAL");
    assert_eq!(ends(&mut p.b, heads[2]), Ok(3));
    assert_eq!(p.a.wait_point(ready(&a, 2)), Ok(3), "it is passed");
    // Of several holders one has an error: the exporter is told when all are there.
    let mut s = shared(1);
    let mut second = s.bed.client();
    let lease = acquire(&mut second, &s.buffer);
    let head = s.bed.guest.start_wait(patient(done(&s.buffer, 1)));
    waits(&mut s.bed.guest);
    second.signal(lease.id, RELEASE, 1, Status::Io).expect("SIGNAL");
    second.signal(lease.id, RELEASE, 2, Status::Ok).expect("SIGNAL");
    waits(&mut s.bed.guest);
    s.client.signal(s.lease.id, RELEASE, 1, Status::Ok).expect("SIGNAL");
    ends(&mut s.bed.guest, head).refused(Status::Io);
    assert_eq!(s.bed.guest.wait_point(done(&s.buffer, 1)), Ok(1));
}

/// [dev-point-5] [dev-cancel-1] [dev-cancel-2]
#[test]
fn waits_end_as_those_of_sync() {
    let (mut p, a, b) = attached(READ_WRITE);
    let started = Instant::now();
    p.b.wait_point(ready(&b, 1)).refused(Status::TimedOut);
    assert!(started.elapsed() < Duration::from_secs(1), "a wait of 0 is no wait");
    let started = Instant::now();
    let limited = Point { timeout_ns: 80_000_000, ..ready(&b, 1) };
    p.b.wait_point(limited).refused(Status::TimedOut);
    assert!(started.elapsed() >= Duration::from_millis(80));
    let [one, two] =
        [1, 2].map(|cookie| p.b.start_wait(Point { cookie, timeout_ns: u64::MAX, ..ready(&b, 1) }));
    waits(&mut p.b);
    p.b.cancel(b.handle, 2).expect("CANCEL");
    ends(&mut p.b, two).refused(Status::Canceled);
    waits(&mut p.b);
    p.b.cancel(b.handle, 0).expect("CANCEL");
    ends(&mut p.b, one).refused(Status::Canceled);
    p.b.cancel(b.handle, 0).refused(Status::NoEnt);
    let head = p.b.start_wait(patient(ready(&b, 1)));
    waits(&mut p.b);
    p.revoke(&a);
    ends(&mut p.b, head).refused(Status::Revoked);
    p.b.wait_point(ready(&b, 1)).refused(Status::Revoked);
    p.b.signal(done(&b, 1)).refused(Status::Revoked);
    // The exporter goes away.
    let (mut p, _, b) = attached(READ_WRITE);
    let head = p.b.start_wait(patient(ready(&b, 1)));
    waits(&mut p.b);
    p.a.reset(Stop::WithBase);
    ends(&mut p.b, head).refused(Status::Revoked);
}

/// [dev-point-7] [dev-point-8] Leases and attachments alike, and those that never signalled anything.
#[test]
fn the_exporter_waits_for_all_holders() {
    let (mut p, a, b) = attached(READ_WRITE);
    p.a.grant(Grant { handle: a.handle, ..Default::default() }).expect("GRANT");
    let mut client = Client::connect(&p.daemon.host_socket(), "test").expect("host socket");
    let lease = acquire(&mut client, &a);
    let head = p.a.start_wait(patient(done(&a, 2)));
    p.b.signal(done(&b, 2)).expect("SIGNAL");
    waits(&mut p.a);
    client.signal(lease.id, RELEASE, 1, Status::Ok).expect("SIGNAL");
    waits(&mut p.a);
    client.signal(lease.id, RELEASE, 3, Status::Ok).expect("SIGNAL");
    assert_eq!(ends(&mut p.a, head), Ok(2), "the lowest of all");
    assert_eq!(p.b.wait_point(done(&b, 2)), Ok(2), "its own");
    assert_eq!(client.wait(lease.id, RELEASE, 1, SOON).expect("its own"), 3);
    // One that comes later starts at 0, and one that goes holds up nobody.
    let head = p.a.start_wait(patient(done(&a, 3)));
    let late = acquire(&mut client, &a);
    p.b.signal(done(&b, 3)).expect("SIGNAL");
    waits(&mut p.a);
    client.release(late).expect("RELEASE");
    assert_eq!(ends(&mut p.a, head), Ok(3));
    let head = p.a.start_wait(patient(done(&a, 4)));
    drop((client, lease));
    waits(&mut p.a);
    p.b.detach(b.handle).expect("DETACH");
    assert_eq!(ends(&mut p.a, head), Ok(u64::MAX), "there is nobody");
    let b = p.attach(&a);
    let head = p.a.start_wait(patient(done(&a, 4)));
    waits(&mut p.a);
    p.b.signal(Point::new(b, RELEASE, 3)).expect("SIGNAL");
    p.b.disconnect();
    assert_eq!(ends(&mut p.a, head), Ok(u64::MAX));
}

/// [dev-point-7] [dev-point-8] A holder whose right was revoked holds up nobody either.
#[test]
fn a_revoked_holder_is_none() {
    let (mut p, a, b) = attached(READ_WRITE);
    let head = p.a.start_wait(patient(done(&a, 1)));
    waits(&mut p.a);
    p.revoke(&a);
    ends(&mut p.a, head).expect("it is gone");
    p.b.signal(done(&b, 1)).refused(Status::Revoked);
}

/// [dev-point-9] [dev-queue-3]
#[test]
fn pending_waits_have_a_bound() {
    let Shared { mut bed, buffer, client, lease } = shared(1);
    let limit = bed.guest.config.max_waits.get();
    let wait = Point { timeout_ns: u64::MAX, ..done(&buffer, 1) };
    for _ in 0..limit {
        bed.guest.start_wait(wait);
    }
    let over = bed.guest.start_wait(wait);
    ends(&mut bed.guest, over).refused(Status::Busy);
    let begun = bed.guest.sync_start::<bufshare::protocol::RespSync>(
        &sync(&buffer, bufshare::protocol::flag::SYNC_READ).bytes(),
    );
    let (head, reply) = bed.guest.sync_next::<bufshare::protocol::RespSync>(SOON).expect("BEGIN");
    assert_eq!(head, begun);
    reply.expect("it need not wait");
    let signal = bed.guest.start_signal(ready(&buffer, 1));
    assert_eq!(ends(&mut bed.guest, signal), Ok(1));
    drop((client, lease));
    for _ in 0..limit {
        bed.guest.sync_next::<RespPoint>(SOON).expect("all of them").1.expect("nobody is left");
    }
}

/// [dev-point-10]
#[test]
fn who_gave_up_its_buffer_waits_no_more() {
    let mut s = shared(1);
    let Shared { bed: Bed { guest, .. }, buffer, client, lease } = &mut s;
    let head = guest.start_wait(patient(done(buffer, 1)));
    waits(guest);
    guest.release(buffer.handle).expect("RELEASE");
    ends(guest, head).refused(Status::Canceled);
    if buffer.mode == Mode::Copy {
        guest.wait_point(done(buffer, 1)).refused(Status::NoEnt);
        return;
    }
    guest.wait_point(done(buffer, 1)).refused(Status::Canceled);
    assert_eq!(guest.signal(ready(buffer, 1)), Ok(1), "as END");
    assert_eq!(client.wait(lease.id, ACQUIRE, 1, SOON).expect("WAIT"), 1);
}

/// [dev-point-3] [dev-point-7] A swapchain of one image: content and its release, in turns.
#[test]
fn a_hundred_frames_by_points_alone() {
    let mut p = pair();
    let buffer = p.granted(1);
    let view: View = p.view(&buffer);
    let held = Buffer { handle: view.handle, ..buffer };
    for n in 1..=100u64 {
        let byte = u8::try_from(n).expect("small");
        let frame = p.b.start_wait(patient(ready(&held, n)));
        p.a.memory.fill(buffer.addr, PAGE, byte);
        p.a.end(sync(&buffer, bufshare::protocol::flag::SYNC_WRITE)).expect("END");
        p.a.signal(ready(&buffer, n)).expect("SIGNAL");
        assert_eq!(ends(&mut p.b, frame), Ok(n));
        p.b.begin(sync(&held, bufshare::protocol::flag::SYNC_READ)).expect("BEGIN");
        assert_eq!(p.b.memory.read(view.addr, 1), [byte]);
        p.b.end(sync(&held, bufshare::protocol::flag::SYNC_READ)).expect("END");
        let over = p.a.start_wait(patient(done(&buffer, n)));
        p.b.signal(done(&held, n)).expect("SIGNAL");
        assert_eq!(ends(&mut p.a, over), Ok(n));
    }
}

/// `spec/host-socket.md`, POINT_SIGNAL and POINT_WAIT.
#[test]
fn programs_on_the_host_take_part() {
    let mut s = shared(1);
    let id = s.lease.id;
    let cookie = s.client.submit_wait(id, ACQUIRE, 1, SOON).expect("WAIT");
    s.client.dispatch().expect("dispatch");
    assert_eq!(s.client.take_reached(cookie).expect("no refusal"), None, "it waits");
    s.bed.guest.signal(ready(&s.buffer, 2)).expect("SIGNAL");
    let mut got = None;
    let told = wait_for(SOON, || {
        s.client.dispatch().expect("dispatch");
        got = s.client.take_reached(cookie).expect("no refusal");
        got.is_some()
    });
    assert!(told && got == Some(2), "{got:?}");
    assert_eq!(s.client.signal(id, ACQUIRE, 3, Status::Ok).expect("it may write"), 3);
    host_refused(s.client.signal(id, ACQUIRE, 3, Status::Ok), Status::Inval);
    host_refused(s.client.wait(id, ACQUIRE, 4, Duration::ZERO), Status::TimedOut);
    host_refused(s.client.wait(999, ACQUIRE, 1, SOON), Status::NoEnt);
    let reader = s.client.acquire(Uuid::from_bytes(s.buffer.uuid), access::READ, false);
    let reader = reader.expect("ACQUIRE");
    host_refused(s.client.signal(reader.id, ACQUIRE, 9, Status::Ok), Status::Access);
    let cookie = s.client.submit_wait(id, ACQUIRE, 9, SOON).expect("WAIT");
    s.client.cancel(cookie).expect("CANCEL");
    host_refused(s.client.take_reached(cookie), Status::Canceled);
    let limit = s.client.daemon().max_waits;
    let cookies: Vec<u64> =
        (0..limit).map(|_| s.client.submit_wait(id, ACQUIRE, 9, SOON).expect("WAIT")).collect();
    host_refused(s.client.wait(id, ACQUIRE, 9, SOON), Status::Busy);
    let error = Status::Io.to_wire().into();
    s.bed.guest.signal(Point { error, ..ready(&s.buffer, 9) }).expect("SIGNAL");
    for cookie in cookies {
        let mut ended = Ok(None);
        wait_for(SOON, || {
            s.client.dispatch().expect("dispatch");
            ended = s.client.take_reached(cookie);
            !matches!(ended, Ok(None))
        });
        host_refused(ended, Status::Io);
    }
}
