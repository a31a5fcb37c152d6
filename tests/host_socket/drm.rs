//! The kernel's own timelines (drm_syncobj), between a lease and whoever waits there: that takes a host with a DRM driver
//! that has them. `tests/vm/timelines` is one that has nothing else.

use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use bufshare::host::syncobj::{Bridge, Error, Node, Timeline};
use bufshare::protocol::{Line, Status};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use crate::common::{Point, skip, wait_for};
use crate::timelines::{Bed, SOON, bed, swapchain};

const KWIN: [&str; 6] =
    ["kwin_wayland", "--virtual", "--socket", "wl-0", "--no-lockscreen", "--no-global-shortcuts"];
fn readable(fd: &impl AsFd, limit: Duration) -> bool {
    let limit = Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: limit.subsec_nanos().into() };
    poll(&mut [PollFd::new(fd, PollFlags::IN)], Some(&limit)).unwrap() == 1
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

/// KWin draws dma-bufs only where there is a DRM device, and that test's has timelines.
fn kwin(options: &[&str], contents: u64, sync: &str) {
    if Node::find().is_none() {
        return skip("no render node with timelines (DRM_CAP_SYNCOBJ_TIMELINE) on this host");
    }
    if let Some(swapchain) = swapchain(&KWIN, options) {
        swapchain.run(contents, sync);
    }
}

#[test]
fn a_swapchain_on_the_kernels_timelines() {
    kwin(&[], 60, "explicit");
}

#[test]
fn a_swapchain_whose_compositor_is_told_nothing_of_timelines() {
    kwin(&["--no-explicit-sync"], 20, "implicit");
}
