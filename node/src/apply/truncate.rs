//! A remote TRUNCATE: a version of the whole table.
//!
//! In:   the truncate, between the actions before and after it      Out: emptied tables, lost rows to log
//! Invariants: the tables are locked and everything before the lock is decoded before survivors are looked up
//! Not here: which rows survive (`anabranch-conflict`), local truncates (capture)

use std::sync::Arc;

use anabranch_conflict::{ConflictType, Kind, Op, Resolution, Version};
use anabranch_proto::schema::TableDesc;

use super::batch::{Action, Truncate, Write};
use super::failure::Failure;
use super::loss::{KeyFrom, Loser, Loss, Tuple};
use super::plan::{Plan, Source};
use super::write::{Writer, parameters, references};
use crate::index::RowKey;
use crate::resolve::Truncated;
use crate::shared::lock;

impl Writer<'_> {
    /// Empties the tables of `truncate`, and keeps the rows that are concurrent and newer.
    pub(crate) async fn truncate(&mut self, truncate: &Truncate) -> Result<Vec<Loss>, Failure> {
        let mut plans = Vec::new();
        for table in &truncate.tables {
            match self.session.plan(table).await {
                Ok(plan) => plans.push((Arc::clone(table), plan)),
                Err(error) => {
                    let failure = Failure::from(error);
                    if failure.is_transient() {
                        return Err(failure);
                    }
                    tracing::error!(table = %table.name, error = %failure, "truncate of a table that cannot be written");
                }
            }
        }
        plans.sort_by(|a, b| a.1.table_sql.cmp(&b.1.table_sql));
        if plans.is_empty() {
            return Ok(Vec::new());
        }
        let names: Vec<&str> = plans.iter().map(|(_, plan)| plan.table_sql.as_str()).collect();
        let lock_sql = format!("LOCK TABLE {} IN ACCESS EXCLUSIVE MODE", names.join(", "));
        self.session.client.batch_execute(&lock_sql).await?;
        self.fence.pass(self.shared).await?;
        let (mut losses, mut emptied, mut comebacks) = (Vec::new(), Vec::new(), Vec::new());
        let mut again = Vec::new();
        for (table, plan) in &plans {
            let Truncated {
                survivors,
                lost,
                restored,
                folded,
            } = {
                let mut resolver = lock(&self.shared.resolver);
                let id = resolver.table_id(table);
                resolver.remote_truncate(id, truncate.version, &truncate.deps)?
            };
            losses.extend(self.lost_rows(table, plan, lost, truncate).await?);
            comebacks.extend(restored.into_iter().map(|row| (table, row)));
            again.extend(folded.into_iter().map(|key| (table, key)));
            self.note_emptied(plan);
            if survivors.is_empty() {
                emptied.push(plan.table_sql.as_str());
            } else {
                self.delete_all_but(table, plan, &survivors).await?;
            }
        }
        self.empty(&emptied, truncate.restart_identity).await?;
        for (table, (key, version)) in comebacks {
            let (table, row) = self.lookup.must(version, table, &key)?;
            let plan = self.session.plan(&table).await?;
            let action = Action::careful(table, key, Write::Put(row), version, Op::Insert);
            self.lock_rows(&plan, &[&action]).await?;
            self.force(&plan, &[&action]).await?;
            self.brought_back.insert(action.key);
        }
        for (table, key) in again {
            let write = Write::Delete(table.image_of_canonical(key.canonical())?);
            let version = Version {
                stamp: truncate.version.stamp,
                position: truncate.version.position,
                kind: Kind::Delete,
            };
            let mut action = Action::careful(Arc::clone(table), key, write, version, Op::Delete);
            // A script may choose otherwise among what is left.
            action.folds.push(version.stamp);
            let action = self.folded(&action, &mut losses)?;
            losses.extend(self.write_rows(&[action]).await?);
        }
        Ok(losses)
    }

    async fn empty(&mut self, tables: &[&str], restart_identity: bool) -> Result<(), Failure> {
        if tables.is_empty() {
            return Ok(());
        }
        let restart = if restart_identity { " RESTART IDENTITY" } else { "" };
        self.session.client.batch_execute("SAVEPOINT truncating").await?;
        let truncated = self
            .session
            .client
            .batch_execute(&format!("TRUNCATE {}{restart}", tables.join(", ")))
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
                for table in tables {
                    self.session
                        .client
                        .batch_execute(&format!("DELETE FROM {table}"))
                        .await?;
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
        let statement = self.session.prepare(&plan.delete_others).await?;
        let params = parameters(array, None, text);
        self.session
            .client
            .execute(&statement, &references(&params))
            .await?;
        Ok(())
    }

    async fn lost_rows(
        &mut self,
        table: &Arc<TableDesc>,
        plan: &Plan,
        lost: Vec<(RowKey, crate::index::Entry)>,
        truncate: &Truncate,
    ) -> Result<Vec<Loss>, Failure> {
        if lost.is_empty() {
            return Ok(Vec::new());
        }
        let mut rows = plan.rows();
        for (key, _) in &lost {
            rows.push(&Source::Key(&table.image_of_canonical(key.canonical())?))?;
        }
        let standing = self.lock_array(plan, rows).await?;
        let version = Version {
            stamp: truncate.version.stamp,
            position: truncate.version.position,
            kind: Kind::Delete,
        };
        let losses = lost.into_iter().zip(standing).map(|((key, entry), row)| Loss {
            table: Arc::clone(table),
            key,
            key_from: KeyFrom::Canonical,
            kind: ConflictType::TruncateConflict,
            resolution: Resolution::ApplyRemote,
            loser: Loser::Local,
            local: Some(entry.version),
            remote: Some(version),
            local_tuple: row.map_or(Tuple::None, |row| Tuple::Json(row.json)),
            remote_tuple: Tuple::None,
            refusal: None,
            lost_columns: None,
            reason: None,
        });
        Ok(losses.collect())
    }
}
