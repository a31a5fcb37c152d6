//! A guest must not fill the log: so many lines a second, then a count of those that were left out.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::limits::LOG_LINES_PER_SECOND;

/// Decides which lines are written.
#[derive(Debug, Default)]
pub struct Throttle(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    since: Option<Instant>,
    written: u32,
    left_out: u64,
}

impl Throttle {
    /// A throttle that has let nothing through yet.
    pub const fn new() -> Throttle {
        Throttle(Mutex::new(State { since: None, written: 0, left_out: 0 }))
    }

    /// Whether one more line may be written, and how many were left out since the last one.
    pub fn allow(&self) -> Option<u64> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        if state.since.is_none_or(|since| now.duration_since(since) >= Duration::from_secs(1)) {
            state.since = Some(now);
            state.written = 0;
        }
        if state.written >= LOG_LINES_PER_SECOND {
            state.left_out += 1;
            return None;
        }
        state.written += 1;
        Some(std::mem::take(&mut state.left_out))
    }
}

/// Logs a line that a guest can cause: `throttled!(throttle, Level, "format", ..)`.
#[macro_export]
macro_rules! throttled {
    ($throttle:expr, $level:ident, $($text:tt)+) => {
        if let Some(left_out) = $throttle.allow() {
            if left_out > 0 {
                log::log!(log::Level::$level, "({left_out} such lines were left out)");
            }
            log::log!(log::Level::$level, $($text)+);
        }
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_beyond_the_limit_are_counted() {
        let throttle = Throttle::new();
        let written = (0..LOG_LINES_PER_SECOND + 10).filter(|_| throttle.allow().is_some()).count();
        assert_eq!(written, LOG_LINES_PER_SECOND as usize);
        assert_eq!(throttle.0.lock().unwrap().left_out, 10);
    }
}
