//! The fence: waiting until the decoder has met every commit that could be seen.
//!
//! Source: `docs/design.md` section 7. Walsenders send only flushed WAL, and an asynchronous commit is visible
//! before it is flushed, so a tiny synchronous commit on a session of its own forces the flush first.

use std::sync::atomic::Ordering;
use std::time::Duration;

use anabranch_proto::Lsn;
use tokio_postgres::{Client, Row};

use crate::broken::{self, Rule};
use crate::config::Config;
use crate::pg::xid::Snapshot;
use crate::pg::{self, Prepared};
use crate::shared::Shared;

/// How long a batch that holds locks waits for the decoder before it lets go and starts again.
const PATIENCE: Duration = Duration::from_secs(2);

/// The decoder did not get there.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The side session failed.
    #[error("fence: {}", crate::error::sql(.0))]
    Sql(#[from] tokio_postgres::Error),
    /// The decoder is behind.
    #[error(
        "the decoder is at {at} and has not reached {wanted}: is the walsender busy with a large transaction?"
    )]
    Behind {
        /// Where it is.
        at: Lsn,
        /// Where it should be.
        wanted: Lsn,
    },
    /// No side session.
    #[error(transparent)]
    Connect(#[from] pg::Error),
}

const INSERT_LSN: &str = "SELECT (pg_current_wal_insert_lsn() - '0/0')::int8";
const COMMIT: &str = "UPDATE anabranch.fence SET n = n + 1 WHERE id = 1";
const HORIZON: &str = "SELECT pg_snapshot_xmin(s.s)::text::int8, \
    (pg_current_wal_insert_lsn() - '0/0')::int8, current_setting('synchronous_standby_names'), \
    (pg_current_wal_flush_lsn() - '0/0')::int8, s.s::text FROM (SELECT pg_current_snapshot() AS s) AS s";

/// What the server says when it is asked for a horizon.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// Every transaction below this one (64 bits, the epoch in the upper half) that committed is decoded ...
    pub xid: u64,
    /// ... once the decoder has passed this LSN.
    pub lsn: u64,
    /// WAL up to here is flushed: what the server may send.
    pub flushed: u64,
    /// `synchronous_standby_names`.
    pub standbys: String,
    /// What was visible at that moment.
    pub snapshot: Option<Snapshot>,
}

/// A session for fences and horizons.
pub struct Fence {
    client: Client,
    insert_lsn: Prepared,
    commit: Prepared,
    horizon: Prepared,
}

/// An LSN just past a page header is never reported as such by the walsender: compare with the page's start.
#[must_use]
pub fn reportable(lsn: u64) -> u64 {
    const PAGE: u64 = 8_192;
    // The long header, at the start of a segment, has 40 bytes.
    if lsn % PAGE <= 40 { lsn - lsn % PAGE } else { lsn }
}

impl Fence {
    /// Opens the session.
    ///
    /// # Errors
    /// When the server cannot be reached.
    pub async fn open(config: &Config) -> Result<Self, Error> {
        let (client, _driver) = pg::connect(&config.postgres, "fence").await?;
        // `local`: a synchronous standby must not make the fence wait, only our own disk.
        client
            .batch_execute("SET synchronous_commit = local; SET default_transaction_read_only = off")
            .await?;
        Ok(Self {
            client,
            insert_lsn: Prepared::default(),
            commit: Prepared::default(),
            horizon: Prepared::default(),
        })
    }

    /// Waits until everything that was committed before the call is decoded.
    ///
    /// # Errors
    /// When the server is gone or the decoder does not get there within a few seconds.
    pub async fn pass(&self, shared: &Shared) -> Result<(), Error> {
        self.pass_within(shared, PATIENCE).await
    }

    /// [`Self::pass`] for one who holds up nobody while it waits.
    ///
    /// # Errors
    /// When the server is gone or the decoder does not get there within `patience`.
    pub async fn pass_within(&self, shared: &Shared, patience: Duration) -> Result<(), Error> {
        if broken::is(Rule::Fence) {
            return Ok(());
        }
        let insert_lsn = self.insert_lsn.of(&self.client, INSERT_LSN).await?;
        let commit = self.commit.of(&self.client, COMMIT).await?;
        // Sent at once, and run in this order.
        let (wanted, committed) = tokio::join!(
            self.client.query_one(insert_lsn, &[]),
            self.client.execute(commit, &[])
        );
        let wanted = lsn_of(&wanted?)?;
        committed?;
        wait_decoded(shared, wanted, patience).await
    }

    /// The server's WAL insert position.
    ///
    /// # Errors
    /// When the server is gone.
    pub async fn insert_lsn(&self) -> Result<u64, Error> {
        let statement = self.insert_lsn.of(&self.client, INSERT_LSN).await?;
        lsn_of(&self.client.query_one(statement, &[]).await?)
    }

    /// A horizon candidate.
    ///
    /// # Errors
    /// When the server is gone.
    pub async fn horizon(&self) -> Result<Candidate, Error> {
        let statement = self.horizon.of(&self.client, HORIZON).await?;
        let row = self.client.query_one(statement, &[]).await?;
        let number = |at| Ok::<_, Error>(u64::try_from(row.try_get::<_, i64>(at)?).unwrap_or(0));
        Ok(Candidate {
            xid: number(0)?,
            lsn: number(1)?,
            standbys: row.try_get(2)?,
            flushed: number(3)?,
            snapshot: Snapshot::parse(row.try_get(4)?),
        })
    }

    /// Asks something of the committed state: an apply transaction that is open does not show here.
    pub(crate) async fn query(&self, sql: &str) -> Result<Vec<Row>, tokio_postgres::Error> {
        self.client.query(sql, &[]).await
    }

    /// Has the side session ended?
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.client.is_closed()
    }
}

fn lsn_of(row: &Row) -> Result<u64, Error> {
    Ok(u64::try_from(row.try_get::<_, i64>(0)?).unwrap_or(0))
}

/// Waits until the decoder has passed `lsn`.
///
/// # Errors
/// When it does not within `patience`.
pub async fn wait_decoded(shared: &Shared, lsn: u64, patience: Duration) -> Result<(), Error> {
    let wanted = reportable(lsn);
    shared.decoder_wanted.fetch_max(wanted, Ordering::Relaxed);
    let mut decoded = shared.decoded.subscribe();
    let deadline = tokio::time::Instant::now() + patience;
    loop {
        if *decoded.borrow_and_update() >= wanted {
            return Ok(());
        }
        if tokio::time::Instant::now() >= deadline {
            return Err(Error::Behind {
                at: Lsn(*shared.decoded.borrow()),
                wanted: Lsn(wanted),
            });
        }
        shared.ping.notify_one();
        // Ask again now and then: the walsender may have answered before it read so far.
        let _ = tokio::time::timeout(Duration::from_millis(2), decoded.changed()).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_position_just_past_a_page_header_counts_as_the_page_start() {
        assert_eq!(reportable(8_192 + 24), 8_192);
        assert_eq!(reportable(16_777_216 + 40), 16_777_216);
        assert_eq!(reportable(8_192 + 41), 8_192 + 41);
    }
}
