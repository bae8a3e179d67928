//! Rows that the server refuses: one by one, then quarantine; and secondary unique keys that collide.
//!
//! In:   a table's actions after one of its statements failed     Out: rows written, rows in quarantine
//! Invariants: 1. no refusal stops the stream; 2. a quarantined row is kept whole in `anabranch.quarantine`
//!        until it is written or a later version of it takes its place
//! Not here: trying again later ([`super::quarantine`])
//!
//! Rows that yield a unique value to another one are known by the resolver ([`crate::resolve`], `claims`), so what collides
//! here is mostly a local commit that it had not met. Where the daemon cannot compare by a key (some expressions and predicates,
//! types whose equal values look different, tables whose policy is not last update wins) the rule is a simple one: of two
//! rows that claim one value the one with the higher stamp has it, the other goes to the conflict log whole. It is the
//! same at every node for two rows; chains of three can end differently at different nodes.

use std::sync::Arc;

use anabranch_conflict::{ConflictType, Resolution};
use anabranch_proto::Position;
use anabranch_proto::row::{Cell, RowImage};
use anabranch_proto::stamp::Stamp;
use anabranch_proto::txn::{Change, ChangeBuffer, FrameBuilder, PutOp, TxnHeader};

use super::batch::{Action, Write};
use super::catalog::UniqueIndex;
use super::failure::Failure;
use super::loss::{KeyFrom, Loser, Loss, Refusal, Tuple};
use super::plan::{Plan, quote};
use super::write::{Group, Tried, Writer, parameters, push, references};
use crate::index::{Entry, RowKey};
use crate::shared::lock;

const QUARANTINE: &str = "INSERT INTO anabranch.quarantine AS q (schema_name, table_name, key_bytes, key, origin, \
    epoch, lsn, stamp, change, sqlstate, message, detail, first_at, last_at, attempts) \
    VALUES ($1, $2, $3, $4::text::jsonb, $5, $6, $7::text::pg_lsn, $8, $9, $10, $11, $12, \
    clock_timestamp(), clock_timestamp(), 1) \
    ON CONFLICT (schema_name, table_name, key_bytes) DO UPDATE SET origin = excluded.origin, \
    epoch = excluded.epoch, lsn = excluded.lsn, stamp = excluded.stamp, change = excluded.change, \
    sqlstate = excluded.sqlstate, message = excluded.message, detail = excluded.detail, \
    last_at = excluded.last_at, attempts = q.attempts + 1";

/// A row that holds a value: its key's image, its JSON, and the statement that removes it.
type Held = (RowImage, String, String);

impl Writer<'_> {
    /// Writes a table's actions one by one. What is refused goes to quarantine, and comes back as log lines.
    pub(crate) async fn row_by_row(&mut self, groups: &[Group<'_>]) -> Result<Vec<Loss>, Failure> {
        let (mut deletes, mut puts) = (Vec::new(), Vec::new());
        // The locks of a first try went with its savepoint.
        self.locked.clear();
        for (plan, actions) in groups {
            for action in self.settle(plan, actions, Tried::No).await? {
                match action.write {
                    Write::Delete(_) => deletes.push((&**plan, action)),
                    Write::Put(_) => puts.push((&**plan, action)),
                }
            }
        }
        let mut losses = Vec::new();
        for (plan, action) in deletes {
            if let Err(failure) = self.in_savepoint(plan, &[action]).await? {
                losses.push(self.quarantine(action, &failure).await?);
            }
        }
        let mut collided = Vec::new();
        for (plan, action) in puts {
            match self.in_savepoint(plan, &[action]).await? {
                Ok(()) => {}
                Err(failure) if failure.unique_violation().is_some() => collided.push((plan, action)),
                Err(failure) => losses.push(self.quarantine(action, &failure).await?),
            }
        }
        // Rows of one transaction may swap a value: out with all of them, then in again.
        for some in collided.chunk_by(|a, b| std::ptr::eq(a.0, b.0)) {
            let Some(&(plan, _)) = some.first() else { continue };
            let of_some = some.iter().map(|of| of.1);
            let actions: Vec<&Action> = of_some
                .filter(|action| self.locked.contains(&action.key))
                .collect();
            self.run(plan, &plan.delete_unguarded, &actions, false).await?;
        }
        for (plan, action) in collided {
            match self.in_savepoint(plan, &[action]).await? {
                Ok(()) => {}
                Err(failure) => losses.extend(self.collide(plan, action, failure).await?),
            }
        }
        Ok(losses)
    }

    /// Writes settled actions in a savepoint. The outer error is one that ends the transaction.
    async fn in_savepoint(
        &mut self,
        plan: &Plan,
        actions: &[&Action],
    ) -> Result<Result<(), Failure>, Failure> {
        self.session.client.batch_execute("SAVEPOINT r").await?;
        match self.force(plan, actions).await {
            Ok(()) => {
                self.session.client.batch_execute("RELEASE SAVEPOINT r").await?;
                Ok(Ok(()))
            }
            Err(failure) if failure.is_transient() => Err(failure),
            Err(failure) => {
                self.session
                    .client
                    .batch_execute("ROLLBACK TO SAVEPOINT r; RELEASE SAVEPOINT r")
                    .await?;
                Ok(Err(failure))
            }
        }
    }

    /// The server refuses `action`'s row. Where another row holds a unique value of it, that may be one which has to go:
    /// a local commit that was not decoded when this row was resolved.
    async fn collide(
        &mut self,
        plan: &Plan,
        action: &Action,
        mut failure: Failure,
    ) -> Result<Option<Loss>, Failure> {
        for _ in 0..=plan.local.unique.len() {
            let named = failure.unique_violation();
            let unique = plan
                .local
                .unique
                .iter()
                .find(|unique| named.as_ref().is_some_and(|name| *name == unique.name));
            let Some(unique) = unique else { break };
            let Some(held) = self.holder(plan, action, unique).await? else {
                break;
            };
            // The row is locked. Whoever committed before is known from here on.
            self.fence.pass(self.shared).await?;
            let (key, entry) = {
                let mut resolver = lock(&self.shared.resolver);
                if !resolver.is_winner(&action.key, action.version.stamp, true)? {
                    // It yields itself, or a later write of it came: that has its line.
                    return Ok(None);
                }
                let key = resolver.key_of_image(&action.table, &held.0)?;
                let entry = resolver.current(&key)?;
                resolver.touch(&key);
                (key, entry)
            };
            if entry.is_none_or(|entry| entry.is_there()) {
                return self
                    .by_stamp(plan, action, (key, entry), held, &failure)
                    .await
                    .map(Some);
            }
            self.session.client.batch_execute(&held.2).await?;
            match self.in_savepoint(plan, &[action]).await? {
                Ok(()) => return Ok(None),
                Err(next) => failure = next,
            }
        }
        self.quarantine(action, &failure).await.map(Some)
    }

    /// Both rows should be in the table, by all that is known, and have one value: a key that the daemon cannot compare
    /// by, or a row that is in quarantine where the other one was written. The higher stamp has it.
    async fn by_stamp(
        &mut self,
        plan: &Plan,
        action: &Action,
        holder: (RowKey, Option<Entry>),
        (holder_key, holder_json, evict): Held,
        failure: &Failure,
    ) -> Result<Loss, Failure> {
        let holder_stamp = holder.1.map_or(Stamp::ZERO, |entry| entry.version.stamp);
        if action.version.stamp > holder_stamp {
            self.session.client.batch_execute("SAVEPOINT r").await?;
            self.session.client.batch_execute(&evict).await?;
            if let Err(failure) = self.force(plan, &[action]).await {
                if failure.is_transient() {
                    return Err(failure);
                }
                self.session
                    .client
                    .batch_execute("ROLLBACK TO SAVEPOINT r; RELEASE SAVEPOINT r")
                    .await?;
                return self.quarantine(action, &failure).await;
            }
            self.session.client.batch_execute("RELEASE SAVEPOINT r").await?;
            return Ok(Loss {
                table: Arc::clone(&action.table),
                key: holder.0,
                key_from: KeyFrom::Key(holder_key),
                kind: ConflictType::MultipleUniqueConflicts,
                resolution: Resolution::ApplyRemote,
                loser: Loser::Local,
                local: holder.1.map(|entry| entry.version),
                remote: Some(action.version),
                local_tuple: Tuple::Json(holder_json),
                remote_tuple: image(action),
                refusal: Some(failure.refusal()),
                lost_columns: None,
                reason: None,
            });
        }
        Ok(Loss {
            table: Arc::clone(&action.table),
            key: action.key.clone(),
            key_from: key_from(action),
            kind: ConflictType::MultipleUniqueConflicts,
            resolution: Resolution::KeepLocal,
            loser: Loser::Remote,
            local: holder.1.map(|entry| entry.version),
            remote: Some(action.version),
            local_tuple: Tuple::Json(holder_json),
            remote_tuple: image(action),
            refusal: Some(failure.refusal()),
            lost_columns: None,
            reason: None,
        })
    }

    /// The row that holds the value: key image, JSON, and the statement that removes it.
    async fn holder(
        &mut self,
        plan: &Plan,
        action: &Action,
        unique: &UniqueIndex,
    ) -> Result<Option<Held>, Failure> {
        let name = |at: &usize| {
            plan.local
                .columns
                .get(*at)
                .map(|column| quote(&column.name))
                .unwrap_or_default()
        };
        // Parts name the table's columns without saying whose: those of the innermost query, the new row's or the table's.
        let new_row = format!("FROM unnest($1::{}[])", plan.table_sql);
        let equal = if unique.nulls_distinct {
            "="
        } else {
            "IS NOT DISTINCT FROM"
        };
        let mut same: Vec<String> = unique
            .parts
            .iter()
            .map(|part| format!("({part}) {equal} (SELECT {part} {new_row})"))
            .collect();
        same.extend(unique.predicate.iter().map(|predicate| format!("({predicate})")));
        // Each key column in its own binary form, by way of its send function: what `record_send` does.
        let keys: Vec<String> = plan
            .local
            .key
            .iter()
            .map(|at| format!("t.{}", name(at)))
            .collect();
        let sql = format!(
            "SELECT t.ctid::text, t.tableoid::regclass::text, to_jsonb(t.*)::text, record_send(ROW({})) \
             FROM {table} AS t WHERE {} FOR UPDATE OF t LIMIT 1",
            keys.join(", "),
            same.join(" AND "),
            table = plan.table_sql
        );
        let mut rows = plan.rows();
        push(&mut rows, &action.write)?;
        let (array, _) = rows.finish();
        let statement = self.session.prepare(&sql).await?;
        let params = parameters(array, None, Vec::new());
        let Some(row) = self
            .session
            .client
            .query_opt(&statement, &references(&params))
            .await?
        else {
            return Ok(None);
        };
        let (ctid, relation): (String, String) = (row.try_get(0)?, row.try_get(1)?);
        let record: Vec<u8> = row.try_get(3)?;
        let mut from = anabranch_proto::wire::Reader::new(&record);
        let count = from.u32()?;
        let mut values = Vec::new();
        for _ in 0..count {
            from.u32()?;
            values.push(from.bytes()?);
        }
        let key = RowImage::build(values.iter().map(|value| Cell::Binary(value)));
        let evict = format!("DELETE FROM {relation} WHERE ctid = '{ctid}'");
        Ok(Some((key, row.try_get(2)?, evict)))
    }

    /// Refuses all actions of a table that cannot be written at all.
    pub(crate) async fn refuse_table(
        &mut self,
        actions: &[&Action],
        failure: &Failure,
    ) -> Result<Vec<Loss>, Failure> {
        let mut losses = Vec::with_capacity(actions.len());
        for action in actions {
            losses.push(self.quarantine(action, failure).await?);
        }
        Ok(losses)
    }

    /// Puts an action's row into quarantine.
    pub(crate) async fn quarantine(&mut self, action: &Action, failure: &Failure) -> Result<Loss, Failure> {
        let refusal = failure.refusal();
        tracing::error!(
            table = %format!("{}.{}", action.table.schema, action.table.name),
            sqlstate = %refusal.sqlstate,
            error = %refusal.message,
            "row refused and put into quarantine"
        );
        let key_json = {
            let key = action.table.image_of_canonical(action.key.canonical())?;
            self.render_key(&action.table, &key).await?
        };
        // The commits that hold it are among those that are decoded.
        let after = match failure {
            Failure::Held => self.shared.last_decoded(),
            _ => Position::ZERO,
        };
        // Before it is in the table: a local write that is decoded from here on overtakes it.
        lock(&self.shared.resolver).quarantine(&action.key, after);
        let statement = self.session.prepare(QUARANTINE).await?;
        let position = action.version.position;
        let stamp = action.version.stamp.to_bytes();
        let change = stored_change(action);
        self.session
            .client
            .execute(
                &statement,
                &[
                    &action.table.schema,
                    &action.table.name,
                    &action.key.canonical(),
                    &key_json,
                    &i32::from(action.version.origin().0),
                    &i64::from(position.epoch),
                    &position.lsn.to_string(),
                    &stamp.as_slice(),
                    &change.as_ref(),
                    &refusal.sqlstate,
                    &refusal.message,
                    &refusal.detail,
                ],
            )
            .await?;
        Ok(refused(action, refusal))
    }
}

fn refused(action: &Action, refusal: Refusal) -> Loss {
    let kind = match refusal.sqlstate.as_str() {
        "23514" | "23502" => ConflictType::CheckViolation,
        "23P01" => ConflictType::ExclusionViolation,
        "42P01" => ConflictType::TableMissing,
        "42703" => ConflictType::ColumnMissing,
        _ => ConflictType::ApplyError,
    };
    Loss {
        table: Arc::clone(&action.table),
        key: action.key.clone(),
        key_from: key_from(action),
        kind,
        resolution: Resolution::Skip,
        loser: Loser::Remote,
        local: None,
        remote: Some(action.version),
        local_tuple: Tuple::None,
        remote_tuple: image(action),
        refusal: Some(refusal),
        lost_columns: None,
        reason: None,
    }
}

fn key_from(action: &Action) -> KeyFrom {
    match &action.write {
        Write::Put(row) => KeyFrom::Row(row.clone()),
        Write::Delete(key) => KeyFrom::Key(key.clone()),
    }
}

fn image(action: &Action) -> Tuple {
    match &action.write {
        Write::Put(row) => Tuple::Image(Arc::clone(&action.table), row.clone()),
        Write::Delete(_) => Tuple::None,
    }
}

/// The change as a frame payload of one transaction, table description included.
fn stored_change(action: &Action) -> bytes::Bytes {
    let change = match &action.write {
        Write::Put(row) => Change::Put {
            table: Arc::clone(&action.table),
            op: PutOp::Update,
            row: row.clone(),
            old_key: None,
            former: None,
        },
        Write::Delete(key) => Change::Delete {
            table: Arc::clone(&action.table),
            key: key.clone(),
        },
    };
    let mut frame = FrameBuilder::default();
    let buffer: &mut ChangeBuffer = frame.changes();
    buffer.push(&change);
    frame.end_txn(&TxnHeader {
        position: action.version.position,
        stamp: action.version.stamp,
        deps: anabranch_proto::Vector::new(),
        xid: 0,
        commit_us: 0,
        witness_us: 0,
        change_count: 1,
    });
    frame.finish()
}
