//! The daemon's configuration: one TOML file, values overridable by environment, unknown keys refused.
//!
//! In:   a file, the environment            Out: [`Config`], or every fault of it at once
//! Invariants: 1. a `Config` from [`load`] passed every check of `check`. 2. no password is ever printed: `Debug` and
//! serialisation redact it.
//! Not here: whether the files and addresses named in it are really there (`crate::setup::doctor`).

mod check;
#[cfg(test)]
mod documented;
mod load;
mod policy;
mod secret;

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;

use anabranch_proto::NodeId;
use anabranch_proto::schema::name_fits;
use serde::{Deserialize, Serialize};

pub(crate) use check::{has_port, is_name};
pub use load::{ConfigError, Fault, from_toml, load};
pub use policy::{PolicyError, PolicyFile};
pub use secret::redact;

/// Everything `anabranch run` needs to know.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// This node.
    pub node: Node,
    /// The cluster it belongs to.
    pub cluster: Cluster,
    /// Its server.
    pub postgres: Postgres,
    /// Where peers reach it.
    pub listen: Listen,
    /// Certificates for mutual TLS between daemons; without them links are plaintext.
    #[serde(default)]
    pub tls: Option<Tls>,
    /// The other members that the cluster begins with, and how this node reaches members. Who is one is agreed through
    /// the stream (`crate::membership`).
    #[serde(default)]
    pub peers: Vec<Peer>,
    /// The journal's bounds.
    #[serde(default)]
    pub journal: Journal,
    /// Clock bounds.
    #[serde(default)]
    pub clock: Clock,
    /// How changes are applied.
    #[serde(default)]
    pub apply: Apply,
    /// What is kept of conflicts.
    #[serde(default)]
    pub conflict_log: ConflictLog,
    /// How ids are divided between the nodes.
    #[serde(default)]
    pub sequences: Sequences,
    /// `[ddl]`
    #[serde(default)]
    pub ddl: Ddl,
    /// The page for reviewing conflicts; off without this section.
    #[serde(default)]
    pub web: Option<Web>,
    /// Numbers for monitoring systems; off without this section.
    #[serde(default)]
    pub metrics: Option<Metrics>,
}

/// `[node]`
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Node {
    /// Name, unique in the cluster, fixed for life.
    pub name: String,
    /// Id, 1..=65535, unique in the cluster, fixed for life.
    pub id: NodeId,
    /// The daemon's own folder: journal, checkpoint, row index overflow, admin socket.
    pub data_dir: PathBuf,
}

/// `[cluster]`
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Cluster {
    /// The same text on every member; a peer with another is refused.
    pub id: String,
    /// The policy file, the same on every member; beside the configuration if the path is relative. Without one
    /// every table has last update wins.
    #[serde(default)]
    pub policy: Option<PathBuf>,
}

/// `[postgres]`
#[derive(Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Postgres {
    /// libpq connection string or URL. A password is better given by `ANABRANCH_POSTGRES_PASSWORD` or
    /// `password_file`. Several hosts are those where the node's one server may be: whichever takes writes is it.
    #[serde(serialize_with = "secret::serialize")]
    pub dsn: String,
    /// Where files are that `dsn` names relatively: beside the configuration, if it is written there; without one in the current folder.
    #[serde(skip)]
    pub dsn_folder: Option<PathBuf>,
    /// File whose first line is the password.
    #[serde(default)]
    pub password_file: Option<PathBuf>,
    /// The logical slot.
    #[serde(default = "anabranch")]
    pub slot: String,
    /// The publication.
    #[serde(default = "anabranch")]
    pub publication: String,
    /// Tables to replicate, as `schema.table` or `schema.*`, `!schema.table` to exclude; used by `anabranch init`.
    #[serde(default = "every_public_table")]
    pub tables: Vec<String>,
    /// The one server that all connections must reach, once it was chosen among the hosts.
    #[serde(skip)]
    pub pin: Option<crate::pg::Pin>,
}

impl fmt::Debug for Postgres {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Postgres")
            .field("dsn", &redact(&self.dsn))
            .field("password_file", &self.password_file)
            .field("slot", &self.slot)
            .field("publication", &self.publication)
            .field("tables", &self.tables)
            .finish()
    }
}

/// `[listen]`
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Listen {
    /// Address to listen on.
    pub address: SocketAddr,
    /// `host:port` by which the other members reach it, where that is not `address`: written down for them when the
    /// node joins.
    #[serde(default)]
    pub advertise: Option<String>,
    /// Allows plaintext links on an address that is not loopback.
    #[serde(default)]
    pub insecure: bool,
}

impl Listen {
    /// `host:port` by which the other members reach it.
    #[must_use]
    pub fn advertised(&self) -> String {
        self.advertise.clone().unwrap_or_else(|| self.address.to_string())
    }
}

/// `[tls]`
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Tls {
    /// PEM file of the certificate authority that signs every member.
    pub ca: PathBuf,
    /// PEM file of this node's certificate chain; its subject alternative names hold the node's name.
    pub cert: PathBuf,
    /// PEM file of this node's private key.
    pub key: PathBuf,
}

/// `[[peers]]`
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Peer {
    /// The peer's name.
    pub name: String,
    /// The peer's id.
    pub id: NodeId,
    /// `host:port` of its daemon.
    pub address: String,
}

/// `[journal]`
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Journal {
    /// Alarm and backpressure begin here, MiB.
    pub max_size_mib: u64,
    /// Size of one segment file, MiB.
    pub segment_mib: u64,
}

impl Default for Journal {
    fn default() -> Self {
        Self {
            max_size_mib: 16 * 1024,
            segment_mib: 64,
        }
    }
}

/// `[clock]`
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Clock {
    /// How far a commit timestamp may run ahead of what the members agree on, ms.
    pub max_drift_ms: u64,
    /// Time between clock witnesses, which are heartbeats too, ms.
    pub witness_interval_ms: u64,
}

impl Default for Clock {
    fn default() -> Self {
        Self {
            max_drift_ms: 60_000,
            witness_interval_ms: 1_000,
        }
    }
}

/// `[apply]`
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Apply {
    /// Most rows in one apply transaction of merged small transactions.
    pub batch_rows_max: usize,
    /// A lock that is not granted in this time makes the batch start again, ms.
    pub lock_timeout_ms: u64,
    /// Memory for the row index before it overflows to disk, MiB.
    pub index_memory_mib: usize,
    /// How often quarantined rows are tried again, ms.
    pub quarantine_retry_ms: u64,
}

impl Default for Apply {
    fn default() -> Self {
        Self {
            batch_rows_max: 4_000,
            lock_timeout_ms: 500,
            index_memory_mib: 48,
            quarantine_retry_ms: 10_000,
        }
    }
}

/// `[conflict_log]`
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct ConflictLog {
    /// How long lines are kept, days; a line goes with its whole week.
    pub retention_days: u32,
    /// Columns that are not written to the log, as `schema.table.column`; `*` for anything in the first two.
    pub redact: Vec<String>,
    /// Lines written in the long run, per second; what comes faster is counted. 0 for no limit.
    pub lines_per_second: u32,
    /// Lines written at once, however fast they come, before the limit holds.
    pub burst_lines: u32,
}

impl Default for ConflictLog {
    fn default() -> Self {
        Self {
            retention_days: 90,
            redact: Vec::new(),
            lines_per_second: 2_000,
            burst_lines: 100_000,
        }
    }
}

impl ConflictLog {
    /// Columns of a table that are not written to the log. A partition is a table of its own.
    pub fn redacted<'a>(&'a self, schema: &str, table: &str) -> impl Iterator<Item = &'a str> {
        let entries = self.redact.iter();
        entries.filter_map(move |entry| Self::column_of(entry, schema, table))
    }

    /// The column that one of [`Self::redact`] names, if it is of this table.
    pub(crate) fn column_of<'a>(entry: &'a str, schema: &str, table: &str) -> Option<&'a str> {
        let mut parts = entry.splitn(3, '.');
        let (of_schema, of_table, column) = (parts.next()?, parts.next()?, parts.next()?);
        (name_fits(of_schema, schema) && name_fits(of_table, table)).then_some(column)
    }
}

/// `[sequences]`
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Sequences {
    /// How ids are kept apart, where no rule says otherwise.
    pub method: Method,
    /// INCREMENT BY of every interleaved sequence, the same at every node: there is room for nodes with ids up to this.
    pub increment: u32,
    /// Values of each node's range, where the method is `range`; the same at every node.
    pub range_size: u64,
    /// `[[sequences.rule]]`: columns for which another method holds.
    pub rule: Vec<SequenceRule>,
}

/// How the ids of a column are kept apart from other nodes'.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// Each node hands out every so-manieth value.
    Interleave,
    /// Each node has a range of its own.
    Range,
    /// Milliseconds, node and counter, by a function (`crate::setup::snowflake`).
    Snowflake,
}

impl Method {
    /// As in the configuration, and in `anabranch.sequence`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Interleave => "interleave",
            Self::Range => "range",
            Self::Snowflake => "snowflake",
        }
    }

    /// The method of that name.
    #[must_use]
    pub fn of(name: &str) -> Option<Self> {
        [Self::Interleave, Self::Range, Self::Snowflake]
            .into_iter()
            .find(|method| method.name() == name)
    }
}

/// One of `[[sequences.rule]]`
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct SequenceRule {
    /// `schema.table.column`, as the catalog has the names.
    pub column: String,
    /// Its method.
    pub method: Method,
    /// Values of each node's range of it, instead of `sequences.range_size`.
    #[serde(default)]
    pub range_size: Option<u64>,
}

impl Sequences {
    /// The method that holds for a column, as `schema.table.column`.
    #[must_use]
    pub fn method_of(&self, column: &str) -> Method {
        let rule = self.rule.iter().find(|rule| rule.column == column);
        rule.map_or(self.method, |rule| rule.method)
    }

    /// Values of each node's range of a column, as `schema.table.column`.
    #[must_use]
    pub fn range_size_of(&self, column: &str) -> u64 {
        let rule = self.rule.iter().find(|rule| rule.column == column);
        rule.and_then(|rule| rule.range_size).unwrap_or(self.range_size)
    }
}

impl Default for Sequences {
    fn default() -> Self {
        Self {
            method: Method::Interleave,
            increment: 16,
            range_size: 1 << 40,
            rule: Vec::new(),
        }
    }
}

/// `[ddl]`
#[derive(Debug, Clone, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Ddl {
    /// Roles whose DDL travels: what is run as one of them by `anabranch ddl` or `anabranch.replicate_ddl` at any node is run
    /// as the same role here. They own the replicated tables. Superusers are refused.
    pub roles: Vec<String>,
    /// Is plain DDL that one of these roles runs here taken for such, by event triggers that `anabranch init` makes?
    pub capture: bool,
    /// What becomes of rows with columns that their table here does not have.
    pub missing_columns: MissingColumns,
}

/// What becomes of a row with a column that its table here has no more, or not yet.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum MissingColumns {
    /// It is held in `anabranch.quarantine` until the table has the column, or the row comes without it.
    #[default]
    Hold,
    /// It is written without the column. The value is in the conflict log alone.
    Drop,
}

/// `[web]`
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Web {
    /// Where the page is served.
    pub listen: SocketAddr,
    /// File whose first line is the token that lets a reviewer in; not needed where certificates do (`web.tls.client_ca`).
    pub token_file: Option<PathBuf>,
    /// Allows an address that is not loopback in plain HTTP.
    #[serde(default)]
    pub insecure: bool,
    /// The page is served by HTTPS.
    pub tls: Option<WebTls>,
}

/// `[web.tls]`; the files are read when the daemon starts.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct WebTls {
    /// The page's certificate, with those between it and its authority, in PEM form.
    pub cert: PathBuf,
    /// Its private key, in PEM form.
    pub key: PathBuf,
    /// Authorities of reviewers' certificates, in PEM form: without one of them nothing is shown, and the name in it is the reviewer's.
    pub client_ca: Option<PathBuf>,
}

/// `[metrics]`
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Metrics {
    /// Where `/metrics` is served, in plain HTTP.
    pub listen: SocketAddr,
    /// Allows an address that is not loopback. There are no rows in it, but names of nodes and tables, and how much is written.
    #[serde(default)]
    pub insecure: bool,
}

fn anabranch() -> String {
    "anabranch".to_owned()
}

fn every_public_table() -> Vec<String> {
    vec!["public.*".to_owned()]
}

impl Config {
    /// A configuration with every key present: what the known keys and their types are taken from, and an example.
    #[must_use]
    pub fn example() -> Self {
        Self {
            node: Node {
                name: "alpha".to_owned(),
                id: NodeId(1),
                data_dir: PathBuf::from("/var/lib/anabranch"),
            },
            cluster: Cluster {
                id: "shop".to_owned(),
                policy: Some(PathBuf::from("/etc/anabranch/policy.toml")),
            },
            postgres: Postgres {
                dsn: "host=/var/run/postgresql dbname=shop user=anabranch".to_owned(),
                dsn_folder: None,
                password_file: Some(PathBuf::from("/etc/anabranch/password")),
                slot: anabranch(),
                publication: anabranch(),
                tables: every_public_table(),
                pin: None,
            },
            listen: Listen {
                address: SocketAddr::from(([10, 0, 0, 1], 7432)),
                advertise: Some("alpha.example.com:7432".to_owned()),
                insecure: false,
            },
            tls: Some(Tls {
                ca: PathBuf::from("/etc/anabranch/ca.pem"),
                cert: PathBuf::from("/etc/anabranch/alpha.pem"),
                key: PathBuf::from("/etc/anabranch/alpha.key"),
            }),
            peers: vec![Peer {
                name: "beta".to_owned(),
                id: NodeId(2),
                address: "10.0.0.2:7432".to_owned(),
            }],
            journal: Journal::default(),
            clock: Clock::default(),
            apply: Apply::default(),
            conflict_log: ConflictLog {
                redact: vec!["public.customer.email".to_owned()],
                ..ConflictLog::default()
            },
            sequences: Sequences {
                rule: vec![SequenceRule {
                    column: "public.orders.id".to_owned(),
                    method: Method::Range,
                    range_size: Some(1_000_000_000),
                }],
                ..Sequences::default()
            },
            ddl: Ddl {
                roles: vec!["shop_owner".to_owned()],
                capture: false,
                missing_columns: MissingColumns::Drop,
            },
            web: Some(Web {
                listen: SocketAddr::from(([127, 0, 0, 1], 7480)),
                token_file: Some(PathBuf::from("/etc/anabranch/web-token")),
                insecure: false,
                tls: Some(WebTls {
                    cert: PathBuf::from("/etc/anabranch/web.pem"),
                    key: PathBuf::from("/etc/anabranch/web.key"),
                    client_ca: Some(PathBuf::from("/etc/anabranch/reviewers.pem")),
                }),
            }),
            metrics: Some(Metrics {
                listen: SocketAddr::from(([127, 0, 0, 1], 9747)),
                insecure: false,
            }),
        }
    }
}
