//! An apply transaction, in steps between which sessions commit and the decoder moves.
//!
//! Decide every row from the index; write row by row under the guard; lock the rows that failed, wait until the
//! decoder has passed what was in the WAL then, decide and write them again; commit. A truncate takes its
//! tables whole first. A repair is an apply transaction without remote transactions.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use anabranch_conflict::Kind;
use anabranch_conflict::TableVersion;
use anabranch_conflict::table::{self, OnRow};
use anabranch_proto::{NodeId, Position, Stamp};

use super::checked::Check;
use super::daemon::{Daemon, Meeting, Plan, Unechoed};
use super::server::{Row, Xid};
use super::{Item, Key, Txn, Value};

#[derive(Debug)]
pub(crate) struct Apply {
    xid: Xid,
    items: Vec<(NodeId, Item)>,
    /// Per row, the transactions of the batch that write it, in order.
    pub(crate) writers: BTreeMap<Key, Vec<Rc<Txn>>>,
    plans: BTreeMap<Key, Plan>,
    todo: Vec<Key>,
    failed: Vec<Key>,
    /// WAL entries that were decoded when the plans were made.
    horizon: usize,
    /// The decoder must have come this far before the plans are made (again).
    wait: Option<usize>,
    rounds: u32,
    truncated: bool,
    /// A row missing where one was expected (or the reverse) goes the slow path.
    strict: bool,
}

impl Apply {
    fn is_repair(&self) -> bool {
        self.items.is_empty()
    }

    fn txns(&self) -> impl Iterator<Item = &Rc<Txn>> {
        self.items.iter().filter_map(|(_, item)| match item {
            Item::Txn(txn) => Some(txn),
            Item::Heartbeat(_) => None,
        })
    }

    fn truncates(&self) -> BTreeSet<u8> {
        self.txns()
            .flat_map(|txn| txn.writes.truncates.iter().copied())
            .collect()
    }
}

impl Daemon {
    /// Collects what is held and ready, in causal order: at most `max_txns`, origins tried in `order`.
    /// A truncating transaction goes alone.
    fn collect(&self, max_txns: usize, order: &[NodeId]) -> Vec<(NodeId, Item)> {
        let (mut batch, mut cursor, mut have) = (Vec::new(), self.cursor.clone(), self.applied.clone());
        let mut txns = 0;
        loop {
            let size = batch.len();
            for origin in order.iter().filter(|origin| **origin != self.node) {
                let item = self.held.get(origin).and_then(|items| items.get(cursor[origin]));
                let Some(item) = item else { continue };
                if let Item::Txn(txn) = item {
                    let alone = !txn.writes.truncates.is_empty();
                    if !have.includes(&txn.deps) || txns == max_txns || alone && txns > 0 {
                        continue;
                    }
                    have.raise(*origin, txn.position);
                    txns = if alone { max_txns } else { txns + 1 };
                }
                batch.push((*origin, item.clone()));
                *cursor.get_mut(origin).unwrap() += 1;
            }
            if batch.len() == size {
                return batch;
            }
        }
    }

    /// Opens an apply transaction, if there is anything to apply.
    pub(crate) fn begin_apply(&mut self, max_txns: usize, order: &[NodeId], strict: bool) {
        let items = self.collect(max_txns, order);
        if !items.is_empty() && self.open.is_none() {
            self.begin(items, BTreeMap::new(), strict);
        }
    }

    /// Opens a repair, if any row needs one.
    pub(crate) fn begin_repair(&mut self) {
        if self.open.is_none() && !self.repair.is_empty() {
            let writers = std::mem::take(&mut self.repair)
                .into_iter()
                .map(|key| (key, Vec::new()))
                .collect();
            self.begin(Vec::new(), writers, false);
        }
    }

    fn begin(&mut self, items: Vec<(NodeId, Item)>, writers: BTreeMap<Key, Vec<Rc<Txn>>>, strict: bool) {
        let mut open = Apply {
            xid: self.server.new_xid(),
            items,
            writers,
            plans: BTreeMap::new(),
            todo: Vec::new(),
            failed: Vec::new(),
            horizon: 0,
            wait: None,
            rounds: 0,
            truncated: false,
            strict,
        };
        for txn in open.txns().cloned().collect::<Vec<_>>() {
            self.learn_change(&txn);
            for &key in txn.writes.rows.keys() {
                open.writers.entry(key).or_default().push(Rc::clone(&txn));
            }
        }
        let tables = open.truncates();
        let all: Vec<Key> = open.writers.keys().copied().collect();
        if tables.is_empty() && !open.is_repair() {
            self.make_plans(&mut open, all);
        } else {
            self.server.exclusive.extend(tables);
            self.fence(&mut open, all);
        }
        self.open = Some(open);
    }

    fn make_plans(&self, open: &mut Apply, keys: Vec<Key>) {
        open.horizon = self.decoded;
        for &key in &keys {
            open.plans
                .insert(key, self.plan(key, &open.writers[&key], open.xid));
        }
        open.todo = keys;
        open.rounds += 1;
    }

    /// The slow path: locks the rows there are, then waits for the decoder.
    fn fence(&mut self, open: &mut Apply, keys: Vec<Key>) {
        self.counts.fenced += 1;
        self.server.touched.extend(keys.iter().map(|key| key.table));
        self.server
            .locked
            .extend(keys.iter().filter(|key| self.server.rows.contains_key(key)));
        open.wait = Some(if self.rules.fence {
            self.server.wal.len()
        } else {
            0
        });
        open.failed = keys;
    }

    /// One step of the open apply transaction.
    pub(crate) fn step_apply(&mut self) {
        let Some(mut open) = self.open.take() else { return };
        if let Some(until) = open.wait {
            if self.decoded >= until {
                open.wait = None;
                let keys = std::mem::take(&mut open.failed);
                self.make_plans(&mut open, keys);
            }
        } else if !open.truncated {
            self.write_truncates(&mut open);
        } else if let Some(key) = open.todo.pop() {
            self.server.touched.insert(key.table);
            if !self.write(&open, key) {
                self.counts.guard_failed += 1;
                open.failed.push(key);
            }
        } else if !open.failed.is_empty() {
            let keys = std::mem::take(&mut open.failed);
            self.fence(&mut open, keys);
        } else {
            self.commit(open);
            return;
        }
        self.open = Some(open);
    }

    /// Removes the rows that the batch's truncates remove. The tables are locked whole and everything
    /// committed in them is decoded.
    fn write_truncates(&mut self, open: &mut Apply) {
        open.truncated = true;
        for txn in open.txns() {
            let truncate = TableVersion {
                stamp: txn.stamp,
                position: txn.position,
            };
            for &table in &txn.writes.truncates {
                let late = self
                    .truncates
                    .get(&table)
                    .is_some_and(|latest| latest.stamp > truncate.stamp);
                // A later one has removed what this one would; but a row may have been written since that lost to it
                // and is still to be removed, which a crash would forget. The daemon empties the table in any case.
                if late && !matches!(self.rules.arbiter, super::Arbiter::Merged(_)) {
                    continue;
                }
                // A version that lost before and is newer than the truncate is the row now.
                let uncovered: Vec<(Key, Value)> = self
                    .all_keys
                    .iter()
                    .filter(|key| key.table == table)
                    .filter_map(|&key| Some((key, self.uncovered_by(key, txn)?)))
                    .collect();
                let survives = |key: &Key| {
                    // A later truncate's tombstone is no row: what is there has lost to it and is to be removed.
                    self.index.get(key).is_some_and(|entry| {
                        !entry.is_of_truncate
                            && table::admit_truncate(&entry.version, &truncate, &txn.deps) == OnRow::Survives
                            // A script may choose a delete among what is left.
                            && (self.rules.choice().is_none() || self.is_left_by(key, txn))
                    })
                };
                let gone: Vec<(Key, Row)> = self
                    .server
                    .rows
                    .iter()
                    .filter(|(key, _)| key.table == table && !survives(key))
                    .map(|(key, row)| (*key, *row))
                    .collect();
                for (key, row) in gone {
                    self.server.write(key, None);
                    self.overwritten.push((key, row.value, truncate.stamp));
                }
                for (key, value) in uncovered {
                    self.server.write(key, Some(Row { value, xid: open.xid }));
                }
            }
        }
    }

    /// One guarded statement. False: the row was not as expected.
    fn write(&mut self, open: &Apply, key: Key) -> bool {
        let plan = &open.plans[&key];
        let Some(target) = &plan.after else { return true };
        if !plan.changes() && !open.is_repair() {
            return true;
        }
        let came_in = |txn: &Rc<Txn>| txn.stamp == target.version.stamp;
        let comeback = !open.is_repair() && !open.writers[&key].iter().any(came_in);
        self.counts.comebacks += u32::from(comeback);
        if comeback && self.rules.forget_comebacks {
            return true;
        }
        let found = self.server.rows.get(&key).copied();
        if open.is_repair() && found.map(|row| row.value) == target.value {
            self.waiting.write(key);
            return true;
        }
        let expected_here = plan
            .before
            .as_ref()
            .is_some_and(|entry| entry.version.kind == Kind::Put);
        match found {
            Some(row) => {
                let expected = plan.before.as_ref().is_some_and(|entry| entry.xid == row.xid);
                let known =
                    row.xid == open.xid || expected || self.server.committed_before(row.xid, open.horizon);
                let locked_anyway = !self.rules.fence && open.rounds > 1;
                if self.rules.guard && !known && !locked_anyway {
                    return false;
                }
            }
            None if open.strict && open.rounds == 1 && expected_here => return false,
            None => {}
        }
        if let Some(value) = target.value.filter(|value| self.rules.refuses(value)) {
            // What is there was looked at, and stays as it is.
            self.server.locked.extend(found.map(|_| key));
            self.waiting.refuse(key, target.version.stamp, value);
            return true;
        }
        self.waiting.write(key);
        self.overwritten
            .extend(found.map(|row| (key, row.value, target.version.stamp)));
        self.counts.repairs_that_wrote += u32::from(open.is_repair());
        self.server
            .write(key, target.value.map(|value| Row { value, xid: open.xid }));
        true
    }

    fn commit(&mut self, open: Apply) {
        let mut progress: BTreeMap<NodeId, (Position, Stamp)> = BTreeMap::new();
        for txn in open.txns() {
            let last = progress
                .entry(txn.stamp.node)
                .or_insert((txn.position, txn.stamp));
            *last = (*last).max((txn.position, txn.stamp));
            self.applied.raise(txn.stamp.node, txn.position);
        }
        let progress = progress
            .into_iter()
            .map(|(node, (position, stamp))| (node, position, stamp))
            .collect();
        let keys: Vec<Key> = open.plans.keys().copied().collect();
        let repair = open.is_repair();
        self.unechoed.insert(
            open.xid,
            Unechoed {
                keys: keys.clone(),
                repair,
            },
        );
        self.server.commit_apply(open.xid, progress, keys);
        let refused = self.waiting.commit(&mut self.counts);
        for txn in open.txns() {
            for &table in &txn.writes.truncates {
                self.meet_truncate(table, txn, Meeting::InOrder);
            }
        }
        // The log of what the plans found is part of the transaction.
        for (&key, plan) in &open.plans {
            for &loser in &plan.losers {
                self.log_loser(key, loser);
            }
        }
        self.flush_log();
        for (&key, plan) in &open.plans {
            // Wrong, if it is left out: what is refused counts as applied.
            if !refused.contains(&key) || self.rules.check.is_none_or(Check::counts_as_applied) {
                self.settle(&open, key, plan);
            }
        }
        // Before anything that comes with them or later may be called stable.
        for txn in open.txns() {
            self.learn(txn);
        }
        for (origin, item) in &open.items {
            *self.cursor.get_mut(origin).unwrap() += 1;
            item.observe(*origin, &mut self.stability);
        }
    }

    /// Takes a row of the committed transaction into the index, which the decoder may have changed since the
    /// row was decided.
    fn settle(&mut self, open: &Apply, key: Key, written: &Plan) {
        let mut now = self.plan(key, &open.writers[&key], open.xid);
        for &loser in &now.losers {
            self.log_loser(key, loser);
        }
        // The winner may be the same and still have met something in between: a local insert that slipped in
        // where there was no row to lock, say.
        let unchanged = now.same_as(written);
        if unchanged {
            if open.is_repair()
                && let Some(entry) = &mut now.after
            {
                entry.xid = self.server.rows.get(&key).map_or(entry.xid, |row| row.xid);
            }
        } else {
            self.counts.changed_before_commit += 1;
        }
        let repair = !unchanged && self.rules.reconcile != super::Reconcile::Never;
        self.keep(key, now.after, repair);
    }
}
