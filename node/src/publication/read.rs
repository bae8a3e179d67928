//! The publication as the catalog has it.

use std::collections::{BTreeMap, BTreeSet};

use anabranch_proto::schema::full_name;
use tokio_postgres::{Client, Row};

use super::Listed;

/// One look.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Now {
    /// None: there is no publication of that name.
    pub(crate) published: Option<Published>,
    /// Every transaction below this had ended, 64 bits.
    pub(crate) xmin: u64,
    /// Every transaction from here on had not begun, 64 bits.
    pub(crate) xmax: u64,
    /// [`full_name`] of what was taken out of replication here by `anabranch tables remove`.
    pub(crate) removed: BTreeSet<String>,
    /// Ordinary tables of this database, each by its [`full_name`].
    pub(crate) relations: BTreeMap<u32, String>,
}

/// A publication.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Published {
    pub(crate) oid: u32,
    /// Who wrote its row.
    pub(crate) xmin: u32,
    /// INSERT, UPDATE, DELETE and TRUNCATE.
    pub(crate) all_operations: bool,
    pub(crate) via_root: bool,
    /// FOR ALL TABLES or TABLES IN SCHEMA.
    pub(crate) open_ended: bool,
    /// Stored generated columns are published.
    pub(crate) generated: bool,
    /// Those that hold rows, by oid.
    pub(crate) tables: BTreeMap<u32, Table>,
}

/// A table of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Table {
    pub(crate) listed: Listed,
    /// It has a row filter or a column list.
    pub(crate) filtered: bool,
}

impl Published {
    pub(super) fn listed(&self) -> BTreeMap<u32, Listed> {
        let tables = self.tables.iter();
        tables.map(|(oid, table)| (*oid, table.listed.clone())).collect()
    }
}

const PUBLICATION: &str = "SELECT p.oid, p.xmin::text::int8, pubinsert AND pubupdate AND pubdelete AND pubtruncate, pubviaroot, \
    puballtables OR EXISTS (SELECT FROM pg_publication_namespace WHERE pnpubid = p.oid), \
    coalesce(to_jsonb(p) ->> 'pubgencols' = 's', false) \
    FROM pg_publication p WHERE pubname = $1";

/// Those listed, and partitions of those listed. Takes no locks, so that it waits for nobody.
const TABLES: &str = "WITH RECURSIVE listed AS ( \
        SELECT oid AS entry, prrelid AS rel, prattrs IS NOT NULL OR prqual IS NOT NULL AS filtered \
        FROM pg_publication_rel WHERE prpubid = $1 \
        UNION \
        SELECT l.entry, i.inhrelid, l.filtered FROM listed l JOIN pg_class c ON c.oid = l.rel AND c.relkind = 'p' \
        JOIN pg_inherits i ON i.inhparent = l.rel) \
    SELECT c.oid, n.nspname::text, c.relname::text, array_agg(DISTINCT l.entry), bool_or(l.filtered) \
    FROM listed l JOIN pg_class c ON c.oid = l.rel JOIN pg_namespace n ON n.oid = c.relnamespace \
    WHERE c.relkind = 'r' GROUP BY 1, 2, 3";

const SNAPSHOT: &str = "SELECT pg_snapshot_xmin(s)::text::int8, pg_snapshot_xmax(s)::text::int8, \
    to_regclass('anabranch.removed_table') IS NOT NULL FROM pg_current_snapshot() s";

const RELATIONS: &str = "SELECT c.oid, n.nspname::text, c.relname::text FROM pg_class c JOIN pg_namespace n \
    ON n.oid = c.relnamespace WHERE c.relkind = 'r' AND n.nspname NOT IN ('pg_catalog', 'information_schema', 'pg_toast')";

/// Looks. The session must be in no transaction; after an error it may be left in one.
///
/// # Errors
/// When the server answers with one.
pub(crate) async fn now(sql: &Client, publication: &str) -> Result<Now, tokio_postgres::Error> {
    sql.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
        .await?;
    let number = |number: i64| u64::try_from(number).unwrap_or(0);
    let row = sql.query_one(SNAPSHOT, &[]).await?;
    let mut now = Now {
        xmin: number(row.try_get(0)?),
        xmax: number(row.try_get(1)?),
        ..Now::default()
    };
    if row.try_get(2)? {
        for row in sql
            .query("SELECT schema_name, table_name FROM anabranch.removed_table", &[])
            .await?
        {
            now.removed.insert(named(&row, 0)?);
        }
    }
    if let Some(row) = sql.query_opt(PUBLICATION, &[&publication]).await? {
        let oid = row.try_get(0)?;
        now.published = Some(Published {
            oid,
            xmin: u32::try_from(row.try_get::<_, i64>(1)?).unwrap_or(0),
            all_operations: row.try_get(2)?,
            via_root: row.try_get(3)?,
            open_ended: row.try_get(4)?,
            generated: row.try_get(5)?,
            tables: tables(sql, oid).await?,
        });
    }
    for row in sql.query(RELATIONS, &[]).await? {
        now.relations.insert(row.try_get(0)?, named(&row, 1)?);
    }
    sql.batch_execute("COMMIT").await?;
    Ok(now)
}

/// The name of a table whose schema and name are in these columns.
fn named(row: &Row, at: usize) -> Result<String, tokio_postgres::Error> {
    Ok(full_name(row.try_get(at)?, row.try_get(at + 1)?))
}

async fn tables(sql: &Client, publication: u32) -> Result<BTreeMap<u32, Table>, tokio_postgres::Error> {
    let mut tables = BTreeMap::new();
    for row in sql.query(TABLES, &[&publication]).await? {
        let entries: Vec<u32> = row.try_get(3)?;
        let listed = Listed {
            name: named(&row, 1)?,
            entries: entries.into_iter().collect(),
        };
        let filtered = row.try_get(4)?;
        tables.insert(row.try_get(0)?, Table { listed, filtered });
    }
    Ok(tables)
}
