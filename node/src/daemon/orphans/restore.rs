//! Inserting again what a row without its parent refers to.
//!
//! In:   a line of the conflict log, with the rows as this node last showed them      Out: ordinary inserts
//! Not here: which rows these are (`crate::apply`), when it is done ([`super`]), by whom ([`super::turn`])

use anabranch_proto::NodeId;
use serde::Deserialize;
use serde_json::value::RawValue;
use tokio_postgres::Transaction;

use super::turn::Turn;
use super::{Line, orphan};
use crate::apply::foreign::ForeignKey;
use crate::pg;
use crate::review::Error;
use crate::setup::sql::qualified;

/// Columns of a table that can be written and that a row has: their names, how they are read from a JSON row `r` and from a JSON object
/// `r.j` of their texts, and the columns of that `r`.
const COLUMNS: &str = "SELECT string_agg(format('%I', a.attname), ', ' ORDER BY a.attnum), \
    string_agg(format('r.%I', a.attname), ', ' ORDER BY a.attnum), \
    string_agg(format('(r.j OPERATOR(pg_catalog.->>) %L::text)::%s', a.attname, format_type(a.atttypid, -1)), ', ' ORDER BY a.attnum), \
    string_agg(format('%I %s', a.attname, format_type(a.atttypid, a.atttypmod)), ', ' ORDER BY a.attnum) \
    FROM pg_catalog.pg_attribute AS a \
    WHERE a.attrelid = $1::text::regclass AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = '' \
    AND a.attname::text IN (SELECT json_object_keys($2::text::json))";

/// The note of a row that needs no parent.
pub(super) const KEPT: &str = "not restored: the row has a parent, or is gone";

/// A row that was there.
#[derive(Deserialize)]
struct Parent {
    schema: String,
    table: String,
    /// Its values' texts.
    values: Option<Box<RawValue>>,
    /// As older releases kept it: the row as JSON.
    row: Option<Box<RawValue>>,
}

/// What became of a line.
pub(super) enum Restored {
    /// It is done with, and this is its note.
    Noted(&'static str),
    /// It is left to another member.
    LeftTo(NodeId),
}

/// Inserts the parent of a line's row, and what that refers to, while the row has none, if it is this node's turn.
pub(super) async fn restore(
    transaction: &Transaction<'_>,
    line: &Line,
    key: &ForeignKey,
    keys: &[ForeignKey],
    mut turn: Turn<'_>,
) -> Result<Restored, Error> {
    let noted = |note| Ok(Restored::Noted(note));
    let Some(orphan) = orphan(transaction, line, key).await? else {
        return noted("not restored: the row's key is redacted in the log");
    };
    let table = qualified(&line.schema, &line.table);
    let is_orphan = format!("SELECT FROM ONLY {table} AS t WHERE {orphan} FOR KEY SHARE OF t");
    if transaction.query_opt(&is_orphan, &[&line.key]).await?.is_none() {
        return noted(KEPT);
    }
    let Some(parents) = &line.parents else {
        return noted("not restored: this node does not know what the parent was");
    };
    let left_to = turn.left_to(transaction, line, keys).await?;
    // What keeps the parent away for good is found at once then, and is not waited for.
    if let Some(node) = left_to.filter(|_| !turn.is_to_try(line)) {
        return Ok(Restored::LeftTo(node));
    }
    let mut inserts = Vec::new();
    for parent in serde_json::from_str::<Vec<Parent>>(parents)? {
        inserts.extend(insert(transaction, parent).await?);
    }
    transaction
        .batch_execute(&format!("SAVEPOINT parents; {}", pg::AS_USERS))
        .await?;
    for (sql, json) in inserts {
        transaction.execute(&sql, &[&json.get()]).await?;
    }
    if transaction.query_opt(&is_orphan, &[&line.key]).await?.is_some() {
        transaction.batch_execute("ROLLBACK TO SAVEPOINT parents").await?;
        return noted("not restored: another row has a value of a unique key that the parent had");
    }
    Ok(match left_to {
        Some(node) => Restored::LeftTo(node),
        None => Restored::Noted("restored here"),
    })
}

/// The statement that inserts a row, and its parameter; none for a row that is not told.
async fn insert(
    transaction: &Transaction<'_>,
    parent: Parent,
) -> Result<Option<(String, Box<RawValue>)>, Error> {
    let table = qualified(&parent.schema, &parent.table);
    let (json, is_text) = match (parent.values, parent.row) {
        (Some(values), _) => (values, true),
        (None, Some(row)) => (row, false),
        (None, None) => return Ok(None),
    };
    let columns = transaction.query_one(COLUMNS, &[&table, &json.get()]).await?;
    let text = |at: usize| columns.try_get::<_, Option<String>>(at);
    let (Some(names), Some(values), Some(texts), Some(typed)) = (text(0)?, text(1)?, text(2)?, text(3)?)
    else {
        return Ok(None);
    };
    let (values, from) = if is_text {
        (texts, "(SELECT $1::text::jsonb AS j) AS r".to_owned())
    } else {
        let from = format!("pg_catalog.json_to_record($1::text::json) AS r ({typed})");
        (values, from)
    };
    let sql = format!(
        "INSERT INTO {table} ({names}) OVERRIDING SYSTEM VALUE SELECT {values} FROM {from} ON CONFLICT DO NOTHING"
    );
    Ok(Some((sql, json)))
}
