//! Small lives, each made for one thing that the large ones of `scripts` hardly ever meet.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bufshare::protocol::{
    self as wire, Cancel, Event, Line, Opcode, Resp, RespAttach, RespExport, RespMap, RespPoint,
    RespState, RespSync, State, Unmap, flag, vq,
};
use shuttle::rand::{Rng, thread_rng};
use uuid::Uuid;
use zerocopy::IntoBytes;

use crate::common::{
    Attach, Export, FREE, Grant, Map, PAGE, READ_WRITE, Sync, handle_request, header,
};
use crate::dmabuf::Outside;
use crate::guest::Guest;
use crate::host::Client;
use crate::ids::{Access, Cookie};
use crate::protocol::{Status, peer};
use crate::registry::{Begun, PointWait, Signal};
use crate::world::point;

/// Longer than anything of a case takes, unless a wake-up is lost.
const PATIENCE: Duration = Duration::from_secs(9);
/// When two do something at the same time: everything before it is over.
const LATER: Duration = Duration::from_millis(100);
const COOKIE: u32 = 7;
const IMPORTER: u32 = 3;

/// What they know of each other.
#[derive(Default)]
pub struct Case {
    outside: Mutex<Option<Arc<Outside>>>,
    /// The importer has what it was offered.
    attached: AtomicBool,
}

fn some_steps(most: u32) {
    (0..thread_rng().gen_range(0..=most)).for_each(|_| point());
}

fn maybe() -> bool {
    thread_rng().gen_bool(0.5)
}

fn export(guest: &mut Guest, to: &[u32]) -> u64 {
    let request = Export { segments: vec![(FREE, PAGE)], ..Default::default() };
    let export = guest.control::<RespExport>(&request.bytes()).expect("EXPORT");
    let handle = export.handle.get();
    for peer_id in to {
        let (access, lifetime_ms) = (READ_WRITE, 0);
        let request = Grant { flags: 0, handle, peer_id: *peer_id, access, lifetime_ms };
        guest.control::<Resp>(&request.bytes()).expect("GRANT");
    }
    handle
}

fn release(guest: &mut Guest, handle: u64) {
    let request = handle_request(Opcode::Release, flag::RELEASE_FORCE, handle);
    guest.control::<RespState>(&request).expect("RELEASE");
}

/// Waits for this event, and takes it.
fn told(guest: &mut Guest, kind: Opcode) -> Event {
    let is_it = move |event: &Event| event.kind.get() == kind.to_wire();
    guest.until(|guest| guest.events.iter().any(is_it));
    let at = guest.events.iter().position(is_it).expect("just seen");
    guest.events.remove(at).expect("just seen")
}

/// Attaches what it is offered.
fn attach(guest: &mut Guest) -> u64 {
    let uuid = told(guest, Opcode::EvtOffered).uuid;
    let attach = Attach { uuid, ..Default::default() };
    guest.control::<RespAttach>(&attach.bytes()).expect("ATTACH").handle.get()
}

fn detach(guest: &mut Guest, handle: u64) {
    guest.control::<Resp>(&handle_request(Opcode::Detach, 0, handle)).expect("DETACH");
}

fn sync(guest: &mut Guest, handle: u64, flags: u16) -> u16 {
    let timeout_ns = PATIENCE.as_nanos() as u64;
    let request = Sync { flags, cookie: COOKIE, handle, timeout_ns, ..Default::default() };
    guest.submit(vq::SYNC, &request.bytes(), size_of::<RespSync>())
}

/// The VM is paused while its requests are served: they are answered when it runs again.
pub fn paused(guest: &mut Guest) {
    let handle = export(guest, &[]);
    for _ in 0..thread_rng().gen_range(1..4) {
        let query = handle_request(Opcode::Query, 0, handle);
        let queries: Vec<u16> = (0..thread_rng().gen_range(1..4))
            .map(|_| guest.submit(vq::CONTROL, &query, size_of::<RespState>()))
            .collect();
        let begin = sync(guest, handle, flag::SYNC_READ);
        some_steps(60);
        guest.pause();
        for head in queries {
            guest.wait::<RespState>(vq::CONTROL, head).expect("QUERY");
        }
        guest.wait::<RespSync>(vq::SYNC, begin).expect("BEGIN");
    }
    release(guest, handle);
}

/// An exporter whose VMM goes away for good, or resets the device and never starts it again.
pub fn leaves(guest: &mut Guest) {
    export(guest, &[IMPORTER]);
    told(guest, Opcode::EvtBusy);
    some_steps(60);
    if maybe() { guest.disconnect() } else { guest.reset_device() }
}

/// Its importer is told, whatever its own driver does meanwhile: nothing.
pub fn is_left(guest: &mut Guest) {
    let handle = attach(guest);
    let revoked = told(guest, Opcode::EvtRevoked);
    assert_eq!(revoked.handle.get(), handle);
    detach(guest, handle);
}

/// An exporter behind whose bits an importer waits; behind that are fences.
pub fn holds(guest: &mut Guest) {
    let handle = export(guest, &[peer::HOST, IMPORTER]);
    let begin = sync(guest, handle, flag::SYNC_WRITE);
    guest.wait::<RespSync>(vq::SYNC, begin).expect("BEGIN");
    told(guest, Opcode::EvtBusy);
    guest.bell().sleep(Some(LATER), || false);
    some_steps(40);
    let end = sync(guest, handle, flag::SYNC_WRITE | flag::SYNC_END);
    guest.wait::<RespSync>(vq::SYNC, end).expect("END");
    // The importer lets go last.
    guest.until(|guest| guest.events.iter().any(|e| e.kind.get() == Opcode::EvtIdle.to_wire()));
    release(guest, handle);
}

/// The importer gives up just when its turn comes, and it is in front of fences.
pub fn gives_up(guest: &mut Guest, case: &Case) {
    let handle = attach(guest);
    let outside = loop {
        if let Some(outside) = case.outside.lock().expect("no panic").clone() {
            break outside;
        }
        guest.bell().pause(Duration::from_millis(1));
    };
    let begin = sync(guest, handle, flag::SYNC_WRITE);
    guest.bell().sleep(Some(LATER), || false);
    some_steps(80);
    let (hdr, handle_le) = (header(Opcode::Cancel, 0), handle.into());
    let cancel = Cancel { hdr, handle: handle_le, cookie: COOKIE.into(), ..Default::default() };
    // It may not have arrived.
    while guest.control::<Resp>(cancel.as_bytes()).is_err() {
        point();
    }
    let canceled = guest.wait::<RespSync>(vq::SYNC, begin).expect_err("canceled");
    assert_eq!(canceled.status, Status::Canceled);
    // Time passes when nobody has anything to do any more.
    guest.bell().pause(Duration::from_millis(1));
    assert_eq!(outside.watched(), 0, "fences are watched that nobody waits for");
    outside.end_work();
    detach(guest, handle);
}

/// A client whose device works on the buffer for a long time.
pub fn works(client: &Client, case: &Case) {
    let id = client.id;
    let acquired = loop {
        let offered = client.ask(move |hub| {
            let page = hub.host_page(Uuid::nil(), 1);
            hub.host_acquire(id, page.first()?.uuid, Access::ALL, false, false).ok()
        });
        match offered {
            Some(acquired) => break acquired,
            None => client.bell.pause(Duration::from_millis(1)),
        }
    };
    let outside = acquired.backing.outside.clone();
    outside.begin_work();
    drop(acquired);
    *case.outside.lock().expect("no panic") = Some(outside.clone());
    client.bell.pause(Duration::from_millis(2));
    while outside.works() {
        client.bell.pause(Duration::from_millis(1));
    }
    client.ask(move |hub| hub.client_gone(id));
}

fn points(opcode: Opcode, handle: u64, line: Line, at: u64) -> Vec<u8> {
    let mut hdr = header(opcode, 0);
    hdr.cookie = COOKIE.into();
    let timeout = if opcode == Opcode::PointWait { PATIENCE.as_nanos() as u64 } else { 0 };
    let request = wire::Point {
        hdr,
        handle: handle.into(),
        timeline: line.to_wire().into(),
        error: 0.into(),
        point: at.into(),
        timeout_ns: timeout.into(),
    };
    request.as_bytes().to_vec()
}

/// Signals a point, or waits for it; only who is gone is not served.
fn reach(guest: &mut Guest, opcode: Opcode, handle: u64, line: Line, at: u64) -> bool {
    let head = guest.submit(vq::SYNC, &points(opcode, handle, line, at), size_of::<RespPoint>());
    match guest.wait::<RespPoint>(vq::SYNC, head) {
        Ok(_) => true,
        Err(refusal) => {
            assert_ne!(refusal.status, Status::TimedOut, "{opcode:?} {line:?} {at} of {handle}");
            false
        }
    }
}

/// An exporter that draws the next image when all have done with the one before.
pub fn draws(guest: &mut Guest) {
    let handle = export(guest, &[peer::HOST, IMPORTER]);
    told(guest, Opcode::EvtBusy);
    for at in 1..=3 {
        // A wait for what nobody has begun, or not.
        let early = maybe().then(|| {
            let wait = points(Opcode::PointWait, handle, Line::Release, at);
            guest.submit(vq::SYNC, &wait, size_of::<RespPoint>())
        });
        assert!(reach(guest, Opcode::PointSignal, handle, Line::Acquire, at));
        match early {
            Some(head) => {
                guest.wait::<RespPoint>(vq::SYNC, head).expect("all reach it, or are gone");
            }
            None => assert!(reach(guest, Opcode::PointWait, handle, Line::Release, at)),
        }
    }
    if maybe() {
        release(guest, handle);
    } else {
        guest.disconnect();
    }
}

/// An importer that shows one image after the other, and may leave between two.
pub fn shows(guest: &mut Guest) {
    let handle = attach(guest);
    for at in 1..=3 {
        let shown = reach(guest, Opcode::PointWait, handle, Line::Acquire, at);
        if thread_rng().gen_bool(0.2) {
            return guest.disconnect();
        }
        if !shown || !reach(guest, Opcode::PointSignal, handle, Line::Release, at) {
            break;
        }
    }
    detach(guest, handle);
}

/// A program that does the same.
pub fn views(client: &Client) {
    let id = client.id;
    let offered = move |hub: &crate::hub::Hub| {
        let page = hub.host_page(Uuid::nil(), 1);
        Some(hub.host_acquire(id, page.first()?.uuid, Access::ALL, false, false).ok()?.lease)
    };
    // It may come too late.
    let lease = (0..20).find_map(|_| {
        client.bell.pause(Duration::from_millis(u64::from(maybe())));
        client.ask(offered)
    });
    let leave = || client.ask(move |hub| hub.client_gone(id));
    let Some(lease) = lease else { return leave() };
    for at in 1..=3 {
        let cookie = Cookie(u32::try_from(at).expect("small"));
        let wait = PointWait { line: Line::Acquire, point: at, timeout: PATIENCE, cookie };
        let waits = client.ask(move |hub| hub.host_wait(id, lease, wait, false));
        let status = match waits {
            Ok(Begun::Now(_)) => Status::Ok,
            Ok(Begun::Waits) => client.ended(cookie),
            Err(status) => status,
        };
        assert_ne!(status, Status::TimedOut, "WAIT {at} of a client");
        if status != Status::Ok || thread_rng().gen_bool(0.2) {
            break;
        }
        let signal = Signal { line: Line::Release, point: at, status };
        let _ = client.ask(move |hub| hub.host_signal(id, lease, signal));
    }
    leave();
}

/// An exporter whose importer sees the buffer in its window, until it may not any more.
pub fn lends(guest: &mut Guest, case: &Case) {
    let handle = export(guest, &[IMPORTER]);
    // BUSY may not be told: the importer may be gone again before that.
    while !case.attached.load(Ordering::SeqCst) {
        guest.bell().pause(Duration::from_millis(1));
    }
    some_steps(200);
    match thread_rng().gen_range(0..6) {
        0 => guest.disconnect(),
        1 => guest.reset(),
        2 | 3 => {
            let flags = flag::GRANT_FORCE;
            let (peer_id, access, lifetime_ms) = (IMPORTER, 0, 0);
            let request = Grant { flags, handle, peer_id, access, lifetime_ms };
            guest.control::<Resp>(&request.bytes()).expect("GRANT");
            some_steps(40);
            take_back(guest, handle, flag::RELEASE_FORCE);
        }
        _ => take_back(guest, handle, if maybe() { flag::RELEASE_FORCE } else { 0 }),
    }
}

/// RELEASE, and RELEASED in the answer or later.
fn take_back(guest: &mut Guest, handle: u64, flags: u16) {
    let request = handle_request(Opcode::Release, flags, handle);
    let answer = guest.control::<RespState>(&request).expect("RELEASE");
    match State::from_wire(answer.state.get()) {
        Some(State::Released) => guest.note_released(handle),
        _ => guest.until(|guest| guest.was_released(handle)),
    }
}

/// An importer that maps it here and there, and whose VM may be paused, reset or started anew meanwhile.
pub fn looks(guest: &mut Guest, case: &Case) {
    let handle = attach(guest);
    case.attached.store(true, Ordering::SeqCst);
    let mut mappings = Vec::new();
    for _ in 0..thread_rng().gen_range(1..4) {
        // Two at once, at the same place or not.
        let heads: Vec<u16> = (0..thread_rng().gen_range(1..3))
            .map(|_| {
                let shm_offset = thread_rng().gen_range(0..2) * PAGE;
                let map = Map { flags: 0, handle, shm_offset, len: Some(PAGE), ..Map::default() };
                guest.submit(vq::CONTROL, &map.bytes(), size_of::<RespMap>())
            })
            .collect();
        match thread_rng().gen_range(0..10) {
            0 => {
                guest.disconnect();
                assert!(guest.connect(), "the daemon stays");
                return;
            }
            1 => {
                guest.reset();
                return seen_no_longer(guest);
            }
            2..5 => {
                some_steps(60);
                guest.pause();
            }
            _ => {}
        }
        for head in heads {
            let mapped = guest.wait::<RespMap>(vq::CONTROL, head);
            mappings.extend(mapped.map(|mapped| mapped.mapping));
        }
        if maybe()
            && let Some(mapping) = mappings.pop()
        {
            let unmap = Unmap { hdr: header(Opcode::Unmap, 0), mapping };
            guest.control::<Resp>(unmap.as_bytes()).expect("UNMAP");
        }
    }
    for mapping in mappings {
        let unmap = Unmap { hdr: header(Opcode::Unmap, 0), mapping };
        guest.control::<Resp>(unmap.as_bytes()).expect("UNMAP");
    }
    detach(guest, handle);
    seen_no_longer(guest);
}

/// When nobody has anything to do any more, nothing is shown.
fn seen_no_longer(guest: &mut Guest) {
    for _ in 0..10 {
        // A VMM takes some milliseconds.
        guest.bell().pause(Duration::from_millis(5));
    }
    assert_eq!(guest.screen.as_ref().map(|screen| screen.shows()), Some(0), "places");
}

impl Outside {
    /// Device work goes on.
    pub fn works(&self) -> bool {
        self.busy.load(Ordering::SeqCst)
    }
}
