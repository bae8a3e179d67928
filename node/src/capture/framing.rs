//! Framing: closed transactions become frames, whole or in pieces, and go to the journal.
//!
//! In:   transactions of the fold      Out: own frames, each known as [`Pending`] until it is confirmed
//! Invariants: 1. a position is published as ours before its frame can be sent; 2. the server hears from us while the
//!        journal stalls; 3. what waits for a full journal waits before it is published or queued, and all behind it
//! On crash: what was not durable is decoded again
//! Not here: what a transaction is and how it is stamped (the parent module)

use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anabranch_proto::txn::TxnHeader;
use tokio::time::Instant;

use super::{Capture, Error, FRAME_BYTES, Open, Pending};
use crate::journal::{self, Frame, FrameKind, FrameMeta};
use crate::shared::{BACKLOG_GAP, BACKLOG_US, Visibility, lock};
use crate::source::ReplyWanted;

/// Where more frames than this wait to be confirmed, behind a finding that nobody can record for hours, say, they are confirmed two by two.
const PENDING_MAX: usize = 4_096;
/// Between two looks whether a journal that was full has room, and two reports to the server meanwhile.
const WAIT_LOOK: Duration = Duration::from_millis(250);

impl Capture {
    pub(super) async fn frame_txn(&mut self, header: &TxnHeader, open: &Open) -> Result<(), Error> {
        for change in &open.changes {
            self.builder.changes().push(change);
        }
        self.builder.end_txn(header);
        self.built = header.position;
        self.is_behind = self.source.sent_us().saturating_sub(header.commit_us) > BACKLOG_US;
        if open.pieces > 0 {
            self.append(FrameKind::End, open.pieces, open.run).await?;
        } else if self.builder.is_full(FRAME_BYTES) {
            self.flush().await?;
        }
        Ok(())
    }

    /// Writes what is open as a piece of a large transaction.
    pub(super) async fn piece(&mut self) -> Result<(), Error> {
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

    /// Do commits wait until peers have applied them?
    pub(super) fn is_waited_for(&self) -> bool {
        *self.shared.visibility.borrow() == Visibility::BeforeDependents
    }

    /// Do closed transactions wait for nothing but the gap between frames?
    pub(super) const fn is_gathering(&self) -> bool {
        self.builder.txn_count() > 0
    }

    /// A moment after a frame was made the next one grows: one transaction a frame when idle, many when there is a backlog.
    pub(super) async fn flush_if_due(&mut self) -> Result<(), Error> {
        if self.is_gathering() && Instant::now() >= self.frame_due {
            self.flush().await?;
        }
        Ok(())
    }

    /// Hands the closed transactions to the journal.
    pub(super) async fn flush(&mut self) -> Result<(), Error> {
        if self.builder.txn_count() == 0 {
            return Ok(());
        }
        let now = Instant::now();
        let gap = self.flow.gap_after(self.builder.txn_count(), now);
        self.frame_due = match self.is_waited_for() {
            true => now,
            false if self.is_behind => now + BACKLOG_GAP,
            false => now + gap,
        };
        self.append(FrameKind::Whole, 0, 0).await
    }

    async fn append(&mut self, kind: FrameKind, part: u32, part_run: u64) -> Result<(), Error> {
        // Not within a large transaction: what has begun is of use to nobody before its end.
        if part == 0 {
            self.wait_for_room().await?;
        }
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
        let frame = Frame { meta, payload };
        // Peers get them from memory: only the slot waits for our own frames to be durable, and with it what commits may wait for.
        let is_waited_for = *self.shared.visibility.borrow() != Visibility::Prompt;
        let journal = self.journal.clone();
        let append = async {
            match is_waited_for {
                true => journal.append(frame).await,
                false => journal.append_unhurried(frame).await,
            }
        };
        tokio::pin!(append);
        // While the journal stalls (disk full), the server must still hear from us.
        let seq = loop {
            tokio::select! {
                seq = &mut append => break seq?,
                () = tokio::time::sleep(Duration::from_secs(1)) => {
                    self.still_here().await?;
                }
            }
        };
        if kind != FrameKind::Part {
            self.framed = last;
            self.before_clock = self.clock();
            self.pending.push_back(Pending {
                end: last.lsn,
                seq,
                before: std::mem::replace(&mut self.before, self.fold.vector().clone()),
            });
            if self.pending.len() > PENDING_MAX {
                pair_up(&mut self.pending);
            }
        }
        Ok(())
    }

    /// Waits while the journal is full and upkeep does not let more of ours in. What was framed before counts meanwhile: peers
    /// and the slot hear of it.
    async fn wait_for_room(&mut self) -> Result<(), Error> {
        if self.journal.full().is_none() {
            return Ok(());
        }
        let mut decoded = false;
        loop {
            let again = self.own_until.has_changed().unwrap_or(false);
            let until = *self.own_until.borrow_and_update();
            // One frame more with every sending: peers shall hear something that was written after it.
            if again || self.framed.lsn.0 < until || self.journal.full().is_none() {
                break;
            }
            self.shared.own_waits.store(true, Ordering::Relaxed);
            if !std::mem::replace(&mut decoded, true) {
                self.raise_decoded(self.reached);
                let framed = self.framed.lsn.0.min(*self.shared.decoded.borrow());
                self.publish((&self.before, self.before_clock), framed);
            }
            if lock(&self.shared.resolver).has_found() {
                self.shared.found.notify_one();
            }
            tokio::select! {
                _ = self.own_until.changed() => {
                    // Seen above.
                    self.own_until.mark_changed();
                }
                () = tokio::time::sleep(WAIT_LOOK) => self.feedback(ReplyWanted::No).await?,
            }
        }
        self.shared.own_waits.store(false, Ordering::Relaxed);
        Ok(())
    }
}

/// Makes one of each two neighbours: it is ready when the second is, and was begun when the first was. Not of the first of all: made
/// longer again and again it would never be ready while decoding goes on.
fn pair_up(pending: &mut VecDeque<Pending>) {
    let mut frames = std::mem::take(pending).into_iter();
    pending.extend(frames.next());
    while let Some(first) = frames.next() {
        pending.push_back(match frames.next() {
            Some(second) => Pending {
                before: first.before,
                ..second
            },
            None => first,
        });
    }
}

#[cfg(test)]
mod tests {
    use anabranch_proto::{Lsn, NodeId, Position, Vector};

    use super::*;

    #[test]
    fn frames_that_are_confirmed_two_by_two_are_so_no_sooner_and_the_last_is_not_lost() {
        let frame = |at: u64| {
            let before = [(NodeId(1), Position::new(1, at))];
            Pending {
                end: Lsn(at * 10),
                seq: at,
                before: before.into_iter().collect(),
            }
        };
        let told = |pending: &VecDeque<Pending>| -> Vec<(u64, u64, Vector)> {
            let each = pending.iter();
            each.map(|it| (it.end.0, it.seq, it.before.clone())).collect()
        };
        for (count, expected) in [
            (4_u64, vec![(1, 1), (2, 3), (4, 4)]),
            (5, vec![(1, 1), (2, 3), (4, 5)]),
        ] {
            let mut pending: VecDeque<Pending> = (1..=count).map(frame).collect();
            pair_up(&mut pending);
            let expected: Vec<(u64, u64, Vector)> = expected
                .into_iter()
                .map(|(first, last)| (last * 10, last, frame(first).before))
                .collect();
            assert_eq!(told(&pending), expected);
        }
    }
}
