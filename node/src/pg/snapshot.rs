//! Snapshots that one session exports and others import.
//!
//! In:   the name of an exported snapshot            Out: a transaction that sees what it shows; what that is
//! Must never: take another snapshot for the one that is meant: a server gives its names again once it has been started again
//! Not here: whose snapshot it is, and who keeps it (`crate::donor`, `crate::join`)

use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use crate::setup::sql::literal;

/// Why there is no transaction on a snapshot.
pub(crate) enum Unusable {
    /// No session has it any more; for people.
    Gone(String),
    /// A statement failed.
    Failed(tokio_postgres::Error),
}

/// Begins a transaction that sees what an exported snapshot shows. Returns a digest of what that is, which no two states of a
/// database share; `sees` is what it must be, empty where nobody has looked yet.
pub(crate) async fn begin(client: &Client, name: &str, sees: &str) -> Result<String, Unusable> {
    const SEES: &str = "SELECT encode(sha256(convert_to(pg_current_snapshot()::text, 'UTF8')), 'hex')";
    let begin = format!(
        "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SET TRANSACTION SNAPSHOT {}",
        literal(name)
    );
    client
        .batch_execute(&begin)
        .await
        .map_err(|error| match error.code() {
            // The name is unknown, before 17 and since; whoever exported it ends at this moment.
            Some(
                &SqlState::INVALID_PARAMETER_VALUE
                | &SqlState::UNDEFINED_OBJECT
                | &SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE,
            ) => Unusable::Gone(crate::error::sql(&error).to_string()),
            _ => Unusable::Failed(error),
        })?;
    let row = client.query_one(SEES, &[]).await.map_err(Unusable::Failed)?;
    let seen: String = row.try_get(0).map_err(Unusable::Failed)?;
    if sees.is_empty() || seen == sees {
        return Ok(seen);
    }
    Err(Unusable::Gone(format!(
        "the server has given the name {name} to another snapshot since"
    )))
}

/// Exports what this session's transaction sees. Returns the name, which is good while the transaction is open.
pub(crate) async fn export(client: &Client) -> Result<String, tokio_postgres::Error> {
    let row = client.query_one("SELECT pg_export_snapshot()", &[]).await?;
    row.try_get(0)
}
