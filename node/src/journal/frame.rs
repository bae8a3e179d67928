//! Frames on disk, byte by byte. All integers are little-endian.
//!
//! ```text
//! offset  size  field
//!      0     4  magic "AnbF"
//!      4     4  header checksum: crc32c over the segment's salt (8 bytes) and bytes 8..80
//!      8     4  payload length, bytes
//!     12     4  payload checksum: crc32c over the payload
//!     16     8  sequence number of the frame, increasing by one through all segments
//!     24     8  sequence number of the first frame of its write group
//!     32     2  origin
//!     34     1  kind: 0 whole, 1 part, 2 end
//!     35     1  codec: 0 plain, 1 LZ4 block
//!     36     4  transactions that end in the frame
//!     40     4  epoch of `prev`
//!     44     4  epoch of `last`
//!     48     8  LSN of `prev`
//!     56     8  LSN of `last`
//!     64     4  number of the part
//!     68     4  payload length once unpacked, bytes
//!     72     8  run of the part
//!     80     n  payload, then zeros up to a multiple of 8
//! ```
//!
//! A *group* is what one `fdatasync` makes durable. The writer starts a group only when the one before is durable, so
//! only frames of the last group may be torn: a bad place where frame `s` should be, followed by a frame whose group
//! began at or before `s`, is a group that was half written when the power went; followed by a frame whose group began
//! after `s`, it is damage to something that was durable.
//! The salt is random for each segment: bytes of a replicated row that look like a frame are not one.
//!
//! Invariants: `decode` accepts exactly what `encode` makes, never panics, and believes nothing before the checksum.
//! Not here: where frames lie in a file (`segment.rs`), packing of payloads (`pack.rs`).

use anabranch_proto::{Lsn, NodeId, Position};
use bytes::{Buf, BufMut};

use super::meta::{Codec, FrameKind, FrameMeta};
use super::pack::RAW_LEN_MAX;

/// Length of a frame's header, bytes.
pub(super) const HEADER_LEN: usize = 80;
/// First bytes of every frame.
pub(super) const MAGIC: [u8; 4] = *b"AnbF";
/// Frames begin at multiples of this, bytes.
pub(super) const ALIGN: u64 = 8;

/// Bytes of the header before those that its checksum covers.
const UNCOVERED_LEN: usize = 8;

/// A frame's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) meta: FrameMeta,
    pub(super) seq: u64,
    pub(super) group_first: u64,
    pub(super) payload_len: u32,
    pub(super) payload_crc: u32,
}

/// Why bytes are not a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Flaw {
    #[error("no frame begins here")]
    NoMagic,
    #[error("the frame's header is cut off")]
    Short,
    #[error("the frame header's checksum is wrong")]
    HeaderChecksum,
    #[error("the frame's payload is cut off")]
    PayloadShort,
    #[error("the frame payload's checksum is wrong")]
    PayloadChecksum,
    #[error("the frame's number is not the next one")]
    Sequence,
    #[error("the frame's {0} is unknown")]
    Unknown(&'static str),
}

/// What the header checksums of a segment start from.
pub(super) fn seed(salt: u64) -> u32 {
    crc32c::crc32c(&salt.to_le_bytes())
}

/// `len` rounded up to [`ALIGN`], bytes.
pub(super) fn aligned(len: u64) -> u64 {
    len.div_ceil(ALIGN).saturating_mul(ALIGN)
}

/// Length on disk of a frame with a payload of `payload_len` bytes, bytes.
pub(super) fn disk_len(payload_len: usize) -> u64 {
    aligned((HEADER_LEN as u64).saturating_add(payload_len as u64))
}

impl Header {
    /// Length of the frame on disk, bytes.
    pub(super) fn disk_len(&self) -> u64 {
        aligned(HEADER_LEN as u64 + u64::from(self.payload_len))
    }

    /// The header's bytes in a segment whose checksums start from `seed`.
    pub(super) fn encode(&self, seed: u32) -> [u8; HEADER_LEN] {
        let mut covered = [0; HEADER_LEN - UNCOVERED_LEN];
        let mut to = covered.as_mut_slice();
        to.put_u32_le(self.payload_len);
        to.put_u32_le(self.payload_crc);
        to.put_u64_le(self.seq);
        to.put_u64_le(self.group_first);
        to.put_u16_le(self.meta.origin.0);
        to.put_u8(match self.meta.kind {
            FrameKind::Whole => 0,
            FrameKind::Part => 1,
            FrameKind::End => 2,
        });
        to.put_u8(match self.meta.codec {
            Codec::Plain => 0,
            Codec::Lz4 => 1,
        });
        to.put_u32_le(self.meta.txn_count);
        to.put_u32_le(self.meta.prev.epoch);
        to.put_u32_le(self.meta.last.epoch);
        to.put_u64_le(self.meta.prev.lsn.0);
        to.put_u64_le(self.meta.last.lsn.0);
        to.put_u32_le(self.meta.part);
        to.put_u32_le(self.meta.raw_len);
        to.put_u64_le(self.meta.part_run);

        let mut bytes = [0; HEADER_LEN];
        let mut to = bytes.as_mut_slice();
        to.put_slice(&MAGIC);
        to.put_u32_le(crc32c::crc32c_append(seed, &covered));
        to.put_slice(&covered);
        bytes
    }

    /// The header at the beginning of `bytes`, in a segment whose checksums start from `seed`.
    pub(super) fn decode(bytes: &[u8], seed: u32) -> Result<Self, Flaw> {
        let (header, _) = bytes.split_at_checked(HEADER_LEN).ok_or(Flaw::Short)?;
        let (uncovered, covered) = header.split_at_checked(UNCOVERED_LEN).ok_or(Flaw::Short)?;
        let checksum = uncovered.strip_prefix(&MAGIC).ok_or(Flaw::NoMagic)?;
        if crc32c::crc32c_append(seed, covered).to_le_bytes() != checksum {
            return Err(Flaw::HeaderChecksum);
        }
        decode_covered(covered)
    }
}

/// The part of a header under its checksum. The checksum has been compared.
fn decode_covered(mut from: &[u8]) -> Result<Header, Flaw> {
    let short = |_| Flaw::Short;
    let payload_len = from.try_get_u32_le().map_err(short)?;
    let payload_crc = from.try_get_u32_le().map_err(short)?;
    let seq = from.try_get_u64_le().map_err(short)?;
    let group_first = from.try_get_u64_le().map_err(short)?;
    let origin = NodeId(from.try_get_u16_le().map_err(short)?);
    let kind = match from.try_get_u8().map_err(short)? {
        0 => FrameKind::Whole,
        1 => FrameKind::Part,
        2 => FrameKind::End,
        _ => return Err(Flaw::Unknown("kind")),
    };
    let codec = match from.try_get_u8().map_err(short)? {
        0 => Codec::Plain,
        1 => Codec::Lz4,
        _ => return Err(Flaw::Unknown("codec")),
    };
    let txn_count = from.try_get_u32_le().map_err(short)?;
    let prev_epoch = from.try_get_u32_le().map_err(short)?;
    let last_epoch = from.try_get_u32_le().map_err(short)?;
    let prev = Position {
        epoch: prev_epoch,
        lsn: Lsn(from.try_get_u64_le().map_err(short)?),
    };
    let last = Position {
        epoch: last_epoch,
        lsn: Lsn(from.try_get_u64_le().map_err(short)?),
    };
    let part = from.try_get_u32_le().map_err(short)?;
    let raw_len = from.try_get_u32_le().map_err(short)?;
    let part_run = from.try_get_u64_le().map_err(short)?;
    if payload_len > RAW_LEN_MAX {
        return Err(Flaw::Unknown("length"));
    }
    let meta = FrameMeta {
        origin,
        prev,
        last,
        kind,
        txn_count,
        part,
        part_run,
        codec,
        raw_len,
    };
    Ok(Header {
        meta,
        seq,
        group_first,
        payload_len,
        payload_crc,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_header() -> impl Strategy<Value = Header> {
        let meta = (
            any::<u16>(),
            any::<(u32, u64)>(),
            any::<(u32, u64)>(),
            prop_oneof![
                Just(FrameKind::Whole),
                Just(FrameKind::Part),
                Just(FrameKind::End)
            ],
            any::<(u32, u32, u64)>(),
            prop_oneof![Just(Codec::Plain), Just(Codec::Lz4)],
            any::<u32>(),
        );
        (meta, any::<(u64, u64)>(), 0..=RAW_LEN_MAX, any::<u32>()).prop_map(
            |(
                (origin, prev, last, kind, (txn_count, part, part_run), codec, raw_len),
                seqs,
                payload_len,
                payload_crc,
            )| {
                Header {
                    meta: FrameMeta {
                        origin: NodeId(origin),
                        prev: Position::new(prev.0, prev.1),
                        last: Position::new(last.0, last.1),
                        kind,
                        txn_count,
                        part,
                        part_run,
                        codec,
                        raw_len,
                    },
                    seq: seqs.0,
                    group_first: seqs.1,
                    payload_len,
                    payload_crc,
                }
            },
        )
    }

    proptest! {
        #[test]
        fn a_header_reads_back_in_its_own_segment_only(header in any_header(), salt: u64, other: u64) {
            let bytes = header.encode(seed(salt));
            prop_assert_eq!(Header::decode(&bytes, seed(salt)), Ok(header));
            if seed(other) != seed(salt) {
                prop_assert_eq!(Header::decode(&bytes, seed(other)), Err(Flaw::HeaderChecksum));
            }
        }

        #[test]
        fn every_flipped_bit_is_noticed(header in any_header(), salt: u64, bit in 0..HEADER_LEN * 8) {
            let mut bytes = header.encode(seed(salt));
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(Header::decode(&bytes, seed(salt)).is_err());
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), seed: u32) {
            prop_assert!(Header::decode(&bytes, seed).is_err());
        }
    }

    #[test]
    fn the_layout_is_the_documented_one() {
        let meta = FrameMeta {
            origin: NodeId(0x0102),
            prev: Position::new(0x0304_0506, 0x0708),
            last: Position::new(0x0A0B_0C0D, 0x0E0F),
            kind: FrameKind::End,
            txn_count: 1,
            part: 9,
            part_run: 77,
            codec: Codec::Lz4,
            raw_len: 4096,
        };
        let header = Header {
            meta,
            seq: 5,
            group_first: 4,
            payload_len: 33,
            payload_crc: 0xDEAD_BEEF,
        };
        let bytes = header.encode(seed(1));
        assert_eq!(&bytes[..4], b"AnbF");
        assert_eq!(bytes[8..12], 33u32.to_le_bytes());
        assert_eq!(bytes[12..16], 0xDEAD_BEEF_u32.to_le_bytes());
        assert_eq!(bytes[16..24], 5u64.to_le_bytes());
        assert_eq!(bytes[24..32], 4u64.to_le_bytes());
        assert_eq!(bytes[32..36], [2, 1, 2, 1]);
        assert_eq!(bytes[40..44], 0x0304_0506_u32.to_le_bytes());
        assert_eq!(bytes[56..64], 0x0E0F_u64.to_le_bytes());
        assert_eq!(bytes[64..68], 9u32.to_le_bytes());
        assert_eq!(bytes[72..80], 77u64.to_le_bytes());
        assert_eq!(header.disk_len(), 120);
    }
}
