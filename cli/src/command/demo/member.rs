//! One server and its daemon, as child processes that die with the demo.

use std::fs::{self, File};
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anabranch_node::admin;
use anabranch_node::pg::Dsn;
use anabranch_node::setup;
use anabranch_node::status::Status;
use rustix::process::{Pid, Signal, geteuid, kill_process};
use tokio_postgres::Client;

use super::{PATIENCE, home};
use crate::failure::Failure;

const DATABASE: &str = "demo";
/// Lines of a daemon's log that are shown when something goes wrong.
const LOG_TAIL: usize = 15;

pub(super) struct Member {
    pub(super) name: &'static str,
    home: PathBuf,
    server: Child,
    daemon: Option<Child>,
}

impl Member {
    /// Initialises and starts server number `at` of `addresses`, makes its database, writes its configuration.
    pub(super) async fn create(
        bin: &Path,
        folder: &Path,
        addresses: &[(&'static str, SocketAddr)],
        at: usize,
    ) -> Result<Self, Failure> {
        let Some(&(name, address)) = addresses.get(at) else {
            return Err(Failure::Refused("the demo has no such member".to_owned()));
        };
        let home = home(folder, name);
        fs::create_dir(&home).map_err(|error| Failure::io(format!("make {}", home.display()), error))?;
        open_to_the_server(&home)?;
        let data = home.join("server");
        let mut initdb = as_server(&bin.join("initdb"));
        initdb.arg("-D").arg(&data).args([
            "--username=postgres",
            "--auth=trust",
            "--encoding=UTF8",
            "--no-locale",
        ]);
        run(initdb.arg("--no-sync"))?;
        let log = create(&home.join("server.log"))?;
        let mut server = as_server(&bin.join("postgres"));
        server.arg("-D").arg(&data).args([
            "-c",
            "listen_addresses=",
            "-c",
            "wal_level=logical",
            "-c",
            "shared_buffers=32MB",
        ]);
        server
            .arg("-c")
            .arg(format!("unix_socket_directories={}", home.display()));
        let server = spawn(server.stderr(log))?;
        let member = Self {
            name,
            home,
            server,
            daemon: None,
        };
        member.wait_for_server().await?;
        let first = member.connect("postgres").await?;
        let sql = format!("CREATE DATABASE {DATABASE}");
        first
            .batch_execute(&sql)
            .await
            .map_err(Failure::query("the answer to CREATE DATABASE"))?;
        member.write_config(addresses, at, address)?;
        Ok(member)
    }

    fn write_config(
        &self,
        addresses: &[(&'static str, SocketAddr)],
        at: usize,
        address: SocketAddr,
    ) -> Result<(), Failure> {
        let mut text = format!(
            "[node]\nname = \"{}\"\nid = {}\ndata_dir = \"{}\"\n\n[cluster]\nid = \"demo\"\n\n[postgres]\n\
             dsn = \"host={} user=anabranch dbname={DATABASE}\"\n\n[listen]\naddress = \"{address}\"\n",
            self.name,
            at + 1,
            self.home.join("daemon").display(),
            self.home.display(),
        );
        for (other, (name, address)) in addresses.iter().enumerate().filter(|(other, _)| *other != at) {
            text.push_str(&format!(
                "\n[[peers]]\nname = \"{name}\"\nid = {}\naddress = \"{address}\"\n",
                other + 1
            ));
        }
        let path = self.config();
        fs::write(&path, text).map_err(|error| Failure::io(format!("write {}", path.display()), error))
    }

    async fn wait_for_server(&self) -> Result<(), Failure> {
        let started = Instant::now();
        loop {
            match self.connect("postgres").await {
                Ok(_) => return Ok(()),
                Err(error) if started.elapsed() > PATIENCE => {
                    let log = self.home.join("server.log");
                    return Err(Failure::Refused(format!(
                        "the server does not start: {error}\n{}",
                        tail(&log)
                    )));
                }
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
    }

    async fn connect(&self, database: &str) -> Result<Client, Failure> {
        let dsn = Dsn::new(
            &format!("host={} user=postgres dbname={database}", self.home.display()),
            None,
        )?;
        Ok(setup::connect(&dsn).await?)
    }

    /// A session of the superuser, as applications have it: names are looked up in `public`.
    pub(super) async fn admin(&self) -> Result<Client, Failure> {
        let client = self.connect(DATABASE).await?;
        client
            .batch_execute("SET search_path = public")
            .await
            .map_err(Failure::query("the answer to SET"))?;
        Ok(client)
    }

    pub(super) fn config(&self) -> PathBuf {
        self.home.join("anabranch.toml")
    }

    /// Runs `anabranch ARGS` for this member, as its operator would.
    pub(super) fn anabranch(&self, args: &[&str]) -> Result<String, Failure> {
        let mut command = ours()?;
        command.args(args).arg("--config").arg(self.config());
        command.env(
            "ANABRANCH_ADMIN_DSN",
            format!("host={} user=postgres dbname={DATABASE}", self.home.display()),
        );
        run(&mut command)
    }

    pub(super) fn start_daemon(&mut self) -> Result<(), Failure> {
        let path = self.home.join("daemon.log");
        let log = File::options()
            .create(true)
            .append(true)
            .open(&path)
            .map_err(|error| Failure::io(format!("open {}", path.display()), error))?;
        let mut command = ours()?;
        command
            .arg("run")
            .arg("--config")
            .arg(self.config())
            .stdout(Stdio::null())
            .stderr(log);
        self.daemon = Some(spawn(&mut command)?);
        Ok(())
    }

    /// SIGTERM, and its end.
    pub(super) fn stop_daemon(&mut self) -> Result<(), Failure> {
        let Some(mut daemon) = self.daemon.take() else {
            return Ok(());
        };
        signal(&daemon, Signal::TERM);
        let status = daemon
            .wait()
            .map_err(|error| Failure::io("wait for a daemon", error))?;
        if status.success() {
            return Ok(());
        }
        Err(Failure::Refused(format!(
            "the daemon of {} ended with {status}:\n{}",
            self.name,
            self.log_tail()
        )))
    }

    /// Is the daemon linked to every peer?
    pub(super) async fn linked_to_all(&mut self) -> Result<bool, Failure> {
        let ended = self
            .daemon
            .as_mut()
            .and_then(|daemon| daemon.try_wait().ok().flatten());
        if let Some(status) = ended {
            return Err(Failure::Refused(format!(
                "the daemon of {} ended with {status}:\n{}",
                self.name,
                self.log_tail()
            )));
        }
        let Ok(text) = admin::status(&self.home.join("daemon").join(admin::SOCKET)).await else {
            return Ok(false);
        };
        let status: Status = serde_json::from_str(&text).unwrap_or_default();
        Ok(!status.peers.is_empty() && status.peers.iter().all(|peer| peer.connected))
    }

    /// The command line that opens a session on this member.
    pub(super) fn psql(&self) -> String {
        format!("psql -h {} -U postgres {DATABASE}", self.home.display())
    }

    pub(super) fn log_tail(&self) -> String {
        format!("--- {}\n{}", self.name, tail(&self.home.join("daemon.log")))
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        // In this order a daemon can still say goodbye to its server.
        if let Some(daemon) = &mut self.daemon {
            signal(daemon, Signal::TERM);
            let _ = daemon.wait();
        }
        signal(&self.server, Signal::INT);
        let _ = self.server.wait();
    }
}

fn signal(child: &Child, signal: Signal) {
    if let Some(pid) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
        // Already gone is as good.
        let _ = kill_process(pid, signal);
    }
}

fn tail(path: &Path) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    let from = lines.len().saturating_sub(LOG_TAIL);
    lines.iter().skip(from).map(|line| format!("{line}\n")).collect()
}

/// A child in a process group of its own, so that Ctrl-C reaches us alone, and that the kernel ends should we be killed.
fn mortal(user: Option<&str>) -> Command {
    let mut command = Command::new("setpriv");
    if let Some(user) = user {
        command
            .arg(format!("--reuid={user}"))
            .arg(format!("--regid={user}"))
            .arg("--init-groups");
    }
    command
        .args(["--pdeathsig", "INT", "--"])
        .stdin(Stdio::null())
        .process_group(0);
    command
}

/// A program of PostgreSQL; the server refuses to run as root.
fn as_server(program: &Path) -> Command {
    let mut command = mortal(geteuid().is_root().then_some("postgres"));
    command.arg(program);
    command
}

/// This very program.
pub(super) fn program() -> Result<PathBuf, Failure> {
    std::env::current_exe().map_err(|error| Failure::io("find this program", error))
}

/// This program, without what the environment says about another node.
fn ours() -> Result<Command, Failure> {
    let mut command = mortal(None);
    command.arg(program()?);
    for (name, _) in std::env::vars_os() {
        let is_ours = name
            .to_str()
            .is_some_and(|name| name.starts_with("ANABRANCH_") && name != "ANABRANCH_LOG");
        if is_ours {
            command.env_remove(name);
        }
    }
    Ok(command)
}

fn spawn(command: &mut Command) -> Result<Child, Failure> {
    command
        .spawn()
        .map_err(|error| Failure::io("start setpriv (package util-linux)", error))
}

fn run(command: &mut Command) -> Result<String, Failure> {
    let output = command
        .output()
        .map_err(|error| Failure::io("start setpriv (package util-linux)", error))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    let args: Vec<_> = command.get_args().map(|arg| arg.to_string_lossy()).collect();
    Err(Failure::Refused(format!("{} failed: {said}", args.join(" "))))
}

fn create(path: &Path) -> Result<File, Failure> {
    File::create(path).map_err(|error| Failure::io(format!("make {}", path.display()), error))
}

/// Lets the server's user in, and gives it the folder.
pub(super) fn open_to_the_server(folder: &Path) -> Result<(), Failure> {
    let failed = |error| Failure::io(format!("open {} to the server", folder.display()), error);
    fs::set_permissions(folder, fs::Permissions::from_mode(0o755)).map_err(failed)?;
    if geteuid().is_root() {
        run(Command::new("chown").arg("postgres:").arg(folder))?;
    }
    Ok(())
}

/// A loopback address that nobody listens on.
pub(super) fn free_address() -> Result<SocketAddr, Failure> {
    TcpListener::bind(("127.0.0.1", 0))
        .and_then(|listener| listener.local_addr())
        .map_err(|error| Failure::io("find a free port", error))
}

/// The folder of PostgreSQL's programs.
pub(super) fn find_bin(given: Option<&Path>) -> Result<PathBuf, Failure> {
    let has_all = |folder: &Path| folder.join("initdb").exists() && folder.join("postgres").exists();
    if let Some(given) = given {
        if has_all(given) {
            return Ok(given.to_owned());
        }
        return Err(Failure::Usage(format!(
            "no initdb and postgres in {}",
            given.display()
        )));
    }
    let debian = [18, 17, 16, 15].map(|major| PathBuf::from(format!("/usr/lib/postgresql/{major}/bin")));
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut folders = debian.into_iter().chain(std::env::split_paths(&path));
    folders.find(|folder| has_all(folder)).ok_or_else(|| {
        Failure::Refused(
            "PostgreSQL's server is not installed: apt-get install postgresql, or give --pg-bin".to_owned(),
        )
    })
}
