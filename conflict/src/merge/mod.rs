//! Rows whose columns are merged: what the versions of a row make of it, column by column.
//!
//! In:   the unstable versions of a row with what each changed, in any order      Out: the row; who lost what
//! Holds: [`History`]: names of the versions, and what the forgotten ones left; images stay with the caller
//! Invariants:
//! 1. The row is a function of the set of versions, not of their order of arrival.
//! 2. [`History::compact`], [`History::let_go`] and forgetting a row whose versions are all stable change no later result.
//!
//! # The fold
//!
//! A row is the fold of its versions in stamp order, over what the stable and forgotten ones left. Stamp order respects
//! what covers what. One step, by version v:
//!
//! * a delete: there is no row.
//! * v covers all that went into the row that is there: the row is v's image. Who has seen everything decides everything.
//! * a put where there is no row: its whole image, also of an update that a lower delete had not seen.
//! * an update otherwise: its *changed* columns, each by its [`Rule`].
//! * an insert where there is a row (another insert that it did not see, or one that came back): its whole image, but
//!   columns that add or keep the greatest value go on doing so.
//!
//! Nodes may differ for a while in which columns a table has. A column that v's table lacks stays as it is, unless v is the
//! row's image; one that the row lacks is taken as v found it.
//!
//! Merging into the present row as versions arrive does not do: with an update U, a later update V that changes another
//! column, and a delete D between the two, all concurrent, the order U V D ends with both changes (V is above D, so the
//! row stays) and D U V with V's alone. Folding again from the versions ends with V's image both times. (A control of
//! `tests/` merges incrementally and diverges.)
//!
//! # What may be forgotten
//!
//! Everything still to come covers what is stable, hence has a higher stamp. So the lowest versions, as long as they are
//! stable, can be folded into the base for good: nothing can come between them. A stable version with an unstable lower
//! one must stay, or that one would be folded over it. (A control forgets by stability alone and diverges.) When all
//! versions of a row are stable nothing of it is needed: what comes next covers all, and its image is the row.
//!
//! # A row that is written all the time
//!
//! It is never stable as a whole. Where its versions meet others it is folded, and compacted. Where each covers all before it, nobody
//! folds it, and it must be enough to forget names: what the versions did may be known to the journal alone by then, or to nobody. So
//! look for *cuts*: below a version that covers all that is below it, as all that are above it do. What is to come covers
//! the stable ones below it, too. Hence whichever is the first to be folded above a cut decides all, and the row is its image, whatever is
//! below. A fold may begin there ([`History::begin`]), and what is below and stable can go ([`History::let_go`]): as after a start from a journal that
//! has it no more, but that here the base makes no difference.
//!
//! A version that covers all is above a cut. One that does not takes away the cuts above what it covers, and those above itself. (Controls
//! let versions go that are not stable, or that some that is left does not cover, and diverge.)
//!
//! # The base of what is known from a journal alone
//!
//! A row that has no unstable version needs no base but the old row of its next version v, which covers all before. The
//! same holds after a restart, of the lowest version n that was not settled then, if the journal let go only transactions T
//! whose successors are settled twice over (node: daemon, trim): n covers T and all that was concurrent with T. So n's old
//! row holds all of T. It also holds the effects of the versions that n covers and the journal has; those are folded again
//! over it, which changes nothing in columns that the last writer decides, and are subtracted from columns that add or
//! append ([`History::base`]): the last one first, since not each order need fit the type. So are inserts, which added to one of T, or
//! to nothing; not where that does not end in n's old row when they are folded again, since one wrote all of a row that an update of
//! T had brought back. In a set, what of T added an element is not known any more, and is in n's old row: so an
//! element that is there is not taken out by the versions that n covers, until one that n does not cover, and that has seen T, is
//! without it. A greatest value is what the highest that these had found was, or n's, if they do not end in n's from there. Versions
//! with stamps up to the highest of T (or any higher bound that only what was settled lies below) are all in n's old row, and must
//! not be folded again: one of them may be below a version of T that nobody has any more. They count as seen, like T: a settled version that is folded again and has not seen
//! one of them would else pass for one that covers all, and its image would undo that one.
//!
//! Not here: which columns have which rule ([`crate::policy`]), reading images (node: resolve)

pub(crate) mod array;
mod history;
mod json;
mod list;
mod loss;
pub mod number;
mod set;

use std::cmp::Ordering;

use anabranch_proto::Vector;
use bytes::Bytes;

use crate::version::{Kind as VersionKind, Version};
pub use history::{History, Meeting};
pub use list::List;
pub use loss::{LeftOut, Loss, all_losses, left_out, losses};
use number::{Kind, NoSum};
use set::Sets;

/// A column's value, as the server sent it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Field {
    /// SQL NULL.
    Null,
    /// The type's text output.
    Text(Bytes),
    /// The type's binary output.
    Binary(Bytes),
    /// The row is of a table without this column, which says nothing of it. So does a row that is folded and has it in the end:
    /// what the server has there, or its default, stands.
    Absent,
}

impl Field {
    fn number(&self) -> Option<&[u8]> {
        match self {
            Self::Binary(value) => Some(value),
            Self::Null | Self::Text(_) | Self::Absent => None,
        }
    }
}

/// A row, its columns in an order that all rows of one fold share.
pub type Row = Vec<Field>;

/// What becomes of a column that concurrent updates change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Rule {
    /// The last writer's. Columns of one number are one unit: whoever changes one of them writes all.
    Unit(u16),
    /// What each update added (or took away) is added once. One whose sum the type cannot hold, in stamp order, adds
    /// nothing. Values that are no numbers (NULL, NaN) are written as they are.
    Delta(Kind),
    /// The greatest, by [`number::compare_exactly`]. NULL is below all. Who lowers the value lowers it if it is still what they saw.
    Max(Kind),
    /// The least, by the same. NULL is above all. Who raises the value raises it if it is still what they saw.
    Min(Kind),
    /// The elements, of this type, of a one-dimensional array: all that were added and not taken out by who had seen the add.
    Set(u32),
    /// `jsonb`: each key of each object is the last writer's.
    Json,
    /// What each update appended is appended once, in stamp order. Other changes are the last writer's.
    Append(List),
}

/// What one transaction did to a row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// A row where its writer saw none.
    Put(Row),
    /// New values of a row that its writer saw.
    Change {
        /// As its writer saw it.
        old: Row,
        /// As its writer left it.
        new: Row,
    },
    /// Removed the row, and put another.
    Replace(Row),
    /// No row.
    Delete,
}

impl Effect {
    /// This, and then `next` by the same transaction.
    #[must_use]
    pub fn then(self, next: Self) -> Self {
        match (self, next) {
            (Self::Change { old, .. }, Self::Change { new, .. }) => Self::Change { old, new },
            (Self::Delete, Self::Put(row)) | (Self::Replace(_), Self::Change { new: row, .. }) => {
                Self::Replace(row)
            }
            (_, Self::Change { new, .. }) => Self::Put(new),
            (_, next) => next,
        }
    }

    /// The row that its writer left.
    #[must_use]
    pub const fn row(&self) -> Option<&Row> {
        match self {
            Self::Put(row) | Self::Replace(row) | Self::Change { new: row, .. } => Some(row),
            Self::Delete => None,
        }
    }

    /// Does it write this column?
    fn changes(&self, at: usize) -> bool {
        match self {
            Self::Put(row) | Self::Replace(row) => row.get(at) != Some(&Field::Absent),
            Self::Change { old, new } => old.get(at) != new.get(at),
            Self::Delete => false,
        }
    }

    fn seen(&self, at: usize) -> Option<&Field> {
        match self {
            Self::Change { old, .. } => old.get(at),
            Self::Put(_) | Self::Replace(_) | Self::Delete => None,
        }
    }
}

/// A version with what it did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// The version.
    pub version: Version,
    /// What its transaction had seen.
    pub deps: Vector,
    /// What it did.
    pub effect: Effect,
}

impl Step {
    fn is_concurrent_with(&self, other: &Self) -> bool {
        // No transaction has seen itself.
        self.version.stamp != other.version.stamp
            && !self.version.covered_by(&other.deps)
            && !other.version.covered_by(&self.deps)
    }
}

/// A row, folded up to some version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct State {
    /// The row; `None`: there is none.
    pub row: Option<Row>,
    /// It began with an insert that is among what was folded.
    inserted: bool,
    /// Everything that was folded since there was no row last.
    seen: Vector,
    /// Who added the elements of sets.
    sets: Sets,
    held: Option<Box<Held>>,
}

/// A row that holds effects of versions that are still to be folded.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Held {
    /// Which.
    deps: Vector,
    /// As these left it; of sets the elements that somebody added whom nobody knows any more, and that are not taken out yet.
    row: Row,
}

impl Held {
    /// Meets a version that is folded. One that the row does not hold has seen whoever is not known: what it does not have is taken out.
    fn meet(&mut self, rules: &[Rule], step: &Step) {
        let Some(new) = step.effect.row() else { return };
        if step.version.covered_by(&self.deps) {
            return;
        }
        for (at, rule) in rules.iter().enumerate() {
            if let (Rule::Set(element), Some(slot), Some(new)) = (*rule, self.row.get_mut(at), new.get(at))
                && let Some(common) = set::common(element, slot, new)
            {
                *slot = common;
            }
        }
    }
}

impl State {
    /// No row.
    #[must_use]
    pub const fn absent() -> Self {
        Self::of(None, Vector::new())
    }

    const fn of(row: Option<Row>, seen: Vector) -> Self {
        Self {
            row,
            inserted: false,
            seen,
            sets: Sets::new(),
            held: None,
        }
    }

    /// Folds one version more. Gives the columns whose sum the type cannot hold, which stay as they were.
    pub fn fold(&mut self, rules: &[Rule], step: &Step) -> Vec<usize> {
        if matches!(step.effect, Effect::Delete | Effect::Replace(_)) {
            *self = Self::absent();
        }
        if step.effect == Effect::Delete {
            return Vec::new();
        }
        let covers_all = step.deps.includes(&self.seen);
        let version = step.version;
        self.seen.raise(version.origin(), version.position);
        let mut left_out = Vec::new();
        match (&step.effect, &mut self.row) {
            (Effect::Delete, _) => {}
            (effect, slot @ None) => {
                *slot = effect.row().cloned();
                self.inserted = !matches!(effect, Effect::Change { .. });
                self.held = None;
                self.sets.clear();
                self.sets.take(rules, step);
            }
            (effect, Some(row)) if covers_all => {
                if let Some(new) = effect.row() {
                    row.clone_from(new);
                    self.sets.take(rules, step);
                }
            }
            (Effect::Put(new) | Effect::Replace(new), Some(row)) => {
                for (at, rule) in rules.iter().enumerate() {
                    let (Some(slot), Some(new)) = (row.get_mut(at), new.get(at)) else {
                        continue;
                    };
                    match (&*slot, new) {
                        (_, Field::Absent) => continue,
                        (Field::Absent, _) => *slot = Field::Null,
                        _ => {}
                    }
                    let written = match *rule {
                        Rule::Set(element) => Ok(self.sets.put((at, element), slot, new, step)),
                        rule => put_onto(rule, slot, new, self.inserted),
                    };
                    match written {
                        Ok(value) => *slot = value,
                        Err(NoSum::OutOfRange) => left_out.push(at),
                        Err(NoSum::NotANumber) => *slot = new.clone(),
                    }
                }
                self.inserted = true;
            }
            (Effect::Change { old, new }, Some(row)) => {
                let held = self.held.as_deref();
                for (at, rule) in rules.iter().enumerate() {
                    let (Some(slot), Some(old_value), Some(new_value)) =
                        (row.get_mut(at), old.get(at), new.get(at))
                    else {
                        continue;
                    };
                    match (&*slot, new_value) {
                        (_, Field::Absent) => continue,
                        // The column came since: the row has it as this writer found it.
                        (Field::Absent, _) => slot.clone_from(old_value),
                        _ => {}
                    }
                    let written = match *rule {
                        Rule::Unit(unit) => writes_unit(rules, unit, &step.effect),
                        _ => old_value != new_value,
                    };
                    if !written {
                        continue;
                    }
                    let changed = match *rule {
                        Rule::Set(element) => {
                            let again = held.filter(|held| version.covered_by(&held.deps));
                            let kept = again.and_then(|held| held.row.get(at));
                            let values = (&*slot, old_value, new_value);
                            Ok(self.sets.change((at, element), values, step, kept))
                        }
                        rule => change(rule, slot, old_value, new_value),
                    };
                    match changed {
                        Ok(value) => *slot = value,
                        Err(NoSum::OutOfRange) => left_out.push(at),
                        Err(NoSum::NotANumber) => *slot = new_value.clone(),
                    }
                }
            }
        }
        if let Some(held) = &mut self.held {
            held.meet(rules, step);
        }
        left_out
    }
}

fn writes_unit(rules: &[Rule], unit: u16, effect: &Effect) -> bool {
    let of_unit = |(at, rule): (usize, &Rule)| *rule == Rule::Unit(unit) && effect.changes(at);
    rules.iter().enumerate().any(of_unit)
}

/// A column of a row that is there, once an insert that did not see it comes over it.
fn put_onto(rule: Rule, here: &Field, new: &Field, inserted: bool) -> Result<Field, NoSum> {
    match rule {
        // Both began from nothing.
        Rule::Delta(kind) if inserted => add(kind, here, &Field::Binary(number::zero(kind).into()), new),
        Rule::Append(list) if inserted => Ok(list.change(here, &Field::Null, new)),
        Rule::Unit(_) | Rule::Delta(_) | Rule::Set(_) | Rule::Append(_) => Ok(new.clone()),
        Rule::Json => Ok(json::change(here, &Field::Null, new)),
        Rule::Max(kind) => Ok(better(kind, Ordering::Greater, new, here)),
        Rule::Min(kind) => Ok(better(kind, Ordering::Less, new, here)),
    }
}

/// A column of a row that is there, once an update that did not see all of it changes it from `old` to `new`.
fn change(rule: Rule, here: &Field, old: &Field, new: &Field) -> Result<Field, NoSum> {
    match rule {
        Rule::Unit(_) | Rule::Set(_) => Ok(new.clone()),
        Rule::Json => Ok(json::change(here, old, new)),
        Rule::Append(list) => Ok(list.change(here, old, new)),
        Rule::Delta(kind) => add(kind, here, old, new),
        Rule::Max(kind) => Ok(towards(kind, Ordering::Greater, here, old, new)),
        Rule::Min(kind) => Ok(towards(kind, Ordering::Less, here, old, new)),
    }
}

fn add(kind: Kind, here: &Field, old: &Field, new: &Field) -> Result<Field, NoSum> {
    let (Some(base), Some(old), Some(new)) = (here.number(), old.number(), new.number()) else {
        return Err(NoSum::NotANumber);
    };
    number::shifted(kind, base, old, new).map(|sum| Field::Binary(sum.into()))
}

/// Is `a` further in the direction `wanted` than `b`? NULL is behind all.
fn is_better(kind: Kind, wanted: Ordering, a: &Field, b: &Field) -> bool {
    match (a.number(), b.number()) {
        (Some(a), Some(b)) => number::compare_exactly(kind, a, b) == Some(wanted),
        (a, b) => a.is_some() && b.is_none(),
    }
}

fn better(kind: Kind, wanted: Ordering, a: &Field, b: &Field) -> Field {
    if is_better(kind, wanted, a, b) {
        a.clone()
    } else {
        b.clone()
    }
}

fn towards(kind: Kind, wanted: Ordering, here: &Field, old: &Field, new: &Field) -> Field {
    if is_better(kind, wanted, new, old) {
        return better(kind, wanted, new, here);
    }
    // Against the direction, knowingly: only if nobody has gone further meanwhile.
    if is_better(kind, wanted, here, old) {
        here.clone()
    } else if is_better(kind, wanted, old, here) {
        better(kind, wanted, new, here)
    } else {
        new.clone()
    }
}

/// Is `version` one that leaves no row?
#[must_use]
pub fn is_gone(version: Option<Version>) -> bool {
    version.is_none_or(|version| version.kind == VersionKind::Delete)
}
