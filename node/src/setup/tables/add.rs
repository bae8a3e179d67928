//! Taking chosen tables into the publication: what `init` would do, for some tables only.
//!
//! Not here: bringing their rows to the other nodes (`crate::verify`)

use anabranch_proto::schema::full_name;

use super::super::error::Error;
use super::super::facts::Facts;
use super::super::finding::Finding;
use super::super::pattern::Patterns;
use super::super::plan::{Plan, table_stages};
use super::super::select::{Selection, select};
use super::super::table::{Kind, Table};
use super::super::{check, ddl, exclusion, pairwise};
use super::{name_of, word_of};
use crate::config::Config;

/// What adding is about.
#[derive(Debug)]
pub struct Adding {
    /// What is done to this database; with a failed finding nothing.
    pub plan: Plan,
    /// Tables that hold the rows, as `schema.table`: partitions stand for partitioned ones.
    pub tables: Vec<String>,
    /// The same as a command line names them.
    pub words: Vec<String>,
}

/// Plans it for `tables`, as [`super::meant`] gives them.
///
/// # Errors
/// When a pattern of the configuration cannot be read, or `init` has not been run here.
pub fn plan(facts: &Facts, config: &Config, tables: &[&Table]) -> Result<Adding, Error> {
    if facts.ours.node.is_none() || facts.ours.publication.is_none() {
        return Err(Error::Refused(
            "this database is no node yet: run `anabranch init` first".to_owned(),
        ));
    }
    let patterns = Patterns::parse(&config.postgres.tables)?;
    let all = select(facts, &patterns);
    let is_meant = |table: &Table| tables.iter().any(|meant| meant.oid == table.oid);
    let stands_for = |table: &Table| tables.iter().any(|meant| meant.ancestors.contains(&table.oid));
    let selection = Selection {
        listed: all
            .listed
            .iter()
            .copied()
            .filter(|table| is_meant(table) || stands_for(table))
            .collect(),
        all: all.all.iter().copied().filter(|table| is_meant(table)).collect(),
        findings: Vec::new(),
    };
    let mut findings = check::session(facts, &selection.all);
    findings.extend(check::role(facts, &selection.all));
    findings.extend(check::ownership(facts, config));
    findings.extend(check::older_layout(facts));
    findings.extend(ddl::findings(facts, config));
    let chosen: Vec<u32> = selection.all.iter().map(|table| table.oid).collect();
    for table in tables.iter().filter(|table| !chosen.contains(&table.oid)) {
        findings.push(not_chosen(&table.schema, &table.name, &patterns));
    }
    let names: Vec<String> = tables
        .iter()
        .map(|table| format!("table {}", name_of(table)))
        .collect();
    findings.extend(
        all.findings
            .iter()
            .filter(|finding| names.contains(&finding.check))
            .cloned(),
    );
    findings.extend(selection.all.iter().flat_map(|table| table.remarks()));
    let policies = config.policies_among(&facts.ours.names).unwrap_or_else(|error| {
        findings.push(Finding::fail(
            "policy",
            error.to_string(),
            "mend it: `anabranch policy check`",
        ));
        anabranch_conflict::policy::Policies::default()
    });
    findings.extend(exclusion::planned(&selection, facts, &policies));
    findings.extend(pairwise::planned(&selection, facts, &policies));
    let mut plan = Plan {
        findings,
        stages: Vec::new(),
        tables: selection.all.iter().map(|table| name_of(table)).collect(),
    };
    if plan.is_allowed() {
        plan.stages = table_stages(facts, config, &selection, &policies);
    }
    let holding = selection.all.iter().filter(|table| table.kind == Kind::Table);
    Ok(Adding {
        words: holding.clone().map(|table| word_of(table)).collect(),
        tables: holding.map(|table| name_of(table)).collect(),
        plan,
    })
}

fn not_chosen(schema: &str, name: &str, patterns: &Patterns) -> Finding {
    let table = full_name(schema, name);
    match patterns.deciding(schema, name) {
        Some(pattern) if pattern.exclude => Finding::fail(
            format!("table {table}"),
            format!("is excluded by \"{pattern}\""),
            "take that out of postgres.tables in the configuration of every node, and run `anabranch init` at the others",
        ),
        _ => Finding::fail(
            format!("table {table}"),
            "is not chosen by postgres.tables",
            format!(
                "add \"{table}\" to postgres.tables in the configuration of every node, and run `anabranch init` at the others"
            ),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_not_chosen_is_told_what_to_write() {
        let of = |texts: &[&str]| {
            let texts: Vec<String> = texts.iter().map(|&text| text.to_owned()).collect();
            not_chosen("public", "item", &Patterns::parse(&texts).unwrap())
        };
        assert!(of(&["app.*"]).remedy.contains("add \"public.item\""));
        assert!(of(&["public.*", "!public.i*"]).found.contains("\"!public.i*\""));
    }
}
