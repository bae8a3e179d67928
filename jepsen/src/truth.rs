//! What must have been decided: stamps, dependencies and versions, computed from the servers' WAL alone.
//!
//! In:   a [`History`] whose commits are complete        Out: [`Truth`]
//! Holds: every version of every row, with stamp and dependencies
//! Invariants: nothing that a daemon says of itself goes in, but for the stamps in progress rows, which raise the clock,
//!        and which [`Truth::misstamped`] compares with what they should be
//! Not here: judging (`crate::checker`)
//!
//! The fold is `anabranch-conflict`'s own: its laws are proved and simulated there. Decoding, journal, links and
//! applying, which this harness is after, have no part in it.

use std::collections::{BTreeMap, HashMap, HashSet};

use anabranch_conflict::{Fold, Kind};
use anabranch_proto::stamp::NTP64;
use anabranch_proto::{Lsn, NodeId, Position, Stamp, Vector};

use crate::history::{Act, Commit, First, Healed, History, Op, Stage};

/// `clock.max_drift_ms` as the clusters here have it, microseconds.
const MAX_DRIFT_US: i64 = 60_000_000;

/// A row's name.
pub type Row = (String, i64);

/// One version of one row.
#[derive(Debug, Clone)]
pub struct Version {
    /// The transaction's witness; `None` for what was there before the load.
    pub txn: Option<i64>,
    /// Where it was written.
    pub node: NodeId,
    /// End of its commit record there.
    pub position: Position,
    /// The order of everything.
    pub stamp: Stamp,
    /// What its transaction had seen.
    pub deps: std::rc::Rc<Vector>,
    /// `None` for a delete.
    pub value: Option<i64>,
}

impl Version {
    /// Had `other`'s transaction seen this version?
    pub fn covered_by(&self, other: &Self) -> bool {
        other.deps.covers(self.node, self.position)
    }

    /// As much of it as decisions need.
    pub fn decided(&self) -> anabranch_conflict::Version {
        anabranch_conflict::Version {
            stamp: self.stamp,
            position: self.position,
            kind: match self.value {
                Some(_) => Kind::Put,
                None => Kind::Delete,
            },
        }
    }

    /// Neither saw the other.
    pub fn concurrent_with(&self, other: &Self) -> bool {
        self.stamp != other.stamp && !self.covered_by(other) && !other.covered_by(self)
    }
}

/// By node and place in its WAL, what its transaction there was stamped, and had seen.
type Places = HashMap<(u16, u64), (Stamp, std::rc::Rc<Vector>)>;

/// The truth of a history.
#[derive(Debug, Default)]
pub struct Truth {
    /// Per row its versions, by stamp, lowest first.
    pub rows: BTreeMap<Row, Vec<Version>>,
    /// Per committed transaction with a witness: its stamp.
    pub stamps: HashMap<i64, Stamp>,
    /// Per transaction and node: committed or applied there.
    pub witnessed: HashMap<i64, HashSet<u16>>,
    /// Progress rows that name another stamp for a transaction than its origin's fold gives, or a place where nothing was committed.
    pub misstamped: Vec<String>,
    /// Progress rows whose stamp was compared.
    pub compared: usize,
    /// Where a node applied a transaction before one that it had seen.
    pub misordered: Vec<String>,
    /// Progress rows whose place in the order of that node was looked at.
    pub ordered: usize,
    /// A node's WAL that cannot be folded.
    pub broken: Vec<String>,
}

/// `0123...` of 20 digits as a stamp.
pub fn parse_stamp_bytes(hex: &str) -> Option<Stamp> {
    if hex.len() != 20 {
        return None;
    }
    Some(Stamp {
        time: NTP64(u64::from_str_radix(hex.get(..16)?, 16).ok()?),
        node: NodeId(u16::from_str_radix(hex.get(16..)?, 16).ok()?),
    })
}

/// As in the conflict log: 16 digits, a dot, the node's id.
pub fn parse_stamp(text: &str) -> Option<Stamp> {
    let (time, node) = text.split_once('.')?;
    Some(Stamp {
        time: NTP64(u64::from_str_radix(time, 16).ok()?),
        node: NodeId(node.parse().ok()?),
    })
}

/// Stamps a local transaction. What is written again after a gap is stamped as of when it was written, at most.
fn begin(fold: &mut Fold, commit: &Commit) -> Stamp {
    let witness = fold.witness_us();
    if let Some(us) = commit.again_us {
        fold.witness(us.saturating_sub(MAX_DRIFT_US));
    }
    let stamp = fold.begin_local(commit.commit_us, MAX_DRIFT_US).stamp;
    if let Some(us) = commit.again_us {
        fold.witness(witness.unwrap_or(us));
    }
    stamp
}

/// Per node: up to where its WAL was read whole, so that whatever others applied of it is known. Nodes are read one after the other, and
/// clock witnesses go on meanwhile. Where members change, the places of what they say of that are not known, and where a node was healed
/// its stream begins anew: there nothing is said.
fn read_up_to(history: &History) -> HashMap<u16, u64> {
    let mut ends = HashMap::new();
    if history.end().is_none_or(|end| !end.lost.is_empty()) {
        return ends;
    }
    for commit in history.commits() {
        let end = ends.entry(commit.node).or_insert(0);
        *end = commit.lsn.max(*end);
    }
    for healed in history.healed() {
        ends.remove(&healed.node);
    }
    ends
}

impl Truth {
    /// Folds every node's WAL.
    pub fn of(history: &History) -> Self {
        let mut truth = Self::default();
        let mut by_position = Places::new();
        let mut named: Vec<(u16, u16, u64, String)> = Vec::new();
        for node in history.nodes() {
            truth.fold(history, node, &mut by_position, &mut named);
        }
        for versions in truth.rows.values_mut() {
            versions.sort_by_key(|version| version.stamp);
        }
        if !history.header.is_anabranch() {
            // Stamps are Anabranch's: of others only what committed where is known.
            truth.rows.clear();
            truth.stamps.clear();
        }
        truth.order(history, &by_position);
        let read_up_to = read_up_to(history);
        for (node, origin, lsn, text) in named {
            // The row that names a transaction as the daemon's own where there is nothing else to say.
            if lsn == 0 {
                continue;
            }
            let Some((expected, _)) = by_position.get(&(origin, lsn)) else {
                if read_up_to.get(&origin).is_some_and(|&end| lsn <= end) {
                    truth.misstamped.push(format!(
                        "n{node} applied something of n{origin} at {}, where nothing was committed",
                        Lsn(lsn)
                    ));
                }
                continue;
            };
            let Some(found) = parse_stamp_bytes(&text) else {
                truth.misstamped.push(format!(
                    "n{node} applied the transaction of n{origin} at {} as stamped `{text}`, which is no stamp",
                    Lsn(lsn)
                ));
                continue;
            };
            truth.compared += 1;
            if *expected != found {
                truth.misstamped.push(format!(
                    "n{node} applied the transaction of n{origin} at {} as stamped {found}, its own WAL says {expected}",
                    Lsn(lsn)
                ));
            }
        }
        truth
    }

    /// Did every node apply what a transaction had seen before it, or with it? Where members change, or a node was healed, streams end and
    /// begin elsewhere: there nothing is said.
    fn order(&mut self, history: &History, by_position: &Places) {
        let changes = history.end().is_none_or(|end| !end.lost.is_empty());
        if changes || history.healed().next().is_some() || !history.header.is_anabranch() {
            return;
        }
        let mut applied: HashMap<u16, BTreeMap<u16, u64>> = HashMap::new();
        for commit in history.commits().filter(|commit| commit.first == First::Progress) {
            let node = commit.node;
            let applied = applied.entry(node).or_default();
            let of_others = commit.progress.iter();
            let of_others = of_others.filter(|(origin, lsn, _)| *origin != node && *lsn > 0);
            for (origin, lsn, _) in of_others.clone() {
                let upto = applied.entry(*origin).or_insert(0);
                if *lsn < *upto {
                    self.misordered.push(format!(
                        "n{node} says at {} that it has applied n{origin} up to {}, and had said {}",
                        Lsn(commit.lsn),
                        Lsn(*lsn),
                        Lsn(*upto)
                    ));
                }
                *upto = (*upto).max(*lsn);
            }
            for (origin, lsn, _) in of_others {
                let Some((_, deps)) = by_position.get(&(*origin, *lsn)) else {
                    continue;
                };
                self.ordered += 1;
                // Its own it has, and those of one node come in their order.
                for (of, position) in deps.iter().filter(|(of, _)| of.0 != node && of.0 != *origin) {
                    let upto = applied.get(&of.0).copied().unwrap_or(0);
                    if upto < position.lsn.0 {
                        self.misordered.push(format!(
                            "n{node} applied at {} the transaction of n{origin} at {}, which had seen n{} up to {}, and had n{} up to {}",
                            Lsn(commit.lsn),
                            Lsn(*lsn),
                            of.0,
                            position.lsn,
                            of.0,
                            Lsn(upto)
                        ));
                    }
                }
            }
        }
    }

    fn fold(
        &mut self,
        history: &History,
        node: u16,
        by_position: &mut Places,
        named: &mut Vec<(u16, u16, u64, String)>,
    ) {
        let mut fold = Fold::new(NodeId(node));
        let gaps: Vec<&Healed> = history.healed().filter(|healed| healed.node == node).collect();
        for commit in history.commits().filter(|commit| commit.node == node) {
            for &witness in &commit.witnesses {
                self.witnessed.entry(witness).or_default().insert(node);
            }
            match commit.first {
                First::Nothing => continue,
                First::Progress => {
                    let entries = commit.progress.iter().filter_map(|(origin, lsn, stamp)| {
                        Some((NodeId(*origin), Position::new(1, *lsn), parse_stamp_bytes(stamp)?))
                    });
                    fold.echo(entries);
                    let names = commit.progress.iter().cloned();
                    named.extend(names.map(|(origin, lsn, stamp)| (node, origin, lsn, stamp)));
                    continue;
                }
                First::Clock | First::User => {}
            }
            // Nobody ever decoded it: what is left of it comes again, as other transactions.
            if gaps
                .iter()
                .any(|gap| commit.lsn > gap.journaled && commit.lsn <= gap.slot_at)
            {
                continue;
            }
            if let (First::Clock, Some(us)) = (commit.first, commit.clock_us) {
                fold.witness(us);
            }
            let stamp = begin(&mut fold, commit);
            let position = Position::new(1, commit.lsn);
            let deps = match fold.commit_local(position) {
                Ok(deps) => std::rc::Rc::new(deps),
                Err(error) => {
                    self.broken.push(format!("n{node}: {error}"));
                    return;
                }
            };
            by_position.insert((node, commit.lsn), (stamp, std::rc::Rc::clone(&deps)));
            for &txn in &commit.witnesses {
                self.stamps.insert(txn, stamp);
            }
            let mut last: BTreeMap<Row, Option<i64>> = BTreeMap::new();
            for step in &commit.rows {
                let value = if step.act == Act::Delete { None } else { step.value };
                last.insert((step.table.clone(), step.key), value);
            }
            for (row, value) in last {
                // Of rows written again each names its own transaction.
                let by_value = value.map(|value| value / 10);
                let own = by_value.filter(|txn| commit.witnesses.contains(txn));
                self.rows.entry(row).or_default().push(Version {
                    txn: own.or(commit.witnesses.first().copied()),
                    node: NodeId(node),
                    position,
                    stamp,
                    deps: std::rc::Rc::clone(&deps),
                    value,
                });
            }
        }
    }

    /// Is the version at some node that is left? What a lost node did not send is lost with it.
    pub fn arrived(&self, version: &Version, history: &History) -> bool {
        if !history.lost(version.node.0) {
            return true;
        }
        let nodes = version.txn.and_then(|txn| self.witnessed.get(&txn));
        // What was there before the load was at every node before it.
        nodes.is_none_or(|nodes| nodes.iter().any(|&node| !history.lost(node)))
    }

    /// Did the operation's transaction commit, acknowledged or as any node's WAL says?
    pub fn counts(&self, op: &Op) -> bool {
        op.stage == Stage::Ok || (op.stage == Stage::Info && self.committed(op.txn))
    }

    /// Did the transaction commit, as far as any node's WAL says?
    pub fn committed(&self, txn: i64) -> bool {
        self.witnessed.contains_key(&txn)
    }
}
