//! EXPORT: the form of the request, limits, metadata.

use super::*;
use bufshare::protocol::{self as wire, Image, access, metadata};
use zerocopy::{FromBytes, IntoBytes};

pub fn one_page(bed: &mut Bed) -> Export {
    Export { segments: vec![(bed.guest.pages(1), PAGE)], ..Default::default() }
}

#[track_caller]
fn refused(bed: &mut Bed, request: Export, status: Status) -> Refusal {
    bed.guest.export(request).refused(status)
}

/// [dev-export-1] [dev-export-2]
#[test]
fn size_is_the_sum_of_the_segments() {
    let mut bed = bed();
    let good = one_page(&mut bed);
    for size in [0, 1, PAGE - 1, PAGE + 1, 2 * PAGE, u64::MAX] {
        refused(&mut bed, Export { size: Some(size), ..good.clone() }, Status::Inval);
    }
    let none = Export { segments: Vec::new(), ..good.clone() };
    refused(&mut bed, Export { size: Some(0), ..none.clone() }, Status::Inval);
    refused(&mut bed, Export { size: Some(PAGE), ..none }, Status::Inval);
    let addr = good.segments[0].0;
    let empty = vec![(addr, PAGE), (addr + PAGE, 0)];
    refused(&mut bed, Export { segments: empty, ..good.clone() }, Status::Inval);
    let wraps = vec![(0, 1 << 63), (0, 1 << 63), (addr, PAGE)];
    refused(&mut bed, Export { segments: wraps, ..good.clone() }, Status::Inval);
    bed.guest.export(good).expect("the same, well-formed");
}

/// [dev-export-3]
#[test]
fn access_is_a_set_that_is_not_empty() {
    let mut bed = bed();
    let good = one_page(&mut bed);
    for access in [0, 4, 7, 0x8000_0000, u32::MAX] {
        refused(&mut bed, Export { access, ..good.clone() }, Status::Inval);
    }
    for access in [access::READ, access::WRITE, READ_WRITE] {
        let handle = bed.guest.export(Export { access, ..good.clone() }).expect("EXPORT").handle;
        assert_eq!(bed.guest.query(handle.get()).expect("QUERY").access.get(), access);
    }
}

/// [dev-export-4]
#[test]
fn names_are_text() {
    let mut bed = bed();
    let good = one_page(&mut bed);
    let mut behind_nul = name("a");
    behind_nul[5] = b'b';
    for name in [[0xff; 32], [0xc3; 32], behind_nul] {
        refused(&mut bed, Export { name, ..good.clone() }, Status::Inval);
    }
    for text in ["", "frame", "h\u{e9}t \u{1f5bc}", "exactly thirty-two bytes of text"] {
        let export = bed.guest.export(Export { name: name(text), ..good.clone() }).expect("EXPORT");
        let handle = export.handle.get();
        bed.guest.grant(Grant { handle, ..Default::default() }).expect("GRANT");
        let list = bed.client().list().expect("LIST");
        let listed = list.iter().find(|buffer| *buffer.uuid.as_bytes() == export.uuid);
        assert_eq!(listed.expect("offered").name, text);
    }
}

/// [dev-export-5]
#[test]
fn an_object_belongs_to_a_part() {
    let mut bed = bed();
    let good = one_page(&mut bed);
    refused(&mut bed, Export { object: [1; 16], ..good }, Status::Inval);
}

fn image(size: u64) -> Image {
    let mut image = Image {
        fourcc: 0x3432_5258.into(),
        nr_planes: 1.into(),
        width: 32.into(),
        height: 32.into(),
        ..Default::default()
    };
    image.planes[0].stride = 128.into();
    image.planes[1].offset = size.into();
    image
}

fn with_image(good: &Export, image: &Image) -> Export {
    Export { metadata_type: metadata::IMAGE, metadata: image.as_bytes().to_vec(), ..good.clone() }
}

/// [dev-export-6] [dev-export-7]
#[test]
fn metadata_has_a_type_and_a_form() {
    let mut bed = bed();
    let good = one_page(&mut bed);
    for metadata_type in [2, 3, 0x7fff_ffff] {
        refused(&mut bed, Export { metadata_type, ..good.clone() }, Status::Inval);
    }
    let untyped = Export { metadata: vec![1; 8], ..good.clone() };
    refused(&mut bed, untyped, Status::Inval);
    let plane = image(0);
    for len in [0, 80, 87, 89, 96] {
        let mut request = with_image(&good, &plane);
        request.metadata.resize(len, 0);
        refused(&mut bed, request, Status::Inval);
    }
    for nr_planes in [0, 5, u32::MAX] {
        let bad = Image { nr_planes: nr_planes.into(), ..plane };
        refused(&mut bed, with_image(&good, &bad), Status::Inval);
    }
    let mut reserved = plane;
    reserved.planes[0].reserved = 1.into();
    refused(&mut bed, with_image(&good, &reserved), Status::Inval);
    for (offset, nr_planes) in [(PAGE, 2), (u64::MAX, 2)] {
        let bad = Image { nr_planes: nr_planes.into(), ..image(offset) };
        refused(&mut bed, with_image(&good, &bad), Status::Inval);
    }
    let two = Image { nr_planes: 2.into(), ..image(PAGE - 1) };
    bed.guest.export(with_image(&good, &two)).expect("the last byte is inside");
    bed.guest.export(with_image(&good, &image(0))).expect("IMAGE");
}

/// [dev-export-8]
#[test]
fn segments_are_aligned() {
    let mut bed = bed();
    let good = one_page(&mut bed);
    let addr = good.segments[0].0;
    let wrap = u64::MAX - PAGE + 1;
    for segment in [(addr + 1, PAGE), (addr + 2048, PAGE), (addr, 512), (addr, PAGE + 8)] {
        let request = Export { segments: vec![segment], ..good.clone() };
        refused(&mut bed, request, Status::Range);
    }
    let segments = vec![(wrap, 2 * PAGE)];
    refused(&mut bed, Export { segments, ..good.clone() }, Status::Range);
    // The last page of all ends at 2^64: it fits, but is no memory.
    let request = Export { segments: vec![(wrap, PAGE)], ..good };
    let refusal = bed.guest.export(request).expect_err("no memory");
    assert!([Status::Range, Status::Fault].contains(&refusal.status), "{refusal:?}");
}

/// [dev-export-9]
#[test]
fn segments_do_not_overlap() {
    let mut bed = bed();
    let good = one_page(&mut bed);
    let addr = bed.guest.pages(8);
    let at = |page: u64, pages: u64| (addr + page * PAGE, pages * PAGE);
    for segments in [
        vec![at(0, 1), at(0, 1)],
        vec![at(0, 2), at(1, 2)],
        vec![at(1, 1), at(0, 4)],
        vec![at(0, 1), at(4, 2), at(2, 1), at(5, 1)],
    ] {
        refused(&mut bed, Export { segments, ..good.clone() }, Status::Inval);
    }
    let segments = vec![at(6, 2), at(0, 2), at(4, 2), at(2, 2)];
    bed.guest.export(Export { segments, ..good.clone() }).expect("any order");
    bed.guest.export(good).expect("memory may be exported more than once");
}

/// [dev-export-10]
#[test]
fn metadata_has_a_bound() {
    let mut bed = bed();
    let good = one_page(&mut bed);
    let limit = bed.guest.config.max_metadata.get() as usize;
    let private =
        |len| Export { metadata_type: metadata::PRIVATE, metadata: vec![7; len], ..good.clone() };
    refused(&mut bed, private(limit + 1), Status::Quota);
    bed.guest.export(private(limit)).expect("at the limit");
}

/// [dev-export-11]
#[test]
fn size_has_a_bound() {
    let mut bed = bed_with("name=a,max-bytes=1048576");
    let limit = bed.guest.config.max_buffer_size.get();
    assert!(limit <= 1 << 20, "{limit} of 1 MiB in all");
    let addr = bed.guest.pages(257);
    let of = |len| Export { segments: vec![(addr, len)], ..Default::default() };
    refused(&mut bed, of(limit + PAGE), Status::Quota);
    bed.guest.export(of(limit)).expect("at the limit");
}

/// [dev-export-12] [dev-export-20]
#[test]
fn exports_have_a_bound_each_and_in_all() {
    let mut bed = bed_with("name=a,max-exports=3,max-bytes=1048576");
    assert_eq!(bed.guest.config.max_exports.get(), 3);
    assert_eq!(bed.guest.config.max_total_size.get(), 1 << 20);
    let handles: Vec<u64> = (0..3).map(|_| bed.exported(1).handle).collect();
    let good = one_page(&mut bed);
    refused(&mut bed, good.clone(), Status::Quota);
    bed.guest.release(handles[0]).expect("RELEASE");
    let third = bed.guest.export(good.clone()).expect("room again").handle.get();
    for handle in [third, handles[1], handles[2]] {
        bed.guest.release(handle).expect("RELEASE");
    }
    let rest = bed.guest.pages(256);
    let of = |len| Export { segments: vec![(rest, len)], ..Default::default() };
    bed.guest.export(good).expect("one page");
    refused(&mut bed, of(1 << 20), Status::Quota);
    bed.guest.export(of((1 << 20) - PAGE)).expect("at the limit");
}

/// [dev-export-17] [dev-handle-1] [dev-handle-2]
#[test]
fn uuids_are_random_and_handles_new() {
    let mut bed = bed();
    let mut uuids = std::collections::BTreeSet::new();
    let mut handles = std::collections::BTreeSet::new();
    for _ in 0..64 {
        let buffer = bed.exported(1);
        let uuid = Uuid::from_bytes(buffer.uuid);
        assert_eq!(uuid.get_version_num(), 4);
        assert_eq!(uuid.get_variant(), uuid::Variant::RFC4122);
        assert!(uuids.insert(buffer.uuid), "{uuid} again");
        assert_ne!(buffer.handle, 0);
        assert!(handles.insert(buffer.handle), "handle {} again", buffer.handle);
        bed.guest.release(buffer.handle).expect("RELEASE");
    }
}

/// Metadata and the image travel to the host byte for byte.
#[test]
fn metadata_travels_as_it_is() {
    let mut bed = bed();
    let good = one_page(&mut bed);
    let private = Export {
        metadata_type: metadata::PRIVATE + 7,
        metadata: (0..123).collect(),
        ..good.clone()
    };
    for request in [private, with_image(&good, &image(0))] {
        let export = bed.guest.export(request.clone()).expect("EXPORT");
        let handle = export.handle.get();
        bed.guest.grant(Grant { handle, ..Default::default() }).expect("GRANT");
        let lease = acquire(&mut bed.client(), &buffer(&export, 0, 1));
        assert_eq!(lease.buffer.metadata_type, request.metadata_type);
        assert_eq!(lease.metadata, request.metadata);
        if request.metadata_type == metadata::IMAGE {
            wire::Image::read_from_bytes(&lease.metadata).expect("88 bytes");
        }
    }
}
