//! The run's own clock, which no fault touches.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// Time since a run began.
#[derive(Debug, Clone, Copy)]
pub struct Clock {
    began: Instant,
    began_us: i64,
}

impl Clock {
    /// Now is 0.
    pub fn start() -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self {
            began: Instant::now(),
            began_us: i64::try_from(since.as_micros()).unwrap_or(0),
        }
    }

    /// Microseconds since the start.
    pub fn now_us(&self) -> i64 {
        i64::try_from(self.began.elapsed().as_micros()).unwrap_or(i64::MAX)
    }

    /// The start, microseconds since the Unix epoch.
    pub fn began_us(&self) -> i64 {
        self.began_us
    }
}
