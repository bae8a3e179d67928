//! Which system is on trial: Anabranch, or one that it can be compared with, under the same load, faults and questions.
//!
//! `native`: PostgreSQL 16 and later, a subscription with `origin = none` from each node to each other. `pglogical`: Debian's
//! pglogical 2 on PostgreSQL 15, the same, the row with the last commit timestamp kept. Conflicts are left as each does them.

use std::path::{Path, PathBuf};

use anabranch_tests::cluster::{Builder, Cluster};
use anabranch_tests::pglogical::until_replicating;
use anabranch_tests::postgres::DATABASE;
use anabranch_tests::session::Session;
use clap::ValueEnum;

use crate::nemesis::Lines;

/// A system.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum System {
    /// This project's.
    Anabranch,
    /// PostgreSQL's own logical replication, `origin = none` in all directions.
    Native,
    /// pglogical 2, `forward_origins = {}` in all directions, `last_update_wins`.
    Pglogical,
}

impl System {
    /// As on the command line and in files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Anabranch => "anabranch",
            Self::Native => "native",
            Self::Pglogical => "pglogical",
        }
    }

    /// The system of a name, if there is one; histories of the first version name none.
    pub fn named(name: &str) -> Option<Self> {
        match name {
            "" | "anabranch" => Some(Self::Anabranch),
            "native" => Some(Self::Native),
            "pglogical" => Some(Self::Pglogical),
            _ => None,
        }
    }

    /// Versions of the servers unless the command line says otherwise.
    pub fn servers(self) -> Vec<u32> {
        match self {
            Self::Anabranch | Self::Pglogical => vec![15; 3],
            Self::Native => vec![18; 3],
        }
    }

    /// Why it cannot run on these servers or under this nemesis; `None` when it can.
    pub fn impossible(self, servers: &[u32], nemesis: &str) -> Option<String> {
        let of_daemons = ["power", "slot", "heal", "loss"];
        if self != Self::Anabranch && of_daemons.contains(&nemesis) {
            return Some(format!(
                "`{nemesis}` is done to daemons and members, which {} has not",
                self.name()
            ));
        }
        let absent = servers.iter().find(|&&version| !is_here(version));
        let absent = absent.map(|version| format!("PostgreSQL {version} is not here: run scripts/setup.sh"));
        match self {
            Self::Native if servers.iter().any(|&version| version < 16) => {
                Some("`origin = none` begins with PostgreSQL 16".to_owned())
            }
            Self::Pglogical if servers.iter().any(|&version| version != 15) => {
                Some("Debian has pglogical for PostgreSQL 15 only".to_owned())
            }
            Self::Pglogical if !std::path::Path::new("/usr/lib/postgresql/15/lib/pglogical.so").exists() => {
                Some("postgresql-15-pglogical is not installed".to_owned())
            }
            _ => absent,
        }
    }

    /// Settings of its servers.
    pub fn configured(self, mut builder: Builder, nodes: usize) -> Builder {
        let lines: &[&str] = match self {
            Self::Anabranch => return builder,
            Self::Native => &[
                "track_commit_timestamp = on",
                "wal_retrieve_retry_interval = 500",
                "wal_receiver_timeout = 10s",
                "wal_sender_timeout = 10s",
            ],
            Self::Pglogical => &[
                "shared_preload_libraries = 'pglogical'",
                "track_commit_timestamp = on",
                "pglogical.conflict_resolution = 'last_update_wins'",
                "max_worker_processes = 30",
                "wal_receiver_timeout = 10s",
                "wal_sender_timeout = 10s",
            ],
        };
        for node in 0..nodes {
            // Lines between nodes can be broken, those over sockets could not.
            builder = builder.tcp(node);
            for line in lines {
                builder = builder.conf(node, line);
            }
        }
        builder.bare()
    }

    /// Sets replication up, from each node to each other; nothing to do for Anabranch, whose daemons do it.
    pub async fn replicate(self, cluster: &Cluster, lines: &Lines) {
        match self {
            Self::Anabranch => {}
            Self::Native => native(cluster, lines).await,
            Self::Pglogical => pglogical(cluster, lines).await,
        }
    }
}

/// Are the programs of this version there, where `scripts/setup.sh` puts them?
pub fn is_here(version: u32) -> bool {
    let dir = match version {
        16..=18 => Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../.cache/pg{version}/bin")),
        _ => PathBuf::from(format!("/usr/lib/postgresql/{version}/bin")),
    };
    dir.join("postgres").exists()
}

async fn native(cluster: &Cluster, lines: &Lines) {
    for node in cluster.all() {
        let admin = cluster.admin(node).await;
        admin
            .run("create publication everything for tables in schema public")
            .await;
    }
    each_line(cluster, lines, async |admin, name, dsn| {
        admin
            .run(&format!(
                "create subscription {name} connection '{dsn}' publication everything \
                 with (copy_data = false, origin = none)"
            ))
            .await;
    })
    .await;
}

/// Calls `subscribe` for every ordered pair of nodes: a session at the receiving one, the line's name, where from.
async fn each_line(cluster: &Cluster, lines: &Lines, subscribe: impl AsyncFn(&Session, &str, &str)) {
    for to in cluster.all() {
        let admin = cluster.admin(to).await;
        for from in cluster.all().into_iter().filter(|&from| from != to) {
            let dsn = lines.dsn(cluster, to, from);
            subscribe(&admin, &format!("n{}_to_n{}", from + 1, to + 1), &dsn).await;
        }
    }
}

async fn pglogical(cluster: &Cluster, lines: &Lines) {
    for node in cluster.all() {
        let admin = cluster.admin(node).await;
        let dsn = cluster.nodes[node].server.dsn("postgres", DATABASE);
        admin.run("create extension pglogical").await;
        admin
            .run(&format!("select pglogical.create_node('n{}', '{dsn}')", node + 1))
            .await;
        admin
            .run("select pglogical.replication_set_add_all_tables('default', '{public}')")
            .await;
    }
    each_line(cluster, lines, async |admin, name, dsn| {
        admin
            .run(&format!(
                "select pglogical.create_subscription('{name}', '{dsn}', synchronize_structure := false, \
                 synchronize_data := false, forward_origins := '{{}}')"
            ))
            .await;
        until_replicating(admin, name).await;
    })
    .await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_system_runs_on_a_version_that_is_not_here() {
        assert!(!is_here(99));
        let why = |system: System, servers: &[u32]| system.impossible(servers, "none").unwrap_or_default();
        assert!(why(System::Anabranch, &[99, 15]).contains("99 is not here"));
        assert!(why(System::Native, &[99]).contains("99 is not here"));
        assert!(why(System::Native, &[15]).contains("begins with"));
    }
}
