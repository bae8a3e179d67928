//! Notices what does not fit merged columns, and came after the daemon began, by DDL that travels or by hand: constraints that
//! merging could break, columns that cannot be merged any more or have another type, updates that do not tell the row before.
//!
//! In:   the catalog, the policy            Out: an alarm that says what to write into the policy file
//! Must never: change how columns are merged. That is the policy file's, which all nodes share
//! On crash: nothing to lose. What types were is not known then: who starts the daemon again takes that for mended

use std::sync::Arc;
use std::time::Duration;

use anabranch_conflict::policy::Policies;
use tokio_postgres::Client;

use super::Error;
use crate::config::Config;
use crate::pg;
use crate::setup::merged;
use crate::shared::{Shared, lock};

/// Between two looks.
const EVERY: Duration = Duration::from_secs(10);

/// Name of the alarm.
const ALARM: &str = "merge_groups";

/// What to do about a type that is not as it was.
const RETYPED: &str = "give it this type at every node, and start the daemons again once all nodes have what was written before";

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
    let mut findings = merged::misfits(session, policies).await?;
    let types = merged::types(session, policies).await?;
    let retyped = {
        let mut known = lock(&shared.lasting.merged_types);
        known.learn(&types);
        known.changed(&types, RETYPED)
    };
    findings.extend(retyped);
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
