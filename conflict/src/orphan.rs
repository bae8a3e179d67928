//! Rows whose foreign key refers to nothing: which of them are conflicts, and which write names the line.
//!
//! In:   the version of such a row, and what is known of its parent      Out: the versions of its line, if it gets one
//! Holds: nothing
//!
//! Every origin enforces its own foreign keys, and a transaction is applied only after all that it had seen. So a row without
//! its parent is written by a transaction that had not seen the parent go; or one that had seen it changed an orphan that was
//! there, which has its line: that is left out. So is a row whose parent is not known to have gone: it is in quarantine, or was
//! never here.
//!
//! To be called for what is there at the end of an apply transaction, once everything that is committed is decoded. `tests/` has
//! clusters that do so.
//!
//! Not here: finding such rows, the id of a line ([`crate::record::foreign_key_id`]), what becomes of them (node: daemon)

use crate::version::Version;

/// What became of a parent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Parent {
    /// This write deleted it.
    Deleted(Version),
    /// This version of it yields a unique value.
    Parked(Version),
    /// Nobody knows that it went.
    Unknown,
}

/// A row without a parent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Orphan {
    /// The version that it has; none where that is known to be everywhere, and forgotten.
    pub child: Option<Version>,
    /// What its parent became.
    pub parent: Parent,
    /// The write that took the parent away, where the row was found by that.
    pub removed_by: Option<Version>,
    /// Does its foreign key refer to a primary one?
    pub to_primary: bool,
}

/// The two sides of a line, of which at least one is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sides {
    /// The row's version. It names the line.
    pub child: Option<Version>,
    /// The write that took the parent away. It names the line where the row's version does not.
    pub removed_by: Option<Version>,
}

/// Is the orphan a conflict, and of which versions? `had_seen(one, other)`: had the transaction of `one` seen `other`? It is asked
/// only where that matters.
///
/// # Errors
/// Those of `had_seen`.
pub fn judge<E>(
    orphan: &Orphan,
    mut had_seen: impl FnMut(Version, Version) -> Result<bool, E>,
) -> Result<Option<Sides>, E> {
    let child = orphan.child;
    let removed_by = match orphan.parent {
        Parent::Deleted(version) => Some(version),
        // It names the line of a row that it knew, which may be forgotten here.
        Parent::Parked(version) => match child {
            Some(child) if !had_seen(version, child)? => None,
            _ => Some(version),
        },
        Parent::Unknown if orphan.removed_by.is_none() && orphan.to_primary => return Ok(None),
        Parent::Unknown => orphan.removed_by,
    };
    if let (Some(child), Some(removed)) = (child, removed_by)
        && orphan.removed_by.is_none()
        && matches!(orphan.parent, Parent::Deleted(_) | Parent::Unknown)
        && had_seen(child, removed)?
    {
        // An orphan that was there: it has its line.
        return Ok(None);
    }
    // Where the parent was deleted with the row in sight, which its own server did not have: the row may be older than what
    // the nodes remember, so the deletion names the line.
    let child = match (child, removed_by) {
        (Some(child), Some(removed)) if had_seen(removed, child)? => None,
        (child, _) => child,
    };
    let is_known = child.or(removed_by).is_some();
    Ok(is_known.then_some(Sides { child, removed_by }))
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use anabranch_proto::{NodeId, Position, Stamp};
    use uhlc::NTP64;

    use super::*;
    use crate::version::Kind;

    fn version(time: u64, node: u16, kind: Kind) -> Version {
        Version {
            stamp: Stamp {
                time: NTP64(time),
                node: NodeId(node),
            },
            position: Position::new(1, time),
            kind,
        }
    }

    /// What names the line, where these pairs had seen each other.
    fn named(orphan: Orphan, seen: &[(Version, Version)]) -> Option<Version> {
        let had_seen = |one, other| -> Result<bool, Infallible> { Ok(seen.contains(&(one, other))) };
        let Ok(sides) = judge(&orphan, had_seen);
        sides.map(|sides| sides.child.or(sides.removed_by).unwrap())
    }

    #[test]
    fn a_line_is_named_by_the_row_or_else_by_what_took_its_parent() {
        let (child, removal) = (version(1, 1, Kind::Put), version(2, 2, Kind::Delete));
        let orphan = Orphan {
            child: Some(child),
            parent: Parent::Deleted(removal),
            removed_by: None,
            to_primary: true,
        };
        assert_eq!(named(orphan, &[]), Some(child));
        // Changed knowingly.
        assert_eq!(named(orphan, &[(child, removal)]), None);
        // The deleter's server did not have the row, or it is forgotten.
        assert_eq!(named(orphan, &[(removal, child)]), Some(removal));
        let forgotten = Orphan {
            child: None,
            ..orphan
        };
        assert_eq!(named(forgotten, &[]), Some(removal));
        // Found by the removal.
        let found = Orphan {
            removed_by: Some(removal),
            ..orphan
        };
        assert_eq!(named(found, &[(child, removal)]), Some(child));
        let parked = Orphan {
            parent: Parent::Parked(removal),
            ..orphan
        };
        assert_eq!(named(parked, &[(removal, child)]), Some(removal));
        assert_eq!(named(parked, &[(child, removal)]), Some(child));
    }

    #[test]
    fn a_row_whose_parent_nobody_saw_go_is_none_but_where_that_cannot_be_known() {
        let (child, removal) = (version(1, 1, Kind::Put), version(2, 2, Kind::Delete));
        let orphan = Orphan {
            child: Some(child),
            parent: Parent::Unknown,
            removed_by: None,
            to_primary: true,
        };
        assert_eq!(named(orphan, &[]), None);
        let to_other = Orphan {
            to_primary: false,
            ..orphan
        };
        assert_eq!(named(to_other, &[]), Some(child));
        let found = Orphan {
            removed_by: Some(removal),
            ..orphan
        };
        assert_eq!(named(found, &[]), Some(child));
        assert_eq!(named(found, &[(removal, child)]), Some(removal));
    }
}
