//! A frame of the journal with the rows it writes, found by their keys.

use std::sync::Arc;

use anabranch_conflict::Op;
use anabranch_proto::row::RowImage;
use anabranch_proto::schema::TableDesc;
use anabranch_proto::txn::{Change, Changes, FrameReader, PutOp, Record, TableCache, TxnHeader};
use anabranch_proto::wire::Malformed;
use anabranch_proto::{NodeId, Position, Stamp};
use bytes::Bytes;
use uuid::Uuid;
use xxhash_rust::xxh3::Xxh3;

use super::super::ddl::is_ddl;
use crate::membership::binary;

/// What one change did to one row.
#[derive(Debug)]
pub(super) struct Row {
    pub(super) table: Arc<TableDesc>,
    /// The row, where there is one afterwards.
    pub(super) image: Option<RowImage>,
    /// What is known of the row before (see [`anabranch_proto::txn::Change::Put`]).
    pub(super) former: Option<RowImage>,
    /// What was said at the origin.
    pub(super) op: Op,
    canonical: Box<[u8]>,
    hash: u64,
    /// The transaction's number in the frame; `None` in an earlier piece of a large one.
    txn: Option<usize>,
}

/// A decoded frame.
#[derive(Debug)]
pub(super) struct Frame {
    txns: Vec<TxnHeader>,
    /// By hash, and in the order of the changes where that is the same.
    rows: Vec<Row>,
}

impl Frame {
    pub(super) fn read(origin: NodeId, payload: Bytes, tables: &mut TableCache) -> Result<Self, Malformed> {
        let mut reader = FrameReader::new(origin, payload, tables)?;
        let (mut txns, mut rows) = (Vec::new(), Vec::new());
        while let Some(record) = reader.next_record()? {
            match record {
                Record::Piece(changes) => read_rows(changes, None, &mut rows)?,
                Record::Txn(header, changes) => {
                    read_rows(changes, Some(txns.len()), &mut rows)?;
                    txns.push(header);
                }
            }
        }
        rows.sort_by_key(|row| row.hash);
        Ok(Self { txns, rows })
    }

    /// The transaction of a stamp: its number in the frame, and its header.
    pub(super) fn txn(&self, stamp: Stamp) -> Option<(usize, &TxnHeader)> {
        self.txns
            .iter()
            .enumerate()
            .find(|(_, header)| header.stamp == stamp)
    }

    /// What was done to one row by a transaction, and by pieces, in order.
    pub(super) fn rows_of(
        &self,
        hash: u64,
        table: &TableDesc,
        canonical: &[u8],
        txn: Option<usize>,
    ) -> impl Iterator<Item = &Row> {
        let from = self.rows.partition_point(|row| row.hash < hash);
        let rows = self.rows.get(from..).unwrap_or_default();
        rows.iter()
            .take_while(move |row| row.hash == hash)
            .filter(move |row| row.txn.is_none() || row.txn == txn)
            .filter(move |row| *row.canonical == *canonical && row.table.is_of(table))
    }

    /// Is the row of the DDL `id` in it? Then where its transaction ended, if that is in it, too.
    pub(super) fn ddl(&self, id: Uuid) -> Option<Option<Position>> {
        let is_it = |row: &&Row| {
            is_ddl(&row.table)
                && row
                    .image
                    .as_ref()
                    .is_some_and(|image| binary(&row.table, image, "id").is_ok_and(|of| of == id.as_bytes()))
        };
        let row = self.rows.iter().find(is_it)?;
        let txn = row.txn.and_then(|at| self.txns.get(at));
        Some(txn.map(|header| header.position))
    }

    /// The hashes of all its rows, ascending, each once.
    pub(super) fn hashes(&self) -> Box<[u64]> {
        let mut hashes: Vec<u64> = self.rows.iter().map(|row| row.hash).collect();
        hashes.dedup();
        hashes.into()
    }

    /// The description of each row's table.
    pub(super) fn tables(&self) -> impl Iterator<Item = &Arc<TableDesc>> {
        self.rows.iter().map(|row| &row.table)
    }

    /// About how much memory it needs beside its payload, bytes.
    pub(super) fn overhead(&self) -> usize {
        self.rows
            .iter()
            .map(|row| size_of::<Row>() + row.canonical.len() + 16)
            .sum()
    }
}

fn read_rows(mut changes: Changes, txn: Option<usize>, rows: &mut Vec<Row>) -> Result<(), Malformed> {
    while let Some(change) = changes.next_change()? {
        let put = match &change {
            Change::Put { old_key: Some(_), .. } => Op::Move,
            Change::Put {
                op: PutOp::Insert, ..
            } => Op::Insert,
            _ => Op::Update,
        };
        change.each_row(|table, canonical, row| {
            rows.push(Row {
                table: Arc::clone(table),
                image: row.map(|(image, _)| image.clone()),
                former: row.and_then(|(_, former)| former.cloned()),
                op: if row.is_some() { put } else { Op::Delete },
                canonical: canonical.into(),
                hash: hash(table, canonical),
                txn,
            });
            Ok::<_, Malformed>(())
        })?;
    }
    Ok(())
}

/// Of a row's table, by its name, and key.
pub(super) fn hash(table: &TableDesc, canonical: &[u8]) -> u64 {
    let mut hash = Xxh3::new();
    hash.update(table.schema.as_bytes());
    hash.update(&[0]);
    hash.update(table.name.as_bytes());
    hash.update(&[0]);
    hash.update(canonical);
    hash.digest()
}
