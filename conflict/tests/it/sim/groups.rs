//! Columns of which some are decided together: four numbers, each of which no two writes share.

use rand::Rng;
use rand::rngs::StdRng;

use super::Value;

/// The group of each column, by the place of its first one.
pub(crate) type Of = [u16; 4];

/// Each column by itself.
pub(crate) const APART: Of = [0, 1, 2, 3];

/// Every way to put four columns into groups.
pub(crate) fn all() -> Vec<Of> {
    let mut all = Vec::new();
    for b in 0..=1 {
        for c in 0..=2 {
            for d in 0..=3 {
                let groups = [0, b, c, d];
                // A group is named by its first column.
                if groups.iter().all(|&group| groups[usize::from(group)] == group) {
                    all.push(groups);
                }
            }
        }
    }
    all
}

/// What an insert or an update writes.
pub(crate) fn next(rng: &mut StdRng, fresh: i64, before: Option<Value>) -> Value {
    let Some(mut value) = before else {
        return [fresh; 4];
    };
    for column in &mut value {
        if rng.random_bool(0.3) {
            *column = fresh;
        }
    }
    value
}

/// The columns of a group that nobody has written so together, if there are such.
pub(crate) fn mixed(value: &Value, written: &[Value], groups: &Of) -> Option<Vec<usize>> {
    let groups = (0..4).map(|group| -> Vec<usize> {
        let columns = 0..4;
        columns.filter(|&at| usize::from(groups[at]) == group).collect()
    });
    let of_one = |columns: &Vec<usize>| {
        written
            .iter()
            .any(|one| columns.iter().all(|&at| one[at] == value[at]))
    };
    groups
        .filter(|columns| !columns.is_empty())
        .find(|columns| !of_one(columns))
}

#[test]
fn there_are_as_many_groupings_as_partitions() {
    assert_eq!(all().len(), 15);
    let (low, high) = ([1, 1, 7, 1], [1, 5, 1, 1]);
    assert_eq!(mixed(&low, &[low, high], &[0, 1, 1, 3]), None);
    assert_eq!(mixed(&[1, 5, 7, 1], &[low, high], &[0, 1, 2, 3]), None);
    assert_eq!(
        mixed(&[1, 5, 7, 1], &[low, high], &[0, 1, 1, 3]),
        Some(vec![1, 2])
    );
}
