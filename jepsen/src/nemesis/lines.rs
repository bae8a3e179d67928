//! The lines between nodes: between daemons, or, for a system without daemons, between servers.
//!
//! Each is one direction of dialling. Where nodes have a network of their own, it is known by its packets ([`Bridge`]); else it is a
//! proxy ([`Proxy`]). Servers of other systems listen on TCP for this, and subscribe through it.

use std::net::SocketAddrV4;

use anabranch_tests::cluster::{Cluster, Node};
use anabranch_tests::network::Seat;
use anabranch_tests::postgres::DATABASE;
use anabranch_tests::proxy::{Mode, Proxy};

use super::bridge::Bridge;
use super::packets;

/// The superuser's password over TCP.
const PASSWORD: &str = "jepsen";

/// The lines.
pub struct Lines(Kind);

enum Kind {
    /// The cluster's own proxies, between daemons.
    Daemons,
    /// Proxies between servers.
    Servers(Vec<Vec<Option<Proxy>>>),
    /// In a network.
    Packets(Bridge),
}

impl Lines {
    /// Between the daemons of a cluster.
    pub fn between_daemons(cluster: &Cluster) -> Result<Self, String> {
        let bridge = bridge(cluster, |node| node.port)?;
        Ok(Self(bridge.map_or(Kind::Daemons, Kind::Packets)))
    }

    /// Between the servers of a running cluster, which listen on TCP.
    pub async fn between_servers(cluster: &Cluster) -> Result<Self, String> {
        let all = cluster.all();
        for &node in &all {
            let sql = format!("alter role postgres password '{PASSWORD}'");
            cluster.admin(node).await.run(&sql).await;
        }
        if let Some(bridge) = bridge(cluster, |node| node.server.port())? {
            return Ok(Self(Kind::Packets(bridge)));
        }
        let proxy = |to: usize| Proxy::to(([127, 0, 0, 1], cluster.nodes[to].server.port()).into());
        let of = |from: usize| all.iter().map(|&to| (from != to).then(|| proxy(to))).collect();
        Ok(Self(Kind::Servers(all.iter().map(|&from| of(from)).collect())))
    }

    /// What a server at one end has to dial to reach the other end's.
    pub fn dsn(&self, cluster: &Cluster, from: usize, to: usize) -> String {
        let end = match &self.0 {
            Kind::Packets(bridge) => bridge.end(to).map(Into::into),
            _ => self.proxy(cluster, from, to).map(Proxy::address),
        };
        match end {
            Some(end) if from != to => format!(
                "host={} port={} user=postgres password={PASSWORD} dbname={DATABASE}",
                end.ip(),
                end.port()
            ),
            _ => cluster.nodes[to].server.dsn("postgres", DATABASE),
        }
    }

    /// The proxy by which `from` dials `to`; none from a node to itself, and none in a network.
    fn proxy<'a>(&'a self, cluster: &'a Cluster, from: usize, to: usize) -> Option<&'a Proxy> {
        match &self.0 {
            _ if from == to => None,
            Kind::Daemons => Some(cluster.line(from, to)),
            Kind::Servers(proxies) => proxies.get(from)?.get(to)?.as_ref(),
            Kind::Packets(_) => None,
        }
    }

    /// Sets lines (who dials, who is dialled), in a network all at once. Says how that is done here, or why it cannot be.
    pub fn set_each(&mut self, cluster: &Cluster, lines: &[(usize, usize, Mode)]) -> Result<String, String> {
        if let Kind::Packets(bridge) = &mut self.0 {
            bridge.set(lines)?;
            return Ok("by nft, where packets enter the bridge".to_owned());
        }
        for &(from, to, mode) in lines {
            if let Some(proxy) = self.proxy(cluster, from, to) {
                proxy.set(mode);
            }
        }
        Ok(String::new())
    }

    /// Sets the lines between two groups.
    pub fn set(&mut self, cluster: &Cluster, a: &[usize], b: &[usize], mode: Mode) -> Result<String, String> {
        let pairs = a.iter().flat_map(|&a| b.iter().map(move |&b| (a, b)));
        let lines: Vec<_> = pairs.flat_map(|(a, b)| [(a, b, mode), (b, a, mode)]).collect();
        self.set_each(cluster, &lines)
    }

    /// All work again, or why some do not.
    pub fn heal(&mut self, cluster: &Cluster) -> Result<(), String> {
        self.set(cluster, &cluster.all(), &cluster.all(), Mode::Pass)?;
        if packets::inside() {
            packets::pass()?;
        }
        Ok(())
    }

    /// The lines of a node, or all, lose so many packets of a hundred; says how that is done here.
    pub fn lose(&mut self, cluster: &Cluster, node: Option<usize>, percent: u8) -> Result<String, String> {
        let all = cluster.all();
        let ends = node.map_or_else(|| all.clone(), |node| vec![node]);
        if matches!(self.0, Kind::Packets(_)) {
            return self.set(cluster, &ends, &all, losing(percent));
        }
        if !packets::inside() {
            self.set(cluster, &ends, &all, losing(percent))?;
            let why = packets::impossible().unwrap_or_else(|| "not in a namespace".to_owned());
            return Ok(format!("by the proxies: {why}"));
        }
        let mut ports = Vec::new();
        for &a in &ends {
            for &b in &all {
                let both = [self.proxy(cluster, a, b), self.proxy(cluster, b, a)];
                ports.extend(both.into_iter().flatten().map(|line| line.address().port()));
            }
        }
        ports.sort_unstable();
        ports.dedup();
        packets::lose(&ports, percent)?;
        Ok("packets are dropped by nft".to_owned())
    }

    /// Packets that have met what was done to lines since all worked; none where nobody counts them.
    pub fn met(&self) -> Option<Result<u64, String>> {
        match &self.0 {
            Kind::Packets(bridge) => Some(bridge.met()),
            _ => None,
        }
    }
}

/// The bridge of a cluster's network, if it has one, whose nodes are dialled at these ports.
fn bridge(cluster: &Cluster, port: impl Fn(&Node) -> u16) -> Result<Option<Bridge>, String> {
    let seats = cluster.seats();
    if seats.is_empty() {
        return Ok(None);
    }
    let ends = seats.iter().zip(&cluster.nodes);
    let ends = ends.map(|(seat, node)| SocketAddrV4::new(seat.address(), port(node)));
    Bridge::new(seats.iter().map(Seat::interface), ends.collect()).map(Some)
}

/// What a line does that loses so many packets of a hundred.
fn losing(percent: u8) -> Mode {
    match percent {
        100.. => Mode::Stall,
        some => Mode::Lossy(some),
    }
}
