//! What nodes are called, for people.
//!
//! In:   the configuration, facts of `anabranch.member`            Out: names of ids, ids of names
//! Holds: what was known when it was made; nodes that join later are not in it
//! Invariants: a name of the configuration stands before the same node's name elsewhere
//! Must never: say who is a member (`crate::membership`): nodes that are gone have names, too

use std::collections::BTreeMap;

use tokio_postgres::Client;

use crate::config::Config;
use crate::shared::{Shared, lock};

/// Of every node that ever was a member: lines of the conflict log name them for long.
const EVER: &str = "SELECT DISTINCT ON (node_id) node_id, name FROM anabranch.member WHERE fact IN ('founder', 'joined') ORDER BY node_id, fact";

/// Names by node id.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Names(BTreeMap<u16, String>);

impl Names {
    /// Those that the configuration has: the node's own and its `peers`.
    #[must_use]
    pub fn configured(config: &Config) -> Self {
        let own = (config.node.id.0, config.node.name.clone());
        let peers = config.peers.iter().map(|peer| (peer.id.0, peer.name.clone()));
        Self(std::iter::once(own).chain(peers).collect())
    }

    /// With those that the database knows: of nodes that joined since the configuration was written, and of such that are gone. Where it
    /// does not tell, as to a role that may not read `anabranch.member`, those of the configuration alone.
    pub async fn read(config: &Config, client: &Client) -> Self {
        Self::configured(config).and_those_of(client).await
    }

    /// With those that the database knows.
    pub async fn and_those_of(self, client: &Client) -> Self {
        // What else is wrong with the session the next question says.
        let rows = client.query(EVER, &[]).await.unwrap_or_default();
        self.and(rows.iter().filter_map(|row| {
            let id: i32 = row.try_get(0).ok()?;
            Some((u16::try_from(id).ok()?, row.try_get(1).ok()?))
        }))
    }

    /// Those that the daemon knows: as [`Self::read`], without asking.
    pub(crate) fn known(config: &Config, shared: &Shared) -> Self {
        let names = lock(&shared.names);
        Self::configured(config).and(names.iter().map(|(id, name)| (id.0, name.clone())))
    }

    /// With these where a node has no name yet.
    #[must_use]
    pub fn and(mut self, more: impl IntoIterator<Item = (u16, String)>) -> Self {
        for (id, name) in more {
            self.0.entry(id).or_insert(name);
        }
        self
    }

    /// A node's name, or its id where that is all that is known; `?` for a node that nobody knows.
    #[must_use]
    pub fn of(&self, id: Option<u16>) -> String {
        match id {
            Some(id) => self.0.get(&id).cloned().unwrap_or_else(|| id.to_string()),
            None => "?".to_owned(),
        }
    }

    /// `delta (4)`, or the id alone.
    #[must_use]
    pub fn with_id(&self, id: u16) -> String {
        self.0
            .get(&id)
            .map_or_else(|| id.to_string(), |name| format!("{name} ({id})"))
    }

    /// Has this node a name here?
    #[must_use]
    pub fn knows(&self, id: u16) -> bool {
        self.0.contains_key(&id)
    }

    /// The node of this name.
    #[must_use]
    pub fn id_of(&self, name: &str) -> Option<u16> {
        let mut all = self.0.iter();
        all.find(|(_, known)| *known == name).map(|(id, _)| *id)
    }

    /// All of them, by id.
    pub fn all(&self) -> impl Iterator<Item = &str> {
        self.0.values().map(String::as_str)
    }
}

impl From<Names> for BTreeMap<u16, String> {
    fn from(names: Names) -> Self {
        names.0
    }
}

impl From<BTreeMap<u16, String>> for Names {
    fn from(names: BTreeMap<u16, String>) -> Self {
        Self(names)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_configured_name_stands_before_another_and_nodes_without_one_are_their_ids() {
        let names = Names::configured(&Config::example());
        assert_eq!(
            (names.of(Some(2)), names.of(Some(4))),
            ("beta".to_owned(), "4".to_owned())
        );
        let names = names.and([(2, "other".to_owned()), (4, "delta".to_owned())]);
        assert_eq!(names.all().collect::<Vec<_>>(), ["alpha", "beta", "delta"]);
        assert_eq!((names.id_of("delta"), names.id_of("other")), (Some(4), None));
        assert_eq!(
            (names.with_id(4), names.with_id(5)),
            ("delta (4)".to_owned(), "5".to_owned())
        );
        assert_eq!(names.of(None), "?");
        assert!(names.knows(4) && !names.knows(5));
    }
}
