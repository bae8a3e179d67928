//! Transaction ids, of which decoding and rows tell the lower half.
//!
//! In:   32 bits of an id      Out: SQL that asks about the transaction; whether it had ended at a moment
//! Not here: whose transactions these are

use std::collections::HashSet;

use tokio_postgres::Client;

/// A snapshot `x.s`, of now, and its end `x.max`: in what follows [`visible`].
pub const SNAPSHOT: &str =
    "(SELECT s, pg_snapshot_xmax(s)::text::int8 AS max FROM pg_current_snapshot() AS s) AS x";

/// SQL: has the transaction with this id (a `bigint`, of 32 bits) ended before snapshot `x.s`?
///
/// Of all ids with these lower bits it is the one that is next to the snapshot's end, on either side: one that runs may be
/// above the end, when nothing above it has ended yet.
#[must_use]
pub fn visible(xid: &str) -> String {
    format!(
        "pg_visible_in_snapshot((x.max + ((({xid} - x.max) & 4294967295) # 2147483648) - 2147483648)::text::xid8, x.s)"
    )
}

/// SQL: those of the transactions in `$1` (`bigint[]`) that are not visible yet.
#[must_use]
pub fn hidden() -> String {
    format!(
        "SELECT xid FROM unnest($1::int8[]) AS xid, {SNAPSHOT} WHERE NOT {}",
        visible("xid")
    )
}

/// SQL: what is visible now, for [`Snapshot::parse`].
pub const NOW: &str = "SELECT pg_current_snapshot()::text";

/// What one statement of the server saw.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// From here on none had ended.
    end: u64,
    /// Of those below `end` these had not, in order.
    running: Vec<u64>,
}

impl Snapshot {
    /// As the server prints a `pg_snapshot`: `xmin:xmax:xip,xip` (PostgreSQL docs, 9.27, "Snapshot Components"). None for anything else.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split(':').skip(1);
        let end = parts.next()?.parse().ok()?;
        let ids = parts.next()?.split(',').filter(|id| !id.is_empty());
        let mut running = ids.map(str::parse).collect::<Result<Vec<u64>, _>>().ok()?;
        running.sort_unstable();
        Some(Self { end, running })
    }

    /// Had the transaction with this id ended? Of all ids with these lower bits it is the one next to the snapshot's end, as in
    /// [`visible`].
    #[must_use]
    pub fn shows(&self, xid: u32) -> bool {
        let behind = ((self.end & 0xFFFF_FFFF) as u32).wrapping_sub(xid);
        let has_begun = (1..=u32::MAX / 2).contains(&behind);
        let id = self.end.saturating_sub(behind.into());
        has_begun && self.running.binary_search(&id).is_err()
    }
}

/// The transactions that had not ended at one moment, by their whole ids.
#[derive(Debug)]
pub struct Running {
    /// Every transaction of before that moment has a lower id.
    next: u64,
    /// From here on none had ended.
    end: u64,
    /// Of those below `end` these had not.
    ids: HashSet<u64>,
}

impl Running {
    /// Those of now. Uses up one id.
    ///
    /// # Errors
    /// When the statement fails.
    pub async fn now(sql: &Client) -> Result<Self, tokio_postgres::Error> {
        // The snapshot is of the statement's begin, the id is made after it.
        const SQL: &str = "SELECT pg_current_xact_id()::text::int8, pg_snapshot_xmax(s)::text::int8, \
            ARRAY(SELECT xip::text::int8 FROM pg_snapshot_xip(s) AS xip) FROM pg_current_snapshot() AS s";
        let row = sql.query_one(SQL, &[]).await?;
        let whole = |id: i64| u64::try_from(id).unwrap_or(0);
        Ok(Self {
            next: whole(row.try_get(0)?),
            end: whole(row.try_get(1)?),
            ids: row.try_get::<_, Vec<i64>>(2)?.into_iter().map(whole).collect(),
        })
    }

    /// Is the transaction with this id, whose commit was in the WAL at that moment, among them?
    ///
    /// It may be of very long ago: of all ids with these lower bits it is taken for the last that there was, so one of long ago is
    /// not taken for one that is still to come.
    #[must_use]
    pub fn holds(&self, xid: u32) -> bool {
        let age = ((self.next & 0xFFFF_FFFF) as u32).wrapping_sub(xid);
        let id = self.next.saturating_sub(age.into());
        id >= self.end || self.ids.contains(&id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn running(next: u64, end: u64, ids: &[u64]) -> Running {
        Running {
            next,
            end,
            ids: ids.iter().copied().collect(),
        }
    }

    #[test]
    fn a_snapshot_shows_what_had_ended() {
        let wrap = 1_u64 << 32;
        for start in [1_000, wrap, 7 * wrap + 5] {
            let text = format!("{}:{}:{},{}", start + 1, start + 4, start + 1, start + 3);
            let snapshot = Snapshot::parse(&text).unwrap();
            let shown = (0..6).map(|ahead| snapshot.shows(((start - 1 + ahead) & 0xFFFF_FFFF) as u32));
            let expected = [true, true, false, true, false, false];
            assert!(shown.eq(expected), "{text}");
        }
        assert!(Snapshot::parse("10:10:").unwrap().shows(9));
        for nothing in ["", "10", "10:11", "10:x:", "10:11:12,x"] {
            assert!(Snapshot::parse(nothing).is_none(), "{nothing}");
        }
    }

    #[test]
    fn what_has_not_ended_is_told_from_what_was_long_ago() {
        let wrap = 1_u64 << 32;
        for start in [1_000, wrap + 1_000, wrap + 2] {
            let low = |id: u64| (id & 0xFFFF_FFFF) as u32;
            let now = running(start + 10, start + 5, &[start + 1]);
            for (id, expected) in [
                (start - 1, false),
                (start, false),
                (start + 1, true),
                (start + 2, false),
                (start + 4, false),
                // Runs, and nothing above it has ended.
                (start + 5, true),
                (start + 9, true),
            ] {
                assert_eq!(now.holds(low(id)), expected, "{id} of {start}");
            }
        }
        // More than half of all ids ago: the nearest with these lower bits would be one that is still to come.
        let now = running(2 * wrap + 10, 2 * wrap + 9, &[]);
        assert!(!now.holds(1_000));
        assert!(!now.holds(1 << 30));
    }
}
