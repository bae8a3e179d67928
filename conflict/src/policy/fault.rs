//! What can be wrong with a policy file.
//!
//! In:   what the reader of the file met            Out: its words for people, each with a remedy
//! Not here: finding it (`rule`, [`super::Policies::parse`])

use std::fmt;

use crate::columns::ColumnRule;
use crate::script;

/// One thing that is wrong with a policy file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// It is no TOML, or has keys or values that mean nothing.
    #[error("line {line}: {text}")]
    Syntax {
        /// Counted from 1.
        line: usize,
        /// What the reader says.
        text: String,
    },
    /// A name that chooses no table.
    #[error("`{0}` names no table; write `schema.table`, with `*` for any run of characters in either part")]
    Pattern(String),
    /// A rule behind one that takes all its tables.
    #[error(
        "the rule for `{later}` is never used: `{earlier}` before it takes the same tables; put it first"
    )]
    Hidden {
        /// The rule that never decides.
        later: String,
        /// The one in front of it.
        earlier: String,
    },
    /// `origin_priority` without a list.
    #[error(
        "`{0}` has origin_priority and no list; add priority = [\"preferred\", \"next\"], names of nodes"
    )]
    NoPriority(String),
    /// A list that nothing reads.
    #[error("`{0}` has a priority list, which only policy = \"origin_priority\" reads; remove one of both")]
    IdlePriority(String),
    /// Merged columns beside a rule over whole rows.
    #[error(
        "`{0}` merges columns, which goes with policy = \"last_update_wins\" or \"column_merge\" and deletes = \"by_stamp\" \
         only; remove the columns or the other rule"
    )]
    MergedOtherwise(String),
    /// Groups that nothing reads.
    #[error(
        "`{0}` has groups, which only policy = \"column_merge\" reads: elsewhere one update decides all columns without a rule \
         anyway; remove one of both"
    )]
    IdleGroups(String),
    /// A group of fewer than two columns.
    #[error("`{table}`: a group has two columns or more, and {} has not; add the others, or remove it", list(.group))]
    SmallGroup {
        /// The rule.
        table: String,
        /// What is in it.
        group: Vec<String>,
    },
    /// A column of a group that has a rule.
    #[error(
        "`{table}`: column `{column}` is in a group, where the last update of any column decides, and has the rule {rule}; \
         remove one of both"
    )]
    GroupRule {
        /// The table's rule.
        table: String,
        /// The column.
        column: String,
        /// Its own rule.
        rule: ColumnRule,
    },
    /// An opt-in that nothing reads.
    #[error(
        "`{0}` has check_constraints = \"quarantine\" and no column with a rule: only such a column can break a CHECK that each writer \
         keeps; remove it, or add [table.columns]"
    )]
    IdleChecks(String),
    /// `policy = "script"` without one.
    #[error(
        "`{0}` has policy = \"script\" and no script; add script = \"resolve.rhai\", a file beside the policy file"
    )]
    NoScript(String),
    /// A script that nothing calls.
    #[error("`{0}` has a script, which only policy = \"script\" calls; remove one of both")]
    IdleScript(String),
    /// A script beside other rules over the same rows.
    #[error(
        "`{0}` has a script, which is told of deletes and decides alone: remove its columns, or deletes = \"...\""
    )]
    ScriptOtherwise(String),
    /// The script's file.
    #[error("`{table}`: cannot read the script {script}: {text}")]
    ScriptUnread {
        /// The rule.
        table: String,
        /// As the policy file names it.
        script: String,
        /// Why.
        text: String,
    },
    /// What it says.
    #[error("`{table}`: script {script}: {refusal}")]
    Script {
        /// The rule.
        table: String,
        /// As the policy file names it.
        script: String,
        /// What is wrong, and where.
        refusal: script::Refusal,
    },
    /// A name in a list that no member has.
    #[error(
        "`{table}`: no node is called `{node}`; the members are {members}. Correct the name; a node that is not known here yet must be \
         in `[[peers]]`"
    )]
    NoNode {
        /// The rule.
        table: String,
        /// The name.
        node: String,
        /// All names.
        members: String,
    },
    /// A name that is in a list twice.
    #[error("`{table}`: `{node}` is in the list twice")]
    Twice {
        /// The rule.
        table: String,
        /// The name.
        node: String,
    },
}

/// As in the file.
fn list(group: &[String]) -> String {
    let quoted: Vec<String> = group.iter().map(|column| format!("{column:?}")).collect();
    format!("[{}]", quoted.join(", "))
}

/// Every fault of a policy file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Faults(pub Vec<Fault>);

impl fmt::Display for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} fault(s):", self.0.len())?;
        self.0.iter().try_for_each(|fault| write!(f, "\n  {fault}"))
    }
}

impl std::error::Error for Faults {}
