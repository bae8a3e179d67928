//! One row made of its versions.
//!
//! Invariants: 1. the lock around the resolver is held while nothing is read and no script runs: they take long, and decoding and
//!        sending wait for it; 2. a row that was made without the lock counts only if it is still made of the same versions
//! Not here: how versions are merged (`anabranch_conflict::merge`), how a script is asked ([`crate::resolve::scripted`])

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use anabranch_conflict::Version;
use anabranch_conflict::change::Change;
use anabranch_conflict::merge::{self, Effect, LeftOut, Rule, Step};
use anabranch_conflict::policy::{Columns, TablePolicy};
use anabranch_conflict::script::{self, Script};
use anabranch_proto::Stamp;
use anabranch_proto::row::RowImage;
use anabranch_proto::schema::TableDesc;

use super::columns::{aligned, in_common, without_absent};
use super::written::Written;
use crate::index::{Entry, RowKey};
use crate::resolve::scripted::{Choice, Chooser};
use crate::resolve::{Error, Resolver};
use crate::shared::lock;

/// How the versions of a row become a row.
#[derive(Debug, Clone)]
pub(crate) enum Folding {
    /// Column by column.
    Columns(Arc<Columns>),
    /// One of those that no other covers.
    Script(Arc<Script>),
    /// The same, by either of two policies.
    Change(Arc<Change>),
}

impl Folding {
    pub(in crate::resolve) fn of(policy: &TablePolicy) -> Option<Self> {
        let columns = policy.columns.as_ref();
        let columns = columns.map(|columns| Self::Columns(Arc::new(columns.clone())));
        let script = policy.script.as_ref();
        columns.or_else(|| script.map(|script| Self::Script(Arc::clone(script))))
    }
}

/// A row, folded from its versions.
pub(crate) struct Folded {
    /// Its columns.
    pub(crate) table: Arc<TableDesc>,
    /// All columns that any of the versions has that it was folded from: those of which `losses` and `left_out` speak.
    pub(crate) all: Arc<TableDesc>,
    /// `None`: there is none.
    pub(crate) row: Option<RowImage>,
    /// The version with the highest stamp; the chosen one.
    pub(crate) top: Version,
    /// What was lost by or to the versions that were asked for.
    pub(crate) losses: Vec<merge::Loss>,
    /// Versions left out of the sum of a column.
    pub(crate) left_out: Vec<LeftOut>,
    /// The script that should have chosen did not: the highest stamp did.
    pub(crate) failure: Option<script::Failure>,
    /// While the policy is changed: was it decided by the new one?
    pub(crate) by_new: Option<bool>,
}

/// What can be said of a row at once.
enum Attempt {
    /// Nothing unstable is known of it.
    Nothing,
    /// What these versions did is not in memory.
    Unread(Vec<Version>),
    /// The row.
    Done(Box<Folded>),
    /// A script is to be asked.
    Choose(Choice),
}

/// What versions did, as read from the journal.
type ReadBack = BTreeMap<Stamp, Arc<Written>>;

/// Folds a row; `None` when nothing unstable is known of it. `read` gives what a version did that is not in memory any more,
/// `choose` what a script makes of a row; the resolver is not locked during either. `asked` are versions whose losses are wanted.
///
/// # Errors
/// Those of `read` and `choose`, and when the index overflow cannot be used.
pub(crate) fn fold<E: From<Error>>(
    resolver: &Mutex<Resolver>,
    key: &RowKey,
    asked: &[Stamp],
    mut read: impl FnMut(Version) -> Result<Written, E>,
    mut choose: impl FnMut(&Choice) -> Result<Option<Folded>, E>,
) -> Result<Option<Folded>, E> {
    let mut read_back = ReadBack::new();
    loop {
        let attempt = lock(resolver).try_fold(key, asked, &read_back);
        match attempt {
            Attempt::Nothing => return Ok(None),
            Attempt::Done(folded) => return Ok(Some(*folded)),
            Attempt::Unread(versions) => {
                for version in versions {
                    read_back.insert(version.stamp, Arc::new(read(version)?));
                }
            }
            Attempt::Choose(choice) => {
                let folded = choose(&choice)?;
                if lock(resolver).accept(key, &choice, folded.as_ref())? {
                    return Ok(folded);
                }
            }
        }
    }
}

impl Resolver {
    fn try_fold(&mut self, key: &RowKey, asked: &[Stamp], read_back: &ReadBack) -> Attempt {
        let Some(folding) = self.merging(key.table()) else {
            return Attempt::Nothing;
        };
        let Some(row) = self
            .merged
            .rows
            .get(key)
            .filter(|row| row.history.top().is_some())
        else {
            return Attempt::Nothing;
        };
        let from = match folding {
            Folding::Columns(_) => row.history.begin(asked),
            Folding::Script(_) | Folding::Change(_) => 0,
        };
        let versions = row.history.versions().get(from..).unwrap_or_default();
        let (mut written, mut unread) = (Vec::with_capacity(versions.len()), Vec::new());
        for version in versions {
            let stamp = &version.stamp;
            match row.effects.get(stamp).or_else(|| read_back.get(stamp)) {
                Some(known) => written.push(Arc::clone(known)),
                None => unread.push(*version),
            }
        }
        if !unread.is_empty() {
            return Attempt::Unread(unread);
        }
        match folding {
            Folding::Script(_) | Folding::Change(_) => {
                let by = match folding {
                    Folding::Change(change) => Chooser::Change(change, self.merged.point),
                    Folding::Script(script) => Chooser::Script(script),
                    Folding::Columns(_) => return Attempt::Nothing,
                };
                Attempt::Choose(Choice {
                    by,
                    versions: versions.to_vec(),
                    written,
                    told: !asked.is_empty(),
                })
            }
            Folding::Columns(columns) => match self.fold_columns(key, &columns, (from, &written), asked) {
                Some(folded) => Attempt::Done(Box::new(folded)),
                None => Attempt::Nothing,
            },
        }
    }

    /// Of a row that has versions; `written`: what each of them did, from a place on where a fold may begin.
    fn fold_columns(
        &mut self,
        key: &RowKey,
        columns: &Columns,
        (from, written): (usize, &[Arc<Written>]),
        asked: &[Stamp],
    ) -> Option<Folded> {
        let row = self.merged.rows.get_mut(key)?;
        let top = row.history.top()?;
        // What is below another place makes no difference.
        let base_table = row.base_table.as_ref().filter(|_| from == 0);
        let tables = base_table.into_iter();
        let tables = tables.chain(written.iter().map(|written| &written.table));
        let table = in_common(tables)?;
        if let Some(base) = base_table {
            row.history.map_base(|values| aligned(values, base, &table));
            row.base_table = Some(Arc::clone(&table));
        }
        let versions = row.history.versions().get(from..)?;
        let steps: Vec<Step> = versions
            .iter()
            .zip(written)
            .map(|(version, written)| step(*version, written, &table))
            .collect();
        let steps: Vec<&Step> = steps.iter().collect();
        let rules: Vec<Rule> = columns.of(&table);
        let (state, left_out) = row.history.fold(from, &rules, &steps, &self.settled);
        let losses = merge::all_losses(&rules, &steps, asked);
        let left_out = merge::left_out(&rules, &steps, &left_out);
        // A row whose versions always meet others would never be stable as a whole, nor have any that the rest covers.
        if from == 0 && steps.len() > 8 {
            let (stable, settled) = (&self.merged.stable, &self.settled);
            row.history.compact(&rules, &steps, stable, settled);
            if row.history.versions().len() < steps.len() {
                row.base_table = Some(Arc::clone(&table));
                self.merged.forget_effects(key);
            }
        }
        let (shown, row) = match &state.row {
            Some(row) => without_absent(&table, row),
            None => (Arc::clone(&table), None),
        };
        Some(Folded {
            row,
            table: shown,
            all: table,
            top,
            losses,
            left_out,
            failure: None,
            by_new: None,
        })
    }

    /// The row is to show `chosen`, which a script chose meanwhile; unless it is made of other versions by now, and the script has to be
    /// asked again.
    fn accept(&mut self, key: &RowKey, choice: &Choice, folded: Option<&Folded>) -> Result<bool, Error> {
        if matches!(choice.by, Chooser::Change(_, point) if point != self.merged.point) {
            return Ok(false);
        }
        let Some(row) = self.merged.rows.get_mut(key) else {
            return Ok(false);
        };
        // A transaction that writes a row twice changes what its version did.
        let is_as_read = |(version, used): (&Version, &Arc<Written>)| {
            let known = row.effects.get(&version.stamp);
            known.is_none_or(|known| Arc::ptr_eq(known, used))
        };
        let same = row.history.versions() == choice.versions
            && choice.versions.iter().zip(&choice.written).all(is_as_read);
        if let Some(folded) = folded.filter(|_| same) {
            row.by_new = folded.by_new;
            let chosen = folded.top;
            let current = self.index.get(key)?;
            if current.is_none_or(|entry| entry.version != chosen) {
                let xid = current.map_or(0, |entry| entry.xid);
                self.index.put(key.clone(), Entry::new(chosen, xid))?;
            }
        }
        Ok(same)
    }
}

fn step(version: Version, written: &Written, table: &Arc<TableDesc>) -> Step {
    let here = |row: &merge::Row| aligned(row, &written.table, table);
    Step {
        version,
        deps: written.deps.clone(),
        effect: match &written.effect {
            Effect::Put(row) => Effect::Put(here(row)),
            Effect::Replace(row) => Effect::Replace(here(row)),
            Effect::Change { old, new } => Effect::Change {
                old: here(old),
                new: here(new),
            },
            Effect::Delete => Effect::Delete,
        },
    }
}
