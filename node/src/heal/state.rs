//! What outlives a heal's process: the horizon that the daemon keeps for it, how far it is, and the record of what it did.
//!
//! In:   files of `node.data_dir`: `horizon.json`, `heal.json`, `heal-TIME.ndjson`      Out: the same, whole after a power cut
//! Invariants: 1. a horizon on disk is true: all own transactions below it are in the journal; 2. the daemon does not run while
//!        a heal is in [`Phase::Begun`]; 3. the record is only ever added to
//! Not here: what is made of them (the parent module, `crate::daemon`)

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use anabranch_proto::Lsn;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::shared::now_us;
use crate::small_file;

const HORIZON: &str = "horizon.json";
const STATE: &str = "heal.json";

/// Every committed transaction below `xid` ends at or below `lsn`, and those of this node's applications up to there are
/// durable in the journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Horizon {
    /// 64 bits.
    pub xid: u64,
    /// In this node's WAL.
    pub lsn: Lsn,
}

impl Horizon {
    /// Keeps it, durably, in place of the former one.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn keep(&self, dir: &Path) -> io::Result<()> {
        keep(&dir.join(HORIZON), self)
    }

    /// The one kept last.
    ///
    /// # Errors
    /// When there is a file that cannot be read.
    pub fn read(dir: &Path) -> io::Result<Option<Self>> {
        read(&dir.join(HORIZON))
    }
}

/// How far a heal is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// The slot is being made, and rows are being written again.
    Begun,
    /// Rows are written again; what was deleted is still to be found.
    Written,
    /// All is done.
    Done,
}

/// The heal begun last.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// How far it is.
    pub phase: Phase,
    /// Where the new slot begins; none while it is not made.
    pub slot_at: Option<Lsn>,
    /// Transactions from here on may be in the gap, 64 bits.
    pub first_xid: u64,
    /// Transactions from here on are in the new slot's stream.
    pub end_xid: Option<u64>,
    /// What `anabranch.clock` said for no node.
    pub first_witness: Option<i64>,
    /// File name of the record.
    pub record: String,
    /// Rows written again so far.
    pub rows: u64,
    /// From here on in the WAL nobody writes a row that the others may not have heard of.
    #[serde(default)]
    pub told_at: Option<Lsn>,
}

impl State {
    /// A heal that begins now.
    #[must_use]
    pub fn begin(first_xid: u64) -> Self {
        Self {
            phase: Phase::Begun,
            slot_at: None,
            first_xid,
            end_xid: None,
            first_witness: None,
            record: format!("heal-{}.ndjson", now_us() / 1_000),
            rows: 0,
            told_at: None,
        }
    }

    /// The state kept last.
    ///
    /// # Errors
    /// When there is a file that cannot be read.
    pub fn read(dir: &Path) -> io::Result<Option<Self>> {
        read(&dir.join(STATE))
    }

    /// Keeps it, durably.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn keep(&self, dir: &Path) -> io::Result<()> {
        keep(&dir.join(STATE), self)
    }

    /// The record of this heal.
    #[must_use]
    pub fn record(&self, dir: &Path) -> Record {
        Record {
            path: dir.join(&self.record),
            file: None,
        }
    }
}

fn keep(path: &Path, value: &impl Serialize) -> io::Result<()> {
    let text = serde_json::to_vec_pretty(value).map_err(io::Error::other)?;
    small_file::replace(path, &text)
}

fn read<T: for<'a> Deserialize<'a>>(path: &Path) -> io::Result<Option<T>> {
    match std::fs::read(path) {
        Ok(text) => Ok(Some(serde_json::from_slice(&text).map_err(io::Error::other)?)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// A file to which lines of JSON are added.
#[derive(Debug)]
pub struct Record {
    path: PathBuf,
    file: Option<File>,
}

impl Record {
    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Adds lines.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn add(&mut self, lines: &[Value]) -> io::Result<()> {
        let file = match &mut self.file {
            Some(file) => file,
            None => self
                .file
                .insert(OpenOptions::new().create(true).append(true).open(&self.path)?),
        };
        let mut text = String::new();
        for line in lines {
            text.push_str(&line.to_string());
            text.push('\n');
        }
        file.write_all(text.as_bytes())
    }

    /// Makes what was added durable.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn sync(&self) -> io::Result<()> {
        self.file.as_ref().map_or(Ok(()), File::sync_all)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_kept_is_read_back_and_nothing_is_nothing() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Horizon::read(dir.path()).unwrap(), None);
        assert_eq!(State::read(dir.path()).unwrap(), None);
        let horizon = Horizon {
            xid: (5 << 32) + 7,
            lsn: Lsn(9),
        };
        horizon.keep(dir.path()).unwrap();
        assert_eq!(Horizon::read(dir.path()).unwrap(), Some(horizon));
        let state = State {
            slot_at: Some(Lsn(11)),
            ..State::begin(7)
        };
        state.keep(dir.path()).unwrap();
        assert_eq!(State::read(dir.path()).unwrap(), Some(state));
        std::fs::write(dir.path().join(STATE), "{").unwrap();
        assert!(State::read(dir.path()).is_err());
    }

    #[test]
    fn a_record_is_added_to() {
        let dir = tempfile::tempdir().unwrap();
        let state = State::begin(7);
        for n in [1, 2] {
            let mut record = state.record(dir.path());
            record.add(&[json!({ "n": n })]).unwrap();
            record.sync().unwrap();
        }
        let text = std::fs::read_to_string(dir.path().join(&state.record)).unwrap();
        assert_eq!(text, "{\"n\":1}\n{\"n\":2}\n");
    }
}
