//! May this node be healed? Only where the server is the one that it was, and has all that the journal has, or all up to where
//! a standby of it was promoted.
//!
//! In:   the journal's last own transactions, the horizon, the server      Out: nothing, or why not
//! Must never: let a server pass that was restored from an older copy: what the others hold of this node would not be here
//! Not here: is there anything to heal (the parent module)

use anabranch_proto::Vector;
use tokio_postgres::Client;

use super::gap::Known;
use super::state::Horizon;
use super::{Error, refused};
use crate::config::Config;
use crate::daemon;
use crate::source::{Identity, Timelines};

const RESTORED: &str = "the server was restored from an older copy, or is another one: as it is it cannot come back as this node. \
    Restore the copy once more with a recovery.signal, so that it begins a timeline of its own, then run this again, which puts \
    back what the copy lacks; see docs/errors/the-server-went-back.md";

/// Compares the server with the journal.
pub(super) async fn server(
    config: &Config,
    sql: &Client,
    (identity, timelines): (&Identity, &Timelines),
    (known, horizon): (&Known, Horizon),
    progress: &Vector,
) -> Result<(), Error> {
    let Some(last) = &known.last else {
        return refused(
            "the journal in node.data_dir holds nothing of this node: it was lost or is another node's; see \
             docs/errors/the-journal-was-lost.md",
        );
    };
    if last.position.epoch == identity.timeline && last.position.lsn > identity.written {
        return refused(format!(
            "the journal holds this node's transactions up to {}, but the server's WAL ends at {}: {RESTORED}",
            last.position, identity.written
        ));
    }
    if let Some((first, _)) = known.lacks
        && (first.epoch != last.position.epoch || timelines.left(first.epoch).is_none())
    {
        let left = daemon::left_at(timelines.left(first.epoch));
        return refused(format!(
            "the journal holds this node's transactions up to {}, but in this server's history timeline {} is {left}, so \
             that it is not one branch that it lacks the end of. It cannot come back as this node; see \
             docs/errors/the-server-went-back.md",
            last.position, first.epoch
        ));
    }
    let Some(last) = &known.held else {
        return refused(format!(
            "the server lacks all that the journal still holds of this node's transactions, from {} on: what came before \
             was let go of, so what it lacks cannot be told; see docs/errors/the-server-went-back.md",
            last.position
        ));
    };
    // The daemon's heartbeat is written every second, and by nobody else: a copy from before lacks the last one.
    let heartbeat = sql
        .query_opt(
            "SELECT xmin::text::int8, witness_us FROM anabranch.clock WHERE node_id = $1",
            &[&i32::from(config.node.id.0)],
        )
        .await?;
    let (beat, wanted) = match (heartbeat, &known.heartbeat) {
        (_, None) => (None, None),
        (None, Some(header)) => (None, Some(header.xid)),
        (Some(row), Some(header)) => (u32::try_from(row.try_get::<_, i64>(0)?).ok(), Some(header.xid)),
    };
    if let Some(wanted) = wanted
        && beat.is_none_or(|beat| beat.wrapping_sub(wanted) >= 1 << 31)
    {
        return refused(format!(
            "the journal holds the daemon's heartbeat of transaction {wanted}, the database shows an earlier one: {RESTORED}"
        ));
    }
    let missing = last
        .deps
        .iter()
        .find(|(node, position)| *node != config.node.id && !progress.covers(*node, *position));
    if let Some((node, position)) = missing {
        return refused(format!(
            "this node had applied transactions of node {node} up to {position}, but the database shows {}: {RESTORED}",
            progress.get(node)
        ));
    }
    let next = next_xid(sql).await?;
    // A copy that ran on its old timeline before has other WAL where the journal's last transactions are.
    if ((next & 0xFFFF_FFFF) as u32)
        .wrapping_sub(last.xid)
        .wrapping_sub(1)
        >= 1 << 31
    {
        return refused(format!(
            "the server's next transaction is {next}, and the journal holds transaction {} as one that it has: {RESTORED}",
            last.xid
        ));
    }
    if next < horizon.xid {
        return refused(format!(
            "the server's next transaction is {next}, but the daemon has seen {}: {RESTORED}",
            horizon.xid
        ));
    }
    if next - horizon.xid >= 1 << 31 {
        return refused(
            "more than two thousand million transactions were made since the slot was lost: which rows they wrote cannot be \
             told; see docs/errors/when-a-node-is-lost.md",
        );
    }
    Ok(())
}

/// The server's next transaction id, 64 bits.
pub(super) async fn next_xid(sql: &Client) -> Result<u64, Error> {
    let row = sql
        .query_one("SELECT pg_snapshot_xmax(pg_current_snapshot())::text::int8", &[])
        .await?;
    Ok(u64::try_from(row.try_get::<_, i64>(0)?).unwrap_or(0))
}
