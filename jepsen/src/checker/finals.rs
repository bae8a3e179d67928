//! What the nodes hold at the end.

use std::collections::BTreeMap;

use super::{Answer, Findings};
use crate::history::{Final, History};
use crate::policy::Rule;
use crate::truth::Truth;

/// Per table the nodes' rows.
fn tables(history: &History) -> BTreeMap<&str, Vec<&Final>> {
    let mut tables: BTreeMap<&str, Vec<&Final>> = BTreeMap::new();
    for table in history.finals().filter(|table| !history.lost(table.node)) {
        tables.entry(&table.table).or_default().push(table);
    }
    tables
}

/// Do all nodes hold the same rows?
pub(crate) fn equal(history: &History) -> Answer {
    let mut findings = Findings::default();
    let nodes = history.survivors().count();
    for (name, of_nodes) in tables(history) {
        if of_nodes.len() != nodes {
            findings.add(format!(
                "{name} could be read at {} of {nodes} nodes only",
                of_nodes.len()
            ));
            continue;
        }
        let Some((first, others)) = of_nodes.split_first() else {
            continue;
        };
        findings.look_at(first.rows.len());
        let expected: BTreeMap<i64, _> = first.rows.iter().map(|row| (row.0, (row.1, &row.2))).collect();
        for other in others {
            let found: BTreeMap<i64, _> = other.rows.iter().map(|row| (row.0, (row.1, &row.2))).collect();
            let keys: std::collections::BTreeSet<i64> =
                expected.keys().chain(found.keys()).copied().collect();
            for key in keys {
                let (here, there) = (expected.get(&key), found.get(&key));
                if here != there {
                    findings.add(format!(
                        "{name}/{key}: n{} holds {}, n{} holds {}",
                        first.node,
                        shown(here),
                        other.node,
                        shown(there)
                    ));
                }
            }
        }
    }
    findings.answer("no table was read at the end")
}

fn shown(row: Option<&(Option<i64>, &String)>) -> String {
    match row {
        None => "no row".to_owned(),
        Some((Some(value), digest)) => format!("{value} ({})", digest.chars().take(8).collect::<String>()),
        Some((None, digest)) => format!("null ({})", digest.chars().take(8).collect::<String>()),
    }
}

/// Does each row hold the version that has to win: the one with the highest stamp, or what its policy chooses?
pub(crate) fn final_value(history: &History, truth: &Truth) -> Answer {
    let mut findings = Findings::default();
    for text in &truth.broken {
        findings.add(text.clone());
    }
    let rule = Rule::of(history);
    let which = rule.unusual().map_or("last", |_| "winning");
    let mut held: BTreeMap<(u16, &str), BTreeMap<i64, Option<i64>>> = BTreeMap::new();
    for table in history.finals().filter(|table| !history.lost(table.node)) {
        let rows = table.rows.iter().map(|row| (row.0, row.1)).collect();
        held.insert((table.node, &table.table), rows);
    }
    for ((table, key), versions) in &truth.rows {
        let arrived = versions.iter().filter(|version| truth.arrived(version, history));
        let Some(winner) = rule.winner(arrived) else {
            continue;
        };
        for node in history.survivors() {
            let Some(rows) = held.get(&(node, table.as_str())) else {
                continue;
            };
            findings.look();
            let found = rows.get(key).copied();
            let expected = winner.value.map(Some);
            if found != expected {
                findings.add(format!(
                    "n{node}: {table}/{key} is {}, but its {which} version is {} by transaction {} of n{}, stamped {}",
                    value(found.flatten()),
                    value(winner.value),
                    winner.txn.unwrap_or(0),
                    winner.node,
                    winner.stamp
                ));
            }
        }
    }
    findings.answer("no version of any row is known")
}

fn value(value: Option<i64>) -> String {
    value.map_or_else(|| "nothing".to_owned(), |value| value.to_string())
}

/// Did every node apply transactions in an order in which none comes before one that it had seen?
pub(crate) fn order(truth: &Truth) -> Answer {
    let mut findings = Findings::default();
    findings.look_at(truth.ordered);
    for text in &truth.misordered {
        findings.add(text.clone());
    }
    findings.answer("nothing that was applied could be placed")
}

/// Are stamps that travelled those of the origin's WAL?
pub(crate) fn stamps(truth: &Truth) -> Answer {
    let mut findings = Findings::default();
    findings.look_at(truth.compared);
    for text in truth.misstamped.iter().chain(&truth.broken) {
        findings.add(text.clone());
    }
    findings.answer("no stamp that travelled could be compared")
}
