//! Merge groups: columns of a table that one update decides together, where the others are each decided by themselves.
//!
//! In:   lists of columns, as a policy file has them      Out: disjoint sets; which column goes with which
//! Invariants: a column is in one set at most: lists that share a column are one group
//! Not here: why columns belong together (a CHECK, a unique or foreign key over them; node: setup), merging

use std::collections::BTreeSet;
use std::fmt;

/// The groups of one table. Equal for all ways to write down the same ones.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Groups(BTreeSet<BTreeSet<String>>);

impl Groups {
    /// Of lists of columns by name, in any order. Lists that share a column are joined, also by way of a third one.
    #[must_use]
    pub fn join<I: IntoIterator<Item = String>>(lists: impl IntoIterator<Item = I>) -> Self {
        let mut groups = Self::default();
        for list in lists {
            groups.add(list.into_iter().collect());
        }
        groups
    }

    fn add(&mut self, mut group: BTreeSet<String>) {
        if group.is_empty() {
            return;
        }
        let mut apart = BTreeSet::new();
        for known in std::mem::take(&mut self.0) {
            // Those that are apart from each other were apart before, so one pass is enough.
            if known.is_disjoint(&group) {
                apart.insert(known);
            } else {
                group.extend(known);
            }
        }
        apart.insert(group);
        self.0 = apart;
    }

    /// The groups, each sorted.
    pub fn iter(&self) -> impl Iterator<Item = &BTreeSet<String>> {
        self.0.iter()
    }

    /// All columns that are in one.
    pub fn columns(&self) -> impl Iterator<Item = &String> {
        self.0.iter().flatten()
    }

    /// The group that a column is in.
    #[must_use]
    pub fn of(&self, column: &str) -> Option<&BTreeSet<String>> {
        self.0.iter().find(|group| group.contains(column))
    }
}

/// ` (high low) (street zip)`: what policies are compared by.
impl fmt::Display for Groups {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for group in &self.0 {
            f.write_str(" (")?;
            for (at, column) in group.iter().enumerate() {
                let space = if at == 0 { "" } else { " " };
                write!(f, "{space}{}", Name(column))?;
            }
            f.write_str(")")?;
        }
        Ok(())
    }
}

/// A column's name, quoted where it could be taken for something else.
pub(crate) struct Name<'a>(pub(crate) &'a str);

impl fmt::Display for Name<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let is_plain = self.0.chars().all(|c| c.is_alphanumeric() || c == '_');
        if is_plain {
            f.write_str(self.0)
        } else {
            write!(f, "{:?}", self.0)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn joined(lists: &[&[&str]]) -> String {
        let owned = |list: &&[&str]| list.iter().map(|&name| name.to_owned()).collect::<Vec<_>>();
        Groups::join(lists.iter().map(owned)).to_string()
    }

    #[test]
    fn lists_that_share_a_column_are_one_group_in_whatever_order() {
        assert_eq!(joined(&[]), "");
        assert_eq!(joined(&[&["b", "a"], &["d", "c"]]), " (a b) (c d)");
        let one = " (a b c d) (x y)";
        assert_eq!(joined(&[&["a", "b"], &["x", "y"], &["c", "d"], &["b", "c"]]), one);
        assert_eq!(joined(&[&["b", "c"], &["d", "c"], &["y", "x"], &["b", "a"]]), one);
        // Nothing that two ways of grouping could be mistaken for each other by.
        assert_eq!(joined(&[&["a) (b", "c d"]]), " (\"a) (b\" \"c d\")");
    }
}
