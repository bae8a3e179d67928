//! Nodes of a test cluster: real journals, real gRPC over loopback, and a proxy that can cut links.

mod admission;
mod exchange;
mod holds;
mod stream;
mod tls;

use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anabranch_proto::link as pb;
use anabranch_proto::link::link_client::LinkClient;
use bytes::Bytes;
use tempfile::TempDir;
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::transport::Channel;

use super::handshake::tests::identity;
use super::*;
use crate::config;
use crate::journal::{Codec, Frame, FrameKind, FrameMeta};

/// Names by node id.
const NAMES: [&str; 4] = ["", "a", "b", "c"];
/// Room for everything that a test writes.
const JOURNAL_BYTES_MAX: u64 = 1 << 30;
/// Bytes of log that a test transaction takes.
const TXN_BYTES: u64 = 10;

/// Waits until `what` is true. The bound is there to end a test that fails, not to measure.
async fn eventually(what: &str, condition: impl Fn() -> bool) {
    for _ in 0..3_000 {
        if condition() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("never happened: {what}");
}

/// Forwards connections to a node, and cuts or silences them on demand.
struct Proxy {
    address: SocketAddr,
    target: watch::Sender<Option<SocketAddr>>,
    silent: watch::Sender<bool>,
}

impl Proxy {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (target, targets) = watch::channel(None);
        let (silent, silences) = watch::channel(false);
        tokio::spawn(async move {
            while let Ok((mut from, _)) = listener.accept().await {
                let (mut targets, mut silences) = (targets.clone(), silences.clone());
                tokio::spawn(async move {
                    let Some(address) = *targets.borrow_and_update() else {
                        return;
                    };
                    let Ok(mut to) = TcpStream::connect(address).await else {
                        return;
                    };
                    tokio::select! {
                        _ = copy_bidirectional(&mut from, &mut to) => {}
                        _ = targets.changed() => {}
                        // Open, and nothing moves.
                        () = async { let _ = silences.wait_for(|&silent| silent).await; } => {
                            let _ = targets.changed().await;
                        }
                    }
                });
            }
        });
        Self {
            address,
            target,
            silent,
        }
    }

    /// Ends every connection and takes no new one.
    fn cut(&self) {
        self.target.send_replace(None);
    }

    /// Keeps connections open, and moves nothing more until it leads somewhere anew.
    fn silence(&self) {
        self.silent.send_replace(true);
    }

    /// Ends every connection; new ones go there.
    fn lead_to(&self, address: SocketAddr) {
        self.silent.send_replace(false);
        self.target.send_replace(Some(address));
    }
}

/// What a test changes about a node before it starts.
struct Setup {
    identity: Identity,
    config: config::Config,
    gate: watch::Receiver<Position>,
    disk: Arc<dyn journal::Disk>,
}

/// A running node.
struct Node {
    id: NodeId,
    links: Option<Links>,
    journal: Journal,
    own: Arc<AtomicU64>,
    caught_up: Arc<AtomicBool>,
}

fn open_journal(dir: &Path, node: NodeId, disk: Arc<dyn journal::Disk>) -> Journal {
    let options = journal::Options {
        dir: dir.join("journal"),
        segment_bytes: 1 << 20,
        max_bytes: JOURNAL_BYTES_MAX,
        sync_within: Duration::ZERO,
        node,
        cluster: "river".to_owned(),
    };
    Journal::open(options, disk).unwrap().0
}

/// A transaction-sized frame at `prev`.
fn whole(origin: u16, prev: u64, payload: impl Into<Bytes>) -> Frame {
    let payload = payload.into();
    Frame {
        meta: FrameMeta {
            origin: NodeId(origin),
            prev: position(prev),
            last: position(prev + TXN_BYTES),
            kind: FrameKind::Whole,
            txn_count: 1,
            part: 0,
            part_run: 0,
            codec: Codec::Plain,
            raw_len: u32::try_from(payload.len()).unwrap(),
        },
        payload,
    }
}

/// A piece of a large transaction at `prev`; the last one if `end`.
fn piece(origin: u16, prev: u64, run: u64, part: u32, end: bool) -> Frame {
    let mut frame = whole(origin, prev, format!("run {run} part {part}"));
    (frame.meta.part, frame.meta.part_run) = (part, run);
    if end {
        frame.meta.kind = FrameKind::End;
    } else {
        (frame.meta.kind, frame.meta.txn_count, frame.meta.last) = (FrameKind::Part, 0, frame.meta.prev);
    }
    frame
}

/// Positions of test nodes: timeline 1; zero is before everything.
fn position(lsn: u64) -> Position {
    if lsn == 0 {
        Position::ZERO
    } else {
        Position::new(1, lsn)
    }
}

impl Node {
    async fn start(
        id: u16,
        dir: &Path,
        peers: &[(u16, SocketAddr)],
        change: impl FnOnce(&mut Setup),
    ) -> Self {
        Self::try_start(id, dir, peers, change).await.unwrap()
    }

    async fn try_start(
        id: u16,
        dir: &Path,
        peers: &[(u16, SocketAddr)],
        change: impl FnOnce(&mut Setup),
    ) -> Result<Self, Error> {
        let mut setup = Setup {
            identity: identity(id, NAMES[usize::from(id)]),
            config: config_of(id, dir, peers),
            gate: no_gate(),
            disk: Arc::new(journal::RealDisk),
        };
        setup.identity.members = peers
            .iter()
            .map(|peer| NodeId(peer.0))
            .chain([NodeId(id)])
            .collect();
        setup.identity.founders.clone_from(&setup.identity.members);
        setup.identity.boot_id = uuid::Uuid::new_v4().to_string();
        change(&mut setup);
        let journal = open_journal(dir, NodeId(id), setup.disk);
        let own = Arc::new(AtomicU64::new(journal.written_vector().get(NodeId(id)).lsn.0));
        let caught_up = Arc::new(AtomicBool::new(false));
        let positions: PositionsFn = {
            let (journal, own, caught_up) = (journal.clone(), Arc::clone(&own), Arc::clone(&caught_up));
            Arc::new(move || Positions {
                journaled: journal.written_vector(),
                applied: Vector::new(),
                own: position(own.load(Ordering::SeqCst)),
                caught_up: caught_up.load(Ordering::SeqCst),
                is_full: journal.full().is_some(),
                commits_wait: false,
            })
        };
        let links = Links::start(LinkOptions {
            config: setup.config,
            identity: setup.identity,
            journal: journal.clone(),
            gate: setup.gate,
            positions,
            shunned: std::collections::BTreeSet::new(),
            donor: None,
            verify: None,
            applied: watch::channel(Vector::new()).1,
            positions_changed: watch::channel(()).1,
        })
        .await?;
        Ok(Self {
            id: NodeId(id),
            links: Some(links),
            journal,
            own,
            caught_up,
        })
    }

    fn links(&self) -> &Links {
        self.links.as_ref().unwrap()
    }

    fn status(&self, peer: u16) -> PeerStatus {
        self.links()
            .status()
            .into_iter()
            .find(|status| status.id == NodeId(peer))
            .unwrap()
    }

    fn is_connected(&self, peer: u16) -> bool {
        self.status(peer).outbound.connected
    }

    /// Writes a frame of our own.
    async fn append(&self, frame: Frame) {
        self.own.fetch_max(frame.meta.last.lsn.0, Ordering::SeqCst);
        self.journal.append(frame).await.unwrap();
    }

    /// Writes `count` transactions of our own.
    async fn write(&self, count: u64) {
        for _ in 0..count {
            let prev = self.own.load(Ordering::SeqCst);
            self.append(whole(self.id.0, prev, format!("{} {prev}", self.id)))
                .await;
        }
    }

    /// Everything that the journal has of an origin, in its order.
    async fn journaled(&self, origin: u16) -> Vec<FrameMeta> {
        let mut cursor = self.journal.cursor(NodeId(origin), Position::ZERO).unwrap();
        let mut found = Vec::new();
        while let Some(located) = cursor.try_next().unwrap() {
            found.push(located.frame.meta);
        }
        found
    }

    /// Waits until an origin is held up to `lsn`.
    async fn reaches(&self, origin: u16, lsn: u64) {
        let what = format!("node {} holds node {origin} up to {lsn}", self.id);
        eventually(&what, || {
            self.journal.written_vector().get(NodeId(origin)) >= position(lsn)
        })
        .await;
    }

    /// Checks that an origin's transactions came once each and without gap.
    async fn assert_seamless(&self, origin: u16, count: u64) {
        let mut at = Position::ZERO;
        for meta in self.journaled(origin).await {
            assert_eq!(
                meta.prev, at,
                "node {} has a gap or repetition in node {origin}",
                self.id
            );
            at = meta.last;
        }
        assert_eq!(at, position(count * TXN_BYTES));
    }

    async fn stop(&mut self) {
        if let Some(links) = self.links.take() {
            links.shutdown().await;
        }
    }

    async fn close(mut self) {
        self.stop().await;
        self.journal.close().await.unwrap();
    }
}

fn config_of(id: u16, dir: &Path, peers: &[(u16, SocketAddr)]) -> config::Config {
    config::Config {
        node: config::Node {
            name: NAMES[usize::from(id)].to_owned(),
            id: NodeId(id),
            data_dir: dir.to_owned(),
        },
        cluster: config::Cluster {
            policy: None,
            id: "river".to_owned(),
        },
        postgres: toml::from_str("dsn = 'host=/nowhere'").unwrap(),
        listen: config::Listen {
            advertise: None,
            address: "127.0.0.1:0".parse().unwrap(),
            insecure: false,
        },
        tls: None,
        peers: peers
            .iter()
            .map(|&(id, address)| config::Peer {
                name: NAMES[usize::from(id)].to_owned(),
                id: NodeId(id),
                address: address.to_string(),
            })
            .collect(),
        journal: config::Journal::default(),
        clock: config::Clock::default(),
        apply: config::Apply::default(),
        conflict_log: config::ConflictLog::default(),
        sequences: config::Sequences::default(),
        ddl: config::Ddl::default(),
        web: None,
        metrics: None,
    }
}

/// Folders and proxies of a cluster; nodes are started by the test.
struct Cluster {
    dirs: Vec<TempDir>,
    /// By dialling node, then dialled node.
    proxies: Vec<Vec<Proxy>>,
}

impl Cluster {
    async fn new(count: usize) -> Self {
        let mut proxies = Vec::new();
        for _ in 0..=count {
            let mut row = Vec::new();
            for _ in 0..=count {
                row.push(Proxy::start().await);
            }
            proxies.push(row);
        }
        Self {
            dirs: (0..=count).map(|_| tempfile::tempdir().unwrap()).collect(),
            proxies,
        }
    }

    fn proxy(&self, from: u16, to: u16) -> &Proxy {
        &self.proxies[usize::from(from)][usize::from(to)]
    }

    fn dir(&self, id: u16) -> &Path {
        self.dirs[usize::from(id)].path()
    }

    fn peers_of(&self, id: u16) -> Vec<(u16, SocketAddr)> {
        let count = u16::try_from(self.dirs.len()).unwrap();
        (1..count)
            .filter(|&other| other != id)
            .map(|other| (other, self.proxy(id, other).address))
            .collect()
    }

    /// Starts a node and leads all proxies to it.
    async fn start(&self, id: u16, change: impl FnOnce(&mut Setup)) -> Node {
        let node = Node::start(id, self.dir(id), &self.peers_of(id), change).await;
        self.lead_to(&node);
        node
    }

    fn lead_to(&self, node: &Node) {
        for row in &self.proxies {
            row[usize::from(node.id.0)].lead_to(node.links().local_addr());
        }
    }
}

/// A peer made by hand: what it says and takes is up to the test.
struct RawPeer {
    requests: mpsc::Sender<pb::PullRequest>,
    responses: Streaming<pb::PullResponse>,
    welcome: pb::Welcome,
}

async fn raw_client(address: SocketAddr) -> LinkClient<Channel> {
    let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{address}")).unwrap();
    LinkClient::new(endpoint.connect().await.unwrap()).max_decoding_message_size(limits::RESPONSE_BYTES_MAX)
}

impl RawPeer {
    /// Says `hello` and hears the answer.
    async fn greet(address: SocketAddr, hello: pb::Hello) -> Self {
        let (requests, stream) = mpsc::channel(4);
        requests
            .send(pb::PullRequest {
                hello: Some(hello),
                ..pb::PullRequest::default()
            })
            .await
            .unwrap();
        let mut client = raw_client(address).await;
        let mut responses = client
            .pull(ReceiverStream::new(stream))
            .await
            .unwrap()
            .into_inner();
        let first = responses.message().await.unwrap().unwrap();
        Self {
            requests,
            responses,
            welcome: first.welcome.unwrap(),
        }
    }

    async fn want(&self, origin: u16, after: Position, generation: u64) {
        let request = pb::PullRequest {
            has_want: true,
            want: vec![wire::entry_to_wire(NodeId(origin), after)],
            reposition: vec![u32::from(origin)],
            want_generation: generation,
            ..pb::PullRequest::default()
        };
        self.requests.send(request).await.unwrap();
    }

    async fn next(&mut self) -> pb::PullResponse {
        tokio::time::timeout(Duration::from_secs(30), self.responses.message())
            .await
            .unwrap()
            .unwrap()
            .unwrap()
    }
}

/// The hello of a proper peer of a two-node cluster.
fn hello_of(id: u16) -> pb::Hello {
    let mut who = identity(id, NAMES[usize::from(id)]);
    who.members = vec![NodeId(1), NodeId(2)];
    who.founders.clone_from(&who.members);
    who.hello(&Vector::new(), 0)
}

/// A node `a` whose only peer is `b`, at an address where nobody listens.
async fn lonely(dir: &Path) -> Node {
    let nobody = Proxy::start().await.address;
    Node::start(1, dir, &[(2, nobody)], |_| {}).await
}
