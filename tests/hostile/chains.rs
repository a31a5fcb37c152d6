//! Requests: every type, every length, numbers and addresses at every border.

use super::*;

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
