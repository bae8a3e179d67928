//! Notices unique and foreign keys that somebody makes or drops by hand: DDL that travels says so itself.
//!
//! In:   the catalog            Out: a word to the applier, which reads the keys itself, in its own order with that DDL
//! Holds: the foreign keys as they were at the last look
//! Must never: be on the applier's way; where there are thousands of tables this takes a tenth of a second
//! On crash: nothing to lose; the keys are read at every start

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio_postgres::Client;

use super::Error;
use crate::apply::catalog::unique_keys;
use crate::apply::foreign::{self, ForeignKey};
use crate::config::Config;
use crate::pg;
use crate::shared::{Shared, lock};

/// Between two looks.
const EVERY: Duration = Duration::from_secs(5);

/// Looks until the task is ended. Without a connection it tries again: the stages that need one notice by themselves.
pub(super) async fn run(config: Arc<Config>, shared: Arc<Shared>) {
    let mut client = None;
    let mut foreign = None;
    loop {
        tokio::time::sleep(EVERY).await;
        if let Err(error) = look(&config, &shared, &mut client, &mut foreign).await {
            tracing::debug!(%error, "looking for keys");
            client = None;
        }
    }
}

async fn look(
    config: &Config,
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
    let keys = foreign::load(session).await?;
    // At the first look they may be others than the applier read when it began.
    if foreign.as_ref() != Some(&keys) {
        *foreign = Some(keys);
        shared.foreign_keys_changed.store(true, Ordering::Relaxed);
    }
    Ok(())
}
