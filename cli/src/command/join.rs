//! `anabranch join`: checks first, then copies, with a bar for people and events for programs.

use std::path::Path;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anabranch_node::join::{self, Event, Options, Report};
use anabranch_node::setup::{Level, worst};
use indicatif::{HumanCount, ProgressBar, ProgressStyle};
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
        donor_dsn: super::dsn_of("--from-dsn", &verb.from_dsn)?,
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

/// A spinner, until there is something to copy.
fn bar() -> ProgressBar {
    let bar = output::spinner();
    set_style(&bar, STEP);
    bar
}

/// A step whose length nobody knows.
const STEP: &str = "{spinner} {msg} {elapsed}";

/// The copy: bytes are the donor's, as its server says how large its tables are.
const COPY: &str =
    "{wide_bar} {binary_bytes} of {binary_total_bytes}, {binary_bytes_per_sec}, {eta} left\n{msg}";

/// Where standard error is a file, how often it is told how far the copy is.
const TOLD_EVERY: Duration = Duration::from_secs(10);

fn set_style(bar: &ProgressBar, template: &str) {
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
}

fn end(format: Format, event: &str, text: &str) -> Result<(), Failure> {
    match format {
        Format::Table => say(text),
        Format::Json => output::line(&json!({ "event": event })),
    }
}

/// Events as lines for programs, or as a bar and lines for people.
fn report(bar: &ProgressBar, format: Format) -> Report {
    let bar = bar.clone();
    let copied = Mutex::new(Copying::default());
    Arc::new(move |event: Event| {
        if format == Format::Json {
            // Who reads the events went away: the join goes on without.
            let _ = output::line(&serde_json::to_value(&event).unwrap_or_default());
            return;
        }
        match event {
            Event::Size { bytes, .. } => {
                *copied.lock().unwrap_or_else(PoisonError::into_inner) = Copying::default();
                bar.reset();
                bar.set_length(bytes);
                set_style(&bar, COPY);
            }
            Event::Copied {
                table,
                rows,
                bytes,
                before,
            } => {
                bar.inc(bytes);
                if before {
                    // What an earlier run copied says nothing of how fast this one is.
                    bar.reset_eta();
                }
                let mut copied = copied.lock().unwrap_or_else(PoisonError::into_inner);
                copied.rows = copied.rows.saturating_add(rows);
                let text = format!("{} rows, the last of {table}", HumanCount(copied.rows));
                if bar.is_hidden() && copied.told.is_none_or(|told| told.elapsed() > TOLD_EVERY) {
                    copied.told = Some(Instant::now());
                    output::remark(format_args!(
                        "copied {} of {}: {text}",
                        output::bytes(bar.position()),
                        output::bytes(bar.length().unwrap_or(0))
                    ));
                }
                bar.set_message(text);
            }
            Event::Built { what } => bar.set_message(what),
            Event::Step { what } => {
                set_style(&bar, STEP);
                show(&bar, &what);
                bar.set_message(what);
            }
            Event::Waiting { on } => show(&bar, &format!("waiting for {on}")),
            Event::Note { text } => show(&bar, &text),
        }
    })
}

/// What was copied by now.
#[derive(Default)]
struct Copying {
    rows: u64,
    told: Option<Instant>,
}

fn show(bar: &ProgressBar, text: &str) {
    if bar.is_hidden() {
        output::remark(text);
    } else {
        bar.println(text);
    }
}
