//! Nodes that are being dropped: what this node says and does about them.
//!
//! In:   facts of `anabranch.member`, links, the journal      Out: more facts; what `status` says of it
//! Invariants: 1. `held` is said only once no link to any dropping node is open, and of what is durable; 2. `dropped` is
//!             said only once every survivor has applied the lost stream to its end
//! On crash: goes on from the facts
//! Not here: what the facts mean (`crate::membership`), breaking the links (`crate::link`)

use std::collections::BTreeSet;

use anabranch_proto::{NodeId, Position};
use tokio_postgres::Client;

use super::maintenance::Context;
use crate::membership::{self, Fact, FactKind, Membership};
use crate::shared::lock;
use crate::status::Dropping;

/// Takes every drop as far as it goes now.
///
/// # Errors
/// When the database fails.
pub(super) async fn go_on(context: &Context, sql: &Client) -> Result<(), tokio_postgres::Error> {
    let shared = &context.shared;
    let members = lock(&shared.members).clone();
    let dropping = members.dropping();
    context.links.shun(members.shunned());
    let mut drops = Vec::new();
    // A node that is dropped itself has no say.
    if dropping.contains(&shared.node) {
        drops.extend(itself(&members, shared.node));
    } else {
        if members.silent().contains(&shared.node) {
            say_held(context, sql, &members, &dropping).await?;
        }
        for lost in dropping {
            drops.push(go_on_with(context, sql, &members, lost).await?);
        }
    }
    *lock(&shared.dropping) = drops;
    Ok(())
}

/// What a node that others drop can tell of it, where it hears of it at all; nothing where it leaves by itself, which is told elsewhere.
fn itself(members: &Membership, own: NodeId) -> Option<Dropping> {
    if members.said_goodbye(own) {
        return None;
    }
    let text = if members.survivors().is_empty() {
        "so is every other member: nobody stays who could say how far the streams go, so all go on as they are, and no node can be \
         dropped or join any more"
    } else {
        "another member was told to (`anabranch node drop`), and the others take nothing from here any more: what this node has still to \
         send is not in the cluster. Keep applications away from it"
    };
    Some(Dropping {
        id: own.0,
        name: members.name(own),
        leaves: false,
        waits_for: Vec::new(),
        text: text.to_owned(),
    })
}

/// Says how far this node holds each dropping node's stream, once that can only grow by what other survivors hold.
async fn say_held(
    context: &Context,
    sql: &Client,
    members: &Membership,
    dropping: &BTreeSet<NodeId>,
) -> Result<(), tokio_postgres::Error> {
    let (shared, links) = (&context.shared, &context.links);
    if dropping.iter().any(|&lost| links.receives_from(lost)) {
        return Ok(());
    }
    let held = links.held();
    let mut durable = context.journal.durable_vector();
    durable.join(&shared.echoed.borrow());
    if !dropping.iter().all(|&lost| durable.covers(lost, held.get(lost))) {
        return Ok(());
    }
    // Those of which it was said before come first: who reads the others knows that these are up to date, too.
    let (again, new): (Vec<NodeId>, Vec<NodeId>) = dropping
        .iter()
        .partition(|&&lost| members.has_held(lost, shared.node));
    for lost in again.into_iter().chain(new) {
        let Some(entry) = members.entry(lost) else {
            continue;
        };
        let fact = Fact {
            kind: FactKind::Held,
            position: held.get(lost),
            by: shared.node,
            ..entry.clone()
        };
        membership::say(sql, &fact).await?;
    }
    Ok(())
}

/// One drop: where it is, and the end of it when this node is to say so.
async fn go_on_with(
    context: &Context,
    sql: &Client,
    members: &Membership,
    lost: NodeId,
) -> Result<Dropping, tokio_postgres::Error> {
    let own = context.shared.node;
    let name = |node| members.name(node);
    let leaves = members.said_goodbye(lost);
    let whose = if leaves { "leaving" } else { "lost" };
    let (waits_for, text) = match members.furthest(lost) {
        None => (
            members.silent(),
            format!(
                "to say how far it holds the {whose} node's stream (if it is lost for good too, drop it as well)"
            ),
        ),
        Some(end) => {
            let behind = behind(context, members, lost, end);
            if behind.is_empty() && members.closer(lost) == Some(own) {
                close(sql, members, lost, end, own).await?;
            }
            (behind, format!("to apply the {whose} node's stream to its end"))
        }
    };
    let waits_for: Vec<String> = waits_for.into_iter().map(name).collect();
    let text = if waits_for.is_empty() {
        "every member has all of it".to_owned()
    } else {
        format!("waits for {} {text}", waits_for.join(", "))
    };
    Ok(Dropping {
        id: lost.0,
        name: name(lost),
        leaves,
        waits_for,
        text,
    })
}

/// Survivors that are not known to have applied the lost node's stream up to `end`: as they report, or as their own
/// streams tell where there is no link to them.
fn behind(context: &Context, members: &Membership, lost: NodeId, end: Position) -> BTreeSet<NodeId> {
    let shared = &context.shared;
    let reports = context.links.reports();
    let reports = reports.borrow();
    let stability = lock(&shared.stability);
    let has_applied = |node: NodeId| {
        if node == shared.node {
            return shared.echoed.borrow().covers(lost, end);
        }
        let reported = reports.get(&node);
        let told = stability.member(node);
        reported.is_some_and(|report| report.applied.covers(lost, end))
            || told.is_some_and(|vector| vector.covers(lost, end))
    };
    members
        .survivors()
        .into_iter()
        .filter(|&node| !has_applied(node))
        .collect()
}

async fn close(
    sql: &Client,
    members: &Membership,
    lost: NodeId,
    end: Position,
    own: NodeId,
) -> Result<(), tokio_postgres::Error> {
    let Some(entry) = members.entry(lost) else {
        return Ok(());
    };
    let dropped = Fact {
        kind: FactKind::Dropped,
        position: end,
        by: own,
        ..entry.clone()
    };
    membership::say(sql, &dropped).await
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fact(node: u16, kind: FactKind, by: u16) -> Fact {
        Fact {
            node: NodeId(node),
            kind,
            name: format!("n{node}"),
            address: String::new(),
            incarnation: String::new(),
            position: Position::ZERO,
            by: NodeId(by),
        }
    }

    #[test]
    fn a_node_that_others_drop_says_so_of_itself() {
        use FactKind::{Dropping, Founder};
        let mut members: Membership = (1..=3).map(|node| fact(node, Founder, node)).collect();
        members.add(fact(2, Dropping, 1));
        let text = |node: u16, members: &Membership| itself(members, NodeId(node)).map(|drop| drop.text);
        assert!(text(2, &members).is_some_and(|text| text.contains("was told to")));
        // Each was dropped at another.
        members.add(fact(3, Dropping, 2));
        members.add(fact(1, Dropping, 3));
        assert!(text(2, &members).is_some_and(|text| text.starts_with("so is every other member")));
        members.add(fact(2, Dropping, 2));
        assert_eq!(text(2, &members), None);
    }
}
