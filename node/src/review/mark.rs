//! Saying what was thought of lines.

use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Row};

use super::{Error, Filter, Status, filter};

/// Lines that are marked at once.
const PORTION: u32 = 10_000;
/// The time of the last line; none while there is none.
const NEWEST: &str = "SELECT n.at::text FROM (SELECT max(detected_at) AS at FROM anabranch.conflict_history) AS n WHERE n.at IS NOT NULL";

const MARK: &str = "UPDATE anabranch.conflict_history SET status = $2, reviewed_by = $3, reviewed_at = clock_timestamp(), \
    note = coalesce($4, note) WHERE conflict_id = ANY ($1::text[]::uuid[]) AND status <> 'replayed'";

const MARK_NEW: &str = "UPDATE anabranch.conflict_history SET status = $2, reviewed_by = $3, reviewed_at = clock_timestamp(), \
    note = coalesce($4, note) WHERE conflict_id = ANY ($1::text[]::uuid[]) AND status = 'new' RETURNING conflict_id::text";

/// Marks the lines `ids`; a line whose values were replayed stays so. How many were marked.
///
/// # Errors
/// When the server refuses.
pub async fn mark(
    client: &Client,
    ids: &[String],
    status: Status,
    who: &str,
    note: Option<&str>,
) -> Result<u64, Error> {
    Ok(client
        .execute(MARK, &[&ids, &status.as_str(), &who, &note])
        .await?)
}

/// Marks every new line that passes the filter, however many there are (`filter.limit` does not count). What is detected later than the last
/// line that is there now is left: nobody has seen it. Hands the ids to `marked`, a portion at a time; when it ends early, what was handed over
/// is marked.
///
/// # Errors
/// When the server refuses, and what `marked` returns.
pub async fn mark_new<E: From<Error>>(
    client: &Client,
    filter: &Filter,
    (status, who, note): (Status, &str, Option<&str>),
    mut marked: impl FnMut(Vec<String>) -> Result<(), E>,
) -> Result<(), E> {
    let sql = async |sql: &str, parameters: &[&(dyn ToSql + Sync)]| {
        client.query(sql, parameters).await.map_err(Error::from)
    };
    let texts = |rows: Vec<Row>| -> Result<Vec<String>, Error> {
        rows.iter().map(|row| Ok(row.try_get(0)?)).collect()
    };
    let newest = texts(sql(NEWEST, &[]).await?)?;
    let Some(newest) = newest.into_iter().next() else {
        return Ok(());
    };
    let filter = Filter {
        status: None,
        ..filter.clone()
    };
    let query = filter.query();
    let mut parameters = query.parameters();
    parameters.push(&newest);
    let portion = format!(
        "SELECT h.conflict_id::text FROM {} WHERE {} AND h.status = 'new' AND h.detected_at <= ${}::text::timestamptz \
         ORDER BY h.detected_at LIMIT {PORTION}",
        filter::LINES,
        query.of_lines(),
        parameters.len()
    );
    loop {
        let ids = texts(sql(&portion, &parameters).await?)?;
        if ids.is_empty() {
            return Ok(());
        }
        // Those that somebody else marks meanwhile are theirs.
        let ids = texts(sql(MARK_NEW, &[&ids, &status.as_str(), &who, &note]).await?)?;
        marked(ids)?;
    }
}
