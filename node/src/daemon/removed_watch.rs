//! Notices tables that are taken out of replication here, or in again, and those that are made here and never were in it.
//!
//! In:   `anabranch.removed_table`, the catalog            Out: what the applier passes over; rows that leave the quarantine for it
//! On crash: nothing to lose; it is read at every start, before anything is applied

use std::sync::Arc;
use std::time::Duration;

use tokio_postgres::Client;

use super::Error;
use crate::apply::passed_over::Rule;
use crate::config::Config;
use crate::pg;
use crate::shared::Shared;

/// Between two looks.
const EVERY: Duration = Duration::from_secs(2);

/// Looks until the task is ended. Without a connection it tries again: the stages that need one notice by themselves.
pub(super) async fn run(config: Arc<Config>, shared: Arc<Shared>) {
    let mut client = None;
    let rule = Rule::of(&config);
    loop {
        tokio::time::sleep(EVERY).await;
        if let Err(error) = look((&config, &rule), &shared, &mut client).await {
            tracing::debug!(%error, "looking for tables that are not replicated");
            client = None;
        }
    }
}

async fn look(
    (config, rule): (&Config, &Rule),
    shared: &Shared,
    client: &mut Option<Client>,
) -> Result<(), Error> {
    let session = match client {
        Some(session) => session,
        None => {
            let (session, _driver) = pg::connect(&config.postgres, "removed tables").await?;
            session
                .batch_execute("SET default_transaction_read_only = off; SET lock_timeout = '2s'")
                .await?;
            client.insert(session)
        }
    };
    shared.passed_over.read(session, rule).await?;
    Ok(shared.passed_over.clean(session, &shared.resolver).await?)
}
