//! `anabranch init`: checks first, then does what is missing.

use std::path::Path;
use std::process::ExitCode;

use anabranch_node::setup::{self, Event, Finding, Level, Plan};
use serde_json::json;

use crate::args::Init;
use crate::failure::Failure;
use crate::output::{self, Format, say};

pub(crate) async fn run(path: &Path, verb: &Init, format: Format) -> Result<ExitCode, Failure> {
    let config = super::load(path)?;
    let dsn = super::admin_dsn(&config, verb.admin.admin_dsn.as_deref()).await?;
    let mut client = setup::connect(&dsn).await?;
    let facts = super::facts(&mut client, &config, &super::role(&config)?).await?;
    let mut plan = setup::plan(&facts, &config).map_err(setup::Error::from)?;
    plan.findings.extend(setup::check::unfinished_join(&facts));
    if verb.dry_run {
        return dry_run(&plan, format);
    }
    if !plan.is_allowed() {
        show(&plan, &[], format)?;
        return Err(Failure::Refused("checks failed; nothing was changed".to_owned()));
    }
    let watcher = setup::connect(&dsn).await?;
    let bar = output::spinner();
    let mut done = Vec::new();
    let mut report = |event: Event| match event {
        Event::Did(what) => {
            bar.set_message(what.clone());
            done.push(what);
        }
        Event::Waiting { what, on } => waiting(&bar, &what, &on),
    };
    let result = setup::execute(&mut client, &watcher, &plan, &mut report).await;
    bar.finish_and_clear();
    show(&plan, &done, format)?;
    result?;
    Ok(ExitCode::SUCCESS)
}

/// The same for the first node of a cluster, which has nobody beside it yet.
pub(crate) async fn create(path: &Path, verb: &Init, format: Format) -> Result<ExitCode, Failure> {
    let config = super::load(path)?;
    if let Some(peer) = config.peers.first() {
        return Err(Failure::Usage(format!(
            "`peers` names `{}`: a cluster is created at one node, and others `anabranch join` it; nodes that begin together with \
             equal rows run `anabranch init` each",
            peer.name
        )));
    }
    run(path, verb, format).await
}

/// Above the spinner on a terminal, else as plain lines: whoever waits must be able to see for what.
pub(crate) fn waiting(bar: &indicatif::ProgressBar, what: &str, on: &[String]) {
    let mut text = format!("waiting to {what}");
    for each in on {
        text.push_str("\n  for ");
        text.push_str(each);
    }
    if bar.is_hidden() {
        output::remark(text);
    } else {
        bar.println(text);
    }
}

fn dry_run(plan: &Plan, format: Format) -> Result<ExitCode, Failure> {
    match format {
        Format::Table => say_script(plan)?,
        Format::Json => output::json(&json!({
            "allowed": plan.is_allowed(), "findings": plan.findings, "sql": plan.sql(), "tables": plan.tables,
        }))?,
    }
    Ok(ExitCode::from(u8::from(!plan.is_allowed())))
}

/// A plan as SQL, with what was found as comments.
pub(crate) fn say_script(plan: &Plan) -> Result<(), Failure> {
    for finding in notable(&plan.findings) {
        let line = format!(
            "-- {}: {}: {}",
            output::word(finding.level),
            finding.check,
            finding.found
        );
        say(&format!("{line}\n"))?;
        if !finding.remedy.is_empty() {
            say(&format!("--   {}\n", finding.remedy))?;
        }
    }
    say(&if plan.stages.is_empty() && plan.is_allowed() {
        "-- nothing to do\n".to_owned()
    } else {
        plan.sql()
    })
}

pub(crate) fn notable(findings: &[Finding]) -> impl Iterator<Item = &Finding> {
    findings
        .iter()
        .filter(|finding| finding.level != Level::Ok || finding.found.ends_with("left out"))
}

fn show(plan: &Plan, done: &[String], format: Format) -> Result<(), Failure> {
    if format == Format::Json {
        return output::json(&json!({
            "allowed": plan.is_allowed(), "findings": plan.findings, "done": done, "tables": plan.tables,
        }));
    }
    let notes: Vec<Finding> = notable(&plan.findings).cloned().collect();
    if !notes.is_empty() {
        say(&output::findings(&notes))?;
    }
    for what in done {
        say(&format!("done: {what}\n"))?;
    }
    if !plan.is_allowed() {
        return Ok(());
    }
    if done.is_empty() && plan.stages.is_empty() {
        return say(&format!(
            "nothing to do: {} table(s) are replicated\n",
            plan.tables.len()
        ));
    }
    say(&format!(
        "{} table(s) are replicated: {}\n\
         From here on every write is kept for the peers. Rows that exist already are not sent: a member begins with the \
         same ones, or joins with a copy (`anabranch join`), or `anabranch tables add` brings those of one table.\n",
        plan.tables.len(),
        plan.tables.join(", ")
    ))
}
