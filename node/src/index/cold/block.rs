//! Sorted entries as one item of the overflow: the entries, then where each begins (u32 each), then how many they are (u32).
//!
//! An entry is its key and, in a fixed length, its value; the table of places makes a look-up a binary search.

use super::super::Packed;

/// Bytes of a value ([`Packed::to_bytes`]).
const VALUE_LEN: usize = 24;
/// Most entries of a block. sled reads and caches pages of up to 16 items, so large blocks cost memory and slow look-ups;
/// each item costs memory, too, so they are not tiny (`docs/decisions/0002` has the measurements).
const ENTRIES_MAX: usize = 64;
/// A block ends past so many bytes of entries. sled writes a page of more than 128 KiB into a file of its own.
const BYTES_MAX: usize = 4 << 10;
/// Bytes of a number.
const WORD: usize = size_of::<u32>();

/// A block that was read. Of one that is no block nothing is found.
#[derive(Clone, Copy)]
pub(super) struct Block<'a> {
    entries: &'a [u8],
    /// Where each begins.
    starts: &'a [[u8; WORD]],
}

impl<'a> Block<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Option<Self> {
        let (rest, count) = bytes.split_last_chunk::<WORD>()?;
        let len = number(count)?.checked_mul(WORD)?;
        let (entries, starts) = rest.split_at_checked(rest.len().checked_sub(len)?)?;
        Some(Self {
            entries,
            starts: starts.as_chunks().0,
        })
    }

    /// The key and the value of one entry.
    fn entry(self, at: usize) -> Option<(&'a [u8], &'a [u8; VALUE_LEN])> {
        let start = number(self.starts.get(at)?)?;
        let end = match self.starts.get(at + 1) {
            Some(next) => number(next)?,
            None => self.entries.len(),
        };
        self.entries.get(start..end)?.split_last_chunk()
    }

    /// The value of a key.
    pub(super) fn get(self, key: &[u8]) -> Option<Packed> {
        let (mut from, mut to) = (0, self.starts.len());
        while from < to {
            let middle = from.midpoint(to);
            let (found, value) = self.entry(middle)?;
            match found.cmp(key) {
                std::cmp::Ordering::Less => from = middle + 1,
                std::cmp::Ordering::Greater => to = middle,
                std::cmp::Ordering::Equal => return Packed::from_bytes(value),
            }
        }
        None
    }

    /// All entries, in order.
    pub(super) fn entries(self) -> impl Iterator<Item = (&'a [u8], Packed)> {
        (0..self.starts.len()).filter_map(move |at| {
            let (key, value) = self.entry(at)?;
            Some((key, Packed::from_bytes(value)?))
        })
    }
}

fn number(bytes: &[u8; WORD]) -> Option<usize> {
    usize::try_from(u32::from_be_bytes(*bytes)).ok()
}

/// Collects entries, in the order of their keys, into a block at a time.
#[derive(Default)]
pub(super) struct Writer {
    bytes: Vec<u8>,
    starts: Vec<u8>,
    /// Length of the first key.
    first: usize,
    count: u32,
}

impl Writer {
    pub(super) fn push(&mut self, key: &[u8], value: Packed) {
        if self.count == 0 {
            self.first = key.len();
        }
        self.count += 1;
        // A block is written as soon as it is full, and a key is shorter than 1 GiB.
        let start = u32::try_from(self.bytes.len()).unwrap_or(u32::MAX);
        self.starts.extend_from_slice(&start.to_be_bytes());
        self.bytes.extend_from_slice(key);
        self.bytes.extend_from_slice(&value.to_bytes());
    }

    pub(super) fn is_full(&self) -> bool {
        self.count as usize >= ENTRIES_MAX || self.bytes.len() >= BYTES_MAX
    }

    /// Gives the first key and the block away, if there are entries, and begins the next.
    pub(super) fn finish<E>(&mut self, put: impl FnOnce(&[u8], &[u8]) -> Result<(), E>) -> Result<(), E> {
        if self.count == 0 {
            return Ok(());
        }
        let count = self.count.to_be_bytes();
        self.bytes.extend_from_slice(&self.starts);
        self.bytes.extend_from_slice(&count);
        let first = self.bytes.get(..self.first).unwrap_or_default();
        let done = put(first, &self.bytes);
        self.bytes.clear();
        self.starts.clear();
        self.count = 0;
        done
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packed(at: u64) -> Packed {
        Packed {
            time: at,
            lsn: at + 1,
            xid: 7,
            node: 3,
            epoch_kind: 8,
        }
    }

    fn blocks(keys: &[Vec<u8>]) -> Vec<(Vec<u8>, Vec<u8>)> {
        let mut done: Vec<(Vec<u8>, Vec<u8>)> = Vec::new();
        let mut writer = Writer::default();
        let mut put = |first: &[u8], block: &[u8]| {
            done.push((first.to_vec(), block.to_vec()));
            Ok::<_, ()>(())
        };
        for (at, key) in keys.iter().enumerate() {
            writer.push(key, packed(at as u64));
            if writer.is_full() {
                writer.finish(&mut put).unwrap();
            }
        }
        writer.finish(&mut put).unwrap();
        writer.finish(&mut put).unwrap();
        done
    }

    /// Every key is in the block that begins at or before it, and no other is in any.
    fn check(keys: &[Vec<u8>], blocks: &[(Vec<u8>, Vec<u8>)]) {
        for (at, key) in keys.iter().enumerate() {
            let (_, block) = blocks.iter().rfind(|(first, _)| first <= key).unwrap();
            let found = Block::new(block).unwrap().get(key);
            assert_eq!(
                found.map(Packed::to_bytes),
                Some(packed(at as u64).to_bytes()),
                "{key:?}"
            );
        }
        let mut back = blocks
            .iter()
            .flat_map(|(_, block)| Block::new(block).unwrap().entries());
        assert!(keys.iter().all(|key| back.next().unwrap().0 == key));
        assert!(back.next().is_none());
        for (first, block) in blocks {
            let block = Block::new(block).unwrap();
            assert_eq!(block.entries().next().unwrap().0, first);
            for (key, _) in block.entries() {
                // Just before and just after it, and no key at all.
                let longer = [key, &[0]].concat();
                for absent in [&longer[..], &key[..key.len() - 1], &[]] {
                    let is_absent = keys
                        .binary_search_by(|known| known.as_slice().cmp(absent))
                        .is_err();
                    assert!(!is_absent || block.get(absent).is_none(), "{absent:?}");
                }
            }
        }
    }

    #[test]
    fn all_keys_are_found_and_no_others_whatever_their_lengths() {
        let mut keys: Vec<Vec<u8>> = (0..5_000_u32)
            .map(|at| {
                [
                    &at.wrapping_mul(2_654_435_761).to_be_bytes()[..],
                    &vec![b'x'; at as usize % 70],
                ]
                .concat()
            })
            .collect();
        keys.sort();
        keys.dedup();
        let blocks = blocks(&keys);
        assert!(blocks.len() >= 5, "{}", blocks.len());
        check(&keys, &blocks);
    }

    #[test]
    fn a_block_ends_at_its_most_entries_and_at_its_most_bytes() {
        let short: Vec<Vec<u8>> = (0..2 * ENTRIES_MAX as u32 + 1)
            .map(|at| at.to_be_bytes().to_vec())
            .collect();
        let short_blocks = blocks(&short);
        let counts: Vec<usize> = short_blocks
            .iter()
            .map(|(_, block)| Block::new(block).unwrap().starts.len())
            .collect();
        assert_eq!(counts, [ENTRIES_MAX, ENTRIES_MAX, 1]);
        check(&short, &short_blocks);
        let long: Vec<Vec<u8>> = (0..100_u32)
            .map(|at| [&at.to_be_bytes()[..], &vec![0; BYTES_MAX / 10]].concat())
            .collect();
        let long_blocks = blocks(&long);
        assert!((9..=11).contains(&long_blocks.len()), "{}", long_blocks.len());
        check(&long, &long_blocks);
    }

    #[test]
    fn in_what_is_no_block_nothing_is_found() {
        let block = &blocks(&[b"a".to_vec(), b"b".to_vec()])[0].1;
        for len in 0..block.len() {
            let cut = Block::new(&block[..len]);
            assert!(cut.is_none_or(|cut| cut.get(b"a").is_none() || cut.get(b"b").is_none()));
        }
        assert!(Block::new(&[0xFF; 64]).is_none());
    }
}
