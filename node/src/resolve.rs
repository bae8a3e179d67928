//! Resolve: what a change means for its row, decided against the row index.
//!
//! In:   decoded local changes in WAL order (capture), remote changes in causal order (apply)
//! Out:  decisions to apply; findings, when a local commit is decoded that a remote write did not know
//! Holds: the row index, numbers of tables, findings not yet worked off, quarantined keys; for policies over the
//!        frontier see [`ranked`]
//! Invariants: 1. the index entry of a row is the winner among all versions of it met so far; 2. a finding
//!        stays here until the applier has recorded it, and the slot does not move past it before
//! On crash: rebuilt from the journal and by decoding again; findings come back with the same conflict ids
//! Not here: SQL (apply), who wins (`anabranch-conflict`), when a change may be resolved (order)

mod ranked;

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;

use anabranch_conflict::policy::Policies;
use anabranch_conflict::{Kind, TableVersion, Verdict, Version};
use anabranch_proto::row::RowImage;
use anabranch_proto::schema::TableDesc;
use anabranch_proto::txn::Change;
use anabranch_proto::wire::Malformed;
use anabranch_proto::{Lsn, NodeId, Position, Stamp, Vector};

use crate::broken::admit;
use crate::index::{self, Entry, RowIndex, RowKey, TableId, TableIds};
use ranked::Ranked;

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
    },
    /// Leave the row: `winner` is concurrent and preferred. Log the incoming version.
    Keep {
        /// The version that stays.
        winner: Entry,
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
}

/// The resolver of one node. One lock around it serves capture and apply.
pub struct Resolver {
    node: NodeId,
    ids: TableIds,
    index: RowIndex,
    found: VecDeque<Found>,
    taken_from: Option<Lsn>,
    /// Rows that a remote write was decided for without knowing of a local one, with that write, until it comes
    /// back as an echo: further local writes of the row may have met it, too.
    racing: HashMap<RowKey, Version>,
    quarantined: HashSet<RowKey>,
    unquarantine: Vec<(Arc<TableDesc>, RowKey)>,
    scratch: Vec<u8>,
    ranked: Ranked,
}

impl Resolver {
    /// A resolver of `node` over an empty index.
    #[must_use]
    pub fn new(node: NodeId, index: RowIndex, policies: Policies) -> Self {
        Self {
            node,
            ids: TableIds::default(),
            index,
            found: VecDeque::new(),
            taken_from: None,
            racing: HashMap::new(),
            quarantined: HashSet::new(),
            unquarantine: Vec::new(),
            scratch: Vec::new(),
            ranked: Ranked::new(policies),
        }
    }

    /// The number of a table.
    pub fn table_id(&mut self, table: &TableDesc) -> TableId {
        let id = self.ids.id(table);
        self.ranked.learn(id, table);
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

    // ----- local commits, in WAL order -----

    /// Meets a change of a local transaction; `seen` is what is applied before its place in the WAL.
    ///
    /// # Errors
    /// When the change has no readable key or the index cannot be used.
    pub fn local(&mut self, change: &Change, txn: &LocalTxn, seen: &Vector) -> Result<(), Error> {
        match change {
            Change::Put {
                table, row, old_key, ..
            } => {
                if let Some(old_key) = old_key {
                    let key = self.key_of_image(table, old_key)?;
                    self.local_row(table, key, Kind::Delete, (None, Some(old_key)), txn, seen)?;
                }
                let key = self.key_of_row(table, row)?;
                self.local_row(table, key, Kind::Put, (Some(row), None), txn, seen)
            }
            Change::Delete { table, key } => {
                let row_key = self.key_of_image(table, key)?;
                self.local_row(table, row_key, Kind::Delete, (None, Some(key)), txn, seen)
            }
            Change::Truncate { tables, .. } => {
                for table in tables {
                    self.local_truncate(table, txn, seen)?;
                }
                Ok(())
            }
        }
    }

    fn local_row(
        &mut self,
        table: &Arc<TableDesc>,
        key: RowKey,
        kind: Kind,
        images: (Option<&RowImage>, Option<&RowImage>),
        txn: &LocalTxn,
        seen: &Vector,
    ) -> Result<(), Error> {
        if !self.quarantined.is_empty() && self.quarantined.remove(&key) {
            self.unquarantine.push((Arc::clone(table), key.clone()));
        }
        let local = Version {
            stamp: txn.stamp,
            position: txn.position,
            kind,
        };
        if let Some(policy) = self.ranking(key.table()) {
            return self.local_ranked(&policy, (table, key), local, images, txn, seen);
        }
        let current = self.current(&key)?;
        let entry = Entry {
            version: local,
            xid: txn.xid,
        };
        let Some(current) = current else {
            return Ok(self.index.put(key, entry)?);
        };
        if current.version.origin() == self.node {
            // Own writes never conflict. Decoded again after a restart, an older one changes nothing.
            if current.version.stamp <= local.stamp {
                self.index.put(key.clone(), entry)?;
            }
            if let Some(&remote) = self.racing.get(&key)
                && !remote.covered_by(seen)
            {
                let found = Found {
                    log: false,
                    ..self.finding(table, key, local, images, txn, remote, true)
                };
                self.found.push_back(found);
            }
            return Ok(());
        }
        let verdict = admit(Some(&current.version), &local, seen);
        let truncated = self.is_truncate(&key, &current);
        if matches!(verdict, Verdict::Wins | Verdict::WinsOver) {
            self.index.put(key.clone(), entry)?;
        }
        let local_won = match verdict {
            Verdict::Wins | Verdict::Known => return Ok(()),
            Verdict::WinsOver if truncated => return Ok(()),
            Verdict::WinsOver => true,
            Verdict::Loses => false,
        };
        self.racing.insert(key.clone(), current.version);
        let found = self.finding(table, key, local, images, txn, current.version, local_won);
        self.found.push_back(found);
        Ok(())
    }

    #[allow(clippy::too_many_arguments)]
    fn finding(
        &self,
        table: &Arc<TableDesc>,
        key: RowKey,
        local: Version,
        images: (Option<&RowImage>, Option<&RowImage>),
        txn: &LocalTxn,
        remote: Version,
        local_won: bool,
    ) -> Found {
        Found {
            lsn: Lsn(txn.position.lsn.0.saturating_sub(1)),
            table: Arc::clone(table),
            key,
            local,
            local_row: images.0.cloned(),
            key_image: images.1.cloned(),
            local_txn: Some(*txn),
            remote,
            local_won,
            repair: may_be_unwritten(local_won, local.kind, remote.kind),
            settle: false,
            log: true,
        }
    }

    fn local_truncate(&mut self, table: &Arc<TableDesc>, txn: &LocalTxn, seen: &Vector) -> Result<(), Error> {
        let id = self.table_id(table);
        if let Some(policy) = self.ranking(id) {
            return self.local_truncate_ranked(&policy, table, id, txn, seen);
        }
        let truncate = TableVersion {
            stamp: txn.stamp,
            position: txn.position,
        };
        for (key, entry) in self.index.entries_of(id)? {
            let concurrent = entry.version.origin() != self.node && !entry.version.covered_by(seen);
            if concurrent && entry.version.stamp < truncate.stamp && entry.version.kind == Kind::Put {
                self.found.push_back(Found {
                    lsn: Lsn(txn.position.lsn.0.saturating_sub(1)),
                    table: Arc::clone(table),
                    key: key.clone(),
                    local: Version {
                        stamp: txn.stamp,
                        position: txn.position,
                        kind: Kind::Delete,
                    },
                    local_row: None,
                    key_image: None,
                    local_txn: Some(*txn),
                    remote: entry.version,
                    local_won: true,
                    repair: true,
                    settle: false,
                    log: true,
                });
            }
            // Earlier writes of the same transaction are gone with the truncate, too.
            if entry.version.stamp <= truncate.stamp {
                self.index.put(key, of_truncate(truncate))?;
            }
        }
        self.index.put_truncate(id, truncate);
        Ok(())
    }

    // ----- remote writes, in causal order -----

    /// This node.
    pub(crate) const fn node(&self) -> NodeId {
        self.node
    }

    /// Meets a remote version of a row, to be written by the apply transaction `xid`.
    ///
    /// # Errors
    /// When the index cannot be used.
    pub fn remote(
        &mut self,
        key: &RowKey,
        version: Version,
        deps: &Vector,
        xid: u32,
    ) -> Result<Decision, Error> {
        if let Some(policy) = self.ranking(key.table()) {
            return self.remote_ranked(&policy, key, version, deps, xid);
        }
        let current = self.current(key)?;
        let verdict = admit(current.as_ref().map(|entry| &entry.version), &version, deps);
        if let (Verdict::Loses, Some(winner)) = (verdict, current) {
            return Ok(Decision::Keep { winner });
        }
        // `Known` is a later write of the row by the same transaction.
        let beaten = match (verdict, current) {
            (Verdict::WinsOver, Some(loser)) if !self.is_truncate(key, &loser) => Some(loser),
            _ => None,
        };
        self.index.put(key.clone(), Entry { version, xid })?;
        Ok(Decision::Apply {
            expect: Expect {
                present: current.map(|entry| entry.version.kind == Kind::Put),
                xid: current.map_or(0, |entry| entry.xid),
            },
            beaten,
        })
    }

    /// Meets a remote truncate, its table locked and everything before the lock decoded. Returns the rows of
    /// the table that survive it, and those that were concurrent, older and are lost.
    ///
    /// # Errors
    /// When the index cannot be used.
    pub fn remote_truncate(
        &mut self,
        table: TableId,
        truncate: TableVersion,
        deps: &Vector,
    ) -> Result<Truncated, Error> {
        if let Some(policy) = self.ranking(table) {
            return self.remote_truncate_ranked(&policy, table, truncate, deps);
        }
        let (mut survivors, mut lost) = (Vec::new(), Vec::new());
        let overruled = self
            .index
            .truncate(table)
            .is_some_and(|known| known.stamp > truncate.stamp);
        for (key, entry) in self.index.entries_of(table)? {
            if entry.version.stamp > truncate.stamp {
                if entry.version.kind == Kind::Put {
                    survivors.push(key);
                }
                continue;
            }
            let same_txn = entry.version.stamp == truncate.stamp;
            if !same_txn && entry.version.kind == Kind::Put && !entry.version.covered_by(deps) {
                lost.push((key.clone(), entry));
            }
            self.index.put(key, of_truncate(truncate))?;
        }
        if !overruled {
            self.index.put_truncate(table, truncate);
        }
        Ok(Truncated {
            survivors,
            lost,
            restored: Vec::new(),
        })
    }

    /// Is the version of `stamp` still the row's winner?
    ///
    /// # Errors
    /// When the index cannot be read.
    pub fn is_winner(&self, key: &RowKey, stamp: Stamp) -> Result<bool, Error> {
        Ok(match self.current(key)? {
            // Stable and forgotten in the meantime: nothing later came, or it would have an entry.
            None => true,
            Some(current) => current.version.stamp == stamp,
        })
    }

    /// Notes that the apply transaction `xid` writes the row's winner `stamp`, when it still is that.
    ///
    /// # Errors
    /// When the index cannot be used.
    pub fn set_xid(&mut self, key: &RowKey, stamp: Stamp, xid: u32) -> Result<(), Error> {
        if let Some(entry) = self.index.get(key)?
            && entry.version.stamp == stamp
            && entry.xid != xid
        {
            self.index.put(key.clone(), Entry { xid, ..entry })?;
        }
        Ok(())
    }

    // ----- start-up: history that is applied already -----

    /// Meets a version that was applied or decoded before the daemon stopped, below the place where decoding
    /// starts again. To be called in an order that respects what covers what; all of it was logged then.
    ///
    /// # Errors
    /// When the change has no readable key or the index cannot be used.
    pub fn rebuild(
        &mut self,
        change: &Change,
        (stamp, position): (Stamp, Position),
        deps: &Vector,
    ) -> Result<(), Error> {
        self.each_version(change, |resolver, table, key, kind| {
            let version = Version {
                stamp,
                position,
                kind,
            };
            if let Some(policy) = resolver.ranking(key.table()) {
                return resolver.history_ranked(&policy, (table, key), version, deps, None);
            }
            match resolver.current(&key)? {
                Some(current) if current.version.stamp > stamp => Ok(()),
                _ => Ok(resolver.index.put(key, Entry { version, xid: 0 })?),
            }
        })?;
        if let Change::Truncate { tables, .. } = change {
            for table in tables {
                let id = self.table_id(table);
                self.index.put_truncate(id, TableVersion { stamp, position });
            }
        }
        Ok(())
    }

    /// Meets, at its echo, a remote change that was applied before the daemon stopped, above the place where
    /// decoding started again. What was concurrent with a local write may not be in the log yet: it is found
    /// again, and has the same id if it is.
    ///
    /// # Errors
    /// When the change has no readable key or the index cannot be used.
    pub fn replay(
        &mut self,
        change: &Change,
        (stamp, position): (Stamp, Position),
        deps: &Vector,
        lsn: Lsn,
    ) -> Result<(), Error> {
        let node = self.node;
        self.each_version(change, |resolver, table, key, kind| {
            let version = Version {
                stamp,
                position,
                kind,
            };
            if let Some(policy) = resolver.ranking(key.table()) {
                return resolver.history_ranked(&policy, (table, key), version, deps, Some(lsn));
            }
            let current = resolver.current(&key)?;
            let verdict = admit(current.as_ref().map(|entry| &entry.version), &version, deps);
            if !matches!(verdict, Verdict::Loses) {
                resolver.index.put(key.clone(), Entry { version, xid: 0 })?;
            }
            let (Verdict::WinsOver | Verdict::Loses, Some(current)) = (verdict, current) else {
                return Ok(());
            };
            if current.version.origin() != node || resolver.is_truncate(&key, &current) {
                return Ok(());
            }
            let local_won = matches!(verdict, Verdict::Loses);
            resolver.found.push_back(Found {
                lsn,
                table: Arc::clone(table),
                key,
                local: current.version,
                local_row: None,
                key_image: None,
                local_txn: None,
                remote: version,
                local_won,
                repair: may_be_unwritten(local_won, current.version.kind, kind),
                settle: false,
                log: true,
            });
            Ok(())
        })?;
        if let Change::Truncate { tables, .. } = change {
            for table in tables {
                let id = self.table_id(table);
                self.remote_truncate(id, TableVersion { stamp, position }, deps)?;
            }
        }
        Ok(())
    }

    fn each_version(
        &mut self,
        change: &Change,
        mut each: impl FnMut(&mut Self, &Arc<TableDesc>, RowKey, Kind) -> Result<(), Error>,
    ) -> Result<(), Error> {
        match change {
            Change::Put {
                table, row, old_key, ..
            } => {
                if let Some(old_key) = old_key {
                    let key = self.key_of_image(table, old_key)?;
                    each(self, table, key, Kind::Delete)?;
                }
                let key = self.key_of_row(table, row)?;
                each(self, table, key, Kind::Put)
            }
            Change::Delete { table, key } => {
                let key = self.key_of_image(table, key)?;
                each(self, table, key, Kind::Delete)
            }
            Change::Truncate { .. } => Ok(()),
        }
    }

    /// The rows are another node's copy, cut while that node may have had repairs to do: those that a delete has won
    /// are looked at again. The slot waits at `lsn` until that is done.
    ///
    /// # Errors
    /// When the index cannot be read.
    pub fn distrust(&mut self, tables: &[Arc<TableDesc>], lsn: Lsn) -> Result<(), Error> {
        for table in tables {
            let id = self.table_id(table);
            for (key, _) in self.index.entries_of(id)? {
                let Some(current) = self.current(&key)? else {
                    continue;
                };
                if current.version.kind == Kind::Delete {
                    self.found.push_back(Found {
                        lsn,
                        table: Arc::clone(table),
                        key,
                        local: current.version,
                        local_row: None,
                        key_image: None,
                        local_txn: None,
                        remote: current.version,
                        local_won: false,
                        repair: true,
                        settle: false,
                        log: false,
                    });
                }
            }
        }
        Ok(())
    }

    // ----- findings, quarantine, forgetting -----

    /// Takes the findings. The slot waits for them until [`Self::found_done`] or [`Self::give_back`].
    pub fn take_found(&mut self) -> Vec<Found> {
        self.taken_from = self.found_from();
        self.found.drain(..).collect()
    }

    /// The findings taken last are recorded.
    pub const fn found_done(&mut self) {
        self.taken_from = None;
    }

    /// Puts findings back, before newer ones.
    pub fn give_back(&mut self, found: Vec<Found>) {
        self.taken_from = None;
        for item in found.into_iter().rev() {
            self.found.push_front(item);
        }
    }

    /// Does a finding wait here?
    #[must_use]
    pub fn has_found(&self) -> bool {
        !self.found.is_empty()
    }

    /// The first WAL place of a finding that is not recorded.
    #[must_use]
    pub fn found_from(&self) -> Option<Lsn> {
        self.found
            .iter()
            .map(|found| found.lsn)
            .chain(self.taken_from)
            .min()
    }

    /// Keys whose rows are in quarantine.
    pub const fn quarantined(&mut self) -> &mut HashSet<RowKey> {
        &mut self.quarantined
    }

    /// Quarantined keys that local writes have overtaken since the last call.
    pub fn take_unquarantine(&mut self) -> Vec<(Arc<TableDesc>, RowKey)> {
        std::mem::take(&mut self.unquarantine)
    }

    /// Forgets what is stable: see [`RowIndex::forget_stable`]. `seen` is what came back as echoes.
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
        // A repair asks the index who won, so no entry goes while one waits.
        if self.found_from().is_some() {
            return Ok(());
        }
        self.forget_contested(stable);
        Ok(self.index.forget_stable(stable, horizon)?)
    }

    /// What the index holds.
    #[must_use]
    pub fn stats(&self) -> index::Stats {
        self.index.stats()
    }
}

fn of_truncate(truncate: TableVersion) -> Entry {
    Entry {
        version: Version {
            stamp: truncate.stamp,
            position: truncate.position,
            kind: Kind::Delete,
        },
        xid: 0,
    }
}

/// May the row be there although a delete won? The remote write was decided without knowing of the local one.
/// Its guard stopped it wherever there was a row to guard: so only where it met none, or expected none.
const fn may_be_unwritten(local_won: bool, local: Kind, remote: Kind) -> bool {
    if local_won {
        matches!(local, Kind::Delete)
    } else {
        matches!(remote, Kind::Delete)
    }
}
