//! The guest program's idea of `/dev/bufshareN` against the driver's header: the size of every
//! structure, the place of every field, every request number and constant, as the C compiler sees
//! them. Needs `cc`.
#![allow(missing_docs)]

use std::mem::offset_of;
use std::process::Command;

#[path = "../src/bin/bufshare-guest/uapi.rs"]
#[allow(dead_code)]
mod uapi;

/// Names of C expressions with the values that Rust has for them.
fn expected() -> Vec<(String, u64)> {
    let mut all = Vec::new();
    macro_rules! layout {
        ($c:literal, $rust:ident, $($field:ident $(= $c_field:literal)?),*) => {
            all.push((format!("sizeof(struct {})", $c), size_of::<uapi::$rust>() as u64));
            $(
                let field = stringify!($field);
                $(let field = if true { $c_field } else { field };)?
                all.push((
                    format!("offsetof(struct {}, {})", $c, field),
                    offset_of!(uapi::$rust, $field) as u64,
                ));
            )*
        };
    }
    layout!(
        "bufshare_info",
        Info,
        flags,
        peer_id,
        epoch,
        lingering,
        granule,
        max_segments,
        max_buffer_size,
        max_total_size,
        max_exports,
        max_metadata,
        max_wait_ms,
        max_waits,
        features,
        quarantined,
        max_attachments,
        window,
        max_mappings,
        reserved
    );
    layout!("bufshare_alloc", Alloc, size, flags, fd, reserved);
    layout!(
        "bufshare_export",
        Export,
        fd,
        flags,
        access,
        mode,
        pool,
        offset,
        size,
        metadata,
        metadata_len,
        metadata_type,
        name,
        handle,
        uuid,
        reserved
    );
    layout!("bufshare_grant", Grant, handle, peer_id, access, lifetime_ms, flags, reserved);
    layout!("bufshare_sync", Sync, handle, offset, len, timeout_ns, flags, reserved, generation);
    layout!("bufshare_name", Name, handle, name);
    layout!(
        "bufshare_query",
        Query,
        handle,
        state,
        use_count,
        nr_mappings,
        access,
        size,
        generation,
        uuid,
        mode,
        reserved
    );
    layout!("bufshare_release", Release, handle, flags, state);
    layout!("bufshare_peer", Peer, index, nr_peers, peer_id, flags, epoch, reserved, name);
    layout!(
        "bufshare_attach",
        Attach,
        uuid,
        flags,
        access,
        metadata,
        metadata_len,
        metadata_type,
        fd,
        mode,
        handle,
        offset,
        size,
        generation,
        exporter,
        reserved,
        name,
        reserved2
    );
    layout!(
        "bufshare_offer",
        Offer,
        id,
        peer_id,
        uuid,
        size,
        generation,
        access,
        metadata_type,
        reserved
    );
    layout!("bufshare_point_signal", PointSignal, handle, point, timeline, error);
    layout!("bufshare_point_wait", PointWait, handle, point, timeline, flags, timeout_ns, reached);
    layout!("bufshare_point_eventfd", PointEventfd, handle, point, timeline, fd, flags, reserved);
    layout!(
        "bufshare_event",
        Event,
        kind = "type",
        flags,
        status,
        handle,
        uuid,
        peer_id,
        access,
        size,
        generation,
        metadata_type,
        epoch
    );
    macro_rules! constants {
        ($($name:ident),*) => {
            $(all.push((format!("BUFSHARE_{}", stringify!($name)), u64::from(uapi::$name)));)*
        };
    }
    constants!(
        IOC_INFO,
        IOC_ALLOC,
        IOC_EXPORT,
        IOC_GRANT,
        IOC_SYNC,
        IOC_SET_NAME,
        IOC_QUERY,
        IOC_RELEASE,
        IOC_PEER,
        IOC_ATTACH,
        IOC_OFFER,
        IOC_POINT_SIGNAL,
        IOC_POINT_WAIT,
        IOC_POINT_EVENTFD,
        INFO_F_ALIVE,
        ACCESS_READ,
        ACCESS_WRITE,
        MODE_ZERO_COPY,
        MODE_COPY,
        EXPORT_F_ZERO_COPY,
        EXPORT_F_PART,
        ATTACH_F_ZERO_COPY,
        SYNC_F_END,
        SYNC_F_READ,
        SYNC_F_WRITE,
        TIMELINE_ACQUIRE,
        TIMELINE_RELEASE,
        POINT_F_NONBLOCK,
        RELEASE_F_FORCE,
        STATE_RELEASED,
        PEER_F_ONLINE,
        PEER_F_WINDOW,
        EVENT_RELEASED,
        EVENT_IDLE,
        EVENT_BUSY,
        EVENT_OFFERED,
        EVENT_REVOKED,
        EVENT_WITHDRAWN,
        EVENT_CHANGED,
        EVENT_PEER,
        EVENT_RESYNC
    );
    all
}

#[test]
fn the_program_agrees_with_the_header() {
    let dir = tempfile::tempdir().unwrap();
    let (source, program) = (dir.path().join("uapi.c"), dir.path().join("uapi"));
    let expected = expected();
    let mut text = String::from("#include <stddef.h>\n#include <stdio.h>\n");
    text += "#include <linux/bufshare.h>\n#include <linux/virtio_bufshare.h>\nint main(void)\n{\n";
    for (expression, _) in &expected {
        text += &format!("\tprintf(\"%llu\\n\", (unsigned long long)({expression}));\n");
    }
    text += "\treturn 0;\n}\n";
    std::fs::write(&source, text).unwrap();
    let include = concat!(env!("CARGO_MANIFEST_DIR"), "/guest-driver/include/uapi");
    let built = Command::new("cc")
        .args(["-std=c11", "-Wall", "-Wextra", "-Wpadded", "-Werror", "-I", include, "-o"])
        .args([&program, &source])
        .status()
        .unwrap();
    assert!(built.success());
    let output = Command::new(&program).output().unwrap();
    let values = String::from_utf8(output.stdout).unwrap();
    let values: Vec<u64> = values.lines().map(|line| line.parse().unwrap()).collect();
    assert_eq!(values.len(), expected.len());
    for ((expression, rust), c) in expected.iter().zip(values) {
        assert_eq!(*rust, c, "{expression}");
    }
}
