//! A table of all buffers that renews itself.
//!
//! It knows what was seen last time, for rates, and nothing of terminals but how to clear one.

use std::collections::HashMap;
use std::fmt::Write;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use bufshare::host::client::Client;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::show::{buffer_json, document, mode_text, size_text, table};
use crate::{Failure, print, who};

/// Generations when they were seen last.
#[derive(Default)]
struct Seen {
    at: Option<Instant>,
    generations: HashMap<Uuid, u64>,
}

/// Shows tables until nobody reads them any more, or `times` are over.
pub fn run(
    client: &mut Client,
    every: Duration,
    times: Option<u32>,
    as_json: bool,
) -> Result<(), Failure> {
    let clear = !as_json && times != Some(1) && std::io::stdout().is_terminal();
    let mut seen = Seen::default();
    let mut shown = 0;
    loop {
        let text = seen.table(client, as_json)?;
        let text = if clear { format!("\x1b[H\x1b[2J{text}") } else { text };
        shown += 1;
        if !print(&text)? || times == Some(shown) {
            return Ok(());
        }
        std::thread::sleep(every);
    }
}

impl Seen {
    fn table(&mut self, client: &mut Client, as_json: bool) -> Result<String, Failure> {
        let reports = client.inspect()?;
        let now = Instant::now();
        let past = self.at.map(|at| now.duration_since(at).as_secs_f64());
        let mut rows = Vec::new();
        let mut documents = Vec::new();
        let mut waits = String::new();
        for report in &reports {
            let buffer = &report.buffer;
            let before = self.generations.get(&buffer.uuid);
            let rate = past.zip(before).map(|(past, before)| {
                buffer.generation.saturating_sub(*before) as f64 / past.max(0.001)
            });
            if report.waits > 0
                && let Ok(told) = client.holders(buffer.uuid)
            {
                for text in who::waits(&told) {
                    let _ = writeln!(waits, "{:?} ({}): {text}", buffer.name, buffer.uuid);
                }
            }
            let mut value = buffer_json(buffer, None);
            let more = json!({
                "state": who::state_name(report), "owner_gone": report.owner_gone,
                "age_ms": u64::try_from(report.age.as_millis()).unwrap_or(u64::MAX),
                "leases": report.leases, "attachments": report.attachments,
                "mappings": report.mappings, "waits": report.waits, "generations_per_second": rate,
            });
            if let (Value::Object(value), Value::Object(more)) = (&mut value, more) {
                value.extend(more);
            }
            documents.push(value);
            rows.push(vec![
                buffer.name.clone(),
                buffer.exporter_name.clone(),
                size_text(buffer.size),
                mode_text(buffer.mode).to_owned(),
                format!(
                    "{}{}",
                    who::state_name(report),
                    if report.owner_gone { ", orphan" } else { "" }
                ),
                buffer.use_count.to_string(),
                report.leases.to_string(),
                report.attachments.to_string(),
                report.mappings.to_string(),
                report.waits.to_string(),
                rate.map_or("-".to_owned(), |rate| format!("{rate:.1}")),
                buffer.generation.to_string(),
                who::age_text(report.age),
            ]);
        }
        self.at = Some(now);
        self.generations =
            reports.iter().map(|report| (report.buffer.uuid, report.buffer.generation)).collect();
        if as_json {
            return Ok(document(&Value::Array(documents)));
        }
        let bytes: u64 = reports.iter().map(|report| report.buffer.size).sum();
        let mut text = format!("{} buffers, {}\n", reports.len(), size_text(bytes));
        let head = [
            "NAME",
            "FROM",
            "SIZE",
            "MODE",
            "STATE",
            "USES",
            "LEASES",
            "ATTACHED",
            "MAPPED",
            "WAITS",
            "GEN/S",
            "GENERATION",
            "AGE",
        ];
        text.push_str(&table(&head, &[2, 5, 6, 7, 8, 9, 10, 11, 12], &rows));
        if !waits.is_empty() {
            let _ = write!(text, "\nwho waits:\n{waits}");
        }
        Ok(text)
    }
}
