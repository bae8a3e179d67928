//! Rows of tables that differ, for a while, in which columns they have, in their order, and in the columns' types.
//!
//! Invariant: a column is of the type that the version with the highest stamp has it of, whatever else is known of the row: so what is a
//!        sum's limit does not depend on what is forgotten

use std::sync::Arc;

use anabranch_conflict::merge::number::{self, Kind};
use anabranch_conflict::merge::{self, Field};
use anabranch_proto::row::RowImage;
use anabranch_proto::schema::{ColumnDesc, TableDesc};

use super::written::image;

fn same_columns(a: &TableDesc, b: &TableDesc) -> bool {
    let is_same = |(a, b): (&ColumnDesc, &ColumnDesc)| a.name == b.name && !are_other_numbers(a, b);
    a.columns.len() == b.columns.len() && a.columns.iter().zip(&b.columns).all(is_same)
}

/// Are they of different types of numbers?
fn are_other_numbers(a: &ColumnDesc, b: &ColumnDesc) -> bool {
    let is_number = |column: &ColumnDesc| Kind::of(column.type_oid, -1).is_some();
    a.type_oid != b.type_oid && is_number(a) && is_number(b)
}

/// A value of a column that had another type once. One that cannot be had in this one stays as it is: nobody adds to it then.
fn resized(field: &Field, from: &ColumnDesc, to: &ColumnDesc) -> Field {
    match field {
        Field::Binary(value) if are_other_numbers(from, to) => {
            let resized = number::resized(value, from.type_oid, to.type_oid);
            resized.map_or_else(|| field.clone(), |resized| Field::Binary(resized.into()))
        }
        _ => field.clone(),
    }
}

/// A folded row, and its columns: without those that it says nothing of.
pub(super) fn without_absent(table: &Arc<TableDesc>, row: &merge::Row) -> (Arc<TableDesc>, Option<RowImage>) {
    if !row.contains(&Field::Absent) {
        return (Arc::clone(table), Some(image(row)));
    }
    let is_there = |at: usize| row.get(at).is_some_and(|field| *field != Field::Absent);
    let before = |at: u16| (0..usize::from(at)).filter(|at| is_there(*at)).count();
    let columns = table.columns.iter().enumerate();
    let columns = columns
        .filter(|(at, _)| is_there(*at))
        .map(|(_, column)| column.clone());
    // Every version has the key's columns.
    let key = table.key.iter().filter_map(|at| u16::try_from(before(*at)).ok());
    let shown = TableDesc {
        columns: columns.collect(),
        key: key.collect(),
        ..TableDesc::clone(table)
    };
    let there: merge::Row = row
        .iter()
        .filter(|field| **field != Field::Absent)
        .cloned()
        .collect();
    (Arc::new(shown), Some(image(&there)))
}

/// A row of `from` in the columns of `to`.
pub(super) fn aligned(row: &merge::Row, from: &Arc<TableDesc>, to: &Arc<TableDesc>) -> merge::Row {
    if Arc::ptr_eq(from, to) || same_columns(from, to) {
        return row.clone();
    }
    let value = |column: &ColumnDesc| {
        let mut all = from.columns.iter().zip(row);
        let (was, field) = all.find(|(was, _)| was.name == column.name)?;
        Some(resized(field, was, column))
    };
    let columns = to.columns.iter();
    columns
        .map(|column| value(column).unwrap_or(Field::Absent))
        .collect()
}

/// A description with the columns of all, each of the type that the last one has which has it: nodes may differ for a while in which
/// they have, in their order, and in their types.
pub(super) fn in_common<'a>(tables: impl Iterator<Item = &'a Arc<TableDesc>>) -> Option<Arc<TableDesc>> {
    let mut all: Option<Arc<TableDesc>> = None;
    for table in tables {
        let Some(known) = &all else {
            all = Some(Arc::clone(table));
            continue;
        };
        if Arc::ptr_eq(known, table) || table.columns.iter().all(|column| says(known, column)) {
            continue;
        }
        let mut wider = TableDesc::clone(known);
        for column in &table.columns {
            let mut columns = wider.columns.iter_mut();
            match columns.find(|known| known.name == column.name) {
                Some(known) if is_same_type(known, column) => {}
                Some(known) => known.clone_from(column),
                None => wider.columns.push(column.clone()),
            }
        }
        all = Some(Arc::new(wider));
    }
    all
}

/// Has the table this column, of this type?
fn says(table: &TableDesc, column: &ColumnDesc) -> bool {
    let mut columns = table.columns.iter();
    let known = columns.find(|known| known.name == column.name);
    known.is_some_and(|known| is_same_type(known, column))
}

/// By their names, which are the same everywhere.
fn is_same_type(a: &ColumnDesc, b: &ColumnDesc) -> bool {
    a.type_mod == b.type_mod && a.type_name == b.type_name
}
