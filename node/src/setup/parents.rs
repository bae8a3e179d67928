//! Parents that come back (`foreign_keys = "restore_parent"`), and columns of theirs whose values would come back twice.
//!
//! In:   the catalog, the policy      Out: findings
//! Not here: bringing them back (`crate::daemon`)
//!
//! Of the nodes that wrote children of one parent one alone inserts it again. But one row may be the parent of rows that only its own
//! restorer knows of (an order that comes back brings its customer along, while another node brings back the customer for its address),
//! and an application may insert it at the same time. Inserted twice, unseen, a row becomes the later of both, and nothing is wrong
//! with it; but where a column is merged by a rule that puts together what each has written, such as `delta`, it has its value twice.

use std::collections::BTreeMap;

use anabranch_conflict::policy::{ForeignKeys, Policies};
use tokio_postgres::Client;

use super::finding::Finding;
use crate::apply::foreign::{self, ForeignKey, TableName};

/// Looks at every table whose rows may be brought back.
///
/// # Errors
/// When the catalog cannot be read.
pub async fn examine(client: &Client, policies: &Policies) -> Result<Vec<Finding>, tokio_postgres::Error> {
    if !policies.mends_orphans() || !policies.merges_columns() {
        return Ok(Vec::new());
    }
    Ok(judge(&foreign::load(client).await?, policies))
}

fn judge(keys: &[ForeignKey], policies: &Policies) -> Vec<Finding> {
    let restores =
        |(schema, table): &TableName| policies.of(schema, table).foreign_keys == ForeignKeys::RestoreParent;
    let restored = restored(keys, restores);
    let found = restored.into_iter().filter_map(|((schema, table), child)| {
        let columns = policies.of(schema, table).columns.as_ref()?;
        let (column, rule) = columns.rules.iter().find(|(_, rule)| rule.makes_values())?;
        Some(Finding::fail(
            format!("table {schema}.{table}"),
            format!(
                "its rows are brought back for those of {}.{} (foreign_keys = \"restore_parent\"), and column `{column}` is merged by \
                 {rule}: where two nodes bring one back at once, its value counts twice",
                child.0, child.1
            ),
            format!(
                "give {}.{} foreign_keys = \"keep\" or \"delete_child\" in the policy file, or drop the column's rule",
                child.0, child.1
            ),
        ))
    });
    found.collect()
}

/// The tables whose rows may be brought back, each with a table whose rows that is done for.
fn restored(keys: &[ForeignKey], restores: impl Fn(&TableName) -> bool) -> BTreeMap<&TableName, &TableName> {
    let mut out = BTreeMap::new();
    let children = keys.iter().flat_map(|key| &key.children);
    let mut todo: Vec<(&TableName, &TableName)> = children
        .filter(|child| restores(child))
        .map(|child| (child, child))
        .collect();
    while let Some((table, child)) = todo.pop() {
        for key in keys.iter().filter(|key| key.children.contains(table)) {
            for parent in &key.parents {
                if out.insert(parent, child).is_none() {
                    todo.push((parent, child));
                }
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(name: &str) -> TableName {
        ("public".to_owned(), name.to_owned())
    }

    fn key(child: &str, parent: &str) -> ForeignKey {
        ForeignKey {
            name: format!("{child}_{parent}_fkey"),
            child_rows: format!("ONLY public.{child}"),
            children: vec![table(child)],
            parent: format!("public.{parent}"),
            parent_rows: format!("ONLY public.{parent}"),
            parents: vec![table(parent)],
            pairs: Vec::new(),
            to_primary: true,
            is_indexed: true,
        }
    }

    fn judged(policy: &str) -> Vec<String> {
        let keys = [
            key("line", "orders"),
            key("orders", "customer"),
            key("tree", "tree"),
        ];
        let policies = Policies::parse(policy, &BTreeMap::new(), |_| Err(String::new())).unwrap();
        let findings = judge(&keys, &policies);
        findings.into_iter().map(|finding| finding.check).collect()
    }

    #[test]
    fn sums_of_rows_that_are_brought_back_are_refused_by_any_number_of_steps() {
        let sums = "[[table]]\nname = \"public.customer\"\ncolumns = { balance = \"delta\" }";
        let restores = |name: &str| {
            format!("[[table]]\nname = \"public.{name}\"\nforeign_keys = \"restore_parent\"\n{sums}")
        };
        assert_eq!(judged(&restores("line")), ["table public.customer"]);
        assert_eq!(judged(&restores("orders")), ["table public.customer"]);
        assert!(judged(&restores("tree")).is_empty());
        assert!(judged(&restores("line").replace("delta", "max")).is_empty());
        assert!(judged(&restores("line").replace("restore_parent", "delete_child")).is_empty());
    }
}
