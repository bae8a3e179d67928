//! Ids by ranges: node `k` hands out only values from `k * size` on, up to the next node's.
//!
//! In:   [`Sequences`], the sequences that are to be so, with their sizes            Out: steps of a plan, [`View`]s
//! Invariants: 1. a sequence ends with its range: then the server refuses, and never gives another node's value. 2. below `size` is
//!       nobody's range: what was counted before, and what members count that have not changed, is there, or the change is refused.
//! Not here: which sequence has which method (`ids`), reading the catalog (`sequence`)

use anabranch_proto::NodeId;

use super::finding::Finding;
use super::interleave::{FEW, Fault, View, foreign, handed_out, refusals};
use super::plan::{Plan, Step};
use super::sequence::{Column, Sequence, Sequences};
use super::sql::{dollar_quote, ident, literal, qualified};
use crate::config::Method;

/// A node's range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// Its id.
    pub node: NodeId,
    /// How many values each node's range has.
    pub size: u64,
}

impl Range {
    fn size(self) -> i128 {
        i128::from(self.size.max(1))
    }

    fn first(self) -> i128 {
        i128::from(self.node.0) * self.size()
    }

    fn last(self) -> i128 {
        self.first() + self.size() - 1
    }

    fn has(self, value: i128) -> bool {
        (self.first()..=self.last()).contains(&value)
    }
}

/// A sequence that is to be a range.
#[derive(Debug, Clone)]
pub struct Ranged {
    /// The sequence.
    pub sequence: Sequence,
    /// This node's range of it.
    pub range: Range,
}

/// Highest value that a sequence's type, and every column that uses it, can hold.
pub(super) fn widest(sequence: &Sequence) -> i64 {
    let of_type = match sequence.data_type.as_str() {
        "smallint" => i64::from(i16::MAX),
        "integer" => i64::from(i32::MAX),
        _ => i64::MAX,
    };
    let columns = sequence.columns.iter().filter_map(|column| column.type_max);
    columns.fold(of_type, i64::min)
}

/// Everything that stands between a sequence and never colliding.
fn faults(all: &Sequences, ranged: &Ranged) -> Vec<Fault> {
    let (sequence, range) = (&ranged.sequence, ranged.range);
    let mut out = refusals(sequence);
    let said = all.said_of(sequence);
    let own = said.and_then(|said| said.get(&range.node));
    let is_ranged =
        own.is_some_and(|said| said.method == Method::Range && i128::from(said.increment) == range.size());
    out.extend(unfit(all, ranged, is_ranged));
    let ends = |low: i64, high: i64| i128::from(low) == range.first() && i128::from(high) == range.last();
    let next_fits =
        |next: i128| range.has(next) || (next == range.last() + 1 && range.has(next - 1) && is_ranged);
    if sequence.increment != 1
        || !ends(sequence.min, sequence.max)
        || i128::from(sequence.start) != range.first()
        || sequence.next().is_some_and(|next| !next_fits(next))
    {
        out.push(Fault::Undivided(format!(
            "is not confined to {} to {}",
            range.first(),
            range.last()
        )));
    } else if !is_ranged {
        out.push(Fault::Undivided(
            "the other members have not been told".to_owned(),
        ));
    } else if sequence.value.is_none() {
        out.push(Fault::Unknown(format!(
            "its value cannot be read: GRANT SELECT ON SEQUENCE {} to this role, or use --admin-dsn",
            sequence.sql_name()
        )));
    }
    if out.is_empty() {
        out.extend(sequence.columns.iter().find_map(handed_out));
    }
    for (node, name) in all.members.iter().filter(|(node, _)| **node != range.node) {
        match said.and_then(|said| said.get(node)) {
            Some(said) if said.method == Method::Snowflake => {}
            Some(said) if said.method == Method::Range && i128::from(said.increment) == range.size() => {}
            Some(said) if said.method == Method::Range => out.push(Fault::Refused {
                found: format!("{name} (id {node}) has a range of {} values, this node of {}", said.increment, range.size),
                remedy: format!("set sequences.range_size = {} here, or in the rule of its column", said.increment),
            }),
            _ => out.push(Fault::Others(format!(
                "{name} (id {node}) has not taken its range yet: set the method there, and run `anabranch sequences apply`"
            ))),
        }
    }
    out
}

/// What has no room: the range itself, or values where ranges are that nobody's range accounts for.
fn unfit(all: &Sequences, ranged: &Ranged, is_ranged: bool) -> Option<Fault> {
    let (sequence, range) = (&ranged.sequence, ranged.range);
    let widest = widest(sequence);
    if range.last() > i128::from(widest) {
        let columns = sequence.columns.iter().map(|column| {
            format!(
                "ALTER TABLE {} ALTER COLUMN {} TYPE bigint",
                qualified(&column.schema, &column.table),
                ident(&column.name)
            )
        });
        let mut statements: Vec<String> = columns.collect();
        statements.push(format!("ALTER SEQUENCE {} AS bigint", sequence.sql_name()));
        return Some(Fault::Refused {
            found: format!(
                "this node's range would be {} to {}, and at most {widest} fits",
                range.first(),
                range.last()
            ),
            remedy: format!(
                "at every node, and nobody writes to the table until all have it: {}; or a smaller range_size, alike everywhere, in a \
                 [[sequences.rule]] for its column",
                statements.join("; ")
            ),
        });
    }
    if is_ranged {
        return None;
    }
    let said = all.said_of(sequence);
    let known = |value: i128| {
        said.is_some_and(|said| {
            said.iter().any(|(node, said)| {
                let theirs = Range {
                    node: *node,
                    size: range.size,
                };
                said.method == Method::Range && theirs.has(value)
            })
        })
    };
    let bases = said
        .into_iter()
        .flatten()
        .filter_map(|(_, said)| said.base.map(i128::from));
    let columns = sequence.columns.iter().filter_map(|column| column.highest);
    // Its own, or of the member that it was copied from.
    let own = sequence.value.filter(|value| value.called);
    let own = own.map(|value| i128::from(value.last));
    let stranger = own
        .into_iter()
        .chain(bases)
        .chain(columns.map(i128::from))
        .filter(|value| *value >= range.size() && !known(*value))
        .max()?;
    Some(Fault::Refused {
        found: format!("values up to {stranger} were handed out by another rule, where ranges are"),
        remedy: format!(
            "set range_size above {stranger}, with room for what members count that have not changed, alike at every node; or \
             use another method"
        ),
    })
}

/// Adds to a plan what confines sequences to this node's range. Returns the steps, for the transaction of all sequences.
pub(super) fn plan(all: &Sequences, ranged: &[Ranged], fresh: bool, plan: &mut Plan) -> Vec<Step> {
    let mut steps = Vec::new();
    for each in ranged {
        let sequence = &each.sequence;
        let name = format!("{}.{}", sequence.schema, sequence.name);
        let check = format!("sequence {name}");
        plan.tables.push(name);
        let mut reason = None;
        for fault in faults(all, each) {
            match fault {
                Fault::Refused { found, remedy } => plan.findings.push(Finding::fail(&check, found, remedy)),
                Fault::Others(text) => plan.findings.push(Finding::warn(&check, text, "")),
                Fault::Unknown(text) => plan.findings.push(Finding::fail(&check, text, "")),
                Fault::Undivided(text) | Fault::Behind(text) => reason = Some(text),
            }
        }
        if let Some(few) = few(each) {
            plan.findings.push(Finding::warn(
                &check,
                few,
                "use bigint and the method snowflake, which have no end",
            ));
        }
        let Some(reason) = reason else { continue };
        if sequence.may_alter {
            steps.push(confine(each, &reason, fresh));
        } else {
            plan.findings.push(foreign(sequence, &check));
        }
    }
    steps
}

/// Few values are left?
fn few(ranged: &Ranged) -> Option<String> {
    if let Some(column) = at_its_end(ranged) {
        let (name, last) = (column.sql_name(), ranged.range.last());
        return Some(format!(
            "this node's range is used up: {last}, its last value, is in {name} already"
        ));
    }
    let left = left(ranged)?;
    (left < FEW.min(ranged.range.size() / 10))
        .then(|| format!("has only {left} values left of this node's range"))
}

/// A column with the range's last value, as far as the highest in it tell.
fn at_its_end(ranged: &Ranged) -> Option<&Column> {
    let is_last = |value: Option<i64>| value.map(i128::from) == Some(ranged.range.last());
    let mut columns = ranged.sequence.columns.iter();
    columns.find(|column| is_last(column.ahead) || is_last(column.highest))
}

/// Values that are left to this node; none where that is not known, or it is not in its range.
fn left(ranged: &Ranged) -> Option<i128> {
    let range = ranged.range;
    let next = ranged.sequence.next()?;
    (range.first()..=range.last() + 1)
        .contains(&next)
        .then(|| range.last() + 1 - next)
}

/// The next value is this node's lowest above all of its own that are known.
fn confine(ranged: &Ranged, reason: &str, fresh: bool) -> Step {
    let (sequence, range) = (&ranged.sequence, ranged.range);
    let (name, node) = (sequence.sql_name(), range.node);
    let (first, last) = (range.first(), range.last());
    // Beyond the last one there may be no bigint.
    let mut floors = vec![
        format!("{first}::numeric"),
        format!(
            "CASE WHEN was.last_value BETWEEN {first} AND {last} THEN was.last_value::numeric + was.is_called::int END"
        ),
    ];
    let columns = sequence.columns.iter();
    floors.extend(columns.filter(|column| column.type_max.is_some()).map(|column: &Column| {
        let (table, column) = (qualified(&column.schema, &column.table), ident(&column.name));
        format!("(SELECT max({column})::bigint::numeric + 1 FROM {table} WHERE {column} BETWEEN {first} AND {last})")
    }));
    let base = if fresh {
        "NULL".to_owned()
    } else {
        format!(
            "CASE WHEN was.is_called AND was.last_value NOT BETWEEN {first} AND {last} THEN was.last_value END"
        )
    };
    let body = format!(
        "DECLARE\n    was record;\n    floor numeric;\nBEGIN\n    \
             -- For its lock, which no nextval() passes.\n    \
             ALTER SEQUENCE {name} INCREMENT BY 1;\n    \
             SELECT last_value, is_called INTO was FROM {name};\n    \
             INSERT INTO anabranch.sequence (schema_name, sequence_name, node_id, method, increment, base)\n        \
                 VALUES ({}, {}, {node}, 'range', {}, {base})\n        \
                 ON CONFLICT (schema_name, sequence_name, node_id) DO UPDATE SET method = excluded.method,\n            \
                 increment = excluded.increment, base = greatest(anabranch.sequence.base, excluded.base), said_at = excluded.said_at;\n    \
             floor := greatest({});\n    \
             EXECUTE format('ALTER SEQUENCE %s MINVALUE {first} MAXVALUE {last} START WITH {first} RESTART WITH %s', {}, least(floor, {last}));\n    \
             -- A row has the last one: nothing is left.\n    \
             IF floor > {last} THEN\n        \
                 PERFORM setval({}, {last}, true);\n    \
             END IF;\n\
         END",
        literal(&sequence.schema),
        literal(&sequence.name),
        range.size,
        floors.join(",\n        "),
        literal(&name),
        literal(&name),
    );
    let quote = dollar_quote(&[&body]);
    Step::new(
        format!("confine {name} to {first} to {last} ({reason})"),
        format!("DO {quote} {body} {quote};"),
    )
}

/// The sequences, as `status` shows them.
pub(super) fn views(all: &Sequences, ranged: &[Ranged]) -> Vec<View> {
    ranged.iter().map(|each| view(all, each)).collect()
}

fn view(all: &Sequences, ranged: &Ranged) -> View {
    let sequence = &ranged.sequence;
    let left = left(ranged);
    let mut reasons: Vec<String> = faults(all, ranged).iter().map(Fault::text).collect();
    if left == Some(0) {
        reasons.push("no value is left to this node".to_owned());
    }
    View {
        sequence: format!("{}.{}", sequence.schema, sequence.name),
        method: Method::Range,
        columns: sequence.columns.iter().map(Column::sql_name).collect(),
        increment: sequence.increment,
        offset: None,
        last_value: sequence
            .value
            .filter(|value| value.called)
            .map(|value| value.last),
        left,
        managed: true,
        safe: reasons.is_empty(),
        warnings: few(ranged).into_iter().collect(),
        reasons,
    }
}

/// Why a sequence can collide, as far as the catalog tells.
pub(super) fn remark(all: &Sequences, ranged: &Ranged) -> Option<String> {
    let faults = faults(all, ranged);
    let known = faults.iter().find(|fault| !matches!(fault, Fault::Unknown(_)));
    known.map(Fault::text)
}

#[cfg(test)]
mod tests {
    use super::super::sequence::{Function, Said, Value};
    use super::*;

    const RANGE: Range = Range {
        node: NodeId(2),
        size: 1_000_000_000,
    };

    fn ranged(last: i64) -> Ranged {
        let column = Column {
            table: "t".to_owned(),
            default: None,
            highest: Some(last),
            ..Column::example()
        };
        Ranged {
            sequence: Sequence {
                value: Some(Value { last, called: true }),
                columns: vec![column],
                ..Sequence::example()
            },
            range: RANGE,
        }
    }

    fn confined(last: i64) -> Ranged {
        let mut it = ranged(last);
        (it.sequence.min, it.sequence.start) = (2_000_000_000, 2_000_000_000);
        it.sequence.max = 2_999_999_999;
        it
    }

    fn all(said: &[(u16, Method, i64, Option<i64>)]) -> Sequences {
        let said = said.iter().map(|&(node, method, increment, base)| {
            (
                NodeId(node),
                Said {
                    method,
                    increment,
                    base,
                },
            )
        });
        Sequences {
            all: Vec::new(),
            snowflakes: Vec::new(),
            function: Function::default(),
            said: [(("public".to_owned(), "s".to_owned()), said.collect())].into(),
            members: [(NodeId(1), "amber".to_owned()), (NodeId(2), "birch".to_owned())].into(),
            highest_id: NodeId(2),
        }
    }

    const SIZE: i64 = 1_000_000_000;

    fn planned(all: &Sequences, ranged: &Ranged) -> (Plan, Vec<Step>) {
        let mut out = Plan::default();
        let steps = plan(all, std::slice::from_ref(ranged), false, &mut out);
        (out, steps)
    }

    #[test]
    fn ranges_lie_beside_each_other_above_what_is_nobodys() {
        let of = |node| Range {
            node: NodeId(node),
            size: 10,
        };
        assert_eq!((of(1).first(), of(1).last(), of(2).first()), (10, 19, 20));
        assert!(!of(1).has(9) && of(1).has(10) && of(1).has(19) && !of(1).has(20));
    }

    #[test]
    fn an_ordinary_sequence_is_confined_and_then_left_alone() {
        let (plan, steps) = planned(&all(&[]), &ranged(100));
        assert!(plan.is_allowed());
        assert!(
            steps[0].sql.contains("MINVALUE 2000000000 MAXVALUE 2999999999"),
            "{}",
            steps[0].sql
        );
        let both = all(&[
            (1, Method::Range, SIZE, None),
            (2, Method::Range, SIZE, Some(100)),
        ]);
        assert!(planned(&both, &confined(2_000_000_005)).1.is_empty());
        let view = view(&both, &confined(2_000_000_005));
        assert!(view.safe && view.left == Some(i128::from(SIZE) - 6), "{view:?}");
    }

    #[test]
    fn a_member_that_has_no_range_yet_is_waited_for() {
        for said in [
            &[(2, Method::Range, SIZE, None)][..],
            &[(1, Method::Interleave, 16, None), (2, Method::Range, SIZE, None)][..],
        ] {
            let view = view(&all(said), &confined(2_000_000_005));
            assert!(!view.safe && view.reasons[0].contains("amber (id 1)"), "{view:?}");
        }
        let snowflakes = [(1, Method::Snowflake, 1, None), (2, Method::Range, SIZE, None)];
        assert!(view(&all(&snowflakes), &confined(2_000_000_005)).safe);
    }

    #[test]
    fn what_has_no_room_is_refused() {
        let refused = |all: &Sequences, ranged: &Ranged| {
            let plan = planned(all, ranged).0;
            plan.findings
                .iter()
                .map(|finding| format!("{} {};", finding.found, finding.remedy))
                .collect::<String>()
        };
        let mut narrow = ranged(100);
        narrow.sequence.columns[0].type_max = Some(i64::from(i32::MAX));
        assert!(refused(&all(&[]), &narrow).contains("ALTER COLUMN id TYPE bigint"));
        assert!(refused(&all(&[]), &ranged(SIZE)).contains("set range_size above 1000000000"));
        // A row of a member whose range it is, is no stranger.
        let other = [(1, Method::Range, SIZE, None)];
        let mut row = ranged(100);
        row.sequence.columns[0].highest = Some(SIZE + 7);
        assert!(planned(&all(&other), &row).0.is_allowed());
        let sizes = [(1, Method::Range, 5, None)];
        assert!(refused(&all(&sizes), &ranged(3)).contains("sequences.range_size = 5"));
    }

    #[test]
    fn the_end_of_a_range_is_told_before_and_when_it_is_reached() {
        let both = all(&[(1, Method::Range, SIZE, None), (2, Method::Range, SIZE, None)]);
        let near = view(&both, &confined(2_999_999_900));
        assert!(
            near.safe && near.warnings[0].contains("99 values left"),
            "{near:?}"
        );
        let end = view(&both, &confined(2_999_999_999));
        assert!(
            !end.safe && end.reasons == ["no value is left to this node"],
            "{end:?}"
        );
        assert!(end.warnings[0].contains("is used up: 2999999999"), "{end:?}");
    }

    #[test]
    fn a_row_with_the_last_value_of_the_range_is_told_before_the_sequence_is_lifted_to_it() {
        let both = all(&[(1, Method::Range, SIZE, None), (2, Method::Range, SIZE, None)]);
        let mut behind = confined(2_000_000_005);
        behind.sequence.columns[0].ahead = Some(2_999_999_999);
        let (plan, steps) = planned(&both, &behind);
        assert!(plan.is_allowed() && plan.findings[0].found.contains("is used up"));
        let sql = &steps[0].sql;
        assert!(
            sql.contains("least(floor, 2999999999)") && sql.contains("setval('public.s', 2999999999, true)"),
            "{sql}"
        );
    }
}
