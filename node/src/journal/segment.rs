//! Segment files: name, header, and what the process remembers of each.
//!
//! A file is named by the number of its first frame, 20 decimal digits and `.seg`. It begins with a header, all
//! integers little-endian; frames follow, gapless, then zeros up to the reserved length. A sealed file is cut to its
//! last frame.
//!
//! ```text
//! offset  size  field
//!      0     8  magic "AnbrJrn\n"
//!      8     4  format version, 1
//!     12     4  header length, bytes (48 + 16 for each entry)
//!     16     4  crc32c over bytes 0..16 and 20..header length
//!     20     2  node id of the owner
//!     22     2  number of entries
//!     24     8  xxh3 of the cluster's id
//!     32     8  sequence number of the first frame
//!     40     8  salt of the frame checksums
//!     48        entries, one per origin, by node id: origin u16, zero u16, epoch u32, LSN u64: the origin's last
//!               complete position before this segment, so that it is known after older segments are deleted
//! ```
//!
//! Invariants: `written_end` only grows and everything below it is complete frames; `held` is updated before
//! `written_end`, so a reader that sees an end also sees what is below it.
//! Not here: who deletes segments (`retain.rs`), how a file is read after a crash (`recover.rs`).

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use anabranch_proto::{Lsn, NodeId, Position, Vector};
use bytes::{Buf, BufMut};

use super::disk::{Disk, DiskFile};
use super::frame;
use super::meta::{FrameKind, FrameMeta};
use super::shared::lock;

/// Format version that this release reads and writes.
pub(super) const FORMAT: u32 = 1;
/// Length of a header without entries, bytes.
pub(super) const HEADER_LEN_MIN: usize = 48;
/// Length of an entry, bytes.
const ENTRY_LEN: usize = 16;
/// Longest header: an entry for every possible node, bytes.
pub(super) const HEADER_LEN_MAX: usize = HEADER_LEN_MIN + ENTRY_LEN * (u16::MAX as usize);
const MAGIC: [u8; 8] = *b"AnbrJrn\n";

/// Stands for "no position is far enough": parts whose end has not come.
pub(super) const NEVER: Position = Position {
    epoch: u32::MAX,
    lsn: Lsn(u64::MAX),
};

/// Whose journal it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Owner {
    pub(super) node: NodeId,
    pub(super) cluster: u64,
}

impl Owner {
    pub(super) fn new(node: NodeId, cluster: &str) -> Self {
        Self {
            node,
            cluster: xxhash_rust::xxh3::xxh3_64(cluster.as_bytes()),
        }
    }
}

/// A segment's header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct SegmentHeader {
    pub(super) version: u32,
    pub(super) owner: Owner,
    pub(super) first_seq: u64,
    pub(super) salt: u64,
    pub(super) base: Vector,
}

impl SegmentHeader {
    /// The header's bytes; their length is a multiple of [`frame::ALIGN`].
    pub(super) fn encode(&self) -> Vec<u8> {
        // A vector is keyed by 16-bit ids of which 0 is no node, so its length fits.
        let entries = u16::try_from(self.base.len()).unwrap_or(u16::MAX);
        let len = HEADER_LEN_MIN + ENTRY_LEN * usize::from(entries);
        let mut front = Vec::with_capacity(len);
        front.put_slice(&MAGIC);
        front.put_u32_le(self.version);
        front.put_u32_le(u32::try_from(len).unwrap_or(u32::MAX));
        let mut back = Vec::with_capacity(len);
        back.put_u16_le(self.owner.node.0);
        back.put_u16_le(entries);
        back.put_u64_le(self.owner.cluster);
        back.put_u64_le(self.first_seq);
        back.put_u64_le(self.salt);
        for (origin, position) in self.base.iter().take(usize::from(entries)) {
            back.put_u16_le(origin.0);
            back.put_u16_le(0);
            back.put_u32_le(position.epoch);
            back.put_u64_le(position.lsn.0);
        }
        let checksum = crc32c::crc32c_append(crc32c::crc32c(&front), &back);
        front.put_u32_le(checksum);
        front.extend_from_slice(&back);
        front
    }

    /// The header at the beginning of `bytes` and its length, or `None` if there is no whole, correct one.
    pub(super) fn decode(bytes: &[u8]) -> Option<(Self, u64)> {
        let (front, _) = bytes.split_at_checked(16)?;
        let mut from = front.strip_prefix(&MAGIC)?;
        let version = from.try_get_u32_le().ok()?;
        let len = usize::try_from(from.try_get_u32_le().ok()?).ok()?;
        let (whole, _) = bytes.split_at_checked(len)?;
        let (_, mut from) = whole.split_at_checked(16)?;
        let checksum = from.try_get_u32_le().ok()?;
        if crc32c::crc32c_append(crc32c::crc32c(front), from) != checksum {
            return None;
        }
        let node = NodeId(from.try_get_u16_le().ok()?);
        let entries = from.try_get_u16_le().ok()?;
        let cluster = from.try_get_u64_le().ok()?;
        let first_seq = from.try_get_u64_le().ok()?;
        let salt = from.try_get_u64_le().ok()?;
        let mut base = Vector::new();
        for _ in 0..entries {
            let origin = NodeId(from.try_get_u16_le().ok()?);
            let _zero = from.try_get_u16_le().ok()?;
            let epoch = from.try_get_u32_le().ok()?;
            base.raise(
                origin,
                Position {
                    epoch,
                    lsn: Lsn(from.try_get_u64_le().ok()?),
                },
            );
        }
        Some((
            Self {
                version,
                owner: Owner { node, cluster },
                first_seq,
                salt,
                base,
            },
            len as u64,
        ))
    }
}

/// Name of the file whose first frame is number `first_seq`.
pub(super) fn file_name(first_seq: u64) -> String {
    format!("{first_seq:020}.seg")
}

/// The number in a segment's file name; `None` for other files.
pub(super) fn parse_file_name(name: &str) -> Option<u64> {
    let digits = name.strip_suffix(".seg")?;
    (digits.len() == 20 && digits.bytes().all(|byte| byte.is_ascii_digit())).then(|| digits.parse().ok())?
}

/// What a segment holds of one origin.
#[derive(Debug, Clone, Copy)]
pub(super) struct Held {
    /// Where its first frame begins, bytes.
    pub(super) first_offset: u64,
    /// Whoever has everything up to here can start with this segment: `prev` of its first frame, or, if that is a
    /// later piece of a large transaction, the position of that transaction ([`NEVER`] until it is known).
    pub(super) starts_after: Position,
    /// Largest `last` of a frame that is not a part; zero without one.
    complete: Position,
    /// Largest `prev` of a part.
    part_prev: Option<Position>,
    /// What must be stable before the parts here may go: the transaction's position, [`NEVER`] until it is known.
    parts_need: Position,
}

impl Held {
    /// The position that must be stable before this origin lets the segment go.
    pub(super) fn need(&self) -> Position {
        self.complete.max(self.parts_need)
    }

    /// Is there a frame here for a reader that has everything up to `after`?
    pub(super) fn concerns(&self, after: Position) -> bool {
        self.complete > after || self.part_prev.is_some_and(|prev| prev >= after)
    }
}

/// One segment file, as long as it is in the index or a cursor stands in it.
#[derive(Debug)]
pub(super) struct Segment {
    pub(super) path: PathBuf,
    pub(super) first_seq: u64,
    pub(super) header_len: u64,
    /// Start of the frame header checksums, from the salt.
    pub(super) seed: u32,
    /// Every origin's last complete position before this segment.
    pub(super) base: Vector,
    /// End of the last frame that readers may see, bytes.
    written_end: AtomicU64,
    /// Length of the file with what is reserved, bytes.
    pub(super) disk_len: AtomicU64,
    /// No frame will be added. Set after the last change of `written_end`.
    sealed: AtomicBool,
    /// The open file: shared by readers, taken away on removal so that an idle reader does not keep the space.
    file: Mutex<FileSlot>,
    held: Mutex<HashMap<NodeId, Held>>,
    /// Numbers of frames and where they begin, some [`MARK_BYTES`] apart; of what was written in this life.
    marks: Mutex<Vec<(u64, u64)>>,
}

/// See [`Segment::mark`].
const MARK_BYTES: u64 = 64 * 1024;

#[derive(Debug)]
enum FileSlot {
    Closed,
    Open(Arc<dyn DiskFile>),
    Removed,
}

impl Segment {
    /// A segment whose frames end at `header_len`, that is: none yet.
    pub(super) fn new(path: PathBuf, header: SegmentHeader, header_len: u64, disk_len: u64) -> Self {
        Self {
            path,
            first_seq: header.first_seq,
            header_len,
            seed: frame::seed(header.salt),
            base: header.base,
            written_end: AtomicU64::new(header_len),
            disk_len: AtomicU64::new(disk_len),
            sealed: AtomicBool::new(false),
            file: Mutex::new(FileSlot::Closed),
            held: Mutex::new(HashMap::new()),
            marks: Mutex::default(),
        }
    }

    /// Notes where the frame with this number begins, so that a reader who knows nothing else finds it.
    pub(super) fn mark(&self, seq: u64, offset: u64) {
        let mut marks = lock(&self.marks);
        if marks
            .last()
            .is_none_or(|&(_, last)| offset.saturating_sub(last) >= MARK_BYTES)
        {
            marks.push((seq, offset));
        }
    }

    /// A place at or before the frame with this number, which is here or comes after all that is.
    pub(super) fn near(&self, seq: u64) -> u64 {
        let marks = lock(&self.marks);
        let after = marks.partition_point(|&(marked, _)| marked <= seq);
        let before = after.checked_sub(1).and_then(|at| marks.get(at));
        before.map_or(self.header_len, |&(_, offset)| offset)
    }

    /// End of what readers may see, bytes.
    pub(super) fn written_end(&self) -> u64 {
        self.written_end.load(Ordering::Acquire)
    }

    /// Lets readers see up to `end`.
    pub(super) fn publish(&self, end: u64) {
        self.written_end.store(end, Ordering::Release);
    }

    /// Will no frame be added any more? Ask before [`Self::written_end`], never after.
    pub(super) fn is_sealed(&self) -> bool {
        self.sealed.load(Ordering::Acquire)
    }

    /// Nothing more will be published; the file is now `disk_len` bytes long.
    pub(super) fn seal(&self, disk_len: u64) {
        self.disk_len.store(disk_len, Ordering::Relaxed);
        self.sealed.store(true, Ordering::Release);
    }

    /// The file, opened if need be; `None` once the segment is removed.
    pub(super) fn file(&self, disk: &dyn Disk) -> io::Result<Option<Arc<dyn DiskFile>>> {
        let mut slot = lock(&self.file);
        match &*slot {
            FileSlot::Open(file) => Ok(Some(Arc::clone(file))),
            FileSlot::Removed => Ok(None),
            FileSlot::Closed => {
                let file = disk.open(&self.path)?;
                *slot = FileSlot::Open(Arc::clone(&file));
                Ok(Some(file))
            }
        }
    }

    /// Keeps an already open file.
    pub(super) fn set_file(&self, file: Arc<dyn DiskFile>) {
        *lock(&self.file) = FileSlot::Open(file);
    }

    /// Closes the file of a sealed segment that a reader has left; the next reader opens it again.
    pub(super) fn close_file(&self) {
        let mut slot = lock(&self.file);
        if self.is_sealed() && matches!(*slot, FileSlot::Open(_)) {
            *slot = FileSlot::Closed;
        }
    }

    /// From here on the segment is gone for readers.
    pub(super) fn mark_removed(&self) {
        *lock(&self.file) = FileSlot::Removed;
    }

    /// What it holds of `origin`.
    pub(super) fn held(&self, origin: NodeId) -> Option<Held> {
        lock(&self.held).get(&origin).copied()
    }

    /// Notes a frame at `offset`. Call before publishing it.
    pub(super) fn note(&self, meta: &FrameMeta, offset: u64) {
        let mut held = lock(&self.held);
        let held = held.entry(meta.origin).or_insert(Held {
            first_offset: offset,
            starts_after: match meta.kind {
                FrameKind::Part if meta.part > 0 => NEVER,
                FrameKind::End if meta.part > 0 => meta.last,
                _ => meta.prev,
            },
            complete: Position::ZERO,
            part_prev: None,
            parts_need: Position::ZERO,
        });
        match meta.kind {
            FrameKind::Part => {
                held.part_prev = held.part_prev.max(Some(meta.prev));
                held.parts_need = NEVER;
            }
            FrameKind::Whole | FrameKind::End => held.complete = held.complete.max(meta.last),
        }
    }

    /// The transaction whose parts are here, or the one that came in its place, ended at `last`.
    pub(super) fn resolve_parts(&self, origin: NodeId, last: Position) {
        if let Some(held) = lock(&self.held).get_mut(&origin) {
            held.parts_need = last;
            held.starts_after = if held.starts_after == NEVER {
                last
            } else {
                held.starts_after
            };
        }
    }

    /// Does `stable` cover every frame here? True for a segment without frames.
    pub(super) fn is_covered(&self, stable: &Vector) -> bool {
        lock(&self.held)
            .iter()
            .all(|(&origin, held)| stable.covers(origin, held.need()))
    }
}

/// Path of the file whose first frame is number `first_seq`.
pub(super) fn path(dir: &Path, first_seq: u64) -> PathBuf {
    dir.join(file_name(first_seq))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn header(entries: u16) -> SegmentHeader {
        SegmentHeader {
            version: FORMAT,
            owner: Owner::new(NodeId(3), "c"),
            first_seq: 9,
            salt: 77,
            base: (1..=entries)
                .map(|id| (NodeId(id), Position::new(1, u64::from(id) * 8)))
                .collect(),
        }
    }

    #[test]
    fn a_header_reads_back() {
        for entries in [0, 1, 5, 300] {
            let bytes = header(entries).encode();
            assert_eq!(bytes.len() % 8, 0);
            let mut longer = bytes.clone();
            longer.extend_from_slice(&[1, 2, 3]);
            assert_eq!(
                SegmentHeader::decode(&longer),
                Some((header(entries), bytes.len() as u64))
            );
            assert_eq!(SegmentHeader::decode(&bytes[..bytes.len() - 1]), None);
        }
    }

    #[test]
    fn only_twenty_digits_name_a_segment() {
        assert_eq!(parse_file_name(&file_name(42)), Some(42));
        assert_eq!(parse_file_name(&file_name(u64::MAX)), Some(u64::MAX));
        assert_eq!(parse_file_name("42.seg"), None);
        assert_eq!(parse_file_name("99999999999999999999.seg"), None);
        assert_eq!(parse_file_name("+0000000000000000042.seg"), None);
        assert_eq!(parse_file_name("00000000000000000042.tmp"), None);
    }

    proptest! {
        #[test]
        fn every_flipped_bit_of_a_header_is_noticed(entries in 0u16..4, bit: prop::sample::Index) {
            let mut bytes = header(entries).encode();
            let bit = bit.index(bytes.len() * 8);
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert_eq!(SegmentHeader::decode(&bytes), None);
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes: Vec<u8>) {
            prop_assert_eq!(SegmentHeader::decode(&bytes), None);
        }
    }
}
