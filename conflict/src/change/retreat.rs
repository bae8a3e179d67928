//! When the policy of before can be forgotten.
//!
//! In:   what is stable, known and settled, again and again        Out: whether a node needs the policy of before no more
//! Holds: what was known at two moments
//! On crash: begins anew

use anabranch_proto::Vector;

use super::Point;

/// How far a node is. Three things, one after the other, each of which takes in what the one before it left open:
///
/// 1. the change is stable: every member is known, from its own stream, to have made it. So every old version is known here;
/// 2. all that was known then is stable: what is still to come covers everything old;
/// 3. all that was known then is *settled* (`stable`, and written down as such): it is never decided again, not by a restart
///    either. A version that does not cover something old is among it.
///
/// One step less is not enough: a new version may be concurrent with an old one that is stable, and a restart would decide the two
/// again.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Retreat {
    all_old: Option<Vector>,
    all_beside_it: Option<Vector>,
}

impl Retreat {
    /// Meets what is stable, what is known and what is settled now. True: nothing old is ever decided again here.
    pub fn meet(&mut self, point: Point, stable: &Vector, known: &Vector, settled: &Vector) -> bool {
        if self.all_old.is_none() && stable.covers(point.node, point.position) {
            self.all_old = Some(known.clone());
        }
        if self.all_beside_it.is_none() && self.all_old.as_ref().is_some_and(|all| stable.includes(all)) {
            self.all_beside_it = Some(known.clone());
        }
        self.all_beside_it
            .as_ref()
            .is_some_and(|all| settled.includes(all))
    }
}

#[cfg(test)]
mod tests {
    use anabranch_proto::{NodeId, Position};

    use super::*;

    #[test]
    fn all_that_was_known_beside_what_is_old_must_be_settled() {
        let at = |lsn| Position::new(1, lsn);
        let vector = |lsn| -> Vector { [(NodeId(1), at(lsn))].into_iter().collect() };
        let point = Point {
            node: NodeId(1),
            position: at(5),
        };
        let mut retreat = Retreat::default();
        assert!(!retreat.meet(point, &vector(4), &vector(9), &vector(4)));
        assert!(!retreat.meet(point, &vector(5), &vector(10), &vector(4)));
        assert!(!retreat.meet(point, &vector(9), &vector(20), &vector(9)));
        assert!(!retreat.meet(point, &vector(10), &vector(21), &vector(10)));
        assert!(!retreat.meet(point, &vector(21), &vector(30), &vector(20)));
        assert!(retreat.meet(point, &vector(21), &vector(30), &vector(21)));
    }
}
