//! What the journal may let go, and what is said of it to the next life.
//!
//! In:   what is stable, again and again        Out: the vector to trim to; `settled.json` in the data folder
//! Holds: what was stable and what was known at one moment
//! Invariants: 1. a version goes only when everything that was known with it is stable, too. What comes later covers it:
//!        so no row has a version in the journal that one beats which is gone, unless both are settled; 2. what is
//!        settled is on disk before anything goes
//! On crash: begins anew
//! Not here: what is stable (`anabranch-conflict`), deleting (`crate::journal`), what it means (`crate::resolve`)

use std::path::Path;

use anabranch_proto::Vector;

use crate::small_file;

const FILE: &str = "settled.json";

/// What may go.
#[derive(Debug, Default)]
pub(super) struct Trim {
    /// Stable at one moment, and all that was known then.
    waits: Option<(Vector, Vector)>,
    upto: Vector,
    settled: Vector,
}

impl Trim {
    /// Meets what is stable and lies below the place where a restart begins, and all that is known. To be called only
    /// when no finding waits.
    pub(super) fn meet(&mut self, stable: Vector, known: Vector) {
        if let Some((then, all)) = &self.waits
            && stable.includes(all)
        {
            self.upto.join(then);
            self.settled.join(&stable);
            self.waits = None;
        }
        self.waits.get_or_insert((stable, known));
    }

    /// The journal may be trimmed up to here.
    pub(super) const fn upto(&self) -> &Vector {
        &self.upto
    }

    /// What is settled then.
    pub(super) const fn settled(&self) -> &Vector {
        &self.settled
    }
}

/// Keeps what is settled, durably.
pub(crate) fn write(dir: &Path, settled: &Vector) -> std::io::Result<()> {
    let text = serde_json::to_vec(settled).map_err(std::io::Error::other)?;
    small_file::replace(&dir.join(FILE), &text)
}

/// What was kept last; nothing, if nothing ever went.
pub(super) fn read(dir: &Path) -> std::io::Result<Vector> {
    match std::fs::read(dir.join(FILE)) {
        Ok(text) => serde_json::from_slice(&text).map_err(std::io::Error::other),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vector::new()),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use anabranch_proto::{NodeId, Position};

    use super::*;

    fn vector(a: u64, b: u64) -> Vector {
        [(NodeId(1), a), (NodeId(2), b)]
            .into_iter()
            .map(|(node, lsn)| (node, Position::new(1, lsn)))
            .collect()
    }

    #[test]
    fn what_is_stable_goes_once_all_that_was_known_with_it_is_stable() {
        let mut trim = Trim::default();
        trim.meet(vector(5, 5), vector(9, 7));
        trim.meet(vector(9, 6), vector(20, 20));
        assert_eq!(trim.upto(), &Vector::new());
        trim.meet(vector(9, 7), vector(21, 21));
        assert_eq!((trim.upto(), trim.settled()), (&vector(5, 5), &vector(9, 7)));
        trim.meet(vector(20, 21), vector(22, 22));
        assert_eq!(trim.upto(), &vector(5, 5));
        trim.meet(vector(21, 21), vector(22, 22));
        assert_eq!((trim.upto(), trim.settled()), (&vector(9, 7), &vector(21, 21)));
    }

    #[test]
    fn what_is_settled_is_read_back() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(read(dir.path()).unwrap(), Vector::new());
        write(dir.path(), &vector(3, 4)).unwrap();
        assert_eq!(read(dir.path()).unwrap(), vector(3, 4));
    }
}
