//! What the frames so far say of every origin: how far its stream is complete, and which parts wait for their end.
//!
//! In: every frame in order, from recovery and then from the writer. Invariants: a frame that does not continue its
//! origin's stream is refused (`Tails::admit`) before it gets a number. Not here: conflict or apply state.

use std::collections::HashMap;
use std::sync::Arc;

use anabranch_proto::{NodeId, Position, Vector};

use super::error::Error;
use super::meta::{FrameKind, FrameMeta};
use super::segment::Segment;

/// A run of parts and the number of the next one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) run: u64,
    pub(super) next: u32,
}

impl Run {
    /// The run after a part, or `None` if the part does not continue `before`. Part 0 always begins anew.
    pub(super) fn after(before: Option<Self>, meta: &FrameMeta) -> Option<Self> {
        let next = meta.part.checked_add(1)?;
        let continues = meta.part == 0
            || before
                == Some(Self {
                    run: meta.part_run,
                    next: meta.part,
                });
        continues.then_some(Self {
            run: meta.part_run,
            next,
        })
    }
}

/// The end of every origin's stream, as far as it was appended.
#[derive(Debug, Clone, Default)]
pub(super) struct Tails {
    complete: Vector,
    runs: HashMap<NodeId, Run>,
}

impl Tails {
    pub(super) fn new(complete: Vector) -> Self {
        Self {
            complete,
            runs: HashMap::new(),
        }
    }

    /// Last complete position per origin.
    pub(super) fn complete(&self) -> &Vector {
        &self.complete
    }

    /// Checks that a frame continues its origin's stream, and notes it.
    pub(super) fn admit(&mut self, meta: &FrameMeta) -> Result<(), Error> {
        let origin = meta.origin;
        let bad = |what: String| Error::BadFrame { origin, what };
        let have = self.complete.get(origin);
        // An origin that lost the unsynced end of its journal packs those transactions anew, with other frame borders:
        // what is held may then end inside a frame. Readers skip what they have.
        let overlaps = meta.kind == FrameKind::Whole && meta.prev < have && meta.last > have;
        // The first frame of an origin may begin anywhere: a joining node begins at its snapshot.
        if meta.prev != have && !overlaps && have != Position::ZERO {
            return Err(Error::OutOfOrder {
                origin,
                have,
                prev: meta.prev,
            });
        }
        match meta.kind {
            FrameKind::Part if meta.last != meta.prev => {
                return Err(bad(format!(
                    "a part ends at {}, not where it begins, {}",
                    meta.last, meta.prev
                )));
            }
            FrameKind::Whole | FrameKind::End if meta.last <= meta.prev => {
                return Err(bad(format!("it ends at {}, not after {}", meta.last, meta.prev)));
            }
            FrameKind::Whole => {}
            FrameKind::Part | FrameKind::End => {
                let run = Run::after(self.runs.get(&origin).copied(), meta).ok_or_else(|| {
                    bad(format!(
                        "part {} of run {} has no predecessor",
                        meta.part, meta.part_run
                    ))
                })?;
                self.runs.insert(origin, run);
            }
        }
        self.note(meta);
        Ok(())
    }

    /// Notes a frame that was admitted when it was appended.
    pub(super) fn note(&mut self, meta: &FrameMeta) {
        if meta.kind == FrameKind::Part {
            self.runs.insert(
                meta.origin,
                Run {
                    run: meta.part_run,
                    next: meta.part.saturating_add(1),
                },
            );
        } else {
            self.complete.raise(meta.origin, meta.last);
            self.runs.remove(&meta.origin);
        }
    }
}

/// Segments that hold parts whose end has not come, per origin.
#[derive(Debug, Default)]
pub(super) struct OpenParts(HashMap<NodeId, Vec<Arc<Segment>>>);

impl OpenParts {
    /// Notes a frame at `offset` of `segment`, there and here. Call before publishing it.
    pub(super) fn note(&mut self, segment: &Arc<Segment>, meta: &FrameMeta, offset: u64) {
        segment.note(meta, offset);
        if meta.kind == FrameKind::Part {
            let open = self.0.entry(meta.origin).or_default();
            if !open.last().is_some_and(|last| Arc::ptr_eq(last, segment)) {
                open.push(Arc::clone(segment));
            }
        } else if let Some(open) = self.0.remove(&meta.origin) {
            // Also when this is not the end of those parts: their writing was given up, and this came in its place.
            for segment in open {
                segment.resolve_parts(meta.origin, meta.last);
            }
        }
    }
}
