//! Writing rows of the gap again: local transactions that change nothing, in the new slot's stream.
//!
//! In:   rows of the gap, in portions            Out: transactions, the record
//! Holds: a session
//! Invariants: 1. a row is written as it is and only while its xmin is that of the gap: who has written it since is in the
//!        new slot's stream; 2. each transaction begins with the row of `anabranch.clock` by which capture knows it, so it is no
//!        echo, says nothing of whether its rows were there before, and is stamped with the time when they were written, as
//!        far as that is known and nothing later was stamped here before
//! On crash: what was committed is in the slot's stream; the rest still has its xmins
//! Not here: which rows ([`super::gap`])

use std::time::Duration;

use anabranch_proto::Lsn;
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use super::gap::{Place, Table};
use super::state::{Line, Record};
use super::{Error, Event, Watch, io, waits};
use crate::config::Config;
use crate::pg;

/// Rows of one statement.
const ROWS_AT_ONCE: usize = 1_000;
/// Rows of one transaction, also where more were written by one.
const TRANSACTION_ROWS: usize = 50_000;
/// Tries of a transaction that meets locks.
const TRIES: u32 = 240;
/// After so many it is said for whom it waits, some seconds each time.
const TRIES_TOLD: u32 = 8;

/// Locks are let go after a moment, before the server looks for deadlocks: it is the application that shall get on.
const SETTINGS: &str = "SET session_replication_role = replica; SET lock_timeout = '500ms'; SET synchronous_commit = off; \
    SET default_transaction_read_only = off; SET enable_seqscan = off; SET enable_hashjoin = off; \
    SET enable_mergejoin = off; SET jit = off";

/// Not later than this: earlier than any time that a server tells.
const UNKNOWN_US: i64 = 1;

pub(super) struct Again {
    client: Client,
}

impl Again {
    pub(super) async fn open(config: &Config) -> Result<Self, Error> {
        let (client, _driver) = pg::connect(&config.postgres, "heal").await?;
        client.batch_execute(SETTINGS).await?;
        client.batch_execute(pg::ROW_SECURITY_OF_OTHERS).await?;
        Ok(Self { client })
    }

    /// Its session, which may write, and whose settings must stay as they are.
    pub(super) const fn client(&self) -> &Client {
        &self.client
    }

    /// What `anabranch.clock` says for no node: made if it is missing, since only its update tells.
    pub(super) async fn first_witness(&self) -> Result<i64, Error> {
        self.client
            .execute(
                "INSERT INTO anabranch.clock (node_id, witness_us) VALUES (0, $1) ON CONFLICT DO NOTHING",
                &[&crate::shared::now_us()],
            )
            .await?;
        let row = self
            .client
            .query_one("SELECT witness_us FROM anabranch.clock WHERE node_id = 0", &[])
            .await?;
        Ok(row.try_get(0)?)
    }

    /// Puts the row back, and waits until all is flushed. Gives a place in the WAL behind all that was written again.
    pub(super) async fn end(&self, first_witness: i64) -> Result<Lsn, Error> {
        self.client
            .batch_execute("SET synchronous_commit = local")
            .await?;
        self.client
            .execute(
                "UPDATE anabranch.clock SET witness_us = $1 WHERE node_id = 0",
                &[&first_witness],
            )
            .await?;
        let row = self
            .client
            .query_one("SELECT (pg_current_wal_insert_lsn() - '0/0')::int8", &[])
            .await?;
        Ok(Lsn(u64::try_from(row.try_get::<_, i64>(0)?).unwrap_or(0)))
    }

    /// Writes a portion again, what one transaction had written in one, oldest first; how many rows.
    pub(super) async fn write(
        &self,
        tables: &[Table],
        mut rows: Vec<Place>,
        record: &mut Record,
        watch: &Watch,
    ) -> Result<u64, Error> {
        rows.sort_unstable_by_key(|row| (row.at_us, row.table, row.page, row.line));
        let mut count = 0;
        let mut rest = rows.as_slice();
        while let Some(first) = rest.first() {
            let same = rest.iter().take(TRANSACTION_ROWS);
            let same = same.take_while(|row| row.at_us == first.at_us).count();
            let (some, after) = rest.split_at(same);
            rest = after;
            let rows = (some, first.at_us);
            count += self.transaction(tables, rows, record, watch).await?;
        }
        Ok(count)
    }

    async fn transaction(
        &self,
        tables: &[Table],
        (rows, at_us): (&[Place], Option<i64>),
        record: &mut Record,
        watch: &Watch,
    ) -> Result<u64, Error> {
        let mut tries: u32 = 0;
        loop {
            let failed = match self.attempt(tables, rows, at_us, record).await {
                Ok(count) => return Ok(count),
                Err(error) => error,
            };
            // Fails where the connection is gone, and then what failed says so.
            let _ = self.client.batch_execute("ROLLBACK").await;
            let again = match &failed {
                Error::Sql(error) => error.code().is_some_and(|code| {
                    [SqlState::LOCK_NOT_AVAILABLE, SqlState::T_R_DEADLOCK_DETECTED].contains(code)
                }),
                _ => false,
            };
            tries += 1;
            if !again || tries >= TRIES {
                return Err(failed);
            }
            if tries.is_multiple_of(TRIES_TOLD) {
                let on = waits::holders(&self.client).await?;
                watch(Event::Waiting { on });
            }
            tokio::time::sleep(Duration::from_millis(250)).await;
        }
    }

    async fn attempt(
        &self,
        tables: &[Table],
        rows: &[Place],
        at_us: Option<i64>,
        record: &mut Record,
    ) -> Result<u64, Error> {
        self.client.batch_execute("BEGIN").await?;
        self.client
            .execute(
                "UPDATE anabranch.clock SET witness_us = $1 WHERE node_id = 0",
                &[&at_us.unwrap_or(UNKNOWN_US)],
            )
            .await?;
        let mut lines = Vec::with_capacity(rows.len());
        for of_table in rows.chunk_by(|a, b| a.table == b.table) {
            let Some(at) = of_table.first().map(|row| row.table) else {
                continue;
            };
            let Some(table) = tables.get(at) else { continue };
            let Some(sql) = table.compared.again_sql() else {
                return Err(Error::Refused(format!(
                    "table {} has nothing but a key that is always generated, so its rows cannot be written again: delete and \
                     insert those written since the slot was lost (OVERRIDING SYSTEM VALUE), then run this again",
                    table.name()
                )));
            };
            for some in of_table.chunks(ROWS_AT_ONCE) {
                let places: Vec<String> = some.iter().map(Place::ctid).collect();
                let xmins: Vec<i64> = some.iter().map(|row| i64::from(row.xmin)).collect();
                for row in self.client.query(&sql, &[&places, &xmins]).await? {
                    let key: String = row.try_get(0)?;
                    let line = Line::of(super::AGAIN, &table.name());
                    lines.push(line.with_json("key", &key).with("written_us", at_us));
                }
            }
        }
        // Before the commit: rather told twice than not at all.
        record.add(&lines).map_err(io("write the record"))?;
        self.client.batch_execute("COMMIT").await?;
        Ok(lines.len() as u64)
    }
}
