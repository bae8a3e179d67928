//! Every precondition of a running daemon, as findings with remedies. Changes nothing.
//!
//! In:   the configuration            Out: [`Finding`]s, in the order in which somebody would mend them
//! Not here: whether links work (`anabranch status`), printing (the `anabranch` command)

mod catalog;
mod certificate;
mod machine;
mod sessions;

use std::time::{SystemTime, UNIX_EPOCH};

use rustls::pki_types::UnixTime;
use tokio_postgres::Client;

use super::error::chain;
use super::facts::{self, Facts};
use super::finding::Finding;
use super::sql::ident;
use super::{check, connect};
use crate::admin;
use crate::config::Config;
use crate::pg::{self, Dsn};
use crate::source::Walsender;
use crate::status::Status;

/// Is the policy file right, and can its scripts choose at all? `facts` know who is, or was, a member.
fn policy(config: &Config, facts: Option<&Facts>) -> Vec<Finding> {
    let read = match facts {
        Some(facts) => config.policies_among(&facts.ours.names),
        None => config.policies(),
    };
    let policies = match read {
        Ok(policies) => policies,
        Err(error) if facts.is_none() && error.is_of_names() => {
            let remedy = "the database, which may know them, could not be asked: mend that first";
            return vec![Finding::warn("policy", error.to_string(), remedy)];
        }
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
    let (mut found, mut facts) = (Vec::new(), None);
    match pg::dsn(&config.postgres) {
        Err(error) => found.push(Finding::fail(
            "connection",
            chain(&error),
            "put postgres.dsn right",
        )),
        Ok(dsn) => match hosts(config, dsn, &mut found).await {
            Ok(dsn) => facts = database(config, &dsn, &mut found).await,
            Err(finding) => found.push(finding),
        },
    }
    let mut out = policy(config, facts.as_ref());
    out.append(&mut found);
    let daemon = running(config).await;
    if let (Some(facts), Some(status)) = (&facts, &daemon) {
        out.extend(catalog::passed_over(facts, &status.apply.passed_over));
    }
    out.push(match &daemon {
        Some(status) => Finding::ok(
            "daemon",
            format!("{}, since {}", status.node.state, status.node.started_at),
        ),
        None => Finding::warn(
            "daemon",
            "does not answer: not running, waiting for its server, or run by another user",
            "start it: `anabranch run`",
        ),
    });
    out.extend(machine::data_dir(config, facts.as_ref()));
    out.push(machine::listen(config, daemon.is_some()));
    out.extend(check::advertised(config));
    if let Some(tls) = &config.tls {
        out.push(machine::tls(tls));
        out.extend(certificate::examine(tls, &config.node.name, UnixTime::now()));
    }
    out.extend(machine::peers(config, daemon.as_ref()).await);
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

/// What the database has; none where it cannot be read.
async fn database(config: &Config, dsn: &Dsn, out: &mut Vec<Finding>) -> Option<Facts> {
    let target = connect::target(dsn);
    let mut client = match super::connect(dsn).await {
        Ok(client) => client,
        Err(error) => {
            let said = error.to_string();
            let remedy = "is the server running, does pg_hba.conf let the role in, is the password right?";
            let remedy = sessions::refused_at_start(&said).unwrap_or(remedy);
            out.push(Finding::fail("connection", said, remedy));
            return None;
        }
    };
    out.push(Finding::ok("connection", &target));
    out.extend(sessions::own(&client, dsn).await);
    let role = dsn.config().get_user().unwrap_or_default();
    let facts = facts::read(
        &mut client,
        role,
        &config.postgres.slot,
        &config.postgres.publication,
    )
    .await;
    let policies = match &facts {
        Ok(facts) => config.policies_among(&facts.ours.names).ok(),
        Err(_) => None,
    };
    match &facts {
        Err(error) => {
            let remedy = "`anabranch init`, then as a superuser the output of `anabranch grants`";
            out.push(Finding::fail("catalog", error.to_string(), remedy));
        }
        Ok(facts) => {
            catalog::judge(config, facts, out);
            out.extend(catalog::sequences(config, facts, &client).await);
            let redacted = catalog::redacted(config, &client).await;
            out.extend(redacted.unwrap_or_else(|error| {
                vec![Finding::fail(
                    "conflict_log.redact",
                    super::describe(&error),
                    "see the server's log",
                )]
            }));
            if let Some(policies) = &policies {
                let looks = [
                    super::merged::examine(&client, policies).await,
                    super::together::look(&client, policies).await,
                    super::parents::examine(&client, policies).await,
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
    let room = sessions::room(&client, config, policies.as_ref()).await;
    out.extend(room.unwrap_or_else(|error| {
        let said = super::describe(&error);
        vec![Finding::warn("max_connections", said, "see the server's log")]
    }));
    out.extend(clock(&client, config).await);
    facts.ok()
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
