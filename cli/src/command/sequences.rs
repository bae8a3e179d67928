//! `anabranch sequences`: every node hands out ids of its own.

use std::path::Path;
use std::process::ExitCode;

use anabranch_node::config::Config;
use anabranch_node::setup::ids;
use anabranch_node::setup::interleave::{Choice, View};
use anabranch_node::setup::pattern::Patterns;
use anabranch_node::setup::select::{oids, select};
use anabranch_node::setup::sequence::{self, Depth};
use anabranch_node::setup::{self, Event, Finding, Level, Plan};
use serde_json::json;
use tokio_postgres::Client;

use crate::args::{Admin, SequenceChoice, Sequences};
use crate::failure::Failure;
use crate::output::{self, Format, say};

pub(crate) async fn run(path: &Path, verb: &Sequences, format: Format) -> Result<ExitCode, Failure> {
    let config = super::load(path)?;
    match verb {
        Sequences::Plan(choice) => plan(&config, choice, format).await,
        Sequences::Apply(choice) => apply(&config, choice, format).await,
        Sequences::Status(admin) => status(&config, admin, format).await,
    }
}

async fn connect(config: &Config, admin: &Admin) -> Result<Client, Failure> {
    let dsn = super::admin_dsn(config, admin.admin_dsn.as_deref()).await?;
    Ok(setup::connect(&dsn).await?)
}

async fn read(config: &Config, client: &mut Client, depth: Depth) -> Result<sequence::Sequences, Failure> {
    let patterns = Patterns::parse(&config.postgres.tables).map_err(setup::Error::from)?;
    let facts = super::facts(client, config, &super::role(config)?).await?;
    setup::check::same_node(facts.ours.node.as_ref(), config)?;
    Ok(sequence::read(client, &oids(&select(&facts, &patterns).all), depth).await?)
}

async fn planned(config: &Config, client: &mut Client, choice: &SequenceChoice) -> Result<Plan, Failure> {
    let all = read(config, client, Depth::Columns).await?;
    let choice = Choice {
        more: choice.more.clone(),
        skip: choice.skip.clone(),
    };
    Ok(ids::plan(&all, config, &choice))
}

async fn plan(config: &Config, choice: &SequenceChoice, format: Format) -> Result<ExitCode, Failure> {
    let mut client = connect(config, &choice.admin).await?;
    let plan = planned(config, &mut client, choice).await?;
    match format {
        Format::Table => super::init::say_script(&plan)?,
        Format::Json => output::json(&json!({
            "allowed": plan.is_allowed(), "findings": plan.findings, "sql": plan.sql(), "sequences": plan.tables,
        }))?,
    }
    Ok(ExitCode::from(u8::from(!plan.is_allowed())))
}

async fn apply(config: &Config, choice: &SequenceChoice, format: Format) -> Result<ExitCode, Failure> {
    let mut client = connect(config, &choice.admin).await?;
    let plan = planned(config, &mut client, choice).await?;
    if !plan.is_allowed() {
        show(&plan, &[], format)?;
        return Err(Failure::Refused("checks failed; nothing was changed".to_owned()));
    }
    let watcher = connect(config, &choice.admin).await?;
    let bar = output::spinner();
    let mut done = Vec::new();
    let mut report = |event: Event| match event {
        Event::Did(what) => done.push(what),
        Event::Waiting { what, on } => super::init::waiting(&bar, &what, &on),
    };
    let result = setup::execute(&mut client, &watcher, &plan, &mut report).await;
    bar.finish_and_clear();
    show(&plan, &done, format)?;
    result?;
    Ok(ExitCode::SUCCESS)
}

fn show(plan: &Plan, done: &[String], format: Format) -> Result<(), Failure> {
    if format == Format::Json {
        return output::json(&json!({
            "allowed": plan.is_allowed(), "findings": plan.findings, "done": done, "sequences": plan.tables,
        }));
    }
    let notes: Vec<Finding> = super::init::notable(&plan.findings).cloned().collect();
    if !notes.is_empty() {
        say(&output::findings(&notes))?;
    }
    for what in done {
        say(&format!("done: {what}\n"))?;
    }
    if done.is_empty() && plan.stages.is_empty() && plan.is_allowed() {
        say(&format!(
            "nothing to do: {} sequence(s) or column(s) have ids of this node's own\n",
            plan.tables.len()
        ))?;
    }
    if plan.findings.iter().any(|finding| finding.level == Level::Warn) && plan.is_allowed() {
        say("`anabranch sequences status` says whether all members are done\n")?;
    }
    Ok(())
}

async fn status(config: &Config, admin: &Admin, format: Format) -> Result<ExitCode, Failure> {
    let mut client = connect(config, admin).await?;
    let all = read(config, &mut client, Depth::Values).await?;
    let views = ids::views(&all, config);
    let safe = views.iter().all(|view| view.safe || !view.managed);
    match format {
        Format::Json => output::json(&json!({ "safe": safe, "sequences": views }))?,
        Format::Table => {
            let header = [
                "sequence",
                "method",
                "columns",
                "increment",
                "offset",
                "last value",
                "left",
                "safe",
                "",
            ];
            say(&output::table(header, views.iter().map(row)))?;
        }
    }
    Ok(ExitCode::from(u8::from(!safe)))
}

fn row(view: &View) -> [String; 9] {
    let number = |number: Option<i128>| number.map_or("-".to_owned(), |number| number.to_string());
    let safe = match (view.managed, view.safe) {
        (false, _) => "-",
        (true, true) => "yes",
        (true, false) => "NO",
    };
    let reasons = if view.managed {
        [view.reasons.as_slice(), view.warnings.as_slice()]
            .concat()
            .join("; ")
    } else {
        "no column of a replicated table uses it; --sequence includes it".to_owned()
    };
    [
        view.sequence.clone(),
        if view.managed { view.method.name() } else { "-" }.to_owned(),
        view.columns.join(", "),
        view.increment.to_string(),
        number(view.offset),
        number(view.last_value.map(i128::from)),
        number(view.left),
        safe.to_owned(),
        reasons,
    ]
}
