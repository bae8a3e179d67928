//! Small files that a power cut leaves whole: the old one or the new one, never half or empty. And whose they are: the daemon's
//! folder and what is in it are nobody else's to read, since they hold rows. [`off_runtime`] is for tasks that write such.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;

use tokio::runtime::{Handle, RuntimeFlavor};

/// Mode of files that hold rows or state: read and written by their owner alone, whatever the umask.
pub const MODE_FILE: u32 = 0o600;
/// Mode of folders that hold such.
pub const MODE_FOLDER: u32 = 0o700;

/// Makes a folder for the daemon's files, and those above it that are missing; one that is there stays as it is.
///
/// # Errors
/// What the system says.
pub fn make_folder(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(MODE_FOLDER).create(path)
}

/// Who beside its owner may enter or read a folder, for people; none where nobody may.
///
/// # Errors
/// What the system says.
pub fn open_to(path: &Path) -> io::Result<Option<&'static str>> {
    let mode = fs::metadata(path)?.mode();
    Ok(match (mode & 0o007, mode & 0o070) {
        (0, 0) => None,
        (0, _) => Some("its group"),
        _ => Some("everybody"),
    })
}

/// Does this error mean that there is no space now, and that there may be later?
pub(crate) fn is_no_space(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    )
}

/// Puts `text` into `path`, whatever is there: written beside it, synced, renamed, the folder synced.
///
/// # Errors
/// When any of that fails; then what was there is there, or the new.
pub(crate) fn replace(path: &Path, text: &[u8]) -> io::Result<()> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(".new");
    let beside = Path::new(&beside);
    let mut options = OpenOptions::new();
    let mut file = options
        .write(true)
        .create(true)
        .truncate(true)
        .mode(MODE_FILE)
        .open(beside)?;
    file.write_all(text)?;
    file.sync_all()?;
    fs::rename(beside, path)?;
    match path.parent() {
        Some(folder) => File::open(folder)?.sync_all(),
        None => Ok(()),
    }
}

/// Does what waits for the disk, from within a task. The thread that it runs on is one of few, and may be the one that looks after all
/// sockets: others take its place meanwhile.
pub(crate) fn off_runtime<T>(work: impl FnOnce() -> T) -> T {
    match Handle::try_current().map(|runtime| runtime.runtime_flavor()) {
        Ok(RuntimeFlavor::MultiThread) => tokio::task::block_in_place(work),
        // There is no other thread.
        _ => work(),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn folders_and_files_are_their_owners_alone() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("above").join("data");
        make_folder(&folder).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o777;
        assert_eq!((mode(&folder), mode(&dir.path().join("above"))), (0o700, 0o700));
        assert_eq!(open_to(&folder).unwrap(), None);
        replace(&folder.join("file"), b"text").unwrap();
        assert_eq!(mode(&folder.join("file")), 0o600);
        for (bits, who) in [(0o750, "its group"), (0o705, "everybody"), (0o711, "everybody")] {
            fs::set_permissions(&folder, fs::Permissions::from_mode(bits)).unwrap();
            assert_eq!(open_to(&folder).unwrap(), Some(who));
        }
        // What is there stays as it is.
        make_folder(&folder).unwrap();
        assert_eq!(mode(&folder), 0o711);
    }
}
