//! Reads of values that nobody wrote, where rows come and go: there a read of nothing says nothing, but one that finds a row says whose.

use std::collections::{HashMap, HashSet};

use super::{Answer, Findings};
use crate::history::{Act, First, History, Stage, Step};
use crate::workload::Workload;

/// Was every value that was found in a row written to that row by a transaction that committed where it was run? By the servers' WAL, since
/// of a statement over many rows no client knows which it wrote.
pub(crate) fn thin_air(history: &History) -> Answer {
    let mut findings = Findings::default();
    let workload = Workload::named(&history.header.workload);
    let preloaded = workload.map_or_else(Vec::new, |workload| workload.preload(history.header.keys));
    let mut written: HashSet<(&str, i64, i64)> = HashSet::new();
    written.extend(
        preloaded
            .iter()
            .map(|(table, key, value)| (table.as_str(), *key, *value)),
    );
    // What was applied explains nothing: it is what is on trial.
    for commit in history.commits().filter(|commit| commit.first != First::Progress) {
        // Of a row that a transaction writes twice nobody sees the first.
        let mut rows: HashMap<(&str, i64), &Step> = HashMap::new();
        rows.extend(commit.rows.iter().map(|row| ((row.table.as_str(), row.key), row)));
        let last = rows.into_values().filter(|row| row.act == Act::Write);
        written.extend(last.filter_map(|row| Some((row.table.as_str(), row.key, row.value?))));
    }
    for op in history.ops().filter(|op| op.stage == Stage::Ok) {
        for step in op.steps.iter().filter(|step| step.act == Act::Read) {
            let Some(value) = step.value else { continue };
            findings.look();
            if !written.contains(&(step.table.as_str(), step.key, value)) {
                findings.add(format!(
                    "transaction {} of n{} read {step}, which no committed transaction wrote",
                    op.txn, op.node
                ));
            }
        }
    }
    findings.answer("no read found a row")
}
