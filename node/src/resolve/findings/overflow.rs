//! Findings that do not fit into memory, in a file, block after block.
//!
//! In:   portions of findings      Out: the same, in the same order
//! Invariants: 1. the file has no name, so it goes with the process; 2. it holds the only copy of what the slot waits for, which a crash
//!        finds again
//! On crash: gone

use std::collections::{HashMap, VecDeque};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anabranch_conflict::{Kind, Version};
use anabranch_proto::row::RowImage;
use anabranch_proto::schema::TableDesc;
use anabranch_proto::stamp::STAMP_LEN;
use anabranch_proto::wire::{Malformed, Reader, put_bytes};
use anabranch_proto::{Lsn, Position, Stamp};
use bytes::Bytes;

use super::super::{LocalTxn, Rival};
use super::{Found, Held};
use crate::index::RowKey;
use crate::small_file::{MODE_FILE, make_folder};

/// A portion in the file.
struct Block {
    at: u64,
    len: usize,
    /// The first WAL place of any in it: after it is read, of all.
    from: Lsn,
}

/// See the head of the module.
pub(super) struct Overflow {
    folder: PathBuf,
    file: Option<File>,
    end: u64,
    blocks: VecDeque<Block>,
    /// The tables of what is in the file, and their places here by where they are in memory.
    tables: Vec<Arc<TableDesc>>,
    numbers: HashMap<usize, u32>,
    /// It could not be written: no more is, until what is in it was read.
    is_failed: bool,
}

impl Overflow {
    pub(super) fn new(folder: &Path) -> Self {
        Self {
            folder: folder.to_owned(),
            file: None,
            end: 0,
            blocks: VecDeque::new(),
            tables: Vec::new(),
            numbers: HashMap::new(),
            is_failed: false,
        }
    }

    /// Puts a portion behind what is there; false where it has to stay in memory.
    pub(super) fn put(&mut self, some: &Held) -> bool {
        let Some(from) = some.first() else { return true };
        if self.is_failed {
            return false;
        }
        let mut bytes = Vec::new();
        for found in some.iter() {
            let table = self.number(&found.table);
            write(found, table, &mut bytes);
        }
        if let Err(error) = self.append(&bytes) {
            tracing::warn!(%error, folder = %self.folder.display(), "findings stay in memory: they cannot be written to the data folder");
            self.is_failed = true;
            return false;
        }
        self.blocks.push_back(Block {
            at: self.end,
            len: bytes.len(),
            from,
        });
        self.end += bytes.len() as u64;
        true
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.file.is_none() {
            self.file = Some(open(&self.folder)?);
        }
        match &self.file {
            Some(file) => file.write_all_at(bytes, self.end),
            None => Ok(()),
        }
    }

    /// Takes the first portion.
    pub(super) fn take(&mut self) -> io::Result<Option<Vec<Found>>> {
        let (Some(file), Some(block)) = (&self.file, self.blocks.front()) else {
            self.is_failed = false;
            return Ok(None);
        };
        let mut bytes = vec![0; block.len];
        file.read_exact_at(&mut bytes, block.at)?;
        let some = read(&Bytes::from(bytes), block.from, &self.tables).map_err(io::Error::other)?;
        self.blocks.pop_front();
        if self.blocks.is_empty() {
            *self = Self::new(&self.folder);
        }
        Ok(Some(some))
    }

    pub(super) fn hold_at(&mut self, lsn: Lsn) {
        for block in &mut self.blocks {
            block.from = block.from.min(lsn);
        }
    }

    pub(super) fn first(&self) -> Option<Lsn> {
        self.blocks.iter().map(|block| block.from).min()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    fn number(&mut self, table: &Arc<TableDesc>) -> u32 {
        let tables = &mut self.tables;
        let number = self.numbers.entry(Arc::as_ptr(table).addr());
        *number.or_insert_with(|| {
            tables.push(Arc::clone(table));
            u32::try_from(tables.len() - 1).unwrap_or(u32::MAX)
        })
    }
}

fn open(folder: &Path) -> io::Result<File> {
    make_folder(folder)?;
    let path = folder.join("findings");
    let mut options = OpenOptions::new();
    let file = options
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .mode(MODE_FILE)
        .open(&path)?;
    std::fs::remove_file(&path)?;
    Ok(file)
}

const LOCAL_WON: u8 = 1;
const REPAIR: u8 = 1 << 1;
const SETTLE: u8 = 1 << 2;
const LOG: u8 = 1 << 3;
const ROW: u8 = 1 << 4;
const KEY_IMAGE: u8 = 1 << 5;
const TXN: u8 = 1 << 6;
const RIVAL: u8 = 1 << 7;

fn write(found: &Found, table: u32, out: &mut Vec<u8>) {
    let Found {
        // Its block's.
        lsn: _,
        table: _,
        key,
        local,
        local_row,
        key_image,
        local_txn,
        remote,
        local_won,
        repair,
        settle,
        log,
        rival,
    } = found;
    let flags = [
        (*local_won, LOCAL_WON),
        (*repair, REPAIR),
        (*settle, SETTLE),
        (*log, LOG),
        (local_row.is_some(), ROW),
        (key_image.is_some(), KEY_IMAGE),
        (local_txn.is_some(), TXN),
        (rival.is_some(), RIVAL),
    ];
    let flags = flags.into_iter().filter(|(is_set, _)| *is_set);
    out.push(flags.map(|(_, flag)| flag).sum());
    out.extend_from_slice(&table.to_be_bytes());
    put_bytes(out, key.as_bytes());
    write_version(local, out);
    write_version(remote, out);
    for image in [local_row, key_image].into_iter().flatten() {
        out.extend_from_slice(image.as_bytes());
    }
    if let Some(txn) = local_txn {
        write_place(txn.stamp, txn.position, out);
        out.extend_from_slice(&txn.xid.to_be_bytes());
        out.extend_from_slice(&txn.commit_us.to_be_bytes());
    }
    if let Some(rival) = rival {
        put_bytes(out, rival.key.as_bytes());
        put_bytes(out, rival.constraint.as_bytes());
    }
}

fn write_version(version: &Version, out: &mut Vec<u8>) {
    write_place(version.stamp, version.position, out);
    out.push(u8::from(version.kind == Kind::Delete));
}

fn write_place(stamp: Stamp, position: Position, out: &mut Vec<u8>) {
    out.extend_from_slice(&stamp.to_bytes());
    out.extend_from_slice(&position.epoch.to_be_bytes());
    out.extend_from_slice(&position.lsn.0.to_be_bytes());
}

fn read(block: &Bytes, from: Lsn, tables: &[Arc<TableDesc>]) -> Result<Vec<Found>, Malformed> {
    let mut reader = Reader::new(block);
    let mut out = Vec::new();
    while !reader.rest().is_empty() {
        out.push(read_one(block, &mut reader, from, tables)?);
    }
    Ok(out)
}

fn read_one(
    block: &Bytes,
    reader: &mut Reader<'_>,
    lsn: Lsn,
    tables: &[Arc<TableDesc>],
) -> Result<Found, Malformed> {
    let flags = reader.u8()?;
    let has = |flag: u8| flags & flag != 0;
    let number = usize::try_from(reader.u32()?).unwrap_or(usize::MAX);
    let table = tables
        .get(number)
        .ok_or(Malformed("a finding of an unknown table"))?;
    let key = RowKey::from_bytes(reader.bytes()?);
    let local = read_version(reader)?;
    let remote = read_version(reader)?;
    let local_row = has(ROW).then(|| read_image(block, reader)).transpose()?;
    let key_image = has(KEY_IMAGE).then(|| read_image(block, reader)).transpose()?;
    let local_txn = has(TXN).then(|| read_txn(reader)).transpose()?;
    let rival = has(RIVAL).then(|| read_rival(reader)).transpose()?;
    Ok(Found {
        lsn,
        table: Arc::clone(table),
        key,
        local,
        local_row,
        key_image,
        local_txn,
        remote,
        local_won: has(LOCAL_WON),
        repair: has(REPAIR),
        settle: has(SETTLE),
        log: has(LOG),
        rival,
    })
}

fn read_version(reader: &mut Reader<'_>) -> Result<Version, Malformed> {
    let (stamp, position) = read_place(reader)?;
    let kind = match reader.u8()? {
        0 => Kind::Put,
        _ => Kind::Delete,
    };
    Ok(Version {
        stamp,
        position,
        kind,
    })
}

fn read_place(reader: &mut Reader<'_>) -> Result<(Stamp, Position), Malformed> {
    let stamp = reader.take(STAMP_LEN)?;
    let stamp: [u8; STAMP_LEN] = stamp
        .try_into()
        .map_err(|_| Malformed("a stamp of wrong length"))?;
    let epoch = reader.u32()?;
    let lsn = Lsn(reader.u64()?);
    Ok((Stamp::from_bytes(stamp), Position { epoch, lsn }))
}

fn read_image(block: &Bytes, reader: &mut Reader<'_>) -> Result<RowImage, Malformed> {
    Ok(RowImage::read(block, reader)?.0)
}

fn read_txn(reader: &mut Reader<'_>) -> Result<LocalTxn, Malformed> {
    let (stamp, position) = read_place(reader)?;
    Ok(LocalTxn {
        stamp,
        position,
        xid: reader.u32()?,
        commit_us: reader.u64()?.cast_signed(),
    })
}

fn read_rival(reader: &mut Reader<'_>) -> Result<Rival, Malformed> {
    Ok(Rival {
        key: RowKey::from_bytes(reader.bytes()?),
        constraint: Arc::from(reader.text()?),
    })
}
