//! Rows in quarantine: read at start, tried again now and then, dropped when overtaken.
//!
//! In:   `anabranch.quarantine`        Out: rows written at last
//! Not here: putting rows in ([`super::refused`])

use std::sync::Arc;

use anabranch_conflict::{Kind, Op, Version};
use anabranch_proto::schema::TableDesc;
use anabranch_proto::stamp::{STAMP_LEN, Stamp};
use anabranch_proto::txn::{Change, FrameReader, Record, TableCache};
use anabranch_proto::wire::Malformed;
use bytes::Bytes;

use super::batch::{Action, Write};
use super::failure::Failure;
use super::session::Session;
use super::write::Writer;
use crate::config::ConflictLog;
use crate::index::RowKey;
use crate::shared::{Shared, lock};

const READ: &str = "SELECT id, key_bytes, stamp, change FROM anabranch.quarantine ORDER BY id LIMIT 10000";
const COUNT: &str = "SELECT count(*) FROM anabranch.quarantine";
/// With the row go its open lines of the log: nothing is left for a person to do. `$4`: columns that lines do not show.
const DROP: &str = "WITH gone AS (DELETE FROM anabranch.quarantine WHERE schema_name = $1 AND table_name = $2 \
    AND key_bytes = $3 RETURNING key - $4::text[] AS key) \
    UPDATE anabranch.conflict_history h SET status = 'acknowledged', reviewed_by = 'anabranch', \
    reviewed_at = clock_timestamp(), note = 'the row, or a later version of it, was written' FROM gone \
    WHERE h.schema_name = $1 AND h.table_name = $2 AND h.key @> gone.key AND h.key = gone.key AND gone.key <> '{}' \
    AND h.conflict_resolution = 'skip' AND h.status = 'new'";

/// A row in quarantine.
pub(crate) struct Kept {
    pub(crate) action: Action,
}

/// Reads the quarantine and tells the resolver its keys.
pub(crate) async fn load(session: &mut Session, shared: &Shared) -> Result<Vec<Kept>, Failure> {
    let statement = session.prepare(READ).await?;
    let mut kept = Vec::new();
    let mut cache = TableCache::default();
    for row in session.client.query(&statement, &[]).await? {
        let (stamp, change): (&[u8], &[u8]) = (row.try_get(2)?, row.try_get(3)?);
        let id: i64 = row.try_get(0)?;
        match decode(stamp, change, shared, &mut cache) {
            Ok(action) => kept.push(Kept { action }),
            Err(error) => tracing::error!(id, error = %error, "a row in anabranch.quarantine cannot be read"),
        }
    }
    {
        let mut resolver = lock(&shared.resolver);
        for item in &kept {
            // Of an earlier run: what held it was decoded then.
            resolver
                .quarantined()
                .entry(item.action.key.clone())
                .or_insert_with(|| shared.last_decoded());
        }
    }
    count(session, shared).await?;
    Ok(kept)
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
    Ok(Action::careful(table, key, write, version, op))
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
