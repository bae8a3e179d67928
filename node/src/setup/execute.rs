//! Running a plan.
//!
//! In:   [`Plan`], a connection            Out: the database, [`Event`]s to whoever watches
//! Invariants: a stage happens whole or not at all; a stage that meets a lock is tried again, never queued behind.
//! On crash: stages done stay done; the next `init` plans what is left.

use std::time::Duration;

use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use super::error::Error;
use super::plan::{Plan, Scope, Stage, Step};

/// What happened, for whoever watches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A step is done.
    Did(String),
    /// Not getting on: what for, and what is in the way.
    Waiting {
        /// The step.
        what: String,
        /// Sessions and prepared transactions that it waits for, in words.
        on: Vec<String>,
    },
}

/// In SQL: a transaction lasts longer than a moment.
const FOR_LONG: &str = "a.xact_start < clock_timestamp() - interval '1 second'";

/// How long DDL may queue for a lock before it lets everybody else pass again.
const LOCK_TIMEOUT: &str = "SET LOCAL lock_timeout = '2s'";
/// How often a stage that meets a lock is tried.
const LOCK_TRIES: u32 = 30;
/// Between two looks at what slot creation waits for.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// Runs `plan`. `watcher` is a second connection, for a look at what the first waits for.
///
/// # Errors
/// The first statement that fails, with what it was for; its stage is undone, stages before it stay.
pub async fn execute(
    client: &mut Client,
    watcher: &Client,
    plan: &Plan,
    report: &mut (dyn FnMut(Event) + Send),
) -> Result<(), Error> {
    if !plan.is_allowed() {
        return Err(Error::Refused(
            "the checks failed; nothing was changed".to_owned(),
        ));
    }
    for stage in &plan.stages {
        match stage.scope {
            Scope::Transaction => run_transaction(client, watcher, stage, report).await?,
            Scope::Slot => run_slot(client, watcher, stage, report).await?,
        }
    }
    Ok(())
}

pub(super) async fn run_transaction(
    client: &mut Client,
    watcher: &Client,
    stage: &Stage,
    report: &mut (dyn FnMut(Event) + Send),
) -> Result<(), Error> {
    let mut tries = 0;
    loop {
        tries += 1;
        match try_transaction(client, stage).await {
            Ok(()) => break,
            Err(Error::Step { what, source, .. })
                if tries < LOCK_TRIES && source.code() == Some(&SqlState::LOCK_NOT_AVAILABLE) =>
            {
                report(Event::Waiting {
                    what,
                    on: lock_holders(watcher, FOR_LONG).await?,
                });
                tokio::time::sleep(Duration::from_millis(500)).await;
            }
            Err(error) => return Err(error),
        }
    }
    for step in &stage.steps {
        report(Event::Did(step.what.clone()));
    }
    Ok(())
}

async fn try_transaction(client: &mut Client, stage: &Stage) -> Result<(), Error> {
    let failed = |step: &Step| {
        let (what, sql) = (step.what.clone(), step.sql.clone());
        move |source| Error::Step { what, sql, source }
    };
    let whole = Step::new("begin a transaction", "BEGIN");
    // The database of a node that joins, or leaves, is read only by default.
    let begin = client.build_transaction().read_only(false);
    let transaction = begin.start().await.map_err(failed(&whole))?;
    transaction
        .batch_execute(LOCK_TIMEOUT)
        .await
        .map_err(failed(&whole))?;
    for step in &stage.steps {
        transaction.batch_execute(&step.sql).await.map_err(failed(step))?;
    }
    transaction
        .commit()
        .await
        .map_err(failed(&Step::new("commit", "COMMIT")))
}

async fn run_slot(
    client: &Client,
    watcher: &Client,
    stage: &Stage,
    report: &mut (dyn FnMut(Event) + Send),
) -> Result<(), Error> {
    for step in &stage.steps {
        let work = client.batch_execute(&step.sql);
        tokio::pin!(work);
        loop {
            tokio::select! {
                done = &mut work => {
                    done.map_err(|source| Error::Step { what: step.what.clone(), sql: step.sql.clone(), source })?;
                    break;
                }
                () = tokio::time::sleep(LOOK_EVERY) => {
                    report(Event::Waiting { what: step.what.clone(), on: writers(watcher).await? });
                }
            }
        }
        report(Event::Did(step.what.clone()));
    }
    Ok(())
}

/// Write transactions and prepared transactions, oldest first: what the creation of a slot waits for.
pub(crate) async fn writers(watcher: &Client) -> Result<Vec<String>, Error> {
    texts(
        watcher,
        "what the slot waits for",
        "SELECT format('session %s of %s, in a transaction for %s: %s', pid, coalesce(usename::text, '?'),
                       date_trunc('second', clock_timestamp() - xact_start), coalesce(left(query, 80), '?'))
         FROM pg_stat_activity WHERE backend_xid IS NOT NULL AND query NOT ILIKE '%create%replication_slot%'
         UNION ALL
         SELECT format('prepared transaction %s of %s in database %s, since %s: COMMIT PREPARED or ROLLBACK PREPARED it',
                       quote_literal(gid), owner, database, date_trunc('second', prepared))
         FROM pg_prepared_xacts",
    )
    .await
}

/// Sessions that hold relation locks on user tables, of those of which `are`, a condition in SQL on `l` of `pg_locks` and `a` of
/// `pg_stat_activity`, is true.
pub(crate) async fn lock_holders(watcher: &Client, are: &str) -> Result<Vec<String>, Error> {
    let held = format!(
        "SELECT format('session %s of %s, which holds %s on %s, in a transaction for %s: %s', a.pid,
                       coalesce(a.usename::text, '?'), string_agg(DISTINCT l.mode, ', '), l.relation::regclass,
                       date_trunc('second', clock_timestamp() - a.xact_start), coalesce(left(a.query, 80), '?'))
         FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid
         WHERE l.locktype = 'relation' AND l.granted AND a.pid <> pg_backend_pid()
           AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
           AND l.relation >= 16384 AND {are}
         GROUP BY a.pid, a.usename, l.relation, a.xact_start, a.query"
    );
    texts(watcher, "who holds the lock", &held).await
}

async fn texts(client: &Client, what: &'static str, sql: &str) -> Result<Vec<String>, Error> {
    let rows = client
        .query(sql, &[])
        .await
        .map_err(|source| Error::Read { what, source })?;
    rows.iter()
        .map(|row| row.try_get(0))
        .collect::<Result<_, _>>()
        .map_err(|source| Error::Read { what, source })
}
