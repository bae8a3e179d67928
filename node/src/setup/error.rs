//! What can go wrong while a database is set up or examined.

/// Failure of `init`, `doctor`, `grants` or `remove`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No connection, or a connection string that cannot be read.
    #[error("{}", chain(.0))]
    Connect(#[from] crate::pg::Error),
    /// A catalog query failed.
    #[error("cannot read {what}: {}", describe(source))]
    Read {
        /// What was read.
        what: &'static str,
        /// The server's answer.
        source: tokio_postgres::Error,
    },
    /// A statement of a plan failed; what came before it in its stage was rolled back.
    #[error("cannot {what}: {}; statement: {sql}", describe(source))]
    Step {
        /// What the statement was for.
        what: String,
        /// The statement.
        sql: String,
        /// The server's answer.
        source: tokio_postgres::Error,
    },
    /// A pattern of `postgres.tables`.
    #[error(transparent)]
    Pattern(#[from] super::pattern::BadPattern),
    /// Something must be put right first.
    #[error("{0}")]
    Refused(String),
}

/// A PostgreSQL error as `message (SQLSTATE)`, with detail and hint; the library's own text hides all of it.
#[must_use]
pub fn describe(error: &tokio_postgres::Error) -> String {
    if let Some(db) = error.as_db_error() {
        let mut text = format!("{} ({})", db.message(), db.code().code());
        for more in [db.detail(), db.hint()].into_iter().flatten() {
            text.push_str("; ");
            text.push_str(more);
        }
        return text;
    }
    chain(error)
}

pub use crate::error::chain;
