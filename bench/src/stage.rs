//! The stage: writing servers, and one receiving server for each system.
//!
//! Anabranch has a source of its own, because `anabranch init` gives tables with text the replica identity FULL,
//! which makes their updates dearer to log and decode: its cost, not its peers'. Native replication and pglogical
//! share one, each with its slot. All systems but the one that is measured stand still (SIGSTOP), their walsenders too:
//! what is written meanwhile is decoded in nobody's time but their own.

use std::collections::BTreeMap;
use std::fmt;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anabranch_tests::cluster::{Cluster, prepare_database};
use anabranch_tests::pglogical::until_replicating;
use anabranch_tests::postgres::{DATABASE, Options, Postgres, open_dir};
use anabranch_tests::process::{Signal, signal};
use anabranch_tests::session::Session;
use clap::ValueEnum;
use tempfile::TempDir;

use crate::usage::{Part, Processes};

/// What replicates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum System {
    #[value(name = "anabranch-15")]
    Anabranch15,
    #[value(name = "native-15")]
    Native15,
    #[value(name = "pglogical-15")]
    Pglogical15,
    #[value(name = "anabranch-18")]
    Anabranch18,
    #[value(name = "native-18")]
    Native18,
}

impl fmt::Display for System {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Anabranch15 => "anabranch-15",
            Self::Native15 => "native-15",
            Self::Pglogical15 => "pglogical-15",
            Self::Anabranch18 => "anabranch-18",
            Self::Native18 => "native-18",
        })
    }
}

impl System {
    /// Its servers' major version.
    pub const fn version(self) -> u32 {
        match self {
            Self::Anabranch18 | Self::Native18 => 18,
            _ => 15,
        }
    }

    pub const fn is_ours(self) -> bool {
        matches!(self, Self::Anabranch15 | Self::Anabranch18)
    }

    /// Its source.
    pub const fn place(self) -> Place {
        (self.version(), self.is_ours())
    }
}

/// How long a piece may take before it is given up.
pub const PATIENCE: Duration = Duration::from_secs(900);

/// A source that is written to: its version, and whether it is Anabranch's.
pub type Place = (u32, bool);

/// A source and its targets.
enum Venue {
    /// Node 0 of the cluster is the source, node 1 the target.
    Ours { version: u32, cluster: Cluster },
    Peers {
        version: u32,
        source: Postgres,
        targets: Vec<(System, Postgres)>,
    },
}

/// Everything that runs.
pub struct Stage {
    venues: Vec<Venue>,
    systems: Vec<System>,
    /// Processes that stand still, by their system.
    stopped: BTreeMap<System, Vec<u32>>,
    _dir: TempDir,
}

/// postgresql.conf of every server: durable, and nothing that comes by the clock.
pub fn settings(pglogical: bool) -> Vec<String> {
    let mut lines: Vec<String> = [
        "shared_buffers = 512MB",
        "max_wal_size = 32GB",
        "checkpoint_timeout = 1d",
        "autovacuum = off",
        // Long enough for whoever is stopped. Not 0: then a walsender asks its socket for an answer behind every message that it
        // sends (`WalSndWriteData`), which no server does that has the timeout it comes with.
        "wal_sender_timeout = 1d",
        "wal_receiver_timeout = 0",
        "max_worker_processes = 24",
        "log_lock_waits = off",
    ]
    .map(str::to_owned)
    .to_vec();
    if pglogical {
        lines.push("shared_preload_libraries = 'pglogical'".to_owned());
    }
    lines
}

impl Stage {
    /// Starts servers and systems with these tables, empty.
    pub async fn start(systems: &[System], tables: &[String]) -> Self {
        let dir = open_dir("anabranch-bench-");
        let mut places: Vec<Place> = systems.iter().map(|system| system.place()).collect();
        places.sort_unstable();
        places.dedup();
        let mut venues = Vec::new();
        for place in places {
            let here: Vec<System> = systems
                .iter()
                .copied()
                .filter(|system| system.place() == place)
                .collect();
            venues.push(match place {
                (version, true) => Venue::ours(version, tables).await,
                (version, false) => Venue::peers(version, &here, tables, &dir).await,
            });
        }
        Self {
            venues,
            systems: systems.to_vec(),
            stopped: BTreeMap::new(),
            _dir: dir,
        }
    }

    fn venue(&self, place: Place) -> &Venue {
        let mut venues = self.venues.iter();
        venues
            .find(|venue| venue.place() == place)
            .expect("every place was set up")
    }

    /// All sources.
    pub fn places(&self) -> Vec<Place> {
        self.venues.iter().map(Venue::place).collect()
    }

    /// All systems.
    pub fn systems(&self) -> &[System] {
        &self.systems
    }

    /// A source.
    pub fn source(&self, place: Place) -> &Postgres {
        match self.venue(place) {
            Venue::Ours { cluster, .. } => &cluster.nodes[0].server,
            Venue::Peers { source, .. } => source,
        }
    }

    /// Where a system writes.
    pub fn target(&self, system: System) -> &Postgres {
        match self.venue(system.place()) {
            Venue::Ours { cluster, .. } => &cluster.nodes[1].server,
            Venue::Peers { targets, .. } => {
                let mut targets = targets.iter();
                &targets
                    .find(|target| target.0 == system)
                    .expect("a target each")
                    .1
            }
        }
    }

    /// Anabranch's daemons.
    fn daemons(&mut self, system: System) -> Vec<u32> {
        let place = system.place();
        let mut found = Vec::new();
        for venue in &mut self.venues {
            if let Venue::Ours { version, cluster } = venue
                && (*version, true) == place
            {
                found.extend(cluster.nodes.iter_mut().filter_map(|node| node.daemon.pid()));
            }
        }
        found
    }

    /// Lets a system stand still: its walsender, and its daemons or its apply worker. Nothing is decoded, sent or
    /// applied until it goes on. The servers' `wal_sender_timeout` is a day, so nobody misses it.
    pub async fn pause(&mut self, system: System) {
        if self.stopped.contains_key(&system) {
            return;
        }
        let mut stopped = self.stop_walsenders(system).await;
        if system.is_ours() {
            for pid in self.daemons(system) {
                signal(pid, Signal::STOP);
                stopped.push(pid);
            }
        } else {
            let session = self.target(system).admin().await;
            for pid in pids(&session, WORKERS).await {
                stop_where_it_waits(&session, pid, system).await;
                stopped.push(pid);
            }
        }
        self.stopped.insert(system, stopped);
    }

    /// Stops the walsenders of a system.
    async fn stop_walsenders(&self, system: System) -> Vec<u32> {
        let session = self.source(system.place()).admin().await;
        let began = Instant::now();
        let found = loop {
            let found = pids(&session, &walsenders(system)).await;
            if !found.is_empty() {
                break found;
            }
            // It has only just been set up.
            assert!(began.elapsed() < PATIENCE, "{system} has no walsender");
            tokio::time::sleep(Duration::from_millis(20)).await;
        };
        for &pid in &found {
            stop_where_it_waits(&session, pid, system).await;
        }
        found
    }

    /// Lets it go on, at once: whom to wake was kept when it was stopped.
    pub fn resume(&mut self, system: System) {
        for pid in self.stopped.remove(&system).unwrap_or_default() {
            signal(pid, Signal::CONT);
        }
    }

    /// Our cluster at a place.
    fn ours(&mut self, system: System) -> &mut Cluster {
        let place = system.place();
        let mut found = self.venues.iter_mut().filter_map(|venue| match venue {
            Venue::Ours { version, cluster } if (*version, true) == place => Some(cluster),
            _ => None,
        });
        found.next().expect("one of our systems")
    }

    /// Ends the daemon at the target, as if that node were away.
    pub fn leave(&mut self, system: System) {
        self.ours(system).nodes[1].daemon.stop();
    }

    /// Starts it again.
    pub fn come_back(&mut self, system: System) {
        self.ours(system).nodes[1].daemon.start();
    }

    /// MiB of disk that the journals take, the source's and the target's.
    pub fn journals_mib(&mut self, system: System) -> [f64; 2] {
        let cluster = self.ours(system);
        [0, 1].map(|node| {
            let dir = cluster.nodes[node].data_dir.join("journal");
            let files = std::fs::read_dir(dir).into_iter().flatten().flatten();
            let blocks: u64 = files
                .filter_map(|file| Some(file.metadata().ok()?.blocks()))
                .sum();
            blocks as f64 * 512.0 / 1024.0 / 1024.0
        })
    }

    /// All processes of a system.
    pub async fn processes(&mut self, system: System) -> Processes {
        let source = self.source(system.place()).admin().await;
        let target = self.target(system).admin().await;
        let mut found: Processes = Vec::new();
        let mut take = |part, pids: Vec<u32>| found.extend(pids.into_iter().map(|pid| (part, pid)));
        match system {
            System::Anabranch15 | System::Anabranch18 => {
                take(Part::Walsender, pids(&source, &walsenders(system)).await);
                take(Part::Echo, pids(&target, OUR_WALSENDER).await);
                take(Part::SourceSessions, pids(&source, OUR_SESSIONS).await);
                take(Part::Apply, pids(&target, OUR_SESSIONS).await);
                let daemons = self.daemons(system);
                let parts = [Part::SourceDaemon, Part::TargetDaemon];
                found.extend(parts.into_iter().zip(daemons));
            }
            System::Native15 | System::Native18 | System::Pglogical15 => {
                take(Part::Walsender, pids(&source, &walsenders(system)).await);
                take(Part::Apply, pids(&target, WORKERS).await);
            }
        }
        found
    }

    /// Writes a mark at a source; all that was written before it has arrived where the mark has.
    pub async fn mark(&self, place: Place) -> i64 {
        mark_at(self.source(place), "").await
    }

    /// Waits until what both nodes of one of our systems have written by now is at the other, too.
    pub async fn settled(&self, system: System) {
        let (source, target) = (self.source(system.place()), self.target(system));
        // Each counts for itself, so their numbers must not be the same.
        let (here, there) = (mark_at(source, "").await, mark_at(target, "-").await);
        for (server, mark) in [(target, here), (source, there)] {
            let has_arrived = arrived_at(server, system, mark, PATIENCE).await;
            assert!(has_arrived, "{system} does not catch up");
        }
    }

    /// Waits until the mark is at a system's target. Looks every 3 ms.
    pub async fn arrived(&self, system: System, mark: i64) {
        let has_arrived = self.arrived_within(system, mark, PATIENCE).await;
        assert!(has_arrived, "{system} does not catch up");
    }

    /// As [`Self::arrived`]; false when it has not come by then. Says every half minute that it still waits.
    pub async fn arrived_within(&self, system: System, mark: i64, patience: Duration) -> bool {
        arrived_at(self.target(system), system, mark, patience).await
    }

    /// Waits until the walsender of a system has sent what its source has written by now; seconds that it took.
    pub async fn sent_within(&self, system: System, patience: Duration) -> Option<f64> {
        let session = self.source(system.place()).admin().await;
        let end = session.value("select pg_current_wal_flush_lsn()::text").await;
        let pids = walsenders(system);
        let sql =
            format!("select count(*) from pg_stat_replication where pid in ({pids}) and sent_lsn >= '{end}'");
        let began = Instant::now();
        while session.number(&sql).await == 0 {
            if began.elapsed() > patience {
                return None;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Some(began.elapsed().as_secs_f64())
    }

    /// Waits until Anabranch's own writes at its target are read back: work of this job, which would else be counted as the
    /// next one's.
    pub async fn echoed(&self, system: System) {
        if !matches!(system, System::Anabranch15 | System::Anabranch18) {
            return;
        }
        let session = self.target(system).admin().await;
        // The applier does not wait for the disk: its last commits are visible before they are flushed, and decoded after that.
        let end = session.value("select pg_current_wal_insert_lsn()::text").await;
        let sql = format!(
            "select count(*) from pg_stat_replication where pid in ({OUR_WALSENDER}) and sent_lsn >= '{end}'"
        );
        let deadline = Instant::now() + PATIENCE;
        while session.number(&sql).await == 0 {
            assert!(
                Instant::now() < deadline,
                "{system} does not read its own writes back"
            );
            tokio::time::sleep(Duration::from_millis(3)).await;
        }
    }

    /// Brings all servers to the same state of rest: nothing to vacuum, nothing to write back.
    pub async fn rest(&self, tables: &[String]) {
        for venue in &self.venues {
            for server in venue.servers() {
                let session = server.admin().await;
                for table in tables {
                    session.run(&format!("vacuum {table}")).await;
                }
                session.run("checkpoint").await;
            }
        }
    }

    /// Panics unless a table is the same at the source and the target.
    pub async fn compare(&self, system: System, table: &str) {
        let sql =
            format!("select count(*) || ' ' || coalesce(sum(hashtext(t::text)::bigint), 0) from {table} t");
        let source = self.source(system.place()).admin().await.value(&sql).await;
        let target = self.target(system).admin().await.value(&sql).await;
        assert!(
            source == target,
            "{table} is {source} at the source and {target} with {system}"
        );
    }
}

/// Backends that apply for native replication and pglogical.
const WORKERS: &str = "select pid from pg_stat_activity where datname = current_database() and (backend_type ~ \
    '^logical replication (apply |parallel )?worker' or backend_type like 'pglogical apply%') order by 1";
const OUR_WALSENDER: &str =
    "select pid from pg_stat_activity where usename = 'anabranch' and backend_type = 'walsender'";
const OUR_SESSIONS: &str =
    "select pid from pg_stat_activity where usename = 'anabranch' and backend_type <> 'walsender'";

/// Selects the walsenders of a system at its source.
fn walsenders(system: System) -> String {
    let application = match system {
        System::Anabranch15 | System::Anabranch18 => return OUR_WALSENDER.to_owned(),
        System::Native15 | System::Native18 => "native",
        System::Pglogical15 => "peer",
    };
    format!("select pid from pg_stat_replication where application_name = '{application}'")
}

/// Stops a backend at a place where it waits for WAL or for whom it is connected to (which pglogical calls `Extension`): stopped in
/// the midst of its work it could hold a lock of the server that others want, and who then asks that server anything waits for ever.
async fn stop_where_it_waits(session: &Session, pid: u32, system: System) {
    let waits = format!(
        "select count(*) from pg_stat_activity where pid = {pid} and wait_event_type in ('Activity', 'Client', 'Extension')"
    );
    let began = Instant::now();
    loop {
        signal(pid, Signal::STOP);
        // It stops a moment later. The question itself waits when the process holds what it needs.
        tokio::time::sleep(Duration::from_millis(1)).await;
        let asked = tokio::time::timeout(Duration::from_millis(500), session.number(&waits)).await;
        if stands(pid) && asked.is_ok_and(|count| count == 1) {
            return;
        }
        signal(pid, Signal::CONT);
        assert!(
            began.elapsed() < PATIENCE,
            "{system}: process {pid} is never idle"
        );
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Is a process stopped by a signal?
fn stands(pid: u32) -> bool {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    text.rfind(')')
        .is_some_and(|at| text[at + 1..].trim_start().starts_with('T'))
}

/// Writes a mark, the next number with that sign.
async fn mark_at(server: &Postgres, sign: &str) -> i64 {
    let session = server.session().await;
    session
        .number(&format!(
            "insert into mark values ({sign}nextval(pg_get_serial_sequence('mark', 'n'))) returning n"
        ))
        .await
}

async fn arrived_at(server: &Postgres, system: System, mark: i64, patience: Duration) -> bool {
    let session = server.admin().await;
    let sql = format!("select count(*) from mark where n = {mark}");
    let began = Instant::now();
    let mut said = 0;
    while session.number(&sql).await == 0 {
        let waited = began.elapsed();
        if waited > patience {
            return false;
        }
        if waited.as_secs() / 30 > said {
            said = waited.as_secs() / 30;
            eprintln!("bench: {system} has been catching up for {} s", waited.as_secs());
        }
        tokio::time::sleep(Duration::from_millis(3)).await;
    }
    true
}

async fn pids(session: &Session, sql: &str) -> Vec<u32> {
    let found = session.column(sql).await;
    found.iter().filter_map(|pid| pid.parse().ok()).collect()
}

/// What Debian's package of pglogical brings.
const PGLOGICAL: &str = "/usr/share/postgresql/15/extension/pglogical.control";
const MARK: &str = "create table mark (n bigint generated by default as identity primary key)";

/// Why some of these systems cannot be set up on this machine.
pub fn not_installed(systems: &[System]) -> Option<String> {
    let is_missing = systems.contains(&System::Pglogical15) && !Path::new(PGLOGICAL).exists();
    is_missing
        .then(|| format!("no {PGLOGICAL}: run scripts/setup.sh --bench, or leave pglogical out by --systems"))
}

impl Venue {
    async fn ours(version: u32, tables: &[String]) -> Self {
        let mut builder = Cluster::of([version, version]).without_daemons().schema(MARK);
        for node in 0..2 {
            for line in settings(false) {
                builder = builder.conf(node, &line);
            }
        }
        for table in tables {
            builder = builder.schema(table);
        }
        let mut cluster = builder.start().await;
        direct(&cluster);
        for node in &mut cluster.nodes {
            node.daemon.start();
        }
        cluster.arrive_among(&[0, 1], Duration::from_secs(60)).await;
        Self::Ours { version, cluster }
    }

    async fn peers(version: u32, systems: &[System], tables: &[String], dir: &TempDir) -> Self {
        let pglogical = systems.contains(&System::Pglogical15);
        let why = not_installed(systems);
        assert!(why.is_none(), "{}", why.unwrap_or_default());
        let server = async |member: usize, name: String| {
            let options = Options {
                version,
                member,
                conf: settings(pglogical),
                clock: None,
                tcp_port: None,
            };
            let mut server = Postgres::create(&dir.path().join(name), options);
            server.start().await;
            let schema = [MARK].into_iter().chain(tables.iter().map(String::as_str));
            prepare_database(&server, &schema.collect::<Vec<_>>()).await;
            server
        };
        let source = server(2, format!("source-{version}")).await;
        let mut targets = Vec::new();
        for (at, &system) in systems.iter().enumerate() {
            let target = server(3 + at, system.to_string()).await;
            subscribe(system, &source, &target).await;
            targets.push((system, target));
        }
        Self::Peers {
            version,
            source,
            targets,
        }
    }

    const fn place(&self) -> Place {
        match self {
            Self::Ours { version, .. } => (*version, true),
            Self::Peers { version, .. } => (*version, false),
        }
    }

    fn servers(&self) -> Vec<&Postgres> {
        match self {
            Self::Ours { cluster, .. } => cluster.nodes.iter().map(|node| &node.server).collect(),
            Self::Peers { source, targets, .. } => [source]
                .into_iter()
                .chain(targets.iter().map(|target| &target.1))
                .collect(),
        }
    }
}

/// The daemons of the test cluster dial each other through proxies; here they shall not.
pub fn direct(cluster: &Cluster) {
    for (at, node) in cluster.nodes.iter().enumerate() {
        node.daemon.edit_config(|text| {
            let mut text = text.to_owned();
            for (to, peer) in cluster.nodes.iter().enumerate().filter(|(to, _)| *to != at) {
                let proxy = cluster.line(at, to).address().to_string();
                text = text.replace(&format!("\"{proxy}\""), &format!("\"127.0.0.1:{}\"", peer.port));
            }
            text
        });
    }
}

async fn subscribe(system: System, source: &Postgres, target: &Postgres) {
    let dsn = source.dsn("postgres", DATABASE);
    let (at_source, at_target) = (source.admin().await, target.admin().await);
    if system == System::Pglogical15 {
        let here = target.dsn("postgres", DATABASE);
        at_source.run("create extension pglogical").await;
        at_source
            .run(&format!("select pglogical.create_node('source', '{dsn}')"))
            .await;
        at_source
            .run("select pglogical.replication_set_add_all_tables('default', '{public}')")
            .await;
        at_target.run("create extension pglogical").await;
        at_target
            .run(&format!("select pglogical.create_node('target', '{here}')"))
            .await;
        at_target
            .run(&format!(
                "select pglogical.create_subscription('peer', '{dsn}', synchronize_structure := false, \
                 synchronize_data := false)"
            ))
            .await;
        until_replicating(&at_target, "peer").await;
        return;
    }
    at_source
        .run("create publication native for tables in schema public")
        .await;
    at_target
        .run(&format!(
            "create subscription native connection '{dsn}' publication native with (copy_data = false)"
        ))
        .await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::usage::cpu_seconds;

    #[tokio::test(flavor = "multi_thread")]
    async fn a_system_that_stands_still_decodes_nothing_and_goes_on_afterwards() {
        let system = System::Native15;
        let tables = ["create table still (id bigint primary key)".to_owned()];
        let mut stage = Stage::start(&[system], &tables).await;
        stage.pause(system).await;
        let source = stage.source(system.place());
        let found = pids(&source.admin().await, &walsenders(system)).await;
        assert_eq!(found.len(), 1);
        let before = cpu_seconds(found[0]);
        assert!(stands(found[0]));
        let rows = "insert into still select generate_series(1, 20000)";
        source.session().await.run(rows).await;
        let mark = stage.mark(system.place()).await;
        assert!(
            !stage
                .arrived_within(system, mark, Duration::from_millis(300))
                .await
        );
        assert!(stands(found[0]));
        let used = cpu_seconds(found[0]) - before;
        assert!(used == 0.0, "it used {used} s of CPU");
        stage.resume(system);
        stage.arrived(system, mark).await;
        stage.compare(system, "still").await;
        assert!(!stands(found[0]));
    }
}
