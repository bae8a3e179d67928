//! The statements that give a node its share of a sequence, and lift what is behind.
//!
//! In:   a sequence, this node's share            Out: [`Step`]s of a plan
//! Not here: which of them a sequence needs ([`super`])

use super::super::plan::Step;
use super::super::sequence::Sequence;
use super::super::sql::{ident, literal, qualified};
use super::Share;

pub(super) fn divide(sequence: &Sequence, share: Share, reason: &str, fresh: bool) -> Step {
    let (name, n, node) = (sequence.sql_name(), share.increment, share.node);
    // Where RESTART goes back to: its lowest value from where it begins now.
    let start = share.from(i128::from(sequence.start));
    let base = if fresh {
        "NULL"
    } else {
        "CASE WHEN is_called THEN last_value END"
    };
    let sql = format!(
        "ALTER SEQUENCE {name} INCREMENT BY {n} START WITH {start};\n\
         INSERT INTO anabranch.sequence (schema_name, sequence_name, node_id, method, increment, base)\n    \
             SELECT {}, {}, {node}, 'interleave', {n}, {base} FROM {name}\n    \
             ON CONFLICT (schema_name, sequence_name, node_id) DO UPDATE SET method = excluded.method,\n        \
             increment = excluded.increment, base = greatest(anabranch.sequence.base, excluded.base), said_at = excluded.said_at;\n{}",
        literal(&sequence.schema),
        literal(&sequence.name),
        set(sequence, share),
    );
    Step::new(
        format!("interleave {name} by {n}, offset {} ({reason})", share.offset()),
        sql,
    )
}

pub(super) fn lift(sequence: &Sequence, share: Share, reason: &str) -> Step {
    let name = sequence.sql_name();
    // The same increment again: for its lock, which no nextval() passes.
    let sql = format!(
        "ALTER SEQUENCE {name} INCREMENT BY {};\n{}",
        share.increment,
        set(sequence, share)
    );
    Step::new(format!("lift {name} ({reason})"), sql)
}

/// Sets the next value: this node's lowest above everything known.
fn set(sequence: &Sequence, share: Share) -> String {
    let (name, n) = (sequence.sql_name(), share.increment());
    let mut floors = vec![
        format!("(SELECT last_value + is_called::int FROM {name})"),
        format!(
            "(SELECT max(base) + 1 FROM anabranch.sequence WHERE (schema_name, sequence_name) = ({}, {}))",
            literal(&sequence.schema),
            literal(&sequence.name)
        ),
        sequence.min.to_string(),
    ];
    for column in sequence.columns.iter().filter(|column| column.type_max.is_some()) {
        let table = qualified(&column.schema, &column.table);
        floors.push(format!(
            "(SELECT max({})::bigint + 1 FROM {table})",
            ident(&column.name)
        ));
    }
    format!(
        "SELECT pg_catalog.setval({}, floor + mod(mod({} - floor, {n}) + {n}, {n}), false)\n    \
             FROM (SELECT greatest({})::bigint AS floor) f;",
        literal(&name),
        share.offset(),
        floors.join(",\n        "),
    )
}
