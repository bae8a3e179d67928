//! Which tables the patterns of the configuration choose, and whether each can be replicated.

use std::collections::{BTreeSet, HashSet};

use super::facts::Facts;
use super::finding::Finding;
use super::pattern::{Choice, Patterns};
use super::table::{Kind, Table};

/// The outcome of the patterns on one database.
#[derive(Debug, Default)]
pub struct Selection<'a> {
    /// Tables the publication lists: partitioned roots stand for their partitions.
    pub listed: Vec<&'a Table>,
    /// Everything replicated, partitions included.
    pub all: Vec<&'a Table>,
    /// What stands in the way, and what was left out on the way.
    pub findings: Vec<Finding>,
}

/// Applies `patterns` to the tables of `facts`.
#[must_use]
pub fn select<'a>(facts: &'a Facts, patterns: &Patterns) -> Selection<'a> {
    let mut out = Selection::default();
    let mut chosen: Vec<&Table> = Vec::new();
    for table in &facts.tables {
        match patterns.choose(&table.schema, &table.name) {
            Choice::Out => {}
            Choice::ByName => chosen.push(table),
            Choice::ByWildcard => match left_out(table) {
                Some(finding) => out.findings.extend(finding),
                None => chosen.push(table),
            },
        }
    }
    let chosen_oids: HashSet<u32> = chosen.iter().map(|table| table.oid).collect();
    let under = |table: &Table| table.ancestors.iter().any(|oid| chosen_oids.contains(oid));
    for table in &facts.tables {
        let through_parent = under(table);
        if chosen_oids.contains(&table.oid) && !through_parent {
            out.listed.push(table);
        }
        if chosen_oids.contains(&table.oid) || through_parent {
            out.all.push(table);
        }
        if through_parent && patterns.excludes(&table.schema, &table.name) {
            out.findings.push(Finding::fail(
                format!("table {}.{}", table.schema, table.name),
                "is excluded, but is a partition of a replicated table",
                "exclude the partitioned table too, and name its other partitions in postgres.tables",
            ));
        }
    }
    for pattern in patterns
        .iter()
        .filter(|pattern| !pattern.exclude && pattern.is_exact())
    {
        if !facts
            .tables
            .iter()
            .any(|table| table.schema == pattern.schema && table.name == pattern.table)
        {
            out.findings.push(Finding::fail(
                format!("table {}.{}", pattern.schema, pattern.table),
                "does not exist",
                "create it, or take it out of postgres.tables",
            ));
        }
    }
    if out.all.is_empty() {
        out.findings.push(Finding::warn(
            "tables",
            "no table is chosen by postgres.tables",
            "create the tables and run `anabranch init` again",
        ));
    }
    let major = facts.server.major();
    out.findings
        .extend(out.all.iter().flat_map(|table| table.obstacles(major)));
    out
}

/// The oids of tables.
#[must_use]
pub fn oids(tables: &[&Table]) -> BTreeSet<u32> {
    tables.iter().map(|table| table.oid).collect()
}

/// What a wildcard passes over, some of it with a word.
fn left_out(table: &Table) -> Option<Option<Finding>> {
    let check = format!("table {}.{}", table.schema, table.name);
    if table.kind == Kind::View {
        return Some(None);
    }
    if table.of_extension {
        let found = "belongs to an extension; left out";
        return Some(Some(Finding::ok(check, found)));
    }
    if table.kind == Kind::Foreign && table.ancestors.is_empty() {
        return Some(Some(Finding::ok(check, "is a foreign table; left out")));
    }
    None
}
