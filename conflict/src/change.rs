//! A policy that is changed while the cluster runs, at one place of each origin's stream.
//!
//! In:   the policy of before and the one to come, the place where the change was made; the frontier of a row
//! Out:  the version that the row becomes, and by which of both policies; what the members have said, and who is waited for
//! Holds: nothing but what it is made of
//!
//! A change is *made* by one transaction of the node that asked for it. A version is *new* if its transaction had seen that one,
//! else it is *old*; so every origin's stream has one place before which all is old and behind which all is new: where it applied
//! the change. What makes it safe:
//! 1. Whether a version is new is a function of the version. Delivery is causal, so whoever meets a new one knows of the change;
//!    who does not know of it yet holds none.
//! 2. A frontier with an old version in it is decided by the policy of before, any other one by the new. That is a function of the
//!    frontier as a set, so it converges for the reason that scripts do ([`crate::script`]): nodes that decide at the arrival of
//!    one version decide over one frontier, whatever they have forgotten, since what is forgotten is covered by all that comes.
//! 3. Every node must keep the whole frontier of each row *before* the first new version comes in; last update wins alone keeps
//!    one version. So members first say that they do ([`Changes`]), and then the change is made.
//! 4. The policy of before is forgotten only when nothing old can ever be decided again, at any node: when everything that was
//!    known while anything old was unstable is settled ([`Retreat`]).
//!
//! On crash: nothing is lost here
//! Not here: carrying what members say (node: `policy_change`), tables whose columns are merged or whose unique values are
//! claimed, which decide by more than a frontier: those are refused ([`Unchangeable`])

mod retreat;
mod votes;

use std::sync::Arc;

use anabranch_proto::{NodeId, Position, Vector};

use crate::frontier::Policy;
use crate::policy::TablePolicy;
use crate::script::{Candidate, Failure, Outcome, Script};
use crate::{Version, frontier};

pub use retreat::Retreat;
pub use votes::{Asked, Changes, Phase, Said, Vote};

/// The transaction that made a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Point {
    /// In whose stream.
    pub node: NodeId,
    /// Where.
    pub position: Position,
}

impl Point {
    /// Had a transaction with these dependencies seen the change?
    #[must_use]
    pub fn seen_by(&self, deps: &Vector) -> bool {
        deps.covers(self.node, self.position)
    }
}

/// What chooses one version of a frontier.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Chooser {
    /// An order of versions.
    Order(Policy),
    /// A script.
    Script(Arc<Script>),
}

impl Chooser {
    /// Of a table's policy; `None` where columns are merged.
    #[must_use]
    pub fn of(policy: &TablePolicy) -> Option<Self> {
        match (&policy.columns, &policy.script) {
            (Some(_), _) => None,
            (None, Some(script)) => Some(Self::Script(Arc::clone(script))),
            (None, None) => Some(Self::Order(policy.policy.clone())),
        }
    }

    /// Chooses among versions that do not cover each other, in any order; `candidates` gives them as a script sees them.
    fn choose(&self, versions: &[Version], candidates: impl FnOnce() -> Vec<Candidate>) -> Option<Outcome> {
        match (self, versions) {
            (_, []) => None,
            (_, [only]) => Some(certain(*only)),
            (Self::Script(script), _) => Some(script.choose(&candidates())),
            (Self::Order(policy), _) => {
                let members = versions
                    .iter()
                    .map(|&version| frontier::Member { version, value: () });
                let frontier = frontier::Frontier::of(members);
                frontier.resolve(policy).map(|member| certain(member.version))
            }
        }
    }
}

const fn certain(version: Version) -> Outcome {
    Outcome {
        chosen: version.stamp,
        failure: None,
    }
}

/// Why a table's policy cannot be changed while the cluster runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "columns are merged, by the policy of before or by the new one: what a row becomes depends on more than its concurrent versions"
)]
pub struct Unchangeable;

/// The change of one table's policy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    old: Chooser,
    new: Chooser,
}

/// What a row becomes, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decided {
    /// The version.
    pub chosen: anabranch_proto::Stamp,
    /// Why a script did not choose it.
    pub failure: Option<Failure>,
    /// By the new policy?
    pub by_new: bool,
}

impl Change {
    /// From one table policy to another; `None` where both decide alike.
    ///
    /// # Errors
    /// When one of them merges columns, and they differ.
    pub fn between(old: &TablePolicy, new: &TablePolicy) -> Result<Option<Self>, Unchangeable> {
        if (&old.policy, &old.columns, &old.script) == (&new.policy, &new.columns, &new.script) {
            return Ok(None);
        }
        match (Chooser::of(old), Chooser::of(new)) {
            (Some(old), Some(new)) => Ok(Some(Self { old, new })),
            _ => Err(Unchangeable),
        }
    }

    /// Of these choosers.
    #[must_use]
    pub const fn new(old: Chooser, new: Chooser) -> Self {
        Self { old, new }
    }

    /// Chooses among the versions of a row that no other covers; `new` tells of each whether its transaction had seen the change.
    /// `None`: there is no version.
    #[must_use]
    pub fn choose(
        &self,
        versions: &[Version],
        new: &[bool],
        candidates: impl FnOnce() -> Vec<Candidate>,
    ) -> Option<Decided> {
        let by_new = !new.is_empty() && new.iter().all(|new| *new);
        let chooser = if by_new { &self.new } else { &self.old };
        let outcome = chooser.choose(versions, candidates)?;
        Some(Decided {
            chosen: outcome.chosen,
            failure: outcome.failure,
            by_new,
        })
    }
}

#[cfg(test)]
mod tests {
    use anabranch_proto::Stamp;
    use anabranch_proto::stamp::NTP64;

    use super::*;
    use crate::Kind;
    use crate::frontier::{Deletes, Order};

    fn version(time: u64, node: u16) -> Version {
        Version {
            stamp: Stamp {
                time: NTP64(time),
                node: NodeId(node),
            },
            position: Position::new(1, time),
            kind: Kind::Put,
        }
    }

    fn order(order: Order) -> TablePolicy {
        TablePolicy {
            policy: Policy {
                order,
                deletes: Deletes::ByStamp,
            },
            ..TablePolicy::default()
        }
    }

    #[test]
    fn a_frontier_is_decided_by_the_policy_of_before_as_long_as_it_has_an_old_version() {
        let change = Change::between(&order(Order::FirstUpdateWins), &order(Order::LastUpdateWins))
            .unwrap()
            .unwrap();
        let (a, b, c) = (version(1, 1), version(2, 2), version(3, 3));
        let none = || -> Vec<Candidate> { panic!("no script") };
        let chosen = |new: &[bool]| {
            let decided = change.choose(&[a, b, c], new, none).unwrap();
            (decided.chosen, decided.by_new)
        };
        assert_eq!(chosen(&[false, false, false]), (a.stamp, false));
        assert_eq!(chosen(&[true, false, true]), (a.stamp, false));
        assert_eq!(chosen(&[true, true, true]), (c.stamp, true));
        assert_eq!(change.choose(&[], &[], none), None);
    }

    #[test]
    fn what_decides_alike_is_no_change_and_merged_columns_cannot_be_changed() {
        let plain = TablePolicy::default();
        assert_eq!(Change::between(&plain, &plain), Ok(None));
        let keeps = TablePolicy {
            foreign_keys: crate::policy::ForeignKeys::DeleteChild,
            ..TablePolicy::default()
        };
        assert_eq!(Change::between(&plain, &keeps), Ok(None));
        let merged = TablePolicy {
            columns: Some(crate::policy::Columns {
                each: true,
                rules: std::collections::BTreeMap::new(),
                groups: crate::groups::Groups::default(),
            }),
            ..TablePolicy::default()
        };
        assert_eq!(Change::between(&plain, &merged), Err(Unchangeable));
        assert_eq!(Change::between(&merged, &plain), Err(Unchangeable));
        assert_eq!(Change::between(&merged, &merged), Ok(None));
    }

    #[test]
    fn a_version_is_new_if_its_transaction_had_seen_the_change() {
        let point = Point {
            node: NodeId(2),
            position: Position::new(1, 50),
        };
        let deps = |lsn| -> Vector { [(NodeId(2), Position::new(1, lsn))].into_iter().collect() };
        assert!(!point.seen_by(&Vector::new()) && !point.seen_by(&deps(49)));
        assert!(point.seen_by(&deps(50)) && point.seen_by(&deps(51)));
    }
}
