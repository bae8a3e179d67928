//! Vectors: what is applied somewhere, per origin.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::ids::{NodeId, Position};

/// node -> position. An absent node stands for [`Position::ZERO`]. Entries are sorted by node.
#[derive(Clone, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Vector(Vec<(NodeId, Position)>);

impl Vector {
    /// Nothing of anyone.
    #[must_use]
    pub const fn new() -> Self {
        Self(Vec::new())
    }

    /// The position held for `node`.
    #[must_use]
    pub fn get(&self, node: NodeId) -> Position {
        self.0
            .iter()
            .find(|entry| entry.0 == node)
            .map_or(Position::ZERO, |entry| entry.1)
    }

    /// Does this vector hold `position` of `node`? The definition of *covered* in `docs/design.md` section 2.
    #[must_use]
    pub fn covers(&self, node: NodeId, position: Position) -> bool {
        self.get(node) >= position
    }

    /// Does this vector hold everything that `other` holds?
    #[must_use]
    pub fn includes(&self, other: &Self) -> bool {
        other
            .0
            .iter()
            .all(|&(node, position)| self.covers(node, position))
    }

    /// Raises `node` to `position`; never lowers it.
    pub fn raise(&mut self, node: NodeId, position: Position) {
        match self.0.binary_search_by_key(&node, |entry| entry.0) {
            Ok(at) => {
                if let Some(entry) = self.0.get_mut(at) {
                    entry.1 = entry.1.max(position);
                }
            }
            Err(at) => self.0.insert(at, (node, position)),
        }
    }

    /// Raises every entry to at least that of `other`.
    pub fn join(&mut self, other: &Self) {
        for &(node, position) in &other.0 {
            self.raise(node, position);
        }
    }

    /// The smaller position per node; a node absent on either side is absent.
    #[must_use]
    pub fn meet(&self, other: &Self) -> Self {
        Self(
            self.0
                .iter()
                .map(|&(node, position)| (node, position.min(other.get(node))))
                .filter(|entry| entry.1 > Position::ZERO)
                .collect(),
        )
    }

    /// Entries in node order.
    pub fn iter(&self) -> impl Iterator<Item = (NodeId, Position)> + '_ {
        self.0.iter().copied()
    }

    /// How many nodes have an entry.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// No entry at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl FromIterator<(NodeId, Position)> for Vector {
    fn from_iter<T: IntoIterator<Item = (NodeId, Position)>>(entries: T) -> Self {
        let mut vector = Self::new();
        for (node, position) in entries {
            vector.raise(node, position);
        }
        vector
    }
}

impl fmt::Debug for Vector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.iter()).finish()
    }
}

impl fmt::Display for Vector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, (node, position)) in self.iter().enumerate() {
            if at > 0 {
                f.write_str(" ")?;
            }
            write!(f, "{node}={position}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vector_only_grows_and_compares_per_node() {
        let mut vector = Vector::new();
        vector.raise(NodeId(2), Position::new(1, 10));
        vector.raise(NodeId(1), Position::new(1, 5));
        vector.raise(NodeId(2), Position::new(1, 7));
        assert_eq!(vector.get(NodeId(2)), Position::new(1, 10));
        assert!(vector.covers(NodeId(2), Position::new(1, 10)));
        assert!(!vector.covers(NodeId(3), Position::new(0, 1)));
        let other: Vector = [(NodeId(2), Position::new(1, 3)), (NodeId(3), Position::new(1, 1))]
            .into_iter()
            .collect();
        assert!(!vector.includes(&other));
        assert_eq!(
            vector.meet(&other),
            [(NodeId(2), Position::new(1, 3))].into_iter().collect()
        );
        vector.join(&other);
        assert!(vector.includes(&other));
    }
}
