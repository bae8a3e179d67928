//! Rows that are folded from all that is known of them: of tables whose columns are merged ([`anabranch_conflict::merge`]), and of
//! those where a script chooses ([`super::scripted`]).
//!
//! In:   the same changes as [`Resolver`], with what they did      Out: decisions, findings, folded rows
//! Holds: per row written above the stable point the names of its versions; what these did, up to a budget of bytes
//! Invariants: 1. the index entry of a row is its version with the highest stamp (where a script chooses: the chosen one, until it
//!        has chosen the highest put); 2. a row is folded from what is known
//!        when it is locked and the decoder has passed the lock: no row ever shows less than what is applied, so a later
//!        write of it that covers all holds all; 3. every local write that does not cover all is a finding
//! On crash: rebuilt with the index; what versions did is read back from the journal, which holds all that is needed
//! Not here: the fold itself, and why the base can be had from the journal (`anabranch_conflict::merge`)

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use anabranch_conflict::merge::{self, Effect, Field, History, Meeting, Rule, Step};
use anabranch_conflict::policy::{Columns, TablePolicy};
use anabranch_conflict::script::{self, Script};
use anabranch_conflict::{Kind, TableVersion, Version};
use anabranch_proto::row::{Cell, RowImage};
use anabranch_proto::schema::TableDesc;
use anabranch_proto::{Lsn, NodeId, Stamp, Vector};

use super::{Decision, Error, Expect, Found, Images, LocalTxn, Resolver, Truncated, of_truncate, scripted};
use crate::index::{Entry, RowKey, TableId};

/// What versions did is kept in memory up to this many bytes; the rest is read from the journal.
const EFFECT_BYTES: usize = 32 << 20;

/// What a version did, in the columns of its table at its origin.
#[derive(Debug, Clone)]
pub(crate) struct Written {
    pub(crate) table: Arc<TableDesc>,
    pub(crate) deps: Vector,
    pub(crate) effect: Effect,
}

impl Written {
    /// Of one change; `former`: the row before, unchanged columns marked.
    pub(crate) fn new(
        table: &Arc<TableDesc>,
        deps: &Vector,
        (row, former): (Option<&RowImage>, Option<&RowImage>),
    ) -> Self {
        let effect = match (row, former) {
            (None, _) => Effect::Delete,
            (Some(row), None) => Effect::Put(fields(row)),
            (Some(row), Some(former)) => {
                let new = fields(row);
                let old = former.cells().zip(&new);
                let old = old.map(|(cell, new)| match cell {
                    Cell::Unchanged => new.clone(),
                    cell => field(former, cell),
                });
                Effect::Change {
                    old: old.collect(),
                    new,
                }
            }
        };
        Self {
            table: Arc::clone(table),
            deps: deps.clone(),
            effect,
        }
    }

    /// This, and then `next` by the same transaction.
    pub(crate) fn then(self, next: Self) -> Self {
        let same =
            Arc::ptr_eq(&self.table, &next.table) || self.table.columns.len() == next.table.columns.len();
        Self {
            // No transaction writes a row, alters its table, and writes it again, in the columns it had before.
            effect: if same {
                self.effect.then(next.effect)
            } else {
                next.effect
            },
            ..next
        }
    }

    fn byte_len(&self) -> usize {
        let of = |row: &merge::Row| row.iter().map(|field| 48 + field_len(field)).sum::<usize>();
        160 + match &self.effect {
            Effect::Put(row) | Effect::Replace(row) => of(row),
            Effect::Change { old, new } => of(old) + of(new),
            Effect::Delete => 0,
        }
    }
}

fn field_len(field: &Field) -> usize {
    match field {
        Field::Null | Field::Absent => 0,
        Field::Text(bytes) | Field::Binary(bytes) => bytes.len(),
    }
}

fn field(image: &RowImage, cell: Cell<'_>) -> Field {
    match cell {
        Cell::Null | Cell::Unchanged => Field::Null,
        Cell::Text(value) => Field::Text(image.as_bytes().slice_ref(value)),
        Cell::Binary(value) => Field::Binary(image.as_bytes().slice_ref(value)),
    }
}

fn fields(image: &RowImage) -> merge::Row {
    image.cells().map(|cell| field(image, cell)).collect()
}

/// Of a row that has all columns.
pub(super) fn image(row: &merge::Row) -> RowImage {
    RowImage::build(row.iter().map(|field| match field {
        Field::Null | Field::Absent => Cell::Null,
        Field::Text(value) => Cell::Text(value),
        Field::Binary(value) => Cell::Binary(value),
    }))
}

/// How the versions of a row become a row.
#[derive(Debug, Clone)]
pub(crate) enum Folding {
    /// Column by column.
    Columns(Arc<Columns>),
    /// One of those that no other covers.
    Script(Arc<Script>),
}

impl Folding {
    pub(super) fn of(policy: &TablePolicy) -> Option<Self> {
        let columns = policy.columns.as_ref();
        let columns = columns.map(|columns| Self::Columns(Arc::new(columns.clone())));
        let script = policy.script.as_ref();
        columns.or_else(|| script.map(|script| Self::Script(Arc::clone(script))))
    }
}

/// A row of which something unstable is known.
pub(super) struct Row {
    pub(super) history: History,
    effects: BTreeMap<Stamp, Arc<Written>>,
    /// The columns of what was folded into the base.
    base_table: Option<Arc<TableDesc>>,
}

impl Row {
    fn byte_len(&self) -> usize {
        self.effects.values().map(|written| written.byte_len()).sum()
    }
}

/// What the resolver keeps for merged columns.
#[derive(Default)]
pub(super) struct Merged {
    /// By table number.
    by_table: Vec<Option<Folding>>,
    rows: HashMap<RowKey, Row>,
    bytes: usize,
    /// What is in the old rows of all that is not settled: what was gone from the journal when it was read, and what it still
    /// had up to `low`, a stamp that nothing which was gone is above.
    ground: Vector,
    low: Stamp,
    rebuilding: bool,
    stable: Vector,
}

/// A row, folded from its versions.
pub(crate) struct Folded {
    /// Its columns.
    pub(crate) table: Arc<TableDesc>,
    /// All columns that any of its versions has: those of which `losses` and `left_out` speak.
    pub(crate) all: Arc<TableDesc>,
    /// `None`: there is none.
    pub(crate) row: Option<RowImage>,
    /// The version with the highest stamp; the chosen one.
    pub(crate) top: Version,
    /// What was lost by or to the versions that were asked for.
    pub(crate) losses: Vec<merge::Loss>,
    /// Versions left out of the sum of a column.
    pub(crate) left_out: Vec<(Version, usize)>,
    /// The script that should have chosen did not: the highest stamp did.
    pub(crate) failure: Option<script::Failure>,
}

impl Merged {
    /// The next table has got its number.
    pub(super) fn learn(&mut self, folding: Option<Folding>) {
        self.by_table.push(folding);
    }

    /// The names of rows of a table.
    pub(super) fn keys_of(&self, table: TableId) -> impl Iterator<Item = &RowKey> {
        self.rows.keys().filter(move |key| key.table() == table)
    }

    /// Forgets what versions did that are in the history of a row no more.
    fn forget_effects(&mut self, key: &RowKey) {
        let Some(row) = self.rows.get_mut(key) else { return };
        let before = row.byte_len();
        let versions = row.history.versions();
        row.effects
            .retain(|stamp, _| versions.iter().any(|version| version.stamp == *stamp));
        self.bytes -= (before - row.byte_len()).min(self.bytes);
    }

    fn remove(&mut self, key: &RowKey) {
        if let Some(row) = self.rows.remove(key) {
            self.bytes -= row.byte_len().min(self.bytes);
        }
    }

    fn retain(&mut self, mut keep: impl FnMut(&History) -> bool) {
        let mut freed = 0;
        self.rows.retain(|_, row| {
            let keep = keep(&row.history);
            if !keep {
                freed += row.byte_len();
            }
            keep
        });
        self.bytes -= freed.min(self.bytes);
    }

    fn note(&mut self, key: &RowKey, stamp: Stamp, written: Written) {
        let Some(row) = self.rows.get_mut(key) else { return };
        let before = row.effects.remove(&stamp);
        let freed = before.as_ref().map_or(0, |before| before.byte_len());
        self.bytes -= freed.min(self.bytes);
        let is_first = row
            .history
            .versions()
            .iter()
            .all(|version| version.stamp != stamp);
        let written = match before {
            Some(before) => Arc::unwrap_or_clone(before).then(written),
            // The part before it is in the journal.
            None if !is_first => return,
            None => written,
        };
        if self.bytes + written.byte_len() <= EFFECT_BYTES {
            self.bytes += written.byte_len();
            row.effects.insert(stamp, Arc::new(written));
        }
    }
}

impl Resolver {
    /// How the versions of a table's rows become rows, if one version alone does not.
    pub(crate) fn merging(&self, table: TableId) -> Option<Folding> {
        self.merged.by_table.get(table.0 as usize).cloned().flatten()
    }

    /// What the journal has let go, and a stamp that nothing in it is above, for [`Self::rebuild`], which begins.
    pub fn begin_rebuild(&mut self, gone: Vector, low: Stamp) {
        (self.merged.ground, self.merged.low, self.merged.rebuilding) = (gone, low, true);
    }

    /// The journal is read.
    pub fn rebuilt(&mut self) {
        let settled = self.settled.clone();
        self.merged.retain(|history| !history.is_in(&settled));
        (self.merged.ground, self.merged.rebuilding) = (Vector::new(), false);
    }

    /// Takes in a version of a row.
    fn admit_merged(
        &mut self,
        table: &Arc<TableDesc>,
        key: &RowKey,
        version: Version,
        deps: &Vector,
        images: Images<'_>,
    ) -> Meeting {
        let truncate = self.index.truncate(key.table());
        let is_absent = truncate.is_some_and(|truncate| !truncate.covered_by(deps));
        let ground = &self.merged.ground;
        self.merged.rows.entry(key.clone()).or_insert_with(|| Row {
            history: History::new(ground.clone(), is_absent),
            effects: BTreeMap::new(),
            base_table: None,
        });
        let chooses = self.chooses(key.table());
        let overtaken = |row: &Row| row.history.is_overtaken(&version);
        if chooses && self.merged.rows.get(key).is_some_and(overtaken) {
            return Meeting::Known;
        }
        let row = images.0.filter(|_| version.kind == Kind::Put);
        self.merged
            .note(key, version.stamp, Written::new(table, deps, (row, images.2)));
        let Some(row) = self.merged.rows.get_mut(key) else {
            return Meeting::Alone;
        };
        let meeting = row.history.admit(version, deps);
        if chooses {
            row.history.drop_covered(deps);
            self.merged.forget_effects(key);
        }
        meeting
    }

    /// Does a script choose the table's rows?
    pub(crate) fn chooses(&self, table: TableId) -> bool {
        let folding = self.merged.by_table.get(table.0 as usize);
        matches!(folding, Some(Some(Folding::Script(_))))
    }

    /// What the index has to say of a row until it is folded. Where a script chooses, a put if there is one: a row that is missing
    /// is noticed when it is written, one too many may pass for nobody's.
    fn top(&self, key: &RowKey) -> Option<Version> {
        let history = &self.merged.rows.get(key)?.history;
        let is_put = |version: &&Version| version.kind == Kind::Put;
        let put = history.versions().iter().rev().find(is_put);
        let chooses = self.chooses(key.table());
        put.filter(|_| chooses).copied().or_else(|| history.top())
    }

    /// The versions known of a row, in stamp order.
    pub(crate) fn versions(&self, key: &RowKey) -> Vec<Version> {
        self.merged
            .rows
            .get(key)
            .map_or_else(Vec::new, |row| row.history.versions().to_vec())
    }

    /// A remote version. See [`Self::remote`].
    pub(super) fn remote_merged(
        &mut self,
        (table, key): (&Arc<TableDesc>, &RowKey),
        version: Version,
        deps: &Vector,
        images: Images<'_>,
        xid: u32,
    ) -> Result<Decision, Error> {
        if let Some(winner) = self.truncate_over(key, &version, deps) {
            return Ok(Decision::Keep { winner });
        }
        let before = self.current(key)?;
        let expect = Expect {
            present: before.map(|entry| entry.version.kind == Kind::Put),
            xid: before.map_or(0, |entry| entry.xid),
        };
        let meeting = self.admit_merged(table, key, version, deps, images);
        let top = self.top(key).unwrap_or(version);
        self.index.put(key.clone(), Entry::new(top, xid))?;
        Ok(match meeting {
            Meeting::Alone => Decision::Apply {
                expect,
                beaten: None,
                unsure: false,
            },
            Meeting::Merged | Meeting::Known => Decision::Fold { expect },
        })
    }

    /// A local write, decoded. See [`Self::local`].
    pub(super) fn local_merged(
        &mut self,
        table: &Arc<TableDesc>,
        key: RowKey,
        local: Version,
        images: Images<'_>,
        txn: &LocalTxn,
        seen: &Vector,
    ) -> Result<(), Error> {
        if let Some(winner) = self.truncate_over(&key, &local, seen) {
            return self.found_truncated((table, key), local, images, txn, winner);
        }
        let meeting = self.admit_merged(table, &key, local, seen, images);
        let top = self.top(&key).unwrap_or(local);
        let entry = Entry::new(top, txn.xid);
        self.index.put(key.clone(), entry)?;
        let other = self
            .versions(&key)
            .into_iter()
            .rev()
            .find(|other| other.stamp != local.stamp);
        let remote = match (meeting, other) {
            (Meeting::Merged, Some(other)) => other,
            (Meeting::Alone, _) if self.ranked.is_repaired(&key) => local,
            _ => return Ok(()),
        };
        let found = self.finding(table, key, local, images, txn, remote, false);
        self.push_found(Found {
            settle: true,
            log: false,
            ..found
        });
        Ok(())
    }

    /// A version of an earlier life. See [`Self::history_ranked`].
    pub(super) fn history_merged(
        &mut self,
        (table, key): (&Arc<TableDesc>, RowKey),
        version: Version,
        deps: &Vector,
        images: Images<'_>,
        lsn: Option<Lsn>,
    ) -> Result<(), Error> {
        // What was let go may have been above it: it is in the old rows of what is not settled. A settled version that is higher need
        // not have seen it, and must not pass for one that decides all. Stamps come in order: no row has begun yet.
        if self.merged.rebuilding && version.stamp <= self.merged.low {
            self.merged.ground.raise(version.origin(), version.position);
            return Ok(());
        }
        if self.truncate_over(&key, &version, deps).is_some() {
            return Ok(());
        }
        let meeting = self.admit_merged(table, &key, version, deps, images);
        let top = self.top(&key).unwrap_or(version);
        self.index.put(key.clone(), Entry::new(top, 0))?;
        if let (Some(lsn), Meeting::Merged) = (lsn, meeting) {
            let own = self
                .versions(&key)
                .into_iter()
                .find(|other| other.origin() == self.node);
            let local = own.unwrap_or(version);
            self.push_found(Found {
                settle: true,
                ..Found::of_versions(lsn, table, key, local, version)
            });
        }
        Ok(())
    }

    /// A local truncate, decoded.
    pub(super) fn local_truncate_merged(
        &mut self,
        table: &Arc<TableDesc>,
        id: TableId,
        txn: &LocalTxn,
        seen: &Vector,
    ) -> Result<(), Error> {
        let truncate = TableVersion {
            stamp: txn.stamp,
            position: txn.position,
        };
        let gone = of_truncate(truncate).version;
        for key in self.known_rows(id)? {
            let concurrent: Vec<Version> = self
                .versions(&key)
                .into_iter()
                .filter(|version| version.origin() != self.node && !version.covered_by(seen))
                .collect();
            self.cut_merged(&key, truncate, 0)?;
            for (at, &remote) in concurrent.iter().enumerate() {
                let lost = remote.stamp < truncate.stamp && remote.kind == Kind::Put;
                if at == 0 || lost {
                    let found = self.finding(table, key.clone(), gone, (None, None, None), txn, remote, true);
                    self.push_found(Found {
                        settle: true,
                        log: lost,
                        ..found
                    });
                }
            }
        }
        self.index.put_truncate(id, truncate);
        Ok(())
    }

    /// What a truncate leaves of a row: its version with the highest stamp.
    fn cut_merged(
        &mut self,
        key: &RowKey,
        truncate: TableVersion,
        xid: u32,
    ) -> Result<Option<Version>, Error> {
        if let Some(row) = self.merged.rows.get_mut(key) {
            row.history.truncate(&truncate);
            row.base_table = None;
        }
        let top = self.top(key);
        match top {
            Some(version) => self.index.put(key.clone(), Entry::new(version, xid))?,
            None => {
                self.merged.remove(key);
                self.index.put(key.clone(), of_truncate(truncate))?;
            }
        }
        Ok(top)
    }

    /// A remote truncate. See [`Self::remote_truncate`].
    pub(super) fn remote_truncate_merged(
        &mut self,
        table: TableId,
        truncate: TableVersion,
        deps: &Vector,
    ) -> Result<Truncated, Error> {
        let mut out = Truncated::default();
        for key in self.known_rows(table)? {
            let before = self.versions(&key);
            let (gone, kept): (Vec<&Version>, Vec<&Version>) =
                before.iter().partition(|version| version.stamp < truncate.stamp);
            for version in &gone {
                if version.kind == Kind::Put && !version.covered_by(deps) {
                    let entry = Entry::new(**version, 0);
                    out.lost.push((key.clone(), entry));
                }
            }
            let alone = gone.is_empty() && kept.len() == 1;
            let xid = self
                .index
                .get(&key)?
                .filter(|_| alone)
                .map_or(0, |entry| entry.xid);
            match self.cut_merged(&key, truncate, xid)? {
                Some(top) if top.kind == Kind::Put => {
                    if !alone {
                        out.folded.push(key.clone());
                    }
                    out.survivors.push(key);
                }
                _ => {}
            }
        }
        self.index.put_truncate(table, truncate);
        Ok(out)
    }

    /// Is all that is known of a row in `vector`?
    pub(super) fn is_merged_in(&self, key: &RowKey, vector: &Vector) -> bool {
        self.merged
            .rows
            .get(key)
            .is_none_or(|row| row.history.is_in(vector))
    }

    /// Drops rows of which all is stable: what comes next covers all of it.
    pub(super) fn forget_merged(&mut self, stable: &Vector) {
        self.merged.stable.clone_from(stable);
        self.merged.retain(|history| !history.is_in(stable));
    }

    /// Is any version known that is in `held` and not in `stable`?
    pub(super) fn has_unstable_merged(&self, stable: &Vector, held: &Vector) -> bool {
        let unstable = |version: &Version| !version.covered_by(stable) && version.covered_by(held);
        self.merged
            .rows
            .values()
            .any(|row| row.history.versions().iter().any(unstable))
    }

    /// Folds a row; `None` when nothing unstable is known of it. `read` gives what a version did that is not in memory
    /// any more; `asked` are versions whose losses are wanted; `names` are the nodes', where a script chooses.
    pub(crate) fn fold<E: From<Error>>(
        &mut self,
        key: &RowKey,
        asked: &[Stamp],
        names: &BTreeMap<NodeId, String>,
        mut read: impl FnMut(Version) -> Result<Written, E>,
    ) -> Result<Option<Folded>, E> {
        let Some(folding) = self.merging(key.table()) else {
            return Ok(None);
        };
        let Some(row) = self.merged.rows.get_mut(key) else {
            return Ok(None);
        };
        let Some(top) = row.history.top() else {
            return Ok(None);
        };
        let mut written = Vec::with_capacity(row.history.versions().len());
        for version in row.history.versions() {
            written.push(match row.effects.get(&version.stamp) {
                Some(known) => Arc::clone(known),
                None => Arc::new(read(*version)?),
            });
        }
        let columns = match folding {
            Folding::Columns(columns) => columns,
            Folding::Script(script) => {
                let versions = row.history.versions();
                let Some(folded) = scripted::choose(&script, versions, &written, names, !asked.is_empty())
                else {
                    return Ok(None);
                };
                self.note_chosen(key, folded.top)?;
                return Ok(Some(folded));
            }
        };
        let tables = row
            .base_table
            .iter()
            .chain(written.iter().map(|written| &written.table));
        let Some(table) = in_common(tables) else {
            return Ok(None);
        };
        if let Some(base) = &row.base_table {
            row.history.map_base(|values| aligned(values, base, &table));
            row.base_table = Some(Arc::clone(&table));
        }
        let steps: Vec<Step> = row
            .history
            .versions()
            .iter()
            .zip(&written)
            .map(|(version, written)| step(*version, written, &table))
            .collect();
        let steps: Vec<&Step> = steps.iter().collect();
        let rules: Vec<Rule> = columns.of(&table);
        let (state, left_out) = row.history.fold(&rules, &steps, &self.settled);
        let losses = merge::all_losses(&rules, &steps, asked);
        // A row that is written all the time would never be stable as a whole.
        if steps.len() > 8 {
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
        Ok(Some(Folded {
            row,
            table: shown,
            all: table,
            top,
            losses,
            left_out,
            failure: None,
        }))
    }

    /// The row is to show this version of it.
    fn note_chosen(&mut self, key: &RowKey, chosen: Version) -> Result<(), Error> {
        let current = self.index.get(key)?;
        if current.is_none_or(|entry| entry.version != chosen) {
            let xid = current.map_or(0, |entry| entry.xid);
            self.index.put(key.clone(), Entry::new(chosen, xid))?;
        }
        Ok(())
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

fn same_columns(a: &TableDesc, b: &TableDesc) -> bool {
    a.columns.len() == b.columns.len() && a.columns.iter().zip(&b.columns).all(|(a, b)| a.name == b.name)
}

/// A folded row, and its columns: without those that it says nothing of.
fn without_absent(table: &Arc<TableDesc>, row: &merge::Row) -> (Arc<TableDesc>, Option<RowImage>) {
    if !row.contains(&Field::Absent) {
        return (Arc::clone(table), Some(image(row)));
    }
    let is_there = |at: usize| row.get(at).is_some_and(|field| *field != Field::Absent);
    let before = |at: u16| (0..usize::from(at)).filter(|at| is_there(*at)).count();
    let columns = table.columns.iter().enumerate();
    let columns = columns
        .filter(|(at, _)| is_there(*at))
        .map(|(_, column)| column.clone());
    // Every version has the key's columns.
    let key = table.key.iter().filter_map(|at| u16::try_from(before(*at)).ok());
    let shown = TableDesc {
        columns: columns.collect(),
        key: key.collect(),
        ..TableDesc::clone(table)
    };
    let there: merge::Row = row
        .iter()
        .filter(|field| **field != Field::Absent)
        .cloned()
        .collect();
    (Arc::new(shown), Some(image(&there)))
}

/// A row of `from` in the columns of `to`.
fn aligned(row: &merge::Row, from: &Arc<TableDesc>, to: &Arc<TableDesc>) -> merge::Row {
    if Arc::ptr_eq(from, to) || same_columns(from, to) {
        return row.clone();
    }
    let value = |name: &str| {
        let at = from.columns.iter().position(|column| column.name == name)?;
        row.get(at).cloned()
    };
    let columns = to.columns.iter();
    columns
        .map(|column| value(&column.name).unwrap_or(Field::Absent))
        .collect()
}

/// A description with the columns of all: nodes may differ for a while in which they have, and in their order.
fn in_common<'a>(tables: impl Iterator<Item = &'a Arc<TableDesc>>) -> Option<Arc<TableDesc>> {
    let mut all: Option<Arc<TableDesc>> = None;
    for table in tables {
        let Some(known) = &all else {
            all = Some(Arc::clone(table));
            continue;
        };
        let is_new = |name: &str| known.columns.iter().all(|column| column.name != name);
        let more: Vec<_> = table
            .columns
            .iter()
            .filter(|column| is_new(&column.name))
            .cloned()
            .collect();
        if !more.is_empty() {
            let mut wider = TableDesc::clone(known);
            wider.columns.extend(more);
            all = Some(Arc::new(wider));
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use anabranch_conflict::policy::Policies;
    use anabranch_proto::Position;
    use anabranch_proto::schema::ColumnDesc;
    use anabranch_proto::stamp::NTP64;
    use anabranch_proto::txn::{Change, PutOp};

    use super::*;
    use crate::index::RowIndex;

    fn table(columns: &[&str]) -> Arc<TableDesc> {
        let column = |name: &&str| ColumnDesc {
            name: (*name).to_owned(),
            type_oid: 20,
            type_mod: -1,
            type_name: "pg_catalog.int8".to_owned(),
        };
        Arc::new(TableDesc {
            schema: "public".to_owned(),
            name: "counter".to_owned(),
            columns: columns.iter().map(column).collect(),
            key: vec![0],
            identity_full: true,
        })
    }

    fn row(values: &[i64]) -> RowImage {
        let values: Vec<[u8; 8]> = values.iter().map(|value| value.to_be_bytes()).collect();
        RowImage::build(values.iter().map(|value| Cell::Binary(value)))
    }

    fn at(node: u16, time: u64) -> (Stamp, Position) {
        let stamp = Stamp {
            time: NTP64(time),
            node: NodeId(node),
        };
        (stamp, Position::new(1, time))
    }

    fn seen(of: &[(u16, u64)]) -> Vector {
        let of = of.iter();
        of.map(|&(node, time)| (NodeId(node), Position::new(1, time)))
            .collect()
    }

    fn resolver(dir: &tempfile::TempDir) -> Resolver {
        let text =
            "[[table]]\nname = \"public.counter\"\npolicy = \"column_merge\"\ncolumns = { n = \"delta\" }";
        let policies = Policies::parse(text, &BTreeMap::new(), |_| Err(String::new())).unwrap();
        let index = RowIndex::new(dir.path(), 1 << 20).unwrap();
        Resolver::new(NodeId(1), index, policies)
    }

    /// A write of an earlier life.
    fn rebuild(
        resolver: &mut Resolver,
        table: &Arc<TableDesc>,
        (old, new): (&[i64], &[i64]),
        at: (Stamp, Position),
        deps: &Vector,
    ) {
        let change = Change::Put {
            table: Arc::clone(table),
            op: PutOp::Update,
            row: row(new),
            old_key: None,
            former: Some(row(old)),
        };
        resolver.rebuild(&change, at, deps).unwrap();
    }

    fn folded(resolver: &mut Resolver, table: &Arc<TableDesc>) -> Folded {
        let key = resolver.key_of_row(table, &row(&[1, 0])).unwrap();
        let in_memory = |_| unreachable!("what versions did is in memory");
        let folded = resolver.fold::<Error>(&key, &[], &BTreeMap::new(), in_memory);
        folded.unwrap().unwrap()
    }

    #[test]
    fn a_version_that_the_journal_still_has_and_that_is_in_the_base_counts_as_seen() {
        let dir = tempfile::tempdir().unwrap();
        let (mut resolver, table) = (resolver(&dir), table(&["id", "n"]));
        resolver.settle(seen(&[(1, 10), (2, 20)]));
        resolver.begin_rebuild(Vector::new(), at(2, 15).0);
        // Up to what may be gone: it is in the old row of the lowest that is not settled.
        rebuild(
            &mut resolver,
            &table,
            (&[1, 100], &[1, 130]),
            at(1, 10),
            &seen(&[]),
        );
        // Settled, and had not seen it.
        rebuild(
            &mut resolver,
            &table,
            (&[1, 100], &[1, 101]),
            at(2, 20),
            &seen(&[]),
        );
        rebuild(
            &mut resolver,
            &table,
            (&[1, 130], &[1, 135]),
            at(3, 30),
            &seen(&[(1, 10)]),
        );
        resolver.rebuilt();
        let folded = folded(&mut resolver, &table);
        assert_eq!(folded.row.unwrap().as_bytes(), row(&[1, 136]).as_bytes());
    }

    #[test]
    fn a_column_that_no_version_has_is_left_to_the_server_and_one_that_came_is_as_it_was_found() {
        let dir = tempfile::tempdir().unwrap();
        let (mut resolver, before) = (resolver(&dir), table(&["id", "n"]));
        let after = table(&["id", "flag", "n"]);
        resolver.begin_rebuild(Vector::new(), Stamp::ZERO);
        rebuild(
            &mut resolver,
            &before,
            (&[1, 100], &[1, 110]),
            at(1, 10),
            &seen(&[]),
        );
        rebuild(
            &mut resolver,
            &after,
            (&[1, 7, 100], &[1, 7, 105]),
            at(2, 20),
            &seen(&[]),
        );
        resolver.rebuilt();
        let both = folded(&mut resolver, &before);
        let names = |folded: &Folded| -> Vec<String> {
            let columns = folded.table.columns.iter();
            columns.map(|column| column.name.clone()).collect()
        };
        assert_eq!(names(&both), ["id", "n", "flag"]);
        assert_eq!(both.row.unwrap().as_bytes(), row(&[1, 115, 7]).as_bytes());
        // Who has seen all, and whose table has the column no more, says nothing of it.
        rebuild(
            &mut resolver,
            &before,
            (&[1, 115], &[1, 200]),
            at(1, 30),
            &seen(&[(1, 10), (2, 20)]),
        );
        let last = folded(&mut resolver, &before);
        assert_eq!(
            (names(&last), last.table.key.clone()),
            (vec!["id".to_owned(), "n".to_owned()], vec![0])
        );
        assert_eq!(last.row.unwrap().as_bytes(), row(&[1, 200]).as_bytes());
        assert_eq!(last.all.columns.len(), 3);
    }
}
