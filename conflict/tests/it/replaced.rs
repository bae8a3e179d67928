//! A row that its writer removed and put again in one transaction begins anew: what is below it, and over what that was folded, makes no
//! difference to what it becomes.

use anabranch_conflict::merge::number::Kind as Number;
use anabranch_conflict::merge::{Effect, Field, History, Row, Rule, State, Step};
use anabranch_conflict::{Kind, Version};
use anabranch_proto::{NodeId, Position, Stamp, Vector};
use proptest::prelude::*;
use uhlc::NTP64;

const RULES: [Rule; 4] = [
    Rule::Unit(0),
    Rule::Delta(Number::Integer(4)),
    Rule::Max(Number::Integer(4)),
    Rule::Unit(1),
];

fn row(values: [i16; 4]) -> Row {
    values
        .iter()
        .map(|value| Field::Binary(i32::from(*value).to_be_bytes().to_vec().into()))
        .collect()
}

/// The transaction at a place of the history; each has an origin of its own.
fn version(at: usize, kind: Kind) -> Version {
    let place = u64::try_from(at).unwrap() + 1;
    let node = NodeId(u16::try_from(place).unwrap());
    Version {
        stamp: Stamp {
            time: NTP64(place),
            node,
        },
        position: Position::new(1, place),
        kind,
    }
}

/// What a transaction did: an insert, an update, or a delete; and which of those before it it had seen, as bits.
fn write() -> impl Strategy<Value = (u8, [i16; 4], [i16; 4], u16)> {
    (0u8..8, any::<[i16; 4]>(), any::<[i16; 4]>(), any::<u16>())
}

fn step(at: usize, (what, old, new, seen): (u8, [i16; 4], [i16; 4], u16)) -> Step {
    let (kind, effect) = match what {
        0 => (Kind::Delete, Effect::Delete),
        1 => (Kind::Put, Effect::Put(row(new))),
        _ => (
            Kind::Put,
            Effect::Change {
                old: row(old),
                new: row(new),
            },
        ),
    };
    let mut deps = Vector::new();
    for before in (0..at).filter(|before| seen & (1 << before) != 0) {
        let version = version(before, Kind::Put);
        deps.raise(version.origin(), version.position);
    }
    Step {
        version: version(at, kind),
        deps,
        effect,
    }
}

fn fold(steps: &[Step], base: Option<&Row>, settled: &Vector) -> Option<Row> {
    let mut history = History::new(Vector::new(), base.is_none());
    for step in steps {
        history.admit(step.version, &step.deps);
    }
    let mut steps: Vec<Step> = steps.to_vec();
    if let (Some(base), Some(first)) = (base, steps.first_mut())
        && let Effect::Change { old, .. } = &mut first.effect
    {
        old.clone_from(base);
    }
    let steps: Vec<&Step> = steps.iter().collect();
    let (state, _): (State, _) = history.fold(0, &RULES, &steps, settled);
    state.row
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn what_is_below_a_row_that_was_put_again_makes_no_difference(
        below in prop::collection::vec(write(), 0..5),
        (image, seen) in any::<([i16; 4], u16)>(),
        above in prop::collection::vec(write(), 0..5),
        wrong in any::<[i16; 4]>(),
        settled in any::<u16>(),
        kept in any::<u16>(),
    ) {
        let mut steps: Vec<Step> = below.iter().enumerate().map(|(at, write)| step(at, *write)).collect();
        let replaced = steps.len();
        steps.push(Step {
            effect: Effect::Replace(row(image)),
            ..step(replaced, (1, image, image, seen))
        });
        steps.extend(above.iter().enumerate().map(|(at, write)| step(replaced + 1 + at, *write)));
        let expected = fold(&steps, None, &Vector::new());
        // Folded over something else, as where a row before was told that nobody else has.
        prop_assert_eq!(&fold(&steps, Some(&row(wrong)), &Vector::new()), &expected);
        // After a start: some of what is below is not there any more, and some of all is settled.
        let is_kept = |at: usize| at >= replaced || kept & (1 << at) != 0;
        let rest: Vec<Step> = (0..).zip(&steps).filter(|(at, _)| is_kept(*at)).map(|(_, step)| step.clone()).collect();
        let settled: Vector = rest
            .iter()
            .enumerate()
            .filter(|(at, _)| settled & (1 << at) != 0)
            .map(|(_, step)| (step.version.origin(), step.version.position))
            .collect();
        prop_assert_eq!(&fold(&rest, None, &settled), &expected);
        prop_assert_eq!(&fold(&rest, Some(&row(wrong)), &settled), &expected);
    }
}
