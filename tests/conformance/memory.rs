//! EXPORT: which memory, how much of it, and how it is shared.

use super::export::one_page;
use super::*;
use bufshare::protocol::flag;

#[track_caller]
fn refused(bed: &mut Bed, request: Export, status: Status) -> Refusal {
    bed.guest.export(request).refused(status)
}

/// [dev-export-13]
#[test]
fn only_shareable_memory_is_exported() {
    let plain = Region { start: BASE + (1 << 30), len: 1 << 20, ..Region::unsealed() };
    let regions = vec![Region::default(), plain];
    let daemon = Daemon::start(&["a"]);
    let mut guest = Setup { regions, ..Default::default() }.connect(&daemon, "a");
    let good = guest.pages(1);
    let end = BASE + Region::default().len;
    for bad in
        [(0, PAGE), (1 << 50, PAGE), (end, PAGE), (end - PAGE, 2 * PAGE), (plain.start, PAGE)]
    {
        let of = |segments| Export { segments, ..Default::default() };
        assert_eq!(guest.export(of(vec![bad])).refused(Status::Fault).detail, 0, "{bad:x?}");
        let refusal = guest.export(of(vec![(good, PAGE), bad])).refused(Status::Fault);
        assert_eq!(refusal.detail, 1, "{bad:x?}");
    }
    guest.export_pages(1);
}

/// [dev-export-13] A buffer may lie in several regions, and one segment may cross from one into the
/// next; a region that came by hot-plug is as good, and one that went is no memory.
#[test]
fn memory_is_what_the_table_says_now() {
    let first = Region { len: 64 << 20, ..Default::default() };
    let second = Region { start: first.start + first.len, len: 1 << 20, ..Default::default() };
    let regions = vec![first, second];
    let daemon = Daemon::start(&["a"]);
    let mut guest = Setup { regions, ..Default::default() }.connect(&daemon, "a");
    let border = second.start;
    let of = |start, len| Export { segments: vec![(start, len)], ..Default::default() };
    guest.memory.fill(border - PAGE, PAGE, 0x11);
    guest.memory.fill(border, PAGE, 0x22);
    let export = guest.export(of(border - PAGE, 2 * PAGE)).expect("across regions");
    guest.grant(Grant { handle: export.handle.get(), ..Default::default() }).expect("GRANT");
    let mut client = Client::connect(&daemon.host_socket(), "test").expect("host socket");
    let shared = buffer(&export, border - PAGE, 2);
    guest.end(sync(&shared, flag::SYNC_WRITE)).expect("END");
    let lease = acquire(&mut client, &shared);
    client.begin(lease.id, host_access(READ_WRITE), SOON).expect("BEGIN");
    assert_eq!(peek(&lease, PAGE - 1, 2), [0x11, 0x22]);

    let third = Region { start: border + second.len, len: 1 << 20, ..Default::default() };
    guest.export(of(third.start, PAGE)).refused(Status::Fault);
    guest.memory.plug(&third);
    guest.send_memory_table();
    guest.export(of(third.start, PAGE)).expect("plugged");
    guest.memory.unplug(&third);
    guest.send_memory_table();
    guest.export(of(third.start, PAGE)).refused(Status::Fault);
    assert_eq!(peek(&lease, PAGE - 1, 2), [0x11, 0x22], "the lease does not care");
}

/// [dev-export-14]
#[test]
fn segments_have_a_bound_after_merging() {
    let mut bed = bed();
    let limit = u64::from(bed.guest.config.max_segments.get()).min(4096);
    let addr = bed.guest.pages(2 * (limit + 1));
    let adjacent = (0..limit + 1).map(|i| (addr + i * PAGE, PAGE)).collect();
    bed.guest.export(Export { segments: adjacent, ..Default::default() }).expect("one when merged");
    let scattered = |count| Export {
        segments: (0..count).map(|i| (addr + 2 * i * PAGE, PAGE)).collect(),
        ..Default::default()
    };
    bed.guest.export(scattered(limit)).expect("at the limit");
    if limit < 4096 {
        refused(&mut bed, scattered(limit + 1), Status::TooMany);
    }
}

/// [dev-export-28] As many small segments as a request may have are merged; one more may be too many.
#[test]
fn raw_segments_have_a_bound() {
    let mut bed = bed();
    let limit = 65_536u64;
    let plug = Region { start: BASE + (1 << 30), len: (limit + 1) * PAGE, ..Default::default() };
    bed.guest.memory.plug(&plug);
    bed.guest.send_memory_table();
    let of = |count| Export {
        segments: (0..count).map(|i| (plug.start + i * PAGE, PAGE)).collect(),
        ..Default::default()
    };
    if limit * PAGE <= bed.guest.config.max_buffer_size.get() {
        bed.guest.export(of(limit)).expect("one segment when merged");
    }
    let refusal = bed.guest.export(of(limit + 1)).map(|export| export.handle.get());
    if let Err(refusal) = refusal {
        assert!([Status::TooMany, Status::Quota].contains(&refusal.status), "{refusal:?}");
    }
}

/// [dev-export-15] [dev-export-16] The mode that EXPORT reports is the one that the host sees, and
/// who asks for zero copies gets them or nothing.
#[test]
fn the_mode_is_reported() {
    let mut bed = bed();
    let buffer = bed.offered(1);
    let listed = bed.client().list().expect("LIST");
    assert_eq!(listed[0].mode, Some(buffer.mode));
    let request = Export { flags: flag::EXPORT_ZERO_COPY, ..one_page(&mut bed) };
    match (bed.guest.export(request), buffer.mode) {
        (Ok(export), Mode::ZeroCopy) => {
            assert_eq!(Mode::from_wire(export.mode.get()), Some(Mode::ZeroCopy));
        }
        (reply, Mode::Copy) => drop(reply.refused(Status::Fault)),
        (reply, mode) => panic!("{reply:?} in {mode:?} mode"),
    }
}

/// [dev-export-16] Unsealed memory is refused, or copied where the operator says so.
#[test]
fn unsealed_memory_is_only_copied() {
    let bed = bed_with("name=a,unsealed-ram");
    drop(bed.guest);
    let setup = Setup { regions: vec![Region::unsealed()], ..Default::default() };
    let mut guest = setup.connect(&bed.daemon, "a");
    let (export, _) = guest.export_pages(1);
    assert_eq!(Mode::from_wire(export.mode.get()), Some(Mode::Copy));
    let addr = guest.pages(1);
    let flags = flag::EXPORT_ZERO_COPY;
    let request = Export { flags, segments: vec![(addr, PAGE)], ..Default::default() };
    guest.export(request).refused(Status::Fault);
}

/// [dev-export-18] The object that a consumer gets holds the buffer and not a byte more.
#[test]
fn a_consumer_gets_the_buffer_alone() {
    let mut bed = bed();
    let addr = bed.guest.pages(8);
    bed.guest.memory.fill(addr, 8 * PAGE, 0x5e);
    let at = |page: u64, pages: u64| (addr + page * PAGE, pages * PAGE);
    for (page, byte) in [(1, 0xa1), (4, 0xa4), (5, 0xa5)] {
        bed.guest.memory.fill(addr + page * PAGE, PAGE, byte);
    }
    let segments = vec![at(4, 2), at(1, 1)];
    let export = bed.guest.export(Export { segments, ..Default::default() }).expect("EXPORT");
    let handle = export.handle.get();
    bed.guest.grant(Grant { handle, ..Default::default() }).expect("GRANT");
    let mut client = bed.client();
    let shared = buffer(&export, addr, 3);
    bed.guest.end(sync(&shared, flag::SYNC_WRITE)).expect("END");
    let lease = acquire(&mut client, &shared);
    client.begin(lease.id, host_access(READ_WRITE), SOON).expect("BEGIN");
    assert_eq!(object_size(&lease), 3 * PAGE);
    let seen = peek(&lease, 0, 3 * PAGE as usize);
    let expected: Vec<u8> =
        [0xa4, 0xa5, 0xa1].iter().flat_map(|byte| [*byte; PAGE as usize]).collect();
    assert!(seen == expected, "the segments in their order");
}

/// [dev-export-19] In ZERO_COPY mode the host sees what the guest writes after EXPORT, and the other
/// way round, without any SYNC; the daemon copied nothing.
#[test]
fn zero_copy_copies_nothing() {
    let mut bed = bed();
    let buffer = bed.offered(4);
    if buffer.mode != Mode::ZeroCopy {
        skip("no udmabuf on this host");
        return;
    }
    let mut client = bed.client();
    let lease = acquire(&mut client, &buffer);
    bed.guest.memory.write(buffer.addr + PAGE, b"after export");
    assert_eq!(peek(&lease, PAGE, 12), b"after export");
    poke(&lease, 2 * PAGE, b"from the host");
    assert_eq!(bed.guest.memory.read(buffer.addr + 2 * PAGE, 13), b"from the host");
    let (begin, end) = (flag::SYNC_WRITE, flag::SYNC_WRITE);
    bed.guest.begin(sync(&buffer, begin)).expect("BEGIN");
    bed.guest.end(sync(&buffer, end)).expect("END");
    let stats = client.stats().expect("STATS");
    let copied: Vec<_> = stats.iter().filter(|(name, _)| name.contains("copied")).collect();
    assert!(!copied.is_empty(), "a counter of bytes copied in {stats:?}");
    assert!(copied.iter().all(|(_, bytes)| *bytes == 0), "{copied:?}");
}
