//! What decides for one table, and how it is called.
//!
//! In:   what a rule says            Out: what callers ask of it; its words, which logs show and the hash is made of
//! Must never: be shown alike where it decides otherwise
//! Not here: which table has it ([`super::Policies`]), the file (`rule`)

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::columns::{ColumnRule, Columns};
use crate::frontier::{Deletes, Order, Policy};
use crate::groups::Name as Quoted;
use crate::script::Script;

/// How a table's policy is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Name {
    /// [`Order::LastUpdateWins`]
    #[default]
    LastUpdateWins,
    /// [`Order::FirstUpdateWins`]
    FirstUpdateWins,
    /// [`Order::OriginPriority`]
    OriginPriority,
    /// [`Columns`], each column by itself.
    ColumnMerge,
    /// [`Script`]
    Script,
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::LastUpdateWins => "last_update_wins",
            Self::FirstUpdateWins => "first_update_wins",
            Self::OriginPriority => "origin_priority",
            Self::ColumnMerge => "column_merge",
            Self::Script => "script",
        })
    }
}

/// What becomes of rows of two nodes that an exclusion constraint does not let be together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Excluded {
    /// There are none: a table with such a constraint is refused.
    #[default]
    Refuse,
    /// Each node keeps the one that it has, and the other waits in its quarantine.
    Quarantine,
}

/// What becomes of a row that a CHECK refuses once its columns are merged, though every writer keeps it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Checked {
    /// There are none: a CHECK over a column with a rule that could break it is refused.
    #[default]
    Refuse,
    /// It waits in the quarantine of each node that cannot write it, as it was merged.
    Quarantine,
}

/// What becomes of rows of two nodes with one value of a unique key that no claim decides: that of a table whose policy is not last update
/// wins alone, or one whose values the nodes cannot compare.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Unclaimed {
    /// There are none: a table with such a key is refused.
    #[default]
    Refuse,
    /// Of two that meet the later stays. Nodes where others meet can end with other rows.
    Pairwise,
}

/// What becomes of a row whose foreign key refers to nothing, since a concurrent transaction removed its parent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ForeignKeys {
    /// It stays, and is logged.
    #[default]
    Keep,
    /// It is logged, and the node that wrote it deletes it.
    DeleteChild,
    /// It is logged, and the node that wrote it inserts what was removed again.
    RestoreParent,
}

/// The policy of a table.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TablePolicy {
    /// What decides; where columns are merged, last update wins.
    pub policy: Policy,
    /// How columns are merged, if they are.
    pub columns: Option<Columns>,
    /// What becomes of its rows that lost their parents.
    pub foreign_keys: ForeignKeys,
    /// What becomes of its rows that exclude each other.
    pub excluded: Excluded,
    /// What becomes of its merged rows that a CHECK refuses.
    pub checked: Checked,
    /// What becomes of its rows that have one value of a unique key which no claim decides.
    pub unclaimed: Unclaimed,
    /// What decides instead of `policy`, which is last update wins then.
    pub script: Option<Arc<Script>>,
}

impl TablePolicy {
    /// May it have exclusion constraints?
    #[must_use]
    pub fn quarantines_excluded(&self) -> bool {
        self.excluded == Excluded::Quarantine
    }

    /// May a CHECK be over columns whose rules could break it?
    #[must_use]
    pub fn quarantines_checked(&self) -> bool {
        self.checked == Checked::Quarantine
    }

    /// May it have unique keys that are decided between the two rows that meet?
    #[must_use]
    pub fn decides_pairwise(&self) -> bool {
        self.unclaimed == Unclaimed::Pairwise
    }

    /// Does the highest stamp decide, and nothing else?
    #[must_use]
    pub fn is_last_writer(&self) -> bool {
        self.policy.is_last_writer() && self.columns.is_none() && self.script.is_none()
    }

    /// The rule that a column has by itself.
    #[must_use]
    pub fn rule_of(&self, column: &str) -> Option<ColumnRule> {
        self.columns.as_ref()?.rules.get(column).copied()
    }

    /// The same of a policy of which only the words are known, as a log has them.
    #[must_use]
    pub fn rule_in(words: &str, column: &str) -> Option<ColumnRule> {
        if words.starts_with("script ") {
            return None;
        }
        // What is between commas; a quoted name may have any in it.
        let (mut is_quoted, mut is_escaped) = (false, false);
        let mut parts = words.split(|c| {
            is_quoted ^= c == '"' && !is_escaped;
            is_escaped = c == '\\' && !is_escaped;
            c == ',' && !is_quoted
        });
        parts.find_map(|part| {
            let rule = part.trim_start().strip_prefix(&Quoted(column).to_string())?;
            let rule = rule.strip_prefix(' ')?;
            ColumnRule::ALL
                .into_iter()
                .find(|known| known.to_string() == rule)
        })
    }

    /// How its order is called.
    #[must_use]
    pub fn name(&self) -> Name {
        match self.policy.order {
            _ if self.script.is_some() => Name::Script,
            Order::LastUpdateWins if self.columns.as_ref().is_some_and(|columns| columns.each) => {
                Name::ColumnMerge
            }
            Order::LastUpdateWins => Name::LastUpdateWins,
            Order::FirstUpdateWins => Name::FirstUpdateWins,
            Order::OriginPriority(_) => Name::OriginPriority,
        }
    }
}

/// As in logs: `origin_priority 1 3, delete_wins`, `script resolve.rhai (1f0a93b2)`. Nodes by id, the preferred first.
impl fmt::Display for TablePolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.script {
            Some(script) => write!(f, "{script}")?,
            None => write!(f, "{}", self.name())?,
        }
        if let Order::OriginPriority(priorities) = &self.policy.order {
            let mut nodes: Vec<_> = priorities.iter().collect();
            nodes.sort_unstable_by(|a, b| b.1.cmp(a.1));
            nodes.iter().try_for_each(|(node, _)| write!(f, " {}", node.0))?;
        }
        for (column, rule) in self.columns.iter().flat_map(|columns| &columns.rules) {
            write!(f, ", {} {rule}", Quoted(column))?;
        }
        let groups = self.columns.as_ref().map(|columns| columns.groups.to_string());
        if let Some(groups) = groups.filter(|groups| !groups.is_empty()) {
            write!(f, ", groups{groups}")?;
        }
        match self.policy.deletes {
            Deletes::ByStamp => {}
            Deletes::DeleteWins => f.write_str(", delete_wins")?,
            Deletes::UpdateWins => f.write_str(", update_wins")?,
        }
        match self.foreign_keys {
            ForeignKeys::Keep => {}
            ForeignKeys::DeleteChild => f.write_str(", delete_child")?,
            ForeignKeys::RestoreParent => f.write_str(", restore_parent")?,
        }
        match self.excluded {
            Excluded::Refuse => {}
            Excluded::Quarantine => f.write_str(", exclusions quarantined")?,
        }
        match self.checked {
            Checked::Refuse => {}
            Checked::Quarantine => f.write_str(", checks quarantined")?,
        }
        match self.unclaimed {
            Unclaimed::Refuse => Ok(()),
            Unclaimed::Pairwise => f.write_str(", unique keys pairwise"),
        }
    }
}
