//! Notices triggers and rules that fire for what is applied here, and may write: their writes are part of an apply transaction, so they
//! stay at this node alone, and nobody arbitrates them.
//!
//! In:   the catalog            Out: an alarm
//! Must never: call what cannot write a writer for good: a function that is not volatile cannot, and of one that shall write here
//!        alone people can say so
//! On crash: nothing to lose

use std::sync::Arc;
use std::time::Duration;

use tokio_postgres::Client;

use super::Error;
use crate::config::Config;
use crate::pg;
use crate::shared::Shared;

/// Between two looks.
const EVERY: Duration = Duration::from_secs(10);
/// So many are named.
const NAMED_MAX: usize = 5;
/// Name of the alarm.
const ALARM: &str = "triggers";

/// Those of published tables, and of the partitions and partitioned tables of such, as `trigger x on s.t`. What is PostgreSQL's own changes the
/// row at most. With the words `anabranch: local` in its comment somebody has said that what it writes is meant to stay.
const WRITERS: &str = "SELECT format('%s %I on %I.%I', f.kind, f.name, n.nspname, c.relname) \
    FROM (SELECT 'trigger' AS kind, t.tgname AS name, t.tgrelid AS relation, obj_description(t.oid, 'pg_trigger') AS said \
        FROM pg_trigger t JOIN pg_proc p ON p.oid = t.tgfoid \
        WHERE NOT t.tgisinternal AND t.tgenabled IN ('A', 'R') AND p.provolatile = 'v' \
            AND p.pronamespace <> 'pg_catalog'::regnamespace \
        UNION ALL SELECT 'rule', r.rulename, r.ev_class, obj_description(r.oid, 'pg_rewrite') \
        FROM pg_rewrite r WHERE r.ev_enabled IN ('A', 'R') AND r.ev_type <> '1') f \
    JOIN pg_class c ON c.oid = f.relation JOIN pg_namespace n ON n.oid = c.relnamespace \
    WHERE n.nspname <> 'anabranch' AND coalesce(f.said, '') NOT LIKE '%anabranch: local%' \
        AND EXISTS (SELECT FROM pg_publication_tables p JOIN pg_namespace pn ON pn.nspname = p.schemaname \
            JOIN pg_class pc ON pc.relnamespace = pn.oid AND pc.relname = p.tablename \
            WHERE p.pubname = $1 AND (pc.oid = c.oid \
                OR EXISTS (SELECT FROM pg_partition_ancestors(c.oid) a WHERE a.relid = pc.oid) \
                OR EXISTS (SELECT FROM pg_partition_ancestors(pc.oid) a WHERE a.relid = c.oid))) \
    ORDER BY 1";

/// Looks until the task is ended. Without a connection it tries again: the stages that need one notice by themselves.
pub(super) async fn run(config: Arc<Config>, shared: Arc<Shared>) {
    let mut client = None;
    loop {
        if let Err(error) = look(&config, &shared, &mut client).await {
            tracing::debug!(%error, "looking for triggers that fire for what is applied");
            client = None;
        }
        tokio::time::sleep(EVERY).await;
    }
}

async fn look(config: &Config, shared: &Shared, client: &mut Option<Client>) -> Result<(), Error> {
    let session = match client {
        Some(session) => session,
        None => client.insert(pg::connect(&config.postgres, "trigger watch").await?.0),
    };
    let rows = session.query(WRITERS, &[&config.postgres.publication]).await?;
    let found = rows.iter().map(|row| row.try_get(0));
    match text(&found.collect::<Result<Vec<String>, _>>()?) {
        Some(text) => shared.alarms.raise(ALARM, text),
        None => shared.alarms.clear(ALARM),
    }
    Ok(())
}

fn text(found: &[String]) -> Option<String> {
    if found.is_empty() {
        return None;
    }
    let mut named: Vec<&str> = found.iter().take(NAMED_MAX).map(String::as_str).collect();
    if found.len() > NAMED_MAX {
        named.push("others");
    }
    Some(format!(
        "these fire for what other nodes send (ENABLE ALWAYS or REPLICA): {}. What they write then stays at this node and may be written over \
         without a line. Make them ordinary (ENABLE TRIGGER, ENABLE RULE), which fire where the row is written and whose writes travel; \
         declare a function STABLE that writes nothing; or, if what it writes is meant to stay, put the words `anabranch: local` into the \
         comment of the trigger or rule",
        named.join(", ")
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn some_are_named_and_of_many_it_is_said_that_there_are_more() {
        let names =
            |count: usize| -> Vec<String> { (0..count).map(|n| format!("trigger t{n} on s.t")).collect() };
        assert_eq!(text(&[]), None);
        assert!(text(&names(5)).unwrap().contains("trigger t4 on s.t. What"));
        let many = text(&names(6)).unwrap();
        assert!(many.contains("trigger t4 on s.t, others. What"), "{many}");
    }
}
