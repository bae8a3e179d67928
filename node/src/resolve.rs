//! Resolve: what a change means for its row, decided against the row index.
//!
//! In:   decoded local changes in WAL order (capture), remote changes in causal order (apply)
//! Out:  decisions to apply; findings, when a local commit is decoded that a remote write did not know
//! Holds: the row index, numbers of tables, findings not yet worked off; for policies over the frontier see [`ranked`], for keys in
//!        quarantine [`waiting`]
//! Invariants: 1. the index entry of a row is the winner among all versions of it met so far; 2. a finding
//!        stays here until the applier has recorded it, and the slot does not move past it before
//! On crash: rebuilt from the journal and by decoding again; findings come back with the same conflict ids
//! Not here: SQL (apply), who wins (`anabranch-conflict`), when a change may be resolved (order)
//!
//! Here what is held and what others ask of it; [`local`], [`remote`] and [`history`] are the ways in, [`ranked`] the
//! same for tables whose policy looks at the whole frontier; [`claims`] the values of unique keys; [`watch`] tells which rows had a write of late.

mod changing;
mod claims;
mod findings;
mod history;
mod local;
mod merged;
mod ranked;
mod remote;
mod scripted;
pub mod unique;
mod waiting;
mod watch;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use anabranch_conflict::policy::Policies;
use anabranch_conflict::{Kind, TableVersion, Version};
use anabranch_proto::row::RowImage;
use anabranch_proto::schema::TableDesc;
use anabranch_proto::txn::Change;
use anabranch_proto::wire::Malformed;
use anabranch_proto::{Lsn, NodeId, Position, Stamp, Vector};

use crate::index::{self, Entry, RowIndex, RowKey, Summary, TableId, TableIds};
use claims::Registers;
pub use claims::{Rival, TxnClaims, Yielded};
use findings::Findings;
use merged::Merged;
use ranked::Ranked;
pub use unique::{UniqueKey, UniqueKeys};
pub use waiting::Quarantined;
use waiting::Waiting;
use watch::Watches;
pub use watch::{WatchId, Watched};

pub(crate) use merged::{Folded, Folding, Written, fold};
pub(crate) use scripted::Choice;

/// Resolving failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The index overflow cannot be used.
    #[error(transparent)]
    Index(#[from] index::Error),
    /// A change without a readable key.
    #[error(transparent)]
    Malformed(#[from] Malformed),
    /// What was put aside of the findings cannot be read.
    #[error(
        "conflicts that wait to be logged cannot be read back from the data folder: {0}; mend the disk, then restart the daemon, \
         which finds them again"
    )]
    Findings(std::io::Error),
}

impl Error {
    /// Was a disk full? All that is held is made anew from the journal and the WAL, once there is space.
    #[must_use]
    pub const fn is_no_space(&self) -> bool {
        matches!(self, Self::Index(error) if error.is_no_space())
    }
}

/// What the physical row should look like before a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Expect {
    /// Is there a row? `None` when nothing is known: then the incoming operation tells.
    pub present: Option<bool>,
    /// The `xmin` that the row should have, 0 if unknown.
    pub xid: u32,
}

/// What to do with an incoming version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// Write it. `beaten` is a concurrent version that lost to it, to be logged.
    Apply {
        /// The row as it should be found.
        expect: Expect,
        /// The loser.
        beaten: Option<Entry>,
        /// It is met again, and what was known of the row the first time is known no more: nothing is expected of the row.
        unsure: bool,
    },
    /// Leave the row: `winner` is concurrent and preferred. Log the incoming version.
    Keep {
        /// The version that stays.
        winner: Entry,
    },
    /// Fold the row from its versions once it is locked: columns are merged.
    Fold {
        /// The row as it should be found.
        expect: Expect,
    },
    /// Log the incoming version, and write `winner` again, which the row does not show: what had beaten it is
    /// covered by the incoming version, which it beats.
    Restore {
        /// The version that the row must show.
        winner: Entry,
        /// The row as it should be found.
        expect: Expect,
    },
}

/// What a remote truncate means for the rows of its table that have an entry.
#[derive(Debug, Clone, Default)]
pub struct Truncated {
    /// Concurrent and newer: they stay.
    pub survivors: Vec<RowKey>,
    /// Concurrent and older: they go, and are logged.
    pub lost: Vec<(RowKey, Entry)>,
    /// What the row showed goes; this version, which had lost to it, is newer than the truncate and comes back.
    pub restored: Vec<(RowKey, Version)>,
    /// Survivors that some of what made them is gone from: they are folded again.
    pub folded: Vec<RowKey>,
}

/// The local transaction being decoded.
#[derive(Debug, Clone, Copy)]
pub struct LocalTxn {
    /// Its stamp.
    pub stamp: Stamp,
    /// Just past the start of its commit record: see [`Entry::version`].
    pub position: Position,
    /// Its top-level transaction id.
    pub xid: u32,
    /// Its commit timestamp, microseconds since the Unix epoch.
    pub commit_us: i64,
}

impl LocalTxn {
    /// Start of its commit record, where the slot waits for what was found with it.
    const fn lsn(&self) -> Lsn {
        Lsn(self.position.lsn.0.saturating_sub(1))
    }
}

/// A conflict seen only when a local commit was decoded: a remote write was decided without knowing it.
#[derive(Debug, Clone)]
pub struct Found {
    /// Start of the local commit record: the slot waits there until this is worked off.
    pub lsn: Lsn,
    /// The row's table.
    pub table: Arc<TableDesc>,
    /// The row.
    pub key: RowKey,
    /// The local write.
    pub local: Version,
    /// Its row; `None` for a delete, or when found again after a restart.
    pub local_row: Option<RowImage>,
    /// Its key's columns, when known.
    pub key_image: Option<RowImage>,
    /// Its transaction, when known.
    pub local_txn: Option<LocalTxn>,
    /// The remote write.
    pub remote: Version,
    /// Which of both won.
    pub local_won: bool,
    /// The row may be there although a delete won: the guard cannot watch over a row that is not there.
    pub repair: bool,
    /// Make the row what the index says, whatever it is: the table's policy is over the frontier.
    pub settle: bool,
    /// Is there a line to log? A write that only follows one that was logged has none.
    pub log: bool,
    /// Both are versions of different rows: the row of the finding yields to this one.
    pub rival: Option<Rival>,
}

impl Found {
    /// A finding of which only the versions are known, to be repaired and not logged: for others to build on.
    fn of_versions(lsn: Lsn, table: &Arc<TableDesc>, key: RowKey, local: Version, remote: Version) -> Self {
        Self {
            lsn,
            table: Arc::clone(table),
            key,
            local,
            local_row: None,
            key_image: None,
            local_txn: None,
            remote,
            local_won: false,
            repair: true,
            settle: false,
            log: false,
            rival: None,
        }
    }

    /// The version of its row that yields to another row, if that is what it is about.
    fn yields(&self) -> Option<Version> {
        let version = if self.local_won { self.remote } else { self.local };
        self.rival.as_ref().map(|_| version)
    }

    /// Can it be worked off, or is the remote write still to be written here? One of the same row is made with the
    /// local one known by then; for one of another row somebody has to see to this row.
    #[must_use]
    pub fn is_due(&self, applied: &Vector) -> bool {
        self.rival.is_none() || self.remote.covered_by(applied)
    }
}

/// A row, the image of its key, and what it was before, as far as a change has them.
pub(crate) type Images<'a> = (Option<&'a RowImage>, Option<&'a RowImage>, Option<&'a RowImage>);

/// The resolver of one node. One lock around it serves capture and apply.
pub struct Resolver {
    node: NodeId,
    ids: TableIds,
    index: RowIndex,
    found: Findings,
    taken_from: Option<Lsn>,
    /// Rows of the findings that are being worked off.
    taken: HashSet<RowKey>,
    /// Rows that a remote write was decided for without knowing of a local one, or of a local truncate, with that write, until
    /// it comes back as an echo: further local writes of the row may have met it, too.
    racing: HashMap<RowKey, Version>,
    waiting: Waiting,
    scratch: Vec<u8>,
    ranked: Ranked,
    merged: Merged,
    registers: Registers,
    settled: Vector,
    /// By table: the last transaction that [`Self::rebuild`] met a row of.
    rebuilt_last: HashMap<TableId, Stamp>,
    watches: Watches,
    changing: changing::Changing,
}

impl Resolver {
    /// A resolver of `node` over an empty index.
    #[must_use]
    pub fn new(node: NodeId, index: RowIndex, policies: Policies) -> Self {
        Self {
            node,
            ids: TableIds::default(),
            found: Findings::new(index.folder()),
            index,
            taken_from: None,
            taken: HashSet::new(),
            racing: HashMap::new(),
            waiting: Waiting::default(),
            scratch: Vec::new(),
            ranked: Ranked::new(policies),
            merged: Merged::default(),
            registers: Registers::default(),
            settled: Vector::new(),
            rebuilt_last: HashMap::new(),
            watches: Watches::default(),
            changing: changing::Changing::default(),
        }
    }

    /// Says what was stable, with nothing left to put right, when the journal was last trimmed. The index of a row
    /// may be built from what beat nothing but is all that the journal still holds, if nothing above `settled` has
    /// written it: so such a row is never put right by it.
    pub fn settle(&mut self, settled: Vector) {
        self.settled = settled;
    }

    /// Takes a finding, unless it was worked off in an earlier life.
    fn push_found(&mut self, found: Found) {
        if found.local.covered_by(&self.settled) && found.remote.covered_by(&self.settled) {
            return;
        }
        // It makes the row what the index says, or has that refused again: whatever waits now is that no more. And a row that yields a
        // unique value is never to be there; once that is forgotten, nothing else says so of one that waits.
        if found.settle
            || found
                .yields()
                .is_some_and(|version| self.waits_with(&found.key, version))
        {
            self.overtake(&found.table, &found.key);
        }
        self.found.push(found);
    }

    /// `seen` and whatever this node has written.
    fn with_own(&self, seen: &Vector) -> Vector {
        let mut known = seen.clone();
        known.raise(self.node, Position::new(u32::MAX, u64::MAX));
        known
    }

    /// This node.
    pub(crate) const fn node(&self) -> NodeId {
        self.node
    }

    /// The number of a table.
    pub fn table_id(&mut self, table: &TableDesc) -> TableId {
        let id = self.ids.id(table);
        self.registers.learn(id, table);
        if self.ranked.learn(id, table) {
            self.merged.learn(self.ranked.folding(table));
        }
        id
    }

    /// The key of a whole row.
    ///
    /// # Errors
    /// When a key column has no value.
    pub fn key_of_row(&mut self, table: &TableDesc, row: &RowImage) -> Result<RowKey, Error> {
        let id = self.table_id(table);
        Ok(RowKey::of_row(id, table, row, &mut self.scratch)?)
    }

    /// The key of a key image.
    ///
    /// # Errors
    /// When a key column has no value.
    pub fn key_of_image(&mut self, table: &TableDesc, key: &RowImage) -> Result<RowKey, Error> {
        let id = self.table_id(table);
        Ok(RowKey::of_image(id, table, key, &mut self.scratch)?)
    }

    /// Calls `each` for every version of a row that a change makes, by the transaction of this stamp and position. A
    /// truncate makes none: it is a version of its table.
    fn each_version(
        &mut self,
        change: &Change,
        (stamp, position): (Stamp, Position),
        mut each: impl FnMut(&mut Self, &Arc<TableDesc>, RowKey, Version, Images<'_>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        if let Change::Put { table, row, .. } = change {
            self.meet_change(table, row, stamp.node, position)?;
        }
        let version = |kind| Version {
            stamp,
            position,
            kind,
        };
        match change {
            Change::Put {
                table,
                row,
                old_key,
                former,
                ..
            } => {
                if let Some(old_key) = old_key {
                    let key = self.key_of_image(table, old_key)?;
                    each(
                        self,
                        table,
                        key,
                        version(Kind::Delete),
                        (None, Some(old_key), None),
                    )?;
                }
                let key = self.key_of_row(table, row)?;
                each(
                    self,
                    table,
                    key,
                    version(Kind::Put),
                    (Some(row), None, former.as_ref()),
                )
            }
            Change::Delete { table, key } => {
                let row_key = self.key_of_image(table, key)?;
                each(
                    self,
                    table,
                    row_key,
                    version(Kind::Delete),
                    (None, Some(key), None),
                )
            }
            Change::Truncate { .. } => Ok(()),
        }
    }

    /// The row's current version: its own entry or the truncate of its table, whichever is later.
    ///
    /// # Errors
    /// When the index overflow cannot be read.
    pub fn current(&self, key: &RowKey) -> Result<Option<Entry>, Error> {
        let own = self.index.get(key)?;
        let truncated = self.index.truncate(key.table());
        Ok(match (own, truncated) {
            (Some(own), Some(truncate)) if own.version.stamp < truncate.stamp => Some(of_truncate(truncate)),
            (None, Some(truncate)) => Some(of_truncate(truncate)),
            (own, _) => own,
        })
    }

    /// Is `entry` what a truncate left, rather than a write of the row itself?
    fn is_truncate(&self, key: &RowKey, entry: &Entry) -> bool {
        self.index.truncate(key.table()).is_some_and(|truncate| {
            truncate.stamp == entry.version.stamp && entry.version.kind == Kind::Delete
        })
    }

    /// Does the highest stamp alone say what a row of the table is?
    pub(crate) fn is_by_stamp(&self, table: TableId) -> bool {
        self.ranking(table).is_none() && self.merging(table).is_none()
    }

    /// Takes the findings, or a portion of them where they are many. The slot waits for them until [`Self::found_done`] or
    /// [`Self::give_back`].
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn take_found(&mut self) -> Result<Vec<Found>, Error> {
        self.taken_from = self.found_from();
        let found = self.found.take().map_err(Error::Findings)?;
        self.taken.extend(found.iter().map(|found| found.key.clone()));
        Ok(found)
    }

    /// The findings taken last are recorded.
    pub fn found_done(&mut self) {
        self.taken_from = None;
        self.taken.clear();
    }

    /// Puts findings back, before newer ones.
    pub fn give_back(&mut self, found: Vec<Found>) {
        self.taken_from = None;
        self.taken.clear();
        self.found.put_first(found);
    }

    /// No finding counts as one behind this place: the slot waits there for all of them.
    pub(crate) fn hold_found_at(&mut self, lsn: Lsn) {
        self.found.hold_at(lsn);
    }

    /// Does a finding wait here?
    #[must_use]
    pub fn has_found(&self) -> bool {
        !self.found.is_empty()
    }

    /// Findings that wait and are in memory, without those that were taken.
    pub(crate) fn found_since(&self) -> impl Iterator<Item = &Found> {
        self.found.iter()
    }

    /// The first WAL place of a finding that is not recorded.
    #[must_use]
    pub fn found_from(&self) -> Option<Lsn> {
        let held = [self.found.first(), self.deferred().first(), self.taken_from];
        held.into_iter().flatten().min()
    }

    /// May the row be other than the index says for a while, or for good: has a local write met a remote one that did
    /// not know of it, or does a policy put former versions back?
    pub(crate) fn is_raced_for(&self, key: &RowKey) -> bool {
        let table = key.table();
        self.racing.contains_key(key) || self.ranking(table).is_some() || self.merging(table).is_some()
    }

    /// Is nothing known of the row but what came in with its current version?
    pub(crate) fn is_alone(&self, key: &RowKey) -> bool {
        let is_local = |version: &Version| version.origin() == self.node;
        !self.racing.contains_key(key) && !self.is_contested(key) && !self.versions(key).iter().any(is_local)
    }

    /// Must nothing be forgotten now? A repair asks the index who won, and reads the row that it writes back from the journal; and what
    /// has overtaken a row in quarantine is known by them alone until that row is let go of.
    #[must_use]
    pub fn needs_all(&self) -> bool {
        self.found_from().is_some() || self.is_release_due()
    }

    /// Forgets what is stable, unless all is needed: see [`RowIndex::forget_stable`]. `seen` is what came back as echoes.
    ///
    /// # Errors
    /// When the index overflow cannot be used.
    pub fn forget_stable(
        &mut self,
        stable: &Vector,
        seen: &Vector,
        horizon: Option<u32>,
    ) -> Result<(), Error> {
        self.racing.retain(|_, remote| !remote.covered_by(seen));
        if self.needs_all() {
            return Ok(());
        }
        self.forget_contested(stable);
        self.forget_claims(stable);
        self.forget_merged(stable);
        Ok(self.index.forget_stable(stable, horizon)?)
    }

    /// What the index holds.
    #[must_use]
    pub fn stats(&self) -> index::Stats {
        self.index.stats()
    }
}

/// May rows on disk be of more interest to a truncate than that they are gone with it: do any come after it, or has it not seen them?
fn has_unseen(truncate: Stamp, seen: &Vector) -> impl Fn(&Summary) -> bool {
    move |summary| summary.newest >= truncate || !seen.includes(&summary.upto)
}

fn of_truncate(truncate: TableVersion) -> Entry {
    Entry::of_truncate(truncate)
}
