//! Says quickly that a key is not in a generation of the overflow: most rows that are met are in none.
//!
//! A Bloom filter in blocks of one cache line. It may say "perhaps" of a key that is not there, about once in a hundred times,
//! and never "no" of one that is. Keys come from whoever writes to the database, so it is seeded per process.

/// Bits of a block: a cache line.
const BLOCK_BITS: usize = 512;
const WORDS: usize = BLOCK_BITS / 64;
/// Bits for each key.
const KEY_BITS: usize = 10;
/// How many of them a key sets.
const PROBES: u32 = 6;

/// A key's hash, the same for all filters of this process.
#[derive(Clone, Copy)]
pub(super) struct Hashed(u128);

impl Hashed {
    pub(super) fn new(key: &[u8], seed: u64) -> Self {
        Self(xxhash_rust::xxh3::xxh3_128_with_seed(key, seed))
    }

    /// Which of so many blocks.
    fn block(self, blocks: usize) -> usize {
        let high = (self.0 >> 64) as u64;
        usize::try_from((u128::from(high) * blocks as u128) >> 64).unwrap_or(0)
    }

    /// The word and the bit of each probe.
    fn probes(self) -> impl Iterator<Item = (usize, u64)> {
        let low = self.0 as u64;
        (0..PROBES).map(move |probe| {
            let at = (low >> (probe * 9)) as usize % BLOCK_BITS;
            (at / 64, 1 << (at % 64))
        })
    }
}

/// Which keys are perhaps in a set.
pub(super) struct Filter {
    blocks: Vec<[u64; WORDS]>,
}

impl Filter {
    /// For so many keys.
    pub(super) fn new(keys: usize) -> Self {
        let blocks = (keys.saturating_mul(KEY_BITS) / BLOCK_BITS).max(1);
        Self {
            blocks: vec![[0; WORDS]; blocks],
        }
    }

    pub(super) fn insert(&mut self, key: Hashed) {
        let at = key.block(self.blocks.len());
        let Some(block) = self.blocks.get_mut(at) else {
            return;
        };
        for (word, bit) in key.probes() {
            if let Some(word) = block.get_mut(word) {
                *word |= bit;
            }
        }
    }

    /// False: it is not there.
    pub(super) fn may_hold(&self, key: Hashed) -> bool {
        let block = self.blocks.get(key.block(self.blocks.len()));
        block.is_some_and(|block| {
            key.probes()
                .all(|(word, bit)| block.get(word).is_some_and(|word| word & bit != 0))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_there_is_found_and_nearly_all_else_is_refused() {
        const KEYS: u32 = 100_000;
        let mut filter = Filter::new(KEYS as usize);
        for key in 0..KEYS {
            filter.insert(Hashed::new(&key.to_be_bytes(), 7));
        }
        assert!((0..KEYS).all(|key| filter.may_hold(Hashed::new(&key.to_be_bytes(), 7))));
        let wrong = (KEYS..2 * KEYS)
            .filter(|key| filter.may_hold(Hashed::new(&key.to_be_bytes(), 7)))
            .count();
        assert!(wrong < 3_000, "{wrong} of {KEYS}");
    }

    #[test]
    fn a_filter_of_few_keys_has_a_block() {
        let mut filter = Filter::new(1);
        assert!(!filter.may_hold(Hashed::new(b"a", 1)));
        filter.insert(Hashed::new(b"a", 1));
        assert!(filter.may_hold(Hashed::new(b"a", 1)));
    }
}
