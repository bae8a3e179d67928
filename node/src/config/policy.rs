//! The policy file: read from where the configuration says, checked whole.

use std::collections::BTreeMap;
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
        Policies::parse(&text, &members).map_err(|faults| PolicyError::Faults {
            path: path.to_owned(),
            faults,
        })
    }
}
