//! The schedule: sessions write, decoders, appliers and menders come along when they like, links are down; and what must have
//! come out.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use anabranch_conflict::Kind;
use anabranch_conflict::policy::ForeignKeys;
use anabranch_proto::{NodeId, Stamp};
use rand::rngs::StdRng;
use rand::seq::{IndexedRandom, SliceRandom};
use rand::{Rng, SeedableRng};
use uuid::Uuid;

use super::Broken;
use super::node::{Id, Key, Node, Note, Row, Seen, Table, Txn, Writes, children, is_orphan};

const PARENTS: Id = 3;
const CHILDREN: Id = 4;

/// Rounds of a drain until a person looks, and until it is given up.
const PATIENCE: usize = 20;
const ROUNDS_MAX: usize = 80;

/// What went wrong.
#[derive(Debug)]
#[allow(dead_code)] // for people
pub(super) enum Failure {
    /// This node ended with other rows than the first.
    Diverged(NodeId),
    /// A row is not what was written last.
    Wrong(Key),
    /// A row without its parent, or one that was deleted for that, has no line at a node.
    Missing(NodeId, Id),
    /// A node has a line of a row whose parent no concurrent write took.
    Unfounded(NodeId, Id),
    /// A row has no parent in the end, and should have one or be gone.
    Orphan(Id),
    /// A row was deleted that had its parent.
    HadParent(NodeId, Id),
    /// Two nodes brought one parent back, neither knowing of the other.
    Twice(Id),
    /// It did not come to rest.
    Stuck,
}

#[derive(Debug, Default)]
pub(super) struct Counts {
    txns: u64,
    refused: u64,
    pub(super) seen: Seen,
    pub(super) orphans: u64,
    pub(super) closed: u64,
    pub(super) not_known: u64,
    pub(super) twice: u64,
    pub(super) left: u64,
}

impl Counts {
    pub(super) fn add(&mut self, more: &Self) {
        self.txns += more.txns;
        self.refused += more.refused;
        self.add_seen(&more.seen);
        self.orphans += more.orphans;
        self.closed += more.closed;
        self.not_known += more.not_known;
        self.twice += more.twice;
        self.left += more.left;
    }

    fn add_seen(&mut self, more: &Seen) {
        self.seen.incoming += more.incoming;
        self.seen.bereft += more.bereft;
        self.seen.knowing += more.knowing;
        self.seen.fences += more.fences;
        self.seen.repairs += more.repairs;
        self.seen.forgotten += more.forgotten;
        self.seen.mended += more.mended;
        self.seen.not_needed += more.not_needed;
        self.seen.left += more.left;
    }

    /// What every policy has to meet.
    pub(super) const fn all(&self) -> [(&'static str, u64); 8] {
        [
            ("transactions", self.txns),
            ("refused sessions", self.refused),
            ("children that come in without their parents", self.seen.incoming),
            ("children whose parents go", self.seen.bereft),
            ("changes of rows without parents", self.seen.knowing),
            ("fences before an orphan is judged", self.seen.fences),
            ("repairs", self.seen.repairs),
            ("forgotten versions", self.seen.forgotten),
        ]
    }
}

struct Cluster {
    rng: StdRng,
    nodes: Vec<Node>,
    offset_us: Vec<i64>,
    now_us: i64,
    /// Pairs of a node and an origin that it does not hear.
    down: BTreeSet<(NodeId, NodeId)>,
    /// Do sessions change and delete children, too, and two nodes insert the same one?
    changes_children: bool,
    /// Transactions in one apply transaction, at most.
    most: usize,
    value: u64,
    counts: Counts,
    all: Vec<Rc<Txn>>,
}

pub(super) fn run(
    seed: u64,
    policy: ForeignKeys,
    broken: Option<Broken>,
    trace: bool,
) -> Result<Counts, Failure> {
    let mut rng = StdRng::seed_from_u64(seed);
    let ids: Vec<NodeId> = (1..=rng.random_range(2..=5)).map(NodeId).collect();
    let offset_us = ids.iter().map(|_| rng.random_range(-300..300)).collect();
    let steps = rng.random_range(30..200);
    let mut cluster = Cluster {
        nodes: ids
            .iter()
            .map(|id| Node::new(*id, &ids, policy, broken))
            .collect(),
        offset_us,
        now_us: 1_000_000,
        down: BTreeSet::new(),
        changes_children: rng.random_bool(0.5),
        most: rng.random_range(1..=4),
        value: 0,
        counts: Counts::default(),
        all: Vec::new(),
        rng,
    };
    cluster.nodes.iter_mut().for_each(|node| node.trace = trace);
    for _ in 0..steps {
        cluster.step();
    }
    cluster.drain()?;
    cluster.judge(policy)?;
    for node in &cluster.nodes {
        cluster.counts.add_seen(&node.seen);
    }
    Ok(cluster.counts)
}

impl Cluster {
    fn step(&mut self) {
        self.now_us += self.rng.random_range(0..100);
        let at = self.rng.random_range(0..self.nodes.len());
        let mut sent = Vec::new();
        match self.rng.random_range(0..100) {
            0..28 => self.write(at),
            28..50 => sent.extend(self.nodes[at].decode()),
            50..78 => drop(self.apply(at, &mut sent)),
            78..82 => self.nodes[at].repair(&mut sent),
            82..90 => drop(self.mend(at)),
            90..95 => self.nodes[at].forget(),
            95..96 => self.nodes[at].restart(),
            96..98 => {
                let origin = self.rng.random_range(0..self.nodes.len());
                let link = (self.nodes[at].id, self.nodes[origin].id);
                self.down.insert(link);
            }
            _ => drop(self.down.pop_first()),
        }
        self.send(sent);
    }

    fn apply(&mut self, at: usize, sent: &mut Vec<Rc<Txn>>) -> bool {
        let id = self.nodes[at].id;
        let origins = self.nodes.iter().map(|node| node.id);
        let mut order: Vec<NodeId> = origins
            .filter(|origin| !self.down.contains(&(id, *origin)))
            .collect();
        order.shuffle(&mut self.rng);
        let most = self.rng.random_range(1..=self.most);
        self.nodes[at].apply(&order, most, sent)
    }

    fn mend(&mut self, at: usize) -> Vec<Uuid> {
        let now_us = self.now_us + self.offset_us[at];
        self.nodes[at].mend(now_us)
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

    fn row(&mut self, parent: Option<Id>) -> Option<Row> {
        self.value += 1;
        let value = self.value;
        Some(Row { parent, value })
    }

    /// A session runs one to three statements. None at all is a heartbeat.
    fn write(&mut self, at: usize) {
        let mut after = self.nodes[at].table.clone();
        let mut writes = Writes::new();
        for _ in 0..self.rng.random_range(0..=3) {
            for (key, row) in self.statement(at, &after) {
                match row {
                    Some(row) => after.insert(key, row),
                    None => after.remove(&key),
                };
                writes.insert(key, row);
            }
        }
        // A row that came and went in one transaction was never there.
        let table = &self.nodes[at].table;
        writes.retain(|key, row| row.is_some() || table.contains_key(key));
        let now_us = self.now_us + self.offset_us[at];
        if self.nodes[at].write(writes, now_us) {
            self.counts.txns += 1;
        } else {
            self.counts.refused += 1;
        }
    }

    fn statement(&mut self, at: usize, table: &Table) -> Writes {
        let mut writes = Writes::new();
        let parent = self.rng.random_range(0..PARENTS);
        let child = self.rng.random_range(0..CHILDREN);
        let parents: Vec<Id> = (0..PARENTS)
            .filter(|id| table.contains_key(&Key::Parent(*id)))
            .collect();
        let before = table.get(&Key::Child(child)).copied();
        let is_own = usize::from(child) % self.nodes.len() == at;
        match self.rng.random_range(0..100) {
            0..30 => {
                let row = self.row(None);
                writes.insert(Key::Parent(parent), row);
            }
            30..60 if before.is_none() && (self.changes_children || is_own) => {
                if let Some(&to) = parents.choose(&mut self.rng) {
                    let row = self.row(Some(to));
                    writes.insert(Key::Child(child), row);
                }
            }
            30..75 if before.is_some() && self.changes_children => {
                let to = match parents.choose(&mut self.rng) {
                    Some(&to) if self.rng.random_bool(0.4) => Some(to),
                    _ => before.and_then(|row| row.parent),
                };
                let gone = self.rng.random_bool(0.2);
                let row = self.row(to).filter(|_| !gone);
                writes.insert(Key::Child(child), row);
            }
            75.. if table.contains_key(&Key::Parent(parent)) => {
                // With its children, or the server refuses it where there are any.
                if self.changes_children && self.rng.random_bool(0.5) {
                    writes.extend(children(table, parent).map(|(child, _)| (Key::Child(child), None)));
                }
                writes.insert(Key::Parent(parent), None);
            }
            _ => {}
        }
        writes
    }

    fn drain(&mut self) -> Result<(), Failure> {
        self.down.clear();
        for round in 0..ROUNDS_MAX {
            let mut left: Vec<(usize, Uuid)> = Vec::new();
            for at in 0..self.nodes.len() {
                let mut sent = Vec::new();
                self.nodes[at].fence(&mut sent);
                while self.apply(at, &mut sent) {}
                self.nodes[at].repair(&mut sent);
                left.extend(self.mend(at).into_iter().map(|other| (at, other)));
                self.send(sent);
                self.nodes[at].forget();
            }
            let is_mended = self
                .nodes
                .iter()
                .all(|node| node.policy == ForeignKeys::Keep || node.open().is_empty());
            if is_mended && self.nodes.iter().all(Node::is_quiet) {
                return Ok(());
            }
            if round >= PATIENCE {
                self.close(&left);
            }
            // So that all hear what the others have applied.
            self.now_us += 10;
            for at in 0..self.nodes.len() {
                if !is_mended {
                    let now_us = self.now_us + self.offset_us[at];
                    self.nodes[at].write(Writes::new(), now_us);
                }
            }
        }
        Err(Failure::Stuck)
    }

    /// A person closes lines of others that these nodes wait for, where the others are done with them.
    fn close(&mut self, left: &[(usize, Uuid)]) {
        for (at, other) in left {
            let writer = self.nodes[*at].log[other].writer;
            let at_writer = self.nodes.iter().find(|node| node.id == writer).unwrap();
            let is_done = at_writer.log.get(other).is_none_or(|line| line.note.is_some());
            if is_done {
                self.counts.closed += 1;
                self.nodes[*at].log.get_mut(other).unwrap().note = Some(Note::Closed);
            }
        }
    }

    fn judge(&mut self, policy: ForeignKeys) -> Result<(), Failure> {
        let table = self.nodes[0].table.clone();
        if let Some(other) = self.nodes.iter().find(|node| node.table != table) {
            return Err(Failure::Diverged(other.id));
        }
        let by_stamp: BTreeMap<Stamp, Rc<Txn>> =
            self.all.iter().map(|txn| (txn.stamp, Rc::clone(txn))).collect();
        let mut last: BTreeMap<Key, &Rc<Txn>> = BTreeMap::new();
        for txn in by_stamp.values() {
            last.extend(txn.writes.keys().map(|key| (*key, txn)));
        }
        for (key, txn) in &last {
            if table.get(key).copied() != txn.writes[key] {
                return Err(Failure::Wrong(*key));
            }
        }
        self.check_founded(&by_stamp)?;
        for child in (0..CHILDREN).filter(|child| is_orphan(&table, *child)) {
            self.counts.orphans += 1;
            let parent = table[&Key::Child(child)].parent.unwrap();
            let (version, removed) = (last[&Key::Child(child)], last[&Key::Parent(parent)]);
            self.check_told(child, parent, version, removed)?;
            if policy == ForeignKeys::Keep {
                continue;
            }
            let lines = self.nodes.iter().flat_map(|node| node.log.values());
            let mut lines = lines.filter(|line| line.child == child && line.parent == parent);
            if self.is_left(child, version, removed) {
                self.counts.left += 1;
            } else if lines.any(|line| line.note == Some(Note::NotKnown)) {
                self.counts.not_known += 1;
            } else {
                return Err(Failure::Orphan(child));
            }
        }
        self.check_mended(policy, &by_stamp)
    }

    /// Every line is of a row whose parent a concurrent transaction took.
    fn check_founded(&self, by_stamp: &BTreeMap<Stamp, Rc<Txn>>) -> Result<(), Failure> {
        for node in &self.nodes {
            for line in node.log.values() {
                let unfounded = Err(Failure::Unfounded(node.id, line.child));
                let Some(version) = line.version else {
                    return unfounded;
                };
                let wrote = &by_stamp[&version.stamp];
                let row = wrote.writes[&Key::Child(line.child)];
                let took = |txn: &&Rc<Txn>| {
                    let takes = txn
                        .writes
                        .get(&Key::Parent(line.parent))
                        .is_some_and(Option::is_none);
                    let unseen = !txn.is_in(&wrote.deps) && !wrote.is_in(&txn.deps);
                    takes && (unseen || self.came_back(node.id, line.parent, txn))
                };
                let is_child = row.and_then(|row| row.parent) == Some(line.parent);
                if !is_child || !by_stamp.values().any(|txn| took(&txn)) {
                    return unfounded;
                }
            }
        }
        Ok(())
    }

    /// Had a node, where a session had deleted the parent, that again for a while, since a concurrent write of it came in that lost
    /// to the deletion before this was decoded? Then it was the parent of what came in, or was written, meanwhile.
    fn came_back(&self, node: NodeId, parent: Id, removed: &Txn) -> bool {
        let puts = |txn: &&Rc<Txn>| txn.writes.get(&Key::Parent(parent)).is_some_and(Option::is_some);
        let lost = |txn: &&Rc<Txn>| !txn.is_in(&removed.deps) && txn.stamp < removed.stamp;
        removed.stamp.node == node && self.all.iter().any(|txn| puts(&txn) && lost(&txn))
    }

    /// Was it an update of a row that was shown once more, after a session had deleted it, until that was decoded?
    fn was_deleted(&self, child: Id, version: &Txn) -> bool {
        let seen = self.all.iter().filter(|txn| txn.is_in(&version.deps));
        let seen = seen.filter(|txn| txn.writes.contains_key(&Key::Child(child)));
        let last = seen.max_by_key(|txn| txn.stamp);
        last.is_none_or(|txn| txn.writes[&Key::Child(child)].is_none())
    }

    /// A row without its parent has a line at every node, under the version that it has. Where who wrote that knew that it had no
    /// parent, one that this had seen has a line: at all nodes that had that orphan, which need not be all.
    fn check_told(&self, child: Id, parent: Id, version: &Txn, removed: &Txn) -> Result<(), Failure> {
        let knew = removed.is_in(&version.deps);
        let is_told = |node: &&Node| {
            let lines = node.log.values();
            let mut lines = lines.filter(|line| line.child == child && line.parent == parent);
            lines.any(|line| {
                let of = line.version.unwrap();
                of.stamp == version.stamp || knew && of.covered_by(&version.deps)
            })
        };
        let told = self.nodes.iter().filter(is_told).count();
        let is_enough = knew && (told > 0 || self.was_deleted(child, version));
        if told < self.nodes.len() && !is_enough {
            let untold = self.nodes.iter().find(|node| !is_told(node)).unwrap();
            return Err(Failure::Missing(untold.id, child));
        }
        Ok(())
    }

    /// A row that has no parent in the end stays only where somebody changed it, knowing that, while another node deleted it, or had
    /// written it unseen: it may have no line where it would have to be mended.
    fn is_left(&self, child: Id, version: &Txn, removed: &Txn) -> bool {
        let writes = |txn: &&Rc<Txn>| txn.writes.contains_key(&Key::Child(child));
        let unseen = |txn: &&Rc<Txn>| !txn.is_in(&version.deps) && !version.is_in(&txn.deps);
        removed.is_in(&version.deps) && self.all.iter().any(|txn| writes(&txn) && unseen(&txn))
    }

    /// What was mended is logged everywhere, was to be mended, and by one alone.
    fn check_mended(
        &mut self,
        policy: ForeignKeys,
        by_stamp: &BTreeMap<Stamp, Rc<Txn>>,
    ) -> Result<(), Failure> {
        let mut mended: Vec<&Rc<Txn>> = by_stamp.values().filter(|txn| txn.mends.is_some()).collect();
        for txn in &mended {
            let (key, id) = (*txn.writes.keys().next().unwrap(), txn.mends.unwrap());
            let own = self.nodes.iter().find(|node| node.id == txn.stamp.node).unwrap();
            let child = own.log[&id].child;
            // As far as it had seen them, the row referred to a parent that was gone.
            let last_of = |key: Key| {
                let mut seen = by_stamp.values().filter(|other| other.is_in(&txn.deps));
                seen.rfind(|other| other.writes.contains_key(&key))
            };
            let version = last_of(Key::Child(child)).unwrap();
            let Some(row) = version.writes[&Key::Child(child)] else {
                // It was deleted, and shown once more until the decoder had met that.
                continue;
            };
            let parent = row.parent.unwrap();
            let removed = last_of(Key::Parent(parent)).unwrap();
            if removed.writes[&Key::Parent(parent)].is_some() {
                return Err(Failure::HadParent(txn.stamp.node, child));
            }
            // Where a node had deleted the parent it may have been there until it was written again.
            if !self.came_back(removed.stamp.node, parent, removed) {
                self.check_told(child, parent, version, removed)?;
            }
            if policy == ForeignKeys::RestoreParent {
                let is_back = txn.version(key).is_some_and(|version| version.kind == Kind::Put);
                assert!(is_back, "a parent is inserted");
            }
        }
        if policy != ForeignKeys::RestoreParent {
            return Ok(());
        }
        let line_of = |node: NodeId, line: Uuid| {
            let mut nodes = self.nodes.iter().filter(|it| it.id == node);
            nodes.find_map(|it| it.log.get(&line)).map(|line| line.child)
        };
        while let Some(one) = mended.pop() {
            let key = one.writes.keys().next().unwrap();
            let twice = |other: &&&Rc<Txn>| {
                other.writes.contains_key(key) && !other.is_in(&one.deps) && !one.is_in(&other.deps)
            };
            for other in mended.iter().filter(twice) {
                let Key::Parent(parent) = *key else {
                    unreachable!("a parent is inserted")
                };
                // Each has the line of the other. (A version that was nowhere but where it was written, since another write of the
                // row won, has its line there alone.)
                let theirs = line_of(one.stamp.node, other.mends.unwrap());
                let own = line_of(other.stamp.node, one.mends.unwrap());
                if theirs.is_some() && own.is_some() {
                    return Err(Failure::Twice(parent));
                }
                self.counts.twice += 1;
            }
        }
        Ok(())
    }
}
