//! Upkeep: clock witnesses, the xid horizon, forgetting what is stable, the visibility gate.
//!
//! In:   shared positions, peers' clocks            Out: witnesses in the WAL, horizon, freed memory and disk
//! On crash: nothing to lose

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anabranch_proto::{Lsn, NodeId, Position, Vector};
use tokio::sync::watch;
use tokio_postgres::Client;

use super::Error;
use crate::apply::fence::{Fence, reportable};
use crate::config::Config;
use crate::journal::Journal;
use crate::link::Links;
use crate::membership::{self, Fact, FactKind};
use crate::pg;
use crate::shared::{Shared, lock};

/// What upkeep works on.
pub(super) struct Context {
    pub(super) config: Arc<Config>,
    pub(super) shared: Arc<Shared>,
    pub(super) journal: Journal,
    pub(super) links: Arc<Links>,
}

/// Must local transactions be visible before they are sent (`docs/design.md` section 3)? When a synchronous
/// standby other than this daemon can hold a commit back.
fn gate_wanted(synchronous_standby_names: &str) -> bool {
    !synchronous_standby_names.trim().is_empty() && !synchronous_standby_names.contains("anabranch")
}

/// The gate is open: everything may be sent.
const OPEN: Position = Position {
    epoch: u32::MAX,
    lsn: Lsn(u64::MAX),
};

/// Keeps things up until told to stop.
pub(super) async fn run(context: Context, mut stop: watch::Receiver<bool>) -> Result<(), Error> {
    let fence = Fence::open(&context.config)
        .await
        .map_err(crate::apply::Error::from)?;
    let (clock, _driver) = pg::connect(&context.config.postgres, "clock").await?;
    // The witness is flushed, and with it every apply transaction before it.
    clock
        .batch_execute("SET synchronous_commit = local; SET default_transaction_read_only = off; SET lock_timeout = '2s'")
        .await?;
    let mut upkeep = Upkeep {
        context,
        fence,
        clock,
        horizons: Vec::new(),
    };
    let interval = |ms| {
        let mut interval = tokio::time::interval(Duration::from_millis(ms));
        interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        interval
    };
    let mut witness = interval(upkeep.context.config.clock.witness_interval_ms.max(10));
    let (mut horizon, mut forget, mut gate) = (interval(20), interval(250), interval(2));
    loop {
        tokio::select! {
            _ = witness.tick() => upkeep.witness().await?,
            _ = horizon.tick() => upkeep.horizon().await?,
            _ = forget.tick() => {
                upkeep.forget()?;
                upkeep.become_ready().await?;
            }
            _ = gate.tick(), if upkeep.gated() => upkeep.gate().await?,
            _ = stop.changed() => if *stop.borrow() {
                return Ok(());
            }
        }
    }
}

struct Upkeep {
    context: Context,
    fence: Fence,
    clock: Client,
    /// Candidates that the decoder has not passed yet.
    horizons: Vec<(u32, u64)>,
}

impl Upkeep {
    /// Writes a time that the members agree with: the lower median of their clocks and ours, so that one wild
    /// clock, or the wilder of two, moves nothing.
    async fn witness(&mut self) -> Result<(), Error> {
        let mut offsets: Vec<i64> = self
            .context
            .links
            .clocks()
            .iter()
            .map(|(_, clock)| clock.offset_us)
            .collect();
        if !offsets.is_empty() {
            offsets.push(0);
            offsets.sort_unstable();
            let median = offsets.get((offsets.len() - 1) / 2).copied().unwrap_or(0);
            self.context
                .shared
                .clock_offset_us
                .store(median, Ordering::Relaxed);
        }
        let witness = self.context.shared.agreed_us();
        let node = i32::from(self.context.shared.node.0);
        let sql = "INSERT INTO anabranch.clock AS c (node_id, witness_us) VALUES ($1, $2) ON CONFLICT (node_id) \
            DO UPDATE SET witness_us = excluded.witness_us, written_at = clock_timestamp()";
        match self.clock.execute(sql, &[&node, &witness]).await {
            Ok(_) => self.context.shared.alarms.clear("witness"),
            // Somebody holds a lock on the row, or the disk is full: the next one may succeed.
            Err(error) if !self.clock.is_closed() && pg::is_transient(&error) => {
                let text = format!(
                    "the clock witness cannot be written: {}",
                    crate::error::sql(&error)
                );
                self.context.shared.alarms.raise("witness", text);
            }
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }

    async fn horizon(&mut self) -> Result<(), Error> {
        let decoded = *self.context.shared.decoded.borrow();
        while let Some(&(xid, lsn)) = self.horizons.first() {
            if reportable(lsn) > decoded {
                break;
            }
            self.context
                .shared
                .horizon
                .store(1 << 32 | u64::from(xid), Ordering::Release);
            self.horizons.remove(0);
        }
        if self.horizons.len() < 4 {
            let (xid, lsn, standbys) = self.fence.horizon().await.map_err(crate::apply::Error::from)?;
            if self.horizons.last().is_none_or(|last| last.1 != lsn) {
                self.horizons.push((xid, lsn));
            }
            self.switch_gate(gate_wanted(&standbys));
        }
        Ok(())
    }

    fn gated(&self) -> bool {
        *self.context.shared.sendable.borrow() != OPEN
    }

    fn switch_gate(&self, wanted: bool) {
        let shared = &self.context.shared;
        if wanted && !self.gated() {
            tracing::info!("a standby is synchronous: transactions are sent once they are visible here");
            shared.sendable.send_replace(*shared.own.borrow());
        } else if !wanted && self.gated() {
            shared.sendable.send_replace(OPEN);
            lock(&shared.unseen).clear();
        }
    }

    fn forget(&mut self) -> Result<(), Error> {
        let shared = &self.context.shared;
        if shared.keep_all.load(Ordering::SeqCst) {
            return Ok(());
        }
        let stable = lock(&shared.stability).stable();
        let seen = shared.echoed.borrow().clone();
        lock(&shared.resolver)
            .forget_stable(&stable, &seen, shared.horizon())
            .map_err(crate::capture::Error::from)?;
        // The frame that the slot is confirmed up to is the checkpoint: it stays.
        let confirmed = Lsn(shared.confirmed.load(Ordering::Relaxed).saturating_sub(1));
        let forgettable: Vector = stable
            .iter()
            .map(|(node, position)| {
                let own_cap = Position {
                    lsn: confirmed.min(position.lsn),
                    ..position
                };
                (node, if node == shared.node { own_cap } else { position })
            })
            .collect();
        self.context.journal.retain(&forgettable)?;
        match self.context.journal.stats().stalled {
            Some(text) => shared.alarms.raise("journal", text),
            None => shared.alarms.clear("journal"),
        }
        shared.sample_own();
        self.quorum();
        Ok(())
    }

    /// A node that joins takes writes once every member has let it know, in its own stream, that it has applied
    /// something of this one's. Until then the database is read only by default.
    async fn become_ready(&mut self) -> Result<(), Error> {
        let shared = &self.context.shared;
        let own = shared.node;
        let (members, fact) = {
            let members = lock(&shared.members);
            if members.ready().contains(&own) {
                return Ok(());
            }
            (members.live(), members.get(own, FactKind::Joined).cloned())
        };
        let Some(fact) = fact else { return Ok(()) };
        let silent: Vec<String> = {
            let stability = lock(&shared.stability);
            let knows_us = |node: &NodeId| {
                stability
                    .member(*node)
                    .is_some_and(|it| it.get(own) > Position::ZERO)
            };
            let silent = members.iter().filter(|&&node| node != own && !knows_us(&node));
            silent.map(ToString::to_string).collect()
        };
        if !silent.is_empty() || lock(&shared.resolver).found_from().is_some() {
            let text = if silent.is_empty() {
                "joining: looks through its copy".to_owned()
            } else {
                format!("joining: waits to hear that node {} knows it", silent.join(", "))
            };
            *lock(&shared.joining) = Some(text);
            return Ok(());
        }
        let opened = self
            .clock
            .batch_execute("SELECT anabranch.open_for_writes()")
            .await;
        let fact = Fact {
            kind: FactKind::Ready,
            ..fact
        };
        let said = match opened {
            Ok(()) => membership::say(&self.clock, own, &fact).await,
            Err(error) => Err(error),
        };
        match said {
            Ok(()) => {
                *lock(&shared.joining) = None;
                shared.alarms.clear("joining");
                // Met again when it is decoded.
                shared.note_member(fact);
                tracing::info!("every member knows this node: it takes writes");
                Ok(())
            }
            Err(error) if self.clock.is_closed() => Err(error.into()),
            Err(error) => {
                let text = format!(
                    "the database cannot be opened for writes: {}",
                    crate::error::sql(&error)
                );
                shared.alarms.raise("joining", text);
                Ok(())
            }
        }
    }

    /// What a majority of the members, this one included, has durably applied of our stream.
    fn quorum(&self) {
        let shared = &self.context.shared;
        let reports = self.context.links.reports();
        let reports = reports.borrow();
        let node: NodeId = shared.node;
        // A node that joins has no vote yet: nobody's commit waits for its copy.
        let voters = lock(&shared.members).ready();
        let mut applied: Vec<u64> = voters
            .iter()
            .filter(|&&voter| voter != node)
            .map(|voter| {
                reports
                    .get(voter)
                    .map_or(0, |report| report.applied.get(node).lsn.0)
            })
            .collect();
        applied.sort_unstable_by(|a, b| b.cmp(a));
        let needed = applied.len().div_ceil(2);
        let quorum = match needed.checked_sub(1) {
            Some(at) => applied.get(at).copied().unwrap_or(0),
            None => u64::MAX,
        };
        shared.quorum_applied.fetch_max(quorum, Ordering::Relaxed);
    }

    /// Opens the gate up to the last own transaction that is visible here, in order.
    async fn gate(&mut self) -> Result<(), Error> {
        const VISIBLE: &str = "SELECT pg_visible_in_snapshot((x.max - ((x.max - $1) & 4294967295))::text::xid8, x.s) \
            FROM (SELECT s, pg_snapshot_xmax(s)::text::int8 AS max FROM pg_current_snapshot() AS s) AS x";
        loop {
            let Some((position, xid)) = lock(&self.context.shared.unseen).front().copied() else {
                return Ok(());
            };
            let visible = self.clock.query_one(VISIBLE, &[&i64::from(xid)]).await?;
            if !visible.try_get::<_, bool>(0)? {
                return Ok(());
            }
            lock(&self.context.shared.unseen).pop_front();
            self.context.shared.sendable.send_if_modified(|sendable| {
                let higher = position > *sendable;
                *sendable = position.max(*sendable);
                higher
            });
        }
    }
}
