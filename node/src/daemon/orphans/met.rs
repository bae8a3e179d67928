//! Have all members met what a row without its parent is by now?
//!
//! In:   such a row, the index, and what every member is known to have applied        Out: may it be mended?
//! Holds: tables as they are read, for some lines; while anything is open, how far all streams were when rows were first seen without their
//!        parents, of foreign keys of which the index does not tell what took these
//! Invariants: what is asked about stays until the transaction ends: an orphan is locked, and what is none is not mended in it
//! On crash: waits a little longer
//! Not here: the sides of the row's line ([`super::are_met`])
//!
//! A row may have been written again since its line was, by somebody who knew that it has no parent, or was brought it back, and may
//! have lost it once more. It has no other line then, or one whose writer is another node. A node that met what it is by now, or the later
//! removal, together with the row's deletion would have neither row nor line.
//! By a foreign key to a unique key beside the primary one nobody knows which row the parent was: it was gone when the row was first seen here
//! without one, so what was applied by then has what took it. Of a parent that comes back and goes once more between two looks, though, nothing is known.
//! No fence: who applied what made the row an orphan has waited for the decoder, and what sessions have written of it since has its line.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use anabranch_conflict::Version;
use anabranch_conflict::orphan::Parent;
use anabranch_proto::{Lsn, NodeId, Vector};
use tokio_postgres::{Client, Row, Transaction};

use super::turn::{APPLIED, places};
use super::{Line, are_met, orphan};
use crate::apply::catalog;
use crate::apply::foreign::{ForeignKey, TableName};
use crate::resolve;
use crate::review::Error;
use crate::setup::sql::qualified;
use crate::shared::{Shared, lock};
use crate::verify::table::{self, Compared};

/// Tables as they are read; none of one that is not replicated.
pub(super) type Tables = HashMap<TableName, Option<Arc<Compared>>>;

/// By lines: the parents that their rows name, and how far all streams were when they were first seen without these.
pub(super) type Seen = HashMap<String, (String, Vec<(NodeId, Lsn)>)>;

/// What the members are known to have met.
pub(super) struct Met<'a> {
    pub(super) shared: &'a Shared,
    /// What every member is known to have applied.
    pub(super) stable: &'a Vector,
    /// How far each member's stream is here.
    pub(super) reached: &'a Vector,
    /// Members that are not dropped.
    pub(super) live: &'a BTreeSet<NodeId>,
    pub(super) tables: &'a mut Tables,
    pub(super) seen: &'a mut Seen,
}

/// What a line's row is found to be.
pub(super) enum Looked {
    /// It has a parent, or is gone. It is not locked: a later statement may see it without one, by a removal that not all have met.
    Kept,
    /// Not all are known to have met what it is by now, or what took its parent.
    Unmet,
    /// All have; it is locked. Or nobody knows which row it is, or it is not replicated.
    Met,
}

impl Met<'_> {
    /// Have all met the version that a line's row has, and what took its parent, or is it no orphan any more?
    pub(super) async fn look(
        &mut self,
        transaction: &Transaction<'_>,
        line: &Line,
        key: &ForeignKey,
    ) -> Result<Looked, Error> {
        let Some(orphan) = orphan(transaction, line, key).await? else {
            return Ok(Looked::Met);
        };
        let name = (line.schema.clone(), line.table.clone());
        let Some(child) = self.table(transaction.client(), &name).await? else {
            return Ok(Looked::Met);
        };
        let parent = match key.parents.first().filter(|_| key.to_primary) {
            Some(parent) => self.table(transaction.client(), parent).await?,
            None => None,
        };
        let mut columns = vec![child.images(child.desc.key_columns())];
        let refers: Vec<String> = key.values_of("t").collect();
        match parent.is_some() {
            true => columns.extend(refers),
            false => columns.push(format!("ROW({})::text", refers.join(", "))),
        }
        let sql = format!(
            "SELECT {} FROM ONLY {} AS t WHERE {orphan} FOR UPDATE OF t",
            columns.join(", "),
            qualified(&line.schema, &line.table)
        );
        let Some(row) = transaction.query_opt(&sql, &[&line.key]).await? else {
            self.seen.remove(&line.id);
            return Ok(Looked::Kept);
        };
        // What took a parent that is not in the index is in what was applied here before it was looked at.
        let is_gone_everywhere = match &parent {
            Some(_) => true,
            None => {
                let refers = row.try_get(child.desc.key.len())?;
                self.was_seen_by_all(transaction, line, refers).await?
            }
        };
        let has_met = self.has_met(&row, key, &child, parent.as_deref())?;
        Ok(match has_met && is_gone_everywhere {
            true => Looked::Met,
            false => Looked::Unmet,
        })
    }

    /// Have all met what was applied here when a line's row, which is locked, was first seen without the parent that it `refers` to?
    async fn was_seen_by_all(
        &mut self,
        transaction: &Transaction<'_>,
        line: &Line,
        refers: String,
    ) -> Result<bool, Error> {
        if let Some((before, seen)) = self.seen.get(&line.id)
            && *before == refers
        {
            return Ok(are_met(seen, self.stable, self.reached));
        }
        let sql = format!("{APPLIED} FROM anabranch.progress");
        let row = transaction.query_one(&sql, &[]).await?;
        let seen = places(&row, self.shared.node, self.live)?;
        let is_met = are_met(&seen, self.stable, self.reached);
        self.seen.insert(line.id.clone(), (refers, seen));
        Ok(is_met)
    }

    /// Of a row's key, and the values by which it refers where its parents' table is known.
    fn has_met(
        &self,
        row: &Row,
        key: &ForeignKey,
        child: &Compared,
        parent: Option<&Compared>,
    ) -> Result<bool, Error> {
        let unknown = |error: resolve::Error| Error::Refused(error.to_string());
        let image = child.key_image(row, 0)?;
        let of_parent = match parent {
            Some(parent) => Some((parent, parent.key_image(row, child.desc.key.len())?)),
            None => None,
        };
        let mut resolver = lock(&self.shared.resolver);
        let row = resolver.key_of_image(&child.desc, &image).map_err(unknown)?;
        let version = resolver.current(&row).map_err(unknown)?;
        let removed = match &of_parent {
            Some((parent, image)) => key
                .parent_now(&mut resolver, &parent.desc, image)
                .map_err(unknown)?,
            None => Parent::Unknown,
        };
        drop(resolver);
        let is_met = |version: Version| version.covered_by(self.stable);
        Ok(version.is_none_or(|entry| is_met(entry.version))
            && match removed {
                Parent::Deleted(version) | Parent::Parked(version) => is_met(version),
                // What is forgotten all have met; what the index never tells is asked for otherwise.
                Parent::Unknown => true,
            })
    }

    async fn table(&mut self, client: &Client, name: &TableName) -> Result<Option<Arc<Compared>>, Error> {
        if let Some(table) = self.tables.get(name) {
            return Ok(table.clone());
        }
        let table = match Compared::load(client, &name.0, &name.1).await {
            Ok(table) => Some(Arc::new(table)),
            Err(table::Error::Catalog(catalog::Error::Sql(error))) => return Err(error.into()),
            // Without a key it is not replicated.
            Err(_) => None,
        };
        self.tables.insert(name.clone(), table.clone());
        Ok(table)
    }
}
