//! Reaches into fsync of a running server or daemon, by a small library that is preloaded into it (`fsync_shim.c`).

use std::path::{Path, PathBuf};

use anabranch_tests::preload;

use crate::Result;

const SOURCE: &str = include_str!("fsync_shim.c");

/// What one process and its children are told of fsync.
pub struct Shim {
    library: PathBuf,
    says: PathBuf,
}

/// Compiles the library into a folder that everybody may enter.
pub fn compile(dir: &Path) -> Result<PathBuf> {
    Ok(preload::library(dir, "fsync_shim", SOURCE)?)
}

impl Shim {
    /// One that lets everything pass; `says` is its file.
    pub fn new(library: &Path, says: PathBuf) -> Self {
        let shim = Self {
            library: library.to_owned(),
            says,
        };
        shim.set("pass");
        shim
    }

    /// What the process must have in its environment.
    pub fn env(&self) -> [(String, String); 2] {
        [
            ("LD_PRELOAD".to_owned(), self.library.display().to_string()),
            ("JEPSEN_FSYNC".to_owned(), self.says.display().to_string()),
        ]
    }

    /// `pass`, `fail`, or `slow MS`, from now on.
    pub fn set(&self, how: &str) {
        let next = self.says.with_extension("next");
        let _ = std::fs::write(&next, how).and_then(|()| std::fs::rename(&next, &self.says));
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn fsync_fails_while_it_is_told_to() {
        if preload::impossible().is_some() {
            return;
        }
        let dir = anabranch_tests::postgres::open_dir("jepsen-shim-");
        let shim = Shim::new(&compile(dir.path()).unwrap(), dir.path().join("says"));
        let file = dir.path().join("file");
        std::fs::write(&file, "x").unwrap();
        let syncs = || {
            let mut sync = Command::new("sync");
            sync.arg("--data").arg(&file).envs(shim.env());
            sync.output().unwrap().status.success()
        };
        assert!(syncs());
        shim.set("fail");
        assert!(!syncs());
        shim.set("slow 1");
        assert!(syncs());
    }
}
