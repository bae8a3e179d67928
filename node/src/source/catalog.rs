//! What the catalog says of a table that pgoutput describes, once that is of the same time.
//!
//! In:   a Relation message and its transaction      Out: the table's key, its generated columns and the names of its types
//! Invariants: what a commit that nobody sees yet has made is waited for; what it left alone is not, since the commit may
//!        wait for what is behind it in the stream; a column counts as generated only if it was so before the transaction, and as
//!        one of another name only if it was altered since
//! On crash: asked again
//! Not here: what is made of the answer (`relation`)

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use hashbrown::HashMap;
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Client, Row};

use super::pgoutput;
use crate::pg::{self, xid};
use crate::shared::lock;

/// Between two looks at the catalog for what a commit that is not visible yet has made.
const FIRST_LOOK: Duration = Duration::from_millis(2);
const LAST_LOOK: Duration = Duration::from_millis(100);
/// After this somebody is told.
const PATIENCE: Duration = Duration::from_secs(10);

/// The primary key's columns in the key's order; one row with NULL for a table without one, none for no
/// table. Only catalogs are read, so that a locked table does not stop the stream.
const KEY_QUERY: &str = "
    SELECT a.attname::text
    FROM pg_class c
    LEFT JOIN pg_index i ON i.indrelid = c.oid AND i.indisprimary
    LEFT JOIN LATERAL unnest(i.indkey::int2[]) WITH ORDINALITY AS k (attnum, place) ON k.place <= i.indnkeyatts
    LEFT JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = k.attnum
    WHERE c.oid = $1
    ORDER BY k.place";

/// The columns of a Relation message that are generated, and were not altered by its transaction `$3` or a later one: another may have
/// had that name when rows were written. Values that are sent for nothing do no harm; others that are not sent are lost. Only from version
/// 18 on can such columns be in a message.
const GENERATED_QUERY: &str = "
    SELECT a.attname::text FROM pg_attribute a
    WHERE a.attrelid = $1 AND a.attname = ANY ($2) AND a.attnum > 0 AND NOT a.attisdropped
        AND a.attgenerated <> '' AND age(a.xmin) > age($3::text::xid)
        AND current_setting('server_version_num')::int >= 180000";

/// The columns that a Relation message may have had that has those of `$2`, in their order: a column keeps its number whatever it is called.
/// Each with its place in the key, and whether the message's transaction `$3` or a later one has altered it. One that these dropped is among them,
/// under the name that the server gives to such. A transaction with a lower xid may have altered the table behind the message, too. Where there are as
/// many columns as the message has, and none was ever dropped, they are those of the message for certain: whatever has another name was renamed.
const COLUMNS_QUERY: &str = "
    SELECT a.attname::text, a.atttypid, k.place, age(a.xmin) <= age($3::text::xid) OR w.whole
    FROM pg_attribute a
    CROSS JOIN (
        SELECT count(*) = cardinality($2) AND NOT bool_or(n.attisdropped) AS whole
        FROM pg_attribute n WHERE n.attrelid = $1 AND n.attnum > 0
    ) AS w
    LEFT JOIN (
        SELECT u.attnum, u.place FROM pg_index i, unnest(i.indkey::int2[]) WITH ORDINALITY AS u (attnum, place)
        WHERE i.indrelid = $1 AND i.indisprimary AND u.place <= i.indnkeyatts
    ) AS k ON k.attnum = a.attnum
    WHERE a.attrelid = $1 AND a.attnum > 0 AND (a.attgenerated = '' OR a.attname = ANY ($2))
        AND (NOT a.attisdropped OR age(a.xmin) <= age($3::text::xid))
    ORDER BY a.attnum";

/// Type names, fit to be put into SQL. Of domains the type that they are over.
const TYPE_QUERY: &str = "
    WITH RECURSIVE base AS (
        SELECT oid AS typ, oid AS base FROM pg_type WHERE oid = ANY ($1)
        UNION ALL
        SELECT b.typ, t.typbasetype FROM base b JOIN pg_type t ON t.oid = b.base WHERE t.typtype = 'd'
    )
    SELECT t.oid, @TYPE_NAME@,
        (SELECT b.base FROM base b JOIN pg_type o ON o.oid = b.base
         WHERE b.typ = t.oid AND t.typtype = 'd' AND o.typtype <> 'd')
    FROM pg_type t JOIN pg_namespace n ON n.oid = t.typnamespace
    WHERE t.oid = ANY ($1)";

/// What the catalog says of a table's key today.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum CatalogKey {
    Columns(Vec<String>),
    None,
    Gone,
}

/// What the catalog told about a table.
pub(super) struct Answer {
    pub(super) key: CatalogKey,
    /// Those of the message's columns that are generated, for certain.
    pub(super) generated: Vec<String>,
    pub(super) type_names: HashMap<u32, String>,
    /// What domains are over.
    pub(super) base_types: HashMap<u32, u32>,
}

/// What an operator should know of a lookup that takes long.
pub(super) type Stuck = Arc<Mutex<Option<String>>>;

/// Asks the catalog for a table's key, and for the names of its types but those of `builtin` (user-defined
/// types may be renamed, so they are asked for each time).
///
/// A commit is in the stream before others see it: a moment, or as long as it waits for standbys. What the transaction itself has
/// made is waited for, and a key that it has made or renamed; `stuck` tells of it when that takes long.
pub(super) fn look_up(
    sql: Arc<Client>,
    (message, xid): (&pgoutput::Relation, u32),
    builtin: &HashMap<u32, String>,
    stuck: Stuck,
) -> impl Future<Output = Result<Answer, tokio_postgres::Error>> + use<> {
    let types = message.columns.iter().map(|column| column.type_oid);
    let types = types.filter(|oid| !builtin.contains_key(oid)).collect::<Vec<_>>();
    let message = message.clone();
    async move {
        let begun = Instant::now();
        let mut pause = FIRST_LOOK;
        loop {
            // First, so that what is visible is in the answer.
            let (commit, alters) = look_at(&sql, message.oid, xid).await?;
            let mut answer = ask(&sql, (&message, xid), &types).await?;
            if alters {
                answer.generated.clear();
            }
            if commit == Commit::Visible
                && let Some(key) = key_then(&sql, (&message, xid), &answer.key).await?
            {
                answer.key = key;
            }
            let is_whole = tells_key(&message, &answer.key, commit)
                && types.iter().all(|oid| answer.type_names.contains_key(oid));
            if is_whole || commit == Commit::Visible {
                return Ok(answer);
            }
            if begun.elapsed() > PATIENCE {
                *lock(&stuck) = Some(format!(
                    "the stream waits: transaction {xid} made the table {}.{}, its key or a type of it, and wrote it, and has not \
                     returned. If its COMMIT waits for this daemon (synchronous_standby_names), end that wait: pg_cancel_backend() of \
                     the session whose wait_event is SyncRep; the commit is done, and is replicated then",
                    message.schema, message.name
                ));
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LAST_LOOK);
        }
    }
}

/// How far the transaction is that wrote what is being decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Commit {
    Visible,
    /// The catalog shows what was before it.
    Hidden,
    /// And it has removed the index of the primary key that the catalog shows, or built it anew.
    HiddenWithKey,
}

/// A commit that is not visible has its locks still. True with one that may have altered the table: the catalog shows its columns as
/// they were.
async fn look_at(sql: &Client, oid: u32, xid: u32) -> Result<(Commit, bool), tokio_postgres::Error> {
    let query = format!(
        "SELECT commit.visible, NOT commit.visible AND EXISTS (
            SELECT FROM pg_index i
            JOIN pg_locks key ON key.relation = i.indexrelid AND key.mode = 'AccessExclusiveLock' AND key.granted
            JOIN pg_locks own USING (virtualtransaction)
            WHERE i.indrelid = $2 AND i.indisprimary AND own.transactionid = $1::text::xid
        ), NOT commit.visible AND EXISTS (
            SELECT FROM pg_locks altered
            JOIN pg_locks own USING (virtualtransaction)
            WHERE altered.relation = $2 AND altered.mode = 'AccessExclusiveLock' AND altered.granted
                AND own.transactionid = $1::text::xid
        ) FROM (SELECT {} AS visible FROM {}) AS commit",
        xid::visible("$1"),
        xid::SNAPSHOT
    );
    let params: [(&(dyn ToSql + Sync), Type); 2] = [(&i64::from(xid), Type::INT8), (&oid, Type::OID)];
    let rows = sql.query_typed(&query, &params).await?;
    let Some(row) = rows.first() else {
        return Ok((Commit::Visible, false));
    };
    let commit = match (row.try_get(0)?, row.try_get(1)?) {
        (true, _) => Commit::Visible,
        (false, false) => Commit::Hidden,
        (false, true) => Commit::HiddenWithKey,
    };
    Ok((commit, row.try_get(2)?))
}

/// What the catalog says now.
async fn ask(
    sql: &Client,
    (message, xid): (&pgoutput::Relation, u32),
    types: &Vec<u32>,
) -> Result<Answer, tokio_postgres::Error> {
    let rows = sql.query_typed(KEY_QUERY, &[(&message.oid, Type::OID)]).await?;
    let names = rows.iter().map(|row| row.try_get::<_, Option<String>>(0));
    let names = names.collect::<Result<Option<Vec<_>>, _>>()?;
    let key = match names {
        Some(names) if names.is_empty() => CatalogKey::Gone,
        Some(names) => CatalogKey::Columns(names),
        None => CatalogKey::None,
    };
    let rows = of_columns(sql, GENERATED_QUERY, (message, xid)).await?;
    let generated = rows.iter().map(|row| row.try_get::<_, String>(0));
    let generated = generated.collect::<Result<Vec<_>, _>>()?;
    let (mut type_names, mut base_types) = (HashMap::new(), HashMap::new());
    if !types.is_empty() {
        let query = TYPE_QUERY.replace("@TYPE_NAME@", pg::TYPE_NAME);
        for row in sql.query_typed(&query, &[(types, Type::OID_ARRAY)]).await? {
            let oid: u32 = row.try_get(0)?;
            type_names.insert(oid, row.try_get(1)?);
            if let Some(base) = row.try_get::<_, Option<u32>>(2)? {
                base_types.insert(oid, base);
            }
        }
    }
    Ok(Answer {
        key,
        generated,
        type_names,
        base_types,
    })
}

/// Asks something of the columns of a message's table, the message being of the transaction `xid`.
async fn of_columns(
    sql: &Client,
    query: &str,
    (message, xid): (&pgoutput::Relation, u32),
) -> Result<Vec<Row>, tokio_postgres::Error> {
    let columns: Vec<&str> = message.columns.iter().map(|column| &*column.name).collect();
    let xid = i64::from(xid);
    let params: [(&(dyn ToSql + Sync), Type); 3] = [
        (&message.oid, Type::OID),
        (&columns, Type::TEXT_ARRAY),
        (&xid, Type::INT8),
    ];
    sql.query_typed(query, &params).await
}

/// A column as it is now.
struct ColumnNow {
    name: String,
    type_oid: u32,
    /// In the key.
    place: Option<i64>,
    /// Altered by the message's transaction or a later one, or it may be, and is that column of the message in any case.
    is_altered: bool,
}

/// The key under its names of the message's time, where columns of it were renamed since and the message does not mark them.
async fn key_then(
    sql: &Client,
    (message, xid): (&pgoutput::Relation, u32),
    now: &CatalogKey,
) -> Result<Option<CatalogKey>, tokio_postgres::Error> {
    let CatalogKey::Columns(names) = now else {
        return Ok(None);
    };
    if !marked(message).is_empty() || places(message, names).is_ok() {
        return Ok(None);
    }
    let rows = of_columns(sql, COLUMNS_QUERY, (message, xid)).await?;
    let columns = rows.iter().map(|row| -> Result<_, tokio_postgres::Error> {
        Ok(ColumnNow {
            name: row.try_get(0)?,
            type_oid: row.try_get(1)?,
            place: row.try_get(2)?,
            is_altered: row.try_get(3)?,
        })
    });
    let columns = columns.collect::<Result<Vec<_>, _>>()?;
    // The key may have gone, or another one have come, since it was asked for.
    let key = names_then(message, &columns).filter(|key| key.len() == names.len());
    Ok(key.map(CatalogKey::Columns))
}

/// What the key's columns were called in the message, in the key's order. None where the columns of now are not those of the message, but for
/// names of the key and for what was added behind them.
fn names_then(message: &pgoutput::Relation, now: &[ColumnNow]) -> Option<Vec<String>> {
    let mut key = Vec::new();
    let mut now = now.iter();
    for column in &message.columns {
        let is = now.next()?;
        let is_renamed = is.place.is_some() && is.is_altered && is.type_oid == column.type_oid;
        if is.name != column.name && !is_renamed {
            return None;
        }
        if let Some(place) = is.place {
            key.push((place, column.name.clone()));
        }
    }
    if now.any(|added| !added.is_altered || added.place.is_some()) {
        return None;
    }
    key.sort_unstable();
    Some(key.into_iter().map(|(_, name)| name).collect())
}

/// The places of the columns that the message marks as the key of its time: those of the default identity, and not in the
/// key's order. Empty where it marks none.
pub(super) fn marked(message: &pgoutput::Relation) -> Vec<u16> {
    if message.identity != b'd' {
        return Vec::new();
    }
    let places = message.columns.iter().zip(0u16..);
    places
        .filter(|(column, _)| column.identity)
        .map(|(_, at)| at)
        .collect()
}

/// The places of these columns in the message, or the first that it has not.
pub(super) fn places<'a>(message: &pgoutput::Relation, names: &'a [String]) -> Result<Vec<u16>, &'a String> {
    let place = |name: &'a String| {
        let mut columns = message.columns.iter().zip(0u16..);
        columns
            .find(|(column, _)| column.name == *name)
            .map(|(_, at)| at)
            .ok_or(name)
    };
    names.iter().map(place).collect()
}

/// Does the catalog, asked after it was seen how far the `commit` is, tell the key of the message's time?
fn tells_key(message: &pgoutput::Relation, catalog: &CatalogKey, commit: Commit) -> bool {
    let marked = marked(message);
    match catalog {
        CatalogKey::Gone => false,
        // One column has no order.
        _ if marked.len() == 1 => true,
        CatalogKey::None => false,
        CatalogKey::Columns(_) if commit == Commit::HiddenWithKey => false,
        CatalogKey::Columns(names) => {
            places(message, names).is_ok_and(|key| marked.is_empty() || same_set(&key, &marked))
        }
    }
}

pub(super) fn same_set(a: &[u16], b: &[u16]) -> bool {
    a.len() == b.len() && a.iter().all(|at| b.contains(at))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::source) fn message(identity: u8, columns: &[(&str, bool)]) -> pgoutput::Relation {
        let columns = columns
            .iter()
            .map(|&(name, identity)| pgoutput::RelationColumn {
                identity,
                name: name.to_owned(),
                type_oid: 23,
                type_mod: -1,
            })
            .collect();
        pgoutput::Relation {
            oid: 1,
            schema: "s".to_owned(),
            name: "t".to_owned(),
            identity,
            columns,
        }
    }

    pub(in crate::source) fn columns(names: &[&str]) -> CatalogKey {
        CatalogKey::Columns(names.iter().map(|&name| name.to_owned()).collect())
    }

    #[test]
    fn a_key_that_was_renamed_since_is_known_by_its_place_and_nothing_else_is() {
        let full = message(b'f', &[("v", true), ("b", true), ("a", true)]);
        let then = |columns: &[(&str, u32, Option<i64>, bool)]| {
            let columns: Vec<ColumnNow> = columns
                .iter()
                .map(|&(name, type_oid, place, is_altered)| ColumnNow {
                    name: name.to_owned(),
                    type_oid,
                    place,
                    is_altered,
                })
                .collect();
            names_then(&full, &columns).map(|names| names.join(" "))
        };
        let (v, a) = (("v", 23, None, false), ("a", 23, Some(1), false));
        let renamed = ("now", 23, Some(2), true);
        assert_eq!(then(&[v, renamed, a]).as_deref(), Some("a b"));
        assert_eq!(
            then(&[v, renamed, a, ("new", 25, None, true)]).as_deref(),
            Some("a b")
        );
        for other in [
            // Called so all the time: the message does not have it.
            &[v, ("now", 23, Some(2), false), a][..],
            &[v, ("now", 20, Some(2), true), a],
            // Something was dropped, or is no part of the message.
            &[("........pg.dropped.1........", 0, None, true), renamed, a],
            &[renamed, a, ("new", 23, None, true)],
            &[v, renamed, a, ("more", 23, None, false)],
            &[v, renamed],
            // The key has a column more, or others were renamed, too.
            &[v, renamed, a, ("new", 23, Some(3), true)],
            &[("w", 23, None, true), renamed, a],
        ] {
            assert_eq!(then(other), None);
        }
    }

    #[test]
    fn a_key_that_only_a_hidden_commit_knows_is_not_told_by_the_catalog() {
        let full = message(b'f', &[("a", true), ("b", true)]);
        for (now, commit, expected) in [
            (columns(&["a"]), Commit::Hidden, true),
            // Renamed, made, replaced.
            (columns(&["old"]), Commit::Hidden, false),
            (CatalogKey::None, Commit::Hidden, false),
            (CatalogKey::Gone, Commit::Hidden, false),
            (columns(&["a"]), Commit::HiddenWithKey, false),
        ] {
            assert_eq!(tells_key(&full, &now, commit), expected, "{now:?} {commit:?}");
        }
        // The message itself tells all but the order.
        let one = message(b'd', &[("a", true), ("b", false)]);
        assert!(tells_key(&one, &columns(&["old"]), Commit::HiddenWithKey));
        let two = message(b'd', &[("a", true), ("b", true)]);
        assert!(tells_key(&two, &columns(&["b", "a"]), Commit::Hidden));
        assert!(!tells_key(&two, &columns(&["old", "a"]), Commit::Hidden));
    }
}
