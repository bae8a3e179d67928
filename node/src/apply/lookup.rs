//! Reading one row of one transaction back from the journal: for the conflict log, and for rows that get a version
//! again which had lost.

use std::sync::Arc;

use anabranch_conflict::Version;
use anabranch_proto::row::RowImage;
use anabranch_proto::schema::TableDesc;
use anabranch_proto::txn::{Change, Changes, FrameReader, Record, TableCache};
use anabranch_proto::{Lsn, Position};

use super::failure::Failure;
use crate::index::RowKey;
use crate::journal::{self, Journal};

/// The row that `version` wrote at `key`, if the journal still holds its transaction. `None` for a delete, too.
pub(crate) fn row(
    journal: &Journal,
    version: Version,
    table: &TableDesc,
    key: &RowKey,
) -> Result<Option<(Arc<TableDesc>, RowImage)>, Failure> {
    let before = Position {
        lsn: Lsn(version.position.lsn.0.saturating_sub(1)),
        ..version.position
    };
    let mut cursor = match journal.cursor(version.origin(), before) {
        Ok(cursor) => cursor,
        Err(journal::Error::Trimmed { .. }) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let mut cache = TableCache::default();
    let mut found = None;
    while let Some(located) = cursor.try_next()? {
        let mut frame = FrameReader::new(version.origin(), journal::unpack(&located.frame)?, &mut cache)?;
        while let Some(record) = frame.next_record()? {
            match record {
                // Pieces of the transaction, or of an earlier writing of it: the same changes.
                Record::Piece(changes) => found = last_put(changes, table, key)?.or(found),
                Record::Txn(header, changes) if header.stamp == version.stamp => {
                    return Ok(last_put(changes, table, key)?.or(found));
                }
                Record::Txn(header, _) if header.stamp > version.stamp => return Ok(None),
                Record::Txn(..) => {}
            }
        }
    }
    Ok(None)
}

/// As [`row`], of a put that must be there: it is not stable, so the journal holds it, or will in a moment.
pub(crate) fn must(
    journal: &Journal,
    version: Version,
    table: &TableDesc,
    key: &RowKey,
) -> Result<(Arc<TableDesc>, RowImage), Failure> {
    row(journal, version, table, key)?.ok_or_else(|| Failure::NoImage {
        table: format!("{}.{}", table.schema, table.name),
        stamp: version.stamp,
    })
}

fn last_put(
    mut changes: Changes,
    table: &TableDesc,
    key: &RowKey,
) -> Result<Option<(Arc<TableDesc>, RowImage)>, Failure> {
    let mut found = None;
    let mut canonical = Vec::new();
    while let Some(change) = changes.next_change()? {
        if let Change::Put { table: of, row, .. } = change
            && of.name == table.name
            && of.schema == table.schema
        {
            canonical.clear();
            of.canonical_key(&row, &mut canonical)?;
            if canonical == key.canonical() {
                found = Some((of, row));
            }
        }
    }
    Ok(found)
}
