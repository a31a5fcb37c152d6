//! When to ask for a stable view, when to show it, when to let go: the pace of one surface that
//! shows one buffer.
//!
//! Pure: it knows generations and what the compositor told, not Wayland, sockets or time.
//!
//! READ is held from BEGIN until the compositor is done with that content: it released the buffer,
//! or it painted once more after the frame that first showed it. A newer generation needs no such
//! care: the content that was shown is overwritten already.

use std::collections::VecDeque;

/// What the caller does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Send BEGIN|READ, and report [`Pace::begun`] or [`Pace::begin_failed`].
    Begin,
    /// Attach the buffer, damage all of it, ask for a frame callback, commit.
    Show,
    /// Ask for one more frame callback and commit, with nothing new.
    Settle,
    /// Send END|READ.
    End,
    /// Tell that this generation is on the screen.
    Shown(u64),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Idle,
    /// BEGIN is sent.
    Asked,
    /// A commit with new content waits for its frame callback.
    Committed,
    /// Its frame was painted; the next one tells that it is over.
    Settling,
    /// The picture is held until the end.
    Held,
}

/// The pace of one surface.
#[derive(Debug)]
pub struct Pace {
    state: State,
    /// The newest generation that is known, and the one that was last committed.
    newest: u64,
    shown: u64,
    /// READ is held.
    reading: bool,
    hold: bool,
    commit: u64,
    steps: VecDeque<Step>,
}

impl Pace {
    /// Starts by showing what there is. With `hold` that one picture is held and never replaced.
    pub fn new(generation: u64, hold: bool) -> Pace {
        let steps = VecDeque::from([Step::Begin]);
        let (newest, shown) = (generation, generation);
        Pace { state: State::Asked, newest, shown, reading: false, hold, commit: 0, steps }
    }

    /// The next thing to do, if there is one.
    pub fn next_step(&mut self) -> Option<Step> {
        let step = self.steps.pop_front();
        if matches!(step, Some(Step::Show | Step::Settle)) {
            self.commit += 1;
        }
        step
    }

    /// The number of the last commit, for its frame callback to bear.
    pub fn commit(&self) -> u64 {
        self.commit
    }

    /// Whether a frame callback is awaited.
    pub fn awaits_frame(&self) -> bool {
        matches!(self.state, State::Committed | State::Settling)
    }

    /// The generation advanced.
    pub fn changed(&mut self, generation: u64) {
        self.newest = self.newest.max(generation);
        if self.state == State::Idle {
            self.follow();
        }
    }

    /// BEGIN was answered with this generation.
    pub fn begun(&mut self, generation: u64) {
        self.newest = self.newest.max(generation);
        self.shown = generation;
        self.reading = true;
        self.state = State::Committed;
        self.steps.push_back(Step::Show);
    }

    /// BEGIN ended without a view: somebody writes for long.
    pub fn begin_failed(&mut self) {
        self.steps.push_back(Step::Begin);
    }

    /// The frame callback of commit number `commit` came.
    pub fn frame_done(&mut self, commit: u64) {
        if commit != self.commit {
            return;
        }
        match self.state {
            State::Committed => {
                self.steps.push_back(Step::Shown(self.shown));
                if self.hold {
                    self.state = State::Held;
                } else if self.reading && self.newest == self.shown {
                    self.state = State::Settling;
                    self.steps.push_back(Step::Settle);
                } else {
                    self.let_go();
                    self.follow();
                }
            }
            State::Settling => {
                self.let_go();
                self.follow();
            }
            State::Idle | State::Asked | State::Held => {}
        }
    }

    /// The compositor released the buffer: what it needs is copied.
    pub fn released(&mut self) {
        if self.awaits_frame() && !self.hold {
            self.let_go();
        }
    }

    /// No frame callback comes, because nobody sees the window: others may write meanwhile.
    pub fn unseen(&mut self) {
        if self.awaits_frame() && !self.hold {
            self.let_go();
            self.follow();
        }
    }

    fn let_go(&mut self) {
        if std::mem::take(&mut self.reading) {
            self.steps.push_back(Step::End);
        }
    }

    fn follow(&mut self) {
        self.state = if self.newest > self.shown {
            self.steps.push_back(Step::Begin);
            State::Asked
        } else {
            State::Idle
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn steps(pace: &mut Pace) -> Vec<Step> {
        std::iter::from_fn(|| pace.next_step()).collect()
    }

    fn started(generation: u64, hold: bool) -> Pace {
        let mut pace = Pace::new(generation, hold);
        assert_eq!(steps(&mut pace), [Step::Begin]);
        pace.begun(generation);
        assert_eq!(steps(&mut pace), [Step::Show]);
        pace
    }

    #[test]
    fn a_still_picture_is_let_go_after_two_frames() {
        let mut pace = started(3, false);
        pace.frame_done(1);
        assert_eq!(steps(&mut pace), [Step::Shown(3), Step::Settle]);
        pace.frame_done(1);
        assert_eq!(steps(&mut pace), []);
        pace.frame_done(2);
        assert_eq!(steps(&mut pace), [Step::End]);
        pace.changed(3);
        assert_eq!(steps(&mut pace), []);
        pace.changed(4);
        assert_eq!(steps(&mut pace), [Step::Begin]);
    }

    #[test]
    fn what_came_while_a_frame_was_awaited_follows_it() {
        let mut pace = started(3, false);
        pace.changed(4);
        pace.changed(5);
        assert_eq!(steps(&mut pace), []);
        pace.frame_done(1);
        assert_eq!(steps(&mut pace), [Step::Shown(3), Step::End, Step::Begin]);
        pace.begun(5);
        pace.changed(5);
        assert_eq!(steps(&mut pace), [Step::Show]);
        pace.frame_done(2);
        assert_eq!(steps(&mut pace), [Step::Shown(5), Step::Settle]);
    }

    #[test]
    fn a_released_buffer_needs_no_second_frame() {
        let mut pace = started(3, false);
        pace.released();
        assert_eq!(steps(&mut pace), [Step::End]);
        pace.frame_done(1);
        assert_eq!(steps(&mut pace), [Step::Shown(3)]);
        assert!(!pace.awaits_frame());
    }

    #[test]
    fn an_unseen_window_keeps_nobody_waiting() {
        let mut pace = started(3, false);
        pace.unseen();
        assert_eq!(steps(&mut pace), [Step::End]);
        pace.frame_done(1);
        assert_eq!(steps(&mut pace), []);
    }

    #[test]
    fn a_held_picture_stays() {
        let mut pace = started(3, true);
        pace.released();
        pace.changed(4);
        pace.frame_done(1);
        pace.unseen();
        pace.changed(5);
        assert_eq!(steps(&mut pace), [Step::Shown(3)]);
    }

    #[test]
    fn a_failed_begin_is_repeated() {
        let mut pace = Pace::new(1, false);
        assert_eq!(steps(&mut pace), [Step::Begin]);
        pace.begin_failed();
        assert_eq!(steps(&mut pace), [Step::Begin]);
    }
}
