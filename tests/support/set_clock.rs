//! A server's clock that is set at once, while whoever waits goes on waiting (`set_clock.c`).

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

const SOURCE: &str = include_str!("set_clock.c");

/// A clock.
pub struct SetClock {
    library: PathBuf,
    file: PathBuf,
}

impl SetClock {
    /// A right one. Needs a C compiler; `dir` must be open to the server's user.
    pub fn new(dir: &Path) -> Self {
        let (source, library) = (dir.join("set_clock.c"), dir.join("set_clock.so"));
        std::fs::write(&source, SOURCE).expect("the source is written");
        let built = Command::new("cc")
            .args(["-shared", "-fPIC", "-O1", "-Wall", "-o"])
            .args([&library, &source])
            .output()
            .expect("cc runs");
        assert!(
            built.status.success(),
            "{}",
            String::from_utf8_lossy(&built.stderr)
        );
        let file = dir.join("clock-error");
        std::fs::write(&file, [0; 8]).expect("the clock's file is written");
        Self { library, file }
    }

    /// What the server must have in its environment.
    pub fn env(&self) -> [(&'static str, String); 2] {
        [
            ("LD_PRELOAD", self.library.display().to_string()),
            ("SET_CLOCK_FILE", self.file.display().to_string()),
        ]
    }

    /// Sets it to be wrong by so many seconds.
    pub fn set(&self, error_s: i64) {
        let file = OpenOptions::new()
            .write(true)
            .open(&self.file)
            .expect("the clock's file");
        let error_us = error_s * 1_000_000;
        file.write_all_at(&error_us.to_ne_bytes(), 0)
            .expect("the clock is set");
    }
}
