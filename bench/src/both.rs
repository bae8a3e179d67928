//! Both nodes write at once: throughput, lag and lines of the conflict log by the share of writes that collide.
//!
//! What collides is what has a line in the conflict log, by commits. How many of the writes must aim at rows that all
//! share for a given share of collisions depends on the lag, hence on the machine: it is found by trials before each
//! measurement, and printed beside what came of it.
//!
//! Only our systems: the others stop or swap rows (`docs/jepsen.md` shows it).

use std::time::{Duration, Instant};

use anabranch_tests::postgres::Postgres;
use anabranch_tests::session::Session;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use crate::lag;
use crate::results::{Record, Rounds};
use crate::stage::{Stage, System};
use crate::usage::load;

/// Sessions that write at each node.
const CLIENTS: u64 = 4;
/// Rows of each session's own.
const OWN_ROWS: u64 = 20_000;
/// Most rows that all write.
const SHARED_ROWS: u64 = 20;
/// Marks a second whose lag is measured beside the load.
const MARKS_PER_S: u32 = 50;
/// Trials before a measurement.
const TRIALS: u64 = 3;

const TABLE: &str = "create table collide (id bigint primary key, a int not null, pad text not null)";
const LINES: &str = "select count(*) from anabranch.conflict_history";

/// Which rows are written.
#[derive(Clone, Copy, Debug)]
struct Aim {
    /// Share of writes that go to rows that all write.
    share: f64,
    /// How many those are.
    rows: u64,
}

impl Aim {
    /// A first guess for so many percent of collisions. Rows so few that most writes to them meet another node's: one
    /// for each five percent.
    fn first(percentage: u32) -> Self {
        Self {
            share: f64::from(percentage.min(100)) / 100.0,
            rows: u64::from(percentage / 5).clamp(1, SHARED_ROWS),
        }
    }

    /// A better guess after `seen` (a share) where `wanted` was meant. Collisions grow with the aimed share, or with its
    /// square while few writes meet: half of the difference (of logarithms) overshoots with neither.
    fn corrected(self, wanted: f64, seen: f64) -> Self {
        let by = (wanted / seen.max(1e-6)).sqrt().clamp(0.25, 4.0);
        Self {
            share: (self.share * by).min(1.0),
            ..self
        }
    }
}

/// The name of this work with so many percent of collisions.
pub fn work(percentage: u32) -> String {
    format!("both-{percentage}%")
}

/// Measures each of our systems in turn, with these percentages of colliding writes.
pub async fn measure(
    systems: &[System],
    percentages: &[u32],
    seconds: f64,
    rounds: Rounds,
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
        stage.settled(system).await;
        for round in rounds.clone() {
            for &percentage in percentages {
                let wanted = f64::from(percentage) / 100.0;
                let mut aim = Aim::first(percentage);
                for trial in 0..if percentage == 0 { 0 } else { TRIALS } {
                    let lines = here.admin().await.number(LINES).await;
                    let seed = round as u64 * 1_000 + trial * 100;
                    let until = Instant::now() + Duration::from_secs_f64((seconds / 4.0).min(2.0));
                    let commits = written(start(here, there, aim, seed, until).await).await;
                    stage.settled(system).await;
                    let logged = here.admin().await.number(LINES).await - lines;
                    aim = aim.corrected(wanted, logged as f64 / commits.max(1) as f64);
                }
                let before = load();
                let lines = here.admin().await.number(LINES).await;
                let until = Instant::now() + Duration::from_secs_f64(seconds);
                let seed = round as u64 * 1_000 + TRIALS * 100;
                let running = start(here, there, aim, seed, until).await;
                let mut values = lag::between(here, there, MARKS_PER_S, seconds).await;
                let commits = written(running).await as f64;
                let began = Instant::now();
                stage.settled(system).await;
                values.insert("drain_s".to_owned(), began.elapsed().as_secs_f64());
                stage.compare(system, "collide").await;
                values.insert("commits_per_s".to_owned(), commits / seconds);
                let logged = (here.admin().await.number(LINES).await - lines) as f64;
                values.insert("conflicts".to_owned(), logged);
                values.insert("conflicts_percent".to_owned(), logged / commits.max(1.0) * 100.0);
                values.insert("aimed_percent".to_owned(), aim.share * 100.0);
                values.insert("shared_rows".to_owned(), aim.rows as f64);
                values.insert("load_before".to_owned(), before);
                done(Record {
                    work: work(percentage),
                    shape: String::new(),
                    system: system.to_string(),
                    round,
                    values,
                });
            }
        }
    }
}

type Running = Vec<tokio::task::JoinHandle<u64>>;

/// Lets sessions at both nodes write until `until`.
async fn start(here: &Postgres, there: &Postgres, aim: Aim, seed: u64, until: Instant) -> Running {
    let mut running = Vec::new();
    for client in 0..CLIENTS * 2 {
        let server = if client < CLIENTS { here } else { there };
        let session = server.session().await;
        running.push(tokio::spawn(write(session, client, aim, seed + client, until)));
    }
    running
}

/// How many commits they made.
async fn written(running: Running) -> u64 {
    let mut commits = 0;
    for writer in running {
        commits += writer.await.expect("a writer");
    }
    commits
}

/// Updates single rows until `until`; how many.
async fn write(session: Session, client: u64, aim: Aim, seed: u64, until: Instant) -> u64 {
    let mut random = StdRng::seed_from_u64(seed);
    let mut count = 0;
    while Instant::now() < until {
        let id = if random.random_bool(aim.share) {
            random.random_range(0..aim.rows)
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Trials until the share that `collided` answers with is near the one asked for.
    fn found(percentage: u32, collided: impl Fn(Aim) -> f64) -> f64 {
        let wanted = f64::from(percentage) / 100.0;
        let mut aim = Aim::first(percentage);
        for _ in 0..TRIALS {
            aim = aim.corrected(wanted, collided(aim));
        }
        collided(aim) / wanted
    }

    #[test]
    fn trials_find_the_aim_whether_few_or_most_of_the_writes_meet() {
        for percentage in [1, 10] {
            let most = found(percentage, |aim| aim.share * 0.6);
            assert!((0.9..1.1).contains(&most), "{percentage}: {most}");
            // With two shares of writes that meet once in so many: the first guess sees a third of what is wanted.
            let scale = f64::from(percentage) / 100.0;
            let few = found(percentage, |aim| aim.share * aim.share / scale / 3.0);
            assert!((0.9..1.1).contains(&few), "{percentage}: {few}");
        }
    }

    #[test]
    fn an_aim_stays_a_share() {
        let aim = Aim::first(100).corrected(1.0, 0.0);
        assert!(aim.share <= 1.0 && aim.rows == SHARED_ROWS);
        assert!(Aim::first(0).share == 0.0);
    }
}
