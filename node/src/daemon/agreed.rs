//! The members' agreed time: how far it is from a clock that nobody sets.
//!
//! In:   the median of the members' clocks, again and again      Out: the offset that holds
//! Invariants: 1. it takes a step only once that has been the median for [`STEP_FOR_US`]: a clock that was put right a moment ago is still
//!        measured as it was, and beside another one that jumps then the two would be the majority. A stamp is never taken back; 2. for
//!        the same reason a clock that is not measured any more, as where its machine is out of reach, bears out what holds, and nothing else
//! Not here: measuring clocks (`crate::link`)

/// More than this at once is a step, microseconds.
const STEP_US: i64 = 1_000_000;
/// For so long it must have been the same, microseconds: some answers of each peer.
const STEP_FOR_US: i64 = 5_000_000;
/// A clock that was not measured for so long says nothing new, microseconds: three pings, and less than a step takes.
const MEASURED_US: i64 = 3_000_000;

/// The offset that holds, and the step that may be taken.
#[derive(Debug, Default)]
pub(super) struct Agreed {
    offset_us: Option<i64>,
    /// To where, and since when by the clock that nobody sets.
    step: Option<(i64, i64)>,
}

impl Agreed {
    /// Has a peer's clock a say that is `offset_us` off, and was measured last at `heard_us`? (Each by the clock that nobody sets.)
    pub(super) fn counts(&self, offset_us: i64, heard_us: i64, steady_us: i64) -> bool {
        let bears_out = |holds: i64| offset_us.saturating_sub(holds).saturating_abs() <= STEP_US;
        steady_us.saturating_sub(heard_us) <= MEASURED_US || self.offset_us.is_some_and(bears_out)
    }

    /// The offset that holds, where `median_us` is the members' at `steady_us`. The first is taken as it is.
    pub(super) fn take(&mut self, median_us: i64, steady_us: i64) -> i64 {
        let is_near = |other: i64| median_us.saturating_sub(other).saturating_abs() <= STEP_US;
        let Some(holds) = self.offset_us.filter(|&holds| !is_near(holds)) else {
            (self.offset_us, self.step) = (Some(median_us), None);
            return median_us;
        };
        match self.step {
            Some((to, since)) if is_near(to) => {
                if steady_us.saturating_sub(since) >= STEP_FOR_US {
                    (self.offset_us, self.step) = (Some(median_us), None);
                    return median_us;
                }
            }
            _ => self.step = Some((median_us, steady_us)),
        }
        holds
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: i64 = 1_000_000;
    const YEARS: i64 = 900 * 86_400 * SECOND;

    #[test]
    fn a_step_is_taken_once_it_lasts() {
        let mut agreed = Agreed::default();
        assert_eq!(agreed.take(YEARS, 0), YEARS);
        let mut agreed = Agreed::default();
        assert_eq!(agreed.take(5, 0), 5);
        assert_eq!(agreed.take(300_000, SECOND), 300_000);
        for at in 2..7 {
            assert_eq!(agreed.take(YEARS, at * SECOND), 300_000, "{at}");
        }
        assert_eq!(agreed.take(YEARS + 7, 7 * SECOND), YEARS + 7);
    }

    #[test]
    fn two_clocks_that_jump_one_after_the_other_are_no_majority() {
        let mut agreed = Agreed::default();
        agreed.take(0, 0);
        for (median, at) in [
            (YEARS, 1),
            (YEARS, 3),
            (0, 4),
            (YEARS, 5),
            (-YEARS, 8),
            (-YEARS, 12),
            (0, 14),
        ] {
            assert_eq!(agreed.take(median, at * SECOND), 0, "{at}");
        }
    }

    #[test]
    fn a_clock_that_is_out_of_reach_bears_out_what_holds_and_nothing_else() {
        let mut agreed = Agreed::default();
        // One that jumped, and was out of reach from then on.
        assert!(!agreed.counts(YEARS, SECOND, 9 * SECOND));
        agreed.take(0, 0);
        assert!(agreed.counts(YEARS, SECOND, 4 * SECOND));
        assert!(!agreed.counts(YEARS, SECOND, 5 * SECOND));
        // It was right: of two that are left the one that jumps is still outvoted.
        assert!(agreed.counts(300_000, SECOND, 3_600 * SECOND));
    }
}
