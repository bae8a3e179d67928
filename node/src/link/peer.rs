//! What is known of each peer: its streams, what it reports, what went wrong.
//!
//! In:   facts from the streams in both directions          Out: [`PeerStatus`], [`Reported`], relay decisions
//! Holds: one entry per configured peer, of bounded size
//! Invariants: 1. a node is live under one boot id at a time; 2. an origin is relayed from the moment its direct link
//!             has been down for [`RELAY_AFTER`], says nothing, or cannot give what is asked for, until that link is there and has delivered.
//! On crash: nothing is kept.
//! Not here: the streams themselves (`client.rs`, `server.rs`).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use anabranch_proto::{NodeId, Position, Vector};
use serde::Serialize;

use super::clock::{PeerClock, unix_us};
use super::handshake::{Refusal, RefusalCode};
use super::limits::RELAY_AFTER;
use crate::config;

/// What a peer last said of itself.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Reported {
    /// What its journal holds durably, per origin.
    pub journaled: Vector,
    /// What it has durably applied, per origin.
    pub applied: Vector,
    /// Its journal is full, so its own transactions may wait, and what it has applied behind them is not known even there.
    pub is_full: bool,
}

/// One direction of a link, for people.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct DirectionStatus {
    /// Is a welcomed stream open?
    pub connected: bool,
    /// Since when it has been open, or else closed; microseconds since the Unix epoch.
    pub since_us: i64,
}

/// A peer, for people and monitoring.
#[derive(Debug, Clone, Serialize)]
pub struct PeerStatus {
    /// Its node id.
    pub id: NodeId,
    /// Its node name.
    pub name: String,
    /// Its configured address.
    pub address: String,
    /// The stream by which we receive from it.
    pub outbound: DirectionStatus,
    /// The stream by which it receives from us.
    pub inbound: DirectionStatus,
    /// Why one of the two refuses the other, and what to do.
    pub refusal: Option<Refusal>,
    /// What last went wrong.
    pub last_error: Option<String>,
    /// Its clock as seen from ours.
    pub clock: Option<PeerClock>,
    /// The last position received through this peer, per origin.
    pub received: Vector,
    /// What it last said of itself.
    pub reported: Reported,
    /// Payload received from it, bytes, since the daemon started.
    pub bytes_in: u64,
    /// Payload sent to it, bytes, since the daemon started.
    pub bytes_out: u64,
    /// Origins other than its own that we receive through it now.
    pub relaying: Vec<NodeId>,
    /// Its own origin is received through other peers now.
    pub relayed: bool,
    /// Why its transactions are not accepted at present.
    pub paused: Option<String>,
    /// The version it runs.
    pub software_version: Option<String>,
}

/// Which way a stream goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    /// We receive.
    Outbound,
    /// We send.
    Inbound,
}

#[derive(Debug, Default)]
struct State {
    outbound: DirectionStatus,
    inbound: DirectionStatus,
    /// Boot id of the live streams and how many there are, both directions together.
    live: Option<(String, usize)>,
    inbound_count: usize,
    refusal: Option<Refusal>,
    last_error: Option<String>,
    clock: Option<PeerClock>,
    received: Vector,
    reported: Reported,
    relaying: BTreeSet<NodeId>,
    down_since: Option<Instant>,
    relayed: bool,
    software_version: Option<String>,
}

/// One configured peer.
#[derive(Debug)]
pub(super) struct Peer {
    pub(super) config: config::Peer,
    state: Mutex<State>,
    pub(super) bytes_in: AtomicU64,
    pub(super) bytes_out: AtomicU64,
}

impl Peer {
    pub(super) fn new(config: config::Peer) -> Self {
        let down = DirectionStatus {
            connected: false,
            since_us: unix_us(),
        };
        let state = State {
            outbound: down.clone(),
            inbound: down,
            down_since: Some(Instant::now()),
            ..State::default()
        };
        Self {
            config,
            state: Mutex::new(state),
            bytes_in: AtomicU64::new(0),
            bytes_out: AtomicU64::new(0),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Registers a stream with the peer's daemon of `boot_id`, which is of the given version and speaks the given link protocol with us; it counts as live until the guard is dropped.
    ///
    /// # Errors
    /// When another daemon is live under the same node id.
    pub(super) fn enter(
        self: &Arc<Self>,
        direction: Direction,
        boot_id: &str,
        (software_version, protocol): (&str, u32),
    ) -> Result<Live, Refusal> {
        let mut state = self.state();
        match &mut state.live {
            Some((live, _)) if live != boot_id => {
                return Err(Refusal::new(
                    RefusalCode::DuplicateNode,
                    format!(
                        "node `{}` (id {}) is connected already, by another daemon: stop one of the two daemons that run \
                         under this id (after a crash the old connection is given up within 15 s by itself)",
                        self.config.name, self.config.id
                    ),
                ));
            }
            Some((_, count)) => *count += 1,
            None => state.live = Some((boot_id.to_owned(), 1)),
        }
        state.software_version = Some(software_version.to_owned());
        let up = DirectionStatus {
            connected: true,
            since_us: unix_us(),
        };
        match direction {
            Direction::Outbound => {
                state.outbound = up;
                state.refusal = None;
                state.down_since = None;
            }
            Direction::Inbound => {
                state.inbound_count += 1;
                state.inbound = up;
            }
        }
        Ok(Live {
            peer: Arc::clone(self),
            direction,
            protocol,
        })
    }

    fn leave(&self, direction: Direction) {
        let mut state = self.state();
        state.live = state
            .live
            .take()
            .and_then(|(boot, count)| (count > 1).then(|| (boot, count - 1)));
        let down = DirectionStatus {
            connected: false,
            since_us: unix_us(),
        };
        match direction {
            Direction::Outbound => {
                state.outbound = down;
                state.down_since = Some(Instant::now());
                state.relaying.clear();
            }
            Direction::Inbound => {
                state.inbound_count = state.inbound_count.saturating_sub(1);
                if state.inbound_count == 0 {
                    state.inbound = down;
                }
            }
        }
    }

    /// Notes a refusal; true when it is a new one.
    pub(super) fn refused(&self, refusal: &Refusal) -> bool {
        let mut state = self.state();
        let new = state.refusal.as_ref() != Some(refusal);
        state.refusal = Some(refusal.clone());
        new
    }

    /// Notes that the peer could not be reached or the stream broke; true when the text is a new one.
    pub(super) fn failed(&self, text: &str) -> bool {
        let mut state = self.state();
        state.refusal = None;
        let new = state.last_error.as_deref() != Some(text);
        state.last_error = Some(text.to_owned());
        new
    }

    /// Notes a fault of a stream that goes on.
    pub(super) fn complain(&self, text: &str) -> bool {
        let mut state = self.state();
        let new = state.last_error.as_deref() != Some(text);
        state.last_error = Some(text.to_owned());
        new
    }

    pub(super) fn set_clock(&self, clock: PeerClock) {
        self.state().clock = Some(clock);
    }

    pub(super) fn clock(&self) -> Option<PeerClock> {
        self.state().clock
    }

    pub(super) fn set_relaying(&self, origins: BTreeSet<NodeId>) {
        self.state().relaying = origins;
    }

    pub(super) fn note_received(&self, origin: NodeId, position: Position) {
        self.state().received.raise(origin, position);
    }

    /// Takes over what the peer says of itself; true when it is news.
    pub(super) fn report(&self, journaled: &Vector, applied: &Vector, is_full: bool) -> bool {
        let mut state = self.state();
        let before = state.reported.clone();
        state.reported.journaled.join(journaled);
        state.reported.applied.join(applied);
        state.reported.is_full = is_full;
        before != state.reported
    }

    pub(super) fn reported(&self) -> Reported {
        self.state().reported.clone()
    }

    /// The direct link has brought something, or has nothing that we lack: nobody needs to relay any more.
    pub(super) fn delivered(&self) {
        let mut state = self.state();
        if state.outbound.connected {
            state.relayed = false;
        }
    }

    /// The direct link is there and does not give what we lack of the peer's own origin, as where a file of its journal is damaged or packets
    /// are dropped: others may hold it.
    pub(super) fn unserved(&self) {
        self.state().relayed = true;
    }

    /// Shall others relay this peer's origin? A refused peer is not relayed: what refuses it may hold for its
    /// transactions too.
    pub(super) fn wants_relay(&self, now: Instant) -> bool {
        let mut state = self.state();
        if state.refusal.is_some() {
            state.relayed = false;
        } else if let Some(since) = state.down_since {
            state.relayed |= now.saturating_duration_since(since) >= RELAY_AFTER;
        }
        state.relayed
    }

    pub(super) fn status(&self, paused: Option<String>) -> PeerStatus {
        let state = self.state();
        PeerStatus {
            id: self.config.id,
            name: self.config.name.clone(),
            address: self.config.address.clone(),
            outbound: state.outbound.clone(),
            inbound: state.inbound.clone(),
            refusal: state.refusal.clone(),
            last_error: state.last_error.clone(),
            clock: state.clock,
            received: state.received.clone(),
            reported: state.reported.clone(),
            bytes_in: self.bytes_in.load(Ordering::Relaxed),
            bytes_out: self.bytes_out.load(Ordering::Relaxed),
            relaying: state.relaying.iter().copied().collect(),
            relayed: state.relayed,
            paused,
            software_version: state.software_version.clone(),
        }
    }
}

/// A registered stream.
#[derive(Debug)]
pub(super) struct Live {
    peer: Arc<Peer>,
    direction: Direction,
    /// The version of the link protocol that both ends speak on it.
    pub(super) protocol: u32,
}

impl Drop for Live {
    fn drop(&mut self) {
        self.peer.leave(self.direction);
    }
}

/// Every configured peer.
#[derive(Debug)]
pub(super) struct Peers(BTreeMap<NodeId, Arc<Peer>>);

impl Peers {
    pub(super) fn new(configured: &[config::Peer]) -> Self {
        Self(
            configured
                .iter()
                .map(|peer| (peer.id, Arc::new(Peer::new(peer.clone()))))
                .collect(),
        )
    }

    pub(super) fn get(&self, id: NodeId) -> Option<&Arc<Peer>> {
        self.0.get(&id)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Arc<Peer>> {
        self.0.values()
    }

    /// What to receive through `peer`: its own origin, and those whose direct links are down.
    pub(super) fn wanted_of(&self, peer: NodeId, now: Instant) -> BTreeSet<NodeId> {
        self.0
            .values()
            .filter(|other| other.config.id == peer || other.wants_relay(now))
            .map(|p| p.config.id)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn peers() -> Peers {
        let peer = |id, name: &str| config::Peer {
            name: name.to_owned(),
            id: NodeId(id),
            address: String::new(),
        };
        Peers::new(&[peer(2, "b"), peer(3, "c")])
    }

    fn wanted(peers: &Peers, of: u16, after: Duration) -> Vec<u16> {
        peers
            .wanted_of(NodeId(of), Instant::now() + after)
            .into_iter()
            .map(|id| id.0)
            .collect()
    }

    #[test]
    fn an_origin_is_relayed_while_its_direct_link_is_down_and_until_it_has_delivered() {
        let peers = peers();
        let (b, c) = (peers.get(NodeId(2)).unwrap(), peers.get(NodeId(3)).unwrap());
        let _b_live = b.enter(Direction::Outbound, "b1", ("v", 1)).unwrap();
        let c_live = c.enter(Direction::Outbound, "c1", ("v", 1)).unwrap();
        assert_eq!(wanted(&peers, 2, RELAY_AFTER), [2]);
        drop(c_live);
        assert_eq!(wanted(&peers, 2, Duration::ZERO), [2]);
        assert_eq!(wanted(&peers, 2, RELAY_AFTER), [2, 3]);
        let _c_live = c.enter(Direction::Outbound, "c1", ("v", 1)).unwrap();
        assert_eq!(wanted(&peers, 2, Duration::ZERO), [2, 3]);
        c.delivered();
        assert_eq!(wanted(&peers, 2, RELAY_AFTER), [2]);
        c.unserved();
        assert_eq!(wanted(&peers, 2, Duration::ZERO), [2, 3]);
        c.delivered();
        assert_eq!(wanted(&peers, 2, Duration::ZERO), [2]);
    }

    #[test]
    fn a_refused_peer_is_not_relayed() {
        let peers = peers();
        let c = peers.get(NodeId(3)).unwrap();
        assert_eq!(wanted(&peers, 2, RELAY_AFTER), [2, 3]);
        assert!(c.refused(&Refusal::new(RefusalCode::Incarnation, "x".to_owned())));
        assert_eq!(wanted(&peers, 2, RELAY_AFTER), [2]);
        assert!(c.failed("gone"));
        assert_eq!(wanted(&peers, 2, RELAY_AFTER), [2, 3]);
    }

    #[test]
    fn one_node_is_live_under_one_boot_id_at_a_time() {
        let peers = peers();
        let b = peers.get(NodeId(2)).unwrap();
        let first = b.enter(Direction::Inbound, "boot-1", ("v", 1)).unwrap();
        let second = b.enter(Direction::Outbound, "boot-1", ("v", 1)).unwrap();
        let refusal = b.enter(Direction::Inbound, "boot-2", ("v", 1)).unwrap_err();
        assert_eq!(refusal.code, "duplicate_node");
        assert!(refusal.text.contains("stop one of the two daemons"), "{refusal}");
        drop(first);
        assert!(b.enter(Direction::Inbound, "boot-2", ("v", 1)).is_err());
        drop(second);
        let _next = b.enter(Direction::Inbound, "boot-2", ("v", 1)).unwrap();
        assert!(b.status(None).inbound.connected);
        assert!(!b.status(None).outbound.connected);
    }
}
