//! SYNC: who waits for whom, and what is seen after it.

use super::*;
use bufshare::host::client::Event;
use bufshare::protocol::{RespSync, access, flag};
use std::time::Instant;

const READ: u16 = flag::SYNC_READ;
const WRITE: u16 = flag::SYNC_WRITE;
const NONBLOCK: u16 = flag::SYNC_NONBLOCK;
const FIVE_SECONDS: u64 = 5_000_000_000;

/// A guest's buffer, and a program on the host with a lease of it.
pub struct Shared {
    pub bed: Bed,
    pub buffer: Buffer,
    pub client: Client,
    pub lease: Lease,
}

pub fn shared(pages: u64) -> Shared {
    let mut bed = bed();
    let buffer = bed.offered(pages);
    let mut client = bed.client();
    let lease = acquire(&mut client, &buffer);
    Shared { bed, buffer, client, lease }
}

impl Shared {
    pub fn host_begin(&mut self, bits: u32) {
        self.client.begin(self.lease.id, host_access(bits), SOON).expect("BEGIN of the host");
    }

    pub fn host_end(&mut self, bits: u32) -> u64 {
        self.client.end(self.lease.id, host_access(bits)).expect("END of the host")
    }

    pub fn begin(&mut self, flags: u16) -> Reply<RespSync> {
        self.bed.guest.begin(sync(&self.buffer, flags))
    }

    pub fn end(&mut self, flags: u16) -> u64 {
        self.bed.guest.end(sync(&self.buffer, flags)).expect("END").generation.get()
    }

    pub fn start(&mut self, flags: u16, timeout_ns: u64) -> u16 {
        let request = Sync { timeout_ns, ..sync(&self.buffer, flags) };
        self.bed.guest.sync_start::<RespSync>(&request.bytes())
    }
}

/// [dev-sync-1]
#[test]
fn a_sync_reads_or_writes() {
    let mut bed = bed();
    let buffer = bed.exported(1);
    bed.guest.begin(sync(&buffer, 0)).refused(Status::Inval);
    bed.guest.begin(sync(&buffer, NONBLOCK)).refused(Status::Inval);
    bed.guest.end(sync(&buffer, 0)).refused(Status::Inval);
}

/// [dev-sync-2]
#[test]
fn a_range_lies_inside_the_buffer() {
    let mut bed = bed();
    let buffer = bed.exported(2);
    let size = buffer.size;
    for (offset, len) in
        [(0, size + 1), (1, size), (size, 1), (size + 1, 0), (u64::MAX, 1), (1, u64::MAX)]
    {
        let request = Sync { offset, len, ..sync(&buffer, READ) };
        bed.guest.begin(request).refused(Status::Range);
        bed.guest.end(request).refused(Status::Range);
    }
    for (offset, len) in [(0, 0), (0, size), (1, size - 1), (size - 1, 1), (7, 0)] {
        let request = Sync { offset, len, ..sync(&buffer, READ | WRITE) };
        bed.guest.begin(request).expect("inside");
        bed.guest.end(request).expect("inside");
    }
}

/// [dev-sync-3]
#[test]
fn a_holder_does_what_it_may() {
    let mut s = shared(1);
    let uuid = Uuid::from_bytes(s.buffer.uuid);
    for (may, other) in [(access::READ, access::WRITE), (access::WRITE, access::READ)] {
        let lease = s.client.acquire(uuid, may, false).expect("ACQUIRE");
        for bits in [other, READ_WRITE] {
            let access = host_access(bits);
            host_refused(s.client.begin(lease.id, access, SOON), Status::Access);
            host_refused(s.client.end(lease.id, access), Status::Access);
        }
        s.client.begin(lease.id, host_access(may), SOON).expect("what it may");
        s.client.release(lease).expect("RELEASE");
    }
}

/// [dev-sync-4]
#[test]
fn an_exporter_may_always_write() {
    let mut bed = bed();
    let addr = bed.guest.pages(1);
    let access = access::READ;
    let request = Export { segments: vec![(addr, PAGE)], access, ..Default::default() };
    let export = bed.guest.export(request).expect("EXPORT");
    let buffer = buffer(&export, addr, 1);
    bed.guest.begin(sync(&buffer, READ | WRITE)).expect("BEGIN");
    assert_eq!(bed.guest.end(sync(&buffer, WRITE)).expect("END").generation.get(), 1);
}

/// [dev-sync-5] [dev-sync-7] [dev-sync-8] All pairs of what one holds and the other wants.
#[test]
fn readers_share_and_a_writer_is_alone() {
    let mut s = shared(1);
    for (host, guest, conflict) in [
        (access::READ, READ, false),
        (access::READ, WRITE, true),
        (access::READ, READ | WRITE, true),
        (access::WRITE, READ, true),
        (access::WRITE, WRITE, true),
        (READ_WRITE, READ | WRITE, true),
    ] {
        s.host_begin(host);
        if conflict {
            s.begin(guest | NONBLOCK).refused(Status::Again);
            let head = s.start(guest, FIVE_SECONDS);
            assert!(s.bed.guest.sync_next::<RespSync>(A_WHILE).is_none(), "it waits");
            s.host_end(host);
            let (done, reply) = s.bed.guest.sync_next::<RespSync>(SOON).expect("END frees it");
            assert_eq!(done, head);
            reply.expect("BEGIN");
        } else {
            s.begin(guest | NONBLOCK).expect("no conflict");
            s.host_end(host);
        }
        // Now the other way round.
        let access = host_access(host);
        let tried = s.client.try_begin(s.lease.id, access);
        if conflict {
            host_refused(tried, Status::Again);
        } else {
            tried.expect("no conflict");
        }
        s.end(guest);
        s.client.try_begin(s.lease.id, access).expect("END frees it");
        s.host_end(host);
    }
}

/// [dev-sync-6] [dev-sync-11]
#[test]
fn bits_are_a_state_and_not_a_count() {
    let mut s = shared(1);
    s.end(READ);
    for flags in [READ, READ, WRITE, READ | WRITE, WRITE] {
        s.begin(flags | NONBLOCK).expect("its own bits do not conflict");
    }
    s.end(READ);
    let id = s.lease.id;
    host_refused(s.client.try_begin(id, host_access(access::READ)), Status::Again);
    s.end(WRITE);
    s.client.try_begin(id, host_access(READ_WRITE)).expect("one END was enough");
}

/// [dev-sync-9]
#[test]
fn waits_have_an_end() {
    let mut s = shared(1);
    s.host_begin(READ_WRITE);
    let started = Instant::now();
    s.bed.guest.begin(sync(&s.buffer, READ)).refused(Status::TimedOut);
    assert!(started.elapsed() < Duration::from_secs(1), "a wait of 0 is no wait");
    let started = Instant::now();
    let request = Sync { timeout_ns: 80_000_000, ..sync(&s.buffer, READ) };
    s.bed.guest.begin(request).refused(Status::TimedOut);
    let waited = started.elapsed();
    assert!(waited >= Duration::from_millis(80), "{waited:?}");
    assert!(waited < Duration::from_secs(5), "{waited:?}");
    s.host_end(READ_WRITE);
    s.begin(READ | NONBLOCK).expect("a wait that ended holds back nobody");
}

/// [dev-sync-9] `timeout_ns` is bounded by `max_wait_ms`.
#[test]
fn no_wait_is_for_ever() {
    let mut s = shared(1);
    let limit = Duration::from_millis(s.bed.guest.config.max_wait_ms.get().into());
    s.host_begin(READ_WRITE);
    let started = Instant::now();
    s.start(READ, u64::MAX);
    let (_, reply) = s.bed.guest.sync_next::<RespSync>(limit + SOON).expect("an end");
    reply.refused(Status::TimedOut);
    assert!(started.elapsed() >= limit);
}

/// [dev-sync-10]
#[test]
fn who_comes_first_is_served_first() {
    let mut s = shared(1);
    let mut late = s.bed.client();
    let late_lease = acquire(&mut late, &s.buffer);
    s.host_begin(access::READ);
    let writer = s.start(WRITE, FIVE_SECONDS);
    assert!(s.bed.guest.sync_next::<RespSync>(A_WHILE).is_none(), "it waits");
    let read = host_access(access::READ);
    host_refused(late.try_begin(late_lease.id, read), Status::Again);
    let cookie = late.submit_begin(late_lease.id, read, SOON).expect("BEGIN");
    s.host_end(access::READ);
    let (done, reply) = s.bed.guest.sync_next::<RespSync>(SOON).expect("the writer");
    assert_eq!(done, writer);
    reply.expect("BEGIN");
    late.dispatch().expect("dispatch");
    assert_eq!(late.take_generation(cookie).expect("no refusal"), None, "the reader waits");
    s.end(WRITE);
    let mut got = None;
    let served = wait_for(SOON, || {
        late.dispatch().expect("dispatch");
        got = late.take_generation(cookie).expect("no refusal");
        got.is_some()
    });
    assert!(served, "the reader is served");
    assert_eq!(got, Some(1));
}

/// [dev-sync-12]
#[test]
fn the_generation_counts_completed_writes() {
    let mut s = shared(1);
    s.client.watch(Some(Uuid::from_bytes(s.buffer.uuid))).expect("WATCH");
    assert!(matches!(s.client.next_event(Some(SOON)), Ok(Some(Event::Offered(_)))));
    assert_eq!(s.begin(WRITE).expect("BEGIN").generation.get(), 0);
    assert_eq!(s.end(READ), 0, "END|READ completes nothing");
    assert_eq!(s.end(WRITE), 1);
    assert_eq!(s.end(WRITE), 2, "END without BEGIN counts as well");
    s.bed.guest.end(Sync { len: 2 * PAGE, ..sync(&s.buffer, WRITE) }).refused(Status::Range);
    let mut seen = 0;
    while seen < 2 {
        match s.client.next_event(Some(SOON)).expect("connected") {
            Some(Event::Changed(buffer)) => {
                assert!(buffer.generation > seen, "{buffer:?} after {seen}");
                seen = buffer.generation;
            }
            other => panic!("{other:?}"),
        }
    }
    s.host_begin(access::WRITE);
    assert_eq!(s.host_end(access::READ), 2);
    assert_eq!(s.host_end(access::WRITE), 3);
    assert_eq!(s.begin(READ).expect("BEGIN").generation.get(), 3);
    assert_eq!(s.bed.guest.query(s.buffer.handle).expect("QUERY").generation.get(), 3);
    let news = s.client.next_event(Some(QUIET)).expect("connected");
    assert_eq!(news, None, "its own write is no news");
}

/// [dev-sync-13] Both directions, ranges included.
#[test]
fn what_was_written_is_seen() {
    let mut s = shared(4);
    let guest = &mut s.bed.guest;
    guest.begin(sync(&s.buffer, WRITE)).expect("BEGIN");
    guest.memory.write(s.buffer.addr, b"first");
    guest.memory.write(s.buffer.addr + 3 * PAGE + 100, b"last");
    guest.end(sync(&s.buffer, WRITE)).expect("END");
    s.host_begin(access::READ);
    assert_eq!(peek(&s.lease, 0, 5), b"first");
    assert_eq!(peek(&s.lease, 3 * PAGE + 100, 4), b"last");
    s.host_end(access::READ);
    let range = HostAccess { bits: access::WRITE, offset: PAGE + 10, len: 20 };
    s.client.begin(s.lease.id, range, SOON).expect("BEGIN");
    poke(&s.lease, PAGE + 10, b"from the host");
    s.client.end(s.lease.id, range).expect("END");
    s.begin(READ).expect("BEGIN");
    assert_eq!(s.bed.guest.memory.read(s.buffer.addr + PAGE + 10, 13), b"from the host");
    assert_eq!(s.bed.guest.memory.read(s.buffer.addr, 5), b"first");
    s.end(READ);
    s.begin(WRITE).expect("BEGIN");
    s.bed.guest.memory.write(s.buffer.addr + 2 * PAGE + 5, b"middle");
    let range = Sync { offset: 2 * PAGE + 5, len: 6, ..sync(&s.buffer, WRITE) };
    s.bed.guest.end(range).expect("END");
    let mut second = s.bed.client();
    let lease = acquire(&mut second, &s.buffer);
    second.begin(lease.id, host_access(access::READ), SOON).expect("BEGIN");
    assert_eq!(peek(&lease, 2 * PAGE + 5, 6), b"middle");
    assert_eq!(peek(&lease, PAGE + 10, 13), b"from the host");
}

/// [dev-sync-14]
#[test]
fn pending_requests_have_a_bound() {
    let mut s = shared(1);
    let limit = s.bed.guest.config.max_waits.get();
    assert!(limit <= u32::from(s.bed.guest.sync_ring().size()) - 2);
    s.host_begin(READ_WRITE);
    for _ in 0..limit {
        s.start(READ, u64::MAX);
    }
    let over = s.start(READ, u64::MAX);
    let (done, reply) = s.bed.guest.sync_next::<RespSync>(SOON).expect("BUSY at once");
    assert_eq!(done, over);
    reply.refused(Status::Busy);
    let end = s.bed.guest.sync_start::<RespSync>(
        &Sync { flags: flag::SYNC_END | READ, ..sync(&s.buffer, 0) }.bytes(),
    );
    let (done, reply) = s.bed.guest.sync_next::<RespSync>(SOON).expect("END finds room");
    assert_eq!(done, end);
    reply.expect("END");
    s.host_end(READ_WRITE);
    for _ in 0..limit {
        s.bed.guest.sync_next::<RespSync>(SOON).expect("all of them").1.expect("BEGIN");
    }
}

/// [dev-sync-14] Of a queue with four entries two may be pending, each in one indirect descriptor.
#[test]
fn a_small_queue_keeps_room() {
    let daemon = Daemon::start(&["a"]);
    let setup = Setup { queue_size: 4, event_buffers: 4, ..Default::default() };
    let mut bed = Bed { guest: setup.connect(&daemon, "a"), daemon };
    let buffer = bed.offered(1);
    let mut client = bed.client();
    let lease = acquire(&mut client, &buffer);
    client.begin(lease.id, host_access(READ_WRITE), SOON).expect("BEGIN");
    let request = Sync { timeout_ns: u64::MAX, ..sync(&buffer, READ) }.bytes();
    let memory = bed.guest.memory.clone();
    let ring = bed.guest.sync_ring();
    let answers: Vec<u64> = (0..3)
        .map(|i| {
            let [from, to, table] = [ring.buffer(40), ring.buffer(16), ring.buffer(32)];
            memory.write(from, &request);
            let parts = [
                Desc { addr: from, len: 40, flags: NEXT, next: 1 },
                Desc { addr: to, len: 16, flags: common::WRITE, next: 0 },
            ];
            memory.write(table, &parts.map(Desc::bytes).concat());
            ring.write_desc(i, Desc { addr: table, len: 32, flags: INDIRECT, next: 0 });
            ring.offer(i);
            ring.kick();
            to
        })
        .collect();
    assert_eq!(ring.wait_used(SOON), Some(Used { id: 2, len: 8 }));
    parse::<RespSync>(&memory.read(answers[2], 8)).refused(Status::Busy);
    client.end(lease.id, host_access(READ_WRITE)).expect("END");
    for id in [0, 1] {
        assert_eq!(bed.guest.sync_ring().wait_used(SOON), Some(Used { id, len: 16 }));
    }
}

/// [dev-sync-17]
#[test]
fn a_holder_that_dies_holds_nothing() {
    let mut s = shared(1);
    s.host_begin(READ_WRITE);
    let head = s.start(WRITE, FIVE_SECONDS);
    assert!(s.bed.guest.sync_next::<RespSync>(A_WHILE).is_none(), "it waits");
    let Shared { mut bed, buffer, client, lease } = s;
    drop((client, lease));
    let (done, reply) = bed.guest.sync_next::<RespSync>(SOON).expect("the holder is gone");
    assert_eq!(done, head);
    assert_eq!(reply.expect("BEGIN").generation.get(), 0, "a death completes nothing");
    bed.guest.end(sync(&buffer, WRITE)).expect("END");
    // And the other way round: a guest that goes away.
    let mut client = bed.client();
    let lease = acquire(&mut client, &buffer);
    bed.guest.begin(sync(&buffer, WRITE)).expect("BEGIN");
    let access = host_access(access::READ);
    let cookie = client.submit_begin(lease.id, access, SOON).expect("BEGIN");
    bed.guest.disconnect();
    let ended = wait_for(SOON, || {
        client.dispatch().expect("dispatch");
        !matches!(client.take_generation(cookie), Ok(None))
    });
    assert!(ended, "its exporter is gone");
    host_refused(client.begin(lease.id, access, SOON), Status::Revoked);
}

/// [dev-sync-18] In COPY mode a byte outside of the synced pages stays as it was.
#[test]
fn a_copy_is_of_the_range() {
    let mut s = shared(4);
    if s.buffer.mode != Mode::Copy {
        skip("this host shares without copies");
        return;
    }
    s.host_begin(access::READ);
    s.host_end(access::READ);
    let guest = &mut s.bed.guest;
    guest.memory.fill(s.buffer.addr, 4 * PAGE, 0x77);
    let range = Sync { offset: PAGE, len: PAGE, ..sync(&s.buffer, WRITE) };
    guest.begin(range).expect("BEGIN");
    guest.end(range).expect("END");
    assert_eq!(peek(&s.lease, PAGE, 8), [0x77; 8], "the range");
    assert_eq!(peek(&s.lease, 0, 8), [0; 8], "in front of it");
    assert_eq!(peek(&s.lease, 2 * PAGE, 8), [0; 8], "behind it");
}
