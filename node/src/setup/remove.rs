//! Taking everything away again: what `init` made, and the replica identities and privileges that it changed.
//!
//! Invariants: 1. the slot goes first: without the rest it would keep WAL for ever, and the rest without it is found and
//! removed by the next run. 2. nothing is removed that `init` did not make.

use std::time::Duration;

use tokio_postgres::Client;

use super::check;
use super::error::Error;
use super::execute::{Event, run_transaction};
use super::facts::Facts;
use super::plan::{Scope, Stage, Step, restore_identity};
use super::sql::{ident, literal, qualified};

/// A slot that is in use is looked at so often before that is an error, some five seconds in all.
const SLOT_LOOKS: u32 = 25;
/// And so long after each look.
const SLOT_LOOK_EVERY: Duration = Duration::from_millis(200);

/// What removing does to a database.
#[derive(Debug, Clone, Default)]
pub struct Removal {
    /// Drops the slot; none when there is none.
    pub slot: Option<Step>,
    /// Everything else, in one transaction; empty when there is nothing.
    pub steps: Vec<Step>,
    /// Statements that were not run because another database of the server may need what they take away.
    pub left: Vec<String>,
}

impl Removal {
    /// Is there nothing to remove?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.slot.is_none() && self.steps.is_empty()
    }
}

/// Plans the removal. Slot and publication are those named by the node row, not by a configuration that may have
/// changed; without a node row nothing of ours is there.
///
/// # Errors
/// When the database cannot be read, a daemon still holds the slot, or a join is unfinished.
pub async fn plan_removal(client: &Client, facts: &Facts) -> Result<Removal, Error> {
    let mut removal = Removal::default();
    // What it has written down as done would be taken for done when it goes on.
    if let Some(unfinished) = check::unfinished_join(facts) {
        return Err(Error::Refused(format!(
            "{}: {}",
            unfinished.found, unfinished.remedy
        )));
    }
    if !facts.ours.schema {
        return Ok(removal);
    }
    let node = facts.ours.node.as_ref();
    if let Some(node) = node {
        removal.slot = slot(client, &node.slot, &facts.server.database).await?;
        let name = ident(&node.publication);
        removal.steps.push(Step::new(
            format!("drop publication {name}"),
            format!("DROP PUBLICATION IF EXISTS {name};"),
        ));
    }
    removal.steps.extend(identities(facts));
    if facts.ours.tables.iter().any(|table| table == "undo") {
        let others = other_slots(client).await?;
        for (statement, server_wide) in undo(client).await? {
            if server_wide && others {
                removal.left.push(statement);
            } else {
                removal
                    .steps
                    .push(Step::new(format!("undo a grant: {statement}"), statement));
            }
        }
    }
    let has_leaving = facts.ours.tables.iter().any(|table| table == "leaving");
    if joins(facts) || has_leaving && leaves(client).await? {
        removal.steps.push(Step::new(
            "open the database for writes",
            format!(
                "ALTER DATABASE {} RESET default_transaction_read_only;",
                ident(&facts.server.database)
            ),
        ));
    }
    if facts.ours.ddl.made_from.is_some() || !facts.ours.ddl.capture.is_empty() {
        removal
            .steps
            .push(Step::new("let no DDL travel any more", super::ddl::remove()));
    }
    let known = facts.ours.tables.iter().any(|table| table == "default_before");
    removal.steps.extend(defaults(client, known).await?);
    removal.steps.push(Step::new(
        "drop schema anabranch",
        "DROP SCHEMA anabranch CASCADE;",
    ));
    Ok(removal)
}

/// Carries the removal out.
///
/// # Errors
/// The statement that failed; running again takes up what is left.
pub async fn remove(
    client: &mut Client,
    watcher: &Client,
    removal: &Removal,
    report: &mut (dyn FnMut(Event) + Send),
) -> Result<(), Error> {
    if let Some(step) = &removal.slot {
        client
            .batch_execute(&step.sql)
            .await
            .map_err(|source| Error::Step {
                what: step.what.clone(),
                sql: step.sql.clone(),
                source,
            })?;
        report(Event::Did(step.what.clone()));
    }
    if removal.steps.is_empty() {
        return Ok(());
    }
    // After `leave` the database is read only by default.
    client
        .batch_execute("SET default_transaction_read_only = off")
        .await
        .map_err(|source| Error::Read {
            what: "whether the database can be written to",
            source,
        })?;
    let stage = Stage {
        scope: Scope::Transaction,
        steps: removal.steps.clone(),
    };
    run_transaction(client, watcher, &stage, report).await
}

/// Looks again for a while where the slot is in use: the walsender of a daemon that has just ended is gone a moment later.
async fn slot(client: &Client, name: &str, database: &str) -> Result<Option<Step>, Error> {
    let mut looks = SLOT_LOOKS;
    loop {
        let row = client
            .query_opt(
                "SELECT active_pid FROM pg_replication_slots
                 WHERE slot_name = $1 AND database = $2 AND plugin = 'pgoutput'",
                &[&name, &database],
            )
            .await
            .map_err(read("the slot"))?;
        let Some(row) = row else { return Ok(None) };
        let pid: Option<i32> = row.try_get(0).map_err(read("the slot"))?;
        let Some(pid) = pid else { break };
        looks -= 1;
        if looks == 0 {
            return Err(Error::Refused(format!(
                "a daemon still reads slot {name} (server process {pid}): stop it first, on whatever machine it runs"
            )));
        }
        tokio::time::sleep(SLOT_LOOK_EVERY).await;
    }
    let sql = format!("SELECT pg_catalog.pg_drop_replication_slot({});", literal(name));
    Ok(Some(Step::new(format!("drop replication slot {name}"), sql)))
}

/// Those that were dropped or changed by somebody else since are not ours to restore.
fn identities(facts: &Facts) -> Vec<Step> {
    let befores = facts.ours.identities.iter().filter(|before| {
        let mut tables = facts.tables.iter();
        tables
            .any(|table| table.schema == before.schema && table.name == before.name && table.identity == "f")
    });
    befores
        .map(|before| {
            restore_identity(
                &before.schema,
                &before.name,
                &before.identity,
                before.index.as_deref(),
            )
        })
        .collect()
}

/// Columns of whatever table that take their values from a function which goes with the schema. `known`: what they had before
/// was written down. Those without that come first: from 17 on an identity that a partitioned table gets again is its partitions', too,
/// whose default could not be taken away then.
async fn defaults(client: &Client, known: bool) -> Result<Vec<Step>, Error> {
    let before = if known {
        "LEFT JOIN anabranch.default_before b
             ON (b.schema_name, b.table_name, b.column_name) = (n.nspname, c.relname, a.attname)"
    } else {
        "CROSS JOIN (SELECT NULL::text AS restore) b"
    };
    let rows = client
        .query(
            &format!(
                "SELECT n.nspname::text, c.relname::text, a.attname::text, b.restore
                 FROM pg_depend d JOIN pg_attrdef f ON f.oid = d.objid
                 JOIN pg_class c ON c.oid = f.adrelid JOIN pg_namespace n ON n.oid = c.relnamespace
                 JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = f.adnum
                 {before}
                 WHERE d.classid = 'pg_attrdef'::regclass AND d.refclassid = 'pg_proc'::regclass
                   AND d.refobjid = to_regprocedure('anabranch.snowflake()')
                 ORDER BY b.restore IS NOT NULL, 1, 2, 3"
            ),
            &[],
        )
        .await
        .map_err(read("columns with snowflake ids"))?;
    rows.iter()
        .map(|row| {
            let (schema, table, column): (String, String, String) =
                (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
            let name = format!("{}.{}", qualified(&schema, &table), ident(&column));
            Ok(match row.try_get::<_, Option<String>>(3)? {
                Some(restore) => Step::new(format!("give {name} the ids of its sequence again"), restore),
                None => Step::new(
                    format!("take the default anabranch.snowflake() from {name}, which had none before"),
                    format!(
                        "ALTER TABLE {} ALTER COLUMN {} DROP DEFAULT;",
                        qualified(&schema, &table),
                        ident(&column)
                    ),
                ),
            })
        })
        .collect::<Result<_, tokio_postgres::Error>>()
        .map_err(read("columns with snowflake ids"))
}

/// Has `join` made the database read only, and no daemon opened it yet?
fn joins(facts: &Facts) -> bool {
    let Some(node) = &facts.ours.node else {
        return false;
    };
    let is_said = |fact: &str| {
        let mut said = facts.ours.members.iter();
        said.any(|(id, it)| *id == node.node_id && it == fact)
    };
    is_said("joined") && !is_said("ready")
}

/// Has `leave` made the database read only?
async fn leaves(client: &Client) -> Result<bool, Error> {
    client
        .query_one("SELECT EXISTS (SELECT FROM anabranch.leaving)", &[])
        .await
        .and_then(|row| row.try_get(0))
        .map_err(read("anabranch.leaving"))
}

async fn undo(client: &Client) -> Result<Vec<(String, bool)>, Error> {
    let rows = client
        .query(
            "SELECT statement, server_wide FROM anabranch.undo u
             WHERE (on_schema IS NULL OR to_regnamespace(quote_ident(on_schema)) IS NOT NULL)
               AND (on_table IS NULL OR to_regclass(format('%I.%I', on_schema, on_table)) IS NOT NULL)
             ORDER BY 1",
            &[],
        )
        .await
        .map_err(read("the grants"))?;
    rows.iter()
        .map(|row| Ok((row.try_get(0)?, row.try_get(1)?)))
        .collect::<Result<_, tokio_postgres::Error>>()
        .map_err(read("the grants"))
}

/// Does another database of this server have a logical slot that may be of a node under the same role?
async fn other_slots(client: &Client) -> Result<bool, Error> {
    client
        .query_one(
            "SELECT EXISTS (SELECT FROM pg_replication_slots WHERE plugin = 'pgoutput' AND database <> current_database())",
            &[],
        )
        .await
        .and_then(|row| row.try_get(0))
        .map_err(read("the slots"))
}

fn read(what: &'static str) -> impl Fn(tokio_postgres::Error) -> Error {
    move |source| Error::Read { what, source }
}
