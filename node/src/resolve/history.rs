//! The start: what was decoded or applied in an earlier life, or at the node that this one is a copy of.
//!
//! In:   the journal's transactions      Out: the index; findings that were perhaps not worked off
//! Invariants: rows that are settled ([`Resolver::settle`]) are never put right: the journal may lack what they show
//! Not here: reading the journal (capture)

use std::sync::Arc;

use anabranch_conflict::{Kind, TableVersion, Verdict};
use anabranch_proto::schema::TableDesc;
use anabranch_proto::txn::Change;
use anabranch_proto::{Lsn, Position, Stamp, Vector};

use super::local::may_be_unwritten;
use super::{Error, Found, LocalTxn, Resolver, of_truncate};
use crate::broken::admit;
use crate::index::Entry;

impl Resolver {
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
        self.each_version(
            change,
            (stamp, position),
            |resolver, table, key, version, images| {
                resolver.meet_loaded(table, &key, version, deps);
                if let Some(policy) = resolver.ranking(key.table()) {
                    resolver.rebuilt_last.insert(key.table(), stamp);
                    return resolver.history_ranked(&policy, (table, key), version, deps, None);
                }
                if resolver.merging(key.table()).is_some() {
                    return resolver.history_merged((table, key), version, deps, images, None);
                }
                resolver.claim_open((table, &key), version, images.0)?;
                resolver.rebuilt_last.insert(key.table(), stamp);
                match resolver.current(&key)? {
                    Some(current) if current.version.stamp > stamp => Ok(()),
                    _ => Ok(resolver.index.put(key, Entry::new(version, 0))?),
                }
            },
        )?;
        if let Change::Truncate { tables, .. } = change {
            self.claim_open_truncated(tables);
            for table in tables {
                let id = self.table_id(table);
                let truncate = TableVersion { stamp, position };
                // What its own transaction wrote before it is not below it, and gone all the same. Of versions that are kept beside
                // the entries nothing says that they are below it, once it is forgotten.
                let has_written = self.rebuilt_last.get(&id) == Some(&stamp);
                let has_more = self.merging(id).is_some() || self.ranking(id).is_some();
                if has_more || has_written {
                    self.remote_truncate(id, truncate, deps)?;
                }
                self.index.put_truncate(id, truncate);
            }
        }
        Ok(())
    }

    /// Notes of a change met by [`Self::rebuild`] that its transaction is the own one `xid`, which is not visible yet: who wins over
    /// one of its rows must not take that for one that is gone.
    ///
    /// # Errors
    /// When the change has no readable key or the index cannot be used.
    pub fn rebuilt_by(&mut self, change: &Change, version: (Stamp, Position), xid: u32) -> Result<(), Error> {
        self.each_version(change, version, |resolver, _, key, _, _| {
            resolver.set_xid(&key, version.0, xid)
        })
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
        self.each_version(
            change,
            (stamp, position),
            |resolver, table, key, version, images| {
                resolver.meet_loaded(table, &key, version, deps);
                if let Some(policy) = resolver.ranking(key.table()) {
                    return resolver.history_ranked(&policy, (table, key), version, deps, Some(lsn));
                }
                if resolver.merging(key.table()).is_some() {
                    return resolver.history_merged((table, key), version, deps, images, Some(lsn));
                }
                resolver.claim_open((table, &key), version, images.0)?;
                let current = resolver.current(&key)?;
                let verdict = admit(current.as_ref().map(|entry| &entry.version), &version, deps);
                if !matches!(verdict, Verdict::Loses) {
                    resolver.index.put(key.clone(), Entry::new(version, 0))?;
                }
                let (Verdict::WinsOver | Verdict::Loses, Some(current)) = (verdict, current) else {
                    return Ok(());
                };
                if current.version.origin() != node {
                    return Ok(());
                }
                let local_won = matches!(verdict, Verdict::Loses);
                // An own truncate was decoded without this one, which may have been decided before and written behind it.
                let may_be_back = local_won && version.kind == Kind::Put;
                if resolver.is_truncate(&key, &current) && !may_be_back {
                    return Ok(());
                }
                resolver.push_found(Found {
                    local_won,
                    repair: may_be_unwritten(local_won, current.version.kind, version.kind),
                    log: true,
                    ..Found::of_versions(lsn, table, key, current.version, version)
                });
                Ok(())
            },
        )?;
        if let Change::Truncate { tables, .. } = change {
            self.claim_open_truncated(tables);
            for table in tables {
                let id = self.table_id(table);
                let truncate = TableVersion { stamp, position };
                let said = self.remote_truncate(id, truncate, deps)?;
                // An own write decoded between two tries of it is the decoder's finding alone, which may not be recorded.
                let is_own = |entry: &Entry| entry.version.origin() == node;
                for (key, entry) in said.lost.into_iter().filter(|(_, entry)| is_own(entry)) {
                    let winner = of_truncate(truncate).version;
                    self.push_found(Found {
                        repair: false,
                        log: true,
                        ..Found::of_versions(lsn, table, key, entry.version, winner)
                    });
                }
            }
        }
        Ok(())
    }

    /// Meets what was decoded or applied before the slot was lost, `own` or another's, in the order of the stamps: which respects
    /// what covers what, and is as good as the order of the WAL, which is gone, since only what neither covers of the other
    /// is a conflict. Whether such a conflict was logged then is not known: it is found again, and has the same id if it
    /// was. What rows of tables whose policy is over the frontier show is looked at by [`Self::distrust`], too.
    ///
    /// # Errors
    /// When the change has no readable key or the index cannot be used.
    pub fn relive(&mut self, change: &Change, txn: &LocalTxn, deps: &Vector, lsn: Lsn) -> Result<(), Error> {
        if txn.stamp.node == self.node {
            self.local_again(change, txn, deps)
        } else {
            self.replay(change, (txn.stamp, txn.position), deps, lsn)
        }
    }

    /// The rows are another node's copy, cut while that node may have had repairs to do: those that should be absent
    /// are looked at again, and all where the policy is over the frontier. The slot waits at `lsn` until that is done.
    /// Of a row that yields a unique value that node may have logged nothing before the cut: it has a line, with the id of that
    /// node's. With `all`, every row is, whatever its policy.
    ///
    /// # Errors
    /// When the index cannot be read.
    pub fn distrust(&mut self, tables: &[Arc<TableDesc>], lsn: Lsn, all: bool) -> Result<(), Error> {
        let mut yielded = self.rebuilt_yields(lsn);
        for table in tables {
            let id = self.table_id(table);
            let settle = all && !table.is_own() || self.ranking(id).is_some() || self.merging(id).is_some();
            // Of millions of rows that a joiner has copied each look by its key takes microseconds, and all their keys hundreds of MiB.
            let keys = match settle {
                true => self.known_rows(id)?,
                false => self.absent_rows(id)?,
            };
            for key in keys {
                let Some(current) = self.current(&key)? else {
                    continue;
                };
                let version = current.version;
                if self.is_settled(&key, version) || !settle && current.is_there() {
                    continue;
                }
                self.found.push(match yielded.remove(&key) {
                    Some((yields, found)) if yields == version => found,
                    _ => Found {
                        // A row that gave up a unique value is not there.
                        settle: settle && !current.parked,
                        ..Found::of_versions(lsn, table, key, version, version)
                    },
                });
            }
        }
        Ok(())
    }
}
