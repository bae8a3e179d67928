//! A disk in memory that forgets what was not synced.
//!
//! Every change goes to the live bytes and to a list of what is pending; a sync makes the pending changes durable; a
//! crash keeps the durable bytes and any part of the pending changes, in any combination, writes also in parts.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsString;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

use rand::Rng;
use rand::rngs::StdRng;

use super::super::disk::{DirLock, Disk, DiskFile};

/// The unit that a disk writes as a whole, bytes.
const SECTOR_LEN: usize = 512;

#[derive(Debug, Clone)]
enum Change {
    Write(usize, Vec<u8>),
    Resize(usize),
}

impl Change {
    fn apply(&self, bytes: &mut Vec<u8>) {
        match self {
            Self::Write(offset, new) => {
                if bytes.len() < offset + new.len() {
                    bytes.resize(offset + new.len(), 0);
                }
                bytes[*offset..offset + new.len()].copy_from_slice(new);
            }
            Self::Resize(len) => bytes.resize(*len, 0),
        }
    }

    /// What of it reached the disk when the power went.
    fn survive(&self, rng: &mut StdRng) -> Vec<Self> {
        let Self::Write(offset, bytes) = self else {
            return if rng.random() {
                vec![self.clone()]
            } else {
                Vec::new()
            };
        };
        let half = bytes.len() / 2;
        match rng.random_range(0..5) {
            0 => Vec::new(),
            1 => vec![self.clone()],
            2 => vec![Self::Write(*offset, bytes[..half].to_vec())],
            3 => vec![Self::Write(offset + half, bytes[half..].to_vec())],
            _ => {
                let sectors = bytes.chunks(SECTOR_LEN).enumerate();
                let kept = sectors.filter(|_| rng.random());
                kept.map(|(at, bytes)| Self::Write(offset + at * SECTOR_LEN, bytes.to_vec()))
                    .collect()
            }
        }
    }
}

#[derive(Clone, Default)]
struct Content {
    live: Vec<u8>,
    durable: Vec<u8>,
    pending: Vec<Change>,
}

impl Content {
    fn change(&mut self, change: Change) {
        change.apply(&mut self.live);
        self.pending.push(change);
    }
}

#[derive(Debug, Clone)]
enum NameChange {
    Create(PathBuf, u64),
    Remove(PathBuf),
}

impl NameChange {
    fn apply(&self, names: &mut BTreeMap<PathBuf, u64>) {
        match self {
            Self::Create(path, file) => drop(names.insert(path.clone(), *file)),
            Self::Remove(path) => drop(names.remove(path)),
        }
    }
}

#[derive(Default)]
struct State {
    names: BTreeMap<PathBuf, u64>,
    durable_names: BTreeMap<PathBuf, u64>,
    pending_names: Vec<NameChange>,
    files: HashMap<u64, Content>,
    next_file: u64,
    /// Changes and syncs so far.
    operations: u64,
    /// The power goes at this operation.
    crash_at: Option<u64>,
    crashed: bool,
    /// How often space was prepared.
    prepared: u64,
    /// Syncs of files wait.
    hold_syncs: bool,
    /// The next sync of a file fails, and its pending changes are lost.
    fail_sync: bool,
    /// All files together may not be longer than this.
    space: Option<usize>,
    /// Reserving is allowed although there is no space, as on a file system that cannot reserve.
    sparse: bool,
}

impl State {
    /// Counts an operation. The one at which the power goes may still have begun.
    fn count(&mut self) -> bool {
        self.operations += 1;
        if self.crash_at.is_some_and(|at| self.operations >= at) {
            self.crashed = true;
        }
        self.crashed
    }

    fn has_space(&self, grows_by: usize) -> bool {
        let used: usize = self.files.values().map(|content| content.live.len()).sum();
        self.space.is_none_or(|space| used + grows_by <= space)
    }
}

/// The disk. Clones are the same disk.
#[derive(Clone, Default)]
pub(super) struct FakeDisk(Arc<Mutex<State>>);

impl fmt::Debug for FakeDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("FakeDisk")
    }
}

fn power_is_off() -> io::Error {
    io::Error::other("the power is off")
}

fn no_space() -> io::Error {
    io::Error::from(io::ErrorKind::StorageFull)
}

impl FakeDisk {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    /// Lets the power go at the `operation`-th change or sync from now.
    pub(super) fn crash_in(&self, operation: u64) {
        let mut state = self.state();
        state.crash_at = Some(state.operations + operation);
    }

    /// Did the power go?
    pub(super) fn is_crashed(&self) -> bool {
        self.state().crashed
    }

    pub(super) fn fail_next_sync(&self) {
        self.state().fail_sync = true;
    }

    /// How often space was prepared so far.
    pub(super) fn prepared(&self) -> u64 {
        self.state().prepared
    }

    /// Lets syncs of files wait, or go on.
    pub(super) fn hold_syncs(&self, hold: bool) {
        self.state().hold_syncs = hold;
    }

    pub(super) fn set_space(&self, space: Option<usize>) {
        self.state().space = space;
    }

    pub(super) fn set_sparse(&self) {
        self.state().sparse = true;
    }

    /// What is found when only the process died: all that it did, still not durable.
    pub(super) fn after_kill(&self) -> Self {
        let state = self.state();
        Self(Arc::new(Mutex::new(State {
            names: state.names.clone(),
            durable_names: state.durable_names.clone(),
            pending_names: state.pending_names.clone(),
            files: state.files.clone(),
            next_file: state.next_file,
            ..State::default()
        })))
    }

    /// What is found when the power comes back.
    pub(super) fn after_crash(&self, rng: &mut StdRng) -> Self {
        let state = self.state();
        // All, nothing, or any part of what was pending.
        let mode = rng.random_range(0..6);
        let mut names = state.durable_names.clone();
        for change in &state.pending_names {
            if mode == 0 || (mode != 1 && rng.random()) {
                change.apply(&mut names);
            }
        }
        let mut files = HashMap::new();
        for (&file, content) in &state.files {
            let mut bytes = content.durable.clone();
            for change in &content.pending {
                match mode {
                    0 => change.apply(&mut bytes),
                    1 => {}
                    _ => change
                        .survive(rng)
                        .iter()
                        .for_each(|change| change.apply(&mut bytes)),
                }
            }
            files.insert(
                file,
                Content {
                    live: bytes.clone(),
                    durable: bytes,
                    pending: Vec::new(),
                },
            );
        }
        files.retain(|file, _| names.values().any(|named| named == file));
        let next_file = state.next_file;
        Self(Arc::new(Mutex::new(State {
            durable_names: names.clone(),
            names,
            files,
            next_file,
            ..State::default()
        })))
    }

    /// A copy to play with, as it is.
    pub(super) fn copy(&self) -> Self {
        let state = self.state();
        let (names, files, next_file) = (state.names.clone(), state.files.clone(), state.next_file);
        Self(Arc::new(Mutex::new(State {
            durable_names: names.clone(),
            names,
            files,
            next_file,
            ..State::default()
        })))
    }

    /// Changes the bytes of the `nth` file by name, behind the journal's back.
    pub(super) fn damage(&self, nth: usize, how: impl FnOnce(&mut Vec<u8>)) {
        let mut state = self.state();
        let Some(&file) = state.names.values().nth(nth) else {
            return;
        };
        let content = state.files.get_mut(&file).unwrap();
        how(&mut content.live);
        content.durable.clone_from(&content.live);
    }

    /// Names, ascending.
    pub(super) fn names(&self) -> Vec<PathBuf> {
        self.state().names.keys().cloned().collect()
    }
}

impl Disk for FakeDisk {
    fn create_dir(&self, _: &Path) -> io::Result<()> {
        Ok(())
    }

    fn lock_dir(&self, _: &Path) -> io::Result<Option<DirLock>> {
        Ok(Some(Box::new(())))
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<OsString>> {
        let names = self.names();
        Ok(names
            .iter()
            .filter_map(|path| Some(path.strip_prefix(dir).ok()?.as_os_str().to_owned()))
            .collect())
    }

    fn create(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        let mut state = self.state();
        if state.crashed {
            return Err(power_is_off());
        }
        if state.names.contains_key(path) {
            return Err(io::Error::from(io::ErrorKind::AlreadyExists));
        }
        let file = state.next_file;
        state.next_file += 1;
        state.files.insert(file, Content::default());
        let change = NameChange::Create(path.to_owned(), file);
        change.apply(&mut state.names);
        state.pending_names.push(change);
        if state.count() {
            Err(power_is_off())
        } else {
            Ok(Arc::new(FakeFile {
                disk: self.clone(),
                file,
            }))
        }
    }

    fn open(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        let state = self.state();
        let file = *state.names.get(path).ok_or(io::ErrorKind::NotFound)?;
        Ok(Arc::new(FakeFile {
            disk: self.clone(),
            file,
        }))
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let mut state = self.state();
        if state.crashed {
            return Err(power_is_off());
        }
        state.names.get(path).ok_or(io::ErrorKind::NotFound)?;
        let change = NameChange::Remove(path.to_owned());
        change.apply(&mut state.names);
        state.pending_names.push(change);
        if state.space.is_some() {
            // So that the space comes back; with crashes the content must stay.
            let State { files, names, .. } = &mut *state;
            files.retain(|file, _| names.values().any(|named| named == file));
        }
        if state.count() {
            Err(power_is_off())
        } else {
            Ok(())
        }
    }

    fn sync_dir(&self, _: &Path) -> io::Result<()> {
        let mut state = self.state();
        if state.count() {
            return Err(power_is_off());
        }
        state.pending_names.clear();
        state.durable_names = state.names.clone();
        Ok(())
    }
}

#[derive(Debug)]
struct FakeFile {
    disk: FakeDisk,
    file: u64,
}

impl FakeFile {
    fn change(&self, change: Change) -> io::Result<()> {
        let mut state = self.disk.state();
        if state.crashed {
            return Err(power_is_off());
        }
        state.files.entry(self.file).or_default().change(change);
        if state.count() {
            Err(power_is_off())
        } else {
            Ok(())
        }
    }
}

impl DiskFile for FakeFile {
    fn len(&self) -> io::Result<u64> {
        Ok(self
            .disk
            .state()
            .files
            .get(&self.file)
            .map_or(0, |content| content.live.len() as u64))
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let state = self.disk.state();
        let bytes = state
            .files
            .get(&self.file)
            .map_or([].as_slice(), |content| content.live.as_slice());
        let from = bytes.get(offset as usize..).unwrap_or_default();
        let count = from.len().min(buffer.len());
        buffer[..count].copy_from_slice(&from[..count]);
        Ok(count)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        {
            let mut state = self.disk.state();
            if state.sparse && !state.has_space(0) {
                // Half of it found a place.
                let half = bytes[..bytes.len() / 2].to_vec();
                state
                    .files
                    .entry(self.file)
                    .or_default()
                    .change(Change::Write(offset as usize, half));
                return Err(no_space());
            }
        }
        self.change(Change::Write(offset as usize, bytes.to_vec()))
    }

    fn allocate(&self, len: u64) -> io::Result<()> {
        let have = self.len()?;
        if have >= len {
            return Ok(());
        }
        {
            let state = self.disk.state();
            if !state.sparse && !state.has_space((len - have) as usize) {
                return Err(no_space());
            }
        }
        self.change(Change::Resize(len as usize))
    }

    /// It is zero already, so there is nothing to do: but nothing else may be there, and it must be in the file.
    fn prepare(&self, from: u64, to: u64) -> io::Result<()> {
        let mut state = self.disk.state();
        let content = state.files.entry(self.file).or_default();
        let there = content.live.get(from as usize..to as usize);
        assert!(
            there.is_some_and(|bytes| bytes.iter().all(|&byte| byte == 0)),
            "zeros over {from}..{to}"
        );
        state.prepared += 1;
        Ok(())
    }

    fn truncate(&self, len: u64) -> io::Result<()> {
        self.change(Change::Resize(len as usize))
    }

    fn sync_data(&self) -> io::Result<()> {
        // As long as a sync takes, frames gather for the next group; without that every group had one frame.
        thread::sleep(Duration::from_micros(20));
        while self.disk.state().hold_syncs {
            thread::yield_now();
        }
        let mut state = self.disk.state();
        if state.count() {
            return Err(power_is_off());
        }
        let fails = std::mem::take(&mut state.fail_sync);
        let content = state.files.entry(self.file).or_default();
        let pending = std::mem::take(&mut content.pending);
        if fails {
            return Err(io::Error::from_raw_os_error(5));
        }
        pending
            .iter()
            .for_each(|change| change.apply(&mut content.durable));
        Ok(())
    }

    fn sync_all(&self) -> io::Result<()> {
        self.sync_data()
    }
}
