//! The policy of this life and of the one before. A node that changes it while a conflict is still open would decide
//! it otherwise than the node that has closed it: so it may change only when nothing is open. What is closed stays as it was
//! decided, though the journal has it for long: a node that joins or heals must not decide it once more, by the new one.
//!
//! A change by files that not all members can make is taken back: a node that has made it, and whose writes since are stable
//! nowhere, decides them again by the former policy ([`goes_back`]).

use std::path::Path;

use anabranch_conflict::policy::Policies;
use anabranch_proto::{Lsn, NodeId, Vector};

use super::Error;
use crate::apply::feed::Feed;
use crate::journal::Journal;
use crate::shared::{Shared, lock};
use crate::small_file;

const FILE: &str = crate::policy_change::force::RAN;
/// The policy of before the last change by files.
const BEFORE: &str = "policy_before.json";

/// What may be gone back to.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
struct Before {
    /// The former policy.
    former: String,
    /// The rules that merge columns, of the policy that came after it: what was written under other ones cannot be merged.
    merging: Vec<String>,
    /// What was settled when it came.
    held: Vector,
    /// Where the slot was when the node began to go back.
    back_at: Option<Lsn>,
}

/// A node that has never run takes any policy, also when its tables have been written to already.
pub(crate) fn begin(dir: &Path, policies: &Policies) -> Result<(), Error> {
    keep(dir, policies).map_err(Error::PolicyFile)
}

/// Is `policies` what the node ran with before? Before there were policies that was last update wins.
pub(super) fn is_unchanged(dir: &Path, policies: &Policies) -> std::io::Result<bool> {
    Ok(ran(dir)? == policies.canonical())
}

/// Has the node never run with `policies`, or with none at all?
pub(super) fn is_new(dir: &Path, policies: &Policies) -> std::io::Result<bool> {
    Ok(!dir.join(FILE).try_exists()? || !is_unchanged(dir, policies)?)
}

/// Are the tables fit for their policies? A node that has run with this policy runs on with constraints that came and columns that
/// went since, with an alarm (`merge_watch`, `key_watch`): the policy can be changed only once all that is open is closed, which takes a daemon.
/// So does one that goes back to the policy of before a change by files ([`goes_back`]): what it had let in before that is not in the way.
pub(super) async fn fit_for_policies(
    sql: &tokio_postgres::Client,
    (policies, publication): (&Policies, &str),
    dir: &Path,
    place: (NodeId, &Vector, &[NodeId]),
) -> Result<(), Error> {
    // Updates that do not tell the row before would be taken for more than they are: that waits for nobody.
    let unfit = crate::setup::merged::unfit(sql, policies).await?;
    let mut findings = unfit.identity;
    let goes_back = way_back(dir, policies, place)
        .map_err(Error::PolicyFile)?
        .is_some();
    if !is_unchanged(dir, policies).map_err(Error::PolicyFile)? {
        findings.extend(unfit.columns);
        if !goes_back {
            findings.extend(crate::setup::together::examine(sql, policies).await?);
        }
    }
    if !goes_back && is_new(dir, policies).map_err(Error::PolicyFile)? {
        findings.extend(crate::setup::exclusion::examine(sql, publication, policies).await?);
        findings.extend(crate::setup::pairwise::examine(sql, publication, policies).await?);
    }
    if findings.is_empty() {
        return Ok(());
    }
    let lines = findings
        .iter()
        .map(|finding| format!("  {}: {}; {}", finding.check, finding.found, finding.remedy));
    Err(Error::Unfit(lines.collect::<Vec<_>>().join("\n")))
}

/// Refuses a policy that is not the one of before while anything that it decides is open here: a row version that
/// is not known to be applied at every member, or one received and not applied. The index must be complete.
/// `held` is what the journal held at the start: what was written since nobody else has decided. Not asked of a node that goes back.
pub(super) fn admit(
    dir: &Path,
    (policies, goes_back): (&Policies, bool),
    shared: &Shared,
    journal: &Journal,
    held: &Vector,
    applied: &Vector,
) -> Result<(), Error> {
    if !goes_back && !is_unchanged(dir, policies).map_err(Error::PolicyFile)? {
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
        keep_before(dir, policies, &lock(&shared.settled)).map_err(Error::PolicyFile)?;
        tracing::info!(hash = %policies.hash(), "another policy from here on");
    }
    keep(dir, policies).map_err(Error::PolicyFile)
}

/// Does the node go back to the policy of before a change by files that not all members have made? What it has written and decided
/// since is stable nowhere, as long as one of them is silent since then (`last` is what the journal has of each), so nobody else goes
/// by that: it is all decided again, by the former policy. True until the slot has moved past what there is to decide, also after a
/// restart.
pub(super) fn goes_back(
    dir: &Path,
    policies: &Policies,
    place: (NodeId, &Vector, &[NodeId]),
    confirmed: Lsn,
) -> std::io::Result<bool> {
    let Some(before) = way_back(dir, policies, place)? else {
        return Ok(false);
    };
    if let Some(at) = before.back_at {
        return Ok(confirmed <= at);
    }
    let before = Before {
        back_at: Some(confirmed),
        ..before
    };
    let text = serde_json::to_vec(&before).map_err(std::io::Error::other)?;
    small_file::replace(&dir.join(BEFORE), &text)?;
    tracing::info!(hash = %policies.hash(), "back to the policy of before: what was written since is decided again");
    Ok(true)
}

/// What [`goes_back`] goes by: the change that is taken back, where a member is silent since, or going back from it had begun.
fn way_back(
    dir: &Path,
    policies: &Policies,
    (own, last, members): (NodeId, &Vector, &[NodeId]),
) -> std::io::Result<Option<Before>> {
    let Some(before) = before(dir)? else {
        return Ok(None);
    };
    if policies.canonical() != before.former || merging(policies) != before.merging {
        return Ok(None);
    }
    let is_silent = |node: &&NodeId| **node != own && before.held.covers(**node, last.get(**node));
    let may_begin = !is_unchanged(dir, policies)? && members.iter().any(|node| is_silent(&node));
    Ok((before.back_at.is_some() || may_begin).then_some(before))
}

/// What may be gone back to, if the policy was ever changed by files.
fn before(dir: &Path) -> std::io::Result<Option<Before>> {
    match std::fs::read(dir.join(BEFORE)) {
        Ok(text) => serde_json::from_slice(&text).map_err(std::io::Error::other),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Another policy is about to be kept.
fn keep_before(dir: &Path, policies: &Policies, settled: &Vector) -> std::io::Result<()> {
    let before = Before {
        former: ran(dir)?,
        merging: merging(policies),
        held: settled.clone(),
        back_at: None,
    };
    let text = serde_json::to_vec(&before).map_err(std::io::Error::other)?;
    small_file::replace(&dir.join(BEFORE), &text)
}

/// The rules that merge columns, to be compared.
fn merging(policies: &Policies) -> Vec<String> {
    let rules = policies.merging();
    rules
        .map(|(pattern, columns)| format!("{pattern}: {columns:?}"))
        .collect()
}

/// What the node ran with before.
fn ran(dir: &Path) -> std::io::Result<String> {
    match std::fs::read_to_string(dir.join(FILE)) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Policies::default().canonical()),
        read => read,
    }
}

/// All that is held is decided for good. Nothing is left to put right in it, and what is still to come covers it.
fn close(dir: &Path, shared: &Shared, held: &Vector) -> std::io::Result<()> {
    let mut settled = lock(&shared.settled).clone();
    settled.join(held);
    super::trim::write(dir, &settled, *lock(&shared.low))?;
    let mut resolver = lock(&shared.resolver);
    resolver.settle(settled.clone());
    resolver.rebuilt();
    resolver.restore_loaded(true).map_err(std::io::Error::other)?;
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use anabranch_proto::Position;

    use super::*;

    #[test]
    fn the_way_back_is_known_while_a_member_is_silent_since_the_change() {
        let dir = tempfile::tempdir().unwrap();
        let policies = |rule: &str| {
            let text = format!("[[table]]\nname = \"public.t\"\n{rule}");
            Policies::parse(&text, &BTreeMap::new(), |_| Err(String::new())).unwrap()
        };
        let first = policies("policy = \"first_update_wins\"");
        let second = policies("unique_keys = \"pairwise\"");
        let [own, other] = [NodeId(1), NodeId(2)];
        let held: Vector = [(other, Position::new(1, 10))].into_iter().collect();
        let later: Vector = [(other, Position::new(1, 11))].into_iter().collect();
        let known = |last: &Vector| {
            [&first, &second].map(|it| {
                way_back(dir.path(), it, (own, last, &[own, other]))
                    .unwrap()
                    .is_some()
            })
        };
        keep(dir.path(), &first).unwrap();
        assert_eq!(known(&held), [false, false]);
        keep_before(dir.path(), &second, &held).unwrap();
        keep(dir.path(), &second).unwrap();
        assert_eq!(known(&held), [true, false]);
        // All have taken the change: that the former policy is put back later is a change as any other.
        assert_eq!(known(&later), [false, false]);
        // Once begun it goes on, whatever comes meanwhile. What it decides has to be decided once more all the same.
        assert!(goes_back(dir.path(), &first, (own, &held, &[own, other]), Lsn(7)).unwrap());
        assert_eq!(known(&later), [true, false]);
        assert!(is_new(dir.path(), &first).unwrap());
    }
}
