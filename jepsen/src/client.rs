//! Clients: each runs its generator's transactions at one node, one at a time, and says what became of each.
//!
//! In:   a [`Generator`]        Out: [`Op`]s
//! Invariants: 1. `fail` is said only of what surely did not commit; 2. every transaction that writes inserts a
//!        witness row of its own; 3. a new connection is a new process, unless a session moved with all that it saw
//!
//! Transactions are REPEATABLE READ, so that what one reads is one state of its node; what the server then refuses
//! for a concurrent write is a `fail`. Those of pgbench and those over many rows are READ COMMITTED.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anabranch_tests::Session;
use anabranch_tests::daemon::applied_up_to;
use anabranch_tests::session::Refused;
use rand::Rng;
use rand::rngs::StdRng;
use tokio_postgres::Config;

use crate::clock::Clock;
use crate::generator::Generator;
use crate::history::{Act, Event, Op, Stage, Step};
use crate::record::Record;
use crate::workload::{Shape, Workload};

/// Longest wait for one answer; after that nobody knows.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long some wait for the answer to a COMMIT, as applications do: less than faults last, so that there are commits that nobody saw
/// acknowledged and that are durable all the same.
const COMMIT_PATIENCE: Duration = Duration::from_secs(1);

/// One client in so many gives a COMMIT up so soon.
const IMPATIENT: u64 = 3;

/// Longest wait for another node to know what a session knows.
const CARRIED_WITHIN: Duration = Duration::from_secs(3);

/// A node, as clients see it.
pub struct Place {
    /// How to reach its server.
    pub config: Config,
    /// 1, 2, ...
    pub node: u16,
    /// The folder of the daemon that says what its node knows; none if nobody is asked.
    pub daemon: Option<PathBuf>,
}

/// What a client needs to know.
pub struct Client {
    /// All nodes.
    pub places: Arc<Vec<Place>>,
    /// Where it begins, among them.
    pub at: usize,
    /// Its number among all clients, from 0, and how many there are.
    pub number: (u64, u64),
    /// Connections begun so far, each of which numbers its own transactions.
    pub connections: u64,
    /// Where its session goes on after some transactions, if it moves.
    pub moves: Option<StdRng>,
    /// What it does.
    pub workload: Arc<Workload>,
    /// Keys of each table.
    pub keys: i64,
    /// What next.
    pub generator: Generator,
    /// Pause between transactions.
    pub pause: Duration,
    /// The run's clock.
    pub clock: Clock,
    /// Where operations are told.
    pub record: Record,
    /// Ends it.
    pub stop: Arc<AtomicBool>,
}

/// A connection, and the session that it belongs to.
struct Open {
    session: Session,
    /// The session: the number of its first connection.
    process: u64,
    /// The number of this connection.
    number: u64,
    /// Transactions made in it.
    made: i64,
    /// The session moves once so many were made.
    moves_after: i64,
}

/// What became of a transaction.
enum Outcome {
    Ok,
    Fail(String),
    Info(String),
}

/// Node of a transaction's id.
pub fn node_of(txn: i64) -> u16 {
    u16::try_from(txn / (PROCESSES * TXNS)).unwrap_or(0)
}

/// Processes of one node, at most.
const PROCESSES: i64 = 100_000;
/// Transactions of one process, at most.
const TXNS: i64 = 1_000_000;

/// The number of a node's process. Those of a node are so many that a run uses up all of them only if it should never have been begun.
fn process_of(node: u16, number: u64) -> u64 {
    let most = PROCESSES.unsigned_abs();
    assert!(
        number < most,
        "a client has connected too often: there are {most} sessions of a node"
    );
    u64::from(node) * most + number
}

/// How long the client of this number waits for the answer to a COMMIT. The last one of three: of few clients, too, there is one that does
/// not only look on.
fn commit_within(client: u64) -> Duration {
    if client % IMPATIENT == IMPATIENT - 1 {
        COMMIT_PATIENCE
    } else {
        PATIENCE
    }
}

/// The client of a session, of so many that a run has at all nodes together; of a history that does not say how many it is a client of its
/// own.
pub fn client_of(process: u64, clients: u64) -> u64 {
    let number = process % PROCESSES.unsigned_abs();
    number.checked_rem(clients).unwrap_or(process)
}

impl Client {
    /// Runs until stopped.
    pub async fn run(mut self) {
        let mut open: Option<Open> = None;
        while !self.stop.load(Ordering::Relaxed) {
            tokio::time::sleep(self.pause).await;
            let Some(now) = &mut open else {
                open = self.connect(None).await;
                continue;
            };
            now.made += 1;
            let txn = i64::try_from(now.number).unwrap_or(0) * TXNS + now.made;
            let mut steps = self.generator.next(txn);
            self.tell(Stage::Invoke, now.process, txn, &steps, None);
            let (stage, error) = match self.transact(&now.session, txn, &mut steps).await {
                Outcome::Ok => (Stage::Ok, None),
                Outcome::Fail(error) => (Stage::Fail, Some(error)),
                Outcome::Info(error) => (Stage::Info, Some(error)),
            };
            self.tell(stage, now.process, txn, &steps, error.clone());
            // Who has no answer does not wait for it any longer, and connects again.
            if stage == Stage::Info || (stage != Stage::Ok && self.unusable(&now.session).await) {
                open = None;
            } else if stage == Stage::Ok && now.made >= now.moves_after {
                open = self.go_on(open.take()).await;
            }
        }
    }

    fn place(&self) -> &Place {
        &self.places[self.at]
    }

    /// A new connection, to a session that goes on or to a new one.
    async fn connect(&mut self, process: Option<u64>) -> Option<Open> {
        let connecting = Session::connect(&self.place().config, "client");
        let session = tokio::time::timeout(PATIENCE, connecting).await.ok()?.ok()?;
        // By the client's own number and not by who connects first, since transactions' ids, and with them all values, follow from it.
        let (client, clients) = self.number;
        let number = process_of(self.place().node, client + self.connections * clients);
        self.connections += 1;
        let moves = self.moves.as_mut();
        Some(Open {
            session,
            process: process.unwrap_or(number),
            number,
            made: 0,
            moves_after: moves.map_or(i64::MAX, |random| random.random_range(5..30)),
        })
    }

    /// The session goes on at another node, once that knows what the session saw; a new one begins there if it cannot be known, as
    /// for a system that has nothing to say so, whose sessions just go on.
    async fn go_on(&mut self, open: Option<Open>) -> Option<Open> {
        let (open, random) = (open?, self.moves.as_mut()?);
        let others = self.places.len() - 1;
        let next = (self.at + 1 + random.random_range(0..others.max(1))) % self.places.len();
        let carried = match &self.places[next].daemon {
            None => true,
            Some(daemon) => match position(&open.session).await {
                Some(lsn) => applied_up_to(daemon, self.place().node, lsn, CARRIED_WITHIN).await,
                None => false,
            },
        };
        self.at = next;
        self.connect(carried.then_some(open.process)).await
    }

    fn tell(&self, stage: Stage, process: u64, txn: i64, steps: &[Step], error: Option<String>) {
        let op = Op {
            at_us: self.clock.now_us(),
            stage,
            process,
            node: self.place().node,
            txn,
            steps: steps.to_vec(),
            error,
        };
        self.record.tell(Event::Op(op));
    }

    /// Rolls back; is the session of no more use?
    async fn unusable(&self, session: &Session) -> bool {
        let rollback = tokio::time::timeout(PATIENCE, session.try_run("rollback"));
        !matches!(rollback.await, Ok(Ok(())))
    }

    async fn transact(&self, session: &Session, txn: i64, steps: &mut [Step]) -> Outcome {
        if let Err(error) = self.before_commit(session, txn, steps).await {
            // COMMIT was not sent, so whatever happened to the connection, it cannot commit.
            return Outcome::Fail(error);
        }
        if steps.iter().any(|step| step.act == Act::GiveUp) {
            return Outcome::Fail("rolled back, as planned".to_owned());
        }
        match tokio::time::timeout(commit_within(self.number.0), session.try_run("commit")).await {
            Ok(Ok(())) => Outcome::Ok,
            // A server that finds no space (53100) for what comes behind a commit record panics, and may find the record when it starts again.
            Ok(Err(error)) if error.is_disconnect() || error.code.starts_with("53") => {
                Outcome::Info(error.to_string())
            }
            Ok(Err(error)) => Outcome::Fail(error.to_string()),
            Err(_) => Outcome::Info("no answer to COMMIT".to_owned()),
        }
    }

    async fn before_commit(&self, session: &Session, txn: i64, steps: &mut [Step]) -> Result<(), String> {
        // What writes thousands of rows would hardly ever be let, and reads nothing.
        // pgbench has the server's default: with few branches hardly any would be let, either.
        let is_tpcb = self.workload.shape == Shape::Tpcb && steps.iter().any(|step| !step.act.reads());
        let level = match is_tpcb || steps.iter().any(|step| step.last.is_some()) {
            true => "read committed",
            false => "repeatable read",
        };
        ask(session, &format!("begin isolation level {level}")).await?;
        for step in steps.iter_mut() {
            match step.act {
                Act::Read => {
                    let sql = self.workload.read_sql(&step.table, step.key);
                    (step.value, step.list) = seen(ask(session, &sql).await?)?;
                }
                Act::Total => {
                    let sql = self.workload.total_sql(&step.table);
                    step.value = seen(ask(session, &sql).await?)?.0;
                }
                Act::Write => {
                    let answer = ask(session, &self.workload.write_sql(step, self.keys)).await?;
                    if self.workload.appends {
                        step.list = seen(answer)?.1;
                    }
                }
                Act::Delete => {
                    ask(
                        session,
                        &format!("delete from {} where k = {}", step.table, step.key),
                    )
                    .await?;
                }
                Act::WriteMany | Act::PutMany | Act::DeleteMany => {
                    ask(session, &self.workload.many_sql(step)).await?;
                }
                Act::UndoneMany => {
                    ask(session, "savepoint here").await?;
                    ask(session, &self.workload.many_sql(step)).await?;
                    ask(session, "rollback to savepoint here").await?;
                }
                Act::GiveUp => {}
            }
        }
        if steps.iter().any(|step| !step.act.reads()) {
            let sql = format!("insert into witness values ({txn}, {})", self.place().node);
            ask(session, &sql).await?;
        }
        Ok(())
    }
}

/// Where the server's WAL ends, after all that the session saw.
async fn position(session: &Session) -> Option<u64> {
    let sql = "select (pg_current_wal_insert_lsn() - '0/0')::text";
    let rows = ask(session, sql).await.ok()?;
    rows.into_iter().flatten().flatten().next()?.parse().ok()
}

/// A row's value and list, of what one statement answered.
fn seen(rows: Vec<Vec<Option<String>>>) -> Result<(Option<i64>, Option<Vec<i64>>), String> {
    let mut row = rows.into_iter().flatten();
    let value = row
        .next()
        .flatten()
        .map(|text| text.parse().map_err(|_| format!("`{text}` is no value")));
    let list = row
        .next()
        .flatten()
        .map(|text| serde_json::from_str(&text).map_err(|_| format!("`{text}` is no list")));
    Ok((value.transpose()?, list.transpose()?))
}

async fn ask(session: &Session, sql: &str) -> Result<Vec<Vec<Option<String>>>, String> {
    match tokio::time::timeout(PATIENCE, session.try_rows(sql)).await {
        Ok(answer) => answer.map_err(|error: Refused| error.to_string()),
        Err(_) => Err("no answer".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::generator::LOOKS_ON;

    #[test]
    fn some_that_write_give_a_commit_up_before_faults_end_and_others_do_not() {
        let looks_on = u64::try_from(LOOKS_ON).unwrap();
        for clients in [3, 9, 25] {
            let writers = (0..clients).filter(|client| client % looks_on != looks_on - 1);
            let (soon, late): (Vec<u64>, Vec<u64>) =
                writers.partition(|&client| commit_within(client) < Duration::from_millis(1_500));
            assert!(!soon.is_empty() && soon.len() < late.len(), "{soon:?} {late:?}");
        }
    }

    #[test]
    fn a_process_is_of_its_node_and_of_one_client_whoever_connects_first() {
        let (clients, mut all) = (9, std::collections::BTreeSet::new());
        for (client, connections) in (0..clients).flat_map(|client| (0..50).map(move |count| (client, count)))
        {
            let process = process_of(2, client + connections * clients);
            assert!(all.insert(process));
            let txn = i64::try_from(process).unwrap() * TXNS + 1;
            assert_eq!(node_of(txn), 2);
            assert_eq!(client_of(process, clients), client);
        }
        assert_eq!(client_of(200_011, 0), 200_011);
    }
}
