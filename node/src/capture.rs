//! Capture: the decoded stream becomes stamped frames in the journal.
//!
//! In:   [`Event`]s of the slot, in commit order        Out: own frames to the journal, versions to the resolver,
//!       positions to everyone, feedback to the server
//! Holds: the fold; the transactions of one frame, of a large transaction one piece
//! Invariants: 1. stamps are a pure function of the WAL from a checkpoint, and every own frame is one; 2. the
//!        slot is confirmed only to ends of own frames that are durable, and not past a finding that is not
//!        recorded; 3. the decoded position is published only after the resolver knows what lies below it; 4. what the journal is
//!        taken to hold already is counted so only once the last of it was met at its place
//! On crash: starts again from the confirmed frame; what is in the journal already is not written twice
//! Not here: pgoutput (`crate::source`), what peers get and when (`crate::link`)
//!
//! Here transactions and their stamps; [`framing`] and [`feedback`] are what becomes of them, [`own`] the daemon's tables.

mod checkpoint;
mod feedback;
mod flow;
mod framing;
mod own;
mod replay;
mod same_wal;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anabranch_conflict::{Fold, FoldError};
use anabranch_proto::row::RowImage;
use anabranch_proto::schema::TableDesc;
use anabranch_proto::stamp::NTP64;
use anabranch_proto::txn::{Change, FrameBuilder, PutOp, TxnHeader};
use anabranch_proto::wire::Malformed;
use anabranch_proto::{Lsn, NodeId, Position, Stamp, Vector};
use tokio::sync::watch;
use tokio::time::Instant;
use uuid::Uuid;

use crate::config::Config;
use crate::journal::{self, Journal};
use crate::membership;
use crate::policy_change;
use crate::resolve::{self, LocalTxn};
use crate::setup::{ddl, sequence};
use crate::shared::{Counters, Shared, Unseen, lock};
use crate::source::{self, Event, ReplyWanted, Source, Timelines};

use flow::Flow;
use own::{clock_row, progress_row, without_own};

pub use checkpoint::{
    Checkpoint, begin as begin_checkpoint, forget as forget_checkpoint, gone, read as read_checkpoint,
    rebuild, write as write_checkpoint,
};
pub use replay::Replay;
pub use same_wal::Marks;

/// Whose row of `anabranch.clock` is updated first in a transaction that writes rows again (`crate::heal`): no node's. Only
/// the daemon's role may write it.
pub(crate) const AGAIN: NodeId = NodeId(0);
/// A frame is closed past this, bytes; a transaction past it travels in pieces.
const FRAME_BYTES: usize = 256 << 10;
/// A list for so many changes is kept for the next transaction.
const SPARE_CHANGES_MAX: usize = 4_096;
/// The database is read only by default, but a session can say otherwise.
const WRITTEN_AFTER_GOODBYE: &str = "rows were written here after this node had said that it leaves: it is not certain that \
    the others have them; write them again at a member";

/// Capture cannot go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The stream failed.
    #[error(transparent)]
    Source(#[from] source::Error),
    /// The journal failed.
    #[error(transparent)]
    Journal(#[from] journal::Error),
    /// The resolver failed.
    #[error(transparent)]
    Resolve(#[from] resolve::Error),
    /// The WAL went back.
    #[error(transparent)]
    Fold(#[from] FoldError),
    /// A row of the daemon's own tables cannot be read.
    #[error(
        "anabranch.{0} cannot be read from the stream ({1}); is the schema the one that `anabranch init` made?"
    )]
    OwnTable(&'static str, Malformed),
    /// The journal's frames cannot be read.
    #[error(transparent)]
    Malformed(#[from] Malformed),
    /// The journal does not reach back to where the slot is.
    #[error(
        "the slot was confirmed up to {confirmed}, but the journal in node.data_dir holds nothing of this node: the \
         journal was lost or is another node's; restore the folder, or run `anabranch heal`, which makes it anew of what the \
         other members hold (docs/errors/the-journal-was-lost.md)"
    )]
    JournalLost {
        /// What the slot says.
        confirmed: Lsn,
    },
    /// The server has less WAL than the journal.
    #[error(
        "the journal holds this node's transactions up to {journaled}, but the server's WAL ends at {written}: the \
         server was restored from an older copy. As it is it cannot be this node any more; docs/errors/the-server-went-back.md \
         says how it can come back"
    )]
    WentBack {
        /// The journal's last own position.
        journaled: Lsn,
        /// Where the WAL ends.
        written: Lsn,
    },
    /// The server's WAL is not the one that was decoded.
    #[error(
        "the journal holds this node's transactions up to {journaled}, but the server has other WAL there: {lacks}. The server was \
         restored from an older copy, and has been written to since. As it is it cannot be this node any more; \
         docs/errors/the-server-went-back.md says how it can come back"
    )]
    OtherWal {
        /// The journal's last own position.
        journaled: Position,
        /// What shows it.
        lacks: String,
    },
    /// The checkpoint file cannot be written.
    #[error(
        "the checkpoint in node.data_dir cannot be written: {0}; free disk space or correct its permissions"
    )]
    Checkpoint(std::io::Error),
    /// Something of an apply transaction cannot be found for replay.
    #[error("replaying the journal: {0}")]
    Replay(String),
}

impl Error {
    /// May starting again from the journal mend it?
    #[must_use]
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Source(error) if error.is_transient())
    }
}

/// What the transaction being decoded is.
enum Kind {
    /// Its first change is not here yet.
    Unknown,
    /// The daemon's own apply transaction, with its progress.
    Echo(Vec<(NodeId, Position, Stamp)>),
    /// Anyone else's.
    Local(LocalTxn),
}

struct Open {
    commit_start: Lsn,
    commit_us: i64,
    xid: u32,
    kind: Kind,
    /// Changes of a local transaction that are not encoded yet.
    changes: Vec<Change>,
    bytes: usize,
    count: u64,
    /// Pieces written, and the name of this writing; 0 pieces while the transaction is small.
    pieces: u32,
    run: u64,
    /// It writes rows again that nobody decoded when they were written (`crate::heal`), at this time (microseconds since
    /// the Unix epoch) as far as that is known.
    again: Option<i64>,
}

/// A whole frame that is not confirmed yet.
struct Pending {
    end: Lsn,
    seq: u64,
    /// Decoded before anything in it.
    before: Vector,
}

/// The capture stage of one node.
pub struct Capture {
    config: Arc<Config>,
    shared: Arc<Shared>,
    journal: Journal,
    source: Source,
    fold: Fold,
    timelines: Timelines,
    builder: FrameBuilder,
    /// Own position after the last frame handed to the journal, and after the last transaction in the builder.
    framed: Position,
    built: Position,
    /// Own transactions up to here are in the journal from before a restart.
    journaled: Position,
    /// The last of them was met, or lies before the place where decoding began.
    is_met: bool,
    open: Option<Open>,
    /// An empty list for the changes of the next transaction.
    spare: Vec<Change>,
    /// End of the last commit met; published once all that was at hand is met.
    reached: Lsn,
    /// No frame that is not full goes before this.
    frame_due: Instant,
    /// How thick own transactions come, which says how long that is.
    flow: Flow,
    /// Was the last transaction sent long after its commit?
    is_behind: bool,
    /// The server's clock runs ahead, and the alarm stands.
    is_clamped: bool,
    /// Positions moved since the last feedback, and when they may be reported.
    owes_feedback: bool,
    feedback_due: Instant,
    /// Frames that are not confirmed yet.
    pending: VecDeque<Pending>,
    /// Decoded when the last frame was made, and [`Self::clock`] then.
    before: Vector,
    before_clock: NTP64,
    confirmed: Lsn,
    replay: Option<Replay>,
    /// See [`Shared::own_until`].
    own_until: watch::Receiver<u64>,
    /// Has this node said that it leaves?
    said_goodbye: bool,
    /// See [`Shared::states_until`].
    states_until: Lsn,
}

impl Capture {
    /// A capture that goes on from `checkpoint`.
    #[must_use]
    pub fn new(
        config: Arc<Config>,
        shared: Arc<Shared>,
        journal: Journal,
        (source, timelines): (Source, Timelines),
        checkpoint: Checkpoint,
        replay: Replay,
    ) -> Self {
        let framed = checkpoint.journaled;
        let own_until = shared.own_until.subscribe();
        shared.own.send_replace(framed);
        let said_goodbye = lock(&shared.members).said_goodbye(shared.node);
        let states_until = Lsn(shared.states_until.load(std::sync::atomic::Ordering::Relaxed));
        shared.decoded.send_replace(checkpoint.start.0);
        Self {
            config,
            shared,
            journal,
            source,
            timelines,
            builder: FrameBuilder::default(),
            framed,
            built: framed,
            journaled: checkpoint.journaled,
            is_met: checkpoint.fold.last() >= checkpoint.journaled,
            open: None,
            spare: Vec::new(),
            reached: Lsn::ZERO,
            frame_due: Instant::now(),
            flow: Flow::new(Instant::now()),
            is_behind: false,
            // An alarm of a capture before this one may stand.
            is_clamped: true,
            owes_feedback: false,
            feedback_due: Instant::now(),
            pending: VecDeque::new(),
            before: checkpoint.fold.vector().clone(),
            before_clock: checkpoint.fold.clock(),
            confirmed: checkpoint.start,
            fold: checkpoint.fold,
            replay: Some(replay),
            own_until,
            said_goodbye,
            states_until,
        }
    }

    /// Decodes until told to stop or the stream fails.
    ///
    /// # Errors
    /// When the stream, the journal or the resolver fails.
    pub async fn run(mut self, mut stop: watch::Receiver<bool>) -> Result<(), Error> {
        let mut durable = self.journal.durable();
        let mut quorum = self.shared.quorum_applied.subscribe();
        let mut tick = tokio::time::interval(Duration::from_secs(1));
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let shared = Arc::clone(&self.shared);
        loop {
            tokio::select! {
                event = self.source.next() => {
                    let mut next = Some(event?);
                    while let Some(event) = next {
                        self.meet(event).await?;
                        next = self.source.buffered()?;
                    }
                    self.raise_decoded(self.reached);
                    self.flush_if_due().await?;
                    self.publish_decoded();
                }
                () = tokio::time::sleep_until(self.frame_due), if self.is_gathering() => {
                    self.flush().await?;
                    self.publish_decoded();
                }
                () = shared.ping.notified() => self.feedback(ReplyWanted::Yes).await?,
                // Only a frame of ours is confirmed: at a node that receives, each sync of what came in would wake us, and the walsender.
                changed = durable.changed(), if !self.pending.is_empty() => {
                    if changed.is_err() {
                        return Ok(());
                    }
                    self.feedback_soon().await?;
                }
                // The sender is in `shared`, which we hold.
                _ = quorum.changed() => self.feedback_soon().await?,
                () = tokio::time::sleep_until(self.feedback_due), if self.owes_feedback => {
                    self.feedback(ReplyWanted::No).await?;
                }
                _ = tick.tick() => self.feedback(ReplyWanted::No).await?,
                changed = stop.changed() => {
                    // Whoever could say so may be gone.
                    if changed.is_err() || *stop.borrow() {
                        self.flush().await?;
                        self.feedback(ReplyWanted::No).await?;
                        return Ok(());
                    }
                }
            }
        }
    }

    async fn meet(&mut self, event: Event) -> Result<(), Error> {
        match event {
            Event::Begin {
                commit_start,
                commit_us,
                xid,
            } => {
                self.open = Some(Open {
                    commit_start,
                    commit_us,
                    xid,
                    kind: Kind::Unknown,
                    changes: std::mem::take(&mut self.spare),
                    bytes: 0,
                    count: 0,
                    pieces: 0,
                    run: 0,
                    again: None,
                });
                Ok(())
            }
            Event::Change(change) => match self.change(change)? {
                true => self.piece().await,
                false => Ok(()),
            },
            Event::Commit {
                commit_end,
                commit_us,
                ..
            } => self.commit(commit_end, commit_us).await,
            Event::Message { .. } => Ok(()),
            Event::Keepalive {
                wal_end,
                reply_wanted,
            } => {
                if self.open.is_some() {
                    return Ok(());
                }
                check_met(self.is_met, self.journaled, self.timelines.position(wal_end))?;
                self.raise_decoded(wal_end);
                if reply_wanted {
                    self.confirm_idle(wal_end).await
                } else {
                    Ok(())
                }
            }
        }
    }

    /// Meets a change of the open transaction; true once that is so large that what there is of it must be written. Waits for nothing, since
    /// there is one for every row.
    fn change(&mut self, change: Change) -> Result<bool, Error> {
        let Some(open) = &mut self.open else {
            return Ok(false);
        };
        if let Change::Put { table, row, op, .. } = &change
            && table.is_own()
        {
            return match table.name.as_str() {
                "progress" => {
                    let entry =
                        progress_row(table, row).map_err(|error| Error::OwnTable("progress", error))?;
                    match &mut open.kind {
                        Kind::Unknown => {
                            open.kind = Kind::Echo(vec![entry]);
                            self.source.skip_rows();
                        }
                        Kind::Echo(entries) => entries.push(entry),
                        // Not the daemon's: it writes progress first. Nobody else may, but nothing is lost by it.
                        Kind::Local(_) => {}
                    }
                    Ok(false)
                }
                "clock" => {
                    let clock = clock_row(table, row).map_err(|error| Error::OwnTable("clock", error))?;
                    if clock.0 == self.shared.node && matches!(open.kind, Kind::Unknown) {
                        self.fold.witness(clock.1);
                    }
                    if clock.0 == AGAIN && *op == PutOp::Update && matches!(open.kind, Kind::Unknown) {
                        open.again = Some(clock.1);
                    }
                    self.begin_local();
                    Ok(false)
                }
                membership::TABLE => {
                    if self.member(&Arc::clone(table), row)? {
                        self.travel(change)
                    } else {
                        Ok(false)
                    }
                }
                ddl::TABLE => {
                    // Before its transaction is known to the resolver: whoever knows of that knows that tables may have changed. And
                    // behind its begin: whoever knows of the DDL knows of a place behind which it is.
                    self.begin_local();
                    self.shared.own_ddl.fetch_add(1, Ordering::Release);
                    if *op == PutOp::Insert {
                        self.note_ddl(table, row);
                    }
                    self.travel(change)
                }
                sequence::TABLE | policy_change::TABLE => self.travel(change),
                _ => Ok(false),
            };
        }
        self.travel(change)
    }

    /// A statement that is said here: who has not seen its transaction has not seen it. Said again by a heal it is no new one.
    fn note_ddl(&self, table: &TableDesc, row: &RowImage) {
        if let Some(open) = &self.open
            && let (Kind::Local(txn), None) = (&open.kind, open.again)
            && let Ok(id) = membership::binary(table, row, "id")
            && let Ok(id) = Uuid::from_slice(id)
        {
            let lasting = &self.shared.lasting;
            lock(&lasting.ddl_places).note(id, txn.position);
            let text = |name| std::str::from_utf8(membership::binary(table, row, name).ok()?).ok();
            if let (Some(command), Some(path), Some(role)) =
                (text("command"), text("search_path"), text("role"))
            {
                let by = (self.shared.node, txn.position);
                lasting.named_anew.note(command, (path, role), by);
            }
        }
    }

    /// A row of `anabranch.member`: met here before anything after it in the WAL, it counts from here on. One that was
    /// said here travels like a row of an application's.
    fn member(&mut self, table: &TableDesc, row: &RowImage) -> Result<bool, Error> {
        let fact =
            membership::of_row(table, row).map_err(|error| Error::OwnTable(membership::TABLE, error))?;
        if let Some(fact) = &fact {
            self.shared.note_member(fact.clone());
            self.said_goodbye = lock(&self.shared.members).said_goodbye(self.shared.node);
        }
        let Some(open) = &self.open else { return Ok(false) };
        let founder = fact.is_none_or(|fact| fact.kind == membership::FactKind::Founder);
        Ok(!founder && !matches!(open.kind, Kind::Echo(_)))
    }

    /// A change of a local transaction, on its way to the peers. As [`Self::change`].
    fn travel(&mut self, change: Change) -> Result<bool, Error> {
        self.begin_local();
        let Some(open) = &mut self.open else {
            return Ok(false);
        };
        let Kind::Local(txn) = &open.kind else {
            return Ok(false);
        };
        // Tables of ours that only a hand could touch are nobody's business.
        let Some(mut change) = without_own(change) else {
            return Ok(false);
        };
        if let Change::Put {
            op, old_key: None, ..
        } = &mut change
            && (open.again.is_some() || open.commit_start < self.states_until)
        {
            *op = PutOp::State;
        }
        lock(&self.shared.resolver).local(&change, txn, self.fold.vector())?;
        // From before a restart.
        let is_journaled = txn.position <= self.journaled;
        if !is_journaled {
            check_met(self.is_met, self.journaled, txn.position)?;
        }
        if self.said_goodbye && is_application(&change) && !is_journaled {
            let text = WRITTEN_AFTER_GOODBYE.to_owned();
            self.shared.lasting.alarms.raise("leaving", text);
        }
        open.count += 1;
        open.bytes += approximate_len(&change);
        open.changes.push(change);
        let is_full = open.bytes >= FRAME_BYTES;
        if is_full && is_journaled {
            // In the journal already.
            open.changes.clear();
            open.bytes = 0;
        }
        Ok(is_full && !is_journaled)
    }

    /// The open transaction is a local one: it gets its stamp.
    fn begin_local(&mut self) {
        let Some(open) = &mut self.open else { return };
        if !matches!(open.kind, Kind::Unknown) {
            return;
        }
        let max_drift_us =
            i64::try_from(self.config.clock.max_drift_ms.saturating_mul(1_000)).unwrap_or(i64::MAX);
        let stamped = match (open.again, self.fold.witness_us()) {
            // Not later than it was written; the witness of this transaction alone.
            (Some(written_us), witness) => {
                self.fold.witness(written_us.saturating_sub(max_drift_us));
                let stamped = self.fold.begin_local(open.commit_us, max_drift_us);
                self.fold.witness(witness.unwrap_or(written_us));
                stamped
            }
            (None, _) => self.fold.begin_local(open.commit_us, max_drift_us),
        };
        if open.again.is_some() {
            // Its time was chosen, and says nothing of the clock.
        } else if stamped.clamped_by_us > 0 {
            let text = format!(
                "the server's clock runs {} s ahead of what the members agree on; stamps are held back, mend its clock",
                (stamped.clamped_by_us.saturating_add(max_drift_us)) / 1_000_000
            );
            self.shared.alarms.raise("server_clock", text);
            self.is_clamped = true;
        } else if std::mem::take(&mut self.is_clamped) {
            self.shared.alarms.clear("server_clock");
        }
        let position = self
            .timelines
            .position(Lsn(open.commit_start.0.saturating_add(1)));
        // Before any of its rows is known.
        self.shared.note_opening(position, open.xid);
        open.kind = Kind::Local(LocalTxn {
            stamp: stamped.stamp,
            position,
            xid: open.xid,
            commit_us: open.commit_us,
        });
    }

    async fn commit(&mut self, commit_end: Lsn, commit_us: i64) -> Result<(), Error> {
        let Some(open) = self.open.take() else {
            return Ok(());
        };
        let position = self.timelines.position(commit_end);
        self.is_met |= matches!(open.kind, Kind::Local(_)) && position == self.journaled;
        check_met(self.is_met, self.journaled, position)?;
        match open.kind {
            // Nothing in it is published.
            Kind::Unknown => {}
            Kind::Echo(entries) => self.echo(entries, open.commit_start).await?,
            Kind::Local(txn) => {
                // Before anything can be found about it that has to wait for it.
                self.shared.note_decoded(Unseen {
                    position,
                    rows_at: txn.position,
                    xid: open.xid,
                    through: position,
                });
                lock(&self.shared.resolver).local_end(&txn, self.fold.vector())?;
                let deps = self.fold.commit_local(position)?;
                let header = TxnHeader {
                    position,
                    stamp: txn.stamp,
                    deps,
                    xid: open.xid,
                    commit_us,
                    witness_us: self.fold.witness_us().unwrap_or(0),
                    change_count: open.count,
                };
                if open.count > 0 {
                    lock(&self.shared.recent).insert(&header);
                    Counters::add(&self.shared.counters.local_txns, 1);
                }
                if position > self.journaled {
                    self.frame_txn(&header, &open).await?;
                }
            }
        }
        let mut changes = open.changes;
        changes.clear();
        if changes.capacity() <= SPARE_CHANGES_MAX {
            self.spare = changes;
        }
        self.reached = commit_end;
        if self.replay.is_some() {
            // Replay ends at its place, not some commits later.
            self.raise_decoded(commit_end);
        }
        Ok(())
    }

    async fn echo(
        &mut self,
        entries: Vec<(NodeId, Position, Stamp)>,
        commit_start: Lsn,
    ) -> Result<(), Error> {
        let mut told = Instant::now();
        while let Some(replay) = &mut self.replay
            && replay.step(&self.shared, &entries, commit_start)?
        {
            if told.elapsed() > Duration::from_secs(1) {
                told = Instant::now();
                self.shared.progress.works();
                self.still_here().await?;
            }
        }
        self.fold.echo(entries);
        Ok(())
    }

    fn raise_decoded(&mut self, lsn: Lsn) {
        self.shared.decoded.send_if_modified(|decoded| {
            let higher = lsn.0 > *decoded;
            *decoded = lsn.0.max(*decoded);
            higher
        });
        if self
            .replay
            .as_ref()
            .is_some_and(|replay| lsn.0 >= crate::apply::fence::reportable(replay.until()))
        {
            self.replay = None;
        }
    }

    /// Publishes what came back as echoes, and wakes the applier for findings.
    fn publish_decoded(&mut self) {
        // Not while own transactions wait for their frame: nobody shall hear of them before the journal has.
        if self.builder.txn_count() == 0 {
            let decoded = *self.shared.decoded.borrow();
            self.publish((self.fold.vector(), self.clock()), decoded);
        }
        if lock(&self.shared.resolver).has_found() {
            self.shared.found.notify_one();
        }
    }

    /// See [`counted_to`].
    fn clock(&self) -> NTP64 {
        counted_to(self.open.as_ref(), self.fold.clock())
    }

    /// Publishes `seen`, which was decoded, and the clock there, when all of ours up to `decoded` was in frames.
    fn publish(&self, (seen, clock): (&Vector, NTP64), decoded: u64) {
        let changed = self.shared.echoed.send_if_modified(|echoed| {
            let changed = !echoed.includes(seen);
            echoed.join(seen);
            changed
        });
        if changed {
            // Behind what is known, and before what is stable: who trims the journal asks the other way round.
            self.shared.hear([Stamp {
                time: clock,
                node: self.shared.node,
            }]);
            lock(&self.shared.stability).observe(self.shared.node, seen);
        }
        self.shared.framed.send_if_modified(|framed| {
            let higher = decoded > *framed;
            *framed = decoded.max(*framed);
            higher
        });
    }
}

/// All that ends before this position is decoded: the last own transaction that the journal holds must have been among it. Else the
/// server has other WAL there, and what was taken for journalled so far is nowhere.
fn check_met(is_met: bool, journaled: Position, position: Position) -> Result<(), Error> {
    if is_met || position < journaled {
        return Ok(());
    }
    Err(Error::OtherWal {
        journaled,
        lacks: "none of its commits ends there".to_owned(),
    })
}

/// All own transactions up to this time are in the fold's vector. The one that is open is not, before its end, and has its stamp already: the
/// fold's `clock`.
fn counted_to(open: Option<&Open>, clock: NTP64) -> NTP64 {
    match open.map(|open| &open.kind) {
        Some(Kind::Local(txn)) => NTP64(txn.stamp.time.as_u64().saturating_sub(1)),
        _ => clock,
    }
}

/// Is it a row of somebody's other than ours?
fn is_application(change: &Change) -> bool {
    match change {
        Change::Put { table, .. } | Change::Delete { table, .. } => !table.is_own(),
        Change::Truncate { .. } => true,
    }
}

fn approximate_len(change: &Change) -> usize {
    match change {
        Change::Put {
            row, old_key, former, ..
        } => {
            let former = former.as_ref().map_or(0, |former| former.as_bytes().len());
            row.as_bytes().len() + former + old_key.as_ref().map_or(0, |key| key.as_bytes().len()) + 16
        }
        Change::Delete { key, .. } => key.as_bytes().len() + 16,
        Change::Truncate { tables, .. } => tables.len() * 2 + 16,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transaction_that_is_open_does_not_count_as_heard() {
        let mut fold = Fold::new(NodeId(1));
        let mut open = Open {
            commit_start: Lsn(7),
            commit_us: 0,
            xid: 1,
            kind: Kind::Unknown,
            changes: Vec::new(),
            bytes: 0,
            count: 0,
            pieces: 0,
            run: 0,
            again: None,
        };
        let before = fold.begin_local(0, 0).stamp.time;
        assert_eq!(counted_to(None, fold.clock()), before);
        assert_eq!(counted_to(Some(&open), fold.clock()), before);
        for commit_us in [0, 1_000_000] {
            let before = fold.clock();
            let stamp = fold.begin_local(commit_us, 0).stamp;
            open.kind = Kind::Local(LocalTxn {
                stamp,
                position: Position::new(1, 8),
                xid: 1,
                commit_us,
            });
            let counted = counted_to(Some(&open), fold.clock());
            assert!(before <= counted && counted < stamp.time, "{counted:?}");
        }
    }
}
