//! What the tail wrote: keys of its rows, and DDL, read from the journal.
//!
//! In:   the journal between what the server has and what the tail had seen            Out: [`Written`]
//! Holds: keys of all rows, up to a bound
//! Not here: what became of the rows ([`super::rows`])

use std::collections::{BTreeMap, BTreeSet};

use anabranch_proto::txn::Change;
use anabranch_proto::{NodeId, Position, Stamp, Vector};

use super::super::{Error, refused};
use super::ROWS_MAX;
use crate::apply::ddl::Ddl;
use crate::apply::feed::{Feed, Pieces};
use crate::apply::passed_over::Name;
use crate::journal::{self, Journal};

/// What the tail wrote.
#[derive(Default)]
pub(super) struct Written {
    pub(super) tables: BTreeMap<(String, String), BTreeSet<Vec<u8>>>,
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
        change.each_row(|table, key, _| {
            rows += 1;
            let name = (table.schema.clone(), table.name.clone());
            self.tables.entry(name).or_default().insert(key.to_vec());
            Ok::<_, Error>(())
        })?;
        Ok(rows)
    }
}
