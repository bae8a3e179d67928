//! What a peer's wall clock shows, as seen from a clock of ours that nobody sets.
//!
//! In:   the peer's clock beside the echo of one of our pings       Out: [`PeerClock`]
//! Holds: the last few samples
//! Invariants: 1. samples are taken by the monotonic clock, so a step of our wall clock spoils none;
//!             2. the sample with the shortest round trip decides: queueing only ever lengthens one; 3. but only of those
//!             that the newest one bears out: what was measured before the peer's clock was set says nothing any more.
//! Not here: what the offsets are for (the clock witness of the decoder).

use std::collections::VecDeque;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::Serialize;

/// Samples kept; at a ping a second, about what crystal drift and route changes leave comparable.
const SAMPLES_MAX: usize = 16;
/// What crystals may make of an offset while samples are kept, beside what round trips leave open, microseconds.
const DRIFT_US: i64 = 10_000;

/// An estimate of a peer's wall clock (NTP's clock filter, RFC 5905 section 10, without its dispersion).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct PeerClock {
    /// The peer's wall clock minus our steady one ([`crate::shared::steady_us`]), microseconds; off by at most half of
    /// `rtt_us`.
    pub offset_us: i64,
    /// Round trip of the sample it comes from, microseconds.
    pub rtt_us: u64,
    /// When that sample was taken, by our steady clock, microseconds since the Unix epoch.
    pub at_us: i64,
    /// The same of the newest sample, which bears that one out. Of a peer that is out of reach it stays.
    #[serde(skip)]
    pub heard_us: i64,
}

/// Our wall clock, microseconds since the Unix epoch.
#[must_use]
pub(super) fn unix_us() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_micros()).unwrap_or(i64::MAX)
}

/// Samples of one link.
#[derive(Debug, Default)]
pub(super) struct ClockFilter {
    samples: VecDeque<PeerClock>,
    ping: Option<(i64, Instant)>,
}

impl ClockFilter {
    /// A new ping; its value goes into `clock_us` of the request.
    pub(super) fn ping(&mut self, steady_us: i64, now: Instant) -> i64 {
        let value = steady_us.max(1);
        self.ping = Some((value, now));
        value
    }

    /// The answer to a ping; answers to anything else than the newest ping are ignored.
    pub(super) fn echo(&mut self, echo_us: i64, peer_us: i64, now: Instant) -> Option<PeerClock> {
        let (sent_us, sent) = self.ping.take_if(|ping| ping.0 == echo_us)?;
        let rtt = now.saturating_duration_since(sent).min(Duration::from_secs(3600));
        let rtt_us = u64::try_from(rtt.as_micros()).unwrap_or(u64::MAX);
        let half = i64::try_from(rtt_us / 2).unwrap_or(i64::MAX);
        let at_us = sent_us.saturating_add(half);
        let newest = PeerClock {
            offset_us: peer_us.saturating_sub(at_us),
            rtt_us,
            at_us,
            heard_us: at_us,
        };
        self.samples.retain(|sample| {
            let open = i64::try_from(sample.rtt_us.saturating_add(rtt_us) / 2).unwrap_or(i64::MAX);
            let apart = sample.offset_us.saturating_sub(newest.offset_us).saturating_abs();
            apart <= open.saturating_add(DRIFT_US)
        });
        if self.samples.len() == SAMPLES_MAX {
            self.samples.pop_front();
        }
        self.samples.push_back(newest);
        let best = self.samples.iter().min_by_key(|sample| sample.rtt_us)?;
        Some(PeerClock {
            heard_us: at_us,
            ..*best
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shortest_round_trip_decides_the_offset() {
        let start = Instant::now();
        let mut filter = ClockFilter::default();
        let ping = filter.ping(1_000_000, start);
        let slow = filter
            .echo(ping, 1_500_000, start + Duration::from_millis(400))
            .unwrap();
        assert_eq!((slow.offset_us, slow.rtt_us), (300_000, 400_000));
        let ping = filter.ping(2_000_000, start);
        let fast = filter
            .echo(ping, 2_500_500, start + Duration::from_millis(1))
            .unwrap();
        assert_eq!((fast.offset_us, fast.rtt_us), (500_000, 1_000));
        let ping = filter.ping(3_000_000, start);
        let borne_out = PeerClock {
            heard_us: 3_150_000,
            ..fast
        };
        assert_eq!(
            filter.echo(ping, 3_600_000, start + Duration::from_millis(300)),
            Some(borne_out)
        );
    }

    #[test]
    fn a_clock_that_was_set_is_known_by_the_next_answer() {
        let now = Instant::now();
        let mut filter = ClockFilter::default();
        let ping = filter.ping(1_000_000, now);
        let before = filter
            .echo(ping, 1_000_500, now + Duration::from_micros(200))
            .unwrap();
        let ping = filter.ping(2_000_000, now);
        let after = filter
            .echo(ping, 902_000_000, now + Duration::from_millis(50))
            .unwrap();
        assert!(before.offset_us < 1_000 && after.offset_us > 899_000_000);
    }

    #[test]
    fn an_answer_to_no_ping_of_ours_is_ignored() {
        let now = Instant::now();
        let mut filter = ClockFilter::default();
        assert_eq!(filter.echo(7, 7, now), None);
        let ping = filter.ping(5, now);
        assert_eq!(filter.echo(ping + 1, i64::MIN, now), None);
        assert!(filter.echo(ping, i64::MIN, now).is_some());
        assert_eq!(filter.echo(ping, 9, now), None);
    }

    #[test]
    fn old_samples_are_forgotten() {
        let now = Instant::now();
        let mut filter = ClockFilter::default();
        let ping = filter.ping(1, now);
        filter.echo(ping, 99, now);
        for at in 2..40 {
            let ping = filter.ping(at, now);
            filter.echo(ping, at + 1_000, now + Duration::from_millis(2));
        }
        assert_eq!(filter.samples.len(), SAMPLES_MAX);
        assert!(filter.samples.iter().all(|sample| sample.rtt_us == 2_000));
    }
}
