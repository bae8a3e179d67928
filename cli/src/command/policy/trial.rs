//! `anabranch policy test`: a script, tried with conflicts that its author wrote down.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::ExitCode;

use anabranch_conflict::script::{Candidate, Failure as ScriptFailure, Script, Value};
use anabranch_proto::stamp::NTP64;
use anabranch_proto::{NodeId, Stamp};
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::failure::Failure;
use crate::output::{self, Format, say};

/// More than nodes that anybody would let write one row.
const VERSIONS_MAX: usize = 64;

/// One conflict of the file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Conflict {
    name: Option<String>,
    /// The earliest first.
    versions: Vec<Version>,
    /// Index of the version that must be chosen.
    expect: Option<usize>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Version {
    origin: String,
    #[serde(default)]
    deleted: bool,
    /// Values as they are written: numbers are not read as floats.
    row: Option<BTreeMap<String, Box<RawValue>>>,
}

/// What came of one.
struct Tried {
    name: String,
    versions: usize,
    chosen: Option<usize>,
    /// Where the script failed.
    failure: Option<ScriptFailure>,
    expected: Option<usize>,
}

impl Tried {
    fn is_good(&self) -> bool {
        self.failure.is_none() && self.expected.is_none_or(|it| Some(it) == self.chosen)
    }

    fn verdict(&self) -> String {
        match (&self.failure, self.expected) {
            (Some(failure), _) => format!("failed: {failure}; the last update wins"),
            (None, Some(expected)) if self.chosen != Some(expected) => {
                format!("version {expected} was expected")
            }
            _ => "ok".to_owned(),
        }
    }
}

pub(super) fn run(script: &Path, rows: &Path, format: Format) -> Result<ExitCode, Failure> {
    let read = |path: &Path| {
        std::fs::read_to_string(path)
            .map_err(|error| Failure::Usage(format!("cannot read {}: {error}", path.display())))
    };
    let (text, json) = (read(script)?, read(rows)?);
    let unusable = |what: String| Failure::Usage(format!("{}: {what}", rows.display()));
    let conflicts: Vec<Conflict> =
        serde_json::from_str(&json).map_err(|error| unusable(error.to_string()))?;
    let conflicts = conflicts
        .iter()
        .zip(1..)
        .map(|(conflict, number)| Ok((conflict, name(conflict, number), candidates(conflict, number)?)))
        .collect::<Result<Vec<_>, String>>()
        .map_err(unusable)?;
    let script_name = script
        .file_name()
        .map_or_else(String::new, |name| name.to_string_lossy().into_owned());
    let script = Script::new(&script_name, &text)
        .map_err(|refusal| Failure::Refused(format!("{}: {refusal}", script.display())))?;
    let tried: Vec<Tried> = conflicts
        .iter()
        .map(|(conflict, name, candidates)| attempt(&script, conflict, name, candidates))
        .collect();
    report(&script, &tried, format)?;
    Ok(ExitCode::from(u8::from(!tried.iter().all(Tried::is_good))))
}

fn name(conflict: &Conflict, number: u64) -> String {
    conflict.name.clone().unwrap_or_else(|| number.to_string())
}

fn candidates(conflict: &Conflict, number: u64) -> Result<Vec<Candidate>, String> {
    let name = name(conflict, number);
    let count = conflict.versions.len();
    if !(2..=VERSIONS_MAX).contains(&count) {
        return Err(format!(
            "conflict {name} has {count} versions; write 2 to {VERSIONS_MAX}"
        ));
    }
    if let Some(expected) = conflict.expect.filter(|expected| *expected >= count) {
        return Err(format!(
            "conflict {name} expects version {expected}; the last one is {}",
            count - 1
        ));
    }
    let decimals: BTreeSet<&str> = conflict
        .versions
        .iter()
        .filter_map(|version| version.row.as_ref())
        .flatten()
        .filter(|(_, raw)| matches!(value(raw), Value::Decimal(_)))
        .map(|(column, _)| column.as_str())
        .collect();
    let candidate = |(version, place): (&Version, u16)| {
        let row = match (&version.row, version.deleted) {
            (Some(row), false) => Some(row),
            (None, true) => None,
            _ => {
                return Err(format!(
                    "conflict {name}: a version has either \"row\" or \"deleted\": true"
                ));
            }
        };
        Ok(Candidate {
            stamp: Stamp {
                time: NTP64(u64::from(place)),
                node: NodeId(place),
            },
            origin: version.origin.clone(),
            row: row.map(|row| {
                row.iter()
                    .map(|(column, raw)| match value(raw) {
                        // A column has one type, and `9` is as good a numeric as `9.0`.
                        Value::Integer(it) if decimals.contains(column.as_str()) => {
                            (column.clone(), Value::Decimal(it.into()))
                        }
                        value => (column.clone(), value),
                    })
                    .collect()
            }),
        })
    };
    conflict.versions.iter().zip(1..).map(candidate).collect()
}

/// As a column would be: lists and objects are the text of their JSON.
fn value(raw: &RawValue) -> Value {
    let text = raw.get();
    match text.chars().next() {
        Some('n') => Value::Null,
        Some('t' | 'f') => Value::Bool(text == "true"),
        Some('"') => Value::Text(serde_json::from_str(text).unwrap_or_default()),
        Some('[' | '{') | None => Value::Text(text.to_owned()),
        Some(_) => Value::of_number(text),
    }
}

fn attempt(script: &Script, conflict: &Conflict, name: &str, candidates: &[Candidate]) -> Tried {
    let outcome = script.choose(candidates);
    Tried {
        name: name.to_owned(),
        versions: candidates.len(),
        chosen: candidates
            .iter()
            .position(|candidate| candidate.stamp == outcome.chosen),
        failure: outcome.failure,
        expected: conflict.expect,
    }
}

fn report(script: &Script, tried: &[Tried], format: Format) -> Result<(), Failure> {
    match format {
        Format::Table => {
            let rows = tried.iter().map(|tried| {
                let chosen = tried.chosen.map_or_else(String::new, |chosen| chosen.to_string());
                [
                    tried.name.clone(),
                    tried.versions.to_string(),
                    chosen,
                    tried.verdict(),
                ]
            });
            say(&output::table(
                ["conflict", "versions", "chosen", "verdict"],
                rows,
            ))?;
            say(&format!("{script}\n"))
        }
        Format::Json => {
            let conflicts: Vec<_> = tried
                .iter()
                .map(|tried| {
                    let error = tried.failure.as_ref().map(|failure| {
                        serde_json::json!({
                            "sqlstate": failure.sqlstate(), "message": failure.message,
                            "line": failure.place.map(|place| place.0), "column": failure.place.map(|place| place.1),
                        })
                    });
                    serde_json::json!({
                        "name": tried.name, "versions": tried.versions, "chosen": tried.chosen, "expected": tried.expected,
                        "error": error, "ok": tried.is_good(),
                    })
                })
                .collect();
            let ok = tried.iter().all(Tried::is_good);
            output::json(&serde_json::json!({
                "ok": ok, "script": script.name(), "hash": script.short_hash(), "conflicts": conflicts,
            }))
        }
    }
}
