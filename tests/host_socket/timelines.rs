//! Programs that take turns with an exporter by timelines, on the screen of a compositor, too.

use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use bufshare::host::client::Client;
use bufshare::host::turns::Turns;
use bufshare::protocol::{Image, Line, RespPoint, metadata};
use uuid::Uuid;
use zerocopy::IntoBytes;

use crate::common::{Daemon, Export, Grant, Guest, PAGE, Point, name, skip, wait_for};
use crate::desk::READ;

pub const SOON: Duration = Duration::from_secs(10);

pub struct Bed {
    _daemon: Daemon,
    pub guest: Guest,
    pub client: Client,
    pub handle: u64,
    pub lease: u64,
}

/// A guest exports, a program has a lease.
pub fn bed() -> Bed {
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
    pub fn content(&mut self, point: u64) {
        self.guest.signal(Point::new(self.handle, Line::Acquire, point)).expect("POINT_SIGNAL");
    }

    /// The exporter waits until it may draw over this content.
    pub fn wants_back(&mut self, point: u64) {
        let point = Point::new(self.handle, Line::Release, point);
        self.guest.start_wait(Point { timeout_ns: 10_000_000_000, ..point });
    }

    pub fn has_back(&mut self) -> bool {
        let limit = Duration::from_millis(100);
        self.guest.sync_next::<RespPoint>(limit).map(|(_, reply)| reply.expect("OK")).is_some()
    }
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

const WIDTH: u32 = 64;
const HEIGHT: u32 = 32;
const IMAGES: u64 = 3;

/// A process that does not outlive the test.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub struct Swapchain {
    // Dropped in this order: the daemon outlives its clients.
    present: Process,
    lines: Receiver<String>,
    _compositor: Process,
    _dir: tempfile::TempDir,
    guest: Guest,
    images: Vec<(u64, u64)>,
    _daemon: Daemon,
}

/// A guest exports images, and a program shows them in turn in this compositor.
pub fn swapchain(compositor: &[&str], options: &[&str]) -> Option<Swapchain> {
    let private = PermissionsExt::from_mode(0o700);
    let dir = tempfile::Builder::new().permissions(private).tempdir().unwrap();
    let mut command = Command::new(compositor[0]);
    command.args(&compositor[1..]).env("XDG_RUNTIME_DIR", dir.path()).env("KWIN_COMPOSE", "O2ES");
    command.env("QT_QPA_PLATFORM", "offscreen").stdout(Stdio::null()).stderr(Stdio::null());
    let Ok(child) = command.spawn() else {
        skip(&format!("no {} on this host", compositor[0]));
        return None;
    };
    let compositor = Process(child);
    let daemon = Daemon::start(&["a"]);
    let mut guest = Guest::connect(&daemon, "a");
    let mut image = Image {
        fourcc: u32::from_le_bytes(*b"XR24").into(),
        nr_planes: 1.into(),
        width: WIDTH.into(),
        height: HEIGHT.into(),
        ..Default::default()
    };
    image.planes[0].stride = (WIDTH * 4).into();
    let images = (0..IMAGES).map(|number| {
        let addr = guest.pages(2);
        let request = Export {
            segments: vec![(addr, 2 * PAGE)],
            metadata_type: metadata::IMAGE,
            metadata: image.as_bytes().to_vec(),
            name: name(&format!("image{number}")),
            ..Default::default()
        };
        let handle = guest.export(request).expect("EXPORT").handle.get();
        guest.grant(Grant { handle, access: READ, ..Default::default() }).expect("GRANT");
        (handle, addr)
    });
    let images: Vec<_> = images.collect();
    let minute = Duration::from_secs(60);
    assert!(wait_for(minute, || dir.path().join("wl-0").exists()), "the compositor comes up");
    let mut present = Command::new(env!("CARGO_BIN_EXE_bufshare-present"));
    present.arg("--host-socket").arg(daemon.host_socket()).args(options);
    present.args((0..IMAGES).map(|number| format!("image{number}"))).stdout(Stdio::piped());
    present.env("XDG_RUNTIME_DIR", dir.path()).env("WAYLAND_DISPLAY", "wl-0");
    let mut present = Process(present.spawn().unwrap());
    let output = BufReader::new(present.0.stdout.take().unwrap());
    let (sender, lines) = channel();
    std::thread::spawn(move || {
        output.lines().map_while(Result::ok).all(|line| sender.send(line).is_ok())
    });
    let (_compositor, _dir, _daemon) = (compositor, dir, daemon);
    Some(Swapchain { present, lines, _compositor, _dir, guest, images, _daemon })
}

impl Swapchain {
    fn line(&mut self) -> String {
        self.lines.recv_timeout(Duration::from_secs(60)).expect("a line")
    }

    /// As many contents, each drawn when the image is back; the program shows every one, in order.
    pub fn run(mut self, contents: u64, sync: &str) {
        for _ in 0..IMAGES {
            assert!(self.line().starts_with("presenting"));
        }
        assert_eq!(self.line(), format!("sync {sync}"));
        for content in 1..=contents {
            let number = (content - 1) % IMAGES;
            let (handle, addr) = self.images[number as usize];
            if let Some(before @ 1..) = content.checked_sub(IMAGES) {
                let point = Point::new(handle, Line::Release, before);
                let back = Point { timeout_ns: 10_000_000_000, ..point };
                assert_eq!(self.guest.wait_point(back), Ok(before), "it comes back as itself");
            }
            let colour = (content as u32).wrapping_mul(0x0001_0203).to_le_bytes();
            self.guest.memory.write(addr, &colour.repeat((WIDTH * HEIGHT) as usize));
            self.guest.signal(Point::new(handle, Line::Acquire, content)).expect("POINT_SIGNAL");
            // On a busy machine a frame may take so long that the program does not wait for it.
            let line = self.line().replace("unseen", "shown");
            assert_eq!(line, format!("shown \"image{number}\" point {content}"));
        }
        let [(first, _), ..] = self.images[..] else { unreachable!() };
        self.guest.release(first).expect("RELEASE");
        assert_eq!(self.line(), "ended: withdrawn");
        assert!(self.present.0.wait().unwrap().success());
    }
}

const WESTON: [&str; 6] = [
    "weston",
    "--backend=headless",
    "--renderer=gl",
    "--socket=wl-0",
    "--no-config",
    "--idle-time=0",
];

#[test]
fn a_swapchain_in_a_compositor_without_timelines() {
    if let Some(swapchain) = swapchain(&WESTON, &[]) {
        swapchain.run(20, "implicit");
    }
}
