//! What became of the donor's tables since the snapshot was cut: are the copied rows the rows of then?
//!
//! In:   a session on the donor's snapshot, and one that sees the catalog of now        Out: rows copied once more; or what
//!       makes the snapshot useless
//! Invariants: 1. no rows are taken for a table's rows unless the table's file was the same at the cut and when they were read, or nothing
//!        but its file has changed. An older snapshot sees nothing in a table that was rewritten or emptied since, and nobody says so:
//!        <https://www.postgresql.org/docs/current/mvcc-caveats.html>. VACUUM FULL and CLUSTER keep what it sees, at other
//!        places: a table that is read in pieces would lack rows; 2. nothing is locked at the donor when a call returns: whoever waits for a lock
//!        of ours would make `pg_dump` wait behind him, for ever
//! Not here: reading ([`super::copy`])

use std::collections::HashMap;

use tokio_postgres::Client;

use super::copy::{self, Table};
use super::state::{done, is_done};
use super::waiting::connect_donor;
use super::{Error, Options, Source, on_snapshot, sql};
use crate::donor::Cut;

/// The tables that the donor published at the cut. (View `pg_publication_tables` shows those of now, whatever the snapshot.) Partitions
/// are published with their table; what only inherits from one is by itself, or is not.
const PUBLISHED: &str = "
    WITH RECURSIVE chosen AS (
        SELECT r.prrelid AS oid FROM pg_publication_rel r JOIN pg_publication p ON p.oid = r.prpubid WHERE p.pubname = $1
        UNION SELECT i.inhrelid FROM pg_inherits i JOIN chosen ON i.inhparent = chosen.oid
        JOIN pg_class part ON part.oid = i.inhrelid AND part.relispartition)
    SELECT c.oid FROM pg_class c JOIN chosen USING (oid)
    WHERE c.relkind = 'r' AND c.relnamespace <> to_regnamespace('anabranch')";

/// Where a table's rows are, and everything in the catalog that a statement changes when it makes other rows of them: the
/// transactions that wrote its columns' descriptions, its access method, its persistence. (TRUNCATE, VACUUM FULL, CLUSTER and SET
/// TABLESPACE change the file alone.)
const STANDS: &str = "
    SELECT c.oid, format('%I.%I', n.nspname, c.relname), c.relfilenode,
           concat_ws(' ', c.relam, c.relpersistence,
               (SELECT string_agg(concat_ws(':', a.attnum, a.xmin), ',' ORDER BY a.attnum)
                FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attnum > 0))
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE c.oid = ANY ($1)";

/// How often a table may be emptied while its rows are read again.
const PATIENCE: u32 = 20;

const LOOK: &str = "look whether the donor's tables were rewritten";
const SETTLED: &str = "rows looked at";

/// A table as a catalog has it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Stand {
    name: String,
    file: u32,
    shape: String,
}

/// What became of the tables.
#[derive(Debug, Default, PartialEq, Eq)]
struct Fate {
    /// Dropped, or their rows were made anew.
    gone: Vec<String>,
    /// Their rows are in another file, and nothing else has changed.
    moved: Vec<u32>,
}

/// `read` has the files that rows were read from after the cut.
fn fate(then: &HashMap<u32, Stand>, now: &HashMap<u32, Stand>, read: &HashMap<u32, u32>) -> Fate {
    let mut out = Fate::default();
    for (oid, before) in then {
        match now.get(oid) {
            Some(now) if now.file == read.get(oid).copied().unwrap_or(before.file) => {}
            Some(now) if now.shape == before.shape => out.moved.push(*oid),
            Some(_) | None => out.gone.push(before.name.clone()),
        }
    }
    out.gone.sort();
    out
}

/// Tables that cannot be asked for as the snapshot shows them: dropped, or with another name or other columns.
fn altered(then: &HashMap<u32, Stand>, now: &HashMap<u32, Stand>) -> Vec<String> {
    let is_same = |before: &Stand, now: &Stand| now.name == before.name && now.shape == before.shape;
    let mut out: Vec<String> = then
        .iter()
        .filter(|(oid, before)| !now.get(oid).is_some_and(|now| is_same(before, now)))
        .map(|(_, before)| before.name.clone())
        .collect();
    out.sort();
    out
}

async fn stands(client: &Client, oids: &[u32]) -> Result<HashMap<u32, Stand>, Error> {
    let rows = client.query(STANDS, &[&oids]).await.map_err(sql(LOOK))?;
    rows.iter()
        .map(|row| {
            let stand = Stand {
                name: row.try_get(1)?,
                file: row.try_get(2)?,
                shape: row.try_get(3)?,
            };
            Ok((row.try_get(0)?, stand))
        })
        .collect::<Result<_, tokio_postgres::Error>>()
        .map_err(sql(LOOK))
}

/// The donor's tables in the snapshot, and a session that sees them as they are now.
pub(super) struct Moved<'a> {
    options: &'a Options,
    cut: &'a Cut,
    then: HashMap<u32, Stand>,
    now: Client,
}

impl<'a> Moved<'a> {
    pub(super) async fn open(options: &'a Options, cut: &'a Cut, from: &Source) -> Result<Self, Error> {
        let oids: Vec<u32> = from
            .client
            .query(PUBLISHED, &[&from.publication])
            .await
            .and_then(|rows| rows.iter().map(|row| row.try_get(0)).collect())
            .map_err(sql(LOOK))?;
        let now = connect_donor(&options.donor_dsn).await?;
        Ok(Self {
            options,
            cut,
            then: stands(&from.client, &oids).await?,
            now,
        })
    }

    /// Numbers of the tables.
    pub(super) fn tables(&self) -> Vec<u32> {
        self.then.keys().copied().collect()
    }

    async fn fate(&self, read: &HashMap<u32, u32>) -> Result<Fate, Error> {
        Ok(fate(&self.then, &stands(&self.now, &self.tables()).await?, read))
    }

    /// What makes the snapshot useless, in words, if anything does.
    pub(super) async fn useless(&self) -> Result<Option<String>, Error> {
        Ok(in_words(&self.fate(&HashMap::new()).await?.gone))
    }

    /// What makes the snapshot useless, in words, if it was asked for something that is not there: rows are read with the server's catalog
    /// of now, and whoever was renamed, or has lost a column, cannot be read by the snapshot's names any more. (What was read before is
    /// right.)
    pub(super) async fn altered(&self) -> Result<Option<String>, Error> {
        let altered = altered(&self.then, &stands(&self.now, &self.tables()).await?);
        Ok((!altered.is_empty()).then(|| {
            format!(
                "{} was renamed or altered at the donor since the snapshot was cut",
                altered.join(", ")
            )
        }))
    }

    /// Asked when all tables are copied. Tables that only moved are copied again, each in one piece. (A table that was emptied
    /// is empty then: the TRUNCATE is in the stream behind the cut, and takes the rows of the cut away from everybody.) Says what
    /// makes the snapshot useless, if anything does.
    pub(super) async fn settle(&self, admin: &Client) -> Result<Option<String>, Error> {
        if is_done(admin, SETTLED).await? {
            return Ok(None);
        }
        let mut read = HashMap::new();
        for _ in 0..PATIENCE {
            let Fate { gone, moved } = self.fate(&read).await?;
            if let Some(gone) = in_words(&gone) {
                return Ok(Some(gone));
            }
            if moved.is_empty() {
                admin
                    .batch_execute(&done(SETTLED))
                    .await
                    .map_err(sql("write down that the rows are right"))?;
                return Ok(None);
            }
            let donor = connect_donor(&self.options.donor_dsn).await?;
            on_snapshot(&donor, self.cut).await?;
            for table in copy::tables_of(&donor, &moved).await? {
                read.insert(table.oid, again(&donor, admin, &table).await?);
            }
        }
        Err(Error::Refused(
            "tables are emptied or moved at the donor (TRUNCATE, VACUUM FULL) as often as they are copied: run the join again when that is over"
                .to_owned(),
        ))
    }
}

fn in_words(gone: &[String]) -> Option<String> {
    (!gone.is_empty()).then(|| {
        format!(
            "{} was rewritten or dropped at the donor since the snapshot was cut",
            gone.join(", ")
        )
    })
}

/// Copies a whole table in place of what was copied of it. Returns the file that was read.
async fn again(donor: &Client, admin: &Client, table: &Table) -> Result<u32, Error> {
    let what = format!("copy {} again", table.label());
    admin
        .batch_execute(&format!(
            "BEGIN; SET LOCAL session_replication_role = replica; TRUNCATE ONLY {}",
            table.qualified()
        ))
        .await
        .map_err(sql(what.as_str()))?;
    copy::whole(donor, admin, table).await?;
    admin.batch_execute("COMMIT").await.map_err(sql(what.as_str()))?;
    // The lock of the COPY lasts as long as the session's transaction: it is this file that was read.
    let row = donor
        .query_one("SELECT pg_relation_filenode($1::oid)", &[&table.oid])
        .await
        .map_err(sql(LOOK))?;
    row.try_get(0).map_err(sql(LOOK))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stands(all: &[(u32, u32, &str)]) -> HashMap<u32, Stand> {
        let stand = |(oid, file, shape): &(u32, u32, &str)| {
            let stand = Stand {
                name: format!("t{oid}"),
                file: *file,
                shape: (*shape).to_owned(),
            };
            (*oid, stand)
        };
        all.iter().map(stand).collect()
    }

    #[test]
    fn another_file_alone_is_a_move_and_with_other_columns_a_rewrite() {
        let then = stands(&[
            (1, 10, "a"),
            (2, 20, "a"),
            (3, 30, "a"),
            (4, 40, "a"),
            (5, 50, "a"),
        ]);
        let now = stands(&[(1, 10, "a"), (2, 21, "a"), (3, 31, "b"), (5, 50, "b")]);
        let found = fate(&then, &now, &HashMap::new());
        assert_eq!(found.moved, [2]);
        assert_eq!(found.gone, ["t3", "t4"]);
        // Rows that were read from the new file are right; from the one between they are not.
        assert!(fate(&then, &now, &HashMap::from([(2, 21)])).moved.is_empty());
        assert_eq!(fate(&then, &now, &HashMap::from([(2, 20)])).moved, [2]);
    }

    #[test]
    fn what_has_another_name_or_other_columns_cannot_be_asked_for() {
        let then = stands(&[(1, 10, "a"), (2, 20, "a"), (3, 30, "a"), (4, 40, "a")]);
        let mut now = stands(&[(1, 11, "a"), (2, 20, "b"), (3, 30, "a")]);
        if let Some(third) = now.get_mut(&3) {
            third.name = "renamed".to_owned();
        }
        assert_eq!(altered(&then, &now), ["t2", "t3", "t4"]);
        assert_eq!(altered(&then, &then), <[&str; 0]>::default());
    }
}
