//! Unique keys beside the primary one that no claim decides (`docs/design.md`, section 5): of two rows with one value the later stays where
//! they meet, and nodes where others meet, or the same ones at another time, can end with other rows.
//!
//! In:   the catalog, the policy      Out: findings, which say what to write into the policy file
//! Not here: claims (`crate::resolve`), which of two rows stays (`crate::apply`), keys that merging could break ([`super::together`])

use std::collections::{BTreeMap, BTreeSet};

use anabranch_conflict::policy::Policies;
use tokio_postgres::Client;

use super::facts::Facts;
use super::finding::{Finding, Level};
use super::select::Selection;
use super::table::Table;
use super::tables::is_published;
use crate::apply::catalog::unique_keys;
use crate::resolve::UniqueKeys;

/// The unique indexes of ordinary tables by which a row can be refused for another one: not those that have all of the primary key in
/// them, since two rows differ in that, and not those of periods (`WITHOUT OVERLAPS`), which are exclusion constraints.
const KEYS: &str = "
SELECT n.nspname::text, c.relname::text, x.relname::text, c.oid, coalesce(pg_partition_root(c.oid)::oid, c.oid)
FROM pg_index i JOIN pg_class c ON c.oid = i.indrelid JOIN pg_namespace n ON n.oid = c.relnamespace
JOIN pg_class x ON x.oid = i.indexrelid
WHERE i.indisunique AND NOT i.indisprimary AND NOT i.indisexclusion AND i.indisvalid AND c.relkind = 'r'
    AND n.nspname !~ '^pg_' AND n.nspname NOT IN ('information_schema', 'anabranch')
    AND EXISTS (
        SELECT FROM pg_index k
        CROSS JOIN LATERAL unnest(k.indkey::int2[], k.indclass::oid[], k.indcollation::oid[])
            WITH ORDINALITY p (number, class, collation_oid, place)
        WHERE k.indrelid = i.indrelid AND k.indisprimary AND p.place <= k.indnkeyatts AND NOT EXISTS (
            SELECT FROM unnest(i.indkey::int2[], i.indclass::oid[], i.indcollation::oid[])
                WITH ORDINALITY u (number, class, collation_oid, place)
            WHERE u.place <= i.indnkeyatts
                AND (u.number, u.class, u.collation_oid) = (p.number, p.class, p.collation_oid)))
ORDER BY 1, 2, 3";

/// The published tables, partitions included.
const PUBLISHED: &str =
    "SELECT schemaname::text, tablename::text FROM pg_publication_tables WHERE pubname = $1";

/// What opts into it.
const ACCEPTED: &str = "unique_keys = \"pairwise\"";

/// A unique key by which a row can be refused for another one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Key {
    /// Name of its index.
    pub name: String,
    /// Can the daemon compare its values?
    pub is_compared: bool,
}

/// A table, by oid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    oid: u32,
    /// The partitioned table that has no other one above it; the table itself where it is no partition.
    root: u32,
}

/// A table that has such keys.
#[derive(Debug)]
pub(super) struct Keyed {
    place: Place,
    /// Those keys.
    pub(super) keys: Vec<Key>,
}

/// All such tables, by schema and name.
pub(super) type Keys = BTreeMap<(String, String), Keyed>;

/// Reads them. `compared` are the keys whose values the daemon can compare.
pub(super) async fn read(client: &Client, compared: &UniqueKeys) -> Result<Keys, tokio_postgres::Error> {
    let mut keys = Keys::new();
    for row in client.query(KEYS, &[]).await? {
        let table: (String, String) = (row.try_get(0)?, row.try_get(1)?);
        let name: String = row.try_get(2)?;
        let mut of_table = compared.get(&table).into_iter().flatten();
        let is_compared = of_table.any(|key| *key.name == *name);
        let place = Place {
            oid: row.try_get(3)?,
            root: row.try_get(4)?,
        };
        let keyed = keys.entry(table).or_insert_with(|| Keyed {
            place,
            keys: Vec::new(),
        });
        keyed.keys.push(Key { name, is_compared });
    }
    Ok(keys)
}

/// Looks at every published table: what the policy does not accept.
///
/// # Errors
/// When the catalog cannot be read.
pub async fn examine(
    client: &Client,
    publication: &str,
    policies: &Policies,
) -> Result<Vec<Finding>, tokio_postgres::Error> {
    let compared = unique_keys(client).await?;
    among(client, publication, policies, &compared).await
}

/// As [`examine`], where it has been read which keys the daemon can compare by.
pub(crate) async fn among(
    client: &Client,
    publication: &str,
    policies: &Policies,
    compared: &UniqueKeys,
) -> Result<Vec<Finding>, tokio_postgres::Error> {
    let found = placed(client, publication, policies, compared).await?;
    Ok(found.into_iter().map(|(_, finding)| finding).collect())
}

/// As [`among`], with the table that each finding is of.
pub(super) async fn placed(
    client: &Client,
    publication: &str,
    policies: &Policies,
    compared: &UniqueKeys,
) -> Result<Vec<(Place, Finding)>, tokio_postgres::Error> {
    let mut found: Vec<((String, String), (Place, Finding))> = Vec::new();
    for (table, Keyed { place, keys }) in read(client, compared).await? {
        let finding = finding(&table.0, &table.1, &keys, policies);
        let refused = finding.filter(|it| it.level == Level::Fail);
        found.extend(refused.map(|it| (table, (place, it))));
    }
    if found.is_empty() {
        return Ok(Vec::new());
    }
    let mut published: BTreeSet<(String, String)> = BTreeSet::new();
    for row in client.query(PUBLISHED, &[&publication]).await? {
        published.insert((row.try_get(0)?, row.try_get(1)?));
    }
    found.retain(|(table, _)| published.contains(table));
    Ok(found.into_iter().map(|(_, placed)| placed).collect())
}

/// The findings of `now` of which there was none before of the same table, whatever it is called, or of another partition of the same one:
/// what was let in there is not the doing of who renames the table or adds a partition.
pub(super) fn come_since(had: &[(Place, Finding)], now: Vec<(Place, Finding)>) -> Vec<Finding> {
    let is_known = |place: &Place| {
        let mut places = had.iter().map(|(place, _)| place);
        places.any(|before| before.oid == place.oid || before.root == place.root)
    };
    let come = now.into_iter().filter(|(place, _)| !is_known(place));
    come.map(|(_, finding)| finding).collect()
}

/// Of the tables that are selected.
pub(super) fn findings(selection: &Selection<'_>, policies: &Policies) -> Vec<Finding> {
    selection
        .all
        .iter()
        .filter_map(|table| of(table, policies))
        .collect()
}

/// The same for who makes tables replicated ones. A table that is one already is not in the way of anything else: it is an alarm of the
/// daemon, and a failed check of `doctor`.
pub(super) fn planned(selection: &Selection<'_>, facts: &Facts, policies: &Policies) -> Vec<Finding> {
    let of = |table: &&Table| {
        let finding = of(table, policies)?;
        Some(match is_published(facts, table) {
            true => finding.told(),
            false => finding,
        })
    };
    selection.all.iter().filter_map(of).collect()
}

/// The same for who takes over tables that a cluster has.
pub(super) fn told(selection: &Selection<'_>, policies: &Policies) -> Vec<Finding> {
    let findings = findings(selection, policies);
    findings.into_iter().map(Finding::told).collect()
}

fn of(table: &Table, policies: &Policies) -> Option<Finding> {
    finding(&table.schema, &table.name, &table.unique_keys, policies)
}

/// A table with these keys.
fn finding(schema: &str, table: &str, keys: &[Key], policies: &Policies) -> Option<Finding> {
    let policy = policies.of(schema, table);
    let is_claimed = policy.is_last_writer();
    let names: Vec<String> = keys
        .iter()
        .filter(|key| !(is_claimed && key.is_compared))
        .map(|key| format!("\"{}\"", key.name))
        .collect();
    if names.is_empty() {
        return None;
    }
    let (why, otherwise) = if is_claimed {
        (
            "the daemon cannot compare the values (of generated columns, of other expressions or with other predicates than it knows, or \
             of types in which equal values can look different)",
            "keep such a value in a column of a plain type with a unique constraint of its own, or drop the key",
        )
    } else {
        (
            "the table has a policy other than last_update_wins",
            "give the table the policy last_update_wins, or drop the key",
        )
    };
    let check = format!("table {schema}.{table}");
    let found = format!(
        "unique key(s) {}: {why}, so of rows of two nodes that have one value nodes can keep different ones (three that claim each \
         other's, or one that gives its value up again)",
        names.join(", ")
    );
    Some(if policy.decides_pairwise() {
        Finding::warn(
            check,
            found,
            format!(
                "accepted by {ACCEPTED}: look at `anabranch conflicts list --type multiple_unique_conflicts`; `anabranch verify` finds \
                 rows that differ, `anabranch repair` makes them equal"
            ),
        )
    } else {
        Finding::fail(
            check,
            found,
            format!(
                "{otherwise}; or accept it, as where each such value is written at one node alone, in the policy file: [[table]] with \
                 name and {ACCEPTED}"
            ),
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(rule: &str) -> Option<Finding> {
        let text = format!("[[table]]\nname = \"public.t\"\n{rule}");
        let policies = Policies::parse(&text, &BTreeMap::new(), |_| Err(String::new())).unwrap();
        let key = |name: &str, is_compared| Key {
            name: name.to_owned(),
            is_compared,
        };
        let keys = [key("t_code", true), key("t_md5", false)];
        finding("public", "t", &keys, &policies)
    }

    #[test]
    fn keys_without_claims_are_refused_by_name_with_what_accepts_them() {
        for (rule, named, why, otherwise) in [
            ("", "unique key(s) \"t_md5\":", "cannot compare", "a plain type"),
            (
                "policy = \"first_update_wins\"",
                "unique key(s) \"t_code\", \"t_md5\":",
                "other than last_update_wins",
                "the policy last_update_wins, or drop the key",
            ),
            (
                "deletes = \"delete_wins\"",
                "\"t_code\"",
                "other than",
                "last_update_wins",
            ),
            (
                "columns = { n = \"delta\" }",
                "\"t_code\"",
                "other than",
                "last_update_wins",
            ),
        ] {
            let refused = judged(rule).unwrap();
            assert_eq!(refused.level, Level::Fail, "{rule}");
            assert!(
                refused.found.contains(named) && refused.found.contains(why),
                "{refused:?}"
            );
            assert!(
                refused.remedy.contains(otherwise) && refused.remedy.contains(ACCEPTED),
                "{refused:?}"
            );
            let accepted = judged(&format!("{ACCEPTED}\n{rule}")).unwrap();
            assert_eq!((accepted.level, accepted.found), (Level::Warn, refused.found));
        }
    }

    #[test]
    fn what_a_table_or_a_partition_beside_it_had_before_has_not_come_since() {
        let placed = |name: &str, oid, root| {
            let finding = Finding::fail(name, "unique key(s)", "drop the key");
            (Place { oid, root }, finding)
        };
        let had = [placed("item", 1, 1), placed("part_1", 11, 10)];
        let now = vec![
            // Renamed; detached; a partition more; one of another table; a table that is attached elsewhere.
            placed("thing", 1, 1),
            placed("part_1", 11, 11),
            placed("part_2", 12, 10),
            placed("other_1", 21, 20),
            placed("item", 1, 20),
            placed("fresh", 2, 2),
        ];
        let come: Vec<String> = come_since(&had, now).into_iter().map(|it| it.check).collect();
        assert_eq!(come, ["other_1", "fresh"]);
    }

    #[test]
    fn keys_with_claims_are_found_in_nobodys_way() {
        let policies = Policies::default();
        let keys = [Key {
            name: "t_code".to_owned(),
            is_compared: true,
        }];
        assert_eq!(finding("public", "t", &keys, &policies), None);
        assert_eq!(finding("public", "t", &[], &policies), None);
    }
}
