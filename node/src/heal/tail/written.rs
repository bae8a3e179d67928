//! What the tail wrote: keys of its rows, whether these were there before, and DDL, read from the journal.
//!
//! In:   the journal between what the server has and what the tail had seen            Out: [`Written`]
//! Holds: keys of all rows, up to a bound
//! Not here: what became of the rows ([`super::rows`])

use std::collections::{BTreeMap, BTreeSet};

use anabranch_proto::txn::{Change, PutOp};
use anabranch_proto::{NodeId, Position, Stamp, Vector};

use super::super::{Error, refused};
use super::ROWS_MAX;
use crate::apply::ddl::Ddl;
use crate::apply::feed::{Feed, Pieces};
use crate::apply::passed_over::Name;
use crate::journal::{self, Journal};

/// Keys of a table's rows, in their canonical form: was each row there before, by all that was written of it?
pub(super) type Keys = BTreeMap<Vec<u8>, bool>;

/// What the tail wrote.
#[derive(Default)]
pub(super) struct Written {
    pub(super) tables: BTreeMap<(String, String), Keys>,
    pub(super) truncated: BTreeSet<(String, String)>,
    pub(super) ddl: Vec<(Stamp, Ddl)>,
    /// How far each origin goes in it, and its highest stamp.
    pub(super) applied: BTreeMap<NodeId, (Position, Stamp)>,
}

impl Written {
    /// Reads what of `upto` is not in `has`: blocks.
    pub(super) fn read(journal: &Journal, has: &Vector, upto: &Vector) -> Result<Self, Error> {
        let mut written = Self::default();
        let mut rows = 0;
        for (origin, upto) in upto.iter() {
            let mut feed = match Feed::new(journal, origin, has.get(origin)) {
                Err(journal::Error::Trimmed { oldest, .. }) => {
                    return refused(format!(
                        "the server has what node {origin} wrote up to {}, and the journal begins at {oldest}: what lies between was \
                         let go of when the standby had not got it; see docs/errors/the-server-went-back.md",
                        has.get(origin)
                    ));
                }
                feed => feed?,
            };
            while let Some(head) = feed.peek()? {
                if head.header().position > upto {
                    break;
                }
                let Some(head) = feed.take() else { break };
                let header = head.header().clone();
                if !has.covers(header.origin(), header.position) && header.origin() == origin {
                    let last = written
                        .applied
                        .entry(origin)
                        .or_insert((header.position, header.stamp));
                    *last = (header.position, header.stamp.max(last.1));
                }
                let mut pieces = Pieces::of_head(journal, head)?;
                while let Some(mut piece) = pieces.next_piece()? {
                    while let Some(change) = piece.next_change()? {
                        rows += written.note(&change)?;
                        if rows > ROWS_MAX {
                            return refused(format!(
                                "the server lacks writes of more than {ROWS_MAX} rows: it cannot come back as this node; see \
                                 docs/errors/the-server-went-back.md"
                            ));
                        }
                        if let Some(ddl) = Ddl::of(&change, &header)? {
                            written.ddl.push((header.stamp, ddl));
                        }
                    }
                }
            }
        }
        written.ddl.sort_by_key(|(stamp, _)| *stamp);
        Ok(written)
    }

    /// Leaves out these tables: this node has passed over what others wrote there.
    pub(super) fn pass_over(&mut self, passed: &BTreeSet<Name>) {
        self.tables.retain(|name, _| !passed.contains(name));
        self.truncated.retain(|name| !passed.contains(name));
    }

    /// Notes the rows of a change; how many.
    fn note(&mut self, change: &Change) -> Result<usize, Error> {
        for table in change.tables() {
            let name = (table.schema.clone(), table.name.clone());
            if let Change::Truncate { .. } = change {
                self.truncated.insert(name.clone());
            }
            self.tables.entry(name).or_default();
        }
        let mut rows = 0;
        let mut is_update = false;
        if let Change::Put { op, old_key, .. } = change {
            is_update = *op == PutOp::Update && old_key.is_none();
        }
        change.each_row(|table, key, row| {
            rows += 1;
            let name = (table.schema.clone(), table.name.clone());
            let was_there = is_update || row.is_none();
            let keys = self.tables.entry(name).or_default();
            let known = keys.entry(key.to_vec()).or_insert(was_there);
            *known &= was_there;
            Ok::<_, Error>(())
        })?;
        Ok(rows)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use anabranch_proto::row::{Cell, RowImage};
    use anabranch_proto::schema::{ColumnDesc, TableDesc};

    use super::*;

    fn row(id: i32) -> RowImage {
        RowImage::build([Cell::Binary(&id.to_be_bytes())].into_iter())
    }

    #[test]
    fn a_row_that_was_only_updated_or_deleted_was_there_before() {
        let table = Arc::new(TableDesc {
            schema: "public".to_owned(),
            name: "t".to_owned(),
            columns: vec![ColumnDesc {
                name: "id".to_owned(),
                type_oid: 23,
                type_mod: -1,
                type_name: "pg_catalog.int4".to_owned(),
            }],
            key: vec![0],
            identity_full: false,
        });
        let put = |op, id, old: Option<i32>| Change::Put {
            table: Arc::clone(&table),
            op,
            row: row(id),
            old_key: old.map(row),
            former: None,
        };
        let delete = |id| Change::Delete {
            table: Arc::clone(&table),
            key: row(id),
        };
        let mut written = Written::default();
        let changes = [
            put(PutOp::Update, 1, None),
            delete(2),
            put(PutOp::Insert, 2, None),
            put(PutOp::Insert, 3, None),
            put(PutOp::Update, 3, None),
            put(PutOp::State, 4, None),
            // 5 becomes 6.
            put(PutOp::Update, 6, Some(5)),
        ];
        for change in &changes {
            written.note(change).unwrap();
        }
        let keys = written.tables.into_values().next().unwrap();
        let were_there: Vec<bool> = keys.into_values().collect();
        assert_eq!(were_there, [true, false, false, false, true, false]);
    }
}
