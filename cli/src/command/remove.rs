//! `anabranch remove`: takes away what `init` made, and the daemon's folder.

use std::io::{BufRead, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anabranch_node::admin;
use anabranch_node::config::Config;
use anabranch_node::membership;
use anabranch_node::setup::facts::Facts;
use anabranch_node::setup::remove::{Removal, plan_removal, remove};
use anabranch_node::setup::{self, Event};
use serde_json::json;
use tokio_postgres::Client;

use crate::args::Remove;
use crate::failure::Failure;
use crate::output::{self, Format, say};

pub(crate) async fn run(path: &Path, verb: &Remove, format: Format) -> Result<ExitCode, Failure> {
    let config = super::load(path)?;
    let dir = &config.node.data_dir;
    if admin::is_running(&dir.join(admin::SOCKET)).await {
        return Err(Failure::Refused(
            "the daemon is running: stop it first".to_owned(),
        ));
    }
    let dsn = super::admin_dsn(&config, verb.admin.admin_dsn.as_deref()).await?;
    let mut client = setup::connect(&dsn).await?;
    let facts = super::facts(&mut client, &config, &super::role(&config)?).await?;
    if !verb.without_leaving {
        refuse_live(&client, &facts, &config).await?;
    }
    let removal = plan_removal(&client, &facts).await?;
    let (entries, rest) = if verb.keep_data_dir {
        (Vec::new(), None)
    } else {
        entries(dir, &facts)?
    };
    if removal.is_empty() && entries.is_empty() {
        return finish(&[], (&removal, rest), format, "nothing to remove\n");
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
    let code = finish(&done, (&removal, rest), format, "")?;
    result?;
    Ok(code)
}

fn finish(
    done: &[String],
    (removal, files): (&Removal, Option<String>),
    format: Format,
    text: &str,
) -> Result<ExitCode, Failure> {
    match format {
        Format::Json => {
            output::json(&json!({ "done": done, "left": removal.left, "files_left": files }))?;
        }
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
            if let Some(files) = files {
                say(&format!("left, {files}\n"))?;
            }
            say(text)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// May it be taken away? A live member has rows that the others may lack, and they keep their journals for it.
async fn refuse_live(client: &Client, facts: &Facts, config: &Config) -> Result<(), Failure> {
    let has = |name: &str| facts.ours.tables.iter().any(|table| table == name);
    let (Some(node), true) = (&facts.ours.node, has("member") && has("leaving")) else {
        return Ok(());
    };
    let ask = Failure::query("whether the node has left");
    // A daemon writes its clock from its first second on.
    let row = client
        .query_one(
            "SELECT EXISTS (SELECT FROM anabranch.clock WHERE node_id = $1 AND witness_us > 0),
                    EXISTS (SELECT FROM anabranch.leaving WHERE left_at IS NOT NULL)",
            &[&node.node_id],
        )
        .await
        .map_err(&ask)?;
    let (has_run, has_left): (bool, bool) = (row.try_get(0).map_err(&ask)?, row.try_get(1).map_err(&ask)?);
    let members = membership::read(client).await.map_err(&ask)?;
    let own = config.node.id;
    let others: Vec<String> = members
        .live()
        .into_iter()
        .filter(|&id| id != own)
        .map(|id| members.name(id))
        .collect();
    if !has_run || has_left || others.is_empty() || members.dropped().contains_key(&own) {
        return Ok(());
    }
    Err(Failure::Refused(format!(
        "node `{}` is a member, as {} still are: what it has not sent yet would be lost, and they would keep their journals for it \
         for ever. Run `anabranch leave` first. If it was dropped (`anabranch node drop` at a member), or this database is only a copy \
         of the node's, add --without-leaving",
        node.name,
        others.join(", ")
    )))
}

/// What the daemon keeps in its folder: only that is deleted. The records of heals stay: people are told to keep them.
fn is_ours(name: &str) -> bool {
    let whole = name.strip_suffix(".new").unwrap_or(name);
    whole.starts_with("journal.lost-") || FILES.contains(&whole) || name == OWNER
}

const FILES: [&str; 20] = [
    "admin.sock",
    "admin",
    "agreed-policy",
    "apply-session",
    "checkpoint.json",
    "heal.json",
    "horizon.json",
    "index",
    "join.json",
    "join_stage.json",
    "journal",
    "peers.json",
    "policy.txt",
    "policy_before.json",
    "policy_change.txt",
    "policy_file.txt",
    "publication.json",
    "server.json",
    "settled.json",
    ".doctor",
];
/// Says whose folder it is. Deleted last, so that who was interrupted goes on.
const OWNER: &str = "node.json";

/// What of the daemon's folder is to be deleted; and what is to be said of the rest.
fn entries(dir: &Path, facts: &Facts) -> Result<(Vec<PathBuf>, Option<String>), Failure> {
    let failed = |error| Failure::io(format!("read {}", dir.display()), error);
    let listed = match std::fs::read_dir(dir) {
        Ok(listed) => listed,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok((Vec::new(), None)),
        Err(error) => return Err(failed(error)),
    };
    let listed: Result<Vec<PathBuf>, _> = listed.map(|entry| entry.map(|entry| entry.path())).collect();
    let mut listed = listed.map_err(failed)?;
    if listed.is_empty() {
        return Ok((Vec::new(), None));
    }
    let owner = match std::fs::read(dir.join(OWNER)) {
        Ok(text) => serde_json::from_slice::<serde_json::Value>(&text).unwrap_or_default(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let text = format!(
                "{}: there is no {OWNER} in it, so it is not known to be the daemon's; delete by hand what is",
                dir.display()
            );
            return Ok((Vec::new(), Some(text)));
        }
        Err(error) => return Err(failed(error)),
    };
    let incarnation = owner.get("incarnation").and_then(serde_json::Value::as_str);
    let node = facts.ours.node.as_ref();
    if incarnation.is_none() || node.is_some_and(|node| incarnation != Some(node.incarnation.as_str())) {
        return Err(Failure::Refused(format!(
            "{} in {} is another node's: correct node.data_dir or --admin-dsn, or use --keep-data-dir",
            OWNER,
            dir.display()
        )));
    }
    listed.sort();
    let name = |path: &PathBuf| {
        path.file_name()
            .and_then(|name| name.to_str())
            .unwrap_or_default()
            .to_owned()
    };
    let (mut ours, rest): (Vec<PathBuf>, Vec<PathBuf>) =
        listed.into_iter().partition(|path| is_ours(&name(path)));
    ours.sort_by_key(|path| name(path) == OWNER);
    let rest: Vec<String> = rest.iter().map(name).collect();
    let text = format!("in {}: {}", dir.display(), rest.join(", "));
    Ok((ours, (!rest.is_empty()).then_some(text)))
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

#[cfg(test)]
mod tests {
    use anabranch_node::setup::facts::NodeRow;

    use super::*;

    fn facts(incarnation: Option<&str>) -> Facts {
        let mut facts = Facts::default();
        facts.ours.node = incarnation.map(|incarnation| NodeRow {
            incarnation: incarnation.to_owned(),
            ..NodeRow::default()
        });
        facts
    }

    fn names(of: &[PathBuf]) -> Vec<String> {
        let name = |path: &PathBuf| path.file_name().unwrap().to_str().unwrap().to_owned();
        of.iter().map(name).collect()
    }

    #[test]
    fn only_what_the_daemon_makes_is_deleted_and_only_in_its_own_folder() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path();
        for name in ["15", "journal", "journal.lost-7", "index"] {
            std::fs::create_dir(dir.join(name)).unwrap();
        }
        for name in [
            "heal-7.ndjson",
            "heal.json",
            "journal.txt",
            "checkpoint.json.new",
            "notes",
        ] {
            std::fs::write(dir.join(name), "x").unwrap();
        }
        // Not known to be the daemon's.
        let (ours, rest) = entries(dir, &facts(Some("i1"))).unwrap();
        assert!(ours.is_empty() && rest.unwrap().contains("no node.json"));
        std::fs::write(
            dir.join(OWNER),
            r#"{"node_id": 1, "cluster_id": "c", "incarnation": "i1"}"#,
        )
        .unwrap();
        assert!(entries(dir, &facts(Some("i2"))).is_err());
        for known in [Some("i1"), None] {
            let (ours, rest) = entries(dir, &facts(known)).unwrap();
            let wanted = [
                "checkpoint.json.new",
                "heal.json",
                "index",
                "journal",
                "journal.lost-7",
                "node.json",
            ];
            assert_eq!(names(&ours), wanted);
            let rest = rest.unwrap();
            assert!(rest.ends_with("15, heal-7.ndjson, journal.txt, notes"), "{rest}");
        }
    }
}
