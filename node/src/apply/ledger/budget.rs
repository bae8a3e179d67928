//! How many lines may be written: so many per second in the long run, and a burst of them at once.
//!
//! Holds: a token bucket, and what the transaction that is open took from it
//! Not here: counting what is not written ([`super`])

use tokio::time::Instant;

#[derive(Debug)]
pub(super) struct Budget {
    per_second: f64,
    burst: f64,
    left: f64,
    at: Instant,
    /// By the transaction that is open.
    taken: usize,
}

impl Budget {
    /// A full budget; `per_second` 0 is no limit.
    pub(super) fn new(per_second: u32, burst: u32) -> Self {
        Self {
            per_second: f64::from(per_second),
            burst: f64::from(burst.max(per_second)),
            left: f64::from(burst.max(per_second)),
            at: Instant::now(),
            taken: 0,
        }
    }

    /// Takes leave for up to `wanted` lines at `now`; gives how many may be written.
    pub(super) fn take(&mut self, wanted: usize, now: Instant) -> usize {
        if self.per_second == 0.0 {
            return wanted;
        }
        let earned = now.saturating_duration_since(self.at).as_secs_f64() * self.per_second;
        self.at = now;
        self.left = (self.left + earned).min(self.burst);
        let given = wanted.min(self.left as usize);
        self.left -= given as f64;
        self.taken += given;
        given
    }

    /// How many lines may be written at `now`.
    pub(super) fn left(&self, now: Instant) -> usize {
        if self.per_second == 0.0 {
            return usize::MAX;
        }
        let earned = now.saturating_duration_since(self.at).as_secs_f64() * self.per_second;
        (self.left + earned).min(self.burst) as usize
    }

    /// So many lines that the open transaction took leave for are not written after all.
    pub(super) fn give_back(&mut self, lines: usize) {
        let lines = lines.min(self.taken);
        self.taken -= lines;
        self.left = (self.left + lines as f64).min(self.burst);
    }

    /// The open transaction has ended; what it took it has not used, unless it is committed.
    pub(super) fn ended(&mut self, is_committed: bool) {
        if !is_committed {
            self.give_back(self.taken);
        }
        self.taken = 0;
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_burst_passes_whole_and_then_so_many_a_second() {
        let start = Instant::now();
        let mut budget = Budget::new(100, 1_000);
        budget.at = start;
        assert_eq!(budget.take(600, start), 600);
        assert_eq!(budget.take(600, start), 400);
        assert_eq!(budget.take(600, start), 0);
        assert_eq!(budget.left(start + Duration::from_secs(2)), 200);
        assert_eq!(budget.take(600, start + Duration::from_secs(2)), 200);
        // However long it is quiet, no more than a burst is saved up.
        assert_eq!(budget.take(9_999, start + Duration::from_secs(3_600)), 1_000);
    }

    #[test]
    fn what_is_tried_again_is_taken_once() {
        let start = Instant::now();
        let mut budget = Budget::new(100, 1_000);
        budget.at = start;
        for _ in 0..10 {
            assert_eq!(budget.take(600, start), 600);
            budget.ended(false);
        }
        assert_eq!(budget.take(2_000, start), 1_000);
        // Some of it had a line.
        budget.give_back(300);
        budget.ended(true);
        assert_eq!(budget.take(2_000, start), 300);
        // No more than was taken.
        budget.give_back(5_000);
        budget.ended(false);
        assert_eq!(budget.take(2_000, start), 300);
    }

    #[test]
    fn zero_is_no_limit() {
        let mut budget = Budget::new(0, 0);
        assert_eq!(budget.left(Instant::now()), usize::MAX);
        assert_eq!(budget.take(1_000_000, Instant::now()), 1_000_000);
    }
}
