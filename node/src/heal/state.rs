//! What outlives a heal's process: the horizon that the daemon keeps for it, how far it is, and the record of what it did.
//!
//! In:   files of `node.data_dir`: `horizon.json`, `heal.json`, `heal-TIME.ndjson`      Out: the same, whole after a power cut
//! Invariants: 1. a horizon on disk is true: all own transactions below it are in the journal; 2. the daemon does not run while
//!        a heal is in [`Phase::Begun`]; 3. the record is only ever added to
//! Not here: what is made of them (the parent module, `crate::daemon`)

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use anabranch_proto::{Lsn, Position};
use serde::{Deserialize, Serialize};
use serde_json::value::{RawValue, to_raw_value};

use super::sequences::Lifted;
use crate::shared::now_us;
use crate::small_file;
use crate::source::Timelines;

const HORIZON: &str = "horizon.json";
const STATE: &str = "heal.json";

/// More horizons are not kept.
const HORIZONS_MAX: usize = 96;

/// Every committed transaction below `xid` ends at or below `lsn`, and those of this node's applications up to there are
/// durable in the journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Horizon {
    /// 64 bits.
    pub xid: u64,
    /// In this node's WAL.
    pub lsn: Lsn,
    /// Of this timeline; 0 where that was not written down.
    #[serde(default)]
    pub timeline: u32,
    /// When, microseconds since the Unix epoch.
    #[serde(default)]
    pub at_us: i64,
}

/// Horizons that were true at some time, for a server that lacks what came after one.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Horizons(Vec<Horizon>);

/// The last one, and with it those before.
#[derive(Serialize, Deserialize)]
struct Kept {
    #[serde(flatten)]
    last: Horizon,
    #[serde(default)]
    earlier: Vec<Horizon>,
}

impl Horizons {
    /// Adds one, and keeps all, durably. Of the earlier ones fewer are kept the older they are.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn keep(&mut self, dir: &Path, last: Horizon) -> io::Result<()> {
        let kept = Kept {
            last,
            earlier: thinned(self.0.clone(), last.at_us),
        };
        keep(&dir.join(HORIZON), &kept)?;
        self.0 = kept.earlier;
        self.0.push(last);
        Ok(())
    }

    /// Those kept, the oldest first.
    ///
    /// # Errors
    /// When there is a file that cannot be read.
    pub fn read(dir: &Path) -> io::Result<Self> {
        let kept: Option<Kept> = read(&dir.join(HORIZON))?;
        Ok(Self(kept.map_or_else(Vec::new, |kept| {
            let mut all = kept.earlier;
            all.push(kept.last);
            all
        })))
    }

    /// Leaves out what is true only with own transactions behind `end`.
    pub(super) fn cut(&mut self, timelines: &Timelines, end: Position) {
        self.0.retain(|horizon| {
            let epoch = match horizon.timeline {
                0 => timelines.at(horizon.lsn),
                timeline => timeline,
            };
            Position::new(epoch, horizon.lsn.0) <= end
        });
    }

    /// Keeps exactly these, durably; there must be one.
    pub(super) fn rewrite(&self, dir: &Path) -> io::Result<()> {
        let Some((last, earlier)) = self.0.split_last() else {
            return Ok(());
        };
        let kept = Kept {
            last: *last,
            earlier: earlier.to_vec(),
        };
        keep(&dir.join(HORIZON), &kept)
    }

    /// Is there none?
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The last that is true of a server with this history.
    #[must_use]
    pub fn last_of(&self, timelines: &Timelines) -> Option<Horizon> {
        let epoch = |horizon: &Horizon| match horizon.timeline {
            0 => timelines.at(Lsn(1)),
            timeline => timeline,
        };
        let mut newest_first = self.0.iter().rev();
        let found = newest_first.find(|horizon| {
            timelines.holds(Position {
                epoch: epoch(horizon),
                lsn: horizon.lsn,
            })
        });
        found.copied()
    }
}

/// Leaves each one out whose neighbours are near to each other for their age: a place of whatever age has one not more than
/// about twice as old.
fn thinned(all: Vec<Horizon>, now_us: i64) -> Vec<Horizon> {
    let mut kept: Vec<Horizon> = Vec::with_capacity(all.len());
    let mut rest = all.into_iter().peekable();
    while let Some(horizon) = rest.next() {
        let is_between = kept.last().zip(rest.peek()).is_some_and(|(older, newer)| {
            let age = |of: &Horizon| now_us.saturating_sub(of.at_us).max(0);
            age(older) <= age(newer).saturating_mul(2)
        });
        if !is_between {
            kept.push(horizon);
        }
    }
    let excess = kept.len().saturating_sub(HORIZONS_MAX);
    kept.split_off(excess)
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
    /// The server's timeline; 0 where that was not written down.
    #[serde(default)]
    pub timeline: u32,
    /// What the server lacked, if it did: for people.
    #[serde(default)]
    pub lacked: Option<String>,
    /// Sequences that were lifted.
    #[serde(default)]
    pub lifted: Vec<Lifted>,
    /// What of the sequences is left to somebody else: for people.
    #[serde(default)]
    pub sequences: Vec<String>,
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
            timeline: 0,
            lacked: None,
            lifted: Vec::new(),
            sequences: Vec::new(),
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

/// A line of the record about a row: values are as the server has said them, numbers digit by digit.
#[derive(Debug, Serialize)]
#[serde(transparent)]
pub(super) struct Line(BTreeMap<&'static str, Box<RawValue>>);

impl Line {
    /// What was done, and to a row of which table.
    pub(super) fn of(did: &str, table: &str) -> Self {
        Self(BTreeMap::new()).with("did", did).with("table", table)
    }

    /// With this under `name`.
    #[must_use]
    pub(super) fn with(mut self, name: &'static str, value: impl Serialize) -> Self {
        self.0.insert(name, to_raw_value(&value).unwrap_or_default());
        self
    }

    /// With the JSON of a server under `name`; what cannot be read is text.
    #[must_use]
    pub(super) fn with_json(self, name: &'static str, json: &str) -> Self {
        // Values of type `json` come with their line breaks, which no string has in it.
        let line = json.replace(['\n', '\r'], " ");
        match RawValue::from_string(line) {
            Ok(value) => self.with(name, value),
            Err(_) => self.with(name, json),
        }
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

    /// Does its heal still look for what was deleted? So it counts where that cannot be read.
    #[must_use]
    pub fn is_open(&self) -> bool {
        let Some(dir) = self.path.parent() else {
            return false;
        };
        let is_this = |state: State| state.phase == Phase::Written && dir.join(&state.record) == self.path;
        match State::read(dir) {
            Ok(state) => state.is_some_and(is_this),
            Err(_) => true,
        }
    }

    /// Adds lines.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn add(&mut self, lines: &[impl Serialize]) -> io::Result<()> {
        let file = match &mut self.file {
            Some(file) => file,
            None => self.file.insert(
                OpenOptions::new()
                    .create(true)
                    .append(true)
                    .mode(small_file::MODE_FILE)
                    .open(&self.path)?,
            ),
        };
        let mut text = String::new();
        for line in lines {
            text.push_str(&serde_json::to_string(line).map_err(io::Error::other)?);
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
        assert!(Horizons::read(dir.path()).unwrap().is_empty());
        assert_eq!(State::read(dir.path()).unwrap(), None);
        let horizon = |n: u64| Horizon {
            xid: (5 << 32) + n,
            lsn: Lsn(n),
            timeline: 1,
            at_us: 0,
        };
        let mut horizons = Horizons::default();
        for n in [9, 12] {
            horizons.keep(dir.path(), horizon(n)).unwrap();
        }
        assert_eq!(
            Horizons::read(dir.path()).unwrap(),
            Horizons(vec![horizon(9), horizon(12)])
        );
        std::fs::write(dir.path().join(HORIZON), r#"{"xid": 7, "lsn": "0/9"}"#).unwrap();
        let former = Horizon {
            timeline: 0,
            ..horizon(9)
        };
        assert_eq!(
            Horizons::read(dir.path()).unwrap(),
            Horizons(vec![Horizon { xid: 7, ..former }])
        );
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
    fn of_any_age_there_is_a_horizon_not_much_older_and_all_are_few() {
        const SECOND: u64 = 1_000_000;
        let mut all = Vec::new();
        for n in 0..200_000u64 {
            let now_us = (2 * n * SECOND) as i64;
            all = thinned(all, now_us);
            all.push(Horizon {
                xid: n,
                lsn: Lsn(n),
                timeline: 1,
                at_us: now_us,
            });
        }
        assert!(all.len() < 60, "{}", all.len());
        let now = 2 * 200_000 * SECOND;
        for age in [5, 60, 3_600, 86_400, 300_000] {
            let wanted = (now - age * SECOND) as i64;
            let found = all.iter().rev().find(|horizon| horizon.at_us <= wanted).unwrap();
            assert!(
                now as i64 - found.at_us <= (age * SECOND * 5 / 2 + 4 * SECOND) as i64,
                "{age}"
            );
        }
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

    #[test]
    fn a_record_is_open_until_its_heal_is_done_or_another_has_begun() {
        let dir = tempfile::tempdir().unwrap();
        let mut state = State::begin(7);
        let record = state.record(dir.path());
        let mut is_open_in = |phase, name: &str| {
            state.phase = phase;
            name.clone_into(&mut state.record);
            state.keep(dir.path()).unwrap();
            record.is_open()
        };
        let name = record.path().file_name().unwrap().to_str().unwrap();
        assert!(is_open_in(Phase::Written, name));
        assert!(!is_open_in(Phase::Done, name));
        assert!(!is_open_in(Phase::Written, "heal-0.ndjson"));
    }

    #[test]
    fn a_line_has_a_row_as_the_server_has_said_it() {
        let dir = tempfile::tempdir().unwrap();
        let state = State::begin(7);
        let row = "{\"n\":123456789012345678901234567890.10,\"doc\":{\n\t\"v\": 1.50}}";
        let lines = [
            Line::of("deleted", "public.t").with_json("row", row),
            Line::of("deleted", "public.t")
                .with_json("row", "no {")
                .with("rows", 2),
        ];
        state.record(dir.path()).add(&lines).unwrap();
        let text = std::fs::read_to_string(dir.path().join(&state.record)).unwrap();
        let expected = "{\"did\":\"deleted\",\"row\":{\"n\":123456789012345678901234567890.10,\"doc\":{ \t\"v\": 1.50}},\
            \"table\":\"public.t\"}\n{\"did\":\"deleted\",\"row\":\"no {\",\"rows\":2,\"table\":\"public.t\"}\n";
        assert_eq!(text, expected);
    }
}
