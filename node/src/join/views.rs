//! Materialised views: a dump makes them without their rows, so they are filled here from the tables that were copied.
//!
//! In:   what the donor had filled at the cut            Out: filled views; a note for each that could not be
//! Must never: end a join, which has all rows by then; keep the donor's snapshot, which they do not need
//! Not here: their indexes (the parent's `schema`)

use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use super::state::{done, is_done};
use super::{Error, Event, Report, Source, sql};
use crate::pg;
use crate::setup::sql::{literal, qualified};

const FILLED: &str = "
    SELECT n.nspname::text, c.relname::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relkind = 'm' AND c.relispopulated AND n.nspname !~ '^pg_'
      AND n.nspname NOT IN ('information_schema', 'anabranch', 'anabranch_ddl', 'anabranch_join')
      AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e')
    ORDER BY c.oid";

/// Writes down which are filled in the snapshot.
pub(super) async fn remember(admin: &Client, from: &Source) -> Result<(), Error> {
    const LIST: &str = "list the donor's materialised views";
    let rows = from.client.query(FILLED, &[]).await.map_err(sql(LIST))?;
    let mut text = "TRUNCATE anabranch_join.view;".to_owned();
    for (place, row) in rows.iter().enumerate() {
        let (schema, name): (String, String) = (
            row.try_get(0).map_err(sql(LIST))?,
            row.try_get(1).map_err(sql(LIST))?,
        );
        let name = literal(&qualified(&schema, &name));
        text.push_str(&format!(
            "INSERT INTO anabranch_join.view VALUES ({place}, {name});"
        ));
    }
    admin.batch_execute(&text).await.map_err(sql(LIST))
}

/// Fills them. One that reads another which is not filled yet comes after it.
pub(super) async fn refresh(admin: &Client, report: &Report) -> Result<(), Error> {
    const LIST: &str = "read which materialised views are to be filled";
    let rows = admin
        .query("SELECT name FROM anabranch_join.view ORDER BY place", &[])
        .await
        .map_err(sql(LIST))?;
    let mut left: Vec<(String, String)> = Vec::new();
    for row in rows {
        let name: String = row.try_get(0).map_err(sql(LIST))?;
        let step = format!("fill {name}");
        if !is_done(admin, &step).await? {
            left.push((name, step));
        }
    }
    loop {
        let before = left.len();
        let mut unready = Vec::new();
        for (name, step) in left {
            // As in a session of the owner's own: ours are otherwise (`pg::PINNED_OPTIONS`).
            let text = format!(
                "BEGIN; SET LOCAL row_security = on; REFRESH MATERIALIZED VIEW {name}; {} COMMIT",
                done(&step)
            );
            let Err(failed) = admin.batch_execute(&text).await else {
                report(Event::Built {
                    what: format!("rows of materialised view {name}"),
                });
                continue;
            };
            if pg::is_lost(&failed) {
                return Err(sql(format!("fill materialised view {name}"))(failed));
            }
            admin
                .batch_execute("ROLLBACK")
                .await
                .map_err(sql(format!("fill materialised view {name}")))?;
            if failed.code() == Some(&SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE) {
                unready.push((name, step, failed));
            } else {
                give_up(admin, (&name, &step), &failed, report).await?;
            }
        }
        if unready.is_empty() {
            return Ok(());
        }
        if unready.len() == before {
            for (name, step, failed) in &unready {
                give_up(admin, (name, step), failed, report).await?;
            }
            return Ok(());
        }
        left = unready.into_iter().map(|(name, step, _)| (name, step)).collect();
    }
}

/// Says so, once.
async fn give_up(
    admin: &Client,
    (name, step): (&str, &str),
    failed: &tokio_postgres::Error,
    report: &Report,
) -> Result<(), Error> {
    let text = format!(
        "materialised view {name} is empty here, and cannot be read: {}. When that is mended: REFRESH MATERIALIZED VIEW {name}",
        crate::error::sql(failed)
    );
    report(Event::Note { text });
    admin
        .batch_execute(&done(step))
        .await
        .map_err(sql("write down what is done"))
}
