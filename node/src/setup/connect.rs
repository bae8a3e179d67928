//! Short-lived connections of `init`, `doctor`, `grants`, `conflicts` and `remove`.

use tokio_postgres::Client;
use tokio_postgres::config::Host;

use super::error::Error;
use crate::pg::{self, Dsn};

/// Connects; the connection ends when the client is dropped.
///
/// # Errors
/// [`Error::Connect`], which names hosts but no secret.
pub async fn connect(dsn: &Dsn) -> Result<Client, Error> {
    // The driver ends by itself; its errors reach the client's own calls.
    let (client, _driver) = pg::connect_dsn(dsn, "cli").await?;
    Ok(client)
}

/// `user@host:port/database`, for messages.
#[must_use]
pub fn target(dsn: &Dsn) -> String {
    let config = dsn.config();
    format!(
        "{}@{}/{}",
        config.get_user().unwrap_or("?"),
        dsn.hosts(),
        config.get_dbname().unwrap_or("?")
    )
}

/// A psql command line for the same place, without the password.
#[must_use]
pub fn psql(dsn: &Dsn) -> String {
    let config = dsn.config();
    let (mut hosts, mut ports) = (Vec::new(), Vec::new());
    for (at, host) in config.get_hosts().iter().enumerate() {
        hosts.push(match host {
            Host::Tcp(name) => name.clone(),
            Host::Unix(folder) => folder.display().to_string(),
        });
        ports.push(dsn.port(at).to_string());
    }
    format!(
        "psql -h {} -p {} -U {} {}",
        hosts.join(","),
        ports.join(","),
        config.get_user().unwrap_or("?"),
        config.get_dbname().unwrap_or("?")
    )
}
