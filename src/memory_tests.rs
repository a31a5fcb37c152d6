//! Translation of guest ranges, over real memfds.
#![allow(clippy::arithmetic_side_effects)]

use super::*;
use proptest::prelude::*;
use rustix::fs::MemfdFlags;

const PAGE: u64 = GRANULE;

fn memfd(pages: u64, seals: SealFlags) -> Arc<File> {
    let fd =
        rustix::fs::memfd_create("t", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::fs::ftruncate(&fd, pages * PAGE).unwrap();
    rustix::fs::fcntl_add_seals(&fd, seals).unwrap();
    Arc::new(File::from(fd))
}

fn region(start: u64, pages: u64, file: &Arc<File>, file_start: u64) -> Region {
    let file = file.clone();
    let share = Share::of(&file, 0);
    Region { start: start * PAGE, len: pages * PAGE, file, file_start: file_start * PAGE, share }
}

fn pages(list: &[(u64, u64)]) -> Vec<Segment> {
    let segment =
        |(addr, len): &(u64, u64)| Segment { addr: (addr * PAGE).into(), len: (len * PAGE).into() };
    list.iter().map(segment).collect()
}

/// RAM below and above a hole, in one file, as a PC has it.
fn pc() -> MemoryMap {
    let ram = memfd(32, SealFlags::SHRINK | SealFlags::GROW);
    MemoryMap::new(vec![region(0, 16, &ram, 0), region(64, 16, &ram, 16)])
}

fn translate(map: &MemoryMap, list: &[(u64, u64)]) -> Result<Vec<(u64, u64)>, Refusal> {
    let size = list.iter().map(|(_, len)| len * PAGE).sum();
    check_shape(&pages(list), size)?;
    let (out, sealed) = map.translate(&pages(list), 8, false)?;
    assert!(sealed);
    Ok(out.iter().map(|segment| (segment.offset / PAGE, segment.len / PAGE)).collect())
}

#[test]
fn adjacent_ranges_merge_in_the_file() {
    assert_eq!(translate(&pc(), &[(1, 1), (2, 2), (8, 1)]).unwrap(), [(1, 3), (8, 1)]);
    // Adjacent in the file though not for the guest: one entry for udmabuf.
    assert_eq!(translate(&pc(), &[(15, 1), (64, 1)]).unwrap(), [(15, 2)]);
}

#[test]
fn what_is_outside_ram_faults_with_its_index() {
    assert_eq!(translate(&pc(), &[(1, 1), (16, 1)]), Err(Refusal::NotMemory(1)));
    assert_eq!(translate(&pc(), &[(15, 2)]), Err(Refusal::NotMemory(0)));
    assert_eq!(translate(&pc(), &[(79, 2)]), Err(Refusal::NotMemory(0)));
    assert_eq!(Refusal::NotMemory(7).status(), (Status::Fault, 7));
}

#[test]
fn shape_is_judged_before_the_map() {
    let map = MemoryMap::default();
    let odd = [Segment { addr: 1.into(), len: PAGE.into() }];
    assert_eq!(check_shape(&odd, PAGE), Err(Refusal::Misaligned(0)));
    let sum = Refusal::Sum { sum: PAGE, size: 2 * PAGE };
    assert_eq!(check_shape(&odd, 2 * PAGE), Err(sum), "INVAL goes before RANGE");
    assert_eq!(translate(&map, &[(3, 2), (0, 1), (4, 1)]), Err(Refusal::Malformed(2)));
    assert_eq!(translate(&map, &[(3, 0)]), Err(Refusal::Malformed(0)));
    let wraps = [Segment { addr: (u64::MAX - PAGE + 1).into(), len: PAGE.into() }];
    assert_eq!(check_shape(&wraps, PAGE), Err(Refusal::Misaligned(0)));
}

#[test]
fn segments_are_counted_after_merging_up_to_the_limit() {
    let apart: Vec<(u64, u64)> = (0..8).map(|n| (n * 2, 1)).collect();
    assert_eq!(translate(&pc(), &apart).unwrap().len(), 8);
    let mut more = apart.clone();
    more.push((65, 1));
    assert_eq!(translate(&pc(), &more), Err(Refusal::TooMany { count: 9, max: 8 }));
    let merged: Vec<(u64, u64)> = (0..16).map(|n| (n, 1)).collect();
    assert_eq!(translate(&pc(), &merged).unwrap(), [(0, 16)]);
}

#[test]
fn unsealed_memory_needs_leave() {
    let ram = memfd(4, SealFlags::empty());
    let map = MemoryMap::new(vec![region(0, 4, &ram, 0)]);
    assert_eq!(translate(&map, &[(0, 1)]), Err(Refusal::Unsealed(0)));
    let (_, sealed) = map.translate(&pages(&[(0, 1)]), 8, true).unwrap();
    assert!(!sealed);
}

#[test]
fn a_pipe_or_a_write_sealed_memfd_is_no_zero_copy_memory() {
    let (pipe, _) = std::io::pipe().unwrap();
    assert_eq!(Share::of(&pipe, 0), Share::Not);
    assert_eq!(Share::of(&*memfd(1, SealFlags::SHRINK | SealFlags::WRITE), 0), Share::Unsealed);
}

/// udmabuf takes huge pages, but whether there are any is another matter: the operator's.
#[test]
fn huge_pages_need_leave_and_may_be_shared() {
    let huge = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | MemfdFlags::HUGETLB;
    if let Ok(fd) = rustix::fs::memfd_create("t", huge) {
        rustix::fs::ftruncate(&fd, 2 << 20).unwrap();
        assert_eq!(Share::of(&fd, 0), Share::Unsealed);
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK).unwrap();
        assert_eq!(Share::of(&fd, 0), Share::Huge);
    }
    let ram = Region { share: Share::Huge, ..region(0, 4, &memfd(4, SealFlags::SHRINK), 0) };
    let map = MemoryMap::new(vec![ram]);
    assert!(map.has_unsealed());
    assert_eq!(translate(&map, &[(0, 1)]), Err(Refusal::Unsealed(0)));
    let (_, sealed) = map.translate(&pages(&[(0, 1)]), 8, true).unwrap();
    assert!(sealed);
}

#[test]
fn a_region_that_is_not_all_there_is_no_memory() {
    let ram = memfd(4, SealFlags::SHRINK);
    assert_eq!(Share::of(&*ram, 4 * PAGE), Share::Sealed);
    assert_eq!(Share::of(&*ram, 4 * PAGE + 1), Share::Not);
}

#[test]
fn pages_that_straddle_the_files_are_no_memory() {
    let ram = memfd(4, SealFlags::SHRINK);
    let odd = Region { start: PAGE / 2, ..region(0, 2, &ram, 0) };
    assert_eq!(translate(&MemoryMap::new(vec![odd]), &[(1, 1)]), Err(Refusal::NotMemory(0)));
    let short = Region { len: PAGE + PAGE / 2, ..region(0, 2, &ram, 0) };
    let rest = Region { start: short.len, ..region(0, 2, &ram, 2) };
    let map = MemoryMap::new(vec![short, rest]);
    assert_eq!(translate(&map, &[(0, 1)]).unwrap(), [(0, 1)]);
    assert_eq!(translate(&map, &[(0, 1), (1, 1)]), Err(Refusal::NotMemory(1)));
}

proptest! {
    /// Every byte of the buffer lands where the map says, whatever the segments.
    #[test]
    fn translation_is_exact(list in prop::collection::vec((0u64..90, 1u64..6), 1..12)) {
        let map = pc();
        let size: u64 = list.iter().map(|(_, len)| len * PAGE).sum();
        let wanted: Option<Vec<u64>> = list
            .iter()
            .flat_map(|(addr, len)| *addr..addr + len)
            .map(|page| match page {
                0..16 => Some(page),
                64..80 => Some(page - 64 + 16),
                _ => None,
            })
            .collect();
        let shape = check_shape(&pages(&list), size);
        let whole = shape.and_then(|()| map.translate(&pages(&list), 1000, false));
        if let Ok((out, _)) = whole {
            let got: Vec<u64> =
                out.iter().flat_map(|s| s.offset / PAGE..(s.offset + s.len) / PAGE).collect();
            prop_assert_eq!(Some(got), wanted);
            for at in 0..size / PAGE {
                let part = slice(&out, at * PAGE, size - at * PAGE).unwrap();
                prop_assert_eq!(part.iter().map(|s| s.len).sum::<u64>(), size - at * PAGE);
            }
            prop_assert!(slice(&out, PAGE, size).is_err());
        }
    }
}
