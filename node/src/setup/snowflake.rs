//! Ids made of milliseconds, node and counter: `anabranch.snowflake()`, and columns that take their values from it.
//!
//! In:   [`Sequences`], columns that are to become such            Out: steps of a plan, [`View`]s
//! Invariants: 1. a node's function never gives one value twice, under any number of sessions and whatever its clock does.
//!       2. the ten bits of the node are those of the database that the function is in, however its tables came there.
//! Not here: which column has which method (`ids`), reading the catalog (`sequence`)
//!
//! An id is a sign that is 0, 41 bits of milliseconds since [`EPOCH_MS`], ten of the node, twelve of a counter. All but the
//! node is the value of one sequence, which only goes up: `nextval` counts, and where that is behind the clock a session lifts
//! it by `setval`. A session that drew values between the other's look at the sequence and its `setval` would give what comes
//! once more, so `snowflake_lift` is odd meanwhile: who sees it odd, or changed between before and after its draw, throws
//! the value away and draws under the lock that lifting takes. Nobody waits otherwise. A clock that was set back lifts
//! nothing, and ids go on counting ahead of it.

use std::collections::BTreeMap;

use anabranch_proto::NodeId;

use super::finding::Finding;
use super::interleave::View;
use super::plan::{Plan, Scope, Stage, Step};
use super::sequence::{Column, Sequence, Sequences};
use super::sql::{ident, literal, qualified};
use crate::config::Method;

/// 2024-01-01 00:00:00 UTC, milliseconds since 1970. With 41 bits ids last until September 2093.
pub const EPOCH_MS: i64 = 1_704_067_200_000;
/// Highest node id that ten bits hold.
pub const MAX_NODE: u16 = 1023;
/// Below every id that is ever made: those of the first year after the epoch, in which there were none.
pub const LOWEST: i64 = (366 * 86_400_000) << 22;
/// So far may ids be behind the clock before they are lifted to it.
const SLACK_MS: i64 = 64;
/// Who lifts holds this advisory lock, for microseconds.
const LOCK: i64 = 7_020_382_937_104_375_907;
const OBJECTS: &str = include_str!("snowflake.sql");

/// Its sequences, in schema `anabranch`.
pub(super) const SEQUENCES: [&str; 2] = ["snowflake_seq", "snowflake_lift"];
/// What the daemon's role needs on them, to lift them after a promotion.
pub(super) const PRIVILEGES: &str = "SELECT, UPDATE";

/// Lets the daemon's role lift them.
pub(super) fn grant(role: &str) -> Step {
    let names = SEQUENCES.map(|name| format!("anabranch.{name}")).join(", ");
    Step::new(
        format!("grant {PRIVILEGES} on {names}"),
        format!("GRANT {PRIVILEGES} ON SEQUENCE {names} TO {};", ident(role)),
    )
}

/// The comment by which the function tells what it was made from.
fn mark(node: NodeId) -> String {
    let digest = xxhash_rust::xxh3::xxh3_64(script(node).as_bytes());
    format!(
        "Anabranch: ids of node {node}; 41 bits of milliseconds since 2024-01-01 UTC, 10 of the node, 12 of a counter ({digest:016x})"
    )
}

fn script(node: NodeId) -> String {
    OBJECTS
        .replace("@NODE@", &node.to_string())
        .replace("@SLACK_MS@", &SLACK_MS.to_string())
        .replace("@EPOCH_MS@", &EPOCH_MS.to_string())
        .replace("@LOCK@", &LOCK.to_string())
}

/// The statements that make the function of a node, or make it anew; none where its id does not fit.
#[must_use]
pub fn sql(node: NodeId) -> Option<String> {
    (node.0 <= MAX_NODE).then(|| {
        format!(
            "{}COMMENT ON FUNCTION anabranch.snowflake() IS {};",
            script(node),
            literal(&mark(node))
        )
    })
}

/// What makes the function what it should be, given its comment; none where it is, or cannot be.
#[must_use]
pub fn step(comment: Option<&str>, node: NodeId) -> Option<Step> {
    if comment == Some(mark(node).as_str()) {
        return None;
    }
    let what = format!("make anabranch.snowflake() give ids of node {node}");
    sql(node).map(|sql| Step::new(what, sql))
}

/// The id of a value of the sequence.
#[must_use]
pub const fn id(value: i64, node: NodeId) -> i64 {
    ((value >> 12) << 22) | ((node.0 as i64) << 12) | (value & 4095)
}

/// The value of the sequence that an id was made of.
const fn value(id: i64) -> i64 {
    ((id >> 22) << 12) | (id & 4095)
}

/// A column that takes its values from a sequence and is to take them from the function.
#[derive(Debug, Clone)]
pub struct Moving {
    /// The sequence, with all its columns.
    pub sequence: Sequence,
    /// The column.
    pub column: Column,
    /// Does no other column go on with the sequence?
    pub last: bool,
}

/// Adds to a plan what makes columns take their values from the function, and what the function needs. `fresh`: the sequences
/// have the values of another node, this one has handed out nothing.
pub fn extend(plan: &mut Plan, all: &Sequences, moving: &[Moving], node: NodeId, fresh: bool) {
    if moving.is_empty() && all.snowflakes.is_empty() {
        return;
    }
    if node.0 > MAX_NODE {
        plan.findings.push(Finding::fail(
            "sequences.method",
            format!("a snowflake id has ten bits for the node, and this is node {node}"),
            format!("use the method interleave; ids up to {MAX_NODE} have snowflakes"),
        ));
        return;
    }
    let mut steps: Vec<Step> = step(all.function.made_from.as_deref(), node)
        .into_iter()
        .collect();
    steps.extend(lift(all));
    let mut stages: Vec<Stage> = Vec::new();
    let mut stage = |steps: Vec<Step>| {
        if !steps.is_empty() {
            let scope = Scope::Transaction;
            stages.push(Stage { scope, steps });
        }
    };
    stage(steps);
    for moving in moving {
        plan.tables.push(moving.column.display());
        let refused = refusals(all, moving);
        if refused.is_empty() {
            // One transaction for each, so that no two exclusive locks are held at once.
            stage(vec![change(moving, node, fresh)]);
        }
        plan.findings.extend(refused);
    }
    plan.tables.extend(all.snowflakes.iter().map(Column::display));
    plan.stages.extend(stages);
}

/// What `apply` does not change by itself.
fn refusals(all: &Sequences, moving: &Moving) -> Vec<Finding> {
    let (column, sequence) = (&moving.column, &moving.sequence);
    let check = format!("column {}", column.display());
    let mut out = Vec::new();
    if column.type_max != Some(i64::MAX) {
        out.push(Finding::fail(
            &check,
            "is to have snowflake ids, which need all of a bigint, and is no bigint",
            format!(
                "at every node, and nobody writes to the table until all have it: ALTER TABLE {} ALTER COLUMN {} TYPE bigint; or leave it \
                 interleaved: [[sequences.rule]] column = \"{}\", method = \"interleave\"",
                qualified(&column.schema, &column.table),
                ident(&column.name),
                column.display()
            ),
        ));
    }
    if !sequence.may_alter {
        out.push(super::interleave::foreign(sequence, &check));
    }
    let said = all.said.get(&(sequence.schema.clone(), sequence.name.clone()));
    let anybody = said.is_some_and(|said| said.values().any(|said| said.method == Method::Snowflake));
    let last = sequence
        .value
        .filter(|value| value.called)
        .map(|value| value.last);
    if let Some(high) = column
        .highest
        .max(last)
        .filter(|high| *high >= LOWEST && !anybody)
    {
        out.push(Finding::fail(
            &check,
            format!("has values up to {high} already, where snowflake ids are (from {LOWEST} on): a new one could be there"),
            format!(
                "leave it as it is: [[sequences.rule]] column = \"{}\", method = \"interleave\"",
                column.display()
            ),
        ));
    }
    out
}

/// Another default. What it was is kept for `remove`.
fn change(moving: &Moving, node: NodeId, fresh: bool) -> Step {
    let (column, sequence) = (&moving.column, &moving.sequence);
    let table = qualified(&column.schema, &column.table);
    let name = ident(&column.name);
    let mut sql = format!("LOCK TABLE ONLY {table} IN ACCESS EXCLUSIVE MODE;\n");
    if moving.last {
        let base = if fresh {
            "NULL"
        } else {
            "CASE WHEN is_called THEN last_value END"
        };
        sql.push_str(&format!(
            "INSERT INTO anabranch.sequence (schema_name, sequence_name, node_id, method, increment, base)\n    \
                 SELECT {}, {}, {node}, 'snowflake', 1, {base} FROM {}\n    \
                 ON CONFLICT (schema_name, sequence_name, node_id) DO UPDATE SET method = excluded.method,\n        \
                 increment = 1, base = greatest(anabranch.sequence.base, excluded.base), said_at = excluded.said_at;\n",
            literal(&sequence.schema),
            literal(&sequence.name),
            sequence.sql_name(),
        ));
    }
    sql.push_str(&format!(
        "INSERT INTO anabranch.default_before VALUES ({}, {}, {}, {}) ON CONFLICT DO NOTHING;\n",
        literal(&column.schema),
        literal(&column.table),
        literal(&column.name),
        literal(&restore(moving)),
    ));
    if column.identity.is_some() {
        sql.push_str(&format!(
            "ALTER TABLE {table} ALTER COLUMN {name} DROP IDENTITY;\n"
        ));
    }
    sql.push_str(&format!(
        "ALTER TABLE {table} ALTER COLUMN {name} SET DEFAULT anabranch.snowflake();"
    ));
    let was = column.identity.map_or("a default", |_| "an identity");
    let what = format!(
        "give {} snowflake ids (was {was} by {})",
        column.sql_name(),
        sequence.sql_name()
    );
    Step::new(what, sql)
}

/// The statements by which a column takes values from its sequence again: above what that has handed out, and above all rows
/// but those with snowflake ids.
fn restore(moving: &Moving) -> String {
    let (column, sequence) = (&moving.column, &moving.sequence);
    let table = qualified(&column.schema, &column.table);
    let (name, of) = (ident(&column.name), sequence.sql_name());
    let n = sequence.increment;
    let mut sql = match (column.identity, &column.default) {
        (Some(always), _) => format!(
            "ALTER TABLE {table} ALTER COLUMN {name} DROP DEFAULT;\n\
             ALTER TABLE {table} ALTER COLUMN {name} ADD GENERATED {} AS IDENTITY\n    \
             (SEQUENCE NAME {of} INCREMENT BY {n} MINVALUE {} MAXVALUE {} START WITH {});\n",
            if always { "ALWAYS" } else { "BY DEFAULT" },
            sequence.min,
            sequence.max,
            sequence.start
        ),
        (None, Some(default)) => format!("ALTER TABLE {table} ALTER COLUMN {name} SET DEFAULT {default};\n"),
        (None, None) => format!("ALTER TABLE {table} ALTER COLUMN {name} DROP DEFAULT;\n"),
    };
    if n > 0 {
        let next = sequence.next().unwrap_or_else(|| i128::from(sequence.start));
        sql.push_str(&format!(
            "SELECT pg_catalog.setval({}, floor + mod(mod({} - floor, {n}) + {n}, {n}), false)\n    \
                 FROM (SELECT greatest({next}, (SELECT last_value + is_called::int FROM {of}),\n        \
                 (SELECT max({name}) + 1 FROM {table} WHERE {name} < {LOWEST}))::bigint AS floor) f;",
            literal(&of),
            next.rem_euclid(i128::from(n)),
        ));
    }
    sql
}

/// A server that was promoted or restored may lack what it had handed out, which others gave back to its rows.
pub(crate) fn lift(all: &Sequences) -> Option<Step> {
    let (column, ahead) = ahead(all)?;
    let to = value(ahead);
    let sql = format!(
        "SELECT pg_catalog.pg_advisory_xact_lock({LOCK});\n\
         DO $$ BEGIN\n    \
             WHILE nextval('anabranch.snowflake_lift') & 1 = 0 LOOP\n    \
             END LOOP;\n    \
             IF coalesce(pg_sequence_last_value('anabranch.snowflake_seq'), 0) < {to} THEN\n        \
                 PERFORM setval('anabranch.snowflake_seq', {to});\n    \
             END IF;\n    \
             PERFORM nextval('anabranch.snowflake_lift');\n\
         END $$;"
    );
    let what = format!(
        "lift anabranch.snowflake_seq ({ahead} is in {} already)",
        column.sql_name()
    );
    Some(Step::new(what, sql))
}

/// The highest id of this node that is in a column and was not handed out as far as the sequence knows.
pub(crate) fn ahead(all: &Sequences) -> Option<(&Column, i64)> {
    let columns = all.snowflakes.iter();
    columns
        .filter_map(|column| Some((column, column.ahead?)))
        .max_by_key(|(_, ahead)| *ahead)
}

/// The columns that have snowflake ids, and those that are to have them.
#[must_use]
pub fn views(all: &Sequences, moving: &[Moving], node: NodeId) -> Vec<View> {
    let stale = step(all.function.made_from.as_deref(), node).is_some() || node.0 > MAX_NODE;
    let mut out: Vec<View> = Vec::new();
    for column in &all.snowflakes {
        let mut reasons = Vec::new();
        if stale {
            reasons.push(format!(
                "anabranch.snowflake() does not give ids of node {node}: run `anabranch sequences apply`"
            ));
        }
        if let Some(ahead) = column.ahead {
            reasons.push(format!(
                "it is still to hand out {ahead}, which is in {} already",
                column.sql_name()
            ));
        }
        out.push(View {
            sequence: "anabranch.snowflake()".to_owned(),
            method: Method::Snowflake,
            columns: vec![column.sql_name()],
            increment: 1,
            offset: None,
            last_value: all.function.last.map(|last| id(last, node)),
            left: None,
            managed: true,
            safe: reasons.is_empty(),
            reasons,
            warnings: Vec::new(),
        });
    }
    let mut by_sequence: BTreeMap<String, Vec<&Moving>> = BTreeMap::new();
    for each in moving {
        let name = format!("{}.{}", each.sequence.schema, each.sequence.name);
        by_sequence.entry(name).or_default().push(each);
    }
    for (name, each) in by_sequence {
        let sequence = each.first().map(|each| &each.sequence);
        let reasons = each.iter().map(|each| undone(each)).collect();
        out.push(View {
            sequence: name,
            method: Method::Snowflake,
            columns: each.iter().map(|each| each.column.sql_name()).collect(),
            increment: sequence.map_or(1, |sequence| sequence.increment),
            offset: None,
            last_value: sequence
                .and_then(|sequence| sequence.value)
                .filter(|value| value.called)
                .map(|value| value.last),
            left: None,
            managed: true,
            safe: false,
            reasons,
            warnings: Vec::new(),
        });
    }
    out
}

/// Why a column is not safe that is to have snowflake ids.
#[must_use]
pub fn undone(moving: &Moving) -> String {
    format!(
        "{} is to have snowflake ids, and takes values from {}",
        moving.column.display(),
        moving.sequence.sql_name()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_made_of_its_parts_and_taken_apart() {
        let at = (1_000_i64 << 12) | 4095;
        assert_eq!(id(at, NodeId(3)), (1_000 << 22) | (3 << 12) | 4095);
        assert_eq!(value(id(at, NodeId(1023))), at);
        assert!(id(at, NodeId(1023)) < id(at + 1, NodeId(1)));
        let last = (1_i64 << 53) - 1;
        assert_eq!(id(last, NodeId(1023)), i64::MAX);
    }

    #[test]
    fn a_node_id_that_ten_bits_do_not_hold_has_no_function() {
        assert!(sql(NodeId(1023)).is_some_and(|sql| sql.contains("1023::bigint << 12")));
        assert_eq!(sql(NodeId(1024)), None);
    }

    #[test]
    fn the_function_is_made_anew_when_it_is_another_nodes() {
        assert!(step(None, NodeId(1)).is_some());
        assert!(step(Some(&mark(NodeId(2))), NodeId(1)).is_some());
        assert!(step(Some(&mark(NodeId(1))), NodeId(1)).is_none());
    }

    #[test]
    fn nothing_of_the_script_is_left_to_be_filled_in() {
        assert!(!sql(NodeId(7)).unwrap().contains('@'));
    }
}
