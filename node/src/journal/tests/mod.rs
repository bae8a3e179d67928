//! Tests of the journal as a whole.

mod basic;
mod crash;
mod damage;
mod fake;
mod killed;
mod memory;

use std::path::Path;
use std::sync::Arc;

use anabranch_proto::{NodeId, Position};
use bytes::Bytes;

use super::*;

fn options(dir: &Path) -> Options {
    Options {
        dir: dir.to_owned(),
        segment_bytes: 64 * 1024,
        max_bytes: 1 << 30,
        sync_within: Duration::from_micros(200),
        node: NodeId(1),
        cluster: "test".into(),
    }
}

fn open(dir: &Path) -> (Journal, Recovered) {
    Journal::open(options(dir), Arc::new(RealDisk)).unwrap()
}

fn at(lsn: u64) -> Position {
    if lsn == 0 {
        Position::ZERO
    } else {
        Position::new(1, lsn)
    }
}

/// One origin's stream of frames, each continuing the one before.
#[derive(Debug, Clone)]
struct Origin {
    id: NodeId,
    last: u64,
    run: u64,
}

impl Origin {
    fn new(id: u16) -> Self {
        Self {
            id: NodeId(id),
            last: 0,
            run: 0,
        }
    }

    fn meta(&self, kind: FrameKind, last: u64, part: u32, len: usize) -> FrameMeta {
        FrameMeta {
            origin: self.id,
            prev: at(self.last),
            last: at(last),
            kind,
            txn_count: u32::from(kind != FrameKind::Part),
            part,
            part_run: if kind == FrameKind::Whole { 0 } else { self.run },
            codec: Codec::Plain,
            raw_len: u32::try_from(len).unwrap(),
        }
    }

    /// The next transactions, with a payload of `len` bytes.
    fn whole(&mut self, len: usize) -> Frame {
        let meta = self.meta(FrameKind::Whole, self.last + 10, 0, len);
        self.last += 10;
        Frame {
            meta,
            payload: payload(&meta, len),
        }
    }

    /// Piece number `part` of the next transaction.
    fn part(&mut self, part: u32, len: usize) -> Frame {
        if part == 0 {
            self.run += 1;
        }
        let meta = self.meta(FrameKind::Part, self.last, part, len);
        Frame {
            meta,
            payload: payload(&meta, len),
        }
    }

    /// The last piece of the next transaction.
    fn end(&mut self, part: u32, len: usize) -> Frame {
        let meta = self.meta(FrameKind::End, self.last + 10, part, len);
        self.last += 10;
        Frame {
            meta,
            payload: payload(&meta, len),
        }
    }
}

/// Bytes that only this frame has.
fn payload(meta: &FrameMeta, len: usize) -> Bytes {
    let seed = meta.prev.lsn.0
        ^ (u64::from(meta.part) << 40)
        ^ (meta.part_run << 50)
        ^ u64::from(meta.origin.0) << 32;
    let words = (0u64..).flat_map(|word| (seed ^ word.wrapping_mul(0x9E37_79B9_7F4A_7C15)).to_le_bytes());
    words.take(len).collect()
}

fn same(a: &Frame, b: &Frame) -> bool {
    a.meta == b.meta && a.payload == b.payload
}

/// All frames of an origin after `after` that are written now.
fn read_all(journal: &Journal, origin: NodeId, after: Position) -> Result<Vec<Located>, Error> {
    let mut cursor = journal.cursor(origin, after)?;
    let mut frames = Vec::new();
    while let Some(located) = cursor.try_next()? {
        frames.push(located);
    }
    Ok(frames)
}
