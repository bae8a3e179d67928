//! Exclusion constraints, which concurrent writers can break together, and no rule can mend alike at all nodes.
//!
//! In:   the catalog, the policy      Out: findings, which say what to write into the policy file
//! Not here: rows that the server refuses for one (`crate::apply`: quarantine, and a line `exclusion_violation`)
//!
//! Unique keys of periods (18, `WITHOUT OVERLAPS`) are some, too. Clusters have them that were made before that was asked for: what is
//! replicated with one already, and who joins it, is told, as of keys without claims ([`super::pairwise`]). Of the others it was asked for
//! all along.

use anabranch_conflict::policy::Policies;
use tokio_postgres::Client;

use super::facts::Facts;
use super::finding::{Finding, Level};
use super::select::Selection;
use super::table::Table;
use super::tables::is_published;

/// The published tables that have some, and how many.
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
    judged(selection, policies, |_| false)
}

/// The same for who makes tables replicated ones.
pub(super) fn planned(selection: &Selection<'_>, facts: &Facts, policies: &Policies) -> Vec<Finding> {
    judged(selection, policies, |table| is_published(facts, table))
}

/// The same for who takes over tables that a cluster has.
pub(super) fn told(selection: &Selection<'_>, policies: &Policies) -> Vec<Finding> {
    judged(selection, policies, |_| true)
}

/// `is_had`: a cluster has the table already.
fn judged(selection: &Selection<'_>, policies: &Policies, is_had: impl Fn(&Table) -> bool) -> Vec<Finding> {
    let of = |table: &&Table| {
        let finding = finding(&table.schema, &table.name, table.exclusions, policies)?;
        Some(match only_told(is_had(table), table.exclusions, table.periods) {
            true => finding.told(),
            false => finding,
        })
    };
    selection.all.iter().filter_map(of).collect()
}

/// Was none of a table's constraints asked for when the cluster got it? `periods` of them are unique keys of periods.
fn only_told(is_had: bool, exclusions: i32, periods: i32) -> bool {
    is_had && exclusions == periods
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_unique_key_of_periods_is_only_told_of_where_the_cluster_has_the_table() {
        let policies = Policies::default();
        let refused = finding("public", "stay", 1, &policies).unwrap();
        assert_eq!(refused.level, Level::Fail);
        let told = refused.clone().told();
        assert_eq!((told.level, &told.found), (Level::Warn, &refused.found));
        assert!(only_told(true, 1, 1) && !only_told(false, 1, 1));
        // Of a constraint of another kind it was asked for all along.
        assert!(!only_told(true, 1, 0) && !only_told(true, 2, 1));
    }
}
