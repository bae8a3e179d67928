//! One verb a file.

pub(crate) mod completion;
pub(crate) mod config;
pub(crate) mod conflicts;
pub(crate) mod ddl;
pub(crate) mod demo;
pub(crate) mod doctor;
pub(crate) mod grants;
pub(crate) mod heal;
pub(crate) mod init;
pub(crate) mod join;
pub(crate) mod leave;
pub(crate) mod node;
pub(crate) mod policy;
pub(crate) mod remove;
pub(crate) mod run;
pub(crate) mod sequences;
pub(crate) mod status;
pub(crate) mod tables;
pub(crate) mod verify;
pub(crate) mod wait;

use std::path::Path;

use anabranch_node::config::Config;
use anabranch_node::pg::{self, Dsn};
use anabranch_node::setup::{self, Facts};
use tokio_postgres::Client;

use crate::failure::Failure;

/// The configuration, or every fault of it.
pub(crate) fn load(path: &Path) -> Result<Config, Failure> {
    Ok(anabranch_node::config::load(path)?)
}

/// Who sets up: `--admin-dsn`, else the daemon's own role. Of several hosts the one that takes writes.
pub(crate) async fn admin_dsn(config: &Config, admin: Option<&str>) -> Result<Dsn, Failure> {
    settled(config, "--admin-dsn", admin).await
}

/// The same, where it is another option that says who.
pub(crate) async fn settled(config: &Config, option: &str, given: Option<&str>) -> Result<Dsn, Failure> {
    let dsn = match given {
        Some(text) => dsn_of(option, text)?,
        None => pg::dsn(&config.postgres)?,
    };
    Ok(pg::settle(dsn, Some(&config.node.data_dir)).await?)
}

/// The connection string of an option. What is wrong with it is said of that, and not of the configuration.
pub(crate) fn dsn_of(option: &str, text: &str) -> Result<Dsn, Failure> {
    Dsn::new(text, None).map_err(|error| {
        Failure::Refused(match error {
            // The parser's message may repeat a piece of the text, which may be a password.
            pg::Error::Dsn(_) => format!(
                "{option} is not a connection string; write `host=... port=... dbname=... user=...` or \
                 `postgresql://user@host:port/dbname`"
            ),
            error => setup::error::chain(&error).replace("postgres.dsn", option),
        })
    })
}

/// Name of the daemon's role.
pub(crate) fn role(config: &Config) -> Result<String, Failure> {
    Ok(pg::dsn(&config.postgres)?
        .config()
        .get_user()
        .unwrap_or_default()
        .to_owned())
}

/// Everything in the catalog that set-up and removal look at.
pub(crate) async fn facts(client: &mut Client, config: &Config, role: &str) -> Result<Facts, Failure> {
    Ok(setup::facts::read(client, role, &config.postgres.slot, &config.postgres.publication).await?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_with_a_connection_string_is_said_of_its_option_and_repeats_nothing_secret() {
        for text in [
            "host=/tmp user=u password=hunter2 hunter3",
            "host=/tmp user=u load_balance_hosts=random",
        ] {
            let said = dsn_of("--from-dsn", text).unwrap_err().to_string();
            assert!(said.starts_with("--from-dsn"), "{said}");
            assert!(
                !said.contains("postgres.dsn") && !said.contains("hunter"),
                "{said}"
            );
        }
    }
}
