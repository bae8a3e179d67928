//! The policy file and its scripts: read from where the configuration says, checked whole.

use std::collections::BTreeMap;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use anabranch_conflict::policy::{Faults, Policies};
use anabranch_proto::NodeId;

use super::Config;

/// Why there is no policy.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PolicyError {
    /// The file.
    #[error("cannot read the policy file {}: {source}; cluster.policy names it", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// What it says.
    #[error("policy file {}: {faults}", path.display())]
    Faults {
        /// Which.
        path: PathBuf,
        /// All that is wrong.
        faults: Faults,
    },
}

/// The text of a file, or as much of it as shows that it is too long for a script.
fn read_some(path: &Path) -> std::io::Result<String> {
    const ENOUGH: u64 = 1 << 20;
    let mut text = String::new();
    std::fs::File::open(path)?
        .take(ENOUGH)
        .read_to_string(&mut text)?;
    Ok(text)
}

impl Config {
    /// The cluster's policies, from the file that `cluster.policy` names.
    ///
    /// # Errors
    /// When it cannot be read, or anything in it is wrong.
    pub fn policies(&self) -> Result<Policies, PolicyError> {
        self.cluster
            .policy
            .as_deref()
            .map_or_else(|| Ok(Policies::default()), |path| self.policies_in(path))
    }

    /// The policies that another file holds, for the members of this configuration.
    ///
    /// # Errors
    /// As [`Self::policies`].
    pub fn policies_in(&self, path: &Path) -> Result<Policies, PolicyError> {
        let text = std::fs::read_to_string(path).map_err(|source| PolicyError::Read {
            path: path.to_owned(),
            source,
        })?;
        let peers = self.peers.iter().map(|peer| (peer.name.clone(), peer.id));
        let members: BTreeMap<String, NodeId> =
            peers.chain([(self.node.name.clone(), self.node.id)]).collect();
        let beside = path.parent().unwrap_or(Path::new(""));
        // More than a script may be long is not read.
        let read = |script: &str| read_some(&beside.join(script)).map_err(|error| error.to_string());
        Policies::parse(&text, &members, read).map_err(|faults| PolicyError::Faults {
            path: path.to_owned(),
            faults,
        })
    }
}
