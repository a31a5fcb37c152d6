//! Test desk: server + exporter in one process.
use bufshare::dmabuf::{DmaBufs, Source, Wish};
use bufshare::host::{listener::Listener, server::Server, wire};
use bufshare::hub::{Hub, VmSpec};
use bufshare::ids::{Access, Cookie, PeerId};
use bufshare::limits::Quota;
use bufshare::memory::FileSegment;
use bufshare::policy::Policy;
use bufshare::protocol::{Image, metadata};
use bufshare::registry::*;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;
use zerocopy::IntoBytes;
fn main() {
    env_logger::init();
    let a: Vec<String> = std::env::args().collect();
    let (w, h, frames, ms): (u32, u32, u64, u64) = (
        a[2].parse().unwrap(),
        a[3].parse().unwrap(),
        a[4].parse().unwrap(),
        a[5].parse().unwrap(),
    );
    let zc = a.get(6).is_some_and(|x| x == "zc");
    let fourcc: [u8; 4] = a.get(7).map_or(*b"XR24", |f| f.as_bytes().try_into().unwrap());
    let dm = DmaBufs::new(if zc { &Source::Auto } else { &Source::Off }, false).unwrap();
    let hub = Arc::new(
        Hub::new(&[VmSpec { name: "app".into(), quota: Quota::default() }], Policy::default(), dm)
            .unwrap(),
    );
    let session = hub.open_session(PeerId::FIRST_VM, true).unwrap();
    let _ = std::fs::remove_file(&a[1]);
    let l = Listener::bind(a[1].as_ref(), None).unwrap();
    let s = Server::new(hub.clone(), Some(l)).unwrap();
    std::thread::spawn(move || s.run().unwrap());
    let size = (u64::from(w) * u64::from(h) * 4).next_multiple_of(4096);
    let ram = memfd_create("ram", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&ram, size).unwrap();
    fcntl_add_seals(&ram, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL).unwrap();
    let ram = Arc::new(std::fs::File::from(ram));
    let mut image = Image {
        fourcc: u32::from_le_bytes(fourcc).into(),
        nr_planes: 1.into(),
        width: w.into(),
        height: h.into(),
        ..Default::default()
    };
    image.planes[0].stride = (w * 4).into();
    let what = Description {
        size,
        access: Access::ALL,
        name: wire::pad_text("frame"),
        metadata_type: metadata::IMAGE,
        metadata: image.as_bytes().into(),
    };
    let pages = vec![FileSegment { file: ram.clone(), offset: 0, len: size }];
    let (backing, mode) =
        hub.dmabufs.make(pages, size, Wish { may_share: zc, must_share: false }, "frame").unwrap();
    println!("mode {mode:?}");
    let made =
        Exported { backing: Arc::new(backing), mode, uuid: uuid::Uuid::new_v4(), observable: zc };
    let (handle, uuid, _) = hub
        .with(|r, _| {
            let (t, _) = r.begin_export(session, what, None, false)?;
            r.finish_export(t, Ok(made))
        })
        .unwrap();
    let draw = |n: u64| {
        let mut px = vec![0u8; (w * h * 4) as usize];
        for y in 0..h {
            for x in 0..w {
                let o = ((y * w + x) * 4) as usize;
                let bar = (n * 8 % u64::from(w)) as u32;
                px[o] = (x & 255) as u8;
                px[o + 1] = (y & 255) as u8;
                px[o + 2] = if x.abs_diff(bar) < 8 { 255 } else { n as u8 };
            }
        }
        ram.write_all_at(&px, 0).unwrap();
    };
    let sync = |bits, nonblock| SyncRequest {
        bits,
        offset: 0,
        len: 0,
        nonblock,
        timeout: Duration::from_secs(2),
        cookie: Cookie(1),
    };
    draw(0);
    hub.with(|r, now| r.begin_exporter(session, handle, sync(Access::WRITE, true), (0, 9), now))
        .unwrap();
    let e = hub.with(|r, _| r.end_exporter(session, handle, sync(Access::WRITE, false))).unwrap();
    hub.finish_end(e).unwrap();
    hub.with(|r, now| {
        r.grant(
            session,
            GrantRequest {
                handle,
                to: PeerId::HOST,
                access: Access::READ,
                once: false,
                force: false,
                lifetime: Duration::ZERO,
            },
            now,
        )
    })
    .unwrap();
    println!("uuid {uuid}");
    let mut refused = 0u64;
    for n in 1..=frames {
        std::thread::sleep(Duration::from_millis(ms));
        let t = std::time::Instant::now();
        while hub
            .with(|r, now| {
                r.begin_exporter(session, handle, sync(Access::WRITE, true), (0, 9), now)
            })
            .is_err()
        {
            refused += 1;
            std::thread::sleep(Duration::from_micros(500));
            if t.elapsed().as_secs() > 3 {
                println!("writer waited 3 s at {n}");
                break;
            }
        }
        draw(n);
        let e =
            hub.with(|r, _| r.end_exporter(session, handle, sync(Access::WRITE, false))).unwrap();
        let g = hub.finish_end(e).unwrap();
        if n % 20 == 0 {
            println!("drew {n} generation {g} after {refused} refusals");
        }
    }
    std::thread::sleep(Duration::from_secs(4));
    let st = hub.with(|r, _| r.release(session, handle, false)).unwrap();
    println!("release -> {:?} uses {}", st.state, st.use_count);
    let t = std::time::Instant::now();
    while hub.read(|r| r.buffer_count()) > 0 && t.elapsed().as_secs() < 5 {
        if let Some(e) = hub.with(|r, _| r.next_event(session, true)) {
            println!("event {:?} after {:?}", e.kind, t.elapsed());
            hub.with(|r, _| r.event_told(session, e));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    println!("buffers left {} after {:?}", hub.read(|r| r.buffer_count()), t.elapsed());
}
