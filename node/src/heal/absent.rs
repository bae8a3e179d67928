//! What was deleted while nothing was decoded: rows that this node alone lacks once all that is known is applied everywhere. Where there is
//! no other node nothing is to be found.
//!
//! In:   a daemon of this node, the others            Out: rows brought back, or deleted everywhere; the report
//! Holds: keys of rows that differ
//! Invariants: 1. a row is in the record before anything is done to it; 2. what somebody has written since it was brought
//!        back is not deleted
//! On crash: run again, it compares again
//! Not here: comparing and bringing back (`crate::verify`)

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::path::Path;
use std::time::Duration;

use anabranch_proto::schema::{full_name, split_name};
use serde_json::Value;
use serde_json::value::RawValue;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use super::state::Line;
use super::tail::REFUSED;
use super::waits::{Stop, holders, interrupted, told, unless};
use super::{Deleted, Error, Event, Options, Phase, Record, Report, State, Watch, io, refused, text_of};
use crate::apply::passed_over;
use crate::config::Config;
use crate::verify::table::Compared;
use crate::verify::{self, Difference, TableReport};
use crate::{admin, daemon, pg};

/// How long the daemon may take to come up: it rebuilds its index from the journal.
const START_PATIENCE: Duration = Duration::from_secs(600);
/// That it is waited for is said this often.
const START_TOLD: Duration = Duration::from_secs(15);
/// Rows of one table in one round.
const ROWS_MAX: u32 = 50_000;
/// Rounds, each of that many rows of each table.
const ROUNDS_MAX: u32 = 200;
/// Tries of a deletion that meets locks, each of half a minute.
const TRIES: u32 = 20;

/// What the record says of a row before it is brought back to be deleted everywhere, and after that.
const TO_DELETE: &str = "deleted here unheard of: to be deleted everywhere";
const DELETED: &str = "deleted everywhere";

/// Compares all nodes, and does to rows that this one alone lacks what was asked for. Where no daemon runs, one does
/// meanwhile, in this process.
pub(super) async fn finish(
    config: &Config,
    options: &Options,
    state: State,
    runs: bool,
    (watch, stop): (&Watch, &Stop),
) -> Result<Report, Error> {
    let dir = &config.node.data_dir;
    if is_alone(config).await? {
        return alone(config, state);
    }
    if runs {
        return unless(stop, dir, Box::pin(compare(config, options, state, watch))).await;
    }
    watch(Event::Step {
        what: "running the daemon, to hear of the others".to_owned(),
    });
    let (halt, halted) = watch::channel(false);
    let mut daemon = tokio::spawn(daemon::run(config.clone(), halted));
    let compared = tokio::select! {
        ended = &mut daemon => return match ended {
            Ok(Err(error)) => Err(Error::Daemon(Box::new(error))),
            _ => refused("the daemon ended unexpectedly"),
        },
        compared = async {
            let socket = dir.join(admin::SOCKET);
            let until = Instant::now() + START_PATIENCE;
            let mut said = Instant::now();
            while let Err(error) = admin::status(&socket).await {
                if Instant::now() > until {
                    return Err(error.into());
                }
                if said.elapsed() > START_TOLD {
                    said = Instant::now();
                    let on = "the daemon run for it, which reads the journal, or waits for its server".to_owned();
                    watch(Event::Waiting { on });
                }
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
            compare(config, options, state, watch).await
        } => compared,
        () = told(stop.clone()) => Err(interrupted(dir)),
    };
    halt.send_replace(true);
    // What it says now is said at its next start.
    let _ = daemon.await;
    compared
}

/// Does nobody else hold rows?
async fn is_alone(config: &Config) -> Result<bool, Error> {
    let (sql, _driver) = pg::connect(&config.postgres, "heal").await?;
    let members = daemon::read_members(config, &sql).await?;
    Ok(members.peers(config.node.id, &config.peers).is_empty())
}

/// What a node that is alone has deleted is deleted everywhere: there is nobody to compare with, and nothing to bring back.
fn alone(config: &Config, mut state: State) -> Result<Report, Error> {
    let dir = &config.node.data_dir;
    let mut report = begun(&state, &state.record(dir));
    report.notes.push(
        "this cluster has no other node: rows that were deleted are gone, and nobody else is to hear of it"
            .to_owned(),
    );
    report.tables = summary(state.record(dir).path())?;
    report.refused = refused_of(&report.tables);
    state.phase = Phase::Done;
    state.keep(dir).map_err(io("write heal.json"))?;
    report.healed = true;
    Ok(report)
}

/// What there is to say before anything is compared.
fn begun(state: &State, record: &Record) -> Report {
    Report {
        slot_at: text_of(state.slot_at),
        record: Some(record.path().to_owned()),
        lifted: state.lifted.clone(),
        notes: state
            .lacked
            .iter()
            .map(|lacked| format!("{lacked}: they were put back"))
            .chain(state.sequences.iter().cloned())
            .collect(),
        ..Report::default()
    }
}

async fn compare(
    config: &Config,
    options: &Options,
    mut state: State,
    watch: &Watch,
) -> Result<Report, Error> {
    let dir = &config.node.data_dir;
    let mut record = state.record(dir);
    let mut report = begun(&state, &record);
    watch(Event::Step {
        what: "looking for rows deleted since the slot was lost".to_owned(),
    });
    let until = Instant::now() + Duration::from_secs(options.wait_s.into());
    let mut rounds = 0;
    let last = loop {
        rounds += 1;
        let planned = verify(config, options, (true, until), watch).await?;
        if !planned.problems.is_empty() {
            break planned;
        }
        let what = match options.deleted {
            Deleted::BringBack => "deleted here unheard of: to be brought back",
            Deleted::Delete => TO_DELETE,
        };
        let mut found = 0;
        for table in &planned.tables {
            let rows: Vec<Line> = wanted(config, table)
                .map(|row| line(what, &table.table, &row.key))
                .collect();
            found += rows.len();
            record.add(&rows).map_err(io("write the record"))?;
        }
        record.sync().map_err(io("write the record"))?;
        if found == 0 {
            break planned;
        }
        let done = verify(config, options, (false, until), watch).await?;
        settle(config, options, &done.tables, (&mut record, watch)).await?;
        let more = done.tables.iter().any(|table| table.more);
        if !done.problems.is_empty() || !more || rounds >= ROUNDS_MAX {
            break done;
        }
    };
    report.problems = last.problems;
    let passed = passed(config).await?;
    for table in last.tables {
        if passed.contains(&table.table) {
            let text = "is not replicated at this node, and was not compared";
            report.notes.push(format!("{}: {text}", table.table));
            continue;
        }
        let open: Vec<Difference> = table.differences.into_iter().filter(|row| !row.mended).collect();
        for shape in table.shape {
            report.problems.push(format!("{}: {shape}", table.table));
        }
        // Rows that are missing are found by their keys.
        for types in table.types {
            report.notes.push(format!("{}: {types}", table.table));
        }
        if table.more {
            report
                .problems
                .push(format!("{}: there is more that differs", table.table));
        }
        if !table.undecided.is_empty() {
            // Who lacks them gets them with their next write.
            let text = "rows are written all the time, and were not compared";
            report
                .notes
                .push(format!("{}: {} {text}", table.table, table.undecided.len()));
        }
        if !open.is_empty() {
            report.differences.insert(table.table, open);
        }
    }
    report.healed = report.problems.is_empty();
    if report.healed {
        state.phase = Phase::Done;
        state.keep(dir).map_err(io("write heal.json"))?;
    }
    record.sync().map_err(io("write the record"))?;
    report.tables = summary(record.path())?;
    for (table, keys) in undeleted(record.path())? {
        report.notes.push(format!(
            "{table}: {} rows that were to be deleted everywhere are not: a heal that was ended had brought them back, or somebody \
             has written them since; the record names them, delete those that are to go",
            keys.len()
        ));
    }
    Ok(report)
}

/// Tables that are not replicated here, as a comparison names them.
async fn passed(config: &Config) -> Result<BTreeSet<String>, Error> {
    let (sql, _driver) = pg::connect(&config.postgres, "heal").await?;
    let passed = passed_over::all(&sql, config).await?;
    Ok(passed
        .into_iter()
        .map(|(schema, name)| full_name(&schema, &name))
        .collect())
}

/// Rows that this node alone lacks.
fn wanted<'a>(config: &'a Config, table: &'a TableReport) -> impl Iterator<Item = &'a Difference> {
    let insert = |row: &&Difference| {
        let mut actions = row.actions.iter();
        actions.any(|action| {
            action.node == config.node.name && action.what == "insert" && action.refused.is_none()
        })
    };
    table.differences.iter().filter(insert)
}

fn line(did: &str, table: &str, key: &Value) -> Line {
    Line::of(did, table).with("key", key)
}

/// Has all nodes compared, again and again while one is away or behind.
async fn verify(
    config: &Config,
    options: &Options,
    (dry_run, until): (bool, Instant),
    watch: &Watch,
) -> Result<verify::Report, Error> {
    let socket = config.node.data_dir.join(admin::SOCKET);
    let mut said = String::new();
    loop {
        // Another's, whichever: where a row is absent here alone, they agree.
        let (sql, _driver) = pg::connect(&config.postgres, "heal").await?;
        let members = daemon::read_members(config, &sql).await?;
        let others = members.peers(config.node.id, &config.peers);
        let Some(other) = others.into_iter().next() else {
            return refused("this cluster has no other node");
        };
        let asked = verify::Options {
            tables: Vec::new(),
            rate: options.rate,
            rows_max: ROWS_MAX,
            // A row that is written all the time comes with its next write.
            patience_s: 5,
            repair: Some(verify::Repair {
                from: Some(other.name),
                dry_run,
                absent_at: Some(config.node.name.clone()),
            }),
            add: None,
        };
        let mut report = None;
        let asked = admin::verify(&socket, &asked, |event| match event {
            verify::Event::Report(last) => report = Some(last),
            what => watch(Event::Compare { what }),
        });
        let problem = match asked.await {
            Ok(()) => match report {
                Some(report) if report.problems.is_empty() || Instant::now() > until => return Ok(report),
                Some(report) => report.problems.join("; "),
                None => "the daemon begins anew".to_owned(),
            },
            Err(error) if Instant::now() > until => return Err(error.into()),
            Err(error) => error.to_string(),
        };
        if said != problem {
            watch(Event::Waiting { on: problem.clone() });
            said = problem;
        }
        tokio::time::sleep(Duration::from_secs(2)).await;
    }
}

/// Rows were brought back: says so, or deletes them again where everybody hears of it.
async fn settle(
    config: &Config,
    options: &Options,
    tables: &[TableReport],
    (record, watch): (&mut Record, &Watch),
) -> Result<(), Error> {
    let (sql, _driver) = pg::connect(&config.postgres, "heal").await?;
    // Hashes depend on some of them.
    sql.batch_execute(verify::table::SETTINGS).await?;
    sql.batch_execute(
        "SET session_replication_role = replica; SET default_transaction_read_only = off; SET lock_timeout = '30s'",
    )
    .await?;
    sql.batch_execute(pg::ROW_SECURITY_OF_OTHERS).await?;
    for table in tables {
        let back: Vec<&Difference> = wanted(config, table).filter(|row| row.mended).collect();
        let (Some(schema), name) = split_name(&table.table) else {
            continue;
        };
        if back.is_empty() {
            continue;
        }
        if options.deleted == Deleted::BringBack {
            let lines: Vec<Line> = back
                .iter()
                .map(|row| line("brought back", &table.table, &row.key))
                .collect();
            record.add(&lines).map_err(io("write the record"))?;
            continue;
        }
        let delete = Compared::load(&sql, &schema, &name).await?.delete_sql();
        for row in back {
            // Told of everything that a repair writes.
            let Some(hash) = row.hash else { continue };
            let (mut tries, of) = (0, (table.table.as_str(), &row.key, hash));
            // Who ends here has brought rows back that nobody deletes any more: they are equal everywhere.
            while let Err(error) = delete_everywhere(&sql, &delete, of, record).await {
                // Fails where the connection is gone, and then what failed says so.
                let _ = sql.batch_execute("ROLLBACK").await;
                tries += 1;
                if tries >= TRIES || !is_of_a_lock(&error) {
                    return Err(error);
                }
                let on = holders(&sql).await?;
                watch(Event::Waiting { on });
            }
        }
    }
    Ok(())
}

/// Deletes a row if it is as it was brought back: comparing and mending the rest may take hours, and what was written
/// meanwhile, here or at another node, is no row that was deleted. Such a row stays, and [`undeleted`] tells of it.
async fn delete_everywhere(
    sql: &Client,
    delete: &str,
    (table, key, hash): (&str, &Value, i64),
    record: &mut Record,
) -> Result<(), Error> {
    sql.batch_execute("BEGIN").await?;
    for gone in sql.query(delete, &[&key.to_string(), &hash]).await? {
        let said = line(DELETED, table, key).with_json("row", gone.try_get(0)?);
        record.add(&[said]).map_err(io("write the record"))?;
    }
    Ok(sql.batch_execute("COMMIT").await?)
}

fn is_of_a_lock(error: &Error) -> bool {
    let waits = [SqlState::LOCK_NOT_AVAILABLE, SqlState::T_R_DEADLOCK_DETECTED];
    match error {
        Error::Sql(error) => error.code().is_some_and(|code| waits.contains(code)),
        _ => false,
    }
}

/// What the record says, counted.
fn summary(path: &Path) -> Result<BTreeMap<String, BTreeMap<String, u64>>, Error> {
    let mut tables: BTreeMap<String, BTreeMap<String, u64>> = BTreeMap::new();
    each_line(path, |did, table, _| {
        *tables.entry(table).or_default().entry(did).or_insert(0) += 1;
    })?;
    Ok(tables)
}

/// How many rows of each table the server has refused.
fn refused_of(tables: &BTreeMap<String, BTreeMap<String, u64>>) -> BTreeMap<String, u64> {
    let refused = tables.iter().filter_map(|(table, done)| {
        let count = done.get(REFUSED)?;
        Some((table.clone(), *count))
    });
    refused.collect()
}

/// Keys of rows that were to be deleted everywhere, and of which the record does not say that they are, by table.
fn undeleted(path: &Path) -> Result<BTreeMap<String, HashSet<String>>, Error> {
    let mut tables: BTreeMap<String, HashSet<String>> = BTreeMap::new();
    each_line(path, |did, table, key| {
        let keys = tables.entry(table).or_default();
        if did == TO_DELETE {
            keys.insert(key.get().to_owned());
        } else if did == DELETED {
            keys.remove(key.get());
        }
    })?;
    tables.retain(|_, keys| !keys.is_empty());
    Ok(tables)
}

/// What was done, the table, and the row's key, of every line of the record that is about a table.
fn each_line(path: &Path, mut meet: impl FnMut(String, String, Box<RawValue>)) -> Result<(), Error> {
    use std::io::BufRead as _;

    #[derive(Default, serde::Deserialize)]
    struct Said {
        did: Option<String>,
        table: Option<String>,
        #[serde(default)]
        key: Box<RawValue>,
    }

    let file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(io("read the record")(error)),
    };
    for text in std::io::BufReader::new(file).lines() {
        let text = text.map_err(io("read the record"))?;
        // However deep a row is, and however long its numbers.
        let said: Said = serde_json::from_str(&text).unwrap_or_default();
        if let (Some(did), Some(table)) = (said.did, said.table) {
            meet(did, table, said.key);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn rows_that_were_brought_back_to_be_deleted_and_are_not_are_told_from_the_record() {
        let dir = tempfile::tempdir().unwrap();
        let mut record = State::begin(7).record(dir.path());
        assert!(undeleted(record.path()).unwrap().is_empty());
        let of = |did: &str, table: &str, id: i64| line(did, table, &json!({ "id": id, "at": "x" }));
        // The first heal was ended behind the first one.
        record
            .add(&[
                of(TO_DELETE, "public.a", 1),
                of(TO_DELETE, "public.a", 2),
                of(TO_DELETE, "public.b", 1),
                of(DELETED, "public.a", 1),
            ])
            .unwrap();
        // The next one found one of them to be missing still.
        let again = [of(TO_DELETE, "public.b", 1), of(DELETED, "public.b", 1)];
        record.add(&again).unwrap();
        record.add(&[of("brought back", "public.c", 1)]).unwrap();
        let left = undeleted(record.path()).unwrap();
        let left: Vec<(String, usize)> = left
            .into_iter()
            .map(|(table, keys)| (table, keys.len()))
            .collect();
        assert_eq!(left, [("public.a".to_owned(), 1)]);
        let counts = summary(record.path()).unwrap();
        assert_eq!(
            (counts["public.a"][TO_DELETE], counts["public.c"]["brought back"]),
            (2, 1)
        );
        record.add(&[of(REFUSED, "public.b", 7)]).unwrap();
        let counts = summary(record.path()).unwrap();
        assert_eq!(refused_of(&counts), [("public.b".to_owned(), 1)].into());
    }
}
