//! Hashes of blocks, and rows of some blocks, read piece by piece.
//!
//! In:   a table, columns, blocks that are wanted            Out: [`Answer`]s, a message at a time
//! Holds: a snapshot, for [`SNAPSHOT_MAX`] and one piece at most
//! Not here: what is done with them (`super::super::run`)

use std::time::Duration;

use anabranch_proto::link as pb;
use bytes::Bytes;
use futures_util::StreamExt;
use pb::verify_response::Answer;
use tokio::time::Instant;

use super::super::SNAPSHOT_MAX;
use super::super::blocks::BITS_MAX;
use super::super::table::{self, Compared};
use super::{Conversation, Error};

/// Rows that one statement of a scan reads, about, at least and at most. Who asks waits for a few minutes at most without hearing a word.
const PIECE_ROWS: (u64, u64) = (100, 1_000_000);
/// Bytes that it reads, about, as they are on disk: rows may be large.
const PIECE_BYTES: u64 = 128 << 20;
/// Rows in one message.
const MESSAGE_ROWS: usize = 2_000;

impl Conversation {
    /// Reads the table piece by piece.
    pub(super) async fn scan(&mut self, scan: &pb::VerifyScan) -> Result<(), Error> {
        let table = self.table(&scan.schema, &scan.name).await?;
        known(&table, &scan.columns)?;
        if self.snapshot_since.is_none() {
            self.snapshot().await?;
        }
        let size = self
            .sql()?
            .query_one(table::SIZE, &[&scan.schema, &scan.name])
            .await?;
        let (pages, page_rows, bytes): (i64, f64, i64) =
            (size.try_get(0)?, size.try_get(1)?, size.try_get(2)?);
        let (pages, bytes) = (
            u64::try_from(pages).unwrap_or(0),
            u64::try_from(bytes).unwrap_or(0),
        );
        let pace = match (scan.rate, scan.rows_max / 2) {
            (rate, 0) => rate,
            (0, most) => most,
            // Who asks for so many rows has no room for many more.
            (rate, most) => rate.min(most),
        };
        let piece = piece_of((pages, page_rows, bytes), pace);
        let bits = scan.bits.min(BITS_MAX);
        let mut blocks = if scan.wanted.is_empty() {
            vec![(0u64, 0i64); 1 << bits]
        } else {
            Vec::new()
        };
        let (began, mut read, mut sent, mut from) = (Instant::now(), 0u64, 0u64, scan.first_page);
        loop {
            if self
                .snapshot_since
                .is_some_and(|since| since.elapsed() > SNAPSHOT_MAX)
            {
                self.snapshot().await?;
            }
            let to = from.saturating_add(piece);
            // Rows that came since the size was asked are on later pages.
            let last = to >= pages;
            let range = (from, (!last).then_some(to));
            let rows = if scan.wanted.is_empty() {
                let sql = table.blocks_sql(&scan.columns, bits, range);
                self.add_blocks(&sql, &mut blocks).await?
            } else {
                let sql = table.rows_sql(&scan.columns, bits, range);
                sent += self.send_rows(&table, &sql, &scan.wanted).await?;
                // Not those sent, but those looked at.
                (page_rows * (pages.min(to).saturating_sub(from)) as f64) as u64
            };
            read += rows;
            let stops = !last && scan.rows_max > 0 && sent >= scan.rows_max;
            let progress = pb::VerifyProgress {
                rows: read,
                next_page: if stops { to } else { 0 },
            };
            self.say(Answer::Progress(progress)).await?;
            if last || stops {
                break;
            }
            from = to;
            if let Some(due) = (read * 1_000).checked_div(scan.rate) {
                tokio::time::sleep_until(began + Duration::from_millis(due)).await;
            }
        }
        self.end_snapshot().await?;
        for (at, some) in (0u32..).zip(blocks.chunks(MESSAGE_ROWS)) {
            let (counts, hashes) = some.iter().copied().unzip();
            let first = at * MESSAGE_ROWS as u32;
            self.say(Answer::Blocks(pb::VerifyBlocks {
                first,
                counts,
                hashes,
            }))
            .await?;
        }
        Ok(())
    }

    async fn add_blocks(&self, sql: &str, blocks: &mut [(u64, i64)]) -> Result<u64, Error> {
        let rows = self.sql()?.query_raw(sql, Vec::<String>::new()).await?;
        let mut rows = std::pin::pin!(rows);
        let mut read = 0;
        while let Some(row) = rows.next().await {
            let row = row?;
            let (block, count, hash): (i64, i64, i64) = (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
            let count = u64::try_from(count).unwrap_or(0);
            read += count;
            if let Some(slot) = usize::try_from(block).ok().and_then(|at| blocks.get_mut(at)) {
                *slot = (slot.0 + count, slot.1 ^ hash);
            }
        }
        Ok(read)
    }

    /// How many there were.
    async fn send_rows(&self, table: &Compared, sql: &str, wanted: &Bytes) -> Result<u64, Error> {
        let bitmap = wanted.as_ref();
        let rows = self.sql()?.query_raw(sql, [&bitmap]).await?;
        let mut rows = std::pin::pin!(rows);
        let hash_at = table.desc.key.len();
        let (mut message, mut sent) = (pb::VerifyRows::default(), 0);
        while let Some(row) = rows.next().await {
            let row = row?;
            let mut key = Vec::new();
            let image = table.key_image(&row, 0)?;
            table.desc.canonical_key_of_image(&image, &mut key)?;
            message.rows.push(pb::VerifyRow {
                key: key.into(),
                hash: row.try_get(hash_at)?,
            });
            sent += 1;
            if message.rows.len() >= MESSAGE_ROWS {
                self.say(Answer::Rows(std::mem::take(&mut message))).await?;
            }
        }
        if !message.rows.is_empty() {
            self.say(Answer::Rows(message)).await?;
        }
        Ok(sent)
    }
}

/// How many pages one statement reads of a table of so many pages, rows in a page, and bytes.
fn piece_of((pages, page_rows, bytes): (u64, f64, u64), rate: u64) -> u64 {
    let wanted = if rate == 0 { PIECE_ROWS.1 } else { rate };
    let rows = wanted.clamp(PIECE_ROWS.0, PIECE_ROWS.1);
    let by_rows = (rows as f64 / page_rows.max(1.0)) as u64;
    let page_bytes = bytes.checked_div(pages).unwrap_or(0).max(1);
    by_rows.min(PIECE_BYTES / page_bytes).max(1)
}

/// Are these columns of the table here?
pub(super) fn known(table: &Compared, columns: &[String]) -> Result<(), Error> {
    let unknown = columns.iter().find(|name| {
        let mut known = table.desc.columns.iter();
        !known.any(|column| column.name == **name)
    });
    match unknown {
        Some(name) => Err(Error::Other(format!("there is no column {name} here any more"))),
        None if columns.is_empty() => Err(Error::Other("no columns are compared".to_owned())),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_piece_is_of_a_seconds_rows_and_no_more_than_can_be_read_while_somebody_waits() {
        const PAGE: u64 = 8_192;
        let plain = |rate| piece_of((100_000, 50.0, 100_000 * PAGE), rate);
        assert_eq!((plain(100_000), plain(0), plain(1)), (2_000, 16_384, 2));
        // A page points to 50 documents of a megabyte each.
        let large = (1_000, 50.0, 1_000 * (PAGE + (50 << 20)));
        assert_eq!(piece_of(large, 100_000), 2);
        let huge = (10, 50.0, 10 * (1 << 30));
        assert_eq!(piece_of(huge, 0), 1);
        assert_eq!(piece_of((0, 60.0, 0), 0), 16_666);
    }
}
