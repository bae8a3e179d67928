//! Notices that decoding stands still although there is WAL to decode, and that the server does not answer: for both, all that is
//! written here stays here, and nothing else says so. A walsender that waits (for a standby that `synchronized_standby_slots` names,
//! say) answers every question for a sign of life; a catalog lookup that waits for a lock, or a network that lets nothing
//! through, is silence.
//!
//! In:   what capture and upkeep say of themselves ([`crate::shared::Progress`]); the server, once they stand still      Out: an
//!       alarm; an error that ends this life, where the server has given the connection up
//! Must never: call the decoding of something large a standstill, which may take long and needs nobody
//! On crash: looked at again

use std::time::Duration;

use anabranch_proto::Lsn;
use tokio::time::{Instant, timeout};

use super::Error;
use crate::apply::fence::reportable;
use crate::config::Config;
use crate::journal::Journal;
use crate::shared::Shared;
use crate::{pg, source};

/// Between two looks.
const EVERY: Duration = Duration::from_secs(1);
/// After this somebody is told.
const PATIENCE: Duration = Duration::from_secs(30);
/// The same where the walsender works: it may pass over a large transaction of tables that nobody wants.
const PATIENCE_WITH_WORK: Duration = Duration::from_secs(600);
/// Between two questions why, and for one of them.
const ASK_EVERY: Duration = Duration::from_secs(5);
const ASK_WITHIN: Duration = Duration::from_secs(10);
/// Name of the alarm.
const ALARM: &str = "decoding_stands";

/// What the walsender of our slot does, what of ours waits for a lock, and who holds that. One row, or none where there is no slot.
const WHY: &str = "SELECT s.active_pid, a.wait_event_type, a.wait_event, (pg_current_wal_flush_lsn() - '0/0')::int8, \
    (SELECT format('session %s waits for a lock that session %s holds', c.pid, array_to_string(pg_blocking_pids(c.pid), ', ')) \
     FROM pg_stat_activity c WHERE c.application_name = 'anabranch:control' AND c.usename = current_user \
         AND c.datname = current_database() AND c.wait_event_type = 'Lock' LIMIT 1) \
    FROM pg_replication_slots s LEFT JOIN pg_stat_activity a ON a.pid = s.active_pid WHERE s.slot_name = $1";

/// Ends when the server has no walsender for us any more.
pub(super) async fn watch(config: &Config, shared: &Shared, journal: &Journal) -> Error {
    let mut still = Still::new(Instant::now());
    let mut ask_at = Instant::now();
    // What was seen in the look before: one look may meet what works while it waits for a moment.
    let mut before = None;
    loop {
        tokio::time::sleep(EVERY).await;
        let silent = shared.progress.unanswered_for();
        if silent > PATIENCE {
            let text = format!(
                "the server has not answered a question that takes no time, since {} s: is it frozen, or the network cut? \
                 (tcp_user_timeout in postgres.dsn bounds how long a cut is not noticed)",
                silent.as_secs()
            );
            shared.alarms.raise(ALARM, text);
            continue;
        }
        let decoded = *shared.decoded.borrow();
        let seen = (decoded, shared.progress.mark());
        let stood = still
            .meet(Instant::now(), seen)
            .min(shared.progress.undecoded_for());
        if stood < PATIENCE || is_told_otherwise(shared, journal) {
            shared.alarms.clear(ALARM);
            before = None;
            continue;
        }
        if Instant::now() < ask_at {
            continue;
        }
        ask_at = Instant::now() + ASK_EVERY;
        let why = match timeout(ASK_WITHIN, ask(config)).await {
            Ok(Ok(why)) => why,
            Ok(Err(error)) => Why::Unknown(crate::error::chain(&error)),
            Err(_) => Why::Unknown("it does not answer".to_owned()),
        };
        let text = why.text(stood, decoded);
        let is_gone = why == Why::Gone;
        if before
            .replace(why.clone())
            .is_none_or(|before| !before.is_same(&why))
        {
            continue;
        }
        if is_gone {
            // The connection is dead, and nobody has told us.
            return source::Error::Closed.into();
        }
        match text {
            Some(why) => shared.alarms.raise(
                ALARM,
                format!(
                    "nothing is decoded since {} s, so nothing of this node is sent, and its server keeps WAL: decoding is at {}; {why}",
                    stood.as_secs(),
                    Lsn(decoded)
                ),
            ),
            None => shared.alarms.clear(ALARM),
        }
    }
}

/// Does another alarm say what is waited for?
fn is_told_otherwise(shared: &Shared, journal: &Journal) -> bool {
    let stands = |name: &str| shared.alarms.list().iter().any(|(known, ..)| known == name);
    stands("decoding") || journal.is_stalled() || journal.full().is_some()
}

/// How far it was, and since when.
struct Still {
    seen: (u64, i64),
    since: Instant,
}

impl Still {
    const fn new(now: Instant) -> Self {
        Self {
            seen: (0, 0),
            since: now,
        }
    }

    /// For how long nothing has changed.
    fn meet(&mut self, now: Instant, seen: (u64, i64)) -> Duration {
        if self.seen != seen {
            *self = Self { seen, since: now };
        }
        now.saturating_duration_since(self.since)
    }
}

/// Why nothing comes.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Why {
    /// There is no walsender for the slot.
    Gone,
    /// A session of ours waits for a lock.
    Lock(String),
    /// The walsender waits for this.
    Waits { event: String, flushed: u64 },
    /// It works.
    Works { flushed: u64 },
    /// The server does not say.
    Unknown(String),
}

impl Why {
    /// Whatever else has moved.
    fn is_same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Waits { event, .. }, Self::Waits { event: other, .. }) => event == other,
            _ => std::mem::discriminant(self) == std::mem::discriminant(other),
        }
    }

    /// In words; nothing where nobody need look at it.
    fn text(&self, stood: Duration, decoded: u64) -> Option<String> {
        let is_behind = |flushed: &u64| decoded < reportable(*flushed);
        Some(match self {
            Self::Gone => "the server has no walsender for the slot any more".to_owned(),
            Self::Lock(text) => format!("{text}: end what holds it"),
            Self::Waits { event, flushed } if is_behind(flushed) => format!(
                "its walsender waits ({event}){}",
                match event.as_str() {
                    "WaitForStandbyConfirmation" =>
                        ": a standby that synchronized_standby_slots names is away or behind. Bring it back, or take it out of the \
                         setting",
                    _ => "",
                }
            ),
            Self::Works { flushed } if is_behind(flushed) && stood >= PATIENCE_WITH_WORK => {
                "its walsender works, perhaps on something large that is not replicated".to_owned()
            }
            // All that there is, is decoded, or it gets on.
            Self::Waits { .. } | Self::Works { .. } => return None,
            Self::Unknown(text) => format!("the server does not say why: {text}"),
        })
    }

    fn of(
        active: Option<i32>,
        wait: (Option<String>, Option<String>),
        flushed: u64,
        lock: Option<String>,
    ) -> Self {
        match (active, wait, lock) {
            (None, ..) => Self::Gone,
            (_, _, Some(text)) => Self::Lock(text),
            // It reads what it has to decode.
            (_, (Some(kind), Some(event)), None) if kind != "IO" => Self::Waits { event, flushed },
            _ => Self::Works { flushed },
        }
    }
}

/// A connection of its own, and only where there is something to ask.
async fn ask(config: &Config) -> Result<Why, Error> {
    let (session, _driver) = pg::connect(&config.postgres, "decode watch").await?;
    session.batch_execute("SET lock_timeout = '2s'").await?;
    let Some(row) = session.query_opt(WHY, &[&config.postgres.slot]).await? else {
        return Ok(Why::Gone);
    };
    let flushed = u64::try_from(row.try_get::<_, i64>(3)?).unwrap_or(0);
    let wait = (row.try_get(1)?, row.try_get(2)?);
    Ok(Why::of(row.try_get(0)?, wait, flushed, row.try_get(4)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_moves_does_not_stand_also_within_one_transaction() {
        let start = Instant::now();
        let at = |second| start + Duration::from_secs(second);
        let mut still = Still::new(start);
        still.meet(at(1), (7, 7));
        assert_eq!(still.meet(at(30), (7, 7)), Duration::from_secs(29));
        assert_eq!(still.meet(at(31), (7, 8)), Duration::ZERO);
        assert_eq!(still.meet(at(40), (8, 8)), Duration::ZERO);
        assert_eq!(still.meet(at(41), (8, 8)), Duration::from_secs(1));
    }

    #[test]
    fn a_walsender_that_waits_is_told_and_one_that_works_or_is_through_is_not() {
        let wait = |kind: &str, event: &str| (Some(kind.to_owned()), Some(event.to_owned()));
        let standby = Why::of(Some(1), wait("Client", "WaitForStandbyConfirmation"), 900, None);
        let text = standby.text(PATIENCE, 100).unwrap();
        assert!(text.contains("synchronized_standby_slots"), "{text}");
        // It has sent all that is flushed.
        let idle = Why::of(Some(1), wait("Activity", "WalSenderMain"), 900, None);
        assert_eq!(idle.text(PATIENCE, 900), None);
        for busy in [(None, None), wait("IO", "ReorderBufferRead")] {
            let busy = Why::of(Some(1), busy, 900, None);
            assert_eq!(busy.text(PATIENCE, 100), None);
            assert!(busy.text(PATIENCE_WITH_WORK, 100).is_some());
        }
        let lock = Why::of(Some(1), (None, None), 900, Some("session 7 waits".to_owned()));
        assert!(lock.text(PATIENCE, 100).unwrap().starts_with("session 7 waits"));
        assert_eq!(Why::of(None, (None, None), 900, None), Why::Gone);
    }
}
