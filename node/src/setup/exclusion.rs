//! Exclusion constraints, which concurrent writers can break together, and no rule can mend alike at all nodes.
//!
//! In:   the catalog, the policy      Out: findings, which say what to write into the policy file
//! Not here: rows that the server refuses for one (`crate::apply`: quarantine, and a line `exclusion_violation`)

use anabranch_conflict::policy::Policies;
use tokio_postgres::Client;

use super::finding::{Finding, Level};
use super::select::Selection;
use super::table::Table;

/// The published tables that have some, and how many: unique keys of periods (18, `WITHOUT OVERLAPS`) are some, too.
const EXCLUSIONS: &str = "
SELECT p.schemaname::text, p.tablename::text, count(*)::int4
FROM pg_publication_tables p JOIN pg_namespace n ON n.nspname = p.schemaname
JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = p.tablename
JOIN pg_index i ON i.indrelid = c.oid AND i.indisexclusion AND NOT i.indisprimary
WHERE p.pubname = $1 GROUP BY 1, 2 ORDER BY 1, 2";

/// Looks at every published table.
///
/// # Errors
/// When the catalog cannot be read.
pub async fn examine(
    client: &Client,
    publication: &str,
    policies: &Policies,
) -> Result<Vec<Finding>, tokio_postgres::Error> {
    let mut out = Vec::new();
    for row in client.query(EXCLUSIONS, &[&publication]).await? {
        let (schema, table): (String, String) = (row.try_get(0)?, row.try_get(1)?);
        out.extend(
            finding(&schema, &table, row.try_get(2)?, policies)
                .filter(|finding| finding.level == Level::Fail),
        );
    }
    Ok(out)
}

/// Of the tables that are selected.
pub(super) fn findings(selection: &Selection<'_>, policies: &Policies) -> Vec<Finding> {
    let of = |table: &&Table| finding(&table.schema, &table.name, table.exclusions, policies);
    selection.all.iter().filter_map(of).collect()
}

/// A table with so many exclusion constraints.
fn finding(schema: &str, table: &str, count: i32, policies: &Policies) -> Option<Finding> {
    if count == 0 {
        return None;
    }
    let check = format!("table {schema}.{table}");
    let found = format!("has {count} exclusion constraint(s)");
    Some(if policies.of(schema, table).quarantines_excluded() {
        Finding::warn(
            check,
            found,
            "of rows that exclude each other each node keeps the one that it has, and the other is in its quarantine, with a line, \
             until somebody removes one of both; look at `anabranch conflicts list --type exclusion_violation`",
        )
    } else {
        Finding::fail(
            check,
            format!("{found}: rows of two nodes that exclude each other could never be the same everywhere"),
            "drop them, leave the table out of postgres.tables, or accept that such rows wait in the quarantine, in the policy file: \
             [[table]] with name and exclusion_constraints = \"quarantine\"",
        )
    })
}
