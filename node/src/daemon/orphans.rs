//! Deletes rows that lost their parents, or brings these back, where their table's policy is `foreign_keys = "delete_child"` or
//! `"restore_parent"`.
//!
//! In:   lines of the conflict log that are open, written by the applier        Out: ordinary local transactions
//! Invariants: 1. of all nodes only one mends a row: the one that wrote it (or, where the line names no version of the row,
//!        the one that deleted its parent); all have the same line, so they agree which; 2. it is mended only once every
//!        member is known to have met both it and the removal of its parent: so each has the line, and in it the row; 3. and only
//!        while it has no parent, in one transaction with the note on its line; 4. that is a write of the node's own: it has
//!        a stamp, it travels, and what it meets is decided as ever. So the applier, which writes what others decided, never does it
//! On crash: the line is open or has its note; what is open is looked at after the start
//! Not here: finding the rows, and what their parents were (`crate::apply`)

mod restore;

use std::sync::Arc;
use std::time::Duration;

use anabranch_proto::{Lsn, NodeId};
use tokio_postgres::{Client, Transaction};

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

/// Open lines of rows that this node is to mend.
const LINES: &str = "SELECT conflict_id::text, schema_name, table_name, key::text, constraint_name, \
    local_origin, (local_lsn - '0/0')::int8, remote_origin, (remote_lsn - '0/0')::int8, \
    conflict_resolution = 'restore_parent', error ->> 'parents' \
    FROM anabranch.conflict_history WHERE status = 'new' AND note IS NULL AND conflict_type = 'foreign_key_missing' \
    AND conflict_resolution IN ('delete_child', 'restore_parent') \
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
    /// Is the parent to come back, or the row to go?
    restores: bool,
    /// Rows to be inserted for that, as JSON.
    parents: Option<String>,
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
                tracing::warn!(%error, "mending rows without their parents, trying again");
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
            match mend(session, line, &keys).await {
                Ok(()) => done += 1,
                Err(error) if session.is_closed() => return Err(error),
                // Of this row alone, such as a trigger's or a lock's: the others are not held up.
                Err(error) => {
                    refused += 1;
                    let (table, key) = (qualified(&line.schema, &line.table), &line.key);
                    let what = match line.restores {
                        true => "whose parent is gone, cannot have it back yet",
                        false => "which lost its parent, cannot be deleted yet",
                    };
                    let text = format!("row {key} of {table}, {what}: {error}");
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
            restores: row.try_get(9)?,
            parents: row.try_get(10)?,
        })
    });
    lines.collect()
}

async fn mend(session: &mut Client, line: &Line, keys: &[ForeignKey]) -> Result<(), Error> {
    let table = (line.schema.clone(), line.table.clone());
    let key = keys
        .iter()
        .find(|key| key.name == line.constraint && key.children.contains(&table));
    let transaction = session.transaction().await?;
    if transaction.query_opt(LOCK, &[&line.id]).await?.is_none() {
        // Somebody has reviewed it meanwhile.
        return Ok(());
    }
    let note = match key {
        None if line.restores => "not restored: the foreign key is not there any more",
        None => "not deleted: the foreign key is not there any more",
        Some(key) if line.restores => restore::restore(&transaction, line, key).await?,
        Some(key) => delete(&transaction, line, key).await?,
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

/// Deletes the row while it has no parent. Gives the note for its line.
async fn delete(transaction: &Transaction<'_>, line: &Line, key: &ForeignKey) -> Result<&'static str, Error> {
    let Some(orphan) = orphan(line, key)? else {
        return Ok("not deleted: the row's key is redacted in the log");
    };
    let sql = format!(
        "DELETE FROM {} AS t WHERE {orphan}",
        qualified(&line.schema, &line.table)
    );
    Ok(match transaction.execute(&sql, &[&line.key]).await? {
        0 => "not deleted: the row has a parent, or is gone",
        _ => "deleted here",
    })
}

/// `t` is the line's row, whose key is parameter 1, and has no parent. None: nobody knows which row it is.
fn orphan(line: &Line, key: &ForeignKey) -> Result<Option<String>, Error> {
    let columns: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&line.key)?;
    if columns.is_empty() {
        return Ok(None);
    }
    let names = |alias: &str| {
        let each = columns.keys().map(|name| format!("{alias}.{}", ident(name)));
        each.collect::<Vec<_>>().join(", ")
    };
    let table = qualified(&line.schema, &line.table);
    Ok(Some(format!(
        "({}) = (SELECT {} FROM jsonb_populate_record(NULL::{table}, $1::text::jsonb) AS k) \
         AND {} AND NOT EXISTS (SELECT {})",
        names("t"),
        names("k"),
        key.refers("t"),
        key.parent_of("t")
    )))
}
