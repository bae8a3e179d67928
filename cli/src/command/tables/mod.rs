//! `anabranch tables`: which tables are replicated; taking one in with its rows, and one out.

mod add;
mod list;
mod remove;

use std::path::Path;
use std::process::ExitCode;

use anabranch_node::config::Config;
use anabranch_node::setup;
use tokio_postgres::Client;

use crate::args::{Admin, Tables};
use crate::failure::Failure;
use crate::output::Format;

pub(crate) async fn run(path: &Path, verb: &Tables, format: Format) -> Result<ExitCode, Failure> {
    let config = super::load(path)?;
    match verb {
        Tables::List(admin) => list::run(&config, admin, format).await,
        Tables::Add(verb) => add::run(&config, verb, format).await,
        Tables::Remove(verb) => remove::run(&config, verb, format).await,
    }
}

async fn connect(config: &Config, admin: &Admin) -> Result<Client, Failure> {
    let dsn = super::admin_dsn(config, admin.admin_dsn.as_deref()).await?;
    Ok(setup::connect(&dsn).await?)
}
