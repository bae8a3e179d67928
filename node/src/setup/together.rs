//! Constraints that merging could break although every writer keeps them: over columns that are decided apart, or over one
//! whose value nobody need have written.
//!
//! In:   the catalog, the policy      Out: findings, which say what to write into the policy file
//! Invariant: what decides is the policy file, the same at all nodes; the catalog, which may differ for a while, is only
//!        compared with it
//! Not here: columns and their types ([`super::merged`]), merging (`anabranch-conflict`)

use std::collections::BTreeSet;

use anabranch_conflict::groups::Groups;
use anabranch_conflict::policy::{Columns, Policies};
use tokio_postgres::Client;

use super::finding::{Finding, Level};

/// Of every CHECK, foreign key, unique and exclusion index of ordinary tables the columns outside the primary key that
/// it speaks of. Of a generated column these are the ones that it is made from. A whole row, number 0, is all of them. What
/// expressions speak of is read from their trees: `pg_depend` has the columns of INCLUDE, too.
const CONSTRAINTS: &str = "
WITH held AS (
    SELECT k.conrelid AS rel, k.contype = 'c' AS is_check, CASE k.contype WHEN 'c' THEN 'CHECK' ELSE 'foreign key' END AS kind,
        k.conname::text AS name, k.conkey::int2[] AS numbers
    FROM pg_constraint k
    WHERE k.contype IN ('c', 'f') AND coalesce((to_jsonb(k) ->> 'conenforced')::bool, true)
    UNION ALL
    SELECT i.indrelid, false, CASE WHEN i.indisexclusion THEN 'exclusion constraint' ELSE 'unique key' END, x.relname::text,
        ARRAY(SELECT k.n FROM unnest(i.indkey::int2[]) WITH ORDINALITY k (n, place) WHERE k.place <= i.indnkeyatts AND k.n <> 0)
        || ARRAY(SELECT m[1]::int2 FROM regexp_matches(concat(i.indexprs::text, i.indpred::text), ':varattno (-?[0-9]+)', 'g') m)
    FROM pg_index i JOIN pg_class x ON x.oid = i.indexrelid
    WHERE (i.indisunique OR i.indisexclusion) AND NOT i.indisprimary
), spoken AS (
    SELECT h.rel, h.is_check, h.kind, h.name, a.attnum, a.attgenerated <> '' AS made
    FROM held h CROSS JOIN LATERAL unnest(h.numbers) n
    JOIN pg_attribute a ON a.attrelid = h.rel AND a.attnum > 0 AND NOT a.attisdropped AND (a.attnum = n OR n = 0)
), stored AS (
    SELECT rel, is_check, kind, name, attnum FROM spoken WHERE NOT made
    UNION
    SELECT s.rel, s.is_check, s.kind, s.name, m[1]::int2
    FROM spoken s JOIN pg_attrdef d ON d.adrelid = s.rel AND d.adnum = s.attnum
    CROSS JOIN LATERAL regexp_matches(d.adbin::text, ':varattno ([0-9]+)', 'g') m
    WHERE s.made
)
SELECT n.nspname::text, c.relname::text, s.is_check, s.kind, s.name, array_agg(a.attname::text ORDER BY a.attnum)
FROM stored s JOIN pg_class c ON c.oid = s.rel JOIN pg_namespace n ON n.oid = c.relnamespace
JOIN pg_attribute a ON a.attrelid = s.rel AND a.attnum = s.attnum
WHERE c.relkind = 'r' AND n.nspname !~ '^pg_' AND n.nspname NOT IN ('information_schema', 'anabranch')
    AND NOT EXISTS (SELECT FROM pg_index i WHERE i.indrelid = s.rel AND i.indisprimary AND s.attnum = ANY (i.indkey::int2[]))
GROUP BY 1, 2, 3, 4, 5 ORDER BY 1, 2, 4, 5";

/// A constraint of a table.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Constraint {
    schema: String,
    table: String,
    is_check: bool,
    /// As people call it.
    kind: String,
    name: String,
    /// What it speaks of outside the primary key.
    columns: Vec<String>,
}

/// What opts into the quarantine.
const ACCEPTED: &str = "check_constraints = \"quarantine\"";

/// Looks at the constraints of every table whose columns are merged: what must not be.
///
/// # Errors
/// When the catalog cannot be read.
pub async fn examine(client: &Client, policies: &Policies) -> Result<Vec<Finding>, tokio_postgres::Error> {
    let mut findings = look(client, policies).await?;
    findings.retain(|finding| finding.level == Level::Fail);
    Ok(findings)
}

/// As [`examine`], and what the policy accepts.
///
/// # Errors
/// When the catalog cannot be read.
pub async fn look(client: &Client, policies: &Policies) -> Result<Vec<Finding>, tokio_postgres::Error> {
    if !policies.merges_columns() {
        return Ok(Vec::new());
    }
    let constraints = read(client).await?;
    let of_one_table = |a: &Constraint, b: &Constraint| (&a.schema, &a.table) == (&b.schema, &b.table);
    Ok(constraints
        .chunk_by(of_one_table)
        .flat_map(|constraints| judge(constraints, policies))
        .collect())
}

/// What the constraints of a table ask of a policy that merges its columns.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Asked {
    /// Columns that must go together, if columns are merged each by itself.
    pub groups: Groups,
    /// Columns that a key or an exclusion constraint speaks of, alone or with others: no rule makes values of them.
    pub bound: BTreeSet<String>,
    /// Columns that a CHECK speaks of: a rule makes values of them only where the policy accepts that such rows wait in the quarantine.
    pub checked: BTreeSet<String>,
}

/// Reads it for one table.
///
/// # Errors
/// When the catalog cannot be read.
pub async fn asked(client: &Client, schema: &str, table: &str) -> Result<Asked, tokio_postgres::Error> {
    let mut asked = Asked::default();
    let mut lists = Vec::new();
    for constraint in read(client).await? {
        if (constraint.schema.as_str(), constraint.table.as_str()) != (schema, table) {
            continue;
        }
        let held = if constraint.is_check {
            &mut asked.checked
        } else {
            &mut asked.bound
        };
        held.extend(constraint.columns.iter().cloned());
        if constraint.columns.len() > 1 {
            lists.push(constraint.columns);
        }
    }
    asked.groups = Groups::join(lists);
    Ok(asked)
}

async fn read(client: &Client) -> Result<Vec<Constraint>, tokio_postgres::Error> {
    let mut constraints = Vec::new();
    for row in client.query(CONSTRAINTS, &[]).await? {
        constraints.push(Constraint {
            schema: row.try_get(0)?,
            table: row.try_get(1)?,
            is_check: row.try_get(2)?,
            kind: row.try_get(3)?,
            name: row.try_get(4)?,
            columns: row.try_get(5)?,
        });
    }
    Ok(constraints)
}

/// All constraints of one table.
fn judge(constraints: &[Constraint], policies: &Policies) -> Vec<Finding> {
    let Some(first) = constraints.first() else {
        return Vec::new();
    };
    let policy = policies.of(&first.schema, &first.table);
    let Some(columns) = &policy.columns else {
        return Vec::new();
    };
    let check = format!("table {}.{}", first.schema, first.table);
    let accepts = policy.quarantines_checked();
    let mut out = values_that_nobody_wrote(&check, constraints, columns, accepts);
    if accepts {
        out.extend(accepted(&check, constraints, columns));
    }
    let (mut apart, mut groups) = (Vec::new(), groups_of(columns));
    for constraint in constraints {
        let (ruled, rest): (Vec<&str>, Vec<&str>) = constraint
            .columns
            .iter()
            .map(String::as_str)
            .partition(|name| columns.rules.contains_key(*name));
        for column in ruled.iter().filter(|_| constraint.columns.len() > 1) {
            let Some(rule) = columns.rules.get(*column) else {
                continue;
            };
            if constraint.is_check && (accepts || rule.makes_values()) {
                continue;
            }
            let others = constraint.columns.iter().filter(|name| name != column);
            let others: Vec<String> = others.map(|name| format!("`{name}`")).collect();
            out.push(Finding::fail(
                &check,
                format!(
                    "column `{column}` is merged by {rule}, and {} \"{}\" is over it and {}: merged apart they can break it",
                    constraint.kind,
                    constraint.name,
                    others.join(", ")
                ),
                remedy(&constraint.kind, constraint.is_check),
            ));
        }
        if !columns.keeps_together(&rest) {
            groups.push(rest.into_iter().map(str::to_owned).collect());
            apart.push(constraint);
        }
    }
    // One line for all of them, as it is to stand in the file.
    let groups = Groups::join(groups);
    let line = in_file(&groups);
    out.extend(apart.into_iter().map(|constraint| {
        Finding::fail(
            &check,
            format!(
                "{} \"{}\" is over columns that are merged each by itself, so rows that keep it can be merged into one that breaks \
                 it: {}",
                constraint.kind,
                constraint.name,
                constraint.columns.join(", ")
            ),
            format!(
                "write groups = {line} into the table's rule in the policy file, at every node (docs/policies.md, Changing it), or \
                 drop the {}",
                constraint.kind
            ),
        )
    }));
    out
}

/// `[["high","low"]]`: as TOML, too, has lists of strings.
#[must_use]
pub fn in_file(groups: &Groups) -> String {
    let groups: Vec<&BTreeSet<String>> = groups.iter().collect();
    serde_json::to_string(&groups).unwrap_or_default()
}

/// What the rule has already.
fn groups_of(columns: &Columns) -> Vec<Vec<String>> {
    let groups = columns.groups.iter();
    groups.map(|group| group.iter().cloned().collect()).collect()
}

/// For a column with a rule under a constraint that the rule could break.
fn remedy(kind: &str, is_check: bool) -> String {
    if is_check {
        format!(
            "drop the {kind}, or the column's rule in the policy file; or accept that a row which it refuses once it is merged waits in the \
             quarantine: write {ACCEPTED} into the table's rule"
        )
    } else {
        format!("drop the {kind}, or the column's rule in the policy file")
    }
}

/// What the policy accepts, in one line: CHECKs over columns with rules that could break them.
fn accepted(check: &str, constraints: &[Constraint], columns: &Columns) -> Option<Finding> {
    let can_break = |constraint: &&Constraint| {
        let mut rules = constraint
            .columns
            .iter()
            .filter_map(|name| columns.rules.get(name));
        constraint.is_check && rules.any(|rule| rule.makes_values() || constraint.columns.len() > 1)
    };
    let named: Vec<String> = constraints
        .iter()
        .filter(can_break)
        .map(|constraint| format!("\"{}\" ({})", constraint.name, constraint.columns.join(", ")))
        .collect();
    let found = format!(
        "merging columns can break what each writer keeps: CHECK {}",
        named.join(", ")
    );
    (!named.is_empty()).then(|| {
        Finding::warn(
            check,
            found,
            format!(
                "accepted by {ACCEPTED}: such a row waits in the quarantine, with a line, and nodes differ in it until it is written again; \
                 look at `anabranch conflicts list --type check_violation`"
            ),
        )
    })
}

/// Columns that are merged by a rule which may make what no constraint over them has seen. (One over several columns that is no
/// CHECK is not kept by any rule, and found where these are looked at.) `accepts`: CHECKs are none of these.
fn values_that_nobody_wrote(
    check: &str,
    constraints: &[Constraint],
    columns: &Columns,
    accepts: bool,
) -> Vec<Finding> {
    let bound: BTreeSet<(&String, String, bool)> = constraints
        .iter()
        .filter(|constraint| {
            if constraint.is_check {
                !accepts
            } else {
                constraint.columns.len() == 1
            }
        })
        .flat_map(|constraint| {
            let kind = if constraint.is_check {
                "CHECK".to_owned()
            } else {
                format!("{} \"{}\"", constraint.kind, constraint.name)
            };
            let is_check = constraint.is_check;
            constraint
                .columns
                .iter()
                .map(move |name| (name, kind.clone(), is_check))
        })
        .collect();
    let made = |name: &String| columns.rules.get(name).filter(|rule| rule.makes_values());
    let found = bound
        .into_iter()
        .filter_map(|(name, kind, is_check)| Some((name, kind, is_check, made(name)?)));
    found
        .map(|(column, kind, is_check, rule)| {
            Finding::fail(
                check,
                format!(
                    "column `{column}` is merged by {rule} and has a {kind}: what each node may add alone can break it together"
                ),
                remedy(&kind, is_check),
            )
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn judged(rule: &str, constraints: &[(&str, &str, &[&str])]) -> Vec<String> {
        let text = format!("[[table]]\nname = \"public.t\"\n{rule}");
        let policies = Policies::parse(&text, &BTreeMap::new(), |_| Err(String::new())).unwrap();
        let constraints: Vec<Constraint> = constraints
            .iter()
            .map(|&(kind, name, columns)| Constraint {
                schema: "public".to_owned(),
                table: "t".to_owned(),
                is_check: kind == "CHECK",
                kind: kind.to_owned(),
                name: name.to_owned(),
                columns: columns.iter().map(|&name| name.to_owned()).collect(),
            })
            .collect();
        let findings = judge(&constraints, &policies);
        let said = findings
            .iter()
            .map(|finding| format!("{}; {}", finding.found, finding.remedy));
        said.collect()
    }

    const SOME: [(&str, &str, &[&str]); 4] = [
        ("CHECK", "in_order", &["low", "high"]),
        ("CHECK", "positive", &["low"]),
        ("unique key", "places", &["zip", "street"]),
        ("foreign key", "at", &["street", "city"]),
    ];

    #[test]
    fn one_line_that_groups_what_every_constraint_speaks_of_is_asked_for() {
        let said = judged("policy = \"column_merge\"\ngroups = [[\"a\", \"city\"]]", &SOME);
        assert_eq!(said.len(), 3, "{said:#?}");
        let line = r#"write groups = [["a","city","street","zip"],["high","low"]] into"#;
        for (said, name) in said.iter().zip(["\"in_order\"", "\"places\"", "\"at\""]) {
            assert!(said.contains(name) && said.contains(line), "{said}");
        }
        let groups = "groups = [[\"low\", \"high\"], [\"zip\", \"street\"], [\"city\", \"street\"]]";
        let said = judged(&format!("policy = \"column_merge\"\n{groups}"), &SOME);
        assert!(said.is_empty(), "{said:#?}");
        assert!(judged("policy = \"last_update_wins\"", &SOME).is_empty());
        assert!(judged("columns = { n = \"delta\" }", &SOME).is_empty());
    }

    #[test]
    fn a_column_with_a_rule_goes_with_no_other() {
        let said = judged("columns = { high = \"max\", street = \"append\" }", &SOME);
        assert_eq!(said.len(), 3, "{said:#?}");
        assert!(
            said[0]
                .starts_with("column `high` is merged by max, and CHECK \"in_order\" is over it and `low`")
        );
        let remedy = "drop the CHECK, or the column's rule in the policy file; or accept that a row which it refuses once it is merged";
        assert!(
            said[0].contains(remedy) && said[0].contains(ACCEPTED),
            "{said:#?}"
        );
        assert!(
            said[1].contains("`street` is merged by append, and unique key \"places\" is over it and `zip`")
        );
        assert!(said[2].contains("foreign key \"at\"") && !said[2].contains(ACCEPTED));
        let said = judged("columns = { low = \"delta\" }", &SOME);
        assert_eq!(said.len(), 1, "{said:#?}");
        assert!(said[0].starts_with("column `low` is merged by delta and has a CHECK:"));
        assert!(said[0].ends_with("write check_constraints = \"quarantine\" into the table's rule"));
    }

    #[test]
    fn a_table_that_accepts_it_has_checks_over_its_sums_and_no_keys() {
        let accepting = |rule: &str| judged(&format!("{ACCEPTED}\n{rule}"), &SOME);
        let said = accepting("columns = { high = \"max\", low = \"delta\" }");
        assert_eq!(said.len(), 1, "{said:#?}");
        let found = "merging columns can break what each writer keeps: CHECK \"in_order\" (low, high), \"positive\" (low); accepted by";
        assert!(said[0].starts_with(found), "{said:#?}");
        // No value comes of `max` that nobody wrote.
        let said = judged(
            &format!("{ACCEPTED}\ncolumns = {{ low = \"max\" }}"),
            &[("CHECK", "positive", &["low"])],
        );
        assert!(said.is_empty(), "{said:#?}");
        let said = accepting("columns = { low = \"delta\", street = \"append\" }");
        assert_eq!(said.len(), 3, "{said:#?}");
        assert!(
            said[1].contains("unique key \"places\"") && said[2].contains("foreign key \"at\""),
            "{said:#?}"
        );
        // What can be kept together is to be.
        let each = format!("policy = \"column_merge\"\n{ACCEPTED}\ncolumns = {{ n = \"delta\" }}");
        let some: [(&str, &str, &[&str]); 1] = [("CHECK", "all", &["n", "low", "high"])];
        let said = judged(&each, &some);
        assert_eq!(said.len(), 2, "{said:#?}");
        assert!(
            said[0].contains("CHECK \"all\" (n, low, high); accepted by"),
            "{said:#?}"
        );
        assert!(
            said[1].contains(r#"write groups = [["high","low"]] into"#),
            "{said:#?}"
        );
    }

    #[test]
    fn a_sum_that_nobody_wrote_is_no_key() {
        let some: [(&str, &str, &[&str]); 3] = [
            ("foreign key", "t_customer_fkey", &["customer"]),
            ("unique key", "t_number_key", &["number"]),
            ("unique key", "t_best_key", &["best"]),
        ];
        let rules =
            "columns = { customer = \"delta\", number = \"delta\", best = \"max\", free = \"delta\" }";
        let said = judged(rules, &some);
        assert_eq!(said.len(), 2, "{said:#?}");
        assert!(said[0].starts_with(
            "column `customer` is merged by delta and has a foreign key \"t_customer_fkey\": what each node may add"
        ));
        assert!(said[1].contains("`number` is merged by delta and has a unique key \"t_number_key\""));
    }
}
