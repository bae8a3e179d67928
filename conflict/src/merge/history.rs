//! What is kept of one row: its versions, and what is below them.
//!
//! In:   versions as they are met, with what their transactions had seen      Out: the row; what of it need not be kept
//! Invariants: those of the parent module, which has the arguments
//! Not here: one step of the fold (the parent module)

use std::cmp::Ordering;

use anabranch_proto::{Stamp, Vector};

use super::{Effect, Field, Held, Row, Rule, State, Step, add, better, number};
use crate::table::TableVersion;
use crate::version::Version;

/// What admitting a version meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Meeting {
    /// It covers all that is known of the row: the row is its image.
    Alone,
    /// It does not cover all: the row is to be folded again.
    Merged,
    /// It was admitted before.
    Known,
}

/// What is known of a row that has unstable versions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct History {
    /// In stamp order.
    versions: Vec<Version>,
    /// Of each of them, is it a cut: do it and all above it cover all that is known to be below it?
    cuts: Vec<bool>,
    /// What is below them; `None`: the old row of the lowest of them (see [`Self::base`]).
    base: Option<State>,
    /// What of the row is in that old row, or in the base, and was let go.
    ground: Vector,
    /// Everything known, what was folded away included.
    seen: Vector,
}

impl History {
    /// Of a row of which nothing is known, to be begun with its next version. `ground`: what a journal has let go,
    /// nothing for a row that is written for the first time in this life. `is_absent`: the table was truncated, unseen
    /// by that version.
    #[must_use]
    pub fn new(ground: Vector, is_absent: bool) -> Self {
        Self {
            versions: Vec::new(),
            cuts: Vec::new(),
            base: is_absent.then(State::absent),
            seen: ground.clone(),
            ground,
        }
    }

    /// The versions, in stamp order.
    #[must_use]
    pub fn versions(&self) -> &[Version] {
        &self.versions
    }

    /// The version with the highest stamp: whether it is a put says whether there is a row.
    #[must_use]
    pub fn top(&self) -> Option<Version> {
        self.versions.last().copied()
    }

    /// Is the row the image of the one version that is kept, whatever is below that?
    #[must_use]
    pub fn is_image(&self) -> bool {
        self.versions.len() == 1 && self.cuts.first() == Some(&true)
    }

    /// Is it of this transaction that a version is kept?
    #[must_use]
    pub fn holds(&self, stamp: Stamp) -> bool {
        self.place(stamp).is_some()
    }

    fn place(&self, stamp: Stamp) -> Option<usize> {
        let by_stamp = |version: &Version| version.stamp;
        self.versions.binary_search_by_key(&stamp, by_stamp).ok()
    }

    /// Was `version` kept once, and let go since? Then it is in what is below the others.
    #[must_use]
    pub fn has_let_go(&self, version: &Version) -> bool {
        version.covered_by(&self.ground) && !self.holds(version.stamp)
    }

    /// Takes in a version. `deps` is what its transaction had seen.
    pub fn admit(&mut self, version: Version, deps: &Vector) -> Meeting {
        let at = self.versions.partition_point(|known| known.stamp < version.stamp);
        if let Some(known) = self.versions.get_mut(at)
            && known.stamp == version.stamp
        {
            // A later write by the same transaction.
            *known = version;
            return Meeting::Known;
        }
        let alone = deps.includes(&self.seen);
        let is_cut = alone && at == self.versions.len() || self.cut_at(at, deps);
        self.cuts.insert(at, is_cut);
        self.versions.insert(at, version);
        self.seen.raise(version.origin(), version.position);
        if alone { Meeting::Alone } else { Meeting::Merged }
    }

    /// A version with `deps` comes in at the place `at` that does not cover all: takes back the cuts that are none any more. True: it is
    /// one itself.
    fn cut_at(&mut self, at: usize, deps: &Vector) -> bool {
        let below = self.versions.iter().take(at);
        let covered = deps
            .includes(&self.ground)
            .then(|| below.take_while(|version| version.covered_by(deps)).count());
        // In the place of the one that is above it now, which was here before and has not seen it.
        let is_cut = covered == Some(at) && self.cuts.get(at).is_none_or(|cut| *cut);
        for (place, cut) in self.cuts.iter_mut().enumerate() {
            *cut &= place < at && covered.is_some_and(|covered| place <= covered);
        }
        is_cut
    }

    /// Drops the versions that `deps` covers: for rows of which only the versions count that no other covers
    /// ([`crate::script`]). The version of `deps` itself stays, since no transaction has seen itself.
    pub fn drop_covered(&mut self, deps: &Vector) {
        self.retain(|version| !version.covered_by(deps));
    }

    fn retain(&mut self, keep: impl Fn(&Version) -> bool) {
        let mut kept = self.versions.iter().map(&keep);
        self.cuts.retain(|_| kept.next().unwrap_or(false));
        self.versions.retain(keep);
    }

    /// Is `version` covered by a later one of its own origin? Then it is met again.
    #[must_use]
    pub fn is_overtaken(&self, version: &Version) -> bool {
        let later = |known: &Version| known.origin() == version.origin() && known.stamp > version.stamp;
        self.versions.iter().any(later)
    }

    /// Meets a truncate of the table: what is below it is gone, and the rest is folded from no row. So is what the truncating
    /// transaction itself wrote before: what it writes afterwards is to be admitted afterwards.
    pub fn truncate(&mut self, truncate: &TableVersion) {
        self.retain(|version| version.stamp > truncate.stamp);
        self.base = Some(State::absent());
    }

    /// What is below the versions. `steps` are theirs, in order; `settled` is what was settled when the journal was
    /// read, nothing for a node that was not started again.
    #[must_use]
    pub fn base(&self, rules: &[Rule], steps: &[&Step], settled: &Vector) -> State {
        if let Some(base) = &self.base {
            return base.clone();
        }
        let lowest = steps.iter().find(|step| !step.version.covered_by(settled));
        let Some((lowest, Effect::Change { old, .. })) = lowest.map(|step| (step, &step.effect)) else {
            return State::of(None, self.ground.clone());
        };
        let mut row = old.clone();
        // What of the old row is folded again over it.
        let again: Vec<&Step> = steps
            .iter()
            .copied()
            .filter(|step| step.version.covered_by(&lowest.deps))
            .collect();
        // What begins the row anew leaves nothing of what is below it.
        let goes_on = again
            .iter()
            .all(|step| matches!(step.effect, Effect::Change { .. } | Effect::Put(_)));
        let is_insert = |step: &&Step| matches!(step.effect, Effect::Put(_));
        let inserted = goes_on && again.iter().any(is_insert);
        if goes_on {
            for (at, rule) in rules.iter().enumerate() {
                // What an insert began from.
                let nothing = match *rule {
                    Rule::Delta(kind) => Field::Binary(number::zero(kind).into()),
                    _ => Field::Null,
                };
                let changes = again.iter().filter_map(|step| {
                    let (old, new) = match &step.effect {
                        Effect::Change { old, new } => (old.get(at)?, new.get(at)?),
                        Effect::Put(new) => (&nothing, new.get(at)?),
                        Effect::Replace(_) | Effect::Delete => return None,
                    };
                    (old != new && *new != Field::Absent).then_some((old, new))
                });
                let Some(slot) = row.get_mut(at) else { continue };
                match *rule {
                    // Folded again, they write what they wrote.
                    Rule::Unit(_) | Rule::Json | Rule::Set(_) => {}
                    Rule::Append(list) => {
                        let changes: Vec<_> = changes.collect();
                        for (old, new) in changes.into_iter().rev() {
                            // What is no append writes all, whatever is before it.
                            let Some(value) = list.undo(slot, old, new) else {
                                break;
                            };
                            *slot = value;
                        }
                    }
                    // The last first: what is between two of them was in the column once, and the type can hold it.
                    Rule::Delta(kind) => {
                        for (old, new) in changes.rev() {
                            if let Ok(value) = add(kind, slot, new, old) {
                                *slot = value;
                            }
                        }
                    }
                    // What raised it is folded again, or is gone; what lowered it, knowingly, tells what it had found.
                    Rule::Max(kind) => {
                        for (old, _) in changes {
                            *slot = better(kind, Ordering::Greater, old, slot);
                        }
                    }
                    Rule::Min(kind) => {
                        for (old, _) in changes {
                            *slot = better(kind, Ordering::Less, old, slot);
                        }
                    }
                }
            }
        }
        let mut state = State::of(Some(row), self.ground.clone());
        state.inserted = inserted;
        if goes_on && !again.is_empty() {
            // They are to end in the old row once more.
            let wrong = astray(state.clone(), rules, &again, old);
            let adds = |at: &usize| matches!(rules.get(*at), Some(Rule::Delta(_) | Rule::Append(_)));
            if inserted && wrong.iter().any(adds) {
                // One came over a row that no insert had begun, and wrote all of it.
                state = State::of(Some(old.clone()), self.ground.clone());
            }
            for at in wrong {
                // What one of them had found was not there any more.
                if matches!(rules.get(at), Some(Rule::Max(_) | Rule::Min(_)))
                    && let Some(slot) = state.row.as_mut().and_then(|row| row.get_mut(at))
                    && let Some(value) = old.get(at)
                {
                    slot.clone_from(value);
                }
            }
        }
        if !again.is_empty() && rules.iter().any(|rule| matches!(rule, Rule::Set(_))) {
            let (deps, row) = (lowest.deps.clone(), old.clone());
            state.held = Some(Box::new(Held { deps, row }));
        }
        state
    }

    /// The place of the version that a fold may begin with, if it is to say what the row is, and what of the versions `asked` was
    /// lost and won: the last cut that none of these is below.
    #[must_use]
    pub fn begin(&self, asked: &[Stamp]) -> usize {
        let last = self.versions.len().saturating_sub(1);
        let places = asked.iter().filter_map(|stamp| self.place(*stamp));
        let upto = places.min().unwrap_or(last);
        let cuts = self.cuts.get(..=upto).unwrap_or_default();
        cuts.iter().rposition(|cut| *cut).unwrap_or(0)
    }

    /// The row. `steps` are those of [`Self::versions`], in order, from the place `from` on, which [`Self::begin`] gave or is 0. Gives
    /// also the versions that were left out of a column's sum.
    #[must_use]
    pub fn fold(
        &self,
        from: usize,
        rules: &[Rule],
        steps: &[&Step],
        settled: &Vector,
    ) -> (State, Vec<(Version, usize)>) {
        let mut state = match from {
            0 => self.base(rules, steps, settled),
            // The first of them covers all that is below it: the row is its image.
            _ => State::absent(),
        };
        let mut left_out = Vec::new();
        for step in steps {
            let columns = state.fold(rules, step);
            left_out.extend(columns.into_iter().map(|at| (step.version, at)));
        }
        (state, left_out)
    }

    /// The lowest versions, as far as they are `stable`.
    pub fn lowest(&self, stable: &Vector) -> impl Iterator<Item = &Version> {
        let is_stable = |version: &&Version| version.covered_by(stable);
        self.versions.iter().take_while(is_stable)
    }

    /// Lets the lowest versions go that are stable, as far as all that are above them cover them: what they did need not be known for
    /// it. Gives how many.
    pub fn let_go(&mut self, stable: &Vector) -> usize {
        let last = self.versions.len().saturating_sub(1);
        let upto = self.lowest(stable).count().min(last);
        let cuts = self.cuts.get(..=upto).unwrap_or_default();
        let count = cuts.iter().rposition(|cut| *cut).unwrap_or(0);
        if count > 0 {
            self.part_with(count);
            self.base = None;
        }
        count
    }

    fn part_with(&mut self, count: usize) {
        for version in self.versions.drain(..count) {
            self.ground.raise(version.origin(), version.position);
        }
        self.cuts.drain(..count);
    }

    /// Folds the lowest versions into the base, as far as they are stable. Their steps need not be given again.
    pub fn compact(&mut self, rules: &[Rule], steps: &[&Step], stable: &Vector, settled: &Vector) {
        let count = self.lowest(stable).count();
        if count == 0 {
            return;
        }
        let mut state = self.base(rules, steps, settled);
        for step in steps.iter().take(count) {
            state.fold(rules, step);
        }
        state.sets.settle(stable, steps.get(count..).unwrap_or_default());
        self.base = Some(state);
        self.part_with(count);
    }

    /// Changes the form of the base's row: columns came, behind those that it has, where it is [`Field::Absent`].
    pub fn map_base(&mut self, change: impl Fn(&Row) -> Row) {
        let Some(base) = &mut self.base else { return };
        if let Some(row) = &mut base.row {
            *row = change(row);
        }
        if let Some(held) = &mut base.held {
            held.row = change(&held.row);
        }
    }

    /// Takes `base` for what is below the versions.
    pub fn set_base(&mut self, base: State) {
        self.base = Some(base);
    }

    /// Is all that is known of the row in `vector`? If `vector` is what is stable, it can be forgotten.
    #[must_use]
    pub fn is_in(&self, vector: &Vector) -> bool {
        self.versions.iter().all(|version| version.covered_by(vector))
    }
}

/// The columns that do not end as in `wanted` once `again` is folded over `state`.
fn astray(mut state: State, rules: &[Rule], again: &[&Step], wanted: &Row) -> Vec<usize> {
    for step in again {
        state.fold(rules, step);
    }
    let ends = state.row.iter().flatten();
    let pairs = ends.zip(wanted).enumerate();
    let wrong = pairs.filter(|(_, (end, wanted))| end != wanted);
    wrong.map(|(at, _)| at).collect()
}
