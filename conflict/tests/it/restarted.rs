//! A start from a journal that has let something go: the versions that it still has are folded again over the old row of the lowest one that
//! is not settled, which holds some of them. The row is what it is where nothing went.

use anabranch_conflict::merge::number::Kind as Number;
use anabranch_conflict::merge::{Effect, Field, History, List, Row, Rule, Step};
use anabranch_conflict::{Kind, Version};
use anabranch_proto::{NodeId, Position, Stamp, Vector};
use proptest::prelude::*;
use uhlc::NTP64;

const RULES: [Rule; 2] = [Rule::Delta(Number::Integer(2)), Rule::Append(List::Text)];
const GREATEST: [Rule; 1] = [Rule::Max(Number::Integer(2))];
const INT4: u32 = 23;
const SETS: [Rule; 1] = [Rule::Set(INT4)];

fn row(count: i16, text: &str) -> Row {
    vec![
        Field::Binary(count.to_be_bytes().to_vec().into()),
        Field::Binary(text.as_bytes().to_vec().into()),
    ]
}

fn put(count: i16, text: &str) -> Effect {
    Effect::Put(row(count, text))
}

fn change(old: (i16, &str), new: (i16, &str)) -> Effect {
    Effect::Change {
        old: row(old.0, old.1),
        new: row(new.0, new.1),
    }
}

/// Of one column.
fn change_of(old: Field, new: Field) -> Effect {
    Effect::Change {
        old: vec![old],
        new: vec![new],
    }
}

fn number(value: i16) -> Field {
    Field::Binary(value.to_be_bytes().to_vec().into())
}

/// As `numeric_send` writes a small whole number that is shown with so many digits behind the point.
fn decimal(value: i64, scale: u16) -> Field {
    let digit = u16::try_from(value.unsigned_abs()).unwrap();
    let sign = if value < 0 { 0x4000 } else { 0 };
    let head = [u16::from(digit != 0), 0, sign, scale];
    let words = head.into_iter().chain((digit != 0).then_some(digit));
    let bytes: Vec<u8> = words.flat_map(u16::to_be_bytes).collect();
    Field::Binary(bytes.into())
}

/// As `array_send` writes it.
fn set(elements: &[i32]) -> Field {
    let count = i32::try_from(elements.len()).unwrap();
    let head = if count == 0 {
        vec![0, 0, 23]
    } else {
        vec![1, 0, 23, count, 1]
    };
    let words = head.into_iter().chain(elements.iter().flat_map(|one| [4, *one]));
    let bytes: Vec<u8> = words.flat_map(i32::to_be_bytes).collect();
    Field::Binary(bytes.into())
}

/// Places in streams, by node.
fn vector(places: &[(u16, u64)]) -> Vector {
    let of = |&(node, place): &(u16, u64)| (NodeId(node), Position::new(1, place));
    places.iter().map(of).collect()
}

/// What a node wrote at a place of the history, and what it had seen.
fn step((node, place): (u16, u64), seen: &[(u16, u64)], effect: Effect) -> Step {
    Step {
        version: Version {
            stamp: Stamp {
                time: NTP64(place),
                node: NodeId(node),
            },
            position: Position::new(1, place),
            kind: if effect == Effect::Delete {
                Kind::Delete
            } else {
                Kind::Put
            },
        },
        deps: vector(seen),
        effect,
    }
}

/// The row by these versions alone, in stamp order.
fn fold(rules: &[Rule], steps: &[Step], gone: &Vector, settled: &Vector) -> Option<Row> {
    let mut history = History::new(gone.clone(), false);
    for step in steps {
        history.admit(step.version, &step.deps);
    }
    let steps: Vec<&Step> = steps.iter().collect();
    let (state, _) = history.fold(0, rules, &steps, settled);
    state.row
}

/// The row, where the first so many versions went and where nothing did.
fn ends(
    rules: &[Rule],
    steps: &[Step],
    went: usize,
    gone: &[(u16, u64)],
    settled: &[(u16, u64)],
) -> [Option<Row>; 2] {
    [
        fold(rules, &steps[went..], &vector(gone), &vector(settled)),
        fold(rules, steps, &Vector::new(), &Vector::new()),
    ]
}

// Two of these fit a smallint together.
const LEAST: i16 = -16_000;
const MOST: i16 = 16_000;

proptest! {
    #[test]
    fn what_was_added_is_taken_off_though_not_each_order_of_it_fits(
        gone in LEAST..=MOST,
        path in prop::collection::vec(LEAST..=MOST, 1..5),
    ) {
        // Of node 3, which node 1 has not heard of.
        let mut steps = vec![step((3, 1), &[], change((0, ""), (gone, "")))];
        let mut last = 0;
        for (&value, place) in path.iter().zip(2..) {
            steps.push(step((1, place), &[(1, place - 1)], change((last, ""), (value, ""))));
            last = value;
        }
        let next = u64::try_from(path.len()).unwrap() + 2;
        // Node 3 goes on, and node 2 has seen all but that.
        steps.push(step((3, next), &[(3, 1)], change((gone, ""), (gone + 7, ""))));
        let found = gone + last;
        let seen = [(1, next - 1), (3, 1)];
        steps.push(step((2, next + 1), &seen, change((found, ""), (found - 5, ""))));
        let expected = Some(row(found + 2, ""));
        let settled = [(1, next - 1), (3, next)];
        prop_assert_eq!(ends(&RULES, &steps, 1, &[(3, 1)], &settled), [expected.clone(), expected]);
    }
}

#[test]
fn what_an_insert_added_to_one_that_is_gone_is_taken_off() {
    let steps = [
        step((3, 1), &[], put(5, "a")),
        step((1, 2), &[], put(1, "b")),
        step((3, 3), &[(3, 1)], change((5, "a"), (6, "ac"))),
        step((2, 4), &[(1, 2), (3, 1)], change((6, "ab"), (7, "abd"))),
    ];
    let expected = Some(row(8, "abcd"));
    let settled = [(1, 2), (3, 3)];
    assert_eq!(
        ends(&RULES, &steps, 1, &[(3, 1)], &settled),
        [expected.clone(), expected]
    );
}

#[test]
fn an_insert_adds_to_one_below_it_that_the_old_row_does_not_hold() {
    let steps = [
        step((3, 1), &[], put(9, "x")),
        step((3, 2), &[(3, 1)], Effect::Delete),
        step((3, 3), &[(3, 2)], put(2, "a")),
        step((1, 4), &[], put(5, "b")),
        step((2, 5), &[(1, 4), (3, 2)], change((5, "b"), (6, "bc"))),
    ];
    let expected = Some(row(8, "abc"));
    let settled = [(1, 4), (3, 3)];
    assert_eq!(
        ends(&RULES, &steps, 2, &[(3, 2)], &settled),
        [expected.clone(), expected]
    );
}

#[test]
fn an_insert_over_a_row_that_an_update_brought_back_writes_all_of_it() {
    let steps = [
        step((3, 1), &[], put(9, "x")),
        step((1, 2), &[(3, 1)], Effect::Delete),
        step((3, 3), &[(3, 1)], change((9, "x"), (10, "xy"))),
        step((2, 4), &[(3, 1)], change((9, "x"), (9, "xz"))),
        step((1, 5), &[(1, 2), (3, 1)], put(5, "a")),
        step((3, 6), &[(1, 2), (3, 3)], change((10, "xy"), (11, "xyb"))),
        step((2, 7), &[(1, 5), (2, 4), (3, 3)], change((5, "a"), (6, "ac"))),
    ];
    let expected = Some(row(7, "abc"));
    let settled = [(1, 5), (2, 4), (3, 6)];
    assert_eq!(
        ends(&RULES, &steps, 3, &[(1, 2), (3, 3)], &settled),
        [expected.clone(), expected]
    );
}

#[test]
fn an_insert_where_a_row_was_deleted_adds_to_nothing() {
    let steps = [
        step((3, 1), &[], put(9, "x")),
        step((3, 2), &[(3, 1)], Effect::Delete),
        step((1, 3), &[], put(5, "a")),
        step((3, 4), &[(3, 2)], put(2, "b")),
        step((2, 5), &[(1, 3), (3, 2)], change((5, "a"), (6, "ac"))),
    ];
    let expected = Some(row(8, "abc"));
    let settled = [(1, 3), (3, 4)];
    assert_eq!(
        ends(&RULES, &steps, 2, &[(3, 2)], &settled),
        [expected.clone(), expected]
    );
}

#[test]
fn a_greatest_value_is_not_one_that_had_been_lowered_before() {
    let steps = [
        step((3, 1), &[], Effect::Put(vec![number(8)])),
        step((3, 2), &[(3, 1)], change_of(number(8), number(2))),
        step((1, 3), &[(3, 1)], change_of(number(8), number(8))),
        step((3, 4), &[(3, 2)], change_of(number(2), number(6))),
        // Lowers what is not there any more.
        step((2, 5), &[(1, 3), (3, 1)], change_of(number(8), number(4))),
        step((1, 6), &[(1, 3), (3, 2)], change_of(number(2), number(3))),
        step((2, 7), &[(1, 3), (2, 5), (3, 4)], change_of(number(6), number(6))),
    ];
    let expected = Some(vec![number(6)]);
    let settled = [(1, 6), (2, 5), (3, 4)];
    assert_eq!(
        ends(&GREATEST, &steps, 3, &[(1, 3), (3, 2)], &settled),
        [expected.clone(), expected]
    );
}

#[test]
fn of_equal_values_that_look_different_the_same_one_is_kept_after_a_start() {
    let (short, long) = (decimal(10, 1), decimal(10, 2));
    let greatest = (Rule::Max(Number::Numeric(None)), [5, 6], &long);
    let least = (Rule::Min(Number::Numeric(None)), [20, 19], &short);
    for (rule, before, kept) in [greatest, least] {
        let [first, second] = before.map(|value| decimal(value, 0));
        let steps = [
            step((3, 1), &[], Effect::Put(vec![first.clone()])),
            step((2, 2), &[], Effect::Put(vec![second])),
            step((1, 3), &[(3, 1)], change_of(first.clone(), long.clone())),
            step((3, 4), &[(3, 1)], change_of(first, short.clone())),
            // Has not seen the long one, and is what the others are folded over.
            step((2, 5), &[(2, 2), (3, 4)], change_of(short.clone(), short.clone())),
        ];
        let expected = Some(vec![kept.clone()]);
        let settled = [(1, 3), (2, 2), (3, 4)];
        assert_eq!(
            ends(&[rule], &steps, 1, &[(3, 1)], &settled),
            [expected.clone(), expected]
        );
    }
}

#[test]
fn an_element_goes_with_all_who_added_it_though_one_of_them_is_known_no_more() {
    // Who takes out what is gone comes after the other one who added it, or before: then it is the row, as it covers all.
    for (took, added) in [(3, 2), (2, 3)] {
        let mut steps = [
            step((3, 1), &[], Effect::Put(vec![set(&[1])])),
            step((1, added), &[], Effect::Put(vec![set(&[1])])),
            step((3, took), &[(3, 1)], change_of(set(&[1]), set(&[]))),
            step((1, 4), &[(1, added)], change_of(set(&[1]), set(&[]))),
            step((2, 5), &[(1, 4), (3, 1)], change_of(set(&[1]), set(&[1]))),
        ];
        steps.sort_by_key(|step| step.version.stamp);
        let expected = Some(vec![set(&[])]);
        let settled = [(1, 4), (3, took)];
        assert_eq!(
            ends(&SETS, &steps, 1, &[(3, 1)], &settled),
            [expected.clone(), expected]
        );
    }
}

/// A rule of each kind: the place of the write, a sum, a greatest value (of which there are several that are equal), elements, a text.
const ALL: [Rule; 5] = [
    Rule::Unit(0),
    Rule::Delta(Number::Integer(8)),
    Rule::Max(Number::Numeric(None)),
    Rule::Set(INT4),
    Rule::Append(List::Text),
];

const NODES: usize = 3;

/// A write of a node, or something that it hears of another one.
#[derive(Debug, Clone, Copy)]
struct Op {
    node: usize,
    what: u8,
    value: i8,
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let op = (0..NODES, 0u8..24, -9i8..10);
    prop::collection::vec(op.prop_map(|(node, what, value)| Op { node, what, value }), 6..50)
}

fn bytes(field: &Field) -> &[u8] {
    match field {
        Field::Binary(bytes) => bytes,
        other => panic!("{other:?}"),
    }
}

fn wide(value: i64) -> Field {
    Field::Binary(value.to_be_bytes().to_vec().into())
}

fn wide_of(field: &Field) -> i64 {
    i64::from_be_bytes(bytes(field).try_into().unwrap())
}

fn decimal_of(field: &Field) -> i64 {
    let word = |at: usize| {
        bytes(field)
            .get(at..at + 2)
            .map(|word| u16::from_be_bytes(word.try_into().unwrap()))
    };
    let value = i64::from(word(8).unwrap_or(0));
    if word(4) == Some(0) { value } else { -value }
}

fn elements(field: &Field) -> Vec<i32> {
    let words = bytes(field).chunks_exact(4);
    let words: Vec<i32> = words
        .map(|word| i32::from_be_bytes(word.try_into().unwrap()))
        .collect();
    // Behind five of the head, each with its length before it.
    words.iter().skip(6).step_by(2).copied().collect()
}

/// The row that a write leaves, of one that it found.
fn written(found: Option<&Row>, op: Op, place: u64) -> Row {
    let scale = u16::try_from(place % 3).unwrap();
    let (place, value) = (i64::try_from(place).unwrap(), i64::from(op.value));
    let Some(found) = found else {
        let begun = elements_of(op.value);
        return vec![
            wide(place),
            wide(value),
            decimal(value, scale),
            set(&begun),
            Field::Binary(Vec::new().into()),
        ];
    };
    let mut row = found.clone();
    match op.what % 5 {
        0 => row[0] = wide(place),
        1 => row[1] = wide(wide_of(&row[1]) + value),
        2 => row[2] = decimal(decimal_of(&row[2]) + value, scale),
        3 => {
            let one = i32::from(op.value).rem_euclid(4);
            let mut kept = elements(&row[3]);
            if kept.contains(&one) {
                kept.retain(|other| *other != one);
            } else {
                kept.push(one);
            }
            row[3] = set(&kept);
        }
        _ => row[4] = Field::Binary([bytes(&row[4]), format!("{place};").as_bytes()].concat().into()),
    }
    row
}

fn elements_of(value: i8) -> Vec<i32> {
    (0..4).filter(|one| value >> one & 1 == 1).collect()
}

/// What the nodes wrote, in stamp order. Nobody deletes: which of the writers of an insert had seen a row go is not always known after a
/// start.
fn history(ops: &[Op]) -> Vec<Step> {
    let node_id = |node: usize| u16::try_from(node).unwrap() + 1;
    let mut seen = vec![Vector::new(); NODES];
    let mut all: Vec<Step> = Vec::new();
    for op in ops {
        if op.what < 9 {
            // The oldest of the next one, or of the one after it.
            let other = NodeId(node_id((op.node + 1 + usize::from(op.what % 2)) % NODES));
            let is_new =
                |step: &&Step| step.version.origin() == other && !step.version.covered_by(&seen[op.node]);
            let next = all.iter().find(is_new);
            if let Some(step) = next.filter(|step| seen[op.node].includes(&step.deps)) {
                seen[op.node].raise(other, step.version.position);
            }
            continue;
        }
        let is_known = |step: &&Step| step.version.covered_by(&seen[op.node]);
        let known: Vec<Step> = all.iter().filter(is_known).cloned().collect();
        let place = u64::try_from(all.len()).unwrap() + 1;
        let found = fold(&ALL, &known, &Vector::new(), &Vector::new());
        let new = written(found.as_ref(), *op, place);
        let effect = match found {
            Some(old) => Effect::Change { old, new },
            None => Effect::Put(new),
        };
        let step = Step {
            deps: seen[op.node].clone(),
            ..step((node_id(op.node), place), &[], effect)
        };
        seen[op.node].raise(step.version.origin(), step.version.position);
        all.push(step);
    }
    all
}

fn sees(one: &Step, other: &Step) -> bool {
    other.version.covered_by(&one.deps)
}

fn all_of<'s>(steps: impl Iterator<Item = &'s Step>) -> Vector {
    steps
        .map(|step| (step.version.origin(), step.version.position))
        .collect()
}

/// What must have been seen by all that is not settled for the first of them to go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Trim {
    /// These, and all that was concurrent with one of them.
    Near,
    /// These alone.
    Gone,
}

/// Is the row the same where the first so many versions went from the journal, and `settled` tells which of the others are settled?
fn is_folded_alike(
    ops: &[Op],
    went: prop::sample::Index,
    settled: prop::sample::Index,
    trim: Trim,
) -> Result<(), TestCaseError> {
    let steps = history(ops);
    if steps.len() < 2 {
        return Ok(());
    }
    let went = 1 + went.index(steps.len() - 1);
    let gone = all_of(steps[..went].iter());
    let near = |step: &Step| {
        let apart = |other: &Step| trim == Trim::Near && !sees(step, other) && !sees(other, step);
        steps[..went]
            .iter()
            .any(|gone| gone.version == step.version || apart(gone))
    };
    let near: Vec<&Step> = steps.iter().filter(|step| near(step)).collect();
    let from = settled.index(steps.len());
    let is_settled = |at: usize| at < from || !near.iter().all(|step| sees(&steps[at], step));
    if (went..steps.len()).all(is_settled) {
        // The table has the row: nobody folds it before a version comes that is not.
        return Ok(());
    }
    let settled = all_of(
        (went..steps.len())
            .filter(|at| is_settled(*at))
            .map(|at| &steps[at]),
    );
    let expected = fold(&ALL, &steps, &Vector::new(), &Vector::new());
    prop_assert_eq!(fold(&ALL, &steps[went..], &gone, &settled), expected);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// The journal lets go only what all that is not settled has seen, with all that was concurrent with it.
    #[test]
    fn a_row_is_folded_alike_whatever_went_from_the_journal(
        ops in ops(),
        went in any::<prop::sample::Index>(),
        settled in any::<prop::sample::Index>(),
    ) {
        is_folded_alike(&ops, went, settled, Trim::Near)?;
    }
}

#[test]
fn a_journal_that_lets_go_what_is_settled_once_is_noticed() {
    let config = ProptestConfig {
        failure_persistence: None,
        ..ProptestConfig::with_cases(20_000)
    };
    let mut runner = proptest::test_runner::TestRunner::new_with_rng(
        config,
        proptest::test_runner::TestRng::deterministic_rng(proptest::test_runner::RngAlgorithm::ChaCha),
    );
    let input = (ops(), any::<prop::sample::Index>(), any::<prop::sample::Index>());
    let found = runner.run(&input, |(ops, went, settled)| {
        is_folded_alike(&ops, went, settled, Trim::Gone)
    });
    assert!(
        matches!(found, Err(proptest::test_runner::TestError::Fail(..))),
        "not noticed: {found:?}"
    );
}
