//! The lines between nodes: between daemons, or, for a system without daemons, between servers.
//!
//! Each is a proxy of one direction of dialling ([`Proxy`]). Servers of other systems listen on TCP for this, and subscribe through it.

use anabranch_tests::cluster::Cluster;
use anabranch_tests::postgres::DATABASE;
use anabranch_tests::proxy::{Mode, Proxy};

use super::packets;

/// The superuser's password over TCP.
const PASSWORD: &str = "jepsen";

/// The lines.
#[derive(Default)]
pub struct Lines {
    /// Between servers; none where the cluster's own, between daemons, are meant.
    servers: Vec<Vec<Option<Proxy>>>,
}

impl Lines {
    /// Between the servers of a running cluster, which listen on TCP.
    pub async fn between_servers(cluster: &Cluster) -> Self {
        let all = cluster.all();
        for &node in &all {
            let sql = format!("alter role postgres password '{PASSWORD}'");
            cluster.admin(node).await.run(&sql).await;
        }
        let proxy = |to: usize| Proxy::to(([127, 0, 0, 1], cluster.nodes[to].server.port()).into());
        let of = |from: usize| all.iter().map(|&to| (from != to).then(|| proxy(to))).collect();
        Self {
            servers: all.iter().map(|&from| of(from)).collect(),
        }
    }

    /// What a server at one end has to dial to reach the other end's.
    pub fn dsn(&self, cluster: &Cluster, from: usize, to: usize) -> String {
        match self.line(cluster, from, to) {
            Some(line) => format!(
                "host=127.0.0.1 port={} user=postgres password={PASSWORD} dbname={DATABASE}",
                line.address().port()
            ),
            None => cluster.nodes[to].server.dsn("postgres", DATABASE),
        }
    }

    /// The line over which `from` dials `to`; none from a node to itself.
    pub fn line<'a>(&'a self, cluster: &'a Cluster, from: usize, to: usize) -> Option<&'a Proxy> {
        if from == to {
            None
        } else if self.servers.is_empty() {
            Some(cluster.line(from, to))
        } else {
            self.servers.get(from)?.get(to)?.as_ref()
        }
    }

    /// Sets one line.
    pub fn set_one(&self, cluster: &Cluster, from: usize, to: usize, mode: Mode) {
        if let Some(line) = self.line(cluster, from, to) {
            line.set(mode);
        }
    }

    /// Sets the lines between two groups.
    pub fn set(&self, cluster: &Cluster, a: &[usize], b: &[usize], mode: Mode) {
        for &a in a {
            for &b in b {
                self.set_one(cluster, a, b, mode);
                self.set_one(cluster, b, a, mode);
            }
        }
    }

    /// All work again, or why some do not.
    pub fn heal(&self, cluster: &Cluster) -> Result<(), String> {
        self.set(cluster, &cluster.all(), &cluster.all(), Mode::Pass);
        if packets::inside() {
            packets::pass()?;
        }
        Ok(())
    }

    /// The lines of a node, or all, lose so many packets of a hundred; says how that is done here.
    pub fn lose(&self, cluster: &Cluster, node: Option<usize>, percent: u8) -> Result<String, String> {
        let all = cluster.all();
        let ends = node.map_or_else(|| all.clone(), |node| vec![node]);
        if !packets::inside() {
            self.set(cluster, &ends, &all, by_proxy(percent));
            let why = packets::impossible().unwrap_or_else(|| "not in a namespace".to_owned());
            return Ok(format!("by the proxies: {why}"));
        }
        let mut ports = Vec::new();
        for &a in &ends {
            for &b in &all {
                let both = [self.line(cluster, a, b), self.line(cluster, b, a)];
                ports.extend(both.into_iter().flatten().map(|line| line.address().port()));
            }
        }
        ports.sort_unstable();
        ports.dedup();
        packets::lose(&ports, percent)?;
        Ok("packets are dropped by nft".to_owned())
    }
}

/// A line of proxies that loses so many packets of a hundred.
pub fn by_proxy(percent: u8) -> Mode {
    match percent {
        100.. => Mode::Stall,
        some => Mode::Lossy(some),
    }
}
