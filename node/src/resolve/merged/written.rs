//! What one version did to a row: kept in memory, or read back from the journal.

use std::sync::Arc;

use anabranch_conflict::merge::{self, Effect, Field};
use anabranch_proto::Vector;
use anabranch_proto::row::{Cell, RowImage};
use anabranch_proto::schema::TableDesc;
use bytes::Bytes;

use super::columns::aligned;

/// What a version did, in the columns of its table at its origin.
#[derive(Debug, Clone)]
pub(crate) struct Written {
    pub(crate) table: Arc<TableDesc>,
    pub(crate) deps: Vector,
    pub(crate) effect: Effect,
}

impl Written {
    /// Of one change; `former`: the row before, unchanged columns marked.
    pub(crate) fn new(
        table: &Arc<TableDesc>,
        deps: &Vector,
        (row, former): (Option<&RowImage>, Option<&RowImage>),
    ) -> Self {
        let effect = match (row, former) {
            (None, _) => Effect::Delete,
            (Some(row), None) => Effect::Put(fields(row)),
            (Some(row), Some(former)) => {
                let new = fields(row);
                let old = former.cells().zip(&new);
                let old = old.map(|(cell, new)| match cell {
                    Cell::Unchanged => new.clone(),
                    cell => field(former, cell),
                });
                Effect::Change {
                    old: old.collect(),
                    new,
                }
            }
        };
        Self {
            table: Arc::clone(table),
            deps: deps.clone(),
            effect,
        }
    }

    /// This, and then `next` by the same transaction, which may have altered the table between.
    pub(crate) fn then(self, next: Self) -> Self {
        let before = match self.effect {
            Effect::Change { old, new } if !Arc::ptr_eq(&self.table, &next.table) => {
                let here = |row: &merge::Row| aligned(row, &self.table, &next.table);
                let (mut old, new) = (here(&old), here(&new));
                if let Effect::Change { old: between, .. } = &next.effect {
                    // A column that came since: the row had it as it came.
                    let absent = old.iter_mut().zip(between);
                    let absent = absent.filter(|(field, _)| **field == Field::Absent);
                    absent.for_each(|(field, came)| field.clone_from(came));
                }
                Effect::Change { old, new }
            }
            effect => effect,
        };
        Self {
            effect: before.then(next.effect),
            ..next
        }
    }

    /// With values of its own. They are slices of what the stream was read into, a quarter of a megabyte and more, all of which
    /// stays as long as one of them.
    pub(super) fn detached(self) -> Self {
        let effect = match self.effect {
            Effect::Put(row) => Effect::Put(owned(&row)),
            Effect::Replace(row) => Effect::Replace(owned(&row)),
            Effect::Change { old, new } => {
                let mine = owned(&new);
                // A value that did not change is kept once.
                let old = old
                    .iter()
                    .enumerate()
                    .map(|(at, field)| match (new.get(at), mine.get(at)) {
                        (Some(new), Some(mine)) if is_same(field, new) => mine.clone(),
                        _ => owned_field(field),
                    });
                let old = old.collect();
                Effect::Change { old, new: mine }
            }
            Effect::Delete => Effect::Delete,
        };
        Self { effect, ..self }
    }

    pub(super) fn byte_len(&self) -> usize {
        let of = |row: &merge::Row| row.iter().map(|field| 48 + field_len(field)).sum::<usize>();
        160 + match &self.effect {
            Effect::Put(row) | Effect::Replace(row) => of(row),
            Effect::Change { old, new } => of(old) + of(new),
            Effect::Delete => 0,
        }
    }
}

fn owned(row: &merge::Row) -> merge::Row {
    row.iter().map(owned_field).collect()
}

fn owned_field(field: &Field) -> Field {
    match field {
        Field::Text(bytes) => Field::Text(Bytes::copy_from_slice(bytes)),
        Field::Binary(bytes) => Field::Binary(Bytes::copy_from_slice(bytes)),
        field => field.clone(),
    }
}

/// The very same bytes, not only equal ones?
fn is_same(one: &Field, other: &Field) -> bool {
    match (one, other) {
        (Field::Text(one), Field::Text(other)) | (Field::Binary(one), Field::Binary(other)) => {
            one.as_ptr() == other.as_ptr() && one.len() == other.len()
        }
        _ => false,
    }
}

fn field_len(field: &Field) -> usize {
    match field {
        Field::Null | Field::Absent => 0,
        Field::Text(bytes) | Field::Binary(bytes) => bytes.len(),
    }
}

fn field(image: &RowImage, cell: Cell<'_>) -> Field {
    match cell {
        Cell::Null | Cell::Unchanged => Field::Null,
        Cell::Text(value) => Field::Text(image.as_bytes().slice_ref(value)),
        Cell::Binary(value) => Field::Binary(image.as_bytes().slice_ref(value)),
    }
}

fn fields(image: &RowImage) -> merge::Row {
    image.cells().map(|cell| field(image, cell)).collect()
}

/// Of a row that has all columns.
pub(in crate::resolve) fn image(row: &merge::Row) -> RowImage {
    RowImage::build(row.iter().map(|field| match field {
        Field::Null | Field::Absent => Cell::Null,
        Field::Text(value) => Cell::Text(value),
        Field::Binary(value) => Cell::Binary(value),
    }))
}
