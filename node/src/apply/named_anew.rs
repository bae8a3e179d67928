//! Tables whose names DDL has given to other ones, and rows that were written into those of before.
//!
//! Rows are known by their table's name. Where DDL makes a table, or renames one, a row that its node wrote under that name before it had
//! run the DDL is of another table. It comes into the one of today at nodes that hear of it behind the DDL, and not at the others. That
//! cannot be put right here: somebody has to be told.
//!
//! In:   texts of DDL, and where their transactions ended; changes of other nodes, and rows that were in quarantine      Out: an alarm
//! Holds: the last names, and who gave them where
//! Invariants: it stops nothing, and changes nothing of what is applied
//! On crash: names are known again of DDL that the journal has (`crate::capture`, `rebuild`)
//! Not here: reading texts ([`super::retyped::said`])
//!
//! Not noticed: rows that were resolved here in the moment before the DDL was; what was done by hand; DDL whose text cannot be read.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use anabranch_proto::schema::TableDesc;
use anabranch_proto::txn::{Change, TxnHeader};
use anabranch_proto::{NodeId, Position};

use super::retyped::said;
use crate::shared::{Alarms, lock};

/// So many names are kept.
const NAMES_MAX: usize = 1000;

/// Schema and name.
pub(crate) type Name = (String, String);

/// Names that DDL has given to tables.
#[derive(Debug, Default)]
pub struct NamedAnew {
    /// Most nodes never have any, and every change that comes in asks.
    has_any: AtomicBool,
    given: Mutex<Given>,
}

#[derive(Debug, Default)]
struct Given {
    /// By schema, then by name: whose DDL, and where that ended.
    tables: BTreeMap<String, BTreeMap<String, (NodeId, Position)>>,
    order: VecDeque<Name>,
}

impl NamedAnew {
    /// DDL of a node has run here. `path`: its `search_path`, and its role. Says which names it gives.
    pub(crate) fn note(
        &self,
        command: &str,
        (path, role): (&str, &str),
        by: (NodeId, Position),
    ) -> Vec<Name> {
        let mut names = Vec::new();
        for (schema, name) in said::names_given(command) {
            // In which of them it was is not known. Others have no table of that name, as a rule.
            let schemas: Vec<String> = match schema {
                Some(schema) => vec![schema],
                None => path.split(',').map(|schema| of_path(schema, role)).collect(),
            };
            let mut given = lock(&self.given);
            for schema in schemas {
                given.note((schema.clone(), name.clone()), by);
                names.push((schema, name.clone()));
            }
            self.has_any.store(true, Ordering::Release);
        }
        names
    }

    /// Is a change of another node's one of a table that has its name since, as far as its transaction had seen?
    pub(crate) fn is_of_another(&self, table: &TableDesc, header: &TxnHeader) -> bool {
        let given = lock(&self.given);
        let tables = given.tables.get(table.schema.as_str());
        let by = tables.and_then(|tables| tables.get(table.name.as_str()));
        by.is_some_and(|(node, place)| *node != header.origin() && header.deps.get(*node) < *place)
    }

    /// Has DDL given this name to a table?
    pub(crate) fn has(&self, table: &TableDesc) -> bool {
        let has = |given: &Given| {
            let tables = given.tables.get(table.schema.as_str());
            tables.is_some_and(|tables| tables.contains_key(table.name.as_str()))
        };
        self.has_any.load(Ordering::Acquire) && has(&lock(&self.given))
    }

    /// A change of another node is about to be resolved.
    pub(crate) fn meet(&self, header: &TxnHeader, change: &Change, alarms: &Alarms) {
        if !self.has_any.load(Ordering::Acquire) {
            return;
        }
        for table in change.tables() {
            self.meet_row(header, table, alarms);
        }
    }

    /// A row of such a table is written, or about to be.
    pub(crate) fn meet_row(&self, header: &TxnHeader, table: &TableDesc, alarms: &Alarms) {
        if self.is_of_another(table, header) {
            let text = format!(
                "node {} wrote rows of {}.{} before it had run DDL which gave that name to another table: they are of the one of before, and \
                 come into the one of today at nodes that hear of them behind the DDL, as this one did, or where they waited in quarantine. \
                 Compare (`anabranch verify`), and delete what is not of this table. (If there never was another one, and \
                 the DDL only made it where it was missing, they are its own: let them be.) See docs/cli.md, `ddl`",
                header.origin(),
                table.schema,
                table.name
            );
            alarms.raise("other_table", text);
        }
    }
}

/// A node begins with a copy in which the table has its name since, and with a journal that has rows of the one of before.
pub(crate) fn tell_copied((schema, name): (&str, &str), alarms: &Alarms) {
    let text = format!(
        "DDL gave the name {schema}.{name} to another table shortly before this node was copied, and rows of the one of before are in the journal \
         that it took over: they may have come into the one of today here, or rows of that may be gone. Compare (`anabranch verify`), and mend \
         this node (`anabranch repair`)"
    );
    alarms.raise("other_table", text);
}

impl Given {
    fn note(&mut self, name: Name, by: (NodeId, Position)) {
        let tables = self.tables.entry(name.0.clone()).or_default();
        if tables.insert(name.1.clone(), by).is_none() {
            self.order.push_back(name);
        }
        if self.order.len() > NAMES_MAX
            && let Some((schema, name)) = self.order.pop_front()
            && let Some(tables) = self.tables.get_mut(&schema)
        {
            tables.remove(&name);
        }
    }
}

/// A schema as `search_path` names it.
fn of_path(schema: &str, role: &str) -> String {
    match schema.trim() {
        "\"$user\"" | "$user" => role.to_owned(),
        schema => schema.trim_matches('"').replace("\"\"", "\""),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use anabranch_proto::row::{Cell, RowImage};
    use anabranch_proto::stamp::{NTP64, Stamp};

    use super::*;

    #[test]
    fn rows_of_a_table_that_had_the_name_before_are_told_and_no_others() {
        let names = NamedAnew::default();
        let change = |schema: &str, name: &str| Change::Delete {
            table: Arc::new(TableDesc {
                schema: schema.to_owned(),
                name: name.to_owned(),
                columns: Vec::new(),
                key: Vec::new(),
                identity_full: false,
            }),
            key: RowImage::build([Cell::Null].into_iter()),
        };
        let header = |node: u16, seen: u64| TxnHeader {
            stamp: Stamp {
                time: NTP64(9),
                node: NodeId(node),
            },
            position: Position::new(1, 500),
            deps: [(NodeId(1), Position::new(1, seen))].into_iter().collect(),
            xid: 7,
            commit_us: 0,
            witness_us: 0,
            change_count: 1,
        };
        let is_told = |header: &TxnHeader, schema: &str, name: &str| {
            let alarms = Alarms::default();
            names.meet(header, &change(schema, name), &alarms);
            !alarms.list().is_empty()
        };
        let place = (NodeId(1), Position::new(1, 100));
        assert!(!is_told(&header(2, 0), "public", "item"));
        names.note(
            "alter table item rename to was; alter table shop.fresh rename to item; create table other (id int)",
            ("\"$user\", public", "app"),
            place,
        );
        let has = |name: &str| match change("shop", name) {
            Change::Delete { table, .. } => names.has(&table),
            _ => false,
        };
        assert!(has("item") && !has("thing"));
        assert!(is_told(&header(2, 99), "shop", "item"));
        assert!(is_told(&header(2, 0), "public", "was") && is_told(&header(2, 0), "app", "other"));
        // Who has run it; its own node; other tables.
        assert!(!is_told(&header(2, 100), "shop", "item") && !is_told(&header(1, 0), "shop", "item"));
        assert!(!is_told(&header(2, 0), "public", "item") && !is_told(&header(2, 0), "shop", "other"));
        for count in 0..NAMES_MAX {
            names.note(
                &format!("create table s.t{count} (id int)"),
                ("public", "app"),
                place,
            );
        }
        assert!(!is_told(&header(2, 0), "shop", "item") && is_told(&header(2, 0), "s", "t0"));
    }
}
