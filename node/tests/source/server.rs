//! A throwaway PostgreSQL server, and a database on it to decode.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anabranch_node::config::Postgres;
use anabranch_node::pg;
use anabranch_node::source::slot::Snapshot;
use anabranch_node::source::{Error, Event, Source, SourceOptions, Walsender};
use anabranch_proto::Lsn;
use anabranch_proto::row::{Cell, RowImage};
use anabranch_proto::schema::ColumnDesc;
use anabranch_proto::txn::{Change, PutOp};
use tempfile::TempDir;
use tokio_postgres::{Client, NoTls};

const USER: &str = "postgres";
/// Bounds every wait, so that a fault is a failure and not a hang.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

const HBA: &str = "
local all all trust
hostssl all tls_only 127.0.0.1/32 scram-sha-256
host all tls_only 127.0.0.1/32 reject
host all scram 127.0.0.1/32 scram-sha-256
host all hashed 127.0.0.1/32 md5
host all clear 127.0.0.1/32 password
host all all 127.0.0.1/32 trust
";

const SETTINGS: &str = "
listen_addresses = '127.0.0.1'
wal_level = logical
fsync = off
max_prepared_transactions = 5
shared_buffers = 16MB
max_connections = 30
autovacuum = off
logical_decoding_work_mem = '64kB'
";

/// A running server; dropping it stops it.
pub(crate) struct Server {
    folder: TempDir,
    process: Child,
    pub(crate) port: u16,
}

fn bin(name: &str) -> PathBuf {
    if let Some(folder) = std::env::var_os("ANABRANCH_PG_BIN") {
        return Path::new(&folder).join(name);
    }
    let mut found = std::fs::read_dir("/usr/lib/postgresql")
        .expect("PostgreSQL under /usr/lib/postgresql, or ANABRANCH_PG_BIN")
        .map(|entry| entry.unwrap().path().join("bin").join(name))
        .filter(|path| path.exists())
        .collect::<Vec<_>>();
    found.sort();
    found.pop().expect("a PostgreSQL server")
}

fn is_root() -> bool {
    std::fs::metadata("/proc/self").is_ok_and(|me| std::os::unix::fs::MetadataExt::uid(&me) == 0)
}

/// PostgreSQL refuses to run as root, so root becomes the user postgres. A test that is killed takes its
/// server with it.
fn as_server(program: &Path) -> Command {
    let mut command = Command::new("setpriv");
    if is_root() {
        command.args(["--reuid", USER, "--regid", USER, "--clear-groups"]);
    }
    command.args(["--pdeathsig", "QUIT"]).arg(program);
    command
}

pub(crate) fn run(command: &mut Command) {
    let output = command.output().expect("a program that exists");
    assert!(
        output.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

impl Server {
    /// Starts a server with `extra` settings.
    pub(crate) fn start(extra: &str) -> Self {
        Self::start_with(extra, |_| {})
    }

    /// As [`Self::start`]; `prepare` gets the data folder before the server runs.
    pub(crate) fn start_with(extra: &str, prepare: impl FnOnce(&Path)) -> Self {
        let folder = tempfile::Builder::new()
            .prefix("anabranch-source-")
            .tempdir()
            .unwrap();
        Self::own(folder.path());
        let data = folder.path().join("data");
        let kept = format!("source{}", bin("").display()).replace('/', "-");
        anabranch_tests::postgres::lay_out(&bin(""), &kept, "", &data);
        // One that nobody is given before the server has it, nor while it is started again.
        let port = anabranch_tests::postgres::free_port();
        let sockets = folder.path().display();
        let settings = format!("{SETTINGS}\nport = {port}\nunix_socket_directories = '{sockets}'\n{extra}\n");
        let conf = data.join("postgresql.conf");
        std::fs::write(conf, settings).unwrap();
        std::fs::write(data.join("pg_hba.conf"), HBA).unwrap();
        prepare(&data);
        let process = Self::spawn(folder.path());
        Self {
            folder,
            process,
            port,
        }
    }

    fn spawn(folder: &Path) -> std::process::Child {
        let log = std::fs::File::create(folder.join("log")).unwrap();
        as_server(&bin("postgres"))
            .arg("-D")
            .arg(folder.join("data"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap()
    }

    /// Stops the server and starts it again.
    pub(crate) fn restart(&mut self) {
        run(Command::new("kill").args(["-INT", &self.process.id().to_string()]));
        self.process.wait().unwrap();
        self.process = Self::spawn(self.folder.path());
    }

    /// Gives a file or folder to the server's user.
    pub(crate) fn own(path: &Path) {
        if !is_root() {
            return;
        }
        run(Command::new("chown").arg(format!("{USER}:")).arg(path));
    }

    /// Folder of the Unix socket.
    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Connection string over the Unix socket, as superuser.
    pub(crate) fn dsn(&self, database: &str) -> String {
        format!(
            "host={} port={} user={USER} dbname={database}",
            self.folder().display(),
            self.port
        )
    }

    /// Connection string over TCP.
    pub(crate) fn tcp(&self, rest: &str) -> String {
        format!("host=127.0.0.1 port={} dbname=postgres {rest}", self.port)
    }

    /// A session of a user of the database, once the server takes connections.
    pub(crate) async fn user(&self, database: &str) -> Client {
        let start = Instant::now();
        loop {
            match tokio_postgres::connect(&self.dsn(database), NoTls).await {
                Ok((client, connection)) => {
                    tokio::spawn(connection);
                    return client;
                }
                Err(error) if start.elapsed() > PATIENCE => {
                    let log = std::fs::read_to_string(self.folder().join("log")).unwrap_or_default();
                    panic!("{error}\n{log}");
                }
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Immediate shutdown: nobody needs the data.
        let stopped = Command::new("kill")
            .args(["-QUIT", &self.process.id().to_string()])
            .status();
        if !stopped.is_ok_and(|status| status.success()) {
            let _ = self.process.kill();
        }
        let _ = self.process.wait();
    }
}

/// A `[postgres]` section.
pub(crate) fn config(dsn: &str) -> Postgres {
    Postgres {
        dsn: dsn.to_owned(),
        dsn_folder: None,
        password_file: None,
        slot: "anabranch".to_owned(),
        publication: "anabranch".to_owned(),
        tables: Vec::new(),
        pin: None,
    }
}

/// A server with a published database and a slot.
pub(crate) struct Decoded {
    pub(crate) server: Server,
    /// A user's session.
    pub(crate) user: Client,
    /// The daemon's own.
    pub(crate) sql: Arc<Client>,
    pub(crate) config: Postgres,
}

impl Decoded {
    /// Runs `schema`, publishes everything, creates the slot.
    pub(crate) async fn new(schema: &str) -> Self {
        let server = Server::start("");
        let user = server.user("postgres").await;
        user.batch_execute(schema).await.unwrap();
        user.batch_execute("CREATE PUBLICATION anabranch FOR ALL TABLES")
            .await
            .unwrap();
        let config = config(&server.dsn("postgres"));
        let mut walsender = Walsender::connect(&pg::dsn(&config).unwrap(), "test")
            .await
            .unwrap();
        walsender
            .create_slot("anabranch", Snapshot::Nothing)
            .await
            .unwrap();
        let (sql, _) = pg::connect(&config, "test").await.unwrap();
        Self {
            server,
            user,
            sql: Arc::new(sql),
            config,
        }
    }

    pub(crate) fn options(&self, start: Lsn) -> SourceOptions {
        SourceOptions {
            dsn: pg::dsn(&self.config).unwrap(),
            slot: self.config.slot.clone(),
            publication: self.config.publication.clone(),
            start,
            policies: std::sync::Arc::default(),
        }
    }

    pub(crate) async fn source(&self) -> Source {
        Source::connect(self.options(Lsn::ZERO), Arc::clone(&self.sql))
            .await
            .unwrap()
    }

    pub(crate) async fn run(&self, sql: &str) {
        self.user.batch_execute(sql).await.unwrap();
    }

    /// `server_version_num`
    pub(crate) async fn version(&self) -> i32 {
        let query = "SELECT current_setting('server_version_num')::int";
        self.user.query_one(query, &[]).await.unwrap().get(0)
    }

    pub(crate) async fn lsn(&self, expression: &str) -> Lsn {
        let row = self
            .user
            .query_one(&format!("SELECT ({expression})::text"), &[])
            .await
            .unwrap();
        row.get::<_, String>(0).parse().unwrap()
    }
}

/// The next event that is not a keepalive.
pub(crate) async fn next(source: &mut Source) -> Result<Event, Error> {
    loop {
        match tokio::time::timeout(PATIENCE, source.next())
            .await
            .expect("an event")?
        {
            Event::Keepalive { .. } => {}
            event => return Ok(event),
        }
    }
}

/// The next transaction's changes and messages, as text.
pub(crate) async fn transaction(source: &mut Source) -> Vec<String> {
    let mut out = Vec::new();
    loop {
        match next(source).await.unwrap() {
            Event::Begin { .. } => assert!(out.is_empty(), "a transaction inside another"),
            Event::Commit { .. } => return out,
            Event::Change(change) => out.push(show(&change)),
            Event::Message {
                prefix,
                content,
                transactional,
            } => {
                out.push(format!(
                    "message {prefix} {content:?} transactional={transactional}"
                ));
            }
            Event::Keepalive { .. } => {}
        }
    }
}

fn show_cells(row: &RowImage, columns: &[&ColumnDesc]) -> String {
    let cells = row
        .cells()
        .zip(columns)
        .map(|(cell, column)| match (cell, column.type_oid) {
            (Cell::Null, _) => "NULL".to_owned(),
            (Cell::Unchanged, _) => "?".to_owned(),
            (Cell::Binary(value), 23) => i32::from_be_bytes(value.try_into().unwrap()).to_string(),
            (Cell::Binary(value), 20) => i64::from_be_bytes(value.try_into().unwrap()).to_string(),
            (Cell::Binary(value), 25) if value.len() > 40 => format!("{} bytes of text", value.len()),
            (Cell::Binary(value), 25) => String::from_utf8(value.to_vec()).unwrap(),
            (Cell::Binary(value), _) => format!("binary {}", hex::encode(value)),
            (Cell::Text(value), _) => format!("text {}", String::from_utf8_lossy(value)),
        });
    cells.collect::<Vec<_>>().join(", ")
}

/// A change in words.
pub(crate) fn show(change: &Change) -> String {
    match change {
        Change::Put {
            table,
            op,
            row,
            old_key,
            ..
        } => {
            let op = if *op == PutOp::Insert { "insert" } else { "update" };
            let columns = table.columns.iter().collect::<Vec<_>>();
            let moved = old_key.as_ref().map(|key| {
                format!(
                    " from {}",
                    show_cells(key, &table.key_columns().collect::<Vec<_>>())
                )
            });
            format!(
                "{op} {}: {}{}",
                table.name,
                show_cells(row, &columns),
                moved.unwrap_or_default()
            )
        }
        Change::Delete { table, key } => {
            format!(
                "delete {}: {}",
                table.name,
                show_cells(key, &table.key_columns().collect::<Vec<_>>())
            )
        }
        Change::Truncate {
            tables,
            cascade,
            restart_identity,
        } => {
            let names = tables.iter().map(|table| table.name.as_str()).collect::<Vec<_>>();
            format!(
                "truncate {} cascade={cascade} restart={restart_identity}",
                names.join(" ")
            )
        }
    }
}
