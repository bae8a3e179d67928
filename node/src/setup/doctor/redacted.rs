//! Columns that are to be kept out of the conflict log: are they there? A name that is none hides nothing, which nobody would notice.
//!
//! In:   `conflict_log.redact`, the catalog            Out: a [`Finding`]
//! Not here: leaving them out (`crate::apply`)

use tokio_postgres::Client;

use super::super::describe;
use super::super::finding::Finding;
use crate::config::ConflictLog;

/// Names of which no table that holds rows has the column. Those of a partitioned table are under its partitions' names.
const MISSING: &str = "SELECT r.name FROM unnest($1::text[]) AS r (name) WHERE NOT EXISTS ( \
    SELECT FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid JOIN pg_namespace n ON n.oid = c.relnamespace \
    WHERE c.relkind = 'r' AND a.attnum > 0 AND NOT a.attisdropped AND concat_ws('.', n.nspname, c.relname, a.attname) = r.name) ORDER BY 1";

pub(super) async fn examine(client: &Client, log: &ConflictLog) -> Option<Finding> {
    const CHECK: &str = "conflict_log.redact";
    if log.redact.is_empty() {
        return None;
    }
    let read = async {
        let rows = client.query(MISSING, &[&log.redact]).await?;
        let names = rows.iter().map(|row| row.try_get::<_, String>(0));
        names.collect::<Result<Vec<String>, tokio_postgres::Error>>()
    };
    Some(match read.await {
        Err(error) => Finding::warn(CHECK, describe(&error), "see the server's log"),
        Ok(missing) if missing.is_empty() => Finding::ok(
            CHECK,
            format!("{} column(s), all of them there", log.redact.len()),
        ),
        Ok(missing) => Finding::warn(
            CHECK,
            format!(
                "no table with rows has {}: nothing is left out for that",
                missing.join(", ")
            ),
            "write schema.table.column as the catalog has them, without quotes; for a partitioned table name each of its partitions",
        ),
    })
}
