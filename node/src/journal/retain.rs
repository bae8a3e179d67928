//! Deletes segments whose every frame is stable, oldest first, so that the space comes back.
//!
//! In: the stable vector (design section 6). Out: fewer files. Parts count by the position of their transaction: they
//! stay until its end has come and is stable.
//! Invariants: 1. the last segment is never deleted: it carries the next number and every origin's end; 2. a name is
//! durably gone before the next goes, so that no crash leaves a hole; 3. the active segment is sealed by the writer
//! alone, here it is only asked for. On crash: the rest goes at the next call. Not here: what is stable.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use anabranch_proto::Vector;

use super::error::Error;
use super::segment::Segment;
use super::shared::{Shared, lock};

/// An active segment is sealed once it is stable and this share of a segment is used.
const ROTATE_SHARE: u64 = 4;

/// What a call gave back.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Reclaimed {
    /// Files deleted.
    pub segments: u64,
    /// Their length, bytes.
    pub bytes: u64,
}

/// Deletes what `stable` covers, once `before` has succeeded.
pub(super) fn retain(
    shared: &Shared,
    stable: &Vector,
    before: impl FnOnce() -> std::io::Result<()>,
) -> Result<Reclaimed, Error> {
    let _turn = lock(&shared.trimming);
    let mut before = Some(before);
    let mut reclaimed = Reclaimed::default();
    loop {
        shared.check()?;
        if lock(&shared.queue).closing {
            // The folder may be another life's in a moment.
            return Ok(reclaimed);
        }
        let (oldest, is_last) = {
            let index = lock(&shared.index);
            let Some(oldest) = index.front() else {
                return Ok(reclaimed);
            };
            (Arc::clone(oldest), index.len() == 1)
        };
        // Sealed first: what a sealed segment holds changes no more.
        let is_sealed = oldest.is_sealed();
        if !oldest.is_covered(stable) {
            return Ok(reclaimed);
        }
        if is_last || !is_sealed {
            ask_to_seal(shared, &oldest);
            return Ok(reclaimed);
        }
        if let Some(before) = before.take() {
            before().map_err(|error| Error::io("prepare to remove", &oldest.path, error))?;
        }
        let bytes = oldest.disk_len.load(Ordering::Relaxed);
        remove(shared, &oldest)?;
        reclaimed.segments += 1;
        reclaimed.bytes += bytes;
    }
}

fn remove(shared: &Shared, oldest: &Arc<Segment>) -> Result<(), Error> {
    oldest.mark_removed();
    shared
        .disk
        .remove(&oldest.path)
        .map_err(|error| Error::io("remove", &oldest.path, error))?;
    lock(&shared.index).pop_front();
    shared
        .disk_bytes
        .fetch_sub(oldest.disk_len.load(Ordering::Relaxed), Ordering::Relaxed);
    if let Err(error) = shared.disk.sync_dir(&shared.options.dir) {
        let error = Error::io("make durable", &shared.options.dir, error);
        shared.poison(error.to_string());
        return Err(error);
    }
    tracing::debug!(file = %oldest.path.display(), "deleted a stable journal file");
    shared.space.notify_all();
    Ok(())
}

/// Asks the writer to seal the active segment if enough of it is used; the next call deletes it.
fn ask_to_seal(shared: &Shared, active: &Segment) {
    let used = active.written_end().saturating_sub(active.header_len);
    if active.is_sealed() || used < shared.options.segment_bytes / ROTATE_SHARE {
        return;
    }
    let mut queue = lock(&shared.queue);
    queue.rotate = Some(active.first_seq);
    if queue.writer_waits {
        shared.ready.notify_one();
    }
}
