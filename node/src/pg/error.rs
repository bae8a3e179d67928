//! What can go wrong with a connection, and what is worth another try.

use std::error::Error as _;
use std::io;
use std::path::{Path, PathBuf};

use tokio_postgres::error::{Severity, SqlState};

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The connection string is not one.
    #[error("postgres.dsn cannot be read; see the libpq manual for connection strings")]
    Dsn(#[source] tokio_postgres::Error),
    /// A parameter of the connection string has a value that is not supported.
    #[error("postgres.dsn: {parameter}={value} is not supported; {remedy}")]
    Parameter {
        /// The parameter's name.
        parameter: &'static str,
        /// Its value (never a secret).
        value: String,
        /// What to write instead.
        remedy: &'static str,
    },
    /// No user in the connection string nor in the environment.
    #[error("postgres.dsn names no user; add user=... to it or set PGUSER")]
    NoUser,
    /// A file that the configuration names cannot be read.
    #[error("{what} {} cannot be read", path.display())]
    File {
        /// The file's role.
        what: &'static str,
        /// Where it is.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file that the configuration names has nothing usable in it.
    #[error("{what} {} holds {problem}", path.display())]
    BadFile {
        /// The file's role.
        what: &'static str,
        /// Where it is.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// TLS cannot be set up from the certificates given.
    #[error("tls to the server cannot be set up from the certificates that postgres.dsn names")]
    Tls(#[source] rustls::Error),
    /// No host accepted the connection.
    #[error("cannot connect to PostgreSQL at {hosts}{}", of_unread(unread.as_deref()))]
    Connect {
        /// `host:port` of all that were tried.
        hosts: String,
        /// The password file that is ignored, where a password is lacking.
        unread: Option<PathBuf>,
        /// Why the last one failed.
        #[source]
        source: tokio_postgres::Error,
    },
    /// A host does not answer.
    #[error("PostgreSQL at {host} does not answer in time")]
    Silent {
        /// `host:port`.
        host: String,
    },
    /// A server did not say what it is.
    #[error("PostgreSQL at {host} cannot be asked what it is")]
    Asked {
        /// `host:port`.
        host: String,
        /// Why.
        #[source]
        source: tokio_postgres::Error,
    },
    /// None takes writes.
    #[error(
        "no host of postgres.dsn is a server that takes writes: {seen}. A standby must be promoted, or the primary started"
    )]
    NoPrimary {
        /// Each host, and what it is.
        seen: String,
        /// It may be otherwise in a moment.
        passes: bool,
    },
    /// Several take writes.
    #[error(
        "several hosts of postgres.dsn take writes: {seen}. A node is one server, and which of them is it cannot be told: stop \
         all but the one that is (make the others its standbys, with pg_rewind or a new base backup; \
         docs/errors/the-server-went-back.md)"
    )]
    SeveralPrimaries {
        /// Each host, and what it is.
        seen: String,
    },
    /// The only one that takes writes is from before a promotion.
    #[error(
        "this node has run on timeline {known} of its server, and the only host of postgres.dsn that takes writes is of \
         before: {seen}. It is an old primary that came back, or an older copy: stop it, and make it a standby of the one that \
         was promoted (pg_rewind, or a new base backup; docs/errors/the-server-went-back.md)"
    )]
    Outdated {
        /// Each host, and what it is.
        seen: String,
        /// The timeline that the node has been on.
        known: u32,
    },
    /// Behind the host is not the server any more that was chosen.
    #[error(
        "PostgreSQL at {host} is not the server any more that this node has begun with, or was restarted"
    )]
    OtherServer {
        /// `host:port`.
        host: String,
    },
}

impl Error {
    /// A server whose role in the node's life cannot be told.
    pub(super) fn asked(host: &str) -> impl FnOnce(tokio_postgres::Error) -> Self {
        let host = host.to_owned();
        move |source| Self::Asked { host, source }
    }

    /// May the same attempt succeed later, with nothing changed by the operator?
    #[must_use]
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Connect { source, .. } | Self::Asked { source, .. } => is_transient(source),
            Self::NoPrimary { passes, .. } => *passes,
            // Whoever is in charge of the servers ends it: the wrong one is stopped, the right one comes up.
            Self::Silent { .. }
            | Self::SeveralPrimaries { .. }
            | Self::Outdated { .. }
            | Self::OtherServer { .. } => true,
            _ => false,
        }
    }
}

/// Says which password file is ignored, if one is.
pub(crate) fn of_unread(file: Option<&Path>) -> String {
    file.map_or_else(String::new, |file| {
        format!(
            " (the password file {} is ignored, since others may read it: chmod 600 it)",
            file.display()
        )
    })
}

/// Did the server not take us for whom we said to be, or want a password that there is not?
pub(super) fn is_of_login(error: &tokio_postgres::Error) -> bool {
    match error.code() {
        // invalid_authorization_specification, invalid_password
        Some(state) => state.code().starts_with("28"),
        None => error
            .source()
            .is_some_and(|cause| cause.to_string() == "password missing"),
    }
}

/// May the same statement succeed later on a fresh transaction or connection?
///
/// True for deadlocks, serialisation failures, lock timeouts, exhausted resources, cancelled statements, a
/// server that stops, starts or crashes, and a lost connection; false for errors of the statement itself.
#[must_use]
pub fn is_transient(error: &tokio_postgres::Error) -> bool {
    if is_panic(error) {
        return true;
    }
    if let Some(state) = error.code() {
        return is_transient_state(state);
    }
    if error.is_closed() {
        return true;
    }
    let mut cause = error.source();
    while let Some(inner) = cause {
        if let Some(io) = inner.downcast_ref::<io::Error>() {
            // A certificate that does not verify, or bytes that are not the protocol, stay as they are.
            return !matches!(
                io.kind(),
                io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput
            );
        }
        cause = inner.source();
    }
    false
}

/// Is the session gone that said so, because somebody or the server ended it? (A disk that is full, say, ends none, although it may
/// have room later.)
#[must_use]
pub fn is_lost(error: &tokio_postgres::Error) -> bool {
    if is_panic(error) {
        return true;
    }
    match error.code() {
        Some(state) => {
            let code = state.code();
            is_transient_state(state)
                && (code == "25P04" || code.starts_with("57P0") || code.starts_with("08"))
        }
        None => is_transient(error),
    }
}

/// Did the server crash in this very session? What it says then has the SQLSTATE of whatever it could not do, such as 58030 where its
/// WAL could not be synced; other sessions are told 57P02 (PostgreSQL docs, 20.8, "Message Severity Levels").
fn is_panic(error: &tokio_postgres::Error) -> bool {
    error
        .as_db_error()
        .is_some_and(|db| db.parsed_severity() == Some(Severity::Panic))
}

/// Did the statement fail because row-level security would keep rows of a table from the session's role? (The SQLSTATE is that of every
/// missing privilege, and the words are in the server's language.) Not a statement within a function, such as one of a trigger: there it
/// is rows of one table that are refused, and the role may be another than the session's.
#[must_use]
pub fn is_of_row_security(error: &tokio_postgres::Error) -> bool {
    error.as_db_error().is_some_and(|db| {
        *db.code() == SqlState::INSUFFICIENT_PRIVILEGE
            && db.routine() == Some("check_enable_rls")
            && db.where_().is_none()
    })
}

/// As [`is_transient`], for a bare SQLSTATE (PostgreSQL docs, appendix A).
#[must_use]
pub fn is_transient_state(state: &SqlState) -> bool {
    match state.code() {
        // deadlock_detected, serialization_failure, lock_not_available, query_canceled (an operator or a
        // timeout did it: the statement is not at fault), transaction_timeout.
        "40P01" | "40001" | "55P03" | "57014" | "25P04" => true,
        // database_dropped is the one of its family that does not pass.
        "57P04" => false,
        code => {
            code.starts_with("53") // insufficient_resources
                || code.starts_with("57P0") // shutdown, start-up, idle timeout
                || code.starts_with("08") // connection_exception
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_passes_by_itself_is_told_from_what_does_not() {
        for code in [
            "40P01", "40001", "55P03", "53100", "53300", "57P01", "57P03", "08006", "57014", "25P04",
        ] {
            assert!(is_transient_state(&SqlState::from_code(code)), "{code}");
        }
        for code in ["23505", "42P01", "42501", "57P04", "22P02", "28P01"] {
            assert!(!is_transient_state(&SqlState::from_code(code)), "{code}");
        }
    }
}
