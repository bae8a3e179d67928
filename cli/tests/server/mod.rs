//! A throwaway PostgreSQL server on a Unix socket, gone with its value.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tokio_postgres::{Client, NoTls};

const DATABASE: &str = "app";

pub(crate) struct Server {
    folder: tempfile::TempDir,
    postmaster: Child,
}

/// `ANABRANCH_TEST_PG_BIN`, or the oldest supported version installed.
fn bin(name: &str) -> PathBuf {
    let folder = std::env::var_os("ANABRANCH_TEST_PG_BIN")
        .map_or_else(|| PathBuf::from("/usr/lib/postgresql/15/bin"), PathBuf::from);
    folder.join(name)
}

/// What the initialised files are kept as: one for each folder of programs.
fn kept_name() -> String {
    format!("cli{}", bin("").display()).replace('/', "-")
}

/// As user postgres where we are root, since the server refuses root; dies with this process.
fn command(name: &str) -> Command {
    let mut command = Command::new("setpriv");
    if rustix::process::geteuid().is_root() {
        command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups"]);
    }
    command
        .args(["--pdeathsig", "INT"])
        .arg(bin(name))
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    command
}

impl Server {
    /// Starts a server with `conf` after the usual settings, and makes the database `app`.
    pub(crate) async fn start(conf: &str) -> Self {
        let folder = tempfile::Builder::new()
            .prefix("anabranch-cli-")
            .tempdir()
            .unwrap();
        if rustix::process::geteuid().is_root() {
            assert!(
                Command::new("chown")
                    .arg("postgres:")
                    .arg(folder.path())
                    .status()
                    .unwrap()
                    .success()
            );
        }
        let data = folder.path().join("data");
        anabranch_tests::postgres::lay_out(&bin(""), &kept_name(), "", &data);
        let settings = format!(
            "listen_addresses = ''\nunix_socket_directories = '{}'\nwal_level = logical\nfsync = off\n\
             max_prepared_transactions = 5\nshared_buffers = 16MB\n{conf}\n",
            folder.path().display()
        );
        std::fs::write(data.join("postgresql.auto.conf"), settings).unwrap();
        let log = std::fs::File::create(folder.path().join("log")).unwrap();
        let postmaster = command("postgres")
            .arg("-D")
            .arg(&data)
            .stderr(log)
            .spawn()
            .unwrap();
        let server = Self { folder, postmaster };
        server.create_database().await;
        server
    }

    fn socket(&self) -> &str {
        self.folder.path().to_str().unwrap()
    }

    /// Waits until the server lets us in.
    async fn create_database(&self) {
        let dsn = self
            .dsn("postgres")
            .replace(&format!("dbname={DATABASE}"), "dbname=postgres");
        let started = Instant::now();
        let client = loop {
            match tokio_postgres::connect(&dsn, NoTls).await {
                Ok((client, connection)) => {
                    tokio::spawn(connection);
                    break client;
                }
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
            let log = std::fs::read_to_string(Path::new(self.socket()).join("log")).unwrap_or_default();
            assert!(
                started.elapsed() < Duration::from_secs(60),
                "the server does not start:\n{log}"
            );
        };
        client
            .batch_execute(&format!("CREATE DATABASE {DATABASE}"))
            .await
            .unwrap();
    }

    /// Connection string of a role.
    pub(crate) fn dsn(&self, role: &str) -> String {
        format!("host={} user={role} dbname={DATABASE}", self.socket())
    }

    /// A session of a role.
    pub(crate) async fn session(&self, role: &str) -> Client {
        let (client, connection) = tokio_postgres::connect(&self.dsn(role), NoTls).await.unwrap();
        tokio::spawn(connection);
        client
    }

    /// A session of the superuser.
    pub(crate) async fn admin(&self) -> Client {
        self.session("postgres").await
    }

    /// The whole database as SQL; where the server came without pg_dump, its catalog.
    pub(crate) async fn dump(&self) -> String {
        if bin("pg_dump").exists() {
            self.text("pg_dump", &[DATABASE])
        } else {
            self.catalog(DIGEST).await
        }
    }

    /// Roles and server-wide privileges.
    pub(crate) async fn globals(&self) -> String {
        if bin("pg_dumpall").exists() {
            self.text("pg_dumpall", &["--globals-only"])
        } else {
            self.catalog(
                "SELECT concat(r, (SELECT string_agg(a::text, '') FROM pg_parameter_acl a)) FROM pg_authid r",
            )
            .await
        }
    }

    async fn catalog(&self, sql: &str) -> String {
        let rows = self.admin().await.query(sql, &[]).await.unwrap();
        let mut lines: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
        lines.sort();
        lines.join("\n")
    }

    fn text(&self, name: &str, args: &[&str]) -> String {
        let output = command(name)
            .args(["-h", self.socket(), "-U", "postgres"])
            .args(args)
            .stdout(Stdio::piped())
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        // Newer releases of pg_dump draw a random key each time.
        let text = String::from_utf8(output.stdout).unwrap();
        let keyed = |line: &&str| !line.starts_with("\\restrict") && !line.starts_with("\\unrestrict");
        text.lines().filter(keyed).collect::<Vec<_>>().join("\n")
    }
}

const DIGEST: &str = "
    SELECT concat_ws(' ', n.nspname, c.relname, c.relkind, c.relreplident,
        (SELECT string_agg(a::text, ',') FROM aclexplode(c.relacl) a WHERE a.grantee <> c.relowner)) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE n.nspname !~ '^pg_'
    UNION ALL SELECT concat_ws(' ', pubname, pubinsert, pubtruncate, pubviaroot) FROM pg_publication
    UNION ALL SELECT prrelid::regclass::text FROM pg_publication_rel
    UNION ALL SELECT concat_ws(' ', nspname, nspacl) FROM pg_namespace";

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(pid) = i32::try_from(self.postmaster.id())
            .ok()
            .and_then(rustix::process::Pid::from_raw)
        {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::INT);
        }
        let _ = self.postmaster.wait();
    }
}

/// The only value of a query, as text.
pub(crate) async fn value(client: &Client, sql: &str) -> String {
    client.query_one(sql, &[]).await.unwrap().get(0)
}
