//! A guest that wants to break the daemon: whatever it sends, every chain comes back once, nothing of
//! the daemon grows, and another VM of the same daemon is served as if nothing were.
//!
//! The random part lasts BUFSHARE_HOSTILE_SECONDS (5 if unset) and prints its seed;
//! BUFSHARE_HOSTILE_SEED repeats a run.

mod common;

use std::collections::BTreeSet;
use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use bufshare::protocol::{Opcode, RespPeerInfo, RespState, Status, access, flag, vq};
use common::*;
use vhost::VhostBackend;

/// xorshift64*: enough to be different every time, and to be repeated.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[usize::try_from(self.below(from.len() as u64)).expect("small")]
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.next() as u8).collect()
    }
}

fn from_env(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|e| panic!("{name}={text}: {e}")))
}

/// What must be the same before and after.
#[derive(Debug)]
struct Footprint {
    fds: usize,
    rss_kib: u64,
}

fn footprint(daemon: &Daemon) -> Footprint {
    Footprint { fds: daemon.fds(), rss_kib: daemon.rss_kib() }
}

/// Panics unless the daemon has no more descriptors, and not much more memory, than before.
#[track_caller]
fn assert_flat(daemon: &Daemon, before: &Footprint) {
    wait_for(SOON, || daemon.fds() <= before.fds);
    let after = footprint(daemon);
    let names = || {
        let mut names = daemon.fd_names();
        names.sort();
        names
    };
    assert!(after.fds <= before.fds, "{before:?}, then {after:?}: {:#?}", names());
    // Allocators keep some of what they once had; a leak of a minute is far beyond this.
    assert!(after.rss_kib <= before.rss_kib + 4096, "{before:?}, then {after:?}");
}

/// Another VM that does ordinary things until it is told to stop; each has to be quick.
fn bystander(daemon: &Daemon, stop: &AtomicBool) {
    let mut guest = Guest::connect(daemon, "b");
    let addr = guest.pages(16);
    let mut rounds = 0;
    while !stop.load(Ordering::Relaxed) {
        let started = Instant::now();
        let request = Export { segments: vec![(addr, 16 * PAGE)], ..Default::default() };
        let handle = guest.export(request).expect("EXPORT").handle.get();
        guest.grant(Grant { handle, ..Default::default() }).expect("GRANT");
        let request = Sync { handle, flags: flag::SYNC_WRITE, ..Default::default() };
        guest.begin(request).expect("BEGIN");
        guest.end(request).expect("END");
        guest.query(handle).expect("QUERY");
        guest.release(handle).expect("RELEASE");
        let took = started.elapsed();
        assert!(took < Duration::from_secs(2), "a round of the other VM took {took:?}");
        rounds += 1;
    }
    assert!(rounds > 0, "the other VM was never served");
}

/// Runs an attack on VM "a" beside an ordinary VM "b", twice, and compares the daemon between the two:
/// the first run warms allocators and caches up.
fn attack(queue_size: u16, mut hostile: impl FnMut(&Daemon, &mut Guest)) {
    let vms = vec!["name=a,max-exports=64".into(), "name=b".into()];
    let daemon = Launch { vms, ..Default::default() }.start();
    let mut before = None;
    for _ in 0..2 {
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            let other = scope.spawn(|| bystander(&daemon, &stop));
            let setup = Setup { queue_size, ..Default::default() };
            let mut guest = setup.connect(&daemon, "a");
            // Even a panic here has to end the other thread.
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                hostile(&daemon, &mut guest);
            }));
            stop.store(true, Ordering::Relaxed);
            drop(guest);
            other.join().expect("the other VM");
            if let Err(panic) = result {
                std::panic::resume_unwind(panic);
            }
        });
        // Sessions that ended close their descriptors in their own time.
        thread::sleep(Duration::from_millis(200));
        match &before {
            None => before = Some(footprint(&daemon)),
            Some(before) => assert_flat(&daemon, before),
        }
    }
}

/// Collects one used entry for each head that was offered.
#[track_caller]
fn collect(ring: &mut Ring, mut heads: Vec<u16>) -> Vec<Used> {
    let mut all = Vec::new();
    while !heads.is_empty() {
        let used = ring.wait_used(SOON);
        let used = used.unwrap_or_else(|| panic!("{} chains did not come back", heads.len()));
        let at = heads.iter().position(|head| u32::from(*head) == used.id);
        heads.swap_remove(at.unwrap_or_else(|| panic!("{used:?} was not offered")));
        all.push(used);
    }
    assert_eq!(ring.pop_used(), None, "more used entries than chains");
    all
}

#[test]
fn every_opcode_on_every_queue() {
    attack(256, |_, guest| {
        for queue in [vq::CONTROL, vq::SYNC] {
            for first in (0..=u16::MAX).step_by(64) {
                let ring = &mut guest.rings[usize::from(queue)];
                for kind in first..=first + 63 {
                    let mut request = [0; 128];
                    request[..2].copy_from_slice(&kind.to_le_bytes());
                    let head = ring.prepare(&[&request], &[128]).expect("free");
                    ring.offer(head);
                }
                ring.kick();
                for _ in 0..64 {
                    let answer = ring.wait(SOON).expect("every chain comes back");
                    let status = u16::from_le_bytes([answer.bytes[0], answer.bytes[1]]);
                    let status = Status::from_wire(status).expect("a known status");
                    // Of zeros, PEER_INFO alone is a request that means something: the first peer.
                    let peer_info = answer.len as usize == size_of::<RespPeerInfo>();
                    assert_eq!(status == Status::Ok, peer_info, "{status:?}, {} bytes", answer.len);
                    assert!(peer_info || answer.len == 8);
                }
            }
        }
    });
}

/// Lengths at every border, for every request that exists, in one and in two descriptors.
#[test]
fn lengths() {
    attack(256, |_, guest| {
        for op in Opcode::ALL {
            for queue in [vq::CONTROL, vq::SYNC] {
                let mut request = vec![0xff; 4200];
                request[..2].copy_from_slice(&op.to_wire().to_le_bytes());
                for len in [0, 1, 2, 7, 8, 9, 15, 16, 40, 79, 80, 96, 4199, 4200] {
                    for room in [0, 1, 7, 8, 9, 39, 40, 56, 64, 88, 4200] {
                        let half = len / 2;
                        let two: [&[u8]; 2] = [&request[..half], &request[half..len]];
                        let answer = guest.raw(queue, &two, &[room / 2, room - room / 2]);
                        assert!(answer.len == 0 || answer.len >= 8, "{answer:?}");
                        assert_eq!(answer.len == 0, room < 8);
                    }
                }
            }
        }
    });
}

#[test]
fn loops_and_nests() {
    attack(16, |_, guest| {
        let ring = guest.control_ring();
        let scratch = ring.buffer(4096);
        let memory = guest.memory.clone();
        let ring = guest.control_ring();
        let next = |next| Desc { addr: scratch, len: 8, flags: NEXT, next };
        for i in 0..16 {
            ring.write_desc(i, next((i + 1) % 16));
        }
        for _ in 0..200 {
            let heads: Vec<u16> = (0..16).collect();
            for head in &heads {
                ring.offer(*head);
            }
            ring.kick();
            assert!(collect(ring, heads).iter().all(|used| used.len == 0), "a loop was answered");
        }
        // A table that contains itself, one whose entries point behind it, one that never ends.
        let inner = [
            Desc { addr: scratch, len: 4096, flags: INDIRECT, next: 0 },
            Desc { addr: scratch, len: 32, flags: NEXT, next: 2 },
            Desc { addr: scratch, len: 32, flags: NEXT | WRITE, next: 1 },
        ];
        memory.write(scratch, &inner.map(Desc::bytes).concat());
        let lens = [0, 1, 15, 16, 17, 32, 48, 4096, 1 << 20, u32::MAX - 15, u32::MAX];
        for len in lens {
            for flags in [INDIRECT, INDIRECT | WRITE, INDIRECT | NEXT] {
                ring.write_desc(0, Desc { addr: scratch, len, flags, next: 1 });
                ring.offer(0);
                ring.kick();
                assert_eq!(collect(ring, vec![0])[0].len, 0, "{len} {flags}");
            }
        }
    });
}

/// Requests whose buffers lie at the borders of memory, behind them, and around 2^64.
#[test]
fn addresses() {
    attack(16, |_, guest| {
        let end = BASE + Region::default().len;
        let addrs = [0, BASE - 8, BASE - 1, end - 8, end - 1, end, 1 << 52, u64::MAX - 7, u64::MAX];
        let ring = guest.control_ring();
        let good = ring.buffer(256);
        let to = ring.buffer(256);
        guest.memory.write(good, &handle_request(Opcode::Query, 0, 1));
        let ring = guest.control_ring();
        for addr in addrs {
            for len in [1, 8, 16, 0x1000, 0x8000_0000, u32::MAX] {
                let bad_read = [
                    Desc { addr, len, flags: NEXT, next: 1 },
                    Desc { addr: to, len: 128, flags: WRITE, next: 0 },
                ];
                let bad_write = [
                    Desc { addr: good, len: 16, flags: NEXT, next: 1 },
                    Desc { addr, len, flags: WRITE, next: 0 },
                ];
                for descs in [bad_read, bad_write] {
                    for (i, desc) in descs.iter().enumerate() {
                        ring.write_desc(i as u16, *desc);
                    }
                    ring.offer(0);
                    ring.kick();
                    collect(ring, vec![0]);
                }
            }
        }
        // Responses to where the requests, the rings and the daemon's next answer are.
        for addr in [good, ring.desc_at(), ring.avail_at() + 8, ring.used_at() + 8] {
            ring.write_desc(0, Desc { addr: good, len: 16, flags: NEXT, next: 1 });
            ring.write_desc(1, Desc { addr, len: 64, flags: WRITE, next: 0 });
            ring.offer(0);
            ring.kick();
            let used = ring.wait_used(SOON);
            assert!(used.is_some(), "the chain comes back, wherever its answer went");
        }
    });
}

/// Numbers in requests: sizes, counts and offsets that overflow whatever they are added to.
#[test]
fn numbers() {
    attack(256, |_, guest| {
        let (export, addr) = guest.export_pages(4);
        let (handle, object) = (export.handle.get(), export.uuid);
        let edge = [0, 1, PAGE, 1 << 31, 1 << 32, 1 << 52, 1 << 63, u64::MAX - PAGE + 1, u64::MAX];
        for a in edge {
            for b in edge {
                let segments = vec![(a, b)];
                let _ = guest.export(Export { segments: segments.clone(), ..Default::default() });
                let both = vec![(addr, PAGE), (a, b), (b, a)];
                let _ = guest.export(Export { segments: both, ..Default::default() });
                let flags = flag::EXPORT_PART;
                let _ = guest.export(Export { flags, segments, object, ..Default::default() });
                let size = Some(b);
                let good = vec![(addr, PAGE)];
                let _ = guest.export(Export { size, segments: good, ..Default::default() });
                let range = Sync { handle, offset: a, len: b, timeout_ns: b, ..Default::default() };
                for flags in [flag::SYNC_READ, flag::SYNC_WRITE] {
                    let _ = guest.begin(Sync { flags, ..range });
                    let _ = guest.end(Sync { flags, ..range });
                }
                let _ = guest.query(a);
                let _ = guest.query_linger(a);
                let lifetime_ms = a;
                let _ = guest.grant(Grant { handle, lifetime_ms, ..Default::default() });
            }
            for count in [0, 1, 65_535, 65_536, 1 << 20, u32::MAX] {
                let good = Export { segments: vec![(addr, PAGE)], ..Default::default() };
                let nr_segments = Some(count);
                let _ = guest.export(Export { nr_segments, ..good.clone() });
                let _ = guest.export(Export { metadata_len: Some(count), ..good });
            }
        }
        // Whatever of it was accepted: it can be given back.
        for handle in 1..4096 {
            if let Ok(state) = guest.release_force(handle) {
                assert_eq!(state.access.get() & !READ_WRITE, 0);
            }
        }
        let addr = guest.pages(1);
        let good = Export { segments: vec![(addr, PAGE)], ..Default::default() };
        guest.export(good).expect("nothing is left over");
    });
}

/// The largest request that a ring can carry, and a count that says so.
#[test]
fn a_huge_request() {
    attack(256, |_, guest| {
        let segments: Vec<_> = (0..20_000).map(|i| (FREE + 2 * i * PAGE, PAGE)).collect();
        for _ in 0..5 {
            let request = Export { segments: segments.clone(), ..Default::default() };
            let refusal = guest.export(request).expect_err("beyond every limit");
            let expected = [Status::TooMany, Status::Quota, Status::Fault];
            assert!(expected.contains(&refusal.status), "{refusal:?}");
        }
        let same = Export { segments: vec![(FREE, PAGE); 20_000], ..Default::default() };
        guest.export(same).refused(Status::Inval);
    });
}

/// A ring whose indices lie: it may be lost until the next reset, but nothing else is.
#[test]
fn broken_rings() {
    attack(16, |daemon, guest| {
        for queue in [vq::CONTROL, vq::EVENT, vq::SYNC] {
            for index in [17, 100, 0x7fff, 0x8000, 0xffff] {
                let ring = &mut guest.rings[usize::from(queue)];
                ring.force_avail_index(index);
                ring.kick();
                ring.offer(999);
                ring.kick();
                thread::sleep(Duration::from_millis(20));
                guest.reset(Stop::WithBase);
                guest.query(1).refused(Status::NoEnt);
            }
        }
        // Heads that are no descriptors cannot come back; those around them do.
        let ring = guest.control_ring();
        let good = handle_request(Opcode::Query, 0, 1);
        let size = size_of::<RespState>() as u32;
        let mut heads = Vec::new();
        for bad in [16, 17, 0x7fff, 0xffff] {
            ring.offer(bad);
            let head = ring.prepare(&[&good], &[size]).expect("free");
            ring.offer(head);
            heads.push(head);
        }
        ring.kick();
        collect(ring, heads);
        assert!(daemon.log().len() < 1 << 20, "the log grows with the attack");
    });
}

/// Event buffers of every broken kind, each while an event waits for one.
#[test]
fn event_buffers() {
    attack(16, |_, guest| {
        // Taken out of the ring: the test puts its own buffers in.
        guest.reset(Stop::WithBase);
        let mut events = 0;
        let ring = guest.event_ring();
        let to = ring.buffer(256);
        let table = ring.buffer(64);
        let end = BASE + Region::default().len;
        let write = Desc { addr: to, len: 64, flags: WRITE, next: 0 };
        let nested = Desc { addr: table, len: 16, flags: INDIRECT, next: 0 };
        guest.memory.write(table, &nested.bytes());
        let broken = [
            Desc { len: 0, ..write },
            Desc { len: 63, ..write },
            Desc { flags: 0, ..write },
            Desc { flags: WRITE | NEXT, next: 0, ..write },
            Desc { flags: WRITE | NEXT, next: 999, ..write },
            Desc { addr: end, ..write },
            Desc { addr: end - 8, ..write },
            Desc { addr: u64::MAX, ..write },
            nested,
            Desc { len: 0, ..nested },
        ];
        // The 16 ordinary buffers of the start are used up first.
        while events < 16 {
            let (pool, part) = used_pool(guest);
            guest.event_ring().wait_used(SOON).expect("BUSY");
            guest.release(part).expect("RELEASE");
            guest.release(pool).expect("RELEASE");
            events += 1;
            if events < 16 && guest.event_ring().wait_used(QUIET).is_some() {
                events += 1;
            }
        }
        let (pool, part) = used_pool(guest);
        for desc in broken {
            let ring = guest.event_ring();
            ring.write_desc(0, desc);
            ring.offer(0);
            ring.kick();
            let used = ring.wait_used(SOON).expect("it comes back");
            assert_eq!(used, Used { id: 0, len: 0 }, "{desc:?}");
        }
        let ring = guest.event_ring();
        ring.write_desc(0, write);
        let mut kinds = Vec::new();
        while kinds.last() != Some(&Opcode::EvtBusy) {
            let ring = guest.event_ring();
            ring.offer(0);
            ring.kick();
            assert_eq!(ring.wait_used(SOON), Some(Used { id: 0, len: 64 }));
            let kind = guest.memory.read(to, 2);
            let kind = Opcode::from_wire(u16::from_le_bytes([kind[0], kind[1]]));
            kinds.push(kind.expect("a known event"));
        }
        assert_eq!(kinds[0], Opcode::EvtResync, "something was missed");
        guest.release(part).expect("RELEASE");
        guest.release(pool).expect("RELEASE");
    });
}

/// A pool and a part of it: makes BUSY, and IDLE when the part is released.
fn used_pool(guest: &mut Guest) -> (u64, u64) {
    let (pool, _) = guest.export_pages(1);
    let part = Export {
        flags: flag::EXPORT_PART,
        segments: vec![(0, PAGE)],
        object: pool.uuid,
        ..Default::default()
    };
    let part = guest.export(part).expect("a part");
    (pool.handle.get(), part.handle.get())
}

/// Connections that end in the middle of a word, and words that nobody says.
#[test]
fn half_sessions() {
    attack(16, |daemon, guest| {
        guest.disconnect();
        let mut random = Random(0x5eed);
        for round in 0..60u32 {
            let mut socket = UnixStream::connect(daemon.socket("a")).expect("connect");
            // A vhost-user header: request, version 1 with need-reply, size of the body.
            let request = random.below(48) as u32;
            let size = random.pick(&[0, 8, 12, 40, 256, 5000, u32::MAX]);
            let mut message: Vec<u8> = [request, 0x9, size].map(u32::to_le_bytes).concat();
            let body = random.below(300) as usize;
            message.extend(random.bytes(body));
            let len = random.below(message.len() as u64 + 1) as usize;
            // It may hang up in the middle of it.
            let _ = socket.write_all(&message[..len]);
            if round % 2 == 0 {
                let _ = socket.shutdown(Shutdown::Write);
            }
        }
        guest.reconnect();
        guest.export_pages(1);
    });
}

/// A VMM that takes away the memory in which the rings are, and gives it back.
#[test]
fn memory_that_comes_and_goes() {
    let region = |i: u64| Region { start: BASE + (i << 30), len: 1 << 20, ..Default::default() };
    attack(64, |_, guest| {
        guest.memory.plug(&region(1));
        let both = guest.memory.table();
        let other: Vec<_> = both[1..].to_vec();
        for _ in 0..20 {
            let frontend = guest.frontend();
            frontend.set_mem_table(&other).expect("SET_MEM_TABLE");
            guest.control_ring().kick();
            guest.sync_ring().kick();
            frontend.set_mem_table(&both).expect("SET_MEM_TABLE");
            guest.query(1).refused(Status::NoEnt);
        }
        guest.memory.unplug(&region(1));
        guest.send_memory_table();
    });
}

/// Memory whose file a VMM cuts off while it is on loan: no page is there to be copied, which is an
/// error of this buffer and of nothing else.
#[test]
fn memory_that_is_cut_off() {
    let vms = vec!["name=a,unsealed-ram".into(), "name=b".into()];
    let daemon = Launch { vms, ..Default::default() }.start();
    let loose = Region { start: BASE + (1 << 30), len: 1 << 20, ..Region::unsealed() };
    let setup = Setup { regions: vec![Region::default(), loose], ..Default::default() };
    let mut guest = setup.connect(&daemon, "a");
    let segments = vec![(loose.start, 16 * PAGE)];
    let export = guest.export(Export { segments, ..Default::default() }).expect("EXPORT");
    let handle = export.handle.get();
    let write = Sync { handle, flags: flag::SYNC_WRITE, ..Default::default() };
    guest.begin(write).expect("BEGIN");
    guest.end(write).expect("END");
    guest.memory.truncate(&loose);
    let refusal = guest.end(write).expect_err("nothing is there to be copied");
    assert!([Status::Io, Status::Fault].contains(&refusal.status), "{refusal:?}");
    assert_eq!(guest.query(handle).expect("QUERY").generation.get(), 1);
    guest.release_force(handle).expect("RELEASE");
    guest.export_pages(1);
    Guest::connect(&daemon, "b").export_pages(1);
}

/// One random request: mostly well-formed, with some of it spoilt.
fn random_request(random: &mut Random, memory: (u64, u64)) -> Vec<u8> {
    let op = random.pick(Opcode::ALL);
    let handle = random.below(40);
    let mut request = match op {
        Opcode::Export => {
            let segments = (0..random.below(6))
                .map(|_| (memory.0 + random.below(memory.1) * PAGE, (1 + random.below(8)) * PAGE))
                .collect();
            let metadata = random.pick(&[0, 0, 8, 88]);
            Export {
                flags: if random.one_in(4) { flag::EXPORT_PART } else { 0 },
                segments,
                metadata_type: if metadata == 0 { 0 } else { random.pick(&[1, 0x8000_0000]) },
                metadata: vec![0; metadata],
                ..Default::default()
            }
            .bytes()
        }
        Opcode::Grant => Grant {
            flags: random.pick(&[0, flag::GRANT_ONCE, flag::GRANT_FORCE]),
            handle,
            access: random.pick(&[0, access::READ, READ_WRITE]),
            lifetime_ms: random.pick(&[0, 1, 50]),
            ..Default::default()
        }
        .bytes(),
        Opcode::Sync => Sync {
            flags: random.below(16) as u16,
            cookie: random.below(4) as u32,
            handle,
            offset: random.pick(&[0, 1, PAGE]),
            len: random.pick(&[0, 1, PAGE]),
            timeout_ns: random.pick(&[0, 1_000_000]),
        }
        .bytes(),
        _ => handle_request(op, random.below(2) as u16, handle),
    };
    if random.one_in(3) {
        let at = random.below(request.len() as u64) as usize;
        request[at] ^= 1 << random.below(8);
    }
    if random.one_in(8) {
        let len = random.below(request.len() as u64) as usize;
        request.truncate(len);
    }
    if random.one_in(16) {
        let len = random.below(300) as usize;
        request = random.bytes(len);
    }
    request
}

/// One random chain, by hand, in the descriptors from `slot` on. Returns how many it may use.
fn random_chain(random: &mut Random, ring: &Ring, slot: u16, parts: &[(u64, u32)]) -> u16 {
    let count = 1 + random.below(6) as u16;
    for i in 0..count {
        let (addr, len) = random.pick(parts);
        let mut desc = Desc { addr, len, flags: 0, next: slot + i + 1 };
        if i + 1 < count {
            desc.flags |= NEXT;
        }
        if random.one_in(2) && i > 0 {
            desc.flags |= WRITE;
        }
        match random.below(24) {
            0 => desc.addr = random.next(),
            1 => desc.len = random.next() as u32,
            2 => desc.flags = random.next() as u16,
            3 => desc.next = random.next() as u16,
            4 => desc.flags |= INDIRECT,
            5 => desc.len = 0,
            _ => {}
        }
        ring.write_desc(slot + i, desc);
    }
    count
}

#[test]
fn random_bytes_and_chains() {
    let seconds = from_env("BUFSHARE_HOSTILE_SECONDS").unwrap_or(5);
    let clock = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let seed = from_env("BUFSHARE_HOSTILE_SEED")
        .unwrap_or_else(|| clock.expect("after 1970").as_nanos() as u64 | 1);
    eprintln!("BUFSHARE_HOSTILE_SEED={seed} BUFSHARE_HOSTILE_SECONDS={seconds}");
    let mut random = Random(seed);
    let mut statuses = BTreeSet::new();
    let mut chains = 0u64;
    attack(256, |_, guest| {
        let end = Instant::now() + Duration::from_secs(seconds) / 2;
        let memory = (guest.pages(64), 64);
        let scratch = guest.control_ring().buffer(1 << 16);
        while Instant::now() < end {
            // Well-formed chains with more or less spoilt requests.
            for queue in [vq::CONTROL, vq::SYNC] {
                let ring = &mut guest.rings[usize::from(queue)];
                for _ in 0..16 {
                    let request = random_request(&mut random, memory);
                    let room = random.pick(&[0, 7, 8, 16, 40, 56, 64, 88, 128]);
                    let head = ring.prepare(&[&request], &[room]).expect("free");
                    ring.offer(head);
                }
                ring.kick();
                while ring.in_flight() > 0 {
                    let answer = ring.wait(SOON).expect("every chain comes back");
                    if answer.len >= 8 {
                        let status = u16::from_le_bytes([answer.bytes[0], answer.bytes[1]]);
                        statuses.insert(Status::from_wire(status).expect("a known status"));
                    }
                    chains += 1;
                }
            }
            // Chains that are broken themselves.
            let mut slot = 0;
            let mut heads = Vec::new();
            while slot < 200 {
                let at = scratch + random.below(1 << 15);
                let len = random.pick(&[0, 1, 8, 16, 56, 64, 80, 96, 300]);
                let request = random_request(&mut random, memory);
                guest.memory.write(at, &request);
                let parts = [(at, request.len() as u32), (at, len), (scratch, len)];
                let ring = &mut guest.rings[usize::from(vq::CONTROL)];
                let count = random_chain(&mut random, ring, slot, &parts);
                ring.offer(slot);
                heads.push(slot);
                slot += count;
            }
            chains += heads.len() as u64;
            let ring = guest.control_ring();
            ring.kick();
            collect(ring, heads);
            while guest.event(Duration::ZERO).is_some() {}
            if random.one_in(50) {
                guest.reset(random.pick(&[Stop::WithBase, Stop::DisableOnly]));
            }
        }
    });
    eprintln!("{chains} chains; statuses seen: {statuses:?}");
    assert!(statuses.contains(&Status::Ok) && statuses.len() >= 6, "too tame: {statuses:?}");
}
