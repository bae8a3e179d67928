//! `anabranch grants`: the SQL for an ordinary role.

use std::path::Path;
use std::process::ExitCode;

use anabranch_node::setup;
use anabranch_node::setup::grants::{Script, script};
use anabranch_node::setup::pattern::Patterns;
use anabranch_node::setup::select::select;

use crate::args::Grants;
use crate::failure::Failure;
use crate::output::{self, Format, say};

/// Printed for when neither `--pg-version` nor a server says otherwise: what it prints works on later ones too.
const MAJOR_DEFAULT: i32 = 15;

pub(crate) async fn run(path: &Path, verb: &Grants, format: Format) -> Result<ExitCode, Failure> {
    let config = super::load(path)?;
    let role = match &verb.role {
        Some(role) => role.clone(),
        None => super::role(&config)?,
    };
    let patterns = Patterns::parse(&config.postgres.tables).map_err(setup::Error::from)?;
    let sql = if verb.connect {
        let dsn = super::admin_dsn(&config, verb.admin.admin_dsn.as_deref()).await?;
        let mut client = setup::connect(&dsn).await?;
        let facts = super::facts(&mut client, &config, &role).await?;
        let selection = select(&facts, &patterns);
        script(&Script {
            role: &role,
            major: verb.pg_version.unwrap_or(facts.server.major()),
            database: Some(&facts.server.database),
            tables: Some(&selection.all),
            patterns: &patterns,
        })
    } else {
        let dsn = anabranch_node::pg::dsn(&config.postgres)?;
        script(&Script {
            role: &role,
            major: verb.pg_version.unwrap_or(MAJOR_DEFAULT),
            database: dsn.config().get_dbname(),
            tables: None,
            patterns: &patterns,
        })
    };
    match format {
        Format::Table => say(&sql)?,
        Format::Json => output::json(&serde_json::json!({ "role": role, "sql": sql }))?,
    }
    Ok(ExitCode::SUCCESS)
}
