//! Every precondition of a running daemon, as findings with remedies. Changes nothing.
//!
//! In:   the configuration            Out: [`Finding`]s, in the order in which somebody would mend them
//! Not here: whether links work (`anabranch status`), printing (the `anabranch` command)

use std::io::Write;
use std::net::TcpListener;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anabranch_conflict::policy::Policies;
use tokio_postgres::Client;

use super::error::chain;
use super::facts::{self, Facts};
use super::finding::Finding;
use super::ids;
use super::pattern::Patterns;
use super::plan::unpublished;
use super::select::{Selection, select};
use super::sequence::{self, Depth};
use super::sql::ident;
use super::table::Table;
use super::{check, connect, exclusion, grants};
use crate::admin;
use crate::config::{Config, Tls};
use crate::pg::{self, Dsn};
use crate::source::Walsender;
use crate::status::Status;

/// A peer that does not answer in this time is out of reach.
const REACH_TIMEOUT: Duration = Duration::from_secs(3);
/// Below this the journal cannot hold even a short outage, bytes.
const FREE_MIN: u64 = 256 << 20;
/// WAL kept for the slot that somebody should know of, bytes.
const RETAINED_WARN: i64 = 1 << 30;

/// Is the policy file right, and can its scripts choose at all?
fn policy(config: &Config) -> Vec<Finding> {
    let policies = match config.policies() {
        Ok(policies) => policies,
        Err(error) => {
            let remedy = "mend it: `anabranch policy check`";
            return vec![Finding::fail("policy", error.to_string(), remedy)];
        }
    };
    let found = format!("{} rule(s), hash {}", policies.rules().len(), policies.hash());
    let mut out = vec![Finding::ok("policy", found)];
    for script in policies.scripts() {
        let trial = script.trial();
        if let Some(first) = trial.first.as_ref().filter(|_| trial.failed == trial.conflicts) {
            out.push(Finding::warn(
                "policy",
                format!(
                    "{script} failed in all of {} conflicts that were made up, first with: {first}",
                    trial.conflicts
                ),
                "where it fails the last update wins; try it with real columns: `anabranch policy test`",
            ));
        }
    }
    out
}

/// Looks at everything. Errors become findings, so that one fault does not hide the others.
pub async fn examine(config: &Config) -> Vec<Finding> {
    let mut out = policy(config);
    match pg::dsn(&config.postgres) {
        Err(error) => out.push(Finding::fail(
            "connection",
            chain(&error),
            "put postgres.dsn right",
        )),
        Ok(dsn) => match hosts(config, dsn, &mut out).await {
            Ok(dsn) => database(config, &dsn, &mut out).await,
            Err(finding) => out.push(finding),
        },
    }
    let daemon = running(config).await;
    out.push(match &daemon {
        Some(status) => Finding::ok(
            "daemon",
            format!("{}, since {}", status.node.state, status.node.started_at),
        ),
        None => Finding::warn(
            "daemon",
            "not running, or run by another user",
            "start it: `anabranch run`",
        ),
    });
    out.extend(data_dir(config));
    out.push(listen(config, daemon.is_some()));
    out.extend(config.tls.as_ref().map(tls));
    out.extend(peers(config, daemon.as_ref()).await);
    out
}

/// The status of the daemon of this configuration, when it runs and may be asked.
async fn running(config: &Config) -> Option<Status> {
    let text = admin::status(&config.node.data_dir.join(admin::SOCKET))
        .await
        .ok()?;
    serde_json::from_str(&text).ok()
}

/// Which of several hosts is the node's server? The rest is asked of that one.
async fn hosts(config: &Config, dsn: Dsn, out: &mut Vec<Finding>) -> Result<Dsn, Finding> {
    let (count, all) = (dsn.count(), dsn.hosts());
    match pg::settle(dsn, Some(&config.node.data_dir)).await {
        Ok(dsn) => {
            if count > 1 {
                out.push(Finding::ok(
                    "hosts",
                    format!("of {all} {} takes writes", dsn.hosts()),
                ));
            }
            Ok(dsn)
        }
        Err(error) => Err(Finding::fail(
            "hosts",
            chain(&error),
            "one of the hosts must be the server of this node, and take writes; the others are its standbys or down",
        )),
    }
}

async fn database(config: &Config, dsn: &Dsn, out: &mut Vec<Finding>) {
    let target = connect::target(dsn);
    let mut client = match super::connect(dsn).await {
        Ok(client) => client,
        Err(error) => {
            let remedy = "is the server running, does pg_hba.conf let the role in, is the password right?";
            out.push(Finding::fail("connection", error.to_string(), remedy));
            return;
        }
    };
    out.push(Finding::ok("connection", &target));
    let role = dsn.config().get_user().unwrap_or_default();
    match facts::read(
        &mut client,
        role,
        &config.postgres.slot,
        &config.postgres.publication,
    )
    .await
    {
        Err(error) => {
            let remedy = "`anabranch init`, then as a superuser the output of `anabranch grants`";
            out.push(Finding::fail("catalog", error.to_string(), remedy));
        }
        Ok(facts) => {
            judge(config, &facts, out);
            out.extend(sequences(config, &facts, &client).await);
            if let Ok(policies) = config.policies() {
                let looks = [
                    super::merged::examine(&client, &policies).await,
                    super::together::examine(&client, &policies).await,
                ];
                for look in looks {
                    out.extend(look.unwrap_or_else(|error| {
                        let said = super::describe(&error);
                        vec![Finding::fail("merged columns", said, "see the server's log")]
                    }));
                }
            }
        }
    }
    replication_role(&client, role, out).await;
    walsender(dsn, out).await;
    out.extend(clock(&client, config).await);
}

fn judge(config: &Config, facts: &Facts, out: &mut Vec<Finding>) {
    out.extend(check::server(facts));
    let patterns = match Patterns::parse(&config.postgres.tables) {
        Ok(patterns) => patterns,
        Err(error) => {
            out.push(Finding::fail(
                "postgres.tables",
                error.to_string(),
                "put the pattern right",
            ));
            return;
        }
    };
    let selection = select(facts, &patterns);
    out.extend(check::role(facts, &selection.all));
    out.extend(privileges(facts, &selection));
    out.extend(check::ownership(facts, config));
    out.extend(node(facts, config));
    out.extend(slot(facts, config));
    out.extend(publication(facts, config, &selection));
    out.extend(selection.findings.iter().cloned());
    out.extend(identities(&selection));
    out.extend(selection.all.iter().flat_map(|table| table.remarks()));
    if let Ok(policies) = config.policies() {
        out.extend(
            selection
                .all
                .iter()
                .filter_map(|table| unclaimed(table, &policies)),
        );
        out.extend(exclusion::findings(&selection, &policies));
    }
}

/// Unique values are claimed only under last update wins (`docs/design.md`, section 5).
fn unclaimed(table: &Table, policies: &Policies) -> Option<Finding> {
    let of = policies.of(&table.schema, &table.name);
    let is_claimed = of.is_last_writer();
    (table.uniques > 0 && !is_claimed).then(|| {
        Finding::warn(
            format!("table {}.{}", table.schema, table.name),
            format!(
                "has {} unique constraint(s) beside the primary key, and a policy other than last_update_wins",
                table.uniques
            ),
            "three or more concurrent writers to one value can leave different rows at different nodes; give the table the \
             policy last_update_wins, or make sure that only one node writes such a value",
        )
    })
}

/// Keys that take values from a sequence which is not divided between the nodes, as far as the catalog tells.
async fn sequences(config: &Config, facts: &Facts, client: &Client) -> Vec<Finding> {
    let Ok(patterns) = Patterns::parse(&config.postgres.tables) else {
        return Vec::new();
    };
    // What is missing there is a finding of its own already.
    if facts.ours.node.is_none() || !facts.ours.tables.iter().any(|table| table == sequence::TABLE) {
        return Vec::new();
    }
    let tables = select(facts, &patterns).all;
    match sequence::read(client, &tables, Depth::Catalog).await {
        Err(error) => vec![Finding::warn(
            "sequences",
            error.to_string(),
            "`anabranch grants`",
        )],
        Ok(all) => {
            let keys = tables.iter().flat_map(|table| {
                let columns = table.key.iter().flat_map(|key| &key.columns);
                columns.map(|column| (table.schema.as_str(), table.name.as_str(), column.name.as_str()))
            });
            ids::remarks(&all, config, &keys.collect())
        }
    }
}

fn privileges(facts: &Facts, selection: &Selection<'_>) -> Vec<Finding> {
    let missing = grants::missing(facts, &selection.all);
    let mut out: Vec<Finding> = missing
        .iter()
        .map(|grant| Finding::fail(format!("privilege {}", grant.what), "missing", &grant.give))
        .collect();
    if facts.ours.schema {
        let steps = grants::missing_in_ours(facts);
        out.extend(
            steps
                .iter()
                .map(|step| Finding::fail("privilege in schema anabranch", "missing", &step.sql)),
        );
    }
    if out.is_empty() && facts.role.oid.is_some() {
        out.push(Finding::ok(
            "privileges",
            format!("{} table(s), all that is needed", selection.all.len()),
        ));
    }
    out
}

fn node(facts: &Facts, config: &Config) -> Vec<Finding> {
    let Some(node) = &facts.ours.node else {
        return vec![Finding::fail(
            "schema anabranch",
            "this database is not set up",
            "run `anabranch init`",
        )];
    };
    let mut out = vec![Finding::ok(
        "schema anabranch",
        format!(
            "node {} ({}) of cluster {}, incarnation {}",
            node.node_id, node.name, node.cluster_id, node.incarnation
        ),
    )];
    let members = std::iter::once(config.node.id).chain(config.peers.iter().map(|peer| peer.id));
    let unknown: Vec<String> = members
        .filter(|id| {
            !facts.ours.progress.contains(&i32::from(id.0)) || !facts.ours.clock.contains(&i32::from(id.0))
        })
        .map(|id| id.to_string())
        .collect();
    if !unknown.is_empty() {
        let found = format!("no progress or clock row for node {}", unknown.join(", "));
        out.push(Finding::fail("members", found, "run `anabranch init` again"));
    }
    out
}

fn slot(facts: &Facts, config: &Config) -> Vec<Finding> {
    let check = format!("slot {}", config.postgres.slot);
    let Some(slot) = &facts.ours.slot else {
        // One that was there and is gone is a finding of `check::ownership`.
        let never = facts
            .ours
            .node
            .as_ref()
            .is_some_and(|node| node.slot_start.is_none());
        let missing = || Finding::fail(check, "does not exist", "run `anabranch init`");
        return if never { vec![missing()] } else { Vec::new() };
    };
    let active = slot.active_pid.map_or("not read".to_owned(), |pid| {
        format!("read by server process {pid}")
    });
    let found = format!(
        "{active}, wal_status {}, keeps {} MiB of WAL, confirmed {}",
        slot.wal_status,
        slot.retained_bytes >> 20,
        slot.confirmed_flush.as_deref().unwrap_or("nothing")
    );
    let keeps_much = slot.retained_bytes > RETAINED_WARN;
    vec![match slot.wal_status.as_str() {
        "lost" => return Vec::new(),
        "unreserved" => Finding::warn(
            check,
            found,
            "the server is about to remove WAL that was not read: start the daemon, raise max_slot_wal_keep_size",
        ),
        _ if keeps_much && slot.active_pid.is_none() => {
            Finding::warn(check, found, "start the daemon: WAL piles up until it reads on")
        }
        _ if keeps_much => Finding::warn(
            check,
            found,
            "the daemon is behind, or a long transaction holds it back",
        ),
        _ => Finding::ok(check, found),
    }]
}

fn publication(facts: &Facts, config: &Config, selection: &Selection<'_>) -> Vec<Finding> {
    let check = format!("publication {}", config.postgres.publication);
    let Some(publication) = &facts.ours.publication else {
        let set_up = facts.ours.node.is_some();
        let found = "does not exist; what is written now is not replicated";
        return if set_up {
            vec![Finding::fail(check, found, "run `anabranch init`")]
        } else {
            Vec::new()
        };
    };
    let mut out = Vec::new();
    if publication.via_root || !publication.all_operations {
        let found = if publication.via_root {
            "publishes via the partition root"
        } else {
            "omits some operations"
        };
        out.push(Finding::fail(
            &check,
            found,
            "run `anabranch init` to restore its options",
        ));
    }
    for table in unpublished(publication, selection) {
        out.push(Finding::fail(
            format!("table {}.{}", table.schema, table.name),
            "is not in the publication: new since `anabranch init`",
            "run `anabranch init` again, on every node, before anybody writes to it",
        ));
    }
    for table in &facts.tables {
        if publication.tables.contains(&table.oid)
            && !selection.all.iter().any(|chosen| chosen.oid == table.oid)
        {
            out.push(Finding::warn(
                format!("table {}.{}", table.schema, table.name),
                "is in the publication, but not chosen by postgres.tables",
                format!(
                    "add it to postgres.tables, or ALTER PUBLICATION {} DROP TABLE {} on every node",
                    ident(&config.postgres.publication),
                    table.sql_name()
                ),
            ));
        }
    }
    if out.is_empty() {
        out.push(Finding::ok(
            check,
            format!("{} table(s) replicated", selection.all.len()),
        ));
    }
    out
}

fn identities(selection: &Selection<'_>) -> Vec<Finding> {
    let lacking = selection
        .all
        .iter()
        .filter(|table| table.needs_full() && table.identity != "f");
    lacking
        .map(|table| {
            Finding::fail(
                format!("table {}.{}", table.schema, table.name),
                "has values that may be stored out of line, and a replica identity other than FULL: an UPDATE does not \
                 carry what it left unchanged",
                "run `anabranch init` again, which sets it",
            )
        })
        .collect()
}

/// Tried for real, since it is what every row depends on.
async fn replication_role(client: &Client, role: &str, out: &mut Vec<Finding>) {
    let tried = client
        .batch_execute("BEGIN; SET LOCAL session_replication_role = replica; ROLLBACK")
        .await;
    out.push(match tried {
        Ok(()) => Finding::ok("session_replication_role", "can be set"),
        Err(error) => {
            let _ = client.batch_execute("ROLLBACK").await;
            Finding::fail(
                "session_replication_role",
                super::describe(&error),
                format!(
                    "as a superuser: GRANT SET ON PARAMETER session_replication_role TO {}",
                    ident(role)
                ),
            )
        }
    });
}

async fn walsender(dsn: &Dsn, out: &mut Vec<Finding>) {
    let opened = async { Walsender::connect(dsn, "doctor").await?.identify().await }.await;
    out.push(match opened {
        Ok(identity) => Finding::ok(
            "replication connection",
            format!("timeline {}, WAL at {}", identity.timeline, identity.written),
        ),
        Err(error) => Finding::fail(
            "replication connection",
            chain(&error),
            "the role needs REPLICATION, the server a free walsender (max_wal_senders)",
        ),
    });
}

/// The server's clock against ours: stamps are made from the one, compared with the other.
async fn clock(client: &Client, config: &Config) -> Option<Finding> {
    let before = unix_us();
    let row = client
        .query_one(
            "SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint",
            &[],
        )
        .await
        .ok()?;
    let after = unix_us();
    let server: i64 = row.try_get(0).ok()?;
    let offset = server - i64::midpoint(before, after);
    Some(clock_finding("clock of the server", offset, config))
}

fn clock_finding(check: &str, offset_us: i64, config: &Config) -> Finding {
    #[allow(clippy::cast_precision_loss)] // for people
    let found = format!("{:+.3} s from this machine's", offset_us as f64 / 1e6);
    let remedy = "run an NTP client on every machine; the later clock wins conflicts that it should lose";
    let limit = i64::try_from(config.clock.max_drift_ms)
        .unwrap_or(i64::MAX)
        .saturating_mul(1000);
    match offset_us.abs() {
        off if off > limit => Finding::fail(check, found, remedy),
        off if off > 500_000 => Finding::warn(check, found, remedy),
        _ => Finding::ok(check, found),
    }
}

fn unix_us() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_micros()).unwrap_or(i64::MAX)
}

fn data_dir(config: &Config) -> Vec<Finding> {
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
    let written = std::fs::File::create(&probe)
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

fn listen(config: &Config, daemon_runs: bool) -> Finding {
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
fn tls(tls: &Tls) -> Finding {
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

async fn peers(config: &Config, daemon: Option<&Status>) -> Vec<Finding> {
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

/// Faults of a configuration as findings.
#[must_use]
pub fn config_findings(error: &crate::config::ConfigError) -> Vec<Finding> {
    match error {
        crate::config::ConfigError::Faults { faults, .. } => faults
            .iter()
            .map(|fault| {
                Finding::fail(
                    format!("config {}", fault.key),
                    &fault.text,
                    "change the configuration file",
                )
            })
            .collect(),
        other => vec![Finding::fail(
            "config",
            other.to_string(),
            "give the file with --config",
        )],
    }
}
