//! Deletes rows that lost their parents, where their table's policy is `foreign_keys = "delete_child"`.
//!
//! In:   lines of the conflict log that are open, written by the applier        Out: ordinary local transactions
//! Invariants: 1. of all nodes only one deletes a row: the one that wrote it (or, where the line names no version of the row,
//!        the one that deleted its parent); all have the same line, so they agree which; 2. a row is deleted only once every
//!        member is known to have met both it and the removal of its parent: so each has the line, and in it the row; 3. and only
//!        while it has no parent, in one transaction with the note on its line; 4. the delete is a write of the node's own: it has
//!        a stamp, it travels, and what it meets is decided as ever. So the applier, which writes what others decided, never does it
//! On crash: the line is open or has its note; what is open is looked at after the start
//! Not here: finding the rows (`crate::apply`)

use std::sync::Arc;
use std::time::Duration;

use anabranch_proto::{Lsn, NodeId};
use tokio_postgres::Client;

use crate::apply::foreign::{self, ForeignKey};
use crate::config::Config;
use crate::pg;
use crate::review::Error;
use crate::setup::sql::{ident, qualified};
use crate::shared::{Shared, lock};

/// Between two tries of what could not be done.
const AGAIN: Duration = Duration::from_secs(5);

/// Between two looks at what other members have met.
const SOON: Duration = Duration::from_secs(1);

/// Lines that are worked off before the next look.
const SOME: i64 = 500;

const ALARM: &str = "orphans";

/// Open lines of rows that this node is to delete.
const LINES: &str = "SELECT conflict_id::text, schema_name, table_name, key::text, constraint_name, \
    local_origin, (local_lsn - '0/0')::int8, remote_origin, (remote_lsn - '0/0')::int8 \
    FROM anabranch.conflict_history WHERE status = 'new' AND note IS NULL AND conflict_type = 'foreign_key_missing' \
    AND conflict_resolution = 'delete_child' \
    AND CASE loser WHEN 'local' THEN coalesce(local_origin, remote_origin) ELSE coalesce(remote_origin, local_origin) END \
    = $1 ORDER BY detected_at, conflict_id LIMIT $2";

/// Whoever reviews a line, or works it off, has it alone.
const LOCK: &str = "SELECT FROM anabranch.conflict_history WHERE conflict_id = $1::text::uuid AND status = 'new' \
    AND note IS NULL FOR UPDATE";

const NOTE: &str = "UPDATE anabranch.conflict_history SET note = $2 WHERE conflict_id = $1::text::uuid";

struct Line {
    id: String,
    schema: String,
    table: String,
    key: String,
    constraint: String,
    /// Origins of the row and of the removal of its parent, as far as they are known, and the places in their WAL.
    writes: Vec<(NodeId, Lsn)>,
}

/// What is left of the open lines.
enum Left {
    Nothing,
    /// Some member is not known to have met all of it.
    Unmet,
    /// It could not be done.
    Refused,
}

/// Works lines off until the task is ended: those that are there, and those that come.
pub(super) async fn run(config: Arc<Config>, shared: Arc<Shared>) {
    let mut client: Option<Client> = None;
    loop {
        let pause = match work_off(&config, &shared, &mut client).await {
            Ok(Left::Nothing) => {
                shared.alarms.clear(ALARM);
                shared.orphans.notified().await;
                continue;
            }
            Ok(Left::Unmet) => SOON,
            Ok(Left::Refused) => AGAIN,
            Err(error) => {
                tracing::warn!(%error, "deleting rows without their parents, trying again");
                client = None;
                AGAIN
            }
        };
        tokio::time::sleep(pause).await;
    }
}

/// Works off what is open and may be.
async fn work_off(config: &Config, shared: &Shared, client: &mut Option<Client>) -> Result<Left, Error> {
    let session = match client.take().filter(|client| !client.is_closed()) {
        Some(session) => client.insert(session),
        None => client.insert(connect(config).await?),
    };
    loop {
        let lines = open_lines(session, shared).await?;
        if lines.is_empty() {
            return Ok(Left::Nothing);
        }
        let stable = lock(&shared.stability).stable();
        let met = |line: &&Line| {
            line.writes
                .iter()
                .all(|(node, lsn)| stable.get(*node).lsn >= *lsn)
        };
        let keys = foreign::load(session).await?;
        let (mut done, mut refused) = (0, 0);
        for line in lines.iter().filter(met) {
            match delete(session, line, &keys).await {
                Ok(()) => done += 1,
                Err(error) if session.is_closed() => return Err(error),
                // Of this row alone, such as a trigger's or a lock's: the others are not held up.
                Err(error) => {
                    refused += 1;
                    let (table, key) = (qualified(&line.schema, &line.table), &line.key);
                    let text = format!(
                        "row {key} of {table}, which lost its parent, cannot be deleted yet: {error}"
                    );
                    tracing::warn!("{text}");
                    shared.alarms.raise(ALARM, text);
                }
            }
        }
        if refused > 0 {
            return Ok(Left::Refused);
        }
        if done == 0 {
            return Ok(Left::Unmet);
        }
    }
}

/// A session that waits for nobody for long. Its triggers expect what a user's session has.
async fn connect(config: &Config) -> Result<Client, Error> {
    let client = pg::connect(&config.postgres, "orphans").await?.0;
    let settings =
        "SET lock_timeout = '2s'; SET search_path = \"$user\", public; SET synchronous_commit = local";
    client.batch_execute(settings).await?;
    Ok(client)
}

async fn open_lines(session: &Client, shared: &Shared) -> Result<Vec<Line>, Error> {
    let node = i32::from(shared.node.0);
    let rows = session.query(LINES, &[&node, &SOME]).await?;
    let lines = rows.iter().map(|row| {
        let mut writes = Vec::new();
        for at in [5, 7] {
            let (origin, lsn): (Option<i32>, Option<i64>) = (row.try_get(at)?, row.try_get(at + 1)?);
            let origin = origin.and_then(|origin| u16::try_from(origin).ok());
            if let (Some(origin), Some(lsn)) = (origin, lsn.and_then(|lsn| u64::try_from(lsn).ok())) {
                writes.push((NodeId(origin), Lsn(lsn)));
            }
        }
        Ok(Line {
            writes,
            id: row.try_get(0)?,
            schema: row.try_get(1)?,
            table: row.try_get(2)?,
            key: row.try_get(3)?,
            constraint: row.try_get::<_, Option<String>>(4)?.unwrap_or_default(),
        })
    });
    lines.collect()
}

async fn delete(session: &mut Client, line: &Line, keys: &[ForeignKey]) -> Result<(), Error> {
    let table = (line.schema.clone(), line.table.clone());
    let key = keys
        .iter()
        .find(|key| key.name == line.constraint && key.children.contains(&table));
    let transaction = session.transaction().await?;
    if transaction.query_opt(LOCK, &[&line.id]).await?.is_none() {
        // Somebody has reviewed it meanwhile.
        return Ok(());
    }
    let note = match (key, statement(line, key)?) {
        (None, _) => "not deleted: the foreign key is not there any more",
        (_, None) => "not deleted: the row's key is redacted in the log",
        (_, Some(sql)) => match transaction.execute(&sql, &[&line.key]).await? {
            0 => "not deleted: the row has a parent, or is gone",
            _ => "deleted here",
        },
    };
    transaction.execute(NOTE, &[&line.id, &note]).await?;
    transaction.commit().await?;
    tracing::info!(
        id = line.id,
        constraint = line.constraint,
        "a row that lost its parent: {note}"
    );
    Ok(())
}

/// Deletes the row while it has no parent. None: nobody knows which row it is.
fn statement(line: &Line, key: Option<&ForeignKey>) -> Result<Option<String>, Error> {
    let columns: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&line.key)?;
    let Some(key) = key.filter(|_| !columns.is_empty()) else {
        return Ok(None);
    };
    let names = |alias: &str| {
        let each = columns.keys().map(|name| format!("{alias}.{}", ident(name)));
        each.collect::<Vec<_>>().join(", ")
    };
    let table = qualified(&line.schema, &line.table);
    Ok(Some(format!(
        "DELETE FROM {table} AS t WHERE ({}) = (SELECT {} FROM jsonb_populate_record(NULL::{table}, $1::text::jsonb) AS k) \
         AND {} AND NOT EXISTS (SELECT {})",
        names("t"),
        names("k"),
        key.refers("t"),
        key.parent_of("t")
    )))
}
