//! Notices sequences that are not divided, or not any more, as this node has told the others: what was said goes by the name, and outlives
//! a sequence that was dropped and made anew.
//!
//! In:   the catalog, `anabranch.sequence`            Out: what does not hold is taken back; an alarm
//! Must never: touch what others said, or a sequence
//! On crash: nothing to lose

use std::sync::Arc;
use std::time::Duration;

use tokio_postgres::IsolationLevel;

use crate::config::Config;
use crate::pg;
use crate::setup::sequence::{self, Depth, Sequences};
use crate::shared::Shared;

/// Between two looks. Each has a connection of its own, so that none is held for it.
const EVERY: Duration = Duration::from_secs(30);
/// Name of the alarm.
const ALARM: &str = "sequences";

type Error = Box<dyn std::error::Error + Send + Sync>;

/// Looks until the task is ended. Without a connection it tries again: the stages that need one notice by themselves.
pub(super) async fn run(config: Arc<Config>, shared: Arc<Shared>) {
    loop {
        if let Err(error) = look(&config, &shared).await {
            tracing::debug!(%error, "looking for sequences that are not divided");
        }
        tokio::time::sleep(EVERY).await;
    }
}

async fn look(config: &Config, shared: &Shared) -> Result<(), Error> {
    let node = config.node.id;
    let (mut client, _driver) = pg::connect(&config.postgres, "sequence watch").await?;
    client
        .batch_execute("SET default_transaction_read_only = off; SET lock_timeout = '2s'; SET synchronous_commit = local")
        .await?;
    // One snapshot for the catalog and what was said: `sequences apply`, which changes both at once, may run beside it. It wins.
    let begin = client.build_transaction();
    let begin = begin.isolation_level(IsolationLevel::RepeatableRead);
    let transaction = begin.read_only(false).start().await?;
    let sql = transaction.client();
    let tables = sequence::published(sql, &config.postgres.publication).await?;
    let mut all = sequence::read(sql, &tables, Depth::Catalog).await?;
    for (schema, name) in all.unkept(node) {
        tracing::warn!(
            sequence = format!("{schema}.{name}"),
            "is not divided as this node had said, so that is taken back"
        );
        let delete =
            "DELETE FROM anabranch.sequence WHERE schema_name = $1 AND sequence_name = $2 AND node_id = $3";
        sql.execute(delete, &[&schema, &name, &i32::from(node.0)]).await?;
        if let Some(said) = all.said.get_mut(&(schema, name)) {
            said.remove(&node);
        }
    }
    transaction.commit().await?;
    match text(&all, config) {
        Some(text) => shared.alarms.raise(ALARM, text),
        None => shared.alarms.clear(ALARM),
    }
    Ok(())
}

/// What is divided at other nodes alone.
fn text(all: &Sequences, config: &Config) -> Option<String> {
    let names = all.divided_elsewhere(config.node.id);
    (!names.is_empty()).then(|| {
        format!(
            "{}: divided at other nodes and not here, so ids that this node gives can be theirs, too: run `anabranch sequences apply` here",
            names.join(", ")
        )
    })
}
