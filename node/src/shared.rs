//! What the stages of one daemon share: positions, the resolver, counters, alarms.
//!
//! Feedback between stages travels only through here, and only as positions that never go back.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anabranch_conflict::Stability;
use anabranch_proto::{NodeId, Position, Stamp, Vector};
use tokio::sync::{Notify, watch};

use crate::apply::fence::reportable;
use crate::membership::{Change, Fact, FactKind, Membership};
use crate::recent::RecentTxns;
use crate::resolve::Resolver;

/// What was committed longer ago than this is a backlog: nobody waits for its milliseconds. Microseconds.
pub const BACKLOG_US: i64 = 100_000;
/// Least time between two frames, or two apply transactions, in a backlog: it is shorter by what fewer wake-ups leave to it.
pub const BACKLOG_GAP: Duration = Duration::from_millis(20);

/// WAL that is not decoded for less than this says nothing of a lag: there always is some.
const UNDECODED: Duration = Duration::from_secs(2);
/// Such places are noted this often, microseconds, and so many of them; past that every second one is forgotten.
const UNDECODED_EVERY_US: i64 = 1_000_000;
const UNDECODED_MAX: usize = 1_000;

/// Counters for status, of one life of the stages; all only grow, but for `quarantined`.
#[derive(Debug, Default)]
pub struct Counters {
    /// Remote transactions applied.
    pub txns: AtomicU64,
    /// Rows written or decided.
    pub rows: AtomicU64,
    /// Apply transactions.
    pub batches: AtomicU64,
    /// Lines written to the conflict log.
    pub conflicts: AtomicU64,
    /// Losing writes that were only counted there.
    pub conflicts_counted: AtomicU64,
    /// Rows that went the slow path.
    pub slow_path_rows: AtomicU64,
    /// Waits for the decoder.
    pub fences: AtomicU64,
    /// Rows put right after a local commit was decoded.
    pub repairs: AtomicU64,
    /// Rows in quarantine now.
    pub quarantined: AtomicU64,
    /// Batches that had to start again.
    pub retries: AtomicU64,
    /// Local transactions stamped.
    pub local_txns: AtomicU64,
}

impl Counters {
    /// Adds to a counter.
    pub fn add(counter: &AtomicU64, count: u64) {
        counter.fetch_add(count, Ordering::Relaxed);
    }
}

/// Things an operator should know, by a stable name ([`crate::alarms::NAMES`]), each with the time it began (microseconds
/// since the Unix epoch) and a text.
#[derive(Debug, Default)]
pub struct Alarms(Mutex<BTreeMap<String, (i64, String)>>);

impl Alarms {
    /// Raises an alarm; repeats of the same one are quiet, also with other numbers in them.
    pub fn raise(&self, name: &str, text: String) {
        debug_assert!(
            crate::alarms::is_known(name),
            "{name} is not in the list of alarms"
        );
        let mut alarms = lock(&self.0);
        let words = |text: &str| text.replace(|letter: char| letter.is_ascii_digit(), "");
        if alarms
            .get(name)
            .is_none_or(|known| words(&known.1) != words(&text))
        {
            tracing::error!(alarm = name, "{text}");
        }
        let since = alarms.get(name).map_or_else(now_us, |known| known.0);
        alarms.insert(name.to_owned(), (since, text));
    }

    /// Clears an alarm.
    pub fn clear(&self, name: &str) {
        if lock(&self.0).remove(name).is_some() {
            tracing::info!(alarm = name, "alarm over");
        }
    }

    /// All that stand: (name, since, text).
    #[must_use]
    pub fn list(&self) -> Vec<(String, i64, String)> {
        lock(&self.0)
            .iter()
            .map(|(name, (since, text))| (name.clone(), *since, text.clone()))
            .collect()
    }
}

/// What happened once, which no later life of the stages finds out again: kept for as long as the process, and the same in each life.
#[derive(Debug, Default)]
pub struct Lasting {
    /// Alarms that nothing clears: `ddl_conflict`, `drift`, `leaving`, `other_table`.
    pub alarms: Alarms,
    /// Pairs of DDL statements that changed one thing, in words; the last few (`crate::apply`, `apart`).
    pub ddl_apart: Mutex<Vec<String>>,
    /// Where transactions ended that said DDL, of those that were met last.
    pub ddl_places: Mutex<crate::apply::ddl::Places>,
    /// Names that DDL has given to tables.
    pub named_anew: crate::apply::named_anew::NamedAnew,
    /// Rows that were not as the stream says (`crate::apply`, `drift`).
    pub drifted_rows: AtomicU64,
    /// Of which types columns were that are merged by rules of their own, when they were seen first (`crate::daemon`, `merge_watch`).
    pub merged_types: Mutex<crate::setup::merged::Types>,
    /// Did an earlier life have the journal open? Then it is this process that may still hold it.
    pub had_journal: AtomicBool,
}

/// What `synchronous_standby_names` makes of commits that are decoded before others can see them
/// (`docs/design.md` section 3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Visibility {
    /// Nothing holds a commit back: it is visible as soon as it is decoded, or a moment later, for which only what depends on it waits here.
    Prompt,
    /// Somebody else's acknowledgement holds it back: it is sent to peers once it is visible here.
    BeforeSending,
    /// Our own acknowledgement may hold it back, for which it must be sent: what depends on it waits here
    /// until it is visible.
    BeforeDependents,
}

/// Own transactions of which it is not known that they are visible, at most, where nothing holds commits back. Where something
/// does, and there are more, those alone are kept that a look does not show (`crate::daemon`, `gate`).
pub(crate) const UNSEEN_MAX: usize = 100_000;

/// An own transaction that is decoded, and of which it is not known yet that it is visible here.
#[derive(Debug, Clone, Copy)]
pub struct Unseen {
    /// By which others know it: the end of its commit.
    pub position: Position,
    /// That of the versions of its rows, which was known before that: in its commit.
    pub rows_at: Position,
    /// Its xid, 32 bits.
    pub xid: u32,
    /// Up to here those behind it are known to be visible, and wait for their turn alone. Its own position where none does.
    pub through: Position,
}

/// How far this node is with a change of the policy.
#[derive(Debug, Default)]
pub struct PolicyState {
    /// What was known at the moments that count.
    pub retreat: anabranch_conflict::change::Retreat,
    /// The policy of before is needed no more here, and what is settled is on disk.
    pub done: bool,
    /// For status.
    pub shown: crate::status::PolicyStatus,
}

/// Does decoding get on? Written by capture and upkeep, for whoever notices that it does not.
#[derive(Debug, Default)]
pub struct Progress {
    /// When the server sent the last piece of WAL that was met, by its own clock; 0 before the first.
    sent_us: AtomicI64,
    /// Grows while the decoder works on one piece for long.
    worked: AtomicI64,
    /// Places that the server had flushed at a time ([`steady_us`]) and that are not decoded, the oldest first.
    undecoded: Mutex<VecDeque<(u64, i64)>>,
    /// Since when upkeep waits for the server's answer to a question that takes no time ([`steady_us`]); 0 while it does not.
    asked_us: AtomicI64,
}

impl Progress {
    /// The decoder is as far as what the server sent then.
    pub fn sent(&self, sent_us: i64) {
        self.sent_us.store(sent_us, Ordering::Relaxed);
    }

    /// The decoder works on what came last: there may be much to do for it, where a large transaction is replayed at a start.
    pub fn works(&self) {
        self.worked.fetch_add(1, Ordering::Relaxed);
    }

    /// It changes with every piece of WAL that comes, also within a large transaction, and while the decoder works on one.
    #[must_use]
    pub fn mark(&self) -> i64 {
        let (sent_us, worked) = (&self.sent_us, &self.worked);
        sent_us
            .load(Ordering::Relaxed)
            .wrapping_add(worked.load(Ordering::Relaxed))
    }

    /// Upkeep asks the server.
    pub fn asks(&self) {
        self.asked_us.store(steady_us(), Ordering::Relaxed);
    }

    /// The server has flushed so much, and so much is decoded.
    pub fn answered(&self, flushed: u64, decoded: u64) {
        self.asked_us.store(0, Ordering::Relaxed);
        let mut undecoded = lock(&self.undecoded);
        while undecoded
            .front()
            .is_some_and(|(lsn, _)| decoded >= reportable(*lsn))
        {
            undecoded.pop_front();
        }
        let now_us = steady_us();
        let is_due = undecoded
            .back()
            .is_none_or(|&(lsn, at_us)| flushed > lsn && now_us.saturating_sub(at_us) >= UNDECODED_EVERY_US);
        if is_due && decoded < reportable(flushed) {
            undecoded.push_back((flushed, now_us));
        }
        if undecoded.len() > UNDECODED_MAX {
            let mut odd = false;
            undecoded.retain(|_| {
                odd = !odd;
                odd
            });
        }
    }

    /// For how long upkeep has been waiting for an answer.
    #[must_use]
    pub fn unanswered_for(&self) -> Duration {
        match self.asked_us.load(Ordering::Relaxed) {
            0 => Duration::ZERO,
            since_us => since(since_us),
        }
    }

    /// For how long there has been WAL that is flushed and not decoded.
    #[must_use]
    pub fn undecoded_for(&self) -> Duration {
        let undecoded = lock(&self.undecoded);
        undecoded
            .front()
            .map_or(Duration::ZERO, |&(_, since_us)| since(since_us))
    }
}

/// How long ago that was, by [`steady_us`].
fn since(us: i64) -> Duration {
    Duration::from_micros(u64::try_from(steady_us().saturating_sub(us)).unwrap_or(0))
}

/// The state that stages share.
pub struct Shared {
    /// This node.
    pub node: NodeId,
    /// The resolver.
    pub resolver: Mutex<Resolver>,
    /// What may be forgotten.
    pub stability: Mutex<Stability>,
    /// Who is a member, as far as the decoder has come.
    pub members: Mutex<Membership>,
    /// What every node is called that ever was a member, also one whose joining is only on its way into the table: what it wrote may
    /// be in the same apply transaction.
    pub names: Mutex<BTreeMap<NodeId, String>>,
    /// Set once another set of live members is known of: the stages must begin anew with it.
    pub members_changed: watch::Sender<bool>,
    /// Nothing is forgotten while a change of the live members is under way.
    pub keep_all: AtomicBool,
    /// Recent transactions.
    pub recent: Mutex<RecentTxns>,
    /// Every commit that ends at or below this LSN is decoded and known to the resolver.
    pub decoded: watch::Sender<u64>,
    /// As `decoded`, and the last own transaction below it is `own` or before.
    pub framed: watch::Sender<u64>,
    /// Does decoding get on?
    pub progress: Progress,
    /// The highest LSN that somebody waited for the decoder to pass.
    pub decoder_wanted: AtomicU64,
    /// While the journal is full, own transactions that end below this LSN go into it all the same, and with each sending one
    /// frame more (`docs/design.md`, section 4). No limit until upkeep looks.
    pub own_until: watch::Sender<u64>,
    /// Own transactions wait because the journal is full.
    pub own_waits: AtomicBool,
    /// Wakes capture to ask the server how far it has sent.
    pub ping: Notify,
    /// How much DDL was met in this node's stream, by whoever said it: tables may have changed with each.
    pub own_ddl: AtomicU64,
    /// Wakes the applier: there are findings.
    pub found: Notify,
    /// Wakes who deletes rows that lost their parents: there are lines of such.
    pub orphans: Notify,
    /// Committed apply transactions reach up to here, per origin.
    pub applied: watch::Sender<Vector>,
    /// As `applied`, but only what came back as an echo and so is flushed in the server; own position included.
    pub echoed: watch::Sender<Vector>,
    /// The last own transaction handed to the journal.
    pub own: watch::Sender<Position>,
    /// The own position over time, sampled: (position, microseconds since the Unix epoch), newest last.
    pub sampled: Mutex<VecDeque<(Position, i64)>>,
    /// Own transactions up to here may be sent to peers.
    pub sendable: watch::Sender<Position>,
    /// What must wait for the visibility of own transactions.
    pub visibility: watch::Sender<Visibility>,
    /// Own transactions of which it is not known yet that they are visible here, in order.
    pub unseen: Mutex<VecDeque<Unseen>>,
    /// The own transaction whose rows are being met, before its end is: where its rows are placed, and its xid, 32 bits.
    pub opening: Mutex<Option<(Position, u32)>>,
    /// 0 for none, else 2^32 + the xid below which every committed transaction is decoded.
    pub horizon: AtomicU64,
    /// The LSN up to which the slot is confirmed.
    pub confirmed: AtomicU64,
    /// Decoded at the place where a restart would begin, or before it.
    pub checkpoint: Mutex<Vector>,
    /// See [`crate::resolve::Resolver::settle`]; what is kept of it on disk.
    pub settled: Mutex<Vector>,
    /// No transaction that the journal was trimmed of has a higher stamp.
    pub low: Mutex<Stamp>,
    /// The last stamp applied of each origin: what is still to come of it is above.
    pub heard: Mutex<BTreeMap<NodeId, Stamp>>,
    /// Own transactions that end at or below this LSN are durably applied at a majority of the members.
    pub quorum_applied: watch::Sender<u64>,
    /// The apply transaction waits for a row that a commit holds which itself waits for peers to apply it: two
    /// nodes in that state would wait for each other for ever (`docs/design.md` section 8).
    pub held_by_waiting_commit: watch::Sender<bool>,
    /// Process id of the apply session's backend, 0 without one.
    pub apply_backend: std::sync::atomic::AtomicI32,
    /// Microseconds that the agreed clock is ahead of [`steady_us`].
    pub clock_offset_us: std::sync::atomic::AtomicI64,
    /// Counters.
    pub counters: Counters,
    /// Alarms of this life: what still stands in the next one is raised there again.
    pub alarms: Alarms,
    /// What outlasts it.
    pub lasting: Arc<Lasting>,
    /// What a node that joins waits for.
    pub joining: Mutex<Option<String>>,
    /// Nodes that are being dropped, for status.
    pub dropping: Mutex<Vec<crate::status::Dropping>>,
    /// How far this node is with leaving, for status.
    pub leaving: Mutex<Option<crate::status::Leaving>>,
    /// DDL of other nodes that cannot be run here, for status.
    pub stuck_ddl: Mutex<Vec<crate::status::StuckDdl>>,
    /// What the applier is doing, for status.
    pub applying: Mutex<String>,
    /// The last error that made an apply transaction start again, for status.
    pub last_failure: Mutex<Option<String>>,
    /// The server's timeline.
    pub timeline: AtomicU32,
    /// Local transactions before this LSN may write rows that the others have not heard of (`crate::heal`).
    pub states_until: AtomicU64,
    /// Where it is written down what became of rows that were deleted here unheard of, while a heal is not finished.
    pub heal_record: Mutex<Option<crate::heal::Record>>,
    /// The unique keys of the tables are not those that the resolver knows: the applier reads them again.
    pub keys_changed: AtomicBool,
    /// The foreign keys of the tables are not those that the applier knows: it reads them again.
    pub foreign_keys_changed: AtomicBool,
    /// A change of the policy, as far as upkeep and what watches it have to know.
    pub policy: Mutex<PolicyState>,
    /// Held by whoever votes on a change of the policy, and by whoever takes in a member: one of both is first.
    pub policy_votes: tokio::sync::Mutex<()>,
    /// Rows that wait to be mended.
    pub mends: Mutex<VecDeque<crate::apply::mend::Job>>,
    /// Tables that are not replicated here.
    pub passed_over: crate::apply::passed_over::PassedOver,
    /// Tables whose rows are being brought to the nodes that lack them, (schema, name), and by how many: rows that are
    /// missing are no drift.
    pub adding: Mutex<BTreeMap<(String, String), usize>>,
}

impl Shared {
    /// A fresh state, but for what lasts.
    #[must_use]
    pub fn new(node: NodeId, resolver: Resolver, members: Membership, lasting: &Arc<Lasting>) -> Self {
        let stability = Stability::new(members.live());
        Self {
            node,
            resolver: Mutex::new(resolver),
            stability: Mutex::new(stability),
            names: Mutex::new(members.names()),
            members: Mutex::new(members),
            members_changed: watch::Sender::new(false),
            keep_all: AtomicBool::new(false),
            recent: Mutex::default(),
            decoded: watch::Sender::new(0),
            framed: watch::Sender::new(0),
            progress: Progress::default(),
            decoder_wanted: AtomicU64::new(0),
            own_until: watch::Sender::new(u64::MAX),
            own_waits: AtomicBool::new(false),
            ping: Notify::new(),
            own_ddl: AtomicU64::new(0),
            found: Notify::new(),
            orphans: Notify::new(),
            applied: watch::Sender::new(Vector::new()),
            echoed: watch::Sender::new(Vector::new()),
            own: watch::Sender::new(Position::ZERO),
            sampled: Mutex::default(),
            sendable: watch::Sender::new(Position::new(u32::MAX, u64::MAX)),
            visibility: watch::Sender::new(Visibility::Prompt),
            unseen: Mutex::default(),
            opening: Mutex::default(),
            horizon: AtomicU64::new(0),
            confirmed: AtomicU64::new(0),
            checkpoint: Mutex::default(),
            settled: Mutex::default(),
            low: Mutex::new(Stamp::ZERO),
            heard: Mutex::default(),
            quorum_applied: watch::Sender::new(0),
            held_by_waiting_commit: watch::Sender::new(false),
            apply_backend: std::sync::atomic::AtomicI32::new(0),
            clock_offset_us: std::sync::atomic::AtomicI64::new(0),
            counters: Counters::default(),
            alarms: Alarms::default(),
            lasting: Arc::clone(lasting),
            joining: Mutex::default(),
            dropping: Mutex::default(),
            leaving: Mutex::default(),
            stuck_ddl: Mutex::default(),
            applying: Mutex::default(),
            last_failure: Mutex::default(),
            timeline: AtomicU32::new(0),
            states_until: AtomicU64::new(0),
            heal_record: Mutex::default(),
            keys_changed: AtomicBool::new(false),
            foreign_keys_changed: AtomicBool::new(false),
            policy: Mutex::default(),
            policy_votes: tokio::sync::Mutex::default(),
            mends: Mutex::default(),
            passed_over: crate::apply::passed_over::PassedOver::default(),
            adding: Mutex::default(),
        }
    }

    /// The xid horizon (`docs/design.md` section 7), if one is known.
    #[must_use]
    pub fn horizon(&self) -> Option<u32> {
        let raw = self.horizon.load(Ordering::Acquire);
        (raw >> 32 != 0).then_some((raw & 0xFFFF_FFFF) as u32)
    }

    /// An own transaction of the journal that is not decoded again, in order. `is_hidden`: it is not visible yet.
    pub fn recall_own(&self, position: Position, xid: u32, is_hidden: bool) {
        let mut unseen = lock(&self.unseen);
        if is_hidden {
            unseen.push_back(Unseen {
                position,
                rows_at: position,
                xid,
                through: position,
            });
        } else if let Some(before) = unseen.back_mut() {
            // One that is visible waits for those before it. There may be as many as the journal holds.
            before.through = position;
        } else if *self.visibility.borrow() == Visibility::BeforeSending {
            self.sendable.send_replace(position);
        }
    }

    /// The first own transaction that is not visible here yet, where what depends on it must wait for it.
    #[must_use]
    pub fn hidden_from(&self) -> Option<Position> {
        if *self.visibility.borrow() != Visibility::BeforeDependents {
            return None;
        }
        lock(&self.unseen).front().map(|txn| txn.position)
    }

    /// Rows of an own transaction come to be known, before its end is decoded, which is long after that where there are many.
    pub fn note_opening(&self, rows_at: Position, xid: u32) {
        *lock(&self.opening) = Some((rows_at, xid));
    }

    /// Notes an own transaction that is decoded. Where nothing holds commits back, of very many only the last are kept: while a long stretch of
    /// WAL is decoded again nobody looks, and what is so far back is visible.
    pub fn note_decoded(&self, txn: Unseen) {
        {
            let mut unseen = lock(&self.unseen);
            // Looked at under the lock: what is kept when the setting changes is what was kept before.
            if unseen.len() >= UNSEEN_MAX && *self.visibility.borrow() == Visibility::Prompt {
                unseen.pop_front();
            }
            unseen.push_back(txn);
        }
        // In this order: whoever looks here first finds it in one of both.
        *lock(&self.opening) = None;
    }

    /// The ids of own transactions up to `position`, theirs or that of a row of theirs, and of those among `others`, of which it is not known
    /// yet that they are visible here. One of which rows are known and the end is not is among them.
    #[must_use]
    pub fn unseen_up_to(&self, position: Position, others: &HashSet<u32>) -> Vec<u32> {
        let opening = *lock(&self.opening);
        let unseen = lock(&self.unseen);
        // They are in order, and many may wait behind the place that is asked about with every apply transaction.
        let count = if others.is_empty() {
            unseen.partition_point(|txn| txn.rows_at <= position)
        } else {
            unseen.len()
        };
        let all = unseen.iter().take(count).map(|txn| (txn.rows_at, txn.xid));
        all.chain(opening)
            .filter(|(rows_at, xid)| *rows_at <= position || others.contains(xid))
            .map(|(_, xid)| xid)
            .collect()
    }

    /// The last own transaction of which rows are known.
    #[must_use]
    pub fn last_decoded(&self) -> Position {
        let opening = *lock(&self.opening);
        let opening = opening.map(|(rows_at, _)| rows_at);
        let own = *self.own.borrow();
        let last = lock(&self.unseen).back().map(|txn| txn.through);
        [opening, last].into_iter().flatten().fold(own, Ord::max)
    }

    /// Are all own transactions up to `position` decoded, and visible to others here?
    #[must_use]
    pub fn is_visible(&self, position: Position) -> bool {
        *self.decoded.borrow() >= position.lsn.0
            && lock(&self.unseen)
                .front()
                .is_none_or(|hidden| hidden.rows_at > position)
    }

    /// What peers may take as applied here, for commits that wait for it. While a commit that waits for peers
    /// keeps the applier from going on, that is what is durable in the `journal`.
    #[must_use]
    pub fn acknowledged(&self, journal: &crate::journal::Journal) -> Vector {
        let mut applied = self.echoed.borrow().clone();
        if *self.held_by_waiting_commit.borrow() {
            applied.join(&journal.durable_vector());
        }
        applied
    }

    /// Meets a fact at its place in the WAL.
    pub fn note_member(&self, fact: Fact) {
        self.expect_member(&fact);
        let (node, kind) = (fact.node, fact.kind);
        let change = lock(&self.members).add(fact);
        if change != Change::None {
            tracing::info!(%node, fact = kind.as_str(), "membership");
        }
        if change == Change::Live {
            self.members_changed.send_replace(true);
        }
    }

    /// A fact is about to be applied: from before that nothing is forgotten by the old list of members.
    pub fn expect_member(&self, fact: &Fact) {
        if matches!(fact.kind, FactKind::Founder | FactKind::Joined) {
            lock(&self.names).insert(fact.node, fact.name.clone());
        }
        if lock(&self.members).changes_live(fact) {
            self.keep_all.store(true, Ordering::SeqCst);
        }
    }

    /// Remembers where our own stream is now.
    pub fn sample_own(&self) {
        const SAMPLES_MAX: usize = 20_000;
        let own = *self.own.borrow();
        let mut sampled = lock(&self.sampled);
        if sampled.back().is_none_or(|last| last.0 < own) {
            sampled.push_back((own, now_us()));
        }
        // Past this, every second one: old lags are told less exactly.
        if sampled.len() > SAMPLES_MAX {
            let mut odd = false;
            sampled.retain(|_| {
                odd = !odd;
                odd
            });
        }
    }

    /// For how many seconds the oldest own transaction that somebody at `position` lacks has been there, or may have been: what is not
    /// decoded nobody has.
    #[must_use]
    pub fn lag_seconds(&self, position: Position) -> f64 {
        let undecoded = self.progress.undecoded_for();
        let undecoded_s = if undecoded > UNDECODED {
            undecoded.as_secs_f64()
        } else {
            0.0
        };
        self.lag_of_framed(position).max(undecoded_s)
    }

    fn lag_of_framed(&self, position: Position) -> f64 {
        if position >= *self.own.borrow() {
            return 0.0;
        }
        let sampled = lock(&self.sampled);
        let first_lacked = sampled.partition_point(|sample| sample.0 <= position);
        let since_us = sampled.get(first_lacked).map_or_else(now_us, |sample| sample.1);
        (now_us().saturating_sub(since_us)).max(0) as f64 / 1e6
    }

    /// All up to these stamps of their origins is applied, and counted in [`Self::applied`] or [`Self::echoed`].
    pub fn hear(&self, stamps: impl IntoIterator<Item = Stamp>) {
        let mut heard = lock(&self.heard);
        for stamp in stamps {
            let last = heard.entry(stamp.node).or_insert(stamp);
            *last = stamp.max(*last);
        }
    }

    /// The agreed time, microseconds since the Unix epoch.
    #[must_use]
    pub fn agreed_us(&self) -> i64 {
        steady_us().saturating_add(self.clock_offset_us.load(Ordering::Relaxed))
    }
}

/// Locks, whoever panicked before: a panic in one stage ends the daemon anyway.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// This machine's wall clock as it would show had nobody set it since the daemon's start, microseconds since the
/// Unix epoch. What is measured against it (the peers' clocks) stays right when the wall clock jumps.
#[must_use]
pub fn steady_us() -> i64 {
    static START: std::sync::OnceLock<(std::time::Instant, i64)> = std::sync::OnceLock::new();
    let (began, began_us) = START.get_or_init(|| (std::time::Instant::now(), now_us()));
    let elapsed_us = i64::try_from(began.elapsed().as_micros()).unwrap_or(i64::MAX);
    began_us.saturating_add(elapsed_us)
}

/// This machine's wall clock, microseconds since the Unix epoch.
#[must_use]
pub fn now_us() -> i64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| i64::try_from(since.as_micros()).unwrap_or(i64::MAX))
}

#[cfg(test)]
mod tests {
    use anabranch_conflict::policy::Policies;

    use super::*;
    use crate::index::RowIndex;

    fn shared(dir: &tempfile::TempDir) -> Shared {
        let node = NodeId(1);
        let index = RowIndex::new(dir.path(), 1 << 20).unwrap();
        let resolver = Resolver::new(node, index, Policies::default());
        Shared::new(node, resolver, Membership::default(), &Arc::default())
    }

    #[test]
    fn of_the_journals_transactions_behind_one_that_is_not_visible_none_that_is_takes_memory() {
        let dir = tempfile::tempdir().unwrap();
        let shared = shared(&dir);
        shared.visibility.send_replace(Visibility::BeforeSending);
        shared.sendable.send_replace(Position::ZERO);
        let at = |lsn| Position::new(1, lsn);
        for (lsn, xid, is_hidden) in [(10, 1, false), (20, 2, true), (30, 3, false), (40, 4, false)] {
            shared.recall_own(at(lsn), xid, is_hidden);
        }
        assert_eq!(lock(&shared.unseen).len(), 1);
        assert_eq!(
            (*shared.sendable.borrow(), shared.last_decoded()),
            (at(10), at(40))
        );
        assert_eq!(shared.unseen_up_to(at(40), &HashSet::new()), [2]);
        shared.recall_own(at(50), 5, true);
        assert_eq!(shared.unseen_up_to(at(50), &HashSet::new()), [2, 5]);
    }

    #[test]
    fn who_waits_for_own_transactions_waits_for_the_one_whose_end_is_not_decoded_too() {
        let dir = tempfile::tempdir().unwrap();
        let shared = shared(&dir);
        let at = |lsn| Position::new(1, lsn);
        let none = HashSet::new();
        let unseen = |rows_at, end, xid| Unseen {
            position: at(end),
            rows_at: at(rows_at),
            xid,
            through: at(end),
        };
        shared.note_decoded(unseen(10, 20, 7));
        assert_eq!(shared.last_decoded(), at(20));
        shared.note_opening(at(30), 8);
        assert_eq!(shared.last_decoded(), at(30));
        assert_eq!(shared.unseen_up_to(at(29), &none), [7]);
        assert_eq!(shared.unseen_up_to(at(30), &none), [7, 8]);
        shared.note_decoded(unseen(30, 40, 8));
        assert_eq!(shared.last_decoded(), at(40));
        assert_eq!(shared.unseen_up_to(at(30), &none), [7, 8]);
        // Behind the place those alone that are asked for.
        assert_eq!(shared.unseen_up_to(at(29), &[8, 9].into()), [7, 8]);
        assert!(shared.unseen_up_to(at(9), &none).is_empty());
    }
}
