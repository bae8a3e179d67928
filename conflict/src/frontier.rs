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

use crate::version::Version;

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

/// How one member is chosen. Total, and a function of each member alone: so of the set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Policy {
    /// The highest stamp.
    LastUpdateWins,
    /// The lowest stamp.
    FirstUpdateWins,
    /// The highest priority of the origin (0 where the map has none), then the highest stamp.
    OriginPriority(BTreeMap<NodeId, u32>),
}

impl Policy {
    /// A number and a stamp; the highest pair is chosen.
    fn rank(&self, version: &Version) -> (u32, Stamp) {
        match self {
            Self::LastUpdateWins | Self::FirstUpdateWins => (0, version.stamp),
            Self::OriginPriority(priorities) => (
                priorities.get(&version.origin()).copied().unwrap_or(0),
                version.stamp,
            ),
        }
    }
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

    /// The member that the row becomes; `None` only if nothing was admitted since the last stable write.
    #[must_use]
    pub fn resolve(&self, policy: &Policy) -> Option<&Member<V>> {
        match policy {
            Policy::FirstUpdateWins => self.members.first(),
            _ => self
                .members
                .iter()
                .max_by_key(|member| policy.rank(&member.version)),
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
    use crate::version::Kind;

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
        let policy = Policy::OriginPriority([(NodeId(1), 3), (NodeId(2), 2), (NodeId(3), 1)].into());
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
        assert_eq!(frontier.resolve(&Policy::LastUpdateWins), None);
        frontier.admit(version(1, 1, 1), 'a', &deps(&[]));
        frontier.admit(version(2, 2, 1), 'b', &deps(&[]));
        frontier.admit(version(3, 3, 1), 'c', &deps(&[]));
        let choice = |policy| frontier.resolve(&policy).map(|member| member.value);
        assert_eq!(choice(Policy::LastUpdateWins), Some('c'));
        assert_eq!(choice(Policy::FirstUpdateWins), Some('a'));
        assert_eq!(choice(Policy::OriginPriority([(NodeId(2), 1)].into())), Some('b'));
        assert_eq!(choice(Policy::OriginPriority(BTreeMap::new())), Some('c'));
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
