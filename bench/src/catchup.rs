//! Catching up: a node is away while the other writes for a while, then it comes back.
//!
//! Only our systems: the source's daemon goes on meanwhile, so the WAL is not held back and the journal grows. What is
//! asked: how fast it is worked off, and whether memory stays bounded and the disk is given back.

use std::time::{Duration, Instant};

use crate::results::{Record, Rounds};
use crate::stage::{Stage, System};
use crate::usage::{Meter, load};

const TABLE: &str =
    "create table catchup (id bigint primary key, a int not null, b int not null, pad text not null)";
/// Rows that are updated again and again.
const ROWS: u64 = 100_000;

/// The name of this work with so many updates.
pub fn work(updates: u64) -> String {
    format!("catch-up-{updates}")
}

/// Measures each of our systems in turn: so many single-row updates are written while the target is away.
pub async fn measure(systems: &[System], updates: u64, rounds: Rounds, mut done: impl FnMut(Record)) {
    for &system in systems.iter().filter(|system| system.is_ours()) {
        let mut stage = Stage::start(&[system], &[TABLE.to_owned()]).await;
        let session = stage.source(system.place()).session().await;
        session.run("set synchronous_commit = off").await;
        let fill = format!(
            "insert into catchup select i, 0, 0, rpad('', 80, 'x') from generate_series(0, {ROWS} - 1) i"
        );
        session.run(&fill).await;
        let mark = stage.mark(system.place()).await;
        stage.arrived(system, mark).await;
        for round in rounds.clone() {
            let before = load();
            // From before the absence: the source's daemon decodes and journals meanwhile.
            let meter = Meter::start(&stage.processes(system).await);
            let [source_before, target_before] = stage.journals_mib(system);
            stage.leave(system);
            let writing = Instant::now();
            let write = format!(
                "do $$ begin for i in 1::bigint..{updates} loop update catchup set a = a + 1, b = b + 1 where id = \
                 (i * 7919::bigint) % {ROWS}; commit; end loop; end $$"
            );
            session.run(&write).await;
            let mark = stage.mark(system.place()).await;
            let written = writing.elapsed().as_secs_f64();
            let [source_away, _] = stage.journals_mib(system);
            stage.come_back(system);
            let began = Instant::now();
            stage.arrived(system, mark).await;
            let seconds = began.elapsed().as_secs_f64();
            stage.echoed(system).await;
            let mut values = meter.stop(&stage.processes(system).await);
            let [source_caught_up, target_caught_up] = stage.journals_mib(system);
            stage.compare(system, "catchup").await;
            let [source_after, target_after] = at_rest(&mut stage, system).await;
            values.insert("write_s".to_owned(), written);
            values.insert("seconds".to_owned(), seconds);
            values.insert("updates_per_s".to_owned(), updates as f64 / seconds);
            values.insert("rows".to_owned(), updates as f64);
            for (name, mib) in [
                ("source_before", source_before),
                ("source_away", source_away),
                ("source_caught_up", source_caught_up),
                ("source_after", source_after),
                ("target_before", target_before),
                ("target_caught_up", target_caught_up),
                ("target_after", target_after),
            ] {
                values.insert(format!("journal_mib_{name}"), mib);
            }
            values.insert("load_before".to_owned(), before);
            let kept = |name: &str| !name.starts_with("mib_") || name.ends_with("daemon");
            values.retain(|name, _| kept(name));
            done(Record {
                work: work(updates),
                shape: String::new(),
                system: system.to_string(),
                round,
                values,
            });
        }
    }
}

/// MiB in the journals once they shrink no more: they let go what everybody is known to have.
async fn at_rest(stage: &mut Stage, system: System) -> [f64; 2] {
    let mut least = stage.journals_mib(system);
    let mut since = Instant::now();
    while since.elapsed() < Duration::from_secs(5) {
        tokio::time::sleep(Duration::from_millis(200)).await;
        for (least, now) in least.iter_mut().zip(stage.journals_mib(system)) {
            if now < *least {
                (*least, since) = (now, Instant::now());
            }
        }
    }
    least
}
