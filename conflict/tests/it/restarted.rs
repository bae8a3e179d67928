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
