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
/// (Whether a method of another release's is held to is not known here.)
const TAKE_BACK: &str = "DELETE FROM anabranch.sequence WHERE schema_name = $1 AND sequence_name = $2 AND node_id = $3 \
    AND method IN ('interleave', 'range')";
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
        if sql
            .execute(TAKE_BACK, &[&schema, &name, &i32::from(node.0)])
            .await?
            == 0
        {
            continue;
        }
        tracing::warn!(
            sequence = format!("{schema}.{name}"),
            "is not divided as this node had said, so that is taken back"
        );
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

/// What is divided at other nodes alone, and what is counted although this node has said that it has snowflake ids.
fn text(all: &Sequences, config: &Config) -> Option<String> {
    let found = [
        (
            all.divided_elsewhere(config.node.id),
            "divided at other nodes and not here",
        ),
        (
            all.counted_again(config.node.id),
            "used again by columns of which this node has said that they have snowflake ids",
        ),
    ];
    let found: Vec<String> = found
        .into_iter()
        .filter(|(names, _)| !names.is_empty())
        .map(|(names, what)| format!("{}: {what}", names.join(", ")))
        .collect();
    (!found.is_empty()).then(|| {
        format!(
            "{}, so ids that this node gives can be those of other nodes, too: run `anabranch sequences apply` here",
            found.join("; ")
        )
    })
}
