//! Cursors: one reader's way through one origin's frames.
//!
//! In: the segments, up to what is written, and behind that the frames in memory. Out: the origin's frames, in order. Frames of
//! other origins are passed by their headers. Holds: a place and a read-ahead window; no segment is kept for a cursor.
//! Invariants: the frames handed out continue each other (`prev` is where the one before ended); a gap is
//! [`Error::Trimmed`], a wrong checksum [`Error::Corrupt`]. `next` loses nothing when it is dropped.
//! Not here: undoing the packing (`pack.rs`), assembling large transactions (the reader's).

use std::fmt;
use std::sync::Arc;

use anabranch_proto::{NodeId, Position};
use bytes::Bytes;
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
    next_seq: u64,
    place: Place,
}

/// Where a cursor looks for frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// In the segment that begins with this frame, at this byte.
    File { segment: u64, offset: u64 },
    /// In memory.
    Memory,
}

/// The next frame of a cursor, not passed yet.
enum Next {
    /// In the file, at this byte.
    File(Header, u64),
    /// In memory, with its number.
    Memory(Frame, u64),
}

impl Next {
    const fn meta(&self) -> &FrameMeta {
        match self {
            Self::File(header, _) => &header.meta,
            Self::Memory(frame, _) => &frame.meta,
        }
    }

    const fn seq(&self) -> u64 {
        match self {
            Self::File(header, _) => header.seq,
            Self::Memory(_, seq) => *seq,
        }
    }
}

/// Yields the frames of one origin, in order.
pub struct Cursor {
    shared: Arc<Shared>,
    appended: watch::Receiver<u64>,
    origin: NodeId,
    /// Everything up to here was handed out, or was had before.
    at: Position,
    /// The unfinished large transaction, if parts of one were handed out.
    run: Option<Run>,
    /// All frames with a smaller number were looked at, if they were met in their order.
    next_seq: u64,
    /// The next frame is looked for in memory, and the rest below means nothing.
    in_memory: bool,
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
        let place = locate(shared, origin, after)?;
        let state = CursorState {
            origin,
            at: after,
            run: None,
            next_seq: 0,
            place: Place::File {
                segment: place.0.first_seq,
                offset: place.1,
            },
        };
        Ok(Self::standing(shared, state, place))
    }

    /// A cursor where another one stood.
    pub(super) fn at(shared: &Arc<Shared>, state: CursorState) -> Result<Self, Error> {
        shared.check()?;
        let place = place_of(shared, &state)?;
        Ok(Self::standing(shared, state, place))
    }

    fn standing(shared: &Arc<Shared>, state: CursorState, (segment, offset): (Arc<Segment>, u64)) -> Self {
        Self {
            shared: Arc::clone(shared),
            appended: shared.appended.subscribe(state.origin),
            origin: state.origin,
            at: state.at,
            run: state.run,
            next_seq: state.next_seq,
            in_memory: state.place == Place::Memory,
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
        CursorState {
            origin: self.origin,
            at: self.at,
            run: self.run,
            next_seq: self.next_seq,
            place: if self.in_memory {
                Place::Memory
            } else {
                Place::File {
                    segment: self.segment.first_seq,
                    offset: self.offset,
                }
            },
        }
    }

    /// The next frame, as soon as it is appended. Nothing is lost when the future is dropped.
    ///
    /// # Errors
    /// [`Error::Trimmed`], [`Error::Corrupt`], [`Error::Io`]; [`Error::Poisoned`] and [`Error::Closed`] when no frame
    /// will come any more.
    pub async fn next(&mut self) -> Result<Located, Error> {
        loop {
            // Before looking: what is appended from here on wakes us.
            self.appended.mark_unchanged();
            if let Some(located) = self.try_next()? {
                return Ok(located);
            }
            if *self.shared.finished.borrow() {
                return Err(self.shared.stopped());
            }
            self.appended.changed().await.map_err(|_| Error::Closed)?;
        }
    }

    /// The next frame, or `None` if there is none yet.
    ///
    /// # Errors
    /// As for [`Self::next`].
    pub fn try_next(&mut self) -> Result<Option<Located>, Error> {
        let Some(next) = self.find()? else {
            return Ok(None);
        };
        let payload = match &next {
            Next::Memory(frame, _) => frame.payload.clone(),
            Next::File(header, offset) => {
                let Some(payload) = self.payload(header, *offset)? else {
                    // Removed while it was being read, although it was needed.
                    return Err(trimmed(&self.shared, self.origin, self.at));
                };
                if crc32c::crc32c(&payload) != header.payload_crc {
                    return Err(self.corrupt(*offset, "the frame payload's checksum is wrong"));
                }
                payload
            }
        };
        self.pass(&next)?;
        Ok(Some(Located {
            frame: Frame {
                meta: *next.meta(),
                payload,
            },
            seq: next.seq(),
        }))
    }

    /// As [`Self::try_next`], but a part of a large transaction is passed without reading its payload, and has none: all of them are
    /// passed before the transaction is of use.
    ///
    /// # Errors
    /// As for [`Self::next`].
    pub fn try_next_but_parts(&mut self) -> Result<Option<Located>, Error> {
        let part = self.find()?.filter(|next| next.meta().kind == FrameKind::Part);
        let Some(part) = part else {
            return self.try_next();
        };
        self.pass(&part)?;
        Ok(Some(Located {
            frame: Frame {
                meta: *part.meta(),
                payload: Bytes::new(),
            },
            seq: part.seq(),
        }))
    }

    /// The description of the next frame, passing it without reading its payload, or `None` if there is none yet.
    ///
    /// # Errors
    /// As for [`Self::next`].
    pub fn try_skim(&mut self) -> Result<Option<(FrameMeta, u64)>, Error> {
        let Some(next) = self.find()? else {
            return Ok(None);
        };
        self.pass(&next)?;
        Ok(Some((*next.meta(), next.seq())))
    }

    /// Where the transaction begins whose end is the next frame, if its parts lie before this cursor.
    pub(super) fn begins_after(&mut self) -> Result<Option<Position>, Error> {
        let next = self.find()?;
        Ok(next
            .as_ref()
            .map(Next::meta)
            .filter(|meta| meta.kind == FrameKind::End && self.run.is_none())
            .map(|meta| meta.prev))
    }

    /// Goes to the next frame that concerns this cursor, without passing it.
    fn find(&mut self) -> Result<Option<Next>, Error> {
        loop {
            self.shared.check()?;
            if self.in_memory {
                if let Some(next) = self.recall() {
                    return Ok(next);
                }
                self.leave_memory()?;
            }
            // In this order: nothing is published after the seal.
            let is_sealed = self.segment.is_sealed();
            let end = self.segment.written_end();
            if self.offset >= end {
                if !self.enter_memory(end) && is_sealed && !self.enter_next()? {
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
            let is_new = header.seq >= self.next_seq;
            if is_new && header.meta.origin == self.origin && self.concerns(&header.meta) {
                return Ok(Some(Next::File(header, self.offset)));
            }
            self.offset += header.disk_len();
        }
    }

    /// This segment was looked at up to its `end`. If nothing is published behind that, all that follows is in memory: true.
    fn enter_memory(&mut self, end: u64) -> bool {
        // No segment comes while we hold the index; nothing leaves the memory, published or not, while we hold that.
        let index = lock(&self.shared.index);
        let recall = lock(&self.shared.recall);
        let is_last = index.back().is_some_and(|last| Arc::ptr_eq(last, &self.segment));
        self.in_memory = is_last && self.segment.written_end() == end;
        if self.in_memory {
            self.next_seq = self.next_seq.max(recall.first());
            self.window.clear();
        }
        self.in_memory
    }

    /// What follows is in the segments, all of it.
    fn leave_memory(&mut self) -> Result<(), Error> {
        (self.segment, self.offset) = place_of(&self.shared, &self.save())?;
        self.in_memory = false;
        Ok(())
    }

    /// The next frame in memory that concerns this cursor, or that there is none yet; `None`: what follows was there once.
    fn recall(&mut self) -> Option<Option<Next>> {
        let recall = lock(&self.shared.recall);
        if self.next_seq < recall.first() {
            return None;
        }
        let concerns =
            |(_, frame): &(u64, &Frame)| frame.meta.origin == self.origin && self.concerns(&frame.meta);
        let found = recall.from(self.next_seq).find(concerns);
        let next = found.map(|(seq, frame)| Next::Memory(frame.clone(), seq));
        let passed = next.as_ref().map_or_else(|| recall.next_seq(), Next::seq);
        drop(recall);
        self.next_seq = passed;
        Some(next)
    }

    /// Is this frame of our origin news for us?
    fn concerns(&self, meta: &FrameMeta) -> bool {
        match meta.kind {
            FrameKind::Part => meta.prev >= self.at,
            FrameKind::Whole | FrameKind::End => meta.last > self.at,
        }
    }

    /// Moves behind a frame, if it continues what was handed out.
    fn pass(&mut self, next: &Next) -> Result<(), Error> {
        let meta = next.meta();
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
        self.next_seq = next.seq() + 1;
        if let Next::File(header, offset) = next {
            self.offset = offset + header.disk_len();
        }
        Ok(())
    }

    fn payload(&mut self, header: &Header, offset: u64) -> Result<Option<Bytes>, Error> {
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
            let last = index.back().ok_or(Error::Closed)?;
            index.range(from..).find_map(|segment| {
                let is_left = !Arc::ptr_eq(segment, last);
                let offset = place(segment, self.origin, |held| Some(held.first_offset), is_left)?;
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

/// The place in the segments of a cursor that stood so, or one before it.
fn place_of(shared: &Shared, state: &CursorState) -> Result<(Arc<Segment>, u64), Error> {
    let found = {
        let index = lock(&shared.index);
        match state.place {
            Place::File { segment, offset } => {
                let found = index.iter().find(|it| it.first_seq == segment);
                found.map(|segment| (Arc::clone(segment), offset))
            }
            // In the last segment if the next frame is not written yet.
            Place::Memory => {
                let after = index.partition_point(|segment| segment.first_seq <= state.next_seq);
                let segment = after.checked_sub(1).and_then(|at| index.get(at));
                segment.map(|segment| (Arc::clone(segment), segment.near(state.next_seq)))
            }
        }
    };
    match found {
        Some(place) => Ok(place),
        None if state.run.is_none() => locate(shared, state.origin, state.at),
        None => Err(trimmed(shared, state.origin, state.at)),
    }
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
