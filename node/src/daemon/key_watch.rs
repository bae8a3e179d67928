//! Notices unique and foreign keys that somebody makes or drops by hand: DDL that travels says so itself. And unique keys that the nodes
//! can decide otherwise, where the policy does not accept that: of before that was asked, or made since the daemon began.
//!
//! In:   the catalog, the policy            Out: a word to the applier, which reads the keys itself, in its own order with that DDL; an alarm
//! Holds: the foreign keys as they were at the last look
//! Must never: be on the applier's way; where there are thousands of tables this takes a tenth of a second
//! On crash: nothing to lose; the keys are read at every start

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anabranch_conflict::policy::Policies;
use tokio_postgres::Client;

use super::Error;
use crate::apply::catalog::unique_keys;
use crate::apply::foreign::{self, ForeignKey};
use crate::config::Config;
use crate::pg;
use crate::setup::pairwise;
use crate::shared::{Shared, lock};

/// Between two looks.
const EVERY: Duration = Duration::from_secs(5);

/// Name of the alarm.
const ALARM: &str = "unique_keys";

/// Looks until the task is ended. Without a connection it tries again: the stages that need one notice by themselves.
pub(super) async fn run(config: Arc<Config>, shared: Arc<Shared>, policies: Policies) {
    let mut client = None;
    let mut foreign = None;
    loop {
        tokio::time::sleep(EVERY).await;
        let of = (config.as_ref(), &policies);
        if let Err(error) = look(of, &shared, &mut client, &mut foreign).await {
            tracing::debug!(%error, "looking for keys");
            client = None;
        }
    }
}

async fn look(
    (config, policies): (&Config, &Policies),
    shared: &Shared,
    client: &mut Option<Client>,
    foreign: &mut Option<Vec<ForeignKey>>,
) -> Result<(), Error> {
    let session = match client {
        Some(session) => session,
        None => client.insert(pg::connect(&config.postgres, "key watch").await?.0),
    };
    let keys = unique_keys(session).await?;
    if lock(&shared.resolver).has_other_unique_keys(&keys) {
        shared.keys_changed.store(true, Ordering::Relaxed);
        shared.found.notify_one();
    }
    let publication = config.postgres.publication.as_str();
    let findings = pairwise::among(session, publication, policies, &keys).await?;
    if findings.is_empty() {
        shared.alarms.clear(ALARM);
    } else {
        let said = findings
            .iter()
            .map(|finding| format!("{}: {}; {}", finding.check, finding.found, finding.remedy));
        shared.alarms.raise(ALARM, said.collect::<Vec<_>>().join("\n"));
    }
    let keys = foreign::load(session).await?;
    // At the first look they may be others than the applier read when it began.
    if foreign.as_ref() != Some(&keys) {
        *foreign = Some(keys);
        shared.foreign_keys_changed.store(true, Ordering::Relaxed);
    }
    Ok(())
}
