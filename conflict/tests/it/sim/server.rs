//! A server: rows, the locks of the open apply transaction, and the WAL in commit order.

use std::collections::{BTreeMap, BTreeSet};

use anabranch_proto::{NodeId, Position, Stamp, Vector};

use super::{Key, Value, Writes};

pub(crate) type Xid = u32;

/// A row and the transaction that last wrote it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Row {
    pub(crate) value: Value,
    pub(crate) xid: Xid,
}

/// What was committed.
#[derive(Debug)]
pub(crate) enum Record {
    Local {
        /// The commit timestamp, which need not be monotone.
        commit_us: i64,
        writes: Writes,
        /// For the oracle alone: what this server had applied when the transaction committed.
        truth: BTreeMap<u16, u64>,
    },
    Echo {
        progress: Vec<(NodeId, Position, Stamp)>,
        /// The rows the transaction looked at or wrote.
        keys: Vec<Key>,
    },
    Witness(i64),
}

#[derive(Debug)]
pub(crate) struct Commit {
    pub(crate) xid: Xid,
    pub(crate) record: Record,
}

/// The position of the WAL entry `at`.
pub(crate) fn position(at: usize) -> Position {
    Position::new(1, (at as u64 + 1) * 8)
}

#[derive(Debug)]
pub(crate) struct Server {
    node: u16,
    pub(crate) rows: BTreeMap<Key, Row>,
    pub(crate) wal: Vec<Commit>,
    commit_at: BTreeMap<Xid, usize>,
    /// Who wrote the rows that the server began with, before anything in the WAL.
    copied_by: Option<Xid>,
    next_xid: Xid,
    /// Rows locked by the open apply transaction. A key that has no row cannot be locked.
    pub(crate) locked: BTreeSet<Key>,
    /// Tables it has written to: a local TRUNCATE waits.
    pub(crate) touched: BTreeSet<u8>,
    /// Tables it has locked whole: every local writer waits.
    pub(crate) exclusive: BTreeSet<u8>,
    /// What the open apply transaction wrote over, in order.
    undo: Vec<(Key, Option<Row>)>,
    /// For the oracle alone.
    truth: BTreeMap<u16, u64>,
}

impl Server {
    pub(crate) fn new(node: NodeId) -> Self {
        Self {
            node: node.0,
            rows: BTreeMap::new(),
            wal: Vec::new(),
            commit_at: BTreeMap::new(),
            copied_by: None,
            next_xid: 1,
            locked: BTreeSet::new(),
            touched: BTreeSet::new(),
            exclusive: BTreeSet::new(),
            undo: Vec::new(),
            truth: BTreeMap::new(),
        }
    }

    pub(crate) fn new_xid(&mut self) -> Xid {
        self.next_xid += 1;
        self.next_xid
    }

    /// Was `xid` committed before the WAL entry `horizon`?
    pub(crate) fn committed_before(&self, xid: Xid, horizon: usize) -> bool {
        self.copied_by == Some(xid) || self.commit_at.get(&xid).is_some_and(|&at| at < horizon)
    }

    fn commit(&mut self, xid: Xid, record: Record) {
        self.commit_at.insert(xid, self.wal.len());
        self.wal.push(Commit { xid, record });
    }

    /// Would a session that writes this have to wait for the open apply transaction?
    pub(crate) fn must_wait(&self, writes: &Writes) -> bool {
        writes
            .truncates
            .iter()
            .any(|table| self.touched.contains(table) || self.exclusive.contains(table))
            || writes
                .rows
                .keys()
                .any(|key| self.locked.contains(key) || self.exclusive.contains(&key.table))
    }

    /// A local session's transaction: in the rows and in the WAL at once.
    pub(crate) fn commit_local(&mut self, writes: Writes, commit_us: i64) {
        let xid = self.new_xid();
        self.rows.retain(|key, _| !writes.truncates.contains(&key.table));
        for (&key, &value) in &writes.rows {
            match value {
                Some(value) => drop(self.rows.insert(key, Row { value, xid })),
                None => drop(self.rows.remove(&key)),
            }
        }
        let truth = self.truth.clone();
        self.truth.insert(self.node, position(self.wal.len()).lsn.0);
        self.commit(
            xid,
            Record::Local {
                commit_us,
                writes,
                truth,
            },
        );
    }

    /// A server that begins with the committed rows of another, and has seen what that has.
    pub(crate) fn copy_of(&self, node: NodeId) -> Self {
        let mut rows = self.rows.clone();
        for (key, before) in self.undo.iter().rev() {
            match before {
                Some(row) => drop(rows.insert(*key, *row)),
                None => drop(rows.remove(key)),
            }
        }
        let mut copy = Self::new(node);
        let xid = copy.new_xid();
        copy.copied_by = Some(xid);
        copy.rows = rows
            .into_iter()
            .map(|(key, row)| (key, Row { xid, ..row }))
            .collect();
        copy.truth = self.truth.clone();
        copy
    }

    /// What this server has applied and committed, as positions.
    pub(crate) fn vector(&self) -> Vector {
        let position = |lsn| Position::new(1, lsn);
        self.truth
            .iter()
            .map(|(&node, &lsn)| (NodeId(node), position(lsn)))
            .collect()
    }

    /// The daemon's clock witness.
    pub(crate) fn commit_witness(&mut self, us: i64) {
        let xid = self.new_xid();
        self.commit(xid, Record::Witness(us));
    }

    /// The open apply transaction commits: its locks are gone.
    pub(crate) fn commit_apply(
        &mut self,
        xid: Xid,
        progress: Vec<(NodeId, Position, Stamp)>,
        keys: Vec<Key>,
    ) {
        for &(node, position, _) in &progress {
            self.truth.insert(node.0, position.lsn.0);
        }
        self.commit(xid, Record::Echo { progress, keys });
        self.undo.clear();
        self.unlock();
    }

    /// The open apply transaction writes a row, or removes it.
    pub(crate) fn write(&mut self, key: Key, row: Option<Row>) {
        let before = match row {
            Some(row) => self.rows.insert(key, row),
            None => self.rows.remove(&key),
        };
        // Nothing written, nothing locked.
        if before.is_some() || row.is_some() {
            self.undo.push((key, before));
            self.locked.insert(key);
        }
    }

    /// The open apply transaction, if there is one, is rolled back.
    pub(crate) fn abort_apply(&mut self) {
        for (key, before) in std::mem::take(&mut self.undo).into_iter().rev() {
            match before {
                Some(row) => drop(self.rows.insert(key, row)),
                None => drop(self.rows.remove(&key)),
            }
        }
        self.unlock();
    }

    fn unlock(&mut self) {
        self.locked.clear();
        self.touched.clear();
        self.exclusive.clear();
    }
}
