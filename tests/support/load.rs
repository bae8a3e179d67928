//! Random clients at every node, and the accounting of every write they were promised.
//!
//! Each transaction writes a witness row of its own and changes some shared rows. A shared row is the list
//! of the writes it went through, in order: a write that another one saw and built upon is still to be
//! read in it. So at the end every acknowledged write must be
//! * in the row, or
//! * in a tuple of the conflict log, of every node (it lost, or what it became part of lost), or
//! * in a row that an acknowledged DELETE removed, having seen it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::task::JoinHandle;
use tokio_postgres::Config;

use crate::cluster::Cluster;
use crate::session::{Refused, Session};
use crate::wait::PATIENCE;

/// The tables the load writes to.
pub const SCHEMA: &str = "create table kv (k int primary key, hist text[] not null); \
     create table witness (id text primary key, node int not null)";

/// How the clients behave.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Clients per node.
    pub clients: usize,
    /// Shared rows: the fewer, the more conflicts.
    pub keys: i32,
    /// One write in this many is a DELETE; zero for none.
    pub delete_one_in: u32,
    /// Pause between transactions of one client.
    pub pause: Duration,
    /// Seed of all choices.
    pub seed: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            clients: 2,
            keys: 60,
            delete_one_in: 0,
            pause: Duration::from_millis(5),
            seed: 1,
        }
    }
}

/// Whether the server's answer to COMMIT arrived.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Answer {
    Committed,
    Unknown,
}

/// One transaction of a client.
#[derive(Debug)]
struct Txn {
    id: String,
    answer: Answer,
    writes: Vec<String>,
    /// Writes that its DELETEs saw and removed.
    removed: Vec<String>,
}

/// Clients that write until stopped.
pub struct Load {
    stop: Arc<AtomicBool>,
    clients: Vec<JoinHandle<Vec<Txn>>>,
}

/// What the clients did.
#[derive(Debug)]
pub struct Ledger {
    txns: Vec<Txn>,
}

impl Load {
    /// Starts clients at these nodes; they reconnect when a server goes away.
    pub fn start(cluster: &Cluster, nodes: &[usize], options: Options) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let mut clients = Vec::new();
        for &node in nodes {
            for client in 0..options.clients {
                let config = cluster.nodes[node]
                    .server
                    .config("app", crate::postgres::DATABASE);
                let seed = options.seed.wrapping_mul(1_000_003) ^ (node as u64 * 101 + client as u64);
                let name = format!("w{}n{}c{client}", options.seed, node + 1);
                let stop = Arc::clone(&stop);
                clients.push(tokio::spawn(async move {
                    let mut client = Client {
                        config,
                        node,
                        name,
                        options,
                        random: StdRng::seed_from_u64(seed),
                    };
                    client.write_until(&stop).await
                }));
            }
        }
        Self { stop, clients }
    }

    /// Lets every client finish its transaction, and returns what they did.
    pub async fn stop(self) -> Ledger {
        self.stop.store(true, Ordering::Relaxed);
        let mut txns = Vec::new();
        for client in self.clients {
            txns.extend(client.await.expect("a client of the load does not panic"));
        }
        Ledger { txns }
    }
}

struct Client {
    config: Config,
    node: usize,
    name: String,
    options: Options,
    random: StdRng,
}

impl Client {
    async fn write_until(&mut self, stop: &AtomicBool) -> Vec<Txn> {
        let mut done = Vec::new();
        let mut session = None;
        let mut number = 0_u64;
        while !stop.load(Ordering::Relaxed) {
            tokio::time::sleep(self.options.pause).await;
            let Some(open) = &session else {
                session = Session::connect(&self.config, &self.name).await.ok();
                continue;
            };
            number += 1;
            let mut txn = Txn {
                id: format!("{}t{number}", self.name),
                answer: Answer::Unknown,
                writes: Vec::new(),
                removed: Vec::new(),
            };
            match transact(&mut self.random, self.options, self.node, open, &mut txn).await {
                Ok(()) => {
                    txn.answer = Answer::Committed;
                    done.push(txn);
                }
                Err(error) if error.is_disconnect() => {
                    session = None;
                    done.push(txn);
                }
                // A deadlock or the like: the server rolled it back.
                Err(_) => {
                    let _ = open.try_run("rollback").await;
                }
            }
        }
        done
    }
}

async fn transact(
    random: &mut StdRng,
    options: Options,
    node: usize,
    session: &Session,
    txn: &mut Txn,
) -> Result<(), Refused> {
    session
        .try_run(&format!(
            "begin; insert into witness values ('{}', {})",
            txn.id,
            node + 1
        ))
        .await?;
    let count = random.random_range(1..=3);
    let keys: BTreeSet<i32> = (0..count).map(|_| random.random_range(0..options.keys)).collect();
    for (at, key) in keys.into_iter().enumerate() {
        if options.delete_one_in > 0 && random.random_range(0..options.delete_one_in) == 0 {
            let removed = session
                .try_rows(&format!(
                    "with gone as (delete from kv where k = {key} returning hist) select unnest(hist) from gone"
                ))
                .await?;
            txn.removed.extend(removed.into_iter().flatten().flatten());
        } else {
            let write = format!("{}.{at}", txn.id);
            session
                .try_run(&format!(
                    "insert into kv values ({key}, array['{write}']) \
                     on conflict (k) do update set hist = kv.hist || excluded.hist"
                ))
                .await?;
            txn.writes.push(write);
        }
    }
    session.try_run("commit").await
}

impl Ledger {
    /// Acknowledged transactions.
    pub fn committed(&self) -> usize {
        self.txns
            .iter()
            .filter(|txn| txn.answer == Answer::Committed)
            .count()
    }

    /// Transactions that were committed, or may have been: the server went before it had answered.
    pub fn perhaps_committed(&self) -> usize {
        self.txns.len()
    }

    /// Accounts for every write; call it on a converged cluster.
    pub async fn account(&self, cluster: &Cluster) {
        self.account_among(cluster, &cluster.all()).await;
    }

    /// The same where only some nodes are left.
    pub async fn account_among(&self, cluster: &Cluster, nodes: &[usize]) {
        assert!(
            self.committed() > 0,
            "the load committed nothing, so it proves nothing"
        );
        // A conflict that a node found when it decoded its own write has a line before that node applies anything more; the rows may
        // have been equal before.
        cluster.arrive_among(nodes, PATIENCE).await;
        for &node in nodes {
            self.account_at(cluster, node).await;
        }
    }

    async fn account_at(&self, cluster: &Cluster, node: usize) {
        let name = format!("n{}", node + 1);
        let admin = cluster.admin(node).await;
        let witnessed: BTreeSet<String> = admin.column("select id from witness").await.into_iter().collect();
        let mut in_rows: BTreeMap<String, usize> = BTreeMap::new();
        for write in admin.column("select unnest(hist) from kv").await {
            *in_rows.entry(write).or_default() += 1;
        }
        let twice: Vec<_> = in_rows.iter().filter(|(_, count)| **count > 1).take(10).collect();
        assert!(twice.is_empty(), "{name}: writes applied twice: {twice:?}");

        let mut logged = BTreeSet::new();
        for conflict in cluster.conflicts_at(node).await {
            logged.extend(writes_in(&conflict.everything()));
        }
        let removed: BTreeSet<&str> = self
            .txns
            .iter()
            .filter(|txn| witnessed.contains(&txn.id))
            .flat_map(|txn| txn.removed.iter().map(String::as_str))
            .collect();

        let mut lost = Vec::new();
        for txn in &self.txns {
            match (txn.answer, witnessed.contains(&txn.id)) {
                (Answer::Committed, false) => lost.push(format!("transaction {}", txn.id)),
                (_, true) => lost.extend(
                    txn.writes
                        .iter()
                        .filter(|write| {
                            !in_rows.contains_key(*write)
                                && !logged.contains(*write)
                                && !removed.contains(write.as_str())
                        })
                        .map(|write| format!("write {write}")),
                ),
                (Answer::Unknown, false) => {
                    let half = txn.writes.iter().find(|write| in_rows.contains_key(*write));
                    assert!(
                        half.is_none(),
                        "{name}: {half:?} is here without its transaction's other rows"
                    );
                }
            }
        }
        assert!(
            lost.is_empty(),
            "{name}: {} of {} transactions' writes are neither in a row nor in the conflict log: {:?}",
            lost.len(),
            self.txns.len(),
            &lost[..lost.len().min(20)]
        );
        let known: BTreeSet<&str> = self.txns.iter().map(|txn| txn.id.as_str()).collect();
        let prefix_of_ours = |id: &&String| id.starts_with('w') && !known.contains(id.as_str());
        // A transaction that this ledger rolled back must not appear; other ledgers have other seeds.
        let seeds: BTreeSet<&str> = known.iter().filter_map(|id| id.split('n').next()).collect();
        let ghosts: Vec<_> = witnessed
            .iter()
            .filter(prefix_of_ours)
            .filter(|id| seeds.contains(id.split('n').next().unwrap_or("")))
            .collect();
        assert!(
            ghosts.is_empty(),
            "{name}: transactions that were rolled back are here: {ghosts:?}"
        );
    }
}

/// Write names (`w1n2c0t17.0`) in a text.
fn writes_in(text: &str) -> impl Iterator<Item = String> {
    text.split(|c: char| !c.is_ascii_alphanumeric() && c != '.')
        .filter(|word| word.starts_with('w') && word.contains('.'))
        .map(str::to_owned)
}
