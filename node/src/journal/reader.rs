//! Cursors: one reader's way through one origin's frames.
//!
//! In: the segments, up to what is written. Out: the origin's frames, in order. Frames of other origins are passed by
//! their headers. Holds: a place and a read-ahead window; no segment is kept for a cursor.
//! Invariants: the frames handed out continue each other (`prev` is where the one before ended); a gap is
//! [`Error::Trimmed`], a wrong checksum [`Error::Corrupt`]. `next` loses nothing when it is dropped.
//! Not here: undoing the packing (`pack.rs`), assembling large transactions (the reader's).

use std::fmt;
use std::sync::Arc;

use anabranch_proto::{NodeId, Position};
use tokio::sync::watch;

use super::error::Error;
use super::frame::{HEADER_LEN, Header};
use super::ledger::Run;
use super::meta::{Frame, FrameKind, FrameMeta};
use super::segment::Segment;
use super::shared::{Shared, lock};
use super::window::Window;

/// A frame and its number.
#[derive(Debug, Clone)]
pub struct Located {
    /// The frame.
    pub frame: Frame,
    /// Its number in the journal; durable once `Journal::durable` is larger.
    pub seq: u64,
}

/// Where a cursor stands, just before the next frame. Only for the journal that it came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CursorState {
    origin: NodeId,
    at: Position,
    run: Option<Run>,
    segment: u64,
    offset: u64,
}

/// Yields the frames of one origin, in order.
pub struct Cursor {
    shared: Arc<Shared>,
    written: watch::Receiver<u64>,
    origin: NodeId,
    /// Everything up to here was handed out, or was had before.
    at: Position,
    /// The unfinished large transaction, if parts of one were handed out.
    run: Option<Run>,
    segment: Arc<Segment>,
    offset: u64,
    window: Window,
}

impl fmt::Debug for Cursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cursor")
            .field("state", &self.save())
            .finish_non_exhaustive()
    }
}

impl Cursor {
    /// A cursor before the first frame of `origin` that ends after `after`, or that is part of such a transaction.
    pub(super) fn new(shared: &Arc<Shared>, origin: NodeId, after: Position) -> Result<Self, Error> {
        shared.check()?;
        let (segment, offset) = locate(shared, origin, after)?;
        Ok(Self::standing(
            shared,
            CursorState {
                origin,
                at: after,
                run: None,
                segment: 0,
                offset,
            },
            segment,
        ))
    }

    /// A cursor where another one stood.
    pub(super) fn at(shared: &Arc<Shared>, state: CursorState) -> Result<Self, Error> {
        shared.check()?;
        let found = {
            let index = lock(&shared.index);
            index
                .iter()
                .find(|segment| segment.first_seq == state.segment)
                .map(Arc::clone)
        };
        match found {
            Some(segment) => Ok(Self::standing(shared, state, segment)),
            None if state.run.is_none() => Self::new(shared, state.origin, state.at),
            None => Err(trimmed(shared, state.origin, state.at)),
        }
    }

    fn standing(shared: &Arc<Shared>, state: CursorState, segment: Arc<Segment>) -> Self {
        let CursorState {
            origin,
            at,
            run,
            offset,
            ..
        } = state;
        let written = shared.written.subscribe();
        Self {
            shared: Arc::clone(shared),
            written,
            origin,
            at,
            run,
            segment,
            offset,
            window: Window::default(),
        }
    }

    /// Whose frames these are.
    #[must_use]
    pub fn origin(&self) -> NodeId {
        self.origin
    }

    /// Everything up to here was handed out, or lay before the cursor's start.
    #[must_use]
    pub fn position(&self) -> Position {
        self.at
    }

    /// The place before the next frame, for `Journal::cursor_at`.
    #[must_use]
    pub fn save(&self) -> CursorState {
        let (origin, at, run, offset) = (self.origin, self.at, self.run, self.offset);
        CursorState {
            origin,
            at,
            run,
            segment: self.segment.first_seq,
            offset,
        }
    }

    /// The next frame, as soon as it is written. Nothing is lost when the future is dropped.
    ///
    /// # Errors
    /// [`Error::Trimmed`], [`Error::Corrupt`], [`Error::Io`]; [`Error::Poisoned`] and [`Error::Closed`] when no frame
    /// will come any more.
    pub async fn next(&mut self) -> Result<Located, Error> {
        loop {
            // Before looking: what is written from here on wakes us.
            self.written.mark_unchanged();
            if let Some(located) = self.try_next()? {
                return Ok(located);
            }
            if *self.shared.finished.borrow() {
                return Err(self.shared.stopped());
            }
            self.written.changed().await.map_err(|_| Error::Closed)?;
        }
    }

    /// The next frame, or `None` if no more is written yet.
    ///
    /// # Errors
    /// As for [`Self::next`].
    pub fn try_next(&mut self) -> Result<Option<Located>, Error> {
        let Some((header, offset)) = self.find()? else {
            return Ok(None);
        };
        let Some(payload) = self.payload(&header, offset)? else {
            // Removed while it was being read, although it was needed.
            return Err(trimmed(&self.shared, self.origin, self.at));
        };
        if crc32c::crc32c(&payload) != header.payload_crc {
            return Err(self.corrupt(offset, "the frame payload's checksum is wrong"));
        }
        self.pass(&header, offset)?;
        Ok(Some(Located {
            frame: Frame {
                meta: header.meta,
                payload,
            },
            seq: header.seq,
        }))
    }

    /// The description of the next frame, passing it without reading its payload, or `None` if no more is written.
    ///
    /// # Errors
    /// As for [`Self::next`].
    pub fn try_skim(&mut self) -> Result<Option<(FrameMeta, u64)>, Error> {
        let Some((header, offset)) = self.find()? else {
            return Ok(None);
        };
        self.pass(&header, offset)?;
        Ok(Some((header.meta, header.seq)))
    }

    /// Where the transaction begins whose end is the next frame, if its parts lie before this cursor.
    pub(super) fn begins_after(&mut self) -> Result<Option<Position>, Error> {
        let next = self.find()?;
        Ok(next
            .filter(|(header, _)| header.meta.kind == FrameKind::End && self.run.is_none())
            .map(|(header, _)| header.meta.prev))
    }

    /// Goes to the next frame that concerns this cursor, without passing it.
    fn find(&mut self) -> Result<Option<(Header, u64)>, Error> {
        loop {
            self.shared.check()?;
            // In this order: nothing is published after the seal.
            let is_sealed = self.segment.is_sealed();
            let end = self.segment.written_end();
            if self.offset >= end {
                if !is_sealed || !self.enter_next()? {
                    return Ok(None);
                }
                continue;
            }
            let Some(file) = self.file()? else {
                if !self.leave_removed()? {
                    return Ok(None);
                }
                continue;
            };
            let bytes = self
                .window
                .view(&*file, self.offset, HEADER_LEN, end)
                .map_err(|error| Error::io("read", &self.segment.path, error))?;
            let header = bytes.map(|bytes| Header::decode(bytes, self.segment.seed));
            let header = match header {
                Some(Ok(header)) if end - self.offset >= header.disk_len() => header,
                Some(Err(flaw)) => return Err(self.corrupt(self.offset, &flaw.to_string())),
                _ => return Err(self.corrupt(self.offset, "the file is cut off")),
            };
            if header.meta.origin == self.origin && self.concerns(&header.meta) {
                return Ok(Some((header, self.offset)));
            }
            self.offset += header.disk_len();
        }
    }

    /// Is this frame of our origin news for us?
    fn concerns(&self, meta: &FrameMeta) -> bool {
        match meta.kind {
            FrameKind::Part => meta.prev >= self.at,
            FrameKind::Whole | FrameKind::End => meta.last > self.at,
        }
    }

    /// Moves behind the frame at `offset`, if it continues what was handed out.
    fn pass(&mut self, header: &Header, offset: u64) -> Result<(), Error> {
        let meta = &header.meta;
        let gap = || Error::Trimmed {
            origin: self.origin,
            after: self.at,
            oldest: meta.prev,
        };
        if meta.prev > self.at {
            return Err(gap());
        }
        let run = match meta.kind {
            FrameKind::Whole => None,
            FrameKind::Part | FrameKind::End => Some(Run::after(self.run, meta).ok_or_else(gap)?),
        };
        if meta.kind == FrameKind::Part {
            self.run = run;
        } else {
            self.run = None;
            self.at = meta.last;
        }
        self.offset = offset + header.disk_len();
        Ok(())
    }

    fn payload(&mut self, header: &Header, offset: u64) -> Result<Option<bytes::Bytes>, Error> {
        let Some(file) = self.file()? else { return Ok(None) };
        let len = usize::try_from(header.payload_len).unwrap_or(usize::MAX);
        let end = self.segment.written_end();
        self.window
            .take(&*file, offset + HEADER_LEN as u64, len, end)
            .map_err(|error| Error::io("read", &self.segment.path, error))?
            .map(Some)
            .ok_or_else(|| self.corrupt(offset, "the file is cut off"))
    }

    fn file(&self) -> Result<Option<Arc<dyn super::disk::DiskFile>>, Error> {
        self.segment
            .file(&*self.shared.disk)
            .map_err(|error| Error::io("open", &self.segment.path, error))
    }

    fn corrupt(&self, offset: u64, what: &str) -> Error {
        Error::corrupt(&self.segment.path, offset, what)
    }

    /// Goes to the next segment that may concern us. False if there is none yet.
    fn enter_next(&mut self) -> Result<bool, Error> {
        let target = {
            let index = lock(&self.shared.index);
            let from = index.partition_point(|segment| segment.first_seq <= self.segment.first_seq);
            index.range(from..).find_map(|segment| {
                let is_sealed = segment.is_sealed();
                let offset = place(segment, self.origin, |held| Some(held.first_offset), is_sealed)?;
                Some((Arc::clone(segment), offset))
            })
        };
        let Some((segment, offset)) = target else {
            return Ok(false);
        };
        if segment.base.get(self.origin) > self.at {
            return Err(trimmed(&self.shared, self.origin, self.at));
        }
        self.segment.close_file();
        self.segment = segment;
        self.offset = offset;
        self.window.clear();
        Ok(true)
    }

    /// The segment that we stand in was deleted: fine if nothing in it was for us. As [`Self::enter_next`].
    fn leave_removed(&mut self) -> Result<bool, Error> {
        let was_needed = self
            .segment
            .held(self.origin)
            .is_some_and(|held| held.concerns(self.at));
        if was_needed || self.run.is_some() {
            return Err(trimmed(&self.shared, self.origin, self.at));
        }
        self.enter_next()
    }
}

/// Where to start in a segment: at `choose` of what it holds of `origin`; if it holds nothing of it, at the end of what
/// is written, or not at all (`None`) if nothing will come.
fn place(
    segment: &Segment,
    origin: NodeId,
    choose: impl FnOnce(super::segment::Held) -> Option<u64>,
    is_sealed: bool,
) -> Option<u64> {
    // In this order: all that is below `end` is in `held`.
    let end = segment.written_end();
    match segment.held(origin).and_then(choose) {
        None if is_sealed => None,
        None => Some(end),
        offset => offset,
    }
}

/// The first place where there may be something of `origin` after `after`.
fn locate(shared: &Shared, origin: NodeId, after: Position) -> Result<(Arc<Segment>, u64), Error> {
    let index = lock(&shared.index);
    let oldest = index
        .iter()
        .find_map(|segment| segment.held(origin))
        .map(|held| held.starts_after)
        .or_else(|| index.back().map(|segment| segment.base.get(origin)))
        .unwrap_or_default();
    if oldest > after {
        return Err(Error::Trimmed {
            origin,
            after,
            oldest,
        });
    }
    let last = index.back().ok_or(Error::Closed)?;
    index
        .iter()
        .find_map(|segment| {
            // The last one takes cursors at its end even when it is sealed and its successor is being made.
            let is_left = !Arc::ptr_eq(segment, last);
            let choose = |held: super::segment::Held| held.concerns(after).then_some(held.first_offset);
            Some((Arc::clone(segment), place(segment, origin, choose, is_left)?))
        })
        .ok_or(Error::Closed)
}

/// [`Error::Trimmed`] for a reader that has everything up to `after`.
fn trimmed(shared: &Shared, origin: NodeId, after: Position) -> Error {
    let oldest = lock(&shared.index)
        .front()
        .map(|segment| segment.base.get(origin))
        .unwrap_or_default();
    Error::Trimmed {
        origin,
        after,
        oldest,
    }
}
