//! Clients: each runs its generator's transactions at one node, one at a time, and says what became of each.
//!
//! In:   a [`Generator`]        Out: [`Op`]s
//! Invariants: 1. `fail` is said only of what surely did not commit; 2. every transaction that writes inserts a
//!        witness row of its own; 3. a new connection is a new process
//!
//! Transactions are REPEATABLE READ, so that what one reads is one state of its node; what the server then refuses
//! for a concurrent write is a `fail`.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anabranch_tests::Session;
use anabranch_tests::session::Refused;
use tokio::sync::mpsc::UnboundedSender;
use tokio_postgres::Config;

use crate::clock::Clock;
use crate::generator::Generator;
use crate::history::{Act, Event, Op, Stage, Step};
use crate::workload::Workload;

/// Longest wait for one answer; after that nobody knows.
const PATIENCE: Duration = Duration::from_secs(10);

/// What a client needs to know.
pub struct Client {
    /// How to reach its node.
    pub config: Config,
    /// Its node: 1, 2, ...
    pub node: u16,
    /// What it does.
    pub workload: Arc<Workload>,
    /// What next.
    pub generator: Generator,
    /// Pause between transactions.
    pub pause: Duration,
    /// The run's clock.
    pub clock: Clock,
    /// Where operations go.
    pub sink: UnboundedSender<Event>,
    /// Processes begun so far at this node.
    pub processes: Arc<AtomicU64>,
    /// Ends it.
    pub stop: Arc<AtomicBool>,
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

impl Client {
    /// Runs until stopped.
    pub async fn run(mut self) {
        let mut session = None;
        let (mut process, mut made) = (0, 0);
        while !self.stop.load(Ordering::Relaxed) {
            tokio::time::sleep(self.pause).await;
            let Some(open) = session.as_ref() else {
                let connecting = Session::connect(&self.config, "client");
                session = tokio::time::timeout(PATIENCE, connecting)
                    .await
                    .ok()
                    .and_then(Result::ok);
                if session.is_none() {
                    continue;
                }
                let number = self.processes.fetch_add(1, Ordering::Relaxed);
                process = u64::from(self.node) * PROCESSES.unsigned_abs() + number;
                made = 0;
                continue;
            };
            made += 1;
            let txn = i64::try_from(process).unwrap_or(0) * TXNS + made;
            let mut steps = self.generator.next(txn);
            self.tell(Stage::Invoke, process, txn, &steps, None);
            let (stage, error) = match self.transact(open, txn, &mut steps).await {
                Outcome::Ok => (Stage::Ok, None),
                Outcome::Fail(error) => (Stage::Fail, Some(error)),
                Outcome::Info(error) => (Stage::Info, Some(error)),
            };
            self.tell(stage, process, txn, &steps, error.clone());
            if stage != Stage::Ok && self.unusable(open).await {
                session = None;
            }
        }
    }

    fn tell(&self, stage: Stage, process: u64, txn: i64, steps: &[Step], error: Option<String>) {
        let op = Op {
            at_us: self.clock.now_us(),
            stage,
            process,
            node: self.node,
            txn,
            steps: steps.to_vec(),
            error,
        };
        let _ = self.sink.send(Event::Op(op));
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
        match tokio::time::timeout(PATIENCE, session.try_run("commit")).await {
            Ok(Ok(())) => Outcome::Ok,
            Ok(Err(error)) if error.is_disconnect() => Outcome::Info(error.to_string()),
            Ok(Err(error)) => Outcome::Fail(error.to_string()),
            Err(_) => Outcome::Info("no answer to COMMIT".to_owned()),
        }
    }

    async fn before_commit(&self, session: &Session, txn: i64, steps: &mut [Step]) -> Result<(), String> {
        ask(session, "begin isolation level repeatable read").await?;
        for step in steps.iter_mut() {
            match step.act {
                Act::Read => {
                    let sql = format!("select v from {} where k = {}", step.table, step.key);
                    let rows = ask(session, &sql).await?;
                    step.value = rows
                        .into_iter()
                        .next()
                        .and_then(|row| row.into_iter().next().flatten())
                        .map(|text| text.parse().map_err(|_| format!("`{text}` is no value")))
                        .transpose()?;
                }
                Act::Write => {
                    let value = step.value.unwrap_or_default();
                    ask(session, &self.workload.write_sql(&step.table, step.key, value)).await?;
                }
                Act::Delete => {
                    ask(
                        session,
                        &format!("delete from {} where k = {}", step.table, step.key),
                    )
                    .await?;
                }
            }
        }
        if steps.iter().any(|step| step.act != Act::Read) {
            let sql = format!("insert into witness values ({txn}, {})", self.node);
            ask(session, &sql).await?;
        }
        Ok(())
    }
}

async fn ask(session: &Session, sql: &str) -> Result<Vec<Vec<Option<String>>>, String> {
    match tokio::time::timeout(PATIENCE, session.try_rows(sql)).await {
        Ok(answer) => answer.map_err(|error: Refused| error.to_string()),
        Err(_) => Err("no answer".to_owned()),
    }
}
