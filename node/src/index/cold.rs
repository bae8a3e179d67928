//! Index entries that did not fit in memory, in sled.
//!
//! Generations: each overflow becomes one tree, dropped whole once everything in it is stable. Its entries are sorted
//! and stored in [`block`]s, under the first key of each: an entry an item would cost sled some 3 KB of memory each while
//! it is written (measured: 5.7 GB for 1.8 million). A look into a generation costs up to
//! a hundred microseconds, and there are as many as the budget of memory was filled: each has a filter that says of most keys that they
//! are not in it.
//! sled never holds the only copy of anything here (its `flush` does not sync, see `docs/decisions/0002`):
//! the folder is emptied at start and the index rebuilt from the journal.

mod block;

use std::path::Path;

use anabranch_proto::Vector;

use super::Packed;
use super::filter::{Filter, Hashed};
use super::key::{RowKey, TableId};
use block::Block;

/// The overflow cannot be used.
#[derive(Debug, thiserror::Error)]
#[error(
    "row index overflow in the data folder: {0}; free disk space or mend the disk, then restart the daemon"
)]
pub struct Error(String);

impl From<sled::Error> for Error {
    fn from(error: sled::Error) -> Self {
        Self(error.to_string())
    }
}

fn put(tree: &sled::Tree, first: &[u8], block: &[u8]) -> Result<(), sled::Error> {
    tree.insert(first, block).map(|_| ())
}

struct Generation {
    tree: sled::Tree,
    name: Vec<u8>,
    len: usize,
    filter: Filter,
    /// Everything in the generation is at or below this.
    bound: Vector,
}

/// Older entries, newest generation last.
pub(super) struct Cold {
    dir: std::path::PathBuf,
    db: Option<sled::Db>,
    generations: Vec<Generation>,
    next: u64,
    /// Of the filters.
    seed: u64,
}

impl Cold {
    pub(super) fn new(dir: &Path) -> Result<Self, Error> {
        let cold = Self {
            dir: dir.to_owned(),
            db: None,
            generations: Vec::new(),
            next: 0,
            seed: rand::random(),
        };
        cold.empty_folder()?;
        Ok(cold)
    }

    fn empty_folder(&self) -> Result<(), Error> {
        match std::fs::remove_dir_all(&self.dir) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(Error(format!("{}: {error}", self.dir.display()))),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.generations.iter().map(|generation| generation.len).sum()
    }

    pub(super) fn has_unstable(&self, stable: &Vector) -> bool {
        self.generations
            .iter()
            .any(|generation| !stable.includes(&generation.bound))
    }

    pub(super) fn get(&self, key: &RowKey) -> Result<Option<Packed>, Error> {
        if self.generations.is_empty() {
            return Ok(None);
        }
        let hashed = Hashed::new(key.as_bytes(), self.seed);
        let mut generations = self.generations.iter().rev();
        while let Some(generation) = generations.find(|generation| generation.filter.may_hold(hashed)) {
            let block = generation.tree.range(..=key.as_bytes()).next_back().transpose()?;
            let found = block
                .as_ref()
                .and_then(|(_, block)| Block::new(block)?.get(key.as_bytes()));
            if found.is_some() {
                return Ok(found);
            }
        }
        Ok(None)
    }

    pub(super) fn spill(&mut self, entries: impl Iterator<Item = (RowKey, Packed)>) -> Result<(), Error> {
        let db = match &self.db {
            Some(db) => db.clone(),
            None => {
                let config = sled::Config::new()
                    .path(&self.dir)
                    .cache_capacity(16 << 20)
                    .mode(sled::Mode::HighThroughput)
                    .flush_every_ms(None);
                let db = config.open()?;
                self.db = Some(db.clone());
                db
            }
        };
        let name = format!("generation-{}", self.next).into_bytes();
        self.next += 1;
        let tree = db.open_tree(&name)?;
        let mut entries: Vec<(RowKey, Packed)> = entries.collect();
        let mut generation = Generation {
            tree,
            name,
            len: 0,
            filter: Filter::new(entries.len()),
            bound: Vector::new(),
        };
        entries.sort_unstable_by(|a, b| a.0.cmp(&b.0));
        let mut writer = block::Writer::default();
        for (key, packed) in &entries {
            let version = packed.entry().version;
            generation.bound.raise(version.origin(), version.position);
            generation.filter.insert(Hashed::new(key.as_bytes(), self.seed));
            writer.push(key.as_bytes(), *packed);
            if writer.is_full() {
                writer.finish(|first, block| put(&generation.tree, first, block))?;
            }
        }
        writer.finish(|first, block| put(&generation.tree, first, block))?;
        generation.len = entries.len();
        self.generations.push(generation);
        Ok(())
    }

    pub(super) fn each_of(&self, table: TableId, mut each: impl FnMut(RowKey, Packed)) -> Result<(), Error> {
        for generation in &self.generations {
            for item in &generation.tree {
                let (_, block) = item?;
                for (key, packed) in Block::new(&block).into_iter().flat_map(Block::entries) {
                    let key = RowKey::from_bytes(key);
                    if key.table() == table {
                        each(key, packed);
                    }
                }
            }
        }
        Ok(())
    }

    /// Drops the generations that are stable, oldest first: one that goes must not uncover an older entry of the
    /// same row. When none is left the folder goes too: sled gives no space back.
    pub(super) fn forget_stable(&mut self, stable: &Vector) -> Result<(), Error> {
        let count = self
            .generations
            .iter()
            .take_while(|generation| stable.includes(&generation.bound))
            .count();
        let stable_ones: Vec<_> = self.generations.drain(..count).collect();
        if stable_ones.is_empty() {
            return Ok(());
        }
        if self.generations.is_empty() {
            drop(stable_ones);
            self.db = None;
            return self.empty_folder();
        }
        if let Some(db) = &self.db {
            for generation in stable_ones {
                db.drop_tree(&generation.name)?;
            }
        }
        Ok(())
    }
}
