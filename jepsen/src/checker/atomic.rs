//! Read atomicity: a transaction that is seen is seen whole, unless a later write came over part of it.

use super::causal::Graph;
use super::{Answer, Findings};
use crate::truth::Truth;

/// Is no transaction seen half?
pub(crate) fn atomic(graph: &Graph, truth: &Truth) -> Answer {
    let mut findings = Findings::default();
    for (reader, txn) in graph.txns.iter().enumerate() {
        for (seen_row, whole) in &txn.reads {
            for (row, from) in &txn.reads {
                if row == seen_row || from == whole || !graph.txns[*whole].writes.contains(row) {
                    continue;
                }
                findings.look();
                let (older, newer) = (graph.stamp(*from, truth), graph.stamp(*whole, truth));
                let by_stamp = truth.stamps.contains_key(&graph.txns[*whole].id) && older < newer;
                if graph.is_before(*from, *whole) || by_stamp {
                    findings.add(format!(
                        "{} read {}/{} from {}, which wrote {}/{} too, and that it read as the earlier {} wrote it",
                        graph.name(reader),
                        seen_row.0,
                        seen_row.1,
                        graph.name(*whole),
                        row.0,
                        row.1,
                        graph.name(*from),
                    ));
                }
            }
        }
        findings.look_at(txn.reads.len().saturating_sub(1));
    }
    findings.answer("no transaction read two rows")
}
