//! The policy file as it is written, and what each of its rules means.
//!
//! In:   one `[[table]]`, the names of the members, scripts       Out: policy, groups and script; all faults of the rule
//! Must never: stop at the first fault, or take a key in silence that nothing reads
//! Not here: rules beside each other ([`super::Policies::parse`]), how columns fit a table ([`crate::columns`])

use std::collections::BTreeMap;
use std::sync::Arc;

use anabranch_proto::NodeId;
use serde::Deserialize;

use super::{Checked, Excluded, Fault, ForeignKeys, Name, Unclaimed};
use crate::columns::ColumnRule;
use crate::frontier::{Deletes, Order, Policy};
use crate::groups::Groups;
use crate::script::Script;

/// The policy file as it is written.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct File {
    #[serde(default)]
    pub(super) table: Vec<Rule>,
}

/// `[[table]]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Rule {
    pub(super) name: String,
    #[serde(default)]
    pub(super) policy: Name,
    #[serde(default)]
    deletes: DeleteRule,
    #[serde(default)]
    pub(super) foreign_keys: ForeignKeys,
    #[serde(default)]
    pub(super) exclusion_constraints: Excluded,
    #[serde(default)]
    pub(super) check_constraints: Checked,
    #[serde(default)]
    pub(super) unique_keys: Unclaimed,
    /// Names of members, the preferred first.
    priority: Option<Vec<String>>,
    /// A file, beside this one if the path is relative.
    script: Option<String>,
    #[serde(default)]
    pub(super) columns: BTreeMap<String, ColumnRule>,
    /// Columns that are decided together.
    #[serde(default)]
    groups: Vec<Vec<String>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
enum DeleteRule {
    #[default]
    ByStamp,
    DeleteWins,
    UpdateWins,
}

impl Rule {
    pub(super) fn groups(&self, faults: &mut Vec<Fault>) -> Groups {
        if !self.groups.is_empty() && self.policy != Name::ColumnMerge {
            faults.push(Fault::IdleGroups(self.name.clone()));
        }
        for group in &self.groups {
            if group.iter().all(|column| Some(column) == group.first()) {
                faults.push(Fault::SmallGroup {
                    table: self.name.clone(),
                    group: group.clone(),
                });
            }
        }
        let groups = Groups::join(self.groups.iter().cloned());
        for (column, rule) in groups
            .columns()
            .filter_map(|name| self.columns.get_key_value(name))
        {
            faults.push(Fault::GroupRule {
                table: self.name.clone(),
                column: column.clone(),
                rule: *rule,
            });
        }
        groups
    }

    /// What becomes of merged rows that a CHECK refuses. Without a rule of its own no column can break one: what goes together is in a
    /// group.
    pub(super) fn checked(&self, faults: &mut Vec<Fault>) -> Checked {
        if self.check_constraints == Checked::Quarantine && self.columns.is_empty() {
            faults.push(Fault::IdleChecks(self.name.clone()));
        }
        self.check_constraints
    }

    pub(super) fn script(
        &self,
        read: &mut impl FnMut(&str) -> Result<String, String>,
        faults: &mut Vec<Fault>,
    ) -> Option<Arc<Script>> {
        let table = || self.name.clone();
        let name = match (self.policy, &self.script) {
            (Name::Script, Some(name)) => name,
            (Name::Script, None) => {
                faults.push(Fault::NoScript(table()));
                return None;
            }
            (_, Some(_)) => {
                faults.push(Fault::IdleScript(table()));
                return None;
            }
            (_, None) => return None,
        };
        let script = name.clone();
        let fault = match read(name) {
            Err(text) => Fault::ScriptUnread {
                table: table(),
                script,
                text,
            },
            Ok(text) => match Script::new(name, &text) {
                Ok(script) => return Some(Arc::new(script)),
                Err(refusal) => Fault::Script {
                    table: table(),
                    script,
                    refusal,
                },
            },
        };
        faults.push(fault);
        None
    }

    pub(super) fn policy(&self, members: &BTreeMap<String, NodeId>, faults: &mut Vec<Fault>) -> Policy {
        let order = match (self.policy, &self.priority) {
            (Name::OriginPriority, Some(names)) if !names.is_empty() => {
                Order::OriginPriority(self.priorities(names, members, faults))
            }
            (Name::OriginPriority, _) => {
                faults.push(Fault::NoPriority(self.name.clone()));
                Order::LastUpdateWins
            }
            (policy, priority) => {
                if priority.is_some() {
                    faults.push(Fault::IdlePriority(self.name.clone()));
                }
                if policy == Name::FirstUpdateWins {
                    Order::FirstUpdateWins
                } else {
                    Order::LastUpdateWins
                }
            }
        };
        let deletes = match self.deletes {
            DeleteRule::ByStamp => Deletes::ByStamp,
            DeleteRule::DeleteWins => Deletes::DeleteWins,
            DeleteRule::UpdateWins => Deletes::UpdateWins,
        };
        Policy { order, deletes }
    }

    fn priorities(
        &self,
        names: &[String],
        members: &BTreeMap<String, NodeId>,
        faults: &mut Vec<Fault>,
    ) -> BTreeMap<NodeId, u32> {
        let mut priorities = BTreeMap::new();
        for (rank, name) in (1..).zip(names.iter().rev()) {
            let Some(&node) = members.get(name) else {
                faults.push(Fault::NoNode {
                    table: self.name.clone(),
                    node: name.clone(),
                    members: members.keys().cloned().collect::<Vec<_>>().join(", "),
                });
                continue;
            };
            if priorities.insert(node, rank).is_some() {
                faults.push(Fault::Twice {
                    table: self.name.clone(),
                    node: name.clone(),
                });
            }
        }
        priorities
    }
}
