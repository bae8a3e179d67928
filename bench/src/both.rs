//! Both nodes write at once: throughput, lag and lines of the conflict log by the share of writes that collide.
//!
//! Only our systems: the others stop or swap rows (`docs/jepsen.md` shows it).

use std::time::{Duration, Instant};

use anabranch_tests::session::Session;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use crate::lag;
use crate::results::Record;
use crate::stage::{Stage, System};
use crate::usage::load;

/// Sessions that write at each node.
const CLIENTS: u64 = 4;
/// Rows of each session's own.
const OWN_ROWS: u64 = 20_000;
/// Rows that all write.
const SHARED_ROWS: u64 = 50;
/// Marks a second whose lag is measured beside the load.
const MARKS_PER_S: u32 = 50;

const TABLE: &str = "create table collide (id bigint primary key, a int not null, pad text not null)";

/// Measures each of our systems in turn, with these percentages of colliding writes.
pub async fn measure(
    systems: &[System],
    percentages: &[u32],
    seconds: f64,
    rounds: usize,
    mut done: impl FnMut(Record),
) {
    for &system in systems.iter().filter(|system| system.is_ours()) {
        let tables = [TABLE.to_owned(), lag::TABLE.to_owned()];
        let stage = Stage::start(&[system], &tables).await;
        let (here, there) = (stage.source(system.place()), stage.target(system));
        there.admin().await.run(lag::LOOK).await;
        let rows = OWN_ROWS * CLIENTS * 2 + SHARED_ROWS;
        let fill =
            format!("insert into collide select i, 0, rpad('', 80, 'x') from generate_series(0, {rows}) i");
        here.session().await.run(&fill).await;
        let mark = stage.mark(system.place()).await;
        stage.arrived(system, mark).await;
        for round in 0..rounds {
            for &percentage in percentages {
                let before = load();
                let lines = here.admin().await.number(LINES).await;
                let until = Instant::now() + Duration::from_secs_f64(seconds);
                let mut running = Vec::new();
                for client in 0..CLIENTS * 2 {
                    let server = if client < CLIENTS { here } else { there };
                    let session = server.session().await;
                    let seed = round as u64 * 1_000 + client;
                    running.push(tokio::spawn(write(session, client, percentage, seed, until)));
                }
                let mut values = lag::between(here, there, MARKS_PER_S, seconds).await;
                let mut commits = 0;
                for writer in running {
                    commits += writer.await.expect("a writer");
                }
                let began = Instant::now();
                let mark = stage.mark(system.place()).await;
                stage.arrived(system, mark).await;
                values.insert("drain_s".to_owned(), began.elapsed().as_secs_f64());
                stage.compare(system, "collide").await;
                values.insert("commits_per_s".to_owned(), commits as f64 / seconds);
                let logged = here.admin().await.number(LINES).await - lines;
                values.insert("conflicts".to_owned(), logged as f64);
                values.insert("load_before".to_owned(), before);
                done(Record {
                    work: format!("both-{percentage}%"),
                    shape: String::new(),
                    system: system.to_string(),
                    round,
                    values,
                });
            }
        }
    }
}

const LINES: &str = "select count(*) from anabranch.conflict_history";

/// Updates single rows until `until`, `percentage` of them shared with everybody; how many.
async fn write(session: Session, client: u64, percentage: u32, seed: u64, until: Instant) -> u64 {
    let mut random = StdRng::seed_from_u64(seed);
    let mut count = 0;
    while Instant::now() < until {
        let id = if random.random_range(0..100) < percentage {
            random.random_range(0..SHARED_ROWS)
        } else {
            SHARED_ROWS + client * OWN_ROWS + random.random_range(0..OWN_ROWS)
        };
        session
            .run(&format!("update collide set a = a + 1 where id = {id}"))
            .await;
        count += 1;
    }
    count
}
