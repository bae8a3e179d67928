//! A daemon's checkpoints, its end at any moment, and its start from what is durable.
//!
//! Durable: the server; the conflict log and progress, which are in it; the last checkpoint (a place in the WAL
//! with its fold); the journal up to what is applied. Everything else is gone: the index is built again from
//! the journal, and the WAL after the checkpoint is decoded again.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use anabranch_conflict::{Fold, Stability};
use anabranch_proto::Vector;
use rand::Rng;
use rand::rngs::StdRng;

use super::daemon::Daemon;
use super::server::Record;
use super::{Item, Txn};

/// Where decoding starts again.
#[derive(Debug, Clone)]
pub(crate) struct Checkpoint {
    decoded: usize,
    fold: Fold,
}

impl Checkpoint {
    /// The beginning of the WAL.
    pub(crate) fn first(fold: &Fold) -> Self {
        Self {
            decoded: 0,
            fold: fold.clone(),
        }
    }

    pub(crate) fn vector(&self) -> &Vector {
        self.fold.vector()
    }
}

impl Daemon {
    /// Moves the checkpoint to what is decoded, unless decoding has found something to do that is in no durable
    /// place yet: a repair that is queued, open, or not echoed; or a row of an open apply transaction that the
    /// decoder may have met after it was decided.
    pub(crate) fn checkpoint(&mut self) {
        self.flush_log();
        let busy =
            self.open.is_some() || !self.repair.is_empty() || self.unechoed.values().any(|it| it.repair);
        if !busy || self.rules.careless_checkpoints {
            self.checkpoint = Checkpoint {
                decoded: self.decoded,
                fold: self.fold.clone(),
            };
        }
    }

    /// What decoding found lost is written to the log.
    pub(crate) fn flush_log(&mut self) {
        self.log.append(&mut self.unlogged);
    }

    /// The daemon ends and starts again. Some of what was received and not applied is gone.
    pub(crate) fn crash(&mut self, rng: &mut StdRng) {
        self.counts.crashes += 1;
        self.server.abort_apply();
        self.waiting.abort();
        self.open = None;
        self.unlogged.clear();
        self.repair.clear();
        self.index.clear();
        self.truncates.clear();
        self.decoded = self.checkpoint.decoded;
        self.fold = self.checkpoint.fold.clone();
        for (node, items) in &mut self.held {
            if *node != self.node {
                items.truncate(rng.random_range(self.cursor[node]..=items.len()));
            }
        }
        let upto = self.fold.vector().get(self.node);
        self.applied = self
            .applied
            .iter()
            .filter(|(node, _)| *node != self.node)
            .collect();
        self.applied.raise(self.node, upto);
        self.start_stability();
        self.trimming = super::daemon::Trimming::default();
        self.retreat = anabranch_conflict::change::Retreat::default();
        self.point = self.point.filter(|_| self.saved);
        self.start_index();
        // What is applied and lies after the checkpoint is known from the journal: what the progress rows hold
        // and the fold's vector does not.
        self.unechoed.retain(|_, apply| !apply.repair);
        for commit in self.server.wal.iter().skip(self.decoded) {
            if let Record::Echo { progress, keys } = &commit.record
                && !progress.is_empty()
            {
                self.unechoed
                    .entry(commit.xid)
                    .or_insert_with(|| super::daemon::Unechoed {
                        keys: keys.clone(),
                        repair: false,
                    });
            }
        }
    }

    pub(crate) fn start_stability(&mut self) {
        self.stability = Stability::new(self.held.keys().copied());
        self.stability.observe(self.node, self.fold.vector());
        for (node, items) in self.held.iter().filter(|(node, _)| **node != self.node) {
            for item in &items[..self.cursor[node]] {
                item.observe(*node, &mut self.stability);
            }
        }
    }

    /// An own transaction may have been sent, answered by a peer, and the answer applied, before a checkpoint
    /// held it. Decoded again it meets writes that cover it.
    fn start_seen<'a>(&mut self, txns: impl Iterator<Item = &'a Rc<Txn>>) {
        self.seen.clear();
        for txn in txns.filter(|txn| txn.stamp.node != self.node) {
            let upto = txn.deps.get(self.node);
            for &key in &self.all_keys {
                if txn.writes.rows.contains_key(&key) || txn.writes.truncates.contains(&key.table) {
                    let seen = self.seen.entry(key).or_default();
                    *seen = upto.max(*seen);
                }
            }
        }
    }

    /// Admits what the journal holds and is applied: the own stream up to the checkpoint, others up to progress.
    /// Stamp order respects what covers what.
    pub(crate) fn start_index(&mut self) {
        let mut txns: BTreeMap<_, Rc<Txn>> = BTreeMap::new();
        for items in self.held.values() {
            for item in items {
                if let Item::Txn(txn) = item
                    && self.applied.covers(txn.stamp.node, txn.position)
                    && !self.trimmed.covers(txn.stamp.node, txn.position)
                {
                    txns.insert(txn.stamp, Rc::clone(txn));
                }
            }
        }
        txns.values().for_each(|txn| self.learn_change(txn));
        self.start_seen(txns.values());
        self.began_settled.clone_from(&self.settled);
        self.ground.clone_from(&self.trimmed);
        let merged = matches!(self.rules.arbiter, super::Arbiter::Merged(_));
        for txn in txns.values() {
            for &table in &txn.writes.truncates {
                self.meet_truncate(table, txn, super::daemon::Meeting::InOrder);
            }
            // What was let go may have been above it; the old rows of what is not settled have it, so it counts as seen.
            let is_in_base = merged && txn.stamp <= self.low;
            if is_in_base {
                self.ground.raise(txn.stamp.node, txn.position);
            }
            let keys: BTreeSet<_> = txn.writes.rows.keys().copied().filter(|_| !is_in_base).collect();
            for key in keys {
                // Nobody knows who wrote the row here any more.
                let plan = self.plan(key, &[Rc::clone(txn)], 0);
                self.keep(key, plan.after, false);
            }
        }
        // Conflicts among these were logged when they were met.
        self.unlogged.clear();
        let settled = self.settled.clone();
        self.index.retain(|_, entry| {
            let members = entry.frontier.members().iter().map(|member| member.version);
            if let Some(merged) = &entry.merged {
                return !merged.is_in(&settled);
            }
            let all_settled = [entry.version]
                .into_iter()
                .chain(members)
                .all(|it| it.covered_by(&settled));
            !all_settled
        });
        self.ground = Vector::new();
        self.forget();
    }
}
