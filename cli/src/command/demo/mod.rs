//! `anabranch demo`: three throwaway servers with three daemons, and a real conflict, told step by step.
//!
//! Holds: a temporary folder, three servers and three daemons, all gone when the command ends, also when it is killed.
//! Not here: starting and stopping the programs (`member`)

mod member;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::signal::unix::{SignalKind, signal};

use self::member::Member;
use crate::args::Demo;
use crate::failure::Failure;
use crate::output::{self, Format, say, table};

/// How long the members may take to agree before the demo gives up, with what the daemons logged.
const PATIENCE: Duration = Duration::from_secs(60);
const NAMES: [&str; 3] = ["amber", "birch", "cedar"];
const SCHEMA: &str =
    "CREATE TABLE items (id int PRIMARY KEY, name text NOT NULL, stock int NOT NULL, note text)";
const ROWS: &str = "SELECT id::text, name, stock::text, coalesce(note, '') FROM public.items ORDER BY id";

const CONFLICT_IDS: &str = "SELECT coalesce(array_agg(conflict_id::text ORDER BY conflict_id), '{}') FROM anabranch.conflict_history";

type Rows = Vec<[String; 4]>;

pub(crate) async fn run(verb: &Demo, format: Format) -> Result<ExitCode, Failure> {
    let bin = member::find_bin(verb.pg_bin.as_deref())?;
    let folder = tempfile::Builder::new()
        .prefix("anabranch-demo-")
        .tempdir()
        .map_err(|error| Failure::io("make a temporary folder", error))?;
    let path = folder.path().to_owned();
    member::open_to_the_server(&path)?;
    // Kept from here on: whatever happens, the logs are there to be read.
    let kept = if verb.keep { Some(folder.keep()) } else { None };
    let mut terminate =
        signal(SignalKind::terminate()).map_err(|error| Failure::io("handle SIGTERM", error))?;
    tokio::select! {
        // Boxed: holds every connection of the story.
        shown = Box::pin(show(&bin, &path, verb, format)) => shown?,
        _ = tokio::signal::ctrl_c() => aside(format, "\n")?,
        _ = terminate.recv() => aside(format, "\n")?,
    }
    let text = match &kept {
        Some(kept) => format!(
            "Everything is stopped. Files and logs are in {}\n",
            kept.display()
        ),
        None => "Everything is stopped and removed.\n".to_owned(),
    };
    let event = json!({ "event": "stopped", "kept": kept.map(|kept| kept.display().to_string()) });
    tell(format, &text, &event)?;
    Ok(ExitCode::SUCCESS)
}

/// Says it: as `text` for people, as `event` for programs.
fn tell(format: Format, text: &str, event: &Value) -> Result<(), Failure> {
    match format {
        Format::Table => say(text),
        Format::Json => output::line(event),
    }
}

/// Says what people alone want to hear.
fn aside(format: Format, text: &str) -> Result<(), Failure> {
    match format {
        Format::Table => say(text),
        Format::Json => Ok(()),
    }
}

async fn show(bin: &Path, folder: &Path, verb: &Demo, format: Format) -> Result<(), Failure> {
    let (programs, below) = (bin.display().to_string(), folder.display().to_string());
    tell(
        format,
        &format!("Three servers from {programs}, three daemons, below {below}\n\n"),
        &json!({ "event": "started", "programs": programs, "folder": below }),
    )?;
    let mut members = set_up(bin, folder, format).await?;
    start(&mut members).await?;
    tell(
        format,
        "Three daemons run; each is linked to the two others.\n\n",
        &json!({ "event": "linked" }),
    )?;
    write_everywhere(&mut members, format).await?;
    collide(&mut members, format).await?;
    if verb.non_interactive {
        return Ok(());
    }
    poke(&members, format)?;
    std::future::pending().await
}

async fn set_up(bin: &Path, folder: &Path, format: Format) -> Result<Vec<Member>, Failure> {
    let mut addresses = Vec::new();
    for name in NAMES {
        addresses.push((name, member::free_address()?));
    }
    let mut members = Vec::new();
    for at in 0..NAMES.len() {
        let member = Member::create(bin, folder, &addresses, at).await?;
        member
            .admin()
            .await?
            .batch_execute(SCHEMA)
            .await
            .map_err(Failure::query("the demo's table"))?;
        let grants = member.anabranch(&["grants"])?;
        let admin = member.admin().await?;
        admin
            .batch_execute(&grants)
            .await
            .map_err(Failure::query("the answer to the grants"))?;
        member.anabranch(&["init"])?;
        let name = member.name;
        tell(
            format,
            &format!("{name}: server started, `anabranch grants | psql`, `anabranch init` done\n"),
            &json!({ "event": "set_up", "node": name }),
        )?;
        members.push(member);
    }
    Ok(members)
}

async fn start(members: &mut [Member]) -> Result<(), Failure> {
    for member in members.iter_mut() {
        member.start_daemon()?;
    }
    let started = Instant::now();
    loop {
        let mut linked = true;
        for member in members.iter_mut() {
            linked &= member.linked_to_all().await?;
        }
        if linked {
            return Ok(());
        }
        if started.elapsed() > PATIENCE {
            return Err(gave_up("the daemons do not find each other", members));
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

async fn write_everywhere(members: &mut [Member], format: Format) -> Result<(), Failure> {
    aside(format, "A row written at each server:\n")?;
    for (id, (member, item)) in (1..).zip(members.iter().zip(["anvil", "bellows", "chisel"])) {
        let sql = format!(
            "INSERT INTO items VALUES ({id}, '{item}', 10, 'written at {}')",
            member.name
        );
        write(member, &sql, format).await?;
    }
    let started = Instant::now();
    let rows = agree(members, 3).await?;
    let ms = started.elapsed().as_millis() as u64;
    tell(
        format,
        &format!("\nAfter {ms} ms all three hold:\n{}\n", shown(&rows)),
        &json!({ "event": "equal", "ms": ms, "rows": documents(&rows) }),
    )
}

async fn collide(members: &mut [Member], format: Format) -> Result<(), Failure> {
    tell(
        format,
        "Now the daemons stop, so the servers are cut off from each other, and all three change the same row:\n",
        &json!({ "event": "apart" }),
    )?;
    for member in members.iter_mut() {
        member.stop_daemon()?;
    }
    for (member, stock) in members.iter().zip([7, 8, 9]) {
        write(
            member,
            &format!(
                "UPDATE items SET stock = {stock}, note = 'counted at {}' WHERE id = 1",
                member.name
            ),
            format,
        )
        .await?;
    }
    let before = snapshot(members).await?;
    for (member, rows) in members.iter().zip(&before) {
        let stock = rows.first().map_or("?", |[_, _, stock, _]| stock);
        tell(
            format,
            &format!("  {} says stock = {stock}\n", member.name),
            &json!({ "event": "holds", "node": member.name, "rows": documents(rows) }),
        )?;
    }
    aside(
        format,
        "\nThe daemons start again. The latest write wins, at every node:\n",
    )?;
    let started = Instant::now();
    start(members).await?;
    let rows = agree(members, 3).await?;
    let mut text = String::new();
    for member in members.iter() {
        text.push_str(&format!("{}:\n{}", member.name, shown(&rows)));
    }
    let ms = started.elapsed().as_millis() as u64;
    let event = json!({ "event": "equal", "ms": ms, "rows": documents(&rows) });
    tell(format, &text, &event)?;
    log_lines(members, format).await
}

/// Waits until every node's log holds the same lost writes, and shows one node's.
async fn log_lines(members: &mut [Member], format: Format) -> Result<(), Failure> {
    let started = Instant::now();
    let ids = loop {
        let mut logs = Vec::new();
        for member in members.iter() {
            let failed = Failure::query("the conflict log");
            let client = member.admin().await?;
            let row = client.query_one(CONFLICT_IDS, &[]).await.map_err(&failed)?;
            logs.push(row.try_get::<_, Vec<String>>(0).map_err(&failed)?);
        }
        // Three concurrent writes, one winner: two were lost, and every node knows both.
        let same = logs.windows(2).all(|pair| pair.first() == pair.last());
        if same
            && let Some(ids) = logs.into_iter().next()
            && ids.len() >= 2
        {
            break ids;
        }
        if started.elapsed() > PATIENCE {
            return Err(gave_up("the lost writes are not in every conflict log", members));
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    let Some(first) = members.first() else {
        return Ok(());
    };
    let list = first.anabranch(&["conflicts", "list"])?;
    tell(
        format,
        &format!(
            "\nThe lost writes are logged, under the same ids at all three. `anabranch conflicts list` at {}:\n{list}",
            first.name
        ),
        &json!({ "event": "logged", "conflict_ids": ids }),
    )
}

fn poke(members: &[Member], format: Format) -> Result<(), Failure> {
    let mut text = "\nPoke at it:\n".to_owned();
    for member in members {
        text.push_str(&format!("  {}\n", member.psql()));
    }
    text.push_str(
        "Such as: UPDATE items SET stock = stock - 1 WHERE id = 2; and SELECT * FROM items; elsewhere.\n",
    );
    if let Some(first) = members.first() {
        for verb in ["status", "conflicts list", "doctor"] {
            text.push_str(&format!(
                "  {} {verb} --config {}\n",
                member::program()?.display(),
                first.config().display()
            ));
        }
    }
    text.push_str("\nCtrl-C stops and removes everything.\n");
    let node = |member: &Member| {
        let config = member.config().display().to_string();
        json!({ "node": member.name, "psql": member.psql(), "config": config })
    };
    let nodes: Value = members.iter().map(node).collect();
    tell(format, &text, &json!({ "event": "ready", "nodes": nodes }))
}

async fn write(member: &Member, sql: &str, format: Format) -> Result<(), Failure> {
    tell(
        format,
        &format!("  {}: {sql};\n", member.name),
        &json!({ "event": "write", "node": member.name, "sql": sql }),
    )?;
    member
        .admin()
        .await?
        .batch_execute(sql)
        .await
        .map_err(Failure::query("the answer to the write"))
}

async fn snapshot(members: &[Member]) -> Result<Vec<Rows>, Failure> {
    let mut all = Vec::new();
    for member in members {
        let failed = Failure::query("the demo's table");
        let rows = member.admin().await?.query(ROWS, &[]).await.map_err(&failed)?;
        let rows: Result<Rows, tokio_postgres::Error> = rows
            .iter()
            .map(|row| Ok([row.try_get(0)?, row.try_get(1)?, row.try_get(2)?, row.try_get(3)?]))
            .collect();
        all.push(rows.map_err(&failed)?);
    }
    Ok(all)
}

/// Waits until all members hold the same rows, at least `least` of them.
async fn agree(members: &[Member], least: usize) -> Result<Rows, Failure> {
    let started = Instant::now();
    loop {
        let all = snapshot(members).await?;
        let same = all.windows(2).all(|pair| pair.first() == pair.last());
        match all.into_iter().next() {
            Some(rows) if same && rows.len() >= least => return Ok(rows),
            _ if started.elapsed() > PATIENCE => return Err(gave_up("the servers do not agree", members)),
            _ => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}

fn shown(rows: &Rows) -> String {
    table(["id", "name", "stock", "note"], rows.iter().cloned())
}

/// The same rows for programs.
fn documents(rows: &Rows) -> Value {
    let document = |row: &[String; 4]| {
        let [id, name, stock, note] = row;
        json!({ "id": id, "name": name, "stock": stock, "note": note })
    };
    rows.iter().map(document).collect()
}

fn gave_up(what: &str, members: &[Member]) -> Failure {
    let logs: String = members.iter().map(Member::log_tail).collect();
    Failure::Refused(format!(
        "{what} within {} s; the daemons' last words:\n{logs}",
        PATIENCE.as_secs()
    ))
}

/// Where the demo keeps one member's files.
fn home(folder: &Path, name: &str) -> PathBuf {
    folder.join(name)
}
