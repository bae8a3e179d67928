//! Overhead: how many transactions a second the source still takes while it is replicated.
//!
//! pgbench's simple update (an update, a read, an insert) runs at each system's source with that system alone awake, and
//! at one source with all asleep, which is what the others are compared with.

use std::collections::BTreeMap;
use std::time::Instant;

use anabranch_tests::postgres::{DATABASE, Postgres};

use crate::results::{Record, Rounds, turns};
use crate::stage::{Stage, System};
use crate::usage::load;
use crate::work::{TPC_B_NAMES, TPC_B_TABLES, tpc_b_fill};

/// What pgbench does.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Its scale: so many times 100,000 accounts.
    pub scale: u64,
    /// Sessions.
    pub clients: u32,
    /// Length of a measurement.
    pub seconds: u32,
}

/// What stands for a system where none is awake.
pub const ALONE: &str = "alone";

/// The name of this work with so many sessions.
pub fn work(clients: u32) -> String {
    format!("overhead-{clients}-clients")
}

/// Measures each system in turn, and how long it needs afterwards for what it has left: one that falls behind leaves more to the clients.
pub async fn measure(systems: &[System], load_of: Load, rounds: Rounds, mut done: impl FnMut(Record)) {
    let mut stage = Stage::start(systems, &[TPC_B_TABLES.to_owned()]).await;
    for place in stage.places() {
        let session = stage.source(place).session().await;
        session.run("set synchronous_commit = off").await;
        session.run(&tpc_b_fill(load_of.scale)).await;
    }
    for &system in systems {
        let mark = stage.mark(system.place()).await;
        stage.arrived(system, mark).await;
        stage.pause(system).await;
    }
    // A peer's source, if there is one: ours has other replica identities.
    let plain = systems
        .iter()
        .find(|system| !system.is_ours())
        .unwrap_or(&systems[0]);
    for round in rounds {
        let mut all: Vec<Option<System>> = systems.iter().copied().map(Some).collect();
        all.push(None);
        for system in turns(&all, round) {
            let place = system.unwrap_or(*plain).place();
            stage.rest(&TPC_B_NAMES.map(str::to_owned)).await;
            if let Some(system) = system {
                stage.resume(system);
                let mark = stage.mark(place).await;
                stage.arrived(system, mark).await;
            }
            let before = load();
            let tps = simple_update(stage.source(place), load_of).await;
            let mut values = BTreeMap::from([("tps".to_owned(), tps), ("load_before".to_owned(), before)]);
            if let Some(system) = system {
                let ended = Instant::now();
                let mark = stage.mark(place).await;
                stage.arrived(system, mark).await;
                values.insert("drain_s".to_owned(), ended.elapsed().as_secs_f64());
                stage.pause(system).await;
            }
            done(Record {
                work: work(load_of.clients),
                shape: String::new(),
                system: system.map_or_else(|| ALONE.to_owned(), |system| system.to_string()),
                round,
                values,
            });
        }
    }
}

/// Transactions a second, by pgbench itself.
async fn simple_update(source: &Postgres, load: Load) -> f64 {
    let mut command = source.client("pgbench", DATABASE);
    command.args([
        "--builtin=simple-update",
        "--no-vacuum",
        "--protocol=prepared",
        "--jobs=2",
        &format!("--scale={}", load.scale),
        &format!("--client={}", load.clients),
        &format!("--time={}", load.seconds),
    ]);
    let output = tokio::task::spawn_blocking(move || command.output())
        .await
        .expect("wait for pgbench")
        .expect("pgbench runs");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let line = said.lines().find_map(|line| line.strip_prefix("tps = "));
    let figure = line.and_then(|rest| rest.split(' ').next()?.parse().ok());
    figure.unwrap_or_else(|| {
        panic!(
            "pgbench says no tps: {said}{}",
            String::from_utf8_lossy(&output.stderr)
        )
    })
}
