//! Where writes add, nothing is lost: each row holds the sum of all of them.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::durable::WITNESS;
use super::{Answer, Findings};
use crate::history::History;
use crate::workload::Workload;

/// Is each row at each node what it was before the load, and all that was added to it by the transactions that are
/// there? And has no log a line of it?
pub(crate) fn sum(history: &History) -> Answer {
    let mut findings = Findings::default();
    let Some(workload) = Workload::named(&history.header.workload) else {
        return findings.answer("the workload is not known");
    };
    let mut expected: HashMap<(String, i64), i64> = HashMap::new();
    for (table, key, value) in workload.preload(history.header.keys) {
        expected.insert((table, key), value);
    }
    let mut held: HashMap<u16, HashSet<i64>> = HashMap::new();
    for table in history.finals().filter(|table| table.table == WITNESS) {
        held.insert(table.node, table.rows.iter().map(|row| row.0).collect());
    }
    // By transaction, since a history tells of each more than once.
    let mut added: BTreeMap<i64, Vec<(String, i64, i64)>> = BTreeMap::new();
    for op in history.ops() {
        added.insert(
            op.txn,
            op.steps.iter().flat_map(|step| workload.added(step)).collect(),
        );
    }
    for table in history
        .finals()
        .filter(|table| table.table != WITNESS && !history.lost(table.node))
    {
        let Some(witnesses) = held.get(&table.node) else {
            continue;
        };
        let mut sums = expected.clone();
        for (name, key, amount) in witnesses.iter().filter_map(|txn| added.get(txn)).flatten() {
            *sums.entry((name.clone(), *key)).or_insert(0) += amount;
        }
        for (key, value, _) in &table.rows {
            findings.look();
            let sum = sums.remove(&(table.table.clone(), *key));
            if sum != *value {
                findings.add(format!(
                    "n{}: {}/{key} is {value:?}, but all that was added to it makes {sum:?}",
                    table.node, table.table
                ));
            }
        }
        for ((name, key), sum) in sums.into_iter().filter(|((name, _), _)| *name == table.table) {
            findings.add(format!(
                "n{}: {name}/{key} is missing, which should be {sum}",
                table.node
            ));
        }
    }
    for line in history.lines() {
        findings.add(format!(
            "n{} logs a lost write where none can be: {}",
            line.node, line.text
        ));
    }
    findings.answer("no table was read at the end")
}
