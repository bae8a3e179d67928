//! Mending: rows that have drifted from the other nodes' become what a node that is right has, and nobody hears of it.
//!
//! In:   rows to be so, watched by the resolver ([`crate::verify`])        Out: written rows, or why they were left alone
//! Holds: nothing; jobs wait in [`crate::shared::Shared::mends`]
//! Invariants: 1. the transaction begins with `anabranch.progress`, as all of the daemon's: it is an echo, gets no stamp,
//!        is not sent on, and meets nobody as a conflict; 2. a row is written only while it is locked, everything before the
//!        lock is decoded, and no version of it was met since it is watched; 3. nothing goes to the quarantine or
//!        the conflict log: what is refused is said to who asked
//! On crash: the row is mended or not; verifying tells
//! Not here: what is right (`crate::verify`)
//!
//! Why not a new write at the node that is right: it would be the newest everywhere, and win over an
//! application's write that is on its way, which then is a conflict and lost. This one takes part in no
//! arbitration. The image was read, by the rule of `crate::verify`, where the row had exactly the versions that it
//! has here; so it is what this node should have made of them, and what comes later is applied over it as ever. Where a row
//! is missing there is nothing to lock, so a local insert and delete may come between the look and the write:
//! the watch is looked at once more behind the commit, and who asked compares the row again in any case.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use anabranch_conflict::{Kind, Op, Version};
use anabranch_proto::row::RowImage;
use anabranch_proto::schema::TableDesc;
use anabranch_proto::{Position, Stamp};
use tokio::sync::{oneshot, watch};

use super::batch::{Action, Write};
use super::failure::{Failure, Recovery};
use super::orphans::Touched;
use super::work::Work;
use super::write::{Mode, Writer};
use super::{Applier, Seat};
use crate::index::RowKey;
use crate::resolve::WatchId;
use crate::shared::{Counters, Shared, lock};

/// Tries of rows that are locked, or written meanwhile.
const TRIES: u32 = 5;

/// A row that shall be so.
#[derive(Debug, Clone)]
pub struct Row {
    /// Its table, as the image describes it.
    pub table: Arc<TableDesc>,
    /// The row.
    pub key: RowKey,
    /// Image of its key.
    pub key_image: RowImage,
    /// Its image; none for no row.
    pub image: Option<RowImage>,
}

/// What became of one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It is so.
    Mended,
    /// A write of it was met, or it is locked: left alone.
    Moved,
    /// The server refuses it.
    Refused(String),
}

/// Rows of one table to be mended together.
#[derive(Debug)]
pub struct Job {
    /// Where they are watched.
    pub watch: WatchId,
    /// The rows.
    pub rows: Vec<Row>,
    /// Who waits for it.
    pub reply: oneshot::Sender<Vec<Outcome>>,
}

impl Shared {
    /// Hands a job to the applier.
    pub fn mend(&self, job: Job) {
        lock(&self.mends).push_back(job);
        self.found.notify_one();
    }
}

impl Applier {
    /// Works off the job that waits longest, if one does.
    pub(super) async fn mend_next(
        &self,
        seat: &mut Seat,
        stop: &watch::Receiver<bool>,
    ) -> Result<bool, Failure> {
        let Some(job) = lock(&self.shared.mends).pop_front() else {
            return Ok(false);
        };
        let outcomes = match self.mend_some(seat, job.watch, &job.rows, stop).await {
            Ok(outcomes) => outcomes,
            // One of them, or all: each by itself.
            Err(failure) if matches!(failure.recovery(), Recovery::Isolate | Recovery::Stand) => {
                let mut outcomes = Vec::with_capacity(job.rows.len());
                for row in &job.rows {
                    let one = std::slice::from_ref(row);
                    outcomes.push(match self.mend_some(seat, job.watch, one, stop).await {
                        Ok(one) => one.into_iter().next().unwrap_or(Outcome::Moved),
                        Err(failure) if failure.recovery() == Recovery::Halt => return Err(failure),
                        Err(failure) => Outcome::Refused(failure.to_string()),
                    });
                }
                outcomes
            }
            Err(failure) if failure.recovery() == Recovery::Halt => return Err(failure),
            Err(_) => vec![Outcome::Moved; job.rows.len()],
        };
        // Who asked may be gone.
        let _ = job.reply.send(outcomes);
        Ok(true)
    }

    async fn mend_some(
        &self,
        seat: &mut Seat,
        watch: WatchId,
        rows: &[Row],
        stop: &watch::Receiver<bool>,
    ) -> Result<Vec<Outcome>, Failure> {
        let mut tries = 0;
        loop {
            let failure = match self.mend_once(seat, watch, rows).await {
                Ok(outcomes) => return Ok(outcomes),
                Err(failure) => failure,
            };
            // Fails where the connection is gone: the next piece of work finds that, too, and connects again.
            let rolled_back = seat.session.client.batch_execute("ROLLBACK").await;
            tries += 1;
            let again = failure.recovery() == Recovery::Retry && rolled_back.is_ok();
            if !again || tries >= TRIES || *stop.borrow() {
                return Err(failure);
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn mend_once(
        &self,
        seat: &mut Seat,
        watch: WatchId,
        rows: &[Row],
    ) -> Result<Vec<Outcome>, Failure> {
        let Some(first) = rows.first() else {
            return Ok(Vec::new());
        };
        let work = Work::release(Vec::new());
        let xid = work.begin(&mut seat.session, self.config.node.id).await?;
        // Durable when it is said to be done.
        let client = &seat.session.client;
        client
            .batch_execute("SET LOCAL synchronous_commit = local")
            .await?;
        let mut writer = Writer {
            session: &mut seat.session,
            fence: &seat.fence,
            shared: &self.shared,
            lookup: &self.lookup,
            brought_back: HashSet::new(),
            locked: HashSet::new(),
            put_off: HashSet::new(),
            has_run: false,
            unheard: Vec::new(),
            drifted: Vec::new(),
            apart: Vec::new(),
            touched: Touched::default(),
            reading: None,
            node_name: &self.config.node.name,
            xid,
            seen_upto: None,
            is_patient: false,
            mode: Mode::Plain,
            horizon: None,
        };
        let plan = writer.session.plan(&first.table).await?;
        let actions: Vec<Action> = rows.iter().map(action).collect();
        let mut sorted: Vec<&Action> = actions.iter().collect();
        sorted.sort_by(|a, b| a.key.cmp(&b.key));
        writer.lock_rows(&plan, &sorted).await?;
        writer.fence.pass(&self.shared).await?;
        let quiet = self.quiet(watch, rows)?;
        let left: Vec<&Action> = sorted
            .into_iter()
            .filter(|action| quiet.contains(&action.key))
            .collect();
        writer.force(&plan, &left).await?;
        {
            let mut resolver = lock(&self.shared.resolver);
            for action in &left {
                if let Some(entry) = resolver.current(&action.key)? {
                    resolver.set_xid(&action.key, entry.version.stamp, xid)?;
                }
            }
        }
        seat.session.client.batch_execute("COMMIT").await?;
        let table = format!("{}.{}", first.table.schema, first.table.name);
        tracing::info!(table, rows = left.len(), "rows mended by a repair");
        Counters::add(&self.shared.counters.batches, 1);
        let still = match seat.fence.pass(&self.shared).await {
            Ok(()) => self.quiet(watch, rows)?,
            Err(_) => HashSet::new(),
        };
        let outcomes = rows.iter().map(|row| {
            if still.contains(&row.key) && quiet.contains(&row.key) {
                Outcome::Mended
            } else {
                Outcome::Moved
            }
        });
        Ok(outcomes.collect())
    }

    /// Rows that no write was met of since they are watched.
    fn quiet(&self, watch: WatchId, rows: &[Row]) -> Result<HashSet<RowKey>, Failure> {
        let keys: Vec<RowKey> = rows.iter().map(|row| row.key.clone()).collect();
        let watched = lock(&self.shared.resolver).watched(watch, &keys)?;
        let quiet = keys.into_iter().zip(watched);
        let quiet = quiet.filter(|(_, watched)| !watched.moved && !watched.quarantined);
        Ok(quiet.map(|(key, _)| key).collect())
    }
}

fn action(row: &Row) -> Action {
    let (write, kind, op) = match &row.image {
        Some(image) => (Write::Put(image.clone()), Kind::Put, Op::Update),
        None => (Write::Delete(row.key_image.clone()), Kind::Delete, Op::Delete),
    };
    // It has no stamp: it is no version.
    let version = Version {
        stamp: Stamp::ZERO,
        position: Position::ZERO,
        kind,
    };
    Action::careful(Arc::clone(&row.table), row.key.clone(), write, version, op)
}
