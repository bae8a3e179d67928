//! What was read of the journal last, within bounds.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use anabranch_proto::txn::TableCache;
use anabranch_proto::{NodeId, Position};

use super::frame::Frame;
use crate::journal::CursorState;

/// Decoded frames are kept up to so many bytes, and one whatever its size.
const FRAMES_BYTES_MAX: usize = 32 << 20;
/// So many frames are kept.
const FRAMES_MAX: usize = 128;
/// Places of so many transactions are kept.
const PLACES_MAX: usize = 16;
/// Of a transaction with more rows than this it is not known in which part which row is: 8 bytes each.
const ROWS_MAX: usize = 1 << 20;

/// The place of a transaction: the frame that holds its end.
#[derive(Debug, Clone)]
pub(super) struct Place {
    pub(super) state: CursorState,
    pub(super) seq: u64,
    /// The frame holds the transactions that end after here,
    pub(super) after: Position,
    /// and here or before.
    pub(super) upto: Position,
    /// The parts before it, of a large transaction.
    pub(super) parts: Option<Arc<[Part]>>,
}

/// A part of a large transaction.
#[derive(Debug)]
pub(super) struct Part {
    pub(super) state: CursorState,
    pub(super) seq: u64,
    /// The hashes of its rows, ascending, if they are known.
    hashes: Option<Box<[u64]>>,
}

impl Part {
    /// May it have the row?
    pub(super) fn has(&self, hash: u64) -> bool {
        self.hashes
            .as_ref()
            .is_none_or(|hashes| hashes.binary_search(&hash).is_ok())
    }
}

/// Collects the parts of a large transaction.
#[derive(Debug, Default)]
pub(super) struct Spread {
    parts: Vec<Part>,
    rows: usize,
}

impl Spread {
    pub(super) fn push(&mut self, state: CursorState, seq: u64, part: &Frame) {
        let hashes = (self.rows < ROWS_MAX).then(|| part.hashes());
        self.rows += hashes.as_ref().map_or(0, |hashes| hashes.len());
        self.parts.push(Part { state, seq, hashes });
    }

    pub(super) fn finish(self) -> Arc<[Part]> {
        self.parts.into()
    }
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Kept {
    /// The last used at the end: number in the journal, frame, bytes.
    frames: VecDeque<(u64, Arc<Frame>, usize)>,
    bytes: usize,
    places: VecDeque<(NodeId, Place)>,
    last: BTreeMap<NodeId, (Position, CursorState)>,
    pub(super) tables: TableCache,
    /// Of this node's own frames: see [`super::OwnTables`].
    pub(super) own_tables: TableCache,
}

impl Kept {
    pub(super) fn frame(&mut self, seq: u64) -> Option<Arc<Frame>> {
        let at = self.frames.iter().rposition(|(of, _, _)| *of == seq)?;
        let found = self.frames.remove(at)?;
        let frame = Arc::clone(&found.1);
        self.frames.push_back(found);
        Some(frame)
    }

    pub(super) fn keep_frame(&mut self, seq: u64, frame: Arc<Frame>, payload: usize) {
        let bytes = payload + frame.overhead();
        self.bytes += bytes;
        self.frames.push_back((seq, frame, bytes));
        while self.frames.len() > 1 && (self.bytes > FRAMES_BYTES_MAX || self.frames.len() > FRAMES_MAX) {
            self.bytes -= self.frames.pop_front().map_or(0, |(_, _, bytes)| bytes);
        }
    }

    pub(super) fn place(&mut self, origin: NodeId, position: Position) -> Option<Place> {
        let is_here =
            |(of, place): &(NodeId, Place)| *of == origin && place.after < position && position <= place.upto;
        let at = self.places.iter().rposition(is_here)?;
        let found = self.places.remove(at)?;
        let place = found.1.clone();
        self.places.push_back(found);
        Some(place)
    }

    pub(super) fn keep_place(&mut self, origin: NodeId, place: Place) {
        if place.parts.is_none() {
            self.last.insert(origin, (place.after, place.state));
        }
        self.places.push_back((origin, place));
        if self.places.len() > PLACES_MAX {
            self.places.pop_front();
        }
    }

    /// A place from which the transaction that ends at `position` may not be far.
    pub(super) fn near(&self, origin: NodeId, position: Position) -> Option<CursorState> {
        self.last
            .get(&origin)
            .filter(|(after, _)| *after < position)
            .map(|(_, state)| *state)
    }
}
