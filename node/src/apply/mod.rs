//! Apply: remote transactions into the server, in causal order, several merged into one.
//!
//! In:   the journal's frames of every other origin        Out: rows, progress, conflict log, in one transaction
//! Holds: one batch of decoded changes; of a large transaction one chunk
//! Invariants: 1. the first statement of every transaction writes `anabranch.progress`, which tells it from local
//!        ones; 2. it commits only when its frames are durable in the journal; 3. a transaction is applied whole,
//!        after everything it depends on; 4. what fails for a passing reason runs again for ever
//! On crash: the server has all of a batch or nothing; `anabranch.progress` says where to go on
//! Not here: who wins (`crate::resolve`), decoding our own commits (`crate::capture`)

mod apart;
mod batch;
pub(crate) mod catalog;
mod choose;
mod collided;
pub(crate) mod ddl;
mod drift;
pub(crate) mod failure;
pub(crate) mod feed;
pub mod fence;
pub(crate) mod foreign;
mod found;
mod late;
mod ledger;
mod lookup;
mod loss;
pub(crate) mod mend;
mod merged;
pub(crate) mod named_anew;
mod orphans;
mod own_tables;
mod parked;
pub(crate) mod passed_over;
pub(crate) mod plan;
pub(crate) mod progress;
mod quarantine;
mod refused;
mod retyped;
mod session;
mod truncate;
mod types;
mod work;
pub(crate) mod write;

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anabranch_conflict::Resolution;
use anabranch_proto::schema::TableDesc;
use anabranch_proto::{NodeId, Position, Vector};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::config::Config;
use crate::index::RowKey;
use crate::journal::Journal;
use crate::names::Names;
use crate::shared::{Counters, Shared, Visibility, lock};

pub use catalog::unique_keys;
use failure::{Failure, Recovery};
use feed::Feed;
use fence::Fence;
use ledger::Ledger;
pub(crate) use ledger::raw_json;
use lookup::Lookup;
use orphans::Touched;
use parked::{Outcome, Parked};
pub(crate) use quarantine::load_keys as load_quarantine;
pub use session::Error as SessionError;
use session::Session;
use work::Work;
use write::Mode;

/// Trying one apply transaction again for longer than this is alarmed.
const LONG: Duration = Duration::from_secs(30);
/// Of what was found about own commits, at most so many portions are worked off between two tries of one apply transaction.
const PORTIONS_AT_ONCE: usize = 64;
/// For so long the role is taken to be the one that the transaction began with.
const SEEN_FOR: Duration = Duration::from_secs(1);

/// Applying cannot go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No apply session.
    #[error(transparent)]
    Session(#[from] session::Error),
    /// No fence session.
    #[error(transparent)]
    Fence(#[from] fence::Error),
    /// The journal failed.
    #[error(transparent)]
    Journal(#[from] crate::journal::Error),
    /// A statement failed outside a batch.
    #[error("reading anabranch.progress: {}", crate::error::sql(.0))]
    Sql(#[from] tokio_postgres::Error),
    /// A batch failed for good.
    #[error("applying: {0}")]
    Halt(String),
    /// The row index has no space on the disk.
    #[error(transparent)]
    NoSpace(crate::resolve::Error),
    /// The server lost commits: what it holds is asked anew.
    #[error("{}", Failure::Forgotten)]
    Forgotten,
}

/// An apply session that holds the advisory lock, and where it stands.
pub struct Seat {
    session: Session,
    fence: Fence,
    /// What is applied here, by `anabranch.progress`.
    pub progress: Vector,
    /// Every apply transaction of earlier sessions lies below this WAL position.
    pub upto: u64,
}

impl Seat {
    /// Takes the seat: from here on no other daemon can apply to this database.
    ///
    /// # Errors
    /// When the server cannot be reached, or another daemon holds the lock.
    pub async fn take(config: &Config) -> Result<Self, Error> {
        let session = Session::open(config).await?;
        let fence = Fence::open(config).await?;
        let (progress, _) = progress::read(&session.client, config.node.id).await?;
        let upto = fence.insert_lsn().await?;
        Ok(Self {
            session,
            fence,
            progress,
            upto,
        })
    }

    /// The fence session, which start-up uses, too.
    #[must_use]
    pub const fn fence(&self) -> &Fence {
        &self.fence
    }
}

/// The applier of one node.
pub struct Applier {
    config: Arc<Config>,
    shared: Arc<Shared>,
    lookup: Lookup,
    feeds: Vec<Feed>,
    applied: Vector,
    /// Origins whose next transaction is stamped too far ahead: their alarms stand.
    ahead: HashSet<NodeId>,
    /// Transactions whose DDL cannot be run here: one of an origin, and all behind it waits.
    parked: Vec<Parked>,
    /// When quarantined rows are tried again, and behind which of them the next ones are: 0 at the begin of a pass.
    quarantine_due: Instant,
    quarantine_from: i64,
    /// The same for those that commits held which are visible by now.
    held_due: Instant,
    held_from: i64,
    ledger: Ledger,
    /// A try of the work in hand met own commits that nobody saw: another one begins behind those up to here.
    unseen: Option<Position>,
}

impl Applier {
    /// An applier that goes on where `seat` stands.
    ///
    /// # Errors
    /// When the journal does not hold what follows.
    pub fn new(
        config: Arc<Config>,
        shared: Arc<Shared>,
        journal: Journal,
        seat: &Seat,
    ) -> Result<Self, Error> {
        let mut feeds = Vec::new();
        for peer in &config.peers {
            feeds.push(Feed::new(&journal, peer.id, seat.progress.get(peer.id))?);
        }
        let applied = seat.progress.clone();
        shared.applied.send_replace(applied.clone());
        let quarantine_due = Instant::now();
        quarantine::held_until_now(&shared);
        let ledger = Ledger::new(&config.conflict_log);
        let node = config.node.id;
        Ok(Self {
            config,
            shared,
            lookup: Lookup::new(journal, node),
            feeds,
            applied,
            ahead: HashSet::new(),
            parked: Vec::new(),
            quarantine_due,
            quarantine_from: 0,
            held_due: quarantine_due,
            held_from: 0,
            ledger,
            unseen: None,
        })
    }

    /// Applies until told to stop.
    ///
    /// # Errors
    /// When applying cannot go on: the daemon should stop.
    pub async fn run(mut self, mut seat: Seat, mut stop: watch::Receiver<bool>) -> Result<(), Error> {
        let mut appended = self.lookup.journal().appended_of_others();
        seat.session.show(&self.shared);
        seat.session.set_own_tables(self.lookup.own_tables());
        loop {
            if *stop.borrow_and_update() {
                return Ok(());
            }
            appended.borrow_and_update();
            let begun = Instant::now();
            match self.step(&mut seat, &stop).await {
                Ok(Some(gap)) => tokio::time::sleep_until(begun + gap).await,
                Ok(None) => {
                    tokio::select! {
                        changed = appended.changed() => if changed.is_err() {
                            return Ok(());
                        },
                        () = self.shared.found.notified() => {}
                        () = tokio::time::sleep(Duration::from_millis(500)) => {}
                        _ = stop.changed() => {}
                    }
                }
                Err(failure) => {
                    if *stop.borrow() {
                        return Ok(());
                    }
                    return Err(match failure {
                        Failure::Forgotten => Error::Forgotten,
                        Failure::Resolve(error) if error.is_no_space() => Error::NoSpace(error),
                        failure => Error::Halt(failure.to_string()),
                    });
                }
            }
        }
    }

    /// One piece of work, if there is any; how long after its begin the next one comes at the soonest.
    async fn step(
        &mut self,
        seat: &mut Seat,
        stop: &watch::Receiver<bool>,
    ) -> Result<Option<Duration>, Failure> {
        if self.shared.keys_changed.swap(false, Ordering::Relaxed) {
            // Where it fails, the next piece of work fails as well, and says so.
            if let Ok(keys) = catalog::unique_keys(&seat.session.client).await {
                lock(&self.shared.resolver).set_unique_keys(keys);
            }
        }
        if self.shared.foreign_keys_changed.swap(false, Ordering::Relaxed) {
            self.shared.alarms.clear("foreign_keys");
            seat.session.read_foreign_keys_again();
        }
        if lock(&self.shared.resolver).has_found() {
            self.work_off_found(seat, stop).await?;
            return Ok(Some(Duration::ZERO));
        }
        if self.mend_next(seat, stop).await? {
            return Ok(Some(Duration::ZERO));
        }
        if let Some(parked) = self.take_due() {
            self.try_parked(seat, parked, stop).await?;
            return Ok(Some(Duration::ZERO));
        }
        self.retry_due(seat, stop).await?;
        let before = self.applied.clone();
        if let Some(mut work) = self.select()? {
            let outcome = self.until_done(seat, &mut work, stop).await?;
            let gap = self.gap(&work);
            match outcome {
                Outcome::Done => self.note_applied(&work),
                Outcome::Stopped => {}
                Outcome::Stuck(stuck) => {
                    self.applied = before;
                    self.park(seat, Parked::new(work), &stuck).await?;
                }
            }
            return Ok(Some(gap));
        }
        Ok(None)
    }

    /// Records what the decoder found and puts its rows right: all, or a portion where it is much.
    async fn work_off_found(&mut self, seat: &mut Seat, stop: &watch::Receiver<bool>) -> Result<(), Failure> {
        let mut work = {
            let applied = self.shared.applied.borrow().clone();
            let mut resolver = lock(&self.shared.resolver);
            let (due, waiting) = resolver
                .take_found()?
                .into_iter()
                .partition(|found| found.is_due(&applied));
            resolver.defer(waiting);
            Work::found(due)
        };
        let is_done = matches!(self.until_done(seat, &mut work, stop).await?, Outcome::Done);
        if is_done && self.end_repair(seat, &work, stop).await? {
            lock(&self.shared.resolver).found_done();
            // A commit may wait for the slot to move past them.
            self.shared.ping.notify_one();
        } else {
            lock(&self.shared.resolver).give_back(work.take_found());
        }
        Ok(())
    }

    /// Rows were put right by what was known. A local write that met the repair unseen is found when it is decoded,
    /// as long as it is known that there was one: so that is waited for before the slot may move on. False where the wait
    /// was not to its end: in the next life nobody knows of the repair, so it must be found, and made, again.
    async fn end_repair(
        &mut self,
        seat: &mut Seat,
        work: &Work,
        stop: &watch::Receiver<bool>,
    ) -> Result<bool, Failure> {
        let mut pause = Duration::from_millis(5);
        let begun = Instant::now();
        let mut is_told = false;
        let is_ended = loop {
            if !lock(&self.shared.resolver).is_repairing() {
                break true;
            }
            if *stop.borrow() {
                break false;
            }
            let failure = match seat.fence.pass(&self.shared).await {
                Ok(()) => {
                    lock(&self.shared.resolver).repaired();
                    continue;
                }
                Err(behind @ fence::Error::Behind { .. }) => {
                    *lock(&self.shared.applying) = behind.to_string();
                    if begun.elapsed() > LONG {
                        let text = format!(
                            "nothing is applied, since {} s, until the decoder has passed rows that were put right, and it is behind",
                            begun.elapsed().as_secs()
                        );
                        self.shared.alarms.raise("apply", text);
                        is_told = true;
                    }
                    continue;
                }
                Err(failure) => Failure::from(failure),
            };
            if seat.fence.is_closed() || seat.session.client.batch_execute("ROLLBACK").await.is_err() {
                // Here, since the same again may have no row to write, and would not find the connection gone.
                self.recover(seat, work, &failure, stop).await?;
                tokio::time::sleep(Duration::from_millis(100)).await;
                break false;
            }
            // The server refuses it, as when its disk is full. The rows are right: only this is tried again.
            let text = format!("nothing is applied until the fence can be written: {failure}");
            tracing::warn!(error = %failure, "the fence after a repair is tried again");
            *lock(&self.shared.last_failure) = Some(failure.to_string());
            self.shared.alarms.raise("apply", text);
            is_told = true;
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_secs(1));
        };
        lock(&self.shared.applying).clear();
        if is_told {
            self.shared.alarms.clear("apply");
        }
        Ok(is_ended)
    }

    /// Runs work until it is committed, or told to stop before, or its DDL cannot be run here.
    async fn until_done(
        &mut self,
        seat: &mut Seat,
        work: &mut Work,
        stop: &watch::Receiver<bool>,
    ) -> Result<Outcome, Failure> {
        let mut pause = Duration::from_millis(5);
        let begun = Instant::now();
        self.unseen = None;
        loop {
            let tried = self.attempt(seat, work, stop).await;
            self.ledger.ended(tried.is_ok());
            let Err(failure) = tried else {
                lock(&self.shared.resolver).put_aside_ended(true);
                break;
            };
            if failure.recovery() == Recovery::Halt {
                return Err(failure);
            }
            if matches!(failure, Failure::Unseen) {
                self.unseen = Some(self.shared.last_decoded());
            }
            Counters::add(&self.shared.counters.retries, 1);
            if *stop.borrow() {
                let _ = seat.session.client.batch_execute("ROLLBACK").await;
                return Ok(Outcome::Stopped);
            }
            let failure = match failure {
                Failure::Ddl(stuck) => match seat.session.client.batch_execute("ROLLBACK").await {
                    Ok(()) => {
                        lock(&self.shared.resolver).put_aside_ended(false);
                        seat.session.forget_tables();
                        work.start_again(self.lookup.journal())?;
                        return Ok(Outcome::Stuck(stuck));
                    }
                    Err(lost) => Failure::Sql(lost),
                },
                failure => failure,
            };
            if let Failure::ForeignKeys(why) = &failure {
                let text = format!(
                    "rows without their parents are not looked for until the daemon starts again or a foreign key changes: {why}"
                );
                self.shared.alarms.raise("foreign_keys", text);
                seat.session.ignore_foreign_keys();
            }
            let committed = self.recover(seat, work, &failure, stop).await?;
            lock(&self.shared.resolver).put_aside_ended(committed);
            if committed {
                break;
            }
            if failure.recovery() == Recovery::WithoutCopy {
                tracing::debug!(error = %failure, "the batch runs again without COPY");
                seat.session.pause_copy();
            } else if failure.recovery() == Recovery::Isolate && !work.is_isolated() {
                work.isolate(&failure);
                seat.session.forget_tables();
            } else {
                if matches!(failure.recovery(), Recovery::Isolate | Recovery::Stand) {
                    // Not a row's fault: nothing is skipped for it, so everything behind waits.
                    seat.session.forget_tables();
                    let text = format!("applying is stuck on an error that is not a row's: {failure}");
                    self.shared.alarms.raise("apply", text);
                } else if begun.elapsed() > LONG {
                    let text = format!(
                        "an apply transaction is tried again and again, since {} s: {failure}",
                        begun.elapsed().as_secs()
                    );
                    self.shared.alarms.raise("apply", text);
                }
                *lock(&self.shared.applying) = format!("retrying: {failure}");
                *lock(&self.shared.last_failure) = Some(failure.to_string());
                tracing::warn!(error = %failure, "apply transaction starts again");
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(Duration::from_secs(1));
            }
            let may_be_waited_for = *self.shared.visibility.borrow() == Visibility::BeforeDependents;
            if may_be_waited_for && work.has_txns() {
                // What keeps this work from its row may be a commit that waits until we have recorded all of these. (But while users write such rows
                // without a pause there would be no end.)
                for _ in 0..PORTIONS_AT_ONCE {
                    if *stop.borrow() || !lock(&self.shared.resolver).has_found() {
                        break;
                    }
                    Box::pin(self.work_off_found(seat, stop)).await?;
                }
            }
            work.start_again(self.lookup.journal())?;
        }
        lock(&self.shared.applying).clear();
        self.shared.alarms.clear("apply");
        Ok(Outcome::Done)
    }

    /// Brings the session back into a state to try again; true when the work was committed after all. A server that has crashed
    /// may have lost commits that were not flushed: going on behind them would leave them out for good.
    async fn recover(
        &mut self,
        seat: &mut Seat,
        work: &Work,
        failure: &Failure,
        stop: &watch::Receiver<bool>,
    ) -> Result<bool, Failure> {
        let rolled_back = seat.session.client.batch_execute("ROLLBACK").await;
        if rolled_back.is_ok() && !seat.fence.is_closed() {
            return Ok(false);
        }
        tracing::warn!(error = %failure, "connection to the server lost, connecting again");
        let mut pause = Duration::from_millis(100);
        loop {
            if *stop.borrow() {
                return Ok(false);
            }
            match Seat::take(&self.config).await {
                Ok(mut new) => {
                    if !new.progress.includes(&self.shared.applied.borrow()) {
                        return Err(Failure::Forgotten);
                    }
                    new.session.show(&self.shared);
                    new.session.set_own_tables(self.lookup.own_tables());
                    let committed = work.has_txns() && new.progress.includes(&work.reaches());
                    *seat = new;
                    self.shared.alarms.clear("server");
                    if committed {
                        self.note_released(&work.released());
                        self.shared.orphans.notify_one();
                    }
                    return Ok(committed);
                }
                Err(Error::Session(error @ session::Error::Fenced(_))) => {
                    self.shared.alarms.raise("server", error.to_string());
                }
                Err(error) => self.shared.alarms.raise("server", error.to_string()),
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_secs(2));
        }
    }

    /// After the commit: positions, what peers know, counters.
    fn note_applied(&mut self, work: &Work) {
        let reached = work.reaches();
        self.shared.applied.send_modify(|applied| applied.join(&reached));
        // Behind what is known, and before what is stable: who trims the journal asks the other way round.
        self.shared.hear(work.stamps());
        {
            let mut stability = lock(&self.shared.stability);
            for (origin, knows) in work.knowledge() {
                stability.observe(origin, &knows);
            }
        }
        lock(&self.shared.resolver).applied(&self.shared.applied.borrow());
        Counters::add(&self.shared.counters.txns, work.txn_count());
        self.shared.counters.batches.fetch_add(1, Ordering::Relaxed);
    }

    /// One try of one apply transaction.
    async fn attempt(
        &mut self,
        seat: &mut Seat,
        work: &mut Work,
        stop: &watch::Receiver<bool>,
    ) -> Result<(), Failure> {
        let node = &self.config.node;
        let began = Instant::now();
        if work.has_ddl() {
            seat.session.forget_tables();
        }
        let journal = self.lookup.journal().clone();
        if let Some(seq) = work.last_seq() {
            let mut stop = stop.clone();
            tokio::select! {
                () = journal.until_writable(seq) => {}
                _ = stop.wait_for(|stop| *stop) => return Err(Failure::Stalled),
            }
        }
        // One that met what nobody sees yet begins again behind all of it.
        let answers = work.answers(node.id).max(self.unseen.unwrap_or(Position::ZERO));
        self.wait_until_seen(&mut seat.session, answers, stop).await?;
        Box::pin(seat.session.read_passed_over(&self.shared)).await?;
        work.open(&journal)?;
        work.set_lines(self.ledger.lines_left());
        let mode = match (work.is_isolated(), seat.session.may_copy()) {
            (true, _) => Mode::Cautious,
            (false, true) => Mode::Swift,
            (false, false) => Mode::Plain,
        };
        let mut writer = write::Writer {
            session: &mut seat.session,
            fence: &seat.fence,
            shared: &self.shared,
            lookup: &self.lookup,
            brought_back: HashSet::new(),
            locked: HashSet::new(),
            put_off: HashSet::new(),
            has_run: false,
            unheard: Vec::new(),
            drifted: Vec::new(),
            apart: Vec::new(),
            touched: Touched::default(),
            reading: None,
            node_name: &node.name,
            xid: 0,
            // What is decoded after the first try has met what that had decided.
            seen_upto: self.unseen.filter(|_| !work.is_large()),
            is_patient: self.unseen.is_some() && work.is_large(),
            mode,
            horizon: None,
        };
        writer.forget_what_own_ddl_changed();
        if !work.write_at_once(&mut writer, node.id, &self.config).await? {
            writer.xid = work.begin(writer.session, node.id).await?;
            work.write(&mut writer, &self.config).await?;
        }
        let mut losses = work.losses();
        losses.extend(writer.orphans(work.may_wait(&self.shared)).await?);
        let mut lines = losses.iter();
        let mends_orphans = lines.any(|line| {
            matches!(
                line.resolution,
                Resolution::DeleteChild | Resolution::RestoreParent
            )
        });
        let counts = work.counted_losses();
        if !losses.is_empty() || !counts.is_empty() {
            writer.record(&mut self.ledger, &mut losses, counts).await?;
        }
        let released = work.released();
        writer.release(&released, &self.config.conflict_log).await?;
        // Not with an open transaction, and its locks, for as long as the disk is full.
        if let Some(seq) = work.last_seq()
            && !journal.is_durable_soon(seq).await?
        {
            return Err(Failure::Stalled);
        }
        self.wait_until_seen(&mut *writer.session, work.left_to(), stop)
            .await?;
        let (drifted, apart) = (
            std::mem::take(&mut writer.drifted),
            std::mem::take(&mut writer.apart),
        );
        // What its first statement has seen to may be otherwise by now.
        let is_doubted = began.elapsed() > SEEN_FOR || !drifted.is_empty();
        if is_doubted && !seat.session.sees_as_at_begin().await? {
            return Err(Failure::Raced);
        }
        seat.session.client.batch_execute("COMMIT").await?;
        seat.session.note_progress(&work.reaches());
        drift::tell(&drifted, &self.shared);
        if !apart.is_empty() {
            apart::tell(
                &apart,
                &Names::known(&self.config, &self.shared),
                &self.shared.lasting,
            );
        }
        if mends_orphans {
            self.shared.orphans.notify_one();
        }
        self.note_released(&released);
        Ok(())
    }

    /// After the commit: these rows are in quarantine no more.
    fn note_released(&self, released: &[(Arc<TableDesc>, RowKey)]) {
        let mut resolver = lock(&self.shared.resolver);
        for (_, key) in released {
            resolver.quarantined().remove(key);
        }
    }

    /// Waits until the own transactions up to `position` are visible here. They are decoded once they are flushed, which is before others see
    /// them: for as long as a commit waits for a standby, and else for a moment, but a peer's answer may take less. An answer would be
    /// seen before them, and meet rows that are not those that it was made from; and where a row was left to one, which won, it would
    /// show a version older than the one that lost, beside what depends on that.
    ///
    /// (Not where commits wait for the peers themselves: two nodes would wait for each other. What answers them is not begun.)
    async fn wait_until_seen(
        &self,
        session: &mut Session,
        position: Position,
        stop: &watch::Receiver<bool>,
    ) -> Result<(), Failure> {
        let position = position.min(self.shared.last_decoded());
        let mut stop = stop.clone();
        let mut pause = Duration::from_millis(1);
        let begun = Instant::now();
        let others = HashSet::new();
        while session.hides(&self.shared, position, &others).await? {
            *lock(&self.shared.applying) = Failure::Unseen.to_string();
            if begun.elapsed() > LONG {
                let text = format!(
                    "applying waits, since {} s, for local commits that are not visible yet: they wait for a standby \
                     (synchronous_standby_names), or their sessions do not run",
                    begun.elapsed().as_secs()
                );
                self.shared.alarms.raise("apply", text);
            }
            if *stop.borrow_and_update() {
                return Err(Failure::Unseen);
            }
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                _ = stop.changed() => {}
            }
            pause = (pause * 2).min(Duration::from_millis(20));
        }
        Ok(())
    }
}
