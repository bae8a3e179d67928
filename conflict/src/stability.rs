//! What every member has applied, as far as their own streams have told us.
//!
//! In:   dependency vectors from members' streams (transactions and heartbeats)      Out: the stable vector
//! Holds: one vector per member
//! Invariants: 1. Only what arrived *in band* counts: member j's vector is observed when j's stream has been
//! applied up to the place where it stands. Learned on the side it would say "j has applied v" while an older
//! write of j, concurrent with v, is still on its way: forgetting v then lets that write win wrongly.
//! 2. The stable vector never shrinks while the membership stands.
//!
//! On crash: rebuilt by replaying the journal; until then less is stable, which is always safe.
//! Not here: who is a member (node: membership), forgetting entries (node: index).

use std::collections::BTreeMap;

use anabranch_proto::{NodeId, Vector};

/// What every member has applied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stability {
    members: BTreeMap<NodeId, Vector>,
}

impl Stability {
    /// Nothing is known yet of any member. `members` includes the own node, whose vector is its fold's.
    #[must_use]
    pub fn new(members: impl IntoIterator<Item = NodeId>) -> Self {
        Self {
            members: members.into_iter().map(|node| (node, Vector::new())).collect(),
        }
    }

    /// `member` had applied `vector` at the place up to which its stream is applied here. With a
    /// transaction, that is its dependencies; its own position may be raised to the transaction's.
    /// What is said of a node that is no member is ignored.
    pub fn observe(&mut self, member: NodeId, vector: &Vector) {
        if let Some(known) = self.members.get_mut(&member) {
            known.join(vector);
        }
    }

    /// A node becomes a member, knowing `vector`. Nothing beyond that is stable until it is heard of again.
    pub fn join(&mut self, member: NodeId, vector: Vector) {
        self.members.insert(member, vector);
    }

    /// A node is no longer a member: it is not waited for any more.
    pub fn leave(&mut self, member: NodeId) {
        self.members.remove(&member);
    }

    /// What `member` is known to have applied; `None` if it is no member.
    #[must_use]
    pub fn member(&self, node: NodeId) -> Option<&Vector> {
        self.members.get(&node)
    }

    /// What every member is known to have applied. A version covered by it may be forgotten.
    #[must_use]
    pub fn stable(&self) -> Vector {
        let mut vectors = self.members.values();
        let Some(first) = vectors.next() else {
            return Vector::new();
        };
        vectors.fold(first.clone(), |stable, vector| stable.meet(vector))
    }
}

#[cfg(test)]
mod tests {
    use anabranch_proto::Position;

    use super::*;

    fn vector(entries: &[(u16, u64)]) -> Vector {
        entries
            .iter()
            .map(|&(node, lsn)| (NodeId(node), Position::new(1, lsn)))
            .collect()
    }

    #[test]
    fn nothing_is_stable_before_every_member_was_heard_of() {
        let mut stability = Stability::new([NodeId(1), NodeId(2), NodeId(3)]);
        stability.observe(NodeId(1), &vector(&[(1, 10), (2, 5)]));
        stability.observe(NodeId(2), &vector(&[(1, 8), (2, 9)]));
        assert!(stability.stable().is_empty());
        stability.observe(NodeId(3), &vector(&[(1, 9), (2, 3), (3, 50)]));
        assert_eq!(stability.stable(), vector(&[(1, 8), (2, 3)]));
    }

    #[test]
    fn a_late_observation_never_takes_back() {
        let mut stability = Stability::new([NodeId(1)]);
        stability.observe(NodeId(1), &vector(&[(1, 10)]));
        stability.observe(NodeId(1), &vector(&[(1, 4)]));
        assert_eq!(stability.member(NodeId(1)), Some(&vector(&[(1, 10)])));
    }

    #[test]
    fn membership_decides_who_is_waited_for() {
        let mut stability = Stability::new([NodeId(1), NodeId(2)]);
        stability.observe(NodeId(1), &vector(&[(1, 10)]));
        stability.observe(NodeId(9), &vector(&[(1, 1)]));
        assert_eq!(stability.member(NodeId(9)), None);
        stability.leave(NodeId(2));
        assert_eq!(stability.stable(), vector(&[(1, 10)]));
        stability.join(NodeId(3), vector(&[(1, 6)]));
        assert_eq!(stability.stable(), vector(&[(1, 6)]));
        assert!(Stability::new([]).stable().is_empty());
    }
}
