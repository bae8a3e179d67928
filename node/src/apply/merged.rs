//! Rows whose columns are merged, or that a script chooses: locked, folded from all that is known then, and written.
//!
//! In:   actions whose row is to be folded      Out: rows, lines of what was lost
//! Invariants: a row is folded once it is locked and the decoder has passed the lock: an apply transaction never commits
//!        a version without its effect in the row
//! Not here: the fold (`crate::resolve`, `anabranch_conflict::merge`)

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use anabranch_conflict::record::classify;
use anabranch_conflict::{ConflictType, Kind, Op, Resolution, Version};
use anabranch_proto::Stamp;
use anabranch_proto::schema::TableDesc;

use super::batch::{Action, Write};
use super::drift;
use super::failure::Failure;
use super::loss::{KeyFrom, Loser, Loss, Lost, Refusal, Tuple};
use super::plan::Plan;
use super::write::{Mode, Writer};
use crate::index::RowKey;
use crate::resolve::{Choice, Folded};
use crate::shared::{Counters, lock};

/// What PostgreSQL says of a sum that its type cannot hold.
const OUT_OF_RANGE: &str = "22003";

impl Writer<'_> {
    /// Writes a table's actions: what nobody has raced as any row, the rest folded. Gives the lines of what was lost.
    pub(super) async fn write_merged(
        &mut self,
        plan: &Plan,
        actions: &[&Action],
    ) -> Result<Vec<Loss>, Failure> {
        let cautious = self.mode == Mode::Cautious;
        let (folds, swift): (Vec<&Action>, Vec<&Action>) = actions
            .iter()
            .copied()
            .partition(|action| cautious || action.careful || !action.folds.is_empty());
        let mut losses = self.write_folded(plan, &folds).await?;
        let (again, _) = self.write_swift(plan, &swift).await?;
        losses.extend(self.write_folded(plan, &again).await?);
        Ok(losses)
    }

    /// Writes the rows of `actions` as all that is known makes them.
    async fn write_folded(&mut self, plan: &Plan, actions: &[&Action]) -> Result<Vec<Loss>, Failure> {
        if actions.is_empty() {
            return Ok(Vec::new());
        }
        Counters::add(&self.shared.counters.slow_path_rows, actions.len() as u64);
        // An own row that is decoded, and not visible yet, would pass for one that is not there; what is folded may be its end.
        let writers: HashSet<u32> = actions.iter().map(|action| action.expect.xid).collect();
        self.until_seen(&writers).await?;
        let held = self.held_writers(&writers).await?;
        let waiting = self.waiting_deletions(actions.iter().copied());
        let standing = self.lock_rows(plan, actions).await?;
        let known = |(action, row): (&&Action, &Option<super::write::Standing>)| {
            row.as_ref().is_some_and(|row| {
                row.xmin == self.xid || (action.expect.xid != 0 && row.xmin == action.expect.xid)
            })
        };
        if !actions.iter().zip(&standing).all(known) {
            Counters::add(&self.shared.counters.fences, 1);
            self.pass_fence().await?;
        }
        let (mut losses, mut unheard) = (Vec::new(), Vec::new());
        let mut folded = Vec::with_capacity(actions.len());
        for (action, row) in actions.iter().zip(&standing) {
            let others = row
                .as_ref()
                .filter(|row| row.xmin != self.xid && self.mode != Mode::Cautious);
            unheard.extend(drift::unheard(action, others, &mut lock(&self.shared.resolver)));
            folded.push(self.folded(action, &mut losses)?);
        }
        self.show_unheard(plan, &mut unheard).await?;
        losses.append(&mut unheard);
        for ((action, row), folded) in actions.iter().zip(&standing).zip(&folded) {
            let is_held = held.contains(&action.expect.xid) || waiting.contains(&action.key);
            self.look_for_missed(folded, row.is_some(), is_held).await?;
        }
        losses.extend(self.write_rows(&folded).await?);
        Ok(losses)
    }

    /// Writes rows that are locked or absent, by the columns that they have. Gives the lines of rows that were refused.
    pub(super) async fn write_rows(&mut self, actions: &[Action]) -> Result<Vec<Loss>, Failure> {
        let typed = self.with_types(actions, true).await?;
        let actions = typed.as_deref().unwrap_or(actions);
        let filled = self.with_late(actions, true).await?;
        let actions = filled.as_deref().unwrap_or(actions);
        let mut described: BTreeMap<usize, Vec<&Action>> = BTreeMap::new();
        for action in actions {
            let address = Arc::as_ptr(&action.table) as usize;
            described.entry(address).or_default().push(action);
        }
        let mut losses = Vec::new();
        for some in described.into_values() {
            let Some(first) = some.first() else { continue };
            let (plan, some) = match self.session.plan(&first.table).await.map_err(Failure::from) {
                Ok(plan) => (plan, some),
                Err(failure) if failure.is_transient() => return Err(failure),
                // The versions know columns that the table here has not, or not any more.
                Err(failure) => {
                    let (gone, others) = self.split_unfit(some).await?;
                    losses.extend(self.refuse_table(&others, &failure).await?);
                    let Some(gone) = gone else { continue };
                    gone
                }
            };
            match self.mode {
                Mode::Swift | Mode::Plain => self.force(&plan, &some).await?,
                Mode::Cautious => {
                    self.look_again(&plan, &some).await?;
                    losses.extend(self.row_by_row(&[(plan, some)]).await?);
                }
            }
        }
        let mut resolver = lock(&self.shared.resolver);
        for action in actions {
            resolver.set_xid(&action.key, action.version.stamp, self.xid)?;
        }
        Ok(losses)
    }

    /// Refuses actions of a table that cannot be written at all. What waits in quarantine is the row as all that is known makes
    /// it: when it is tried again, that may be stable and forgotten. A local write that is not decoded yet takes its place.
    pub(super) async fn refuse_folded(
        &mut self,
        actions: &[&Action],
        failure: &Failure,
    ) -> Result<Vec<Loss>, Failure> {
        let (mut losses, mut folded) = (Vec::new(), Vec::with_capacity(actions.len()));
        for &action in actions {
            folded.push(if action.folds.is_empty() {
                action.clone()
            } else {
                self.folded(action, &mut losses)?
            });
        }
        let folded: Vec<&Action> = folded.iter().collect();
        losses.extend(self.refuse_table(&folded, failure).await?);
        Ok(losses)
    }

    /// The action with the row as all that is known makes it. Its lines are added to `losses`.
    pub(super) fn folded(&mut self, action: &Action, losses: &mut Vec<Loss>) -> Result<Action, Failure> {
        let Some(folded) = self.fold(&action.table, &action.key, &action.folds)? else {
            // All of it has become stable meanwhile: nothing was concurrent. Or a local truncate that was decoded since has removed all.
            let current = lock(&self.shared.resolver).current(&action.key)?;
            let (write, op) = if current.is_some_and(|current| current.version.kind == Kind::Delete) {
                let key = action.table.image_of_canonical(action.key.canonical())?;
                (Write::Delete(key), Op::Delete)
            } else {
                (action.write.clone(), action.op)
            };
            let (table, key) = (Arc::clone(&action.table), action.key.clone());
            return Ok(Action::careful(table, key, write, action.version, op));
        };
        self.merge_lines(&action.key, &folded, losses);
        let key_image = action.table.image_of_canonical(action.key.canonical())?;
        let (write, op) = match folded.row {
            Some(row) => (Write::Put(row), Op::Update),
            None => (Write::Delete(key_image), Op::Delete),
        };
        Ok(Action::careful(
            folded.table,
            action.key.clone(),
            write,
            folded.top,
            op,
        ))
    }

    /// Folds a row from what is in memory, and from the journal.
    pub(super) fn fold(
        &self,
        table: &Arc<TableDesc>,
        key: &RowKey,
        asked: &[Stamp],
    ) -> Result<Option<Folded>, Failure> {
        let choose = |choice: &Choice| {
            let names = lock(&self.shared.names).clone();
            if choice.origins().all(|origin| names.contains_key(&origin)) {
                return Ok(choice.make(&names));
            }
            // Without its name a script could choose otherwise. What a node writes comes after the fact that it joined, so this is a
            // fact that is applied and was not read yet when this daemon started.
            Err(Failure::Raced)
        };
        let read = |version| self.lookup.written(version, table, key);
        crate::resolve::fold(&self.shared.resolver, key, asked, read, choose)
    }

    /// The lines of a fold.
    pub(super) fn merge_lines(&self, key: &RowKey, folded: &Folded, losses: &mut Vec<Loss>) {
        let names = |columns: &[usize]| -> Vec<String> {
            let name = |at: &usize| Some(folded.all.columns.get(*at)?.name.clone());
            columns.iter().filter_map(name).collect()
        };
        let before = losses.len();
        for lost in &folded.losses {
            let columns = (!lost.whole).then(|| names(&lost.columns));
            let mut line = line(folded, key, (lost.loser, Some(lost.winner)), columns);
            line.reason = folded.failure.as_ref().map(Refusal::script);
            losses.push(line);
        }
        for out in &folded.left_out {
            let column = names(&[out.column]).pop().unwrap_or_default();
            let reason = Some(Refusal {
                sqlstate: OUT_OF_RANGE.to_owned(),
                message: format!(
                    "what was added to column \"{column}\" is left out: with what others added the sum is out of its range"
                ),
                detail: None,
                context: None,
                constraint: None,
                parents: None,
            });
            // One line for all that it lost.
            let mut told = losses.iter_mut().skip(before);
            if let Some(told) = told.find(|line| line.remote == Some(out.loser)) {
                // One that is gone altogether is gone for another reason.
                let lost = told.lost_columns.as_mut();
                if let Some(names) = lost.and_then(|lost| lost.columns.as_mut()) {
                    if !names.contains(&column) {
                        names.push(column);
                    }
                    told.reason = reason;
                }
                continue;
            }
            let mut line = line(folded, key, (out.loser, out.winner), Some(vec![column]));
            line.reason = reason;
            losses.push(line);
        }
    }
}

/// A line of a version that lost something: it is the remote side, what it lost to the local one, as if it came in last.
fn line(
    folded: &Folded,
    key: &RowKey,
    (loser, winner): (Version, Option<Version>),
    columns: Option<Vec<String>>,
) -> Loss {
    let tuple = |version: Version| match version.kind {
        Kind::Put => Tuple::Journal(version),
        Kind::Delete => Tuple::None,
    };
    let left = match &folded.row {
        Some(row) => Tuple::Image(Arc::clone(&folded.table), row.clone()),
        None => Tuple::None,
    };
    let op = match loser.kind {
        Kind::Put => Op::Update,
        Kind::Delete => Op::Delete,
    };
    let kind = match winner {
        Some(winner) if columns.is_none() => classify(op, winner.kind),
        _ => ConflictType::UpdateOriginDiffers,
    };
    Loss {
        table: Arc::clone(&folded.all),
        key: key.clone(),
        key_from: KeyFrom::Canonical,
        kind,
        resolution: if columns.is_some() {
            Resolution::Merge
        } else {
            Resolution::KeepLocal
        },
        loser: Loser::Remote,
        local: winner,
        remote: Some(loser),
        local_tuple: winner.map_or(Tuple::None, tuple),
        remote_tuple: tuple(loser),
        refusal: None,
        is_decoded: false,
        lost_columns: Some(Lost {
            columns,
            left: Some(left),
        }),
        reason: None,
    }
}
