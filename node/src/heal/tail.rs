//! The lost tail: what the journal holds of this node and a promoted standby lacks is put back into its tables.
//!
//! In:   the journal behind the last transaction that the server has; what it has applied of others      Out: one transaction
//! Holds: keys of the rows that the tail wrote, up to a bound; images of one portion
//! Invariants: 1. all of it or nothing; 2. it begins with `anabranch.progress`, and is over before the new slot begins: it is no
//!        news to anybody, since all others have these writes with their stamps and positions; 3. a row that was written here
//!        since the promotion is left as it is, and what it lost is in the record
//! On crash: run again; what is so already is left alone
//! Not here: whether the server has the rest ([`super::check`]); rows written since the promotion ([`super::gap`])
//!
//! Under last update wins a row is what the version with the highest stamp made of it, so no order need be kept: each row that
//! is written by the tail, or by what the tail had seen of others and the server had not, becomes what its newest version made
//! of it. Writers are held off meanwhile: what they write behind it has seen it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use anabranch_conflict::frontier::{Deletes, Order};
use anabranch_conflict::policy::Policies;
use anabranch_proto::row::RowImage;
use anabranch_proto::schema::TableDesc;
use anabranch_proto::txn::Change;
use anabranch_proto::{NodeId, Position, Stamp, Vector};
use serde_json::{Value, json};
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use super::described::{by_description, hashes, place, query};
use super::gap::{Known, Xids};
use super::state::Record;
use super::{Error, Event, Watch, io, refused};
use crate::apply::catalog;
use crate::apply::ddl::Ddl;
use crate::apply::feed::{Feed, Pieces};
use crate::apply::plan::{Plan, Source};
use crate::config::Config;
use crate::journal::{self, Journal};
use crate::setup;
use crate::verify::newest::Newest;
use crate::verify::table::{self, Compared};

/// Rows of a tail at most.
const ROWS_MAX: usize = 4 << 20;
/// Rows of one portion.
const ROWS_AT_ONCE: usize = 20_000;
/// What the record says of a row that is as it was in the tail again, or gone again.
const PUT_BACK: &str = "put back";
const GONE_AGAIN: &str = "deleted again, as before the promotion";
const KEPT: &str = "kept as written here since the promotion; what it was before is in the record";
const LEFT: &str = "left to the daemon: the table's columns are merged";

const PROGRESS: &str = "INSERT INTO anabranch.progress AS p (origin, epoch, lsn, stamp) \
    VALUES ($1, $2, $3::text::pg_lsn, $4) ON CONFLICT (origin) DO UPDATE \
    SET epoch = excluded.epoch, lsn = excluded.lsn, stamp = greatest(p.stamp, excluded.stamp)";

const SETTINGS: &str = "SET session_replication_role = replica; SET lock_timeout = '2s'; SET synchronous_commit = local; \
    SET default_transaction_read_only = off; SET default_transaction_isolation = 'read committed'";

/// What the tail wrote.
#[derive(Default)]
struct Written {
    tables: BTreeMap<(String, String), BTreeSet<Vec<u8>>>,
    truncated: BTreeSet<(String, String)>,
    ddl: Vec<(Stamp, Ddl)>,
    /// How far each origin goes in it, and its highest stamp.
    applied: BTreeMap<NodeId, (Position, Stamp)>,
}

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
        if let Some(held) = &self.known.held {
            has.raise(self.config.node.id, held.position);
        }
        has
    }

    /// Puts it back, in one transaction; waits for whoever holds a lock. Gives how many rows were written or deleted.
    pub(super) async fn put_back(
        &self,
        client: &Client,
        record: &mut Record,
        watch: &Watch,
    ) -> Result<u64, Error> {
        let (journal, has, upto) = (self.journal.clone(), self.has(), self.known.upto.clone());
        let written = tokio::task::spawn_blocking(move || Written::read(&journal, &has, &upto)).await;
        let written = written.map_err(|_| Error::Unreadable("it ended unexpectedly".to_owned()))??;
        for (schema, name) in written.tables.keys() {
            self.admit(schema, name)?;
        }
        client.batch_execute(table::SETTINGS).await?;
        client.batch_execute(SETTINGS).await?;
        let mut said = String::new();
        loop {
            let failed = match self.attempt(client, &written, record).await {
                Ok(rows) => return Ok(rows),
                Err(error) => error,
            };
            // Fails where the connection is gone, and then what failed says so.
            let _ = client.batch_execute("ROLLBACK").await;
            let waits = [SqlState::LOCK_NOT_AVAILABLE, SqlState::T_R_DEADLOCK_DETECTED];
            match &failed {
                Error::Sql(error) if error.code().is_some_and(|code| waits.contains(code)) => {
                    let on = setup::execute::writers(client).await?.join("; ");
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
        let policy = self.policies.of(schema, name);
        let by_stamp =
            policy.policy.order == Order::LastUpdateWins && policy.policy.deletes == Deletes::ByStamp;
        schema == "anabranch" || by_stamp && policy.columns.is_none()
    }

    async fn attempt(&self, client: &Client, written: &Written, record: &mut Record) -> Result<u64, Error> {
        client.batch_execute("BEGIN").await?;
        self.progress(client, written).await?;
        for (_, ddl) in &written.ddl {
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
        let mut count = 0;
        for (compared, name, keys) in tables {
            let mut keys: Vec<Vec<u8>> = keys.iter().cloned().collect();
            if written.truncated.contains(name) {
                keys = all_keys(client, &compared, keys).await?;
            }
            if !self.is_plain(&name.0, &name.1) {
                let line = json!({ "did": LEFT, "table": table_name(&compared), "rows": keys.len() });
                record.add(&[line]).map_err(io("write the record"))?;
                continue;
            }
            // A value that another row gives up further on is taken in a later round.
            loop {
                let (mut wrote, mut waits) = (0, Vec::new());
                for some in keys.chunks(ROWS_AT_ONCE) {
                    let (rows, refused) = self.portion(client, &compared, some, record).await?;
                    wrote += rows;
                    waits.extend(refused);
                }
                count += wrote;
                if waits.is_empty() {
                    break;
                }
                if wrote == 0 {
                    self.say_refused(client, &compared, waits, record).await?;
                    break;
                }
                keys = waits.into_iter().map(|(key, _)| key).collect();
            }
        }
        record.sync().map_err(io("write the record"))?;
        client.batch_execute("COMMIT").await?;
        Ok(count)
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

    /// Some rows of a table; those refused, with the reason.
    async fn portion(
        &self,
        client: &Client,
        compared: &Compared,
        keys: &[Vec<u8>],
        record: &mut Record,
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
        let of_before: Vec<Option<&Newest>> = rows.iter().map(|row| before.get(&row.key)).collect();
        let hashes_before = hashes(client, compared, &of_before).await?;
        let of_after: Vec<Option<&Newest>> = rows.iter().map(|row| Some(&row.after)).collect();
        let hashes_after = hashes(client, compared, &of_after).await?;
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
                (Some((xmin, hash)), _) if self.known.is_unheard_of(xmin, self.xids) && Some(hash) != was => {
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
                    Some(PUT_BACK)
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
                row.did = None;
                refused.push((row.key.clone(), why));
            }
        }
        let done = say(client, compared, &rows, record).await?;
        Ok((done, refused))
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
            for (key, why) in some {
                let image = found.get(key).and_then(|newest| newest.image.as_ref());
                let line = json!({
                    "did": "refused by the server", "table": table_name(compared), "why": why,
                    "row": json_of(client, compared, image).await?,
                });
                record.add(&[line]).map_err(io("write the record"))?;
            }
        }
        Ok(())
    }
}

impl Written {
    /// Reads what of `upto` is not in `has`: blocks.
    fn read(journal: &Journal, has: &Vector, upto: &Vector) -> Result<Self, Error> {
        let mut written = Self::default();
        let mut rows = 0;
        for (origin, upto) in upto.iter() {
            let mut feed = match Feed::new(journal, origin, has.get(origin)) {
                Err(journal::Error::Trimmed { oldest, .. }) => {
                    return refused(format!(
                        "the server has what node {origin} wrote up to {}, and the journal begins at {oldest}: what lies between was \
                         let go of when the standby had not got it; see docs/errors/the-server-went-back.md",
                        has.get(origin)
                    ));
                }
                feed => feed?,
            };
            while let Some(head) = feed.peek()? {
                if head.header().position > upto {
                    break;
                }
                let Some(head) = feed.take() else { break };
                let header = head.header().clone();
                if !has.covers(header.origin(), header.position) && header.origin() == origin {
                    let last = written
                        .applied
                        .entry(origin)
                        .or_insert((header.position, header.stamp));
                    *last = (header.position, header.stamp.max(last.1));
                }
                let mut pieces = Pieces::of_head(journal, head)?;
                while let Some(mut piece) = pieces.next_piece()? {
                    while let Some(change) = piece.next_change()? {
                        rows += written.note(&change)?;
                        if rows > ROWS_MAX {
                            return refused(format!(
                                "the server lacks writes of more than {ROWS_MAX} rows: it cannot come back as this node; see \
                                 docs/errors/the-server-went-back.md"
                            ));
                        }
                        if let Some(ddl) = Ddl::of(&change, &header)? {
                            written.ddl.push((header.stamp, ddl));
                        }
                    }
                }
            }
        }
        written.ddl.sort_by_key(|(stamp, _)| *stamp);
        Ok(written)
    }

    /// Notes the rows of a change; how many.
    fn note(&mut self, change: &Change) -> Result<usize, Error> {
        for table in change.tables() {
            let name = (table.schema.clone(), table.name.clone());
            if let Change::Truncate { .. } = change {
                self.truncated.insert(name.clone());
            }
            self.tables.entry(name).or_default();
        }
        let mut rows = 0;
        change.each_row(|table, key, _| {
            rows += 1;
            let name = (table.schema.clone(), table.name.clone());
            self.tables.entry(name).or_default().insert(key.to_vec());
            Ok::<_, Error>(())
        })?;
        Ok(rows)
    }
}

fn table_name(compared: &Compared) -> String {
    format!("{}.{}", compared.desc.schema, compared.desc.name)
}

/// The keys of all rows that are there, and `keys`.
async fn all_keys(client: &Client, compared: &Compared, keys: Vec<Vec<u8>>) -> Result<Vec<Vec<u8>>, Error> {
    let mut all: BTreeSet<Vec<u8>> = keys.into_iter().collect();
    let (columns, table) = (
        compared.images(compared.desc.key_columns()),
        &compared.plan.table_sql,
    );
    for row in client
        .query(&format!("SELECT {columns} FROM ONLY {table} AS t"), &[])
        .await?
    {
        let mut key = Vec::new();
        compared
            .desc
            .canonical_key_of_image(&compared.key_image(&row, 0)?, &mut key)?;
        all.insert(key);
        if all.len() > ROWS_MAX {
            return refused(format!(
                "the server lacks a TRUNCATE of {}, which has more than {ROWS_MAX} rows: truncate it by hand, then run this again",
                table_name(compared)
            ));
        }
    }
    Ok(all.into_iter().collect())
}

/// xmin and hash of those rows that are there, by their place.
async fn now_of(
    client: &Client,
    compared: &Compared,
    rows: &[Row],
) -> Result<HashMap<usize, (u32, i64)>, Error> {
    let what = format!("t.xmin::text::int8, {}", Compared::hash(&compared.columns()));
    let mut array = compared.plan.rows();
    for row in rows {
        array.push(&Source::Key(&row.image))?;
    }
    let mut now = HashMap::new();
    for row in query(client, &compared.plan.read(&what), array.finish()).await? {
        let xmin = u32::try_from(row.try_get::<_, i64>(1)?).unwrap_or(0);
        now.insert(place(&row)?, (xmin, row.try_get(2)?));
    }
    Ok(now)
}

async fn delete(client: &Client, compared: &Compared, keys: &[RowImage]) -> Result<(), Error> {
    if keys.is_empty() {
        return Ok(());
    }
    let mut array = compared.plan.rows();
    for key in keys {
        array.push(&Source::Key(key))?;
    }
    query(client, &compared.plan.delete_unguarded, array.finish()).await?;
    Ok(())
}

/// Inserts the rows at these places; gives those that are refused.
async fn insert(
    client: &Client,
    compared: &Compared,
    rows: &[Row],
    places: Vec<usize>,
) -> Result<Vec<(usize, String)>, Error> {
    let images = places
        .into_iter()
        .filter_map(|at| Some((at, rows.get(at)?.after.image.as_ref())));
    let mut refused = Vec::new();
    for of in by_description(compared, images)? {
        if insert_some(client, &of.plan, &of.rows).await?.is_none() {
            continue;
        }
        for row in &of.rows {
            if let Some(why) = insert_some(client, &of.plan, std::slice::from_ref(row)).await? {
                refused.push((row.0, why));
            }
        }
    }
    Ok(refused)
}

/// Why they are refused, if they are; then none is there.
async fn insert_some(
    client: &Client,
    plan: &Plan,
    rows: &[(usize, &RowImage)],
) -> Result<Option<String>, Error> {
    let mut array = plan.rows();
    for (_, row) in rows {
        array.push(&Source::Row(row))?;
    }
    client.batch_execute("SAVEPOINT part").await?;
    match query(client, &plan.insert, array.finish()).await {
        Ok(_) => {
            client.batch_execute("RELEASE part").await?;
            Ok(None)
        }
        Err(Error::Sql(error)) if is_of_a_row(&error) => {
            client.batch_execute("ROLLBACK TO part; RELEASE part").await?;
            Ok(Some(crate::error::sql(&error)))
        }
        Err(error) => Err(error),
    }
}

/// Data exceptions and constraints: SQLSTATE classes 22 and 23.
fn is_of_a_row(error: &tokio_postgres::Error) -> bool {
    let code = error.code().map(SqlState::code);
    code.is_some_and(|code| code.starts_with("22") || code.starts_with("23"))
}

/// Writes down what was done to each row; how many were written or deleted.
async fn say(client: &Client, compared: &Compared, rows: &[Row], record: &mut Record) -> Result<u64, Error> {
    let mut array = compared.plan.rows();
    for row in rows {
        array.push(&Source::Key(&row.image))?;
    }
    let mut lines = Vec::new();
    let mut count = 0;
    for told in query(client, &compared.keys_sql(), array.finish()).await? {
        let Some(row) = rows.get(place(&told)?) else {
            continue;
        };
        let Some(did) = row.did else { continue };
        let key: Value = serde_json::from_str(&told.try_get::<_, String>(1)?).unwrap_or_default();
        let mut line = json!({ "did": did, "table": table_name(compared), "key": key });
        if did == KEPT {
            let was = json_of(client, compared, row.after.image.as_ref()).await?;
            if let Some(line) = line.as_object_mut() {
                line.insert("was".to_owned(), was);
            }
        } else {
            count += 1;
        }
        lines.push(line);
    }
    // Before the commit: rather told twice than not at all.
    record.add(&lines).map_err(io("write the record"))?;
    Ok(count)
}

/// A row for people; null for none.
async fn json_of(
    client: &Client,
    compared: &Compared,
    image: Option<&(Arc<TableDesc>, RowImage)>,
) -> Result<Value, Error> {
    let Some((desc, row)) = image else {
        return Ok(Value::Null);
    };
    let plan = compared.plan_of(desc)?;
    let mut array = plan.rows();
    array.push(&Source::Row(row))?;
    let (array, _) = array.finish();
    let told = query(client, &plan.render, (array, Vec::new())).await?;
    let text: String = told
        .first()
        .map(|row| row.try_get(1))
        .transpose()?
        .unwrap_or_default();
    Ok(serde_json::from_str(&text).unwrap_or_default())
}
