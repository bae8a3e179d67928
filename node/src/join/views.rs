//! Materialised views: a dump makes them without their rows, so they are filled here from the tables that were copied.
//!
//! In:   what the donor had filled at the cut            Out: filled views; a note for each that could not be
//! Must never: end a join, which has all rows by then
//! Not here: their indexes (the parent's `schema`)

use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use super::state::{done, is_done};
use super::{Error, Event, Report, Source, sql};
use crate::pg;
use crate::setup::sql::qualified;

const FILLED: &str = "
    SELECT n.nspname::text, c.relname::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relkind = 'm' AND c.relispopulated AND n.nspname !~ '^pg_'
      AND n.nspname NOT IN ('information_schema', 'anabranch', 'anabranch_ddl', 'anabranch_join')
      AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e')
    ORDER BY c.oid";

/// Fills them. One that reads another which is not filled yet comes after it.
pub(super) async fn refresh(admin: &Client, from: &Source, report: &Report) -> Result<(), Error> {
    const LIST: &str = "list the donor's materialised views";
    let rows = from.client.query(FILLED, &[]).await.map_err(sql(LIST))?;
    let mut left: Vec<(String, String)> = Vec::new();
    for row in rows {
        let (schema, name): (String, String) = (
            row.try_get(0).map_err(sql(LIST))?,
            row.try_get(1).map_err(sql(LIST))?,
        );
        let name = qualified(&schema, &name);
        let step = format!("fill {name}");
        if !is_done(admin, &step).await? {
            left.push((name, step));
        }
    }
    loop {
        let before = left.len();
        let mut unready = Vec::new();
        for (name, step) in left {
            let text = format!("BEGIN; REFRESH MATERIALIZED VIEW {name}; {} COMMIT", done(&step));
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
                note(&name, &failed, report);
            }
        }
        if unready.is_empty() {
            return Ok(());
        }
        if unready.len() == before {
            for (name, _, failed) in &unready {
                note(name, failed, report);
            }
            return Ok(());
        }
        left = unready.into_iter().map(|(name, step, _)| (name, step)).collect();
    }
}

fn note(name: &str, failed: &tokio_postgres::Error, report: &Report) {
    let text = format!(
        "materialised view {name} is empty here, and cannot be read: {}. When that is mended: REFRESH MATERIALIZED VIEW {name}",
        crate::error::sql(failed)
    );
    report(Event::Note { text });
}
