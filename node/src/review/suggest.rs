//! Which policy would have lost least of a table's logged conflicts.
//!
//! In:   the lines of one table, its columns from the catalog      Out: a [`Suggestion`]
//! Holds: counts
//! Invariants: what the log does not tell is counted as unknown, never guessed. The log holds the two rows and not the row
//!        before them: of a column in which they differ, it does not tell whether one writer had changed it or both
//! Not here: deciding conflicts (`anabranch_conflict`)

use std::collections::BTreeMap;

use anabranch_conflict::groups::Groups;
use anabranch_conflict::policy::ColumnRule;
use anabranch_proto::schema::ColumnDesc;
use serde::Serialize;
use tokio_postgres::Client;

use super::{Error, Filter, Line, each, storm_count};
use crate::setup::together::{self, Asked};

/// What another policy would have made of the logged conflicts of a table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Suggestion {
    /// `schema.table`.
    pub table: String,
    /// Lines in which a write lost to another; the rest of this counts them.
    pub conflicts: u64,
    /// Lines that no policy decides: unique values, rows that the server refuses, sums out of range, truncates.
    pub not_of_policy: u64,
    /// Losing writes of a storm, of which nothing but their number is known.
    pub only_counted: i64,
    /// A line each, the one that loses least first.
    pub policies: Vec<Outcome>,
    /// Columns that differed in any conflict.
    pub columns: Vec<Differing>,
    /// Lines in which a delete met an insert or update.
    pub deletes: Deletes,
    /// What to write into the policy file; none when nothing would lose less.
    pub policy_file: Option<String>,
}

/// What a policy would have made of the lines.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Outcome {
    /// As in the policy file.
    pub policy: String,
    /// Lines in which nothing would have been lost.
    pub kept: u64,
    /// Lines in which something would have been lost.
    pub lost: u64,
    /// Lines of which that cannot be known.
    pub unknown: u64,
}

/// A column that differed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Differing {
    /// Its name.
    pub column: String,
    /// Its type; none when the table has no such column any more.
    #[serde(rename = "type")]
    pub type_name: Option<String>,
    /// In how many lines.
    pub conflicts: u64,
    /// The rule that keeps what both wrote, if one can.
    pub rule: Option<String>,
    /// The one that could, where the policy accepts that merged rows which a CHECK refuses wait in the quarantine
    /// (`check_constraints = "quarantine"`). It is not counted, nor written into `policy_file`.
    pub rule_under_check: Option<String>,
}

/// Deletes that met other writes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Deletes {
    /// The delete lost; `delete_wins` would have lost the other write.
    pub lost: u64,
    /// The delete won; `update_wins` would have lost it.
    pub won: u64,
}

/// What the table's columns are.
const COLUMNS: &str = "
SELECT a.attname::text, a.atttypid, a.atttypmod, format_type(a.atttypid, a.atttypmod)
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
WHERE n.nspname = $1 AND c.relname = $2";

/// Looks at all lines of `table`: `schema.table`, or a table in any schema.
///
/// # Errors
/// When the server refuses, and when several tables are called so.
pub async fn suggest(client: &Client, table: &str) -> Result<Suggestion, Error> {
    let filter = Filter {
        table: Some(table.to_owned()),
        ..Filter::default()
    };
    let mut tally = Tally::default();
    each(client, &filter, |line| {
        tally.add(&line);
        Ok::<_, Error>(())
    })
    .await?;
    let mut tables = tally.tables.iter();
    let (schema, name) = match (tables.next(), tables.next()) {
        (Some(only), None) => only.clone(),
        (None, _) => match table.split_once('.') {
            Some((schema, name)) => (schema.to_owned(), name.to_owned()),
            None => (String::new(), table.to_owned()),
        },
        (Some(_), Some(_)) => {
            let all: Vec<String> = tally
                .tables
                .iter()
                .map(|(schema, name)| format!("{schema}.{name}"))
                .collect();
            return Err(Error::Refused(format!(
                "several tables have conflicts under that name: {}; name one of them",
                all.join(", ")
            )));
        }
    };
    let mut columns = BTreeMap::new();
    for row in client.query(COLUMNS, &[&schema, &name]).await? {
        let column = ColumnDesc {
            name: row.try_get(0)?,
            type_oid: row.try_get(1)?,
            type_mod: row.try_get(2)?,
            type_name: row.try_get(3)?,
        };
        columns.insert(column.name.clone(), column);
    }
    let asked = together::asked(client, &schema, &name).await?;
    let only_counted = storm_count(client, &filter).await?;
    let table = if schema.is_empty() {
        name
    } else {
        format!("{schema}.{name}")
    };
    Ok(tally.judge(table, only_counted, &columns, &asked))
}

/// A conflict between two writes, as far as the log tells.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Case {
    kind: Kind,
    columns: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    /// Both wrote a row; the columns are those in which these differ.
    Rows,
    /// Both wrote these columns: they were inserts, or merging them lost them.
    Both,
    /// One was a delete.
    Delete,
}

/// Lines of one table by what matters of them. There are as many cases as combinations of columns, not as lines.
#[derive(Debug, Default)]
struct Tally {
    tables: std::collections::BTreeSet<(String, String)>,
    cases: BTreeMap<Case, u64>,
    not_of_policy: u64,
    deletes: Deletes,
}

impl Tally {
    fn add(&mut self, line: &Line) {
        self.tables
            .insert((line.schema_name.clone(), line.table_name.clone()));
        let merged = line.conflict_resolution == "merge";
        let has_other_reason = line.error.is_some() && line.conflict_type != "clock_drift";
        let (kind, columns) = match line.met() {
            // As earlier releases wrote it.
            "clock_drift" if line.local_tuple.is_none() || line.remote_tuple.is_none() => {
                (Kind::Delete, &None)
            }
            "clock_drift" if merged => (Kind::Both, &line.lost_columns),
            "clock_drift" => (Kind::Rows, &line.changed_columns),
            _ if has_other_reason => return self.not_of_policy += 1,
            "insert_exists" => (Kind::Both, &line.changed_columns),
            "update_origin_differs" if merged => (Kind::Both, &line.lost_columns),
            "update_origin_differs" => (Kind::Rows, &line.changed_columns),
            "update_deleted" | "delete_origin_differs" => (Kind::Delete, &None),
            _ => return self.not_of_policy += 1,
        };
        if kind == Kind::Delete {
            if line.lost_a_delete() {
                self.deletes.lost += 1;
            } else {
                self.deletes.won += 1;
            }
        }
        let columns = columns.clone().unwrap_or_default();
        *self.cases.entry(Case { kind, columns }).or_default() += 1;
    }

    fn judge(
        &self,
        table: String,
        only_counted: i64,
        columns: &BTreeMap<String, ColumnDesc>,
        asked: &Asked,
    ) -> Suggestion {
        let able = |name: &str| {
            // What each may add alone can break a constraint together: such a column is refused.
            let column = columns.get(name).filter(|_| !asked.bound.contains(name))?;
            let rules = [ColumnRule::Delta, ColumnRule::SetUnion, ColumnRule::JsonbMerge];
            rules.into_iter().find(|rule| rule.of(column).is_some())
        };
        let is_checked = |name: &str| asked.checked.contains(name);
        let rule = |name: &str| able(name).filter(|_| !is_checked(name));
        let mut differing: BTreeMap<&str, u64> = BTreeMap::new();
        for (case, count) in &self.cases {
            for column in &case.columns {
                *differing.entry(column).or_default() += count;
            }
        }
        let differing: Vec<Differing> = differing
            .into_iter()
            .map(|(name, conflicts)| Differing {
                column: name.to_owned(),
                type_name: columns.get(name).map(|column| column.type_name.clone()),
                conflicts,
                rule: rule(name).map(|rule| rule.to_string()),
                rule_under_check: able(name)
                    .filter(|_| is_checked(name))
                    .map(|rule| rule.to_string()),
            })
            .collect();
        let ruled: Vec<&Differing> = differing.iter().filter(|column| column.rule.is_some()).collect();
        let is_ruled = |name: &str| rule(name).is_some();
        let mut candidates: Vec<Candidate> = ["last_update_wins", "first_update_wins", "origin_priority"]
            .into_iter()
            .map(|policy| self.candidate(policy, Merging::Rows, &[], &|_| false))
            .collect();
        candidates.push(self.candidate("column_merge", Merging::Each, &[], &|_| false));
        if !ruled.is_empty() {
            candidates.push(self.candidate("last_update_wins", Merging::Unit, &ruled, &is_ruled));
            candidates.push(self.candidate("column_merge", Merging::Each, &ruled, &is_ruled));
        }
        // Among equals the plainer one, which is first; but merging each column never loses more than all as one.
        candidates.sort_by_key(|candidate| {
            let (outcome, is_merged) = (&candidate.outcome, candidate.merging == Merging::Each);
            (outcome.lost, outcome.unknown, is_merged == (outcome.unknown == 0))
        });
        let best = candidates.first().filter(|best| best.merging != Merging::Rows);
        let policy_file = best.map(|best| best.file(&table, &asked.groups));
        let policies = candidates
            .into_iter()
            .map(|candidate| candidate.outcome)
            .collect();
        Suggestion {
            table,
            conflicts: self.cases.values().sum(),
            not_of_policy: self.not_of_policy,
            only_counted,
            policies,
            columns: differing,
            deletes: self.deletes,
            policy_file,
        }
    }

    /// `ruled` are the columns with a rule of their own.
    fn candidate<'a>(
        &self,
        policy: &'static str,
        merging: Merging,
        ruled: &[&'a Differing],
        is_ruled: &dyn Fn(&str) -> bool,
    ) -> Candidate<'a> {
        let rules: Vec<(&str, &str)> = ruled
            .iter()
            .filter_map(|column| Some((column.column.as_str(), column.rule.as_deref()?)))
            .collect();
        let named = rules.iter().map(|(column, rule)| format!(", {column} {rule}"));
        let mut outcome = Outcome {
            policy: format!("{policy}{}", named.collect::<String>()),
            kept: 0,
            lost: 0,
            unknown: 0,
        };
        for (case, count) in &self.cases {
            let left = case.columns.iter().any(|column| !is_ruled(column));
            *match (case.kind, merging, left) {
                (Kind::Delete, ..) => &mut outcome.lost,
                // Equal rows, or columns that keep what both wrote.
                (_, _, false) => &mut outcome.kept,
                (Kind::Both, ..) | (_, Merging::Rows, _) => &mut outcome.lost,
                (Kind::Rows, Merging::Unit | Merging::Each, true) => &mut outcome.unknown,
            } += count;
        }
        Candidate {
            merging,
            rules,
            outcome,
        }
    }
}

/// A policy that the lines are tried with.
struct Candidate<'a> {
    merging: Merging,
    /// Columns with a rule of their own, and it.
    rules: Vec<(&'a str, &'a str)>,
    outcome: Outcome,
}

impl Candidate<'_> {
    /// What the policy file says of the table.
    fn file(&self, table: &str, groups: &Groups) -> String {
        let mut text = format!("[[table]]\nname = \"{table}\"\n");
        if self.merging == Merging::Each {
            text.push_str("policy = \"column_merge\"\n");
            if groups.iter().next().is_some() {
                text.push_str(&format!("groups = {}\n", together::in_file(groups)));
            }
        }
        if !self.rules.is_empty() {
            text.push_str("[table.columns]\n");
        }
        for (column, rule) in &self.rules {
            // Quoted as in JSON, which TOML reads.
            let column = serde_json::Value::from(*column);
            text.push_str(&format!("{column} = \"{rule}\"\n"));
        }
        text
    }
}

/// What a policy decides at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Merging {
    /// Whole rows.
    Rows,
    /// Columns with a rule by themselves, the rest as one.
    Unit,
    /// Each column.
    Each,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn column(name: &str, type_oid: u32) -> (String, ColumnDesc) {
        let desc = ColumnDesc {
            name: name.to_owned(),
            type_oid,
            type_mod: -1,
            type_name: type_oid.to_string(),
        };
        (name.to_owned(), desc)
    }

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|&name| name.to_owned()).collect()
    }

    fn tally(cases: &[(Kind, &[&str], u64)]) -> Tally {
        let cases = cases.iter().map(|&(kind, columns, count)| {
            let columns = columns.iter().map(|name| (*name).to_owned()).collect();
            (Case { kind, columns }, count)
        });
        Tally {
            cases: cases.collect(),
            ..Tally::default()
        }
    }

    fn counts(suggestion: &Suggestion, policy: &str) -> (u64, u64, u64) {
        let found = suggestion
            .policies
            .iter()
            .find(|outcome| outcome.policy == policy);
        let found = found.unwrap_or_else(|| panic!("no {policy} in {suggestion:#?}"));
        (found.kept, found.lost, found.unknown)
    }

    #[test]
    fn counters_alone_are_known_to_lose_nothing_and_the_rest_is_not() {
        let columns = BTreeMap::from([column("n", 23), column("tags", 1009), column("t", 25)]);
        let tally = tally(&[
            (Kind::Rows, &["n"], 5),
            (Kind::Rows, &["n", "tags"], 2),
            (Kind::Rows, &["n", "t"], 3),
            (Kind::Both, &["t"], 4),
            (Kind::Delete, &[], 1),
        ]);
        let said = tally.judge("public.a".to_owned(), 0, &columns, &Asked::default());
        assert_eq!(counts(&said, "last_update_wins"), (0, 15, 0));
        assert_eq!(counts(&said, "column_merge"), (0, 5, 10));
        assert_eq!(counts(&said, "column_merge, n delta, tags set_union"), (7, 5, 3));
        assert_eq!(
            said.policy_file.as_deref(),
            Some(
                "[[table]]\nname = \"public.a\"\npolicy = \"column_merge\"\n[table.columns]\n\"n\" = \"delta\"\n\"tags\" = \"set_union\"\n"
            )
        );
        let differs: Vec<(&str, u64)> = said
            .columns
            .iter()
            .map(|one| (&one.column[..], one.conflicts))
            .collect();
        assert_eq!(differs, [("n", 10), ("t", 7), ("tags", 2)]);
    }

    #[test]
    fn a_column_under_a_constraint_or_without_a_rule_is_no_counter() {
        let columns = BTreeMap::from([column("n", 23), column("t", 25)]);
        let asked = Asked {
            bound: names(&["n"]).into_iter().collect(),
            ..Asked::default()
        };
        let said = tally(&[(Kind::Both, &["n", "t"], 2)]).judge("public.a".to_owned(), 0, &columns, &asked);
        assert_eq!(said.policies.len(), 4);
        assert!(said.policies.iter().all(|outcome| outcome.lost == 2), "{said:#?}");
        assert_eq!(said.policy_file, None);
        assert!(
            said.columns
                .iter()
                .all(|column| column.rule_under_check.is_none()),
            "{said:#?}"
        );
        let asked = Asked {
            checked: names(&["n", "t"]).into_iter().collect(),
            ..Asked::default()
        };
        let said = tally(&[(Kind::Both, &["n", "t"], 2)]).judge("public.a".to_owned(), 0, &columns, &asked);
        assert_eq!((said.policies.len(), &said.policy_file), (4, &None));
        let under_check = |at: usize| {
            (
                &said.columns[at].rule,
                said.columns[at].rule_under_check.as_deref(),
            )
        };
        assert_eq!(
            [under_check(0), under_check(1)],
            [(&None, Some("delta")), (&None, None)]
        );
    }

    #[test]
    fn columns_that_a_constraint_holds_together_are_a_group_of_what_is_suggested() {
        let columns = BTreeMap::from([column("low", 23), column("high", 23), column("n", 23)]);
        let asked = Asked {
            groups: Groups::join([names(&["low", "high"])]),
            checked: names(&["low", "high"]).into_iter().collect(),
            ..Asked::default()
        };
        let cases = tally(&[(Kind::Rows, &["low", "n"], 2), (Kind::Both, &["n"], 1)]);
        let said = cases.judge("public.a".to_owned(), 0, &columns, &asked);
        assert_eq!(counts(&said, "column_merge, n delta"), (1, 0, 2));
        assert_eq!(
            said.policy_file.as_deref(),
            Some(
                "[[table]]\nname = \"public.a\"\npolicy = \"column_merge\"\ngroups = [[\"high\",\"low\"]]\n[table.columns]\n\"n\" = \"delta\"\n"
            )
        );
    }
}
