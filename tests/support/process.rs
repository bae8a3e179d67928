//! Children that cannot outlive the test, signals, and a look into /proc.
//!
//! The kernel's parent-death signal is sent when the *thread* that started the child ends, and test
//! runtimes end idle threads. So one thread, which lives as long as the process, starts every child.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{OnceLock, mpsc};
use std::time::{Duration, Instant};

pub use rustix::process::Signal;
use rustix::process::{Pid, geteuid, kill_process};

use crate::network::Seat;

/// The folder that cargo builds programs into: `target/debug`, `target/release`.
pub fn profile_dir() -> PathBuf {
    let exe = std::env::current_exe().expect("the path of this program");
    let dir = exe.parent().expect("a program lies in a folder");
    // Tests lie one level deeper: target/debug/deps/it-...
    let dir = if dir.ends_with("deps") {
        dir.parent().unwrap_or(dir)
    } else {
        dir
    };
    dir.to_owned()
}

/// Are we root? Then servers run as user `postgres`, which refuses to be root.
pub fn is_root() -> bool {
    geteuid().is_root()
}

/// A command that is sent `death` when this process ends, however it ends; as user postgres where asked
/// for and possible.
pub fn mortal(program: &Path, death: &str, as_postgres: bool) -> Command {
    mortal_at(None, program, death, as_postgres)
}

/// The same at a seat of a network.
pub fn mortal_at(seat: Option<&Seat>, program: &Path, death: &str, as_postgres: bool) -> Command {
    // First to the seat: user postgres may not go there.
    let setpriv = Path::new("setpriv");
    let mut command = seat.map_or_else(|| Command::new(setpriv), |seat| seat.command(setpriv));
    command.args(["--pdeathsig", death]);
    if as_postgres && is_root() {
        command.args(["--reuid=postgres", "--regid=postgres", "--init-groups"]);
    }
    command
        .arg("--")
        .arg(program)
        .stdin(Stdio::null())
        .current_dir("/");
    command
}

/// Starts a child from the thread that lives as long as this process.
pub fn spawn(command: Command) -> io::Result<Child> {
    type Job = (Command, mpsc::Sender<io::Result<Child>>);
    static SPAWNER: OnceLock<mpsc::Sender<Job>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (send, receive) = mpsc::channel::<Job>();
        std::thread::Builder::new()
            .name("spawner".into())
            .spawn(move || {
                for (mut command, answer) in receive {
                    let _ = answer.send(command.spawn());
                }
            })
            .expect("start the spawner thread");
        send
    });
    let (answer, child) = mpsc::channel();
    spawner.send((command, answer)).expect("the spawner thread lives");
    child.recv().expect("the spawner thread answers")
}

/// Runs a short program to its end; panics with its output when it fails.
pub fn run(command: &mut Command) -> String {
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("cannot start {command:?}: {error}"));
    assert!(
        output.status.success(),
        "{command:?} failed with {}:\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Sends a signal to one process; one that is gone already is no error.
pub fn signal(pid: u32, signal: Signal) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
        let _ = kill_process(pid, signal);
    }
}

/// State letter and parent of a process, from /proc.
fn stat(pid: u32) -> Option<(char, u32)> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command name may hold anything, so read from its closing bracket on.
    let mut fields = text[text.rfind(')')? + 1..].split_whitespace();
    let state = fields.next()?.chars().next()?;
    Some((state, fields.next()?.parse().ok()?))
}

/// Does the process run (a zombie does not)?
pub fn alive(pid: u32) -> bool {
    stat(pid).is_some_and(|(state, _)| state != 'Z' && state != 'X')
}

/// Children of a process.
pub fn children(parent: u32) -> Vec<u32> {
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|&pid| stat(pid).is_some_and(|(_, its_parent)| its_parent == parent))
        .collect()
}

/// SIGKILL to a process and all below it, so that none sees another die: the root is frozen first and
/// can start no more, the children go, the root goes. Returns when all are gone.
pub fn kill_tree(root: u32) {
    signal(root, Signal::STOP);
    let mut victims = vec![root];
    let mut at = 0;
    while at < victims.len() {
        victims.extend(children(victims[at]));
        at += 1;
    }
    for &pid in victims.iter().rev() {
        signal(pid, Signal::KILL);
    }
    let deadline = Instant::now() + Duration::from_secs(30);
    while victims.iter().any(|&pid| alive(pid)) {
        assert!(Instant::now() < deadline, "processes {victims:?} survive SIGKILL");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Waits for a child; `None` when it is still there after `timeout`.
pub fn wait_exit(child: &mut Child, timeout: Duration) -> Option<std::process::ExitStatus> {
    let deadline = Instant::now() + timeout;
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Some(status),
            Ok(None) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(2)),
            _ => return None,
        }
    }
}

/// Highest resident memory a live process ever had, MiB.
pub fn peak_memory_mib(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .unwrap_or("0 kB");
    line.trim()
        .trim_end_matches("kB")
        .trim()
        .parse::<u64>()
        .unwrap_or(0)
        / 1024
}
