//! Packets that are lost: dropped by nft, in a network namespace of the harness's own, so that nobody else's are.
//!
//! The harness starts itself anew in a namespace ([`enter`]) where a nemesis asks for it; servers, daemons and proxies are its children, so
//! they are in it, too. Each line has a port of its own (its proxy's), by which its packets are known, whoever dialled.
//!
//! Not here: lines that lose packets where there is no nft (`anabranch_tests::proxy`)

use std::io::Write;
use std::os::unix::process::CommandExt;
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
    let script = "ip link set lo up && exec \"$0\" \"$@\"";
    let error = unshare()
        .args(["sh", "-c", script])
        .arg(program)
        .args(std::env::args_os().skip(1))
        .env(INSIDE, "yes")
        .exec();
    eprintln!("no network namespace: {error}");
}

/// Each packet of these lines is lost with so many chances of a hundred, in both directions, from now on.
pub fn lose(ports: &[u16], percent: u8) -> Result<(), String> {
    nft(&rules(ports, percent))
}

/// Has nft do it.
fn nft(script: &str) -> Result<(), String> {
    let mut nft = Command::new("nft")
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| format!("nft: {error}"))?;
    if let Some(mut to) = nft.stdin.take() {
        to.write_all(script.as_bytes())
            .map_err(|error| format!("nft: {error}"))?;
    }
    let output = nft.wait_with_output().map_err(|error| format!("nft: {error}"))?;
    if output.status.success() {
        Ok(())
    } else {
        Err(said(&output))
    }
}

/// All packets go through again, whether any were lost or not.
pub fn pass() -> Result<(), String> {
    nft(NO_RULES)
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
