//! The numbers and sizes of the host socket in all three of their descriptions.

use super::*;

#[test]
fn every_type_is_known_or_none() {
    let known = (0..=u16::MAX).filter_map(Type::from_wire).count();
    assert_eq!(known, Type::ALL.len());
    assert!(Type::ALL.iter().all(|kind| Type::from_wire(kind.to_wire()) == Some(*kind)));
}

#[test]
fn names_fit_their_fields() {
    assert_eq!(field_text(&pad_text::<8>("frame")), "frame");
    assert_eq!(field_text(&pad_text::<8>("12345678")), "12345678");
    assert_eq!(field_text(&pad_text::<4>("abcé")), "abc");
    assert_eq!(field_text(b"a\x1b[2Jb"), "a\u{fffd}[2Jb");
}

#[test]
fn numbers_and_sizes_equal_those_of_the_c_header_and_of_the_document() {
    let header = include_str!("../../include/bufshare-host.h");
    for kind in Type::ALL {
        let prefix = if kind.to_wire() >= 0x1000 { "EVT_" } else { "" };
        let line = format!("BUFSHARE_HOST_{prefix}{}", kind.name());
        let value = format!("= {:#06x},", kind.to_wire());
        assert!(
            header.lines().any(|l| l.trim_start().starts_with(&line) && l.contains(&value)),
            "{line} {value}"
        );
    }
    for status in crate::protocol::Status::ALL {
        let line = format!("BUFSHARE_S_{}", status.name());
        let value = format!("= {},", status.to_wire());
        assert!(
            header.lines().any(|l| l.trim_start().starts_with(&line) && l.contains(&value)),
            "{line} {value}"
        );
    }
    for fault in Fault::ALL {
        let (line, value) = (format!("FAULT_{}", fault.name()), format!("= {},", fault.to_wire()));
        assert!(header.lines().any(|l| l.contains(&line) && l.contains(&value)), "{line}");
    }
    let document = include_str!("../../spec/host-socket.md");
    let listings: String =
        document.split("```c\n").skip(1).filter_map(|rest| rest.split("```").next()).collect();
    let mut listed = 0;
    for line in listings.lines().filter(|line| !line.is_empty()) {
        assert!(header.lines().any(|l| l == line), "not in the header: {line}");
        listed += 1;
    }
    assert!(listed > 100, "{listed} lines listed");
    for line in header.lines().filter(|l| l.starts_with("struct ") && l.contains('{')) {
        assert!(listings.contains(line), "not in the document: {line}");
    }
    let sizes = [
        ("host_req", size_of::<Req>()),
        ("host_resp", size_of::<Resp>()),
        ("host_buffer", size_of::<Buffer>()),
        ("plane", size_of::<crate::protocol::Plane>()),
        ("image", size_of::<crate::protocol::Image>()),
        ("host_hello", size_of::<Hello>()),
        ("host_resp_hello", size_of::<RespHello>()),
        ("host_list", size_of::<List>()),
        ("host_resp_list", size_of::<RespList>()),
        ("host_watch", size_of::<Watch>()),
        ("host_event", size_of::<Event>()),
        ("host_query", size_of::<Query>()),
        ("host_lease", size_of::<Lease>()),
        ("host_resp_query", size_of::<RespQuery>()),
        ("host_stats", size_of::<Stats>()),
        ("host_stat", size_of::<Stat>()),
        ("host_resp_stats", size_of::<RespStats>()),
        ("host_peers", size_of::<Peers>()),
        ("host_peer", size_of::<Peer>()),
        ("host_resp_peers", size_of::<RespPeers>()),
        ("host_acquire", size_of::<Acquire>()),
        ("host_resp_acquire", size_of::<RespAcquire>()),
        ("host_release", size_of::<Release>()),
        ("host_resp_release", size_of::<RespRelease>()),
        ("host_sync", size_of::<Sync>()),
        ("host_resp_sync", size_of::<RespSync>()),
        ("host_point", size_of::<Point>()),
        ("host_resp_point", size_of::<RespPoint>()),
        ("host_cancel", size_of::<Cancel>()),
        ("host_inspect", size_of::<Inspect>()),
        ("host_report", size_of::<Report>()),
        ("host_resp_inspect", size_of::<RespInspect>()),
        ("host_holders", size_of::<Holders>()),
        ("host_holder", size_of::<Holder>()),
        ("host_resp_holders", size_of::<RespHolders>()),
        ("host_export", size_of::<Export>()),
        ("host_resp_export", size_of::<RespExport>()),
        ("host_grant", size_of::<Grant>()),
    ];
    assert_eq!(sizes.len(), header.matches("BUFSHARE_SIZE(bufshare_").count());
    for (name, size) in sizes {
        let line = format!("BUFSHARE_SIZE(bufshare_{name}, {size});");
        assert!(header.contains(&line), "{line}");
    }
}
