//! Transactions, and the frame payload that carries them on disk and on the wire.
//!
//! A payload stands alone: it begins with the tables it speaks of.
//!
//! ```text
//! payload := version u8 (1) | table_count u16 | table* | record*
//! table   := len u32 | bytes (TableDesc)
//! record  := 'T' header change_bytes_len u32 change*        a transaction, or the last piece of a large one
//!          | 'W' header change_bytes_len u32 change*        the same with a wide header: it depends on more than 255 nodes
//!          | 'C'        change_bytes_len u32 change*        an earlier piece of a large transaction
//! header  := epoch u32 | lsn u64 | time u64 | xid u32 | commit_us i64 | witness_us i64 | change_count u64
//!          | dep_count u8 (wide: u32) | (node u16 | epoch u32 | lsn u64)*
//! change  := 'I' table u16 len u32 row                      insert
//!          | 'U' table u16 len u32 row                      update, same key
//!          | 'V' table u16 len u32 former len u32 row       update, same key, of a table whose columns are merged
//!          | 'M' table u16 len u32 old_key len u32 row      update that moved the row to another key
//!          | 'D' table u16 len u32 key                      delete
//!          | 'X' flags u8 count u16 (table u16)*            truncate; flags 1 = cascade, 2 = restart identity
//! ```

use std::collections::HashMap;
use std::sync::Arc;

use bytes::{Buf, Bytes};
use uhlc::NTP64;

use crate::ids::{Lsn, NodeId, Position};
use crate::row::RowImage;
use crate::schema::TableDesc;
use crate::stamp::Stamp;
use crate::vector::Vector;
use crate::wire::{Malformed, Reader, put_bytes, split, split_bytes};

const VERSION: u8 = 1;

/// What a put did at its origin.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PutOp {
    /// INSERT or COPY.
    Insert,
    /// UPDATE.
    Update,
    /// What the row is, written again: whether it was there before is not known. A daemon that does not know of it refuses
    /// the frame.
    State,
}

/// One change of one transaction.
#[derive(Debug, Clone)]
pub enum Change {
    /// A row got a new image.
    Put {
        /// The row's table.
        table: Arc<TableDesc>,
        /// INSERT or UPDATE.
        op: PutOp,
        /// The whole new row.
        row: RowImage,
        /// The key that the row had before, when the update moved it (see [`TableDesc::key_image`]).
        old_key: Option<RowImage>,
        /// Where columns are merged: the row before an update that did not move it, its unchanged columns as
        /// [`Cell::Unchanged`](crate::row::Cell::Unchanged). A daemon that does not know of it refuses the frame; but
        /// such a daemon knows no policy that asks for it either, and its peers refuse it for that.
        former: Option<RowImage>,
    },
    /// A row is gone.
    Delete {
        /// The row's table.
        table: Arc<TableDesc>,
        /// Its key (see [`TableDesc::key_image`]).
        key: RowImage,
    },
    /// Tables were emptied.
    Truncate {
        /// All tables that the statement emptied, those reached by CASCADE among them.
        tables: Vec<Arc<TableDesc>>,
        /// The statement said CASCADE.
        cascade: bool,
        /// The statement said RESTART IDENTITY.
        restart_identity: bool,
    },
}

impl Change {
    /// The tables that it is of.
    #[must_use]
    pub fn tables(&self) -> &[Arc<TableDesc>] {
        match self {
            Self::Put { table, .. } | Self::Delete { table, .. } => std::slice::from_ref(table),
            Self::Truncate { tables, .. } => tables,
        }
    }

    /// Calls `visit` for each row that it writes: the table, the row's canonical key, and the row with what is known of
    /// the former one ([`Self::Put`]), or nothing where there is no row any more. A truncate writes none.
    ///
    /// # Errors
    /// When a key column has no value, and what `visit` returns.
    pub fn each_row<E: From<Malformed>>(
        &self,
        mut visit: impl FnMut(&Arc<TableDesc>, &[u8], Option<(&RowImage, Option<&RowImage>)>) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut key = Vec::new();
        match self {
            Self::Put {
                table,
                row,
                old_key,
                former,
                ..
            } => {
                if let Some(old_key) = old_key {
                    table.canonical_key_of_image(old_key, &mut key)?;
                    visit(table, &key, None)?;
                    key.clear();
                }
                table.canonical_key(row, &mut key)?;
                visit(table, &key, Some((row, former.as_ref())))
            }
            Self::Delete { table, key: gone } => {
                table.canonical_key_of_image(gone, &mut key)?;
                visit(table, &key, None)
            }
            Self::Truncate { .. } => Ok(()),
        }
    }
}

/// What a transaction says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TxnHeader {
    /// Where it stands in its origin's stream.
    pub position: Position,
    /// Its stamp; `stamp.node` is the origin.
    pub stamp: Stamp,
    /// Everything it could have read.
    pub deps: Vector,
    /// The origin's top-level transaction id, 32 bits.
    pub xid: u32,
    /// The origin's commit timestamp, microseconds since the Unix epoch.
    pub commit_us: i64,
    /// The origin's last clock witness before the commit, microseconds since the Unix epoch, 0 for none. With
    /// it a header holds the whole state of the origin's fold, so every own frame is a checkpoint.
    pub witness_us: i64,
    /// All changes, those of earlier pieces included.
    pub change_count: u64,
}

impl TxnHeader {
    /// The node that committed it.
    #[must_use]
    pub const fn origin(&self) -> NodeId {
        self.stamp.node
    }
}

/// Encodes changes of one transaction or piece.
#[derive(Debug, Default)]
pub struct ChangeBuffer {
    tables: Vec<Arc<TableDesc>>,
    bytes: Vec<u8>,
    count: u64,
}

impl ChangeBuffer {
    /// Bytes encoded so far.
    #[must_use]
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Nothing encoded yet?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Changes encoded so far.
    #[must_use]
    pub const fn count(&self) -> u64 {
        self.count
    }

    /// Appends a change.
    pub fn push(&mut self, change: &Change) {
        self.count += 1;
        match change {
            Change::Put {
                table,
                row,
                old_key: None,
                former: Some(former),
                ..
            } => {
                self.bytes.push(b'V');
                self.table(table);
                put_bytes(&mut self.bytes, former.as_bytes());
                put_bytes(&mut self.bytes, row.as_bytes());
            }
            Change::Put {
                table,
                op,
                row,
                old_key: None,
                former: None,
            } => {
                self.bytes.push(match op {
                    PutOp::Insert => b'I',
                    PutOp::Update => b'U',
                    PutOp::State => b'S',
                });
                self.table(table);
                put_bytes(&mut self.bytes, row.as_bytes());
            }
            Change::Put {
                table,
                row,
                old_key: Some(old_key),
                ..
            } => {
                self.bytes.push(b'M');
                self.table(table);
                put_bytes(&mut self.bytes, old_key.as_bytes());
                put_bytes(&mut self.bytes, row.as_bytes());
            }
            Change::Delete { table, key } => {
                self.bytes.push(b'D');
                self.table(table);
                put_bytes(&mut self.bytes, key.as_bytes());
            }
            Change::Truncate {
                tables,
                cascade,
                restart_identity,
            } => {
                self.bytes.push(b'X');
                self.bytes
                    .push(u8::from(*cascade) | u8::from(*restart_identity) << 1);
                self.bytes
                    .extend_from_slice(&u16::try_from(tables.len()).unwrap_or(u16::MAX).to_be_bytes());
                for table in tables {
                    self.table(table);
                }
            }
        }
    }

    fn table(&mut self, table: &Arc<TableDesc>) {
        let at = self
            .tables
            .iter()
            .rposition(|known| Arc::ptr_eq(known, table))
            .unwrap_or_else(|| {
                self.tables.push(Arc::clone(table));
                self.tables.len() - 1
            });
        // A frame is closed long before it could name 65,536 tables: see `FrameBuilder::is_full`.
        self.bytes
            .extend_from_slice(&u16::try_from(at).unwrap_or(u16::MAX).to_be_bytes());
    }
}

/// Collects records for one frame payload.
#[derive(Debug, Default)]
pub struct FrameBuilder {
    changes: ChangeBuffer,
    body: Vec<u8>,
    txn_count: u32,
}

impl FrameBuilder {
    /// The changes of the transaction being encoded; close it with [`Self::end_txn`] or [`Self::end_piece`].
    pub const fn changes(&mut self) -> &mut ChangeBuffer {
        &mut self.changes
    }

    /// Bytes held.
    #[must_use]
    pub fn len(&self) -> usize {
        self.body.len() + self.changes.bytes.len()
    }

    /// Nothing held?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Should the frame be closed before more is added, with `limit` bytes as its aim?
    #[must_use]
    pub fn is_full(&self, limit: usize) -> bool {
        self.len() >= limit || self.changes.tables.len() >= 10_000
    }

    /// Transactions closed in this frame.
    #[must_use]
    pub const fn txn_count(&self) -> u32 {
        self.txn_count
    }

    /// Bytes of transactions that are closed.
    #[must_use]
    pub fn closed_len(&self) -> usize {
        self.body.len()
    }

    /// Closes a transaction.
    pub fn end_txn(&mut self, header: &TxnHeader) {
        let out = &mut self.body;
        let dep_count = u8::try_from(header.deps.len());
        // A daemon that does not know of wide ones refuses the frame. Nodes that have left count as well.
        out.push(if dep_count.is_ok() { b'T' } else { b'W' });
        out.extend_from_slice(&header.position.epoch.to_be_bytes());
        out.extend_from_slice(&header.position.lsn.0.to_be_bytes());
        out.extend_from_slice(&header.stamp.time.as_u64().to_be_bytes());
        out.extend_from_slice(&header.xid.to_be_bytes());
        out.extend_from_slice(&header.commit_us.to_be_bytes());
        out.extend_from_slice(&header.witness_us.to_be_bytes());
        out.extend_from_slice(&header.change_count.to_be_bytes());
        match dep_count {
            Ok(count) => out.push(count),
            // There are 65,536 ids.
            Err(_) => {
                let count = u32::try_from(header.deps.len()).unwrap_or(u32::MAX);
                out.extend_from_slice(&count.to_be_bytes());
            }
        }
        for (node, position) in header.deps.iter() {
            out.extend_from_slice(&node.0.to_be_bytes());
            out.extend_from_slice(&position.epoch.to_be_bytes());
            out.extend_from_slice(&position.lsn.0.to_be_bytes());
        }
        self.end_changes();
        self.txn_count += 1;
    }

    /// Closes a piece of a large transaction that is not its last.
    pub fn end_piece(&mut self) {
        self.body.push(b'C');
        self.end_changes();
    }

    fn end_changes(&mut self) {
        put_bytes(&mut self.body, &self.changes.bytes);
        self.changes.bytes.clear();
        self.changes.count = 0;
    }

    /// The payload; the builder is empty afterwards.
    pub fn finish(&mut self) -> Bytes {
        let mut out = Vec::with_capacity(self.body.len() + 512 * self.changes.tables.len() + 3);
        out.push(VERSION);
        out.extend_from_slice(
            &u16::try_from(self.changes.tables.len())
                .unwrap_or(u16::MAX)
                .to_be_bytes(),
        );
        let mut table_bytes = Vec::new();
        for table in self.changes.tables.drain(..) {
            table_bytes.clear();
            table.encode(&mut table_bytes);
            put_bytes(&mut out, &table_bytes);
        }
        out.extend_from_slice(&self.body);
        self.body.clear();
        self.txn_count = 0;
        Bytes::from(out)
    }
}

/// Table descriptions seen before, so that a frame's dictionary costs a hash and not a parse.
#[derive(Debug, Default)]
pub struct TableCache(HashMap<u64, (Bytes, Arc<TableDesc>)>);

impl TableCache {
    fn get(&mut self, bytes: &Bytes) -> Result<Arc<TableDesc>, Malformed> {
        let hash = xxhash_rust::xxh3::xxh3_64(bytes);
        if let Some((known, table)) = self.0.get(&hash)
            && known == bytes
        {
            return Ok(Arc::clone(table));
        }
        let table = TableDesc::decode(bytes)?;
        if self.0.len() >= 100_000 {
            self.0.clear();
        }
        self.0
            .insert(hash, (Bytes::copy_from_slice(bytes), Arc::clone(&table)));
        Ok(table)
    }
}

/// A record of a frame.
#[derive(Debug, Clone)]
pub enum Record {
    /// A transaction, or the last piece of a large one.
    Txn(TxnHeader, Changes),
    /// An earlier piece of a large transaction.
    Piece(Changes),
}

/// Reads an unpacked payload, record by record, without copying values.
#[derive(Debug)]
pub struct FrameReader {
    origin: NodeId,
    tables: Arc<[Arc<TableDesc>]>,
    rest: Bytes,
}

impl FrameReader {
    /// Reads the tables of a payload of `origin`.
    ///
    /// # Errors
    /// When the payload is malformed or of an unknown version.
    pub fn new(origin: NodeId, mut payload: Bytes, cache: &mut TableCache) -> Result<Self, Malformed> {
        let head = split(&mut payload, 3)?;
        let mut from = Reader::new(&head);
        if from.u8()? != VERSION {
            return Err(Malformed("a frame of an unknown version; upgrade this daemon"));
        }
        let count = usize::from(from.u16()?);
        let mut tables = Vec::with_capacity(count.min(1_024));
        for _ in 0..count {
            tables.push(cache.get(&split_bytes(&mut payload)?)?);
        }
        Ok(Self {
            origin,
            tables: tables.into(),
            rest: payload,
        })
    }

    /// The next record, `None` at the end.
    ///
    /// # Errors
    /// When the payload is malformed.
    pub fn next_record(&mut self) -> Result<Option<Record>, Malformed> {
        if self.rest.is_empty() {
            return Ok(None);
        }
        match self.rest.get_u8() {
            tag @ (b'T' | b'W') => {
                let header = self.header(tag == b'W')?;
                Ok(Some(Record::Txn(header, self.changes()?)))
            }
            b'C' => Ok(Some(Record::Piece(self.changes()?))),
            _ => Err(Malformed("a record of unknown kind")),
        }
    }

    fn header(&mut self, is_wide: bool) -> Result<TxnHeader, Malformed> {
        let mut from = Reader::new(&self.rest);
        let position = Position {
            epoch: from.u32()?,
            lsn: Lsn(from.u64()?),
        };
        let stamp = Stamp {
            time: NTP64(from.u64()?),
            node: self.origin,
        };
        let (xid, commit_us, witness_us) = (from.u32()?, from.i64()?, from.i64()?);
        let change_count = from.u64()?;
        let dep_count = if is_wide {
            from.u32()?
        } else {
            u32::from(from.u8()?)
        };
        let mut deps = Vector::new();
        for _ in 0..dep_count {
            deps.raise(
                NodeId(from.u16()?),
                Position {
                    epoch: from.u32()?,
                    lsn: Lsn(from.u64()?),
                },
            );
        }
        let len = self.rest.len() - from.rest().len();
        self.rest.advance(len);
        Ok(TxnHeader {
            position,
            stamp,
            deps,
            xid,
            commit_us,
            witness_us,
            change_count,
        })
    }

    fn changes(&mut self) -> Result<Changes, Malformed> {
        Ok(Changes {
            tables: Arc::clone(&self.tables),
            rest: split_bytes(&mut self.rest)?,
        })
    }
}

/// The changes of a record, decoded one by one. Cloning is cheap.
#[derive(Debug, Clone)]
pub struct Changes {
    tables: Arc<[Arc<TableDesc>]>,
    rest: Bytes,
}

impl Changes {
    /// The tables that the changes of their frame are of; those of other records are among them.
    pub fn tables(&self) -> impl Iterator<Item = &Arc<TableDesc>> {
        self.tables.iter()
    }

    /// Length of what is left, bytes.
    #[must_use]
    pub const fn byte_len(&self) -> usize {
        self.rest.len()
    }

    /// The next change, `None` at the end.
    ///
    /// # Errors
    /// When the record is malformed.
    pub fn next_change(&mut self) -> Result<Option<Change>, Malformed> {
        if self.rest.is_empty() {
            return Ok(None);
        }
        let tag = self.rest.get_u8();
        Ok(Some(match tag {
            b'I' | b'U' | b'S' | b'V' | b'M' => {
                let table = self.table()?;
                let old_key = if tag == b'M' {
                    Some(RowImage::parse(split_bytes(&mut self.rest)?, table.key.len())?)
                } else {
                    None
                };
                let former = if tag == b'V' {
                    Some(RowImage::parse(
                        split_bytes(&mut self.rest)?,
                        table.columns.len(),
                    )?)
                } else {
                    None
                };
                let row = RowImage::parse(split_bytes(&mut self.rest)?, table.columns.len())?;
                let op = match tag {
                    b'I' => PutOp::Insert,
                    b'S' => PutOp::State,
                    _ => PutOp::Update,
                };
                Change::Put {
                    table,
                    op,
                    row,
                    old_key,
                    former,
                }
            }
            b'D' => {
                let table = self.table()?;
                let key = RowImage::parse(split_bytes(&mut self.rest)?, table.key.len())?;
                Change::Delete { table, key }
            }
            b'X' => {
                let head = split(&mut self.rest, 3)?;
                let mut from = Reader::new(&head);
                let (flags, count) = (from.u8()?, from.u16()?);
                let tables = (0..count).map(|_| self.table()).collect::<Result<_, _>>()?;
                Change::Truncate {
                    tables,
                    cascade: flags & 1 != 0,
                    restart_identity: flags & 2 != 0,
                }
            }
            _ => return Err(Malformed("a change of unknown kind")),
        }))
    }

    fn table(&mut self) -> Result<Arc<TableDesc>, Malformed> {
        // One a change: not a slice of its own.
        let at = Reader::new(&self.rest).u16()?;
        self.rest.advance(2);
        self.tables
            .get(usize::from(at))
            .cloned()
            .ok_or(Malformed("a table that the frame does not describe"))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::row::Cell;
    use crate::schema::ColumnDesc;

    fn table(name: &str) -> Arc<TableDesc> {
        Arc::new(TableDesc {
            schema: "public".to_owned(),
            name: name.to_owned(),
            columns: vec![
                ColumnDesc {
                    name: "id".into(),
                    type_oid: 20,
                    type_mod: -1,
                    type_name: "pg_catalog.int8".into(),
                },
                ColumnDesc {
                    name: "v".into(),
                    type_oid: 25,
                    type_mod: -1,
                    type_name: "pg_catalog.text".into(),
                },
            ],
            key: vec![0],
            identity_full: true,
        })
    }

    fn header(lsn: u64, change_count: u64) -> TxnHeader {
        TxnHeader {
            position: Position::new(1, lsn),
            stamp: Stamp {
                time: NTP64(lsn * 3),
                node: NodeId(7),
            },
            deps: [
                (NodeId(7), Position::new(1, lsn - 1)),
                (NodeId(9), Position::new(2, 5)),
            ]
            .into_iter()
            .collect(),
            xid: 1234,
            commit_us: 1_700_000_000_000_000,
            witness_us: 1_699_999_999_000_000,
            change_count,
        }
    }

    fn every_change() -> Vec<Change> {
        let (a, b) = (table("a"), table("b"));
        let row =
            RowImage::build([Cell::Binary(&[0, 0, 0, 0, 0, 0, 0, 1]), Cell::Text(b"hello")].into_iter());
        let key = a.key_image(&row).unwrap();
        let former = RowImage::build([Cell::Unchanged, Cell::Text(b"hallo")].into_iter());
        vec![
            Change::Put {
                table: a.clone(),
                op: PutOp::Insert,
                row: row.clone(),
                old_key: None,
                former: None,
            },
            Change::Put {
                table: b.clone(),
                op: PutOp::Update,
                row: row.clone(),
                old_key: None,
                former: Some(former),
            },
            Change::Put {
                table: a.clone(),
                op: PutOp::State,
                row: row.clone(),
                old_key: None,
                former: None,
            },
            Change::Put {
                table: a.clone(),
                op: PutOp::Update,
                row,
                old_key: Some(key.clone()),
                former: None,
            },
            Change::Delete {
                table: b.clone(),
                key,
            },
            Change::Truncate {
                tables: vec![b, a],
                cascade: true,
                restart_identity: false,
            },
        ]
    }

    fn payload() -> Bytes {
        let mut builder = FrameBuilder::default();
        for change in every_change() {
            builder.changes().push(&change);
        }
        builder.end_txn(&header(10, 6));
        builder.end_txn(&header(11, 0));
        builder.finish()
    }

    #[test]
    fn a_frame_reads_back_what_was_put_in() {
        let mut cache = TableCache::default();
        let mut reader = FrameReader::new(NodeId(7), payload(), &mut cache).unwrap();
        let Some(Record::Txn(first, mut changes)) = reader.next_record().unwrap() else {
            panic!("no transaction")
        };
        assert_eq!(first, header(10, 6));
        for wanted in every_change() {
            assert_eq!(
                format!("{:?}", changes.next_change().unwrap().unwrap()),
                format!("{wanted:?}")
            );
        }
        assert!(changes.next_change().unwrap().is_none());
        let Some(Record::Txn(second, _)) = reader.next_record().unwrap() else {
            panic!("no transaction")
        };
        assert_eq!(second, header(11, 0));
        assert!(reader.next_record().unwrap().is_none());
    }

    #[test]
    fn a_transaction_depends_on_as_many_nodes_as_there_are() {
        for count in [0, 1, 255, 256, 2_000, u16::MAX] {
            let deps = (1..=count).map(|node| (NodeId(node), Position::new(1, u64::from(node))));
            let wanted = TxnHeader {
                deps: deps.collect(),
                ..header(10, 0)
            };
            let mut builder = FrameBuilder::default();
            builder.end_txn(&wanted);
            builder.end_txn(&header(11, 0));
            let mut cache = TableCache::default();
            let mut reader = FrameReader::new(NodeId(7), builder.finish(), &mut cache).unwrap();
            for wanted in [wanted, header(11, 0)] {
                let Some(Record::Txn(read, _)) = reader.next_record().unwrap() else {
                    panic!("no transaction")
                };
                assert_eq!(read, wanted);
            }
            assert!(reader.next_record().unwrap().is_none());
        }
    }

    proptest! {
        #[test]
        fn damaged_frames_give_errors_and_no_panic(at in 0usize..400, value: u8, cut in 0usize..400) {
            let mut bytes = payload().to_vec();
            let at = at % bytes.len();
            bytes[at] = value;
            bytes.truncate(bytes.len() - cut % bytes.len());
            let mut cache = TableCache::default();
            if let Ok(mut reader) = FrameReader::new(NodeId(7), Bytes::from(bytes), &mut cache) {
                while let Ok(Some(record)) = reader.next_record() {
                    let (Record::Txn(_, mut changes) | Record::Piece(mut changes)) = record;
                    while let Ok(Some(_)) = changes.next_change() {}
                }
            }
        }
    }
}
