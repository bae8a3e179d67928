//! Waiting until what another node had committed is visible here: `anabranch wait`.
//!
//! In:   a node, and a position of it or the wish to ask it            Out: whether all up to there is applied here
//! Invariants: what a node says when it is asked has everything that could be seen there before
//! Not here: how a node tells how far it is (`crate::verify`), the socket (`crate::admin`)

use std::sync::Arc;
use std::time::Duration;

use anabranch_proto::{NodeId, Position, Vector};

use crate::admin::{WaitForProvider, Waited};
use crate::link::Links;
use crate::shared::{Shared, lock};
use crate::verify::{self, Talk};

/// Serves such waits.
pub(super) fn provider(links: &Arc<Links>, seat: &verify::Seat) -> WaitForProvider {
    // Weak: what still waits when the links end shall not keep them.
    let (links, seat) = (Arc::downgrade(links), seat.clone());
    Arc::new(move |node, position, patience| {
        let (links, seat) = (links.clone(), seat.clone());
        Box::pin(async move {
            if let Some(position) = position {
                return known(&seat.shared, node, position, patience).await;
            }
            let began = tokio::time::Instant::now();
            let asked = async {
                let mut talk = if node == seat.config.node.id {
                    Talk::with_self(seat.clone())
                } else {
                    let links = links.upgrade().ok_or("the daemon is stopping")?;
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
        })
    })
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
