//! Unique values: each is one row's, and each row that lost one has its line.
//!
//! The rule (docs/design.md, section 5): of two rows that claim one value the one with the higher stamp has it, the other goes to
//! the conflict log whole. What a row claims follows from its value ([`claim`]), so a version says what it claims.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use anabranch_proto::Stamp;

use super::durable::WITNESS;
use super::{Answer, Findings};
use crate::history::{Final, History, Line};
use crate::truth::{Row, Truth, Version, parse_stamp};
use crate::workload::claim;

/// Is it a line of a row that lost a unique value to another row?
pub(crate) fn of_unique_value(line: &Line) -> bool {
    line.conflict == "multiple_unique_conflicts"
}

/// Is it a line of a row that the server refused for its unique value? It went to quarantine, and is not lost for that.
fn refused(line: &Line) -> bool {
    line.conflict == "apply_error" && line.text.contains("_claim_key")
}

/// Is it a line that is this check's to judge?
pub(crate) fn about_unique_values(line: &Line) -> bool {
    of_unique_value(line) || refused(line)
}

/// Is each unique value one row's, is the row there or its loss logged, and is no loss logged that was none?
pub(crate) fn unique(history: &History, truth: &Truth) -> Answer {
    let mut findings = Findings::default();
    let keys = history.header.keys;
    let tables: Vec<&Final> = history
        .finals()
        .filter(|table| table.table != WITNESS && !history.lost(table.node))
        .collect();
    for table in &tables {
        one_row_each(table, keys, &mut findings);
    }
    // Stamps and a log are Anabranch's.
    if history.header.is_anabranch() {
        for table in &tables {
            newest_or_logged(table, history, truth, &mut findings);
        }
        for line in history.lines().filter(|line| about_unique_values(line)) {
            had_a_rival(line, keys, truth, &mut findings);
        }
        for line in history
            .lines()
            .filter(|line| refused(line) && line.status == "new" && !history.lost(line.node))
        {
            // In the end every row has its place: `quiesce` waits for the quarantine.
            findings.add(format!(
                "n{}: {}/{} waits for nothing, and its line is still open: {}",
                line.node,
                line.table,
                line.key.unwrap_or(0),
                line.text
            ));
        }
    }
    findings.answer("no row was read at the end")
}

fn one_row_each(table: &Final, keys: i64, findings: &mut Findings) {
    let name = |key: i64| format!("n{}: {}/{key}", table.node, table.table);
    let values: HashMap<i64, Option<i64>> = table.rows.iter().map(|row| (row.0, row.1)).collect();
    let mut holders: BTreeMap<i64, i64> = BTreeMap::new();
    for (key, claimed) in &table.more {
        findings.look();
        let Some(&claimed) = claimed.first() else { continue };
        let value = values.get(key).copied().flatten().unwrap_or(0);
        if claimed != claim(value, keys) {
            findings.add(format!(
                "{} is {value} and claims {claimed}, but that write claimed {}",
                name(*key),
                claim(value, keys)
            ));
        }
        if let Some(other) = holders.insert(claimed, *key) {
            findings.add(format!(
                "{} has the value {claimed}, and so has {other}",
                name(*key)
            ));
        }
    }
}

/// Each row holds its last version, or nothing and the log says what took its value.
fn newest_or_logged(table: &Final, history: &History, truth: &Truth, findings: &mut Findings) {
    let held: HashMap<i64, Option<i64>> = table.rows.iter().map(|row| (row.0, row.1)).collect();
    let lines = history
        .lines()
        .filter(|line| line.node == table.node && line.table == table.table && of_unique_value(line));
    let logged: BTreeSet<(Option<i64>, Option<Stamp>)> =
        lines.map(|line| (line.key, parse_stamp(&line.lost))).collect();
    for ((name, key), versions) in &truth.rows {
        if *name != table.table {
            continue;
        }
        let Some(last) = versions.iter().rfind(|version| truth.arrived(version, history)) else {
            continue;
        };
        findings.look();
        let found = held.get(key).copied();
        if found == last.value.map(Some) {
            continue;
        }
        let told = format!(
            "n{}: {name}/{key} is {found:?}, but its last version is {:?} by transaction {} of n{}, stamped {}",
            table.node,
            last.value,
            last.txn.unwrap_or(0),
            last.node,
            last.stamp
        );
        match found {
            None if logged.contains(&(Some(*key), Some(last.stamp))) => {}
            None => findings.add(format!("{told}, of which the log has no line")),
            Some(_) => findings.add(told),
        }
    }
}

/// A line of a lost value: another row claimed it, not knowing, with a higher stamp. Of a refused row: another row claimed the same.
fn had_a_rival(line: &Line, keys: i64, truth: &Truth, findings: &mut Findings) {
    findings.look();
    let lost = line.key.zip(parse_stamp(&line.lost)).and_then(|(key, stamp)| {
        let row: Row = (line.table.clone(), key);
        let versions = truth.rows.get(&row)?;
        versions.iter().find(|version| version.stamp == stamp)
    });
    let Some(lost) = lost else {
        findings.add(format!(
            "n{}: a line of a lost unique value that names no version: {}",
            line.node, line.text
        ));
        return;
    };
    let claimed = |version: &Version| version.value.map(|value| claim(value, keys));
    let took = |version: &Version| {
        let later = version.stamp > lost.stamp && version.concurrent_with(lost);
        claimed(version) == claimed(lost) && (later || refused(line))
    };
    let others = truth
        .rows
        .iter()
        .filter(|(row, _)| row.0 == line.table && Some(row.1) != line.key);
    if claimed(lost).is_none() || !others.flat_map(|(_, versions)| versions).any(took) {
        findings.add(format!(
            "n{}: {}/{} stamped {} is called {} for a unique value that no {} of another row claimed: {}",
            line.node,
            line.table,
            line.key.unwrap_or(0),
            lost.stamp,
            if refused(line) { "refused" } else { "lost" },
            if refused(line) {
                "write"
            } else {
                "later concurrent write"
            },
            line.text
        ));
    }
}
