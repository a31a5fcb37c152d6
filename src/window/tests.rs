//! The steps of places, one by one.
#![allow(clippy::arithmetic_side_effects)]

use super::*;

const NOW: Duration = Duration::from_secs(1);
const FILE: FileId = FileId { dev: 1, ino: 1 };
const SIZE: u64 = 16 * GRANULE;

fn range(page: u64, pages: u64) -> WindowRange {
    WindowRange { start: page * GRANULE, len: pages * GRANULE }
}

fn window() -> Window<u64> {
    Window::new(SIZE, 1)
}

/// Asks for a place; the token of the MAP and what it shows are its number.
fn ask(window: &mut Window<u64>, id: u64, page: u64) {
    window.check(range(page, 1)).unwrap();
    let place = Place::new(range(page, 1), (FILE, page * GRANULE), true, id, id);
    window.ask(PlaceId(id), place);
}

fn sent(window: &mut Window<u64>, now: Duration) -> Option<(&'static str, u64)> {
    Some(match window.next(now)? {
        Todo::Map { place, .. } => ("map", place.0),
        Todo::Unmap { place, .. } => ("unmap", place.0),
        Todo::Barrier { place, .. } => ("barrier", place.0),
    })
}

fn echo(page: u64) -> (FileId, u64, u64) {
    (FILE, page * GRANULE, GRANULE)
}

const RAM: (FileId, u64, u64) = (FileId { dev: 9, ino: 9 }, 0, 1 << 30);

fn shown(id: u64) -> Outcome<u64> {
    Outcome::Shown { map: Some(id), what: id }
}

/// A window that shows place 1 at page 0, as QEMU does.
fn one_shown() -> Window<u64> {
    let mut w = window();
    ask(&mut w, 1, 0);
    assert_eq!(sent(&mut w, NOW), Some(("map", 1)));
    assert_eq!(w.mapped(PlaceId(1), true, NOW), Outcome::Nothing);
    assert_eq!(w.memory(&[RAM, echo(0)]), (vec![shown(1)], false));
    w
}

#[test]
fn a_mapping_is_in_effect_when_it_is_echoed() {
    let mut w = one_shown();
    assert_eq!(w.max(), 7, "the echo is no memory of the guest");
    assert_eq!((sent(&mut w, NOW), w.deadline()), (None, None));
    // The echo may be seen before the answer.
    ask(&mut w, 2, 1);
    assert_eq!(sent(&mut w, NOW), Some(("map", 2)));
    assert_eq!(w.memory(&[RAM, echo(0), echo(1)]), (vec![], false));
    assert_eq!(w.mapped(PlaceId(2), true, NOW), shown(2));
}

#[test]
fn where_no_echo_comes_another_request_tells() {
    let mut w = window();
    ask(&mut w, 1, 15);
    assert_eq!(sent(&mut w, NOW), Some(("map", 1)));
    w.mapped(PlaceId(1), true, NOW);
    assert_eq!(w.deadline(), Some(NOW + ECHO_WAIT));
    assert_eq!(sent(&mut w, NOW), None, "it may still come");
    let barrier = Todo::Barrier { place: PlaceId(1), range: range(14, 1) };
    assert_eq!(w.next(NOW + ECHO_WAIT), Some(barrier), "at a free page");
    assert_eq!(w.settled(PlaceId(1)), shown(1));
    ask(&mut w, 2, 0);
    assert_eq!(sent(&mut w, NOW), Some(("map", 2)));
    w.mapped(PlaceId(2), true, NOW);
    assert_eq!(sent(&mut w, NOW), Some(("barrier", 2)), "this VMM never echoes");
    // A page that cannot be asked for is no page: the answer is enough.
    let mut full = Window::new(GRANULE, 0);
    ask(&mut full, 1, 0);
    full.next(NOW);
    full.mapped(PlaceId(1), true, NOW);
    let none = WindowRange { start: 0, len: 0 };
    let barrier = Todo::Barrier { place: PlaceId(1), range: none };
    assert_eq!(full.next(NOW + ECHO_WAIT), Some(barrier));
}

#[test]
fn what_goes_away_goes_first_and_others_wait_for_its_place() {
    let mut w = one_shown();
    ask(&mut w, 2, 1);
    assert_eq!(w.unmap(PlaceId(1), 10), Ok(true));
    assert_eq!(w.unmap(PlaceId(1), 11), Err(Status::Busy));
    ask(&mut w, 3, 0);
    assert_eq!(sent(&mut w, NOW), Some(("unmap", 1)));
    assert_eq!(sent(&mut w, NOW), Some(("map", 2)), "elsewhere nothing is held up");
    assert_eq!(sent(&mut w, NOW), None, "3 waits for 1");
    let gone = Outcome::Gone { map: None, unmap: Some(10), what: 1 };
    assert_eq!(w.unmapped(PlaceId(1), true), [gone]);
    assert_eq!(sent(&mut w, NOW), Some(("map", 3)));
    assert_eq!(w.unmap(PlaceId(1), 12), Ok(false), "nothing is there");
}

#[test]
fn a_kill_ends_every_step() {
    let mut w = one_shown();
    ask(&mut w, 2, 1);
    assert_eq!(w.kill(PlaceId(2)), (Some(2), Some(2)), "the VMM never heard of it");
    ask(&mut w, 3, 1);
    sent(&mut w, NOW);
    assert_eq!(w.kill(PlaceId(3)), (Some(3), None));
    assert_eq!(sent(&mut w, NOW), None, "the VMM is still busy with it");
    assert_eq!(w.mapped(PlaceId(3), true, NOW), Outcome::Shown { map: None, what: 3 });
    assert_eq!(sent(&mut w, NOW), Some(("unmap", 3)));
    assert_eq!(w.kill(PlaceId(3)), (None, None));
    assert_eq!(w.kill(PlaceId(1)), (None, None));
    assert_eq!(sent(&mut w, NOW), Some(("unmap", 1)));
    w.unmapped(PlaceId(1), true);
    w.unmapped(PlaceId(3), true);
    assert_eq!(w.places().count(), 0);
    ask(&mut w, 4, 0);
    sent(&mut w, NOW);
    w.mapped(PlaceId(4), true, NOW);
    assert_eq!(w.kill(PlaceId(4)), (Some(4), None), "nobody waits for its echo");
    assert_eq!(sent(&mut w, NOW), Some(("unmap", 4)));
}

#[test]
fn a_refusal_leaves_nothing_and_a_refused_unmap_a_place_that_nobody_gets() {
    let mut w = one_shown();
    ask(&mut w, 2, 1);
    sent(&mut w, NOW);
    let gone = Outcome::Gone { map: Some(2), unmap: None, what: 2 };
    assert_eq!(w.mapped(PlaceId(2), false, NOW), gone);
    w.unmap(PlaceId(1), 10).unwrap();
    ask(&mut w, 3, 0);
    sent(&mut w, NOW);
    let stays = Outcome::Stays { failed: vec![10] };
    let behind = Outcome::Gone { map: Some(3), unmap: None, what: 3 };
    assert_eq!(w.unmapped(PlaceId(1), false), [stays, behind]);
    assert_eq!(w.unmap(PlaceId(1), 11), Err(Status::Io));
    assert_eq!(w.check(range(0, 2)), Err(Status::Io));
    assert_eq!(w.check(range(1, 1)), Ok(()));
    assert_eq!(sent(&mut w, NOW), None, "it is not asked again");
}

#[test]
fn what_the_vmm_unmapped_by_itself_is_gone() {
    let mut w = one_shown();
    w.kill(PlaceId(1));
    ask(&mut w, 2, 0);
    assert_eq!(w.memory(&[RAM]), (vec![], false), "or its guest does not see the window now");
    assert_eq!(sent(&mut w, NOW), Some(("unmap", 1)), "so it is asked");
    let gone = Outcome::Gone { map: None, unmap: None, what: 1 };
    assert_eq!(w.unmapped(PlaceId(1), false), [gone]);
    assert_eq!(sent(&mut w, NOW), Some(("map", 2)));
    // What was not echoed yet may be there all the same.
    w.mapped(PlaceId(2), true, NOW);
    w.kill(PlaceId(2));
    w.memory(&[RAM]);
    assert_eq!(sent(&mut w, NOW), Some(("unmap", 2)));
    assert_eq!(w.unmapped(PlaceId(2), false), [Outcome::Stays { failed: vec![] }]);
}

#[test]
fn the_vmm_never_has_more_than_it_can_hold() {
    let mut w = window();
    for id in 0..7 {
        ask(&mut w, id, id);
    }
    assert_eq!(w.check(range(7, 1)), Err(Status::Quota));
    assert_eq!(w.memory(&[RAM, RAM, RAM]), (vec![], true), "memory was plugged");
    assert_eq!(w.max(), 5);
    assert_eq!((0..7).filter_map(|_| sent(&mut w, NOW)).count(), 5);
    for id in 0..5 {
        w.mapped(PlaceId(id), true, NOW);
    }
    // A reset of a VMM that unmaps nothing by itself: the next session sees five places again.
    (0..7).for_each(|id| assert_eq!(w.kill(PlaceId(id)).1.is_some(), id > 4));
    for id in 10..15 {
        ask(&mut w, id, id);
    }
    assert_eq!(w.check(range(15, 1)), Err(Status::Quota));
    for id in 0..5 {
        assert_eq!(sent(&mut w, NOW), Some(("unmap", id)));
    }
    assert_eq!(sent(&mut w, NOW), None);
    w.unmapped(PlaceId(0), true);
    assert_eq!(sent(&mut w, NOW), Some(("map", 10)));
    assert_eq!(sent(&mut w, NOW), None);
}

#[test]
fn what_was_not_asked_is_asked_later() {
    let mut w = window();
    ask(&mut w, 1, 0);
    for step in [("map", 1), ("map", 1)] {
        assert_eq!(sent(&mut w, NOW), Some(step));
        w.not_asked(PlaceId(1));
    }
    sent(&mut w, NOW);
    w.mapped(PlaceId(1), true, NOW);
    assert_eq!(sent(&mut w, NOW + ECHO_WAIT), Some(("barrier", 1)));
    w.not_asked(PlaceId(1));
    assert_eq!(sent(&mut w, NOW), Some(("barrier", 1)));
    w.settled(PlaceId(1));
    w.unmap(PlaceId(1), 10).unwrap();
    assert_eq!(sent(&mut w, NOW), Some(("unmap", 1)));
    w.not_asked(PlaceId(1));
    assert_eq!(sent(&mut w, NOW), Some(("unmap", 1)));
    // One that was killed meanwhile was never shown.
    let mut w = window();
    ask(&mut w, 2, 1);
    sent(&mut w, NOW);
    w.kill(PlaceId(2));
    assert_eq!(w.not_asked(PlaceId(2)), Outcome::Gone { map: None, unmap: None, what: 2 });
}

#[test]
fn a_broken_channel_ends_what_waits_for_it() {
    let mut w = one_shown();
    ask(&mut w, 2, 1);
    ask(&mut w, 3, 2);
    ask(&mut w, 4, 3);
    sent(&mut w, NOW);
    sent(&mut w, NOW);
    w.mapped(PlaceId(3), true, NOW);
    let gone = Outcome::Gone { map: Some(4), unmap: None, what: 4 };
    let failed = |token| Outcome::Stays { failed: vec![token] };
    assert_eq!(w.fail(), [failed(2), failed(3), gone]);
    assert_eq!((w.max(), sent(&mut w, NOW), w.deadline()), (0, None, None));
    assert_eq!(w.unmap(PlaceId(1), 10), Err(Status::Io), "nobody can say that it is gone");
    assert_eq!(w.check(range(5, 1)), Err(Status::Quota));
}

#[test]
fn two_places_of_the_same_pages_have_an_echo_each() {
    let mut w = window();
    for id in 1..3 {
        let place = Place::new(range(id, 1), (FILE, 0), true, id, id);
        w.ask(PlaceId(id), place);
        sent(&mut w, NOW);
        w.mapped(PlaceId(id), true, NOW);
    }
    assert_eq!(w.memory(&[RAM, echo(0)]), (vec![shown(1)], false));
    assert_eq!(w.memory(&[RAM, echo(0)]), (vec![], false), "that is the first one's");
    assert_eq!(w.memory(&[RAM, echo(0), echo(0)]), (vec![shown(2)], false));
    assert!(w.memory(&[RAM, echo(0), echo(0), echo(0)]).1, "the third is not ours");
}
