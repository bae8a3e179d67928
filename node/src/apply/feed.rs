//! Order: one origin's transactions, read from the journal, one at a time.
//!
//! In:   the journal's frames of an origin      Out: its next transaction, small or large
//! Holds: one unpacked frame
//! Invariants: positions only grow; a large transaction is offered only when its last piece is here
//! Not here: waiting for what a transaction depends on ([`super::Applier`])

use anabranch_proto::txn::{Changes, FrameReader, Record, TableCache, TxnHeader};
use anabranch_proto::{NodeId, Position, Vector};

use super::ddl::{Ddl, is_ddl};
use super::failure::Failure;
use crate::journal::{self, Cursor, CursorState, FrameKind, Journal};

/// The next transaction of an origin.
#[derive(Debug, Clone)]
pub(crate) enum Head {
    /// Its changes are at hand.
    Small(TxnHeader, Changes, u64),
    /// Its changes are read again from `from`.
    Large {
        header: TxnHeader,
        from: CursorState,
        seq: u64,
    },
}

impl Head {
    pub(crate) const fn header(&self) -> &TxnHeader {
        match self {
            Self::Small(header, ..) | Self::Large { header, .. } => header,
        }
    }

    /// Length of the changes that are at hand, bytes.
    pub(crate) const fn byte_len(&self) -> usize {
        match self {
            Self::Small(_, changes, _) => changes.byte_len(),
            Self::Large { .. } => 0,
        }
    }

    /// Does it bring DDL? Of a large one that is not known; it is applied alone anyway.
    pub(crate) fn has_ddl(&self) -> Result<bool, Failure> {
        let Self::Small(header, changes, _) = self else {
            return Ok(false);
        };
        if !changes.tables().any(|table| is_ddl(table)) {
            return Ok(false);
        }
        let mut changes = changes.clone();
        while let Some(change) = changes.next_change()? {
            if Ddl::of(&change, header)?.is_some() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// The frame that completes it: durable before the apply transaction commits.
    pub(crate) const fn seq(&self) -> u64 {
        match self {
            Self::Small(_, _, seq) | Self::Large { seq, .. } => *seq,
        }
    }
}

/// One origin's stream.
pub(crate) struct Feed {
    pub(crate) origin: NodeId,
    cursor: Cursor,
    frame: Option<(FrameReader, u64)>,
    head: Option<Head>,
    after: Position,
    large_from: Option<CursorState>,
    cache: TableCache,
}

impl Feed {
    pub(crate) fn new(journal: &Journal, origin: NodeId, after: Position) -> Result<Self, journal::Error> {
        let cursor = journal.cursor(origin, after)?;
        Ok(Self {
            origin,
            cursor,
            frame: None,
            head: None,
            after,
            large_from: None,
            cache: TableCache::default(),
        })
    }

    /// All that the journal holds of an origin, and what it begins after.
    pub(crate) fn oldest(journal: &Journal, origin: NodeId) -> Result<(Self, Position), journal::Error> {
        let after = journal.stats().oldest.get(origin);
        match Self::new(journal, origin, after) {
            // It has let go of more meanwhile.
            Err(journal::Error::Trimmed { oldest, .. }) => Ok((Self::new(journal, origin, oldest)?, oldest)),
            feed => Ok((feed?, after)),
        }
    }

    /// The next transaction, if it is here.
    pub(crate) fn peek(&mut self) -> Result<Option<&Head>, Failure> {
        while self.head.is_none() {
            if !self.advance()? {
                return Ok(None);
            }
        }
        Ok(self.head.as_ref())
    }

    /// Takes the transaction that [`Self::peek`] showed.
    pub(crate) fn take(&mut self) -> Option<Head> {
        let head = self.head.take()?;
        self.after = head.header().position;
        Some(head)
    }

    fn advance(&mut self) -> Result<bool, Failure> {
        if let Some((reader, seq)) = &mut self.frame {
            match reader.next_record()? {
                Some(Record::Txn(header, changes)) if header.position > self.after => {
                    self.head = Some(Head::Small(header, changes, *seq));
                }
                Some(_) => {}
                None => self.frame = None,
            }
            return Ok(true);
        }
        let before = self.cursor.save();
        let Some(located) = self.cursor.try_next_but_parts()? else {
            return Ok(false);
        };
        let meta = located.frame.meta;
        match meta.kind {
            FrameKind::Whole => {
                if meta.last > self.after {
                    let payload = journal::unpack(&located.frame)?;
                    let reader = FrameReader::new(self.origin, payload, &mut self.cache)?;
                    self.frame = Some((reader, located.seq));
                }
            }
            FrameKind::Part => {
                if meta.part == 0 {
                    self.large_from = Some(before);
                }
            }
            FrameKind::End => {
                let from = self.large_from.take().unwrap_or(before);
                if meta.last > self.after {
                    let payload = journal::unpack(&located.frame)?;
                    let mut reader = FrameReader::new(self.origin, payload, &mut self.cache)?;
                    if let Some(Record::Txn(header, _)) = reader.next_record()? {
                        self.head = Some(Head::Large {
                            header,
                            from,
                            seq: located.seq,
                        });
                    }
                }
            }
        }
        Ok(true)
    }
}

/// Is everything that a transaction depends on in `applied`, and of our own before `hidden`, the first that is not
/// visible here yet? A peer cannot have seen one of ours that we have not made.
pub(crate) fn deliverable(
    header: &TxnHeader,
    own: NodeId,
    applied: &Vector,
    hidden: Option<Position>,
) -> bool {
    if hidden.is_some_and(|hidden| header.deps.covers(own, hidden)) {
        return false;
    }
    header
        .deps
        .iter()
        .filter(|&(node, _)| node != header.origin() && node != own)
        .all(|(node, position)| applied.covers(node, position))
}

/// The changes of a transaction, piece by piece.
pub(crate) struct Pieces {
    /// A small transaction has one piece, at hand.
    small: Option<Changes>,
    large: Option<LargePieces>,
}

struct LargePieces {
    origin: NodeId,
    cursor: Cursor,
    cache: TableCache,
    done: bool,
}

impl Pieces {
    /// The pieces of a transaction that [`Feed`] offered.
    pub(crate) fn of_head(journal: &Journal, head: Head) -> Result<Self, journal::Error> {
        match head {
            Head::Small(_, changes, _) => Ok(Self {
                small: Some(changes),
                large: None,
            }),
            Head::Large { header, from, .. } => Self::large(journal, header.origin(), from),
        }
    }

    /// The pieces of a large transaction that begins at `from`.
    pub(crate) fn large(
        journal: &Journal,
        origin: NodeId,
        from: CursorState,
    ) -> Result<Self, journal::Error> {
        let cursor = journal.cursor_at(from)?;
        let large = LargePieces {
            origin,
            cursor,
            cache: TableCache::default(),
            done: false,
        };
        Ok(Self {
            small: None,
            large: Some(large),
        })
    }

    /// The next piece's changes; `None` after the last.
    pub(crate) fn next_piece(&mut self) -> Result<Option<Changes>, Failure> {
        if let Some(changes) = self.small.take() {
            return Ok(Some(changes));
        }
        match &mut self.large {
            Some(large) => large.next_piece(),
            None => Ok(None),
        }
    }
}

impl LargePieces {
    fn next_piece(&mut self) -> Result<Option<Changes>, Failure> {
        while !self.done {
            let Some(located) = self.cursor.try_next()? else {
                break;
            };
            let meta = located.frame.meta;
            if meta.kind == FrameKind::Whole {
                continue;
            }
            self.done = meta.kind == FrameKind::End;
            let payload = journal::unpack(&located.frame)?;
            let mut reader = FrameReader::new(self.origin, payload, &mut self.cache)?;
            if let Some(Record::Piece(changes) | Record::Txn(_, changes)) = reader.next_record()? {
                return Ok(Some(changes));
            }
        }
        Ok(None)
    }
}
