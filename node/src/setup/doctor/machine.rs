//! What this machine must have for a running daemon: its folder, port and certificates; and whether the peers are reached from it.
//!
//! In:   the configuration            Out: [`Finding`]s
//! Not here: the database ([`super::catalog`])

use std::io::Write;
use std::net::TcpListener;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::time::Duration;

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

pub(super) fn data_dir(config: &Config) -> Vec<Finding> {
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
        Ok(space) => {
            let free = space.f_bavail.saturating_mul(space.f_frsize);
            let wanted = config.journal.max_size_mib << 20;
            let found = format!(
                "{} MiB free, the journal may take {}",
                free >> 20,
                config.journal.max_size_mib
            );
            out.push(match free {
                free if free < FREE_MIN => {
                    Finding::fail("disk space", found, "make room: the journal is about to stall")
                }
                free if free < wanted => Finding::warn(
                    "disk space",
                    found,
                    "lower journal.max_size_mib, or give the folder a larger disk",
                ),
                _ => Finding::ok("disk space", found),
            });
        }
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
