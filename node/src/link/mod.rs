//! The links to the other members: journal to journal, over gRPC.
//!
//! In:   frames of the local journal, and of the peers'       Out: frames of the peers in the local journal
//! Holds: one stream per peer and direction, at most [`CREDIT_BYTES`](limits::CREDIT_BYTES) under way on each
//! Invariants: 1. frames are passed on as they are; 2. of each origin they enter the journal in order, without gap;
//!             3. nothing is exchanged with a daemon that is not provably the member it says it is.
//! On crash: nothing is lost; streams resume from what the journal holds.
//! Not here: unpacking, ordering and applying frames: those follow the journal by themselves.
//!
//! Reading order: `handshake.rs` who may, `holds.rs` what is accepted, `server.rs` and `session.rs` sending,
//! `client.rs` and `receive.rs` receiving, `peer.rs` what is known of peers.

mod accept;
mod client;
mod clock;
mod handshake;
mod holds;
mod join;
mod joining;
pub mod limits;
mod log;
mod peer;
mod pins;
mod receive;
mod server;
mod session;
mod shared;
mod tls;
mod verify;
mod wire;

#[cfg(test)]
mod tests;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use anabranch_proto::{NodeId, Position, Vector};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

pub use anabranch_proto::link::JoinStep;
pub use clock::PeerClock;
pub use handshake::{Identity, PoliciesUnderWay, Protocols, Refusal, RefusalCode, WentBack};
pub use joining::{Asked, JoinError, Joining, SeedWaits};
pub use peer::{DirectionStatus, PeerStatus, Reported};
pub use pins::PinsError;
pub use shared::LinkEvent;
pub use tls::TlsError;
pub use wire::BadFrame;

pub(crate) use client::describe;
pub(crate) use wire::{vector_from_wire, vector_to_wire};

use crate::config::Config;
use crate::error::chain;
use crate::journal::{self, Journal};
use shared::Shared;

/// Where this daemon stands, asked for whenever it is reported to peers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Positions {
    /// What our journal holds durably, per origin.
    pub journaled: Vector,
    /// What is durably applied here, per origin.
    pub applied: Vector,
    /// The newest position of our own stream: framed, or held in our journal.
    pub own: Position,
    /// Has the decoder caught up with what our server had when the daemon started? Until then a peer may well hold
    /// more of our stream than we do.
    pub caught_up: bool,
    /// Is our journal full, so that own transactions may wait?
    pub is_full: bool,
    /// Do commits of our server wait until peers have applied them (`synchronous_standby_names`)? Then peers are asked
    /// to report at once.
    pub commits_wait: bool,
}

/// Tells the links where the daemon stands. Called often: must be cheap and must not block.
pub type PositionsFn = Arc<dyn Fn() -> Positions + Send + Sync>;

/// What links are made of.
pub struct LinkOptions {
    /// `node`, `listen`, `tls` and `peers` are used.
    pub config: Config,
    /// Who we are.
    pub identity: Identity,
    /// Where frames come from and go to.
    pub journal: Journal,
    /// Our own frames up to here may be sent (`docs/design.md` section 3). See [`no_gate`].
    pub gate: watch::Receiver<Position>,
    /// Peers that are being dropped: see [`Links::shun`].
    pub shunned: std::collections::BTreeSet<NodeId>,
    /// Where the daemon stands.
    pub positions: PositionsFn,
    /// Answers nodes that want to join; none where there is no database.
    pub donor: Option<crate::donor::Seat>,
    /// Answers questions about rows; none where there is no database.
    pub verify: Option<crate::verify::Seat>,
    /// What is applied here, as `positions` tells it: peers hear of it at once. It changes with every frame; a stream that has a report due waits
    /// for no more of them.
    pub applied: watch::Receiver<Vector>,
    /// Marked changed whenever `positions` would answer differently for another reason, so that peers hear of it at once.
    pub positions_changed: watch::Receiver<()>,
}

/// A gate that is always open.
#[must_use]
pub fn no_gate() -> watch::Receiver<Position> {
    watch::channel(Position::new(u32::MAX, u64::MAX)).1
}

/// What stops the links, or one of them for a while.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The listen address cannot be used.
    #[error("cannot listen on {address}; correct `listen.address` or stop what uses it")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// Certificates or plaintext.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// `peers.json`.
    #[error(transparent)]
    Pins(#[from] PinsError),
    /// A peer's address cannot be looked up.
    #[error("cannot resolve `{address}` of peer `{peer}`; correct `peers.address` or the name service")]
    Resolve {
        /// The peer.
        peer: String,
        /// Its configured address.
        address: String,
        /// Why.
        source: std::io::Error,
    },
    /// No connection.
    #[error("cannot connect to peer `{peer}` at {address}: {reason}")]
    Connect {
        /// The peer.
        peer: String,
        /// What was dialled.
        address: SocketAddr,
        /// The whole chain of causes.
        reason: String,
    },
    /// tonic refuses its settings.
    #[error("cannot set up the link server: {reason}")]
    Server {
        /// The whole chain of causes.
        reason: String,
    },
    /// The stream broke.
    #[error("the link to `{peer}` broke: {reason}")]
    Broken {
        /// The peer.
        peer: String,
        /// The whole chain of causes.
        reason: String,
    },
    /// The peer is silent.
    #[error("the link to `{peer}` stalled: no message for {seconds} s")]
    Stalled {
        /// The peer.
        peer: String,
        /// How long.
        seconds: u64,
    },
    /// The peer sends what cannot be.
    #[error("peer `{peer}` sent a {source}")]
    Frame {
        /// The peer.
        peer: String,
        /// What is wrong.
        source: BadFrame,
    },
    /// The peer and we do not belong together.
    #[error("{0}")]
    Refused(#[from] Refusal),
    /// Our own journal failed.
    #[error("the journal did not take a received frame")]
    Journal(#[from] journal::Error),
}

/// The running links of this daemon.
pub struct Links {
    shared: Arc<Shared>,
    address: SocketAddr,
    tasks: Mutex<JoinSet<()>>,
    events: Mutex<Option<mpsc::Receiver<LinkEvent>>>,
}

impl Links {
    /// Listens, and begins to connect to every peer.
    ///
    /// # Errors
    /// When the configuration cannot be used or the address not be bound. Peers that cannot be reached are no error.
    pub async fn start(options: LinkOptions) -> Result<Self, Error> {
        let (shared, events) = Shared::new(options)?;
        let shared = Arc::new(shared);
        let mut tasks = JoinSet::new();
        let address = server::start(&shared, &mut tasks).await?;
        for peer in shared.peers.iter() {
            tasks.spawn(client::run(Arc::clone(&shared), Arc::clone(peer)));
        }
        Ok(Self {
            shared,
            address,
            tasks: Mutex::new(tasks),
            events: Mutex::new(Some(events)),
        })
    }

    /// The address that is listened on.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// Every peer, in order of node ids.
    #[must_use]
    pub fn status(&self) -> Vec<PeerStatus> {
        let holds = &self.shared.holds;
        self.shared
            .peers
            .iter()
            .map(|peer| peer.status(holds.paused(peer.config.id)))
            .collect()
    }

    /// What each peer last said of itself; marked changed with every news. For acknowledgements at a quorum and for
    /// what the journal may forget.
    #[must_use]
    pub fn reports(&self) -> watch::Receiver<std::collections::BTreeMap<NodeId, Reported>> {
        self.shared.reports.subscribe()
    }

    /// The clocks of the peers that have shown theirs.
    #[must_use]
    pub fn clocks(&self) -> Vec<(NodeId, PeerClock)> {
        self.shared
            .peers
            .iter()
            .filter_map(|peer| Some((peer.config.id, peer.clock()?)))
            .collect()
    }

    /// What was accepted of each other node (appended to the journal; durable or not).
    #[must_use]
    pub fn held(&self) -> Vector {
        let holds = &self.shared.holds;
        holds
            .origins()
            .map(|origin| (origin, holds.position(origin)))
            .collect()
    }

    /// The events; there is one receiver, and only the first call gets it.
    #[must_use]
    pub fn events(&self) -> Option<mpsc::Receiver<LinkEvent>> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Stops accepting transactions of `origin`, directly and through others. False when it is no other member.
    pub fn pause_origin(&self, origin: NodeId, reason: &str) -> bool {
        let known = self.shared.holds.pause(origin, reason);
        if known {
            tracing::warn!(%origin, reason, "transactions of this node are not accepted for now");
        }
        known
    }

    /// From now on nothing is taken from these peers over a direct link; others may still pass on what they hold.
    pub fn shun(&self, peers: std::collections::BTreeSet<NodeId>) {
        self.shared.shunned.send_if_modified(|shunned| {
            let changed = *shunned != peers;
            *shunned = peers;
            changed
        });
    }

    /// Is there an open link by which we receive from this peer?
    #[must_use]
    pub fn receives_from(&self, peer: NodeId) -> bool {
        let peer = self.shared.peers.get(peer);
        peer.is_some_and(|peer| peer.status(None).outbound.connected)
    }

    /// Accepts transactions of `origin` again, from where it was paused. False when it was not paused.
    pub fn resume_origin(&self, origin: NodeId) -> bool {
        let was = self.shared.holds.resume(origin);
        if was {
            tracing::info!(%origin, "transactions of this node are accepted again");
        }
        was
    }

    /// Ends all streams and waits for them, a few seconds at most. Afterwards nothing listens any more, whoever still holds the links: the
    /// next life of the stages needs the address.
    pub async fn shutdown(&self) {
        self.shared.stop.send_replace(true);
        let mut tasks = std::mem::take(&mut *self.tasks.lock().unwrap_or_else(PoisonError::into_inner));
        let mut sessions = self.shared.sessions();
        let all = async {
            while tasks.join_next().await.is_some() {}
            while sessions.join_next().await.is_some() {}
        };
        if tokio::time::timeout(limits::SHUTDOWN_TIMEOUT, all).await.is_err() {
            tracing::warn!("some links did not end in time and are cut");
        }
        let cut = async { tokio::join!(tasks.shutdown(), sessions.shutdown()) };
        let _ = tokio::time::timeout(limits::SHUTDOWN_TIMEOUT, cut).await;
    }
}

impl Drop for Links {
    fn drop(&mut self) {
        self.shared.stop.send_replace(true);
    }
}

/// The folder's file that remembers peers, for messages and tools.
#[must_use]
pub fn pins_path(config: &Config) -> PathBuf {
    config.node.data_dir.join(pins::FILE_NAME)
}
