//! What `bufsharectl` prints, as tables for people and as JSON for programs.
//!
//! It knows the client's values, not how they were asked for. JSON keys are stable; numbers are
//! numbers, a UUID is text.

use std::fmt::Write;
use std::path::Path;

use bufshare::host::client::{Buffer, Client, Details, Event};
use bufshare::host::holders::Holders;
use bufshare::host::image::{Image, fourcc_text};
use bufshare::protocol::{Mode, Status, access, metadata};
use serde_json::{Map, Value, json};

use crate::dump::Picture;
use crate::processes::Found;
use crate::{Failure, who};

/// Every offered buffer.
pub fn list(client: &mut Client, as_json: bool) -> Result<String, Failure> {
    let mut rows = Vec::new();
    let mut documents = Vec::new();
    for buffer in client.list()? {
        let image = match buffer.metadata_type {
            // One that went away meanwhile is shown without its picture.
            metadata::IMAGE => client.query(buffer.uuid).ok().and_then(|details| image(&details)),
            _ => None,
        };
        documents.push(buffer_json(&buffer, image.as_ref()));
        rows.push(vec![
            buffer.name.clone(),
            buffer.uuid.to_string(),
            buffer.exporter_name.clone(),
            size_text(buffer.size),
            image.as_ref().map_or("-".to_owned(), image_text),
            mode_text(buffer.mode).to_owned(),
            access_text(buffer.access).to_owned(),
            buffer.generation.to_string(),
            buffer.use_count.to_string(),
        ]);
    }
    if as_json {
        return Ok(document(&Value::Array(documents)));
    }
    if rows.is_empty() {
        return Ok("no buffer is offered to the host\n".to_owned());
    }
    let head = ["NAME", "UUID", "FROM", "SIZE", "PICTURE", "MODE", "ACCESS", "GENERATION", "USES"];
    Ok(table(&head, &[3, 7, 8], &rows))
}

/// One buffer, and who holds it. `details` are there where the host may use it.
pub fn info(told: &Holders, details: Option<&Details>, seen: &Found, as_json: bool) -> String {
    let buffer = &told.report.buffer;
    let image = details.and_then(image);
    if as_json {
        let mut value = buffer_json(buffer, image.as_ref());
        if let (Value::Object(value), Value::Object(more)) = (&mut value, who::document(told, seen))
        {
            value.extend(more);
        }
        return document(&value);
    }
    let mut lines = vec![
        ("name", buffer.name.clone()),
        ("uuid", buffer.uuid.to_string()),
        ("exporter", format!("{} (peer {})", buffer.exporter_name, buffer.exporter)),
        ("size", format!("{} ({} bytes)", size_text(buffer.size), buffer.size)),
        ("mode", mode_text(buffer.mode).to_owned()),
        ("access", access_text(buffer.access).to_owned()),
        ("generation", buffer.generation.to_string()),
        ("uses", buffer.use_count.to_string()),
    ];
    match &image {
        Some(image) => {
            lines.push(("picture", image_text(image)));
            lines.push(("modifier", format!("{:#x}", image.modifier)));
            for plane in &image.planes {
                let text = format!("offset {}, stride {}", plane.offset, plane.stride);
                lines.push(("plane", text));
            }
        }
        None => {
            let text = format!("type {:#x}, {} bytes", buffer.metadata_type, buffer.metadata_len);
            lines.push(("metadata", text));
        }
    }
    lines.extend(who::lines(told, seen));
    let mut text = String::new();
    for (key, value) in lines {
        let _ = writeln!(text, "{key:<11} {value}");
    }
    text
}

/// Counters, in the daemon's order.
pub fn stats(stats: &[(String, u64)], as_json: bool) -> String {
    if as_json {
        let map: Map<_, _> =
            stats.iter().map(|(name, value)| (name.clone(), (*value).into())).collect();
        return document(&Value::Object(map));
    }
    let names = stats.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
    let values = stats.iter().map(|(_, value)| value.to_string().len()).max().unwrap_or(0);
    let mut text = String::new();
    for (name, value) in stats {
        let _ = writeln!(text, "{name:<names$}  {value:>values$}");
    }
    text
}

/// One event, one line.
pub fn event(event: &Event, as_json: bool) -> String {
    let gone = |kind: &str, uuid, reason: Option<Status>| {
        let reason = reason.map_or("unknown", Status::name);
        let value = json!({ "event": kind, "uuid": format!("{uuid}"), "reason": reason });
        let text = if reason == "OK" { String::new() } else { format!("  ({reason})") };
        (value, format!("{kind:<9}  {uuid}{text}"))
    };
    let (value, text) = match event {
        Event::Offered(buffer) => {
            let mut value = buffer_json(buffer, None);
            value["event"] = "offered".into();
            let text = format!(
                "{:<9}  {}  {:?} from {}, {}, {}, {}, generation {}",
                "offered",
                buffer.uuid,
                buffer.name,
                buffer.exporter_name,
                size_text(buffer.size),
                mode_text(buffer.mode),
                access_text(buffer.access),
                buffer.generation
            );
            (value, text)
        }
        Event::Changed(buffer) => {
            let mut value = buffer_json(buffer, None);
            value["event"] = "changed".into();
            let (uuid, generation) = (buffer.uuid, buffer.generation);
            (value, format!("{:<9}  {uuid}  generation {generation}", "changed"))
        }
        Event::Busy(buffer) | Event::Idle(buffer) => {
            let kind = if matches!(event, Event::Busy(_)) { "busy" } else { "idle" };
            let mut value = buffer_json(buffer, None);
            value["event"] = kind.into();
            (value, format!("{kind:<9}  {}  {} uses", buffer.uuid, buffer.use_count))
        }
        Event::Released { uuid } => gone("released", uuid, Some(Status::Ok)),
        Event::Withdrawn { uuid, reason } => gone("withdrawn", uuid, *reason),
        Event::Revoked { uuid, reason } => gone("revoked", uuid, *reason),
        Event::Resync => (json!({ "event": "resync" }), "resync".to_owned()),
    };
    if as_json { format!("{value}\n") } else { format!("{text}\n") }
}

/// What a timeline reached.
pub fn reached(reached: u64, as_json: bool) -> String {
    if as_json {
        return document(&json!({ "reached": reached }));
    }
    format!("reached {reached}\n")
}

/// What `dump` did.
pub fn dumped(picture: &Picture, path: &Path, as_json: bool) -> String {
    let Picture { image, generation, mode, .. } = picture;
    let (image, mode) = (image_text(image), mode.name());
    if as_json {
        return document(&json!({
            "file": path.display().to_string(), "width": picture.image.width,
            "height": picture.image.height, "format": fourcc_text(picture.image.fourcc),
            "generation": generation, "mode": mode,
        }));
    }
    format!("{}: {image}, generation {generation}, {mode}\n", path.display())
}

fn image(details: &Details) -> Option<Image> {
    let buffer = &details.buffer;
    Image::parse(buffer.metadata_type, &details.metadata, buffer.size).ok()
}

pub fn buffer_json(buffer: &Buffer, image: Option<&Image>) -> Value {
    let mut value = json!({
        "uuid": buffer.uuid.to_string(), "name": buffer.name, "exporter": buffer.exporter,
        "exporter_name": buffer.exporter_name, "size": buffer.size,
        "generation": buffer.generation, "access": access_text(buffer.access),
        "mode": mode_text(buffer.mode), "use_count": buffer.use_count,
        "metadata_type": buffer.metadata_type, "metadata_len": buffer.metadata_len,
    });
    if let Some(image) = image {
        let planes = image.planes.iter();
        let planes: Vec<_> =
            planes.map(|plane| json!({ "offset": plane.offset, "stride": plane.stride })).collect();
        value["image"] = json!({
            "format": fourcc_text(image.fourcc), "modifier": format!("{:#x}", image.modifier),
            "width": image.width, "height": image.height, "planes": planes,
        });
    }
    value
}

pub fn document(value: &Value) -> String {
    format!("{value:#}\n")
}

fn image_text(image: &Image) -> String {
    format!("{}x{} {}", image.width, image.height, fourcc_text(image.fourcc))
}

pub fn mode_text(mode: Option<Mode>) -> &'static str {
    mode.map_or("unknown", Mode::name)
}

pub fn access_text(bits: u32) -> &'static str {
    match (bits & access::READ != 0, bits & access::WRITE != 0) {
        (true, true) => "read+write",
        (true, false) => "read",
        (false, true) => "write",
        (false, false) => "none",
    }
}

pub fn size_text(bytes: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    if value.fract() == 0.0 {
        format!("{value} {}", units[unit])
    } else {
        format!("{value:.1} {}", units[unit])
    }
}

/// Columns as wide as their widest cell; those in `right` end at their right edge.
pub fn table(head: &[&str], right: &[usize], rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = head.iter().map(|title| title.len()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    let head: Vec<String> = head.iter().map(|title| (*title).to_owned()).collect();
    for row in std::iter::once(&head).chain(rows) {
        let mut line = String::new();
        for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
            let _ = if right.contains(&column) {
                write!(line, "{cell:>width$}  ")
            } else {
                write!(line, "{cell:<width$}  ")
            };
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_line_up() {
        let rows =
            [vec!["a".to_owned(), "1".to_owned()], vec!["bcdé".to_owned(), "200".to_owned()]];
        assert_eq!(table(&["N", "SIZE"], &[1], &rows), "N     SIZE\na        1\nbcdé   200\n");
    }

    #[test]
    fn sizes_are_short() {
        assert_eq!(size_text(4096), "4 KiB");
        assert_eq!(size_text(33_177_600), "31.6 MiB");
    }
}
