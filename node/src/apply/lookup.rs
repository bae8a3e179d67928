//! Reading one row of one transaction back from the journal: for the conflict log, for rows that get a version again
//! which had lost, and for columns that are merged.
//!
//! Rows are asked for one by one, and what collides comes in runs: the frames that were read last are kept, decoded, and
//! of a transaction of many frames where each of its rows is. What is kept is bounded ([`kept`]) and can always be read
//! again. Never writes, and never says more than the journal does.

mod frame;
mod kept;

use std::sync::{Arc, Mutex};

use anabranch_conflict::{Op, Version};
use anabranch_proto::row::RowImage;
use anabranch_proto::schema::TableDesc;
use anabranch_proto::txn::TxnHeader;
use anabranch_proto::{NodeId, Position, Vector};
use uuid::Uuid;

use self::frame::{Frame, Row};
use self::kept::{Kept, Place, Spread};
use super::failure::Failure;
use super::own_tables::OwnTables;
use crate::index::RowKey;
use crate::journal::{self, Cursor, CursorState, FrameKind, FrameMeta, Journal};
use crate::resolve::Written;
use crate::shared::lock;

/// So many frames are passed from where the last look ended before the journal is asked where the wanted one is.
const WALK_MAX: usize = 64;

/// A row as its transaction left it.
#[derive(Debug)]
pub(crate) struct PutBack {
    pub(crate) table: Arc<TableDesc>,
    pub(crate) row: RowImage,
    /// What the transaction did to this key first: a row that it inserted, updated and so on is one that it inserted.
    pub(crate) op: Op,
}

/// Where DDL of this node was said.
pub(crate) enum Said {
    /// Its transaction ended there.
    At(Position),
    /// Not in the journal yet.
    NotYet,
    /// Not in the journal any more.
    LetGo,
}

/// Looks rows up in the journal.
#[derive(Debug)]
pub(crate) struct Lookup {
    journal: Journal,
    node: NodeId,
    kept: Mutex<Kept>,
    /// The descriptions of tables in frames of `node`.
    own: Arc<OwnTables>,
}

impl Lookup {
    /// Over the `journal` of `node`, with nothing kept.
    pub(crate) fn new(journal: Journal, node: NodeId) -> Self {
        Self {
            journal,
            node,
            kept: Mutex::default(),
            own: Arc::default(),
        }
    }

    /// The descriptions of this node's own tables that were read here.
    pub(crate) fn own_tables(&self) -> Arc<OwnTables> {
        Arc::clone(&self.own)
    }

    /// Where it looks.
    pub(crate) const fn journal(&self) -> &Journal {
        &self.journal
    }

    /// The row that `version` wrote at `key`, if the journal still holds its transaction. `None` for a delete, too.
    pub(crate) fn row(
        &self,
        version: Version,
        table: &TableDesc,
        key: &RowKey,
    ) -> Result<Option<(Arc<TableDesc>, RowImage)>, Failure> {
        let put = self.put(version, table, key)?;
        Ok(put.map(|put| (put.table, put.row)))
    }

    /// The same, with what was done to that key first.
    pub(crate) fn put(
        &self,
        version: Version,
        table: &TableDesc,
        key: &RowKey,
    ) -> Result<Option<PutBack>, Failure> {
        let mut first = None;
        let mut found = None;
        let header = self.each_write(version, table, key, |row| {
            let op = *first.get_or_insert(row.op);
            if let Some(image) = &row.image {
                found = Some(PutBack {
                    table: Arc::clone(&row.table),
                    row: image.clone(),
                    op,
                });
            }
        })?;
        Ok(found.filter(|_| header.is_some()))
    }

    /// As [`Self::row`], of a put that must be there: it is not stable, so the journal holds it, or will in a moment.
    pub(crate) fn must(
        &self,
        version: Version,
        table: &TableDesc,
        key: &RowKey,
    ) -> Result<(Arc<TableDesc>, RowImage), Failure> {
        self.row(version, table, key)?
            .ok_or_else(|| no_image(version, table))
    }

    /// The header of the transaction of `version`, if the journal still holds it.
    pub(crate) fn header(&self, version: Version) -> Result<Option<TxnHeader>, Failure> {
        let mut kept = lock(&self.kept);
        let Some(place) = self.place(&mut kept, version.origin(), version.position)? else {
            return Ok(None);
        };
        let end = self.frame(&mut kept, version.origin(), place.state, place.seq)?;
        Ok(end.and_then(|end| end.txn(version.stamp).map(|(_, header)| header.clone())))
    }

    /// Where the transaction of this node ended that said the DDL `id`, which it did behind `after`.
    pub(crate) fn own_ddl(&self, id: Uuid, after: Position) -> Result<Said, Failure> {
        let mut kept = lock(&self.kept);
        let mut walk = || -> Result<Said, Failure> {
            let mut cursor = self.journal.cursor_on(self.node, after)?;
            let mut run = None;
            loop {
                let state = cursor.save();
                let Some((meta, seq)) = cursor.try_skim()? else {
                    return Ok(Said::NotYet);
                };
                if meta.kind == FrameKind::End && run == Some(meta.part_run) {
                    return Ok(Said::At(meta.last));
                }
                let Some(frame) = self.frame(&mut kept, self.node, state, seq)? else {
                    return Ok(Said::LetGo);
                };
                match frame.ddl(id) {
                    Some(Some(position)) => return Ok(Said::At(position)),
                    Some(None) => run = Some(meta.part_run),
                    None => {}
                }
            }
        };
        match walk() {
            Err(Failure::Journal(journal::Error::Trimmed { .. })) => Ok(Said::LetGo),
            found => found,
        }
    }

    /// What `version` did to `key`, of a table whose columns are merged: it is not stable, so the journal holds it, or
    /// will in a moment.
    pub(crate) fn written(
        &self,
        version: Version,
        table: &TableDesc,
        key: &RowKey,
    ) -> Result<Written, Failure> {
        let mut all: Option<Written> = None;
        let header = self.each_write(version, table, key, |row| {
            let some = Written::new(
                &row.table,
                &Vector::new(),
                (row.image.as_ref(), row.former.as_ref()),
            );
            all = Some(match all.take() {
                Some(before) => before.then(some),
                None => some,
            });
        })?;
        match (header, all) {
            (Some(header), Some(written)) => Ok(Written {
                deps: header.deps,
                ..written
            }),
            _ => Err(no_image(version, table)),
        }
    }

    /// Visits what the transaction of `version` did to `key`, in order. Gives its header, if the journal holds all of it.
    fn each_write(
        &self,
        version: Version,
        table: &TableDesc,
        key: &RowKey,
        mut visit: impl FnMut(&Row),
    ) -> Result<Option<TxnHeader>, Failure> {
        let origin = version.origin();
        let mut kept = lock(&self.kept);
        let Some(place) = self.place(&mut kept, origin, version.position)? else {
            return Ok(None);
        };
        let hash = frame::hash(table, key.canonical());
        for part in place.parts.as_deref().into_iter().flatten() {
            if part.has(hash) {
                let Some(part) = self.frame(&mut kept, origin, part.state, part.seq)? else {
                    return Ok(None);
                };
                part.rows_of(hash, table, key.canonical(), None)
                    .for_each(&mut visit);
            }
        }
        let Some(end) = self.frame(&mut kept, origin, place.state, place.seq)? else {
            return Ok(None);
        };
        let Some((txn, header)) = end.txn(version.stamp) else {
            return Ok(None);
        };
        end.rows_of(hash, table, key.canonical(), Some(txn))
            .for_each(&mut visit);
        Ok(Some(header.clone()))
    }

    /// Where the transaction is that ends at `position`, if the journal still holds all of it.
    fn place(&self, kept: &mut Kept, origin: NodeId, position: Position) -> Result<Option<Place>, Failure> {
        if let Some(place) = kept.place(origin, position) {
            return Ok(Some(place));
        }
        let Some((passed, parts)) = self.walk(kept, origin, position)? else {
            return Ok(None);
        };
        let mut spread = Spread::default();
        for (state, meta, seq) in &parts {
            if meta.part_run == passed.meta.part_run {
                let Some(part) = self.frame(kept, origin, *state, *seq)? else {
                    return Ok(None);
                };
                spread.push(*state, *seq, &part);
            }
        }
        let parts = (passed.meta.kind == FrameKind::End).then(|| spread.finish());
        let place = Place {
            state: passed.state,
            seq: passed.seq,
            after: passed.meta.prev,
            upto: passed.meta.last,
            parts,
        };
        kept.keep_place(origin, place.clone());
        Ok(Some(place))
    }

    /// Goes to the frame in which the transaction ends, and gives the parts that it passed of it.
    fn walk(
        &self,
        kept: &mut Kept,
        origin: NodeId,
        position: Position,
    ) -> Result<Option<(Passed, Vec<PassedPart>)>, Failure> {
        if let Some(state) = kept.near(origin, position) {
            match self
                .journal
                .cursor_at(state)
                .and_then(|cursor| pass(cursor, position, WALK_MAX))
            {
                Ok(Some(found)) => return Ok(Some(found)),
                Ok(None) | Err(journal::Error::Trimmed { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        match self
            .journal
            .cursor_on(origin, position)
            .and_then(|cursor| pass(cursor, position, usize::MAX))
        {
            Err(journal::Error::Trimmed { .. }) => Ok(None),
            found => Ok(found?),
        }
    }

    /// The frame at a place, decoded; `None` if the journal has let go of it.
    fn frame(
        &self,
        kept: &mut Kept,
        origin: NodeId,
        state: CursorState,
        seq: u64,
    ) -> Result<Option<Arc<Frame>>, Failure> {
        if let Some(frame) = kept.frame(seq) {
            return Ok(Some(frame));
        }
        let read = self
            .journal
            .cursor_at(state)
            .and_then(|mut cursor| cursor.try_next());
        let located = match read {
            Ok(Some(located)) if located.seq == seq => located,
            Ok(_) | Err(journal::Error::Trimmed { .. }) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let payload = journal::unpack(&located.frame)?;
        let bytes = payload.len();
        let is_own = origin == self.node;
        let tables = if is_own {
            &mut kept.own_tables
        } else {
            &mut kept.tables
        };
        let frame = Arc::new(Frame::read(origin, payload, tables)?);
        if is_own {
            self.own.learn(frame.tables());
        }
        kept.keep_frame(seq, Arc::clone(&frame), bytes);
        Ok(Some(frame))
    }
}

/// A frame that was passed, and where it begins.
struct Passed {
    state: CursorState,
    meta: FrameMeta,
    seq: u64,
}

type PassedPart = (CursorState, FrameMeta, u64);

/// Passes frames up to the one in which the transaction ends that ends at `position`; at most `most` of them.
fn pass(
    mut cursor: Cursor,
    position: Position,
    most: usize,
) -> Result<Option<(Passed, Vec<PassedPart>)>, journal::Error> {
    let mut parts = Vec::new();
    for _ in 0..most {
        let state = cursor.save();
        let Some((meta, seq)) = cursor.try_skim()? else {
            break;
        };
        match meta.kind {
            FrameKind::Part => parts.push((state, meta, seq)),
            _ if meta.last >= position => return Ok(Some((Passed { state, meta, seq }, parts))),
            _ => parts.clear(),
        }
    }
    Ok(None)
}

fn no_image(version: Version, table: &TableDesc) -> Failure {
    Failure::NoImage {
        table: format!("{}.{}", table.schema, table.name),
        stamp: version.stamp,
    }
}
