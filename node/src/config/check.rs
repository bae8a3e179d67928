//! What a configuration must fulfil beyond its types.

use std::collections::{HashMap, HashSet};

use super::{Config, Fault, Method};
use crate::admin::{self, DATA_DIR_LEN_MAX};
use crate::pg::{self, Dsn};
use crate::setup::pattern::Pattern;
use crate::setup::snowflake::MAX_NODE;

/// Everything that is wrong with `config`.
pub(super) fn faults(config: &Config) -> Vec<Fault> {
    let mut out = Vec::new();
    identity(config, &mut out);
    postgres(config, &mut out);
    members(config, &mut out);
    numbers(config, &mut out);
    sequences(config, &mut out);
    ddl(config, &mut out);
    conflict_log(config, &mut out);
    web(config, &mut out);
    metrics(config, &mut out);
    if !config.listen.address.ip().is_loopback() && config.tls.is_none() && !config.listen.insecure {
        out.push(Fault::new(
            "listen.address",
            format!(
                "{} is not loopback and there is no [tls]: links would be plaintext; add [tls], or set listen.insecure = true \
                 to accept that",
                config.listen.address
            ),
        ));
    }
    out
}

fn identity(config: &Config, out: &mut Vec<Fault>) {
    if !is_name(&config.node.name) {
        out.push(Fault::new("node.name", "use 1 to 63 letters, digits, `-` or `_`"));
    }
    if config.node.id.0 == 0 {
        out.push(Fault::new("node.id", "must be 1 to 65535"));
    }
    if !config.node.data_dir.is_absolute() {
        out.push(Fault::new("node.data_dir", "must be an absolute path"));
    }
    if !admin::fits_in(&config.node.data_dir) {
        out.push(Fault::new(
            "node.data_dir",
            format!("must have {DATA_DIR_LEN_MAX} bytes at most, since a socket is in it"),
        ));
    }
    if config.cluster.id.trim().is_empty() {
        out.push(Fault::new("cluster.id", "must not be empty"));
    }
}

fn postgres(config: &Config, out: &mut Vec<Fault>) {
    let postgres = &config.postgres;
    let folder = postgres.dsn_folder.as_deref();
    match Dsn::beside(&postgres.dsn, postgres.password_file.as_deref(), folder) {
        // Whether files can be read depends on who asks; `doctor` and every connection say so.
        Ok(_) | Err(pg::Error::File { .. } | pg::Error::BadFile { .. } | pg::Error::Tls(_)) => {}
        Err(pg::Error::Parameter { parameter, remedy, .. }) => {
            out.push(Fault::new("postgres.dsn", format!("this value of {parameter} is not supported; {remedy}")));
        }
        Err(pg::Error::NoUser) => out.push(Fault::new("postgres.dsn", "names no user; add user=...")),
        // The parser's message may repeat a piece of the text, which may be a password.
        Err(_) => out.push(Fault::new(
            "postgres.dsn",
            "is not a connection string; write `host=... port=... dbname=... user=...` or `postgresql://user@host:port/dbname`",
        )),
    }
    let slot_fits = (1..=63).contains(&postgres.slot.len())
        && postgres
            .slot
            .chars()
            .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_');
    if !slot_fits {
        out.push(Fault::new(
            "postgres.slot",
            "use 1 to 63 lower-case letters, digits or `_`",
        ));
    }
    if !(1..=63).contains(&postgres.publication.len()) {
        out.push(Fault::new("postgres.publication", "use 1 to 63 bytes"));
    }
    for pattern in &postgres.tables {
        if let Err(bad) = Pattern::parse(pattern) {
            out.push(Fault::new("postgres.tables", bad.to_string()));
        }
    }
}

/// Is this `host:port`?
pub(crate) fn has_port(address: &str) -> bool {
    address
        .rsplit_once(':')
        .is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port > 0))
}

fn members(config: &Config, out: &mut Vec<Fault>) {
    if let Some(address) = config
        .listen
        .advertise
        .as_ref()
        .filter(|address| !has_port(address))
    {
        out.push(Fault::new(
            "listen.advertise",
            format!("`{address}` is not host:port"),
        ));
    }
    let mut names = HashMap::from([(config.node.name.as_str(), "node.name".to_owned())]);
    let mut ids = HashMap::from([(config.node.id, "node.id".to_owned())]);
    for (at, peer) in config.peers.iter().enumerate() {
        if !is_name(&peer.name) {
            out.push(Fault::new(
                format!("peers[{at}].name"),
                "use 1 to 63 letters, digits, `-` or `_`",
            ));
        }
        if peer.id.0 == 0 {
            out.push(Fault::new(format!("peers[{at}].id"), "must be 1 to 65535"));
        }
        if let Some(other) = names.insert(&peer.name, format!("peers[{at}].name")) {
            out.push(Fault::new(
                format!("peers[{at}].name"),
                format!("`{}` is also {other}", peer.name),
            ));
        }
        if let Some(other) = ids.insert(peer.id, format!("peers[{at}].id")) {
            out.push(Fault::new(
                format!("peers[{at}].id"),
                format!("{} is also {other}", peer.id),
            ));
        }
        if !has_port(&peer.address) {
            out.push(Fault::new(
                format!("peers[{at}].address"),
                format!("`{}` is not host:port", peer.address),
            ));
        }
    }
}

fn numbers(config: &Config, out: &mut Vec<Fault>) {
    let mut at_least = |key: &str, value: u64, least: u64| {
        if value < least {
            out.push(Fault::new(key, format!("{value} is too small; at least {least}")));
        }
    };
    at_least("journal.segment_mib", config.journal.segment_mib, 1);
    at_least(
        "journal.max_size_mib",
        config.journal.max_size_mib,
        config.journal.segment_mib.saturating_mul(2).max(2),
    );
    at_least("clock.witness_interval_ms", config.clock.witness_interval_ms, 10);
    at_least(
        "clock.max_drift_ms",
        config.clock.max_drift_ms,
        config.clock.witness_interval_ms,
    );
    at_least("apply.batch_rows_max", config.apply.batch_rows_max as u64, 1);
    at_least("apply.lock_timeout_ms", config.apply.lock_timeout_ms, 1);
    at_least("apply.index_memory_mib", config.apply.index_memory_mib as u64, 1);
    at_least("apply.quarantine_retry_ms", config.apply.quarantine_retry_ms, 1);
    at_least("sequences.increment", u64::from(config.sequences.increment), 1);
    at_least("sequences.range_size", config.sequences.range_size, 1);
}

fn sequences(config: &Config, out: &mut Vec<Fault>) {
    let sequences = &config.sequences;
    let named = sequences.rule.iter().enumerate();
    let mut methods = vec![("sequences.method".to_owned(), sequences.method)];
    methods.extend(named.map(|(at, rule)| (format!("sequences.rule[{at}].method"), rule.method)));
    for (key, _) in methods
        .into_iter()
        .filter(|(_, method)| *method == Method::Snowflake && config.node.id.0 > MAX_NODE)
    {
        out.push(Fault::new(
            key,
            format!(
                "a snowflake id has ten bits for the node: node.id is {}, and must be at most {MAX_NODE}; use another method",
                config.node.id
            ),
        ));
    }
    let mut seen = HashSet::new();
    for (at, rule) in sequences.rule.iter().enumerate() {
        let key = || format!("sequences.rule[{at}].column");
        let name = &rule.column;
        if name.split('.').count() != 3 || name.split('.').any(str::is_empty) {
            out.push(Fault::new(key(), format!("`{name}` is not schema.table.column")));
        }
        if rule.range_size == Some(0) {
            out.push(Fault::new(
                format!("sequences.rule[{at}].range_size"),
                "must be at least 1",
            ));
        }
        if !seen.insert(name) {
            out.push(Fault::new(
                key(),
                format!("`{name}` is named by another rule, too"),
            ));
        }
    }
}

fn ddl(config: &Config, out: &mut Vec<Fault>) {
    if config.ddl.capture && config.ddl.roles.is_empty() {
        out.push(Fault::new(
            "ddl.capture",
            "there is nobody whose DDL is to be captured: name the owners of the tables in ddl.roles",
        ));
    }
}

fn conflict_log(config: &Config, out: &mut Vec<Fault>) {
    let log = &config.conflict_log;
    if log.retention_days == 0 || log.retention_days > 36_500 {
        out.push(Fault::new("conflict_log.retention_days", "must be 1 to 36500"));
    }
    for name in &log.redact {
        if name.split('.').count() != 3 || name.split('.').any(str::is_empty) {
            out.push(Fault::new(
                "conflict_log.redact",
                format!("`{name}` is not schema.table.column"),
            ));
        }
    }
}

fn web(config: &Config, out: &mut Vec<Fault>) {
    let Some(web) = &config.web else { return };
    if !web.listen.ip().is_loopback() && !web.insecure && web.tls.is_none() {
        out.push(Fault::new(
            "web.listen",
            format!(
                "{} is not loopback, and the page speaks plain HTTP: configure [web.tls], put a proxy with TLS before a loopback \
                 address, or set web.insecure = true to accept that",
                web.listen
            ),
        ));
    }
    if web.token_file.is_none() && web.tls.as_ref().is_none_or(|tls| tls.client_ca.is_none()) {
        out.push(Fault::new(
            "web.token_file",
            "nothing says who may come in: name a file with a token, or the authority of reviewers' certificates with \
             web.tls.client_ca"
                .to_owned(),
        ));
    }
}

fn metrics(config: &Config, out: &mut Vec<Fault>) {
    let Some(metrics) = &config.metrics else { return };
    if !metrics.listen.ip().is_loopback() && !metrics.insecure {
        out.push(Fault::new(
            "metrics.listen",
            format!(
                "{} is not loopback, and everybody who reaches it may read it: put a proxy before a loopback address, or set \
                 metrics.insecure = true to accept that",
                metrics.listen
            ),
        ));
    }
}

/// May a node be called so?
pub(crate) fn is_name(text: &str) -> bool {
    (1..=63).contains(&text.len())
        && text
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_')
}
