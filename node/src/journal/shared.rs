//! What the journal's handles, its writer thread and its cursors share.
//!
//! Holds: the index of segments, the queue to the writer (bounded in bytes by [`ROOM_BYTES`]), what is written and
//! what is durable. Lock order: `trimming`, then `index`, then anything inside a segment; `queue`, then `recall`.
//! Not here: who fills and empties these (`mod.rs`, `writer.rs`, `reader.rs`, `retain.rs`).

use std::collections::VecDeque;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use anabranch_proto::{NodeId, Vector};
use tokio::sync::{Semaphore, watch};

use super::Options;
use super::disk::Disk;
use super::error::Error;
use super::ledger::Tails;
use super::meta::Frame;
use super::recall::Recall;
use super::segment::{Owner, Segment};

/// Bytes that may wait for the writer; beyond that `append` waits.
pub(super) const ROOM_BYTES: u32 = 4 * 1024 * 1024;
/// How long a stalled writer waits before it tries again.
const STALL_RETRY: Duration = Duration::from_secs(1);

/// Locks, also after a panic elsewhere: every critical section here leaves its data whole.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A frame on its way to the writer.
pub(super) struct Queued {
    pub(super) frame: Frame,
    pub(super) payload_crc: u32,
    /// Its share of [`ROOM_BYTES`].
    pub(super) weight: u32,
}

/// Does somebody wait for a frame to be durable?
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Haste {
    Now,
    Soon,
}

/// The queue to the writer. Frame numbers are given out here, in order.
pub(super) struct Queue {
    pub(super) frames: VecDeque<Queued>,
    /// Somebody waits for all frames with a smaller number to be durable.
    wanted: u64,
    /// Number of the next frame to be queued.
    pub(super) next_seq: u64,
    pub(super) tails: Tails,
    /// The writer ends when the queue is empty.
    pub(super) closing: bool,
    /// Seal the active segment if its first frame is this one.
    pub(super) rotate: Option<u64>,
    /// The writer sleeps and must be woken.
    pub(super) writer_waits: bool,
}

/// What the writer is to do.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Work {
    /// Writes what it was given, and makes it durable if somebody waits for that.
    Write(Haste),
    /// Makes durable what is written.
    Sync,
    Rotate(u64),
    Finish,
}

/// Number of the frame behind the last one that was appended, told to two kinds of readers: who sends this node's own frames on, and who
/// applies those of others. A frame wakes one kind, where a single channel would wake every session of a link and the applier.
pub(super) struct Appended {
    node: NodeId,
    own: watch::Sender<u64>,
    others: watch::Sender<u64>,
}

impl Appended {
    fn new(node: NodeId, next_seq: u64) -> Self {
        Self {
            node,
            own: watch::Sender::new(next_seq),
            others: watch::Sender::new(next_seq),
        }
    }

    fn of(&self, origin: NodeId) -> &watch::Sender<u64> {
        if origin == self.node {
            &self.own
        } else {
            &self.others
        }
    }

    /// The frame before `next_seq` is appended; it is one of `origin`.
    pub(super) fn tell(&self, origin: NodeId, next_seq: u64) {
        self.of(origin).send_replace(next_seq);
    }

    /// For a reader of frames of `origin`: it changes with each of them, perhaps with others, too.
    pub(super) fn subscribe(&self, origin: NodeId) -> watch::Receiver<u64> {
        self.of(origin).subscribe()
    }

    /// The same for a reader of all frames that are not this node's own.
    pub(super) fn subscribe_others(&self) -> watch::Receiver<u64> {
        self.others.subscribe()
    }

    fn wake_all(&self) {
        self.own.send_modify(|_| ());
        self.others.send_modify(|_| ());
    }
}

/// Last complete position per origin.
#[derive(Debug, Default)]
pub(super) struct Progress {
    pub(super) written: Vector,
    pub(super) durable: Vector,
}

/// Shared state of one open journal.
pub(super) struct Shared {
    pub(super) disk: Arc<dyn Disk>,
    pub(super) options: Options,
    pub(super) owner: Owner,
    /// All segments, oldest first; never empty once open.
    pub(super) index: Mutex<VecDeque<Arc<Segment>>>,
    pub(super) queue: Mutex<Queue>,
    /// Work for the writer.
    pub(super) ready: Condvar,
    /// Space may have come back; goes with `queue`.
    pub(super) space: Condvar,
    pub(super) room: Semaphore,
    pub(super) recall: Mutex<Recall>,
    pub(super) appended: Appended,
    pub(super) written: watch::Sender<u64>,
    pub(super) durable: watch::Sender<u64>,
    pub(super) finished: watch::Sender<bool>,
    /// Tells of [`Self::poison`] those who wait for nothing else.
    pub(super) poisoned: watch::Sender<bool>,
    pub(super) progress: Mutex<Progress>,
    pub(super) stalled: Mutex<Option<String>>,
    pub(super) disk_bytes: AtomicU64,
    /// One `retain` at a time.
    pub(super) trimming: Mutex<()>,
    poison: OnceLock<Arc<str>>,
}

impl Queue {
    /// Queues a frame; its number.
    pub(super) fn push(&mut self, queued: Queued, haste: Haste) -> u64 {
        let seq = self.next_seq;
        self.next_seq += 1;
        if haste == Haste::Now {
            self.wanted = self.next_seq;
        }
        self.frames.push_back(queued);
        seq
    }
}

impl Shared {
    pub(super) fn new(
        disk: Arc<dyn Disk>,
        options: Options,
        owner: Owner,
        index: VecDeque<Arc<Segment>>,
        tails: Tails,
        next_seq: u64,
        disk_bytes: u64,
    ) -> Self {
        let progress = Progress {
            written: tails.complete().clone(),
            durable: tails.complete().clone(),
        };
        let queue = Queue {
            frames: VecDeque::new(),
            wanted: next_seq,
            next_seq,
            tails,
            closing: false,
            rotate: None,
            writer_waits: false,
        };
        let appended = Appended::new(options.node, next_seq);
        Self {
            disk,
            options,
            owner,
            index: Mutex::new(index),
            queue: Mutex::new(queue),
            ready: Condvar::new(),
            space: Condvar::new(),
            room: Semaphore::new(ROOM_BYTES as usize),
            recall: Mutex::new(Recall::new(next_seq)),
            appended,
            written: watch::Sender::new(next_seq),
            durable: watch::Sender::new(next_seq),
            finished: watch::Sender::new(false),
            poisoned: watch::Sender::new(false),
            progress: Mutex::new(progress),
            stalled: Mutex::new(None),
            disk_bytes: AtomicU64::new(disk_bytes),
            trimming: Mutex::new(()),
            poison: OnceLock::new(),
        }
    }

    /// The first failure, if there was one.
    pub(super) fn poison_reason(&self) -> Option<&Arc<str>> {
        self.poison.get()
    }

    /// Fails once the journal is poisoned.
    pub(super) fn check(&self) -> Result<(), Error> {
        match self.poison.get() {
            None => Ok(()),
            Some(reason) => Err(Error::Poisoned {
                reason: Arc::clone(reason),
            }),
        }
    }

    /// Why the journal takes nothing more.
    pub(super) fn stopped(&self) -> Error {
        self.check().err().unwrap_or(Error::Closed)
    }

    /// Stops the journal for good: what is durable is known only after it is opened again.
    pub(super) fn poison(&self, reason: String) {
        let reason: Arc<str> = reason.into();
        if self.poison.set(Arc::clone(&reason)).is_ok() {
            tracing::error!(%reason, "the journal stopped; the daemon must restart from what is durable");
        }
        self.room.close();
        self.poisoned.send_replace(true);
        self.wake_all();
    }

    /// The writer has ended and the folder is free.
    pub(super) fn finish(&self) {
        self.finished.send_replace(true);
        self.wake_all();
    }

    /// Wakes everyone who waits for progress, to look why there is none.
    fn wake_all(&self) {
        self.appended.wake_all();
        self.written.send_modify(|_| ());
        self.durable.send_modify(|_| ());
    }

    /// Asks the writer to write what is queued and to end.
    pub(super) fn begin_close(&self) {
        lock(&self.queue).closing = true;
        self.room.close();
        self.ready.notify_all();
        self.space.notify_all();
    }

    /// Blocks until there is work; frames are moved to `batch`, which must be empty. What is written and not durable is
    /// so since `unsynced`.
    pub(super) fn take_work(&self, batch: &mut VecDeque<Queued>, unsynced: Option<Instant>) -> Work {
        let mut queue = lock(&self.queue);
        loop {
            let left = unsynced.map(|since| self.options.sync_within.saturating_sub(since.elapsed()));
            let is_due = left.is_some_and(|left| left.is_zero());
            let is_wanted = queue.wanted > *self.durable.borrow();
            let hurries = is_wanted || queue.closing || queue.rotate.is_some() || is_due;
            if !queue.frames.is_empty() {
                std::mem::swap(&mut queue.frames, batch);
                return Work::Write(if hurries { Haste::Now } else { Haste::Soon });
            }
            if unsynced.is_some() && hurries {
                return Work::Sync;
            }
            if let Some(first_seq) = queue.rotate.take() {
                return Work::Rotate(first_seq);
            }
            if queue.closing {
                return Work::Finish;
            }
            queue.writer_waits = true;
            queue = match left {
                None => self.ready.wait(queue).unwrap_or_else(PoisonError::into_inner),
                Some(left) => {
                    let waited = self.ready.wait_timeout(queue, left);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
            };
            queue.writer_waits = false;
        }
    }

    /// Somebody waits for frame `seq` to be durable.
    pub(super) fn urge(&self, seq: u64) {
        let mut queue = lock(&self.queue);
        if queue.wanted <= seq && seq < queue.next_seq {
            queue.wanted = seq + 1;
            drop(queue);
            self.ready.notify_one();
        }
    }

    /// Says why nothing can be written now, and waits until it is worth trying again.
    ///
    /// # Errors
    /// [`Error::Closed`] if the journal is being closed: what is queued was never called durable.
    pub(super) fn stall(&self, why: String) -> Result<(), Error> {
        {
            let mut stalled = lock(&self.stalled);
            if stalled.as_ref() != Some(&why) {
                tracing::error!(%why, "the journal is stalled; replication waits, nothing is lost");
                *stalled = Some(why);
            }
        }
        let queue = lock(&self.queue);
        if queue.closing {
            return Err(Error::Closed);
        }
        let (queue, _) = self
            .space
            .wait_timeout(queue, STALL_RETRY)
            .unwrap_or_else(PoisonError::into_inner);
        if queue.closing { Err(Error::Closed) } else { Ok(()) }
    }

    /// Writing goes on.
    pub(super) fn unstall(&self) {
        if lock(&self.stalled).take().is_some() {
            tracing::info!("the journal goes on writing");
        }
    }
}
