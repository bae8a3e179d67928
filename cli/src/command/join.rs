//! `anabranch join`: checks first, then copies, with a bar for people and events for programs.

use std::io::IsTerminal;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use anabranch_node::join::{self, Event, Options, Report};
use anabranch_node::pg::Dsn;
use anabranch_node::setup::{Level, worst};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::json;

use crate::args::Join;
use crate::failure::Failure;
use crate::output::{self, Format, say};

pub(crate) async fn run(path: &Path, verb: &Join, format: Format) -> Result<ExitCode, Failure> {
    let config = super::load(path)?;
    let Some(donor) = config.peers.iter().find(|peer| peer.name == verb.from) else {
        return Err(Failure::Usage(format!(
            "`{}` is not among `peers` of the configuration: name, id and address of the member to copy from belong there",
            verb.from
        )));
    };
    let options = Options {
        donor: donor.clone(),
        donor_dsn: Dsn::new(&verb.from_dsn, None)?,
        admin_dsn: super::admin_dsn(&config, verb.admin.admin_dsn.as_deref()).await?,
        role: super::role(&config)?,
        pg_bin: verb.pg_bin.clone(),
        jobs: usize::from(verb.jobs),
        // Blocks of 8 KiB.
        piece_blocks: verb.piece.saturating_mul(128),
        wait_s: if verb.dry_run { 0 } else { verb.wait },
    };
    let bar = bar();
    if verb.abandon {
        join::abandon(&config, &options, &report(&bar, format)).await?;
        bar.finish_and_clear();
        end(format, "abandoned", "nothing of the join is left\n")?;
        return Ok(ExitCode::SUCCESS);
    }
    let findings = Box::pin(join::preflight(&config, &options, &report(&bar, format))).await?;
    if format == Format::Table {
        say(&output::findings(&findings))?;
    } else {
        output::line(&json!({ "event": "checked", "findings": findings }))?;
    }
    if worst(&findings) == Level::Fail {
        return Err(Failure::Refused("checks failed; nothing was changed".to_owned()));
    }
    if verb.dry_run {
        return Ok(ExitCode::SUCCESS);
    }
    let joined = Box::pin(join::run(&config, &options, &report(&bar, format))).await;
    bar.finish_and_clear();
    joined?;
    end(
        format,
        "joined",
        "the copy is complete: start the daemon with `anabranch run`. It catches up, and the database takes writes once \
         every member knows it; `anabranch status` says for whom it waits\n",
    )?;
    Ok(ExitCode::SUCCESS)
}

fn bar() -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr());
    if let Ok(style) = ProgressStyle::with_template(
        "{wide_bar} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta}\n{msg}",
    ) {
        bar.set_style(style);
    }
    bar
}

fn end(format: Format, event: &str, text: &str) -> Result<(), Failure> {
    match format {
        Format::Table => say(text),
        Format::Json => output::line(&json!({ "event": event })),
    }
}

fn report(bar: &ProgressBar, format: Format) -> Report {
    let bar = bar.clone();
    Arc::new(move |event: Event| {
        if format == Format::Json {
            // Who reads the events went away: the join goes on without.
            let _ = output::line(&serde_json::to_value(&event).unwrap_or_default());
            return;
        }
        match event {
            Event::Size { bytes, .. } => bar.set_length(bytes),
            Event::Copied {
                table, rows, bytes, ..
            } => {
                bar.inc(bytes);
                bar.set_message(format!("{table}: {rows} rows"));
            }
            Event::Built { what } => bar.set_message(what),
            Event::Step { what } => show(&bar, &what),
            Event::Waiting { on } => show(&bar, &format!("waiting for {on}")),
            Event::Note { text } => show(&bar, &text),
        }
    })
}

fn show(bar: &ProgressBar, text: &str) {
    if bar.is_hidden() {
        eprintln!("{text}");
    } else {
        bar.println(text);
    }
}
