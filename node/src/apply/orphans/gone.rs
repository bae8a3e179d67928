//! What parents were, for `foreign_keys = "restore_parent"`.
//!
//! In:   deletes of rows with such children, before they are made      Out: of an orphan the rows that its parent is made of again
//! Holds: these rows, as their values' texts, until the transaction ends, up to a bound; past it none, and orphans of that transaction stay
//! Invariants: tables that no such child refers to, by any number of steps, cost nothing
//! Not here: which rows are orphans ([`super::judge`]), inserting their parents (`crate::daemon`)

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use anabranch_conflict::policy::ForeignKeys;
use anabranch_proto::row::RowImage;
use anabranch_proto::schema::TableDesc;

use super::super::batch::{Action, Write};
use super::super::failure::Failure;
use super::super::foreign::{ForeignKey, TableName};
use super::super::plan::{Plan, quote};
use super::super::write::{Writer, parameters, push, references};
use super::judge::Known;
use super::name_of;
use super::question::columns;
use crate::index::RowKey;
use crate::shared::lock;

/// Bytes of rows that are kept.
const KEPT_BYTES: usize = 16 << 20;
/// Steps from an orphan to rows that are there.
const STEPS_MAX: usize = 64;

/// A row that is not there: its key, in the columns of its table.
pub(super) type Missing = (Arc<TableDesc>, RowImage);

/// Rows that an apply transaction deletes.
#[derive(Debug, Default)]
pub(crate) struct Gone {
    /// Each a JSON object of its values' texts.
    rows: BTreeMap<TableName, BTreeMap<RowKey, String>>,
    bytes: usize,
    is_full: bool,
}

impl Gone {
    fn insert(&mut self, table: TableName, key: RowKey, json: String) {
        self.bytes += json.len() + key.heap_len() + super::ROW_BYTES;
        if self.bytes > KEPT_BYTES {
            tracing::warn!(
                "more rows are deleted at once than are kept for their children: these stay without parents"
            );
            *self = Self {
                is_full: true,
                ..Self::default()
            };
            return;
        }
        self.rows.entry(table).or_default().insert(key, json);
    }
}

impl Writer<'_> {
    /// Keeps rows that are about to be deleted, if somebody may want them back.
    pub(super) async fn note_gone(&mut self, plan: &Plan, actions: &[&Action]) -> Result<(), Failure> {
        let is_delete = |action: &&&Action| matches!(action.write, Write::Delete(_));
        let deleted: Vec<&Action> = actions.iter().filter(is_delete).copied().collect();
        if deleted.is_empty() || self.touched.gone.is_full || !self.is_wanted_back(&name_of(plan)).await? {
            return Ok(());
        }
        let sql = format!("{} FOR UPDATE OF t", plan.read(&texts(plan)));
        let mut rows = plan.rows();
        for action in &deleted {
            push(&mut rows, &action.write)?;
        }
        let (array, text) = rows.finish();
        let params = parameters(array, None, text);
        let statement = self.session.prepare(&sql).await?;
        let client = &self.session.client;
        for row in client.query(&statement, &references(&params)).await? {
            let Some(action) = super::place(&row)?.and_then(|at| deleted.get(at)) else {
                continue;
            };
            let gone = &mut self.touched.gone;
            gone.insert(name_of(plan), action.key.clone(), row.try_get(1)?);
        }
        Ok(())
    }

    /// Does a table whose rows get their parents back refer to this one, or to one that refers to it?
    async fn is_wanted_back(&mut self, table: &TableName) -> Result<bool, Failure> {
        if !lock(&self.shared.resolver).restores_parents() {
            return Ok(false);
        }
        let (mut todo, mut seen) = (vec![table.clone()], HashSet::new());
        while let Some(name) = todo.pop() {
            for key in self.session.links(&name).await?.referring {
                for child in &key.children {
                    let policy = lock(&self.shared.resolver).foreign_keys_of(&child.0, &child.1);
                    if policy == ForeignKeys::RestoreParent {
                        return Ok(true);
                    }
                    if seen.insert(child.clone()) {
                        todo.push(child.clone());
                    }
                }
            }
        }
        Ok(false)
    }

    /// The rows that this transaction deletes and that have to be there again for the row that `key` refers to: what others refer
    /// to first. `[{"schema": .., "table": .., "values": {..}}]`; `None` where that row, or one that it refers to, is not among them.
    pub(super) async fn parents_again(
        &mut self,
        gone: &Gone,
        key: &Arc<ForeignKey>,
        parent: Missing,
        known: &mut Known,
    ) -> Result<Option<String>, Failure> {
        let mut rows: Vec<(TableName, &str)> = Vec::new();
        let mut todo = vec![(Arc::clone(key), parent)];
        let mut steps = 0;
        while let Some((key, missing)) = todo.pop() {
            let found = self.find_gone(gone, &key, &missing)?;
            steps += 1;
            let Some((name, json)) = found.filter(|_| steps <= STEPS_MAX) else {
                return Ok(None);
            };
            for held in self.session.links(&name).await?.held {
                if let Some(next) = self.missing_parent(&held, &name, json, known).await? {
                    todo.push((held, next));
                }
            }
            // One that several refer to comes before all of them.
            rows.retain(|row| *row != (name.clone(), json));
            rows.push((name, json));
        }
        let mut out = String::from("[");
        for ((schema, table), row) in rows.iter().rev() {
            let comma = if out.len() > 1 { "," } else { "" };
            let (schema, table) = (serde_json::json!(schema), serde_json::json!(table));
            out.push_str(&format!(
                "{comma}{{\"schema\":{schema},\"table\":{table},\"values\":{row}}}"
            ));
        }
        Ok(Some(out + "]"))
    }

    fn find_gone<'a>(
        &self,
        gone: &'a Gone,
        key: &ForeignKey,
        (desc, image): &Missing,
    ) -> Result<Option<(TableName, &'a str)>, Failure> {
        // It was in one of the partitions, if there are some.
        for name in &key.parents {
            let Some(rows) = gone.rows.get(name) else { continue };
            let desc = TableDesc {
                schema: name.0.clone(),
                name: name.1.clone(),
                ..TableDesc::clone(desc)
            };
            let row = lock(&self.shared.resolver).key_of_image(&desc, image)?;
            if let Some(json) = rows.get(&row) {
                return Ok(Some((name.clone(), json)));
            }
        }
        Ok(None)
    }

    /// The row that a row, whose values' texts are given as JSON, refers to and that is not there; if that is not the row itself.
    async fn missing_parent(
        &self,
        key: &ForeignKey,
        table: &TableName,
        json: &str,
        known: &mut Known,
    ) -> Result<Option<Missing>, Failure> {
        let parent = key.parents.first().filter(|_| key.to_primary);
        let Some(parent) = parent else { return Ok(None) };
        let Some(of_parent) = self.known(known, parent).await? else {
            return Ok(None);
        };
        let Some(json) = referring(key, json) else {
            return Ok(None);
        };
        let values = key.pairs.iter();
        let values: Vec<String> = values
            .map(|pair| format!("t.{}::{}", quote(&pair.child), pair.parent_type))
            .collect();
        let own = if key.parents.contains(table) {
            format!(
                " AND NOT ({})",
                key.joined(|pair| format!("t.{}", quote(&pair.parent)), "t")
            )
        } else {
            String::new()
        };
        // Not as a row of the table: a domain may refuse NULL for the other columns.
        let children = key.pairs.iter().map(|pair| (&pair.child, &pair.child_type));
        let parents = key.pairs.iter().map(|pair| (&pair.parent, &pair.parent_type));
        let parents = parents.filter(|_| !own.is_empty());
        let sql = format!(
            "SELECT {} FROM json_to_record($1::text::json) AS t ({}) WHERE {} AND NOT EXISTS (SELECT {}){own}",
            values.join(", "),
            columns(children.chain(parents)),
            key.refers("t"),
            key.parent_of("t")
        );
        match self.session.client.query_opt(&sql, &[&json]).await? {
            Some(row) => Ok(Some((Arc::clone(&of_parent.desc), of_parent.key_image(&row, 0)?))),
            None => Ok(None),
        }
    }
}

/// A row as a JSON object of its values' texts. As texts, since JSON itself has values that `jsonb` refuses and that no function
/// of the server reads back, such as `"\u0000"`. With generated columns, which are not inserted again: a foreign key may hold one.
fn texts(plan: &Plan) -> String {
    let columns = plan.local.columns.iter();
    let (names, values): (Vec<String>, Vec<String>) = columns
        .map(|column| {
            let literal = format!("'{}'", column.name.replace('\'', "''"));
            (literal, format!("t.{}::text", quote(&column.name)))
        })
        .unzip();
    format!(
        "json_object(ARRAY[{}]::text[], ARRAY[{}]::text[])::text",
        names.join(", "),
        values.join(", ")
    )
}

/// Of a row's texts those that a foreign key of its table looks at.
fn referring(key: &ForeignKey, json: &str) -> Option<String> {
    let mut row: BTreeMap<String, Option<String>> = serde_json::from_str(json).ok()?;
    row.retain(|name, _| {
        let mut pairs = key.pairs.iter();
        pairs.any(|pair| [&pair.child, &pair.parent].contains(&name))
    });
    serde_json::to_string(&row).ok()
}
