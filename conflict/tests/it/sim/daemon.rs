//! A daemon: what it holds, what decoding does to it, how it decides and forgets.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use anabranch_conflict::change::{Point, Retreat};
use anabranch_conflict::frontier::{Frontier, Policy};
use anabranch_conflict::table::{self, AgainstTruncate, OnRow};
use anabranch_conflict::{Fold, Kind, Stability, TableVersion, Verdict, Version, admit, conflict_id};
use anabranch_proto::{NodeId, Position, Stamp, Vector};
use uuid::Uuid;

use super::apply::Apply;
use super::change::Stage;
use super::checked::Waiting;
use super::crash::Checkpoint;
use super::merged::Merged;
use super::server::{Record, Server, Xid, position};
use super::{Arbiter, Counts, Item, Key, Reconcile, Rules, Txn, Value, priority};

/// Server clocks may run this far ahead of the witness.
pub(crate) const MAX_DRIFT_US: i64 = 2_000;

/// A row's entry in the index.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) version: Version,
    pub(crate) value: Option<Value>,
    /// Who wrote it here, if that is known to have been written here.
    pub(crate) xid: Xid,
    /// A truncate's tombstone for a row that is being repaired.
    pub(crate) is_of_truncate: bool,
    /// For policies over the frontier only.
    pub(crate) frontier: Frontier<Option<Value>>,
    /// Where columns are merged.
    pub(crate) merged: Option<Merged>,
}

/// What a row becomes.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    /// The winner before.
    pub(crate) before: Option<Entry>,
    /// The winner after; `None` where nothing unstable is known.
    pub(crate) after: Option<Entry>,
    pub(crate) losers: Vec<Stamp>,
}

impl Plan {
    pub(crate) fn winner(&self) -> Option<Stamp> {
        self.after.as_ref().map(|entry| entry.version.stamp)
    }

    pub(crate) fn started_from(&self) -> Option<Stamp> {
        self.before.as_ref().map(|entry| entry.version.stamp)
    }

    pub(crate) fn changes(&self) -> bool {
        self.winner() != self.started_from()
            || self.before.as_ref().map(value) != self.after.as_ref().map(value)
    }

    /// Does it begin and end as `other` does?
    pub(crate) fn same_as(&self, other: &Self) -> bool {
        let ends = |plan: &Self| (plan.before.as_ref().map(mark), plan.after.as_ref().map(mark));
        ends(self) == ends(other)
    }
}

fn value(entry: &Entry) -> Option<Value> {
    entry.value
}

/// What tells states of a row apart.
fn mark(entry: &Entry) -> (Stamp, Option<Value>) {
    (entry.version.stamp, entry.value)
}

/// An apply transaction whose echo is not decoded yet.
#[derive(Debug)]
pub(crate) struct Unechoed {
    /// The rows it looked at.
    pub(crate) keys: Vec<Key>,
    pub(crate) repair: bool,
}

/// What may leave the journal: what was stable, with its highest stamp, and what must be stable before. First what was
/// known with it, and then what was known by the time that was stable.
#[derive(Debug, Default)]
pub(crate) struct Trimming {
    first: Option<(Vector, Stamp, Vector)>,
    second: Option<(Vector, Stamp, Vector)>,
}

/// How a truncate meets the index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Meeting {
    /// After everything that is applied.
    InOrder,
    /// A local one, decoded after something that is later in the WAL was applied, maybe.
    Late,
}

#[derive(Debug)]
pub(crate) struct Daemon {
    pub(crate) node: NodeId,
    pub(crate) rules: Rc<Rules>,
    /// Every key there is.
    pub(crate) all_keys: Vec<Key>,
    pub(crate) server: Server,
    /// WAL entries decoded so far.
    pub(crate) decoded: usize,
    pub(crate) fold: Fold,
    pub(crate) index: BTreeMap<Key, Entry>,
    pub(crate) truncates: BTreeMap<u8, TableVersion>,
    pub(crate) stability: Stability,
    pub(crate) log: BTreeMap<Uuid, (Key, Stamp)>,
    /// Found while decoding, to be logged with the next transaction.
    pub(crate) unlogged: BTreeMap<Uuid, (Key, Stamp)>,
    /// Per origin, everything held of its stream (the own one included).
    pub(crate) held: BTreeMap<NodeId, Vec<Item>>,
    /// Per origin, how much of it is applied.
    pub(crate) cursor: BTreeMap<NodeId, usize>,
    /// Everything applied, decoded as such or not.
    pub(crate) applied: Vector,
    pub(crate) open: Option<Apply>,
    /// Rows to be put right.
    pub(crate) repair: BTreeSet<Key>,
    /// Rows that the server refused.
    pub(crate) waiting: Waiting,
    /// Apply transactions that are committed and not decoded yet.
    pub(crate) unechoed: BTreeMap<Xid, Unechoed>,
    pub(crate) checkpoint: Checkpoint,
    /// Not in the journal any more.
    pub(crate) trimmed: Vector,
    /// Stable when the journal was trimmed last: rows that nothing above it has written are settled.
    pub(crate) settled: Vector,
    /// What may be trimmed once all that was known with it is stable, too.
    pub(crate) trimming: Trimming,
    /// No version above it is in what was let go.
    pub(crate) low: Stamp,
    /// What was settled, and what was gone from the journal, when this life began.
    pub(crate) began_settled: Vector,
    pub(crate) ground: Vector,
    /// Began with a copy of another node's rows.
    pub(crate) joined: bool,
    /// Since a crash: per row, up to where applied writes of it have seen the own stream.
    pub(crate) seen: BTreeMap<Key, Position>,
    /// Of a change of the policy: how far it is here, where it was made, and whether that is in a durable place.
    pub(crate) stage: Stage,
    pub(crate) point: Option<Point>,
    pub(crate) saved: bool,
    pub(crate) retreat: Retreat,
    /// It needs the policy of before no more.
    pub(crate) done: bool,
    pub(crate) counts: Counts,
    /// For the oracle alone: rows replaced or removed by apply transactions, and the stamp that did it.
    pub(crate) overwritten: Vec<(Key, Value, Stamp)>,
}

impl Daemon {
    pub(crate) fn new(node: NodeId, members: &[NodeId], all_keys: &[Key], rules: Rc<Rules>) -> Self {
        Self {
            node,
            rules,
            all_keys: all_keys.to_vec(),
            server: Server::new(node),
            decoded: 0,
            fold: Fold::new(node),
            index: BTreeMap::new(),
            truncates: BTreeMap::new(),
            stability: Stability::new(members.iter().copied()),
            log: BTreeMap::new(),
            unlogged: BTreeMap::new(),
            checkpoint: Checkpoint::first(&Fold::new(node)),
            trimmed: Vector::new(),
            settled: Vector::new(),
            trimming: Trimming::default(),
            low: Stamp::ZERO,
            began_settled: Vector::new(),
            ground: Vector::new(),
            joined: false,
            seen: BTreeMap::new(),
            held: members.iter().map(|&member| (member, Vec::new())).collect(),
            cursor: members.iter().map(|&member| (member, 0)).collect(),
            applied: Vector::new(),
            open: None,
            repair: BTreeSet::new(),
            waiting: Waiting::default(),
            unechoed: BTreeMap::new(),
            stage: Stage::Before,
            point: None,
            saved: false,
            retreat: Retreat::default(),
            done: false,
            counts: Counts::default(),
            overwritten: Vec::new(),
        }
    }

    pub(crate) fn log_loser(&mut self, key: Key, loser: Stamp) {
        let schema = if self.rules.own_ids {
            format!("n{}", self.node.0)
        } else {
            "public".to_owned()
        };
        let id = conflict_id(&schema, &format!("t{}", key.table), &[key.id], loser);
        if !self.log.contains_key(&id) && self.unlogged.insert(id, (key, loser)).is_none() {
            self.counts.logged += 1;
        }
    }

    fn is_unechoed(&self, key: Key) -> bool {
        self.unechoed.values().any(|apply| apply.keys.contains(&key))
    }

    /// Is an apply transaction that may be later in the WAL than what is being decoded at this row?
    fn in_flight(&self, key: Key) -> bool {
        self.is_unechoed(key)
            || self
                .open
                .as_ref()
                .is_some_and(|open| open.writers.contains_key(&key))
    }

    /// Decodes one WAL entry. Returns the transaction, if it was a local one, the first time.
    pub(crate) fn decode(&mut self) -> Option<Rc<Txn>> {
        let at = self.decoded;
        let commit = self.server.wal.get(at)?;
        let xid = commit.xid;
        self.decoded += 1;
        let txn = match &commit.record {
            Record::Witness(us) => {
                self.fold.witness(*us);
                None
            }
            Record::Echo { progress, .. } => {
                self.fold.echo(progress.iter().copied());
                self.unechoed.remove(&xid);
                None
            }
            Record::Local {
                commit_us, writes, ..
            } => {
                let local = self.fold.begin_local(*commit_us, MAX_DRIFT_US);
                self.counts.clamped += u32::from(local.clamped_by_us > 0);
                let deps = self.fold.commit_local(position(at)).unwrap();
                Some(Rc::new(Txn {
                    stamp: local.stamp,
                    position: position(at),
                    deps,
                    writes: writes.clone(),
                }))
            }
        };
        if let Some(txn) = &txn {
            self.applied.raise(self.node, txn.position);
            self.learn(txn);
            self.learn_change(txn);
            let new = self.journal_own(txn);
            for &table in &txn.writes.truncates {
                self.meet_truncate(table, txn, Meeting::Late);
            }
            for &key in txn.writes.rows.keys() {
                self.meet_local(key, txn, xid);
            }
            if !new {
                self.stability.observe(self.node, self.fold.vector());
                return None;
            }
        }
        self.stability.observe(self.node, self.fold.vector());
        txn
    }

    /// Appends an own transaction to the own stream, unless it is there since before a crash: then it must be
    /// the same. True: it is new.
    fn journal_own(&mut self, txn: &Rc<Txn>) -> bool {
        let stream = self.held.get_mut(&self.node).unwrap();
        let before = stream.iter().find_map(|item| match item {
            Item::Txn(before) if before.position == txn.position => Some(before),
            _ => None,
        });
        if let Some(before) = before {
            assert_eq!(
                (before.stamp, &before.deps),
                (txn.stamp, &txn.deps),
                "decoded again, stamped otherwise"
            );
            return false;
        }
        stream.push(Item::Txn(Rc::clone(txn)));
        true
    }

    /// A local write of a row, met by the decoder.
    fn meet_local(&mut self, key: Key, txn: &Rc<Txn>, xid: Xid) {
        self.counts.decided += u32::from(self.waiting.overtake(key, txn.stamp));
        // Decoded again after a crash, and a peer that got it before has answered: it is history. Whether the
        // row here is as it must be is another question.
        if self.seen.get(&key).is_some_and(|upto| *upto >= txn.position) && !self.rules.forget_answers {
            let entry = self.index.get(&key).cloned();
            self.counts.answered_before += 1;
            let merged = matches!(self.rules.arbiter, Arbiter::Merged(_)) && self.rules.choice().is_none();
            let entry = if merged {
                self.plan(key, &[Rc::clone(txn)], xid).after
            } else {
                entry
            };
            self.keep(key, entry, self.rules.reconcile != Reconcile::Never);
            return;
        }
        let plan = self.plan(key, &[Rc::clone(txn)], xid);
        for &loser in &plan.losers {
            self.log_loser(key, loser);
        }
        let local_won = plan.winner() == Some(txn.stamp);
        let concurrent = !plan.losers.is_empty();
        self.counts.met_late_local_won += u32::from(concurrent && local_won);
        self.counts.met_late_applied_won += u32::from(concurrent && !local_won);
        let repair = match self.rules.reconcile {
            Reconcile::Always if matches!(self.rules.arbiter, Arbiter::Merged(_)) => {
                !local_won
                    || self.is_unechoed(key)
                    || plan.after.as_ref().and_then(|it| it.value) != txn.writes.rows[&key]
            }
            Reconcile::Always => !local_won || self.is_unechoed(key),
            Reconcile::WinningDeletes => concurrent && local_won && txn.writes.rows[&key].is_none(),
            Reconcile::Never => false,
        };
        self.keep(key, plan.after, repair);
    }

    /// Takes what a row has become into the index.
    pub(crate) fn keep(&mut self, key: Key, entry: Option<Entry>, repair: bool) {
        if repair {
            self.repair.insert(key);
        }
        if let Some(merged) = entry.as_ref().and_then(|entry| entry.merged.as_ref()) {
            self.counts.merges += u32::from(merged.is_contested());
            self.counts.left_out += merged.left_out;
        }
        // A row that lost to a truncate and may be there all the same: the repair must know that it goes.
        let gone = || self.truncates.get(&key.table).filter(|_| repair).map(tombstone);
        if let Some(entry) = entry.or_else(gone) {
            self.index.insert(key, entry);
        }
    }

    /// What the truncate of a table leaves of a row's frontier. The entry as it is under last update wins.
    fn cut(&self, mut entry: Entry, txn: &Txn) -> Option<Entry> {
        if matches!(self.rules.arbiter, Arbiter::Merged(_)) {
            return self.cut_merged(entry, txn).0;
        }
        let Arbiter::Ranked(policy) = &self.rules.arbiter else {
            return Some(entry);
        };
        if self.rules.truncate_spares_losers || entry.is_of_truncate {
            return Some(entry);
        }
        let truncate = TableVersion {
            stamp: txn.stamp,
            position: txn.position,
        };
        let shown = Some(entry.version.stamp);
        entry.frontier.truncate(policy, shown, &truncate, &txn.deps);
        let winner = entry.frontier.resolve(policy)?;
        (entry.version, entry.value) = (winner.version, winner.value);
        Some(entry)
    }

    /// What a row shows once a truncate was applied, if that is another version than before.
    pub(crate) fn uncovered_by(&self, key: Key, txn: &Txn) -> Option<Value> {
        let before = self.index.get(&key)?;
        let after = self.cut(before.clone(), txn)?;
        let changed = after.version != before.version || after.value != before.value;
        after.value.filter(|_| changed)
    }

    /// Is there a row once a truncate was applied?
    pub(crate) fn is_left_by(&self, key: &Key, txn: &Txn) -> bool {
        let after = self.index.get(key).and_then(|entry| self.cut(entry.clone(), txn));
        after.is_some_and(|entry| entry.value.is_some())
    }

    /// A truncate, local or applied, meets the index.
    pub(crate) fn meet_truncate(&mut self, table: u8, txn: &Txn, meeting: Meeting) {
        let truncate = TableVersion {
            stamp: txn.stamp,
            position: txn.position,
        };
        let keys: Vec<Key> = self
            .index
            .keys()
            .copied()
            .filter(|key| key.table == table)
            .collect();
        for key in keys {
            // What the row shows is judged, and not what it would have shown in between: an earlier write of the same transaction
            // may already have uncovered what stays.
            let (shown, before) = (self.index[&key].version, self.index[&key].value);
            let verdict = table::admit_truncate(&shown, &truncate, &txn.deps);
            let merged = matches!(self.rules.arbiter, Arbiter::Merged(_));
            if let Some(entry) = self.with_earlier_write(key, txn) {
                self.index.insert(key, entry);
            }
            if merged {
                let (_, lost) = self.cut_merged(self.index[&key].clone(), txn);
                self.counts.truncate_lost_rows += lost.len() as u32;
                lost.into_iter().for_each(|loser| self.log_loser(key, loser));
            }
            if verdict == OnRow::Survives {
                let cut = self.cut(self.index[&key].clone(), txn);
                let changed = cut.as_ref().is_some_and(|entry| entry.value != before);
                self.keep(key, cut, merged && changed && meeting == Meeting::Late);
                continue;
            }
            if verdict == OnRow::GoneOver && !merged {
                let loser = self.index[&key].version.stamp;
                self.counts.truncate_lost_rows += 1;
                self.log_loser(key, loser);
            }
            let over_frontier =
                matches!(self.rules.arbiter, Arbiter::Ranked(_)) || self.rules.choice().is_some();
            if over_frontier
                && let Some(entry) = self.cut(self.index[&key].clone(), txn)
                && entry.version != shown
            {
                // What lost before is newer than the truncate, and is the row now.
                self.counts.comebacks += 1;
                self.index.insert(key, entry);
                if meeting == Meeting::Late {
                    self.repair.insert(key);
                }
                continue;
            }
            // An apply transaction that is later in the WAL than a local truncate may have written the row
            // after it: what the row must become has to be remembered until that is put right.
            if meeting == Meeting::Late && (verdict == OnRow::GoneOver || self.in_flight(key)) {
                self.index.insert(key, tombstone(&truncate));
                if self.rules.reconcile != Reconcile::Never {
                    self.repair.insert(key);
                }
            } else {
                self.index.remove(&key);
            }
        }
        let latest = table::latest(self.truncates.get(&table).copied(), truncate);
        self.truncates.insert(table, latest);
    }

    /// A row with what `txn` wrote of it before it truncated the table, where several versions make a row. Where one does, that one is
    /// gone with the truncate, whatever it had beaten.
    fn with_earlier_write(&self, key: Key, txn: &Txn) -> Option<Entry> {
        let before = txn.before_truncate(key)?;
        let entry = self.index.get(&key).cloned();
        self.take_earlier(key, entry, &before)
    }

    fn take_earlier(&self, key: Key, entry: Option<Entry>, before: &Txn) -> Option<Entry> {
        if !matches!(self.rules.arbiter, Arbiter::Merged(_)) {
            return entry;
        }
        let version = before.version(key);
        let truncate = self.truncates.get(&key.table);
        if table::admit_row(truncate, &version, &before.deps) == AgainstTruncate::Loses {
            return entry;
        }
        let incoming = incoming(key, before, 0);
        Some(self.merge(key, entry, incoming, before, &mut Vec::new()))
    }

    /// What `txns`, in causal order, make of a row, from the index as it is now. `xid` is the transaction that
    /// writes them here.
    pub(crate) fn plan(&self, key: Key, txns: &[Rc<Txn>], xid: Xid) -> Plan {
        let before = self.index.get(&key).cloned();
        let (mut after, mut losers) = (before.clone(), Vec::new());
        for txn in txns {
            let version = txn.version(key);
            if txn.writes.truncates.contains(&key.table) {
                if let Some(before) = txn.before_truncate(key) {
                    after = self.take_earlier(key, after, &before);
                }
                after = after.and_then(|entry| self.cut(entry, txn));
            }
            if table::admit_row(self.truncates.get(&key.table), &version, &txn.deps) == AgainstTruncate::Loses
            {
                losers.push(version.stamp);
                continue;
            }
            // A tombstone left by this very transaction's truncate is not the row's version in it.
            after = after.filter(|entry| entry.version.stamp != version.stamp || !entry.is_of_truncate);
            let incoming = incoming(key, txn, xid);
            after = Some(match self.rules.arbiter {
                Arbiter::Merged(_) => self.merge(key, after, incoming, txn, &mut losers),
                _ => self.decide(after, incoming, &txn.deps, &mut losers),
            });
        }
        Plan {
            before,
            after,
            losers,
        }
    }

    fn decide(
        &self,
        current: Option<Entry>,
        mut incoming: Entry,
        deps: &Vector,
        losers: &mut Vec<Stamp>,
    ) -> Entry {
        let Some(current) = current else {
            incoming.frontier.admit(incoming.version, incoming.value, deps);
            return incoming;
        };
        let verdict = match &self.rules.arbiter {
            Arbiter::LastWriter => admit(Some(&current.version), &incoming.version, deps),
            Arbiter::Merged(_) => unreachable!(),
            Arbiter::Ranked(policy) => {
                return decide_by_frontier(policy, current, incoming, deps, losers);
            }
            _ if current.version.covered_by(deps) => Verdict::Wins,
            Arbiter::PriorityOfCurrent => {
                let rank = |version: &Version| (priority(version.origin()), version.stamp);
                if rank(&incoming.version) > rank(&current.version) {
                    Verdict::WinsOver
                } else {
                    Verdict::Loses
                }
            }
            Arbiter::LocalOnEqualTime => {
                let rank = |version: &Version| (version.stamp.time, version.origin() == self.node);
                if rank(&incoming.version) > rank(&current.version) {
                    Verdict::WinsOver
                } else {
                    Verdict::Loses
                }
            }
        };
        match verdict {
            Verdict::Wins => incoming,
            Verdict::WinsOver => {
                losers.push(current.version.stamp);
                incoming
            }
            Verdict::Loses => {
                losers.push(incoming.version.stamp);
                current
            }
            Verdict::Known => panic!("version {:?} delivered twice", incoming.version),
        }
    }

    /// Forgets what is stable.
    pub(crate) fn forget(&mut self) {
        let stable = self.stability.stable();
        self.trim(&stable);
        let before = self.index.len() + self.truncates.len();
        let busy: BTreeSet<Key> = if self.rules.forget_under_repair {
            BTreeSet::new()
        } else {
            // What a row must become is known from its entry alone.
            self.index
                .keys()
                .copied()
                .filter(|&key| self.repair.contains(&key) || self.in_flight(key))
                .collect()
        };
        let early = self.rules.drop_tombstones;
        let by_frontier = matches!(self.rules.arbiter, Arbiter::Ranked(_));
        let (mut let_go, mut compacted) = (0, 0);
        let settled = self.began_settled.clone();
        self.index.retain(|key, entry| {
            if busy.contains(key) {
                return true;
            }
            if let Arbiter::Merged(how) = self.rules.arbiter {
                let (all, [gone, folded]) =
                    Self::forget_merged(self.rules.columns, entry, &stable, &settled, how);
                let_go += gone;
                compacted += folded;
                return !all;
            }
            if by_frontier {
                entry.frontier.forget(&stable);
                let tombstone = entry.is_of_truncate && !entry.version.covered_by(&stable);
                return tombstone || !entry.frontier.members().is_empty();
            }
            !(entry.version.covered_by(&stable) || early && entry.version.kind == Kind::Delete)
        });
        self.truncates.retain(|_, truncate| !truncate.covered_by(&stable));
        let after = self.index.len() + self.truncates.len();
        self.counts.forgotten += (before - after) as u32;
        self.counts.let_go += let_go;
        self.counts.compacted += compacted;
    }

    /// Lets go from the journal what was stable once everything that was known then is stable, too: what is still
    /// to be decided covers it. Else a version that is stable could go while one remains that it has beaten, and
    /// who builds the index from the journal takes that for the row's.
    fn trim(&mut self, stable: &Vector) {
        if self.rules.hasty_trimming {
            self.trimmed.join(stable);
            return;
        }
        if !self.repair.is_empty() || self.unechoed.values().any(|apply| apply.repair) {
            return;
        }
        // Where the change was made is known from the journal alone.
        if self.point.is_some() && !self.saved {
            return;
        }
        // A restart meets again what lies behind the checkpoint.
        let safe = stable.meet(self.checkpoint.vector());
        let known = self.applied.clone();
        let mut trimming = std::mem::take(&mut self.trimming);
        if let Some((then, low, known)) = &trimming.second
            && safe.includes(known)
        {
            let coarse = self.rules.coarse_trimming;
            let gone = coarse.map_or_else(|| then.clone(), |items| self.whole_files(then, items));
            // What is settled is written down when a file goes.
            if coarse.is_none() || !self.trimmed.includes(&gone) {
                self.trimmed.join(&gone);
                self.settled.join(&safe);
                self.low = self.low.max(*low);
            }
            trimming.second = None;
        }
        if let Some((then, low, known_then)) = &trimming.first
            && safe.includes(known_then)
            && trimming.second.is_none()
        {
            trimming.second = Some((then.clone(), *low, known.clone()));
            trimming.first = None;
        }
        if trimming.first.is_none() {
            let low = if self.rules.coarse_trimming.is_some() {
                self.lowest_heard()
            } else {
                self.highest_in(&safe)
            };
            trimming.first = Some((safe, low, known));
        }
        self.trimming = trimming;
    }

    /// What is in whole files of the journal, of what may go.
    fn whole_files(&self, upto: &Vector, file_items: usize) -> Vector {
        let of = |(node, items): (&NodeId, &Vec<Item>)| {
            let mut last = None;
            for file in items.chunks_exact(file_items) {
                let positions = file.iter().filter_map(|item| match item {
                    Item::Txn(txn) => Some(txn.position),
                    Item::Heartbeat(_) => None,
                });
                let end = positions.max().or(last);
                if end.is_some_and(|end| !upto.covers(*node, end)) {
                    break;
                }
                last = end;
            }
            Some((*node, last?))
        };
        self.held.iter().filter_map(of).collect()
    }

    /// A stamp that all that is still to come from anybody is above, and nothing that is stable.
    fn lowest_heard(&self) -> Stamp {
        let of = |(node, items): (&NodeId, &Vec<Item>)| {
            if *node == self.node {
                return self.highest_in(self.fold.vector());
            }
            let told = items.iter().take(self.cursor[node]).rev();
            let mut told = told.map(|item| match item {
                Item::Txn(txn) => txn.stamp,
                // Its clock is past what it has decoded.
                Item::Heartbeat(vector) => self.highest_in(vector),
            });
            told.next().unwrap_or(Stamp::ZERO)
        };
        self.held.iter().map(of).min().unwrap_or(Stamp::ZERO)
    }

    /// The highest stamp of a transaction in `vector`.
    fn highest_in(&self, vector: &Vector) -> Stamp {
        let items = self.held.values().flatten().filter_map(|item| match item {
            Item::Txn(txn) if vector.covers(txn.stamp.node, txn.position) => Some(txn.stamp),
            _ => None,
        });
        items.max().unwrap_or(Stamp::ZERO)
    }

    /// Says in the own stream what is applied.
    pub(crate) fn heartbeat(&mut self) {
        if self.heartbeat_is_due() {
            let vector = self.told_vector().clone();
            self.held
                .get_mut(&self.node)
                .unwrap()
                .push(Item::Heartbeat(vector));
        }
    }

    fn told_vector(&self) -> &Vector {
        if self.rules.hasty_heartbeats {
            &self.applied
        } else {
            self.fold.vector()
        }
    }

    fn heartbeat_is_due(&self) -> bool {
        !matches!(self.held[&self.node].last(), Some(Item::Heartbeat(last)) if last == self.told_vector())
    }

    /// Has the daemon nothing left to do with what it holds?
    pub(crate) fn is_idle(&self) -> bool {
        self.decoded == self.server.wal.len()
            && self.open.is_none()
            && self.repair.is_empty()
            && !self.heartbeat_is_due()
            && self
                .held
                .iter()
                .all(|(node, items)| *node == self.node || self.cursor[node] == items.len())
    }
}

/// A row as `txn`, which is `xid` here, wrote it.
fn incoming(key: Key, txn: &Txn, xid: Xid) -> Entry {
    Entry {
        version: txn.version(key),
        value: txn.writes.rows[&key],
        xid,
        is_of_truncate: false,
        frontier: Frontier::new(),
        merged: None,
    }
}

fn tombstone(truncate: &TableVersion) -> Entry {
    let version = Version {
        stamp: truncate.stamp,
        position: truncate.position,
        kind: Kind::Delete,
    };
    Entry {
        version,
        value: None,
        xid: 0,
        is_of_truncate: true,
        frontier: Frontier::new(),
        merged: None,
    }
}

fn decide_by_frontier(
    policy: &Policy,
    current: Entry,
    incoming: Entry,
    deps: &Vector,
    losers: &mut Vec<Stamp>,
) -> Entry {
    let shown = (current.version.stamp, current.xid);
    let mut frontier = current.frontier;
    let outcome = frontier.meet(policy, Some(shown.0), incoming.version, incoming.value, deps);
    losers.extend(outcome.lost.map(|lost| lost.stamp));
    let winner = frontier.resolve(policy).unwrap();
    Entry {
        version: winner.version,
        value: winner.value,
        xid: if outcome.changed { incoming.xid } else { shown.1 },
        is_of_truncate: false,
        frontier,
        merged: None,
    }
}
