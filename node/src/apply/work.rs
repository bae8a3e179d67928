//! What one apply transaction does, kept so that it can run again.
//!
//! Small transactions are resolved once: their batches stay here and are written again after a failure. A
//! large one is read from the journal again; then what was lost to it the first time is carried along.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;

use anabranch_conflict::Resolution;
use anabranch_proto::schema::TableDesc;
use anabranch_proto::stamp::Stamp;
use anabranch_proto::txn::{Change, Changes, TxnHeader};
use anabranch_proto::{NodeId, Position, Vector};

use super::batch::{Action, Batch, Truncate, Write};
use super::ddl::Ddl;
use super::failure::Failure;
use super::feed::{Head, Pieces};
use super::loss::Loss;
use super::session::Session;
use super::write::Writer;
use crate::config::Config;
use crate::index::RowKey;
use crate::journal::{CursorState, Journal};
use crate::resolve::{Expect, Found, Resolver, TxnClaims};
use crate::shared::{Shared, Visibility, lock};

/// Rows of a large transaction that are written at once.
const CHUNK_ROWS: usize = 4_000;
/// Bytes of images that are written at once.
const CHUNK_BYTES: usize = 8 << 20;

const PROGRESS: &str = "INSERT INTO anabranch.progress AS p (origin, epoch, lsn, stamp) \
    SELECT v.o, v.e, v.l, v.s FROM unnest($1::int4[], $2::int8[], $3::text[]::pg_lsn[], $4::bytea[]) AS v(o, e, l, s) \
    ON CONFLICT (origin) DO UPDATE SET epoch = excluded.epoch, lsn = excluded.lsn, stamp = excluded.stamp \
    RETURNING (pg_current_xact_id()::text::int8 & 4294967295)";

enum Step {
    Rows(Batch),
    Truncate(Truncate, Vec<Loss>),
    Ddl(Ddl),
}

impl Step {
    fn into_losses(self) -> Vec<Loss> {
        match self {
            Self::Rows(batch) => batch.losses,
            Self::Truncate(_, losses) => losses,
            Self::Ddl(_) => Vec::new(),
        }
    }
}

enum Stream {
    /// Nothing (more) to resolve.
    Done,
    Small(VecDeque<(Arc<TxnHeader>, Changes)>),
    Large {
        header: Arc<TxnHeader>,
        from: CursorState,
        pieces: Option<Box<Pieces>>,
        changes: Option<Changes>,
    },
}

/// One apply transaction's work.
pub(crate) struct Work {
    stream: Stream,
    steps: Vec<Step>,
    /// Losses of chunks that are no longer among the steps.
    carried: Vec<Loss>,
    found: Vec<Found>,
    release: Vec<(Arc<TableDesc>, RowKey)>,
    released: Vec<(Arc<TableDesc>, RowKey)>,
    headers: Vec<Arc<TxnHeader>>,
    last_seq: Option<u64>,
    left_to: Position,
    isolated: bool,
    chunked: bool,
    /// Has DDL been met in it?
    has_ddl: bool,
    /// The transaction of the last try, 0 before the first.
    xid: u32,
    /// What the transaction that is being resolved claims, and which it is.
    claims: TxnClaims,
    claiming: Option<Arc<TxnHeader>>,
    /// Rows that yielded to a large transaction's, to go again should it run again.
    evicted: Vec<Action>,
}

impl Work {
    fn new(stream: Stream) -> Self {
        Self {
            stream,
            steps: Vec::new(),
            carried: Vec::new(),
            found: Vec::new(),
            release: Vec::new(),
            released: Vec::new(),
            headers: Vec::new(),
            last_seq: None,
            left_to: Position::ZERO,
            isolated: false,
            chunked: false,
            has_ddl: false,
            xid: 0,
            claims: TxnClaims::default(),
            claiming: None,
            evicted: Vec::new(),
        }
    }

    /// Transactions in causal order: several small ones, or one large one.
    pub(crate) fn txns(heads: Vec<Head>) -> Self {
        let mut work = Self::new(Stream::Done);
        let mut small = VecDeque::new();
        for head in heads {
            work.last_seq = work.last_seq.max(Some(head.seq()));
            match head {
                Head::Small(header, changes, _) => {
                    let header = Arc::new(header);
                    work.headers.push(Arc::clone(&header));
                    small.push_back((header, changes));
                }
                Head::Large { header, from, .. } => {
                    let header = Arc::new(header);
                    work.headers.push(Arc::clone(&header));
                    work.chunked = true;
                    work.stream = Stream::Large {
                        header,
                        from,
                        pieces: None,
                        changes: None,
                    };
                }
            }
        }
        if !small.is_empty() {
            work.stream = Stream::Small(small);
        }
        work
    }

    /// Findings of the decoder.
    pub(crate) fn found(found: Vec<Found>) -> Self {
        Self {
            found,
            ..Self::new(Stream::Done)
        }
    }

    /// Keys to take out of the quarantine.
    pub(crate) fn release(keys: Vec<(Arc<TableDesc>, RowKey)>) -> Self {
        Self {
            release: keys,
            ..Self::new(Stream::Done)
        }
    }

    /// A quarantined row, tried again.
    pub(crate) fn again(action: Action) -> Self {
        let mut work = Self::new(Stream::Done);
        let mut batch = Batch::default();
        batch.actions.push(action);
        work.steps.push(Step::Rows(batch));
        work.isolated = true;
        work
    }

    pub(crate) fn take_found(&mut self) -> Vec<Found> {
        std::mem::take(&mut self.found)
    }

    pub(crate) const fn has_txns(&self) -> bool {
        !self.headers.is_empty()
    }

    pub(crate) const fn txn_count(&self) -> u64 {
        self.headers.len() as u64
    }

    /// Row changes of its transactions.
    pub(crate) fn change_count(&self) -> u64 {
        self.headers.iter().map(|header| header.change_count).sum()
    }

    pub(crate) const fn last_seq(&self) -> Option<u64> {
        self.last_seq
    }

    /// The last own transaction that a row was left to: what is written here may only be seen with it.
    pub(crate) const fn left_to(&self) -> Position {
        self.left_to
    }

    /// May it wait for other rows than those it writes? Not while a commit, which may hold one, may wait for it.
    pub(crate) fn may_wait(&self, shared: &Shared) -> bool {
        self.found.is_empty() || *shared.visibility.borrow() != Visibility::BeforeDependents
    }

    /// What was prepared in an earlier try may be of a shape that is not there (any more).
    pub(crate) const fn has_ddl(&self) -> bool {
        self.has_ddl
    }

    pub(crate) const fn is_isolated(&self) -> bool {
        self.isolated
    }

    /// Runs with savepoints from now on.
    pub(crate) fn isolate(&mut self, failure: &Failure) {
        tracing::warn!(error = %failure, "a row was refused: the batch runs again with each row by itself");
        self.isolated = true;
    }

    /// The positions that are reached once this is committed.
    pub(crate) fn reaches(&self) -> Vector {
        self.headers
            .iter()
            .map(|header| (header.origin(), header.position))
            .collect()
    }

    /// What each origin had applied at the last of its transactions here, itself included: in-band knowledge.
    pub(crate) fn knowledge(&self) -> Vec<(NodeId, Vector)> {
        let mut out: Vec<(NodeId, Vector)> = Vec::new();
        for header in self.headers.iter().rev() {
            if out.iter().all(|(origin, _)| *origin != header.origin()) {
                let mut knows = header.deps.clone();
                knows.raise(header.origin(), header.position);
                out.push((header.origin(), knows));
            }
        }
        out
    }

    /// The stamps of its transactions.
    pub(crate) fn stamps(&self) -> impl Iterator<Item = Stamp> {
        self.headers.iter().map(|header| header.stamp)
    }

    /// Prepares for another try.
    pub(crate) fn start_again(&mut self, journal: &Journal) -> Result<(), Failure> {
        self.released.clear();
        if !self.chunked {
            return Ok(());
        }
        // Resolved again from the journal: what was lost to it is known to the resolver no more, so it is kept.
        let mut losses = std::mem::take(&mut self.carried);
        for step in self.steps.drain(..) {
            losses.extend(step.into_losses());
        }
        losses.retain(|loss| !loss.is_of_one_try());
        (self.claims, self.claiming) = (TxnClaims::default(), None);
        let kept = Batch::known(losses, self.evicted.clone());
        if !kept.is_empty() {
            self.steps.push(Step::Rows(kept));
        }
        if let Stream::Done = self.stream {
            return Ok(());
        }
        if let Stream::Large {
            header,
            from,
            pieces,
            changes,
        } = &mut self.stream
        {
            *pieces = Some(Box::new(Pieces::large(journal, header.origin(), *from)?));
            *changes = None;
        }
        Ok(())
    }

    /// Begins the transaction: progress first, which names it as the daemon's own. Gives its xid, 32 bits.
    pub(crate) async fn begin(&self, session: &mut Session, node: NodeId) -> Result<u32, Failure> {
        let (mut origins, mut epochs, mut lsns, mut stamps) =
            (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let mut rows: Vec<(NodeId, Position, Stamp)> = Vec::new();
        for header in &self.headers {
            match rows.iter_mut().find(|row| row.0 == header.origin()) {
                Some(row) => *row = (row.0, header.position, header.stamp.max(row.2)),
                None => rows.push((header.origin(), header.position, header.stamp)),
            }
        }
        if rows.is_empty() {
            rows.push((node, Position::ZERO, Stamp::ZERO));
        }
        for (origin, position, stamp) in rows {
            origins.push(i32::from(origin.0));
            epochs.push(i64::from(position.epoch));
            lsns.push(position.lsn.to_string());
            stamps.push(stamp.to_bytes().to_vec());
        }
        let statement = session.prepare(PROGRESS).await?;
        let params: [&(dyn tokio_postgres::types::ToSql + Sync); 4] = [&origins, &epochs, &lsns, &stamps];
        let (begun, progress) = tokio::join!(
            session.client.batch_execute("BEGIN"),
            session.client.query(&statement, &params)
        );
        begun?;
        let progress = progress?;
        let xid: i64 = progress
            .first()
            .map(|row| row.try_get(0))
            .transpose()?
            .unwrap_or(0);
        Ok(u32::try_from(xid).unwrap_or(0))
    }

    /// Writes everything, resolving on the way what was not resolved in an earlier try.
    pub(crate) async fn write(&mut self, writer: &mut Writer<'_>, config: &Config) -> Result<(), Failure> {
        if !self.found.is_empty() {
            self.carried = writer.reconcile(&self.found).await?;
        }
        self.released.extend(self.release.iter().cloned());
        let before = std::mem::replace(&mut self.xid, writer.xid);
        for at in 0..self.steps.len() {
            if let Some(Step::Rows(batch)) = self.steps.get_mut(at) {
                refresh(batch, writer.shared, (before, writer.xid))?;
                self.left_to = self.left_to.max(batch.left_to);
            }
            self.write_step(at, writer).await?;
        }
        loop {
            let mut batch = Batch::default();
            let filled = self.fill(&mut batch, writer.shared, writer.xid, config)?;
            self.left_to = self.left_to.max(batch.left_to);
            let new = self.steps.len();
            if !batch.is_empty() {
                self.steps.push(Step::Rows(batch));
            }
            // Both are kept before either is tried: the stream is past them, and another try runs what is kept.
            if let Some(step) = filled.step {
                self.has_ddl |= matches!(step, Step::Ddl(_));
                self.steps.push(step);
            }
            for at in new..self.steps.len() {
                self.write_step(at, writer).await?;
            }
            if filled.end {
                return Ok(());
            }
            if self.chunked {
                for step in self.steps.drain(..) {
                    self.carried.extend(step.into_losses());
                }
                writer.sift_touched().await?;
            }
        }
    }

    async fn write_step(&mut self, at: usize, writer: &mut Writer<'_>) -> Result<(), Failure> {
        match self.steps.get_mut(at) {
            Some(Step::Rows(batch)) => {
                batch.read_back(writer.lookup)?;
                batch.losses.retain(|loss| !loss.is_of_one_try());
                let kept: Vec<_> = {
                    let mut resolver = lock(&writer.shared.resolver);
                    let quarantined = resolver.quarantined();
                    let of = batch
                        .actions
                        .iter()
                        .filter(|action| quarantined.contains_key(&action.key));
                    of.map(|action| (Arc::clone(&action.table), action.key.clone()))
                        .collect()
                };
                writer.write(batch).await?;
                let refused = |key: &RowKey| {
                    batch
                        .losses
                        .iter()
                        // One that lost to another row is settled.
                        .any(|loss| loss.resolution == Resolution::Skip && loss.key == *key)
                };
                self.released
                    .extend(kept.into_iter().filter(|(_, key)| !refused(key)));
            }
            Some(Step::Truncate(truncate, losses)) => losses.extend(writer.truncate(truncate).await?),
            Some(Step::Ddl(ddl)) => writer.ddl(ddl).await?,
            None => {}
        }
        Ok(())
    }

    /// All lines for the log.
    pub(crate) fn losses(&self) -> Vec<Loss> {
        let of_steps = self.steps.iter().flat_map(|step| match step {
            Step::Rows(batch) => batch.losses.as_slice(),
            Step::Truncate(_, losses) => losses,
            Step::Ddl(_) => &[],
        });
        self.carried.iter().chain(of_steps).cloned().collect()
    }

    /// Keys that leave the quarantine with this transaction.
    pub(crate) fn released(&self) -> Vec<(Arc<TableDesc>, RowKey)> {
        self.released.clone()
    }

    fn fill(
        &mut self,
        batch: &mut Batch,
        shared: &Shared,
        xid: u32,
        config: &Config,
    ) -> Result<Filled, Failure> {
        let rows_max = config.apply.batch_rows_max.max(CHUNK_ROWS);
        let mut resolver = lock(&shared.resolver);
        batch.horizon = shared.horizon();
        while let Some((header, change)) = self.stream.next_change(shared)? {
            meet_member(&change, shared)?;
            self.end_claims(Some(&header), batch, &mut resolver)?;
            let Some(change) = shared.passed_over.sift(change) else {
                continue;
            };
            let ddl = Ddl::of(&change, &header)?;
            let truncate = batch.add(&mut resolver, change, (&header, &mut self.claims), xid)?;
            let step = ddl
                .map(Step::Ddl)
                .or_else(|| truncate.map(|truncate| Step::Truncate(truncate, Vec::new())));
            if step.is_some() {
                return Ok(Filled { step, end: false });
            }
            if self.chunked && (batch.change_count >= rows_max || batch.byte_count >= CHUNK_BYTES) {
                return Ok(Filled {
                    step: None,
                    end: false,
                });
            }
        }
        self.end_claims(None, batch, &mut resolver)?;
        Ok(Filled {
            step: None,
            end: true,
        })
    }

    /// The transaction before `next` is resolved whole, if that is another one: rows yield.
    fn end_claims(
        &mut self,
        next: Option<&Arc<TxnHeader>>,
        batch: &mut Batch,
        resolver: &mut Resolver,
    ) -> Result<(), Failure> {
        let same = |header: &TxnHeader| next.is_some_and(|next| next.stamp == header.stamp);
        if self.claiming.as_ref().is_some_and(|header| same(header)) {
            return Ok(());
        }
        if let Some(header) = std::mem::replace(&mut self.claiming, next.cloned()) {
            for row in resolver.end_claims(&mut self.claims, &header.deps)? {
                let action = batch.give_up(&row, resolver.node())?;
                if self.chunked && !row.incoming {
                    self.evicted.push(action);
                }
            }
        }
        Ok(())
    }

    /// Opens a large transaction's pieces.
    pub(crate) fn open(&mut self, journal: &Journal) -> Result<(), Failure> {
        if let Stream::Large {
            header, from, pieces, ..
        } = &mut self.stream
            && pieces.is_none()
        {
            *pieces = Some(Box::new(Pieces::large(journal, header.origin(), *from)?));
        }
        Ok(())
    }
}

struct Filled {
    /// What stands between the rows before and after it.
    step: Option<Step>,
    end: bool,
}

impl Stream {
    fn next_change(&mut self, shared: &Shared) -> Result<Option<(Arc<TxnHeader>, Change)>, Failure> {
        match self {
            Self::Done => Ok(None),
            Self::Small(txns) => {
                while let Some((header, changes)) = txns.front_mut() {
                    if let Some(change) = changes.next_change()? {
                        return Ok(Some((Arc::clone(header), change)));
                    }
                    lock(&shared.recent).insert(header);
                    txns.pop_front();
                }
                *self = Self::Done;
                Ok(None)
            }
            Self::Large {
                header,
                pieces,
                changes,
                ..
            } => loop {
                if let Some(current) = changes
                    && let Some(change) = current.next_change()?
                {
                    return Ok(Some((Arc::clone(header), change)));
                }
                lock(&shared.recent).insert(header);
                *changes = match pieces {
                    Some(pieces) => pieces.next_piece()?,
                    None => None,
                };
                if changes.is_none() {
                    return Ok(None);
                }
            },
        }
    }
}

/// A fact about a member, on its way into the table: noted before anything that it comes with may be called stable.
fn meet_member(change: &Change, shared: &Shared) -> Result<(), Failure> {
    if let Change::Put { table, row, .. } = change
        && table.is_own()
        && table.name == crate::membership::TABLE
        && let Some(fact) = crate::membership::of_row(table, row)?
    {
        shared.expect_member(&fact);
    }
    Ok(())
}

/// Brings an earlier try's batch up to date: rows that a local write has won meanwhile are left alone, and the
/// resolver learns the new writer.
fn refresh(batch: &mut Batch, shared: &Shared, (before, xid): (u32, u32)) -> Result<(), Failure> {
    let mut resolver = lock(&shared.resolver);
    batch.horizon = shared.horizon();
    for mut action in std::mem::take(&mut batch.actions) {
        if resolver.merging(action.key.table()).is_some() {
            // Whatever came meanwhile goes into it: also a local write with a lower stamp, which is below the horizon by now, so that
            // the guard would let the row be written as it was decided.
            if !action.folds.contains(&action.version.stamp) {
                action.folds.push(action.version.stamp);
            }
            if let Some(current) = resolver.current(&action.key)? {
                action.version = current.version;
            }
            batch.actions.push(action);
        } else if resolver.is_winner(
            &action.key,
            action.version.stamp,
            matches!(action.write, Write::Put(_)),
        )? {
            batch.actions.push(action);
        } else if resolver.is_parked(&action.key, action.version.stamp)? {
            // The finding has its line.
            action.write = Write::Delete(action.table.image_of_canonical(action.key.canonical())?);
            (action.careful, action.recall) = (true, false);
            batch.actions.push(action);
        } else if let Some(winner) = resolver.current(&action.key)? {
            if resolver.is_ranked(action.key.table()) {
                let left = (Arc::clone(&action.table), action.version.stamp);
                batch.left.insert(action.key.clone(), left);
            }
            batch.leave_to(&winner, shared.node);
        }
    }
    take_up(batch, &resolver, shared.node)?;
    for action in &mut batch.actions {
        // It follows another write of this row by the same transaction.
        if before != 0 && action.expect.xid == before {
            action.expect.xid = xid;
        }
        resolver.set_xid(&action.key, action.version.stamp, xid)?;
    }
    Ok(())
}

/// Rows that were left to a winner which is one no more. A local write stands as it was committed; what anybody else wrote
/// nobody else will write.
fn take_up(batch: &mut Batch, resolver: &Resolver, node: NodeId) -> Result<(), Failure> {
    let written: HashSet<RowKey> = batch.actions.iter().map(|action| action.key.clone()).collect();
    let mut left = std::mem::take(&mut batch.left);
    for (key, (table, winner)) in left.iter_mut().filter(|(key, _)| !written.contains(*key)) {
        let Some(current) = resolver
            .current(key)?
            .filter(|current| current.version.stamp != *winner)
        else {
            continue;
        };
        *winner = current.version.stamp;
        if current.version.origin() == node {
            batch.leave_to(&current, node);
            continue;
        }
        let unknown = Expect {
            present: None,
            xid: 0,
        };
        batch.restore(table, key.clone(), None, current.version, unknown)?;
        if let Some(action) = batch.actions.last_mut().filter(|_| current.parked) {
            // It gave up a unique value, and stays away.
            action.recall = false;
        }
    }
    batch.left = left;
    Ok(())
}
