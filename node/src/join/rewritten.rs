//! Were the donor's tables rewritten since the snapshot was cut?
//!
//! In:   a session on the donor's snapshot        Out: which tables' rows are elsewhere now
//! Invariants: asked when all is copied. A rewrite (ALTER TABLE of a type, TRUNCATE) leaves nothing that an older snapshot can see, and
//!        says nothing of it; VACUUM FULL moves rows past ranges of ctid. <https://www.postgresql.org/docs/current/mvcc-caveats.html>
//! Not here: reading ([`super::copy`])

use tokio_postgres::Client;

use super::{Error, sql};

/// Tables of the snapshot whose rows are elsewhere now: a plain query sees the catalog of the snapshot, the function today's.
const MOVED: &str = "
    SELECT format('%I.%I', n.nspname, c.relname) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relkind = 'r' AND n.nspname !~ '^pg_'
      AND n.nspname NOT IN ('information_schema', 'anabranch', 'anabranch_ddl', 'anabranch_join')
      AND pg_relation_filenode(c.oid) IS DISTINCT FROM c.relfilenode
    ORDER BY 1";

/// Says what was rewritten, emptied or dropped since the cut, if anything was: then what was copied is of no use.
pub(super) async fn rewritten(client: &Client) -> Result<Option<String>, Error> {
    let moved: Vec<String> = client
        .query(MOVED, &[])
        .await
        .and_then(|rows| rows.iter().map(|row| row.try_get(0)).collect())
        .map_err(sql("look whether the donor's tables were rewritten"))?;
    Ok((!moved.is_empty()).then(|| format!("{} was rewritten or emptied", moved.join(", "))))
}
