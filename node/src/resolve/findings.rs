//! Findings that wait, in their order, and the first WAL place of any.
//!
//! In:   findings            Out: a portion of them at once; where the slot must wait
//! Holds: in memory the portion that goes next and the one that came last, of [`PORTION_BYTES`] each; what is between them in a file
//! Invariants: 1. what [`Findings::first`] says is not above the place of any that is held; 2. a file that cannot be written costs memory
//!        and nothing else
//! On crash: found again

mod overflow;

use std::collections::VecDeque;
use std::io;
use std::path::Path;

use anabranch_proto::Lsn;
use anabranch_proto::row::RowImage;

use self::overflow::Overflow;
use super::Found;

/// What is worked off at once, about: one transaction may find a million, each with its row.
const PORTION_BYTES: usize = 4 << 20;

/// See the head of the module.
pub(super) struct Findings {
    next: Held,
    overflow: Overflow,
    last: Held,
    last_bytes: usize,
    portion_bytes: usize,
}

impl Findings {
    /// None yet; what does not fit into memory goes into a file of `folder`, which is made when it is wanted.
    pub(super) fn new(folder: &Path) -> Self {
        Self {
            next: Held::default(),
            overflow: Overflow::new(folder),
            last: Held::default(),
            last_bytes: 0,
            portion_bytes: PORTION_BYTES,
        }
    }

    pub(super) fn push(&mut self, found: Found) {
        // A slice of what was read from the server keeps all of that.
        let own = |image: Option<RowImage>| image.map(|image| image.detached());
        let found = Found {
            local_row: own(found.local_row),
            key_image: own(found.key_image),
            ..found
        };
        self.last_bytes += memory_len(&found);
        self.last.push(found);
        if self.last_bytes >= self.portion_bytes && self.overflow.put(&self.last) {
            drop(self.last.take());
            self.last_bytes = 0;
        }
    }

    /// Puts some before all others.
    pub(super) fn put_first(&mut self, some: Vec<Found>) {
        self.next.put_first(some);
    }

    /// Takes the portion that goes next; none is left once it is empty.
    pub(super) fn take(&mut self) -> io::Result<Vec<Found>> {
        if !self.next.is_empty() {
            return Ok(self.next.take());
        }
        if let Some(some) = self.overflow.take()? {
            return Ok(some);
        }
        self.last_bytes = 0;
        Ok(self.last.take())
    }

    /// None counts as one behind this place.
    pub(super) fn hold_at(&mut self, lsn: Lsn) {
        self.next.hold_at(lsn);
        self.overflow.hold_at(lsn);
        self.last.hold_at(lsn);
    }

    /// The first WAL place of any.
    pub(super) fn first(&self) -> Option<Lsn> {
        let firsts = [self.next.first(), self.overflow.first(), self.last.first()];
        firsts.into_iter().flatten().min()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.next.is_empty() && self.overflow.is_empty() && self.last.is_empty()
    }

    /// Those in memory: all, unless [`Self::overflows`].
    pub(super) fn iter(&self) -> impl Iterator<Item = &Found> {
        self.next.iter().chain(self.last.iter())
    }

    /// Are there some in the file?
    pub(super) fn overflows(&self) -> bool {
        !self.overflow.is_empty()
    }
}

impl Extend<Found> for Findings {
    fn extend<T: IntoIterator<Item = Found>>(&mut self, some: T) {
        for found in some {
            self.push(found);
        }
    }
}

/// Memory of a finding, bytes, about.
fn memory_len(found: &Found) -> usize {
    let images = [&found.local_row, &found.key_image].into_iter().flatten();
    let images: usize = images.map(|image| image.as_bytes().len()).sum();
    let rival = found.rival.as_ref().map_or(0, |rival| rival.key.heap_len());
    size_of::<Found>() + images + found.key.heap_len() + rival
}

/// Findings in memory. The slot's place is asked for with every feedback to the server.
#[derive(Debug, Default)]
pub(super) struct Held {
    all: VecDeque<Found>,
    from: Option<Lsn>,
}

impl Held {
    pub(super) fn push(&mut self, found: Found) {
        self.from = Some(self.from.map_or(found.lsn, |from| from.min(found.lsn)));
        self.all.push_back(found);
    }

    fn put_first(&mut self, some: Vec<Found>) {
        self.from = some.iter().map(|found| found.lsn).chain(self.from).min();
        for found in some.into_iter().rev() {
            self.all.push_front(found);
        }
    }

    pub(super) fn take(&mut self) -> Vec<Found> {
        std::mem::take(self).all.into()
    }

    fn hold_at(&mut self, lsn: Lsn) {
        for found in &mut self.all {
            found.lsn = found.lsn.min(lsn);
        }
        self.from = self.from.map(|from| from.min(lsn));
    }

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

impl Extend<Found> for Held {
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
    use anabranch_proto::row::Cell;
    use anabranch_proto::schema::TableDesc;
    use anabranch_proto::stamp::NTP64;
    use anabranch_proto::{NodeId, Position, Stamp};
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    use super::super::{LocalTxn, Rival};
    use super::*;
    use crate::index::{RowKey, TableId};

    fn table(name: &str) -> Arc<TableDesc> {
        Arc::new(TableDesc {
            schema: "public".to_owned(),
            name: name.to_owned(),
            columns: Vec::new(),
            key: Vec::new(),
            identity_full: false,
        })
    }

    fn version(node: u16, lsn: u64, kind: Kind) -> Version {
        Version {
            stamp: Stamp {
                time: NTP64(lsn),
                node: NodeId(node),
            },
            position: Position::new(3, lsn),
            kind,
        }
    }

    fn found(lsn: u64) -> Found {
        let version = version(1, lsn, Kind::Put);
        let key = RowKey::from_canonical(TableId(1), &lsn.to_be_bytes());
        Found::of_versions(Lsn(lsn), &table("item"), key, version, version)
    }

    /// Nothing fits into memory but `portion_bytes`.
    fn small(dir: &tempfile::TempDir, portion_bytes: usize) -> Findings {
        Findings {
            portion_bytes,
            ..Findings::new(&dir.path().join("index"))
        }
    }

    fn places(some: &[Found]) -> Vec<u64> {
        some.iter()
            .map(|found| found.key.canonical())
            .map(|key| u64::from_be_bytes(key.try_into().unwrap()))
            .collect()
    }

    #[test]
    fn the_first_place_is_that_of_all_that_are_held_whatever_came_and_went() {
        let mut rng = StdRng::seed_from_u64(7);
        for _ in 0..200 {
            let (mut some, mut taken) = (Held::default(), Vec::new());
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
    fn all_come_out_in_their_order_whatever_is_in_the_file_and_the_slot_waits_for_each() {
        let dir = tempfile::tempdir().unwrap();
        let mut rng = StdRng::seed_from_u64(11);
        for portion_bytes in [1, 3 * size_of::<Found>(), usize::MAX] {
            let mut some = small(&dir, portion_bytes);
            // What is held, each with the place that the slot waits at.
            let mut held: VecDeque<(u64, u64)> = VecDeque::new();
            let mut overflowed = false;
            for at in 1..2_000_u64 {
                match rng.random_range(0..12) {
                    0..8 => {
                        some.push(found(at));
                        held.push_back((at, at));
                    }
                    8 => {
                        let lsn = rng.random_range(1..=at);
                        some.hold_at(Lsn(lsn));
                        held.iter_mut().for_each(|(_, place)| *place = lsn.min(*place));
                    }
                    what => {
                        let taken = some.take().unwrap();
                        let expected: Vec<u64> =
                            held.iter().take(taken.len()).map(|(name, _)| *name).collect();
                        assert_eq!(places(&taken), expected);
                        assert_eq!(taken.is_empty(), held.is_empty());
                        match what {
                            9 => some.put_first(taken),
                            _ => drop(held.drain(..taken.len())),
                        }
                    }
                }
                overflowed |= some.overflows();
                assert_eq!(some.is_empty(), held.is_empty());
                assert_eq!(some.first().is_none(), held.is_empty());
                let least = held.iter().map(|(_, place)| *place).min();
                assert!(some.first().is_none_or(|first| Some(first.0) <= least));
                let in_memory: usize = some.last.iter().map(memory_len).sum();
                assert_eq!(in_memory, some.last_bytes);
                assert!(in_memory < portion_bytes);
            }
            assert_eq!(overflowed, portion_bytes < usize::MAX);
        }
        // The file has no name, so a crash leaves nothing.
        assert_eq!(std::fs::read_dir(dir.path().join("index")).unwrap().count(), 0);
    }

    #[test]
    fn what_was_in_the_file_is_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let mut some = small(&dir, 1);
        let stamp = version(2, 9, Kind::Put).stamp;
        let row = RowImage::build([Cell::Binary(&[7; 300]), Cell::Null, Cell::Text(b"x")].into_iter());
        let full = Found {
            local_row: Some(row.clone()),
            key_image: Some(RowImage::build([Cell::Unchanged].into_iter())),
            local_txn: Some(LocalTxn {
                stamp,
                position: Position::new(4, 77),
                xid: u32::MAX,
                commit_us: -5,
            }),
            remote: version(9, 3, Kind::Delete),
            local_won: true,
            repair: false,
            settle: true,
            log: true,
            rival: Some(Rival {
                key: RowKey::from_canonical(TableId(1), &[5; 200]),
                constraint: Arc::from("item_name_key"),
            }),
            table: table("other"),
            ..found(8)
        };
        let row_alone = Found {
            local_row: Some(row),
            ..found(9)
        };
        let put = [full, found(7), row_alone];
        some.extend(put.clone());
        for expected in put {
            assert!(some.overflows());
            let taken = some.take().unwrap();
            assert_eq!(format!("{taken:?}"), format!("{:?}", [expected]));
        }
        assert!(some.is_empty());
    }

    #[test]
    fn where_there_can_be_no_file_they_stay_in_memory() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("index"), "no folder").unwrap();
        let mut some = small(&dir, 1);
        some.extend([found(1), found(2), found(3)]);
        assert!(!some.overflows());
        assert_eq!(places(&some.take().unwrap()), [1, 2, 3]);
        assert!(some.is_empty());
    }
}
