//! Programs that take turns with an exporter by timelines: through the library alone, through the kernel's own
//! timelines (drm_syncobj; that takes a host with a driver that has them), and on the screen of a compositor.

use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use bufshare::host::client::Client;
use bufshare::host::syncobj::{Bridge, Error, Node, Timeline};
use bufshare::host::turns::Turns;
use bufshare::protocol::{Line, RespPoint, Status};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use uuid::Uuid;

use crate::common::{Daemon, Export, Grant, Guest, PAGE, Point, skip, wait_for};
use crate::desk::READ;

const SOON: Duration = Duration::from_secs(10);

struct Bed {
    _daemon: Daemon,
    guest: Guest,
    client: Client,
    handle: u64,
    lease: u64,
}

/// A guest exports, a program has a lease.
fn bed() -> Bed {
    let daemon = Daemon::start(&["a"]);
    let mut guest = Guest::connect(&daemon, "a");
    let segments = vec![(guest.pages(1), PAGE)];
    let export = guest.export(Export { segments, ..Default::default() }).expect("EXPORT");
    let handle = export.handle.get();
    guest.grant(Grant { handle, access: READ, ..Default::default() }).expect("GRANT");
    let mut client = Client::connect(&daemon.host_socket(), "show").unwrap();
    let lease = client.acquire(Uuid::from_bytes(export.uuid), READ, false).unwrap().id;
    Bed { _daemon: daemon, guest, client, handle, lease }
}

impl Bed {
    fn content(&mut self, point: u64) {
        self.guest.signal(Point::new(self.handle, Line::Acquire, point)).expect("POINT_SIGNAL");
    }

    /// The exporter waits until it may draw over this content.
    fn wants_back(&mut self, point: u64) {
        let point = Point::new(self.handle, Line::Release, point);
        self.guest.start_wait(Point { timeout_ns: 10_000_000_000, ..point });
    }

    fn has_back(&mut self) -> bool {
        let limit = Duration::from_millis(100);
        self.guest.sync_next::<RespPoint>(limit).map(|(_, reply)| reply.expect("OK")).is_some()
    }
}

fn readable(fd: &impl AsFd, limit: Duration) -> bool {
    let limit = Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: limit.subsec_nanos().into() };
    poll(&mut [PollFd::new(fd, PollFlags::IN)], Some(&limit)).unwrap() == 1
}

#[test]
fn an_exporter_and_a_program_take_turns() {
    let mut bed = bed();
    let mut turns = Turns::new(bed.lease);
    assert_eq!(turns.expect(&mut bed.client).unwrap(), 1);
    assert_eq!(turns.expect(&mut bed.client).unwrap(), 1, "it is expected already");
    bed.client.dispatch().unwrap();
    assert_eq!(turns.ready(&mut bed.client).unwrap(), None);
    for (point, expected) in [(1, 1), (7, 2), (8, 8)] {
        assert_eq!(turns.expect(&mut bed.client).unwrap(), expected);
        bed.content(point);
        bed.wants_back(point);
        assert!(wait_for(SOON, || {
            bed.client.dispatch().unwrap();
            turns.ready(&mut bed.client).unwrap() == Some(point)
        }));
        assert_eq!((turns.seen(), turns.expected()), (point, None));
        assert!(!bed.has_back(), "it is on the screen");
        turns.hand_back(&mut bed.client, expected - 1).unwrap();
        assert!(!bed.has_back(), "an older one was handed back");
        turns.hand_back(&mut bed.client, expected).unwrap();
        assert!(bed.has_back());
    }
    turns.hand_back(&mut bed.client, u64::MAX).unwrap();
}

/// A bridge, and what a compositor has of it.
struct Bridged {
    bed: Bed,
    bridge: Bridge,
    acquire: Timeline,
    release: Timeline,
    drawn: OwnedFd,
}

fn bridged() -> Option<Bridged> {
    let Some(node) = Node::find() else {
        skip("no render node with timelines (DRM_CAP_SYNCOBJ_TIMELINE) on this host");
        return None;
    };
    let bed = bed();
    let bridge = Bridge::new(&node, bed.lease).unwrap();
    // As another process that has opened the device for itself.
    let other = Node::find().unwrap();
    let import = |line: &Timeline| Timeline::of(&other, line.share().unwrap().as_fd()).unwrap();
    let (acquire, release) = (import(bridge.acquire()), import(bridge.release()));
    let drawn = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    Some(Bridged { bed, bridge, acquire, release, drawn })
}

impl Bridged {
    fn pass_on(&mut self) -> Result<Option<u64>, Error> {
        self.bed.client.dispatch().unwrap();
        self.bridge.pass_on(&mut self.bed.client)
    }
}

#[test]
fn points_cross_the_bridge_to_the_kernel_and_back() {
    let Some(mut it) = bridged() else { return };
    for (content, expected) in [(1, 1), (5, 2), (6, 6)] {
        let point = it.bridge.expect(&mut it.bed.client).unwrap();
        assert_eq!(point, expected);
        // The consumer waits before the exporter signals.
        it.acquire.tell(point, &it.drawn).unwrap();
        assert_eq!(it.pass_on().unwrap(), None);
        assert!(!readable(&it.drawn, Duration::from_millis(50)));
        it.bed.content(content);
        it.bed.wants_back(content);
        assert!(wait_for(SOON, || it.pass_on().unwrap() == Some(content)));
        assert!(readable(&it.drawn, SOON) && it.acquire.reached().unwrap() == content);
        rustix::io::read(&it.drawn, &mut [0; 8]).unwrap();
        assert!(!it.bed.has_back() && !readable(&it.bridge, Duration::ZERO));
        it.release.signal(point).unwrap();
        assert!(readable(&it.bridge, SOON));
        assert_eq!(it.pass_on().unwrap(), None);
        assert!(it.bed.has_back());
    }
}

#[test]
fn nobody_waits_in_the_kernel_for_what_will_not_come() {
    for revoked in [false, true] {
        let Some(mut it) = bridged() else { return };
        let point = it.bridge.expect(&mut it.bed.client).unwrap();
        it.acquire.tell(point, &it.drawn).unwrap();
        let status = if revoked {
            it.bed.guest.release_force(it.bed.handle).expect("RELEASE");
            Status::Revoked
        } else {
            let error = Status::Io.to_wire().into();
            let broken = Point { error, ..Point::new(it.bed.handle, Line::Acquire, point) };
            it.bed.guest.signal(broken).expect("POINT_SIGNAL");
            Status::Io
        };
        let mut end = None;
        assert!(wait_for(SOON, || {
            end = it.pass_on().err();
            end.is_some()
        }));
        let end = end.unwrap();
        assert!(matches!(&end, Error::Client(error) if error.status() == Some(status)), "{end:?}");
        assert!(readable(&it.drawn, SOON));
    }
}

/// A consumer that is done before it was ready has skipped it.
#[test]
fn a_skipped_content_is_handed_back_as_soon_as_it_is_ready() {
    let Some(mut it) = bridged() else { return };
    let point = it.bridge.expect(&mut it.bed.client).unwrap();
    it.release.signal(point).unwrap();
    assert_eq!(it.pass_on().unwrap(), None);
    it.bed.content(3);
    it.bed.wants_back(3);
    assert!(wait_for(SOON, || it.pass_on().unwrap() == Some(3)));
    assert!(it.bed.has_back());
}
