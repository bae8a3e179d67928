//! Waiting until what another node had committed is visible here: `anabranch wait`.
//!
//! In:   a node, and a position of it or the wish to ask it            Out: whether all up to there is applied here
//! Invariants: what a node says when it is asked has everything that could be seen there before
//! Not here: how a node tells how far it is (`crate::verify`), the socket (`crate::admin`)

use std::sync::{Arc, Weak};
use std::time::Duration;

use anabranch_proto::{NodeId, Position, Vector};
use tokio::sync::watch;

use crate::admin::{WaitForProvider, Waited};
use crate::link::Links;
use crate::shared::{Shared, lock};
use crate::verify::{self, Talk};

/// What is said to who asks, or waits, when the stages end.
pub(super) const ENDED: &str = "the daemon ends, or begins anew: ask again";

/// Serves such waits, until `halted` turns true: what is applied then, is not told here any more.
pub(super) fn provider(
    links: &Arc<Links>,
    seat: &verify::Seat,
    halted: &watch::Receiver<bool>,
) -> WaitForProvider {
    // Weak: what still waits when the links end shall not keep them.
    let (links, seat, halted) = (Arc::downgrade(links), seat.clone(), halted.clone());
    Arc::new(move |node, position, patience| {
        let (links, seat, mut halted) = (links.clone(), seat.clone(), halted.clone());
        Box::pin(async move {
            tokio::select! {
                waited = wait(&links, &seat, (node, position), patience) => waited,
                _ = halted.wait_for(|&halted| halted) => Err(ENDED.to_owned()),
            }
        })
    })
}

async fn wait(
    links: &Weak<Links>,
    seat: &verify::Seat,
    (node, position): (NodeId, Option<Position>),
    patience: Duration,
) -> Waited {
    if let Some(position) = position {
        return known(&seat.shared, node, position, patience).await;
    }
    let began = tokio::time::Instant::now();
    let asked = async {
        let mut talk = if node == seat.config.node.id {
            Talk::with_self(seat.clone())
        } else {
            let links = links.upgrade().ok_or(ENDED)?;
            links.talk(node).await?
        };
        talk.position().await
    };
    let vector = match tokio::time::timeout(patience, asked).await {
        Ok(vector) => vector?,
        Err(_) => return Err(format!("node {node} did not say in time how far it is")),
    };
    let left = patience.saturating_sub(began.elapsed());
    let reached = applied(&seat.shared, &vector, left).await;
    Ok((reached, vector.get(node)))
}

/// Waits for a position that somebody was told.
async fn known(shared: &Shared, node: NodeId, position: Position, patience: Duration) -> Waited {
    if !lock(&shared.names).contains_key(&node) && node != shared.node {
        return Err(format!("no node of this cluster has the id {node}"));
    }
    let here = if node == shared.node {
        *shared.own.borrow()
    } else {
        shared.applied.borrow().get(node)
    };
    let position = match position.epoch {
        0 => Position::new(here.epoch, position.lsn.0),
        _ => position,
    };
    let mut vector = Vector::new();
    vector.raise(node, position);
    Ok((applied(shared, &vector, patience).await, position))
}

/// Is all of it applied here in time? What this node wrote itself is visible here.
async fn applied(shared: &Shared, vector: &Vector, patience: Duration) -> bool {
    let others: Vector = vector.iter().filter(|(node, _)| *node != shared.node).collect();
    let mut applied = shared.applied.subscribe();
    let reached = applied.wait_for(|applied| applied.includes(&others));
    let reached = tokio::time::timeout(patience, reached).await;
    reached.is_ok_and(|reached| reached.is_ok())
}
