//! Remote writes, met in causal order.
//!
//! In:   what the applier is about to write      Out: decisions; the index, as it is once they are written
//! On crash: met again, or found in the journal ([`super::history`])
//! Not here: rows under a policy over the frontier ([`super::ranked`])

use std::cmp::Ordering;
use std::collections::HashSet;
use std::sync::Arc;

use anabranch_conflict::{Kind, TableVersion, Verdict, Version};
use anabranch_proto::schema::TableDesc;
use anabranch_proto::{Stamp, Vector};

use super::{Decision, Error, Expect, Images, Resolver, Truncated, has_unseen, of_truncate};
use crate::broken::admit;
use crate::index::{Entry, RowKey, Summary, TableId};

impl Resolver {
    /// Meets a remote version of a row, to be written by the apply transaction `xid`.
    ///
    /// # Errors
    /// When the index cannot be used.
    pub fn remote(
        &mut self,
        (table, key): (&Arc<TableDesc>, &RowKey),
        version: Version,
        deps: &Vector,
        images: Images<'_>,
        xid: u32,
    ) -> Result<Decision, Error> {
        if let Some(row) = images.0 {
            self.meet_change(table, row, version.origin(), version.position)?;
        }
        self.watches.meet(key);
        if let Some(policy) = self.ranking(key.table()) {
            return self.remote_ranked(&policy, key, version, deps, xid);
        }
        if self.merging(key.table()).is_some() {
            return self.remote_merged((table, key), version, deps, images, xid);
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
        // Written a second time, it still yields.
        let parked = current.is_some_and(|entry| entry.parked && entry.version == version);
        // What another write of this transaction came over, this one comes over.
        let same_txn = current.filter(|entry| entry.version.stamp == version.stamp);
        let over = same_txn.map_or(current.is_some(), |entry| entry.over);
        let unsure = same_txn.is_some_and(|entry| entry.over && entry.xid != xid);
        let entry = Entry {
            version,
            xid,
            parked,
            over,
        };
        self.index.put(key.clone(), entry)?;
        // An earlier try of this transaction says nothing about the row: it was rolled back.
        let standing = current.filter(|entry| entry.version.stamp != version.stamp || entry.xid == xid);
        Ok(Decision::Apply {
            expect: Expect {
                // A row that yielded goes when what it yielded to is written, or by a repair.
                present: standing
                    .filter(|entry| !entry.parked)
                    .map(|entry| entry.is_there()),
                xid: current.map_or(0, |entry| entry.xid),
            },
            beaten,
            unsure,
        })
    }

    /// Meets a remote truncate, its table locked and everything before the lock decoded. Returns the rows of
    /// the table that survive it, and those that were concurrent, older and are lost. What its own transaction has written
    /// so far is gone with it: so what that writes afterwards must be met afterwards, and the truncate not again, unless
    /// that is met again, too ([`Self::remote_truncate_again`]).
    ///
    /// # Errors
    /// When the index cannot be used.
    pub fn remote_truncate(
        &mut self,
        table: TableId,
        truncate: TableVersion,
        deps: &Vector,
    ) -> Result<Truncated, Error> {
        self.watches.meet_table(table);
        if let Some(policy) = self.ranking(table) {
            return self.remote_truncate_ranked(&policy, table, truncate, deps);
        }
        if self.merging(table).is_some() {
            return self.remote_truncate_merged(table, truncate, deps);
        }
        let (mut survivors, mut lost) = (Vec::new(), Vec::new());
        let rows = self
            .index
            .entries_where(table, has_unseen(truncate.stamp, deps), |entry| {
                let version = &entry.version;
                version.stamp >= truncate.stamp || version.kind == Kind::Put && !version.covered_by(deps)
            })?;
        for (key, entry) in rows {
            match entry.version.stamp.cmp(&truncate.stamp) {
                Ordering::Greater if entry.is_there() => survivors.push(key),
                Ordering::Greater => {}
                // An earlier write of the same transaction is gone with the truncate, too.
                Ordering::Equal => self.index.put(key, of_truncate(truncate))?,
                Ordering::Less => lost.push((key, entry)),
            }
        }
        self.index.put_truncate(table, truncate);
        Ok(Truncated {
            survivors,
            lost,
            ..Truncated::default()
        })
    }

    /// The truncate is done once more, in another try of an apply transaction of which all is resolved, also what comes behind
    /// the truncate: `own` are the stamps in it. Returns the rows that others have written since, as far as they survive; what is
    /// below it has met it in the index.
    ///
    /// # Errors
    /// When the index cannot be read.
    pub(crate) fn remote_truncate_again(
        &mut self,
        table: TableId,
        truncate: TableVersion,
        own: &HashSet<Stamp>,
    ) -> Result<Vec<RowKey>, Error> {
        self.watches.meet_table(table);
        let is_later = |summary: &Summary| summary.newest > truncate.stamp;
        let rows = self.index.entries_where(table, is_later, |entry| {
            let stamp = entry.version.stamp;
            entry.is_there() && stamp > truncate.stamp && !own.contains(&stamp)
        })?;
        Ok(rows.into_iter().map(|(key, _)| key).collect())
    }

    /// Is the version of `stamp` still the row's winner, and is the row to be there, or to be absent, as `put` says?
    ///
    /// # Errors
    /// When the index cannot be read.
    pub fn is_winner(&self, key: &RowKey, stamp: Stamp, put: bool) -> Result<bool, Error> {
        Ok(match self.current(key)? {
            // Stable and forgotten in the meantime: nothing later came, or it would have an entry.
            None => true,
            Some(current) => current.version.stamp == stamp && !(put && current.parked),
        })
    }

    /// Notes that the transaction `xid` writes the row's winner `stamp`, when it still is that.
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
}

#[cfg(test)]
mod tests;
