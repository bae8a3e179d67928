//! Local commits, met in WAL order: a remote write that was decided without knowing of one is a finding.
//!
//! In:   decoded changes (capture), what is applied before them      Out: the index, findings
//! On crash: decoded again
//! Not here: rows under a policy over the frontier ([`super::ranked`])

use std::collections::HashMap;
use std::sync::Arc;

use anabranch_conflict::{Kind, TableVersion, Verdict, Version};
use anabranch_proto::schema::TableDesc;
use anabranch_proto::txn::Change;
use anabranch_proto::{Stamp, Vector};

use super::{Error, Found, Images, LocalTxn, Resolver, has_unseen, of_truncate};
use crate::broken::admit;
use crate::index::{Entry, RowKey};

impl Resolver {
    /// Meets a change of a local transaction; `seen` is what is applied before its place in the WAL.
    ///
    /// # Errors
    /// When the change has no readable key or the index cannot be used.
    pub fn local(&mut self, change: &Change, txn: &LocalTxn, seen: &Vector) -> Result<(), Error> {
        let version = (txn.stamp, txn.position);
        self.each_version(change, version, |resolver, table, key, local, images| {
            resolver.local_row(table, key, local, images, txn, seen)
        })?;
        self.local_truncates(change, txn, seen)
    }

    /// Meets a change of a local transaction that was decoded before the slot was lost. What waits in quarantine of a row whose policy
    /// is over the frontier may have won over it, whatever its stamp: it is left.
    pub(super) fn local_again(
        &mut self,
        change: &Change,
        txn: &LocalTxn,
        seen: &Vector,
    ) -> Result<(), Error> {
        let version = (txn.stamp, txn.position);
        self.each_version(change, version, |resolver, table, key, local, images| {
            resolver.meet_loaded(table, &key, local, seen);
            if resolver.is_by_stamp(key.table()) {
                resolver.local_row(table, key, local, images, txn, seen)
            } else {
                resolver.meet_local(table, key, local, images, txn, seen)
            }
        })?;
        self.local_truncates(change, txn, seen)
    }

    fn local_truncates(&mut self, change: &Change, txn: &LocalTxn, seen: &Vector) -> Result<(), Error> {
        if let Change::Truncate { tables, .. } = change {
            self.claim_open_truncated(tables);
            for table in tables {
                self.local_truncate(table, txn, seen)?;
            }
        }
        Ok(())
    }

    fn local_row(
        &mut self,
        table: &Arc<TableDesc>,
        key: RowKey,
        local: Version,
        images: Images<'_>,
        txn: &LocalTxn,
        seen: &Vector,
    ) -> Result<(), Error> {
        self.watches.meet(&key);
        // Not by an earlier one: what waits may have seen that, which is decoded again after a restart, or may have won over it.
        let waits = self.waiting.rows.get(&key);
        if waits.is_some_and(|waits| waits.stamp < local.stamp) {
            self.overtake(table, &key);
        }
        self.meet_local(table, key, local, images, txn, seen)
    }

    fn meet_local(
        &mut self,
        table: &Arc<TableDesc>,
        key: RowKey,
        local: Version,
        images: Images<'_>,
        txn: &LocalTxn,
        seen: &Vector,
    ) -> Result<(), Error> {
        if let Some(policy) = self.ranking(key.table()) {
            return self.local_ranked(&policy, (table, key), local, images, txn, seen);
        }
        if self.merging(key.table()).is_some() {
            return self.local_merged(table, key, local, images, txn, seen);
        }
        let current = self.current(&key)?;
        self.claim_open((table, &key), local, images.0)?;
        let entry = Entry::new(local, txn.xid);
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
                self.push_found(found);
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
        self.push_found(found);
        Ok(())
    }

    #[allow(clippy::too_many_arguments)]
    pub(super) fn finding(
        &self,
        table: &Arc<TableDesc>,
        key: RowKey,
        local: Version,
        images: Images<'_>,
        txn: &LocalTxn,
        remote: Version,
        local_won: bool,
    ) -> Found {
        Found {
            lsn: txn.lsn(),
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
            rival: None,
        }
    }

    fn local_truncate(&mut self, table: &Arc<TableDesc>, txn: &LocalTxn, seen: &Vector) -> Result<(), Error> {
        let id = self.table_id(table);
        self.watches.meet_table(id);
        for key in self.quarantined_below(id, txn.stamp) {
            self.overtake(table, &key);
        }
        if let Some(policy) = self.ranking(id) {
            return self.local_truncate_ranked(&policy, table, id, txn, seen);
        }
        if self.merging(id).is_some() {
            return self.local_truncate_merged(table, id, txn, seen);
        }
        let truncate = TableVersion {
            stamp: txn.stamp,
            position: txn.position,
        };
        let known = self.with_own(seen);
        let rows = self
            .index
            .entries_where(id, has_unseen(truncate.stamp, &known), |entry| {
                let version = &entry.version;
                let concurrent = !version.covered_by(&known);
                let may_be_back = version.stamp < truncate.stamp && version.kind == Kind::Put;
                version.stamp == truncate.stamp
                    || concurrent && (may_be_back || version.stamp > truncate.stamp)
            })?;
        let mut told: HashMap<RowKey, Stamp> = HashMap::new();
        let mut survivors = Vec::new();
        for (key, entry) in rows {
            if entry.version.stamp > truncate.stamp {
                survivors.push((key, entry.version));
                continue;
            }
            if entry.version.stamp == truncate.stamp {
                // Earlier writes of the same transaction are gone with the truncate, too.
                self.index.put(key, of_truncate(truncate))?;
                continue;
            }
            told.insert(key.clone(), entry.version.stamp);
            self.push_found(Found {
                log: true,
                ..gone_with(table, key, truncate, txn, entry.version)
            });
        }
        self.index.put_truncate(id, truncate);
        // What these lost to an earlier local write has its line; but the truncate may have come before they were written, and the
        // rows must not be there.
        let racing = self.racing.iter();
        let racing = racing.filter(|(key, remote)| {
            key.table() == id && !remote.covered_by(seen) && told.get(*key) != Some(&remote.stamp)
        });
        let racing: Vec<(RowKey, Version)> = racing.map(|(key, remote)| (key.clone(), *remote)).collect();
        for (key, remote) in racing {
            if self.current(&key)?.is_some_and(|current| !current.is_there()) {
                self.push_found(gone_with(table, key, truncate, txn, remote));
            }
        }
        // If these are still to be written they find no row, as after a local delete.
        self.racing.extend(survivors);
        Ok(())
    }
}

/// A remote write whose row a local truncate has removed, whatever it was decided upon: to be repaired and not logged.
fn gone_with(
    table: &Arc<TableDesc>,
    key: RowKey,
    truncate: TableVersion,
    txn: &LocalTxn,
    remote: Version,
) -> Found {
    Found {
        local_txn: Some(*txn),
        local_won: true,
        ..Found::of_versions(txn.lsn(), table, key, of_truncate(truncate).version, remote)
    }
}

/// May the row be there although a delete won? The remote write was decided without knowing of the local one.
/// Its guard stopped it wherever there was a row to guard: so only where it met none, or expected none.
pub(super) const fn may_be_unwritten(local_won: bool, local: Kind, remote: Kind) -> bool {
    if local_won {
        matches!(local, Kind::Delete)
    } else {
        matches!(remote, Kind::Delete)
    }
}
