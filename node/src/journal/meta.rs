//! What a frame says of itself, on disk and on the wire.

use anabranch_proto::{NodeId, Position};
use bytes::Bytes;

/// What a frame holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FrameKind {
    /// Whole transactions, in order, with positions in `(prev, last]`.
    Whole,
    /// A piece of one large transaction, not its last: `prev == last`, the position before the transaction.
    Part,
    /// The last piece of a large transaction, with its header; `last` is the transaction's position.
    End,
}

/// How a frame's payload is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Codec {
    /// As it is.
    Plain,
    /// An LZ4 block.
    Lz4,
}

/// A frame's description. A frame belongs to one origin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameMeta {
    /// Whose transactions these are.
    pub origin: NodeId,
    /// The origin's position just before the first transaction of the frame.
    pub prev: Position,
    /// The origin's position after the frame.
    pub last: Position,
    /// What it holds.
    pub kind: FrameKind,
    /// Transactions that end in this frame (0 for a part).
    pub txn_count: u32,
    /// Number of the piece, from 0, for `Part` and `End`; else 0.
    pub part: u32,
    /// Tells the pieces of one writing of a large transaction from those of another; else 0.
    pub part_run: u64,
    /// How the payload is packed.
    pub codec: Codec,
    /// Length of the payload once unpacked, bytes.
    pub raw_len: u32,
}

/// A frame: description and packed payload.
#[derive(Debug, Clone)]
pub struct Frame {
    /// The description.
    pub meta: FrameMeta,
    /// The payload as packed by `meta.codec`.
    pub payload: Bytes,
}
