//! What ended by itself, and what may not be started again.

use std::collections::BTreeSet;
use std::time::Duration;

use anabranch_tests::cluster::Cluster;
use anabranch_tests::postgres::tail;

use super::Part;
use crate::history::Death;

/// What became of the nodes.
#[derive(Debug, Default)]
pub struct Toll {
    /// Do daemons belong to the system?
    pub daemons: bool,
    /// Nodes that are lost for good.
    pub lost: BTreeSet<usize>,
    /// Who may end by itself now, and why.
    pub excused: Vec<(usize, Part, String)>,
    /// What should not have happened.
    pub notes: Vec<String>,
}

impl Toll {
    /// Finds what ended by itself. It is not started again by this.
    pub fn watch(&self, cluster: &mut Cluster, at_us: i64) -> Vec<Death> {
        let mut deaths = Vec::new();
        for (at, node) in cluster.nodes.iter_mut().enumerate() {
            let excuse = |part: Part| {
                let found = self
                    .excused
                    .iter()
                    .find(|(node, which, _)| *node == at && *which == part);
                found.map(|(_, _, why)| why.clone())
            };
            let death = |part: Part, status: String, log: String| Death {
                at_us,
                node: u16::try_from(at + 1).unwrap_or(0),
                what: part.to_string(),
                how: status,
                excuse: excuse(part),
                words: tail(&log, 3),
            };
            if self.daemons
                && let Some(status) = node.daemon.wait_exit(Duration::ZERO)
            {
                deaths.push(death(Part::Daemon, status.to_string(), node.daemon.log()));
            }
            if let Some(status) = node.server.ended() {
                deaths.push(death(Part::Server, status.to_string(), node.server.log()));
            }
        }
        deaths
    }

    /// Starts whatever does not run and is not lost, as a supervisor would.
    pub async fn revive(&self, cluster: &mut Cluster) {
        for (at, node) in cluster.nodes.iter_mut().enumerate() {
            if self.lost.contains(&at) {
                continue;
            }
            if !node.server.runs() {
                node.server.start().await;
            }
            if self.daemons && !node.daemon.started() {
                node.daemon.start();
            }
        }
    }
}
