//! Servers, daemons and the lines between them, put together as a new user would: schema, grants, init, run.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures_util::future::join_all;
use serde_json::Value;
use tempfile::TempDir;

use crate::certs::{Authority, Certificate};
use crate::conflicts::{self, Conflict};
use crate::daemon::{Daemon, anabranch, anabranch_ok, last_words};
use crate::network::{Network, Seat};
use crate::postgres::{DATABASE, Options, Postgres, free_port, open_dir, open_dir_on_disk, tail};
use crate::process;
use crate::proxy::{Mode, Proxy};
use crate::rows;
use crate::session::Session;
use crate::set_clock::Clock;
use crate::wait::{PATIENCE, until, until_ok};

/// What a cluster should look like.
pub struct Builder {
    servers: Vec<Options>,
    schema: String,
    schema_of: Vec<(usize, String)>,
    config: String,
    config_of: Vec<(usize, String)>,
    policy: Option<String>,
    scripts: Vec<(String, String)>,
    tls: bool,
    start_daemons: bool,
    init: bool,
    clocks_of_daemons: bool,
    on_disk: bool,
    network: Option<Network>,
}

/// One member.
pub struct Node {
    /// `n1`, `n2`, ...
    pub name: String,
    /// 1, 2, ...
    pub id: usize,
    /// Its server.
    pub server: Postgres,
    /// Its daemon.
    pub daemon: Daemon,
    /// Port of its daemon, not through a proxy; on 127.0.0.1, or at its seat in a network.
    pub port: u16,
    /// The daemon's own folder.
    pub data_dir: PathBuf,
}

/// A running cluster; everything ends when it is dropped.
pub struct Cluster {
    /// The members, in order of their ids.
    pub nodes: Vec<Node>,
    /// `proxies[a][b]`: what `a` dials to reach `b`; none in a network, where it dials `b` itself.
    pub(crate) proxies: Vec<Vec<Option<Proxy>>>,
    markers: AtomicU64,
    // Dropped after what runs in it.
    pub(crate) network: Option<Network>,
    pub(crate) dir: TempDir,
}

/// Written at every node to see it arrive everywhere.
const MARKER_TABLE: &str = "create table marker (node int, n bigint, primary key (node, n))";

impl Builder {
    /// SQL that the application's role runs on every server before `init`.
    pub fn schema(mut self, sql: &str) -> Self {
        self.schema.push_str(sql);
        self.schema.push_str(";\n");
        self
    }

    /// The same on one server only, after [`Self::schema`].
    pub fn schema_of(mut self, node: usize, sql: &str) -> Self {
        self.schema_of.push((node, sql.to_owned()));
        self
    }

    /// A line of postgresql.conf for one server.
    pub fn conf(mut self, node: usize, line: &str) -> Self {
        self.servers[node].conf.push(line.to_owned());
        self
    }

    /// One server has a clock of its own, at first wrong by so many seconds ([`Postgres::set_clock`]).
    pub fn clock(mut self, node: usize, error_s: i64) -> Self {
        self.servers[node].clock = Some(Clock::WrongBy(error_s));
        self
    }

    /// One server has a clock of its own that stands still, so many seconds after 1970.
    pub fn stopped_clock(mut self, node: usize, at_s: i64) -> Self {
        self.servers[node].clock = Some(Clock::StandsAt(at_s));
        self
    }

    /// Each node has a clock of its own, for server and daemon together.
    pub fn clocks(mut self) -> Self {
        for server in &mut self.servers {
            server.clock = Some(Clock::WrongBy(0));
        }
        self.clocks_of_daemons = true;
        self
    }

    /// Lets one server listen on TCP too, asking for passwords there.
    pub fn tcp(mut self, node: usize) -> Self {
        self.servers[node].tcp_port = Some(free_port());
        self
    }

    /// TOML sections for every daemon.
    pub fn config(mut self, toml: &str) -> Self {
        self.config.push_str(toml);
        self.config.push('\n');
        self
    }

    /// TOML sections for one daemon.
    pub fn config_of(mut self, node: usize, toml: &str) -> Self {
        self.config_of.push((node, toml.to_owned()));
        self
    }

    /// The policy file of every daemon.
    pub fn policy(mut self, toml: &str) -> Self {
        self.policy = Some(toml.to_owned());
        self
    }

    /// A script beside the policy file of every daemon.
    pub fn script(mut self, name: &str, text: &str) -> Self {
        self.scripts.push((name.to_owned(), text.to_owned()));
        self
    }

    /// Mutual TLS between the daemons.
    pub fn tls(mut self) -> Self {
        self.tls = true;
        self
    }

    /// Leaves the daemons for the test to start.
    pub fn without_daemons(mut self) -> Self {
        self.start_daemons = false;
        self
    }

    /// Each node at a seat of this network, server and daemon together, and no proxies.
    pub fn network(mut self, network: Network) -> Self {
        self.network = Some(network);
        self
    }

    /// Everything on a disk, also where tests of this run have their servers in memory: for gigabytes, and crashes.
    pub fn on_disk(mut self) -> Self {
        self.on_disk = true;
        self
    }

    /// Servers with the schema and nothing of ours, for another system.
    pub fn bare(mut self) -> Self {
        self.init = false;
        self.without_daemons()
    }

    /// Builds it all, starts it, and waits until what is written at each node arrives at all.
    pub async fn start(self) -> Cluster {
        let start_daemons = self.start_daemons;
        let mut cluster = self.initialised().await;
        if start_daemons {
            cluster.start_daemons();
            cluster.converge().await;
        }
        cluster
    }

    /// Servers run and `init` was done; no daemon was started.
    async fn initialised(self) -> Cluster {
        let make = if self.on_disk { open_dir_on_disk } else { open_dir };
        let dir = make("anabranch-it-");
        let ports: Vec<u16> = self.servers.iter().map(|_| free_port()).collect();
        let count = self.servers.len();
        let seats = self.network.as_ref().map_or(&[][..], Network::seats);
        let listens = |at: usize| {
            let host = seats.get(at).map_or(Ipv4Addr::LOCALHOST, Seat::address);
            SocketAddr::new(IpAddr::V4(host), ports[at])
        };
        let proxies: Vec<Vec<Option<Proxy>>> = (0..count)
            .map(|a| {
                let dial = |b: usize| (a != b && seats.is_empty()).then(|| Proxy::to(listens(b)));
                (0..count).map(dial).collect()
            })
            .collect();
        let authority = self.tls.then(|| Authority::create(&dir.path().join("ca")));
        let mut nodes = Vec::new();
        for (at, options) in self.servers.iter().enumerate() {
            let name = format!("n{}", at + 1);
            let home = dir.path().join(&name);
            let mut server = Postgres::create(&home, options.clone());
            let data_dir = home.join("daemon");
            private_dir(&data_dir);
            let config = home.join("anabranch.toml");
            let certificate = authority.as_ref().map(|authority| authority.issue(&name));
            let mut text = config_text(at, &server, &data_dir, listens(at), certificate.as_ref());
            if let Some(policy) = &self.policy {
                fs::write(home.join("policy.toml"), policy).expect("write the policy");
                text = text.replace("[cluster]\n", "[cluster]\npolicy = \"policy.toml\"\n");
            }
            for (name, script) in &self.scripts {
                fs::write(home.join(name), script).expect("write a script");
            }
            for (b, proxy) in proxies[at].iter().enumerate().filter(|(b, _)| *b != at) {
                let address = proxy.as_ref().map_or_else(|| listens(b), Proxy::address);
                text.push_str(&format!(
                    "[[peers]]\nname = \"n{0}\"\nid = {0}\naddress = \"{address}\"\n",
                    b + 1
                ));
            }
            text.push_str(&self.config);
            for (_, more) in self.config_of.iter().filter(|(node, _)| *node == at) {
                text.push_str(more);
            }
            fs::write(&config, text).expect("write the configuration");
            let mut daemon = Daemon::new(&config);
            if self.clocks_of_daemons {
                for (name, value) in server.clock_env() {
                    daemon.set_env(&name, &value);
                }
            }
            if let Some(seat) = seats.get(at) {
                server.set_seat(seat);
                daemon.set_seat(seat);
            }
            nodes.push(Node {
                name,
                id: at + 1,
                server,
                daemon,
                port: ports[at],
                data_dir,
            });
        }
        let mut cluster = Cluster {
            nodes,
            proxies,
            markers: AtomicU64::new(0),
            network: self.network,
            dir,
        };
        join_all(cluster.nodes.iter_mut().map(|node| node.server.start())).await;
        join_all(cluster.nodes.iter().enumerate().map(async |(at, node)| {
            let of_node = self
                .schema_of
                .iter()
                .filter(|(node, _)| *node == at)
                .map(|(_, sql)| sql.as_str());
            let schema: Vec<&str> = [MARKER_TABLE, &self.schema].into_iter().chain(of_node).collect();
            prepare_database(&node.server, &schema).await;
            if self.init {
                initialise(node).await;
            }
        }))
        .await;
        cluster
    }
}

/// The configuration of one daemon, without its peers.
pub(crate) fn config_text(
    at: usize,
    server: &Postgres,
    data_dir: &Path,
    listens: SocketAddr,
    tls: Option<&Certificate>,
) -> String {
    let id = at + 1;
    let mut text = format!(
        "[node]\nname = \"n{id}\"\nid = {id}\ndata_dir = \"{}\"\n[cluster]\nid = \"it\"\n[postgres]\ndsn = \"{}\"\n\
         tables = [\"public.*\"]\n[listen]\naddress = \"{listens}\"\n",
        data_dir.display(),
        server.dsn("anabranch", DATABASE),
    );
    if tls.is_none() && !listens.ip().is_loopback() {
        text.push_str("insecure = true\n");
    }
    if let Some(Certificate { ca, cert, key }) = tls {
        text.push_str(&format!(
            "[tls]\nca = \"{}\"\ncert = \"{}\"\nkey = \"{}\"\n",
            ca.display(),
            cert.display(),
            key.display()
        ));
    }
    text
}

/// The application's tables.
pub async fn prepare_database(server: &Postgres, schema: &[&str]) {
    let session = server.session().await;
    for sql in schema {
        session.run(sql).await;
    }
}

/// A folder that is its owner's alone, as the daemon makes its own.
pub(crate) fn private_dir(path: &Path) {
    let mut builder = fs::DirBuilder::new();
    builder
        .mode(0o700)
        .create(path)
        .expect("create the daemon's folder");
}

/// What a new user types: the grants as the superuser, then `init`.
pub async fn initialise(node: &Node) {
    grant(&node.server, node.daemon.config_arg()).await;
    init(node, &[]).await;
}

/// The same for the first member of a new cluster, which has data: `cluster create`.
pub async fn create_cluster(node: &Node) {
    let config = node.daemon.config_arg();
    grant(&node.server, config).await;
    let admin = node.server.dsn("postgres", DATABASE);
    anabranch_ok(&["cluster", "create", "--config", config, "--admin-dsn", &admin]).await;
}

/// `anabranch init` as a superuser, with more arguments; what it says.
pub async fn init(node: &Node, more: &[&str]) -> String {
    let admin = node.server.dsn("postgres", DATABASE);
    let args = [
        "init",
        "--config",
        node.daemon.config_arg(),
        "--admin-dsn",
        &admin,
    ];
    anabranch_ok(&[&args, more].concat()).await
}

/// Runs the SQL that `anabranch grants` prints.
pub async fn grant(server: &Postgres, config: &str) {
    let grants = anabranch_ok(&["grants", "--config", config]).await;
    server.admin().await.run(&grants).await;
}

impl Cluster {
    /// A cluster of servers of these versions.
    pub fn of<const N: usize>(versions: [u32; N]) -> Builder {
        Self::of_versions(&versions)
    }

    /// The same where the number is not known before.
    pub fn of_versions(versions: &[u32]) -> Builder {
        let servers = versions
            .iter()
            .copied()
            .enumerate()
            .map(|(member, version)| Options {
                version,
                member,
                conf: Vec::new(),
                clock: None,
                tcp_port: None,
            })
            .collect();
        Builder {
            servers,
            schema: String::new(),
            schema_of: Vec::new(),
            config: String::new(),
            config_of: Vec::new(),
            policy: None,
            scripts: Vec::new(),
            tls: false,
            start_daemons: true,
            init: true,
            clocks_of_daemons: false,
            on_disk: false,
            network: None,
        }
    }

    /// A folder for whatever the test needs, removed with the cluster.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// A backup of a server's files, taken while neither it nor its daemon runs; both go on afterwards.
    pub async fn back_up(&mut self, node: usize) -> PathBuf {
        let backup = self.dir().join("backup");
        let node = &mut self.nodes[node];
        node.daemon.stop();
        node.server.stop();
        process::run(
            std::process::Command::new("cp")
                .arg("-a")
                .arg(node.server.data_dir())
                .arg(&backup),
        );
        node.server.start().await;
        node.daemon.start();
        backup
    }

    /// Stops what runs of a node and puts a backup in the place of its server's files. Neither runs afterwards.
    pub fn put_back(&mut self, node: usize, backup: &Path) {
        let node = &mut self.nodes[node];
        if node.daemon.started() {
            node.daemon.stop();
        }
        node.server.stop();
        let data = node.server.data_dir();
        fs::remove_dir_all(&data).expect("remove the data folder");
        process::run(std::process::Command::new("cp").arg("-a").arg(backup).arg(&data));
    }

    /// A standby that runs beside a node's server and has all that was written there so far.
    pub async fn standby(&self, node: usize) -> Postgres {
        let primary = &self.nodes[node].server;
        let mut standby = Postgres::standby_of(primary, &self.dir().join("standby"));
        standby.start().await;
        let written = self.value(node, "select pg_current_wal_lsn()").await;
        let has_it = format!("select (pg_last_wal_replay_lsn() >= '{written}')::text");
        let admin = standby.admin().await;
        until("the standby has it all", async || {
            admin.value(&has_it).await == "true"
        })
        .await;
        standby
    }

    /// A node's server is gone, and the files of its standby, which is promoted, are in its place and run there.
    pub async fn promote(&mut self, node: usize, mut standby: Postgres) {
        let node = &mut self.nodes[node];
        node.server.kill();
        standby.admin().await.run("select pg_promote()").await;
        standby.stop();
        let data = node.server.data_dir();
        fs::remove_dir_all(&data).expect("remove the data folder");
        fs::rename(standby.data_dir(), &data).expect("put the standby's files there");
        node.server.set_conf(&[]);
        node.server.start().await;
    }

    /// The nodes' seats, in their order; none where they have no network of their own.
    pub fn seats(&self) -> &[Seat] {
        self.network.as_ref().map_or(&[], Network::seats)
    }

    /// Every node's index.
    pub fn all(&self) -> Vec<usize> {
        (0..self.nodes.len()).collect()
    }

    /// Waits until a node's daemon has decoded all that is flushed at its server.
    pub async fn wait_decoded(&self, node: usize) {
        let upto = self.value(node, "select pg_current_wal_flush_lsn()").await;
        until("all is decoded", async || {
            let status = self.status(node).await;
            let at = status["positions"]["decoded_lsn"].as_str().unwrap_or("0/0");
            let sql = format!("select '{at}'::pg_lsn >= '{upto}'");
            self.value(node, &sql).await == "t"
        })
        .await;
    }

    /// Commits at a node wait for no standby any more, those that wait already among them.
    pub async fn let_commits_go(&mut self, node: usize) {
        self.nodes[node]
            .server
            .set_conf(&["synchronous_standby_names = ''"]);
        self.admin(node).await.run("select pg_reload_conf()").await;
    }

    /// A session of the application at one node.
    pub async fn session(&self, node: usize) -> Session {
        self.nodes[node].server.session().await
    }

    /// A session of the superuser at one node.
    pub async fn admin(&self, node: usize) -> Session {
        self.nodes[node].server.admin().await
    }

    /// Runs SQL at one node, as the application, in a session of its own.
    pub async fn run(&self, node: usize, sql: &str) {
        self.session(node).await.run(sql).await;
    }

    /// Runs SQL at every node.
    pub async fn run_everywhere(&self, sql: &str) {
        for node in self.all() {
            self.run(node, sql).await;
        }
    }

    /// One value at one node, as the superuser.
    pub async fn value(&self, node: usize, sql: &str) -> String {
        self.admin(node).await.value(sql).await
    }

    /// One value at every node.
    pub async fn values(&self, sql: &str) -> Vec<String> {
        join_all(self.all().into_iter().map(|node| self.value(node, sql))).await
    }

    /// Asserts that a query answers the same, and this, at every node.
    pub async fn expect(&self, sql: &str, expected: &str) {
        let values = self.values(sql).await;
        assert!(
            values.iter().all(|value| value == expected),
            "expected `{expected}` everywhere from {sql}, got {values:?}"
        );
    }

    /// Waits until a query answers this at one node.
    pub async fn wait_value(&self, node: usize, sql: &str, expected: &str) {
        let session = self.admin(node).await;
        until_ok(
            &format!("n{} answers {expected} to {sql}", node + 1),
            PATIENCE,
            async || {
                let value = session.value(sql).await;
                if value == expected { Ok(()) } else { Err(value) }
            },
        )
        .await;
    }

    /// Waits until all that was committed anywhere before this call is everywhere, and the rows are equal.
    pub async fn converge(&self) {
        self.converge_among(&self.all(), PATIENCE).await;
    }

    /// [`Self::converge`] with more patience, for a backlog.
    pub async fn converge_within(&self, timeout: Duration) {
        self.converge_among(&self.all(), timeout).await;
    }

    /// [`Self::converge`] for some of the nodes.
    pub async fn converge_among(&self, nodes: &[usize], timeout: Duration) {
        let sessions = self.admins(nodes).await;
        self.arrive_over(&sessions, nodes, timeout).await;
        until_ok("the rows of all nodes are equal", timeout, async || {
            rows::equal(&sessions).await
        })
        .await;
        self.expect_no_drift();
    }

    async fn admins(&self, nodes: &[usize]) -> Vec<Session> {
        join_all(nodes.iter().map(|&node| self.admin(node))).await
    }

    /// Asserts that no daemon met a row that was not as the stream says.
    pub fn expect_no_drift(&self) {
        for node in &self.nodes {
            let log = node.daemon.log();
            let drift = log.lines().find(|line| line.contains("not as the stream says"));
            assert!(drift.is_none(), "{}: {drift:?}", node.name);
        }
    }

    /// Waits until all that was committed at any of these nodes before this call is applied at all of them.
    pub async fn arrive_among(&self, nodes: &[usize], timeout: Duration) {
        let sessions = self.admins(nodes).await;
        self.arrive_over(&sessions, nodes, timeout).await;
    }

    /// The same, with a session at each of them: opening one costs a server more than all that is asked here.
    async fn arrive_over(&self, sessions: &[Session], nodes: &[usize], timeout: Duration) {
        let n = self.markers.fetch_add(1, Ordering::Relaxed);
        for (session, &node) in sessions.iter().zip(nodes) {
            session
                .run(&format!("insert into marker values ({}, {n})", node + 1))
                .await;
        }
        let ids: Vec<String> = nodes.iter().map(|node| (node + 1).to_string()).collect();
        let arrived = format!("select string_agg(node::text, ',' order by node) from marker where n = {n}");
        let expected = ids.join(",");
        for (session, &node) in sessions.iter().zip(nodes) {
            until_ok(
                &format!("n{} holds the marks of nodes {expected}", node + 1),
                timeout,
                async || {
                    let value = session.value(&arrived).await;
                    if value == expected {
                        Ok(())
                    } else {
                        Err(format!("marks of {value}"))
                    }
                },
            )
            .await;
        }
    }

    /// The conflict log of one node.
    pub async fn conflicts_at(&self, node: usize) -> Vec<Conflict> {
        conflicts::read(&self.admin(node).await).await
    }

    /// The conflict log, after making sure that every node holds the same lines (by their ids) and that no
    /// line is there twice.
    pub async fn conflicts(&self) -> Vec<Conflict> {
        until_ok("every node has logged the same conflicts", PATIENCE, async || {
            let logs = join_all(self.all().into_iter().map(|node| self.conflicts_at(node))).await;
            let ids = |log: &[Conflict]| {
                let mut ids: Vec<String> = log.iter().map(Conflict::id).collect();
                ids.sort();
                ids
            };
            let first = ids(&logs[0]);
            let mut once = first.clone();
            once.dedup();
            if once.len() != first.len() {
                return Err(format!("a conflict is logged twice: {first:?}"));
            }
            match logs.iter().find(|log| ids(log) != first) {
                None => Ok(logs.into_iter().next().unwrap_or_default()),
                Some(other) => Err(format!("logs differ: {:#?} and {other:#?}", logs[0])),
            }
        })
        .await
    }

    /// Asserts that nothing was called a conflict.
    pub async fn expect_no_conflict(&self) {
        for node in self.all() {
            let log = self.conflicts_at(node).await;
            assert!(
                log.is_empty(),
                "n{} has logged conflicts where there are none: {log:#?}",
                node + 1
            );
        }
    }

    /// What a daemon says of itself, as soon as it does: it answers nobody while it begins anew, when the members or the policy change.
    pub async fn status(&self, node: usize) -> Value {
        let config = self.nodes[node].daemon.config_arg();
        until_ok(&format!("n{} tells its status", node + 1), PATIENCE, async || {
            let output = anabranch(&["status", "--config", config, "--output", "json"]).await;
            serde_json::from_slice(&output.stdout)
                .map_err(|error| format!("{error}: {}", String::from_utf8_lossy(&output.stderr)))
        })
        .await
    }

    /// The same, or null while it does not answer: it begins anew when the members change.
    pub async fn status_or_null(&self, node: usize) -> Value {
        let config = self.nodes[node].daemon.config_arg();
        let output = anabranch(&["status", "--config", config, "--output", "json"]).await;
        serde_json::from_slice(&output.stdout).unwrap_or(Value::Null)
    }

    /// Sets both directions between two groups of nodes.
    pub fn set_lines(&self, a: &[usize], b: &[usize], mode: Mode) {
        assert!(self.network.is_none(), "there is no proxy in a network");
        for &a in a {
            for &b in b {
                for (from, to) in [(a, b), (b, a)] {
                    if let Some(proxy) = &self.proxies[from][to] {
                        proxy.set(mode);
                    }
                }
            }
        }
    }

    /// The line over which `from` dials `to`.
    pub fn line(&self, from: usize, to: usize) -> &Proxy {
        self.proxies[from][to].as_ref().expect("two different nodes")
    }

    /// No connection between two groups.
    pub fn partition(&self, a: &[usize], b: &[usize]) {
        self.set_lines(a, b, Mode::Cut);
    }

    /// Every node alone.
    pub fn isolate_all(&self) {
        self.partition(&self.all(), &self.all());
    }

    /// All lines work again.
    pub fn heal(&self) {
        self.set_lines(&self.all(), &self.all(), Mode::Pass);
    }

    /// kill -9 of every daemon.
    pub fn kill_daemons(&mut self) {
        for node in &mut self.nodes {
            node.daemon.kill();
        }
    }

    /// Starts every daemon.
    pub fn start_daemons(&mut self) {
        for node in &mut self.nodes {
            node.daemon.start();
        }
    }

    /// Waits until all that was committed at a node before this call is in its journal, whoever else has it: a start knows of it.
    pub async fn journalled(&self, node: usize) {
        let end = self.value(node, "select pg_current_wal_insert_lsn()").await;
        let confirmed = format!(
            "select confirmed_flush_lsn >= '{end}' from pg_replication_slots where slot_name = 'anabranch'"
        );
        self.wait_value(node, &confirmed, "t").await;
    }

    /// Waits until nothing is open: nobody writes, and everyone knows that everyone has everything.
    pub async fn wait_settled(&self) {
        until("nothing is open", async || {
            let mut entries = 0;
            for node in self.all() {
                entries += self.status(node).await["index"]["entries"].as_i64().unwrap_or(1);
            }
            entries == 0
        })
        .await;
    }

    /// Runs SQL at several nodes, none seeing another's, in this order of time; then mends the lines.
    pub async fn apart(&self, writes: &[(usize, &str)]) {
        self.isolate_all();
        for (node, sql) in writes {
            self.run(*node, sql).await;
        }
        self.heal();
        self.converge().await;
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for node in &self.nodes {
                eprintln!(
                    "---- {}: its status\n{}",
                    node.name,
                    last_words(node.daemon.config_arg())
                );
                eprintln!(
                    "---- {}: daemon's log, the end\n{}",
                    node.name,
                    tail(&node.daemon.log(), 40)
                );
                eprintln!(
                    "---- {}: server's log, the end\n{}",
                    node.name,
                    tail(&node.server.log(), 25)
                );
            }
            if std::env::var_os("IT_KEEP").is_some() {
                self.dir.disable_cleanup(true);
                eprintln!("kept: {}", self.dir.path().display());
            }
        }
        for node in &mut self.nodes {
            node.daemon.kill();
        }
    }
}
