//! A change of the policy: what this node says and does about it.
//!
//! In:   `anabranch.policy_change`, `anabranch.member`, what upkeep knows of settled versions       Out: facts; a new beginning of the
//! stages; what `status` says of it; who may connect with another policy
//! Invariants: 1. this node says that it is ready only in a life that keeps the frontier of every row of the changed tables, so from
//!        before the first new version comes here; 2. it says where the change was made before its journal lets that go; 3. that it
//!        is done, once nothing old can be decided again here and that is on disk
//! On crash: goes on from the facts
//! Not here: what the facts mean and why that is right (`anabranch_conflict::change`), which policies are in force
//! (`crate::policy_change`)

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Arc, Weak};
use std::time::Duration;

use anabranch_conflict::change::{Asked, Phase, Said, Vote};
use anabranch_conflict::policy::Policies;
use anabranch_proto::{NodeId, Stamp, Vector};
use tokio_postgres::Client;
use uuid::Uuid;

use super::Error;
use crate::config::Config;
use crate::link::{Links, PoliciesUnderWay};
use crate::membership::{self, Membership};
use crate::policy_change::{self, Body, Known, fit, force, names};
use crate::shared::{Shared, lock};
use crate::status::PolicyChange;
use crate::{pg, status};

/// Between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// Between two looks at the policy file.
const FILE_EVERY: Duration = Duration::from_secs(10);
/// Name of the alarm.
const ALARM: &str = "policy_file";

/// Watches changes, for one life of the stages.
pub(super) struct PolicyWatch {
    config: Arc<Config>,
    shared: Arc<Shared>,
    /// The change that this life decides by, if there is one.
    life: Option<Uuid>,
    hash: String,
    is_file_stale: bool,
    under_way: PoliciesUnderWay,
}

impl PolicyWatch {
    pub(super) fn new(
        config: &Arc<Config>,
        shared: &Arc<Shared>,
        in_force: &force::InForce,
        under_way: PoliciesUnderWay,
    ) -> Self {
        Self {
            config: Arc::clone(config),
            shared: Arc::clone(shared),
            life: in_force.change,
            hash: in_force.policies.hash(),
            is_file_stale: in_force.is_file_stale,
            under_way,
        }
    }

    /// Who may connect, before anybody does.
    ///
    /// # Errors
    /// When the database fails.
    pub(super) async fn begin(&self, sql: &Client) -> Result<(), Error> {
        let members = membership::read(sql).await?;
        let known = policy_change::read(sql).await?;
        self.under_way.set(known.changes.clone(), members.live());
        lock(&self.shared.policy).shown = self.shown(&members, &known, &BTreeSet::new());
        Ok(())
    }

    /// Looks until the task is ended, or the stages are to begin anew. Without a connection it tries again: the stages that need one
    /// notice by themselves.
    pub(super) async fn run(mut self, links: Weak<Links>) {
        let mut client = None;
        let mut file_due = tokio::time::Instant::now();
        loop {
            match self.look(&links, &mut client).await {
                Ok(true) => {
                    self.shared.members_changed.send_replace(true);
                    return;
                }
                Ok(false) => {}
                Err(error) => {
                    tracing::debug!(%error, "looking for changes of the policy");
                    client = None;
                }
            }
            if tokio::time::Instant::now() >= file_due {
                file_due = tokio::time::Instant::now() + FILE_EVERY;
                self.compare_file();
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// The file that the configuration names should be what was agreed on.
    fn compare_file(&mut self) {
        let names = Body::names(&lock(&self.shared.members));
        let is_agreed = || {
            let file = self.config.policies_among(&names);
            file.is_ok_and(|file| file.hash() == self.hash)
        };
        if self.is_file_stale && is_agreed() {
            self.is_file_stale = false;
        }
        if !self.is_file_stale {
            self.shared.alarms.clear(ALARM);
            return;
        }
        let agreed = self.config.node.data_dir.join(force::AGREED);
        let file = match &self.config.cluster.policy {
            Some(path) => format!("the file {}, which cluster.policy names,", path.display()),
            None => "the configuration, which names no policy file (cluster.policy),".to_owned(),
        };
        self.shared.alarms.raise(
            ALARM,
            format!(
                "this node runs with the policy that the members agreed on by `anabranch policy change`; {file} is the one of before. \
                 Put what is in {} in its place",
                agreed.display()
            ),
        );
    }

    /// One look. True: the stages must begin anew.
    async fn look(&self, links: &Weak<Links>, client: &mut Option<Client>) -> Result<bool, Error> {
        let sql = match client {
            Some(session) => &*session,
            None => &*client.insert(pg::connect(&self.config.postgres, "policy").await?.0),
        };
        let own = self.shared.node;
        // Who votes, and who takes in a member, does so one after the other.
        let first = self.shared.policy_votes.lock().await;
        let members = membership::read(sql).await?;
        let known = policy_change::read(sql).await?;
        let live = members.live();
        let away = away(links);
        self.under_way.set(known.changes.clone(), live.clone());
        lock(&self.shared.policy).shown = self.shown(&members, &known, &away);
        self.decline(sql, &known, &live).await?;
        let current = known.changes.under_way(own, &live);
        if current.map(|(id, _)| id) == self.life {
            return match current {
                Some((id, change)) => self
                    .go_on(sql, (id, change), (&members, &known))
                    .await
                    .map(|()| false),
                None => {
                    self.say_switched(sql, &known, &live).await?;
                    Ok(false)
                }
            };
        }
        let Some((id, change)) = current else {
            // Off, or over.
            return Ok(true);
        };
        if let Some(why) = self.obstacles(sql, id, &members, &known).await? {
            self.say(sql, (id, change), Said::Voted(Vote::Refused(why)))
                .await?;
            return Ok(false);
        }
        drop(first);
        Ok(true)
    }

    async fn say(&self, sql: &Client, (id, change): (Uuid, &Asked), said: Said) -> Result<(), Error> {
        let own = self.shared.node;
        let by = change.by.unwrap_or(own);
        if policy_change::say(sql, (id, by, own), &said, None).await? {
            tracing::info!(change = %id, ?said, "change of the policy");
        }
        Ok(())
    }

    /// A second change, while this node has a part in another.
    async fn decline(&self, sql: &Client, known: &Known, live: &BTreeSet<NodeId>) -> Result<(), Error> {
        let own = self.shared.node;
        let Some((first, _)) = known.changes.unfinished(live) else {
            return Ok(());
        };
        for (id, change) in known.changes.iter() {
            let is_asked = change.by.is_some() && change.phase(live) == Phase::Asking;
            if id != first && is_asked && !change.votes.contains_key(&own) {
                let why = "another change of the policy is under way".to_owned();
                self.say(sql, (id, change), Said::Voted(Vote::Refused(why)))
                    .await?;
            }
        }
        Ok(())
    }

    /// Why this node cannot make the change.
    async fn obstacles(
        &self,
        sql: &Client,
        id: Uuid,
        members: &Membership,
        known: &Known,
    ) -> Result<Option<String>, Error> {
        let Some(body) = known.bodies.get(&id) else {
            return Ok(Some(
                "this release cannot read what was asked for: run the same release at all nodes".to_owned(),
            ));
        };
        let differs = members.live().into_iter().find(|&id| {
            let name = members.name(id);
            body.nodes.get(&name) != Some(&id.0)
        });
        if let Some(id) = differs {
            let name = members.name(id);
            return Ok(Some(format!(
                "node {id} is called {name} here, and otherwise where it was asked for"
            )));
        }
        let (former, next): (Policies, Policies) = match force::both(body) {
            Ok(both) => both,
            Err(why) => return Ok(Some(why)),
        };
        if former.hash() != self.hash {
            return Ok(Some(format!(
                "the policy in force here has hash {}, and not {}",
                self.hash,
                former.hash()
            )));
        }
        let found = fit::obstacles(sql, &self.config.postgres.publication, &former, &next).await?;
        Ok((!found.is_empty()).then(|| found.join("\n")))
    }

    /// Takes the change that this life decides by as far as it goes now.
    async fn go_on(
        &self,
        sql: &Client,
        (id, change): (Uuid, &Asked),
        (members, known): (&Membership, &Known),
    ) -> Result<(), Error> {
        let (own, live) = (self.shared.node, members.live());
        let asked = change.by == Some(own);
        if change.phase(&live) == Phase::Asking && !change.votes.contains_key(&own) {
            let vote = match self.obstacles(sql, id, members, known).await? {
                Some(why) => Some(Vote::Refused(why)),
                None if asked => change.outcome(&live).map(|vote| said_of(vote, change, members)),
                None => Some(Vote::Ready),
            };
            if let Some(vote) = vote {
                self.say(sql, (id, change), Said::Voted(vote)).await?;
            }
            return Ok(());
        }
        let point = lock(&self.shared.resolver).change_point();
        let Some(point) = point else { return Ok(()) };
        if !change.passed.contains(&own) {
            self.say(sql, (id, change), Said::Passed(point)).await?;
        }
        lock(&self.shared.resolver).change_point_kept();
        let done = lock(&self.shared.policy).done;
        if done && !change.done.contains(&own) {
            self.say(sql, (id, change), Said::Done).await?;
        }
        Ok(())
    }

    /// This life decides by one policy: of the last change it is the new one, or one that came after it.
    async fn say_switched(&self, sql: &Client, known: &Known, live: &BTreeSet<NodeId>) -> Result<(), Error> {
        let own = self.shared.node;
        if let Some((id, change)) = known.changes.last(own, live)
            && !change.switched.contains(&own)
        {
            self.say(sql, (id, change), Said::Switched).await?;
        }
        Ok(())
    }

    fn shown(&self, members: &Membership, known: &Known, away: &BTreeSet<NodeId>) -> status::PolicyStatus {
        let live = members.live();
        let change = known.changes.unfinished(&live).map(|(id, change)| {
            let phase = change.phase(&live);
            let waits_for = change.waits_for(&live);
            let text = text_of(change, phase, (members, &waits_for, away));
            PolicyChange {
                id: id.to_string(),
                asked_by: change.by.map(|by| members.name(by)).unwrap_or_default(),
                next_hash: change.next.clone(),
                phase: match phase {
                    Phase::Asking => "asking",
                    Phase::Off => "off",
                    Phase::Made => "made",
                    Phase::Over => "over",
                    Phase::Ended => "ended",
                }
                .to_owned(),
                waits_for: names(members, &waits_for),
                text,
            }
        });
        status::PolicyStatus {
            hash: self.hash.clone(),
            change,
        }
    }
}

/// A refusal with the name of who refuses.
fn said_of(vote: Vote, change: &Asked, members: &Membership) -> Vote {
    let refused = change.votes.iter().find_map(|(node, vote)| match vote {
        Vote::Refused(why) => Some((node, why)),
        Vote::Ready => None,
    });
    match (vote, refused) {
        (Vote::Refused(_), Some((node, why))) => {
            Vote::Refused(format!("`{}` refuses: {why}", members.name(*node)))
        }
        (vote, _) => vote,
    }
}

/// Members to whom no link is open, as far as this node knows.
fn away(links: &Weak<Links>) -> BTreeSet<NodeId> {
    let Some(links) = links.upgrade() else {
        return BTreeSet::new();
    };
    let is_away = |peer: &crate::link::PeerStatus| !(peer.outbound.connected || peer.inbound.connected);
    let peers = links.status();
    peers.into_iter().filter(is_away).map(|peer| peer.id).collect()
}

fn text_of(
    change: &Asked,
    phase: Phase,
    (members, waits_for, away): (&Membership, &BTreeSet<NodeId>, &BTreeSet<NodeId>),
) -> String {
    let shown = |node: &NodeId| match away.contains(node) {
        true => format!("{} (away)", members.name(*node)),
        false => members.name(*node),
    };
    let listed = |nodes: &BTreeSet<NodeId>| nodes.iter().map(shown).collect::<Vec<_>>().join(", ");
    let whom = listed(waits_for);
    match phase {
        Phase::Asking => format!(
            "asked for by {}, not made yet: waits for {whom} to be ready for it",
            change.by.map(|by| members.name(by)).unwrap_or_default()
        ),
        Phase::Made if !waits_for.is_subset(&change.passed) => {
            format!("made: waits for {whom} to come to it in the stream")
        }
        Phase::Made => {
            // Nothing is known to be everywhere without them.
            let gone: BTreeSet<NodeId> = away
                .iter()
                .copied()
                .filter(|node| members.live().contains(node))
                .collect();
            let whom = if gone.is_empty() { whom } else { listed(&gone) };
            format!("made: waits until what was written before it is known to be applied everywhere ({whom})")
        }
        Phase::Over => format!("over: waits for {whom} to go on with the new policy alone"),
        Phase::Off | Phase::Ended => String::new(),
    }
}

/// Looks whether the policy of before is needed no more, and writes down then what is settled: `settled`, as the trimmed journal would
/// have it. To be called only when no finding waits.
///
/// # Errors
/// When that cannot be written.
pub(super) fn look_back(
    dir: &Path,
    shared: &Shared,
    (stable, known): (&Vector, &Vector),
    (settled, low): (&Vector, Stamp),
) -> Result<(), Error> {
    let Some(point) = lock(&shared.resolver).change_point() else {
        return Ok(());
    };
    let mut state = lock(&shared.policy);
    if state.done || !state.retreat.meet(point, stable, known, settled) {
        return Ok(());
    }
    super::trim::write(dir, settled, low).map_err(Error::Settled)?;
    *lock(&shared.low) = low;
    settled.clone_into(&mut lock(&shared.settled));
    state.done = true;
    Ok(())
}
