//! Rows that the server refuses since another row has a value of a secondary unique key.
//!
//! In:   an action that was refused so     Out: which of the rows are in the table; lines of those that are not
//! Invariants: 1. of two rows the one with the higher stamp stays; 2. a row goes only for one that is written;
//!        3. whoever looks for rows without their parents ([`super::orphans`]) knows which rows went
//! Not here: who yields by a key that the daemon can compare by ([`crate::resolve`], `claims`), rows that are refused for
//!        something else ([`super::refused`])
//!
//! Rows that yield a unique value to another one are known by the resolver, so what collides here is mostly a local commit that
//! it had not met. Where the daemon cannot compare by a key (some expressions and predicates, generated columns, types whose equal
//! values look different, tables whose policy is not last update wins) the rule is a simple one: of two rows that claim one value the one with
//! the higher stamp has it, the other goes to the conflict log whole. That is the same at every node where both stay as they are. Chains of
//! three can end differently at different nodes, and so can two of which the later one has given the value up by the time the other one comes.
//! So the policy has to accept it of a table (`crate::setup::pairwise`).

use std::sync::Arc;

use anabranch_conflict::{ConflictType, Op, Resolution, Version};
use anabranch_proto::row::{Cell, RowImage};
use anabranch_proto::wire::Reader;

use super::batch::{Action, Write};
use super::catalog::{UniqueIndex, UniquePart};
use super::failure::Failure;
use super::loss::{KeyFrom, Loser, Loss, Tuple};
use super::plan::{Plan, Source, quote};
use super::refused::{image, key_from};
use super::write::{Writer, parameters, push, references};
use crate::index::{Entry, RowKey};
use crate::shared::lock;

/// A row that has the value, locked.
struct Holder {
    /// Image of its key.
    key: RowImage,
}

/// What became of a row that collided.
enum Outcome {
    /// It is in the table. The lines of those that went for it.
    Written(Vec<Loss>),
    /// It stays away, for a write of this version; with its line, if it has none yet.
    Lost(Version, Vec<Loss>),
    Refused(Failure),
}

impl Writer<'_> {
    /// The server refuses `action`'s row. Where other rows hold unique values of it, those may have to go.
    pub(super) async fn collide(
        &mut self,
        plan: &Plan,
        action: &Action,
        failure: Failure,
    ) -> Result<Vec<Loss>, Failure> {
        self.session.client.batch_execute("SAVEPOINT c").await?;
        let outcome = self.contend(plan, action, failure).await?;
        let end = match outcome {
            Outcome::Written(_) => "RELEASE SAVEPOINT c",
            // What went for it is there again.
            _ => "ROLLBACK TO SAVEPOINT c; RELEASE SAVEPOINT c",
        };
        self.session.client.batch_execute(end).await?;
        match outcome {
            Outcome::Written(lines) => Ok(lines),
            Outcome::Lost(to, lines) => {
                // It was taken out to make room for others of its transaction, and does not come back.
                if self.locked.contains(&action.key) {
                    let key = action.table.image_of_canonical(action.key.canonical())?;
                    let gone = deletion(action, action.key.clone(), key, to);
                    self.note_touched(plan, &[&gone]).await?;
                }
                Ok(lines)
            }
            Outcome::Refused(failure) => Ok(vec![self.quarantine(action, &failure).await?]),
        }
    }

    /// Takes out one holder after the other, until the row is written or one of them stays.
    async fn contend(
        &mut self,
        plan: &Plan,
        action: &Action,
        mut failure: Failure,
    ) -> Result<Outcome, Failure> {
        let mut lines = Vec::new();
        let mut was_gone = false;
        // Each key has one holder at most; one more try is for a holder that went by itself.
        for _ in 0..=plan.local.unique.len() {
            let named = failure.unique_violation();
            let mut keys = plan.local.unique.iter();
            let Some(unique) = keys.find(|unique| named.as_ref() == Some(&unique.name)) else {
                break;
            };
            match self.holder(plan, action, unique).await {
                Ok(Some(holder)) => {
                    // The row is locked. Whoever committed before is known from here on.
                    self.fence.pass(self.shared).await?;
                    let (key, entry, waits) = {
                        let mut resolver = lock(&self.shared.resolver);
                        if !resolver.is_winner(&action.key, action.version.stamp, true)? {
                            // It yields itself, or a later write of it came: that has its line.
                            return Ok(Outcome::Lost(action.version, Vec::new()));
                        }
                        let key = resolver.key_of_image(&action.table, &holder.key)?;
                        let entry = resolver.current(&key)?;
                        resolver.touch(&key);
                        // What stands there is not the version that waits.
                        let of_key = resolver.quarantined().get(&key).copied();
                        let waits = of_key
                            .is_some_and(|row| entry.is_none_or(|entry| entry.version.stamp == row.stamp));
                        (key, entry, waits)
                    };
                    let (image, version) = match entry.filter(|entry| !entry.is_there()) {
                        Some(entry) => (holder.key, entry.version),
                        // What is to take its place waits itself, and has its line.
                        None if waits => (holder.key, action.version),
                        None => {
                            let image = holder.key.clone();
                            let version = entry.map(|entry| entry.version);
                            let shown = self.show_holder(plan, &holder, version).await?;
                            let line = line(action, (key.clone(), entry), (holder, shown), &failure);
                            if line.loser == Loser::Remote {
                                let to = entry.map_or(action.version, |entry| entry.version);
                                return Ok(Outcome::Lost(to, vec![line]));
                            }
                            lines.push(line);
                            (image, action.version)
                        }
                    };
                    let gone = deletion(action, key, image, version);
                    match self.run(plan, &plan.delete_unguarded, &[&gone], false).await {
                        Ok(_) => {}
                        Err(failure) if failure.is_transient() => return Err(failure),
                        // A trigger of the table, say.
                        Err(failure) => return Ok(Outcome::Refused(failure)),
                    }
                }
                Ok(None) if was_gone => break,
                Ok(None) => was_gone = true,
                Err(failure) if failure.is_transient() => return Err(failure),
                Err(error) => {
                    tracing::warn!(
                        index = unique.name,
                        %error,
                        "the row that has a unique value cannot be looked for"
                    );
                    break;
                }
            }
            match self.in_savepoint(plan, &[action]).await? {
                Ok(()) => return Ok(Outcome::Written(lines)),
                Err(next) => failure = next,
            }
        }
        Ok(Outcome::Refused(failure))
    }

    /// The row that has the value of `action`'s row in this key.
    async fn holder(
        &mut self,
        plan: &Plan,
        action: &Action,
        unique: &UniqueIndex,
    ) -> Result<Option<Holder>, Failure> {
        let mut same: Vec<String> = unique
            .parts
            .iter()
            .map(|part| equal(part, plan, unique.nulls_distinct))
            .collect();
        same.extend(unique.predicate.iter().map(|predicate| format!("({predicate})")));
        // Each key column in its own binary form, by way of its send function: what `record_send` does.
        let keys = plan.local.key.iter();
        let keys: Vec<String> = keys
            .filter_map(|at| plan.local.columns.get(*at))
            .map(|column| format!("t.{}", quote(&column.name)))
            .collect();
        let sql = format!(
            "SELECT record_send(ROW({})) FROM {table} AS t WHERE {} FOR UPDATE OF t LIMIT 1",
            keys.join(", "),
            same.join(" AND "),
            table = plan.rows_sql
        );
        let mut rows = plan.rows();
        push(&mut rows, &action.write)?;
        let (array, text) = rows.finish();
        let statement = self.session.prepare(&sql).await?;
        let params = parameters(array, None, text);
        let Some(row) = self
            .session
            .client
            .query_opt(&statement, &references(&params))
            .await?
        else {
            return Ok(None);
        };
        let record: Vec<u8> = row.try_get(0)?;
        let mut from = Reader::new(&record);
        let count = from.u32()?;
        let mut values = Vec::new();
        for _ in 0..count {
            from.u32()?;
            values.push(from.bytes()?);
        }
        Ok(Some(Holder {
            key: RowImage::build(values.iter().map(|value| Cell::Binary(value))),
        }))
    }

    /// What a line shows of the row that has the value.
    async fn show_holder(
        &mut self,
        plan: &Plan,
        holder: &Holder,
        version: Option<Version>,
    ) -> Result<Tuple, Failure> {
        let mut rows = plan.rows();
        rows.push(&Source::Key(&holder.key))?;
        let mut read = self.read_array(plan, rows, true).await?;
        let row = read.pop().flatten();
        Ok(row.map_or(Tuple::None, |row| row.tuple(version)))
    }
}

/// Has a row of the table this part of the new row's value, as the index sees it?
fn equal(part: &UniquePart, plan: &Plan, nulls_distinct: bool) -> String {
    let UniquePart {
        sql,
        cast,
        equal,
        collate,
    } = part;
    // Parts name the table's columns without saying whose: those of the innermost query, the new row's or the table's. The
    // collation stands at the new row's, so that the table's is what the index has.
    let theirs = format!("(({sql}){cast})");
    let ours = format!("(SELECT ({sql}){cast} FROM {})", plan.as_rows());
    let same = format!("{theirs} {equal} ({ours}{collate})");
    if nulls_distinct {
        same
    } else {
        format!("({same} OR {theirs} IS NOT DISTINCT FROM NULL AND {ours} IS NOT DISTINCT FROM NULL)")
    }
}

/// A row of `action`'s table that goes, for a write of this version.
fn deletion(action: &Action, key: RowKey, image: RowImage, version: Version) -> Action {
    Action::careful(
        Arc::clone(&action.table),
        key,
        Write::Delete(image),
        version,
        Op::Delete,
    )
}

/// The line of one of two rows that should both be in the table, by all that is known, and have one value: a key that the daemon
/// cannot compare by, or a row that is in quarantine where the other one was written. The higher stamp has it.
fn line(
    action: &Action,
    (holder_key, entry): (RowKey, Option<Entry>),
    (holder, shown): (Holder, Tuple),
    failure: &Failure,
) -> Loss {
    // Of what is forgotten it is known that all have it, so a write that comes in is later; unless it has waited in quarantine:
    // had it been later, the other row had gone when it came.
    let is_first = match entry {
        Some(entry) => action.version.stamp > entry.version.stamp,
        None => !action.again,
    };
    let (key, key_from, resolution, loser) = if is_first {
        let from = KeyFrom::Key(holder.key);
        (holder_key, from, Resolution::ApplyRemote, Loser::Local)
    } else {
        let from = key_from(action);
        (action.key.clone(), from, Resolution::KeepLocal, Loser::Remote)
    };
    Loss {
        table: Arc::clone(&action.table),
        key,
        key_from,
        kind: ConflictType::MultipleUniqueConflicts,
        resolution,
        loser,
        local: entry.map(|entry| entry.version),
        remote: Some(action.version),
        local_tuple: shown,
        remote_tuple: image(action),
        refusal: Some(failure.refusal()),
        is_decoded: false,
        lost_columns: None,
        reason: None,
    }
}
