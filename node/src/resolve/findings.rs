//! Findings that wait, in their order, and the first WAL place of any.
//!
//! In:   findings            Out: all of them at once; where the slot must wait
//! Invariants: what [`Findings::first`] says is the least place of all that are held
//! On crash: found again

use std::collections::VecDeque;

use anabranch_proto::Lsn;

use super::Found;

/// See the head of the module. The slot's place is asked for with every feedback to the server, and one transaction may find a million.
#[derive(Debug, Default)]
pub(super) struct Findings {
    all: VecDeque<Found>,
    from: Option<Lsn>,
}

impl Findings {
    pub(super) fn push(&mut self, found: Found) {
        self.from = Some(self.from.map_or(found.lsn, |from| from.min(found.lsn)));
        self.all.push_back(found);
    }

    /// Puts some before all others.
    pub(super) fn put_first(&mut self, some: Vec<Found>) {
        self.from = some.iter().map(|found| found.lsn).chain(self.from).min();
        for found in some.into_iter().rev() {
            self.all.push_front(found);
        }
    }

    pub(super) fn take(&mut self) -> Vec<Found> {
        std::mem::take(self).all.into()
    }

    /// None counts as one behind this place.
    pub(super) fn hold_at(&mut self, lsn: Lsn) {
        for found in &mut self.all {
            found.lsn = found.lsn.min(lsn);
        }
        self.from = self.from.map(|from| from.min(lsn));
    }

    /// The first WAL place of any.
    pub(super) const fn first(&self) -> Option<Lsn> {
        self.from
    }

    pub(super) fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Found> {
        self.all.iter()
    }
}

impl Extend<Found> for Findings {
    fn extend<T: IntoIterator<Item = Found>>(&mut self, some: T) {
        for found in some {
            self.push(found);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use anabranch_conflict::{Kind, Version};
    use anabranch_proto::schema::TableDesc;
    use anabranch_proto::stamp::NTP64;
    use anabranch_proto::{NodeId, Position, Stamp};
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    use super::*;
    use crate::index::{RowKey, TableId};

    fn found(lsn: u64) -> Found {
        let table = Arc::new(TableDesc {
            schema: "public".to_owned(),
            name: "item".to_owned(),
            columns: Vec::new(),
            key: Vec::new(),
            identity_full: false,
        });
        let version = Version {
            stamp: Stamp {
                time: NTP64(lsn),
                node: NodeId(1),
            },
            position: Position::new(1, lsn),
            kind: Kind::Put,
        };
        let key = RowKey::from_canonical(TableId(1), &lsn.to_be_bytes());
        Found::of_versions(Lsn(lsn), &table, key, version, version)
    }

    #[test]
    fn the_first_place_is_that_of_all_that_are_held_whatever_came_and_went() {
        let mut rng = StdRng::seed_from_u64(7);
        for _ in 0..200 {
            let (mut some, mut taken) = (Findings::default(), Vec::new());
            for _ in 0..50 {
                match rng.random_range(0..10) {
                    0..5 => some.push(found(rng.random_range(1..1_000))),
                    5 => some.extend([found(rng.random_range(1..1_000)), found(5)]),
                    6 => taken = some.take(),
                    7 => some.put_first(std::mem::take(&mut taken)),
                    8 => some.hold_at(Lsn(rng.random_range(1..1_000))),
                    _ => drop(some.take()),
                }
                assert_eq!(some.first(), some.iter().map(|found| found.lsn).min());
                assert_eq!(some.is_empty(), some.first().is_none());
            }
        }
    }

    #[test]
    fn what_is_put_first_keeps_its_order() {
        let mut some = Findings::default();
        some.extend([found(1), found(2)]);
        let taken = some.take();
        some.push(found(3));
        some.put_first(taken);
        let places: Vec<u64> = some.take().iter().map(|found| found.lsn.0).collect();
        assert_eq!(places, [1, 2, 3]);
    }
}
