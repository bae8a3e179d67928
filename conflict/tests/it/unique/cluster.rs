//! The schedule: sessions write, decoders and appliers come along when they like, daemons start again and forget.

use std::collections::BTreeMap;
use std::rc::Rc;

use anabranch_proto::NodeId;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

use super::node::{Key, Node, Row, Rule, Txn, Writes, alive, let_be, yields};

const KEYS: Key = 6;
const VALUES: u8 = 5;

/// What went wrong.
#[derive(Debug)]
#[allow(dead_code)] // for people
pub(super) enum Failure {
    /// These nodes ended with other rows than the first.
    Diverged(NodeId),
    /// A node's rows are not what all that it met makes of them.
    Wrong(NodeId),
    /// A row's value is there twice.
    Duplicate(NodeId, Key),
    /// Two rows should be in the table, and have one value.
    Both(NodeId, Key, Key),
    /// After a restart a node knows something else of a row.
    Forgot(NodeId, Key),
    /// A row that had to go has no line at a node.
    Missing(NodeId, Key),
    /// A node has a line for what met nothing.
    Unfounded(NodeId, Key),
}

#[derive(Debug, Default)]
pub(super) struct Counts {
    txns: u64,
    refused: u64,
    swaps: u64,
    parked: u64,
    of_three: u64,
    freed: u64,
    let_be: u64,
    restarts: u64,
}

impl Counts {
    pub(super) fn add(&mut self, more: &Self) {
        self.txns += more.txns;
        self.refused += more.refused;
        self.swaps += more.swaps;
        self.parked += more.parked;
        self.of_three += more.of_three;
        self.freed += more.freed;
        self.let_be += more.let_be;
        self.restarts += more.restarts;
    }

    pub(super) fn all(&self) -> [(&'static str, u64); 8] {
        [
            ("transactions", self.txns),
            ("refused sessions", self.refused),
            ("swaps", self.swaps),
            ("parked rows", self.parked),
            ("chains of three", self.of_three),
            ("values that the winner left again", self.freed),
            ("rows of one value for the daemon alone", self.let_be),
            ("restarts", self.restarts),
        ]
    }
}

struct Cluster {
    rng: StdRng,
    nodes: Vec<Node>,
    offset_us: Vec<i64>,
    now_us: i64,
    counts: Counts,
    all: Vec<Rc<Txn>>,
}

pub(super) fn run(seed: u64, rule: Rule) -> Result<Counts, Failure> {
    let mut rng = StdRng::seed_from_u64(seed);
    let ids: Vec<NodeId> = (1..=rng.random_range(2..=5)).map(NodeId).collect();
    let offset_us = ids.iter().map(|_| rng.random_range(-300..300)).collect();
    let steps = rng.random_range(30..200);
    let mut cluster = Cluster {
        rng,
        nodes: ids.iter().map(|id| Node::new(*id, &ids, rule)).collect(),
        offset_us,
        now_us: 1_000_000,
        counts: Counts::default(),
        all: Vec::new(),
    };
    for _ in 0..steps {
        cluster.step()?;
    }
    cluster.drain()?;
    cluster.judge(rule)?;
    Ok(cluster.counts)
}

impl Cluster {
    fn step(&mut self) -> Result<(), Failure> {
        self.now_us += self.rng.random_range(0..100);
        let at = self.rng.random_range(0..self.nodes.len());
        let mut sent = Vec::new();
        match self.rng.random_range(0..100) {
            0..30 => self.write(at),
            30..55 => sent.extend(self.nodes[at].decode()),
            55..85 => {
                let ready = self.nodes[at].deliverable();
                if let Some(&origin) = ready.choose(&mut self.rng) {
                    self.nodes[at].apply(origin, &mut sent)?;
                }
            }
            85..90 => self.nodes[at].repair(&mut sent)?,
            90..97 => self.nodes[at].forget(),
            _ => {
                self.counts.restarts += 1;
                self.nodes[at].restart(&mut sent)?;
            }
        }
        self.send(sent);
        self.nodes[at].check()
    }

    fn send(&mut self, sent: Vec<Rc<Txn>>) {
        for txn in sent {
            for node in self.nodes.iter_mut().filter(|node| node.id != txn.stamp.node) {
                let queue = node.inbox.entry(txn.stamp.node).or_default();
                queue.push_back(Rc::clone(&txn));
            }
            self.all.push(txn);
        }
    }

    fn row(&mut self) -> Row {
        [0, 1].map(|_| {
            let value = self.rng.random_range(0..=VALUES);
            (value > 0).then_some(value)
        })
    }

    fn write(&mut self, at: usize) {
        let now_us = self.now_us + self.offset_us[at];
        let mut writes = Writes::new();
        let table = &self.nodes[at].table;
        let there: Vec<(Key, Row)> = table.iter().map(|(key, row)| (*key, *row)).collect();
        let picked: Vec<&(Key, Row)> = there.choose_multiple(&mut self.rng, 2).collect();
        let swap = match picked.as_slice() {
            [a, b] if self.rng.random_bool(0.25) => Some((**a, **b)),
            _ => None,
        };
        if let Some((a, b)) = swap {
            // One of both values, or all.
            let at = self.rng.random_range(0..3);
            let (mut left, mut right) = (a.1, b.1);
            (0..2)
                .filter(|column| at == 2 || at == *column)
                .for_each(|column| std::mem::swap(&mut left[column], &mut right[column]));
            writes.extend([(a.0, Some(left)), (b.0, Some(right))]);
        } else if self.rng.random_bool(0.9) {
            // None at all is a heartbeat.
            for _ in 0..self.rng.random_range(1..=2) {
                let key = self.rng.random_range(0..KEYS);
                let row = self.row();
                writes.insert(key, self.rng.random_bool(0.75).then_some(row));
            }
        }
        if self.nodes[at].write(&writes, now_us) {
            self.counts.txns += 1;
            self.counts.swaps += u64::from(swap.is_some());
        } else {
            self.counts.refused += 1;
        }
    }

    fn drain(&mut self) -> Result<(), Failure> {
        loop {
            let mut moved = false;
            for at in 0..self.nodes.len() {
                let mut sent = Vec::new();
                self.nodes[at].fence(&mut sent);
                let ready = self.nodes[at].deliverable();
                if let Some(&origin) = ready.choose(&mut self.rng) {
                    self.nodes[at].apply(origin, &mut sent)?;
                    moved = true;
                }
                moved |= !sent.is_empty();
                self.send(sent);
            }
            if !moved {
                break;
            }
        }
        for node in &mut self.nodes {
            node.repair(&mut Vec::new())?;
            node.check()?;
        }
        Ok(())
    }

    fn judge(&mut self, rule: Rule) -> Result<(), Failure> {
        let first = &self.nodes[0];
        if let Some(other) = self.nodes.iter().find(|node| node.table != first.table) {
            return Err(Failure::Diverged(other.id));
        }
        let (rows, parked) = alive(&self.all);
        if rule != Rule::Claims {
            return Ok(());
        }
        let by_stamp: BTreeMap<_, _> = self.all.iter().map(|txn| (txn.stamp, txn)).collect();
        for node in &self.nodes {
            if node.table != rows {
                return Err(Failure::Wrong(node.id));
            }
            if let Some((key, _)) = parked.iter().find(|line| !node.log.contains(line)) {
                return Err(Failure::Missing(node.id, *key));
            }
            for (key, stamp) in &node.log {
                let txn = by_stamp[stamp];
                let version = txn.version(*key).unwrap();
                let overtaken = |other: &&Rc<Txn>| {
                    other.stamp > *stamp && !version.covered_by(&other.deps) && other.writes.contains_key(key)
                };
                let row = txn.writes[key];
                let yielded = |other: &&Rc<Txn>| row.is_some_and(|row| yields(txn, *key, &row, other));
                if !self.all.iter().any(|other| overtaken(&other) || yielded(&other)) {
                    return Err(Failure::Unfounded(node.id, *key));
                }
            }
        }
        self.counts.parked += parked.len() as u64;
        self.counts.let_be += let_be(&rows);
        for (key, stamp) in parked {
            let txn = by_stamp[&stamp];
            let row = txn.writes[&key].unwrap();
            let winners: Vec<&&Rc<Txn>> = by_stamp
                .values()
                .filter(|other| yields(txn, key, &row, other))
                .collect();
            self.counts.of_three += u64::from(winners.len() > 1);
            let free = |at: usize| rows.values().all(|it| it[at] != row[at]);
            self.counts.freed += u64::from(row[0].is_some() && free(0) && free(1));
        }
        Ok(())
    }
}
