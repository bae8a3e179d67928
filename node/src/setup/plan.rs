//! What `init` does to a database, as SQL text: a pure function of what is there and what is wanted.
//!
//! In:   [`Facts`], [`Config`]            Out: [`Plan`] to `execute`
//! Invariants: 1. a plan with a failed finding is never run. 2. a database that is set up gives an empty plan. 3. what is
//! printed by `--dry-run` is what is run. 4. replica identities change before the publication lists their tables.
//! Not here: running it (`execute`), reading the catalog (`facts`, `table`).

use anabranch_conflict::policy::Policies;

use super::facts::{Facts, NodeRow, Publication};
use super::finding::{Finding, Level, worst};
use super::objects::{DDL_EPOCH, FORMAT, OBJECTS, PUBLISHED, SCHEMA, SEQUENCE_METHOD};
use super::pattern::{BadPattern, Patterns};
use super::select::{Selection, select};
use super::sql::{ident, literal, qualified};
use super::table::{Kind, Table};
use super::{check, conflict_log, ddl, exclusion, grants, pairwise, snowflake};
use crate::config::Config;

/// One thing that is done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// In words, as after "cannot" or "did".
    pub what: String,
    /// One or more statements, each with its semicolon.
    pub sql: String,
}

impl Step {
    pub(super) fn new(what: impl Into<String>, sql: impl Into<String>) -> Self {
        Self {
            what: what.into(),
            sql: sql.into(),
        }
    }
}

/// How the steps of a stage are run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// All in one transaction.
    Transaction,
    /// Making the slot: outside a transaction, and it waits for every running write transaction.
    Slot,
}

/// Steps that are done together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stage {
    /// How.
    pub scope: Scope,
    /// What, in order.
    pub steps: Vec<Step>,
}

/// Everything `init` found, and everything it would do.
#[derive(Debug, Clone, Default)]
pub struct Plan {
    /// What was looked at. With a failure among them the plan must not be run.
    pub findings: Vec<Finding>,
    /// What is to be done, in order; empty when nothing is.
    pub stages: Vec<Stage>,
    /// Tables replicated afterwards, as `schema.table`.
    pub tables: Vec<String>,
}

impl Plan {
    /// May it be run?
    #[must_use]
    pub fn is_allowed(&self) -> bool {
        worst(&self.findings) != Level::Fail
    }

    /// The exact SQL, for `--dry-run`.
    #[must_use]
    pub fn sql(&self) -> String {
        let mut out = String::new();
        for stage in &self.stages {
            if stage.scope == Scope::Transaction {
                out.push_str("BEGIN;\n");
            }
            for step in &stage.steps {
                out.push_str(&format!("-- {}\n{}\n", step.what, step.sql));
            }
            out.push_str(if stage.scope == Scope::Transaction {
                "COMMIT;\n\n"
            } else {
                "\n"
            });
        }
        out
    }
}

/// Plans the set-up of the node that `config` describes.
///
/// # Errors
/// When a pattern of `postgres.tables` cannot be read.
pub fn plan(facts: &Facts, config: &Config) -> Result<Plan, BadPattern> {
    plan_for(facts, config, |selection, policies| {
        let mut out = exclusion::planned(selection, facts, policies);
        out.extend(pairwise::planned(selection, facts, policies));
        out
    })
}

/// The same for a node whose tables are those of a cluster that runs. What that could not refuse a member any more stops nobody who
/// joins it.
///
/// # Errors
/// As [`plan`].
pub fn plan_joined(facts: &Facts, config: &Config) -> Result<Plan, BadPattern> {
    plan_for(facts, config, |selection, policies| {
        let mut out = exclusion::told(selection, policies);
        out.extend(pairwise::told(selection, policies));
        out
    })
}

/// `constraints` judges exclusion constraints, and unique keys without claims.
fn plan_for(
    facts: &Facts,
    config: &Config,
    constraints: impl Fn(&Selection<'_>, &Policies) -> Vec<Finding>,
) -> Result<Plan, BadPattern> {
    let patterns = Patterns::parse(&config.postgres.tables)?;
    let selection = select(facts, &patterns);
    let mut findings = check::server(facts);
    findings.extend(check::session(facts, &selection.all));
    findings.extend(check::role(facts, &selection.all));
    findings.extend(check::ownership(facts, config));
    findings.extend(check::advertised(config));
    findings.extend(ddl::findings(facts, config));
    findings.extend(selection.findings.iter().cloned());
    findings.extend(selection.all.iter().flat_map(|table| table.remarks()));
    let tables = selection
        .all
        .iter()
        .map(|table| format!("{}.{}", table.schema, table.name))
        .collect();
    let policies = config.policies_among(&facts.ours.names).unwrap_or_else(|error| {
        let remedy = "mend it: `anabranch policy check`";
        findings.push(Finding::fail("policy", error.to_string(), remedy));
        Policies::default()
    });
    findings.extend(constraints(&selection, &policies));
    let mut plan = Plan {
        findings,
        stages: Vec::new(),
        tables,
    };
    if plan.is_allowed() {
        plan.stages.extend(objects_stage(facts, config));
        plan.stages.extend(member_stages(facts, config));
        plan.stages
            .extend(table_stages(facts, config, &selection, &policies));
        plan.stages
            .extend(ddl::stage(facts, config, &patterns, &policies));
        plan.stages.extend(layout_stage(facts));
        plan.stages.extend(slot_stages(facts, config));
    }
    Ok(plan)
}

/// What makes the tables of `selection` replicated ones.
pub(super) fn table_stages(
    facts: &Facts,
    config: &Config,
    selection: &Selection<'_>,
    policies: &Policies,
) -> Vec<Stage> {
    let mut stages = identity_stages(facts, selection, policies);
    stages.extend(publication_stage(facts, config, selection, policies));
    stages.extend(grant_stage(facts, selection));
    stages
}

fn stage(steps: Vec<Step>) -> Option<Stage> {
    (!steps.is_empty()).then_some(Stage {
        scope: Scope::Transaction,
        steps,
    })
}

/// Schema, tables, and the row that says which node this is.
fn objects_stage(facts: &Facts, config: &Config) -> Option<Stage> {
    let mut steps = Vec::new();
    if !facts.ours.schema {
        steps.push(Step::new("create schema anabranch", SCHEMA));
    }
    if facts.ours.plain_history {
        steps.push(Step::new(
            "set the conflict log of the older layout aside",
            conflict_log::SET_ASIDE,
        ));
    }
    for object in OBJECTS {
        if !facts.ours.tables.iter().any(|table| table == object.name) {
            steps.push(Step::new(format!("create anabranch.{}", object.name), object.sql));
        }
    }
    if facts.ours.tables.iter().any(|table| table == "sequence") && !facts.ours.sequence_method {
        steps.push(Step::new(
            "let anabranch.sequence say by which method",
            SEQUENCE_METHOD,
        ));
    }
    if facts.ours.tables.iter().any(|table| table == ddl::TABLE) && !facts.ours.ddl_epoch {
        steps.push(Step::new("let anabranch.ddl say on which timeline", DDL_EPOCH));
    }
    let mut tables = facts.ours.tables.iter();
    let has_log = tables.any(|table| table == conflict_log::HISTORY.name);
    if has_log && !facts.ours.group_index {
        steps.push(Step::new(
            "let lines of the conflict log be found by their transaction",
            conflict_log::INDEX_GROUPS,
        ));
    }
    if has_log && (facts.ours.open_upkeep || !facts.ours.upkeep_as_made) {
        steps.push(Step::new(
            "make the upkeep of the conflict log as this release has it",
            conflict_log::UPKEEP,
        ));
    }
    if let Some(step) = snowflake::step(facts.ours.snowflake.as_deref(), config.node.id) {
        steps.push(step);
        // What is not there yet is not known to be lacked.
        steps.extend((!facts.role.superuser).then(|| snowflake::grant(&facts.role.name)));
    }
    if facts.ours.plain_history {
        steps.push(Step::new(
            "bring its lines into the new one",
            conflict_log::BRING_OVER,
        ));
    }
    let has_views = facts.ours.tables.iter().any(|table| table == "conflict_open");
    if !has_views || facts.ours.reviewer_lacks {
        steps.push(Step::new(
            "let reviewers read the conflict log",
            conflict_log::grant_reviewer(),
        ));
    }
    if facts.ours.node.is_none() {
        steps.push(Step::new(
            format!("make this database node {} ({})", config.node.id, config.node.name),
            format!(
                "INSERT INTO anabranch.node (node_id, name, cluster_id, system_identifier, slot, publication, format)\n\
                 VALUES ({}, {}, {}, {}, {}, {}, {FORMAT});",
                config.node.id,
                literal(&config.node.name),
                literal(&config.cluster.id),
                literal(&facts.server.system_identifier),
                literal(&config.postgres.slot),
                literal(&config.postgres.publication),
            ),
        ));
    }
    stage(steps)
}

/// What leads from an older layout is done by then: a daemon that finds the number finds all of it.
fn layout_stage(facts: &Facts) -> Option<Stage> {
    check::older_layout(facts)?;
    stage(vec![Step::new(
        format!("note that this is layout {FORMAT}"),
        format!("UPDATE anabranch.node SET format = {FORMAT};"),
    )])
}

/// Who is there from the beginning; a progress row and a clock row for each. Apart from everything else: a transaction that begins with
/// `progress` is read back from the stream as one that applied nothing, so nothing else may hide in it.
fn member_stages(facts: &Facts, config: &Config) -> Vec<Stage> {
    let members: Vec<i32> = std::iter::once(config.node.id)
        .chain(config.peers.iter().map(|peer| peer.id))
        .map(|id| i32::from(id.0))
        .collect();
    let mut out = Vec::new();
    out.extend(founders_stage(facts, config));
    let values = |have: &[i32]| {
        let new: Vec<String> = members
            .iter()
            .filter(|id| !have.contains(id))
            .map(|id| format!("({id})"))
            .collect();
        (!new.is_empty()).then(|| new.join(", "))
    };
    if let Some(rows) = values(&facts.ours.progress) {
        out.extend(stage(vec![Step::new(
            format!("add members to anabranch.progress: {rows}"),
            format!("INSERT INTO anabranch.progress (origin) VALUES {rows} ON CONFLICT DO NOTHING;"),
        )]));
    }
    if let Some(rows) = values(&facts.ours.clock) {
        out.extend(stage(vec![Step::new(
            format!("add members to anabranch.clock: {rows}"),
            format!("INSERT INTO anabranch.clock (node_id) VALUES {rows} ON CONFLICT DO NOTHING;"),
        )]));
    }
    out
}

/// The members that the cluster begins with. A node that has joined has got them with its copy.
fn founders_stage(facts: &Facts, config: &Config) -> Option<Stage> {
    let known = |id: i32, fact: &str| {
        facts
            .ours
            .members
            .iter()
            .any(|(node, it)| *node == id && it == fact)
    };
    let own = i32::from(config.node.id.0);
    if known(own, "joined") {
        return None;
    }
    let address = config.listen.advertised();
    let rows: Vec<String> = std::iter::once((own, &config.node.name, &address))
        .chain(
            config
                .peers
                .iter()
                .map(|peer| (i32::from(peer.id.0), &peer.name, &peer.address)),
        )
        .filter(|&(id, ..)| !known(id, "founder") && !known(id, "joined"))
        .map(|(id, name, address)| {
            format!(
                "    ({id}, 'founder', {}, {}, {own})",
                literal(name),
                literal(address)
            )
        })
        .collect();
    if rows.is_empty() {
        return None;
    }
    let sql = format!(
        "INSERT INTO anabranch.member (node_id, fact, name, address, said_by) VALUES\n{}\nON CONFLICT DO NOTHING;",
        rows.join(",\n")
    );
    let what = format!("write down {} member(s) that the cluster begins with", rows.len());
    stage(vec![Step::new(what, sql)])
}

/// Must its replica identity be FULL? An update of a merged row, too, must tell the row before.
fn needs_full(table: &Table, policies: &Policies) -> bool {
    let is_merged = || policies.of(&table.schema, &table.name).columns.is_some();
    table.needs_full() || table.kind == Kind::Table && is_merged()
}

/// One transaction per table, so that no two exclusive locks are held at once.
fn identity_stages(facts: &Facts, selection: &Selection<'_>, policies: &Policies) -> Vec<Stage> {
    let known = |table: &Table| {
        facts
            .ours
            .identities
            .iter()
            .any(|before| before.schema == table.schema && before.name == table.name)
    };
    selection
        .all
        .iter()
        .filter(|table| needs_full(table, policies) && table.identity != "f")
        .filter_map(|table| {
            let mut sql = String::new();
            if !known(table) {
                let index = table.identity_index.as_deref().map_or("NULL".to_owned(), literal);
                sql = format!(
                    "INSERT INTO anabranch.identity_before VALUES ({}, {}, {}, {index}) ON CONFLICT DO NOTHING;\n",
                    literal(&table.schema),
                    literal(&table.name),
                    literal(&table.identity),
                );
            }
            let name = table.sql_name();
            sql.push_str(&format!("ALTER TABLE {name} REPLICA IDENTITY FULL;"));
            stage(vec![Step::new(format!("set replica identity FULL on {name}"), sql)])
        })
        .collect()
}

/// The publication: an explicit list, so that a new table is replicated only after its checks.
fn publication_stage(
    facts: &Facts,
    config: &Config,
    selection: &Selection<'_>,
    policies: &Policies,
) -> Option<Stage> {
    let name = ident(&config.postgres.publication);
    // Version 18 refuses UPDATE under identity FULL while a stored generated column is not published.
    let generated = facts.server.major() >= 18
        && selection
            .all
            .iter()
            .any(|table| needs_full(table, policies) && table.generated_stored);
    let mut options =
        "publish = 'insert, update, delete, truncate', publish_via_partition_root = false".to_owned();
    if generated {
        options.push_str(", publish_generated_columns = stored");
    }
    let Some(publication) = &facts.ours.publication else {
        let ours = PUBLISHED.map(|table| format!("anabranch.{table}"));
        let tables: Vec<String> = ours
            .into_iter()
            .chain(selection.listed.iter().map(|table| table.sql_name()))
            .collect();
        let list = tables.join(",\n    ONLY ");
        let sql = format!("CREATE PUBLICATION {name} FOR TABLE\n    ONLY {list}\nWITH ({options});");
        return stage(vec![Step::new(
            format!("create publication {name} of {} tables", tables.len()),
            sql,
        )]);
    };
    let mut steps = Vec::new();
    if publication.via_root || !publication.all_operations || (generated && !publication.generated_stored) {
        let sql = format!("ALTER PUBLICATION {name} SET ({options});");
        steps.push(Step::new(
            format!("restore the options of publication {name}"),
            sql,
        ));
    }
    let ours: Vec<String> = PUBLISHED
        .iter()
        .filter(|table| !publication.own.iter().any(|own| own == *table))
        .map(|table| format!("ONLY anabranch.{table}"))
        .collect();
    if !ours.is_empty() {
        steps.push(Step::new(
            format!(
                "add {} table(s) of this release to publication {name}",
                ours.len()
            ),
            format!("ALTER PUBLICATION {name} ADD TABLE {};", ours.join(", ")),
        ));
    }
    let new = unpublished(publication, selection);
    if !new.is_empty() {
        let list = new
            .iter()
            .map(|table| format!("ONLY {}", table.sql_name()))
            .collect::<Vec<_>>()
            .join(", ");
        let sql = format!("ALTER PUBLICATION {name} ADD TABLE {list};");
        steps.push(Step::new(
            format!("add {} table(s) to publication {name}", new.len()),
            sql,
        ));
    }
    let back: Vec<String> = selection
        .all
        .iter()
        .filter(|table| {
            facts
                .ours
                .removed
                .contains(&(table.schema.clone(), table.name.clone()))
        })
        .map(|table| format!("({}, {})", literal(&table.schema), literal(&table.name)))
        .collect();
    if !back.is_empty() {
        steps.push(Step::new(
            format!("take what others send of {} table(s) again", back.len()),
            format!(
                "DELETE FROM anabranch.removed_table WHERE (schema_name, table_name) IN ({});",
                back.join(", ")
            ),
        ));
    }
    stage(steps)
}

/// Chosen tables that the publication does not list.
pub(super) fn unpublished<'a>(publication: &Publication, selection: &Selection<'a>) -> Vec<&'a Table> {
    selection
        .listed
        .iter()
        .copied()
        .filter(|table| !publication.tables.contains(&table.oid))
        .collect()
}

fn grant_stage(facts: &Facts, selection: &Selection<'_>) -> Option<Stage> {
    let mut steps: Vec<Step> = grants::missing(facts, &selection.all)
        .iter()
        .chain(&grants::missing_on_sequences(facts, &selection.all))
        .map(grants::Grant::step)
        .collect();
    steps.extend(grants::missing_in_ours(facts));
    stage(steps)
}

fn slot_stages(facts: &Facts, config: &Config) -> Vec<Stage> {
    let slot = &config.postgres.slot;
    let mut out = Vec::new();
    if facts.ours.slot.is_none() {
        // From 17 on a standby may take it over: neither temporary nor two-phase, failover.
        let more = if facts.server.major() >= 17 {
            ", false, false, true"
        } else {
            ""
        };
        out.push(Stage {
            scope: Scope::Slot,
            steps: vec![Step::new(
                format!("create logical replication slot {slot}"),
                format!(
                    "SELECT pg_catalog.pg_create_logical_replication_slot({}, 'pgoutput'{more});",
                    literal(slot)
                ),
            )],
        });
    }
    if facts
        .ours
        .node
        .as_ref()
        .is_none_or(|node| node.slot_start.is_none())
    {
        out.extend(stage(vec![Step::new(
            "remember where the slot begins",
            format!(
                "UPDATE anabranch.node SET slot_start =\n    (SELECT confirmed_flush_lsn FROM pg_catalog.pg_replication_slots WHERE slot_name = {});",
                literal(slot)
            ),
        )]));
    }
    out
}

/// `ALTER TABLE` that gives a table back the identity it had.
pub(super) fn restore_identity(schema: &str, table: &str, identity: &str, index: Option<&str>) -> Step {
    let name = qualified(schema, table);
    let to = match (identity, index) {
        ("n", _) => "NOTHING".to_owned(),
        ("f", _) => "FULL".to_owned(),
        ("i", Some(index)) => format!("USING INDEX {}", ident(index)),
        _ => "DEFAULT".to_owned(),
    };
    Step::new(
        format!("restore replica identity of {name}"),
        format!("ALTER TABLE {name} REPLICA IDENTITY {to};"),
    )
}

/// Does the node row fit the configuration? None when it does, else what differs.
pub(super) fn mismatch(node: &NodeRow, config: &Config) -> Option<String> {
    let pairs = [
        ("node.id", node.node_id.to_string(), config.node.id.to_string()),
        ("node.name", node.name.clone(), config.node.name.clone()),
        ("cluster.id", node.cluster_id.clone(), config.cluster.id.clone()),
        ("postgres.slot", node.slot.clone(), config.postgres.slot.clone()),
        (
            "postgres.publication",
            node.publication.clone(),
            config.postgres.publication.clone(),
        ),
    ];
    let differing: Vec<String> = pairs
        .into_iter()
        .filter(|(_, is, wanted)| is != wanted)
        .map(|(key, is, wanted)| format!("{key} is {is} in the database and {wanted} in the configuration"))
        .collect();
    (!differing.is_empty()).then(|| differing.join("; "))
}
