//! The full frontier of a row: its versions that no other known version covers, with what they carry.
//!
//! In:   versions with their dependencies, in causal order      Out: the frontier and the policy's choice
//! Holds: one entry per concurrent version; one in almost every row
//! Invariants:
//! 1. No member covers another.
//! 2. The frontier is a function of the set of versions admitted, not of their order; so is the choice.
//!
//! Needed by every policy but last update wins: compared with the current version only, priorities X(3), Y(2)
//! concurrent and Z(1) after X end in Z when Y is met before Z, in Y when after.
//! On crash: rebuilt with the row index.
//! Not here: last update wins in one version per row ([`crate::last_writer`]).

use std::collections::BTreeMap;

use anabranch_proto::{NodeId, Stamp, Vector};

use crate::table::TableVersion;
use crate::version::{Kind, Version};

/// A member of a frontier.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member<V> {
    /// The version.
    pub version: Version,
    /// What it carries: the row's image, or whatever its policy needs.
    pub value: V,
}

/// The versions of a row that no other known version covers, in stamp order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frontier<V> {
    members: Vec<Member<V>>,
}

/// What admitting a version meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admission {
    /// It covers all there was: no conflict.
    Alone,
    /// Others remain beside it: every member but the policy's choice is a loser to be logged.
    Conflict,
    /// It was a member already: nothing changed.
    Known,
}

/// How one member is chosen: an order of versions, total, and a function of each version alone; so the choice is
/// a function of the set.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Policy {
    /// Among versions of one kind, and among all if `deletes` says so.
    pub order: Order,
    /// What a delete weighs against a put.
    pub deletes: Deletes,
}

/// Which of two versions is preferred.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Order {
    /// The highest stamp.
    #[default]
    LastUpdateWins,
    /// The lowest stamp.
    FirstUpdateWins,
    /// The highest priority of the origin (0 where the map has none), then the highest stamp.
    OriginPriority(BTreeMap<NodeId, u32>),
}

/// What a delete weighs against a put.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Deletes {
    /// The same: the order decides.
    #[default]
    ByStamp,
    /// More: any delete is preferred to every put.
    DeleteWins,
    /// Less: any put is preferred to every delete.
    UpdateWins,
}

impl Policy {
    /// Is it the policy for which one version a row is enough ([`crate::last_writer`])?
    #[must_use]
    pub fn is_last_writer(&self) -> bool {
        *self == Self::default()
    }

    /// Is `a` preferred to `b`?
    #[must_use]
    pub fn prefers(&self, a: &Version, b: &Version) -> bool {
        let weight = |version: &Version| match (self.deletes, version.kind) {
            (Deletes::DeleteWins, Kind::Delete) | (Deletes::UpdateWins, Kind::Put) => 1,
            _ => 0,
        };
        let priority = |version: &Version| match &self.order {
            Order::OriginPriority(priorities) => priorities.get(&version.origin()).copied().unwrap_or(0),
            Order::LastUpdateWins | Order::FirstUpdateWins => 0,
        };
        let later = match self.order {
            Order::FirstUpdateWins => b.stamp.cmp(&a.stamp),
            Order::LastUpdateWins | Order::OriginPriority(_) => a.stamp.cmp(&b.stamp),
        };
        (weight(a), priority(a))
            .cmp(&(weight(b), priority(b)))
            .then(later)
            .is_gt()
    }
}

/// What admitting a version to a row meant, and what the row must show now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outcome {
    /// What the row must show.
    pub winner: Version,
    /// Does the row show another version, or one that nobody knows?
    pub changed: bool,
    /// The version that has lost now: the incoming one, or the one that the row showed. Other members lost
    /// before and were reported then.
    pub lost: Option<Version>,
}

/// What a truncate of its table left of a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AfterTruncate {
    /// What the row must show; `None`: there must be no row.
    pub winner: Option<Version>,
    /// Does the row show another version?
    pub changed: bool,
    /// The version that the row showed, if it was a put, is gone and was not seen by the truncate.
    pub lost: Option<Version>,
}

impl<V> Default for Frontier<V> {
    fn default() -> Self {
        Self::new()
    }
}

impl<V> Frontier<V> {
    /// Of a row last written by something stable.
    #[must_use]
    pub const fn new() -> Self {
        Self { members: Vec::new() }
    }

    /// Admits a version whose transaction depends on `deps`. To be called in causal order.
    pub fn admit(&mut self, version: Version, value: V, deps: &Vector) -> Admission {
        if self
            .members
            .iter()
            .any(|member| member.version.stamp == version.stamp)
        {
            return Admission::Known;
        }
        self.members.retain(|member| !member.version.covered_by(deps));
        let alone = self.members.is_empty();
        let at = self
            .members
            .partition_point(|member| member.version.stamp < version.stamp);
        self.members.insert(at, Member { version, value });
        if alone {
            Admission::Alone
        } else {
            Admission::Conflict
        }
    }

    /// A frontier of these members, which must not cover each other.
    #[must_use]
    pub fn of(members: impl IntoIterator<Item = Member<V>>) -> Self {
        let mut members: Vec<_> = members.into_iter().collect();
        members.sort_unstable_by_key(|member| member.version.stamp);
        members.dedup_by_key(|member| member.version.stamp);
        Self { members }
    }

    /// The member that the row becomes; `None` only if nothing was admitted since the last stable write.
    #[must_use]
    pub fn resolve(&self, policy: &Policy) -> Option<&Member<V>> {
        self.members.iter().reduce(|best, member| {
            if policy.prefers(&member.version, &best.version) {
                member
            } else {
                best
            }
        })
    }

    /// Admits a version (as [`Self::admit`]) to a row that shows the version `shown`: `None` when that is stable
    /// and forgotten, or not known.
    ///
    /// What is promised of `lost`: a version that no other of the row covers at the end, and that is not the
    /// row's, is reported at every node, whatever the order of arrival: it lost when it came, or when the last
    /// better member did. A version that was reported may still become the row's later, when what beat it is
    /// overwritten knowingly by something that it beats.
    pub fn meet(
        &mut self,
        policy: &Policy,
        shown: Option<Stamp>,
        incoming: Version,
        value: V,
        deps: &Vector,
    ) -> Outcome {
        let known = self.admit(incoming, value, deps) == Admission::Known;
        let winner = self.resolve(policy).map_or(incoming, |member| member.version);
        let beaten = || {
            // What it shows may be an earlier write by the same transaction, which the caller has left out.
            let still = |member: &&Member<V>| {
                Some(member.version.stamp) == shown && member.version.stamp != incoming.stamp
            };
            self.members.iter().find(still).map(|member| member.version)
        };
        let lost = if known {
            None
        } else if winner.stamp != incoming.stamp {
            Some(incoming)
        } else {
            beaten()
        };
        Outcome {
            winner,
            changed: shown != Some(winner.stamp),
            lost,
        }
    }

    /// Meets a truncate of the table: every member below its stamp is gone, whatever the policy. (What it has
    /// seen is below; what has seen it is above.) So is every later arrival below it
    /// ([`crate::table::admit_row`]): what remains is a function of the set again.
    pub fn truncate(
        &mut self,
        policy: &Policy,
        shown: Option<Stamp>,
        truncate: &TableVersion,
        deps: &Vector,
    ) -> AfterTruncate {
        let lost = self.members.iter().map(|member| member.version).find(|version| {
            Some(version.stamp) == shown
                && version.stamp < truncate.stamp
                && version.kind == Kind::Put
                && !version.covered_by(deps)
        });
        // What its own transaction wrote before it goes, too.
        self.members
            .retain(|member| member.version.stamp > truncate.stamp);
        let winner = self.resolve(policy).map(|member| member.version);
        AfterTruncate {
            winner,
            changed: winner.map(|winner| winner.stamp) != shown,
            lost,
        }
    }

    /// Drops the members that are stable: everything still to come covers them. The row keeps what it was
    /// resolved to, so it must not be resolved again before the next version is admitted.
    pub fn forget(&mut self, stable: &Vector) {
        self.members.retain(|member| !member.version.covered_by(stable));
    }

    /// The members, in stamp order.
    #[must_use]
    pub fn members(&self) -> &[Member<V>] {
        &self.members
    }
}

#[cfg(test)]
mod tests {
    use anabranch_proto::Position;
    use uhlc::NTP64;

    use super::*;

    fn by(order: Order) -> Policy {
        Policy {
            order,
            deletes: Deletes::ByStamp,
        }
    }

    fn version(time: u64, node: u16, lsn: u64) -> Version {
        Version {
            stamp: Stamp {
                time: NTP64(time),
                node: NodeId(node),
            },
            position: Position::new(1, lsn),
            kind: Kind::Put,
        }
    }

    fn deps(entries: &[(u16, u64)]) -> Vector {
        entries
            .iter()
            .map(|&(node, lsn)| (NodeId(node), Position::new(1, lsn)))
            .collect()
    }

    #[test]
    fn covered_members_go_and_concurrent_ones_stay() {
        let mut frontier = Frontier::new();
        assert_eq!(
            frontier.admit(version(1, 1, 1), 'x', &deps(&[])),
            Admission::Alone
        );
        assert_eq!(
            frontier.admit(version(2, 2, 1), 'y', &deps(&[])),
            Admission::Conflict
        );
        assert_eq!(
            frontier.admit(version(2, 2, 1), 'y', &deps(&[])),
            Admission::Known
        );
        assert_eq!(
            frontier.admit(version(3, 3, 1), 'z', &deps(&[(1, 1)])),
            Admission::Conflict
        );
        let values: Vec<_> = frontier.members().iter().map(|member| member.value).collect();
        assert_eq!(values, ['y', 'z']);
        assert_eq!(
            frontier.admit(version(4, 1, 2), 'w', &deps(&[(2, 1), (3, 1)])),
            Admission::Alone
        );
    }

    #[test]
    fn origin_priority_ends_the_same_in_every_order() {
        // X(3) and Y(2) concurrent, Z(1) after X: the case that a single current version gets wrong.
        let policy = by(Order::OriginPriority(
            [(NodeId(1), 3), (NodeId(2), 2), (NodeId(3), 1)].into(),
        ));
        let x = (version(1, 1, 1), 'x', deps(&[]));
        let y = (version(2, 2, 1), 'y', deps(&[]));
        let z = (version(3, 3, 1), 'z', deps(&[(1, 1)]));
        for order in [[&x, &y, &z], [&x, &z, &y], [&y, &x, &z]] {
            let mut frontier = Frontier::new();
            for (version, value, deps) in order {
                frontier.admit(*version, *value, deps);
            }
            assert_eq!(frontier.resolve(&policy).map(|member| member.value), Some('y'));
        }
    }

    #[test]
    fn each_policy_chooses_as_it_says() {
        let mut frontier = Frontier::new();
        assert_eq!(frontier.resolve(&Policy::default()), None);
        frontier.admit(version(1, 1, 1), 'a', &deps(&[]));
        frontier.admit(version(2, 2, 1), 'b', &deps(&[]));
        frontier.admit(version(3, 3, 1), 'c', &deps(&[]));
        let choice = |policy| frontier.resolve(&policy).map(|member| member.value);
        assert_eq!(choice(by(Order::LastUpdateWins)), Some('c'));
        assert_eq!(choice(by(Order::FirstUpdateWins)), Some('a'));
        assert_eq!(
            choice(by(Order::OriginPriority([(NodeId(2), 1)].into()))),
            Some('b')
        );
        assert_eq!(choice(by(Order::OriginPriority(BTreeMap::new()))), Some('c'));
    }

    #[test]
    fn a_delete_weighs_what_the_rule_says() {
        let delete = Version {
            kind: Kind::Delete,
            ..version(2, 2, 1)
        };
        for (deletes, expected) in [
            (Deletes::ByStamp, 'c'),
            (Deletes::DeleteWins, 'b'),
            (Deletes::UpdateWins, 'c'),
        ] {
            let policy = Policy {
                order: Order::LastUpdateWins,
                deletes,
            };
            let mut frontier = Frontier::new();
            frontier.admit(version(1, 1, 1), 'a', &deps(&[]));
            frontier.admit(delete, 'b', &deps(&[]));
            frontier.admit(version(3, 3, 1), 'c', &deps(&[]));
            assert_eq!(
                frontier.resolve(&policy).map(|member| member.value),
                Some(expected),
                "{deletes:?}"
            );
        }
        let policy = Policy {
            order: Order::FirstUpdateWins,
            deletes: Deletes::UpdateWins,
        };
        assert!(policy.prefers(&version(9, 1, 1), &delete));
        assert!(policy.prefers(&version(1, 1, 1), &version(9, 1, 1)));
    }

    #[test]
    fn who_lost_is_said_once_and_a_winner_that_comes_back_is_a_change() {
        let policy = by(Order::OriginPriority([(NodeId(1), 3), (NodeId(2), 2)].into()));
        let (x, y, z) = (version(1, 1, 1), version(2, 2, 1), version(3, 3, 1));
        let mut frontier = Frontier::new();
        let first = frontier.meet(&policy, None, y, (), &deps(&[]));
        assert_eq!((first.winner, first.changed, first.lost), (y, true, None));
        let second = frontier.meet(&policy, Some(y.stamp), x, (), &deps(&[]));
        assert_eq!((second.winner, second.changed, second.lost), (x, true, Some(y)));
        // Z saw X, and loses to Y, which the row must show again.
        let third = frontier.meet(&policy, Some(x.stamp), z, (), &deps(&[(1, 1)]));
        assert_eq!((third.winner, third.changed, third.lost), (y, true, Some(z)));
        let again = frontier.meet(&policy, Some(y.stamp), z, (), &deps(&[(1, 1)]));
        assert_eq!((again.winner, again.changed, again.lost), (y, false, None));
    }

    #[test]
    fn a_transaction_that_writes_a_row_again_does_not_lose_to_itself() {
        let policy = by(Order::FirstUpdateWins);
        let (x, y) = (version(1, 1, 1), version(2, 2, 1));
        for others in [Vec::new(), vec![y]] {
            let others = others.into_iter().map(|version| Member { version, value: () });
            let mut frontier = Frontier::of(others);
            let again = frontier.meet(&policy, Some(x.stamp), x, (), &deps(&[]));
            assert_eq!((again.winner, again.changed, again.lost), (x, false, None));
        }
    }

    #[test]
    fn a_truncate_removes_what_is_below_it_whatever_the_policy() {
        let policy = by(Order::OriginPriority([(NodeId(1), 3)].into()));
        let (x, y) = (version(1, 1, 1), version(5, 2, 1));
        let mut frontier = Frontier::new();
        frontier.admit(x, (), &deps(&[]));
        frontier.admit(y, (), &deps(&[]));
        let truncate = TableVersion {
            stamp: version(3, 3, 1).stamp,
            position: version(3, 3, 1).position,
        };
        let after = frontier.truncate(&policy, Some(x.stamp), &truncate, &deps(&[]));
        assert_eq!(
            after,
            AfterTruncate {
                winner: Some(y),
                changed: true,
                lost: Some(x)
            }
        );
    }

    #[test]
    fn only_what_is_stable_is_forgotten() {
        let mut frontier = Frontier::new();
        frontier.admit(version(1, 1, 1), 'a', &deps(&[]));
        frontier.admit(version(2, 2, 1), 'b', &deps(&[]));
        frontier.forget(&deps(&[(1, 1)]));
        assert_eq!(frontier.members().len(), 1);
        frontier.forget(&deps(&[(2, 1)]));
        assert!(frontier.members().is_empty());
    }
}
