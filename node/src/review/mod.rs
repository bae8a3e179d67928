//! The conflict log for people: reading it, counting in it, marking its lines, writing lost values again, learning from it.
//!
//! In:   an SQL session, of the daemon's role or of a reviewer's            Out: [`Line`]s, counts, marks
//! Holds: nothing
//! Invariants: 1. values are passed on as the text that the server made of them: no number loses a digit. 2. a lost
//!        value is written again in one transaction, and only over the row that the resolution left, unless forced.
//! Not here: writing the log (`crate::apply`), its tables (`crate::setup::conflict_log`)

pub mod cluster;
mod explain;
mod filter;
mod line;
mod mark;
mod replay;
mod stats;
mod suggest;
mod unread;

use futures_util::StreamExt;
use tokio_postgres::Client;

pub use explain::explain;
pub use filter::{Filter, Place, keys_of, partitions};
pub use line::{Columns, Line, Status, cell, visible, visible_but};
pub use mark::{mark, mark_new};
pub use replay::{Replay, Replayed, replay};
pub use stats::{Count, Stats, stats, storm_count};
pub use suggest::{Deletes, Differing, Outcome, Suggestion, suggest};
pub use unread::Unread;
pub(crate) use unread::{as_jsonb, json_nulls, or_json_null};

use crate::pg;

/// What was asked for cannot be done.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No session.
    #[error("{}", crate::error::chain(.0))]
    Connect(#[from] pg::Error),
    /// The server refused.
    #[error("the conflict log: {}", crate::error::sql(.0))]
    Sql(#[from] tokio_postgres::Error),
    /// A line that this release cannot read.
    #[error("the conflict log holds a line that cannot be read: {0}")]
    Unreadable(#[from] serde_json::Error),
    /// No such line.
    #[error("no conflict has the id {0} here")]
    NotFound(String),
    /// Several lines.
    #[error("more than one conflict begins with {0}; give more of it")]
    Ambiguous(String),
    /// Text that is no id.
    #[error("`{0}` is not a conflict id; see `anabranch conflicts list`")]
    NotAnId(String),
    /// No session in time.
    #[error("too many others wait for the database: try again")]
    Busy,
    /// Not done, and why.
    #[error("{0}")]
    Refused(String),
}

/// Lines that pass `filter`, the newest first.
///
/// # Errors
/// When the server refuses.
pub async fn list(client: &Client, filter: &Filter) -> Result<Vec<Line>, Error> {
    some(client, filter, "ORDER BY h.detected_at DESC, h.conflict_id").await
}

/// Lines that pass `filter`, in this order.
async fn some(client: &Client, filter: &Filter, order: &str) -> Result<Vec<Line>, Error> {
    let query = filter.query();
    let (lines, condition, limit) = (filter::LINES, query.of_lines(), filter.limit.max(1));
    let sql = match filter.is_of_few() {
        true => format!(
            "WITH h AS MATERIALIZED (SELECT * FROM {lines} WHERE {condition}) SELECT to_jsonb(h)::text FROM h {order} LIMIT {limit}"
        ),
        false => format!("SELECT to_jsonb(h)::text FROM {lines} WHERE {condition} {order} LIMIT {limit}"),
    };
    let rows = client.query(&sql, &query.parameters()).await?;
    rows.iter()
        .map(|row| Ok(serde_json::from_str(row.try_get(0)?)?))
        .collect()
}

/// Hands every line that passes `filter` to `visit`, the oldest first, however many there are (`filter.limit` does not count).
///
/// # Errors
/// When the server refuses, and what `visit` returns.
pub async fn each<E: From<Error>>(
    client: &Client,
    filter: &Filter,
    mut visit: impl FnMut(Line) -> Result<(), E>,
) -> Result<(), E> {
    let query = filter.query();
    let sql = format!(
        "SELECT to_jsonb(h)::text FROM {} WHERE {} ORDER BY h.detected_at, h.conflict_id",
        filter::LINES,
        query.of_lines()
    );
    let rows = client
        .query_raw(&sql, query.parameters())
        .await
        .map_err(Error::from)?;
    let mut rows = std::pin::pin!(rows);
    while let Some(row) = rows.next().await {
        let row = row.map_err(Error::from)?;
        let text: &str = row.try_get(0).map_err(Error::from)?;
        visit(serde_json::from_str(text).map_err(Error::from)?)?;
    }
    Ok(())
}

/// Ids of all lines that pass `filter` (`filter.limit` does not count), with their time in microseconds since the Unix epoch.
///
/// # Errors
/// When the server refuses.
pub async fn ids(client: &Client, filter: &Filter) -> Result<Vec<(String, i64)>, Error> {
    let query = filter.query();
    let sql = format!(
        "SELECT h.conflict_id::text, (extract(epoch FROM h.detected_at) * 1000000)::int8 FROM {} WHERE {}",
        filter::LINES,
        query.of_lines()
    );
    let rows = client.query(&sql, &query.parameters()).await?;
    rows.iter()
        .map(|row| Ok((row.try_get(0)?, row.try_get(1)?)))
        .collect()
}

/// The lines of these ids, the oldest first.
///
/// # Errors
/// When the server refuses.
pub async fn these(client: &Client, ids: &[String]) -> Result<Vec<Line>, Error> {
    let sql = format!(
        "SELECT to_jsonb(h)::text FROM {} WHERE h.conflict_id = ANY ($1::text[]::uuid[]) ORDER BY h.detected_at, h.conflict_id",
        filter::LINES
    );
    let rows = client.query(&sql, &[&ids]).await?;
    rows.iter()
        .map(|row| Ok(serde_json::from_str(row.try_get(0)?)?))
        .collect()
}

/// The line whose id is or begins with `id`.
///
/// # Errors
/// When there is none or more than one.
pub async fn find(client: &Client, id: &str) -> Result<Line, Error> {
    if id.is_empty() || !id.chars().all(|c| c.is_ascii_hexdigit() || c == '-') {
        return Err(Error::NotAnId(id.to_owned()));
    }
    let filter = Filter {
        id: Some(id.to_ascii_lowercase()),
        limit: 2,
        ..Filter::default()
    };
    // In no order: of a short beginning that many ids have, two are enough to be told so.
    let mut lines = some(client, &filter, "").await?.into_iter();
    match (lines.next(), lines.next()) {
        (Some(line), None) => Ok(line),
        (None, _) => Err(Error::NotFound(id.to_owned())),
        _ => Err(Error::Ambiguous(id.to_owned())),
    }
}

/// How many other rows of the losing transaction lost, too.
///
/// # Errors
/// When the server refuses.
pub async fn group(client: &Client, line: &Line) -> Result<Vec<Line>, Error> {
    let Some(group) = &line.transaction_group else {
        return Ok(Vec::new());
    };
    let filter = Filter {
        group: Some(group.clone()),
        limit: 100,
        ..Filter::default()
    };
    let mut lines = list(client, &filter).await?;
    lines.retain(|other| other.conflict_id != line.conflict_id);
    Ok(lines)
}
