//! Overhead: how many transactions a second the source still takes while it is replicated.
//!
//! pgbench's simple update (an update, a read, an insert) runs at each system's source with that system alone awake, and
//! at one source with all asleep, which is what the others are compared with.

use std::collections::BTreeMap;

use anabranch_tests::postgres::{DATABASE, Postgres};

use crate::results::Record;
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

/// Measures each system in turn.
pub async fn measure(systems: &[System], load_of: Load, rounds: usize, mut done: impl FnMut(Record)) {
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
    for round in 0..rounds {
        let mut order: Vec<Option<System>> = systems.iter().copied().map(Some).collect();
        order.push(None);
        let count = order.len();
        order.rotate_left(round % count);
        for system in order {
            let place = system.unwrap_or(*plain).place();
            stage.rest(&TPC_B_NAMES.map(str::to_owned)).await;
            if let Some(system) = system {
                stage.resume(system);
                let mark = stage.mark(place).await;
                stage.arrived(system, mark).await;
            }
            let before = load();
            let tps = simple_update(stage.source(place), load_of).await;
            if let Some(system) = system {
                let mark = stage.mark(place).await;
                stage.arrived(system, mark).await;
                stage.pause(system).await;
            }
            done(Record {
                work: format!("overhead-{}-clients", load_of.clients),
                shape: String::new(),
                system: system.map_or_else(|| "alone".to_owned(), |system| system.to_string()),
                round,
                values: BTreeMap::from([("tps".to_owned(), tps), ("load_before".to_owned(), before)]),
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
