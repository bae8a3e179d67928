//! Packs and unpacks frame payloads (LZ4 blocks).
//!
//! Invariants: a payload is packed only when that saves at least an eighth; unpacking never allocates more than
//! [`RAW_LEN_MAX`] nor more than the packed bytes can hold. Not here: when to pack, which is the caller's choice.

use std::cell::RefCell;

use bytes::Bytes;

use super::error::Error;
use super::meta::{Codec, Frame};

/// Largest payload of a frame, packed or not, bytes. Frames are cut between changes, so it must hold the largest change: the server
/// sends none of more than 1 GiB.
pub const RAW_LEN_MAX: u32 = (1 << 30) + (1 << 20);
/// Smaller payloads are left as they are, bytes.
const PACK_LEN_MIN: usize = 4 * 1024;
/// An LZ4 block cannot hold more than this many bytes per byte.
const LZ4_RATIO_MAX: usize = 255;

/// Room to pack in is kept up to this, bytes: for a frame as frames are, not for the largest.
const ROOM_LEN_MAX: usize = 1 << 20;

thread_local! {
    /// Zeroed once and not for every frame.
    static ROOM: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Packs a payload if that pays. Returns the codec, the bytes, and the length before packing in bytes.
///
/// # Errors
/// [`Error::Unpack`] if the payload is larger than [`RAW_LEN_MAX`]: cut it into parts first.
pub fn pack(payload: Bytes) -> Result<(Codec, Bytes, u32), Error> {
    let raw_len = u32::try_from(payload.len())
        .ok()
        .filter(|&len| len <= RAW_LEN_MAX)
        .ok_or_else(|| {
            Error::Unpack(format!(
                "{} bytes are more than the {RAW_LEN_MAX} a frame may hold",
                payload.len()
            ))
        })?;
    if payload.len() < PACK_LEN_MIN {
        return Ok((Codec::Plain, payload, raw_len));
    }
    let packed = ROOM.with_borrow_mut(|room| {
        let most = lz4_flex::block::get_maximum_output_size(payload.len());
        if room.len() < most {
            room.resize(most, 0);
        }
        let len = lz4_flex::block::compress_into(&payload, room).ok();
        // Not worth unpacking at every reader (or, which the size of the buffer excludes, no room).
        let len = len.filter(|&len| len <= payload.len() - payload.len() / 8);
        let packed = len.and_then(|len| room.get(..len)).map(Bytes::copy_from_slice);
        if room.len() > ROOM_LEN_MAX {
            *room = Vec::new();
        }
        packed
    });
    Ok(match packed {
        Some(packed) => (Codec::Lz4, packed, raw_len),
        None => (Codec::Plain, payload, raw_len),
    })
}

/// The payload of a frame as it was before packing.
///
/// # Errors
/// [`Error::Unpack`] if the bytes are not what the description says; nothing large is allocated for a lie.
pub fn unpack(frame: &Frame) -> Result<Bytes, Error> {
    let raw_len = frame.meta.raw_len;
    if raw_len > RAW_LEN_MAX {
        return Err(Error::Unpack(format!(
            "it claims {raw_len} bytes, more than the {RAW_LEN_MAX} allowed"
        )));
    }
    let want = usize::try_from(raw_len).unwrap_or(usize::MAX);
    match frame.meta.codec {
        Codec::Plain if frame.payload.len() == want => Ok(frame.payload.clone()),
        Codec::Plain => Err(Error::Unpack(format!(
            "{} bytes where {want} were announced",
            frame.payload.len()
        ))),
        Codec::Lz4 if frame.payload.len().saturating_mul(LZ4_RATIO_MAX) < want => Err(Error::Unpack(
            format!("{} packed bytes cannot hold {want}", frame.payload.len()),
        )),
        Codec::Lz4 => {
            let mut raw = vec![0; want];
            let got = lz4_flex::block::decompress_into(&frame.payload, &mut raw)
                .map_err(|error| Error::Unpack(error.to_string()))?;
            if got != want {
                return Err(Error::Unpack(format!("{got} bytes where {want} were announced")));
            }
            Ok(Bytes::from(raw))
        }
    }
}

#[cfg(test)]
mod tests {
    use anabranch_proto::{NodeId, Position};
    use proptest::prelude::*;

    use super::super::meta::{FrameKind, FrameMeta};
    use super::*;

    fn frame(codec: Codec, payload: Bytes, raw_len: u32) -> Frame {
        let meta = FrameMeta {
            origin: NodeId(1),
            prev: Position::ZERO,
            last: Position::new(1, 1),
            kind: FrameKind::Whole,
            txn_count: 1,
            part: 0,
            part_run: 0,
            codec,
            raw_len,
        };
        Frame { meta, payload }
    }

    #[test]
    fn a_repetitive_payload_gets_smaller_and_comes_back() {
        let raw = Bytes::from(b"anabranch ".repeat(10_000));
        let (codec, packed, raw_len) = pack(raw.clone()).unwrap();
        assert_eq!(codec, Codec::Lz4);
        assert!(packed.len() < raw.len() / 8);
        assert_eq!(unpack(&frame(codec, packed, raw_len)).unwrap(), raw);
    }

    #[test]
    fn a_short_or_random_payload_stays_as_it_is() {
        let short = Bytes::from(vec![7; PACK_LEN_MIN - 1]);
        assert_eq!(pack(short.clone()).unwrap(), (Codec::Plain, short, 4095));
        let random: Vec<u8> = (0..20_000).map(|_| rand::random()).collect();
        assert_eq!(pack(Bytes::from(random)).unwrap().0, Codec::Plain);
    }

    #[test]
    fn a_claim_that_the_bytes_cannot_hold_is_refused_before_allocating() {
        for raw_len in [RAW_LEN_MAX, RAW_LEN_MAX + 1, u32::MAX] {
            assert!(unpack(&frame(Codec::Lz4, Bytes::from_static(&[0; 16]), raw_len)).is_err());
        }
        assert!(unpack(&frame(Codec::Plain, Bytes::from_static(b"abc"), 4)).is_err());
    }

    proptest! {
        #[test]
        fn whatever_is_packed_unpacks(raw in proptest::collection::vec(0u8..4, 0..20_000)) {
            let raw = Bytes::from(raw);
            let (codec, packed, raw_len) = pack(raw.clone()).unwrap();
            prop_assert_eq!(unpack(&frame(codec, packed, raw_len)).unwrap(), raw);
        }

        #[test]
        fn arbitrary_bytes_never_panic(packed: Vec<u8>, raw_len in 0u32..10_000) {
            let _ = unpack(&frame(Codec::Lz4, Bytes::from(packed), raw_len));
        }
    }
}
