//! Arrays as sets: what each write added to what it had read is added, and what it took out of it is taken out.
//!
//! In:   old and new arrays of a write, and what its transaction had seen      Out: the array
//! Holds: [`Sets`]: of elements, the writes that added them ("dots"), as far as somebody may not have seen them
//! Invariants:
//! 1. An element is there as long as some write added it and nobody who had seen that write took it out. So of a
//!    concurrent add and removal of one element the add stays, whatever the stamps; taking out what nobody else added
//!    removes it.
//! 2. An element without a dot was added by something that every other known write has seen, but those of
//!    [`super::State`]'s `held`.
//!
//! The order of the elements is no part of the set. A merge whose result has the elements of the write that it takes in is
//! written as that has them; otherwise by value, NULL last, each once.
//!
//! Not here: the order of the fold, and who covers whom (the parent module)

use std::collections::{BTreeMap, BTreeSet};

use anabranch_proto::{NodeId, Position, Vector};

use super::array::{self, Element};
use super::number::{self, Kind};
use super::{Effect, Field, Row, Rule, Step};

/// Who added what, by the places of columns.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Sets(BTreeMap<usize, Dots>);

type Dots = BTreeMap<Element, Vec<(NodeId, Position)>>;

/// The elements; NULL has none. `None`: no array of one dimension.
pub(super) fn read(element: u32, field: &Field) -> Option<BTreeSet<Element>> {
    match field {
        Field::Null => Some(BTreeSet::new()),
        Field::Binary(value) => Some(array::read(value, element)?.into_iter().collect()),
        Field::Text(_) | Field::Absent => None,
    }
}

fn write(element: u32, set: &BTreeSet<Element>) -> Field {
    let mut elements: Vec<&Element> = set.iter().collect();
    let kind = Kind::of(element, -1);
    elements.sort_by(|a, b| match (a, b) {
        (Some(a), Some(b)) => kind
            .and_then(|kind| number::compare(kind, a, b))
            .unwrap_or_else(|| a.cmp(b)),
        (a, b) => b.is_some().cmp(&a.is_some()),
    });
    Field::Binary(array::write(element, elements.into_iter()))
}

/// The elements of both; `None` where one is no array of one dimension.
pub(super) fn common(element: u32, one: &Field, other: &Field) -> Option<Field> {
    let (one, other) = (read(element, one)?, read(element, other)?);
    let both: BTreeSet<Element> = one.intersection(&other).cloned().collect();
    Some(write(element, &both))
}

impl Sets {
    pub(super) const fn new() -> Self {
        Self(BTreeMap::new())
    }

    /// There is no row.
    pub(super) fn clear(&mut self) {
        self.0.clear();
    }

    /// The row is the step's image. Of what the step had found there, it is known who added it.
    pub(super) fn take(&mut self, rules: &[Rule], step: &Step) {
        let Some(new) = step.effect.row() else { return };
        for (at, rule) in rules.iter().enumerate() {
            let (Rule::Set(element), Some(new)) = (*rule, new.get(at)) else {
                continue;
            };
            let dots = self.0.entry(at).or_default();
            let (Some(new), Some(old)) = (
                read(element, new),
                step.effect
                    .seen(at)
                    .map_or(Some(BTreeSet::new()), |old| read(element, old)),
            ) else {
                dots.clear();
                continue;
            };
            dots.retain(|one, _| old.contains(one) && new.contains(one));
            for one in new.difference(&old) {
                dots.insert(one.clone(), vec![dot(step)]);
            }
        }
    }

    /// The column `at`, which is `here`, as an update from `old` to `new` leaves it that has not seen all of it. `kept`
    /// are elements that are known to outlive the step.
    pub(super) fn change(
        &mut self,
        (at, element): (usize, u32),
        (here, old, new): (&Field, &Field, &Field),
        step: &Step,
        kept: Option<&Field>,
    ) -> Field {
        let dots = self.0.entry(at).or_default();
        let (Some(mut set), Some(old), Some(wanted)) =
            (read(element, here), read(element, old), read(element, new))
        else {
            dots.clear();
            return new.clone();
        };
        let kept = kept.and_then(|kept| read(element, kept)).unwrap_or_default();
        for one in old.difference(&wanted) {
            let unseen = dots.get_mut(one).is_some_and(|adds| {
                adds.retain(|&(node, position)| !step.deps.covers(node, position));
                !adds.is_empty()
            });
            if !unseen {
                dots.remove(one);
                if !kept.contains(one) {
                    set.remove(one);
                }
            }
        }
        for one in wanted.difference(&old) {
            set.insert(one.clone());
            dots.entry(one.clone()).or_default().push(dot(step));
        }
        if set == wanted {
            new.clone()
        } else {
            write(element, &set)
        }
    }

    /// The column `at`, which is `here`, once an insert that has not seen it comes over it.
    pub(super) fn put(
        &mut self,
        (at, element): (usize, u32),
        here: &Field,
        new: &Field,
        step: &Step,
    ) -> Field {
        self.change((at, element), (here, &Field::Null, new), step, None)
    }

    /// Forgets the adds that everybody has seen: what is to come covers what is `stable`, and `left` are the steps that
    /// are known and not folded.
    pub(super) fn settle(&mut self, stable: &Vector, left: &[&Step]) {
        for dots in self.0.values_mut() {
            dots.retain(|_, adds| {
                adds.retain(|&(node, position)| {
                    !stable.covers(node, position)
                        || left.iter().any(|step| !step.deps.covers(node, position))
                });
                !adds.is_empty()
            });
        }
    }
}

fn dot(step: &Step) -> (NodeId, Position) {
    (step.version.origin(), step.version.position)
}

/// Does a later write `higher` of the column take away what `lower` wrote? Only where one of them is no set.
pub(super) fn is_lost(element: u32, at: usize, lower: &Effect, higher: &Effect) -> bool {
    let is_set = |row: Option<&Row>| {
        row.and_then(|row| row.get(at))
            .is_none_or(|field| read(element, field).is_some())
    };
    let was_set = |effect: &Effect| effect.seen(at).is_none_or(|field| read(element, field).is_some());
    let merges = is_set(lower.row()) && is_set(higher.row()) && was_set(higher);
    lower.changes(at) && higher.changes(at) && !merges
}
