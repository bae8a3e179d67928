//! Rows that the server refuses: one by one, then quarantine.
//!
//! In:   a table's actions after one of its statements failed     Out: rows written, rows in quarantine
//! Invariants: 1. no refusal stops the stream; 2. a quarantined row is kept whole in `anabranch.quarantine`
//!        until it is written or a later version of it takes its place
//! Not here: rows of which another one has a unique value ([`super::collided`]), trying again later ([`super::quarantine`])

use std::sync::Arc;

use anabranch_conflict::{ConflictType, Resolution};
use anabranch_proto::Position;
use anabranch_proto::row::Cell;
use anabranch_proto::txn::{Change, ChangeBuffer, FrameBuilder, PutOp, TxnHeader};

use super::batch::{Action, Write};
use super::failure::Failure;
use super::loss::{KeyFrom, Loser, Loss, Lost, Refusal, Tuple};
use super::plan::Plan;
use super::write::{Group, Tried, Writer};
use crate::resolve::Quarantined;
use crate::shared::lock;

const QUARANTINE: &str = "INSERT INTO anabranch.quarantine AS q (schema_name, table_name, key_bytes, key, origin, \
    epoch, lsn, stamp, change, sqlstate, message, detail, first_at, last_at, attempts) \
    VALUES ($1, $2, $3, $4::text::jsonb, $5, $6, $7::text::pg_lsn, $8, $9, $10, $11, $12, \
    clock_timestamp(), clock_timestamp(), 1) \
    ON CONFLICT (schema_name, table_name, key_bytes) DO UPDATE SET origin = excluded.origin, \
    epoch = excluded.epoch, lsn = excluded.lsn, stamp = excluded.stamp, change = excluded.change, \
    sqlstate = excluded.sqlstate, message = excluded.message, detail = excluded.detail, \
    last_at = excluded.last_at, attempts = q.attempts + 1";

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
            self.make_room(plan, &actions).await?;
        }
        for (plan, action) in collided {
            match self.in_savepoint(plan, &[action]).await? {
                Ok(()) => {}
                Err(failure) => losses.extend(self.collide(plan, action, failure).await?),
            }
        }
        Ok(losses)
    }

    /// Deletes the rows of actions that are to be written again. Where a trigger does not let any of them go they stay: the
    /// server says of each whether it can be written.
    async fn make_room(&mut self, plan: &Plan, actions: &[&Action]) -> Result<(), Failure> {
        self.session.client.batch_execute("SAVEPOINT r").await?;
        let end = match self.run(plan, &plan.delete_unguarded, actions, false).await {
            Ok(_) => "RELEASE SAVEPOINT r",
            Err(failure) if failure.is_transient() => return Err(failure),
            Err(_) => "ROLLBACK TO SAVEPOINT r; RELEASE SAVEPOINT r",
        };
        Ok(self.session.client.batch_execute(end).await?)
    }

    /// Writes settled actions in a savepoint. The outer error is one that ends the transaction.
    pub(super) async fn in_savepoint(
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

    /// Actions of one description that the table here does not fit: rows that go, with how these are found, and the others. A row is found by
    /// its key, so it can go whatever its other columns are. Were it refused, it would stay here for good, as no node writes it
    /// again; and who updates it here, having met its deletion, would bring it back everywhere.
    pub(super) async fn split_unfit<'b>(
        &mut self,
        actions: Vec<&'b Action>,
    ) -> Result<(Option<Group<'b>>, Vec<&'b Action>), Failure> {
        let is_gone = |action: &&Action| matches!(action.write, Write::Delete(_));
        let (gone, mut others): (Vec<&Action>, Vec<&Action>) = actions.into_iter().partition(is_gone);
        let Some(first) = gone.first() else {
            return Ok((None, others));
        };
        match self
            .session
            .plan_of_key(&first.table)
            .await
            .map_err(Failure::from)
        {
            Ok(plan) => Ok((Some((plan, gone)), others)),
            // There is no such table, or its key is another one.
            Err(Failure::Table(_)) => {
                others.extend(gone);
                Ok((None, others))
            }
            Err(failure) => Err(failure),
        }
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
        let stamp = action.version.stamp;
        lock(&self.shared.resolver).quarantine(&action.table, &action.key, Quarantined { stamp, after })?;
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

/// Lines of rows that are written without values, whose columns their table here does not have: these are nowhere else here.
pub(super) fn without_columns(plan: &Plan, actions: &[&Action]) -> Vec<Loss> {
    let mut losses = Vec::new();
    for action in actions.iter().filter(|_| !plan.missing.is_empty()) {
        let Write::Put(row) = &action.write else { continue };
        let columns = action.table.columns.iter().zip(row.cells()).enumerate();
        let lost: Vec<String> = columns
            .filter(|(at, (_, cell))| {
                plan.missing.contains(at) && matches!(cell, Cell::Binary(_) | Cell::Text(_))
            })
            .map(|(_, (column, _))| column.name.clone())
            .collect();
        if lost.is_empty() {
            continue;
        }
        let refusal = Refusal {
            sqlstate: "42703".to_owned(),
            message: format!(
                "table {}.{} has no column {} on this node: the row was written without (ddl.missing_columns)",
                action.table.schema,
                action.table.name,
                lost.join(", ")
            ),
            detail: None,
            context: None,
            constraint: None,
            parents: None,
        };
        losses.push(Loss {
            is_decoded: false,
            lost_columns: Some(Lost {
                columns: Some(lost),
                left: None,
            }),
            ..refused(action, refusal)
        });
    }
    losses
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
        is_decoded: false,
        lost_columns: None,
        reason: None,
    }
}

pub(super) fn key_from(action: &Action) -> KeyFrom {
    match &action.write {
        Write::Put(row) => KeyFrom::Row(row.clone()),
        Write::Delete(key) => KeyFrom::Key(key.clone()),
    }
}

pub(super) fn image(action: &Action) -> Tuple {
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
