//! The session guarantees (Terry et al., "Session Guarantees for Weakly Consistent Replicated Data", PDIS 1994), each by
//! its name. A session is one connection, or several at different nodes where it moved.
//!
//! "Earlier" is causally earlier, or, where stamps are known, of a lower stamp.

use std::collections::HashMap;

use super::causal::Graph;
use super::{Answer, Findings};
use crate::history::{History, Stage};
use crate::nemesis::moves_sessions;
use crate::truth::{Row, Truth};

/// Did any session go on at another node?
pub(crate) fn moved(history: &History) -> bool {
    let mut nodes: HashMap<u64, u16> = HashMap::new();
    let mut acknowledged = history.ops().filter(|op| op.stage == Stage::Ok);
    acknowledged.any(|op| *nodes.entry(op.process).or_insert(op.node) != op.node)
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
            if let Some(&own) = wrote.get(&(txn.process, row))
                && earlier(*from, own)
            {
                findings.add(told("read your writes", own));
            }
            if let Some(&seen) = read.get(&(txn.process, row))
                && earlier(*from, seen)
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
