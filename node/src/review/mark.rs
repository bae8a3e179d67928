//! Saying what was thought of lines.

use tokio_postgres::Client;

use super::{Error, Filter, Line, Status, list};

const MARK: &str = "UPDATE anabranch.conflict_history SET status = $2, reviewed_by = $3, reviewed_at = clock_timestamp(), \
    note = coalesce($4, note) WHERE conflict_id = ANY ($1::text[]::uuid[]) AND status <> 'replayed'";

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

/// New lines that pass the filter, for marking many at once.
///
/// # Errors
/// When the server refuses.
pub async fn unreviewed(client: &Client, filter: &Filter) -> Result<Vec<Line>, Error> {
    let filter = Filter {
        status: Some(Status::New.as_str().to_owned()),
        ..filter.clone()
    };
    list(client, &filter).await
}
