//! `anabranch heal`: its events become lines, bars' worth of words or JSON; its report a table.

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anabranch_node::heal::{self, Event, Lifted, Options, Report, Stop, Watch};
use anabranch_node::verify;
use tokio::signal::unix::{SignalKind, signal};

use crate::args::{self, Heal};
use crate::failure::Failure;
use crate::output::{self, Format, say_plainly};

/// Rows that are listed for people; JSON has all.
const SHOWN_MAX: usize = 50;

pub(crate) async fn run(path: &Path, verb: &Heal, format: Format) -> Result<ExitCode, Failure> {
    // The daemon that runs meanwhile has something to say when it goes wrong.
    super::run::log(args::LogFormat::Text, "warn");
    let config = super::load(path)?;
    refuse_another_user(&config.node.data_dir)?;
    let options = Options {
        dry_run: verb.dry_run,
        deleted: match verb.deleted {
            args::Deleted::BringBack => heal::Deleted::BringBack,
            args::Deleted::Delete => heal::Deleted::Delete,
        },
        leave_merged: verb.leave_merged,
        wait_s: verb.wait,
        rate: verb.rate,
    };
    let hinted = AtomicBool::new(false);
    let watch: Watch = Arc::new(move |event: Event| {
        show(&event, format);
        let waits = matches!(event, Event::Waiting { .. }) && format == Format::Table;
        if waits && !hinted.swap(true, Ordering::Relaxed) {
            output::remark(
                "(Ctrl-C ends the waiting, and nothing is lost: run again, it goes on where it was)",
            );
        }
    });
    let stop = until_interrupted(format)?;
    let report = match Box::pin(heal::run(&config, &options, &watch, &stop)).await {
        Err(ended @ heal::Error::Interrupted(_)) => {
            let failure = Failure::from(ended);
            crate::report(&failure, format);
            // There and then: a thread that reads the whole journal would be waited for, with nobody left to hear another signal.
            std::process::exit(1);
        }
        done => done?,
    };
    if format == Format::Table {
        say_plainly(&words(&report))?;
    }
    let is_whole = report.differences.is_empty() && report.refused.is_empty();
    Ok(if report.dry_run || report.healed && is_whole {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Turns true at SIGINT or SIGTERM. Another one ends the process there and then.
fn until_interrupted(format: Format) -> Result<Stop, Failure> {
    let mut terminate =
        signal(SignalKind::terminate()).map_err(|error| Failure::io("handle SIGTERM", error))?;
    let mut interrupt =
        signal(SignalKind::interrupt()).map_err(|error| Failure::io("handle SIGINT", error))?;
    let (ending, stop) = tokio::sync::watch::channel(false);
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            if ending.send_replace(true) {
                std::process::exit(1);
            }
            if format == Format::Table {
                output::remark("ending; once more, and it ends at once");
            }
        }
    });
    Ok(stop)
}

/// What another user than the daemon's makes in its folder, the daemon could not open.
fn refuse_another_user(dir: &Path) -> Result<(), Failure> {
    let file = dir.join("node.json");
    let user = rustix::process::geteuid().as_raw();
    match std::fs::metadata(&file) {
        Ok(metadata) if metadata.uid() != user => Err(Failure::Refused(format!(
            "{} is of user {}, and this runs as user {user}, so the daemon could not open what is made here. Run it as the daemon's user: \
             `runuser -u anabranch -- anabranch heal`; or give that user the folder (chown -R)",
            file.display(),
            metadata.uid()
        ))),
        _ => Ok(()),
    }
}

/// Events are JSON on standard output for programs, the report among them; for people they go to standard error.
fn show(event: &Event, format: Format) {
    if format == Format::Json {
        // Who reads the events went away: the heal goes on without.
        let _ = output::line(&serde_json::to_value(event).unwrap_or_default());
        return;
    }
    match event {
        Event::Step { what } => output::remark(what),
        // What sessions say is theirs, and steers no terminal.
        Event::Waiting { on } => output::remark(output::plain(&format!("waiting for {on}"))),
        Event::Found { table, rows } => output::remark(format_args!(
            "{table}: {rows} rows were written since the slot was lost"
        )),
        Event::Lifted { what } => output::remark(lifted(what)),
        Event::PutBack { rows } => output::remark(format_args!("{rows} rows put back")),
        Event::Again { rows } => output::remark(format_args!("{rows} rows written again")),
        Event::Compare {
            what: verify::Event::Step { table, what, .. },
        } => output::remark(format_args!("{table}: {what}")),
        Event::Compare {
            what: verify::Event::Waiting { on },
        } => output::remark(output::plain(&format!("waiting for {}", on.join("; ")))),
        Event::Compare { .. } | Event::Report(_) => {}
    }
}

fn lifted(what: &Lifted) -> String {
    format!("sequence {} was lifted above {}", what.sequence, what.above)
}

fn words(report: &Report) -> String {
    let mut out = String::new();
    let rows = report.tables.iter().flat_map(|(table, done)| {
        let rows = done.iter();
        rows.map(|(what, count)| [table.clone(), count.to_string(), what.clone()])
    });
    let rows: Vec<[String; 3]> = rows.collect();
    if report.journal_made_anew && rows.is_empty() {
        // The notes say it.
    } else if rows.is_empty() {
        out.push_str("no row was written or deleted here since the slot was lost\n");
    } else {
        out.push_str(&output::table(["table", "rows", "what"], rows));
    }
    for (table, differences) in &report.differences {
        for row in differences.iter().take(SHOWN_MAX) {
            let images = row.images.iter().map(|(node, image)| match image {
                None => format!("no row at {node}"),
                Some(number) => format!("row {number} at {node}"),
            });
            let images = images.collect::<Vec<_>>().join(", ");
            out.push_str(&format!("{table} {}: DIFFERS STILL: {images}\n", row.key));
        }
        if differences.len() > SHOWN_MAX {
            out.push_str(&format!(
                "{table}: {} more; --output json has all\n",
                differences.len() - SHOWN_MAX
            ));
        }
    }
    for (table, rows) in &report.refused {
        out.push_str(&format!(
            "{table}: {rows} rows that this server lacked are REFUSED by it, and are in the record alone, with the reasons: mend what \
             these name, and write the rows by hand\n"
        ));
    }
    for what in &report.lifted {
        out.push_str(&format!("{}\n", lifted(what)));
    }
    for note in &report.notes {
        out.push_str(&format!("{note}\n"));
    }
    for problem in &report.problems {
        out.push_str(&format!("NOT FINISHED: {problem}\n"));
    }
    if let Some(record) = &report.record {
        out.push_str(&format!("each row is in {}\n", record.display()));
    }
    out.push_str(if report.dry_run && report.journal_made_anew {
        "nothing was changed\n"
    } else if report.dry_run {
        "nothing was changed; rows deleted since are found only when it is done\n"
    } else if !report.healed {
        "not finished: start the daemon, and run `anabranch heal` again once the above is mended\n"
    } else if !report.refused.is_empty() {
        "healed, but for the rows that were refused\n"
    } else if !report.differences.is_empty() {
        "healed, but rows differ for another reason: `anabranch repair` writes them as they are at the node that you name\n"
    } else {
        "healed\n"
    });
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_folder_of_another_user_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        assert!(refuse_another_user(folder.path()).is_ok());
        let file = folder.path().join("node.json");
        std::fs::write(&file, "{}").unwrap();
        assert!(refuse_another_user(folder.path()).is_ok());
        if rustix::process::geteuid().is_root() {
            std::os::unix::fs::chown(&file, Some(12_345), None).unwrap();
            let said = refuse_another_user(folder.path()).unwrap_err().to_string();
            assert!(said.contains("is of user 12345"), "{said}");
        }
    }

    #[test]
    fn a_report_says_what_was_done_and_what_is_left() {
        let mut report = Report {
            healed: true,
            ..Report::default()
        };
        assert!(words(&report).ends_with("healed\n"));
        report.refused.insert("public.item".to_owned(), 2);
        let text = words(&report);
        assert!(text.contains("2 rows") && !text.ends_with("healed\n"), "{text}");
        report.refused.clear();
        let done = [("written again".to_owned(), 3)].into();
        report.tables.insert("public.item".to_owned(), done);
        report.problems.push("n2 is away".to_owned());
        report.healed = false;
        let text = words(&report);
        assert!(
            text.contains("public.item") && text.contains("written again"),
            "{text}"
        );
        assert!(text.contains("NOT FINISHED: n2 is away"), "{text}");
    }
}
