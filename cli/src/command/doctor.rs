//! `anabranch doctor`: exit 1 when anything fails.

use std::path::Path;
use std::process::ExitCode;

use anabranch_node::config;
use anabranch_node::setup::{Finding, Level, doctor, worst};

use crate::failure::Failure;
use crate::output::{self, Format, say};

pub(crate) async fn run(path: &Path, format: Format) -> Result<ExitCode, Failure> {
    let findings = match config::load(path) {
        Ok(config) => {
            let mut findings = vec![Finding::ok("config", path.display().to_string())];
            findings.extend(Box::pin(doctor::examine(&config)).await);
            findings
        }
        Err(error) => doctor::config_findings(&error),
    };
    let failed = findings
        .iter()
        .filter(|finding| finding.level == Level::Fail)
        .count();
    match format {
        Format::Table => {
            say(&output::findings(&findings))?;
            say(&if failed == 0 {
                "ready\n".to_owned()
            } else {
                format!("{failed} check(s) failed\n")
            })?;
        }
        Format::Json => output::json(&serde_json::json!({ "ok": failed == 0, "findings": findings }))?,
    }
    Ok(ExitCode::from(u8::from(worst(&findings) == Level::Fail)))
}
