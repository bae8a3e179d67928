//! Mending rows that are watched, and what their newest writes made of them.
//!
//! In:   rows as they are to be            Out: what became of each
//! Not here: the write itself (`crate::apply::mend`), finding a newest write (`super::super::newest`)

use std::sync::Arc;
use std::time::Duration;

use anabranch_proto::link as pb;
use anabranch_proto::row::RowImage;
use anabranch_proto::schema::TableDesc;
use anabranch_proto::txn::{Change, FrameBuilder, FrameReader, PutOp, Record, TableCache, TxnHeader};
use anabranch_proto::wire::Malformed;
use anabranch_proto::{NodeId, Position, Stamp, Vector};
use bytes::Bytes;
use tokio::sync::oneshot;

use super::super::newest;
use super::super::table::Compared;
use super::super::talk::MOVED;
use super::{Conversation, Error, WHOLE_BYTES_MAX};
use crate::apply::mend::{Job, Outcome, Row};
use crate::apply::plan::Source;
use crate::apply::write::{parameters, references};
use crate::link::vector_from_wire;
use crate::shared::lock;

/// How long the applier may take to come to a job.
const MEND_PATIENCE: Duration = Duration::from_secs(60);

impl Conversation {
    /// What the newest writes made of the watched rows, as far as the journal here tells.
    pub(super) async fn newest(&self, newest: &pb::VerifyNewest) -> Result<pb::VerifyLooked, Error> {
        let set = self
            .watched
            .as_ref()
            .ok_or_else(|| Error::Other("nothing is watched".to_owned()))?;
        let desc = &set.table.desc;
        let unknown = pb::VerifyState {
            moved: true,
            ..pb::VerifyState::default()
        };
        let mut states = vec![unknown; set.keys.len()];
        let shared = &self.seat.shared;
        if !lock(&shared.resolver).is_last_update_wins(desc) {
            return Ok(pb::VerifyLooked { states });
        }
        let origins: Vec<NodeId> = {
            let members = lock(&shared.members);
            members
                .live()
                .into_iter()
                .chain(members.dropped().into_keys())
                .collect()
        };
        let (journal, upto) = (self.seat.journal.clone(), vector_from_wire(&newest.upto));
        let settled = lock(&shared.settled).clone();
        let keys: Vec<Vec<u8>> = set.keys.iter().map(|key| key.canonical().to_vec()).collect();
        let (schema, name) = (desc.schema.clone(), desc.name.clone());
        let found = tokio::task::spawn_blocking(move || {
            newest::find(&journal, &origins, (&upto, &settled), (&schema, &name), &keys)
        });
        let found = found
            .await
            .map_err(|_| Error::Other("reading the journal ended unexpectedly".to_owned()))??;
        let mut bytes = 0;
        for (state, key) in states.iter_mut().zip(&set.keys) {
            let Some(newest_write) = found.get(key.canonical()).filter(|write| write.is_known) else {
                continue;
            };
            let Some((described, row)) = &newest_write.image else {
                *state = pb::VerifyState::default();
                continue;
            };
            if let Some(hash) = self.hash_of(&set.table, described, row, &newest.columns).await? {
                let put = encode(described, row.clone());
                bytes += put.len();
                *state = pb::VerifyState {
                    present: true,
                    hash,
                    // Empty: it is sent when it is asked for by itself.
                    row: if bytes <= WHOLE_BYTES_MAX {
                        put
                    } else {
                        Bytes::new()
                    },
                    ..pb::VerifyState::default()
                };
            }
        }
        Ok(pb::VerifyLooked { states })
    }

    /// The hash of a row that is in no table; none where it is not of a shape that the table has (any more), which is no fault of the others.
    async fn hash_of(
        &self,
        table: &Compared,
        described: &TableDesc,
        row: &RowImage,
        columns: &[String],
    ) -> Result<Option<i64>, Error> {
        let Ok(plan) = table.plan_of(described) else {
            return Ok(None);
        };
        let Some(sql) = Compared::hash_sql(&plan, described, columns) else {
            return Ok(None);
        };
        let mut rows = plan.rows();
        rows.push(&Source::Row(row))?;
        let (array, text) = rows.finish();
        let params = parameters(array, None, text);
        let row = self.sql()?.query_one(&sql, &references(&params)).await?;
        Ok(Some(row.try_get(1)?))
    }

    /// Hands rows to the applier, and waits until it has mended them.
    pub(super) async fn mend(&mut self, mend: pb::VerifyMend) -> Result<pb::VerifyMended, Error> {
        let nothing = || Error::Other("a row that is not watched".to_owned());
        let set = self.watched.as_ref().ok_or_else(nothing)?;
        let mut rows = Vec::new();
        for row in &mend.rows {
            let at = row.at as usize;
            let (key, image) = set.keys.get(at).zip(set.images.get(at)).ok_or_else(nothing)?;
            let put = if row.row.is_empty() {
                None
            } else {
                Some(decode(row.row.clone())?)
            };
            let (table, image_of_row) = match put {
                Some((table, image)) => (table, Some(image)),
                None => (Arc::clone(&set.table.desc), None),
            };
            rows.push(Row {
                table,
                key: key.clone(),
                key_image: image.clone(),
                image: image_of_row,
            });
        }
        // A job has rows of one description: those of a source are alike, those of the journal need not be.
        let mut jobs: Vec<(Vec<u32>, Vec<Row>)> = Vec::new();
        for (asked, mut row) in mend.rows.iter().zip(rows) {
            let alike = jobs.iter_mut().find(|(_, rows)| {
                let mut rows = rows.iter();
                rows.any(|other| other.table == row.table && other.image.is_some() == row.image.is_some())
            });
            match alike {
                Some((asked_of, rows)) => {
                    if let Some(first) = rows.first() {
                        row.table = Arc::clone(&first.table);
                    }
                    asked_of.push(asked.at);
                    rows.push(row);
                }
                None => jobs.push((vec![asked.at], vec![row])),
            }
        }
        let watch = set.id;
        let mut outcomes = Vec::new();
        for (asked, rows) in jobs {
            let (reply, replied) = oneshot::channel();
            self.seat.shared.mend(Job { watch, rows, reply });
            let done = tokio::time::timeout(MEND_PATIENCE, replied).await;
            let Ok(Ok(done)) = done else {
                let text = "its applier does not come to it; see `anabranch status` there";
                return Err(Error::Other(text.to_owned()));
            };
            for (at, outcome) in asked.into_iter().zip(done) {
                let refused = match outcome {
                    Outcome::Mended => String::new(),
                    Outcome::Moved => MOVED.to_owned(),
                    Outcome::Refused(why) => why,
                };
                outcomes.push(pb::VerifyOutcome { at, refused });
            }
        }
        Ok(pb::VerifyMended { outcomes })
    }
}

/// A row as it travels: a frame's payload with one put.
pub(super) fn encode(table: &Arc<TableDesc>, row: RowImage) -> Bytes {
    let mut frame = FrameBuilder::default();
    frame.changes().push(&Change::Put {
        table: Arc::clone(table),
        op: PutOp::Update,
        row,
        old_key: None,
        former: None,
    });
    frame.end_txn(&TxnHeader {
        position: Position::ZERO,
        stamp: Stamp::ZERO,
        deps: Vector::new(),
        xid: 0,
        commit_us: 0,
        witness_us: 0,
        change_count: 1,
    });
    frame.finish()
}

/// And back.
fn decode(payload: Bytes) -> Result<(Arc<TableDesc>, RowImage), Malformed> {
    let mut cache = TableCache::default();
    let mut reader = FrameReader::new(NodeId(1), payload, &mut cache)?;
    let Some(Record::Txn(_, mut changes)) = reader.next_record()? else {
        return Err(Malformed("a row without its table"));
    };
    match changes.next_change()? {
        Some(Change::Put { table, row, .. }) => Ok((table, row)),
        _ => Err(Malformed("no row where one is expected")),
    }
}

#[cfg(test)]
mod tests {
    use anabranch_proto::row::Cell;
    use anabranch_proto::schema::ColumnDesc;

    use super::*;

    #[test]
    fn a_row_survives_its_travel() {
        let column = |name: &str| ColumnDesc {
            name: name.to_owned(),
            type_oid: 25,
            type_mod: -1,
            type_name: "pg_catalog.text".to_owned(),
        };
        let table = Arc::new(TableDesc {
            schema: "s".to_owned(),
            name: "t".to_owned(),
            columns: vec![column("a"), column("b")],
            key: vec![0],
            identity_full: false,
        });
        let row = RowImage::build([Cell::Binary(b"k"), Cell::Null].into_iter());
        let (described, decoded) = decode(encode(&table, row.clone())).unwrap();
        assert_eq!((described, decoded), (table, row));
        assert!(decode(Bytes::from_static(b"nonsense")).is_err());
    }
}
