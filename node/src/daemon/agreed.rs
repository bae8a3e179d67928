//! The members' agreed time: how far it is from a clock that nobody sets.
//!
//! In:   the median of the members' clocks, again and again      Out: the offset that holds
//! Invariant: it takes a step only once that has been the median for [`STEP_FOR_US`]: a clock that was put right a moment ago is still
//!        measured as it was, and beside another one that jumps then the two would be the majority. A stamp is never taken back.
//! Not here: measuring clocks (`crate::link`)

/// More than this at once is a step, microseconds.
const STEP_US: i64 = 1_000_000;
/// For so long it must have been the same, microseconds: some answers of each peer.
const STEP_FOR_US: i64 = 5_000_000;

/// The offset that holds, and the step that may be taken.
#[derive(Debug, Default)]
pub(super) struct Agreed {
    offset_us: Option<i64>,
    /// To where, and since when by the clock that nobody sets.
    step: Option<(i64, i64)>,
}

impl Agreed {
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
}
