//! How thick own transactions come, and so how long a frame grows.
//!
//! In:   how many transactions each frame took, and when     Out: the gap to the next one
//! Invariants: what comes alone is not held back
//! Not here: making frames (`framing`), and backlogs, where nobody waits for milliseconds

use std::time::Duration;

use tokio::time::Instant;

/// Least time between two frames that are not full. Every frame wakes the journal's writer, every link and every
/// applier of the cluster; a transaction that comes alone never waits for this.
const GAP: Duration = Duration::from_millis(1);
/// The same where transactions come thick. Each frame costs the nodes of a cluster a sync, an apply transaction and its
/// echo: as much as some rows do, and users of a busy machine wait longer for processors than for this.
const THICK_GAP: Duration = Duration::from_millis(4);
/// More transactions a second than this are thick.
const THICK: f64 = 600.0;
/// Their rate is smoothed over so long: a few that happen to come together are not many.
const SMOOTHED: Duration = Duration::from_millis(50);

/// The rate of own transactions.
#[derive(Debug)]
pub(super) struct Flow {
    per_second: f64,
    at: Instant,
}

impl Flow {
    pub(super) const fn new(now: Instant) -> Self {
        Self {
            per_second: 0.0,
            at: now,
        }
    }

    /// A frame of so many is made: how long after it the next one may come that is not full.
    pub(super) fn gap_after(&mut self, txns: u32, now: Instant) -> Duration {
        let passed = now.duration_since(self.at).as_secs_f64() / SMOOTHED.as_secs_f64();
        self.at = now;
        let new = f64::from(txns) / SMOOTHED.as_secs_f64();
        self.per_second = self.per_second.mul_add((-passed).exp(), new);
        if self.per_second > THICK { THICK_GAP } else { GAP }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The last gap after so many transactions, `between` apart, each frame made when the gap is over.
    fn last_gap(flow: &mut Flow, now: &mut Instant, count: u32, between: Duration) -> Duration {
        let (mut due, mut waiting, mut gap) = (*now, 0, GAP);
        for _ in 0..count {
            *now += between;
            waiting += 1;
            if due <= *now {
                gap = flow.gap_after(std::mem::take(&mut waiting), *now);
                due = *now + gap;
            }
        }
        gap
    }

    #[test]
    fn frames_grow_while_transactions_come_thick_and_not_for_a_few_at_once() {
        let micros = Duration::from_micros;
        let mut now = Instant::now();
        let mut flow = Flow::new(now);
        // Two hundred a second, by tens at once.
        for _ in 0..20 {
            now += Duration::from_millis(50);
            assert_eq!(last_gap(&mut flow, &mut now, 10, micros(100)), GAP);
        }
        assert_eq!(last_gap(&mut flow, &mut now, 300, micros(2_500)), GAP);
        for per_second in [1_000, 3_000, 20_000] {
            assert_eq!(
                last_gap(&mut flow, &mut now, 3_000, micros(1_000_000 / per_second)),
                THICK_GAP
            );
            // Whatever it was, a fifth of a second later it is forgotten.
            now += Duration::from_millis(200);
            assert_eq!(flow.gap_after(1, now), GAP, "{per_second}");
        }
    }
}
