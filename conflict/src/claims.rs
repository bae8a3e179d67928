//! Claim registers: which row has a value of a secondary unique key, when several claimed it unseen by each other.
//!
//! In:   the rows that a transaction leaves with their unique values, its stamp, what it depends on
//! Out:  who yields to whom
//! Holds: per value the claim with the highest stamp, and those below that may still have to yield
//! Must never: compare by what stands in a table, or by who came first; trust that who covers a claim ended it
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
//! Take two rows whose current versions a and b do not yield and have one value in the server's eyes, so in the caller's,
//! too. They are not concurrent, or one would yield; say b's transaction had seen a. Then a's row was in the table at b's
//! origin when b committed: a is current here, where more is known, so it was current there; it does not yield here, so it
//! did not there. Then b's own server refused b. What this needs: at an origin the rows that should be in the table are in
//! it (more may be), and the key is enforced there. A row in quarantine breaks it, as does a key that other nodes do not
//! have. So versions that cover one another never yield here, and the server, should it refuse one after all, is answered by
//! the applier. A policy under which an earlier version can become current again breaks it, too: registers are for last
//! update wins.
//!
//! # Which claims are kept
//!
//! Versions are met in causal order, so of two that are met the later one is covered by no earlier one. Only whether a
//! *current* version yields is of interest, and with last update wins none becomes current again.
//! * *To take from who comes later, the highest claim m is enough.* Let v come in, lower than some claim on its value, so
//!   lower than m. v does not cover m, as stamps go, and m does not cover v, which was not met. So v yields to m; or they are of
//!   one row, and v is not current.
//! * *To yield to who comes later, a lower claim c is kept while it may be current and does not yield.* That an m which is
//!   higher covers c does not end c: the caller's values may be coarser than the server's, so that m's server let both rows
//!   be. Then a v between them that knows of neither takes from c where it is met before m, so it must where it is met after
//!   m, although it yields to m itself. (Keeping the highest alone is a variant that the simulator must catch, too.) So c goes
//!   only when it has yielded, when a later version of its row claims the value, or when the caller says that it is not
//!   current: it is asked whenever something comes that covers c.
//!
//! So what is kept does not grow with how often a value is written, by one row or handed on from row to row. Where the
//! server calls it equal, too, it let m in since c's row had gone, moved or yielded, and the caller says so at once: one claim
//! is kept. Else it is one more for each row that had the value together with another in the server's table, and those that have
//! left it since go when the value is next handed on.
//!
//! # Why it may be forgotten
//!
//! What is stable is covered by all that is still to come, so takes nothing from it and loses nothing to it: forgetting it
//! changes no later answer. Nor does that a claim below it is the highest then: what comes is higher than both. That p
//! yields is kept with the row's current version, as long as that is kept.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

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

/// What becomes of a claim that comes in, or of one that stood.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome<R> {
    /// This one, concurrent and later, has the value: the incoming version yields.
    Yields(Claim<R>),
    /// This one, concurrent and earlier, yields to the incoming version.
    Beats(Claim<R>),
    /// The incoming version's transaction had seen this one. If it is not current any more, it is to be released:
    /// [`Claims::release`].
    Knew(Claim<R>),
}

/// Who has which value. `V` names a value of a unique key, `R` a row.
#[derive(Debug, Clone)]
pub struct Claims<V, R> {
    values: BTreeMap<V, Held<R>>,
}

/// The claims on one value.
#[derive(Debug, Clone)]
struct Held<R> {
    /// Takes the value from whoever comes later and is lower.
    highest: Claim<R>,
    /// May have to yield: those that were met and did not, of other rows, at most one of each.
    lower: Vec<Claim<R>>,
}

impl<V, R> Default for Claims<V, R> {
    fn default() -> Self {
        Self {
            values: BTreeMap::new(),
        }
    }
}

impl<V: Ord, R: Clone + Eq> Claims<V, R> {
    /// Meets a claim of a version whose transaction depends on `deps`: at most one [`Outcome::Yields`], and any number of the
    /// others. To be called in causal order, once a transaction is known whole: with the last version that it makes of each
    /// row, puts only, whether that becomes current or not. Called again for the same claims it gives the same answer, but for
    /// [`Outcome::Beats`].
    pub fn meet(&mut self, value: V, row: &R, version: Version, deps: &Vector) -> Vec<Outcome<R>> {
        let mut outcomes = Vec::new();
        let incoming = Claim {
            row: row.clone(),
            version,
        };
        let held = match self.values.entry(value) {
            Entry::Vacant(free) => {
                free.insert(Held {
                    highest: incoming,
                    lower: Vec::new(),
                });
                return outcomes;
            }
            Entry::Occupied(held) => held.into_mut(),
        };
        // Whether one that is earlier stays among those that may have to yield.
        let mut stays = |claim: &Claim<R>| {
            if claim.row == *row {
                return false;
            }
            let known = claim.version.covered_by(deps);
            outcomes.push(if known {
                Outcome::Knew(claim.clone())
            } else {
                Outcome::Beats(claim.clone())
            });
            known
        };
        let stamp = version.stamp;
        // Rows of one transaction have one stamp.
        held.lower
            .retain(|claim| claim.version.stamp >= stamp || stays(claim));
        match stamp.cmp(&held.highest.version.stamp) {
            Ordering::Greater => {
                let before = std::mem::replace(&mut held.highest, incoming);
                if stays(&before) {
                    held.lower.push(before);
                }
            }
            Ordering::Equal if held.highest.row != *row && !held.lower.contains(&incoming) => {
                held.lower.push(incoming);
            }
            // One that is kept has yielded to nobody, so it is met again.
            Ordering::Less if held.highest.row != *row && !held.lower.contains(&incoming) => {
                outcomes.push(Outcome::Yields(held.highest.clone()));
            }
            _ => {}
        }
        held.trim();
        outcomes
    }

    /// This claim, which something later knew ([`Outcome::Knew`]), is of a version that is not current, or yields: nothing that
    /// comes can take the value from it. To be called before another claim on the value is met.
    pub fn release(&mut self, value: &V, claim: &Claim<R>) {
        if let Some(held) = self.values.get_mut(value) {
            held.lower.retain(|it| it != claim);
            held.trim();
        }
    }

    /// Forgets what is stable.
    pub fn forget_stable(&mut self, stable: &Vector) {
        self.values.retain(|_, held| held.forget_stable(stable));
    }

    /// How many values are claimed by what is not known to be stable.
    #[must_use]
    pub fn len(&self) -> usize {
        self.values.len()
    }

    /// Nothing is claimed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }
}

impl<R> Held<R> {
    /// Is anything left?
    fn forget_stable(&mut self, stable: &Vector) -> bool {
        self.lower.retain(|claim| !claim.version.covered_by(stable));
        let is_left = if self.highest.version.covered_by(stable) {
            let next = (0..self.lower.len()).max_by_key(|at| self.lower.get(*at).map(|it| it.version.stamp));
            next.map(|at| self.highest = self.lower.swap_remove(at)).is_some()
        } else {
            true
        };
        self.trim();
        is_left
    }

    /// Most values are claimed by one row, and need no room for others.
    fn trim(&mut self) {
        if self.lower.is_empty() {
            self.lower = Vec::new();
        }
    }
}

#[cfg(test)]
mod tests {
    use anabranch_proto::{NodeId, Position, Stamp};
    use uhlc::NTP64;

    use super::*;
    use crate::frontier::{Deletes, Frontier, Order, Policy};
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

    fn seen(all: &[(u16, u64)]) -> Vector {
        let positions = all
            .iter()
            .map(|&(node, time)| (NodeId(node), Position::new(1, time)));
        positions.collect()
    }

    #[test]
    fn of_concurrent_claims_the_latest_has_the_value_whatever_comes_first() {
        let none = Vector::new();
        let mut claims = Claims::default();
        assert_eq!(claims.meet("x", &'a', version(5, 1), &none), []);
        assert_eq!(
            claims.meet("x", &'b', version(7, 2), &none),
            [Outcome::Beats(claim('a', 5, 1))]
        );
        assert_eq!(
            claims.meet("x", &'c', version(6, 3), &none),
            [Outcome::Yields(claim('b', 7, 2))]
        );
        assert_eq!(claims.meet("y", &'c', version(6, 3), &none), []);
        assert_eq!(claims.len(), 2);
    }

    #[test]
    fn who_has_seen_a_claim_takes_the_value_from_nobody() {
        let mut claims = Claims::default();
        claims.meet("x", &'a', version(5, 1), &Vector::new());
        let deps = seen(&[(1, 5)]);
        assert_eq!(
            claims.meet("x", &'b', version(7, 2), &deps),
            [Outcome::Knew(claim('a', 5, 1))]
        );
        claims.release(&"x", &claim('a', 5, 1));
        assert_eq!(
            claims.meet("x", &'c', version(6, 3), &Vector::new()),
            [Outcome::Yields(claim('b', 7, 2))]
        );
    }

    #[test]
    fn a_row_that_another_let_be_yields_to_one_that_did_not_know_it_whatever_comes_first() {
        let (none, deps) = (Vector::new(), seen(&[(1, 5)]));
        let mut claims = Claims::default();
        claims.meet("x", &'a', version(5, 1), &none);
        claims.meet("x", &'b', version(7, 1), &deps);
        let yields = Outcome::Yields(claim('b', 7, 1));
        let both = [Outcome::Beats(claim('a', 5, 1)), yields.clone()];
        assert_eq!(claims.meet("x", &'c', version(6, 2), &none), both);
        // Tried again it yields again, and has taken what it takes.
        assert_eq!(claims.meet("x", &'c', version(6, 2), &none), [yields]);

        let mut claims = Claims::default();
        claims.meet("x", &'a', version(5, 1), &none);
        assert_eq!(
            claims.meet("x", &'c', version(6, 2), &none),
            [Outcome::Beats(claim('a', 5, 1))]
        );
        assert_eq!(
            claims.meet("x", &'b', version(7, 1), &deps),
            [Outcome::Beats(claim('c', 6, 2))]
        );
    }

    #[test]
    fn all_rows_that_were_let_be_yield_to_one_that_knew_none_of_them() {
        let none = Vector::new();
        let mut claims = Claims::default();
        claims.meet("x", &'a', version(5, 1), &none);
        claims.meet("x", &'b', version(5, 1), &none);
        claims.meet("x", &'c', version(6, 1), &seen(&[(1, 5)]));
        // What was kept has yielded to nobody, and is not told otherwise when it is met again.
        assert_eq!(claims.meet("x", &'a', version(5, 1), &none), []);
        assert_eq!(claims.meet("x", &'b', version(5, 1), &none), []);
        let beaten = ['a', 'b', 'c'].map(|row| Outcome::Beats(claim(row, if row == 'c' { 6 } else { 5 }, 1)));
        let outcomes = claims.meet("x", &'d', version(7, 2), &none);
        assert!(beaten.iter().all(|it| outcomes.contains(it)), "{outcomes:?}");
        assert_eq!(outcomes.len(), 3);
        assert_eq!(claims.meet("x", &'e', version(8, 3), &none).len(), 1);
    }

    #[test]
    fn a_value_written_again_and_again_is_claimed_by_one_version_of_each_row() {
        let mut claims = Claims::default();
        for time in 1..100 {
            let row = if time % 2 == 0 { 'a' } else { 'b' };
            claims.meet("x", &row, version(time, 1), &seen(&[(1, time - 1)]));
            assert!(claims.values.values().all(|held| held.lower.len() <= 1));
        }
        // Handed on from row to row.
        for time in 100..200 {
            let row = char::from_u32(0x4e00 + u32::try_from(time).unwrap()).unwrap();
            for outcome in claims.meet("x", &row, version(time, 1), &seen(&[(1, time - 1)])) {
                let Outcome::Knew(claim) = outcome else {
                    panic!("{outcome:?}")
                };
                claims.release(&"x", &claim);
            }
            assert!(claims.values.values().all(|held| held.lower.capacity() == 0));
        }
    }

    #[test]
    fn versions_of_one_row_and_of_one_transaction_do_not_compete() {
        let none = Vector::new();
        let mut claims = Claims::default();
        claims.meet("x", &'a', version(5, 1), &none);
        assert_eq!(claims.meet("x", &'a', version(7, 2), &none), []);
        assert_eq!(claims.meet("x", &'a', version(6, 3), &none), []);
        assert_eq!(claims.meet("x", &'b', version(7, 2), &none), []);
    }

    /// Why tables under other policies have no registers.
    #[test]
    fn where_a_version_that_had_lost_comes_back_neither_of_two_rows_would_yield() {
        let policy = Policy {
            order: Order::FirstUpdateWins,
            deletes: Deletes::ByStamp,
        };
        let none = Vector::new();
        let mut claims = Claims::default();
        let mut row = Frontier::new();
        // Of two versions of a the second has the value, and loses to the first.
        let (first, second) = (version(1, 1), version(2, 2));
        row.admit(first, 'y', &none);
        row.admit(second, 'x', &none);
        claims.meet("x", &'a', second, &none);
        assert_eq!(row.resolve(&policy).unwrap().version, first);
        // So a server that has both lets b have it.
        let deps = seen(&[(1, 1), (2, 2)]);
        assert_eq!(
            claims.meet("x", &'b', version(3, 3), &deps),
            [Outcome::Knew(claim('a', 2, 2))]
        );
        // Who overwrites the first, and has not seen the second, brings that back.
        row.admit(version(4, 1), 'z', &seen(&[(1, 1)]));
        assert_eq!(row.resolve(&policy).unwrap().version, second);
    }

    #[test]
    fn what_is_stable_is_forgotten() {
        let mut claims = Claims::default();
        claims.meet("x", &'a', version(5, 1), &Vector::new());
        claims.forget_stable(&seen(&[(1, 4)]));
        assert!(!claims.is_empty());
        claims.forget_stable(&seen(&[(1, 5)]));
        assert!(claims.is_empty());
    }

    #[test]
    fn a_row_that_was_let_be_may_have_to_yield_also_once_the_other_is_stable() {
        let mut claims = Claims::default();
        claims.meet("x", &'a', version(5, 1), &Vector::new());
        claims.meet("x", &'b', version(7, 2), &seen(&[(1, 5)]));
        claims.forget_stable(&seen(&[(2, 7)]));
        assert_eq!(
            claims.meet("x", &'c', version(8, 3), &seen(&[(2, 7)])),
            [Outcome::Beats(claim('a', 5, 1))]
        );
    }
}
