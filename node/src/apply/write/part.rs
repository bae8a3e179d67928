//! Statements over the rows of one table: which rows each writes, and its parameters.
//!
//! In:   actions            Out: statements in their order, parameters as binary images
//! Must never: talk to the server

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use bytes::Bytes;
use tokio_postgres::types::ToSql;

use super::super::batch::{Action, Write};
use super::super::failure::Failure;
use super::super::plan::{Plan, RowArray, Source, xid_array};
use super::super::session::Raw;
use crate::broken::{self, Rule};
use crate::index::TableId;

/// A table, and its rows by description: origins describe one table each for itself.
type Described<'b> = (TableId, BTreeMap<usize, Vec<&'b Action>>);

/// By table and description. Tables in the order in which they were first written: that is how applications take their locks, at this node as
/// well, and one that takes them the other way round would be in a deadlock with whoever is at it, try after try, for as long as there is load.
/// Keys sorted within a description, as careful users do.
pub(in crate::apply) fn by_table(actions: &[Action]) -> Vec<Described<'_>> {
    let mut tables: Vec<Described<'_>> = Vec::new();
    let mut places: HashMap<TableId, usize> = HashMap::new();
    // Mostly all are of one table and description: one look for a run of such, and not two a row.
    let is_run = |a: &Action, b: &Action| Arc::ptr_eq(&a.table, &b.table) && a.key.table() == b.key.table();
    for run in actions.chunk_by(is_run) {
        let Some(first) = run.first() else { continue };
        let id = first.key.table();
        let place = *places.entry(id).or_insert(tables.len());
        if place == tables.len() {
            tables.push((id, BTreeMap::new()));
        }
        if let Some((_, described)) = tables.get_mut(place) {
            described
                .entry(Arc::as_ptr(&first.table) as usize)
                .or_default()
                .extend(run.iter());
        }
    }
    for actions in tables
        .iter_mut()
        .flat_map(|(_, described)| described.values_mut())
    {
        actions.sort_by(|a, b| a.key.cmp(&b.key));
    }
    tables
}

/// What the rows of one statement have in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::apply) enum PartKind {
    /// Deletes of rows that should not be there.
    Absent,
    Deletes,
    Updates,
    Inserts,
}

/// Rows of one table that one statement writes as they are expected to be found.
pub(in crate::apply) struct Part<'p, 'b> {
    pub(in crate::apply) kind: PartKind,
    pub(in crate::apply) sql: &'p str,
    pub(in crate::apply) guarded: bool,
    pub(in crate::apply) actions: Vec<&'b Action>,
}

/// Rows of one table that statements did not write.
#[derive(Default)]
pub(in crate::apply) struct Missed<'b> {
    /// All of those statements: which rows they missed is not known.
    pub(in crate::apply) again: Vec<&'b Action>,
    /// How many rows were not deleted.
    pub(in crate::apply) undeleted: u64,
}

impl<'b> Missed<'b> {
    /// A statement over `actions` wrote so many rows.
    pub(in crate::apply) fn note(&mut self, kind: PartKind, actions: &[&'b Action], written: u64) {
        let missed = (actions.len() as u64).saturating_sub(written);
        // Where nothing should be there, a local insert that is not decoded yet is the decoder's to find.
        if missed == 0 || kind == PartKind::Absent {
            return;
        }
        self.again.extend(actions.iter().copied());
        if kind == PartKind::Deletes {
            self.undeleted = missed;
        }
    }
}

/// The statements for rows of one table, in their order: what goes makes room.
pub(in crate::apply) fn parts<'p, 'b>(plan: &'p Plan, actions: &[&'b Action]) -> Vec<Part<'p, 'b>> {
    let (mut absent, mut deletes, mut updates, mut inserts) =
        (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for &action in actions {
        match (&action.write, action.expect.present) {
            (Write::Delete(_), Some(false)) => absent.push(action),
            (Write::Delete(_), _) => deletes.push(action),
            (Write::Put(_), Some(false)) => inserts.push(action),
            (Write::Put(_), _) => updates.push(action),
        }
    }
    let (delete, update, guarded) = if broken::is(Rule::Guard) {
        (&plan.delete_unguarded, &plan.update_unguarded, false)
    } else {
        (&plan.delete, &plan.update, true)
    };
    [
        (PartKind::Absent, &plan.delete, true, absent),
        (PartKind::Deletes, delete, guarded, deletes),
        (PartKind::Updates, update, guarded, updates),
        (PartKind::Inserts, &plan.insert, false, inserts),
    ]
    .into_iter()
    .filter(|part| !part.3.is_empty())
    .map(|(kind, sql, guarded, actions)| Part {
        kind,
        sql,
        guarded,
        actions,
    })
    .collect()
}

/// The parameters of a statement over `actions`; with the horizon of the guard, if it has one.
pub(in crate::apply) fn arguments(
    plan: &Plan,
    actions: &[&Action],
    guard: Option<Option<u32>>,
) -> Result<Vec<Parameter>, Failure> {
    let mut rows = plan.rows();
    for action in actions {
        push(&mut rows, &action.write)?;
    }
    let (array, text) = rows.finish();
    let guard = guard.map(|horizon| {
        let xids = xid_array(actions.iter().map(|action| action.expect.xid));
        // Without a horizon the comparison is NULL, so nothing passes but the expected xid.
        (xids, horizon.map(i64::from))
    });
    Ok(parameters(array, guard, text))
}

pub(crate) fn push(rows: &mut RowArray<'_>, write: &Write) -> Result<(), Failure> {
    match write {
        Write::Put(row) => rows.push(&Source::Row(row))?,
        Write::Delete(key) => rows.push(&Source::Key(key))?,
    }
    Ok(())
}

/// One parameter of a statement.
pub(crate) enum Parameter {
    Image(Raw),
    Number(Option<i64>),
}

pub(crate) fn parameters(
    array: Bytes,
    guard: Option<(Bytes, Option<i64>)>,
    text: Vec<Bytes>,
) -> Vec<Parameter> {
    let mut params = vec![Parameter::Image(Raw(array))];
    if let Some((xids, horizon)) = guard {
        params.push(Parameter::Image(Raw(xids)));
        params.push(Parameter::Number(horizon));
    }
    params.extend(text.into_iter().map(|image| Parameter::Image(Raw(image))));
    params
}

pub(crate) fn references(params: &[Parameter]) -> Vec<&(dyn ToSql + Sync)> {
    params
        .iter()
        .map(|parameter| match parameter {
            Parameter::Image(raw) => raw as &(dyn ToSql + Sync),
            Parameter::Number(number) => number as &(dyn ToSql + Sync),
        })
        .collect()
}
