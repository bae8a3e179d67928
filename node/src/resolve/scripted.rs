//! Rows of tables where a script chooses among the versions that no other covers ([`anabranch_conflict::script`]).
//!
//! In:   these versions, what they wrote, the nodes' names      Out: the chosen row, and who lost
//! Invariants: 1. every version but the chosen one lost: a script may go back on a choice when another version comes in, so
//!        all are told each time, and those that have a line in the log keep it; 2. what a script sees of a version is what its
//!        origin sent, and the name that its origin has for life: the same at every node
//! Not here: keeping the versions and what they wrote, which is as for merged columns ([`super::merged`])

use std::collections::BTreeMap;
use std::sync::Arc;

use anabranch_conflict::script::{Candidate, Script, Value};
use anabranch_conflict::{Version, merge};
use anabranch_proto::NodeId;

use super::merged::{Folded, Written, image};

/// What the script makes of a row; `None`: there is no version. `told`: whether losses are wanted.
pub(super) fn choose(
    script: &Script,
    versions: &[Version],
    written: &[Arc<Written>],
    names: &BTreeMap<NodeId, String>,
    told: bool,
) -> Option<Folded> {
    let (chosen, failure) = match versions {
        [only] => (only.stamp, None),
        _ => {
            let pairs = versions.iter().zip(written);
            let candidates: Vec<Candidate> = pairs
                .map(|(version, written)| candidate(version, written, names))
                .collect();
            let outcome = script.choose(&candidates);
            (outcome.chosen, outcome.failure)
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
