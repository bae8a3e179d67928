//! Notices that the daemon's role lacks something that `anabranch grants` gives it, such as what was taken away, before a row needs it, or
//! a restart.
//!
//! In:   the catalog            Out: an alarm with the statements that give it back
//! Must never: be what keeps rows from being missed: each apply transaction sees to that itself (`crate::apply`, `work/reached`)
//! On crash: nothing to lose

use std::sync::Arc;
use std::time::Duration;

use tokio_postgres::error::SqlState;

use crate::config::Config;
use crate::pg;
use crate::setup::pattern::Patterns;
use crate::setup::{Error, check, facts};
use crate::shared::Shared;

/// Between two looks. Each has a connection of its own, so that none is held for it, and reads what `doctor` reads of the catalog.
const EVERY: Duration = Duration::from_secs(15);
/// Name of the alarm.
const ALARM: &str = "privileges";

/// Looks until the task is ended. Without a connection it tries again: the stages that need one notice by themselves.
pub(super) async fn run(config: Arc<Config>, shared: Arc<Shared>) {
    let Ok(patterns) = Patterns::parse(&config.postgres.tables) else {
        return;
    };
    loop {
        // Not at once: a start has looked itself.
        tokio::time::sleep(EVERY).await;
        match look(&config, &patterns).await {
            Ok(None) => shared.alarms.clear(ALARM),
            Ok(Some(text)) => shared.alarms.raise(ALARM, text),
            Err(error) => tracing::debug!(%error, "looking for privileges"),
        }
    }
}

/// What is missing, if anything is.
async fn look(
    config: &Config,
    patterns: &Patterns,
) -> Result<Option<String>, Box<dyn std::error::Error + Send + Sync>> {
    let dsn = pg::dsn(&config.postgres)?;
    let role = dsn.config().get_user().unwrap_or_default();
    let (mut client, _driver) = pg::connect_dsn(&dsn, "privilege watch").await?;
    // Nobody's DDL of our schema is waited for with a snapshot.
    client.batch_execute("SET lock_timeout = '2s'").await?;
    let (slot, publication) = (&config.postgres.slot, &config.postgres.publication);
    let facts = match facts::read(&mut client, role, slot, publication).await {
        Ok(facts) => facts,
        // It may not even look.
        Err(Error::Read { source, .. }) if source.code() == Some(&SqlState::INSUFFICIENT_PRIVILEGE) => {
            let said = crate::error::sql(&source);
            return Ok(Some(text(
                role,
                &format!("{said}: what `anabranch grants` prints"),
            )));
        }
        Err(error) => return Err(error.into()),
    };
    let missing = check::lacking(facts, patterns);
    let missing: Vec<String> = missing
        .iter()
        .map(|finding| finding.remedy.trim_end_matches(';').to_owned())
        .collect();
    Ok((!missing.is_empty()).then(|| text(role, &missing.join("; "))))
}

fn text(role: &str, missing: &str) -> String {
    format!("the daemon's role {role} lacks what it needs; as a superuser: {missing}")
}
