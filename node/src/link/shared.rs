//! What all links of a daemon share.
//!
//! In:   the options of the links            Out: checks and reports used by every stream; events to the daemon
//! Holds: identity, peers, what is held, what went fatally wrong
//! Invariants: 1. a fatal event is sent once and has room in the queue; 2. once our server is known to have gone back
//!             in time, every stream is refused.
//! Not here: the tasks (`client.rs`, `server.rs`).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anabranch_proto::link as pb;
use anabranch_proto::{NodeId, Position, Vector};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use super::clock::unix_us;
use super::handshake::{self, Identity, Refusal, WentBack};
use super::holds::Holds;
use super::limits::{EVENTS_MAX, EVENTS_RESERVED};
use super::peer::{Direction, Live, Peer, Peers, Reported};
use super::pins::Pins;
use super::{Error, LinkOptions, Positions, PositionsFn, wire};
use crate::config;
use crate::journal::{FrameMeta, Journal};

/// What the daemon should know at once.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum LinkEvent {
    /// We receive from this peer.
    Connected {
        /// The peer.
        peer: NodeId,
    },
    /// We receive from it no more.
    Disconnected {
        /// The peer.
        peer: NodeId,
        /// Why.
        reason: String,
    },
    /// It refuses us, or we refuse it.
    Refused {
        /// The peer.
        peer: NodeId,
        /// Why and what to do.
        refusal: Refusal,
    },
    /// A peer cannot serve an origin from where we need it.
    Unavailable {
        /// The peer.
        peer: NodeId,
        /// The origin.
        origin: NodeId,
        /// What we hold of it.
        held: Position,
        /// Why, in the peer's words.
        text: String,
    },
    /// The journal here cannot be read where a peer is to be sent an origin's frames from.
    Unreadable {
        /// The origin.
        origin: NodeId,
        /// The whole chain of causes.
        text: String,
    },
    /// Fatal: our own server is older than what a peer has of it. The daemon must stop.
    WentBack(WentBack),
    /// Fatal: the journal takes no more frames. The daemon must stop.
    JournalFailed {
        /// The whole chain of causes.
        reason: String,
    },
}

pub(super) struct Shared {
    pub(super) config: config::Config,
    pub(super) identity: Identity,
    pub(super) journal: Journal,
    pub(super) donor: Option<crate::donor::Seat>,
    pub(super) verify: Option<crate::verify::Seat>,
    pub(super) gate: watch::Receiver<Position>,
    pub(super) applied: watch::Receiver<Vector>,
    pub(super) positions_changed: watch::Receiver<()>,
    positions: PositionsFn,
    pub(super) holds: Holds,
    pub(super) peers: Peers,
    pins: Pins,
    pub(super) reports: watch::Sender<BTreeMap<NodeId, Reported>>,
    pub(super) stop: watch::Sender<bool>,
    /// Peers that are being dropped.
    pub(super) shunned: watch::Sender<BTreeSet<NodeId>>,
    /// Pulls of peers that are being served.
    sessions: Mutex<JoinSet<()>>,
    went_back: watch::Sender<Option<WentBack>>,
    journal_failed: watch::Sender<bool>,
    events: mpsc::Sender<LinkEvent>,
}

impl Shared {
    pub(super) fn new(options: LinkOptions) -> Result<(Self, mpsc::Receiver<LinkEvent>), Error> {
        let LinkOptions {
            config,
            identity,
            journal,
            gate,
            positions,
            donor,
            verify,
            shunned,
            applied,
            positions_changed,
        } = options;
        // What was applied may be more than what the journal holds: a joiner begins with a copy of the data.
        let mut held = journal.written_vector();
        held.join(&positions().applied);
        let (events, received) = mpsc::channel(EVENTS_MAX);
        let shared = Self {
            pins: Pins::open(&config.node.data_dir)?,
            holds: Holds::new(identity.id, &identity.sorted_members(), &held),
            peers: Peers::new(&config.peers),
            reports: watch::Sender::new(BTreeMap::new()),
            stop: watch::Sender::new(false),
            shunned: watch::Sender::new(shunned),
            sessions: Mutex::default(),
            went_back: watch::Sender::new(None),
            journal_failed: watch::Sender::new(false),
            config,
            identity,
            journal,
            donor,
            verify,
            gate,
            applied,
            positions_changed,
            positions,
            events,
        };
        Ok((shared, received))
    }

    /// Where we stand now, as peers shall hear it.
    pub(super) fn positions(&self) -> Positions {
        let mut positions = (self.positions)();
        // The journal may be ahead of what the decoder last said, and was the moment before it sent anything.
        positions.own = positions
            .own
            .max(self.journal.written_vector().get(self.identity.id));
        positions
    }

    /// Our hello of this moment. `holds` names what is written, durable or not: it is what a peer must not lose.
    pub(super) fn hello(&self) -> pb::Hello {
        let positions = self.positions();
        let mut holds = self.journal.written_vector();
        holds.join(&positions.applied);
        holds.raise(self.identity.id, positions.own);
        self.identity.hello(&holds, unix_us())
    }

    /// May this frame be sent? Own transactions that must be visible here first are told to nobody before, neither to members nor to who joins.
    pub(super) fn lets_go(&self, meta: &FrameMeta) -> bool {
        meta.origin != self.identity.id || meta.last <= *self.gate.borrow()
    }

    /// Checks a peer's hello in full and registers the stream.
    pub(super) fn admit(&self, hello: &pb::Hello, direction: Direction) -> Result<(Arc<Peer>, Live), Error> {
        if let Some(found) = &*self.went_back.borrow() {
            return Err(found.refusal(&self.identity).into());
        }
        let id = handshake::check(&self.identity, &self.config.peers, hello)?;
        let Some(peer) = self.peers.get(id) else {
            return Err(handshake::malformed(&format!("node {id} is not known")).into());
        };
        self.pins.check(id, &hello.node_name, &hello.incarnation)??;
        self.check_shunned(peer)?;
        let protocol = handshake::protocol(&self.identity, hello)?;
        let live = peer.enter(
            direction,
            &hello.boot_id,
            (hello.software_version.as_str(), protocol),
        )?;
        // Last: what it says it holds may end this daemon, so it must be the member, and not a copy of it that somebody has left running.
        self.check_past(&peer.config.name, &wire::vector_from_wire(&hello.holds))?;
        Ok((Arc::clone(peer), live))
    }

    /// # Errors
    /// When the peer is being dropped: the link is broken rather than refused, so that others pass its stream on.
    pub(super) fn check_shunned(&self, peer: &Peer) -> Result<(), Error> {
        if self.shunned.borrow().contains(&peer.config.id) {
            return Err(Error::Broken {
                peer: peer.config.name.clone(),
                reason: "it is being dropped from the cluster".to_owned(),
            });
        }
        Ok(())
    }

    /// Does the peer hold more of our stream than we have? Then nothing may be exchanged any more: what we write next
    /// would be taken for what the peer has already.
    pub(super) fn check_past(&self, peer: &str, peer_holds: &Vector) -> Result<(), Refusal> {
        if let Some(found) = &*self.went_back.borrow() {
            return Err(found.refusal(&self.identity));
        }
        let positions = self.positions();
        if !positions.caught_up {
            return Ok(());
        }
        let Some(found) = handshake::went_back(&self.identity, positions.own, peer, peer_holds) else {
            return Ok(());
        };
        let first = self.went_back.send_if_modified(|known| {
            let first = known.is_none();
            known.get_or_insert_with(|| found.clone());
            first
        });
        if first {
            tracing::error!("{found}");
            self.send_fatal(LinkEvent::WentBack(found.clone()));
        }
        Err(found.refusal(&self.identity))
    }

    /// Takes over what a peer says of itself.
    pub(super) fn take_report(
        &self,
        peer: &Peer,
        journaled: &Vector,
        applied: &Vector,
        is_full: bool,
    ) -> Result<(), Refusal> {
        self.check_past(&peer.config.name, journaled)?;
        self.check_past(&peer.config.name, applied)?;
        if peer.report(journaled, applied, is_full) {
            self.reports.send_modify(|reports| {
                reports.insert(peer.config.id, peer.reported());
            });
        }
        Ok(())
    }

    /// The journal refused a frame: said once.
    pub(super) fn fail_journal(&self, reason: String) {
        if self.journal_failed.send_replace(true) {
            return;
        }
        tracing::error!(reason, "the journal takes no more received transactions");
        self.send_fatal(LinkEvent::JournalFailed { reason });
    }

    /// Tells the daemon; dropped when it has not been listening for long.
    pub(super) fn send(&self, event: LinkEvent) {
        if self.events.capacity() > EVENTS_RESERVED {
            // Full or closed: the daemon does not listen, and the status says the same.
            let _ = self.events.try_send(event);
        }
    }

    fn send_fatal(&self, event: LinkEvent) {
        if self.events.try_send(event).is_err() {
            tracing::error!("nobody listens to the fatal event of the links");
        }
    }

    fn lock_sessions(&self) -> MutexGuard<'_, JoinSet<()>> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs a session until it ends or the links are gone.
    pub(super) fn spawn(&self, session: impl Future<Output = ()> + Send + 'static) {
        let mut sessions = self.lock_sessions();
        while sessions.try_join_next().is_some() {}
        sessions.spawn(session);
    }

    /// Hands out the sessions that are left, to wait for them.
    pub(super) fn sessions(&self) -> JoinSet<()> {
        std::mem::take(&mut *self.lock_sessions())
    }

    /// Returns when the links stop.
    pub(super) async fn stopped(&self) {
        let mut stop = self.stop.subscribe();
        // The sender lives in self, so waiting ends only by the value.
        let _ = stop.wait_for(|&stop| stop).await;
    }
}
