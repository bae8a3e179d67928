//! A remote TRUNCATE: a version of the whole table.
//!
//! In:   the truncate, between the actions before and after it      Out: emptied tables, lost rows to log
//! Invariants: 1. the tables are locked and everything before the lock is decoded before survivors are looked up; 2. a truncate
//!        that is tried again says the same of each row: the resolver meets it once, before what comes behind it, and tells
//!        what stays, what is lost to it and what comes back; only what others have written since is asked for again
//! Not here: which rows survive (`anabranch-conflict`), local truncates (capture)

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use anabranch_conflict::{ConflictType, Kind, Op, Resolution, Version};
use anabranch_proto::Stamp;
use anabranch_proto::row::RowImage;
use anabranch_proto::schema::TableDesc;

use super::batch::{Action, Truncate, Write};
use super::catalog;
use super::failure::Failure;
use super::loss::{KeyFrom, Loser, Loss, Tuple};
use super::plan::{Plan, Source};
use super::session::TableError;
use super::write::{Mode, Writer, parameters, references};
use crate::index::{RowKey, TableId};
use crate::resolve::{self, Resolver, Truncated};
use crate::shared::lock;

/// What a truncate has met, kept from one try to the next.
#[derive(Debug, Default)]
pub(crate) struct Met {
    /// Lines of the rows that are lost to it, and of those that came back and were refused.
    pub(crate) losses: Vec<Loss>,
    /// Rows that show another version once what they showed is gone.
    restored: Vec<(Arc<TableDesc>, RowKey, Version)>,
    /// Rows that are folded again.
    folded: Vec<(Arc<TableDesc>, RowKey)>,
    /// The rows that stayed when it was met, by the tables that have met it.
    stayed: HashMap<TableId, Vec<RowKey>>,
    /// The stamps of the apply transaction that it is in.
    own: Arc<HashSet<Stamp>>,
}

impl Met {
    /// Nothing yet, in an apply transaction with these stamps.
    pub(crate) fn within(own: Arc<HashSet<Stamp>>) -> Self {
        Self {
            own,
            ..Self::default()
        }
    }

    /// Takes what the resolver says of a table, and gives the rows that stay.
    fn add(
        &mut self,
        (id, table): (TableId, &Arc<TableDesc>),
        said: Truncated,
        truncate: &Truncate,
    ) -> Vec<RowKey> {
        let version = gone(truncate);
        self.losses.extend(said.lost.into_iter().map(|(key, entry)| Loss {
            table: Arc::clone(table),
            key,
            key_from: KeyFrom::Canonical,
            kind: ConflictType::TruncateConflict,
            resolution: Resolution::ApplyRemote,
            loser: Loser::Local,
            local: Some(entry.version),
            remote: Some(version),
            local_tuple: Tuple::Standing(entry),
            remote_tuple: Tuple::None,
            refusal: None,
            is_decoded: false,
            lost_columns: None,
            reason: None,
        }));
        let new = said.restored.into_iter();
        self.restored
            .extend(new.map(|(key, version)| (Arc::clone(table), key, version)));
        for key in said.folded {
            if !self.folded.iter().any(|(_, known)| *known == key) {
                self.folded.push((Arc::clone(table), key));
            }
        }
        self.stayed.insert(id, said.survivors.clone());
        said.survivors
    }

    /// The same on another try, with the rows that others have written since. What comes back is not in the table, and what a
    /// local write has taken the place of meanwhile does not come back; what is written behind the truncate comes over it.
    fn add_again(
        &mut self,
        id: TableId,
        truncate: &Truncate,
        resolver: &mut Resolver,
    ) -> Result<Vec<RowKey>, resolve::Error> {
        let mut still = Vec::with_capacity(self.restored.len());
        for (table, key, version) in self.restored.drain(..) {
            let comes_back = key.table() != id
                || resolver.is_winner(&key, version.stamp, true)?
                || resolver
                    .current(&key)?
                    .is_some_and(|over| self.own.contains(&over.version.stamp));
            if comes_back {
                still.push((table, key, version));
            }
        }
        self.restored = still;
        let mut survivors = resolver.remote_truncate_again(id, truncate.version, &self.own)?;
        let back: HashSet<&RowKey> = self.restored.iter().map(|(_, key, _)| key).collect();
        survivors.retain(|key| !back.contains(key));
        let stayed: HashSet<&RowKey> = self.stayed.get(&id).into_iter().flatten().collect();
        survivors.retain(|key| !stayed.contains(key));
        survivors.extend(stayed.into_iter().cloned());
        Ok(survivors)
    }

    /// What must be done again where the truncate is met a second time, read anew: its lines, and the rows that came back or
    /// were folded again. The table has these as they were, and the resolver knows no more that anything of them was cut.
    pub(crate) fn into_known(self, truncate: &Truncate) -> Result<(Vec<Loss>, Vec<Action>), Failure> {
        let restored = self.restored.into_iter().map(|(table, key, version)| {
            // In place of the row, which is read back from the journal.
            let nothing = Write::Delete(RowImage::build(std::iter::empty()));
            let mut action = Action::careful(table, key, nothing, version, Op::Insert);
            action.recall = true;
            action
        });
        let mut rows: Vec<Action> = restored.collect();
        for (table, key) in self.folded {
            rows.push(to_fold(table, key, truncate)?);
        }
        Ok((self.losses, rows))
    }
}

/// A row that a truncate has cut, to be folded of what is left.
fn to_fold(table: Arc<TableDesc>, key: RowKey, truncate: &Truncate) -> Result<Action, Failure> {
    let write = Write::Delete(table.image_of_canonical(key.canonical())?);
    let version = gone(truncate);
    let mut action = Action::careful(table, key, write, version, Op::Delete);
    // A script may choose otherwise among what is left.
    action.folds.push(version.stamp);
    Ok(action)
}

/// The version that a truncate is of each row.
const fn gone(truncate: &Truncate) -> Version {
    Version {
        stamp: truncate.version.stamp,
        position: truncate.version.position,
        kind: Kind::Delete,
    }
}

/// Rows that leave the quarantine.
type Released = Vec<(Arc<TableDesc>, RowKey)>;

impl Writer<'_> {
    /// Empties the tables of `truncate`, and keeps the rows that are concurrent and newer. Gives the rows in quarantine that it
    /// removes.
    pub(crate) async fn truncate(&mut self, truncate: &Truncate, met: &mut Met) -> Result<Released, Failure> {
        let mut plans = Vec::new();
        let mut released = Released::new();
        for table in &truncate.tables {
            match self.session.plan_of_key(table).await {
                Ok(plan) => plans.push((Arc::clone(table), plan, true)),
                // Rows that came for it wait in quarantine.
                Err(TableError::Catalog(catalog::Error::Missing(..))) => {
                    released.extend(self.say_truncated(table, truncate, met)?.1);
                    for loss in lost_rows(table, &mut met.losses) {
                        loss.fill_standing(None);
                    }
                }
                // No row is found by its key, and none need be where none stays.
                Err(TableError::Mismatch(_)) => {
                    let plan = self.session.plan_of_here(table).await?;
                    plans.push((Arc::clone(table), plan, false));
                }
                // Nothing passes it: its rows would stay here for ever.
                Err(error) => return Err(error.into()),
            }
        }
        plans.sort_by(|a, b| a.1.table_sql.cmp(&b.1.table_sql));
        if plans.is_empty() {
            return Ok(released);
        }
        let names: Vec<&str> = plans.iter().map(|(_, plan, _)| plan.rows_sql.as_str()).collect();
        let lock_sql = format!("LOCK TABLE {} IN ACCESS EXCLUSIVE MODE", names.join(", "));
        self.session.client.batch_execute(&lock_sql).await?;
        self.pass_fence().await?;
        let mut emptied: Vec<&Plan> = Vec::new();
        for (table, plan, finds_rows) in &plans {
            let (survivors, overtaken) = self.say_truncated(table, truncate, met)?;
            released.extend(overtaken);
            if *finds_rows {
                self.fill_lost_rows(table, plan, &mut met.losses).await?;
            } else {
                for loss in lost_rows(table, &mut met.losses) {
                    loss.fill_standing(None);
                }
            }
            self.note_emptied(plan);
            if survivors.is_empty() {
                emptied.push(plan);
            } else if *finds_rows {
                self.delete_all_but(table, plan, &survivors).await?;
            } else if let Err(error) = self.session.plan_of_key(table).await {
                // Which rows stay is known by their keys alone.
                return Err(error.into());
            } else {
                return Err(Failure::Raced);
            }
        }
        self.empty(&emptied).await?;
        self.bring_back(truncate, met).await?;
        Ok(released)
    }

    /// Tells the resolver. What survives, and what it removes from the quarantine.
    fn say_truncated(
        &self,
        table: &Arc<TableDesc>,
        truncate: &Truncate,
        met: &mut Met,
    ) -> Result<(Vec<RowKey>, Released), Failure> {
        let mut resolver = lock(&self.shared.resolver);
        let id = resolver.table_id(table);
        let survivors = if met.stayed.contains_key(&id) {
            met.add_again(id, truncate, &mut resolver)?
        } else {
            let said = resolver.remote_truncate(id, truncate.version, &truncate.deps)?;
            met.add((id, table), said, truncate)
        };
        let overtaken = resolver.quarantined_below(id, truncate.version.stamp);
        let overtaken = overtaken.into_iter().map(|key| (Arc::clone(table), key));
        Ok((survivors, overtaken.collect()))
    }

    /// Writes the rows that show another version now.
    async fn bring_back(&mut self, truncate: &Truncate, met: &mut Met) -> Result<(), Failure> {
        met.losses.retain(|loss| !loss.is_of_one_try());
        for (table, key, version) in met.restored.clone() {
            let (table, row) = self.lookup.must(version, &table, &key)?;
            let action = Action::careful(table, key, Write::Put(row), version, Op::Insert);
            let refused = self.write_over(&action).await?;
            met.losses.extend(refused);
            self.brought_back.insert(action.key);
        }
        for (table, key) in met.folded.clone() {
            let action = self.folded(&to_fold(table, key, truncate)?, &mut met.losses)?;
            let refused = self.write_over(&action).await?;
            met.losses.extend(refused);
        }
        Ok(())
    }

    /// Writes a row of an emptied table, whatever of it is there: the table is locked, so nobody has come between. Lines, where it
    /// is refused.
    async fn write_over(&mut self, action: &Action) -> Result<Vec<Loss>, Failure> {
        let typed = self.with_types(std::slice::from_ref(action), true).await?;
        let action = typed.as_deref().and_then(<[Action]>::first).unwrap_or(action);
        if let Some(plan) = self.session.plan_if_fit(&action.table).await? {
            self.lock_rows(&plan, &[action]).await?;
        }
        self.write_rows(std::slice::from_ref(action)).await
    }

    async fn empty(&mut self, plans: &[&Plan]) -> Result<(), Failure> {
        if plans.is_empty() {
            return Ok(());
        }
        let tables: Vec<&str> = plans.iter().map(|plan| plan.rows_sql.as_str()).collect();
        self.session.client.batch_execute("SAVEPOINT truncating").await?;
        let truncated = self
            .session
            .client
            .batch_execute(&format!("TRUNCATE {}", tables.join(", ")))
            .await;
        match truncated.map_err(Failure::from) {
            Ok(()) => {
                self.session
                    .client
                    .batch_execute("RELEASE SAVEPOINT truncating")
                    .await?
            }
            Err(failure) if failure.is_transient() => return Err(failure),
            Err(failure) => {
                // A foreign key from a table that the origin did not truncate, or no privilege: the slow way.
                tracing::warn!(error = %failure, "truncate refused, deleting instead");
                self.session
                    .client
                    .batch_execute("ROLLBACK TO SAVEPOINT truncating; RELEASE SAVEPOINT truncating")
                    .await?;
                for plan in plans {
                    let table = &plan.rows_sql;
                    self.session
                        .client
                        .batch_execute(&format!("DELETE FROM {table}"))
                        .await?;
                    let left = format!("SELECT EXISTS (SELECT FROM {table})");
                    let left = self.session.client.query_one(left.as_str(), &[]).await?;
                    all_gone(&left, &plan.table_sql)?;
                }
            }
        }
        Ok(())
    }

    async fn delete_all_but(
        &mut self,
        table: &TableDesc,
        plan: &Plan,
        survivors: &[RowKey],
    ) -> Result<(), Failure> {
        let mut rows = plan.rows();
        for key in survivors {
            rows.push(&Source::Key(&table.image_of_canonical(key.canonical())?))?;
        }
        let (array, text) = rows.finish();
        // The session's plans go by indexes: each row of the table would be compared with each that stays.
        let scan = "SET LOCAL enable_hashjoin = on; SET LOCAL enable_seqscan = on; \
            SET LOCAL plan_cache_mode = force_custom_plan";
        self.session.client.batch_execute(scan).await?;
        let statement = self.session.prepare(&plan.delete_others).await?;
        let left = self.session.prepare(&plan.has_others).await?;
        let params = parameters(array, None, text);
        let params = references(&params);
        self.session.client.execute(&statement, &params).await?;
        let left = self.session.client.query_one(&left, &params).await?;
        all_gone(&left, &plan.table_sql)?;
        let by_index = "SET LOCAL enable_hashjoin = off; SET LOCAL enable_seqscan = off; \
            SET LOCAL plan_cache_mode = force_generic_plan";
        self.session.client.batch_execute(by_index).await?;
        Ok(())
    }

    /// Reads the rows that are lost, as long as they are there: once, as another try may find other rows in their place.
    async fn fill_lost_rows(
        &mut self,
        table: &Arc<TableDesc>,
        plan: &Plan,
        losses: &mut [Loss],
    ) -> Result<(), Failure> {
        let mut losses: Vec<&mut Loss> = lost_rows(table, losses).collect();
        if losses.is_empty() {
            return Ok(());
        }
        let mut rows = plan.rows();
        for loss in &losses {
            rows.push(&Source::Key(&table.image_of_canonical(loss.key.canonical())?))?;
        }
        let standing = self.read_array(plan, rows, self.mode == Mode::Cautious).await?;
        for (loss, row) in losses.iter_mut().zip(standing) {
            loss.fill_standing(row.as_ref());
        }
        Ok(())
    }
}

/// A trigger or rule can keep rows from being deleted, without an error: `left` tells whether any is.
fn all_gone(left: &tokio_postgres::Row, table: &str) -> Result<(), Failure> {
    if left.try_get(0)? {
        return Err(Failure::Unwritten(table.to_owned()));
    }
    Ok(())
}

/// Lines of a table's rows that a truncate removes and that are still to be read.
fn lost_rows<'l>(table: &'l Arc<TableDesc>, losses: &'l mut [Loss]) -> impl Iterator<Item = &'l mut Loss> {
    losses.iter_mut().filter(|loss| {
        loss.kind == ConflictType::TruncateConflict
            && Arc::ptr_eq(&loss.table, table)
            && matches!(loss.local_tuple, Tuple::Standing(_))
    })
}
