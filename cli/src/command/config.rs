//! `anabranch config`: the configuration as it is understood.

use std::path::Path;
use std::process::ExitCode;

use crate::failure::Failure;
use crate::output::{self, Format, say};

pub(crate) fn run(path: &Path, format: Format) -> Result<ExitCode, Failure> {
    let config = super::load(path)?;
    match format {
        Format::Table => {
            let text =
                toml::to_string_pretty(&config).map_err(|error| Failure::Refused(error.to_string()))?;
            say(&text)?;
        }
        Format::Json => output::json(&serde_json::json!(config))?,
    }
    Ok(ExitCode::SUCCESS)
}
