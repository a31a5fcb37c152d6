//! Keeps account of the labels of `spec/virtio-bufshare.md`: every device requirement has a test that
//! names it in its doc comment, and no test names a label that does not exist.
//!
//! Requirements of features that the device does not offer yet are listed here with the feature bit;
//! the moment a bit is offered, its labels need tests.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use bufshare::protocol::feature;
use common::{Daemon, Guest};

const CHAPTER: &str = include_str!("../spec/virtio-bufshare.md");

/// Label prefixes whose requirements belong to a feature.
const OF_FEATURES: [(&str, u32); 4] = [
    ("dev-attach-", feature::IMPORT),
    ("dev-detach-", feature::IMPORT),
    ("dev-map-", feature::COPY),
    ("dev-point-", feature::TIMELINE),
];

/// Labels in square brackets.
fn labels(text: &str) -> impl Iterator<Item = String> + '_ {
    text.split('[').skip(1).filter_map(|rest| {
        let label = rest.split(']').next()?;
        let known = label.starts_with("dev-") || label.starts_with("drv-");
        (known && !label.contains(char::is_whitespace)).then(|| label.to_owned())
    })
}

fn sources(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).expect("tests").flatten() {
        let path = entry.path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|ext| ext == "rs") {
            found.push(path);
        }
    }
}

/// Label → tests that name it.
fn named_by_tests() -> BTreeMap<String, Vec<String>> {
    let mut files = Vec::new();
    sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests"), &mut files);
    let mut named: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for file in files {
        let mut docs = Vec::new();
        for line in fs::read_to_string(&file).expect("source").lines() {
            if let Some(doc) = line.strip_prefix("/// ") {
                docs.extend(labels(doc));
            } else if let Some(name) = line.strip_prefix("fn ") {
                let name = name.split('(').next().unwrap_or("").to_owned();
                for label in docs.drain(..) {
                    named.entry(label).or_default().push(name.clone());
                }
            } else if !line.starts_with('#') {
                docs.clear();
            }
        }
    }
    named
}

#[test]
fn labels_are_unique_and_numbered() {
    let mut last: BTreeMap<&str, u32> = BTreeMap::new();
    let defined: Vec<String> =
        CHAPTER.lines().filter(|line| line.starts_with("- [")).flat_map(labels).collect();
    assert!(defined.len() > 100, "{} labels: what happened to the chapter?", defined.len());
    for label in &defined {
        let (group, number) = label.rsplit_once('-').expect("group and number");
        let number: u32 = number.parse().unwrap_or_else(|_| panic!("{label}"));
        let last = last.entry(group).or_default();
        assert_eq!(number, *last + 1, "{label}");
        *last = number;
    }
}

#[test]
fn every_device_requirement_has_a_test() {
    let defined: BTreeSet<String> = labels(CHAPTER).collect();
    let named = named_by_tests();
    let unknown: Vec<_> = named.keys().filter(|label| !defined.contains(*label)).collect();
    assert!(unknown.is_empty(), "tests name labels that the chapter does not have: {unknown:?}");
    let daemon = Daemon::start(&["a"]);
    let offered = Guest::connect(&daemon, "a").offered;
    let later = |label: &str| {
        let of = OF_FEATURES.iter().find(|(prefix, _)| label.starts_with(prefix));
        of.is_some_and(|(_, bit)| offered & (1 << bit) == 0)
    };
    let untested: Vec<_> = defined
        .iter()
        .filter(|label| label.starts_with("dev-") && !named.contains_key(*label) && !later(label))
        .collect();
    assert!(untested.is_empty(), "device requirements without a test: {untested:?}");
}
