//! What this machine must have for a running daemon: its folder, port and certificates; and whether the peers are reached from it.
//!
//! In:   the configuration            Out: [`Finding`]s
//! Not here: the database ([`super::catalog`])

use std::collections::BTreeSet;
use std::io::Write;
use std::net::TcpListener;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::time::Duration;

use super::super::facts::Facts;
use super::super::finding::Finding;
use super::clock_finding;
use crate::config::{Config, Tls};
use crate::small_file::{MODE_FILE, open_to};
use crate::status::Status;

/// A peer that does not answer in this time is out of reach.
const REACH_TIMEOUT: Duration = Duration::from_secs(3);
/// Below this the journal cannot hold even a short outage, bytes.
const FREE_MIN: u64 = 256 << 20;

/// The folder holds rows of all replicated tables, old values and redacted ones among them.
fn privacy(dir: &Path) -> Option<Finding> {
    let who = open_to(dir).ok().flatten()?;
    let found = format!(
        "{who} may look into {}, which holds rows of all replicated tables",
        dir.display()
    );
    let remedy = format!("chmod 700 {}", dir.display());
    let check = "node.data_dir";
    Some(match who {
        "everybody" => Finding::fail(check, found, remedy),
        _ => Finding::warn(check, found, remedy),
    })
}

/// Files of a folder, bytes.
fn bytes_in(dir: &Path) -> u64 {
    let files = std::fs::read_dir(dir).into_iter().flatten().flatten();
    files
        .filter_map(|file| file.metadata().ok())
        .map(|file| file.len())
        .sum()
}

/// How many members are waited for before the journal lets anything go; those of the configuration where the database does not say.
fn members(config: &Config, facts: Option<&Facts>) -> u64 {
    let said = facts.map_or(&[][..], |facts| &facts.ours.members);
    let has = |node: i32, fact: &str| said.iter().any(|(id, said)| (*id, said.as_str()) == (node, fact));
    let live: BTreeSet<i32> = said
        .iter()
        .filter(|(_, fact)| matches!(fact.as_str(), "founder" | "joined"))
        .map(|(node, _)| *node)
        .filter(|&node| !has(node, "dropped"))
        .collect();
    let count = if live.is_empty() {
        config.peers.len() + 1
    } else {
        live.len()
    };
    count as u64
}

/// WAL that the slot keeps, bytes.
fn kept(facts: &Facts) -> u64 {
    let slot = facts.ours.slot.as_ref();
    slot.map_or(0, |slot| u64::try_from(slot.retained_bytes).unwrap_or(0))
}

/// The disk that the journal is on, and what may come onto it. In bytes.
#[derive(Debug, Clone, Copy)]
struct Disk {
    free: u64,
    /// Taken by the journal already.
    taken: u64,
    /// `journal.max_size_mib`, which holds for what this node writes itself.
    limit: u64,
    /// This node among them.
    members: u64,
    /// WAL of the slot: a daemon that is started takes it in, also past the limit.
    kept: u64,
}

impl Disk {
    fn judge(self) -> Finding {
        let check = "disk space";
        // What others wrote is taken in past the limit, as far as theirs let them write (`docs/design.md`, section 4).
        let most = self.limit.saturating_mul(self.members).saturating_add(self.kept);
        let room = self.free.saturating_add(self.taken);
        let mib = |bytes: u64| bytes >> 20;
        let found = format!(
            "{} MiB free, the journal has {}; it may take {} while a member is away, and {} if all {} are apart until each has written \
             as much",
            mib(self.free),
            mib(self.taken),
            mib(self.limit),
            mib(most),
            self.members
        );
        if self.free < FREE_MIN {
            Finding::fail(check, found, "make room: the journal is about to stall")
        } else if room < self.limit.saturating_add(self.kept) {
            let remedy = "lower journal.max_size_mib, or give the folder a larger disk";
            Finding::warn(check, found, remedy)
        } else if room < most {
            let remedy = "give the folder a larger disk, or lower journal.max_size_mib at all members, if they may be apart for that long";
            Finding::warn(check, found, remedy)
        } else {
            Finding::ok(check, found)
        }
    }
}

pub(super) fn data_dir(config: &Config, facts: Option<&Facts>) -> Vec<Finding> {
    let dir = &config.node.data_dir;
    let check = "node.data_dir";
    let shown = dir.display().to_string();
    if !dir.is_dir() {
        let makes = dir.parent().is_some_and(Path::is_dir);
        return vec![if makes {
            Finding::ok(check, format!("{shown} does not exist yet; the daemon makes it"))
        } else {
            let remedy = format!("mkdir -p -m 700 {shown}, owned by the daemon's user");
            Finding::fail(
                check,
                format!("{shown} does not exist, nor does the folder above it"),
                remedy,
            )
        }];
    }
    let probe = dir.join(".doctor");
    let mut options = std::fs::OpenOptions::new();
    let written = options
        .write(true)
        .create(true)
        .truncate(true)
        .mode(MODE_FILE)
        .open(&probe)
        .and_then(|mut file| file.write_all(b"x").and_then(|()| file.sync_all()));
    let _ = std::fs::remove_file(&probe);
    let mut out = vec![match written {
        Ok(()) => Finding::ok(check, format!("{shown} is writable")),
        Err(error) => Finding::fail(
            check,
            format!("{shown} is not writable: {error}"),
            "chown it to the user that runs the daemon, and run doctor as that user",
        ),
    }];
    out.extend(privacy(dir));
    match rustix::fs::statvfs(dir) {
        Err(error) => out.push(Finding::warn("disk space", error.to_string(), "")),
        Ok(space) => out.push(
            Disk {
                free: space.f_bavail.saturating_mul(space.f_frsize),
                taken: bytes_in(&dir.join("journal")),
                limit: config.journal.max_size_mib << 20,
                members: members(config, facts),
                kept: facts.map_or(0, kept),
            }
            .judge(),
        ),
    }
    out
}

pub(super) fn listen(config: &Config, daemon_runs: bool) -> Finding {
    let address = config.listen.address;
    match TcpListener::bind(address) {
        Ok(_) => Finding::ok("listen.address", format!("{address} is free")),
        Err(error) if error.kind() == std::io::ErrorKind::AddrInUse && daemon_runs => {
            Finding::ok("listen.address", format!("{address}, in use by the daemon"))
        }
        Err(error) => Finding::fail(
            "listen.address",
            format!("cannot listen on {address}: {error}"),
            "choose an address of this machine and a free port",
        ),
    }
}

/// Files readable, certificate and key of one pair.
pub(super) fn tls(tls: &Tls) -> Finding {
    match load_tls(tls) {
        Ok(chain_len) => Finding::ok(
            "tls",
            format!("certificate (chain of {chain_len}) and key belong together"),
        ),
        Err(reason) => Finding::fail(
            "tls",
            reason,
            "put tls.ca, tls.cert and tls.key right; all three are PEM files",
        ),
    }
}

fn load_tls(tls: &Tls) -> Result<usize, String> {
    let read =
        |path: &Path| std::fs::read(path).map_err(|error| format!("cannot read {}: {error}", path.display()));
    let certs = |path: &Path| -> Result<Vec<_>, String> {
        let bytes = read(path)?;
        let found: Result<Vec<_>, _> = rustls_pemfile::certs(&mut bytes.as_slice()).collect();
        let found = found.map_err(|error| format!("{}: {error}", path.display()))?;
        if found.is_empty() {
            Err(format!("{} holds no certificate", path.display()))
        } else {
            Ok(found)
        }
    };
    certs(&tls.ca)?;
    let chain_certs = certs(&tls.cert)?;
    let chain_len = chain_certs.len();
    let key = read(&tls.key)?;
    let key = rustls_pemfile::private_key(&mut key.as_slice())
        .map_err(|error| format!("{}: {error}", tls.key.display()))?
        .ok_or_else(|| format!("{} holds no private key", tls.key.display()))?;
    let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
    rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .with_no_client_auth()
        .with_single_cert(chain_certs, key)
        .map_err(|error| format!("{} and {}: {error}", tls.cert.display(), tls.key.display()))?;
    Ok(chain_len)
}

pub(super) async fn peers(config: &Config, daemon: Option<&Status>) -> Vec<Finding> {
    let mut out = Vec::new();
    for peer in &config.peers {
        let check = format!("peer {}", peer.name);
        let seen = daemon.and_then(|status| status.peers.iter().find(|seen| seen.id == peer.id.0));
        if daemon.is_some() && seen.is_none() {
            out.push(Finding::warn(
                &check,
                "is no member any more: it was dropped",
                "take it out of `peers` in the configuration",
            ));
            continue;
        }
        let tried = tokio::time::timeout(REACH_TIMEOUT, tokio::net::TcpStream::connect(&peer.address)).await;
        out.push(match tried {
            Ok(Ok(_)) => Finding::ok(&check, format!("{} accepts connections", peer.address)),
            Ok(Err(error)) => Finding::warn(
                &check,
                format!("{}: {error}", peer.address),
                "start its daemon; open the port in firewalls between the two",
            ),
            Err(_) => Finding::warn(
                &check,
                format!("{}: no answer in {} s", peer.address, REACH_TIMEOUT.as_secs()),
                "open the port in firewalls between the two; is the machine up?",
            ),
        });
        if let Some(refusal) = seen.and_then(|seen| seen.refusal.as_ref()) {
            out.push(Finding::fail(
                &check,
                format!("refused: {refusal}"),
                "see the message",
            ));
        }
        if let Some(offset) = seen.and_then(|seen| seen.clock_offset_us) {
            out.push(clock_finding(
                &format!("clock of peer {}", peer.name),
                offset,
                config,
            ));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::super::finding::Level;
    use super::*;

    #[test]
    fn room_is_wanted_for_what_all_members_write_apart_and_for_what_the_server_has_kept() {
        const GIB: u64 = 1 << 30;
        let disk = Disk {
            free: 48 * GIB,
            taken: 0,
            limit: 16 * GIB,
            members: 3,
            kept: 0,
        };
        let level = |disk: Disk| disk.judge().level;
        assert_eq!(level(disk), Level::Ok);
        // What the journal has needs no more room.
        let (free, taken) = (20 * GIB, 28 * GIB);
        assert_eq!(level(Disk { free, taken, ..disk }), Level::Ok);
        assert_eq!(level(Disk { kept: GIB, ..disk }), Level::Warn);
        let apart = Disk {
            free: 20 * GIB,
            ..disk
        }
        .judge();
        assert_eq!(apart.level, Level::Warn);
        assert!(apart.found.contains("49152 if all 3"), "{}", apart.found);
        assert!(apart.remedy.contains("at all members"), "{}", apart.remedy);
        let away = Disk {
            free: 15 * GIB,
            ..disk
        }
        .judge();
        assert!(away.remedy.starts_with("lower"), "{}", away.remedy);
        assert_eq!(
            level(Disk {
                free: GIB >> 3,
                taken,
                ..disk
            }),
            Level::Fail
        );
    }
}
