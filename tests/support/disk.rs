//! A disk of its own for a daemon or a server: a small ext4 in a file behind a loop device. It can lose power, be full, and hang.
//!
//! *Power loss*: what was written and not synced is in the page cache above that file system and not in the file. So a copy of
//! the file is the disk as a power cut would leave it; it takes the place of the first. Copying takes some ten milliseconds, in
//! which the kernel may write back: ext4's own journal makes good for it, as after a power cut.
//! *Full*: a file takes all space that is left. *Hung*: `fsfreeze`, so that whoever writes waits.
//!
//! Needs root, `mount` and `mkfs.ext4`.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// What `mount` and others say when they fail.
pub type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// A disk; thawed and unmounted when dropped.
pub struct Disk {
    mount: PathBuf,
    images: PathBuf,
    cuts: u32,
    frozen: bool,
    mounted: bool,
}

/// Why there can be none here. That programs and devices are there does not say that they may be used, in a container for example: a small
/// disk is made, loses power and hangs, once for this process.
pub fn impossible() -> Option<String> {
    static WHY: OnceLock<Option<String>> = OnceLock::new();
    WHY.get_or_init(|| missing().or_else(|| tried().err().map(|error| error.to_string())))
        .clone()
}

fn tried() -> Result<()> {
    let dir = crate::postgres::open_dir("anabranch-disk-");
    let folder = dir.path().join("folder");
    std::fs::create_dir(&folder)?;
    let mut disk = Disk::under(&folder, &dir.path().join("images"), 16)?;
    disk.lose_power()?;
    disk.freeze(true)?;
    disk.freeze(false)
}

/// What is not there.
fn missing() -> Option<String> {
    if !crate::process::is_root() {
        return Some("mounting needs root".to_owned());
    }
    let missing = ["mount", "umount", "mkfs.ext4", "fsfreeze", "fallocate"]
        .into_iter()
        .find(|program| {
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
    pub fn under(folder: &Path, images: &Path, mib: u64) -> Result<Self> {
        std::fs::create_dir_all(images)?;
        let mut disk = Self {
            mount: folder.to_owned(),
            images: images.to_owned(),
            cuts: 0,
            frozen: false,
            mounted: false,
        };
        let image = disk.image(0);
        std::fs::File::create(&image)?.set_len(mib << 20)?;
        run("mkfs.ext4", &["-q", "-F", "-m", "0", &image])?;
        let kept = images.join("kept");
        let (kept, folder) = (kept.display().to_string(), folder.display().to_string());
        run("cp", &["-a", &folder, &kept])?;
        run("mount", &["-o", "loop", &image, &folder])?;
        disk.mounted = true;
        run("cp", &["-a", &format!("{kept}/."), &folder])?;
        run("chown", &["--reference", &kept, &folder])?;
        run("chmod", &["--reference", &kept, &folder])?;
        run("sync", &["-f", &folder])?;
        Ok(disk)
    }

    fn image(&self, cut: u32) -> String {
        self.images.join(format!("disk{cut}")).display().to_string()
    }

    /// Loses all that was not synced. Nobody may have a file open on it.
    ///
    /// # Errors
    /// When it cannot be: then it is as before, or, if that cannot be either, not there ([`Self::is_mounted`]).
    pub fn lose_power(&mut self) -> Result<()> {
        let (before, after) = (self.image(self.cuts), self.image(self.cuts + 1));
        run("cp", &["--sparse=always", &before, &after])?;
        let mount = self.mount.display().to_string();
        run("umount", &[&mount])?;
        self.mounted = false;
        if let Err(error) = run("mount", &["-o", "loop", &after, &mount]) {
            // Nobody may take the empty folder below for the disk.
            run("mount", &["-o", "loop", &before, &mount])
                .map_err(|second| format!("{error}; and then it was gone: {second}"))?;
            self.mounted = true;
            return Err(error);
        }
        self.mounted = true;
        std::fs::remove_file(&before)?;
        self.cuts += 1;
        Ok(())
    }

    /// Is it there? If not, its folder is an empty one of another disk.
    pub fn is_mounted(&self) -> bool {
        self.mounted
    }

    /// Leaves not a byte of space.
    pub fn fill(&mut self) -> Result<()> {
        let ballast = self.ballast();
        let left = Command::new("df")
            .args(["--output=avail", "--block-size=1"])
            .arg(&self.mount)
            .output()?;
        let text = String::from_utf8_lossy(&left.stdout);
        let bytes = text.lines().nth(1).unwrap_or("").trim().to_owned();
        // The file system needs some of it for the file itself; whatever is left is written below.
        let most = bytes.parse::<u64>()?.saturating_sub(4 << 20);
        if most > 0 {
            run("fallocate", &["-l", &most.to_string(), &ballast])?;
        }
        // What the file system had kept back.
        let mut more = std::fs::File::create(format!("{ballast}.more"))?;
        while std::io::Write::write_all(&mut more, &[0; 4096]).is_ok() {}
        Ok(())
    }

    /// Gives the space back, if any was taken.
    pub fn try_empty(&mut self) -> Result<()> {
        let ballast = self.ballast();
        for file in [format!("{ballast}.more"), ballast] {
            match std::fs::remove_file(&file) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(format!("{file}: {error}").into());
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// [`Self::try_empty`], panicking on an error.
    pub fn empty(&mut self) {
        self.try_empty().expect("give the space back");
    }

    fn ballast(&self) -> String {
        self.mount.join("jepsen-ballast").display().to_string()
    }

    /// Makes every writer wait, or lets it go on.
    pub fn freeze(&mut self, frozen: bool) -> Result<()> {
        if frozen == self.frozen {
            return Ok(());
        }
        let mount = self.mount.display().to_string();
        run(
            "fsfreeze",
            &[if frozen { "--freeze" } else { "--unfreeze" }, &mount],
        )?;
        self.frozen = frozen;
        Ok(())
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        if self.frozen {
            let _ = self.freeze(false);
        }
        if self.mounted {
            let _ = run("umount", &["-l", &self.mount.display().to_string()]);
        }
    }
}
