//! What a node does while a table is added: says that rows of it are missing, and waits for who wrote it before.
//!
//! In:   names of tables            Out: nothing is alarmed as drift of them meanwhile
//! Not here: bringing the rows (`super::super::fill`)

use std::sync::Arc;
use std::time::Duration;

use anabranch_proto::link as pb;
use tokio::time::Instant;

use super::{Conversation, Error};
use crate::apply::passed_over::Rule;
use crate::shared::{Shared, lock};

/// How long transactions are waited for that wrote a table before it was replicated.
const WRITERS_PATIENCE: Duration = Duration::from_secs(120);

/// Transactions that hold the lock of a writer on a table, and who they are; of those in `$3`, if any, and prepared ones.
const WRITERS: &str = "SELECT l.virtualtransaction::text, coalesce(format('session %s of %s', a.pid, a.usename), \
        'a prepared transaction') \
    FROM pg_locks l JOIN pg_class c ON c.oid = l.relation JOIN pg_namespace n ON n.oid = c.relnamespace \
    LEFT JOIN pg_stat_activity a ON a.pid = l.pid \
    WHERE l.locktype = 'relation' AND l.granted AND n.nspname = $1 AND c.relname = $2 \
      AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database()) \
      AND l.mode IN ('RowExclusiveLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock') \
      AND ($3::text[] IS NULL OR l.virtualtransaction::text = ANY ($3) OR l.pid IS NULL)";

impl Conversation {
    /// Rows of these tables are being brought to who lacks them.
    pub(super) async fn adding(&mut self, adding: &pb::VerifyAdding) -> Result<(), Error> {
        let names = adding
            .tables
            .iter()
            .map(|table| (table.schema.clone(), table.name.clone()));
        let names: Vec<(String, String)> = names.collect();
        if adding.wait {
            // It may not have been replicated here before: what comes from here on is not passed over any more.
            let rule = Rule::of(&self.seat.config);
            self.seat.shared.passed_over.read(self.sql()?, &rule).await?;
            for (schema, name) in &names {
                self.wait_for_writers(schema, name).await?;
            }
        } else {
            self.adding = None;
            self.adding = Some(Adding::of(&self.seat.shared, names));
        }
        Ok(())
    }

    /// Waits until all have ended that have written the table until now: what they wrote before it was in the publication
    /// nobody decodes, and no snapshot shows it before.
    async fn wait_for_writers(&self, schema: &str, name: &str) -> Result<(), Error> {
        let sql = self.sql()?;
        let mut open: Option<Vec<String>> = None;
        let until = Instant::now() + WRITERS_PATIENCE;
        loop {
            let rows = sql.query(WRITERS, &[&schema, &name, &open]).await?;
            let some = rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?)));
            let some = some.collect::<Result<Vec<(String, String)>, tokio_postgres::Error>>()?;
            let Some((_, who)) = some.first() else {
                return Ok(());
            };
            if Instant::now() >= until {
                return Err(Error::Other(format!(
                    "{who} has written {schema}.{name} and not ended yet: what it wrote before the table was replicated cannot be brought; end it, and run this again"
                )));
            }
            open.get_or_insert_with(|| some.into_iter().map(|(transaction, _)| transaction).collect());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

/// Tables that are being added, until it is dropped.
pub(super) struct Adding {
    shared: Arc<Shared>,
    names: Vec<(String, String)>,
}

impl Adding {
    pub(super) fn of(shared: &Arc<Shared>, names: Vec<(String, String)>) -> Self {
        let mut adding = lock(&shared.adding);
        for name in &names {
            *adding.entry(name.clone()).or_default() += 1;
        }
        drop(adding);
        Self {
            shared: Arc::clone(shared),
            names,
        }
    }
}

impl Drop for Adding {
    fn drop(&mut self) {
        let mut adding = lock(&self.shared.adding);
        for name in &self.names {
            if let Some(count) = adding.get_mut(name) {
                *count = count.saturating_sub(1);
            }
        }
        adding.retain(|_, count| *count > 0);
    }
}
