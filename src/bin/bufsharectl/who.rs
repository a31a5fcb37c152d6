//! Who holds a buffer and who waits for whom, in sentences and as JSON.
//!
//! It puts together what the daemon knows (rights) and what /proc shows (descriptors).

use std::fmt::Write;
use std::time::Duration;

use bufshare::host::holders::{Holder, Holders, Report};
use bufshare::host::wire::HolderKind;
use bufshare::protocol::State;
use serde_json::{Value, json};

use crate::processes::{Found, Process};
use crate::show::access_text;

/// What is said of one buffer's holders, line by line.
pub fn lines(told: &Holders, seen: &Found) -> Vec<(&'static str, String)> {
    let report = &told.report;
    let mut lines =
        vec![("state", state_text(report)), ("exported", format!("{} ago", age_text(report.age)))];
    if let Some(memory) = &told.memory {
        lines.push(("memory", format!("inode {} of device {:#x}", memory.inode, memory.device)));
    }
    let mut named = Vec::new();
    // A VM that exported it holds its own pages, and that is no news.
    let exporter = |holder: &Holder| holder.kind == Some(HolderKind::Exporter);
    for holder in told.holders.iter().filter(|holder| !exporter(holder) || holder.pid != 0) {
        let process =
            seen.processes.iter().find(|process| holder.pid != 0 && process.pid == holder.pid);
        let mut text = name(holder);
        match holder.kind {
            Some(HolderKind::Lease) => {
                let _ = write!(text, ", lease {}", holder.number);
            }
            Some(HolderKind::Exporter) => {}
            _ => {
                let _ = write!(text, ", {}", count(holder.mappings, "mapping"));
            }
        }
        let _ = write!(text, ", {}", access_text(holder.access));
        if holder.revoked {
            text.push_str(", revoked but not handed back");
        }
        let _ = write!(text, ", since {}", age_text(holder.age));
        // Several leases of one process have its descriptors together.
        if let Some(process) = process.filter(|process| !named.contains(&process.pid)) {
            let _ = write!(text, "; {}", descriptors(process));
            named.push(process.pid);
        }
        lines.push(("held by", text));
    }
    for process in seen.processes.iter().filter(|process| !named.contains(&process.pid)) {
        let text = format!(
            "pid {} {} without a lease: {}",
            process.pid,
            process.name,
            descriptors(process)
        );
        lines.push(("also", text));
    }
    if let Some(text) = unexplained(told, seen) {
        lines.push(("also", text));
    }
    lines.extend(waits(told).into_iter().map(|text| ("waits", text)));
    if report.buffer.use_count == 0 && lines.iter().all(|(key, _)| *key != "also") {
        lines.push(("held by", "nobody".to_owned()));
    }
    lines
}

/// References that nothing explains which this user can see.
fn unexplained(told: &Holders, seen: &Found) -> Option<String> {
    let references = told.memory?.references?;
    let known: u32 = seen.processes.iter().map(|process| process.fds + process.mappings).sum();
    let left = references.checked_sub(known).filter(|left| *left > 0)?;
    let hidden = match seen.hidden {
        0 => String::new(),
        hidden => format!(", or of one of {hidden} processes that only root may look into"),
    };
    Some(format!(
        "{}: on their way between processes, of the kernel (an attached device){hidden}",
        count(left, "more reference")
    ))
}

/// Who waits, and for whom.
pub fn waits(told: &Holders) -> Vec<String> {
    let mut waiting: Vec<&Holder> =
        told.holders.iter().filter(|holder| holder.waits != 0).collect();
    waiting.sort_by_key(|holder| holder.place);
    let wait = |waiter: &&Holder| {
        let others = told.holders.iter().filter(|other| waiter.waits_for(other));
        let others = others.map(|other| match other.holds {
            0 => format!("{}, which waits before it", name(other)),
            holds => format!("{}, which holds {}", name(other), access_text(holds)),
        });
        let fence = waiter.fenced.then(|| "a fence of the host".to_owned());
        let others: Vec<String> = others.chain(fence).collect();
        let whom = if others.is_empty() { "its turn".to_owned() } else { others.join("; ") };
        let (want, left) = (access_text(waiter.waits), age_text(waiter.left));
        format!("{} to {want}, for {left} at most: for {whom}", name(waiter))
    };
    waiting.iter().map(wait).chain(point_waits(told)).collect()
}

/// Who waits for a point, and who can bring it.
fn point_waits(told: &Holders) -> impl Iterator<Item = String> {
    let wait = |waiter: &Holder| {
        let (acquire, release) = (waiter.acquire_point, waiter.release_point);
        let content = format!("point {acquire} of ACQUIRE, which is at {}", told.acquired);
        let points = [(acquire, content), (release, format!("point {release} of RELEASE"))];
        let points = points.into_iter().filter(|(point, _)| *point != 0);
        let points: Vec<String> = points.map(|(_, text)| text).collect();
        if points.is_empty() {
            return None;
        }
        let others = told.holders.iter().filter(|other| waiter.awaits_point_of(other));
        let exporter = waiter.kind == Some(HolderKind::Exporter);
        let others = others.map(|other| match other.released {
            at if exporter && at < release => format!("{}, which is at {at}", name(other)),
            _ => name(other),
        });
        let others: Vec<String> = others.collect();
        let whom = if others.is_empty() { "itself".to_owned() } else { others.join("; ") };
        let (points, left) = (points.join(" and "), age_text(waiter.points_left));
        Some(format!("{} for {points}, for {left} at most: for {whom}", name(waiter)))
    };
    told.holders.iter().filter_map(wait)
}

/// The same for programs.
pub fn document(told: &Holders, seen: &Found) -> Value {
    let holders = told.holders.iter().map(|holder| {
        let waits_for = told.holders.iter().filter(|other| holder.waits_for(other));
        let id = |other: &Holder| json!({ "kind": kind(other), "number": other.number, "peer": other.peer });
        let waits_for = waits_for.map(id);
        let points_of = told.holders.iter().filter(|other| holder.awaits_point_of(other)).map(id);
        json!({
            "kind": kind(holder), "name": holder.name, "peer": holder.peer, "pid": holder.pid,
            "number": holder.number, "age_ms": millis(holder.age), "access": access_text(holder.access),
            "holds": access_text(holder.holds), "waits": access_text(holder.waits),
            "waits_for": waits_for.collect::<Vec<_>>(), "left_ms": millis(holder.left),
            "mappings": holder.mappings, "fence": holder.fenced, "revoked": holder.revoked,
            "acquire_point": holder.acquire_point, "release_point": holder.release_point,
            "released": holder.released, "points_left_ms": millis(holder.points_left),
            "waits_for_points_of": points_of.collect::<Vec<_>>(),
        })
    });
    let processes = seen.processes.iter().map(|process| {
        json!({ "pid": process.pid, "name": process.name, "fds": process.fds, "mappings": process.mappings })
    });
    let leases = told.holders.iter().filter(|holder| holder.kind == Some(HolderKind::Lease));
    let leases = leases.map(|lease| {
        json!({ "lease": lease.number, "pid": lease.pid, "client": lease.name,
                "access": access_text(lease.access) })
    });
    let report = &told.report;
    json!({
        "leases": leases.collect::<Vec<_>>(), "nr_leases": report.leases,
        "state": state_name(report), "owner_gone": report.owner_gone, "age_ms": millis(report.age),
        "device": told.memory.map(|memory| memory.device), "inode": told.memory.map(|memory| memory.inode),
        "references": told.memory.and_then(|memory| memory.references),
        "holders": holders.collect::<Vec<_>>(), "processes": processes.collect::<Vec<_>>(),
        "hidden_processes": seen.hidden, "acquired": told.acquired,
    })
}

fn kind(holder: &Holder) -> &'static str {
    holder.kind.map_or("unknown", HolderKind::name)
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn name(holder: &Holder) -> String {
    let who = if holder.name.is_empty() { "?" } else { &holder.name };
    match holder.kind {
        Some(HolderKind::Lease) => format!("pid {} {who}", holder.pid),
        Some(HolderKind::Exporter) if holder.pid != 0 => {
            format!("its exporter pid {} {who}", holder.pid)
        }
        Some(HolderKind::Exporter) => format!("its exporter {who}"),
        _ => format!("VM {who}"),
    }
}

fn descriptors(process: &Process) -> String {
    let parts = [(process.fds, "fd"), (process.mappings, "mapping")];
    let parts = parts.iter().filter(|(n, _)| *n > 0).map(|(n, what)| count(*n, what));
    parts.collect::<Vec<_>>().join(" and ")
}

fn count(n: u32, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

/// A state, as `top` shows it.
pub fn state_name(report: &Report) -> &'static str {
    report.state.map_or("unknown", |state| match state {
        State::Exported => "exported",
        State::InUse => "in use",
        State::Releasing => "releasing",
        State::Released => "released",
        State::Attached | State::Mapped | State::Revoked => "unknown",
    })
}

fn state_text(report: &Report) -> String {
    let state = state_name(report);
    let why = match report.state {
        _ if report.owner_gone => ": its exporter is gone, somebody still has it",
        Some(State::Releasing) => ": its exporter wants it back",
        Some(State::Released) => ": its exporter has its pages back, a copy lives on",
        _ => "",
    };
    format!("{state}{why}")
}

/// As a person says it.
pub fn age_text(age: Duration) -> String {
    match age.as_secs() {
        0 => format!("{} ms", age.as_millis()),
        secs @ 1..120 => format!("{secs} s"),
        secs @ 120..7200 => format!("{} m", secs / 60),
        secs @ 7200..172_800 => format!("{} h", secs / 3600),
        secs => format!("{} d", secs / 86_400),
    }
}
