//! Feedback: how far the server may take its slot, and what it is told.
//!
//! In:   the journal's durable end, findings that wait, the peers' quorum      Out: status updates
//! Invariants: the slot is confirmed only to ends of own frames that are durable, and not past a finding that is not
//!        recorded
//! On crash: the slot is where it was last confirmed
//! Not here: the wire (`crate::source`)

use std::time::Duration;

use anabranch_proto::Lsn;
use tokio::time::Instant;

use super::{Capture, Error, Pending, checkpoint};
use crate::shared::lock;
use crate::small_file::off_runtime;
use crate::source::ReplyWanted;

/// Least time between two reports to the server that no commit waits for: each wakes the walsender.
const FEEDBACK_GAP: Duration = Duration::from_millis(20);

impl Capture {
    /// The server asks whether we have everything: one that shuts down waits until we say so. Beyond the last
    /// own frame lie only echoes; with a checkpoint of the fold they need not be decoded again.
    pub(super) async fn confirm_idle(&mut self, wal_end: Lsn) -> Result<(), Error> {
        self.flush().await?;
        self.feedback(ReplyWanted::No).await?;
        if !self.pending.is_empty()
            || wal_end <= self.confirmed
            || lock(&self.shared.resolver).found_from().is_some()
        {
            return Ok(());
        }
        let (dir, at) = (&self.config.node.data_dir, self.timelines.position(wal_end));
        off_runtime(|| checkpoint::write(dir, at, &self.fold)).map_err(Error::Checkpoint)?;
        self.confirmed = wal_end;
        lock(&self.shared.checkpoint).join(self.fold.vector());
        self.feedback(ReplyWanted::No).await
    }

    /// Reports positions: at once where a commit may wait for them, else not more often than [`FEEDBACK_GAP`].
    pub(super) async fn feedback_soon(&mut self) -> Result<(), Error> {
        if self.is_waited_for() || Instant::now() >= self.feedback_due {
            return self.feedback(ReplyWanted::No).await;
        }
        self.owes_feedback = true;
        Ok(())
    }

    pub(super) async fn feedback(&mut self, reply: ReplyWanted) -> Result<(), Error> {
        (self.owes_feedback, self.feedback_due) = (false, Instant::now() + FEEDBACK_GAP);
        self.shared.progress.sent(self.source.sent_us());
        match self.source.stuck() {
            Some(text) => self.shared.alarms.raise("decoding", text),
            None => self.shared.alarms.clear("decoding"),
        }
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
        let (received, applied) = (self.source.received(), self.applied());
        Ok(self
            .source
            .feedback(received, self.confirmed, applied, reply)
            .await?)
    }

    /// In the middle of something that takes long: the server must hear from us, or it ends the connection
    /// (`wal_sender_timeout`). Nothing new is confirmed.
    pub(super) async fn still_here(&mut self) -> Result<(), Error> {
        self.shared.progress.sent(self.source.sent_us());
        let (received, confirmed, applied) = (self.source.received(), self.confirmed, self.applied());
        Ok(self
            .source
            .feedback(received, confirmed, applied, ReplyWanted::No)
            .await?)
    }

    /// What a commit under `remote_apply` is let go by: applied at a majority, and durable here. The server never takes it back.
    fn applied(&self) -> Lsn {
        Lsn(*self.shared.quorum_applied.borrow()).min(self.confirmed)
    }
}
