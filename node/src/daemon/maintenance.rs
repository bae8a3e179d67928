//! Upkeep: clock witnesses, the xid horizon, forgetting what is stable, looking through the visibility gate.
//!
//! In:   shared positions, peers' clocks            Out: witnesses in the WAL, horizon, freed memory and disk
//! On crash: nothing to lose

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anabranch_proto::{Lsn, NodeId, Position, Stamp, Vector};
use tokio::sync::watch;
use tokio_postgres::Client;

use super::agreed::Agreed;
use super::gate::{self, Gate};
use super::leaving::Leaving;
use super::own_limit::OwnLimit;
use super::trim::Trim;
use super::{Error, dropping, policy_watch};
use crate::apply::fence::{Fence, reportable};
use crate::broken::{self, Rule};
use crate::config::Config;
use crate::donor::Donor;
use crate::heal::{Horizon, Horizons};
use crate::journal::Journal;
use crate::link::Links;
use crate::membership::{self, Fact, FactKind};
use crate::names::Names;
use crate::pg::{self, Prepared};
use crate::setup;
use crate::setup::sequence::{self, Depth};
use crate::shared::{Shared, Visibility, lock, now_us, steady_us};
use crate::small_file::off_runtime;

/// Each is a small file and its sync.
const KEEP_HORIZON_EVERY: Duration = Duration::from_secs(2);
/// Between two tries of a node that joined to take writes, once every member knows it.
const OPEN_EVERY: Duration = Duration::from_secs(2);
/// For so long the first witness waits for the clock of any peer: else it would be the time of this machine alone, which may have come up with
/// any, and what is stamped by that stays so. What is committed meanwhile is stamped by the witness of before, as if the daemon were not back yet.
const FIRST_MEASURE: Duration = Duration::from_secs(10);
/// Between two looks for it.
const FIRST_MEASURE_LOOK: Duration = Duration::from_millis(100);

/// What upkeep works on.
pub(super) struct Context {
    pub(super) config: Arc<Config>,
    pub(super) shared: Arc<Shared>,
    pub(super) journal: Journal,
    pub(super) links: Arc<Links>,
    pub(super) donor: Arc<Donor>,
}

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
    // Apart, since it may wait for locks. Ends with this.
    let mut log = tokio::task::JoinSet::new();
    log.spawn(super::log_upkeep::run(
        Arc::clone(&context.config),
        Arc::clone(&context.shared),
    ));
    // One that cannot be read is written anew.
    let kept = Horizons::read(&context.config.node.data_dir).unwrap_or_default();
    let gate = Gate::open(&clock).await?;
    let mut upkeep = Upkeep {
        context,
        fence,
        clock,
        gate,
        waits: Prepared::default(),
        horizons: Vec::new(),
        keep: None,
        kept,
        keep_due: tokio::time::Instant::now(),
        trim: Trim::default(),
        own_limit: OwnLimit::default(),
        leaving: Leaving::default(),
        agreed: Agreed::default(),
        open_due: tokio::time::Instant::now(),
    };
    let interval = |ms| {
        let mut interval = tokio::time::interval(Duration::from_millis(ms));
        interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        interval
    };
    let mut witness = interval(upkeep.context.config.clock.witness_interval_ms.max(10));
    let (mut horizon, mut forget, mut gate) = (interval(20), interval(250), interval(2));
    let mut waiting_commit = interval(20);
    let mut reports = upkeep.context.links.reports();
    let began = tokio::time::Instant::now();
    loop {
        let visibility = upkeep.visibility();
        tokio::select! {
            _ = witness.tick() => if upkeep.may_tell_time(began.elapsed()) {
                upkeep.witness().await?;
            } else {
                witness.reset_after(FIRST_MEASURE_LOOK);
            },
            _ = horizon.tick() => upkeep.horizon().await?,
            _ = forget.tick() => {
                upkeep.forget()?;
                upkeep.look_for_facts().await?;
                upkeep.become_ready().await?;
                let context = &upkeep.context;
                context.donor.end_useless(&lock(&context.shared.members));
                dropping::go_on(&upkeep.context, &upkeep.clock).await?;
                upkeep.leaving.go_on(&upkeep.context, &upkeep.clock, &upkeep.fence).await?;
            }
            _ = gate.tick(), if visibility != Visibility::Prompt => {
                upkeep.gate.look(&upkeep.clock, &upkeep.context.shared).await?;
            }
            _ = waiting_commit.tick(), if visibility == Visibility::BeforeDependents => {
                upkeep.look_for_waiting_commit().await?;
            }
            // The sender is in `links`, which we hold.
            _ = reports.changed() => {
                reports.borrow_and_update();
                upkeep.quorum();
            }
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
    gate: Gate,
    /// The question of [`Self::look_for_waiting_commit`].
    waits: Prepared,
    /// Candidates that the decoder has not passed yet.
    horizons: Vec<(u64, u64)>,
    /// The one that is to be kept on disk next, and when.
    keep: Option<Horizon>,
    kept: Horizons,
    keep_due: tokio::time::Instant,
    trim: Trim,
    own_limit: OwnLimit,
    leaving: Leaving,
    agreed: Agreed,
    /// See [`OPEN_EVERY`].
    open_due: tokio::time::Instant,
}

impl Upkeep {
    /// Is there more to tell the time by than this machine's clock, or nobody to wait for, `since` upkeep began?
    fn may_tell_time(&self, since: Duration) -> bool {
        since >= FIRST_MEASURE
            || self.context.config.peers.is_empty()
            || !self.context.links.clocks().is_empty()
    }

    /// Writes a time that the members agree with: the lower median of their clocks and ours, so that one wild
    /// clock, or the wilder of two, moves nothing. All are compared with a clock that nobody sets, so that a jump of
    /// ours is seen as one at once, and not taken for the time until the peers' clocks are measured again; a step of the median itself
    /// is taken only once it lasts, and what a peer's clock showed before it was out of reach makes none.
    async fn witness(&mut self) -> Result<(), Error> {
        let measured_at = steady_us();
        let mut offsets: Vec<i64> = self
            .context
            .links
            .clocks()
            .iter()
            .filter(|(_, clock)| self.agreed.counts(clock.offset_us, clock.heard_us, measured_at))
            .map(|(_, clock)| clock.offset_us)
            .collect();
        if !offsets.is_empty() {
            offsets.push(now_us().saturating_sub(steady_us()));
            offsets.sort_unstable();
            let median = offsets.get((offsets.len() - 1) / 2).copied().unwrap_or(0);
            let offset = self.agreed.take(median, steady_us());
            self.context
                .shared
                .clock_offset_us
                .store(offset, Ordering::Relaxed);
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
                .store(1 << 32 | (xid & 0xFFFF_FFFF), Ordering::Release);
            let timeline = self.context.shared.timeline.load(Ordering::Relaxed);
            self.keep.get_or_insert(Horizon {
                xid,
                lsn: Lsn(lsn),
                timeline,
                at_us: now_us(),
            });
            self.horizons.remove(0);
        }
        self.keep_horizon();
        // Also while the decoder is behind: the gate goes by the setting.
        self.context.shared.progress.asks();
        let found = self.fence.horizon().await.map_err(crate::apply::Error::from)?;
        let context = &self.context;
        let decoded = *context.shared.decoded.borrow();
        context.shared.progress.answered(found.flushed, decoded);
        if self.horizons.len() < 4 && self.horizons.last().is_none_or(|last| last.1 != found.lsn) {
            self.horizons.push((found.xid, found.lsn));
        }
        gate::switch(&context.shared, &found.standbys);
        if let Some(snapshot) = &found.snapshot {
            gate::let_go(&context.shared, snapshot);
        }
        self.own_limit
            .look(&context.shared, &context.journal, &context.links, found.lsn);
        Ok(())
    }

    /// Writes a horizon down, should the slot be lost one day: once all own transactions below it are durable in the
    /// journal, which is what the slot is confirmed to.
    fn keep_horizon(&mut self) {
        let confirmed = self.context.shared.confirmed.load(Ordering::Relaxed);
        let now = tokio::time::Instant::now();
        let Some(horizon) = self
            .keep
            .take_if(|horizon| reportable(horizon.lsn.0) <= confirmed)
        else {
            return;
        };
        if now < self.keep_due {
            return;
        }
        self.keep_due = now + KEEP_HORIZON_EVERY;
        let dir = &self.context.config.node.data_dir;
        match off_runtime(|| self.kept.keep(dir, horizon)) {
            Ok(()) => self.context.shared.alarms.clear("horizon"),
            Err(error) => {
                let text = format!("horizon.json in node.data_dir cannot be written: {error}");
                self.context.shared.alarms.raise("horizon", text);
            }
        }
    }

    fn visibility(&self) -> Visibility {
        *self.context.shared.visibility.borrow()
    }

    fn forget(&mut self) -> Result<(), Error> {
        let shared = Arc::clone(&self.context.shared);
        if !shared.keep_all.load(Ordering::SeqCst) {
            match self.forget_stable() {
                Ok(()) => shared.alarms.clear("settled"),
                Err(error) if error.is_no_space() && !matches!(error, Error::Capture(_)) => {
                    let text = format!(
                        "settled.json in node.data_dir cannot be written, so the journal lets nothing go: {error}"
                    );
                    shared.alarms.raise("settled", text);
                }
                Err(error) => return Err(error),
            }
        }
        let journal = &self.context.journal;
        match journal.stats().stalled.or_else(|| journal.full()) {
            Some(text) => shared.alarms.raise("journal", text),
            None => shared.alarms.clear("journal"),
        }
        shared.sample_own();
        Ok(())
    }

    /// While own transactions wait for room, a fact about members that was written here, or applied, waits with them: nobody
    /// would ever hear that the member that is waited for is dropped.
    async fn look_for_facts(&mut self) -> Result<(), Error> {
        let shared = &self.context.shared;
        if !shared.own_waits.load(Ordering::Relaxed) {
            return Ok(());
        }
        let written = membership::read(&self.clock).await?;
        let members = lock(&shared.members).clone();
        let mut all = members.clone();
        all.join(written);
        if all != members {
            self.own_limit.note_news();
        }
        Ok(())
    }

    fn forget_stable(&mut self) -> Result<(), Error> {
        let shared = &self.context.shared;
        let mut stable = lock(&shared.stability).stable();
        // Once more: a fact that was met since stands before what its stream has told from there on.
        if shared.keep_all.load(Ordering::SeqCst) {
            return Ok(());
        }
        if broken::is(Rule::Stability) {
            let own = shared.echoed.borrow().clone();
            let reports = self.context.links.reports();
            let reports = reports.borrow();
            let peers = self.context.config.peers.iter();
            stable = peers.fold(own, |stable, peer| {
                let applied = reports.get(&peer.id).map(|report| report.applied.clone());
                stable.meet(&applied.unwrap_or_default())
            });
        }
        let seen = shared.echoed.borrow().clone();
        {
            let mut resolver = lock(&shared.resolver);
            resolver
                .forget_stable(&stable, &seen, shared.horizon())
                .map_err(crate::capture::Error::from)?;
            if resolver.needs_all() {
                return Ok(());
            }
        }
        self.trim(&stable)
    }

    /// Lets the journal's oldest files go.
    fn trim(&mut self, stable: &Vector) -> Result<(), Error> {
        let shared = &self.context.shared;
        let wanted = {
            let resolver = lock(&shared.resolver);
            if resolver.needs_journal_for_change() {
                return Ok(());
            }
            resolver.wanted()
        };
        // A restart meets again what lies behind the checkpoint.
        let stable = stable.meet(&lock(&shared.checkpoint));
        // Before what is known: nothing that is not may have a stamp up to it.
        let low = {
            let (heard, members) = (lock(&shared.heard), lock(&shared.members));
            let of = |node: &NodeId| heard.get(node).copied().unwrap_or(Stamp::ZERO);
            members.live().iter().map(of).min().unwrap_or(Stamp::ZERO)
        };
        let mut known = shared.applied.borrow().clone();
        known.join(&shared.echoed.borrow());
        self.trim.meet((stable.clone(), low), known.clone());
        // The frame that the slot is confirmed up to is the checkpoint: it stays.
        let confirmed = Lsn(shared.confirmed.load(Ordering::Relaxed).saturating_sub(1));
        let forgettable = super::trim::without(self.trim.upto(), &wanted);
        let forgettable: Vector = forgettable
            .iter()
            .map(|(node, position)| {
                let own_cap = Position {
                    lsn: confirmed.min(position.lsn),
                    ..position
                };
                (node, if node == shared.node { own_cap } else { position })
            })
            .collect();
        // A change of the policy may have settled more than was let go.
        let low = self.trim.low().max(*lock(&shared.low));
        let mut settled = lock(&shared.settled).clone();
        settled.join(self.trim.settled());
        let dir = &self.context.config.node.data_dir;
        policy_watch::look_back(dir, shared, (&stable, &known), (&settled, low))?;
        // Mostly nothing goes, and then nothing waits.
        let retained = || {
            self.context.journal.retain_after(&forgettable, || {
                super::trim::write(dir, &settled, low)?;
                *lock(&shared.low) = low;
                *lock(&shared.settled) = settled;
                Ok(())
            })
        };
        match self.context.journal.stats().segments {
            0 | 1 => retained()?,
            _ => off_runtime(retained)?,
        };
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
            let names = Names::known(&self.context.config, shared);
            silent.map(|node| names.with_id(node.0)).collect()
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
        let now = tokio::time::Instant::now();
        if now < self.open_due {
            return Ok(());
        }
        self.open_due = now + OPEN_EVERY;
        match undivided(&self.context, &self.clock).await {
            Ok(undivided) if undivided.is_empty() => {}
            Ok(undivided) => {
                *lock(&shared.joining) = Some(format!(
                    "joining: members divide sequences that this node does not ({}), so it would give ids that they give: run \
                     `anabranch sequences apply` here",
                    undivided.join(", ")
                ));
                // Of an earlier look that could not be taken.
                shared.alarms.clear("joining");
                return Ok(());
            }
            // Whatever is asked next ends this life.
            Err(_) if self.clock.is_closed() => return Ok(()),
            Err(error) => {
                let text = format!(
                    "the database is not opened for writes yet: whether members divide sequences that this node does not cannot be \
                     told: {error}"
                );
                *lock(&shared.joining) = Some("joining: its sequences cannot be looked at".to_owned());
                shared.alarms.raise("joining", text);
                return Ok(());
            }
        }
        let opened = self
            .clock
            .batch_execute("SELECT anabranch.open_for_writes()")
            .await;
        let fact = Fact {
            kind: FactKind::Ready,
            by: own,
            ..fact
        };
        let said = match opened {
            Ok(()) => membership::say(&self.clock, &fact).await,
            Err(error) => Err(error),
        };
        match said {
            Ok(()) => {
                *lock(&shared.joining) = None;
                shared.alarms.clear("joining");
                // Met again when it is decoded.
                shared.note_member(fact);
                tracing::info!("every member knows this node: it takes writes");
                // Sessions that were opened before are read only for good, the daemon's own among them.
                shared.members_changed.send_replace(true);
                Ok(())
            }
            Err(error) if self.clock.is_closed() => Err(error.into()),
            Err(error) => {
                let text = format!(
                    "the database cannot be opened for writes: {}",
                    crate::error::sql(&error)
                );
                *lock(&shared.joining) = Some("joining: its database cannot be opened for writes".to_owned());
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
        let timeline = shared.timeline.load(Ordering::Relaxed);
        // A node that joins has no vote yet: nobody's commit waits for its copy.
        let voters = lock(&shared.members).ready();
        let mut applied: Vec<u64> = voters
            .iter()
            .filter(|&&voter| voter != node)
            .map(|voter| {
                let applied = reports.get(voter).map(|report| report.applied.get(node));
                // LSNs of an earlier timeline say nothing of this one's.
                let applied = applied.filter(|applied| applied.epoch >= timeline);
                applied.map_or(0, |applied| applied.lsn.0)
            })
            .collect();
        applied.sort_unstable_by(|a, b| b.cmp(a));
        let needed = applied.len().div_ceil(2);
        let quorum = match needed.checked_sub(1) {
            Some(at) => applied.get(at).copied().unwrap_or(0),
            None => u64::MAX,
        };
        shared.quorum_applied.send_if_modified(|known| {
            let higher = quorum > *known;
            *known = quorum.max(*known);
            higher
        });
    }

    /// Does the applier wait, through whatever chain of locks, for a commit that waits for its synchronous standby,
    /// which is us? Two nodes would then wait for each other, each for the other to apply a write of the same row:
    /// peers are told that what is durable in the journal is as good as applied, which lets one of them go on.
    async fn look_for_waiting_commit(&mut self) -> Result<(), Error> {
        const WAITS: &str = "WITH RECURSIVE blocker(pid) AS (SELECT unnest(pg_blocking_pids($1)) \
            UNION SELECT unnest(pg_blocking_pids(pid)) FROM blocker) \
            SELECT EXISTS (SELECT FROM blocker JOIN pg_stat_activity USING (pid) WHERE wait_event = 'SyncRep')";
        let shared = Arc::clone(&self.context.shared);
        let backend = shared.apply_backend.load(Ordering::Relaxed);
        let statement = self.waits.of(&self.clock, WAITS).await?;
        let waits: bool = self.clock.query_one(statement, &[&backend]).await?.try_get(0)?;
        if waits && lock(&shared.resolver).has_found() {
            // The commit may wait until the applier has recorded what was found: it lets go and does so first.
            self.clock
                .execute("SELECT pg_cancel_backend($1)", &[&backend])
                .await?;
        }
        shared.held_by_waiting_commit.send_if_modified(|held| {
            let changed = *held != waits;
            *held = waits;
            changed
        });
        Ok(())
    }
}

/// What members divide and this node does not: sequences that DDL made behind the cut, say, of which `join` knew nothing.
async fn undivided(context: &Context, sql: &Client) -> Result<Vec<String>, setup::Error> {
    let tables = sequence::published(sql, &context.config.postgres.publication).await;
    let tables = tables.map_err(|source| setup::Error::Read {
        what: "the publication",
        source,
    })?;
    let all = sequence::read(sql, &tables, Depth::Catalog).await?;
    Ok(all.divided_elsewhere(context.shared.node))
}
