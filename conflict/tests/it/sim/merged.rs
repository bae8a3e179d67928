//! Rows whose columns are merged: two that the last writer decides by themselves, a counter in 16 bits, a highest (or least) value;
//! or one that the last writer decides, and [`super::collections`]; or four that he decides, by [`super::groups`].

use std::collections::BTreeMap;

use anabranch_conflict::merge::number::Kind as Number;
use anabranch_conflict::merge::{self, Effect, Field, History, Meeting, Row, Rule, Step};
use anabranch_conflict::{Kind, TableVersion, Version};
use anabranch_proto::{Stamp, Vector};

use super::daemon::{Daemon, Entry};
use super::{Arbiter, Columns, Key, Merging, Txn, Value, collections};

const NUMBERS: [Rule; 4] = [
    Rule::Unit(0),
    Rule::Unit(1),
    Rule::Delta(Number::Integer(2)),
    Rule::Max(Number::Integer(8)),
];

/// The right rule of the last column, seen with the other sign.
pub(crate) const LEAST: Rule = Rule::Min(Number::Integer(8));

/// What is kept of a row beside its entry.
#[derive(Debug, Clone)]
pub(crate) struct Merged {
    history: History,
    steps: BTreeMap<Stamp, Step>,
    pub(crate) left_out: u32,
    /// For the incremental control alone: who wrote the first two columns.
    writers: [Stamp; 2],
}

impl Columns {
    fn rules(self) -> [Rule; 4] {
        match self {
            Self::Numbers => NUMBERS,
            Self::Mirrored(last) => {
                let [a, b, counter, _] = NUMBERS;
                [a, b, counter, last]
            }
            Self::Collections(rules) => rules,
            Self::Groups(merged, _) => merged.map(Rule::Unit),
        }
    }
}

fn to_row(columns: Columns, value: &Value) -> Row {
    let [a, b, c, d] = *value;
    let binary = |bytes: &[u8]| Field::Binary(bytes.to_vec().into());
    if let Columns::Groups(..) = columns {
        return value.iter().map(|number| binary(&number.to_be_bytes())).collect();
    }
    if let Columns::Collections(_) = columns {
        let [b, c, d] = [b, c, d].map(collections::field);
        return vec![binary(&a.to_be_bytes()), b, c, d];
    }
    let counter = i16::try_from(c).expect("a counter in its range");
    let d = mirrored(columns, d);
    vec![
        binary(&a.to_be_bytes()),
        binary(&b.to_be_bytes()),
        binary(&counter.to_be_bytes()),
        binary(&d.to_be_bytes()),
    ]
}

fn to_value(columns: Columns, row: &Row) -> Value {
    if let Columns::Collections(_) = columns {
        let Field::Binary(first) = &row[0] else {
            panic!("{row:?}")
        };
        let [b, c, d] = [1, 2, 3].map(|at| collections::id_of(&row[at]));
        return [i64::from_be_bytes(first[..].try_into().unwrap()), b, c, d];
    }
    let numbers: Vec<i64> = row
        .iter()
        .map(|field| match field {
            Field::Binary(bytes) if bytes.len() == 2 => {
                i64::from(i16::from_be_bytes(bytes[..].try_into().unwrap()))
            }
            Field::Binary(bytes) => i64::from_be_bytes(bytes[..].try_into().unwrap()),
            Field::Null | Field::Text(_) | Field::Absent => panic!("{field:?}"),
        })
        .collect();
    let [a, b, c, d]: Value = numbers.try_into().unwrap();
    [a, b, c, mirrored(columns, d)]
}

/// A last column, as daemons see it, or as it is meant.
const fn mirrored(columns: Columns, value: i64) -> i64 {
    match columns {
        Columns::Mirrored(_) => -value,
        Columns::Numbers | Columns::Collections(_) | Columns::Groups(..) => value,
    }
}

fn step(columns: Columns, txn: &Txn, key: Key) -> Step {
    let to_row = |value: &Value| to_row(columns, value);
    let effect = match (txn.writes.rows[&key], txn.writes.updated.get(&key)) {
        (None, _) => Effect::Delete,
        (Some(new), Some(old)) => Effect::Change {
            old: to_row(old),
            new: to_row(&new),
        },
        (Some(new), None) if txn.writes.replaced.contains(&key) => Effect::Replace(to_row(&new)),
        (Some(new), None) => Effect::Put(to_row(&new)),
    };
    Step {
        version: txn.version(key),
        deps: txn.deps.clone(),
        effect,
    }
}

impl Merged {
    pub(super) fn step(&self, stamp: Stamp) -> &Step {
        &self.steps[&stamp]
    }

    /// The row that a version wrote; of numbers.
    pub(super) fn value_of(&self, step: &Step) -> Option<Value> {
        step.effect.row().map(|row| to_value(Columns::Numbers, row))
    }

    /// Takes a version in, in place of those that it covers. One that another covers is met again, and stays out.
    pub(super) fn admit_to_frontier(&mut self, step: Step) {
        if self.history.is_overtaken(&step.version) {
            return;
        }
        self.history.admit(step.version, &step.deps);
        self.history.drop_covered(&step.deps);
        self.steps.insert(step.version.stamp, step);
        self.keep_known();
    }

    pub(super) fn truncate(&mut self, truncate: &TableVersion) {
        self.history.truncate(truncate);
        self.keep_known();
    }

    fn keep_known(&mut self) {
        let versions = self.history.versions();
        self.steps
            .retain(|stamp, _| versions.iter().any(|version| version.stamp == *stamp));
    }

    pub(super) fn steps(&self) -> Vec<&Step> {
        self.steps_from(0)
    }

    fn steps_from(&self, from: usize) -> Vec<&Step> {
        let versions = self.history.versions()[from..].iter();
        versions.map(|version| &self.steps[&version.stamp]).collect()
    }

    /// As daemons do, from where it may begin for the versions `asked`.
    fn value(&mut self, columns: Columns, settled: &Vector, asked: &[Stamp]) -> Option<Value> {
        let from = self.history.begin(asked);
        let steps = self.steps_from(from);
        let (state, left_out) = self.history.fold(from, &columns.rules(), &steps, settled);
        self.left_out = left_out.len() as u32;
        state.row.as_ref().map(|row| to_value(columns, row))
    }

    /// Is it a row that more than one version may have a say in?
    pub(crate) fn is_contested(&self) -> bool {
        self.steps.len() > 1
    }

    pub(crate) fn is_in(&self, vector: &Vector) -> bool {
        self.history.is_in(vector)
    }

    /// Lets go what is covered by all that is left.
    fn let_go(&mut self, stable: &Vector, how: Merging) -> u32 {
        let before = self.history.versions().len();
        match how {
            Merging::LetGoUnstable => {
                let versions = self.history.versions().iter();
                let all = versions.map(|version| (version.origin(), version.position));
                let all: Vector = all.collect();
                self.history.let_go(&all);
            }
            Merging::LetGoUncovered => {
                let gone = self.history.lowest(stable);
                let gone: Vector = gone.map(|version| (version.origin(), version.position)).collect();
                let mut history = History::new(gone.clone(), false);
                for step in self.steps() {
                    if !step.version.covered_by(&gone) {
                        history.admit(step.version, &step.deps);
                    }
                }
                if history.versions().len() < before {
                    self.history = history;
                }
            }
            _ => {
                self.history.let_go(stable);
            }
        }
        self.keep_known();
        (before - self.history.versions().len()) as u32
    }

    fn compact(&mut self, columns: Columns, stable: &Vector, settled: &Vector, how: Merging) -> u32 {
        let rules = columns.rules();
        let before = self.history.versions().len();
        if how == Merging::ForgetAnyStable {
            let (stable_ones, rest): (Vec<Step>, Vec<Step>) = self
                .steps
                .values()
                .cloned()
                .partition(|step| step.version.covered_by(stable));
            if !stable_ones.is_empty() && !rest.is_empty() {
                let mut history = History::new(Vector::new(), false);
                for step in &stable_ones {
                    history.admit(step.version, &step.deps);
                }
                let base = self
                    .history
                    .fold(0, &rules, &stable_ones.iter().collect::<Vec<_>>(), settled);
                // Its base, and then what is stable, whatever lies between.
                history.set_base(base.0);
                history.compact(&rules, &[], stable, settled);
                for step in &rest {
                    history.admit(step.version, &step.deps);
                }
                self.history = history;
            }
        } else {
            let mut history = self.history.clone();
            history.compact(&rules, &self.steps(), stable, settled);
            self.history = history;
        }
        self.keep_known();
        (before - self.history.versions().len()) as u32
    }
}

impl Daemon {
    /// What an incoming version makes of a row.
    pub(crate) fn merge(
        &self,
        key: Key,
        current: Option<Entry>,
        incoming: Entry,
        txn: &Txn,
        losers: &mut Vec<Stamp>,
    ) -> Entry {
        let Arbiter::Merged(how) = self.rules.arbiter else {
            panic!("{:?}", self.rules.arbiter)
        };
        let known = current.as_ref().and_then(|entry| entry.merged.clone());
        let mut merged = known.unwrap_or_else(|| {
            let truncate = self.truncates.get(&key.table);
            let is_absent = truncate.is_some_and(|truncate| !truncate.covered_by(&txn.deps));
            Merged {
                history: History::new(self.ground.clone(), is_absent),
                steps: BTreeMap::new(),
                left_out: 0,
                writers: [incoming.version.stamp; 2],
            }
        });
        let columns = self.rules.columns;
        let step = step(columns, txn, key);
        if how.choice().is_some() {
            return self.choose(how, merged, current, incoming, step, losers);
        }
        // What is stable was decoded here, or applied, and never comes again.
        assert!(!merged.history.has_let_go(&step.version), "let go, and met again");
        let meeting = merged.history.admit(step.version, &step.deps);
        merged.steps.insert(step.version.stamp, step.clone());
        if meeting == Meeting::Merged {
            let steps = merged.steps_from(merged.history.begin(&[txn.stamp]));
            let lost = merge::losses(&columns.rules(), &steps, txn.stamp);
            losers.extend(lost.iter().map(|loss| loss.loser.stamp));
        }
        let value = match (how, meeting, &current) {
            (Merging::Incremental, Meeting::Merged, Some(current)) => merge_into(&mut merged, current, &step),
            (Merging::Arriving(at), Meeting::Merged, Some(current)) => {
                let folded = merged.value(columns, &self.began_settled, &[txn.stamp]);
                folded.map(|folded| arriving(columns, at, folded, current.value, &step))
            }
            _ => merged.value(columns, &self.began_settled, &[txn.stamp]),
        };
        let version = merged.history.top().unwrap();
        let same = current
            .as_ref()
            .filter(|entry| entry.value == value && value.is_some());
        Entry {
            version,
            value,
            xid: same.map_or(incoming.xid, |entry| entry.xid),
            merged: Some(merged),
            ..incoming
        }
    }

    /// What a truncate leaves of a row, and who is lost to it.
    pub(crate) fn cut_merged(&self, mut entry: Entry, txn: &Txn) -> (Option<Entry>, Vec<Stamp>) {
        if let Some(choice) = self.rules.choice() {
            return self.cut_chosen(choice, entry, txn);
        }
        let Some(merged) = &mut entry.merged else {
            return (Some(entry), Vec::new());
        };
        let truncate = TableVersion {
            stamp: txn.stamp,
            position: txn.position,
        };
        let gone = Step {
            version: Version {
                stamp: txn.stamp,
                position: txn.position,
                kind: Kind::Delete,
            },
            deps: txn.deps.clone(),
            effect: Effect::Delete,
        };
        let mut steps = merged.steps();
        steps.retain(|step| step.version.stamp < txn.stamp);
        steps.push(&gone);
        let lost = merge::losses(&self.rules.columns.rules(), &steps, txn.stamp);
        let lost = lost.iter().map(|loss| loss.loser.stamp).collect();
        merged.history.truncate(&truncate);
        merged.keep_known();
        let Some(top) = merged.history.top() else {
            return (None, lost);
        };
        entry.value = merged.value(self.rules.columns, &self.began_settled, &[]);
        entry.version = top;
        (Some(entry), lost)
    }

    /// Forgets what is stable of a row; true: all of it. Else gives how many versions were let go, and how many folded into the base,
    /// which daemons do when they fold a row of many.
    pub(crate) fn forget_merged(
        columns: Columns,
        entry: &mut Entry,
        stable: &Vector,
        settled: &Vector,
        how: Merging,
    ) -> (bool, [u32; 2]) {
        match &mut entry.merged {
            None => (entry.version.covered_by(stable), [0, 0]),
            Some(merged) if merged.is_in(stable) => (true, [0, 0]),
            Some(_) if how.choice().is_some() => (false, [0, 0]),
            Some(merged) => {
                let let_go = merged.let_go(stable, how);
                let compacts = merged.steps.len() > 2 || how == Merging::ForgetAnyStable;
                let compacted = if compacts {
                    merged.compact(columns, stable, settled, how)
                } else {
                    0
                };
                (false, [let_go, compacted])
            }
        }
    }
}

/// Wrong: one column merged into the row as it is.
fn arriving(columns: Columns, at: usize, mut folded: Value, current: Option<Value>, step: &Step) -> Value {
    if let (Effect::Change { old, new }, Some(current)) = (&step.effect, current) {
        let (old, new) = (to_value(columns, old), to_value(columns, new));
        folded[at] = collections::arrive(at, current[at], old[at], new[at]);
    }
    folded
}

/// Wrong: merges into the row as it is.
fn merge_into(merged: &mut Merged, current: &Entry, step: &Step) -> Option<Value> {
    let later = step.version.stamp > current.version.stamp;
    let (old, new) = match (&step.effect, current.value) {
        (Effect::Delete, here) => return here.filter(|_| !later),
        (effect, None) => {
            return effect
                .row()
                .filter(|_| later)
                .map(|row| to_value(Columns::Numbers, row));
        }
        (Effect::Put(new) | Effect::Replace(new), Some(here)) => {
            return Some(if later {
                to_value(Columns::Numbers, new)
            } else {
                here
            });
        }
        (Effect::Change { old, new }, Some(_)) => {
            (to_value(Columns::Numbers, old), to_value(Columns::Numbers, new))
        }
    };
    let mut here = current.value?;
    for at in 0..2 {
        if old[at] != new[at] && step.version.stamp > merged.writers[at] {
            here[at] = new[at];
            merged.writers[at] = step.version.stamp;
        }
    }
    let sum = here[2] + new[2] - old[2];
    here[2] = if i16::try_from(sum).is_ok() { sum } else { here[2] };
    here[3] = here[3].max(new[3]);
    Some(here)
}
