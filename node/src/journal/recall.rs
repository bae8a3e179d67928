//! The frames appended last, as they are in memory: readers that keep up need neither wait for the writer nor read the file.
//!
//! In:   frames, when they get their number      Out: the same, to cursors
//! Holds: all that is not written yet (the queue bounds that), and of what is written at most [`KEPT_BYTES`]
//! Invariants: 1. numbers are without gaps; 2. nothing goes before it is published in its segment, so what a cursor does not
//!        find here it finds there
//! On crash: gone with the process. A peer may then hold more of our stream than our journal: as after any crash of a machine
//! Not here: which of them concern a reader (`reader.rs`)

use std::collections::VecDeque;

use super::meta::Frame;

/// Of what is written, bytes.
const KEPT_BYTES: usize = 1024 * 1024;

/// The frames appended last.
pub(super) struct Recall {
    frames: VecDeque<Frame>,
    /// Number of the first of them.
    first: u64,
    /// All frames with a smaller number are published.
    written: u64,
    bytes: usize,
}

impl Recall {
    pub(super) const fn new(next_seq: u64) -> Self {
        Self {
            frames: VecDeque::new(),
            first: next_seq,
            written: next_seq,
            bytes: 0,
        }
    }

    /// Takes the next frame.
    pub(super) fn push(&mut self, frame: Frame) {
        self.bytes += frame.payload.len();
        self.frames.push_back(frame);
    }

    /// All frames with a smaller number can be read in the segments from now on.
    pub(super) fn note_written(&mut self, next_seq: u64) {
        self.written = next_seq;
        while self.bytes > KEPT_BYTES && self.first < self.written {
            let Some(frame) = self.frames.pop_front() else {
                break;
            };
            self.bytes -= frame.payload.len();
            self.first += 1;
        }
    }

    /// Number of the oldest frame here.
    pub(super) const fn first(&self) -> u64 {
        self.first
    }

    /// The frames from number `seq` on, with their numbers. To be asked for what is not before [`Self::first`].
    pub(super) fn from(&self, seq: u64) -> impl Iterator<Item = (u64, &Frame)> {
        let skip = usize::try_from(seq.saturating_sub(self.first)).unwrap_or(usize::MAX);
        (self.first..).zip(&self.frames).skip(skip)
    }

    /// Number of the next frame to come.
    pub(super) fn next_seq(&self) -> u64 {
        self.first + self.frames.len() as u64
    }
}
