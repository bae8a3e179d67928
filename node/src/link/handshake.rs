//! Whether a peer belongs to us: pure checks of its [`pb::Hello`] against our own identity.
//!
//! In:   the peer's hello, what is remembered of it     Out: its node id, or a refusal that says what to do
//! Holds: nothing
//! Invariants: 1. every refusal has a stable code and names the remedy; 2. both ends check, so a fault that only
//!             one of them can see still stops the link; 3. nothing of a hello is trusted before all checks pass.
//! Not here: remembering incarnations (`pins.rs`), who is connected now (`peer.rs`), certificates (`tls.rs`).

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use anabranch_conflict::change::Changes;
use anabranch_proto::link as pb;
use anabranch_proto::{NodeId, Position, Vector};
use serde::{Deserialize, Serialize};

use super::limits::{PROTOCOL_NEWEST, PROTOCOL_OLDEST};
use super::wire;
use crate::config;
use crate::membership::Membership;
use crate::shared::lock;

/// What this daemon says of itself to its peers.
#[derive(Debug, Clone)]
pub struct Identity {
    /// Our node id.
    pub id: NodeId,
    /// Our node name.
    pub name: String,
    /// The cluster we belong to.
    pub cluster_id: String,
    /// Made once by `anabranch init`; tells our database from any other under the same id.
    pub incarnation: String,
    /// Made anew at each start of the daemon.
    pub boot_id: String,
    /// Hash of the cluster's conflict policy.
    pub policy_hash: String,
    /// Who may have another one for the moment.
    pub policies_under_way: PoliciesUnderWay,
    /// Ids of all nodes whose transactions we take, ourselves included, in any order.
    pub members: Vec<NodeId>,
    /// Ids of the members that the cluster began with, whatever became of them.
    pub founders: Vec<NodeId>,
    /// Ids of nodes that were dropped.
    pub dropped: Vec<NodeId>,
    /// Those of them that left by themselves.
    pub left: Vec<NodeId>,
    /// For people.
    pub software_version: String,
    /// Which versions of the link protocol it speaks.
    pub speaks: Protocols,
}

/// The versions of the link protocol that a program speaks, from the oldest to the newest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Protocols {
    /// The oldest.
    pub oldest: u32,
    /// The newest, not below `oldest`.
    pub newest: u32,
}

impl Protocols {
    /// Those of this program.
    pub const OURS: Self = Self {
        oldest: PROTOCOL_OLDEST,
        newest: PROTOCOL_NEWEST,
    };

    /// Those of the sender of a hello.
    fn of(hello: &pb::Hello) -> Self {
        let oldest = hello.protocol_version;
        let newest = match hello.protocol_newest {
            0 => oldest,
            newest => newest,
        };
        Self { oldest, newest }
    }

    /// The newest that both speak: the same, whichever of both asks.
    fn common(self, other: Self) -> Option<u32> {
        let newest = self.newest.min(other.newest);
        (newest >= self.oldest && newest >= other.oldest).then_some(newest)
    }
}

impl std::fmt::Display for Protocols {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.oldest == self.newest {
            write!(f, "{}", self.oldest)
        } else {
            write!(f, "{} to {}", self.oldest, self.newest)
        }
    }
}

/// Policies that differ from ours and are right all the same, while the policy is changed. Kept up by upkeep, asked at each hello.
#[derive(Debug, Clone, Default)]
pub struct PoliciesUnderWay(Arc<Mutex<(Changes, BTreeSet<NodeId>)>>);

impl PoliciesUnderWay {
    /// What the members have said of changes, and who the live ones are.
    pub fn set(&self, changes: Changes, live: BTreeSet<NodeId>) {
        *lock(&self.0) = (changes, live);
    }

    fn has(&self, node: NodeId, hash: &str) -> bool {
        let (changes, live) = &*lock(&self.0);
        changes.is_on_the_way(node, hash, live)
    }
}

impl Identity {
    /// Of a node that is new, or was just started, and knows nothing of the members.
    #[must_use]
    pub fn of(config: &config::Config, incarnation: &str, policy_hash: String) -> Self {
        Self {
            id: config.node.id,
            name: config.node.name.clone(),
            cluster_id: config.cluster.id.clone(),
            incarnation: incarnation.to_owned(),
            boot_id: uuid::Uuid::new_v4().to_string(),
            policy_hash,
            policies_under_way: PoliciesUnderWay::default(),
            members: Vec::new(),
            founders: Vec::new(),
            dropped: Vec::new(),
            left: Vec::new(),
            software_version: env!("CARGO_PKG_VERSION").to_owned(),
            speaks: Protocols::OURS,
        }
    }

    /// With what it knows of them.
    #[must_use]
    pub fn knowing(self, members: &Membership) -> Self {
        Self {
            members: members.live().into_iter().collect(),
            founders: members.founders().into_iter().collect(),
            dropped: members.dropped().into_keys().collect(),
            left: members.left().into_iter().collect(),
            ..self
        }
    }

    /// The members, sorted, each id once.
    #[must_use]
    pub fn sorted_members(&self) -> Vec<NodeId> {
        sorted(&self.members)
    }

    /// The hello of this moment.
    #[must_use]
    pub fn hello(&self, holds: &Vector, clock_us: i64) -> pb::Hello {
        pb::Hello {
            protocol_version: self.speaks.oldest,
            protocol_newest: self.speaks.newest,
            cluster_id: self.cluster_id.clone(),
            node_id: u32::from(self.id.0),
            node_name: self.name.clone(),
            incarnation: self.incarnation.clone(),
            policy_hash: self.policy_hash.clone(),
            clock_us,
            software_version: self.software_version.clone(),
            founders: sorted(&self.founders)
                .into_iter()
                .map(|id| u32::from(id.0))
                .collect(),
            boot_id: self.boot_id.clone(),
            holds: wire::vector_to_wire(holds),
        }
    }
}

fn sorted(ids: &[NodeId]) -> Vec<NodeId> {
    let mut ids = ids.to_vec();
    ids.sort_unstable();
    ids.dedup();
    ids
}

/// Stable names of the reasons for a refusal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum RefusalCode {
    /// The hello is missing or incomplete.
    Malformed,
    /// No version of the protocol that both speak.
    ProtocolVersion,
    /// Another cluster.
    ClusterId,
    /// Our own node id.
    OwnId,
    /// A node id that is not configured here.
    UnknownNode,
    /// A known id under another name.
    NameMismatch,
    /// A known id, but another database.
    Incarnation,
    /// Another conflict policy.
    PolicyHash,
    /// Another list of the members of the beginning.
    Members,
    /// The node was dropped.
    Dropped,
    /// The node has left.
    Left,
    /// The node is connected already, by another daemon.
    DuplicateNode,
    /// The certificate is not the node's.
    CertificateName,
    /// The answering daemon's database went back in time.
    WentBack,
    /// The node that answers is not the one that is configured under its address.
    WrongPeer,
}

impl RefusalCode {
    /// The code as it travels and is documented.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::ProtocolVersion => "protocol_version",
            Self::ClusterId => "cluster_id",
            Self::OwnId => "own_id",
            Self::UnknownNode => "unknown_node",
            Self::NameMismatch => "name_mismatch",
            Self::Incarnation => "incarnation",
            Self::PolicyHash => "policy_hash",
            Self::Members => "members",
            Self::Dropped => "dropped",
            Self::Left => "left",
            Self::DuplicateNode => "duplicate_node",
            Self::CertificateName => "certificate_name",
            Self::WentBack => "went_back",
            Self::WrongPeer => "wrong_peer",
        }
    }
}

/// Why two daemons do not exchange anything, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{text} [{code}]")]
pub struct Refusal {
    /// Stable code; a [`RefusalCode`] of this or another version.
    pub code: String,
    /// For people: what does not fit, and what to do.
    pub text: String,
}

impl Refusal {
    pub(super) fn new(code: RefusalCode, text: String) -> Self {
        Self {
            code: code.as_str().to_owned(),
            text,
        }
    }

    /// Is this the reason?
    #[must_use]
    pub fn is(&self, code: RefusalCode) -> bool {
        self.code == code.as_str()
    }
}

/// Checks a hello against our identity and configured peers.
///
/// # Errors
/// The first thing that does not fit.
pub(super) fn check(ours: &Identity, peers: &[config::Peer], hello: &pb::Hello) -> Result<NodeId, Refusal> {
    check_speech(ours, hello)?;
    let id = check_name(ours, peers, hello)?;
    check_agreement(ours, hello)?;
    Ok(id)
}

/// Checks the hello of a node that is no member yet: all but who is one.
///
/// # Errors
/// The first thing that does not fit.
pub(super) fn check_joiner(ours: &Identity, hello: &pb::Hello) -> Result<NodeId, Refusal> {
    check_speech(ours, hello)?;
    check_policy(ours, hello)?;
    let Some(id) = wire::node_id(hello.node_id) else {
        return Err(malformed(&format!("{} is not a node id", hello.node_id)));
    };
    if id == ours.id {
        let text = format!(
            "node id {id} is that of node `{}`: choose another `node.id`",
            ours.name
        );
        return Err(Refusal::new(RefusalCode::OwnId, text));
    }
    Ok(id)
}

/// The version of the link protocol that both sides of a hello speak to each other.
///
/// # Errors
/// When there is none.
pub(super) fn protocol(ours: &Identity, hello: &pb::Hello) -> Result<u32, Refusal> {
    let theirs = Protocols::of(hello);
    ours.speaks.common(theirs).ok_or_else(|| {
        Refusal::new(
            RefusalCode::ProtocolVersion,
            format!(
                "node `{}` (anabranch {}) speaks link protocol {theirs}, node `{}` (anabranch {}) speaks {}: run versions of \
                 anabranch on all members that share a protocol",
                hello.node_name, hello.software_version, ours.name, ours.software_version, ours.speaks
            ),
        )
    })
}

/// A common protocol, same cluster, nothing missing.
fn check_speech(ours: &Identity, hello: &pb::Hello) -> Result<(), Refusal> {
    protocol(ours, hello)?;
    if hello.cluster_id != ours.cluster_id {
        return Err(Refusal::new(
            RefusalCode::ClusterId,
            format!(
                "node `{}` belongs to cluster `{}`, node `{}` to cluster `{}`: give both the same `cluster.id`, or \
                 correct the peer's address",
                hello.node_name, hello.cluster_id, ours.name, ours.cluster_id
            ),
        ));
    }
    if hello.incarnation.is_empty() || hello.boot_id.is_empty() || hello.node_name.is_empty() {
        return Err(malformed(
            "its hello lacks the node's name, incarnation or boot id",
        ));
    }
    Ok(())
}

/// The refusal of a peer that does not speak as a peer does.
#[must_use]
pub(super) fn malformed(what: &str) -> Refusal {
    Refusal::new(
        RefusalCode::Malformed,
        format!("{what}: check that the peer's address leads to an anabranch daemon of this version"),
    )
}

/// A configured member under its configured name.
fn check_name(ours: &Identity, peers: &[config::Peer], hello: &pb::Hello) -> Result<NodeId, Refusal> {
    let Some(id) = wire::node_id(hello.node_id) else {
        return Err(malformed(&format!("{} is not a node id", hello.node_id)));
    };
    if id == ours.id {
        let remedy = if hello.boot_id == ours.boot_id {
            "a configured peer address leads back to this daemon itself: correct `peers.address`"
        } else {
            "two daemons are configured with the same `node.id`: stop one of them and give it an id of its own"
        };
        return Err(Refusal::new(
            RefusalCode::OwnId,
            format!(
                "node `{}` has the node id {id} of node `{}`: {remedy}",
                hello.node_name, ours.name
            ),
        ));
    }
    if ours.left.contains(&id) {
        return Err(Refusal::new(
            RefusalCode::Left,
            format!(
                "node `{}` (id {id}) has left the cluster, as it was told to. Stop its daemon and run `anabranch remove` \
                 there; to take part again, empty the database, give it an id that was never used, and `anabranch join` it",
                hello.node_name
            ),
        ));
    }
    if ours.dropped.contains(&id) {
        return Err(Refusal::new(
            RefusalCode::Dropped,
            format!(
                "node `{}` (id {id}) was dropped from the cluster: what it had written and no member held is not in it. \
                 Stop its daemon, run `anabranch remove --without-leaving` there, empty the database and node.data_dir, give \
                 it an id that was never used, and `anabranch join` it",
                hello.node_name
            ),
        ));
    }
    let Some(peer) = peers.iter().find(|peer| peer.id == id) else {
        return Err(Refusal::new(
            RefusalCode::UnknownNode,
            format!(
                "node `{}` (id {id}) is no member that node `{}` knows: correct its `node.id`, or let it join with \
                 `anabranch join` (a cluster that has not begun: name it in `peers` at every node and run `init` again)",
                hello.node_name, ours.name
            ),
        ));
    };
    if peer.name != hello.node_name {
        return Err(Refusal::new(
            RefusalCode::NameMismatch,
            format!(
                "node id {id} calls itself `{}` but is `{}` in the configuration of node `{}`: make `node.name` there \
                 and `peers.name` here agree",
                hello.node_name, peer.name, ours.name
            ),
        ));
    }
    Ok(id)
}

/// Same rules.
fn check_policy(ours: &Identity, hello: &pb::Hello) -> Result<(), Refusal> {
    let is_under_way = |node: NodeId| ours.policies_under_way.has(node, &hello.policy_hash);
    if hello.policy_hash != ours.policy_hash && !wire::node_id(hello.node_id).is_some_and(is_under_way) {
        return Err(Refusal::new(
            RefusalCode::PolicyHash,
            format!(
                "node `{}` resolves conflicts by policy {}, node `{}` by {}; they would end with different rows: \
                 install the same policy file on both and restart the one that is behind (docs/policies.md, `Changing it`)",
                hello.node_name, hello.policy_hash, ours.name, ours.policy_hash
            ),
        ));
    }
    Ok(())
}

/// Same rules, same beginning.
fn check_agreement(ours: &Identity, hello: &pb::Hello) -> Result<(), Refusal> {
    check_policy(ours, hello)?;
    let theirs: Vec<NodeId> = hello
        .founders
        .iter()
        .filter_map(|&id| wire::node_id(id))
        .collect();
    let founders = sorted(&ours.founders);
    if theirs != founders || theirs.len() != hello.founders.len() {
        return Err(Refusal::new(
            RefusalCode::Members,
            format!(
                "the cluster of node `{}` began with the members {:?}, that of node `{}` with {:?}: before the first \
                 `init`, make `node.id` and `peers` name the same nodes on both; set up anew the one that was wrong",
                hello.node_name,
                hello.founders,
                ours.name,
                founders.iter().map(|id| id.0).collect::<Vec<_>>()
            ),
        ));
    }
    Ok(())
}

/// Our own server is older than what a peer has of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, thiserror::Error)]
#[error(
    "node `{peer}` holds our transactions up to {peer_holds}, but our database and journal end at {own}: this database \
     was restored from an older copy (or lost its newest commits). Do not let it write; take it out of the cluster and \
     join it again as a new node, or restore a copy that reaches {peer_holds} (docs/errors/the-server-went-back.md)"
)]
pub struct WentBack {
    /// The peer that knows more of us than we do.
    pub peer: String,
    /// Our stream's position that it holds.
    pub peer_holds: Position,
    /// Our own newest position.
    pub own: Position,
}

impl WentBack {
    /// The same as a refusal for whoever connects to us meanwhile.
    #[must_use]
    pub fn refusal(&self, ours: &Identity) -> Refusal {
        Refusal::new(
            RefusalCode::WentBack,
            format!(
                "node `{}` went back in time: its own stream ends at {} but `{}` holds it up to {}: its operator must \
                 restore a newer copy, or take it out and join it again as a new node",
                ours.name, self.own, self.peer, self.peer_holds
            ),
        )
    }
}

/// Does a peer hold more of our own stream than we have ourselves? Only meaningful once our decoder has caught up
/// with our server: before that, what a crash took from the journal is still being decoded again.
#[must_use]
pub(super) fn went_back(ours: &Identity, own: Position, peer: &str, peer_holds: &Vector) -> Option<WentBack> {
    let held = peer_holds.get(ours.id);
    (held > own).then(|| WentBack {
        peer: peer.to_owned(),
        peer_holds: held,
        own,
    })
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// What is wrong with a hello, the code of the refusal, and a part of its text.
    pub(crate) type Case = (fn(&mut pb::Hello), &'static str, &'static str);

    pub(crate) fn identity(id: u16, name: &str) -> Identity {
        Identity {
            id: NodeId(id),
            name: name.to_owned(),
            cluster_id: "river".to_owned(),
            incarnation: format!("incarnation-{id}"),
            boot_id: format!("boot-{id}"),
            policy_hash: "p1".to_owned(),
            policies_under_way: PoliciesUnderWay::default(),
            members: vec![NodeId(2), NodeId(1), NodeId(3)],
            founders: vec![NodeId(2), NodeId(1), NodeId(3)],
            dropped: vec![NodeId(8), NodeId(9)],
            left: vec![NodeId(8)],
            software_version: "0.1.0".to_owned(),
            speaks: Protocols::OURS,
        }
    }

    const fn from_to(oldest: u32, newest: u32) -> Protocols {
        Protocols { oldest, newest }
    }

    fn peers() -> Vec<config::Peer> {
        [(2, "b"), (3, "c")]
            .map(|(id, name)| config::Peer {
                name: name.to_owned(),
                id: NodeId(id),
                address: String::new(),
            })
            .to_vec()
    }

    fn refused(change: fn(&mut pb::Hello)) -> Refusal {
        let mut hello = identity(2, "b").hello(&Vector::new(), 0);
        change(&mut hello);
        check(&identity(1, "a"), &peers(), &hello).unwrap_err()
    }

    #[test]
    fn a_member_that_agrees_is_welcome() {
        let hello = identity(2, "b").hello(&Vector::new(), 0);
        assert_eq!(check(&identity(1, "a"), &peers(), &hello), Ok(NodeId(2)));
    }

    #[test]
    fn two_programs_speak_the_newest_protocol_that_both_know() {
        for (a, b, both) in [
            (from_to(1, 1), from_to(1, 1), Some(1)),
            (from_to(1, 1), from_to(1, 3), Some(1)),
            (from_to(1, 3), from_to(2, 5), Some(3)),
            (from_to(2, 3), from_to(1, 9), Some(3)),
            (from_to(1, 2), from_to(3, 4), None),
            // Nobody says so, and it is no range.
            (from_to(1, 5), from_to(4, 2), None),
        ] {
            let (mut of_a, mut of_b) = (identity(1, "a"), identity(2, "b"));
            (of_a.speaks, of_b.speaks) = (a, b);
            let hello = |of: &Identity| of.hello(&Vector::new(), 0);
            assert_eq!(protocol(&of_a, &hello(&of_b)).ok(), both, "{a} and {b}");
            assert_eq!(protocol(&of_b, &hello(&of_a)).ok(), both, "{b} and {a}");
        }
        let (mut ours, mut theirs) = (identity(1, "a"), identity(2, "b"));
        (ours.speaks, theirs.speaks) = (from_to(4, 6), from_to(2, 3));
        let refusal = protocol(&ours, &theirs.hello(&Vector::new(), 0)).unwrap_err();
        assert!(refusal.is(RefusalCode::ProtocolVersion));
        assert!(
            refusal.text.contains("speaks link protocol 2 to 3, node `a`"),
            "{refusal}"
        );
        assert!(refusal.text.contains("speaks 4 to 6: run versions"), "{refusal}");
    }

    #[test]
    fn a_program_that_knows_no_ranges_is_shown_the_oldest_protocol_and_shows_its_only_one() {
        let mut ours = identity(1, "a");
        ours.speaks = from_to(1, 2);
        assert_eq!(ours.hello(&Vector::new(), 0).protocol_version, 1);
        let mut hello = identity(2, "b").hello(&Vector::new(), 0);
        hello.protocol_newest = 0;
        assert_eq!(protocol(&ours, &hello), Ok(1));
        ours.speaks = from_to(2, 3);
        let refusal = protocol(&ours, &hello).unwrap_err();
        assert!(
            refusal.text.contains("speaks link protocol 1, node `a`"),
            "{refusal}"
        );
    }

    #[test]
    fn every_disagreement_is_refused_with_its_code_and_its_remedy() {
        let cases: [Case; 14] = [
            (
                |h| (h.protocol_version, h.protocol_newest) = (9, 9),
                "protocol_version",
                "run versions of anabranch on all members",
            ),
            (
                |h| h.cluster_id = "lake".into(),
                "cluster_id",
                "give both the same `cluster.id`",
            ),
            (
                |h| h.incarnation.clear(),
                "malformed",
                "check that the peer's address",
            ),
            (|h| h.node_id = 0, "malformed", "0 is not a node id"),
            (|h| h.node_id = 1, "own_id", "give it an id of its own"),
            (
                |h| (h.node_id, h.boot_id) = (1, "boot-1".into()),
                "own_id",
                "leads back to this daemon itself",
            ),
            (
                |h| h.node_id = 7,
                "unknown_node",
                "let it join with `anabranch join`",
            ),
            (|h| h.node_id = 8, "left", "run `anabranch remove`"),
            (
                |h| h.node_id = 9,
                "dropped",
                "`anabranch remove --without-leaving` there",
            ),
            (
                |h| h.node_name = "z".into(),
                "name_mismatch",
                "make `node.name` there and `peers.name` here agree",
            ),
            (
                |h| h.policy_hash = "p2".into(),
                "policy_hash",
                "install the same policy file on both",
            ),
            (
                |h| h.founders = vec![1, 2],
                "members",
                "name the same nodes on both",
            ),
            (
                |h| h.founders = vec![1, 2, 3, 3],
                "members",
                "name the same nodes on both",
            ),
            (
                |h| h.founders = vec![1, 2, 3, 90_000],
                "members",
                "name the same nodes on both",
            ),
        ];
        for (change, code, remedy) in cases {
            let refusal = refused(change);
            assert_eq!(refusal.code, code, "{refusal}");
            assert!(refusal.text.contains(remedy), "{refusal}");
        }
    }

    #[test]
    fn a_peer_that_knows_more_of_us_than_we_do_means_that_we_went_back() {
        let ours = identity(1, "a");
        let holds: Vector = [(NodeId(1), Position::new(1, 50))].into_iter().collect();
        assert_eq!(went_back(&ours, Position::new(1, 50), "b", &holds), None);
        let found = went_back(&ours, Position::new(1, 49), "b", &holds).unwrap();
        assert_eq!(
            (found.peer_holds, found.own),
            (Position::new(1, 50), Position::new(1, 49))
        );
        assert!(found.to_string().contains("join it again as a new node"));
        assert_eq!(found.refusal(&ours).code, "went_back");
    }
}
