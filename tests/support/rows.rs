//! Are the rows of all nodes equal, and if not, where do they differ.

use std::collections::{BTreeMap, BTreeSet};

use crate::session::Session;

/// Text forms must not depend on the server they come from.
const PINNED: &str = "set datestyle = 'ISO, YMD'; set timezone = 'UTC'; set intervalstyle = 'postgres'; \
     set extra_float_digits = 1; set bytea_output = 'hex'; set search_path = pg_catalog";

/// Every table of the applications' schemas, partitioned ones as a whole. What a replication system keeps is each node's own.
const TABLES: &str = "select format('%I.%I', n.nspname, c.relname) from pg_class c \
     join pg_namespace n on n.oid = c.relnamespace \
     where c.relkind in ('r', 'p') and not c.relispartition and c.relpersistence = 'p' \
     and n.nspname not in ('anabranch', 'pglogical', 'pg_catalog', 'information_schema') order by 1";

/// More rows than this are compared by digest only.
const SHOWN_ROWS_MAX: i64 = 200_000;

/// table -> (row count, digest), the digest independent of the rows' and columns' order.
async fn digests(session: &Session) -> BTreeMap<String, String> {
    session.run(PINNED).await;
    let mut digests = BTreeMap::new();
    for table in session.column(TABLES).await {
        let row = row_text(session, &table).await;
        let digest = session
            .value(&format!(
                "select count(*) || ' rows, digest ' || coalesce(sum(('x' || left(md5({row}), 15))::bit(60)::bigint::numeric), 0) \
                 from {table} t"
            ))
            .await;
        digests.insert(table, digest);
    }
    digests
}

/// SQL for the text of a row `t` of the table, the same in whatever order its columns are. Not all that `json` takes is taken by `jsonb`.
async fn row_text(session: &Session, table: &str) -> String {
    let of_columns = format!(
        "select case when bool_or(format_type(atttypid, null) in ('json', 'json[]')) \
         then format('row(%s)::text', string_agg(format('t.%I', attname), ', ' order by attname)) \
         else 'to_jsonb(t.*)::text' end \
         from pg_attribute where attrelid = '{table}'::regclass and attnum > 0 and not attisdropped"
    );
    session.value(&of_columns).await
}

/// `Ok` when every table holds the same rows on every session's server; otherwise a readable difference.
pub async fn equal(sessions: &[Session]) -> Result<(), String> {
    let Some((first, others)) = sessions.split_first() else {
        return Ok(());
    };
    let expected = digests(first).await;
    for (at, other) in others.iter().enumerate() {
        let found = digests(other).await;
        for table in expected.keys().chain(found.keys()).collect::<BTreeSet<_>>() {
            if expected.get(table) != found.get(table) {
                return Err(difference(
                    table,
                    first,
                    other,
                    at + 1,
                    [expected.get(table), found.get(table)],
                )
                .await);
            }
        }
    }
    Ok(())
}

async fn difference(
    table: &str,
    a: &Session,
    b: &Session,
    other: usize,
    found: [Option<&String>; 2],
) -> String {
    let mut text = format!(
        "{table} differs between the first server and number {}: {found:?}",
        other + 1
    );
    let count = format!("select count(*) from {table}");
    if found.contains(&None) || a.number(&count).await + b.number(&count).await > SHOWN_ROWS_MAX {
        return text;
    }
    let all = format!("select {} from {table} t", row_text(a, table).await);
    let (a, b) = (a.column(&all).await, b.column(&all).await);
    let (a, b): (BTreeSet<_>, BTreeSet<_>) = (a.into_iter().collect(), b.into_iter().collect());
    for row in a.difference(&b).take(8) {
        text.push_str(&format!(
            "\n    only on the first: {}",
            row.chars().take(400).collect::<String>()
        ));
    }
    for row in b.difference(&a).take(8) {
        text.push_str(&format!(
            "\n    only on number {}: {}",
            other + 1,
            row.chars().take(400).collect::<String>()
        ));
    }
    text
}
