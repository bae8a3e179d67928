//! Which policy would have lost least of a table's logged conflicts.
//!
//! In:   the lines of one table, its columns from the catalog      Out: a [`Suggestion`]
//! Holds: counts
//! Invariants: what the log does not tell is counted as unknown, never guessed. The log holds the two rows and not the row
//!        before them: of a column in which they differ, it does not tell whether one writer had changed it or both. What a
//!        line says was lost under a rule is lost under the same rule
//! Not here: deciding conflicts (`anabranch_conflict`)

use std::collections::BTreeMap;

use anabranch_conflict::groups::Groups;
use anabranch_conflict::policy::{ColumnRule, TablePolicy};
use anabranch_proto::schema::{ColumnDesc, split_name};
use serde::Serialize;
use serde_json::value::RawValue;
use tokio_postgres::Client;

use super::{Columns, Error, Filter, Line, Unread, each, partitions, storm_count};
use crate::setup::together::{self, Asked};

/// What another policy would have made of the logged conflicts of a table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Suggestion {
    /// `schema.table`.
    pub table: String,
    /// Lines in which a write lost to another; the rest of this counts them.
    pub conflicts: u64,
    /// Lines that no policy decides: unique values, rows that the server refuses, sums out of range, truncates, rows that were
    /// here before their table was replicated.
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
WHERE n.nspname = $1 AND c.relname = $2 AND a.attgenerated = ''";

/// Looks at all lines of `table`: `schema.table`, or a table in any schema.
///
/// # Errors
/// When the server refuses, and when several tables are called so.
pub async fn suggest(client: &Client, table: &str) -> Result<Suggestion, Error> {
    let mut filter = Filter {
        table: Some(table.to_owned()),
        ..Filter::default()
    };
    filter.partitions = partitions(client, &filter).await?;
    let mut tally = Tally::default();
    each(client, &filter, |line| {
        tally.add(&line);
        Ok::<_, Error>(())
    })
    .await?;
    let mut tables = tally.tables.iter();
    let (schema, name) = match (tables.next(), tables.next()) {
        (Some(only), None) => only.clone(),
        (None, _) => {
            let (schema, name) = split_name(table);
            (schema.unwrap_or_default(), name)
        }
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
enum Case {
    /// Both wrote a row: the columns that matter.
    Rows(Vec<(String, How)>),
    /// One was a delete.
    Delete,
}

/// What the log tells of a column.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum How {
    /// The rows differ in it: one writer had changed it, or both.
    Differs,
    /// Both wrote it. Of documents that both made from nothing it is known whether they have different values of one key.
    Both(Option<bool>),
    /// It was lost to a write of it, or of another column that was decided with it.
    InUnit,
    /// It was lost under this rule.
    Under(ColumnRule),
}

/// What a policy would have made of a column, or of a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Verdict {
    Kept,
    Unknown,
    Lost,
}

impl How {
    /// Of a column that has this rule, beside others that are decided so.
    const fn verdict(self, rule: Option<ColumnRule>, merging: Merging) -> Verdict {
        match (rule, self) {
            (Some(ColumnRule::JsonbMerge), Self::Both(Some(false))) => Verdict::Kept,
            (Some(ColumnRule::JsonbMerge), Self::Both(Some(true)) | Self::Under(ColumnRule::JsonbMerge))
            | (Some(ColumnRule::Delta), Self::Under(ColumnRule::Delta))
            | (Some(ColumnRule::SetUnion), Self::Under(ColumnRule::SetUnion)) => Verdict::Lost,
            // Of a key that both set the last writer's value stays.
            (Some(ColumnRule::JsonbMerge), _) => Verdict::Unknown,
            (Some(_), _) => Verdict::Kept,
            (None, Self::Both(_) | Self::Under(_)) => Verdict::Lost,
            (None, Self::Differs) => match merging {
                Merging::Rows => Verdict::Lost,
                Merging::Unit | Merging::Each => Verdict::Unknown,
            },
            (None, Self::InUnit) => match merging {
                Merging::Rows | Merging::Unit => Verdict::Lost,
                Merging::Each => Verdict::Unknown,
            },
        }
    }
}

/// Of a column of two inserts.
fn inserted(line: &Line, column: &str) -> How {
    let value = |row: &Option<Columns>| row.as_ref()?.get(column).cloned();
    let both = value(&line.local_tuple).zip(value(&line.remote_tuple));
    How::Both(both.and_then(|(local, remote)| clash(&local, &remote)))
}

/// Have these documents different values of one key, at any depth? None: they are not in the line.
fn clash(one: &RawValue, other: &RawValue) -> Option<bool> {
    let not_here = |value: &RawValue| Unread::of(value).is_some_and(|unread| !unread.is_json_null());
    if not_here(one) || not_here(other) {
        return None;
    }
    // NULL is no document, and takes nothing from one.
    if one.get() == other.get() || one.get() == "null" || other.get() == "null" {
        return Some(false);
    }
    let keys = |value: &RawValue| match Unread::of(value) {
        None => serde_json::from_str::<Columns>(value.get()).ok(),
        Some(_) => None,
    };
    Some(match (keys(one), keys(other)) {
        (Some(one), Some(other)) => clash_in(&one, &other, 1),
        _ => true,
    })
}

/// Objects deeper than this are merged as one value.
const DEPTH: usize = 64;

/// The same of objects whose values are so deep. In them null is a value as any.
fn clash_in(one: &Columns, other: &Columns, depth: usize) -> bool {
    let keys = |value: &RawValue| match depth {
        DEPTH => None,
        _ => serde_json::from_str::<Columns>(value.get()).ok(),
    };
    let mut pairs = one
        .iter()
        .filter_map(|(key, value)| Some((value, other.get(key)?)));
    pairs.any(|(one, other)| {
        one.get() != other.get()
            && match (keys(one), keys(other)) {
                (Some(one), Some(other)) => clash_in(&one, &other, depth + 1),
                _ => true,
            }
    })
}

/// Of a column that was lost where columns are merged.
fn lost(line: &Line, column: &str) -> How {
    match TablePolicy::rule_in(&line.policy, column) {
        Some(rule) => How::Under(rule),
        None if line.policy.starts_with("column_merge") => How::Both(None),
        None => How::InUnit,
    }
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
        // That a script failed is no reason of its own: the last update won.
        let has_other_reason = line.error.is_some()
            && line.conflict_type != "clock_drift"
            && !line.policy.starts_with("script ");
        let rows = |columns: &Option<Vec<String>>, how: &dyn Fn(&str) -> How| {
            let columns = columns.iter().flatten();
            Case::Rows(columns.map(|name| (name.clone(), how(name))).collect())
        };
        let case = match line.met() {
            // As earlier releases wrote it.
            "clock_drift" if line.local_tuple.is_none() || line.remote_tuple.is_none() => Case::Delete,
            _ if has_other_reason => return self.not_of_policy += 1,
            "insert_exists" if line.is_of_nobody() => return self.not_of_policy += 1,
            "insert_exists" => rows(&line.changed_columns, &|name: &str| inserted(line, name)),
            "clock_drift" | "update_origin_differs" if merged => {
                rows(&line.lost_columns, &|name: &str| lost(line, name))
            }
            "clock_drift" | "update_origin_differs" => rows(&line.changed_columns, &|_: &str| How::Differs),
            "update_deleted" | "delete_origin_differs" => Case::Delete,
            _ => return self.not_of_policy += 1,
        };
        if case == Case::Delete {
            if line.lost_a_delete() {
                self.deletes.lost += 1;
            } else {
                self.deletes.won += 1;
            }
        }
        *self.cases.entry(case).or_default() += 1;
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
            if let Case::Rows(columns) = case {
                for (column, _) in columns {
                    *differing.entry(column).or_default() += count;
                }
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
        let mut candidates: Vec<Candidate> = ["last_update_wins", "first_update_wins", "origin_priority"]
            .into_iter()
            .map(|policy| self.candidate(policy, Merging::Rows, &[], &|_| None))
            .collect();
        candidates.push(self.candidate("column_merge", Merging::Each, &[], &|_| None));
        if !ruled.is_empty() {
            candidates.push(self.candidate("last_update_wins", Merging::Unit, &ruled, &rule));
            candidates.push(self.candidate("column_merge", Merging::Each, &ruled, &rule));
        }
        // Among equals the plainer one, which is first; but merging each column never loses more than all as one, nor does a rule for
        // a column more than none.
        candidates.sort_by_key(|candidate| {
            let (outcome, is_merged) = (&candidate.outcome, candidate.merging == Merging::Each);
            let (is_known, is_ruled) = (outcome.unknown == 0, !candidate.rules.is_empty());
            (
                outcome.lost,
                outcome.unknown,
                is_merged == is_known,
                is_ruled == is_known,
            )
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

    /// `ruled` are the columns with a rule of their own, which `rule` gives.
    fn candidate<'a>(
        &self,
        policy: &'static str,
        merging: Merging,
        ruled: &[&'a Differing],
        rule: &dyn Fn(&str) -> Option<ColumnRule>,
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
            let verdict = match case {
                Case::Delete => Verdict::Lost,
                Case::Rows(columns) => {
                    let each = columns.iter().map(|(name, how)| how.verdict(rule(name), merging));
                    // Equal rows lost nothing.
                    each.max().unwrap_or(Verdict::Kept)
                }
            };
            *match verdict {
                Verdict::Kept => &mut outcome.kept,
                Verdict::Unknown => &mut outcome.unknown,
                Verdict::Lost => &mut outcome.lost,
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
        // Quoted as in JSON, which TOML reads.
        let mut text = format!("[[table]]\nname = {}\n", serde_json::Value::from(table));
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

    /// Columns of which all is told alike, and how many lines.
    fn tally(cases: &[(How, &[&str], u64)], deletes: u64) -> Tally {
        let rows = cases.iter().map(|&(how, columns, count)| {
            let columns = columns.iter().map(|name| ((*name).to_owned(), how)).collect();
            (Case::Rows(columns), count)
        });
        let deletes = (deletes > 0).then_some((Case::Delete, deletes));
        Tally {
            cases: rows.chain(deletes).collect(),
            ..Tally::default()
        }
    }

    const BOTH: How = How::Both(None);

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
        let cases: [(How, &[&str], u64); 4] = [
            (How::Differs, &["n"], 5),
            (How::Differs, &["n", "tags"], 2),
            (How::Differs, &["n", "t"], 3),
            (BOTH, &["t"], 4),
        ];
        let tally = tally(&cases, 1);
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
        let said = tally(&[(BOTH, &["n", "t"], 2)], 0).judge("public.a".to_owned(), 0, &columns, &asked);
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
        let said = tally(&[(BOTH, &["n", "t"], 2)], 0).judge("public.a".to_owned(), 0, &columns, &asked);
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
        let cases = tally(&[(How::Differs, &["low", "n"], 2), (BOTH, &["n"], 1)], 0);
        let said = cases.judge("public.a".to_owned(), 0, &columns, &asked);
        assert_eq!(counts(&said, "column_merge, n delta"), (1, 0, 2));
        assert_eq!(
            said.policy_file.as_deref(),
            Some(
                "[[table]]\nname = \"public.a\"\npolicy = \"column_merge\"\ngroups = [[\"high\",\"low\"]]\n[table.columns]\n\"n\" = \"delta\"\n"
            )
        );
    }
    fn line(more: &serde_json::Value) -> Line {
        let mut line = serde_json::json!({
            "conflict_id": "x", "detected_at": "", "lost_at": "", "node": "n", "node_id": 1, "schema_name": "public",
            "table_name": "a", "key": {}, "conflict_type": "update_origin_differs", "policy": "last_update_wins",
            "conflict_resolution": "keep_local", "loser": "remote", "status": "new", "remote_origin": 2,
        });
        for (name, value) in more.as_object().unwrap() {
            line[name] = value.clone();
        }
        serde_json::from_value(line).unwrap()
    }

    fn of_lines(lines: &[serde_json::Value]) -> Suggestion {
        let mut tally = Tally::default();
        for more in lines {
            tally.add(&line(more));
        }
        let columns = BTreeMap::from([column("n", 23), column("doc", 3802), column("t", 25)]);
        tally.judge("public.a".to_owned(), 0, &columns, &Asked::default())
    }

    #[test]
    fn what_was_lost_under_a_rule_is_not_said_to_be_kept_by_it() {
        let merged = |policy: &str, lost: &[&str]| serde_json::json!({ "policy": policy, "conflict_resolution": "merge", "lost_columns": lost });
        let said = of_lines(&[merged("column_merge, doc jsonb_merge", &["doc"])]);
        assert_eq!(counts(&said, "column_merge, doc jsonb_merge"), (0, 1, 0));
        // Another column of the unit may be what the winner wrote.
        let said = of_lines(&[merged("last_update_wins, n delta", &["t"])]);
        assert_eq!(counts(&said, "last_update_wins"), (0, 1, 0));
        assert_eq!(counts(&said, "column_merge"), (0, 0, 1));
        let said = of_lines(&[merged("column_merge", &["t", "n"])]);
        assert_eq!(counts(&said, "column_merge, n delta"), (0, 1, 0));
        // A greatest value that was lost would have been added.
        let said = of_lines(&[merged("column_merge, n max", &["n"])]);
        assert_eq!(counts(&said, "column_merge"), (0, 1, 0));
        assert_eq!(counts(&said, "column_merge, n delta"), (1, 0, 0));
    }

    #[test]
    fn documents_keep_all_only_where_no_key_has_two_values() {
        let said = of_lines(&[serde_json::json!({ "changed_columns": ["doc"] })]);
        assert_eq!(counts(&said, "column_merge, doc jsonb_merge"), (0, 0, 1));
        // It loses no more than the column as one value.
        assert!(said.policy_file.is_some_and(|file| file.contains("jsonb_merge")));
        for (one, other, kept, lost, unknown) in [
            (r#"{"a": 1}"#, r#"{"b": 2}"#, 1, 0, 0),
            (
                r#"{"a": {"x": 1, "y": null}}"#,
                r#"{"a": {"y": null, "z": 2}}"#,
                1,
                0,
                0,
            ),
            ("null", r#"{"b": 2}"#, 1, 0, 0),
            (r#"{"a": 1.0}"#, r#"{"a": 1.00}"#, 0, 1, 0),
            (r#"{"a": {"x": 1}}"#, r#"{"a": null}"#, 0, 1, 0),
            ("[1]", "[2]", 0, 1, 0),
            (
                r#"{"unread_text": "null", "type": "jsonb"}"#,
                r#"{"b": 2}"#,
                0,
                1,
                0,
            ),
            (r#"{"too_long": 7, "type": "jsonb"}"#, r#"{"b": 2}"#, 0, 0, 1),
        ] {
            let mut inserts = line(&serde_json::json!({
                "conflict_type": "insert_exists", "changed_columns": ["doc"],
            }));
            let row = |doc: &str| serde_json::from_str(&format!(r#"{{"doc": {doc}}}"#)).unwrap();
            (inserts.local_tuple, inserts.remote_tuple) = (Some(row(one)), Some(row(other)));
            let mut tally = Tally::default();
            tally.add(&inserts);
            let said = tally.judge(
                "public.a".to_owned(),
                0,
                &BTreeMap::from([column("doc", 3802)]),
                &Asked::default(),
            );
            let counted = counts(&said, "column_merge, doc jsonb_merge");
            assert_eq!(counted, (kept, lost, unknown), "{one} {other}");
        }
    }

    #[test]
    fn a_row_of_nobody_is_no_matter_of_policy_and_a_script_that_failed_is() {
        let nobody = serde_json::json!({
            "conflict_type": "insert_exists", "loser": "local", "changed_columns": ["t"],
        });
        let failed = serde_json::json!({
            "policy": "script a.rhai (1f0a93b2)", "changed_columns": ["t"],
            "error": { "sqlstate": "38000", "message": "m", "detail": null },
        });
        let said = of_lines(&[nobody, failed]);
        assert_eq!((said.conflicts, said.not_of_policy), (1, 1));
        assert_eq!(counts(&said, "column_merge"), (0, 0, 1));
    }
}
