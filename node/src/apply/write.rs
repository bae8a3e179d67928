//! Writing a batch: guarded statements, and the slow path for rows that the guard held back.
//!
//! In:   a resolved [`Batch`], inside an open apply transaction      Out: rows, and what is to be logged
//! Invariants: 1. a row is overwritten only when its `xmin` is known to the resolver, or when it is locked and
//!        the decoder has passed the lock; 2. a refused row ends in quarantine and never stops the others
//! On crash: the transaction is gone with the session, and is built again from the journal
//! Not here: who wins ([`super::batch`]), refused rows ([`super::refused`]), the log's lines ([`super::ledger`])

mod part;
mod shown;

use std::collections::{BTreeMap, HashSet};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use anabranch_proto::Position;
use futures_util::SinkExt as _;
use tokio::time::Instant;

use super::apart::Apart;
use super::batch::{Action, Batch, Write};
use super::ddl::is_ddl;
use super::drift::{self, Drifted};
use super::failure::Failure;
use super::fence::Fence;
use super::lookup::Lookup;
use super::loss::{KeyFrom, Loss, Tuple};
use super::orphans::Touched;
use super::passed_over::Reading;
use super::plan::{CopyImage, Plan, RowArray, Source};
use super::refused;
use super::session::Session;
use crate::index::RowKey;
use crate::shared::{Counters, Shared, Visibility, lock};

pub(super) use part::{Missed, PartKind, arguments, by_table, parts};
pub(crate) use part::{Parameter, parameters, push, references};
pub(crate) use shown::Read;

/// For so long an open apply transaction waits for own commits that nobody sees yet.
const UNSEEN_FOR: Duration = Duration::from_secs(1);
/// The same in another try of a large one. It is decided anew each time, so it waits for what was decoded meanwhile, too: with a standby that is
/// seconds behind, and commits that go on, no try would be through otherwise.
const UNSEEN_FOR_AGAIN: Duration = Duration::from_secs(10);

/// Whether statements run in savepoints, so that a refused row does not end the transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    /// As `Plain`, and rows that should be absent are copied: a refusal ends the transaction, which then runs
    /// again as `Plain`.
    Swift,
    /// No savepoints: any refusal ends the transaction, which then runs again with them.
    Plain,
    /// A savepoint per table, and per row once a table's statements were refused.
    Cautious,
}

/// Has a statement with these actions run already? Some of their rows may be written then.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tried {
    /// So many rows its DELETE did not delete.
    Yes {
        undeleted: u64,
    },
    No,
}

/// Fewer rows are inserted, not copied: a COPY is one exchange with the server more.
pub(super) const COPY_ROWS_MIN: usize = 64;

/// What a batch is written with.
pub(crate) struct Writer<'a> {
    pub(crate) session: &'a mut Session,
    pub(crate) fence: &'a Fence,
    pub(crate) shared: &'a Shared,
    pub(crate) lookup: &'a Lookup,
    pub(crate) node_name: &'a str,
    /// This apply transaction, 32 bits.
    pub(crate) xid: u32,
    /// In another try, once one has met own commits that nobody saw: up to where they were waited for.
    pub(crate) seen_upto: Option<Position>,
    /// It is such a try, of a large one.
    pub(crate) is_patient: bool,
    pub(crate) mode: Mode,
    /// Of the batch being written: see [`Batch`].
    pub(crate) horizon: Option<u32>,
    /// Rows that a truncate of this transaction has brought back: that their xmin is ours does not say that a later
    /// action has written them.
    pub(crate) brought_back: HashSet<RowKey>,
    /// Rows that were there when they were looked at, and so are locked, of the batch being written.
    pub(crate) locked: HashSet<RowKey>,
    /// Rows whose deletion waits in quarantine, since what wrote them is not visible yet.
    pub(crate) put_off: HashSet<RowKey>,
    /// Was the row by which a statement travels there before the batch that was written last? Whoever wrote it has run the statement.
    pub(crate) has_run: bool,
    /// Lines of rows that were overwritten and were nobody's version.
    pub(crate) unheard: Vec<Loss>,
    /// Rows that were not as the stream says.
    pub(crate) drifted: Vec<Drifted>,
    /// DDL that has changed what DDL had made which it could not have seen.
    pub(crate) apart: Vec<Apart>,
    /// What was written of tables with foreign keys.
    pub(crate) touched: Touched,
    /// DDL of this transaction has been read: which tables are not replicated here nobody else reads before it has ended.
    pub(crate) reading: Option<Reading>,
}

/// Rows of one table as one origin describes it, and how they are written here.
pub(crate) type Group<'b> = (Arc<Plan>, Vec<&'b Action>);

/// What came of looking at locked rows.
struct Judged<'b> {
    /// Actions that still win and are not written yet.
    left: Vec<&'b Action>,
    /// Lines of rows that nobody's write made, without these rows.
    unheard: Vec<Loss>,
    drifted: Vec<Drifted>,
}

/// A locked row.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Standing {
    pub(crate) xmin: u32,
}

impl Writer<'_> {
    /// Writes all actions of the batch and finds the rows that its log lines show.
    pub(crate) async fn write(&mut self, batch: &mut Batch) -> Result<(), Failure> {
        self.horizon = batch.horizon;
        self.read_losers(batch).await?;
        self.locked.clear();
        self.has_run = false;
        // What was decided may know of a local write that DDL came before.
        self.forget_what_own_ddl_changed();
        if let Some(actions) = self.with_types(&batch.actions, false).await? {
            batch.actions = actions;
        }
        if let Some(actions) = self.with_late(&batch.actions, false).await? {
            batch.actions = actions;
        }
        let tables = by_table(&batch.actions);
        for (id, described) in tables {
            let mut groups: Vec<Group<'_>> = Vec::with_capacity(described.len());
            let (mut lines, mut without): (Vec<Loss>, Vec<Loss>) = (Vec::new(), Vec::new());
            for actions in described.into_values() {
                let Some(first) = actions.first() else { continue };
                match self.session.plan(&first.table).await {
                    Ok(plan) => {
                        without.extend(refused::without_columns(&plan, &actions));
                        groups.push((plan, actions));
                    }
                    Err(error) => {
                        let failure = Failure::from(error);
                        if failure.is_transient() {
                            return Err(failure);
                        }
                        let (gone, others) = self.split_unfit(actions).await?;
                        groups.extend(gone);
                        lines.extend(self.refuse_folded(&others, &failure).await?);
                    }
                }
            }
            let is_merged = lock(&self.shared.resolver).merging(id).is_some();
            if is_merged {
                for (plan, actions) in &groups {
                    lines.extend(self.write_merged(plan, actions).await?);
                }
            } else {
                lines.extend(self.write_groups(&groups).await?);
            }
            for (_, actions) in &groups {
                let of_ddl = actions.first().is_some_and(|first| is_ddl(&first.table));
                self.has_run |= of_ddl && actions.iter().any(|action| self.locked.contains(&action.key));
            }
            // Of rows that were written so.
            if !without.is_empty() {
                let out = lines.iter().filter(|line| line.keeps_row_out());
                let out: HashSet<&RowKey> = out.map(|line| &line.key).collect();
                without.retain(|of| !out.contains(&of.key));
            }
            batch.losses.extend(lines);
            batch.losses.append(&mut without);
            batch.losses.append(&mut self.unheard);
        }
        Counters::add(&self.shared.counters.rows, batch.change_count as u64);
        Ok(())
    }

    /// Writes all of one table.
    async fn write_groups(&mut self, groups: &[Group<'_>]) -> Result<Vec<Loss>, Failure> {
        let is_cautious = self.mode == Mode::Cautious;
        if is_cautious {
            self.session.client.batch_execute("SAVEPOINT t").await?;
        }
        let mut written = Ok(());
        for (plan, actions) in groups {
            written = self.write_table(plan, actions).await;
            if written.is_err() {
                break;
            }
        }
        match written {
            Ok(()) if is_cautious => self.session.client.batch_execute("RELEASE SAVEPOINT t").await?,
            Ok(()) => {}
            Err(failure) if !is_cautious || failure.is_transient() => return Err(failure),
            Err(_) => {
                self.session
                    .client
                    .batch_execute("ROLLBACK TO SAVEPOINT t; RELEASE SAVEPOINT t")
                    .await?;
                return self.row_by_row(groups).await;
            }
        }
        Ok(Vec::new())
    }

    async fn write_table(&mut self, plan: &Plan, actions: &[&Action]) -> Result<(), Failure> {
        let (careful, swift): (Vec<&Action>, Vec<&Action>) =
            actions.iter().copied().partition(|action| action.careful);
        let careful = if careful.is_empty() {
            careful
        } else {
            self.settle(plan, &careful, Tried::No).await?
        };
        // What goes makes room: another row of these may take a value of it.
        let (gone, careful): (Vec<&Action>, Vec<&Action>) = careful
            .into_iter()
            .partition(|action| matches!(action.write, Write::Delete(_)));
        self.force(plan, &gone).await?;
        let (again, undeleted) = self.write_swift(plan, &swift).await?;
        self.force(plan, &careful).await?;
        if again.is_empty() {
            return Ok(());
        }
        let again = self.settle(plan, &again, Tried::Yes { undeleted }).await?;
        self.force(plan, &again).await
    }

    /// Writes rows as they are expected to be found. Gives the actions of statements that did not write all of theirs, and how many
    /// rows were not deleted.
    pub(super) async fn write_swift<'b>(
        &mut self,
        plan: &Plan,
        actions: &[&'b Action],
    ) -> Result<(Vec<&'b Action>, u64), Failure> {
        let mut missed = Missed::default();
        for part in parts(plan, actions) {
            let copy = plan.copy.as_ref().filter(|_| {
                part.kind == PartKind::Inserts
                    && self.mode == Mode::Swift
                    && part.actions.len() >= COPY_ROWS_MIN
            });
            let written = match copy {
                Some(copy) => self.copy(plan, copy, &part.actions).await?,
                None => self.run(plan, part.sql, &part.actions, part.guarded).await?,
            };
            missed.note(part.kind, &part.actions, written);
        }
        Ok((missed.again, missed.undeleted))
    }

    /// Waits until all own transactions that are decoded by now are visible: what is decoded later is found out by itself. It takes the moment
    /// between a commit's flush and its end, or as long as a standby that is there needs. Where that takes longer the whole transaction lets go of
    /// its locks, and waits for them before it begins again. Then for no later ones: while a standby is a second behind, and commits go
    /// on, it would not end. But in any case for `writers`, those of the rows as they were when it was decided what becomes of them.
    pub(super) async fn until_seen(&mut self, writers: &HashSet<u32>) -> Result<(), Failure> {
        let upto = self.seen_upto.unwrap_or_else(|| self.shared.last_decoded());
        let most = if self.is_patient {
            UNSEEN_FOR_AGAIN
        } else {
            UNSEEN_FOR
        };
        let asked = Instant::now();
        while self.session.hides(self.shared, upto, writers).await? {
            if asked.elapsed() > most {
                return Err(Failure::Unseen);
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        Ok(())
    }

    /// The slow path: locks the rows, waits until everything before the locks is decoded, and keeps the
    /// actions that still win and are not written yet.
    pub(crate) async fn settle<'b>(
        &mut self,
        plan: &Plan,
        actions: &[&'b Action],
        tried: Tried,
    ) -> Result<Vec<&'b Action>, Failure> {
        Counters::add(&self.shared.counters.slow_path_rows, actions.len() as u64);
        // An own row that is decoded, and not visible yet, would pass for one that is gone already.
        let deletes = actions
            .iter()
            .filter(|action| matches!(action.write, Write::Delete(_)));
        let writers: HashSet<u32> = deletes.map(|action| action.expect.xid).collect();
        if !writers.is_empty() {
            self.until_seen(&writers).await?;
        }
        // Before the rows are looked for: whose commit becomes visible in between is found.
        let held = self.held_writers(&writers).await?;
        let waiting = self.waiting_deletions(actions.iter().copied());
        let standing = self.lock_rows(plan, actions).await?;
        for (action, row) in actions.iter().zip(&standing) {
            let is_held = held.contains(&action.expect.xid) || waiting.contains(&action.key);
            self.look_for_missed(action, row.is_some(), is_held).await?;
        }
        let horizon = self.shared.horizon();
        let known = |(action, row): (&&Action, &Option<Standing>)| {
            row.as_ref().is_some_and(|row| {
                row.xmin == self.xid
                    || (action.expect.xid != 0 && row.xmin == action.expect.xid)
                    || horizon.is_some_and(|horizon| row.xmin.wrapping_sub(horizon) >= 1 << 28)
            })
        };
        if !actions.iter().zip(&standing).all(known) {
            Counters::add(&self.shared.counters.fences, 1);
            self.pass_fence().await?;
        }
        // Rows that this transaction wrote in a savepoint do not show its xid: they would pass for others'.
        let looks_for_drift = tried != Tried::No && self.mode != Mode::Cautious;
        let mut judged = self.judge_settled(plan, actions, &standing, tried, looks_for_drift)?;
        self.show_unheard(plan, &mut judged.unheard).await?;
        self.unheard.append(&mut judged.unheard);
        self.drifted.append(&mut judged.drifted);
        Ok(judged.left)
    }

    /// Those of `writers` that are decoded and not visible yet where nobody may wait for them, since they may wait for this very transaction.
    pub(super) async fn held_writers(&mut self, writers: &HashSet<u32>) -> Result<HashSet<u32>, Failure> {
        if *self.shared.visibility.borrow() != Visibility::BeforeDependents {
            return Ok(HashSet::new());
        }
        let unseen = self.shared.unseen_up_to(Position::ZERO, writers);
        if unseen.is_empty() {
            return Ok(HashSet::new());
        }
        let unseen: Vec<i64> = unseen.into_iter().map(i64::from).collect();
        self.hidden_among(&unseen).await
    }

    /// Rows of `actions` whose deletion waits in quarantine already, where nobody may wait for the commits that hold them: one of these was
    /// decoded and found behind an earlier try, so it is not who is expected to have written the row.
    pub(super) fn waiting_deletions<'b>(&self, actions: impl Iterator<Item = &'b Action>) -> HashSet<RowKey> {
        if *self.shared.visibility.borrow() != Visibility::BeforeDependents {
            return HashSet::new();
        }
        let mut resolver = lock(&self.shared.resolver);
        let is_visible = |after| self.shared.is_visible(after);
        resolver.forget_held_before(is_visible);
        let waiting = actions.filter(|action| resolver.is_held(&action.key, is_visible));
        waiting.map(|action| action.key.clone()).collect()
    }

    /// Puts a deletion off where its row was not found and is `held`, written by a commit that is not visible yet: then it will be there. What wrote
    /// it was known when that was decided, so nothing else would find it.
    pub(super) async fn look_for_missed(
        &mut self,
        action: &Action,
        is_found: bool,
        is_held: bool,
    ) -> Result<(), Failure> {
        let is_delete = matches!(action.write, Write::Delete(_));
        if is_delete && !is_found && is_held {
            self.quarantine(action, &Failure::Held).await?;
            self.put_off.insert(action.key.clone());
        } else if !is_delete {
            // A later chunk of a large transaction writes the row again.
            self.put_off.remove(&action.key);
        }
        Ok(())
    }

    /// Of rows that are locked, with all before the locks known.
    fn judge_settled<'b>(
        &self,
        plan: &Plan,
        actions: &[&'b Action],
        standing: &[Option<Standing>],
        tried: Tried,
        looks_for_drift: bool,
    ) -> Result<Judged<'b>, Failure> {
        let mut resolver = lock(&self.shared.resolver);
        let mut judged = Judged {
            left: Vec::with_capacity(actions.len()),
            unheard: Vec::new(),
            drifted: Vec::new(),
        };
        // Rows that are not there were deleted a moment ago, or had not been there.
        let mut gone_unheard = Vec::new();
        let mut undeleted = match tried {
            Tried::Yes { undeleted } if looks_for_drift => undeleted,
            _ => 0,
        };
        for (&action, row) in actions.iter().zip(standing) {
            let ours = row.as_ref().is_some_and(|row| row.xmin == self.xid);
            let written = ours && tried != Tried::No && !self.brought_back.contains(&action.key);
            let gone = row.is_none() && matches!(action.write, Write::Delete(_));
            if matches!(action.write, Write::Put(_))
                && resolver.is_parked(&action.key, action.version.stamp)?
            {
                // A local row, decoded since, has one of its unique values: decided again.
                return Err(Failure::Raced);
            }
            let wins = resolver.is_winner(&action.key, action.version.stamp, false)?;
            let is_delete = matches!(
                (&action.write, action.expect.present),
                (Write::Delete(_), Some(true) | None)
            );
            if is_delete && gone && wins && drift::is_unheard_of(action, &mut resolver) {
                gone_unheard.push(action);
            } else if is_delete {
                // It may be this one that was not deleted.
                undeleted = undeleted.saturating_sub(1);
            }
            if written || !wins {
                continue;
            }
            if looks_for_drift && !(is_delete && gone) {
                judged
                    .unheard
                    .extend(drift::unheard(action, row.as_ref(), &mut resolver));
                let found = drift::look(plan, action, row.as_ref(), &mut resolver, self.shared);
                judged.drifted.extend(found);
            }
            if !gone {
                judged.left.push(action);
            }
        }
        let undeleted = usize::try_from(undeleted).unwrap_or(usize::MAX);
        for action in gone_unheard.into_iter().take(undeleted) {
            let found = drift::look(plan, action, None, &mut resolver, self.shared);
            judged.drifted.extend(found);
        }
        Ok(judged)
    }

    /// Writes rows that are settled: locked, or absent.
    pub(crate) async fn force(&mut self, plan: &Plan, actions: &[&Action]) -> Result<(), Failure> {
        let (deletes, puts): (Vec<&Action>, Vec<&Action>) = actions
            .iter()
            .copied()
            .partition(|action| matches!(action.write, Write::Delete(_)));
        if !deletes.is_empty() {
            let there = deletes
                .iter()
                .filter(|action| self.locked.contains(&action.key))
                .count();
            let written = self.run(plan, &plan.delete_unguarded, &deletes, false).await?;
            if written < there as u64 && self.lock_rows(plan, &deletes).await?.iter().any(Option::is_some) {
                return Err(Failure::Unwritten(plan.table_sql.clone()));
            }
        }
        if puts.is_empty() {
            return Ok(());
        }
        let standing = self.look_again(plan, &puts).await?;
        let pairs: Vec<_> = puts.iter().copied().zip(standing).collect();
        let updates: Vec<&Action> = pairs
            .iter()
            .filter(|pair| pair.1.is_some())
            .map(|pair| pair.0)
            .collect();
        let inserts: Vec<&Action> = pairs
            .iter()
            .filter(|pair| pair.1.is_none())
            .map(|pair| pair.0)
            .collect();
        if !updates.is_empty() {
            let written = self.run(plan, &plan.update_unguarded, &updates, false).await?;
            // They are locked: nobody came between. But a trigger may pass over an update that changes nothing.
            if written < updates.len() as u64 && !self.is_as_written(plan, &updates).await? {
                return Err(Failure::Unwritten(plan.table_sql.clone()));
            }
        }
        if !inserts.is_empty() {
            let written = self.run(plan, &plan.insert, &inserts, false).await?;
            if written < inserts.len() as u64 {
                let standing = self.lock_rows(plan, &inserts).await?;
                return Err(if standing.iter().all(Option::is_some) {
                    // Somebody came between the look and the write: all of it starts again.
                    Failure::Raced
                } else {
                    Failure::Unwritten(plan.table_sql.clone())
                });
            }
        }
        Ok(())
    }

    /// Are there rows for all of `puts`, and are they what these write?
    async fn is_as_written(&mut self, plan: &Plan, puts: &[&Action]) -> Result<bool, Failure> {
        let params = arguments(plan, puts, None)?;
        let statement = self.session.prepare(&plan.as_written()).await?;
        let client = &self.session.client;
        let row = client.query_one(&statement, &references(&params)).await?;
        let count: i64 = row.try_get(0)?;
        Ok(usize::try_from(count).is_ok_and(|count| count >= puts.len()))
    }

    /// Looks again, just before they are written, at rows that were decided upon.
    pub(super) async fn look_again(
        &mut self,
        plan: &Plan,
        actions: &[&Action],
    ) -> Result<Vec<Option<Standing>>, Failure> {
        let were_locked: Vec<bool> = actions
            .iter()
            .map(|action| self.locked.contains(&action.key))
            .collect();
        let standing = self.lock_rows(plan, actions).await?;
        let came_between = |(row, &was_locked): (&Option<Standing>, &bool)| {
            row.as_ref()
                .is_some_and(|row| !was_locked && row.xmin != self.xid)
        };
        if standing.iter().zip(&were_locked).any(came_between) {
            // Not there when it was decided, and committed by somebody since: that write may well win.
            return Err(Failure::Raced);
        }
        Ok(standing)
    }

    /// Locks the rows of `actions` that are there. Only keys are sent: a value that the server cannot read
    /// is met where a savepoint stands before it.
    pub(crate) async fn lock_rows(
        &mut self,
        plan: &Plan,
        actions: &[&Action],
    ) -> Result<Vec<Option<Standing>>, Failure> {
        let rows = keys_of(plan, actions)?;
        let standing = self.lock_array(plan, rows).await?;
        self.note_locked(actions.iter().map(|action| &action.key), &standing);
        Ok(standing)
    }

    /// Notes which of the rows of `keys` are there.
    pub(super) fn note_locked<'k>(
        &mut self,
        keys: impl Iterator<Item = &'k RowKey>,
        standing: &[Option<Standing>],
    ) {
        let there = keys.zip(standing).filter(|(_, row)| row.is_some());
        self.locked.extend(there.map(|(key, _)| key.clone()));
    }

    /// Locks the rows of an array that are there. Their values are not read: `jsonb` may not take one of them.
    pub(crate) async fn lock_array(
        &mut self,
        plan: &Plan,
        rows: RowArray<'_>,
    ) -> Result<Vec<Option<Standing>>, Failure> {
        let mut standing = vec![None; rows.count() as usize];
        let found = {
            let statement = self.session.prepare(&plan.lock).await?;
            let (array, text) = rows.finish();
            let params = parameters(array, None, text);
            self.session
                .client
                .query(&statement, &references(&params))
                .await?
        };
        for row in found {
            if let Some(slot) = shown::place(&row)?.and_then(|at| standing.get_mut(at)) {
                let xmin = shown::xmin(&row)?;
                *slot = Some(Standing { xmin });
            }
        }
        Ok(standing)
    }

    /// Runs one statement over `actions`; how many rows it wrote.
    pub(crate) async fn run(
        &mut self,
        plan: &Plan,
        sql: &str,
        actions: &[&Action],
        guarded: bool,
    ) -> Result<u64, Failure> {
        self.note_touched(plan, actions).await?;
        let params = arguments(plan, actions, guarded.then_some(self.horizon))?;
        let statement = self.session.prepare(sql).await?;
        Ok(self
            .session
            .client
            .execute(&statement, &references(&params))
            .await?)
    }

    /// Copies rows that should be absent: a third of an INSERT's work. One that is there after all, by a local
    /// insert that is not decoded yet, ends the transaction.
    async fn copy(&mut self, plan: &Plan, sql: &str, actions: &[&Action]) -> Result<u64, Failure> {
        self.note_touched(plan, actions).await?;
        let rows = || {
            actions.iter().filter_map(|action| match &action.write {
                Write::Put(row) => Some(row),
                Write::Delete(_) => None,
            })
        };
        let mut image = CopyImage::new(rows().map(|row| row.as_bytes().len()).sum());
        for row in rows() {
            image.push(plan, row)?;
        }
        let statement = self.session.prepare(sql).await?;
        let client = &self.session.client;
        let copied = async {
            let mut sink = pin!(client.copy_in(&statement).await?);
            sink.send(image.finish()).await?;
            sink.finish().await
        };
        copied.await.map_err(Failure::Copy)
    }

    /// Finds the rows that the log lines show as they stand now.
    async fn read_losers(&mut self, batch: &mut Batch) -> Result<(), Failure> {
        let mut tables: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for (at, loss) in batch.losses.iter().enumerate() {
            if matches!(loss.local_tuple, Tuple::Standing(_))
                || matches!(loss.remote_tuple, Tuple::Standing(_))
            {
                tables
                    .entry(Arc::as_ptr(&loss.table) as usize)
                    .or_default()
                    .push(at);
            }
        }
        for places in tables.into_values() {
            let Some(table) = places
                .first()
                .and_then(|&at| batch.losses.get(at))
                .map(|loss| Arc::clone(&loss.table))
            else {
                continue;
            };
            let Some(plan) = self.session.plan_if_fit(&table).await? else {
                // The table is missing or differs: its rows are refused with the reason by `write`.
                for &at in &places {
                    if let Some(loss) = batch.losses.get_mut(at) {
                        loss.fill_standing(None);
                    }
                }
                continue;
            };
            let mut rows = plan.rows();
            for loss in places.iter().filter_map(|&at| batch.losses.get(at)) {
                match &loss.key_from {
                    KeyFrom::Row(row) => rows.push(&Source::Key(&loss.table.key_image(row)?))?,
                    KeyFrom::Key(key) => rows.push(&Source::Key(key))?,
                    KeyFrom::Canonical => rows.push(&Source::Key(
                        &loss.table.image_of_canonical(loss.key.canonical())?,
                    ))?,
                }
            }
            let standing = self.read_array(&plan, rows, self.mode == Mode::Cautious).await?;
            for (&at, row) in places.iter().zip(standing) {
                if let Some(loss) = batch.losses.get_mut(at) {
                    loss.fill_standing(row.as_ref());
                }
            }
        }
        Ok(())
    }
}

/// The keys of the rows that `actions` write.
pub(super) fn keys_of<'p>(plan: &'p Plan, actions: &[&Action]) -> Result<RowArray<'p>, Failure> {
    let mut rows = plan.rows();
    for action in actions {
        match &action.write {
            Write::Put(row) => rows.push(&Source::Key(&action.table.key_image(row)?))?,
            Write::Delete(key) => rows.push(&Source::Key(key))?,
        }
    }
    Ok(rows)
}
