//! This node leaves: it drains, says goodbye, and is done once the others have closed its stream.
//!
//! In:   the row of `anabranch.leaving`, sessions, positions of the peers     Out: a fact; what `status` says of it
//! Invariants: 1. goodbye is said only once nobody writes here any more who is not told that the database is read only,
//!             and all that was written or is held here is applied at every other member; 2. until then the node may
//!             stay after all; 3. the last member says none: nobody could close its stream
//! On crash: goes on from the row and the facts
//! Not here: what the others do (`dropping`), life after it (`left`)

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anabranch_proto::{NodeId, Position, Vector};
use tokio::time::Instant;
use tokio_postgres::Client;

use super::Error;
use super::maintenance::Context;
use crate::apply::fence::{Fence, reportable};
use crate::membership::{self, Fact, FactKind, Membership};
use crate::pg;
use crate::shared::lock;
use crate::status;

/// Between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// Who is away for so long without a break may have left meanwhile, when all leave; or is not to be waited for in silence.
const LONG: Duration = Duration::from_secs(60);
/// Where nobody stays, a node that is done stays so long for the others, which may hear of it a moment later.
const LINGER: Duration = Duration::from_secs(3);

/// Sessions that began before the database became read only, and prepared transactions: what may still write.
/// `$1` is when it did. Of a session that the role may not see, since `pg_read_all_stats` was taken from it, nobody knows when it began;
/// what belongs to no role, as autovacuum, writes no rows.
fn writers() -> String {
    let own = pg::own_session("current_user");
    format!(
        "SELECT format('session %s of %s%s%s', pid, coalesce(usename::text, '?'), \
            CASE WHEN application_name <> '' THEN format(' (%s)', left(application_name, 40)) ELSE '' END, \
            CASE WHEN backend_start IS NULL THEN ', which this role may not see (pg_read_all_stats)' ELSE '' END) \
        FROM pg_stat_activity WHERE datname = current_database() \
            AND (backend_start IS NULL AND usesysid IS NOT NULL OR backend_start < $1 \
                AND (backend_type = 'client backend' OR backend_type LIKE 'logical replication%')) \
            AND pid <> pg_backend_pid() AND NOT {own} \
        UNION ALL \
        SELECT format('prepared transaction %s of %s', quote_literal(gid), owner) \
        FROM pg_prepared_xacts WHERE database = current_database()"
    )
}

/// How far it is.
#[derive(Default)]
pub(super) struct Leaving {
    look_at: Option<Instant>,
    /// End of the WAL when the last writer was gone.
    fence: Option<u64>,
    /// What every other member must have applied.
    goal: Option<Vector>,
    /// The goal is behind the goodbye, since there is nobody who stays.
    is_of_goodbye: bool,
    /// Where nobody stays: who has heard this node's goodbye, also when he is gone since.
    heard: BTreeSet<NodeId>,
    /// And since when nobody else is waited for.
    done_at: Option<Instant>,
    away: Away,
}

/// Since when others are away, without a break.
#[derive(Default)]
struct Away(BTreeMap<NodeId, Instant>);

impl Away {
    fn look(&mut self, others: &BTreeSet<NodeId>, here: &BTreeSet<NodeId>, now: Instant) {
        self.0
            .retain(|node, _| others.contains(node) && !here.contains(node));
        for &node in others.difference(here) {
            self.0.entry(node).or_insert(now);
        }
    }

    fn is_away(&self, node: NodeId) -> bool {
        self.0.contains_key(&node)
    }

    fn is_long_away(&self, node: NodeId, now: Instant) -> bool {
        self.0
            .get(&node)
            .is_some_and(|&since| now.duration_since(since) >= LONG)
    }
}

impl Leaving {
    /// Takes it as far as it goes now.
    ///
    /// # Errors
    /// When the database fails.
    pub(super) async fn go_on(
        &mut self,
        context: &Context,
        sql: &Client,
        fence: &Fence,
    ) -> Result<(), Error> {
        let now = Instant::now();
        if self.look_at.is_some_and(|at| now < at) {
            return Ok(());
        }
        self.look_at = Some(now + LOOK_EVERY);
        let shown = self.look(context, sql, fence).await?;
        let mut known = lock(&context.shared.leaving);
        if known.as_ref().map(|it| &it.text) != shown.as_ref().map(|it| &it.text) {
            match &shown {
                Some(shown) => tracing::info!(phase = shown.phase, "leaving: {}", shown.text),
                None => tracing::info!("this node stays"),
            }
        }
        *known = shown;
        Ok(())
    }

    /// What was reached with draining counts no more.
    fn drain_anew(&mut self) {
        (self.fence, self.goal, self.is_of_goodbye) = (None, None, false);
        self.heard.clear();
        self.done_at = None;
    }

    async fn look(
        &mut self,
        context: &Context,
        sql: &Client,
        fence: &Fence,
    ) -> Result<Option<status::Leaving>, Error> {
        let own = context.shared.node;
        let members = lock(&context.shared.members).clone();
        let now = Instant::now();
        self.away.look(&others(&members, own), &here(context), now);
        if members.said_goodbye(own) {
            return match members.survivors().is_empty() {
                true => self.nobody_stays(context, &members, fence).await.map(Some),
                false => Ok(Some(after_goodbye(&members, &self.away, now))),
            };
        }
        let asked = "SELECT since, since > clock_timestamp() FROM anabranch.leaving";
        let Some(row) = sql.query_opt(asked, &[]).await? else {
            self.drain_anew();
            return Ok(None);
        };
        if members.live().len() == 1 {
            return Ok(Some(alone()));
        }
        if let Some(waiting) = others_first(&members, own) {
            return Ok(Some(waiting));
        }
        let since: std::time::SystemTime = row.try_get(0)?;
        let writers: Vec<String> = sql
            .query(&writers(), &[&since])
            .await?
            .iter()
            .map(|row| row.try_get(0))
            .collect::<Result<_, _>>()?;
        if !writers.is_empty() {
            self.drain_anew();
            let mut text = format!(
                "waits for what began before the database became read only, and may still write: {}",
                some_of(&writers)
            );
            if row.try_get::<_, bool>(1)? {
                text.push_str(
                    ". The clock of this server was set back, so who connects now counts among them for a while: once those that are older \
                     have ended, `anabranch leave --cancel` and `anabranch leave` let it count anew",
                );
            }
            return Ok(Some(draining(writers, text)));
        }
        let Some(goal) = self.goal(context, fence).await? else {
            let text = "decodes what was written here last".to_owned();
            return Ok(Some(draining(Vec::new(), text)));
        };
        let behind = behind(context, members.survivors(), &goal);
        if !behind.is_empty() {
            let text = format!(
                "waits for {} to apply what this node wrote and holds",
                self.shown(&members, &behind)
            );
            return Ok(Some(draining(names(&members, &behind), text)));
        }
        let Some(entry) = members.entry(own) else {
            return Ok(None);
        };
        let goodbye = Fact {
            kind: FactKind::Dropping,
            position: Position::ZERO,
            by: own,
            ..entry.clone()
        };
        membership::say_goodbye(sql, &goodbye).await?;
        Ok(Some(draining(
            Vec::new(),
            "every other member has all of it".to_owned(),
        )))
    }

    /// After goodbye, when every other member has said it, too: nobody is left to close any stream, and nobody needs to, as each has
    /// what the others wrote. This node has left once the others can know the same: it would leave one that comes back after a while with
    /// nobody to hear it from. Only who is away for long is not waited for, as he may have left.
    async fn nobody_stays(
        &mut self,
        context: &Context,
        members: &Membership,
        fence: &Fence,
    ) -> Result<status::Leaving, Error> {
        if !self.is_of_goodbye {
            self.drain_anew();
            self.is_of_goodbye = true;
        }
        let own = context.shared.node;
        let Some(goal) = self.goal(context, fence).await? else {
            return Ok(after_goodbye(members, &self.away, Instant::now()));
        };
        // Other streams are nobody's concern any more.
        let goodbye: Vector = [(own, goal.get(own))].into_iter().collect();
        let mut unheard = behind(context, members.live(), &goodbye);
        self.heard.extend(others(members, own).difference(&unheard));
        let now = Instant::now();
        unheard.retain(|&node| !self.heard.contains(&node) && !self.away.is_long_away(node, now));
        let text = if unheard.is_empty() {
            let done_at = *self.done_at.get_or_insert(now);
            if now.duration_since(done_at) >= LINGER {
                return Err(Error::Left);
            }
            "every other member leaves, too, and has heard of this node's goodbye".to_owned()
        } else {
            self.done_at = None;
            format!(
                "every other member leaves, too; waits until {} has heard of this node's goodbye",
                self.shown(members, &unheard)
            )
        };
        Ok(status::Leaving {
            phase: "goodbye".to_owned(),
            waits_for: names(members, &unheard),
            text,
        })
    }

    /// Names, with a word at those that are away.
    fn shown(&self, members: &Membership, nodes: &BTreeSet<NodeId>) -> String {
        let shown = nodes.iter().map(|&node| match self.away.is_away(node) {
            true => format!("{} (away)", members.name(node)),
            false => members.name(node),
        });
        shown.collect::<Vec<_>>().join(", ")
    }

    /// Everything that this node holds at a moment when nobody writes here any more; none while that is not decoded.
    async fn goal(&mut self, context: &Context, fence: &Fence) -> Result<Option<Vector>, Error> {
        if self.goal.is_none() {
            let end = match self.fence {
                Some(end) => end,
                None => fence.insert_lsn().await.map_err(crate::apply::Error::from)?,
            };
            self.fence = Some(end);
            // A heartbeat of the own stream comes every second, and behind it is all that was before the fence.
            let own = context.shared.node;
            let echoed = context.shared.echoed.borrow().clone();
            let timeline = context.shared.timeline.load(std::sync::atomic::Ordering::Relaxed);
            let own = echoed.get(own);
            if own.epoch >= timeline && own.lsn.0 >= reportable(end) {
                let mut goal = echoed;
                goal.join(&context.links.held());
                self.goal = Some(goal);
            }
        }
        Ok(self.goal.clone())
    }
}

/// What is left to do for the last one is not this daemon's.
fn alone() -> status::Leaving {
    status::Leaving {
        phase: status::ALONE.to_owned(),
        waits_for: Vec::new(),
        text: "this node is the only member, there is nobody to leave: stop its daemon and run `anabranch remove`, which opens the \
               database and leaves the rows; or let it stay, with `anabranch leave --cancel`"
            .to_owned(),
    }
}

fn draining(waits_for: Vec<String>, text: String) -> status::Leaving {
    status::Leaving {
        phase: "draining".to_owned(),
        waits_for,
        text,
    }
}

/// Who joins may be copying from here, and who is lost may have been heard last by this node: both come first.
fn others_first(members: &Membership, own: NodeId) -> Option<status::Leaving> {
    let dropping = members.dropping();
    if !dropping.is_empty() {
        let names = names(members, &dropping);
        let text = format!("waits until {} is out of the cluster", names.join(", "));
        return Some(draining(names, text));
    }
    let joining: BTreeSet<NodeId> = members.live().difference(&members.ready()).copied().collect();
    if joining.is_empty() || joining.contains(&own) {
        return None;
    }
    let names = names(members, &joining);
    let text = format!("waits until {} has joined", names.join(", "));
    Some(draining(names, text))
}

fn after_goodbye(members: &Membership, away: &Away, now: Instant) -> status::Leaving {
    // As far as this node hears of it: the others stop talking to it.
    let silent = names(members, &members.silent());
    let survivors = members.survivors();
    let text = if !survivors.is_empty() && survivors.iter().all(|&node| away.is_long_away(node, now)) {
        // They may have said goodbye, too, and left before this node heard of it: nobody is there to close its stream then.
        format!(
            "has said goodbye; waits until the others have closed its stream, and has not been connected with {} for a minute. Each has all \
             that was written here: if they are gone for good, or have left as well, stop this daemon and run `anabranch remove \
             --without-leaving`",
            names(members, &survivors).join(", ")
        )
    } else if silent.is_empty() {
        "has said goodbye; waits until the others have closed its stream".to_owned()
    } else {
        format!(
            "has said goodbye; waits until the others have closed its stream (not heard of yet: {})",
            silent.join(", ")
        )
    };
    status::Leaving {
        phase: "goodbye".to_owned(),
        waits_for: silent,
        text,
    }
}

/// Those members that are not known to have applied all of `goal`: as they report, or as their own streams tell.
fn behind(context: &Context, among: BTreeSet<NodeId>, goal: &Vector) -> BTreeSet<NodeId> {
    let shared = &context.shared;
    let reports = context.links.reports();
    let reports = reports.borrow();
    let stability = lock(&shared.stability);
    let has_applied = |node: NodeId| {
        let covers = |vector: &Vector| goal.iter().all(|(origin, upto)| vector.covers(origin, upto));
        reports.get(&node).is_some_and(|report| covers(&report.applied))
            || stability.member(node).is_some_and(covers)
    };
    among
        .into_iter()
        .filter(|&node| node != shared.node && !has_applied(node))
        .collect()
}

/// Those of the others that a link connects with.
fn here(context: &Context) -> BTreeSet<NodeId> {
    let links = context.links.status();
    links
        .iter()
        .filter(|peer| peer.outbound.connected || peer.inbound.connected)
        .map(|peer| peer.id)
        .collect()
}

fn others(members: &Membership, own: NodeId) -> BTreeSet<NodeId> {
    let mut live = members.live();
    live.remove(&own);
    live
}

fn names(members: &Membership, nodes: &BTreeSet<NodeId>) -> Vec<String> {
    nodes.iter().map(|&node| members.name(node)).collect()
}

/// The first few, and how many more.
fn some_of(all: &[String]) -> String {
    const SHOWN: usize = 5;
    let shown: Vec<&str> = all.iter().take(SHOWN).map(String::as_str).collect();
    match all.len().saturating_sub(SHOWN) {
        0 => shown.join(", "),
        more => format!("{} and {more} more", shown.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_comes_back_for_a_moment_is_not_long_away() {
        let [one, other] = [NodeId(1), NodeId(2)];
        let (both, nobody) = (BTreeSet::from([one, other]), BTreeSet::new());
        let began = Instant::now();
        let mut away = Away::default();
        away.look(&both, &nobody, began);
        assert!(away.is_away(one) && !away.is_long_away(one, began));
        away.look(&both, &BTreeSet::from([other]), began + LONG / 2);
        away.look(&both, &nobody, began + LONG / 2 + LOOK_EVERY);
        assert!(away.is_long_away(one, began + LONG));
        assert!(away.is_away(other) && !away.is_long_away(other, began + LONG));
    }
}
