//! Rows of the daemon's own tables, as they come in the stream.
//!
//! In:   changes            Out: progress, clock witnesses; the change without what is nobody else's business
//! Not here: members (`crate::membership`)

use anabranch_proto::row::RowImage;
use anabranch_proto::schema::TableDesc;
use anabranch_proto::stamp::{STAMP_LEN, Stamp};
use anabranch_proto::txn::Change;
use anabranch_proto::wire::Malformed;
use anabranch_proto::{Lsn, NodeId, Position};

use crate::membership::{self, binary, number};
use crate::policy_change;
use crate::setup::{ddl, sequence};

/// (origin, position, stamp) of a row of `anabranch.progress`.
pub(super) fn progress_row(
    table: &TableDesc,
    row: &RowImage,
) -> Result<(NodeId, Position, Stamp), Malformed> {
    let origin =
        u16::try_from(number::<4>(table, row, "origin")?).map_err(|_| Malformed("an origin out of range"))?;
    let epoch =
        u32::try_from(number::<8>(table, row, "epoch")?).map_err(|_| Malformed("an epoch out of range"))?;
    let lsn = number::<8>(table, row, "lsn")?;
    let stamp: [u8; STAMP_LEN] = binary(table, row, "stamp")?
        .try_into()
        .map_err(|_| Malformed("a stamp of wrong length"))?;
    Ok((
        NodeId(origin),
        Position { epoch, lsn: Lsn(lsn) },
        Stamp::from_bytes(stamp),
    ))
}

/// (node, witness in microseconds since the Unix epoch) of a row of `anabranch.clock`.
pub(super) fn clock_row(table: &TableDesc, row: &RowImage) -> Result<(NodeId, i64), Malformed> {
    let node = u16::try_from(number::<4>(table, row, "node_id")?)
        .map_err(|_| Malformed("a node id out of range"))?;
    let witness = number::<8>(table, row, "witness_us")?;
    Ok((NodeId(node), i64::try_from(witness).unwrap_or(0)))
}

/// The change without the daemon's own tables; `None` if nothing is left.
pub(super) fn without_own(change: Change) -> Option<Change> {
    match change {
        Change::Put { ref table, .. } => {
            let travels = [
                membership::TABLE,
                sequence::TABLE,
                ddl::TABLE,
                policy_change::TABLE,
            ]
            .contains(&table.name.as_str());
            (!table.is_own() || travels).then_some(change)
        }
        // What a node takes back of a sequence (`crate::daemon`). Nothing else of ours is deleted for others.
        Change::Delete { ref table, .. } => {
            (!table.is_own() || table.name == sequence::TABLE).then_some(change)
        }
        Change::Truncate {
            mut tables,
            cascade,
            restart_identity,
        } => {
            tables.retain(|table| !table.is_own());
            (!tables.is_empty()).then_some(Change::Truncate {
                tables,
                cascade,
                restart_identity,
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use anabranch_proto::row::Cell;

    use super::*;

    #[test]
    fn what_a_node_takes_back_of_a_sequence_travels_and_no_other_deletion_of_ours() {
        let travels = |schema: &str, name: &str| {
            let table = TableDesc {
                schema: schema.to_owned(),
                name: name.to_owned(),
                columns: Vec::new(),
                key: vec![0],
                identity_full: false,
            };
            let key = RowImage::build([Cell::Binary(b"x")].into_iter());
            without_own(Change::Delete {
                table: Arc::new(table),
                key,
            })
            .is_some()
        };
        assert!(travels("anabranch", sequence::TABLE) && travels("public", "sequence"));
        for name in [membership::TABLE, ddl::TABLE, "progress", "clock"] {
            assert!(!travels("anabranch", name), "{name}");
        }
    }
}
