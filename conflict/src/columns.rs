//! How the columns of a table are merged, as the policy says: rules by name, and which columns go together.
//!
//! In:   the rules of a table, its description      Out: what [`merge`] folds by; what does not fit the table
//! Invariant: the same for the same rules and columns, at every node
//! Not here: reading the policy file ([`crate::policy`]), merging ([`merge`])

use std::collections::BTreeMap;
use std::fmt;

use anabranch_proto::schema::{ColumnDesc, TableDesc};
use serde::Deserialize;

use crate::groups::Groups;
use crate::merge::number::Kind;
use crate::merge::{self, List, array};

/// What becomes of one column: [`merge::Rule`], as it is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ColumnRule {
    /// [`merge::Rule::Delta`]
    Delta,
    /// [`merge::Rule::Max`]
    Max,
    /// [`merge::Rule::Min`]
    Min,
    /// [`merge::Rule::Set`]
    SetUnion,
    /// [`merge::Rule::Json`]
    JsonbMerge,
    /// [`merge::Rule::Append`]
    Append,
}

impl ColumnRule {
    /// Every rule.
    pub const ALL: [Self; 6] = [
        Self::Delta,
        Self::Max,
        Self::Min,
        Self::SetUnion,
        Self::JsonbMerge,
        Self::Append,
    ];

    /// What it makes of a column; `None`: it can do nothing with values of that type.
    #[must_use]
    pub fn of(self, column: &ColumnDesc) -> Option<merge::Rule> {
        let kind = Kind::of(column.type_oid, column.type_mod);
        match self {
            Self::Delta => kind
                .filter(|_| Kind::of_sums(column.type_oid))
                .map(merge::Rule::Delta),
            Self::Max => kind.map(merge::Rule::Max),
            Self::Min => kind.map(merge::Rule::Min),
            Self::SetUnion => array::of_equal_bytes(column.type_oid).map(merge::Rule::Set),
            Self::JsonbMerge => (column.type_oid == JSONB).then_some(merge::Rule::Json),
            Self::Append => match column.type_oid {
                JSONB => Some(List::Jsonb),
                TEXT => Some(List::Text),
                // What several append may be longer than its column holds.
                VARCHAR if column.type_mod < 0 => Some(List::Text),
                other => array::of_any(other).map(List::Array),
            }
            .map(merge::Rule::Append),
        }
    }

    /// The types that it is for.
    const fn types(self) -> &'static str {
        match self {
            Self::Delta => "smallint, integer, bigint and numeric",
            Self::Max | Self::Min => "numbers, dates and times",
            Self::SetUnion => {
                "arrays of boolean, integers, text, uuid, bytea, dates, times and network addresses, whose equal elements \
                 look alike"
            }
            Self::JsonbMerge => "jsonb",
            Self::Append => "text, varchar without a length, arrays and jsonb",
        }
    }

    /// Can a value come of it that no writer has written, and so no CHECK has seen?
    #[must_use]
    pub const fn makes_values(self) -> bool {
        !matches!(self, Self::Max | Self::Min)
    }
}

const TEXT: u32 = 25;
const VARCHAR: u32 = 1043;
const JSONB: u32 = 3802;

impl fmt::Display for ColumnRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Delta => "delta",
            Self::Max => "max",
            Self::Min => "min",
            Self::SetUnion => "set_union",
            Self::JsonbMerge => "jsonb_merge",
            Self::Append => "append",
        })
    }
}

/// How the columns of a table are merged.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Columns {
    /// Columns without a rule are decided each by itself; else all of them as one unit.
    pub each: bool,
    /// By name.
    pub rules: BTreeMap<String, ColumnRule>,
    /// Where each is decided by itself: those that are decided together all the same.
    pub groups: Groups,
}

/// A rule or group that does not fit its table.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Misfit {
    /// No such column.
    #[error("has no column `{0}`")]
    NoColumn(String),
    /// A part of the primary key.
    #[error("column `{0}` is part of the primary key, which is not merged")]
    Key(String),
    /// Values that the rule can do nothing with.
    #[error("column `{column}` is of type {type_name}, and {rule} is for {}", rule.types())]
    Type {
        /// The column.
        column: String,
        /// Its type.
        type_name: String,
        /// The rule.
        rule: ColumnRule,
    },
}

impl Columns {
    /// The rule of each of a table's columns, in their order. Rules that do not fit it are passed over.
    #[must_use]
    pub fn of(&self, table: &TableDesc) -> Vec<merge::Rule> {
        let rule = |(at, column): (u16, &ColumnDesc)| {
            let wanted = self.rules.get(&column.name).filter(|_| !table.key.contains(&at));
            let unit = if self.each {
                self.unit(table, at, &column.name)
            } else {
                0
            };
            wanted
                .and_then(|wanted| wanted.of(column))
                .unwrap_or(merge::Rule::Unit(unit))
        };
        (0..).zip(&table.columns).map(rule).collect()
    }

    /// A group's number is the place of its first column, which is no other column's number.
    fn unit(&self, table: &TableDesc, at: u16, name: &str) -> u16 {
        let group = self.groups.of(name);
        let first = group.and_then(|group| {
            let mut columns = (0u16..).zip(&table.columns);
            columns.find(|(_, column)| group.contains(&column.name))
        });
        first.map_or(at, |(first, _)| first)
    }

    /// Does one update always decide all of these columns? They are some of a table's that are not of its primary key.
    #[must_use]
    pub fn keeps_together(&self, columns: &[&str]) -> bool {
        let Some(first) = columns.first().filter(|_| columns.len() > 1) else {
            return true;
        };
        let group = self.groups.of(first);
        columns.iter().all(|column| {
            let joined = !self.each || group.is_some_and(|group| group.contains(*column));
            joined && !self.rules.contains_key(*column)
        })
    }

    /// What of it does not fit a table.
    #[must_use]
    pub fn misfits(&self, table: &TableDesc) -> Vec<Misfit> {
        let misfit = |(name, rule): (&String, Option<&ColumnRule>)| {
            let Some((at, column)) = (0u16..)
                .zip(&table.columns)
                .find(|(_, column)| column.name == *name)
            else {
                return Some(Misfit::NoColumn(name.clone()));
            };
            if table.key.contains(&at) {
                return Some(Misfit::Key(name.clone()));
            }
            let rule = rule.filter(|rule| rule.of(column).is_none())?;
            Some(Misfit::Type {
                column: name.clone(),
                type_name: column.type_name.clone(),
                rule: *rule,
            })
        };
        let rules = self.rules.iter().map(|(name, rule)| (name, Some(rule)));
        let grouped = self.groups.columns().map(|name| (name, None));
        rules.chain(grouped).filter_map(misfit).collect()
    }
}
