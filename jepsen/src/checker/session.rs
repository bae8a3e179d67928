//! The session guarantees (Terry et al., "Session Guarantees for Weakly Consistent Replicated Data", PDIS 1994), each by
//! its name. A session is one connection, or several at different nodes where it moved.
//!
//! "Earlier" is causally earlier, or, where stamps are known, of a lower stamp. Where rows are deleted a read of nothing says nothing, and a
//! row may come back for a moment ([`Changes::came_back`]).

use std::collections::HashMap;

use super::causal::Graph;
use super::{Answer, Findings};
use crate::client::node_of;
use crate::history::{Act, First, History, Stage};
use crate::nemesis::moves_sessions;
use crate::truth::{Row, Truth};
use crate::workload::Workload;

/// Did any session go on at another node?
pub(crate) fn moved(history: &History) -> bool {
    let mut nodes: HashMap<u64, u16> = HashMap::new();
    let mut acknowledged = history.ops().filter(|op| op.stage == Stage::Ok);
    acknowledged.any(|op| *nodes.entry(op.process).or_insert(op.node) != op.node)
}

/// What one transaction did to a row at a node.
struct Change {
    /// Was it the node's own, and not applied?
    is_local: bool,
    /// The transaction whose value it wrote; none where it deleted the row.
    txn: Option<i64>,
}

/// Per node and row what was done to it, in the order of the node's WAL.
#[derive(Default)]
struct Changes(HashMap<(u16, Row), Vec<Change>>);

impl Changes {
    fn of(history: &History) -> Self {
        let mut changes = Self::default();
        for commit in history.commits() {
            for step in &commit.rows {
                let of_row = (commit.node, (step.table.clone(), step.key));
                changes.0.entry(of_row).or_default().push(Change {
                    is_local: commit.first != First::Progress,
                    // A value is its transaction and one digit more.
                    txn: step
                        .value
                        .filter(|_| step.act == Act::Write)
                        .map(|value| value / 10),
                });
            }
        }
        changes
    }

    /// Did the node write what `from` wrote where its own DELETE had left no row? Until that is decoded, what comes in from others meets
    /// nothing that could say that it is too late (docs/design.md, section 7). Not over what `before` wrote.
    fn came_back(&self, node: u16, row: &Row, from: i64, before: i64) -> bool {
        let Some(changes) = self.0.get(&(node, row.clone())) else {
            return false;
        };
        let met_a_gap = |at: usize| {
            let mut earlier = changes[..at].iter().rev();
            let met = earlier.find(|change| change.is_local || change.txn == Some(before));
            met.is_some_and(|change| change.is_local && change.txn.is_none())
        };
        let written = changes.iter().enumerate();
        written
            .filter(|(_, change)| !change.is_local && change.txn == Some(from))
            .any(|(at, _)| met_a_gap(at))
    }
}

/// Do all four hold?
pub(crate) fn session(history: &History, graph: &Graph, truth: &Truth) -> Answer {
    let mut findings = Findings::default();
    if moves_sessions(&history.header.nemesis) && !moved(history) {
        return findings.answer("no session moved");
    }
    let earlier = |first: usize, second: usize| {
        let stamps = (graph.stamp(first, truth), graph.stamp(second, truth));
        let known = truth.stamps.contains_key(&graph.txns[second].id);
        first != second && (graph.is_before(first, second) || (known && stamps.0 < stamps.1))
    };
    let workload = Workload::named(&history.header.workload);
    let changes = match workload.is_some_and(|workload| workload.delete_one_in > 0) {
        true => Changes::of(history),
        false => Changes::default(),
    };
    // Per process: what it wrote and read last, of each row.
    let mut wrote: HashMap<(usize, &Row), usize> = HashMap::new();
    let mut read: HashMap<(usize, &Row), usize> = HashMap::new();
    let mut last_write: HashMap<usize, usize> = HashMap::new();
    for (at, txn) in graph.txns.iter().enumerate().skip(1) {
        for (row, from) in &txn.reads {
            let told = |guarantee: &str, before: usize| {
                format!(
                    "{guarantee}: {} read {}/{} as {} wrote it, after {} in the same session",
                    graph.name(at),
                    row.0,
                    row.1,
                    graph.name(*from),
                    graph.name(before)
                )
            };
            findings.look();
            let goes_back = |before: usize| {
                let ids = (graph.txns[*from].id, graph.txns[before].id);
                earlier(*from, before) && !changes.came_back(node_of(txn.id), row, ids.0, ids.1)
            };
            if let Some(&own) = wrote.get(&(txn.process, row))
                && goes_back(own)
            {
                findings.add(told("read your writes", own));
            }
            if let Some(&seen) = read.get(&(txn.process, row))
                && goes_back(seen)
            {
                findings.add(told("monotonic reads", seen));
            }
        }
        // With stamps: what a session writes is later than what it wrote and read before.
        if let (false, Some(mine)) = (txn.writes.is_empty(), truth.stamps.get(&txn.id)) {
            findings.look();
            if let Some(before) = last_write
                .get(&txn.process)
                .filter(|&&one| graph.stamp(one, truth) >= *mine)
            {
                findings.add(format!(
                    "monotonic writes: {} is stamped before {}, its session's write before it",
                    graph.name(at),
                    graph.name(*before)
                ));
            }
            for (_, from) in txn
                .reads
                .iter()
                .filter(|(_, from)| graph.stamp(*from, truth) >= *mine)
            {
                findings.add(format!(
                    "writes follow reads: {} is stamped before {}, which it read",
                    graph.name(at),
                    graph.name(*from)
                ));
            }
            last_write.insert(txn.process, at);
        }
        for (row, from) in &txn.reads {
            read.insert((txn.process, row), *from);
        }
        for row in &txn.writes {
            wrote.insert((txn.process, row), at);
        }
    }
    findings.answer("no session read anything")
}
