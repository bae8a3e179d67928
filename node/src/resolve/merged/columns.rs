//! Rows of tables that differ, for a while, in which columns they have and in their order.

use std::sync::Arc;

use anabranch_conflict::merge::{self, Field};
use anabranch_proto::row::RowImage;
use anabranch_proto::schema::TableDesc;

use super::written::image;

fn same_columns(a: &TableDesc, b: &TableDesc) -> bool {
    a.columns.len() == b.columns.len() && a.columns.iter().zip(&b.columns).all(|(a, b)| a.name == b.name)
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
    let value = |name: &str| {
        let at = from.columns.iter().position(|column| column.name == name)?;
        row.get(at).cloned()
    };
    let columns = to.columns.iter();
    columns
        .map(|column| value(&column.name).unwrap_or(Field::Absent))
        .collect()
}

/// A description with the columns of all: nodes may differ for a while in which they have, and in their order.
pub(super) fn in_common<'a>(tables: impl Iterator<Item = &'a Arc<TableDesc>>) -> Option<Arc<TableDesc>> {
    let mut all: Option<Arc<TableDesc>> = None;
    for table in tables {
        let Some(known) = &all else {
            all = Some(Arc::clone(table));
            continue;
        };
        let is_new = |name: &str| known.columns.iter().all(|column| column.name != name);
        let more: Vec<_> = table
            .columns
            .iter()
            .filter(|column| is_new(&column.name))
            .cloned()
            .collect();
        if !more.is_empty() {
            let mut wider = TableDesc::clone(known);
            wider.columns.extend(more);
            all = Some(Arc::new(wider));
        }
    }
    all
}
