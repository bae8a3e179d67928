//! The status document.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};

use anabranch_proto::{Lsn, NodeId, Position, Vector};

use super::visible::ENDED;
use crate::admin::ConflictsProvider;
use crate::config::Config;
use crate::index;
use crate::journal::Journal;
use crate::link::Links;
use crate::names::Names;
use crate::review::cluster::{Asked, Joined};
use crate::shared::{Alarms, Shared, lock, now_us};
use crate::status::{
    Alarm, ApplyStatus, IndexStatus, JournalStatus, NodeStatus, PeerStatus, Positions, Status,
};

/// Makes status documents.
pub(super) struct Reporter {
    config: Arc<Config>,
    shared: Arc<Shared>,
    journal: Journal,
    /// Weak: who still asks when the links end shall not keep them.
    links: Weak<Links>,
    incarnation: String,
    boot_id: String,
    started_us: i64,
}

impl Reporter {
    pub(super) fn new(
        config: &Arc<Config>,
        shared: &Arc<Shared>,
        journal: &Journal,
        links: &Arc<Links>,
        incarnation: &str,
        boot_id: &str,
    ) -> Self {
        Self {
            config: Arc::clone(config),
            shared: Arc::clone(shared),
            journal: journal.clone(),
            links: Arc::downgrade(links),
            incarnation: incarnation.to_owned(),
            boot_id: boot_id.to_owned(),
            started_us: now_us(),
        }
    }

    /// Asks all nodes for their conflict logs.
    pub(super) fn conflicts(&self) -> ConflictsProvider {
        let (links, config) = (self.links.clone(), Arc::clone(&self.config));
        Arc::new(move |filter| {
            let (links, config) = (links.clone(), Arc::clone(&config));
            Box::pin(async move {
                match links.upgrade() {
                    Some(links) => links.conflicts(&filter).await,
                    None => nobody_asked(&config, ENDED),
                }
            })
        })
    }

    /// The document of this moment, as JSON.
    pub(super) fn document(&self) -> serde_json::Value {
        serde_json::to_value(self.status()).unwrap_or_default()
    }

    /// The document of this moment.
    pub(super) fn status(&self) -> Status {
        let shared = &self.shared;
        let alarms = standing([&shared.alarms, &shared.lasting.alarms]);
        let journal = self.journal.stats();
        let waits = shared.own_waits.load(Ordering::Relaxed);
        let waits = waits.then(|| self.journal.full()).flatten();
        let index = index_stats(shared);
        let mut applied = shared.applied.borrow().clone();
        applied.raise(shared.node, *shared.own.borrow());
        // Taken before the document is put together: a guard made inside it would live to its end, and the
        // peers' part takes the same lock.
        let stable = lock(&shared.stability).stable();
        let links = self.links.upgrade().map(|links| links.status());
        let links = links.unwrap_or_default();
        let relayed_by = |id: NodeId| {
            let relay = links.iter().find(|peer| peer.relaying.contains(&id));
            relay.map(|peer| peer.id)
        };
        let relays: Vec<_> = links.iter().map(|peer| relayed_by(peer.id)).collect();
        let peers = links
            .into_iter()
            .zip(relays)
            .map(|(peer, relay)| self.peer(peer, relay))
            .collect();
        let dropping = lock(&shared.dropping).clone();
        let leaving = lock(&shared.leaving).clone();
        let leaves = leaving.as_ref().map(|_| "leaving".to_owned());
        let joining = lock(&shared.joining).clone();
        let state = joining
            .or(leaves)
            .unwrap_or_else(|| if alarms.is_empty() { "running" } else { "alarm" }.to_owned());
        Status {
            node: NodeStatus {
                id: shared.node.0,
                name: self.config.node.name.clone(),
                cluster: self.config.cluster.id.clone(),
                incarnation: self.incarnation.clone(),
                boot_id: self.boot_id.clone(),
                state,
                started_at: time(self.started_us),
            },
            names: Names::known(&self.config, shared).into(),
            positions: Positions {
                decoded_lsn: Lsn(*shared.decoded.borrow()),
                journaled: lsn_of(self.journal.durable_vector().get(shared.node)),
                applied: map(&applied),
                stable: map(&stable),
            },
            peers,
            dropping,
            leaving,
            policy: lock(&shared.policy).shown.clone(),
            ddl: lock(&shared.stuck_ddl).clone(),
            journal: JournalStatus {
                bytes: journal.bytes_on_disk,
                max_bytes: self.config.journal.max_size_mib << 20,
                segments: journal.segments as u64,
                stalled: journal.stalled.or(waits),
            },
            apply: self.apply(),
            index: IndexStatus {
                entries: (index.entries + index.overflowed) as u64,
                bytes: index.bytes as u64,
                overflowed: index.overflowed > 0,
            },
            alarms,
        }
    }

    fn apply(&self) -> ApplyStatus {
        let counters = &self.shared.counters;
        let read = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
        let waiting = lock(&self.shared.applying).clone();
        let waiting = (!waiting.is_empty()).then_some(waiting);
        ApplyStatus {
            txns: read(&counters.txns),
            rows: read(&counters.rows),
            batches: read(&counters.batches),
            conflicts: read(&counters.conflicts),
            conflicts_counted: read(&counters.conflicts_counted),
            slow_path_rows: read(&counters.slow_path_rows),
            retries: read(&counters.retries),
            local_txns: read(&counters.local_txns),
            repairs: read(&counters.repairs),
            drifted_rows: read(&self.shared.lasting.drifted_rows),
            quarantined: read(&counters.quarantined),
            passed_over: self.shared.passed_over.counts(),
            last_error: lock(&self.shared.last_failure).clone(),
            waiting_for: waiting,
        }
    }

    fn peer(&self, peer: crate::link::PeerStatus, relayed_by: Option<NodeId>) -> PeerStatus {
        let node = self.shared.node;
        let own = *self.shared.own.borrow();
        let replay = peer.reported.applied.get(node);
        let lag_bytes = own.lsn.0.saturating_sub(replay.lsn.0);
        PeerStatus {
            id: peer.id.0,
            name: peer.name,
            connected: peer.outbound.connected && peer.inbound.connected,
            down_since: [&peer.outbound, &peer.inbound]
                .into_iter()
                .filter(|direction| !direction.connected)
                .map(|direction| direction.since_us)
                .min()
                .map(time),
            refusal: peer.refusal.map(|refusal| refusal.to_string()),
            // What an open link has been offered; of a closed one, what arrived.
            sent_lsn: if peer.inbound.connected {
                own.lsn
            } else {
                lsn_of(peer.reported.journaled.get(node))
            },
            write_lsn: lsn_of(peer.reported.journaled.get(node)),
            flush_lsn: lsn_of(peer.reported.journaled.get(node)),
            replay_lsn: replay.lsn,
            lag_bytes,
            lag_seconds: self.shared.lag_seconds(replay),
            clock_offset_us: peer.clock.as_ref().map(|clock| {
                // Against our wall clock, which may have been set since.
                let set_by = now_us().saturating_sub(crate::shared::steady_us());
                clock.offset_us.saturating_sub(set_by)
            }),
            rtt_us: peer.clock.as_ref().map(|clock| clock.rtt_us),
            relayed_by,
            last_error: peer.last_error,
        }
    }
}

/// What is known of the conflict logs where there are no links, for this reason.
pub(super) fn nobody_asked(config: &Config, why: &str) -> Joined {
    Joined {
        nodes: vec![Asked {
            id: config.node.id.0,
            name: config.node.name.clone(),
            answered: false,
            error: Some(why.to_owned()),
            only_counted: 0,
        }],
        ..Joined::default()
    }
}

/// All that stand, by name.
pub(super) fn standing<const N: usize>(alarms: [&Alarms; N]) -> Vec<Alarm> {
    let mut standing: Vec<Alarm> = alarms
        .into_iter()
        .flat_map(Alarms::list)
        .map(|(name, since, text)| Alarm {
            name,
            since: time(since),
            text,
        })
        .collect();
    standing.sort_by(|a, b| a.name.cmp(&b.name));
    standing
}

fn map(vector: &Vector) -> BTreeMap<u16, Position> {
    vector.iter().map(|(node, position)| (node.0, position)).collect()
}

fn time(us: i64) -> String {
    jiff::Timestamp::from_microsecond(us).map_or_else(|_| String::new(), |time| time.to_string())
}

/// The LSN of a position, for people.
fn lsn_of(position: Position) -> Lsn {
    position.lsn
}

/// Keeps the resolver's lock out of async code.
fn index_stats(shared: &Shared) -> index::Stats {
    lock(&shared.resolver).stats()
}
