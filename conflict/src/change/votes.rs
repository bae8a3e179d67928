//! What the members say of a change: a set of facts that only grows, so the order in which they arrive does not matter.
//!
//! In:   facts, who is a member        Out: how far a change is, for whom it waits, what a member is to say next
//! Invariants: 1. every member votes once, the one that asked last: its vote makes the change or ends it, and nobody else's does;
//!        2. it makes it only when every other live member is ready; 3. a member is ready for one change at a time
//! On crash: read again
//! Not here: where facts are kept (node)

use std::collections::{BTreeMap, BTreeSet};

use anabranch_proto::NodeId;
use uuid::Uuid;

use super::Point;

/// A member's answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Vote {
    /// It keeps what it needs to decide by either policy.
    Ready,
    /// It cannot, and why.
    Refused(String),
}

/// One fact.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Said {
    /// The saying node asks for the change from one policy to another, by their hashes.
    Asked {
        /// Hash of the policy of before.
        former: String,
        /// Hash of the one to come.
        next: String,
        /// Changes that the saying node knew of before.
        number: i64,
    },
    /// It answers. Of the node that asked: the change is made here, or is off.
    Voted(Vote),
    /// It has come to the place where the change was made.
    Passed(Point),
    /// It needs the policy of before no more, but for the sake of others.
    Done,
    /// It runs with the new policy alone.
    Switched,
}

/// A change, as far as it is known.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Asked {
    /// Who asks for it; `None` while that is not known.
    pub by: Option<NodeId>,
    /// Hash of the policy of before.
    pub former: String,
    /// Hash of the one to come.
    pub next: String,
    /// Orders changes: one that knew of another has a higher number.
    pub number: i64,
    /// Answers.
    pub votes: BTreeMap<NodeId, Vote>,
    /// Where it was made, as whoever came to that place says.
    pub point: Option<Point>,
    /// Who came to that place.
    pub passed: BTreeSet<NodeId>,
    /// Who is done.
    pub done: BTreeSet<NodeId>,
    /// Who runs with the new policy alone.
    pub switched: BTreeSet<NodeId>,
}

/// How far a change is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Members are asked.
    Asking,
    /// It is off: nobody has decided anything by it.
    Off,
    /// It is made; what is old may still be decided.
    Made,
    /// Nothing old is decided any more, anywhere; members go over to the new policy alone.
    Over,
    /// All have.
    Ended,
}

impl Asked {
    fn has_refused(&self, node: NodeId) -> bool {
        matches!(self.votes.get(&node), Some(Vote::Refused(_)))
    }

    /// Is a member ready for it?
    #[must_use]
    pub fn is_ready(&self, node: NodeId) -> bool {
        self.votes.get(&node) == Some(&Vote::Ready)
    }

    /// Those who have a part in it: ready, and members still.
    fn parts(&self, live: &BTreeSet<NodeId>) -> BTreeSet<NodeId> {
        let ready = |node: &NodeId| self.is_ready(*node);
        live.iter().copied().filter(ready).collect()
    }

    /// How far it is, when these are the live members.
    #[must_use]
    pub fn phase(&self, live: &BTreeSet<NodeId>) -> Phase {
        let Some(by) = self.by else { return Phase::Asking };
        match self.votes.get(&by) {
            Some(Vote::Refused(_)) => Phase::Off,
            // Whoever knows that a member is gone has met all that it said.
            None if !live.contains(&by) => Phase::Off,
            None => Phase::Asking,
            Some(Vote::Ready) => {
                let parts = self.parts(live);
                if parts.is_subset(&self.switched) {
                    Phase::Ended
                } else if parts.is_subset(&self.done) {
                    Phase::Over
                } else {
                    Phase::Made
                }
            }
        }
    }

    /// Members that it waits for.
    #[must_use]
    pub fn waits_for(&self, live: &BTreeSet<NodeId>) -> BTreeSet<NodeId> {
        let without = |these: BTreeSet<NodeId>, those: &BTreeSet<NodeId>| -> BTreeSet<NodeId> {
            these.difference(those).copied().collect()
        };
        match self.phase(live) {
            Phase::Asking => {
                let silent = |node: &NodeId| !self.votes.contains_key(node);
                let others: BTreeSet<NodeId> = live
                    .iter()
                    .copied()
                    .filter(|node| Some(*node) != self.by)
                    .filter(silent)
                    .collect();
                if others.is_empty() {
                    self.by.into_iter().collect()
                } else {
                    others
                }
            }
            Phase::Made => {
                let before = without(self.parts(live), &self.passed);
                if before.is_empty() {
                    without(self.parts(live), &self.done)
                } else {
                    before
                }
            }
            Phase::Over => without(self.parts(live), &self.switched),
            Phase::Off | Phase::Ended => BTreeSet::new(),
        }
    }

    /// What the node that asked says, once that is clear: whether the change is made. `None`: not yet.
    #[must_use]
    pub fn outcome(&self, live: &BTreeSet<NodeId>) -> Option<Vote> {
        let by = self.by?;
        let others = || live.iter().filter(move |node| **node != by);
        let refusal = others().find_map(|node| match self.votes.get(node) {
            Some(Vote::Refused(why)) => Some((*node, why)),
            _ => None,
        });
        if let Some((node, why)) = refusal {
            return Some(Vote::Refused(format!("node {node} refuses: {why}")));
        }
        others().all(|node| self.is_ready(*node)).then_some(Vote::Ready)
    }
}

/// All changes there ever were.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Changes(BTreeMap<Uuid, Asked>);

impl Changes {
    /// Takes in a fact that `node` said of a change.
    pub fn add(&mut self, id: Uuid, node: NodeId, said: Said) {
        let change = self.0.entry(id).or_default();
        match said {
            Said::Asked { former, next, number } => {
                (change.by, change.former, change.next, change.number) = (Some(node), former, next, number);
            }
            Said::Voted(vote) => {
                change.votes.entry(node).or_insert(vote);
            }
            Said::Passed(point) => {
                // Positions of one place may differ between its own node and the others: that changes nothing.
                change.point.get_or_insert(point);
                change.passed.insert(node);
            }
            Said::Done => {
                change.done.insert(node);
            }
            Said::Switched => {
                change.switched.insert(node);
            }
        }
    }

    /// A change by its id.
    #[must_use]
    pub fn get(&self, id: Uuid) -> Option<&Asked> {
        self.0.get(&id)
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = (Uuid, &Asked)> {
        self.0.iter().map(|(id, change)| (*id, change))
    }

    /// The change that decides at `node` beside the policy of before: asked for or made, not over, and not refused by this node.
    /// The one that it is ready for, else the first that was asked for.
    #[must_use]
    pub fn under_way(&self, node: NodeId, live: &BTreeSet<NodeId>) -> Option<(Uuid, &Asked)> {
        let is_under_way = |change: &Asked| {
            change.by.is_some()
                && !change.has_refused(node)
                && match change.phase(live) {
                    Phase::Asking => true,
                    Phase::Made => change.is_ready(node),
                    Phase::Off | Phase::Over | Phase::Ended => false,
                }
        };
        let all = self.iter().filter(|(_, change)| is_under_way(change));
        all.min_by_key(|(id, change)| (!change.is_ready(node), change.number, *id))
    }

    /// The last change that is over and that `node` had a part in.
    #[must_use]
    pub fn last(&self, node: NodeId, live: &BTreeSet<NodeId>) -> Option<(Uuid, &Asked)> {
        let is_over = |change: &Asked| {
            change.is_ready(node) && matches!(change.phase(live), Phase::Over | Phase::Ended)
        };
        let all = self.iter().filter(|(_, change)| is_over(change));
        all.max_by_key(|(id, change)| (change.number, *id))
    }

    /// Is any change asked for or made, and not ended? Then nobody begins to join, and no other change is asked for.
    #[must_use]
    pub fn unfinished(&self, live: &BTreeSet<NodeId>) -> Option<(Uuid, &Asked)> {
        let is_open = |change: &Asked| !matches!(change.phase(live), Phase::Off | Phase::Ended);
        let all = self.iter().filter(|(_, change)| is_open(change));
        all.min_by_key(|(id, change)| (change.number, *id))
    }

    /// Is a policy of this hash, which is not the own one, right for a node to have for the moment?
    #[must_use]
    pub fn is_on_the_way(&self, node: NodeId, hash: &str, live: &BTreeSet<NodeId>) -> bool {
        self.iter().any(|(_, change)| {
            change.is_ready(node)
                && matches!(change.phase(live), Phase::Made | Phase::Over)
                && (hash == change.next || hash == change.former && !change.switched.contains(&node))
        })
    }

    /// The number of the next change.
    #[must_use]
    pub fn next_number(&self) -> i64 {
        let last = self.iter().map(|(_, change)| change.number).max();
        last.unwrap_or(0).saturating_add(1)
    }
}

#[cfg(test)]
mod tests {
    use anabranch_proto::Position;

    use super::*;

    const ONE: Uuid = Uuid::from_u128(1);
    const TWO: Uuid = Uuid::from_u128(2);

    fn asked(number: i64) -> Said {
        Said::Asked {
            former: "old".to_owned(),
            next: "new".to_owned(),
            number,
        }
    }

    fn ids(nodes: &[u16]) -> BTreeSet<NodeId> {
        nodes.iter().map(|&node| NodeId(node)).collect()
    }

    fn ready(changes: &mut Changes, id: Uuid, nodes: &[u16]) {
        for &node in nodes {
            changes.add(id, NodeId(node), Said::Voted(Vote::Ready));
        }
    }

    #[test]
    fn it_is_made_once_all_others_are_ready_and_who_asked_says_so() {
        let live = ids(&[1, 2, 3]);
        let mut changes = Changes::default();
        changes.add(ONE, NodeId(1), asked(1));
        ready(&mut changes, ONE, &[2]);
        let change = changes.get(ONE).unwrap();
        assert_eq!(
            (change.phase(&live), change.outcome(&live)),
            (Phase::Asking, None)
        );
        assert_eq!(change.waits_for(&live), ids(&[3]));
        ready(&mut changes, ONE, &[3]);
        let change = changes.get(ONE).unwrap();
        assert_eq!(change.outcome(&live), Some(Vote::Ready));
        assert_eq!(
            (change.phase(&live), change.waits_for(&live)),
            (Phase::Asking, ids(&[1]))
        );
        ready(&mut changes, ONE, &[1]);
        assert_eq!(changes.get(ONE).unwrap().phase(&live), Phase::Made);
        for node in [1, 2, 3] {
            changes.add(ONE, NodeId(node), Said::Done);
        }
        assert_eq!(changes.get(ONE).unwrap().phase(&live), Phase::Over);
        assert_eq!(changes.under_way(NodeId(2), &live), None);
        assert_eq!(changes.last(NodeId(2), &live).map(|(id, _)| id), Some(ONE));
        // Who joined later had no part in it.
        assert_eq!(changes.last(NodeId(4), &ids(&[1, 2, 3, 4])), None);
    }

    #[test]
    fn one_refusal_ends_it_and_a_second_answer_of_a_member_does_not_count() {
        let live = ids(&[1, 2, 3]);
        let mut changes = Changes::default();
        changes.add(ONE, NodeId(1), asked(1));
        ready(&mut changes, ONE, &[2]);
        changes.add(ONE, NodeId(3), Said::Voted(Vote::Refused("no".to_owned())));
        let outcome = changes.get(ONE).unwrap().outcome(&live);
        assert_eq!(outcome, Some(Vote::Refused("node 3 refuses: no".to_owned())));
        changes.add(ONE, NodeId(1), Said::Voted(outcome.unwrap()));
        ready(&mut changes, ONE, &[1]);
        assert_eq!(changes.get(ONE).unwrap().phase(&live), Phase::Off);
        assert_eq!((changes.unfinished(&live), changes.next_number()), (None, 2));
    }

    #[test]
    fn who_asked_and_is_lost_before_it_decided_has_made_nothing() {
        let mut changes = Changes::default();
        changes.add(ONE, NodeId(1), asked(1));
        ready(&mut changes, ONE, &[2, 3]);
        assert_eq!(changes.get(ONE).unwrap().phase(&ids(&[1, 2, 3])), Phase::Asking);
        assert_eq!(changes.get(ONE).unwrap().phase(&ids(&[2, 3])), Phase::Off);
        ready(&mut changes, ONE, &[1]);
        assert_eq!(changes.get(ONE).unwrap().phase(&ids(&[2, 3])), Phase::Made);
    }

    #[test]
    fn of_two_changes_a_member_has_a_part_in_the_one_that_it_is_ready_for() {
        let live = ids(&[1, 2]);
        let mut changes = Changes::default();
        changes.add(TWO, NodeId(2), asked(1));
        changes.add(ONE, NodeId(1), asked(1));
        assert_eq!(changes.under_way(NodeId(2), &live).map(|(id, _)| id), Some(ONE));
        ready(&mut changes, TWO, &[2]);
        assert_eq!(changes.under_way(NodeId(2), &live).map(|(id, _)| id), Some(TWO));
        assert_eq!(changes.under_way(NodeId(1), &live).map(|(id, _)| id), Some(ONE));
    }

    #[test]
    fn both_policies_may_connect_while_members_go_over_and_the_former_only_of_those_that_have_not() {
        let live = ids(&[1, 2]);
        let mut changes = Changes::default();
        changes.add(ONE, NodeId(1), asked(1));
        ready(&mut changes, ONE, &[2]);
        assert!(!changes.is_on_the_way(NodeId(2), "new", &live));
        ready(&mut changes, ONE, &[1]);
        assert!(changes.is_on_the_way(NodeId(2), "new", &live));
        for node in [1, 2] {
            let position = Position::new(1, 5);
            changes.add(
                ONE,
                NodeId(node),
                Said::Passed(Point {
                    node: NodeId(1),
                    position,
                }),
            );
            changes.add(ONE, NodeId(node), Said::Done);
        }
        assert!(changes.is_on_the_way(NodeId(2), "old", &live));
        changes.add(ONE, NodeId(2), Said::Switched);
        assert!(!changes.is_on_the_way(NodeId(2), "old", &live));
        assert!(
            !changes.is_on_the_way(NodeId(3), "old", &live) && !changes.is_on_the_way(NodeId(1), "x", &live)
        );
        assert_eq!(changes.get(ONE).unwrap().waits_for(&live), ids(&[1]));
        changes.add(ONE, NodeId(1), Said::Switched);
        assert_eq!(changes.get(ONE).unwrap().phase(&live), Phase::Ended);
    }
}
