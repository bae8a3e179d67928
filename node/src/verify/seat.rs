//! A node's side: answers what it is asked, one question after the other.
//!
//! In:   questions of a daemon, this one or a peer            Out: answers
//! Holds: for each conversation two SQL sessions, at most one snapshot, and the keys that are watched for it
//! Invariants: 1. whatever a conversation holds ends with it; 2. a question that cannot be answered ends nothing but itself
//! On crash: gone
//! Not here: what the questions are for ([`super::run`])

mod adding;
mod cut;
mod mend;
mod scan;

use std::collections::HashMap;
use std::sync::Arc;

use anabranch_proto::NodeId;
use anabranch_proto::link as pb;
use anabranch_proto::row::RowImage;
use anabranch_proto::wire::Malformed;
use futures_util::{Stream, StreamExt};
use pb::verify_request::Ask;
use pb::verify_response::Answer;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_postgres::Client;
use tonic::Status;

use self::adding::Adding;
use super::newest;
use super::table::{self, Compared};
use crate::apply::catalog;
use crate::apply::fence::{self, Fence};
use crate::config::Config;
use crate::index::RowKey;
use crate::journal::Journal;
use crate::pg;
use crate::resolve::{self, WatchId};
use crate::shared::{Shared, lock};

/// Most bytes of rows in one answer: what mends them must fit a request.
pub(super) const WHOLE_BYTES_MAX: usize = 3 << 20;

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
    watched: Option<Arc<Set>>,
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
            Ask::Position(_) => Answer::Watched(self.position().await?),
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
            tables.push(match Compared::load(sql, &schema, &name).await {
                Ok(compared) => described(&compared, rows, false),
                Err(error @ table::Error::Catalog(catalog::Error::Sql(_))) => return Err(error.into()),
                // The others can be compared none the less.
                Err(error) => pb::VerifyTable {
                    schema,
                    name,
                    problem: error.to_string(),
                    ..pb::VerifyTable::default()
                },
            });
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
}

fn described(compared: &Compared, rows: i64, unpublished: bool) -> pb::VerifyTable {
    let desc = &compared.desc;
    let columns = desc.columns.iter();
    pb::VerifyTable {
        schema: desc.schema.clone(),
        name: desc.name.clone(),
        types: columns.clone().map(|column| column.type_name.clone()).collect(),
        type_mods: columns.clone().map(|column| column.type_mod).collect(),
        columns: columns.map(|column| column.name.clone()).collect(),
        key: desc.key_columns().map(|column| column.name.clone()).collect(),
        rows: u64::try_from(rows).unwrap_or(0),
        unpublished,
        problem: String::new(),
    }
}
