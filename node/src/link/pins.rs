//! Remembers the first incarnation seen of each peer, in `peers.json` of the daemon's folder.
//!
//! In:   the incarnation in a peer's hello            Out: a refusal when it is not the remembered one
//! Holds: one entry per peer
//! Invariants: 1. an entry, once written, is never replaced; 2. a peer is welcome only after its entry is on disk.
//! On crash: the file is replaced atomically, so it holds the entries of before or of after.
//! Not here: the other checks (`handshake.rs`).

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use anabranch_proto::NodeId;
use serde::{Deserialize, Serialize};

use super::handshake::{Refusal, RefusalCode};

/// Name of the file in the daemon's folder.
pub(super) const FILE_NAME: &str = "peers.json";

/// What is remembered of one peer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Pin {
    /// Its name when it was first met.
    pub name: String,
    /// The incarnation it showed then.
    pub incarnation: String,
}

/// The file cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PinsError {
    /// Reading or writing failed.
    #[error("cannot {action} {}; check the folder's owner and free space", path.display())]
    Io {
        /// `read` or `write`.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is not what we wrote.
    #[error(
        "{} is damaged; remove it if you are sure that every peer runs the database it always ran (the daemon then \
         remembers what it meets next)",
        path.display()
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
}

/// The remembered incarnations.
#[derive(Debug)]
pub(super) struct Pins {
    path: PathBuf,
    known: Mutex<BTreeMap<NodeId, Pin>>,
}

impl Pins {
    /// Reads what is remembered in `data_dir`; a missing file means nobody was met yet.
    ///
    /// # Errors
    /// When the file cannot be read or is damaged.
    pub(super) fn open(data_dir: &Path) -> Result<Self, PinsError> {
        let path = data_dir.join(FILE_NAME);
        let known = match fs::read(&path) {
            Ok(bytes) => match serde_json::from_slice(&bytes) {
                Ok(known) => known,
                Err(source) => return Err(PinsError::Damaged { path, source }),
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => BTreeMap::new(),
            Err(source) => {
                return Err(PinsError::Io {
                    action: "read",
                    path,
                    source,
                });
            }
        };
        Ok(Self {
            path,
            known: Mutex::new(known),
        })
    }

    /// Accepts the incarnation that is remembered, or remembers the first one.
    ///
    /// # Errors
    /// `Ok(Err(refusal))` for another incarnation than the remembered one.
    /// `Err` when a first one cannot be written down.
    pub(super) fn check(
        &self,
        id: NodeId,
        name: &str,
        incarnation: &str,
    ) -> Result<Result<(), Refusal>, PinsError> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pin) = known.get(&id) {
            if pin.incarnation == incarnation {
                return Ok(Ok(()));
            }
            return Ok(Err(Refusal::new(
                RefusalCode::Incarnation,
                format!(
                    "node `{name}` (id {id}) shows incarnation {incarnation} but was first met as {}: a restored copy or \
                     another database runs under its id. Stop it if the true one still exists; otherwise give the new \
                     database a node id of its own and join it as a new member (what was met is remembered in {})",
                    pin.incarnation,
                    self.path.display()
                ),
            )));
        }
        let mut next = known.clone();
        next.insert(
            id,
            Pin {
                name: name.to_owned(),
                incarnation: incarnation.to_owned(),
            },
        );
        self.write(&next)?;
        *known = next;
        Ok(Ok(()))
    }

    /// Replaces the file: written beside it, synced, renamed, folder synced.
    fn write(&self, known: &BTreeMap<NodeId, Pin>) -> Result<(), PinsError> {
        let fail = |source| PinsError::Io {
            action: "write",
            path: self.path.clone(),
            source,
        };
        let text = serde_json::to_vec_pretty(known).map_err(|error| fail(io::Error::other(error)))?;
        crate::small_file::replace(&self.path, &text).map_err(fail)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_incarnation_is_remembered_across_restarts_and_another_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let pins = Pins::open(dir.path()).unwrap();
        assert_eq!(pins.check(NodeId(2), "b", "first").unwrap(), Ok(()));
        assert_eq!(pins.check(NodeId(2), "b", "first").unwrap(), Ok(()));
        drop(pins);
        let pins = Pins::open(dir.path()).unwrap();
        let refusal = pins.check(NodeId(2), "b", "second").unwrap().unwrap_err();
        assert_eq!(refusal.code, "incarnation");
        assert!(refusal.text.contains("join it as a new member"), "{refusal}");
        assert_eq!(pins.check(NodeId(2), "b", "first").unwrap(), Ok(()));
    }

    #[test]
    fn a_damaged_file_stops_the_start_and_says_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(FILE_NAME), b"{\"2\": {\"na").unwrap();
        let error = Pins::open(dir.path()).unwrap_err();
        assert!(error.to_string().contains("remove it if you are sure"), "{error}");
    }

    #[test]
    fn a_peer_is_not_welcome_when_it_cannot_be_remembered() {
        let dir = tempfile::tempdir().unwrap();
        let pins = Pins::open(&dir.path().join("gone")).unwrap();
        assert!(matches!(
            pins.check(NodeId(2), "b", "first"),
            Err(PinsError::Io { action: "write", .. })
        ));
        assert!(pins.check(NodeId(2), "b", "first").is_err());
    }
}
