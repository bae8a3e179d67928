//! Who lost what: of two concurrent versions, the columns that one takes from the other; and who is left out of a sum.
//!
//! In:   the unstable versions of a row with what each did      Out: losers, with their columns
//! Invariants: a pair is judged by itself, so a loser is found whatever came between; what somebody had overwritten
//!        knowingly is history
//! Not here: what the row becomes (the parent module)

use std::cmp::Ordering;
use std::collections::BTreeSet;

use anabranch_proto::Stamp;

use super::{Effect, Field, Rule, Step, is_better, json, number, set, writes_unit};
use crate::version::Version;

/// A version that lost something to another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Loss {
    /// Who lost.
    pub loser: Version,
    /// To whom; of several, to the one with the highest stamp.
    pub winner: Version,
    /// Which columns, in order.
    pub columns: Vec<usize>,
    /// All of it: what it wrote is gone, or it was a delete and the row is there.
    pub whole: bool,
}

/// A version that adds nothing to a column: the sum would be out of its range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LeftOut {
    /// Which.
    pub loser: Version,
    /// What left no room for it: of the concurrent versions below it that count and go the same way, the highest. `None` where that
    /// is known no more.
    pub winner: Option<Version>,
    /// The column.
    pub column: usize,
}

/// Who has lost something now that `incoming` is there: it, or versions that it is concurrent with. `steps` are those of
/// the row, in stamp order. What somebody overwrote knowingly before is history, and lost nothing.
#[must_use]
pub fn losses(rules: &[Rule], steps: &[&Step], incoming: Stamp) -> Vec<Loss> {
    let Some(new) = steps.iter().find(|step| step.version.stamp == incoming) else {
        return Vec::new();
    };
    let mut losses: Vec<Loss> = Vec::new();
    for other in steps.iter().filter(|other| new.is_concurrent_with(other)) {
        let (lower, higher) = if other.version.stamp < incoming {
            (other, new)
        } else {
            (new, other)
        };
        let lost = clash(rules, &lower.effect, &higher.effect);
        for (loser, winner, columns) in [(lower, higher, lost.lower), (higher, lower, lost.higher)] {
            let overwritten = |at: Option<usize>| {
                steps.iter().any(|step| {
                    loser.version.covered_by(&step.deps)
                        && !winner.version.covered_by(&step.deps)
                        && at.is_none_or(|at| step.effect.changes(at) || step.effect == Effect::Delete)
                })
            };
            let whole = lost.whole && loser.version.stamp == lower.version.stamp;
            let columns: Vec<usize> = columns
                .into_iter()
                .filter(|at| !overwritten((!whole).then_some(*at)))
                .collect();
            let is_lost = if whole {
                !overwritten(None)
            } else {
                !columns.is_empty()
            };
            if is_lost {
                note(&mut losses, loser.version, winner.version, columns, whole);
            }
        }
    }
    losses
}

/// Who has lost something now that the versions `incoming` are there, and all that they have lost by now, to whomever: what a
/// loser is said to have lost does not depend on who of the others came in last.
#[must_use]
pub fn all_losses(rules: &[Rule], steps: &[&Step], incoming: &[Stamp]) -> Vec<Loss> {
    let found = incoming.iter().flat_map(|stamp| losses(rules, steps, *stamp));
    let losers: BTreeSet<Stamp> = found.map(|loss| loss.loser.stamp).collect();
    losers
        .into_iter()
        .filter_map(|loser| {
            let all = losses(rules, steps, loser);
            all.into_iter().find(|loss| loss.loser.stamp == loser)
        })
        .collect()
}

/// The versions that are left out of a sum, `all`, with what each of them lost to. They are told each time: that one was left out before
/// does not say that it was told.
#[must_use]
pub fn left_out(rules: &[Rule], steps: &[&Step], all: &[(Version, usize)]) -> Vec<LeftOut> {
    all.iter()
        .map(|&(loser, column)| LeftOut {
            loser,
            winner: filled(rules, steps, all, (loser, column)),
            column,
        })
        .collect()
}

/// See [`LeftOut::winner`].
fn filled(
    rules: &[Rule],
    steps: &[&Step],
    all: &[(Version, usize)],
    (loser, at): (Version, usize),
) -> Option<Version> {
    let Some(Rule::Delta(kind)) = rules.get(at) else {
        return None;
    };
    let way = |effect: &Effect| {
        let zero = Field::Binary(number::zero(*kind).into());
        let (old, new) = (effect.seen(at).unwrap_or(&zero), effect.row()?.get(at)?);
        number::compare(*kind, new.number()?, old.number()?)
    };
    let own = steps.iter().find(|step| step.version == loser)?;
    let counts = |step: &&&Step| {
        step.version.stamp < loser.stamp
            && step.is_concurrent_with(own)
            && step.effect.changes(at)
            && way(&step.effect) == way(&own.effect)
            && !all.contains(&(step.version, at))
    };
    steps.iter().rfind(counts).map(|step| step.version)
}

fn note(losses: &mut Vec<Loss>, loser: Version, winner: Version, columns: Vec<usize>, whole: bool) {
    match losses.iter_mut().find(|loss| loss.loser.stamp == loser.stamp) {
        Some(loss) => {
            if winner.stamp > loss.winner.stamp {
                loss.winner = winner;
            }
            loss.whole |= whole;
            loss.columns.extend(columns);
            loss.columns.sort_unstable();
            loss.columns.dedup();
        }
        None => losses.push(Loss {
            loser,
            winner,
            columns,
            whole,
        }),
    }
}

/// What two concurrent versions take from each other, by columns.
struct Clash {
    lower: Vec<usize>,
    higher: Vec<usize>,
    /// The lower is gone altogether.
    whole: bool,
}

fn clash(rules: &[Rule], lower: &Effect, higher: &Effect) -> Clash {
    let mut out = Clash {
        lower: Vec::new(),
        higher: Vec::new(),
        whole: false,
    };
    let (low, high) = match (lower.row(), higher.row()) {
        (Some(low), Some(high)) if !matches!(higher, Effect::Replace(_)) => (low, high),
        (None, None) => return out,
        (low, _) => {
            out.whole = true;
            let all = low.map_or(0, Vec::len);
            out.lower = (0..all).filter(|at| lower.changes(*at)).collect();
            return out;
        }
    };
    for (at, rule) in rules.iter().enumerate() {
        let (Some(low), Some(high)) = (low.get(at), high.get(at)) else {
            continue;
        };
        // Of a table without the column: it neither takes anything there nor loses it.
        if [low, high].contains(&&Field::Absent) {
            continue;
        }
        let differ = low != high;
        match *rule {
            Rule::Unit(unit) => {
                if differ && lower.changes(at) && writes_unit(rules, unit, higher) {
                    out.lower.push(at);
                }
            }
            Rule::Delta(_) => {
                let is_update = matches!(lower, Effect::Change { .. });
                if is_update && lower.changes(at) && matches!(higher, Effect::Put(_)) {
                    out.lower.push(at);
                }
            }
            Rule::Set(element) => {
                if set::is_lost(element, at, lower, higher) {
                    out.lower.push(at);
                }
            }
            Rule::Append(list) => {
                if list.is_lost(at, lower, higher) {
                    out.lower.push(at);
                }
            }
            Rule::Json => {
                if json::is_lost(at, lower, higher) {
                    out.lower.push(at);
                }
            }
            Rule::Max(kind) | Rule::Min(kind) => {
                let wanted = if matches!(rule, Rule::Max(_)) {
                    Ordering::Greater
                } else {
                    Ordering::Less
                };
                let went_back = |effect: &Effect, new| {
                    effect
                        .seen(at)
                        .is_some_and(|old| is_better(kind, wanted, old, new))
                };
                if !(lower.changes(at) && higher.changes(at)) {
                    continue;
                }
                if went_back(lower, low) && is_better(kind, wanted, high, low) {
                    out.lower.push(at);
                }
                if went_back(higher, high) && is_better(kind, wanted, low, high) {
                    out.higher.push(at);
                }
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use anabranch_proto::stamp::NTP64;
    use anabranch_proto::{NodeId, Position, Vector};

    use super::super::Row;
    use super::*;
    use crate::version::Kind;

    fn row(values: [u8; 2]) -> Row {
        values.map(|value| Field::Binary(vec![value].into())).into()
    }

    fn update(node: u16, old: [u8; 2], new: [u8; 2]) -> Step {
        Step {
            version: Version {
                stamp: Stamp {
                    time: NTP64(u64::from(node)),
                    node: NodeId(node),
                },
                position: Position::new(1, u64::from(node)),
                kind: Kind::Put,
            },
            deps: Vector::new(),
            effect: Effect::Change {
                old: row(old),
                new: row(new),
            },
        }
    }

    #[test]
    fn a_loser_is_told_all_that_it_lost_whoever_came_in_last() {
        let rules = [Rule::Unit(0), Rule::Unit(1)];
        let (low, name, city) = (
            update(1, [0, 0], [1, 1]),
            update(2, [0, 0], [2, 0]),
            update(3, [0, 0], [0, 3]),
        );
        let steps = [&low, &name, &city];
        for last in 0..3 {
            let told = all_losses(&rules, &steps, &[steps[last].version.stamp]);
            assert_eq!(told.len(), 1, "{told:?}");
            assert_eq!((told[0].loser, told[0].winner), (low.version, city.version));
            assert_eq!(told[0].columns, [0, 1]);
        }
        let one = losses(&rules, &steps, name.version.stamp);
        assert_eq!(one[0].columns, [0], "by itself it takes one");
    }

    /// Of a smallint, by a node that had seen 32000 and nothing else.
    fn adds(node: u16, what: i16) -> Step {
        let value = |of: i16| vec![Field::Binary(of.to_be_bytes().to_vec().into())];
        Step {
            effect: Effect::Change {
                old: value(32_000),
                new: value(32_000 + what),
            },
            ..update(node, [0, 0], [0, 0])
        }
    }

    #[test]
    fn what_is_left_out_of_a_sum_is_told_each_time_and_yields_to_one_that_counts_below_it() {
        let rules = [Rule::Delta(number::Kind::of(21, -1).unwrap())];
        let (first, less, second, last) = (adds(1, 500), adds(2, -1), adds(3, 600), adds(4, 7));
        let told = |steps: &[&Step]| {
            let mut history = super::super::History::new(Vector::new(), false);
            for step in steps {
                history.admit(step.version, &step.deps);
            }
            let (_, all) = history.fold(0, &rules, steps, &Vector::new());
            left_out(&rules, steps, &all)
        };
        let second_out = |winner: &Step| LeftOut {
            loser: second.version,
            winner: Some(winner.version),
            column: 0,
        };
        // It is the highest itself, and nothing else is there.
        assert_eq!(told(&[&first, &second]), [second_out(&first)]);
        // What makes room, or comes after it, has not left none.
        assert_eq!(told(&[&first, &less, &second, &last]), [second_out(&first)]);
        let zero = [&adds(1, 600), &adds(2, 600), &adds(3, 600)];
        let out = told(&zero);
        let winners: Vec<_> = out.iter().map(|out| (out.loser, out.winner)).collect();
        let to_first = |at: usize| (zero[at].version, Some(zero[0].version));
        assert_eq!(winners, [to_first(1), to_first(2)]);
    }
}
