//! Queues, feature bits and the configuration layout.

use super::*;
use bufshare::protocol::{Opcode, PeerInfo, RespPeerInfo, feature, peer, vq};
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;
use zerocopy::IntoBytes;

/// [dev-feature-1] [dev-feature-2] [dev-queue-4]
#[test]
fn only_bits_of_this_chapter_are_offered() {
    let offered = bed().guest.offered;
    assert_eq!(offered & (0b111 << 6), 0, "reserved bits");
    assert_eq!(offered & (0x7fff << 9), 0, "unknown device bits");
    assert_ne!(offered & F_VERSION_1, 0, "VERSION_1");
    assert_eq!(offered & (1 << 35), 0, "IN_ORDER");
    assert_eq!(offered & (1 << 33), 0, "ACCESS_PLATFORM: there is no IOTLB");
    assert_eq!(offered & (1 << 34), 0, "RING_PACKED");
}

/// [dev-feature-3]
#[test]
fn requests_of_features_that_were_not_negotiated_are_unknown() {
    let daemon = Daemon::start(&["a"]);
    let decline = (1 << feature::PEERS) | 0b111_1111;
    let mut guest = Setup { decline, ..Default::default() }.connect(&daemon, "a");
    assert_eq!(guest.features & 0xff_ffff, 0);
    guest.peer_info(0).refused(Status::Unsupp);
    for op in [Opcode::Attach, Opcode::Detach, Opcode::Map, Opcode::Unmap] {
        let mut request = header(op, 0).as_bytes().to_vec();
        request.resize(128, 0);
        let answer = guest.raw(vq::CONTROL, &[&request], &[128]);
        parse::<[u8; 128]>(answer.written()).refused(Status::Unsupp);
    }
    for op in [Opcode::PointSignal, Opcode::PointWait] {
        let mut request = header(op, 0).as_bytes().to_vec();
        request.resize(128, 0);
        let answer = guest.raw(vq::SYNC, &[&request], &[128]);
        parse::<[u8; 128]>(answer.written()).refused(Status::Unsupp);
    }
    let flags = bufshare::protocol::flag::EXPORT_DEVICE_MEMORY;
    guest.export(Export { flags, size: Some(PAGE), ..Default::default() }).refused(Status::Unsupp);
    let flags = bufshare::protocol::flag::EXPORT_OBJECT;
    guest.export(Export { flags, size: Some(PAGE), ..Default::default() }).refused(Status::Unsupp);
}

/// [dev-feature-4]
#[test]
fn peer_events_come_only_where_they_were_asked_for() {
    let launch = Launch {
        vms: vec!["name=a".into(), "name=b".into()],
        args: vec!["--allow".into(), "a:b".into()],
        ..Default::default()
    };
    let daemon = launch.start();
    let deaf = Setup { decline: 1 << feature::PEERS, ..Default::default() };
    let mut a = deaf.connect(&daemon, "a");
    let _b = Guest::connect(&daemon, "b");
    a.expect_no_event();
}

/// [dev-config-1] [dev-config-2] [dev-config-5] [dev-config-6]
#[test]
fn the_configuration_keeps_its_bounds() {
    let Bed { daemon: _daemon, guest } = bed();
    let config = guest.config;
    assert!(config.granule.get().is_power_of_two() && config.granule.get() >= 4096);
    assert!(config.event_size.get() >= 64);
    assert!(config.max_metadata.get() <= 4096);
    assert!(config.max_segments.get() > 0);
    assert!(config.max_exports.get() > 0);
    assert!(config.max_buffer_size.get() <= config.max_total_size.get());
    assert!(config.max_wait_ms.get() > 0);
    assert!(config.max_waits.get() > 0);
    assert_eq!(config.lingering.get(), 0, "nothing lingers of a first session");
    if guest.offered & (1 << feature::IMPORT) == 0 {
        assert_eq!(config.max_attachments.get(), 0);
    }
    if guest.offered & ((1 << feature::WINDOW) | (1 << feature::COPY)) == 0 {
        assert_eq!(config.max_mappings.get(), 0);
    }
}

/// [dev-config-3] [dev-config-4]
#[test]
fn peer_ids_are_unique_and_stay() {
    let daemon = Daemon::start(&["a", "b"]);
    let mut a = Guest::connect(&daemon, "a");
    let b = Guest::connect(&daemon, "b");
    let id = a.config.peer_id.get();
    assert_ne!(id, b.config.peer_id.get());
    for guest in [&a, &b] {
        let id = guest.config.peer_id.get();
        assert!(![peer::NONE, peer::HOST, peer::ANY].contains(&id));
    }
    a.export_pages(1);
    a.reset(Stop::WithBase);
    assert_eq!(a.config.peer_id.get(), id);
    a.reconnect();
    assert_eq!(a.config.peer_id.get(), id);
}

/// [dev-config-7]
#[test]
fn the_epoch_changes_when_handles_are_lost() {
    let Bed { daemon: _daemon, mut guest } = bed();
    let first = guest.config.epoch.get();
    guest.export_pages(1);
    guest.pause(Stop::WithBase);
    guest.resume();
    assert_eq!(guest.read_config().epoch.get(), first, "a pause loses nothing");
    guest.reset(Stop::WithBase);
    guest.peer_info(0).expect("the first chain after the reset");
    assert_eq!(guest.read_config().epoch.get(), first, "the driver knows of its own reset");
    guest.reconnect();
    guest.peer_info(0).expect("the first chain of the session");
    assert_ne!(guest.read_config().epoch.get(), first);
}

/// A VMM may read the space in pieces, and as if it were larger than it is.
#[test]
fn the_configuration_can_be_read_in_any_piece() {
    let bed = bed();
    let mut expected = bed.guest.config.as_bytes().to_vec();
    expected.resize(256, 0);
    for (offset, len) in [(0, 4), (4, 4), (60, 4), (16, 8), (60, 8), (64, 1), (0, 256), (3, 7)] {
        let flags = VhostUserConfigFlags::empty();
        let read = bed.guest.frontend().get_config(offset, len, flags, &vec![0; len as usize]);
        let (_, bytes) = read.expect("GET_CONFIG");
        let at = offset as usize;
        assert_eq!(bytes, expected[at..at + len as usize], "{len} bytes at {offset}");
    }
}

/// [dev-config-8]
#[test]
fn the_configuration_cannot_be_written() {
    let Bed { daemon: _daemon, mut guest } = bed();
    let flags = VhostUserConfigFlags::WRITABLE;
    // Whether the daemon refuses or ignores it is its affair, if only it goes on.
    let _ = guest.frontend().set_config(0, flags, &[0xff; 8]);
    assert_eq!(guest.read_config(), guest.config);
    guest.export_pages(1);
}

/// [dev-queue-1] [dev-queue-3]
#[test]
fn a_pending_sync_holds_up_nothing() {
    let mut bed = bed();
    let held = bed.offered(1);
    let free = bed.offered(1);
    let mut client = bed.client();
    let lease = acquire(&mut client, &held);
    let write = bufshare::protocol::flag::SYNC_WRITE;
    client.begin(lease.id, host_access(READ_WRITE), SOON).expect("BEGIN");
    let timeout_ns = 5_000_000_000;
    let waiting = Sync { timeout_ns, ..sync(&held, write) };
    let head = bed.guest.sync_start::<bufshare::protocol::RespSync>(&waiting.bytes());
    let other = bed.guest.sync_start::<bufshare::protocol::RespSync>(&sync(&free, write).bytes());
    let (first, reply) = bed.guest.sync_next::<bufshare::protocol::RespSync>(SOON).expect("other");
    assert_eq!(first, other, "what can complete does");
    reply.expect("no conflict");
    bed.guest.query(held.handle).expect("the control queue is served");
    client.end(lease.id, host_access(READ_WRITE)).expect("END");
    let (second, reply) = bed.guest.sync_next::<bufshare::protocol::RespSync>(SOON).expect("END");
    assert_eq!(second, head);
    reply.expect("the wait is over");
}

/// [dev-queue-2] A full ring of requests in one go, in all ways to notify.
#[test]
fn every_chain_comes_back_once() {
    for decline in [0, F_EVENT_IDX, F_INDIRECT] {
        let daemon = Daemon::start(&["a"]);
        let mut guest = Setup { decline, ..Default::default() }.connect(&daemon, "a");
        let request = PeerInfo { hdr: header(Opcode::PeerInfo, 0), ..Default::default() };
        let room = u32::try_from(size_of::<RespPeerInfo>()).expect("small");
        for _ in 0..20 {
            let mut heads = Vec::new();
            while let Some(head) = guest.control_ring().prepare(&[request.as_bytes()], &[room]) {
                guest.control_ring().offer(head);
                heads.push(head);
            }
            assert_eq!(heads.len(), 128, "two descriptors each");
            guest.control_ring().kick();
            for _ in 0..heads.len() {
                let answer = guest.control_ring().wait(SOON).expect("an answer");
                parse::<RespPeerInfo>(answer.written()).expect("PEER_INFO");
            }
            assert_eq!(guest.control_ring().pop_used(), None, "one too many");
        }
    }
}

/// [dev-queue-2] The device is woken by others all the time, and the driver keeps quiet when it is
/// told to: a chain that comes while notifications are off is not forgotten.
#[test]
fn no_chain_is_overlooked() {
    for decline in [0, F_EVENT_IDX] {
        let daemon = Daemon::start(&["a"]);
        let guest = Setup { decline, ..Default::default() }.connect(&daemon, "a");
        let mut bed = Bed { daemon, guest };
        let buffer = bed.offered(1);
        let stop = std::sync::atomic::AtomicBool::new(false);
        let order = std::sync::atomic::Ordering::Relaxed;
        let mut client = bed.client();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(order) {
                    let lease = acquire(&mut client, &buffer);
                    client.release(lease).expect("RELEASE");
                }
            });
            let served = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                for _ in 0..20_000 {
                    bed.guest.query(buffer.handle).expect("QUERY");
                    while bed.guest.event(Duration::ZERO).is_some() {}
                }
            }));
            stop.store(true, order);
            served.expect("every chain comes back");
        });
    }
}
