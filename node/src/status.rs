//! What a daemon says of itself: the document behind `anabranch status`.
//!
//! Fields are only ever added, so a reader of one release understands a daemon of another.

use std::collections::BTreeMap;

use anabranch_proto::{Lsn, NodeId, Position};
use serde::{Deserialize, Serialize};

/// The whole document.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Status {
    /// Who it is.
    pub node: NodeStatus,
    /// What each node is called that is, or ever was, a member, by its id.
    pub names: BTreeMap<u16, String>,
    /// How far its streams are.
    pub positions: Positions,
    /// Its links.
    pub peers: Vec<PeerStatus>,
    /// Members that are being dropped.
    pub dropping: Vec<Dropping>,
    /// How far this node is with leaving; none while it stays.
    pub leaving: Option<Leaving>,
    /// What decides conflicts, and a change of it.
    pub policy: PolicyStatus,
    /// DDL of other nodes that cannot be run here: all transactions of such a node wait.
    pub ddl: Vec<StuckDdl>,
    /// Its durable log.
    pub journal: JournalStatus,
    /// What was applied since the start.
    pub apply: ApplyStatus,
    /// The row index.
    pub index: IndexStatus,
    /// What somebody must look at, oldest first.
    pub alarms: Vec<Alarm>,
}

/// Who the daemon is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NodeStatus {
    /// Node id.
    pub id: u16,
    /// Name.
    pub name: String,
    /// Cluster.
    pub cluster: String,
    /// Made once by `init`.
    pub incarnation: String,
    /// Made anew at each start.
    pub boot_id: String,
    /// `starting`, `running`, `stopping`, or what it waits for.
    pub state: String,
    /// RFC 3339.
    pub started_at: String,
}

/// How far the node's streams are.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Positions {
    /// End of what was decoded of the server's WAL.
    pub decoded_lsn: Lsn,
    /// End of what is durable in the journal and confirmed to the slot.
    pub journaled: Lsn,
    /// Node id -> position: everything of each node that is applied here.
    pub applied: BTreeMap<u16, Position>,
    /// Node id -> position: what every member is known to have applied.
    pub stable: BTreeMap<u16, Position>,
}

/// One link. The LSNs are of this node's own stream, as `pg_stat_replication` names them.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct PeerStatus {
    /// Node id.
    pub id: u16,
    /// Name.
    pub name: String,
    /// Is there a link?
    pub connected: bool,
    /// Since when one of its two directions has been closed, RFC 3339; none while both are open.
    pub down_since: Option<String>,
    /// Why one side refused the other.
    pub refusal: Option<String>,
    /// Offered to the peer: over an open link all that there is, as fast as it takes it.
    pub sent_lsn: Lsn,
    /// Received by it, as far as it says so: it speaks of what is durable, so this is `flush_lsn`.
    pub write_lsn: Lsn,
    /// Durable in its journal.
    pub flush_lsn: Lsn,
    /// Applied there.
    pub replay_lsn: Lsn,
    /// WAL between this node's newest commit and `replay_lsn`, bytes.
    pub lag_bytes: u64,
    /// Age of the oldest commit of this node that is not applied there, seconds.
    pub lag_seconds: f64,
    /// The peer's clock minus ours, microseconds; none when never measured.
    pub clock_offset_us: Option<i64>,
    /// Round trip, microseconds.
    pub rtt_us: Option<u64>,
    /// The member over which its transactions arrive while there is no direct link, or nothing comes over it.
    pub relayed_by: Option<NodeId>,
    /// The last failure of the link.
    pub last_error: Option<String>,
}

impl PeerStatus {
    /// For how many seconds a direction has been closed, by this machine's clock.
    #[must_use]
    pub fn down_for(&self) -> Option<f64> {
        let since: jiff::Timestamp = self.down_since.as_ref()?.parse().ok()?;
        Some(
            jiff::Timestamp::now()
                .duration_since(since)
                .as_secs_f64()
                .max(0.0),
        )
    }
}

/// DDL that cannot be run at this node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct StuckDdl {
    /// Its id in `anabranch.ddl`.
    pub id: String,
    /// Node that it was run at first, whose transactions wait.
    pub node: u16,
    /// The statement.
    pub command: String,
    /// Since when, RFC 3339.
    pub since: String,
    /// Is it only that a lock is not granted?
    pub waits_for_lock: bool,
    /// The server's words, without the statement.
    pub error: String,
    /// DDL of other nodes that neither saw this nor was seen by it, as `node beta (2): ALTER TABLE ...`.
    pub concurrent: Vec<String>,
    /// All of it for people, and what to do.
    pub text: String,
}

/// What decides conflicts.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PolicyStatus {
    /// Hash of the policy in force; of the one of before, while it is changed.
    pub hash: String,
    /// A change that is not at its end.
    pub change: Option<PolicyChange>,
}

/// A change of the policy while the cluster runs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PolicyChange {
    /// Its id.
    pub id: String,
    /// Name of the node that asked for it.
    pub asked_by: String,
    /// Hash of the policy to come.
    pub next_hash: String,
    /// `asking`: members are asked, and nothing is decided by it. `made`: what is written from now on is decided by the new policy.
    /// `over`: nothing is decided by the policy of before any more; members go over to the new one alone.
    pub phase: String,
    /// Names of the members that it waits for.
    pub waits_for: Vec<String>,
    /// The same for people.
    pub text: String,
}

/// [`Leaving::phase`] of the last member.
pub const ALONE: &str = "alone";

/// A node on its way out.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Leaving {
    /// `draining`: what it wrote is not everywhere yet, or may still be written, and it may stay after all. `goodbye`: it
    /// has said that it leaves, and the others close its stream. `left`: it is no member any more. `alone`: all others have left or were
    /// dropped meanwhile, and there is nobody to leave.
    pub phase: String,
    /// What it waits for: names of members, or sessions in words.
    pub waits_for: Vec<String>,
    /// The same for people.
    pub text: String,
}

/// A member that is being dropped.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Dropping {
    /// Node id.
    pub id: u16,
    /// Name.
    pub name: String,
    /// Does it leave by its own will, rather than being lost?
    pub leaves: bool,
    /// Names of the members that it waits for.
    pub waits_for: Vec<String>,
    /// The same for people, and what it waits for them to do.
    pub text: String,
}

/// The journal.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct JournalStatus {
    /// Bytes on disk.
    pub bytes: u64,
    /// Bytes past which transactions of this node may wait (`journal.max_size_mib`).
    pub max_bytes: u64,
    /// Segment files.
    pub segments: u64,
    /// Why it takes nothing more, or nothing more of this node's; none while it takes everything.
    pub stalled: Option<String>,
}

/// Counters since the start, and the present state of applying.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ApplyStatus {
    /// Transactions of peers applied.
    pub txns: u64,
    /// Rows in them.
    pub rows: u64,
    /// Apply transactions.
    pub batches: u64,
    /// Conflicts resolved.
    pub conflicts: u64,
    /// Losing writes that were only counted in `anabranch.conflict_storm`.
    #[serde(default)]
    pub conflicts_counted: u64,
    /// Rows that took the slow path.
    pub slow_path_rows: u64,
    /// Apply transactions that had to start again.
    pub retries: u64,
    /// Local transactions stamped.
    pub local_txns: u64,
    /// Rows put right when the decoder met a local version.
    pub repairs: u64,
    /// Rows that were not as the stream says, since the start: nodes held different ones.
    #[serde(default)]
    pub drifted_rows: u64,
    /// Rows in quarantine now.
    pub quarantined: u64,
    /// Tables that are not replicated here, and how many changes of each were passed over since the start: those that were taken out
    /// here, and others of which there were any.
    #[serde(default)]
    pub passed_over: BTreeMap<String, u64>,
    /// The last error that made a batch start again, since the start; it may be over.
    pub last_error: Option<String>,
    /// What applying waits for.
    pub waiting_for: Option<String>,
}

/// The row index.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct IndexStatus {
    /// Rows with an entry.
    pub entries: u64,
    /// Memory, bytes.
    pub bytes: u64,
    /// Is part of it on disk?
    pub overflowed: bool,
}

/// Something that somebody must look at.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Alarm {
    /// Which, one of [`crate::alarms::NAMES`]: the same for as long as the alarm exists.
    pub name: String,
    /// Since when, RFC 3339.
    pub since: String,
    /// What, and what to do.
    pub text: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_document_of_another_release_is_understood() {
        let status: Status = serde_json::from_str(
            r#"{"node": {"name": "a", "new_field": 1}, "positions": {"applied": {"2": {"epoch": 1, "lsn": "0/16"}}}}"#,
        )
        .unwrap();
        assert_eq!(status.node.name, "a");
        assert_eq!(status.positions.applied.get(&2), Some(&Position::new(1, 0x16)));
        let again: Status = serde_json::from_value(serde_json::to_value(&status).unwrap()).unwrap();
        assert_eq!(again, status);
    }
}
