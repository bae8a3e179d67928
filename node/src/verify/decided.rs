//! What the nodes' states of one row say together, at a common cut of its writes.
//!
//! In:   a state of each node            Out: equal, different, or not to be told now
//! Not here: how they are asked ([`super::run`]), why this is sound ([`super`])

use std::collections::{BTreeMap, BTreeSet};

use anabranch_proto::link as pb;

use super::Difference;
use super::exact::exact;
use super::talk::Talk;

/// What a round says of a row.
pub(super) enum Decided {
    Equal,
    /// A write of it was met: another round.
    Moved,
    Quarantined(Difference),
    Different(Difference),
}

/// Its key, as JSON.
pub(super) fn key_of(states: &[Vec<pb::VerifyState>], at: usize) -> serde_json::Value {
    let key = states.iter().find_map(|of_node| Some(&of_node.get(at)?.key));
    key.and_then(|key| exact(key)).unwrap_or_default()
}

/// What the states of the row at `at` say.
pub(super) fn decided(
    talks: &[Talk],
    columns: &[String],
    states: &[Vec<pb::VerifyState>],
    at: usize,
) -> Decided {
    let Some(row) = states.iter().map(|of_node| of_node.get(at)).collect() else {
        return Decided::Moved;
    };
    let row: Vec<&pb::VerifyState> = row;
    let names = talks.iter().map(|talk| talk.name.as_str());
    of_states(&names.collect::<Vec<_>>(), columns, &row)
}

fn of_states(names: &[&str], columns: &[String], row: &[&pb::VerifyState]) -> Decided {
    let image = |state: &pb::VerifyState| state.present.then_some(state.hash);
    let mut kinds: Vec<i64> = Vec::new();
    let mut images = BTreeMap::new();
    for (state, name) in row.iter().zip(names) {
        let number = image(state).map(|hash| {
            let place = kinds.iter().position(|&kind| kind == hash);
            let place = place.unwrap_or_else(|| {
                kinds.push(hash);
                kinds.len() - 1
            });
            u32::try_from(place + 1).unwrap_or(u32::MAX)
        });
        images.insert((*name).to_owned(), number);
    }
    let there: Vec<&&pb::VerifyState> = row.iter().filter(|state| state.present).collect();
    if kinds.len() <= 1 && (there.is_empty() || there.len() == row.len()) {
        return Decided::Equal;
    }
    let column_differs = |at: usize| {
        let values: BTreeSet<Option<&i64>> = there.iter().map(|state| state.column_hashes.get(at)).collect();
        values.len() > 1
    };
    let differing = columns.iter().enumerate().filter(|(at, _)| column_differs(*at));
    let key = row.first().map(|state| state.key.as_str()).unwrap_or_default();
    let difference = Difference {
        key: exact(key).unwrap_or_default(),
        images,
        columns: differing.map(|(_, name)| name.clone()).collect(),
        ..Difference::default()
    };
    if row.iter().any(|state| state.moved) {
        Decided::Moved
    } else if row.iter().any(|state| state.quarantined) {
        Decided::Quarantined(difference)
    } else {
        Decided::Different(difference)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(hash: i64) -> pb::VerifyState {
        pb::VerifyState {
            present: hash != 0,
            hash,
            key: r#"{"id": 1}"#.to_owned(),
            column_hashes: vec![1, hash],
            ..pb::VerifyState::default()
        }
    }

    fn decide(row: &[pb::VerifyState]) -> Decided {
        let columns = ["id".to_owned(), "v".to_owned()];
        of_states(&["a", "b", "c"], &columns, &row.iter().collect::<Vec<_>>())
    }

    #[test]
    fn only_what_is_quiet_everywhere_differs() {
        assert!(matches!(decide(&[state(5), state(5), state(5)]), Decided::Equal));
        assert!(matches!(decide(&[state(0), state(0), state(0)]), Decided::Equal));
        let Decided::Different(difference) = decide(&[state(5), state(6), state(0)]) else {
            panic!("no difference");
        };
        assert_eq!(difference.columns, ["v"]);
        let images: Vec<Option<u32>> = difference.images.into_values().collect();
        assert_eq!(images, [Some(1), Some(2), None]);
        assert!(matches!(
            decide(&[state(5), state(5), state(0)]),
            Decided::Different(_)
        ));
        let moved = pb::VerifyState {
            moved: true,
            ..state(5)
        };
        assert!(matches!(
            decide(&[moved.clone(), state(6), state(5)]),
            Decided::Moved
        ));
        assert!(matches!(decide(&[moved, state(5), state(5)]), Decided::Equal));
        let kept = pb::VerifyState {
            quarantined: true,
            ..state(0)
        };
        assert!(matches!(
            decide(&[kept, state(5), state(5)]),
            Decided::Quarantined(_)
        ));
    }
}
