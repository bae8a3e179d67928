//! The cluster's policy: which rule decides the conflicts of which table.
//!
//! In:   the text of the policy file, the names of the members      Out: the [`Policy`] of a table; a hash that
//! peers compare
//! Holds: the rules, in the order of the file; the first whose pattern fits a table is the table's
//! Invariants: 1. a [`Policies`] has passed every check; 2. equal hashes mean equal decisions: the hash is of
//! everything that decides, in one form, and of nothing else (no comments, order of keys, or defaults left out); of a script
//! it is the name and the whole text
//!
//! Not here: reading the files (node: config), rules of columns ([`crate::columns`]), choosing a member of a frontier ([`crate::frontier`])

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use anabranch_proto::NodeId;
use anabranch_proto::schema::name_fits;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::change::Change;
pub use crate::columns::{ColumnRule, Columns, Misfit};
use crate::frontier::{Deletes, Order, Policy};
use crate::groups::{Groups, Name as Quoted};
use crate::script::{self, Script};

/// Namespace of policy hashes. Fixed for ever: peers compare what is made with it.
const NAMESPACE: Uuid = Uuid::from_u128(0x0d6a_5b7e_94c1_4f0a_8d1b_7f3e_2c95_61d4);

/// The policy file as it is written.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    table: Vec<Rule>,
}

/// `[[table]]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct Rule {
    name: String,
    #[serde(default)]
    policy: Name,
    #[serde(default)]
    deletes: DeleteRule,
    #[serde(default)]
    foreign_keys: ForeignKeys,
    #[serde(default)]
    exclusion_constraints: Excluded,
    /// Names of members, the preferred first.
    priority: Option<Vec<String>>,
    /// A file, beside this one if the path is relative.
    script: Option<String>,
    #[serde(default)]
    columns: BTreeMap<String, ColumnRule>,
    /// Columns that are decided together.
    #[serde(default)]
    groups: Vec<Vec<String>>,
}

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

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
enum DeleteRule {
    #[default]
    ByStamp,
    DeleteWins,
    UpdateWins,
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
        "`{table}`: no node is called `{node}`; the members are {members}. One that joined later must be in `[[peers]]`, too"
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
    /// What decides instead of `policy`, which is last update wins then.
    pub script: Option<Arc<Script>>,
}

impl TablePolicy {
    /// May it have exclusion constraints?
    #[must_use]
    pub fn quarantines_excluded(&self) -> bool {
        self.excluded == Excluded::Quarantine
    }

    /// Does the highest stamp decide, and nothing else?
    #[must_use]
    pub fn is_last_writer(&self) -> bool {
        self.policy.is_last_writer() && self.columns.is_none() && self.script.is_none()
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
            Excluded::Refuse => Ok(()),
            Excluded::Quarantine => f.write_str(", exclusions quarantined"),
        }
    }
}

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
            let policy = TablePolicy {
                policy,
                columns,
                foreign_keys,
                excluded: rule.exclusion_constraints,
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

impl Rule {
    fn groups(&self, faults: &mut Vec<Fault>) -> Groups {
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

    fn script(
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

    fn policy(&self, members: &BTreeMap<String, NodeId>, faults: &mut Vec<Fault>) -> Policy {
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

/// Does `name` fit `pattern`, in which `*` stands for any run of characters of either part?
fn fits(pattern: &str, name: &str) -> bool {
    let (Some(pattern), Some(name)) = (pattern.split_once('.'), name.split_once('.')) else {
        return false;
    };
    name_fits(pattern.0, name.0) && name_fits(pattern.1, name.1)
}

#[cfg(test)]
mod tests {
    use anabranch_proto::schema::{ColumnDesc, TableDesc};

    use super::*;
    use crate::merge;

    fn members() -> BTreeMap<String, NodeId> {
        [("berlin".to_owned(), NodeId(1)), ("oslo".to_owned(), NodeId(2))].into()
    }

    fn parse(text: &str) -> Result<Policies, String> {
        let read = |name: &str| match name {
            "late.rhai" => Ok(LATE.to_owned()),
            "early.rhai" => Ok(LATE.replace("versions.len() - 1", "0")),
            "wrong.rhai" => Ok("fn resolve(versions) {\n let = 1 }".to_owned()),
            _ => Err("no such file".to_owned()),
        };
        Policies::parse(text, &members(), read).map_err(|faults| faults.to_string())
    }

    const LATE: &str = "// late\nfn resolve(versions) {\n    versions.len() - 1\n}\n";

    #[test]
    fn a_scripts_text_is_part_of_what_decides() {
        let rule = |rest: &str| parse(&format!("[[table]]\nname = \"a.b\"\npolicy = \"script\"\n{rest}"));
        let (late, early) = (
            rule("script = \"late.rhai\"").unwrap(),
            rule("script = \"early.rhai\"").unwrap(),
        );
        assert_eq!(late.of("a", "b").name(), Name::Script);
        assert!(!late.of("a", "b").is_last_writer() && late.of("a", "c").is_last_writer());
        assert!(
            late.of("a", "b").to_string().starts_with("script late.rhai ("),
            "{}",
            late.of("a", "b")
        );
        let canonical = late.canonical();
        let end = ":\n    // late\n    fn resolve(versions) {\n        versions.len() - 1\n    }\n    \n";
        assert!(canonical.ends_with(end), "{canonical}");
        assert_ne!(late.hash(), early.hash());
        assert_eq!(
            late.hash(),
            rule("script = \"late.rhai\"\ndeletes = \"by_stamp\"")
                .unwrap()
                .hash()
        );
        // One file for two tables: its text is there once.
        let twice = parse(
            "[[table]]\nname = \"a.b\"\npolicy = \"script\"\nscript = \"late.rhai\"\n\
             [[table]]\nname = \"a.c\"\npolicy = \"script\"\nscript = \"late.rhai\"",
        );
        assert_eq!(twice.unwrap().canonical().matches("// late").count(), 1);
        for (rest, said) in [
            ("", "no script"),
            (
                "script = \"none.rhai\"",
                "`a.b`: cannot read the script none.rhai: no such file",
            ),
            (
                "script = \"wrong.rhai\"",
                "`a.b`: script wrong.rhai: line 2, column 6: ",
            ),
            (
                "script = \"late.rhai\"\ndeletes = \"delete_wins\"",
                "decides alone",
            ),
            (
                "script = \"late.rhai\"\n[table.columns]\nn = \"delta\"",
                "decides alone",
            ),
            ("script = \"late.rhai\"\npriority = [\"berlin\"]", "priority list"),
        ] {
            let refused = rule(rest).unwrap_err();
            assert!(refused.contains(said), "{rest}: {refused}");
        }
        let idle = parse("[[table]]\nname = \"a.b\"\nscript = \"late.rhai\"").unwrap_err();
        assert!(idle.contains("only policy = \"script\" calls"), "{idle}");
    }

    const THREE: &str = r#"
        [[table]]
        name = "public.order"
        policy = "origin_priority"
        priority = ["oslo", "berlin"]
        [[table]]
        name = "public.order_*"
        policy = "first_update_wins"
        deletes = "delete_wins"
        [[table]]
        name = "shop.*"
        deletes = "update_wins"
    "#;

    #[test]
    fn the_first_rule_that_fits_is_the_tables() {
        let policies = parse(THREE).unwrap();
        let of = |schema, table| policies.of(schema, table).to_string();
        assert_eq!(of("public", "order"), "origin_priority 2 1");
        assert_eq!(of("public", "order_line"), "first_update_wins, delete_wins");
        assert_eq!(of("shop", "anything"), "last_update_wins, update_wins");
        assert_eq!(of("public", "customer"), "last_update_wins");
        assert!(policies.of("public", "customer").policy.is_last_writer());
        assert!(!policies.of("shop", "anything").policy.is_last_writer());
    }

    #[test]
    fn what_becomes_of_rows_without_a_parent_is_the_tables_too() {
        let of = |rule: &str| parse(&format!("[[table]]\nname = \"a.b\"\nforeign_keys = \"{rule}\""));
        let words = |rule: &str| of(rule).unwrap().of("a", "b").to_string();
        assert_eq!(words("keep"), "last_update_wins");
        assert_eq!(words("delete_child"), "last_update_wins, delete_child");
        // As if it were not written: nodes with and without it agree.
        let without = parse("[[table]]\nname = \"a.b\"").unwrap();
        assert_eq!(of("keep").unwrap().hash(), without.hash());
        for rule in ["delete_child", "restore_parent"] {
            assert!(of(rule).unwrap().mends_orphans() && of(rule).unwrap().hash() != without.hash());
        }
        assert!(!without.mends_orphans());
        assert_eq!(words("restore_parent"), "last_update_wins, restore_parent");
        let error = of("cascade").unwrap_err();
        assert!(
            error.contains("cascade") && error.contains("`delete_child`, `restore_parent`"),
            "{error}"
        );
    }

    #[test]
    fn the_hash_is_of_what_decides_and_of_nothing_else() {
        let hash = |text: &str| parse(text).unwrap().hash();
        let reordered =
            "# a comment\n[[table]]\ndeletes = \"by_stamp\"\npolicy = \"first_update_wins\"\nname = \"a.b\"";
        assert_eq!(
            hash("[[table]]\nname = \"a.b\"\npolicy = \"first_update_wins\""),
            hash(reordered)
        );
        assert_eq!(hash(""), Policies::default().hash());
        let texts = [
            "",
            THREE,
            "[[table]]\nname = \"a.b\"\ndeletes = \"delete_wins\"",
            "[[table]]\nname = \"a.c\"\ndeletes = \"delete_wins\"",
            "[[table]]\nname = \"a.b\"\npolicy = \"origin_priority\"\npriority = [\"oslo\"]",
            "[[table]]\nname = \"a.b\"\npolicy = \"column_merge\"",
            "[[table]]\nname = \"a.b\"\nforeign_keys = \"delete_child\"",
            "[[table]]\nname = \"a.b\"\nforeign_keys = \"restore_parent\"",
            "[[table]]\nname = \"a.b\"\nexclusion_constraints = \"quarantine\"",
            "[[table]]\nname = \"a.b\"\ncolumns = { n = \"delta\" }",
            "[[table]]\nname = \"a.b\"\ncolumns = { n = \"max\" }",
            "[[table]]\nname = \"a.b\"\ncolumns = { n = \"set_union\" }",
            "[[table]]\nname = \"a.b\"\ncolumns = { n = \"jsonb_merge\" }",
            "[[table]]\nname = \"a.b\"\ncolumns = { n = \"append\" }",
            "[[table]]\nname = \"a.b\"\npolicy = \"column_merge\"\ncolumns = { n = \"max\" }",
            "[[table]]\nname = \"a.b\"\npolicy = \"column_merge\"\ngroups = [[\"n\", \"max\"]]",
            "[[table]]\nname = \"a.b\"\npolicy = \"column_merge\"\ngroups = [[\"n\", \"max\"], [\"c\", \"d\"]]",
            "[[table]]\nname = \"a.b\"\npolicy = \"column_merge\"\ngroups = [[\"n\", \"max\", \"c\", \"d\"]]",
            "[[table]]\nname = \"a.b\"\npolicy = \"origin_priority\"\npriority = [\"berlin\"]",
        ];
        let distinct: std::collections::BTreeSet<_> = texts.iter().map(|text| hash(text)).collect();
        assert_eq!(distinct.len(), texts.len());
        let grouped = |groups: &str| {
            hash(&format!(
                "[[table]]\nname = \"a.b\"\npolicy = \"column_merge\"\ngroups = [{groups}]"
            ))
        };
        let overlapping = grouped("[\"c\", \"d\"], [\"x\", \"y\"], [\"a\", \"c\"]");
        assert_eq!(overlapping, grouped("[\"y\", \"x\"], [\"d\", \"a\", \"c\"]"));
        assert_eq!(
            grouped(""),
            hash("[[table]]\nname = \"a.b\"\npolicy = \"column_merge\"")
        );
    }

    #[test]
    fn everything_that_is_wrong_is_said_with_its_remedy() {
        let refused = |text: &str, part: &str| {
            let faults = parse(text).unwrap_err();
            assert!(faults.contains(part), "{faults}");
        };
        refused(
            "[[table]]\nname = \"a.b\"\npolice = \"x\"",
            "line 3: unknown field `police`",
        );
        refused(
            "[[table]]\nname = \"a.b\"\npolicy = \"newest\"",
            "unknown variant `newest`",
        );
        refused("[[table]]\npolicy = \"last_update_wins\"", "missing field `name`");
        refused("[[table]]\nname = \"b\"", "`b` names no table");
        refused(
            "[[table]]\nname = \"a.b\"\npolicy = \"origin_priority\"",
            "add priority",
        );
        refused(
            "[[table]]\nname = \"a.b\"\npriority = [\"oslo\"]",
            "only policy = \"origin_priority\"",
        );
        let list = |list: &str| {
            format!("[[table]]\nname = \"a.b\"\npolicy = \"origin_priority\"\npriority = [{list}]")
        };
        refused(
            &list("\"rome\""),
            "no node is called `rome`; the members are berlin, oslo",
        );
        refused(&list("\"oslo\", \"oslo\""), "in the list twice");
        let groups = |rest: &str| format!("[[table]]\nname = \"a.b\"\n{rest}");
        refused(
            &groups("groups = [[\"x\", \"y\"]]"),
            "only policy = \"column_merge\" reads",
        );
        refused(
            &groups("policy = \"column_merge\"\ngroups = [[\"x\", \"x\"]]"),
            "[\"x\", \"x\"] has not",
        );
        refused(
            &groups("policy = \"column_merge\"\ngroups = [[]]"),
            "has two columns or more, and [] has not",
        );
        refused(
            &groups("policy = \"column_merge\"\ngroups = [[\"x\", \"y\"]]\ncolumns = { y = \"max\" }"),
            "column `y` is in a group",
        );
        let hidden = "[[table]]\nname = \"a.*\"\n[[table]]\nname = \"a.b*\"";
        refused(hidden, "`a.*` before it takes the same tables");
        refused(
            "[[table]]\nname = \"a.b\"\n[[table]]\nname = \"a.b\"",
            "never used",
        );
        refused("table = 3", "line 1");
    }

    fn table(columns: &[(&str, u32, i32, &str)]) -> TableDesc {
        let columns = columns
            .iter()
            .map(|&(name, type_oid, type_mod, type_name)| ColumnDesc {
                name: name.to_owned(),
                type_oid,
                type_mod,
                type_name: type_name.to_owned(),
            });
        TableDesc {
            schema: "public".to_owned(),
            name: "t".to_owned(),
            columns: columns.collect(),
            key: vec![0],
            identity_full: true,
        }
    }

    #[test]
    fn columns_of_a_group_are_one_unit_and_each_other_is_its_own() {
        let columns = |rest: &str| {
            let policies = parse(&format!("[[table]]\nname = \"public.t\"\n{rest}")).unwrap();
            policies.of("public", "t").columns.clone().unwrap()
        };
        let table =
            table(&["id", "low", "street", "note", "high", "zip", "n"].map(|name| (name, 23, -1, "integer")));
        let units = |columns: &Columns| -> Vec<Option<u16>> {
            let unit = |rule: &merge::Rule| match rule {
                merge::Rule::Unit(unit) => Some(*unit),
                _ => None,
            };
            columns.of(&table).iter().map(unit).collect()
        };
        let merged = columns(
            "policy = \"column_merge\"\ngroups = [[\"zip\", \"street\"], [\"high\", \"low\"]]\ncolumns = { n = \"delta\" }",
        );
        let wanted = [0, 1, 2, 3, 1, 2].map(Some);
        assert_eq!(units(&merged), [&wanted[..], &[None]].concat());
        assert!(merged.misfits(&table).is_empty());
        assert!(merged.keeps_together(&["low", "high"]) && merged.keeps_together(&["note"]));
        assert!(merged.keeps_together(&["n"]) && merged.keeps_together(&[]));
        assert!(!merged.keeps_together(&["low", "zip"]) && !merged.keeps_together(&["note", "low"]));
        assert!(!merged.keeps_together(&["n", "low"]) && !merged.keeps_together(&["low", "n"]));
        let whole = columns("columns = { n = \"delta\" }");
        assert_eq!(units(&whole), [&[Some(0); 6][..], &[None]].concat());
        assert!(whole.keeps_together(&["low", "note"]) && !whole.keeps_together(&["low", "n"]));
        let wrong = columns("policy = \"column_merge\"\ngroups = [[\"low\", \"id\", \"hihg\"]]");
        let said: Vec<String> = wrong.misfits(&table).iter().map(ToString::to_string).collect();
        assert_eq!(
            said,
            [
                "has no column `hihg`",
                "column `id` is part of the primary key, which is not merged"
            ]
        );
    }

    #[test]
    fn columns_of_other_types_are_refused_with_those_that_fit() {
        let table = table(&[
            ("id", 23, -1, "integer"),
            ("tags", 1009, -1, "text[]"),
            ("sizes", 1231, -1, "numeric[]"),
            ("doc", 3802, -1, "jsonb"),
            ("raw", 114, -1, "json"),
            ("note", 1043, 14, "character varying(10)"),
        ]);
        let said = |column: &str, rule: &str| {
            let text = format!("[[table]]\nname = \"public.t\"\ncolumns = {{ {column} = \"{rule}\" }}");
            let policies = parse(&text).unwrap();
            let misfits = policies
                .of("public", "t")
                .columns
                .clone()
                .unwrap()
                .misfits(&table);
            misfits.iter().map(ToString::to_string).collect::<String>()
        };
        for (column, rule) in [
            ("tags", "set_union"),
            ("tags", "append"),
            ("sizes", "append"),
            ("doc", "jsonb_merge"),
            ("doc", "append"),
        ] {
            assert_eq!(said(column, rule), "", "{column} {rule}");
        }
        assert!(
            said("sizes", "set_union")
                .starts_with("column `sizes` is of type numeric[], and set_union is for arrays of")
        );
        assert_eq!(
            said("raw", "jsonb_merge"),
            "column `raw` is of type json, and jsonb_merge is for jsonb"
        );
        assert_eq!(
            said("note", "append"),
            "column `note` is of type character varying(10), and append is for text, varchar without a length, arrays and jsonb"
        );
        assert!(said("id", "append").contains("part of the primary key"));
        assert!(said("tags", "delta").contains("delta is for smallint"));
    }
}
