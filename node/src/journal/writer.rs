//! The one thread that writes the journal.
//!
//! In: frames from the queue, in order. Out: `written` (readers may read them from the page cache, if they had not had them
//! from memory before), then `durable`.
//! Each turn takes everything that is ready and writes it. What somebody waits for is made durable with one `fdatasync` then and
//! there, with all that is written before it; what nobody waits for shares the next one, which comes soon
//! (`Options::sync_within`). The place of small groups is prepared ([`PREPARED_BYTES`]).
//! Invariants: 1. a group (what one sync makes durable, written at once or bit by bit) lies in one segment and begins only when
//! the group before it is durable (recovery relies on it, see `frame.rs`); 2. the first failed sync, or failed write for another reason than lack of space, ends the
//! thread and poisons the journal; 3. for lack of space on the disk it waits, keeping what it has; for nothing else: what is
//! in the queue is written whatever the journal's limit says.
//! On crash: what was not durable is gone or is a torn tail. Not here: reading (`reader.rs`), deleting (`retain.rs`).

use std::collections::VecDeque;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use anabranch_proto::Vector;

use super::Options;
use super::disk::{DirLock, Disk, DiskFile};
use super::error::Error;
use super::frame::{self, HEADER_LEN, Header};
use super::ledger::OpenParts;
use super::meta::FrameKind;
use super::recover::Recovery;
use super::segment::{self, FORMAT, Owner, Segment, SegmentHeader};
use super::shared::{Haste, Queued, Shared, Work, lock};
use crate::broken::{self, Rule};
use crate::small_file::is_no_space;

/// Most bytes of one group, so that `written` and `durable` move on under load. One frame may be longer.
const GROUP_BYTES_MAX: u64 = 4 * 1024 * 1024;
/// So many bytes behind the last frame are overwritten with zeros once frames have come to space that was only reserved. The first sync
/// of a reserved place waits for two things: the bytes, and the file system's note (of ext4 and XFS) that they are written. The group
/// that meets such a place has the next ones' noted with its own.
const PREPARED_BYTES: u64 = 256 * 1024;
/// For groups of as many bytes nothing is prepared: their bytes take longer than the note, and all would be written twice.
const LARGE_GROUP_BYTES: u64 = 64 * 1024;
/// Frames are gathered up to this many bytes for one write.
const GATHER_BYTES: usize = 1024 * 1024;
/// Longer payloads are written from where they are instead of being copied, bytes.
const COPY_LEN_MAX: usize = 64 * 1024;

/// The writer thread's state.
pub(super) struct Writer {
    shared: Arc<Shared>,
    active: Arc<Segment>,
    file: Arc<dyn DiskFile>,
    /// End of the active segment's frames, bytes.
    end: u64,
    /// Up to here the active segment was written, with frames or with zeros, bytes; unless that is before `end`.
    prepared: u64,
    /// Number of the next frame to be written.
    next_seq: u64,
    /// Number of the first frame that is not durable, the bytes from there on, and since when there are any.
    group_first: u64,
    group_bytes: u64,
    unsynced: Option<Instant>,
    /// Last complete position per origin, written.
    complete: Vector,
    open_parts: OpenParts,
    batch: VecDeque<Queued>,
    gathered: Vec<u8>,
    /// Keeps other processes out until this thread has ended.
    dir_lock: Option<DirLock>,
}

/// Why something was not written.
pub(super) enum Trouble {
    /// No space now; what to tell the operator.
    NoSpace(String),
    /// The journal must stop.
    Fatal(Error),
}

impl Trouble {
    /// Sorts an error of an operation that may run out of space.
    fn of(action: &'static str, path: &std::path::Path, error: io::Error) -> Self {
        if is_no_space(&error) {
            Self::NoSpace(format!(
                "cannot {action} {}: {error}; free disk space",
                path.display()
            ))
        } else {
            Self::Fatal(Error::io(action, path, error))
        }
    }
}

impl Writer {
    pub(super) fn new(shared: Arc<Shared>, recovery: Recovery, dir_lock: DirLock) -> Self {
        Self {
            shared,
            active: recovery.active,
            file: recovery.file,
            end: recovery.end,
            prepared: recovery.end,
            next_seq: recovery.next_seq,
            group_first: recovery.next_seq,
            group_bytes: 0,
            unsynced: None,
            complete: recovery.tails.complete().clone(),
            open_parts: recovery.open_parts,
            batch: VecDeque::new(),
            gathered: Vec::with_capacity(GATHER_BYTES),
            dir_lock: Some(dir_lock),
        }
    }

    /// Serves until the journal is closed or poisoned.
    pub(super) fn run(mut self) {
        let outcome = catch_unwind(AssertUnwindSafe(|| self.serve()));
        match outcome {
            Ok(Ok(()) | Err(Error::Closed)) => {}
            Ok(Err(error)) => self.shared.poison(error.to_string()),
            Err(_) => self.shared.poison("its writer panicked".to_owned()),
        }
        drop(self.dir_lock.take());
        self.shared.finish();
    }

    fn serve(&mut self) -> Result<(), Error> {
        loop {
            match self.shared.take_work(&mut self.batch, self.unsynced) {
                Work::Write(haste) => {
                    self.write_batch()?;
                    self.prepare()?;
                    if haste == Haste::Now || self.group_bytes >= GROUP_BYTES_MAX {
                        self.make_durable()?;
                    }
                }
                Work::Sync => self.make_durable()?,
                Work::Rotate(first_seq) => {
                    if self.active.first_seq == first_seq && self.next_seq > first_seq {
                        self.rotate(0)?;
                    }
                }
                Work::Finish => return Ok(()),
            }
        }
    }

    fn write_batch(&mut self) -> Result<(), Error> {
        while let Some(first) = self.batch.front() {
            let need = frame::disk_len(first.frame.payload.len());
            if self.end.saturating_add(need) > self.capacity() {
                self.make_room(need)?;
            }
            let capacity = self.capacity().min(
                self.end
                    .saturating_add(GROUP_BYTES_MAX.saturating_sub(self.group_bytes).max(need)),
            );
            let mut end = self.end;
            let mut count = 0;
            for queued in &self.batch {
                end = end.saturating_add(frame::disk_len(queued.frame.payload.len()));
                if end > capacity {
                    break;
                }
                count += 1;
            }
            self.write_frames(count)?;
            if !self.batch.is_empty() {
                self.make_durable()?;
            }
        }
        Ok(())
    }

    /// Prepares what comes next, where frames have come to a place that is not.
    fn prepare(&mut self) -> Result<(), Error> {
        if self.end <= self.prepared || self.group_bytes >= LARGE_GROUP_BYTES {
            return Ok(());
        }
        let to = self.end.saturating_add(PREPARED_BYTES).min(self.capacity());
        match self.file.prepare(self.end, to) {
            Ok(()) => {}
            // It was not reserved, since the file system cannot do that. The frames that want it will say so.
            Err(error) if is_no_space(&error) => {}
            Err(error) => return Err(Error::io("prepare space in", &self.active.path, error)),
        }
        self.prepared = to;
        Ok(())
    }

    fn capacity(&self) -> u64 {
        if self.active.is_sealed() {
            0
        } else {
            self.active.disk_len.load(Ordering::Relaxed)
        }
    }

    /// Writes the first `count` frames of the batch and lets readers see them.
    fn write_frames(&mut self, count: usize) -> Result<(), Error> {
        loop {
            match self.put_frames(count) {
                Ok(()) => break,
                // The same frames go to the same place again: nothing of these was published.
                Err(Trouble::NoSpace(why)) => {
                    // It may last, and somebody may wait for those that are written.
                    self.make_durable()?;
                    self.shared.stall(why)?;
                }
                Err(Trouble::Fatal(error)) => return Err(error),
            }
        }
        self.shared.unstall();

        let (mut weight, begin) = (0, self.end);
        for queued in self.batch.drain(..count) {
            let meta = queued.frame.meta;
            self.open_parts.note(&self.active, &meta, self.end);
            self.active.mark(self.next_seq, self.end);
            if meta.kind != FrameKind::Part {
                self.complete.raise(meta.origin, meta.last);
            }
            self.end += frame::disk_len(queued.frame.payload.len());
            self.next_seq += 1;
            weight += queued.weight as usize;
        }
        lock(&self.shared.progress).written.clone_from(&self.complete);
        // In this order: a cursor must find the frames, in memory or here.
        self.active.publish(self.end);
        lock(&self.shared.recall).note_written(self.next_seq);
        self.shared.written.send_replace(self.next_seq);
        self.shared.room.add_permits(weight);
        self.group_bytes += self.end - begin;
        self.unsynced.get_or_insert_with(Instant::now);
        Ok(())
    }

    /// Makes all that is written durable, which ends the group.
    fn make_durable(&mut self) -> Result<(), Error> {
        if self.unsynced.is_none() {
            return Ok(());
        }
        if !broken::is(Rule::JournalFsync) {
            self.file
                .sync_data()
                .map_err(|error| Error::io("make durable", &self.active.path, error))?;
        }
        self.end_group();
        Ok(())
    }

    /// All that is written is durable.
    fn end_group(&mut self) {
        (self.group_first, self.group_bytes, self.unsynced) = (self.next_seq, 0, None);
        lock(&self.shared.progress).durable.clone_from(&self.complete);
        self.shared.durable.send_replace(self.next_seq);
    }

    /// Puts the bytes of the first `count` frames of the batch after the last frame.
    fn put_frames(&mut self, count: usize) -> Result<(), Trouble> {
        let path = &self.active.path;
        let put = |bytes: &[u8], at: u64| {
            self.file
                .write_at(bytes, at)
                .map_err(|error| Trouble::of("write", path, error))
        };
        let gathered = &mut self.gathered;
        gathered.clear();
        let mut at = self.end;
        for (seq, queued) in (self.next_seq..).zip(self.batch.iter().take(count)) {
            let payload = &queued.frame.payload;
            let header = Header {
                meta: queued.frame.meta,
                seq,
                group_first: self.group_first,
                // Checked by `append`.
                payload_len: u32::try_from(payload.len()).unwrap_or(u32::MAX),
                payload_crc: queued.payload_crc,
            };
            gathered.extend_from_slice(&header.encode(self.active.seed));
            if payload.len() > COPY_LEN_MAX {
                put(gathered, at)?;
                at += gathered.len() as u64;
                gathered.clear();
                put(payload, at)?;
                at += payload.len() as u64;
            } else {
                gathered.extend_from_slice(payload);
            }
            let padding = frame::disk_len(payload.len()) - (HEADER_LEN as u64 + payload.len() as u64);
            gathered.extend((0..padding).map(|_| 0));
            if gathered.len() >= GATHER_BYTES {
                put(gathered, at)?;
                at += gathered.len() as u64;
                gathered.clear();
            }
        }
        put(gathered, at)
    }

    /// Makes a place for a frame of `need` bytes: in a new segment, or in this one if it is still empty.
    fn make_room(&mut self, need: u64) -> Result<(), Error> {
        if self.next_seq > self.active.first_seq {
            return self.rotate(need);
        }
        let len = self
            .end
            .saturating_add(need)
            .max(self.shared.options.segment_bytes);
        loop {
            match self
                .file
                .allocate(len)
                .map_err(|error| Trouble::of("reserve space in", &self.active.path, error))
            {
                Ok(()) => break,
                Err(Trouble::NoSpace(why)) => self.shared.stall(why)?,
                Err(Trouble::Fatal(error)) => return Err(error),
            }
        }
        let before = self.active.disk_len.swap(len, Ordering::Relaxed);
        self.shared
            .disk_bytes
            .fetch_add(len.saturating_sub(before), Ordering::Relaxed);
        Ok(())
    }

    /// Seals the active segment and goes on in a new one with room for a frame of `need` bytes.
    fn rotate(&mut self, need: u64) -> Result<(), Error> {
        // Sealed files end with their last frame: recovery takes anything else for damage. So this is durable before
        // the next file exists.
        let failed = |error| Error::io("seal", &self.active.path, error);
        self.file.truncate(self.end).map_err(failed)?;
        self.file.sync_all().map_err(failed)?;
        self.end_group();
        let given_back = self
            .active
            .disk_len
            .load(Ordering::Relaxed)
            .saturating_sub(self.end);
        self.shared.disk_bytes.fetch_sub(given_back, Ordering::Relaxed);
        self.active.seal(self.end);
        // Readers open it again when they need it; most never do.
        self.active.close_file();

        let shared = &self.shared;
        let (segment, file) = loop {
            match create(
                &*shared.disk,
                &shared.options,
                shared.owner,
                self.next_seq,
                &self.complete,
                need,
            ) {
                Ok(created) => break created,
                Err(Trouble::NoSpace(why)) => shared.stall(why)?,
                Err(Trouble::Fatal(error)) => return Err(error),
            }
        };
        self.end = segment.header_len;
        self.prepared = self.end;
        self.active = Arc::new(segment);
        self.file = file;
        self.shared
            .disk_bytes
            .fetch_add(self.active.disk_len.load(Ordering::Relaxed), Ordering::Relaxed);
        lock(&self.shared.index).push_back(Arc::clone(&self.active));
        Ok(())
    }
}

/// Creates the segment whose first frame will be number `first_seq`; durable, name included, when this returns.
pub(super) fn create(
    disk: &dyn Disk,
    options: &Options,
    owner: Owner,
    first_seq: u64,
    base: &Vector,
    need: u64,
) -> Result<(Segment, Arc<dyn DiskFile>), Trouble> {
    let path = segment::path(&options.dir, first_seq);
    let header = SegmentHeader {
        version: FORMAT,
        owner,
        first_seq,
        salt: rand::random(),
        base: base.clone(),
    };
    let bytes = header.encode();
    let header_len = bytes.len() as u64;
    let len = options.segment_bytes.max(header_len.saturating_add(need));

    let file = disk
        .create(&path)
        .map_err(|error| Trouble::of("create", &path, error))?;
    let reserved = file.allocate(len).and_then(|()| file.write_at(&bytes, 0));
    if let Err(error) = reserved {
        let trouble = Trouble::of("reserve space for", &path, error);
        disk.remove(&path)
            .map_err(|error| Trouble::Fatal(Error::io("remove", &path, error)))?;
        return Err(trouble);
    }
    file.sync_all()
        .and_then(|()| disk.sync_dir(&options.dir))
        .map_err(|error| Trouble::Fatal(Error::io("make durable", &path, error)))?;
    let segment = Segment::new(path, header, header_len, len);
    segment.set_file(Arc::clone(&file));
    Ok((segment, file))
}
