//! Blocks and candidates: which blocks differ, which of their rows.
//!
//! In:   counts and hashes of each node            Out: blocks to read, rows to decide
//! Holds: nothing
//! Not here: where they come from ([`super::talk`])

use std::collections::HashMap;

use bytes::Bytes;

/// One node's blocks: count and hash of each.
pub type Blocks = Vec<(u64, i64)>;

/// Fewest bits of a block's number.
const BITS_MIN: u32 = 6;
/// Most bits of a block's number.
pub const BITS_MAX: u32 = 16;
/// Rows of a block, about.
const BLOCK_ROWS: u64 = 32;

/// How many bits a block's number has for a table of so many rows.
#[must_use]
pub fn bits_for(rows: u64) -> u32 {
    let wanted = (rows / BLOCK_ROWS).max(1).ilog2();
    wanted.clamp(BITS_MIN, BITS_MAX)
}

/// The blocks that are not the same at all nodes, each with the most rows that a node has in it.
#[must_use]
pub fn differing(nodes: &[Blocks]) -> Vec<(u32, u64)> {
    let Some((first, others)) = nodes.split_first() else {
        return Vec::new();
    };
    let blocks = (0u32..).zip(first);
    let differs = blocks.filter_map(|(at, block)| {
        let there = others
            .iter()
            .map(|other| other.get(at as usize).copied().unwrap_or_default());
        let most = there.clone().map(|other| other.0).chain([block.0]).max();
        let same = there.into_iter().all(|other| other == *block);
        (!same).then_some((at, most.unwrap_or(0)))
    });
    differs.collect()
}

/// Takes those out of `differing` in which only the node at `place` has rows.
pub fn alone(nodes: &[Blocks], place: usize, differing: &mut Vec<(u32, u64)>) -> Vec<u32> {
    let is_alone = |block: u32| {
        let others = nodes.iter().enumerate().filter(|(at, _)| *at != place);
        let mut others = others.map(|(_, other)| other.get(block as usize).map_or(0, |block| block.0));
        others.all(|rows| rows == 0)
    };
    let taken = differing.extract_if(.., |(block, _)| is_alone(*block));
    taken.map(|(block, _)| block).collect()
}

/// A bit for each of `2^bits` blocks, set for those in `blocks`.
#[must_use]
pub fn bitmap(bits: u32, blocks: &[u32]) -> Bytes {
    let mut map = vec![0u8; (1usize << bits).div_ceil(8)];
    for &block in blocks {
        if let Some(byte) = map.get_mut(block as usize / 8) {
            *byte |= 1 << (block % 8);
        }
    }
    map.into()
}

/// Takes blocks until they have more than `rows` together, one at least.
pub fn portion(blocks: &mut Vec<(u32, u64)>, rows: u64) -> Vec<u32> {
    let (mut taken, mut sum) = (Vec::new(), 0u64);
    while let Some((block, count)) = blocks.pop() {
        if !taken.is_empty() && sum.saturating_add(count) > rows {
            blocks.push((block, count));
            break;
        }
        sum = sum.saturating_add(count);
        taken.push(block);
    }
    taken
}

/// Rows of some blocks as all nodes have them.
#[derive(Debug)]
pub struct Rows {
    nodes: usize,
    /// By canonical key: the hash at each node.
    rows: HashMap<Bytes, Vec<Option<i64>>>,
}

impl Rows {
    /// None yet, of so many nodes.
    #[must_use]
    pub fn of(nodes: usize) -> Self {
        Self {
            nodes,
            rows: HashMap::new(),
        }
    }

    /// A row of one node.
    pub fn add(&mut self, node: usize, key: Bytes, hash: i64) {
        let hashes = self.rows.entry(key).or_insert_with(|| vec![None; self.nodes]);
        if let Some(slot) = hashes.get_mut(node) {
            *slot = Some(hash);
        }
    }

    /// Keys of the rows that are not the same at all nodes, in order.
    #[must_use]
    pub fn candidates(self) -> Vec<Bytes> {
        let rows = self.rows.into_iter();
        let differ = |hashes: &[Option<i64>]| hashes.windows(2).any(|pair| pair.first() != pair.get(1));
        let mut keys: Vec<Bytes> = rows
            .filter(|(_, hashes)| differ(hashes))
            .map(|(key, _)| key)
            .collect();
        keys.sort_unstable();
        keys
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_differs_by_count_or_by_hash_at_any_node() {
        let a = vec![(1, 7), (2, 8), (0, 0), (1, 9)];
        assert_eq!(differing(&[a.clone(), a.clone(), a.clone()]), []);
        let b = vec![(1, 7), (2, 9), (0, 0), (1, 9)];
        let c = vec![(1, 7), (2, 8), (3, 0), (1, 9)];
        assert_eq!(differing(&[a.clone(), b, a.clone()]), [(1, 2)]);
        assert_eq!(differing(&[a.clone(), a, c]), [(2, 3)]);
    }

    #[test]
    fn blocks_are_alone_in_which_no_other_node_has_rows() {
        let here = vec![(1, 7), (2, 8), (0, 0), (1, 9)];
        let there = vec![(0, 0), (1, 8), (3, 5), (0, 0)];
        let nodes = [here, there.clone(), there];
        let mut left = differing(&nodes);
        assert_eq!(alone(&nodes, 0, &mut left), [0, 3]);
        assert_eq!(left, [(1, 2), (2, 3)]);
        // Two others have these rows.
        assert!(alone(&nodes, 1, &mut left).is_empty());
    }

    #[test]
    fn portions_take_every_block_once_and_one_at_least() {
        let mut blocks = vec![(1, 10), (2, 1_000), (3, 10), (4, 10)];
        let mut seen = Vec::new();
        while !blocks.is_empty() {
            let some = portion(&mut blocks, 25);
            assert!(!some.is_empty());
            seen.extend(some);
        }
        assert_eq!(seen, [4, 3, 2, 1]);
    }

    #[test]
    fn the_bitmap_is_as_get_bit_reads_it() {
        let map = bitmap(6, &[0, 9, 63]);
        assert_eq!(map.as_ref(), [1, 2, 0, 0, 0, 0, 0, 128]);
    }

    #[test]
    fn rows_that_are_missing_or_other_somewhere_are_candidates() {
        let mut rows = Rows::of(2);
        for (node, key, hash) in [(0, 1u8, 5), (1, 1, 5), (0, 2, 5), (1, 2, 6), (0, 3, 5), (1, 4, 5)] {
            rows.add(node, Bytes::copy_from_slice(&[key]), hash);
        }
        assert_eq!(rows.candidates(), [&[2u8][..], &[3], &[4]]);
    }

    #[test]
    fn blocks_stay_few_and_many_enough() {
        assert_eq!(bits_for(0), 6);
        assert_eq!(bits_for(32 * 1_024), 10);
        assert_eq!(bits_for(5_000_000), 16);
        assert_eq!(bits_for(u64::MAX), 16);
    }
}
