//! Upkeep of the conflict log: partitions, retention, and the alarm of a storm.
//!
//! In:   `conflict_log.retention_days`, the agreed clock            Out: partitions made and dropped, an alarm
//! Invariants: time is the members' agreed time: a wild clock of the server drops nothing
//! On crash: nothing to lose
//! Not here: the SQL (`crate::setup::conflict_log`)

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::time::Instant;
use tokio_postgres::Client;

use crate::config::Config;
use crate::pg;
use crate::shared::Shared;

/// Between two looks.
const EVERY: Duration = Duration::from_secs(60);
/// A storm is over when nothing was only counted for so long.
const OVER: Duration = Duration::from_secs(600);

const UPKEEP: &str =
    "SELECT anabranch.conflict_upkeep(to_timestamp($1 / 1000000.0::float8), make_interval(days => $2))";
const STORM: &str = "DELETE FROM anabranch.conflict_storm WHERE minute < to_timestamp($1 / 1000000.0::float8) - make_interval(days => $2)";

/// Keeps the log up until the task is ended. What fails is tried again at the next look.
pub(super) async fn run(config: Arc<Config>, shared: Arc<Shared>) {
    let mut client: Option<Client> = None;
    let (mut counted, mut counted_at) = (0, None);
    let mut due = Instant::now();
    loop {
        watch_storm(&config, &shared, &mut counted, &mut counted_at);
        if Instant::now() >= due {
            due = Instant::now() + EVERY;
            match upkeep(&config, &shared, &mut client).await {
                Ok(did) => {
                    for what in did {
                        tracing::info!("conflict log: {what}");
                    }
                }
                Err(error) => tracing::warn!(%error, "upkeep of the conflict log, trying again in a minute"),
            }
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

async fn upkeep(
    config: &Config,
    shared: &Shared,
    client: &mut Option<Client>,
) -> Result<Vec<String>, crate::review::Error> {
    let session = match client.take().filter(|client| !client.is_closed()) {
        Some(session) => session,
        None => pg::connect(&config.postgres, "conflict log").await?.0,
    };
    let days = i32::try_from(config.conflict_log.retention_days).unwrap_or(i32::MAX);
    let at = shared.agreed_us() as f64;
    let row = session.query_one(UPKEEP, &[&at, &days]).await?;
    session.execute(STORM, &[&at, &days]).await?;
    *client = Some(session);
    Ok(row.try_get(0)?)
}

fn watch_storm(config: &Config, shared: &Shared, counted: &mut u64, counted_at: &mut Option<Instant>) {
    let now = shared.counters.conflicts_counted.load(Ordering::Relaxed);
    if now > *counted {
        *counted = now;
        *counted_at = Some(Instant::now());
        let text = format!(
            "conflicts come faster than conflict_log.lines_per_second ({}): {now} losing write(s) since the start were \
             counted in anabranch.conflict_storm and their values not kept here",
            config.conflict_log.lines_per_second
        );
        shared.alarms.raise("conflict_storm", text);
    } else if counted_at.is_some_and(|at| at.elapsed() > OVER) {
        *counted_at = None;
        shared.alarms.clear("conflict_storm");
    }
}
