//! Rows that are not as the stream says: the nodes held different rows before the write came.
//!
//! In:   rows that a statement did not write, locked and with the decoder past the lock      Out: an alarm, a counter
//! Must never: stop or change what is written; the row becomes the incoming one, which covers all that is known of it
//!
//! A row without an entry in the index was last written by something stable (`docs/design.md`, section 5), so an
//! incoming UPDATE or DELETE must find it, and an incoming INSERT must not. Where that is not so, nobody's conflict is
//! to be logged: no write lost, but somebody wrote past the replication, or restored rows, or we are wrong. The row that an INSERT
//! overwrites has a line all the same, if it was another one: it is nowhere else.
//! What is known to be missing or too many for another reason is no drift: rows in quarantine, rows that a local
//! transaction is racing for, batches that run with savepoints, tables where a secondary unique key takes rows away, and those whose policy puts former versions back.

use anabranch_proto::row::{Cell, RowImage};
use anabranch_proto::schema::full_name;
use serde_json::{Value, json};

use super::batch::{Action, Write};
use super::loss::Loss;
use super::plan::Plan;
use super::write::Standing;
use crate::heal::Record;
use crate::resolve::Resolver;
use crate::shared::{Counters, Shared, lock};

/// How a row was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Drift {
    UpdateFoundNone,
    DeleteFoundNone,
    InsertFoundOne,
}

impl Drift {
    const fn text(self) -> &'static str {
        match self {
            Self::UpdateFoundNone => "an UPDATE found no row, which was inserted",
            Self::DeleteFoundNone => "a DELETE found no row",
            Self::InsertFoundOne => "an INSERT found a row, which was overwritten",
        }
    }
}

/// Compares what `action` expects with what stands.
fn judge(action: &Action, standing: Option<&Standing>) -> Option<Drift> {
    match (&action.write, action.expect.present, standing) {
        (Write::Put(_), Some(true), None) => Some(Drift::UpdateFoundNone),
        (Write::Put(_), Some(false), Some(_)) => Some(Drift::InsertFoundOne),
        (Write::Delete(_), Some(true), None) => Some(Drift::DeleteFoundNone),
        _ => None,
    }
}

/// Rows of such a table are here and not there until all are brought.
fn is_being_added(action: &Action, shared: &Shared) -> bool {
    let adding = lock(&shared.adding);
    !adding.is_empty() && adding.contains_key(&(action.table.schema.clone(), action.table.name.clone()))
}

/// While a heal is not finished a missing row is one that was deleted here unheard of: the record of the heal says that
/// it is back.
fn is_told(action: &Action, shared: &Shared) -> bool {
    let mut record = lock(&shared.heal_record);
    // It may have been finished beside this daemon.
    if !record.as_ref().is_some_and(Record::is_open) {
        *record = None;
    }
    let Some(record) = record.as_mut() else {
        return false;
    };
    let key = match &action.write {
        Write::Put(row) => action.table.key_image(row).ok(),
        Write::Delete(key) => Some(key.clone()),
    };
    let columns = action.table.key_columns();
    let key = key.iter().flat_map(RowImage::cells).zip(columns);
    let key: serde_json::Map<String, Value> = key
        .map(|(cell, column)| (column.name.clone(), value(cell, column.type_oid)))
        .collect();
    let line = json!({
        "did": crate::heal::CAME_BACK,
        "table": format!("{}.{}", action.table.schema, action.table.name),
        "key": key,
        "by_node": action.version.origin().0,
        "stamp": action.version.stamp.to_string(),
    });
    record.add(&[line]).is_ok()
}

/// A key's value for people: numbers and texts as they are, others in hexadecimal.
fn value(cell: Cell<'_>, type_oid: u32) -> Value {
    const INT8: u32 = 20;
    const INT2: u32 = 21;
    const INT4: u32 = 23;
    const TEXTS: [u32; 3] = [25, 1042, 1043];
    match cell {
        Cell::Null | Cell::Unchanged => Value::Null,
        Cell::Text(text) => String::from_utf8_lossy(text).into(),
        Cell::Binary(bytes) => match (type_oid, bytes) {
            (INT2, &[a, b]) => i16::from_be_bytes([a, b]).into(),
            (INT4, &[a, b, c, d]) => i32::from_be_bytes([a, b, c, d]).into(),
            (INT8, bytes) => {
                <[u8; 8]>::try_from(bytes).map_or(Value::Null, |all| i64::from_be_bytes(all).into())
            }
            (oid, text) if TEXTS.contains(&oid) => String::from_utf8_lossy(text).into(),
            (_, bytes) => hex::encode(bytes).into(),
        },
    }
}

/// The line of a row that nobody's write made and that `action`, an INSERT, overwrites; where one stands of which nothing is known.
pub(super) fn unheard(action: &Action, standing: Option<&Standing>, resolver: &mut Resolver) -> Option<Loss> {
    if judge(action, standing) != Some(Drift::InsertFoundOne)
        || resolver.quarantined().contains_key(&action.key)
        || !resolver.is_alone(&action.key)
    {
        return None;
    }
    match (&action.write, standing) {
        (Write::Put(row), Some(_)) => Some(Loss::unheard(action, row)),
        _ => None,
    }
}

/// Is nothing known for which the row may be other than expected?
pub(super) fn is_unheard_of(action: &Action, resolver: &mut Resolver) -> bool {
    !resolver.quarantined().contains_key(&action.key) && !resolver.is_raced_for(&action.key)
}

/// A row that had drifted. It counts once its apply transaction has committed: what is tried again is found again.
#[derive(Debug)]
pub(crate) struct Drifted {
    schema: String,
    table: String,
    drift: Drift,
}

/// Looks at a row that a statement did not write, and says when it drifted.
pub(super) fn look(
    plan: &Plan,
    action: &Action,
    standing: Option<&Standing>,
    resolver: &mut Resolver,
    shared: &Shared,
) -> Option<Drifted> {
    let drift = judge(action, standing)?;
    if !plan.local.unique.is_empty() || !is_unheard_of(action, resolver) || is_being_added(action, shared) {
        return None;
    }
    if drift == Drift::UpdateFoundNone && is_told(action, shared) {
        return None;
    }
    Some(Drifted {
        schema: action.table.schema.clone(),
        table: action.table.name.clone(),
        drift,
    })
}

/// After the commit of the transaction in which they were found: counter and alarm.
pub(super) fn tell(found: &[Drifted], shared: &Shared) {
    let Some(Drifted { schema, table, drift }) = found.last() else {
        return;
    };
    let drifted_rows = &shared.lasting.drifted_rows;
    Counters::add(drifted_rows, found.len() as u64);
    let table = full_name(schema, table);
    let text = format!(
        "rows were not as the stream says, so nodes held different ones: in {table} {}; {} row(s) since the start. Compare the \
         nodes (anabranch verify {table}), and find out who writes past the replication",
        drift.text(),
        drifted_rows.load(std::sync::atomic::Ordering::Relaxed),
    );
    shared.lasting.alarms.raise("drift", text);
}
