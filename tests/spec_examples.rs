//! Replays the numbered examples of `spec/virtio-bufshare.md` against the daemon, byte for byte.
//!
//! It knows the notation of the examples and nothing of what they mean.

mod common;

use std::collections::HashMap;

use bufshare::protocol::vq;
use common::{Daemon, Guest, SOON};

const CHAPTER: &str = include_str!("../spec/virtio-bufshare.md");

/// One byte of an example.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Byte {
    Is(u8),
    Any,
    /// Byte `.1` of what the device chose, named `.0`.
    Chosen(String, usize),
}

#[derive(Debug)]
struct Example {
    title: String,
    queue: u16,
    writable: u32,
    request: Vec<Byte>,
    response: Vec<Byte>,
}

fn bytes(line: &str) -> Vec<Byte> {
    let mut bytes = Vec::new();
    for word in line.split(';').next().unwrap_or("").split_whitespace() {
        let (word, count) = word.split_once('*').map_or((word, 1), |(word, count)| {
            (word, count.parse().unwrap_or_else(|_| panic!("count in {line}")))
        });
        for i in 0..count {
            bytes.push(match word {
                ".." => Byte::Any,
                _ if word.starts_with(['H', 'U']) => Byte::Chosen(word.to_owned(), i),
                _ => Byte::Is(u8::from_str_radix(word, 16).expect("hex")),
            });
        }
    }
    bytes
}

fn examples() -> Vec<Example> {
    let mut title = String::new();
    let mut all: Vec<Example> = Vec::new();
    let mut lines = CHAPTER.lines();
    while let Some(line) = lines.next() {
        if let Some(text) = line.strip_prefix("### Example ") {
            title = text.to_owned();
        }
        if line != "```wire" {
            continue;
        }
        let head = lines.next().expect("a head line");
        let (queue, writable) = head.split_once(' ').expect("queue and length");
        let mut example = Example {
            title: title.clone(),
            queue: match queue {
                "control" => vq::CONTROL,
                "event" => vq::EVENT,
                "sync" => vq::SYNC,
                _ => panic!("queue {queue}"),
            },
            writable: writable.parse().expect("length"),
            request: Vec::new(),
            response: Vec::new(),
        };
        for line in lines.by_ref().take_while(|line| *line != "```") {
            let (side, rest) = line.split_at(1);
            match side {
                ">" => example.request.extend(bytes(rest)),
                "<" => example.response.extend(bytes(rest)),
                _ => panic!("line {line} in example {title}"),
            }
        }
        all.push(example);
    }
    all
}

#[test]
fn the_examples_are_numbered() {
    let all = examples();
    assert!(all.len() >= 20, "the notation changed?");
    for (i, example) in all.iter().enumerate() {
        assert!(example.title.starts_with(&format!("{}:", i + 1)), "{}", example.title);
    }
}

#[test]
fn the_device_answers_as_the_examples_say() {
    let daemon = Daemon::start(&["a"]);
    let mut guest = Guest::connect(&daemon, "a");
    let mut chosen: HashMap<(String, usize), u8> = HashMap::new();
    for example in examples() {
        let title = &example.title;
        let written = if example.queue == vq::EVENT {
            let answer = guest.event_ring().wait(SOON).unwrap_or_else(|| panic!("{title}: none"));
            guest.stock_events(1);
            answer.written().to_vec()
        } else {
            let resolve = |byte: &Byte| match byte {
                Byte::Is(value) => *value,
                Byte::Any => panic!("{title}: any byte in a request"),
                Byte::Chosen(name, i) => chosen[&(name.clone(), *i)],
            };
            let request: Vec<u8> = example.request.iter().map(resolve).collect();
            guest.raw(example.queue, &[&request], &[example.writable]).written().to_vec()
        };
        assert_eq!(written.len(), example.response.len(), "{title}: used length; {written:02x?}");
        for (at, (&got, want)) in written.iter().zip(&example.response).enumerate() {
            let want = match want {
                Byte::Is(value) => *value,
                Byte::Any => got,
                Byte::Chosen(name, i) => *chosen.entry((name.clone(), *i)).or_insert(got),
            };
            assert_eq!(got, want, "{title}: byte {at} of {written:02x?}");
        }
    }
}
