//! What an interleaved sequence has no room for: node ids, values, another member's way of dividing it.
//!
//! In:   a sequence, this node's share, what the members have said            Out: [`Finding`]s
//! Not here: whether it must be changed ([`super`])

use super::super::finding::Finding;
use super::super::sequence::{Sequence, Sequences};
use super::super::sql::{ident, qualified};
use super::{FEW, Share, highest_base};
use crate::config::Method;

/// Is there room for every node id?
pub(super) fn room(all: &Sequences, share: Share) -> Option<Finding> {
    let highest = all.highest_id.max(share.node).0;
    (u32::from(highest) > share.increment).then(|| {
        Finding::fail(
            "sequences.increment",
            format!("is {}, and there is a node {highest}", share.increment),
            format!(
                "set it to {highest} or more, with room for more nodes, alike in every node's configuration",
            ),
        )
    })
}

/// Would its next value, or nearly so, be beyond what it or its columns hold?
pub(super) fn overflow(all: &Sequences, sequence: &Sequence, share: Share, check: &str) -> Option<Finding> {
    let floors = [
        sequence
            .value
            .map(|value| i128::from(value.last) + i128::from(value.called)),
        highest_base(all, sequence).map(|(base, _)| i128::from(base) + 1),
        Some(i128::from(sequence.min)),
        sequence
            .columns
            .iter()
            .filter_map(|column| column.highest)
            .max()
            .map(|highest| i128::from(highest) + 1),
    ];
    let next = share.from(floors.into_iter().flatten().max()?);
    let bound = sequence.bound();
    let columns: Vec<String> = sequence
        .columns
        .iter()
        .map(|column| {
            format!(
                "ALTER TABLE {} ALTER COLUMN {} TYPE bigint",
                qualified(&column.schema, &column.table),
                ident(&column.name)
            )
        })
        .collect();
    let remedy = || {
        let mut all = columns.clone();
        all.push(format!("ALTER SEQUENCE {} AS bigint", sequence.sql_name()));
        format!(
            "at every node, and nobody writes to the table until all have it: {}",
            all.join("; ")
        )
    };
    if let Some(finding) = inside(all, sequence, share, next, check) {
        return Some(finding);
    }
    if next > i128::from(bound) {
        let found = format!("overflows: this node's next value would be {next}, and at most {bound} fits");
        return Some(Finding::fail(check, found, remedy()));
    }
    let left = (i128::from(bound) - next) / share.increment() + 1;
    (left < FEW).then(|| {
        let found = format!("has only {left} values for this node, up to {bound}");
        Finding::warn(check, found, remedy())
    })
}

/// A value in the range of a member that still hands it out.
fn inside(all: &Sequences, sequence: &Sequence, share: Share, next: i128, check: &str) -> Option<Finding> {
    let (node, said) = all.said_of(sequence)?.iter().find(|(node, said)| {
        all.members.contains_key(node)
            && **node != share.node
            && said.method == Method::Range
            && next.checked_div(i128::from(said.increment)) == Some(i128::from(node.0))
    })?;
    Some(Finding::fail(
        check,
        format!(
            "this node's next value would be {next}, in the range of {} values that node {node} still hands out",
            said.increment
        ),
        format!(
            "give this node the method range, too (sequences.method, or a sequences.rule); to go back from \
             ranges, take it from node {node} before this one: the node with the highest range goes first"
        ),
    ))
}

/// A smaller increment than another member's has no room for a node that was let in by the larger one; an id that
/// another member's increment has no room for collides with it.
pub(super) fn smaller(all: &Sequences, sequence: &Sequence, share: Share, check: &str) -> Option<Finding> {
    let said = all.said_of(sequence)?;
    let (node, said) = said.iter().find(|(node, said)| {
        all.members.contains_key(node)
            && **node != share.node
            && said.method == Method::Interleave
            && (said.increment > i64::from(share.increment) || said.increment < i64::from(share.node.0))
    })?;
    Some(if said.increment > i64::from(share.increment) {
        Finding::fail(
            check,
            format!(
                "is divided by {} at node {node}, here by {}",
                said.increment, share.increment
            ),
            format!("set sequences.increment = {} here", said.increment),
        )
    } else {
        Finding::fail(
            check,
            format!(
                "is divided by {} at node {node}, which has no room for node {}",
                said.increment, share.node
            ),
            format!(
                "set sequences.increment = {} there, and run `anabranch sequences apply` there first",
                share.increment
            ),
        )
    })
}
