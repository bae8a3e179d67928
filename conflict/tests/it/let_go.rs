//! A row that is written all the time: where a fold may begin, and what is let go, make no difference to the row, nor to what is said of
//! what was lost. Against a history that keeps everything.

use anabranch_conflict::merge::number::Kind as Number;
use anabranch_conflict::merge::{self, Effect, Field, History, List, Row, Rule, Step};
use anabranch_conflict::{Kind, Version};
use anabranch_proto::{NodeId, Position, Stamp, Vector};
use proptest::prelude::*;
use uhlc::NTP64;

const RULES: [Rule; 5] = [
    Rule::Unit(0),
    // Sums do not always fit.
    Rule::Delta(Number::Integer(2)),
    Rule::Max(Number::Integer(2)),
    Rule::Append(List::Text),
    Rule::Unit(1),
];

const NODES: [NodeId; 3] = [NodeId(1), NodeId(2), NodeId(3)];

/// A write, or something that comes in from another node.
#[derive(Debug, Clone, Copy)]
struct Op {
    node: usize,
    what: u8,
    value: i16,
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let op = (0..NODES.len(), 0u8..20, -20_000i16..20_000);
    prop::collection::vec(op.prop_map(|(node, what, value)| Op { node, what, value }), 1..60)
}

/// The row that a write leaves, of one that it found.
fn written(found: Option<&Row>, op: Op) -> Row {
    let number = |value: i16| Field::Binary(value.to_be_bytes().to_vec().into());
    let read = |field: &Field| match field {
        Field::Binary(bytes) => i16::from_be_bytes(bytes[..].try_into().unwrap()),
        field => panic!("{field:?}"),
    };
    let empty = || {
        vec![
            number(0),
            number(0),
            number(0),
            Field::Binary(Vec::new().into()),
            number(0),
        ]
    };
    let mut row = found.cloned().unwrap_or_else(empty);
    match op.what % 5 {
        1 => row[1] = number(read(&row[1]).checked_add(op.value).unwrap_or(0)),
        3 => {
            let Field::Binary(text) = &row[3] else {
                panic!("{row:?}")
            };
            row[3] = Field::Binary([&text[..], &[op.value.to_be_bytes()[1]]].concat().into());
        }
        at => row[usize::from(at)] = number(op.value),
    }
    row
}

/// One node, which keeps everything.
#[derive(Debug, Clone)]
struct Node {
    history: History,
    steps: Vec<Step>,
    applied: Vector,
}

impl Node {
    fn new() -> Self {
        Self {
            history: History::new(Vector::new(), false),
            steps: Vec::new(),
            applied: Vector::new(),
        }
    }

    fn admit(&mut self, step: &Step) {
        self.history.admit(step.version, &step.deps);
        self.steps.push(step.clone());
        self.steps.sort_by_key(|step| step.version.stamp);
        self.applied.raise(step.version.origin(), step.version.position);
    }

    fn steps(&self) -> Vec<&Step> {
        let kept = |step: &&Step| self.history.holds(step.version.stamp);
        self.steps.iter().filter(kept).collect()
    }

    /// What is folded for some versions; and which are left out of sums.
    fn fold(&self, asked: &[Stamp]) -> (Option<Row>, Vec<(Version, usize)>) {
        let from = self.history.begin(asked);
        let (state, left_out) = self
            .history
            .fold(from, &RULES, &self.steps()[from..], &Vector::new());
        (state.row, left_out)
    }

    fn losses(&self, of: Stamp) -> Vec<merge::Loss> {
        let from = self.history.begin(&[of]);
        merge::losses(&RULES, &self.steps()[from..], of)
    }

    /// All of it, from the beginning.
    fn whole(&self) -> (Option<Row>, Vec<(Version, usize)>) {
        let (state, left_out) = self.history.fold(0, &RULES, &self.steps(), &Vector::new());
        (state.row, left_out)
    }

    fn may_apply(&self, step: &Step) -> bool {
        !step.version.covered_by(&self.applied) && self.applied.includes(&step.deps)
    }
}

/// All writes of a row, in the order of their stamps.
fn writes(ops: &[Op]) -> Vec<Step> {
    let mut nodes = [Node::new(), Node::new(), Node::new()];
    let mut all: Vec<Step> = Vec::new();
    for (op, time) in ops.iter().zip(1u64..) {
        let node = &mut nodes[op.node];
        if op.what < 8 {
            // The oldest of the next one, or of the one after it.
            let from = NODES[(op.node + 1 + usize::from(op.what % 2)) % NODES.len()];
            let comes = |step: &&Step| step.version.origin() == from && node.may_apply(step);
            if let Some(step) = all.iter().find(comes) {
                node.admit(step);
            }
            continue;
        }
        let (found, _) = node.whole();
        let row = written(found.as_ref(), *op);
        let effect = match (found, op.what) {
            (Some(_), 19) => Effect::Delete,
            (Some(_), 18) => Effect::Replace(row),
            (Some(old), _) => Effect::Change { old, new: row },
            (None, _) => Effect::Put(row),
        };
        let step = Step {
            version: Version {
                stamp: Stamp {
                    time: NTP64(time),
                    node: NODES[op.node],
                },
                position: Position::new(1, time),
                kind: if effect == Effect::Delete {
                    Kind::Delete
                } else {
                    Kind::Put
                },
            },
            deps: node.applied.clone(),
            effect,
        };
        node.admit(&step);
        all.push(step);
    }
    all
}

/// What everything covers that is still to come.
fn stable(applied: &Vector, to_come: &[Step]) -> Vector {
    let deps = to_come.iter().map(|step| &step.deps);
    deps.fold(applied.clone(), |stable, deps| stable.meet(deps))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]

    #[test]
    fn where_a_fold_begins_and_what_is_let_go_makes_no_difference(
        ops in ops(),
        order in prop::collection::vec((any::<u16>(), 0u8..4), 60),
    ) {
        let mut to_come = writes(&ops);
        let (mut all, mut few) = (Node::new(), Node::new());
        for (pick, forget) in order {
            let ready: Vec<usize> = (0..to_come.len()).filter(|at| all.may_apply(&to_come[*at])).collect();
            let Some(at) = ready.get(usize::from(pick) % ready.len().max(1)) else { break };
            let step = to_come.remove(*at);
            let stamp = step.version.stamp;
            prop_assert!(!few.history.has_let_go(&step.version));
            all.admit(&step);
            few.admit(&step);
            let (row, left_out) = all.whole();
            let (shown, said) = few.fold(&[stamp]);
            prop_assert_eq!(&shown, &row);
            let is_above = |out: &&(Version, usize)| out.0.stamp >= stamp;
            prop_assert_eq!(
                said.iter().filter(is_above).collect::<Vec<_>>(),
                left_out.iter().filter(is_above).collect::<Vec<_>>()
            );
            prop_assert_eq!(few.losses(stamp), merge::losses(&RULES, &all.steps(), stamp));
            let stable = stable(&all.applied, &to_come);
            if few.history.is_in(&stable) {
                continue;
            }
            let steps: Vec<Step> = few.steps().into_iter().cloned().collect();
            match forget {
                0 => {}
                1 => few.history.compact(&RULES, &steps.iter().collect::<Vec<_>>(), &stable, &Vector::new()),
                _ => {
                    few.history.let_go(&stable);
                }
            }
            if few.history.is_image() {
                let steps = few.steps();
                prop_assert_eq!(steps[0].effect.row(), row.as_ref());
            }
            prop_assert_eq!(few.fold(&[]).0, row);
        }
    }

    #[test]
    fn of_a_row_that_nobody_races_nothing_is_kept_that_is_stable(count in 2usize..50, upto in 0u64..50) {
        let ops: Vec<Op> = (0..count).map(|_| Op { node: 0, what: 9, value: 1 }).collect();
        let mut node = Node::new();
        writes(&ops).iter().for_each(|step| node.admit(step));
        let mut stable = Vector::new();
        stable.raise(NODES[0], Position::new(1, upto));
        node.history.let_go(&stable);
        let kept = count.saturating_sub(usize::try_from(upto).unwrap()).max(1);
        prop_assert_eq!(node.history.versions().len(), kept);
    }
}
