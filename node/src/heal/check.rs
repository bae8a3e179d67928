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
    if known.held.last.is_none() {
        return refused(format!(
            "the server lacks all that the journal still holds of this node's transactions, from {} on: what came before \
             was let go of, so what it lacks cannot be told; see docs/errors/the-server-went-back.md",
            last.position
        ));
    }
    // A copy that ran on its old timeline before has other WAL where the journal's last transactions are.
    let next = match known.held.missing(sql, config.node.id, progress).await? {
        Ok(next) => next,
        Err(missing) => return refused(format!("{missing}: {RESTORED}")),
    };
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
