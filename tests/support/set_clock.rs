//! A clock of a server's own, that can be set at any moment, as a machine's can (`set_clock.c`).
//!
//! Not libfaketime: it looks at its file once a second, and it opens files wherever somebody asks for the time, which a
//! server does in its signal handlers, too. Clocks that nobody can set, by which waits are measured, stay right.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use crate::preload;

const SOURCE: &str = include_str!("set_clock.c");

/// What a clock shows.
#[derive(Clone, Copy, Debug)]
pub enum Clock {
    /// The time and so many seconds more.
    WrongBy(i64),
    /// So many seconds since 1970, always.
    StandsAt(i64),
}

/// A clock.
pub struct SetClock {
    library: PathBuf,
    file: PathBuf,
}

impl SetClock {
    /// One that shows this. Needs a C compiler; `dir` must be open to the server's user.
    pub fn new(dir: &Path, shows: Clock) -> Self {
        let library = preload::library(dir, "set_clock", SOURCE).expect("the library is made");
        let file = dir.join("clock-error");
        std::fs::write(&file, [0; 16]).expect("the clock's file is written");
        let clock = Self { library, file };
        clock.set(shows);
        clock
    }

    /// What the server must have in its environment.
    pub fn env(&self) -> [(String, String); 2] {
        [("LD_PRELOAD", &self.library), ("SET_CLOCK_FILE", &self.file)]
            .map(|(name, path)| (name.to_owned(), path.display().to_string()))
    }

    /// Sets it.
    pub fn set(&self, shows: Clock) {
        let (error_s, stands_s) = match shows {
            Clock::WrongBy(error_s) => (error_s, 0),
            Clock::StandsAt(at_s) => (0, at_s),
        };
        let mut both = (error_s * 1_000_000).to_ne_bytes().to_vec();
        both.extend((stands_s * 1_000_000).to_ne_bytes());
        let file = OpenOptions::new().write(true).open(&self.file);
        let file = file.expect("open the clock's file");
        file.write_all_at(&both, 0).expect("the clock is set");
    }
}
