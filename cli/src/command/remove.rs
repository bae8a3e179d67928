//! `anabranch remove`: takes away what `init` made, and the daemon's folder.

use std::io::{BufRead, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anabranch_node::admin;
use anabranch_node::setup::remove::{Removal, plan_removal, remove};
use anabranch_node::setup::{self, Event};
use serde_json::json;

use crate::args::Remove;
use crate::failure::Failure;
use crate::output::{self, Format, say};

pub(crate) async fn run(path: &Path, verb: &Remove, format: Format) -> Result<ExitCode, Failure> {
    let config = super::load(path)?;
    let dir = &config.node.data_dir;
    if admin::status(&dir.join(admin::SOCKET)).await.is_ok() {
        return Err(Failure::Refused(
            "the daemon is running: stop it first".to_owned(),
        ));
    }
    let dsn = super::admin_dsn(&config, verb.admin.admin_dsn.as_deref()).await?;
    let mut client = setup::connect(&dsn).await?;
    let facts = super::facts(&mut client, &config, &super::role(&config)?).await?;
    let removal = plan_removal(&client, &facts).await?;
    let entries = if verb.keep_data_dir {
        Vec::new()
    } else {
        entries(dir)?
    };
    if removal.is_empty() && entries.is_empty() {
        return finish(&[], &removal, format, "nothing to remove\n");
    }
    if !verb.yes && !confirm(&removal, &entries)? {
        return Err(Failure::Refused("nothing was removed".to_owned()));
    }
    let watcher = setup::connect(&dsn).await?;
    let bar = output::spinner();
    let mut done = Vec::new();
    let mut report = |event: Event| match event {
        Event::Did(what) => done.push(what),
        Event::Waiting { what, on } => super::init::waiting(&bar, &what, &on),
    };
    let result = remove(&mut client, &watcher, &removal, &mut report).await;
    bar.finish_and_clear();
    if result.is_ok() {
        for entry in &entries {
            clear(entry)?;
            done.push(format!("remove {}", entry.display()));
        }
    }
    let code = finish(&done, &removal, format, "")?;
    result?;
    Ok(code)
}

fn finish(done: &[String], removal: &Removal, format: Format, text: &str) -> Result<ExitCode, Failure> {
    match format {
        Format::Json => output::json(&json!({ "done": done, "left": removal.left }))?,
        Format::Table => {
            for what in done {
                say(&format!("done: {what}\n"))?;
            }
            if !removal.left.is_empty() {
                say("left, because another database of this server may need it:\n")?;
                for statement in &removal.left {
                    say(&format!("  {statement}\n"))?;
                }
            }
            say(text)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// What is in the daemon's folder. A folder that is clearly something else is not touched.
fn entries(dir: &Path) -> Result<Vec<PathBuf>, Failure> {
    let listed = match std::fs::read_dir(dir) {
        Ok(listed) => listed,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Failure::io(format!("read {}", dir.display()), error)),
    };
    let entries: Result<Vec<PathBuf>, _> = listed.map(|entry| entry.map(|entry| entry.path())).collect();
    let mut entries = entries.map_err(|error| Failure::io(format!("read {}", dir.display()), error))?;
    entries.sort();
    let foreign = ["PG_VERSION", "etc", "bin", ".ssh", "anabranch.toml"];
    let is_foreign = |path: &PathBuf| {
        path.file_name()
            .is_some_and(|name| foreign.iter().any(|each| name == *each))
    };
    if let Some(entry) = entries.iter().find(|entry| is_foreign(entry)) {
        return Err(Failure::Refused(format!(
            "{} holds {}: it is not only the daemon's; empty it by hand and use --keep-data-dir",
            dir.display(),
            entry.display()
        )));
    }
    Ok(entries)
}

fn clear(entry: &Path) -> Result<(), Failure> {
    let is_dir = entry.symlink_metadata().is_ok_and(|metadata| metadata.is_dir());
    let removed = if is_dir {
        std::fs::remove_dir_all(entry)
    } else {
        std::fs::remove_file(entry)
    };
    removed.map_err(|error| Failure::io(format!("remove {}", entry.display()), error))
}

fn confirm(removal: &Removal, entries: &[PathBuf]) -> Result<bool, Failure> {
    if !std::io::stdin().is_terminal() {
        return Err(Failure::Usage(
            "not a terminal: say --yes to remove without being asked".to_owned(),
        ));
    }
    let mut err = std::io::stderr().lock();
    let steps = removal
        .slot
        .iter()
        .chain(&removal.steps)
        .map(|step| step.what.clone());
    let files = entries.iter().map(|entry| format!("remove {}", entry.display()));
    for what in steps.chain(files) {
        let _ = writeln!(err, "  {what}");
    }
    let _ = write!(
        err,
        "The conflict log and what peers have not received yet are lost. Remove all this? [y/N] "
    );
    let _ = err.flush();
    let mut answer = String::new();
    std::io::stdin()
        .lock()
        .read_line(&mut answer)
        .map_err(|error| Failure::io("read the answer", error))?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}
