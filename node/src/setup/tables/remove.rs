//! Taking tables out of replication at this node: rows stay, at every node.
//!
//! From then on writes to them stay here, and what others still send of them is passed over (`anabranch.removed_table`, read by
//! the daemon): without that an unasked copy would go on being written, or, with the table dropped, fill the quarantine.

use super::super::error::Error;
use super::super::facts::Facts;
use super::super::finding::Finding;
use super::super::pattern::Patterns;
use super::super::plan::{Plan, Scope, Stage, Step, restore_identity};
use super::super::sql::{ident, literal};
use super::super::table::Table;
use super::{is_published, word_of};
use crate::config::Config;

/// Name of the table that says what is passed over.
pub const REMOVED: &str = "removed_table";

/// How a table's replica identity was before `init`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Before {
    /// Schema.
    pub schema: String,
    /// Name.
    pub name: String,
    /// As in `pg_class.relreplident`.
    pub identity: String,
    /// Index of identity `i`.
    pub index: Option<String>,
}

/// Plans it for `tables`, as [`super::meant`] gives them.
///
/// # Errors
/// When a pattern of the configuration cannot be read, or `init` has not been run here.
pub fn plan(facts: &Facts, config: &Config, tables: &[&Table]) -> Result<Plan, Error> {
    let Some(publication) = facts.ours.publication.as_ref() else {
        return Err(Error::Refused(
            "this database is no node: there is no publication; see `anabranch doctor`".to_owned(),
        ));
    };
    if !facts.ours.tables.iter().any(|table| table == REMOVED) {
        return Err(Error::Refused(
            "this database was set up by an older release: run `anabranch init` first".to_owned(),
        ));
    }
    let patterns = Patterns::parse(&config.postgres.tables)?;
    let is_listed = |oid: &u32| publication.tables.contains(oid);
    let mut plan = Plan::default();
    let mut listed = Vec::new();
    for table in tables {
        let name = word_of(table);
        let removed = facts
            .ours
            .removed
            .contains(&(table.schema.clone(), table.name.clone()));
        let above = table.ancestors.iter().find(|oid| is_listed(oid));
        let above = above.filter(|oid| tables.iter().all(|meant| meant.oid != **oid));
        let chosen = patterns
            .deciding(&table.schema, &table.name)
            .filter(|pattern| !pattern.exclude);
        let chosen_above = table.ancestors.iter().find_map(|oid| {
            let above = facts.tables.iter().find(|above| above.oid == *oid)?;
            patterns
                .deciding(&above.schema, &above.name)
                .filter(|pattern| !pattern.exclude)
        });
        if let Some(above) = above.and_then(|oid| facts.tables.iter().find(|table| table.oid == *oid)) {
            plan.findings.push(Finding::fail(
                format!("table {name}"),
                format!(
                    "is a partition of {}, which is replicated as a whole",
                    word_of(above)
                ),
                format!(
                    "`anabranch tables remove {}`, or DETACH the partition first",
                    word_of(above)
                ),
            ));
        } else if let Some(pattern) = chosen.or(chosen_above) {
            let what = if pattern.is_exact() {
                format!("take \"{pattern}\" out of postgres.tables in this node's configuration")
            } else {
                format!("add \"!{name}\" to postgres.tables in this node's configuration")
            };
            plan.findings.push(Finding::fail(
                format!("table {name}"),
                format!("is chosen by \"{pattern}\" of postgres.tables"),
                format!(
                    "{what}, then run this again: the next `anabranch init` would take it in again otherwise"
                ),
            ));
        } else if !is_published(facts, table) && !removed {
            // Detached from its partitioned table, or taken out of the publication by hand: `publication_watch` sends people here.
            plan.findings.push(Finding::warn(
                format!("table {name}"),
                "is not in the publication",
                "from now on what other nodes still send of it is passed over here; `anabranch tables list` shows what is replicated",
            ));
        }
        if is_listed(&table.oid) {
            listed.push(table.sql_name());
        }
        plan.tables.push(name);
    }
    if !plan.is_allowed() {
        return Ok(plan);
    }
    let mut steps = Vec::new();
    if !listed.is_empty() {
        let name = ident(&config.postgres.publication);
        let list: Vec<String> = listed.iter().map(|table| format!("ONLY {table}")).collect();
        steps.push(Step::new(
            format!("take {} out of publication {name}", listed.join(", ")),
            format!("ALTER PUBLICATION {name} DROP TABLE {};", list.join(", ")),
        ));
    }
    let new: Vec<&&Table> = tables
        .iter()
        .filter(|table| {
            !facts
                .ours
                .removed
                .contains(&(table.schema.clone(), table.name.clone()))
        })
        .collect();
    if !new.is_empty() {
        let rows: Vec<String> = new
            .iter()
            .map(|table| format!("({}, {})", literal(&table.schema), literal(&table.name)))
            .collect();
        let rows = rows.join(", ");
        steps.push(Step::new(
            "pass over what others still send of it",
            format!(
                "INSERT INTO anabranch.{REMOVED} (schema_name, table_name) VALUES {rows} ON CONFLICT DO NOTHING;\n\
                 DELETE FROM anabranch.quarantine WHERE (schema_name, table_name) IN ({rows});\n\
                 UPDATE anabranch.conflict_history SET status = 'acknowledged', reviewed_by = 'anabranch',\n    \
                 reviewed_at = clock_timestamp(), note = 'the table is not replicated here any more'\n    \
                 WHERE (schema_name, table_name) IN ({rows}) AND conflict_resolution = 'skip' AND status = 'new';"
            ),
        ));
    }
    if !steps.is_empty() {
        plan.stages.push(Stage {
            scope: Scope::Transaction,
            steps,
        });
    }
    // Behind the publication: what is still published must be whole.
    for before in facts.ours.identities.iter() {
        let table = tables
            .iter()
            .find(|table| table.schema == before.schema && table.name == before.name);
        let Some(table) = table else { continue };
        let mut step = restore_identity(
            &before.schema,
            &before.name,
            &before.identity,
            before.index.as_deref(),
        );
        // Changed by somebody else since: not ours to restore.
        if table.identity != "f" {
            step.sql.clear();
            step.what = format!("forget the replica identity of {}", table.sql_name());
        }
        step.sql.push_str(&format!(
            "\nDELETE FROM anabranch.identity_before WHERE schema_name = {} AND table_name = {};",
            literal(&before.schema),
            literal(&before.name)
        ));
        plan.stages.push(Stage {
            scope: Scope::Transaction,
            steps: vec![step],
        });
    }
    Ok(plan)
}
