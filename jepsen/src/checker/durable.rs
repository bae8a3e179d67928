//! Acknowledged transactions are everywhere; failed ones are nowhere.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::{Answer, Findings};
use crate::history::{Act, Commit, First, History, Op, Stage};
use crate::truth::Truth;
use crate::workload::Workload;

/// The table in which every transaction that writes leaves a row.
pub const WITNESS: &str = "witness";

/// Is every acknowledged transaction at every node, and none that failed at any?
pub(crate) fn durable(history: &History, truth: &Truth) -> Answer {
    let mut findings = Findings::default();
    let mut held: BTreeMap<u16, HashSet<i64>> = BTreeMap::new();
    let left = |node: u16| !history.lost(node);
    let witnesses = history.finals().filter(|table| table.table == WITNESS);
    for table in witnesses.filter(|table| left(table.node)) {
        held.insert(table.node, table.rows.iter().map(|row| row.0).collect());
    }
    let mut stages: HashMap<i64, Stage> = HashMap::new();
    for op in history.ops() {
        let writes = op.steps.iter().any(|step| !step.act.reads());
        if !writes {
            continue;
        }
        stages.insert(op.txn, op.stage);
        // What a lost node did not send is lost with it; what it sent is everywhere.
        if history.lost(op.node) && !held.values().any(|held| held.contains(&op.txn)) {
            continue;
        }
        for (node, witnesses) in &held {
            let here = witnesses.contains(&op.txn);
            match op.stage {
                Stage::Ok => {
                    findings.look();
                    if !here {
                        findings.add(format!(
                            "transaction {} of n{} is lost at n{node}",
                            op.txn, op.node
                        ));
                    }
                }
                Stage::Fail if here => {
                    findings.add(format!(
                        "transaction {} of n{} failed, and is at n{node} all the same",
                        op.txn, op.node
                    ));
                }
                _ => {}
            }
        }
    }
    for (node, witnesses) in &held {
        for txn in witnesses.iter().filter(|txn| !stages.contains_key(txn)) {
            findings.add(format!("n{node} holds transaction {txn}, which nobody ran"));
        }
    }
    for (txn, nodes) in &truth.witnessed {
        if stages.get(txn) == Some(&Stage::Fail) {
            findings.add(format!(
                "transaction {txn} failed, and is in the WAL of {nodes:?}"
            ));
        }
    }
    let commits = own_commits(history);
    let adds = Workload::named(&history.header.workload).is_some_and(|workload| workload.adds);
    for op in history.ops().filter(|op| op.stage == Stage::Ok) {
        match commits.get(&(op.node, op.txn)) {
            Some(commit) => wrote_what_it_said(op, commit, adds, &mut findings),
            None if op.steps.iter().all(|step| step.act.reads()) => {}
            // It may have come back to its server from others.
            None => findings.add(format!(
                "transaction {} of n{} was acknowledged, and is no commit of its own in the WAL there",
                op.txn, op.node
            )),
        }
    }
    let silent = silent(history);
    match findings.answer("no transaction was acknowledged") {
        Answer::Holds { .. } if !silent.is_empty() => Answer::Unknown {
            why: format!("no transaction was acknowledged at {}", silent.join(", ")),
        },
        answer => answer,
    }
}

/// Nodes at which nothing was acknowledged, though clients write on once all is healed: nobody has seen them do anything.
fn silent(history: &History) -> Vec<String> {
    let acknowledged = history.ops().filter(|op| op.stage == Stage::Ok);
    let heard: HashSet<u16> = acknowledged.map(|op| op.node).collect();
    let silent = history.survivors().filter(|node| !heard.contains(node));
    silent.map(|node| format!("n{node}")).collect()
}

/// By node and transaction: its commit there. The first one: a node that was healed writes again what stands in others.
fn own_commits(history: &History) -> HashMap<(u16, i64), &Commit> {
    let mut own = HashMap::new();
    for commit in history.commits().filter(|commit| commit.first != First::Progress) {
        for &txn in &commit.witnesses {
            own.entry((commit.node, txn)).or_insert(commit);
        }
    }
    own
}

/// An UPDATE that finds no row is acknowledged, too: that its rows were there is asked of the WAL. Where writes add, a row holds a sum.
fn wrote_what_it_said(op: &Op, commit: &Commit, adds: bool, findings: &mut Findings) {
    for step in op.steps.iter().filter(|step| step.act == Act::Write) {
        findings.look();
        let is_it = |row: &&crate::history::Step| {
            row.act == Act::Write
                && (&row.table, row.key) == (&step.table, step.key)
                && (adds || row.value == step.value)
        };
        if !commit.rows.iter().any(|row| is_it(&row)) {
            findings.add(format!(
                "transaction {} of n{} was acknowledged, and its {step} is not in what it committed there: the row was not there",
                op.txn, op.node
            ));
        }
    }
}
