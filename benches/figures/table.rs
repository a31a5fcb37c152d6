//! What is printed: one line a figure, ours beside the bare system calls.
//!
//! It knows numbers and their budgets, not how they came about.

use std::time::Duration;

/// What half and what 99 of 100 of the attempts took at most, in nanoseconds.
#[derive(Debug, Clone, Copy)]
pub struct Spread {
    pub p50: f64,
    pub p99: f64,
}

impl Spread {
    fn of(mut times: Vec<Duration>) -> Spread {
        times.sort_unstable();
        let at = |percent: usize| times[(times.len() - 1) * percent / 100].as_nanos() as f64;
        Spread { p50: at(50), p99: at(99) }
    }

    fn best(self, other: Spread) -> Spread {
        Spread { p50: self.p50.min(other.p50), p99: self.p99.min(other.p99) }
    }
}

/// Both sides of a figure by turns, so that what else the machine does meets both; of each side the
/// best round counts. What takes long wants many short rounds: one of them is undisturbed.
pub fn side_by_side(
    rounds: u32,
    mut ours: impl FnMut() -> Vec<Duration>,
    mut bare: impl FnMut() -> Vec<Duration>,
) -> (Spread, Spread) {
    let mut round = || (Spread::of(ours()), Spread::of(bare()));
    let first = round();
    (1..rounds).fold(first, |(ours, bare), _| {
        let next = round();
        (ours.best(next.0), bare.best(next.1))
    })
}

/// What a figure must keep.
#[derive(Debug, Clone, Copy)]
pub enum Budget {
    AtMost(f64),
    AtLeast(f64),
    None,
}

/// The heading.
pub fn heading() {
    line(["figure", "ours", "bare", "ours/bare", "budget", ""]);
}

/// Two times and their ratio.
pub fn times(name: &str, ours: f64, bare: f64, budget: Budget) {
    let ratio = ours / bare;
    let (text, verdict) = judge(ratio, budget);
    line([name, &time(ours), &time(bare), &format!("{ratio:.2}"), &text, verdict]);
}

/// Two times for the same bytes and the ratio of the speeds.
pub fn speeds(name: &str, ours: f64, bare: f64, budget: Budget) {
    let ratio = bare / ours;
    let (text, verdict) = judge(ratio, budget);
    line([name, &time(ours), &time(bare), &format!("1/{ratio:.2}"), &text, verdict]);
}

/// One number with a unit.
pub fn value(name: &str, ours: f64, unit: &str, budget: Budget) {
    let (text, verdict) = judge(ours, budget);
    line([name, &format!("{ours:.1} {unit}"), "", "", &text, verdict]);
}

/// A figure that cannot be measured here.
pub fn skipped(name: &str, reason: &str) {
    println!("{name:<56} skipped: {reason}");
}

fn judge(figure: f64, budget: Budget) -> (String, &'static str) {
    let (text, kept) = match budget {
        Budget::AtMost(limit) => (format!("<= {limit}"), figure <= limit),
        Budget::AtLeast(limit) => (format!(">= {limit}"), figure >= limit),
        Budget::None => return (String::new(), ""),
    };
    (text, if kept { "ok" } else { "OVER" })
}

fn time(nanos: f64) -> String {
    match nanos {
        ..10_000.0 => format!("{nanos:.0} ns"),
        ..10_000_000.0 => format!("{:.1} us", nanos / 1e3),
        _ => format!("{:.1} ms", nanos / 1e6),
    }
}

fn line([name, ours, bare, ratio, budget, verdict]: [&str; 6]) {
    let text = format!("{name:<56} {ours:>11} {bare:>11} {ratio:>9} {budget:>8}  {verdict}");
    println!("{}", text.trim_end());
}
