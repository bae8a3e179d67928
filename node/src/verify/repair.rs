//! Repair: rows whose difference is proven become, at every node, what they are at the node that is right.
//!
//! In:   proven differences of one table            Out: what was done to each
//! Holds: rows of a few keys
//! Invariants: 1. a row is written only as it is at the source, or as the newest write of it was, at a common cut of its
//!        writes (see [`super`]), and only where its watch is untouched; 2. a row counts as mended only when another round has seen it equal;
//!        3. it ends: one that does not become equal is written a few times, one that is written by others meanwhile is left after a while
//! Not here: the write itself (`crate::apply::mend`)

use std::collections::BTreeSet;

use anabranch_proto::Vector;
use anabranch_proto::link as pb;
use bytes::Bytes;
use futures_util::future::join_all;

use super::decided::{Decided, decided};
use super::run::{Pace, Proven, Run, Table};
use super::seat::WHOLE_BYTES_MAX;
use super::talk::{Error, MOVED, Talk};
use super::{Action, Difference, Repair, TableReport};

/// Rows that are mended at once: their images travel together.
const MENDED_AT_ONCE: usize = 50;

/// A row that was written so often and is not what was written is not written again: something at its node makes another row of it.
pub(super) const WRITTEN_MAX: u32 = 3;

/// The writes for one row: node, and why it cannot be, if so.
struct Plan {
    actions: Vec<Action>,
    mends: Vec<(usize, Bytes)>,
}

impl Run {
    /// Mends `proven`, or says what would be done.
    pub(super) async fn repair(
        &mut self,
        table: &Table,
        proven: &mut [Proven],
        repair: &Repair,
        result: &mut TableReport,
    ) -> Result<(), Error> {
        if proven.is_empty() {
            return Ok(());
        }
        let place = |name: &String| self.talks.iter().position(|talk| talk.name == *name);
        let source = repair.from.as_ref().map(place);
        // Looked for before anything was compared.
        let Ok(source) = source.map_or(Ok(None), |source| source.ok_or(()).map(Some)) else {
            return Ok(());
        };
        let what = format!("mending {} rows", proven.len());
        if !repair.dry_run {
            self.step(table, &what, 0).await;
        }
        for some in proven.chunks_mut(MENDED_AT_ONCE) {
            self.repair_some(table, some, (source, repair.dry_run), result)
                .await?;
        }
        Ok(())
    }

    async fn repair_some(
        &mut self,
        table: &Table,
        some: &mut [Proven],
        (source, dry_run): (Option<usize>, bool),
        result: &mut TableReport,
    ) -> Result<(), Error> {
        let mut left: Vec<usize> = (0..some.len()).collect();
        let mut pace = Pace::new(self.options.patience_s);
        let mut alone = false;
        let mut written = vec![0; some.len()];
        while !left.is_empty() {
            // Rows that were not sent for their size are sent by themselves.
            let now: Vec<usize> = left
                .iter()
                .copied()
                .take(if alone { 1 } else { left.len() })
                .collect();
            let keys: Vec<Bytes> = now
                .iter()
                .filter_map(|&at| Some(some.get(at)?.key.clone()))
                .collect();
            let (upto, states) = self.round(table, &keys, source).await?;
            let right = match source {
                Some(source) => states.get(source).cloned().unwrap_or_default(),
                None => self.newest(table, &upto, keys.len()).await?,
            };
            let mut mends: Vec<Vec<pb::VerifyMendRow>> = vec![Vec::new(); self.talks.len()];
            let mut done = Vec::new();
            for (place, &at) in now.iter().enumerate() {
                let Some(row) = some.get_mut(at) else { continue };
                match decided(&self.talks, &table.columns, &states, place) {
                    Decided::Equal => {
                        row.difference.mended = true;
                        done.push(at);
                    }
                    Decided::Moved => {}
                    Decided::Quarantined(difference) => {
                        refuse(
                            row,
                            difference,
                            "it is in quarantine at a node: mend what its error names",
                        );
                        done.push(at);
                    }
                    Decided::Different(difference) if !self.is_wanted(&difference) => {
                        let why = "it is no row that this node alone lacks: `anabranch repair` writes it as it is at the node that \
                                   you name";
                        refuse(row, difference, why);
                        done.push(at);
                    }
                    Decided::Different(difference)
                        if source.is_none() && right.get(place).is_none_or(|right| right.moved) =>
                    {
                        let why = "what its newest write made of it is in no journal any more, its table had other columns then, or the \
                                   table's policy is not last update wins: --from names the node that is right";
                        refuse(row, difference, why);
                        done.push(at);
                    }
                    Decided::Different(difference)
                        if written.get(at).is_some_and(|&times| times >= WRITTEN_MAX) =>
                    {
                        let why = unlike(&difference.columns);
                        refuse(row, difference, &why);
                        done.push(at);
                    }
                    Decided::Different(difference) => {
                        let Some(plan) = self.plan(&states, place, right.get(place)) else {
                            if alone {
                                let why = "the row is larger than 3 MiB: write it by hand";
                                refuse(row, difference, why);
                                done.push(at);
                            }
                            alone = true;
                            continue;
                        };
                        let written = right.get(place).filter(|right| right.present);
                        row.difference = Difference {
                            actions: plan.actions,
                            hash: written.map(|right| right.hash),
                            ..difference
                        };
                        if dry_run {
                            done.push(at);
                            continue;
                        }
                        let place = u32::try_from(place).unwrap_or(u32::MAX);
                        for (node, image) in plan.mends {
                            if let Some(rows) = mends.get_mut(node) {
                                rows.push(pb::VerifyMendRow {
                                    at: place,
                                    row: image,
                                });
                            }
                        }
                    }
                }
            }
            let outcomes = self.mend(mends).await?;
            let mut wrote: BTreeSet<usize> = BTreeSet::new();
            for (node, outcome) in outcomes {
                let at = now.get(outcome.at as usize).copied();
                let Some((at, row)) = at.and_then(|at| Some((at, some.get_mut(at)?))) else {
                    continue;
                };
                if outcome.refused.is_empty() {
                    wrote.insert(at);
                    continue;
                }
                if outcome.refused == MOVED {
                    continue;
                }
                let mut actions = row.difference.actions.iter_mut();
                if let Some(action) = actions.find(|action| action.node == node) {
                    action.refused = Some(outcome.refused);
                }
                done.push(at);
            }
            for &at in &wrote {
                if let Some(times) = written.get_mut(at) {
                    *times += 1;
                }
            }
            if alone && done.is_empty() && !now.is_empty() {
                left.rotate_left(1);
            }
            left.retain(|at| !done.contains(at));
            // What was written is looked at again at once.
            if !left.is_empty() && wrote.is_empty() && done.is_empty() && !pace.again().await {
                break;
            }
        }
        for at in left {
            if let Some(row) = some.get_mut(at) {
                result.undecided.push(row.difference.key.clone());
            }
        }
        Ok(())
    }

    /// Is it a row of the kind that shall be mended?
    fn is_wanted(&self, difference: &Difference) -> bool {
        let repair = self.options.repair.as_ref();
        let Some(absent) = repair.and_then(|repair| repair.absent_at.as_ref()) else {
            return true;
        };
        let mut images = difference.images.iter();
        images
            .all(|(node, image)| image.is_none() == (node == absent) && image.is_none_or(|image| image == 1))
    }

    /// What the newest write made of each row, by the first node whose journal tells.
    async fn newest(
        &mut self,
        table: &Table,
        upto: &Vector,
        rows: usize,
    ) -> Result<Vec<pb::VerifyState>, Error> {
        let unknown = pb::VerifyState {
            moved: true,
            ..pb::VerifyState::default()
        };
        let mut right = vec![unknown; rows];
        for talk in &mut self.talks {
            if right.iter().all(|state| !state.moved) {
                break;
            }
            let told = talk.newest(upto, &table.columns).await?;
            let open = right.iter_mut().zip(told).filter(|(state, _)| state.moved);
            open.for_each(|(state, told)| *state = told);
        }
        // Each node's fit a request, and all of them together need not. What is left out is sent by itself.
        let mut bytes = 0;
        for state in &mut right {
            bytes += state.row.len();
            if bytes > WHOLE_BYTES_MAX {
                state.row = Bytes::new();
            }
        }
        Ok(right)
    }

    /// What must be written for a row; none when its image was not sent.
    fn plan(
        &self,
        states: &[Vec<pb::VerifyState>],
        place: usize,
        right: Option<&pb::VerifyState>,
    ) -> Option<Plan> {
        let right = right?;
        if right.present && right.row.is_empty() {
            return None;
        }
        let mut plan = Plan {
            actions: Vec::new(),
            mends: Vec::new(),
        };
        for (node, (talk, of_node)) in self.talks.iter().zip(states).enumerate() {
            let state = of_node.get(place)?;
            let what = match (state.present, right.present) {
                (true, true) if state.hash == right.hash => continue,
                (false, false) => continue,
                (true, true) => "update",
                (false, true) => "insert",
                (true, false) => "delete",
            };
            plan.actions.push(Action {
                node: talk.name.clone(),
                what: what.to_owned(),
                refused: None,
            });
            plan.mends.push((node, right.row.clone()));
        }
        Some(plan)
    }

    pub(super) async fn mend(
        &mut self,
        mends: Vec<Vec<pb::VerifyMendRow>>,
    ) -> Result<Vec<(String, pb::VerifyOutcome)>, Error> {
        let asked = self.talks.iter_mut().zip(mends);
        let asked = asked.filter(|(_, rows)| !rows.is_empty());
        let all = join_all(asked.map(|(talk, rows)| mend_at(talk, rows))).await;
        let all = all.into_iter().collect::<Result<Vec<_>, _>>()?;
        Ok(all.into_iter().flatten().collect())
    }
}

async fn mend_at(
    talk: &mut Talk,
    rows: Vec<pb::VerifyMendRow>,
) -> Result<Vec<(String, pb::VerifyOutcome)>, Error> {
    let outcomes = talk.mend(rows).await?;
    let named = outcomes.into_iter().map(|outcome| (talk.name.clone(), outcome));
    Ok(named.collect())
}

/// Why a row is left that does not become what is written.
pub(super) fn unlike(columns: &[String]) -> String {
    let columns = match columns {
        [] => "it".to_owned(),
        columns => format!("column(s) {}", columns.join(", ")),
    };
    format!(
        "it was written {WRITTEN_MAX} times, and {columns} did not become what was written: a trigger that fires ALWAYS or REPLICA changes \
         the row there, or a column has another type, length or precision than at the other node; mend that, then repair again"
    )
}

fn refuse(row: &mut Proven, difference: Difference, why: &str) {
    let source = row.difference.images.keys().next().cloned().unwrap_or_default();
    row.difference = Difference {
        actions: vec![Action {
            node: source,
            what: "nothing".to_owned(),
            refused: Some(why.to_owned()),
        }],
        ..difference
    };
}
