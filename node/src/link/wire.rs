//! Conversions between the domain's types and the link protocol's messages.
//!
//! In:   messages of a peer, which may hold anything        Out: domain values, or what is wrong with the message
//! Holds: nothing
//! Invariants: 1. nothing read from the wire panics or is trusted; 2. a frame survives the trip unchanged.
//! Not here: whether a frame is wanted (`holds.rs`), whether a peer is welcome (`handshake.rs`).

use anabranch_proto::link as pb;
use anabranch_proto::{Lsn, NodeId, Position, Vector};

use super::limits::{FRAME_PAYLOAD_BYTES_MAX, FRAME_RAW_BYTES_MAX};
use crate::journal::{Codec, Frame, FrameKind, FrameMeta};

/// Why a frame of a peer was not even looked at.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BadFrame {
    /// An origin that no node can have.
    #[error("frame of origin {0}, which is not a node id")]
    Origin(u32),
    /// An unknown kind.
    #[error("frame of unknown kind {0}; the peer may run a newer version of anabranch")]
    Kind(u32),
    /// An unknown packing.
    #[error("frame with unknown codec {0}; the peer may run a newer version of anabranch")]
    Codec(u32),
    /// Larger than any frame may be.
    #[error("frame of {0} bytes, larger than any frame may be")]
    TooLarge(u64),
    /// Positions that do not fit its kind.
    #[error("{kind:?} frame from {prev} to {last}, which no journal writes")]
    Positions {
        /// The frame's kind.
        kind: FrameKind,
        /// Its `prev`.
        prev: Position,
        /// Its `last`.
        last: Position,
    },
    /// Something else that does not fit its kind.
    #[error(
        "{kind:?} frame with {txn_count} transactions, part {part} of run {part_run}, which no journal writes"
    )]
    Shape {
        /// The frame's kind.
        kind: FrameKind,
        /// Its count of transactions.
        txn_count: u32,
        /// Its number.
        part: u32,
        /// Its run.
        part_run: u64,
    },
    /// Unpacked length and packed payload contradict each other.
    #[error("plain frame of {payload} bytes that says it is {raw} bytes long")]
    Length {
        /// Bytes of payload.
        payload: u64,
        /// Bytes that it says it has.
        raw: u32,
    },
}

const KIND_WHOLE: u32 = 0;
const KIND_PART: u32 = 1;
const KIND_END: u32 = 2;
const CODEC_PLAIN: u32 = 0;
const CODEC_LZ4: u32 = 1;

/// A frame as it travels; the payload is shared, not copied.
#[must_use]
pub(super) fn frame_to_wire(frame: Frame) -> pb::Frame {
    let meta = frame.meta;
    pb::Frame {
        origin: u32::from(meta.origin.0),
        prev_epoch: meta.prev.epoch,
        prev_lsn: meta.prev.lsn.0,
        last_epoch: meta.last.epoch,
        last_lsn: meta.last.lsn.0,
        kind: match meta.kind {
            FrameKind::Whole => KIND_WHOLE,
            FrameKind::Part => KIND_PART,
            FrameKind::End => KIND_END,
        },
        txn_count: meta.txn_count,
        codec: match meta.codec {
            Codec::Plain => CODEC_PLAIN,
            Codec::Lz4 => CODEC_LZ4,
        },
        raw_len: meta.raw_len,
        payload: frame.payload,
        part: meta.part,
        part_run: meta.part_run,
    }
}

/// A frame from a peer, checked in itself.
///
/// # Errors
/// When no journal can have written it.
pub(super) fn frame_from_wire(wire: pb::Frame) -> Result<Frame, BadFrame> {
    let origin = node_id(wire.origin).ok_or(BadFrame::Origin(wire.origin))?;
    let kind = match wire.kind {
        KIND_WHOLE => FrameKind::Whole,
        KIND_PART => FrameKind::Part,
        KIND_END => FrameKind::End,
        other => return Err(BadFrame::Kind(other)),
    };
    let codec = match wire.codec {
        CODEC_PLAIN => Codec::Plain,
        CODEC_LZ4 => Codec::Lz4,
        other => return Err(BadFrame::Codec(other)),
    };
    let meta = FrameMeta {
        origin,
        prev: Position::new(wire.prev_epoch, wire.prev_lsn),
        last: Position::new(wire.last_epoch, wire.last_lsn),
        kind,
        txn_count: wire.txn_count,
        part: wire.part,
        part_run: wire.part_run,
        codec,
        raw_len: wire.raw_len,
    };
    check_meta(&meta, wire.payload.len())?;
    Ok(Frame {
        meta,
        payload: wire.payload,
    })
}

fn check_meta(meta: &FrameMeta, payload_len: usize) -> Result<(), BadFrame> {
    let payload = u64::try_from(payload_len).unwrap_or(u64::MAX);
    if meta.raw_len > FRAME_RAW_BYTES_MAX {
        return Err(BadFrame::TooLarge(u64::from(meta.raw_len)));
    }
    if payload > FRAME_PAYLOAD_BYTES_MAX {
        return Err(BadFrame::TooLarge(payload));
    }
    if meta.codec == Codec::Plain && payload != u64::from(meta.raw_len) {
        return Err(BadFrame::Length {
            payload,
            raw: meta.raw_len,
        });
    }
    let positions_fit = match meta.kind {
        FrameKind::Whole | FrameKind::End => meta.last > meta.prev,
        FrameKind::Part => meta.last == meta.prev,
    };
    if !positions_fit {
        return Err(BadFrame::Positions {
            kind: meta.kind,
            prev: meta.prev,
            last: meta.last,
        });
    }
    let shape_fits = match meta.kind {
        FrameKind::Whole => meta.txn_count > 0 && meta.part == 0 && meta.part_run == 0,
        FrameKind::Part => meta.txn_count == 0,
        FrameKind::End => meta.txn_count == 1,
    };
    if shape_fits {
        return Ok(());
    }
    Err(BadFrame::Shape {
        kind: meta.kind,
        txn_count: meta.txn_count,
        part: meta.part,
        part_run: meta.part_run,
    })
}

/// A node id from the wire; zero and what does not fit 16 bits name nobody.
#[must_use]
pub(super) fn node_id(wire: u32) -> Option<NodeId> {
    u16::try_from(wire).ok().filter(|&id| id != 0).map(NodeId)
}

/// One entry of a vector.
#[must_use]
pub(super) fn entry_to_wire(node: NodeId, position: Position) -> pb::VectorEntry {
    pb::VectorEntry {
        node_id: u32::from(node.0),
        epoch: position.epoch,
        lsn: position.lsn.0,
    }
}

/// A vector.
#[must_use]
pub(crate) fn vector_to_wire(vector: &Vector) -> Vec<pb::VectorEntry> {
    vector
        .iter()
        .map(|(node, position)| entry_to_wire(node, position))
        .collect()
}

/// One entry of a vector; none for an id that names nobody.
#[must_use]
pub(super) fn entry_from_wire(wire: &pb::VectorEntry) -> Option<(NodeId, Position)> {
    node_id(wire.node_id).map(|node| {
        (
            node,
            Position {
                epoch: wire.epoch,
                lsn: Lsn(wire.lsn),
            },
        )
    })
}

/// A vector; entries of ids that name nobody are left out.
#[must_use]
pub(crate) fn vector_from_wire(wire: &[pb::VectorEntry]) -> Vector {
    wire.iter().filter_map(entry_from_wire).collect()
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use proptest::prelude::*;

    use super::*;

    fn whole() -> pb::Frame {
        frame_to_wire(Frame {
            meta: FrameMeta {
                origin: NodeId(2),
                prev: Position::new(1, 10),
                last: Position::new(1, 20),
                kind: FrameKind::Whole,
                txn_count: 3,
                part: 0,
                part_run: 0,
                codec: Codec::Plain,
                raw_len: 4,
            },
            payload: Bytes::from_static(b"abcd"),
        })
    }

    #[test]
    fn a_frame_survives_the_trip() {
        let frame = frame_from_wire(whole()).unwrap();
        assert_eq!(frame_to_wire(frame), whole());
    }

    #[test]
    fn frames_that_no_journal_writes_are_refused() {
        let bad = |change: fn(&mut pb::Frame)| {
            let mut frame = whole();
            change(&mut frame);
            frame_from_wire(frame).unwrap_err()
        };
        assert_eq!(bad(|f| f.origin = 0), BadFrame::Origin(0));
        assert_eq!(bad(|f| f.origin = 70_000), BadFrame::Origin(70_000));
        assert_eq!(bad(|f| f.kind = 3), BadFrame::Kind(3));
        assert_eq!(bad(|f| f.codec = 9), BadFrame::Codec(9));
        assert_eq!(
            bad(|f| f.raw_len = u32::MAX),
            BadFrame::TooLarge(u64::from(u32::MAX))
        );
        assert_eq!(bad(|f| f.raw_len = 5), BadFrame::Length { payload: 4, raw: 5 });
        assert!(matches!(bad(|f| f.last_lsn = 10), BadFrame::Positions { .. }));
        assert!(matches!(bad(|f| f.kind = KIND_PART), BadFrame::Positions { .. }));
        assert!(matches!(bad(|f| f.txn_count = 0), BadFrame::Shape { .. }));
        assert!(matches!(bad(|f| f.part = 1), BadFrame::Shape { .. }));
        assert!(matches!(bad(|f| f.kind = KIND_END), BadFrame::Shape { .. }));
    }

    proptest! {
        #[test]
        fn any_message_is_read_or_refused(
            numbers in prop::array::uniform9(any::<u32>()), lsns in prop::array::uniform3(any::<u64>()),
            kind in 0u32..4, codec in 0u32..3, payload in prop::collection::vec(any::<u8>(), 0..64),
        ) {
            let wire = pb::Frame {
                origin: numbers[0] % 70_000, prev_epoch: numbers[1] % 2, prev_lsn: lsns[0], last_epoch: numbers[2] % 2,
                last_lsn: lsns[1], kind, txn_count: numbers[3] % 3, codec, raw_len: numbers[4] % 100,
                payload: Bytes::from(payload), part: numbers[5] % 2, part_run: lsns[2] % 2,
            };
            if let Ok(frame) = frame_from_wire(wire.clone()) {
                prop_assert_eq!(frame_to_wire(frame), wire);
            }
        }
    }
}
