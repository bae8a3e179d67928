//! Who is a member: facts that only grow, in `anabranch.member`, agreed through the stream.
//!
//! In:   rows of `anabranch.member` (at start from the table, then as they are decoded or applied)
//! Out:  the live members, who is closed and where, who is not ready yet
//! Holds: one fact for each (node, kind), and where every member speaks for itself, for each of them
//! Invariants: 1. a fact is never changed or taken back, so the order of arrival does not matter; 2. a node id is
//!        used once: dropped is for ever; 3. a fact that changes the live members is met *before* anything that
//!        comes with it or after it in its stream may be called stable (`docs/design.md`, section 9)
//! On crash: read from the table; what is in the WAL after it is met again, and changes nothing
//! Not here: making facts (`crate::donor`, `crate::admin`), the restart of the stages (`crate::daemon`)

use std::collections::{BTreeMap, BTreeSet};

use anabranch_proto::row::{Cell, RowImage};
use anabranch_proto::schema::TableDesc;
use anabranch_proto::wire::Malformed;
use anabranch_proto::{Lsn, NodeId, Position};
use tokio_postgres::Client;

use crate::config;

/// Name of the table in schema `anabranch`.
pub const TABLE: &str = "member";

/// What is said of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FactKind {
    /// It was there when the cluster began. Written by `init`, at every node by itself.
    Founder,
    /// It joins, with a copy of the saying node's rows of a later place.
    Joined,
    /// It has heard that every member knows it, and takes writes.
    Ready,
    /// It shall be no member any more: nobody takes anything from it directly from here on. A node that leaves says it of
    /// itself.
    Dropping,
    /// So far does the saying member durably hold the stream of a node that is dropping; it takes nothing directly from
    /// any node that it knows to be dropping. Said again when another is dropped: the furthest counts.
    Held,
    /// It is no member any more; its stream ends at the fact's position.
    Dropped,
}

impl FactKind {
    /// As in the column `fact`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Founder => "founder",
            Self::Joined => "joined",
            Self::Ready => "ready",
            Self::Dropping => "dropping",
            Self::Held => "held",
            Self::Dropped => "dropped",
        }
    }

    fn parse(text: &str) -> Option<Self> {
        [
            Self::Founder,
            Self::Joined,
            Self::Ready,
            Self::Dropping,
            Self::Held,
            Self::Dropped,
        ]
        .into_iter()
        .find(|kind| kind.as_str() == text)
    }
}

/// One row of `anabranch.member`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fact {
    /// Whom it is about.
    pub node: NodeId,
    /// What it says.
    pub kind: FactKind,
    /// The node's name.
    pub name: String,
    /// `host:port` where its daemon is reached, unless a configuration says otherwise.
    pub address: String,
    /// Its incarnation; empty where that is not known.
    pub incarnation: String,
    /// Where its stream ends, for [`FactKind::Dropped`]; how far it is held, for [`FactKind::Held`].
    pub position: Position,
    /// The member that says so.
    pub by: NodeId,
}

/// What a new fact means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// It was known, or says nothing new.
    None,
    /// It is news, but the live members stay the same.
    Detail,
    /// There is another set of live members.
    Live,
}

/// Whom a fact is about, its kind, and, where every member says its own, who says so and what.
type Key = (NodeId, FactKind, NodeId, Position);

/// All facts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Membership(BTreeMap<Key, Fact>);

/// The key of a kind of which one fact is enough.
const fn only(node: NodeId, kind: FactKind) -> Key {
    (node, kind, NodeId(0), Position::ZERO)
}

impl Membership {
    /// Would this fact change who is a live member?
    #[must_use]
    pub fn changes_live(&self, fact: &Fact) -> bool {
        let mut after = self.clone();
        after.add(fact.clone()) == Change::Live
    }

    /// Takes in a fact.
    pub fn add(&mut self, fact: Fact) -> Change {
        let key = match fact.kind {
            FactKind::Dropping => (fact.node, fact.kind, fact.by, Position::ZERO),
            FactKind::Held => (fact.node, fact.kind, fact.by, fact.position),
            kind => only(fact.node, kind),
        };
        if self.0.contains_key(&key) {
            return Change::None;
        }
        let before = self.live();
        self.0.insert(key, fact);
        if before == self.live() {
            Change::Detail
        } else {
            Change::Live
        }
    }

    /// Takes in all facts of another reading.
    pub fn join(&mut self, other: Self) {
        for fact in other.0.into_values() {
            self.add(fact);
        }
    }

    fn has(&self, node: NodeId, kind: FactKind) -> bool {
        self.0.contains_key(&only(node, kind))
    }

    /// The fact of a kind about a node.
    #[must_use]
    pub fn get(&self, node: NodeId, kind: FactKind) -> Option<&Fact> {
        self.0.get(&only(node, kind))
    }

    /// Every fact, by node.
    pub fn iter(&self) -> impl Iterator<Item = &Fact> {
        self.0.values()
    }

    /// How a node came in, if it ever did.
    #[must_use]
    pub fn entry(&self, node: NodeId) -> Option<&Fact> {
        self.get(node, FactKind::Founder)
            .or_else(|| self.get(node, FactKind::Joined))
    }

    /// Members that are waited for before anything is forgotten.
    #[must_use]
    pub fn live(&self) -> BTreeSet<NodeId> {
        self.0
            .values()
            .filter(|fact| matches!(fact.kind, FactKind::Founder | FactKind::Joined))
            .map(|fact| fact.node)
            .filter(|&node| !self.has(node, FactKind::Dropped))
            .collect()
    }

    /// Live members that take writes.
    #[must_use]
    pub fn ready(&self) -> BTreeSet<NodeId> {
        self.live()
            .into_iter()
            .filter(|&node| self.has(node, FactKind::Founder) || self.has(node, FactKind::Ready))
            .collect()
    }

    /// Members of the beginning, whatever became of them.
    #[must_use]
    pub fn founders(&self) -> BTreeSet<NodeId> {
        self.of_kind(FactKind::Founder).map(|fact| fact.node).collect()
    }

    /// Nodes that are gone, each with where its stream ends.
    #[must_use]
    pub fn dropped(&self) -> BTreeMap<NodeId, Position> {
        self.of_kind(FactKind::Dropped)
            .map(|fact| (fact.node, fact.position))
            .collect()
    }

    /// Nodes that are being dropped.
    #[must_use]
    pub fn dropping(&self) -> BTreeSet<NodeId> {
        self.of_kind(FactKind::Dropping)
            .map(|fact| fact.node)
            .filter(|&node| !self.has(node, FactKind::Dropped))
            .collect()
    }

    /// Live members that are not being dropped.
    #[must_use]
    pub fn survivors(&self) -> BTreeSet<NodeId> {
        let dropping = self.dropping();
        self.live()
            .into_iter()
            .filter(|node| !dropping.contains(node))
            .collect()
    }

    /// Members from which nothing is taken directly any more: those that are being dropped. None where nobody stays: nobody closes a
    /// stream then, and each shall hear that the others go, too.
    #[must_use]
    pub fn shunned(&self) -> BTreeSet<NodeId> {
        match self.survivors().is_empty() {
            true => BTreeSet::new(),
            false => self.dropping(),
        }
    }

    /// What a node is called, for people; its id where nobody has said.
    #[must_use]
    pub fn name(&self, node: NodeId) -> String {
        self.entry(node)
            .map_or_else(|| node.to_string(), |fact| fact.name.clone())
    }

    /// What every node is called that ever was a member.
    #[must_use]
    pub fn names(&self) -> BTreeMap<NodeId, String> {
        self.0
            .values()
            .filter(|fact| matches!(fact.kind, FactKind::Founder | FactKind::Joined))
            .map(|fact| (fact.node, fact.name.clone()))
            .collect()
    }

    /// Has this member said itself that it shall be none any more? All that it had written was applied at every other
    /// member when it said so.
    #[must_use]
    pub fn said_goodbye(&self, node: NodeId) -> bool {
        self.0
            .contains_key(&(node, FactKind::Dropping, node, Position::ZERO))
    }

    /// Nodes that are gone because they said so themselves; the other dropped ones were lost.
    #[must_use]
    pub fn left(&self) -> BTreeSet<NodeId> {
        self.of_kind(FactKind::Dropped)
            .map(|fact| fact.node)
            .filter(|&node| self.said_goodbye(node))
            .collect()
    }

    /// Has this member said how far it holds the stream of a node that is being dropped?
    #[must_use]
    pub fn has_held(&self, node: NodeId, by: NodeId) -> bool {
        self.of_kind(FactKind::Held)
            .any(|fact| (fact.node, fact.by) == (node, by))
    }

    /// Survivors that have not said how far they hold the stream of every node that is being dropped. Once there are
    /// none, nobody can get beyond the furthest place said: nobody takes anything from a dropping node any more, which
    /// could have passed on the stream of another.
    #[must_use]
    pub fn silent(&self) -> BTreeSet<NodeId> {
        let dropping = self.dropping();
        self.survivors()
            .into_iter()
            .filter(|&by| !dropping.iter().all(|&node| self.has_held(node, by)))
            .collect()
    }

    /// Where the stream of a node that is being dropped will end: the furthest place that a survivor holds. None while
    /// one is silent.
    #[must_use]
    pub fn furthest(&self, node: NodeId) -> Option<Position> {
        let survivors = self.survivors();
        if !self.silent().is_empty() || !self.dropping().contains(&node) {
            return None;
        }
        self.of_kind(FactKind::Held)
            .filter(|fact| fact.node == node && survivors.contains(&fact.by))
            .map(|fact| fact.position)
            .max()
    }

    /// Who says that a node is dropped: the survivor that began it, or if that is being dropped itself, the first of
    /// the others. It would do no harm if two did, as both would say the same.
    #[must_use]
    pub fn closer(&self, node: NodeId) -> Option<NodeId> {
        let survivors = self.survivors();
        self.of_kind(FactKind::Dropping)
            .filter(|fact| fact.node == node)
            .map(|fact| fact.by)
            .find(|by| survivors.contains(by))
            .or_else(|| survivors.first().copied())
    }

    fn of_kind(&self, kind: FactKind) -> impl Iterator<Item = &Fact> {
        self.0.values().filter(move |fact| fact.kind == kind)
    }

    /// The other live members as peers. An address in the configuration stands before the one in the fact: how a
    /// node is reached may depend on from where.
    #[must_use]
    pub fn peers(&self, own: NodeId, configured: &[config::Peer]) -> Vec<config::Peer> {
        self.live()
            .into_iter()
            .filter(|&node| node != own)
            .filter_map(|node| {
                let fact = self.entry(node)?;
                let here = configured.iter().find(|peer| peer.id == node);
                Some(config::Peer {
                    name: here.map_or_else(|| fact.name.clone(), |peer| peer.name.clone()),
                    id: node,
                    address: here.map_or_else(|| fact.address.clone(), |peer| peer.address.clone()),
                })
            })
            .collect()
    }
}

impl FromIterator<Fact> for Membership {
    fn from_iter<T: IntoIterator<Item = Fact>>(facts: T) -> Self {
        let mut all = Self::default();
        for fact in facts {
            all.add(fact);
        }
        all
    }
}

/// The table as it is now.
///
/// # Errors
/// When it cannot be read.
pub async fn read(sql: &Client) -> Result<Membership, tokio_postgres::Error> {
    let rows = sql
        .query(
            "SELECT node_id, fact, name, address, incarnation, epoch, (lsn - '0/0')::int8, said_by FROM anabranch.member",
            &[],
        )
        .await?;
    let mut all = Membership::default();
    for row in rows {
        let (node, kind): (i32, String) = (row.try_get(0)?, row.try_get(1)?);
        let (epoch, lsn): (i64, i64) = (row.try_get(5)?, row.try_get(6)?);
        let (Ok(node), Some(kind)) = (u16::try_from(node), FactKind::parse(&kind)) else {
            continue;
        };
        all.add(Fact {
            node: NodeId(node),
            kind,
            name: row.try_get(2)?,
            address: row.try_get(3)?,
            incarnation: row.try_get(4)?,
            position: Position {
                epoch: u32::try_from(epoch).unwrap_or(0),
                lsn: Lsn(u64::try_from(lsn).unwrap_or(0)),
            },
            by: NodeId(u16::try_from(row.try_get::<_, i32>(7)?).unwrap_or(0)),
        });
    }
    Ok(all)
}

/// Says a fact at this node: from here it travels in the node's stream. Said before, it stays as it was.
///
/// # Errors
/// When the statement fails.
pub async fn say(sql: &Client, fact: &Fact) -> Result<(), tokio_postgres::Error> {
    say_where(sql, fact, "").await.map(drop)
}

/// Says goodbye, unless this node shall stay after all: `anabranch.leaving` has no row any more. Tells whether it was said.
///
/// # Errors
/// When the statement fails.
pub async fn say_goodbye(sql: &Client, fact: &Fact) -> Result<bool, tokio_postgres::Error> {
    let asked = ", (SELECT FROM anabranch.leaving FOR UPDATE) AS leaving";
    say_where(sql, fact, asked).await.map(|said| said > 0)
}

/// Says a fact once for each row of what is joined; tells how many are new.
async fn say_where(sql: &Client, fact: &Fact, joined: &str) -> Result<u64, tokio_postgres::Error> {
    // `local`: the fact must be visible here once it is decoded, whatever a standby does.
    let sql_text = format!(
        "WITH s AS (SELECT set_config('synchronous_commit', 'local', true), \
            set_config('transaction_read_only', 'off', true)) \
        INSERT INTO anabranch.member (node_id, fact, name, address, incarnation, epoch, lsn, said_by) \
        SELECT $1, $2, $3, $4, $5, $6, $7::text::pg_lsn, $8 FROM s{joined} ON CONFLICT DO NOTHING"
    );
    let node = i32::from(fact.node.0);
    let epoch = i64::from(fact.position.epoch);
    let lsn = fact.position.lsn.to_string();
    let by = i32::from(fact.by.0);
    sql.execute(
        sql_text.as_str(),
        &[
            &node,
            &fact.kind.as_str(),
            &fact.name,
            &fact.address,
            &fact.incarnation,
            &epoch,
            &lsn,
            &by,
        ],
    )
    .await
}

/// A row of the table, met in a stream. `None` for a kind of fact that this release does not know.
///
/// # Errors
/// When a column is missing or unreadable.
pub fn of_row(table: &TableDesc, row: &RowImage) -> Result<Option<Fact>, Malformed> {
    let text = |name: &str| -> Result<String, Malformed> {
        let value = binary(table, row, name)?;
        String::from_utf8(value.to_vec()).map_err(|_| Malformed("a text that is not UTF-8"))
    };
    let Some(kind) = FactKind::parse(&text("fact")?) else {
        return Ok(None);
    };
    let node = number::<4>(table, row, "node_id")?;
    let epoch = number::<8>(table, row, "epoch")?;
    Ok(Some(Fact {
        node: NodeId(u16::try_from(node).map_err(|_| Malformed("a node id out of range"))?),
        kind,
        name: text("name")?,
        address: text("address")?,
        incarnation: text("incarnation")?,
        position: Position {
            epoch: u32::try_from(epoch).map_err(|_| Malformed("an epoch out of range"))?,
            lsn: Lsn(number::<8>(table, row, "lsn")?),
        },
        by: NodeId(
            u16::try_from(number::<4>(table, row, "said_by")?)
                .map_err(|_| Malformed("a node id out of range"))?,
        ),
    }))
}

/// The binary value of a column of one of our own tables.
///
/// # Errors
/// When the column is missing or has none.
pub(crate) fn binary<'r>(table: &TableDesc, row: &'r RowImage, name: &str) -> Result<&'r [u8], Malformed> {
    let at = table
        .columns
        .iter()
        .position(|column| column.name == name)
        .ok_or(Malformed("a column is missing"))?;
    match row.cells().nth(at) {
        Some(Cell::Binary(value)) => Ok(value),
        _ => Err(Malformed("a column without a binary value")),
    }
}

/// A number of `LEN` bytes in a column of one of our own tables.
///
/// # Errors
/// As [`binary`].
pub(crate) fn number<const LEN: usize>(
    table: &TableDesc,
    row: &RowImage,
    name: &str,
) -> Result<u64, Malformed> {
    let value: [u8; LEN] = binary(table, row, name)?
        .try_into()
        .map_err(|_| Malformed("a number of wrong length"))?;
    Ok(value
        .iter()
        .fold(0, |number, byte| number << 8 | u64::from(*byte)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fact(node: u16, kind: FactKind) -> Fact {
        Fact {
            node: NodeId(node),
            kind,
            name: format!("n{node}"),
            address: format!("host{node}:1"),
            incarnation: String::new(),
            position: Position::new(1, 7),
            by: NodeId(1),
        }
    }

    fn ids(nodes: &[u16]) -> BTreeSet<NodeId> {
        nodes.iter().map(|&node| NodeId(node)).collect()
    }

    #[test]
    fn the_last_that_say_goodbye_at_once_go_on_hearing_of_each_other() {
        use FactKind::{Dropping, Founder};
        let goodbye = |node: u16| Fact {
            by: NodeId(node),
            ..fact(node, Dropping)
        };
        let mut members: Membership = [fact(1, Founder), fact(2, Founder), goodbye(1)]
            .into_iter()
            .collect();
        assert_eq!(members.shunned(), ids(&[1]));
        assert_eq!(members.survivors(), ids(&[2]));
        members.add(goodbye(2));
        assert_eq!(members.dropping(), ids(&[1, 2]));
        assert!(members.survivors().is_empty());
        assert!(members.shunned().is_empty());
    }

    #[test]
    fn the_order_in_which_facts_arrive_does_not_matter() {
        use FactKind::{Dropped, Founder, Joined, Ready};
        let facts = [
            fact(1, Founder),
            fact(2, Founder),
            fact(3, Joined),
            fact(3, Ready),
            fact(2, Dropped),
            fact(4, Joined),
        ];
        let forward: Membership = facts.iter().cloned().collect();
        let backward: Membership = facts.iter().rev().cloned().collect();
        assert_eq!(forward, backward);
        assert_eq!(forward.live(), ids(&[1, 3, 4]));
        assert_eq!(forward.ready(), ids(&[1, 3]));
        assert_eq!(forward.founders(), ids(&[1, 2]));
        assert_eq!(
            forward.dropped(),
            [(NodeId(2), Position::new(1, 7))].into_iter().collect()
        );
    }

    #[test]
    fn only_what_changes_the_live_members_is_a_change_of_them() {
        use FactKind::{Dropped, Founder, Joined, Ready};
        let mut all: Membership = [fact(1, Founder)].into_iter().collect();
        assert!(all.changes_live(&fact(2, Joined)));
        assert_eq!(all.add(fact(2, Joined)), Change::Live);
        assert_eq!(all.add(fact(2, Joined)), Change::None);
        assert!(!all.changes_live(&fact(2, Ready)));
        assert_eq!(all.add(fact(2, Ready)), Change::Detail);
        assert_eq!(all.add(fact(2, Dropped)), Change::Live);
        // Dropped before it was heard of: it never was one here.
        assert_eq!(all.add(fact(3, Dropped)), Change::Detail);
        assert_eq!(all.add(fact(3, Joined)), Change::Detail);
        assert_eq!(all.live(), ids(&[1]));
    }

    fn held(node: u16, by: u16, lsn: u64) -> Fact {
        Fact {
            by: NodeId(by),
            position: Position::new(1, lsn),
            ..fact(node, FactKind::Held)
        }
    }

    fn dropping(node: u16, by: u16) -> Fact {
        Fact {
            by: NodeId(by),
            ..fact(node, FactKind::Dropping)
        }
    }

    fn founders(count: u16) -> Membership {
        (1..=count).map(|node| fact(node, FactKind::Founder)).collect()
    }

    #[test]
    fn a_node_is_closed_at_the_furthest_place_once_every_survivor_has_said_its_own() {
        let mut all = founders(3);
        assert_eq!(all.furthest(NodeId(3)), None);
        assert_eq!(all.add(dropping(3, 2)), Change::Detail);
        all.add(held(3, 1, 50));
        // The lost node itself is not asked, and not believed.
        all.add(held(3, 3, 90));
        assert_eq!((all.furthest(NodeId(3)), all.silent()), (None, ids(&[2])));
        all.add(held(3, 2, 70));
        assert_eq!(all.furthest(NodeId(3)), Some(Position::new(1, 70)));
        assert_eq!(all.closer(NodeId(3)), Some(NodeId(2)));
        assert_eq!(all.add(fact(3, FactKind::Dropped)), Change::Live);
        assert!(all.dropping().is_empty());
        assert_eq!(all.furthest(NodeId(3)), None);
    }

    #[test]
    fn a_node_that_speaks_for_itself_has_left_and_another_speaks_last() {
        let mut all = founders(3);
        all.add(dropping(2, 1));
        assert!(!all.said_goodbye(NodeId(2)));
        all.add(dropping(3, 3));
        assert!(all.said_goodbye(NodeId(3)) && !all.said_goodbye(NodeId(1)));
        assert_eq!((all.closer(NodeId(3)), all.left()), (Some(NodeId(1)), ids(&[])));
        all.add(fact(2, FactKind::Dropped));
        all.add(fact(3, FactKind::Dropped));
        assert_eq!(all.left(), ids(&[3]));
    }

    #[test]
    fn a_second_lost_node_makes_every_survivor_say_again_how_far_it_holds_the_first() {
        let mut all = founders(4);
        all.add(dropping(3, 4));
        all.add(held(3, 1, 50));
        all.add(held(3, 2, 60));
        // Node 4 has passed on more of node 3 to node 1 meanwhile.
        all.add(dropping(4, 1));
        assert_eq!((all.furthest(NodeId(3)), all.silent()), (None, ids(&[1, 2])));
        all.add(held(3, 1, 65));
        all.add(held(4, 1, 10));
        assert_eq!(all.furthest(NodeId(3)), None);
        all.add(held(3, 2, 60));
        all.add(held(4, 2, 10));
        assert_eq!(all.furthest(NodeId(3)), Some(Position::new(1, 65)));
        assert_eq!(all.furthest(NodeId(4)), Some(Position::new(1, 10)));
        // Who began the first drop is lost itself.
        assert_eq!(all.closer(NodeId(3)), Some(NodeId(1)));
    }

    #[test]
    fn a_node_that_joins_during_a_drop_is_asked_too() {
        let mut all = founders(2);
        all.add(dropping(2, 1));
        all.add(held(2, 1, 50));
        assert_eq!(all.furthest(NodeId(2)), Some(Position::new(1, 50)));
        all.add(fact(3, FactKind::Joined));
        assert_eq!((all.furthest(NodeId(2)), all.silent()), (None, ids(&[3])));
    }

    #[test]
    fn an_address_in_the_configuration_stands_before_the_one_in_the_fact() {
        let all: Membership = [1, 2, 3]
            .map(|node| fact(node, FactKind::Founder))
            .into_iter()
            .collect();
        let configured = [config::Peer {
            name: "n3".to_owned(),
            id: NodeId(3),
            address: "elsewhere:1".to_owned(),
        }];
        let peers = all.peers(NodeId(1), &configured);
        let addresses: Vec<&str> = peers.iter().map(|peer| peer.address.as_str()).collect();
        assert_eq!(addresses, ["host2:1", "elsewhere:1"]);
    }
}
