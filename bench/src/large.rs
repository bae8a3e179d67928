//! One transaction of very many rows: how long after its commit it is sent and visible elsewhere, and the memory it takes.

use std::collections::BTreeMap;
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

/// What it cost, of what a meter says: of a server's processes no memory, and of a transaction that never arrived nothing, nor rows
/// to divide by. Who gives up half-way has used little.
fn costs(metered: BTreeMap<String, f64>, rows: u64, has_arrived: bool) -> BTreeMap<String, f64> {
    let mut values = metered;
    if has_arrived {
        values.retain(|name, _| !name.starts_with("mib_") || name.ends_with("daemon"));
        values.insert("rows".to_owned(), rows as f64);
    } else {
        values.clear();
    }
    values
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
        let metered = meter.stop(&stage.processes(system).await);
        if has_arrived {
            stage.compare(system, "large").await;
        }
        let mut values = costs(metered, rows, has_arrived);
        values.insert("write_s".to_owned(), written);
        if let Some(sent) = sent {
            values.insert("sent_s".to_owned(), sent);
        }
        values.insert("lag_s".to_owned(), seconds);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bars::verdicts;
    use crate::results::{CPU_PER_MILLION, Key, medians};

    fn record(system: &str, cpu: f64, has_arrived: bool) -> Record {
        let metered = [
            ("cpu_total", cpu),
            ("mib_source_daemon", 100.0),
            ("mib_apply", 7.0),
        ];
        let metered = metered.map(|(name, value)| (name.to_owned(), value)).into();
        let mut values = costs(metered, 2_000_000, has_arrived);
        values.insert("arrived".to_owned(), f64::from(u8::from(has_arrived)));
        Record {
            work: work(2_000_000),
            shape: "narrow".to_owned(),
            system: system.to_owned(),
            round: 0,
            values,
        }
    }

    /// Which bars ours meets on CPU, memory and arrival.
    fn met(has_ours_arrived: bool, has_native_arrived: bool) -> [Option<bool>; 3] {
        let ours = record("anabranch-15", 2.0, has_ours_arrived);
        let key: Key = (ours.work.clone(), ours.shape.clone(), ours.system.clone());
        let medians = medians(&[ours, record("native-15", 2.0, has_native_arrived)]);
        [CPU_PER_MILLION, "mib_source_daemon", "arrived"]
            .map(|figure| verdicts(&medians, &key, figure)[0].met)
    }

    #[test]
    fn what_never_arrived_meets_no_bar_and_is_no_measure_for_another() {
        assert_eq!(met(true, true), [Some(true), Some(true), Some(true)]);
        assert_eq!(met(false, true), [None, None, Some(false)]);
        assert_eq!(met(true, false), [None, Some(true), Some(true)]);
        assert!(!record("anabranch-15", 2.0, true).values.contains_key("mib_apply"));
    }
}
