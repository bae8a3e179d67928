//! One `anabranch run`, and the program's other commands.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output};
use std::time::Duration;

use anabranch_proto::admin::admin_client::AdminClient;
use anabranch_proto::admin::{StatusRequest, WaitForRequest};
use serde_json::Value;
use tonic::transport::{Channel, Endpoint};

use crate::network::Seat;
use crate::process::{self, Signal, mortal_at};

/// The program, built by `cargo build --bins`: beside this one, or, for a test, in the folder above.
pub fn program() -> PathBuf {
    let program = process::profile_dir().join("anabranch");
    assert!(
        program.exists(),
        "no {}; build it with `cargo build --workspace --bins`",
        program.display()
    );
    program
}

/// Runs `anabranch ARGS` to its end, whatever it answers.
pub async fn anabranch(args: &[&str]) -> Output {
    anabranch_at(None, args).await
}

/// The same at a seat of a network, from where it can reach peers.
async fn anabranch_at(seat: Option<&Seat>, args: &[&str]) -> Output {
    let program = program();
    let mut command = seat.map_or_else(|| Command::new(&program), |seat| seat.command(&program));
    command.args(args).env("NO_COLOR", "1");
    tokio::task::spawn_blocking(move || command.output())
        .await
        .expect("wait for the program")
        .expect("start the program")
}

/// Runs `anabranch ARGS` to its end, whatever it answers. What takes longer than `within` is killed, and the test fails with all that it
/// has said.
pub async fn anabranch_within(args: &[&str], within: Duration) -> Output {
    let folder = tempfile::tempdir().expect("a folder for what it says");
    let file = |name: &str| File::create(folder.path().join(name)).expect("a file for what it says");
    let said = |name: &str| fs::read(folder.path().join(name)).expect("read what it has said");
    let mut command = process::mortal(&program(), "KILL", false);
    command
        .args(args)
        .env("NO_COLOR", "1")
        .stdout(file("stdout"))
        .stderr(file("stderr"));
    let mut child = process::spawn(command).expect("start the program");
    let waited = tokio::task::spawn_blocking(move || {
        let status = process::wait_exit(&mut child, within);
        if status.is_none() {
            let _ = child.kill();
            let _ = child.wait();
        }
        status
    });
    let status = waited.await.expect("wait for the program");
    let (stdout, stderr) = (said("stdout"), said("stderr"));
    let Some(status) = status else {
        panic!(
            "anabranch {} was not through after {within:?}; it has said:\n{}{}",
            args.join(" "),
            String::from_utf8_lossy(&stdout),
            String::from_utf8_lossy(&stderr)
        )
    };
    Output {
        status,
        stdout,
        stderr,
    }
}

/// Runs `anabranch ARGS`, expects success, returns its standard output.
pub async fn anabranch_ok(args: &[&str]) -> String {
    let output = anabranch(args).await;
    assert!(
        output.status.success(),
        "anabranch {} failed:\n{}",
        args.join(" "),
        both(&output)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Runs `anabranch ARGS`, expects it to refuse, returns all it said.
pub async fn anabranch_refuses(args: &[&str]) -> String {
    let output = anabranch(args).await;
    assert!(
        !output.status.success(),
        "anabranch {} should have refused, but said:\n{}",
        args.join(" "),
        both(&output)
    );
    both(&output)
}

fn both(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

/// Asks the daemon of this folder to say when everything of node `origin` up to `lsn` is applied at its server; false when that is
/// not so in time, or it does not answer.
pub async fn applied_up_to(data_dir: &Path, origin: u16, lsn: u64, patience: Duration) -> bool {
    let asking = async {
        let request = WaitForRequest {
            node_id: u32::from(origin),
            epoch: 1,
            lsn,
            timeout_ms: u64::try_from(patience.as_millis()).unwrap_or(u64::MAX),
        };
        let answer = asked(data_dir).await?.wait_for(request).await.ok()?;
        Some(answer.into_inner().reached)
    };
    let within = patience + Duration::from_secs(2);
    matches!(tokio::time::timeout(within, asking).await, Ok(Some(true)))
}

/// What the daemon of this folder says of itself, if it answers. It is asked at its socket: a busy machine takes long to start a program that asks.
pub async fn status(data_dir: &Path) -> Option<Value> {
    let answer = asked(data_dir).await?.status(StatusRequest {}).await.ok()?;
    serde_json::from_str(&answer.into_inner().json).ok()
}

/// A connection to the daemon of this folder.
async fn asked(data_dir: &Path) -> Option<AdminClient<Channel>> {
    let socket = format!("unix://{}", data_dir.join("admin.sock").display());
    let channel = Endpoint::from_shared(socket).ok()?.connect().await.ok()?;
    Some(AdminClient::new(channel))
}

/// A daemon; killed when dropped.
pub struct Daemon {
    config: PathBuf,
    log: PathBuf,
    program: Option<PathBuf>,
    env: Vec<(String, String)>,
    seat: Option<Seat>,
    child: Option<Child>,
    peak_memory_mib: u64,
}

impl Daemon {
    /// A daemon for a configuration file; not started.
    pub fn new(config: &Path) -> Self {
        Self {
            config: config.to_owned(),
            log: config.with_extension("log"),
            program: None,
            env: Vec::new(),
            seat: None,
            child: None,
            peak_memory_mib: 0,
        }
    }

    /// Runs another build of the program from the next start on.
    pub fn set_program(&mut self, program: &Path) {
        self.program = Some(program.to_owned());
    }

    /// A variable of its environment, from the next start on.
    pub fn set_env(&mut self, name: &str, value: &str) {
        self.env.retain(|(known, _)| known != name);
        self.env.push((name.to_owned(), value.to_owned()));
    }

    /// Its seat in a network, from the next start on.
    pub fn set_seat(&mut self, seat: &Seat) {
        self.seat = Some(seat.clone());
    }

    /// Runs `anabranch COMMAND --config ITS-OWN MORE` where the daemon runs, to its end, whatever it answers.
    pub async fn anabranch(&self, command: &[&str], more: &[&str]) -> Output {
        let args = [command, &["--config", self.config_arg()], more].concat();
        anabranch_at(self.seat.as_ref(), &args).await
    }

    /// Its configuration file.
    pub fn config(&self) -> &Path {
        &self.config
    }

    /// Rewrites its configuration; holds from the next start on.
    pub fn edit_config(&self, edit: impl FnOnce(&str) -> String) {
        let text = fs::read_to_string(&self.config).expect("read the configuration");
        fs::write(&self.config, edit(&text)).expect("write the configuration");
    }

    /// The same as an argument.
    pub fn config_arg(&self) -> &str {
        self.config.to_str().expect("a temporary path is UTF-8")
    }

    /// Starts it. That it runs does not mean that it has connected to anything.
    pub fn start(&mut self) {
        assert!(self.child.is_none(), "the daemon runs already");
        let log = File::options()
            .create(true)
            .append(true)
            .open(&self.log)
            .expect("open the daemon's log");
        let program = self.program.clone().unwrap_or_else(program);
        // Set by `env`, so that a preloaded library meets the daemon alone.
        let mut command = mortal_at(self.seat.as_ref(), Path::new("/usr/bin/env"), "KILL", false);
        command.args(self.env.iter().map(|(name, value)| format!("{name}={value}")));
        command.arg(program);
        command.arg("run").arg("--config").arg(&self.config);
        if std::env::var_os("RUST_LOG").is_none() {
            command.env("RUST_LOG", "info");
        }
        command
            .stdout(log.try_clone().expect("share the log"))
            .stderr(log)
            .env("NO_COLOR", "1");
        self.child = Some(process::spawn(command).expect("start the daemon"));
    }

    /// SIGTERM, and the status it ends with.
    pub fn stop(&mut self) -> ExitStatus {
        let mut child = self.child.take().expect("the daemon was started");
        self.peak_memory_mib = self.peak_memory_mib.max(process::peak_memory_mib(child.id()));
        process::signal(child.id(), Signal::TERM);
        process::wait_exit(&mut child, Duration::from_secs(60)).unwrap_or_else(|| {
            let _ = child.kill();
            panic!(
                "the daemon does not end on SIGTERM:\n{}",
                crate::postgres::tail(&self.log(), 40)
            )
        })
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            self.peak_memory_mib = self.peak_memory_mib.max(process::peak_memory_mib(child.id()));
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Waits until it ends of itself.
    pub fn wait_exit(&mut self, timeout: Duration) -> Option<ExitStatus> {
        let status = process::wait_exit(self.child.as_mut()?, timeout)?;
        self.child = None;
        Some(status)
    }

    /// Process id, while it runs.
    pub fn pid(&mut self) -> Option<u32> {
        match self.child.as_mut()?.try_wait() {
            Ok(None) => self.child.as_ref().map(Child::id),
            _ => None,
        }
    }

    /// Does it run?
    pub fn runs(&mut self) -> bool {
        self.pid().is_some()
    }

    /// Was it started, and not yet stopped, by the test?
    pub fn started(&self) -> bool {
        self.child.is_some()
    }

    /// Highest resident memory so far, MiB, over all its runs.
    pub fn peak_memory_mib(&self) -> u64 {
        let now = self
            .child
            .as_ref()
            .map_or(0, |child| process::peak_memory_mib(child.id()));
        self.peak_memory_mib.max(now)
    }

    /// All it said so far.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }
}

/// What the daemon of a configuration says of itself now, for the report of a test that fails: one line of JSON, or why there is none.
pub(crate) fn last_words(config: &str) -> String {
    let asked = std::process::Command::new("timeout")
        .arg("5")
        .arg(program())
        .args(["status", "--output", "json", "--config", config])
        .output();
    match asked {
        Ok(output) if output.status.success() => {
            let text = String::from_utf8_lossy(&output.stdout);
            let words: Vec<&str> = text.split_whitespace().collect();
            words.join(" ")
        }
        Ok(output) => both(&output),
        Err(error) => error.to_string(),
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.kill();
    }
}
