//! A change of the policy while the cluster runs, as the members tell it to each other: facts in `anabranch.policy_change` that
//! travel in the stream.
//!
//! In:   rows of that table, the policy file        Out: the policies that are in force here; facts
//! Holds: nothing
//! Invariants: 1. a fact is said once and never changed; a member's vote is one row, so nobody votes twice; 2. what is in force is
//!        a function of the facts, of what this node ran with last, and of the policy file
//! On crash: read again
//! Not here: what the facts mean and why that is right (`anabranch_conflict::change`); who says what when
//! (`crate::daemon`, `policy_watch`); what a table must be like ([`fit`])

pub mod fit;
pub mod force;

use std::collections::{BTreeMap, BTreeSet};

use anabranch_conflict::change::{Changes, Point, Said, Vote};
use anabranch_conflict::policy::{Faults, Policies};
use anabranch_proto::row::RowImage;
use anabranch_proto::schema::TableDesc;
use anabranch_proto::wire::Malformed;
use anabranch_proto::{Lsn, NodeId, Position};
use serde::{Deserialize, Serialize};
use tokio_postgres::Client;
use uuid::Uuid;

use crate::config::{Config, PolicyError, PolicyFile};
use crate::membership::{Membership, binary, number};

/// Name of the table in schema `anabranch`.
pub const TABLE: &str = "policy_change";

/// Names a change.
pub type ChangeId = Uuid;

/// A name for a change.
#[must_use]
pub fn new_id() -> ChangeId {
    Uuid::new_v4()
}

/// A policy as it is written: the file, and the scripts that it names.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Source {
    /// The file's text.
    pub text: String,
    /// The scripts' texts, by the names in the file.
    #[serde(default)]
    pub scripts: BTreeMap<String, String>,
}

impl Source {
    /// What stands in a file, whoever is named in it.
    ///
    /// # Errors
    /// When it cannot be read, or anything in it is wrong but names of nodes.
    pub fn of_file(config: &Config, path: &std::path::Path) -> Result<Self, PolicyError> {
        config.policy_file_in(path).map(PolicyFile::into_source)
    }

    /// The policies, where nodes are called so.
    ///
    /// # Errors
    /// All that is wrong.
    pub fn parse(&self, names: &BTreeMap<String, NodeId>) -> Result<Policies, Faults> {
        let read = |name: &str| {
            let text = self.scripts.get(name).cloned();
            text.ok_or_else(|| "it did not come with the policy".to_owned())
        };
        Policies::parse(&self.text, names, read)
    }
}

/// What is asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Body {
    /// The policy of before, which must be the one in force.
    pub former: Source,
    /// Its hash.
    pub former_hash: String,
    /// The one to come.
    pub next: Source,
    /// Its hash.
    pub next_hash: String,
    /// What the nodes were called when it was asked for, each by its id: a policy may name one that is no member any more, or whose
    /// name another has by now.
    pub nodes: BTreeMap<String, u16>,
}

impl Body {
    /// What nodes are called, for [`Self::nodes`]: all that ever were members, and of two of one name the one that still is.
    #[must_use]
    pub fn names(members: &Membership) -> BTreeMap<String, u16> {
        let of_all = members.names().into_iter();
        let mut names: BTreeMap<String, u16> = of_all.map(|(id, name)| (name, id.0)).collect();
        names.extend(members.live().into_iter().map(|id| (members.name(id), id.0)));
        names
    }
}

/// The same, as policies are read with them.
#[must_use]
pub fn ids(nodes: &BTreeMap<String, u16>) -> BTreeMap<String, NodeId> {
    let ids = nodes.iter();
    ids.map(|(name, id)| (name.clone(), NodeId(*id))).collect()
}

/// All that is known of changes.
#[derive(Debug, Clone, Default)]
pub struct Known {
    /// What the members have said.
    pub changes: Changes,
    /// What they were asked for.
    pub bodies: BTreeMap<Uuid, Body>,
}

/// The table as it is now; nothing where an older release made the schema.
///
/// # Errors
/// When it cannot be read.
pub async fn read(sql: &Client) -> Result<Known, tokio_postgres::Error> {
    let mut known = Known::default();
    let there = "SELECT to_regclass('anabranch.policy_change') IS NOT NULL";
    if !sql.query_one(there, &[]).await?.try_get::<_, bool>(0)? {
        return Ok(known);
    }
    let rows = sql
        .query(
            "SELECT change_id::text, fact, node_id, ready, body, number, point_node, epoch, (lsn - '0/0')::int8 \
             FROM anabranch.policy_change",
            &[],
        )
        .await?;
    for row in rows {
        let (id, fact): (String, String) = (row.try_get(0)?, row.try_get(1)?);
        let node: i32 = row.try_get(2)?;
        let (Ok(id), Some(node)) = (Uuid::parse_str(&id), node_of(node)) else {
            continue;
        };
        let (ready, body): (bool, String) = (row.try_get(3)?, row.try_get(4)?);
        let said = match fact.as_str() {
            "asked" => {
                // One that this release cannot read stays unknown, and is refused.
                let Ok(body) = serde_json::from_str::<Body>(&body) else {
                    continue;
                };
                let said = Said::Asked {
                    former: body.former_hash.clone(),
                    next: body.next_hash.clone(),
                    number: row.try_get(5)?,
                };
                known.bodies.insert(id, body);
                said
            }
            "voted" if ready => Said::Voted(Vote::Ready),
            "voted" => Said::Voted(Vote::Refused(body)),
            "passed" => {
                let (at, epoch, lsn): (i32, i64, i64) = (row.try_get(6)?, row.try_get(7)?, row.try_get(8)?);
                let Some(at) = node_of(at) else { continue };
                Said::Passed(Point {
                    node: at,
                    position: Position {
                        epoch: u32::try_from(epoch).unwrap_or(0),
                        lsn: Lsn(u64::try_from(lsn).unwrap_or(0)),
                    },
                })
            }
            "done" => Said::Done,
            "switched" => Said::Switched,
            _ => continue,
        };
        known.changes.add(id, node, said);
    }
    Ok(known)
}

fn node_of(id: i32) -> Option<NodeId> {
    u16::try_from(id).ok().map(NodeId)
}

/// Says a fact at this node: from here it travels in the node's stream. What was said before stays as it was; tells whether it is
/// new.
///
/// # Errors
/// When the statement fails.
pub async fn say(
    sql: &Client,
    (id, asked_by, node): (Uuid, NodeId, NodeId),
    said: &Said,
    body: Option<&Body>,
) -> Result<bool, tokio_postgres::Error> {
    let (mut ready, mut text, mut number, mut point) = (true, String::new(), 0_i64, None);
    let fact = match said {
        Said::Asked { number: of, .. } => {
            number = *of;
            text = body
                .and_then(|body| serde_json::to_string(body).ok())
                .unwrap_or_default();
            "asked"
        }
        Said::Voted(vote) => {
            if let Vote::Refused(why) = vote {
                (ready, text) = (false, why.clone());
            }
            "voted"
        }
        Said::Passed(at) => {
            point = Some(*at);
            "passed"
        }
        Said::Done => "done",
        Said::Switched => "switched",
    };
    let (point_node, at) = point.map_or((0, Position::ZERO), |point| (point.node.0, point.position));
    // `local`: it must be durable, and visible here once it is decoded, whatever a standby does.
    let sql_text = "WITH s AS (SELECT set_config('synchronous_commit', 'local', true), \
            set_config('transaction_read_only', 'off', true)) \
        INSERT INTO anabranch.policy_change \
            (change_id, fact, node_id, asked_by, ready, body, number, point_node, epoch, lsn) \
        SELECT $1::text::uuid, $2, $3, $4, $5, $6, $7, $8, $9, $10::text::pg_lsn FROM s ON CONFLICT DO NOTHING";
    let written = sql
        .execute(
            sql_text,
            &[
                &id.to_string(),
                &fact,
                &i32::from(node.0),
                &i32::from(asked_by.0),
                &ready,
                &text,
                &number,
                &i32::from(point_node),
                &i64::from(at.epoch),
                &at.lsn.to_string(),
            ],
        )
        .await?;
    Ok(written > 0)
}

/// The change that a row of the table makes, if it is the vote that makes one: that of the node that asked.
///
/// # Errors
/// When a column is missing or unreadable.
pub(crate) fn makes(table: &TableDesc, row: &RowImage) -> Result<Option<Uuid>, Malformed> {
    let is_made = binary(table, row, "fact")? == b"voted"
        && binary(table, row, "ready")? == [1]
        && number::<4>(table, row, "node_id")? == number::<4>(table, row, "asked_by")?;
    if !is_made {
        return Ok(None);
    }
    let id = binary(table, row, "change_id")?;
    Uuid::from_slice(id)
        .map(Some)
        .map_err(|_| Malformed("a change id that is none"))
}

/// Names of nodes, for people.
#[must_use]
pub fn names(members: &Membership, nodes: &BTreeSet<NodeId>) -> Vec<String> {
    nodes.iter().map(|&node| members.name(node)).collect()
}
