//! The conflict log: lines into `anabranch.conflict_history`, in the apply transaction.
//!
//! In:   [`Loss`]es, their standing rows read        Out: rows of the log, one per losing version
//! Holds: the budget of lines, and that of lines that are written once more
//! Invariants: 1. a line's id is made of table, key and losing version, so it is the same on every node, and a
//!        line that is there already stays as it is, but for columns that its version has lost since, and where it has won since and is refused;
//!        2. what is not written as a line is counted in
//!        `anabranch.conflict_storm`, in the same transaction, and what has a line is not, nor does it take another one's place in the budget;
//!        3. a refused row always has its line; 4. that a loss was told before is known by its line alone
//! Not here: deciding who lost ([`super::batch`], `crate::resolve`), reading the log (`crate::review`)

mod budget;
mod line;
mod render;

use std::collections::{HashMap, HashSet};

use anabranch_conflict::Resolution;

use super::failure::Failure;
use super::loss::{Counts, Loss};
use super::write::Writer;
use crate::config::ConflictLog;
use crate::shared::Counters;
use budget::Budget;

pub(crate) use render::raw_json;

const INSERT: &str = "INSERT INTO anabranch.conflict_history (conflict_id, lost_at, node, node_id, schema_name, table_name, \
    key, conflict_type, policy, policy_version, conflict_resolution, loser, local_tuple, remote_tuple, applied_tuple, \
    changed_columns, lost_columns, redacted_columns, \
    local_origin, local_xid, local_lsn, local_commit_time, local_stamp, local_saw, \
    remote_origin, remote_xid, remote_lsn, remote_commit_time, remote_stamp, remote_saw, \
    transaction_group, apply_xid, constraint_name, error) \
    SELECT r.conflict_id, to_timestamp(r.lost_us / 1000000.0), r.node, r.node_id, r.schema_name, r.table_name, \
    r.key, r.conflict_type, r.policy, r.policy_version, r.conflict_resolution, r.loser, r.local_tuple, r.remote_tuple, \
    CASE r.applied WHEN 'local' THEN r.local_tuple WHEN 'remote' THEN r.remote_tuple ELSE r.applied_tuple END, r.changed_columns, r.lost_columns, r.redacted_columns, \
    r.local_origin, r.local_xid, r.local_lsn, to_timestamp(r.local_us / 1000000.0), r.local_stamp, r.local_saw, \
    r.remote_origin, r.remote_xid, r.remote_lsn, to_timestamp(r.remote_us / 1000000.0), r.remote_stamp, r.remote_saw, \
    r.transaction_group, r.apply_xid, r.constraint_name, r.error \
    FROM jsonb_to_recordset($1::text::jsonb) AS r(conflict_id uuid, lost_us numeric, node text, node_id int, \
    schema_name text, table_name text, key jsonb, conflict_type text, policy text, policy_version text, \
    conflict_resolution text, loser text, local_tuple jsonb, remote_tuple jsonb, applied text, applied_tuple jsonb, \
    changed_columns text[], lost_columns text[], redacted_columns text[], local_origin int, local_xid int8, \
    local_lsn pg_lsn, local_us numeric, local_stamp text, local_saw pg_lsn, remote_origin int, remote_xid int8, \
    remote_lsn pg_lsn, remote_us numeric, remote_stamp text, remote_saw pg_lsn, transaction_group text, \
    apply_xid int8, constraint_name text, error jsonb) \
    ON CONFLICT (conflict_id, lost_at) DO NOTHING";

/// Lines of refused rows whose version is now known to have lost: that is what the log has to say of it.
const REPLACED: &str = "DELETE FROM anabranch.conflict_history h \
    USING jsonb_to_recordset($1::text::jsonb) AS r(conflict_id uuid, lost_us numeric, conflict_resolution text) \
    WHERE h.conflict_id = r.conflict_id AND h.lost_at = to_timestamp(r.lost_us / 1000000.0) \
    AND h.conflict_resolution = 'skip' AND r.conflict_resolution <> 'skip' AND h.status <> 'replayed'";

/// Lines of versions that had lost, and have won since over what came over their winner, and that the server refuses: that they wait is
/// what the log has to say of them.
const KEPT_OUT: &str = "DELETE FROM anabranch.conflict_history h \
    USING jsonb_to_recordset($1::text::jsonb) AS r(conflict_id uuid, lost_us numeric, kept_out boolean) \
    WHERE h.conflict_id = r.conflict_id AND h.lost_at = to_timestamp(r.lost_us / 1000000.0) \
    AND r.kept_out AND h.conflict_resolution IN ('apply_remote', 'keep_local') AND h.status <> 'replayed'";

/// Lines of own versions that lost while only part of their transaction was decoded (a DELETE of the row, and not yet the INSERT behind
/// it), if nobody has looked at them: what the rest of it made of the row is what was lost.
const DECODED_ON: &str = "DELETE FROM anabranch.conflict_history h \
    USING jsonb_to_recordset($1::text::jsonb) AS r(conflict_id uuid, lost_us numeric, decoded text, local_tuple jsonb) \
    WHERE h.conflict_id = r.conflict_id AND h.lost_at = to_timestamp(r.lost_us / 1000000.0) \
    AND h.loser = 'local' AND h.status = 'new' AND CASE r.decoded \
    WHEN 'row' THEN h.local_tuple IS NULL AND r.local_tuple IS NOT NULL \
    WHEN 'gone' THEN h.local_tuple IS NOT NULL ELSE false END";

/// A version that has lost more columns since its line was written, if nobody has looked at that: it lost them all, whatever
/// the order in which it met the others.
const LOST_MORE: &str = "UPDATE anabranch.conflict_history h SET lost_columns = r.lost_columns \
    || ARRAY(SELECT c FROM unnest(h.lost_columns) AS c WHERE c <> ALL (r.lost_columns)), applied_tuple = r.applied_tuple, \
    error = coalesce(h.error, r.error) \
    FROM jsonb_to_recordset($1::text::jsonb) AS r(conflict_id uuid, lost_us numeric, conflict_resolution text, \
    lost_columns text[], applied_tuple jsonb, error jsonb) \
    WHERE h.conflict_id = r.conflict_id AND h.lost_at = to_timestamp(r.lost_us / 1000000.0) \
    AND h.conflict_resolution = 'merge' AND r.conflict_resolution = 'merge' AND h.status = 'new' \
    AND NOT h.lost_columns @> r.lost_columns";

/// Which of these lines are there, and their resolutions. Each is looked up by itself, however many they are: a join could go through the
/// whole log.
const KNOWN: &str = "SELECT r.conflict_id::text, h.conflict_resolution \
    FROM unnest($1::text[]::uuid[], $2::int8[]) AS r(conflict_id, lost_us), \
    LATERAL (SELECT h.conflict_resolution FROM anabranch.conflict_history h \
    WHERE h.conflict_id = r.conflict_id AND h.lost_at = to_timestamp(r.lost_us / 1000000.0) LIMIT 1) AS h";

const COUNT: &str = "INSERT INTO anabranch.conflict_storm AS s (minute, schema_name, table_name, conflict_type, \
    losing_origin, winning_origin, count) \
    SELECT date_trunc('minute', clock_timestamp()), $1, $2, $3, $4, $5, $6 \
    ON CONFLICT (minute, schema_name, table_name, conflict_type, losing_origin, winning_origin) \
    DO UPDATE SET count = s.count + excluded.count";

/// Lines that are rendered at once.
const LINES: usize = 256;

/// Bytes of rows that are rendered, and of JSON that are inserted, at once, but for one line: the server takes 256 MiB as one value.
const LINES_BYTES: usize = 8 << 20;

/// What the log may take.
#[derive(Debug)]
pub(crate) struct Ledger {
    config: ConflictLog,
    budget: Budget,
    /// Of lines that are there already when they are written: a row that is written all the time has the same losers each time. As many
    /// a second as new ones, and no burst.
    there: Budget,
}

impl Ledger {
    pub(crate) fn new(config: &ConflictLog) -> Self {
        Self {
            config: config.clone(),
            budget: Budget::new(config.lines_per_second, config.burst_lines),
            there: Budget::new(config.lines_per_second, 0),
        }
    }

    /// How many lines may be written now, but for those that are always written.
    pub(crate) fn lines_left(&self) -> usize {
        self.budget.left(tokio::time::Instant::now())
    }

    /// The transaction whose lines were recorded last has ended; what it took it has not used, unless it is committed.
    pub(crate) fn ended(&mut self, is_committed: bool) {
        self.budget.ended(is_committed);
        self.there.ended(is_committed);
    }
}

impl Writer<'_> {
    /// Writes the lines of `losses`, or counts them where that would be too many, with those that are counted already.
    pub(crate) async fn record(
        &mut self,
        ledger: &mut Ledger,
        losses: &mut Vec<Loss>,
        mut counts: Counts,
    ) -> Result<(), Failure> {
        let last = last_of_each(std::mem::take(losses), |loss| self.is_refused_fold(loss));
        let (whole, mut others): (Vec<Loss>, Vec<Loss>) = last.into_iter().partition(Loss::is_whole);
        let now = tokio::time::Instant::now();
        let mut there = Vec::new();
        if others.len() > ledger.budget.left(now).min(ledger.there.left(now)) {
            // Those that have a line need no other one; and it stays as it is, but for what they may change in it.
            let known = self.having_lines(&others).await?;
            let mut without = Vec::new();
            for loss in others {
                match known.get(&line::name(&loss, false).0.to_string()) {
                    Some(resolution) if may_change(&loss, resolution) => there.push(loss),
                    Some(_) => {}
                    None => without.push(loss),
                }
            }
            others = without;
            // What is told each time comes behind what is told once.
            there.sort_by_key(|loss| loss.resolution == Resolution::Merge);
            there.truncate(ledger.there.take(there.len(), now));
        }
        let taken = ledger.budget.take(others.len(), now);
        for loss in others.split_off(taken) {
            counts.add(&loss);
        }
        self.record_all(&ledger.config, whole).await?;
        self.record_all(&ledger.config, there).await?;
        let written = self.record_all(&ledger.config, others).await?;
        // The rest of it was there, or had nothing to say.
        let spared = taken.saturating_sub(written);
        ledger.budget.give_back(spared);
        ledger.there.take(spared, now);
        self.count(&counts).await
    }

    /// Ids of the lines that are in the log, of those that `losses`, of which none is of a refused row, would have, and their resolutions.
    async fn having_lines(&mut self, losses: &[Loss]) -> Result<HashMap<String, String>, Failure> {
        let names = losses.iter().map(|loss| line::name(loss, false));
        let (ids, times): (Vec<String>, Vec<i64>) = names
            .map(|(id, losing)| (id.to_string(), losing.unix_us()))
            .unzip();
        let statement = self.session.prepare(KNOWN).await?;
        let rows = self.session.client.query(&statement, &[&ids, &times]).await?;
        let known = rows
            .iter()
            .map(|row| Ok::<_, Failure>((row.try_get(0)?, row.try_get(1)?)));
        known.collect()
    }

    /// Writes lines, as many as are rendered at once after each other. Gives how many were not there before.
    async fn record_all(&mut self, config: &ConflictLog, mut losses: Vec<Loss>) -> Result<usize, Failure> {
        let (mut rest, mut written) = (losses.as_mut_slice(), 0);
        while !rest.is_empty() {
            let count = self.read_some(rest)?;
            let (some, after) = rest.split_at_mut(count);
            written += self.record_some(config, some).await?;
            rest = after;
        }
        Ok(usize::try_from(written).unwrap_or(usize::MAX))
    }

    /// Reads the rows of losses back from the journal, for as many as are rendered at once: one at least.
    fn read_some(&self, losses: &mut [Loss]) -> Result<usize, Failure> {
        let (mut count, mut bytes) = (0, 0);
        for loss in losses.iter_mut().take(LINES) {
            if bytes > LINES_BYTES {
                break;
            }
            self.read_rows(loss)?;
            (count, bytes) = (count + 1, bytes + loss.bytes());
        }
        Ok(count)
    }

    async fn record_some(&mut self, config: &ConflictLog, losses: &[Loss]) -> Result<u64, Failure> {
        let rendered = self.render(losses).await?;
        let (mut json, mut from, mut written) = (String::from("["), 0, 0);
        for (at, (loss, shown)) in losses.iter().zip(rendered).enumerate() {
            // The same row at both: nothing was lost.
            if loss.is_unheard() && shown.is_same(&loss.table) {
                continue;
            }
            if json.len() > LINES_BYTES {
                let full = std::mem::replace(&mut json, String::from("["));
                written += self.insert(full, losses.get(from..at)).await?;
                from = at;
            }
            if json.len() > 1 {
                json.push(',');
            }
            self.line(&mut json, loss, shown, config)?;
        }
        Ok(written + self.insert(json, losses.get(from..)).await?)
    }

    /// Writes the lines of some losses, a JSON array without its end. Gives how many were not there, or are there anew.
    async fn insert(&mut self, mut json: String, losses: Option<&[Loss]>) -> Result<u64, Failure> {
        let losses = losses.unwrap_or_default();
        json.push(']');
        let statement = self.session.prepare(INSERT).await?;
        let mut written = self.session.client.execute(&statement, &[&json]).await?;
        // Some have a line already: the same loss found twice, or a row that was refused before.
        if written < losses.len() as u64 {
            let replaced = self.session.prepare(REPLACED).await?;
            let mut again = self.session.client.execute(&replaced, &[&json]).await?;
            if losses.iter().any(Loss::keeps_row_out) {
                let kept_out = self.session.prepare(KEPT_OUT).await?;
                again += self.session.client.execute(&kept_out, &[&json]).await?;
            }
            if losses.iter().any(|loss| loss.is_decoded) {
                let decoded_on = self.session.prepare(DECODED_ON).await?;
                again += self.session.client.execute(&decoded_on, &[&json]).await?;
            }
            if again > 0 {
                written += self.session.client.execute(&statement, &[&json]).await?;
            }
            if losses.iter().any(|loss| loss.resolution == Resolution::Merge) {
                let more = self.session.prepare(LOST_MORE).await?;
                self.session.client.execute(&more, &[&json]).await?;
            }
        }
        Counters::add(&self.shared.counters.conflicts, written);
        Ok(written)
    }

    /// Only counts them.
    async fn count(&mut self, counts: &Counts) -> Result<(), Failure> {
        if counts.is_empty() {
            return Ok(());
        }
        let statement = self.session.prepare(COUNT).await?;
        for ((schema, table, kind, losing, winning), count) in counts.iter() {
            self.session
                .client
                .execute(&statement, &[schema, table, kind, losing, winning, &count])
                .await?;
        }
        Counters::add(&self.shared.counters.conflicts_counted, counts.total());
        Ok(())
    }
}

/// Several writes of one row by one transaction lost together: the last is what the row would have been.
fn last_of_each(losses: Vec<Loss>, is_refused_fold: impl Fn(&Loss) -> bool) -> Vec<Loss> {
    let mut seen = HashSet::new();
    let mut last: Vec<Loss> = losses
        .into_iter()
        .rev()
        .filter(|loss| {
            let written = loss.losing().map(|version| version.stamp);
            // A row may lack the parents of several foreign keys.
            let foreign_key = loss.foreign_key().map(str::to_owned);
            seen.insert((loss.key.clone(), written, foreign_key, is_refused_fold(loss)))
        })
        .collect();
    last.reverse();
    last
}

/// Can a loss change anything in its line, which is there with this resolution? See [`REPLACED`], [`DECODED_ON`] and [`LOST_MORE`].
fn may_change(loss: &Loss, resolution: &str) -> bool {
    loss.resolution == Resolution::Merge || loss.is_decoded || resolution == Resolution::Skip.as_str()
}
