//! Who has which value of a secondary unique key ([`anabranch_conflict::claims`]), for tables under last update wins.
//!
//! In:   rows with their unique values as transactions make them; at the end of each the vector that it depends on
//! Out:  rows that yield, marked in the index; those that a local commit was decoded for are findings
//! Holds: the unique keys whose values the daemon can compare; per value written above the stable point the highest claim,
//!        and those of rows that stand beside it, since the server takes their values for others
//! Must never: take part in who wins a row; cost anything where a table has no such key
//! On crash: rebuilt with the index
//! Not here: what a row's values are ([`values`], [`super::unique`]); keys that the daemon cannot compare by: what the server refuses for
//!        those is settled in `apply/collided.rs`

mod values;

use std::collections::BTreeMap;
use std::sync::Arc;

use anabranch_conflict::claims::{Claims, Outcome};
use anabranch_conflict::{Kind, Version};
use anabranch_proto::row::RowImage;
use anabranch_proto::schema::TableDesc;
use anabranch_proto::{Lsn, Stamp, Vector};

use self::values::{Keys, Value};
use super::findings::Held;
use super::unique::UniqueKeys;
use super::{Error, Found, LocalTxn, Resolver};
use crate::index::{Entry, RowKey, TableId};

/// What a transaction claims, as far as it is known: the last write of each row.
#[derive(Default)]
pub struct TxnClaims {
    rows: BTreeMap<RowKey, Claimed>,
}

struct Claimed {
    table: Arc<TableDesc>,
    version: Version,
    values: Vec<(Value, Arc<str>)>,
}

/// A row that yields to another one.
#[derive(Debug, Clone)]
pub struct Yielded {
    /// Its table.
    pub table: Arc<TableDesc>,
    /// The row.
    pub key: RowKey,
    /// Its current version.
    pub entry: Entry,
    /// The row that has the value.
    pub rival: RowKey,
    /// The version that claimed it.
    pub winner: Version,
    /// The unique key.
    pub constraint: Arc<str>,
    /// Is the row one of the transaction that was met, rather than one that stood?
    pub incoming: bool,
}

/// The other row of a finding that is about a unique value.
#[derive(Debug, Clone)]
pub struct Rival {
    /// The row that has the value.
    pub key: RowKey,
    /// The unique key.
    pub constraint: Arc<str>,
}

/// What the resolver keeps of unique values.
pub(super) struct Registers {
    seed: u64,
    keys: UniqueKeys,
    by_table: Vec<Keys>,
    claims: Claims<Value, RowKey>,
    /// Of the local transaction being decoded; of one of an earlier life.
    open: TxnClaims,
    /// Findings about writes that are not applied here yet.
    deferred: Held,
    /// Who yielded in an earlier life, for [`Resolver::distrust`].
    rebuilt: Vec<Yielded>,
    swept_len: usize,
    idle_sweeps: u32,
}

impl Default for Registers {
    fn default() -> Self {
        Self {
            seed: rand::random(),
            keys: UniqueKeys::new(),
            by_table: Vec::new(),
            claims: Claims::default(),
            open: TxnClaims::default(),
            deferred: Held::default(),
            rebuilt: Vec::new(),
            swept_len: 0,
            idle_sweeps: 0,
        }
    }
}

impl Resolver {
    /// Are these others than it was told last?
    #[must_use]
    pub fn has_other_unique_keys(&self, keys: &UniqueKeys) -> bool {
        *keys != self.registers.keys
    }

    /// Says which unique keys the tables here have. Rows met from now on claim by them.
    pub fn set_unique_keys(&mut self, keys: UniqueKeys) {
        if keys == self.registers.keys {
            return;
        }
        self.registers.keys = keys;
        for of in &mut self.registers.by_table {
            of.keys = self.registers.keys.get(&of.name).cloned().unwrap_or_default();
            of.mapped = None;
        }
    }

    /// Has the table a unique key whose values the daemon compares?
    fn has_registers(&self, table: TableId) -> bool {
        let keys = self.registers.by_table.get(table.0 as usize);
        keys.is_some_and(|keys| !keys.keys.is_empty())
            && self.ranking(table).is_none()
            && self.merging(table).is_none()
    }

    /// Notes what a transaction made of a row, in place of what it had made of it before.
    ///
    /// # Errors
    /// When a value cannot be read.
    pub fn claim(
        &mut self,
        claims: &mut TxnClaims,
        (table, key): (&Arc<TableDesc>, &RowKey),
        version: Version,
        row: Option<&RowImage>,
    ) -> Result<(), Error> {
        if !self.has_registers(key.table()) {
            return Ok(());
        }
        let values = match row {
            Some(row) if version.kind == Kind::Put => self.registers.values(key.table(), table, row)?,
            _ => Vec::new(),
        };
        if values.is_empty() {
            claims.rows.remove(key);
            return Ok(());
        }
        let claimed = Claimed {
            table: Arc::clone(table),
            version,
            values,
        };
        claims.rows.insert(key.clone(), claimed);
        Ok(())
    }

    /// A transaction truncates tables: what it had written of them before is gone.
    pub fn claim_truncated(&mut self, claims: &mut TxnClaims, tables: &[Arc<TableDesc>]) {
        if claims.rows.is_empty() {
            return;
        }
        for table in tables {
            let id = self.table_id(table);
            claims.rows.retain(|key, _| key.table() != id);
        }
    }

    /// As [`Self::claim_truncated`], of the transaction that is being decoded or read from the journal.
    pub(super) fn claim_open_truncated(&mut self, tables: &[Arc<TableDesc>]) {
        let mut open = std::mem::take(&mut self.registers.open);
        self.claim_truncated(&mut open, tables);
        self.registers.open = open;
    }

    /// As [`Self::claim`], of the transaction that is being decoded or read from the journal.
    pub(super) fn claim_open(
        &mut self,
        row: (&Arc<TableDesc>, &RowKey),
        version: Version,
        image: Option<&RowImage>,
    ) -> Result<(), Error> {
        let mut open = std::mem::take(&mut self.registers.open);
        let claimed = self.claim(&mut open, row, version, image);
        self.registers.open = open;
        claimed
    }

    /// The transaction is known whole: who yields to whom. Rows that yield are marked in the index.
    ///
    /// # Errors
    /// When the index cannot be used.
    pub fn end_claims(&mut self, claims: &mut TxnClaims, deps: &Vector) -> Result<Vec<Yielded>, Error> {
        let mut out = Vec::new();
        for (key, claimed) in std::mem::take(&mut claims.rows) {
            let mut yielded = false;
            for (value, constraint) in claimed.values {
                for outcome in self.registers.claims.meet(value, &key, claimed.version, deps) {
                    let (row, version, rival, winner, incoming) = match outcome {
                        Outcome::Knew(claim) => {
                            let entry = self.standing(&claim.row, claim.version)?;
                            if entry.is_none_or(|entry| entry.parked) {
                                self.registers.claims.release(&value, &claim);
                            }
                            continue;
                        }
                        Outcome::Yields(_) if yielded => continue,
                        Outcome::Yields(to) => (key.clone(), claimed.version, to.row, to.version, true),
                        Outcome::Beats(from) => (from.row, from.version, key.clone(), claimed.version, false),
                    };
                    yielded |= incoming;
                    let Some(entry) = self.standing(&row, version)? else {
                        continue;
                    };
                    // Its own transaction may be written a second time; nobody else's is.
                    if entry.parked && !incoming {
                        continue;
                    }
                    self.watches.meet(&row);
                    let entry = Entry {
                        parked: true,
                        ..entry
                    };
                    self.index.put(row.clone(), entry)?;
                    out.push(Yielded {
                        table: Arc::clone(&claimed.table),
                        key: row,
                        entry,
                        rival,
                        winner,
                        constraint: Arc::clone(&constraint),
                        incoming,
                    });
                }
            }
        }
        Ok(out)
    }

    /// The entry of a row that this version is the current one of.
    fn standing(&self, row: &RowKey, version: Version) -> Result<Option<Entry>, Error> {
        let entry = self.current(row)?;
        Ok(entry.filter(|entry| entry.version.stamp == version.stamp && entry.version.kind == Kind::Put))
    }

    /// The local transaction is decoded whole; `seen` is what is applied before it.
    ///
    /// # Errors
    /// When the index cannot be used.
    pub fn local_end(&mut self, txn: &LocalTxn, seen: &Vector) -> Result<(), Error> {
        if self.registers.open.rows.is_empty() {
            return Ok(());
        }
        let mut open = std::mem::take(&mut self.registers.open);
        for row in self.end_claims(&mut open, seen)? {
            let found = Found {
                local_txn: Some(*txn),
                ..row.found(txn.lsn(), self.node)
            };
            self.push_found(found);
        }
        Ok(())
    }

    /// A transaction of an earlier life is known whole; with `lsn`, at its echo: what it met with a local one may not
    /// have been put right.
    ///
    /// # Errors
    /// When the index cannot be used.
    pub fn history_end(&mut self, deps: &Vector, lsn: Option<Lsn>) -> Result<(), Error> {
        let mut open = std::mem::take(&mut self.registers.open);
        let node = self.node;
        let yielded = self.end_claims(&mut open, deps)?;
        let Some(lsn) = lsn else {
            self.registers.rebuilt.extend(yielded);
            return Ok(());
        };
        for row in yielded {
            if row.winner.origin() == node || row.entry.version.origin() == node {
                self.push_found(row.found(lsn, node));
            }
        }
        Ok(())
    }

    /// The rows that yield by what the journal says, with the version that does, as findings.
    pub(super) fn rebuilt_yields(&mut self, lsn: Lsn) -> BTreeMap<RowKey, (Version, Found)> {
        let (node, yielded) = (self.node, std::mem::take(&mut self.registers.rebuilt));
        let found = |row: Yielded| (row.key.clone(), (row.entry.version, row.found(lsn, node)));
        yielded.into_iter().map(found).collect()
    }

    /// Does this version of a row yield?
    ///
    /// # Errors
    /// When the index cannot be read.
    pub fn is_parked(&self, key: &RowKey, stamp: Stamp) -> Result<bool, Error> {
        if !self.has_registers(key.table()) {
            return Ok(false);
        }
        let current = self.current(key)?;
        Ok(current.is_some_and(|current| current.parked && current.version.stamp == stamp))
    }

    /// Puts findings aside until what they are about is applied.
    pub fn defer(&mut self, found: Vec<Found>) {
        self.registers.deferred.extend(found);
    }

    /// What is applied here has grown.
    pub fn applied(&mut self, applied: &Vector) {
        if self.registers.deferred.is_empty() {
            return;
        }
        let deferred = self.registers.deferred.take().into_iter();
        let (due, waiting): (Vec<Found>, Vec<Found>) = deferred.partition(|found| found.is_due(applied));
        self.registers.deferred.extend(waiting);
        self.found.extend(due);
    }

    pub(super) const fn deferred(&self) -> &Held {
        &self.registers.deferred
    }

    pub(super) fn forget_claims(&mut self, stable: &Vector) {
        let registers = &mut self.registers;
        // Nobody has asked.
        registers.rebuilt = Vec::new();
        // A walk costs what it visits, so wait until half of what it would visit is new.
        let len = registers.claims.len();
        let few = len >= 1_000 && len < registers.swept_len * 2 && registers.idle_sweeps < 50;
        if len == 0 || few {
            registers.idle_sweeps += 1;
            return;
        }
        registers.idle_sweeps = 0;
        registers.claims.forget_stable(stable);
        registers.swept_len = registers.claims.len();
    }
}

impl Yielded {
    /// As a finding, of which one side is a local write.
    fn found(self, lsn: Lsn, node: anabranch_proto::NodeId) -> Found {
        let local_won = self.winner.origin() == node;
        let (local, remote) = if local_won {
            (self.winner, self.entry.version)
        } else {
            (self.entry.version, self.winner)
        };
        Found {
            local_won,
            log: true,
            rival: Some(Rival {
                key: self.rival,
                constraint: self.constraint,
            }),
            ..Found::of_versions(lsn, &self.table, self.key, local, remote)
        }
    }
}

#[cfg(test)]
mod tests;
