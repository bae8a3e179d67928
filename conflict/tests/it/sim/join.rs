//! A node joins while everything goes on: a donor makes it a member in its own stream, its rows are copied at one
//! place of the donor's WAL, and with them goes what the donor remembers of rows that are not settled.
//!
//! Nobody is waited for: who has not met the donor's word yet knows the donor only from before it, and so forgets
//! nothing that is not in the copy.

use std::collections::btree_map::Entry;
use std::rc::Rc;

use anabranch_conflict::Fold;
use anabranch_proto::{NodeId, Vector};
use uhlc::NTP64;

use super::checked::Waiting;
use super::cluster::Cluster;
use super::crash::Checkpoint;
use super::daemon::Daemon;
use super::server::Server;
use super::{Item, Joining, Txn, Writes};

/// Most nodes of a cluster.
const NODES_MAX: usize = 5;

/// A join under way.
pub(super) struct Join {
    donor: usize,
    node: NodeId,
    announced: bool,
    copy: Option<Copy>,
}

/// What is copied at one place of the donor's WAL.
struct Copy {
    server: Server,
    /// WAL entries of the donor before the cut.
    upto: usize,
    vector: Vector,
    members: Vec<NodeId>,
    log: std::collections::BTreeMap<uuid::Uuid, (super::Key, anabranch_proto::Stamp)>,
    waiting: Waiting,
}

impl Daemon {
    /// Takes in who becomes a member by a transaction, decoded or applied.
    pub(crate) fn learn(&mut self, txn: &Rc<Txn>) {
        if self.rules.joining != Joining::OnSight {
            for &node in &txn.writes.joins {
                self.admit(node);
            }
        }
    }

    /// From here on nothing is stable that `node` is not known to have applied.
    pub(crate) fn admit(&mut self, node: NodeId) {
        if let Entry::Vacant(held) = self.held.entry(node) {
            held.insert(Vec::new());
            self.cursor.insert(node, 0);
            self.stability.join(node, Vector::new());
        }
    }
}

impl Cluster {
    /// Begins a join at a donor, or takes one that is under way a step on.
    pub(super) fn join(&mut self, at: usize) {
        if !self.joining.is_empty() {
            return self.go_on_joining();
        }
        if self.nodes.len() < NODES_MAX && self.may_join(at) {
            let node = NodeId(u16::try_from(self.nodes.len()).unwrap() + 1);
            self.joining.push(Join {
                donor: at,
                node,
                announced: false,
                copy: None,
            });
        }
    }

    /// One step of the first join.
    pub(super) fn go_on_joining(&mut self) {
        let mut join = self.joining.remove(0);
        let early = self.rules.joining == Joining::AfterCut;
        if join.copy.is_none() && (join.announced || early) {
            join.copy = Some(self.cut(&join));
        } else if !join.announced {
            let writes = Writes {
                joins: vec![join.node],
                ..Writes::default()
            };
            self.nodes[join.donor].server.commit_local(writes, self.now_us);
            join.announced = true;
            // From here on the donor itself forgets nothing that the copy may need.
            while self.nodes[join.donor].decoded < self.nodes[join.donor].server.wal.len() {
                self.decode(join.donor);
            }
        } else if let Some(copy) = join.copy.take() {
            // The donor must have read its own WAL up to the cut, to know what is in it.
            while self.nodes[join.donor].decoded < copy.upto {
                self.decode(join.donor);
            }
            return self.begin(&join, copy);
        }
        self.joining.insert(0, join);
    }

    fn cut(&self, join: &Join) -> Copy {
        let donor = &self.nodes[join.donor];
        let mut members: Vec<NodeId> = donor.held.keys().copied().collect();
        members.push(join.node);
        Copy {
            server: donor.server.copy_of(join.node),
            upto: donor.server.wal.len(),
            vector: donor.server.vector(),
            members,
            log: donor.log.clone(),
            waiting: donor.waiting.committed(),
        }
    }

    fn begin(&mut self, join: &Join, copy: Copy) {
        if self.trace {
            eprintln!(
                "{:?} joins from {:?} at {:?}",
                join.node, self.nodes[join.donor].node, copy.vector
            );
        }
        let donor = &self.nodes[join.donor];
        let mut joiner = Daemon::new(join.node, &copy.members, &donor.all_keys, Rc::clone(&self.rules));
        joiner.begin_at(donor.stage);
        joiner.server = copy.server;
        joiner.joined = true;
        joiner.counts.joins = 1;
        joiner.log = copy.log;
        joiner.waiting = copy.waiting;
        joiner.applied = copy.vector.clone();
        let mut h = NTP64(0);
        for (&origin, items) in donor
            .held
            .iter()
            .filter(|(origin, _)| copy.members.contains(origin))
        {
            let covered = |item: &Item| match item {
                Item::Txn(txn) => copy.vector.covers(origin, txn.position),
                Item::Heartbeat(_) => false,
            };
            for item in items.iter().filter(|item| covered(item)) {
                if let Item::Txn(txn) = item {
                    h = h.max(txn.stamp.time);
                }
            }
            let applied = items.iter().rposition(covered).map_or(0, |last| last + 1);
            joiner.cursor.insert(origin, applied);
            joiner.held.insert(origin, items.clone());
        }
        joiner.fold = Fold::joined(join.node, copy.vector, h);
        joiner.checkpoint = Checkpoint::first(&joiner.fold);
        joiner.start_stability();
        if self.rules.joiner_index {
            (joiner.trimmed, joiner.settled) = (donor.trimmed.clone(), donor.settled.clone());
            joiner.low = donor.low;
            joiner.start_index();
        }
        if self.rules.joiner_repairs {
            joiner.repair.extend(joiner.index.keys().copied());
            // A row that lost to a truncate has no entry, and may be in the copy all the same.
            for key in joiner.all_keys.clone() {
                if joiner.truncates.contains_key(&key.table) && !joiner.index.contains_key(&key) {
                    joiner.keep(key, None, true);
                }
            }
        }
        self.nodes.push(joiner);
        self.offset_us.push(0);
        self.eagerness.push(0.4);
    }
}
