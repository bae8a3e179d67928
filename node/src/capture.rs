//! Capture: the decoded stream becomes stamped frames in the journal.
//!
//! In:   [`Event`]s of the slot, in commit order        Out: own frames to the journal, versions to the resolver,
//!       positions to everyone, feedback to the server
//! Holds: the fold; the transactions of one frame, of a large transaction one piece
//! Invariants: 1. stamps are a pure function of the WAL from a checkpoint, and every own frame is one; 2. the
//!        slot is confirmed only to ends of own frames that are durable, and not past a finding that is not
//!        recorded; 3. the decoded position is published only after the resolver knows what lies below it
//! On crash: starts again from the confirmed frame; what is in the journal already is not written twice
//! Not here: pgoutput (`crate::source`), what peers get and when (`crate::link`)

mod checkpoint;
mod replay;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use anabranch_conflict::{Fold, FoldError};
use anabranch_proto::row::RowImage;
use anabranch_proto::schema::TableDesc;
use anabranch_proto::stamp::{STAMP_LEN, Stamp};
use anabranch_proto::txn::{Change, FrameBuilder, TxnHeader};
use anabranch_proto::wire::Malformed;
use anabranch_proto::{Lsn, NodeId, Position, Vector};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::config::Config;
use crate::journal::{self, Frame, FrameKind, FrameMeta, Journal};
use crate::membership::{self, binary, number};
use crate::resolve::{self, LocalTxn};
use crate::setup::sequence;
use crate::shared::{Counters, Shared, TxnInfo, Visibility, lock};
use crate::source::{self, Event, ReplyWanted, Source};

pub use checkpoint::{
    Checkpoint, find as find_checkpoint, read as read_checkpoint, rebuild, write as write_checkpoint,
};
pub use replay::Replay;

/// A frame is closed past this, bytes; a transaction past it travels in pieces.
const FRAME_BYTES: usize = 256 << 10;
/// Least time between two frames that are not full. Every frame wakes the journal's writer, every link and every
/// applier of the cluster; a transaction that comes alone never waits for this.
const FRAME_GAP: Duration = Duration::from_millis(3);
/// Least time between two reports to the server that no commit waits for: each wakes the walsender.
const FEEDBACK_GAP: Duration = Duration::from_millis(20);

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
         journal was lost or is another node's; restore the folder, or remove this node and join it again"
    )]
    JournalLost {
        /// What the slot says.
        confirmed: Lsn,
    },
    /// The server has less WAL than the journal.
    #[error(
        "the journal holds this node's transactions up to {journaled}, but the server's WAL ends at {written}: the \
         server was restored from an older copy; do not start it as this node, remove the node and join it again"
    )]
    WentBack {
        /// The journal's last own position.
        journaled: Lsn,
        /// Where the WAL ends.
        written: Lsn,
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
    epoch: u32,
    builder: FrameBuilder,
    /// Own position after the last frame handed to the journal, and after the last transaction in the builder.
    framed: Position,
    built: Position,
    /// Own transactions up to here are in the journal from before a restart.
    journaled: Position,
    open: Option<Open>,
    /// End of the last commit met; published once all that was at hand is met.
    reached: Lsn,
    /// No frame that is not full goes before this.
    frame_due: Instant,
    /// Positions moved since the last feedback, and when they may be reported.
    owes_feedback: bool,
    feedback_due: Instant,
    /// Frames that are not confirmed yet.
    pending: VecDeque<Pending>,
    /// Decoded when the last frame was made.
    before: Vector,
    confirmed: Lsn,
    replay: Option<Replay>,
}

impl Capture {
    /// A capture that goes on from `checkpoint`.
    #[must_use]
    pub fn new(
        config: Arc<Config>,
        shared: Arc<Shared>,
        journal: Journal,
        source: Source,
        checkpoint: Checkpoint,
        replay: Replay,
    ) -> Self {
        let epoch = source.identity().timeline;
        let framed = checkpoint.journaled;
        shared.own.send_replace(framed);
        shared.decoded.send_replace(checkpoint.start.0);
        Self {
            config,
            shared,
            journal,
            source,
            epoch,
            builder: FrameBuilder::default(),
            framed,
            built: framed,
            journaled: checkpoint.journaled,
            open: None,
            reached: Lsn::ZERO,
            frame_due: Instant::now(),
            owes_feedback: false,
            feedback_due: Instant::now(),
            pending: VecDeque::new(),
            before: checkpoint.fold.vector().clone(),
            confirmed: checkpoint.start,
            fold: checkpoint.fold,
            replay: Some(replay),
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
                    let durable = *durable.borrow();
                    self.flush_if_due(durable).await?;
                    self.publish_decoded();
                }
                () = tokio::time::sleep_until(self.frame_due), if self.is_gathering(*durable.borrow()) => {
                    self.flush().await?;
                    self.publish_decoded();
                }
                () = shared.ping.notified() => self.feedback(ReplyWanted::Yes).await?,
                changed = durable.changed() => {
                    if changed.is_err() {
                        return Ok(());
                    }
                    let durable = *durable.borrow_and_update();
                    self.flush_if_due(durable).await?;
                    self.publish_decoded();
                    self.feedback_soon().await?;
                }
                // The sender is in `shared`, which we hold.
                _ = quorum.changed() => self.feedback_soon().await?,
                () = tokio::time::sleep_until(self.feedback_due), if self.owes_feedback => {
                    self.feedback(ReplyWanted::No).await?;
                }
                _ = tick.tick() => self.feedback(ReplyWanted::No).await?,
                _ = stop.changed() => {
                    if *stop.borrow() {
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
                    changes: Vec::new(),
                    bytes: 0,
                    count: 0,
                    pieces: 0,
                    run: 0,
                });
                Ok(())
            }
            Event::Change(change) => self.change(change).await,
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
                self.raise_decoded(wal_end);
                if reply_wanted {
                    self.confirm_idle(wal_end).await
                } else {
                    Ok(())
                }
            }
        }
    }

    async fn change(&mut self, change: Change) -> Result<(), Error> {
        let Some(open) = &mut self.open else { return Ok(()) };
        if let Change::Put { table, row, .. } = &change
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
                    Ok(())
                }
                "clock" => {
                    let clock = clock_row(table, row).map_err(|error| Error::OwnTable("clock", error))?;
                    if clock.0 == self.shared.node && matches!(open.kind, Kind::Unknown) {
                        self.fold.witness(clock.1);
                    }
                    self.begin_local();
                    Ok(())
                }
                membership::TABLE => {
                    if self.member(&Arc::clone(table), row)? {
                        self.travel(change).await
                    } else {
                        Ok(())
                    }
                }
                sequence::TABLE => self.travel(change).await,
                _ => Ok(()),
            };
        }
        self.travel(change).await
    }

    /// A row of `anabranch.member`: met here before anything after it in the WAL, it counts from here on. One that was
    /// said here travels like a row of an application's.
    fn member(&mut self, table: &TableDesc, row: &RowImage) -> Result<bool, Error> {
        let fact =
            membership::of_row(table, row).map_err(|error| Error::OwnTable(membership::TABLE, error))?;
        if let Some(fact) = &fact {
            self.shared.note_member(fact.clone());
        }
        let Some(open) = &self.open else { return Ok(false) };
        let founder = fact.is_none_or(|fact| fact.kind == membership::FactKind::Founder);
        Ok(!founder && !matches!(open.kind, Kind::Echo(_)))
    }

    /// A change of a local transaction, on its way to the peers.
    async fn travel(&mut self, change: Change) -> Result<(), Error> {
        let Some(open) = &mut self.open else { return Ok(()) };
        if matches!(open.kind, Kind::Unknown) {
            self.begin_local();
        }
        let Some(open) = &mut self.open else { return Ok(()) };
        let Kind::Local(txn) = &open.kind else {
            return Ok(());
        };
        // Tables of ours that only a hand could touch are nobody's business.
        let Some(change) = without_own(change) else {
            return Ok(());
        };
        lock(&self.shared.resolver).local(&change, txn, self.fold.vector())?;
        open.count += 1;
        open.bytes += approximate_len(&change);
        open.changes.push(change);
        if open.bytes >= FRAME_BYTES && open.commit_start >= self.journaled.lsn {
            self.piece().await?;
        } else if open.bytes >= FRAME_BYTES {
            // In the journal already, from before a restart.
            open.changes.clear();
            open.bytes = 0;
        }
        Ok(())
    }

    /// The open transaction is a local one: it gets its stamp.
    fn begin_local(&mut self) {
        let Some(open) = &mut self.open else { return };
        if !matches!(open.kind, Kind::Unknown) {
            return;
        }
        let max_drift_us =
            i64::try_from(self.config.clock.max_drift_ms.saturating_mul(1_000)).unwrap_or(i64::MAX);
        let stamped = self.fold.begin_local(open.commit_us, max_drift_us);
        if stamped.clamped_by_us > 0 {
            let text = format!(
                "the server's clock runs {} s ahead of what the members agree on; stamps are held back, mend its clock",
                (stamped.clamped_by_us.saturating_add(max_drift_us)) / 1_000_000
            );
            self.shared.alarms.raise("server_clock", text);
        } else {
            self.shared.alarms.clear("server_clock");
        }
        open.kind = Kind::Local(LocalTxn {
            stamp: stamped.stamp,
            position: Position {
                epoch: self.epoch,
                lsn: Lsn(open.commit_start.0.saturating_add(1)),
            },
            xid: open.xid,
            commit_us: open.commit_us,
        });
    }

    async fn commit(&mut self, commit_end: Lsn, commit_us: i64) -> Result<(), Error> {
        let Some(open) = self.open.take() else {
            return Ok(());
        };
        match open.kind {
            // Nothing in it is published.
            Kind::Unknown => {}
            Kind::Echo(entries) => self.echo(entries, open.commit_start)?,
            Kind::Local(txn) => {
                let position = Position {
                    epoch: self.epoch,
                    lsn: commit_end,
                };
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
                    let info = TxnInfo {
                        xid: open.xid,
                        commit_us,
                        lsn: commit_end,
                        deps: header.deps.clone(),
                    };
                    lock(&self.shared.recent).insert(txn.stamp, info);
                    Counters::add(&self.shared.counters.local_txns, 1);
                }
                if *self.shared.visibility.borrow() != Visibility::Prompt {
                    lock(&self.shared.unseen).push_back((position, open.xid));
                }
                if position > self.journaled {
                    self.frame_txn(&header, &open).await?;
                }
            }
        }
        self.reached = commit_end;
        if self.replay.is_some() {
            // Replay ends at its place, not some commits later.
            self.raise_decoded(commit_end);
        }
        Ok(())
    }

    async fn frame_txn(&mut self, header: &TxnHeader, open: &Open) -> Result<(), Error> {
        for change in &open.changes {
            self.builder.changes().push(change);
        }
        self.builder.end_txn(header);
        self.built = header.position;
        if open.pieces > 0 {
            self.append(FrameKind::End, open.pieces, open.run).await?;
        } else if self.builder.is_full(FRAME_BYTES) {
            self.flush().await?;
        }
        Ok(())
    }

    /// Writes what is open as a piece of a large transaction.
    async fn piece(&mut self) -> Result<(), Error> {
        // Whole transactions before it go first, in a frame of their own.
        if self.open.as_ref().is_some_and(|open| open.pieces == 0) {
            self.flush().await?;
        }
        let Some(open) = &mut self.open else { return Ok(()) };
        if open.run == 0 {
            open.run = rand::random::<u64>() | 1;
        }
        for change in open.changes.drain(..) {
            self.builder.changes().push(&change);
        }
        self.builder.end_piece();
        open.bytes = 0;
        let (piece, run) = (open.pieces, open.run);
        open.pieces += 1;
        self.append(FrameKind::Part, piece, run).await
    }

    /// Is the last own frame not durable yet? `durable` is the journal's.
    fn is_syncing(&self, durable: u64) -> bool {
        self.pending.back().is_some_and(|frame| frame.seq >= durable)
    }

    /// Do commits wait until peers have applied them?
    fn is_waited_for(&self) -> bool {
        *self.shared.visibility.borrow() == Visibility::BeforeDependents
    }

    /// Do closed transactions wait for nothing but [`FRAME_GAP`]?
    fn is_gathering(&self, durable: u64) -> bool {
        self.builder.txn_count() > 0 && !self.is_syncing(durable)
    }

    /// While a frame is on its way to the disk, and a moment after it was made, the next one grows: one transaction a
    /// frame when idle, many when there is a backlog.
    async fn flush_if_due(&mut self, durable: u64) -> Result<(), Error> {
        if self.is_gathering(durable) && Instant::now() >= self.frame_due {
            self.flush().await?;
        }
        Ok(())
    }

    /// Hands the closed transactions to the journal.
    async fn flush(&mut self) -> Result<(), Error> {
        if self.builder.txn_count() == 0 {
            return Ok(());
        }
        self.frame_due = Instant::now();
        if !self.is_waited_for() {
            self.frame_due += FRAME_GAP;
        }
        self.append(FrameKind::Whole, 0, 0).await
    }

    async fn append(&mut self, kind: FrameKind, part: u32, part_run: u64) -> Result<(), Error> {
        let txn_count = self.builder.txn_count();
        let (codec, payload, raw_len) = journal::pack(self.builder.finish())?;
        let last = if kind == FrameKind::Part {
            self.framed
        } else {
            self.built
        };
        let meta = FrameMeta {
            origin: self.shared.node,
            prev: self.framed,
            last,
            kind,
            txn_count,
            part,
            part_run,
            codec,
            raw_len,
        };
        if kind != FrameKind::Part {
            // Before it can be sent: a peer must not seem to hold more of our stream than we do.
            self.shared.own.send_replace(last);
        }
        let append = self.journal.append(Frame { meta, payload });
        tokio::pin!(append);
        // While the journal stalls (disk full), the server must still hear from us.
        let seq = loop {
            tokio::select! {
                seq = &mut append => break seq?,
                () = tokio::time::sleep(Duration::from_secs(1)) => {
                    let (received, confirmed) = (self.source.received(), self.confirmed);
                    self.source.feedback(received, confirmed, confirmed, ReplyWanted::No).await?;
                }
            }
        };
        if kind != FrameKind::Part {
            self.framed = last;
            self.pending.push_back(Pending {
                end: last.lsn,
                seq,
                before: std::mem::replace(&mut self.before, self.fold.vector().clone()),
            });
        }
        Ok(())
    }

    /// The server asks whether we have everything: one that shuts down waits until we say so. Beyond the last
    /// own frame lie only echoes; with a checkpoint of the fold they need not be decoded again.
    async fn confirm_idle(&mut self, wal_end: Lsn) -> Result<(), Error> {
        self.flush().await?;
        self.feedback(ReplyWanted::No).await?;
        if !self.pending.is_empty()
            || wal_end <= self.confirmed
            || lock(&self.shared.resolver).found_from().is_some()
        {
            return Ok(());
        }
        checkpoint::write(&self.config.node.data_dir, wal_end, &self.fold).map_err(Error::Checkpoint)?;
        self.confirmed = wal_end;
        lock(&self.shared.checkpoint).join(self.fold.vector());
        self.feedback(ReplyWanted::No).await
    }

    fn echo(&mut self, entries: Vec<(NodeId, Position, Stamp)>, commit_start: Lsn) -> Result<(), Error> {
        if let Some(replay) = &mut self.replay {
            for &(origin, position, _) in &entries {
                replay.upto(&self.shared, origin, position, commit_start)?;
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
            let seen: &Vector = self.fold.vector();
            let changed = self.shared.echoed.send_if_modified(|echoed| {
                let changed = *echoed != *seen;
                if changed {
                    echoed.clone_from(seen);
                }
                changed
            });
            if changed {
                lock(&self.shared.stability).observe(self.shared.node, seen);
            }
        }
        if lock(&self.shared.resolver).has_found() {
            self.shared.found.notify_one();
        }
    }

    /// Reports positions: at once where a commit may wait for them, else not more often than [`FEEDBACK_GAP`].
    async fn feedback_soon(&mut self) -> Result<(), Error> {
        if self.is_waited_for() || Instant::now() >= self.feedback_due {
            return self.feedback(ReplyWanted::No).await;
        }
        self.owes_feedback = true;
        Ok(())
    }

    async fn feedback(&mut self, reply: ReplyWanted) -> Result<(), Error> {
        (self.owes_feedback, self.feedback_due) = (false, Instant::now() + FEEDBACK_GAP);
        let durable = *self.journal.durable().borrow();
        let held = lock(&self.shared.resolver).found_from();
        let ready = |frame: &mut Pending| frame.seq < durable && held.is_none_or(|held| frame.end <= held);
        while let Some(frame) = self.pending.pop_front_if(ready) {
            self.confirmed = self.confirmed.max(frame.end);
            lock(&self.shared.checkpoint).join(&frame.before);
        }
        self.shared
            .confirmed
            .store(self.confirmed.0, std::sync::atomic::Ordering::Relaxed);
        let received = self.source.received();
        let quorum = Lsn(*self.shared.quorum_applied.borrow());
        let applied = quorum.min(self.confirmed);
        Ok(self
            .source
            .feedback(received, self.confirmed, applied, reply)
            .await?)
    }
}

/// (origin, position, stamp) of a row of `anabranch.progress`.
fn progress_row(table: &TableDesc, row: &RowImage) -> Result<(NodeId, Position, Stamp), Malformed> {
    let origin =
        u16::try_from(number::<4>(table, row, "origin")?).map_err(|_| Malformed("an origin out of range"))?;
    let epoch =
        u32::try_from(number::<8>(table, row, "epoch")?).map_err(|_| Malformed("an epoch out of range"))?;
    let lsn = number::<8>(table, row, "lsn")?;
    let stamp: [u8; STAMP_LEN] = binary(table, row, "stamp")?
        .try_into()
        .map_err(|_| Malformed("a stamp of wrong length"))?;
    Ok((
        NodeId(origin),
        Position { epoch, lsn: Lsn(lsn) },
        Stamp::from_bytes(stamp),
    ))
}

/// (node, witness in microseconds since the Unix epoch) of a row of `anabranch.clock`.
fn clock_row(table: &TableDesc, row: &RowImage) -> Result<(NodeId, i64), Malformed> {
    let node = u16::try_from(number::<4>(table, row, "node_id")?)
        .map_err(|_| Malformed("a node id out of range"))?;
    let witness = number::<8>(table, row, "witness_us")?;
    Ok((NodeId(node), i64::try_from(witness).unwrap_or(0)))
}

/// The change without the daemon's own tables; `None` if nothing is left.
fn without_own(change: Change) -> Option<Change> {
    match change {
        Change::Put { ref table, .. } => {
            let travels = [membership::TABLE, sequence::TABLE].contains(&table.name.as_str());
            (!table.is_own() || travels).then_some(change)
        }
        Change::Delete { ref table, .. } => (!table.is_own()).then_some(change),
        Change::Truncate {
            mut tables,
            cascade,
            restart_identity,
        } => {
            tables.retain(|table| !table.is_own());
            (!tables.is_empty()).then_some(Change::Truncate {
                tables,
                cascade,
                restart_identity,
            })
        }
    }
}

fn approximate_len(change: &Change) -> usize {
    match change {
        Change::Put { row, old_key, .. } => {
            row.as_bytes().len() + old_key.as_ref().map_or(0, |key| key.as_bytes().len()) + 16
        }
        Change::Delete { key, .. } => key.as_bytes().len() + 16,
        Change::Truncate { tables, .. } => tables.len() * 2 + 16,
    }
}
