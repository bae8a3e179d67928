//! The names of a conflict: its id, its type, its resolution.
//!
//! In:   the losing version and where it met what      Out: fields of `anabranch.conflict_history`
//! Holds: nothing
//! Invariants: 1. A losing version of a key has one id, on every node, for ever, whatever it lost to. 2. So has a row
//! whose foreign key refers to nothing, for each such key. 3. A row whose columns are merged and that is refused has another one than any of these.
//!
//! Not here: the rows' images and the writing of the log (node: ledger).

use std::fmt;
use std::str::FromStr;

use anabranch_proto::Stamp;
use uuid::Uuid;

use crate::version::Kind;

/// Namespace of conflict ids. Fixed for ever: ids in existing logs are made with it.
const NAMESPACE: Uuid = Uuid::from_u128(0x5b1c_6f0e_7f3a_4d53_9a86_d0c4_2f61_a7be);

/// The id of a lost write: of the version stamped `losing` of the row `key` (its canonical bytes).
///
/// Every part is prefixed by its length (8 bytes, big-endian), so no two triples read the same.
#[must_use]
pub fn conflict_id(schema: &str, table: &str, key: &[u8], losing: Stamp) -> Uuid {
    id_of(&[schema.as_bytes(), table.as_bytes(), key, &losing.to_bytes()])
}

/// The id of a row that its foreign key `constraint` leaves without a parent: of the version stamped `written` of the
/// row `key` (its canonical bytes). Never one of [`conflict_id`]: it has a part more.
#[must_use]
pub fn foreign_key_id(schema: &str, table: &str, constraint: &str, key: &[u8], written: Stamp) -> Uuid {
    let (constraint, written) = (constraint.as_bytes(), written.to_bytes());
    id_of(&[schema.as_bytes(), table.as_bytes(), key, &written, constraint])
}

/// The id of a row of a table whose columns are merged, the last of its versions stamped `top`, and that a server refuses. The line of that
/// version says what it lost, and not that. Never one of [`conflict_id`] or [`foreign_key_id`]: a constraint has a name.
#[must_use]
pub fn refused_fold_id(schema: &str, table: &str, key: &[u8], top: Stamp) -> Uuid {
    foreign_key_id(schema, table, "", key, top)
}

fn id_of(parts: &[&[u8]]) -> Uuid {
    let mut name = Vec::with_capacity(parts.iter().map(|part| part.len() + 8).sum());
    for part in parts {
        name.extend_from_slice(&(part.len() as u64).to_be_bytes());
        name.extend_from_slice(part);
    }
    Uuid::new_v5(&NAMESPACE, &name)
}

/// Text that names no conflict type or resolution.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{found}` is not a {expected}; expected one of {choices}")]
pub struct UnknownName {
    found: String,
    expected: &'static str,
    choices: String,
}

/// Defines an enum with a fixed text per variant, both ways.
macro_rules! named {
    ($(#[$meta:meta])* $name:ident, $expected:literal { $($(#[$doc:meta])* $variant:ident = $text:literal,)+ }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum $name { $($(#[$doc])* $variant,)+ }

        impl $name {
            /// Every value, in order of definition.
            pub const ALL: &[Self] = &[$(Self::$variant,)+];

            /// The text in logs and tables.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text,)+ }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(self.as_str())
            }
        }

        impl FromStr for $name {
            type Err = UnknownName;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                Self::ALL.iter().copied().find(|value| value.as_str() == text).ok_or_else(|| UnknownName {
                    found: text.to_owned(),
                    expected: $expected,
                    choices: Self::ALL.iter().map(|value| value.as_str()).collect::<Vec<_>>().join(", "),
                })
            }
        }
    };
}

named! {
    /// What met what. Named as PostgreSQL names it where it has a name (`pg_stat_subscription_stats`, 18).
    ConflictType, "conflict type" {
        /// An insert met a row of the same key.
        InsertExists = "insert_exists",
        /// An update met a row last written by a concurrent transaction.
        UpdateOriginDiffers = "update_origin_differs",
        /// PostgreSQL's name for an update whose new values another row has under a unique key. Never written: it is
        /// [`Self::UpdatePkeyExists`] or [`Self::MultipleUniqueConflicts`].
        UpdateExists = "update_exists",
        /// PostgreSQL's name for an update that met no row. Never written: it is [`Self::UpdateDeleted`], or, without any memory of
        /// the row, no conflict, since nothing is lost (drift, an alarm of the node).
        UpdateMissing = "update_missing",
        /// An update (or insert) met the tombstone of a concurrent delete.
        UpdateDeleted = "update_deleted",
        /// A delete met a row last written by a concurrent transaction.
        DeleteOriginDiffers = "delete_origin_differs",
        /// A delete met no row.
        DeleteMissing = "delete_missing",
        /// A write met several rows under unique keys.
        MultipleUniqueConflicts = "multiple_unique_conflicts",
        /// A move to another primary key met a row of that key.
        UpdatePkeyExists = "update_pkey_exists",
        /// A write met a concurrent truncate of its table.
        TruncateConflict = "truncate_conflict",
        /// A row refers by a foreign key to one that a concurrent transaction removed.
        ForeignKeyMissing = "foreign_key_missing",
        /// A write that the server refuses.
        ApplyError = "apply_error",
        /// A write that breaks a check constraint here.
        CheckViolation = "check_violation",
        /// A row that an exclusion constraint does not let be beside another one here.
        ExclusionViolation = "exclusion_violation",
        /// A write to a table that is not here.
        TableMissing = "table_missing",
        /// A write to a column that is not here.
        ColumnMissing = "column_missing",
        /// Two versions of one row of which the time decided, and one is stamped with another time than that of its commit: a clock was
        /// wrong.
        ClockDrift = "clock_drift",
    }
}

named! {
    /// What was done about it, as seen from the incoming write.
    Resolution, "resolution" {
        /// The incoming write won.
        ApplyRemote = "apply_remote",
        /// What was there won.
        KeepLocal = "keep_local",
        /// Both went into the row.
        Merge = "merge",
        /// The incoming write is parked.
        Skip = "skip",
        /// A row without its parent stays.
        Keep = "keep",
        /// A row without its parent is deleted by the node that wrote it.
        DeleteChild = "delete_child",
        /// The parent of a row is inserted again by the node that wrote the row.
        RestoreParent = "restore_parent",
    }
}

impl ConflictType {
    /// Is it of two versions of one row, of which a policy can prefer the later?
    #[must_use]
    pub const fn is_of_two_versions(self) -> bool {
        matches!(
            self,
            Self::InsertExists
                | Self::UpdateOriginDiffers
                | Self::UpdateDeleted
                | Self::DeleteOriginDiffers
                | Self::DeleteMissing
                | Self::UpdatePkeyExists
                | Self::TruncateConflict
        )
    }
}

/// What an incoming write does to the key it is looked at for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// A new row.
    Insert,
    /// New values, same key.
    Update,
    /// No row any more.
    Delete,
    /// The row of another key comes to this one (the old key sees a [`Op::Delete`]).
    Move,
}

/// The type of the conflict between an incoming write and a concurrent current version of the row.
#[must_use]
pub const fn classify(incoming: Op, current: Kind) -> ConflictType {
    match (incoming, current) {
        (Op::Insert, Kind::Put) => ConflictType::InsertExists,
        (Op::Update, Kind::Put) => ConflictType::UpdateOriginDiffers,
        (Op::Move, Kind::Put) => ConflictType::UpdatePkeyExists,
        (Op::Delete, Kind::Put) => ConflictType::DeleteOriginDiffers,
        (Op::Delete, Kind::Delete) => ConflictType::DeleteMissing,
        (Op::Insert | Op::Update | Op::Move, Kind::Delete) => ConflictType::UpdateDeleted,
    }
}

#[cfg(test)]
mod tests {
    use anabranch_proto::NodeId;
    use uhlc::NTP64;

    use super::*;

    fn stamp(time: u64, node: u16) -> Stamp {
        Stamp {
            time: NTP64(time),
            node: NodeId(node),
        }
    }

    #[test]
    fn an_id_is_fixed_for_ever() {
        // Computed with another implementation of RFC 9562 version 5.
        let id = conflict_id(
            "public",
            "account",
            b"\x00\x00\x00\x2a",
            stamp(0x6592_0080_0000_0000, 3),
        );
        assert_eq!(id.to_string(), "29a3de92-c866-59a0-b8f3-84f3f6c9a47a");
    }

    #[test]
    fn every_part_of_the_name_counts_and_parts_do_not_run_together() {
        let ids = [
            conflict_id("a", "bc", b"k", stamp(1, 1)),
            conflict_id("ab", "c", b"k", stamp(1, 1)),
            conflict_id("a", "b", b"ck", stamp(1, 1)),
            conflict_id("a", "bc", b"", stamp(1, 1)),
            conflict_id("a", "bc", b"k", stamp(1, 2)),
            conflict_id("a", "bc", b"k", stamp(2, 1)),
            refused_fold_id("a", "bc", b"k", stamp(1, 1)),
            foreign_key_id("a", "bc", "d", b"k", stamp(1, 1)),
        ];
        let distinct: std::collections::BTreeSet<_> = ids.iter().collect();
        assert_eq!(distinct.len(), ids.len());
    }

    #[test]
    fn names_read_back() {
        for &value in ConflictType::ALL {
            assert_eq!(value.as_str().parse(), Ok(value));
        }
        for &value in Resolution::ALL {
            assert_eq!(value.to_string().parse(), Ok(value));
        }
        let error = "kept".parse::<Resolution>().unwrap_err().to_string();
        assert_eq!(
            error,
            "`kept` is not a resolution; expected one of apply_remote, keep_local, merge, skip, keep, delete_child, restore_parent"
        );
    }

    #[test]
    fn every_name_is_in_the_documentation() {
        let page = include_str!("../../docs/conflicts.md");
        let types = ConflictType::ALL.iter().map(|value| value.as_str());
        let resolutions = Resolution::ALL.iter().map(|value| value.as_str());
        for name in types.chain(resolutions) {
            assert!(page.contains(&format!("`{name}`")), "{name}");
        }
    }

    #[test]
    fn conflicts_are_called_as_postgres_calls_them() {
        let name = |op, current| classify(op, current).as_str();
        assert_eq!(name(Op::Insert, Kind::Put), "insert_exists");
        assert_eq!(name(Op::Update, Kind::Put), "update_origin_differs");
        assert_eq!(name(Op::Update, Kind::Delete), "update_deleted");
        assert_eq!(name(Op::Delete, Kind::Put), "delete_origin_differs");
        assert_eq!(name(Op::Delete, Kind::Delete), "delete_missing");
        assert_eq!(name(Op::Move, Kind::Put), "update_pkey_exists");
    }
}
