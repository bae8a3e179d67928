//! Inserting again what a row without its parent refers to.
//!
//! In:   a line of the conflict log, with the rows as this node last showed them      Out: ordinary inserts
//! Not here: which rows these are (`crate::apply`), when it is done ([`super`])

use serde::Deserialize;
use serde_json::value::RawValue;
use tokio_postgres::Transaction;

use super::{Line, orphan};
use crate::apply::foreign::ForeignKey;
use crate::review::Error;
use crate::setup::sql::qualified;

/// Columns of a table that can be written and that a row has.
const COLUMNS: &str = "SELECT string_agg(format('%I', a.attname), ', ' ORDER BY a.attnum), \
    string_agg(format('r.%I', a.attname), ', ' ORDER BY a.attnum) FROM pg_catalog.pg_attribute AS a \
    WHERE a.attrelid = $1::text::regclass AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = '' \
    AND a.attname::text IN (SELECT json_object_keys($2::text::json))";

/// A row that was there.
#[derive(Deserialize)]
struct Parent {
    schema: String,
    table: String,
    row: Box<RawValue>,
}

/// Inserts the parent of a line's row, and what that refers to, while the row has none. Gives the note for the line.
pub(super) async fn restore(
    transaction: &Transaction<'_>,
    line: &Line,
    key: &ForeignKey,
) -> Result<&'static str, Error> {
    let Some(orphan) = orphan(line, key)? else {
        return Ok("not restored: the row's key is redacted in the log");
    };
    let table = qualified(&line.schema, &line.table);
    let is_orphan = format!("SELECT FROM {table} AS t WHERE {orphan} FOR KEY SHARE OF t");
    if transaction.query_opt(&is_orphan, &[&line.key]).await?.is_none() {
        return Ok("not restored: the row has a parent, or is gone");
    }
    let Some(parents) = &line.parents else {
        return Ok("not restored: this node does not know what the parent was");
    };
    transaction.batch_execute("SAVEPOINT parents").await?;
    for parent in serde_json::from_str::<Vec<Parent>>(parents)? {
        insert(transaction, &parent).await?;
    }
    if transaction.query_opt(&is_orphan, &[&line.key]).await?.is_some() {
        transaction.batch_execute("ROLLBACK TO SAVEPOINT parents").await?;
        return Ok("not restored: another row has a value of a unique key that the parent had");
    }
    Ok("restored here")
}

async fn insert(transaction: &Transaction<'_>, parent: &Parent) -> Result<(), Error> {
    let (table, row) = (qualified(&parent.schema, &parent.table), parent.row.get());
    let columns = transaction.query_one(COLUMNS, &[&table, &row]).await?;
    let (names, values): (Option<String>, Option<String>) = (columns.try_get(0)?, columns.try_get(1)?);
    let (Some(names), Some(values)) = (names, values) else {
        return Ok(());
    };
    let sql = format!(
        "INSERT INTO {table} ({names}) OVERRIDING SYSTEM VALUE SELECT {values} \
         FROM json_populate_record(NULL::{table}, $1::text::json) AS r ON CONFLICT DO NOTHING"
    );
    transaction.execute(&sql, &[&row]).await?;
    Ok(())
}
