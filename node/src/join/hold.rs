//! The donor's tables stay as the snapshot shows them: they are locked until the copy is done.
//!
//! In:   a session on the donor's snapshot        Out: locks that its transaction holds; or which table has changed before
//! Invariants: no piece of a table is read unless the table's rows are still where they were at the cut. A rewrite (ALTER TABLE of a
//!        type, TRUNCATE) leaves nothing that an older snapshot can see, and says nothing of it; VACUUM FULL moves rows past
//!        ranges of ctid. <https://www.postgresql.org/docs/current/mvcc-caveats.html>
//! Not here: reading ([`super::copy`])

use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use super::{Error, Event, Report, sql};
use crate::setup::sql::qualified;

/// Every table that is copied, as the snapshot has it.
const TABLES: &str = "
    SELECT c.oid, n.nspname::text, c.relname::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relkind IN ('r', 'p') AND n.nspname !~ '^pg_'
      AND n.nspname NOT IN ('information_schema', 'anabranch', 'anabranch_ddl', 'anabranch_join')
    ORDER BY 1";

/// Those of them whose rows are elsewhere now: a plain query sees the catalog of the snapshot, the function today's.
const MOVED: &str = "
    SELECT format('%I.%I', n.nspname, c.relname) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE c.oid = ANY ($1) AND c.relkind = 'r' AND pg_relation_filenode(c.oid) IS DISTINCT FROM c.relfilenode
    ORDER BY 1";

/// Locks the donor's tables against everything that rewrites them, for as long as the transaction lasts. Says what was rewritten,
/// emptied or dropped since the cut, if anything was: then the snapshot is of no use any more.
pub(super) async fn hold(client: &Client, report: &Report) -> Result<Option<String>, Error> {
    let rows = client
        .query(TABLES, &[])
        .await
        .map_err(sql("list the donor's tables"))?;
    let read = |error| sql("list the donor's tables")(error);
    client
        .batch_execute("SET LOCAL lock_timeout = '2s'")
        .await
        .map_err(sql("set lock_timeout at the donor"))?;
    let mut oids: Vec<u32> = Vec::with_capacity(rows.len());
    for row in &rows {
        oids.push(row.try_get(0).map_err(read)?);
        let (schema, name): (String, String) = (row.try_get(1).map_err(read)?, row.try_get(2).map_err(read)?);
        let table = qualified(&schema, &name);
        if !lock_table(client, &table, report).await? {
            return Ok(Some(format!("{table} was dropped or renamed")));
        }
    }
    let moved: Vec<String> = client
        .query(MOVED, &[&oids])
        .await
        .and_then(|rows| rows.iter().map(|row| row.try_get(0)).collect())
        .map_err(sql("look whether the donor's tables were rewritten"))?;
    Ok((!moved.is_empty()).then(|| format!("{} was rewritten or emptied", moved.join(", "))))
}

/// A lock that is not granted makes whoever comes after it wait, too: it is let go again soon, and asked for again. False
/// if there is no such table any more.
async fn lock_table(client: &Client, table: &str, report: &Report) -> Result<bool, Error> {
    let lock = format!("SAVEPOINT held; LOCK TABLE ONLY {table} IN ACCESS SHARE MODE; RELEASE held");
    let mut said = false;
    loop {
        let Err(error) = client.batch_execute(&lock).await else {
            return Ok(true);
        };
        match error.code() {
            Some(code) if *code == SqlState::LOCK_NOT_AVAILABLE => {}
            Some(code) if *code == SqlState::UNDEFINED_TABLE => return Ok(false),
            _ => return Err(sql(format!("lock {table} at the donor against changes"))(error)),
        }
        client
            .batch_execute("ROLLBACK TO held")
            .await
            .map_err(sql("lock the donor's tables"))?;
        if !said {
            said = true;
            report(Event::Waiting {
                on: format!("a session at the donor that changes {table}"),
            });
        }
    }
}
