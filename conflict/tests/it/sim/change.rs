//! A policy that is changed while everything goes on: who decides by what, when the change is made, when the policy of before is
//! forgotten.

use std::rc::Rc;
use std::sync::{Arc, OnceLock};

use anabranch_conflict::Version;
use anabranch_conflict::change::{Change, Chooser, Point};
use anabranch_conflict::frontier::{Deletes, Order, Policy};
use anabranch_conflict::merge::Step;
use anabranch_conflict::script::{Candidate, Script};
use anabranch_proto::{NodeId, Stamp, Vector};
use rand::Rng;

use super::cluster::Cluster;
use super::daemon::Daemon;
use super::scripted::{HIGHEST, MIDDLE};
use super::{Arbiter, Choice, Merging, Rules, Txn, Writes, priority};

/// How one version of a frontier is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pick {
    /// The highest stamp. Of rows under it alone one version is kept.
    Last,
    /// The lowest stamp.
    First,
    /// The preferred node.
    Preferred,
    /// A delete, then the highest stamp.
    Deletes,
    /// See [`Choice::Highest`].
    Highest,
    /// See [`Choice::Middle`].
    Middle,
}

/// From one to another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Switch {
    pub(crate) old: Pick,
    pub(crate) new: Pick,
    pub(crate) how: How,
}

/// When a node decides by which.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum How {
    /// As `anabranch_conflict::change` says.
    AtAPlaceOfEachStream,
    /// Wrong: by the new one as soon as it has heard of the change.
    OnHearing,
    /// Wrong: by the new one where what comes last is new.
    ByTheLastVersion,
    /// Wrong: the change is made although some keep one version of a row.
    Unasked,
    /// Wrong: the policy of before is forgotten as soon as all have made the change.
    Hasty,
}

/// How far a daemon is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Stage {
    /// Decides by the policy of before alone.
    Before,
    /// Keeps the frontier, and decides by either.
    Either,
    /// Decides by the new one alone.
    After,
}

fn script(at: usize, text: &str) -> Arc<Script> {
    static SCRIPTS: [OnceLock<Arc<Script>>; 2] = [const { OnceLock::new() }; 2];
    Arc::clone(SCRIPTS[at].get_or_init(|| Arc::new(Script::new("test", text).unwrap())))
}

impl Pick {
    fn policy(self) -> Option<Policy> {
        let (order, deletes) = match self {
            Self::Last => (Order::LastUpdateWins, Deletes::ByStamp),
            Self::First => (Order::FirstUpdateWins, Deletes::ByStamp),
            Self::Preferred => {
                let priorities = (1..=9).map(|node| (NodeId(node), priority(NodeId(node))));
                (Order::OriginPriority(priorities.collect()), Deletes::ByStamp)
            }
            Self::Deletes => (Order::LastUpdateWins, Deletes::DeleteWins),
            Self::Highest | Self::Middle => return None,
        };
        Some(Policy { order, deletes })
    }

    fn chooser(self) -> Chooser {
        match (self, self.policy()) {
            (_, Some(policy)) => Chooser::Order(policy),
            (Self::Highest, None) => Chooser::Script(script(0, HIGHEST)),
            (_, None) => Chooser::Script(script(1, MIDDLE)),
        }
    }

    /// How a daemon decides that knows of nothing else.
    fn alone(self) -> Arbiter {
        match (self, self.policy()) {
            (Self::Last, _) => Arbiter::LastWriter,
            (_, Some(policy)) => Arbiter::Ranked(policy),
            (Self::Highest, None) => Arbiter::Merged(Merging::Chosen(Choice::Highest)),
            (_, None) => Arbiter::Merged(Merging::Chosen(Choice::Middle)),
        }
    }

    /// Said otherwise than the crate does: of versions in stamp order, each with its node and last column (`None`: deleted), the
    /// place of the one that must be chosen.
    pub(crate) fn meant(self, versions: &[(NodeId, Option<i64>)]) -> usize {
        let last: Vec<Option<i64>> = versions.iter().map(|(_, last)| *last).collect();
        let highest = |rank: &dyn Fn(usize) -> u32| {
            let places = (0..versions.len()).max_by_key(|&at| (rank(at), at));
            places.unwrap()
        };
        match self {
            Self::Last => versions.len() - 1,
            Self::First => 0,
            Self::Preferred => highest(&|at| priority(versions[at].0)),
            Self::Deletes => highest(&|at| u32::from(last[at].is_none())),
            Self::Highest => Choice::Highest.meant(&last),
            Self::Middle => Choice::Middle.meant(&last),
        }
    }
}

impl Switch {
    pub(crate) fn rules(self) -> Rules {
        Rules {
            arbiter: Arbiter::Merged(Merging::Chosen(Choice::Changed(self))),
            change: Some(self),
            ..Rules::default()
        }
    }

    /// The version that the row becomes.
    pub(crate) fn chosen(
        self,
        versions: &[Version],
        new: &[bool],
        candidates: impl FnOnce() -> Vec<Candidate>,
    ) -> Stamp {
        let change = Change::new(self.old.chooser(), self.new.chooser());
        change.choose(versions, new, candidates).unwrap().chosen
    }
}

impl Daemon {
    fn switch(&self) -> Option<Switch> {
        self.rules.change
    }

    /// The rules of a daemon that has come so far.
    fn rules_at(rules: &Rules, stage: Stage) -> Rc<Rules> {
        let Some(switch) = rules.change else {
            return Rc::new(rules.clone());
        };
        let arbiter = match stage {
            Stage::Before => switch.old.alone(),
            Stage::Either => Arbiter::Merged(Merging::Chosen(Choice::Changed(switch))),
            Stage::After => switch.new.alone(),
        };
        Rc::new(Rules {
            arbiter,
            ..rules.clone()
        })
    }

    /// Begins anew with other rules.
    pub(crate) fn enter(&mut self, stage: Stage, rng: &mut rand::rngs::StdRng) {
        self.stage = stage;
        self.rules = Self::rules_at(&self.rules, stage);
        self.crash(rng);
    }

    pub(crate) fn begin_at(&mut self, stage: Stage) {
        self.stage = stage;
        self.rules = Self::rules_at(&self.rules, stage);
    }

    /// Meets a transaction that may be the one that makes the change.
    pub(crate) fn learn_change(&mut self, txn: &Txn) {
        if txn.writes.change {
            self.point = Some(Point {
                node: txn.stamp.node,
                position: txn.position,
            });
        }
    }

    /// Of each version, is it new?
    pub(crate) fn are_new(&self, versions: &[(Version, Vector)]) -> Vec<bool> {
        let Some(point) = self.point else {
            return vec![false; versions.len()];
        };
        let how = self.switch().map(|switch| switch.how);
        let is_new = |deps: &Vector| point.seen_by(deps);
        match how {
            Some(How::OnHearing) => vec![true; versions.len()],
            Some(How::ByTheLastVersion) => {
                let last = versions.last().is_some_and(|(_, deps)| is_new(deps));
                vec![last; versions.len()]
            }
            _ => versions.iter().map(|(_, deps)| is_new(deps)).collect(),
        }
    }

    /// Looks whether the policy of before is needed no more.
    pub(crate) fn look_back(&mut self) {
        let (Some(point), Stage::Either) = (self.point, self.stage) else {
            return;
        };
        let stable = self.stability.stable();
        let is_done = self.retreat.meet(point, &stable, &self.applied, &self.settled);
        let hasty = self.switch().is_some_and(|switch| switch.how == How::Hasty);
        self.done |= is_done || hasty && stable.covers(point.node, point.position);
    }
}

impl Cluster {
    /// Takes the change a step on: members keep whole frontiers, it is made, it is over.
    pub(super) fn change(&mut self, at: usize) {
        let Some(switch) = self.rules.change else { return };
        let all = |nodes: &[Daemon], stage: Stage| nodes.iter().all(|node| node.stage >= stage);
        if !self.changing {
            // Who joins is waited for.
            self.changing = self.joining.is_empty();
            return;
        }
        let unasked = switch.how == How::Unasked && self.nodes.iter().any(|node| node.stage > Stage::Before);
        if !self.made && (all(&self.nodes, Stage::Either) || unasked) {
            if self.trace {
                eprintln!("{:?} makes the change", self.nodes[at].node);
            }
            let writes = Writes {
                change: true,
                ..Writes::default()
            };
            self.nodes[at].server.commit_local(writes, self.now_us);
            self.nodes[at].counts.changes += 1;
            self.made = true;
        } else if !self.made && self.nodes[at].stage == Stage::Before {
            self.nodes[at].enter(Stage::Either, &mut self.rng);
        } else if self.nodes[at].stage == Stage::Either {
            self.nodes[at].saved |= self.nodes[at].point.is_some();
            // What is settled lies before it.
            self.nodes[at].checkpoint();
            self.nodes[at].look_back();
            let may = if switch.how == How::Hasty {
                self.nodes[at].done
            } else {
                self.nodes.iter().all(|node| node.done)
            };
            if may && self.rng.random_bool(0.5) {
                if self.trace {
                    eprintln!("{:?} forgets the policy of before", self.nodes[at].node);
                }
                self.nodes[at].enter(Stage::After, &mut self.rng);
                self.nodes[at].counts.switched += 1;
            }
        }
    }

    /// Is a change begun, and not over at every node?
    pub(super) fn is_changing(&self) -> bool {
        self.changing && self.nodes.iter().any(|node| node.stage < Stage::After)
    }

    /// Writes of the time when some have forgotten the policy of before and others have not.
    pub(super) fn write_between(&mut self, at: usize) {
        if self.rng.random_bool(0.3) {
            let some = self.nodes.iter().any(|node| node.stage == Stage::After);
            self.nodes[at].counts.between += u32::from(some);
            self.write(at);
        }
    }

    /// May a node begin to join, from this donor?
    pub(super) fn may_join(&self, donor: usize) -> bool {
        !self.changing
            || self.nodes[donor].stage == Stage::After
                && self.nodes.iter().all(|node| node.stage == Stage::After)
    }
}

/// Of writes that no other has seen, in stamp order, what must be chosen: `old` tells of each whether it had not seen the change.
pub(crate) fn meant(switch: Switch, versions: &[(NodeId, Option<i64>)], old: &[bool]) -> usize {
    let pick = if old.iter().any(|old| *old) {
        switch.old
    } else {
        switch.new
    };
    pick.meant(versions)
}

/// What steps a row has, as they are asked about.
pub(crate) fn versions_of(steps: &[&Step]) -> Vec<(Version, Vector)> {
    let of = |step: &&Step| (step.version, step.deps.clone());
    steps.iter().map(of).collect()
}
