//! `anabranch tables add`: into the publication here, and the rows of this node to all that lack them.

use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anabranch_node::admin;
use anabranch_node::config::Config;
use anabranch_node::setup::tables::{self, add};
use anabranch_node::setup::{self, Finding, Level, Plan};
use anabranch_node::verify::{self, Options, Report, Verdict};
use serde_json::json;
use tokio::sync::oneshot;
use tokio_postgres::Client;

use crate::args::TablesAdd;
use crate::command::init;
use crate::command::verify::{Progress, words};
use crate::failure::Failure;
use crate::output::{self, Format, say};

/// Between two looks whether all members answer.
const TRY_EVERY: Duration = Duration::from_secs(1);

pub(super) async fn run(config: &Config, verb: &TablesAdd, format: Format) -> Result<ExitCode, Failure> {
    let mut client = super::connect(config, &verb.admin).await?;
    let role = crate::command::role(config)?;
    let facts = crate::command::facts(&mut client, config, &role).await?;
    let mut adding = add::plan(&facts, config, &tables::meant(&facts, &verb.tables)?)?;
    let held = setup::together::examine(&client, &config.policies_among(&facts.ours.names)?)
        .await
        .map_err(Failure::query("the constraints of the tables"))?;
    let of_these = |finding: &Finding| {
        let name = finding.check.strip_prefix("table ").unwrap_or_default();
        adding.tables.iter().any(|table| table == name)
    };
    let held: Vec<Finding> = held.into_iter().filter(of_these).collect();
    adding.plan.findings.extend(held);
    refuse(&adding.plan, format)?;
    let options = Options {
        tables: adding.words.clone(),
        rate: verb.rate,
        rows_max: verb.limit,
        patience_s: verb.patience,
        repair: None,
        add: Some(verify::Add {
            from: config.node.name.clone(),
            dry_run: verb.dry_run,
        }),
    };
    if verb.dry_run && format == Format::Table {
        init::say_script(&adding.plan)?;
    }
    let watcher = super::connect(config, &verb.admin).await?;
    let (ready, is_ready) = oneshot::channel();
    let mut ready = Some(ready);
    let publish = async {
        match is_ready.await {
            Ok(()) => publish(&mut client, &watcher, &adding.plan, format).await,
            // Refused, or over.
            Err(_) => Ok(()),
        }
    };
    let mut progress = Progress::new(format);
    let mut report = None;
    let socket = config.node.data_dir.join(admin::SOCKET);
    let mut each = |event: verify::Event| match event {
        verify::Event::Report(last) => report = Some(last),
        event => {
            if let verify::Event::Started { .. } = event
                && let Some(ready) = ready.take()
            {
                // Nobody listens where publishing has failed.
                let _ = ready.send(());
            }
            progress.show(&event);
        }
    };
    let wait = if verb.dry_run { 0 } else { verb.wait };
    let asked = ask(&socket, &options, (wait, format), &mut each);
    let outcome = both(asked, publish).await;
    progress.end();
    let begun = ready.is_none();
    let reported = outcome.and_then(|()| {
        report.ok_or_else(|| {
            Failure::Refused("the daemon went away before all was brought; run this again".to_owned())
        })
    });
    let report = match reported {
        Ok(report) => report,
        // The publication may be changed, and rows be brought: this is not the refusal that 1 stands for.
        Err(failure) if begun => {
            crate::report(&failure, format);
            return Ok(ExitCode::from(2));
        }
        Err(failure) => return Err(failure),
    };
    match format {
        Format::Json => output::line(&report_json(&report, &adding.plan, verb.dry_run))?,
        Format::Table => say(&text(&report, verb.dry_run))?,
    }
    Ok(match report.verdict {
        Verdict::Equal => ExitCode::SUCCESS,
        Verdict::Different => ExitCode::from(1),
        // Nothing was begun: that is a refusal.
        Verdict::Unknown if report.tables.is_empty() => ExitCode::from(1),
        Verdict::Unknown => ExitCode::from(2),
    })
}

/// Asks until all members answer, or for `wait` seconds; nothing is begun without one. Says for whom it waits.
async fn ask(
    socket: &Path,
    options: &Options,
    (wait, format): (u32, Format),
    each: &mut impl FnMut(verify::Event),
) -> Result<(), Failure> {
    let until = Instant::now() + Duration::from_secs(wait.into());
    let mut said = Vec::new();
    loop {
        let mut absent = Vec::new();
        admin::verify(socket, options, |event| match event {
            verify::Event::Report(last) if !last.absent.is_empty() && Instant::now() < until => {
                absent = last.absent;
            }
            event => each(event),
        })
        .await?;
        if absent.is_empty() {
            return Ok(());
        }
        if absent != said {
            match format {
                Format::Table => output::remark(format_args!("waiting: {}", absent.join("; "))),
                // Who reads the events went away: the report's line fails in the same way.
                Format::Json => drop(output::line(&json!({ "event": "waiting", "on": absent }))),
            }
            said = absent;
        }
        tokio::time::sleep(TRY_EVERY).await;
    }
}

/// Both; the first failure ends the other.
async fn both(
    asked: impl Future<Output = Result<(), Failure>>,
    publish: impl Future<Output = Result<(), Failure>>,
) -> Result<(), Failure> {
    tokio::pin!(asked);
    tokio::pin!(publish);
    tokio::select! {
        asked = &mut asked => return asked,
        published = &mut publish => published?,
    }
    asked.await
}

async fn publish(client: &mut Client, watcher: &Client, plan: &Plan, format: Format) -> Result<(), Failure> {
    let bar = output::spinner();
    let mut report = |event: setup::Event| match event {
        setup::Event::Did(what) if format == Format::Table => output::remark(format_args!("done: {what}")),
        setup::Event::Did(what) => {
            // Who reads the events went away: the report's line fails in the same way.
            let _ = output::line(&json!({ "event": "did", "what": what }));
        }
        setup::Event::Waiting { what, on } => init::waiting(&bar, &what, &on),
    };
    let done = setup::execute(client, watcher, plan, &mut report).await;
    bar.finish_and_clear();
    Ok(done?)
}

fn refuse(plan: &Plan, format: Format) -> Result<(), Failure> {
    let fails = plan
        .findings
        .iter()
        .filter(|finding| finding.level == Level::Fail);
    let fails: Vec<Finding> = fails.cloned().collect();
    if fails.is_empty() {
        return Ok(());
    }
    match format {
        Format::Table => say(&output::findings(&fails))?,
        Format::Json => output::line(&json!({ "event": "refused", "findings": fails }))?,
    }
    Err(Failure::Refused("nothing was changed".to_owned()))
}

fn report_json(report: &Report, plan: &Plan, dry_run: bool) -> serde_json::Value {
    let mut value = serde_json::to_value(verify::Event::Report(report.clone())).unwrap_or_default();
    if let Some(object) = value.as_object_mut() {
        object.insert("remarks".to_owned(), json!(plan.findings));
        if dry_run {
            object.insert("sql".to_owned(), json!(plan.sql()));
        }
    }
    value
}

fn text(report: &Report, dry_run: bool) -> String {
    if report.tables.is_empty() {
        let mut out: String = report
            .problems
            .iter()
            .map(|problem| format!("{problem}\n"))
            .collect();
        out.push_str(match (report.problems.is_empty(), dry_run) {
            (true, _) => "ready: nothing stands in the way\n",
            (false, true) => "NOT READY\n",
            (false, false) => "NOT ADDED: nothing was changed\n",
        });
        return out;
    }
    let mut out = words(report, false);
    if report.verdict == Verdict::Different {
        out.push_str(
            "rows that only other nodes have come with `anabranch tables add` at one of them; rows that differ become what they are \
             at the node that you name with `anabranch repair --from NODE`\n",
        );
    } else if report.verdict == Verdict::Unknown {
        out.push_str("run this again: what was brought is not brought again\n");
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_stands_in_the_way_is_said_and_that_nothing_was_done() {
        let report = Report {
            verdict: Verdict::Unknown,
            nodes: Vec::new(),
            problems: vec!["public.item: is not replicated by node n2".to_owned()],
            absent: Vec::new(),
            tables: Vec::new(),
        };
        let said = text(&report, false);
        assert!(
            said.starts_with("public.item: is not replicated by node n2\nNOT ADDED"),
            "{said}"
        );
    }
}
