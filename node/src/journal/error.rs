//! What can go wrong with the journal, and what the operator should do about it.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anabranch_proto::{NodeId, Position};

use crate::small_file::is_no_space;

/// Why a journal operation failed. Cheap to clone: after a poisoning failure every caller gets a copy.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The file system refused something while the journal was being opened, read or trimmed.
    #[error("cannot {action} {}: {source}; check the disk and the permissions of the daemon's folder", path.display())]
    Io {
        /// What was tried, as a verb.
        action: &'static str,
        /// On which file or folder.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: Arc<io::Error>,
    },
    /// Bytes that were durable have changed, or a file is missing. Nothing is skipped silently.
    #[error(
        "journal file {} is damaged at byte {offset} ({what}); run `anabranch heal`, which makes the journal anew of what the \
         other members hold, or says why it cannot (docs/errors/the-journal-was-lost.md)",
        file.display()
    )]
    Corrupt {
        /// The damaged file.
        file: PathBuf,
        /// Where the damage begins, bytes.
        offset: u64,
        /// What is wrong there.
        what: String,
    },
    /// The journal was written by another node or for another cluster.
    #[error("journal file {} belongs to {found}, not to {expected}; check `node.data_dir`, `node.id` and `cluster.id`", file.display())]
    Foreign {
        /// The file that says so.
        file: PathBuf,
        /// Whose it is.
        found: String,
        /// Who opened it.
        expected: String,
    },
    /// The journal was written by a release with another file format.
    #[error("journal file {} has format {found}, this release reads format {expected}; use the release that wrote it", file.display())]
    Version {
        /// The file that says so.
        file: PathBuf,
        /// Its format.
        found: u32,
        /// The format of this release.
        expected: u32,
    },
    /// Another process has the journal open.
    #[error("the journal in {} is open in another process; stop the other daemon first", dir.display())]
    Locked {
        /// The journal's folder.
        dir: PathBuf,
    },
    /// Options that cannot work.
    #[error("journal options do not fit: {0}")]
    Options(String),
    /// What a reader still needs was deleted, or never was in this journal.
    #[error(
        "the journal no longer holds transactions of node {origin} after {after}, only those after {oldest}; a reader \
         that far behind must start again from a snapshot"
    )]
    Trimmed {
        /// Whose transactions.
        origin: NodeId,
        /// The reader has everything up to here.
        after: Position,
        /// The journal holds everything after this.
        oldest: Position,
    },
    /// A frame does not continue its origin's stream.
    #[error(
        "a frame of node {origin} begins after {prev}, but the journal holds that node's transactions up to {have}; the \
         sender must resume from there"
    )]
    OutOfOrder {
        /// Whose frame.
        origin: NodeId,
        /// Last complete position appended.
        have: Position,
        /// `prev` of the frame.
        prev: Position,
    },
    /// A frame that contradicts itself.
    #[error("a frame of node {origin} is malformed: {what}")]
    BadFrame {
        /// Whose frame.
        origin: NodeId,
        /// What is wrong with it.
        what: String,
    },
    /// A payload that does not unpack to what its frame says.
    #[error("a frame's payload cannot be unpacked: {0}")]
    Unpack(String),
    /// A write or a flush failed earlier: what is durable is known only after a restart.
    #[error("the journal stopped: {reason}; the daemon must restart from what is durable")]
    Poisoned {
        /// The first failure.
        reason: Arc<str>,
    },
    /// The journal was closed by this process.
    #[error("the journal is closed")]
    Closed,
}

impl Error {
    /// An [`Error::Io`] about `path`.
    pub(super) fn io(action: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io {
            action,
            path: path.to_owned(),
            source: Arc::new(source),
        }
    }

    /// Was there no space, as there may be later?
    #[must_use]
    pub fn is_no_space(&self) -> bool {
        matches!(self, Self::Io { source, .. } if is_no_space(source))
    }

    /// An [`Error::Corrupt`] about `file`.
    pub(super) fn corrupt(file: &Path, offset: u64, what: impl Into<String>) -> Self {
        Self::Corrupt {
            file: file.to_owned(),
            offset,
            what: what.into(),
        }
    }
}
