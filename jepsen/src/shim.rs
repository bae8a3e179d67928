//! Reaches into fsync of a running server or daemon, by a small library that is preloaded into it (`fsync_shim.c`).

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anabranch_tests::preload;

use crate::Result;

const SOURCE: &str = include_str!("fsync_shim.c");

/// What one process and its children are told of fsync.
pub struct Shim {
    library: PathBuf,
    says: PathBuf,
    /// Has a byte for each call that failed or was slow.
    met: PathBuf,
}

/// Compiles the library into a folder that everybody may enter.
pub fn compile(dir: &Path) -> Result<PathBuf> {
    Ok(preload::library(dir, "fsync_shim", SOURCE)?)
}

impl Shim {
    /// One that lets everything pass; `says` is its file.
    pub fn new(library: &Path, says: PathBuf) -> Result<Self> {
        let shim = Self {
            library: library.to_owned(),
            met: says.with_extension("met"),
            says,
        };
        std::fs::write(&shim.met, "")?;
        // The server's user writes into it.
        std::fs::set_permissions(&shim.met, std::fs::Permissions::from_mode(0o666))?;
        shim.set("pass")?;
        Ok(shim)
    }

    /// What the process must have in its environment.
    pub fn env(&self) -> [(String, String); 3] {
        [
            ("LD_PRELOAD", &self.library),
            ("JEPSEN_FSYNC", &self.says),
            ("JEPSEN_FSYNC_MET", &self.met),
        ]
        .map(|(name, path)| (name.to_owned(), path.display().to_string()))
    }

    /// `pass`, `fail`, or `slow MS`, from now on; counts anew.
    pub fn set(&self, how: &str) -> std::result::Result<(), String> {
        let next = self.says.with_extension("next");
        let told = std::fs::write(&next, how).and_then(|()| std::fs::rename(&next, &self.says));
        let told = told.and_then(|()| {
            std::fs::OpenOptions::new()
                .write(true)
                .truncate(true)
                .open(&self.met)
        });
        told.map(drop)
            .map_err(|error| format!("{}: {error}", self.says.display()))
    }

    /// How many calls failed or were slow since it was last set.
    pub fn met(&self) -> u64 {
        std::fs::metadata(&self.met).map_or(0, |file| file.len())
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
        let shim = Shim::new(&compile(dir.path()).unwrap(), dir.path().join("says")).unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "x").unwrap();
        let syncs = || {
            let mut sync = Command::new("sync");
            sync.arg("--data").arg(&file).envs(shim.env());
            sync.output().unwrap().status.success()
        };
        assert!(syncs());
        assert_eq!(shim.met(), 0);
        shim.set("fail").unwrap();
        assert_eq!(shim.met(), 0);
        assert!(!syncs() && !syncs());
        assert_eq!(shim.met(), 2);
        shim.set("slow 1").unwrap();
        assert!(syncs());
        assert_eq!(shim.met(), 1);
    }

    #[test]
    fn what_cannot_be_told_to_it_is_an_error() {
        let dir = anabranch_tests::postgres::open_dir("jepsen-shim-");
        let shim = Shim::new(&dir.path().join("library"), dir.path().join("says")).unwrap();
        drop(dir);
        assert!(shim.set("fail").is_err());
    }
}
