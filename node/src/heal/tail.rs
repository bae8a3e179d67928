//! The lost tail: what the journal holds of this node and a promoted standby lacks is put back into its tables.
//!
//! In:   the journal behind the last transaction that the server has; what it has applied of others      Out: one transaction
//! Holds: keys of the rows that the tail wrote, up to a bound; images of one portion
//! Invariants: 1. all of it or nothing; 2. it begins with `anabranch.progress`, and is over before the new slot begins: it is no
//!        news to anybody, since all others have these writes with their stamps and positions; 3. a row that was written here
//!        since the promotion is left as it is, and what it lost is in the record; one that was deleted since comes back, and the
//!        record and this node's conflict log say so; 4. tables that were removed here are not touched; 5. a row that the server
//!        refuses ends nothing: it is in the record, with the reason (a table that does not fit ends it)
//! On crash: run again; what is so already is left alone, and DDL that was run is not run again: its row in `anabranch.ddl` is there
//! Not here: whether the server has the rest ([`super::check`]); rows written since the promotion ([`super::gap`])
//!
//! Under last update wins a row is what the version with the highest stamp made of it, so no order need be kept: each row that
//! is written by the tail, or by what the tail had seen of others and the server had not, becomes what its newest version made
//! of it. Writers are held off meanwhile: what they write behind it has seen it.

mod rows;
mod told;
mod written;

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use anabranch_conflict::policy::Policies;
use anabranch_proto::row::RowImage;
use anabranch_proto::{Position, Stamp, Vector};
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use self::rows::{all_keys, delete, insert, json_of, now_of, say};
use self::written::{Keys, Written};
use super::described::{hashes, place, query};
use super::gap::{Known, Xids, waiting};
use super::sequences::{Behind, Lifted};
use super::state::{Line, Record};
use super::{Error, Event, Watch, io, refused, waits};
use crate::apply::plan::Source;
use crate::apply::{catalog, passed_over};
use crate::config::Config;
use crate::journal::Journal;
use crate::pg;
use crate::verify::newest::Newest;
use crate::verify::table::{self, Compared};

/// Rows of a tail at most.
const ROWS_MAX: usize = 4 << 20;
/// Rows of one portion.
const ROWS_AT_ONCE: usize = 20_000;
/// What the record says of a row that is as it was in the tail again, or gone again.
const PUT_BACK: &str = "put back";
/// Of one that the server had when it was promoted, and had no more: nobody heard of the delete, which had not met what the tail wrote.
const BACK_AGAIN: &str = "put back, though deleted here since the promotion";
const GONE_AGAIN: &str = "deleted again, as before the promotion";
/// Of one that the server refuses, and that is nowhere here.
pub(super) const REFUSED: &str = "refused by the server";
const KEPT: &str = "kept as written here since the promotion; what it was before is in the record";
const LEFT: &str = "left to the daemon: the table's columns are merged";

const PROGRESS: &str = "INSERT INTO anabranch.progress AS p (origin, epoch, lsn, stamp) \
    VALUES ($1, $2, $3::text::pg_lsn, $4) ON CONFLICT (origin) DO UPDATE \
    SET epoch = excluded.epoch, lsn = excluded.lsn, stamp = greatest(p.stamp, excluded.stamp)";

const SETTINGS: &str = "SET session_replication_role = replica; SET lock_timeout = '2s'; SET synchronous_commit = local; \
    SET default_transaction_read_only = off";

/// What is needed to put a tail back.
pub(super) struct Tail<'a> {
    pub(super) config: &'a Config,
    pub(super) policies: &'a Policies,
    pub(super) journal: &'a Journal,
    pub(super) known: &'a Known,
    /// What the server has applied of others.
    pub(super) progress: &'a Vector,
    /// Transactions that may have been made since the promotion.
    pub(super) xids: Xids,
    /// Go on where tables have other policies.
    pub(super) leave_merged: bool,
}

/// What was done.
pub(super) struct Done {
    /// How many rows were written or deleted.
    pub(super) rows: u64,
    /// Sequences that the server had set back.
    pub(super) lifted: Vec<Lifted>,
}

/// What became of one row.
struct Row {
    key: Vec<u8>,
    image: RowImage,
    after: Newest,
    did: Option<&'static str>,
}

impl Tail<'_> {
    /// All that the server has of the tail's node and others.
    fn has(&self) -> Vector {
        let mut has = self.progress.clone();
        if let Some(held) = &self.known.held.last {
            has.raise(self.config.node.id, held.position);
        }
        has
    }

    /// Puts it back, in one transaction; waits for whoever holds a lock.
    pub(super) async fn put_back(
        &self,
        client: &Client,
        record: &mut Record,
        watch: &Watch,
    ) -> Result<Done, Error> {
        let (journal, has, upto) = (self.journal.clone(), self.has(), self.known.upto.clone());
        let written = tokio::task::spawn_blocking(move || Written::read(&journal, &has, &upto)).await;
        let mut written = written.map_err(|_| Error::Unreadable("it ended unexpectedly".to_owned()))??;
        written.pass_over(&passed_over::all(client, self.config).await?);
        for (schema, name) in written.tables.keys() {
            self.admit(schema, name)?;
        }
        client.batch_execute(table::SETTINGS).await?;
        client.batch_execute(SETTINGS).await?;
        client.batch_execute(pg::ROW_SECURITY_OF_OTHERS).await?;
        let mut said = String::new();
        loop {
            let failed = match self.attempt(client, &written, record).await {
                Ok(done) => return Ok(done),
                Err(error) => error,
            };
            // Fails where the connection is gone, and then what failed says so.
            let _ = client.batch_execute("ROLLBACK").await;
            let waits = [SqlState::LOCK_NOT_AVAILABLE, SqlState::T_R_DEADLOCK_DETECTED];
            match &failed {
                Error::Sql(error) if error.code().is_some_and(|code| waits.contains(code)) => {
                    let on = waits::holders(client).await?;
                    if on != said {
                        watch(Event::Waiting { on: on.clone() });
                        said = on;
                    }
                    tokio::time::sleep(Duration::from_millis(500)).await;
                }
                _ => return Err(failed),
            }
        }
    }

    /// May the tail be put back although it wrote this table?
    fn admit(&self, schema: &str, name: &str) -> Result<(), Error> {
        let is_merged = self.policies.of(schema, name).columns.is_some();
        if self.is_plain(schema, name) || is_merged && self.leave_merged {
            return Ok(());
        }
        refused(if is_merged {
            format!(
                "the server lacks writes of {schema}.{name}, whose columns are merged: the daemon puts them right a moment later, and \
                 what is written to such a row before that would overwrite what it lacks. Stop writes to that table, then run this \
                 with `--leave-merged`"
            )
        } else {
            format!(
                "the server lacks writes of {schema}.{name}, whose policy is not last update wins: what such a row was cannot be told \
                 without it; see docs/errors/the-server-went-back.md"
            )
        })
    }

    fn is_plain(&self, schema: &str, name: &str) -> bool {
        schema == "anabranch" || self.policies.is_last_writer(schema, name)
    }

    async fn attempt(&self, client: &Client, written: &Written, record: &mut Record) -> Result<Done, Error> {
        client.batch_execute("BEGIN").await?;
        self.progress(client, written).await?;
        for (_, ddl) in &written.ddl {
            // Put back by an earlier run, which was killed before the slot was made.
            if ddl.is_here(client).await? {
                continue;
            }
            ddl.run_once(client).await.map_err(|error| {
                Error::Refused(format!(
                    "the server lacks DDL that cannot be run again ({error}): {}; mend that, then run this again",
                    ddl.command
                ))
            })?;
        }
        let mut tables = Vec::new();
        for (name, keys) in &written.tables {
            match Compared::load(client, &name.0, &name.1).await {
                Ok(compared) => tables.push((compared, name, keys)),
                // Its rows went with it.
                Err(table::Error::Catalog(catalog::Error::Missing(..))) => {}
                Err(error) => return Err(error.into()),
            }
        }
        let locked: Vec<&str> = tables
            .iter()
            .map(|table| table.0.plan.table_sql.as_str())
            .collect();
        if !locked.is_empty() {
            let lock = format!(
                "LOCK TABLE ONLY {} IN SHARE ROW EXCLUSIVE MODE",
                locked.join(", ONLY ")
            );
            client.batch_execute(&lock).await?;
        }
        let mut rows = 0;
        for (compared, name, keys) in &tables {
            let writes = *keys;
            let mut keys: Vec<Vec<u8>> = writes.keys().cloned().collect();
            if written.truncated.contains(*name) {
                keys = all_keys(client, compared, keys).await?;
            }
            if !self.is_plain(&name.0, &name.1) {
                let line = Line::of(LEFT, &table_name(compared)).with("rows", keys.len());
                record.add(&[line]).map_err(io("write the record"))?;
                continue;
            }
            rows += self.rows(client, compared, (keys, writes), record).await?;
        }
        let mut behind = Behind::read(client, self.config).await?;
        for (compared, _, keys) in &tables {
            behind.note_keys(client, compared, keys).await?;
        }
        record.sync().map_err(io("write the record"))?;
        // Before whoever waits for the tables goes on: their next values are drawn then.
        let lifted = behind.lift(client).await?;
        client.batch_execute("COMMIT").await?;
        Ok(Done { rows, lifted })
    }

    /// Rows of a table, in rounds: a value that another row gives up further on is taken in a later one. How many were written or deleted.
    async fn rows(
        &self,
        client: &Client,
        compared: &Compared,
        (mut keys, writes): (Vec<Vec<u8>>, &Keys),
        record: &mut Record,
    ) -> Result<u64, Error> {
        let mut count = 0;
        // Those of a later round may have gone with the one before.
        let mut taken = HashSet::new();
        loop {
            let (mut wrote, mut waits) = (0, Vec::new());
            for some in keys.chunks(ROWS_AT_ONCE) {
                let some = (some, writes);
                let (rows, refused) = self
                    .portion(client, compared, some, (&mut taken, &mut *record))
                    .await?;
                wrote += rows;
                waits.extend(refused);
            }
            count += wrote;
            if waits.is_empty() {
                return Ok(count);
            }
            if wrote == 0 {
                self.say_refused(client, compared, waits, record).await?;
                return Ok(count);
            }
            keys = waits.into_iter().map(|(key, _)| key).collect();
        }
    }

    /// What the tail had seen of others is here once this commits.
    async fn progress(&self, client: &Client, written: &Written) -> Result<(), Error> {
        const NONE: &(Position, Stamp) = &(Position::ZERO, Stamp::ZERO);
        // Its own row stays where it is: it makes the transaction the daemon's, whoever decodes it.
        let own = self.config.node.id;
        let others = written.applied.iter().filter(|(origin, _)| **origin != own);
        for (origin, (position, stamp)) in std::iter::once((&own, NONE)).chain(others) {
            client
                .execute(
                    PROGRESS,
                    &[
                        &i32::from(origin.0),
                        &i64::from(position.epoch),
                        &position.lsn.to_string(),
                        &stamp.to_bytes().to_vec(),
                    ],
                )
                .await?;
        }
        Ok(())
    }

    /// Some rows of a table; those refused, with the reason. `taken`: those that are missing here for another reason than that somebody has
    /// deleted them.
    async fn portion(
        &self,
        client: &Client,
        compared: &Compared,
        (keys, writes): (&[Vec<u8>], &Keys),
        (taken, record): (&mut HashSet<Vec<u8>>, &mut Record),
    ) -> Result<(u64, Vec<(Vec<u8>, String)>), Error> {
        let before = self.newest(compared, &self.has(), keys).await?;
        let mut after = self.newest(compared, &self.known.upto, keys).await?;
        let mut rows = Vec::with_capacity(keys.len());
        for key in keys {
            let Some(newest) = after.remove(key) else { continue };
            if !newest.is_known {
                return refused(format!(
                    "the journal does not hold all writes of rows of {} that the server lacks: the standby was too far behind when \
                     it was promoted; see docs/errors/the-server-went-back.md",
                    table_name(compared)
                ));
            }
            rows.push(Row {
                image: compared.image_of_canonical(key)?,
                key: key.clone(),
                after: newest,
                did: None,
            });
        }
        let now = now_of(client, compared, &rows).await?;
        let waiting = waiting(client, &compared.desc.schema, &compared.desc.name).await?;
        let of_before: Vec<Option<&Newest>> = rows.iter().map(|row| before.get(&row.key)).collect();
        let hashes_before = hashes(client, compared, &of_before).await?;
        let of_after: Vec<Option<&Newest>> = rows.iter().map(|row| Some(&row.after)).collect();
        let hashes_after = hashes(client, compared, &of_after).await?;
        let unwritten = self.unwritten(client, compared, (&rows, &now), &waiting).await?;
        let (mut gone, mut put) = (Vec::new(), Vec::new());
        for (at, row) in rows.iter_mut().enumerate() {
            let there = now.get(&at).copied();
            let (was, is) = (
                hashes_before.get(at).copied().flatten(),
                hashes_after.get(at).copied().flatten(),
            );
            row.did = match (there, &row.after.image) {
                (None, None) => None,
                (Some((_, hash)), Some(_)) if Some(hash) == is => None,
                (Some((xmin, hash)), _)
                    if self.known.is_unheard_of(xmin, self.xids)
                        && Some(hash) != was
                        && !unwritten.contains(&row.key) =>
                {
                    Some(KEPT)
                }
                (Some(_), None) => {
                    gone.push(at);
                    Some(GONE_AGAIN)
                }
                (there, Some(_)) => {
                    if there.is_some() {
                        gone.push(at);
                    }
                    put.push(at);
                    // The journal may have let go what wrote it before: then the lost writes tell.
                    let had = match before.get(&row.key) {
                        Some(newest) => newest.image.is_some(),
                        None => writes.get(&row.key).copied().unwrap_or(false),
                    };
                    let is_other = waiting.contains(&row.key) || taken.contains(&row.key);
                    let is_deleted = there.is_none() && had && !is_other;
                    Some(if is_deleted { BACK_AGAIN } else { PUT_BACK })
                }
            };
        }
        let images = |at: &Vec<usize>| -> Vec<RowImage> {
            at.iter()
                .filter_map(|&at| Some(rows.get(at)?.image.clone()))
                .collect()
        };
        delete(client, compared, &images(&gone)).await?;
        let mut refused = Vec::new();
        let refused_at = insert(client, compared, &rows, put).await?;
        for (at, why) in refused_at {
            if let Some(row) = rows.get_mut(at) {
                if row.did.take() == Some(PUT_BACK) {
                    taken.insert(row.key.clone());
                }
                refused.push((row.key.clone(), why));
            }
        }
        let done = say(client, compared, &rows, record).await?;
        told::tell(client, (self.config, self.policies), compared, &rows).await?;
        Ok((done, refused))
    }

    /// Keys of rows that are as they were before what waits in quarantine of them, and not written since the promotion.
    async fn unwritten(
        &self,
        client: &Client,
        compared: &Compared,
        (rows, now): (&[Row], &HashMap<usize, (u32, i64)>),
        waiting: &HashSet<Vec<u8>>,
    ) -> Result<HashSet<Vec<u8>>, Error> {
        let there = rows.iter().enumerate().filter_map(|(at, row)| {
            let (_, hash) = now.get(&at).filter(|_| waiting.contains(&row.key))?;
            Some((row.key.as_slice(), *hash))
        });
        let there: Vec<(&[u8], i64)> = there.collect();
        let keys = there.iter().map(|(key, _)| (key.to_vec(), None)).collect();
        let sources = (client, self.journal);
        let found = self.known.made_before(sources, compared, &there, keys).await?;
        let found = found.into_iter().filter_map(|at| there.get(at));
        Ok(found.map(|(key, _)| key.to_vec()).collect())
    }

    async fn newest(
        &self,
        compared: &Compared,
        upto: &Vector,
        keys: &[Vec<u8>],
    ) -> Result<HashMap<Vec<u8>, Newest>, Error> {
        self.known
            .newest(self.journal, upto, &compared.desc, keys.to_vec())
            .await
    }

    /// Rows that the server refuses are nowhere here, and in the record.
    async fn say_refused(
        &self,
        client: &Client,
        compared: &Compared,
        refused: Vec<(Vec<u8>, String)>,
        record: &mut Record,
    ) -> Result<(), Error> {
        for some in refused.chunks(ROWS_AT_ONCE) {
            let keys: Vec<Vec<u8>> = some.iter().map(|(key, _)| key.clone()).collect();
            let found = self.newest(compared, &self.known.upto, &keys).await?;
            let images = keys.iter().map(|key| compared.image_of_canonical(key));
            let images = images.collect::<Result<Vec<_>, _>>()?;
            let mut array = compared.plan.rows();
            for image in &images {
                array.push(&Source::Key(image))?;
            }
            for told in query(client, &compared.keys_sql(), array.finish()).await? {
                let Some((key, why)) = some.get(place(&told)?) else {
                    continue;
                };
                let image = found.get(key).and_then(|newest| newest.image.as_ref());
                let row = json_of(client, compared, image).await?;
                let line = Line::of(REFUSED, &table_name(compared)).with("why", why);
                let line = line.with_json("key", told.try_get(1)?);
                record
                    .add(&[line.with_json("row", &row)])
                    .map_err(io("write the record"))?;
            }
        }
        Ok(())
    }
}

fn table_name(compared: &Compared) -> String {
    format!("{}.{}", compared.desc.schema, compared.desc.name)
}
