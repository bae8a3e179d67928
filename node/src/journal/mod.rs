//! The daemon's durable log of its own and of received transactions: the queue between receiving and everything else.
//!
//! In: frames of every origin ([`Journal::append`]). Out: frames of one origin per [`Cursor`], in order, as soon as they
//! are appended; what is durable ([`Journal::durable`]).
//! Holds: at most 4 MiB of frames that wait for the writer, the last MiB that it wrote, and a few words per segment.
//! Invariants: 1. a frame is numbered once it continues its origin's stream, and frames are written in that order;
//! 2. what was called durable is there after any crash, or opening fails loudly; 3. one writer, one process;
//! 4. the first failed sync stops the journal for good ([`Error::Poisoned`]); lack of space only stalls it; 5. at its limit it
//! says so and takes what comes: what others have written must come in before anything of ours can go (`docs/design.md`, section 4).
//! On crash: frames that were not durable are gone; their senders resume from [`Recovered::last`].
//! Not here: what payloads mean, what is stable, who may be sent what.
//!
//! Files: `meta` a frame's description, `pack` LZ4, `frame` and `segment` the bytes on disk, `ledger` where every
//! origin's stream ends, `shared` state, `writer` the thread, `reader` cursors, `recall` the frames that are still in memory, `recover` opening, `retain` deleting,
//! `disk` the file operations, `window` read-ahead.

mod disk;
mod error;
mod frame;
mod ledger;
mod meta;
mod pack;
mod reader;
mod recall;
mod recover;
mod retain;
mod segment;
mod shared;
#[cfg(test)]
mod tests;
mod window;
mod writer;

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use anabranch_proto::{Lsn, NodeId, Position, Vector};
use tokio::sync::watch;

pub use disk::{DirLock, Disk, DiskFile, RealDisk};
pub use error::Error;
pub use meta::{Codec, Frame, FrameKind, FrameMeta};
pub use pack::{RAW_LEN_MAX, pack, unpack};
pub use reader::{Cursor, CursorState, Located};
pub use retain::Reclaimed;

use segment::Owner;
use shared::{Haste, Queued, ROOM_BYTES, Shared, lock};
use writer::Writer;

/// Between two looks whether there is space again.
const STALL_LOOK: Duration = Duration::from_millis(500);
/// Smallest segment, bytes.
const SEGMENT_BYTES_MIN: u64 = 4096;

/// Where a journal is, whose it is, and how large it may get.
#[derive(Debug, Clone)]
pub struct Options {
    /// Its folder, used by nothing else; created if missing.
    pub dir: PathBuf,
    /// Reserved length of one file, bytes; a larger frame gets a larger file.
    pub segment_bytes: u64,
    /// About here the journal is full ([`Journal::full`]), bytes; at least two segments. It takes frames all the same: whose
    /// may wait, and until when, is their makers' business.
    pub max_bytes: u64,
    /// A frame that nobody waits for is durable this long after it was written, at the latest: so many share a sync.
    pub sync_within: Duration,
    /// The node whose journal it is.
    pub node: NodeId,
    /// The cluster's id.
    pub cluster: String,
}

/// What was found on opening.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recovered {
    /// Last complete position per origin, of everything that ever was in the journal.
    pub last: Vector,
    /// Number of the oldest frame held.
    pub first_seq: u64,
    /// Number of the next frame.
    pub next_seq: u64,
    /// Frames held.
    pub frames: u64,
    /// Length of the files, bytes.
    pub bytes: u64,
}

/// The journal in numbers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stats {
    /// Length of the files with what is reserved, bytes.
    pub bytes_on_disk: u64,
    /// Number of files.
    pub segments: usize,
    /// Frames held.
    pub frames: u64,
    /// Number of the oldest frame held.
    pub oldest_seq: u64,
    /// Every origin's last complete position before the oldest file.
    pub oldest: Vector,
    /// Number of the next frame to be written.
    pub written_seq: u64,
    /// Number of the next frame to become durable.
    pub durable_seq: u64,
    /// Bytes that wait for the writer.
    pub queued_bytes: u64,
    /// Why nothing can be written at the moment: the disk is full.
    pub stalled: Option<String>,
    /// Why the journal stopped for good.
    pub poisoned: Option<String>,
}

/// A handle to an open journal; clones are the same journal. It is closed when the last handle goes.
#[derive(Clone)]
pub struct Journal(Arc<Handle>);

struct Handle(Arc<Shared>);

impl fmt::Debug for Journal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Journal")
            .field("dir", &self.shared().options.dir)
            .field("stats", &self.stats())
            .finish()
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.0.begin_close();
    }
}

impl Journal {
    /// Opens or creates a journal, reads what is in it, and starts its writer. Blocks on the disk.
    ///
    /// # Errors
    /// [`Error::Locked`], [`Error::Foreign`], [`Error::Version`], [`Error::Corrupt`], [`Error::Io`],
    /// [`Error::Options`]; nothing that was durable is changed in these cases.
    pub fn open(options: Options, disk: Arc<dyn Disk>) -> Result<(Self, Recovered), Error> {
        if options.segment_bytes < SEGMENT_BYTES_MIN {
            return Err(Error::Options(format!(
                "a segment must have at least {SEGMENT_BYTES_MIN} bytes"
            )));
        }
        if options.max_bytes < options.segment_bytes.saturating_mul(2) {
            return Err(Error::Options(
                "the journal must have room for at least two segments".to_owned(),
            ));
        }
        let dir = &options.dir;
        disk.create_dir(dir)
            .map_err(|error| Error::io("create", dir, error))?;
        let dir_lock = disk
            .lock_dir(dir)
            .map_err(|error| Error::io("lock", dir, error))?;
        let dir_lock = dir_lock.ok_or_else(|| Error::Locked { dir: dir.clone() })?;

        let owner = Owner::new(options.node, &options.cluster);
        let recovery = recover::recover(&*disk, &options, owner)?;
        let first_seq = recovery
            .index
            .front()
            .map_or(recovery.next_seq, |segment| segment.first_seq);
        let recovered = Recovered {
            last: recovery.tails.complete().clone(),
            first_seq,
            next_seq: recovery.next_seq,
            frames: recovery.next_seq.saturating_sub(first_seq),
            bytes: recovery.disk_bytes,
        };
        let shared = Arc::new(Shared::new(
            disk,
            options,
            owner,
            recovery.index.clone(),
            recovery.tails.clone(),
            recovery.next_seq,
            recovery.disk_bytes,
        ));
        let writer = Writer::new(Arc::clone(&shared), recovery, dir_lock);
        thread::Builder::new()
            .name("journal".to_owned())
            .spawn(move || writer.run())
            .map_err(|error| Error::io("start the writer of", &shared.options.dir, error))?;
        Ok((Self(Arc::new(Handle(shared))), recovered))
    }

    fn shared(&self) -> &Arc<Shared> {
        &self.0.0
    }

    /// Hands a frame to the writer, waiting while too much is queued or the writer is stalled. Returns its number, one
    /// more than that of the frame before. Nothing is queued if the future is dropped.
    ///
    /// # Errors
    /// [`Error::OutOfOrder`] and [`Error::BadFrame`] refuse the frame and change nothing; [`Error::Poisoned`],
    /// [`Error::Closed`].
    pub async fn append(&self, frame: Frame) -> Result<u64, Error> {
        self.queue(frame, Haste::Now).await
    }

    /// The same of a frame that need not be durable at once: it is written as soon, and shares the sync of those that come within
    /// [`Options::sync_within`]. [`Self::wait_durable`] ends the waiting.
    ///
    /// # Errors
    /// As for [`Self::append`].
    pub async fn append_unhurried(&self, frame: Frame) -> Result<u64, Error> {
        self.queue(frame, Haste::Soon).await
    }

    async fn queue(&self, frame: Frame, haste: Haste) -> Result<u64, Error> {
        let shared = self.shared();
        shared.check()?;
        if frame.payload.len() > RAW_LEN_MAX as usize || frame.meta.raw_len > RAW_LEN_MAX {
            let what = format!("its payload is longer than {RAW_LEN_MAX} bytes; cut it into parts");
            return Err(Error::BadFrame {
                origin: frame.meta.origin,
                what,
            });
        }
        let payload_crc = crc32c::crc32c(&frame.payload);
        let weight = u32::try_from(frame::disk_len(frame.payload.len()))
            .unwrap_or(ROOM_BYTES)
            .min(ROOM_BYTES);
        let origin = frame.meta.origin;
        let permit = shared
            .room
            .acquire_many(weight)
            .await
            .map_err(|_| shared.stopped())?;

        let mut queue = lock(&shared.queue);
        if queue.closing {
            return Err(shared.stopped());
        }
        queue.tails.admit(&frame.meta)?;
        permit.forget();
        lock(&shared.recall).push(frame.clone());
        let queued = Queued {
            frame,
            payload_crc,
            weight,
        };
        let seq = queue.push(queued, haste);
        // Still under the queue's lock: numbers are told in their order.
        shared.appended.tell(origin, seq + 1);
        let writer_waits = queue.writer_waits;
        drop(queue);
        // Not under it: the writer would wake to wait for it.
        if writer_waits {
            shared.ready.notify_one();
        }
        Ok(seq)
    }

    /// All frames of other nodes with a smaller number are appended: cursors see them, a crash may lose them. Own frames change nothing
    /// here.
    #[must_use]
    pub fn appended_of_others(&self) -> watch::Receiver<u64> {
        self.shared().appended.subscribe_others()
    }

    /// All frames with a smaller number are written: a crash of the machine may lose them.
    #[cfg(test)]
    fn written(&self) -> watch::Receiver<u64> {
        self.shared().written.subscribe()
    }

    /// Waits until frame `seq` survives any crash; false once there is no space for it.
    ///
    /// # Errors
    /// As for [`Self::wait_durable`].
    pub async fn is_durable_soon(&self, seq: u64) -> Result<bool, Error> {
        let durable = self.wait_durable(seq);
        tokio::pin!(durable);
        loop {
            tokio::select! {
                durable = &mut durable => return durable.map(|()| true),
                () = tokio::time::sleep(STALL_LOOK) => {
                    if self.is_stalled() && *self.shared().written.borrow() <= seq {
                        return Ok(false);
                    }
                }
            }
        }
    }

    /// Resolves once frame `seq` is written, or can be soon: not while there is no space for it.
    pub async fn until_writable(&self, seq: u64) {
        let mut written = self.shared().written.subscribe();
        while *written.borrow_and_update() <= seq && self.is_stalled() && self.shared().check().is_ok() {
            // What ends a stall also writes.
            let _ = tokio::time::timeout(STALL_LOOK, written.changed()).await;
        }
    }

    /// What to tell people while the journal is at its limit: half a file's room, and what comes in takes it or more. The
    /// space comes back by [`Self::retain`] alone.
    #[must_use]
    pub fn full(&self) -> Option<String> {
        let options = &self.shared().options;
        let after = self.used_bytes().saturating_add(options.segment_bytes / 2);
        (after > options.max_bytes).then(|| {
            format!(
                "the journal would grow to {after} bytes, more than the {} allowed by `journal.max_size_mib`: a member is too \
                 far behind, bring it back, remove it, or raise the limit",
                options.max_bytes
            )
        })
    }

    /// Length of the files without what is only reserved, bytes.
    fn used_bytes(&self) -> u64 {
        let shared = self.shared();
        let reserved = lock(&shared.index).back().map_or(0, |active| {
            let len = active.disk_len.load(Ordering::Relaxed);
            len.saturating_sub(active.written_end())
        });
        shared.disk_bytes.load(Ordering::Relaxed).saturating_sub(reserved)
    }

    /// Is there no space?
    #[must_use]
    pub fn is_stalled(&self) -> bool {
        lock(&self.shared().stalled).is_some()
    }

    /// All frames with a smaller number survive any crash.
    #[must_use]
    pub fn durable(&self) -> watch::Receiver<u64> {
        self.shared().durable.subscribe()
    }

    /// Waits until frame `seq` survives any crash.
    ///
    /// # Errors
    /// [`Error::Poisoned`], [`Error::Closed`] if it never will.
    pub async fn wait_durable(&self, seq: u64) -> Result<(), Error> {
        let shared = self.shared();
        let mut durable = shared.durable.subscribe();
        loop {
            if *durable.borrow_and_update() > seq {
                return Ok(());
            }
            shared.urge(seq);
            shared.check()?;
            if *shared.finished.borrow() {
                return Err(shared.stopped());
            }
            durable.changed().await.map_err(|_| Error::Closed)?;
        }
    }

    /// Last complete position per origin that was appended, perhaps still queued: from there the next frames go on.
    #[must_use]
    pub fn appended_vector(&self) -> Vector {
        lock(&self.shared().queue).tails.complete().clone()
    }

    /// The same of one origin.
    #[must_use]
    pub fn appended_of(&self, origin: NodeId) -> Position {
        lock(&self.shared().queue).tails.complete().get(origin)
    }

    /// Last complete position per origin that is written.
    #[must_use]
    pub fn written_vector(&self) -> Vector {
        lock(&self.shared().progress).written.clone()
    }

    /// Last complete position per origin that survives any crash.
    #[must_use]
    pub fn durable_vector(&self) -> Vector {
        lock(&self.shared().progress).durable.clone()
    }

    /// A reader of the frames of `origin` that end after `after`, parts of such transactions included.
    ///
    /// # Errors
    /// [`Error::Trimmed`] if what follows `after` is not here any more, [`Error::Poisoned`].
    pub fn cursor(&self, origin: NodeId, after: Position) -> Result<Cursor, Error> {
        Cursor::new(self.shared(), origin, after)
    }

    /// A reader that begins with the transaction of `origin` that ends at `position`: with the first of its parts, if
    /// it is in several frames, where [`Self::cursor`] at a position within it would meet its end alone.
    ///
    /// # Errors
    /// As for [`Self::cursor`].
    pub fn cursor_on(&self, origin: NodeId, position: Position) -> Result<Cursor, Error> {
        let before = Position {
            lsn: Lsn(position.lsn.0.saturating_sub(1)),
            ..position
        };
        let mut cursor = self.cursor(origin, before)?;
        match cursor.begins_after()? {
            Some(prev) => self.cursor(origin, prev),
            None => Ok(cursor),
        }
    }

    /// A reader at a place that [`Cursor::save`] returned.
    ///
    /// # Errors
    /// As for [`Self::cursor`].
    pub fn cursor_at(&self, state: CursorState) -> Result<Cursor, Error> {
        Cursor::at(self.shared(), state)
    }

    /// Deletes the oldest files as far as `stable` covers everything in them. Blocks on the disk for each.
    ///
    /// # Errors
    /// [`Error::Io`]: the rest is deleted by the next call; [`Error::Poisoned`].
    pub fn retain(&self, stable: &Vector) -> Result<Reclaimed, Error> {
        self.retain_after(stable, || Ok(()))
    }

    /// As [`Self::retain`]; `before` is called before the first file goes, if one goes, and must succeed.
    ///
    /// # Errors
    /// As [`Self::retain`], and [`Error::Io`] when `before` fails: then nothing is deleted.
    pub fn retain_after(
        &self,
        stable: &Vector,
        before: impl FnOnce() -> std::io::Result<()>,
    ) -> Result<Reclaimed, Error> {
        retain::retain(self.shared(), stable, before)
    }

    /// The journal in numbers.
    #[must_use]
    pub fn stats(&self) -> Stats {
        let shared = self.shared();
        let (segments, oldest_seq, oldest) = {
            let index = lock(&shared.index);
            let oldest = index.front();
            (
                index.len(),
                oldest.map_or(0, |it| it.first_seq),
                oldest.map(|it| it.base.clone()).unwrap_or_default(),
            )
        };
        let written_seq = *shared.written.borrow();
        let free = u64::try_from(shared.room.available_permits()).unwrap_or(u64::MAX);
        Stats {
            bytes_on_disk: shared.disk_bytes.load(Ordering::Relaxed),
            segments,
            frames: written_seq.saturating_sub(oldest_seq),
            oldest_seq,
            oldest,
            written_seq,
            durable_seq: *shared.durable.borrow(),
            queued_bytes: u64::from(ROOM_BYTES).saturating_sub(free),
            stalled: lock(&shared.stalled).clone(),
            poisoned: shared.poison_reason().map(|reason| reason.to_string()),
        }
    }

    /// Resolves when the journal has stopped for good, with the reason; the daemon must then restart.
    pub async fn poisoned(&self) -> Error {
        let shared = self.shared();
        let mut poisoned = shared.poisoned.subscribe();
        loop {
            if let Err(error) = shared.check() {
                return error;
            }
            if poisoned.changed().await.is_err() {
                // The sender is in `shared`, which we hold.
                return Error::Closed;
            }
        }
    }

    /// Takes no more frames, writes what is queued, makes it durable, and frees the folder.
    ///
    /// # Errors
    /// [`Error::Poisoned`] if that failed.
    pub async fn close(&self) -> Result<(), Error> {
        let shared = self.shared();
        shared.begin_close();
        let mut finished = shared.finished.subscribe();
        let _ = finished.wait_for(|&finished| finished).await;
        shared.check()
    }
}
