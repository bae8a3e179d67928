//! Rows that are folded from all that is known of them: of tables whose columns are merged ([`anabranch_conflict::merge`]), and of
//! those where a script chooses ([`super::scripted`]).
//!
//! In:   the same changes as [`Resolver`], with what they did      Out: decisions, findings, folded rows
//! Holds: per row written above the stable point the names of its versions, but of those that are stable and covered by all others; what
//!        these did, up to a budget of bytes
//! Invariants: 1. the index entry of a row is its version with the highest stamp (where a script chooses: the chosen one, until it
//!        has chosen the highest put); 2. a row is folded from what is known
//!        when it is locked and the decoder has passed the lock: no row ever shows less than what is applied, so a later
//!        write of it that covers all holds all; 3. every local write that does not cover all is a finding; 4. what a row may still
//!        be folded from is in memory, or in the journal, which is asked to keep it ([`Resolver::wanted`])
//! On crash: rebuilt with the index; what versions did is read back from the journal, which holds all that is needed
//!
//! Here what is held and the ways in; [`fold`] makes a row of its versions, [`written`] is what one of them did, [`columns`] tables
//! that differ in their columns.
//!
//! Not here: the fold itself, and why the base can be had from the journal (`anabranch_conflict::merge`)

mod columns;
mod fold;
mod written;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use anabranch_conflict::change::Point;
use anabranch_conflict::merge::{History, Meeting};
use anabranch_conflict::{Kind, TableVersion, Version};
use anabranch_proto::schema::TableDesc;
use anabranch_proto::{Lsn, NodeId, Position, Stamp, Vector};

pub(crate) use self::fold::{Folded, Folding, fold};
pub(crate) use self::written::Written;
pub(super) use self::written::image;
use super::{Decision, Error, Expect, Found, Images, LocalTxn, Resolver, Truncated, of_truncate};
use crate::index::{Entry, RowKey, TableId};

/// What versions did is kept in memory up to this many bytes; the rest is read from the journal.
const EFFECT_BYTES: usize = 32 << 20;

/// A row of which something unstable is known.
pub(super) struct Row {
    pub(super) history: History,
    effects: BTreeMap<Stamp, Arc<Written>>,
    /// The columns of what was folded into the base.
    base_table: Option<Arc<TableDesc>>,
    /// While the policy is changed: by the new one, when it was decided last?
    by_new: Option<bool>,
}

impl Row {
    fn byte_len(&self) -> usize {
        self.effects.values().map(|written| written.byte_len()).sum()
    }

    /// Forgets what versions did that are in its history no more. Gives the bytes that this frees.
    fn forget_effects(&mut self) -> usize {
        let mut freed = 0;
        let history = &self.history;
        self.effects.retain(|stamp, written| {
            let keep = history.holds(*stamp);
            if !keep {
                freed += written.byte_len();
            }
            keep
        });
        freed
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
    /// Of each node the first version that is stable and kept, and of which the journal alone knows what it did.
    wanted: BTreeMap<NodeId, Position>,
    /// While the policy is changed: where that was done, once it is met.
    pub(super) point: Option<Point>,
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
        self.bytes -= row.forget_effects().min(self.bytes);
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
        let is_first = !row.history.holds(stamp);
        let written = match before {
            Some(before) => Arc::unwrap_or_clone(before).then(written),
            // The part before it is in the journal.
            None if !is_first => return,
            None => written,
        };
        if self.bytes + written.byte_len() <= EFFECT_BYTES {
            self.bytes += written.byte_len();
            row.effects.insert(stamp, Arc::new(written.detached()));
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

    /// Is the journal read, and is a version below what it has let go? That may have been above it: it is in the old rows of what is not
    /// settled. A settled version that is higher need not have seen it, and must not pass for one that decides all. Stamps come in order:
    /// no row has begun yet.
    fn is_ground(&mut self, version: Version) -> bool {
        let is_ground = self.merged.rebuilding && version.stamp <= self.merged.low;
        if is_ground {
            self.merged.ground.raise(version.origin(), version.position);
        }
        is_ground
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
            by_new: None,
        });
        let chooses = self.chooses(key.table());
        // Met again.
        let is_history = |row: &Row| {
            if chooses {
                row.history.is_overtaken(&version)
            } else {
                row.history.has_let_go(&version)
            }
        };
        if self.merged.rows.get(key).is_some_and(is_history) {
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

    /// Is one version of each row chosen, by a script or while the policy is changed?
    pub(crate) fn chooses(&self, table: TableId) -> bool {
        let folding = self.merged.by_table.get(table.0 as usize);
        matches!(folding, Some(Some(Folding::Script(_) | Folding::Change(_))))
    }

    /// Was the row decided last by the policy to come? One of which nothing is known any more could be decided by that alone.
    pub(super) fn is_decided_by_new(&self, key: &RowKey) -> bool {
        let row = self.merged.rows.get(key);
        row.and_then(|row| row.by_new)
            .unwrap_or(self.merged.point.is_some())
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
    pub(crate) fn versions(&self, key: &RowKey) -> &[Version] {
        let row = self.merged.rows.get(key);
        row.map(|row| row.history.versions()).unwrap_or_default()
    }

    /// Is a row the image of this one version, whatever else was known of it?
    pub(crate) fn is_image_of(&self, key: &RowKey, stamp: Stamp) -> bool {
        let row = self.merged.rows.get(key);
        row.is_some_and(|row| row.history.is_image() && row.history.holds(stamp))
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
        if self.is_ground(local) {
            return Ok(());
        }
        if let Some(winner) = self.truncate_over(&key, &local, seen) {
            return self.found_truncated((table, key), local, images, txn, winner);
        }
        let meeting = self.admit_merged(table, &key, local, seen, images);
        let top = self.top(&key).unwrap_or(local);
        let entry = Entry::new(top, txn.xid);
        self.index.put(key.clone(), entry)?;
        let mut others = self.versions(&key).iter().rev();
        let remote = match meeting {
            Meeting::Merged => others.find(|other| other.stamp != local.stamp).copied(),
            Meeting::Alone => self.ranked.is_repaired(&key).then_some(local),
            Meeting::Known => None,
        };
        let Some(remote) = remote else { return Ok(()) };
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
        if self.is_ground(version) {
            return Ok(());
        }
        if let Some(winner) = self.truncate_over(&key, &version, deps) {
            self.history_truncated((table, key), version, winner.version, lsn);
            return Ok(());
        }
        let meeting = self.admit_merged(table, &key, version, deps, images);
        let top = self.top(&key).unwrap_or(version);
        self.index.put(key.clone(), Entry::new(top, 0))?;
        if let (Some(lsn), Meeting::Merged) = (lsn, meeting) {
            let mut others = self.versions(&key).iter();
            let own = others.find(|other| other.origin() == self.node);
            let local = own.copied().unwrap_or(version);
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
        let known = self.with_own(seen);
        let is_seen = |version: &Version| version.covered_by(&known);
        for key in self.rows_to_cut(id, truncate, &known)? {
            let mut concurrent = self.versions(&key).to_vec();
            concurrent.retain(|version| !is_seen(version));
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

    /// What a truncate leaves of a row: its version with the highest stamp. What the truncating transaction itself has written so
    /// far goes, too.
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
        // What the same transaction writes afterwards does not go on from what it wrote before.
        self.merged.forget_effects(key);
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
        for key in self.rows_to_cut(table, truncate, deps)? {
            let before = self.versions(&key);
            let (gone, kept): (Vec<&Version>, Vec<&Version>) =
                before.iter().partition(|version| version.stamp <= truncate.stamp);
            for version in &gone {
                let is_own = version.stamp == truncate.stamp;
                if !is_own && version.kind == Kind::Put && !version.covered_by(deps) {
                    let entry = Entry::new(**version, 0);
                    out.lost.push((key.clone(), entry));
                }
            }
            // What was folded into the base is no version any more, and may be in the row beside the one that is left.
            let is_image = |row: &Row| row.history.is_image();
            let alone =
                gone.is_empty() && kept.len() == 1 && self.merged.rows.get(&key).is_some_and(is_image);
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

    /// Drops rows of which all is stable: what comes next covers all of it. Of a row that is written all the time, what is stable and
    /// covered by all that is left.
    pub(super) fn forget_merged(&mut self, stable: &Vector) {
        self.merged.stable.clone_from(stable);
        self.merged.retain(|history| !history.is_in(stable));
        let Merged {
            by_table,
            rows,
            bytes,
            wanted,
            ..
        } = &mut self.merged;
        wanted.clear();
        for (key, row) in rows {
            let folding = by_table.get(key.table().0 as usize);
            let is_merged = matches!(folding, Some(Some(Folding::Columns(_))));
            // Of a frontier nothing can go: what all others cover is not in it.
            if is_merged && row.history.let_go(stable) > 0 {
                row.base_table = None;
                *bytes -= row.forget_effects().min(*bytes);
            }
            let in_journal = |version: &&Version| !row.effects.contains_key(&version.stamp);
            for version in row.history.lowest(stable).filter(in_journal) {
                let first = wanted.entry(version.origin()).or_insert(version.position);
                *first = version.position.min(*first);
            }
        }
    }

    /// What the journal has to keep, though it is stable: of each node what is from here on. A row may be folded from it until it is
    /// compacted, or another version covers it.
    pub(crate) fn wanted(&self) -> BTreeMap<NodeId, Position> {
        self.merged.wanted.clone()
    }

    /// Is any version known that is in `held` and not in `stable`?
    pub(super) fn has_unstable_merged(&self, stable: &Vector, held: &Vector) -> bool {
        let unstable = |version: &Version| !version.covered_by(stable) && version.covered_by(held);
        self.merged
            .rows
            .values()
            .any(|row| row.history.versions().iter().any(unstable))
    }
}

#[cfg(test)]
mod tests;
