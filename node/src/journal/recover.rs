//! Reads the journal's folder at start: checks everything, cuts a torn tail, finds where to go on.
//!
//! In: the folder. Out: the index of segments, every origin's end, and the active segment ready for appending.
//! Older segments are walked by frame headers (a cursor checks payloads when it reads them); the last one is checked in
//! full. Cut, with a warning: frames of the last write group that are not whole, which nobody was told are durable.
//! Refused, naming file and offset: anything else that is not as it was written. Nothing is skipped.
//! On crash: may run again from the beginning at any point. Not here: the file formats (`segment.rs`, `frame.rs`).

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use anabranch_proto::Vector;

use super::Options;
use super::disk::{Disk, DiskFile};
use super::error::Error;
use super::frame::{self, Flaw, HEADER_LEN, Header, MAGIC};
use super::ledger::{OpenParts, Tails};
use super::segment::{self, FORMAT, HEADER_LEN_MAX, Owner, Segment, SegmentHeader};
use super::window::Window;
use super::writer::{Trouble, create};
use crate::small_file::is_no_space;

/// What recovery found and made ready.
pub(super) struct Recovery {
    pub(super) index: VecDeque<Arc<Segment>>,
    pub(super) tails: Tails,
    pub(super) open_parts: OpenParts,
    pub(super) active: Arc<Segment>,
    pub(super) file: Arc<dyn DiskFile>,
    /// End of the active segment's frames, bytes.
    pub(super) end: u64,
    pub(super) next_seq: u64,
    pub(super) disk_bytes: u64,
}

/// Opens the journal's folder, which exists and is locked.
pub(super) fn recover(disk: &dyn Disk, options: &Options, owner: Owner) -> Result<Recovery, Error> {
    let mut found = list(disk, options)?;
    drop_unfinished(disk, options, &mut found)?;

    let Some(last) = found.pop() else {
        return begin(disk, options, owner);
    };
    let mut state = Walked {
        index: VecDeque::new(),
        tails: None,
        open_parts: OpenParts::default(),
        next_seq: 0,
    };
    // One after the other: while a member is away they may become more than a process may have open.
    for first_seq in found {
        state.walk_sealed(Opened::open(disk, options, first_seq)?, owner)?;
    }
    state.walk_last(disk, options, Opened::open(disk, options, last)?, owner)
}

/// Numbers of the segments in the folder, ascending.
fn list(disk: &dyn Disk, options: &Options) -> Result<Vec<u64>, Error> {
    let names = disk
        .list(&options.dir)
        .map_err(|error| Error::io("list", &options.dir, error))?;
    let mut numbers = Vec::with_capacity(names.len());
    for name in names {
        match name.to_str().and_then(segment::parse_file_name) {
            Some(number) => numbers.push(number),
            None => tracing::warn!(
                ?name,
                "a file in the journal's folder is none of its segments; it is left alone"
            ),
        }
    }
    numbers.sort_unstable();
    Ok(numbers)
}

/// An empty folder becomes a journal.
fn begin(disk: &dyn Disk, options: &Options, owner: Owner) -> Result<Recovery, Error> {
    let (segment, file) =
        create(disk, options, owner, 0, &Vector::new(), 0).map_err(|trouble| match trouble {
            Trouble::NoSpace(why) => Error::io("begin the journal in", &options.dir, io::Error::other(why)),
            Trouble::Fatal(error) => error,
        })?;
    let active = Arc::new(segment);
    Ok(Recovery {
        index: VecDeque::from([Arc::clone(&active)]),
        tails: Tails::default(),
        open_parts: OpenParts::default(),
        end: active.header_len,
        next_seq: 0,
        disk_bytes: active.disk_len.load(Ordering::Relaxed),
        active,
        file,
    })
}

/// A segment file before its frames are looked at.
struct Opened {
    path: std::path::PathBuf,
    first_seq: u64,
    file: Arc<dyn DiskFile>,
    len: u64,
    header: Option<(SegmentHeader, u64)>,
}

impl Opened {
    fn open(disk: &dyn Disk, options: &Options, first_seq: u64) -> Result<Self, Error> {
        let path = segment::path(&options.dir, first_seq);
        let read = || {
            let file = disk.open(&path)?;
            let len = file.len()?;
            // Most headers are short; read the rest only if the length says so.
            let mut bytes = vec![0; usize::try_from(len).unwrap_or(usize::MAX).min(4096)];
            let count = file.read_at(&mut bytes, 0)?;
            bytes.truncate(count);
            let mut header = SegmentHeader::decode(&bytes);
            if header.is_none() && len > 4096 {
                bytes.resize(usize::try_from(len).unwrap_or(usize::MAX).min(HEADER_LEN_MAX), 0);
                let count = file.read_at(&mut bytes, 0)?;
                bytes.truncate(count);
                header = SegmentHeader::decode(&bytes);
            }
            io::Result::Ok((file, len, header))
        };
        let (file, len, header) = read().map_err(|error| Error::io("read", &path, error))?;
        Ok(Self {
            path,
            first_seq,
            file,
            len,
            header,
        })
    }

    /// Was it created only in part? Frames are written only after the header is durable, so then there is none.
    fn is_unfinished(&self) -> Result<bool, Error> {
        if self.header.is_some() {
            return Ok(false);
        }
        let mut found = false;
        scan(&*self.file, 0, self.len, |_, is_magic| found |= is_magic)
            .map_err(|error| Error::io("read", &self.path, error))?;
        Ok(!found)
    }

    /// The segment, if it is this journal's and continues it.
    fn into_segment(
        self,
        owner: Owner,
        expected_seq: Option<u64>,
    ) -> Result<(Segment, Arc<dyn DiskFile>), Error> {
        let Some((header, header_len)) = self.header else {
            return Err(Error::corrupt(&self.path, 0, "the file's header is wrong"));
        };
        if header.version != FORMAT {
            return Err(Error::Version {
                file: self.path,
                found: header.version,
                expected: FORMAT,
            });
        }
        if header.owner != owner {
            let name = |owner: Owner| format!("node {} of cluster {:016x}", owner.node, owner.cluster);
            return Err(Error::Foreign {
                file: self.path,
                found: name(header.owner),
                expected: name(owner),
            });
        }
        if header.first_seq != self.first_seq {
            return Err(Error::corrupt(
                &self.path,
                0,
                format!("the file holds frames from {} on", header.first_seq),
            ));
        }
        if expected_seq.is_some_and(|expected| expected != self.first_seq) {
            let expected = expected_seq.unwrap_or_default();
            return Err(Error::corrupt(
                &self.path,
                0,
                format!("the file with frame {expected} should come before it"),
            ));
        }
        let segment = Segment::new(self.path, header, header_len, self.len);
        segment.set_file(Arc::clone(&self.file));
        Ok((segment, self.file))
    }
}

/// Removes a last segment that a crash left half created.
fn drop_unfinished(disk: &dyn Disk, options: &Options, found: &mut Vec<u64>) -> Result<(), Error> {
    let Some(&last) = found.last() else { return Ok(()) };
    let last = Opened::open(disk, options, last)?;
    // A lone segment other than the first always was complete: those before it were deleted for it.
    if !last.is_unfinished()? || (found.len() == 1 && last.first_seq != 0) {
        return Ok(());
    }
    tracing::warn!(file = %last.path.display(), "removing a journal file that was being created when the daemon stopped");
    disk.remove(&last.path)
        .and_then(|()| disk.sync_dir(&options.dir))
        .map_err(|error| Error::io("remove", &last.path, error))?;
    found.pop();
    Ok(())
}

/// What is known after walking some segments.
struct Walked {
    index: VecDeque<Arc<Segment>>,
    /// `None` before the first segment.
    tails: Option<Tails>,
    open_parts: OpenParts,
    next_seq: u64,
}

impl Walked {
    /// Takes a segment as the next one.
    fn enter(&mut self, opened: Opened, owner: Owner) -> Result<(Arc<Segment>, Arc<dyn DiskFile>), Error> {
        let expected = self.tails.is_some().then_some(self.next_seq);
        let (segment, file) = opened.into_segment(owner, expected)?;
        match &self.tails {
            None => self.tails = Some(Tails::new(segment.base.clone())),
            Some(tails) if *tails.complete() != segment.base => {
                let what = format!(
                    "the file continues {}, but those before it end at {}",
                    segment.base,
                    tails.complete()
                );
                return Err(Error::corrupt(&segment.path, 0, what));
            }
            Some(_) => {}
        }
        self.next_seq = segment.first_seq;
        Ok((Arc::new(segment), file))
    }

    /// Walks frames from the segment's first on. Returns where it stopped, and why if not at the file's end.
    fn walk(
        &mut self,
        segment: &Arc<Segment>,
        file: &dyn DiskFile,
        payloads: Payloads,
    ) -> Result<(u64, Option<Flaw>), Error> {
        let len = segment.disk_len.load(Ordering::Relaxed);
        let mut window = Window::default();
        let mut offset = segment.header_len;
        while offset < len {
            let step = read_frame(
                &mut window,
                file,
                segment.seed,
                offset,
                len,
                self.next_seq,
                payloads,
            )
            .map_err(|error| Error::io("read", &segment.path, error))?;
            let header = match step {
                Ok(header) => header,
                Err(flaw) => return Ok((offset, Some(flaw))),
            };
            self.open_parts.note(segment, &header.meta, offset);
            if let Some(tails) = &mut self.tails {
                tails.note(&header.meta);
            }
            self.next_seq += 1;
            offset += header.disk_len();
        }
        Ok((offset, None))
    }

    fn walk_sealed(&mut self, opened: Opened, owner: Owner) -> Result<(), Error> {
        let (segment, file) = self.enter(opened, owner)?;
        let (end, flaw) = self.walk(&segment, &*file, Payloads::Skipped)?;
        if let Some(flaw) = flaw {
            return Err(Error::corrupt(&segment.path, end, flaw.to_string()));
        }
        segment.publish(end);
        segment.seal(end);
        segment.close_file();
        self.index.push_back(segment);
        Ok(())
    }

    fn walk_last(
        mut self,
        disk: &dyn Disk,
        options: &Options,
        last: Opened,
        owner: Owner,
    ) -> Result<Recovery, Error> {
        let (active, file) = self.enter(last, owner)?;
        let (end, flaw) = self.walk(&active, &*file, Payloads::Checked)?;
        let len = active.disk_len.load(Ordering::Relaxed);
        let failed = |error| Error::io("repair", &active.path, error);
        if let Some(flaw) = flaw {
            match judge_tail(&*file, active.seed, end, len, self.next_seq).map_err(failed)? {
                Tail::Blank => {}
                Tail::Torn => {
                    tracing::warn!(
                        file = %active.path.display(), offset = end, %flaw, next = self.next_seq,
                        "cutting what was being written to the journal when the daemon stopped; none of it was durable"
                    );
                    // Also what lies behind: an old frame there must never follow a new one.
                    file.truncate(end)
                        .and_then(|()| file.sync_all())
                        .map_err(failed)?;
                }
                Tail::Damaged { next } => {
                    let what = format!(
                        "{flaw}, where frame {} should be; a later frame is at byte {next}",
                        self.next_seq
                    );
                    return Err(Error::corrupt(&active.path, end, what));
                }
            }
        }
        match file.allocate(options.segment_bytes) {
            // The writer will say so when it needs the space.
            Err(error) if !is_no_space(&error) => return Err(failed(error)),
            _ => {}
        }
        // What was read may be in the page cache only, after the process alone was killed.
        file.sync_all().map_err(failed)?;
        disk.sync_dir(&options.dir)
            .map_err(|error| Error::io("make durable", &options.dir, error))?;
        active
            .disk_len
            .store(file.len().map_err(failed)?, Ordering::Relaxed);
        active.publish(end);
        self.index.push_back(Arc::clone(&active));
        let disk_bytes = self
            .index
            .iter()
            .map(|segment| segment.disk_len.load(Ordering::Relaxed))
            .sum();
        Ok(Recovery {
            index: self.index,
            tails: self.tails.unwrap_or_default(),
            open_parts: self.open_parts,
            active,
            file,
            end,
            next_seq: self.next_seq,
            disk_bytes,
        })
    }
}

/// What a walk does with payloads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Payloads {
    Checked,
    Skipped,
}

/// Reads the frame at `offset`, which should be number `seq`.
fn read_frame(
    window: &mut Window,
    file: &dyn DiskFile,
    seed: u32,
    offset: u64,
    len: u64,
    seq: u64,
    payloads: Payloads,
) -> io::Result<Result<Header, Flaw>> {
    let Some(bytes) = window.view(file, offset, HEADER_LEN, len)? else {
        return Ok(Err(Flaw::Short));
    };
    let header = match Header::decode(bytes, seed) {
        Ok(header) if header.seq == seq => header,
        Ok(_) => return Ok(Err(Flaw::Sequence)),
        Err(flaw) => return Ok(Err(flaw)),
    };
    if len - offset < header.disk_len() {
        return Ok(Err(Flaw::PayloadShort));
    }
    if payloads == Payloads::Checked {
        let mut at = offset + HEADER_LEN as u64;
        let end = at + u64::from(header.payload_len);
        let mut crc = 0;
        while at < end {
            let Some(bytes) = window.chunk(file, at, len)? else {
                return Ok(Err(Flaw::PayloadShort));
            };
            let left = usize::try_from(end - at).unwrap_or(usize::MAX);
            let bytes = bytes.get(..left).unwrap_or(bytes);
            crc = crc32c::crc32c_append(crc, bytes);
            at += bytes.len() as u64;
        }
        if crc != header.payload_crc {
            return Ok(Err(Flaw::PayloadChecksum));
        }
    }
    Ok(Ok(header))
}

/// What follows the last good frame.
#[derive(Debug, PartialEq, Eq)]
enum Tail {
    /// Zeros: nothing was written.
    Blank,
    /// Part of one group that was never durable.
    Torn,
    /// A frame of a later group begins at `next`: what should be before it was durable, and is not there.
    Damaged { next: u64 },
}

/// Judges what lies between `from`, where frame `seq` should begin, and `len`.
fn judge_tail(file: &dyn DiskFile, seed: u32, from: u64, len: u64, seq: u64) -> io::Result<Tail> {
    let mut candidates = Vec::new();
    let mut blank = true;
    scan(file, from, len, |offset, is_magic| {
        blank = false;
        if is_magic {
            candidates.push(offset);
        }
    })?;
    let mut window = Window::default();
    for next in candidates {
        let Some(bytes) = window.view(file, next, HEADER_LEN, len)? else {
            break;
        };
        // The salted checksum makes it a frame of this segment. It belongs to the group of the missing frame, which
        // then was not durable, or to a later one.
        if Header::decode(bytes, seed).is_ok_and(|header| header.group_first > seq) {
            return Ok(Tail::Damaged { next });
        }
    }
    Ok(if blank { Tail::Blank } else { Tail::Torn })
}

/// Calls `visit(offset, looks like a frame)` for every aligned word in `from..len` that is not zero.
fn scan(file: &dyn DiskFile, from: u64, len: u64, mut visit: impl FnMut(u64, bool)) -> io::Result<()> {
    const CHUNK_LEN: usize = 256 * 1024;
    let mut bytes = vec![0; CHUNK_LEN];
    // Mostly there is nothing but space that was reserved: compared as a whole, since byte by byte it is most of a start.
    let zeros = vec![0; CHUNK_LEN];
    let mut offset = from;
    while offset < len {
        let want = CHUNK_LEN.min(usize::try_from(len - offset).unwrap_or(CHUNK_LEN));
        let count = file.read_at(bytes.get_mut(..want).unwrap_or_default(), offset)?;
        let got = bytes.get(..count).unwrap_or_default();
        if zeros.get(..count) != Some(got) {
            for (at, word) in (offset..).step_by(8).zip(got.chunks(8)) {
                if word.iter().any(|&byte| byte != 0) {
                    visit(at, word.starts_with(&MAGIC));
                }
            }
        }
        if count < want {
            break;
        }
        offset += count as u64;
    }
    Ok(())
}

const _: () = assert!(frame::ALIGN == 8, "`scan` steps by the alignment of frames");
