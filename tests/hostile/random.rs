//! Random requests in random chains.

use std::collections::{BTreeSet, VecDeque};

use super::*;
use bufshare::protocol::RespExport;
use zerocopy::FromBytes;

/// What the attacker knows: its memory (first address, pages), and handles that it was given.
struct Known {
    memory: (u64, u64),
    handles: VecDeque<u64>,
    /// UUID of the last export.
    pool: [u8; 16],
}

/// One random request: mostly well-formed, with some of it spoilt.
fn random_request(random: &mut Random, known: &Known) -> Vec<u8> {
    let op = if random.one_in(4) { Opcode::Export } else { random.pick(Opcode::ALL) };
    let memory = known.memory;
    let mut handle = random.below(40);
    if !known.handles.is_empty() && !random.one_in(8) {
        let i = random.below(known.handles.len() as u64);
        handle = known.handles[usize::try_from(i).expect("small")];
    }
    let mut request = match op {
        Opcode::Export => {
            let part = random.one_in(4);
            let count = if part { 1 } else { random.below(4) };
            let base = if part { 0 } else { memory.0 };
            let segments = (0..count)
                .map(|_| (base + random.below(memory.1) * PAGE, (1 + random.below(4)) * PAGE))
                .collect();
            let metadata = random.pick(&[0, 0, 8, 88]);
            Export {
                flags: if part { flag::EXPORT_PART } else { 0 },
                segments,
                access: random.pick(&[access::READ, READ_WRITE]),
                object: if part { known.pool } else { [0; 16] },
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
        let mut known =
            Known { memory: (guest.pages(64), 64), handles: VecDeque::new(), pool: [0; 16] };
        let scratch = guest.control_ring().buffer(1 << 16);
        while Instant::now() < end {
            // Well-formed chains with more or less spoilt requests.
            for queue in [vq::CONTROL, vq::SYNC] {
                let ring = &mut guest.rings[usize::from(queue)];
                for _ in 0..16 {
                    let request = random_request(&mut random, &known);
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
                        if let Ok(export) = RespExport::read_from_bytes(answer.written()) {
                            known.handles.push_front(export.handle.get());
                            known.handles.truncate(64);
                            known.pool = export.uuid;
                        }
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
                let request = random_request(&mut random, &known);
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
                known.handles.clear();
            }
        }
    });
    eprintln!("{chains} chains; statuses seen: {statuses:?}");
    // A slow machine gets through too few in the time to have met them all.
    let varied = chains < 20_000 || statuses.len() >= 6;
    assert!(statuses.contains(&Status::Ok) && varied, "too tame: {statuses:?}");
}
