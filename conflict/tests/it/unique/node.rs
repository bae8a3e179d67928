//! One node: a table whose unique keys its server enforces, a decoder that lags behind, an applier.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::rc::Rc;

use anabranch_conflict::claims::{Claim, Claims, Outcome};
use anabranch_conflict::{Fold, Kind, Stability, Verdict, Version, admit};
use anabranch_proto::{NodeId, Position, Stamp, Vector};

use super::cluster::Failure;
use crate::delivery::{Inbox, deliverable};

pub(super) type Key = u8;
/// The values of two unique keys of one column each. In the second, NULL is a value like any other; in the first, two values
/// are one for the daemon that are two for the server ([`folded`]).
pub(super) type Row = [Option<u8>; 2];
pub(super) type Writes = BTreeMap<Key, Option<Row>>;
/// A unique key, and a value in it.
type Value = (usize, Option<u8>);

/// The rule for unique keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Rule {
    /// As it should be.
    Claims,
    /// By what stands in the table: who comes later by stamp evicts, who is earlier is refused.
    Arrival,
    /// Per value the highest claim is kept, and nothing is known of those below.
    Highest,
    /// A claim goes when a later version of its row does not make it.
    CurrentOnly,
    /// Who yields claims nothing.
    AliveOnly,
    /// Claims go while they are not stable.
    Forgetful,
    /// The journal lets go of what is stable at once.
    HastyTrim,
}

pub(super) struct Txn {
    pub(super) stamp: Stamp,
    pub(super) position: Position,
    pub(super) deps: Vector,
    pub(super) writes: Writes,
}

impl Txn {
    pub(super) fn version(&self, key: Key) -> Option<Version> {
        let kind = match self.writes.get(&key)? {
            Some(_) => Kind::Put,
            None => Kind::Delete,
        };
        Some(Version {
            stamp: self.stamp,
            position: self.position,
            kind,
        })
    }

    fn is_in(&self, vector: &Vector) -> bool {
        vector.covers(self.stamp.node, self.position)
    }
}

/// What a row has in the keys of the server: the key, and its value.
fn values(row: &Row) -> impl Iterator<Item = Value> + '_ {
    row.iter()
        .copied()
        .enumerate()
        .filter(|(at, value)| value.is_some() || *at == 1)
}

/// What a row claims, which is coarser: as what differs in more than case by the rules of one locale alone.
fn folded(row: &Row) -> impl Iterator<Item = Value> + '_ {
    values(row).map(|(at, value)| match at {
        0 => (at, value.map(|value| value.div_ceil(2))),
        _ => (at, value),
    })
}

/// How many rows there are that have one value for the daemon and not for the server.
pub(super) fn let_be(table: &BTreeMap<Key, Row>) -> u64 {
    let shares = |key: Key, row: &Row| {
        let own = |value: Value| folded(row).any(|it| it == value);
        table.range(..key).any(|(_, other)| folded(other).any(own))
    };
    table.iter().filter(|(key, row)| shares(**key, row)).count() as u64
}

/// Who has one of the row's values in a table.
pub(super) fn holder(table: &BTreeMap<Key, Row>, key: Key, row: &Row) -> Option<Key> {
    let clash = |other: &Row| values(other).any(|value| values(row).any(|own| own == value));
    let mut others = table.iter().filter(|(other, _)| **other != key);
    others.find(|(_, other)| clash(other)).map(|(other, _)| *other)
}

enum Wal {
    Local(Writes, i64),
    Echo(Rc<Txn>),
}

#[derive(Clone, Copy)]
struct Current {
    version: Version,
    parked: bool,
}

impl Current {
    fn is_gone(self) -> bool {
        self.parked || self.version.kind == Kind::Delete
    }
}

pub(super) struct Node {
    pub(super) id: NodeId,
    rule: Rule,
    pub(super) table: BTreeMap<Key, Row>,
    wal: VecDeque<Wal>,
    next_lsn: u64,
    fold: Fold,
    index: BTreeMap<Key, Current>,
    claims: Claims<Value, Key>,
    /// Every claim that is not withdrawn, for rules that withdraw some.
    held: Vec<(Value, Claim<Key>)>,
    pub(super) inbox: Inbox<Txn>,
    applied: Vector,
    stability: Stability,
    found: BTreeSet<Key>,
    pub(super) log: BTreeSet<(Key, Stamp)>,
    /// Everything met, for the oracle; and what a restart reads of it.
    pub(super) known: Vec<Rc<Txn>>,
    journal: Vec<Rc<Txn>>,
    trimming: Option<(Vector, Vector)>,
}

impl Node {
    pub(super) fn new(id: NodeId, members: &[NodeId], rule: Rule) -> Self {
        Self {
            id,
            rule,
            table: BTreeMap::new(),
            wal: VecDeque::new(),
            next_lsn: 10,
            fold: Fold::new(id),
            index: BTreeMap::new(),
            claims: Claims::default(),
            held: Vec::new(),
            inbox: BTreeMap::new(),
            applied: Vector::new(),
            stability: Stability::new(members.iter().copied()),
            found: BTreeSet::new(),
            log: BTreeSet::new(),
            known: Vec::new(),
            journal: Vec::new(),
            trimming: None,
        }
    }

    /// A session commits, if the server lets it: the keys are checked at the end.
    pub(super) fn write(&mut self, writes: &Writes, now_us: i64) -> bool {
        let mut after = self.table.clone();
        for (&key, row) in writes {
            match row {
                Some(row) => after.insert(key, *row),
                None => after.remove(&key),
            };
        }
        let holds = after.iter().all(|(key, row)| holder(&after, *key, row).is_none());
        if holds {
            self.table = after;
            self.wal.push_back(Wal::Local(writes.clone(), now_us));
        }
        holds
    }

    /// The decoder meets what comes next in the WAL. A local transaction is given back, for the peers.
    pub(super) fn decode(&mut self) -> Option<Rc<Txn>> {
        match self.wal.pop_front()? {
            Wal::Echo(txn) => {
                self.fold.echo([(txn.stamp.node, txn.position, txn.stamp)]);
                None
            }
            Wal::Local(writes, now_us) => {
                let stamp = self.fold.begin_local(now_us, 1 << 40).stamp;
                self.next_lsn += 10;
                let position = Position::new(1, self.next_lsn);
                let deps = self.fold.commit_local(position).unwrap();
                let txn = Rc::new(Txn {
                    stamp,
                    position,
                    deps,
                    writes,
                });
                self.resolve(&txn, true);
                Some(txn)
            }
        }
    }

    /// Everything that is committed is decoded.
    pub(super) fn fence(&mut self, sent: &mut Vec<Rc<Txn>>) {
        while !self.wal.is_empty() {
            sent.extend(self.decode());
        }
    }

    /// What a transaction means for its rows. The rows that must go beside its own are given back.
    fn resolve(&mut self, txn: &Rc<Txn>, local: bool) -> Vec<Key> {
        self.known.push(Rc::clone(txn));
        self.journal.push(Rc::clone(txn));
        for &key in txn.writes.keys() {
            let version = txn.version(key).unwrap();
            let current = self.index.get(&key).copied();
            let verdict = admit(current.as_ref().map(|it| &it.version), &version, &txn.deps);
            match (verdict, current) {
                (Verdict::WinsOver, Some(current)) => self.lost(key, current.version.stamp, local),
                (Verdict::Loses, _) => self.lost(key, txn.stamp, local),
                _ => {}
            }
            if matches!(verdict, Verdict::Wins | Verdict::WinsOver) {
                let parked = false;
                self.index.insert(key, Current { version, parked });
            }
        }
        self.claim(txn, local)
    }

    fn lost(&mut self, key: Key, stamp: Stamp, local: bool) {
        self.log.insert((key, stamp));
        if local {
            self.found.insert(key);
        }
    }

    fn claim(&mut self, txn: &Txn, local: bool) -> Vec<Key> {
        let mut evicted = Vec::new();
        if self.rule == Rule::Arrival {
            return evicted;
        }
        for (&key, row) in &txn.writes {
            if self.rule == Rule::CurrentOnly && self.is_current(key, txn.stamp) {
                let kept = |value: &Value| row.is_some_and(|row| folded(&row).any(|own| own == *value));
                self.held.retain(|(value, claim)| claim.row != key || kept(value));
            }
            let Some(row) = row else { continue };
            let version = txn.version(key).unwrap();
            for value in folded(row) {
                for outcome in self.meet(value, key, version, &txn.deps) {
                    match outcome {
                        Outcome::Knew(claim) => {
                            let current = self.index.get(&claim.row);
                            if current.is_none_or(|it| it.version != claim.version || it.parked) {
                                self.claims.release(&value, &claim);
                            }
                        }
                        Outcome::Beats(claim) => {
                            if self.park(claim.row, claim.version.stamp, local) {
                                evicted.push(claim.row);
                            }
                        }
                        Outcome::Yields(_) => {
                            self.park(key, txn.stamp, local);
                        }
                    }
                }
            }
        }
        evicted
    }

    fn meet(&mut self, value: Value, row: Key, version: Version, deps: &Vector) -> Vec<Outcome<Key>> {
        if !matches!(self.rule, Rule::Highest | Rule::CurrentOnly | Rule::AliveOnly) {
            return self.claims.meet(value, &row, version, deps);
        }
        let rivals = self.held.iter().filter(|(theirs, claim)| {
            *theirs == value && claim.row != row && claim.version.stamp != version.stamp
        });
        let rivals: Vec<Claim<Key>> = rivals.map(|(_, claim)| claim.clone()).collect();
        let (later, earlier): (Vec<_>, Vec<_>) = rivals
            .into_iter()
            .filter(|claim| !claim.version.covered_by(deps))
            .partition(|claim| claim.version.stamp > version.stamp);
        let yields = later.into_iter().next();
        let claims = match self.rule {
            Rule::AliveOnly => yields.is_none(),
            Rule::Highest => {
                let lower = |claim: &Claim<Key>| claim.version.stamp <= version.stamp;
                self.held
                    .retain(|(theirs, claim)| *theirs != value || !lower(claim));
                self.held.iter().all(|(theirs, _)| *theirs != value)
            }
            _ => true,
        };
        if claims {
            self.held.push((value, Claim { row, version }));
        }
        let beaten = earlier.into_iter().filter(|_| claims).map(Outcome::Beats);
        beaten.chain(yields.map(Outcome::Yields)).collect()
    }

    fn is_current(&self, key: Key, stamp: Stamp) -> bool {
        self.index.get(&key).is_some_and(|it| it.version.stamp == stamp)
    }

    /// A version yields: its row is parked, if it is current.
    fn park(&mut self, key: Key, stamp: Stamp, local: bool) -> bool {
        if self.rule == Rule::AliveOnly {
            self.held
                .retain(|(_, claim)| claim.row != key || claim.version.stamp != stamp);
        }
        match self.index.get_mut(&key) {
            Some(current) if current.version.stamp == stamp && !current.parked => current.parked = true,
            _ => return false,
        }
        self.lost(key, stamp, local);
        true
    }

    /// Origins whose next transaction may be applied.
    pub(super) fn deliverable(&self) -> Vec<NodeId> {
        let known = (self.fold.vector(), &self.applied);
        deliverable(&self.inbox, self.id, known, |txn| &txn.deps)
    }

    /// Is the row there, and last written by a session whose commit is not decoded?
    fn is_unknown(&self, key: Key) -> bool {
        let touched = |entry: &Wal| matches!(entry, Wal::Local(writes, _) if writes.contains_key(&key));
        self.table.contains_key(&key) && self.wal.iter().any(touched)
    }

    /// Applies the next transaction of an origin. A guard sees what stands in the table; it does not see what a session
    /// removed, or moved away, and the decoder has not met.
    pub(super) fn apply(&mut self, origin: NodeId, sent: &mut Vec<Rc<Txn>>) -> Result<(), Failure> {
        let txn = self.inbox.get_mut(&origin).unwrap().pop_front().unwrap();
        let mut keys: BTreeSet<Key> = txn.writes.keys().copied().collect();
        keys.extend(self.resolve(&txn, false));
        if keys.iter().any(|key| self.is_unknown(*key)) {
            self.fence(sent);
        }
        let due = |node: &Self, key: Key| match node.index.get(&key) {
            Some(current) if current.is_gone() => Some(None),
            Some(current) if current.version.stamp == txn.stamp => txn.writes.get(&key).copied(),
            // It lost to a later write, which stands.
            _ => None,
        };
        for &key in &keys {
            if due(self, key).is_some() {
                self.table.remove(&key);
            }
        }
        for &key in &keys {
            while let Some(Some(row)) = due(self, key) {
                let Some(other) = holder(&self.table, key, &row) else {
                    self.table.insert(key, row);
                    break;
                };
                if self.is_unknown(other) {
                    self.fence(sent);
                    continue;
                }
                let standing = self.index.get(&other).copied();
                if self.rule == Rule::Arrival {
                    let stamp = standing.map(|standing| standing.version.stamp);
                    if stamp.is_some_and(|stamp| stamp > txn.stamp) {
                        self.log.insert((key, txn.stamp));
                        break;
                    }
                    self.log.extend(stamp.map(|stamp| (other, stamp)));
                } else if !standing.is_some_and(Current::is_gone) {
                    return Err(Failure::Both(self.id, key, other));
                }
                self.table.remove(&other);
            }
        }
        self.applied.raise(txn.stamp.node, txn.position);
        let mut knows = txn.deps.clone();
        knows.raise(txn.stamp.node, txn.position);
        self.stability.observe(origin, &knows);
        self.wal.push_back(Wal::Echo(txn));
        Ok(())
    }

    /// Makes the rows of findings what the index says.
    pub(super) fn repair(&mut self, sent: &mut Vec<Rc<Txn>>) -> Result<(), Failure> {
        self.fence(sent);
        for key in std::mem::take(&mut self.found) {
            let Some(&current) = self.index.get(&key) else {
                continue;
            };
            self.table.remove(&key);
            if let Some(row) = self.image(key, current) {
                if let Some(other) = holder(&self.table, key, &row)
                    && self.index.get(&other).is_some_and(|other| other.is_gone())
                {
                    self.table.remove(&other);
                }
                if let Some(other) = holder(&self.table, key, &row) {
                    if self.rule == Rule::Arrival {
                        continue;
                    }
                    return Err(Failure::Both(self.id, key, other));
                }
                self.table.insert(key, row);
            }
        }
        Ok(())
    }

    fn image(&self, key: Key, current: Current) -> Option<Row> {
        let wrote = self.known.iter().find(|txn| txn.stamp == current.version.stamp)?;
        wrote.writes.get(&key).copied()?.filter(|_| !current.parked)
    }

    pub(super) fn is_quiet(&self) -> bool {
        self.wal.is_empty() && self.found.is_empty()
    }

    /// Forgets what is stable, and lets the journal go one round later.
    pub(super) fn forget(&mut self) {
        if !self.found.is_empty() {
            return;
        }
        let seen = self.fold.vector().clone();
        self.stability.observe(self.id, &seen);
        let stable = self.stability.stable();
        if self.rule == Rule::Forgetful {
            self.claims.forget_stable(&seen);
        }
        self.claims.forget_stable(&stable);
        self.held.retain(|(_, claim)| !claim.version.covered_by(&stable));
        self.index
            .retain(|_, current| !current.version.covered_by(&stable));
        if self.rule == Rule::HastyTrim {
            self.journal.retain(|txn| !txn.is_in(&stable));
        }
        match &self.trimming {
            Some((was_stable, known)) if stable.includes(known) => {
                self.journal.retain(|txn| !txn.is_in(was_stable));
                self.trimming = None;
            }
            Some(_) => {}
            None => {
                let mut known = self.applied.clone();
                known.join(&seen);
                self.trimming = Some((stable, known));
            }
        }
    }

    /// The daemon starts again: what it knew is built from the journal.
    pub(super) fn restart(&mut self, sent: &mut Vec<Rc<Txn>>) -> Result<(), Failure> {
        self.repair(sent)?;
        let mut journal = std::mem::take(&mut self.journal);
        journal.sort_by_key(|txn| txn.stamp);
        let (known, log) = (std::mem::take(&mut self.known), self.log.clone());
        let before = std::mem::take(&mut self.index);
        self.claims = Claims::default();
        self.held.clear();
        for txn in &journal {
            self.resolve(txn, false);
        }
        self.known = known;
        self.log = log;
        // What yields has to be known again.
        let same = |(key, was): (&Key, &Current)| {
            self.index
                .get(key)
                .is_some_and(|now| now.version == was.version && now.parked == was.parked)
        };
        match before.iter().find(|entry| !same(*entry)) {
            Some((key, _)) if matches!(self.rule, Rule::Claims | Rule::HastyTrim) => {
                Err(Failure::Forgot(self.id, *key))
            }
            _ => Ok(()),
        }
    }

    /// The table is what all that was met makes of it, and the keys hold.
    pub(super) fn check(&self) -> Result<(), Failure> {
        if let Some((key, _)) = self
            .table
            .iter()
            .find(|(key, row)| holder(&self.table, **key, row).is_some())
        {
            return Err(Failure::Duplicate(self.id, *key));
        }
        if self.rule == Rule::Claims && self.is_quiet() && self.table != alive(&self.known).0 {
            return Err(Failure::Wrong(self.id));
        }
        Ok(())
    }
}

/// The rule as it is written down, over a whole set of transactions: the rows, and those that yield.
pub(super) fn alive(known: &[Rc<Txn>]) -> (BTreeMap<Key, Row>, BTreeSet<(Key, Stamp)>) {
    let mut current: BTreeMap<Key, &Rc<Txn>> = BTreeMap::new();
    for txn in known {
        for &key in txn.writes.keys() {
            let slot = current.entry(key).or_insert(txn);
            if slot.stamp < txn.stamp {
                *slot = txn;
            }
        }
    }
    let mut rows: BTreeMap<Key, Row> = BTreeMap::new();
    let mut parked = BTreeSet::new();
    for (&key, txn) in &current {
        let Some(row) = txn.writes.get(&key).copied().flatten() else {
            continue;
        };
        if known.iter().any(|other| yields(txn, key, &row, other)) {
            parked.insert((key, txn.stamp));
        } else {
            rows.insert(key, row);
        }
    }
    (rows, parked)
}

/// Does this version of a row yield to one of `other`'s?
pub(super) fn yields(txn: &Txn, key: Key, row: &Row, other: &Txn) -> bool {
    let concurrent = !other.is_in(&txn.deps) && !txn.is_in(&other.deps);
    let claims = |(theirs, it): (&Key, &Option<Row>)| {
        *theirs != key && it.is_some_and(|it| folded(&it).any(|value| folded(row).any(|own| own == value)))
    };
    concurrent && other.stamp > txn.stamp && other.writes.iter().any(claims)
}
