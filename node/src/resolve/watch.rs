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
            let moved = pending(&key);
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
                    moved: moved || pending(key),
                    quarantined: self.waiting.rows.contains_key(key),
                    local_xid: own.map_or(0, |entry| entry.xid),
                })
            })
            .collect()
    }

    /// A row changes here although none of its own writes is met, such as one that loses a unique value.
    pub(crate) fn touch(&mut self, key: &RowKey) {
        self.watches.meet(key);
    }

    /// Rows that may not be yet what the index says: any, while there are findings that are not in memory.
    fn pending(&self) -> impl Fn(&RowKey) -> bool + use<> {
        let may_be_any = self.found.overflows();
        let waiting = self
            .found
            .iter()
            .chain(self.deferred().iter())
            .map(|found| found.key.clone());
        let rows: HashSet<RowKey> = waiting.chain(self.taken.iter().cloned()).collect();
        move |key: &RowKey| may_be_any || rows.contains(key)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use anabranch_conflict::policy::Policies;
    use anabranch_conflict::{Kind, TableVersion, Version};
    use anabranch_proto::row::{Cell, RowImage};
    use anabranch_proto::schema::{ColumnDesc, TableDesc};
    use anabranch_proto::stamp::NTP64;
    use anabranch_proto::txn::{Change, PutOp};
    use anabranch_proto::{NodeId, Position, Stamp, Vector};

    use super::super::{LocalTxn, Quarantined};
    use super::*;
    use crate::index::{RowIndex, TableId};

    struct Case {
        _dir: tempfile::TempDir,
        resolver: Resolver,
        table: Arc<TableDesc>,
        of_table: TableId,
        keys: Vec<RowKey>,
        id: WatchId,
    }

    const OWN: NodeId = NodeId(1);
    const OTHER: NodeId = NodeId(2);

    fn row(key: u8) -> RowImage {
        RowImage::build([Cell::Binary(&[key])].into_iter())
    }

    /// Rows 1 and 2 are watched.
    fn case() -> Case {
        let dir = tempfile::tempdir().unwrap();
        let index = RowIndex::new(dir.path(), 1 << 20).unwrap();
        let mut resolver = Resolver::new(OWN, index, Policies::default());
        let table = Arc::new(TableDesc {
            schema: "s".to_owned(),
            name: "t".to_owned(),
            columns: vec![ColumnDesc {
                name: "k".to_owned(),
                type_oid: 17,
                type_mod: -1,
                type_name: "pg_catalog.bytea".to_owned(),
            }],
            key: vec![0],
            identity_full: false,
        });
        let keys = [1, 2].map(|key| resolver.key_of_row(&table, &row(key)).unwrap());
        let (of_table, id) = (resolver.table_id(&table), resolver.watch(keys.iter().cloned()));
        Case {
            _dir: dir,
            resolver,
            table,
            of_table,
            keys: keys.to_vec(),
            id,
        }
    }

    fn stamp(time: u64, node: NodeId) -> Stamp {
        Stamp {
            time: NTP64(time),
            node,
        }
    }

    impl Case {
        fn moved(&self) -> Vec<bool> {
            let watched = self.resolver.watched(self.id, &self.keys).unwrap();
            watched.into_iter().map(|row| row.moved).collect()
        }

        fn put_aside(&mut self, key: &RowKey, row: Quarantined) {
            self.resolver.quarantine(&self.table, key, row).unwrap();
        }

        fn local(&mut self, key: u8, time: u64) {
            let change = Change::Put {
                table: Arc::clone(&self.table),
                op: PutOp::Update,
                row: row(key),
                old_key: None,
                former: None,
            };
            let txn = LocalTxn {
                stamp: stamp(time, OWN),
                position: Position::new(1, time),
                xid: 700,
                commit_us: 0,
            };
            self.resolver.local(&change, &txn, &Vector::new()).unwrap();
        }

        fn remote(&mut self, at: usize, time: u64) {
            let version = Version {
                stamp: stamp(time, OTHER),
                position: Position::new(1, time),
                kind: Kind::Put,
            };
            let key = self.keys[at].clone();
            let deps = Vector::new();
            self.resolver
                .remote((&self.table, &key), version, &deps, (None, None, None), 800)
                .unwrap();
        }
    }

    #[test]
    fn local_and_remote_writes_move_their_row_and_no_other() {
        let mut case = case();
        assert_eq!(case.moved(), [false, false]);
        case.local(3, 10);
        assert_eq!(case.moved(), [false, false]);
        case.local(1, 11);
        assert_eq!(case.moved(), [true, false]);
        let watched = case.resolver.watched(case.id, &case.keys).unwrap();
        assert_eq!(watched[0].local_xid, 700);
        case.remote(1, 12);
        assert_eq!(case.moved(), [true, true]);
        // Watched anew it is quiet.
        case.resolver.unwatch(case.id);
        assert_eq!(case.moved(), [true, true], "what is not watched counts as moved");
        case.id = case.resolver.watch(case.keys.iter().cloned());
        assert_eq!(case.moved(), [false, false]);
    }

    #[test]
    fn a_write_that_loses_and_a_finding_that_waits_move_the_row() {
        let mut case = case();
        case.remote(0, 20);
        case.resolver.unwatch(case.id);
        case.id = case.resolver.watch(case.keys.iter().cloned());
        // Concurrent and earlier: it loses, and there is something to be put right.
        case.local(1, 10);
        assert_eq!(case.moved(), [true, false]);
        let again = case.resolver.watch(case.keys.iter().cloned());
        case.id = again;
        assert_eq!(case.moved(), [true, false], "the finding waits");
        let _found = case.resolver.take_found().unwrap();
        assert_eq!(case.moved(), [true, false], "the finding is being worked off");
        case.resolver.found_done();
        case.id = case.resolver.watch(case.keys.iter().cloned());
        assert_eq!(case.moved(), [false, false]);
    }

    #[test]
    fn a_truncate_moves_every_row_of_its_table() {
        let mut case = case();
        let id = case.resolver.table_id(&case.table);
        let truncate = TableVersion {
            stamp: stamp(30, OTHER),
            position: Position::new(1, 30),
        };
        case.resolver
            .remote_truncate(id, truncate, &Vector::new())
            .unwrap();
        assert_eq!(case.moved(), [true, true]);
    }

    fn waiting(time: u64, after: Position) -> Quarantined {
        let stamp = stamp(time, OTHER);
        Quarantined { stamp, after }
    }

    #[test]
    fn a_truncate_overtakes_what_is_below_it_in_quarantine() {
        let mut case = case();
        let [below, above] = [case.keys[0].clone(), case.keys[1].clone()];
        case.put_aside(&below, waiting(5, Position::ZERO));
        case.put_aside(&above, waiting(50, Position::ZERO));
        assert_eq!(
            case.resolver.quarantined_below(case.of_table, stamp(30, OTHER)),
            std::slice::from_ref(&below)
        );
        let change = Change::Truncate {
            tables: vec![Arc::clone(&case.table)],
            cascade: false,
            restart_identity: false,
        };
        let txn = LocalTxn {
            stamp: stamp(30, OWN),
            position: Position::new(1, 30),
            xid: 700,
            commit_us: 0,
        };
        case.resolver.local(&change, &txn, &Vector::new()).unwrap();
        let overtaken = case.resolver.take_overtaken();
        assert_eq!(overtaken.into_iter().map(|of| of.1).collect::<Vec<_>>(), [below]);
        assert!(case.resolver.quarantined().contains_key(&above));
    }

    #[test]
    fn a_row_in_quarantine_is_overtaken_by_what_comes_after_it_was_put_there() {
        let mut case = case();
        let key = case.keys[0].clone();
        let is_quarantined = |case: &Case| case.resolver.watched(case.id, &case.keys).unwrap()[0].quarantined;
        case.put_aside(&key, waiting(5, Position::ZERO));
        assert!(is_quarantined(&case));
        case.local(1, 10);
        assert!(!is_quarantined(&case));
        // Again, for another version: what overtook the one before does not let go of it.
        case.put_aside(&key, waiting(12, Position::new(1, 10)));
        assert!(case.resolver.take_overtaken().is_empty());
        assert!(is_quarantined(&case));
        case.local(1, 13);
        assert_eq!(case.resolver.take_overtaken().len(), 1);
        assert!(!is_quarantined(&case));
    }
}
