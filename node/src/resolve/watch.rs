//! Watched rows: has any write of them been met since?
//!
//! In:   every version that the resolver meets            Out: which watched rows moved
//! Holds: the keys that verifying asks about, while it asks
//! Invariants: a row counts as moved from before the index knows its version, and never becomes quiet again but by being
//!        watched anew
//! Not here: what is made of it (`crate::verify`)

use std::collections::{HashMap, HashSet};

use super::Resolver;
use crate::index::{RowKey, TableId};

/// A set of watched rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct WatchId(u64);

/// What is known of a watched row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Watched {
    /// A write of it was met since it is watched, or a finding about it waits or is being worked off.
    pub moved: bool,
    /// It is in quarantine.
    pub quarantined: bool,
    /// The local transaction that wrote it last, 32 bits, 0 if none is known: its commit may not be visible yet.
    pub local_xid: u32,
}

#[derive(Default)]
pub(super) struct Watches {
    next: u64,
    sets: HashMap<WatchId, HashMap<RowKey, bool>>,
}

impl Watches {
    /// A version of a row is met.
    pub(super) fn meet(&mut self, key: &RowKey) {
        for rows in self.sets.values_mut() {
            if let Some(moved) = rows.get_mut(key) {
                *moved = true;
            }
        }
    }

    /// A version of a whole table is met: a truncate.
    pub(super) fn meet_table(&mut self, table: TableId) {
        for rows in self.sets.values_mut() {
            for (_, moved) in rows.iter_mut().filter(|(key, _)| key.table() == table) {
                *moved = true;
            }
        }
    }
}

impl Resolver {
    /// Watches rows from now on.
    pub fn watch(&mut self, keys: impl IntoIterator<Item = RowKey>) -> WatchId {
        let pending = self.pending();
        let rows = keys.into_iter().map(|key| {
            let moved = pending.contains(&key);
            (key, moved)
        });
        let rows = rows.collect();
        self.watches.next += 1;
        let id = WatchId(self.watches.next);
        self.watches.sets.insert(id, rows);
        id
    }

    /// Ends a watch.
    pub fn unwatch(&mut self, id: WatchId) {
        self.watches.sets.remove(&id);
    }

    /// What is known of watched rows; one that is not watched counts as moved.
    ///
    /// # Errors
    /// When the index cannot be read.
    pub fn watched(&self, id: WatchId, keys: &[RowKey]) -> Result<Vec<Watched>, super::Error> {
        let pending = self.pending();
        let rows = self.watches.sets.get(&id);
        keys.iter()
            .map(|key| {
                let moved = rows.and_then(|rows| rows.get(key)).copied().unwrap_or(true);
                let current = self.current(key)?;
                let own = current.filter(|entry| entry.version.origin() == self.node);
                Ok(Watched {
                    moved: moved || pending.contains(key),
                    quarantined: self.quarantined.contains(key),
                    local_xid: own.map_or(0, |entry| entry.xid),
                })
            })
            .collect()
    }

    /// A row changes here although none of its own writes is met, such as one that loses a unique value.
    pub(crate) fn touch(&mut self, key: &RowKey) {
        self.watches.meet(key);
    }

    /// Rows that may not be yet what the index says.
    fn pending(&self) -> HashSet<RowKey> {
        let waiting = self.found.iter().map(|found| found.key.clone());
        waiting.chain(self.taken.iter().cloned()).collect()
    }
}
