//! Ids that never collide: every node hands out its own share of each sequence.
//!
//! In:   [`Sequences`], the configuration            Out: [`View`]s for `status`, a [`Plan`] for `execute`
//! Invariants: 1. node `k` hands out only values that leave `k` as the remainder when divided by the increment, above every
//!       value that any member may have handed out by another rule. 2. a sequence that is as it should be gives no step.
//!       3. what a member hands out by another rule it says in `anabranch.sequence`, in the transaction that ends it.
//! Not here: reading the catalog (`sequence`), running the plan (`execute`)
//!
//! The members change one after the other. A value that was handed out by the old rule while another node had changed
//! already may be above what that one has begun with: its base says so to all, and `apply` there lifts it.

mod limits;
mod steps;

use std::collections::BTreeSet;

use anabranch_proto::NodeId;
use serde::Serialize;

use self::limits::{overflow, room, smaller};
use self::steps::{divide, lift};
use super::finding::{Finding, Level, worst};
use super::plan::{Plan, Scope, Stage, Step};
use super::sequence::{Column, Sequence, Sequences};
use super::sql::ident;
use crate::config::{Config, Method};

/// Fewer values than this left are worth a word.
pub(super) const FEW: i128 = 1_000_000;

/// This node's share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    /// `sequences.increment`.
    pub increment: u32,
    /// Its id.
    pub node: NodeId,
}

impl Share {
    /// The one that a configuration gives its node.
    #[must_use]
    pub fn of(config: &Config) -> Self {
        Self {
            increment: config.sequences.increment,
            node: config.node.id,
        }
    }

    fn increment(self) -> i128 {
        i128::from(self.increment.max(1))
    }

    /// What its values leave as the remainder.
    #[must_use]
    pub fn offset(self) -> i128 {
        i128::from(self.node.0).rem_euclid(self.increment())
    }

    fn owns(self, value: i128) -> bool {
        value.rem_euclid(self.increment()) == self.offset()
    }

    /// Its lowest value that is not below `floor`.
    fn from(self, floor: i128) -> i128 {
        floor + (self.offset() - floor).rem_euclid(self.increment())
    }
}

/// What is asked for beyond the sequences of replicated tables.
#[derive(Debug, Clone, Default)]
pub struct Choice {
    /// Sequences that no column of a replicated table uses, as `schema.name`, to be divided too.
    pub more: Vec<String>,
    /// Sequences to be left as they are.
    pub skip: Vec<String>,
}

/// One sequence, as `status` shows it.
#[derive(Debug, Clone, Serialize)]
pub struct View {
    /// `schema.name`
    pub sequence: String,
    /// How its ids are kept apart from other nodes'.
    pub method: Method,
    /// Columns of replicated tables that use it.
    pub columns: Vec<String>,
    /// `INCREMENT BY`.
    pub increment: i64,
    /// What its next value leaves as the remainder; none where the value may not be read.
    pub offset: Option<i128>,
    /// `last_value`; none where it may not be read, or nothing was handed out.
    pub last_value: Option<i64>,
    /// Values that are left to this node; none where that is not known.
    pub left: Option<i128>,
    /// Is it divided, or to be divided? Else it only exists.
    pub managed: bool,
    /// Can it never collide with another member's?
    pub safe: bool,
    /// Why not.
    pub reasons: Vec<String>,
    /// What is worth a word, and makes nothing collide.
    pub warnings: Vec<String>,
}

/// What is wrong with a sequence, and who can mend it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Fault {
    /// `apply` here divides it.
    Undivided(String),
    /// `apply` here lifts it.
    Behind(String),
    /// Somebody must change it first.
    Refused { found: String, remedy: String },
    /// Another member must.
    Others(String),
    /// It cannot be told.
    Unknown(String),
}

impl Fault {
    pub(super) fn text(&self) -> String {
        match self {
            Self::Refused { found, remedy } => format!("{found}: {remedy}"),
            Self::Undivided(text) | Self::Behind(text) | Self::Others(text) | Self::Unknown(text) => {
                text.clone()
            }
        }
    }
}

/// The highest value that any member may have handed out by another rule, and whose it is.
fn highest_base(all: &Sequences, sequence: &Sequence) -> Option<(i64, NodeId)> {
    let said = all.said_of(sequence)?;
    said.iter()
        .filter_map(|(node, said)| Some((said.base?, *node)))
        .max()
}

fn is_managed(all: &Sequences, sequence: &Sequence, share: Share) -> bool {
    let said = all.said_of(sequence);
    !sequence.columns.is_empty() || said.is_some_and(|said| said.contains_key(&share.node))
}

/// Everything that stands between a sequence and never colliding.
fn faults(all: &Sequences, sequence: &Sequence, share: Share) -> Vec<Fault> {
    let mut out = refusals(sequence);
    out.extend(own(all, sequence, share));
    if let Some((base, node)) = highest_base(all, sequence)
        && let Some(next) = sequence.next()
        && next <= i128::from(base)
        && !out.iter().any(|fault| matches!(fault, Fault::Undivided(_)))
    {
        out.push(Fault::Behind(format!(
            "its next value is {next}, and node {node} may have handed out up to {base} before it took its own share"
        )));
    }
    if out.is_empty() {
        out.extend(sequence.columns.iter().find_map(handed_out));
    }
    let said = all.said_of(sequence);
    let others = all.members.iter().filter(|(node, _)| **node != share.node);
    for (node, name) in others {
        match said.and_then(|said| said.get(node)) {
            // Far above all that is handed out by one.
            Some(said) if said.method == Method::Snowflake => {}
            Some(said) if said.method == Method::Range => out.push(Fault::Others(format!(
                "{name} (id {node}) hands out a range of it: set the same method here and there, and run \
                 `anabranch sequences apply`"
            ))),
            None => out.push(Fault::Others(format!(
                "{name} (id {node}) has not taken its share yet: run `anabranch sequences apply` there"
            ))),
            Some(said) if said.increment != i64::from(share.increment) => out.push(Fault::Others(format!(
                "{name} (id {node}) divides it by {}, this node by {}: set sequences.increment alike and run \
                 `anabranch sequences apply` there",
                said.increment, share.increment
            ))),
            Some(_) => {}
        }
    }
    out
}

/// A server that was promoted or restored may lack what its sequences had handed out, which others gave back to its rows.
pub(super) fn handed_out(column: &Column) -> Option<Fault> {
    let ahead = column.ahead?;
    Some(Fault::Behind(format!(
        "it is still to hand out {ahead}, which is in {} already",
        column.sql_name()
    )))
}

/// What `apply` does not change by itself.
pub(super) fn refusals(sequence: &Sequence) -> Vec<Fault> {
    let name = sequence.sql_name();
    let mut out = Vec::new();
    if sequence.cycles {
        out.push(Fault::Refused {
            found: "is a CYCLE sequence: it hands out values a second time".to_owned(),
            remedy: format!("ALTER SEQUENCE {name} NO CYCLE, or --skip it"),
        });
    }
    if sequence.increment < 0 {
        out.push(Fault::Refused {
            found: "counts down".to_owned(),
            remedy: format!(
                "ALTER SEQUENCE {name} INCREMENT BY 1 with MINVALUE and MAXVALUE to match, or --skip it"
            ),
        });
    }
    out
}

fn own(all: &Sequences, sequence: &Sequence, share: Share) -> Option<Fault> {
    let said = all.said_of(sequence).and_then(|said| said.get(&share.node));
    let text = if i128::from(sequence.increment) != share.increment() {
        format!("is INCREMENT BY {}, not {}", sequence.increment, share.increment)
    } else if let Some(next) = sequence.next().filter(|next| !share.owns(*next)) {
        format!(
            "its next value {next} is not this node's: it leaves {}, not {}, when divided by {}",
            next.rem_euclid(share.increment()),
            share.offset(),
            share.increment
        )
    } else if !share.owns(i128::from(sequence.start)) {
        format!(
            "RESTART would go back to {}, which is not this node's",
            sequence.start
        )
    } else if said
        .is_none_or(|said| said.method != Method::Interleave || said.increment != i64::from(share.increment))
    {
        "the other members have not been told".to_owned()
    } else if sequence.value.is_none() {
        return Some(Fault::Unknown(format!(
            "its value cannot be read: GRANT SELECT ON SEQUENCE {} to this role, or use --admin-dsn",
            sequence.sql_name()
        )));
    } else {
        return None;
    };
    Some(Fault::Undivided(text))
}

/// Every sequence, those of replicated tables first.
#[must_use]
pub fn views(all: &Sequences, share: Share) -> Vec<View> {
    let mut out: Vec<View> = all
        .all
        .iter()
        .map(|sequence| view(all, sequence, share))
        .collect();
    out.sort_by_key(|view| !view.managed);
    out
}

fn view(all: &Sequences, sequence: &Sequence, share: Share) -> View {
    let managed = is_managed(all, sequence, share);
    let room = room(all, share);
    let faults = if managed {
        faults(all, sequence, share)
    } else {
        Vec::new()
    };
    let next = sequence.next();
    let left = next.map(|next| left(sequence, next));
    let mut reasons: Vec<String> = faults.iter().map(Fault::text).collect();
    reasons.extend(
        room.filter(|_| managed)
            .map(|room| format!("{}: {}", room.found, room.remedy)),
    );
    if managed && left == Some(0) {
        reasons.push("no value is left to this node".to_owned());
    }
    View {
        sequence: format!("{}.{}", sequence.schema, sequence.name),
        method: Method::Interleave,
        columns: sequence.columns.iter().map(Column::sql_name).collect(),
        increment: sequence.increment,
        offset: next.and_then(|next| next.checked_rem_euclid(i128::from(sequence.increment))),
        last_value: sequence
            .value
            .filter(|value| value.called)
            .map(|value| value.last),
        left,
        managed,
        safe: managed && reasons.is_empty(),
        warnings: left
            .filter(|left| managed && *left > 0 && *left < FEW)
            .map(|left| format!("has only {left} values left for this node"))
            .into_iter()
            .collect(),
        reasons,
    }
}

fn left(sequence: &Sequence, next: i128) -> i128 {
    let bound = i128::from(sequence.bound());
    if next > bound {
        return 0;
    }
    (bound - next) / i128::from(sequence.increment).abs().max(1) + 1
}

/// What this node has to do so that its values never collide.
#[must_use]
pub fn plan(all: &Sequences, share: Share, choice: &Choice) -> Plan {
    plan_as(all, share, choice, false)
}

/// The same for a node that has handed nothing out: the values it begins with are those of the node it was copied from.
#[must_use]
pub fn plan_of_joiner(all: &Sequences, share: Share, choice: &Choice) -> Plan {
    plan_as(all, share, choice, true)
}

fn plan_as(all: &Sequences, share: Share, choice: &Choice, fresh: bool) -> Plan {
    let mut out = Plan {
        findings: unknown(all, choice),
        ..Plan::default()
    };
    let mut steps = Vec::new();
    for sequence in &all.all {
        let name = format!("{}.{}", sequence.schema, sequence.name);
        let check = format!("sequence {name}");
        if choice.skip.contains(&name) {
            out.findings.push(Finding::warn(
                check,
                "is left as it is",
                "its values may collide with other nodes'",
            ));
            continue;
        }
        if !is_managed(all, sequence, share) && !choice.more.contains(&name) {
            if !sequence.in_use {
                let found = "is no column's default; left out";
                out.findings.push(Finding::ok(check, found));
            }
            continue;
        }
        out.tables.push(name);
        let (step, findings) = one(all, sequence, share, fresh);
        out.findings.extend(findings);
        steps.extend(step);
    }
    if !out.tables.is_empty() {
        out.findings.extend(room(all, share));
    }
    if worst(&out.findings) != Level::Fail && !steps.is_empty() {
        out.stages.push(Stage {
            scope: Scope::Transaction,
            steps,
        });
    }
    out
}

/// Names on the command line that mean nothing.
fn unknown(all: &Sequences, choice: &Choice) -> Vec<Finding> {
    let names: BTreeSet<String> = all
        .all
        .iter()
        .map(|sequence| format!("{}.{}", sequence.schema, sequence.name))
        .collect();
    choice
        .more
        .iter()
        .chain(&choice.skip)
        .filter(|name| !names.contains(*name))
        .map(|name| {
            Finding::fail(
                format!("sequence {name}"),
                "does not exist",
                "name it as schema.sequence; `anabranch sequences status` lists all",
            )
        })
        .collect()
}

fn one(all: &Sequences, sequence: &Sequence, share: Share, fresh: bool) -> (Option<Step>, Vec<Finding>) {
    let check = format!("sequence {}.{}", sequence.schema, sequence.name);
    let mut findings = Vec::new();
    let mut undivided = None;
    let mut behind = None;
    for fault in faults(all, sequence, share) {
        match fault {
            Fault::Refused { found, remedy } => findings.push(Finding::fail(&check, found, remedy)),
            Fault::Others(text) => findings.push(Finding::warn(&check, text, "")),
            Fault::Unknown(text) => findings.push(Finding::fail(&check, text, "")),
            Fault::Undivided(text) => undivided = Some(text),
            Fault::Behind(text) => behind = Some(text),
        }
    }
    let Some(reason) = undivided.clone().or(behind) else {
        return (None, findings);
    };
    if !sequence.may_alter {
        findings.push(foreign(sequence, &check));
        return (None, findings);
    }
    findings.extend(overflow(all, sequence, share, &check));
    findings.extend(smaller(all, sequence, share, &check));
    let step = if undivided.is_some() {
        divide(sequence, share, &reason, fresh)
    } else {
        lift(sequence, share, &reason)
    };
    (Some(step), findings)
}

/// A sequence that the session's role may not alter.
pub(super) fn foreign(sequence: &Sequence, check: &str) -> Finding {
    Finding::fail(
        check,
        format!(
            "belongs to {}; this session's role may not alter it",
            sequence.owner
        ),
        format!(
            "use --admin-dsn with {} or a superuser, or GRANT {} to this role",
            sequence.owner,
            ident(&sequence.owner)
        ),
    )
}

/// What `doctor` says of the keys of replicated tables, as far as the catalog tells: (schema, table, column) of each key.
#[must_use]
pub fn remarks(all: &Sequences, share: Share, keys: &BTreeSet<(&str, &str, &str)>) -> Vec<Finding> {
    if all.members.len() < 2 {
        return Vec::new();
    }
    let mut out = Vec::new();
    for sequence in &all.all {
        let key = sequence.columns.iter().find(|column| {
            keys.contains(&(
                column.schema.as_str(),
                column.table.as_str(),
                column.name.as_str(),
            ))
        });
        let Some(column) = key else { continue };
        let mut faults = faults(all, sequence, share);
        faults.retain(|fault| !matches!(fault, Fault::Unknown(_)));
        if let Some(fault) = faults.first() {
            out.push(Finding::warn(
                format!("table {}.{}", column.schema, column.table),
                format!(
                    "its key {} takes values from {}, which can collide with other nodes': {}",
                    column.name,
                    sequence.sql_name(),
                    fault.text()
                ),
                "run `anabranch sequences apply` at every node, then `anabranch sequences status`",
            ));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::super::sequence::{Said, Value};
    use super::*;

    fn sequence() -> Sequence {
        Sequence {
            schema: "public".to_owned(),
            name: "t_id_seq".to_owned(),
            data_type: "bigint".to_owned(),
            start: 1,
            min: 1,
            max: i64::MAX,
            increment: 1,
            cycles: false,
            owner: "app".to_owned(),
            may_alter: true,
            value: Some(Value {
                last: 100,
                called: true,
            }),
            columns: vec![Column {
                table_oid: 1,
                schema: "public".to_owned(),
                table: "t".to_owned(),
                name: "id".to_owned(),
                identity: None,
                default: None,
                type_max: Some(i64::MAX),
                highest: Some(90),
                ahead: None,
            }],
            in_use: true,
        }
    }

    const SHARE: Share = Share {
        increment: 16,
        node: NodeId(2),
    };

    fn all(sequence: Sequence, said: &[(u16, i64, Option<i64>)]) -> Sequences {
        let key = (sequence.schema.clone(), sequence.name.clone());
        let said = said
            .iter()
            .map(|&(node, increment, base)| {
                let method = Method::Interleave;
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
            all: vec![sequence],
            snowflakes: Vec::new(),
            function: super::super::sequence::Function::default(),
            said: [(key, said)].into(),
            members: [(NodeId(1), "amber".to_owned()), (NodeId(2), "birch".to_owned())].into(),
            highest_id: NodeId(2),
        }
    }

    fn divided() -> Sequence {
        Sequence {
            increment: 16,
            start: 2,
            value: Some(Value {
                last: 114,
                called: true,
            }),
            ..sequence()
        }
    }

    fn fails(plan: &Plan) -> String {
        let failed = plan
            .findings
            .iter()
            .filter(|finding| finding.level == Level::Fail);
        failed
            .map(|finding| format!("{} {}; ", finding.found, finding.remedy))
            .collect()
    }

    #[test]
    fn every_node_has_values_of_its_own_and_together_they_have_all() {
        for floor in -40..40 {
            let shares: BTreeSet<i128> = (1..=16)
                .map(|node| {
                    Share {
                        increment: 16,
                        node: NodeId(node),
                    }
                    .from(floor)
                })
                .collect();
            assert_eq!(shares, (floor..floor + 16).collect());
        }
    }

    #[test]
    fn an_ordinary_sequence_is_divided_and_then_left_alone() {
        let plan = plan(&all(sequence(), &[]), SHARE, &Choice::default());
        assert!(plan.is_allowed());
        assert!(
            plan.sql().contains("INCREMENT BY 16 START WITH 2"),
            "{}",
            plan.sql()
        );
        let after = all(divided(), &[(1, 16, None), (2, 16, Some(100))]);
        assert!(super::plan(&after, SHARE, &Choice::default()).stages.is_empty());
        assert!(views(&after, SHARE).iter().all(|view| view.safe));
    }

    #[test]
    fn a_base_of_another_member_above_the_next_value_lifts_it() {
        let all = all(divided(), &[(1, 16, Some(200)), (2, 16, Some(100))]);
        assert!(!views(&all, SHARE)[0].safe);
        let plan = plan(&all, SHARE, &Choice::default());
        assert!(plan.sql().contains("lift public.t_id_seq"), "{}", plan.sql());
        assert!(
            !plan.sql().contains("INSERT"),
            "what it handed out itself stays as it was said"
        );
    }

    #[test]
    fn a_value_of_its_own_that_is_in_a_row_already_lifts_it() {
        let mut behind = divided();
        behind.columns[0].ahead = Some(1042);
        let all = all(behind, &[(1, 16, None), (2, 16, Some(100))]);
        let view = views(&all, SHARE).remove(0);
        assert!(
            !view.safe && view.reasons[0].contains("1042, which is in public.t.id"),
            "{view:?}"
        );
        assert!(
            plan(&all, SHARE, &Choice::default())
                .sql()
                .contains("lift public.t_id_seq")
        );
    }

    #[test]
    fn a_member_that_has_said_nothing_or_something_else_makes_it_unsafe() {
        for said in [&[(2, 16, None)][..], &[(1, 8, None), (2, 16, None)][..]] {
            let view = views(&all(divided(), said), SHARE).remove(0);
            assert!(!view.safe && view.reasons[0].contains("amber (id 1)"), "{view:?}");
        }
    }

    #[test]
    fn what_was_said_of_a_sequence_that_was_made_anew_is_not_kept() {
        let said = [(1, 16, None), (2, 16, Some(100))];
        let unkept = |all: &Sequences| all.unkept(SHARE.node).len();
        let mut anew = all(sequence(), &said);
        assert_eq!((unkept(&anew), unkept(&all(divided(), &said))), (1, 0));
        assert!(anew.divided_elsewhere(SHARE.node).is_empty());
        // It is gone.
        anew.all.clear();
        assert_eq!(unkept(&anew), 1);
        let snowflake = |said: &mut Said| said.method = Method::Snowflake;
        anew.said
            .values_mut()
            .flat_map(BTreeMap::values_mut)
            .for_each(snowflake);
        assert_eq!(unkept(&anew), 0);
        assert!(anew.counted_again(SHARE.node).is_empty());
        // A column takes values from it again, or does still: `apply` goes from column to column.
        anew.all.push(sequence());
        assert_eq!(unkept(&anew), 0);
        assert_eq!(anew.counted_again(SHARE.node), ["public.t_id_seq"]);
    }

    #[test]
    fn a_sequence_that_another_member_alone_divides_is_named() {
        let elsewhere = |all: &Sequences| all.divided_elsewhere(SHARE.node);
        let mut all = all(sequence(), &[(1, 16, None)]);
        assert_eq!(elsewhere(&all), ["public.t_id_seq"]);
        all.members.remove(&NodeId(1));
        assert!(elsewhere(&all).is_empty());
    }

    #[test]
    fn what_cannot_be_divided_is_refused_with_a_remedy() {
        let said = |sequence| fails(&plan(&all(sequence, &[]), SHARE, &Choice::default()));
        let cycles = Sequence {
            cycles: true,
            ..sequence()
        };
        assert!(said(cycles).contains("NO CYCLE"));
        let down = Sequence {
            increment: -1,
            ..sequence()
        };
        assert!(said(down).contains("counts down"));
        let mut small = Sequence {
            max: 32_767,
            ..sequence()
        };
        small.columns[0].highest = Some(32_760);
        assert!(said(small.clone()).contains("would be 32770"), "{}", said(small));
        let foreign = Sequence {
            may_alter: false,
            ..sequence()
        };
        assert!(said(foreign).contains("belongs to app"));
        let narrow = Share {
            increment: 1,
            ..SHARE
        };
        assert!(
            fails(&plan(&all(sequence(), &[]), narrow, &Choice::default())).contains("set it to 2 or more")
        );
        let larger = all(sequence(), &[(1, 32, None)]);
        assert!(fails(&plan(&larger, SHARE, &Choice::default())).contains("sequences.increment = 32"));
    }
}
