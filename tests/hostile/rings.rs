//! Descriptors and indices that break the rules of the ring.

use super::*;

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
