//! Who has which value of a secondary unique key ([`anabranch_conflict::claims`]), for tables under last update wins.
//!
//! In:   rows with their unique values as transactions make them; at the end of each the vector that it depends on
//! Out:  rows that yield, marked in the index; those that a local commit was decoded for are findings
//! Holds: the unique keys whose values the daemon can compare; per value written above the stable point the highest claim,
//!        and those of rows that stand beside it, since the server takes their values for others
//! Must never: take part in who wins a row; cost anything where a table has no such key
//! On crash: rebuilt with the index
//! Not here: what a row's values are ([`super::unique`]); keys that the daemon cannot compare by: what the server refuses for
//!        those is settled in `apply/collided.rs`

use std::collections::BTreeMap;
use std::sync::Arc;

use anabranch_conflict::claims::{Claims, Outcome};
use anabranch_conflict::{Kind, Version};
use anabranch_proto::row::{Cell, RowImage};
use anabranch_proto::schema::TableDesc;
use anabranch_proto::wire::Malformed;
use anabranch_proto::{Lsn, Stamp, Vector};

use super::unique::{UniqueKey, UniqueKeys, places};
use super::{Error, Found, LocalTxn, Resolver};
use crate::index::{Entry, RowKey, TableId};

/// A value of a unique key: a hash under a seed of this process, of 128 bits, so that no two are ever equal by chance.
type Value = u128;

/// Of each key the places of its columns in a row; `None` where the row does not have them all.
type Places = Vec<Option<Vec<usize>>>;

/// The unique keys of a table, and where their columns are in the rows of one description of it.
#[derive(Default)]
struct Keys {
    name: (String, String),
    keys: Vec<UniqueKey>,
    mapped: Option<(Arc<TableDesc>, Places)>,
}

impl Keys {
    /// Finds the columns in rows of this description.
    fn map(&mut self, table: &Arc<TableDesc>) {
        let is_mapped = |mapped: &(Arc<TableDesc>, Places)| Arc::ptr_eq(&mapped.0, table);
        if self.mapped.as_ref().is_some_and(is_mapped) {
            return;
        }
        let places = self.keys.iter().map(|key| places(key, table)).collect();
        self.mapped = Some((Arc::clone(table), places));
    }
}

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
    deferred: Vec<Found>,
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
            deferred: Vec::new(),
            rebuilt: Vec::new(),
            swept_len: 0,
            idle_sweeps: 0,
        }
    }
}

impl Registers {
    /// A table has this number. Asked for every row.
    pub(super) fn learn(&mut self, id: TableId, table: &TableDesc) {
        if id.0 as usize == self.by_table.len() {
            let name = (table.schema.clone(), table.name.clone());
            let keys = self.keys.get(&name).cloned().unwrap_or_default();
            let mapped = None;
            self.by_table.push(Keys { name, keys, mapped });
        }
    }

    fn values(
        &mut self,
        id: TableId,
        table: &Arc<TableDesc>,
        row: &RowImage,
    ) -> Result<Vec<(Value, Arc<str>)>, Malformed> {
        let Some(keys) = self.by_table.get_mut(id.0 as usize) else {
            return Ok(Vec::new());
        };
        keys.map(table);
        let Some((_, places)) = &keys.mapped else {
            return Ok(Vec::new());
        };
        let cells: Vec<Cell<'_>> = row.cells().collect();
        let mut out = Vec::with_capacity(places.len());
        let mut bytes = Vec::new();
        for (key, places) in keys.keys.iter().zip(places) {
            let Some(places) = places else { continue };
            bytes.clear();
            bytes.extend_from_slice(&id.0.to_be_bytes());
            bytes.extend_from_slice(key.definition.as_bytes());
            bytes.push(0);
            if key.put_value(&mut bytes, (table, &cells, places))? {
                let value = xxhash_rust::xxh3::xxh3_128_with_seed(&bytes, self.seed);
                out.push((value, Arc::clone(&key.name)));
            }
        }
        Ok(out)
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
        let deferred = std::mem::take(&mut self.registers.deferred);
        let (due, waiting): (Vec<Found>, Vec<Found>) =
            deferred.into_iter().partition(|found| found.is_due(applied));
        self.registers.deferred = waiting;
        self.found.extend(due);
    }

    pub(super) fn deferred(&self) -> impl Iterator<Item = &Found> {
        self.registers.deferred.iter()
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
mod tests {
    use anabranch_conflict::policy::Policies;
    use anabranch_proto::schema::ColumnDesc;
    use anabranch_proto::stamp::NTP64;
    use anabranch_proto::txn::{Change, PutOp};
    use anabranch_proto::{NodeId, Position};

    use super::*;
    use crate::index::RowIndex;

    const OWN: NodeId = NodeId(1);
    const OTHER: NodeId = NodeId(2);

    struct Case {
        _dir: tempfile::TempDir,
        resolver: Resolver,
        table: Arc<TableDesc>,
    }

    /// A table of a key and a value of one byte, which is unique.
    fn case() -> Case {
        let dir = tempfile::tempdir().unwrap();
        let index = RowIndex::new(dir.path(), 1 << 20).unwrap();
        let mut resolver = Resolver::new(OWN, index, Policies::default());
        let column = |name: &str| ColumnDesc {
            name: name.to_owned(),
            type_oid: 17,
            type_mod: -1,
            type_name: "pg_catalog.bytea".to_owned(),
        };
        let table = Arc::new(TableDesc {
            schema: "s".to_owned(),
            name: "t".to_owned(),
            columns: vec![column("k"), column("v")],
            key: vec![0],
            identity_full: false,
        });
        let key = UniqueKey::of_columns("t_v_key", vec!["v".to_owned()], true);
        let name = ("s".to_owned(), "t".to_owned());
        resolver.set_unique_keys([(name, vec![key])].into_iter().collect());
        Case {
            _dir: dir,
            resolver,
            table,
        }
    }

    fn row(key: u8, value: u8) -> RowImage {
        let value = [value];
        let cell = if value == [0] {
            Cell::Null
        } else {
            Cell::Binary(&value)
        };
        RowImage::build([Cell::Binary(&[key]), cell].into_iter())
    }

    fn version(time: u64, node: NodeId) -> Version {
        Version {
            stamp: Stamp {
                time: NTP64(time),
                node,
            },
            position: Position::new(1, time),
            kind: Kind::Put,
        }
    }

    impl Case {
        fn key(&mut self, key: u8) -> RowKey {
            let table = Arc::clone(&self.table);
            self.resolver.key_of_row(&table, &row(key, 1)).unwrap()
        }

        fn local(&mut self, time: u64, rows: &[(u8, u8)]) {
            let txn = LocalTxn {
                stamp: version(time, OWN).stamp,
                position: version(time, OWN).position,
                xid: 700,
                commit_us: 0,
            };
            let seen: Vector = [(OWN, Position::new(1, time - 1))].into_iter().collect();
            for &(key, value) in rows {
                let change = Change::Put {
                    table: Arc::clone(&self.table),
                    op: PutOp::Update,
                    row: row(key, value),
                    old_key: None,
                    former: None,
                };
                self.resolver.local(&change, &txn, &seen).unwrap();
            }
            self.resolver.local_end(&txn, &seen).unwrap();
        }

        fn remote(&mut self, time: u64, rows: &[(u8, u8)]) -> Vec<Yielded> {
            let mut claims = TxnClaims::default();
            let (version, table) = (version(time, OTHER), Arc::clone(&self.table));
            for &(key, value) in rows {
                let (key, image) = (self.key(key), row(key, value));
                let images = (Some(&image), None, None);
                self.resolver
                    .remote((&table, &key), version, &Vector::new(), images, 800)
                    .unwrap();
                self.resolver
                    .claim(&mut claims, (&table, &key), version, Some(&image))
                    .unwrap();
            }
            self.resolver.end_claims(&mut claims, &Vector::new()).unwrap()
        }

        fn is_there(&mut self, key: u8) -> bool {
            let key = self.key(key);
            self.resolver.current(&key).unwrap().unwrap().is_there()
        }
    }

    #[test]
    fn a_local_row_that_comes_too_early_is_a_finding_once_what_it_yields_to_is_applied() {
        let mut case = case();
        assert!(case.remote(20, &[(1, 7)]).is_empty());
        case.local(10, &[(2, 7)]);
        assert!(case.is_there(1) && !case.is_there(2));
        let found = case.resolver.take_found();
        assert_eq!(found.len(), 1);
        assert!(!found[0].local_won && found[0].log && found[0].repair);
        assert_eq!(found[0].key, case.key(2));
        let rival = found[0].rival.as_ref().unwrap();
        assert_eq!((rival.key.clone(), &*rival.constraint), (case.key(1), "t_v_key"));
        assert!(!found[0].is_due(&Vector::new()));
        case.resolver.defer(found);
        case.resolver.found_done();
        assert!(!case.resolver.has_found());
        assert!(case.resolver.found_from().is_some(), "the slot waits");
        let applied = [(OTHER, Position::new(1, 20))].into_iter().collect();
        case.resolver.applied(&applied);
        assert!(case.resolver.has_found());
    }

    #[test]
    fn a_remote_row_that_comes_too_early_yields_also_when_it_is_tried_again() {
        let mut case = case();
        case.local(20, &[(1, 7)]);
        for _ in 0..2 {
            let yielded = case.remote(10, &[(2, 7)]);
            assert_eq!(yielded.len(), 1);
            assert!(yielded[0].incoming);
            assert!(case.is_there(1) && !case.is_there(2));
        }
        assert!(case.resolver.take_found().is_empty());
        // A later write of the row has its own fate.
        assert!(case.remote(30, &[(2, 8)]).is_empty());
        assert!(case.is_there(2));
    }

    #[test]
    fn what_a_transaction_only_passes_through_is_nobodys() {
        let mut case = case();
        case.local(10, &[(1, 7)]);
        assert!(case.remote(20, &[(2, 7), (2, 8), (3, 0), (4, 0)]).is_empty());
        assert!([1, 2, 3, 4].into_iter().all(|key| case.is_there(key)));
        let yielded = case.remote(30, &[(5, 7)]);
        assert_eq!(yielded.len(), 1);
        assert!(!yielded[0].incoming && !case.is_there(1));
    }

    #[test]
    fn a_row_that_yields_takes_its_value_from_all_rows_that_the_server_let_be() {
        let mut case = case();
        // One value here, and two or more to the server.
        case.local(10, &[(1, 7), (2, 7)]);
        case.local(30, &[(3, 7)]);
        assert!([1, 2, 3].into_iter().all(|key| case.is_there(key)));
        let yielded = case.remote(20, &[(4, 7)]);
        assert_eq!(yielded.iter().filter(|row| row.incoming).count(), 1);
        assert_eq!(yielded.len(), 3);
        let there: Vec<u8> = (1..=4).filter(|key| case.is_there(*key)).collect();
        assert_eq!(there, [3]);
        // As where the remote one was there first.
        let mut case = self::case();
        case.remote(20, &[(4, 7)]);
        case.local(10, &[(1, 7), (2, 7)]);
        case.local(30, &[(3, 7)]);
        let there: Vec<u8> = (1..=4).filter(|key| case.is_there(*key)).collect();
        assert_eq!(there, [3]);
    }

    #[test]
    fn who_hands_a_value_on_is_asked_after_no_more() {
        let mut case = case();
        for at in 0..20_u8 {
            let rows = [(at, 0), (at + 1, 7)];
            case.local(10 + u64::from(at), &rows[usize::from(at == 0)..]);
            let kept = format!("{:?}", case.resolver.registers.claims);
            assert_eq!(kept.matches("Claim {").count(), 1, "{kept}");
        }
        let yielded = case.remote(100, &[(50, 7)]);
        assert_eq!(yielded.len(), 1, "{yielded:?}");
        assert_eq!(yielded[0].key, case.key(20));
    }

    #[test]
    fn a_row_of_a_copy_that_is_looked_at_since_it_yields_has_a_line() {
        let mut case = case();
        let table = Arc::clone(&case.table);
        let mut rebuild = |key: u8, value: u8, time: u64, node: NodeId, deps: &Vector| {
            let change = Change::Put {
                table: Arc::clone(&table),
                op: PutOp::Insert,
                row: row(key, value),
                old_key: None,
                former: None,
            };
            let version = version(time, node);
            let at = (version.stamp, version.position);
            case.resolver.rebuild(&change, at, deps).unwrap();
            case.resolver.history_end(deps, None).unwrap();
        };
        rebuild(1, 7, 5, OTHER, &Vector::new());
        rebuild(2, 7, 6, NodeId(3), &Vector::new());
        let moved = [(NodeId(3), Position::new(1, 6))].into_iter().collect();
        rebuild(2, 8, 9, NodeId(3), &moved);
        case.resolver
            .distrust(std::slice::from_ref(&table), Lsn(50))
            .unwrap();
        let found = case.resolver.take_found();
        assert_eq!(found.len(), 1);
        assert!(found[0].log && found[0].repair && found[0].lsn == Lsn(50));
        assert_eq!(found[0].key, case.key(1));
        assert_eq!(
            found[0].rival.as_ref().map(|rival| rival.key.clone()),
            Some(case.key(2))
        );
    }

    #[test]
    fn a_table_without_unique_keys_claims_nothing() {
        let mut case = case();
        case.resolver.set_unique_keys(UniqueKeys::new());
        case.local(20, &[(1, 7)]);
        assert!(case.remote(10, &[(2, 7)]).is_empty());
        assert_eq!(case.resolver.registers.claims.len(), 0);
    }
}
