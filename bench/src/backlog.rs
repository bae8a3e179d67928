//! Backlog: how fast a receiver that stood still catches up.
//!
//! All receivers stand still, and the walsenders with them; the job is written once at the source, then each system in
//! turn is let go and timed until the last row is visible at its target. The time holds all of a system: decoding,
//! sending, journalling, applying. (A walsender that ran meanwhile would have read a large transaction, and spilled it to
//! disk, before the time begins, where nothing is sent before the commit.)

use std::collections::BTreeMap;
use std::time::Instant;

use anabranch_tests::process::run;

use crate::results::{Record, Rounds, turns};
use crate::stage::{Place, Stage, System};
use crate::usage::{Meter, load};
use crate::work::{Job, Writer};

/// Nobody's first transactions are measured: these go through all systems before.
const WARM: &str = "create table warm (id bigint primary key, pad text not null)";
const WARM_UP: &str = "do $$ begin for i in 1..2000 loop insert into warm values (i, rpad('', 80, 'x')); commit; \
    update warm set pad = 'y' where id = i; commit; end loop; end $$";

/// Runs the jobs, each once in every round.
pub async fn measure(systems: &[System], jobs: &[Job], rounds: Rounds, mut done: impl FnMut(Record)) {
    let mut tables: Vec<(String, String)> = vec![("warm".to_owned(), WARM.to_owned())];
    let mut fill: Vec<(String, String)> = vec![("warm".to_owned(), WARM_UP.to_owned())];
    for job in jobs {
        for table in job.tables(&rounds) {
            if !tables.contains(&table) {
                tables.push(table);
            }
        }
        for table in job.fill(&rounds) {
            if !fill.contains(&table) {
                fill.push(table);
            }
        }
    }
    let sql: Vec<String> = tables.iter().map(|table| table.1.clone()).collect();
    let mut stage = Stage::start(systems, &sql).await;
    eprintln!("bench: filling {} tables", fill.len());
    for (_, sql) in &fill {
        for place in stage.places() {
            write(&stage, place, &Writer::Sql(sql.clone())).await;
        }
    }
    for place in stage.places() {
        let mark = stage.mark(place).await;
        for &system in systems.iter().filter(|system| system.place() == place) {
            stage.arrived(system, mark).await;
        }
    }
    let mut filled: Vec<String> = Vec::new();
    for job in jobs.iter().filter(|job| !job.fill(&rounds).is_empty()) {
        for table in rounds.clone().flat_map(|round| job.touched(round)) {
            if !filled.contains(&table) {
                filled.push(table);
            }
        }
    }
    for round in rounds {
        for job in jobs {
            stage.rest(&filled).await;
            for record in one(&mut stage, job, round).await {
                done(record);
            }
        }
    }
}

async fn write(stage: &Stage, place: Place, writer: &Writer) {
    let source = stage.source(place);
    match writer {
        // The backlog is written without waiting for the disk: writing is not what is measured.
        Writer::Sql(sql) => {
            let session = source.session().await;
            session.run("set synchronous_commit = off").await;
            session.run(sql).await;
        }
        Writer::PgBench(arguments) => {
            let mut command = source.client("pgbench", anabranch_tests::postgres::DATABASE);
            command
                .args(arguments)
                .env("PGOPTIONS", "-c synchronous_commit=off");
            tokio::task::spawn_blocking(move || run(&mut command))
                .await
                .expect("wait for pgbench");
        }
    }
}

async fn one(stage: &mut Stage, job: &Job, round: usize) -> Vec<Record> {
    let order = turns(stage.systems(), round);
    for &system in &order {
        stage.pause(system).await;
    }
    let mut marks = BTreeMap::new();
    for place in stage.places() {
        write(stage, place, &job.writer(round)).await;
        marks.insert(place, stage.mark(place).await);
        stage.source(place).admin().await.run("checkpoint").await;
    }
    let written = job.written();
    let mut records = Vec::new();
    for system in order {
        let before = load();
        let processes = stage.processes(system).await;
        let meter = Meter::start(&processes);
        let began = Instant::now();
        stage.resume(system);
        stage.arrived(system, marks[&system.place()]).await;
        let seconds = began.elapsed().as_secs_f64();
        stage.echoed(system).await;
        let mut values = meter.stop(&stage.processes(system).await);
        values.insert("seconds".to_owned(), seconds);
        values.insert("rows".to_owned(), written.rows as f64);
        values.insert("rows_per_s".to_owned(), written.rows as f64 / seconds);
        values.insert("txns_per_s".to_owned(), written.txns as f64 / seconds);
        values.insert("load_before".to_owned(), before);
        for table in job.touched(round) {
            stage.compare(system, &table).await;
        }
        stage.pause(system).await;
        records.push(Record {
            work: job.work.to_string(),
            shape: job.shape.to_string(),
            system: system.to_string(),
            round,
            values,
        });
    }
    for &system in &stage.systems().to_vec() {
        stage.resume(system);
    }
    records
}
