//! Merged rows that a CHECK refuses, where the policy accepts that they wait: a counter that must not be negative, from which
//! several take, each of them as much as its server lets it.
//!
//! Every server has the same CHECK, so what the versions make of a row is refused everywhere or nowhere. What waits is the row as
//! it was merged; the table goes on showing what it showed, which may be another row at each node. A later version is merged with
//! those that are known, also with the refused one; a local one takes the place of what waits.
//!
//! Left out: trying again what waits with nothing new (the CHECK here does not change); truncates.

use std::collections::{BTreeMap, BTreeSet};

use anabranch_proto::Stamp;

use super::daemon::Daemon;
use super::oracle::Failure;
use super::{Counts, Key, Rules, Value};

/// The counter may not be below it.
pub(crate) const LOWEST: i64 = 0;

/// How the CHECK is met.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Check {
    /// All write all the time. No daemon ends, and nobody joins: who writes a row that waits tells it as the row before his, and a
    /// start may take that for what others have folded, too (design, section 5).
    AllWrite,
    /// A row that waits somewhere is written at one node alone, as the documentation asks.
    OneWrites,
    /// Wrong: what is refused counts as not applied.
    NotApplied,
}

impl Check {
    pub(crate) const fn has_one_writer(self) -> bool {
        matches!(self, Self::OneWrites)
    }

    pub(super) const fn counts_as_applied(self) -> bool {
        !matches!(self, Self::NotApplied)
    }
}

impl Rules {
    /// Does the server refuse the row?
    pub(super) fn refuses(&self, value: &Value) -> bool {
        self.check.is_some() && value[2] < LOWEST
    }
}

/// A node's quarantine: rows as they were merged, with the highest stamp of their versions.
#[derive(Debug, Clone, Default)]
pub(crate) struct Waiting {
    rows: BTreeMap<Key, (Stamp, Value)>,
    /// What the open apply transaction puts there, or takes away.
    open: BTreeMap<Key, Option<(Stamp, Value)>>,
    /// For the oracle alone: rows that waited once.
    held: BTreeSet<Key>,
}

impl Waiting {
    pub(super) fn refuse(&mut self, key: Key, stamp: Stamp, value: Value) {
        self.open.insert(key, Some((stamp, value)));
    }

    /// The row is written, or removed.
    pub(super) fn write(&mut self, key: Key) {
        if self.rows.contains_key(&key) || self.open.contains_key(&key) {
            self.open.insert(key, None);
        }
    }

    /// A local write takes the place of what waits, unless that may have seen it. True: it does.
    pub(super) fn overtake(&mut self, key: Key, stamp: Stamp) -> bool {
        let waits = self.rows.get(&key).is_some_and(|(waits, _)| *waits < stamp);
        waits && self.rows.remove(&key).is_some()
    }

    /// The open apply transaction commits. The rows that were refused in it.
    pub(super) fn commit(&mut self, counts: &mut Counts) -> BTreeSet<Key> {
        let mut refused = BTreeSet::new();
        for (key, row) in std::mem::take(&mut self.open) {
            if let Some(row) = row {
                counts.refused += 1;
                self.rows.insert(key, row);
                refused.insert(key);
            } else {
                counts.fitted += u32::from(self.rows.remove(&key).is_some());
            }
        }
        self.held.extend(&refused);
        refused
    }

    pub(super) fn abort(&mut self) {
        self.open.clear();
    }

    pub(super) fn committed(&self) -> Self {
        Self {
            open: BTreeMap::new(),
            ..self.clone()
        }
    }

    pub(super) fn holds(&self, key: Key) -> bool {
        self.rows.contains_key(&key)
    }

    pub(super) fn held(&self, key: Key) -> bool {
        self.held.contains(&key)
    }
}

/// The rows of a cluster at rest, the same at all nodes: what all show, or what waits at all of them.
pub(super) fn rows(
    nodes: &[Daemon],
    keys: &[Key],
    counts: &mut Counts,
) -> Result<BTreeMap<Key, Value>, Failure> {
    let mut rows = BTreeMap::new();
    for &key in keys {
        let of = |node: &Daemon| {
            let waits = node.waiting.rows.get(&key).copied();
            let shown = node.server.rows.get(&key).map(|row| row.value);
            // What is shown of a row that waits need not be the same.
            (waits, shown.filter(|_| waits.is_none()))
        };
        let first = of(&nodes[0]);
        if let Some(other) = nodes.iter().find(|node| of(node) != first) {
            let (a, b) = (nodes[0].node, other.node);
            return Err(Failure::Rows(format!(
                "{key:?}: {a:?} has {first:?}, {b:?} has {:?}",
                of(other)
            )));
        }
        let (waits, shown) = first;
        counts.waiting += u32::from(waits.is_some());
        let row = waits.map(|(_, value)| value).or(shown);
        if row.is_some_and(|value| (value[2] < LOWEST) != waits.is_some()) {
            return Err(Failure::Rows(format!(
                "{key:?}: waits as {waits:?}, is shown as {shown:?}"
            )));
        }
        for node in nodes {
            let shown = node.server.rows.get(&key);
            if shown.is_some_and(|row| row.value[2] < LOWEST) {
                return Err(Failure::Rows(format!("{key:?} is {shown:?} at {:?}", node.node)));
            }
        }
        rows.extend(row.map(|row| (key, row)));
    }
    Ok(rows)
}
