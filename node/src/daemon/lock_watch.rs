//! Ends lock waits of the daemon's own sessions that outlast their `lock_timeout`.
//!
//! PostgreSQL's `lock_timeout` and `deadlock_timeout` end by the wall clock: `handle_sig_alarm` (`timeout.c`) waits
//! again for whatever `GetCurrentTimestamp()` says is left. Where a server's clock is set back while somebody waits
//! for a lock, both are late by as much, and a deadlock between the applier and a user's session would last for
//! minutes or years, nobody the wiser. So the daemon measures its own waits by a clock that nobody sets.
//!
//! In:   `pg_locks`            Out: `pg_cancel_backend`, after which the caller tries again as after `lock_timeout`
//! Must never: touch a session that is not the daemon's
//! On crash: nothing to lose

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tokio_postgres::Client;

use super::Error;
use crate::config::Config;
use crate::pg;

/// Between two looks.
const EVERY: Duration = Duration::from_secs(1);
/// The longest `lock_timeout` of the sessions looked at, other than the applier's.
const OTHERS_TIMEOUT: Duration = Duration::from_secs(2);
/// How late a timeout may be on a busy machine.
const LATE: Duration = Duration::from_secs(3);

/// What our sessions wait for: the backend and when, by the server, the wait began. One wait keeps its pair.
const WAITS: &str = "SELECT pid, coalesce(waitstart::text, '') FROM pg_locks JOIN pg_stat_activity USING (pid) \
    WHERE NOT granted AND usename = current_user AND datname = current_database() \
    AND application_name IN ('anabranch:apply', 'anabranch:clock', 'anabranch:conflict log', 'anabranch:orphans')";

/// Looks until the task is ended. Without a connection it tries again: the stages that need one notice by themselves.
pub(super) async fn run(config: Arc<Config>) {
    let limit = Duration::from_millis(config.apply.lock_timeout_ms).max(OTHERS_TIMEOUT) + LATE;
    let mut client = None;
    let mut waits = Waits::default();
    loop {
        tokio::time::sleep(EVERY).await;
        if let Err(error) = look(&config, &mut client, &mut waits, limit).await {
            tracing::debug!(%error, "looking for lock waits");
            client = None;
        }
    }
}

async fn look(
    config: &Config,
    client: &mut Option<Client>,
    waits: &mut Waits,
    limit: Duration,
) -> Result<(), Error> {
    let session = match client {
        Some(session) => session,
        None => client.insert(pg::connect(&config.postgres, "lock watch").await?.0),
    };
    let rows = session.query(WAITS, &[]).await?;
    let seen: Vec<(i32, String)> = rows
        .iter()
        .map(|row| Ok((row.try_get(0)?, row.try_get(1)?)))
        .collect::<Result<_, tokio_postgres::Error>>()?;
    for backend in waits.meet(seen, Instant::now(), limit) {
        tracing::warn!(
            backend,
            "a session waits for a lock longer than its lock_timeout: cancelled, to try again (was the server's clock set back?)"
        );
        session
            .execute("SELECT pg_cancel_backend($1)", &[&backend])
            .await?;
    }
    Ok(())
}

/// The waits of the last look, and when each was first seen.
#[derive(Debug, Default)]
struct Waits(HashMap<(i32, String), Instant>);

impl Waits {
    /// Takes what waits at `now`, and gives the backends of the waits that are older than `limit`.
    fn meet(&mut self, seen: Vec<(i32, String)>, now: Instant, limit: Duration) -> Vec<i32> {
        let before = std::mem::take(&mut self.0);
        self.0 = seen
            .into_iter()
            .map(|wait| {
                let since = before.get(&wait).copied().unwrap_or(now);
                (wait, since)
            })
            .collect();
        let old = self.0.iter().filter(|&(_, &since)| now - since > limit);
        old.map(|((backend, _), _)| *backend).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_wait_that_lasts_is_ended_and_many_short_ones_are_not() {
        let limit = Duration::from_secs(5);
        let start = Instant::now();
        let mut waits = Waits::default();
        for second in 0..5 {
            let seen = vec![(7, "12:00:00".to_owned()), (8, format!("12:00:0{second}"))];
            assert!(
                waits
                    .meet(seen, start + Duration::from_secs(second), limit)
                    .is_empty()
            );
        }
        let seen = vec![(7, "12:00:00".to_owned()), (8, "12:00:06".to_owned())];
        assert_eq!(waits.meet(seen, start + Duration::from_secs(6), limit), [7]);
        // It let go in between: another wait that began at the same moment by a clock that was set back.
        assert!(
            waits
                .meet(Vec::new(), start + Duration::from_secs(7), limit)
                .is_empty()
        );
        let seen = vec![(7, "12:00:00".to_owned())];
        assert!(waits.meet(seen, start + Duration::from_secs(8), limit).is_empty());
    }
}
