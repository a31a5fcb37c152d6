//! Keeps the three descriptions of the wire equal: the C listings of `spec/virtio-bufshare.md`, the
//! driver's C header, and `bufshare::protocol`.
//!
//! It reads just as much C as those two need: numeric `#define`s, enums, and structs of little-endian
//! fields, arrays and structs.

use std::collections::BTreeMap;
use std::mem::offset_of;

use bufshare::protocol::{self as wire, Mode, Opcode, State, Status};

const CHAPTER: &str = include_str!("../spec/virtio-bufshare.md");
const HEADER: &str = include_str!("../guest-driver/include/uapi/linux/virtio_bufshare.h");

/// Name, offset and size of a field.
type Field = (String, usize, usize);

#[derive(Debug, Default, PartialEq, Eq)]
struct Listing {
    numbers: BTreeMap<String, u64>,
    structs: BTreeMap<String, Vec<Field>>,
    sizes: BTreeMap<String, usize>,
}

fn without_comments(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some((before, comment)) = rest.split_once("/*") {
        out.push_str(before);
        rest = comment.split_once("*/").expect("the comment ends").1;
    }
    out + rest
}

/// A number, with `u` and a shift of the form `(1u << n)`.
fn number(text: &str) -> Option<u64> {
    let text = text.trim().trim_start_matches('(').trim_end_matches(')');
    if let Some((one, by)) = text.split_once("<<") {
        return Some(number(one)? << number(by)?);
    }
    let text = text.trim().trim_end_matches(['u', 'U']);
    match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).ok(),
        None => text.parse().ok(),
    }
}

impl Listing {
    fn parse(text: &str) -> Self {
        let mut listing = Self::default();
        let text = without_comments(text);
        let mut lines = text.lines().map(str::trim);
        while let Some(line) = lines.next() {
            if let Some(define) = line.strip_prefix("#define ") {
                let mut words = define.splitn(2, [' ', '\t']);
                let name = words.next().unwrap_or("");
                if let Some(value) = words.next().and_then(number) {
                    listing.numbers.insert(name.to_owned(), value);
                }
            } else if line.starts_with("enum ") && line.ends_with('{') {
                for line in lines.by_ref().take_while(|line| !line.starts_with('}')) {
                    let Some((name, value)) = line.trim_end_matches(',').split_once('=') else {
                        continue;
                    };
                    let value = number(value).unwrap_or_else(|| panic!("number in {line}"));
                    listing.numbers.insert(name.trim().to_owned(), value);
                }
            } else if let Some(name) =
                line.strip_prefix("struct ").and_then(|l| l.strip_suffix('{'))
            {
                let body: Vec<_> =
                    lines.by_ref().take_while(|line| !line.starts_with('}')).collect();
                listing.add_struct(name.trim(), &body);
            }
        }
        listing
    }

    fn add_struct(&mut self, name: &str, body: &[&str]) {
        let mut fields = Vec::new();
        let mut at = 0;
        for line in body {
            let Some(field) = line.strip_suffix(';') else { continue };
            let (kind, field) = field.rsplit_once([' ', '\t']).expect("type and name");
            let kind = kind.trim();
            let one = match kind.trim_start_matches('_') {
                "u8" => 1,
                "le16" => 2,
                "le32" => 4,
                "le64" => 8,
                other => {
                    let other = other.strip_prefix("struct ").unwrap_or(other);
                    *self.sizes.get(other).unwrap_or_else(|| panic!("{kind} in {name}"))
                }
            };
            let (field, count) = match field.split_once('[') {
                Some((field, count)) => (field, number(count.trim_end_matches(']'))),
                None => (field, Some(1)),
            };
            let size = one * usize::try_from(count.expect("a length")).expect("small");
            fields.push((field.to_owned(), at, size));
            at += size;
        }
        self.sizes.insert(name.to_owned(), at);
        self.structs.insert(name.to_owned(), fields);
    }
}

fn chapter() -> Listing {
    let mut code = String::new();
    let mut inside = false;
    for line in CHAPTER.lines() {
        match line {
            "```c" => inside = true,
            "```" => inside = false,
            _ if inside => code.extend([line, "\n"]),
            _ => {}
        }
    }
    Listing::parse(&code)
}

#[test]
fn the_driver_header_equals_the_chapter() {
    let (chapter, header) = (chapter(), Listing::parse(HEADER));
    assert!(chapter.structs.len() >= 25 && chapter.numbers.len() >= 80, "what happened to it?");
    for (name, fields) in &chapter.structs {
        assert_eq!(header.structs.get(name), Some(fields), "struct {name}");
    }
    for (name, value) in &chapter.numbers {
        assert_eq!(header.numbers.get(name), Some(value), "{name}");
    }
    // The other way round: nothing in the header that the chapter does not know.
    let ours = |name: &&String| name.to_lowercase().starts_with("virtio_bufshare");
    let unknown: Vec<_> = header
        .structs
        .keys()
        .filter(|name| !chapter.structs.contains_key(*name))
        .chain(header.numbers.keys().filter(|name| !chapter.numbers.contains_key(*name)))
        .filter(ours)
        .collect();
    assert!(unknown.is_empty(), "only in the header: {unknown:?}");
}

#[test]
fn numbers_of_the_library_equal_the_chapter() {
    let numbers = chapter().numbers;
    let find = |name: String| *numbers.get(&name).unwrap_or_else(|| panic!("{name}"));
    let find = |name: &str| find(format!("VIRTIO_BUFSHARE_{name}"));
    for op in Opcode::ALL {
        let event = if op.to_wire() >= 0x1000 { "EVT_" } else { "" };
        assert_eq!(find(&format!("{event}{}", op.name())), u64::from(op.to_wire()));
    }
    for status in Status::ALL {
        assert_eq!(find(&format!("S_{}", status.name())), u64::from(status.to_wire()));
    }
    let upper = |name: &str| name.to_uppercase().replace('-', "_");
    for mode in Mode::ALL {
        assert_eq!(find(&format!("MODE_{}", upper(mode.name()))), u64::from(mode.to_wire()));
    }
    for state in State::ALL {
        assert_eq!(find(&format!("ST_{}", upper(state.name()))), u64::from(state.to_wire()));
    }
    for (name, value) in [
        ("F_IMPORT", wire::feature::IMPORT),
        ("F_WINDOW", wire::feature::WINDOW),
        ("F_COPY", wire::feature::COPY),
        ("F_TIMELINE", wire::feature::TIMELINE),
        ("F_PEERS", wire::feature::PEERS),
        ("F_READ_ONLY", wire::feature::READ_ONLY),
        ("VQ_CONTROL", wire::vq::CONTROL.into()),
        ("VQ_EVENT", wire::vq::EVENT.into()),
        ("VQ_SYNC", wire::vq::SYNC.into()),
        ("PEER_NONE", wire::peer::NONE),
        ("PEER_HOST", wire::peer::HOST),
        ("PEER_ANY", wire::peer::ANY),
        ("PEER_F_ONLINE", wire::peer::F_ONLINE),
        ("PEER_F_WINDOW", wire::peer::F_WINDOW),
        ("EXPORT_F_DEVICE_MEMORY", wire::flag::EXPORT_DEVICE_MEMORY.into()),
        ("EXPORT_F_OBJECT", wire::flag::EXPORT_OBJECT.into()),
        ("EXPORT_F_ZERO_COPY", wire::flag::EXPORT_ZERO_COPY.into()),
        ("EXPORT_F_PART", wire::flag::EXPORT_PART.into()),
        ("GRANT_F_ONCE", wire::flag::GRANT_ONCE.into()),
        ("GRANT_F_FORCE", wire::flag::GRANT_FORCE.into()),
        ("RELEASE_F_FORCE", wire::flag::RELEASE_FORCE.into()),
        ("ATTACH_F_ZERO_COPY", wire::flag::ATTACH_ZERO_COPY.into()),
        ("MAP_F_COPY", wire::flag::MAP_COPY.into()),
        ("SYNC_F_END", wire::flag::SYNC_END.into()),
        ("SYNC_F_READ", wire::flag::SYNC_READ.into()),
        ("SYNC_F_WRITE", wire::flag::SYNC_WRITE.into()),
        ("SYNC_F_NONBLOCK", wire::flag::SYNC_NONBLOCK.into()),
        ("ACCESS_READ", wire::access::READ),
        ("ACCESS_WRITE", wire::access::WRITE),
        ("METADATA_IMAGE", wire::metadata::IMAGE),
    ] {
        assert_eq!(find(name), u64::from(value), "{name}");
    }
    assert_eq!(numbers["VIRTIO_ID_BUFSHARE"], u64::from(wire::DEVICE_ID));
}

/// Compares one struct; a field that Rust names otherwise is written `rust = "c"`.
macro_rules! same {
    ($numbers:expr, $name:literal, $rust:ident { $($field:ident $(= $c:literal)?),* $(,)? }) => {{
        let fields: Vec<(&str, usize)> = vec![$((
            *[$($c,)? stringify!($field)].first().expect("a name"),
            offset_of!(wire::$rust, $field),
        )),*];
        let name = concat!("virtio_bufshare_", $name);
        let listed = $numbers.structs.remove(name).unwrap_or_else(|| panic!("{name} is missing"));
        let listed: Vec<_> = listed.iter().map(|(field, at, _)| (field.as_str(), *at)).collect();
        assert_eq!(listed, fields, "{name}");
        assert_eq!($numbers.sizes[name], size_of::<wire::$rust>(), "{name}");
    }};
}

#[test]
fn structs_of_the_library_equal_the_chapter() {
    let mut c = chapter();
    same!(
        c,
        "config",
        Config {
            peer_id,
            epoch,
            granule,
            max_segments,
            max_buffer_size,
            max_total_size,
            max_exports,
            max_attachments,
            max_mappings,
            max_metadata,
            event_size,
            max_wait_ms,
            lingering,
            max_waits,
        }
    );
    same!(c, "req", Req { kind = "type", flags, cookie });
    same!(c, "resp", Resp { status, reserved, detail });
    same!(c, "segment", Segment { addr, len });
    same!(
        c,
        "export",
        Export { hdr, size, access, nr_segments, metadata_type, metadata_len, name, object }
    );
    same!(c, "resp_export", RespExport { hdr, handle, uuid, mode, reserved });
    same!(c, "plane", Plane { offset, stride, reserved });
    same!(c, "image", Image { fourcc, nr_planes, modifier, width, height, planes });
    same!(c, "grant", Grant { hdr, handle, peer_id, access, lifetime_ms });
    same!(c, "handle", Handle { hdr, handle });
    same!(c, "set_name", SetName { hdr, handle, name });
    same!(
        c,
        "resp_state",
        RespState { hdr, state, use_count, nr_mappings, access, size, generation, uuid }
    );
    same!(c, "attach", Attach { hdr, uuid, access, max_metadata });
    same!(
        c,
        "resp_attach",
        RespAttach {
            hdr,
            handle,
            size,
            generation,
            access,
            exporter,
            mode,
            metadata_type,
            metadata_len,
            reserved,
            name,
        }
    );
    same!(c, "map", Map { hdr, handle, offset, len, shm_offset, access, nr_segments });
    same!(c, "resp_map", RespMap { hdr, mapping, cache, reserved });
    same!(c, "unmap", Unmap { hdr, mapping });
    same!(c, "sync", Sync { hdr, handle, offset, len, timeout_ns });
    same!(c, "resp_sync", RespSync { hdr, generation });
    same!(c, "point", Point { hdr, handle, timeline, error, point, timeout_ns });
    same!(c, "resp_point", RespPoint { hdr, reached });
    same!(c, "cancel", Cancel { hdr, handle, cookie, reserved });
    same!(c, "peer_info", PeerInfo { hdr, index, reserved });
    same!(c, "resp_peer_info", RespPeerInfo { hdr, nr_peers, peer_id, flags, epoch, name });
    same!(c, "event", Event {
        kind = "type", flags, status, handle, uuid, peer_id, access, size, generation,
        metadata_type, epoch,
    });
    assert!(c.structs.is_empty(), "only in the chapter: {:?}", c.structs.keys());
}

#[test]
fn the_parser_reads_what_it_has_to() {
    let listing = Listing::parse(
        "#define A (1u << 3) /* eight */\nenum e {\n\tB = 0x10,\n};\n\
         struct s {\n\t__le16 x;\n\t__u8 y[6];\n};\nstruct t {\n\tstruct s s[2];\n\tle64 z;\n};\n",
    );
    assert_eq!(listing.numbers, BTreeMap::from([("A".into(), 8), ("B".into(), 16)]));
    assert_eq!(listing.sizes, BTreeMap::from([("s".into(), 8), ("t".into(), 24)]));
    assert_eq!(listing.structs["t"][1], ("z".into(), 16, 8));
}
