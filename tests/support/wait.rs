//! Polling with a generous deadline.

use std::fmt::Debug;
use std::time::{Duration, Instant};

/// Longest wait for something that normally takes well under a second. Long, because the machine may be
/// busy with other tests; nothing is asserted about speed.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Time between two looks, at least; otherwise as long as a look takes, or looking would be most of what the machine does.
const POLL: Duration = Duration::from_millis(20);
/// Time between two looks, at most.
const POLL_MAX: Duration = Duration::from_millis(250);

/// Looks until `look` answers `Ok`, and returns what it found; panics with the last `Err` at the deadline.
pub async fn until_ok<T, E: Debug>(
    what: &str,
    timeout: Duration,
    mut look: impl AsyncFnMut() -> Result<T, E>,
) -> T {
    let deadline = Instant::now() + timeout;
    loop {
        let began = Instant::now();
        match look().await {
            Ok(found) => return found,
            Err(last) => {
                assert!(
                    Instant::now() < deadline,
                    "waited {timeout:?} in vain until {what}; last seen: {last:?}"
                );
                tokio::time::sleep(began.elapsed().clamp(POLL, POLL_MAX)).await;
            }
        }
    }
}

/// Looks until `look` answers true.
pub async fn until(what: &str, mut look: impl AsyncFnMut() -> bool) {
    until_ok(
        what,
        PATIENCE,
        async || if look().await { Ok(()) } else { Err("not yet") },
    )
    .await;
}
