//! What the database must have for a running daemon, by its catalog.
//!
//! In:   [`Facts`]            Out: [`Finding`]s
//! Not here: reading the facts (`super::super::facts`), this machine ([`super::machine`])

use std::collections::{BTreeMap, BTreeSet};

use anabranch_conflict::policy::{Policies, TablePolicy};
use anabranch_proto::schema::full_name;
use tokio_postgres::Client;

use super::super::facts::Facts;
use super::super::finding::Finding;
use super::super::pattern::Patterns;
use super::super::plan::unpublished;
use super::super::select::{Selection, oids, select};
use super::super::sequence::{self, Depth};
use super::super::table::{Kind, Table};
use super::super::tables::word_of;
use super::super::{check, ddl, exclusion, grants, ids, pairwise, plain_ddl};
use crate::config::{Config, ConflictLog};
use crate::publication::Kept;

/// WAL kept for the slot that somebody should know of, bytes.
const RETAINED_WARN: i64 = 1 << 30;

pub(super) fn judge(config: &Config, facts: &Facts, out: &mut Vec<Finding>) {
    out.extend(check::server(facts));
    let patterns = match Patterns::parse(&config.postgres.tables) {
        Ok(patterns) => patterns,
        Err(error) => {
            out.push(Finding::fail(
                "postgres.tables",
                error.to_string(),
                "put the pattern right",
            ));
            return;
        }
    };
    let selection = select(facts, &patterns);
    out.extend(check::role(facts, &selection.all));
    out.extend(privileges(facts, &selection));
    out.extend(check::ownership(facts, config));
    out.extend(check::older_layout(facts));
    out.extend(check::slow_log(facts));
    out.extend(check::open_upkeep(facts));
    out.extend(node(facts, config));
    out.extend(slot(facts, config));
    out.extend(publication(facts, config, &selection));
    out.extend(selection.findings.iter().cloned());
    out.extend(identities(&selection));
    out.extend(plain_ddl::examine(facts, config));
    out.extend(selection.all.iter().flat_map(|table| table.remarks()));
    if let Ok(policies) = config.policies_among(&facts.ours.names) {
        out.extend(partitioned(&selection.all, &policies));
        out.extend(exclusion::findings(&selection, &policies));
        out.extend(pairwise::findings(&selection, &policies));
        out.extend(ddl::examine(facts, config, &patterns, &policies));
    }
}

/// Policies of partitioned tables that are not those of their partitions: rows are decided under the partition's name.
fn partitioned(tables: &[&Table], policies: &Policies) -> Vec<Finding> {
    let of = |table: &Table| policies.of(&table.schema, &table.name);
    let is_lost = |root: &&&Table| root.kind == Kind::Partitioned && *of(root) != TablePolicy::default();
    let warning = |root: &&Table| {
        let mut partitions = tables.iter().filter(|table| table.ancestors.contains(&root.oid));
        let other = partitions.find(|table| table.kind == Kind::Table && of(table) != of(root))?;
        Some(Finding::warn(
            format!("table {}.{}", root.schema, root.name),
            format!(
                "is partitioned, and rows are decided by the policy of their partition: that of {}.{} is {}, and not {}",
                other.schema,
                other.name,
                of(other),
                of(root)
            ),
            "let a rule of the policy file fit the partitions, too, at every node: `anabranch policy show --table`",
        ))
    };
    tables.iter().filter(is_lost).filter_map(warning).collect()
}

/// Keys that take values from a sequence which is not divided between the nodes, as far as the catalog tells.
pub(super) async fn sequences(config: &Config, facts: &Facts, client: &Client) -> Vec<Finding> {
    let Ok(patterns) = Patterns::parse(&config.postgres.tables) else {
        return Vec::new();
    };
    // What is missing there is a finding of its own already.
    if facts.ours.node.is_none() || !facts.ours.tables.iter().any(|table| table == sequence::TABLE) {
        return Vec::new();
    }
    let tables = select(facts, &patterns).all;
    match sequence::read(client, &oids(&tables), Depth::Catalog).await {
        Err(error) => vec![Finding::warn(
            "sequences",
            error.to_string(),
            "`anabranch grants`",
        )],
        Ok(all) => {
            let keys = tables.iter().flat_map(|table| {
                let columns = table.key.iter().flat_map(|key| &key.columns);
                columns.map(|column| (table.schema.as_str(), table.name.as_str(), column.name.as_str()))
            });
            ids::remarks(&all, config, &keys.collect())
        }
    }
}

/// Columns of these names: schema, table, name, and whether the table is one of partitions.
const COLUMNS: &str = "SELECT n.nspname::text, c.relname::text, a.attname::text, c.relkind = 'p' \
    FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid JOIN pg_namespace n ON n.oid = c.relnamespace \
    WHERE c.relkind IN ('r', 'p') AND a.attnum > 0 AND NOT a.attisdropped AND a.attname::text = ANY ($1::text[])";

/// What is to be left out of the conflict log, and is of no table here: it would be written down under another name.
pub(super) async fn redacted(
    config: &Config,
    client: &Client,
) -> Result<Vec<Finding>, tokio_postgres::Error> {
    let entries = &config.conflict_log.redact;
    let names: Vec<&str> = entries
        .iter()
        .filter_map(|entry| entry.rsplit('.').next())
        .collect();
    let mut there: Vec<(String, String, String, bool)> = Vec::new();
    for row in client.query(COLUMNS, &[&names]).await? {
        there.push((row.try_get(0)?, row.try_get(1)?, row.try_get(2)?, row.try_get(3)?));
    }
    let mut out = Vec::new();
    for entry in entries {
        let mut of: Vec<bool> = Vec::new();
        for (schema, table, column, is_partitioned) in &there {
            if ConflictLog::column_of(entry, schema, table) == Some(column.as_str()) {
                of.push(*is_partitioned);
            }
        }
        if of.contains(&false) {
            continue;
        }
        let (found, remedy) = if of.is_empty() {
            (
                "no table here has that column: nothing is left out of the log for it",
                "write schema, table and column as the catalog has them",
            )
        } else {
            (
                "is of a partitioned table, whose rows the log has under the names of its partitions: nothing is left out of it",
                "name the partitions, such as `public.customer_*.email`",
            )
        };
        out.push(Finding::warn(
            format!("conflict_log.redact: {entry}"),
            found,
            remedy,
        ));
    }
    Ok(out)
}

fn privileges(facts: &Facts, selection: &Selection<'_>) -> Vec<Finding> {
    let missing = grants::missing(facts, &selection.all);
    let mut out: Vec<Finding> = missing
        .iter()
        .map(|grant| Finding::fail(format!("privilege {}", grant.what), "missing", &grant.give))
        .collect();
    // Only `heal` and `sequences status` ask for those.
    out.extend(
        grants::missing_on_sequences(facts, &selection.all)
            .iter()
            .map(|grant| {
                let found = "missing: `anabranch heal` could not lift it after a promotion";
                Finding::warn(format!("privilege {}", grant.what), found, &grant.give)
            }),
    );
    if facts.ours.schema {
        let steps = grants::missing_in_ours(facts);
        out.extend(
            steps
                .iter()
                .map(|step| Finding::fail("privilege in schema anabranch", "missing", &step.sql)),
        );
    }
    if out.is_empty() && facts.role.oid.is_some() {
        out.push(Finding::ok(
            "privileges",
            format!("{} table(s), all that is needed", selection.all.len()),
        ));
    }
    out
}

fn node(facts: &Facts, config: &Config) -> Vec<Finding> {
    let Some(node) = &facts.ours.node else {
        return vec![Finding::fail(
            "schema anabranch",
            "this database is not set up",
            "run `anabranch init`",
        )];
    };
    let mut out = vec![Finding::ok(
        "schema anabranch",
        format!(
            "node {} ({}) of cluster {}, incarnation {}",
            node.node_id, node.name, node.cluster_id, node.incarnation
        ),
    )];
    let members = std::iter::once(config.node.id).chain(config.peers.iter().map(|peer| peer.id));
    let unknown: Vec<String> = members
        .filter(|id| {
            !facts.ours.progress.contains(&i32::from(id.0)) || !facts.ours.clock.contains(&i32::from(id.0))
        })
        .map(|id| id.to_string())
        .collect();
    if !unknown.is_empty() {
        let found = format!("no progress or clock row for node {}", unknown.join(", "));
        out.push(Finding::fail("members", found, "run `anabranch init` again"));
    }
    out
}

fn slot(facts: &Facts, config: &Config) -> Vec<Finding> {
    let check = format!("slot {}", config.postgres.slot);
    let Some(slot) = &facts.ours.slot else {
        // One that was there and is gone is a finding of `check::ownership`.
        let never = facts
            .ours
            .node
            .as_ref()
            .is_some_and(|node| node.slot_start.is_none());
        let missing = || Finding::fail(check, "does not exist", "run `anabranch init`");
        return if never { vec![missing()] } else { Vec::new() };
    };
    let active = slot.active_pid.map_or("not read".to_owned(), |pid| {
        format!("read by server process {pid}")
    });
    let found = format!(
        "{active}, wal_status {}, keeps {} MiB of WAL, confirmed {}",
        slot.wal_status,
        slot.retained_bytes >> 20,
        slot.confirmed_flush.as_deref().unwrap_or("nothing")
    );
    let keeps_much = slot.retained_bytes > RETAINED_WARN;
    vec![match slot.wal_status.as_str() {
        "lost" => return Vec::new(),
        "unreserved" => Finding::warn(
            check,
            found,
            "the server is about to remove WAL that was not read: start the daemon, raise max_slot_wal_keep_size",
        ),
        _ if keeps_much && slot.active_pid.is_none() => {
            Finding::warn(check, found, "start the daemon: WAL piles up until it reads on")
        }
        _ if keeps_much => Finding::warn(
            check,
            found,
            "the daemon is behind, or a long transaction holds it back",
        ),
        _ => Finding::ok(check, found),
    }]
}

fn publication(facts: &Facts, config: &Config, selection: &Selection<'_>) -> Vec<Finding> {
    let check = format!("publication {}", config.postgres.publication);
    let Some(publication) = &facts.ours.publication else {
        let set_up = facts.ours.node.is_some();
        let found = "does not exist; what is written now is not replicated";
        let remedy = "run `anabranch init`, which makes it again, then `anabranch heal`, which sends what was written meanwhile";
        return if set_up {
            vec![Finding::fail(check, found, remedy)]
        } else {
            Vec::new()
        };
    };
    let mut out = Vec::new();
    if publication.via_root || !publication.all_operations {
        let found = if publication.via_root {
            "publishes via the partition root"
        } else {
            "omits some operations"
        };
        out.push(Finding::fail(
            &check,
            found,
            "run `anabranch init` to restore its options, then `anabranch heal`, which sends what was left out meanwhile",
        ));
    }
    for table in unpublished(publication, selection) {
        out.push(Finding::fail(
            format!("table {}.{}", table.schema, table.name),
            "is not in the publication: new since `anabranch init`, or taken out by hand",
            "run `anabranch init` again, on every node, before anybody writes to it; `anabranch verify` tells what was written already",
        ));
    }
    for table in &facts.tables {
        if publication.tables.contains(&table.oid)
            && !selection.all.iter().any(|chosen| chosen.oid == table.oid)
        {
            out.push(Finding::warn(
                format!("table {}.{}", table.schema, table.name),
                "is in the publication, but not chosen by postgres.tables",
                format!(
                    "add it to postgres.tables, or run `anabranch tables remove {}` on every node",
                    word_of(table)
                ),
            ));
        }
    }
    out.extend(remembered(config, &check));
    if out.is_empty() {
        out.push(Finding::ok(
            check,
            format!("{} table(s) replicated", selection.all.len()),
        ));
    }
    out
}

/// Tables that others send and that nobody has taken out here: their lists differ from this node's. `counts` is how many changes the
/// daemon has passed over of each, by its [`full_name`].
pub(super) fn passed_over(facts: &Facts, counts: &BTreeMap<String, u64>) -> Vec<Finding> {
    let mut removed = BTreeSet::new();
    for (schema, name) in &facts.ours.removed {
        removed.insert(full_name(schema, name));
    }
    let sent = counts
        .iter()
        .filter(|(table, count)| **count > 0 && !removed.contains(*table));
    sent.map(|(table, count)| {
        Finding::warn(
            format!("table {table}"),
            format!(
                "is sent by another node and not chosen by postgres.tables here: {count} change(s) of it were passed over since \
                 the daemon began"
            ),
            format!(
                "is it meant to be another one at each node, exclude it at all (\"!{table}\"), or say so here: `anabranch tables remove \
                 {table}`; else choose it here, run `anabranch init`, and `anabranch tables add {table}` at a node that has its rows"
            ),
        )
    })
    .collect()
}

/// What the daemon has seen of the publication, whatever it is now.
fn remembered(config: &Config, check: &str) -> Vec<Finding> {
    let page = "docs/errors/the-publication-was-changed.md";
    let kept = match Kept::read(&config.node.data_dir) {
        Ok(Some(kept)) => kept,
        Ok(None) => return Vec::new(),
        Err(error) => {
            let remedy = "correct its permissions, or restore it";
            return vec![Finding::warn("publication.json", error.to_string(), remedy)];
        }
    };
    let broken = kept.broken().map(|why| {
        let remedy = format!("run `anabranch heal`: what was written then is in no stream ({page})");
        Finding::fail(check, why, remedy)
    });
    let doubts = kept.doubts().iter().map(|(table, why)| {
        let remedy = format!(
            "rows of it may not have been sent: `anabranch verify {table}`, `anabranch repair --from {} {table}` ({page})",
            config.node.name
        );
        Finding::fail(format!("table {table}"), why, remedy)
    });
    broken.into_iter().chain(doubts).collect()
}

fn identities(selection: &Selection<'_>) -> Vec<Finding> {
    let lacking = selection
        .all
        .iter()
        .filter(|table| table.needs_full() && table.identity != "f");
    lacking
        .map(|table| {
            Finding::fail(
                format!("table {}.{}", table.schema, table.name),
                "has values that may be stored out of line, and a replica identity other than FULL: an UPDATE does not \
                 carry what it left unchanged",
                "run `anabranch init` again, which sets it",
            )
        })
        .collect()
}
