//! Last update wins: what becomes of a version that meets its row.
//!
//! In:   the row's current version (if it has an unstable one), an incoming version with its transaction's
//! dependencies      Out: a [`Verdict`]
//! Holds: nothing
//!
//! # Why one version per row is enough
//!
//! Covered implies a lower stamp (law 1). Versions are admitted in causal order, so nothing already
//! admitted has seen the incoming version. Hence [`admit`] always leaves the version with the highest stamp of
//! those admitted: a covered current is lower, a concurrent one is compared. The maximum of a set does not
//! depend on the order of arrival, so all nodes that admitted the same versions hold the same winner.
//!
//! # What is promised of the log
//!
//! For versions v of one row (a truncate counts as a version of every row of its table, see
//! [`crate::table`]):
//!
//! * may(v): a version w exists that is concurrent with v and has a higher stamp. Only such v are ever
//!   reported, by any node.
//! * must(v): there is such a w for which *no* version v2 of the row covers v without covering w. Every
//!   node reports every such v, whatever the order of arrival.
//!
//! Proof of must: take the node's moments of admitting v and w.
//! If v comes second, the current version c has a stamp at least w's, so above v's; v does not cover c (it
//! would be higher) nor c v (causal order): [`Verdict::Loses`] reports v.
//! If v comes first and loses at once, it is reported. If it became current, and still is when w comes,
//! [`Verdict::WinsOver`] reports it. If something had replaced it, that was either concurrent with it
//! (then `WinsOver` reported v) or covers it: a v2 that covers v and, having come before w, does not cover w.
//! So completeness is per loser, not per pair: what must(v) leaves out is a v that somebody had seen
//! and overwritten knowingly (v2) while w was on its way; then v is history, and it is v2 that w conflicts with.
//! Which of may(v) minus must(v) is reported depends on the order of arrival and differs between nodes.

use anabranch_proto::Vector;

use crate::version::Version;

/// What becomes of an incoming version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It becomes current; there was nothing unstable, or its transaction had seen what there was.
    Wins,
    /// It becomes current; the current version was concurrent and lost: log the *current*.
    WinsOver,
    /// The current version stays; the incoming one was concurrent and lost: log the *incoming*.
    Loses,
    /// The current version is this very version (a repeated delivery, or its echo): nothing to do.
    Known,
}

/// Decides what becomes of `incoming`, whose transaction depends on `deps`, at a row whose current version
/// is `current`: `None` when the row was last written by something stable, which everything now on its way
/// has seen.
///
/// To be called in causal order, with the last write a transaction makes to a key only. One caller has to see
/// to that order itself: after a crash, own transactions decoded again may have been sent, answered by a peer,
/// and the answer applied, before a checkpoint held them. Such a write is covered by what is current, and no
/// conflict; it is known by the dependencies that the answer names for the own node.
#[must_use]
pub fn admit(current: Option<&Version>, incoming: &Version, deps: &Vector) -> Verdict {
    let Some(current) = current else {
        return Verdict::Wins;
    };
    if current.stamp == incoming.stamp {
        return Verdict::Known;
    }
    if current.covered_by(deps) {
        return Verdict::Wins;
    }
    if incoming.stamp > current.stamp {
        Verdict::WinsOver
    } else {
        Verdict::Loses
    }
}

#[cfg(test)]
mod tests {
    use anabranch_proto::{NodeId, Position, Stamp};
    use uhlc::NTP64;

    use super::*;
    use crate::version::Kind;

    fn version(time: u64, node: u16, lsn: u64) -> Version {
        Version {
            stamp: Stamp {
                time: NTP64(time),
                node: NodeId(node),
            },
            position: Position::new(1, lsn),
            kind: Kind::Put,
        }
    }

    #[test]
    fn a_row_without_an_entry_takes_anything() {
        assert_eq!(admit(None, &version(1, 1, 1), &Vector::new()), Verdict::Wins);
    }

    #[test]
    fn a_covered_version_is_history() {
        let deps = [(NodeId(2), Position::new(1, 7))].into_iter().collect();
        assert_eq!(
            admit(Some(&version(5, 2, 7)), &version(6, 1, 1), &deps),
            Verdict::Wins
        );
    }

    #[test]
    fn of_two_concurrent_versions_the_later_stamp_wins_and_the_other_is_logged() {
        let (low, high) = (version(5, 2, 7), version(6, 1, 1));
        assert_eq!(admit(Some(&low), &high, &Vector::new()), Verdict::WinsOver);
        assert_eq!(admit(Some(&high), &low, &Vector::new()), Verdict::Loses);
    }

    #[test]
    fn equal_times_are_told_apart_by_the_node() {
        let (low, high) = (version(5, 1, 7), version(5, 2, 1));
        assert_eq!(admit(Some(&low), &high, &Vector::new()), Verdict::WinsOver);
        assert_eq!(admit(Some(&high), &low, &Vector::new()), Verdict::Loses);
    }

    #[test]
    fn the_same_version_again_changes_nothing() {
        let one = version(5, 1, 7);
        assert_eq!(admit(Some(&one), &one, &Vector::new()), Verdict::Known);
    }
}
