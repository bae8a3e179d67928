//! Claim registers: which row has a value of a secondary unique key, when several claimed it unseen by each other.
//!
//! In:   the rows that a transaction leaves with their unique values, its stamp, what it depends on
//! Out:  who yields to whom
//! Holds: per value the claim with the highest stamp
//! Must never: compare by what stands in a table, or by who came first
//! Not here: which version of a row is current ([`crate::last_writer`]); what values are equal (the caller)
//!
//! # The rule
//!
//! A *claim* is a version of a row together with one value that it has in a unique key; of a row that a transaction
//! writes several times only the last counts. Version p *yields* when there is a version v of another row that claims a
//! value of p, is concurrent with p, and has a higher stamp. A row is in the table if its current version is a put that
//! does not yield. That v is itself no longer current, deleted, or yields, makes no difference.
//!
//! # Why it converges
//!
//! Yielding is a property of a set of versions, and it only grows with the set: p yields or not by pairs, and no pair
//! is ever taken back. So it does not depend on the order of arrival. Two variants that lose fewer rows do not converge,
//! and the simulator must catch both:
//! * *Only current versions claim*: v takes x from p, then v's row moves away. A node that forgot p before it heard of
//!   the move cannot bring p back; one that heard of the move first never took p away.
//! * *Who yields does not claim*: v takes x from p, and then yields itself to a w on its way, which frees x. Whether p is
//!   still remembered then is chance.
//!
//! # Why the keys hold
//!
//! Take two rows whose current versions a and b do not yield and claim one value. They are not concurrent, or one would
//! yield; say b's transaction had seen a. Then a's row was in the table at b's origin when b committed: a is current
//! here, where more is known, so it was current there; it does not yield here, so it did not there. Then b's own server
//! refused b. What this needs: at an origin the rows that should be in the table are in it (more may be), and the key is
//! enforced there. A row in quarantine breaks it, as does a key that other nodes do not have. So versions that cover one
//! another never yield here, and the server, should it refuse one after all, is answered by the applier. A policy under
//! which an earlier version can become current again breaks it, too: registers are for last update wins.
//!
//! # Why one claim a value is enough, and it may be forgotten
//!
//! Versions are met in causal order. The claim m with the highest stamp is kept, whoever made it. Let v come in, and c be
//! another claim, lower than m. If c is concurrent with m it yields already (or is of m's row, and not current). If m
//! covers c, then c's row had moved, was gone, or yielded at m's origin, or m had been refused there: in each case v need
//! not be told of c. Lower than m, v yields to m itself. What is stable is covered by all that is still to come, so takes
//! nothing from it and loses nothing to it: forgetting it changes no later answer. That p yields is kept with the row's
//! current version, as long as that is kept.

use std::collections::BTreeMap;

use anabranch_proto::Vector;

use crate::version::Version;

/// A row's claim on a value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claim<R> {
    /// The row.
    pub row: R,
    /// The version of it that has the value.
    pub version: Version,
}

/// What becomes of a claim that comes in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome<R> {
    /// It has the value, and nobody has to give it up who did not do so knowingly.
    Holds,
    /// It has the value; this one, concurrent and earlier, yields.
    Beats(Claim<R>),
    /// This one, concurrent and later, has the value: the incoming version yields.
    Yields(Claim<R>),
}

/// Who has which value. `V` names a value of a unique key, `R` a row.
#[derive(Debug, Clone)]
pub struct Claims<V, R> {
    highest: BTreeMap<V, Claim<R>>,
}

impl<V, R> Default for Claims<V, R> {
    fn default() -> Self {
        Self {
            highest: BTreeMap::new(),
        }
    }
}

impl<V: Ord, R: Clone + Eq> Claims<V, R> {
    /// Meets a claim of a version whose transaction depends on `deps`. To be called in causal order, once a
    /// transaction is known whole: with the last version that it makes of each row, puts only, whether that becomes
    /// current or not. Called again for the same claims it gives the same answer, but for `Beats`.
    pub fn meet(&mut self, value: V, row: &R, version: Version, deps: &Vector) -> Outcome<R> {
        let incoming = Claim {
            row: row.clone(),
            version,
        };
        let Some(held) = self.highest.get_mut(&value) else {
            self.highest.insert(value, incoming);
            return Outcome::Holds;
        };
        if version.stamp < held.version.stamp {
            return if held.row == *row {
                Outcome::Holds
            } else {
                Outcome::Yields(held.clone())
            };
        }
        let same = held.row == *row || held.version.stamp == version.stamp;
        let before = std::mem::replace(held, incoming);
        if same || before.version.covered_by(deps) {
            Outcome::Holds
        } else {
            Outcome::Beats(before)
        }
    }

    /// Forgets what is stable.
    pub fn forget_stable(&mut self, stable: &Vector) {
        self.highest.retain(|_, claim| !claim.version.covered_by(stable));
    }

    /// How many values are claimed by what is not known to be stable.
    #[must_use]
    pub fn len(&self) -> usize {
        self.highest.len()
    }

    /// Nothing is claimed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.highest.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use anabranch_proto::{NodeId, Position, Stamp};
    use uhlc::NTP64;

    use super::*;
    use crate::version::Kind;

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

    fn claim(row: char, time: u64, node: u16) -> Claim<char> {
        Claim {
            row,
            version: version(time, node),
        }
    }

    #[test]
    fn of_concurrent_claims_the_latest_has_the_value_whatever_comes_first() {
        let none = Vector::new();
        let mut claims = Claims::default();
        assert_eq!(claims.meet("x", &'a', version(5, 1), &none), Outcome::Holds);
        assert_eq!(
            claims.meet("x", &'b', version(7, 2), &none),
            Outcome::Beats(claim('a', 5, 1))
        );
        assert_eq!(
            claims.meet("x", &'c', version(6, 3), &none),
            Outcome::Yields(claim('b', 7, 2))
        );
        assert_eq!(claims.meet("y", &'c', version(6, 3), &none), Outcome::Holds);
        assert_eq!(claims.len(), 2);
    }

    #[test]
    fn who_has_seen_a_claim_takes_the_value_from_nobody() {
        let mut claims = Claims::default();
        claims.meet("x", &'a', version(5, 1), &Vector::new());
        let deps: Vector = [(NodeId(1), Position::new(1, 5))].into_iter().collect();
        assert_eq!(claims.meet("x", &'b', version(7, 2), &deps), Outcome::Holds);
        assert_eq!(
            claims.meet("x", &'c', version(6, 3), &deps),
            Outcome::Yields(claim('b', 7, 2))
        );
    }

    #[test]
    fn versions_of_one_row_and_of_one_transaction_do_not_compete() {
        let none = Vector::new();
        let mut claims = Claims::default();
        claims.meet("x", &'a', version(5, 1), &none);
        assert_eq!(claims.meet("x", &'a', version(7, 2), &none), Outcome::Holds);
        assert_eq!(claims.meet("x", &'a', version(6, 3), &none), Outcome::Holds);
        assert_eq!(claims.meet("x", &'b', version(7, 2), &none), Outcome::Holds);
    }

    #[test]
    fn what_is_stable_is_forgotten() {
        let mut claims = Claims::default();
        claims.meet("x", &'a', version(5, 1), &Vector::new());
        claims.forget_stable(&[(NodeId(1), Position::new(1, 4))].into_iter().collect());
        assert!(!claims.is_empty());
        claims.forget_stable(&[(NodeId(1), Position::new(1, 5))].into_iter().collect());
        assert!(claims.is_empty());
    }
}
