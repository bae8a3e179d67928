//! Lag: from the return of a commit at the source until another session sees its row at the target.
//!
//! Writers commit at a given rate; a session at the target looks every 1.1 ms, inside the server, so that no
//! client's wake-up is measured: the shortest that `pg_sleep` sleeps, so half a millisecond of each figure is the look's. (When a row
//! was committed cannot be asked afterwards: native replication's apply worker gives its commits the time of the source's. A look
//! without sleep would keep one of two cores busy.) Both clocks are this machine's. A commit that is not seen until half a second after the
//! last one counts with the time it has waited by then: its lag is at least that.

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anabranch_tests::postgres::Postgres;
use anabranch_tests::session::Session;

use crate::results::{Record, Rounds, turns};
use crate::stage::{Stage, System};
use crate::usage::load;

/// The table that is written.
pub const TABLE: &str = "create table lag (writer int, n bigint, pad text, primary key (writer, n))";

/// Looks at the table until `until`; answers with lines `writer n time`, the first sight of each n or later.
pub const LOOK: &str = "create function look(writers int, until float8) returns setof text language plpgsql as $$ \
    declare seen bigint[] := array_fill(0::bigint, array[writers]); now_n bigint; \
    begin while extract(epoch from clock_timestamp()) < until loop \
      for w in 1..writers loop \
        select max(n) into now_n from lag where writer = w; \
        if now_n > seen[w] then \
          return next w || ' ' || now_n || ' ' || extract(epoch from clock_timestamp())::float8; seen[w] := now_n; \
        end if; \
      end loop; \
      perform pg_sleep(0.001); \
    end loop; end $$";

fn now() -> f64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs_f64()
}

/// The name of this work at so many commits a second.
pub fn work(rate: u32) -> String {
    format!("lag-{rate}")
}

/// Measures each system in turn, the others standing still.
pub async fn measure(
    systems: &[System],
    rates: &[u32],
    seconds: f64,
    rounds: Rounds,
    mut done: impl FnMut(Record),
) {
    let mut stage = Stage::start(systems, &[TABLE.to_owned()]).await;
    for &system in systems {
        stage.target(system).admin().await.run(LOOK).await;
        stage.pause(system).await;
    }
    for round in rounds {
        for &rate in rates {
            for system in turns(systems, round) {
                stage.resume(system);
                let mark = stage.mark(system.place()).await;
                stage.arrived(system, mark).await;
                let before = load();
                let mut values = one(&stage, system, rate, seconds).await;
                values.insert("load_before".to_owned(), before);
                done(Record {
                    work: work(rate),
                    shape: String::new(),
                    system: system.to_string(),
                    round,
                    values,
                });
                stage.pause(system).await;
            }
        }
    }
}

/// A writer commits at `rate` until `until`; when each commit returned.
async fn commits(session: Session, writer: usize, rate: f64, until: f64, first: i64) -> Vec<(i64, f64)> {
    let mut returned = Vec::new();
    let mut due = tokio::time::Instant::now();
    let mut n = first;
    while now() < until {
        tokio::time::sleep_until(due).await;
        n += 1;
        session
            .run(&format!(
                "insert into lag values ({writer}, {n}, 'some text of a usual length')"
            ))
            .await;
        returned.push((n, now()));
        due += Duration::from_secs_f64(1.0 / rate);
    }
    returned
}

async fn one(stage: &Stage, system: System, rate: u32, seconds: f64) -> BTreeMap<String, f64> {
    between(stage.source(system.place()), stage.target(system), rate, seconds).await
}

/// Lags of commits at `rate` a second, `p50_ms` and so on. Both have [`TABLE`], the target [`LOOK`] as well.
pub async fn between(source: &Postgres, target: &Postgres, rate: u32, seconds: f64) -> BTreeMap<String, f64> {
    let target = target.admin().await;
    // One connection can commit a few hundred times a second; the disk is what it waits for.
    let writers = if rate > 400 { 8 } else { 1 };
    let first = source
        .admin()
        .await
        .number("select coalesce(max(n), 0) from lag")
        .await;
    let until = now() + seconds;
    let mut running = Vec::new();
    for writer in 1..=writers {
        let session = source.session().await;
        let each = f64::from(rate) / writers as f64;
        running.push(tokio::spawn(commits(session, writer, each, until, first)));
    }
    let end = until + 0.5;
    let look = format!("select * from look({writers}, {end})");
    let looking = tokio::spawn(async move { target.column(&look).await });
    let mut returned: HashMap<(usize, i64), f64> = HashMap::new();
    for (at, task) in running.into_iter().enumerate() {
        for (n, time) in task.await.expect("a writer") {
            returned.insert((at + 1, n), time);
        }
    }
    // A sight of n is a sight of all before it that were not seen yet.
    let mut lags = Vec::new();
    let mut seen = vec![first; writers + 1];
    for line in looking.await.expect("the looker") {
        let parts: Vec<&str> = line.split(' ').collect();
        let (Ok(writer), Ok(upto), Ok(time)) = (
            parts[0].parse::<usize>(),
            parts[1].parse::<i64>(),
            parts[2].parse::<f64>(),
        ) else {
            continue;
        };
        for n in seen[writer] + 1..=upto {
            if let Some(returned) = returned.get(&(writer, n)) {
                lags.push((time - returned) * 1e3);
            }
        }
        seen[writer] = seen[writer].max(upto);
    }
    let unseen: Vec<f64> = returned
        .iter()
        .filter(|((writer, n), _)| *n > seen[*writer])
        .map(|(_, time)| at_least(*time, end))
        .collect();
    let count = unseen.len();
    lags.extend(unseen);
    let mut values = percentiles(lags);
    values.insert("commits_per_s".to_owned(), returned.len() as f64 / seconds);
    values.insert("unseen".to_owned(), count as f64);
    values
}

/// Milliseconds that a commit not seen by `end` has waited.
fn at_least(returned: f64, end: f64) -> f64 {
    (end - returned).max(0.0) * 1e3
}

/// `p50_ms` and so on; nothing when there are no lags.
fn percentiles(mut lags: Vec<f64>) -> BTreeMap<String, f64> {
    lags.sort_by(f64::total_cmp);
    let names = [
        ("p50_ms", 0.5),
        ("p90_ms", 0.9),
        ("p99_ms", 0.99),
        ("max_ms", 1.0),
    ];
    names
        .into_iter()
        .filter_map(|(name, quantile)| {
            let place = ((lags.len() as f64 - 1.0) * quantile).round() as usize;
            Some((name.to_owned(), *lags.get(place)?))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commits_that_were_never_seen_raise_the_percentiles() {
        let mut lags = vec![1.0; 90];
        lags.extend((0..10).map(|_| at_least(10.0, 10.5)));
        let found = percentiles(lags);
        assert_eq!(
            (found["p50_ms"], found["p99_ms"], found["max_ms"]),
            (1.0, 500.0, 500.0)
        );
        assert!(percentiles(Vec::new()).is_empty());
    }
}
