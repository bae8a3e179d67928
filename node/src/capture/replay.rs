//! Replay: echoes met again after a restart bring their transactions from the journal into the index, at
//! their place in the WAL.

use std::sync::Arc;

use anabranch_proto::txn::TxnHeader;
use anabranch_proto::{Lsn, NodeId, Position, Vector};

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

    /// Meets a piece of an echo: `origin` is applied up to `position`, as of `lsn`. False once all of it is met. Piece by piece,
    /// since a transaction may have millions of rows, and the server wants to hear from us meanwhile.
    pub(super) fn step(
        &mut self,
        shared: &Arc<Shared>,
        origin: NodeId,
        position: Position,
        lsn: Lsn,
    ) -> Result<bool, Error> {
        let (header, mut pieces) = match self.open.take() {
            Some(open) => open,
            None => match self.next(origin, position)? {
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
        let mut knows = header.deps.clone();
        knows.raise(origin, header.position);
        shared.hear([header.stamp]);
        lock(&shared.stability).observe(origin, &knows);
        Ok(true)
    }

    /// The next transaction of `origin` that is not above `position`.
    fn next(&mut self, origin: NodeId, position: Position) -> Result<Option<(TxnHeader, Pieces)>, Error> {
        let Some(feed) = self.feeds.iter_mut().find(|feed| feed.origin == origin) else {
            return Ok(None);
        };
        match feed.peek().map_err(failed)? {
            Some(head) if head.header().position <= position => {}
            _ => return Ok(None),
        }
        let Some(head) = feed.take() else { return Ok(None) };
        let header = head.header().clone();
        Ok(Some((header, Pieces::of_head(&self.journal, head)?)))
    }
}

fn failed(error: impl std::fmt::Display) -> Error {
    Error::Replay(error.to_string())
}
