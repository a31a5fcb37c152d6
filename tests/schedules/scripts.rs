//! What VMs and clients do: random things that a driver or program may do, until they let go.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bufshare::protocol::{
    Cancel, Opcode, Resp, RespAttach, RespExport, RespMap, RespState, RespSync, State, Unmap, flag,
    peer, vq,
};
use shuttle::rand::{Rng, thread_rng};
use uuid::Uuid;
use zerocopy::IntoBytes;

use crate::common::{
    Attach, Export, FREE, Grant, Map, PAGE, READ_WRITE, Sync, handle_request, header,
};
use crate::guest::Guest;
use crate::host::Client;
use crate::ids::{Access, Cookie};
use crate::protocol::Status;
use crate::registry::{self, SyncRequest};
use crate::world::{Bell, point};

const COOKIE: u32 = 7;
const PATIENCE: Duration = Duration::from_secs(9);

/// What they know of each other.
#[derive(Default)]
pub struct Shared {
    /// UUIDs.
    pub exported: Mutex<Vec<[u8; 16]>>,
    /// Nobody does anything but BEGIN and END: nothing else wakes anybody.
    pub quiet: bool,
    /// The daemon told nobody what it knew when it left.
    pub left: AtomicBool,
}

impl Shared {
    fn any(&self) -> Option<[u8; 16]> {
        let exported = self.exported.lock().expect("no panic");
        (!exported.is_empty()).then(|| exported[thread_rng().gen_range(0..exported.len())])
    }

    /// Waits a while for an export.
    fn patiently(&self) -> Option<[u8; 16]> {
        for _ in 0..100 {
            if let Some(one) = self.any() {
                return Some(one);
            }
            shuttle::thread::yield_now();
        }
        None
    }
}

fn maybe() -> bool {
    thread_rng().gen_bool(0.5)
}

fn rarely() -> bool {
    thread_rng().gen_bool(0.1)
}

fn bits() -> u16 {
    [flag::SYNC_READ, flag::SYNC_WRITE, flag::SYNC_READ | flag::SYNC_WRITE]
        [thread_rng().gen_range(0..3)]
}

fn timeout() -> Duration {
    [Duration::from_millis(1), Duration::from_millis(3), PATIENCE][thread_rng().gen_range(0..3)]
}

/// Holds what it has for a while: for a few steps of others, or as long as they may wait.
fn linger(bell: &Bell) {
    match thread_rng().gen_range(0..3) {
        0 => (0..thread_rng().gen_range(0..40)).for_each(|_| point()),
        _ => bell.pause(Duration::from_millis(thread_rng().gen_range(0..4))),
    }
}

/// A BEGIN that is not answered yet.
struct Begun {
    handle: u64,
    flags: u16,
    head: u16,
    patient: bool,
}

fn begin(guest: &mut Guest, handle: u64) -> Begun {
    let (flags, timeout) = (bits(), timeout());
    let timeout_ns = u64::try_from(timeout.as_nanos()).expect("short");
    let begin = Sync { flags, cookie: COOKIE, handle, timeout_ns, ..Default::default() };
    let head = guest.submit(vq::SYNC, &begin.bytes(), size_of::<RespSync>());
    Begun { handle, flags, head, patient: timeout >= PATIENCE }
}

/// Waits for the bits, and gives them back.
fn end(guest: &mut Guest, begun: Begun) {
    let Begun { handle, flags, head, patient } = begun;
    match guest.wait::<RespSync>(vq::SYNC, head) {
        Ok(_) => {
            linger(&guest.bell());
            let end = Sync { flags: flags | flag::SYNC_END, handle, ..Default::default() };
            let head = guest.submit(vq::SYNC, &end.bytes(), size_of::<RespSync>());
            let _ = guest.wait::<RespSync>(vq::SYNC, head);
        }
        Err(refusal) => served(refusal.status, patient),
    }
}

/// All hold what they have for a few milliseconds, so who waits for seconds gets it.
fn served(status: Status, patient: bool) {
    assert!(!patient || status != Status::TimedOut, "nobody serves who is patient");
}

/// BEGIN and END; between them the answers to others may come, or a CANCEL of it.
fn access(guest: &mut Guest, handle: u64) {
    let begun = begin(guest, handle);
    if rarely() {
        let (hdr, handle) = (header(Opcode::Cancel, 0), handle.into());
        let cancel = Cancel { hdr, handle, cookie: COOKIE.into(), ..Default::default() };
        let _ = guest.control::<Resp>(cancel.as_bytes());
    }
    end(guest, begun);
}

/// Another session or a pause, perhaps with a BEGIN under way. Returns whether its handles are dead;
/// `None` where there is no daemon any more.
fn disturb(guest: &mut Guest, handle: u64) -> Option<bool> {
    let begun = maybe().then(|| begin(guest, handle));
    match thread_rng().gen_range(0..8) {
        0 => guest.reset(),
        1 => {
            guest.disconnect();
            if !guest.connect() {
                return None;
            }
        }
        other => {
            if other < 5 {
                guest.pause();
            }
            if let Some(begun) = begun {
                end(guest, begun);
            }
            return Some(false);
        }
    }
    Some(true)
}

fn grant(guest: &mut Guest, handle: u64, peer_id: u32, access: u32) {
    let flags = if maybe() && access == 0 { flag::GRANT_FORCE } else { 0 };
    let lifetime_ms = if rarely() { 2 } else { 0 };
    let request = Grant { flags, handle, peer_id, access, lifetime_ms };
    let _ = guest.control::<Resp>(&request.bytes());
}

/// An exporter.
pub fn export(guest: &mut Guest, shared: &Shared) {
    for _ in 0..thread_rng().gen_range(1..=2) {
        let segments = vec![(FREE, PAGE)];
        let request = Export { segments, ..Default::default() };
        let Ok(export) = guest.control::<RespExport>(&request.bytes()) else { return };
        let handle = export.handle.get();
        let importer = 5 - guest.peer.0;
        grant(guest, handle, peer::HOST, READ_WRITE);
        grant(guest, handle, importer, READ_WRITE);
        shared.exported.lock().expect("no panic").push(export.uuid);
        let mut alive = true;
        for _ in 0..thread_rng().gen_range(1..6) {
            match thread_rng().gen_range(0..if shared.quiet { 3 } else { 6 }) {
                0..=2 => access(guest, handle),
                3 => grant(guest, handle, if maybe() { peer::HOST } else { importer }, 0),
                4 => {
                    let query = handle_request(Opcode::Query, 0, handle);
                    let _ = guest.control::<RespState>(&query);
                }
                _ => match disturb(guest, handle) {
                    Some(dead) => alive = !dead,
                    None => return,
                },
            }
            if !alive {
                break;
            }
        }
        if alive {
            release(guest, handle, shared);
        }
    }
}

fn release(guest: &mut Guest, handle: u64, shared: &Shared) {
    let force = if maybe() { flag::RELEASE_FORCE } else { 0 };
    let request = handle_request(Opcode::Release, force, handle);
    let Ok(answer) = guest.control::<RespState>(&request) else { return };
    match State::from_wire(answer.state.get()) {
        Some(State::Released) => guest.note_released(handle),
        Some(State::Releasing) => {
            guest.until(|guest| guest.was_released(handle) || shared.left.load(Ordering::SeqCst));
        }
        state => panic!("{state:?} of what is released"),
    }
}

/// An importer.
pub fn import(guest: &mut Guest, shared: &Shared) {
    for _ in 0..thread_rng().gen_range(1..=3) {
        let Some(uuid) = shared.patiently() else { return };
        let attach = Attach { uuid, ..Default::default() };
        let Ok(attached) = guest.control::<RespAttach>(&attach.bytes()) else { continue };
        let handle = attached.handle.get();
        let mapping = maybe().then(|| {
            let map = Map { handle, segments: vec![(FREE, PAGE)], ..Default::default() };
            guest.control::<RespMap>(&map.bytes()).ok()
        });
        for _ in 0..thread_rng().gen_range(1..4) {
            access(guest, handle);
        }
        if !shared.quiet && maybe() {
            match disturb(guest, handle) {
                Some(false) => {}
                Some(true) => continue,
                None => return,
            }
        }
        if let Some(mapped) = mapping.flatten() {
            let unmap = Unmap { hdr: header(Opcode::Unmap, 0), mapping: mapped.mapping };
            let _ = guest.control::<Resp>(unmap.as_bytes());
        }
        let detach = handle_request(Opcode::Detach, 0, handle);
        let _ = guest.control::<Resp>(&detach);
    }
}

/// A client of the host.
pub fn consume(client: &Client, shared: &Shared) {
    let id = client.id;
    for round in 0..thread_rng().gen_range(1..=2) {
        let Some(uuid) = shared.patiently() else { break };
        let uuid = Uuid::from_bytes(uuid);
        let notice = maybe();
        let acquired = client.ask(move |hub| {
            let acquired = hub.host_acquire(id, uuid, Access::ALL, false, notice)?;
            let outside = acquired.backing.outside.clone();
            outside.foreign.fetch_add(1, Ordering::SeqCst);
            Ok::<_, Status>((acquired.lease, outside))
        });
        let Ok((lease, outside)) = acquired else { continue };
        if maybe() {
            outside.begin_work();
            let (host, outside) = (client.host.clone(), Arc::clone(&outside));
            // As long as it works, not all are at rest.
            let device = Bell::new();
            shuttle::thread::spawn(move || {
                (0..thread_rng().gen_range(0..300)).for_each(|_| point());
                outside.end_work();
                host.look_at_fences();
                device.retire();
            });
        }
        if maybe() {
            let cookie = Cookie(round);
            let bits = if maybe() { Access::READ } else { Access::ALL };
            let timeout = timeout();
            let sync = SyncRequest { bits, offset: 0, len: 0, nonblock: false, timeout, cookie };
            let begun = client.ask(move |hub| hub.host_begin(id, lease, sync, false));
            if rarely() {
                let _ = client.ask(move |hub| hub.host_cancel(id, cookie));
            }
            let begun = match begun {
                Ok(registry::Begun::Now(_)) => true,
                Ok(registry::Begun::Waits) => {
                    let status = client.ended(cookie);
                    served(status, timeout >= PATIENCE);
                    status == Status::Ok
                }
                Err(_) => false,
            };
            if begun {
                linger(&client.bell);
                // What it copies is no work of the host socket's thread.
                if let Ok(ended) = client.ask(move |hub| hub.host_end(id, lease, sync)) {
                    let _ = client.finish_end(ended);
                }
            }
        }
        let foreign = outside.clone();
        let close = move || {
            foreign.foreign.fetch_sub(1, Ordering::SeqCst);
        };
        if maybe() {
            close();
            client.ask(move |hub| hub.host_release(id, lease, false)).expect("a lease");
        } else {
            client.ask(move |hub| hub.host_release(id, lease, false)).expect("a lease");
            point();
            close();
        }
    }
    client.ask(move |hub| hub.client_gone(id));
}
