//! Rows in quarantine: their keys read at start, they themselves tried again now and then, dropped when overtaken.
//!
//! In:   `anabranch.quarantine`        Out: rows written at last
//! Invariants: 1. the resolver knows every key before anything is decoded: a later write of a row overtakes what waits; 2. nothing is
//!        forgotten before what an earlier life left is compared with the index, nor before what was overtaken is gone from the table
//! Not here: putting rows in ([`super::refused`])

use std::sync::Arc;
use std::time::Duration;

use anabranch_conflict::{Kind, Op, Version};
use anabranch_proto::Position;
use anabranch_proto::schema::TableDesc;
use anabranch_proto::stamp::{STAMP_LEN, Stamp};
use anabranch_proto::txn::{Change, FrameReader, Record, TableCache};
use anabranch_proto::wire::Malformed;
use bytes::Bytes;
use futures_util::TryStreamExt as _;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_postgres::{Client, Row};

use super::batch::{Action, Write};
use super::failure::{Failure, Recovery};
use super::parked::Outcome;
use super::session::Session;
use super::work::Work;
use super::write::Writer;
use super::{Applier, Seat};
use crate::config::ConflictLog;
use crate::index::RowKey;
use crate::shared::{Shared, lock};

const KEYS: &str = "SELECT id, stamp, change FROM anabranch.quarantine";
/// Few at once, and of large ones one: each is kept whole.
const PAGE: &str = "SELECT id, stamp, change, origin FROM (SELECT id, stamp, change, origin, \
    sum(octet_length(change)) OVER (ORDER BY id) - octet_length(change) AS before \
    FROM (SELECT id, stamp, change, origin FROM anabranch.quarantine WHERE id > $1 ORDER BY id LIMIT 100) AS few) AS sized \
    WHERE before < 8388608 ORDER BY id";
const COUNT: &str = "SELECT count(*) FROM anabranch.quarantine";
/// With the row go its open lines of the log: nothing is left for a person to do. But those of values that were left out where the row
/// was written without them. `$4`: columns that lines do not show.
const DROP: &str = "WITH gone AS (DELETE FROM anabranch.quarantine WHERE schema_name = $1 AND table_name = $2 \
    AND key_bytes = $3 RETURNING key - $4::text[] AS key) \
    UPDATE anabranch.conflict_history h SET status = 'acknowledged', reviewed_by = 'anabranch', \
    reviewed_at = clock_timestamp(), note = 'the row, or a later version of it, was written' FROM gone \
    WHERE h.schema_name = $1 AND h.table_name = $2 AND h.key @> gone.key AND h.key = gone.key AND gone.key <> '{}' \
    AND h.conflict_resolution = 'skip' AND h.status = 'new' \
    AND coalesce(h.remote_tuple - h.lost_columns, '{}') = '{}'";

/// So long rows in quarantine are tried at once, and then what comes in is applied for at least that long: a pass through many
/// rows must not hold up the stream.
const SLICE: Duration = Duration::from_millis(100);
const PAUSE: Duration = Duration::from_millis(400);

/// A row in quarantine.
pub(crate) struct Kept {
    /// Its place: rows that are put there later have higher ones.
    pub(crate) id: i64,
    /// `None` where it cannot be read.
    pub(crate) action: Option<Action>,
}

/// Tells the resolver the keys of all rows in quarantine.
///
/// # Errors
/// When the server does not answer.
pub(crate) async fn load_keys(sql: &Client, shared: &Shared) -> Result<(), tokio_postgres::Error> {
    let none: [&str; 0] = [];
    let mut rows = std::pin::pin!(sql.query_raw(KEYS, none).await?);
    let mut cache = TableCache::default();
    while let Some(row) = rows.try_next().await? {
        if let Some(action) = read(&row, shared, &mut cache)?.action {
            // What held it is told later: see [`held_until_now`].
            lock(&shared.resolver).load_quarantined(action.key, action.version);
        }
    }
    Ok(())
}

/// What held rows of an earlier run was decoded then, so it is among what is decoded by now.
pub(crate) fn held_until_now(shared: &Shared) {
    let decoded = shared.last_decoded();
    for row in lock(&shared.resolver).quarantined().values_mut() {
        row.after = row.after.max(decoded);
    }
}

/// Some rows behind a place.
pub(crate) async fn page(session: &mut Session, shared: &Shared, after: i64) -> Result<Vec<Kept>, Failure> {
    let statement = session.prepare(PAGE).await?;
    // Own rows are described apart from others' (`super::own_tables`).
    let (mut cache, mut own) = (TableCache::default(), TableCache::default());
    let rows = session.client.query(&statement, &[&after]).await?;
    let mut out = Vec::with_capacity(rows.len());
    for row in &rows {
        let is_own = row.try_get::<_, i32>(3)? == i32::from(shared.node.0);
        let kept = read(row, shared, if is_own { &mut own } else { &mut cache })?;
        // What is folded of several versions may be described as another node's, and what names a key, too.
        let whole = kept.action.as_ref().filter(|action| {
            let is_put = matches!(action.write, Write::Put(_));
            is_own && is_put && lock(&shared.resolver).merging(action.key.table()).is_none()
        });
        session
            .own_tables()
            .learn(whole.map(|action| &action.table).into_iter());
        out.push(kept);
    }
    Ok(out)
}

fn read(row: &Row, shared: &Shared, cache: &mut TableCache) -> Result<Kept, tokio_postgres::Error> {
    let (id, stamp, change): (i64, &[u8], &[u8]) = (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
    let action = match decode(stamp, change, shared, cache) {
        Ok(action) => Some(action),
        Err(error) => {
            tracing::error!(id, error = %error, "a row in anabranch.quarantine cannot be read");
            None
        }
    };
    Ok(Kept { id, action })
}

/// Counts the quarantine for status, and raises or clears its alarm.
pub(crate) async fn count(session: &mut Session, shared: &Shared) -> Result<(), Failure> {
    let statement = session.prepare(COUNT).await?;
    let count: i64 = session.client.query_one(&statement, &[]).await?.try_get(0)?;
    shared.counters.quarantined.store(
        u64::try_from(count).unwrap_or(0),
        std::sync::atomic::Ordering::Relaxed,
    );
    if count > 0 {
        let text = format!(
            "{count} row(s) in quarantine: see anabranch.quarantine for the errors; mend what they name"
        );
        shared.alarms.raise("quarantine", text);
    } else {
        shared.alarms.clear("quarantine");
    }
    Ok(())
}

fn decode(stamp: &[u8], change: &[u8], shared: &Shared, cache: &mut TableCache) -> Result<Action, Failure> {
    let stamp: [u8; STAMP_LEN] = stamp
        .try_into()
        .map_err(|_| Malformed("a stamp of wrong length"))?;
    let stamp = Stamp::from_bytes(stamp);
    let mut reader = FrameReader::new(stamp.node, Bytes::copy_from_slice(change), cache)?;
    let Some(Record::Txn(header, mut changes)) = reader.next_record()? else {
        return Err(Malformed("a stored change without its transaction").into());
    };
    let change = changes
        .next_change()?
        .ok_or(Malformed("a stored change that is empty"))?;
    let mut resolver = lock(&shared.resolver);
    let (table, key, write, kind): (Arc<TableDesc>, RowKey, Write, Kind) = match change {
        Change::Put { table, row, .. } => {
            let key = resolver.key_of_row(&table, &row)?;
            (table, key, Write::Put(row), Kind::Put)
        }
        Change::Delete { table, key } => {
            let row_key = resolver.key_of_image(&table, &key)?;
            (table, row_key, Write::Delete(key), Kind::Delete)
        }
        Change::Truncate { .. } => return Err(Malformed("a stored truncate").into()),
    };
    let op = if kind == Kind::Put { Op::Update } else { Op::Delete };
    let version = Version {
        stamp,
        position: header.position,
        kind,
    };
    let mut action = Action::careful(table, key, write, version, op);
    action.again = true;
    Ok(action)
}

impl Applier {
    /// Lets go what was overtaken, and tries what is in quarantine again: all of it when that is due, and at once what commits
    /// held that are visible now.
    pub(super) async fn retry_due(
        &mut self,
        seat: &mut Seat,
        stop: &watch::Receiver<bool>,
    ) -> Result<(), Failure> {
        if lock(&self.shared.resolver).is_quarantine_unjudged() {
            self.judge_quarantine(seat).await?;
        }
        let overtaken = lock(&self.shared.resolver).take_overtaken();
        if !overtaken.is_empty() {
            let mut work = Work::release(overtaken);
            if !matches!(self.until_done(seat, &mut work, stop).await?, Outcome::Done) {
                return Ok(());
            }
            lock(&self.shared.resolver).released();
            let _ = count(&mut seat.session, &self.shared).await;
        }
        if Instant::now() >= self.quarantine_due {
            let ended = self.pass_quarantine(seat, stop).await?;
            let pause = if ended {
                Duration::from_millis(self.config.apply.quarantine_retry_ms)
            } else {
                PAUSE
            };
            self.quarantine_due = Instant::now() + pause;
            return Ok(());
        }
        if Instant::now() < self.held_due {
            return Ok(());
        }
        let shared = Arc::clone(&self.shared);
        let was_held = |after: Position| after > Position::ZERO && shared.is_visible(after);
        if lock(&shared.resolver)
            .quarantined()
            .values()
            .any(|row| was_held(row.after))
        {
            let reached = self
                .retry_quarantine(seat, was_held, self.held_from, stop)
                .await?;
            if reached.is_none() {
                // Whatever becomes of them, nothing holds them any more.
                let mut resolver = lock(&shared.resolver);
                for row in resolver.quarantined().values_mut() {
                    if was_held(row.after) {
                        row.after = Position::ZERO;
                    }
                }
            }
            self.held_from = reached.unwrap_or(0);
            self.held_due = Instant::now() + PAUSE;
        }
        Ok(())
    }

    /// Lets go of rows of an earlier life that are not their rows' winners. That a local write had overtaken one may have been known in
    /// memory alone, and is known by the index only until that is stable; a pass through many rows takes longer.
    async fn judge_quarantine(&mut self, seat: &mut Seat) -> Result<(), Failure> {
        let mut after = 0;
        loop {
            let kept = match page(&mut seat.session, &self.shared, after).await {
                Ok(kept) => kept,
                Err(failure) if failure.recovery() == Recovery::Halt => return Err(failure),
                // Tried again with the next piece of work, which finds the same fault and deals with it.
                Err(failure) => {
                    tracing::warn!(error = %failure, "the rows in quarantine cannot be read");
                    return Ok(());
                }
            };
            let mut resolver = lock(&self.shared.resolver);
            let Some(last) = kept.last() else {
                resolver.quarantine_judged();
                return Ok(());
            };
            after = last.id;
            for action in kept.into_iter().filter_map(|item| item.action) {
                let put = matches!(action.write, Write::Put(_));
                let row = resolver.quarantined().get(&action.key);
                let waits = row.is_some_and(|row| row.stamp == action.version.stamp);
                if waits && !resolver.is_still_due(&action.key, action.version.stamp, put)? {
                    resolver.overtake(&action.table, &action.key);
                }
            }
        }
    }

    /// A part of a pass through the quarantine; is the pass at its end?
    async fn pass_quarantine(
        &mut self,
        seat: &mut Seat,
        stop: &watch::Receiver<bool>,
    ) -> Result<bool, Failure> {
        let mut end = true;
        if !lock(&self.shared.resolver).quarantined().is_empty() {
            let reached = self
                .retry_quarantine(seat, |_| true, self.quarantine_from, stop)
                .await?;
            end = reached.is_none();
            self.quarantine_from = reached.unwrap_or(0);
        }
        // Where it fails, the next piece of work finds the same fault and deals with it.
        let _ = count(&mut seat.session, &self.shared).await;
        Ok(end)
    }

    /// Tries the quarantined rows behind a place again, each alone, for as long as a part of a pass may take. The place that
    /// was reached; `None` at the end.
    async fn retry_quarantine(
        &mut self,
        seat: &mut Seat,
        is_wanted: impl Fn(Position) -> bool,
        mut from: i64,
        stop: &watch::Receiver<bool>,
    ) -> Result<Option<i64>, Failure> {
        let (begun, until) = (from, Instant::now() + SLICE);
        if from == 0 {
            // Somebody may have mended a table.
            seat.session.forget_tables();
        }
        loop {
            let kept = match page(&mut seat.session, &self.shared, from).await {
                Ok(kept) => kept,
                // The next piece of work finds the same fault and deals with it.
                Err(failure) if failure.is_transient() => return Ok(Some(from)),
                Err(failure) if failure.recovery() == Recovery::Halt => return Err(failure),
                Err(failure) => {
                    tracing::error!(error = %failure, "the rows in quarantine cannot be read; they are tried again later");
                    // A connection that is lost is met, and made again, by the next piece of work.
                    let _ = seat.session.client.batch_execute("ROLLBACK").await;
                    return Ok(None);
                }
            };
            if kept.is_empty() {
                return Ok(None);
            }
            for item in kept {
                if from != begun && Instant::now() >= until {
                    return Ok(Some(from));
                }
                from = item.id;
                let Some(action) = item.action else { continue };
                let put = matches!(action.write, Write::Put(_));
                let (key, stamp) = (&action.key, action.version.stamp);
                let row = lock(&self.shared.resolver).quarantined().get(key).copied();
                // A row that is not visible yet would not be found, and taken for one that is gone.
                if !row.is_some_and(|row| is_wanted(row.after) && self.shared.is_visible(row.after)) {
                    continue;
                }
                {
                    let mut resolver = lock(&self.shared.resolver);
                    if !resolver.is_still_due(key, stamp, put)? {
                        resolver.overtake(&action.table, key);
                        continue;
                    }
                }
                let (table, key, version) = (Arc::clone(&action.table), key.clone(), action.version);
                let mut work = Work::again(action);
                self.until_done(seat, &mut work, stop).await?;
                self.tell_if_of_another(&table, &key, version);
            }
        }
    }

    /// A row that waited since its table lost its name comes into the table that DDL has given it to meanwhile. (Told as far as the journal
    /// has its transaction.)
    fn tell_if_of_another(&self, table: &TableDesc, key: &RowKey, version: Version) {
        let names = &self.shared.lasting.named_anew;
        if !names.has(table) || lock(&self.shared.resolver).quarantined().contains_key(key) {
            return;
        }
        if let Ok(Some(header)) = self.lookup.header(version) {
            names.meet_row(&header, table, &self.shared.lasting.alarms);
        }
    }
}

impl Writer<'_> {
    /// Takes rows out of the quarantine table, and closes their lines in the log.
    pub(crate) async fn release(
        &mut self,
        keys: &[(Arc<TableDesc>, RowKey)],
        log: &ConflictLog,
    ) -> Result<(), Failure> {
        if keys.is_empty() {
            return Ok(());
        }
        let statement = self.session.prepare(DROP).await?;
        for (table, key) in keys {
            let hidden: Vec<&str> = log.redacted(&table.schema, &table.name).collect();
            self.session
                .client
                .execute(
                    &statement,
                    &[&table.schema, &table.name, &key.canonical(), &hidden],
                )
                .await?;
        }
        Ok(())
    }
}
