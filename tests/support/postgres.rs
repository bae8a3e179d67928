//! One throwaway PostgreSQL server.
//!
//! Servers listen on a Unix socket in their own folder, so no two can want one port; TCP on request.
//! `initdb` runs once per version and member number of a cluster: its result, with the application's role and
//! database, is kept as an archive below the target folder. (Per member, because copies share the system identifier, and two nodes never do.)

use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::Duration;

use tokio_postgres::Config;

use crate::network::Seat;
use crate::process::{self, Signal, is_root, mortal, mortal_at, run};
use crate::session::{Refused, Session};
use crate::set_clock::{Clock, SetClock};
use crate::wait::{PATIENCE, until, until_ok};

/// The database that applications use.
pub const DATABASE: &str = "app";

/// How one server differs from the usual.
#[derive(Clone, Debug)]
pub struct Options {
    /// Major version: 15 to 18.
    pub version: u32,
    /// Member number; decides the system identifier.
    pub member: usize,
    /// Lines for postgresql.conf, after the usual ones.
    pub conf: Vec<String>,
    /// A clock of its own, and what it shows at first; see [`Postgres::set_clock`].
    pub clock: Option<Clock>,
    /// Port on 127.0.0.1, or at its seat in a network, with password authentication, if any.
    pub tcp_port: Option<u16>,
}

/// A server; stopped when dropped.
pub struct Postgres {
    options: Options,
    dir: PathBuf,
    env: Vec<(String, String)>,
    clock: Option<SetClock>,
    seat: Option<Seat>,
    postmaster: Option<Child>,
}

/// The folder of a version's programs.
pub fn bin_dir(version: u32) -> PathBuf {
    let dir = match version {
        16..=18 => {
            let checkout = Path::new(env!("CARGO_MANIFEST_DIR"))
                .parent()
                .expect("the workspace");
            let unpacked = checkout.join(format!(".cache/pg{version}/bin"));
            unpacked.canonicalize().unwrap_or(unpacked)
        }
        _ => PathBuf::from(format!("/usr/lib/postgresql/{version}/bin")),
    };
    assert!(
        dir.join("postgres").exists(),
        "no PostgreSQL {version} in {}; run scripts/setup.sh",
        dir.display()
    );
    dir
}

/// The folder of a `pg_dump` for servers up to a version. There are two: that of 15, and that of 18, which reads all that are older.
pub fn dump_dir(newest: u32) -> PathBuf {
    let dir = bin_dir(if newest > 15 { 18 } else { 15 });
    assert!(
        dir.join("pg_dump").exists(),
        "no pg_dump in {}; run scripts/setup.sh",
        dir.display()
    );
    dir
}

/// Where compiled tests keep what outlives one run.
fn keep_dir() -> PathBuf {
    // target/debug -> target/it
    let profile = process::profile_dir();
    let target = profile
        .parent()
        .expect("the target folder holds that of a profile");
    let dir = target.join("it");
    fs::create_dir_all(&dir).expect("create the tests' folder");
    dir
}

/// A port that no other test of this machine uses: outside the kernel's own range, locked for as long as
/// this process lives.
pub fn free_port() -> u16 {
    static HELD: std::sync::Mutex<Vec<File>> = std::sync::Mutex::new(Vec::new());
    let dir = keep_dir().join("ports");
    fs::create_dir_all(&dir).expect("create the ports' folder");
    let start = std::process::id() as u16 % 10_000;
    for step in 0..10_000 {
        let port = 20_000 + (start + step) % 10_000;
        let Ok(file) = File::create(dir.join(port.to_string())) else {
            continue;
        };
        if file.try_lock().is_err() || std::net::TcpListener::bind(("127.0.0.1", port)).is_err() {
            continue;
        }
        HELD.lock().expect("no panic holds it").push(file);
        return port;
    }
    panic!("ten thousand ports, and none is free");
}

/// Lays out at `data`, which must not exist, the files of a server that the programs in `bin` have just initialised, and that has run
/// `sql`, one statement a line. That takes a second or more, so it is done once for each `name` and then copied; servers that must not
/// have the same system identifier have different names.
pub fn lay_out(bin: &Path, name: &str, sql: &str, data: &Path) {
    // From one file: of what copying a thousand files takes, half is reading them.
    fs::create_dir(data).expect("create the data folder");
    run(std::process::Command::new("tar")
        .args(["--extract", "--same-permissions", "--numeric-owner", "--file"])
        .arg(template(bin, name, sql))
        .arg("--directory")
        .arg(data));
}

/// The initialised data folder of this name, as an archive, made on first use.
fn template(bin: &Path, name: &str, sql: &str) -> PathBuf {
    let dir = keep_dir();
    let template = dir.join(format!("{name}.tar"));
    let lock = File::create(dir.join(format!("{name}.lock"))).expect("create a lock file");
    lock.lock().expect("wait for another test that initialises");
    if !template.exists() {
        // The server's user may not enter the target folder: initialise in the open, then move.
        let open = open_dir("anabranch-initdb-");
        let data = open.path().join("data");
        run(mortal(&bin.join("initdb"), "KILL", true)
            .arg("-D")
            .arg(&data)
            .args([
                "--username=postgres",
                "--auth=trust",
                "--encoding=UTF8",
                "--locale=C.UTF-8",
                "--no-sync",
            ]));
        if !sql.is_empty() {
            let script = open.path().join("first.sql");
            fs::write(&script, sql).expect("write the first statements");
            run(mortal(&bin.join("postgres"), "KILL", true)
                .args(["--single", "-c", "exit_on_error=on", "-D"])
                .arg(&data)
                .arg("postgres")
                .stdin(File::open(&script).expect("read the first statements")));
        }
        let unfinished = dir.join(format!("{name}.new"));
        run(std::process::Command::new("tar")
            .args(["--create", "--numeric-owner", "--file"])
            .arg(&unfinished)
            .arg("--directory")
            .arg(&data)
            .arg("."));
        fs::rename(&unfinished, &template).expect("keep the archive");
    }
    template
}

/// A temporary folder that the server's user may enter; in memory, it may be.
pub fn open_dir(prefix: &str) -> tempfile::TempDir {
    open_dir_in(&std::env::temp_dir(), prefix)
}

/// The same on a disk.
pub fn open_dir_on_disk(prefix: &str) -> tempfile::TempDir {
    open_dir_in(Path::new("/var/tmp"), prefix)
}

fn open_dir_in(parent: &Path, prefix: &str) -> tempfile::TempDir {
    let dir = tempfile::Builder::new()
        .prefix(prefix)
        .tempdir_in(parent)
        .expect("create a temporary folder");
    run(std::process::Command::new("chmod").arg("755").arg(dir.path()));
    if is_root() {
        run(std::process::Command::new("chown")
            .arg("postgres:")
            .arg(dir.path()));
    }
    dir
}

impl Postgres {
    /// Lays out a server in `dir`, which must not exist, with the application's role and database; does not start it.
    pub fn create(dir: &Path, options: Options) -> Self {
        fs::create_dir(dir).expect("create the server's folder");
        let name = format!("app{}-{}", options.version, options.member);
        let sql = format!("create role app login password 'app'\ncreate database {DATABASE} owner app\n");
        lay_out(&bin_dir(options.version), &name, &sql, &dir.join("data"));
        let clock = options.clock.map(|shows| SetClock::new(dir, shows));
        let server = Self {
            options,
            dir: dir.to_owned(),
            env: Vec::new(),
            clock,
            seat: None,
            postmaster: None,
        };
        server.configure();
        if is_root() {
            run(std::process::Command::new("chown").arg("postgres:").arg(dir));
        }
        server
    }

    /// A copy of this server as a restored backup would be: same system identifier, same slots. This one
    /// must be stopped.
    pub fn copy(&self, dir: &Path) -> Self {
        assert!(
            self.postmaster.is_none(),
            "stop the server before its folder is copied"
        );
        run(std::process::Command::new("cp").arg("-a").arg(&self.dir).arg(dir));
        let copy = Self {
            options: self.options.clone(),
            dir: dir.to_owned(),
            env: Vec::new(),
            clock: None,
            seat: None,
            postmaster: None,
        };
        copy.configure();
        copy
    }

    /// A physical standby of a running server, named `standby` in its `pg_stat_replication`; not started.
    pub fn standby_of(primary: &Self, dir: &Path) -> Self {
        fs::create_dir(dir).expect("create the standby's folder");
        if is_root() {
            run(std::process::Command::new("chown").arg("postgres:").arg(dir));
        }
        let program = bin_dir(primary.version()).join("pg_basebackup");
        if program.exists() {
            run(mortal(&program, "KILL", true)
                .args([
                    "--username=postgres",
                    "--checkpoint=fast",
                    "--no-sync",
                    "--wal-method=stream",
                    "--host",
                ])
                .arg(&primary.dir)
                .arg(format!("--port={}", primary.port()))
                .arg("--pgdata")
                .arg(dir.join("data")));
        } else {
            Self::base_backup(primary, &dir.join("data"));
        }
        let mut options = primary.options.clone();
        options.tcp_port = None;
        let conninfo = format!("{} application_name=standby", primary.dsn("postgres", "postgres"));
        options.conf.push(format!("primary_conninfo = '{conninfo}'"));
        let standby = Self {
            options,
            dir: dir.to_owned(),
            env: Vec::new(),
            clock: None,
            seat: None,
            postmaster: None,
        };
        standby.configure();
        fs::write(standby.data_dir().join("standby.signal"), "").expect("mark it as a standby");
        standby
    }

    /// What pg_basebackup does, which is not packaged for every version.
    fn base_backup(primary: &Self, to: &Path) {
        let from = primary.data_dir();
        let copy = format!(
            "\\! cp -a {from} {to} 2>/dev/null; rm -rf {to}/postmaster.pid {to}/postmaster.opts {to}/pg_replslot/*",
            from = from.display(),
            to = to.display(),
        );
        let label = format!("\\o {}", to.join("backup_label").display());
        let mut backup = mortal(&bin_dir(15).join("psql"), "KILL", true);
        backup.args([
            "--no-psqlrc",
            "--quiet",
            "--no-align",
            "--tuples-only",
            "--username=postgres",
        ]);
        backup.args(["--set=ON_ERROR_STOP=1", "--dbname=postgres"]);
        for command in [
            "select pg_backup_start('standby', true)",
            &copy,
            &label,
            "select labelfile from pg_backup_stop(false)",
        ] {
            backup.arg("--command").arg(command);
        }
        run(backup
            .arg("--host")
            .arg(&primary.dir)
            .arg(format!("--port={}", primary.port())));
    }

    fn configure(&self) {
        let socket = self.dir.display();
        let (host, others) = match &self.seat {
            Some(seat) => (seat.address(), "samenet"),
            None => (Ipv4Addr::LOCALHOST, "127.0.0.1/32"),
        };
        let (listen, port) = match self.options.tcp_port {
            Some(port) => (host.to_string(), port),
            None => (String::new(), 5432),
        };
        let mut conf = format!(
            "listen_addresses = '{listen}'\nport = {port}\nunix_socket_directories = '{socket}'\n\
             wal_level = logical\nmax_prepared_transactions = 10\nmax_wal_senders = 12\n\
             max_replication_slots = 12\nmax_connections = 80\nshared_buffers = 64MB\nfsync = on\n\
             track_commit_timestamp = off\nmin_wal_size = 80MB\nmax_wal_size = 1GB\n\
             log_line_prefix = '%m [%p] %u@%d '\nlog_lock_waits = on\n\
             cluster_name = 'n{}'\ntimezone = 'UTC'\nlog_timezone = 'UTC'\n\
             # Files instead of /dev/shm: a killed server leaves nothing outside its folder.\n\
             dynamic_shared_memory_type = mmap\n\
             # A server that crashed syncs its folder as a whole instead of a thousand files one by one.\n\
             recovery_init_sync_method = syncfs\n",
            self.options.member + 1
        );
        for line in &self.options.conf {
            conf.push_str(line);
            conf.push('\n');
        }
        let data = self.data_dir();
        fs::write(data.join("postgresql.auto.conf"), conf).expect("write the server's settings");
        let hba = format!(
            "local all all trust\nlocal replication all trust\nhost all all {others} scram-sha-256\n"
        );
        fs::write(data.join("pg_hba.conf"), hba).expect("write pg_hba.conf");
    }

    /// Adds settings; they hold from the next start on.
    pub fn set_conf(&mut self, lines: &[&str]) {
        self.options
            .conf
            .extend(lines.iter().map(|&line| line.to_owned()));
        self.configure();
    }

    /// Makes the server read its settings again ([`Self::set_conf`]), and returns once its checkpointer has done so, too: it is by what
    /// that has read that a commit knows whether it has to wait for a standby, and not by what its own session has.
    pub async fn reload(&self) {
        // A new session has what the postmaster has, which tells all others before it starts that session.
        let read_at = async || self.admin().await.value("select pg_conf_load_time()").await;
        let before = read_at().await;
        self.admin().await.run("select pg_reload_conf()").await;
        until("the settings are read again", async || read_at().await != before).await;
        // It looks for new settings before it begins one; the first may have been begun by then.
        let admin = self.admin().await;
        for _ in 0..2 {
            admin.run("checkpoint").await;
        }
    }

    /// A variable of its environment, from the next start on.
    pub fn set_env(&mut self, name: &str, value: &str) {
        self.env.retain(|(known, _)| known != name);
        self.env.push((name.to_owned(), value.to_owned()));
    }

    /// Its seat in a network, from the next start on.
    pub fn set_seat(&mut self, seat: &Seat) {
        self.seat = Some(seat.clone());
        self.configure();
    }

    /// Sets its clock ([`Options::clock`]), now, to be wrong by so many seconds.
    pub fn set_clock(&self, error_s: i64) {
        self.clock
            .as_ref()
            .expect("the server has a clock of its own")
            .set(Clock::WrongBy(error_s));
    }

    /// What a program must have in its environment to go by the same clock.
    pub fn clock_env(&self) -> Vec<(String, String)> {
        self.clock
            .as_ref()
            .map_or_else(Vec::new, |clock| clock.env().into())
    }

    /// Process id of the postmaster, while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.postmaster.as_ref().map(Child::id)
    }

    /// Its major version.
    pub fn version(&self) -> u32 {
        self.options.version
    }

    /// Its port: of TCP if it listens there, else the number in its socket's name.
    pub fn port(&self) -> u16 {
        self.options.tcp_port.unwrap_or(5432)
    }

    /// The data folder.
    pub fn data_dir(&self) -> PathBuf {
        self.dir.join("data")
    }

    /// The server's log so far.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.log_path()).unwrap_or_default()).into_owned()
    }

    /// The file of [`Self::log`].
    pub fn log_path(&self) -> PathBuf {
        self.dir.join("server.log")
    }

    /// Starts the server and waits until it takes connections.
    pub async fn start(&mut self) {
        assert!(self.postmaster.is_none(), "the server runs already");
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.log_path())
            .expect("open the server's log");
        // SIGQUIT stops every backend and releases what the kernel holds for them; SIGKILL would not.
        let mut command = mortal_at(self.seat.as_ref(), Path::new("/usr/bin/env"), "QUIT", true);
        // Set by `env`, so that a preloaded library meets the server alone.
        command.args(
            self.clock_env()
                .iter()
                .map(|(name, value)| format!("{name}={value}")),
        );
        command.args(self.env.iter().map(|(name, value)| format!("{name}={value}")));
        command
            .arg(bin_dir(self.options.version).join("postgres"))
            .arg("-D")
            .arg(self.data_dir());
        command
            .stdout(log.try_clone().expect("share the log"))
            .stderr(log);
        self.postmaster = Some(process::spawn(command).expect("start postgres"));
        let config = self.config("postgres", "postgres");
        until_ok("the server takes connections", PATIENCE, async || {
            if let Some(Ok(Some(status))) = self.postmaster.as_mut().map(Child::try_wait) {
                panic!("the server ended with {status}:\n{}", tail(&self.log(), 30));
            }
            Session::connect(&config, "probe").await.map(drop)
        })
        .await;
    }

    /// SIGSTOP to the postmaster and every backend, or SIGCONT. A backend that begins meanwhile is missed.
    pub fn freeze(&self, frozen: bool) {
        let Some(pid) = self.pid() else { return };
        let how = if frozen { Signal::STOP } else { Signal::CONT };
        process::signal(pid, how);
        for child in process::children(pid) {
            process::signal(child, how);
        }
    }

    /// Fast shutdown: clients are disconnected, everything is written.
    pub fn stop(&mut self) {
        self.end(Signal::INT);
    }

    /// Immediate shutdown: like a crash for the data, but the server ends itself.
    fn stop_now(&mut self) {
        self.end(Signal::QUIT);
    }

    fn end(&mut self, how: Signal) {
        let Some(mut postmaster) = self.postmaster.take() else {
            return;
        };
        for child in process::children(postmaster.id()) {
            // A backend that a test has frozen would hold the shutdown up.
            process::signal(child, Signal::CONT);
        }
        process::signal(postmaster.id(), how);
        if process::wait_exit(&mut postmaster, Duration::from_secs(60)).is_none() {
            process::kill_tree(postmaster.id());
            let _ = postmaster.wait();
        }
    }

    /// SIGKILL to the postmaster and every backend at once, as a power cut would (but for the page cache).
    pub fn kill(&mut self) {
        let Some(mut postmaster) = self.postmaster.take() else {
            return;
        };
        process::kill_tree(postmaster.id());
        let _ = postmaster.wait();
        // The server leaves a tiny System V segment; its next start would find and remove it, but there
        // may be none.
        if let Some(id) = self.shared_memory_id() {
            let _ = std::process::Command::new("ipcrm").args(["-m", &id]).output();
        }
        // What it would remove itself, if the kernel had not given its pid to another process since.
        let _ = fs::remove_file(self.data_dir().join("postmaster.pid"));
    }

    fn shared_memory_id(&self) -> Option<String> {
        let pid_file = fs::read_to_string(self.data_dir().join("postmaster.pid")).ok()?;
        Some(pid_file.lines().nth(6)?.split_whitespace().nth(1)?.to_owned())
    }

    /// Its status, if it ended of itself.
    pub fn ended(&mut self) -> Option<std::process::ExitStatus> {
        let status = self.postmaster.as_mut()?.try_wait().ok()??;
        self.postmaster = None;
        Some(status)
    }

    /// Is the server running?
    pub fn runs(&self) -> bool {
        self.postmaster.is_some()
    }

    /// Connection settings for a role and database, over the socket.
    pub fn config(&self, user: &str, database: &str) -> Config {
        let mut config = Config::new();
        config
            .host_path(&self.dir)
            .port(self.port())
            .user(user)
            .dbname(database);
        config
    }

    /// The same as a libpq connection string.
    pub fn dsn(&self, user: &str, database: &str) -> String {
        let port = self.port();
        format!(
            "host={} port={port} user={user} dbname={database}",
            self.dir.display()
        )
    }

    /// Connects or says why not.
    pub async fn try_session(&self, user: &str, database: &str) -> Result<Session, Refused> {
        Session::connect(
            &self.config(user, database),
            &format!("n{}", self.options.member + 1),
        )
        .await
    }

    /// A session of the superuser in the application's database.
    pub async fn admin(&self) -> Session {
        self.session_of("postgres").await
    }

    /// A session of the application.
    pub async fn session(&self) -> Session {
        self.session_of("app").await
    }

    /// A server that starts or recovers from a crash is waited for.
    async fn session_of(&self, user: &str) -> Session {
        let deadline = tokio::time::Instant::now() + PATIENCE;
        loop {
            match self.try_session(user, DATABASE).await {
                Ok(session) => return session,
                Err(error) if error.code == "57P03" && tokio::time::Instant::now() < deadline => {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
                Err(error) => panic!("connect as {user}: {error}"),
            }
        }
    }

    /// Runs a client program of version 15 (of others there is pg_dump at most), connected as the superuser.
    pub fn client(&self, program: &str, database: &str) -> std::process::Command {
        let mut command = std::process::Command::new(bin_dir(15).join(program));
        command
            .env("PGHOST", &self.dir)
            .env("PGPORT", self.port().to_string())
            .env("PGUSER", "postgres")
            .env("PGDATABASE", database);
        command
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        if self.postmaster.is_some() {
            self.stop_now();
        }
    }
}

/// The last lines of a text.
pub fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}
