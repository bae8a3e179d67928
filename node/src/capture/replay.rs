//! Replay: echoes met again after a restart bring their transactions from the journal into the index, at
//! their place in the WAL, those of one echo in the order of their stamps: what is covered by another comes before it, whose
//! ever they are.

use std::sync::Arc;

use anabranch_proto::txn::TxnHeader;
use anabranch_proto::{Lsn, NodeId, Position, Stamp, Vector};

use super::Error;
use crate::apply::feed::{Feed, Pieces};
use crate::journal::{self, Journal};
use crate::shared::{Shared, lock};

/// What is replayed until decoding has passed every apply transaction of earlier runs.
pub struct Replay {
    journal: Journal,
    feeds: Vec<Feed>,
    until: u64,
    /// The transaction that is being met, of which pieces are left.
    open: Option<(TxnHeader, Pieces)>,
}

impl Replay {
    /// A replay of what `peers` sent after `from`; every echo lies below the WAL position `until`.
    ///
    /// # Errors
    /// When the journal does not hold it.
    pub fn new(journal: &Journal, peers: &[NodeId], from: &Vector, until: u64) -> Result<Self, Error> {
        let feeds = peers
            .iter()
            .map(|&origin| match Feed::new(journal, origin, from.get(origin)) {
                // The slot went back, with its server: what is gone is settled.
                Err(journal::Error::Trimmed { oldest, .. }) => Feed::new(journal, origin, oldest),
                feed => feed,
            })
            .collect::<Result<_, _>>()?;
        Ok(Self {
            journal: journal.clone(),
            feeds,
            until,
            open: None,
        })
    }

    /// Where it ends, a WAL position.
    #[must_use]
    pub const fn until(&self) -> u64 {
        self.until
    }

    /// Meets a piece of an echo: the `progress` that it made, as of `lsn`. False once all of it is met. Piece by piece,
    /// since a transaction may have millions of rows, and the server wants to hear from us meanwhile.
    pub(super) fn step(
        &mut self,
        shared: &Arc<Shared>,
        progress: &[(NodeId, Position, Stamp)],
        lsn: Lsn,
    ) -> Result<bool, Error> {
        let (header, mut pieces) = match self.open.take() {
            Some(open) => open,
            None => match self.next(progress)? {
                Some((header, pieces)) => {
                    lock(&shared.recent).insert(&header);
                    (header, pieces)
                }
                None => return Ok(false),
            },
        };
        if let Some(mut piece) = pieces.next_piece().map_err(failed)? {
            let mut resolver = lock(&shared.resolver);
            while let Some(change) = piece.next_change()? {
                resolver.replay(&change, (header.stamp, header.position), &header.deps, lsn)?;
            }
            self.open = Some((header, pieces));
            return Ok(true);
        }
        lock(&shared.resolver).history_end(&header.deps, Some(lsn))?;
        let (origin, mut knows) = (header.origin(), header.deps.clone());
        knows.raise(origin, header.position);
        shared.hear([header.stamp]);
        lock(&shared.stability).observe(origin, &knows);
        Ok(true)
    }

    /// The next transaction that is not above what is applied of its origin.
    fn next(&mut self, progress: &[(NodeId, Position, Stamp)]) -> Result<Option<(TxnHeader, Pieces)>, Error> {
        let mut next: Option<(Stamp, &mut Feed)> = None;
        for feed in &mut self.feeds {
            let of = progress.iter().filter(|(origin, ..)| *origin == feed.origin);
            let Some(upto) = of.map(|(_, position, _)| *position).max() else {
                continue;
            };
            let stamp = match feed.peek().map_err(failed)? {
                Some(head) if head.header().position <= upto => head.header().stamp,
                _ => continue,
            };
            if next.as_ref().is_none_or(|(lowest, _)| stamp < *lowest) {
                next = Some((stamp, feed));
            }
        }
        let Some(head) = next.and_then(|(_, feed)| feed.take()) else {
            return Ok(None);
        };
        let header = head.header().clone();
        Ok(Some((header, Pieces::of_head(&self.journal, head)?)))
    }
}

fn failed(error: impl std::fmt::Display) -> Error {
    Error::Replay(error.to_string())
}
