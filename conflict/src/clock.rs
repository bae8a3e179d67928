//! The fold over a node's WAL that stamps local transactions and collects what they depend on.
//!
//! In:   commits in WAL order (local, echo, witness) from decode      Out: stamps and dependency vectors
//! Holds: the clock h, the vector V, the own last position, the last clock witness: a few dozen bytes
//! Invariants:
//! 1. The state is a pure function of the WAL from a checkpoint on: folding again gives the same stamps.
//! 2. A stamp is above the stamps of everything its transaction depends on (*covered implies later*).
//! 3. The own position only grows.
//!
//! On crash: the fold continues from the state stored with the slot's confirmed position; what was folded
//! after it is folded again.
//! Not here: telling local commits from echoes (node: source).

use anabranch_proto::stamp::unix_us_to_ntp;
use anabranch_proto::{NodeId, Position, Stamp, Vector};
use serde::{Deserialize, Serialize};
use uhlc::NTP64;

/// The next time of a hybrid logical clock: `physical` if it moved on, else just after `last`.
///
/// A microsecond is some 4295 units, so a clock that stands still does not run into the next microsecond
/// before 4294 ticks; when it does, it simply keeps counting.
#[must_use]
pub fn tick(last: NTP64, physical: NTP64) -> NTP64 {
    physical.max(NTP64(last.as_u64().saturating_add(1)))
}

/// What is wrong with a commit met in the WAL.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FoldError {
    /// The stream went back, or delivered a commit twice.
    #[error(
        "local commit at {position} is not after the last one at {last}: the server's WAL went back; \
         if it was restored from a backup, docs/errors/the-server-went-back.md says how it can come back"
    )]
    NotIncreasing {
        /// The commit's position.
        position: Position,
        /// The last local commit's position.
        last: Position,
    },
}

/// The stamp of a local transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LocalStamp {
    /// The stamp.
    pub stamp: Stamp,
    /// By how many microseconds the server's clock ran ahead of what its peers tolerate; 0 if it did not.
    pub clamped_by_us: i64,
}

/// A stamp says so much more than the time of its commit if clocks are wrong: twice the default `max_drift_us`, so what a
/// transaction has seen of a clock that is still believed does not count.
const RAISED_US: i64 = 120_000_000;
/// Stamps and times of commits are rounded.
const ROUNDED_US: i64 = 1_000;

/// A stamp is not the time at which its server says that it committed. By how many microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shifted {
    /// The stamp is earlier: no member vouched for that time. The server's clock was ahead of all, or its daemon was not running; or the
    /// transaction was written again, with its former time.
    Earlier(i64),
    /// It is later: the server's clock was behind what the transaction had seen, or was set back.
    Later(i64),
}

/// Is a transaction ordered among others by another time than that of its commit? Both are in its header, so all nodes say the same.
#[must_use]
pub fn shifted(stamp: Stamp, commit_us: i64) -> Option<Shifted> {
    let earlier_us = commit_us.saturating_sub(stamp.unix_us());
    if earlier_us > ROUNDED_US {
        return Some(Shifted::Earlier(earlier_us));
    }
    let later_us = earlier_us.saturating_neg();
    (later_us > RAISED_US).then_some(Shifted::Later(later_us))
}

/// The state of the fold.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fold {
    node: NodeId,
    #[serde(with = "ntp_as_u64")]
    h: NTP64,
    vector: Vector,
    last: Position,
    witness_us: Option<i64>,
}

impl Fold {
    /// The state before any commit.
    #[must_use]
    pub const fn new(node: NodeId) -> Self {
        Self {
            node,
            h: NTP64(0),
            vector: Vector::new(),
            last: Position::ZERO,
            witness_us: None,
        }
    }

    /// The state of a node that joins from a snapshot: everything in `vector` is in its tables, and no
    /// stamp in them is above `h`.
    #[must_use]
    pub fn joined(node: NodeId, vector: Vector, h: NTP64) -> Self {
        let last = vector.get(node);
        Self {
            node,
            h,
            vector,
            last,
            witness_us: None,
        }
    }

    /// Whose WAL this is.
    #[must_use]
    pub const fn node(&self) -> NodeId {
        self.node
    }

    /// The clock: no stamp met so far is above it.
    #[must_use]
    pub const fn clock(&self) -> NTP64 {
        self.h
    }

    /// Everything whose effect lies before this place of the WAL, own commits included.
    #[must_use]
    pub const fn vector(&self) -> &Vector {
        &self.vector
    }

    /// Position of the last local commit.
    #[must_use]
    pub const fn last(&self) -> Position {
        self.last
    }

    /// The time that peers last agreed with, microseconds since the Unix epoch.
    #[must_use]
    pub const fn witness_us(&self) -> Option<i64> {
        self.witness_us
    }

    /// Meets a clock witness: a time (microseconds since the Unix epoch) that the peers agree with, written
    /// into the WAL by the daemon. A witness may also go back: the latest one in the WAL counts.
    pub const fn witness(&mut self, us: i64) {
        self.witness_us = Some(us);
    }

    /// Meets the begin of a decoded local transaction and stamps it.
    ///
    /// `commit_us` is the server's commit timestamp in microseconds since the *Unix* epoch (not 2000).
    /// Where a witness is known, physical time counts only up to `max_drift_us` past it.
    pub fn begin_local(&mut self, commit_us: i64, max_drift_us: i64) -> LocalStamp {
        let allowed_us = self
            .witness_us
            .map_or(i64::MAX, |witness| witness.saturating_add(max_drift_us));
        let physical_us = commit_us.min(allowed_us);
        self.h = tick(self.h, unix_us_to_ntp(physical_us));
        LocalStamp {
            stamp: Stamp {
                time: self.h,
                node: self.node,
            },
            clamped_by_us: commit_us.saturating_sub(physical_us),
        }
    }

    /// Meets the end of that transaction: returns what it depends on, then counts it as seen.
    ///
    /// # Errors
    /// [`FoldError::NotIncreasing`] when `position` is not after the last local commit; nothing changes then.
    pub fn commit_local(&mut self, position: Position) -> Result<Vector, FoldError> {
        if position <= self.last {
            return Err(FoldError::NotIncreasing {
                position,
                last: self.last,
            });
        }
        let deps = self.vector.clone();
        self.last = position;
        self.vector.raise(self.node, position);
        Ok(deps)
    }

    /// Meets an own apply transaction: its progress rows, per origin the position and the stamp of the last
    /// transaction in it. An entry of the own node raises the clock, never the vector.
    pub fn echo(&mut self, entries: impl IntoIterator<Item = (NodeId, Position, Stamp)>) {
        for (node, position, stamp) in entries {
            if node != self.node {
                self.vector.raise(node, position);
            }
            self.h = self.h.max(stamp.time);
        }
    }
}

/// NTP64 as its raw number.
mod ntp_as_u64 {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};
    use uhlc::NTP64;

    pub(super) fn serialize<S: Serializer>(time: &NTP64, to: S) -> Result<S::Ok, S::Error> {
        time.as_u64().serialize(to)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<NTP64, D::Error> {
        u64::deserialize(from).map(NTP64)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const YEAR_2024_US: i64 = 1_704_067_200_000_000;

    fn stamp(time: NTP64, node: u16) -> Stamp {
        Stamp {
            time,
            node: NodeId(node),
        }
    }

    #[test]
    fn stamps_follow_the_wall_clock_and_never_go_back() {
        let mut fold = Fold::new(NodeId(1));
        let first = fold.begin_local(YEAR_2024_US, 0).stamp;
        assert_eq!(first.unix_us(), YEAR_2024_US);
        let second = fold.begin_local(YEAR_2024_US - 5_000_000, 0).stamp;
        assert_eq!(second.time.as_u64(), first.time.as_u64() + 1);
        let third = fold.begin_local(YEAR_2024_US + 1, 0).stamp;
        assert_eq!(third.unix_us(), YEAR_2024_US + 1);
    }

    #[test]
    fn a_stamp_that_is_another_time_than_the_commits_is_told_and_no_other() {
        let mut fold = Fold::new(NodeId(1));
        let told = |fold: &mut Fold, commit_us: i64, drift_us: i64| {
            shifted(fold.begin_local(commit_us, drift_us).stamp, commit_us)
        };
        assert_eq!(told(&mut fold, YEAR_2024_US + 7, 0), None);
        fold.witness(YEAR_2024_US);
        assert_eq!(told(&mut fold, YEAR_2024_US + 59_000_000, 60_000_000), None);
        assert_eq!(
            told(&mut fold, YEAR_2024_US + 3_660_000_000, 60_000_000),
            Some(Shifted::Earlier(3_600_000_000))
        );
        // Its stamp was still a minute ahead: not more than what is believed.
        assert_eq!(told(&mut fold, YEAR_2024_US, 60_000_000), None);
        let set_back = told(&mut fold, YEAR_2024_US - 3_600_000_000, 60_000_000);
        assert!(
            matches!(set_back, Some(Shifted::Later(us)) if us > 3_600_000_000),
            "{set_back:?}"
        );
    }

    #[test]
    fn a_write_is_stamped_above_what_was_applied_before_it() {
        let mut fold = Fold::new(NodeId(1));
        let ahead = unix_us_to_ntp(YEAR_2024_US + 3_600_000_000);
        fold.echo([(NodeId(2), Position::new(1, 7), stamp(ahead, 2))]);
        assert!(fold.begin_local(YEAR_2024_US, 0).stamp.time > ahead);
        let deps = fold.commit_local(Position::new(1, 100)).unwrap();
        assert!(deps.covers(NodeId(2), Position::new(1, 7)));
        assert!(
            !deps.covers(NodeId(1), Position::new(1, 100)),
            "a transaction does not depend on itself"
        );
        assert!(fold.vector().covers(NodeId(1), Position::new(1, 100)));
    }

    #[test]
    fn a_wild_clock_is_held_near_the_witness() {
        let mut fold = Fold::new(NodeId(1));
        let year_2099_us = YEAR_2024_US + 75 * 365 * 86_400_000_000;
        assert_eq!(
            fold.clone().begin_local(year_2099_us, 60_000_000).clamped_by_us,
            0,
            "no witness, no limit"
        );
        fold.witness(YEAR_2024_US);
        let local = fold.begin_local(year_2099_us, 60_000_000);
        assert_eq!(local.stamp.unix_us(), YEAR_2024_US + 60_000_000);
        assert_eq!(local.clamped_by_us, year_2099_us - YEAR_2024_US - 60_000_000);
        assert_eq!(fold.begin_local(YEAR_2024_US, 60_000_000).clamped_by_us, 0);
    }

    #[test]
    fn extreme_times_do_not_overflow() {
        let mut fold = Fold::new(NodeId(1));
        fold.witness(i64::MAX);
        fold.begin_local(i64::MIN, i64::MAX);
        fold.witness(i64::MIN);
        assert_eq!(fold.begin_local(i64::MAX, 0).clamped_by_us, i64::MAX);
        assert_eq!(tick(NTP64(u64::MAX), NTP64(0)), NTP64(u64::MAX));
    }

    #[test]
    fn a_commit_that_goes_back_is_refused_and_changes_nothing() {
        let mut fold = Fold::new(NodeId(1));
        fold.commit_local(Position::new(2, 10)).unwrap();
        let before = fold.clone();
        for position in [Position::new(2, 10), Position::new(2, 9), Position::new(1, 99)] {
            let last = Position::new(2, 10);
            assert_eq!(
                fold.commit_local(position),
                Err(FoldError::NotIncreasing { position, last })
            );
        }
        assert_eq!(fold, before);
        fold.commit_local(Position::new(3, 1)).unwrap();
    }

    #[test]
    fn an_echo_never_moves_the_own_position() {
        let mut fold = Fold::new(NodeId(1));
        fold.echo([(NodeId(1), Position::new(1, 500), stamp(NTP64(77), 1))]);
        assert_eq!(fold.vector().get(NodeId(1)), Position::ZERO);
        assert_eq!(fold.clock(), NTP64(77));
    }

    #[test]
    fn a_joined_node_goes_on_after_its_snapshot() {
        let vector: Vector = [
            (NodeId(1), Position::new(1, 40)),
            (NodeId(3), Position::new(1, 9)),
        ]
        .into_iter()
        .collect();
        let mut fold = Fold::joined(NodeId(3), vector.clone(), NTP64(1000));
        assert!(fold.commit_local(Position::new(1, 9)).is_err());
        assert_eq!(fold.commit_local(Position::new(1, 10)).unwrap(), vector);
        assert!(fold.begin_local(0, 0).stamp.time > NTP64(1000));
    }

    #[derive(Debug, Clone)]
    enum Event {
        Local(i64),
        Echo(u16, u64, u64),
        Witness(i64),
    }

    fn event() -> impl Strategy<Value = Event> {
        prop_oneof![
            (0i64..2000).prop_map(Event::Local),
            (1u16..4, 1u64..50, 0u64..1 << 23).prop_map(|(n, p, t)| Event::Echo(n, p, t)),
            (0i64..2000).prop_map(Event::Witness),
        ]
    }

    fn run(fold: &mut Fold, events: &[Event], from_lsn: u64) -> Vec<(Stamp, Vector)> {
        let mut out = Vec::new();
        for (at, event) in events.iter().enumerate() {
            match *event {
                Event::Local(us) => {
                    let local = fold.begin_local(us, 100);
                    let position = Position::new(1, from_lsn + at as u64 + 1);
                    out.push((local.stamp, fold.commit_local(position).unwrap()));
                }
                Event::Echo(node, lsn, time) => {
                    fold.echo([(NodeId(node), Position::new(1, lsn), stamp(NTP64(time), node))]);
                }
                Event::Witness(us) => fold.witness(us),
            }
        }
        out
    }

    proptest! {
        #[test]
        fn folding_again_from_a_stored_checkpoint_gives_the_same_stamps(
            events in prop::collection::vec(event(), 1..30),
            cut in 0usize..30,
        ) {
            let cut = cut.min(events.len());
            let mut fold = Fold::new(NodeId(1));
            run(&mut fold, &events[..cut], 0);
            let stored = serde_json::to_string(&fold).unwrap();
            let first = run(&mut fold, &events[cut..], cut as u64);
            let mut again: Fold = serde_json::from_str(&stored).unwrap();
            prop_assert_eq!(run(&mut again, &events[cut..], cut as u64), first);
            prop_assert_eq!(again, fold);
        }

        #[test]
        fn own_stamps_and_dependencies_only_grow(events in prop::collection::vec(event(), 1..30)) {
            let out = run(&mut Fold::new(NodeId(1)), &events, 0);
            for pair in out.windows(2) {
                prop_assert!(pair[0].0 < pair[1].0);
                prop_assert!(pair[1].1.includes(&pair[0].1));
            }
        }
    }
}
