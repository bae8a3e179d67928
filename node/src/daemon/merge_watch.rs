//! Notices what does not fit merged columns, and came after the daemon began, by DDL that travels or by hand: constraints that
//! merging could break, columns that cannot be merged any more, updates that do not tell the row before.
//!
//! In:   the catalog, the policy            Out: an alarm that says what to write into the policy file
//! Must never: change how columns are merged. That is the policy file's, which all nodes share
//! On crash: nothing to lose

use std::sync::Arc;
use std::time::Duration;

use anabranch_conflict::policy::Policies;
use tokio_postgres::Client;

use super::Error;
use crate::config::Config;
use crate::pg;
use crate::setup::merged;
use crate::shared::Shared;

/// Between two looks.
const EVERY: Duration = Duration::from_secs(10);

/// Name of the alarm.
const ALARM: &str = "merge_groups";

/// Looks until the task is ended. Without a connection it tries again: the stages that need one notice by themselves.
pub(super) async fn run(config: Arc<Config>, shared: Arc<Shared>, policies: Policies) {
    let mut client = None;
    loop {
        if let Err(error) = look(&config, &shared, &policies, &mut client).await {
            tracing::debug!(%error, "looking for constraints over merged columns");
            client = None;
        }
        tokio::time::sleep(EVERY).await;
    }
}

async fn look(
    config: &Config,
    shared: &Shared,
    policies: &Policies,
    client: &mut Option<Client>,
) -> Result<(), Error> {
    let session = match client {
        Some(session) => session,
        None => client.insert(pg::connect(&config.postgres, "merge watch").await?.0),
    };
    let findings = merged::misfits(session, policies).await?;
    if findings.is_empty() {
        shared.alarms.clear(ALARM);
        return Ok(());
    }
    let said: Vec<String> = findings
        .iter()
        .map(|finding| format!("{}: {}; {}", finding.check, finding.found, finding.remedy))
        .collect();
    shared.alarms.raise(ALARM, said.join("\n"));
    Ok(())
}
