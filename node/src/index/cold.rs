//! Index entries that did not fit in memory, in sled.
//!
//! Generations: each overflow becomes one tree, dropped whole once everything in it is stable. Its entries are sorted
//! and stored in [`block`]s, under the first key of each: an entry an item would cost sled some 3 KB of memory each while
//! it is written (measured: 5.7 GB for 1.8 million). A look into a generation costs up to
//! a hundred microseconds, and there are as many as the budget of memory was filled: each has a filter that says of most keys that they
//! are not in it. What asks for the rows of one table reads that table's blocks only, and none of a generation in which no row of
//! the table can be among them by its [`Summary`].
//! sled never holds the only copy of anything here (its `flush` does not sync, see `docs/decisions/0002`):
//! the folder is emptied at start and the index rebuilt from the journal.

mod block;

use std::collections::HashMap;
use std::path::Path;

use anabranch_proto::{Stamp, Vector};

use super::Packed;
use super::filter::{Filter, Hashed};
use super::key::{RowKey, TableId};
use crate::small_file::is_no_space;
use block::Block;

/// The overflow cannot be used.
#[derive(Debug, thiserror::Error)]
#[error(
    "row index overflow in the data folder: {text}; free disk space, or mend the disk and restart the daemon"
)]
pub struct Error {
    text: String,
    is_no_space: bool,
}

impl Error {
    /// Was a disk full? What is in the overflow is made anew, once there is space.
    #[must_use]
    pub const fn is_no_space(&self) -> bool {
        self.is_no_space
    }
}

impl From<sled::Error> for Error {
    fn from(error: sled::Error) -> Self {
        Self {
            is_no_space: matches!(&error, sled::Error::Io(error) if is_no_space(error)),
            text: error.to_string(),
        }
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
    /// Of each table that it has rows of.
    tables: HashMap<TableId, Summary>,
}

impl Generation {
    fn is_stable(&self, stable: &Vector) -> bool {
        self.tables.values().all(|table| stable.includes(&table.upto))
    }
}

/// What is known of the rows of one table in a generation without reading them.
#[derive(Debug, Clone)]
pub struct Summary {
    /// Each version is at or below this.
    pub upto: Vector,
    /// No stamp is above this.
    pub newest: Stamp,
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
            Err(error) => Err(Error {
                text: format!("{}: {error}", self.dir.display()),
                is_no_space: is_no_space(&error),
            }),
        }
    }

    pub(super) fn folder(&self) -> &Path {
        &self.dir
    }

    pub(super) fn len(&self) -> usize {
        self.generations.iter().map(|generation| generation.len).sum()
    }

    pub(super) fn has_unstable(&self, stable: &Vector) -> bool {
        self.generations
            .iter()
            .any(|generation| !generation.is_stable(stable))
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
            tables: HashMap::new(),
        };
        entries.sort_unstable_by(|a, b| a.0.cmp(&b.0));
        let mut writer = block::Writer::default();
        for (key, packed) in &entries {
            let version = packed.entry().version;
            let summary = generation.tables.entry(key.table()).or_insert(Summary {
                upto: Vector::new(),
                newest: Stamp::ZERO,
            });
            summary.upto.raise(version.origin(), version.position);
            summary.newest = summary.newest.max(version.stamp);
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

    /// Calls `each` for the entries of a table, older ones first; not for those of generations that `may_hold` rules out. Was any?
    pub(super) fn each_of(
        &self,
        table: TableId,
        may_hold: impl Fn(&Summary) -> bool,
        mut each: impl FnMut(RowKey, Packed),
    ) -> Result<bool, Error> {
        let mut is_partial = false;
        let from = table.0.to_be_bytes();
        for generation in &self.generations {
            let Some(summary) = generation.tables.get(&table) else {
                continue;
            };
            if !may_hold(summary) {
                is_partial = true;
                continue;
            }
            // Blocks are named by their first keys: the table may begin in one that begins before it.
            let tree = &generation.tree;
            let before = tree.range(..from).next_back();
            let within = match table.0.checked_add(1) {
                Some(next) => tree.range(from..next.to_be_bytes()),
                None => tree.range(from..),
            };
            for item in before.into_iter().chain(within) {
                let (_, block) = item?;
                for (key, packed) in Block::new(&block).into_iter().flat_map(Block::entries) {
                    let key = RowKey::from_bytes(key);
                    if key.table() == table {
                        each(key, packed);
                    }
                }
            }
        }
        Ok(is_partial)
    }

    /// Drops the generations that are stable and hold nothing above a truncate of its table that `truncated` tells, oldest first: one
    /// that goes must not uncover an older entry of the same row. When none is left the folder goes too: sled gives no space back.
    pub(super) fn forget_stable(
        &mut self,
        stable: &Vector,
        truncated: impl Fn(TableId) -> Option<Stamp>,
    ) -> Result<(), Error> {
        let is_above = |(id, table): (&TableId, &Summary)| truncated(*id).is_some_and(|at| table.newest > at);
        let may_go = |generation: &&Generation| {
            generation.is_stable(stable) && !generation.tables.iter().any(is_above)
        };
        let count = self.generations.iter().take_while(may_go).count();
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

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[test]
    fn a_full_disk_is_told_from_one_that_is_broken() {
        let of = |kind: io::ErrorKind| Error::from(sled::Error::Io(kind.into()));
        assert!(of(io::ErrorKind::StorageFull).is_no_space());
        assert!(of(io::ErrorKind::QuotaExceeded).is_no_space());
        assert!(!of(io::ErrorKind::NotFound).is_no_space());
        assert!(!Error::from(sled::Error::Unsupported("this".to_owned())).is_no_space());
    }
}
