//! A node's side: answers what it is asked, one question after the other.
//!
//! In:   questions of a daemon, this one or a peer            Out: answers
//! Holds: for each conversation two SQL sessions, at most one snapshot, and the keys that are watched for it
//! Invariants: 1. whatever a conversation holds ends with it; 2. a question that cannot be answered ends nothing but itself
//! On crash: gone
//! Not here: what the questions are for ([`super::run`])

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use anabranch_proto::link as pb;
use anabranch_proto::row::RowImage;
use anabranch_proto::schema::TableDesc;
use anabranch_proto::txn::{Change, FrameBuilder, FrameReader, PutOp, Record, TableCache, TxnHeader};
use anabranch_proto::wire::Malformed;
use anabranch_proto::{NodeId, Position, Stamp, Vector};
use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use pb::verify_request::Ask;
use pb::verify_response::Answer;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tokio_postgres::Client;
use tonic::Status;

use super::SNAPSHOT_MAX;
use super::newest;
use super::table::{self, Compared};
use crate::apply::catalog;
use crate::apply::fence::{self, Fence};
use crate::apply::mend::{Job, Outcome, Row};
use crate::apply::plan::Source;
use crate::apply::write::{Parameter, parameters, references};
use crate::config::Config;
use crate::index::RowKey;
use crate::journal::Journal;
use crate::link::{vector_from_wire, vector_to_wire};
use crate::pg::{self, xid};
use crate::resolve::{self, WatchId};
use crate::shared::{Shared, lock};

/// Rows that one statement of a scan reads, about, at most and at least.
const PIECE_ROWS: (u64, u64) = (1_000, 1_000_000);
/// Rows in one message.
const MESSAGE_ROWS: usize = 2_000;
/// Most bytes of rows in one answer: what mends them must fit a request.
const WHOLE_BYTES_MAX: usize = 3 << 20;
/// How long own transactions may take from being decoded to being framed.
const FRAMED_PATIENCE: Duration = Duration::from_secs(10);
/// How long the applier may take to come to a job.
const MEND_PATIENCE: Duration = Duration::from_secs(60);

/// How long transactions are waited for that wrote a table before it was replicated.
const WRITERS_PATIENCE: Duration = Duration::from_secs(120);

/// Transactions that hold the lock of a writer on a table, and who they are; of those in `$3`, if any, and prepared ones.
const WRITERS: &str = "SELECT l.virtualtransaction::text, coalesce(format('session %s of %s', a.pid, a.usename), \
        'a prepared transaction') \
    FROM pg_locks l JOIN pg_class c ON c.oid = l.relation JOIN pg_namespace n ON n.oid = c.relnamespace \
    LEFT JOIN pg_stat_activity a ON a.pid = l.pid \
    WHERE l.locktype = 'relation' AND l.granted AND n.nspname = $1 AND c.relname = $2 \
      AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database()) \
      AND l.mode IN ('RowExclusiveLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock') \
      AND ($3::text[] IS NULL OR l.virtualtransaction::text = ANY ($3) OR l.pid IS NULL)";
const QUARANTINED: &str = "SELECT key_bytes FROM anabranch.quarantine \
    WHERE schema_name = $1 AND table_name = $2 AND key_bytes = ANY ($3)";

/// It cannot be answered.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("{}", crate::error::sql(.0))]
    Sql(#[from] tokio_postgres::Error),
    #[error(transparent)]
    Connect(#[from] pg::Error),
    #[error(transparent)]
    Table(#[from] table::Error),
    #[error(transparent)]
    Fence(#[from] fence::Error),
    #[error(transparent)]
    Newest(#[from] newest::Error),
    #[error(transparent)]
    Resolve(#[from] resolve::Error),
    #[error("a question that cannot be read: {0}")]
    Malformed(#[from] Malformed),
    #[error("{0}")]
    Other(String),
    /// Nobody listens.
    #[error("the asker is gone")]
    Gone,
}

/// Answers questions about this node's rows.
#[derive(Clone)]
pub struct Seat {
    /// The configuration.
    pub config: Arc<Config>,
    /// The stages' state.
    pub shared: Arc<Shared>,
    /// The journal.
    pub journal: Journal,
}

impl Seat {
    /// Answers until the questions end or nobody listens any more.
    pub async fn converse(
        self,
        mut questions: impl Stream<Item = Result<pb::VerifyRequest, Status>> + Unpin,
        out: mpsc::Sender<Result<pb::VerifyResponse, Status>>,
    ) {
        let mut conversation = Conversation {
            seat: self,
            out: out.clone(),
            sql: None,
            fence: None,
            snapshot_since: None,
            tables: HashMap::new(),
            watched: None,
            adding: None,
        };
        loop {
            let question = tokio::select! {
                question = questions.next() => question,
                () = out.closed() => return,
            };
            let Some(Ok(question)) = question else { return };
            let Some(ask) = question.ask else { continue };
            let answered = tokio::select! {
                answered = conversation.answer(ask) => answered,
                () = out.closed() => return,
            };
            match answered {
                Ok(()) => {}
                Err(Error::Gone) => return,
                Err(error) => {
                    // Whatever was open in the session is over.
                    conversation.sql = None;
                    conversation.snapshot_since = None;
                    if conversation.say(Answer::Failed(error.to_string())).await.is_err() {
                        return;
                    }
                }
            }
        }
    }
}

struct Set {
    id: WatchId,
    table: Arc<Compared>,
    images: Vec<RowImage>,
    keys: Vec<RowKey>,
}

struct Conversation {
    seat: Seat,
    out: mpsc::Sender<Result<pb::VerifyResponse, Status>>,
    sql: Option<Client>,
    fence: Option<Fence>,
    snapshot_since: Option<Instant>,
    tables: HashMap<(String, String), Arc<Compared>>,
    watched: Option<Set>,
    adding: Option<Adding>,
}

impl Drop for Conversation {
    fn drop(&mut self) {
        self.unwatch();
    }
}

impl Conversation {
    async fn say(&self, answer: Answer) -> Result<(), Error> {
        let response = pb::VerifyResponse { answer: Some(answer) };
        self.out.send(Ok(response)).await.map_err(|_| Error::Gone)
    }

    async fn answer(&mut self, ask: Ask) -> Result<(), Error> {
        if self.sql.as_ref().is_none_or(Client::is_closed) {
            let (sql, _driver) = pg::connect(&self.seat.config.postgres, "verify").await?;
            sql.batch_execute(table::SETTINGS).await?;
            self.sql = Some(sql);
        }
        let answer = match ask {
            Ask::Open(open) => Answer::Opened(self.open(&open.also).await?),
            Ask::Adding(adding) => {
                self.adding(&adding).await?;
                Answer::Done(pb::VerifyDone {})
            }
            Ask::Snapshot(of) => {
                self.table(&of.schema, &of.name).await?;
                self.snapshot().await?;
                Answer::Done(pb::VerifyDone {})
            }
            Ask::Scan(scan) => {
                self.scan(&scan).await?;
                Answer::Done(pb::VerifyDone {})
            }
            Ask::Watch(watch) => Answer::Watched(self.watch(watch).await?),
            Ask::Look(look) => Answer::Looked(self.look(&look).await?),
            Ask::Newest(newest) => Answer::Looked(self.newest(&newest).await?),
            Ask::Mend(mend) => Answer::Mended(self.mend(mend).await?),
        };
        self.say(answer).await
    }

    fn sql(&self) -> Result<&Client, Error> {
        self.sql
            .as_ref()
            .ok_or_else(|| Error::Other("no session".to_owned()))
    }

    async fn open(&self, also: &[pb::VerifyName]) -> Result<pb::VerifyOpened, Error> {
        let sql = self.sql()?;
        let publication = &self.seat.config.postgres.publication;
        let mut tables = Vec::new();
        for row in sql.query(table::TABLES, &[publication]).await? {
            let (schema, name, rows): (String, String, i64) =
                (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
            let compared = Compared::load(sql, &schema, &name).await?;
            tables.push(described(&compared, rows, false));
        }
        for pb::VerifyName { schema, name } in also {
            if tables
                .iter()
                .any(|table| table.schema == *schema && table.name == *name)
            {
                continue;
            }
            match Compared::load(sql, schema, name).await {
                Ok(compared) => tables.push(described(&compared, 0, true)),
                Err(table::Error::Catalog(catalog::Error::Missing(..) | catalog::Error::NoKey(..))) => {}
                Err(error) => return Err(error.into()),
            }
        }
        let probe = sql.query_one(table::PROBE, &[]).await?;
        let ids = |ids: &mut dyn Iterator<Item = NodeId>| ids.map(|id| u32::from(id.0)).collect();
        let members = lock(&self.seat.shared.members);
        Ok(pb::VerifyOpened {
            tables,
            members: ids(&mut members.live().into_iter()),
            dropped: ids(&mut members.dropped().into_keys()),
            probe: probe.try_get(0)?,
            encoding: probe.try_get(1)?,
        })
    }

    /// Rows of these tables are being brought to who lacks them.
    async fn adding(&mut self, adding: &pb::VerifyAdding) -> Result<(), Error> {
        let names = adding
            .tables
            .iter()
            .map(|table| (table.schema.clone(), table.name.clone()));
        let names: Vec<(String, String)> = names.collect();
        if adding.wait {
            // It may have been taken out here before: what comes from here on is not passed over any more.
            self.seat.shared.passed_over.read(self.sql()?).await?;
            for (schema, name) in &names {
                self.wait_for_writers(schema, name).await?;
            }
        } else {
            self.adding = None;
            self.adding = Some(Adding::of(&self.seat.shared, names));
        }
        Ok(())
    }

    /// Waits until all have ended that have written the table until now: what they wrote before it was in the publication
    /// nobody decodes, and no snapshot shows it before.
    async fn wait_for_writers(&self, schema: &str, name: &str) -> Result<(), Error> {
        let sql = self.sql()?;
        let mut open: Option<Vec<String>> = None;
        let until = Instant::now() + WRITERS_PATIENCE;
        loop {
            let rows = sql.query(WRITERS, &[&schema, &name, &open]).await?;
            let some = rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?)));
            let some = some.collect::<Result<Vec<(String, String)>, tokio_postgres::Error>>()?;
            let Some((_, who)) = some.first() else {
                return Ok(());
            };
            if Instant::now() >= until {
                return Err(Error::Other(format!(
                    "{who} has written {schema}.{name} and not ended yet: what it wrote before the table was replicated cannot be brought; end it, and run this again"
                )));
            }
            open.get_or_insert_with(|| some.into_iter().map(|(transaction, _)| transaction).collect());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    async fn table(&mut self, schema: &str, name: &str) -> Result<Arc<Compared>, Error> {
        let at = (schema.to_owned(), name.to_owned());
        if let Some(table) = self.tables.get(&at) {
            return Ok(Arc::clone(table));
        }
        let table = Arc::new(Compared::load(self.sql()?, schema, name).await?);
        self.tables.insert(at, Arc::clone(&table));
        Ok(table)
    }

    /// Begins anew with a snapshot of this moment.
    async fn snapshot(&mut self) -> Result<(), Error> {
        let end = if self.snapshot_since.take().is_some() {
            "COMMIT; "
        } else {
            ""
        };
        let begin = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SELECT pg_current_snapshot()";
        self.sql()?.batch_execute(&format!("{end}{begin}")).await?;
        self.snapshot_since = Some(Instant::now());
        Ok(())
    }

    async fn end_snapshot(&mut self) -> Result<(), Error> {
        if self.snapshot_since.take().is_some() {
            self.sql()?.batch_execute("COMMIT").await?;
        }
        Ok(())
    }

    /// Reads the table piece by piece.
    async fn scan(&mut self, scan: &pb::VerifyScan) -> Result<(), Error> {
        let table = self.table(&scan.schema, &scan.name).await?;
        known(&table, &scan.columns)?;
        if self.snapshot_since.is_none() {
            self.snapshot().await?;
        }
        let size = self
            .sql()?
            .query_one(table::SIZE, &[&scan.schema, &scan.name])
            .await?;
        let (pages, page_rows): (i64, f64) = (size.try_get(0)?, size.try_get(1)?);
        let pages = u64::try_from(pages).unwrap_or(0);
        let wanted = if scan.rate == 0 { PIECE_ROWS.1 } else { scan.rate };
        let piece_rows = wanted.clamp(PIECE_ROWS.0, PIECE_ROWS.1);
        let piece = ((piece_rows as f64 / page_rows.max(1.0)) as u64).max(1);
        let bits = scan.bits.min(super::blocks::BITS_MAX);
        let mut blocks = if scan.wanted.is_empty() {
            vec![(0u64, 0i64); 1 << bits]
        } else {
            Vec::new()
        };
        let (began, mut read, mut from) = (Instant::now(), 0u64, 0);
        loop {
            if self
                .snapshot_since
                .is_some_and(|since| since.elapsed() > SNAPSHOT_MAX)
            {
                self.snapshot().await?;
            }
            let to = from + piece;
            // Rows that came since the size was asked are on later pages.
            let last = to >= pages;
            let range = (from, (!last).then_some(to));
            let rows = if scan.wanted.is_empty() {
                let sql = table.blocks_sql(&scan.columns, bits, range);
                self.add_blocks(&sql, &mut blocks).await?
            } else {
                let sql = table.rows_sql(&scan.columns, bits, range);
                self.send_rows(&table, &sql, &scan.wanted).await?;
                // Not those sent, but those looked at.
                (page_rows * (pages.min(to).saturating_sub(from)) as f64) as u64
            };
            read += rows;
            self.say(Answer::Progress(pb::VerifyProgress { rows: read }))
                .await?;
            if last {
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

    async fn send_rows(&self, table: &Compared, sql: &str, wanted: &Bytes) -> Result<(), Error> {
        let bitmap = wanted.as_ref();
        let rows = self.sql()?.query_raw(sql, [&bitmap]).await?;
        let mut rows = std::pin::pin!(rows);
        let hash_at = table.desc.key.len();
        let mut message = pb::VerifyRows::default();
        while let Some(row) = rows.next().await {
            let row = row?;
            let mut key = Vec::new();
            let image = table.key_image(&row, 0)?;
            table.desc.canonical_key_of_image(&image, &mut key)?;
            message.rows.push(pb::VerifyRow {
                key: key.into(),
                hash: row.try_get(hash_at)?,
            });
            if message.rows.len() >= MESSAGE_ROWS {
                self.say(Answer::Rows(std::mem::take(&mut message))).await?;
            }
        }
        if !message.rows.is_empty() {
            self.say(Answer::Rows(message)).await?;
        }
        Ok(())
    }

    fn unwatch(&mut self) {
        if let Some(set) = self.watched.take() {
            lock(&self.seat.shared.resolver).unwatch(set.id);
        }
    }

    async fn fence(&mut self) -> Result<(), Error> {
        let fence = match self.fence.take().filter(|fence| !fence.is_closed()) {
            Some(fence) => fence,
            None => Fence::open(&self.seat.config).await?,
        };
        let passed = fence.pass(&self.seat.shared).await;
        self.fence = Some(fence);
        Ok(passed?)
    }

    /// Step 1 of the cut (see [`super`]).
    async fn watch(&mut self, watch: pb::VerifyWatch) -> Result<pb::VerifyWatched, Error> {
        let table = self.table(&watch.schema, &watch.name).await?;
        let images = watch.keys.iter().map(|key| table.image_of_canonical(key));
        let images = images.collect::<Result<Vec<_>, _>>()?;
        self.unwatch();
        let (id, keys) = {
            let mut resolver = lock(&self.seat.shared.resolver);
            let table = resolver.table_id(&table.desc);
            let keys = watch.keys.iter();
            let keys: Vec<RowKey> = keys.map(|key| RowKey::from_canonical(table, key)).collect();
            (resolver.watch(keys.iter().cloned()), keys)
        };
        self.watched = Some(Set {
            id,
            table,
            images,
            keys,
        });
        self.fence().await?;
        let shared = &self.seat.shared;
        let decoded = *shared.decoded.borrow();
        let mut framed = shared.framed.subscribe();
        let reached = framed.wait_for(|framed| *framed >= decoded);
        match tokio::time::timeout(FRAMED_PATIENCE, reached).await {
            Ok(Ok(_)) => {}
            _ => {
                let text = "its own transactions do not get into its journal; see `anabranch status` there";
                return Err(Error::Other(text.to_owned()));
            }
        }
        let mut vector = shared.applied.borrow().clone();
        vector.raise(shared.node, *shared.own.borrow());
        Ok(pb::VerifyWatched {
            vector: vector_to_wire(&vector),
        })
    }

    /// Waits until all of `upto` is applied here.
    async fn wait_applied(&self, upto: &Vector, patience: Duration) -> Result<(), Error> {
        let shared = &self.seat.shared;
        let others: Vector = upto.iter().filter(|(node, _)| *node != shared.node).collect();
        let mut applied = shared.applied.subscribe();
        let reached = applied.wait_for(|applied| applied.includes(&others));
        match tokio::time::timeout(patience, reached).await {
            Ok(Ok(_)) => Ok(()),
            _ => {
                let applied = shared.applied.borrow().clone();
                let late = others
                    .iter()
                    .find(|(node, position)| !applied.covers(*node, *position));
                let late = late.map_or_else(String::new, |(node, position)| {
                    format!(
                        " of node {node} it has applied up to {}, and not to {position}",
                        applied.get(node)
                    )
                });
                Err(Error::Other(format!(
                    "it does not catch up within {} s:{late}; see `anabranch status` there",
                    patience.as_secs()
                )))
            }
        }
    }

    /// Step 2 of the cut.
    async fn look(&mut self, look: &pb::VerifyLook) -> Result<pb::VerifyLooked, Error> {
        let patience = Duration::from_millis(look.patience_ms.into());
        self.wait_applied(&vector_from_wire(&look.upto), patience).await?;
        let set = self
            .watched
            .take()
            .ok_or_else(|| Error::Other("nothing is watched".to_owned()))?;
        let looked = self.look_at(&set, look).await;
        self.watched = Some(set);
        looked
    }

    async fn look_at(&mut self, set: &Set, look: &pb::VerifyLook) -> Result<pb::VerifyLooked, Error> {
        known(&set.table, &look.columns)?;
        let before = lock(&self.seat.shared.resolver).watched(set.id, &set.keys)?;
        self.snapshot().await?;
        let mut states = vec![pb::VerifyState::default(); set.keys.len()];
        self.read(set, look, &mut states).await?;
        let sql = self.sql()?;
        let canonical: Vec<&[u8]> = set.keys.iter().map(RowKey::canonical).collect();
        let (schema, name) = (&set.table.desc.schema, &set.table.desc.name);
        let kept = sql.query(QUARANTINED, &[schema, name, &canonical]).await?;
        let kept = kept.iter().map(|row| row.try_get::<_, Vec<u8>>(0));
        let kept = kept.collect::<Result<HashSet<_>, _>>()?;
        let xids: Vec<i64> = before
            .iter()
            .map(|row| i64::from(row.local_xid))
            .filter(|&xid| xid != 0)
            .collect();
        let hidden = sql.query(&xid::hidden(), &[&xids]).await?;
        let hidden = hidden.iter().map(|row| row.try_get::<_, i64>(0));
        let hidden = hidden.collect::<Result<HashSet<_>, _>>()?;
        self.end_snapshot().await?;
        // What is visible above is known to the resolver below.
        self.fence().await?;
        let after = lock(&self.seat.shared.resolver).watched(set.id, &set.keys)?;
        for (((state, key), before), after) in states.iter_mut().zip(&set.keys).zip(before).zip(after) {
            state.moved = after.moved || hidden.contains(&i64::from(before.local_xid));
            state.quarantined = kept.contains(key.canonical());
        }
        Ok(pb::VerifyLooked { states })
    }

    async fn read(
        &self,
        set: &Set,
        look: &pb::VerifyLook,
        states: &mut [pb::VerifyState],
    ) -> Result<(), Error> {
        let (sql, table) = (self.sql()?, &set.table);
        let params = keys(set)?;
        let text = table.look_sql(&look.columns, look.details, look.whole);
        let rows = sql.query_raw(&text, references(&params)).await?;
        let mut rows = std::pin::pin!(rows);
        let mut bytes = 0;
        while let Some(row) = rows.next().await {
            let row = row?;
            let Some(state) = place(&row).and_then(|at| states.get_mut(at)) else {
                continue;
            };
            state.present = true;
            state.hash = row.try_get(1)?;
            if look.details {
                state.column_hashes = row.try_get(2)?;
            }
            if look.whole && bytes < WHOLE_BYTES_MAX {
                let image = table.row_image(&row, if look.details { 3 } else { 2 })?;
                let put = encode(&table.desc, image);
                if bytes + put.len() <= WHOLE_BYTES_MAX {
                    bytes += put.len();
                    state.row = put;
                }
            }
        }
        if look.details {
            for row in sql.query(&table.keys_sql(), &references(&params)).await? {
                if let Some(state) = place(&row).and_then(|at| states.get_mut(at)) {
                    state.key = row.try_get(1)?;
                }
            }
        }
        Ok(())
    }

    /// What the newest writes made of the watched rows, as far as the journal here tells.
    async fn newest(&self, newest: &pb::VerifyNewest) -> Result<pb::VerifyLooked, Error> {
        let set = self
            .watched
            .as_ref()
            .ok_or_else(|| Error::Other("nothing is watched".to_owned()))?;
        let desc = &set.table.desc;
        let unknown = pb::VerifyState {
            moved: true,
            ..pb::VerifyState::default()
        };
        let mut states = vec![unknown; set.keys.len()];
        let shared = &self.seat.shared;
        if !lock(&shared.resolver).is_last_update_wins(desc) {
            return Ok(pb::VerifyLooked { states });
        }
        let origins: Vec<NodeId> = {
            let members = lock(&shared.members);
            members
                .live()
                .into_iter()
                .chain(members.dropped().into_keys())
                .collect()
        };
        let (journal, upto) = (self.seat.journal.clone(), vector_from_wire(&newest.upto));
        let settled = lock(&shared.settled).clone();
        let keys: Vec<Vec<u8>> = set.keys.iter().map(|key| key.canonical().to_vec()).collect();
        let (schema, name) = (desc.schema.clone(), desc.name.clone());
        let found = tokio::task::spawn_blocking(move || {
            newest::find(&journal, &origins, (&upto, &settled), (&schema, &name), &keys)
        });
        let found = found
            .await
            .map_err(|_| Error::Other("reading the journal ended unexpectedly".to_owned()))??;
        let mut bytes = 0;
        for (state, key) in states.iter_mut().zip(&set.keys) {
            let Some(newest_write) = found.get(key.canonical()).filter(|write| write.is_known) else {
                continue;
            };
            let Some((described, row)) = &newest_write.image else {
                *state = pb::VerifyState::default();
                continue;
            };
            if let Some(hash) = self.hash_of(&set.table, described, row, &newest.columns).await? {
                let put = encode(described, row.clone());
                bytes += put.len();
                *state = pb::VerifyState {
                    present: true,
                    hash,
                    // Empty: it is sent when it is asked for by itself.
                    row: if bytes <= WHOLE_BYTES_MAX {
                        put
                    } else {
                        Bytes::new()
                    },
                    ..pb::VerifyState::default()
                };
            }
        }
        Ok(pb::VerifyLooked { states })
    }

    /// The hash of a row that is in no table.
    async fn hash_of(
        &self,
        table: &Compared,
        described: &TableDesc,
        row: &RowImage,
        columns: &[String],
    ) -> Result<Option<i64>, Error> {
        let plan = table.plan_of(described)?;
        let Some(sql) = Compared::hash_sql(&plan, described, columns) else {
            return Ok(None);
        };
        let mut rows = plan.rows();
        rows.push(&Source::Row(row))?;
        let (array, text) = rows.finish();
        let params = parameters(array, None, text);
        let row = self.sql()?.query_one(&sql, &references(&params)).await?;
        Ok(Some(row.try_get(1)?))
    }

    /// Hands rows to the applier, and waits until it has mended them.
    async fn mend(&mut self, mend: pb::VerifyMend) -> Result<pb::VerifyMended, Error> {
        let nothing = || Error::Other("a row that is not watched".to_owned());
        let set = self.watched.as_ref().ok_or_else(nothing)?;
        let mut rows = Vec::new();
        for row in &mend.rows {
            let at = row.at as usize;
            let (key, image) = set.keys.get(at).zip(set.images.get(at)).ok_or_else(nothing)?;
            let put = if row.row.is_empty() {
                None
            } else {
                Some(decode(row.row.clone())?)
            };
            let (table, image_of_row) = match put {
                Some((table, image)) => (table, Some(image)),
                None => (Arc::clone(&set.table.desc), None),
            };
            rows.push(Row {
                table,
                key: key.clone(),
                key_image: image.clone(),
                image: image_of_row,
            });
        }
        // A job has rows of one description: those of a source are alike, those of the journal need not be.
        let mut jobs: Vec<(Vec<u32>, Vec<Row>)> = Vec::new();
        for (asked, mut row) in mend.rows.iter().zip(rows) {
            let alike = jobs.iter_mut().find(|(_, rows)| {
                let mut rows = rows.iter();
                rows.any(|other| other.table == row.table && other.image.is_some() == row.image.is_some())
            });
            match alike {
                Some((asked_of, rows)) => {
                    if let Some(first) = rows.first() {
                        row.table = Arc::clone(&first.table);
                    }
                    asked_of.push(asked.at);
                    rows.push(row);
                }
                None => jobs.push((vec![asked.at], vec![row])),
            }
        }
        let watch = set.id;
        let mut outcomes = Vec::new();
        for (asked, rows) in jobs {
            let (reply, replied) = oneshot::channel();
            self.seat.shared.mend(Job { watch, rows, reply });
            let done = tokio::time::timeout(MEND_PATIENCE, replied).await;
            let Ok(Ok(done)) = done else {
                let text = "its applier does not come to it; see `anabranch status` there";
                return Err(Error::Other(text.to_owned()));
            };
            for (at, outcome) in asked.into_iter().zip(done) {
                let refused = match outcome {
                    Outcome::Mended => String::new(),
                    Outcome::Moved => super::talk::MOVED.to_owned(),
                    Outcome::Refused(why) => why,
                };
                outcomes.push(pb::VerifyOutcome { at, refused });
            }
        }
        Ok(pb::VerifyMended { outcomes })
    }
}

fn described(compared: &Compared, rows: i64, unpublished: bool) -> pb::VerifyTable {
    let desc = &compared.desc;
    let columns = desc.columns.iter();
    pb::VerifyTable {
        schema: desc.schema.clone(),
        name: desc.name.clone(),
        types: columns.clone().map(|column| column.type_name.clone()).collect(),
        columns: columns.map(|column| column.name.clone()).collect(),
        key: desc.key_columns().map(|column| column.name.clone()).collect(),
        rows: u64::try_from(rows).unwrap_or(0),
        unpublished,
    }
}

/// Tables that are being added, until it is dropped.
struct Adding {
    shared: Arc<Shared>,
    names: Vec<(String, String)>,
}

impl Adding {
    fn of(shared: &Arc<Shared>, names: Vec<(String, String)>) -> Self {
        let mut adding = lock(&shared.adding);
        for name in &names {
            *adding.entry(name.clone()).or_default() += 1;
        }
        drop(adding);
        Self {
            shared: Arc::clone(shared),
            names,
        }
    }
}

impl Drop for Adding {
    fn drop(&mut self) {
        let mut adding = lock(&self.shared.adding);
        for name in &self.names {
            if let Some(count) = adding.get_mut(name) {
                *count = count.saturating_sub(1);
            }
        }
        adding.retain(|_, count| *count > 0);
    }
}

fn known(table: &Compared, columns: &[String]) -> Result<(), Error> {
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

/// The parameters of a statement over the watched keys.
fn keys(set: &Set) -> Result<Vec<Parameter>, Error> {
    let mut rows = set.table.plan.rows();
    for image in &set.images {
        rows.push(&Source::Key(image))?;
    }
    let (array, text) = rows.finish();
    Ok(parameters(array, None, text))
}

fn place(row: &tokio_postgres::Row) -> Option<usize> {
    let ordinal: i64 = row.try_get(0).ok()?;
    usize::try_from(ordinal).ok()?.checked_sub(1)
}

/// A row as it travels: a frame's payload with one put.
fn encode(table: &Arc<TableDesc>, row: RowImage) -> Bytes {
    let mut frame = FrameBuilder::default();
    frame.changes().push(&Change::Put {
        table: Arc::clone(table),
        op: PutOp::Update,
        row,
        old_key: None,
        former: None,
    });
    frame.end_txn(&TxnHeader {
        position: Position::ZERO,
        stamp: Stamp::ZERO,
        deps: Vector::new(),
        xid: 0,
        commit_us: 0,
        witness_us: 0,
        change_count: 1,
    });
    frame.finish()
}

fn decode(payload: Bytes) -> Result<(Arc<TableDesc>, RowImage), Malformed> {
    let mut cache = TableCache::default();
    let mut reader = FrameReader::new(NodeId(1), payload, &mut cache)?;
    let Some(Record::Txn(_, mut changes)) = reader.next_record()? else {
        return Err(Malformed("a row without its table"));
    };
    match changes.next_change()? {
        Some(Change::Put { table, row, .. }) => Ok((table, row)),
        _ => Err(Malformed("no row where one is expected")),
    }
}

#[cfg(test)]
mod tests {
    use anabranch_proto::row::Cell;
    use anabranch_proto::schema::ColumnDesc;

    use super::*;

    #[test]
    fn a_row_survives_its_travel() {
        let column = |name: &str| ColumnDesc {
            name: name.to_owned(),
            type_oid: 25,
            type_mod: -1,
            type_name: "pg_catalog.text".to_owned(),
        };
        let table = Arc::new(TableDesc {
            schema: "s".to_owned(),
            name: "t".to_owned(),
            columns: vec![column("a"), column("b")],
            key: vec![0],
            identity_full: false,
        });
        let row = RowImage::build([Cell::Binary(b"k"), Cell::Null].into_iter());
        let (described, decoded) = decode(encode(&table, row.clone())).unwrap();
        assert_eq!((described, decoded), (table, row));
        assert!(decode(Bytes::from_static(b"nonsense")).is_err());
    }
}
