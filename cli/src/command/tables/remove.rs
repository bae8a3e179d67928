//! `anabranch tables remove`: out of the publication, and what others send is passed over.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anabranch_node::admin;
use anabranch_node::config::Config;
use anabranch_node::setup::tables::{self, remove};
use anabranch_node::setup::{self, Event, Plan};
use anabranch_node::status::Status;
use serde_json::json;

use crate::args::TablesRemove;
use crate::command::init;
use crate::failure::Failure;
use crate::output::{self, Format, say};

/// How long the daemon may take to see it: it looks every few seconds.
const NOTICE: Duration = Duration::from_secs(30);

pub(super) async fn run(config: &Config, verb: &TablesRemove, format: Format) -> Result<ExitCode, Failure> {
    let mut client = super::connect(config, &verb.admin).await?;
    let role = crate::command::role(config)?;
    let facts = crate::command::facts(&mut client, config, &role).await?;
    setup::check::same_node(facts.ours.node.as_ref(), config)?;
    let plan = remove::plan(&facts, config, &tables::meant(&facts, &verb.tables)?)?;
    if !plan.is_allowed() {
        show(&plan, &[], None, format)?;
        return Err(Failure::Refused("nothing was changed".to_owned()));
    }
    if verb.dry_run {
        match format {
            Format::Table => init::say_script(&plan)?,
            Format::Json => output::json(&json!({
                "allowed": true, "findings": plan.findings, "sql": plan.sql(), "tables": plan.tables,
            }))?,
        }
        return Ok(ExitCode::SUCCESS);
    }
    let watcher = super::connect(config, &verb.admin).await?;
    let bar = output::spinner();
    let mut done = Vec::new();
    let mut report = |event: Event| match event {
        Event::Did(what) => done.push(what),
        Event::Waiting { what, on } => init::waiting(&bar, &what, &on),
    };
    let result = setup::execute(&mut client, &watcher, &plan, &mut report).await;
    bar.finish_and_clear();
    result?;
    let noticed = noticed(config, &plan.tables).await;
    show(&plan, &done, noticed, format)?;
    if noticed == Some(false) {
        return Err(Failure::Refused(
            "the daemon has not seen it yet: see its log, or start it again".to_owned(),
        ));
    }
    Ok(ExitCode::SUCCESS)
}

/// Waits until the daemon passes the tables over; none where none runs.
async fn noticed(config: &Config, tables: &[String]) -> Option<bool> {
    let socket = config.node.data_dir.join(admin::SOCKET);
    let until = Instant::now() + NOTICE;
    loop {
        let status: Status = serde_json::from_str(&admin::status(&socket).await.ok()?).ok()?;
        let mut tables = tables.iter();
        if tables.all(|table| status.apply.passed_over.contains_key(table)) {
            return Some(true);
        }
        if Instant::now() >= until {
            return Some(false);
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

fn show(plan: &Plan, done: &[String], noticed: Option<bool>, format: Format) -> Result<(), Failure> {
    if format == Format::Json {
        return output::json(&json!({
            "allowed": plan.is_allowed(), "findings": plan.findings, "done": done, "tables": plan.tables,
            "daemon_noticed": noticed,
        }));
    }
    if !plan.findings.is_empty() {
        say(&output::findings(&plan.findings))?;
    }
    if !plan.is_allowed() {
        return Ok(());
    }
    for what in done {
        say(&format!("done: {what}\n"))?;
    }
    say(&format!(
        "not replicated any more at this node: {}\n\
         Its rows stay. What is written to it here stays here, and what other nodes still send of it is passed over.\n",
        plan.tables.join(", ")
    ))
}
