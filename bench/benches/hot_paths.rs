//! What a daemon does for every transaction, alone and without a server: reading a message of the walsender, admitting a
//! version to a row's frontier, appending a frame to the journal.
//!
//!     cargo bench --workspace --bench hot_paths
//!
//! Numbers of one machine, to compare one change with another; what users see is measured by `anabranch-bench`.

// Nobody's data depends on a benchmark: it may stop at once.
#![allow(clippy::unwrap_used, missing_docs)]

use std::hint::black_box;
use std::path::Path;
use std::sync::Arc;

use anabranch_conflict::frontier::Frontier;
use anabranch_conflict::{Kind, Version};
use anabranch_node::journal::{Codec, Frame, FrameKind, FrameMeta, Journal, Options, RealDisk, pack};
use anabranch_node::source::pgoutput::Message;
use anabranch_proto::stamp::NTP64;
use anabranch_proto::{NodeId, Position, Stamp, Vector};
use bytes::{BufMut, Bytes, BytesMut};
use divan::Bencher;
use divan::counter::{BytesCount, ItemsCount};

fn main() {
    divan::main();
}

/// A row of the benchmark's narrow table (bigint, two ints, 80 bytes of text), as pgoutput sends it with `binary`.
fn tuple(out: &mut BytesMut, key: i64) {
    out.put_i16(4);
    for value in [&key.to_be_bytes()[..], &[0, 0, 0, 1], &[0, 0, 0, 2], &[b'x'; 80]] {
        out.put_u8(b'b');
        out.put_i32(i32::try_from(value.len()).unwrap());
        out.put_slice(value);
    }
}

fn insert() -> Bytes {
    let mut out = BytesMut::new();
    out.put_u8(b'I');
    out.put_u32(16_384);
    out.put_u8(b'N');
    tuple(&mut out, 7);
    out.freeze()
}

/// With the former row, which replica identity FULL sends.
fn update() -> Bytes {
    let mut out = BytesMut::new();
    out.put_u8(b'U');
    out.put_u32(16_384);
    out.put_u8(b'O');
    tuple(&mut out, 7);
    out.put_u8(b'N');
    tuple(&mut out, 7);
    out.freeze()
}

#[divan::bench(args = ["insert", "update"])]
fn decode(bencher: Bencher<'_, '_>, what: &str) {
    let frame = if what == "insert" { insert() } else { update() };
    bencher
        .counter(ItemsCount::new(1usize))
        .bench(|| Message::parse(black_box(&frame)).unwrap());
}

fn position(lsn: u64) -> Position {
    Position::new(1, lsn)
}

/// One row written by so many nodes in turn, each of which has seen all before; then by all of them at once.
#[divan::bench(args = [2, 5])]
fn frontier_admit(bencher: Bencher<'_, '_>, nodes: u16) {
    let writes: Vec<(Version, Vector)> = (0..100_u64)
        .flat_map(|round| (1..=nodes).map(move |node| (round, node)))
        .map(|(round, node)| {
            let at = round * u64::from(nodes) + u64::from(node);
            let version = Version {
                stamp: Stamp {
                    time: NTP64(at),
                    node: NodeId(node),
                },
                position: position(at),
                kind: Kind::Put,
            };
            let seen = if round % 2 == 0 {
                at - 1
            } else {
                at - u64::from(node)
            };
            (
                version,
                (1..=nodes).map(|node| (NodeId(node), position(seen))).collect(),
            )
        })
        .collect();
    bencher.counter(ItemsCount::new(writes.len())).bench(|| {
        let mut frontier = Frontier::new();
        for (version, deps) in &writes {
            black_box(frontier.admit(*version, (), deps));
        }
        frontier
    });
}

fn journal_in(folder: &Path) -> Journal {
    let options = Options {
        dir: folder.join("journal"),
        segment_bytes: 64 << 20,
        max_bytes: 16 << 30,
        sync_within: std::time::Duration::from_millis(20),
        node: NodeId(1),
        cluster: "bench".to_owned(),
    };
    let (journal, _) = Journal::open(options, Arc::new(RealDisk)).unwrap();
    journal
}

/// The frame that continues the one before `last`.
fn frame(last: u64, payload: &Bytes) -> Frame {
    let before = last - 1;
    let meta = FrameMeta {
        origin: NodeId(1),
        prev: if before == 0 {
            Position::ZERO
        } else {
            position(before)
        },
        last: position(last),
        kind: FrameKind::Whole,
        txn_count: 1,
        part: 0,
        part_run: 0,
        codec: Codec::Plain,
        raw_len: u32::try_from(payload.len()).unwrap(),
    };
    Frame {
        meta,
        payload: payload.clone(),
    }
}

/// 1,000 frames written, and synced at the end: many small transactions under way at once.
#[divan::bench(args = [200, 16_384], sample_count = 20)]
fn journal_append(bencher: Bencher<'_, '_>, len: usize) {
    const FRAMES: usize = 1_000;
    let folder = tempfile::tempdir().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let journal = journal_in(folder.path());
    let mut last = 0;
    let payload = Bytes::from(vec![7; len]);
    bencher
        .counter(ItemsCount::new(FRAMES))
        .counter(BytesCount::new(FRAMES * len))
        .bench_local(|| {
            runtime.block_on(async {
                let mut seq = 0;
                for _ in 0..FRAMES {
                    last += 1;
                    seq = journal.append(frame(last, &payload)).await.unwrap();
                }
                journal.wait_durable(seq).await.unwrap();
            });
        });
}

/// One small frame, waited for by itself: what the commit of a lone transaction waits for at its receiver.
#[divan::bench(sample_count = 500, sample_size = 1)]
fn journal_sync(bencher: Bencher<'_, '_>) {
    let folder = tempfile::tempdir().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let journal = journal_in(folder.path());
    let mut last = 0;
    let payload = Bytes::from(vec![7; 200]);
    bencher.bench_local(|| {
        runtime.block_on(async {
            last += 1;
            let seq = journal.append(frame(last, &payload)).await.unwrap();
            journal.wait_durable(seq).await.unwrap();
        });
    });
}

/// A frame of rows before it is written.
#[divan::bench]
fn journal_pack(bencher: Bencher<'_, '_>) {
    let mut rows = BytesMut::new();
    for key in 0..500 {
        tuple(&mut rows, key);
    }
    let rows = rows.freeze();
    bencher
        .counter(BytesCount::new(rows.len()))
        .bench(|| pack(black_box(rows.clone())).unwrap());
}
