//! The policy of this life and of the one before. A node that changes it while a conflict is still open would decide
//! it otherwise than the node that has closed it: so it may change only when nothing is open. What is closed stays as it was
//! decided, though the journal has it for long: a node that joins or heals must not decide it once more, by the new one.

use std::path::Path;

use anabranch_conflict::policy::Policies;
use anabranch_proto::{NodeId, Vector};

use super::Error;
use crate::apply::feed::Feed;
use crate::journal::Journal;
use crate::shared::{Shared, lock};
use crate::small_file;

const FILE: &str = "policy.txt";

/// A node that has never run takes any policy, also when its tables have been written to already.
pub(crate) fn begin(dir: &Path, policies: &Policies) -> Result<(), Error> {
    keep(dir, policies).map_err(Error::PolicyFile)
}

/// Is `policies` what the node ran with before? Before there were policies that was last update wins.
pub(super) fn is_unchanged(dir: &Path, policies: &Policies) -> std::io::Result<bool> {
    let before = match std::fs::read_to_string(dir.join(FILE)) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Policies::default().canonical(),
        read => read?,
    };
    Ok(before == policies.canonical())
}

/// Has the node never run with `policies`, or with none at all?
pub(super) fn is_new(dir: &Path, policies: &Policies) -> std::io::Result<bool> {
    Ok(!dir.join(FILE).try_exists()? || !is_unchanged(dir, policies)?)
}

/// Refuses a policy that is not the one of before while anything that it decides is open here: a row version that
/// is not known to be applied at every member, or one received and not applied. The index must be complete.
/// `held` is what the journal held at the start: what was written since nobody else has decided.
pub(super) fn admit(
    dir: &Path,
    policies: &Policies,
    shared: &Shared,
    journal: &Journal,
    held: &Vector,
    applied: &Vector,
) -> Result<(), Error> {
    if !is_unchanged(dir, policies).map_err(Error::PolicyFile)? {
        let found = lock(&shared.resolver).has_found();
        let stable = lock(&shared.stability).stable();
        let unstable = lock(&shared.resolver).has_unstable(&stable, held);
        let peers = held
            .iter()
            .map(|(node, _)| node)
            .filter(|node| *node != shared.node);
        if unstable || found || has_unapplied(journal, peers, applied)? {
            tracing::warn!(unstable, found, %stable, %applied, "the former policy still has something to decide");
            return Err(Error::PolicyInUse);
        }
        close(dir, shared, held).map_err(Error::Settled)?;
        tracing::info!(hash = %policies.hash(), "another policy from here on");
    }
    keep(dir, policies).map_err(Error::PolicyFile)
}

/// All that is held is decided for good. Nothing is left to put right in it, and what is still to come covers it.
fn close(dir: &Path, shared: &Shared, held: &Vector) -> std::io::Result<()> {
    let mut settled = lock(&shared.settled).clone();
    settled.join(held);
    super::trim::write(dir, &settled, *lock(&shared.low))?;
    let mut resolver = lock(&shared.resolver);
    resolver.settle(settled.clone());
    resolver.rebuilt();
    *lock(&shared.settled) = settled;
    Ok(())
}

fn has_unapplied(
    journal: &Journal,
    peers: impl Iterator<Item = NodeId>,
    applied: &Vector,
) -> Result<bool, Error> {
    for peer in peers {
        let mut feed = Feed::new(journal, peer, applied.get(peer))?;
        let unreadable = |error: crate::apply::failure::Failure| Error::Unreadable(error.to_string());
        while feed.peek().map_err(unreadable)?.is_some() {
            if feed.take().is_some_and(|head| head.header().change_count > 0) {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

fn keep(dir: &Path, policies: &Policies) -> std::io::Result<()> {
    small_file::replace(&dir.join(FILE), policies.canonical().as_bytes())
}
