//! Truncates: versions of a whole table.
//!
//! A truncate acts as a delete of every key of its table, present or not. Under last update wins the current
//! state of a row is then the later of its own entry and the table's latest truncate.
//!
//! In:   the table's latest unstable truncate, versions with their dependencies      Out: verdicts
//! Holds: nothing; the caller keeps one [`TableVersion`] per table, until it is stable
//!
//! # Why the truncate with the highest stamp is enough
//!
//! Let M be the highest of the unstable truncates, v an incoming row version, T any other truncate. v must
//! yield to T when it does not cover T and T is later. Then M is later than v too, so v does not cover M
//! (covered implies lower), and v yields to M just as well. And if v does not yield to M, it is later than M,
//! so than every T. Covered or concurrent with the others makes no difference: by stamp, v stays against all.
//! The same holds when M is stable and forgotten: what comes then covers M, so is later than M and than T.
//! A truncate that is not later than M finds nothing: what it would remove, M removed, and every row
//! that survived M or came after it is later than M ([`admit_truncate`] then says so for every row).
//! This argument is for last update wins only: a priority over origins would need the whole frontier.
//!
//! # What is promised of the log
//!
//! Rows that a truncate outstamps without having seen them are losers like any other (the proof in
//! [`crate::last_writer`] holds with a truncate as w or v2). A truncate itself is never a loser that must
//! be logged: it removed all it saw, and what it did not see and is newer stays. The caller may note it
//! ([`OnRow::Survives`]).

use anabranch_proto::{NodeId, Position, Stamp, Vector};
use serde::{Deserialize, Serialize};

use crate::version::Version;

/// A truncate of one table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct TableVersion {
    /// The stamp of its transaction.
    pub stamp: Stamp,
    /// Where its transaction committed in its origin's stream.
    pub position: Position,
}

impl TableVersion {
    /// The node that truncated.
    #[must_use]
    pub const fn origin(&self) -> NodeId {
        self.stamp.node
    }

    /// Had a transaction with the dependencies `deps` seen this truncate?
    #[must_use]
    pub fn covered_by(&self, deps: &Vector) -> bool {
        deps.covers(self.origin(), self.position)
    }
}

/// The truncate to keep for a table once `incoming` is admitted.
#[must_use]
pub fn latest(current: Option<TableVersion>, incoming: TableVersion) -> TableVersion {
    match current {
        Some(current) if current.stamp > incoming.stamp => current,
        _ => incoming,
    }
}

/// What the table's latest truncate means for an incoming row version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AgainstTruncate {
    /// Nothing: the row's own entry decides ([`crate::last_writer::admit`]).
    Stays,
    /// The truncate is concurrent and later: log the incoming version, write nothing, keep no entry.
    Loses,
}

/// Decides an incoming row version against the latest unstable truncate of its table, before the row's own
/// entry is looked at. A version of the truncating transaction itself stays: it is met behind its truncate, so it came after.
/// (One that came before is met before, and goes with the truncate: [`admit_truncate`].)
#[must_use]
pub fn admit_row(truncate: Option<&TableVersion>, incoming: &Version, deps: &Vector) -> AgainstTruncate {
    match truncate {
        Some(truncate) if incoming.stamp < truncate.stamp && !truncate.covered_by(deps) => {
            AgainstTruncate::Loses
        }
        _ => AgainstTruncate::Stays,
    }
}

/// What an incoming truncate means for one row of its table that has an entry. (A row without one was last
/// written by something stable, which the truncate has seen: it goes.)
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnRow {
    /// The truncate saw this version, or its own transaction wrote it before: remove the row and the entry.
    Gone,
    /// The version is concurrent and older: remove the row and the entry, and log the version.
    GoneOver,
    /// The version is concurrent and newer: it stays.
    Survives,
}

/// Decides an incoming truncate against the current version of one row. Removing the entry of a row that
/// goes is right: the truncate stands for it from now on. (A caller that keeps a tombstone with the truncate's
/// stamp instead, say while the row is repaired, must not take it for the row's version when the same
/// transaction also writes the row: their stamps are equal.)
///
/// Of the truncating transaction itself, what is met before its truncate came before. So a truncate must not be met again while
/// the index holds what its transaction wrote behind it, unless that is met again as well.
#[must_use]
pub fn admit_truncate(row: &Version, truncate: &TableVersion, deps: &Vector) -> OnRow {
    if row.stamp > truncate.stamp {
        OnRow::Survives
    } else if row.stamp == truncate.stamp || row.covered_by(deps) {
        OnRow::Gone
    } else {
        OnRow::GoneOver
    }
}

#[cfg(test)]
mod tests {
    use uhlc::NTP64;

    use super::*;
    use crate::version::Kind;

    fn stamp(time: u64, node: u16) -> Stamp {
        Stamp {
            time: NTP64(time),
            node: NodeId(node),
        }
    }

    fn row(time: u64, node: u16, lsn: u64) -> Version {
        Version {
            stamp: stamp(time, node),
            position: Position::new(1, lsn),
            kind: Kind::Put,
        }
    }

    fn truncate(time: u64, node: u16, lsn: u64) -> TableVersion {
        TableVersion {
            stamp: stamp(time, node),
            position: Position::new(1, lsn),
        }
    }

    fn deps(node: u16, lsn: u64) -> Vector {
        [(NodeId(node), Position::new(1, lsn))].into_iter().collect()
    }

    #[test]
    fn a_write_that_saw_the_truncate_stays() {
        let seen = admit_row(Some(&truncate(5, 1, 10)), &row(6, 2, 1), &deps(1, 10));
        assert_eq!(seen, AgainstTruncate::Stays);
        assert_eq!(
            admit_row(None, &row(6, 2, 1), &Vector::new()),
            AgainstTruncate::Stays
        );
    }

    #[test]
    fn a_concurrent_write_stays_only_if_it_is_newer() {
        let truncate = truncate(5, 1, 10);
        assert_eq!(
            admit_row(Some(&truncate), &row(6, 2, 1), &Vector::new()),
            AgainstTruncate::Stays
        );
        assert_eq!(
            admit_row(Some(&truncate), &row(4, 2, 1), &Vector::new()),
            AgainstTruncate::Loses
        );
    }

    #[test]
    fn a_truncate_removes_what_it_saw_and_what_it_outstamps() {
        let truncate = truncate(5, 1, 10);
        assert_eq!(admit_truncate(&row(4, 2, 7), &truncate, &deps(2, 7)), OnRow::Gone);
        assert_eq!(
            admit_truncate(&row(4, 2, 8), &truncate, &deps(2, 7)),
            OnRow::GoneOver
        );
        assert_eq!(
            admit_truncate(&row(6, 2, 8), &truncate, &deps(2, 7)),
            OnRow::Survives
        );
    }

    #[test]
    fn what_a_transaction_writes_after_its_own_truncate_stays_and_what_it_wrote_before_goes() {
        let (truncate, row) = (truncate(5, 1, 10), row(5, 1, 10));
        assert_eq!(
            admit_row(Some(&truncate), &row, &Vector::new()),
            AgainstTruncate::Stays
        );
        assert_eq!(admit_truncate(&row, &truncate, &Vector::new()), OnRow::Gone);
    }

    #[test]
    fn the_latest_truncate_is_kept_in_either_order() {
        let (low, high) = (truncate(5, 1, 10), truncate(5, 2, 3));
        assert_eq!(latest(Some(low), high), high);
        assert_eq!(latest(Some(high), low), high);
        assert_eq!(latest(None, low), low);
    }
}
