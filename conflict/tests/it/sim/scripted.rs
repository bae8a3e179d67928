//! Rows of which a script chooses a version, by the scripts themselves; and what each of them means, said otherwise.

use std::sync::OnceLock;

use anabranch_conflict::merge::Step;
use anabranch_conflict::script::{Candidate, Script, Value as Shown};
use anabranch_conflict::{Kind, TableVersion};
use anabranch_proto::Stamp;

use super::change::versions_of;
use super::daemon::{Daemon, Entry};
use super::merged::Merged;
use super::{Choice, Merging, Txn, Value};

pub(super) const HIGHEST: &str = r"
    fn weight(version) { if version.deleted { 50 } else { version.row.d } }
    fn resolve(versions) {
        let best = 0;
        for i in 1..versions.len() {
            if weight(versions[i]) >= weight(versions[best]) { best = i; }
        }
        best
    }";

pub(super) const MIDDLE: &str = "fn resolve(versions) { versions.len() / 2 }";

const FAILING: &str = r#"
    fn resolve(versions) {
        for version in versions {
            if !version.deleted && version.row.d % 3 == 0 { throw "three"; }
        }
        0
    }"#;

impl Choice {
    fn script(self) -> &'static Script {
        static SCRIPTS: [OnceLock<Script>; 3] = [const { OnceLock::new() }; 3];
        let (at, text) = match self {
            Self::Highest => (0, HIGHEST),
            Self::Middle => (1, MIDDLE),
            Self::Failing => (2, FAILING),
            Self::Changed(_) => unreachable!("two policies"),
        };
        SCRIPTS[at].get_or_init(|| Script::new("test", text).unwrap())
    }

    /// Of versions in stamp order, each with its last column (`None`: deleted), the place of the one that must be chosen.
    pub(crate) fn meant(self, last: &[Option<i64>]) -> usize {
        let highest_stamp = last.len() - 1;
        match self {
            Self::Highest => {
                let weights = last.iter().map(|last| last.unwrap_or(50));
                weights
                    .enumerate()
                    .max_by_key(|(at, weight)| (*weight, *at))
                    .unwrap()
                    .0
            }
            Self::Middle if last.len() > 1 => last.len() / 2,
            Self::Failing if last.len() > 1 && last.iter().flatten().any(|last| last % 3 == 0) => {
                highest_stamp
            }
            Self::Middle | Self::Failing => 0,
            Self::Changed(_) => unreachable!("two policies"),
        }
    }
}

fn candidate(step: &Step, value: Option<Value>) -> Candidate {
    let columns = |value: Value| {
        let named = ["a", "b", "c", "d"].into_iter().zip(value);
        named
            .map(|(name, value)| (name.to_owned(), Shown::Integer(value)))
            .collect()
    };
    Candidate {
        stamp: step.version.stamp,
        origin: format!("n{}", step.version.origin().0),
        row: value.map(columns),
    }
}

impl Merged {
    /// The version that the row becomes, of these.
    fn chosen(&self, daemon: &Daemon, choice: Choice, among: &[&Step]) -> Stamp {
        let [only] = among else {
            let candidates = || -> Vec<Candidate> {
                let all = among.iter();
                all.map(|step| candidate(step, self.value_of(step))).collect()
            };
            if let Choice::Changed(switch) = choice {
                let new = daemon.are_new(&versions_of(among));
                let versions: Vec<_> = among.iter().map(|step| step.version).collect();
                return switch.chosen(&versions, &new, candidates);
            }
            return choice.script().choose(&candidates()).chosen;
        };
        only.version.stamp
    }

    fn show(&self, entry: Entry, stamp: Stamp) -> Entry {
        let step = self.step(stamp);
        Entry {
            version: step.version,
            value: self.value_of(step),
            ..entry
        }
    }

    fn others(&self, chosen: Stamp) -> impl Iterator<Item = Stamp> {
        let all = self.steps().into_iter().map(|step| step.version.stamp);
        all.filter(move |stamp| *stamp != chosen)
            .collect::<Vec<_>>()
            .into_iter()
    }
}

impl Daemon {
    /// What an incoming version makes of a row.
    pub(crate) fn choose(
        &self,
        how: Merging,
        mut merged: Merged,
        current: Option<Entry>,
        incoming: Entry,
        step: Step,
        losers: &mut Vec<Stamp>,
    ) -> Entry {
        let choice = how.choice().unwrap();
        let stamp = step.version.stamp;
        merged.admit_to_frontier(step);
        let steps = merged.steps();
        let of_two = |step: &&Step| {
            let shown = current.as_ref().map(|entry| entry.version.stamp);
            step.version.stamp == stamp || Some(step.version.stamp) == shown
        };
        let among: Vec<&Step> = match how {
            Merging::ChosenOfTwo(_) => steps.into_iter().filter(of_two).collect(),
            _ => steps,
        };
        let chosen = merged.chosen(self, choice, &among);
        losers.extend(merged.others(chosen));
        let shown = merged.show(incoming, chosen);
        let same = current
            .as_ref()
            .filter(|entry| entry.value == shown.value && shown.value.is_some());
        let xid = same.map_or(shown.xid, |entry| entry.xid);
        Entry {
            xid,
            merged: Some(merged),
            ..shown
        }
    }

    /// What a truncate leaves of a row, and who is lost to it.
    pub(crate) fn cut_chosen(
        &self,
        choice: Choice,
        mut entry: Entry,
        txn: &Txn,
    ) -> (Option<Entry>, Vec<Stamp>) {
        let Some(mut merged) = entry.merged.take() else {
            return (Some(entry), Vec::new());
        };
        let truncate = TableVersion {
            stamp: txn.stamp,
            position: txn.position,
        };
        let is_lost = |step: &&Step| {
            let version = step.version;
            version.stamp < txn.stamp && version.kind == Kind::Put && !version.covered_by(&txn.deps)
        };
        let steps = merged.steps();
        let mut lost: Vec<Stamp> = steps
            .into_iter()
            .filter(is_lost)
            .map(|step| step.version.stamp)
            .collect();
        merged.truncate(&truncate);
        let steps = merged.steps();
        if steps.is_empty() {
            return (None, lost);
        }
        let chosen = merged.chosen(self, choice, &steps);
        lost.extend(merged.others(chosen));
        let shown = merged.show(entry, chosen);
        (
            Some(Entry {
                merged: Some(merged),
                ..shown
            }),
            lost,
        )
    }
}
