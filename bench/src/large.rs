//! One transaction of very many rows: how long after its commit it is sent and visible elsewhere, and the memory it takes.

use std::time::{Duration, Instant};

use crate::results::{Record, Rounds, turns};
use crate::stage::{Stage, System};
use crate::usage::{Meter, load};

const TABLE: &str =
    "create table large (id bigint primary key, a int not null, b int not null, pad text not null)";

/// The name of this work with so many rows.
pub fn work(rows: u64) -> String {
    format!("one-txn-{rows}")
}

/// Measures each system alone. One that needs longer than `patience` is told as `arrived 0`.
pub async fn measure(
    systems: &[System],
    rows: u64,
    patience: Duration,
    rounds: Rounds,
    mut done: impl FnMut(Record),
) {
    let turn = |round| {
        turns(systems, round)
            .into_iter()
            .map(move |system| (round, system))
    };
    for (round, system) in rounds.flat_map(turn) {
        let mut stage = Stage::start(&[system], &[TABLE.to_owned()]).await;
        let session = stage.source(system.place()).session().await;
        let before = load();
        let meter = Meter::start(&stage.processes(system).await);
        let writing = Instant::now();
        session.run("begin").await;
        let write = format!(
            "insert into large select i, 0, 0, rpad('', 80, 'x') from generate_series(1, {rows}::bigint) i"
        );
        session.run(&write).await;
        session.run("commit").await;
        let written = writing.elapsed().as_secs_f64();
        eprintln!("bench: {system} has {rows} rows to send, written in {written:.0} s");
        let began = Instant::now();
        let mark = stage.mark(system.place()).await;
        let (sent, has_arrived) = tokio::join!(
            stage.sent_within(system, patience),
            stage.arrived_within(system, mark, patience)
        );
        let seconds = began.elapsed().as_secs_f64();
        if has_arrived {
            stage.echoed(system).await;
        }
        let mut values = meter.stop(&stage.processes(system).await);
        if has_arrived {
            stage.compare(system, "large").await;
        }
        values.retain(|name, _| !name.starts_with("mib_") || name.ends_with("daemon"));
        values.insert("write_s".to_owned(), written);
        if let Some(sent) = sent {
            values.insert("sent_s".to_owned(), sent);
        }
        values.insert("lag_s".to_owned(), seconds);
        values.insert("rows".to_owned(), rows as f64);
        values.insert("arrived".to_owned(), f64::from(u8::from(has_arrived)));
        values.insert("load_before".to_owned(), before);
        done(Record {
            work: work(rows),
            shape: "narrow".to_owned(),
            system: system.to_string(),
            round,
            values,
        });
    }
}
