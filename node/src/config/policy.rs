//! The policy file and its scripts: read from where the configuration says, checked whole.
//!
//! Names of nodes in it mean something only where it is known who is a member, or was one: `anabranch.member` says that, and `peers` what
//! this node's configuration calls them. A name that `peers` has means what it says there.

use std::collections::BTreeMap;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use anabranch_conflict::policy::{Fault, Faults, Policies};
use anabranch_proto::NodeId;

use super::Config;
use crate::policy_change::{self, Source};

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

impl PolicyError {
    /// Is nothing wrong but that names are not known? To whoever knows more members they may be.
    #[must_use]
    pub fn is_of_names(&self) -> bool {
        match self {
            Self::Faults { faults, .. } => faults.0.iter().all(is_of_name),
            Self::Read { .. } => false,
        }
    }
}

const fn is_of_name(fault: &Fault) -> bool {
    matches!(fault, Fault::NoNode { .. })
}

/// A policy file and its scripts as they are written. All of it is right, but for names of nodes, which are not looked at yet.
#[derive(Debug, Clone, Default)]
pub struct PolicyFile {
    path: PathBuf,
    source: Source,
}

impl PolicyFile {
    /// What it says where nodes are called so: as [`Config::names`] gives it.
    ///
    /// # Errors
    /// When it names others.
    pub fn policies(&self, names: &BTreeMap<String, NodeId>) -> Result<Policies, PolicyError> {
        let path = || self.path.clone();
        let parsed = self.source.parse(names);
        parsed.map_err(|faults| PolicyError::Faults { path: path(), faults })
    }

    /// The texts.
    #[must_use]
    pub fn into_source(self) -> Source {
        self.source
    }
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
    /// What nodes are called: `members` are all that ever were one, as [`policy_change::Body::names`] gives them, or none where they
    /// cannot be asked for.
    #[must_use]
    pub fn names(&self, members: &BTreeMap<String, u16>) -> BTreeMap<String, NodeId> {
        let mut names = policy_change::ids(members);
        names.extend(self.peers.iter().map(|peer| (peer.name.clone(), peer.id)));
        names.insert(self.node.name.clone(), self.node.id);
        names
    }

    /// The file that `cluster.policy` names; an empty one without it.
    ///
    /// # Errors
    /// When it cannot be read, or anything in it is wrong but names of nodes.
    pub fn policy_file(&self) -> Result<PolicyFile, PolicyError> {
        self.cluster
            .policy
            .as_deref()
            .map_or_else(|| Ok(PolicyFile::default()), |path| self.policy_file_in(path))
    }

    /// The same of another file.
    ///
    /// # Errors
    /// As [`Self::policy_file`].
    pub fn policy_file_in(&self, path: &Path) -> Result<PolicyFile, PolicyError> {
        let text = std::fs::read_to_string(path).map_err(|source| PolicyError::Read {
            path: path.to_owned(),
            source,
        })?;
        let beside = path.parent().unwrap_or(Path::new(""));
        let mut scripts = BTreeMap::new();
        let read = |script: &str| -> Result<String, String> {
            // More than a script may be long is not read.
            let text = read_some(&beside.join(script)).map_err(|error| error.to_string())?;
            scripts.insert(script.to_owned(), text.clone());
            Ok(text)
        };
        if let Err(Faults(mut faults)) = Policies::parse(&text, &self.names(&BTreeMap::new()), read) {
            faults.retain(|fault| !is_of_name(fault));
            if !faults.is_empty() {
                return Err(PolicyError::Faults {
                    path: path.to_owned(),
                    faults: Faults(faults),
                });
            }
        }
        Ok(PolicyFile {
            path: path.to_owned(),
            source: Source { text, scripts },
        })
    }

    /// The cluster's policies, from the file that `cluster.policy` names, where the database cannot be asked who is a member: by `peers`
    /// alone.
    ///
    /// # Errors
    /// When it cannot be read, or anything in it is wrong.
    pub fn policies(&self) -> Result<Policies, PolicyError> {
        self.policies_among(&BTreeMap::new())
    }

    /// The cluster's policies, from the file that `cluster.policy` names. `members`: as for [`Self::names`].
    ///
    /// # Errors
    /// When it cannot be read, or anything in it is wrong.
    pub fn policies_among(&self, members: &BTreeMap<String, u16>) -> Result<Policies, PolicyError> {
        self.policy_file()?.policies(&self.names(members))
    }
}
