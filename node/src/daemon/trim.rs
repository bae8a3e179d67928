//! What the journal may let go, and what is said of it to the next life.
//!
//! In:   what is stable, again and again        Out: the vector to trim to; `settled.json` in the data folder
//! Holds: what was stable and what was known at one moment, and what was known once that was stable
//! Invariants: 1. a version goes only when everything that was known with it is stable, too. What comes later covers it:
//!        so no row has a version in the journal that one beats which is gone, unless both are settled; 2. and only when
//!        all that was known by then is stable as well: so what is not settled covers all that was concurrent with it
//!        (`anabranch_conflict::merge` needs that); 3. what is settled is on disk before anything goes; 4. what a row of merged columns
//!        may still be folded from stays, though it may go ([`without`])
//! On crash: begins anew
//! Not here: what is stable (`anabranch-conflict`), deleting (`crate::journal`), what it means (`crate::resolve`)

use std::collections::BTreeMap;
use std::path::Path;

use anabranch_proto::{Lsn, NodeId, Position, Stamp, Vector};

use crate::small_file;

const FILE: &str = "settled.json";

/// What may go.
#[derive(Debug, Default)]
pub(super) struct Trim {
    /// Stable at one moment with the stamp that nothing in it is above, and all that was known then.
    first: Option<(Vector, Stamp, Vector)>,
    /// The same of an earlier moment, and all that was known once what was known then was stable.
    second: Option<(Vector, Stamp, Vector)>,
    upto: Vector,
    settled: Vector,
    low: Stamp,
}

impl Trim {
    /// Meets what is stable and lies below the place where a restart begins, with a stamp that nothing in it is above and
    /// that all still to come is above; and all that is known. To be called only when no finding waits.
    pub(super) fn meet(&mut self, (stable, low): (Vector, Stamp), known: Vector) {
        if let Some((then, low, all)) = &self.second
            && stable.includes(all)
        {
            self.upto.join(then);
            self.settled.join(&stable);
            self.low = self.low.max(*low);
            self.second = None;
        }
        if self.second.is_none()
            && let Some((then, low, all)) = self.first.take()
        {
            if stable.includes(&all) {
                self.second = Some((then, low, known.clone()));
            } else {
                self.first = Some((then, low, all));
            }
        }
        self.first.get_or_insert((stable, low, known));
    }

    /// The journal may be trimmed up to here.
    pub(super) const fn upto(&self) -> &Vector {
        &self.upto
    }

    /// What is settled then.
    pub(super) const fn settled(&self) -> &Vector {
        &self.settled
    }

    /// No stamp of what may be trimmed is above.
    pub(super) const fn low(&self) -> Stamp {
        self.low
    }
}

/// What may go, without what is `wanted`: of some nodes, what is from a place on. What goes later than it may is never missed, and what is
/// settled then stays settled.
pub(super) fn without(upto: &Vector, wanted: &BTreeMap<NodeId, Position>) -> Vector {
    let before = |first: Position| Position {
        lsn: Lsn(first.lsn.0.saturating_sub(1)),
        ..first
    };
    let of = |(node, position): (NodeId, Position)| {
        let first = wanted.get(&node);
        (node, first.map_or(position, |first| position.min(before(*first))))
    };
    upto.iter().map(of).collect()
}

#[derive(serde::Serialize, serde::Deserialize)]
struct Kept {
    settled: Vector,
    low: Stamp,
}

/// Keeps what is settled and what nothing that went is above, durably.
pub(crate) fn write(dir: &Path, settled: &Vector, low: Stamp) -> std::io::Result<()> {
    let kept = Kept {
        settled: settled.clone(),
        low,
    };
    let text = serde_json::to_vec(&kept).map_err(std::io::Error::other)?;
    small_file::replace(&dir.join(FILE), &text)
}

/// What was kept last; nothing, if nothing ever went.
pub(super) fn read(dir: &Path) -> std::io::Result<(Vector, Stamp)> {
    match std::fs::read(dir.join(FILE)) {
        Ok(text) => match serde_json::from_slice::<Kept>(&text) {
            Ok(kept) => Ok((kept.settled, kept.low)),
            // Written before columns were merged.
            Err(_) => Ok((
                serde_json::from_slice(&text).map_err(std::io::Error::other)?,
                Stamp::ZERO,
            )),
        },
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok((Vector::new(), Stamp::ZERO)),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vector(a: u64, b: u64) -> Vector {
        [(NodeId(1), a), (NodeId(2), b)]
            .into_iter()
            .map(|(node, lsn)| (node, Position::new(1, lsn)))
            .collect()
    }

    fn stamp(time: u64) -> Stamp {
        Stamp {
            time: anabranch_proto::stamp::NTP64(time),
            node: NodeId(1),
        }
    }

    #[test]
    fn what_is_stable_goes_once_all_that_was_known_with_it_and_then_by_then_is_stable() {
        let mut trim = Trim::default();
        let meet = |trim: &mut Trim, stable: (u64, u64), known: (u64, u64)| {
            trim.meet(
                (vector(stable.0, stable.1), stamp(stable.0)),
                vector(known.0, known.1),
            );
        };
        meet(&mut trim, (5, 5), (9, 7));
        meet(&mut trim, (9, 6), (20, 20));
        assert_eq!((trim.upto(), trim.low()), (&Vector::new(), Stamp::ZERO));
        meet(&mut trim, (9, 7), (21, 21));
        assert_eq!(trim.upto(), &Vector::new());
        meet(&mut trim, (20, 21), (22, 22));
        assert_eq!(trim.upto(), &Vector::new());
        meet(&mut trim, (21, 21), (23, 23));
        assert_eq!(
            (trim.upto(), trim.settled(), trim.low()),
            (&vector(5, 5), &vector(21, 21), stamp(5))
        );
        meet(&mut trim, (23, 23), (23, 23));
        assert_eq!(
            (trim.upto(), trim.settled(), trim.low()),
            (&vector(9, 7), &vector(23, 23), stamp(9))
        );
    }

    #[test]
    fn what_rows_may_still_be_folded_from_stays() {
        let wanted = |node, lsn| BTreeMap::from([(NodeId(node), Position::new(1, lsn))]);
        assert_eq!(without(&vector(5, 5), &BTreeMap::new()), vector(5, 5));
        assert_eq!(without(&vector(5, 5), &wanted(1, 4)), vector(3, 5));
        assert_eq!(without(&vector(5, 5), &wanted(2, 9)), vector(5, 5));
        assert_eq!(without(&vector(5, 5), &wanted(3, 1)), vector(5, 5));
    }

    #[test]
    fn what_is_settled_is_read_back() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(read(dir.path()).unwrap(), (Vector::new(), Stamp::ZERO));
        write(dir.path(), &vector(3, 4), stamp(8)).unwrap();
        assert_eq!(read(dir.path()).unwrap(), (vector(3, 4), stamp(8)));
        let former = serde_json::to_vec(&vector(3, 4)).unwrap();
        std::fs::write(dir.path().join(FILE), former).unwrap();
        assert_eq!(read(dir.path()).unwrap(), (vector(3, 4), Stamp::ZERO));
    }
}
