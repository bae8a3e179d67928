//! The random schedule: who does what next, which links are up, what the clocks say; and the drain.

use std::collections::BTreeMap;
use std::rc::Rc;

use anabranch_proto::NodeId;
use rand::rngs::StdRng;
use rand::seq::{IndexedRandom, SliceRandom};
use rand::{Rng, SeedableRng};

use super::change::Stage;
use super::daemon::Daemon;
use super::join::Join;
use super::oracle::{self, Event, Failure};
use super::server::Record;
use super::{Arbiter, Columns, Counts, Joining, Key, Rules, Value, Writes, checked, collections, groups};

/// A change of the policy that is begun is over by then.
const CHANGE_ROUNDS: u32 = 60;

/// Sessions go on for so long where a CHECK refuses rows.
const CHECK_ROUNDS: u32 = 8;

const START_US: i64 = 1_700_000_000_000_000;

/// What a node may do next.
#[derive(Debug, Clone, Copy)]
enum Action {
    Write,
    Decode,
    Receive,
    BeginApply,
    StepApply,
    Repair,
    Forget,
    Heartbeat,
    Witness,
    Partition,
    Heal,
    Checkpoint,
    Crash,
    Join,
    Change,
}

pub(super) struct Cluster {
    pub(super) rng: StdRng,
    pub(super) rules: Rc<Rules>,
    pub(super) nodes: Vec<Daemon>,
    /// Joins under way.
    pub(super) joining: Vec<Join>,
    /// The policy is being changed, and the change is made.
    pub(super) changing: bool,
    pub(super) made: bool,
    keys: Vec<Key>,
    /// Links that are down, as pairs of places in `nodes`.
    down: Vec<(usize, usize)>,
    /// How far each server's clock is off.
    pub(super) offset_us: Vec<i64>,
    /// How readily each node decodes.
    pub(super) eagerness: Vec<f64>,
    pub(super) now_us: i64,
    next_value: i64,
    history: Vec<Event>,
    /// Transactions in one apply transaction, at most.
    max_txns: usize,
    strict: bool,
    truncate_percent: u32,
    /// Of the statements that find a row, those that delete or move it.
    delete_percent: u32,
    /// Of updates of a counter, those by much.
    far_ratio: f64,
    /// Of updates of a highest value, those that lower it.
    lower_ratio: f64,
    collections: collections::Habits,
    /// How many of the crashes drawn happen.
    crash_ratio: f64,
    pub(super) trace: bool,
}

/// Runs one cluster from `seed`, lets it come to rest and checks everything.
pub(crate) fn run(seed: u64, rules: &Rules, trace: bool) -> Result<Counts, Failure> {
    collections::forget();
    let mut cluster = Cluster::new(seed, rules, trace);
    cluster.mix();
    if rules.coarse_trimming.is_some() {
        // What is open is decided by what their journals have left. (Not at a node that may still have to mend its copy: the
        // model forgets that it does.)
        let old = cluster.nodes.iter_mut().filter(|node| !node.joined);
        old.for_each(|node| node.crash(&mut cluster.rng));
    }
    cluster.drain()?;
    let mut counts = Counts::default();
    let must_log = oracle::check(
        &cluster.history,
        &cluster.nodes,
        &cluster.keys,
        rules,
        &mut counts,
    )?;
    cluster.check_forgotten()?;
    for node in &cluster.nodes {
        counts.add(&node.counts);
    }
    counts.must_log = must_log;
    Ok(counts)
}

impl Cluster {
    fn new(seed: u64, rules: &Rules, trace: bool) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        // Two or three nodes and one row: everything meets everything.
        let duel = rules.join_often || rng.random_bool(0.4);
        let members: Vec<NodeId> = (1..=rng.random_range(2..=if duel { 3 } else { 5 }))
            .map(NodeId)
            .collect();
        let rules = Rc::new(rules.clone());
        let ids = if duel { 1 } else { rng.random_range(1..=3) };
        let tables = if ids == 1 { 1 } else { 2 };
        let keys: Vec<Key> = (0..tables)
            .flat_map(|table| (0..ids).map(move |id| Key { table, id }))
            .collect();
        let merged = matches!(rules.arbiter, Arbiter::Merged(_));
        let columns = rules.columns;
        let wild = rng.random_bool(0.2);
        let one_life = rules.check.is_some_and(|check| !check.has_one_writer());
        let mut offset_us: Vec<i64> = members.iter().map(|_| rng.random_range(-3_000..3_000)).collect();
        if wild {
            offset_us[0] = 3_600_000_000;
        }
        Self {
            nodes: members
                .iter()
                .map(|&node| {
                    let mut daemon = Daemon::new(node, &members, &keys, Rc::clone(&rules));
                    daemon.begin_at(Stage::Before);
                    daemon
                })
                .collect(),
            eagerness: members
                .iter()
                .map(|_| *[0.1, 0.4, 1.0].choose(&mut rng).unwrap())
                .collect(),
            rules,
            keys,
            joining: Vec::new(),
            changing: false,
            made: false,
            down: Vec::new(),
            offset_us,
            now_us: START_US,
            next_value: 0,
            history: Vec::new(),
            max_txns: rng.random_range(1..=4),
            strict: rng.random_bool(0.5),
            delete_percent: if merged {
                *[0, 5, 30].choose(&mut rng).unwrap()
            } else {
                rng.random_range(20..80)
            },
            far_ratio: if merged {
                *[0.0, 0.0, 0.3].choose(&mut rng).unwrap()
            } else {
                0.0
            },
            lower_ratio: if merged {
                *[0.0, 0.3].choose(&mut rng).unwrap()
            } else {
                0.0
            },
            collections: match columns {
                Columns::Collections(_) => collections::Habits::of(&mut rng),
                Columns::Numbers | Columns::Mirrored(_) | Columns::Groups(..) => {
                    collections::Habits::default()
                }
            },
            crash_ratio: if one_life {
                0.0
            } else {
                *[0.0, 0.2, 1.0].choose(&mut rng).unwrap()
            },
            truncate_percent: *[0, 2, 10].choose(&mut rng).unwrap(),
            trace,
            rng,
        }
    }

    /// Everything at once, each seed with its own proportions.
    fn mix(&mut self) {
        let one_life = self.rules.check.is_some_and(|check| !check.has_one_writer());
        let joins = match (self.rules.join_often, self.rng.random_bool(0.25)) {
            (true, _) => 4..8,
            (false, true) if one_life => 0..1,
            (false, true) => 1..3,
            (false, false) => 0..1,
        };
        let mut weights: Vec<(Action, u32)> = [
            (Action::Write, 1..4),
            (Action::Decode, 1..6),
            (Action::Receive, 1..8),
            (Action::BeginApply, 4..12),
            (Action::StepApply, 4..16),
            (Action::Repair, 1..4),
            (Action::Forget, 1..8),
            (Action::Heartbeat, 1..8),
            (Action::Witness, 1..2),
            (Action::Partition, 0..2),
            (Action::Heal, 0..2),
            (Action::Checkpoint, 1..4),
            (Action::Crash, 1..2),
            (Action::Join, joins),
        ]
        .into_iter()
        .map(|(action, range)| (action, self.rng.random_range(range)))
        .collect();
        if self.rules.change.is_some() {
            weights.push((Action::Change, self.rng.random_range(2..16)));
        }
        let mut at = 0;
        let steps = if self.rules.join_often { 60..200 } else { 100..500 };
        for _ in 0..self.rng.random_range(steps) {
            let &(action, _) = weights.choose_weighted(&mut self.rng, |weight| weight.1).unwrap();
            if self.rng.random_bool(0.5) {
                at = self.rng.random_range(0..self.nodes.len());
            }
            self.now_us += self.rng.random_range(0..100);
            self.act(at, action);
        }
    }

    fn act(&mut self, at: usize, action: Action) {
        match action {
            Action::Write => (0..self.rng.random_range(1..4)).for_each(|_| self.write(at)),
            // Long behind, then at once up to date.
            Action::Decode => {
                let count = if self.rng.random_bool(0.4) { 100 } else { 1 };
                let count = if self.rng.random_bool(self.eagerness[at]) {
                    count
                } else {
                    0
                };
                (0..count).for_each(|_| self.decode(at));
            }
            Action::Receive => self.receive(at),
            Action::BeginApply => {
                let order = self.order();
                self.nodes[at].begin_apply(self.max_txns, &order, self.strict);
            }
            Action::StepApply => (0..self.rng.random_range(1..9)).for_each(|_| self.nodes[at].step_apply()),
            Action::Repair => self.nodes[at].begin_repair(),
            Action::Forget => self.nodes[at].forget(),
            Action::Heartbeat => self.nodes[at].heartbeat(),
            Action::Witness => self.nodes[at].server.commit_witness(self.now_us),
            Action::Partition => {
                let peer = self.rng.random_range(0..self.nodes.len());
                self.down.push((at.min(peer), at.max(peer)));
            }
            Action::Heal => drop(self.down.pop()),
            Action::Checkpoint => self.nodes[at].checkpoint(),
            Action::Join => self.join(at),
            Action::Change => self.change(at),
            Action::Crash => {
                if !self.rng.random_bool(self.crash_ratio) {
                    return;
                }
                if self.trace {
                    eprintln!("{:?} crashes", self.nodes[at].node);
                }
                self.nodes[at].crash(&mut self.rng);
            }
        }
    }

    fn order(&mut self) -> Vec<NodeId> {
        let mut order: Vec<NodeId> = self.nodes.iter().map(|node| node.node).collect();
        order.shuffle(&mut self.rng);
        order
    }

    /// A local session runs a transaction of one to three statements, unless it would have to wait.
    pub(super) fn write(&mut self, at: usize) {
        let mut writes = Writes::default();
        let (mut deletes, mut moves) = (0, 0);
        for _ in 0..self.rng.random_range(1..=3) {
            let key = *self.keys.choose(&mut self.rng).unwrap();
            if self.is_left_alone(at, key) {
                continue;
            }
            if self.rules.truncates && self.rng.random_ratio(self.truncate_percent, 100) {
                writes.truncate_rows(key.table);
                writes.truncates.retain(|table| *table != key.table);
                writes.truncates.push(key.table);
                continue;
            }
            let server = &self.nodes[at].server;
            let there = |key: &Key, writes: &Writes| match writes.rows.get(key) {
                Some(value) => value.is_some(),
                None => !writes.truncates.contains(&key.table) && server.rows.contains_key(key),
            };
            let kind = self.rng.random_range(0..100);
            let mut target = key;
            if there(&key, &writes) && kind < self.delete_percent {
                // A delete, or a move to a free key of the same table.
                let free = |other: &&Key| {
                    let is_free = other.table == key.table && !there(other, &writes);
                    is_free && !self.is_left_alone(at, **other)
                };
                let to = self
                    .keys
                    .iter()
                    .find(free)
                    .filter(|_| kind < self.delete_percent / 3);
                writes.rows.insert(key, None);
                writes.updated.remove(&key);
                writes.replaced.insert(key);
                match to {
                    Some(&to) => {
                        moves += 1;
                        target = to;
                    }
                    None => {
                        deletes += 1;
                        continue;
                    }
                }
            }
            self.next_value += 1;
            let value = self.value(at, target, &mut writes);
            writes.rows.insert(target, Some(value));
        }
        if self.nodes[at].server.must_wait(&writes) {
            return;
        }
        if self.trace {
            eprintln!(
                "{:?} commits {} {writes:?}",
                self.nodes[at].node,
                self.nodes[at].server.wal.len()
            );
        }
        let jitter_us = self.rng.random_range(-200..200);
        let commit_us = if self.rules.frozen_clocks {
            START_US
        } else {
            self.now_us + self.offset_us[at] + jitter_us
        };
        let joined = self.nodes[at].joined;
        let counts = &mut self.nodes[at].counts;
        counts.txns += 1;
        counts.joiner_txns += u32::from(joined);
        counts.truncates += writes.truncates.len() as u32;
        counts.deletes += deletes;
        counts.moves += moves;
        self.nodes[at].server.commit_local(writes, commit_us);
    }

    /// Does the row wait, and is another node the one that may write it?
    fn is_left_alone(&self, at: usize, key: Key) -> bool {
        let one_writer = self.rules.check.is_some_and(checked::Check::has_one_writer);
        one_writer && at > 0 && self.nodes.iter().any(|node| node.waiting.holds(key))
    }

    /// What an insert or an update of a row writes.
    fn value(&mut self, at: usize, key: Key, writes: &mut Writes) -> Value {
        let fresh = self.next_value;
        if !matches!(self.rules.arbiter, Arbiter::Merged(_)) {
            return [fresh, 0, 0, 0];
        }
        let removed = writes.truncates.contains(&key.table);
        let standing = self.nodes[at].server.rows.get(&key).filter(|_| !removed);
        let before = match writes.rows.get(&key) {
            Some(value) => *value,
            None => {
                let before = standing.map(|row| row.value);
                before.map(|before| writes.updated.insert(key, before));
                before
            }
        };
        match self.rules.columns {
            Columns::Collections(_) => return self.collections.next(&mut self.rng, fresh, before),
            Columns::Groups(..) => return groups::next(&mut self.rng, fresh, before),
            Columns::Numbers | Columns::Mirrored(_) => {}
        }
        let Some(mut value) = before else {
            let most = if self.rules.check.is_some() { 12 } else { 100 };
            return [
                fresh,
                fresh,
                self.rng.random_range(0..most),
                self.rng.random_range(0..100),
            ];
        };
        for column in &mut value[..2] {
            if self.rng.random_bool(0.3) {
                *column = fresh;
            }
        }
        if self.rng.random_bool(0.5) {
            // Now and then near the end of what 16 bits hold.
            let most = if self.rng.random_bool(self.far_ratio) {
                20_000
            } else {
                10
            };
            let (highest, lowest) = match self.rules.check {
                Some(_) => (most / 2, checked::LOWEST),
                None => (most, i16::MIN.into()),
            };
            let sum = value[2] + self.rng.random_range(-most..=highest);
            value[2] = sum.clamp(lowest, i16::MAX.into());
        }
        if self.rng.random_bool(0.4) {
            let lower = self.rng.random_bool(self.lower_ratio);
            let by = self.rng.random_range(1..50);
            value[3] += if lower { -by } else { by };
            self.nodes[at].counts.lowered += u32::from(lower);
        }
        value
    }

    pub(super) fn decode(&mut self, at: usize) {
        let node = &mut self.nodes[at];
        let place = node.decoded;
        let before = node.repair.len();
        if let Some(txn) = node.decode()
            && let Record::Local { truth, .. } = &node.server.wal[place].record
        {
            self.history.push(Event {
                txn,
                truth: truth.clone(),
            });
        }
        if self.trace && place < node.server.wal.len() {
            eprintln!(
                "{:?} decodes {place} {:?}",
                node.node, node.server.wal[place].record
            );
            if node.repair.len() > before {
                eprintln!("{:?} must repair {:?}", node.node, node.repair);
            }
        }
    }

    fn is_up(&self, a: usize, b: usize) -> bool {
        !self.down.contains(&(a.min(b), a.max(b)))
    }

    /// Some of every origin's stream arrives from one peer, who holds it.
    fn receive(&mut self, at: usize) {
        let from = self.rng.random_range(0..self.nodes.len());
        if from == at {
            return;
        }
        if !self.is_up(at, from) {
            self.nodes[at].counts.cut_off += 1;
            return;
        }
        for origin in (0..self.nodes.len()).filter(|origin| *origin != at) {
            let count = *[0, 1, 4, 20].choose(&mut self.rng).unwrap();
            self.transfer(from, at, origin, count);
        }
    }

    fn transfer(&mut self, from: usize, to: usize, origin: usize, count: usize) {
        let node = self.nodes[origin].node;
        let Some(source) = self.nodes[from].held.get(&node) else {
            return;
        };
        if !self.nodes[to].held.contains_key(&node) {
            if self.rules.joining != Joining::OnSight || source.is_empty() {
                return;
            }
            self.nodes[to].admit(node);
        }
        let source = &self.nodes[from].held[&node];
        let have = self.nodes[to].held[&node].len();
        let items: Vec<_> = source.iter().skip(have).take(count).cloned().collect();
        if from != origin {
            self.nodes[to].counts.relayed += items.len() as u32;
        }
        self.nodes[to].held.get_mut(&node).unwrap().extend(items);
        if self.rules.gossip {
            let (peer, vector) = (self.nodes[from].node, self.nodes[from].fold.vector().clone());
            self.nodes[to].stability.observe(peer, &vector);
        }
    }

    /// Sessions stop, once a change of the policy is over; links heal, everything arrives and is applied.
    fn drain(&mut self) -> Result<(), Failure> {
        self.down.clear();
        while !self.joining.is_empty() {
            self.go_on_joining();
        }
        // Most rows are refused only now, and what is written over these is to be seen, too.
        let is_checked = self.rules.check.is_some();
        let goes_on = |round: u32| is_checked && round < CHECK_ROUNDS;
        for round in 0..2_000 {
            for at in 0..self.nodes.len() {
                if self.is_changing() && round < CHANGE_ROUNDS {
                    self.write_between(at);
                    self.change(at);
                }
                if goes_on(round) && self.rng.random_bool(0.3) {
                    self.write(at);
                }
                while self.nodes[at].decoded < self.nodes[at].server.wal.len() {
                    self.decode(at);
                }
                self.nodes[at].heartbeat();
                let order = self.order();
                self.nodes[at].begin_apply(self.max_txns, &order, self.strict);
                self.nodes[at].begin_repair();
                while self.nodes[at].open.is_some() {
                    self.nodes[at].step_apply();
                    self.decode(at);
                }
                self.nodes[at].forget();
                self.nodes[at].flush_log();
                for from in (0..self.nodes.len()).filter(|from| *from != at) {
                    self.transfer(from, at, from, usize::MAX);
                }
            }
            if self.is_at_rest() && !(self.is_changing() && round < CHANGE_ROUNDS) && !goes_on(round) {
                return Ok(());
            }
        }
        Err(Failure::Stuck(format!(
            "{:?}",
            self.nodes.iter().map(|node| &node.repair).collect::<Vec<_>>()
        )))
    }

    fn is_at_rest(&self) -> bool {
        let lengths = |node: &Daemon| -> BTreeMap<NodeId, usize> {
            node.held
                .iter()
                .map(|(origin, items)| (*origin, items.len()))
                .collect()
        };
        self.nodes
            .iter()
            .all(|node| node.is_idle() && lengths(node) == lengths(&self.nodes[0]))
    }

    /// At rest everything is stable, so nothing may be remembered.
    fn check_forgotten(&mut self) -> Result<(), Failure> {
        if self.rules.arbiter == Arbiter::LocalOnEqualTime {
            return Ok(());
        }
        for node in &mut self.nodes {
            node.forget();
            if !node.index.is_empty() || !node.truncates.is_empty() {
                return Err(Failure::Stuck(format!(
                    "{:?} still remembers {:?}",
                    node.node, node.index
                )));
            }
        }
        Ok(())
    }
}
