//! What can end an apply transaction, and whether it may simply run again.

use anabranch_proto::wire::Malformed;

use super::loss::Refusal;
use super::plan::Mismatch;
use super::session::TableError;
use super::{catalog, fence};
use crate::{journal, pg, resolve};

/// Why an apply transaction ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    #[error("{}", crate::error::sql(.0))]
    Sql(#[from] tokio_postgres::Error),
    #[error(transparent)]
    Fence(#[from] fence::Error),
    #[error(transparent)]
    Resolve(#[from] resolve::Error),
    #[error(transparent)]
    Malformed(#[from] Malformed),
    #[error(transparent)]
    Table(TableError),
    #[error(transparent)]
    Journal(#[from] journal::Error),
    #[error("a row changed while it was settled")]
    Raced,
    /// No error, and the row is not as it was to be.
    #[error(
        "a trigger or rule of {0} kept the row from being written without an error; make it let replicated rows \
         through (an ordinary trigger does not fire for them, one that is ENABLE ALWAYS or REPLICA does)"
    )]
    Unwritten(String),
    /// What the journal holds of a transaction cannot be read: what was passed over is not met again.
    #[error("a transaction in the journal: {0}")]
    Unreadable(Malformed),
    #[error("a commit that waits for peers holds the row: it is deleted once that commit is visible")]
    Held,
    #[error("a local commit that won a row is not visible yet")]
    Unseen,
    #[error("the journal has no space for what is applied")]
    Stalled,
    /// Looking for rows without their parents failed, and will again.
    #[error("looking for rows without their parents: {0}")]
    ForeignKeys(Box<Failure>),
    #[error(transparent)]
    Ddl(Box<super::ddl::Stuck>),
    /// Rows taken for absent were not all so, or one was refused: a COPY cannot tell which.
    #[error("copying rows: {}", crate::error::sql(.0))]
    Copy(tokio_postgres::Error),
    #[error("the server has lost transactions that were applied, as after a crash: they are applied again")]
    Forgotten,
    #[error("the row of {table} that was written at {stamp} is not in the journal yet")]
    NoImage {
        table: String,
        stamp: anabranch_proto::Stamp,
    },
}

impl From<TableError> for Failure {
    fn from(error: TableError) -> Self {
        match error {
            TableError::Catalog(catalog::Error::Sql(error)) => Self::Sql(error),
            error => Self::Table(error),
        }
    }
}

/// What to do about a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Recovery {
    /// Run again.
    Retry,
    /// Run again with statements that take each row as it is met, instead of COPY.
    WithoutCopy,
    /// Put aside with its origin, and run again later.
    Park,
    /// Run again with savepoints, and quarantine what is refused.
    Isolate,
    /// Run again, with an alarm: no row is at fault, so none is put aside for it, and only people can mend it.
    Stand,
    /// The daemon cannot go on.
    Halt,
}

impl Failure {
    pub(crate) fn recovery(&self) -> Recovery {
        match self {
            Self::Sql(error) | Self::Copy(error) if pg::is_transient(error) => Recovery::Retry,
            Self::Sql(error) | Self::Copy(error) if pg::is_of_row_security(error) => Recovery::Stand,
            Self::Copy(_) => Recovery::WithoutCopy,
            Self::Ddl(_) => Recovery::Park,
            Self::Raced
            | Self::Unseen
            | Self::Stalled
            | Self::NoImage { .. }
            | Self::Fence(_)
            | Self::ForeignKeys(_) => Recovery::Retry,
            Self::Sql(_) | Self::Malformed(_) | Self::Table(_) | Self::Held | Self::Unwritten(_) => {
                Recovery::Isolate
            }
            Self::Resolve(_) | Self::Journal(_) | Self::Unreadable(_) | Self::Forgotten => Recovery::Halt,
        }
    }

    pub(crate) fn is_transient(&self) -> bool {
        self.recovery() != Recovery::Isolate
    }

    /// Is it a unique violation, and of which index?
    pub(crate) fn unique_violation(&self) -> Option<String> {
        let Self::Sql(error) = self else { return None };
        let db = error.as_db_error()?;
        (*db.code() == tokio_postgres::error::SqlState::UNIQUE_VIOLATION)
            .then(|| db.constraint().unwrap_or_default().to_owned())
    }

    /// What the server would call what was seen before it was asked.
    fn sqlstate(&self) -> &'static str {
        match self {
            Self::Table(TableError::Catalog(catalog::Error::Missing(..))) => "42P01",
            Self::Table(TableError::Mismatch(Mismatch::NoColumn(..))) => "42703",
            // triggered_action_exception
            Self::Unwritten(_) => "09000",
            _ => "XX000",
        }
    }

    /// For the conflict log and the quarantine.
    pub(crate) fn refusal(&self) -> Refusal {
        let db = match self {
            Self::Sql(error) => error.as_db_error(),
            _ => None,
        };
        match db {
            Some(db) => Refusal {
                sqlstate: db.code().code().to_owned(),
                message: db.message().to_owned(),
                detail: db.detail().map(str::to_owned),
                context: db.where_().map(str::to_owned),
                constraint: db.constraint().map(str::to_owned),
                parents: None,
            },
            None => Refusal {
                sqlstate: self.sqlstate().to_owned(),
                message: self.to_string(),
                detail: None,
                context: None,
                constraint: None,
                parents: None,
            },
        }
    }
}
