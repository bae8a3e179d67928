//! Reading one row of one transaction back from the journal: for the conflict log, and for rows that get a version
//! again which had lost.

use std::sync::Arc;

use anabranch_conflict::Version;
use anabranch_proto::Vector;
use anabranch_proto::row::RowImage;
use anabranch_proto::schema::TableDesc;
use anabranch_proto::txn::{Changes, FrameReader, Record, TableCache, TxnHeader};

use super::failure::Failure;
use crate::index::RowKey;
use crate::journal::{self, Journal};
use crate::resolve::Written;

/// The row that `version` wrote at `key`, if the journal still holds its transaction. `None` for a delete, too.
pub(crate) fn row(
    journal: &Journal,
    version: Version,
    table: &TableDesc,
    key: &RowKey,
) -> Result<Option<(Arc<TableDesc>, RowImage)>, Failure> {
    let mut found = None;
    let whole = each_record(journal, version, |changes| {
        each_write(changes, table, key, |of, row| {
            if let Some((row, _)) = row {
                found = Some((Arc::clone(of), row.clone()));
            }
        })
    })?;
    Ok(found.filter(|_| whole.is_some()))
}

/// The header of the transaction of `version`, if the journal still holds it.
pub(crate) fn header(journal: &Journal, version: Version) -> Result<Option<TxnHeader>, Failure> {
    each_record(journal, version, |_| Ok(()))
}

/// Visits the pieces of the transaction of `version`. Gives its header, if the journal holds all of it.
fn each_record(
    journal: &Journal,
    version: Version,
    mut visit: impl FnMut(Changes) -> Result<(), Failure>,
) -> Result<Option<TxnHeader>, Failure> {
    let mut cursor = match journal.cursor_on(version.origin(), version.position) {
        Ok(cursor) => cursor,
        Err(journal::Error::Trimmed { .. }) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let mut cache = TableCache::default();
    while let Some(located) = cursor.try_next()? {
        let mut frame = FrameReader::new(version.origin(), journal::unpack(&located.frame)?, &mut cache)?;
        while let Some(record) = frame.next_record()? {
            match record {
                // Pieces of the transaction, or of an earlier writing of it: the same changes.
                Record::Piece(changes) => visit(changes)?,
                Record::Txn(header, changes) if header.stamp == version.stamp => {
                    visit(changes)?;
                    return Ok(Some(header));
                }
                Record::Txn(header, _) if header.stamp > version.stamp => return Ok(None),
                Record::Txn(..) => {}
            }
        }
    }
    Ok(None)
}

/// What `version` did to `key`, of a table whose columns are merged: it is not stable, so the journal holds it, or will in
/// a moment.
pub(crate) fn written(
    journal: &Journal,
    version: Version,
    table: &TableDesc,
    key: &RowKey,
) -> Result<Written, Failure> {
    let mut all: Option<Written> = None;
    let whole = each_record(journal, version, |changes| {
        each_write(changes, table, key, |of, row| {
            let (row, former) = row.unzip();
            let some = Written::new(of, &Vector::new(), (row, former.flatten()));
            all = Some(match all.take() {
                Some(before) => before.then(some),
                None => some,
            });
        })
    })?;
    match (whole, all) {
        (Some(header), Some(written)) => Ok(Written {
            deps: header.deps,
            ..written
        }),
        _ => Err(Failure::NoImage {
            table: format!("{}.{}", table.schema, table.name),
            stamp: version.stamp,
        }),
    }
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

/// Visits what the changes did to `key`, each: the table, the row and what is known of the former one; no row where it was
/// deleted.
fn each_write(
    mut changes: Changes,
    table: &TableDesc,
    key: &RowKey,
    mut visit: impl FnMut(&Arc<TableDesc>, Option<(&RowImage, Option<&RowImage>)>),
) -> Result<(), Failure> {
    while let Some(change) = changes.next_change()? {
        if !change.tables().iter().any(|of| of.is_of(table)) {
            continue;
        }
        change.each_row(|of, canonical, row| {
            if canonical == key.canonical() {
                visit(of, row);
            }
            Ok::<_, Failure>(())
        })?;
    }
    Ok(())
}
