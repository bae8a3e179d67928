//! A node that has left: it says so to whoever asks, until it is stopped.
//!
//! In:   configuration, alarms that last       Out: no slot any more, a mark in `anabranch.leaving`, the status document
//! Invariants: 1. nothing is decoded, sent, received or applied any more; 2. what happened once is told until the process ends
//! On crash: begins here again, by the mark
//! Not here: leaving (`leaving`); taking the rest away (`anabranch remove`)

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::{mpsc, watch};

use super::{Error, report};
use crate::config::Config;
use crate::shared::{Lasting, now_us};
use crate::status::{ApplyStatus, Leaving, NodeStatus, Status};
use crate::verify::{Event, Report, Verdict};
use crate::{admin, pg};

/// Between two attempts to mark it.
const TRY_EVERY: Duration = Duration::from_millis(500);

/// What it says to who asks for others.
const GONE: &str = "this node has left its cluster: ask at a member";

/// What is to be done with such a node.
pub(super) const REMEDY: &str = "this node has left its cluster, which has all that it wrote: stop its daemon and run \
    `anabranch remove`, which opens the database for writes again. To take part once more, empty the database, give it an id \
    that was never used, and `anabranch join` it";

/// Serves the admin socket until told to stop.
pub(super) async fn stay(
    config: &Config,
    lasting: &Lasting,
    mut stop: watch::Receiver<bool>,
) -> Result<(), Error> {
    tracing::info!("{REMEDY}");
    let mark = async {
        while let Err(error) = mark(config).await {
            tracing::warn!(%error, "cannot mark this node as one that has left; trying again");
            tokio::time::sleep(TRY_EVERY).await;
        }
        std::future::pending::<()>().await;
    };
    let document = serde_json::to_value(status(config, lasting)).unwrap_or_default();
    let path = config.node.data_dir.join(admin::SOCKET);
    let logs = report::nobody_asked(config, GONE);
    let served = admin::serve(
        &path,
        Arc::new(move || document.clone()),
        Arc::new(|_, _, _| Box::pin(async { Err(GONE.to_owned()) })),
        Arc::new(move |_| {
            let logs = logs.clone();
            Box::pin(async move { logs })
        }),
        Arc::new(|_, events: mpsc::Sender<Event>| {
            Box::pin(async move {
                // Who has asked may be gone.
                let _ = events.send(nothing_compared()).await;
            })
        }),
        async move {
            // A closed channel means the same.
            let _ = stop.wait_for(|&stop| stop).await;
        },
    );
    tokio::select! {
        served = served => Ok(served?),
        () = mark => Ok(()),
    }
}

/// Nobody is left to compare with.
fn nothing_compared() -> Event {
    Event::Report(Report {
        verdict: Verdict::Unknown,
        nodes: Vec::new(),
        problems: vec![GONE.to_owned()],
        absent: Vec::new(),
        tables: Vec::new(),
    })
}

/// Without a decoder the slot would keep WAL for ever.
async fn mark(config: &Config) -> Result<(), Error> {
    let (sql, _driver) = pg::connect(&config.postgres, "left").await?;
    sql.batch_execute("SET default_transaction_read_only = off; SET synchronous_commit = local")
        .await?;
    sql.execute(
        "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots \
         WHERE slot_name = $1 AND database = current_database()",
        &[&config.postgres.slot],
    )
    .await?;
    sql.execute(
        "UPDATE anabranch.leaving SET left_at = coalesce(left_at, clock_timestamp())",
        &[],
    )
    .await?;
    Ok(())
}

fn status(config: &Config, lasting: &Lasting) -> Status {
    Status {
        node: NodeStatus {
            id: config.node.id.0,
            name: config.node.name.clone(),
            cluster: config.cluster.id.clone(),
            state: "left the cluster".to_owned(),
            started_at: jiff::Timestamp::from_microsecond(now_us())
                .map_or_else(|_| String::new(), |time| time.to_string()),
            ..NodeStatus::default()
        },
        leaving: Some(Leaving {
            phase: "left".to_owned(),
            waits_for: Vec::new(),
            text: REMEDY.to_owned(),
        }),
        // The rows that they are about are still as they were.
        apply: ApplyStatus {
            drifted_rows: lasting.drifted_rows.load(Ordering::Relaxed),
            ..ApplyStatus::default()
        },
        alarms: report::standing([&lasting.alarms]),
        ..Status::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_happened_once_is_still_told() {
        let lasting = Lasting::default();
        assert!(status(&Config::example(), &lasting).alarms.is_empty());
        lasting.drifted_rows.store(2, Ordering::Relaxed);
        lasting.alarms.raise("leaving", "rows".to_owned());
        lasting.alarms.raise("drift", "others".to_owned());
        let status = status(&Config::example(), &lasting);
        let names: Vec<&str> = status.alarms.iter().map(|alarm| alarm.name.as_str()).collect();
        assert_eq!((names, status.apply.drifted_rows), (vec!["drift", "leaving"], 2));
    }
}
