//! The machine that something was measured on, as far as it matters for speed.

use std::fmt;
use std::fs::{canonicalize, read_to_string};
use std::path::Path;

use serde::{Deserialize, Serialize};

/// What is kept beside each measurement.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Machine {
    /// The processor's model.
    pub cpu: String,
    /// Processors that this process may use.
    pub cores: usize,
    pub memory_mib: u64,
    pub kernel: String,
    /// What the servers and daemons write to: file system, device, and whether it turns.
    pub disk: String,
}

impl Machine {
    /// This one; servers and daemons have their folders in `dir`.
    pub fn this(dir: &Path) -> Self {
        let cpu = read_to_string("/proc/cpuinfo").unwrap_or_default();
        let memory = read_to_string("/proc/meminfo").unwrap_or_default();
        let kernel = read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        Self {
            cpu: after_colon(&cpu, "model name")
                .unwrap_or(std::env::consts::ARCH)
                .to_owned(),
            cores: std::thread::available_parallelism().map_or(0, std::num::NonZero::get),
            memory_mib: after_colon(&memory, "MemTotal")
                .and_then(|size| size.trim_end_matches("kB").trim().parse::<u64>().ok())
                .unwrap_or(0)
                / 1024,
            kernel: kernel.trim().to_owned(),
            disk: disk(dir),
        }
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}, {} cores, {:.1} GiB of memory, Linux {}, servers on {}",
            self.cpu,
            self.cores,
            self.memory_mib as f64 / 1024.0,
            self.kernel,
            self.disk
        )
    }
}

/// The value of the first line `NAME : VALUE`.
fn after_colon<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == name).then(|| value.trim())
    })
}

/// File system and device below `dir`.
fn disk(dir: &Path) -> String {
    let mounts = read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let dir = canonicalize(dir).unwrap_or_else(|_| dir.to_owned());
    let Some(mount) = mount_of(&mounts, &dir) else {
        return "an unknown file system".to_owned();
    };
    let turns = match rotational(mount.device) {
        Some(true) => ", turning by the kernel's word",
        Some(false) => ", not turning",
        None => "",
    };
    format!("{} ({}{turns})", mount.file_system, mount.source)
}

struct Mount<'a> {
    /// Major and minor number.
    device: &'a str,
    file_system: &'a str,
    source: &'a str,
}

/// The mount that a folder is in: the one with the longest path above it, the last of several at one place.
fn mount_of<'a>(mounts: &'a str, dir: &Path) -> Option<Mount<'a>> {
    let found = mounts.lines().filter_map(|line| {
        // id parent major:minor root place options ... - type source options
        let (left, right) = line.split_once(" - ")?;
        let mut left = left.split(' ').skip(2);
        let (device, place) = (left.next()?, left.nth(1)?);
        let mut right = right.split(' ');
        let mount = Mount {
            device,
            file_system: right.next()?,
            source: right.next()?,
        };
        dir.starts_with(place).then_some((place.len(), mount))
    });
    found.max_by_key(|(len, _)| *len).map(|(_, mount)| mount)
}

/// Does a device turn? Nobody knows of one in memory, of a network or of several.
fn rotational(device: &str) -> Option<bool> {
    // A partition's folder is inside its disk's.
    let places = ["queue/rotational", "../queue/rotational"];
    let text = places
        .iter()
        .find_map(|place| read_to_string(format!("/sys/dev/block/{device}/{place}")).ok())?;
    Some(text.trim() == "1")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_on_the_mount_nearest_above_it() {
        let mounts = "22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw\n\
                      25 22 0:23 / /dev/shm rw - tmpfs tmpfs rw\n\
                      26 22 0:24 / /dev rw - devtmpfs devtmpfs rw\n";
        let on = |dir: &str| mount_of(mounts, Path::new(dir)).map(|mount| mount.file_system.to_owned());
        assert_eq!(on("/dev/shm/a").as_deref(), Some("tmpfs"));
        assert_eq!(on("/dev/shmx").as_deref(), Some("devtmpfs"));
        assert_eq!(on("/var/tmp").as_deref(), Some("ext4"));
        assert!(mount_of("", Path::new("/")).is_none());
    }

    #[test]
    fn this_machine_has_processors_and_memory() {
        let machine = Machine::this(&std::env::temp_dir());
        assert!(machine.cores > 0 && machine.memory_mib > 0 && !machine.cpu.is_empty());
    }
}
