//! What merged columns need of a table: the columns that the policy names, of types that can be merged, and updates that
//! tell the row before.
//!
//! In:   the catalog, the policy      Out: findings
//! Not here: what merging is (`anabranch-conflict`), setting the identity (`super::plan`), constraints ([`super::together`])

use std::collections::BTreeMap;

use anabranch_conflict::policy::Policies;
use anabranch_proto::schema::{ColumnDesc, TableDesc};
use tokio_postgres::Client;

use super::finding::Finding;

/// Of every ordinary table its columns, and their place in the primary key (-1: none).
const COLUMNS: &str = "
SELECT n.nspname::text, c.relname::text, c.relreplident::text, a.attname::text, a.atttypid, a.atttypmod,
    format_type(a.atttypid, a.atttypmod),
    coalesce((SELECT array_position(i.indkey::int2[], a.attnum) FROM pg_index i
              WHERE i.indrelid = c.oid AND i.indisprimary), -1)::int4
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
WHERE c.relkind = 'r' AND n.nspname !~ '^pg_' AND n.nspname NOT IN ('information_schema', 'anabranch')
ORDER BY c.oid, a.attnum";

/// What does not fit.
#[derive(Debug, Clone, Default)]
pub struct Unfit {
    /// Columns that the policy names and that are not there, or cannot be merged so. What is left is merged without them.
    pub columns: Vec<Finding>,
    /// Tables whose updates do not tell the row before. What they say is taken for more than it is.
    pub identity: Vec<Finding>,
}

/// Looks at every table whose columns are merged.
///
/// # Errors
/// When the catalog cannot be read.
pub async fn examine(client: &Client, policies: &Policies) -> Result<Vec<Finding>, tokio_postgres::Error> {
    let Unfit { columns, identity } = unfit(client, policies).await?;
    Ok([columns, identity].concat())
}

/// All that does not fit policies that merge columns: what [`examine`] finds, and constraints that merging could break.
///
/// # Errors
/// When the catalog cannot be read.
pub async fn misfits(client: &Client, policies: &Policies) -> Result<Vec<Finding>, tokio_postgres::Error> {
    let mut findings = super::together::examine(client, policies).await?;
    findings.extend(examine(client, policies).await?);
    Ok(findings)
}

/// As [`examine`], apart.
///
/// # Errors
/// When the catalog cannot be read.
pub async fn unfit(client: &Client, policies: &Policies) -> Result<Unfit, tokio_postgres::Error> {
    let mut out = Unfit::default();
    if !policies.merges_columns() {
        return Ok(out);
    }
    let mut tables: BTreeMap<(String, String), TableDesc> = BTreeMap::new();
    for row in client.query(COLUMNS, &[]).await? {
        let (schema, name): (String, String) = (row.try_get(0)?, row.try_get(1)?);
        let identity: String = row.try_get(2)?;
        let table = tables
            .entry((schema.clone(), name.clone()))
            .or_insert_with(|| TableDesc {
                schema,
                name,
                columns: Vec::new(),
                key: Vec::new(),
                identity_full: identity == "f",
            });
        let column: String = row.try_get(3)?;
        if row.try_get::<_, i32>(7)? >= 0 {
            table
                .key
                .push(u16::try_from(table.columns.len()).unwrap_or(u16::MAX));
        }
        table.columns.push(ColumnDesc {
            name: column,
            type_oid: row.try_get(4)?,
            type_mod: row.try_get(5)?,
            type_name: row.try_get(6)?,
        });
    }
    for table in tables.values() {
        judge(table, policies, &mut out);
    }
    Ok(out)
}

fn judge(table: &TableDesc, policies: &Policies, out: &mut Unfit) {
    let Some(columns) = &policies.of(&table.schema, &table.name).columns else {
        return;
    };
    let check = || format!("table {}.{}", table.schema, table.name);
    for misfit in columns.misfits(table) {
        let remedy = "mend the table's columns in the policy file, at every node: `anabranch policy show`";
        out.columns
            .push(Finding::fail(check(), misfit.to_string(), remedy));
    }
    if !table.identity_full {
        out.identity.push(Finding::fail(
            check(),
            "its columns are merged, and its replica identity is not FULL: an UPDATE does not tell what it changed",
            "run `anabranch init` again, which sets it",
        ));
    }
}
