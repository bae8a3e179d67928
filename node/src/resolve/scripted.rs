//! Rows of tables where a script chooses among the versions that no other covers ([`anabranch_conflict::script`]), or either of two
//! policies while one is changed ([`anabranch_conflict::change`]).
//!
//! In:   these versions, what they wrote, the nodes' names      Out: the chosen row, and who lost
//! Invariants: 1. every version but the chosen one lost: a script may go back on a choice when another version comes in, so
//!        all are told each time, and those that have a line in the log keep it; 2. what a script sees of a version is what its
//!        origin sent, and the name that its origin has for life: the same at every node
//! Not here: keeping the versions and what they wrote, which is as for merged columns ([`super::merged`])

use std::collections::BTreeMap;
use std::sync::Arc;

use anabranch_conflict::change::{Change, Point};
use anabranch_conflict::script::{Candidate, Script, Value};
use anabranch_conflict::{Version, merge};
use anabranch_proto::NodeId;

use super::merged::{Folded, Written, image};

/// What chooses.
pub(super) enum Chooser {
    Script(Arc<Script>),
    /// Either of two policies; where the one was changed for the other, once that is met.
    Change(Arc<Change>, Option<Point>),
}

/// A choice that is to be made, with all that it is made of: the resolver need not be locked for it.
pub(crate) struct Choice {
    pub(super) by: Chooser,
    pub(super) versions: Vec<Version>,
    /// What each of them did.
    pub(super) written: Vec<Arc<Written>>,
    /// Are losses wanted?
    pub(super) told: bool,
}

impl Choice {
    /// Who wrote the versions.
    pub(crate) fn origins(&self) -> impl Iterator<Item = NodeId> {
        self.versions.iter().map(Version::origin)
    }

    /// What is made of the row; `None`: there is no version.
    pub(crate) fn make(&self, names: &BTreeMap<NodeId, String>) -> Option<Folded> {
        choose(&self.by, &self.versions, &self.written, names, self.told)
    }
}

fn choose(
    by: &Chooser,
    versions: &[Version],
    written: &[Arc<Written>],
    names: &BTreeMap<NodeId, String>,
    told: bool,
) -> Option<Folded> {
    let candidates = || -> Vec<Candidate> {
        let pairs = versions.iter().zip(written);
        pairs
            .map(|(version, written)| candidate(version, written, names))
            .collect()
    };
    let (chosen, failure, by_new) = match (by, versions) {
        (Chooser::Change(change, point), _) => {
            let is_new = |written: &Arc<Written>| point.is_some_and(|point| point.seen_by(&written.deps));
            let new: Vec<bool> = written.iter().map(is_new).collect();
            let decided = change.choose(versions, &new, candidates)?;
            (decided.chosen, decided.failure, Some(decided.by_new))
        }
        (Chooser::Script(_), [only]) => (only.stamp, None, None),
        (Chooser::Script(script), _) => {
            let outcome = script.choose(&candidates());
            (outcome.chosen, outcome.failure, None)
        }
    };
    let at = versions.iter().position(|version| version.stamp == chosen)?;
    let (top, written) = (*versions.get(at)?, written.get(at)?);
    let lost = |version: &&Version| told && version.stamp != chosen;
    let losses = versions.iter().filter(lost).map(|version| merge::Loss {
        loser: *version,
        winner: top,
        columns: Vec::new(),
        whole: true,
    });
    Some(Folded {
        table: Arc::clone(&written.table),
        all: Arc::clone(&written.table),
        row: written.effect.row().map(image),
        top,
        losses: losses.collect(),
        left_out: Vec::new(),
        failure,
        by_new,
    })
}

fn candidate(version: &Version, written: &Written, names: &BTreeMap<NodeId, String>) -> Candidate {
    let row = written.effect.row().map(|row| {
        let columns = written.table.columns.iter().zip(row);
        columns
            .map(|(column, field)| (column.name.clone(), Value::of(column, field)))
            .collect()
    });
    Candidate {
        stamp: version.stamp,
        origin: names.get(&version.origin()).cloned().unwrap_or_default(),
        row,
    }
}
