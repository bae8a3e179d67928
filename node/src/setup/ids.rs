//! Ids that no two nodes hand out: which column has them by which method, and what all methods plan and show together.
//!
//! In:   [`Sequences`], the configuration            Out: [`View`]s for `status`, a [`Plan`] for `execute`, findings for `doctor`
//! Invariants: a column has one method; a sequence is divided as long as a column that is divided uses it
//! Not here: what a method is (`interleave`, `range`, `snowflake`)

use std::collections::BTreeSet;

use super::finding::{Finding, Level, worst};
use super::interleave::{self, Choice, Share, View};
use super::plan::{Plan, Scope, Stage, Step};
use super::range::{self, Range, Ranged};
use super::sequence::{Column, Sequence, Sequences};
use super::snowflake::{self, Moving};
use super::sql::literal;
use crate::config::{Config, Method};

/// The sequences and columns by what is to become of them.
struct Split {
    /// What is interleaved, with all that was said.
    rest: Sequences,
    /// Sequences whose node has a range.
    ranged: Vec<Ranged>,
    /// Columns that are to have snowflake ids and do not.
    moving: Vec<Moving>,
    /// Sequences of which this node had a range, which they are still confined to.
    confined: Vec<String>,
    /// Sequences whose columns do not agree.
    findings: Vec<Finding>,
}

fn split(all: &Sequences, config: &Config, choice: &Choice) -> Split {
    let mut out = Split {
        rest: all.clone(),
        ranged: Vec::new(),
        moving: Vec::new(),
        confined: Vec::new(),
        findings: Vec::new(),
    };
    for whole in &all.all {
        let name = format!("{}.{}", whole.schema, whole.name);
        if choice.skip.contains(&name) {
            continue;
        }
        let key = (whole.schema.clone(), whole.name.clone());
        let own = all.said.get(&key).and_then(|said| said.get(&config.node.id));
        let method = |column: &Column| config.sequences.method_of(&column.display());
        let is_moving =
            |column: &Column| method(column) == Method::Snowflake && !choice.skip.contains(&column.display());
        let (move_on, stay): (Vec<Column>, Vec<Column>) = whole.columns.iter().cloned().partition(is_moving);
        let last = stay.is_empty();
        out.moving.extend(move_on.into_iter().map(|column| Moving {
            sequence: whole.clone(),
            column,
            last,
        }));
        // It is of no use here any more, so there is nothing to divide.
        if last && let Some(said) = out.rest.said.get_mut(&key) {
            let used = !whole.columns.is_empty();
            said.retain(|node, said| *node != config.node.id || (!used && said.method != Method::Snowflake));
        }
        let sizes: BTreeSet<Option<u64>> = stay
            .iter()
            .map(|column| {
                (method(column) == Method::Range).then(|| config.sequences.range_size_of(&column.display()))
            })
            .collect();
        // Of one that no column uses, what holds for all.
        let is_asked = choice.more.contains(&name) || own.is_some_and(|own| own.method != Method::Snowflake);
        let alone = whole.columns.is_empty() && is_asked && config.sequences.method == Method::Range;
        let size = match sizes.iter().collect::<Vec<_>>().as_slice() {
            [] => alone.then_some(config.sequences.range_size),
            [one] => **one,
            _ => {
                out.findings.push(Finding::fail(
                    format!("sequence {name}"),
                    "its columns have different methods or sizes of ranges",
                    "name all its columns alike in [[sequences.rule]]",
                ));
                continue;
            }
        };
        let sequence = Sequence {
            columns: stay,
            ..whole.clone()
        };
        let Some(at) = out
            .rest
            .all
            .iter()
            .position(|it| it.schema == whole.schema && it.name == whole.name)
        else {
            continue;
        };
        if let Some(size) = size {
            out.rest.all.remove(at);
            let range = Range {
                node: config.node.id,
                size,
            };
            out.ranged.push(Ranged { sequence, range });
        } else if let Some(it) = out.rest.all.get_mut(at) {
            *it = sequence;
            if own.is_some_and(|own| own.method == Method::Range) && !last {
                // As it will be once it is confined no more.
                (it.min, it.start, it.max) = (1, 1, range::widest(whole));
                out.confined.push(it.sql_name());
            }
        }
    }
    out
}

/// What this node has to do so that its ids never collide.
#[must_use]
pub fn plan(all: &Sequences, config: &Config, choice: &Choice) -> Plan {
    let split = split(all, config, choice);
    let known: BTreeSet<String> = all.columns().map(Column::display).collect();
    let ranged: BTreeSet<String> = split
        .ranged
        .iter()
        .map(|each| format!("{}.{}", each.sequence.schema, each.sequence.name))
        .collect();
    // What the other methods know is not asked of that one.
    let others = |names: &[String]| {
        let others = names
            .iter()
            .filter(|name| !known.contains(*name) && !ranged.contains(*name));
        others.cloned().collect()
    };
    let choice = Choice {
        skip: others(&choice.skip),
        more: others(&choice.more),
    };
    let mut plan = interleave::plan(&split.rest, Share::of(config), &choice);
    plan.findings.extend(useless_rules(all, config));
    finish(plan, all, split, config, false)
}

/// The same for a node that has handed nothing out: the values it begins with are those of the node it was copied from.
///
/// What no other member divides, and this node cannot, stays as it is, with a warning: its ids are no less safe than before. So where
/// the plan is not allowed, this node would give ids that a member gives.
#[must_use]
pub fn plan_of_joiner(all: &Sequences, config: &Config) -> Plan {
    let mut plan = joiners(all, config, &Choice::default());
    if plan.is_allowed() {
        return plan;
    }
    let mut left = Vec::new();
    let mut choice = Choice::default();
    for sequence in all
        .all
        .iter()
        .filter(|sequence| !is_divided(all, sequence, config))
    {
        let name = format!("{}.{}", sequence.schema, sequence.name);
        let of_columns = sequence
            .columns
            .iter()
            .map(|column| format!("column {}", column.display()));
        let checks: BTreeSet<String> = of_columns.chain([format!("sequence {name}")]).collect();
        let failed = plan
            .findings
            .iter()
            .filter(|finding| finding.level == Level::Fail);
        let of_it: Vec<Finding> = failed
            .filter(|finding| checks.contains(&finding.check))
            .cloned()
            .collect();
        if !of_it.is_empty() {
            choice.skip.push(name);
            left.extend(of_it);
        }
    }
    if !choice.skip.is_empty() {
        plan = joiners(all, config, &choice);
    }
    if !all.all.iter().any(|sequence| is_divided(all, sequence, config)) {
        // What is not about one sequence, such as an increment without room.
        left.extend(
            plan.findings
                .extract_if(.., |finding| finding.level == Level::Fail),
        );
    }
    plan.findings.extend(left.into_iter().map(|finding| Finding {
        level: Level::Warn,
        ..finding
    }));
    plan
}

/// Does another member hand out a share of a sequence that columns take values from here?
fn is_divided(all: &Sequences, sequence: &Sequence, config: &Config) -> bool {
    let said = all.said_of(sequence).into_iter().flatten();
    let mut others = said.filter(|(node, _)| **node != config.node.id && all.members.contains_key(node));
    // Snowflake ids are far above what one node counts.
    !sequence.columns.is_empty() && others.any(|(_, said)| said.method != Method::Snowflake)
}

fn joiners(all: &Sequences, config: &Config, choice: &Choice) -> Plan {
    let split = split(all, config, choice);
    let plan = interleave::plan_of_joiner(&split.rest, Share::of(config), choice);
    let mut plan = finish(plan, all, split, config, true);
    if let Some(step) = says_as_others(all, config).filter(|_| plan.is_allowed()) {
        plan.stages.push(Stage {
            scope: Scope::Transaction,
            steps: vec![step],
        });
    }
    plan
}

fn finish(mut plan: Plan, all: &Sequences, split: Split, config: &Config, fresh: bool) -> Plan {
    plan.findings.extend(split.findings);
    if let Some(stage) = plan.stages.first_mut() {
        for name in split.confined.iter().rev() {
            let step = Step::new(
                format!("confine {name} no more"),
                format!("ALTER SEQUENCE {name} MINVALUE 1 NO MAXVALUE START WITH 1;"),
            );
            stage.steps.insert(0, step);
        }
    }
    let steps = range::plan(all, &split.ranged, fresh, &mut plan);
    if let Some(stage) = plan.stages.first_mut() {
        stage.steps.extend(steps);
    } else if !steps.is_empty() {
        let scope = Scope::Transaction;
        plan.stages.push(Stage { scope, steps });
    }
    snowflake::extend(&mut plan, all, &split.moving, config.node.id, fresh);
    if worst(&plan.findings) == Level::Fail {
        plan.stages.clear();
    }
    plan
}

/// Rules that mean nothing, or what `apply` does not do.
fn useless_rules(all: &Sequences, config: &Config) -> Vec<Finding> {
    let mut out = Vec::new();
    let snowflakes: BTreeSet<String> = all.snowflakes.iter().map(Column::display).collect();
    let known: BTreeSet<String> = all.columns().map(Column::display).collect();
    for rule in &config.sequences.rule {
        let check = format!("sequences.rule {}", rule.column);
        if !known.contains(&rule.column) {
            out.push(Finding::warn(
                check,
                "no such column of a replicated table takes values from a sequence or anabranch.snowflake()",
                "name it as schema.table.column, or take the rule out",
            ));
        } else if rule.method != Method::Snowflake && snowflakes.contains(&rule.column) {
            out.push(Finding::fail(
                check,
                "has snowflake ids, and is not taken back to its sequence: that would go on above them, where other nodes' are",
                "take the rule out, or set its method to snowflake",
            ));
        }
    }
    out
}

/// A joiner has none of the sequences that were dropped with an identity, and uses none that others do not.
fn says_as_others(all: &Sequences, config: &Config) -> Option<Step> {
    let used = |schema: &str, name: &str| {
        all.all.iter().any(|sequence| {
            sequence.schema == schema && sequence.name == name && !sequence.columns.is_empty()
        })
    };
    let names: Vec<String> = all
        .said
        .iter()
        .filter(|((schema, name), said)| {
            !said.contains_key(&config.node.id)
                && said.values().any(|said| said.method == Method::Snowflake)
                && !used(schema, name)
        })
        .map(|((schema, name), _)| {
            format!(
                "({}, {}, {}, 'snowflake', 1)",
                literal(schema),
                literal(name),
                config.node.id
            )
        })
        .collect();
    (!names.is_empty()).then(|| {
        Step::new(
            format!("say of {} sequence(s) that they are not used here", names.len()),
            format!(
                "INSERT INTO anabranch.sequence (schema_name, sequence_name, node_id, method, increment) VALUES\n    {}\n    \
                 ON CONFLICT DO NOTHING;",
                names.join(",\n    ")
            ),
        )
    })
}

/// Every sequence and every column with snowflake ids; those of replicated tables first.
#[must_use]
pub fn views(all: &Sequences, config: &Config) -> Vec<View> {
    let Split {
        mut rest,
        ranged,
        moving,
        ..
    } = split(all, config, &Choice::default());
    // Shown with the columns that are to leave it.
    rest.all.retain(|sequence| {
        !sequence.columns.is_empty()
            || !moving
                .iter()
                .any(|each| each.sequence.schema == sequence.schema && each.sequence.name == sequence.name)
    });
    let mut out = interleave::views(&rest, Share::of(config));
    out.extend(range::views(all, &ranged));
    out.extend(snowflake::views(all, &moving, config.node.id));
    out.sort_by_key(|view| !view.managed);
    out
}

/// What `doctor` says of the keys of replicated tables, as far as the catalog tells: (schema, table, column) of each key.
#[must_use]
pub fn remarks(all: &Sequences, config: &Config, keys: &BTreeSet<(&str, &str, &str)>) -> Vec<Finding> {
    if all.members.len() < 2 {
        return Vec::new();
    }
    let Split {
        rest, ranged, moving, ..
    } = split(all, config, &Choice::default());
    let mut out = interleave::remarks(&rest, Share::of(config), keys);
    let is_key = |column: &Column| {
        keys.contains(&(
            column.schema.as_str(),
            column.table.as_str(),
            column.name.as_str(),
        ))
    };
    let remark = |column: &Column, why: String| {
        Finding::warn(
            format!("table {}.{}", column.schema, column.table),
            format!("its key {} can collide with other nodes': {why}", column.name),
            "run `anabranch sequences apply` at every node, then `anabranch sequences status`",
        )
    };
    for each in &ranged {
        let key = each.sequence.columns.iter().find(|column| is_key(column));
        if let (Some(column), Some(why)) = (key, range::remark(all, each)) {
            out.push(remark(column, why));
        }
    }
    let undone = moving.iter().filter(|each| is_key(&each.column));
    out.extend(undone.map(|each| remark(&each.column, snowflake::undone(each))));
    if snowflake::step(all.function.made_from.as_deref(), config.node.id).is_some() {
        let why = format!(
            "anabranch.snowflake() does not give ids of node {}",
            config.node.id
        );
        let columns = all.snowflakes.iter().filter(|column| is_key(column));
        out.extend(columns.map(|column| remark(column, why.clone())));
    }
    out
}

#[cfg(test)]
mod tests {
    use anabranch_proto::NodeId;

    use super::super::sequence::{Function, Said, Value};
    use super::*;
    use crate::config::SequenceRule;

    fn column(table: &str) -> Column {
        Column {
            table: table.to_owned(),
            ..Column::example()
        }
    }

    /// One sequence, used by these tables' ids, and what was said of it.
    fn all(tables: &[&str], said: &[(u16, Method)]) -> Sequences {
        let key = ("public".to_owned(), "s".to_owned());
        let said = said
            .iter()
            .map(|&(node, method)| {
                let increment = if method == Method::Interleave { 16 } else { 1 };
                let base = None;
                (
                    NodeId(node),
                    Said {
                        method,
                        increment,
                        base,
                    },
                )
            })
            .collect();
        Sequences {
            all: vec![Sequence {
                columns: tables.iter().map(|table| column(table)).collect(),
                ..Sequence::example()
            }],
            snowflakes: Vec::new(),
            function: Function::default(),
            said: [(key, said)].into(),
            members: [(NodeId(1), "amber".to_owned()), (NodeId(17), "queen".to_owned())].into(),
            highest_id: NodeId(17),
        }
    }

    /// Node 1 with rules for single tables' ids.
    fn config(method: Method, rules: &[(&str, Method)]) -> Config {
        let mut config = Config::example();
        config.sequences.method = method;
        config.sequences.rule = rules
            .iter()
            .map(|(table, method)| SequenceRule {
                column: format!("public.{table}.id"),
                method: *method,
                range_size: None,
            })
            .collect();
        config
    }

    fn planned(all: &Sequences, config: &Config) -> Plan {
        plan(all, config, &Choice::default())
    }

    #[test]
    fn where_all_ids_are_snowflakes_nothing_is_divided_and_no_increment_needs_room() {
        let plan = planned(&all(&["t"], &[]), &config(Method::Snowflake, &[]));
        assert!(plan.is_allowed(), "{:?}", plan.findings);
        let sql = plan.sql();
        assert!(
            sql.contains("public.t ALTER COLUMN id SET DEFAULT anabranch.snowflake();"),
            "{sql}"
        );
        assert!(sql.contains("'snowflake', 1"), "the others are told: {sql}");
        assert!(!sql.contains("interleave public.s"), "{sql}");
    }

    #[test]
    fn a_sequence_of_two_columns_is_divided_for_the_one_that_stays() {
        let config = config(Method::Interleave, &[("t", Method::Snowflake)]);
        let mut all = all(&["t", "u"], &[]);
        all.highest_id = NodeId(2);
        let sql = planned(&all, &config).sql();
        assert!(sql.contains("interleave public.s by 16"), "{sql}");
        assert!(sql.contains("public.t ALTER COLUMN id SET DEFAULT"), "{sql}");
        assert!(!sql.contains("'snowflake', 1"), "it is in use here: {sql}");
    }

    #[test]
    fn a_member_with_snowflake_ids_is_not_waited_for() {
        let mut all = all(&["t"], &[(1, Method::Interleave), (17, Method::Snowflake)]);
        (all.all[0].increment, all.all[0].start, all.highest_id) = (16, 1, NodeId(2));
        all.all[0].value = Some(Value {
            last: 97,
            called: true,
        });
        let config = config(Method::Interleave, &[]);
        let view = views(&all, &config).remove(0);
        assert!(view.safe, "{view:?}");
        all.said.clear();
        assert!(!views(&all, &config).remove(0).safe);
    }

    #[test]
    fn a_joiner_says_as_the_others_that_a_sequence_is_not_used() {
        let mut all = all(&[], &[(17, Method::Snowflake)]);
        let config = config(Method::Snowflake, &[]);
        let sql = plan_of_joiner(&all, &config).sql();
        assert!(sql.contains("('public', 's', 1, 'snowflake', 1)"), "{sql}");
        all.all.clear();
        assert_eq!(
            plan_of_joiner(&all, &config).sql(),
            sql,
            "dropped with an identity"
        );
    }

    #[test]
    fn a_joiner_that_has_no_share_where_members_have_is_refused() {
        let joiner = |id: u16, increment: u32| {
            let mut config = config(Method::Interleave, &[]);
            (config.node.id, config.sequences.increment) = (NodeId(id), increment);
            config
        };
        let mut all = all(&["t"], &[(1, Method::Interleave)]);
        (all.highest_id, all.members) = (NodeId(2), [(NodeId(1), "amber".to_owned())].into());
        assert!(plan_of_joiner(&all, &joiner(3, 16)).is_allowed());
        // No room for its id, here or at the members; a smaller increment than theirs.
        for config in [joiner(17, 16), joiner(17, 32), joiner(3, 8)] {
            let plan = plan_of_joiner(&all, &config);
            assert!(!plan.is_allowed() && plan.stages.is_empty(), "{plan:?}");
        }
        // No room in what the column holds, below a range, or in a range.
        let mut narrow = all.clone();
        narrow.all[0].columns[0].type_max = Some(100);
        assert!(!plan_of_joiner(&narrow, &joiner(3, 16)).is_allowed());
        let mut ranged = joiner(3, 16);
        ranged.sequences.method = Method::Range;
        narrow.all[0].columns[0].type_max = Some(i64::from(i32::MAX));
        assert!(!plan_of_joiner(&narrow, &ranged).is_allowed());
    }

    #[test]
    fn what_no_member_divides_keeps_no_joiner_away() {
        let mut config = config(Method::Interleave, &[]);
        config.node.id = NodeId(17);
        let mut all = all(&["t"], &[]);
        // Without room for its id.
        let plan = plan_of_joiner(&all, &config);
        assert!(plan.is_allowed() && plan.stages.is_empty(), "{plan:?}");
        assert_eq!(worst(&plan.findings), Level::Warn);
        // One that goes round is left alone, and the other is divided.
        config.node.id = NodeId(3);
        all.highest_id = NodeId(2);
        let key = ("public".to_owned(), "s".to_owned());
        let said = Said {
            method: Method::Interleave,
            increment: 16,
            base: None,
        };
        all.said.entry(key).or_default().insert(NodeId(1), said);
        let mut round = all.all[0].clone();
        (round.name, round.cycles) = ("round".to_owned(), true);
        all.all.push(round);
        let plan = plan_of_joiner(&all, &config);
        assert!(plan.is_allowed(), "{plan:?}");
        let sql = plan.sql();
        assert!(sql.contains("interleave public.s by 16"), "{sql}");
        assert!(!sql.contains("interleave public.round"), "{sql}");
    }

    #[test]
    fn a_sequence_that_all_its_columns_leave_is_divided_no_more() {
        let config = config(Method::Snowflake, &[]);
        let leaving = all(&["t"], &[(1, Method::Interleave)]);
        assert!(!planned(&leaving, &config).sql().contains("interleave public.s"));
        let left = all(&[], &[(1, Method::Snowflake)]);
        assert!(planned(&left, &config).stages.is_empty());
        assert!(!views(&left, &config).remove(0).managed);
        // One that no column uses, and that was asked for, is.
        let asked = all(&[], &[(1, Method::Interleave)]);
        assert!(views(&asked, &config).remove(0).managed);
    }

    #[test]
    fn what_cannot_be_a_snowflake_stops_everything() {
        let mut narrow = all(&["t", "u"], &[]);
        narrow.all[0].columns[0].type_max = Some(i64::from(i32::MAX));
        let plan = planned(&narrow, &config(Method::Snowflake, &[]));
        assert!(!plan.is_allowed() && plan.stages.is_empty());
        let mut taken = all(&["t"], &[]);
        taken.all[0].columns[0].highest = Some(snowflake::LOWEST);
        assert!(!planned(&taken, &config(Method::Snowflake, &[])).is_allowed());
        // Those of a member that has changed are no strangers.
        let mut others = all(&["t"], &[(17, Method::Snowflake)]);
        others.all[0].columns[0].highest = Some(snowflake::LOWEST);
        assert!(planned(&others, &config(Method::Snowflake, &[])).is_allowed());
    }

    #[test]
    fn a_rule_that_names_nothing_is_told() {
        let plan = planned(
            &all(&["t"], &[]),
            &config(Method::Snowflake, &[("other", Method::Snowflake)]),
        );
        let told = plan
            .findings
            .iter()
            .any(|finding| finding.check.contains("public.other.id"));
        assert!(told, "{:?}", plan.findings);
    }
}
