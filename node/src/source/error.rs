//! What stops decoding, and what the operator can do about it.

use std::fmt;
use std::io;
use std::path::PathBuf;

use anabranch_proto::Lsn;
use anabranch_proto::wire::Malformed;
use tokio_postgres::error::SqlState;

use crate::pg;

/// An `ErrorResponse` of the replication connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerError {
    /// SQLSTATE.
    pub code: String,
    /// The primary message, in the server's language.
    pub message: String,
    /// The detail, or empty.
    pub detail: String,
    /// The hint, or empty.
    pub hint: String,
    /// The server crashes, which it says with the SQLSTATE of whatever it could not do.
    pub is_panic: bool,
}

impl ServerError {
    /// Reads the body of an `ErrorResponse`: fields of a type byte and a C string, ended by a zero.
    pub(super) fn parse(mut body: &[u8]) -> Self {
        let mut error = Self {
            code: String::new(),
            message: String::new(),
            detail: String::new(),
            hint: String::new(),
            is_panic: false,
        };
        while let Some((&kind, rest)) = body.split_first()
            && kind != 0
            && let Some(end) = rest.iter().position(|&byte| byte == 0)
        {
            let (text, tail) = rest.split_at(end);
            let text = || String::from_utf8_lossy(text).into_owned();
            match kind {
                b'C' => error.code = text(),
                b'M' => error.message = text(),
                b'D' => error.detail = text(),
                b'H' => error.hint = text(),
                // The severity, in no language but its own.
                b'V' => error.is_panic = text() == "PANIC",
                _ => {}
            }
            body = tail.get(1..).unwrap_or_default();
        }
        error
    }

    pub(super) fn is(&self, code: &str) -> bool {
        self.code == code
    }
}

impl fmt::Display for ServerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (SQLSTATE {})", self.message, self.code)?;
        if !self.detail.is_empty() {
            write!(f, "; {}", self.detail)?;
        }
        if !self.hint.is_empty() {
            write!(f, "; hint: {}", self.hint)?;
        }
        Ok(())
    }
}

impl std::error::Error for ServerError {}

/// Why there is no next event.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The connection string or its files.
    #[error(transparent)]
    Pg(#[from] pg::Error),
    /// No TCP or Unix connection, or TLS failed.
    #[error("cannot reach PostgreSQL at {host}")]
    Reach {
        /// `host:port`.
        host: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// `sslmode` wants TLS and the server has none.
    #[error("{host} does not speak TLS; enable ssl on the server or use sslmode=prefer")]
    NoTls {
        /// `host:port`.
        host: String,
    },
    /// The server wants a password and none is configured.
    #[error(
        "the server wants a password for user {user} and there is none{}; set ANABRANCH_POSTGRES_PASSWORD or \
         postgres.password_file",
        pg::of_unread(unread.as_deref())
    )]
    NoPassword {
        /// The role.
        user: String,
        /// The password file that is ignored.
        unread: Option<PathBuf>,
    },
    /// The server does not know the role or the password.
    #[error("the server refused to log in user {user}; check the password and pg_hba.conf")]
    Login {
        /// The role.
        user: String,
        /// What it said.
        #[source]
        source: ServerError,
    },
    /// The server's login method is not implemented, or it broke the rules of one that is.
    #[error("cannot log in: {problem}")]
    Authentication {
        /// What is wrong.
        problem: String,
    },
    /// The role may not replicate.
    #[error(
        "user {user} may not replicate; run: ALTER ROLE {} REPLICATION",
        crate::setup::sql::ident(.user)
    )]
    NotReplicationRole {
        /// The role.
        user: String,
        /// What it said.
        #[source]
        source: ServerError,
    },
    /// The server is too old.
    #[error("PostgreSQL {version} is too old; 15 or later is needed")]
    TooOld {
        /// `server_version`.
        version: String,
    },
    /// `wal_level` is too low.
    #[error("the server does not log enough to decode; set wal_level = logical and restart it")]
    WalLevel(#[source] ServerError),
    /// No such slot.
    #[error(
        "replication slot {slot} does not exist; run `anabranch init` if this node is new, or `anabranch heal` if it had one"
    )]
    SlotMissing {
        /// The slot.
        slot: String,
    },
    /// Another session reads the slot.
    #[error(
        "replication slot {slot} is in use; stop the other daemon, or wait until the server notices that its \
         connection is gone (wal_sender_timeout)"
    )]
    SlotInUse {
        /// The slot.
        slot: String,
        /// What the server said: it names the process.
        #[source]
        source: ServerError,
    },
    /// The server has removed WAL that the slot needs.
    #[error(
        "replication slot {slot} has lost WAL (max_slot_wal_keep_size, idle_replication_slot_timeout); run `anabranch \
         heal`"
    )]
    SlotLost {
        /// The slot.
        slot: String,
    },
    /// The slot is another kind of slot.
    #[error("replication slot {slot} {problem}; choose another name in postgres.slot")]
    SlotUnfit {
        /// The slot.
        slot: String,
        /// What does not fit.
        problem: String,
    },
    /// A slot of this name exists already.
    #[error("replication slot {slot} exists already")]
    SlotExists {
        /// The slot.
        slot: String,
    },
    /// The place to start from is in the server's future: the server was restored from a backup.
    #[error(
        "decoding should start at {start} but the server has only written {written}: it is not the server that this daemon \
         knew, or was restored from an older copy; see docs/errors/the-server-went-back.md"
    )]
    StartBeyondWal {
        /// Where to start.
        start: Lsn,
        /// How far the server's WAL reaches.
        written: Lsn,
    },
    /// No such publication, at the place in the WAL that is being decoded.
    #[error(
        "publication {publication} did not exist at the place being decoded: what was written then is not in the stream, and \
         does not come into it when the publication is made again. Run `anabranch init`, which makes it, then `anabranch heal`, \
         which sends what was written (docs/errors/the-publication-was-changed.md)"
    )]
    PublicationMissing {
        /// The publication.
        publication: String,
        /// What the server said.
        #[source]
        source: ServerError,
    },
    /// A column's type has no binary output, deep inside (as an element of an array, say).
    #[error(
        "a published column has a type without binary output, maybe deep inside: give the type a send function, or take the table \
         out (`anabranch tables remove`), then run `anabranch heal`; see docs/errors/a-table-cannot-be-decoded.md"
    )]
    NoBinaryOutput(#[source] ServerError),
    /// Any other error of the server.
    #[error("the server ended {during}")]
    Server {
        /// What was being done.
        during: &'static str,
        /// What the server said.
        #[source]
        source: ServerError,
    },
    /// The server went away.
    #[error("lost the replication connection")]
    Lost(#[source] io::Error),
    /// The server closed the stream.
    #[error("the server closed the replication connection")]
    Closed,
    /// Bytes that are not the protocol.
    #[error("unexpected data on the replication connection")]
    Protocol(#[from] Malformed),
    /// A message that this connection does not ask for.
    #[error("unexpected {what} on the replication connection")]
    Unexpected {
        /// What came.
        what: String,
    },
    /// A query on the catalog failed.
    #[error("cannot {what}")]
    Catalog {
        /// What was to be done.
        what: String,
        /// Why.
        #[source]
        source: tokio_postgres::Error,
    },
    /// A published table has no primary key.
    #[error(
        "table {table} is published and has no primary key: add one, and the stream goes on; see \
         docs/errors/a-table-cannot-be-decoded.md"
    )]
    NoPrimaryKey {
        /// `schema.table`.
        table: String,
    },
    /// A published table is gone and its key cannot be known from the stream.
    #[error(
        "table {table} was dropped while changes of it were still to be decoded, and its primary key is not known any more: these \
         changes cannot be sent. Run `anabranch heal`; see docs/errors/a-table-cannot-be-decoded.md"
    )]
    TableGone {
        /// `schema.table`.
        table: String,
    },
    /// The primary key is not among the published columns.
    #[error(
        "column {column} of the primary key of {table} is not published: a column list was given to the publication by hand, or \
         the column is a generated one, and neither is possible here. Mend that, then run `anabranch heal`; see \
         docs/errors/a-table-cannot-be-decoded.md"
    )]
    KeyNotPublished {
        /// `schema.table`.
        table: String,
        /// The column.
        column: String,
    },
    /// The replica identity does not carry the primary key.
    #[error(
        "the replica identity of {table} does not hold its primary key; run: ALTER TABLE {table} REPLICA IDENTITY FULL, then \
         `anabranch heal`, since what was written before is not whole in the log (docs/errors/a-table-cannot-be-decoded.md)"
    )]
    IdentityWithoutKey {
        /// `schema.table`.
        table: String,
    },
    /// A TOASTed value that an update did not touch is not in the WAL.
    #[error(
        "an update of {table} left column {column} untouched, and its value is stored out of line and not in \
         the log; run: ALTER TABLE {table} REPLICA IDENTITY FULL, then `anabranch heal` \
         (docs/errors/a-table-cannot-be-decoded.md)"
    )]
    ToastNotLogged {
        /// `schema.table`.
        table: String,
        /// The column.
        column: String,
    },
}

impl Error {
    /// Can the place that is being decoded not be passed, whatever is mended now? What the catalog was then decides.
    #[must_use]
    pub const fn is_for_good(&self) -> bool {
        matches!(
            self,
            Self::PublicationMissing { .. }
                | Self::NoBinaryOutput(_)
                | Self::TableGone { .. }
                | Self::KeyNotPublished { .. }
                | Self::IdentityWithoutKey { .. }
                | Self::ToastNotLogged { .. }
        )
    }

    /// Is it worth connecting again, with nothing changed by the operator?
    #[must_use]
    pub fn is_transient(&self) -> bool {
        // Reading or syncing its own files failed (io_error), as those that a slot needs: with another try they may be there, and the
        // slot keeps what is not decoded.
        let passes = |error: &ServerError| {
            error.is_panic || error.is("58030") || pg::is_transient_state(&SqlState::from_code(&error.code))
        };
        match self {
            Self::Pg(error) => error.is_transient(),
            // Certificates that do not verify do not get better.
            Self::Reach { source, .. } | Self::Lost(source) => !matches!(
                source.kind(),
                io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput
            ),
            Self::Closed | Self::SlotInUse { .. } => true,
            Self::Server { source, .. } | Self::Login { source, .. } => passes(source),
            Self::Catalog { source, .. } => pg::is_transient(source),
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_that_crashes_or_cannot_use_its_files_is_waited_for() {
        let said = |severity: &str, code: &str| {
            let body = format!("SX\0V{severity}\0C{code}\0Mcould not fdatasync file\0\0");
            Error::Server {
                during: "the stream",
                source: ServerError::parse(body.as_bytes()),
            }
        };
        assert!(said("PANIC", "42501").is_transient());
        assert!(said("ERROR", "58030").is_transient());
        assert!(!said("ERROR", "42501").is_transient());
    }

    #[test]
    fn no_remedy_loses_writes_or_is_refused_elsewhere() {
        let server = || ServerError::parse(b"C42704\0Mm\0\0");
        let table = || "s.t".to_owned();
        let column = || "c".to_owned();
        let all = [
            Error::StartBeyondWal {
                start: Lsn(2),
                written: Lsn(1),
            },
            Error::PublicationMissing {
                publication: "p".to_owned(),
                source: server(),
            },
            Error::NoBinaryOutput(server()),
            Error::NoPrimaryKey { table: table() },
            Error::TableGone { table: table() },
            Error::KeyNotPublished {
                table: table(),
                column: column(),
            },
            Error::IdentityWithoutKey { table: table() },
            Error::ToastNotLogged {
                table: table(),
                column: column(),
            },
            Error::SlotMissing { slot: "s".to_owned() },
            Error::SlotLost { slot: "s".to_owned() },
        ];
        for text in all.map(|error| error.to_string()) {
            for forbidden in [
                "drop the slot",
                "drop and create",
                "by a column list",
                "join the node again",
                "14 or",
            ] {
                assert!(!text.contains(forbidden), "{text}");
            }
            if let Some((_, rest)) = text.split_once("docs/errors/") {
                let page = rest.split_once(".md").expect("a page").0;
                let path = format!("{}/../docs/errors/{page}.md", env!("CARGO_MANIFEST_DIR"));
                assert!(std::path::Path::new(&path).exists(), "{path}");
            }
        }
    }
}
