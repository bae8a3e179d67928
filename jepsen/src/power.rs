//! Power loss for a daemon: its folder lies on a small file system of its own, in a file behind a loop device. What the
//! daemon wrote and did not sync is in the page cache above that file system and not in the file. So a copy of the file
//! is the disk as a power cut would leave it; it takes the place of the first.
//!
//! Needs root, `mount` and `mkfs.ext4`. Copying takes some ten milliseconds, in which the kernel may write back: ext4's own
//! journal makes good for it, as after a power cut.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::Result;

/// A daemon's disk; unmounted when dropped.
pub struct Disk {
    mount: PathBuf,
    images: PathBuf,
    cuts: u32,
}

/// Why there can be none here.
pub fn impossible() -> Option<String> {
    if !anabranch_tests::process::is_root() {
        return Some("mounting needs root".to_owned());
    }
    let missing = ["mount", "umount", "mkfs.ext4"].into_iter().find(|program| {
        Command::new("sh")
            .args(["-c", &format!("command -v {program}")])
            .output()
            .map_or(true, |output| !output.status.success())
    });
    missing
        .map(|program| format!("there is no {program}"))
        .or_else(|| {
            let loops = Path::new("/dev/loop-control").exists();
            (!loops).then(|| "there are no loop devices".to_owned())
        })
}

fn run(program: &str, args: &[&str]) -> Result<()> {
    let output = Command::new(program).args(args).output()?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr);
    Err(format!("{program} {}: {text}", args.join(" ")).into())
}

impl Disk {
    /// Puts a file system under a folder, with what is in it.
    pub fn under(folder: &Path, images: &Path) -> Result<Self> {
        std::fs::create_dir_all(images)?;
        let disk = Self {
            mount: folder.to_owned(),
            images: images.to_owned(),
            cuts: 0,
        };
        let image = disk.image(0);
        std::fs::File::create(&image)?.set_len(512 << 20)?;
        run("mkfs.ext4", &["-q", "-F", &image])?;
        let kept = images.join("kept");
        let (kept, folder) = (kept.display().to_string(), folder.display().to_string());
        run("cp", &["-a", &folder, &kept])?;
        run("mount", &["-o", "loop", &image, &folder])?;
        run("cp", &["-a", &format!("{kept}/."), &folder])?;
        run("sync", &["-f", &folder])?;
        Ok(disk)
    }

    fn image(&self, cut: u32) -> String {
        self.images.join(format!("disk{cut}")).display().to_string()
    }

    /// Loses all that was not synced. Nobody may have a file open on it.
    pub fn lose_power(&mut self) -> Result<()> {
        let (before, after) = (self.image(self.cuts), self.image(self.cuts + 1));
        run("cp", &["--sparse=always", &before, &after])?;
        let mount = self.mount.display().to_string();
        run("umount", &[&mount])?;
        run("mount", &["-o", "loop", &after, &mount])?;
        std::fs::remove_file(&before)?;
        self.cuts += 1;
        Ok(())
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = run("umount", &["-l", &self.mount.display().to_string()]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_synced_survives_and_what_was_not_is_gone() {
        if impossible().is_some() {
            return;
        }
        let dir = anabranch_tests::postgres::open_dir("jepsen-power-");
        let folder = dir.path().join("folder");
        std::fs::create_dir(&folder).unwrap();
        std::fs::write(folder.join("before"), "x").unwrap();
        let mut disk = Disk::under(&folder, &dir.path().join("images")).unwrap();
        std::fs::write(folder.join("synced"), "x").unwrap();
        std::fs::File::open(folder.join("synced"))
            .unwrap()
            .sync_all()
            .unwrap();
        std::fs::File::open(&folder).unwrap().sync_all().unwrap();
        std::fs::write(folder.join("unsynced"), "x").unwrap();
        disk.lose_power().unwrap();
        let there = |name: &str| folder.join(name).exists();
        assert!(there("before") && there("synced") && !there("unsynced"));
    }
}
