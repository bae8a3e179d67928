//! What merged columns need of a table: the columns that the policy names, of types that can be merged and stay as they are, and
//! updates that tell the row before.
//!
//! In:   the catalog, the policy      Out: findings
//! Not here: what merging is (`anabranch-conflict`), setting the identity (`super::plan`), constraints ([`super::together`])

use std::collections::BTreeMap;

use anabranch_conflict::columns::ColumnRule;
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
    if policies.merges_columns() {
        for table in tables(client).await? {
            judge(&table, policies, &mut out);
        }
    }
    Ok(out)
}

/// All ordinary tables, with the types' names as people call them.
async fn tables(client: &Client) -> Result<impl Iterator<Item = TableDesc>, tokio_postgres::Error> {
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
    Ok(tables.into_values())
}

/// Of which types the columns are that have a rule of their own, by table and column. Of what was written before a type is changed and
/// of what is written after it one row may be made, and the one is no number for the other.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Types(BTreeMap<(String, String), Typed>);

#[derive(Debug, Clone, PartialEq, Eq)]
struct Typed {
    rule: ColumnRule,
    oid: u32,
    modifier: i32,
    name: String,
}

/// The types of today, where the rule can do something with them.
///
/// # Errors
/// When the catalog cannot be read.
pub async fn types(client: &Client, policies: &Policies) -> Result<Types, tokio_postgres::Error> {
    let mut types = Types::default();
    if policies.merges_columns() {
        for table in tables(client).await? {
            types.read(&table, policies);
        }
    }
    Ok(types)
}

impl Types {
    fn read(&mut self, table: &TableDesc, policies: &Policies) {
        let Some(columns) = &policies.of(&table.schema, &table.name).columns else {
            return;
        };
        for (at, column) in (0..).zip(&table.columns) {
            let rule = columns.rules.get(&column.name);
            let fits = |rule: &&ColumnRule| !table.key.contains(&at) && rule.of(column).is_some();
            if let Some(rule) = rule.filter(fits) {
                let place = (format!("{}.{}", table.schema, table.name), column.name.clone());
                let typed = Typed {
                    rule: *rule,
                    oid: column.type_oid,
                    modifier: column.type_mod,
                    name: column.type_name.clone(),
                };
                self.0.insert(place, typed);
            }
        }
    }

    /// Takes in the columns that it has not seen yet.
    pub fn learn(&mut self, now: &Self) {
        for (place, typed) in &now.0 {
            self.0.entry(place.clone()).or_insert_with(|| typed.clone());
        }
    }

    /// Which of them are of another type `now`, with what to do about it.
    #[must_use]
    pub fn changed(&self, now: &Self, remedy: &str) -> Vec<Finding> {
        let both = self
            .0
            .iter()
            .filter_map(|(place, was)| Some((place, was, now.0.get(place)?)));
        let changed = both.filter(|(_, was, is)| (was.oid, was.modifier) != (is.oid, is.modifier));
        changed
            .map(|((table, column), was, is)| {
                let found = format!(
                    "column `{column}` is merged by {}, and is of type {} where it was {}: one row may be made of values of both",
                    is.rule, is.name, was.name
                );
                Finding::fail(format!("table {table}"), found, remedy)
            })
            .collect()
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn types(columns: &[(&str, u32, i32, &str)]) -> Types {
        let policy =
            "[[table]]\nname = \"public.account\"\ncolumns = { balance = \"delta\", best = \"max\" }";
        let policies = Policies::parse(policy, &BTreeMap::new(), |_| Err(String::new())).unwrap();
        let column = |&(name, type_oid, type_mod, type_name): &(&str, u32, i32, &str)| ColumnDesc {
            name: name.to_owned(),
            type_oid,
            type_mod,
            type_name: type_name.to_owned(),
        };
        let table = TableDesc {
            schema: "public".to_owned(),
            name: "account".to_owned(),
            columns: columns.iter().map(column).collect(),
            key: vec![0],
            identity_full: true,
        };
        let mut types = Types::default();
        types.read(&table, &policies);
        types
    }

    #[test]
    fn a_column_with_a_rule_keeps_its_type_and_modifier() {
        let id = ("id", 23, -1, "integer");
        let narrow = (10 << 16 | 2) + 4;
        let balance = ("balance", 1700, narrow, "numeric(10,2)");
        let was = types(&[id, balance, ("best", 23, -1, "integer"), ("note", 25, -1, "text")]);
        let said = |now: &[(&str, u32, i32, &str)]| -> Vec<String> {
            let changed = was.changed(&types(now), "");
            changed.into_iter().map(|finding| finding.found).collect()
        };
        // What has no rule may; one that went, or that its rule is not for any more, is told otherwise.
        assert_eq!(
            said(&[("id", 20, -1, "bigint"), balance, ("note", 1043, -1, "varchar")]),
            [""; 0]
        );
        assert_eq!(said(&[id, balance, ("best", 25, -1, "text")]), [""; 0]);
        let wide = ("balance", 1700, narrow + (4 << 16), "numeric(14,2)");
        let said = said(&[id, wide, ("best", 20, -1, "bigint")]);
        assert_eq!(
            said,
            [
                "column `balance` is merged by delta, and is of type numeric(14,2) where it was numeric(10,2): one row may be made of \
                 values of both",
                "column `best` is merged by max, and is of type bigint where it was integer: one row may be made of values of both",
            ]
        );
        let mut known = types(&[id, balance]);
        known.learn(&types(&[id, wide, ("best", 20, -1, "bigint")]));
        let now = types(&[id, wide, ("best", 23, -1, "integer")]);
        assert_eq!(known.changed(&now, "").len(), 2);
    }
}
