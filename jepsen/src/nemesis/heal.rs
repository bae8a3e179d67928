//! `anabranch heal`, and what it says of what it did.

use std::time::Duration;

use anabranch_tests::daemon::Daemon;
use serde_json::Value;

use crate::history::Healed;
use crate::wal::parse_lsn;

/// How long it may take, with all that it waits for.
const WITHIN: Duration = Duration::from_secs(180);

/// Its report.
#[derive(Debug, PartialEq, Eq)]
pub struct Report {
    journaled: u64,
    slot_at: u64,
    /// Rows that were written again.
    pub rows: u64,
}

impl Report {
    /// As a history has it.
    pub fn of(self, node: u16, at_us: i64) -> Healed {
        Healed {
            at_us,
            node,
            journaled: self.journaled,
            slot_at: self.slot_at,
            rows: self.rows,
        }
    }
}

/// Heals the node of this daemon, which has ended.
pub async fn run(daemon: &Daemon) -> Result<Report, String> {
    let healing = daemon.anabranch(&["heal"], &["--output", "json"]);
    let output = tokio::time::timeout(WITHIN, healing)
        .await
        .map_err(|_| format!("it was not through after {WITHIN:?}"))?;
    let said = String::from_utf8_lossy(&output.stdout);
    let last = said.lines().last().unwrap_or_default();
    if !output.status.success() {
        return Err(format!("{last} {}", String::from_utf8_lossy(&output.stderr)));
    }
    let mut json: Value =
        serde_json::from_str(last).map_err(|error| format!("its report is no JSON ({error}): {last}"))?;
    // The report at the end may leave it out; the record has it from when the slot was made.
    if json["journaled"].as_str().is_none_or(str::is_empty)
        && let Some(path) = json["record"].as_str()
    {
        let record = std::fs::read_to_string(path).map_err(|error| format!("{path}: {error}"))?;
        json["journaled"] = journaled(&record);
    }
    report(&json).ok_or_else(|| format!("its report says not where: {last}"))
}

/// Where the own stream ended, as the record's lines have it.
fn journaled(record: &str) -> Value {
    let lines = record
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let mut places = lines.map(|line| line["journaled"].clone());
    places.find(Value::is_string).unwrap_or_default()
}

fn report(json: &Value) -> Option<Report> {
    // A position has its timeline before the LSN.
    let place = |name: &str| parse_lsn(json[name].as_str()?.rsplit(':').next()?);
    let tables = json["tables"].as_object()?;
    let counts = tables.values().filter_map(|done| done["written again"].as_u64());
    Some(Report {
        journaled: place("journaled")?,
        slot_at: place("slot_at")?,
        rows: counts.sum(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_says_between_which_places_nobody_decoded() {
        let json = serde_json::json!({
            "journaled": "1:0/19C2D58", "slot_at": "0/19C2E00",
            "tables": { "public.kv": { "written again": 3 }, "public.witness": { "written again": 4 } }
        });
        let expected = Report {
            journaled: 0x19C_2D58,
            slot_at: 0x19C_2E00,
            rows: 7,
        };
        assert_eq!(report(&json), Some(expected));
        assert_eq!(report(&serde_json::json!({ "tables": {} })), None);
        let record = "{\"did\":\"slot made\",\"journaled\":\"1:0/19C2D58\"}\n{\"did\":\"written again\"}\n";
        assert_eq!(journaled(record), "1:0/19C2D58");
    }
}
