//! Which transactions come next, and how soon.
//!
//! In:   the heads of all feeds, what is applied            Out: the work of the next apply transaction
//! Invariants: causal order; a large transaction, and one with DDL, comes alone; origins with much to apply take turns
//! Not here: running it (`super`)

use std::collections::HashSet;
use std::time::Duration;

use anabranch_proto::txn::TxnHeader;
use anabranch_proto::{NodeId, Stamp};

use super::Applier;
use super::failure::Failure;
use super::feed::{Head, deliverable};
use super::work::Work;
use crate::config::Config;
use crate::shared::{BACKLOG_GAP, BACKLOG_US, Shared};

/// Small transactions are taken together up to so many bytes of changes: all of them are held at once, more than once.
const BYTES_MAX: usize = 8 << 20;

impl Applier {
    /// Chooses what comes next: as many small transactions as fit, or one large one.
    pub(super) fn select(&mut self) -> Result<Option<Work>, Failure> {
        let rows_max = self.config.apply.batch_rows_max as u64;
        let (mut rows, mut bytes) = (0, 0);
        let mut heads: Vec<Head> = Vec::new();
        let mut applied = self.applied.clone();
        let hidden = self.shared.hidden_from();
        let now_us = self.shared.agreed_us();
        let mut moved = true;
        // The feed at which it was full, and whether that one had its turn.
        let mut full_at = None;
        'full: while moved {
            moved = false;
            for (at, feed) in self.feeds.iter_mut().enumerate() {
                let mut had_its_turn = false;
                if self.parked.iter().any(|parked| parked.origin == feed.origin) {
                    continue;
                }
                while let Some(head) = feed.peek()? {
                    let header = head.header();
                    let fits = heads.is_empty()
                        || (rows + header.change_count <= rows_max
                            && heads.len() < 4_096
                            && bytes < BYTES_MAX);
                    // By itself: it may have to wait for long.
                    let alone = matches!(head, Head::Large { .. }) || head.has_ddl()?;
                    if !deliverable(header, self.shared.node, &applied, hidden)
                        || runs_ahead((header, now_us), &self.config, &self.shared, &mut self.ahead)
                    {
                        break;
                    }
                    if !fits || (alone && !heads.is_empty()) {
                        full_at = Some((at, had_its_turn));
                        break 'full;
                    }
                    rows += header.change_count;
                    bytes += head.byte_len();
                    applied.raise(header.origin(), header.position);
                    heads.extend(feed.take());
                    (moved, had_its_turn) = (true, true);
                    if alone {
                        full_at = Some((at, true));
                        break 'full;
                    }
                }
            }
        }
        if let Some((at, had_its_turn)) = full_at {
            // One origin that always has more than a batch must not keep the others waiting.
            let first = (at + usize::from(had_its_turn)).min(self.feeds.len());
            self.feeds.rotate_left(first);
        }
        if heads.is_empty() {
            return Ok(None);
        }
        self.applied = applied;
        Ok(Some(Work::txns(heads)))
    }

    /// See [`gather`].
    pub(super) fn gap(&self, work: &Work) -> Duration {
        let is_full = work.change_count().saturating_mul(2) >= self.config.apply.batch_rows_max as u64;
        let newest_us = work.stamps().map(Stamp::unix_us).max();
        let is_behind = newest_us.is_some_and(|us| self.shared.agreed_us().saturating_sub(us) > BACKLOG_US);
        gather(work.txn_count(), is_full, is_behind)
    }
}

/// How long after its begin an apply transaction is followed by the next one, at the soonest. Each costs the server and us
/// as much as a hundred rows do, so where many transactions come they are let gather; a few are not, and a batch that
/// was full leaves more behind it already.
const fn gather(txns: u64, is_full: bool, is_behind: bool) -> Duration {
    match txns {
        0..4 => Duration::ZERO,
        _ if is_full => Duration::ZERO,
        _ if is_behind => BACKLOG_GAP,
        _ => Duration::from_millis(2),
    }
}

/// Is the transaction stamped so far in the future that its origin's clock must be wrong? Then it waits, and
/// everything behind it: applying it would drag every clock of the cluster along.
fn runs_ahead(
    (header, now_us): (&TxnHeader, i64),
    config: &Config,
    shared: &Shared,
    ahead: &mut HashSet<NodeId>,
) -> bool {
    let allowed_us = i64::try_from(config.clock.max_drift_ms.saturating_mul(2_000)).unwrap_or(i64::MAX);
    let ahead_us = header.stamp.unix_us().saturating_sub(now_us);
    let name = || format!("clock_ahead_{}", header.origin());
    if ahead_us <= allowed_us {
        if header.change_count > 0 && !ahead.is_empty() && ahead.remove(&header.origin()) {
            shared.alarms.clear(&name());
        }
        return false;
    }
    ahead.insert(header.origin());
    let text = format!(
        "node {} stamps its transactions {} s ahead of the clock here: its stream waits until the clocks agree; \
         mend the clock (NTP) of that node, or of this one",
        header.origin(),
        ahead_us / 1_000_000
    );
    shared.alarms.raise(&name(), text);
    true
}
