//! One run: a cluster, load, faults, quiet, and everything that can be known of it written down.
//!
//! In:   [`Options`]        Out: a [`Record`] of all that happened
//! Invariants: 1. every run ends with: heal, write again, quiesce, read everything everywhere; 2. what happened is written down when it
//!        happens, so that a run that is given up leaves it, too

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anabranch_tests::Session;
use anabranch_tests::cluster::Cluster;
use anabranch_tests::disk::Disk;
use anabranch_tests::postgres::{DATABASE, Postgres};
use futures_util::FutureExt;
use futures_util::future::join_all;
use indicatif::{ProgressBar, ProgressStyle};
use rand::SeedableRng;
use rand::rngs::StdRng;

use crate::client::{Client, Place};
use crate::clock::Clock;
use crate::generator::Generator;
use crate::history::{End, Event, Header, Sample};
use crate::nemesis::{self, Disks, Lines, Network, Planned, Scene, Toll};
use crate::policy::Rule;
use crate::record::{self, Record};
use crate::shim::{self, Shim};
use crate::suite::controls;
use crate::system::System;
use crate::workload::Workload;
use crate::{Result, report, wal};

/// What to run.
#[derive(Debug, Clone)]
pub struct Options {
    /// The workload.
    pub workload: Workload,
    /// What is on trial.
    pub system: System,
    /// Name of the nemesis.
    pub nemesis: String,
    /// What decides between concurrent writes of a row.
    pub policy: Rule,
    /// How nodes reach each other.
    pub network: Network,
    /// Versions of the servers, one for each node.
    pub servers: Vec<u32>,
    /// Length of the load.
    pub length: Duration,
    /// Seed of operations and faults.
    pub seed: u64,
    /// Clients at each node.
    pub clients: usize,
    /// Keys of each table.
    pub keys: i64,
    /// Pause between a client's transactions.
    pub pause: Duration,
    /// The rule to break, and the build that can.
    pub broken: Option<(String, PathBuf)>,
    /// Instead of what the seed says.
    pub plan: Option<Vec<Planned>>,
    /// How long to wait for quiet.
    pub patience: Duration,
    /// Show progress?
    pub progress: bool,
}

impl Options {
    /// The command that runs it again.
    pub fn command(&self) -> String {
        let servers: Vec<String> = self.servers.iter().map(ToString::to_string).collect();
        let mut text = format!(
            "anabranch-jepsen run --workload {} --nemesis {} --seconds {} --seed {} --servers {} --clients {} --keys {} --pause-ms {}",
            self.workload.name,
            self.nemesis,
            self.length.as_secs(),
            self.seed,
            servers.join(","),
            self.clients,
            self.keys,
            self.pause.as_millis()
        );
        if self.system != System::Anabranch {
            text.push_str(&format!(" --system {}", self.system.name()));
        }
        if self.network != Network::Proxy {
            text.push_str(&format!(" --network {}", self.network.name()));
        }
        if let Some(policy) = self.policy.unusual() {
            text.push_str(&format!(" --policy {policy}"));
        }
        if let Some((rule, _)) = &self.broken {
            text.push_str(&format!(" --break {rule}"));
        }
        if self.patience != PATIENCE {
            text.push_str(&format!(" --patience {}", self.patience.as_secs()));
        }
        if let Some(plan) = self
            .plan
            .as_ref()
            .filter(|plan| **plan != self.plan_of_the_seed())
            && let Ok(json) = serde_json::to_string(plan)
        {
            text.push_str(&format!(" --plan '{json}'"));
        }
        text
    }

    fn plan_of_the_seed(&self) -> Vec<Planned> {
        nemesis::plan(&self.nemesis, self.servers.len(), self.seed, self.length)
    }

    /// The faults.
    pub fn plan(&self) -> Vec<Planned> {
        self.plan.clone().unwrap_or_else(|| self.plan_of_the_seed())
    }
}

mod quiet;
mod rounds;

/// How long a run waits for quiet unless it is said.
pub const PATIENCE: Duration = Duration::from_secs(90);

/// A segment of the journals.
const SEGMENT_MIB: u64 = 1;

/// The environment variable that says which rule a broken build breaks.
pub const BREAK: &str = "ANABRANCH_BREAK";

/// Runs it, and writes down what happens.
pub async fn run(options: &Options, record: &Record) -> Result<()> {
    let bar = bar(options);
    bar.set_message("starting servers");
    let Stage {
        mut cluster,
        mut standby,
        disks,
        shims,
        lines,
    } = start(options).await?;
    preload(&cluster, options).await?;
    let clock = Clock::start();
    record.begin(header(options, clock));
    let stop = Arc::new(AtomicBool::new(false));
    let clients = clients(&cluster, options, clock, record, &stop);
    let sampler = tokio::spawn(sample(
        samplers(&cluster),
        clock,
        record.clone(),
        Arc::clone(&stop),
    ));
    let ticker = tokio::spawn(tick(bar.clone(), options.length));
    let mut scene = Scene {
        cluster: &mut cluster,
        standby: standby.as_mut(),
        disks,
        shims,
        lines,
        table: options.workload.table_names()[0].clone(),
        clock,
        record: record.clone(),
        held: Vec::new(),
        toll: Toll {
            daemons: options.system == System::Anabranch,
            ..Toll::default()
        },
    };
    let undone_us = scene
        .carry_out(&options.plan(), options.seed, options.length)
        .await?;
    ticker.abort();
    let mut end = End {
        patience_seconds: options.patience.as_secs(),
        ..End::default()
    };
    // All faults are undone; the clients write on for a moment.
    bar.set_message("healed, writing on");
    scene.wait(Duration::from_secs(2)).await;
    stop.store(true, Ordering::Relaxed);
    for ended in join_all(clients).await {
        if let Err(error) = ended {
            end.miss(&format!("a client of the harness could not go on: {error}"));
        }
    }
    let load_us = clock.now_us();
    (end.load_us, end.healed_us) = (Some(load_us), undone_us.unwrap_or(load_us));
    if let Err(error) = sampler.await {
        end.miss(&format!("the sampler could not go on: {error}"));
    }
    // Disks go last: the daemons have files on them.
    let _disks = std::mem::take(&mut scene.disks);
    let toll = std::mem::take(&mut scene.toll);
    end.notes.extend(toll.notes.iter().cloned());
    let ending = quiet::Ending {
        cluster: &mut cluster,
        toll: &toll,
        options,
        clock,
        record,
        bar: &bar,
    };
    // What is asked of a server that is gone panics.
    let through = std::panic::AssertUnwindSafe(ending.whole(&mut end))
        .catch_unwind()
        .await;
    for death in toll.watch(&mut cluster, clock.now_us()) {
        record.tell(Event::Death(death));
    }
    through.map_err(|panic| {
        let said = record::said(&*panic);
        format!("the harness could not go on after the load: {said}")
    })?;
    for node in &cluster.nodes {
        quiet::keep_logs(node, &mut end);
    }
    record.tell(Event::End(end));
    bar.finish_and_clear();
    // Before the disks: they cannot be unmounted under a daemon.
    drop(cluster);
    Ok(())
}

fn header(options: &Options, clock: Clock) -> Header {
    Header {
        format: 1,
        workload: options.workload.name.to_owned(),
        nemesis: options.nemesis.clone(),
        system: options.system.name().to_owned(),
        network: options.network.name().to_owned(),
        seed: options.seed,
        servers: options.servers.clone(),
        seconds: options.length.as_secs(),
        clients: options.clients,
        keys: options.keys,
        pause_ms: u64::try_from(options.pause.as_millis()).unwrap_or(0),
        policy: options.policy.unusual().unwrap_or_default().to_owned(),
        broken: options.broken.as_ref().map(|(rule, _)| rule.clone()),
        plan: Some(options.plan()),
        patience_seconds: options.patience.as_secs(),
        command: options.command(),
        started_us: clock.began_us(),
        cut_short: None,
    }
}

fn bar(options: &Options) -> ProgressBar {
    if !options.progress {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(options.length.as_secs());
    if let Ok(style) = ProgressStyle::with_template("{prefix} [{elapsed}] {wide_bar} {msg}") {
        bar.set_style(style);
    }
    bar.set_prefix(report::run_name(
        options.workload.name,
        options.policy,
        &options.nemesis,
    ));
    bar
}

async fn tick(bar: ProgressBar, length: Duration) {
    bar.set_message("load and faults");
    for _ in 0..length.as_secs() {
        tokio::time::sleep(Duration::from_secs(1)).await;
        bar.inc(1);
    }
}

/// What a run is played on.
struct Stage {
    cluster: Cluster,
    standby: Option<Postgres>,
    disks: Disks,
    shims: Vec<[Shim; 2]>,
    lines: Lines,
}

async fn start(options: &Options) -> Result<Stage> {
    let mut builder = Cluster::of_versions(&options.servers)
        .schema(&format!(
            "{}; {}",
            options.workload.schema(),
            quiet::BALLAST_TABLE
        ))
        // As small as can be, so that segments come and go in a short run.
        .config(&format!("[journal]\nsegment_mib = {SEGMENT_MIB}\n"))
        .without_daemons();
    if options.network == Network::Veth {
        let network = anabranch_tests::network::Network::start(options.servers.len())?;
        // What cuts nothing would be survived.
        let proven = nemesis::prove(network.seats());
        proven.map_err(|why| format!("the network does not do what is done to it: {why}"))?;
        builder = builder.network(network);
    }
    if nemesis::moves_clocks(&options.nemesis) {
        builder = builder.clocks();
    }
    if options.workload.bulk_one_in > 0 {
        // A large transaction that loses has thousands of lines, and each is asked for.
        builder = builder.config("[conflict_log]\nlines_per_second = 0\n");
    }
    if let Some(policy) = options.workload.policy() {
        builder = builder.policy(policy);
    }
    if let Some(policy) = options.policy.file() {
        builder = builder.policy(&policy);
    }
    let mut cluster = options
        .system
        .configured(builder, options.servers.len())
        .start()
        .await;
    let disks = disks(&mut cluster, options).await?;
    let shims = shims(&mut cluster, options).await?;
    let mut standby = None;
    if nemesis::wants_standby(&options.nemesis) {
        let dir = cluster.dir().join("standby");
        let mut follower = Postgres::standby_of(&cluster.nodes[0].server, &dir);
        follower.start().await;
        let first = &mut cluster.nodes[0].server;
        first.set_conf(&["synchronous_standby_names = 'standby'"]);
        first.reload().await;
        let admin = first.admin().await;
        let sync = "select count(*) from pg_stat_replication where application_name = 'standby' and sync_state = 'sync'";
        anabranch_tests::wait::until("the standby is synchronous", async || {
            admin.number(sync).await == 1
        })
        .await;
        standby = Some(follower);
    }
    for node in &mut cluster.nodes {
        wal::begin(&node.server.admin().await).await?;
        if let Some((rule, program)) = &options.broken {
            node.daemon.set_program(program);
            node.daemon.set_env(BREAK, rule);
        }
        if options.system == System::Anabranch {
            node.daemon.start();
        }
    }
    let lines = match options.system {
        System::Anabranch => Lines::between_daemons(&cluster)?,
        _ => Lines::between_servers(&cluster).await?,
    };
    options.system.replicate(&cluster, &lines).await;
    cluster.converge().await;
    Ok(Stage {
        cluster,
        standby,
        disks,
        shims,
        lines,
    })
}

/// Disks of their own, where the nemesis needs them.
async fn disks(cluster: &mut Cluster, options: &Options) -> Result<Disks> {
    let mut disks = Disks::default();
    for at in cluster.all() {
        let images = |what: &str| cluster.dir().join(format!("n{}-{what}-disk", at + 1));
        let (of_daemon, of_server) = (images("daemon"), images("server"));
        let node = &mut cluster.nodes[at];
        if nemesis::wants_disks(&options.nemesis) {
            disks.daemons.push(Disk::under(&node.data_dir, &of_daemon, 512)?);
        }
        if nemesis::wants_server_disks(&options.nemesis) {
            node.server.stop();
            disks
                .servers
                .push(Disk::under(&node.server.data_dir(), &of_server, 2048)?);
            node.server.start().await;
        }
    }
    Ok(disks)
}

/// A hand in fsync, where the nemesis needs it.
async fn shims(cluster: &mut Cluster, options: &Options) -> Result<Vec<[Shim; 2]>> {
    let mut shims = Vec::new();
    if !nemesis::wants_shim(&options.nemesis) {
        return Ok(shims);
    }
    let library = shim::compile(cluster.dir())?;
    for at in cluster.all() {
        let says = |what: &str| cluster.dir().join(format!("n{}-{what}-fsync", at + 1));
        let both = [
            Shim::new(&library, says("server"))?,
            Shim::new(&library, says("daemon"))?,
        ];
        let node = &mut cluster.nodes[at];
        for (name, value) in both[0].env() {
            node.server.set_env(&name, &value);
        }
        for (name, value) in both[1].env() {
            node.daemon.set_env(&name, &value);
        }
        node.server.stop();
        node.server.start().await;
        shims.push(both);
    }
    Ok(shims)
}

/// Writes the rows that are there before the load, as one transaction at the first node.
async fn preload(cluster: &Cluster, options: &Options) -> Result<()> {
    let rows = options.workload.preload(options.keys);
    if rows.is_empty() {
        return Ok(());
    }
    let mut sql = String::from("begin;");
    for (table, key, value) in rows {
        sql.push_str(&options.workload.preload_sql(&table, key, value));
        sql.push(';');
    }
    sql.push_str("commit");
    cluster.run(0, &sql).await;
    cluster.converge().await;
    Ok(())
}

fn clients(
    cluster: &Cluster,
    options: &Options,
    clock: Clock,
    record: &Record,
    stop: &Arc<AtomicBool>,
) -> Vec<tokio::task::JoinHandle<()>> {
    let workload = Arc::new(options.workload.clone());
    let broken = options.broken.as_ref().map(|(rule, _)| rule.as_str());
    let carries = options.system == System::Anabranch && broken != Some(controls::CARRY);
    let place = |node: &anabranch_tests::cluster::Node| Place {
        config: node.server.config("app", DATABASE),
        node: u16::try_from(node.id).unwrap_or(0),
        daemon: carries.then(|| node.data_dir.clone()),
    };
    let places = Arc::new(cluster.nodes.iter().map(place).collect::<Vec<_>>());
    let mut clients = Vec::new();
    let count = cluster.nodes.len() * options.clients;
    let as_number = |number: usize| u64::try_from(number).unwrap_or(u64::MAX);
    for number in 0..count {
        let seed = options.seed ^ 0x6d6f_7665 ^ as_number(number) << 32;
        let client = Client {
            places: Arc::clone(&places),
            at: number / options.clients,
            number: (as_number(number), as_number(count)),
            connections: 0,
            moves: nemesis::moves_sessions(&options.nemesis).then(|| StdRng::seed_from_u64(seed)),
            workload: Arc::clone(&workload),
            keys: options.keys,
            generator: Generator::new(&options.workload, options.keys, options.seed, number),
            pause: options.pause,
            clock,
            record: record.clone(),
            stop: Arc::clone(stop),
        };
        clients.push(tokio::spawn(client.run()));
    }
    clients
}

/// What the sampler needs of each node: id, connection, the daemon's folder.
fn samplers(cluster: &Cluster) -> Vec<(u16, tokio_postgres::Config, PathBuf)> {
    let of = |node: &anabranch_tests::cluster::Node| {
        (
            u16::try_from(node.id).unwrap_or(0),
            node.server.config("postgres", DATABASE),
            node.data_dir.clone(),
        )
    };
    cluster.nodes.iter().map(of).collect()
}

async fn sample(
    nodes: Vec<(u16, tokio_postgres::Config, PathBuf)>,
    clock: Clock,
    record: Record,
    stop: Arc<AtomicBool>,
) {
    while !stop.load(Ordering::Relaxed) {
        tokio::time::sleep(Duration::from_secs(2)).await;
        let each = nodes
            .iter()
            .map(|(node, config, daemon)| sample_one(*node, config, daemon, clock));
        for sample in join_all(each).await {
            record.tell(Event::Sample(sample));
        }
    }
}

async fn sample_one(node: u16, config: &tokio_postgres::Config, daemon: &Path, clock: Clock) -> Sample {
    let mut sample = Sample {
        at_us: clock.now_us(),
        node,
        ..Sample::default()
    };
    let asking = async {
        let session = Session::connect(config, "sampler").await.ok()?;
        let sql = "select (pg_current_wal_insert_lsn() - restart_lsn)::bigint, (extract(epoch from clock_timestamp()) * \
                   1000000)::bigint from pg_replication_slots where slot_name = 'anabranch'";
        let mut row = session
            .try_rows(sql)
            .await
            .ok()?
            .into_iter()
            .next()?
            .into_iter()
            .flatten();
        Some((row.next()?.parse::<i64>().ok()?, row.next()?.parse::<i64>().ok()?))
    };
    if let Ok(Some((bytes, server_us))) = tokio::time::timeout(Duration::from_secs(1), asking).await {
        sample.slot_bytes = Some(bytes);
        sample.clock_us = Some(server_us - clock.began_us() - clock.now_us());
    }
    let asking = anabranch_tests::daemon::status(daemon);
    let Ok(Some(status)) = tokio::time::timeout(Duration::from_secs(2), asking).await else {
        return sample;
    };
    sample.journal_bytes = status["journal"]["bytes"].as_u64();
    sample.index_entries = status["index"]["entries"].as_u64();
    sample.conflicts = status["apply"]["conflicts"].as_u64();
    let lags = status["peers"].as_array().into_iter().flatten();
    sample.lag_seconds = lags
        .filter_map(|peer| peer["lag_seconds"].as_f64())
        .reduce(f64::max);
    let alarms = status["alarms"].as_array().into_iter().flatten();
    sample.alarms = alarms
        .filter_map(|alarm| Some(alarm["text"].as_str()?.to_owned()))
        .collect();
    sample
}
