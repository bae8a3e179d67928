//! Packets that are dropped by nft, in a network namespace of the harness's own, so that nobody else's are.
//!
//! The harness starts itself anew in a namespace ([`enter`]) where a nemesis or a network asks for it; servers, daemons and proxies are its
//! children, so they are in it, too, or in one that is made within it. Where nodes have proxies between them, each line has a port of its
//! own (its proxy's), by which its packets are known, whoever dialled, and may be lost ([`lose`]).
//!
//! Not here: lines that lose packets where there is no nft (`anabranch_tests::proxy`); nodes in namespaces of their own (`super::bridge`)

use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;

use anabranch_tests::process::is_root;

/// Set in the environment of a harness that is in its own namespace.
const INSIDE: &str = "ANABRANCH_JEPSEN_NAMESPACE";

/// Is this harness in a namespace of its own?
pub fn inside() -> bool {
    std::env::var_os(INSIDE).is_some()
}

/// A command in a new network namespace. Whoever is not root keeps the rights in it that making it gave.
fn unshare() -> Command {
    let mut command = Command::new("unshare");
    if !is_root() {
        command.args(["--user", "--map-current-user", "--keep-caps"]);
    }
    command.arg("--net");
    // Where `ip` and `nft` are, which not everybody's path has.
    let path = std::env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("{path}:/usr/sbin:/sbin"));
    command
}

/// A program in a namespace of its own, which knows it.
pub fn within(program: &Path) -> Command {
    let mut command = unshare();
    command
        .args(["sh", "-c", "ip link set lo up && exec \"$0\" \"$@\""])
        .arg(program)
        .env(INSIDE, "yes");
    command
}

/// Why packets cannot be dropped here.
pub fn impossible() -> Option<String> {
    static WHY: OnceLock<Option<String>> = OnceLock::new();
    WHY.get_or_init(|| {
        let script = format!("ip link set lo up && echo '{}' | nft -f -", rules(&[1], 50));
        match unshare().args(["sh", "-c", &script]).output() {
            Err(error) => Some(format!("unshare: {error}")),
            Ok(output) if output.status.success() => None,
            Ok(output) => Some(said(&output)),
        }
    })
    .clone()
}

fn said(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stderr);
    let text = text.lines().next().unwrap_or("nothing was said");
    format!("a network namespace with nft: {text}")
}

/// Goes on in a namespace of its own, if there can be one: then this never returns.
pub fn enter() {
    if inside() || impossible().is_some() {
        return;
    }
    let Ok(program) = std::env::current_exe() else {
        return;
    };
    let error = within(&program).args(std::env::args_os().skip(1)).exec();
    eprintln!("no network namespace: {error}");
}

/// Each packet of these lines is lost with so many chances of a hundred, in both directions, from now on.
pub fn lose(ports: &[u16], percent: u8) -> Result<(), String> {
    nft(&rules(ports, percent)).map(drop)
}

/// Has nft do it, all or nothing; what it says.
pub(super) fn nft(script: &str) -> Result<String, String> {
    let mut nft = Command::new("nft")
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| format!("nft: {error}"))?;
    if let Some(mut to) = nft.stdin.take() {
        to.write_all(script.as_bytes())
            .map_err(|error| format!("nft: {error}"))?;
    }
    let output = nft.wait_with_output().map_err(|error| format!("nft: {error}"))?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        Err(said(&output))
    }
}

/// All packets go through again, whether any were lost or not.
pub fn pass() -> Result<(), String> {
    nft(NO_RULES).map(drop)
}

/// No table, whether there is one or not: what is not there cannot be deleted.
const NO_RULES: &str = "table inet jepsen { }\ndelete table inet jepsen\n";

/// The table, made anew.
fn rules(ports: &[u16], percent: u8) -> String {
    let ports: Vec<String> = ports.iter().map(ToString::to_string).collect();
    let chance = match percent {
        100.. => String::new(),
        some => format!("numgen random mod 100 < {some} "),
    };
    format!(
        "{NO_RULES}table inet jepsen {{\n\
         set lines {{ type inet_service; elements = {{ {} }} }}\n\
         chain lines {{ type filter hook input priority 0; policy accept;\n\
         tcp dport @lines {chance}drop\ntcp sport @lines {chance}drop\n}}\n}}\n",
        ports.join(", ")
    )
}
