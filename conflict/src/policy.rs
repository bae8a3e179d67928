//! The cluster's policy: which rule decides the conflicts of which table.
//!
//! In:   the text of the policy file, the names of the members      Out: the [`TablePolicy`] of a table; a hash that
//! peers compare
//! Holds: the rules, in the order of the file; the first whose pattern fits a table is the table's
//! Invariants: 1. a [`Policies`] has passed every check; 2. equal hashes mean equal decisions: the hash is of
//! everything that decides, in one form, and of nothing else (no comments, order of keys, or defaults left out); of a script
//! it is the name and the whole text
//!
//! Not here: what the file's words mean (`rule`, `fault`), reading the files (node: config), rules of columns ([`crate::columns`]), choosing a member of a frontier ([`crate::frontier`])

mod fault;
mod rule;
mod table_policy;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::Arc;

use anabranch_proto::NodeId;
use anabranch_proto::schema::name_fits;
use uuid::Uuid;

use crate::change::Change;
pub use crate::columns::{ColumnRule, Columns, Misfit};
use crate::script::{self, Script};

pub use fault::{Fault, Faults};
use rule::File;
pub use table_policy::{Checked, Excluded, ForeignKeys, Name, TablePolicy, Unclaimed};

/// Namespace of policy hashes. Fixed for ever: peers compare what is made with it.
const NAMESPACE: Uuid = Uuid::from_u128(0x0d6a_5b7e_94c1_4f0a_8d1b_7f3e_2c95_61d4);

/// The policies of all tables of a cluster.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Policies {
    rules: Vec<(String, TablePolicy)>,
    default: TablePolicy,
    /// Those to come, while they are changed.
    next: Option<Arc<Self>>,
}

impl Policies {
    /// Reads the text of a policy file. `members` are the nodes' names; `read` gives the text of a script's file, or says
    /// why it cannot.
    ///
    /// # Errors
    /// All faults at once.
    pub fn parse(
        text: &str,
        members: &BTreeMap<String, NodeId>,
        mut read: impl FnMut(&str) -> Result<String, String>,
    ) -> Result<Self, Faults> {
        let file: File = toml::from_str(text).map_err(|error| {
            let start = error.span().map_or(0, |span| span.start);
            let line = text.get(..start).unwrap_or_default().matches('\n').count() + 1;
            let text = error.message().to_owned();
            Faults(vec![Fault::Syntax { line, text }])
        })?;
        let (mut rules, mut faults): (Vec<(String, TablePolicy)>, Vec<Fault>) = (Vec::new(), Vec::new());
        for rule in &file.table {
            let halves = rule.name.split_once('.');
            if !halves.is_some_and(|(schema, table)| !schema.is_empty() && !table.is_empty()) {
                faults.push(Fault::Pattern(rule.name.clone()));
            }
            // A pattern as a name: taken by another pattern, it is taken whole.
            if let Some((earlier, _)) = rules.iter().find(|(earlier, _)| fits(earlier, &rule.name)) {
                faults.push(Fault::Hidden {
                    later: rule.name.clone(),
                    earlier: earlier.clone(),
                });
            }
            let policy = rule.policy(members, &mut faults);
            let each = rule.policy == Name::ColumnMerge;
            let groups = rule.groups(&mut faults);
            let columns = (each || !rule.columns.is_empty()).then(|| Columns {
                each,
                rules: rule.columns.clone(),
                groups,
            });
            if columns.is_some() && !policy.is_last_writer() {
                faults.push(Fault::MergedOtherwise(rule.name.clone()));
            }
            let script = rule.script(&mut read, &mut faults);
            if script.is_some() && !(policy.is_last_writer() && columns.is_none()) {
                faults.push(Fault::ScriptOtherwise(rule.name.clone()));
            }
            let foreign_keys = rule.foreign_keys;
            let checked = rule.checked(&mut faults);
            let policy = TablePolicy {
                policy,
                columns,
                foreign_keys,
                excluded: rule.exclusion_constraints,
                checked,
                unclaimed: rule.unique_keys,
                script,
            };
            rules.push((rule.name.clone(), policy));
        }
        if faults.is_empty() {
            Ok(Self {
                rules,
                default: TablePolicy::default(),
                next: None,
            })
        } else {
            Err(Faults(faults))
        }
    }

    /// The policy of a table: of the first rule whose pattern fits, else last update wins.
    #[must_use]
    pub fn of(&self, schema: &str, table: &str) -> &TablePolicy {
        let name = format!("{schema}.{table}");
        self.rules
            .iter()
            .find(|(pattern, _)| fits(pattern, &name))
            .map_or(&self.default, |(_, policy)| policy)
    }

    /// These, on the way to others: tables for which both decide differently are decided by either ([`Self::change_of`]). Everything
    /// else, and the hash, stay those of before.
    #[must_use]
    pub fn changing_to(self, next: Self) -> Self {
        Self {
            next: Some(Arc::new(next)),
            ..self
        }
    }

    /// Those to come, while they are changed.
    #[must_use]
    pub fn next(&self) -> Option<&Self> {
        self.next.as_deref()
    }

    /// What decides for a table while its policy is changed; `None` where nothing changes for it.
    #[must_use]
    pub fn change_of(&self, schema: &str, table: &str) -> Option<Change> {
        let next = self.next.as_ref()?;
        // Where columns are merged no change is made.
        Change::between(self.of(schema, table), next.of(schema, table))
            .ok()
            .flatten()
    }

    /// Does the highest stamp decide for a table, and nothing else, also not as a policy to come?
    #[must_use]
    pub fn is_last_writer(&self, schema: &str, table: &str) -> bool {
        self.of(schema, table).is_last_writer() && self.change_of(schema, table).is_none()
    }

    /// The rules that merge columns, in order.
    pub fn merging(&self) -> impl Iterator<Item = (&str, &Columns)> {
        let rules = self.rules.iter();
        rules.filter_map(|(pattern, policy)| Some((pattern.as_str(), policy.columns.as_ref()?)))
    }

    /// Does any table's rule delete rows that lost their parents, or bring these back?
    #[must_use]
    pub fn mends_orphans(&self) -> bool {
        let mends = |rule: &(String, TablePolicy)| rule.1.foreign_keys != ForeignKeys::Keep;
        self.rules.iter().any(mends)
    }

    /// Does any table's rule merge columns?
    #[must_use]
    pub fn merges_columns(&self) -> bool {
        self.rules.iter().any(|(_, policy)| policy.columns.is_some())
    }

    /// Patterns and policies, in order; tables that fit none have the default.
    #[must_use]
    pub fn rules(&self) -> &[(String, TablePolicy)] {
        &self.rules
    }

    /// The policy of tables that no rule fits.
    #[must_use]
    pub const fn default_policy(&self) -> &TablePolicy {
        &self.default
    }

    /// The scripts that decide for any table, each once.
    pub fn scripts(&self) -> impl Iterator<Item = &Script> {
        let mut known: Vec<&Script> = Vec::new();
        for (_, policy) in &self.rules {
            if let Some(script) = policy.script.as_deref().filter(|script| !known.contains(script)) {
                known.push(script);
            }
        }
        known.into_iter()
    }

    /// Everything that decides, one rule a line, and then the scripts, line by line. What is hashed, and what `diff` compares.
    #[must_use]
    pub fn canonical(&self) -> String {
        let rules = self
            .rules
            .iter()
            .map(|(pattern, policy)| format!("{pattern}: {policy}\n"));
        let mut text: String = rules.chain([format!("*: {}\n", self.default)]).collect();
        for script in self.scripts() {
            text.push_str(&format!("{script}, {}:\n", script::REVISION));
            for line in script.text().split('\n') {
                text.push_str(&format!("    {line}\n"));
            }
        }
        text
    }

    /// Peers with another one are refused.
    #[must_use]
    pub fn hash(&self) -> String {
        Uuid::new_v5(&NAMESPACE, self.canonical().as_bytes()).to_string()
    }
}

/// Does `name` fit `pattern`, in which `*` stands for any run of characters of either part?
fn fits(pattern: &str, name: &str) -> bool {
    let (Some(pattern), Some(name)) = (pattern.split_once('.'), name.split_once('.')) else {
        return false;
    };
    name_fits(pattern.0, name.0) && name_fits(pattern.1, name.1)
}
