//! Causal delivery at the nodes of [`crate::unique`] and [`crate::foreign`].
//!
//! In:   what has come in, in the order of each origin      Out: whose next transaction may be applied

use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;

use anabranch_proto::{NodeId, Vector};

/// What has come in of each origin and is not applied.
pub(crate) type Inbox<T> = BTreeMap<NodeId, VecDeque<Rc<T>>>;

/// The origins whose next transaction may be applied at `node`: all that it had seen (`deps`) is here, decoded or applied.
pub(crate) fn deliverable<T>(
    inbox: &Inbox<T>,
    node: NodeId,
    (decoded, applied): (&Vector, &Vector),
    deps: impl Fn(&T) -> &Vector,
) -> Vec<NodeId> {
    let own = decoded.get(node);
    let ready = |txn: &T| {
        deps(txn).iter().all(|(origin, position)| {
            if origin == node {
                own >= position
            } else {
                applied.covers(origin, position)
            }
        })
    };
    let heads = inbox
        .iter()
        .filter_map(|(&origin, queue)| Some((origin, queue.front()?)));
    heads
        .filter(|(_, txn)| ready(txn))
        .map(|(origin, _)| origin)
        .collect()
}
