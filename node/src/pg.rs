//! Connections to the node's own server: one way to read the DSN, find the password, check the certificate
//! and pin the session, shared by SQL connections and the replication connection.
//!
//! In:   `[postgres]` of the configuration            Out: a `tokio_postgres::Client`, or a [`Dsn`]
//! Holds: nothing; every connection is the caller's
//! Invariants: 1. every session has the settings of [`PINNED_OPTIONS`], whatever roles or databases set.
//!             2. no password reaches a log or an error.
//!             3. where several hosts are named, a connection is to the one server that takes writes ([`primary`]).
//! On crash: nothing to lose
//! Not here: the replication protocol (`source::walsender`), retrying (the caller, by [`is_transient`])

mod attempt;
mod dsn;
mod error;
mod image;
mod prepared;
mod primary;
pub(crate) mod snapshot;
mod tls;
pub mod xid;

use std::borrow::Cow;
use std::path::Path;

use tokio::task::JoinHandle;
use tokio_postgres::Client;
use tokio_postgres_rustls::MakeRustlsConnect;
use tracing::{Instrument, debug, info_span, warn};

pub(crate) use attempt::attempt;
pub use dsn::Dsn;
pub(crate) use error::of_unread;
pub use error::{Error, is_lost, is_of_row_security, is_transient, is_transient_state};
pub(crate) use image::Image;
pub(crate) use prepared::Prepared;
#[cfg(test)]
pub(crate) use primary::made;
pub(crate) use primary::{Known, LastServer, Seen, WHO, choose, look, of_texts};
pub use primary::{Pin, ServerId, settle};
pub(crate) use tls::server_end_point;

use crate::config;

/// Settings of every session: the images that the daemon reads and writes depend on the first six, what its statements mean on the next
/// three, and a limit set on the role or the database must not end a session that is idle or busy by design. (And `transaction_timeout`,
/// from 17 on.) Who waits for a lock and looks then has to see what was committed meanwhile, whatever isolation applications have by
/// default. Row-level security that binds the role makes a statement fail ([`is_of_row_security`]): rows that nobody shows us would
/// pass for rows that are not there. (Users' code is not to fail for it: [`ROW_SECURITY_OF_OTHERS`].) What these sessions do to the
/// schema is this node's own, or travels otherwise (`crate::setup::plain_ddl`).
pub const PINNED_OPTIONS: &str = "-c datestyle=ISO -c intervalstyle=postgres -c timezone=UTC \
    -c extra_float_digits=3 -c bytea_output=hex -c xmloption=content \
    -c quote_all_identifiers=off -c standard_conforming_strings=on -c search_path=pg_catalog,pg_temp \
    -c row_security=off -c statement_timeout=0 -c lock_timeout=0 -c idle_in_transaction_session_timeout=0 -c idle_session_timeout=0 \
    -c default_transaction_isolation=read\\ committed -c anabranch.capture=off";

/// [`PINNED_OPTIONS`] has it, too. Temporary tables come last: where the path does not name them they come first, and DDL of other nodes, or
/// a function behind a constraint, could have made one in a session of ours that is called as one of the server's.
pub(crate) const SEARCH_PATH: &str = "pg_catalog,pg_temp";

/// Of a session that runs code of users, such as triggers of the tables that it writes and functions with the rights of other roles:
/// such a role sees what policies let it see, as anywhere else. Only where they do not bind the session's own role, as its own
/// statements read all rows then.
pub(crate) const ROW_SECURITY_OF_OTHERS: &str = "SELECT pg_catalog.set_config('row_security', 'on', false) \
    FROM pg_catalog.pg_roles WHERE rolname = current_user AND (rolsuper OR rolbypassrls)";

/// Of a session that writes users' tables as a user's would: triggers fire and foreign keys hold, whatever is set for its role.
pub(crate) const AS_A_USER: &str = "SELECT pg_catalog.set_config('session_replication_role', 'origin', false) \
    WHERE pg_catalog.current_setting('session_replication_role') OPERATOR(pg_catalog.<>) 'origin'";

/// Is a session of `pg_stat_activity` one of Anabranch's? In SQL, as is `role`, the daemon's. Commands may run under other roles; what else
/// is called so is an application.
#[must_use]
pub fn own_session(role: &str) -> String {
    format!(
        "(application_name IN ('anabranch:cli', 'anabranch:join', 'anabranch:join-snapshot', 'anabranch:heal') \
         OR application_name LIKE 'anabranch:%' AND usename = {role})"
    )
}

/// From here to the end of the transaction it runs code of users as a user's session would: triggers of their tables, which expect their
/// search path, and policies that bind the roles of functions ([`ROW_SECURITY_OF_OTHERS`]). So what is said behind it is qualified: a
/// function or an operator that somebody has put into `public` for the very type at hand would be taken for the server's, and run with
/// our rights.
pub(crate) const AS_USERS: &str = "SELECT pg_catalog.set_config('row_security', 'on', true) \
    FROM pg_catalog.pg_roles WHERE rolname = current_user AND (rolsuper OR rolbypassrls); \
    SET LOCAL search_path = \"$user\", public";

/// The name of the type `t` in the schema `n`, in SQL: what nodes call a type to each other. After a dot any keyword may stand unquoted.
pub(crate) const TYPE_NAME: &str = "quote_ident(n.nspname) || '.' || \
    CASE WHEN t.typname ~ '^[a-z_][a-z0-9_]*$' THEN t.typname::text ELSE quote_ident(t.typname) END";

/// A connection's driver: it must be alive for the client to work, and ends when the client is dropped or
/// the server goes away.
pub type Driver = JoinHandle<Result<(), tokio_postgres::Error>>;

/// The connection string of `config`, complete: user, password, pinned settings, TLS; and of the one server alone that was
/// chosen, if one was.
///
/// # Errors
/// When the connection string, the password file or a certificate file cannot be read.
pub fn dsn(config: &config::Postgres) -> Result<Dsn, Error> {
    let dsn = Dsn::beside(
        &config.dsn,
        config.password_file.as_deref(),
        config.dsn_folder.as_deref(),
    )?;
    match &config.pin {
        None => Ok(dsn),
        Some(pin) => dsn
            .pinned(pin)
            .ok_or_else(|| Error::OtherServer { host: dsn.hosts() }),
    }
}

/// The number that a `server_version` begins with, such as 15 of `15.18 (Debian 15.18-0+deb12u1)`; 0 where it begins with none.
pub(crate) fn major(server_version: &str) -> u32 {
    let digits = server_version.split(|c: char| !c.is_ascii_digit()).next();
    digits.and_then(|digits| digits.parse().ok()).unwrap_or(0)
}

/// Opens an SQL connection and spawns its driver. The session is called `anabranch:<purpose>` in
/// `pg_stat_activity`.
///
/// # Errors
/// As [`dsn`], and when no host of the connection string lets the daemon in.
pub async fn connect(config: &config::Postgres, purpose: &str) -> Result<(Client, Driver), Error> {
    connect_dsn(&dsn(config)?, purpose).await
}

/// As [`connect`], for a connection string that was read before.
///
/// # Errors
/// When no host of the connection string lets the daemon in, or none or several of several hosts take writes.
pub async fn connect_dsn(dsn: &Dsn, purpose: &str) -> Result<(Client, Driver), Error> {
    let dsn = settled(dsn).await?;
    let (client, driver) = connect_host(&dsn, purpose).await?;
    if let Some(server) = dsn.server() {
        let row = client
            .query_one(WHO, &[])
            .await
            .map_err(Error::asked(&dsn.hosts()))?;
        if primary::who(&row).map_err(Error::asked(&dsn.hosts()))?.id != server {
            return Err(Error::OtherServer { host: dsn.hosts() });
        }
    }
    Ok((client, driver))
}

/// The connection string of one server. One that names a single host and wants nothing of it is as it is.
pub(crate) async fn settled(dsn: &Dsn) -> Result<Cow<'_, Dsn>, Error> {
    if dsn.is_settled() {
        return Ok(Cow::Borrowed(dsn));
    }
    let pin = Box::pin(choose(dsn, &Known::default())).await?;
    let pinned = dsn
        .pinned(&pin)
        .ok_or_else(|| Error::OtherServer { host: dsn.hosts() })?;
    Ok(Cow::Owned(pinned))
}

/// Connects, whatever the server is.
async fn connect_host(dsn: &Dsn, purpose: &str) -> Result<(Client, Driver), Error> {
    let mut config = dsn.config().clone();
    config.application_name(format!("anabranch:{purpose}"));
    let tls = MakeRustlsConnect::new(dsn.tls().as_ref().clone());
    // Boxed: the future of a connection attempt is large, and callers hold it inside theirs.
    let (client, connection) = Box::pin(config.connect(tls))
        .await
        .map_err(|source| Error::Connect {
            hosts: dsn.hosts(),
            unread: dsn
                .unread()
                .filter(|_| error::is_of_login(&source))
                .map(Path::to_path_buf),
            source,
        })?;
    // No option at connecting, as servers before 17 would refuse it.
    let has_transaction_timeout = connection
        .parameter("server_version")
        .is_some_and(|version| major(version) >= 17);
    let driver = async move {
        let ended = connection.await;
        match &ended {
            Ok(()) => debug!("connection closed"),
            Err(error) => warn!(%error, "connection lost"),
        }
        ended
    };
    let driver = tokio::spawn(driver.instrument(info_span!("pg", purpose)));
    if has_transaction_timeout {
        client
            .batch_execute("SET transaction_timeout = 0")
            .await
            .map_err(Error::asked(&dsn.hosts()))?;
    }
    Ok((client, driver))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn a_password_file_that_is_ignored_is_named_where_a_password_is_lacking() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("pgpass");
        std::fs::write(&file, "*:*:*:*:p").unwrap();
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o644)).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let server = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut hello = [0; 1024];
            assert!(stream.read(&mut hello).await.unwrap() > 0);
            // AuthenticationCleartextPassword.
            stream.write_all(b"R\0\0\0\x08\0\0\0\x03").await.unwrap();
            stream
        };
        let text = format!(
            "host=127.0.0.1 port={port} user=u sslmode=disable passfile={}",
            file.display()
        );
        let dsn = Dsn::new(&text, None).unwrap();
        let (_stream, connected) = tokio::join!(server, connect_dsn(&dsn, "test"));
        let said = connected.err().unwrap().to_string();
        assert!(
            said.contains(&format!("the password file {} is ignored", file.display())),
            "{said}"
        );
    }
}
