//! The transactions met last, for the context columns of the conflict log.
//!
//! In:   headers of decoded and applied transactions      Out: what one of them was, by its stamp
//! Holds: at most [`LIMIT`] transactions; the oldest is forgotten first
//! On crash: lines lack that context
//! Not here: anything that a decision depends on

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use anabranch_proto::txn::TxnHeader;
use anabranch_proto::{Lsn, NodeId, Position, Stamp, Vector};

/// Most transactions that are remembered.
const LIMIT: usize = 65_536;

/// What is remembered of a transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TxnInfo {
    /// The origin's transaction id, 32 bits.
    pub xid: u32,
    /// The origin's commit timestamp, microseconds since the Unix epoch.
    pub commit_us: i64,
    /// End of its commit record.
    pub lsn: Lsn,
    /// What it had seen.
    pub deps: Arc<Vector>,
}

/// The same as it is kept: of its own origin every transaction has seen another place, of all others many have seen the same.
#[derive(Debug)]
struct Kept {
    stamp: Stamp,
    xid: u32,
    commit_us: i64,
    lsn: Lsn,
    saw_own: Position,
    saw_others: Arc<Vector>,
}

impl Kept {
    fn info(&self) -> TxnInfo {
        let mut deps = self.saw_others.as_ref().clone();
        if self.saw_own > Position::ZERO {
            deps.raise(self.stamp.node, self.saw_own);
        }
        TxnInfo {
            xid: self.xid,
            commit_us: self.commit_us,
            lsn: self.lsn,
            deps: Arc::new(deps),
        }
    }
}

/// By origin, in the order of stamps, which is that of its commits: so the newest goes to the end.
#[derive(Debug, Default)]
pub struct RecentTxns {
    by_origin: BTreeMap<NodeId, VecDeque<Kept>>,
    count: usize,
}

impl RecentTxns {
    /// Remembers a transaction.
    pub fn insert(&mut self, header: &TxnHeader) {
        let (origin, stamp) = (header.origin(), header.stamp);
        let txns = self.by_origin.entry(origin).or_default();
        let others = || header.deps.iter().filter(|entry| entry.0 != origin);
        let saw_others = match txns.back() {
            // One after the other, and nothing of anybody else between them.
            Some(last) if last.saw_others.iter().eq(others()) => Arc::clone(&last.saw_others),
            _ => Arc::new(others().collect()),
        };
        let kept = Kept {
            stamp,
            xid: header.xid,
            commit_us: header.commit_us,
            lsn: header.position.lsn,
            saw_own: header.deps.get(origin),
            saw_others,
        };
        if txns.back().is_none_or(|last| last.stamp < stamp) {
            txns.push_back(kept);
        } else {
            // Met again, after a failure.
            match txns.binary_search_by_key(&stamp, |txn| txn.stamp) {
                Ok(_) => return,
                Err(at) => txns.insert(at, kept),
            }
        }
        self.count += 1;
        if self.count > LIMIT {
            self.forget_oldest();
        }
    }

    fn forget_oldest(&mut self) {
        let fronts = self.by_origin.values_mut();
        let oldest = fronts
            .filter(|txns| !txns.is_empty())
            .min_by_key(|txns| txns.front().map(|txn| txn.stamp));
        if oldest.is_some_and(|txns| txns.pop_front().is_some()) {
            self.count -= 1;
        }
    }

    /// What is known of the transaction with `stamp`.
    #[must_use]
    pub fn get(&self, stamp: Stamp) -> Option<TxnInfo> {
        let txns = self.by_origin.get(&stamp.node)?;
        let at = txns.binary_search_by_key(&stamp, |txn| txn.stamp).ok()?;
        txns.get(at).map(Kept::info)
    }
}

#[cfg(test)]
mod tests {
    use anabranch_proto::stamp::unix_us_to_ntp;

    use super::*;

    fn header(node: u16, at: u64) -> TxnHeader {
        TxnHeader {
            position: Position {
                epoch: 1,
                lsn: Lsn(at * 10),
            },
            stamp: Stamp {
                time: unix_us_to_ntp(i64::try_from(at).unwrap() * 1_000),
                node: NodeId(node),
            },
            deps: Vector::new(),
            xid: u32::try_from(at).unwrap(),
            commit_us: 0,
            witness_us: 0,
            change_count: 1,
        }
    }

    #[test]
    fn each_is_found_by_its_stamp_however_it_came() {
        let mut recent = RecentTxns::default();
        for at in [1, 2, 5, 3, 5, 4] {
            recent.insert(&header(1, at));
            recent.insert(&header(2, at));
        }
        assert_eq!(recent.count, 10);
        for at in 1..=5 {
            for node in [1, 2] {
                let info = recent.get(header(node, at).stamp);
                assert_eq!(info.map(|info| info.xid), Some(u32::try_from(at).unwrap()));
            }
        }
        assert_eq!(recent.get(header(1, 6).stamp), None);
        assert_eq!(recent.get(header(3, 1).stamp), None);
    }

    #[test]
    fn what_each_had_seen_is_told_and_what_many_have_seen_is_kept_once() {
        let mut recent = RecentTxns::default();
        let seen = |at: u64, other: u64| {
            let entries = [(1, at - 1), (2, other)].map(|(node, at)| (NodeId(node), Position::new(1, at)));
            entries.into_iter().filter(|entry| entry.1.lsn > Lsn::ZERO)
        };
        for at in 1..=6 {
            let deps = seen(at, at / 3).collect();
            recent.insert(&TxnHeader {
                deps,
                ..header(1, at)
            });
        }
        for at in 1..=6 {
            let info = recent.get(header(1, at).stamp).unwrap();
            assert_eq!(*info.deps, seen(at, at / 3).collect::<Vector>(), "{at}");
        }
        let kept = recent.by_origin.values().flatten();
        let others: std::collections::BTreeSet<_> = kept.map(|txn| Arc::as_ptr(&txn.saw_others)).collect();
        assert_eq!(others.len(), 3);
    }

    #[test]
    fn past_the_limit_the_oldest_of_all_origins_is_forgotten() {
        let mut recent = RecentTxns::default();
        recent.insert(&header(2, 7));
        for at in 10..10 + LIMIT as u64 {
            recent.insert(&header(1, at));
        }
        assert_eq!(recent.get(header(2, 7).stamp), None);
        assert!(recent.get(header(1, 10).stamp).is_some());
        recent.insert(&header(2, 8));
        assert_eq!(recent.get(header(2, 8).stamp), None);
        assert!(recent.get(header(1, 10).stamp).is_some());
        recent.insert(&header(1, 10 + LIMIT as u64));
        assert_eq!(recent.get(header(1, 10).stamp), None);
        assert_eq!(recent.count, LIMIT);
    }
}
