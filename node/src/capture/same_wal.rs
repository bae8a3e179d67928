//! Is the server's WAL the one that the journal's own transactions were decoded from?
//!
//! In:   the last own transactions of the journal, the database      Out: nothing, or what shows that it is another one
//! Must never: let a server pass that was set back to a copy and went on from there: once its WAL is past the journal's end, all
//!        that it commits below that end would be taken for what the journal has already
//! Not here: what timelines and the WAL's end alone tell (`crate::daemon`); decoding, which must meet the journal's last own
//!        transaction at its place and so finds what this does not (the parent module)

use std::time::Duration;

use anabranch_proto::txn::TxnHeader;
use anabranch_proto::{NodeId, Position, Vector};
use tokio_postgres::Client;

use super::Error;
use super::checkpoint::each_header;
use crate::journal::{self, Journal};
use crate::source::Timelines;

/// A commit is decoded a moment before others can see it: so often it is looked for again, and after this.
const LOOKS: u32 = 10;
const LOOK_AGAIN: Duration = Duration::from_millis(300);

/// Own transactions of the journal that the server must have.
#[derive(Debug, Clone, Default)]
pub struct Marks {
    /// The last one.
    pub last: Option<TxnHeader>,
    /// The last one that is the daemon's heartbeat, if one is known.
    pub heartbeat: Option<TxnHeader>,
}

impl Marks {
    /// Reads them from the journal's end back to `from`, which is where the slot is: all of that is to be decoded again.
    ///
    /// # Errors
    /// When the journal cannot be read.
    pub fn read(
        journal: &Journal,
        node: NodeId,
        from: Position,
        timelines: &Timelines,
    ) -> Result<Self, Error> {
        let mut cursor = match journal.cursor_on(node, from) {
            // What is gone was confirmed before.
            Err(journal::Error::Trimmed { oldest, .. }) => journal.cursor(node, oldest)?,
            cursor => cursor?,
        };
        let (mut marks, mut before) = (Self::default(), None);
        each_header(&mut cursor, node, |header| {
            if timelines.holds(header.position) {
                marks.note(&header, before.as_ref());
            }
            before = Some(header);
            false
        })?;
        Ok(marks)
    }

    /// Meets the next own transaction that the server must have; `before` is the one before it in the stream.
    ///
    /// A heartbeat has no changes, and tells another time than the transaction before it. (Other transactions without changes are of
    /// tables that do not travel.)
    pub(crate) fn note(&mut self, header: &TxnHeader, before: Option<&TxnHeader>) {
        let is_news = before.is_some_and(|before| before.witness_us != header.witness_us);
        if header.change_count == 0 && is_news {
            self.heartbeat = Some(header.clone());
        }
        self.last = Some(header.clone());
    }

    /// What shows that the database lacks something of them, for people; else the server's next transaction id, 64 bits.
    /// `progress` is what the database has applied of others.
    ///
    /// # Errors
    /// When a statement fails.
    pub async fn missing(
        &self,
        sql: &Client,
        node: NodeId,
        progress: &Vector,
    ) -> Result<Result<u64, String>, tokio_postgres::Error> {
        let Some(last) = &self.last else {
            return Ok(Ok(next_xid(sql).await?));
        };
        if let Some(wanted) = &self.heartbeat
            && !shows_heartbeat(sql, node, wanted.xid).await?
        {
            return Ok(Err(format!(
                "the journal holds the daemon's heartbeat of transaction {}, the database shows an earlier one",
                wanted.xid
            )));
        }
        let unapplied = last
            .deps
            .iter()
            .find(|(origin, position)| *origin != node && !progress.covers(*origin, *position));
        if let Some((origin, position)) = unapplied {
            return Ok(Err(format!(
                "this node had applied transactions of node {origin} up to {position}, but the database shows {}",
                progress.get(origin)
            )));
        }
        let next = next_xid(sql).await?;
        Ok(match is_behind(next, last.xid) {
            true => Err(format!(
                "the server's next transaction is {next}, and the journal holds transaction {} as one that it has",
                last.xid
            )),
            false => Ok(next),
        })
    }
}

/// Is the heartbeat that the database shows this one, or a later one? The daemon writes it every second, and nobody else does: a
/// copy from before lacks the last one.
async fn shows_heartbeat(sql: &Client, node: NodeId, wanted: u32) -> Result<bool, tokio_postgres::Error> {
    const SHOWN: &str = "SELECT xmin::text::int8 FROM anabranch.clock WHERE node_id = $1";
    for look in 1..=LOOKS {
        let row = sql.query_opt(SHOWN, &[&i32::from(node.0)]).await?;
        let shown: Option<i64> = row.map(|row| row.try_get(0)).transpose()?;
        let shown = shown.and_then(|shown| u32::try_from(shown).ok());
        if shown.is_some_and(|shown| shown.wrapping_sub(wanted) < 1 << 31) {
            return Ok(true);
        }
        if look < LOOKS {
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }
    Ok(false)
}

/// Has the server, which gives the id `next` now, not come to this transaction yet? The slot keeps it from being more than half
/// of all ids ago.
const fn is_behind(next: u64, xid: u32) -> bool {
    ((next & 0xFFFF_FFFF) as u32).wrapping_sub(xid).wrapping_sub(1) >= 1 << 31
}

/// A transaction id above all that were given so far, 64 bits. It is used up: what a snapshot says is no more than that all up to
/// there have ended, and a commit that waits for a standby is decoded and has not.
async fn next_xid(sql: &Client) -> Result<u64, tokio_postgres::Error> {
    let row = sql
        .query_one("SELECT pg_current_xact_id()::text::int8", &[])
        .await?;
    Ok(u64::try_from(row.try_get::<_, i64>(0)?).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use anabranch_proto::Stamp;

    use super::*;

    fn header(xid: u32, witness_us: i64, change_count: u64) -> TxnHeader {
        TxnHeader {
            position: Position::new(1, u64::from(xid)),
            stamp: Stamp::ZERO,
            deps: Vector::new(),
            xid,
            commit_us: 0,
            witness_us,
            change_count,
        }
    }

    #[test]
    fn a_heartbeat_is_told_from_what_has_no_changes_for_another_reason() {
        let (mut marks, mut before) = (Marks::default(), None);
        for (xid, witness_us, count, heartbeat) in [
            // What came before it is not known.
            (1, 5, 0, None),
            (2, 5, 3, None),
            (3, 9, 0, Some(3)),
            (4, 9, 0, Some(3)),
            (5, 9, 1, Some(3)),
            (6, 11, 0, Some(6)),
        ] {
            let next = header(xid, witness_us, count);
            marks.note(&next, before.as_ref());
            assert_eq!(marks.heartbeat.as_ref().map(|header| header.xid), heartbeat);
            assert_eq!(marks.last.as_ref().map(|header| header.xid), Some(xid));
            before = Some(next);
        }
    }

    #[test]
    fn a_server_is_behind_a_transaction_that_it_has_still_to_give_also_over_a_wrap() {
        for (next, xid, expected) in [
            (100, 99, false),
            (100, 100, true),
            (100, 101, true),
            ((1 << 32) + 5, u32::MAX - 7, false),
            ((1 << 32) - 5, 7, true),
        ] {
            assert_eq!(is_behind(next, xid), expected, "{next} {xid}");
        }
    }
}
