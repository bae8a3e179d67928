//! Versions: one write of one row, as much of it as decisions need.
//!
//! A transaction that writes a key several times has one version of it, the last (operation order); its
//! versions of different keys share stamp and position.
//!
//! Not here: row images and changed columns (they stay with the transaction).

use anabranch_proto::{NodeId, Position, Stamp, Vector};
use serde::{Deserialize, Serialize};

/// What a write left at its key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Kind {
    /// A row: an insert, an update, or the new key of a move.
    Put,
    /// No row: a delete, or the old key of a move.
    Delete,
}

/// One write of one row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Version {
    /// The stamp of its transaction; names the version among those of its key.
    pub stamp: Stamp,
    /// Where its transaction committed in its origin's stream.
    pub position: Position,
    /// What it left.
    pub kind: Kind,
}

impl Version {
    /// The node that wrote it.
    #[must_use]
    pub const fn origin(&self) -> NodeId {
        self.stamp.node
    }

    /// Had a transaction with the dependencies `deps` seen this version?
    #[must_use]
    pub fn covered_by(&self, deps: &Vector) -> bool {
        deps.covers(self.origin(), self.position)
    }
}

#[cfg(test)]
mod tests {
    use uhlc::NTP64;

    use super::*;

    #[test]
    fn a_version_is_covered_from_its_own_position_on() {
        let version = Version {
            stamp: Stamp {
                time: NTP64(9),
                node: NodeId(2),
            },
            position: Position::new(1, 50),
            kind: Kind::Put,
        };
        let at = |epoch, lsn| {
            [(NodeId(2), Position::new(epoch, lsn))]
                .into_iter()
                .collect::<Vector>()
        };
        assert!(version.covered_by(&at(1, 50)));
        assert!(version.covered_by(&at(2, 1)));
        assert!(!version.covered_by(&at(1, 49)));
        assert!(!version.covered_by(&Vector::new()));
    }
}
